"""Histories as SQL: steps and waits on behalf of a claim, and every way in which a wait is resolved, with its races.

Who resolves a wait and who parks for it are driven in both orders by gates: a transaction is held open, the rival waits
for its lock or does not, and in the end nobody waits for what is over.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sql.database import Database, Session, done

from pgconductor.db.calls import NewStep, NewWait, ResolvedWait, SavedStep, StartedWait
from pgconductor.model import Claimed, Outcome, Record, Retry
from pgconductor.testing import DatabaseClock


@dataclass
class Owner:
    """An orchestrator with a claim, as the journal of its worker writes for it."""

    db: Session
    id: UUID
    claimed: Claimed

    @property
    def execution(self) -> UUID:
        return self.claimed.id

    def step(
        self, name: str, position: int, value: object = None, error: object = None, kind: str = "step"
    ) -> SavedStep:
        return save(self.db, self.id, self.claimed, name, position, value, error, kind)

    def wait(self, name: str, position: int, kind: str = "sleep", **spec: object) -> StartedWait:
        return start(self.db, self.id, self.claimed, {"name": name, "kind": kind, "position": position, **spec})[0]

    def child(
        self, name: str, position: int, *, scope: str | None = None, on_close: str = "cancel", **child: object
    ) -> UUID:
        started = self.wait(
            name,
            position,
            "child",
            scope=scope,
            on_close=on_close,
            child={"task": "c", "payload": {}, "queue": "q", **child},
        )
        assert started.target is not None, started
        return UUID(started.target)

    def read(self) -> list[ResolvedWait]:
        return self.db.run(self.db.calls.read_waits(self.id, [(self.claimed.id, self.claimed.claim_no)]))

    def load(self) -> list[Record] | None:
        return self.db.run(self.db.calls.load_history(self.id, self.claimed.id, self.claimed.claim_no))

    def close(self, *names: str) -> int:
        call = self.db.calls.request_close(self.id, self.claimed.id, self.claimed.claim_no, list(names), "enough")
        return self.db.run(call)

    def park(self, *awaited: str, session: Session | None = None) -> dict[UUID, str]:
        names = json.dumps(awaited) if awaited else None
        return self.end("waiting", result=names, session=session)

    def end(self, kind: str = "completed", session: Session | None = None, **options: Any) -> dict[UUID, str]:
        return (session or self.db).flush(self.id, done(self.claimed, kind, **options))


def save(
    db: Session, owner: UUID, claimed: Claimed, name: str, position: int, value: object = None, error: object = None,
    kind: str = "step",
) -> SavedStep:  # fmt: skip
    texts = (json.dumps(value), None) if error is None else (None, json.dumps(error))
    return db.run(db.calls.save_steps(owner, [NewStep(claimed.id, claimed.claim_no, name, kind, position, *texts)]))[0]


def start(db: Session, owner: UUID, claimed: Claimed, *waits: Mapping[str, object]) -> list[StartedWait]:
    return db.run(
        db.calls.start_waits(owner, [NewWait(claimed.id, claimed.claim_no, json.dumps(wait)) for wait in waits])
    )


def running(db: Database, task: str = "p", *, queue: str = "q") -> Owner:
    """One execution that runs, with nothing else on its queue."""
    db.register_queue(queue)
    owner = db.register_orchestrator(queue, tasks=("p", "c"))
    db.invoke(queue, task)
    (claimed,) = db.claim(owner, queue, tasks=("p",))
    return Owner(db, owner, claimed)


def claim_child(db: Database, child: UUID, queue: str = "q") -> Owner:
    """The child, claimed by another orchestrator."""
    owner = db.register_orchestrator(queue, tasks=("p", "c"))
    claimed = {one.id: one for one in db.claim(owner, queue, tasks=("c",))}
    return Owner(db, owner, claimed[child])


def again(db: Database, parent: Owner) -> Owner:
    """The parent's next claim."""
    (claimed,) = db.claim(parent.id, tasks=("p",))
    assert claimed.id == parent.execution
    return Owner(db, parent.id, claimed)


def state(db: Database, execution: UUID) -> str:
    row = db.live(execution, "state::text")
    return str((row or db.finished(execution, "state::text")[0])[0])


def waits(db: Database, execution: UUID) -> dict[str, str | None]:
    return dict(db.rows("select name, outcome from {s}._private_waits where execution_id = %s", execution))


def close_all(db: Session) -> int:
    total = 0
    while count := db.run(db.calls.close_children()):
        total += count
    return total


@contextmanager
def no_deadlock(db: Database) -> Iterator[None]:
    """The server has broken none inside the block."""
    query = "select deadlocks from pg_stat_database where datname = current_database()"
    before = db.value(query)
    yield
    db.close_sessions()
    db.rows("select pg_stat_force_next_flush()")
    assert db.value(query) == before


# --- the fence, and what is written twice ---


def test_step_is_recorded_once_and_its_first_value_stays(db: Database) -> None:
    """A reply that was lost makes a second value, or an error."""
    one = running(db)
    assert one.step("a", 0, {"x": None}) == SavedStep("saved", '{"x": null}', None)
    assert one.step("a", 0, {"x": 2}) == SavedStep("stored", '{"x": null}', None)
    assert one.step("b", 1, error={"type": "E"}).status == "saved"
    assert one.step("b", 1, 5) == SavedStep("stored", None, '{"type": "E"}')
    assert one.step("n", 2, None).status == "saved"
    loaded = one.load()
    assert loaded is not None
    assert [(r.name, r.outcome, r.value, r.error, r.attempt) for r in loaded] == [
        ("a", "completed", '{"x": null}', None, 1),
        ("b", "failed", None, '{"type": "E"}', 1),
        ("n", "completed", "null", None, 1),
    ]


