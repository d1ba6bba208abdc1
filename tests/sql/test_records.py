"""Steps and waits, one guard a test: who may write them, what is told of them, and who is woken by what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from sql.audited import Audited, open_audited
from sql.database import Database, done
from sql.records import child, save, wait

from pgconductor.db.calls import SavedStep
from pgconductor.model import Claimed
from pgconductor.testing import Databases

ERROR = '{"type": "E", "message": "on purpose"}'


@pytest.fixture(scope="module")
def audited_database(pgconductor_databases: Databases) -> Iterator[Audited]:
    with open_audited(pgconductor_databases) as audited:
        yield audited


@pytest.fixture
def audited(audited_database: Audited) -> Iterator[Audited]:
    """An audited database as after a fresh install, with queue "q"; at the end the audit is asked."""
    audited_database.reset()
    audited_database.db.register_queue()
    yield audited_database
    audited_database.db.close_sessions()
    assert audited_database.check() == []


def begin(audited: Audited) -> tuple[Database, UUID, Claimed]:
    """An owner and its claim."""
    db = audited.db
    owner = db.register_orchestrator()
    db.invoke()
    (claim,) = db.claim(owner)
    return db, owner, claim


def state(db: Database, execution: UUID) -> str:
    return str(db.live_row(execution, "state::text")[0])


# --- whose they are ---


@pytest.mark.parametrize("wrong", ["claim_no", "owner", "ended"])
def test_who_does_not_hold_the_claim_records_and_learns_nothing(audited: Audited, wrong: str) -> None:
    """A zombie writes into the history of the attempt that goes on, or takes away what is told once."""
    db, owner, claim = begin(audited)
    save(db, owner, claim, "mine")
    young = child(db, owner, claim, "child")
    if wrong == "ended":
        db.flush(owner, done(claim, "released"))
    stranger = uuid4() if wrong == "owner" else owner
    stale = claim._replace(claim_no=claim.claim_no + 1) if wrong == "claim_no" else claim
    before = db.dump()
    assert save(db, stranger, stale, "late") == SavedStep("fenced", None, None)
    assert wait(db, stranger, stale, "late", "sleep", due_in=0).status == "fenced"
    assert db.run(db.calls.load_history(stranger, stale.id, stale.claim_no)) is None
    assert db.run(db.calls.read_waits(stranger, [(stale.id, stale.claim_no)])) == []
    assert db.run(db.calls.request_close(stranger, stale.id, stale.claim_no, ["child"], "late")) == 0
    assert db.dump() == before
    assert state(db, young) == "ready"


def test_step_that_is_saved_again_stays_what_it_was_first(audited: Audited) -> None:
    """Its reply was lost; or two runs of one step, and the second overwrites what the handler went on with."""
    db, owner, claim = begin(audited)
    assert save(db, owner, claim, "step", "first").status == "saved"
    assert save(db, owner, claim, "step", "second") == SavedStep("stored", '"first"', None)
    assert save(db, owner, claim, "step", error={"type": "E"}) == SavedStep("stored", '"first"', None)


def test_wait_that_is_begun_again_is_the_same(audited: Audited) -> None:
    """Its reply was lost: a second child is made, and one of them is nobody's."""
    db, owner, claim = begin(audited)
    young = child(db, owner, claim, "child")
    assert child(db, owner, claim, "child") == young
    assert wait(db, owner, claim, "nap", "sleep", due_in=50).due_in == 50
    audited.clock.advance(20)
    again = wait(db, owner, claim, "nap", "sleep", due_in=50)
    assert again.due_in == pytest.approx(30, abs=5)
    assert db.value("select count(*) from {s}._private_executions") == 2


def test_children_are_nested_to_a_limit(audited: Audited) -> None:
    """A task that invokes itself fills the database."""
    db, owner, claim = begin(audited)
    for depth in range(1, 17):
        young = child(db, owner, claim, "child")
        assert db.live_row(young, "depth") == (depth,)
        (claim,) = db.claim(owner)
    row = {"task": "t", "queue": "q", "payload": {}}
    assert wait(db, owner, claim, "child", "child", child=row, on_close="cancel").status == "too_deep"


# --- waking ---


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("is_parked", [True, False])
def test_end_of_a_child_makes_its_parent_ready_whenever_it_parks(audited: Audited, how: str, is_parked: bool) -> None:
    """Resolved a moment before the parent was parked, or after: one of the two is nobody's business, and it waits for
    ever.
    """
    db, owner, claim = begin(audited)
    young = child(db, owner, claim, "child")
    (grown,) = db.claim(owner)
    if is_parked:
        db.flush(owner, done(claim, "waiting"))
        assert state(db, claim.id) == "waiting"
    if how == "cancelled":
        db.flush(owner, done(grown, "released"))
        db.rows("select {s}.cancel(%s::uuid[], 'not wanted')", [young])
    else:
        result, error = ('{"a": 1}', None) if how == "completed" else (None, ERROR)
        db.flush(owner, done(grown, how, result=result, error=error))
    if not is_parked:
        db.flush(owner, done(claim, "waiting"))
    assert db.live_row(claim.id, "state::text, attempt, crashes") == ("ready", 0, 0)
    (again,) = db.claim(owner)
    (record,) = db.run(db.calls.load_history(owner, again.id, again.claim_no)) or []
    told = {"completed": {"a": 1}, "failed": json.loads(ERROR), "cancelled": {"reason": "not wanted"}}[how]
    assert record.outcome == how
    assert json.loads(record.value or record.error or "") == told


