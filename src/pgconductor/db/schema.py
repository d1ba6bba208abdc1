"""The schema in the database: installing it, bringing it up to date, and saying whether it fits this program.

Owns two tables, `_private_migrations` and `_private_schema`, and one advisory lock key per schema. All other objects
come from `sql/`: migrations run once, in order; function files hold present bodies and are put in again as a whole. It
must not know what a migration contains.

Always true: a migration's row and its effects commit together, the last one together with the functions, so whoever
sees version N sees the functions of N (a `--! no-transaction` migration is the exception: its statements must bear
being repeated, its row comes after them). Rivals poll a try-lock between transactions, so no waiter holds a snapshot
that a concurrent index build would wait for. A program never touches a schema that is newer than itself.

The functions may be put in by any program whose newest migration is the schema's. So a release that changes functions
brings a migration too, be it an empty one: else two releases in one rolling deploy would undo each other.

The logic is a generator of `Call`s; `migrate` and `migrate_sync` only execute them. Cancelling `migrate` closes the
connection, upon which the server rolls back and frees the lock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

from ..errors import Incompatible, Misuse, PgconductorError, Refused, SchemaMissing, SchemaTooNew, Unavailable
from .call import Call, Row, ignore
from .execute import run, run_sync
from .sql_files import (
    FunctionFile,
    Migration,
    SqlSource,
    latest_version,
    load_functions,
    load_migrations,
    load_source,
    render,
    script,
    split_statements,
    validate_schema_name,
)

__all__ = [
    "AppliedMigration",
    "FunctionFile",
    "Installed",
    "Migration",
    "MigrationReport",
    "SchemaVersion",
    "SqlSource",
    "Step",
    "check",
    "check_gen",
    "check_sync",
    "latest_version",
    "load_functions",
    "load_migrations",
    "load_source",
    "lock_key",
    "migrate",
    "migrate_gen",
    "migrate_sync",
    "next_step",
    "validate_schema_name",
]

T = TypeVar("T")
Calls: TypeAlias = Generator[Call[Any], Any, T]  # yields calls, is sent their replies, returns a T

MINIMUM_SERVER = 150000  # server_version_num: PostgreSQL 15
NAP = 0.1  # seconds between two looks at the lock
LOCK_TIMEOUT = 10.0  # seconds a migration may wait for a table lock; longer would hold up the traffic queued behind it


# --- what the database holds --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    """One row of `_private_migrations`."""

    number: int
    name: str
    is_breaking: bool


@dataclass(frozen=True, slots=True)
class Installed:
    """What the two tables say; `functions_version` is the newest migration known to the program that put them in."""

    migrations: tuple[AppliedMigration, ...] = ()
    functions_hash: str | None = None
    functions_version: int = 0

    @property
    def version(self) -> int:
        return self.migrations[-1].number if self.migrations else 0


@dataclass(frozen=True, slots=True)
class _Server:
    version_number: int
    version_text: str
    is_standby: bool
    role: str
    database: str
    has_schema: bool
    has_tables: bool


def _read_server(schema: str) -> Call[_Server]:
    return Call(
        b"""
        select pg_catalog.current_setting('server_version_num')::int4, pg_catalog.current_setting('server_version'),
               pg_catalog.pg_is_in_recovery(), current_user::text, pg_catalog.current_database()::text,
               exists (select from pg_catalog.pg_namespace n where n.nspname = %s),
               exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                       where n.nspname = %s and c.relname = '_private_schema' and c.relkind = 'r')
        """,
        (schema, schema),
        lambda rows: _Server(*rows[0]),
    )


def _read_installed(schema: str) -> Call[Installed]:
    def decode(rows: list[Row]) -> Installed:
        applied = tuple(AppliedMigration(no, name, breaking) for no, name, breaking, *_ in rows if no is not None)
        return Installed(applied, rows[0][3], rows[0][4]) if rows else Installed()

    return Call(
        render(
            "select m.no, m.name, m.breaking, s.functions_hash, s.functions_version"
            " from @schema@._private_schema s left join @schema@._private_migrations m on true order by m.no",
            schema,
        ).encode(),
        (),
        decode,
    )


_CREATE_SCHEMA = "create schema @schema@"

_CREATE_TABLES = """
create table @schema@._private_migrations (
    no int4 primary key,
    name text not null,
    breaking bool not null,
    applied_at timestamptz not null default now()
);
create table @schema@._private_schema (
    only_row bool primary key default true check (only_row),
    functions_hash text,
    functions_version int4 not null default 0
);
insert into @schema@._private_schema default values;
comment on table @schema@._private_migrations is 'pgconductor: the migrations this schema has had';
comment on table @schema@._private_schema is 'pgconductor: which set of function bodies this schema holds';
"""


def _record_migration(schema: str, migration: Migration) -> Call[None]:
    query = render("insert into @schema@._private_migrations (no, name, breaking) values (%s, %s, %s)", schema)
    return Call(query.encode(), (migration.number, migration.name, migration.is_breaking), ignore)


def _record_functions(schema: str, source: SqlSource) -> Call[None]:
    query = render("update @schema@._private_schema set functions_hash = %s, functions_version = %s", schema)
    return Call(query.encode(), (source.functions_hash, source.version), ignore)


# --- deciding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What the next transaction does: one migration, all functions, or both."""

    migration: Migration | None
    replaces_functions: bool


