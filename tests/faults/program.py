"""A worker process that tests kill, stop and continue: `python program.py DSN JOURNAL OPTIONS` (JSON).

Its handlers write to the journal, a file that all processes of a test append to and that outlives them: one JSON object
a line, with the event, the execution's number, the process, and the time on the machine's monotonic clock; of a step or
child also its name and its value. At its end a process writes how many of its outcomes were `fenced` by the database
and `dropped` by itself: n is that number.

What a step returns is drawn anew each time it runs, so that whoever sees another value than the stored one is found
out.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from typing import Any
from uuid import uuid4

import trio

from pgconductor import ChildFailed, Conductor, Context, NoRetry, Orchestrator, Snooze, Task
from pgconductor.retry import Exponential


def main(dsn: str, journal: str, options: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    given = json.loads(options)
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    conductor = Conductor(dsn)

    def write(event: str, n: int, name: str = "", value: str = "") -> None:
        entry = {"event": event, "n": n, "pid": os.getpid(), "at": time.monotonic(), "name": name, "value": value}
        os.write(file, (json.dumps(entry) + "\n").encode())

    queues = given["queues"]

    @conductor.task(queue="q")
    async def nap(n: int, seconds: float) -> None:
        """Wait, as most handlers do."""
        write("start", n)
        await trio.sleep(seconds)
        write("end", n)

    @conductor.task(queue="q")
    async def compute(n: int, seconds: float, marker: str) -> None:
        """Block the event loop: in the process that makes the marker, the first."""
        write("start", n)
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            time.sleep(seconds)  # noqa: ASYNC251  # as a handler that computes would
        write("end", n)

    @conductor.task(queue="q")
    async def stubborn(n: int, gate: str) -> None:
        """Go on until the file `gate` is there, cancelled or not."""
        write("start", n)
        with trio.CancelScope(shield=True):
            while not await trio.Path(gate).exists():  # another process makes it
                await trio.sleep(0.02)
        write("end", n)

    @conductor.task(queue="q", max_attempts=3, backoff=Exponential(initial=0.05))
    async def again(ctx: Context, n: int) -> None:
        """Fail the first attempt."""
        write("start", n)
        if ctx.attempt == 1:
            raise ValueError("once more")
        write("end", n)

    @conductor.task(queue="q")
    async def doze(n: int, marker: str) -> None:
        """Ask to be run later; who makes the marker, the first, does."""
        write("start", n)
        try:
            os.close(os.open(f"{marker} {n}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            write("end", n)
        else:
            raise Snooze(0.05)

    @conductor.task(queue="q")
    async def poison(n: int, how: str) -> None:
        """Bring down the process."""
        write("start", n)
        await trio.sleep(0.05)  # so that others run beside it
        if how == "abort":
            os.abort()
        ctypes.string_at(0)

    async def work(n: int, name: str) -> str:
        """A step: it counts its runs."""
        write("step", n, name)
        await trio.sleep(0.001)
        return str(uuid4())

    async def do(ctx: Context, n: int, name: str) -> None:
        """Run a step and tell what came of it."""
        write("seen", n, name, await ctx.step(name, work, n, name))

    @conductor.task(queue="q")
    async def steps(ctx: Context, n: int, count: int) -> None:
        """Some steps, one after the other."""
        write("start", n)
        for number in range(count):
            await do(ctx, n, f"step {number}")
        write("end", n)

    @conductor.task(queue="q", max_attempts=1)
    async def offspring(n: int, name: str, value: str) -> str:
        """A child; the one named "bad" fails."""
        write("child", n, name, value)
        await trio.sleep(0.01)
        if name == "bad":
            raise NoRetry("on purpose")
        return value

    async def raise_one(ctx: Context, n: int, name: str) -> None:
        """Have a child, and tell what it ended with."""
        # The value is the parent's of this run: of two children under one name, the journal would show both.
        try:
            value = await ctx.invoke(name, offspring, n=n, name=name, value=str(uuid4()))
        except ChildFailed:
            value = "failed"
        write("seen", n, name, value)

    @conductor.task(queue="q")
    async def parent(ctx: Context, n: int) -> None:
        """Three children side by side, one of which fails; then a step."""
        write("start", n)
        async with trio.open_nursery() as nursery:
            for name in ("good", "bad", "better"):
                nursery.start_soon(raise_one, ctx, n, name)
        await do(ctx, n, "step 0")
        write("end", n)

    @conductor.task(queue="q")
    async def sleeper(ctx: Context, n: int, seconds: float) -> None:
        """Sleep between two steps."""
        write("start", n)
        await do(ctx, n, "step 0")
        await ctx.sleep("nap", seconds)
        await do(ctx, n, "step 1")
        write("end", n)

    async def twelve(ctx: Context, n: int) -> None:
        """Twelve operations, each with a commit of its own: see tests/faults/test_twelve_commits.py."""
        write("start", n)
        await do(ctx, n, "step 0")
        await do(ctx, n, "step 1")
        await ctx.sleep("nap", 0.1)
        await do(ctx, n, "step 2")
        await raise_one(ctx, n, "good")
        await do(ctx, n, "step 3")
        write("seen", n, "now-1", (await ctx.now()).isoformat())
        await do(ctx, n, "step 4")
        await raise_one(ctx, n, "bad")
        await do(ctx, n, "step 5")
        write("seen", n, "uuid-1", str(await ctx.uuid()))
        await do(ctx, n, "step 6")
        write("end", n)

    def workflow(queue: str) -> Task[..., Any]:
        """`twelve` on a queue of its own, so that a process that is to die has just one of them."""

        async def handler(ctx: Context, n: int) -> None:
            await twelve(ctx, n)

        return conductor.task(queue=queue, name=f"twelve-{queue}")(handler)

    tasks: list[Task[..., Any]] = [nap, compute, stubborn, again, doze, poison, steps, offspring, parent, sleeper]
    workers = [
        conductor.create_worker(
            queue=queue,
            tasks=tasks if queue == "q" else [workflow(queue)],
            concurrency=given["concurrency"],
            sweep_interval=given["sweep"],
            flush_interval=given["flush"],
            claim_batch=given["batch"],
            flush_batch=given["batch"],
        )
        for queue in queues
    ]
    orchestrator = Orchestrator(
        conductor,
        workers=workers,
        lease=given["lease"],
        grace=given["grace"],
        last_words=given["last_words"],
        migrate=False,
        handle_signals=True,
    )

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            write("ready", 0)
        statistics = orchestrator.statistics().workers
        write("fenced", sum(worker.fenced for worker in statistics))
        write("dropped", sum(worker.dropped for worker in statistics))

    trio.run(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
