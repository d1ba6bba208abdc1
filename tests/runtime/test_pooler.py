"""Through pgbouncer in transaction mode, with a direct `listen_dsn`: nothing that is pooled may rely on a session."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
import trio
from psycopg.conninfo import conninfo_to_dict
from runtime.pooled import MISSING, open_pooler

from pgconductor import Conductor, Orchestrator

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")


@pytest.fixture
def pooled_dsn(pgconductor_dsn: str) -> Iterator[str]:
    """DSN of the same database through a pgbouncer of the test's own, with two server connections."""
    with open_pooler(pgconductor_dsn, size=2) as pooler:
        yield pooler.through(pgconductor_dsn)


async def test_everything_works_behind_a_transaction_pooler(pooled_dsn: str, pgconductor_dsn: str) -> None:
    """No prepared statement, no session setting and no session lock on what is pooled; wake-ups come directly."""
    conductor = Conductor(pooled_dsn, listen_dsn=pgconductor_dsn)

    @conductor.task(queue="q")
    async def double(n: int) -> int:
        return 2 * n

    worker = conductor.create_worker(queue="q", tasks=[double], sweep_interval=60.0)
    orchestrator = Orchestrator(conductor, workers=[worker])
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        handles = await double.invoke_many([double.bind(n) for n in range(200)])
        with trio.fail_after(30):
            assert [await handle.result() for handle in handles] == [2 * n for n in range(200)]
            for n in range(10):  # one by one, to a worker that sleeps: no sweep comes in this time
                assert await (await double.invoke(n)).result() == 2 * n
        (statistics,) = orchestrator.statistics().workers
        assert statistics.reactor.listener is not None
        assert statistics.reactor.listener.is_listening
        orchestrator.stop()
    with psycopg.connect(pooled_dsn, autocommit=True, prepare_threshold=None) as conn:
        row = conn.execute("select current_setting('statement_timeout')").fetchone()
        assert row == ("0",), "a setting of the engine's was left in a session that others use next"


@pytest.mark.parametrize("through_pooler", [True], indirect=True)
async def test_tests_that_are_led_through_the_pooler_get_there(conductor: Conductor, pgconductor_dsn: str) -> None:
    """Or the whole folder passes behind a pooler that nobody uses."""
    async with conductor:
        assert conductor.listen_conninfo == pgconductor_dsn
        assert conductor.prepare_threshold is None
        await conductor.queue_status()
        with psycopg.connect(conductor.conninfo, dbname="pgbouncer", autocommit=True) as console:
            rows = psycopg.ClientCursor(console).execute("show stats").fetchall()
    name = str(conninfo_to_dict(pgconductor_dsn)["dbname"])
    assert [row[1] for row in rows if row[0] == name] != []
