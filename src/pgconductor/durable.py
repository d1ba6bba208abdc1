"""What a handler's durable operations do: steps, waits, and how a handler waits without a slot.

One `Durable` belongs to one run of a handler, and is made when its context is first asked for something durable. It
knows the history, runs steps, and begins and ends waits; what is recorded it hands to a `Journal`, which writes for the
claim.

Suspension. A wait first records itself and then parks its task. When at least one task is parked, none of them is about
to go on, no operation is active, and none began or ended for `SETTLE` seconds, the execution is given up: the engine
cancels the scope of the attempt (`Suspender.suspend`), the handler unwinds, and the execution becomes `waiting`. When a
wait is resolved it is claimed again, from the start: operations that are recorded return at once. A wait that is
resolved before that simply returns.

So between operations a handler must not wait for anything but the context and its own tasks: it would be cut short when
another branch parks. What must not be parked is refused before anything is recorded: under a shield or outside the
attempt's scope, where the unwinding would not reach; under a finite deadline of the user's, which a replay would begin
anew; inside a step.

Invariants: what an operation returns is what is recorded, encoded and decoded again, so that a replay gets the same. A
wait that was read from the database is delivered, or the history is loaded again: the database tells it once.

Cancellation: a step's value is written in a bounded shield once its function has returned. A parked child whose wait is
cancelled by the handler's own scope is cancelled too; an unwinding that the engine began leaves children alone.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
import random
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeAlias, TypeVar, cast

import trio

from .codec import Limits, ResultCodec, describe_error, printable
from .errors import DurableMisuse, InvalidOption, InvalidTask, NonDeterminism, StepFailed, Unstorable
from .history import History
from .model import Record
from .options import checked_int
from .records import error_record
from .retry import Backoff, BackoffLike, Exponential, Fixed, checked_backoff, decide

if TYPE_CHECKING:
    from .tasks import Invocation

T = TypeVar("T")

logger = logging.getLogger("pgconductor.task")

SETTLE: Final = 0.01  # seconds in which no operation began or ended after which a parked execution is given up
_LAST_WORDS: Final = 5.0  # seconds for writing what has happened already
_RETRY_READ: Final = 0.005  # the database's clock is a little behind ours
MAX_TRIES: Final = 10_000

_step: ContextVar[str | None] = ContextVar("pgconductor_step", default=None)  # the step that this code is in


class Place(Enum):
    """Where an operation is asked for, seen from the attempt's scope."""

    INSIDE = "inside"
    OUTSIDE = "outside"  # under a shield, or from a task that is not of this attempt
    BOUNDED = "bounded"  # under a finite deadline of the handler's own


def locate(scope: trio.CancelScope, outer_deadline: float) -> Place:
    """Where the current task is, seen from an attempt's scope. `outer_deadline`: of the scopes outside that one.

    There is no checkpoint between: nothing notices.
    """
    deadline = scope.deadline
    try:
        scope.deadline = -math.inf
        if trio.current_effective_deadline() != -math.inf:
            return Place.OUTSIDE
        scope.deadline = math.inf
        effective = trio.current_effective_deadline()
    finally:
        scope.deadline = deadline
    return Place.BOUNDED if -math.inf < effective < outer_deadline else Place.INSIDE


class Suspender(Protocol):
    """The scope of the attempt; the engine's `Interruption` is one."""

    @property
    def is_unwinding(self) -> bool:
        """Whether the engine has asked the handler to end, for whatever reason."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether the worker is stopping, and waits for handlers."""
        ...

    @property
    def task(self) -> trio.lowlevel.Task | None:
        """The task that runs the handler, None if that is a thread."""
        ...

    def suspend(self) -> None:
        """Unwind: the execution waits."""
        ...

    def give_way(self) -> None:
        """Unwind: the execution is given back."""
        ...

    def continue_as_new(self, payload: str, version: str | None) -> None:
        """Unwind: the execution begins a new life, with this payload, of this version of its task."""
        ...

    def locate(self) -> Place:
        """Where the current task is."""
        ...


@dataclass(frozen=True, slots=True)
class Saved:
    """A record as the database has it: exactly one is there."""

    value: str | None
    error: str | None


class Revoked(Exception):
    """The claim is no longer ours, and the attempt is being cancelled. Never reaches a handler."""


