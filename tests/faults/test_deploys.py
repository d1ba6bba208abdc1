"""Versions of the program replace each other while work goes on: nothing stops, is lost, runs twice or is charged.

The old version is the real program of schema version 1 where the repository's history has it, else today's program on
a schema made newer than itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import psycopg
import pytest
import trio
from faults.site import LIMIT, until
from migrations.old_program import source_of, unpack

from pgconductor import Conductor, Orchestrator, SchemaTooNew
from pgconductor.db.call import Call
from pgconductor.db.calls import Heartbeat, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.db.schema import (
    FunctionFile,
    Migration,
    SqlSource,
    load_functions,
    load_source,
    migrate_gen,
    migrate_sync,
)

_PROGRAM = Path(__file__).with_name("deploy_program.py")


class Deploy:
    """Processes of several versions on one database, and what their handlers wrote."""

    def __init__(self, dsn: str, folder: Path, stack: ExitStack) -> None:
        self.dsn = dsn
        self._folder = folder
        self._stack = stack
        self._journal = folder / "journal"

    def start(self, name: str, *, old: Path | None = None, lease: float = 5.0) -> subprocess.Popen[bytes]:
        """Start a process and wait until it claims; `old`: the folder of another version of the program."""
        paths = [str(old / "src")] if old is not None else []
        with self.log(name).open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(_PROGRAM), self.dsn, str(self._journal), name, str(lease)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *filter(None, sys.path)])},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

        def is_ready() -> bool:
            assert process.poll() is None, self.log(name).read_text()
            return self.journal("ready", name) != []

        until(is_ready)
        return process

    def log(self, name: str) -> Path:
        return self._folder / f"log {name}"

    def journal(self, event: str, name: str | None = None) -> list[int]:
        """The numbers for which an event was written."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        fields = [line.split(" ", 2) for line in lines]
        return [int(n) for what, n, who in fields if what == event and name in (None, who)]

    def invoke(self, numbers: range) -> None:
        query(
            self.dsn,
            "select pgconductor.invoke('note', jsonb_build_object('n', n), queue => 'q') from unnest(%s::int[]) n",
            list(numbers),
        )

    def check_once(self, count: int) -> None:
        """Each was started once and finished once, at no cost."""
        assert Counter(self.journal("start")) == Counter(range(count))
        check_finished(self.dsn, count)


@pytest.fixture
def deploy(pgconductor_empty_dsn: str, tmp_path: Path) -> Iterator[Deploy]:
    with ExitStack() as stack:
        deploy = Deploy(pgconductor_empty_dsn, tmp_path, stack)
        try:
            yield deploy
        except BaseException:
            print(*(path.read_text() for path in tmp_path.glob("log *")))
            raise


