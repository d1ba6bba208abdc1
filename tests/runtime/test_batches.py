"""Handlers of batches, on a real database: what becomes of each execution, whatever is done to the others.

Nothing here waits by sleeping: `drain` runs until nothing is left to do, and handlers signal by events.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
import trio

from pgconductor import (
    BatchContext,
    Cancellation,
    Conductor,
    Context,
    ExecutionCancelled,
    ExecutionFailed,
    Fixed,
    NoRetry,
    Orchestrator,
    RetryAfter,
    Snooze,
    Worker,
)
from pgconductor.runtime.worker import Pipeline

AT_ONCE = Fixed(0.0)


def states(query: Any) -> dict[str, int]:
    return dict(query("select state::text, count(*) from pgconductor.executions group by 1"))


def rows(query: Any) -> list[Any]:
    """Number of the item, state, attempts, and the types of the errors, of each execution."""
    return list(
        query(
            "select (p.payload->>'item')::int, e.state::text, e.attempt,"
            " (select array_agg(x->>'type') from jsonb_array_elements(e.errors) x)"
            " from pgconductor.executions e join numbers p on p.id = e.id order by 1"
        )
    )


@asynccontextmanager
async def running(orchestrator: Orchestrator) -> AsyncIterator[Pipeline]:
    """An orchestrator that runs inside the block, and its only pipeline; it is stopped, and waited for."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            incarnation = orchestrator._incarnation
            assert incarnation is not None
            yield incarnation.pipelines[0]
            orchestrator.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds of which no event tells."""
    with trio.fail_after(30):
        while not condition():
            await trio.sleep(0.002)


async def test_full_and_partial_batches_finish_each_execution_once(conductor: Conductor, query: Any) -> None:
    """250 of at most 100 are three calls, and everyone gets the result of its own item."""
    calls: list[list[int]] = []

    @conductor.batch_task(queue="q", size=100)
    async def double(items: list[int]) -> list[int]:
        calls.append(items)
        return [2 * item for item in items]

    async with conductor:
        handles = await double.invoke_many([double.bind(n) for n in range(250)])
        worker = conductor.create_worker(queue="q", tasks=[double], concurrency=1)
        drained = await Orchestrator(conductor, workers=[worker]).drain()
        assert drained.completed == 250
        assert [await handle.result(timeout=0) for handle in handles] == [2 * n for n in range(250)]
    assert sorted(n for call in calls for n in call) == list(range(250))
    assert sorted(len(call) for call in calls) == [50, 100, 100]
