"""A worker process of any version of the program: `python deploy_program.py DSN JOURNAL NAME LEASE`.

Written so that the program of schema version 1 can run it too. Its handler appends a line to the journal, a file that
all processes share, when it begins and when it has ended: the event, the execution's number, the process's name.
"""

from __future__ import annotations

import logging
import os
import sys

import trio

from pgconductor import Conductor, Orchestrator


def main(dsn: str, journal: str, name: str, lease: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    conductor = Conductor(dsn)

    @conductor.task(queue="q")
    async def note(n: int) -> int:
        """Leave two lines."""
        os.write(file, f"start {n} {name}\n".encode())
        await trio.sleep(0.01)
        os.write(file, f"end {n} {name}\n".encode())
        return n

    worker = conductor.create_worker(queue="q", tasks=[note], concurrency=4, claim_batch=8, sweep_interval=0.5)
    orchestrator = Orchestrator(
        conductor, workers=[worker], lease=float(lease), grace=5.0, migrate=False, handle_signals=True
    )

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            os.write(file, f"ready 0 {name}\n".encode())

    trio.run(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
