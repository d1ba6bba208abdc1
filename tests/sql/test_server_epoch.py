"""What makes the server of before another server: claims commit asynchronously, and each of these may forget some."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from uuid import uuid4

import psycopg
import pytest

from pgconductor.db.calls import Calls, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import own_server
from pgconductor.errors import LeaseLost
from pgconductor.testing.server import folder_in_memory


def test_crash_of_one_server_process_ends_the_trust_in_claims_made_before() -> None:
    """The postmaster survives it and keeps its start time, but what was committed asynchronously is gone.

    Else the owner of a claim that was forgotten could claim the row again under the very same token, and two bodies of
    one execution would run that the fence cannot tell apart.
    """
    calls, owner = Calls("pgconductor"), uuid4()
    with own_server(settings={"fsync": "off", "wal_writer_delay": "10s"}, base_dir=folder_in_memory()) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            migrate_sync(conn, "pgconductor")
            conn.execute("select pgconductor.register_queue('q')")
            run_sync(conn, calls.register_orchestrator(owner, "o", 1000.0, "0", 1, [WorkerRow("q", ["t"], 1)]))
            conn.execute("select pgconductor.invoke('t', queue => 'q')")
            claimed = run_sync(conn, calls.claim("q", owner, ["t"], 1)).claimed
            assert [item.claim_no for item in claimed] == [1]
            with psycopg.connect(server.dsn(), autocommit=True) as victim:
                os.kill(victim.info.backend_pid, signal.SIGKILL)
            wait_cut(conn)
        conn = reconnect(server.dsn())
        with conn:
            ((claim_no,),) = conn.execute("select claim_no from pgconductor.executions").fetchall()
            print(f"the claim was {'forgotten' if claim_no == 0 else 'kept'}")
            with pytest.raises(LeaseLost):
                run_sync(conn, calls.claim("q", owner, ["t"], 1))
            assert not run_sync(conn, calls.heartbeat(owner, 1000.0, ["q"])).is_alive


def wait_cut(conn: psycopg.Connection[tuple[object, ...]]) -> None:
    """Until the postmaster has ended this session with all others: then it lets nobody in before it is ready."""
    until = time.monotonic() + 60
    while not conn.closed:
        assert time.monotonic() < until
        with contextlib.suppress(psycopg.OperationalError):
            conn.execute("select pg_sleep(0.01)")


def reconnect(dsn: str) -> psycopg.Connection[tuple[object, ...]]:
    """Connect as soon as the server has recovered; until then it refuses, or cuts the connection."""
    until = time.monotonic() + 60
    while True:
        try:
            conn = psycopg.connect(dsn, autocommit=True)
            conn.execute("select 1")
            return conn
        except psycopg.OperationalError:
            assert time.monotonic() < until
            time.sleep(0.1)  # nobody tells when it is there again
