"""What the tests of durable execution share: a conductor on a fresh database, and ways to look into that database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from durable.site import Site, open_site
from runtime.workplace import make_heartbeats_rare


@pytest.fixture(autouse=True)
def rare_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """None comes within a test on a long lease: what one tells too has to be told in time by something else."""
    make_heartbeats_rare(monkeypatch)


@pytest.fixture
def site(pgconductor_dsn: str) -> Iterator[Site]:
    """A conductor, not open, on a database of the test's own."""
    with open_site(pgconductor_dsn) as opened:
        yield opened
