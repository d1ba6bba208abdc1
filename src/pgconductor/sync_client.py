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
import os
import random
import selectors
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar, cast, overload
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from .db.call import Call
from .db.calls import Calls, NewExecution
from .db.execute import run_sync
from .db.schema import MigrationReport, migrate_sync
from .dsn import Addresses, Database, explain, explain_connect
from .errors import InvalidOption, Misuse, NotOpen, Unavailable, WaitTimeout
from .handle import SyncHandle
from .invocations import InvocationByName, new_executions
from .model import Ended, Invoked, OrchestratorStatus, QueueStatus
from .results import (
    ANYBODY,
    FINISHED,
    LISTENER_OPTIONS,
    REST,
    PollSchedule,
    bucket_of,
    listen,
    named_buckets,
    not_kept,
    outcome,
    unanswered_timeout,
    wait_timeout,
)
from .tasks import Invocable, Invocation, SyncTaskCall, Task, checked_options

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# An idle connection older than this is replaced, since nothing tells whether the network has forgotten it.
_MAX_IDLE: Final = 30.0
_MAX_BACKOFF: Final = 30.0

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
        with self._lock:
            client = self._clients[-1] if self._clients else None
        if client is None:
            raise NotOpen("no sync client is open to wait with; use `with conductor.sync() as client:` around result()")
        return client.wait_result(execution_id, task, timeout)