def query(dsn: str, text: str, *params: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as conn:
        cursor = conn.execute(text.encode(), params or None)
        return cursor.fetchall() if cursor.description else []


def migrate(dsn: str, source: SqlSource | None = None, *, stop_wait: float = LIMIT) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        migrate_sync(conn, source=source, stop_wait=stop_wait)


def live(dsn: str) -> int:
    return int(query(dsn, "select count(*) from pgconductor._private_executions")[0][0])


def check_finished(dsn: str, count: int) -> None:
    assert query(
        dsn,
        "select state::text, count(*), count(distinct id), max(attempt), max(crashes)"
        " from pgconductor._private_finished group by 1",
    ) == [("completed", count, count, 1, 0)]
    assert live(dsn) == 0


# --- not breaking ---


def test_real_old_program_works_on_over_the_migration_and_beside_the_new_one(deploy: Deploy, tmp_path: Path) -> None:
    """Or a deploy has to stop everything first. The old one works on the new schema alone, beside the new one, and
    started there.
    """
    old_program = unpack(tmp_path / "old")
    migrate(deploy.dsn, source_of(old_program))
    old = deploy.start("old", old=old_program)
    deploy.invoke(range(300))
    until(lambda: len(deploy.journal("end")) >= 30)
    migrate(deploy.dsn)
    deploy.invoke(range(300, 400))
    until(lambda: live(deploy.dsn) == 0)
    new = deploy.start("new")
    deploy.invoke(range(400, 600))
    until(lambda: live(deploy.dsn) == 0)
    old.send_signal(signal.SIGTERM)
    assert old.wait(LIMIT) == 0
    deploy.invoke(range(600, 650))
    until(lambda: live(deploy.dsn) == 0)
    restarted = deploy.start("old again", old=old_program)
    new.send_signal(signal.SIGTERM)
    assert new.wait(LIMIT) == 0
    deploy.invoke(range(650, 700))
    until(lambda: live(deploy.dsn) == 0)
    restarted.send_signal(signal.SIGTERM)
    assert restarted.wait(LIMIT) == 0
    assert "lease of orchestrator" not in deploy.log("old").read_text()
    deploy.check_once(700)


def next_versions(count: int) -> list[SqlSource]:
    """Schemas newer than this program by 1, 2, …: more columns where rows are read, and each verb set aside and made
    anew, as for a change of its arguments or its result.
    """
    source = load_source()
    sources: list[SqlSource] = []
    for number in range(source.version + 1, source.version + 1 + count):
        text = f"""
            alter table @schema@._private_orchestrators add column extra_{number} text default 'x';
            alter table @schema@._private_tasks add column extra_{number} int;
            alter table @schema@._private_queues add column extra_{number} int;
            alter table @schema@._private_executions add column extra_{number} int default {number};
            alter table @schema@._private_finished add column extra_{number} text;
            create table @schema@._private_new_{number} (id uuid primary key);
            """
        aside = f"""
            do $$
            declare
                v_function regprocedure;
                v_name text;
            begin
                for v_function, v_name in select p.oid, p.proname from pg_proc p
                    where p.pronamespace = (select oid from pg_namespace where nspname = @schema_literal@)
                      and (p.proname in ('flush', 'claim', 'heartbeat', 'recover', 'signals', 'release_unknown')
                           or p.proname ~ '^_private_(claim|flush)_\\d')
                loop
                    execute format('alter function %s rename to %I', v_function, '_private_old_{number}_' || v_name);
                end loop;
            end $$;
            """
        functions = (source.functions[0], FunctionFile("00_zzz.sql", aside), *load_functions()[1:])
        migrations = (*source.migrations, Migration(number, f"{number:04}_next.sql", text))
        sources.append(source := SqlSource(migrations, functions))
    return sources


class Work:
    """A conductor with tasks that count their starts; `held` ones wait for `release`."""

    def __init__(self, dsn: str, *names: str) -> None:
        self.conductor = Conductor(dsn)
        self.starts: Counter[tuple[str, int]] = Counter()
        self.release = trio.Event()
        self.begun = trio.Event()
        self.tasks = {name: self._task(name) for name in names}

    def _task(self, name: str) -> Any:
        @self.conductor.task(name=name, queue="q")
        async def count(n: int) -> int:
            self.starts[name, n] += 1
            self.begun.set()
            if name == "held":
                await self.release.wait()
            return n

        return count

    def orchestrator(self, *, migrate: bool = False, **options: Any) -> Orchestrator:
        worker = self.conductor.create_worker(
            queue="q", tasks=list(self.tasks.values()), claim_batch=20, flush_batch=20, sweep_interval=0.5
        )
        return Orchestrator(self.conductor, workers=[worker], migrate=migrate, **options)


async def test_running_program_works_on_over_one_harmless_migration_after_the_other(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a cached plan, an added column, or a function that was set aside and made anew stops a running worker."""
    monkeypatch.setattr(Conductor, "prepare_threshold", 0)  # every statement is prepared, at once
    work = Work(pgconductor_dsn, "count")
    done = trio.Event()
    invoked = 0

    async def migrate_on() -> None:
        await work.begun.wait()
        for source in next_versions(4):
            await trio.to_thread.run_sync(migrate, pgconductor_dsn, source)
        done.set()

    with trio.fail_after(3 * LIMIT):
        async with work.conductor, trio.open_nursery() as nursery:
            orchestrator = work.orchestrator(lease=30.0)
            await nursery.start(orchestrator.run)
            nursery.start_soon(migrate_on)
            task = work.tasks["count"]
            while not done.is_set() or invoked < 1000:
                handles = await task.invoke_many([task.bind(n) for n in range(invoked, invoked + 100)])
                invoked += 100
                assert [await handle.result() for handle in handles] == list(range(invoked - 100, invoked))
            assert orchestrator.statistics().incarnations == 1
            orchestrator.stop()
    assert work.starts == Counter({("count", n): 1 for n in range(invoked)})
    check_finished(pgconductor_dsn, invoked)


def test_call_that_waits_behind_a_migration_is_answered(pgconductor_dsn: str) -> None:
    """Or a heartbeat that came meanwhile misses the functions that it had looked up, and its worker dies of XX000."""
    calls, owner = Conductor(pgconductor_dsn).calls, uuid4()
    (source,) = next_versions(1)
    answers: list[object] = []
    with ExitStack() as stack:
        migrator, worker, observer = (
            stack.enter_context(psycopg.connect(pgconductor_dsn, autocommit=True)) for _ in range(3)
        )
        run_sync(worker, calls.register_queue("q"))
        run_sync(worker, calls.register_orchestrator(owner, "me", 60.0, "0", 1, [WorkerRow("q", ["t"], 1)]))
        steps = migrate_gen("pgconductor", source, 60.0, 60.0)
        call: Call[Any] = next(steps)
        while call.query != b"commit":
            call = steps.send(run_sync(migrator, call))
        beat = calls.heartbeat(owner, 60.0, ["q"])
        thread = threading.Thread(target=lambda: answers.append(run_sync(worker, beat)), daemon=True)
        thread.start()
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        until(lambda: observer.execute(waits, (worker.info.backend_pid,)).fetchone() == (True,))
        run_sync(migrator, call)
        thread.join(LIMIT)
    assert [answer.is_alive for answer in answers if isinstance(answer, Heartbeat)] == [True]


async def test_twenty_orchestrators_start_at_once_on_an_empty_database(pgconductor_empty_dsn: str) -> None:
    """Or of the replicas of a first deploy all but one crash, or a queue is registered twice."""
    works = [Work(pgconductor_empty_dsn, "count") for _ in range(20)]
    orchestrators = [work.orchestrator(migrate=True) for work in works]
    with trio.fail_after(3 * LIMIT):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                for orchestrator in orchestrators:
                    starting.start_soon(nursery.start, orchestrator.run)
            async with works[0].conductor:
                task = works[0].tasks["count"]
                handles = await task.invoke_many([task.bind(n) for n in range(100)])
                assert [await handle.result() for handle in handles] == list(range(100))
            for orchestrator in orchestrators:
                orchestrator.stop()
    starts: Counter[tuple[str, int]] = Counter()
    for work in works:
        starts.update(work.starts)
    assert starts == Counter({("count", n): 1 for n in range(100)})
    assert query(pgconductor_empty_dsn, "select name from pgconductor._private_queues") == [("q",)]
    check_finished(pgconductor_empty_dsn, 100)


async def test_rolling_deploy_leaves_new_tasks_to_new_programs(pgconductor_dsn: str) -> None:
    """Thirty interleaved starts of a version without task t2 and one with it: or the old one claims what it does not
    know and burns its attempts, or its registration deletes what the new one registered.
    """
    v1, v2 = Work(pgconductor_dsn, "t1"), Work(pgconductor_dsn, "t1", "t2")
    registered = "select queue from pgconductor._private_tasks where name = 't2'"
    t1, t2 = v2.tasks["t1"], v2.tasks["t2"]

    with trio.fail_after(3 * LIMIT):
        async with v1.conductor, v2.conductor, trio.open_nursery() as nursery:
            for n in range(10):
                old = v1.orchestrator()
                await nursery.start(old.run)
                waiting = await t2.invoke(n)
                await (await t1.invoke(n)).result()  # behind it in the queue: the old one has passed it over
                if n:
                    assert query(pgconductor_dsn, registered) == [("q",)]
                new = v2.orchestrator()
                await nursery.start(new.run)
                assert await waiting.result() == n
                old.stop()
                again = v1.orchestrator()
                await nursery.start(again.run)
                assert query(pgconductor_dsn, registered) == [("q",)]
                new.stop()
                again.stop()
    assert set(v1.starts) <= {("t1", n) for n in range(10)}
    assert v1.starts + v2.starts == Counter({(name, n): 1 for name in ("t1", "t2") for n in range(10)})
    claims = (
        "select task, max(claim_no), max(attempt), count(*) from pgconductor._private_finished group by 1 order by 1"
    )
    assert query(pgconductor_dsn, claims) == [("t1", 1, 1, 10), ("t2", 1, 1, 10)]


# --- breaking ---


def breaking_next() -> SqlSource:
    source = load_source()
    number = source.version + 1
    migration = Migration(
        number,
        f"{number:04}_break.sql",
        "--! breaking\ncreate table @schema@._private_broken (id uuid)",
        is_breaking=True,
    )
    return SqlSource((*source.migrations, migration), source.functions)


def too_new(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(too_new, cast("BaseExceptionGroup[BaseException]", error).exceptions))
    return isinstance(error, SchemaTooNew)


def test_suspended_old_program_delays_a_breaking_migration_for_its_lease_and_ends_when_it_wakes(
    deploy: Deploy,
) -> None:
    """Or it is waited for without end; or, awake again, it goes on with tables it does not know."""
    migrate(deploy.dsn)
    old = deploy.start("old", lease=2.0)
    old.send_signal(signal.SIGSTOP)
    try:
        migrate(deploy.dsn, breaking_next())
    finally:
        old.send_signal(signal.SIGCONT)
    assert old.wait(LIMIT) != 0
    log = deploy.log("old").read_text()
    assert "SchemaTooNew" in log
    assert "upgrade this program" in log
    alive = "select count(*) from pgconductor._private_orchestrators where died_at is null and expires_at > now()"
    assert query(deploy.dsn, alive) == [(0,)]


async def test_running_old_program_is_stopped_before_a_breaking_migration(pgconductor_dsn: str) -> None:
    """Or it is waited for without end, its handlers are cut off, or its last results are lost."""
    work = Work(pgconductor_dsn, "held")
    orchestrator = work.orchestrator()
    errors: list[BaseException] = []
    migrated = trio.Event()
    asked = "select count(*) from pgconductor._private_orchestrators where stop_requested_at is not null"

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        try:
            await orchestrator.run(task_status=task_status)
        except BaseException as error:  # noqa: BLE001  # it is what the test looks at
            errors.append(error)

    async def migrate_it() -> None:
        await trio.to_thread.run_sync(migrate, pgconductor_dsn, breaking_next())
        migrated.set()

    with trio.fail_after(LIMIT):
        async with work.conductor, trio.open_nursery() as nursery:
            await nursery.start(run)
            await work.tasks["held"].invoke(1)
            await work.begun.wait()
            nursery.start_soon(migrate_it)
            while query(pgconductor_dsn, asked) == [(0,)]:
                await trio.sleep(0.02)
            assert not migrated.is_set(), "it is still at work"
            work.release.set()
            await migrated.wait()
    assert len(errors) == 1
    assert too_new(errors[0])
    check_finished(pgconductor_dsn, 1)
    with pytest.raises(SchemaTooNew, match="upgrade this program"):
        await work.orchestrator().run()


def test_older_program_refuses_a_newer_breaking_schema_and_says_so(deploy: Deploy) -> None:
    """Or it starts and fails with whatever has changed under it."""
    migrate(deploy.dsn, breaking_next())
    with pytest.raises(AssertionError, match=r"SchemaTooNew: schema 'pgconductor' has the breaking migration"):
        deploy.start("old")
