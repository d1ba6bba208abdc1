"""A connection of the engine: opened when needed, replaced when lost.

Owns the settings of the engine's sessions and the only retry in the engine. A call that failed because the database was
not there may or may not have been carried out; whoever insists on one must know that sending it twice is harmless.

Cancellation: `TrioConnection` leaves the connection idle or closed; a closed one is replaced at the next call.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import psycopg
import trio
from psycopg import sql
from psycopg.rows import TupleRow

from ..errors import SchemaMissing, Unavailable, Unstorable
from .address import engine_conninfo
from .call import Call
from .connection import TrioConnection
from .execute import run

T = TypeVar("T")

logger = logging.getLogger("pgconductor.runtime")

# SQLSTATE classes after which the same call may succeed later: connection, transaction rollback, resources, operator
# intervention, system error; a standby (read-only, in recovery); a time limit of transactions; object_in_use,
# lock_not_available; a stale plan.
_TRANSIENT_CLASSES = ("08", "40", "53", "57", "58")
_TRANSIENT_STATES = ("25006", "25P03", "25P04", "55000", "55006", "55P03", "0A000", "26000")
# Of these, what says nothing against the session: others were in the way.
_OF_OTHERS = ("40001", "40P01", "54000", "55P03")
# Data exception, integrity constraint violation, program limit exceeded: this value will never be stored.
_DATA_CLASSES = ("22", "23", "54")

# Brakes on our own sessions, whatever the administrator's defaults are. No statement of the engine waits long by
# intention.
_SETTINGS = {
    "default_transaction_isolation": "read committed",
    "statement_timeout": "30s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "60s",
    "idle_session_timeout": "0",
}
_APPLY_SETTINGS = (
    "select "
    + ", ".join(f"pg_catalog.set_config('{name}', '{value}', false)" for name, value in _SETTINGS.items())
    # From PostgreSQL 17 on.
    + ", (select pg_catalog.set_config(name, '0', false) from pg_catalog.pg_settings"
    + " where name = 'transaction_timeout')"
).encode()


@dataclass(frozen=True, slots=True)
class Target:
    """Where the engine's connections go. `prepare_threshold` None: through a pooler, nothing is prepared."""

    conninfo: str
    listen_conninfo: str
    prepare_threshold: int | None


def _is_transient(error: psycopg.Error) -> bool:
    """Whether the same call may succeed later, on a new connection if need be."""
    state = error.sqlstate
    if state == "54000" and error.diag.source_function in ("PreCommit_Notify", "asyncQueueAddEntries"):
        return True  # the notification queue is full: nothing of the statement counts, and nothing is wrong with it
    if state == "XX000" and (error.diag.message_primary or "").startswith("cache lookup failed"):
        return True  # what the statement was planned with was replaced while it waited
    if state is None:  # raised by the client: the connection broke, or could not be made
        return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
    return state.startswith(_TRANSIENT_CLASSES) or state in _TRANSIENT_STATES


def backoff(failures: int, rng: random.Random, *, initial: float = 0.05, maximum: float = 5.0) -> float:
    """Seconds to wait after `failures` failures in a row: soon after the first, for a connection that was lost, and
    then quickly seldom. Full jitter, so that a fleet does not return at once.
    """
    return rng.uniform(0.0, min(maximum, initial * math.pow(2.0, min(2 * failures - 1, 20))))


class OutageLog:
    """At most one line per second about the same trouble, however many tasks meet it."""

    def __init__(self) -> None:
        self._next = -math.inf

    def warn(self, message: str, *args: object) -> None:
        now = trio.current_time()
        if now >= self._next:
            self._next = now + 1.0
            logger.warning(message, *args)


async def _open_session(conninfo: str, role: str, prepare_threshold: int | None) -> TrioConnection[TupleRow]:
    """Connect with the engine's settings; `role` shows in pg_stat_activity. Raises what connecting raises."""
    conn = await TrioConnection.connect(
        engine_conninfo(conninfo, role), autocommit=True, prepare_threshold=prepare_threshold
    )
    try:
        if prepare_threshold is not None:  # behind a pooler they would stay with a server session that others use next
            await conn.execute(_APPLY_SETTINGS)
    except BaseException:
        conn.drop()
        raise
    return conn


