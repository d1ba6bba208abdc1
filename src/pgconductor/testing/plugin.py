"""The pytest plugin: database fixtures for this library's own tests and for those of its users.

Loaded in every pytest run where the library is installed, so it imports nothing heavy and does nothing until a
fixture is used. The server, its template and each database live exactly as long as the fixture that made them. With
pytest-xdist every worker has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .clock import DatabaseClock
    from .databases import Databases
    from .server import DatabaseServer

_NONE: list[str] = []
_USED = pytest.StashKey[list[str]]()  # the servers that were used, in words, for the summary


@pytest.fixture(scope="session")
def pgconductor_server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """The PostgreSQL server of this test run."""
    from .server import open_server

    with open_server() as server:
        request.config.stash.setdefault(_USED, []).append(server.describe())
        yield server


@pytest.fixture(scope="session")
def pgconductor_schema() -> str:
    """Name of the schema in the databases of this test run; override it to use another."""
    return "pgconductor"


@pytest.fixture(scope="session")
def pgconductor_databases(pgconductor_server: DatabaseServer, pgconductor_schema: str) -> Iterator[Databases]:
    """Makes databases; for a test that needs more than one."""
    from .databases import Databases

    databases = Databases(pgconductor_server, pgconductor_schema)
    try:
        yield databases
    finally:
        databases.close()


@pytest.fixture
def pgconductor_dsn(pgconductor_databases: Databases) -> Iterator[str]:
    """DSN of a fresh database with the schema installed."""
    with pgconductor_databases.installed() as dsn:
        yield dsn


@pytest.fixture
def pgconductor_empty_dsn(pgconductor_databases: Databases) -> Iterator[str]:
    """DSN of a fresh empty database."""
    with pgconductor_databases.empty() as dsn:
        yield dsn


@pytest.fixture
def pgconductor_clock(pgconductor_dsn: str, pgconductor_schema: str) -> DatabaseClock:
    """The clock of the database `pgconductor_dsn`, to be moved by the test."""
    from .clock import DatabaseClock

    return DatabaseClock(pgconductor_dsn, pgconductor_schema)


# --- the servers' settings at the end of the run, since rates and timings mean nothing without them ---


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what an xdist worker used to its controller."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["pgconductor_servers"] = session.config.stash.get(_USED, _NONE)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what a worker used (a hook of pytest-xdist)."""
    output: dict[str, Any] = getattr(node, "workeroutput", {})
    node.config.stash.setdefault(_USED, []).extend(output.get("pgconductor_servers", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print each server that was used, once."""
    used: list[str] = config.stash.get(_USED, _NONE)
    for line in dict.fromkeys(used):
        terminalreporter.write_line(f"PostgreSQL for the tests: {line}")
