"""psycopg's asynchronous connection, driven by Trio.

psycopg speaks the protocol in generators that yield "wait until the socket is readable or writable". This module
owns everything that differs when Trio waits for them: connecting, waiting, cancelling, locking, notifications and
closing. Cursors, COPY, pipelines and types are psycopg's own. It must not know what pgconductor stores.

Invariants: one task at a time talks to the server (`lock`); every wait passes `TrioConnection._wait_fd`; no task
outlives a call.
Cancellation: an interrupted call leaves nothing in flight. The statement is cancelled at the server and its reply
read away within `cleanup_timeout` seconds, else the socket is closed; the next statement never sees the reply or
the cancellation of an earlier one. A cancelled COMMIT is ambiguous: it may have taken effect. Leaving a
`transaction()` in a cancelled scope rolls back, under the same bound.
"""

from __future__ import annotations

import logging
import os
import random
import select
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import psycopg
import trio
from psycopg import generators, pq
from psycopg.abc import AdaptContext, ConnDict, ConnParam, PQGen, PQGenConn
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import make_conninfo, timeout_from_conninfo
from psycopg.rows import AsyncRowFactory, Row, tuple_row
from psycopg.waiting import Ready, Wait

T = TypeVar("T")

_WAIT_R, _WAIT_W = int(Wait.R), int(Wait.W)
_READY_R = Ready.R
_ACTIVE, _IDLE = pq.TransactionStatus.ACTIVE, pq.TransactionStatus.IDLE
_INTRANS, _INERROR = pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR
_COPY_IN, _COPY_OUT, _COPY_BOTH = pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH

# A socket is nearly always writable, so writing rarely waits. This many rounds without a wait, and others get a turn.
_ROUNDS_WITHOUT_CHECKPOINT = 50

_CLEANUP_TIMEOUT = 2.0

_TUPLE_ROW: Any = tuple_row

logger = logging.getLogger(__name__)


