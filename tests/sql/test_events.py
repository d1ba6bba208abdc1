"""Events, messages and promises in the database: who receives what, in every order of the transactions that meet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sql.database import Database, Session

from pgconductor.db.calls import NewEffect, NewProgress, NewWait, SavedEffect, StartedWait
from pgconductor.model import Claimed, Outcome, PromiseAnswer
from pgconductor.testing import DatabaseClock


class Handlers:
    """Executions that run under one owner, and what their handlers would ask for."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db.register_queue()
        self.owner = db.register_orchestrator()

    def start(self, count: int = 1) -> list[Claimed]:
        for _ in range(count):
            self.db.invoke()
        claimed = self.db.claim(self.owner, limit=count)
        assert len(claimed) == count
        return claimed

    def wait(
        self,
        claimed: Claimed,
        name: str,
        target: str,
        *,
        kind: str = "event",
        match: object = None,
        due_in: float | None = None,
        session: Session | None = None,
    ) -> StartedWait:
        wait: dict[str, object] = {"name": name, "kind": kind, "position": 0, "target": target}
        if match is not None:
            wait["match"] = match
        if due_in is not None:
            wait["due_in"] = due_in
        row = NewWait(claimed.id, claimed.claim_no, json.dumps(wait))
        return (session or self.db).run(self.db.calls.start_waits(self.owner, [row]))[0]

    def park(self, *claimed: Claimed) -> None:
        outcomes = [Outcome(c.id, c.claim_no, "waiting") for c in claimed]
        assert self.db.flush(self.owner, *outcomes) == {}

    def waits(self, claimed: Claimed) -> dict[str, tuple[str | None, Any]]:
        """Outcome and value of each wait."""
        rows = self.db.rows(
            "select name, outcome, value from {s}._private_waits where execution_id = %s order by 1", claimed.id
        )
        return {name: (outcome, value) for name, outcome, value in rows}

    def state(self, claimed: Claimed) -> str:
        row = self.db.live(claimed.id, "state::text")
        return "gone" if row is None else str(row[0])

    def renew(self, claimed: Claimed) -> Claimed:
        """Let it continue as new, and claim its next life."""
        outcome = Outcome(claimed.id, claimed.claim_no, "continued", '{"payload": {}, "version": null}')
        assert self.db.run(self.db.calls.continue_as_new(self.owner, [outcome])) == {}
        (again,) = self.db.claim(self.owner)
        assert again.id == claimed.id
        return again

    def effect(self, claimed: Claimed, name: str, position: int = 0, **effect: object) -> SavedEffect:
        row = NewEffect(claimed.id, claimed.claim_no, name, position, json.dumps(effect))
        return self.db.run(self.db.calls.save_effects(self.owner, [row]))[0]

    def promise(self, claimed: Claimed, name: str = "p") -> UUID:
        saved = self.effect(claimed, name, kind="new_promise")
        assert saved.value is not None
        return UUID(json.loads(saved.value))


@pytest.fixture
def handlers(db: Database) -> Handlers:
    return Handlers(db)


def emit(session: Session, event: str = "e", payload: object = None, retention: float = 1000.0) -> int:
    return session.run(session.calls.emit(event, json.dumps(payload), retention))


def deliver(session: Session) -> int:
    """All there is; how many were done with."""
    total, after = 0, 0
    while True:
        delivery = session.run(session.calls.deliver_events(after))
        if delivery.upto is None:
            return total
        total, after = total + delivery.delivered, delivery.upto


def inbox(db: Database) -> list[tuple[Any, ...]]:
    return db.rows("select kind, payload, delivered_at is not null from {s}._private_events order by id")


def errands(db: Database, handlers: Handlers) -> bool:
    return db.run(db.calls.signals(handlers.owner, ["q"])).has_errands


# --- one after the other ---


def test_event_wakes_a_parked_execution_and_is_recorded_with_its_wait(db: Database, handlers: Handlers) -> None:
    """The execution sleeps on, or is woken without what it waited for."""
    (claimed,) = handlers.start()
    assert handlers.wait(claimed, "w", "e").status == "open"
    handlers.park(claimed)
    emit(db, "e", {"n": 1})
    assert handlers.state(claimed) == "waiting"  # sending touches no execution
    assert errands(db, handlers)
    assert deliver(db) == 1
    assert handlers.state(claimed) == "ready"
    assert handlers.waits(claimed) == {"w": ("received", {"n": 1})}
    assert not errands(db, handlers)
    (again,) = db.claim(handlers.owner)
    history = db.run(db.calls.load_history(handlers.owner, again.id, again.claim_no))
    assert history is not None
    assert [(r.name, r.kind, r.outcome, r.target, r.value) for r in history] == [
        ("w", "event", "received", "e", '{"n": 1}')
    ]


@pytest.mark.parametrize("is_delivered", [False, True])
def test_event_that_came_before_its_wait_resolves_it_at_once(
    db: Database, handlers: Handlers, *, is_delivered: bool
) -> None:
    """What was sent a moment too early is lost, with or without a delivery between."""
    emit(db, "e", 7)
    if is_delivered:
        deliver(db)
    (claimed,) = handlers.start()
    wait = handlers.wait(claimed, "w", "e")
    assert (wait.status, wait.outcome, wait.value) == ("resolved", "received", "7")


