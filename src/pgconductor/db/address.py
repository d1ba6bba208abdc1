"""Where the database is, and what is said when it does not answer.

Owns the choice of the connection string (`dsn=`, then the environment) and the translation of the driver's errors on
connections that are ours. Must not connect. No message holds a password: a string that cannot be parsed is never
repeated, and of one that can only host, port, database and user are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..errors import InvalidOption, NoDatabase, PgconductorError, Refused, Unavailable, Unstorable

VARIABLES: Final = ("PGCONDUCTOR_DSN", "DATABASE_URL")
EMBEDDED_DATABASE: Final = "pgconductor"

# Of every connection that waits for replies. A peer that vanished is noticed by the kernel: after so many milliseconds
# of unacknowledged data, or when it answers no probe for half a minute while we wait for it.
_PATIENCE: Final = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "10",
    "keepalives_interval": "10",
    "keepalives_count": "2",
}


class Addresses(NamedTuple):
    """The connection strings in use: for statements, and for what needs a session of its own (LISTEN, migrations)."""

    conninfo: str
    listen_conninfo: str


class Database:
    """The database of one conductor, as its parameters name it. Constructing does not read the environment."""

    def __init__(self, dsn: str | None, listen_dsn: str | None, *, embedded: bool) -> None:
        """As the parameters of `Conductor`; raises `InvalidOption`."""
        if embedded and (dsn is not None or listen_dsn is not None):
            raise InvalidOption("give dsn or embedded=True, not both")
        self._dsn = None if dsn is None else checked_dsn("dsn", dsn)
        self._listen_dsn = None if listen_dsn is None else checked_dsn("listen_dsn", listen_dsn)
        self.embedded = embedded

    @property
    def prepare_threshold(self) -> int | None:
        """For statements: None, never to prepare, if `listen_dsn` says that a transaction pooler is in between."""
        return 5 if self._listen_dsn is None else None

    def resolve(self) -> Addresses:
        """Return the addresses of a database that is not embedded; raises as `resolve_dsn`."""
        conninfo = resolve_dsn(self._dsn)
        return Addresses(conninfo, self._listen_dsn or conninfo)

    def open(self, stack: ExitStack) -> Addresses:
        """Return the addresses. An embedded server is started if need be, which blocks, and held until `stack` closes.

        Raises `NoDatabase` if none is named or the embedded one does not start.
        """
        if not self.embedded:
            return self.resolve()
        from ..embedded import embedded_server  # only for those who ask for it

        conninfo = stack.enter_context(embedded_server()).ensure_database(EMBEDDED_DATABASE)
        return Addresses(conninfo, conninfo)


def resolve_dsn(dsn: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Return `dsn`, else the first of `VARIABLES` that is set and not empty.

    Raises `NoDatabase` if none is, `InvalidOption` if the one found is not a connection string.
    """
    if dsn is not None:
        return checked_dsn("dsn", dsn)
    for name in VARIABLES:
        if value := environ.get(name):
            return checked_dsn(f"the environment variable {name}", value)
    raise NoDatabase(
        "no database is named: give Conductor(dsn=...) or --dsn, set PGCONDUCTOR_DSN or DATABASE_URL, "
        "or use Conductor(embedded=True) or --embedded"
    )


def checked_dsn(what: str, dsn: object) -> str:
    """Return `dsn` if it is a connection string; `what` names it in the `InvalidOption` raised otherwise."""
    if not isinstance(dsn, str):
        raise InvalidOption(f"{what} must be a str, not {type(dsn).__name__}")
    if not dsn.strip():
        raise InvalidOption(f"{what} is empty; name a database, for example postgresql://localhost/app")
    scheme = dsn.partition("://")[0]
    if scheme.startswith(("postgresql+", "postgres+")):
        raise InvalidOption(f"{what} begins with {scheme}://, which is SQLAlchemy's form; write postgresql://")
    try:
        conninfo_to_dict(dsn)
    except psycopg.Error:
        # From None, and without libpq's words, since they may quote any part of the string.
        raise InvalidOption(
            f"{what} is not a connection string; write postgresql://user@host:port/database or 'host=... dbname=...'"
        ) from None
    return dsn


def client_conninfo(conninfo: str) -> str:
    """Return `conninfo` with our bounds on waiting for a server that vanished, where it has none of its own."""
    return make_conninfo("", **{**_PATIENCE, **conninfo_to_dict(conninfo)})


def engine_conninfo(conninfo: str, role: str) -> str:
    """The same for a connection of the engine's own; `role` shows in pg_stat_activity."""
    name = {"application_name": f"pgconductor {role}"}
    return client_conninfo(make_conninfo("", **{**name, **conninfo_to_dict(conninfo)}))


def describe_server(conninfo: str) -> str:
    """Return host, port, database and user of `conninfo` in words."""
    params = conninfo_to_dict(conninfo)
    names = {
        "hostaddr" if params.get("hostaddr") else "host": "host",
        "port": "port",
        "dbname": "database",
        "user": "user",
    }
    said = [f"{word} {params[name]}" for name, word in names.items() if params.get(name)]
    return ", ".join(said) or "libpq's defaults"


_LOCKS = "max_locks_per_transaction"


def explain(error: psycopg.Error, conninfo: str, doing: str, *, is_lost: bool = False) -> PgconductorError | None:
    """Return our error for one of the driver's, to be raised from it, or None to let that one pass.

    `doing` completes "while ...". `is_lost`: the connection broke with the statement under way.
    """
    server = describe_server(conninfo)
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        return Unavailable(
            f"the server ({server}) is read-only while {doing}: it is a standby, or is failing over; "
            f"name the primary, or list several hosts with target_session_attrs=read-write"
        )
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return Refused(
            f"the role may not do this ({server}) while {doing}: {error.diag.message_primary}; grant it the privilege"
        )
    if isinstance(error, (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)):
        return Unstorable(
            f"the server ({server}) cannot store a value, and has stored nothing of this call, while {doing}: "
            f"{_said(error)}"
        )
    if not isinstance(error, psycopg.OperationalError):
        return None
    if is_lost:
        return Unavailable(
            f"the connection to the server ({server}) was lost while {doing}; it may have taken effect or not: "
            f"repeat it, with a dedupe_key if it must not happen twice: {_said(error)}"
        )
    if isinstance(error, psycopg.errors.OutOfMemory) and _LOCKS in (error.diag.message_hint or ""):
        return Unavailable(
            f"the server ({server}) has no room for more locks while {doing}: raise {_LOCKS}, which takes a restart; "
            f"a look at all queues locks all their partitions, and pgconductor doctor counts them"
        )
    return Unavailable(f"the server ({server}) could not serve while {doing}; try again later: {_said(error)}")


def explain_connect(error: psycopg.Error, conninfo: str) -> PgconductorError | None:
    """Return our error for one raised while connecting, or None to let that one pass."""
    if not isinstance(error, psycopg.OperationalError):
        return None
    return NoDatabase(
        f"cannot connect to the server ({describe_server(conninfo)}): {_said(error)}; start it, or name another one "
        f"with dsn=, PGCONDUCTOR_DSN or DATABASE_URL"
    )


def _said(error: psycopg.Error) -> str:
    """The error on one line, without its DETAIL, which shows values of rows, and its CONTEXT, which is our SQL."""
    return " ".join((error.diag.message_primary or str(error)).split())