class TrioConnection(psycopg.AsyncConnection[Row]):
    """A `psycopg.AsyncConnection` for Trio: the same interface, usable only inside `trio.run`.

    Use `await TrioConnection.connect(...)`, then `async with conn:` (commits or rolls back, then closes), or close
    it yourself. One task at a time uses it; others wait for their turn, in order of arrival.

    Attributes:
        cleanup_timeout: seconds (> 0, default 2) that the clean-up after a cancellation may take (the cancel request
            and the rest of the reply, or the rollback). When they are over, the connection is closed instead.
    """

    cleanup_timeout: float = _CLEANUP_TIMEOUT

    def __init__(self, pgconn: pq.abc.PGconn, row_factory: AsyncRowFactory[Row] = _TUPLE_ROW) -> None:
        super().__init__(pgconn, row_factory)
        # psycopg only ever says `async with conn.lock`, but declares asyncio's.
        self.lock = _TurnLock()  # type: ignore[assignment]
        self.server_cursor_factory = cast("type[psycopg.AsyncServerCursor[Row]]", _ServerCursor)
        self._pid = os.getpid()

    # Connecting

    @classmethod
    @trio.lowlevel.enable_ki_protection
    async def connect(
        cls,
        conninfo: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        row_factory: AsyncRowFactory[Row] | None = None,
        cursor_factory: type[psycopg.AsyncCursor[Row]] | None = None,
        **kwargs: ConnParam,
    ) -> Self:
        """Connect to the first server of `conninfo` that answers and suits.

        Hosts are tried in order (or shuffled, with `load_balance_hosts=random`), and each address a name stands for;
        names are looked up through Trio's resolver. `target_session_attrs` is honoured across all of them.

        Args:
            conninfo: a connection string or URI; libpq's environment variables fill what it leaves out.
            autocommit: whether statements outside `transaction()` commit at once.
            prepare_threshold: executions before a statement is prepared; None never prepares (pgbouncer).
            context: where to copy type adapters from.
            row_factory: how rows are made; tuples by default.
            cursor_factory: the class that `cursor()` and `execute()` use.
            kwargs: connection parameters that override those in `conninfo`. `connect_timeout` bounds each attempt,
                name look-up included (whole seconds, at least 2; 130 if absent or 0).

        Raises:
            psycopg.OperationalError: no server could be used; the message lists every attempt.
            psycopg.ProgrammingError: `conninfo` is not valid.
            psycopg.InterfaceError: not inside `trio.run`.
        """
        _check_in_trio()
        params = await cls._get_connection_params(conninfo, **kwargs)
        timeout = timeout_from_conninfo(params)
        failures: list[tuple[str, psycopg.Error]] = []
        for host in _hosts_to_try(params):
            addresses: list[ConnDict] = []
            with trio.move_on_after(timeout) as scope:
                try:
                    addresses = await _look_up(host)
                except OSError as error:
                    failures.append((_describe(host), psycopg.OperationalError(f"failed to resolve host: {error}")))
            if scope.cancelled_caught:
                failures.append((_describe(host), psycopg.errors.ConnectionTimeout("name look-up timed out")))
            for address in addresses:
                with trio.move_on_after(timeout) as scope:
                    try:
                        conn = await cls._drive_conn(cls._connect_gen(make_conninfo("", **address)))
                    except psycopg.Error as error:
                        failures.append((_describe(address), error))
                        continue
                    conn._autocommit = bool(autocommit)
                    if row_factory is not None:
                        conn.row_factory = row_factory
                    if cursor_factory is not None:
                        conn.cursor_factory = cursor_factory
                    if context is not None:
                        conn._adapters = AdaptersMap(context.adapters)
                    conn.prepare_threshold = prepare_threshold
                    return conn
                expired = psycopg.errors.ConnectionTimeout(f"connection timeout expired after {timeout} s")
                failures.append((_describe(address), expired))
        raise _connect_error(failures)

    # Waiting

    @staticmethod
    async def _wait_fd(fd: int, want: int) -> Ready:
        """The one place where this module waits for the network. Always a checkpoint."""
        try:
            if want == _WAIT_R:
                await trio.lowlevel.wait_readable(fd)
                return _READY_R
            if want == _WAIT_W:
                await trio.lowlevel.wait_writable(fd)
                return Ready.W
            return await _wait_readable_or_writable(fd)
        except (trio.ClosedResourceError, OSError) as error:
            raise psycopg.OperationalError("the connection was closed while a task was waiting on it") from error
        except trio.BusyResourceError as error:
            raise _SocketBusy("another task is waiting on the socket of this connection") from error

    @classmethod
    async def _drive_conn(cls, gen: PQGenConn[T]) -> T:
        """Run a generator that opens a connection; it names the file descriptor anew each time."""
        try:
            fd, want = next(gen)
            while True:
                fd, want = gen.send(await cls._wait_fd(fd, want))
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            gen.close()  # closes the half-open socket, now and not when the traceback is collected

    async def _drive(self, gen: PQGen[T]) -> T:
        """Run a generator to its end. An interruption leaves it as it is: `wait` and `finish` know what to do."""
        rounds = 0
        has_waited = False
        try:
            want = int(next(gen))
            fd = self.pgconn.socket
            while True:
                if want == _WAIT_R:
                    await self._wait_fd(fd, want)
                    has_waited = True
                    want = gen.send(_READY_R)
                    continue
                ready = _ready_now(fd, want)
                rounds += 1
                if not ready:
                    ready = await self._wait_fd(fd, want)
                    has_waited = True
                elif rounds % _ROUNDS_WITHOUT_CHECKPOINT == 0:
                    await trio.lowlevel.checkpoint()
                want = gen.send(ready)
        except StopIteration as stop:
            if not has_waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
            result: T = stop.value
            return result

    @trio.lowlevel.enable_ki_protection
    async def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        """Run one of psycopg's protocol generators to its end, waiting with Trio.

        Cursors and transactions call this; call it yourself only with a generator of psycopg and with `lock` held.
        Always a checkpoint. In a scope that is already cancelled nothing is sent.

        Args:
            gen: the generator.
            interval: ignored, since Trio needs no polling for interruptions.
            timeout: seconds (>= 0) after which the call is interrupted like a cancelled one; None waits for ever.

        Returns:
            What the generator returns.

        Raises:
            psycopg.OperationalError: the connection was lost, or closed by another task, or `timeout` expired.
            psycopg.InterfaceError: not inside `trio.run`, or in a process forked since the connection was opened.
        """
        if timeout is not None:
            with trio.move_on_after(timeout):
                return await self.wait(gen)
            raise psycopg.OperationalError(f"no reply within {timeout} s; the statement was cancelled")
        self._check_process()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await self._drive(gen)
        except _SocketBusy:
            await self._interrupt(gen)
            raise
        except Exception:
            _check_in_trio()
            self._end(gen)
            raise
        except BaseException:
            await self._interrupt(gen)
            raise

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise psycopg.InterfaceError(
                f"this connection belongs to process {self._pid} and was used in process {os.getpid()}, "
                "forked from it: open a new connection after the fork"
            )

    # Interruption

    async def _interrupt(self, gen: Generator[Any, Any, Any]) -> None:
        """After an interrupted wait: see that nothing stays in flight, or close."""
        is_clean = False
        try:
            self._end(gen)
            with trio.move_on_after(self.cleanup_timeout, shield=True):
                with suppress(psycopg.Error):
                    await self._abort()
                    is_clean = True
        finally:
            if not is_clean:
                self.drop()

    def _end(self, gen: Generator[Any, Any, Any]) -> None:
        """End a generator that will not be resumed."""
        # One that has ended by itself may have raised the error of one statement of a pipeline that goes on.
        if getattr(gen, "gi_frame", None) is None:
            return
        # Those of a pipeline otherwise yield once more, to fetch what is queued.
        if (pipeline := self._pipeline) is not None:
            pipeline.command_queue.clear()
            pipeline.result_queue.clear()
        gen.close()

    async def _abort(self) -> None:
        """Cancel what runs at the server and read its replies away, until nothing is in flight.

        Not bounded: the caller bounds it. The order matters: the cancel request has ended before this returns, so
        that it cannot hit a later statement.
        """
        pgconn = self.pgconn
        if pgconn.status == pq.ConnStatus.BAD or pgconn.transaction_status != _ACTIVE:
            return
        if self._tpc is not None:  # an interrupted two-phase commit has no state that we could vouch for
            raise psycopg.OperationalError("interrupted in a two-phase transaction")
        if pgconn.pipeline_status != pq.PipelineStatus.OFF:
            pgconn.pipeline_sync()
        await self._send_cancel()
        fd = pgconn.socket
        while pgconn.transaction_status == _ACTIVE:
            if pgconn.flush():
                if await self._wait_fd(fd, int(Wait.RW)) & _READY_R:
                    pgconn.consume_input()
            elif pgconn.is_busy():
                await self._wait_fd(fd, _WAIT_R)
                pgconn.consume_input()
            elif (result := pgconn.get_result()) is None:
                pass
            elif result.status in (_COPY_IN, _COPY_BOTH):
                pgconn.put_copy_end(b"cancelled by the client")
            elif result.status == _COPY_OUT:
                while (size := pgconn.get_copy_data(1)[0]) > 0:
                    pass
                if size == 0:
                    await self._wait_fd(fd, _WAIT_R)
                    pgconn.consume_input()
        # What was sent may or may not have prepared or dropped statements. Now, since psycopg would forget them only
        # after the next one, perhaps just prepared; in a failed transaction its rollback does it.
        self._prepared.clear()
        if pgconn.transaction_status in (_IDLE, _INTRANS):
            await self._drive(self._prepared.maintain_gen(self))

    async def _send_cancel(self) -> None:
        if psycopg.capabilities.has_cancel_safe():
            request = self.pgconn.cancel_conn()
            request.start()
            await self._drive_conn(generators.cancel(request))
        else:  # libpq before 17 can only do it by blocking; psycopg[binary] has a newer one
            await trio.to_thread.run_sync(self.cancel, abandon_on_cancel=True)

    async def finish(self, gen: PQGen[T]) -> T | None:
        """Run a closing step of psycopg's (a rollback, say), in a cancelled scope too.

        Args:
            gen: the generator; it has `cleanup_timeout` seconds, then the connection is closed.

        Returns:
            What the generator returns, or None if the connection had to be closed.
        """
        is_finished = False
        try:
            with trio.move_on_after(self.cleanup_timeout, shield=True):
                async with self.lock:
                    try:
                        result = await self._drive(gen)
                    except psycopg.Error:
                        is_finished = self.pgconn.transaction_status != _ACTIVE
                        raise
                    is_finished = True
                    return result
        finally:
            if not is_finished:
                self._end(gen)
                self.drop()
        return None

    def commands_gen(self, commands: Iterable[bytes]) -> PQGen[None]:
        """The generator, for `wait` and `finish`, that executes `commands` one by one."""
        for command in commands:
            yield from self._exec_command(command)

    def drop(self) -> None:
        """Close at once, whatever is going on; a task that waits on the connection gets `psycopg.OperationalError`."""
        with suppress(psycopg.OperationalError):  # raised if there is no socket any more
            trio.lowlevel.notify_closing(self.pgconn.socket)
        self.pgconn.finish()

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:
        """Ask the server to cancel what this connection runs, from any task. Nothing happens if it is closed or idle.

        Args:
            timeout: seconds (> 0) that the request may take; 0 means no bound.

        Raises:
            psycopg.errors.CancellationTimeout: the request was not accepted in time.
            psycopg.ProgrammingError: in a prepared two-phase transaction.
        """
        self._check_process()
        if not self._should_cancel():
            await trio.lowlevel.checkpoint()
            return
        with trio.move_on_after(timeout or float("inf")):
            await self._send_cancel()
            return
        raise psycopg.errors.CancellationTimeout("cancellation timeout expired")

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:
        # psycopg calls this on its way out of a stream or a COPY, perhaps in a cancelled scope.
        with trio.move_on_after(min(timeout, self.cleanup_timeout), shield=True):
            try:
                await self.cancel_safe(timeout=timeout)
            except psycopg.Error as error:
                logger.warning("query cancellation failed: %s", error)

    # Being lent by a pool

    @property
    def is_clean(self) -> bool:
        """Whether it is open, idle, outside any transaction, pipeline or COPY, and no task is using it."""
        return (
            self.pgconn.transaction_status == _IDLE
            and not self._num_transactions
            and self._pipeline is None
            and self._tpc is None
            and not self._turn.is_held
        )

    @property
    def _turn(self) -> _TurnLock:
        lock: Any = self.lock
        assert isinstance(lock, _TurnLock)
        return lock

    async def restore_idle(self) -> bool:
        """End whatever was left open (a statement, a COPY, a transaction), or close the connection.

        Works in a cancelled scope too, and takes at most `cleanup_timeout` seconds.

        Returns:
            Whether the connection is open and clean now.
        """
        self._check_process()
        try:
            if not self.is_clean and not self.closed and self._pipeline is None and not self._num_transactions:
                with trio.move_on_after(self.cleanup_timeout, shield=True), suppress(psycopg.Error):
                    async with self.lock:
                        await self._abort()
                        if self.pgconn.transaction_status in (_INTRANS, _INERROR):
                            await self._drive(self._rollback_gen())
        finally:
            if not self.is_clean:
                self.drop()
        return not self.closed

    async def probe(self, timeout: float) -> bool:
        """Make one round trip with an empty query, which begins no transaction.

        Args:
            timeout: seconds (> 0) within which the server must answer.

        Returns:
            Whether it answered; if not, the connection is closed.
        """
        self._check_process()
        with trio.move_on_after(timeout), suppress(psycopg.Error):
            async with self.lock:
                await self.wait(self._probe_gen())
            return True
        self.drop()
        return False

    def _probe_gen(self) -> PQGen[None]:
        self._check_connection_ok()
        self.pgconn.send_query(b"")
        yield from generators.execute(self.pgconn)

    def has_hung_up(self) -> bool:
        """Look, without waiting, whether the server has ended an idle connection. Costs one or two system calls.

        Does not notice a peer that vanished without a word: `probe` does.
        """
        try:
            # The server's farewell and the end of the stream may come one after the other.
            while not self.closed and _ready_now(self.pgconn.socket, _WAIT_R):
                self.pgconn.consume_input()
                self._keep_notifies()
        except psycopg.Error:
            self.drop()
        return self.closed

    def settings(self) -> tuple[object, ...]:
        """What `restore_settings` can bring back: psycopg's settings of this connection, not the server's."""
        return (
            self._autocommit,
            self._isolation_level,
            self._read_only,
            self._deferrable,
            self.prepare_threshold,
            self.row_factory,
            self.cursor_factory,
            self.server_cursor_factory,
            tuple(self._notice_handlers),
            tuple(self._notify_handlers),
        )

    def restore_settings(self, settings: tuple[Any, ...]) -> None:
        """Set psycopg's settings back to what `settings` returned. Only on a clean connection."""
        self._autocommit, self._isolation_level, self._read_only, self._deferrable, *others = settings
        self._begin_statement = b""
        self.prepare_threshold, self.row_factory, self.cursor_factory, self.server_cursor_factory, *handlers = others
        self._notice_handlers[:], self._notify_handlers[:] = handlers

    # Transactions

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncGenerator[psycopg.AsyncTransaction]:
        """Run the block in a transaction, or in a savepoint if one is open; commit at its end, roll back on an error.

        Cancelled in the block, or before COMMIT was sent: rolled back. Cancelled while COMMIT was under way: it may
        have taken effect. Either way the connection is idle afterwards (or in the outer transaction), or closed.

        Args:
            savepoint_name: the name of the savepoint; chosen if absent.
            force_rollback: roll back at the end, whatever happened.
        """
        transaction = _Transaction(self, savepoint_name, force_rollback)
        if self._pipeline is None:
            async with transaction:
                yield transaction
            return
        is_outermost = not self._num_transactions
        try:
            async with self.pipeline(), transaction, self.pipeline():
                yield transaction
        except BaseException as error:
            # COMMIT may have been queued and dropped with the rest of the queue.
            is_interrupted = not isinstance(error, Exception)
            if is_interrupted and is_outermost and self.pgconn.transaction_status in (_INTRANS, _INERROR):
                await self.finish(self._rollback_gen())
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        try:
            if self.closed:
                return
            if exc_val is None:
                await self.commit()
                return
            try:
                await self.finish(self._rollback_gen())
            except psycopg.Error as error:
                logger.warning("error ignored in rollback on %s: %s", self, error)
        finally:
            if not getattr(self, "_pool", None):
                await self.close()

    async def close(self) -> None:
        """Close the connection; idempotent. A task that waits on it gets `psycopg.OperationalError`. Does not wait."""
        self._check_process()
        if not self.closed:
            self._closed = True
            self.drop()
        await trio.lowlevel.checkpoint()

    # Notifications

    async def receive_notifies(self, timeout: float | None = None) -> list[psycopg.Notify]:
        """Wait until there is at least one notification, and return all that have arrived.

        No statement is in flight meanwhile: cancelling it leaves the connection as it was and loses nothing. Includes
        those that arrived while statements ran. Other tasks cannot use the connection while this waits.

        Args:
            timeout: seconds (>= 0) to wait; 0 looks once, None waits for ever.

        Returns:
            The notifications in order of arrival, or an empty list after `timeout`.

        Raises:
            psycopg.OperationalError: the connection was lost or closed.
            psycopg.InterfaceError: a notify handler is registered: it would take the notifications away.
        """
        await self._wait_notifies(timeout)
        received = list(self._backlog)
        self._backlog.clear()
        return received

    @property
    def _backlog(self) -> deque[psycopg.Notify]:
        if self._notifies_backlog is None:
            self._notifies_backlog = deque()
        return self._notifies_backlog

    def _keep_notifies(self) -> None:
        """Move what libpq has parsed to the backlog (or to the registered handlers)."""
        pgconn = self.pgconn
        while (notify := pgconn.notifies()) is not None:
            if pgconn.notify_handler is not None:
                pgconn.notify_handler(notify)

    @trio.lowlevel.enable_ki_protection
    async def _wait_notifies(self, timeout: float | None) -> None:
        self._check_process()
        if self._notify_handlers:
            raise psycopg.InterfaceError("a notify handler is registered: use either handlers or receive_notifies()")
        _check_in_trio()
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            async with self.lock:
                self._check_connection_ok()
                while True:
                    # The socket may stay silent while libpq already holds the message: look before waiting.
                    self.pgconn.consume_input()
                    self._keep_notifies()
                    if self._backlog:
                        break
                    await self._wait_fd(self.pgconn.socket, _WAIT_R)
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def notifies(
        self, *, timeout: float | None = None, stop_after: int | None = None
    ) -> AsyncGenerator[psycopg.Notify]:
        """Yield notifications as they arrive. Between two of them the connection is free for other use.

        Those not yet yielded are kept for the next call, so that stopping early loses nothing.

        Args:
            timeout: seconds (>= 0) after which to stop; None never stops.
            stop_after: the number (>= 1) of notifications after which to stop.
        """
        deadline = float("inf") if timeout is None else trio.current_time() + timeout
        count = 0
        while True:
            if not self._backlog:
                remaining = deadline - trio.current_time()
                await self._wait_notifies(None if deadline == float("inf") else max(0.0, remaining))
                if not self._backlog:
                    return
            yield self._backlog.popleft()
            count += 1
            if stop_after is not None and count >= stop_after:
                return