def test_event_is_received_by_every_waiting_execution_once(db: Database, handlers: Handlers) -> None:
    """A broadcast reaches some only, or one twice."""
    claimed = handlers.start(50)
    for each in claimed:
        handlers.wait(each, "w", "e")
    handlers.park(*claimed)
    emit(db, "e", "x")
    assert deliver(db) == 1
    assert [handlers.waits(each) for each in claimed] == [{"w": ("received", "x")}] * 50
    assert db.value("select count(*) from {s}._private_queue_1 where state = 'ready'") == 50
    for each in db.claim(handlers.owner):
        assert handlers.wait(each, "again", "e").status == "open"  # not the same a second time


def test_more_waiters_than_one_delivery_takes_all_receive(db: Database, handlers: Handlers) -> None:
    """The rest waits for ever, since the event counts as delivered."""
    claimed = handlers.start(1100)
    rows = [NewWait(c.id, c.claim_no, '{"name": "w", "kind": "event", "position": 0, "target": "e"}') for c in claimed]
    for start in range(0, len(rows), 500):
        db.run(db.calls.start_waits(handlers.owner, rows[start : start + 500]))
    handlers.park(*claimed)
    emit(db, "e")
    assert deliver(db) == 1
    assert db.value("select count(*) from {s}._private_queue_1 where state = 'ready'") == 1100


def test_events_of_one_name_come_oldest_first_and_each_once(db: Database, handlers: Handlers) -> None:
    """A loop over events sees one twice, or skips one."""
    (claimed,) = handlers.start()
    for n in range(3):
        emit(db, "e", n)
    assert [handlers.wait(claimed, f"w{n}", "e").value for n in range(4)] == ["0", "1", "2", None]
    emit(db, "e", 3)
    deliver(db)
    assert handlers.waits(claimed)["w3"] == ("received", 3)


def test_branches_that_wait_for_one_name_get_one_event_each(db: Database, handlers: Handlers) -> None:
    """One event resolves two waits of an execution."""
    (claimed,) = handlers.start()
    handlers.wait(claimed, "a", "e")
    handlers.wait(claimed, "b", "e", match={"to": "b"})
    emit(db, "e", {"to": "b", "n": 1})
    deliver(db)
    assert handlers.waits(claimed) == {"a": ("received", {"to": "b", "n": 1}), "b": (None, None)}
    emit(db, "e", {"to": "c", "n": 2})
    emit(db, "e", {"to": "b", "n": 3})
    deliver(db)
    assert handlers.waits(claimed)["b"] == ("received", {"to": "b", "n": 3})


def test_match_is_containment_and_what_does_not_fit_stays_for_others(db: Database, handlers: Handlers) -> None:
    """An execution is woken by somebody else's event, or swallows it."""
    first, second = handlers.start(2)
    handlers.wait(first, "w", "e", match={"order": {"id": 1}})
    handlers.wait(second, "w", "e", match={"order": {"id": 2}})
    handlers.park(first, second)
    emit(db, "e", {"order": {"id": 2, "sum": 5}, "by": "x"})
    emit(db, "e", [1])
    deliver(db)
    assert (handlers.state(first), handlers.state(second)) == ("waiting", "ready")


def test_event_is_gone_for_those_who_come_after_its_retention(
    db: Database, handlers: Handlers, clock: DatabaseClock
) -> None:
    """An old event begins something anew, or the table grows for ever."""
    emit(db, "e", 1, retention=10)
    emit(db, "e", 2, retention=1000)
    deliver(db)
    clock.advance(11)
    db.rows("select {s}.maintain()")
    assert [payload for _, payload, _ in inbox(db)] == [2]
    (claimed,) = handlers.start()
    assert handlers.wait(claimed, "w", "e").value == "2"


def test_event_that_expired_before_its_delivery_still_reaches_who_waits(
    db: Database, handlers: Handlers, clock: DatabaseClock
) -> None:
    """With no orchestrator for a while, waits miss what came in that time."""
    (claimed,) = handlers.start()
    handlers.wait(claimed, "w", "e")
    handlers.park(claimed)
    emit(db, "e", 1, retention=0)
    clock.advance(100)
    db.rows("select {s}.maintain()")
    deliver(db)
    assert handlers.waits(claimed) == {"w": ("received", 1)}
    db.rows("select {s}.maintain()")
    assert inbox(db) == []


# --- messages ---


def test_message_is_received_once_by_its_execution_in_order(db: Database, handlers: Handlers) -> None:
    """A message is lost, comes twice, comes to another, or before one that was sent earlier."""
    first, second = handlers.start(2)
    send = db.calls.send
    for n in range(3):
        assert db.run(send(first.id, "c", str(n)))
    deliver(db)
    assert handlers.wait(second, "w", "c", kind="message").status == "open"
    assert [handlers.wait(first, f"w{n}", "c", kind="message").value for n in range(4)] == ["0", "1", "2", None]
    assert inbox(db) == []
    db.run(send(first.id, "c", "3"))
    db.run(send(first.id, "other", "4"))
    deliver(db)
    assert handlers.waits(first)["w3"] == ("received", 3)
    assert handlers.waits(second) == {"w": (None, None)}


