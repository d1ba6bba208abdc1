"""One database for the whole folder, emptied before each test: a clone per test would take most of the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sql.database import Database, open_database

from pgconductor.testing import DatabaseClock, Databases


@pytest.fixture(scope="session")
def sql_database(pgconductor_databases: Databases) -> Iterator[tuple[Database, DatabaseClock]]:
    """The database and its clock."""
    with pgconductor_databases.installed() as dsn, open_database(dsn) as database:
        database.take_looks_for("short")
        yield database, DatabaseClock(dsn)


@pytest.fixture
def db(sql_database: tuple[Database, DatabaseClock]) -> Iterator[Database]:
    """A database as after a fresh install, on the clock of the test."""
    database, _ = sql_database
    database.reset()
    yield database
    database.close_sessions()


@pytest.fixture
def clock(db: Database, sql_database: tuple[Database, DatabaseClock]) -> DatabaseClock:
    """The clock of `db`, set to the true time."""
    return sql_database[1]
