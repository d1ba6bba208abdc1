"""One attempt and its outcome, without a database: every way to end, and who may interrupt whom.

Times are the mock clock's, which jumps when everything waits; a thread that waits counts as waiting.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias, TypeVar, cast
from uuid import UUID

import psycopg
import pytest
import trio
import trio.testing

from pgconductor.context import Context
from pgconductor.errors import HandlerCancelled, NoRetry, RetryAfter, Snooze
from pgconductor.handle import Handle, SyncHandle
from pgconductor.model import Claimed, Outcome
from pgconductor.retry import BackoffLike
from pgconductor.runtime.execution import Berth, Interruption, attempt, cancelled, failed, released
from pgconductor.tasks import Invocation, Task, Tasks

R = TypeVar("R")
Clock: TypeAlias = trio.testing.MockClock
ID = UUID(int=1)
KEPT, FAILED = 11.0, 22.0  # seconds, by which the outcomes' retention is recognised


class Declaring(Tasks):
    """A conductor that cannot invoke."""

    async def invoke_many(
        self, calls: Sequence[Invocation[R]], conn: psycopg.AsyncConnection[Any] | None
    ) -> list[Handle[R]]:
        raise NotImplementedError

    def invoke_many_sync(
        self, calls: Sequence[Invocation[R]], conn: psycopg.Connection[Any] | None
    ) -> list[SyncHandle[R]]:
        raise NotImplementedError


def a_task(
    handler: Callable[..., Any],
    *,
    timeout: float | None = None,
    backoff: BackoffLike = 7.0,
    max_attempts: int = 3,
) -> Task[..., Any]:
    return Declaring().task(
        timeout=timeout, backoff=backoff, max_attempts=max_attempts, keep_completed=KEPT, keep_failed=FAILED
    )(handler)


def a_claim(*, attempt: int = 1, timeout: float | None = None, deadline_in: float | None = None) -> Claimed:
    return Claimed(ID, 5, "handler", attempt, None, "{}", 0.0, timeout, deadline_in)


async def run(
    handler: Callable[..., Any] | Task[..., Any],
    claimed: Claimed | None = None,
    interruption: Interruption | None = None,
    *,
    payload: str | Callable[[], Awaitable[str | None]] = "{}",
    received_at: float | None = None,
) -> Outcome | None:
    """One attempt of a handler, as the worker makes it."""
    task: Task[..., Any] = cast("Task[..., Any]", handler) if isinstance(handler, Task) else a_task(handler)
    ctx = Context(ID, 1, task=task.name, queue="default", resources={})
    with Berth() as berth:
        return await attempt(
            task,
            claimed or a_claim(),
            payload,
            ctx,
            trio.CapacityLimiter(2),
            random.Random(0),
            interruption or Interruption(),
            berth,
            received_at,
        )
    raise AssertionError("cancelled, and the scope was not left")


def error_of(outcome: Outcome | None) -> dict[str, str]:
    assert outcome is not None
    assert outcome.error is not None
    return json.loads(outcome.error)  # type: ignore[no-any-return]


def summary(outcome: Outcome | None) -> tuple[str, str | None]:
    """Kind and type of error."""
    assert outcome is not None
    return outcome.kind, None if outcome.error is None else error_of(outcome)["type"]


async def sleeps() -> str:
    await trio.sleep(100)
    return "slept"


async def fails() -> NoReturn:
    raise ValueError("bad")


# --- how an attempt ends by itself -----------------------------------------------------------------------------------


async def test_what_a_handler_returns_is_kept_as_long_as_completed_ones_are(autojump_clock: Clock) -> None:
    """The result would be lost, or kept as long as a failure."""

    async def handler() -> int:
        return 5

    assert await run(handler) == Outcome(ID, 5, "completed", "5", keep=KEPT)


async def test_what_a_plain_handler_returns_is_its_result(autojump_clock: Clock) -> None:
    """A value from a thread would be taken for something else, such as a pair for value and error."""

    def handler() -> tuple[int, None]:
        return 5, None

    assert await run(handler) == Outcome(ID, 5, "completed", "[5,null]", keep=KEPT)


async def test_a_handler_may_return_nothing(autojump_clock: Clock) -> None:
    """None would be taken for a handler that was cancelled."""

    async def handler() -> None:
        return None

    def plain() -> None:
        return None

    assert summary(await run(handler)) == summary(await run(plain)) == ("completed", None)


async def test_what_a_handler_raises_is_retried_after_the_back_off(autojump_clock: Clock) -> None:
    """An error would be final at once, or end the worker."""
    outcome = await run(fails)
    assert outcome is not None
    assert (outcome.kind, outcome.delay, outcome.keep, outcome.claim_no) == ("retried", 7.0, FAILED, 5)
    assert error_of(outcome)["message"] == "bad"
    assert "in fails" in error_of(outcome)["traceback"]
    last = await run(fails, a_claim(attempt=3))
    assert last is not None
    assert (last.kind, last.delay, last.keep) == ("failed", 0.0, FAILED)


async def test_a_plain_handlers_error_tells_where_it_was(autojump_clock: Clock) -> None:
    """The traceback would end in the engine."""

    def handler() -> None:
        raise ValueError("bad")

    error = error_of(await run(handler))
    assert (error["type"], error["message"]) == ("ValueError", "bad")
    assert "in handler" in error["traceback"]


class Strange(BaseException):
    """Not an `Exception`, as `asyncio.CancelledError` is not."""


@pytest.mark.parametrize("error", [SystemExit(3), Strange("odd")], ids=["SystemExit", "BaseException"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("plain", [False, True])
async def test_no_error_but_ctrl_c_ends_the_worker(
    autojump_clock: Clock, error: BaseException, grouped: bool, plain: bool
) -> None:
    """One handler that calls sys.exit(), or a library's own kind of cancellation, would end the process for all, and
    again when it is tried again.
    """
    raised = BaseExceptionGroup("group", [error]) if grouped else error

    async def handler() -> None:
        raise raised

    def plain_handler() -> None:
        raise raised

    assert summary(await run(plain_handler if plain else handler))[0] == "retried"


class Unaskable(Exception):
    """Fails whoever looks at it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("boom")


