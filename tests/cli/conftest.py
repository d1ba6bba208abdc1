"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cli.warm import Command, warm_interpreter


@pytest.fixture(scope="session")
def pgconductor() -> Iterator[Command]:
    """The command, run to its end in a process of its own."""
    with warm_interpreter() as interpreter:
        yield interpreter.command