def test_revoked_claim_reads_and_writes_nothing(db: Database) -> None:
    """A zombie adds to the history of whoever has its execution now."""
    one = running(db)
    child = one.child("c", 0)
    one.step("a", 1, 1)
    one.end("released")
    two = again(db, one)
    before = db.dump()
    assert one.step("b", 2, 1).status == "fenced"
    assert one.step("a", 1, 1).status == "fenced"
    assert one.wait("s", 2, due_in=5).status == "fenced"
    assert (
        one.wait("d", 2, "child", on_close="cancel", child={"task": "c", "payload": {}, "queue": "q"}).status
        == "fenced"
    )
    assert one.read() == []
    assert one.load() is None
    assert one.close("c") == 0
    stranger = Owner(db, uuid4(), two.claimed)
    assert (stranger.step("b", 2, 1).status, stranger.load(), stranger.read()) == ("fenced", None, [])
    assert db.dump() == before
    assert state(db, child) == "ready"
    assert two.step("b", 2, 1).status == "saved"


def test_waits_begun_again_are_the_same(db: Database) -> None:
    """A reply that was lost makes a second child, or begins a sleep anew (T7, I8)."""
    one = running(db)
    first = one.wait("s", 0, due_in=100)
    child = one.child("c", 1)
    second = one.wait("s", 0, due_in=9000)
    assert (first.status, second.status) == ("open", "open")
    assert second.due_in is not None
    assert second.due_in <= 100
    assert one.child("c", 1) == child
    assert db.value("select count(*) from {s}._private_executions where parent_id = %s", one.execution) == 1
    end = claim_child(db, child)
    end.end(result="7")
    assert one.wait("c", 1, "child", child={"task": "c", "payload": {}, "queue": "q"}) == StartedWait(
        "resolved", "completed", "7", None, None, str(child)
    )


def test_batch_of_several_executions_is_written_for_those_that_hold(db: Database) -> None:
    """Executions share statements: one that is fenced fails the others, or they get each other's answers."""
    db.register_queue()
    owner = db.register_orchestrator(tasks=("p",))
    for _ in range(3):
        db.invoke(task="p")
    a, b, c = db.claim(owner, tasks=("p",))
    db.flush(owner, done(b, "released"))
    steps = [NewStep(one.id, one.claim_no, "s", "step", 0, str(n), None) for n, one in enumerate((a, b, c))]
    assert [s.status for s in db.run(db.calls.save_steps(owner, steps))] == ["saved", "fenced", "saved"]
    new = [
        NewWait(one.id, one.claim_no, json.dumps({"name": "w", "kind": "sleep", "due_in": 5, "position": 1}))
        for one in (a, b, c)
    ]
    assert [w.status for w in db.run(db.calls.start_waits(owner, new))] == ["open", "fenced", "open"]
    assert db.rows("select count(*) from {s}._private_steps where execution_id = %s", b.id) == [(0,)]


def test_steps_and_waits_commit_durably(db: Database) -> None:
    """What a handler was told is lost by a crash of the server."""
    one = running(db)
    db.rows("set synchronous_commit = off")
    try:
        session = db.session()
        session.rows("set synchronous_commit = off")
        save(session, one.id, one.claimed, "a", 0, 1)
        assert session.value("show synchronous_commit") == "on"
    finally:
        db.rows("reset synchronous_commit")


def test_child_has_what_its_invocation_said_and_its_parents_place(db: Database) -> None:
    """Options of a child are dropped, or its deadline outlives its parent's."""
    db.register_queue("q")
    db.register_queue("other")
    owner = db.register_orchestrator(tasks=("p",))
    db.invoke(task="p")
    db.rows("update {s}._private_executions set deadline_at = {s}._private_clock() + interval '100 s'")
    (claimed,) = db.claim(owner, tasks=("p",))
    one = Owner(db, owner, claimed)
    child = one.child(
        "c", 0, queue="other", priority=5, delay=30.0, timeout=7.0, deadline_in=1000.0, max_attempts=2, tags=["x"]
    )
    columns = (
        "queue, priority, state::text, timeout::text, max_attempts, tags, parent_id, root_id, wait_name, depth,"
        " deadline_at <= {s}._private_clock() + interval '100 s'"
    )
    row = db.rows(f"select {columns} from {{s}}._private_executions where id = %s", child)[0]
    assert row == (
        "other", 5, "scheduled", "00:00:07", 2, ["x"], one.execution, one.execution, "c", 1, True,
    )  # fmt: skip
    sooner = one.child("d", 1, deadline_in=10.0)
    query = "select date_part('epoch', deadline_at - {s}._private_clock()) from {s}._private_executions where id = %s"
    assert db.value(query, sooner) <= 10