def next_step(schema: str, installed: Installed, source: SqlSource) -> Step | None:
    """What is to be done next, None if the schema is as new as `source` or newer.

    Cases: newer and breaking: refused. Newer and harmless: nothing. Older: the next migration, the last together with
    the functions. Same: the functions, if they differ.
    """
    _refuse_unknown(schema, installed, source)
    if installed.version > source.version:
        return None
    if installed.version < source.version:
        migration = source.migrations[installed.version]
        is_last = migration.number == source.version
        return Step(migration, replaces_functions=is_last and migration.is_transactional)
    if installed.functions_hash != source.functions_hash or installed.functions_version < source.version:
        return Step(None, replaces_functions=True)
    return None


def _refuse_unknown(schema: str, installed: Installed, source: SqlSource) -> None:
    breaking = [applied for applied in installed.migrations if applied.number > source.version and applied.is_breaking]
    if breaking:
        raise SchemaTooNew(
            f"schema {schema!r} has the breaking migration {breaking[0].name}, and this program knows only migrations"
            f" up to {source.version}: upgrade this program"
        )
    numbers = {applied.number for applied in installed.migrations}
    if missing := set(range(1, installed.version + 1)) - numbers:
        raise Incompatible(
            f"schema {schema!r} has migration {installed.version} but not {min(missing)}: it was made by a program of"
            " another line of development; restore it, or choose another schema"
        )


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """The newest migration of the schema and of this program, and whether the function bodies are this program's."""

    version: int
    program_version: int
    has_own_functions: bool


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What one `migrate` did: the migrations it applied, whether it replaced the functions, and the version now."""

    applied: tuple[int, ...]
    functions_replaced: bool
    version: int


# --- the steps, as calls ------------------------------------------------------------------------------------------


def _ask_gen(call: Call[T]) -> Calls[T]:
    reply: T = yield call
    return reply


def _inspect_gen(schema: str) -> Calls[tuple[_Server, Installed]]:
    server = yield from _ask_gen(_read_server(schema))
    if server.version_number < MINIMUM_SERVER:
        raise Incompatible(
            f"the server is PostgreSQL {server.version_text}; pgconductor needs {MINIMUM_SERVER // 10000} or newer:"
            " upgrade the server"
        )
    if not server.has_tables:
        return server, Installed()
    return server, (yield from _ask_gen(_read_installed(schema)))


def check_gen(schema: str, source: SqlSource) -> Calls[SchemaVersion]:
    """The calls of `check`."""
    with _explained(schema, "checking", lambda: "this connection's role"):
        server, installed = yield from _inspect_gen(schema)
        remedy = "run `pgconductor migrate`"
        if not installed.migrations:
            raise SchemaMissing(f"schema {schema!r} is not installed in database {server.database!r}: {remedy}")
        _refuse_unknown(schema, installed, source)
        if installed.version < source.version:
            raise SchemaMissing(
                f"schema {schema!r} in database {server.database!r} has migration {installed.version}, and this program"
                f" needs {source.version}: {remedy}"
            )
        if installed.functions_version < source.version:
            raise SchemaMissing(
                f"schema {schema!r} in database {server.database!r} has not got the functions of migration"
                f" {source.version} yet: {remedy}"
            )
        return SchemaVersion(installed.version, source.version, installed.functions_hash == source.functions_hash)


def migrate_gen(schema: str, source: SqlSource, lock_wait: float) -> Calls[MigrationReport]:
    """The calls of `migrate`, for a connection in autocommit. An error of a call is to be thrown in."""
    role = "this connection's role"
    applied: list[int] = []
    functions_replaced = False
    looks_left = max(1, round(lock_wait / NAP))
    with _explained(schema, "migrating", lambda: role):
        while True:
            server, installed = yield from _inspect_gen(schema)
            role = f"role {server.role!r}"
            if next_step(schema, installed, source) is None:
                return MigrationReport(tuple(applied), functions_replaced, installed.version)
            if server.is_standby:
                raise Unavailable(
                    f"the server is a hot standby, where schema {schema!r} cannot be migrated: connect to the primary"
                    " (for several hosts, target_session_attrs=read-write)"
                )
            yield from _ask_gen(_begin(server.version_number))
            if not (yield from _ask_gen(_try_lock(schema))):
                yield from _ask_gen(_ROLLBACK)
                looks_left -= 1
                if not looks_left:
                    raise Unavailable((yield from _describe_rival_gen(schema, lock_wait)))
                yield from _ask_gen(_NAP)
                continue
            # Whoever held the lock may have done it all: look again, in a statement (so a snapshot) after the lock.
            server, installed = yield from _inspect_gen(schema)
            step = next_step(schema, installed, source)
            if step is None:
                yield from _ask_gen(_ROLLBACK)
                continue
            if not server.has_schema:
                yield from _ask_gen(script(_CREATE_SCHEMA, schema))
            if not server.has_tables:
                yield from _ask_gen(script(_CREATE_TABLES, schema))
            if step.migration is not None and not step.migration.is_transactional:
                yield from _migrate_without_transaction_gen(schema, step.migration, server.version_number)
            else:
                if step.migration is not None:
                    yield from _ask_gen(_record_migration(schema, step.migration))
                    yield from _apply_gen(step.migration.name, step.migration.text, schema)
                if step.replaces_functions:
                    for file in source.functions:
                        yield from _apply_gen(file.name, file.text, schema)
                    yield from _ask_gen(_record_functions(schema, source))
                yield from _ask_gen(_COMMIT)
            if step.migration is not None:
                applied.append(step.migration.number)
            functions_replaced = functions_replaced or step.replaces_functions


def _migrate_without_transaction_gen(schema: str, migration: Migration, server_version: int) -> Calls[None]:
    """Run the statements one by one, then record them; entered in a transaction that holds the lock.

    The session-level twin of the lock takes over (locks of one session do not conflict), and the session's settings are
    put back. A cancellation closes the connection, which takes lock and settings with it.
    """
    key = lock_key(schema)
    yield from _ask_gen(Call(b"select pg_catalog.pg_advisory_lock(%s::int8)", (key,), ignore))
    yield from _ask_gen(_COMMIT)
    names = [*_time_limits(server_version), "search_path"]
    before = yield from _ask_gen(_read_settings(names))
    try:
        yield from _ask_gen(_set_settings(names, [*("0" for _ in names[:-1]), _SEARCH_PATH]))
        for number, statement in enumerate(split_statements(migration.text), start=1):
            yield from _apply_gen(f"{migration.name}, statement {number}", statement, schema)
        yield from _ask_gen(_record_migration(schema, migration))
    except (psycopg.Error, PgconductorError):
        yield from _ask_gen(_set_settings(names, before))
        yield from _ask_gen(Call(b"select pg_catalog.pg_advisory_unlock(%s::int8)", (key,), ignore))
        raise
    yield from _ask_gen(_set_settings(names, before))
    if not (yield from _ask_gen(Call(b"select pg_catalog.pg_advisory_unlock(%s::int8)", (key,), _decode_flag))):
        raise Unavailable(
            f"the connection changed its server session during migration {migration.name}, which runs outside a"
            " transaction: migrate over a direct connection, not through a transaction pooler"
        )


def _apply_gen(name: str, text: str, schema: str) -> Calls[None]:
    try:
        yield from _ask_gen(script(text, schema))
    except (psycopg.Error, PgconductorError) as error:
        error.add_note(f"while applying {name} to schema {schema!r}")
        raise


def _time_limits(server_version: int) -> list[str]:
    """The server's time limits, which are meant for traffic and must not end a migration in the middle."""
    newer = ["transaction_timeout"] if server_version >= 170000 else []
    return ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", *newer]


