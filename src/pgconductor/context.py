"""What a handler is given: who it is, its logger, and the resources of the process it runs in.

Owns nothing: a `Context` is made for one attempt and dropped with it, so it must stay cheap (one object; the logger
is made when first asked for). Whether the handler should end is the engine's knowledge: it is asked, not kept. It never
sees a connection or a pool. Nothing here waits, so there is nothing to cancel; all of it may be used from the thread of
a plain `def` handler.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol, TypeAlias, TypeVar, cast
from uuid import UUID

from .errors import Misuse

T = TypeVar("T")

Resources: TypeAlias = Mapping[type[Any], object]

_LOGGER = "pgconductor.task"


class _BoundLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the execution's ids to each record, beside (not instead of) the `extra` of the call."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class Watch(Protocol):
    """What knows whether a handler should end; the engine implements it. Both may be asked from any thread."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the handler should end."""
        ...

    def check(self) -> None:
        """Raise `HandlerCancelled` if it should."""
        ...


class Context:
    """The first parameter of a handler that asks for it by the annotation `Context`.

    `execution_id`: the execution's id, the same at every attempt. `attempt`: which attempt this is, from 1.
    `task` and `queue`: the names the execution runs under.
    """

    __slots__ = ("_logger", "_resources", "_watch", "attempt", "execution_id", "queue", "task")

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

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger named ``pgconductor.task`` whose records carry `execution_id`, `task`, `queue` and `attempt`."""
        if self._logger is None:
            self._logger = _BoundLogger(
                logging.getLogger(_LOGGER),
                {
                    "execution_id": str(self.execution_id),
                    "task": self.task,
                    "queue": self.queue,
                    "attempt": self.attempt,
                },
            )
        return self._logger

    def resource(self, kind: type[T], /) -> T:
        """Return the resource of type `kind` (or of one subclass of it) that the orchestrator's lifespan yielded.

        Does not wait. Raises `Misuse` if there is none, or several of which none is exactly of that type.
        """
        found = self._resources.get(kind)
        if found is not None:
            return cast(T, found)
        matches = {id(value): value for value in self._resources.values() if isinstance(value, kind)}
        if len(matches) == 1:
            return next(iter(matches.values()))
        name = f"{kind.__module__}.{kind.__qualname__}"
        if matches:
            kinds = ", ".join(sorted(type(value).__qualname__ for value in matches.values()))
            raise Misuse(f"ctx.resource({name}) is ambiguous: {kinds} all fit; ask for one of these types")
        known = ", ".join(sorted(kind.__qualname__ for kind in self._resources)) or "no resources"
        raise Misuse(
            f"ctx.resource({name}): there is no such resource here (the orchestrator has: {known}); "
            f"yield one from the lifespan given as Orchestrator(resources=...)"
        )

    def __repr__(self) -> str:
        return f"<Context of task {self.task!r}, execution {self.execution_id}, attempt {self.attempt}>"


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
