"""The transactions of steps: opened on connections of a client's pool, ended by the engine alone.

`Transactions.open` gives an `OpenTransaction`: `conn` is for the user's code, the rest for whoever records the step in
it. Its last statement saves the step's record and tells the transaction's id, which must be the one it began with: a
COMMIT or ROLLBACK that the user sent is found out by that.

For an async handler the connections are those of the conductor's pool (`PoolTransactions`). For a plain ``def`` they
are psycopg's blocking ones, used in threads and kept by the orchestrator (`ThreadTransactions`).

Invariants: leaving the block of `open` without `commit` rolls back; nothing is left on the connection but what the
user's statements set for the session. Cancellation: as leaving; a cancelled `commit` is ambiguous.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import psycopg
import trio
from psycopg import pq
from psycopg.rows import TupleRow, tuple_row

from ..errors import DurableMisuse, PoolTimeout, Unavailable, leaves
from ..model import Isolation
from .address import engine_conninfo
from .call import Call
from .connection import TrioConnection
from .execute import run, run_sync
from .pool import Pool
from .session import MAX_IDLE, connect_sync, has_hung_up
from .step_connection import StepConnection, SyncStepConnection, notices_kept
from .tape import RecordedConnection, SyncRecordedConnection, Tape

T = TypeVar("T")

_IDLE, _ACTIVE, _INERROR = pq.TransactionStatus.IDLE, pq.TransactionStatus.ACTIVE, pq.TransactionStatus.INERROR
_PATIENCE: Final = 30.0  # seconds for a connection of the kind that blocks threads
_BEGIN: Final = 5.0  # seconds for the server to begin one; then the connection is taken for dead
_ROLLBACK: Final = 2.0  # seconds for a rollback; then the connection is closed


class OpenTransaction(Protocol):
    """A transaction that a step runs in. `conn`: for the user's code."""

    @property
    def conn(self) -> Any: ...

    @property
    def is_lost(self) -> bool:
        """Whether the connection is closed: what was not committed is rolled back."""
        ...

    @property
    def is_commit_sent(self) -> bool:
        """Whether COMMIT may have reached the server."""
        ...

    def require_id(self, xid: str) -> None:
        """Raise `DurableMisuse` unless this is the transaction's id: the user's code has ended it."""
        ...

    async def end_statements(self) -> None:
        """The user's code is done: `conn` sends nothing more. Raises `DurableMisuse` if it ended the transaction."""
        ...

    async def attempt(self, call: Call[T], /) -> T:
        """Execute in the transaction. Raises psycopg's errors, `Unavailable` for a lost connection."""
        ...

    def drop(self) -> None:
        """Close the connection at once."""
        ...

    async def commit(self) -> None:
        """Commit. An error with `is_lost` is ambiguous; after another one it is rolled back."""
        ...


class Transactions:
    """Where steps get their transactions: base of what is below."""

    def open(
        self, step: str, isolation: Isolation, tape: Tape | None = None
    ) -> AbstractAsyncContextManager[OpenTransaction]:
        """A transaction for the block, rolled back at its end unless it was committed.

        `step`: how messages call it. `tape`: records statements, or replays them in a transaction that writes nothing.
        Raises what connecting does, `PoolTimeout`.
        """
        raise TypeError(f"{type(self).__name__} opens no transactions")

    @staticmethod
    def tape(step: str, recorded: str | None = None) -> Tape:
        """A tape for `open`; `recorded`: as `Tape.dump` returned it, for a replay."""
        return Tape(step, recorded)

    @staticmethod
    def is_rival(error: BaseException) -> bool:
        """Whether a transaction was rolled back only because another was in its way."""
        return any(isinstance(leaf, psycopg.Error) and leaf.sqlstate in ("40001", "40P01") for leaf in leaves(error))

    @staticmethod
    def is_outage(error: BaseException) -> bool:
        """Whether no connection could be had."""
        return isinstance(error, (psycopg.OperationalError, Unavailable))


def _begin(isolation: Isolation, tape: Tape | None) -> bytes:
    if tape is not None and tape.is_replay:
        return f"begin isolation level {isolation} read only; select ''".encode()
    return f"begin isolation level {isolation}; select pg_catalog.pg_current_xact_id()::text".encode()


