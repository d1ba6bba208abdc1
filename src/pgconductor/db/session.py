"""Executing calls for a client: on a pool under Trio, or on one connection shared by threads.

Owns what happens when the connection breaks. One that broke while it was idle is replaced before anything is sent. One
that breaks with a statement under way is an error, since nobody knows whether the statement took effect, unless the
caller says that repeating it is harmless: then it is repeated, once. One that the server rolled back because of a
rival (where the administrator's default isolation is stricter than ours) is repeated in any case. The driver's errors
come out as ours.

Cancellation (and `KeyboardInterrupt` in a thread): the statement is cancelled at the server, or the connection closed.
"""

from __future__ import annotations

import math
import os
import selectors
import threading
import time
from contextlib import ExitStack
from typing import Any, Final, TypeGuard, TypeVar

import psycopg
from psycopg.rows import TupleRow, tuple_row

from ..errors import Misuse, NotOpen
from .address import Addresses, Database, client_conninfo, explain, explain_connect
from .call import Call
from .connection import TrioConnection
from .execute import mapped_errors, prepare, run, run_sync
from .pool import Pool
from .tape import RecordedConnection, SyncRecordedConnection

T = TypeVar("T")

# An idle connection older than this is replaced, since nothing tells whether the network has forgotten it.
MAX_IDLE: Final = 30.0

_MAX_ROLLBACKS: Final = 20


def is_async_connection(conn: object) -> TypeGuard[psycopg.AsyncConnection[Any]]:
    """Whether `conn` is an asynchronous connection of psycopg's, asyncio's or Trio's."""
    return isinstance(conn, psycopg.AsyncConnection)


def is_sync_connection(conn: object) -> TypeGuard[psycopg.Connection[Any]]:
    """Whether `conn` is a blocking connection of psycopg's."""
    return isinstance(conn, psycopg.Connection)


async def insert(conn: psycopg.AsyncConnection[Any], call: Call[T]) -> T:
    """Execute a call that returns rows on the caller's connection, which may be in a pipeline.

    There nothing is known of a result until its rows are asked for; that sends what is queued and waits for it. The
    driver's errors pass as they are, but for those our functions raise.
    """
    with mapped_errors():
        async with _cursor(conn) as cursor:
            prepare(cursor, call)
            await cursor.execute(call.query, call.params)
            return call.decode(await cursor.fetchall())


def _cursor(conn: psycopg.AsyncConnection[Any]) -> psycopg.AsyncCursor[TupleRow]:
    """A cursor of psycopg's own kind; in the block of a step, which records what its statements return, one of it."""
    if isinstance(conn, RecordedConnection):
        cursor: psycopg.AsyncCursor[TupleRow] = conn.cursor(row_factory=tuple_row)
        return cursor
    return psycopg.AsyncCursor(conn, row_factory=tuple_row)


def insert_sync(conn: psycopg.Connection[Any], call: Call[T]) -> T:
    """`insert` on a blocking connection."""
    with mapped_errors(), _sync_cursor(conn) as cursor:
        prepare(cursor, call)
        cursor.execute(call.query, call.params)
        return call.decode(cursor.fetchall())


def _sync_cursor(conn: psycopg.Connection[Any]) -> psycopg.Cursor[TupleRow]:
    if isinstance(conn, SyncRecordedConnection):
        cursor: psycopg.Cursor[TupleRow] = conn.cursor(row_factory=tuple_row)
        return cursor
    return psycopg.Cursor(conn, row_factory=tuple_row)


