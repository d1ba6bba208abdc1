"""The same runner on a Trio connection, and what its cancellation leaves."""

from __future__ import annotations

import trio
from migrations.small import CREATE_ITEMS, FUNCTIONS, V1, V2, connect, recorded, total

from pgconductor.db.connection import TrioConnection
from pgconductor.db.schema import Migration, MigrationReport, SchemaVersion, SqlSource, check, lock_key, migrate


async def test_trio_migrates_and_checks(pgconductor_empty_dsn: str) -> None:
    """Or an orchestrator cannot bring its own schema up to date."""
    async with await TrioConnection.connect(pgconductor_empty_dsn, autocommit=True) as conn:
        assert await migrate(conn, source=V1) == MigrationReport((1,), True, 1)
        assert await migrate(conn, source=V2) == MigrationReport((2,), True, 2)
        assert await check(conn, source=V2) == SchemaVersion(2, 2, has_own_functions=True)


async def test_orchestrators_of_one_loop_share_the_work(pgconductor_empty_dsn: str) -> None:
    """Or ten orchestrators in one process, started together, wait for each other for ever."""
    reports: list[MigrationReport] = []

    async def start() -> None:
        async with await TrioConnection.connect(pgconductor_empty_dsn, autocommit=True) as conn:
            reports.append(await migrate(conn, source=V2))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(start)
    assert sorted(number for report in reports for number in report.applied) == [1, 2]
    assert {report.version for report in reports} == {2}


async def test_cancelled_migration_leaves_no_lock_and_no_half(pgconductor_empty_dsn: str) -> None:
    """Or Ctrl-C in a long migration blocks the next one, or leaves its first half."""
    stuck = Migration(2, "0002_stuck.sql", "create table @schema@.half (); select pg_sleep(100)")
    with connect(pgconductor_empty_dsn) as observer:
        conn = await TrioConnection.connect(pgconductor_empty_dsn, autocommit=True)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def run() -> None:
                    await migrate(conn, source=SqlSource((CREATE_ITEMS, stuck), FUNCTIONS))

                nursery.start_soon(run)
                asleep = "select from pg_stat_activity where pid = %s and wait_event = 'PgSleep'"
                while not observer.execute(asleep, (conn.info.backend_pid,)).fetchall():
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert scope.cancelled_caught
        assert conn.closed
        assert recorded(observer) == [1]
        # Taken by waiting, not trying: the server may need a moment to see that the connection has gone.
        observer.execute("set lock_timeout = '10s'")
        observer.execute("select pg_advisory_lock(%s::int8)", (lock_key("pgconductor"),))
        observer.execute("select pg_advisory_unlock(%s::int8)", (lock_key("pgconductor"),))
        async with await TrioConnection.connect(pgconductor_empty_dsn, autocommit=True) as again:
            assert (await migrate(again, source=V2)).applied == (2,)
        assert total(observer) == 1
        assert observer.execute("select to_regclass('pgconductor.half')").fetchall() == [(None,)]
