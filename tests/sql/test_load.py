"""queue_load, autoscaling and what heartbeats tell: counts are right, rates are of what happened, and it is cheap."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sql.database import LONG, Database, done
from sql.test_plans import reads, scans

from pgconductor.db.calls import NewExecution, WorkerLoad
from pgconductor.model import QueueLoad
from pgconductor.testing import DatabaseClock

NOTHING = WorkerLoad("q", 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0.0, None)


def load(db: Database, queue: str = "q") -> QueueLoad:
    (found,) = db.run(db.calls.queue_load(queue))
    return found


def tell(db: Database, owner: UUID, told: WorkerLoad) -> None:
    assert db.run(db.calls.heartbeat(owner, LONG, [], [told])).is_alive


def work(db: Database, n: int, **options: Any) -> None:
    db.invoke_many(*[NewExecution("t", "{}", "q", **options)] * n)


# --- depth ---


def test_what_is_due_is_counted_promoted_or_not(db: Database, clock: DatabaseClock) -> None:
    """Only a claim promotes: an autoscaler that waits for ready ones would never start the first process."""
    db.register_queue()
    work(db, 3)
    work(db, 2, delay=50.0)
    clock.advance(20)
    now = load(db)
    assert (now.ready, now.running, now.workers, now.wanted_capacity) == (3, 0, 0, 1)
    assert now.oldest_ready == pytest.approx(20, abs=5)
    clock.advance(40)
    assert load(db).ready == 5
    assert load(db).oldest_ready == pytest.approx(60, abs=5)
    db.claim(db.register_orchestrator(), limit=4)
    now = load(db)
    assert (now.ready, now.running, now.workers, now.capacity) == (1, 4, 1, 10)


def test_the_oldest_is_found_whatever_its_priority(db: Database, clock: DatabaseClock) -> None:
    """The one that starves is behind all others in the claim's order."""
    db.register_queue()
    db.invoke(priority=-5)
    clock.advance(100)
    for priority in range(20):
        db.invoke(priority=priority)
    assert load(db).oldest_ready == pytest.approx(100, abs=5)


def test_what_was_produced_before_its_queue_was_registered_counts(db: Database, clock: DatabaseClock) -> None:
    """It is in the overflow partition, with others'."""
    work(db, 3)
    db.invoke("other")
    clock.advance(30)
    unregistered = load(db)
    assert (unregistered.registered, unregistered.ready, unregistered.arrivals) == (False, 3, None)
    assert (unregistered.inserted, unregistered.deleted) == (None, None)
    db.register_queue()
    work(db, 2)
    assert (load(db).registered, load(db).ready) == (True, 5)
    assert load(db).oldest_ready == pytest.approx(30, abs=5)
    assert [each.queue for each in db.run(db.calls.queue_load())] == ["other", "q"]


def test_tasks_that_nobody_has(db: Database) -> None:
    """Their depth is none that more processes would help against."""
    db.register_queue()
    db.register_orchestrator(tasks=["t"])
    work(db, 3)
    for task in ("a", "b", "b"):
        db.invoke(task=task)
    now = load(db)
    assert (now.ready, now.looked, now.unserved, now.tasks_without_worker) == (6, 6, 3, ("a", "b"))


def test_counts_have_a_bound_and_say_so(db: Database) -> None:
    """Or a look at a backlog of millions takes as long as it is deep."""
    db.register_queue()
    work(db, 12)
    (now,) = db.run(db.calls.queue_load("q", 10))
    assert (now.ready, now.is_ready_capped, load(db).ready, load(db).is_ready_capped) == (10, True, 12, False)


def test_a_look_reads_a_bounded_part_of_a_large_backlog(db: Database) -> None:
    """Whatever the statistics say, by an index; with as many finished with as there may be."""
    db.register_queue()
    db.rows("alter table {s}._private_queue_1 set (autovacuum_enabled = off)")
    db.rows(
        "insert into {s}._private_executions (queue_no, id, queue, task, state, priority, run_at, created_at, payload)"
        " select 1, {s}._private_new_id(1, now()), 'q', 't', 'ready', n %% 7, now() - interval '1 h', now(), '{}'"
        " from generate_series(1, %s::int) n",
        60_000,
    )
    looking = db.session(autocommit=True)
    looking.run(looking.calls.queue_load("q", 1000))
    scans(db)
    before, read = scans(looking), reads(looking)
    (now,) = looking.run(looking.calls.queue_load("q", 1000))
    assert (now.ready, now.is_ready_capped, now.unserved) == (1000, True, 1000)
    assert now.oldest_ready == pytest.approx(3600, abs=60)
    assert scans(looking) == before
    assert reads(looking) - read < 5000


# --- what workers tell ---