def test_messages_go_with_their_execution(db: Database, handlers: Handlers) -> None:
    """Rows that nobody will ever read stay behind."""
    never_asked, cancelled, ended = handlers.start(3)
    idle = db.invoke()
    for execution in (never_asked.id, cancelled.id, idle, ended.id):
        assert db.run(db.calls.send(execution, "c", "1"))
    deliver(db)
    handlers.wait(cancelled, "w", "other", kind="message")
    handlers.park(cancelled)
    db.flush(handlers.owner, Outcome(never_asked.id, never_asked.claim_no, "completed", "1"))
    db.run(db.calls.cancel([cancelled.id, idle], None))
    db.run(db.calls.send(ended.id, "c", "2"))
    db.flush(handlers.owner, Outcome(ended.id, ended.claim_no, "failed", None, "{}"))
    deliver(db)
    assert inbox(db) == []
    assert not db.run(db.calls.send(ended.id, "c", "3"))
    assert not db.run(db.calls.send(uuid4(), "c", "3"))


def test_message_to_a_life_that_records_nothing_goes_with_it(db: Database, handlers: Handlers) -> None:
    """What was sent to the life before it stays for ever, since an execution without records has nothing to remove."""
    (claimed,) = handlers.start()
    db.run(db.calls.send(claimed.id, "c", "1"))
    deliver(db)
    again = handlers.renew(claimed)
    db.flush(handlers.owner, Outcome(again.id, again.claim_no, "completed", "1"))
    deliver(db)
    assert inbox(db) == []


# --- promises ---


def test_promise_is_resolved_exactly_once(db: Database, handlers: Handlers) -> None:
    """A second answer replaces the first, or is not told that it came too late."""
    (claimed,) = handlers.start()
    promise = handlers.promise(claimed)
    assert handlers.promise(claimed) == promise  # recorded
    handlers.wait(claimed, "r", str(promise), kind="promise")
    handlers.park(claimed)
    assert db.run(db.calls.resolve_promise(promise, '"yes"')) is PromiseAnswer.RESOLVED
    assert db.run(db.calls.reject_promise(promise, "no")) is PromiseAnswer.ALREADY
    deliver(db)
    assert db.run(db.calls.resolve_promise(promise, '"no"')) is PromiseAnswer.ALREADY
    assert handlers.state(claimed) == "ready"
    assert handlers.waits(claimed) == {"r": ("resolved", "yes")}
    assert db.run(db.calls.resolve_promise(uuid4(), "1")) is PromiseAnswer.UNKNOWN


def test_promise_that_was_rejected_before_its_wait_is_rejected(db: Database, handlers: Handlers) -> None:
    """The answer is lost because nobody waited yet."""
    (claimed,) = handlers.start()
    promise = handlers.promise(claimed)
    db.run(db.calls.reject_promise(promise, "too dear"))
    deliver(db)
    wait = handlers.wait(claimed, "r", str(promise), kind="promise")
    assert (wait.status, wait.outcome) == ("resolved", "rejected")
    assert json.loads(wait.error or "") == {"type": "PromiseRejected", "message": "too dear"}


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled by request", "cancelled while it waits"])
def test_promises_go_with_their_execution(db: Database, handlers: Handlers, how: str) -> None:
    """Ids that nobody listens to stay for ever, or can be resolved though nobody hears it."""
    (claimed,) = handlers.start()
    resolved, unresolved, late = (handlers.promise(claimed, name) for name in "abc")
    db.run(db.calls.resolve_promise(resolved, "1"))
    deliver(db)
    db.run(db.calls.resolve_promise(late, "1"))
    if how == "cancelled while it waits":
        handlers.wait(claimed, "r", str(unresolved), kind="promise")
        handlers.park(claimed)
        db.run(db.calls.cancel([claimed.id], None))
    else:
        if how == "cancelled by request":
            db.run(db.calls.cancel([claimed.id], None))
        kind = "failed" if how == "failed" else "completed" if how == "completed" else "cancelled"
        db.flush(handlers.owner, Outcome(claimed.id, claimed.claim_no, kind))
    deliver(db)
    assert inbox(db) == []
    assert db.value("select count(*) from {s}._private_promises") == 0
    for promise in (resolved, unresolved):
        assert db.run(db.calls.resolve_promise(promise, "1")) is PromiseAnswer.UNKNOWN


