"""What a handler's durable operations do: steps, waits, and how a handler waits without a slot.

One `Durable` belongs to one run of a handler, and is made when its context is first asked for something durable. It
knows the history, runs steps, and begins and ends waits; what is recorded it hands to a `Journal`, which writes for the
claim.

Suspension. A wait first records itself and then parks its task. When at least one task is parked, no operation is
active, and none began or ended and no wait ended for `SETTLE` seconds and some turns of Trio's loop, the execution is
given up: the engine cancels the scope of the attempt (`Suspender.suspend`), the handler unwinds, and the execution
becomes `waiting`. When a wait is resolved it is claimed again, from the start: operations that are recorded return at
once. A wait that is resolved before that simply returns.

So between operations a handler must not wait for anything but the context and its own tasks: it would be cut short when
another branch parks. What must not be parked is refused before anything is recorded: under a shield or outside the
attempt's scope, where the unwinding would not reach; under a finite deadline of the user's, which a replay would begin
anew; inside a step. While a handler unwinds to begin again, nothing is recorded: its next run would not find it where
it belongs.

Invariants: what an operation returns is what is recorded, encoded and decoded again, so that a replay gets the same. A
wait that was read from the database is delivered, or the history is loaded again: the database tells it once. Should an
execution be given up all the same, the database is told which waits its tasks are parked for, and looks at those again.

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
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import trio

from .codec import Limits, ResultCodec, describe_error, printable
from .errors import DurableMisuse, InvalidOption, InvalidTask, NonDeterminism, StepFailed, Unwinding
from .history import History
from .model import Record
from .options import checked_int, checked_seconds
from .records import error_record
from .retry import Backoff, BackoffLike, Exponential, Fixed, checked_backoff, decide

if TYPE_CHECKING:
    from .db.transactions import OpenTransaction, Transactions
    from .tasks import Invocation

T = TypeVar("T")

logger = logging.getLogger("pgconductor.task")

SETTLE: Final = 0.01  # seconds without a new operation after which a parked execution is given up
LAST_WORDS: Final = 5.0  # seconds for writing what has happened already
_TURNS: Final = 8  # of Trio's loop besides: when it was busy, seconds pass in which no task had its turn
_RETRY_READ: Final = 0.005  # the database's clock is a little behind ours
_MAX_RETRY_READ: Final = 1.0
MAX_TRIES: Final = 10_000

_step: ContextVar[str | None] = ContextVar("pgconductor_step", default=None)  # the step that this code is in


class Place(Enum):
    """Where an operation is asked for, seen from the attempt's scope."""

    INSIDE = "inside"
    OUTSIDE = "outside"  # under a shield, or from a task that is not of this attempt
    BOUNDED = "bounded"  # under a finite deadline of the handler's own


def locate(scope: trio.CancelScope) -> Place:
    """Where the current task is, seen from an attempt's scope.

    There is no checkpoint between: nothing notices.
    """
    deadline = scope.deadline
    try:
        scope.deadline = -math.inf
        if trio.current_effective_deadline() != -math.inf:
            return Place.OUTSIDE
        scope.deadline, scope.shield = math.inf, True  # what is left are the handler's own
        effective = trio.current_effective_deadline()
    finally:
        scope.deadline, scope.shield = deadline, False
    return Place.BOUNDED if -math.inf < effective < math.inf else Place.INSIDE


