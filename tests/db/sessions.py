"""What the tests of this folder share: a connection for a block, and the single value of a query."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from psycopg.abc import ConnParam
from psycopg.rows import TupleRow

from pgconductor.db.connection import TrioConnection

Connection = TrioConnection[TupleRow]


@asynccontextmanager
async def connected(dsn: str, autocommit: bool = True, **parameters: ConnParam) -> AsyncGenerator[Connection]:
    """A connection for the block, closed at its end whatever happened to it."""
    kwargs: dict[str, Any] = dict(parameters)
    conn = await Connection.connect(dsn, autocommit=autocommit, **kwargs)
    try:
        yield conn
    finally:
        conn.drop()


async def value(conn: TrioConnection[Any], query: str, *params: object) -> Any:
    """The first column of the first row."""
    cursor = await conn.execute(query.encode(), params)
    row = await cursor.fetchone()
    assert row is not None
    return row[0]
