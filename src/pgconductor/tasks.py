"""Declarations: which functions are tasks, which workers run them, and how an invocation is put together.

Owns the types that carry a handler's parameters and result to the caller (`Task`, `Invocable`, `Invocation`), the
registry of one conductor, and all checks that need neither an event loop nor a database. Declaring does no I/O and
resolves no annotation: annotations are read at first use (or by `Task.resolve`), so that they may name what is
defined later. What an invocation means for the database is the business of the `Invoker`, which `Conductor` is.

Invariants: a task belongs to one conductor and keeps its name, queue and options; a name is registered once; an
`Invocation` is complete and validated when `bind` returns. Only the `invoke` methods wait, and only inside the invoker.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)

from .batch_context import BatchContext
from .batches import BatchOptions, BatchTaskDecorator, batch_shape_of, checked_batch
from .codec import Limits, PayloadCodec, ResultCodec, printable
from .context import Context
from .errors import InvalidOption, InvalidTask, Misuse
from .options import INT4_MAX, INT4_MIN, checked_instant, checked_int, checked_seconds, checked_text
from .retry import DEFAULT_BACKOFF, Backoff, BackoffLike, backoff_as_data, checked_backoff
from .signatures import Shape, check_parameters, require_function, shape_of

if TYPE_CHECKING:
    import psycopg

    from .handle import Handle, SyncHandle

P = ParamSpec("P")
R = TypeVar("R")

NotifyMode: TypeAlias = Literal["adaptive", "always", "off"]
NOTIFY_MODES: Final[tuple[NotifyMode, ...]] = ("adaptive", "always", "off")

DEFAULT_QUEUE: Final = "default"
MAX_ATTEMPTS: Final = 10_000
MAX_TAGS: Final = 16
MAX_TAG_BYTES: Final = 128
MAX_VERSION_BYTES: Final = 64
KEEP_COMPLETED: Final = 86_400.0
KEEP_FAILED: Final = 7 * 86_400.0
MAX_CONCURRENCY: Final = 10_000
MAX_BATCH: Final = 10_000


# --- invocations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InvokeOptions:
    """Where and when an invocation runs, already validated; `Task.options` makes it.

    `queue`: None for the task's own. `priority`: higher runs first. `run_at`: an instant in UTC, None for now.
    `delay`: seconds after the database's now, instead of `run_at`. `dedupe_key`: at most one live execution has it.
    `timeout`: seconds per attempt, `max_attempts`: starts in all, None for the task's. `deadline_at`: an instant in UTC
    after which nothing of it runs, or `deadline_in`: seconds from the database's now; neither: the task's. `backoff`:
    as data, None for the task's. `tags`: to find it by.
    """

    queue: str | None = None
    priority: int = 0
    run_at: datetime | None = None
    delay: float | None = None
    dedupe_key: str | None = None
    timeout: float | None = None
    deadline_at: datetime | None = None
    deadline_in: float | None = None
    backoff: Mapping[str, object] | None = None
    max_attempts: int | None = None
    tags: tuple[str, ...] = ()


DEFAULT_OPTIONS: Final = InvokeOptions()


@dataclass(frozen=True, slots=True)
class Invocation(Generic[R]):
    """One call of a task, validated and encoded, not yet sent. `payload` is the JSON object of the parameters."""

    task: Task[..., R]
    payload: str
    options: InvokeOptions = DEFAULT_OPTIONS


class Invoker(Protocol):
    """What a task needs to be invoked; `Conductor` implements it."""

    async def invoke_many(
        self, calls: Sequence[Invocation[R]], conn: psycopg.AsyncConnection[Any] | None
    ) -> list[Handle[R]]:
        """Insert one execution per call, all or none, and return their handles in the order of `calls`.

        Uses `conn`, and then neither commits nor rolls back, or a connection of its own if it is None.
        """
        ...

    def invoke_many_sync(
        self, calls: Sequence[Invocation[R]], conn: psycopg.Connection[Any] | None
    ) -> list[SyncHandle[R]]:
        """The same on a sync connection, blocking the thread."""
        ...


class Invocable(ABC, Generic[P, R]):
    """A task, or a task with options: what can be called with the handler's parameters, the context left out."""

    __slots__ = ()

    @abstractmethod
    def _target(self) -> tuple[Task[P, R], InvokeOptions, psycopg.AsyncConnection[Any] | None]:
        """The task, the options and the connection that a call made here gets."""

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Invocation[R]:
        """Return the call as a value for `invoke_many`. Does not wait.

        Raises `InvalidPayload` if the arguments do not fit the handler or cannot be stored, `InvalidTask` if the
        handler's annotations cannot be resolved.
        """
        task, options, _ = self._target()
        return Invocation(task, task.payload.encode(args, kwargs), options)

    async def invoke(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Insert an execution and return its handle. Waits for the database, not for the execution.

        Raises what `bind` does, `NotOpen` outside the conductor's block, and what the database refuses.
        """
        task, options, conn = self._target()
        call: Invocation[R] = Invocation(task, task.payload.encode(args, kwargs), options)
        return (await task.invoker.invoke_many([call], conn))[0]

    async def invoke_many(self, calls: Iterable[Invocation[R]], /) -> list[Handle[R]]:
        """Insert one execution per call in one statement, all or none; handles come in the order of `calls`.

        The calls are this task's, made by `bind`, at most 10,000. A call bound with options of its own keeps them,
        others get those of this object. No calls: no statement, an empty list. Raises as `invoke`; `InvalidTask` for
        another task's call, `InvalidOption` for too many.
        """
        task, options, conn = self._target()
        ready = task.adopted(calls, options)
        return await task.invoker.invoke_many(ready, conn) if ready else []


class TaskCall(Invocable[P, R]):
    """A task with options, made by `Task.options`; may be used any number of times."""

    __slots__ = ("_conn", "_options", "_task")

    def __init__(self, task: Task[P, R], options: InvokeOptions, conn: psycopg.AsyncConnection[Any] | None) -> None:
        self._task = task
        self._options = options
        self._conn = conn

    def _target(self) -> tuple[Task[P, R], InvokeOptions, psycopg.AsyncConnection[Any] | None]:
        return self._task, self._options, self._conn

    def __repr__(self) -> str:
        return f"<TaskCall of {self._task.name!r}, {self._options}>"


class SyncTaskCall(Generic[P, R]):
    """A task with options and the caller's sync connection, made by `Task.options(conn=...)`.

    Its methods block the thread; what they insert belongs to the transaction that is open on the connection.
    """

    __slots__ = ("_conn", "_options", "_task")

    def __init__(self, task: Task[P, R], options: InvokeOptions, conn: psycopg.Connection[Any]) -> None:
        self._task = task
        self._options = options
        self._conn = conn

    def bind(self, *args: P.args, **kwargs: P.kwargs) -> Invocation[R]:
        """As `Invocable.bind`."""
        return Invocation(self._task, self._task.payload.encode(args, kwargs), self._options)

    def invoke(self, *args: P.args, **kwargs: P.kwargs) -> SyncHandle[R]:
        """Insert an execution on the connection and return its handle; raises as `Invocable.invoke`."""
        call: Invocation[R] = Invocation(self._task, self._task.payload.encode(args, kwargs), self._options)
        return self._task.invoker.invoke_many_sync([call], self._conn)[0]

    def invoke_many(self, calls: Iterable[Invocation[R]], /) -> list[SyncHandle[R]]:
        """Insert one execution per call on the connection; as `Invocable.invoke_many`."""
        ready = self._task.adopted(calls, self._options)
        return self._task.invoker.invoke_many_sync(ready, self._conn) if ready else []

    def __repr__(self) -> str:
        return f"<SyncTaskCall of {self._task.name!r}, {self._options}>"


# --- tasks -----------------------------------------------------------------------------------------------------------


class Task(Invocable[P, R]):
    """A handler with a name, made by `Conductor.task`.

    `name`, `queue`: as registered. `max_attempts`: how often it is started at most, failures of the handler counted.
    `backoff`: the wait between attempts. `timeout`: seconds that an attempt may take, `deadline`: seconds from its due
    time in which an execution has to finish, both None without end.
    `keep_completed`, `keep_failed`: seconds for which finished executions are kept, None for ever, 0 not at all.
    `version`: of the code, None without; `versions`: this one and those of former code, which workers run as well.
    `handler`: the function itself, to be called in tests. `is_async`: whether it is a coroutine function (a plain
    ``def`` runs in a thread). `batch`: how the executions are gathered of which its handler gets many at once, None for
    a handler of one (`Conductor.batch_task` makes the former).
    """

    __slots__ = (
        "_former",
        "_shape",
        "backoff",
        "batch",
        "deadline",
        "handler",
        "invoker",
        "is_async",
        "keep_completed",
        "keep_failed",
        "limits",
        "max_attempts",
        "name",
        "queue",
        "replaced_by",
        "timeout",
        "version",
    )

    def __init__(
        self,
        handler: Callable[..., Any],
        invoker: Invoker,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        max_attempts: int = 3,
        backoff: BackoffLike = DEFAULT_BACKOFF,
        timeout: float | timedelta | None = None,
        deadline: float | timedelta | None = None,
        keep_completed: float | timedelta | None = KEEP_COMPLETED,
        keep_failed: float | timedelta | None = KEEP_FAILED,
        version: str | None = None,
        limits: Limits | None = None,
        batch: BatchOptions | None = None,
    ) -> None:
        """As `Tasks.task` and `Tasks.batch_task` describe, which register it too."""
        self.limits = limits or Limits()
        if isinstance(handler, Task):
            raise InvalidTask(f"{handler!r} is a task already; one function is one task")
        function = require_function(handler)
        self.name = checked_text(
            "a task's name", function.__name__ if name is None else name, max_bytes=self.limits.name_bytes
        )
        self.queue = _checked_queue(queue, self.limits)
        self.max_attempts = checked_int(
            f"max_attempts of task {self.name!r}", max_attempts, minimum=1, maximum=MAX_ATTEMPTS
        )
        self.backoff: Backoff = checked_backoff(f"backoff of task {self.name!r}", backoff)
        self.timeout = _checked_timeout(f"timeout of task {self.name!r}", timeout)
        self.deadline = _checked_timeout(f"deadline of task {self.name!r}", deadline)
        self.keep_completed = _checked_keep(f"keep_completed of task {self.name!r}", keep_completed)
        self.keep_failed = _checked_keep(f"keep_failed of task {self.name!r}", keep_failed)
        self.version = None if version is None else _checked_version(self.name, version)
        self.replaced_by: Task[..., Any] | None = None  # the current one, of a former version
        self._former: list[Task[..., Any]] = []
        self.handler = handler
        self.invoker = invoker
        self.is_async = inspect.iscoroutinefunction(function)
        self.batch = batch
        self._shape: Shape[R] | None = None
        check_parameters(self.name, function, "Context" if batch is None else "BatchContext")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Always raises `Misuse`: calling a task could mean running it here or elsewhere."""
        name = printable(self.name)
        raise Misuse(
            f"task {name!r} was called directly; use {self.handler.__name__}.invoke() to run it on a worker, "
            f"or {self.handler.__name__}.handler() to call the function here"
        )

    def resolve(self) -> None:
        """Resolve the handler's annotations now instead of at first use.

        Raises `InvalidTask` if one cannot be resolved, if JSON cannot hold it, or if the context is misplaced.
        """
        if self._shape is None:
            find = shape_of if self.batch is None else batch_shape_of
            self._shape = find(self.name, self.handler, self.limits)

    @property
    def versions(self) -> tuple[Task[..., Any], ...]:
        """This task and, of a current one, its former versions."""
        return (self, *self._former)

    def former(self, version: str, /) -> TaskDecorator:
        """Make a function the handler of executions of a former version, as ``@greet.former("1")``.

        They are run by whatever worker has the current task; what is invoked from now on is of the current version. It
        has this task's name, queue and options, and parameters and a result of its own. Of a former version whose
        handler got many executions at once: `batch_former`.
        `version`: 1 to 64 bytes without "@". Returns the version as a `Task`, whose `invoke` makes an execution of it.
        Raises `InvalidTask` for what cannot be a task, for a version that is there already, and on a task that is a
        former version itself; `InvalidOption` for what is no version.
        """
        return cast("TaskDecorator", self._register_former(version, None))

    def batch_former(
        self, version: str, /, *, size: int | None = None, max_wait: float | timedelta | None = None
    ) -> BatchTaskDecorator:
        """As `former`, of a version whose handler gets many executions at once: ``@send.batch_former("1")``.

        `size`, `max_wait`: as of `Conductor.batch_task`; by default this task's, if that is one of batches. Otherwise
        `size` is needed: `InvalidOption` is raised without.
        """
        if self.batch is not None:
            size = self.batch.size if size is None else size
            max_wait = self.batch.max_wait if max_wait is None else max_wait
        elif size is None:
            raise InvalidOption(f"batch_former() of {self!r} needs size=, since the task itself is none of batches")
        options = checked_batch(size, 0.0 if max_wait is None else max_wait)
        return cast("BatchTaskDecorator", self._register_former(version, options))

    def _register_former(self, version: str, batch: BatchOptions | None) -> Callable[..., Task[..., Any]]:
        if self.replaced_by is not None:
            raise InvalidTask(
                f"{self!r} is a former version itself; declare version {version!r} with the current task's former()"
            )
        _checked_version(self.name, version)

        def register(handler: Callable[..., Any]) -> Task[..., Any]:
            task: Task[..., Any] = Task(
                handler,
                self.invoker,
                name=self.name,
                queue=self.queue,
                max_attempts=self.max_attempts,
                backoff=self.backoff,
                timeout=self.timeout,
                deadline=self.deadline,
                keep_completed=self.keep_completed,
                keep_failed=self.keep_failed,
                version=version,
                limits=self.limits,
                batch=batch,
            )
            for other in self.versions:
                if other.version == task.version:
                    raise InvalidTask(
                        f"there are two handlers of version {version!r} of task {self.name!r}: {_place(other)} and "
                        f"{_place(task)}"
                    )
                if other.handler is handler:
                    raise InvalidTask(f"{_place(task)} is registered already as {other!r}; one function is one version")
            task.replaced_by = self
            self._former.append(task)
            return task

        return register

    @property
    def shape(self) -> Shape[R]:
        """What the annotations say; resolved at first use."""
        if self._shape is None:
            self.resolve()
        return cast("Shape[R]", self._shape)

    @property
    def wants_context(self) -> bool:
        """Whether the handler's first parameter is annotated `Context`, or `BatchContext` if it is one of batches."""
        return self.shape.wants_context

    @property
    def payload(self) -> PayloadCodec:
        """Codec of the arguments."""
        return self.shape.payload

    @property
    def result(self) -> ResultCodec[R]:
        """Codec of what the handler returns."""
        return self.shape.result

    def decode(self, payload: str) -> dict[str, Any]:
        """Return the keyword arguments from a payload's JSON text. Raises `InvalidPayload` if they do not fit."""
        return (self._shape or self.shape).payload.decode(payload)

    def bind_arguments(self, arguments: dict[str, Any]) -> Invocation[R]:
        """As `bind`, of arguments that no type checker has seen."""
        return Invocation(self, self.payload.encode((), arguments))

    def keep(self, kind: str) -> float | None:
        """Return for how many seconds a finished execution is kept that ended by an outcome of this kind.

        None: for ever; 0: not at all. `keep_failed` for all kinds but ``completed``, since an execution that is to be
        tried again or given back ends as cancelled if that was requested meanwhile.
        """
        return self.keep_completed if kind == "completed" else self.keep_failed

    def call(self, ctx: Context, kwargs: dict[str, Any]) -> Any:
        """Call the handler: a coroutine if `is_async`, else its return value. Raises what the handler raises."""
        if (self._shape or self.shape).wants_context:
            return self.handler(ctx, **kwargs)
        return self.handler(**kwargs)

    def call_batch(self, ctx: BatchContext, items: list[Any]) -> Any:
        """As `call`, of a handler of batches."""
        return self.handler(ctx, items) if self.shape.wants_context else self.handler(items)

    def _target(self) -> tuple[Task[P, R], InvokeOptions, psycopg.AsyncConnection[Any] | None]:
        return self, DEFAULT_OPTIONS, None

    @overload
    def options(
        self,
        *,
        queue: str | None = None,
        priority: int = 0,
        run_at: datetime | None = None,
        delay: float | timedelta | None = None,
        dedupe_key: str | None = None,
        timeout: float | timedelta | None = None,
        deadline: datetime | float | timedelta | None = None,
        max_attempts: int | None = None,
        backoff: BackoffLike | None = None,
        tags: Iterable[str] = (),
        conn: psycopg.Connection[Any],
    ) -> SyncTaskCall[P, R]: ...
    @overload
    def options(
        self,
        *,
        queue: str | None = None,
        priority: int = 0,
        run_at: datetime | None = None,
        delay: float | timedelta | None = None,
        dedupe_key: str | None = None,
        timeout: float | timedelta | None = None,
        deadline: datetime | float | timedelta | None = None,
        max_attempts: int | None = None,
        backoff: BackoffLike | None = None,
        tags: Iterable[str] = (),
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> TaskCall[P, R]: ...
    def options(
        self,
        *,
        queue: str | None = None,
        priority: int = 0,
        run_at: datetime | None = None,
        delay: float | timedelta | None = None,
        dedupe_key: str | None = None,
        timeout: float | timedelta | None = None,
        deadline: datetime | float | timedelta | None = None,
        max_attempts: int | None = None,
        backoff: BackoffLike | None = None,
        tags: Iterable[str] = (),
        conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any] | None = None,
    ) -> TaskCall[P, R] | SyncTaskCall[P, R]:
        """Return this task with options for `invoke`, `bind` and `invoke_many`. Does not wait.

        `queue`: another queue than the task's; a worker there must have the task. `priority`: higher first, within
        int4. `run_at`: not before this aware datetime (years 1 to 9998). `delay`: not before so many seconds (or a
        `timedelta`, up to a century) from the database's now; not together with `run_at`. `dedupe_key`: 1 to 512 bytes;
        while an execution with this key is live on the same queue and task, invoking returns it instead.
        `timeout`: instead of the task's, seconds per attempt, more than 0. `deadline`: an aware datetime, or seconds
        (or a `timedelta`) from the database's now, after which it is not started, ended if it runs, and has failed,
        whatever attempts remain. `max_attempts`: instead of the task's, 1 to 10,000. `backoff`: instead of the task's,
        as there, but no function: it is stored. `tags`: up to 16 different texts of 1 to 128 bytes, to find and cancel
        it by.

        `conn`: the caller's psycopg connection, sync or Trio; the execution is part of its transaction. With a sync one
        the methods of the result block instead of being awaited. Raises `InvalidOption` outside these ranges.
        """
        options = checked_options(
            queue=queue,
            priority=priority,
            run_at=run_at,
            delay=delay,
            dedupe_key=dedupe_key,
            timeout=timeout,
            deadline=deadline,
            max_attempts=max_attempts,
            backoff=backoff,
            tags=tags,
            limits=self.limits,
        )
        if conn is None:
            return TaskCall(self, options, None)
        driver = sys.modules.get("psycopg")  # whoever has a connection has imported it
        if driver is not None and isinstance(conn, driver.Connection):
            return SyncTaskCall(self, options, cast("psycopg.Connection[Any]", conn))
        if driver is not None and isinstance(conn, driver.AsyncConnection):
            return TaskCall(self, options, cast("psycopg.AsyncConnection[Any]", conn))
        raise InvalidOption(
            f"conn must be a psycopg Connection or AsyncConnection, not {type(conn).__name__}; "
            f"other libraries keep the driver's connection inside theirs"
        )

    def adopted(self, calls: Iterable[Invocation[R]], options: InvokeOptions) -> list[Invocation[R]]:
        """Return `calls` with `options` on those that have none of their own; the checks of `invoke_many`."""
        ready: list[Invocation[R]] = []
        for call in calls:
            if call.task is not self:
                raise InvalidTask(
                    f"invoke_many of task {self.name!r} got a call of task {call.task.name!r}; "
                    f"bind calls with {self.handler.__name__}.bind() and use one invoke_many per task"
                )
            if len(ready) == self.limits.batch:
                raise InvalidOption(
                    f"invoke_many of task {self.name!r} takes at most {self.limits.batch:,} calls at once; "
                    f"split them, within one transaction if they belong together (options(conn=...))"
                )
            if call.options is DEFAULT_OPTIONS and options is not DEFAULT_OPTIONS:
                ready.append(Invocation(call.task, call.payload, options))
            else:
                ready.append(call)
        return ready

    def __repr__(self) -> str:
        version = "" if self.version is None else f", version {self.version!r},"
        return f"<Task {self.name!r}{version} on queue {self.queue!r}>"


def checked_options(
    *,
    queue: str | None = None,
    priority: int = 0,
    run_at: datetime | None = None,
    delay: float | timedelta | None = None,
    dedupe_key: str | None = None,
    timeout: float | timedelta | None = None,
    deadline: datetime | float | timedelta | None = None,
    max_attempts: int | None = None,
    backoff: BackoffLike | None = None,
    tags: Iterable[str] = (),
    limits: Limits | None = None,
) -> InvokeOptions:
    """Return validated options, ranges as `Task.options` states them; raises `InvalidOption`."""
    limits = limits or Limits()
    if run_at is not None and delay is not None:
        raise InvalidOption("give run_at or delay, not both")
    deadline_at = deadline_in = None
    if isinstance(deadline, datetime):
        deadline_at = checked_instant("deadline", deadline)
        if run_at is not None and checked_instant("run_at", run_at) >= deadline_at:
            raise InvalidOption("deadline is not after run_at: the execution would fail without being started")
    elif deadline is not None:
        deadline_in = checked_seconds("deadline", deadline)
        if deadline_in <= (0.0 if delay is None else checked_seconds("delay", delay)):
            raise InvalidOption("deadline is not after now and delay: the execution would fail without being started")
    return InvokeOptions(
        queue=None if queue is None else _checked_queue(queue, limits),
        priority=checked_int("priority", priority, minimum=INT4_MIN, maximum=INT4_MAX),
        run_at=None if run_at is None else checked_instant("run_at", run_at),
        delay=None if delay is None else checked_seconds("delay", delay),
        dedupe_key=None
        if dedupe_key is None
        else checked_text("dedupe_key", dedupe_key, max_bytes=limits.dedupe_key_bytes),
        timeout=_checked_timeout("timeout", timeout),
        deadline_at=deadline_at,
        deadline_in=deadline_in,
        backoff=None if backoff is None else backoff_as_data("backoff", backoff),
        max_attempts=None
        if max_attempts is None
        else checked_int("max_attempts", max_attempts, minimum=1, maximum=MAX_ATTEMPTS),
        tags=checked_tags(tags),
    )


def checked_tags(tags: object) -> tuple[str, ...]:
    """Return tags as `Task.options` takes them, in their order; raises `InvalidOption`."""
    if tags is None:
        return ()
    if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable):
        raise InvalidOption(f"tags must be several texts, such as tags=['x'], not {type(tags).__name__}")
    given: list[str] = []
    for tag in cast("Iterable[object]", tags):
        if len(given) == MAX_TAGS:
            raise InvalidOption(f"there are more than {MAX_TAGS} tags; at most {MAX_TAGS} are allowed")
        given.append(checked_text("a tag", tag, max_bytes=MAX_TAG_BYTES))
    if len(set(given)) < len(given):
        raise InvalidOption(f"tags holds the same text twice: {printable(', '.join(given))}")
    return tuple(given)


