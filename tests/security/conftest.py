"""One database with its roles for the whole folder, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from security.site import Site, open_site

from pgconductor.testing import Databases


@pytest.fixture(scope="session")
def security_site(pgconductor_databases: Databases) -> Iterator[Site]:
    """The database and its roles."""
    with pgconductor_databases.empty() as dsn, open_site(dsn) as site:
        yield site


@pytest.fixture
def site(security_site: Site) -> Site:
    """The database as after a fresh install, with its roles."""
    security_site.reset()
    return security_site
