"""Through pgbouncer in transaction mode, with a direct `listen_dsn`: nothing that is pooled may rely on a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import trio
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import Conductor, Orchestrator
from pgconductor.testing import missing_program

pytestmark = pytest.mark.skipif(
    bool(missing_program("pgbouncer", "apt-get install pgbouncer")),
    reason=missing_program("pgbouncer", "apt-get install pgbouncer") or "-",
)


@pytest.fixture
def pooled_dsn(pgconductor_dsn: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """DSN of the same database through a pgbouncer of the test's own: transaction mode, two server connections."""
    given = conninfo_to_dict(pgconductor_dsn)
    # A short path, since it holds a Unix socket; readable for the account that pgbouncer changes to.
    folder = Path(tmp_path_factory.mktemp("b"))
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o711)
    folder.chmod(0o777)
    server = " ".join(
        f"{name}='{given[name]}'" for name in ("host", "port", "dbname", "user", "password") if name in given
    )
    (folder / "users.txt").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\npooled = {server}\n[pgbouncer]\nlisten_addr =\nlisten_port = 6432\nunix_socket_dir = {folder}\n"
        f"auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 100\n"
        f"logfile = {folder}/log\npidfile = {folder}/pid\n"
    )
    for name in ("users.txt", "pgbouncer.ini"):
        (folder / name).chmod(0o644)
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    assert program is not None
    # pgbouncer refuses to be root; who owns the server's socket may use it.
    sockets = Path(str(given.get("host", "")))
    owner = sockets.owner() if sockets.is_absolute() else "nobody"
    account = ["-u", owner] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [program, "-q", *account, str(folder / "pgbouncer.ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    dsn = make_conninfo("", host=str(folder), port="6432", dbname="pooled", user=given.get("user", "postgres"))
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                psycopg.connect(dsn).close()
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield dsn
    finally:
        process.terminate()
        process.wait(10)


async def test_everything_works_behind_a_transaction_pooler(pooled_dsn: str, pgconductor_dsn: str) -> None:
    """No prepared statement, no session setting and no session lock on what is pooled; wake-ups come directly."""
    conductor = Conductor(pooled_dsn, listen_dsn=pgconductor_dsn)

    @conductor.task(queue="q")
    async def double(n: int) -> int:
        return 2 * n

    worker = conductor.create_worker(queue="q", tasks=[double], sweep_interval=60.0)
    orchestrator = Orchestrator(conductor, workers=[worker])
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        handles = await double.invoke_many([double.bind(n) for n in range(200)])
        with trio.fail_after(30):
            assert [await handle.result() for handle in handles] == [2 * n for n in range(200)]
            for n in range(10):  # one by one, to a worker that sleeps: no sweep comes in this time
                assert await (await double.invoke(n)).result() == 2 * n
        (statistics,) = orchestrator.statistics().workers
        assert statistics.reactor.listener is not None
        assert statistics.reactor.listener.is_listening
        orchestrator.stop()
    with psycopg.connect(pooled_dsn, autocommit=True, prepare_threshold=None) as conn:
        row = conn.execute("select current_setting('statement_timeout')").fetchone()
        assert row == ("0",), "a setting of the engine's was left in a session that others use next"