def _checked_timeout(what: str, timeout: object) -> float | None:
    if timeout is None:
        return None
    seconds = checked_seconds(what, timeout)
    if seconds <= 0.0:
        raise InvalidOption(f"{what} must be more than 0 seconds; None is for no timeout")
    return seconds


def _checked_keep(what: str, keep: object) -> float | None:
    return None if keep is None else checked_seconds(what, keep)


def _checked_version(task: str, version: object) -> str:
    text = checked_text(f"version of task {task!r}", version, max_bytes=MAX_VERSION_BYTES)
    if "@" in text:
        raise InvalidOption(f"version of task {task!r} must not have an '@' in it, as {text!r} has")
    return text


def _checked_queue(queue: object, limits: Limits) -> str:
    return checked_text("a queue's name", queue, max_bytes=limits.name_bytes)


# --- workers and the registry ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One queue's pipeline as a declaration, made by `create_worker`; an `Orchestrator` runs it.

    Fields as the parameters of `Tasks.create_worker`. Raises `InvalidOption` or `InvalidTask` if they do not fit.
    """

    queue: str
    tasks: tuple[Task[..., Any], ...]
    concurrency: int = 10
    sweep_interval: float = 5.0
    flush_interval: float = 0.05
    notify: NotifyMode = "adaptive"
    claim_batch: int | None = None
    flush_batch: int | None = None

    def __post_init__(self) -> None:
        where = f"the worker of queue {self.queue!r}"
        checked_int(f"concurrency of {where}", self.concurrency, minimum=1, maximum=MAX_CONCURRENCY)
        checked_seconds(f"sweep_interval of {where}", self.sweep_interval, minimum=0.05, maximum=60.0)
        checked_seconds(f"flush_interval of {where}", self.flush_interval, maximum=5.0)
        for name, size in (("claim_batch", self.claim_batch), ("flush_batch", self.flush_batch)):
            if size is not None:
                checked_int(f"{name} of {where}", size, minimum=1, maximum=MAX_BATCH)
        if self.notify not in NOTIFY_MODES:
            raise InvalidOption(f"notify of {where} must be one of {', '.join(NOTIFY_MODES)}, not {self.notify!r}")
        if not self.tasks:
            raise InvalidTask(f"{where} has no tasks; give it at least one")
        seen: set[str] = set()
        for task in self.tasks:
            if task.queue != self.queue:
                raise InvalidTask(
                    f"task {task.name!r} is on queue {task.queue!r}, but is given to {where}; "
                    f"declare it with @conductor.task(queue={self.queue!r}) or give it to a worker of its queue"
                )
            if task.name in seen:
                raise InvalidTask(f"task {task.name!r} is given twice to {where}")
            seen.add(task.name)


class Registry:
    """The tasks of one conductor by name."""

    __slots__ = ("_tasks",)

    def __init__(self) -> None:
        self._tasks: dict[str, Task[..., Any]] = {}

    def add(self, task: Task[..., Any]) -> None:
        """Register a task. Raises `InvalidTask` if its name, or its function under another name, is registered."""
        if (other := self._tasks.get(task.name)) is not None:
            raise InvalidTask(
                f"there are two tasks named {task.name!r}: {_place(other)} and {_place(task)}; "
                f"give one of them another name with @conductor.task(name=...)"
            )
        for other in self._tasks.values():
            if other.handler is task.handler:
                raise InvalidTask(
                    f"{_place(task)} is registered already as task {other.name!r}; "
                    f"one function is one task, so wrap it to run it under the name {task.name!r} as well"
                )
        self._tasks[task.name] = task

    def get(self, name: str) -> Task[..., Any] | None:
        """Return the task of this name, or None."""
        return self._tasks.get(name)

    def __iter__(self) -> Iterator[Task[..., Any]]:
        return iter(self._tasks.values())

    def __len__(self) -> int:
        return len(self._tasks)


def _place(task: Task[..., Any]) -> str:
    return f"{task.handler.__module__}.{task.handler.__qualname__}"


class TaskDecorator(Protocol):
    """What ``conductor.task(...)`` with options returns: a decorator with the overloads of `Tasks.task`."""

    @overload
    def __call__(self, handler: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[Concatenate[Context, P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, handler: Callable[P, R], /) -> Task[P, R]: ...


class Tasks(Invoker):
    """The declaring half of `Conductor`: `task`, `create_worker` and the registry. Constructing does no I/O."""

    def __init__(self, *, limits: Limits | None = None) -> None:
        """`limits`: bounds for payloads, results and names of all tasks, `Limits()` by default."""
        self.limits = limits or Limits()
        self.registry = Registry()

    @overload
    def task(self, handler: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(self, handler: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(self, handler: Callable[Concatenate[Context, P], R], /) -> Task[P, R]: ...
    @overload
    def task(self, handler: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        max_attempts: int = 3,
        backoff: BackoffLike = DEFAULT_BACKOFF,
        timeout: float | timedelta | None = None,
        deadline: float | timedelta | None = None,
        keep_completed: float | timedelta | None = KEEP_COMPLETED,
        keep_failed: float | timedelta | None = KEEP_FAILED,
        version: str | None = None,
    ) -> TaskDecorator: ...
    def task(
        self,
        handler: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        max_attempts: int = 3,
        backoff: BackoffLike = DEFAULT_BACKOFF,
        timeout: float | timedelta | None = None,
        deadline: float | timedelta | None = None,
        keep_completed: float | timedelta | None = KEEP_COMPLETED,
        keep_failed: float | timedelta | None = KEEP_FAILED,
        version: str | None = None,
    ) -> Any:
        """Make a function a task, as ``@conductor.task`` or ``@conductor.task(queue=..., ...)``.

        The handler is an ``async def``, or a plain ``def`` that then runs in a thread. Its first parameter annotated
        `Context` is the context; the other parameters are the payload, by name.

        `name`: what executions are stored under, 1 to 128 bytes of UTF-8; the function's name by default. `queue`: the
        queue it runs on, 1 to 128 bytes. `max_attempts`: starts in all, 1 to 10,000. `backoff`: the wait between them:
        `Exponential`, `Linear`, `Fixed` or seconds, `Delays` or a list of seconds, a function of the failed attempt's
        number and its error, or any `Backoff`. `timeout`: seconds (or a `timedelta`) that an attempt may take, more
        than 0 and up to a century; None without end. `deadline`: the same for an execution with all its attempts, from
        when it is due; past it, it is not started, is ended if it runs, and has failed. `keep_completed`,
        `keep_failed`: for how long finished executions are kept, in seconds (or a `timedelta`, up to a century), None
        for ever, 0 not at all; `keep_failed` is for cancelled ones too. `version`: of the code, 1 to 64 bytes without
        "@": executions keep theirs, and are run only by workers that have it, as current or by `Task.former`.

        Returns the `Task` in the function's place. Raises `InvalidTask` for what cannot be a task or is registered
        already, `InvalidOption` outside these ranges.
        """

        def register(handler: Callable[..., Any]) -> Task[..., Any]:
            task: Task[..., Any] = Task(
                handler,
                self,
                name=name,
                queue=queue,
                max_attempts=max_attempts,
                backoff=backoff,
                timeout=timeout,
                deadline=deadline,
                keep_completed=keep_completed,
                keep_failed=keep_failed,
                version=version,
                limits=self.limits,
            )
            self.registry.add(task)
            return task

        return register if handler is None else register(handler)

    def batch_task(
        self,
        /,
        *,
        size: int,
        max_wait: float | timedelta = 0.0,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        max_attempts: int = 3,
        backoff: BackoffLike = DEFAULT_BACKOFF,
        timeout: float | timedelta | None = None,
        deadline: float | timedelta | None = None,
        keep_completed: float | timedelta | None = KEEP_COMPLETED,
        keep_failed: float | timedelta | None = KEEP_FAILED,
        version: str | None = None,
    ) -> BatchTaskDecorator:
        """Make a function a task whose handler gets many executions at once, as ``@conductor.batch_task(size=100)``.

        The handler is an ``async def``, or a plain ``def`` that then runs in a thread. After an optional first
        parameter annotated `BatchContext` it has one, a ``list[T]`` or ``Sequence[T]``: an item of each execution,
        which ``task.invoke(item)`` made; the payload is the object ``{"item": ...}``. It is annotated to return None,
        and then all have completed, or a list or sequence with one entry per item, in their order: a value is that
        execution's result, an exception instance fails it or has it tried again, as if its own handler had raised it.
        If the handler raises, all are tried again or fail, each by its own attempts; an execution's last attempt of
        several is a batch of its own. There is no history: no steps, sleeps, events, children.

        `size`: executions per call at most, 1 to 1,000. `max_wait`: seconds (or a `timedelta`), 0 to 60, for which the
        first of them waits for company; 0: what is there is taken. The other options are those of `task`; `timeout` is
        for the call, and of several the least counts. Of a worker's `concurrency` a call takes one.

        Returns and raises as `task`.
        """
        options = checked_batch(size, max_wait)

        def register(handler: Callable[..., Any]) -> Task[..., Any]:
            task: Task[..., Any] = Task(
                handler,
                self,
                name=name,
                queue=queue,
                max_attempts=max_attempts,
                backoff=backoff,
                timeout=timeout,
                deadline=deadline,
                keep_completed=keep_completed,
                keep_failed=keep_failed,
                version=version,
                limits=self.limits,
                batch=options,
            )
            self.registry.add(task)
            return task

        return cast("BatchTaskDecorator", register)

    def create_worker(
        self,
        *,
        queue: str,
        tasks: Iterable[Task[..., Any]],
        concurrency: int = 10,
        sweep_interval: float | timedelta = 5.0,
        flush_interval: float | timedelta = 0.05,
        notify: NotifyMode = "adaptive",
        claim_batch: int | None = None,
        flush_batch: int | None = None,
    ) -> Worker:
        """Declare a worker: which tasks of one queue run, and how many executions at once. Starts nothing.

        `queue`: 1 to 128 bytes of UTF-8. `tasks`: at least one, all declared on that queue by this conductor.
        `concurrency`: handlers at once, 1 to 10,000, a batch being one. `sweep_interval`: seconds between looks at the
        queue that no notification asked for, 0.05 to 60. `flush_interval`: seconds an outcome may wait for others, 0 to
        5. `notify`: ``adaptive`` (NOTIFY only to a sleeping worker), ``always``, or ``off`` (the sweep alone).
        `claim_batch`, `flush_batch`: rows per statement, 1 to 10,000; None lets the worker adapt them. Returns the
        declaration for ``Orchestrator(workers=[...])``. Raises `InvalidOption` or `InvalidTask`.
        """
        queue = _checked_queue(queue, self.limits)
        where = f"the worker of queue {queue!r}"
        given: list[Task[..., Any]] = []
        for task in cast("Iterable[object]", tasks):
            if not isinstance(task, Task):
                raise InvalidTask(
                    f"tasks of {where} holds {task!r}, which is no task; decorate it with @conductor.task"
                )
            task = cast("Task[..., Any]", task)
            if task.invoker is not self:
                raise InvalidTask(
                    f"task {task.name!r} of {where} belongs to another conductor; "
                    f"declare it with this conductor's task()"
                )
            if task.replaced_by is not None:
                raise InvalidTask(
                    f"tasks of {where} holds {task!r}, a former version; give it the current one, which brings them all"
                )
            given.append(task)
        return Worker(
            queue=queue,
            tasks=tuple(given),
            concurrency=concurrency,
            sweep_interval=checked_seconds(f"sweep_interval of {where}", sweep_interval, minimum=0.05, maximum=60.0),
            flush_interval=checked_seconds(f"flush_interval of {where}", flush_interval, maximum=5.0),
            notify=notify,
            claim_batch=claim_batch,
            flush_batch=flush_batch,
        )
