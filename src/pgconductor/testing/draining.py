"""Running a program's tasks to quiescence in a test, with the database's clock moved instead of waiting."""

from __future__ import annotations

from datetime import timedelta

import trio

from ..options import MAX_DELAY, checked_seconds
from ..runtime.orchestrator import Drained, Orchestrator
from .clock import DatabaseClock


async def drain(
    orchestrator: Orchestrator, *, clock: DatabaseClock | None = None, horizon: float | timedelta = 0.0
) -> Drained:
    """Run `orchestrator` until nothing is ready, running, or due within `horizon` seconds; return the counts.

    What users' tests call instead of starting a worker and sleeping: retries and delayed executions within the
    horizon (0 or more seconds) are drained too, and so is what the executions invoke. With `clock`, the database's
    time is moved on to each due time, so that an hour's delay takes no time; without, real time is waited for. Raises
    as `Orchestrator.drain`.
    """
    seconds = checked_seconds("drain(horizon=)", horizon, maximum=MAX_DELAY)
    if clock is None:
        return await orchestrator.drain(seconds)

    async def advance(wait: float) -> None:
        await trio.to_thread.run_sync(clock.advance, wait)

    return await orchestrator._drain(seconds, advance)  # pyright: ignore[reportPrivateUsage]  # the clock is for tests only
