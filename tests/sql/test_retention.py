"""Slots of expiry and maintenance: nothing goes early, everything goes, and nobody is disturbed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event
from time import monotonic
from uuid import UUID

import psycopg
from sql.database import Database, Session, done

from pgconductor.db.calls import NewExecution
from pgconductor.model import Claimed, Maintenance, Outcome
from pgconductor.testing import DatabaseClock

HOUR = 3600.0
DAY = 24 * HOUR
YEAR = 365 * DAY
LONGEST = 106 * DAY  # up to here a slot's bound is a matter of the row's own keep


def late(keep: float) -> float:
    """By how much a row kept for `keep` seconds may be removed late, if maintenance runs."""
    return HOUR if keep <= 5 * HOUR else 0.4 * keep


def maintain(session: Session) -> Maintenance:
    return session.run(session.calls.maintain())


def running(
    db: Database, n: int, *, owner: UUID | None = None, payload: str = "{}", key: str | None = None
) -> list[Claimed]:
    """Executions that are claimed by `owner`."""
    db.register_queue()
    holder = owner or db.register_orchestrator(lease=1000 * YEAR)
    db.invoke_many(*[NewExecution("t", payload, "q", dedupe_key=key) for _ in range(n)])
    claimed = db.claim(holder, limit=n)
    assert len(claimed) == n
    return claimed


def owner_of(db: Database, claimed: Claimed) -> UUID:
    owner: UUID = db.value("select owner from {s}._private_executions where id = %s", claimed.id)
    return owner


def finish(db: Database, *keeps: float | None, kind: str = "completed") -> list[UUID]:
    """Executions that have just finished, each kept for so many seconds."""
    claimed = running(db, len(keeps))
    ended = [done(c, kind, keep=keep) for c, keep in zip(claimed, keeps, strict=True)]
    assert db.flush(owner_of(db, claimed[0]), *ended) == {}
    return [c.id for c in claimed]


def ids(session: Session) -> set[UUID]:
    return {i for (i,) in session.rows("select id from {s}._private_finished")}


def slot_of(session: Session, execution: UUID) -> tuple[int, datetime | None]:
    """The slot that a finished row is in, and its bound; None: infinity."""
    no, bound = session.rows(
        "select no, case when isfinite(expires_upto) then expires_upto end from {s}._private_expiry_slots"
        " where no = (select slot from {s}._private_finished where id = %s)",
        execution,
    )[0]
    return no, bound


def bound_of(session: Session, no: int) -> datetime | None:
    bound: datetime | None = session.value(
        "select case when isfinite(expires_upto) then expires_upto end from {s}._private_expiry_slots where no = %s", no
    )
    return bound


# --- the bounds ---


def test_wanted_bounds_are_as_many_as_there_is_room_for_and_stay_wanted(db: Database) -> None:
    """A bound that is not wanted any more while rows are behind it; or no slot for one that is."""
    rng = random.Random(1)
    for _ in range(50):
        start = datetime(2001, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.random() * 3e9)
        later = start + timedelta(seconds=10 ** rng.uniform(0, 7))
        assert db.rows(
            "with a as (select {s}._private_wanted_bounds(%s) b), z as (select {s}._private_wanted_bounds(%s) b)"
            " select count(*), count(distinct b), bool_and(b > %s),"
            " bool_and(b <= %s or b in (select b from z)) from a",
            start,
            later,
            start,
            later,
        ) == [(33, 33, True, True)]
    assert db.value("select count(*) from {s}._private_expiry_slots where not is_far and no > 0") >= 33 + 4


def test_bound_is_soon_after_the_expiry_whatever_the_keep(db: Database) -> None:
    """A row that was to be kept for a day stays for a week."""
    rng = random.Random(2)
    keeps = [60.0, HOUR, 5 * HOUR, 5.01 * HOUR, 7 * DAY, LONGEST] + [10 ** rng.uniform(1, 6.9) for _ in range(1000)]
    for _ in range(5):
        now = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.random() * 1e9)
        waits = db.rows(
            "select keep, extract(epoch from min(b) - %s)::float8 from unnest(%s::float8[]) as keep"
            " left join unnest(array(select {s}._private_wanted_bounds(%s))) b on b >= %s + make_interval(secs => keep)"
            " group by 1",
            now,
            keeps,
            now,
            now,
        )
        assert [keep for keep, wait in waits if wait is None or wait - keep > late(keep) + 0.001] == []


# --- nothing early, everything in the end ---


class Model:
    """What the finished table should hold, by the times at which each row expires."""

    def __init__(self) -> None:
        self.rows: dict[UUID, tuple[datetime, float] | None] = {}

    def finished(self, now: datetime, executions: Sequence[UUID], keeps: Sequence[float | None]) -> None:
        for execution, keep in zip(executions, keeps, strict=True):
            if keep is None or keep > 0:
                self.rows[execution] = None if keep is None else (now + timedelta(seconds=keep), keep)

    def must_be_there(self, now: datetime) -> set[UUID]:
        return {i for i, row in self.rows.items() if row is None or row[0] >= now}

    def may_be_there(self, now: datetime) -> set[UUID]:
        return {
            i
            for i, row in self.rows.items()
            if row is None or row[1] > LONGEST or row[0] + timedelta(seconds=late(row[1]) + 60) >= now
        }


def some_keeps(rng: random.Random) -> list[float | None]:
    return [rng.choice([None, 0.0, DAY, 7 * DAY] + [10 ** rng.uniform(1.5, 7.3)] * 12) for _ in range(6)]


def test_rows_go_between_their_expiry_and_the_bound_of_lateness(db: Database, clock: DatabaseClock) -> None:
    """Random keeps, an hour or half a year between two visits: a result is lost early, or kept for ever."""
    rng = random.Random(1)
    model = Model()
    for _ in range(40):
        clock.advance(10 ** rng.uniform(1, 7.2))
        maintain(db)
        now = clock.now()
        present = ids(db)
        assert model.must_be_there(now) <= present
        assert present <= model.may_be_there(now - timedelta(seconds=5))
        keeps = some_keeps(rng)
        model.finished(clock.now(), finish(db, *keeps), keeps)
    clock.advance(400 * DAY)
    for _ in range(3):
        maintain(db)
    assert ids(db) == {i for i, row in model.rows.items() if row is None}


def test_clock_that_jumps_to_and_fro_loses_nothing_early(db: Database, clock: DatabaseClock) -> None:
    """A server whose clock was a year ahead for an hour: what finishes then goes early, or stays for a year."""
    rng = random.Random(3)
    model = Model()
    latest = clock.now()  # by which maintenance has judged
    for _ in range(40):
        clock.advance(rng.choice([-1, 1, 1]) * 10 ** rng.uniform(1, 7.2))
        if rng.random() < 0.7:
            maintain(db)
            latest = max(latest, clock.now())
        keeps = some_keeps(rng)
        model.finished(clock.now(), finish(db, *keeps), keeps)
        assert model.must_be_there(latest) <= ids(db)
    clock.set(latest + timedelta(days=800))
    for _ in range(3):
        maintain(db)
    assert ids(db) == {i for i, row in model.rows.items() if row is None}


def test_after_a_jump_to_and_fro_bounds_are_near_again(db: Database, clock: DatabaseClock) -> None:
    """Every slot is bounded a year ahead, and what finishes stays for a year."""
    (kept,) = finish(db, 3 * DAY)
    clock.advance(YEAR)
    maintain(db)
    (ahead,) = finish(db, HOUR)
    clock.advance(-YEAR)
    maintain(db)
    (one,) = finish(db, HOUR)
    _, bound = slot_of(db, one)
    assert bound is not None
    assert bound < clock.now() + timedelta(hours=2, minutes=1)
    assert ids(db) == {ahead, one}  # what expired by the clock as it was has gone
    assert kept not in ids(db)


def test_nobody_maintains_for_weeks_and_then_somebody_does(db: Database, clock: DatabaseClock) -> None:
    """Bounds that have all passed: a flush fails, or what was put in meanwhile stays."""
    rng = random.Random(5)
    model = Model()
    for days in (1, 10, 30, 100, 200, 5):
        clock.advance(days * DAY)
        keeps = some_keeps(rng)
        model.finished(clock.now(), finish(db, *keeps), keeps)
    maintain(db)
    assert model.must_be_there(clock.now()) <= ids(db)
    clock.advance(500 * DAY)
    for _ in range(3):
        maintain(db)
    assert ids(db) == {i for i, row in model.rows.items() if row is None}


def test_flushes_and_maintenance_at_once_lose_nothing_early(db: Database, clock: DatabaseClock) -> None:
    """A slot emptied between a flush's choice and its insert."""
    batches = [(running(db, 6), db.session(autocommit=True)) for _ in range(40)]
    owners = [owner_of(db, claimed[0]) for claimed, _ in batches]
    model, stop = Model(), Event()
    rng = random.Random(6)
    keeps = [[None if rng.random() < 0.1 else 10 ** rng.uniform(1, 6) for _ in range(6)] for _ in batches]

    def flushes(part: int) -> None:
        for n in range(part, len(batches), 4):
            claimed, session = batches[n]
            session.flush(owners[n], *[done(c, keep=keep) for c, keep in zip(claimed, keeps[n], strict=True)])

    def maintains() -> int:
        session, calls = db.session(autocommit=True), 0
        while not stop.is_set() or calls < 3:
            maintain(session)
            calls += 1
        return calls

    workers = [db.start(maintains), db.start(maintains)]
    flushers = [db.start(partial(flushes, part)) for part in range(4)]
    while not all(flusher.done() for flusher in flushers):
        clock.advance(10 ** rng.uniform(2, 5))
    for flusher in flushers:
        flusher.result(20)
    stop.set()
    for worker in workers:
        worker.result(20)
    for execution, expires in db.rows("select id, expires_at from {s}._private_finished"):
        model.rows[execution] = None if expires is None else (expires, 0.0)
    for claimed, kept in zip((c for c, _ in batches), keeps, strict=True):
        for one, keep in zip(claimed, kept, strict=True):
            assert one.id in model.rows or keep is not None
    now = clock.now()
    maintain(db)
    assert model.must_be_there(now) <= ids(db)


