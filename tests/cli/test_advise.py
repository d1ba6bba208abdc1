"""`pgconductor advise`, as scripts and people read it."""

from __future__ import annotations

import json
from uuid import uuid4

import psycopg
import pytest
from cli.inside import run as _run

from pgconductor.cli import exits
from pgconductor.db.calls import Calls, WorkerLoad, WorkerRow
from pgconductor.db.execute import run_sync


def _work(dsn: str, busy: float) -> None:
    """A queue "q" with something late, and a worker of four runners that has told twice: in 10 s, `busy` at a time."""
    calls, owner = Calls("pgconductor"), uuid4()
    nothing = WorkerLoad("q", 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, None)
    told = nothing._replace(claims=10, claimed=10, busy_seconds=10 * busy, cpu_seconds=8.0)
    with psycopg.connect(dsn, autocommit=True) as conn:
        run_sync(conn, calls.register_queue("q"))
        run_sync(conn, calls.register_orchestrator(owner, "host:1", 60.0, "1", 6, [WorkerRow("q", ["t"], 4)]))
        run_sync(conn, calls.heartbeat(owner, 60.0, [], [nothing]))
        # As if it had been ten seconds ago.
        conn.execute("update pgconductor._private_workers set load.at = (load).at - interval '10 s'")
        run_sync(conn, calls.heartbeat(owner, 60.0, [], [told]))
        conn.execute("select pgconductor.invoke('t', queue => 'q', run_at => now() - interval '1 min')")


def test_nothing_to_advise(pgconductor_dsn: str) -> None:
    """A fresh schema."""
    assert _run("advise", "--dsn", pgconductor_dsn) == (exits.DONE, "No queues yet.\n", "")


def test_verdict_with_figures_and_remedy(pgconductor_dsn: str) -> None:
    """Somebody is to act on it."""
    _work(pgconductor_dsn, busy=4.0)
    code, out, err = _run("advise", "--dsn", pgconductor_dsn)
    assert (code, err) == (exits.DONE, "")
    assert "q: add processes: 1 ready, the oldest for 60 s (5 s is late); 100% of 4 runners busy" in out
    assert "→ add 1 process of 4 runners" in out
    assert "arrive /s" in out


def test_json_has_verdict_and_load(pgconductor_dsn: str) -> None:
    """A script is to act on it."""
    _work(pgconductor_dsn, busy=4.0)
    code, out, _ = _run("advise", "--json", "--queue", "q", "--dsn", pgconductor_dsn)
    answer = json.loads(out)
    (advice,) = answer["queues"]
    assert (code, answer["schema"], advice["queue"], advice["verdict"]) == (0, "pgconductor", "q", "add processes")
    assert (advice["load"]["ready"], advice["load"]["workers"], advice["load"]["reporting_capacity"]) == (1, 1, 4)
    assert advice["load"]["busy"] == pytest.approx(4.0, rel=0.1)
    assert advice["notes"] == []


def test_two_looks_of_one_queue_among_others(pgconductor_dsn: str) -> None:
    """Its name is any text."""
    hostile = "line\nbreak [bold]\x1b[31m"
    for queue in (hostile, "other"):
        assert _run("invoke", "t", "--queue", queue, "--dsn", pgconductor_dsn)[0] == 0
    code, out, _ = _run("advise", "--queue", hostile, "--seconds", "0.01", "--dsn", pgconductor_dsn)
    assert (code, "\x1b" in out, "other" in out) == (0, False, False)
    assert r"line\nbreak [bold]\x1b[31m: start a worker: 1 ready" in out
    code, out, err = _run("advise", "--seconds", "-1", "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.MISUSED, "")
    assert "advise(seconds=)" in err
