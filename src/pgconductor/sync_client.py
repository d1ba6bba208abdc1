"""The client for programs without an event loop: invoke, wait and read, blocking the thread.

Owns one connection, used under a lock, and one more per thread that waits for a result. Starts no thread and no loop,
so it works wherever Python does, asyncio programs included. It must not touch the conductor's Trio side.

Invariants: nothing is sent twice unless repeating it is harmless; a connection that broke while idle is replaced before
anything is sent; a connection of the caller's is never committed, rolled back or set. A `KeyboardInterrupt` ends the
call; psycopg cancels the statement, and an interrupted wait closes its connection.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload
from uuid import UUID

from .advice import Advice, judge_all
from .db.address import Database
from .db.calls import Calls
from .db.result_listener import SyncResultListener, bucket_of
from .db.schema import MigrationReport, migrate_sync
from .db.session import SyncSession, connect_sync, insert_sync, is_sync_connection
from .errors import InvalidOption, Misuse, NotOpen, Unavailable
from .handle import AnyHandle, SyncHandle
from .invocations import InvocationByName, new_executions
from .model import (
    CancelCounts,
    Cancellation,
    DeadLetter,
    Ended,
    ExecutionStatus,
    ExecutionSummary,
    FailedAttempt,
    OrchestratorStatus,
    Page,
    PromiseAnswer,
    QueueLoad,
    QueueStatus,
    Retry,
    RetryCounts,
    Standing,
    State,
    StepRecord,
)
from .options import checked_seconds
from .outcomes import FINISHED, not_kept, outcome
from .polling import PollSchedule, Reconnecting
from .readers import SyncChannelReader, is_news, open_sync_reader
from .retry import BackoffLike
from .tasks import Invocable, Invocation, SyncTaskCall, Task, checked_options
from .verbs import Request, Verbs, checked_id, follow_sync

if TYPE_CHECKING:
    import psycopg

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

logger = logging.getLogger("pgconductor.results")


class OpenClients:
    """The sync clients of one conductor that are open: where handles made on a caller's connection wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: list[SyncClient] = []

    def add(self, client: SyncClient) -> None:
        with self._lock:
            self._clients.append(client)

    def remove(self, client: SyncClient) -> None:
        with self._lock:
            self._clients.remove(client)

    def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Wait on the client that was opened last; raises `NotOpen` without one."""
        return self._latest("result").wait_result(execution_id, task, timeout)

    def cancel(self, *executions: UUID, reason: str | None) -> dict[UUID, Cancellation]:
        """Cancel with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("cancel").cancel(*executions, reason=reason)

    def execution_errors(self, execution_id: UUID) -> list[FailedAttempt]:
        """Read with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("errors").execution_errors(execution_id)

    def send(self, execution: UUID, channel: str, payload: object = None, /) -> bool:
        """Send with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("send").send(execution, channel, payload)

    def progress(self, execution: UUID, /) -> Any:
        """Read with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("progress").progress(execution)

    def status(self, execution: UUID, /) -> ExecutionStatus | None:
        """Read with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("status").status(execution)

    def steps(self, execution: UUID, /) -> list[StepRecord]:
        """Read with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("steps").steps(execution)

    def wait_page(self, execution_id: UUID, name: str, after: int, limit: int) -> Page:
        """Read with the client that was opened last; raises `NotOpen` without one."""
        return self._latest("channel").wait_page(execution_id, name, after, limit)

    def _latest(self, method: str) -> SyncClient:
        with self._lock:
            if self._clients:
                return self._clients[-1]
        raise NotOpen(f"no sync client is open to ask with; use `with conductor.sync() as client:` around {method}()")


class SyncClient:
    """Invokes tasks and waits for results without an event loop; made by `Conductor.sync`.

    Use it as `with conductor.sync() as client:`. Threads may share it: statements take turns, and waiting for a result
    does not hold them up. After a fork, open a new one.
    """

    def __init__(
        self, database: Database, calls: Calls, verbs: Verbs, by_name: InvocationByName, clients: OpenClients
    ) -> None:
        self._calls = calls
        self._verbs = verbs
        self._by_name = by_name
        self._clients = clients
        self._session = SyncSession(database)
        self._schedule = PollSchedule()
        self._resting_lock = threading.Lock()
        self._resting: SyncResultListener | None = None

    def __repr__(self) -> str:
        return f"<SyncClient of schema {self._calls.schema!r}, {'open' if self._session.is_open else 'closed'}>"

    # Lifetime

    def __enter__(self) -> Self:
        """Open the client; blocks only to start an embedded server.

        Raises `NoDatabase` if no database is named or the embedded one does not start; `Misuse` if it is open already.
        """
        self._session.open()
        self._clients.add(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._clients.remove(self)
        try:
            self._session.close()
        finally:
            if (resting := self._swap_resting(None)) is not None:
                resting.close()

    # Invoking

    @overload
    def invoke(self, task: Invocable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> SyncHandle[R]: ...
    @overload
    def invoke(
        self,
        task: str,
        payload: Mapping[str, Any] | None = None,
        /,
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
        conn: psycopg.Connection[Any] | None = None,
    ) -> SyncHandle[Any]: ...
    def invoke(self, task: Any, /, *args: Any, **kwargs: Any) -> SyncHandle[Any]:
        """Insert an execution and return its handle; blocks for the database only.

        `task`: a task, or one with options (`task.options(...)`), and the handler's arguments; or a task's name,
        followed by its payload and the options of `Conductor.invoke`.

        Raises `InvalidPayload`, `InvalidOption`, `NotOpen`, `Unavailable`, `SchemaMissing`.
        """
        if isinstance(task, str):
            return self._invoke_by_name(task, *args, **kwargs)
        bound: Invocation[Any] = self._checked(task).bind(*args, **kwargs)
        return self._invoke_bound([bound])[0]

    def invoke_many(self, task: Invocable[P, R], calls: Iterable[Invocation[R]], /) -> list[SyncHandle[R]]:
        """Insert one execution per call in one statement, all or none; as `Invocable.invoke_many`."""
        target, options, _ = self._checked(task)._target()  # pyright: ignore[reportPrivateUsage]  # the clients' side of it
        return self._invoke_bound(target.adopted(calls, options))

    def _checked(self, task: Invocable[P, R]) -> Invocable[P, R]:
        _require_invocable(task)
        target, _, conn = task._target()  # pyright: ignore[reportPrivateUsage]  # the clients' side of it
        if conn is not None:
            raise Misuse("the sync client cannot use an asynchronous connection; await task.options(conn=...).invoke()")
        if target.invoker is not self._by_name.tasks:
            raise Misuse(f"task {target.name!r} belongs to another conductor; use that one's sync client")
        return task

    def _invoke_by_name(
        self,
        name: str,
        payload: Mapping[str, Any] | None = None,
        /,
        *,
        conn: psycopg.Connection[Any] | None = None,
        **options: Any,
    ) -> SyncHandle[Any]:
        checked = checked_options(**options, limits=self._by_name.tasks.limits)
        task, execution = self._by_name.execution(name, payload, checked)
        (invoked,) = self._ask(self._verbs.invoke_many([execution]), conn)
        return SyncHandle(self._clients, task, invoked.id, created=invoked.created)

    def _invoke_bound(self, calls: list[Invocation[R]]) -> list[SyncHandle[R]]:
        if not calls:
            return []
        invoked = self._ask(self._verbs.invoke_many(new_executions(calls)))
        return [
            SyncHandle(self._clients, call.task, i.id, created=i.created)
            for call, i in zip(calls, invoked, strict=True)
        ]

    def _ask(self, request: Request[T], conn: psycopg.Connection[Any] | None = None) -> T:
        """Execute a request on the caller's connection, else on the client's."""
        if conn is None:
            return self._session.ask(request.call, request.doing, is_repeatable=request.is_repeatable)
        if not is_sync_connection(conn):
            raise InvalidOption(f"conn must be a psycopg.Connection here, not {type(conn).__name__}")
        return insert_sync(conn, request.call)

    # Cancelling

    def cancel(
        self,
        *executions: UUID | AnyHandle[Any],
        reason: str | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> dict[UUID, Cancellation]:
        """Cancel executions, by handle or id; as `Conductor.cancel`."""
        if not executions:
            return {}
        return self._ask(self._verbs.cancel(executions, reason), conn)

    def cancel_matching(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        states: Iterable[State | str] | State | str | None = None,
        tags: Iterable[str] | None = None,
        created_before: datetime | None = None,
        reason: str | None = None,
        limit: int | None = None,
        everything: bool = False,
    ) -> CancelCounts:
        """Cancel all live executions that fit every filter given; as `Conductor.cancel_matching`."""
        steps = self._verbs.cancel_matching(
            queue=queue,
            task=task,
            states=states,
            tags=tags,
            created_before=created_before,
            reason=reason,
            limit=limit,
            everything=everything,
        )
        return follow_sync(steps, self._ask)

    # Events, messages, promises

    def emit(
        self,
        event: str,
        payload: object = None,
        /,
        *,
        retention: float | timedelta | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> int:
        """As `Conductor.emit`."""
        return self._ask(self._verbs.emit(event, payload, retention), conn)

    def send(
        self,
        execution: UUID | AnyHandle[Any],
        channel: str,
        payload: object = None,
        /,
        *,
        conn: psycopg.Connection[Any] | None = None,
    ) -> bool:
        """As `Conductor.send`."""
        return self._ask(self._verbs.send(execution, channel, payload), conn)

    def resolve_promise(
        self, promise: UUID, value: object = None, /, *, conn: psycopg.Connection[Any] | None = None
    ) -> PromiseAnswer:
        """As `Conductor.resolve_promise`."""
        return self._ask(self._verbs.resolve_promise(promise, value), conn)

    def reject_promise(
        self, promise: UUID, message: str = "rejected", /, *, conn: psycopg.Connection[Any] | None = None
    ) -> PromiseAnswer:
        """As `Conductor.reject_promise`."""
        return self._ask(self._verbs.reject_promise(promise, message), conn)

    def progress(self, execution: UUID | AnyHandle[Any], /) -> Any:
        """As `Conductor.progress`."""
        return self._verbs.decode_progress(self._ask(self._verbs.progress(execution)))

    @overload
    def channel(
        self, execution: UUID | AnyHandle[Any], name: str, /, *, type: type[T], after: int = 0
    ) -> SyncChannelReader[T]: ...
    @overload
    def channel(
        self, execution: UUID | AnyHandle[Any], name: str, /, *, type: Any = Any, after: int = 0
    ) -> SyncChannelReader[Any]: ...
    def channel(
        self, execution: UUID | AnyHandle[Any], name: str, /, *, type: Any = Any, after: int = 0
    ) -> SyncChannelReader[Any]:
        """Read a channel of an execution, by handle or id; as `SyncHandle.channel`."""
        return open_sync_reader(self, checked_id("channel", execution), name, type, after, self._by_name.tasks.limits)

    def wait_page(self, execution_id: UUID, name: str, after: int, limit: int) -> Page:
        """Wait until there is something to tell of a channel; for `SyncChannelReader`."""
        request = self._verbs.read_channel(execution_id, name, after, limit)
        page = self._ask(request)
        if is_news(page):
            return page
        next_look = -math.inf
        with self._open_ear(execution_id) as ear:
            while not is_news(page):
                now = time.monotonic()
                if ear.listen_if_due():
                    next_look = -math.inf  # what was sent before the flags were raised was not announced
                if now < next_look:
                    if ear.nap(next_look - now):
                        next_look = -math.inf
                    continue
                try:
                    page = self._ask(request)
                except Unavailable as error:
                    logger.warning("cannot look for items of a channel, and try again: %s", error)
                    next_look = self._schedule.deaf_until(time.monotonic())
                    continue
                next_look = self._schedule.next_look(time.monotonic(), ear.flagged_at)
        return page

    # Dead letters

    def dead_letters(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        states: Iterable[State | str] | State | str | None = None,
        limit: int = 100,
        after: DeadLetter | None = None,
    ) -> list[DeadLetter]:
        """As `Conductor.dead_letters`."""
        return self._ask(self._verbs.dead_letters(queue=queue, task=task, states=states, limit=limit, after=after))

    def retry(
        self, *executions: UUID | AnyHandle[Any], conn: psycopg.Connection[Any] | None = None
    ) -> dict[UUID, Retry]:
        """As `Conductor.retry`."""
        if not executions:
            return {}
        return self._ask(self._verbs.retry(executions), conn)

    def retry_matching(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        states: Iterable[State | str] | State | str | None = None,
        finished_after: datetime | None = None,
        finished_before: datetime | None = None,
        limit: int | None = None,
        everything: bool = False,
    ) -> RetryCounts:
        """As `Conductor.retry_matching`."""
        steps = self._verbs.retry_matching(
            queue=queue,
            task=task,
            error_type=error_type,
            states=states,
            finished_after=finished_after,
            finished_before=finished_before,
            limit=limit,
            everything=everything,
        )
        return follow_sync(steps, self._ask)

    # Beginning anew

    @overload
    def fork(
        self, execution: AnyHandle[R], /, *, from_step: str, conn: psycopg.Connection[Any] | None = None
    ) -> SyncHandle[R]: ...
    @overload
    def fork(
        self, execution: UUID, /, *, from_step: str, conn: psycopg.Connection[Any] | None = None
    ) -> SyncHandle[Any]: ...
    def fork(
        self, execution: Any, /, *, from_step: str, conn: psycopg.Connection[Any] | None = None
    ) -> SyncHandle[Any]:
        """As `Conductor.fork`."""
        begun = self._ask(self._verbs.fork(execution, from_step), conn)
        return SyncHandle(self._clients, self._by_name.task(begun.task), begun.id)

    @overload
    def restart(self, execution: AnyHandle[R], /, *, conn: psycopg.Connection[Any] | None = None) -> SyncHandle[R]: ...
    @overload
    def restart(self, execution: UUID, /, *, conn: psycopg.Connection[Any] | None = None) -> SyncHandle[Any]: ...
    def restart(self, execution: Any, /, *, conn: psycopg.Connection[Any] | None = None) -> SyncHandle[Any]:
        """As `Conductor.restart`."""
        begun = self._ask(self._verbs.restart(execution), conn)
        return SyncHandle(self._clients, self._by_name.task(begun.task), begun.id)

    # Reading

    def execution_errors(self, execution_id: UUID | AnyHandle[Any]) -> list[FailedAttempt]:
        """As `Conductor.execution_errors`."""
        return self._ask(self._verbs.execution_errors(execution_id))

    def status(self, execution: UUID | AnyHandle[Any], /) -> ExecutionStatus | None:
        """As `Conductor.status`."""
        return self._ask(self._verbs.execution_details(execution))

    def steps(self, execution: UUID | AnyHandle[Any], /) -> list[StepRecord]:
        """As `Conductor.steps`."""
        return self._ask(self._verbs.execution_steps(execution))

    def executions(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        states: Iterable[State | str] | State | str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        tags: Iterable[str] | None = None,
        dedupe_key: str | None = None,
        parent: UUID | AnyHandle[Any] | None = None,
        root: UUID | AnyHandle[Any] | None = None,
        limit: int = 100,
        after: ExecutionSummary | None = None,
    ) -> list[ExecutionSummary]:
        """As `Conductor.executions`."""
        steps = self._verbs.executions(
            queue=queue,
            task=task,
            states=states,
            created_after=created_after,
            created_before=created_before,
            tags=tags,
            dedupe_key=dedupe_key,
            parent=parent,
            root=root,
            limit=limit,
            after=after,
        )
        return follow_sync(steps, self._ask)

    def queue_status(self) -> list[QueueStatus]:
        """As `Conductor.queue_status`."""
        return self._ask(self._verbs.queue_status())

    def queue_load(self, queue: str | None = None) -> list[QueueLoad]:
        """As `Conductor.queue_load`."""
        return self._ask(self._verbs.queue_load(queue))

    def advise(self, queue: str | None = None, *, seconds: float | timedelta = 0.0) -> list[Advice]:
        """As `Conductor.advise`."""
        pause = checked_seconds("advise(seconds=)", seconds, maximum=3_600.0)
        earlier = self.queue_load(queue) if pause else None
        time.sleep(pause)
        return judge_all(self.queue_load(queue), earlier)

    def orchestrator_status(self) -> list[OrchestratorStatus]:
        """As `Conductor.orchestrator_status`."""
        return self._ask(self._verbs.orchestrator_status())

    def migrate(self) -> MigrationReport:
        """As `Conductor.migrate`."""
        with connect_sync(self._session.addresses.listen_conninfo) as conn:
            return migrate_sync(conn, self._calls.schema)

    # Waiting

    def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Wait for a result as `SyncHandle.result` does, for an id that was kept instead of the handle.

        `timeout`: seconds from 0 (which looks once), None without end.
        """
        ended = self._look(execution_id)
        if ended is None and timeout != 0:
            deadline = math.inf if timeout is None else time.monotonic() + timeout
            ended = self._wait_ended(execution_id, task, deadline)
        if ended is None:
            ended = follow_sync(self._verbs.last_look(task, execution_id, timeout), self._ask)
        return outcome(task, ended)

    def _wait_ended(self, execution_id: UUID, task: Task[..., Any], deadline: float) -> Ended | None:
        """Look when told to and when a look is due, until `deadline` by the monotonic clock; then return None."""
        next_look = -math.inf
        with self._open_ear(execution_id) as ear:
            while (now := time.monotonic()) < deadline:
                if ear.listen_if_due():
                    next_look = -math.inf  # what ended before the flags were raised was not announced
                if now < next_look:
                    if ear.nap(min(next_look, deadline) - now):
                        next_look = -math.inf
                    continue
                try:
                    ended = self._look(execution_id)
                    standing = self._read_standing(execution_id) if ended is None else None
                except Unavailable as error:
                    logger.warning("cannot look for results, and try again: %s", error)
                    next_look = self._schedule.deaf_until(time.monotonic())
                    continue
                if standing is None:
                    return ended
                if standing.state is None:
                    raise not_kept(task, execution_id)
                # If it finished between the two questions, look again.
                is_finished = standing.state in FINISHED
                next_look = -math.inf if is_finished else self._schedule.next_look(time.monotonic(), ear.flagged_at)
        return None

    def _look(self, execution_id: UUID) -> Ended | None:
        return self._ask(self._verbs.results([execution_id])).get(execution_id)

    def _read_standing(self, execution_id: UUID) -> Standing:
        return self._ask(self._verbs.standing([execution_id]))[execution_id]

    @contextmanager
    def _open_ear(self, execution_id: UUID) -> Generator[_Ear]:
        """Listen for one execution; afterwards one listener is kept for the next wait, others are closed."""
        conninfo = self._session.addresses.listen_conninfo
        ear = _Ear(self._calls, conninfo, bucket_of(execution_id), self._swap_resting(None))
        try:
            yield ear
        except BaseException as error:
            if isinstance(error, Exception):
                self._let_rest(ear)
            else:
                ear.close()
            raise
        self._let_rest(ear)

    def _let_rest(self, ear: _Ear) -> None:
        resting = ear.rest()
        if resting is not None and self._session.is_open:
            resting = self._swap_resting(resting)
        if resting is not None:
            resting.close()

    def _swap_resting(self, listener: SyncResultListener | None) -> SyncResultListener | None:
        with self._resting_lock:
            resting, self._resting = self._resting, listener
        return resting


