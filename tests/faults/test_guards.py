"""Guards that other tests do not miss when they are taken away: each was planted, see tests/planted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from uuid import uuid4

import pytest
import trio
from faults.inside import query, until
from sql.database import LONG, Database, done, open_database

from pgconductor import Conductor, Orchestrator
from pgconductor.db.calls import Calls
from pgconductor.db.link import OutageLog, Target
from pgconductor.errors import LeaseLost
from pgconductor.runtime.listener import Listener


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


async def test_notification_sent_while_the_queues_look_once_is_heard(pgconductor_dsn: str) -> None:
    """LISTEN comes first, then the look: the other way round, what is committed in between is neither seen nor heard.
    (Catalogue no. 17.)
    """
    calls = Calls("pgconductor")
    listener = Listener(Target(pgconductor_dsn, pgconductor_dsn, 5), calls, OutageLog(), random.Random())
    heard = trio.Event()

    class Queue:
        async def on_listening(self) -> None:
            query(pgconductor_dsn, "select pg_notify(pgconductor._private_channel('q'), '')")

        def on_notify(self) -> None:
            heard.set()

        def on_lost(self) -> None:
            pass  # it is, at the end

    listener.add("q", Queue())
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        with trio.fail_after(20):
            await heard.wait()
        nursery.cancel_scope.cancel()


async def test_nothing_begins_beside_an_execution_on_its_last_life(pgconductor_dsn: str) -> None:
    """What has begun with it would be brought down with it. (Catalogue no. 7.)"""
    conductor = Conductor(pgconductor_dsn)
    is_suspect_running = False
    beside: list[int] = []
    ran = trio.Event()

    @conductor.task(queue="q")
    async def innocent(n: int) -> None:
        if is_suspect_running:
            beside.append(n)
        await trio.sleep(0.001)

    @conductor.task(queue="q")
    async def suspect() -> None:
        nonlocal is_suspect_running
        is_suspect_running = True
        await trio.sleep(0.5)
        is_suspect_running = False
        ran.set()

    worker = conductor.create_worker(queue="q", tasks=[innocent, suspect], concurrency=10, sweep_interval=0.1)
    orchestrator = Orchestrator(conductor, workers=[worker], migrate=False, lease=4.0)
    numbers = iter(range(1_000_000))

    async def produce() -> None:
        while not ran.is_set():
            for _ in range(20):
                await innocent.invoke(n=next(numbers))
            await trio.sleep(0.01)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        nursery.start_soon(produce)
        await suspect.options(delay=3600.0).invoke()
        query(
            pgconductor_dsn,
            "update pgconductor._private_executions set crashes = 2, state = 'ready', run_at = now()"
            " where task = 'suspect' returning id",
        )
        with trio.fail_after(40):
            await ran.wait()
        await until(lambda: query(pgconductor_dsn, "select count(*) from pgconductor._private_executions") == [(0,)])
        nursery.cancel_scope.cancel()
    assert beside == []
    assert query(pgconductor_dsn, "select state::text, count(*) from pgconductor._private_finished group by 1") == [
        ("completed", next(numbers) + 1)
    ]
