"""Cancellation as SQL: every state, every race with the verbs that end or move an execution."""

from __future__ import annotations

from uuid import UUID

import pytest
from sql.database import Database

from pgconductor.errors import Misuse
from pgconductor.model import Cancellation, Outcome
from pgconductor.testing import DatabaseClock


def cancel(db: Database, *ids: UUID, reason: str | None = None) -> list[Cancellation]:
    answers = db.run(db.calls.cancel(list(ids), reason))
    return [answers[i] for i in ids]


def test_what_nobody_runs_ends_at_once(db: Database) -> None:
    """A cancelled execution starts all the same, or blocks its key for ever."""
    db.register_queue()
    ready, scheduled = db.invoke(key="k"), db.invoke(delay=60)
    assert cancel(db, ready, scheduled, reason="because") == [Cancellation.CANCELLED] * 2
    for i in (ready, scheduled):
        assert db.live(i) is None
        assert db.finished(i, "state::text, cancel_reason, result, claim_no") == [("cancelled", "because", None, 0)]
    assert db.claim(db.register_orchestrator()) == []
    assert db.invoke(key="k") != ready


def test_a_cancelled_execution_of_the_overflow_ends_too(db: Database) -> None:
    """What was produced before its queue was registered cannot be cancelled."""
    early = db.invoke()
    assert cancel(db, early) == [Cancellation.CANCELLED]
    assert db.finished(early, "state::text") == [("cancelled",)]


def test_what_runs_is_left_to_its_owner_who_is_told(db: Database) -> None:
    """The row is taken from under a running handler, or its owner never hears of it."""
    db.register_queue()
    owner, other = db.register_orchestrator(), db.register_orchestrator()
    one, another = db.invoke(), db.invoke()
    (claimed, _) = db.claim(owner)
    listener = db.session(autocommit=True)
    listener.rows(f"listen {db.run(db.calls.control_channel(owner))}")
    assert cancel(db, one, reason="because") == [Cancellation.REQUESTED]
    assert [n.payload for n in listener.conn.notifies(timeout=5, stop_after=1)] == [""]
    assert db.live(one, "state::text") == ("running",)
    signals = db.run(db.calls.signals(owner, ["q"]))
    assert signals.cancelled == {one: (claimed.claim_no, "because")}
    assert db.run(db.calls.signals(other, ["q"])).cancelled == {}
    assert cancel(db, one, reason="another") == [Cancellation.REQUESTED]
    assert db.run(db.calls.signals(owner, ["q"])).cancelled == {one: (claimed.claim_no, "because")}
    assert db.live(another, "state::text") == ("running",)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("completed", "completed"),
        ("failed", "failed"),
        ("cancelled", "cancelled"),
        ("retried", "cancelled"),
        ("released", "cancelled"),
    ],
)
def test_what_was_asked_to_end_never_starts_again(db: Database, kind: str, state: str) -> None:
    """A retry or a release after the request runs it once more; a completion that came first is thrown away."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke(key="k")
    (claimed,) = db.claim(owner)
    cancel(db, one, reason="because")
    outcome = Outcome(one, claimed.claim_no, kind, "1" if kind == "completed" else None, None, 5.0, 60.0)
    assert db.flush(owner, outcome) == {}
    assert db.live(one) is None
    assert db.finished(one, "state::text, cancel_reason, expires_at - finished_at = '60 s'") == [
        (state, "because", True)
    ]
    before = db.dump()
    assert db.flush(owner, outcome) == {one: "already"}
    assert db.dump() == before
    assert db.run(db.calls.signals(owner, ["q"])).cancelled == {}
    assert db.invoke(key="k") != one


@pytest.mark.parametrize("crashes", [0, 2])
def test_request_to_a_dead_owner_is_met_when_it_is_recovered(db: Database, clock: DatabaseClock, crashes: int) -> None:
    """The execution of a dead process that was cancelled runs once more elsewhere."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    one = db.invoke()
    db.claim(owner)
    db.rows("update {s}._private_executions set crashes = %s", crashes)
    assert cancel(db, one) == [Cancellation.REQUESTED]
    clock.advance(11)
    assert db.rows("select recovered, failed, cancelled from {s}.recover('q')") == [(0, 0, 1)]
    assert db.finished(one, "state::text, crashes") == [("cancelled", crashes + 1)]


def test_request_is_met_when_the_owner_gives_back_what_it_does_not_know(db: Database) -> None:
    """A claim whose reply was lost and that was cancelled meanwhile comes back to life."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke()
    db.claim(owner)
    cancel(db, one)
    assert db.run(db.calls.release_unknown(owner, "q", [])) == 1
    assert db.finished(one, "state::text") == [("cancelled",)]


def test_finished_and_unknown_ones_are_told_apart(db: Database) -> None:
    """Somebody waits for the end of an execution that there never was."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke()
    (claimed,) = db.claim(owner)
    db.flush(owner, Outcome(one, claimed.claim_no, "completed", "1"))
    stranger = db.value("select {s}._private_new_id(77, now())")
    assert cancel(db, one, stranger) == [Cancellation.FINISHED, Cancellation.UNKNOWN]
    assert db.finished(one, "state::text") == [("completed",)]