def test_children_are_nested_16_deep(db: Database) -> None:
    """A task that invokes itself fills the database; each level is closed by the one above."""
    db.register_queue()
    owner = db.register_orchestrator(tasks=("p",))
    root = db.invoke(task="p")
    ids = [root]
    while True:
        (claimed,) = db.claim(owner, tasks=("p",))
        one = Owner(db, owner, claimed)
        started = one.wait("c", 0, "child", on_close="cancel", child={"task": "p", "payload": {}, "queue": "q"})
        if started.target is None:
            break
        ids.append(UUID(started.target))
        one.park("c")
    assert started.status == "too_deep"
    assert len(ids) == 17
    assert db.value("select max(depth) from {s}._private_executions") == 16
    assert db.rows("select distinct root_id from {s}._private_executions where depth > 0") == [(root,)]
    # The end of the last goes up to the first, one claim at a time.
    db.flush(owner, done(claimed, "failed", error=json.dumps({"type": "E", "message": "deep"})))
    for execution in reversed(ids[:-1]):
        assert state(db, execution) == "ready"
        (claimed,) = db.claim(owner, tasks=("p",))
        assert claimed.id == execution
        one = Owner(db, owner, claimed)
        loaded = one.load()
        assert loaded is not None
        assert loaded[0].outcome == "failed"
        one.end("failed", error=loaded[0].error)
    assert state(db, root) == "failed"


# --- resolving and parking, in both orders ---


def test_child_that_ended_before_its_parent_was_parked_wakes_it(db: Database) -> None:
    """The parent waits for what is over (I9)."""
    parent = running(db)
    claim_child(db, parent.child("c", 0)).end(result="7")
    assert parent.park("c") == {}
    assert state(db, parent.execution) == "ready"
    assert db.live(parent.execution, "attempt") == (0,)
    loaded = again(db, parent).load()
    assert loaded is not None
    assert [(r.outcome, r.value) for r in loaded] == [("completed", "7")]


def test_child_that_ends_after_its_parent_was_parked_wakes_it(db: Database) -> None:
    """The same, the other way round."""
    parent = running(db)
    child = parent.child("c", 0)
    parent.park("c")
    assert state(db, parent.execution) == "waiting"
    assert db.live(parent.execution, "attempt, run_at") == (0, None)
    claim_child(db, child).end("failed", error='{"type": "E"}')
    assert state(db, parent.execution) == "ready"
    loaded = again(db, parent).load()
    assert loaded is not None
    assert (loaded[0].outcome, loaded[0].error) == ("failed", '{"type": "E"}')


def test_child_ends_while_its_parents_parking_waits_for_the_lock(db: Database) -> None:
    """The parking would look at waits as they were before the child's end was committed."""
    parent = running(db)
    child = claim_child(db, parent.child("c", 0))
    one, two = db.session(), db.session(autocommit=True)
    child.end(session=one, result="7")
    parking = db.start(lambda: parent.park("c", session=two))
    db.wait_blocked(two, parking)
    one.commit()
    assert parking.result(20) == {}
    assert state(db, parent.execution) == "ready"


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("first", ["child", "parent"])
def test_no_isolation_level_loses_a_resolution(db: Database, level: str, first: str) -> None:
    """A database whose default is another than the engine's: through a pooler its sessions have that."""
    parent = running(db)
    child = claim_child(db, parent.child("c", 0))
    one, two = db.session(), db.session(autocommit=True)
    for session in (one, two):
        session.rows(f"set session characteristics as transaction isolation level {level}")
        session.conn.commit()
    works = [partial(child.end, session=one, result="7"), partial(parent.park, "c", session=one)]
    rivals = [partial(parent.park, "c", session=two), partial(child.end, session=two, result="7")]
    index = ("child", "parent").index(first)
    works[index]()
    rival = db.start(rivals[index])
    db.wait_blocked(two, rival)
    one.commit()
    try:
        rival.result(20)
    except psycopg.errors.SerializationFailure:
        assert rivals[index]() == {}  # as the engine does: for the caller the database was not there
    assert state(db, parent.execution) == "ready"


def test_parking_is_open_when_the_child_ends(db: Database) -> None:
    """The child's end would find a parent that still runs."""
    parent = running(db)
    child = claim_child(db, parent.child("c", 0))
    one, two = db.session(), db.session(autocommit=True)
    parent.park("c", session=one)
    ending = db.start(lambda: child.end(session=two, result="7"))
    db.wait_blocked(two, ending)
    one.commit()
    assert ending.result(20) == {}
    assert state(db, parent.execution) == "ready"


def test_two_children_end_at_once(db: Database) -> None:
    """Each looks while the other's end is not committed: all of a nursery have ended and nobody wakes the parent."""
    parent = running(db)
    first, second = parent.child("n/0", 0, scope="n"), parent.child("n/1", 1, scope="n")
    parent.park()
    owner = db.register_orchestrator(tasks=("c",))
    by_id = {claimed.id: Owner(db, owner, claimed) for claimed in db.claim(owner, tasks=("c",))}
    one, two = db.session(), db.session(autocommit=True)
    by_id[first].end(session=one)
    ending = db.start(lambda: by_id[second].end(session=two))
    db.wait_blocked(two, ending)
    assert state(db, parent.execution) == "waiting"
    one.commit()
    ending.result(20)
    assert state(db, parent.execution) == "ready"


