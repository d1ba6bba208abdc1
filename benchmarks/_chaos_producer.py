"""A producer of the soak: invokes a seeded plan at a steady rate, and keeps a ledger that outlives everything else.

Lines of the ledger: ``intent KEY`` before the first try, ``try KEY`` before each, ``ack KEY EXECUTION`` once an id was
returned, ``cancel EXECUTION STATUS``. Ends by itself when its plan is done.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import trio

from pgconductor import Conductor, Task, Unavailable
from pgconductor.tasks import Invocation, TaskCall

from ._chaos_worker import QUEUES, Witness, declare

_BATCH = 50
_PATIENCE = 10.0  # seconds for an answer: what the proxy has swallowed, TCP takes for delivered


@dataclass(frozen=True)
class Item:
    """One invocation of the plan."""

    key: str
    task: str
    payload: dict[str, Any]
    options: dict[str, Any]
    cancel_after: float | None = None
    is_broken: bool = False  # its payload does not fit the handler


def plan(rng: random.Random, number: int, count: int, poisons: int) -> Iterator[Item]:
    """The invocations of one producer, in order. `poisons` of them kill the process that runs them."""
    poisonous = set(rng.sample(range(count), poisons))
    for n in range(count):
        key = f"{number}-{n}"
        letter = rng.choice(QUEUES)[-1]
        draw = rng.random()

        def item(task: str, letter: str = letter, key: str = key, **payload: Any) -> Item:
            return Item(key, f"{task}-{letter}", {"key": key, **payload}, {})

        if n in poisonous:
            yield item("poison")
        elif draw < 0.10:
            yield item("nap", seconds=rng.uniform(0.005, 0.05))
        elif draw < 0.15:
            yield item("nap", seconds=rng.uniform(0.1, 3.0))
        elif draw < 0.20:
            yield item("flaky", failures=rng.choice((1, 2)))
        elif draw < 0.23:
            how = rng.choice(("raise", "no retry", "retry after", "unstorable", "timeout"))
            doomed = item("doomed", how=how)
            yield Item(doomed.key, doomed.task, doomed.payload, {"timeout": 0.2} if how == "timeout" else {})
        elif draw < 0.26:
            nap = item("nap", seconds=2.0)
            yield Item(nap.key, nap.task, nap.payload, {}, cancel_after=rng.uniform(0.0, 1.0))
        elif draw < 0.28:
            noop = item("noop")
            yield Item(noop.key, noop.task, noop.payload, {"dedupe_key": f"hot-{rng.randrange(20)}"})
        elif draw < 0.30:
            noop = item("noop")
            yield Item(noop.key, noop.task, noop.payload, {"delay": rng.uniform(0.1, 5.0)})
        elif draw < 0.31:
            yield item("snoozer")
        elif draw < 0.32:
            yield item("fleeting")
        elif draw < 0.34:
            yield item("thread", seconds=rng.uniform(0.0, 0.05))
        elif draw < 0.35:
            noop = item("noop")
            yield Item(noop.key, noop.task, {"key": noop.key + " " + rng.randbytes(4000).hex()}, {})
        elif draw < 0.353:
            yield Item(key, f"noop-{letter}", {"key": {"not": key}}, {}, is_broken=True)
        elif draw < 0.553:
            yield item("steps")
        elif draw < 0.653:
            # Some are cancelled, most of these while they wait for their children.
            after = rng.uniform(0.0, 1.0) if rng.random() < 0.1 else None
            fails = [rng.random() < 0.2 for _ in range(3)]
            parent = item("parent", fails=fails, seconds=0.01 if after is None else 2.0)
            yield Item(parent.key, parent.task, parent.payload, {}, cancel_after=after)
        elif draw < 0.703:
            yield item("sleeper", seconds=rng.uniform(0.1, 3.0))
        elif draw < 0.803:
            yield item("effect")
        else:
            noop = item("noop")
            yield Item(noop.key, noop.task, noop.payload, {"priority": rng.choice((0, 0, 0, 1, 5))})


class Producer:
    def __init__(self, dsn: str, ledger: Path, rng: random.Random) -> None:
        self._conductor = conductor = Conductor(dsn)
        self._other = Conductor(dsn)  # declares no task, so it does not check what it sends
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._rng = rng
        witness = Witness(Path(os.devnull))
        self._tasks: dict[str, Task[..., Any]] = {
            task.name: task for queue in QUEUES for task in declare(conductor, queue, witness)
        }

    def _note(self, line: str) -> None:
        os.write(self._ledger, f"{line}\n".encode())

    async def run(self, items: Sequence[Item], seconds: float) -> None:
        begun = trio.current_time()
        async with self._conductor, self._other, trio.open_nursery() as nursery:
            limit = trio.CapacityLimiter(4)
            for first in range(0, len(items), _BATCH):
                await trio.sleep_until(begun + seconds * first / len(items))
                await limit.acquire_on_behalf_of(first)
                nursery.start_soon(self._produce, items[first : first + _BATCH], limit, first, nursery)

    async def _produce(
        self, items: Sequence[Item], limit: trio.CapacityLimiter, borrower: int, nursery: trio.Nursery
    ) -> None:
        """One batch: plain calls of a task in one statement, the others one by one."""
        try:
            for item in items:
                self._note(f"intent {item.key}")
            together: dict[str, list[Item]] = {}
            alone: list[Item] = []
            for item in items:
                if item.is_broken or item.cancel_after is not None or "dedupe_key" in item.options:
                    alone.append(item)
                else:
                    together.setdefault(item.task, []).append(item)
            for group in together.values():
                await self._invoke(group)
            for item in alone:
                (execution,) = await self._invoke([item])
                if item.cancel_after is not None:
                    nursery.start_soon(self._cancel, execution, item.cancel_after)
        finally:
            limit.release_on_behalf_of(borrower)

    async def _invoke(self, items: Sequence[Item]) -> list[UUID]:
        """Until it is acknowledged. A reply that was lost means that a key may stand in two executions."""
        task = self._tasks[items[0].task]
        while True:
            for item in items:
                self._note(f"try {item.key}")
            try:
                with trio.fail_after(_PATIENCE):
                    if items[0].is_broken:
                        handle = await self._other.invoke(items[0].task, items[0].payload, queue=task.queue)
                        invoked = [handle.id]
                    else:
                        calls = [self._call(task, item) for item in items]
                        invoked = [handle.id for handle in await task.invoke_many(calls)]
            except (Unavailable, trio.TooSlowError):
                await trio.sleep(self._rng.uniform(0.05, 0.5))
                continue
            for item, execution in zip(items, invoked, strict=True):
                self._note(f"ack {item.key} {execution}")
            return invoked

    def _call(self, task: Task[..., Any], item: Item) -> Invocation[Any]:
        target = cast("TaskCall[..., Any]", cast("Any", task).options(**item.options))
        return target.bind(**item.payload)

    async def _cancel(self, execution: UUID, after: float) -> None:
        await trio.sleep(after)
        while True:
            try:
                with trio.fail_after(_PATIENCE):
                    answers = await self._conductor.cancel(execution, reason="the soak changed its mind")
            except (Unavailable, trio.TooSlowError):
                await trio.sleep(self._rng.uniform(0.05, 0.5))
                continue
            self._note(f"cancel {execution} {answers[execution]}")
            return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--poisons", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    rng = random.Random(options.seed * 1000 + options.number)
    producer = Producer(options.dsn, options.ledger, rng)
    trio.run(producer.run, list(plan(rng, options.number, options.count, options.poisons)), options.seconds)


if __name__ == "__main__":
    main()
