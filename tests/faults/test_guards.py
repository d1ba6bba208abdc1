"""Guards in the database that other tests do not miss when they are taken away: each was planted, see tests/planted."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from sql.database import LONG, Database, done, open_database

from pgconductor.errors import LeaseLost


@pytest.fixture
def db(pgconductor_dsn: str) -> Iterator[Database]:
    with open_database(pgconductor_dsn) as database:
        database.register_queue()
        yield database


def test_heartbeat_and_claim_are_refused_to_who_registered_with_the_server_before(db: Database) -> None:
    """A crash of the server may have forgotten its claims: under the same id they could be claimed twice."""
    owner = db.register_orchestrator()
    db.invoke()
    db.rows("update {s}._private_orchestrators set server_epoch = 'another'")
    assert not db.run(db.calls.heartbeat(owner, LONG, ["q"])).is_alive
    with pytest.raises(LeaseLost):
        db.claim(owner)
    assert db.rows("select state::text, claim_no from {s}._private_executions") == [("ready", 0)]


def test_succession_takes_no_claim_of_another_number(db: Database) -> None:
    """The crash of the server took the claim that is meant; the row has been claimed again since, under this number."""
    old, new = db.register_orchestrator(), uuid4()
    execution, other = db.invoke(), db.invoke()
    assert {claimed.claim_no for claimed in db.claim(old)} == {1}
    handed_over = db.run(db.calls.succeed_orchestrator(old, new, LONG, [(execution, 2), (other, 1)]))
    assert handed_over == {other}
    assert db.live(execution) == ("ready", 0, 0, 1), "what was not handed over goes back free of charge"
    assert db.live(other, "state::text, owner, claim_no") == ("running", new, 1)


def test_cancel_and_flush_of_the_same_rows_do_not_deadlock(db: Database) -> None:
    """Both want all of them; one that takes them in another order waits for the other and is waited for."""
    owner = db.register_orchestrator()
    ids = sorted(db.invoke() for _ in range(2))
    claimed = {item.id: item for item in db.claim(owner)}
    holder, canceller, flusher = db.session(), db.session(autocommit=True), db.session(autocommit=True)
    # Somebody holds the second row, so that both come to wait, the canceller first.
    holder.rows("select from {s}._private_executions where id = %s for update", ids[1])
    cancelling = db.start(lambda: canceller.run(canceller.calls.cancel(ids, "not wanted")))
    db.wait_blocked(canceller, cancelling)
    flushing = db.start(lambda: flusher.flush(owner, *(done(claimed[i]) for i in ids)))
    db.wait_blocked(flusher, flushing)
    holder.rollback()
    cancelling.result(20)
    assert flushing.result(20) == {}
    assert [db.finished(i, "state::text") for i in ids] == [[("completed",)], [("completed",)]]


def test_cancel_that_waits_for_a_claim_asks_its_owner(db: Database) -> None:
    """It decided by what it saw before the claim was committed: the cancellation would be answered and forgotten."""
    owner = db.register_orchestrator()
    execution = db.invoke()
    claimer, canceller = db.session(), db.session(autocommit=True)
    (claimed,) = claimer.claim(owner)
    cancelling = db.start(lambda: canceller.run(canceller.calls.cancel([execution], "not wanted")))
    db.wait_blocked(canceller, cancelling)
    claimer.commit()
    assert {i: str(status) for i, status in cancelling.result(20).items()} == {execution: "requested"}
    signals = db.run(db.calls.signals(owner, ["q"]))
    assert signals.cancelled == {execution: (claimed.claim_no, "not wanted")}
