"""The server runs out of something: room for notifications, disk, old rows' removal. On a server of our own."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import trio
from faults.inside import LIMIT, check_once, invoke, query, until, work_on
from psycopg.conninfo import make_conninfo

from pgconductor import Conductor, NoDatabase, Orchestrator
from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import own_server
from pgconductor.embedded.server import OwnServer
from pgconductor.retry import Exponential
from pgconductor.testing.server import folder_in_memory


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server(settings={"fsync": "off"}, base_dir=folder_in_memory()) as own:
        with psycopg.connect(own.dsn(), autocommit=True) as conn:
            version = conn.info.server_version
        if version >= 170000:
            own.restart(settings={"fsync": "off", "max_notify_queue_pages": "64"})
        yield own


@pytest.fixture
def dsn(server: OwnServer) -> Iterator[str]:
    """A database of that server with the schema."""
    made = server.create_database()
    with psycopg.connect(made, autocommit=True) as conn:
        migrate_sync(conn, "pgconductor")
    yield made
    server.drop_database(made)


def finished(dsn: str) -> int:
    return int(query(dsn, "select count(*) from pgconductor._private_finished")[0][0])


@pytest.fixture
def full_notify_queue(server: OwnServer) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A foreign session listens inside a transaction, and others have notified until no more goes in."""
    with (
        psycopg.connect(server.dsn(), autocommit=True) as foreign,
        psycopg.connect(server.dsn(), autocommit=True) as conn,
    ):
        if conn.info.server_version < 170000:
            pytest.skip("needs PostgreSQL 17, where the size of the notification queue can be set")
        foreign.execute("listen elsewhere")
        foreign.execute("begin")
        foreign.execute("select 1")
        with suppress(psycopg.errors.ProgramLimitExceeded):
            while True:
                conn.execute("select pg_notify('elsewhere', repeat('x', 7000) || g) from generate_series(1, 10) g")
        with suppress(psycopg.errors.ProgramLimitExceeded):
            while True:
                conn.execute("select pg_notify('elsewhere', '')")
        yield foreign
        foreign.execute("rollback")
        foreign.execute("unlisten *")
        conn.execute("select pg_notification_queue_usage()")  # makes the server look how much is still to be kept


@pytest.mark.parametrize("notify", ["off", "adaptive"])
async def test_full_notification_queue_stops_neither_producers_nor_workers(
    dsn: str, full_notify_queue: psycopg.Connection[tuple[object, ...]], notify: str
) -> None:
    """A NOTIFY fails at commit then and takes its transaction with it: no verb of ours may depend on one. (No. 19.)

    Here a forgotten listener of another application fills it.
    """
    conductor = Conductor(dsn)
    attempts: list[int] = []

    @conductor.task(queue="q", max_attempts=2, backoff=Exponential(initial=0.0))
    async def again(n: int) -> int:
        """Its first attempt fails, so that its flush makes work for others."""
        attempts.append(n)
        if attempts.count(n) == 1:
            raise ValueError("once more")
        return n

    workers = [conductor.create_worker(queue="q", tasks=[again], sweep_interval=0.2, notify=notify) for _ in range(2)]  # type: ignore[arg-type]
    orchestrators = [Orchestrator(conductor, workers=[worker], migrate=False) for worker in workers]
    async with conductor, trio.open_nursery() as nursery:
        for orchestrator in orchestrators:
            await nursery.start(orchestrator.run)
        for n in range(5):
            handle = await again.invoke(n=n)
            assert await handle.result(timeout=20) == n
        nursery.cancel_scope.cancel()
    assert finished(dsn) == 5
    assert query(dsn, "select max(attempt), max(crashes) from pgconductor._private_finished") == [(2, 0)]
    assert full_notify_queue.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