class Journal(Protocol):
    """Writes for the claim of one execution. All methods raise `Revoked`."""

    async def load(self) -> list[Record]:
        """Return what is recorded."""
        ...

    async def admit(self, name: str, kind: str) -> None:
        """Called before anything that is not recorded is done or begun. Where nothing new is to be done, it does not
        return.
        """
        ...

    async def save_step(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        """Record a step; return what is recorded, which may be of an earlier call. Raises `Unstorable`."""
        ...

    async def start_waits(self, waits: Sequence[Mapping[str, object]]) -> list[Record]:
        """Begin waits. Raises `DurableMisuse` if a child would be too deep."""
        ...

    async def read_waits(self) -> list[Record] | None:
        """Return the waits that were resolved, each once; of these records name, outcome, value and error are told.

        None: an answer was lost, load the history.
        """
        ...

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        """Cancel the children behind these waits."""
        ...


_SOON: Final = Exponential(initial=0.1, maximum=10.0)


@dataclass(frozen=True, slots=True)
class Tries:
    """How often a step is tried, and how long between: in the process, while the handler keeps its slot.

    `tries`: 1 to 10,000, the first counted. `backoff`: as a task's.
    """

    tries: int = 3
    backoff: BackoffLike = _SOON

    def __post_init__(self) -> None:
        checked_int("Tries(tries=)", self.tries, minimum=1, maximum=MAX_TRIES)
        checked_backoff("Tries(backoff=)", self.backoff)


TriesLike: TypeAlias = Tries | int | None


@dataclass(slots=True, eq=False)
class Parked:
    """A task that waits. `is_over`: whether it need wait no longer. `due_at`: when to ask the database, by Trio's
    clock."""

    is_over: Callable[[], bool]
    due_at: float
    woken: trio.Event


class Durable:
    """See the module's description."""

    def __init__(
        self,
        attempt: int,
        journal: Journal,
        suspender: Suspender,
        limiter: trio.CapacityLimiter,
        rng: random.Random,
        limits: Limits,
        child_row: Callable[[Invocation[Any]], Mapping[str, object]],
        bind: Callable[[dict[str, Any]], Invocation[Any]],
    ) -> None:
        """`attempt`: of this run. `child_row`: an invocation as `start_waits` takes it. `bind`: arguments of the task
        whose handler runs as an invocation of it; raises `InvalidPayload`.
        """
        self._attempt = attempt
        self.journal = journal
        self.suspender = suspender
        self.limits = limits
        self.child_row = child_row
        self.bind = bind
        self._closed: set[str] = set()  # children that were asked to end
        self._limiter = limiter
        self._rng = rng
        self._history: History | None = None
        self._loading = trio.Lock()
        self._active = 0
        self._moved_at = -math.inf  # when the handler last went on: an operation began or ended, or a wait did
        self._parked: dict[Parked, None] = {}  # in order; the first of them watches for the time to suspend
        self._is_nudged = False  # something may have been resolved
        self._must_reload = False
        self._reading = trio.Lock()
        self._numbers: dict[str, int] = {}
        self._patches: dict[str, bool] = {}
        self.is_over = False  # the handler has ended

    # Operations

    def require_place(self, what: str, *, waits: bool = False) -> None:
        """Raise `DurableMisuse` where the operation must not be."""
        if self.is_over:
            raise DurableMisuse(f"{what}: the handler of this context has ended")
        if (step := _step.get()) is not None:
            raise DurableMisuse(
                f"{what} inside the step {step!r}: a step is done as a whole or not at all; call it from the handler"
            )
        if not waits or self.suspender.is_unwinding:
            return  # unwinding: the checkpoint that follows raises Cancelled, or the shield lets it through
        place = self.suspender.locate()
        if place is Place.OUTSIDE:
            raise DurableMisuse(
                f"{what} under a shield, or from a task that is not of this handler: it could not be parked there"
            )
        if place is Place.BOUNDED:
            raise DurableMisuse(
                f"{what} under a deadline of Trio's (move_on_after, fail_after): it would begin anew at each replay; "
                f"use the timeout= of the operation"
            )

    @contextmanager
    def operation(self, what: str, *, waits: bool = False) -> Iterator[None]:
        """An operation is active inside the block, so nothing is suspended."""
        self.require_place(what, waits=waits)
        self._active += 1
        self._moved_at = trio.current_time()
        try:
            yield
        finally:
            self._active -= 1
            self._moved_at = trio.current_time()  # however long it took: what the handler does next begins now
            if self._active == 0:
                self._wake_watch()

    @property
    def is_alone(self) -> bool:
        """Whether the code that asks is all there is of the handler: its own task, with no nursery open."""
        task = trio.lowlevel.current_task()
        return task is self.suspender.task and not task.child_nurseries

    async def history(self) -> History:
        """The history, loaded when first asked for."""
        if self._history is None:
            async with self._loading:
                if self._history is None:
                    self._history = History(await _held(self.journal.load()), self._attempt)
        return self._history

    async def admit(self, name: str, kind: str) -> None:
        """To be called before what is not recorded is done or begun. A replay check does not return from it."""
        await _held(self.journal.admit(name, kind))

    def numbered(self, kind: str) -> str:
        """A name for an operation that was given none: the first, second, ... of its kind."""
        if not self.is_alone:
            raise DurableMisuse(f"ctx.{kind}() in a handler with branches needs a name=: branches come in any order")
        self._numbers[kind] = number = self._numbers.get(kind, 0) + 1
        return f"{kind}-{number}"

    # Steps

    async def step(
        self, name: str, fn: Callable[..., Any], args: Sequence[object], retry: TriesLike, timeout: float | None
    ) -> Any:
        """See `Context.step`."""
        what = f"ctx.step({name!r})"
        policy = checked_retry(retry)
        with self.operation(what):
            codec = value_codec(name, fn, self.limits)
            history = await self.history()
            record = history.begin(name, "step", alone=self.is_alone)
            if record is None:
                await self.admit(name, "step")
                position = history.place()
                saved, cause = await self._run_step(
                    name, position, functools.partial(fn, *args), codec, policy, timeout
                )
            else:
                await trio.lowlevel.checkpoint()
                saved, cause = Saved(record.value, record.error), None
        return returned(name, saved, codec, cause)

    async def record(self, name: str, kind: str, make: Callable[[], object], codec: ResultCodec[Any]) -> Any:
        """Return what `make` returns, the same at each replay. It must not wait."""
        with self.operation(f"ctx.{kind}()"):
            history = await self.history()
            record = history.begin(name, kind, alone=self.is_alone)
            if record is None:
                await self.admit(name, kind)
                saved = await self.save(name, kind, history.place(), codec.encode(make()), None)
            else:
                await trio.lowlevel.checkpoint()
                saved = Saved(record.value, record.error)
        return returned(name, saved, codec, None)

    async def patched(self, change: str) -> bool:
        """See `Context.patched`."""
        what = f"ctx.patched({change!r})"
        with self.operation(what):
            history = await self.history()
            if (known := self._patches.get(change)) is not None:
                await trio.lowlevel.checkpoint()
                return known
            if not self.is_alone:
                raise DurableMisuse(
                    f"{what} in a branch: which of them has come further is not known; ask before they begin, and hand "
                    f"the answer on"
                )
            if history.get(change) is None and history.has_unasked():
                # What follows was done by a run of code without the change, so it is not in force; and need not be
                # recorded, since that stays true.
                await trio.lowlevel.checkpoint()
                self._patches[change] = False
                return False
            if history.begin(change, "patch", alone=True) is None:
                await self.admit(change, "patch")
                await self.save(change, "patch", history.place(), "true", None)
            else:
                await trio.lowlevel.checkpoint()
            self._patches[change] = True
            return True

    async def _run_step(
        self,
        name: str,
        position: int,
        call: Callable[[], Any],
        codec: ResultCodec[Any],
        policy: Tries,
        timeout: float | None,
    ) -> tuple[Saved, BaseException | None]:
        tries = 0
        backoff: Backoff = checked_backoff("Tries(backoff=)", policy.backoff)
        while True:
            tries += 1
            try:
                text = codec.encode(await self._try_step(name, call, timeout))
            except (DurableMisuse, NonDeterminism):
                raise  # of the handler's code, not of what the step does
            except Exception as error:  # what a step raises is data
                decision = decide(tries, policy.tries, backoff, self._rng, error)
                if decision.kind == "released":
                    raise  # Snooze: it has not failed
                if decision.kind == "failed":
                    return await self._save_failure(name, position, error, decision.verdict)
                logger.info("step %r failed, and is tried again in %.3g s: %r", name, decision.delay, error)
                await trio.sleep(decision.delay)
            else:
                try:
                    return await self.save(name, "step", position, text, None), None
                except Unstorable as error:
                    return await self._save_failure(name, position, error, None)

    async def _save_failure(
        self, name: str, position: int, error: BaseException, head: BaseException | None
    ) -> tuple[Saved, BaseException]:
        described = json.dumps(describe_error(error, self.limits.error_bytes, head))
        return await self.save(name, "step", position, None, described), error

    async def _try_step(self, name: str, call: Callable[[], Any], timeout: float | None) -> Any:
        token = _step.set(name)
        try:
            with trio.CancelScope(deadline=trio.current_time() + (math.inf if timeout is None else timeout)) as scope:
                if _is_async(call):
                    return await call()
                value = await trio.to_thread.run_sync(call, limiter=self._limiter)
                return await value if inspect.isawaitable(value) else value
        finally:
            _step.reset(token)
        assert scope.cancelled_caught
        raise TimeoutError(f"step {name!r} ran for more than {timeout:g} s")

    async def save(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        """Record what has happened. A cancelled caller waits for it, for a bounded time."""
        with suppress(Revoked), trio.move_on_after(_LAST_WORDS, shield=True):
            return await self.journal.save_step(name, kind, position, value, error)
        # Cancelled, or it goes on waiting for the database.
        return await _held(self.journal.save_step(name, kind, position, value, error))

    # Waits

    async def wait(self, what: str, name: str, kind: str, spec: Mapping[str, object]) -> Record:
        """Begin a wait, or find it begun; return its record when it is resolved. `spec`: see `start_waits` in SQL."""
        with self.operation(what, waits=True):
            history = await self.history()
            target = cast("str | None", spec.get("target"))
            record = history.begin(name, kind, alone=self.is_alone, target=target)
            if record is None:
                await self.admit(name, kind)
                (record,) = await self.start([{"name": name, "kind": kind, **spec}])
            elif record.outcome is not None:
                await trio.lowlevel.checkpoint()
        if record.outcome is None:
            await self.park(lambda: self.outcome(name) is not None, record.due_in)
            record = cast(Record, history.get(name))
        return record

    async def start(self, specs: Sequence[Mapping[str, object]]) -> list[Record]:
        """Begin waits, whose names are in use already."""
        history = await self.history()
        records = await _held(self.journal.start_waits([{**spec, "position": history.place()} for spec in specs]))
        for record in records:
            history.note(record)
        return records

    def outcome(self, name: str) -> str | None:
        """How a wait has ended, None if it has not."""
        record = None if self._history is None else self._history.get(name)
        return None if record is None else record.outcome

    def record_of(self, name: str) -> Record | None:
        """What is recorded under a name, as far as it is loaded."""
        return None if self._history is None else self._history.get(name)

    def nudge(self) -> None:
        """Something may have been resolved: have it read, by whoever is parked now or next."""
        self._is_nudged = True
        self._wake_watch()

    @property
    def has_open_children(self) -> bool:
        """Whether there are children that had not ended when that was last read."""
        return self._history is not None and self._history.has_open("child")

    @property
    def is_parked(self) -> bool:
        return bool(self._parked)

    async def park(self, is_over: Callable[[], bool], due_in: float | None = None) -> None:
        """Wait until `is_over`, here, or by giving up the execution."""
        due_at = math.inf if due_in is None else trio.current_time() + due_in
        parked = Parked(is_over, due_at, trio.Event())
        self._parked[parked] = None
        try:
            while not is_over():
                now = trio.current_time()
                if self._is_nudged or now >= parked.due_at:
                    await self._read()
                    parked.due_at = (
                        max(parked.due_at, trio.current_time() + _RETRY_READ) if due_in is not None else math.inf
                    )
                    continue
                until = parked.due_at
                if self._active == 0 and next(iter(self._parked)) is parked and not self._has_over():
                    settled_at = self._moved_at + SETTLE
                    if now >= settled_at:
                        self.suspender.suspend()
                        await trio.sleep_forever()
                    until = min(until, settled_at)
                parked.woken = trio.Event()
                with trio.CancelScope(deadline=until):
                    await parked.woken.wait()
        finally:
            del self._parked[parked]
            self._moved_at = trio.current_time()
            self._wake_watch()

    def _has_over(self) -> bool:
        """Whether a parked task is about to go on. What it waited for has been told, and is not told again."""
        return any(parked.is_over() for parked in self._parked)

    def _wake_watch(self) -> None:
        if self._parked:
            next(iter(self._parked)).woken.set()

    async def _read(self) -> None:
        """Have the database tell what was resolved; in a shield, since it tells it once."""
        self._is_nudged = False
        self._active += 1  # nothing is suspended meanwhile
        try:
            async with self._reading:
                records = await _held(self._read_once())
            history = await self.history()
            for record in records:
                known = history.get(record.name)
                if known is not None and known.outcome is None and record.outcome is not None:
                    history.note(
                        known._replace(outcome=record.outcome, value=record.value, error=record.error, due_in=None)
                    )
        finally:
            self._active -= 1
            for parked in self._parked:
                if parked.is_over():
                    parked.woken.set()
            self._wake_watch()

    async def _read_once(self) -> list[Record]:
        with trio.move_on_after(_LAST_WORDS, shield=True):
            records = None if self._must_reload else await self.journal.read_waits()
            if records is None:
                records = await self.journal.load()
            self._must_reload = False
            return records
        self._must_reload = self._is_nudged = True
        return []

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        """Cancel children, also for a cancelled caller; not while the engine unwinds the handler."""
        if names and not self.suspender.is_unwinding:
            self._closed.update(names)
            with suppress(Revoked), trio.move_on_after(_LAST_WORDS, shield=True):
                await self.journal.close_children(names, reason)

    async def continue_as(self, call: Invocation[Any]) -> NoReturn:
        """See `Context.continue_as`."""
        what = "ctx.continue_as_new()"
        with self.operation(what):
            if not self.suspender.is_unwinding:
                if self.suspender.locate() is Place.OUTSIDE or not self.is_alone:
                    raise DurableMisuse(
                        f"{what} under a shield or in a handler with branches: the handler could not be ended there"
                    )
                history = await self.history()
                if left := [name for name in history.open_names("child") if name not in self._closed]:
                    raise DurableMisuse(
                        f"{what} with open children: {', '.join(map(printable, left[:10]))}; wait for them, or cancel "
                        f"them"
                    )
                self.suspender.continue_as_new(call.payload, call.task.version)
        await trio.sleep_forever()

    async def checkpoint(self) -> None:
        """See `Context.checkpoint`."""
        with self.operation("ctx.checkpoint()"):
            if self.suspender.is_draining:
                self.suspender.give_way()
            await trio.lowlevel.checkpoint()

    @property
    def is_loaded(self) -> bool:
        """Whether the handler has asked for anything that is durable."""
        return self._history is not None

    def asked(self) -> list[str]:
        """What the handler has asked for, in words and in order."""
        return [] if self._history is None else self._history.asked()

    def unused(self) -> list[Record]:
        """What is recorded of this attempt, and the handler has not asked for."""
        return [] if self._history is None else self._history.unused()

    def end(self, *, completed: bool) -> None:
        """The handler has ended: operations are refused from now on."""
        self.is_over = True
        if completed and (unused := self.unused()):
            logger.warning(
                "the handler returned without asking for what was recorded in this attempt: %s",
                ", ".join(f"{record.kind} {printable(record.name)!r}" for record in unused[:10]),
            )


async def _held(asking: Awaitable[T]) -> T:
    """What the journal answers, if the claim is still ours; else the attempt's scope ends us."""
    try:
        return await asking
    except Revoked:
        pass
    await trio.sleep_forever()


# Values


def returned(name: str, saved: Saved, codec: ResultCodec[Any], cause: BaseException | None) -> Any:
    """What a record means: its value, or the failure."""
    if saved.error is None:
        return codec.decode("null" if saved.value is None else saved.value)
    record = error_record(saved.error)
    said = ": ".join(printable(record[key]) for key in ("type", "message") if record.get(key))
    failure = StepFailed(f"step {printable(name)!r} failed: {said}", record)
    if cause is None and (traceback := record.get("traceback")):
        failure.add_note(f"Traceback of the step:\n{traceback}")
    raise failure from cause


@functools.lru_cache(maxsize=256)
def _codec_of(kind: Any, limits: Limits) -> ResultCodec[Any]:
    return ResultCodec(_type_words(kind), kind, limits=limits, kind_of_value="value of a step of type")


def _type_words(kind: Any) -> str:
    return kind.__qualname__ if isinstance(kind, type) else str(kind)


def value_codec(name: str, fn: Callable[..., Any], limits: Limits) -> ResultCodec[Any]:
    """The codec of what a step's function returns, by its annotation; without one, any JSON value."""
    inner: Any = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not callable(inner):
        raise InvalidOption(f"ctx.step({name!r}, ...) needs a function, not {type(inner).__name__}")
    if "return" not in getattr(inner, "__annotations__", {}):
        return _codec_of(Any, limits)
    try:
        kind = typing.get_type_hints(inner, include_extras=True)["return"]
    except Exception as error:
        raise InvalidTask(
            f"the annotation of what step {name!r} returns cannot be read: {error}; name types that exist there"
        ) from error
    try:
        return _codec_of(kind, limits)
    except TypeError:  # a type that cannot be hashed
        return _codec_of.__wrapped__(kind, limits)


def _is_async(call: Callable[[], Any]) -> bool:
    inner: Any = call
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


def checked_retry(retry: object) -> Tries:
    """Return what `retry=` stands for: None is one try, a number is as many."""
    if retry is None:
        return _ONCE
    if isinstance(retry, Tries):
        return retry
    if isinstance(retry, int) and not isinstance(retry, bool):
        return Tries(retry)
    raise InvalidOption(f"retry= takes a Tries or a number of tries, not {type(retry).__name__}")


_ONCE: Final = Tries(1, Fixed(0.0))