class _SocketBusy(psycopg.InterfaceError):
    """Somebody outside this module waits on the connection's socket."""


class _TurnLock:
    """Who may talk to the server: one task at a time, in order of arrival.

    Unlike `trio.Lock` a free one is taken without a checkpoint (the wait that follows is one), and any task may
    release it, since Trio ends an abandoned async generator in a task of its own.
    """

    __slots__ = ("_owner", "_queue")

    def __init__(self) -> None:
        self._owner: trio.lowlevel.Task | None = None
        self._queue = trio.lowlevel.ParkingLot()

    @property
    def is_held(self) -> bool:
        return self._owner is not None

    async def __aenter__(self) -> None:
        try:
            task = trio.lowlevel.current_task()
        except RuntimeError:
            _check_in_trio()
            raise
        if self._owner is None:
            self._owner = task
        elif self._owner is task:
            raise psycopg.InterfaceError(
                "this task is already using the connection: end the stream, COPY or pipeline before the next statement"
            )
        else:
            await self._queue.park()  # whoever wakes us has made us the owner

    async def __aexit__(self, *_: object) -> None:
        self._owner = self._queue.unpark()[0] if self._queue else None


class _Transaction(psycopg.AsyncTransaction):
    """psycopg's transaction block, which ends its transaction in a cancelled scope too."""

    _conn: TrioConnection[Any]

    async def __aenter__(self) -> Self:
        try:
            async with self._conn.lock:
                if self.status is not self.Status.NOT_STARTED:
                    raise TypeError("transaction blocks can be used only once")
                await self._conn.wait(self._enter_gen())
        except BaseException as error:
            await self._undo(error)
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> bool:
        if self.pgconn.status != pq.ConnStatus.OK:
            self.status = self.Status.FAILED
            return False
        if exc_val is not None:
            return bool(await self._conn.finish(self._exit_gen(exc_type, exc_val, exc_tb)))
        try:
            async with self._conn.lock:
                return await self._conn.wait(self._exit_gen(None, None, None))
        except BaseException as error:
            await self._undo(error)
            raise

    async def _undo(self, error: BaseException) -> None:
        # Three cases: nothing to undo (never begun, or the end was reported by the server); begun and never ended;
        # the release of a savepoint was interrupted, which leaves the outer transaction in error.
        if self.pgconn.status != pq.ConnStatus.OK:
            self.status = self.Status.FAILED
        elif self.status is self.Status.ACTIVE:
            await self._conn.finish(self._exit_gen(type(error), error, None))
        elif (
            not isinstance(error, Exception)
            and not self._outer_transaction
            and not self.pgconn.pipeline_status
            and self.pgconn.transaction_status == _INERROR
        ):
            await self._conn.finish(self._conn.commands_gen(self._get_rollback_commands()))