def test_cancel_that_meets_a_claim_asks_its_owner(db: Database) -> None:
    """The cancellation ends a row that has just been claimed: its handler runs, and its result is fenced."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke()
    claimer, canceller = db.session(), db.session(autocommit=True)
    assert [c.id for c in claimer.claim(owner)] == [one]
    answer = db.start(lambda: canceller.run(canceller.calls.cancel([one], None)))
    db.wait_blocked(canceller, answer)
    claimer.commit()
    assert answer.result(20) == {one: Cancellation.REQUESTED}
    assert db.live(one, "state::text, cancel_requested_at is not null") == ("running", True)


def test_cancel_that_meets_a_completion_finds_it_finished(db: Database) -> None:
    """Two ends of one execution."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke()
    (claimed,) = db.claim(owner)
    flusher, canceller = db.session(), db.session(autocommit=True)
    flusher.flush(owner, Outcome(one, claimed.claim_no, "completed", "1"))
    answer = db.start(lambda: canceller.run(canceller.calls.cancel([one], None)))
    db.wait_blocked(canceller, answer)
    flusher.commit()
    assert answer.result(20) == {one: Cancellation.FINISHED}
    assert db.finished(one, "state::text") == [("completed",)]


def test_acknowledged_cancellation_is_durable_whatever_the_default_is(db: Database) -> None:
    """A crash of the server forgets it, and what its caller knows to be cancelled runs; so with a retry."""
    one = db.invoke()
    session = db.session()
    for query in ("select {s}.cancel(array[%s::uuid])", "select {s}.retry(array[%s::uuid])"):
        session.rows("set synchronous_commit = off")
        session.commit()
        assert session.value("show synchronous_commit") == "off"
        session.rows(query, one)
        assert session.value("show synchronous_commit") == "on"
        session.commit()
    assert db.live(one, "state::text") == ("ready",)


def test_waiter_for_the_result_is_told(db: Database) -> None:
    """Whoever waits for a cancelled execution waits until it looks by itself."""
    db.register_queue()
    one = db.invoke()
    waiter = db.session(autocommit=True)
    waiter.rows(f"listen {db.run(db.calls.results_channel())}")
    waiter.run(waiter.calls.await_results([-1, one.bytes[15]]))
    cancel(db, one)
    assert [n.payload for n in waiter.conn.notifies(timeout=5, stop_after=1)] == [str(one.bytes[15])]


def test_large_payload_goes_with_a_cancelled_execution_that_is_not_kept(db: Database) -> None:
    """Payloads of what is gone stay for ever."""
    db.register_queue()
    db.run(db.calls.register_tasks(["t"], "q", [0.0], [0.0]))
    # The payload's own size in the row decides, after compression: random text.
    big = {"x": db.value("select string_agg(md5(n::text), '') from generate_series(1, 500) n")}
    one = db.invoke(payload=big)
    assert db.value("select count(*) from {s}._private_payloads") == 1
    assert cancel(db, one) == [Cancellation.CANCELLED]
    assert db.finished(one) == []
    assert db.value("select count(*) from {s}._private_payloads") == 0
    assert cancel(db, one) == [Cancellation.UNKNOWN]


def test_filter_cancels_what_it_finds_in_batches_and_ends(db: Database) -> None:
    """A filter that finds what it has asked before never ends; one that is too wide takes others' work."""
    db.register_queue()
    db.register_queue("other")
    owner = db.register_orchestrator()
    running = [db.invoke() for _ in range(2)]
    db.claim(owner)
    idle = [db.invoke() for _ in range(5)]
    elsewhere, another_task = db.invoke("other"), db.invoke(task="u")
    counts = [db.run(db.calls.cancel_matching("all", 3, "q", "t")) for _ in range(4)]
    assert [sum(c) for c in counts] == [3, 3, 1, 0]
    assert [db.live(i, "cancel_requested_at is not null") for i in running] == [(True,)] * 2
    assert [db.live(i) for i in idle] == [None] * 5
    assert [db.live(i, "state::text") for i in (elsewhere, another_task)] == [("ready",)] * 2


def test_filters_by_state_tag_and_age(db: Database, clock: DatabaseClock) -> None:
    """A filter is ignored, and everything goes."""
    tagged = db.value("select {s}.invoke('t', '{}', 'q', tags => array['a', 'b'])")
    later = db.invoke(delay=60)
    old = db.invoke()
    clock.advance(100)
    new = db.invoke()
    assert db.run(db.calls.cancel_matching(None, 10, tags=["a"])) == (1, 0)
    assert db.finished(tagged, "state::text") == [("cancelled",)]
    assert db.run(db.calls.cancel_matching(None, 10, states=["scheduled"])) == (1, 0)
    assert db.finished(later, "state::text") == [("cancelled",)]
    before = db.value("select created_at + interval '50 s' from {s}._private_executions where id = %s", old)
    assert db.run(db.calls.cancel_matching(None, 10, created_before=before)) == (1, 0)
    assert db.live(old) is None
    assert db.live(new, "state::text") == ("ready",)


def test_reason_that_is_too_long_is_refused(db: Database) -> None:
    """It fails in a CHECK, with a row's content in the message."""
    with pytest.raises(Misuse, match="at most 1000 bytes"):
        cancel(db, db.invoke(), reason="é" * 501)
