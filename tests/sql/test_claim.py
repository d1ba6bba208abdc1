"""claim: what it takes and in which order, whom it refuses, what an empty one tells, how it fares beside rivals."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from hashlib import md5
from typing import cast
from uuid import UUID, uuid4

import pytest
from sql.database import Database, done

from pgconductor.db.calls import NewExecution
from pgconductor.errors import LeaseLost, Misuse
from pgconductor.model import Claimed
from pgconductor.testing import DatabaseClock


@pytest.fixture
def owner(db: Database) -> UUID:
    """An orchestrator with a worker on the registered queue "q"."""
    db.register_queue()
    return db.register_orchestrator()


# --- order ---


@pytest.mark.parametrize("where", ["own", "overflow", "both"])
def test_higher_priority_comes_first_then_the_earlier_due_then_the_smaller_id(db: Database, where: str) -> None:
    """Urgent work waits behind the rest, or one queue has two orders."""
    if where == "own":
        db.register_queue()
    choose = random.Random(7)
    expected: list[tuple[int, float, UUID]] = []
    for n in range(40):
        if n == 20 and where == "both":
            db.register_queue()
        priority, delay = choose.choice([-5, 0, 5]), choose.choice([-30.0, -20.0, -10.0])
        expected.append((-priority, delay, db.invoke(priority=priority)))
        db.rows(
            "update {s}._private_executions set run_at = to_timestamp(1e9 + %s) where id = %s", delay, expected[-1][2]
        )
    db.register_queue()
    owner = db.register_orchestrator()
    assert db.value("select count(distinct queue_no) from {s}._private_executions") == (2 if where == "both" else 1)
    claimed = [c.id for limit in (1, 7, 100) for c in db.claim(owner, limit=limit)]
    assert claimed == [id_ for *_, id_ in sorted(expected)]


def test_claim_takes_no_more_than_asked_for(db: Database, owner: UUID) -> None:
    """A worker gets more than it has room for. What the overflow partition has beyond the limit stays as well."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 5)
    db.rows(
        "with moved as (delete from {s}._private_queue_1 returning *) insert into {s}._private_queue_0"
        " select (jsonb_populate_record(null::{s}._private_queue_0, to_jsonb(m) || '{\"queue_no\": 0}')).* from moved m"
    )
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 5)
    assert db.claim(owner, limit=0) == []
    assert [len(db.claim(owner, limit=n)) for n in (1, 3, 4, 100)] == [1, 3, 4, 2]


def test_claim_takes_only_tasks_the_worker_has(db: Database, owner: UUID) -> None:
    """In a rolling deployment the old program takes the new program's work and fails it."""
    for task in ("a", "b", "c"):
        db.invoke(task=task, priority=ord(task))
    assert [c.task for c in db.claim(owner, tasks=["a", "b"])] == ["b", "a"]
    assert db.look(owner, tasks=["a", "b"]) == ([], None)
    assert db.claim(owner, tasks=[]) == []
    assert [c.task for c in db.claim(owner, tasks=["c", "c"])] == ["c"]


def test_claim_leaves_other_queues_alone(db: Database, owner: UUID) -> None:
    """Another queue's rows in the overflow partition are taken with ours."""
    db.invoke("other")
    assert db.look(owner) == ([], None)
    mine = db.invoke()
    assert [c.id for c in db.claim(owner)] == [mine]


# --- due times ---


def test_due_ones_are_claimed_with_those_that_were_ready(db: Database, owner: UUID, clock: DatabaseClock) -> None:
    """A delayed execution loses its priority, or is never claimed. Also in the overflow partition."""
    db.invoke("late", delay=60, priority=3)
    db.register_queue("late")
    for priority, delay in ((1, None), (9, 60.0), (5, None), (9, 3600.0)):
        db.invoke("late", priority=priority, delay=delay)
    assert len(db.claim(owner, "late", limit=1)) == 1
    clock.advance(61)
    priorities = [db.live_row(c.id, "priority")[0] for c in db.claim(owner, "late")]
    assert priorities == [9, 3, 1]