async def connect(conninfo: str) -> TrioConnection[TupleRow]:
    """Open a connection in autocommit for a task of its own. Raises `NoDatabase`."""
    try:
        return await TrioConnection.connect(client_conninfo(conninfo), autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        if (ours := explain_connect(error, conninfo)) is None:
            raise
        raise ours from error


def _lost_to_rival(error: psycopg.Error, conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server rolled the statement back for certain, and may carry it out now: 40001, 40P01."""
    return not conn.closed and error.sqlstate in ("40001", "40P01")


async def ask(
    pool: Pool[TrioConnection[TupleRow]], conninfo: str, call: Call[T], doing: str, *, is_repeatable: bool
) -> T:
    """Execute a call on a connection of the pool, whose connections are in autocommit.

    `doing` completes "while ..." in messages. `is_repeatable`: it may be sent a second time when a reply is lost.
    Raises `Unavailable` (`NoDatabase`, `PoolTimeout`), `Refused`, `SchemaMissing`.
    """
    rollbacks = 0
    while True:
        conn: TrioConnection[TupleRow] | None = None
        try:
            async with pool.connection() as conn:
                return await run(conn, call)
        except psycopg.Error as error:
            if conn is None:
                ours = explain_connect(error, conninfo)
            elif conn.closed and is_repeatable:
                is_repeatable = False
                continue
            elif _lost_to_rival(error, conn) and rollbacks < _MAX_ROLLBACKS:
                rollbacks += 1
                continue
            else:
                ours = explain(error, conninfo, doing, is_lost=conn.closed)
            if ours is None:
                raise
            raise ours from error


class SyncSession:
    """One connection for all threads of a process, opened when first used; statements take turns."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._stack: ExitStack | None = None
        self._addresses: Addresses | None = None
        self._pid = 0
        self._conn: psycopg.Connection[TupleRow] | None = None
        self._used_at = -math.inf

    @property
    def is_open(self) -> bool:
        return self._stack is not None

    def open(self) -> None:
        """Find the database; blocks to start an embedded one. Raises `NoDatabase`, `Misuse` if open already."""
        with self._lock:
            if self._stack is not None:
                raise Misuse("the sync client is open already; call conductor.sync() for each block")
            with ExitStack() as stack:
                self._addresses = self._database.open(stack)
                self._pid = os.getpid()
                self._stack = stack.pop_all()

    def close(self) -> None:
        """Close the connection, after the statement under way, and let go of an embedded server."""
        with self._lock:
            stack, self._stack = self._stack, None
            conn, self._conn = self._conn, None
            # In a forked process the connection is still the parent's.
            if conn is not None and os.getpid() == self._pid:
                conn.close()
            if stack is not None:
                stack.close()

    @property
    def addresses(self) -> Addresses:
        """Where the database is. Raises `NotOpen` unless open, `Misuse` in a process forked since."""
        if self._stack is None or self._addresses is None:
            raise NotOpen("the sync client is not open; use it inside `with conductor.sync() as client:`")
        if os.getpid() != self._pid:
            raise Misuse("the sync client was opened before this process was forked; open one in each process")
        return self._addresses

    def ask(self, call: Call[T], doing: str, *, is_repeatable: bool) -> T:
        """Execute a call, after those of other threads; parameters and exceptions as `ask` of this module."""
        with self._lock:
            conninfo = self.addresses.conninfo
            rollbacks = 0
            while True:
                conn = self._alive(conninfo)
                try:
                    return run_sync(conn, call)
                except psycopg.Error as error:
                    if conn.closed and is_repeatable:
                        is_repeatable = False
                        continue
                    if _lost_to_rival(error, conn) and rollbacks < _MAX_ROLLBACKS:
                        rollbacks += 1
                        continue
                    if (ours := explain(error, conninfo, doing, is_lost=conn.closed)) is None:
                        raise
                    raise ours from error
                finally:
                    self._used_at = time.monotonic()

    def _alive(self, conninfo: str) -> psycopg.Connection[TupleRow]:
        conn = self._conn
        if conn is not None and (time.monotonic() - self._used_at > MAX_IDLE or has_hung_up(conn)):
            conn.close()
            conn = None
        if conn is None:
            conn = self._conn = connect_sync(conninfo, self._database.prepare_threshold)
        return conn


def connect_sync(conninfo: str, prepare_threshold: int | None = None) -> psycopg.Connection[TupleRow]:
    """Open a blocking connection in autocommit. Raises `NoDatabase`."""
    try:
        return psycopg.connect(client_conninfo(conninfo), autocommit=True, prepare_threshold=prepare_threshold)
    except psycopg.Error as error:
        if (ours := explain_connect(error, conninfo)) is None:
            raise
        raise ours from error


def has_hung_up(conn: psycopg.Connection[Any]) -> bool:
    """Look, without waiting, whether the server has ended an idle connection."""
    if conn.closed:
        return True
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(conn.fileno(), selectors.EVENT_READ)
            # The server's farewell and the end of the stream may come one after the other.
            while selector.select(0):
                conn.pgconn.consume_input()
    except psycopg.Error:
        return True
    return conn.closed