def test_child_that_ends_tells_the_owner_of_a_parent_that_runs(db: Database) -> None:
    """A parent that is busy with a step would hear of it at its heartbeat."""
    parent = running(db)
    child = claim_child(db, parent.child("c", 0))
    listener = db.session(autocommit=True)
    listener.rows(f"listen {db.run(db.calls.control_channel(parent.id))}")
    child.end(result="7")
    assert [n.payload for n in listener.conn.notifies(timeout=5, stop_after=1)] == [""]
    assert parent.read() == [ResolvedWait(parent.execution, "c", "completed", "7", None)]
    assert parent.read() == []


def test_woken_parent_is_announced_to_its_sleeping_worker(db: Database) -> None:
    """It would begin at the worker's next sweep."""
    db.register_queue("other")
    parent = running(db, queue="q")
    child = parent.child("c", 0, queue="other")
    parent.park("c")
    sleeper = db.session(autocommit=True)
    sleeper.rows(f"listen {db.run(db.calls.channel('q'))}")
    assert sleeper.run(db.calls.raise_sleep_flag("q", raise_it=True))
    claim_child(db, child, "other").end()
    assert len(list(sleeper.conn.notifies(timeout=5, stop_after=1))) == 1
    sleeper.rows("select pg_advisory_unlock_all()")


@pytest.mark.parametrize("way", ["cancel", "cancel matching", "recover", "crash loop", "released unknown", "retired"])
def test_every_end_of_a_child_wakes_its_parent(db: Database, clock: DatabaseClock, way: str) -> None:
    """A parent waits for ever when its child is ended by somebody else (B18)."""
    parent = running(db)
    child = parent.child("c", 0)
    parent.park("c")
    outcome = "cancelled"
    if way == "cancel":
        db.run(db.calls.cancel([child], "because"))
    elif way == "cancel matching":
        db.run(db.calls.cancel_matching("because", 10, task="c"))
    else:
        owner = db.register_orchestrator(lease=10, tasks=("c",))
        db.claim(owner, tasks=("c",))
        if way != "crash loop":
            db.run(db.calls.cancel([child], "because"))
        if way == "crash loop":
            outcome = "failed"
            db.rows("update {s}._private_executions set crashes = 2 where id = %s", child)
        if way in ("recover", "crash loop"):
            db.rows("update {s}._private_orchestrators set expires_at = {s}._private_clock() where id = %s", owner)
            db.rows("select from {s}.recover('q')")
        elif way == "released unknown":
            db.run(db.calls.release_unknown(owner, "q", []))
        else:
            db.run(db.calls.retire_orchestrator(owner))
    assert state(db, child) == outcome
    assert waits(db, parent.execution) == {"c": outcome}
    assert state(db, parent.execution) == "ready"
    loaded = again(db, parent).load()
    assert loaded is not None
    error = json.loads(loaded[0].error or "")
    assert error == {"reason": "because"} if outcome == "cancelled" else error["type"] == "crash_loop"


def test_recovery_leaves_the_end_of_a_child_whose_parent_is_locked(db: Database) -> None:
    """It would wait for somebody's open transaction, and with it the heartbeat; or the parent would not be woken."""
    parent = running(db)
    child = parent.child("c", 0)
    owner = db.register_orchestrator(tasks=("c",))
    db.claim(owner, tasks=("c",))
    db.run(db.calls.cancel([child], None))
    parent.park("c")
    db.rows("update {s}._private_orchestrators set expires_at = {s}._private_clock() where id = %s", owner)
    other = db.session()
    other.rows("select from {s}._private_executions where id = %s for update", parent.execution)
    db.rows("select from {s}.recover('q')")
    assert (state(db, child), state(db, parent.execution)) == ("running", "waiting")
    other.rollback()
    db.rows("select from {s}.recover('q')")
    assert (state(db, child), state(db, parent.execution)) == ("cancelled", "ready")


def test_told_wait_that_its_task_was_parked_for_wakes_it(db: Database) -> None:
    """A handler that was interrupted between being told and going on would never hear of it again."""
    parent = running(db)
    claim_child(db, parent.child("a", 0)).end(result="7")
    parent.child("b", 1)
    assert [w.name for w in parent.read()] == ["a"]
    parent.park("b")
    assert state(db, parent.execution) == "waiting"  # it was told of a, and waits for b
    other = running(db, queue="r")
    claim_child(db, other.child("a", 0, queue="r"), "r").end(result="7")
    other.child("b", 1, queue="r")
    assert [w.name for w in other.read()] == ["a"]
    other.park("a", "b")
    assert state(db, other.execution) == "ready"


def test_nursery_is_woken_by_its_last_child_or_the_first_failure(db: Database) -> None:
    """10,000 children would wake their parent 10,000 times; or a failure would be heard of at the end."""
    parent = running(db)
    children = [parent.child(f"n/{n}", n, scope="n") for n in range(4)]
    parent.park()
    owner = db.register_orchestrator(tasks=("c",))
    by_id = {claimed.id: Owner(db, owner, claimed) for claimed in db.claim(owner, tasks=("c",))}
    by_id[children[0]].end()
    assert state(db, parent.execution) == "waiting"
    by_id[children[1]].end("failed", error="{}")
    assert state(db, parent.execution) == "ready"
    parent = again(db, parent)
    parent.load()
    assert parent.close("n/0", "n/1", "n/2", "n/3") == 2
    parent.park()
    assert state(db, parent.execution) == "waiting"
    by_id[children[2]].end("cancelled")
    assert state(db, parent.execution) == "waiting"  # it knows that one has failed, and waits for all
    by_id[children[3]].end("cancelled")
    assert state(db, parent.execution) == "ready"