class SyncClient:
    """Invokes tasks and waits for results without an event loop; made by `Conductor.sync`.

    Use it as `with conductor.sync() as client:`. Threads may share it: statements take turns, and waiting for a result
    does not hold them up. After a fork, open a new one.
    """

    def __init__(self, database: Database, calls: Calls, by_name: InvocationByName, clients: OpenClients) -> None:
        self._database = database
        self._calls = calls
        self._by_name = by_name
        self._clients = clients
        self._schedule = PollSchedule()
        self._lock = threading.Lock()  # of the connection and of all below
        self._stack: ExitStack | None = None
        self._addresses: Addresses | None = None
        self._pid = 0
        self._conn: psycopg.Connection[TupleRow] | None = None
        self._used_at = -math.inf
        self._resting: tuple[psycopg.Connection[TupleRow], float] | None = None

    def __repr__(self) -> str:
        return f"<SyncClient of schema {self._calls.schema!r}, {'closed' if self._stack is None else 'open'}>"

    # Lifetime

    def __enter__(self) -> Self:
        """Open the client; blocks only to start an embedded server.

        Raises `NoDatabase` if no database is named or the embedded one does not start; `Misuse` if it is open already.
        """
        with self._lock:
            if self._stack is not None:
                raise Misuse("the sync client is open already; call conductor.sync() for each block")
            with ExitStack() as stack:
                self._addresses = self._database.open(stack)
                self._pid = os.getpid()
                self._stack = stack.pop_all()
        self._clients.add(self)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._clients.remove(self)
        with self._lock:
            stack, self._stack = self._stack, None
            conn, self._conn = self._conn, None
            resting, self._resting = self._resting, None
            if os.getpid() == self._pid:
                for each in (conn, resting and resting[0]):
                    if each is not None:
                        each.close()
            if stack is not None:
                stack.close()

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
        given: object = task
        if isinstance(given, SyncTaskCall):
            raise Misuse("a task with options(conn=...) has its own invoke(): call that, without the client")
        if not isinstance(given, Invocable):
            raise InvalidOption(f"task must be a task or a task's name, not {type(given).__name__}")
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
        if conn is None:
            (invoked,) = self._insert([execution])
        elif isinstance(cast(object, conn), psycopg.Connection):
            (invoked,) = run_sync(conn, self._calls.invoke_many([execution]))
        else:
            raise InvalidOption(f"conn must be a psycopg.Connection here, not {type(conn).__name__}")
        return SyncHandle(self._clients, task, invoked.id, created=invoked.created)

    def _invoke_bound(self, calls: list[Invocation[R]]) -> list[SyncHandle[R]]:
        if not calls:
            return []
        invoked = self._insert(new_executions(calls))
        return [
            SyncHandle(self._clients, call.task, i.id, created=i.created)
            for call, i in zip(calls, invoked, strict=True)
        ]

    def _insert(self, executions: list[NewExecution]) -> list[Invoked]:
        is_repeatable = all(execution.dedupe_key is not None for execution in executions)
        return self._ask(self._calls.invoke_many(executions), "invoking", is_repeatable=is_repeatable)

    # Reading

    def queue_status(self) -> list[QueueStatus]:
        """As `Conductor.queue_status`."""
        return self._ask(self._calls.queue_status(), "reading the queues", is_repeatable=True)

    def orchestrator_status(self) -> list[OrchestratorStatus]:
        """As `Conductor.orchestrator_status`."""
        return self._ask(self._calls.orchestrator_status(), "reading the orchestrators", is_repeatable=True)

    def migrate(self) -> MigrationReport:
        """As `Conductor.migrate`."""
        with self._connect(self._require_open().listen_conninfo, None) as conn:
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
            ended = self._look_last(execution_id, task, timeout)
        return outcome(task, ended)

    def _wait_ended(self, execution_id: UUID, task: Task[..., Any], deadline: float) -> Ended | None:
        """Listen with the flag of this execution raised, and look when told to or when a look is due; see `results`."""
        listener: psycopg.Connection[TupleRow] | None = None
        channel = self._ask(self._calls.results_channel(), "looking for results", is_repeatable=True)
        flagged_at = next_look = time.monotonic()
        reconnect_at = -math.inf
        backoff = 0.0
        is_whole = False
        try:
            while (now := time.monotonic()) < deadline:
                if listener is None and now >= reconnect_at:
                    try:
                        listener = self._open_listener(channel, bucket_of(execution_id))
                        flagged_at = time.monotonic()
                    except (psycopg.OperationalError, Unavailable) as error:
                        logger.warning("cannot listen for results, polling until it is possible: %s", error)
                        backoff = min(_MAX_BACKOFF, max(1.0, 2 * backoff))
                        reconnect_at = now + random.uniform(0.5, 1) * backoff
                    next_look = now
                if next_look > now:
                    is_named = False
                    try:
                        is_named = self._nap(listener, channel, bucket_of(execution_id), min(next_look, deadline) - now)
                    except psycopg.OperationalError as error:
                        logger.warning("the connection that listens for results is lost: %s", error)
                        listener = None
                        reconnect_at = now + random.uniform(0, 1)
                        next_look = time.monotonic()
                        continue
                    if not is_named and time.monotonic() < next_look:
                        continue
                looked_at = time.monotonic()
                try:
                    if (ended := self._look(execution_id)) is not None:
                        is_whole = True
                        return ended
                    standing = self._ask(
                        self._calls.standing([execution_id]), "looking for executions", is_repeatable=True
                    )[execution_id]
                    if standing.state is None:
                        is_whole = True
                        raise not_kept(task, execution_id)
                    if standing.state in FINISHED:
                        continue
                except Unavailable as error:
                    logger.warning("cannot look for results, and try again: %s", error)
                    next_look = looked_at + self._jittered(self._schedule.deaf)
                    continue
                if listener is None:
                    next_look = looked_at + self._jittered(self._schedule.deaf)
                else:
                    times = (flagged_at + seconds for seconds in self._schedule.first)
                    later = looked_at + self._jittered(self._schedule.every)
                    next_look = next((at for at in times if at > looked_at), later)
            is_whole = True
            return None
        finally:
            if listener is not None:
                self._put_away(listener, is_whole=is_whole)

    def _nap(self, listener: psycopg.Connection[TupleRow] | None, channel: str, bucket: int, seconds: float) -> bool:
        """Wait for a notification; return whether there was one that may mean this bucket."""
        if listener is None:
            time.sleep(seconds)
            return False
        named = named_buckets(list(listener.notifies(timeout=seconds, stop_after=1)), channel)
        return named is None or bucket in named

    def _look(self, execution_id: UUID) -> Ended | None:
        call = self._calls.results([execution_id])
        return self._ask(call, "looking for results", is_repeatable=True).get(execution_id)

    def _look_last(self, execution_id: UUID, task: Task[..., Any], timeout: float | None) -> Ended:
        try:
            for _ in range(2):  # it may finish between the two questions
                if (ended := self._look(execution_id)) is not None:
                    return ended
                call = self._calls.standing([execution_id])
                standing = self._ask(call, "looking for executions", is_repeatable=True)[execution_id]
                if standing.state is None:
                    raise not_kept(task, execution_id)
                if standing.state not in FINISHED:
                    raise wait_timeout(task, timeout, standing)
        except WaitTimeout:
            raise
        except Unavailable as error:
            raise unanswered_timeout(task, execution_id, timeout) from error
        raise unanswered_timeout(task, execution_id, timeout)

    def _open_listener(self, channel: str, bucket: int) -> psycopg.Connection[TupleRow]:
        with self._lock:
            resting, self._resting = self._resting, None
        if resting is not None and (time.monotonic() - resting[1] > _MAX_IDLE or _has_hung_up(resting[0])):
            resting[0].close()
            resting = None
        listen_conninfo = self._require_open().listen_conninfo
        conn = self._connect(listen_conninfo, None) if resting is None else resting[0]
        try:
            run_sync(conn, listen(channel))
            run_sync(conn, self._calls.await_results([ANYBODY, bucket]))
        except BaseException:
            conn.close()
            raise
        return conn

    def _put_away(self, listener: psycopg.Connection[TupleRow], *, is_whole: bool) -> None:
        """Keep one listener for the next wait, without LISTEN and flags; close others."""
        try:
            if is_whole and not listener.closed:
                for call in REST:
                    run_sync(listener, call)
                with self._lock:
                    if self._resting is None and self._stack is not None:
                        self._resting = listener, time.monotonic()
                        return
        except psycopg.Error as error:
            logger.debug("closing the connection that listened for results: %s", error)
        listener.close()

    # The connection

    def _require_open(self) -> Addresses:
        if self._stack is None or self._addresses is None:
            raise NotOpen("the sync client is not open; use it inside `with conductor.sync() as client:`")
        if os.getpid() != self._pid:
            raise Misuse("the sync client was opened before this process was forked; open one in each process")
        return self._addresses

    def _ask(self, call: Call[T], doing: str, *, is_repeatable: bool) -> T:
        """Execute a call on the connection, which is opened or replaced first if need be.

        `is_repeatable`: it may be sent a second time, once, when the reply of the first is lost.
        """
        with self._lock:
            conninfo = self._require_open().conninfo
            while True:
                conn = self._alive(conninfo)
                try:
                    return run_sync(conn, call)
                except psycopg.Error as error:
                    if conn.closed and is_repeatable:
                        is_repeatable = False
                        continue
                    if (ours := explain(error, conninfo, doing, is_lost=conn.closed)) is None:
                        raise
                    raise ours from error
                finally:
                    self._used_at = time.monotonic()

    def _alive(self, conninfo: str) -> psycopg.Connection[TupleRow]:
        conn = self._conn
        if conn is not None and (time.monotonic() - self._used_at > _MAX_IDLE or _has_hung_up(conn)):
            conn.close()
            conn = None
        if conn is None:
            conn = self._conn = self._connect(conninfo, self._database.prepare_threshold)
        return conn

    def _connect(self, conninfo: str, prepare_threshold: int | None) -> psycopg.Connection[TupleRow]:
        try:
            return psycopg.connect(conninfo, autocommit=True, prepare_threshold=prepare_threshold, **LISTENER_OPTIONS)
        except psycopg.Error as error:
            if (ours := explain_connect(error, conninfo)) is None:
                raise
            raise ours from error

    def _jittered(self, seconds: float) -> float:
        return seconds * random.uniform(0.9, 1.1)


def _has_hung_up(conn: psycopg.Connection[Any]) -> bool:
    """Look, without waiting, whether an idle connection was ended by the server."""
    try:
        with selectors.DefaultSelector() as selector:
            if not conn.closed:
                selector.register(conn.fileno(), selectors.EVENT_READ)
            # The server's farewell and the end of the stream may come one after the other.
            while not conn.closed and selector.select(0):
                conn.pgconn.consume_input()
    except psycopg.Error:
        return True
    return conn.closed