@pytest.mark.parametrize("grouped", [False, True])
async def test_an_exception_that_cannot_be_asked_anything_is_data_all_the_same(
    autojump_clock: Clock, grouped: bool
) -> None:
    """Even asking for its class would raise, in the engine."""

    async def handler() -> None:
        raise ExceptionGroup("group", [Unaskable()]) if grouped else Unaskable()

    assert summary(await run(handler)) == ("retried", "RuntimeError")


@pytest.mark.parametrize("plain", [False, True])
async def test_ctrl_c_in_a_handler_is_no_data(autojump_clock: Clock, plain: bool) -> None:
    """The process could not be stopped from the keyboard while a handler runs."""

    async def handler() -> None:
        raise KeyboardInterrupt

    def plain_handler() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await run(plain_handler if plain else handler)

    async def in_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handler)
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await run(in_nursery)
    assert caught.value.subgroup(KeyboardInterrupt) is not None


async def test_a_stray_cancelled_is_a_failure_of_the_handler(autojump_clock: Clock) -> None:
    """A handler that raises a `Cancelled` it kept from elsewhere would end the process: no scope catches it."""
    kept: list[BaseException] = []

    async def handler() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                kept.append(error)
                raise
        raise kept[0]

    outcome = None
    with contextlib.suppress(trio.Cancelled):  # which a test does not fail by
        outcome = await run(handler)
    assert summary(outcome) == ("retried", "trio.Cancelled")


