"""What a handler is given: who it is, its logger, the resources of the process it runs in, and its durable operations.

Owns nothing: a `Context` is made for one attempt and dropped with it, so it must stay cheap (one object; the logger
and what is durable are made when first asked for). Whether the handler should end is the engine's knowledge: it is
asked, not kept. It never sees a connection or a pool. What waits is durable, and described in `durable.py`; the rest
may be used from the thread of a plain `def` handler.
"""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, Protocol, TypeAlias, TypeVar, TypeVarTuple, cast, overload
from uuid import UUID

from .codec import ResultCodec
from .errors import DurableMisuse, Misuse
from .events import Promise, emit, make_promise, receive, send, set_progress, wait_for_event
from .options import checked_instant, checked_seconds

if TYPE_CHECKING:
    from psycopg.rows import TupleRow

    from .channels import Channel
    from .children import DurableNursery, OnClose
    from .db.connection import TrioConnection
    from .durable import Durable, TriesLike
    from .model import Isolation
    from .sync_context import SyncContext
    from .tasks import Invocable, Invocation

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")

Resources: TypeAlias = Mapping[type[Any], object]

_LOGGER = "pgconductor.task"
_UNATTACHED = (
    "this context belongs to no execution: a handler that is called directly has no durable operations; invoke the "
    "task, and run it with Orchestrator.drain()"
)

_INSTANT: ResultCodec[datetime] = ResultCodec("now", datetime, kind_of_value="value of")
_ID: ResultCodec[UUID] = ResultCodec("uuid", UUID, kind_of_value="value of")
_NUMBER: ResultCodec[float] = ResultCodec("random", float, kind_of_value="value of")


class _BoundLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the execution's ids to each record, beside (not instead of) the `extra` of the call."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


def bound_logger(extra: Mapping[str, object]) -> logging.LoggerAdapter[logging.Logger]:
    """A handler's logger, whose records carry `extra`."""
    return _BoundLogger(logging.getLogger(_LOGGER), extra)


class Watch(Protocol):
    """What knows whether a handler should end; the engine implements it. Both may be asked from any thread."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the handler should end."""
        ...

    def check(self) -> None:
        """Raise `HandlerCancelled` if it should."""
        ...


class Desk(Protocol):
    """Where the thread of a plain ``def`` has its durable operations done; the engine implements it."""

    def call(self, operation: Callable[[], Awaitable[T]], /) -> T:
        """Run an operation in Trio for the thread of a plain ``def`` handler, which it blocks."""
        ...

    def lend(self, opening: Callable[[], AbstractAsyncContextManager[T]], /) -> AbstractContextManager[T]:
        """The same for a block: it is entered and left in Trio, and runs in the thread."""
        ...