def test_child_of_a_nursery_that_is_awaited_by_itself_wakes_alone(db: Database) -> None:
    """`result()` inside the block would wait for all."""
    parent = running(db)
    first, _ = parent.child("n/0", 0, scope="n"), parent.child("n/1", 1, scope="n")
    parent.park("n/0")
    owner = db.register_orchestrator(tasks=("c",))
    by_id = {claimed.id: Owner(db, owner, claimed) for claimed in db.claim(owner, tasks=("c",))}
    by_id[first].end(result="1")
    assert state(db, parent.execution) == "ready"
    parent = again(db, parent)
    parent.load()
    parent.park()
    assert state(db, parent.execution) == "waiting"
    next(one for one in by_id.values() if one.execution != first).end(result="2")
    assert state(db, parent.execution) == "ready"


def test_parking_sent_twice_changes_nothing(db: Database) -> None:
    """Its reply was lost, and the parent was woken, claimed and parked again meanwhile."""
    parent = running(db)
    child = parent.child("c", 0)
    assert parent.park("c") == {}
    assert parent.park("c") == {parent.execution: "already"}
    claim_child(db, child).end()
    assert state(db, parent.execution) == "ready"
    assert parent.park("c") == {parent.execution: "already"}
    assert state(db, parent.execution) == "ready"
    second = again(db, parent)
    assert parent.park("c") == {parent.execution: "already"}
    assert state(db, second.execution) == "running"


# --- timers ---


def test_sleep_is_over_when_it_is_due_and_wakes_by_a_claim(db: Database, clock: DatabaseClock) -> None:
    """Years work, and cost a claim when they are over (B34)."""
    one = running(db)
    assert one.wait("now", 0, due_in=0) == StartedWait("resolved", "elapsed", None, None, 0.0, None)
    assert one.wait("past", 1, due_at="2001-01-01T00:00:00+00:00").outcome == "elapsed"
    assert one.wait("years", 2, due_in=5 * 365 * 86400.0).status == "open"
    one.park("years")
    assert db.look(one.id, tasks=("p",)).due_in == pytest.approx(5 * 365 * 86400, abs=60)
    clock.advance(5 * 365 * 86400 - 60)
    db.rows("update {s}._private_orchestrators set expires_at = 'infinity'")
    assert db.claim(one.id, tasks=("p",)) == []
    clock.advance(61)
    two = again(db, one)
    loaded = two.load()
    assert loaded is not None
    assert [r.outcome for r in loaded] == ["elapsed"] * 3
    assert two.claimed.attempt == 1


def test_due_sleep_of_a_running_execution_is_read(db: Database, clock: DatabaseClock) -> None:
    """A sleep beside a step would be over when the step is."""
    one = running(db)
    one.wait("s", 0, due_in=10)
    assert one.read() == []
    clock.advance(11)
    assert one.read() == [ResolvedWait(one.execution, "s", "elapsed", None, None)]
    assert one.read() == []


def test_sleep_that_was_due_before_it_was_parked_wakes_at_once(db: Database, clock: DatabaseClock) -> None:
    """It would sleep for ever: nobody tells of a time that has passed."""
    one = running(db)
    one.wait("s", 0, due_in=10)
    clock.advance(11)
    one.park("s")
    assert again(db, one).execution == one.execution


def test_other_waits_than_sleeps_time_out(db: Database, clock: DatabaseClock) -> None:
    """A timeout would look like something that came."""
    one = running(db)
    one.wait("e", 0, "event", target="paid", due_in=10)
    one.park("e")
    clock.advance(11)
    loaded = again(db, one).load()
    assert loaded is not None
    assert (loaded[0].outcome, loaded[0].target, loaded[0].value) == ("timed_out", "paid", None)


def test_deadline_passes_while_it_waits(db: Database, clock: DatabaseClock) -> None:
    """An execution whose time is up would wait for a child that takes longer."""
    one = running(db)
    db.rows("update {s}._private_executions set deadline_at = {s}._private_clock() + interval '10 s'")
    child = one.child("c", 0)
    one.park("c")
    assert db.value("select deadline_at = (select deadline_at from {s}._private_executions where id = %s)"
                    " from {s}._private_executions where id = %s", one.execution, child)  # fmt: skip
    assert 0 < (db.look(one.id, tasks=("p",)).due_in or 0) <= 10
    clock.advance(11)
    two = again(db, one)
    assert two.claimed.deadline_in is not None
    assert two.claimed.deadline_in <= 0


# --- cancelling and closing ---


@pytest.mark.parametrize("how", ["waiting", "running"])
def test_end_of_a_parent_closes_its_children_at_every_depth(db: Database, how: str) -> None:
    """Children run on for nobody; abandoned ones must."""
    parent = running(db)
    child, kept = parent.child("c", 0), parent.child("k", 1, on_close="abandon", task="k")
    one = claim_child(db, child)
    grandchild, ready = one.child("g", 0), one.child("r", 1, task="k")
    two = claim_child(db, grandchild)
    great = two.child("x", 0, task="k")
    two.park("x")
    one.park("g", "r")
    if how == "waiting":
        parent.park("c")
        db.run(db.calls.cancel([parent.execution], "because"))
    else:
        parent.end("failed", error="{}")
    assert db.run(db.calls.signals(parent.id, ["q"])).has_errands
    assert close_all(db) == 4
    assert not db.run(db.calls.signals(parent.id, ["q"])).has_errands
    for execution in (child, grandchild, ready, great):
        (reason,) = db.finished(execution, "cancel_reason")[0]
        assert reason.startswith("its parent has ended: ")
    assert state(db, kept) == "ready"
    assert db.value("select count(*) from {s}._private_waits") == 0


