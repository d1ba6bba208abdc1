"""Every exception the library raises on purpose, named after what the caller should do about it.

    PgconductorError
    ├── Misuse                        fix the code: nothing was sent to the database
    │   ├── InvalidTask               a task, worker or orchestrator is declared wrongly
    │   ├── InvalidOption             an option's value is out of range (also a ValueError)
    │   ├── InvalidPayload            arguments or result do not fit the annotations or the limits (also a ValueError)
    │   ├── NotOpen                   the conductor or pool is not open here
    │   └── DurableMisuse             a context's durable operation is used where or how it must not be
    ├── Refused                       the database said no, for good
    │   ├── LeaseLost                 this incarnation of an orchestrator is dead; it registers anew by itself
    │   └── Unstorable                PostgreSQL cannot store a value
    ├── Unavailable                   try again later
    │   ├── NoDatabase                no server was named, or none answers
    │   ├── PoolTimeout               no connection became free in time (also a TimeoutError)
    │   └── WaitTimeout               the result did not arrive in time (also a TimeoutError)
    ├── Incompatible                  program and schema do not fit each other
    │   ├── SchemaMissing             run ``pgconductor migrate``
    │   └── SchemaTooNew              a newer program made a breaking change: upgrade this one
    ├── ExecutionError                what ``Handle.result()`` raises instead of returning
    │   ├── ExecutionFailed
    │   ├── ExecutionCancelled
    │   └── ResultNotKept             it finished, and its result was not kept
    ├── Verdict                       handlers raise these, to say what follows
    │   ├── NoRetry                   it fails for good
    │   │   └── NonDeterminism        raised by the engine: the handler does not do again what was recorded
    │   ├── RetryAfter                it failed, and is tried again after exactly that long
    │   └── Snooze                    it has not failed: it runs again later, and this attempt does not count
    ├── DurableError                  what the durable operations of `Context` raise; replayed like results
    │   ├── StepFailed                a step raised, and has no tries left
    │   ├── ChildError                a child execution ended without a result
    │   │   ├── ChildFailed
    │   │   ├── ChildTimedOut         by its timeout or deadline (also a TimeoutError)
    │   │   └── ChildCancelled
    │   ├── PromiseRejected           whoever was asked has said no
    │   └── WaitTimedOut              nothing came in time (also a TimeoutError)
    ├── HandlerCancelled              `Context.check_cancelled` raises it: a handler in a thread is asked to end
    └── AttemptError                  the engine ended an attempt; recorded with its execution, raised by nobody
        ├── HandlerTimeout            the handler ran for longer than its timeout (also a TimeoutError)
        └── DeadlineExceeded          the execution's deadline has passed (also a TimeoutError)

    Unwinding                         not an error but a BaseException, as `trio.Cancelled` is: it ends a plain ``def``

Messages name the object and the remedy. The cause, where a driver's error lies beneath, is chained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID


class PgconductorError(Exception):
    """Base of all errors of this library."""


class Misuse(PgconductorError):
    """The calling code is wrong; nothing was sent to the database."""


class InvalidTask(Misuse):
    """A task, worker or orchestrator is declared wrongly."""


class InvalidOption(Misuse, ValueError):
    """An option has a value outside its range."""


class InvalidPayload(Misuse, ValueError):
    """Arguments or a result do not fit the handler's annotations, or exceed the limits."""


class NotOpen(Misuse):
    """The conductor or pool is used outside its ``async with`` block."""


class DurableMisuse(Misuse):
    """A durable operation of a context is used where or how it must not be; nothing was recorded."""


class Refused(PgconductorError):
    """The database refused the request; repeating it will not help."""


class LeaseLost(Refused):
    """The lease of an orchestrator ended, or the server was restarted: what it holds is no longer its own."""


class Unstorable(Refused):
    """PostgreSQL cannot store a value; the others sent with it were not stored either."""


class Unavailable(PgconductorError):
    """Something is not there now; the same call may succeed later."""


class NoDatabase(Unavailable):
    """No server was named, or the one named does not answer."""


class PoolTimeout(Unavailable, TimeoutError):
    """Every connection of the pool stayed in use for the whole timeout."""


class WaitTimeout(Unavailable, TimeoutError):
    """The execution did not finish within the timeout; it goes on."""


class Incompatible(PgconductorError):
    """The program and the schema in the database do not fit each other."""


class SchemaMissing(Incompatible):
    """The schema is not installed, or older than this program needs."""


class SchemaTooNew(Incompatible):
    """A newer program made a breaking change to the schema."""


class ExecutionError(PgconductorError):
    """An execution ended without a result."""


