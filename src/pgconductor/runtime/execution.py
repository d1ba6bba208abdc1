"""One attempt: decode, call, encode; a return value, an error or an interruption becomes an `Outcome`.

Sees neither a connection nor a pool. The one `except Exception` of the engine is here: what a user's code raises is
data. What is not an `Exception` is not: `KeyboardInterrupt` propagates (its execution is given back by the worker),
`SystemExit` is recorded as a failure, since a handler must not stop its worker.

Cancellation: the worker owns the scope around an attempt. Cancelling it interrupts an async handler at its next
checkpoint; a plain `def` handler runs on in its thread, abandoned: its worker must not give the execution back while
the body may still run.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import msgspec
import trio

from ..codec import describe_error
from ..context import Context
from ..errors import InvalidPayload, InvalidTask
from ..model import Claimed, Outcome
from ..retry import decide
from ..tasks import Task

_encode_error = msgspec.json.Encoder().encode


async def attempt(
    task: Task[..., Any],
    claimed: Claimed,
    payload: str,
    ctx: Context,
    limiter: trio.CapacityLimiter,
    rng: random.Random,
) -> Outcome:
    """Run the handler once and return how it ended. Raises `trio.Cancelled` and `KeyboardInterrupt` only."""
    try:
        kwargs = task.decode(payload)
    except (InvalidPayload, InvalidTask) as error:
        return failed(task, claimed, error)  # what does not fit now will not fit later
    try:
        if task.is_async:
            value = await task.call(ctx, kwargs)
        else:
            call = functools.partial(task.call, ctx, kwargs)
            value = await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # what the user's code raises is data
        return retried_or_failed(task, claimed, error, rng)
    except BaseExceptionGroup as group:
        # A nursery of the handler wraps what was raised in it. What is not an ordinary error keeps its meaning.
        if group.subgroup(trio.Cancelled) is not None or group.subgroup(KeyboardInterrupt) is not None:
            raise
        return retried_or_failed(task, claimed, group, rng)
    try:
        return Outcome(claimed.id, claimed.claim_no, "completed", task.result.encode(value))
    except InvalidPayload as error:
        return failed(task, claimed, error)


def failed(task: Task[..., Any], claimed: Claimed, error: BaseException) -> Outcome:
    """The outcome of an attempt after which there is no other."""
    return Outcome(claimed.id, claimed.claim_no, "failed", error=_describe(task, error))


def retried_or_failed(task: Task[..., Any], claimed: Claimed, error: BaseException, rng: random.Random) -> Outcome:
    """The outcome of a failed attempt, by the task's attempts and back-off."""
    try:
        delay = decide(claimed.attempt, claimed.max_attempts or task.max_attempts, task.backoff, rng)
    except Exception as broken:  # noqa: BLE001  # the user's back-off is user code too
        broken.add_note(f"raised by the back-off of task {task.name!r}, asked after: {type(error).__name__}")
        return failed(task, claimed, broken)
    if delay is None:
        return failed(task, claimed, error)
    return Outcome(claimed.id, claimed.claim_no, "retried", error=_describe(task, error), delay=delay)


def _describe(task: Task[..., Any], error: BaseException) -> str:
    return _encode_error(describe_error(error, task.limits.error_bytes)).decode()
