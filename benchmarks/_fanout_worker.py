"""The worker of `fanout`: ``_fanout_worker.py DSN CONCURRENCY TIMES``; prints ``ready`` and ends with its input.

`parent` runs its children in one durable nursery. With `failing`, one child fails when it is told to run, and the
others are due in an hour. TIMES gets a line per event: ``failed NS`` by the child, ``caught NS`` by the parent
(CLOCK_MONOTONIC).
"""

from __future__ import annotations

import os
import sys
import time

import trio

from pgconductor import Conductor, Context, Orchestrator


async def work(dsn: str, concurrency: int, times_path: str) -> None:
    conductor = Conductor(dsn)
    times = os.open(times_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(event: str) -> None:
        os.write(times, f"{event} {time.monotonic_ns()}\n".encode())

    @conductor.task(queue="children", keep_completed=None, max_attempts=1)
    async def child(n: int, fails: bool = False) -> int:
        if fails:
            note("failed")
            raise ValueError("as asked")
        return n

    @conductor.task(queue="parents", keep_completed=None, max_attempts=1)
    async def parent(ctx: Context, children: int, failing: bool) -> int:
        try:
            async with ctx.nursery("fan-out") as nursery:
                later = child.options(delay=3600.0)
                handles = [nursery.invoke(later if failing else child, n) for n in range(children)]
                if failing:
                    nursery.invoke(child, n=-1, fails=True)
        except ExceptionGroup:
            note("caught")
            return 0
        return sum([await handle.result() for handle in handles])

    workers = [
        conductor.create_worker(queue=task.queue, tasks=[task], concurrency=concurrency) for task in (parent, child)
    ]
    orchestrator = Orchestrator(conductor, workers=workers, handle_signals=False, migrate=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        print("ready", flush=True)
        async with trio.lowlevel.FdStream(os.dup(0)) as standard_input:
            async for _ in standard_input:
                pass
        orchestrator.stop()


if __name__ == "__main__":
    trio.run(work, sys.argv[1], int(sys.argv[2]), sys.argv[3])
