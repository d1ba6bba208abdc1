"""The conductor: registry of tasks, and the client that invokes them and waits for their results.

Owns one pool of connections and one waiter for results, which live while somebody is inside `async with conductor`.
Constructing does no I/O, and nothing is global. It must not run executions, nor check or migrate the schema when it is
opened: the orchestrator does. It owns no task: everything it does is done by whoever calls it.

Invariants: open in one `trio.run` at a time; a connection of the user's is never committed, rolled back or set.
Cancellation: an `invoke` that is cancelled may have inserted or not; a cancelled `result()` leaves the execution alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, overload
from uuid import UUID

import trio

from .advice import Advice, judge_all
from .codec import Limits
from .db.address import Database, client_conninfo
from .db.calls import Calls
from .db.connection import TrioConnection
from .db.pool import Pool, open_pool
from .db.schema import MigrationReport, SchemaVersion, check, migrate
from .db.session import ask, connect, insert, insert_sync, is_async_connection
from .db.sql_files import validate_schema_name
from .db.transactions import PoolTransactions, ThreadTransactions
from .errors import InvalidOption, Misuse, NotOpen
from .handle import AnyHandle, Handle, SyncHandle
from .invocations import InvocationByName, new_executions
from .listening import Listening
from .model import (
    CancelCounts,
    Cancellation,
    DeadLetter,
    Divergence,
    ExecutionStatus,
    ExecutionSummary,
    FailedAttempt,
    OrchestratorStatus,
    Page,
    PromiseAnswer,
    QueueLoad,
    QueueStatus,
    ReplayReport,
    Retry,
    RetryCounts,
    State,
    StepRecord,
)
from .options import checked_int, checked_seconds
from .polling import PollSchedule
from .readers import ChannelReader, is_news, open_reader
from .replaying import PATIENCE, replayed
from .results import Results
from .retry import BackoffLike
from .sync_client import OpenClients, SyncClient
from .tasks import Invocation, Task, Tasks, checked_options
from .verbs import Request, Verbs, checked_id, checked_limit, follow

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

R = TypeVar("R")
T = TypeVar("T")

MAX_POOL_SIZE: Final = 1_000
_CLOSE_TIMEOUT: Final = 30.0
_HISTORIES: Final = 50  # read by one statement of a replay check, with their payloads


@dataclass(frozen=True, slots=True)
class _Open:
    """What exists while the conductor is open."""

    conninfo: str
    listen_conninfo: str
    pool: Pool[TrioConnection[TupleRow]]
    results: Results
    listening: Listening
    stack: AsyncExitStack


class Conductor(Tasks):
    """Declares tasks and workers, invokes tasks, and waits for results.

    Declaring needs nothing more. To invoke and to wait, be inside `async with conductor:` under Trio (the block may be
    nested, and shares one pool), or use `conductor.sync()` without an event loop. What is invoked on a connection of
    your own (`options(conn=...)`) needs neither.

    `schema`: the schema's name. `calls`: the verbs of that schema. `registry`: the tasks declared here.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        schema: str = "pgconductor",
        listen_dsn: str | None = None,
        embedded: bool = False,
        pool_size: int = 4,
        limits: Limits | None = None,
    ) -> None:
        """Construct without any I/O.

        `dsn`: connection string; None for PGCONDUCTOR_DSN, else DATABASE_URL, read when first needed. `schema`: 1 to 63
        bytes of UTF-8. `listen_dsn`: a direct connection to the same database, where `dsn` leads to a transaction
        pooler (pgbouncer); nothing is prepared on `dsn` then. `embedded`: use this user's embedded PostgreSQL instead,
        started if necessary, in the database "pgconductor". `pool_size`: connections for invoking, 1 to 1,000.
        `limits`: bounds for payloads and names. Raises `InvalidOption`.
        """
        super().__init__(limits=limits)
        self._database = Database(dsn, listen_dsn, embedded=embedded)
        self._pool_size = checked_int("pool_size", pool_size, minimum=1, maximum=MAX_POOL_SIZE)
        self._name_schema(schema)
        self._poll_schedule = PollSchedule()
        self._by_name = InvocationByName(self)

        self._sync_clients = OpenClients()

        self._guard = threading.Lock()  # of the next two, since two threads may call trio.run
        self._home: trio.lowlevel.TrioToken | None = None
        self._users = 0
        self._opening = trio.Lock()
        self._open: _Open | None = None

    def __repr__(self) -> str:
        state = "closed" if self._open is None else f"open {self._users} times"
        return f"<Conductor of schema {self.schema!r}, {len(self.registry)} tasks, {state}>"

    def _name_schema(self, schema: str) -> None:
        self.schema = validate_schema_name(schema)
        self.calls = Calls(self.schema)
        self._verbs = Verbs(self.calls, self.limits)

    def redirect(
        self,
        *,
        dsn: str | None = None,
        listen_dsn: str | None = None,
        embedded: bool = False,
        schema: str | None = None,
    ) -> None:
        """Use another database, or another schema, than the constructor was given, as `pgconductor run --dsn` does.

        Parameters as the constructor's. Any of the first three replaces all three; without them the database stays, and
        without `schema` the schema does. To be called before the conductor is first opened: sync clients that exist
        stay as they are. Does no I/O. Raises `InvalidOption`, and `Misuse` while the conductor is open.
        """
        if self._home is not None:
            raise Misuse("the conductor is open; name another database or schema before it is opened")
        if dsn is not None or listen_dsn is not None or embedded:
            self._database = Database(dsn, listen_dsn, embedded=embedded)
        if schema is not None:
            self._name_schema(schema)

    # Lifetime

    async def __aenter__(self) -> Self:
        """Open the conductor, or share it if this `trio.run` has it open. Waits only to start an embedded server.

        Raises `NoDatabase` if no database is named, or the embedded one cannot be started; `Misuse` if another
        `trio.run` has the conductor open, or under asyncio.
        """
        _require_trio()
        token = trio.lowlevel.current_trio_token()
        with self._guard:
            if self._home is not None and self._home is not token:
                raise Misuse(
                    "the conductor is open in another trio.run; make a Conductor for each, or run one after the other"
                )
            self._home = token
            self._users += 1
        try:
            async with self._opening:
                if self._open is None:
                    self._open = await self._start()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _start(self) -> _Open:
        async with AsyncExitStack() as stack:
            if self._database.embedded:
                # Starting a server blocks for a second, and is not to be abandoned half-way.
                server = ExitStack()
                stack.push_async_callback(trio.to_thread.run_sync, server.close)
                conninfo, listen_conninfo = await trio.to_thread.run_sync(self._database.open, server)
            else:
                conninfo, listen_conninfo = self._database.resolve()
            pool = open_pool(
                client_conninfo(conninfo),
                max_size=self._pool_size,
                kwargs={"autocommit": True, "prepare_threshold": self.prepare_threshold},
            )
            await stack.enter_async_context(pool)
            results = Results(self.calls, self._verbs, listen_conninfo, self._ask, self._poll_schedule)
            stack.push_async_callback(results.aclose)
            listening = Listening(self.calls, listen_conninfo, self._poll_schedule)
            stack.push_async_callback(listening.aclose)
            return _Open(conninfo, listen_conninfo, pool, results, listening, stack.pop_all())
        raise AssertionError("unreachable: the block returns or raises")

    async def _leave(self) -> None:
        self._users -= 1
        if self._users:
            return
        with trio.move_on_after(_CLOSE_TIMEOUT, shield=True):
            async with self._opening:  # somebody may enter while this closes: then it stays open
                if not self._users:
                    opened, self._open = self._open, None
                    try:
                        if opened is not None:
                            await opened.stack.aclose()
                    finally:
                        if not self._users:
                            self._home = None

    def _require_open(self) -> _Open:
        _require_trio()
        if self._open is None:
            raise NotOpen("the conductor is not open here; do this inside `async with conductor:`")
        if self._home is not trio.lowlevel.current_trio_token():
            raise Misuse("the conductor is open in another trio.run; make a Conductor for each")
        return self._open

    @property
    def conninfo(self) -> str:
        """Connection string in use, valid while open. Raises `NotOpen`."""
        return self._require_open().conninfo

    @property
    def listen_conninfo(self) -> str:
        """The same for what needs a session of its own: LISTEN, migrations."""
        return self._require_open().listen_conninfo

    @property
    def transactions(self) -> PoolTransactions:
        """What opens the transactions of steps, on connections of the client's pool. Raises `NotOpen`."""
        return PoolTransactions(self._require_open().pool)

    def thread_transactions(self) -> ThreadTransactions:
        """The same on blocking connections, as many as the pool has; to be closed by the caller. Raises `NotOpen`."""
        return ThreadTransactions(self.conninfo, self.prepare_threshold, self._pool_size)

    @property
    def prepare_threshold(self) -> int | None:
        """Executions before a statement is prepared on `conninfo`; None never prepares, for a transaction pooler."""
        return self._database.prepare_threshold

    # Invoking

    async def invoke(
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
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> Handle[Any]:
        """Insert an execution of a task by name, whose code may be elsewhere. Waits for the database only.

        `task`: its name, 1 to 128 bytes of UTF-8. `payload`: the handler's parameters by name, plain JSON values.
        `queue`: None for the one that a running program registered the task with, else "default". The other options
        are those of `Task.options`. A task that is declared here is validated as by its own `invoke`. Returns a handle
        whose result is typed only if the task is declared here, else plain JSON values.

        Raises `InvalidOption`, `InvalidPayload`, `NotOpen`, `Unavailable`, `SchemaMissing`.
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
        declared, execution = self._by_name.execution(task, payload, options)
        (invoked,) = await self._ask(self._verbs.invoke_many([execution]), conn)
        return Handle(self, declared, invoked.id, created=invoked.created)

    async def invoke_many(
        self, calls: Sequence[Invocation[R]], conn: psycopg.AsyncConnection[Any] | None = None
    ) -> list[Handle[R]]:
        """Insert one execution per call in one statement, all or none; handles come in the order of `calls`.

        `conn`: the caller's connection, which is neither committed nor rolled back; None for one of the pool. A lost
        reply is answered by asking once more only if every call has a `dedupe_key`; `created` may then be False for
        what this call created. Raises `NotOpen`, `Unavailable`, `SchemaMissing`, `InvalidPayload`; on the caller's own
        connection psycopg's errors come as they are.
        """
        if not calls:
            return []
        invoked = await self._ask(self._verbs.invoke_many(new_executions(calls)), conn)
        return [Handle(self, c.task, i.id, created=i.created) for c, i in zip(calls, invoked, strict=True)]

    def invoke_many_sync(
        self, calls: Sequence[Invocation[R]], conn: psycopg.Connection[Any] | None
    ) -> list[SyncHandle[R]]:
        """`invoke_many` on the caller's sync connection, blocking the thread; needs no open conductor."""
        if not calls:
            return []
        if conn is None:
            raise NotOpen("invoking without an event loop needs a sync client: use `with conductor.sync() as client:`")
        invoked = insert_sync(conn, self.calls.invoke_many(new_executions(calls)))
        return [
            SyncHandle(self._sync_clients, c.task, i.id, created=i.created) for c, i in zip(calls, invoked, strict=True)
        ]

    def sync(self) -> SyncClient:
        """Return a client for programs without an event loop: `with conductor.sync() as client:`.

        It connects when first used, and may be shared by threads. Does not wait. See `SyncClient`.
        """
        return SyncClient(self._database, self.calls, self._verbs, self._by_name, self._sync_clients)

    # Cancelling

    async def cancel(
        self,
        *executions: UUID | AnyHandle[Any],
        reason: str | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> dict[UUID, Cancellation]:
        """Cancel executions, by handle or id, in one statement: 10,000 at most. Waits for the database only.

        What has not begun, or waits, ends at once. The handler of what runs has its scope cancelled, normally within
        100 ms; it ends as cancelled, unless it finishes first. Cancelled executions are not tried again. `reason`: 1 to
        1,000 bytes, kept with the execution; of several the first counts. `conn`: the caller's connection; the
        cancellation is part of its transaction, which keeps these executions locked until it ends.

        Returns what came of it, by id; harmless to repeat. Raises `InvalidOption`, `NotOpen`, `Unavailable`,
        `Refused`, `SchemaMissing`.
        """
        if not executions:
            return {}
        return await self._ask(self._verbs.cancel(executions, reason), conn)

    async def cancel_matching(
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
        """Cancel all live executions that fit every filter given, in chunks, each a transaction of its own.

        `queue`, `task`: names. `states`: of scheduled, ready, running, waiting. `tags`: those that have all of these.
        `created_before`: an aware datetime. `reason`: as `cancel`. `limit`: how many at most, 1 to 2,147,483,647; None
        for all, what is invoked meanwhile included. `everything`: instead of a filter.

        Returns how many were cancelled at once, and how many running ones were asked for; what had been asked for
        before is not counted, nor what a chunk did whose reply was lost. Waits for the database only. Raises as
        `cancel`; what the chunks before the error did stays done.
        """
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
        return await follow(steps, self._ask)

    # Events, messages, promises

    async def emit(
        self,
        event: str,
        payload: object = None,
        /,
        *,
        retention: float | timedelta | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> int:
        """Send an event to every execution that waits for it, or will while it is kept. Waits for the database only.

        `event`: its name, 1 to 128 bytes. `payload`: any JSON value. `retention`: how long it is kept for executions
        that do not wait yet, seconds or a `timedelta` up to a century; None is a day, 0 is for those that wait now.
        `conn`: the caller's connection; the event is part of its transaction, and delivered when that has committed.

        Returns the event's id. Raises `InvalidPayload`, `InvalidOption`, `NotOpen`, `SchemaMissing`, and `Unavailable`:
        then it may have been sent or not.
        """
        return await self._ask(self._verbs.emit(event, payload, retention), conn)

    async def send(
        self,
        execution: UUID | AnyHandle[Any],
        channel: str,
        payload: object = None,
        /,
        *,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> bool:
        """Send a message to one execution, by handle or id; as `Handle.send`. `conn`: as `emit`."""
        return await self._ask(self._verbs.send(execution, channel, payload), conn)

    async def resolve_promise(
        self, promise: UUID, value: object = None, /, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> PromiseAnswer:
        """Resolve a promise by its id, with any JSON value; the first who resolves or rejects it counts.

        `conn`: as `emit`. Waits for the database, and for an open transaction that resolves the same. Returns what came
        of it. Raises as `emit`; after `Unavailable` ask again: "already" is then this call's, or another's before it.
        """
        return await self._ask(self._verbs.resolve_promise(promise, value), conn)

    async def reject_promise(
        self, promise: UUID, message: str = "rejected", /, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> PromiseAnswer:
        """Reject a promise: `PromiseRejected` is raised in its handler. `message`: 1 to 8,000 bytes."""
        return await self._ask(self._verbs.reject_promise(promise, message), conn)

    async def progress(self, execution: UUID | AnyHandle[Any], /) -> Any:
        """Return what an execution last told of its progress, by handle or id; as `Handle.progress`."""
        return self._verbs.decode_progress(await self._ask(self._verbs.progress(execution)))

    @overload
    def channel(
        self, execution: UUID | AnyHandle[Any], name: str, /, *, type: type[T], after: int = 0
    ) -> ChannelReader[T]: ...
    @overload
    def channel(
        self, execution: UUID | AnyHandle[Any], name: str, /, *, type: Any = Any, after: int = 0
    ) -> ChannelReader[Any]: ...
    def channel(
        self, execution: UUID | AnyHandle[Any], name: str, /, *, type: Any = Any, after: int = 0
    ) -> ChannelReader[Any]:
        """Read a channel of an execution, by handle or id; as `Handle.channel`."""
        return open_reader(self, checked_id("channel", execution), name, type, after, self.limits)

    async def wait_page(self, execution_id: UUID, name: str, after: int, limit: int) -> Page:
        """Wait until there is something to tell of a channel; for `ChannelReader`."""

        async def look() -> Page:
            return await self._ask(self._verbs.read_channel(execution_id, name, after, limit))

        page = await look()
        return page if is_news(page) else await self._require_open().listening.until(execution_id, look, is_news)

    # Dead letters

    async def dead_letters(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        states: Iterable[State | str] | State | str | None = None,
        limit: int = 100,
        after: DeadLetter | None = None,
    ) -> list[DeadLetter]:
        """Return executions that failed or were cancelled and are still kept, those that ended last first.

        `queue`, `task`: names. `states`: of failed and cancelled, None for both. `limit`: 1 to 10,000. `after`: the
        last one of the page before. Waits for the database only. Raises `InvalidOption`, `NotOpen`, `Unavailable`,
        `SchemaMissing`.
        """
        return await self._ask(
            self._verbs.dead_letters(queue=queue, task=task, states=states, limit=limit, after=after)
        )

    async def retry(
        self, *executions: UUID | AnyHandle[Any], conn: psycopg.AsyncConnection[Any] | None = None
    ) -> dict[UUID, Retry]:
        """Let failed or cancelled executions begin anew, by handle or id, in one statement: 10,000 at most.

        Each is ready now, with its id, its payload, what its steps have recorded, and all its attempts before it; its
        deadline is gone. `conn`: the caller's connection; the retry is part of its transaction.

        Returns what came of it, by id: what is live or completed is left alone. Waits for the database only. Raises
        `InvalidOption`, `NotOpen`, `Unavailable`, `Refused`, `SchemaMissing`.
        """
        if not executions:
            return {}
        return await self._ask(self._verbs.retry(executions), conn)

    async def retry_matching(
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
        """Let all dead letters that fit every filter given begin anew, the oldest first, in chunks.

        `queue`, `task`: names. `error_type`: the type of the last error, such as "ValueError" or "timeout". `states`:
        of failed and cancelled; None for failed alone, since a cancellation was somebody's will. `finished_after`,
        `finished_before`: aware datetimes, from the first to before the second; None for the second is before now, so
        that what fails again meanwhile is left. `limit`: how many at most. `everything`: instead of a filter.

        Returns how many begin anew, and how many do not because a live execution holds their dedupe key. Each chunk is
        a transaction of its own; what those before an error did stays done. Raises as `retry`.
        """
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
        return await follow(steps, self._ask)

    # Beginning anew

    @overload
    async def fork(
        self, execution: AnyHandle[R], /, *, from_step: str, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> Handle[R]: ...
    @overload
    async def fork(
        self, execution: UUID, /, *, from_step: str, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> Handle[Any]: ...
    async def fork(
        self, execution: Any, /, *, from_step: str, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> Handle[Any]:
        """Begin a new execution of the same task and payload, that has done what this one had done before a step.

        `execution`: by handle or id, live or finished, and kept. `from_step`: the name of a record; those before it are
        copied, of children and other waits only what was over. The new one has the queue, priority, timeout, attempts,
        back-off, tags and version of the other, whose id is its `origin_id`; not its deadline, dedupe key or parent.
        `conn`: the caller's connection; the fork is part of its transaction.

        Returns a handle of the new one. Waits for the database only. Raises `Refused` if nothing of it is kept,
        `Misuse` if there is no such record; `InvalidOption`, `NotOpen`, `Unavailable`, `SchemaMissing`.
        """
        begun = await self._ask(self._verbs.fork(execution, from_step), conn)
        return Handle(self, self._by_name.task(begun.task), begun.id)

    @overload
    async def restart(
        self, execution: AnyHandle[R], /, *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> Handle[R]: ...
    @overload
    async def restart(self, execution: UUID, /, *, conn: psycopg.AsyncConnection[Any] | None = None) -> Handle[Any]: ...
    async def restart(self, execution: Any, /, *, conn: psycopg.AsyncConnection[Any] | None = None) -> Handle[Any]:
        """Begin a new execution of the same task and payload, with nothing done; otherwise as `fork`."""
        begun = await self._ask(self._verbs.restart(execution), conn)
        return Handle(self, self._by_name.task(begun.task), begun.id)

    # Results and reading

    async def wait_result(self, execution_id: UUID, task: Task[..., R], timeout: float | None) -> R:
        """Wait for a result as `Handle.result` does, for an id that was kept instead of the handle.

        `timeout`: seconds from 0 (which looks once), None without end.
        """
        return await self._require_open().results.wait(execution_id, task, timeout)

    async def execution_errors(self, execution_id: UUID | AnyHandle[Any]) -> list[FailedAttempt]:
        """Return the errors of an execution's failed attempts, by handle or id; as `Handle.errors`."""
        return await self._ask(self._verbs.execution_errors(execution_id))

    async def status(self, execution: UUID | AnyHandle[Any], /) -> ExecutionStatus | None:
        """Return where an execution stands and what it waits for, by handle or id; as `Handle.status`."""
        return await self._ask(self._verbs.execution_details(execution))

    async def steps(self, execution: UUID | AnyHandle[Any], /) -> list[StepRecord]:
        """Return what an execution has done and waits for, by handle or id; as `Handle.steps`."""
        return await self._ask(self._verbs.execution_steps(execution))

    async def executions(
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
        """Return executions, live and finished, that fit every filter given, the newest first: those created last.

        `queue`, `task`: names. `states`: of all seven. `created_after`, `created_before`: aware datetimes, from the
        first to before the second. `tags`: those that have all of these. `parent`: children of it; `root`: it and all
        beneath it. `limit`: 1 to 10,000. `after`: the last one of the page before.

        Waits for the database only: for one short statement after the other, each looking at a bounded number, until
        the page is full or all were looked at; a time span bounds how many that are. Raises `InvalidOption`, `NotOpen`,
        `Unavailable`, `Refused`, `SchemaMissing`.
        """
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
        return await follow(steps, self._ask)

    async def replay_check(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        limit: int | None = None,
        patience: float | timedelta = PATIENCE,
    ) -> ReplayReport:
        """Try the tasks declared here against what live executions have recorded, before they are deployed.

        Each handler is run up to where its execution has come; no step is called, nothing is written, and resources
        are stand-ins. What a handler does outside of its steps is done. `queue`, `task`: names. `limit`: how many
        executions at most, the oldest first; None for all. `patience`: seconds for a handler that waits for what is not
        durable, 0.01 to 3,600.

        Returns how many were tried, and those that could not go on. Waits for the database and the handlers. Needs the
        rights of a worker, to read. Raises `InvalidOption`, `NotOpen`, `Unavailable`, `Refused`, `SchemaMissing`.
        """
        limit = checked_limit(limit)
        seconds = checked_seconds("patience", patience, minimum=0.01, maximum=3_600.0)
        divergences: list[Divergence] = []
        checked = 0
        after: UUID | None = None
        while (page := _HISTORIES if limit is None else min(_HISTORIES, limit - checked)) > 0:
            stored = await self._ask(self._verbs.stored_histories(queue=queue, task=task, limit=page, after=after))
            for history in stored.found:
                if (divergence := await replayed(self.registry, history, seconds)) is not None:
                    divergences.append(divergence)
            checked += len(stored.found)
            if len(stored.found) == page:
                after = stored.found[-1].id
            elif stored.go_on is None:
                break
            else:
                after = stored.go_on
        return ReplayReport(checked, tuple(divergences))

    async def queue_status(self) -> list[QueueStatus]:
        """Return counts per queue, by name. Raises `NotOpen`, `Unavailable`, `SchemaMissing`."""
        return await self._ask(self._verbs.queue_status())

    async def queue_load(self, queue: str | None = None) -> list[QueueLoad]:
        """Return how loaded a queue is, or each one, by name; an unknown queue has none. Counts to 10,000.

        Raises `InvalidOption`, and as `queue_status`.
        """
        return await self._ask(self._verbs.queue_load(queue))

    async def advise(self, queue: str | None = None, *, seconds: float | timedelta = 0.0) -> list[Advice]:
        """Judge whether a queue, or each one, needs more processes, or to be split, or is fine.

        `seconds`: 0 to 3,600; wait so long between two looks, and go by what came and went between them, instead of by
        what the workers told with their last heartbeats. Raises as `queue_load`.
        """
        pause = checked_seconds("advise(seconds=)", seconds, maximum=3_600.0)
        earlier = await self.queue_load(queue) if pause else None
        await trio.sleep(pause)
        return judge_all(await self.queue_load(queue), earlier)

    async def orchestrator_status(self) -> list[OrchestratorStatus]:
        """Return the orchestrators that are registered, oldest first; raises as `queue_status`."""
        return await self._ask(self._verbs.orchestrator_status())

    async def migrate(self) -> MigrationReport:
        """Install the schema or bring it up to date, on a connection of its own.

        Waits while another program does it. Raises `Unavailable`, `Refused`, `Incompatible`, `SchemaTooNew`, `NotOpen`.
        """
        async with await connect(self.listen_conninfo) as conn:
            return await migrate(conn, self.schema)

    async def check_schema(self) -> SchemaVersion:
        """Say whether the schema fits this program, changing nothing.

        Raises `SchemaMissing`, `SchemaTooNew`, `Incompatible`, `Refused`, `Unavailable`, `NotOpen`.
        """
        async with await connect(self.listen_conninfo) as conn:
            return await check(conn, self.schema)

    async def _ask(self, request: Request[T], conn: psycopg.AsyncConnection[Any] | None = None) -> T:
        """Execute a request on the caller's connection, else on one of the pool."""
        if conn is not None:
            _require_fitting(conn)
            return await insert(conn, request.call)
        opened = self._require_open()
        return await ask(opened.pool, opened.conninfo, request.call, request.doing, is_repeatable=request.is_repeatable)


def _in_asyncio() -> bool:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _require_trio() -> None:
    if trio.lowlevel.in_trio_task():
        return
    if _in_asyncio():
        raise Misuse("an asyncio loop is running here, and the conductor needs Trio; use conductor.sync()")
    raise NotOpen("the conductor is not open here; do this inside trio.run, within `async with conductor:`")


def _require_fitting(conn: object) -> None:
    """Refuse a connection that cannot be awaited here; by an asyncio program's own connection, one may invoke."""
    if not is_async_connection(conn):
        raise InvalidOption(
            f"conn must be a TrioConnection here, not {type(conn).__name__}; "
            f"with a sync connection use task.options(conn=...).invoke() without await"
        )
    if trio.lowlevel.in_trio_task():
        if not isinstance(conn, TrioConnection):
            raise Misuse(
                "conn is psycopg's asyncio connection, which does not work under Trio; "
                "open it with pgconductor.TrioConnection.connect()"
            )
    elif isinstance(conn, TrioConnection):
        raise Misuse(
            "conn is a TrioConnection, which works only inside trio.run; use a psycopg connection and conductor.sync()"
        )