def test_promise_of_a_retried_execution_is_open_again(db: Database, handlers: Handlers) -> None:
    """A dead letter that begins anew waits for an id that nobody can resolve any more."""
    (claimed,) = handlers.start()
    heard, unheard = handlers.promise(claimed, "a"), handlers.promise(claimed, "b")
    db.run(db.calls.resolve_promise(heard, "1"))
    handlers.wait(claimed, "a/result", str(heard), kind="promise")
    handlers.wait(claimed, "b/result", str(unheard), kind="promise")
    db.flush(handlers.owner, Outcome(claimed.id, claimed.claim_no, "failed", None, '{"type": "x", "message": "y"}'))
    db.run(db.calls.retry([claimed.id]))
    assert db.run(db.calls.resolve_promise(heard, "2")) is PromiseAnswer.UNKNOWN
    assert db.run(db.calls.resolve_promise(unheard, "2")) is PromiseAnswer.RESOLVED
    (again,) = db.claim(handlers.owner)
    history = db.run(db.calls.load_history(handlers.owner, again.id, again.claim_no))
    assert {r.name: (r.outcome, r.value) for r in history or []} == {
        "a": ("completed", f'"{heard}"'), "b": ("completed", f'"{unheard}"'), "a/result": ("resolved", "1"),
    }  # fmt: skip
    assert handlers.wait(again, "b/result", str(unheard), kind="promise").value == "2"


def test_event_of_a_former_life_is_not_received_again(db: Database, handlers: Handlers) -> None:
    """A retried execution gets an event for the second time, under another name."""
    (claimed,) = handlers.start()
    emit(db, "e", 1)
    handlers.wait(claimed, "w", "e")
    db.flush(handlers.owner, Outcome(claimed.id, claimed.claim_no, "failed", None, '{"type": "x", "message": "y"}'))
    db.run(db.calls.retry([claimed.id]))
    (again,) = db.claim(handlers.owner)
    assert handlers.wait(again, "w2", "e").status == "open"


def test_event_of_a_life_that_continued_as_new_is_not_received_again(db: Database, handlers: Handlers) -> None:
    """A loop that cuts its history gets each event that is kept once in every life."""
    (claimed,) = handlers.start()
    emit(db, "e", 1)
    assert handlers.wait(claimed, "w", "e").value == "1"
    second = handlers.renew(claimed)
    assert handlers.wait(second, "w", "e").status == "open"
    emit(db, "e", 2)
    deliver(db)
    assert handlers.waits(second) == {"w": ("received", 2)}
    third = handlers.renew(second)
    assert handlers.wait(third, "w", "e").status == "open"
    handlers.park(third)
    assert deliver(db) == 0
    assert handlers.state(third) == "waiting"
    (other,) = handlers.start()
    assert handlers.wait(other, "w", "e").value == "1"  # it is not gone for others


def test_event_of_a_life_before_the_one_that_failed_is_not_received_again(db: Database, handlers: Handlers) -> None:
    """What a dead letter had received before it continued as new begins it anew once more."""
    (claimed,) = handlers.start()
    for n in (1, 2):
        emit(db, "e", n)
    handlers.wait(claimed, "w", "e")
    second = handlers.renew(claimed)
    assert handlers.wait(second, "w", "e").value == "2"
    error = '{"type": "x", "message": "y"}'
    db.flush(handlers.owner, Outcome(second.id, second.claim_no, "failed", None, error, keep=60.0))
    db.rows("select {s}.maintain()")
    db.run(db.calls.retry([claimed.id]))
    (again,) = db.claim(handlers.owner)
    assert handlers.wait(again, "w2", "e").status == "open"
    third = handlers.renew(again)
    assert handlers.wait(third, "w", "e").status == "open"


def test_message_of_a_former_life_that_a_deliverer_still_had_is_not_received_again(
    db: Database, handlers: Handlers
) -> None:
    """It could not be removed when it was received, and is there for the next life."""
    (claimed,) = handlers.start()
    db.run(db.calls.send(claimed.id, "c", "1"))
    deliverer = db.session()
    deliverer.rows("select id from {s}._private_events for update")  # as a deliverer that has just begun
    assert handlers.wait(claimed, "w", "c", kind="message").value == "1"
    second = handlers.renew(claimed)
    deliverer.commit()
    assert handlers.wait(second, "w", "c", kind="message").status == "open"
    deliver(db)
    assert handlers.waits(second) == {"w": (None, None)}
    assert inbox(db) == []


@pytest.mark.parametrize("first", ["delivery", "end of the life"])
def test_delivery_and_the_end_of_a_life_come_one_after_the_other(db: Database, handlers: Handlers, first: str) -> None:
    """The life ends while an event is delivered to it, and the next one gets that event too."""
    (claimed,) = handlers.start()
    handlers.wait(claimed, "w", "e")
    emit(db, "e", 1)
    one, other = db.session(), db.session(autocommit=True)
    outcome = Outcome(claimed.id, claimed.claim_no, "continued", '{"payload": {}, "version": null}')
    call = db.calls.continue_as_new(handlers.owner, [outcome])
    if first == "delivery":
        assert deliver(one) == 1
        work: Future[object] = db.start(lambda: other.run(call))
    else:
        assert one.run(call) == {}
        work = db.start(lambda: deliver(other))
    db.wait_blocked(other, work)
    one.commit()
    assert work.result(20) == ({} if first == "delivery" else 1)
    (again,) = db.claim(handlers.owner)
    wait = handlers.wait(again, "w", "e")
    assert wait.status == ("open" if first == "delivery" else "resolved")