class _ServerCursor(psycopg.AsyncServerCursor[Row]):
    """psycopg's server-side cursor, which is closed in a cancelled scope too."""

    __slots__ = ()

    async def close(self) -> None:
        try:
            await super().close()
        except BaseException:
            if not self.closed:
                conn = self._conn
                assert isinstance(conn, TrioConnection)
                try:
                    if not conn.closed:
                        self._described = False  # it may be closed already: look before closing it again
                        await conn.finish(self._close_gen())
                finally:
                    self._close()
            raise


def _check_in_trio() -> None:
    if not trio.lowlevel.in_trio_task():
        raise psycopg.InterfaceError(
            "TrioConnection works only inside trio.run(); with asyncio use psycopg.AsyncConnection"
        )


async def _wait_readable_or_writable(fd: int) -> Ready:
    """Trio waits for one direction at a time, so this takes a second task, which ends before the call does."""
    ready = 0
    failure: BaseException | None = None

    async def wait_for(direction: Ready) -> None:
        nonlocal ready, failure
        try:
            await (trio.lowlevel.wait_readable if direction is Ready.R else trio.lowlevel.wait_writable)(fd)
            ready |= direction
        except (trio.ClosedResourceError, trio.BusyResourceError, OSError) as error:
            failure = error
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for, Ready.R)
            await wait_for(Ready.W)
    except BaseExceptionGroup:
        await trio.lowlevel.checkpoint_if_cancelled()  # a plain Cancelled instead of a group of them
        raise
    if failure is not None:
        raise failure
    return Ready(ready)


