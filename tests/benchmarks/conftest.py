"""A benchmark under way, for tests of what benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import Bench
from pgconductor.testing import DatabaseServer


@pytest.fixture
def bench(pgconductor_server: DatabaseServer, tmp_path: Path) -> Bench:
    return Bench("test", pgconductor_server.dsn("postgres"), None, {}, tmp_path)