def test_many_due_at_once_are_promoted_in_batches_and_all_claimed(
    db: Database, owner: UUID, clock: DatabaseClock
) -> None:
    """A wave of delayed executions is promoted by one endless statement, or its rest is forgotten."""
    db.invoke_many(*[NewExecution("t", "{}", "q", 0, None, 60.0)] * 2500)
    clock.advance(61)
    assert len(db.claim(owner, limit=10)) == 10
    assert db.value("select count(*) from {s}._private_executions where state = 'scheduled'") == 1500
    sizes = [len(db.claim(owner, limit=1000)) for _ in range(3)]
    assert sum(sizes) == 2490


def test_empty_claim_tells_when_the_next_one_is_due(db: Database, owner: UUID, clock: DatabaseClock) -> None:
    """A worker polls for a delayed execution, or sleeps past it. None: there is none."""
    assert db.look(owner) == ([], None)
    db.invoke(delay=100)
    db.invoke(delay=50)
    db.invoke("other", delay=5)
    due_in = db.look(owner).due_in
    assert due_in is not None
    assert 20 < due_in <= 50
    clock.advance(49.9)
    later = db.look(owner).due_in
    if later is not None:  # else the machine was slow, and it was claimed
        assert 0 <= later <= 0.1
    clock.advance(60)
    assert len(db.claim(owner)) >= 1


def test_next_due_time_counts_the_overflow_and_the_waiting(db: Database, clock: DatabaseClock) -> None:
    """The timeout of a waiting execution, or one produced before the queue was known, starts late."""
    early = db.invoke(delay=30)
    db.register_queue()
    owner = db.register_orchestrator()
    late = db.invoke(delay=60)
    assert 0 < (db.look(owner).due_in or -1) <= 30
    db.rows("update {s}._private_executions set run_at = run_at + interval '1 h' where id = %s", early)
    assert 30 < (db.look(owner).due_in or -1) <= 60
    db.rows("update {s}._private_executions set state = 'waiting' where id = %s", late)
    assert 30 < (db.look(owner).due_in or -1) <= 60
    db.rows("update {s}._private_executions set run_at = null where id = %s", late)
    assert 3600 < (db.look(owner).due_in or -1) <= 3630


def test_due_one_of_a_task_the_worker_has_not_is_no_reason_to_look_again(
    db: Database, owner: UUID, clock: DatabaseClock
) -> None:
    """A worker spins while nobody has the task of a due execution."""
    db.invoke(task="unknown", delay=5)
    clock.advance(10)
    db.look(owner)
    assert db.look(owner) == ([], None)


def test_claim_tells_how_long_it_was_due(db: Database, owner: UUID, clock: DatabaseClock) -> None:
    """The pick-up latency is measured from the insert, or by another clock."""
    db.invoke(delay=60)
    clock.advance(70)
    (claimed,) = db.claim(owner)
    assert 9.9 < claimed.waited < 40


def test_clock_stepped_back_hides_no_ready_work(db: Database, owner: UUID, clock: DatabaseClock) -> None:
    """After a correction of the server's clock, what was ready waits for the time to come again."""
    ids = [db.invoke()]
    clock.advance(-600)
    ids.append(db.invoke())
    assert sorted(c.id for c in db.claim(owner)) == sorted(ids)


# --- who may claim ---


def test_only_a_living_registered_orchestrator_may_claim(db: Database, owner: UUID, clock: DatabaseClock) -> None:
    """A claim by somebody whom no recovery will ever find dead, or who was declared dead already."""
    db.invoke()
    with pytest.raises(LeaseLost):
        db.claim(uuid4())
    expired = db.register_orchestrator(lease=10)
    clock.advance(11)
    with pytest.raises(LeaseLost):
        db.claim(expired)
    db.recover()
    with pytest.raises(LeaseLost):
        db.claim(expired)
    restarted = db.register_orchestrator()
    db.rows("update {s}._private_orchestrators set server_epoch = 'before' where id = %s", restarted)
    with pytest.raises(LeaseLost):
        db.claim(restarted)
    assert len(db.claim(owner)) == 1


def test_queue_must_be_registered(db: Database, owner: UUID) -> None:
    """A misspelt queue is empty for ever instead of an error."""
    with pytest.raises(Misuse, match="queue 'qq' is not registered"):
        db.claim(owner, "qq")


# --- beside rivals ---