async def test_cancelled_from_outside_propagates(autojump_clock: Clock) -> None:
    """Cancelling `run` would be recorded as failures of the handlers that it interrupts."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await run(sleeps)
        raise AssertionError
    assert scope.cancelled_caught


async def test_what_is_raised_when_a_scope_outside_is_cancelled_is_no_failure(autojump_clock: Clock) -> None:
    """Cancelling `run` would use up attempts of those whose clean-up fails."""
    outcomes: list[Outcome | None] = []
    with trio.move_on_after(1):
        outcomes.append(await run(raises_when_interrupted))
    assert outcomes == [Outcome(ID, 5, "released", keep=FAILED)]


async def test_a_payload_that_does_not_fit_fails_for_good(autojump_clock: Clock) -> None:
    """It would be tried again, which cannot help."""

    async def handler(n: int) -> None:
        raise AssertionError

    assert summary(await run(handler, payload='{"n": "x"}')) == ("failed", "pgconductor.errors.InvalidPayload")


@dataclass
class Picky:
    """Refuses in a way of its own, and so does its encoding."""

    n: int

    def __post_init__(self) -> None:
        raise LookupError("no such n")


async def test_what_a_payloads_class_raises_is_a_failure_of_the_execution(autojump_clock: Clock) -> None:
    """A lookup in a `__post_init__` would end the worker."""

    async def handler(picky: Picky) -> None:
        raise AssertionError

    assert summary(await run(handler, payload='{"picky": {"n": 1}}')) == ("retried", "LookupError")


async def test_a_result_that_cannot_be_stored_fails_for_good(autojump_clock: Clock) -> None:
    """The handler would run again, to the same end."""

    async def handler() -> float:
        return math.nan

    assert summary(await run(handler)) == ("failed", "pgconductor.errors.InvalidPayload")


async def test_a_broken_back_off_fails_its_execution_and_says_so(autojump_clock: Clock) -> None:
    """User code outside the handler would end the worker, or hide what the handler raised."""

    def broken(attempt: int, error: BaseException) -> float:
        raise SystemExit("no")

    def no_number(attempt: int, error: BaseException) -> float:
        return math.nan

    for backoff in (broken, no_number):
        outcome = await run(a_task(fails, backoff=backoff))
        assert summary(outcome)[0] == "failed"
        assert "raised by the back-off of task 'fails', asked after: ValueError" in error_of(outcome)["traceback"]


async def test_a_back_off_that_raises_the_error_itself_gives_up(autojump_clock: Clock) -> None:
    """The natural way to say "not this one" in a function would make an error that refers to itself."""

    def give_up(attempt: int, error: BaseException) -> float:
        raise error

    assert summary(await run(a_task(fails, backoff=give_up))) == ("failed", "ValueError")


# --- what a handler says ---------------------------------------------------------------------------------------------


async def test_no_retry_fails_at_once_and_keeps_the_cause(autojump_clock: Clock) -> None:
    """What cannot succeed would be tried again, or the reason beneath would be lost."""

    async def handler() -> None:
        try:
            raise KeyError("card")
        except KeyError as error:
            raise NoRetry("no such card") from error

    error = error_of(outcome := await run(handler))
    assert outcome is not None
    assert outcome.kind == "failed"
    assert (error["type"], error["message"]) == ("pgconductor.errors.NoRetry", "no such card")
    assert "KeyError: 'card'" in error["traceback"]


async def test_retry_after_is_recorded_and_exact(autojump_clock: Clock) -> None:
    """The delay would be the back-off's, or the attempt would leave no trace."""

    async def handler() -> None:
        raise RetryAfter(30, "busy")

    outcome = await run(handler)
    assert outcome is not None
    assert (outcome.kind, outcome.delay) == ("retried", 30.0)
    assert error_of(outcome)["message"] == "busy"
    assert summary(await run(handler, a_claim(attempt=3)))[0] == "failed"


async def test_a_snooze_gives_the_attempt_back_and_records_nothing(autojump_clock: Clock) -> None:
    """Waiting for something outside would look like a failure, and use up the attempts."""

    def handler() -> None:
        raise Snooze(60)

    assert await run(handler, a_claim(attempt=3)) == Outcome(ID, 5, "released", delay=60.0, keep=FAILED)


async def test_a_verdict_in_a_nursery_decides_and_heads_the_record(autojump_clock: Clock) -> None:
    """Nurseries wrap it in a group; "Exceptions from Trio nursery" would be all that is told."""

    async def sibling() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("beside it")

    async def says() -> None:
        raise NoRetry("gone")

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sibling)
            nursery.start_soon(says)

    error = error_of(outcome := await run(handler))
    assert outcome is not None
    assert outcome.kind == "failed"
    assert error["message"] == "gone"
    assert "OSError: beside it" in error["traceback"]


# --- timeout ---------------------------------------------------------------------------------------------------------


async def test_a_handler_that_takes_too_long_is_ended_and_tried_again(autojump_clock: Clock) -> None:
    """It would hold its slot for ever."""
    start = trio.current_time()
    outcome = await run(a_task(sleeps, timeout=5))
    assert trio.current_time() - start == pytest.approx(5)
    assert outcome is not None
    assert (outcome.kind, outcome.delay) == ("retried", 7.0)
    error = error_of(outcome)
    assert (error["type"], error["message"]) == ("timeout", "the handler ran for more than 5 s")
    assert "in sleeps" in error["traceback"]  # tells where it was


async def test_the_timeout_of_an_invocation_comes_before_the_tasks(autojump_clock: Clock) -> None:
    """An option would be accepted and ignored."""
    start = trio.current_time()
    await run(a_task(sleeps, timeout=50), a_claim(timeout=5))
    assert trio.current_time() - start == pytest.approx(5)
    assert summary(await run(a_task(sleeps, timeout=5), a_claim(timeout=500))) == ("completed", None)