def _not_begun(step: str) -> Unavailable:
    return Unavailable(f"no reply within {_BEGIN:g} s when the transaction of {step} was begun")


class _Common:
    """What both kinds know."""

    def __init__(self, step: str, pgconn: pq.abc.PGconn, xid: str) -> None:
        self._step = step
        self._pgconn = pgconn
        self._xid = xid
        self.is_commit_sent = False

    @property
    def is_lost(self) -> bool:
        return self._pgconn.status == pq.ConnStatus.BAD

    def require_id(self, xid: str) -> None:
        if xid != self._xid:
            self._refuse_ended()

    def _require_open(self) -> None:
        if self.is_lost:
            raise Unavailable(f"the connection of {self._step} was lost before its commit")
        status = self._pgconn.transaction_status
        if status == _IDLE:
            self._refuse_ended()
        if status == _INERROR:
            raise DurableMisuse(
                f"a statement of {self._step} failed and its error was swallowed, so there is nothing to commit; let "
                f"it propagate, or put what may fail into a savepoint: conn.transaction()"
            )

    def _refuse_ended(self) -> None:
        raise DurableMisuse(
            f"the transaction of {self._step} was ended by a statement of its own (COMMIT, ROLLBACK or the like): what "
            f"it did is not tied to its record, and may be done again; leave the end of the transaction to the engine"
        )


class _TrioTransaction(_Common):
    def __init__(self, step: str, lent: TrioConnection[TupleRow], conn: StepConnection, xid: str) -> None:
        super().__init__(step, lent.pgconn, xid)
        self._lent = lent
        self.conn = conn

    async def end_statements(self) -> None:
        await self.conn.end()
        self._require_open()

    async def attempt(self, call: Call[T], /) -> T:
        try:
            return await run(self._lent, call)
        except psycopg.Error as error:
            if self.is_lost:
                raise Unavailable(f"the connection of {self._step} was lost before its commit") from error
            raise

    def drop(self) -> None:
        self._lent.drop()

    async def commit(self) -> None:
        self.is_commit_sent = True
        await self._lent.commit()


class PoolTransactions(Transactions):
    """Transactions on the connections of a pool, which are in autocommit."""

    def __init__(self, pool: Pool[TrioConnection[TupleRow]]) -> None:
        self._pool = pool

    @asynccontextmanager
    async def open(self, step: str, isolation: Isolation, tape: Tape | None = None) -> AsyncGenerator[OpenTransaction]:
        async with self._pool.connection() as lent:
            with notices_kept(lent):
                conn = StepConnection(lent, step) if tape is None else RecordedConnection(lent, step, tape)
                try:
                    row = None
                    # A connection that has lain in the pool may be dead without anybody's having said so.
                    with trio.move_on_after(_BEGIN):
                        async with psycopg.AsyncCursor(lent, row_factory=tuple_row) as cursor:
                            await cursor.execute(_begin(isolation, tape), prepare=False)
                            cursor.nextset()
                            row = await cursor.fetchone()
                    if row is None:
                        lent.drop()
                        raise _not_begun(step)
                    yield _TrioTransaction(step, lent, conn, str(row[0]))
                finally:
                    conn.cut()
                    # The pool would commit what is open when its block ends well.
                    if lent.pgconn.pipeline_status != pq.PipelineStatus.OFF:
                        lent.drop()
                    elif not lent.is_clean:
                        await lent.restore_idle()


class _ThreadTransaction(_Common):
    """Everything that waits for the server does so in a thread, which is left behind if the caller is cancelled."""

    def __init__(
        self,
        step: str,
        lent: psycopg.Connection[TupleRow],
        conn: SyncStepConnection,
        xid: str,
        threads: trio.CapacityLimiter,
    ) -> None:
        super().__init__(step, lent.pgconn, xid)
        self._lent = lent
        self.conn = conn
        self._threads = threads

    async def end_statements(self) -> None:
        await _in_thread(self._threads, self._lent, self.conn.end)
        self._require_open()

    async def attempt(self, call: Call[T], /) -> T:
        try:
            return await _in_thread(self._threads, self._lent, partial(run_sync, self._lent, call))
        except psycopg.Error as error:
            if self.is_lost:
                raise Unavailable(f"the connection of {self._step} was lost before its commit") from error
            raise

    def drop(self) -> None:
        _hang_up(self._lent)

    async def commit(self) -> None:
        self.is_commit_sent = True
        await _in_thread(self._threads, self._lent, self._lent.commit)