def test_claimers_skip_what_a_rival_has_locked(db: Database, owner: UUID) -> None:
    """Claimers of one queue wait for each other, or claim the same row."""
    ids = [db.invoke(priority=-n) for n in range(6)]
    rival, third = db.session(), db.session()
    assert [c.id for c in rival.claim(owner, limit=2)] == ids[:2]
    assert [c.id for c in third.claim(owner, limit=2)] == ids[2:4]
    assert [c.id for c in db.claim(owner, limit=2)] == ids[4:]
    assert db.look(owner) == ([], 0.01)
    rival.rollback()
    assert [(c.id, c.claim_no) for c in db.claim(owner)] == [(ids[0], 1), (ids[1], 1)]


def test_an_empty_claim_says_come_again_while_a_rival_hides_a_row(db: Database, owner: UUID) -> None:
    """The rival may have begun after the worker's look at K, and die without a word: the worker must not sleep on it.

    Found by 100,000 random wake-ups (tests/runtime/test_wakeup_random.py): the row waited for the sweep.
    """
    (execution,) = (db.invoke(),)
    other = db.invoke(task="of others")
    assert [c.id for c in db.claim(owner, tasks=["of others"])] == [other]
    rival = db.session()
    assert rival.claim(owner)
    assert db.look(owner) == ([], 0.01)
    assert db.look(owner, tasks=["unknown"]) == ([], None), "what it could not run anyway does not keep a worker awake"
    rival.rollback()
    assert [c.id for c in db.claim(owner)] == [execution]
    assert db.look(owner) == ([], None)


def test_promotion_skips_what_a_rival_promotes(db: Database, owner: UUID, clock: DatabaseClock) -> None:
    """Claimers queue up behind one another whenever something falls due."""
    ids = [db.invoke(delay=n) for n in (10, 20)]
    clock.advance(30)
    rival = db.session()
    rival.rows("select from {s}._private_executions where id = %s for update", ids[0])
    assert [c.id for c in db.claim(owner)] == [ids[1]]
    rival.rollback()
    assert [c.id for c in db.claim(owner)] == [ids[0]]


def test_work_is_claimable_the_moment_its_producer_commits(db: Database, owner: UUID) -> None:
    """Uncommitted work claimed, or an older id skipped because a younger one committed first."""
    first, second = db.session(), db.session()
    older, younger = first.invoke(), second.invoke()
    assert older < younger
    assert db.claim(owner) == []
    second.commit()
    assert [c.id for c in db.claim(owner)] == [younger]
    first.commit()
    assert [c.id for c in db.claim(owner)] == [older]


def test_claim_commits_asynchronously_and_flush_does_not(db: Database, owner: UUID) -> None:
    """Claims wait for the disk for nothing, or a result is acknowledged before it is safe."""
    db.invoke()
    session = db.session()
    assert session.value("show synchronous_commit") == "on"
    (claimed,) = session.claim(owner)
    assert session.value("show synchronous_commit") == "off"
    session.commit()
    assert session.value("show synchronous_commit") == "on"
    session.flush(owner, done(claimed))
    assert session.value("show synchronous_commit") == "on"
    session.commit()
    session.invoke()
    assert session.value("show synchronous_commit") == "on"


def test_payload_arrives_as_text_that_nobody_has_read(db: Database, owner: UUID) -> None:
    """JSON that Python cannot read (too deep, too many digits) breaks the claim, and with it the queue."""
    deep = '{"a": ' + "[" * 1500 + "]" * 1500 + "}"
    digits = f'{{"a": {"9" * 5000}}}'
    for text in (deep, digits):
        db.rows("select {s}.invoke('t', %s::jsonb, 'q')", text)
    payloads = [c.payload or db.run(db.calls.load_payload(c.id, c.claim_no, owner)) for c in db.claim(owner)]
    assert [p is not None and p.replace(" ", "") for p in payloads] == [t.replace(" ", "") for t in (deep, digits)]


# --- where a claim begins to look ---


