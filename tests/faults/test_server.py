"""The database itself goes away and comes back, on a server of the test's own."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from faults.site import Site, open_site, until

from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import own_server
from pgconductor.embedded.server import OwnServer
from pgconductor.testing.server import folder_in_memory


@pytest.fixture
def server() -> Iterator[OwnServer]:
    with own_server(settings={"fsync": "off"}, base_dir=folder_in_memory()) as own:
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


@pytest.mark.parametrize("synchronous_commit", ["on", "off"])
def test_acknowledged_invokes_survive_crashes_of_the_server(
    tmp_path: Path, pytestconfig: pytest.Config, synchronous_commit: str
) -> None:
    """Whoever was given an id may forget about it, whatever the administrator set. (Catalogue no. 26.)

    An asynchronous commit is acknowledged before it is safe; a producer that commits all the time has always one under
    way when the server is killed. `--faults full`: every 20 s for 10 minutes.
    """
    restarts, pause = (30, 20.0) if pytestconfig.getoption("--faults") == "full" else (3, 0.6)
    settings = {"fsync": "off", "synchronous_commit": synchronous_commit, "wal_writer_delay": "10s"}
    acknowledged: list[UUID] = []
    is_over = threading.Event()

    def produce() -> None:
        while not is_over.is_set():
            try:
                with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as conn:
                    while not is_over.is_set():
                        query = "select pgconductor.invoke('nap', '{\"n\": 0, \"seconds\": 0}', queue => 'q')"
                        acknowledged.extend(made for (made,) in conn.execute(query))
            except psycopg.OperationalError:
                is_over.wait(0.05)

    with own_server(settings=settings, base_dir=folder_in_memory()) as own:
        dsn = own.dsn()
        with psycopg.connect(dsn, autocommit=True) as conn:
            migrate_sync(conn, "pgconductor")
        with open_site(dsn, tmp_path) as site:
            processes = [site.start(lease=3.0), site.start(lease=3.0)]
            producers = [threading.Thread(target=produce) for _ in range(2)]
            for producer in producers:
                producer.start()
            try:
                for _ in range(restarts):
                    before = len(acknowledged)
                    give_up_at = time.monotonic() + pause
                    until(lambda: time.monotonic() > give_up_at and len(acknowledged) > before + 20)  # noqa: B023
                    own.restart("immediate", settings=settings)
            finally:
                is_over.set()
                for producer in producers:
                    producer.join()
            until(lambda: site.live() == 0)
            for process in processes:
                process.send(signal.SIGTERM)
                process.until_exit()
            kept = {found for (found,) in site.query("select id from pgconductor._private_finished")}
            (doubled,) = site.query("select count(*) - count(distinct id) from pgconductor._private_finished")[0]
            lost = [one for one in acknowledged if one not in kept]
            print(f"synchronous_commit={synchronous_commit}: {len(acknowledged)} acknowledged, {len(lost)} lost")
            assert (len(lost), doubled) == (0, 0)


def test_terminated_process_ends_though_the_database_is_down(server: OwnServer, site: Site) -> None:
    """Neither can flush, nor give back; one has lost its lease already. Waiting would block the deployment."""
    brief, long = (site.start(lease=lease, grace=0.5, last_words=1.0) for lease in (2.0, 30.0))
    site.invoke("nap", range(60), seconds=0.3)
    until(lambda: {entry.pid for entry in site.journal("end")} == {brief.pid, long.pid})
    server.stop("immediate")
    asked_at = time.monotonic()
    long.send(signal.SIGTERM)
    until(lambda: "lease of orchestrator" in site.logs())
    brief.send(signal.SIGTERM)
    assert [brief.until_exit(), long.until_exit()] == [1, 1], "an exit status of 0 would hide that outcomes were lost"
    print(f"both ended {time.monotonic() - asked_at:.1f} s after the first was asked to")
    assert "could not be written" in site.logs()
    server.start()
    # As if the longer lease had run out.
    site.query("update pgconductor._private_orchestrators set expires_at = now() returning id")
    site.start(lease=3.0)
    until(lambda: site.live() == 0)
    site.check_finished_once(range(60))
