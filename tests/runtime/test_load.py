"""What a running orchestrator tells of its workers, and what is advised by it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio

from pgconductor import Conductor, Orchestrator, QueueLoad, Recommendation

LIMIT = 30.0


@asynccontextmanager
async def running(orchestrator: Orchestrator) -> AsyncGenerator[None]:
    """It runs in the block, and is stopped at once at its end."""
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        try:
            yield
        finally:
            orchestrator.stop()
            orchestrator.stop()  # hurry


async def until_told(conductor: Conductor, workers: int = 1) -> QueueLoad:
    """The load, once that many workers have told twice what they do."""
    with trio.fail_after(LIMIT):
        while True:
            (load,) = await conductor.queue_load("q")
            if load.reporting >= workers:
                return load
            await trio.sleep(0.05)  # between two looks at a fact


async def test_busy_runners_are_told_and_handlers_that_wait_want_more_concurrency(
    conductor: Conductor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog, every runner taken, no CPU used, on a machine that has nothing else to do."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))

    @conductor.task(queue="q")
    async def wait() -> None:
        await trio.sleep_forever()

    worker = conductor.create_worker(queue="q", tasks=[wait], concurrency=4)
    async with conductor:
        for _ in range(10):
            await wait.invoke()
        async with running(Orchestrator(conductor, workers=[worker], lease=2.0, grace=0.0)):
            with trio.fail_after(LIMIT):
                while True:  # its prefetch gives back what nobody takes, and then only four run
                    load = await until_told(conductor)
                    if (load.busy or 0) > 3.8 and load.running == 4:
                        break
                    await trio.sleep(0.05)
            assert (load.workers, load.capacity, load.reporting_capacity, load.ready) == (1, 4, 4, 6)
            assert load.busy == pytest.approx(4.0, abs=0.2)
            assert load.cpu is not None
            assert load.cpu < 2
            with trio.fail_after(LIMIT):
                while True:
                    (advice,) = await conductor.advise("q", seconds=0.01)
                    if (advice.load.oldest_ready or 0) > 5:
                        break
                    await trio.sleep(0.1)
    assert advice.verdict in (
        Recommendation.RAISE_CONCURRENCY,
        Recommendation.ADD_PROCESSES,
    )  # by the CPU that the test itself took
    assert " of 4 runners busy (80% is full)" in advice.why
    # Five for the four that are busy, and one for each that waits, since none has ended; less, while what was
    # fetched in advance and is given back still counts as claimed.
    assert 5 < advice.load.wanted_capacity <= 11


async def test_what_was_done_is_told(conductor: Conductor) -> None:
    """Counts of claims and executions, and no time of runners when they have nothing to do."""

    @conductor.task(queue="q")
    async def add(n: int) -> int:
        return n + 1

    worker = conductor.create_worker(queue="q", tasks=[add], concurrency=4)
    async with conductor:
        async with running(Orchestrator(conductor, workers=[worker], lease=2.0)):
            await until_told(conductor)
            for n in range(20):
                await (await add.invoke(n)).result()
            with trio.fail_after(LIMIT):
                while (load := await until_told(conductor)).ended_rate == 0:
                    await trio.sleep(0.05)
            assert load.claims
            assert load.claimed
            assert load.empty_claims is not None
            assert load.claim_share is not None
            assert 0 < load.claim_share < 1
            assert load.busy is not None
            assert 0 < load.busy < 1
            (advice,) = await conductor.advise("q")
            assert advice.verdict is Recommendation.FINE
        (after,) = await conductor.advise()
    assert (after.verdict, after.load.workers) == (Recommendation.FINE, 0)


async def test_nobody_serves_a_backlog(conductor: Conductor) -> None:
    """The first advice of all."""

    @conductor.task(queue="q")
    async def add(n: int) -> int:
        return n + 1

    async with conductor:
        await add.invoke(1)
        (advice,) = await conductor.advise()
    assert (advice.queue, advice.verdict) == ("q", Recommendation.START_WORKERS)
    with conductor.sync() as client:
        assert [each.verdict for each in client.advise("q", seconds=0.01)] == [Recommendation.START_WORKERS]
        assert [each.ready for each in client.queue_load()] == [1]
        assert client.advise("unknown") == []