async def test_a_handler_that_returns_after_its_timeout_has_completed(autojump_clock: Clock) -> None:
    """What it did would be done again, although its result is there."""

    async def handler() -> str:
        with trio.move_on_after(1):
            try:
                await trio.sleep(100)
            except trio.Cancelled:
                return "stopped in time"
        return "never"

    assert summary(await run(a_task(handler, timeout=0.5))) == ("completed", None)


async def test_what_a_handler_raises_after_its_timeout_is_the_cause(autojump_clock: Clock) -> None:
    """A clean-up that fails would hide that the time was up."""

    async def handler() -> None:
        try:
            await trio.sleep(100)
        finally:
            raise OSError("cannot clean up")

    error = error_of(await run(a_task(handler, timeout=1)))
    assert error["type"] == "timeout"
    assert "OSError: cannot clean up" in error["traceback"]


async def test_a_timeout_within_a_nursery_is_a_timeout(autojump_clock: Clock) -> None:
    """The group in which a nursery wraps what its children raise would be taken for the failure."""

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("child")

    async def handler() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(trio.sleep_forever)

    assert summary(await run(a_task(handler, timeout=1))) == ("retried", "timeout")


async def test_a_handler_may_answer_its_timeout_with_a_verdict(autojump_clock: Clock) -> None:
    """It knows best whether trying again makes sense."""

    async def handler() -> None:
        try:
            await trio.sleep(100)
        finally:
            raise NoRetry("half done")

    assert summary(await run(a_task(handler, timeout=1))) == ("failed", "pgconductor.errors.NoRetry")


async def test_the_back_off_sees_the_timeout(autojump_clock: Clock) -> None:
    """A function that waits longer after timeouts could not tell them."""
    seen: list[BaseException] = []

    def wait(attempt: int, error: BaseException) -> float:
        seen.append(error)
        return 1.0

    await run(a_task(sleeps, timeout=1, backoff=wait))
    assert isinstance(seen[0], TimeoutError)


async def test_an_error_before_the_timeout_is_no_timeout(autojump_clock: Clock) -> None:
    """Every failure of a task with a timeout would be recorded as one."""
    assert summary(await run(a_task(fails, timeout=1))) == ("retried", "ValueError")


# --- deadline --------------------------------------------------------------------------------------------------------


async def test_an_execution_past_its_deadline_is_not_started(autojump_clock: Clock) -> None:
    """Work that nobody waits for any more would be done, by each worker that comes back after an outage."""

    started: list[object] = []

    async def handler() -> None:
        started.append("async")

    def plain() -> None:
        started.append("plain")

    for claimed in (a_claim(deadline_in=0.0), a_claim(deadline_in=-5.0)):
        for either in (handler, plain):
            outcome = await run(either, claimed)
            assert summary(outcome) == ("failed", "deadline")
            assert outcome is not None
            assert outcome.keep == FAILED
    assert not started


async def test_the_deadline_counts_from_the_claim(autojump_clock: Clock) -> None:
    """The time in a worker's stock would not count."""
    received_at = trio.current_time()
    await trio.sleep(10)
    assert summary(await run(sleeps, a_claim(deadline_in=9.0), received_at=received_at)) == ("failed", "deadline")
    start = trio.current_time()
    assert summary(await run(sleeps, a_claim(deadline_in=12.0), received_at=received_at)) == ("failed", "deadline")
    assert trio.current_time() - start == pytest.approx(2)


async def test_the_earlier_of_timeout_and_deadline_ends_the_attempt(autojump_clock: Clock) -> None:
    """One of the two would be ignored when both are given."""
    start = trio.current_time()
    late = await run(sleeps, a_claim(timeout=5.0, deadline_in=3.0))
    assert summary(late) == ("failed", "deadline")
    assert trio.current_time() - start == pytest.approx(3)
    assert "in sleeps" in error_of(late)["traceback"]
    assert summary(await run(sleeps, a_claim(timeout=5.0, deadline_in=30.0))) == ("retried", "timeout")


async def test_a_retry_that_the_deadline_would_end_fails_now_and_tells_both(autojump_clock: Clock) -> None:
    """The execution would wait to be failed, or the error that mattered would be hidden by the deadline's."""
    outcome = await run(fails, a_claim(deadline_in=6.9))
    assert summary(outcome) == ("failed", "deadline")
    assert "7 s after this one" in error_of(outcome)["message"]
    assert "ValueError: bad" in error_of(outcome)["message"]
    assert "in fails" in error_of(outcome)["traceback"]
    assert summary(await run(fails, a_claim(deadline_in=7.1))) == ("retried", "ValueError")
    assert summary(await run(sleeps, a_claim(timeout=5.0, deadline_in=11.0))) == ("failed", "deadline")
    assert summary(await run(fails, a_claim(deadline_in=1.0, attempt=3))) == ("failed", "ValueError")