_COMMIT: Call[None] = Call(b"commit", (), ignore)
_ROLLBACK: Call[None] = Call(b"rollback", (), ignore)
# At the server, so that these calls need no event loop of a particular kind.
_NAP: Call[None] = Call(
    f"begin; set local statement_timeout = 0; select pg_catalog.pg_sleep({NAP}); commit".encode(), (), ignore
)
# Nothing may resolve to an object in somebody else's schema, nor be created outside ours unnoticed.
_SEARCH_PATH = "pg_catalog, pg_temp"


def _begin(server_version: int) -> Call[None]:
    statements = [
        "begin isolation level read committed",
        *(f"set local {name} = 0" for name in _time_limits(server_version)),
        f"set local lock_timeout = {round(LOCK_TIMEOUT * 1000)}",
        f"set local search_path = {_SEARCH_PATH}",
        "set local check_function_bodies = off",  # so that the order of the function files does not matter
        "set local standard_conforming_strings = on",
        "set local client_encoding = 'UTF8'",  # that of the files
        "set local client_min_messages = warning",
    ]
    return Call("; ".join(statements).encode(), (), ignore)


def _read_settings(names: Sequence[str]) -> Call[list[str]]:
    return Call(
        b"select pg_catalog.current_setting(n)"
        b" from pg_catalog.unnest(%s::text[]) with ordinality s (n, position) order by position",
        (list(names),),
        lambda rows: [str(row[0]) for row in rows],
    )


