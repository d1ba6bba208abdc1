"""The database itself goes away and comes back, on a server of the test's own."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from faults.site import LIMIT, Site, open_site, until

from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import own_server
from pgconductor.embedded.server import OwnServer


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with own_server(settings={"fsync": "off"}) as own:
        with psycopg.connect(own.dsn(), autocommit=True) as conn:
            migrate_sync(conn, "pgconductor")
        yield own


@pytest.fixture
def site(server: OwnServer, tmp_path: Path) -> Iterator[Site]:
    with open_site(server.dsn(), tmp_path) as opened:
        yield opened


def test_crash_of_the_server_under_load_loses_nothing_and_finishes_nothing_twice(server: OwnServer, site: Site) -> None:
    """Claims commit asynchronously: those that the crash forgot must not be finished under their old token."""
    processes = [site.start(lease=3.0), site.start(lease=3.0)]
    numbers = range(600)
    site.invoke("nap", numbers, seconds=0.05)
    before = {owner for process in processes for owner in process.owners()}
    assert len(before) == 2
    until(lambda: len(site.journal("end")) >= 100)
    server.restart("immediate")
    restarted_at = time.monotonic()
    until(lambda: site.live() == 0)
    print(f"all finished {time.monotonic() - restarted_at:.1f} s after the restart")
    site.check_finished_once(numbers)
    until(lambda: all(len(process.owners()) >= 2 for process in processes))
    last = "select owner from pgconductor._private_finished where claim_no > 1"
    assert not {owner for (owner,) in site.query(last)} & before, "an owner from before the crash claimed again"
    for process in processes:
        process.send(signal.SIGTERM)
    assert [process.until_exit() for process in processes] == [0, 0]


def test_terminated_process_ends_though_the_database_is_down(server: OwnServer, site: Site) -> None:
    """Neither can flush, nor give back; one has lost its lease already. Waiting would block the deployment."""
    brief, long = site.start(lease=2.0, grace=0.5), site.start(lease=30.0, grace=0.5)
    site.invoke("nap", range(60), seconds=0.3)
    until(lambda: {entry.pid for entry in site.journal("end")} == {brief.pid, long.pid})
    server.stop("immediate")
    asked_at = time.monotonic()
    long.send(signal.SIGTERM)
    until(lambda: "lease of orchestrator" in site.logs())
    brief.send(signal.SIGTERM)
    brief.until_exit(LIMIT)
    long.until_exit(LIMIT)
    print(f"both ended {time.monotonic() - asked_at:.1f} s after the first was asked to")
    assert "could not be written" in site.logs()
    server.start()
    # As if the longer lease had run out.
    site.query("update pgconductor._private_orchestrators set expires_at = now() returning id")
    site.start(lease=3.0)
    until(lambda: site.live() == 0)
    site.check_finished_once(range(60))
