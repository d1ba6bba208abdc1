"""A pgbouncer of the test run's own, in transaction mode, before the test server; and the tests led through it.

`pytest tests/runtime --through-pgbouncer` (or PGCONDUCTOR_TEST_POOLER=1) runs every test here with the engine's pooled
connections behind it and `listen_dsn` direct. What a test itself asks of the database goes there directly. Without the
option those of `CHOSEN` run both ways.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from runtime import workplace

from pgconductor import Conductor
from pgconductor.db.link import Target
from pgconductor.testing import missing_program

MISSING = missing_program("pgbouncer", "apt-get install pgbouncer")

CHOSEN = frozenset(
    {
        "test_a_large_payload_is_loaded_when_it_runs_and_goes_with_its_row",
        "test_a_lost_lease_interrupts_and_begins_a_new_incarnation",
        "test_an_orchestrator_outlives_the_loss_of_all_its_connections",
        "test_backoff_is_obeyed_by_the_databases_clock",
        "test_block_of_a_transaction_runs_again_and_is_told_what_it_was_told",
        "test_block_runs_again_and_is_told_what_it_was_told",
        "test_every_execution_finishes_once_and_keeps_its_result",
        "test_function_of_a_transaction_writes_once",
        "test_function_writes_once_and_its_value_is_replayed",
        "test_insert_wakes_a_sleeping_worker_by_notify",
        "test_rows_hidden_by_a_claimer_that_dies_reach_the_worker_that_went_to_sleep",
        "test_what_a_dead_orchestrator_held_is_run_by_another",
    }
)

NOT_POOLED = {
    "test_the_engines_sessions_have_brakes_and_names": "a pooled session keeps the administrator's settings",
}

_PORT = "6432"


def is_asked_for(config: pytest.Config) -> bool:
    return bool(config.getoption("--through-pgbouncer")) or os.environ.get("PGCONDUCTOR_TEST_POOLER") == "1"


def _place(dsn: str) -> tuple[object, object]:
    given = conninfo_to_dict(dsn)
    return given.get("host"), given.get("port")


class Pooler:
    """A running pgbouncer; `through` leads a DSN of its server through it."""

    def __init__(self, folder: Path, server_dsn: str) -> None:
        self._folder = folder
        self._server = _place(server_dsn)

    def serves(self, dsn: str) -> bool:
        """Whether a DSN names its server."""
        return _place(dsn) == self._server

    def through(self, dsn: str) -> str:
        kept = {
            name: value for name, value in conninfo_to_dict(dsn).items() if name not in ("host", "port", "password")
        }
        return make_conninfo("", **{**kept, "host": str(self._folder), "port": _PORT})


@contextmanager
def open_pooler(server_dsn: str, *, size: int) -> Iterator[Pooler]:
    """Start pgbouncer before a server, with `size` connections for each database and user."""
    given = conninfo_to_dict(server_dsn)
    # A short path, since it holds a Unix socket; open to the account that pgbouncer changes to.
    folder = Path(tempfile.mkdtemp(prefix="pgc-"))
    folder.chmod(0o777)
    server = " ".join(f"{name}='{given[name]}'" for name in ("host", "port", "password") if name in given)
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = {server} user='{given.get('user', 'postgres')}'\n"
        f"[pgbouncer]\nlisten_addr =\nlisten_port = {_PORT}\nunix_socket_dir = {folder}\nauth_type = any\n"
        f"stats_users = {given.get('user', 'postgres')}\n"
        f"pool_mode = transaction\ndefault_pool_size = {size}\nmax_client_conn = 500\nserver_idle_timeout = 20\n"
        f"logfile = {folder}/log\npidfile = {folder}/pid\n"
    )
    (folder / "pgbouncer.ini").chmod(0o644)
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    assert program is not None
    # pgbouncer refuses to be root; who owns the server's socket may use it.
    sockets = Path(str(given.get("host", "")))
    owner = sockets.owner() if sockets.is_absolute() else "nobody"
    account = ["-u", owner] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [program, "-q", *account, str(folder / "pgbouncer.ini")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pooler = Pooler(folder, server_dsn)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                psycopg.connect(pooler.through(server_dsn)).close()
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield pooler
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def lead_through(pooler: Pooler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have conductors and workplaces that name one server reach it through the pooler, and listen to it directly."""
    construct: Callable[..., None] = Conductor.__init__

    def constructed(self: Conductor, dsn: str | None = None, **options: Any) -> None:
        if dsn is not None and options.get("listen_dsn") is None and pooler.serves(dsn):
            options["listen_dsn"] = dsn
            dsn = pooler.through(dsn)
        construct(self, dsn, **options)

    def target(conninfo: str, listen_conninfo: str, prepare_threshold: int | None) -> Target:
        del prepare_threshold
        return Target(pooler.through(conninfo), listen_conninfo, None)

    monkeypatch.setattr(Conductor, "__init__", constructed)
    monkeypatch.setattr(workplace, "Target", target)