class Suspender(Protocol):
    """The scope of the attempt; the engine's `Interruption` is one."""

    @property
    def is_unwinding(self) -> bool:
        """Whether the engine has asked the handler to end, for whatever reason."""
        ...

    @property
    def will_replay(self) -> bool:
        """Whether it has asked for that so that the handler begins again, with the same history."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether the worker is stopping, and waits for handlers."""
        ...

    @property
    def is_alone(self) -> bool:
        """Whether the code that asks is all there is of the handler: its own task, with no nursery open."""
        ...

    def suspend(self, awaited: Sequence[str]) -> None:
        """Unwind: the execution waits. `awaited`: the waits any of which is to wake it."""
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

    async def run_sync(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        """Run a plain function: in the handler's thread if it has one, else in one of its own. Waits for its end."""
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

    async def load(self, *, is_first: bool) -> list[Record]:
        """Return what is recorded. `is_first`: before this run has recorded anything."""
        ...

    async def admit(self, name: str, kind: str) -> None:
        """Called before anything that is not recorded is done or begun. Where nothing new is to be done, it does not
        return.
        """
        ...

    async def save_step(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        """Record a step; return what is recorded, which may be of an earlier call. Raises `Unstorable`."""
        ...

    async def save_step_inside(
        self, transaction: OpenTransaction, name: str, kind: str, position: int, value: str
    ) -> Saved | None:
        """Record a step in its own transaction, which is still to be committed. None: there is a record already.

        Raises `Unavailable` if the transaction is lost, `DurableMisuse` if it is another than it was, psycopg's errors.
        """
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

    async def save_effect(self, name: str, position: int, effect: Mapping[str, object]) -> str | None:
        """Do something in the schema itself and record it; return what is recorded. Raises `Unstorable`."""
        ...

    async def set_progress(self, value: str) -> None:
        """Tell how far the execution has come. Raises `Unstorable`."""
        ...

    async def open_channel(self, name: str, capacity: int) -> int:
        """Open a channel; return how many items this life of the execution has sent."""
        ...

    async def append_item(self, channel: str, seq: int, value: str) -> bool:
        """Append an item; False if the channel is full. Raises `Unstorable`."""
        ...

    async def close_channel(self, name: str) -> None:
        """Say that nothing more comes."""
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
    clock. `name`: the wait, if it waits for a single one."""

    is_over: Callable[[], bool]
    due_at: float
    name: str | None
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
        transactions: Transactions | None = None,
    ) -> None:
        """`attempt`: of this run. `child_row`: an invocation as `start_waits` takes it. `bind`: arguments of the task
        whose handler runs as an invocation of it; raises `InvalidPayload`. `transactions`: for its steps, None where
        there are none.
        """
        self._attempt = attempt
        self.journal = journal
        self.suspender = suspender
        self.limits = limits
        self.child_row = child_row
        self.rng = rng
        self.transactions = transactions
        self.bind = bind
        self._closed: set[str] = set()  # children that were asked to end
        self._limiter = limiter
        self._history: History | None = None
        self._loading = trio.Lock()
        self._active = 0
        self._stirred_at = -math.inf  # when an operation began or ended, or a wait ended
        self._stirs = 0
        self._has_waits = False
        self._due_at: dict[str, float] = {}  # of open waits, by Trio's clock
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
        require_outside_steps(what)
        if self.suspender.will_replay and trio.current_effective_deadline() != -math.inf:
            raise DurableMisuse(
                f"{what} under a shield while the handler ends to begin again later: it would be recorded where the "
                f"next run does not ask for it"
            )
        if not waits or self._is_cancelled():
            return
        place = self.suspender.locate()
        if place is Place.OUTSIDE:
            raise DurableMisuse(
                f"{what} under a shield, or from a task that is not of this handler: it could not be parked there"
            )
        if place is Place.BOUNDED:
            raise DurableMisuse(
                f"{what} under a deadline of Trio's (move_on_after, fail_after): it would begin anew at each replay; "
                f"use the timeout= of the operation, or of the child: task.options(timeout=...)"
            )

    def _is_cancelled(self) -> bool:
        """Whether the handler is to end and no shield keeps it from that: the next checkpoint raises `Cancelled`."""
        return self.suspender.is_unwinding and trio.current_effective_deadline() == -math.inf

    @contextmanager
    def operation(self, what: str, *, waits: bool = False) -> Iterator[None]:
        """An operation is active inside the block, so nothing is suspended."""
        self.require_place(what, waits=waits)
        self._active += 1
        self._stir()
        try:
            yield
        finally:
            self._active -= 1
            self._stir()  # however long it took: what the handler does next begins now
            if self._active == 0:
                self._wake_watch()

    def _stir(self) -> None:
        self._stirs += 1
        self._stirred_at = trio.current_time()

    @property
    def is_alone(self) -> bool:
        """Whether the code that asks is all there is of the handler: its own task, with no nursery open."""
        return self.suspender.is_alone

    async def history(self) -> History:
        """The history, loaded when first asked for. A cancelled caller gets none: its operation does not begin."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._history is None:
            async with self._loading:
                if self._history is None:
                    records = await held(self.journal.load(is_first=True))
                    for record in records:
                        self._note_due(record)
                    self._history = History(records, self._attempt)
        return self._history

    def _note_due(self, record: Record) -> None:
        if record.outcome is None:
            self._has_waits = True
            if record.due_in is not None:
                self._due_at[record.name] = trio.current_time() + record.due_in

    async def admit(self, name: str, kind: str) -> None:
        """To be called before what is not recorded is done or begun. A replay check does not return from it."""
        if self.suspender.locate() is Place.OUTSIDE:
            # Under a shield: that a scope outside the attempt was cancelled is noted in the next turn.
            await trio.lowlevel.cancel_shielded_checkpoint()
            self.require_place(f"{kind} {name!r}")
        await held(self.journal.admit(name, kind))

    def numbered(self, kind: str) -> str:
        """A name for an operation that was given none: the first, second, ... of its kind."""
        self.require_place(f"ctx.{kind}()")
        if not self.is_alone:
            raise DurableMisuse(f"ctx.{kind}() in a handler with branches needs a name=: branches come in any order")
        self._numbers[kind] = number = self._numbers.get(kind, 0) + 1
        return f"{kind}-{number}"

    # Steps

    async def step(
        self,
        name: str,
        fn: Callable[..., Any],
        args: Sequence[object],
        retry: TriesLike,
        timeout: float | timedelta | None,
    ) -> Any:
        """See `Context.step`."""
        what = f"ctx.step({name!r})"
        policy = checked_retry(retry)
        limit = None if timeout is None else checked_seconds("a step's timeout", timeout, minimum=0.001)
        with self.operation(what):
            codec = value_codec(name, fn, self.limits)
            history = await self.history()
            record = history.begin(name, "step", alone=self.is_alone)
            if record is None:
                await self.admit(name, "step")
                position = history.place()
                saved, cause = await self._run_step(name, position, functools.partial(fn, *args), codec, policy, limit)
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

    async def effect(self, what: str, name: str, kind: str, spec: Mapping[str, object], codec: ResultCodec[Any]) -> Any:
        """Do something in the schema itself, exactly once, and return what is recorded of it; `spec`: see
        `save_effects` in SQL.
        """
        with self.operation(what):
            history = await self.history()
            record = history.begin(name, kind, alone=self.is_alone)
            if record is None:
                await self.admit(name, kind)
                value = await held(self.journal.save_effect(name, history.place(), {"kind": kind, **spec}))
            else:
                await trio.lowlevel.checkpoint()
                value = record.value
        return codec.decode("null" if value is None else value)

    async def open_channel(self, name: str, capacity: int) -> int:
        """Open a channel, inside an operation; return how many items were sent."""
        return await held(self.journal.open_channel(name, capacity))

    async def append_item(self, channel: str, seq: int, value: str) -> bool:
        """Append an item, inside an operation; False if the channel is full."""
        return await held(self.journal.append_item(channel, seq, value))

    async def close_channel(self, name: str) -> None:
        """Close a channel, inside an operation."""
        await held(self.journal.close_channel(name))

    async def tell_progress(self, value: str) -> None:
        """See `Context.set_progress`. Allowed in steps too: nothing is recorded that a replay would ask for."""
        if self.is_over:
            raise DurableMisuse("ctx.set_progress(): the handler of this context has ended")
        await held(self.journal.set_progress(value))

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
        value: Any = None
        backoff: Backoff = checked_backoff("Tries(backoff=)", policy.backoff)
        while True:
            tries += 1
            try:
                value = await self.call_step(name, call, timeout)
            except (DurableMisuse, NonDeterminism):
                raise  # of the handler's code, not of what the step does
            except Exception as error:  # what a step raises is data
                # But not what it raises because it was cancelled, which a replay would raise again.
                await trio.lowlevel.checkpoint_if_cancelled()
                decision = decide(tries, policy.tries, backoff, self.rng, error)
                if decision.kind == "released":
                    raise  # Snooze: it has not failed
                if decision.kind == "failed":
                    return await self.save_failure(name, "step", error, decision.verdict)
                logger.info("step %r failed, and is tried again in %.3g s: %r", name, decision.delay, error)
                await trio.sleep(decision.delay)
            else:
                break
        # It has been done, and is not done again because its value does not fit.
        try:
            return await self.save(name, "step", position, codec.encode(value), None), None
        except Exception as error:  # noqa: BLE001  # what the value's own classes raise
            return await self.save_failure(name, "step", error, None)

    async def save_failure(
        self, name: str, kind: str, error: BaseException, head: BaseException | None
    ) -> tuple[Saved, BaseException]:
        """Record that a step failed, by `error`; `head`: the verdict in it, if there is one."""
        # Its place is where it failed, not where it began: what begins after that has dealt with it.
        position = cast(History, self._history).place()
        described = json.dumps(describe_error(error, self.limits.error_bytes, head))
        return await self.save(name, kind, position, None, described), error

    async def call_step(self, name: str, call: Callable[[], Any], timeout: float | None) -> Any:
        """Call a step's function once, with whatever it raises; `TimeoutError` after `timeout` seconds."""
        with inside_step(name):
            if timeout is None:
                return await self._call_step(name, call)
            with trio.move_on_after(timeout):
                return await self._call_step(name, call)
        raise step_timeout(name, timeout)

    async def _call_step(self, name: str, call: Callable[[], Any]) -> Any:
        if is_async(call):
            return await call()
        value: Any = await self.suspender.run_sync(functools.partial(_call_inside, name, call), self._limiter)
        return await value if inspect.isawaitable(value) else value

    async def save(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        """Record what has happened. A cancelled caller waits for it, for a bounded time."""
        try:
            return await self.journal.save_step(name, kind, position, value, error)
        except trio.Cancelled:
            # Again, in a shield: a scope around each save would cost as much as the rest (benchmarks/peers/steps.py).
            with suppress(Revoked), trio.move_on_after(LAST_WORDS, shield=True):
                await self.journal.save_step(name, kind, position, value, error)
            raise
        except Revoked:
            pass
        await until_unwound()

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
            await self.park_for(name)
            record = cast(Record, history.get(name))
        return record

    async def start(self, specs: Sequence[Mapping[str, object]]) -> list[Record]:
        """Begin waits, whose names are in use already."""
        history = await self.history()
        self._has_waits = True
        records = await held(self.journal.start_waits([{**spec, "position": history.place()} for spec in specs]))
        for record in records:
            history.note(record)
            self._note_due(record)
        return records

    def outcome(self, name: str) -> str | None:
        """How a wait has ended, None if it has not."""
        record = self.record_of(name)
        return None if record is None else record.outcome

    def record_of(self, name: str) -> Record | None:
        """What is recorded under a name, as far as it is loaded."""
        return None if self._history is None else self._history.get(name)

    def has_failed_child(self, scope: str) -> bool:
        """Whether a child of this nursery is known to have ended otherwise than by completing."""
        return self._history is not None and self._history.has_failed_child(scope)

    def nudge(self) -> None:
        """Something may have been resolved: have it read, by whoever is parked now or next."""
        if self._has_waits:
            self._is_nudged = True
            self._wake_watch()

    @property
    def may_leave_children(self) -> bool:
        """Whether there are children that had not ended when that was last read; or it was never read."""
        return self._history is None or bool(self._history.open_names("child"))

    async def park_for(self, name: str) -> None:
        """Wait until a wait has ended, here, or by giving up the execution."""
        await self._park(lambda: self.outcome(name) is not None, self._due_at.get(name, math.inf), name)

    @property
    def is_parked(self) -> bool:
        """Whether a task of the handler waits for a wait."""
        return bool(self._parked)

    async def park(self, is_over: Callable[[], bool]) -> None:
        """The same for waits of one scope: until `is_over`."""
        await self._park(is_over, math.inf, None)

    async def _park(self, is_over: Callable[[], bool], due_at: float, name: str | None) -> None:
        parked = Parked(is_over, due_at, name, trio.Event())
        self._parked[parked] = None
        nap = _RETRY_READ
        try:
            while not is_over():
                now = trio.current_time()
                if self._is_nudged or now >= parked.due_at:
                    await self._read()
                    if now >= parked.due_at:
                        parked.due_at = trio.current_time() + nap
                        nap = min(2 * nap, _MAX_RETRY_READ)
                    continue
                until = parked.due_at
                if self._active == 0 and next(iter(self._parked)) is parked:
                    settled_at = self._stirred_at + SETTLE
                    if now < settled_at:
                        until = min(until, settled_at)
                    elif await self._is_quiet():
                        self.suspender.suspend([one.name for one in self._parked if one.name is not None])
                        await until_unwound()
                    else:
                        continue
                parked.woken = trio.Event()
                with trio.CancelScope(deadline=until):
                    await parked.woken.wait()
        finally:
            del self._parked[parked]
            self._stir()  # whoever waited goes on
            self._wake_watch()

    async def _is_quiet(self) -> bool:
        """Whether nothing stirs although every task has its turn."""
        stirs = self._stirs
        for _ in range(_TURNS):
            await trio.lowlevel.checkpoint()
            if self._active or self._is_nudged or self._stirs != stirs:
                return False
        return not self._wake_over()

    def _wake_over(self) -> bool:
        over = [parked for parked in self._parked if parked.is_over()]
        for parked in over:
            parked.woken.set()
        return bool(over)

    def _wake_watch(self) -> None:
        if self._parked:
            next(iter(self._parked)).woken.set()

    async def _read(self) -> None:
        """Have the database tell what was resolved; in a shield, since it tells it once."""
        self._is_nudged = False
        self._active += 1  # nothing is suspended meanwhile
        has_read = False
        try:
            async with self._reading:
                self._deliver(await held(self._read_once()))
            has_read = True
        finally:
            self._active -= 1
            self._is_nudged = self._is_nudged or not has_read
            self._wake_over()
            self._wake_watch()

    def _deliver(self, records: list[Record]) -> None:
        history = self._history
        assert history is not None
        for record in records:
            known = history.get(record.name)
            if known is not None and known.outcome is None and record.outcome is not None:
                history.note(
                    known._replace(outcome=record.outcome, value=record.value, error=record.error, due_in=None)
                )

    async def look_up(self, name: str) -> Record | None:
        """What the database has under a name: for an operation whose answer was lost. Others wait for their turn."""
        async with self._reading:
            self._must_reload = self._is_nudged = True  # should this be cancelled: what is read is told once
            records = await held(self.journal.load(is_first=False))
            self._must_reload = False
            self._deliver(records)
        self._wake_watch()
        return next((record for record in records if record.name == name), None)

    async def _read_once(self) -> list[Record]:
        with trio.move_on_after(LAST_WORDS, shield=True):
            records = None if self._must_reload else await self.journal.read_waits()
            if records is None:
                records = await self.journal.load(is_first=False)
            self._must_reload = False
            return records
        self._must_reload = self._is_nudged = True
        return []

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        """Cancel children, also for a cancelled caller; not while the engine unwinds the handler."""
        if names:
            await (
                trio.lowlevel.cancel_shielded_checkpoint()
            )  # if it is not the handler's own scope we have been told then
        if names and not self.suspender.is_unwinding:
            self._closed.update(names)
            with suppress(Revoked), trio.move_on_after(LAST_WORDS, shield=True):
                await self.journal.close_children(names, reason)

    async def continue_as(self, call: Invocation[Any]) -> NoReturn:
        """See `Context.continue_as`."""
        what = "ctx.continue_as_new()"
        with self.operation(what):
            if not self._is_cancelled():
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
        await until_unwound()

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


async def held(asking: Awaitable[T]) -> T:
    """What the journal answers, if the claim is still ours; else the handler is ended."""
    try:
        return await asking
    except Revoked:
        pass
    await until_unwound()


async def until_unwound() -> NoReturn:
    """End the handler, whose scope is cancelled already; under a shield of its own, which that does not reach, too."""
    await trio.lowlevel.checkpoint_if_cancelled()
    raise Unwinding


def step_timeout(name: str, timeout: float | None) -> TimeoutError:
    """The error of a step that took too long."""
    return TimeoutError(f"step {name!r} ran for more than {timeout:g} s")


def require_outside_steps(what: str) -> None:
    """Raise `DurableMisuse` if the code that asks is a step's."""
    if (step := _step.get()) is not None:
        raise DurableMisuse(
            f"{what} inside the step {step!r}: a step is done as a whole or not at all; call it from the handler"
        )


def _call_inside(name: str, call: Callable[[], T]) -> T:
    with inside_step(name):
        return call()


@contextmanager
def inside_step(name: str) -> Iterator[None]:
    """The code of the block is a step's."""
    token = _step.set(name)
    try:
        yield
    finally:
        _step.reset(token)


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
    known = _codecs.get(inner) if inspect.isfunction(inner) else None
    if known is not None and known[0] is limits:
        return known[1]
    codec = _annotated_codec(name, inner, limits)
    if inspect.isfunction(inner):
        _codecs[inner] = limits, codec
    return codec


# Reading annotations takes longer than all else that a step needs here (benchmarks/peers/steps.py).
_codecs: WeakKeyDictionary[Callable[..., Any], tuple[Limits, ResultCodec[Any]]] = WeakKeyDictionary()


def _annotated_codec(name: str, inner: Callable[..., Any], limits: Limits) -> ResultCodec[Any]:
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


def is_async(call: Callable[..., Any]) -> bool:
    """Whether what is called returns an awaitable, as far as its definition tells."""
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
