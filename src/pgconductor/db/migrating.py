"""Checking and migrating, as generators of calls: what is asked of the database, in which order, under which locks.

Owns one advisory lock key per schema. All objects but the two tables of `installed` come from `sql/`: migrations run
once, in order; function files hold present bodies and are put in again as a whole.

Always true: a migration's row and its effects commit together, the last one together with the functions, so whoever
sees version N sees the functions of N (a `--! no-transaction` migration is the exception: its statements must bear
being repeated, its row comes after them). Rivals poll a try-lock between transactions, so no waiter holds a snapshot
that a concurrent index build would wait for. A program never touches a schema that is newer than itself. A breaking
migration is applied while no older orchestrator lives and none can register (`breaking`).

The functions may be put in by any program whose newest migration is the schema's. So a release that changes functions
brings a migration too, be it an empty one: else two releases in one rolling deploy would undo each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import psycopg

from ..errors import Incompatible, PgconductorError, Refused, SchemaMissing, Unavailable
from .breaking import NAP, evict_gen, gate_key, holds_gate, open_gate, shut_gate
from .call import Call, Row, ignore
from .installed import (
    CREATE_SCHEMA,
    CREATE_TABLES,
    Calls,
    MigrationReport,
    SchemaVersion,
    Step,
    ask_gen,
    inspect_gen,
    next_step,
    record_functions,
    record_migration,
    refuse_unknown,
)
from .sql_files import Migration, SqlSource, script, split_statements

# Seconds a migration may wait for a table lock at a time: the traffic that has queued up behind it waits as long. Then
# it lets the traffic through for as long again. Much less than a lease, so that no heartbeat is missed for it.
LOCK_TIMEOUT = 2.0


def check_gen(schema: str, source: SqlSource) -> Calls[SchemaVersion]:
    """The calls of `check`."""
    with _explained(schema, "checking", lambda: "this connection's role"):
        server, installed = yield from inspect_gen(schema)
        remedy = "run `pgconductor migrate`"
        if not installed.migrations:
            raise SchemaMissing(f"schema {schema!r} is not installed in database {server.database!r}: {remedy}")
        refuse_unknown(schema, installed, source)
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


def migrate_gen(schema: str, source: SqlSource, lock_wait: float, stop_wait: float) -> Calls[MigrationReport]:
    """The calls of `migrate`, for a connection in autocommit. An error of a call is to be thrown in."""
    role = "this connection's role"
    applied: list[int] = []
    functions_replaced = False
    looks_left = _looks(lock_wait)
    # Whoever has shut the gate may wait for others before it migrates.
    gate_looks_left = _looks(lock_wait + stop_wait)
    tries_left = max(1, round(lock_wait / (2 * LOCK_TIMEOUT)))
    is_shut = False
    with _explained(schema, "migrating", lambda: role):
        try:
            while True:
                server, installed = yield from inspect_gen(schema)
                role = f"role {server.role!r}"
                step = next_step(schema, installed, source)
                if is_shut and not _is_breaking(step):
                    yield from ask_gen(open_gate(schema))
                    is_shut = False
                if step is None:
                    return MigrationReport(tuple(applied), functions_replaced, installed.version)
                if server.is_standby:
                    raise Unavailable(
                        f"the server is a hot standby, where schema {schema!r} cannot be migrated: connect to the"
                        " primary (for several hosts, target_session_attrs=read-write)"
                    )
                if step.migration is not None and step.migration.is_breaking:
                    if not is_shut:
                        is_shut = yield from ask_gen(shut_gate(schema))
                        if not is_shut:
                            gate_looks_left -= 1
                            if not gate_looks_left:
                                key = yield from ask_gen(gate_key(schema))
                                raise Unavailable((yield from _describe_rival_gen(schema, key, lock_wait + stop_wait)))
                            yield from ask_gen(_NAP)
                        continue  # whoever had shut it before may have done it all
                    yield from evict_gen(schema, step.migration, stop_wait, _NAP)
                yield from ask_gen(_begin(server.version_number))
                if not (yield from ask_gen(_try_lock(schema))):
                    yield from ask_gen(_ROLLBACK)
                    looks_left -= 1
                    if not looks_left:
                        raise Unavailable((yield from _describe_rival_gen(schema, lock_key(schema), lock_wait)))
                    yield from ask_gen(_NAP)
                    continue
                # Whoever held the lock may have done it all: look again, in a statement (so a snapshot) after the lock.
                server, installed = yield from inspect_gen(schema)
                step = next_step(schema, installed, source)
                if step is None or (_is_breaking(step) and not is_shut):
                    yield from ask_gen(_ROLLBACK)
                    continue
                if is_shut and not (yield from ask_gen(holds_gate(schema))):
                    raise Unavailable(
                        f"the connection changed its server session before a breaking migration of schema {schema!r}:"
                        " migrate over a direct connection, not through a transaction pooler"
                    )
                if not server.has_schema:
                    yield from ask_gen(script(CREATE_SCHEMA, schema))
                if not server.has_tables:
                    yield from ask_gen(script(CREATE_TABLES, schema))
                try:
                    yield from _take_gen(schema, step, source, server.version_number)
                except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                    tries_left -= 1
                    if not tries_left:
                        raise
                    yield from ask_gen(_ROLLBACK)
                    yield from ask_gen(_nap(LOCK_TIMEOUT))
                    continue
                if step.migration is not None:
                    applied.append(step.migration.number)
                functions_replaced = functions_replaced or step.replaces_functions
        except (psycopg.Error, PgconductorError):
            if is_shut:
                yield from _reopen_gen(schema)
            raise


def _looks(seconds: float) -> int:
    return max(1, round(seconds / NAP))


def _is_breaking(step: Step | None) -> bool:
    return step is not None and step.migration is not None and step.migration.is_breaking


def _reopen_gen(schema: str) -> Calls[None]:
    """Let others through again after a failure; a connection that broke has done so."""
    try:
        yield from ask_gen(_ROLLBACK)
        yield from ask_gen(open_gate(schema))
    except (psycopg.Error, PgconductorError):
        return


def _take_gen(schema: str, step: Step, source: SqlSource, server_version: int) -> Calls[None]:
    """One step and the end of its transaction; entered in a transaction that holds the lock."""
    if step.migration is not None and not step.migration.is_transactional:
        yield from _migrate_without_transaction_gen(schema, step.migration, server_version)
        return
    if step.migration is not None:
        yield from ask_gen(record_migration(schema, step.migration))
        yield from _apply_gen(step.migration.name, step.migration.text, schema)
    if step.replaces_functions:
        for file in source.functions:
            yield from _apply_gen(file.name, file.text, schema)
        yield from ask_gen(record_functions(schema, source))
    yield from ask_gen(_COMMIT)


def _migrate_without_transaction_gen(schema: str, migration: Migration, server_version: int) -> Calls[None]:
    """Run the statements one by one, then record them; entered in a transaction that holds the lock.

    The session-level twin of the lock takes over (locks of one session do not conflict), and the session's settings are
    put back. A cancellation closes the connection, which takes lock and settings with it.
    """
    key = lock_key(schema)
    yield from ask_gen(Call(b"select pg_catalog.pg_advisory_lock(%s::int8)", (key,), ignore))
    yield from ask_gen(_COMMIT)
    names = [*_time_limits(server_version), "search_path"]
    before = yield from ask_gen(_read_settings(names))
    try:
        yield from ask_gen(_set_settings(names, [*("0" for _ in names[:-1]), _SEARCH_PATH]))
        for number, statement in enumerate(split_statements(migration.text), start=1):
            yield from _apply_gen(f"{migration.name}, statement {number}", statement, schema)
        yield from ask_gen(record_migration(schema, migration))
    except (psycopg.Error, PgconductorError):
        yield from ask_gen(_set_settings(names, before))
        yield from ask_gen(Call(b"select pg_catalog.pg_advisory_unlock(%s::int8)", (key,), ignore))
        raise
    yield from ask_gen(_set_settings(names, before))
    if not (yield from ask_gen(Call(b"select pg_catalog.pg_advisory_unlock(%s::int8)", (key,), _decode_flag))):
        raise Unavailable(
            f"the connection changed its server session during migration {migration.name}, which runs outside a"
            " transaction: migrate over a direct connection, not through a transaction pooler"
        )


def _apply_gen(name: str, text: str, schema: str) -> Calls[None]:
    try:
        yield from ask_gen(script(text, schema))
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
def _nap(seconds: float) -> Call[None]:
    return Call(
        f"begin; set local statement_timeout = 0; select pg_catalog.pg_sleep({seconds}); commit".encode(), (), ignore
    )


_NAP = _nap(NAP)
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


def _describe_rival_gen(schema: str, key: int, waited: float) -> Calls[str]:
    rivals = yield from ask_gen(
        Call(
            b"""
            select l.pid, coalesce(nullif(a.application_name, ''), 'unnamed')
            from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a on a.pid = l.pid
            where l.locktype = 'advisory' and l.granted and l.objsubid = 1
              and l.classid::int8 = (%s::int8 >> 32) & 4294967295 and l.objid::int8 = %s::int8 & 4294967295
              and l.database = (select d.oid from pg_catalog.pg_database d
                                where d.datname = pg_catalog.current_database())
            """,
            (key, key),
            lambda rows: [f"server process {pid} ({name})" for pid, name in rows],
        )
    )
    who = " and ".join(rivals) or "another session"
    return (
        f"schema {schema!r} has been locked for {waited:g} s by another migration, in {who}:"
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
        case psycopg.errors.LockNotAvailable() | psycopg.errors.DeadlockDetected():
            return Unavailable(
                f"{reason}: another session holds a table of schema {schema!r}, and the migration, which asked for it"
                " again and again, did not get it; nothing was changed by this step, repeat when that session has ended"
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
