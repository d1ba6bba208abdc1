"""A worker process for the benchmarks: prints ``ready`` when it claims, stops when its standard input ends.

For each line of its standard input it prints ``statistics`` and its workers' as a list in JSON, without the pickups.

Its tasks, all on one queue: `noop`; `stamp` writes its number and the time at which its handler started, then sleeps;
`hold` occupies a runner until a file exists. Each start is one `write` to a file opened for appending, so that it is
there even if the process is killed right after.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import trio

from pgconductor import Conductor, Orchestrator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("--queue", required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--sweep", type=float, required=True)
    parser.add_argument("--notify", required=True)
    parser.add_argument("--starts", type=Path, default=Path(os.devnull))
    parser.add_argument("--report-every", type=int, default=0)
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    starts = os.open(options.starts, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    conductor = Conductor(options.dsn)

    @conductor.task(queue=options.queue, keep_completed=None)
    async def noop(n: int = 0) -> None:
        pass

    @conductor.task(queue=options.queue, keep_completed=None)
    async def stamp(n: int, seconds: float = 0.0) -> None:
        os.write(starts, b"%d %d\n" % (n, time.monotonic_ns()))
        if seconds:
            await trio.sleep(seconds)

    @conductor.task(queue=options.queue, keep_completed=None)
    async def hold(until: str) -> None:
        while not await trio.Path(until).exists():  # noqa: ASYNC110  # another process makes it
            await trio.sleep(0.05)

    worker = conductor.create_worker(
        queue=options.queue, tasks=[noop, stamp, hold], concurrency=options.concurrency, sweep_interval=options.sweep,
        notify=options.notify,
    )  # fmt: skip
    orchestrator = Orchestrator(conductor, workers=[worker], handle_signals=False, migrate=False)
    if options.profile is None:
        trio.run(_serve, orchestrator, options.report_every)
    else:
        profile = cProfile.Profile()
        profile.runcall(trio.run, _serve, orchestrator, options.report_every)
        profile.dump_stats(options.profile)


async def _serve(orchestrator: Orchestrator, report_every: int) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        print("ready", flush=True)
        async with trio.open_nursery() as reporting:
            if report_every:
                reporting.start_soon(_report, orchestrator, report_every)
            async with trio.lowlevel.FdStream(os.dup(0)) as standard_input:
                async for chunk in standard_input:
                    for _ in range(chunk.count(b"\n")):
                        _print_statistics(orchestrator)
            reporting.cancel_scope.cancel()
        orchestrator.stop()


def _print_statistics(orchestrator: Orchestrator) -> None:
    workers = [asdict(replace(worker, pickups=())) for worker in orchestrator.statistics().workers]
    print("statistics", json.dumps(workers, separators=(",", ":")), flush=True)


async def _report(orchestrator: Orchestrator, every: int) -> None:
    """Print when each further `every` executions were flushed as completed, with the numbers of claims and flushes."""
    reported = 0
    while True:
        await trio.sleep(0.002)
        (worker,) = orchestrator.statistics().workers
        if worker.outcomes.get("completed", 0) >= reported + every:
            reported += every
            claims = worker.claims - worker.empty_claims
            print("completed", reported, time.monotonic_ns(), claims, worker.flushes, flush=True)


if __name__ == "__main__":
    main()
