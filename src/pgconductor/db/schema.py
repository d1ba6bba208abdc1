"""Installing a schema, bringing it up to date, and saying whether it fits this program.

The front of it all, for Trio and for plain threads. What is there and what to do next is in `installed`, how it is done
in `migrating`, how older orchestrators are made to stop before a breaking change in `breaking`; all three are
generators of `Call`s, and here they are executed.

Cancelling `migrate` closes the connection, upon which the server rolls back and frees the locks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus

from ..errors import Misuse, PgconductorError
from .execute import run, run_sync
from .installed import AppliedMigration, Calls, Installed, MigrationReport, SchemaVersion, Step, next_step
from .migrating import check_gen, lock_key, migrate_gen
from .sql_files import (
    FunctionFile,
    Migration,
    SqlSource,
    latest_version,
    load_functions,
    load_migrations,
    load_source,
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
    stop_wait: float = 300.0,
) -> MigrationReport:
    """Install `schema`, or bring it up to this program's version; does nothing if it is as new or newer.

    Any number of programs may do this at once: one works, the others wait and then find nothing left to do. Running
    orchestrators go on, unless a migration is breaking: then those of older versions are asked to stop, and waited for.

    Args:
        conn: an async connection in autocommit, outside a transaction; it is left so. A cancellation closes it.
        schema: any name PostgreSQL can store, at most 63 bytes of UTF-8.
        source: other SQL than this installation's, for tests.
        lock_wait: seconds to wait, roughly, while another session migrates this schema, and again while one holds a
            table that a migration changes. Not a limit on the work itself.
        stop_wait: seconds to wait, roughly, before a breaking migration for orchestrators of older versions to end; one
            that is dead is waited for until its lease has passed.

    Returns: what this call did; `applied` is empty if others did it.

    Raises:
        InvalidOption: the name cannot be a schema's.
        Misuse: `conn` is not in autocommit, or is inside a transaction or pipeline.
        Unavailable: another migration lasts too long, an older orchestrator does not end, the server is a standby or
            read-only, a table stayed locked, or the connection broke. What is done is kept; repeat the call.
        Refused: the role lacks a privilege.
        Incompatible: the server is older than PostgreSQL 15, or the schema is not of this program's line.
        SchemaTooNew: a newer program made a breaking change.
    """
    steps = migrate_gen(validate_schema_name(schema), source or load_source(), lock_wait, stop_wait)
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
    stop_wait: float = 300.0,
) -> MigrationReport:
    """`migrate` for a sync connection; blocks the thread. A `KeyboardInterrupt` closes the connection."""
    steps = migrate_gen(validate_schema_name(schema), source or load_source(), lock_wait, stop_wait)
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