async def test_our_listener_never_holds_up_the_notification_queue(dsn: str) -> None:
    """A listener inside a transaction keeps every notification of the whole server. (No. 19.)"""
    work = work_on(dsn, 0.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(work.orchestrator(sweep=30.0).run)
        for n in range(20):
            with psycopg.connect(dsn, autocommit=True) as conn:
                conn.execute("select pg_notify('elsewhere', repeat('x', 7000))")
            if n % 5 == 0:
                invoke(dsn, 1)
            assert query(
                dsn,
                "select count(*) from pg_stat_activity"
                " where application_name = 'pgconductor listen' and xact_start is not null and state <> 'active'",
            ) == [(0,)]
        await until(lambda: query(dsn, "select pg_notification_queue_usage()") == [(0.0,)])
        nursery.cancel_scope.cancel()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB; only root may make one."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0777", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs a mount of tmpfs, which is refused here: {done.stderr.decode().strip()}")
    for parent in (folder, *folder.parents):  # the server's account must be able to reach it
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


async def test_full_disk_costs_time_and_no_finished_result(server: OwnServer, small_disk: Path) -> None:
    """What cannot be written is kept and written when there is room: no second run, no crash. (Catalogue no. 32.)"""
    data = small_disk / "data"
    data.mkdir()
    owner = server.data_path.stat()
    os.chown(data, owner.st_uid, owner.st_gid)
    ballast = small_disk / "ballast"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"create tablespace small location '{data}'".encode())
        try:
            admin.execute("create database small tablespace small")
            dsn = server.dsn("small")
            with psycopg.connect(dsn, autocommit=True) as conn:
                migrate_sync(conn, "pgconductor")
            work = work_on(dsn, 0.01)
            # Results that need new pages.
            conductor = work.conductor

            @conductor.task(name="large", queue="q")
            async def large(n: int) -> str:
                work.starts[n] += 1
                await trio.sleep(0.01)
                return os.urandom(4000).hex()

            worker = conductor.create_worker(queue="q", tasks=[large], concurrency=10, sweep_interval=0.5)
            orchestrator = Orchestrator(conductor, workers=[worker], migrate=False, lease=60.0)
            with trio.fail_after(LIMIT):
                async with trio.open_nursery() as nursery:
                    await nursery.start(orchestrator.run)
                    query(
                        dsn,
                        "select pgconductor.invoke('large', jsonb_build_object('n', n), queue => 'q')"
                        " from generate_series(1, 800) n",
                    )
                    await until(lambda: finished(dsn) > 20)
                    with ballast.open("wb") as file, suppress(OSError):
                        while True:
                            file.write(bytes(65536))
                            file.flush()
                    refusals = server.log_path.read_text().count("No space left on device")
                    await until(lambda: server.log_path.read_text().count("No space left on device") >= refusals + 5)
                    held = orchestrator.statistics().workers[0].unflushed
                    ballast.unlink()
                    await until(lambda: finished(dsn) == 800)
                    assert orchestrator.statistics().incarnations == 1
                    nursery.cancel_scope.cancel()
            check_once(dsn, work, 800)
            print(f"{held} results were held in memory when there was room again")
            assert "PANIC" not in server.log_path.read_text()
        finally:
            admin.execute("drop database if exists small with (force)")
            with suppress(psycopg.Error):
                admin.execute("drop tablespace small")


async def test_old_snapshot_slows_the_queue_in_proportion_and_not_for_good(dsn: str) -> None:
    """A forgotten transaction keeps every dead row: claims must not read them all again each time. (No. 34, bounded.)

    The catalogue asks for 30 minutes at full load; here it is 6,000 executions, in the healthy state and under it.
    """

    async def drain(first: int) -> float:
        query(
            dsn,
            "select pgconductor.invoke('count', jsonb_build_object('n', n), queue => 'q')"
            " from generate_series(%s::int, %s) n",
            first, first + 2999,
        )  # fmt: skip
        begun = trio.current_time()
        await work.orchestrator(concurrency=100).drain()
        return trio.current_time() - begun

    work = work_on(dsn, 0.0)
    with trio.fail_after(4 * LIMIT):
        healthy = await drain(1)
        with psycopg.connect(dsn) as old:
            old.execute("set transaction isolation level repeatable read")
            old.execute("select count(*) from pgconductor._private_executions")
            under = [await drain(3001), await drain(6001)]
        after = await drain(9001)
    print(f"3,000 took {healthy:.2f} s, {under[0]:.2f} and {under[1]:.2f} s under an old snapshot, then {after:.2f} s")
    assert max(under) <= 10 * healthy
    check_once(dsn, work, 12000)
    assert query(dsn, "select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]


async def test_credentials_that_stop_working_are_waited_out_and_never_logged(
    server: OwnServer, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A rotated password must neither end a running process nor show up in its log. (Catalogue no. 25.)

    At the start it is an error, with one line and no password: tests/cli, tests/client.
    """
    caplog.set_level(logging.DEBUG)
    access = server.data_path / "pg_hba.conf"
    before = access.read_text()
    with psycopg.connect(dsn, autocommit=True) as admin:
        try:
            admin.execute("create role rotated login password 'first-secret'")
            admin.execute(f'grant "{admin.info.user}" to rotated'.encode())
            admin.execute("select pgconductor.register_queue('q')")
            access.write_text("local all rotated scram-sha-256\n" + before)
            admin.execute("select pg_reload_conf()")
            work = work_on(make_conninfo(dsn, user="rotated", password="first-secret"), 0.01)
            orchestrator = work.orchestrator(concurrency=2, lease=60.0)
            async with trio.open_nursery() as nursery:
                await nursery.start(orchestrator.run)
                invoke(dsn, 50)
                await until(lambda: finished(dsn) > 5)
                admin.execute("alter role rotated password 'second-secret'")
                admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'rotated'")
                await until(lambda: "password authentication failed" in caplog.text)
                admin.execute("alter role rotated password 'first-secret'")
                await until(lambda: finished(dsn) == 50)
                assert orchestrator.statistics().incarnations == 1
                nursery.cancel_scope.cancel()
            with pytest.raises(NoDatabase) as refused:
                await work_on(make_conninfo(dsn, user="rotated", password="third-secret"), 0.0).orchestrator().run()
            assert "secret" not in str(refused.value)
        finally:
            access.write_text(before)
            admin.execute("select pg_reload_conf()")
            admin.execute("drop role if exists rotated")
    check_once(dsn, work, 50)
    assert "secret" not in caplog.text