class ThreadTransactions(Transactions):
    """Transactions on blocking connections, at most `size` at once; those that are idle are kept. Used in Trio only."""

    def __init__(self, conninfo: str, prepare_threshold: int | None, size: int) -> None:
        self._conninfo = engine_conninfo(conninfo, "transactions")
        self._prepare_threshold = prepare_threshold
        self._size = size
        self._places = trio.Semaphore(size)
        self._threads = trio.CapacityLimiter(2 * size)  # as many as talk to a server, and some that were left behind
        self._idle: list[tuple[psycopg.Connection[TupleRow], float]] = []  # with when it was last used

    def close(self) -> None:
        """Close what is idle. What is in use is closed by who uses it, when it is given back."""
        self._size = 0
        while self._idle:
            self._idle.pop()[0].close()

    @asynccontextmanager
    async def open(self, step: str, isolation: Isolation, tape: Tape | None = None) -> AsyncGenerator[OpenTransaction]:
        await self._take_place()
        try:
            lent = await self._connect()
            with notices_kept(lent):
                conn = SyncStepConnection(lent, step) if tape is None else SyncRecordedConnection(lent, step, tape)
                try:
                    xid = None
                    with trio.move_on_after(_BEGIN):
                        begin = partial(_begin_sync, lent, _begin(isolation, tape))
                        xid = await _in_thread(self._threads, lent, begin)
                    if xid is None:
                        raise _not_begun(step)
                    yield _ThreadTransaction(step, lent, conn, xid, self._threads)
                finally:
                    await self._give_back(lent, conn)
        finally:
            self._places.release()

    async def _take_place(self) -> None:
        with trio.move_on_after(_PATIENCE) as scope:
            await self._places.acquire()
        if scope.cancelled_caught:
            raise PoolTimeout(
                f"no connection for a transaction in a thread became free within {_PATIENCE:g} s: {self._size} are in "
                f"use; raise Conductor(pool_size=)"
            )

    async def _connect(self) -> psycopg.Connection[TupleRow]:
        while self._idle:
            conn, used_at = self._idle.pop()
            if trio.current_time() - used_at < MAX_IDLE and not has_hung_up(conn):
                return conn
            conn.close()
        connect = partial(connect_sync, self._conninfo, self._prepare_threshold)
        return await trio.to_thread.run_sync(connect, limiter=self._threads)

    async def _give_back(self, lent: psycopg.Connection[TupleRow], conn: SyncStepConnection) -> None:
        if not conn.lock.acquire(blocking=False):
            _hang_up(lent)  # a thread that was left behind is inside the driver: not to be touched
            conn.cut()
            return
        conn.cut()
        conn.lock.release()
        if not lent.closed and lent.pgconn.transaction_status != _IDLE:
            with trio.move_on_after(_ROLLBACK, shield=True), suppress(psycopg.Error):
                await _in_thread(self._threads, lent, lent.rollback)
        if lent.closed or lent.pgconn.transaction_status != _IDLE or len(self._idle) >= self._size:
            if lent.pgconn.transaction_status != _ACTIVE:  # else a thread is inside it still
                lent.close()
        else:
            self._idle.append((lent, trio.current_time()))


def _begin_sync(conn: psycopg.Connection[TupleRow], begin: bytes) -> str:
    with psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        cursor.execute(begin, prepare=False)
        cursor.nextset()
        row = cursor.fetchone()
    assert row is not None
    return str(row[0])


async def _in_thread(threads: trio.CapacityLimiter, conn: psycopg.Connection[TupleRow], fn: Callable[[], T]) -> T:
    """Run what talks to the server by this connection in a thread; a caller that is cancelled hangs up."""
    is_over = False
    try:
        result = await trio.to_thread.run_sync(fn, limiter=threads, abandon_on_cancel=True)
        is_over = True
        return result
    except psycopg.Error:
        is_over = True
        raise
    finally:
        if not is_over:
            _hang_up(conn)


def _hang_up(conn: psycopg.Connection[TupleRow]) -> None:
    """End the conversation; a thread that waits for a reply gets an error."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(conn.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)
