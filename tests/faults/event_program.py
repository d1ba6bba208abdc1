"""A worker process that is to be killed: `python event_program.py DSN`, with PGCONDUCTOR_FAILPOINTS."""

from __future__ import annotations

import sys
from uuid import UUID

import trio

from pgconductor import Conductor, Context, Orchestrator


def make_orchestrator(dsn: str) -> Orchestrator:
    conductor = Conductor(dsn)

    @conductor.task(name="relay", queue="q", max_attempts=1)
    async def relay(ctx: Context, n: int, receiver: str) -> list[int]:
        """Wait for an event, then send one, and a message; the promise is resolved by whoever sees its id."""
        promise = await ctx.promise("p")
        await ctx.emit("announce", "made", {"n": n, "promise": str(promise.id)})
        async with await ctx.open_channel("heard") as heard:
            first = await ctx.wait_for_event("go", match={"n": n}, type=dict[str, int])
            await heard.send(first["value"])
            await ctx.send("pass on", UUID(receiver), "relayed", n)
            second = await promise.result(type=int)
            await heard.send(second)
        return [first["value"], second]

    @conductor.task(name="collect", queue="q", max_attempts=1)
    async def collect(ctx: Context, count: int) -> list[int]:
        return [await ctx.receive(f"m{i}", "relayed", type=int) for i in range(count)]

    worker = conductor.create_worker(queue="q", tasks=[relay, collect], sweep_interval=0.3, flush_interval=0.02)
    return Orchestrator(conductor, workers=[worker], lease=1.6, migrate=False, handle_signals=False)


if __name__ == "__main__":
    trio.run(make_orchestrator(sys.argv[1]).run)
