"""From calls to the rows they insert: the part of invoking that both clients share.

Pure: no connection, no clock. What it returns has been validated, so that SQL has nothing left to refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, cast

from .codec import printable
from .db.calls import NewExecution
from .errors import DurableMisuse, InvalidPayload, Misuse
from .options import LATEST, checked_text
from .tasks import DEFAULT_OPTIONS, Invocation, InvokeOptions, Task, Tasks

# PostgreSQL takes a message of up to 1 GB; this leaves room for what the driver adds.
MAX_CALL_BYTES: Final = 256 << 20


def new_executions(calls: Sequence[Invocation[Any]]) -> list[NewExecution]:
    """Return the rows to insert for `calls`. Raises `InvalidPayload` if they are too large for one statement."""
    total = sum(len(call.payload) for call in calls)
    if total > MAX_CALL_BYTES:
        raise InvalidPayload(
            f"the payloads of {len(calls):,} calls are {total:,} characters long together; at most {MAX_CALL_BYTES:,} "
            f"go into one statement: split them, within one transaction if they belong together (options(conn=...))"
        )
    return [_row(call.task.name, call.payload, call.options, call.task) for call in calls]


class InvocationByName:
    """Validates invocations of tasks that are named, for one conductor, where some may be declared and some not."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._elsewhere = lru_cache(maxsize=256)(self._stand_in)

    def execution(
        self, name: str, payload: Mapping[str, Any] | None, options: InvokeOptions
    ) -> tuple[Task[..., Any], NewExecution]:
        """Return the task (a stand-in, if its code is elsewhere) and the row to insert.

        A task that is declared is validated by its annotations; of another one `payload` is any JSON object, and its
        queue, if not given, is looked up in the database when it is inserted. Raises `InvalidPayload`, `InvalidOption`.
        """
        checked_text("a task's name", name, max_bytes=self._tasks.limits.name_bytes)
        declared = self._tasks.registry.get(name)
        task = declared or self._elsewhere(name)
        text = task.payload.encode((), _parameters(name, payload))
        return task, _row(task.name, text, options, declared)

    def _stand_in(self, name: str) -> Task[..., Any]:
        async def elsewhere(**payload: Any) -> Any:
            raise Misuse(f"the code of task {name!r} is elsewhere")

        return Task(elsewhere, self._tasks, name=name, limits=self._tasks.limits)

    @property
    def tasks(self) -> Tasks:
        """The conductor's declaring half."""
        return self._tasks


def _parameters(name: str, payload: object) -> dict[str, Any]:
    if payload is None:
        return {}
    if not isinstance(payload, Mapping):
        raise InvalidPayload(
            f"the payload of task {printable(name)!r} must be a mapping of the handler's parameters by name, "
            f"not {type(payload).__name__}"
        )
    parameters = dict(cast("Mapping[object, Any]", payload))
    for key in parameters:
        if not isinstance(key, str):
            raise InvalidPayload(
                f"the payload of task {printable(name)!r} has the key {key!r} of type {type(key).__name__}; "
                f"its keys are names of parameters"
            )
    return cast("dict[str, Any]", parameters)


def _row(name: str, payload: str, options: InvokeOptions, declared: Task[..., Any] | None) -> NewExecution:
    deadline, version = (None, None) if declared is None else (declared.deadline, declared.version)
    return NewExecution(
        name,
        payload,
        options.queue or (None if declared is None else declared.queue),
        options.priority,
        options.run_at,
        options.delay,
        options.dedupe_key,
        None
        if options is DEFAULT_OPTIONS and deadline is None and version is None
        else options_json(options, deadline, version),
    )


def options_json(options: InvokeOptions, deadline: float | None = None, version: str | None = None) -> str | None:
    """Return the options that have no column of their own in `invoke_many` as a JSON object, None if none is given.

    `deadline`: the task's, for an invocation without one: seconds from when it is due. `version`: the task's.
    """
    given: dict[str, object] = {}
    if options.timeout is not None:
        given["timeout"] = options.timeout
    if options.deadline_at is not None:
        given["deadline_at"] = options.deadline_at.isoformat()
    elif options.deadline_in is not None:
        given["deadline_in"] = options.deadline_in
    elif deadline is not None and options.run_at is not None:
        until = options.run_at + min(timedelta(seconds=deadline), LATEST - options.run_at - timedelta(seconds=1))
        given["deadline_at"] = until.isoformat()
    elif deadline is not None:
        given["deadline_in"] = (options.delay or 0.0) + deadline
    if options.max_attempts is not None:
        given["max_attempts"] = options.max_attempts
    if options.backoff is not None:
        given["backoff"] = options.backoff
    if options.tags:
        given["tags"] = options.tags
    if version is not None:
        given["version"] = version
    return json.dumps(given) if given else None


def child_row(call: Invocation[Any]) -> dict[str, object]:
    """Return an invocation as `start_waits` takes a child. Raises `DurableMisuse` for what a child cannot have."""
    row = new_executions([call])[0]
    if row.dedupe_key is not None:
        raise DurableMisuse("a child has no dedupe_key: its parent and its name make it unique")
    child: dict[str, object] = json.loads(row.options or "{}")
    child.update(task=row.task, payload=json.loads(row.payload), queue=row.queue, priority=row.priority)
    if row.run_at is not None:
        child["run_at"] = row.run_at.isoformat()
    if row.delay is not None:
        child["delay"] = row.delay
    return child
