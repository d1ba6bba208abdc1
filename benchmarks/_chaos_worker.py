"""A worker process of the soak: tasks that end in every way there is, and a witness file that outlives the process.

A line of the witness is one `write` to a file opened for appending: ``start|end EXECUTION ATTEMPT PID SECONDS`` (since
the epoch), so that it is there even if the process is killed right after. Once a second, and at the end, a line
``statistics PID JSON`` says what the engine has counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from pgconductor import (
    Conductor,
    Context,
    Exponential,
    NoRetry,
    Orchestrator,
    RetryAfter,
    Snooze,
    Task,
    Unavailable,
)

QUEUES = ("chaos-a", "chaos-b")
LEASE = 6.0
SWEEP = 2.0
GRACE = 3.0
CONCURRENCY = 20


class Broken(Exception):
    """What a handler raises on purpose."""


class Witness:
    """A file that shares neither the fate of the process nor of the database."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._pid = os.getpid()

    def note(self, event: str, ctx: Context) -> None:
        os.write(self._file, f"{event} {ctx.execution_id} {ctx.attempt} {self._pid} {time.time():.6f}\n".encode())

    def note_statistics(self, counts: dict[str, int | str | None]) -> None:
        os.write(self._file, f"statistics {self._pid} {json.dumps(counts)}\n".encode())

    @contextmanager
    def body(self, ctx: Context) -> Iterator[None]:
        self.note("start", ctx)
        try:
            yield
        finally:
            self.note("end", ctx)


def declare(conductor: Conductor, queue: str, witness: Witness) -> list[Task[..., Any]]:
    """The tasks of one queue; their names end with its last letter. All are kept for ever but `fleeting`."""
    letter = queue[-1]
    quick = Exponential(initial=0.1, maximum=0.5)

    @conductor.task(name=f"noop-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def noop(ctx: Context, key: str) -> str:
        with witness.body(ctx):
            return key

    @conductor.task(name=f"nap-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def nap(ctx: Context, key: str, seconds: float) -> str:
        with witness.body(ctx):
            await trio.sleep(seconds)
            return key

    @conductor.task(name=f"thread-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    def thread(ctx: Context, key: str, seconds: float) -> str:
        with witness.body(ctx):
            time.sleep(seconds)
            return key

    @conductor.task(name=f"flaky-{letter}", queue=queue, backoff=quick, keep_completed=None, keep_failed=None)
    async def flaky(ctx: Context, key: str, failures: int) -> str:
        with witness.body(ctx):
            if ctx.attempt <= failures:
                raise Broken(f"attempt {ctx.attempt} of {key}")
            return key

    @conductor.task(name=f"doomed-{letter}", queue=queue, backoff=quick, keep_completed=None, keep_failed=None)
    async def doomed(ctx: Context, key: str, how: str) -> str:
        with witness.body(ctx):
            match how:
                case "no retry":
                    raise NoRetry(f"{key} is hopeless")
                case "retry after":
                    raise RetryAfter(0.2, f"{key} wants a pause")
                case "unstorable":
                    return "\0"
                case "timeout":
                    await trio.sleep_forever()
                case _:
                    raise Broken(key)
        return key

    snoozed: set[object] = set()

    @conductor.task(name=f"snoozer-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def snoozer(ctx: Context, key: str) -> str:
        with witness.body(ctx):
            if ctx.execution_id not in snoozed:  # once per process that sees it
                snoozed.add(ctx.execution_id)
                raise Snooze(0.3)
            return key

    @conductor.task(name=f"fleeting-{letter}", queue=queue, keep_completed=0, keep_failed=0)
    async def fleeting(ctx: Context, key: str) -> str:
        with witness.body(ctx):
            return key

    @conductor.task(name=f"poison-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def poison(ctx: Context, key: str) -> str:
        with witness.body(ctx):
            os.kill(os.getpid(), signal.SIGKILL)
            return key

    return [noop, nap, thread, flaky, doomed, snoozer, fleeting, poison]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("--listen-dsn")
    parser.add_argument("--witness", type=Path, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    witness = Witness(options.witness)
    conductor = Conductor(options.dsn, listen_dsn=options.listen_dsn)
    workers = [
        conductor.create_worker(
            queue=queue, tasks=declare(conductor, queue, witness), concurrency=CONCURRENCY, sweep_interval=SWEEP
        )
        for queue in QUEUES
    ]
    orchestrator = Orchestrator(
        conductor, workers=workers, lease=LEASE, grace=GRACE, migrate=False, handle_signals=True
    )
    trio.run(_serve, orchestrator, witness)


async def _serve(orchestrator: Orchestrator, witness: Witness) -> None:
    while True:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_report, orchestrator, witness)
                await orchestrator.run()
                witness.note_statistics(_counts(orchestrator))
                nursery.cancel_scope.cancel()
            return
        except* Unavailable:  # at the start: a supervisor would start it again
            logging.warning("not started, or not all was written; again", exc_info=True)
            await trio.sleep(0.5)


async def _report(orchestrator: Orchestrator, witness: Witness) -> None:
    """Once a second, and as soon as there is another owner: who dies must be known by it."""
    owner, told_at = None, 0.0
    while True:
        await trio.sleep(0.02)
        now = orchestrator.statistics().owner
        if now != owner or trio.current_time() - told_at > 1.0:
            owner, told_at = now, trio.current_time()
            witness.note_statistics(_counts(orchestrator))


def _counts(orchestrator: Orchestrator) -> dict[str, int | str | None]:
    statistics = orchestrator.statistics()
    return {
        "owner": None if statistics.owner is None else str(statistics.owner),
        "incarnations": statistics.incarnations,
        "fences": statistics.fences,
        "successions": statistics.successions,
        "recovered": statistics.recovered,
        "fenced": sum(worker.fenced for worker in statistics.workers),
        "reconnects": sum(w.reactor.listener.reconnects for w in statistics.workers if w.reactor.listener is not None),
    }


if __name__ == "__main__":
    main()
