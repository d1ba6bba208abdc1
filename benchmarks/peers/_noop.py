"""pgconductor's worker of no-op jobs: ``_noop.py DSN SETTINGS STARTS``; prints ``ready``, ends with its input."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import trio

from pgconductor import Conductor, Orchestrator, tune_garbage_collector

from .marks import Starts


async def work(dsn: str, settings: dict[str, Any], starts: Starts) -> None:
    conductor = Conductor(dsn)
    kept = {"keep_completed": settings.pop("keep_completed")} if "keep_completed" in settings else {}

    @conductor.task(queue="noop", **kept)
    async def noop(n: int) -> None:
        starts.add(n)

    worker = conductor.create_worker(queue="noop", tasks=[noop], **settings)
    orchestrator = Orchestrator(conductor, workers=[worker], handle_signals=False, migrate=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        tune_garbage_collector()  # as `pgconductor run` does
        print("ready", flush=True)
        async with trio.lowlevel.FdStream(os.dup(0)) as standard_input:
            async for _ in standard_input:
                pass
        orchestrator.stop()


def main() -> None:
    starts = Starts(sys.argv[3])
    try:
        trio.run(work, sys.argv[1], json.loads(sys.argv[2]), starts)
    finally:
        starts.close()


if __name__ == "__main__":
    main()
