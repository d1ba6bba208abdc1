"""The database's clock, moved by a test.

Everything the schema calls "now" comes from its function ``_private_clock()``. In a test's database, and only there,
this module replaces that function by one that adds a shift from a table; the shipped SQL has no hook for it. The
clock goes on ticking, shifted.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import LiteralString

import psycopg
from psycopg import sql

from ..errors import InvalidOption

_VOLATILITY: dict[str, LiteralString] = {"i": "immutable", "s": "stable", "v": "volatile"}


class DatabaseClock:
    """Moves the time of one database. Each method is one short transaction; sessions see it with their next
    statement.
    """

    def __init__(self, dsn: str, schema: str = "pgconductor") -> None:
        """Install the movable clock in the database `dsn`, where `schema` is installed already."""
        self._dsn = dsn
        self._schema = sql.Identifier(schema)
        with psycopg.connect(dsn) as conn:
            row = conn.execute(
                "select pg_get_functiondef(oid), provolatile from pg_proc where oid = %s::regprocedure",
                [f"{self._schema.as_string()}._private_clock()"],
            ).fetchone()
            assert row is not None  # the cast has raised if there is no such function
            definition, volatility = str(row[0]), _VOLATILITY[str(row[1])]
            # The shipped body goes on as the base clock. A copy, not a rename: callers are bound to the function, not
            # to its name.
            conn.execute(definition.replace("._private_clock()", "._test_base_clock()", 1).encode())
            conn.execute(self._text("create table {s}._test_clock (shift interval not null)"))
            conn.execute(self._text("insert into {s}._test_clock values ('0')"))
            conn.execute(self._text("grant select on {s}._test_clock to public"))
            conn.execute(
                self._text(
                    "create or replace function {s}._private_clock() returns timestamptz"
                    " language sql {volatility} parallel safe"
                    " begin atomic select {s}._test_base_clock() + shift from {s}._test_clock; end",
                    volatility=volatility,
                )
            )

    def now(self) -> datetime:
        """Return the database's time."""
        with psycopg.connect(self._dsn) as conn:
            row = conn.execute(self._text("select {s}._private_clock()")).fetchone()
        assert row is not None
        now: datetime = row[0]
        return now

    def advance(self, seconds: float | timedelta) -> None:
        """Move the time on by `seconds`, which may be negative."""
        step = seconds if isinstance(seconds, timedelta) else timedelta(seconds=seconds)
        with psycopg.connect(self._dsn) as conn:
            conn.execute(self._text("update {s}._test_clock set shift = shift + %s"), [step])

    def set(self, moment: datetime) -> None:
        """Make it `moment` now; it must be aware."""
        if moment.tzinfo is None:
            raise InvalidOption(f"{moment!r} has no time zone: use an aware datetime")
        with psycopg.connect(self._dsn) as conn:
            conn.execute(self._text("update {s}._test_clock set shift = %s - {s}._test_base_clock()"), [moment])

    def _text(self, text: LiteralString, volatility: LiteralString = "") -> sql.Composed:
        return sql.SQL(text).format(s=self._schema, volatility=sql.SQL(volatility))
