"""One attempt: decode, call, encode; a return value, an error or an interruption becomes an `Outcome`.

Sees neither a connection nor a pool. The broad `except`s of the engine are here: what a user's code raises is data.
Three things are not: `KeyboardInterrupt` and `GeneratorExit` propagate (the execution is given back by the worker),
and so does the `trio.Cancelled` of a scope outside. `SystemExit` is recorded as a failure, since a handler must not
stop its worker, and so is a `trio.Cancelled` that belongs to no cancelled scope, which would otherwise end the process.

Cancellation: an attempt runs in one scope, its `Berth`'s, which serves one attempt after the other until one is
cancelled. Timeout, deadline, a requested cancellation and the worker's stop are that scope for an async handler. A
plain ``def`` runs in a thread, which nobody can stop: it is asked, by `Context.is_cancelled` and
`Context.check_cancelled`, and the attempt waits until it has ended, so that no second body ever runs beside it. Only
`Interruption.abandon` and a scope outside leave the thread behind.

The durable operations of a plain ``def`` are tasks in a nursery beside its thread, which waits for them (`call`). They
are cancelled when the handler is to end, and the thread is then told by `Unwinding`; what they call runs in the thread.

An execution that is given up to wait is cancelled by the same scope (`durable.py`); from then on that is its outcome.

Invariants: a returned value wins over whatever was asked; a requested cancellation over the worker's stop, since it is
final, and both over the timeout. Every outcome says how long its row is to be kept, should the execution end by it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec
import trio

from ..codec import describe_error, described_type, printable, summary
from ..context import Context
from ..durable import Place, locate
from ..errors import (
    DeadlineExceeded,
    DurableMisuse,
    HandlerCancelled,
    HandlerTimeout,
    InvalidPayload,
    InvalidTask,
    Unwinding,
    leaves,
)
from ..model import Claimed, Outcome
from ..retry import backoff_from_data, decide, verdict_in
from ..tasks import Task
from .thread_desk import ThreadDesk

logger = logging.getLogger("pgconductor.worker")

_encode = msgspec.json.Encoder().encode
NOTHING: Final = object()  # what `run` answers if no value was returned


T = TypeVar("T")


class Berth:
    """The cancel scope of a runner: attempts are made in it, one after the other, and it is left when one is cancelled.

    To be entered by the task that makes them, as a context manager. A scope for each attempt costs 5 µs of the 12 that
    an execution takes (benchmarks/throughput.py).
    """

    __slots__ = ("nurseries", "scope", "task")

    def __enter__(self) -> Self:
        self.task = trio.lowlevel.current_task()
        self.nurseries = len(self.task.child_nurseries)  # that are not the handler's
        self._open()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        return bool(self.scope.__exit__(exc_type, error, traceback))

    def _open(self) -> None:
        self.scope = trio.CancelScope()
        self.scope.__enter__()

    def renew(self, error: BaseException | None = None) -> bool:
        """Leave the scope, by `error` if something was raised, and enter a new one. Returns whether all of it was the
        scope's cancellation; raises what is left of a group without that.
        """
        try:
            if error is None:
                return self.__exit__(None, None, None)
            return self.__exit__(type(error), error, error.__traceback__)
        finally:
            self._open()


class Interruptible(Protocol):
    """What the worker asks of a running execution, from Trio's thread; `Interruption` says what each means."""

    @property
    def is_requested(self) -> bool:
        """Whether its cancellation was requested."""
        ...

    @property
    def is_body_running(self) -> bool:
        """Whether its handler runs in a thread, and is not known to have ended."""
        ...

    def cancel(self, reason: str | None = None) -> None:
        """As `Interruption.cancel`, and so are the others."""
        ...

    def stop(self) -> None: ...

    def note_end(self) -> None: ...

    def abandon(self) -> None: ...


class Told(Protocol):
    """What decides, of an attempt that has ended, how."""

    @property
    def is_requested(self) -> bool:
        """Whether its cancellation was requested."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to end so that it can be given back."""
        ...

    @property
    def was_told(self) -> bool:
        """Whether the handler asked, and was told to end."""
        ...