@pytest.mark.parametrize("is_live", [True, False])
def test_fork_does_not_receive_what_its_history_has(db: Database, handlers: Handlers, *, is_live: bool) -> None:
    """It is told of a payment that the records it took along know of; or not of one that came after them."""
    (claimed,) = handlers.start()
    for n in range(4):
        emit(db, "e", n)
    handlers.wait(claimed, "w", "e")
    other = handlers.renew(claimed)
    for position, name in enumerate(("w1", "w2", "w3")):
        wait = {"name": name, "kind": "event", "position": position, "target": "e"}
        row = NewWait(other.id, other.claim_no, json.dumps(wait))
        assert db.run(db.calls.start_waits(handlers.owner, [row]))[0].value == str(position + 1)
    if not is_live:
        db.flush(handlers.owner, Outcome(other.id, other.claim_no, "completed", "1", keep=60.0))
    fork = db.run(db.calls.fork(other.id, "w3")).id
    (forked,) = db.claim(handlers.owner)
    assert forked.id == fork
    # 0 by a life before the one it was forked from, 1 and 2 by what it took along.
    assert [handlers.wait(forked, name, "e").value for name in ("x", "y")] == ["3", None]
    again = handlers.renew(forked)
    assert handlers.wait(again, "w", "e").status == "open"


def test_restart_receives_what_was_received_since_its_payload_was_made(db: Database, handlers: Handlers) -> None:
    """It gets what former lives have put into its payload; or not what its own life is to receive."""
    (claimed,) = handlers.start()
    for n in range(2):
        emit(db, "e", n)
    handlers.wait(claimed, "w", "e")
    other = handlers.renew(claimed)
    assert handlers.wait(other, "w", "e").value == "1"
    db.run(db.calls.restart(other.id))
    (begun,) = db.claim(handlers.owner)
    assert [handlers.wait(begun, name, "e").value for name in ("w", "x")] == ["1", None]


def receipts(db: Database) -> int:
    return int(db.value("select count(*) from {s}._private_receipts"))


def test_receipts_go_with_their_event(db: Database, handlers: Handlers, clock: DatabaseClock) -> None:
    """A loop that runs for years remembers every event there ever was."""
    (claimed,) = handlers.start()
    for n, retention in enumerate((100, 400_000)):
        emit(db, "e", n, retention=retention)
    deliver(db)
    for n in range(2):
        assert handlers.wait(claimed, f"w{n}", "e").value == str(n)
    second = handlers.renew(claimed)
    assert receipts(db) == 2
    clock.advance(101)
    db.rows("select {s}.maintain()")
    assert receipts(db) == 1
    for _ in range(3):  # looked at each day, and needed
        clock.advance(86_401)
        db.rows("select {s}.maintain()")
        assert receipts(db) == 1
    assert handlers.wait(second, "w", "e").status == "open"
    clock.advance(200_000)
    db.rows("select {s}.maintain()")
    assert (inbox(db), receipts(db)) == ([], 0)


@pytest.mark.parametrize(("keep", "passes"), [(0.0, 86_401), (200_000.0, 86_401 * 5)])
def test_receipts_go_with_their_execution(
    db: Database, handlers: Handlers, clock: DatabaseClock, keep: float, passes: int
) -> None:
    """Of an event that is kept for years every execution that ever received it leaves a row behind."""
    (claimed,) = handlers.start()
    emit(db, "e", 1, retention=1e8)
    deliver(db)
    handlers.wait(claimed, "w", "e")
    again = handlers.renew(claimed)
    db.flush(handlers.owner, Outcome(again.id, again.claim_no, "failed", None, "{}", keep=keep))
    clock.advance(86_401)
    db.rows("select {s}.maintain()")
    assert receipts(db) == (1 if keep else 0)  # while it is a dead letter, it may be retried
    for _ in range(2):
        clock.advance(passes)
        db.rows("select {s}.maintain()")
    assert receipts(db) == 0
    assert len(inbox(db)) == 1


def test_look_at_receipts_is_bounded_and_says_that_there_are_more(
    db: Database, handlers: Handlers, clock: DatabaseClock
) -> None:
    """One call of maintenance takes minutes, or it comes back after a minute for each thousand of a million."""
    db.rows(
        "insert into {s}._private_receipts select gen_random_uuid(), n, {s}._private_clock()"
        " from generate_series(1, 1500) n"
    )
    clock.advance(1)
    assert db.value("select more from {s}.maintain()") is True
    assert receipts(db) == 500
    assert db.value("select more from {s}.maintain()") is False
    assert receipts(db) == 0


# --- timeouts ---


