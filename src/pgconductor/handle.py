"""Handles: an execution that was invoked, and what can be done with it.

A handle is a value: an id, whether this call created the execution, and the task whose annotation types the result.
Waiting and asking are the source's work (the conductor, or the sync client), so a handle owns no connection, task or
timer, and dropping one costs nothing. Cancelling the wait, by Trio, leaves the execution alone; `cancel()` ends it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload
from uuid import UUID

from .options import MAX_DELAY, checked_seconds
from .readers import (
    ChannelReader,
    ChannelSource,
    SyncChannelReader,
    SyncChannelSource,
    open_reader,
    open_sync_reader,
)

if TYPE_CHECKING:
    from .model import Cancellation, ExecutionStatus, FailedAttempt, StepRecord
    from .tasks import Task

R = TypeVar("R")
T = TypeVar("T")


class Source(ChannelSource, Protocol):
    """Asks the database on Trio; `Conductor` implements it."""

    async def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Return the decoded result, or raise as `Handle.result` does. `timeout`: seconds from 0, None without end."""
        ...

    async def cancel(self, *executions: UUID, reason: str | None) -> dict[UUID, Cancellation]:
        """Cancel executions, or ask for it."""
        ...

    async def execution_errors(self, execution_id: UUID) -> list[FailedAttempt]:
        """Return the errors of an execution's attempts, oldest first."""
        ...

    async def send(self, execution: UUID, channel: str, payload: object = None, /) -> bool:
        """Send a message; whether there is such an execution."""
        ...

    async def progress(self, execution: UUID, /) -> Any:
        """Return what the execution last told."""
        ...

    async def status(self, execution: UUID, /) -> ExecutionStatus | None:
        """Return where an execution stands, None if nothing of it is kept."""
        ...

    async def steps(self, execution: UUID, /) -> list[StepRecord]:
        """Return what an execution has recorded, in order."""
        ...


class SyncSource(SyncChannelSource, Protocol):
    """The same by blocking the thread; the sync client implements it."""

    def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Return the decoded result, or raise as `SyncHandle.result` does."""
        ...

    def cancel(self, *executions: UUID, reason: str | None) -> dict[UUID, Cancellation]:
        """Cancel executions, or ask for it."""
        ...

    def execution_errors(self, execution_id: UUID) -> list[FailedAttempt]:
        """Return the errors of an execution's attempts, oldest first."""
        ...

    def send(self, execution: UUID, channel: str, payload: object = None, /) -> bool:
        """Send a message; whether there is such an execution."""
        ...

    def progress(self, execution: UUID, /) -> Any:
        """Return what the execution last told."""
        ...

    def status(self, execution: UUID, /) -> ExecutionStatus | None:
        """Return where an execution stands, None if nothing of it is kept."""
        ...

    def steps(self, execution: UUID, /) -> list[StepRecord]:
        """Return what an execution has recorded, in order."""
        ...


class AnyHandle(Generic[R]):
    """What both kinds of handle hold: the `id` of an execution, and whether the call that returned it created it."""

    __slots__ = ("_task", "created", "id")

    def __init__(self, task: Task[..., R], execution_id: UUID, *, created: bool) -> None:
        self._task = task
        self.id = execution_id
        self.created = created

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of task {self._task.name!r}, execution {self.id}>"