def _require_invocable(task: object) -> None:
    if isinstance(task, SyncTaskCall):
        raise Misuse("a task with options(conn=...) has its own invoke(): call that, without the client")
    if not isinstance(task, Invocable):
        raise InvalidOption(f"task must be a task or a task's name, not {type(task).__name__}")


class _Ear:
    """What one wait listens with: a listener, that of an earlier wait if there is one, replaced when it is lost.

    `flagged_at`: when the flags were raised, by the monotonic clock; None while nobody listens.
    """

    def __init__(self, calls: Calls, conninfo: str, bucket: int, resting: SyncResultListener | None) -> None:
        self._calls = calls
        self._conninfo = conninfo
        self._bucket = bucket
        self._listener = resting
        self._reconnecting = Reconnecting()
        self.flagged_at: float | None = None

    def listen_if_due(self) -> bool:
        """Listen, unless that is so already, or failed a moment ago; return whether this call began it."""
        if self.flagged_at is not None or time.monotonic() < self._reconnecting.at:
            return False
        try:
            if self._listener is not None and not self._listener.is_fresh:
                self.close()
            if self._listener is None:
                self._listener = SyncResultListener.open(self._calls, self._conninfo)
            self._listener.start(self._bucket)
        except Unavailable as error:
            self._lose(error)
            return False
        self.flagged_at = time.monotonic()
        return True

    def nap(self, seconds: float) -> bool:
        """Wait, `seconds` at most; return whether there is reason to look before the time."""
        if self._listener is None or self.flagged_at is None:
            time.sleep(seconds)
            return False
        try:
            return self._listener.receive(seconds)
        except Unavailable as error:
            self._lose(error)
            return True

    def rest(self) -> SyncResultListener | None:
        """Stop listening, and give away the listener if it is in order."""
        listener, self._listener = self._listener, None
        if listener is not None:
            try:
                listener.rest()
            except Unavailable:
                listener.close()
                return None
        return listener

    def close(self) -> None:
        """Close the listener, if there is one."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _lose(self, error: Unavailable) -> None:
        logger.warning("cannot listen for results, and poll until it is possible again: %s", error)
        self.close()
        self.flagged_at = None
        self._reconnecting.note_loss(time.monotonic())