def test_parent_of_a_scope_waits_for_the_last_child_or_the_first_failure(audited: Audited) -> None:
    """Woken for each of 10,000 children it is claimed and parked 10,000 times."""
    db, owner, claim = begin(audited)
    young = [child(db, owner, claim, f"child {n}", scope="all") for n in range(3)]
    db.flush(owner, done(claim, "waiting"))
    grown = {c.id: c for c in db.claim(owner)}
    db.flush(owner, done(grown[young[0]]))
    assert state(db, claim.id) == "waiting"
    db.flush(owner, done(grown[young[1]], "failed", error=ERROR))
    assert state(db, claim.id) == "ready"
    (again,) = db.claim(owner)
    db.run(db.calls.load_history(owner, again.id, again.claim_no))
    db.flush(owner, done(again, "waiting"))
    assert state(db, claim.id) == "waiting"
    db.flush(owner, done(grown[young[2]]))
    assert state(db, claim.id) == "ready"


@pytest.mark.parametrize("by", ["load_history", "read_waits"])
def test_what_was_told_wakes_nobody_again(audited: Audited, by: str) -> None:
    """It is claimed, finds nothing new and parks, as fast as the database can."""
    db, owner, claim = begin(audited)
    child(db, owner, claim, "one")
    child(db, owner, claim, "other")
    grown = db.claim(owner)
    db.flush(owner, done(grown[0]))
    if by == "load_history":
        db.run(db.calls.load_history(owner, claim.id, claim.claim_no))
    else:
        (told,) = db.run(db.calls.read_waits(owner, [(claim.id, claim.claim_no)]))
        assert told.outcome == "completed"
        assert db.run(db.calls.read_waits(owner, [(claim.id, claim.claim_no)])) == []
    db.flush(owner, done(claim, "waiting"))
    assert state(db, claim.id) == "waiting"
    db.flush(owner, done(grown[1]))
    assert state(db, claim.id) == "ready"


def test_sleeper_is_claimed_when_its_time_has_come_and_not_before(audited: Audited) -> None:
    """It sleeps for ever, or is claimed again and again."""
    db, owner, claim = begin(audited)
    wait(db, owner, claim, "nap", "sleep", due_in=50)
    db.flush(owner, done(claim, "waiting"))
    empty = db.look(owner)
    assert empty.claimed == []
    assert empty.due_in == pytest.approx(50, abs=5)
    audited.clock.advance(60)
    (again,) = db.claim(owner)
    assert (again.attempt, again.claim_no) == (1, 2)
    (record,) = db.run(db.calls.load_history(owner, again.id, again.claim_no)) or []
    assert record.outcome == "elapsed"


# --- families ---


def test_child_of_a_former_life_resolves_nothing(audited: Audited) -> None:
    """The parent was opened again and has made its child anew: the old one's result is taken for the new one's."""
    db, owner, claim = begin(audited)
    old = child(db, owner, claim, "child", on_close="abandon")
    (former,) = db.claim(owner)
    db.flush(owner, done(claim, "failed", error=ERROR))
    db.rows("select {s}.retry(%s::uuid[])", [claim.id])
    (again,) = db.claim(owner)
    new = child(db, owner, again, "child")
    assert new != old
    db.flush(owner, done(former, result='"old"'))
    assert db.run(db.calls.read_waits(owner, [(again.id, again.claim_no)])) == []
    (grown,) = db.claim(owner)
    db.flush(owner, done(grown, result='"new"'))
    (told,) = db.run(db.calls.read_waits(owner, [(again.id, again.claim_no)]))
    assert told.value == '"new"'


@pytest.mark.parametrize("on_close", ["cancel", "abandon"])
@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_descendants_end_with_their_parent_or_go_on_as_they_were_told(
    audited: Audited, how: str, on_close: str
) -> None:
    """The parent is gone, and somewhere below it work goes on that nobody wants; or work that was to go on is
    cancelled.
    """
    db, owner, claim = begin(audited)
    young = child(db, owner, claim, "child", on_close=on_close)
    (parent,) = db.claim(owner)
    below = child(db, owner, parent, "child", on_close=on_close)
    db.flush(owner, done(parent, "waiting"))
    if how == "failed":
        db.flush(owner, done(claim, "failed", error=ERROR))
    else:
        db.flush(owner, done(claim, "waiting"))
        db.rows("select {s}.cancel(%s::uuid[])", [claim.id])
    while db.run(db.calls.close_children()):
        pass
    if on_close == "abandon":
        assert [state(db, young), state(db, below)] == ["waiting", "ready"]
        return
    reason = f"its parent has ended: {how}"
    assert db.finished(young, "state::text, cancel_reason") == [("cancelled", reason)]
    assert db.finished(below, "state::text, cancel_reason") == [("cancelled", "its parent has ended: cancelled")]


def test_deadline_of_a_child_is_its_parents_at_most(audited: Audited) -> None:
    """A child works on for a parent whose time is up."""
    db, owner, claim = begin(audited)
    db.rows("update {s}._private_executions set deadline_at = {s}._private_clock() + interval '100 s'")
    row = {"task": "t", "queue": "q", "payload": {}}
    children = {
        name: child(db, owner, claim, name, child={**row, "deadline_in": seconds})
        for name, seconds in (("early", 10), ("late", 1000))
    }
    seconds = "extract(epoch from deadline_at - {s}._private_clock())::float8".replace("{s}", db.schema)
    assert db.live_row(children["early"], seconds) == (pytest.approx(10, abs=5),)
    assert db.live_row(children["late"], seconds) == (pytest.approx(100, abs=5),)
