"""A worker process that tests kill, stop and continue: `python program.py DSN JOURNAL OPTIONS` (JSON).

Its handlers write to the journal, a file that all processes of a test append to and that outlives them: one JSON object
a line, with the event, the execution's number, the process, and the time on the machine's monotonic clock. At its end
a process writes how many of its outcomes were `fenced` by the database and `dropped` by itself: n is that number.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time

import trio

from pgconductor import Conductor, Context, Orchestrator, Snooze
from pgconductor.retry import Exponential


def main(dsn: str, journal: str, options: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    given = json.loads(options)
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    conductor = Conductor(dsn)

    def write(event: str, n: int) -> None:
        entry = {"event": event, "n": n, "pid": os.getpid(), "at": time.monotonic()}
        os.write(file, (json.dumps(entry) + "\n").encode())

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

    worker = conductor.create_worker(
        queue="q",
        tasks=[nap, compute, stubborn, again, doze, poison],
        concurrency=given["concurrency"],
        sweep_interval=given["sweep"],
        flush_interval=given["flush"],
        claim_batch=given["batch"],
        flush_batch=given["batch"],
    )
    orchestrator = Orchestrator(
        conductor,
        workers=[worker],
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
        (statistics,) = orchestrator.statistics().workers
        write("fenced", statistics.fenced)
        write("dropped", statistics.dropped)

    trio.run(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