def index_entries_read(db: Database) -> int:
    """Of the index that claims use: those of rows that are no more count too."""
    db.rows("select pg_stat_force_next_flush()")
    look = db.session(autocommit=True)
    return int(
        look.value(
            "select idx_tup_read from pg_stat_user_indexes i join pg_index x using (indexrelid)"
            " where i.relname = '_private_queue_1' and pg_get_indexdef(i.indexrelid) like"
            " '%%(priority DESC, run_at, id) WHERE (state = ''ready''%%' and i.schemaname = %s",
            db.calls.schema,
        )
    )


def mark(
    db: Database, last: Claimed, *, look_at: timedelta, rest_until: timedelta | None = None, task: str = "t"
) -> None:
    """Let the session have noted that `last` is what it claimed last, when a look from the front took long."""
    (run_at,) = db.live_row(last.id, "to_jsonb(run_at)")
    noted = {
        "who": md5(f"{{{task}}}".encode()).hexdigest(), "look_at": str(datetime.now(UTC) + look_at),
        "rest_until": None if rest_until is None else str(datetime.now(UTC) + rest_until), "priority": 0,
        "run_at": run_at, "id": str(last.id),
    }  # fmt: skip
    db.rows("select set_config(%s, %s, false)", mark_name(db), json.dumps(noted))


def mark_name(db: Database) -> str:
    return f"pgconductor_claims.c{md5(db.calls.schema.encode()).hexdigest()[:12]}_1"


LATER, EARLIER = timedelta(seconds=50), timedelta(days=-1)  # a minute is the most


def test_claims_do_not_step_over_all_that_was_claimed_before(db: Database, owner: UUID) -> None:
    """With one long transaction anywhere in the database, each claim reads the entries of all rows since its begin."""
    old = db.session()
    old.rows("set transaction isolation level repeatable read")
    old.rows("select 1")
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 500)
    for _ in range(40):
        db.flush(owner, *map(done, claimed := db.claim(owner, limit=10)))
    claimed = db.claim(owner, limit=10)
    mark(db, claimed[-1], look_at=LATER)  # however slow or fast this machine is
    for _ in range(2):
        before = index_entries_read(db)
        claimed = db.claim(owner, limit=10)
        assert len(claimed) == 10
        assert 10 <= index_entries_read(db) - before <= 40
    assert str(claimed[-1].id) in db.value("select current_setting(%s)", mark_name(db))
    mark(db, claimed[-1], look_at=EARLIER)
    before = index_entries_read(db)
    assert len(db.claim(owner, limit=10)) == 10
    assert index_entries_read(db) - before > 400  # or this test could not fail


def test_only_a_long_look_from_the_front_is_noted(db: Database, owner: UUID) -> None:
    """A claim that goes on behind the last row for no reason takes late what belongs before it."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 5)
    db.claim(owner, limit=1)
    assert not db.value("select current_setting(%s, true)", mark_name(db))
    db.take_looks_for("long")
    try:
        (claimed,) = db.claim(owner, limit=1)
    finally:
        db.take_looks_for("short")
    noted = json.loads(db.value("select current_setting(%s)", mark_name(db)))
    assert noted["id"] == str(claimed.id)
    assert noted["rest_until"] is not None
    assert len(db.claim(owner, limit=2)) == 2


def test_what_lies_before_the_last_claimed_row_is_found(db: Database, owner: UUID) -> None:
    """What a transaction that began early commits late, or a retry brings back, would never be claimed."""
    late = db.session()
    early = late.invoke()
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 5)
    (first,) = db.claim(owner, limit=1)
    mark(db, first, look_at=LATER)
    late.commit()
    db.flush(owner, done(first, "released"))
    claimed = [c.id for _ in range(6) for c in db.claim(owner, limit=1)]
    assert len(claimed) == 6
    assert set(claimed[-2:]) == {early, first.id}  # when nothing else was left
    assert db.look(owner) == ([], None)


def test_claim_of_as_many_as_there_are_gets_them_all(db: Database, owner: UUID) -> None:
    """A worker with room would take a few and go to sleep beside the rest."""
    late = db.session()
    early = late.invoke()
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 5)
    (last,) = db.claim(owner, limit=1)
    mark(db, last, look_at=LATER)
    late.commit()
    assert early in [c.id for c in db.claim(owner, limit=100)]
    assert db.look(owner) == ([], None)


def test_higher_priority_is_claimed_wherever_the_last_claim_was(db: Database, owner: UUID) -> None:
    """Urgent work waits until somebody looks from the front again."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 5)
    (last,) = db.claim(owner, limit=1)
    mark(db, last, look_at=LATER, rest_until=LATER)
    urgent = db.invoke(priority=1)
    assert [c.id for c in db.claim(owner, limit=1)] == [urgent]


