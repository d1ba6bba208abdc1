"""Handles: an execution that was invoked, and how to wait for what it returns.

A handle is a value: an id, whether this call created the execution, and the task whose annotation types the result.
Waiting is the source's work (the conductor, or the sync client), so a handle owns no connection, task or timer, and
dropping one costs nothing. Cancelling `result()` leaves the execution alone.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar
from uuid import UUID

from .options import MAX_DELAY, checked_seconds

if TYPE_CHECKING:
    from .tasks import Task

R = TypeVar("R")


class ResultSource(Protocol):
    """Waits for results on Trio; `Conductor` implements it."""

    async def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Return the decoded result, or raise as `Handle.result` does. `timeout`: seconds from 0, None without end."""
        ...


class SyncResultSource(Protocol):
    """Waits for results by blocking the thread; the sync client implements it."""

    def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Return the decoded result, or raise as `SyncHandle.result` does."""
        ...


class Handle(Generic[R]):
    """One execution, seen from a Trio program.

    `id`: the execution's id. `created`: False if `dedupe_key` found a live execution, which this handle then means.
    """

    __slots__ = ("_source", "_task", "created", "id")

    def __init__(self, source: ResultSource, task: Task[..., R], execution_id: UUID, *, created: bool = True) -> None:
        self._source = source
        self._task = task
        self.id = execution_id
        self.created = created

    async def result(self, timeout: float | timedelta | None = None) -> R:
        """Wait until the execution finishes and return what its handler returned, as annotated.

        `timeout`: seconds or `timedelta`, from 0 to a century; None waits without end.

        Raises `WaitTimeout` (a `TimeoutError`) with the execution's state when the time is over, `ExecutionFailed`,
        `ExecutionCancelled` or `ResultNotKept` when there is no result, `InvalidOption` for a bad timeout.
        """
        return await self._source.wait_result(self.id, self._task, checked_timeout(timeout))

    def __repr__(self) -> str:
        return f"<Handle of task {self._task.name!r}, execution {self.id}>"


class SyncHandle(Generic[R]):
    """One execution, seen from a program without an event loop; otherwise as `Handle`."""

    __slots__ = ("_source", "_task", "created", "id")

    def __init__(
        self, source: SyncResultSource, task: Task[..., R], execution_id: UUID, *, created: bool = True
    ) -> None:
        self._source = source
        self._task = task
        self.id = execution_id
        self.created = created

    def result(self, timeout: float | timedelta | None = None) -> R:
        """Block until the execution finishes; parameters, result and exceptions as `Handle.result`."""
        return self._source.wait_result(self.id, self._task, checked_timeout(timeout))

    def __repr__(self) -> str:
        return f"<SyncHandle of task {self._task.name!r}, execution {self.id}>"


def checked_timeout(timeout: Any) -> float | None:
    """Return a timeout as seconds, None as None. Raises `InvalidOption` outside 0 to a century."""
    return None if timeout is None else checked_seconds("result(timeout=)", timeout, maximum=MAX_DELAY)