class Link:
    """A connection that comes back. Of two tasks that use it at once the second waits for the first one's reply."""

    def __init__(
        self, target: Target, role: str, outages: OutageLog, rng: random.Random, *, listens: bool = False
    ) -> None:
        self._conninfo = target.listen_conninfo if listens else target.conninfo
        self._prepare_threshold = 5 if listens else target.prepare_threshold
        self._role = role
        self._outages = outages
        self._rng = rng
        self._conn: TrioConnection[TupleRow] | None = None
        self._connecting = trio.Lock()

    async def attempt(self, call: Call[T]) -> T:
        """Execute once. Raises `Unavailable` if the database was not there: it may have been carried out or not.

        Raises `Unstorable` if a value cannot be stored; what else goes wrong is an error of ours and passes as it is.
        """
        conn: TrioConnection[TupleRow] | None = None
        try:
            conn = await self._open()
            return await run(conn, call)
        except psycopg.Error as error:
            self._explain(error, conn)

    async def listen(self, channels: Iterable[str]) -> None:
        """Listen to more channels; for a link made with `listens`. Raises `Unavailable`."""
        conn: TrioConnection[TupleRow] | None = None
        try:
            conn = await self._open()
            for channel in channels:
                await conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        except psycopg.Error as error:
            self._explain(error, conn)

    async def receive(self) -> set[str]:
        """Wait until somebody notified; return the channels. Cancelling it loses nothing. Raises `Unavailable`."""
        conn = self._conn
        try:
            # Not reopened here: a new connection would listen to nothing.
            if conn is None:
                raise psycopg.OperationalError("the connection is closed")
            return {notify.channel for notify in await conn.receive_notifies()}
        except psycopg.Error as error:
            self._explain(error, conn)

    async def _open(self) -> TrioConnection[TupleRow]:
        conn = self._conn
        if conn is None or conn.closed:
            async with self._connecting:
                conn = self._conn
                if conn is None or conn.closed:
                    conn = self._conn = await _open_session(self._conninfo, self._role, self._prepare_threshold)
        return conn

    def _explain(self, error: psycopg.Error, conn: TrioConnection[TupleRow] | None) -> NoReturn:
        """Raise ours for one of the driver's. A connection that it may have broken is dropped, and no other: tasks
        share a link, and one may hear late of what another has replaced.
        """
        if _is_transient(error):
            if error.sqlstate not in _OF_OTHERS:
                if conn is not None:
                    conn.drop()
                if conn is self._conn:
                    self._conn = None
            raise Unavailable(f"{self._role}: {_first_line(error)}") from error
        if (error.sqlstate or "").startswith(_DATA_CLASSES):
            # The driver's text may quote the value; its class says what is wrong.
            raise Unstorable(f"{type(error).__name__}, SQLSTATE {error.sqlstate}") from error
        raise error

    async def insist(self, call: Call[T]) -> T:
        """Execute until the database has answered. Only for calls that may be carried out twice."""
        failures = 0
        while True:
            try:
                return await self.attempt(call)
            except Unavailable as error:
                failures += 1
                self._outages.warn("%s; trying again", error)
            except SchemaMissing as error:
                # A server that is being restored or migrated: not the caller's fault, and not for ever.
                failures += 1
                self._outages.warn("%s", error)
            await trio.sleep(backoff(failures, self._rng))

    def drop(self) -> None:
        """Close at once; the next call connects anew."""
        if self._conn is not None:
            self._conn.drop()
            self._conn = None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


@asynccontextmanager
async def open_link(
    target: Target, role: str, outages: OutageLog, rng: random.Random, *, listens: bool = False
) -> AsyncIterator[Link]:
    """A link that is closed at the end of the block, in a cancelled scope too."""
    link = Link(target, role, outages, rng, listens=listens)
    try:
        yield link
    finally:
        link.drop()