def _ready_now(fd: int, want: int) -> Ready:
    """What the socket is ready for at this moment, without waiting; Ready.NONE if for nothing."""
    if not hasattr(select, "poll"):  # Windows
        readable, writable, _ = select.select([fd] if want & _WAIT_R else [], [fd] if want & _WAIT_W else [], [], 0)
        return Ready((Ready.R if readable else 0) | (Ready.W if writable else 0))
    poll = select.poll()
    poll.register(fd, (select.POLLIN if want & _WAIT_R else 0) | (select.POLLOUT if want & _WAIT_W else 0))
    ready = Ready.NONE
    for _, events in poll.poll(0):
        # An error or hang-up makes the socket ready for anything: the next call to libpq will report it.
        if events & ~select.POLLOUT and want & _WAIT_R:
            ready = Ready.R
        if events & ~select.POLLIN and want & _WAIT_W:
            ready = Ready(ready | Ready.W)
    return ready


def _hosts_to_try(params: ConnDict) -> list[ConnDict]:
    """Split parameters that list several hosts into one set of parameters per attempt, in the order to try them."""
    defaults = {o.keyword.decode(): o.val.decode() for o in pq.Conninfo.get_defaults() if o.val is not None}

    def parameter(name: str) -> str:
        value = params.get(name)
        return defaults.get(name, "") if value is None else str(value)

    hosts, hostaddrs, ports = (parameter(n).split(",") if parameter(n) else [] for n in ("host", "hostaddr", "port"))
    count = max(len(hosts), len(hostaddrs), 1)
    if hosts and hostaddrs and len(hosts) != len(hostaddrs):
        raise psycopg.OperationalError(f"could not match {len(hosts)} host names to {len(hostaddrs)} hostaddr values")
    if len(ports) == 1:
        ports *= count
    elif ports and len(ports) != count:
        raise psycopg.OperationalError(f"could not match {len(ports)} port numbers to {count} hosts")
    attempts: list[ConnDict] = []
    for i in range(count):
        attempt = dict(params)
        for name, values in (("host", hosts), ("hostaddr", hostaddrs), ("port", ports)):
            if values:
                attempt[name] = values[i]
        attempts.append(attempt)
    if parameter("load_balance_hosts") == "random":
        random.shuffle(attempts)
    if parameter("target_session_attrs") == "prefer-standby" and count > 1:
        # libpq's second pass over the hosts is ours to make, since it sees one of them at a time.
        return [
            *({**attempt, "target_session_attrs": "standby"} for attempt in attempts),
            *({**attempt, "target_session_attrs": "any"} for attempt in attempts),
        ]
    return attempts


async def _look_up(params: ConnDict) -> list[ConnDict]:
    """One set of parameters per address of the host; libpq would look the name up and block."""
    host = str(params.get("host") or "")
    if not host or host.startswith(("/", "@")) or host[1:2] == ":" or params.get("hostaddr"):
        return [params]
    found = await trio.socket.getaddrinfo(host, int(params.get("port") or 5432), type=trio.socket.SOCK_STREAM)
    addresses = [{**params, "hostaddr": str(sockaddr[0])} for *_, sockaddr in found]
    if params.get("load_balance_hosts") == "random":
        random.shuffle(addresses)
    return addresses


def _describe(params: ConnDict) -> str:
    return ", ".join(f"{name}: {params[name]!r}" for name in ("host", "port", "hostaddr") if params.get(name))


def _connect_error(failures: list[tuple[str, psycopg.Error]]) -> psycopg.Error:
    last = failures[-1][1]
    if len(failures) == 1:
        return last.with_traceback(None)
    lines = [f"no usable server among {len(failures)} attempts:", *(f"- {where}: {error}" for where, error in failures)]
    return type(last)("\n".join(lines))
