"""What the runtime's tests share: a conductor on a fresh database, and ways to look into that database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from runtime.pooled import CHOSEN, MISSING, NOT_POOLED, Pooler, is_asked_for, lead_through, open_pooler

from pgconductor import Conductor
from pgconductor.testing import DatabaseServer

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


@pytest.fixture(scope="session")
def pooler(pgconductor_server: DatabaseServer) -> Iterator[Pooler]:
    """The pgbouncer of this run."""
    with open_pooler(pgconductor_server.dsn(), size=10) as opened:
        yield opened


@pytest.fixture(autouse=True)
def through_pooler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead a test through it, or not."""
    if getattr(request, "param", is_asked_for(request.config)):
        if reason := MISSING or NOT_POOLED.get(request.node.name):
            pytest.skip(reason)
        lead_through(request.getfixturevalue("pooler"), monkeypatch)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The chosen tests run both ways, unless all are to run through the pooler."""
    if metafunc.function.__name__ in CHOSEN and not is_asked_for(metafunc.config):
        metafunc.parametrize("through_pooler", [False, True], ids=["direct", "pooled"], indirect=True)