def test_timeout_and_event_leave_one_outcome(db: Database, handlers: Handlers, clock: DatabaseClock) -> None:
    """A wait is told to have timed out and to have received, or neither."""
    early, late = handlers.start(2)
    for each in (early, late):
        handlers.wait(each, "w", "e", match={"to": str(each.id)}, due_in=10)
    handlers.park(early, late)
    emit(db, "e", {"to": str(early.id)})
    clock.advance(11)
    # It was there before the timeout was noticed, though nobody had delivered it.
    again = {c.id: c for c in db.claim(handlers.owner)}
    for each in (early, late):
        db.run(db.calls.load_history(handlers.owner, each.id, again[each.id].claim_no))
    assert handlers.waits(early) == {"w": ("received", {"to": str(early.id)})}
    assert handlers.waits(late) == {"w": ("timed_out", None)}
    emit(db, "e", {"to": str(late.id)})
    deliver(db)
    assert handlers.waits(late) == {"w": ("timed_out", None)}


def test_running_handler_reads_the_event_instead_of_the_timeout(
    db: Database, handlers: Handlers, clock: DatabaseClock
) -> None:
    """The same for one that has not been given up."""
    (claimed,) = handlers.start()
    handlers.wait(claimed, "w", "e", due_in=10)
    emit(db, "e", 1)
    clock.advance(11)
    told = db.run(db.calls.read_waits(handlers.owner, [(claimed.id, claimed.claim_no)]))
    assert [(w.name, w.outcome, w.value) for w in told] == [("w", "received", "1")]
    assert db.run(db.calls.read_waits(handlers.owner, [(claimed.id, claimed.claim_no)])) == []


# --- transactions that meet ---


def test_event_that_is_not_committed_when_the_wait_begins_reaches_it(db: Database, handlers: Handlers) -> None:
    """The wait does not see the event, the sender did not see the wait, and nobody tells anybody."""
    sender = db.session()
    emit(sender, "e", 1)
    (claimed,) = handlers.start()
    assert handlers.wait(claimed, "w", "e").status == "open"  # and does not wait for the sender
    handlers.park(claimed)
    assert deliver(db) == 0
    sender.commit()
    assert errands(db, handlers)
    assert deliver(db) == 1
    assert handlers.state(claimed) == "ready"


def test_sender_with_an_old_snapshot_reaches_a_wait_that_it_cannot_see(db: Database, handlers: Handlers) -> None:
    """REPEATABLE READ looks at the past."""
    sender = db.session()
    sender.conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    sender.rows("select count(*) from {s}._private_waits")
    (claimed,) = handlers.start()
    handlers.wait(claimed, "w", "e")
    handlers.park(claimed)
    emit(sender, "e", 1)
    sender.commit()
    deliver(db)
    assert handlers.waits(claimed) == {"w": ("received", 1)}


def test_event_of_a_transaction_that_was_rolled_back_never_was(db: Database, handlers: Handlers) -> None:
    """An execution goes on by what did not happen."""
    (claimed,) = handlers.start()
    handlers.wait(claimed, "w", "e")
    sender = db.session()
    emit(sender, "e", 1)
    sender.rollback()
    assert deliver(db) == 0
    assert handlers.waits(claimed) == {"w": (None, None)}


def test_delivery_waits_for_a_wait_that_begins_and_sees_it(db: Database, handlers: Handlers) -> None:
    """The wait looked before the event was there, the deliverer before the wait was: it is lost."""
    (claimed,) = handlers.start()
    beginner = db.session()
    handlers.wait(claimed, "w", "e", session=beginner)
    emit(db, "e", 1)
    deliverer = db.session(autocommit=True)
    work = db.start(lambda: deliver(deliverer))
    db.wait_blocked(deliverer, work)
    beginner.commit()
    assert work.result(20) == 1
    assert handlers.waits(claimed) == {"w": ("received", 1)}


def test_wait_that_begins_during_a_delivery_sees_the_event(db: Database, handlers: Handlers) -> None:
    """The same in the other order."""
    (claimed,) = handlers.start()
    emit(db, "e", 1)
    deliverer = db.session()
    assert deliver(deliverer) == 1
    beginner = db.session(autocommit=True)
    work = db.start(lambda: handlers.wait(claimed, "w", "e", session=beginner))
    db.wait_blocked(beginner, work)
    deliverer.commit()
    assert work.result(20).value == "1"


def test_wait_that_begins_during_a_delivery_that_fails_gets_the_event_too(db: Database, handlers: Handlers) -> None:
    """A deliverer dies with what it had in hand."""
    (claimed,) = handlers.start()
    emit(db, "e", 1)
    deliverer = db.session()
    deliver(deliverer)
    beginner = db.session(autocommit=True)
    work = db.start(lambda: handlers.wait(claimed, "w", "e", session=beginner))
    db.wait_blocked(beginner, work)
    db.wait_gone(deliverer)
    assert work.result(20).value == "1"
    assert errands(db, handlers)
    assert deliver(db) == 1


def test_deliverer_that_dies_in_the_middle_leaves_everything_as_it_was(db: Database, handlers: Handlers) -> None:
    """Half a delivery: woken without the event, or the event gone without a wake-up."""
    claimed = handlers.start(2)
    for each in claimed:
        handlers.wait(each, "w", "e")
    handlers.park(*claimed)
    emit(db, "e", 1)
    before = db.dump()
    deliverer = db.session()
    assert deliver(deliverer) == 1
    db.wait_gone(deliverer)
    assert db.dump() == before
    assert deliver(db) == 1
    assert [handlers.state(each) for each in claimed] == ["ready", "ready"]


