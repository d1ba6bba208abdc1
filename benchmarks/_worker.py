"""A worker process for the benchmarks: prints ``ready`` when it claims, stops when its standard input ends.

Its tasks: `noop`, and `plain`, the same as a plain function, which runs in a thread; `pause` sleeps 10 ms; `stamp`
writes its number and the time at which its handler started, then sleeps; `hold` occupies a runner until a file exists.
Each start is one `write` to a file opened for appending, so that it is there even if the process is killed right after.
With ``--batch-size`` there is only `batch` instead, a no-op that takes so many at once.
With ``--named-by-queue`` they are `noop.QUEUE` and so on, as a process of several queues needs.

With ``--report-interval`` it looks that often at what it has done, and prints when more executions were flushed as
completed: ``completed NUMBER TIME CLAIMS EMPTY SHORT FLUSHES``, all of them since its start, over all its queues. A
line ``claims`` on standard input is answered by ``claims`` and how long the claims since the last such line took, in
seconds, at most the latest 2000 of each queue; a line ``statistics`` by ``statistics`` and its workers' as a list in
JSON, without what there is of each execution and claim.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import trio

from pgconductor import Conductor, Orchestrator, Task, tune_garbage_collector


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("--queues", required=True, help="separated by commas")
    parser.add_argument("--concurrency", type=int, required=True, help="of each queue")
    parser.add_argument("--sweep", type=float, required=True)
    parser.add_argument("--notify", required=True)
    parser.add_argument("--starts", type=Path, default=Path(os.devnull))
    parser.add_argument("--report-interval", type=float, default=0.0)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--batch", type=int, help="rows of a claim and of a flush at most; else the engine's sizes")
    parser.add_argument("--batch-size", type=int, help="have only the task `batch`, of so many executions at most")
    parser.add_argument("--keep-no-rows", action="store_true")
    parser.add_argument("--named-by-queue", action="store_true")
    options = parser.parse_args()
    starts = os.open(options.starts, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    conductor = Conductor(options.dsn)
    keep = 0 if options.keep_no_rows else None
    workers = [
        conductor.create_worker(
            queue=queue,
            tasks=declare_tasks(
                conductor, queue, f".{queue}" if options.named_by_queue else "", keep, starts, options.batch_size
            ),
            concurrency=options.concurrency, sweep_interval=options.sweep, notify=options.notify,
            claim_batch=options.batch, flush_batch=options.batch,
        )
        for queue in options.queues.split(",")
    ]  # fmt: skip
    orchestrator = Orchestrator(conductor, workers=workers, handle_signals=False, migrate=False)
    if options.profile is None:
        trio.run(_serve, orchestrator, options.report_interval)
    else:
        profile = cProfile.Profile()
        profile.runcall(trio.run, _serve, orchestrator, options.report_interval)
        profile.dump_stats(options.profile)


def declare_tasks(
    conductor: Conductor, queue: str, suffix: str, keep: float | None, starts: int, batch_size: int | None
) -> list[Task[..., Any]]:
    """Declare this process's tasks on a queue. `keep`: seconds for finished rows; `starts`: the file for `stamp`."""
    if batch_size is not None:

        @conductor.batch_task(name=f"batch{suffix}", queue=queue, keep_completed=keep, size=batch_size)
        async def batch(items: list[int]) -> None:
            pass

        return [batch]

    @conductor.task(name=f"noop{suffix}", queue=queue, keep_completed=keep)
    async def noop(n: int = 0) -> None:
        pass

    @conductor.task(name=f"plain{suffix}", queue=queue, keep_completed=keep)
    def plain(n: int = 0) -> None:
        pass

    @conductor.task(name=f"pause{suffix}", queue=queue, keep_completed=keep)
    async def pause() -> None:
        await trio.sleep(0.01)

    @conductor.task(name=f"stamp{suffix}", queue=queue, keep_completed=keep)
    async def stamp(n: int, seconds: float = 0.0) -> None:
        os.write(starts, b"%d %d\n" % (n, time.monotonic_ns()))
        if seconds:
            await trio.sleep(seconds)

    @conductor.task(name=f"hold{suffix}", queue=queue, keep_completed=keep)
    async def hold(until: str) -> None:
        while not await trio.Path(until).exists():  # noqa: ASYNC110  # another process makes it
            await trio.sleep(0.05)

    return [noop, plain, pause, stamp, hold]


async def _serve(orchestrator: Orchestrator, report_interval: float) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        tune_garbage_collector()  # as `pgconductor run` does
        print("ready", flush=True)
        async with trio.open_nursery() as reporting:
            if report_interval:
                reporting.start_soon(_report, orchestrator, report_interval)
            await _answer(orchestrator)
            reporting.cancel_scope.cancel()
        orchestrator.stop()


def _print_statistics(orchestrator: Orchestrator) -> None:
    workers = [asdict(replace(worker, pickups=(), claim_seconds=())) for worker in orchestrator.statistics().workers]
    print("statistics", json.dumps(workers, separators=(",", ":")), flush=True)


async def _answer(orchestrator: Orchestrator) -> None:
    """Do what standard input says until its end."""
    told = [0] * len(orchestrator.statistics().workers)
    rest = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as standard_input:
        async for some in standard_input:
            *lines, rest = (rest + some).split(b"\n")
            for line in lines:
                if line == b"claims":
                    _tell_claims(orchestrator, told)
                elif line == b"statistics":
                    _print_statistics(orchestrator)


async def _report(orchestrator: Orchestrator, interval: float) -> None:
    reported = 0
    while True:
        await trio.sleep(interval)
        workers = orchestrator.statistics().workers
        completed = sum(worker.outcomes.get("completed", 0) for worker in workers)
        if completed > reported:
            reported = completed
            print(
                "completed", completed, time.monotonic_ns(), sum(worker.claims for worker in workers),
                sum(worker.empty_claims for worker in workers), sum(worker.short_claims for worker in workers),
                sum(worker.flushes for worker in workers), flush=True,
            )  # fmt: skip


def _tell_claims(orchestrator: Orchestrator, told: list[int]) -> None:
    """Print the durations of the claims since the last time; `told`: how many there were then, by worker."""
    words = ["claims"]
    for index, worker in enumerate(orchestrator.statistics().workers):
        news = worker.claim_seconds[-(worker.claims - told[index]) :] if worker.claims > told[index] else ()
        words += [f"{seconds:.6f}" for seconds in news]
        told[index] = worker.claims
    print(*words, flush=True)


if __name__ == "__main__":
    main()
