"""The commands about what has been invoked: cancel, dead-letters, retry, and what status says of it."""

from __future__ import annotations

import json
from uuid import UUID, uuid4

import psycopg
import pytest
from cli.inside import run
from client.worker_by_hand import open_worker

from pgconductor.cli import exits, report


def _invoke(dsn: str, *arguments: str) -> str:
    code, out, _ = run("invoke", *arguments, "--dsn", dsn)
    assert code == 0
    return out.strip()


def _states(dsn: str) -> dict[str, int]:
    with psycopg.connect(dsn) as conn:
        return dict(conn.execute("select state::text, count(*) from pgconductor.executions group by 1").fetchall())


def _fail(dsn: str, task: str, error: str, count: int = 1) -> list[UUID]:
    with psycopg.connect(dsn) as conn:
        conn.execute("select pgconductor.invoke(%s, queue => 'default') from generate_series(1, %s)", [task, count])
    with open_worker(dsn, [task]) as worker:
        claimed = worker.claim()
        for each in claimed:
            worker.fail(each, type=error, message="no\nluck", traceback="Traceback of\x1b it")
    return [each.id for each in claimed]


# --- cancel ---


def test_cancel_by_id_tells_what_came_of_each(pgconductor_dsn: str) -> None:
    """A script that cannot tell what was cancelled, or that goes on although the id was wrong."""
    first, second, stranger = _invoke(pgconductor_dsn, "a"), _invoke(pgconductor_dsn, "a"), str(uuid4())
    assert run("cancel", first, "--reason", "tired", "--dsn", pgconductor_dsn) == (0, f"{first} cancelled\n", "")
    code, out, err = run("cancel", first, second, stranger, "--json", "--dsn", pgconductor_dsn)
    assert code == exits.FAILED
    assert json.loads(out) == {first: "finished", second: "cancelled", stranger: "unknown"}
    assert stranger in err
    assert len(err.splitlines()) == 1
    with psycopg.connect(pgconductor_dsn) as conn:
        reasons = conn.execute(
            "select cancel_reason from pgconductor._private_finished order by finished_at"
        ).fetchall()
    assert reasons == [("tired",), (None,)]


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        (["--queue", "q"], 2),
        (["--task", "b"], 2),
        (["--tag", "t"], 2),
        (["--state", "scheduled"], 2),
        (["--state", "ready", "--state", "scheduled"], 0),
        (["--created-before", "2000-01-01T00:00:00Z"], 3),
        (["--all", "--limit", "2"], 1),
        (["--all"], 0),
    ],
)
def test_cancel_by_filter_takes_those_that_fit(pgconductor_dsn: str, filters: list[str], left: int) -> None:
    """An option that is parsed and dropped cancels everything."""
    _invoke(pgconductor_dsn, "a", "--queue", "q")
    _invoke(pgconductor_dsn, "b", "--tag", "t")
    _invoke(pgconductor_dsn, "c", "--delay", "60")
    code, out, err = run("cancel", *filters, "--json", "--dsn", pgconductor_dsn)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"cancelled": 3 - left, "requested": 0}
    assert _states(pgconductor_dsn).get("cancelled", 0) == 3 - left
    assert run("cancel", "--all", "--dsn", pgconductor_dsn)[1] == f"{left} cancelled, 0 running ones asked to end.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cancel"], "by --all"),
        (["cancel", "--reason", "x"], "by --all"),
        (["cancel", str(UUID(int=0)), "--all"], "by --all"),
        (["cancel", "7"], "'7' is no execution's id"),
        (["cancel", "--limit", "5"], "everything=True"),
        (["cancel", "--all", "--queue", "q"], "not both"),
        (["cancel", "--queue", ""], "queue must not be empty"),
        (["cancel", "--all", "--reason", "x" * 1001], "1001 bytes"),
        (["cancel", "--created-before", "now"], "--created-before 'now' is no instant"),
        (["retry"], "by --all"),
        (["retry", str(UUID(int=0)), "--task", "a"], "by --all"),
        (["retry", "--state", "ready"], "one of failed, cancelled"),
        (["dead-letters", "--limit", "0"], "limit must be from 1"),
        (["dead-letters", "x"], "'x' is no execution's id"),
    ],
)
def test_unclear_choice_is_refused(pgconductor_dsn: str, arguments: list[str], said: str) -> None:
    """A typing error that takes everything."""
    _invoke(pgconductor_dsn, "a")
    code, out, err = run(*arguments, "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.MISUSED, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert _states(pgconductor_dsn) == {"ready": 1}


# --- dead letters ---


def test_dead_letters_are_shown_and_begin_anew(pgconductor_dsn: str) -> None:
    """Nobody sees what failed, or a terminal obeys what a handler raised."""
    assert run("dead-letters", "--dsn", pgconductor_dsn) == (0, "No dead letters.\n", "")
    one, two = _fail(pgconductor_dsn, "a", "ValueError", 2)
    (three,) = _fail(pgconductor_dsn, "b", "timeout")
    _, out, err = run("dead-letters", "--dsn", pgconductor_dsn)
    assert str(one) in out
    assert "ValueError: no\\nluck" in out
    assert err == ""
    _, out, err = run("dead-letters", "--task", "a", "--limit", "1", "--json", "--dsn", pgconductor_dsn)
    (letter,) = json.loads(out)
    assert letter["id"] in (str(one), str(two))
    assert letter["error"]["type"] == "ValueError"
    _, out, _ = run("dead-letters", str(three), "--dsn", pgconductor_dsn)
    assert out.startswith("attempt 1 at ")
    assert out.endswith("timeout: no\\nluck\nTraceback of\\x1b it\n")
    assert json.loads(run("dead-letters", str(three), "--json", "--dsn", pgconductor_dsn)[1])[0]["attempt"] == 1

    stranger = str(uuid4())
    code, out, err = run("retry", str(one), stranger, "--json", "--dsn", pgconductor_dsn)
    assert (code, json.loads(out)) == (exits.FAILED, {str(one): "retried", stranger: "unknown"})
    assert err == f"pgconductor: not retried: {stranger}\n"
    assert run("retry", str(one), "--dsn", pgconductor_dsn) == (0, f"{one} live\n", "")
    assert run("retry", "--error-type", "timeout", "--dsn", pgconductor_dsn)[1] == "1 begin anew.\n"
    assert json.loads(run("retry", "--all", "--json", "--dsn", pgconductor_dsn)[1]) == {"retried": 1, "duplicates": 0}
    assert _states(pgconductor_dsn) == {"ready": 3}


def test_page_that_is_full_says_so(pgconductor_dsn: str) -> None:
    """The hundred that are shown are taken for all."""
    _fail(pgconductor_dsn, "a", "E", 2)
    code, _, err = run("dead-letters", "--limit", "2", "--dsn", pgconductor_dsn)
    assert (code, err) == (0, "pgconductor: there may be more than these 2: see --limit\n")


# --- status ---


def test_status_points_to_what_failed_and_who_is_to_stop(pgconductor_dsn: str) -> None:
    """A dead letter nobody looks for; a migration that waits for a program nobody stops."""
    _fail(pgconductor_dsn, "a", "E", 3)
    with psycopg.connect(pgconductor_dsn) as conn:
        conn.execute("update pgconductor._private_orchestrators set stop_requested_at = now()")
    code, out, _ = run("status", "--dsn", pgconductor_dsn)
    assert code == 0
    assert "3 failed: `pgconductor dead-letters` shows them" in out
    assert "asked to stop" in out
    assert "1 orchestrators are asked to stop: a migration of a newer program waits" in out
    answer = json.loads(run("status", "--json", "--dsn", pgconductor_dsn)[1])
    assert answer["queues"][0]["failed"] == 3
    assert [each["stop_requested"] for each in answer["orchestrators"]] == [True]


def test_quiet_status_has_no_hints() -> None:
    """A line about nothing trains people not to read it."""
    assert report.hints([], []) == []