def test_two_deliverers_at_once_deliver_everything_once(db: Database, handlers: Handlers) -> None:
    """One waits for the other without end, or both resolve the same wait."""
    claimed = handlers.start(4)
    for each in claimed:
        handlers.wait(each, "w", f"e{each.id}")
    handlers.park(*claimed)
    for each in claimed[:2]:
        emit(db, f"e{each.id}", 1)
    first = db.session()
    assert deliver(first) == 2
    for each in claimed[2:]:
        emit(db, f"e{each.id}", 2)
    assert deliver(db) == 2  # it passes over what the first has
    first.commit()
    assert [handlers.waits(each)["w"] for each in claimed] == [("received", n) for n in (1, 1, 2, 2)]
    assert not errands(db, handlers)


def test_two_deliverers_of_messages_to_one_execution_keep_their_order(db: Database, handlers: Handlers) -> None:
    """The second one's message comes first."""
    (claimed,) = handlers.start()
    db.run(db.calls.send(claimed.id, "c", "1"))
    first, second = db.session(), db.session(autocommit=True)
    first.rows("select id from {s}._private_events for update")  # as a deliverer that has just begun
    db.run(db.calls.send(claimed.id, "c", "2"))
    handlers.wait(claimed, "w", "c", kind="message")
    assert handlers.waits(claimed) == {"w": ("received", 1)}
    assert deliver(second) == 1
    assert handlers.waits(claimed) == {"w": ("received", 1)}
    first.commit()
    assert deliver(db) == 1
    assert handlers.wait(claimed, "w2", "c", kind="message").value == "2"
    assert inbox(db) == []


@pytest.mark.parametrize("ends", ["commit", "rollback"])
def test_promise_that_two_resolve_at_once_has_one_answer(db: Database, handlers: Handlers, ends: str) -> None:
    """Both are told that theirs counts, or neither's does."""
    (claimed,) = handlers.start()
    promise = handlers.promise(claimed)
    first, second = db.session(), db.session(autocommit=True)
    assert first.run(db.calls.resolve_promise(promise, '"first"')) is PromiseAnswer.RESOLVED
    work: Future[PromiseAnswer] = db.start(lambda: second.run(db.calls.resolve_promise(promise, '"second"')))
    db.wait_blocked(second, work)
    getattr(first, ends)()
    assert work.result(20) is (PromiseAnswer.ALREADY if ends == "commit" else PromiseAnswer.RESOLVED)
    deliver(db)
    expected = "first" if ends == "commit" else "second"
    assert handlers.wait(claimed, "r", str(promise), kind="promise").value == f'"{expected}"'


def test_open_transactions_of_senders_keep_nobody_waiting(db: Database, handlers: Handlers) -> None:
    """An execution cannot end because somebody is about to send to it."""
    (claimed,) = handlers.start()
    promise = handlers.promise(claimed)
    sender = db.session()
    sender.run(db.calls.send(claimed.id, "c", "1"))
    sender.run(db.calls.resolve_promise(promise, "1"))
    emit(sender, "e", 1)
    db.rows("set lock_timeout = '5s'")
    handlers.wait(claimed, "w", "e")
    assert db.flush(handlers.owner, Outcome(claimed.id, claimed.claim_no, "completed", "1")) == {}
    sender.commit()
    deliver(db)
    assert [kind for kind, _, _ in inbox(db)] == ["event"]


def test_execution_that_somebody_has_locked_delays_only_itself(db: Database, handlers: Handlers) -> None:
    """One open transaction stops all deliveries."""
    first, second = handlers.start(2)
    for each in (first, second):
        handlers.wait(each, "w", "e")
    handlers.park(first, second)
    rival = db.session()
    rival.rows("select from {s}._private_queue_1 where id = %s for update", first.id)
    emit(db, "e", 1)
    delivery = db.run(db.calls.deliver_events())
    assert (delivery.delivered, delivery.is_left) == (0, True)
    assert (handlers.state(first), handlers.state(second)) == ("waiting", "ready")
    assert errands(db, handlers)
    rival.commit()
    assert deliver(db) == 1
    assert handlers.state(first) == "ready"
    assert handlers.waits(second) == {"w": ("received", 1)}


def test_flush_that_parks_and_delivery_meet_in_either_order(db: Database, handlers: Handlers) -> None:
    """Parked after its event was delivered, the execution sleeps for ever."""
    first, second = handlers.start(2)
    for each in (first, second):
        handlers.wait(each, "w", "e")
    emit(db, "e", 1)
    parker = db.session()
    assert parker.flush(handlers.owner, Outcome(first.id, first.claim_no, "waiting")) == {}
    deliverer = db.session(autocommit=True)
    work = db.start(lambda: deliver(deliverer))
    db.wait_blocked(deliverer, work)
    parker.commit()
    assert work.result(20) == 1
    assert handlers.state(first) == "ready"
    handlers.park(second)
    assert handlers.state(second) == "ready"  # it was resolved while it ran


