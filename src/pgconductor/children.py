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
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, ParamSpec, TypeVar, TypeVarTuple, cast, overload
from uuid import UUID

import trio

from .codec import printable
from .durable import Durable, TriesLike
from .errors import ChildCancelled, ChildError, ChildFailed, ChildTimedOut, DurableMisuse, leaves
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
    """Return what becomes of a child whose parent ends; raises `DurableMisuse`."""
    if on_close not in ON_CLOSE:
        raise DurableMisuse(f"on_parent_close is 'cancel' or 'abandon', not {on_close!r}")
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
        self._unstarted: list[str] = []
        self._is_closed = False
        self._starting = trio.Lock()

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
        self._unstarted.append(name)
        return handle

    @overload
    def start_step(
        self,
        name: str,
        fn: Callable[[*Ts], Awaitable[T]],
        /,
        *args: *Ts,
        retry: TriesLike = None,
        timeout: float | None = None,
    ) -> StepHandle[T]: ...
    @overload
    def start_step(
        self, name: str, fn: Callable[[*Ts], T], /, *args: *Ts, retry: TriesLike = None, timeout: float | None = None
    ) -> StepHandle[T]: ...
    def start_step(
        self, name: str, fn: Callable[..., Any], /, *args: object, retry: TriesLike = None, timeout: float | None = None
    ) -> StepHandle[Any]:
        """Run a step beside the others; parameters as `Context.step`. Does not wait."""
        handle: StepHandle[Any] = StepHandle(self._take(name))
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
        timeout: float | None,
    ) -> None:
        handle.set(await self.durable.step(handle.name, fn, tuple(args), retry, timeout))

    def leave(self) -> None:
        """The block has been left."""
        self._is_closed = True

    # Children

    async def start_children(self) -> None:
        """Make those that are asked for and not made yet, or find them made."""
        async with self._starting:
            history = await self.durable.history()
            while self._unstarted:
                names = self._unstarted[:_AT_ONCE]
                with self.durable.operation(f"ctx.nursery({self.name!r})", waits=True):
                    new = [name for name in names if history.begin(name, "child", alone=False) is None]
                    if new:
                        await self.durable.admit(new[0], "child")
                        await self.durable.start([self._wait_for(name) for name in new])
                    del self._unstarted[: len(names)]

    def _wait_for(self, name: str) -> dict[str, object]:
        spec = _spec(self.durable, self._handles[name].call, self._on_close)
        return {"name": name, "kind": "child", "scope": self.name, **spec}

    async def wait_child(self, name: str) -> Record:
        """The record of a child that has ended."""
        await self.start_children()
        if self.durable.outcome(name) is None:
            self.durable.require_place(f"the result of child {name!r}", waits=True)
            await self.durable.park(lambda: self.durable.outcome(name) is not None)
        return cast(Record, (await self.durable.history()).get(name))

    async def run_children(self) -> None:
        """Make the children and wait until all have ended; raises the first failures, with the others running."""
        await self.start_children()
        open_names = list(self._handles)

        def is_over() -> bool:
            nonlocal open_names
            if self._failed():
                return True
            open_names = [name for name in open_names if self.durable.outcome(name) is None]
            return not open_names

        await self.durable.park(is_over)
        if failed := self._failed():
            raise _Failed(failed)

    def _failed(self) -> list[str]:
        return [n for n in self._handles if self.durable.outcome(n) not in (None, "completed")]

    async def close(self, reason: str) -> None:
        """Cancel the children that have not ended."""
        self.leave()
        started = [name for name in self._handles if name not in set(self._unstarted)]
        open_names = [name for name in started if self.durable.outcome(name) is None]
        await self.durable.close_children(open_names, reason)

    async def wait_all(self) -> None:
        """Wait until every child that was made has ended, however."""
        self._unstarted.clear()
        history = await self.durable.history()
        made = [name for name in self._handles if history.get(name) is not None]
        if any(self.durable.outcome(name) is None for name in made):
            self.durable.require_place(f"ctx.nursery({self.name!r})", waits=True)
            await self.durable.park(lambda: all(self.durable.outcome(name) is not None for name in made))

    def errors(self, reason: str) -> list[ChildError]:
        """What the children ended with that did not complete, but for those that were cancelled for `reason`."""
        errors: list[ChildError] = []
        for name, handle in self._handles.items():
            if self.durable.outcome(name) in (None, "completed"):
                continue
            try:
                child_result(handle.call.task, cast(Record, self.durable.record_of(name)))
            except ChildCancelled as error:
                if error.reason != reason:
                    errors.append(error)
            except ChildError as error:
                errors.append(error)
        return errors


class _Failed(Exception):
    """Children of these names have failed; never leaves this module."""


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
        own, cancelled = _own_errors(group)
        if cancelled or durable.suspender.is_unwinding:
            raise
        await nursery.wait_all()
        raise ExceptionGroup(f"durable nursery {printable(name)!r}", [*own, *nursery.errors(reason)]) from None
    except trio.Cancelled:
        if nursery is not None:
            await nursery.close(reason)
        raise


def _own_errors(group: BaseExceptionGroup[BaseException]) -> tuple[list[Exception], bool]:
    """The errors of the block and its steps, and whether there is more than errors in it: then it has to propagate."""
    rest = group.split(_Failed)[1]
    if rest is None:
        return [], False
    errors = [error for error in rest.exceptions if isinstance(error, Exception)]
    return errors, any(not isinstance(leaf, Exception) for leaf in leaves(rest))
