"""The primary dies and its standby is promoted, on two servers of this machine; `--failovers N` for more rounds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import trio
from failover.cluster import Pair, open_pair, query, start_as_standby
from failover.rounds import finished, open_workers, run_round

from pgconductor import Conductor, Orchestrator, Unavailable
from pgconductor.db.call import Call
from pgconductor.db.calls import WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import own_server
from pgconductor.testing.server import folder_in_memory

INVOKE = "select pgconductor.invoke('note', jsonb_build_object('n', n), queue => 'q') from generate_series(1, 50) n"


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(str(request.config.getoption("--failovers")))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("synchronous", [True, False], ids=["synchronous", "asynchronous"])
def test_failover_loses_no_more_than_it_must(rounds: int, synchronous: bool, tmp_path: Path) -> None:
    """Synchronous: nothing that was acknowledged. Asynchronous: only what the standby had not heard of. Nothing is
    finished twice, nothing that somebody read as finished comes back, and the same processes work on.
    """
    for number in range(rounds):
        figures = run_round(tmp_path / str(number), synchronous=synchronous)
        print(f"{'synchronous' if synchronous else 'asynchronous'}: {figures}")


def test_everything_the_standby_has_can_be_used_once_it_is_promoted() -> None:
    """What is not in the WAL is not there: an unlogged sequence is a page of zeroes then, and each use an error."""
    with open_pair(synchronous=True) as pair:
        with psycopg.connect(pair.dsn, autocommit=True) as conn:
            migrate_sync(conn)
        pair.crash_primary()
        pair.promote()
        names = query(
            pair.dsn,
            "select c.oid::regclass::text from pg_class c where c.relnamespace = 'pgconductor'::regnamespace"
            " and c.relkind = 'S'",
        )
        assert len(names) > 30
        for (name,) in names:
            assert query(pair.dsn, "select setval(%s::regclass, 7)", name) == [(7,)]
        unlogged = (
            "select c.oid::regclass::text from pg_class c where c.relnamespace = 'pgconductor'::regnamespace"
            " and c.relpersistence <> 'p'"
        )
        assert query(pair.dsn, unlogged) == []


def test_worker_waits_while_its_server_is_a_standby_and_goes_on_when_it_is_promoted(tmp_path: Path) -> None:
    """Or it ends, or fills the log, or has to be started again; a new one says what is the matter, and ends."""
    with own_server(settings={"fsync": "off"}, base_dir=folder_in_memory()) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            migrate_sync(conn)
        with open_workers(server.dsn(), tmp_path, 1) as workers:
            server.stop("fast")
            start_as_standby(server)
            began = time.monotonic()
            Pair.until(lambda: workers.logs().count("read-only transaction") >= 2)
            conductor = Conductor(server.dsn())

            @conductor.task
            async def idle() -> None:
                """Never run."""

            with pytest.raises(Unavailable, match=r"read-only|recovery|standby"):
                trio.run(Orchestrator(conductor, tasks=[idle], handle_signals=False).run)
            lines = workers.logs().count(" WARNING ")
            assert lines <= (time.monotonic() - began) + 3, workers.logs()
            query(server.dsn(), "select pg_promote()")
            query(server.dsn(), INVOKE)
            Pair.until(lambda: len(finished(server.dsn())) == 50)
            workers.end()


def test_upkeep_of_an_orchestrators_row_waits_for_no_standby(pgconductor_dsn: str) -> None:
    """Or a synchronous standby that is away costs every orchestrator its lease, though its server is there."""
    calls, owner = Conductor(pgconductor_dsn).calls, uuid4()
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        run_sync(conn, calls.register_queue("q"))
        run_sync(conn, calls.register_orchestrator(owner, "me", 60.0, "0", 1, [WorkerRow("q", ["t"], 1)]))
        upkeep: list[Call[Any]] = [calls.heartbeat(owner, 60.0, ["q"]), calls.hold_session(owner)]
        for call in upkeep:
            with conn.transaction():
                run_sync(conn, call)
                assert conn.execute("show synchronous_commit").fetchone() == ("off",), call.query