# --- what handlers send ---


def test_effect_is_done_once_however_often_it_is_asked_for(db: Database, handlers: Handlers) -> None:
    """A lost reply sends an event twice."""
    sender, receiver = handlers.start(2)
    ask: Sequence[dict[str, object]] = [
        {"kind": "emit", "event": "e", "payload": 1, "retention": 100},
        {"kind": "send", "to": str(receiver.id), "channel": "c", "payload": 2},
        {"kind": "new_promise"},
    ]
    for n, effect in enumerate(ask):
        saved = handlers.effect(sender, f"s{n}", n, **effect)
        stored = handlers.effect(sender, f"s{n}", n, **effect)
        assert (saved.status, stored.status, stored.value) == ("saved", "stored", saved.value)
    assert [(kind, payload) for kind, payload, _ in inbox(db)] == [("event", 1), ("message", 2)]
    assert db.value("select count(*) from {s}._private_promises") == 1


def test_effect_of_a_revoked_claim_is_not_done(db: Database, handlers: Handlers) -> None:
    """A zombie sends events."""
    (claimed,) = handlers.start()
    db.flush(handlers.owner, Outcome(claimed.id, claimed.claim_no, "released"))
    (again,) = db.claim(handlers.owner)
    for kind in ("emit", "send", "new_promise"):
        saved = handlers.effect(claimed, kind, kind=kind, event="e", retention=1, to=str(again.id), channel="c")
        assert saved.status == "fenced"
    assert inbox(db) == []
    assert db.run(db.calls.load_history(handlers.owner, again.id, again.claim_no)) == []


def test_message_of_a_handler_to_nobody_is_recorded_as_such(db: Database, handlers: Handlers) -> None:
    """A message to an execution that has ended stays for ever."""
    (claimed,) = handlers.start()
    assert handlers.effect(claimed, "s", kind="send", to=str(uuid4()), channel="c", payload=1).value == "false"
    assert inbox(db) == []


# --- progress ---


def test_progress_is_the_latest_and_outlives_the_execution(db: Database, handlers: Handlers) -> None:
    """An older value wins, a zombie writes, or it is gone with the end."""
    (claimed,) = handlers.start()
    told = [NewProgress(claimed.id, claimed.claim_no, text) for text in ("1", "2", '{"done": 3}')]
    assert db.run(db.calls.set_progress(handlers.owner, told)) == frozenset()
    assert db.run(db.calls.progress([claimed.id])) == {claimed.id: '{"done": 3}'}
    zombie = NewProgress(claimed.id, claimed.claim_no + 1, "9")
    assert db.run(db.calls.set_progress(handlers.owner, [zombie])) == {0}
    db.flush(handlers.owner, Outcome(claimed.id, claimed.claim_no, "completed", "1"))
    assert db.run(db.calls.progress([claimed.id, uuid4()])) == {claimed.id: '{"done": 3}'}


# --- from SQL ---


def test_sql_alone_sends_and_resolves(db: Database, handlers: Handlers) -> None:
    """A producer that is not Python cannot take part."""
    (claimed,) = handlers.start()
    promise = handlers.promise(claimed)
    assert isinstance(db.value("select {s}.emit('e')"), int)
    db.rows("select {s}.emit(name => 'e', payload => '{\"n\": 1}', retention => '2 hours')")
    assert db.value("select {s}.send(%s, 'c', '1')", claimed.id) is True
    assert db.value("select {s}.resolve_promise(%s)", promise) == "resolved"
    assert db.value("select {s}.reject_promise(%s, 'late')", promise) == "already"
    assert [payload for _, payload, _ in inbox(db)] == [None, {"n": 1}, 1, None]
    for wrong in ("('')", "('x', retention => '-1 s')", "('x', retention => null)", "(repeat('x', 129))", "(null)"):
        with pytest.raises(psycopg.Error) as caught:
            db.rows(f"select {{s}}.emit{wrong}")
        assert caught.value.sqlstate == "PC001"


def test_event_is_durable_where_the_session_is_not(db: Database) -> None:
    """What was acknowledged is lost in a crash of the server."""
    session = db.session()
    session.rows("set synchronous_commit = off")
    emit(session)
    assert session.value("show synchronous_commit") == "on"
    session.rollback()


def test_sender_notifies_only_if_somebody_waits(db: Database, handlers: Handlers) -> None:
    """Every event of a busy system goes through the lock of all commits that notify."""
    (claimed,) = handlers.start()
    listener = db.session(autocommit=True)
    listener.rows(f'listen "{db.run(db.calls.errands_channel())}"')
    emit(db, "e")
    assert list(listener.conn.notifies(timeout=0.05, stop_after=1)) == []
    deliver(db)
    handlers.wait(claimed, "w", "e2")
    emit(db, "e2")
    assert len(list(listener.conn.notifies(timeout=5, stop_after=1))) == 1