# --- a flush that acts on an old bound ---


def stale(db: Database) -> Session:
    """A session whose transaction goes on seeing the slots, and the time, of now."""
    session = db.session()
    session.conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    session.rows("select count(*) from {s}._private_expiry_slots")
    return session


def test_flush_may_use_a_slot_that_was_emptied_and_bounded_anew(db: Database, clock: DatabaseClock) -> None:
    """It fails, or its row is never removed."""
    (one,) = running(db, 1)
    owner = owner_of(db, one)
    (before,) = finish(db, 60.0)
    no, bound = slot_of(db, before)
    flusher = stale(db)
    clock.advance(2 * HOUR)
    assert maintain(db).slots_emptied >= 1
    maintain(db)
    new = bound_of(db, no)
    assert bound is not None
    assert new is not None
    assert new > bound
    assert flusher.flush(owner, done(one, keep=60.0)) == {}
    flusher.commit()
    assert slot_of(db, one.id) == (no, new)
    clock.set(new + timedelta(seconds=1))
    maintain(db)
    assert ids(db) == set()


def test_flush_may_use_a_slot_whose_bound_was_lowered(db: Database, clock: DatabaseClock) -> None:
    """The clock is put back, the slot gets a near bound, and a row that came by the far one goes a year early."""
    (one,) = running(db, 1)
    owner = owner_of(db, one)
    clock.advance(YEAR)
    maintain(db)
    flusher = stale(db)
    clock.advance(-YEAR)
    maintain(db)
    assert flusher.flush(owner, done(one, keep=HOUR)) == {}
    flusher.commit()
    no, near = slot_of(db, one.id)
    ((expires,),) = db.finished(one.id, "expires_at")
    assert near is not None
    assert near < expires - timedelta(days=100)
    clock.set(near + timedelta(days=1))
    maintain(db)
    assert ids(db) == {one.id}
    assert bound_of(db, no) == expires
    clock.set(expires + timedelta(seconds=1))
    maintain(db)
    assert ids(db) == set()


