"""The wake-up protocol under random producers, claimers that die and workers that come and go; the sweep is off.

Rounds: some producers run transactions at once, in three isolation levels, of 0 to 50 ms, some rolled back, some with
savepoints rolled back; then all is quiet until whatever was committed has started. Nothing else comes to wake a worker
in that pause, so that a lost wake-up is not late but never: the round fails. The producers of one process cannot enter
a window of microseconds at will; the sum of many rounds does, and test_reactor.py does it by gates.

`pytest tests/runtime/test_wakeup_random.py --wakeups 100000 -s` makes that many executions and prints what it saw;
`--wakeup-seed` repeats a run's choices (not its timing).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from uuid import UUID

import psycopg
import pytest
import trio
from psycopg import IsolationLevel
from psycopg.rows import TupleRow
from runtime.workplace import INSERT, WatchedWorker, Workplace, register, scalar, session

from pgconductor.db.connection import TrioConnection
from pgconductor.db.execute import run

BACKOFF = 0.25
"""The longest nap of a worker that sees a change in flight."""

MARGIN = 4.0
"""For a machine that is busy with something else. Wake-ups that are lost are not late by so much, they never come."""

LEVELS = (IsolationLevel.READ_COMMITTED, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE)


@dataclass
class Load:
    """What was produced: numbers of committed executions, and when their COMMIT had returned."""

    rng: random.Random
    committed_at: dict[int, float] = field(default_factory=dict[int, float])
    rounds: int = 0
    disturbed: set[int] = field(default_factory=set[int])  # of rounds in which a claimer hid rows, or a worker ended
    transactions: int = 0
    rolled_back: int = 0
    hidden: int = 0
    lag: float = 0.0
    next_number: int = 0

    def number(self) -> int:
        self.next_number += 1
        return self.next_number


async def produce(conn: TrioConnection[TupleRow], load: Load, queue: str, committed: list[int]) -> None:
    """A few transactions, each with its own isolation level and length."""
    rng = load.rng
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.3:
            await trio.sleep(rng.uniform(0.0, 0.03))
        await conn.set_isolation_level(rng.choice(LEVELS))
        numbers: list[int] = []
        load.transactions += 1
        try:
            async with conn.transaction(force_rollback=rng.random() < 0.1) as transaction:
                for _ in range(rng.choice((1, 1, 2, 3, 5))):
                    if rng.random() < 0.15:
                        async with conn.transaction(force_rollback=True):
                            await conn.execute(INSERT, [queue, load.number(), queue, 0.0])
                    else:
                        numbers.append(load.number())
                        await conn.execute(INSERT, [queue, numbers[-1], queue, 0.0])
                    if rng.random() < 0.4:
                        await trio.sleep(rng.uniform(0.0, 0.02))
                if rng.random() < 0.5:
                    await trio.sleep(rng.uniform(0.0, 0.05))
        except psycopg.errors.SerializationFailure:
            load.rolled_back += 1
            continue
        if transaction.force_rollback:
            load.rolled_back += 1
            continue
        now = trio.current_time()
        load.committed_at.update(dict.fromkeys(numbers, now))
        committed.extend(numbers)


async def claim_and_die(place: Workplace, load: Load, queue: str, owner: UUID) -> None:
    """Hide rows for a moment in a claim that never commits, and vanish without a word."""
    conn = await TrioConnection.connect(place.dsn, autocommit=False)
    try:
        await trio.sleep(load.rng.uniform(0.0, 0.03))
        for _ in range(10):
            if claimed := (await run(conn, place.calls.claim(queue, owner, [queue], 1000))).claimed:
                load.hidden += len(claimed)
                break
        await trio.sleep(load.rng.uniform(0.0, 0.03))
    finally:
        conn.drop()


async def come_and_go(worker: WatchedWorker, rng: random.Random) -> None:
    """Run one more worker and cancel it at a random moment: in a claim, in a flush, asleep."""
    with trio.move_on_after(rng.uniform(0.0, 0.1)):
        async with trio.open_nursery() as nursery:
            assert worker.listener is not None
            await nursery.start(worker.listener.run)
            await nursery.start(worker.pipeline.run)


async def note_lag(load: Load) -> None:
    """How late this process itself is at times: what no protocol can make up for."""
    while True:
        begun = trio.current_time()
        await trio.sleep(0.01)
        load.lag = max(load.lag, trio.current_time() - begun - 0.01)


def live_rows(dsn: str, queue: str) -> list[tuple[object, ...]]:
    """What is live on a queue, for the message of a failure."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        return conn.execute(
            "select payload->>'n', state::text, claim_no, owner, outcome, run_at, clock_timestamp()"
            " from pgconductor._private_executions where queue = %s",
            [queue],
        ).fetchall()