def _set_settings(names: Sequence[str], values: Sequence[str]) -> Call[None]:
    return Call(
        b"select pg_catalog.set_config(n, v, false)"
        b" from rows from (pg_catalog.unnest(%s::text[]), pg_catalog.unnest(%s::text[])) s (n, v)",
        (list(names), list(values)),
        ignore,
    )


def lock_key(schema: str) -> int:
    """The advisory lock key under which `schema` is migrated: 64 bits, so as not to meet an application's own."""
    digest = hashlib.blake2b(f"pgconductor.migrate\0{schema}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _try_lock(schema: str) -> Call[bool]:
    return Call(b"select pg_catalog.pg_try_advisory_xact_lock(%s::int8)", (lock_key(schema),), _decode_flag)


def _decode_flag(rows: list[Row]) -> bool:
    return bool(rows[0][0])


def _describe_rival_gen(schema: str, lock_wait: float) -> Calls[str]:
    rivals = yield from _ask_gen(
        Call(
            b"""
            select l.pid, coalesce(nullif(a.application_name, ''), 'unnamed')
            from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a on a.pid = l.pid
            where l.locktype = 'advisory' and l.granted and l.objsubid = 1
              and l.classid::int8 = (%s::int8 >> 32) & 4294967295 and l.objid::int8 = %s::int8 & 4294967295
              and l.database = (select d.oid from pg_catalog.pg_database d
                                where d.datname = pg_catalog.current_database())
            """,
            (lock_key(schema), lock_key(schema)),
            lambda rows: [f"server process {pid} ({name})" for pid, name in rows],
        )
    )
    who = " and ".join(rivals) or "another session"
    return (
        f"schema {schema!r} has been locked for {lock_wait:g} s by another migration, in {who}:"
        " wait for it and repeat, or end it with pg_terminate_backend"
    )


@contextmanager
def _explained(schema: str, doing: str, role: Callable[[], str]) -> Generator[None, None, None]:
    """Turn the driver's errors that are to be expected here into ours; a mistake in the SQL stays what it is."""
    try:
        yield
    except (psycopg.Error, SchemaMissing) as error:
        # Beneath, `run` takes a mistake in our own files for a schema that is missing.
        cause = error.__cause__ if isinstance(error, SchemaMissing) else error
        if not isinstance(cause, psycopg.Error):
            raise
        ours = _explain(cause, schema, doing, role())
        if cause is not error or ours is not None:
            for note in getattr(error, "__notes__", ()):
                (ours or cause).add_note(note)
        if ours is not None:
            raise ours from cause
        raise cause from cause.__cause__


def _explain(error: psycopg.Error, schema: str, doing: str, role: str) -> PgconductorError | None:
    reason = error.diag.message_primary or str(error)
    match error:
        case psycopg.errors.InsufficientPrivilege():
            return Refused(
                f"{reason}: {role} may not do this to schema {schema!r}; run `pgconductor migrate` as the owner of"
                " the schema (to make a new one: a role that has CREATE on the database)"
            )
        case psycopg.errors.ReadOnlySqlTransaction():
            return Unavailable(
                f"{reason}: schema {schema!r} cannot be migrated while the session is read-only; connect to the"
                " primary, or see default_transaction_read_only"
            )
        case psycopg.errors.LockNotAvailable():
            return Unavailable(
                f"{reason}: another session has held a table of schema {schema!r} for {LOCK_TIMEOUT:g} s; nothing was"
                " changed by this step, repeat when it has ended"
            )
        case psycopg.errors.DuplicateTable() | psycopg.errors.DuplicateObject() | psycopg.errors.DuplicateFunction():
            return Incompatible(
                f"{reason}: schema {schema!r} holds objects that no migration of this program made; choose another"
                " schema, or drop what stands in the way"
            )
        case psycopg.OperationalError():
            return Unavailable(f"{reason}: {doing} schema {schema!r} was interrupted; what is done is kept, repeat it")
        case _:
            return None


# --- executing them -----------------------------------------------------------------------------------------------


def _refuse_busy(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    if conn.closed:
        return  # the first call says it better
    if (
        not conn.autocommit
        or conn.info.transaction_status != TransactionStatus.IDLE
        or conn.info.pipeline_status != PipelineStatus.OFF
    ):
        raise Misuse(
            "migrate begins and commits by itself: give it a connection in autocommit, outside a transaction and"
            " outside a pipeline"
        )


async def _execute(conn: psycopg.AsyncConnection[Any], steps: Calls[T]) -> T:
    try:
        call = next(steps)
        while True:
            try:
                reply = await run(conn, call)
            except (psycopg.Error, PgconductorError) as error:
                call = steps.throw(error)
            else:
                call = steps.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


def _execute_sync(conn: psycopg.Connection[Any], steps: Calls[T]) -> T:
    try:
        call = next(steps)
        while True:
            try:
                reply = run_sync(conn, call)
            except (psycopg.Error, PgconductorError) as error:
                call = steps.throw(error)
            else:
                call = steps.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result


async def migrate(
    conn: psycopg.AsyncConnection[Any],
    schema: str = "pgconductor",
    *,
    source: SqlSource | None = None,
    lock_wait: float = 60.0,
) -> MigrationReport:
    """Install `schema`, or bring it up to this program's version; does nothing if it is as new or newer.

    Any number of programs may do this at once: one works, the others wait and then find nothing left to do.

    Args:
        conn: an async connection in autocommit, outside a transaction; it is left so. A cancellation closes it.
        schema: any name PostgreSQL can store, at most 63 bytes of UTF-8.
        source: other SQL than this installation's, for tests.
        lock_wait: seconds to wait, roughly, while another session migrates this schema. Not a limit on the work itself.

    Returns: what this call did; `applied` is empty if others did it.

    Raises:
        InvalidOption: the name cannot be a schema's.
        Misuse: `conn` is not in autocommit, or is inside a transaction or pipeline.
        Unavailable: another migration lasts too long, the server is a standby or read-only, a table stayed locked, or
            the connection broke. What is done is kept; repeat the call.
        Refused: the role lacks a privilege.
        Incompatible: the server is older than PostgreSQL 15, or the schema is not of this program's line.
        SchemaTooNew: a newer program made a breaking change.
    """
    steps = migrate_gen(validate_schema_name(schema), source or load_source(), lock_wait)
    _refuse_busy(conn)
    try:
        return await _execute(conn, steps)
    except (psycopg.Error, PgconductorError):
        if not conn.closed:
            await conn.rollback()
        raise
    except BaseException:
        await conn.close()
        raise


def migrate_sync(
    conn: psycopg.Connection[Any],
    schema: str = "pgconductor",
    *,
    source: SqlSource | None = None,
    lock_wait: float = 60.0,
) -> MigrationReport:
    """`migrate` for a sync connection; blocks the thread. A `KeyboardInterrupt` closes the connection."""
    steps = migrate_gen(validate_schema_name(schema), source or load_source(), lock_wait)
    _refuse_busy(conn)
    try:
        return _execute_sync(conn, steps)
    except (psycopg.Error, PgconductorError):
        if not conn.closed:
            conn.rollback()
        raise
    except BaseException:
        conn.close()
        raise


async def check(
    conn: psycopg.AsyncConnection[Any], schema: str = "pgconductor", *, source: SqlSource | None = None
) -> SchemaVersion:
    """Say whether `schema` fits this program, in two reads; changes nothing, and works on a standby.

    Outside autocommit it begins a transaction, as any query does.

    Returns: the versions; a schema that is newer without being breaking passes.

    Raises:
        InvalidOption: the name cannot be a schema's.
        SchemaMissing: it is not there, or older than this program needs.
        SchemaTooNew: it has a breaking migration this program does not know.
        Incompatible: the server is older than PostgreSQL 15, or the schema is of another line of development.
        Refused: the role may not read the schema's version.
        Unavailable: the connection broke.
    """
    return await _execute(conn, check_gen(validate_schema_name(schema), source or load_source()))


def check_sync(
    conn: psycopg.Connection[Any], schema: str = "pgconductor", *, source: SqlSource | None = None
) -> SchemaVersion:
    """`check` for a sync connection."""
    return _execute_sync(conn, check_gen(validate_schema_name(schema), source or load_source()))