def test_rates_are_of_what_lies_between_two_tellings(db: Database, clock: DatabaseClock) -> None:
    """A utilisation that is of another time, or of nobody, is worse than none."""
    db.register_queue()
    owner = db.register_orchestrator()
    tell(db, owner, NOTHING)
    assert (load(db).reporting, load(db).busy, load(db).claims) == (0, None, None)
    clock.advance(10)
    tell(db, owner, WorkerLoad("q", 100, 40, 30, 20, 500, 400, 60.0, 2.0, 5.0, 3.0, 0.7))
    now = load(db)
    assert (now.reporting, now.reporting_capacity) == (1, 10)
    assert (now.claims, now.empty_claims, now.short_claims, now.locked_claims, now.claimed) == (100, 40, 30, 20, 500)
    assert now.seconds == pytest.approx(10, rel=0.1)
    rates = (now.busy, now.claim_share, now.flush_share, now.cpu, now.claimed_rate, now.ended_rate)
    assert rates == pytest.approx((6.0, 0.2, 0.5, 0.3, 50.0, 40.0), rel=0.1)
    assert (now.claim_seconds, now.machine_load) == (2.0, 0.7)
    assert now.wanted_capacity == 8


def test_tellings_in_quick_succession_do_not_shorten_the_time_that_rates_are_of(
    db: Database, clock: DatabaseClock
) -> None:
    """An orchestrator in doubt sends heartbeats a millisecond apart."""
    db.register_queue()
    owner = db.register_orchestrator()
    tell(db, owner, NOTHING)
    for busy in (10.0, 20.0, 30.0, 40.0, 50.0):
        clock.advance(2)
        tell(db, owner, NOTHING._replace(busy_seconds=busy))
        assert (load(db).seconds or 0) >= 1.9
    now = load(db)
    assert 4.5 < (now.seconds or 0) < 9
    assert now.busy == pytest.approx(5.0, rel=0.2)
    for _ in range(20):
        tell(db, owner, NOTHING._replace(busy_seconds=50.0))
    assert (load(db).seconds or 0) > 4.5


def test_workers_are_added_up_and_the_dead_are_not(db: Database, clock: DatabaseClock) -> None:
    """An autoscaler would go by processes that are gone."""
    db.register_queue()
    living, quiet = db.register_orchestrator(), db.register_orchestrator()
    dead = db.register_orchestrator(lease=15.0)
    for owner in (living, dead):
        db.run(db.calls.heartbeat(owner, 15.0 if owner == dead else LONG, [], [NOTHING]))
    clock.advance(10)
    for owner in (living, dead):
        told = NOTHING._replace(busy_seconds=50.0, cpu_seconds=9.0 if owner == dead else 1.0)
        db.run(db.calls.heartbeat(owner, 15.0 if owner == dead else LONG, [], [told]))
    assert (load(db).workers, load(db).reporting, round(load(db).busy or 0)) == (3, 2, 10)
    assert load(db).cpu == pytest.approx(0.9, rel=0.1)
    clock.advance(20)
    now = load(db)
    assert (now.workers, now.capacity, now.reporting, round(now.busy or 0)) == (2, 20, 1, 5)
    db.run(db.calls.retire_orchestrator(quiet))
    assert load(db).workers == 1


def test_what_was_told_goes_along_in_a_succession(db: Database, clock: DatabaseClock) -> None:
    """Or after every failover nobody knows anything for a while."""
    db.register_queue()
    owner, heir = db.register_orchestrator(), UUID(int=7)
    tell(db, owner, NOTHING)
    clock.advance(10)
    tell(db, owner, NOTHING._replace(busy_seconds=50.0))
    before = load(db)
    db.run(db.calls.succeed_orchestrator(owner, heir, LONG, []))
    assert replace(load(db), at=before.at) == before


def test_arrivals_and_departures_are_those_of_the_partition(db: Database, clock: DatabaseClock) -> None:
    """Nobody counts them as they come: it is the server that does."""
    db.register_queue()
    owner = db.register_orchestrator()
    settle(db)
    first = load(db)
    tell(db, owner, NOTHING)
    work(db, 50)
    db.invoke("other")
    claimed = db.claim(owner, limit=30)
    db.flush(owner, *[done(c, keep=60.0) for c in claimed[:20]], *[done(c, "retried", delay=1.0) for c in claimed[20:]])
    settle(db)
    clock.advance(10)
    tell(db, owner, NOTHING)
    now = load(db)
    assert ((now.inserted or 0) - (first.inserted or 0), (now.deleted or 0) - (first.deleted or 0)) == (50, 20)
    assert now.arrivals == pytest.approx(5.0, rel=0.1)
    assert now.departures == pytest.approx(2.0, rel=0.1)


def test_what_ends_in_the_overflow_partition_departs_too(db: Database, clock: DatabaseClock) -> None:
    """A backlog from before the registration would seem to stand still."""
    work(db, 50)
    db.register_queue()
    owner = db.register_orchestrator()
    tell(db, owner, NOTHING)
    clock.advance(10)
    tell(db, owner, NOTHING._replace(ended=40))
    assert load(db).departures == pytest.approx(4.0, rel=0.1)


