"""Child executions, alone and in a durable nursery: structured concurrency that is kept in the database.

A child is a wait of its parent's with an execution behind it; both are made in one transaction, and the child's end
resolves the wait in the transaction that ends it. A nursery owns its children and steps: when its block is left all
have ended. The first failure cancels the others, in the database too, and comes out as an `ExceptionGroup`; an
exception of the block's own does the same.

Names: a nursery's children and steps are its name, a slash, and their own name or number, so a replay finds them again.
The children of a nursery are made together, when its block ends or a result is asked for, and the parent waits for all
of them as for one: it goes on when all have ended, or one has failed.

Cancellation: by the handler's own scope, children are cancelled and not waited for; an unwinding that the engine began
leaves them alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, ParamSpec, TypeVar, TypeVarTuple, cast, overload
from uuid import UUID

import trio

from .codec import printable
from .durable import Durable, TriesLike
from .errors import ChildCancelled, ChildError, ChildFailed, ChildTimedOut, DurableMisuse, InvalidOption, leaves
from .model import Record
from .records import error_record, reason_record

if TYPE_CHECKING:
    from .tasks import Invocable, Invocation, Task

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

OnClose = Literal["cancel", "abandon"]
ON_CLOSE: Final[tuple[OnClose, ...]] = ("cancel", "abandon")
_AT_ONCE: Final = 500  # children per statement
_TIMES: Final = ("timeout", "deadline")  # types of recorded errors


def child_result(task: Task[..., R], record: Record) -> R:
    """Return what a child returned, or raise the `ChildError` it ended with."""
    child_id = UUID(record.target) if record.target else None
    subject = f"child {printable(record.name)!r} (task {printable(task.name)!r}, execution {child_id})"
    if record.outcome == "completed":
        return task.result.decode("null" if record.value is None else record.value)
    if record.outcome == "cancelled":
        reason = reason_record(record.error)
        cancelled = ChildCancelled(
            f"{subject} was cancelled" + (f": {printable(reason)}" if reason else ""), execution_id=child_id
        )
        cancelled.reason = reason
        raise cancelled
    error = error_record(record.error)
    said = ": ".join(printable(error[name]) for name in ("type", "message") if error.get(name))
    kind = ChildTimedOut if error.get("type") in _TIMES else ChildFailed
    failure = kind(f"{subject} failed" + (f": {said}" if said else ""), error, child_id)
    if traceback := error.get("traceback"):
        failure.add_note(f"Traceback of the child's last attempt:\n{traceback}")
    raise failure


def checked_on_close(on_close: object) -> OnClose:
    """Return what becomes of a child whose parent ends; raises `InvalidOption`."""
    if on_close not in ON_CLOSE:
        raise InvalidOption(f"on_parent_close is 'cancel' or 'abandon', not {on_close!r}")
    return on_close


async def invoke_child(durable: Durable, name: str, call: Invocation[R], on_close: OnClose) -> R:
    """See `Context.invoke`."""
    try:
        record = await durable.wait(f"ctx.invoke({name!r})", name, "child", _spec(durable, call, on_close))
    except trio.Cancelled:
        await durable.close_children([name], "its parent's scope was cancelled")
        raise
    return child_result(call.task, record)


def _spec(durable: Durable, call: Invocation[Any], on_close: OnClose) -> dict[str, object]:
    return {"child": durable.child_row(call), "on_close": on_close}


class ChildHandle(Generic[R]):
    """A child of a durable nursery. `name`: under which it is recorded."""

    __slots__ = ("_call", "_nursery", "name")

    def __init__(self, nursery: DurableNursery, name: str, call: Invocation[R]) -> None:
        self._nursery = nursery
        self._call = call
        self.name = name

    def __repr__(self) -> str:
        return f"<ChildHandle {self.name!r}, {self._nursery.durable.outcome(self.name) or 'open'}>"

    @property
    def call(self) -> Invocation[R]:
        """The invocation."""
        return self._call

    async def result(self) -> R:
        """Return the child's result: at once after the nursery's block, inside it waiting for this child.

        Raises `ChildFailed`, `ChildTimedOut`, `ChildCancelled`.
        """
        return child_result(self._call.task, await self._nursery.wait_child(self.name))


class StepHandle(Generic[T]):
    """A step of a durable nursery. `value` is there when the nursery's block has been left."""

    __slots__ = ("_is_done", "_value", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self._is_done = False
        self._value: Any = None

    @property
    def value(self) -> T:
        """What the step returned. Raises `DurableMisuse` before that."""
        if not self._is_done:
            raise DurableMisuse(f"step {self.name!r} has not ended; its value is there after the nursery's block")
        return cast(T, self._value)

    def set(self, value: T) -> None:
        """The step has returned; the nursery's."""
        self._value = value
        self._is_done = True


class DurableNursery:
    """What `Context.nursery` gives: it owns the children and steps that are started in its block."""

    def __init__(self, durable: Durable, name: str, tasks: trio.Nursery, on_close: OnClose) -> None:
        self.durable = durable
        self.name = name
        self._tasks = tasks
        self._on_close: OnClose = on_close
        self._handles: dict[str, ChildHandle[Any]] = {}
        self._unstarted: dict[str, None] = {}  # in order
        self._sent: set[str] = set()  # of these, what may be made already
        self._is_closed = False
        self._is_abandoned = False
        self._starting = trio.Lock()
        # Of a run before: the steps that have no record were cancelled by that, and do not begin again.
        self._has_failed = durable.has_failed_child(name)
        self._replaying = 0  # steps that have a record, which has not been raised or returned
        self._replayed = trio.Event()

    def __repr__(self) -> str:
        return f"<DurableNursery {self.name!r}, {len(self._handles)} children>"

    def invoke(self, task: Invocable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> ChildHandle[R]:
        """Have a child execution run. Does not wait: children are made together, when the block ends or a result is
        asked for. Raises `InvalidPayload` for arguments that do not fit, `DurableMisuse` after the block.
        """
        return self.invoke_as(str(len(self._handles)), task.bind(*args, **kwargs))

    def invoke_as(self, name: str, call: Invocation[R], /) -> ChildHandle[R]:
        """The same with a name of one's own, unique in the nursery, for an invocation as `bind` makes it."""
        name = self._take(name)
        handle = self._handles[name] = ChildHandle(self, name, call)
        self._unstarted[name] = None
        return handle

    @overload
    def start_step(
        self,
        name: str,
        fn: Callable[[*Ts], Awaitable[T]],
        /,
        *args: *Ts,
        retry: TriesLike = None,
        timeout: float | timedelta | None = None,
    ) -> StepHandle[T]: ...
    @overload
    def start_step(
        self,
        name: str,
        fn: Callable[[*Ts], T],
        /,
        *args: *Ts,
        retry: TriesLike = None,
        timeout: float | timedelta | None = None,
    ) -> StepHandle[T]: ...
    def start_step(
        self,
        name: str,
        fn: Callable[..., Any],
        /,
        *args: object,
        retry: TriesLike = None,
        timeout: float | timedelta | None = None,
    ) -> StepHandle[Any]:
        """Run a step beside the others; parameters as `Context.step`. Does not wait."""
        handle: StepHandle[Any] = StepHandle(self._take(name))
        self._replaying += self.durable.record_of(handle.name) is not None
        self._tasks.start_soon(partial(self._run_step, handle, fn, args, retry, timeout), name=f"step {handle.name}")
        return handle

    def _take(self, name: str) -> str:
        if self._is_closed:
            raise DurableMisuse(f"the block of nursery {self.name!r} has been left")
        full = f"{self.name}/{name}"
        if full in self._handles:
            raise DurableMisuse(f"nursery {self.name!r} has a child {name!r} already")
        return full

    async def _run_step(
        self,
        handle: StepHandle[Any],
        fn: Callable[..., Any],
        args: Iterable[object],
        retry: TriesLike,
        timeout: float | timedelta | None,
    ) -> None:
        is_replayed = self.durable.record_of(handle.name) is not None
        if self._has_failed and not is_replayed:
            await trio.sleep_forever()  # the block's end cancels us
        try:
            handle.set(await self.durable.step(handle.name, fn, tuple(args), retry, timeout))
        finally:
            if is_replayed:
                self._replaying -= 1
                self._replayed.set()

    def leave(self) -> None:
        """The block has been left."""
        self._is_closed = True

    # Children

    async def start_children(self) -> None:
        """Make those that are asked for and not made yet, or find them made."""
        async with self._starting:
            history = await self.durable.history()
            while self._unstarted and not self._is_abandoned:
                names = list(islice(self._unstarted, _AT_ONCE))
                with self.durable.operation(f"ctx.nursery({self.name!r})", waits=True):
                    for name in names:
                        if name not in self._sent and history.begin(name, "child", alone=False) is None:
                            self._sent.add(name)
                        elif name not in self._sent:
                            del self._unstarted[name]  # it was made by a run before
                    new = [name for name in names if name in self._unstarted]
                    if new:
                        await self.durable.admit(new[0], "child")
                        await self.durable.start([self._wait_for(name) for name in new])
                    for name in new:
                        del self._unstarted[name]
                    self._sent.difference_update(new)

    def _wait_for(self, name: str) -> dict[str, object]:
        spec = _spec(self.durable, self._handles[name].call, self._on_close)
        return {"name": name, "kind": "child", "scope": self.name, **spec}

    async def wait_child(self, name: str) -> Record:
        """The record of a child that has ended."""
        await self.start_children()
        record = (await self.durable.history()).get(name)
        if record is None:
            raise DurableMisuse(f"child {name!r} was not made: the nursery's block was left by an error before that")
        if record.outcome is None:
            self.durable.require_place(f"the result of child {name!r}", waits=True)
            await self.durable.park_for(name)
        return cast(Record, self.durable.record_of(name))

    async def run_children(self) -> None:
        """Make the children and wait until all have ended; raises the first failures, with the others running."""
        await self.start_children()
        open_names = list(self._handles)
        has_failed = False

        def is_over() -> bool:
            nonlocal open_names, has_failed
            still: list[str] = []
            for name in open_names:
                outcome = self.durable.outcome(name)
                if outcome is None:
                    still.append(name)
                has_failed = has_failed or outcome not in (None, "completed")
            open_names = still
            return has_failed or not open_names

        await self.durable.park(is_over)
        while has_failed and self._replaying:  # what a step had raised before has to be raised again
            await self._replayed.wait()
            self._replayed = trio.Event()
        if has_failed:
            raise _ChildFailed

    async def close(self, reason: str) -> None:
        """Cancel the children that have not ended, and make no more."""
        self.leave()
        self._is_abandoned = True
        made = [name for name in self._handles if name not in self._unstarted or name in self._sent]
        await self.durable.close_children([name for name in made if self.durable.outcome(name) is None], reason)

    async def wait_all(self) -> None:
        """Wait until every child that was made has ended, however."""
        history = await self.durable.history()
        open_names = [name for name in self._handles if (r := history.get(name)) is not None and r.outcome is None]

        def is_over() -> bool:
            nonlocal open_names
            open_names = [name for name in open_names if self.durable.outcome(name) is None]
            return not open_names

        if open_names:
            self.durable.require_place(f"ctx.nursery({self.name!r})", waits=True)
            await self.durable.park(is_over)

    def failures(self, reason: str, known: BaseException | None) -> list[ChildError]:
        """What the children ended with that did not complete, but for what is in `known`, and for those that were
        cancelled for `reason`; these too if there would be no error at all.
        """
        told = {leaf.execution_id for leaf in leaves(known) if isinstance(leaf, ChildError)} if known else set[UUID]()
        errors: list[ChildError] = []
        cancelled: list[ChildError] = []
        for name, handle in self._handles.items():
            if self.durable.outcome(name) in (None, "completed"):
                continue
            try:
                child_result(handle.call.task, cast(Record, self.durable.record_of(name)))
            except ChildError as error:
                if error.execution_id not in told:
                    is_ours = isinstance(error, ChildCancelled) and error.reason == reason
                    (cancelled if is_ours else errors).append(error)
        return errors if errors or known else cancelled


class _ChildFailed(Exception):
    """A child has failed; never leaves this module."""


@asynccontextmanager
async def open_nursery(durable: Durable, name: str, on_close: OnClose) -> AsyncIterator[DurableNursery]:
    """See `Context.nursery`."""
    durable.require_place(f"ctx.nursery({name!r})", waits=True)
    (await durable.history()).begin_scope(name)
    reason = f"nursery {printable(name)} of its parent was left by an error"
    nursery: DurableNursery | None = None
    try:
        async with trio.open_nursery() as tasks:
            nursery = DurableNursery(durable, name, tasks, on_close)
            yield nursery
            tasks.start_soon(nursery.run_children)
        nursery.leave()
    except BaseExceptionGroup as group:
        assert nursery is not None
        await nursery.close(reason)
        rest = group.split(_ChildFailed)[1]
        title = f"durable nursery {printable(name)!r}"
        if durable.suspender.is_unwinding:
            raise rest or ExceptionGroup(title, nursery.failures(reason, None)) from None
        if rest is not None and any(not isinstance(leaf, Exception) for leaf in leaves(rest)):
            raise rest from None  # there is more than errors in it, and that has to propagate
        await nursery.wait_all()
        errors = () if rest is None else cast("tuple[Exception, ...]", rest.exceptions)
        raise ExceptionGroup(title, [*errors, *nursery.failures(reason, rest)]) from None
    except trio.Cancelled:
        if nursery is not None:
            await nursery.close(reason)
        raise