def test_flush_may_use_the_far_slot_when_it_has_been_closed(db: Database, clock: DatabaseClock) -> None:
    """It is bounded by its last row, and then there comes one that expires later."""
    (one,) = running(db, 1)
    owner = owner_of(db, one)
    (other,) = finish(db, 200 * DAY)
    assert slot_of(db, other) == (1, None)
    flusher = stale(db)
    clock.advance(60 * DAY)
    maintain(db)
    no, bound = slot_of(db, other)
    assert no == 1
    assert bound is not None
    assert flusher.flush(owner, done(one, keep=400 * DAY)) == {}
    flusher.commit()
    clock.set(bound + timedelta(days=1))
    maintain(db)
    assert one.id in ids(db)
    clock.advance(201 * DAY)
    maintain(db)
    assert ids(db) == set()


def test_slot_that_is_read_or_written_is_left_for_later(db: Database, clock: DatabaseClock) -> None:
    """Maintenance waits for a reader, with everybody behind it; or fails, or empties what is being written."""
    expired, _ = finish(db, 60.0, 7 * DAY)
    (late_one,) = running(db, 1)
    reader, writer = db.session(), stale(db)
    reader.rows(f"select count(*) from {{s}}._private_finished_{slot_of(db, expired)[0]}")
    clock.advance(2 * HOUR)
    start = monotonic()
    busy = maintain(db)
    assert monotonic() - start < 2
    assert busy.slots_busy == 1  # rows are estimated: of a slot that has a file and no row, one
    assert expired in ids(db)
    reader.commit()
    writer.flush(owner_of(db, late_one), done(late_one, keep=60.0))
    assert maintain(db).slots_busy == 1
    writer.commit()
    assert maintain(db).slots_busy == 0
    assert len(ids(db)) == 1