# --- interruption of async handlers ----------------------------------------------------------------------------------


async def interrupted(
    handler: Callable[..., Any] | Task[..., Any], how: Callable[[Interruption], None], claimed: Claimed | None = None
) -> Outcome | None:
    """An attempt that is interrupted as soon as its handler waits."""
    interruption = Interruption()
    outcomes: list[Outcome | None] = []

    async def runs() -> None:
        outcomes.append(await run(handler, claimed, interruption))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(runs)
        await trio.testing.wait_all_tasks_blocked()
        how(interruption)
    return outcomes[0]


async def raises_when_interrupted() -> None:
    try:
        await trio.sleep(100)
    finally:
        raise OSError("cannot clean up")


async def test_a_requested_cancellation_ends_a_running_handler(autojump_clock: Clock) -> None:
    """It would run on to its end."""
    start = trio.current_time()
    outcome = await interrupted(sleeps, lambda interruption: interruption.cancel("changed my mind"))
    assert outcome == Outcome(ID, 5, "cancelled", keep=FAILED)
    assert trio.current_time() == start


async def test_what_a_cancelled_handler_raises_is_kept_and_not_retried(autojump_clock: Clock) -> None:
    """A clean-up that fails would turn the cancellation into another attempt, or leave no trace."""
    assert summary(await interrupted(raises_when_interrupted, Interruption.cancel)) == ("cancelled", "OSError")


async def test_a_value_wins_over_a_requested_cancellation(autojump_clock: Clock) -> None:
    """What is done would be reported as cancelled."""

    async def handler() -> str:
        try:
            await trio.sleep(100)
        except trio.Cancelled:
            return "done"  # it had all it needed
        return "never"

    for how in (Interruption.cancel, Interruption.stop, Interruption.abandon):
        assert summary(await interrupted(handler, how)) == ("completed", None)


async def test_a_result_that_cannot_be_stored_after_a_requested_cancellation_is_cancelled(
    autojump_clock: Clock,
) -> None:
    """A requested cancellation would end as a failure."""

    async def handler() -> float:
        try:
            await trio.sleep(100)
        finally:
            return math.nan  # noqa: B012

    outcome = await interrupted(handler, Interruption.cancel)
    assert summary(outcome) == ("cancelled", "pgconductor.errors.InvalidPayload")


async def test_shielded_clean_up_is_waited_for(autojump_clock: Clock) -> None:
    """A refund that is under way when the cancellation comes would be torn off."""
    done: list[float] = []

    async def handler() -> None:
        try:
            await trio.sleep(100)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
                done.append(trio.current_time())

    start = trio.current_time()
    assert summary(await interrupted(handler, Interruption.cancel)) == ("cancelled", None)
    assert [at - start for at in done] == [pytest.approx(3)]