class Handle(AnyHandle[R]):
    """One execution, seen from a Trio program.

    `id`: the execution's id. `created`: False if `dedupe_key` found a live execution, which this handle then means.
    """

    __slots__ = ("_source",)

    def __init__(self, source: Source, task: Task[..., R], execution_id: UUID, *, created: bool = True) -> None:
        super().__init__(task, execution_id, created=created)
        self._source = source

    async def result(self, timeout: float | timedelta | None = None) -> R:
        """Wait until the execution finishes and return what its handler returned, as annotated.

        `timeout`: seconds or `timedelta`, from 0 to a century; None waits without end.

        Raises `WaitTimeout` (a `TimeoutError`) with the execution's state when the time is over, `ExecutionFailed`,
        `ExecutionCancelled` or `ResultNotKept` when there is no result, `InvalidOption` for a bad timeout.
        """
        return await self._source.wait_result(self.id, self._task, checked_timeout(timeout))

    async def cancel(self, reason: str | None = None) -> Cancellation:
        """Cancel the execution: at once unless it runs, else its handler's scope is cancelled. May be repeated.

        `reason`: 1 to 1,000 bytes, kept with the execution; the first one given counts. Waits for the database only,
        not for a running handler's end: `result` does that, and raises `ExecutionCancelled` unless the handler finished
        first. Returns what came of it. Raises `InvalidOption`, `NotOpen`, `Unavailable`, `Refused`.
        """
        return (await self._source.cancel(self.id, reason=reason))[self.id]

    async def errors(self) -> list[FailedAttempt]:
        """Return the errors of its failed attempts, oldest first: the first and the last 49, of those that are kept.

        Empty if there are none, or nothing of the execution is kept. Raises `NotOpen`, `Unavailable`.
        """
        return await self._source.execution_errors(self.id)

    async def send(self, channel: str, payload: object = None, /) -> bool:
        """Send a message to the execution, which it gets by `Context.receive`; kept until then, or until it ends.

        `channel`: 1 to 128 bytes. `payload`: any JSON value. Returns whether it is live, and yours to send to. Raises
        `InvalidPayload`, `InvalidOption`, `NotOpen`, `Unavailable`: then it may have been sent or not.
        """
        return await self._source.send(self.id, channel, payload)

    async def progress(self) -> Any:
        """Return what the handler last told by `Context.set_progress`, live or finished; None if nothing, or not kept.

        Raises `NotOpen`, `Unavailable`.
        """
        return await self._source.progress(self.id)

    async def status(self) -> ExecutionStatus | None:
        """Return where the execution stands and what it waits for; None if nothing of it is kept.

        Waits for the database only. Raises `NotOpen`, `Unavailable`, `SchemaMissing`, `Refused`.
        """
        return await self._source.status(self.id)

    async def steps(self) -> list[StepRecord]:
        """Return what the execution has done and waits for, in the order in which it began.

        Of a finished one, if it is kept; empty if nothing is recorded. Raises as `status`.
        """
        return await self._source.steps(self.id)

    @overload
    def channel(self, name: str, /, *, type: type[T], after: int = 0) -> ChannelReader[T]: ...
    @overload
    def channel(self, name: str, /, *, type: Any = Any, after: int = 0) -> ChannelReader[Any]: ...
    def channel(self, name: str, /, *, type: Any = Any, after: int = 0) -> ChannelReader[Any]:
        """Read a channel of the execution: ``async for item in handle.channel("lines"):``.

        `name`: of the channel, 1 to 128 bytes. `type`: the annotation of its items. `after`: the number of the item to
        begin behind, 0 for the first. Ends when the channel is closed or the execution has ended; waits for one that is
        not open yet. Does not wait by itself.
        """
        return open_reader(self._source, self.id, name, type, after, self._task.limits)


class SyncHandle(AnyHandle[R]):
    """One execution, seen from a program without an event loop; otherwise as `Handle`."""

    __slots__ = ("_source",)

    def __init__(self, source: SyncSource, task: Task[..., R], execution_id: UUID, *, created: bool = True) -> None:
        super().__init__(task, execution_id, created=created)
        self._source = source

    def result(self, timeout: float | timedelta | None = None) -> R:
        """Block until the execution finishes; parameters, result and exceptions as `Handle.result`."""
        return self._source.wait_result(self.id, self._task, checked_timeout(timeout))

    def cancel(self, reason: str | None = None) -> Cancellation:
        """Cancel the execution; as `Handle.cancel`."""
        return self._source.cancel(self.id, reason=reason)[self.id]

    def errors(self) -> list[FailedAttempt]:
        """Return the errors of its failed attempts; as `Handle.errors`."""
        return self._source.execution_errors(self.id)

    def send(self, channel: str, payload: object = None, /) -> bool:
        """Send a message to the execution; as `Handle.send`."""
        return self._source.send(self.id, channel, payload)

    def progress(self) -> Any:
        """Return what the handler last told; as `Handle.progress`."""
        return self._source.progress(self.id)

    def status(self) -> ExecutionStatus | None:
        """Return where the execution stands; as `Handle.status`."""
        return self._source.status(self.id)

    def steps(self) -> list[StepRecord]:
        """Return what the execution has done and waits for; as `Handle.steps`."""
        return self._source.steps(self.id)

    @overload
    def channel(self, name: str, /, *, type: type[T], after: int = 0) -> SyncChannelReader[T]: ...
    @overload
    def channel(self, name: str, /, *, type: Any = Any, after: int = 0) -> SyncChannelReader[Any]: ...
    def channel(self, name: str, /, *, type: Any = Any, after: int = 0) -> SyncChannelReader[Any]:
        """Read a channel of the execution, blocking: ``for item in handle.channel("lines"):``; as `Handle.channel`."""
        return open_sync_reader(self._source, self.id, name, type, after, self._task.limits)


def checked_timeout(timeout: Any) -> float | None:
    """Return a timeout as seconds, None as None. Raises `InvalidOption` outside 0 to a century."""
    return None if timeout is None else checked_seconds("result(timeout=)", timeout, maximum=MAX_DELAY)