def advisory_locks(dsn: str) -> list[tuple[object, ...]]:
    """Who holds advisory locks, for the message of a failure."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        return conn.execute(
            "select l.pid, l.mode, l.granted, l.classid, l.objid, a.application_name, a.state, left(a.query, 80)"
            " from pg_locks l join pg_stat_activity a using (pid) where l.locktype = 'advisory'"
        ).fetchall()


async def rounds(place: Workplace, load: Load, queue: str, wanted: int) -> None:
    """On one queue: some producers at once, then quiet until all that they committed has started."""
    rng = load.rng
    with session(place.dsn) as admin:
        rival = register(admin, place.conductor, queue)
    conns = [await TrioConnection.connect(place.dsn, autocommit=True) for _ in range(5)]
    try:
        while len(load.committed_at) < wanted:
            load.rounds += 1
            numbers: list[int] = []
            is_disturbed = False
            async with trio.open_nursery() as nursery:
                for conn in rng.sample(conns, rng.randint(1, len(conns))):
                    nursery.start_soon(produce, conn, load, queue, numbers)
                if rng.random() < 0.3:
                    is_disturbed = True
                    nursery.start_soon(claim_and_die, place, load, queue, rival)
                if rng.random() < 0.05:
                    is_disturbed = True
                    nursery.start_soon(come_and_go, place.worker(queue), rng)
            try:
                await place.until_started(*numbers)
            except trio.TooSlowError:
                missing = [n for n in numbers if n not in place.started_at]
                workers = [
                    worker.pipeline.statistics() for worker in place.workers if worker.pipeline.worker.queue == queue
                ]
                pytest.fail(
                    f"never started on queue {queue!r}, disturbed {is_disturbed}: {missing};"
                    f" rows {live_rows(place.dsn, queue)}; locks {advisory_locks(place.dsn)}; workers {workers}"
                )
            if is_disturbed:
                load.disturbed.update(numbers)
    finally:
        for conn in conns:
            conn.drop()


@pytest.mark.timeout(3600)
async def test_no_wake_up_is_lost_whatever_producers_and_claimers_do(
    pgconductor_dsn: str, request: pytest.FixtureRequest
) -> None:
    """One lost wake-up in many thousand is an execution that waits for the sweep, on an idle queue, in production."""
    wanted: int = request.config.option.wakeups
    seed: int = request.config.option.wakeup_seed or random.randrange(2**32)
    print(f"--wakeup-seed {seed}")
    load = Load(random.Random(seed))
    place = Workplace(pgconductor_dsn)
    queues = {"a": 1, "b": 1, "c": 1, "d": 1, "e": 2, "f": 2, "g": 3}
    for queue, workers in queues.items():
        for _ in range(workers):
            place.worker(queue, concurrency=load.rng.choice((1, 3, 10)))
    begun = trio.current_time()
    async with place.open(), trio.open_nursery() as timekeeping:
        timekeeping.start_soon(note_lag, load)
        async with trio.open_nursery() as nursery:
            for queue in queues:
                nursery.start_soon(rounds, place, load, queue, wanted)
        timekeeping.cancel_scope.cancel()
        undisturbed = max(place.started_at[n] - load.committed_at[n] for n in set(load.committed_at) - load.disturbed)
        late = sorted(place.started_at[n] - at for n, at in load.committed_at.items())
        notifications = sum(worker.reactor.statistics().notifications for worker in place.workers)
        naps = sum(len(worker.naps) for worker in place.workers)
    print(
        f"{len(late)} executions in {load.transactions} transactions ({load.rolled_back} rolled back),"
        f" {load.rounds} rounds, {trio.current_time() - begun:.0f} s;"
        f" {notifications} notifications, {naps} naps, {load.hidden} rows hidden by claimers that died;"
        f" start after COMMIT returned: p50 {late[len(late) // 2] * 1000:.1f} ms,"
        f" p99 {late[len(late) * 99 // 100] * 1000:.1f} ms, latest {late[-1] * 1000:.1f} ms,"
        f" where nobody hid rows {undisturbed * 1000:.1f} ms; this process was late by up to {load.lag * 1000:.1f} ms"
    )
    assert late[-1] <= BACKOFF + MARGIN
    assert naps > 0, "no worker ever saw a change in flight: the rounds tested nothing"
    assert load.hidden > 0, "no claimer ever hid a row: the rounds tested less than they say"
    with session(pgconductor_dsn) as admin:
        committed = scalar(admin, "select array_agg(distinct (payload->>'n')::int) from pgconductor._private_finished")
        assert set(committed) >= set(load.committed_at)
        assert scalar(admin, "select count(*) from pgconductor._private_executions") == 0