class ExecutionFailed(ExecutionError):
    """The execution failed for good; the message carries its last error.

    `error`: that error as data, with the keys ``type``, ``message`` and ``traceback``; as much of it as was kept. The
    type is the exception's qualified name, or ``timeout``, ``deadline`` or ``crash_loop`` for what the engine ended.
    """

    def __init__(self, message: str, error: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.error: Mapping[str, str] = error or {}


class ExecutionCancelled(ExecutionError):
    """The execution was cancelled. `reason`: as given by whoever cancelled it, None if nothing was."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class ResultNotKept(ExecutionError):
    """The execution has finished, and its result was not kept."""


_LONGEST = 100 * 365.25 * 86_400.0  # a century, as `options.MAX_DELAY`, which this module lies below


def _seconds(what: str, delay: object) -> float:
    if isinstance(delay, timedelta):
        delay = delay.total_seconds()
    elif isinstance(delay, bool) or not isinstance(delay, (int, float)):
        raise InvalidOption(f"{what} must be seconds (int or float) or a timedelta, not {type(delay).__name__}")
    if not 0.0 <= delay <= _LONGEST:  # false for NaN as well
        shown = delay if isinstance(delay, float) or delay.bit_length() < 128 else "too large a number"
        raise InvalidOption(f"{what} (seconds) must be from 0 to {_LONGEST:g}, not {shown}")
    return float(delay)


class Verdict(PgconductorError):
    """Base of what a handler raises to say what follows; found inside exception groups too.

    If a group holds several: `NoRetry` before `RetryAfter` (the longest), and `Snooze` (the longest) only if all else
    in the group is `Snooze` too, since an attempt in which something failed has failed.
    """


class NoRetry(Verdict):
    """The execution fails for good, whatever attempts remain. The cause (``raise ... from error``) is recorded too."""


class RetryAfter(Verdict):
    """The attempt failed; the next begins after exactly `delay`, instead of the task's back-off.

    It counts as an attempt, and `max_attempts` is final. The cause (``raise ... from error``) is recorded too.
    """

    def __init__(self, delay: float | timedelta, message: str = "") -> None:
        """`delay`: seconds or a `timedelta`, from 0 to a century, else `InvalidOption`."""
        self.delay: float = _seconds("RetryAfter(delay=)", delay)
        super().__init__(message or f"asked to be tried again after {self.delay:g} s")


class Snooze(Verdict):
    """The execution runs again after `delay`. Not an error: nothing is recorded, and this attempt does not count."""

    def __init__(self, delay: float | timedelta) -> None:
        """`delay`: seconds or a `timedelta`, from 0 to a century, else `InvalidOption`."""
        self.delay: float = _seconds("Snooze(delay=)", delay)
        super().__init__(f"snoozed for {self.delay:g} s")


class NonDeterminism(NoRetry):
    """The handler does not do again what it did before its execution was interrupted; nothing new was recorded.

    The code has changed, or it decides by something that is not recorded. The execution fails for good and keeps its
    history, so that it can be retried with code that fits.

    `recorded`: all that is recorded, `asked`: what this run asked for, in words and in order.
    """

    recorded: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


class DurableError(PgconductorError):
    """A durable operation ended without a value. It is recorded: a replay raises the same.

    `error`: what is known of it as data, with the keys ``type``, ``message`` and ``traceback`` where there are any.
    """

    def __init__(self, message: str, error: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.error: Mapping[str, str] = error or {}


class StepFailed(DurableError):
    """A step raised, and has no tries left. The first time, the exception it raised is the cause."""


class ChildError(DurableError):
    """A child execution ended without a result. `execution_id`: the child's."""

    def __init__(self, message: str, error: Mapping[str, str] | None = None, execution_id: UUID | None = None) -> None:
        super().__init__(message, error)
        self.execution_id = execution_id


class ChildFailed(ChildError):
    """A child execution failed for good."""


class ChildTimedOut(ChildFailed, TimeoutError):
    """A child execution failed for good because its time was up."""


class ChildCancelled(ChildError):
    """A child execution was cancelled. `reason`: as given, None if none was."""

    reason: str | None = None


class PromiseRejected(DurableError):
    """A promise was rejected; ``error["message"]`` is what was said."""


class WaitTimedOut(DurableError, TimeoutError):
    """What was waited for did not come within the timeout."""


class HandlerCancelled(PgconductorError):
    """The handler is asked to end: its time is up, its cancellation was requested, or its worker stops."""


class Unwinding(BaseException):
    """The handler ends here: its execution waits, was asked to end, or is not ours any more. Let it propagate.

    Raised by the operations of `Context.sync`, as Trio raises `trio.Cancelled` in an async handler, and in an async
    handler where a shield of its own keeps that away; no `Exception`, so that ``except Exception`` lets it pass.
    ``finally`` blocks run each time an execution begins to wait.
    """


class AttemptError(PgconductorError):
    """The engine ended an attempt."""

    recorded_type: ClassVar[str] = ""  # the `type` in the record


class HandlerTimeout(AttemptError, TimeoutError):
    """The handler ran for longer than its timeout and was ended. Recorded with the type ``timeout``."""

    recorded_type = "timeout"


class DeadlineExceeded(AttemptError, TimeoutError):
    """The execution's deadline has passed, or will have when it could run again. Recorded as ``deadline``."""

    recorded_type = "deadline"


# The property of the base class, whatever a subclass makes of the name.
_members: Any = BaseExceptionGroup.exceptions.__get__


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Every exception in a group and the groups in it, in order, without recursion; `error` itself if it is none."""
    pending = [error]
    while pending:
        current = pending.pop()
        if isinstance(current, BaseExceptionGroup):
            pending.extend(reversed(_members(current)))
        else:
            yield current
