"""What all tests share: the library's own pytest plugin, also when the library is only on the path."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

import pytest

if not entry_points(group="pytest11", name="pgconductor"):
    pytest_plugins = ["pgconductor.testing.plugin"]


def pytest_report_header() -> str:
    """Say which server the databases will be on; the summary says what it turned out to be."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith("PGCONDUCTOR_TEST_")}
    if "PGCONDUCTOR_TEST_DSN" in chosen:
        chosen["PGCONDUCTOR_TEST_DSN"] = "(set)"  # it may hold a password
    return f"pgconductor test server: {chosen or 'a throwaway one from the wheel'}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long the random tests run."""
    group = parser.getgroup("pgconductor's own tests")
    group.addoption("--wakeups", type=int, default=3000, help="executions of the random wake-up test (default 3000)")
    group.addoption("--wakeup-seed", type=int, default=None, help="seed of its choices (default: a new one, printed)")
    group.addoption(
        "--model-events", type=int, default=20_000, help="random events of the model's test (default 20000)"
    )
    group.addoption(
        "--stateful-examples", type=int, default=None, help="random examples of the stateful test (default: few, fixed)"
    )
    group.addoption("--failovers", type=int, default=1, help="failovers of each kind in tests/failover (default 1)")
    group.addoption(
        "--faults",
        choices=["few", "full"],
        default="few",
        help="few: the faults of tests/faults in small (default); full: for as long as the catalogue says",
    )
    group.addoption(
        "--failpoints",
        default="sample",
        help='which kills at failpoints: "sample" (default), "all", or a text that the test\'s name holds',
    )
    group.addoption(
        "--through-pgbouncer",
        action="store_true",
        help="lead the tests of tests/runtime through a pgbouncer in transaction mode (or PGCONDUCTOR_TEST_POOLER=1)",
    )
