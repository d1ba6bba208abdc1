"""The connection that listens for ended executions: what it says to the server, on Trio and blocking a thread.

Somebody who waits holds flags (shared advisory locks of the session): "somebody waits", and one per bucket of ids. Who
ends executions looks at the flags and notifies the buckets among them. The protocol's other half is in
`sql/functions/06_flush.sql`; what is done with notifications is the business of `results` and `sync_client`.

Invariants: autocommit, so that it never holds up the server's queue of notifications; at rest it does not listen, so
that nobody need read. A broken connection is `Unavailable`; after any error or cancellation the owner drops it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Final, Self
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from ..errors import Unavailable
from .address import engine_conninfo
from .call import Call, ignore
from .calls import Calls
from .connection import TrioConnection
from .execute import run, run_sync
from .session import MAX_IDLE, connect, connect_sync, has_hung_up

ANYBODY: Final = -1  # the flag "somebody waits", beside those of the buckets

_PROBE_TIMEOUT = 1.0

_REST: Final[tuple[Call[None], ...]] = (
    Call(b"unlisten *", (), ignore),
    Call(b"select pg_catalog.pg_advisory_unlock_all()", (), ignore),
)


def bucket_of(execution_id: UUID) -> int:
    """Return the bucket that a flush names when it ends this execution."""
    return execution_id.bytes[-1]


def named_buckets(notifies: Iterable[psycopg.Notify], channel: str) -> set[int] | None:
    """Return the buckets that notifications name, or None if one of them is not to be understood: look at all."""
    named: set[int] = set()
    for notify in notifies:
        if notify.channel != channel:
            continue
        words = notify.payload.split()
        if not words or not all(word.isascii() and word.isdecimal() and len(word) <= 3 for word in words):
            return None
        named.update(map(int, words))
    return named


class ResultListener:
    """A listening connection of a Trio program; one task at a time uses it."""

    def __init__(self, conn: TrioConnection[TupleRow], calls: Calls, channel: str) -> None:
        self._conn = conn
        self._calls = calls
        self._channel = channel
        self._used_at = self._opened_at = time.monotonic()
        self.flags: set[int] = set()

    @property
    def backend_pid(self) -> int:
        """Process id of the server's side."""
        return self._conn.info.backend_pid

    @property
    def age(self) -> float:
        """Seconds since it was opened."""
        return time.monotonic() - self._opened_at

    @classmethod
    async def open(cls, calls: Calls, conninfo: str) -> Self:
        """Connect and listen. Raises `Unavailable`, `SchemaMissing`."""
        conn = await connect(engine_conninfo(conninfo, "results"))
        try:
            with _unavailable():
                channel = await run(conn, calls.results_channel())
                await run(conn, _listen(channel))
        except BaseException:
            conn.drop()
            raise
        return cls(conn, calls, channel)

    async def set_flags(self, wanted: set[int]) -> None:
        """Raise the flags that are wanted and not raised, lower those that are raised and not wanted."""
        with _unavailable():
            if missing := sorted(wanted - self.flags):
                await run(self._conn, self._calls.await_results(missing))
                self.flags.update(missing)
            if surplus := sorted(self.flags - wanted):
                await run(self._conn, self._calls.leave_results(surplus))
                self.flags.difference_update(surplus)

    async def receive(self) -> set[int] | None:
        """Wait for notifications; return the buckets they name, None for all. A cancellation loses nothing."""
        with _unavailable():
            return named_buckets(await self._conn.receive_notifies(), self._channel)

    async def rest(self) -> None:
        """Stop listening and lower all flags: a listener that nobody reads would hold up the server's queue."""
        with _unavailable():
            for call in _REST:
                await run(self._conn, call)
        self.flags.clear()
        self._used_at = time.monotonic()

    async def wake(self) -> bool:
        """Listen again after a rest. False: the connection is gone."""
        if self._conn.has_hung_up():
            return False
        if time.monotonic() - self._used_at > MAX_IDLE and not await self._conn.probe(_PROBE_TIMEOUT):
            return False
        with _unavailable():
            await run(self._conn, _listen(self._channel))
        return True

    def drop(self) -> None:
        """Close the connection at once; the flags go with it."""
        self._conn.drop()


class SyncResultListener:
    """A listening connection of one thread, for one execution at a time."""

    def __init__(self, conn: psycopg.Connection[TupleRow], calls: Calls, channel: str) -> None:
        self._conn = conn
        self._calls = calls
        self._channel = channel
        self._used_at = time.monotonic()
        self._bucket = ANYBODY

    @property
    def backend_pid(self) -> int:
        """Process id of the server's side."""
        return self._conn.info.backend_pid

    @classmethod
    def open(cls, calls: Calls, conninfo: str) -> Self:
        """Connect. Raises `Unavailable`, `SchemaMissing`."""
        conn = connect_sync(engine_conninfo(conninfo, "results"))
        try:
            with _unavailable():
                return cls(conn, calls, run_sync(conn, calls.results_channel()))
        except BaseException:
            conn.close()
            raise

    @property
    def is_fresh(self) -> bool:
        """Whether it can be expected to work, after a rest."""
        return time.monotonic() - self._used_at <= MAX_IDLE and not has_hung_up(self._conn)

    def start(self, bucket: int) -> None:
        """Listen, and raise the flags of `bucket`."""
        self._bucket = bucket
        with _unavailable():
            run_sync(self._conn, _listen(self._channel))
            run_sync(self._conn, self._calls.await_results([ANYBODY, bucket]))

    def receive(self, timeout: float) -> bool:
        """Wait for a notification, `timeout` seconds at most; return whether one came that may mean the bucket."""
        with _unavailable():
            named = named_buckets(self._conn.notifies(timeout=timeout, stop_after=1), self._channel)
        return named is None or self._bucket in named

    def rest(self) -> None:
        """As `ResultListener.rest`."""
        with _unavailable():
            for call in _REST:
                run_sync(self._conn, call)
        self._used_at = time.monotonic()

    def close(self) -> None:
        self._conn.close()


def _listen(channel: str) -> Call[None]:
    return Call(sql.SQL("listen {}").format(sql.Identifier(channel)).as_bytes(None), (), ignore)


@contextmanager
def _unavailable() -> Generator[None]:
    try:
        yield
    except psycopg.OperationalError as error:
        raise Unavailable(f"the connection that listens for results failed: {error}") from error
