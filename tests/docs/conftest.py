"""Fixtures of the documentation's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cli.warm import Interpreter, warm_interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """What runs the examples."""
    with warm_interpreter() as warm:
        yield warm