class Context:
    """The first parameter of a handler that asks for it by the annotation `Context`.

    `execution_id`: the execution's id, the same at every attempt. `attempt`: which attempt this is, from 1.
    `task` and `queue`: the names the execution runs under.
    """

    __slots__ = (
        "_desk", "_durable", "_logger", "_open_durable", "_resources", "_watch", "attempt", "execution_id", "queue",
        "task",
    )  # fmt: skip

    def __init__(self, execution_id: UUID, attempt: int, *, task: str, queue: str, resources: Resources) -> None:
        """Made by the engine, and by tests that call ``task.handler`` directly.

        `resources` is a mapping of type to object, as `resources_by_type` makes it.
        """
        self.execution_id = execution_id
        self.attempt = attempt
        self.task = task
        self.queue = queue
        self._resources = resources
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None
        self._watch: Watch | None = None
        self._desk: Desk | None = None
        self._open_durable: Callable[[], Durable] | None = None
        self._durable: Durable | None = None

    def attach(self, open_durable: Callable[[], Durable], desk: Desk) -> None:
        """Let `open_durable` make what the durable operations need, when one is asked for, and `desk` do them for a
        thread; the engine's.
        """
        self._open_durable = open_durable
        self._desk = desk

    def close(self) -> None:
        """The handler has ended: nothing durable is begun any more; the engine's."""
        self._open_durable = _refuse

    @property
    def durable(self) -> Durable:
        """What the durable operations use. Raises `DurableMisuse` where no engine runs the handler."""
        if self._durable is None:
            if self._open_durable is None:
                raise DurableMisuse(_UNATTACHED)
            self._durable = self._open_durable()
        return self._durable

    def watch(self, watch: Watch) -> None:
        """Let `watch` say whether the handler should end; the engine's, before it calls the handler."""
        self._watch = watch

    @property
    def is_cancelled(self) -> bool:
        """Whether the handler should end soon: its timeout or deadline has passed, its cancellation was requested, or
        its worker stops.

        For a plain ``def``, whose thread nobody can stop: look now and then, clean up and return or raise. In an
        ``async def`` Trio raises `trio.Cancelled` at the next checkpoint anyway; look if it computes between two. Once
        true it stays so. Does not wait; may be asked from any thread.
        """
        return self._watch is not None and self._watch.is_cancelled

    def check_cancelled(self) -> None:
        """Raise `HandlerCancelled` if `is_cancelled`; let it propagate. Does not wait; from any thread."""
        if self._watch is not None:
            self._watch.check()

    # Durable operations

    @overload
    async def step(
        self, name: str, fn: Callable[[*Ts], Awaitable[T]], /, *args: *Ts,
        retry: TriesLike = None, timeout: float | timedelta | None = None,
    ) -> T: ...  # fmt: skip
    @overload
    async def step(
        self, name: str, fn: Callable[[*Ts], T], /, *args: *Ts,
        retry: TriesLike = None, timeout: float | timedelta | None = None,
    ) -> T: ...  # fmt: skip
    async def step(
        self, name: str, fn: Callable[..., Any], /, *args: object,
        retry: TriesLike = None, timeout: float | timedelta | None = None,
    ) -> Any:  # fmt: skip
        """Call ``fn(*args)`` once and record what it returns; a replay gets the record, and `fn` is not called.

        `name`: 1 to 128 bytes, unique in the handler's run. `fn`: async, or sync, which runs in a thread; keywords by
        `functools.partial`. What it returns must be JSON by its annotation (any JSON without one), and is what a replay
        will get: encoded and decoded. `retry`: a `Tries` or the number of tries, made here while the handler keeps its
        slot; `timeout`: seconds for each try (a thread is waited for all the same). If the process dies while it runs,
        `fn` is called again: at least once, at most once more per death.

        Waits for `fn` and until the record is durable. Raises `StepFailed` when no tries remain, the same at a replay
        (the first time with what `fn` raised as cause); `DurableMisuse`, `NonDeterminism`; `Snooze` of `fn` passes.
        """
        return await self.durable.step(name, fn, args, retry, timeout)

    async def sleep(self, name: str, duration: float | timedelta) -> None:
        """Sleep, without a slot if it is long: recorded at once, so that it goes on though every process dies.

        `name`: as for `step`. `duration`: seconds or a `timedelta`, 0 to a century, from when it is recorded, by the
        database's clock. Raises `DurableMisuse`, `InvalidOption`, `NonDeterminism`.
        """
        seconds = checked_seconds("the duration of a sleep", duration)
        await self.durable.wait(f"ctx.sleep({name!r})", name, "sleep", {"due_in": seconds})

    async def sleep_until(self, name: str, at: datetime) -> None:
        """Sleep until an instant: an aware datetime, years 1 to 9998; as `sleep`."""
        instant = checked_instant("the end of a sleep", at).isoformat()
        await self.durable.wait(f"ctx.sleep_until({name!r})", name, "sleep", {"due_at": instant})

    async def invoke(self, name: str, task: Invocable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a child execution and return its result; the parent waits without a slot, and no attempt is counted.

        `name`: as for `step`. `task`: a task, or ``task.options(...)`` of this conductor. Children may be invoked side
        by side. A child that has not ended when its parent ends is cancelled; `invoke_abandoned` leaves it.

        Raises `ChildFailed`, `ChildTimedOut`, `ChildCancelled`, the same at a replay; `InvalidPayload` before anything
        is recorded; `DurableMisuse` (also beyond a depth of 16), `NonDeterminism`. Cancelling it by a scope of the
        handler's own cancels the child.
        """
        from .children import invoke_child  # here and below: declaring tasks and producing need no event loop

        return await invoke_child(self.durable, name, task.bind(*args, **kwargs), "cancel")

    async def invoke_abandoned(self, name: str, task: Invocable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As `invoke`, but the child goes on when its parent has ended, however that ends."""
        from .children import invoke_child

        return await invoke_child(self.durable, name, task.bind(*args, **kwargs), "abandon")

    def nursery(self, name: str, *, on_parent_close: OnClose = "cancel") -> AbstractAsyncContextManager[DurableNursery]:
        """A nursery that is kept in the database: ``async with ctx.nursery("all") as n: n.invoke(task, ...)``.

        `name`: 1 to 108 bytes, unique in the handler's run. `on_parent_close`: "cancel" or "abandon" children when the
        parent ends otherwise than by leaving the block. When the block is left, all children and steps have ended. The
        first failure cancels the others, in the database too.

        Leaving it waits, without a slot if it is long. Raises an `ExceptionGroup` of what went wrong: `ChildError`,
        `StepFailed`, and what the block raised.
        """
        from .children import checked_on_close, open_nursery

        return open_nursery(self.durable, name, checked_on_close(on_parent_close))

    @overload
    def transaction(
        self, name: str, fn: Callable[[TrioConnection[TupleRow], *Ts], Awaitable[T]], /, *args: *Ts,
        retry: TriesLike = None, timeout: float | timedelta | None = None, isolation: Isolation = "read committed",
    ) -> Coroutine[Any, Any, T]: ...  # fmt: skip
    @overload
    def transaction(
        self, name: str, /, *, timeout: float | timedelta | None = None, isolation: Isolation = "read committed"
    ) -> AbstractAsyncContextManager[TrioConnection[TupleRow]]: ...
    def transaction(
        self, name: str, fn: Callable[..., Any] | None = None, /, *args: object,
        retry: TriesLike = None, timeout: float | timedelta | None = None, isolation: Isolation = "read committed",
    ) -> Any:  # fmt: skip
        """A step whose effects in this database happen exactly once: they and its record are one transaction.

        ``await ctx.transaction(name, fn, *args)`` calls ``fn(conn, *args)``, async, and returns what it returns, which
        must be JSON as a step's; a replay gets the record. `conn`: a connection of the conductor's pool in an open
        transaction, which the engine commits when `fn` has returned and rolls back when it raises or the claim was
        revoked. Savepoints are fine (``conn.transaction()``), `commit` and `rollback` are refused.
        ``task.options(conn=conn).invoke()`` is part of it.

        ``async with ctx.transaction(name) as conn:`` does the same for a block. At a replay the block runs again; its
        statements are not executed but told what they returned, from a record of at most 256 KiB. So nothing else
        must happen in it. The function form is the cheaper one.

        `name`, `retry`, `timeout`: as for `step`; a block has one try. `isolation`: "read committed", "repeatable
        read" or "serializable". Serialization failures, deadlocks and lost connections before the commit begin the
        function anew, up to 20 times, before they count as its failure; in a block they count at once.

        Raises `StepFailed`, as `step`; `DurableMisuse` also if the transaction was ended by hand, `NonDeterminism`.
        """
        from .durable import is_async
        from .transactions import checked_terms, open_block, run_transaction

        what = f"ctx.transaction({name!r})"
        seconds, level = checked_terms(what, timeout, isolation, retry, is_block=fn is None)
        if fn is None:
            return open_block(self.durable, name, seconds, level)
        if not is_async(fn):
            raise DurableMisuse(f"{what} in an async handler needs an async function; it gets an async connection")
        return run_transaction(self.durable, name, fn, args, retry, seconds, level)

    @property
    def sync(self) -> SyncContext:
        """The durable operations for a plain ``def`` handler: the same methods, which block its thread.

        Without `nursery`, `continue_as_new` and `continue_as`, which need an async handler.
        """
        from .sync_context import SyncContext

        return SyncContext(self)

    @property
    def desk(self) -> Desk:
        """What does the operations of `sync`. Raises `DurableMisuse` where no engine runs the handler."""
        if self._desk is None:
            raise DurableMisuse(_UNATTACHED)
        return self._desk

    # Events, messages, promises

    @overload
    async def wait_for_event(
        self, name: str, event: str | None = None, /, *,
        match: Mapping[str, object] | None = None, timeout: float | timedelta | None = None, type: type[T],
    ) -> T: ...  # fmt: skip
    @overload
    async def wait_for_event(
        self, name: str, event: str | None = None, /, *,
        match: Mapping[str, object] | None = None, timeout: float | timedelta | None = None, type: Any = Any,
    ) -> Any: ...  # fmt: skip
    async def wait_for_event(
        self, name: str, event: str | None = None, /, *,
        match: Mapping[str, object] | None = None, timeout: float | timedelta | None = None, type: Any = Any,
    ) -> Any:  # fmt: skip
        """Wait for an event, without a slot if it takes long, and return its payload.

        `name`: as for `step`. `event`: the event's name, 1 to 128 bytes; otherwise `name`. `match`: what the payload
        must hold, compared as JSON: all of it, at any depth. `timeout`: seconds or a `timedelta`, from when the wait is
        recorded. `type`: the annotation of the payload.

        It gets the oldest event that fits, is still kept (also one from before this execution began), and was not
        received by this execution before. Others may receive the same. Raises `WaitTimedOut`, the same at a replay;
        `InvalidPayload` for a payload that does not fit the type, `DurableMisuse`, `InvalidOption`, `NonDeterminism`.
        """
        return await wait_for_event(self.durable, name, event, match, timeout, type)

    @overload
    async def receive(
        self, name: str, channel: str | None = None, /, *, timeout: float | timedelta | None = None, type: type[T]
    ) -> T: ...
    @overload
    async def receive(
        self, name: str, channel: str | None = None, /, *, timeout: float | timedelta | None = None, type: Any = Any
    ) -> Any: ...
    async def receive(
        self, name: str, channel: str | None = None, /, *, timeout: float | timedelta | None = None, type: Any = Any
    ) -> Any:
        """Wait for a message to this execution (`Handle.send`), and return its payload; the oldest comes first.

        `channel`: of the message, 1 to 128 bytes; otherwise `name`. Each message is received once. The rest as
        `wait_for_event`.
        """
        return await receive(self.durable, name, channel, timeout, type)

    async def promise(self, name: str) -> Promise:
        """Make a promise that the outside resolves or rejects, once, by its id; the same one at each replay.

        `name`: as for `step`, 1 to 121 bytes. Give `promise.id` away in a step, then await ``promise.result()``. The id
        is a secret: whoever has it may resolve it, until this execution ends. Raises `DurableMisuse`, `NonDeterminism`.
        """
        return await make_promise(self.durable, name)

    async def emit(
        self, name: str, event: str | None = None, payload: object = None, /, *,
        retention: float | timedelta | None = None,
    ) -> None:  # fmt: skip
        """Send an event, exactly once: recorded in the transaction that sends it.

        `name`: as for `step`. `event`: the event's name; otherwise `name`. `payload`: any JSON value. `retention`: as
        `Conductor.emit`. Raises `InvalidPayload`, `InvalidOption`, `DurableMisuse`, `NonDeterminism`.
        """
        await emit(self.durable, name, event, payload, retention)

    async def send(
        self, name: str, execution_id: UUID, channel: str | None = None, payload: object = None, /
    ) -> bool:  # fmt: skip
        """Send a message to an execution, exactly once; whether there is such a live execution. The rest as `emit`."""
        return await send(self.durable, name, execution_id, channel, payload)

    async def open_channel(self, name: str, *, capacity: int = 100) -> Channel:
        """Open a channel: items that are appended in order, for readers inside and outside (`Handle.channel`).

        `name`: as for `step`, and of the channel. `capacity`: how many items may be unread, 1 to 10,000; `Channel.send`
        waits while there are. A replay goes on behind what was sent. For one task of the handler. Raises
        `DurableMisuse`, `InvalidOption`, `NonDeterminism`.
        """
        from .channels import open_channel

        return await open_channel(self.durable, name, capacity)

    async def set_progress(self, value: object) -> None:
        """Tell how far this execution has come: any JSON value, read by `Handle.progress`. The latest counts.

        Nothing is recorded for a replay; it may be called in a step. Raises `InvalidPayload`.
        """
        await set_progress(self.durable, value)

    async def continue_as_new(self, **arguments: object) -> NoReturn:
        """End this run, and begin the execution anew with these arguments: its history is cut, the rest stays.

        For what goes on for ever: the execution keeps its id, key, tags and deadline, and a parent goes on waiting for
        it; attempts are counted anew. `arguments`: of the handler, by name. Never returns: the handler is cancelled,
        and what it does on the way is not recorded. It happens when it has ended, unless the execution is cancelled or
        the process dies before: then the run is done again.

        Raises, before anything is done, `InvalidPayload`; `DurableMisuse` in a branch, under a shield, and with open
        children.
        """
        await self.continue_as(self.durable.bind(arguments))

    async def continue_as(self, call: Invocation[Any], /) -> NoReturn:
        """The same with an invocation, as ``ctx.continue_as(greet.bind(...))``: of this task, in whatever version.

        Its options do not count.
        """
        if call.task.name != self.task:
            raise DurableMisuse(
                f"an execution of task {self.task!r} cannot go on as task {call.task.name!r}; invoke that as a child"
            )
        await self.durable.continue_as(call)

    async def checkpoint(self) -> None:
        """A good place to be interrupted: if the worker is stopping, the execution is given back here, at no cost.

        What is recorded stays. Raises `trio.Cancelled` then; let it pass.
        """
        await self.durable.checkpoint()

    async def patched(self, change: str) -> bool:
        """Whether a change of the code is in force for this execution: ``if await ctx.patched("new-tax"): ...``.

        True for executions that come here first with code that asks, and recorded for them; False for those of which
        anything was recorded past this place before, by code without the change. The same at each replay, and however
        often it is asked in one run. When no execution of the old code is left, keep what stood under the condition.

        `change`: as the name of a step, unique among them. To be asked in the handler's own task, before branches
        begin. Waits until it is durable. Raises `DurableMisuse`, `NonDeterminism`.
        """
        return await self.durable.patched(change)

    async def now(self, *, name: str | None = None) -> datetime:
        """Return the time, in UTC, by this machine's clock: the same at each replay.

        `name`: as for `step`; needed in a handler with branches, elsewhere it is numbered.
        """
        durable = self.durable
        return cast(
            datetime,
            await durable.record(name or durable.numbered("now"), "now", lambda: datetime.now(UTC), _INSTANT),
        )

    async def uuid(self, *, name: str | None = None) -> UUID:
        """Return a random UUID, the same at each replay; `name` as for `now`."""
        durable = self.durable
        return cast(UUID, await durable.record(name or durable.numbered("uuid"), "uuid", uuid.uuid4, _ID))

    async def random(self, *, name: str | None = None) -> float:
        """Return a random number from 0 to below 1, the same at each replay; `name` as for `now`."""
        durable = self.durable
        make = random.SystemRandom().random
        return cast(float, await durable.record(name or durable.numbered("random"), "random", make, _NUMBER))

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger named ``pgconductor.task`` whose records carry `execution_id`, `task`, `queue` and `attempt`."""
        if self._logger is None:
            self._logger = bound_logger(
                {
                    "execution_id": str(self.execution_id),
                    "task": self.task,
                    "queue": self.queue,
                    "attempt": self.attempt,
                }
            )
        return self._logger

    def resource(self, kind: type[T], /) -> T:
        """Return the resource of type `kind` (or of one subclass of it) that the orchestrator's lifespan yielded.

        Does not wait. Raises `Misuse` if there is none, or several of which none is exactly of that type.
        """
        return find_resource(self._resources, kind)

    def __repr__(self) -> str:
        return f"<Context of task {self.task!r}, execution {self.execution_id}, attempt {self.attempt}>"


def _refuse() -> Durable:
    raise DurableMisuse("the handler of this context has ended")


def find_resource(resources: Resources, kind: type[T]) -> T:
    """What `Context.resource` returns; raises what it raises."""
    found = resources.get(kind)
    if found is not None:
        return cast(T, found)
    matches = {id(value): value for value in resources.values() if isinstance(value, kind)}
    if len(matches) == 1:
        return next(iter(matches.values()))
    name = f"{kind.__module__}.{kind.__qualname__}"
    if matches:
        kinds = ", ".join(sorted(type(value).__qualname__ for value in matches.values()))
        raise Misuse(f"ctx.resource({name}) is ambiguous: {kinds} all fit; ask for one of these types")
    known = ", ".join(sorted(kind.__qualname__ for kind in resources)) or "no resources"
    raise Misuse(
        f"ctx.resource({name}): there is no such resource here (the orchestrator has: {known}); "
        f"yield one from the lifespan given as Orchestrator(resources=...)"
    )


def resources_by_type(yielded: object) -> dict[type[Any], object]:
    """Return what a lifespan yielded as a mapping of type to object, for `Context`.

    `yielded` is None (no resources), one object, a tuple of objects (a named tuple counts as one object), or a
    mapping of types to objects. Raises `Misuse` if two objects of a tuple have the same type, or if a mapping's key is
    not a type that its value is an instance of.
    """
    if yielded is None:
        return {}
    if isinstance(yielded, Mapping):
        resources: dict[type[Any], object] = {}
        for kind, value in cast(Mapping[object, object], yielded).items():
            if not isinstance(kind, type) or not isinstance(value, kind):
                raise Misuse(
                    f"Orchestrator(resources=...) yielded a mapping whose entry {kind!r} is not a type with an "
                    f"instance of it; yield {{SomeType: some_object}}"
                )
            resources[kind] = value
        return resources
    whole: dict[type[Any], object] = {type(yielded): yielded}
    if not isinstance(yielded, tuple) or hasattr(cast("tuple[object, ...]", yielded), "_fields"):
        return whole
    resources = {}
    for value in cast("tuple[object, ...]", yielded):
        if type(value) in resources:
            raise Misuse(
                f"Orchestrator(resources=...) yielded two objects of type {type(value).__qualname__}; "
                f"give one of them a class of its own, or yield a mapping of types to objects"
            )
        resources[type(value)] = value
    return resources