def test_readers_of_the_other_slots_are_in_nobodys_way(db: Database, clock: DatabaseClock) -> None:
    """100,000 rows expire while a transaction reads others: they stay, or leave dead rows behind, or claims suffer."""
    db.register_queue()
    owner = db.register_orchestrator(lease=1000 * YEAR)
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 200)
    kept = finish(db, 7 * DAY)[0]
    owners_batch = db.claim(owner, limit=100)
    assert len(owners_batch) == 100
    slot = db.value("select {s}._private_expiry_slot(60, {s}._private_clock())")
    expires = clock.now() + timedelta(seconds=60)
    db.rows(
        "insert into {s}._private_finished (slot, priority, attempt, crashes, generation, depth, state, id, claim_no,"
        " created_at, finished_at, expires_at, queue, task, payload) select %s, 0, 1, 0, 0, 0, 'completed',"
        " gen_random_uuid(), 1, now(), now(), %s, 'q', 't', '{}' from generate_series(1, 100000)",
        slot,
        expires,
    )
    db.rows("select pg_stat_force_next_flush()")
    table = f"{{s}}._private_finished_{slot}"
    assert db.value(f"select pg_total_relation_size('{table}')") > 10_000_000
    reader = db.session()
    assert reader.rows(f"select count(*) from {{s}}._private_finished_{slot_of(db, kept)[0]}") == [(1,)]
    claimer = db.session(autocommit=True)
    clock.advance(2 * HOUR)
    did = maintain(db)
    assert did.slots_busy == 0
    assert did.rows_removed >= 90_000
    assert ids(db) == {kept}
    # Tables, indexes and TOAST as new: one page of each index.
    assert db.value(f"select pg_total_relation_size('{table}')") <= 5 * 8192
    db.rows("select pg_stat_clear_snapshot()")
    # Not none: other sessions may tell late what they have done to this table before. Deleted rows would be 100,000.
    assert db.value(f"select n_dead_tup from pg_stat_user_tables where relid = '{table}'::regclass") < 50_000
    assert len(claimer.claim(owner, limit=100)) == 100
    reader.rollback()


# --- who maintains, and what else ---


def test_one_maintains_and_the_others_are_told(db: Database) -> None:
    """A hundred orchestrators wait for each other once a minute."""
    first, second = db.session(), db.session(autocommit=True)
    assert maintain(first).lock_held
    assert maintain(second) == Maintenance(False, 0, 0, 0, 0, 0, 0, False)
    first.commit()
    assert maintain(second).lock_held


