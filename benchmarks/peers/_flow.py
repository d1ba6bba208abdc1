"""pgconductor's worker: ``_flow.py DSN CONCURRENCY``; prints ``ready`` and ends with its input."""

from __future__ import annotations

import os
import sys

import trio

from pgconductor import Conductor, Context, Orchestrator, tune_garbage_collector


async def noop(number: int) -> dict[str, int]:
    return {"step": number}


async def work(dsn: str, concurrency: int) -> None:
    conductor = Conductor(dsn)

    @conductor.task(queue="flow", keep_completed=None)
    async def flow(ctx: Context, n: int, steps: int) -> dict[str, int]:
        done = 0
        for number in range(1, steps + 1):
            done = (await ctx.step(f"s{number}", noop, number))["step"]
        return {"n": n, "steps": done}

    worker = conductor.create_worker(queue="flow", tasks=[flow], concurrency=concurrency)
    orchestrator = Orchestrator(conductor, workers=[worker], handle_signals=False, migrate=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        tune_garbage_collector()  # as `pgconductor run` does
        print("ready", flush=True)
        async with trio.lowlevel.FdStream(os.dup(0)) as standard_input:
            async for _ in standard_input:
                pass
        orchestrator.stop()


if __name__ == "__main__":
    trio.run(work, sys.argv[1], int(sys.argv[2]))