@pytest.mark.parametrize("how", [Interruption.stop, Interruption.abandon])
async def test_a_stopping_worker_gives_back_what_it_interrupts(
    autojump_clock: Clock, how: Callable[[Interruption], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A deployment would use up attempts, and its errors would be recorded as those of the handlers."""
    given_back = Outcome(ID, 5, "released", keep=FAILED)
    assert await interrupted(sleeps, how) == given_back
    assert not caplog.records
    assert await interrupted(raises_when_interrupted, how) == given_back
    assert "raised when it was interrupted" in caplog.text
    assert "OSError" in caplog.text
    assert "cannot clean up" not in caplog.text


async def test_a_requested_cancellation_is_final_though_the_worker_stops_too(autojump_clock: Clock) -> None:
    """It would run again elsewhere."""

    def both(interruption: Interruption) -> None:
        interruption.stop()
        interruption.cancel()
        interruption.abandon()

    assert summary(await interrupted(a_task(sleeps, timeout=1), both)) == ("cancelled", None)


@pytest.mark.parametrize("plain", [False, True])
async def test_what_was_interrupted_before_it_began_is_not_started(autojump_clock: Clock, plain: bool) -> None:
    """A handler would start that nobody can stop any more."""
    started: list[object] = []

    async def handler() -> None:
        started.append("async")

    def plain_handler() -> None:
        started.append("plain")

    for how, kind in (
        (Interruption.stop, "released"),
        (Interruption.cancel, "cancelled"),
        (Interruption.abandon, "released"),
    ):
        interruption = Interruption()
        how(interruption)
        assert summary(await run(plain_handler if plain else handler, None, interruption)) == (kind, None)
    assert not started


async def test_interrupting_what_has_ended_changes_nothing(autojump_clock: Clock) -> None:
    """A signal that comes late would raise in the worker."""
    interruption = Interruption()
    await run(fails, None, interruption)
    interruption.cancel("first")
    interruption.cancel("second")
    interruption.stop()
    interruption.abandon()
    assert interruption.reason == "first"


async def test_a_computing_async_handler_can_ask(autojump_clock: Clock) -> None:
    """Between two checkpoints Trio cannot tell it."""
    seen: list[bool] = []

    async def handler(ctx: Context) -> None:
        seen.append(ctx.is_cancelled)
        ctx.check_cancelled()
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(6)
        seen.append(ctx.is_cancelled)
        ctx.check_cancelled()

    assert summary(await run(a_task(handler, timeout=5))) == ("retried", "timeout")
    assert seen == [False, True]


async def test_a_thread_of_an_async_handler_can_ask(autojump_clock: Clock) -> None:
    """The context would raise there, since Trio's clock is asked in its own thread only."""
    begun, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    async def handler(ctx: Context) -> None:
        def work() -> None:
            seen.append(ctx.is_cancelled)
            begun.set()
            assert go_on.wait(30)
            seen.append(ctx.is_cancelled)

        await trio.to_thread.run_sync(work)
        await trio.lowlevel.checkpoint()

    def how(interruption: Interruption) -> None:
        assert begun.wait(30)
        interruption.cancel()
        go_on.set()

    assert summary(await interrupted(handler, how)) == ("cancelled", None)
    assert seen == [False, True]


# --- interruption of plain handlers ----------------------------------------------------------------------------------


def polls(ctx: Context) -> None:
    """A well-behaved plain handler."""
    pause = threading.Event()
    for _ in range(10_000):
        ctx.check_cancelled()
        pause.wait(0.01)


async def test_a_plain_handler_is_asked_when_its_time_is_up(autojump_clock: Clock) -> None:
    """Its thread would run for ever, or be abandoned and run beside the next attempt."""
    outcome = await run(a_task(polls, timeout=5))
    assert summary(outcome) == ("retried", "timeout")
    assert "in polls" in error_of(outcome)["traceback"]
    assert summary(await run(polls, a_claim(deadline_in=5.0))) == ("failed", "deadline")


@pytest.mark.parametrize(
    ("how", "kind"), [(Interruption.cancel, "cancelled"), (Interruption.stop, "released")], ids=["cancel", "stop"]
)
async def test_a_plain_handler_is_asked_by_whoever_interrupts(
    autojump_clock: Clock, how: Callable[[Interruption], None], kind: str
) -> None:
    """Its cancellation, or the end of its worker, would have to wait for its end."""
    assert summary(await interrupted(polls, how)) == (kind, None)


class Gate:
    """A plain handler that ends when it is let."""

    def __init__(self, end: Callable[[Context], Any]) -> None:
        self.begun, self.may_end, self.has_ended = threading.Event(), threading.Event(), threading.Event()
        self._end = end

    def task(self, **options: Any) -> Task[..., Any]:
        def handler(ctx: Context) -> Any:
            self.begun.set()
            try:
                assert self.may_end.wait(30)
                return self._end(ctx)
            finally:
                self.has_ended.set()

        return a_task(handler, **options)

    def opens_after(self, how: Callable[[Interruption], None]) -> Callable[[Interruption], None]:
        def opens(interruption: Interruption) -> None:
            assert self.begun.wait(30)
            how(interruption)
            assert not self.has_ended.is_set()
            self.may_end.set()

        return opens


def fail_unasked(ctx: Context) -> NoReturn:
    raise OSError("own error")


def fail_when_told(ctx: Context) -> NoReturn:
    assert ctx.is_cancelled
    raise OSError("own error")


@pytest.mark.parametrize("how", [Interruption.cancel, Interruption.stop])
async def test_a_thread_is_waited_for_and_its_value_wins(
    autojump_clock: Clock, how: Callable[[Interruption], None]
) -> None:
    """Another worker would begin the same execution while the body still runs."""
    gate = Gate(lambda ctx: "done")
    outcome = await interrupted(gate.task(), gate.opens_after(how))
    assert gate.has_ended.is_set()
    assert outcome == Outcome(ID, 5, "completed", '"done"', keep=KEPT)


async def test_an_error_that_no_stop_caused_is_the_handlers_own(autojump_clock: Clock) -> None:
    """A plain handler that fails while its worker stops would be tried for ever, its error never recorded."""
    gate = Gate(fail_unasked)
    assert summary(await interrupted(gate.task(), gate.opens_after(Interruption.stop))) == ("retried", "OSError")
    gate = Gate(fail_when_told)
    assert summary(await interrupted(gate.task(), gate.opens_after(Interruption.stop))) == ("released", None)


async def test_an_error_of_a_cancelled_plain_handler_is_kept(autojump_clock: Clock) -> None:
    """It would be tried again, or leave no trace."""
    for end in (fail_unasked, fail_when_told):
        gate = Gate(end)
        outcome = await interrupted(gate.task(), gate.opens_after(Interruption.cancel))
        assert summary(outcome) == ("cancelled", "OSError")


async def test_a_plain_handler_that_did_not_look_fails_by_its_own_error(autojump_clock: Clock) -> None:
    """Its time was up, but that is not why it failed."""
    for end, kind in ((fail_unasked, "OSError"), (fail_when_told, "timeout")):
        gate = Gate(end)
        # The clock jumps over the timeout, and then to here, as soon as everything waits.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_opens_later, gate)
            assert summary(await run(gate.task(timeout=1))) == ("retried", kind)


async def _opens_later(gate: Gate) -> None:
    await trio.sleep(2)
    gate.may_end.set()


async def test_a_thread_that_is_abandoned_leaves_no_outcome(autojump_clock: Clock) -> None:
    """The execution would be given back while its body runs on."""
    gate = Gate(lambda ctx: "late")
    interruption = Interruption()
    seen: list[object] = []

    async def runs() -> None:
        seen.append(await run(gate.task(timeout=50), None, interruption))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(runs)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.begun.wait(30)
        interruption.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []  # asked, and waited for
        interruption.abandon()
    assert seen == [None]
    assert interruption.is_body_running
    gate.may_end.set()
    assert gate.has_ended.wait(30)


async def test_a_thread_that_has_not_begun_does_not_begin_after_it_was_abandoned(autojump_clock: Clock) -> None:
    """A body would run that nobody knows of, beside the one that another worker began."""
    task = a_task(lambda_that_must_not_run)
    ctx = Context(ID, 1, task=task.name, queue="default", resources={})
    limiter = trio.CapacityLimiter(1)
    interruption = Interruption()
    seen: list[Outcome | None] = []

    async def runs() -> None:
        with Berth() as berth:
            seen.append(await attempt(task, a_claim(), "{}", ctx, limiter, random.Random(0), interruption, berth))

    limiter.acquire_on_behalf_of_nowait(interruption)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runs)
        await trio.testing.wait_all_tasks_blocked()
        interruption.abandon()
    assert seen == [Outcome(ID, 5, "released", keep=FAILED)]
    assert interruption._body(lambda: lambda_that_must_not_run())[1] is None


def lambda_that_must_not_run() -> None:
    raise AssertionError


async def test_cancelled_from_outside_tells_whether_a_body_runs_on(autojump_clock: Clock) -> None:
    """A worker would give back an execution whose body still runs, or keep one that never began."""
    gate = Gate(lambda ctx: None)
    interruption = Interruption()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, gate.task(), None, interruption)
            await trio.testing.wait_all_tasks_blocked()
            assert gate.begun.wait(30)
            scope.cancel()
    assert interruption.is_body_running
    gate.may_end.set()
    assert gate.has_ended.wait(30)


