"""What the runtime's tests share: a conductor on a fresh database, and ways to look into that database."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def conductor(pgconductor_dsn: str) -> Conductor:
    """A conductor, not open, on a database of the test's own."""
    return Conductor(pgconductor_dsn)


@pytest.fixture
def query(pgconductor_dsn: str) -> Query:
    """Execute one statement in a transaction of its own and return its rows."""

    def execute(text: str, *params: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
            cursor = conn.execute(text.encode(), params or None)
            return cursor.fetchall() if cursor.description else []

    return execute
