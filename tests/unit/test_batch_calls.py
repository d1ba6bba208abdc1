"""One call of a handler of batches and the outcome of each execution, without a database.

Times are the mock clock's, which jumps when everything waits; a thread that waits counts as waiting.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from pgconductor.batch_context import BatchContext
from pgconductor.conductor import Conductor
from pgconductor.errors import HandlerCancelled, NoRetry, RetryAfter, Snooze
from pgconductor.model import Claimed, Outcome
from pgconductor.runtime.batch import Call, Member
from pgconductor.runtime.execution import Berth
from pgconductor.tasks import Task

Clock = trio.testing.MockClock


class Bench:
    """A task whose handler is called with the items 0, 1, ...; `outcomes` are in their order, and `settled` tells in
    which order and when they came.
    """

    def __init__(self, handler: Callable[..., Any], *, timeout: float | None = None, max_attempts: int = 3) -> None:
        declare: Any = Conductor("postgresql://nobody").batch_task(
            size=10, timeout=timeout, max_attempts=max_attempts, backoff=7.0
        )
        self.task: Task[..., Any] = declare(handler)
        self.call = Call(self.task, "default", {}, random.Random(0))
        self.outcomes: list[Outcome | None] = []
        self.settled: list[tuple[int, float]] = []
        self.large: dict[UUID, Callable[[], Awaitable[str | None]]] = {}

    def add(
        self,
        payload: str | None = "",
        *,
        attempt: int = 1,
        timeout: float | None = None,
        deadline_in: float | None = None,
    ) -> Member:
        number = len(self.outcomes)
        self.outcomes.append(None)
        text = json.dumps({"item": number}) if payload == "" else payload
        claimed = Claimed(UUID(int=number), 1, self.task.name, attempt, None, text, 0.0, timeout, deadline_in)

        def settle(outcome: Outcome | None) -> None:
            assert outcome is None or outcome.id == claimed.id
            self.outcomes[number] = outcome
            self.settled.append((number, trio.current_time()))

        return self.call.add(claimed, trio.current_time(), settle)

    async def run(self) -> None:
        """One attempt, as the worker makes it; and the berth serves the next as well as before."""
        with Berth() as berth:
            await self.call.attempt(lambda claimed: self.large[claimed.id], trio.CapacityLimiter(2), berth)
            assert sorted(number for number, _ in self.settled) == list(range(len(self.outcomes)))
            await trio.sleep(1000)  # nothing of the call cancels what comes after
            return
        raise AssertionError("cancelled, and the scope was not left")

    @property
    def ends(self) -> list[tuple[str, str | None]]:
        """Kind, and type of the error."""
        return [_end(outcome) for outcome in self.outcomes]


def _end(outcome: Outcome | None) -> tuple[str, str | None]:
    assert outcome is not None
    return outcome.kind, None if outcome.error is None else json.loads(outcome.error)["type"]


RELEASED = ("released", None)
CANCELLED = ("cancelled", None)
COMPLETED = ("completed", None)


async def sleeps(items: list[int]) -> list[int]:
    await trio.sleep(100)
    return items


async def test_time_is_the_least_that_any_has_left(autojump_clock: Clock) -> None:
    """Those whose limits are up in the same millisecond have run out of time together."""
    bench = Bench(sleeps, timeout=50.0)
    bench.add()
    bench.add(timeout=10.0)
    bench.add(timeout=10.0005)
    bench.add(timeout=10.1)
    bench.add(deadline_in=10.0)
    bench.add(deadline_in=60.0)
    await bench.run()
    assert bench.ends == [
        RELEASED, ("retried", "timeout"), ("retried", "timeout"), RELEASED, ("failed", "deadline"), RELEASED,
    ]  # fmt: skip
    assert {at for _, at in bench.settled} == {10.0}


async def test_whoever_is_in_time_has_completed(autojump_clock: Clock) -> None:
    """No timer of the call goes on after it."""
    bench = Bench(sleeps)
    bench.add(timeout=101.0)
    bench.add()
    await bench.run()
    assert bench.ends == [COMPLETED, COMPLETED]


async def test_requested_cancellation_comes_before_the_timeout(autojump_clock: Clock) -> None:
    """It is final."""
    bench = Bench(sleeps)
    first = bench.add(timeout=10.0)
    bench.add(timeout=10.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await trio.sleep(5)
        first.cancel()
    assert bench.ends == [CANCELLED, ("retried", "timeout")]


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (ValueError("x"), ("retried", "ValueError")),
        (NoRetry("x"), ("failed", "pgconductor.errors.NoRetry")),
        (RetryAfter(5.0), ("retried", "pgconductor.errors.RetryAfter")),
        (Snooze(5.0), RELEASED),
        (ExceptionGroup("", [ValueError(), NoRetry("x")]), ("failed", "pgconductor.errors.NoRetry")),
        (SystemExit(1), ("retried", "SystemExit")),
        (HandlerCancelled("of its own"), ("retried", "pgconductor.errors.HandlerCancelled")),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_raised", [True, False], ids=["raised", "answered"])
async def test_errors_mean_what_they_mean_of_a_single_one(
    autojump_clock: Clock, error: BaseException, end: tuple[str, str | None], is_raised: bool
) -> None:
    """Raised by the handler they are everybody's, as an answer one's own."""

    async def handler(items: list[int]) -> list[Any]:
        if is_raised:
            raise error
        return [error if item == 1 else item for item in items]

    bench = Bench(handler)
    for _ in range(3):
        bench.add()
    await bench.run()
    assert bench.ends == ([end] * 3 if is_raised else [COMPLETED, end, COMPLETED])


async def test_what_cannot_begin_has_ended_before_the_handler_begins(autojump_clock: Clock) -> None:
    """A payload that does not fit, a deadline that has passed, a cancellation: none waits for the others."""
    seen: list[list[int]] = []

    async def handler(items: list[int]) -> list[int]:
        seen.append(items)
        return await sleeps(items)

    bench = Bench(handler)
    bench.add()
    bench.add('{"item": "x"}')
    bench.add(deadline_in=-1.0)
    bench.add().cancel()
    bench.add()
    await bench.run()
    assert seen == [[0, 4]]
    assert bench.ends == [
        COMPLETED, ("failed", "pgconductor.errors.InvalidPayload"), ("failed", "deadline"), CANCELLED, COMPLETED,
    ]  # fmt: skip
    assert dict(bench.settled) == {0: 100.0, 1: 0.0, 2: 0.0, 3: 0.0, 4: 100.0}


async def test_handler_is_not_called_for_nobody(autojump_clock: Clock) -> None:
    """All that were claimed have been cancelled meanwhile."""

    async def handler(items: list[int]) -> None:
        raise AssertionError("called")

    bench = Bench(handler)
    for _ in range(2):
        bench.add().cancel("why")
    await bench.run()
    assert bench.ends == [CANCELLED, CANCELLED]


async def test_large_payloads_are_loaded_before_and_a_lost_one_is_left_out(autojump_clock: Clock) -> None:
    """None says that the execution is not ours any more."""
    seen: list[list[int]] = []

    async def handler(items: list[int]) -> None:
        seen.append(items)

    async def slowly() -> str:
        await trio.sleep(5)
        return '{"item": 70}'

    async def lost() -> None:
        return None

    bench = Bench(handler)
    for loader in (slowly, lost):
        bench.large[bench.add(None).claimed.id] = loader
    bench.add()
    await bench.run()
    assert seen == [[70, 2]]
    assert bench.ends == [COMPLETED, RELEASED, COMPLETED]


@pytest.mark.parametrize("what", ["stop", "cancel all", "cancel one", "lose all"])
async def test_interruption_while_payloads_are_loaded(autojump_clock: Clock, what: str) -> None:
    """Nothing has begun: it goes back or has ended, and the one that is left runs."""
    seen: list[list[int]] = []

    async def handler(items: list[int]) -> None:
        seen.append(items)

    async def slowly() -> str:
        await trio.sleep(5)
        return '{"item": 70}'

    bench = Bench(handler)
    members = [bench.add(None), bench.add(None), bench.add()]
    for member in members[:2]:
        bench.large[member.claimed.id] = slowly
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await trio.sleep(2)
        match what:
            case "stop":
                members[1].stop()
            case "cancel one":
                members[1].cancel()
            case "cancel all":
                for member in members:
                    member.cancel()
            case _:
                for member in members:
                    member.abandon()
    assert (seen, bench.ends) == {
        "stop": ([], [RELEASED] * 3),
        "cancel all": ([], [CANCELLED] * 3),
        "cancel one": ([[70, 2]], [COMPLETED, CANCELLED, COMPLETED]),
        "lose all": ([], [RELEASED] * 3),
    }[what]


async def test_cancelled_and_lost_members_together_leave_nobody(autojump_clock: Clock) -> None:
    """The handler is interrupted though not all were asked for."""
    bench = Bench(sleeps)
    first, second = bench.add(), bench.add()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await trio.sleep(1)
        first.abandon()
        await trio.sleep(1)
        assert not bench.settled
        second.cancel("why")
    assert bench.ends == [RELEASED, CANCELLED]
    assert {at for _, at in bench.settled} == {2.0}


async def test_stop_is_the_same_for_all_but_those_to_be_cancelled(autojump_clock: Clock) -> None:
    """A requested cancellation is final."""
    bench = Bench(sleeps)
    first, second = bench.add(), bench.add()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await trio.sleep(1)
        first.cancel()
        for member in (first, second):
            member.stop()
    assert bench.ends == [CANCELLED, RELEASED]


async def test_thread_is_told_of_one_and_of_all(autojump_clock: Clock) -> None:
    """From its own thread: one item at once, the batch when all are to end."""
    told: list[tuple[bool, bool, bool]] = []
    steps = [threading.Event() for _ in range(3)]

    def handler(ctx: BatchContext, items: list[int]) -> None:
        for step in steps:
            assert step.wait(20)
            told.append((ctx.items[0].is_cancelled, ctx.items[1].is_cancelled, ctx.is_cancelled))
            step.clear()
        ctx.check_cancelled()

    bench = Bench(handler)
    first, second = bench.add(), bench.add()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        for number, member in enumerate((None, first, second)):
            if member is not None:
                member.cancel()
            steps[number].set()
            while len(told) <= number:
                await trio.sleep(0.001)
    assert told == [(False, False, False), (True, False, False), (True, True, True)]
    assert bench.ends == [CANCELLED, CANCELLED]


async def test_abandoned_thread_leaves_nobody_settled_with_an_outcome(autojump_clock: Clock) -> None:
    """It may run on: the claims may only lapse."""
    begun, end = threading.Event(), threading.Event()

    def handler(items: list[int]) -> None:
        begun.set()
        end.wait(20)

    bench = Bench(handler)
    members = [bench.add(), bench.add()]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        while not begun.is_set():
            await trio.sleep(0.001)
        for member in members:
            member.abandon()
    assert bench.outcomes == [None, None]
    assert all(member.is_body_running for member in members)
    end.set()


async def test_keyboard_interrupt_leaves_them_to_the_worker(autojump_clock: Clock) -> None:
    """It is no data."""

    async def handler(items: list[int]) -> None:
        raise KeyboardInterrupt

    bench = Bench(handler)
    bench.add()
    with pytest.raises(KeyboardInterrupt):
        await bench.run()
    assert bench.settled == []