async def test_handler_cancelled_without_being_asked_is_an_error_like_any_other(autojump_clock: Clock) -> None:
    """An execution could be ended as if by request."""

    async def handler() -> None:
        raise HandlerCancelled("by myself")

    assert summary(await run(handler)) == ("retried", "pgconductor.errors.HandlerCancelled")


# --- large payloads --------------------------------------------------------------------------------------------------


async def test_a_payload_is_loaded_within_the_attempt(autojump_clock: Clock) -> None:
    """Large payloads could not be interrupted while they are fetched."""

    async def handler(n: int) -> int:
        return n

    async def load() -> str | None:
        await trio.sleep(1)
        return '{"n": 7}'

    async def gone() -> str | None:
        return None

    assert await run(handler, payload=load) == Outcome(ID, 5, "completed", "7", keep=KEPT)
    assert summary(await run(handler, payload=gone)) == ("released", None)
    assert summary(await run(handler, a_claim(deadline_in=0.5), payload=load)) == ("failed", "deadline")


@pytest.mark.parametrize(("how", "kind"), [(Interruption.cancel, "cancelled"), (Interruption.abandon, "released")])
async def test_an_interrupted_load_starts_nothing(
    autojump_clock: Clock, how: Callable[[Interruption], None], kind: str
) -> None:
    """During an outage a cancellation or shutdown would wait for the database."""

    async def handler() -> None:
        raise AssertionError

    interruption = Interruption()

    async def load() -> str | None:
        how(interruption)
        await trio.sleep_forever()
        raise AssertionError

    assert summary(await run(handler, None, interruption, payload=load)) == (kind, None)


