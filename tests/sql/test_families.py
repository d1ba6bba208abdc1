"""Flushes that meet steps and waits: parents and children in one statement, and claims that are over."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID

import pytest
from sql.audited import Audited, open_audited
from sql.database import done
from sql.records import child, save

from pgconductor.model import Claimed, Outcome
from pgconductor.testing import Databases

ERROR = '{"type": "E", "message": "on purpose"}'


@pytest.fixture(scope="module")
def audited_database(pgconductor_databases: Databases) -> Iterator[Audited]:
    with open_audited(pgconductor_databases) as audited:
        yield audited


@pytest.fixture
def audited(audited_database: Audited) -> Iterator[Audited]:
    """An audited database as after a fresh install, with queue "q"."""
    audited_database.reset()
    audited_database.db.register_queue()
    yield audited_database
    audited_database.db.close_sessions()


def family(audited: Audited, *, is_parked: bool = False) -> tuple[UUID, Claimed, Claimed]:
    """An owner, its claim of a parent (given up, if it is parked), and its claim of the child."""
    db = audited.db
    owner = db.register_orchestrator()
    db.invoke()
    (parent,) = db.claim(owner)
    save(db, owner, parent, "step")
    child(db, owner, parent, "child", position=1)
    if is_parked:
        db.flush(owner, done(parent, "waiting"))
    (young,) = db.claim(owner)
    return owner, parent, young


def outcome(claim: Claimed, kind: str) -> Outcome:
    return done(claim, kind, error=ERROR if kind in ("failed", "retried") else None)


def records(audited: Audited) -> list[tuple[str, str | None]]:
    """What is left of steps and waits, by name, with how a wait ended."""
    return [
        (name, how)
        for name, how in audited.db.rows(
            "select name, outcome from {s}._private_steps union all select name, outcome from {s}._private_waits"
            " order by 1"
        )
    ]


@pytest.mark.parametrize("young", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("old", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("is_parent_first", [True, False])
def test_parent_and_child_that_end_by_one_flush_leave_nothing_behind(
    audited: Audited, old: str, young: str, is_parent_first: bool
) -> None:
    """Two parts of one statement change the parent's wait, and the one that loses is not heard of: the wait stays for
    ever, and a retry of the parent takes it for its own.
    """
    owner, parent, grown = family(audited)
    outcomes = [outcome(parent, old), outcome(grown, young)]
    assert audited.db.flush(owner, *(outcomes if is_parent_first else outcomes[::-1])) == {}
    assert records(audited) == []
    assert audited.check() == []
    assert audited.db.run(audited.db.calls.close_children()) <= 1
    assert audited.check(settled=True) == []


@pytest.mark.parametrize("is_parked", [True, False])
def test_parent_and_child_cancelled_by_one_call_leave_nothing_behind(audited: Audited, is_parked: bool) -> None:
    """As above: cancelling by a filter finds whole families."""
    db = audited.db
    owner, parent, grown = family(audited, is_parked=is_parked)
    db.flush(owner, done(grown, "released"))
    if not is_parked:
        db.flush(owner, done(parent, "released"))
    assert db.rows("select * from {s}.cancel_matching()") == [(2, 0)]
    assert records(audited) == []
    assert db.run(db.calls.close_children()) <= 1
    assert audited.check(settled=True) == []


def test_orchestrators_are_told_of_children_whose_waiting_parent_was_cancelled(audited: Audited) -> None:
    """They would run on until somebody's next heartbeat; and who has none to cancel tells nobody."""
    db = audited.db
    owner, parent, grown = family(audited, is_parked=True)
    db.flush(owner, done(grown, "released"))
    other = db.invoke()
    listener = db.session(autocommit=True)
    listener.rows(f'listen "{db.run(db.calls.errands_channel())}"')
    db.rows("select {s}.cancel(%s)", [other])
    assert list(listener.conn.notifies(timeout=0.05, stop_after=1)) == []
    db.rows("select {s}.cancel(%s)", [parent.id])
    assert len(list(listener.conn.notifies(timeout=5, stop_after=1))) == 1
    assert db.run(db.calls.close_children()) == 1
    assert audited.check(settled=True) == []


@pytest.mark.parametrize("young", ["completed", "failed"])
@pytest.mark.parametrize("old", ["retried", "released", "waiting"])
def test_parent_that_goes_on_is_told_of_the_child_that_ends_beside_it(audited: Audited, old: str, young: str) -> None:
    """It waits for ever for what ended in the very statement that parked it."""
    db = audited.db
    owner, parent, grown = family(audited)
    assert db.flush(owner, outcome(parent, old), outcome(grown, young)) == {}
    assert audited.check() == []
    # A child that failed is tried again with its parent.
    kept = [("child", young), ("step", None)] if (old, young) != ("retried", "failed") else [("step", None)]
    assert records(audited) == kept
    assert db.live(parent.id, "state::text") == ("ready",)


def test_flush_that_is_fenced_forgets_no_failure(audited: Audited) -> None:
    """A zombie says that its attempt failed, and takes away what another attempt has recorded."""
    db = audited.db
    zombie, owner = db.register_orchestrator(), db.register_orchestrator()
    db.invoke()
    (stale,) = db.claim(zombie)
    db.flush(zombie, done(stale, "released"))
    (claim,) = db.claim(owner)
    save(db, owner, claim, "broken", error={"type": "E", "message": "caught by the handler"})
    db.flush(owner, done(claim, "released"))
    assert db.flush(zombie, outcome(stale, "retried")) == {claim.id: "fenced"}
    assert records(audited) == [("broken", None)]
    assert audited.check() == []


def test_flush_that_is_sent_again_forgets_nothing_that_came_after_it(audited: Audited) -> None:
    """The child fails while the parent's reply is on its way: sent again, the flush would take away what nobody saw."""
    db = audited.db
    owner, parent, grown = family(audited)
    assert db.flush(owner, outcome(parent, "retried")) == {}
    assert db.flush(owner, outcome(grown, "failed")) == {}
    assert records(audited) == [("child", "failed"), ("step", None)]
    assert db.flush(owner, outcome(parent, "retried")) == {parent.id: "already"}
    assert records(audited) == [("child", "failed"), ("step", None)]
