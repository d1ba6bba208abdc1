"""A worker process of the soak: tasks that end in every way there is, and a witness file that outlives the process.

A line of the witness is one `write` to a file opened for appending: ``start|end EXECUTION ATTEMPT PID SECONDS`` (since
the epoch), so that it is there even if the process is killed right after. ``step``, ``stepped`` and ``seen`` have a
NAME besides, and but for the first a HASH: a step begins to run, what it returned, and what the handler was told. Once
a second, and at the end, a line ``statistics PID JSON`` says what the engine has counted.

What a step returns is drawn anew each time it runs, so that a handler that is told another value is found out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio
from psycopg.rows import TupleRow

from pgconductor import (
    ChildError,
    Conductor,
    Context,
    Exponential,
    NoRetry,
    Orchestrator,
    RetryAfter,
    Snooze,
    Task,
    TrioConnection,
    Unavailable,
)

QUEUES = ("chaos-a", "chaos-b")
LEASE = 6.0
SWEEP = 2.0
GRACE = 3.0
CONCURRENCY = 20


# What the transactional steps write to: exactly one row for each.
EFFECTS = "create table if not exists chaos_effects (execution uuid not null, name text not null)"


def hashed(value: object) -> str:
    """Of a step's value, as the witness has it."""
    return hashlib.sha1(json.dumps(value).encode(), usedforsecurity=False).hexdigest()[:16]


class Broken(Exception):
    """What a handler raises on purpose."""


class Witness:
    """A file that shares neither the fate of the process nor of the database."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._pid = os.getpid()

    def note(self, event: str, ctx: Context, *words: str) -> None:
        line = " ".join((event, str(ctx.execution_id), str(ctx.attempt), str(self._pid), f"{time.time():.6f}", *words))
        os.write(self._file, f"{line}\n".encode())

    async def step(self, ctx: Context, name: str) -> None:
        """Have a step run, or be told what it returned."""

        async def draw() -> str:
            self.note("step", ctx, name)
            await trio.sleep(0.002)
            value = str(uuid4())
            self.note("stepped", ctx, name, hashed(value))
            return value

        self.note("seen", ctx, name, hashed(await ctx.step(name, draw)))

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

    @conductor.task(name=f"steps-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def steps(ctx: Context, key: str) -> str:
        with witness.body(ctx):
            for n in range(5):
                await witness.step(ctx, f"s{n}")
            return key

    @conductor.task(name=f"child-{letter}", queue=queue, backoff=quick, keep_completed=None, keep_failed=None)
    async def child(ctx: Context, key: str, name: str, fails: bool) -> str:
        with witness.body(ctx):
            await trio.sleep(0.01)
            if fails:
                raise NoRetry(f"{name} of {key}")
            return key

    @conductor.task(name=f"parent-{letter}", queue=queue, backoff=quick, keep_completed=None, keep_failed=None)
    async def parent(ctx: Context, key: str, fails: list[bool]) -> str:
        async def raise_one(name: str, is_bad: bool) -> None:
            with suppress(ChildError):
                await ctx.invoke(name, child, key=key, name=name, fails=is_bad)

        with witness.body(ctx):
            await witness.step(ctx, "before")
            async with trio.open_nursery() as nursery:
                for n, is_bad in enumerate(fails):
                    nursery.start_soon(raise_one, f"c{n}", is_bad)
            await witness.step(ctx, "after")
            return key

    @conductor.task(name=f"sleeper-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def sleeper(ctx: Context, key: str, seconds: float) -> str:
        with witness.body(ctx):
            await witness.step(ctx, "before")
            await ctx.sleep("nap", seconds)
            await witness.step(ctx, "after")
            return key

    async def charge(conn: TrioConnection[TupleRow], execution: str) -> str:
        await conn.execute("insert into chaos_effects values (%s, 'charge')", (execution,))
        return str(uuid4())

    @conductor.task(name=f"effect-{letter}", queue=queue, keep_completed=None, keep_failed=None)
    async def effect(ctx: Context, key: str) -> str:
        with witness.body(ctx):
            value = await ctx.transaction("charge", charge, str(ctx.execution_id), retry=3, timeout=5.0)
            witness.note("seen", ctx, "charge", hashed(value))
            await witness.step(ctx, "after")
            return key

    plain: list[Task[..., Any]] = [noop, nap, thread, flaky, doomed, snoozer, fleeting, poison]
    return [*plain, steps, child, parent, sleeper, effect]


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