def test_orchestrators_that_died_long_ago_are_forgotten(db: Database, clock: DatabaseClock) -> None:
    """Tombstones pile up where nobody recovers any queue."""
    for _ in range(3):
        db.register_orchestrator(lease=10)
    db.rows("update {s}._private_orchestrators set died_at = {s}._private_clock()")
    clock.advance(DAY / 2)
    assert maintain(db).tombstones == 0
    clock.advance(DAY)
    assert maintain(db).tombstones == 3


def large(db: Database) -> str:
    """A payload that is stored aside: random text, since its compressed size decides."""
    text = db.value("select string_agg(md5(n::text), '') from generate_series(1, 300) n")
    return f'{{"x": "{text}"}}'


def payloads(db: Database) -> set[UUID]:
    return {i for (i,) in db.rows("select execution_id from {s}._private_payloads")}


def test_large_payloads_go_with_their_rows(db: Database, clock: DatabaseClock) -> None:
    """Payloads of expired executions stay for ever; or those of others go."""
    claimed = running(db, 4, payload=large(db))
    owner = owner_of(db, claimed[0])
    small = finish(db, 60.0)
    db.flush(owner, *[done(c, keep=keep) for c, keep in zip(claimed[:3], (60.0, 7 * DAY, 0.0), strict=True)])
    live = [c.id for c in claimed if c.id not in ids(db) and c is not claimed[2]]
    assert payloads(db) == {claimed[0].id, claimed[1].id, *live}
    clock.advance(2 * HOUR)
    first = maintain(db)
    assert (first.payloads_removed, first.more) == (1, True)
    assert ids(db) == {*small, claimed[1].id}  # the slot itself with the next call
    second = maintain(db)
    assert (second.payloads_removed, second.more) == (0, False)
    assert ids(db) == {claimed[1].id}
    assert payloads(db) == {claimed[1].id, *live}


def test_removal_of_large_payloads_is_bounded_by_rows_and_by_bytes(db: Database) -> None:
    """One call removes 40 GB of payloads, in one transaction."""
    claimed = running(db, 9, payload=large(db))
    db.flush(owner_of(db, claimed[0]), *[done(c, keep=60.0) for c in claimed])
    no, _ = slot_of(db, claimed[0].id)
    size = db.value("select max(pg_column_size(payload)) from {s}._private_payloads")

    def remove(limit: int, size: int) -> int:
        return int(
            db.value("select {s}._private_remove_large(%s, {s}._private_clock() + '1 h', %s, %s)", no, limit, size)
        )

    assert remove(2, 10**9) == 2
    assert remove(100, 1) == 1
    assert remove(100, 3 * size) == 3
    assert remove(100, 10**9) == 3
    assert payloads(db) == set()
    assert db.value("select count(*) from {s}._private_finished") == 0


def test_what_is_not_kept_leaves_nothing_behind(db: Database) -> None:
    """A row, a payload, or a dedupe key of an execution that nobody keeps."""
    (claimed,) = running(db, 1, payload=large(db), key="k")
    db.flush(owner_of(db, claimed), Outcome(claimed.id, claimed.claim_no, "failed", error='{"type": "x"}', keep=0.0))
    assert ids(db) == payloads(db) == set()
    assert db.value("select count(*) from {s}._private_dedupe_keys") == 0
    assert db.value("select count(*) from {s}._private_executions") == 0


def test_maintenance_with_nothing_to_do_writes_nothing(db: Database) -> None:
    """Once a minute it makes every slot's row anew, and a file for every table."""
    finish(db, 60.0, 7 * DAY)
    maintain(db)
    before = db.dump(), db.rows(
        "select relname, relfilenode from pg_class where relnamespace = '{s}'::regnamespace order by 1"
    )  # fmt: skip
    assert maintain(db) == Maintenance(True, 0, 0, 0, 0, 0, 0, False)
    assert before == (
        db.dump(),
        db.rows("select relname, relfilenode from pg_class where relnamespace = '{s}'::regnamespace order by 1"),
    )
