"""The only executors of a `Call`, and the wall where the driver's errors become ours.

Neither commits, rolls back nor changes a setting of the connection, so both are safe inside a user's
transaction. The cursor is ours, whatever row or cursor factory the connection has.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.rows import tuple_row

from ..errors import LeaseLost, Misuse, Refused, SchemaMissing, SchemaTooNew
from . import arrays
from .call import Call

T = TypeVar("T")

# SQLSTATEs our functions raise; class "PC" is in the range the standard leaves to applications.
_OURS: dict[str, type[Misuse | Refused]] = {"PC001": Misuse, "PC002": Refused, "PC003": LeaseLost}
# The constraint that a PC002 names when what it refuses is an older program (`_private_check_version`).
_VERSION_CONSTRAINT = "_private_schema_version"


@contextmanager
def mapped_errors() -> Generator[None, None, None]:
    """Turn the SQLSTATEs our functions raise into our exceptions; let every other error pass."""
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate == "PC002" and error.diag.constraint_name == _VERSION_CONSTRAINT:
            raise SchemaTooNew(error.diag.message_primary or str(error)) from error
        if (ours := _OURS.get(error.sqlstate or "")) is not None:
            raise ours(error.diag.message_primary or str(error)) from error
        if isinstance(error, (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedFunction)):
            raise SchemaMissing(
                f"{error.diag.message_primary}: the schema is missing or older than this program; "
                f"run `pgconductor migrate`"
            ) from error
        raise


def prepare(cursor: psycopg.AsyncCursor[Any] | psycopg.Cursor[Any], call: Call[Any]) -> None:
    """Let a cursor take the call's parameters."""
    if call.has_arrays:
        arrays.prepare(cursor.adapters)


async def run(conn: psycopg.AsyncConnection[Any], call: Call[T]) -> T:
    """Execute `call` on an async connection."""
    with mapped_errors():
        async with psycopg.AsyncCursor(conn, row_factory=tuple_row) as cursor:
            prepare(cursor, call)
            await cursor.execute(call.query, call.params)
            return call.decode(await cursor.fetchall() if cursor.description else [])


def run_sync(conn: psycopg.Connection[Any], call: Call[T]) -> T:
    """Execute `call` on a sync connection."""
    with mapped_errors(), psycopg.Cursor(conn, row_factory=tuple_row) as cursor:
        prepare(cursor, call)
        cursor.execute(call.query, call.params)
        return call.decode(cursor.fetchall() if cursor.description else [])