def test_where_looks_are_long_nobody_is_told_that_there_is_nothing_without_one(db: Database, owner: UUID) -> None:
    """A worker sleeps beside rows that nobody has looked for."""
    late = db.session()
    early = late.invoke()
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 2)
    _, last = db.claim(owner, limit=2)
    mark(db, last, look_at=LATER, rest_until=LATER)
    late.commit()
    new = db.invoke()
    (last,) = db.claim(owner, limit=9)
    assert last.id == new
    claimed, due_in = db.look(owner)
    assert claimed == []
    assert due_in is not None  # when to come again
    assert due_in > 1
    mark(db, last, look_at=LATER, rest_until=EARLIER)
    assert [c.id for c in db.claim(owner, limit=9)] == [early]


def test_mark_of_one_set_of_tasks_says_nothing_of_another(db: Database, owner: UUID) -> None:
    """Behind a pooler sessions are shared: rows that the one could not take are not behind the other."""
    db.invoke_many(*[NewExecution("a", "{}", "q"), NewExecution("b", "{}", "q")] * 2)
    _, last = db.claim(owner, tasks=["b"], limit=2)
    mark(db, last, look_at=LATER, rest_until=LATER, task="b")
    assert len(db.claim(owner, tasks=["a"], limit=2)) == 2


def test_what_others_note_in_a_shared_session_holds_up_nothing_for_long(db: Database, owner: UUID) -> None:
    """Behind a pooler another program of the same role could tell a worker that there is nothing, for years."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 3)
    (last,) = db.claim(owner, limit=1)
    mark(db, last, look_at=timedelta(days=9), rest_until=timedelta(days=9))
    db.rows("update {s}._private_executions set priority = -1 where state = 'ready'")  # behind no mark of priority 0
    assert len(db.claim(owner, limit=9)) == 2


def test_where_looks_are_long_a_due_time_before_the_next_look_is_told(db: Database, owner: UUID) -> None:
    """What was delayed by some seconds would start when the next look from the front is due, up to a minute later."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 2)
    _, last = db.claim(owner, limit=2)
    db.invoke(delay=5.0)
    mark(db, last, look_at=LATER, rest_until=LATER)
    claimed, due_in = db.look(owner)
    assert claimed == []
    assert due_in is not None
    assert 0 < due_in <= 5


# --- the place that workers share ---


def place_key(db: Database, *, task: str = "t") -> int:
    who = md5(f"{{{task}}}".encode()).hexdigest()
    return int(db.value("select hashtextextended(%s || 0, 1)", who))


def share_place(db: Database, last: Claimed, *, task: str = "t") -> None:
    """Let another worker of these tasks have told that it has come as far as `last`."""
    (run_at,) = db.live_row(last.id, "run_at")
    db.rows("select {s}._private_note_place(%s, %s, %s)", place_key(db, task=task), run_at, last.id)


def share_look(db: Database, look_at: timedelta) -> None:
    """Let another worker have told when somebody is to look from the front again."""
    db.rows("select {s}._private_note_look(%s, %s)", place_key(db), datetime.now(UTC) + look_at)


def shared_look_at(db: Database, like: Claimed) -> datetime:
    return cast(datetime, db.value("select look_at from {s}._private_read_place(%s, %s)", place_key(db), like.id))