def test_running_child_is_asked_to_end_and_its_own_children_follow(db: Database) -> None:
    """A running child would be taken from its owner, or go on."""
    parent = running(db)
    one = claim_child(db, parent.child("c", 0))
    grandchild = one.child("g", 0, task="k")
    parent.end()
    assert close_all(db) == 1
    assert db.run(db.calls.signals(one.id, ["q"])).cancelled == {
        one.execution: (one.claimed.claim_no, "its parent has ended: completed")
    }
    assert state(db, grandchild) == "ready"
    one.end("cancelled")
    assert close_all(db) == 1
    assert state(db, grandchild) == "cancelled"


def test_parking_of_an_execution_that_is_to_be_cancelled_ends_it(db: Database) -> None:
    """It would wait, and be cancelled when it is woken."""
    parent = running(db)
    child = parent.child("c", 0)
    db.run(db.calls.cancel([parent.execution], "because"))
    parent.park("c")
    assert state(db, parent.execution) == "cancelled"
    close_all(db)
    assert state(db, child) == "cancelled"


def test_cancel_meets_parking_and_waking_of_the_same_parent(db: Database) -> None:
    """Whoever is second sees what the first did: it ends once, and its child is closed."""
    parent = running(db)
    child = claim_child(db, parent.child("c", 0))
    one, two = db.session(), db.session(autocommit=True)
    one.run(db.calls.cancel([parent.execution], "because"))
    parking = db.start(lambda: parent.park("c", session=two))
    db.wait_blocked(two, parking)
    one.commit()
    parking.result(20)
    assert state(db, parent.execution) == "cancelled"
    assert child.end() == {}
    close_all(db)
    assert state(db, child.execution) == "completed"
    other = running(db, queue="r")
    late = claim_child(db, other.child("c", 0, queue="r"), "r")
    other.park("c")
    three = db.session()
    late.end(session=three)
    cancelling = db.start(lambda: two.run(db.calls.cancel([other.execution], "because")))
    db.wait_blocked(two, cancelling)
    three.commit()
    cancelling.result(20)
    assert state(db, other.execution) == "cancelled"


def test_closing_is_shared_by_many_and_done_once(db: Database) -> None:
    """Two that close at once wait for each other, or count twice."""
    parent = running(db)
    children = [parent.child(f"c{n}", n) for n in range(6)]
    parent.end()
    one, two = db.session(), db.session(autocommit=True)
    assert one.run(db.calls.close_children()) == 6
    assert two.run(db.calls.close_children()) == 0
    one.commit()
    assert two.run(db.calls.close_children()) == 0
    assert [state(db, child) for child in children] == ["cancelled"] * 6


def test_child_that_somebody_has_locked_keeps_no_other_from_being_closed(db: Database) -> None:
    """One open transaction of a user's would stop all closing in the database."""
    parent = running(db)
    children = [parent.child(f"c{n}", n) for n in range(3)]
    parent.end()
    other = db.session()
    other.rows("select from {s}._private_executions where id = %s for update", children[0])
    assert db.run(db.calls.close_children()) == 2
    assert [state(db, child) for child in children] == ["ready", "cancelled", "cancelled"]
    assert db.run(db.calls.signals(parent.id, ["q"])).has_errands
    other.rollback()
    assert db.run(db.calls.close_children()) == 1


def test_only_open_children_can_be_asked_to_end(db: Database) -> None:
    """A sleep's target is no execution, and what is over is over."""
    parent = running(db)
    claim_child(db, parent.child("a", 0)).end()
    parent.child("b", 1)
    parent.wait("s", 2, due_in=5)
    assert parent.close("a", "b", "s", "unknown") == 1
    assert parent.close("b") == 0
    assert close_all(db) == 1
    assert [(w.name, w.outcome) for w in sorted(parent.read())] == [("a", "completed"), ("b", "cancelled")]


# --- another attempt, another life ---


def attempt_again(db: Database, one: Owner) -> Owner:
    one.end("retried", error="{}")
    return again(db, one)


def names(one: Owner) -> list[str]:
    loaded = one.load()
    assert loaded is not None
    return [record.name for record in loaded]


def test_attempt_forgets_the_failures_at_the_end_only(db: Database) -> None:
    """A retry fails at once by what it is to try again; or what was dealt with is done again."""
    one = running(db)
    one.step("handled", 0, error={"type": "E"})
    one.step("done", 1, 1)
    one.step("last", 2, error={"type": "E"})
    two = attempt_again(db, one)
    assert names(two) == ["handled", "done"]
    assert two.claimed.attempt == 2
    assert two.step("last", 3, 5).status == "saved"


