"""When a handler is given up to wait: not while a part of it is about to go on. On a journal of the test's own."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import trio
import trio.testing

from pgconductor.codec import Limits
from pgconductor.durable import SETTLE, Durable, Place, Saved, locate
from pgconductor.model import Record

SLOW = 5 * SETTLE  # what the database takes
NOTHING: Mapping[str, object] = {}


class Journal:
    """Begins every wait, and tells of those that `resolve` was called for, once; each call takes its time."""

    def __init__(self) -> None:
        self._resolved: list[Record] = []
        self.delay = SLOW

    def resolve(self, name: str) -> None:
        self._resolved.append(Record(name, "", 0, 0, "completed", value="1"))

    async def load(self) -> list[Record]:
        return []

    async def admit(self, name: str, kind: str) -> None:
        pass

    async def save_step(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        await trio.sleep(self.delay)
        return Saved(value, error)

    async def start_waits(self, waits: Sequence[Mapping[str, object]]) -> list[Record]:
        return [Record(str(wait["name"]), str(wait["kind"]), 0, 1, None) for wait in waits]

    async def read_waits(self) -> list[Record] | None:
        await trio.sleep(self.delay)
        told, self._resolved = self._resolved, []
        return told

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        pass


class Attempt:
    """Runs a handler with a durable context of its own; `durable.Suspender`."""

    is_draining = False

    def __init__(self) -> None:
        self.journal = Journal()
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None
        self.suspended_at: float | None = None
        self.durable = Durable(
            1, self.journal, self, trio.CapacityLimiter(1), random.Random(), Limits(), _no_row, _no_call
        )

    @property
    def is_unwinding(self) -> bool:
        return self.scope.cancel_called

    def suspend(self) -> None:
        self.suspended_at = trio.current_time()
        self.scope.cancel()

    def give_way(self) -> None:
        self.scope.cancel()

    def continue_as_new(self, payload: str, version: str | None) -> None:
        self.scope.cancel()

    def locate(self) -> Place:
        return locate(self.scope, math.inf)

    async def run(self, handler: Callable[[], Awaitable[None]]) -> None:
        with self.scope:
            self.task = trio.lowlevel.current_task()
            await handler()


def _no_row(call: Any) -> Mapping[str, object]:
    raise AssertionError("no children here")


def _no_call(arguments: dict[str, Any]) -> Any:
    raise AssertionError("does not go on as new")


async def test_end_of_a_long_operation_lets_the_handler_begin_the_next(autojump_clock: trio.testing.MockClock) -> None:
    """A branch waits beside a step that takes long: given up at its end, the handler waits for what it would cancel."""
    attempt = Attempt()
    done: list[str] = []

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt.durable.wait, "long", "long", "sleep", NOTHING)
            await attempt.durable.step("one", int, (), None, None)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        done.append("cancelled the sleep")
        await attempt.durable.step("two", int, (), None, None)
        done.append("two")

    for _ in range(20):  # in which order tasks run is left to chance
        attempt, done = Attempt(), []
        await attempt.run(handler)
        assert done == ["cancelled the sleep", "two"]
        assert attempt.suspended_at is None


async def test_one_that_was_told_goes_on_before_the_others_give_up(autojump_clock: trio.testing.MockClock) -> None:
    """What is resolved is told once: given up right then, the execution waits for ever for what has come."""
    attempt = Attempt()
    done: list[str] = []

    async def child() -> None:
        await attempt.durable.wait("child", "child", "child", {})
        done.append("child")
        await attempt.durable.step("after", int, (), None, None)
        done.append("after")

    async def resolver() -> None:
        await trio.sleep(SETTLE / 2)
        attempt.journal.resolve("child")
        attempt.durable.nudge()

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt.durable.wait, "long", "long", "sleep", NOTHING)
            await trio.testing.wait_all_tasks_blocked()  # so it is the one that asks, and that watches
            nursery.start_soon(child)
            nursery.start_soon(resolver)

    for _ in range(20):
        attempt, done = Attempt(), []
        await attempt.run(handler)
        assert done == ["child", "after"]
        assert attempt.suspended_at is not None


async def test_handler_that_only_waits_is_given_up_soon(autojump_clock: trio.testing.MockClock) -> None:
    """A slot is kept by who waits, which is what waiting is to spare."""
    attempt = Attempt()

    async def handler() -> None:
        await attempt.durable.step("one", int, (), None, None)
        await attempt.durable.wait("long", "long", "sleep", {})

    began = trio.current_time()
    await attempt.run(handler)
    assert attempt.suspended_at is not None
    assert SETTLE <= attempt.suspended_at - began - SLOW < 2 * SETTLE
