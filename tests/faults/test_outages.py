"""The way to the database is closed, slow or narrow for a while: how often we ask, and what we keep meanwhile."""

from __future__ import annotations

import logging

import pytest
import trio
from faults.inside import LIMIT, check_once, invoke, query, until, work_on

from pgconductor.testing.proxy import open_chaos_proxy


def finished(dsn: str) -> int:
    return int(query(dsn, "select count(*) from pgconductor._private_finished")[0][0])


async def test_refused_fleet_asks_seldom_loses_no_result_and_is_back_soon(
    pgconductor_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A fleet that hammers a server which is coming up keeps it down. (No. 20, in small: 5 orchestrators, 8 s.)

    Full jitter from 50 ms, doubled up to 5 s: most attempts are in the first seconds, later each connection makes less
    than one a second. The lease outlasts the outage, so what had ended meanwhile must be written, not run again.
    """
    count, connections = 5, 6
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.2)
        orchestrators = [work.orchestrator(concurrency=4, lease=120.0) for _ in range(count)]
        async with trio.open_nursery() as nursery:
            for orchestrator in orchestrators:
                await nursery.start(orchestrator.run)
            invoke(pgconductor_dsn, 120)
            await until(lambda: finished(pgconductor_dsn) > 20)
            caplog.clear()
            before, begun_at = proxy.accepted, trio.current_time()
            proxy.reject()
            proxy.rst()
            with trio.move_on_after(5.0):
                await trio.sleep_forever()
            first, later_at = proxy.accepted - before, trio.current_time()
            with trio.move_on_after(3.0):
                await trio.sleep_forever()
            later = proxy.accepted - before - first
            lines = len([record for record in caplog.records if record.levelno >= logging.WARNING])
            await proxy.mend()
            claims = [one.statistics().workers[0].claims for one in orchestrators]
            mended_at = trio.current_time()
            await until(
                lambda: any(
                    one.statistics().workers[0].claims > claimed
                    for one, claimed in zip(orchestrators, claims, strict=True)
                )
            )
            first_claim = trio.current_time() - mended_at
            with trio.fail_after(LIMIT):
                await until(lambda: finished(pgconductor_dsn) == 120)
            print(f"{first} attempts in 5 s, {later} in 3 s more; a claim {first_claim:.2f} s after the end")
            nursery.cancel_scope.cancel()
    check_once(pgconductor_dsn, work, 120)
    assert first >= count, "nobody tried: the test shows nothing"
    assert first <= 12 * count * connections
    assert later <= count * connections * (mended_at - later_at)
    assert lines <= count * (mended_at - begun_at + 2)
    assert first_claim <= 5.0 + 0.5


async def test_process_cut_off_for_longer_than_its_lease_asks_seldom_and_begins_anew(pgconductor_dsn: str) -> None:
    """Without a lease there is nothing to do but to register again, which a whole fleet does at once. (No. 20.)"""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.0)
        orchestrator = work.orchestrator(lease=1.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            proxy.reject()
            proxy.rst()
            await until(lambda: orchestrator.statistics().owner is None)
            before = proxy.accepted
            with trio.move_on_after(4.0):
                await trio.sleep_forever()
            attempts = proxy.accepted - before
            await proxy.mend()
            invoke(pgconductor_dsn, 10)
            await until(lambda: finished(pgconductor_dsn) == 10)
            assert orchestrator.statistics().incarnations == 2
            nursery.cancel_scope.cancel()
    print(f"{attempts} attempts in 4 s")
    assert 1 <= attempts <= 20
    check_once(pgconductor_dsn, work, 10)


async def test_slow_and_narrow_line_ends_no_lease(pgconductor_dsn: str) -> None:
    """A heartbeat is judged by when it was sent: a late reply is no reason to stop. (Catalogue no. 21.)"""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.0)
        orchestrator = work.orchestrator(lease=6.0)
        proxy.delay(0.2, 0.1)
        proxy.rate(64_000)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            invoke(pgconductor_dsn, 100)
            await until(lambda: finished(pgconductor_dsn) == 100)
            beats = "select heartbeat_at - started_at > interval '5 s' from pgconductor._private_orchestrators"
            await until(lambda: query(pgconductor_dsn, beats) == [(True,)])
            assert orchestrator.statistics().incarnations == 1
            nursery.cancel_scope.cancel()
    check_once(pgconductor_dsn, work, 100)