def test_failed_child_is_tried_again_though_its_siblings_have_later_places(db: Database) -> None:
    """Children of one nursery begin together: the first one's failure would never be forgotten."""
    one = running(db)
    children = [one.child(f"n/{n}", n, scope="n") for n in range(3)]
    one.wait("beside", 3, due_in=500)
    owner = db.register_orchestrator(tasks=("c",))
    by_id = {claimed.id: Owner(db, owner, claimed) for claimed in db.claim(owner, tasks=("c",))}
    by_id[children[1]].end(result="1")
    by_id[children[0]].end("failed", error='{"type": "E"}')
    by_id[children[2]].end("cancelled")
    two = attempt_again(db, one)
    assert names(two) == ["n/1", "beside"]
    assert two.child("n/0", 4, scope="n") != children[0]


def test_failed_child_that_was_dealt_with_is_kept(db: Database) -> None:
    """What a handler did instead would be done beside a second try."""
    one = running(db)
    child = one.child("c", 0)
    claim_child(db, child).end("failed", error='{"type": "E"}')
    one.read()
    one.child("instead", 1)
    assert names(attempt_again(db, one)) == ["c", "instead"]


@pytest.mark.parametrize("way", ["released", "recovered", "waiting"])
def test_what_is_no_new_attempt_forgets_nothing(db: Database, way: str) -> None:
    """A replay must find all that the run before had."""
    one = running(db)
    one.wait("s", 0, due_in=0)
    one.step("fails", 1, error={"type": "E"})
    if way == "recovered":
        db.rows("update {s}._private_orchestrators set expires_at = {s}._private_clock()")
        db.rows("select from {s}.recover('q')")
        one.id = db.register_orchestrator(tasks=("p",))
    else:
        one.end(way)
    if way == "waiting":
        assert state(db, one.execution) == "waiting"
        db.run(db.calls.cancel([one.execution], None))
        steps = db.finished(one.execution, "steps")[0][0]
        assert [record["name"] for record in steps] == ["s", "fails"]
    else:
        assert names(again(db, one)) == ["s", "fails"]


def test_dead_letter_keeps_its_steps_and_tries_its_last_failures_again(db: Database) -> None:
    """Mended code does all again, or fails by what is recorded; or a sleep that was cut short counts as slept."""
    one = running(db)
    one.step("handled", 0, error={"type": "E"})
    one.step("done", 1, None)
    children = [one.child(f"n/{n}", 2 + n, scope="n") for n in range(3)]
    owner = db.register_orchestrator(tasks=("c",))
    by_id = {claimed.id: Owner(db, owner, claimed) for claimed in db.claim(owner, tasks=("c",))}
    by_id[children[2]].end(result="5")
    by_id[children[0]].end("failed", error='{"type": "E"}')
    one.wait("open", 5, due_in=500)
    db.rows("update {s}._private_waits set created_at = created_at - interval '1 h' where name = 'open'")
    one.end("failed", error="{}", keep=1000.0)
    close_all(db)
    assert db.run(db.calls.retry([one.execution])) == {one.execution: Retry.RETRIED}
    two = again(db, one)
    loaded = two.load()
    assert loaded is not None
    assert [(r.name, r.kind, r.outcome, r.value) for r in loaded] == [
        ("handled", "step", "failed", None),
        ("done", "step", "completed", None),
        ("n/2", "child", "completed", "5"),
    ]
    assert loaded[2].target == str(children[2])
    # Kept over another attempt and another life of it.
    three = attempt_again(db, two)
    assert names(three) == ["handled", "done", "n/2"]
    three.step("later", 9, 1)
    three.end("failed", error="{}", keep=1000.0)
    db.run(db.calls.retry([one.execution]))
    assert names(again(db, three)) == ["handled", "done", "n/2", "later"]


def test_fork_has_the_records_of_an_execution_that_ends_meanwhile(db: Database) -> None:
    """It saw the execution live, looks for the records among those of live ones, and finds none."""
    one = running(db)
    one.step("a", 0, 1)
    one.step("b", 1, 2)
    db.rows("update {s}._private_executions set payload = null")
    db.rows("insert into {s}._private_payloads values (%s, '{}')", one.execution)
    gate, forker = db.session(), db.session(autocommit=True)
    gate.rows("lock table {s}._private_payloads in access exclusive mode")
    forking = db.start(lambda: forker.run(forker.calls.fork(one.execution, "b")))
    db.wait_blocked(forker, forking)
    one.end(keep=1000.0, session=gate)
    gate.commit()
    fork = forking.result(20).id
    assert db.rows("select name from {s}._private_steps where execution_id = %s", fork) == [("a",)]


def test_restart_takes_one_life_of_an_execution_that_continues_as_new_meanwhile(db: Database) -> None:
    """It saw the former life, whose payload is elsewhere, and finds it gone; or takes the next one's as that."""
    one = running(db)
    db.rows("update {s}._private_executions set payload = null, version = '1'")
    db.rows("insert into {s}._private_payloads values (%s, '{\"n\": 1}')", one.execution)
    gate, restarter = db.session(), db.session(autocommit=True)
    gate.rows("lock table {s}._private_payloads in access exclusive mode")
    restarting = db.start(lambda: restarter.run(restarter.calls.restart(one.execution)))
    db.wait_blocked(restarter, restarting)
    life = done(one.claimed, "continued", result='{"payload": {"n": 2}, "version": "2"}')
    assert gate.run(gate.calls.continue_as_new(one.id, [life])) == {}
    gate.commit()
    row = db.live_row(restarting.result(20).id, "payload ->> 'n', version")
    assert row in [("1", "1"), ("2", "2")]


