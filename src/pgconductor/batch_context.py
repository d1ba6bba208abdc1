"""What a handler of batches is given beside its items: who they are, and whether it or one of them should end.

Owns nothing, as `Context`. There is nothing durable here: executions in a batch have no history, so a handler that
would sleep, wait or invoke children has no method for it. All of it may be used from the thread of a plain `def`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeVar
from uuid import UUID

from .context import Resources, Watch, bound_logger, find_resource

T = TypeVar("T")


class BatchItem:
    """One execution of a batch: `id`, and which `attempt` of it this is, from 1."""

    __slots__ = ("_watch", "attempt", "id")

    def __init__(self, id: UUID, attempt: int, watch: Watch | None = None) -> None:
        """Made by the engine, and by tests that call ``task.handler`` directly."""
        self.id = id
        self.attempt = attempt
        self._watch = watch

    @property
    def is_cancelled(self) -> bool:
        """Whether its cancellation was requested, or the whole batch should end.

        The handler goes on for the others, and may leave this one out. What it returns for it counts all the same if it
        is a value; if it is an exception, the execution is cancelled. Does not wait; may be asked from any thread.
        """
        return self._watch is not None and self._watch.is_cancelled

    def check_cancelled(self) -> None:
        """Raise `HandlerCancelled` if `is_cancelled`. Where that leaves the handler, the others are given back."""
        if self._watch is not None:
            self._watch.check()

    def __repr__(self) -> str:
        return f"<BatchItem of execution {self.id}, attempt {self.attempt}>"


class BatchContext:
    """The first parameter of a handler of batches that asks for it by the annotation `BatchContext`.

    `items`: the executions of the batch, in the order of the handler's list. `task` and `queue`: the names they run
    under.
    """

    __slots__ = ("_logger", "_resources", "_watch", "items", "queue", "task")

    def __init__(
        self, items: Sequence[BatchItem], *, task: str, queue: str, resources: Resources, watch: Watch | None = None
    ) -> None:
        """Made by the engine, and by tests that call ``task.handler`` directly; `resources` as for `Context`."""
        self.items = items
        self.task = task
        self.queue = queue
        self._resources = resources
        self._watch = watch
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether the handler should end soon: its time is up, its worker stops, or all its executions are to be
        cancelled. As `Context.is_cancelled`.
        """
        return self._watch is not None and self._watch.is_cancelled

    def check_cancelled(self) -> None:
        """Raise `HandlerCancelled` if `is_cancelled`; let it propagate. Does not wait; from any thread."""
        if self._watch is not None:
            self._watch.check()

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger named ``pgconductor.task`` whose records carry `task`, `queue` and `batch_size`."""
        if self._logger is None:
            self._logger = bound_logger({"task": self.task, "queue": self.queue, "batch_size": len(self.items)})
        return self._logger

    def resource(self, kind: type[T], /) -> T:
        """As `Context.resource`."""
        return find_resource(self._resources, kind)

    def __repr__(self) -> str:
        return f"<BatchContext of task {self.task!r}, {len(self.items)} executions>"