def claim_in_order(db: Database, owner: UUID, count: int) -> list[Claimed]:
    """Of `count` ready executions, all that a claim would bring, in its order: each as if it were claimed last."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * count)
    claimed = db.claim(owner, limit=count)
    db.flush(owner, *[done(c, "released") for c in claimed])
    return claimed


def test_workers_do_not_step_over_what_others_have_claimed_meanwhile(db: Database, owner: UUID) -> None:
    """Of ten, each reads ten times as many rows as it claims, half of them not committed yet."""
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 500)
    (last,) = db.claim(owner, limit=1)
    mark(db, last, look_at=LATER)
    other = db.session()
    name, noted = mark_name(db), db.value("select current_setting(%s)", mark_name(db))
    other.rows("select set_config(%s, %s, false)", name, noted)
    assert len(other.claim(owner, limit=400)) == 400  # and does not commit
    before = index_entries_read(db)
    assert len(db.claim(owner, limit=10)) == 10
    assert index_entries_read(db) - before <= 40
    other.rollback()
    assert len(db.claim(owner, limit=500)) == 489  # a place that was told too early loses nothing


def test_only_one_looks_from_the_front_at_a_time(db: Database, owner: UUID) -> None:
    """All look when they hear that it is time, each past all that has been claimed."""
    first, *others = claim_in_order(db, owner, 30)
    mark(db, others[8], look_at=EARLIER)
    share_place(db, others[8])
    share_look(db, LATER)
    assert [c.id for c in db.claim(owner, limit=5)] == [c.id for c in others[9:14]]
    mark(db, others[13], look_at=EARLIER)
    share_look(db, EARLIER)
    began = datetime.now(UTC)
    assert db.claim(owner, limit=1)[0].id == first.id
    assert shared_look_at(db, first) > began  # the others need not


def test_what_lies_before_the_place_of_others_is_claimed_in_its_order(db: Database, owner: UUID) -> None:
    """Each look from the front brings one claim of what is early, and the next goes on behind the others' place."""
    order = claim_in_order(db, owner, 60)
    mark(db, order[40], look_at=EARLIER)
    share_place(db, order[40])
    share_look(db, EARLIER)
    db.take_looks_for("long")
    try:
        for begin in (0, 10, 20):
            assert [c.id for c in db.claim(owner, limit=10)] == [c.id for c in order[begin : begin + 10]]
    finally:
        db.take_looks_for("short")


def test_place_of_other_tasks_is_not_ours(db: Database, owner: UUID) -> None:
    """Two kinds of workers that meet in one place lead each other astray."""
    order = claim_in_order(db, owner, 30)
    mark(db, order[9], look_at=LATER)
    share_place(db, order[19])
    stray = place_key(db) ^ 16  # as others whose key is kept in the same place
    db.rows("select setval({s}._private_place(%s, 'key'), %s)", stray, stray)
    assert [c.id for c in db.claim(owner, limit=5)] == [c.id for c in order[10:15]]


@pytest.mark.parametrize("at", [0, 15, 29])
def test_no_place_hides_anything(db: Database, owner: UUID, at: int) -> None:
    """Executions are never claimed, since somebody once told a place behind them."""
    order = claim_in_order(db, owner, 30)
    mark(db, order[0], look_at=LATER)
    share_place(db, order[at])
    share_look(db, LATER)
    claimed: list[Claimed] = []
    while got := db.claim(owner, limit=7):
        claimed += got
    assert {c.id for c in claimed} == {c.id for c in order}
    assert db.look(owner) == ([], None)


def test_place_is_a_little_before_the_row_that_it_is_told_for(db: Database, owner: UUID) -> None:
    """A place behind its row leaves out what is between."""
    for claimed in claim_in_order(db, owner, 50):
        share_place(db, claimed)
        ((run_at, place),) = db.rows(
            "select run_at, id from {s}._private_read_place(%s, %s)", place_key(db), claimed.id
        )
        assert run_at == db.live_row(claimed.id, "run_at")[0]
        assert place <= claimed.id
        assert place.bytes[:10] == claimed.id.bytes[:10]
        assert place.bytes[10] == claimed.id.bytes[10]


@pytest.mark.parametrize("run_at", ["-infinity", "0044-03-15 BC", "1969-12-31", "9999-01-01"])
def test_run_at_that_no_place_can_hold_is_told_to_nobody(db: Database, owner: UUID, run_at: str) -> None:
    """An execution with an absurd time stops its queue."""
    (claimed,) = claim_in_order(db, owner, 1)
    db.rows("select {s}._private_note_place(%s, %s::timestamptz, %s)", place_key(db), run_at, claimed.id)
    assert db.value("select run_at from {s}._private_read_place(%s, %s)", place_key(db), claimed.id) is None