async def test_an_error_of_the_load_is_not_the_handlers(autojump_clock: Clock) -> None:
    """An outage, or a lost lease, would be recorded as a failure of the execution."""

    async def load() -> str | None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await run(fails, payload=load)


# --- outcomes --------------------------------------------------------------------------------------------------------


def test_every_outcome_says_how_long_to_keep_its_row() -> None:
    """None is for ever: whatever ends otherwise than planned would stay for good."""
    task = a_task(fails)
    claimed = a_claim()
    assert released(task, claimed, 3.0) == Outcome(ID, 5, "released", delay=3.0, keep=FAILED)
    assert cancelled(task, claimed).keep == FAILED
    assert failed(task, claimed, ValueError()).keep == FAILED


def test_an_error_is_bounded_by_the_limits_of_its_task() -> None:
    """The flush that carries it would be refused."""
    task = a_task(fails)
    task.limits = replace(task.limits, error_bytes=512)
    outcome = failed(task, a_claim(), ValueError("x" * 100_000))
    assert outcome.error is not None
    assert len(outcome.error.encode()) <= 512


# --- one scope for many attempts ---


async def in_berth(
    berth: Berth, handler: Callable[..., Any] | Task[..., Any], interruption: Interruption
) -> Outcome | None:
    task: Task[..., Any] = cast("Task[..., Any]", handler) if isinstance(handler, Task) else a_task(handler)
    ctx = Context(ID, 1, task=task.name, queue="default", resources={})
    return await attempt(
        task, a_claim(), "{}", ctx, trio.CapacityLimiter(2), random.Random(0), interruption, berth
    )  # fmt: skip


async def waits() -> str:
    await trio.sleep(5)
    return "done"


@pytest.mark.parametrize("how", [Interruption.cancel, Interruption.stop, Interruption.abandon])
async def test_what_is_asked_of_an_execution_that_has_ended_does_not_reach_the_next(
    autojump_clock: Clock, how: Callable[[Interruption], None]
) -> None:
    """The flush of an outcome takes a while: a cancellation that comes meanwhile would end some other execution."""
    former = Interruption()
    with Berth() as berth:
        assert summary(await in_berth(berth, waits, former))[0] == "completed"
        scope = berth.scope
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.testing.wait_all_tasks_blocked)
            how(former)
            assert summary(await in_berth(berth, waits, Interruption()))[0] == "completed"
        assert berth.scope is scope
        return
    raise AssertionError("the berth was cancelled")


@pytest.mark.parametrize("how", [Interruption.cancel, Interruption.stop, Interruption.abandon])
async def test_an_interrupted_execution_leaves_a_scope_in_which_the_next_can_run(
    autojump_clock: Clock, how: Callable[[Interruption], None]
) -> None:
    """A runner would cancel whatever it begins, for ever."""
    former = Interruption()
    with Berth() as berth:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def interrupts() -> None:
                await trio.sleep(1)
                how(former)

            assert summary(await in_berth(berth, waits, former))[0] in ("cancelled", "released")
        assert summary(await in_berth(berth, waits, Interruption()))[0] == "completed"
        assert former.is_cancelled  # and stays so, for whoever asks late
        return
    raise AssertionError("the berth was cancelled")


async def test_a_handler_that_returns_although_it_was_cancelled_cancels_no_other(autojump_clock: Clock) -> None:
    """Its scope would still be cancelled when the next begins."""
    former = Interruption()

    async def stubborn() -> str:
        former.cancel()
        return "done all the same"

    with Berth() as berth:
        assert summary(await in_berth(berth, stubborn, former))[0] == "completed"
        assert summary(await in_berth(berth, waits, Interruption()))[0] == "completed"
        return
    raise AssertionError("the berth was cancelled")


async def test_the_time_limit_of_one_execution_is_not_that_of_the_next(autojump_clock: Clock) -> None:
    """Executions without a timeout would be cancelled at the moment at which an earlier one would have been."""

    async def quick() -> None:
        await trio.sleep(1)

    with Berth() as berth:
        assert summary(await in_berth(berth, a_task(quick, timeout=3), Interruption()))[0] == "completed"
        assert summary(await in_berth(berth, waits, Interruption()))[0] == "completed"
        return
    raise AssertionError("the berth was cancelled")