def settle(db: Database) -> None:
    """What this session has done is in the server's statistics."""
    db.rows("select pg_stat_force_next_flush()")
    db.rows("select pg_stat_clear_snapshot()")


def test_an_older_program_tells_nothing_and_lives(db: Database) -> None:
    """Its heartbeat has two parameters."""
    db.register_queue()
    owner = db.register_orchestrator()
    assert db.value("select {s}.heartbeat(%s, 60)", owner) is True
    assert db.rows("select load, next_load, former_load from {s}._private_workers") == [(None,) * 3]
    assert (load(db).workers, load(db).reporting, load(db).wanted_capacity) == (1, 0, 10)


def test_a_dead_one_tells_nothing(db: Database, clock: DatabaseClock) -> None:
    """Nothing that it says changes anything."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10.0)
    clock.advance(11)
    assert not db.run(db.calls.heartbeat(owner, LONG, [], [NOTHING])).is_alive
    assert db.rows("select load from {s}._private_workers") == [(None,)]


def test_what_is_told_of_other_queues_and_in_other_words_is_left_out(db: Database) -> None:
    """A newer program tells more; nobody speaks for a worker that he has not registered."""
    db.register_queue()
    mine, other = db.register_orchestrator(), db.register_orchestrator()
    db.value(
        "select {s}.heartbeat(%s, 60, %s)",
        mine,
        '[{"queue": "q", "claims": 3, "mood": "good"}, {"queue": "x", "claims": 1}]',
    )
    assert db.rows("select orchestrator_id, (load).claims from {s}._private_workers order by 2") == [
        (mine, 3),
        (other, None),
    ]


# --- for an autoscaler ---


@pytest.mark.parametrize(
    ("told", "ready", "wanted"),
    [
        pytest.param({"busy_seconds": 0.0}, 0, 0, id="nothing to do"),
        pytest.param({"busy_seconds": 40.0, "claimed": 100}, 0, 5, id="keeps up: what is busy, and a fifth"),
        # Of a hundred that took 0.4 s each: 300 more take two minutes of a runner.
        pytest.param({"busy_seconds": 40.0, "claimed": 100}, 300, 7, id="what is ready within a minute"),
        pytest.param({"busy_seconds": 100.0, "claimed": 0}, 3, 16, id="longer than we look: a runner for each"),
        pytest.param({"busy_seconds": 0.0, "claimed": 0}, 1, 1, id="one at least"),
    ],
)
def test_wanted_capacity(db: Database, clock: DatabaseClock, told: dict[str, Any], ready: int, wanted: int) -> None:
    """Too many processes, or a queue that is never worked off."""
    db.register_queue()
    owner = db.register_orchestrator()
    tell(db, owner, NOTHING)
    clock.advance(10)
    tell(db, owner, NOTHING._replace(**told))
    work(db, ready)
    assert load(db).wanted_capacity == pytest.approx(wanted, abs=1 if wanted > 10 else 0)


def test_autoscaling_of_one_queue_looks_at_that_one(db: Database) -> None:
    """With hundreds of queues each look of an autoscaler would look at all of them."""
    for n in range(30):
        db.register_queue(f"q{n}")
        db.invoke(f"q{n}")
    query = "select queue, ready, oldest_ready is not null, running, workers, capacity, busy, wanted_capacity"
    assert db.rows(f"{query} from {{s}}.autoscaling where queue = 'q7'") == [("q7", 1, True, 0, 0, 0, None, 1)]
    assert len(db.rows("select * from {s}.autoscaling")) == 30
    assert db.rows("select * from {s}.autoscaling where queue = 'unknown'") == []
    plan = "\n".join(
        line
        for (line,) in db.rows(
            "explain (analyze, timing off, costs off) select * from {s}.autoscaling where queue = 'q7'"
        )
    )
    assert "Function Scan on queue_load l (actual rows=1" in plan
    assert "loops=1)" in plan.partition("queue_load")[2].splitlines()[0]


def test_a_look_waits_for_nobody(db: Database) -> None:
    """A migration, or a transaction of the user's, makes the autoscaler hang."""
    db.register_queue()
    execution = db.invoke()
    db.register_orchestrator()
    holder, looking = db.session(), db.session(autocommit=True)
    holder.rows("select from {s}._private_executions where id = %s for update", execution)
    holder.rows("select from {s}._private_workers for update")
    began = monotonic()
    work_ = db.start(lambda: looking.run(looking.calls.queue_load("q")))
    assert db.settle(looking, work_) is False
    assert work_.result(0)[0].ready == 1
    assert monotonic() - began < 20


def test_numbers_that_are_none_are_refused(db: Database) -> None:
    """A look of theirs would fail for everybody."""
    db.register_queue()
    owner = db.register_orchestrator()
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        db.value("""select {s}.heartbeat(%s, 60, '[{"queue": "q", "claims": "many"}]')""", owner)
    assert load(db).workers == 1