class Interruption:
    """What one running execution is asked to do: its attempt's side of the scope that it shares with those before it.

    The worker makes one for each and calls its methods from Trio's thread, before the attempt begins, while it runs, or
    after it ended, when they change nothing. The context asks it from any thread.
    """

    # Defaults on the class: nearly all of them are never set, and one of these is made per execution.
    is_requested = False  # its cancellation was requested
    is_stopping = False  # the worker stops
    is_abandoned = False  # its thread is not waited for
    is_suspended = False  # it waits: what the handler returns or raises from now on means nothing
    awaited: Sequence[str] = ()  # the waits any of which is to wake it
    continuation: str | None = None  # it begins a new life with this: an object of payload and version
    is_body_running = False  # in a thread, and not known to have ended
    reason: str | None = None  # of the requested cancellation
    unwound: BaseException | None = None  # what left an async handler: tells where it was
    _is_expired = False  # the time of a plain def is up
    _has_thread = False  # the scope is for abandoning it only
    was_told = False  # the handler asked, and was told to end
    _task: trio.lowlevel.Task | None = None  # that runs an async handler, or does what the thread asks
    _nurseries = 0  # of that task, when the handler began
    _berth: Berth
    drains: Callable[[], bool] | None = None  # whether the worker stops
    _desk: ThreadDesk | None = None  # where the thread of a plain def has its operations done
    # Of the attempt while it runs; later only if it was cancelled, when it serves nobody else.
    _scope: trio.CancelScope | None = None

    def begin(self, berth: Berth) -> None:
        """The attempt begins, in that berth's scope."""
        self._berth = berth
        self._scope = berth.scope

    def end(self) -> None:
        """The attempt has ended: from now on nothing is cancelled."""
        scope, berth = self._scope, self._berth
        if scope is None or scope is not berth.scope:
            return  # cancelled, and left
        if scope.cancel_called:
            berth.renew()
        else:
            if scope.deadline != math.inf:
                scope.deadline = math.inf
            self._scope = None

    def cancel(self, reason: str | None = None) -> None:
        """A cancellation of the execution was requested. Idempotent; the first reason stays."""
        if not self.is_requested:
            self.is_requested = True
            self.reason = reason
        self._ask()

    def stop(self) -> None:
        """The worker stops: an async handler is cancelled, a plain ``def`` is asked to end. Idempotent."""
        self.is_stopping = True
        self._ask()

    def note_end(self) -> None:
        """A scope outside is cancelled: as `stop`, which is not needed any more."""
        self.is_stopping = True

    def abandon(self) -> None:
        """The lease is lost, or the process ends: as `stop`, but the thread of a plain ``def`` is not waited for."""
        self.is_stopping = self.is_abandoned = True
        self._cancel_scope()
        if self._desk is not None:
            self._desk.leave_thread()

    # What a durable context asks: `durable.Suspender`

    @property
    def is_unwinding(self) -> bool:
        """Whether the handler has been asked to end, for whatever reason."""
        return (
            self.is_requested or self.is_stopping or self.is_suspended or self._is_expired or self._is_scope_cancelled()
        )

    @property
    def will_replay(self) -> bool:
        """Whether it was asked to end so that it begins again later, with the same history."""
        return self.is_suspended or (self.is_stopping and not self.is_requested)

    @property
    def is_draining(self) -> bool:
        """Whether the worker stops, and waits for its handlers."""
        return self.drains is not None and self.drains()

    @property
    def is_alone(self) -> bool:
        """Whether the code that asks is all there is of the handler: its own task, with no nursery open."""
        task = trio.lowlevel.current_task()
        return task is self._task and len(task.child_nurseries) == self._nurseries

    def suspend(self, awaited: Sequence[str]) -> None:
        """The execution waits: the handler is cancelled, and begins again when there is something to go on with."""
        if not self.is_requested and not self.is_stopping:
            self.is_suspended = True
            self.awaited = awaited
        self._ask()

    def give_way(self) -> None:
        """As `stop`, by the handler's own wish."""
        self.stop()

    def continue_as_new(self, payload: str, version: str | None) -> None:
        """The execution begins a new life when its handler, which is cancelled, has ended."""
        if not self.is_requested and not self.is_stopping:
            self.continuation = f'{{"payload": {payload}, "version": {_encode(version).decode()}}}'
        self._cancel_scope()

    def locate(self) -> Place:
        """Where the current task is, seen from the attempt's scope."""
        assert self._scope is not None  # a context whose handler has ended does not ask
        return locate(self._scope)

    async def run_sync(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        """Run a plain function: in the thread of the handler if it has one, else in one of its own."""
        if self._desk is not None:
            return await self._desk.run(call)
        return await trio.to_thread.run_sync(call, limiter=limiter)

    def _cancel_scope(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _is_scope_cancelled(self) -> bool:
        scope = self._scope  # a thread may ask while the attempt ends
        return scope is not None and scope.cancel_called

    def _ask(self) -> None:
        if not self._has_thread:
            self._cancel_scope()
        elif self._desk is not None:
            self._desk.cancel()

    # What the thread of a plain def asks: `context.Desk`

    def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Run an operation in Trio, blocking this thread; raises what it raises, `Unwinding`, `DurableMisuse`."""
        return self._required_desk().call(operation)

    def lend(self, opening: Callable[[], AbstractAsyncContextManager[T]]) -> AbstractContextManager[T]:
        """The same for a block, which is entered and left in Trio."""
        return self._required_desk().lend(opening)

    def _required_desk(self) -> ThreadDesk:
        if self._desk is None:
            raise DurableMisuse("ctx.sync is for plain def handlers; in an async handler await ctx's own methods")
        return self._desk

    @property
    def is_cancelled(self) -> bool:
        """Whether the handler should end, for `Context`. From any thread; noted, if it is so."""
        if (
            self.is_requested
            or self.is_stopping
            or self._is_expired
            or (not self._has_thread and self._is_scope_over())
        ):
            self.was_told = True
            return True
        return False

    def check(self) -> None:
        """Raise `HandlerCancelled` if the handler should end, for `Context`."""
        if self.is_cancelled:
            if self.is_requested:
                raise HandlerCancelled("the cancellation of this execution was requested")
            if self.is_stopping:
                raise HandlerCancelled("the worker stops; the execution is given back")
            raise HandlerCancelled("the time for this attempt is up")

    def _is_scope_over(self) -> bool:
        try:
            return self._is_scope_cancelled()  # looks at Trio's clock
        except RuntimeError:
            pass  # a thread that the async handler started
        try:
            trio.from_thread.check_cancelled()
        except trio.Cancelled:
            return True
        except RuntimeError:
            pass  # a thread of which Trio knows nothing
        return False

    @property
    def is_expired(self) -> bool:
        """Whether the attempt ran out of time; of a plain ``def``, whether it also knows."""
        if self._has_thread:
            return self._is_expired and self.was_told
        return self._is_scope_cancelled()

    async def load(self, loader: Callable[[], Awaitable[str | None]]) -> str | None:
        """Return what `loader` does, None if it is interrupted; raises what it raises."""
        try:
            return await loader()
        except BaseException as raised:
            if not self._leave(raised):
                raise
        return None

    def _leave(self, raised: BaseException) -> bool:
        """Whether what was raised is the cancellation of the scope, and no more; raises what is left of a group."""
        assert self._scope is not None
        return self._scope.cancel_called and self._berth.renew(raised)

    def note_task(self) -> None:
        """The current task is the handler's, or does for its thread what it asks."""
        self._task = trio.lowlevel.current_task()
        self._nurseries = len(self._task.child_nurseries)

    async def run(self, handler: Callable[[], Awaitable[Any]], timeout: float | None) -> Any:
        """Return what an async handler returns, `NOTHING` if the scope cancelled it; raises what it raises."""
        berth = self._berth
        if timeout is not None:
            berth.scope.deadline = trio.current_time() + timeout
        self._task, self._nurseries = berth.task, berth.nurseries
        try:
            return await handler()
        except BaseException as raised:
            self.unwound = raised
            if not self._leave(raised):
                raise
        return NOTHING

    async def run_in_thread(
        self, handler: Callable[[], Any], timeout: float | None, limiter: trio.CapacityLimiter
    ) -> Any:
        """The same for a plain ``def``, in a thread. After `timeout` seconds it is asked to end."""
        self._has_thread = True
        body = functools.partial(self._body, handler)
        value: Any = NOTHING
        error: BaseException | None = None
        is_over = False
        try:
            async with trio.open_nursery() as nursery:
                self._desk = desk = ThreadDesk(self, nursery)
                if timeout is not None:
                    nursery.start_soon(self._expire_after, timeout)
                try:
                    value, error = await trio.to_thread.run_sync(body, limiter=limiter, abandon_on_cancel=True)
                    is_over = True
                finally:
                    # A body that has not begun does not begin now; one that has goes on. Each side first writes its
                    # own flag and then reads the other's.
                    self.is_abandoned = self.is_abandoned or not is_over
                    desk.close()
                nursery.cancel_scope.cancel()
        except BaseException as raised:
            if not self._leave(raised):
                raise
        if error is not None:
            try:
                raise error
            finally:
                del error  # it holds this frame
        return value

    def _body(self, handler: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        self.is_body_running = True
        assert self._desk is not None
        self._desk.thread = threading.get_ident()
        try:
            if self.is_abandoned:
                return NOTHING, None
            return handler(), None
        except BaseException as error:  # noqa: BLE001  # sorted out by whoever waits for the thread
            return NOTHING, error
        finally:
            self.is_body_running = False

    async def _expire_after(self, timeout: float) -> None:
        await trio.sleep(timeout)
        self._is_expired = True
        self._ask()


async def attempt(
    task: Task[..., Any],
    claimed: Claimed,
    payload: str | Callable[[], Awaitable[str | None]],
    ctx: Context,
    limiter: trio.CapacityLimiter,
    rng: random.Random,
    inner: Interruption,
    berth: Berth,
    received_at: float | None = None,
) -> Outcome | None:
    """Run the handler once and return how it ended; None if its thread was abandoned and may run on.

    `payload`: JSON text, or a function that loads it, and answers None if the execution is no longer ours. `inner`: by
    which the worker reaches the handler, used for this attempt only. `berth`: in which the caller's task is.
    `received_at`: Trio's time at which the claim's answer came, from which ``claimed.deadline_in`` counts.

    Raises `trio.Cancelled` if a scope outside is cancelled, alone or in a group, `KeyboardInterrupt`, and what the
    loading raises.
    """
    inner.begin(berth)
    try:
        deadline_at: float | None = None
        if claimed.deadline_in is not None:
            deadline_at = (trio.current_time() if received_at is None else received_at) + claimed.deadline_in
        if not isinstance(payload, str):
            loaded = await inner.load(payload)
            if loaded is None:
                return unstarted(task, claimed, inner) or released(task, claimed)
            payload = loaded
        if (inner.is_requested or inner.is_stopping) and (outcome := unstarted(task, claimed, inner)):
            return outcome
        timeout = task.timeout if claimed.timeout is None else claimed.timeout
        remaining: float | None = None
        if deadline_at is not None:
            remaining = deadline_at - trio.current_time()
            if remaining <= 0.0:
                return too_late(task, claimed)
        try:
            kwargs = task.decode(payload)
        except (Exception, SystemExit) as raised:  # noqa: BLE001  # what the payload's own classes raise too
            return undecodable(task, claimed, raised, rng, remaining)

        is_by_deadline = remaining is not None and (timeout is None or remaining <= timeout)
        limit = remaining if is_by_deadline else timeout
        ctx.watch(inner)
        call = functools.partial(task.call, ctx, kwargs)
        value, error = await call_handler(task, call, inner, limit, limiter)
        try:
            if inner.continuation is not None:
                _log_ignored(task, claimed, value, error, "was to begin anew")
                return continued(task, claimed, inner.continuation)
            if inner.is_suspended:
                _log_ignored(task, claimed, value, error, "was to wait")
                return waiting(task, claimed, inner.awaited)
            if value is not NOTHING:
                return completed(task, claimed, value, inner)
            if inner.is_body_running:
                return None
            remaining = None if deadline_at is None else deadline_at - trio.current_time()
            if inner.is_expired and not inner.is_requested and not inner.is_stopping:
                error = out_of_time(error or inner.unwound, limit, is_by_deadline)
            return not_completed(task, claimed, error, inner, rng, remaining)
        finally:
            # They hold this frame, and it them.
            del error
            if inner.unwound is not None:
                inner.unwound = None
    finally:
        inner.end()


async def call_handler(
    task: Task[..., Any],
    call: Callable[[], Any],
    inner: Interruption,
    limit: float | None,
    limiter: trio.CapacityLimiter,
) -> tuple[Any, BaseException | None]:
    """Call a handler, async or plain, for at most `limit` seconds; return its value and the error to record.

    `NOTHING` and None: the scope cancelled it, or its thread may run on. Raises what is not data, as `attempt` does.
    """
    try:
        return await (inner.run(call, limit) if task.is_async else inner.run_in_thread(call, limit, limiter)), None
    except BaseException as raised:
        error = as_data(raised)
        if error is None:
            raise
    if trio.current_effective_deadline() == -math.inf:
        inner.is_stopping = True  # a scope outside is cancelled
    try:
        return NOTHING, error
    finally:
        del error  # it holds this frame


def too_late(task: Task[..., Any], claimed: Claimed) -> Outcome:
    """The outcome of an attempt that would begin after the deadline."""
    return failed(task, claimed, DeadlineExceeded("the deadline passed before the attempt began"))


def undecodable(
    task: Task[..., Any], claimed: Claimed, error: BaseException, rng: random.Random, remaining: float | None
) -> Outcome:
    """The outcome of an attempt whose arguments could not be read. `remaining`: as in `not_completed`."""
    if isinstance(error, (InvalidPayload, InvalidTask)):
        return failed(task, claimed, error)  # what does not fit now will not fit later
    return retried_or_failed(task, claimed, error, rng, remaining)


def completed(task: Task[..., Any], claimed: Claimed, value: object, inner: Told) -> Outcome:
    """The outcome of a handler that returned `value`, even if that cannot be stored."""
    try:
        result = task.result.encode(value)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # InvalidPayload, or what the value's own classes raise
        return cancelled(task, claimed, error) if inner.is_requested else failed(task, claimed, error)
    return Outcome(claimed.id, claimed.claim_no, "completed", result, keep=task.keep_completed)


def not_completed(
    task: Task[..., Any],
    claimed: Claimed,
    error: BaseException | None,
    inner: Told,
    rng: random.Random,
    remaining: float | None,
) -> Outcome:
    """The outcome of a handler that returned nothing. `error`: None if the engine ended it, and it raised nothing.

    `remaining`: seconds until the execution's deadline.
    """
    if inner.is_requested:
        return cancelled(task, claimed, None if error is None or is_answer(error) else error)
    if inner.is_stopping and (task.is_async or inner.was_told or error is None):
        # An unwinding that the engine began is no failure of the handler, whatever it raised on the way.
        if error is not None and not is_answer(error):
            logger.warning(
                "execution %s of task %r raised when it was interrupted, and is given back: %s",
                claimed.id, printable(task.name), described_type(error),
            )  # fmt: skip
        return released(task, claimed)
    assert error is not None
    if isinstance(error, DeadlineExceeded):
        return failed(task, claimed, error)
    return retried_or_failed(task, claimed, error, rng, remaining)


def _log_ignored(task: Task[..., Any], claimed: Claimed, value: object, error: BaseException | None, what: str) -> None:
    """What a handler returned or raised when its execution was given up to wait, or to begin anew."""
    if value is not NOTHING:
        logger.warning(
            "execution %s of task %r swallowed its cancellation when it %s, and returned; that is ignored: it runs "
            "again when there is something to go on with",
            claimed.id, printable(task.name), what,
        )  # fmt: skip
    elif error is not None and not is_answer(error):
        logger.warning(
            "execution %s of task %r raised when it %s, and does all the same: %s",
            claimed.id, printable(task.name), what, described_type(error),
        )  # fmt: skip


def unstarted(task: Task[..., Any], claimed: Claimed, inner: Told) -> Outcome | None:
    """The outcome of an attempt that is not to begin."""
    if inner.is_requested:
        return cancelled(task, claimed)
    return released(task, claimed) if inner.is_stopping else None


def out_of_time(raised: BaseException | None, limit: float | None, is_by_deadline: bool) -> BaseException:
    """The error of an attempt whose time was up. What it raised then is the cause, which tells where it was."""
    if raised is not None and verdict_in(raised) is not None:
        return raised
    what: DeadlineExceeded | HandlerTimeout
    if is_by_deadline:
        what = DeadlineExceeded("the deadline passed while the handler ran")
    else:
        what = HandlerTimeout(f"the handler ran for more than {limit:g} s")
    what.__cause__ = raised
    return what


def as_data(raised: BaseException) -> BaseException | None:
    """The error to record; None if in it is what must propagate: Ctrl-C, or the `Cancelled` of a scope outside."""
    try:
        for leaf in leaves(raised):
            if isinstance(leaf, (KeyboardInterrupt, GeneratorExit)):
                return None
            if isinstance(leaf, trio.Cancelled) and trio.current_effective_deadline() == -math.inf:
                return None
    except (Exception, SystemExit) as broken:  # noqa: BLE001  # it cannot be asked what it is
        return broken
    return raised


def is_answer(error: BaseException) -> bool:
    """Whether the handler ended because it was told to, and no more."""
    return all(isinstance(leaf, (trio.Cancelled, HandlerCancelled, Unwinding)) for leaf in leaves(error))


# --- outcomes --------------------------------------------------------------------------------------------------------


def released(task: Task[..., Any], claimed: Claimed, delay: float = 0.0) -> Outcome:
    """The outcome that gives an execution back, its attempt included. `delay`: seconds until it is due again."""
    return Outcome(claimed.id, claimed.claim_no, "released", delay=delay, keep=task.keep_failed)


def waiting(task: Task[..., Any], claimed: Claimed, awaited: Sequence[str] = ()) -> Outcome:
    """The outcome of an execution that waits for its waits, and gives the attempt back.

    `awaited`: waits any of which is to wake it, of a nursery's too.
    """
    names = _encode(awaited).decode() if awaited else None
    return Outcome(claimed.id, claimed.claim_no, "waiting", names, keep=task.keep_failed)


def continued(task: Task[..., Any], claimed: Claimed, life: str) -> Outcome:
    """The outcome of an execution that begins a new life. `life`: its payload and version, as a JSON object."""
    return Outcome(claimed.id, claimed.claim_no, "continued", life, keep=task.keep_failed)


def cancelled(task: Task[..., Any], claimed: Claimed, error: BaseException | None = None) -> Outcome:
    """The outcome of a requested cancellation. `error`: what the handler raised besides, if anything."""
    described = None if error is None else _describe(task, error)
    return Outcome(claimed.id, claimed.claim_no, "cancelled", error=described, keep=task.keep_failed)


def failed(
    task: Task[..., Any], claimed: Claimed, error: BaseException, verdict: BaseException | None = None
) -> Outcome:
    """The outcome of an attempt after which there is no other. `verdict`: the exception in `error` that decided."""
    return Outcome(claimed.id, claimed.claim_no, "failed", error=_describe(task, error, verdict), keep=task.keep_failed)


def retried_or_failed(
    task: Task[..., Any],
    claimed: Claimed,
    error: BaseException,
    rng: random.Random,
    deadline_in: float | None = None,
) -> Outcome:
    """The outcome of an attempt that raised `error`: what the handler says by it, or the attempts and the
    back-off of the invocation or the task.

    `deadline_in`: seconds until the execution's deadline.
    """
    try:
        backoff = task.backoff if claimed.backoff is None else backoff_from_data(claimed.backoff)
        decision = decide(claimed.attempt, claimed.max_attempts or task.max_attempts, backoff, rng, error, deadline_in)
    except (Exception, SystemExit) as broken:  # noqa: BLE001  # the user's back-off is user code too
        with contextlib.suppress(TypeError):  # its notes are the user's as well
            broken.add_note(f"raised by the back-off of task {task.name!r}, asked after: {described_type(error)}")
        return failed(task, claimed, broken)
    if decision.kind == "released":
        return released(task, claimed, decision.delay)
    if decision.why == "deadline":
        late = DeadlineExceeded(
            f"the next attempt, {decision.delay:g} s after this one, would begin after the deadline; "
            f"this one ended with {summary(error, decision.verdict)}"
        )
        late.__cause__ = error
        return failed(task, claimed, late)
    if decision.kind == "failed":
        return failed(task, claimed, error, decision.verdict)
    return Outcome(
        claimed.id,
        claimed.claim_no,
        "retried",
        error=_describe(task, error, decision.verdict),
        delay=decision.delay,
        keep=task.keep_failed,
    )


def _describe(task: Task[..., Any], error: BaseException, head: BaseException | None = None) -> str:
    return _encode(describe_error(error, task.limits.error_bytes, head)).decode()