def test_retried_child_has_nobody_to_tell(db: Database) -> None:
    """Its parent was told once; a second end would overwrite that, or fail."""
    parent = running(db)
    child = claim_child(db, parent.child("c", 0))
    child.end("failed", error="{}", keep=1000.0)
    assert db.run(db.calls.retry([child.execution])) == {child.execution: Retry.RETRIED}
    claim_child(db, child.execution).end(result="9")
    assert waits(db, parent.execution) == {"c": "failed"}


def test_finished_row_has_the_history_and_the_tables_are_empty(db: Database) -> None:
    """Rows of what is over would stay for ever."""
    one = running(db)
    one.step("a", 0, [1])
    one.wait("s", 1, due_in=0)
    claim_child(db, one.child("c", 2)).end(result="3")
    one.child("open", 3, on_close="abandon")
    one.end(result="4", keep=1000.0)
    (steps,) = db.finished(one.execution, "steps")[0]
    assert [(s["name"], s["kind"], s.get("outcome"), s.get("value")) for s in steps] == [
        ("a", "step", "completed", [1]), ("s", "sleep", "elapsed", None), ("c", "child", "completed", 3),
        ("open", "child", None, None),
    ]  # fmt: skip
    counts = "select (select count(*) from {s}._private_steps), (select count(*) from {s}._private_waits)"
    assert db.rows(counts) == [(0, 0)]


# --- locks ---


def test_nothing_is_lost_and_no_deadlock_broken_under_eight_workers(db: Database) -> None:
    """Flushes of parents and children that overlap lock their rows in one order, whatever the outcomes (no 40P01)."""
    rng = random.Random(7)
    db.register_queue()
    owners = [db.register_orchestrator(tasks=("p", "c")) for _ in range(8)]
    for _ in range(48):
        db.invoke(task="p")
    parents: list[Owner] = []
    for owner in owners:
        parents += [Owner(db, owner, claimed) for claimed in db.claim(owner, tasks=("p",), limit=6)]
    for parent in parents:
        for n in range(4):
            parent.child(f"n/{n}", n, scope="n" if n % 2 else None)
    batches: dict[UUID, list[Outcome]] = {parent.id: [] for parent in parents}
    while claimed := db.claim(rng.choice(owners), tasks=("c",), limit=1):
        owner = db.value("select owner from {s}._private_executions where id = %s", claimed[0].id)
        kind = rng.choice(["completed", "completed", "failed", "retried"])
        batches[owner].append(done(claimed[0], kind, error="{}" if kind != "completed" else None))
    for parent in parents:
        kind = rng.choice(["waiting", "waiting", "waiting", "completed", "retried", "released"])
        batches[parent.id].append(done(parent.claimed, kind))

    def work(session: Session, owner: UUID, outcomes: Sequence[Outcome]) -> None:
        for first in range(0, len(outcomes), 8):
            session.flush(owner, *outcomes[first : first + 8])
            session.run(session.calls.close_children())

    with no_deadlock(db):
        for outcomes in batches.values():
            rng.shuffle(outcomes)
        works = [db.start(partial(work, db.session(autocommit=True), owner, batches[owner])) for owner in owners]
        for one in works:
            one.result(60)
    close_all(db)
    stuck = (
        "select e.id from {s}._private_executions e where e.state = 'waiting' and e.task = 'p' and not exists ("
        " select from {s}._private_waits w join {s}._private_executions c on c.id = w.target::uuid"
        " where w.execution_id = e.id and w.resolved_at is null)"
    )
    assert db.rows(stuck) == []
    orphans = (
        "select w.name from {s}._private_waits w where w.kind = 'child' and w.resolved_at is null"
        " and not exists (select from {s}._private_executions c where c.id = w.target::uuid)"
    )
    assert db.rows(orphans) == []


def test_flush_of_root_parents_takes_their_rows_in_the_order_of_ids(db: Database) -> None:
    """One completes and one goes on, in one batch: written in that order, they meet a flush of both their children."""
    db.register_queue()
    owner, other = (db.register_orchestrator(tasks=("p", "c")) for _ in range(2))
    for _ in range(2):
        db.invoke(task="p")
    low, high = sorted((Owner(db, owner, c) for c in db.claim(owner, tasks=("p",))), key=lambda one: one.execution)
    for parent in (low, high):
        parent.child("c", 0, on_close="abandon")
    children = db.claim(other, tasks=("c",))
    gate, one, two = db.session(), db.session(autocommit=True), db.session(autocommit=True)
    gate.rows("select from {s}._private_executions where id = %s for update", low.execution)
    with no_deadlock(db):
        outcomes = [done(high.claimed), done(low.claimed, "waiting")]
        roots = db.start(lambda: one.run(db.calls.flush(owner, outcomes, has_family=False)))
        db.wait_blocked(one, roots)
        ends = db.start(lambda: two.flush(other, *map(done, children)))
        db.wait_blocked(two, ends)
        # Nobody has the second row while waiting for the first.
        free = "select count(*) from (select from {s}._private_executions where id = %s for update skip locked) x"
        assert db.value(free, high.execution) == 1
        gate.rollback()
        assert (roots.result(20), ends.result(20)) == ({}, {})
