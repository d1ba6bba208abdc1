"""A bounded pool of `TrioConnection`s that owns no task.

Connections are opened by the task that needs one, given back when its block ends, and checked and expired when they
are handed out. `Pool._assign` is the one synchronous method that makes every decision after any change; waiting
happens afterwards, with no lock held. Nothing happens in the background, so idle connections are closed only when
somebody uses the pool.

Invariants: connections in use, idle and being opened never exceed `max_size`; tasks are served in order of arrival;
what is handed out is open and clean (no transaction, COPY, pipeline or foreign settings of psycopg's).
Cancellation: a task that is cancelled while it waits gives back what it was promised meanwhile; leaving a block in a
cancelled scope rolls back under `TrioConnection.cleanup_timeout`, or closes the connection.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, overload

import psycopg
import trio
from psycopg.rows import TupleRow

from ..errors import InvalidOption, Misuse, NotOpen, PoolTimeout
from .connection import TrioConnection

C = TypeVar("C", bound=TrioConnection[Any])

# A connection that was idle for longer is asked for a round trip before it is lent; below, a look at the socket does.
_PROBE_AFTER = 30.0
_PROBE_TIMEOUT = 2.0

# Lifetimes vary by this fraction, so that connections opened together are not replaced together.
_LIFETIME_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """A snapshot of a pool. The first group is the state now, the second counts since it was opened."""

    max_size: int
    in_use: int
    idle: int
    connecting: int
    waiting: int

    opened: int
    discarded: int
    handed_out: int
    waited: int
    timed_out: int


@dataclass(slots=True, eq=False)
class _Place(Generic[C]):
    """A place in the pool, and the connection that fills it, unless it is still to be opened."""

    conn: C | None = None
    expires_at: float = math.inf
    idle_since: float = 0.0
    settings: tuple[object, ...] = ()


class _Request(Generic[C]):
    """A task in the queue; `place` is set before it is woken."""

    __slots__ = ("place", "woken")

    def __init__(self) -> None:
        self.woken = trio.Event()
        self.place: _Place[C] | None = None


class Pool(Generic[C]):
    """A pool of connections; made by `open_pool`. Use `async with pool.connection() as conn:`."""

    def __init__(
        self,
        conninfo: str,
        *,
        max_size: int,
        min_size: int,
        timeout: float,
        max_idle: float,
        max_lifetime: float,
        configure: Callable[[C], Awaitable[None]] | None,
        connection_class: type[C],
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        if max_size < 1:
            raise InvalidOption(f"max_size must be at least 1, not {max_size}")
        if not 0 <= min_size <= max_size:
            raise InvalidOption(f"min_size must be between 0 and max_size ({max_size}), not {min_size}")
        for name, seconds in (("timeout", timeout), ("max_idle", max_idle), ("max_lifetime", max_lifetime)):
            if not seconds > 0:
                raise InvalidOption(f"{name} must be more than 0 seconds, not {seconds}")
        self._conninfo = conninfo
        self._max_size = max_size
        self._min_size = min_size
        self._timeout = timeout
        self._max_idle = max_idle
        self._max_lifetime = max_lifetime
        self._configure = configure
        self._connection_class = connection_class
        self._kwargs: dict[str, Any] = dict(kwargs or {})

        self._is_open = False
        self._idle: deque[_Place[C]] = deque()  # the most recently used on the right
        self._taken: set[_Place[C]] = set()  # in use or being opened
        self._requests: deque[_Request[C]] = deque()

        self._opened = self._discarded = self._handed_out = self._waited = self._timed_out = 0

    def __repr__(self) -> str:
        s = self.statistics()
        state = "open" if self._is_open else "closed"
        return (
            f"<Pool {state}: {s.in_use} in use, {s.idle} idle, {s.connecting} connecting, "
            f"{s.waiting} waiting, max_size={s.max_size}>"
        )

    def statistics(self) -> PoolStatistics:
        """The state of the pool at this moment."""
        connecting = sum(place.conn is None for place in self._taken)
        return PoolStatistics(
            max_size=self._max_size,
            in_use=len(self._taken) - connecting,
            idle=len(self._idle),
            connecting=connecting,
            waiting=len(self._requests),
            opened=self._opened,
            discarded=self._discarded,
            handed_out=self._handed_out,
            waited=self._waited,
            timed_out=self._timed_out,
        )

    @asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncGenerator[C]:
        """Lend a connection for the block; commit at its end, roll back if an exception leaves it.

        Waits until a connection is free, or opens one. Do not keep the connection, or a cursor of it, after the block.

        Args:
            timeout: seconds (> 0) to wait for a connection, opening one included; the pool's own if None.

        Raises:
            PoolTimeout: no connection became free in time.
            psycopg.OperationalError: none was free, and a new one could not be opened.
            NotOpen: the pool is closed.
        """
        place = await self._acquire(self._timeout if timeout is None else timeout)
        conn = place.conn
        assert conn is not None
        try:
            try:
                yield conn
            except BaseException as error:
                if isinstance(error, psycopg.errors.ReadOnlySqlTransaction) and conn.read_only is not True:
                    await conn.close()  # a server that was the primary once: the next connection looks for the new one
                raise
            else:
                if not conn.closed:
                    await conn.commit()
        finally:
            await self._give_back(place)

    # Decisions

    def _assign(self) -> None:
        """Decide, after any change, who gets what. Synchronous: nobody sees a state in between.

        In this order: drop what is idle and broken or expired; give idle connections to the first in the queue; let
        as many others as there are free places open a connection.
        """
        now = trio.current_time()
        for place in list(self._idle):
            conn = place.conn
            assert conn is not None
            surplus = len(self._idle) + len(self._taken) > self._min_size
            too_idle = surplus and now - place.idle_since > self._max_idle
            if not self._is_open or conn.closed or now > place.expires_at or too_idle:
                self._idle.remove(place)
                self._discard(place)
        while self._requests and self._idle:
            self._hand(self._idle.pop())
        while self._requests and len(self._idle) + len(self._taken) < self._max_size:
            self._hand(_Place())

    def _hand(self, place: _Place[C]) -> None:
        request = self._requests.popleft()
        self._taken.add(place)
        request.place = place
        request.woken.set()

    def _discard(self, place: _Place[C]) -> None:
        if place.conn is not None:
            place.conn.drop()
            place.conn = None
            self._discarded += 1

    def _release(self, place: _Place[C]) -> None:
        """Take a place back, with its connection if that is fit to be lent again."""
        self._taken.discard(place)
        if place.conn is not None and place.conn.is_clean:
            place.idle_since = trio.current_time()
            self._idle.append(place)
        else:
            self._discard(place)
        self._assign()

    async def __aenter__(self) -> Self:
        if self._is_open:
            raise Misuse("the pool is open already: call open_pool() for each block")
        self._is_open = True
        try:
            for _ in range(self._min_size):
                place = _Place[C]()
                self._taken.add(place)
                try:
                    await self._open(place)
                finally:
                    self._release(place)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _close(self) -> None:
        self._is_open = False
        self._assign()
        for request in self._requests:
            request.woken.set()
        self._requests.clear()

    # Waiting

    async def _acquire(self, timeout: float) -> _Place[C]:
        if not timeout > 0:
            raise InvalidOption(f"timeout must be more than 0 seconds, not {timeout}")
        is_granted = False
        with trio.move_on_after(timeout):
            place = await self._wait_place()
            is_granted = True
            try:
                await self._fill(place)
            except BaseException:
                self._release(place)
                raise
            self._handed_out += 1
            return place
        self._timed_out += 1
        if is_granted:
            raise PoolTimeout(
                f"no connection could be opened within {timeout} s: see whether the server answers, or raise timeout"
            )
        s = self.statistics()
        raise PoolTimeout(
            f"no connection became free within {timeout} s in the pool of max_size={s.max_size} ({s.in_use} in use, "
            f"{s.connecting} connecting, {s.waiting} other tasks waiting): hold connections for a shorter time, raise "
            "max_size, or raise timeout"
        )

    async def _wait_place(self) -> _Place[C]:
        if not self._is_open:
            raise NotOpen("the pool is closed: use it inside its `async with open_pool(...)` block")
        await trio.lowlevel.checkpoint_if_cancelled()
        request = _Request[C]()
        self._requests.append(request)
        self._assign()
        if request.place is None:
            self._waited += 1
        try:
            await request.woken.wait()
        except BaseException:
            if request.place is not None:
                self._release(request.place)
            else:
                self._requests.remove(request)
            raise
        if request.place is None:
            raise NotOpen("the pool was closed while a task waited for a connection")
        return request.place

    async def _fill(self, place: _Place[C]) -> None:
        """See that the place has a connection that works: the one it has, if it is alive, or a new one."""
        if place.conn is not None:
            idle_for = trio.current_time() - place.idle_since
            if place.conn.has_hung_up() or (idle_for > _PROBE_AFTER and not await place.conn.probe(_PROBE_TIMEOUT)):
                self._discard(place)
        if place.conn is None:
            await self._open(place)

    async def _open(self, place: _Place[C]) -> None:
        conn = await self._connection_class.connect(self._conninfo, **self._kwargs)
        try:
            if self._configure is not None:
                await self._configure(conn)
                if not conn.is_clean:
                    raise psycopg.ProgrammingError(
                        f"configure left {conn} in a transaction or closed: commit in it, or use autocommit"
                    )
        except BaseException:
            conn.drop()
            raise
        jitter = random.uniform(1 - _LIFETIME_JITTER, 1)
        place.expires_at = trio.current_time() + self._max_lifetime * jitter
        place.settings = conn.settings()
        place.conn = conn
        self._opened += 1

    async def _give_back(self, place: _Place[C]) -> None:
        conn = place.conn
        assert conn is not None
        try:
            if (conn.is_clean or await conn.restore_idle()) and conn.settings() != place.settings:
                conn.restore_settings(place.settings)
        finally:
            self._release(place)


@overload
def open_pool(
    conninfo: str = "",
    *,
    max_size: int = 4,
    min_size: int = 0,
    timeout: float = 30.0,
    max_idle: float = 600.0,
    max_lifetime: float = 3600.0,
    configure: Callable[[TrioConnection[TupleRow]], Awaitable[None]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Pool[TrioConnection[TupleRow]]: ...


@overload
def open_pool(
    conninfo: str = "",
    *,
    max_size: int = 4,
    min_size: int = 0,
    timeout: float = 30.0,
    max_idle: float = 600.0,
    max_lifetime: float = 3600.0,
    configure: Callable[[C], Awaitable[None]] | None = None,
    connection_class: type[C],
    kwargs: Mapping[str, Any] | None = None,
) -> Pool[C]: ...


def open_pool(
    conninfo: str = "",
    *,
    max_size: int = 4,
    min_size: int = 0,
    timeout: float = 30.0,
    max_idle: float = 600.0,
    max_lifetime: float = 3600.0,
    configure: Callable[[Any], Awaitable[None]] | None = None,
    connection_class: type[Any] = TrioConnection,
    kwargs: Mapping[str, Any] | None = None,
) -> Pool[Any]:
    """Open a pool of connections for the block: `async with open_pool(dsn) as pool`.

    With `min_size=0` entering makes no I/O. At the end of the block idle connections are closed at once, those in use
    when they are given back, and tasks that wait for one get `NotOpen`.

    Args:
        conninfo: a connection string or URI, as for `TrioConnection.connect`.
        max_size: connections (>= 1) that may be open at once.
        min_size: connections (0 to `max_size`) opened on entry, and not closed for being idle.
        timeout: seconds (> 0) that `Pool.connection` waits for one, opening included.
        max_idle: seconds (> 0) after which an idle connection is closed, the next time the pool is used.
        max_lifetime: seconds (> 0) after which a connection is replaced; shortened at random by up to a tenth.
        configure: called with each new connection; must leave it outside any transaction.
        connection_class: the class to open connections with.
        kwargs: arguments for `connection_class.connect`, such as `autocommit`.

    Raises:
        InvalidOption: an option is out of range.
        psycopg.OperationalError: on entry, if `min_size` connections could not be opened.
    """
    return Pool(
        conninfo,
        max_size=max_size,
        min_size=min_size,
        timeout=timeout,
        max_idle=max_idle,
        max_lifetime=max_lifetime,
        configure=configure,
        connection_class=connection_class,
        kwargs=kwargs,
    )
