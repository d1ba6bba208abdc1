"""A connection ends between a request and its reply: nobody can know whether the statement took effect.

Catalogue no. 22. Both answers must be right, so each statement is lost once before the server sees it and once after
it was committed, early in the life of a connection and when it has long been prepared. Elsewhere: `invoke` with and
without a key in tests/client, a flush that arrives twice or late in tests/sql, a migration killed before each of its
statements in tests/migrations.
"""

from __future__ import annotations

import itertools
from collections import Counter
from uuid import uuid4

import psycopg
import pytest
import trio
from faults.inside import LIMIT, Work, check_once, invoke, query, until, work_on

from pgconductor import Conductor, Unavailable
from pgconductor.testing.proxy import ChaosProxy, open_chaos_proxy

EITHER_WAY = pytest.mark.parametrize("how", ["request", "reply"])


def cut(proxy: ChaosProxy, how: str, tag: bytes, *, is_whole: bool = False) -> None:
    (proxy.cut_request if how == "request" else proxy.cut_reply)(tag, is_whole=is_whole)


async def cut_now_and_then(proxy: ChaosProxy, how: str, tag: bytes, work: Work, every: int) -> None:
    """Once at the beginning, and again whenever so many more executions have been started."""
    for after in itertools.count(0, every):
        while proxy.cut_tag is not None or work.starts.total() < after:
            await trio.sleep(0.005)
        cut(proxy, how, tag)


def live(dsn: str) -> int:
    return int(query(dsn, "select count(*) from pgconductor._private_executions")[0][0])


def leave_behind(dsn: str, first: int, count: int) -> None:
    """Executions that a dead orchestrator holds. In one transaction: nobody else can have claimed them."""
    dead = uuid4()
    with psycopg.connect(dsn) as conn:
        conn.execute("select pgconductor.register_orchestrator(%s, 'd', 60, '1', 1, '{q}', '{[]}', '{1}')", [dead])
        conn.execute(
            "select pgconductor.invoke('count', jsonb_build_object('n', n), queue => 'q')"
            " from generate_series(%s::int, %s) n",
            [first, first + count - 1],
        )
        held = conn.execute("select id from pgconductor.claim('q', %s, '{count}', %s)", [dead, count]).fetchall()
        assert len(held) == count
        conn.execute("update pgconductor._private_orchestrators set expires_at = now() where id = %s", [dead])


@EITHER_WAY
@pytest.mark.parametrize(("verb", "tag"), [("flush", b".flush("), ("claim", b"._private_claim_")])
async def test_lost_flush_or_claim_costs_no_run_and_no_second_end(
    pgconductor_dsn: str, verb: str, tag: bytes, how: str
) -> None:
    """A flush is sent again and must not count twice; a claim nobody heard of must be given back, and soon."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.001)
        invoke(pgconductor_dsn, 1000)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut_now_and_then, proxy, how, tag, work, 300)
                drained = await work.orchestrator().drain()
                nursery.cancel_scope.cancel()
        assert proxy.cuts >= 3
    check_once(pgconductor_dsn, work, 1000)
    assert drained.fenced == 0
    if verb == "claim" and how == "reply":
        assert query(pgconductor_dsn, "select max(claim_no) from pgconductor._private_finished") > [(1,)]


@EITHER_WAY
async def test_lost_heartbeat_ends_no_lease_and_loses_no_rescue(pgconductor_dsn: str, how: str) -> None:
    """What a heartbeat gave back is told in its reply alone; and one lost reply is no reason to stop everything."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.001)
        orchestrator = work.orchestrator(lease=3.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            for first in (1, 11):
                # Nothing passes through the proxy in between: the next heartbeat is the one that is lost.
                leave_behind(pgconductor_dsn, first, 10)
                cut(proxy, how, b".heartbeat(")
                await until(lambda: proxy.cut_tag is None and live(pgconductor_dsn) == 0)
            assert orchestrator.statistics().incarnations == 1
            assert proxy.cuts == 2
            nursery.cancel_scope.cancel()
    assert work.starts == Counter(range(1, 21))
    assert query(
        pgconductor_dsn,
        "select state::text, count(*), min(crashes), max(crashes), max(attempt)"
        " from pgconductor._private_finished group by 1",
    ) == [("completed", 20, 1, 1, 1)]


@EITHER_WAY
async def test_lost_registration_is_made_anew_and_the_orphan_owns_nothing(pgconductor_dsn: str, how: str) -> None:
    """An id that may be registered or not cannot be used: claims under it could be somebody else's to recover."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.001)
        orchestrator = work.orchestrator(lease=3.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            (first,) = query(pgconductor_dsn, "select id from pgconductor._private_orchestrators")[0]
            cut(proxy, how, b".register_orchestrator(")
            query(pgconductor_dsn, "update pgconductor._private_orchestrators set died_at = now() returning id")
            await until(lambda: proxy.cuts == 1 and orchestrator.statistics().incarnations == 2)
            invoke(pgconductor_dsn, 20)
            await until(lambda: query(pgconductor_dsn, "select count(*) from pgconductor._private_finished") == [(20,)])
            owners = {id for (id,) in query(pgconductor_dsn, "select id from pgconductor._private_orchestrators")}
            assert len(owners) == (3 if how == "reply" else 2)
            assert query(pgconductor_dsn, "select distinct owner from pgconductor._private_finished") == [
                (orchestrator.statistics().owner,)
            ]
            assert first in owners
            nursery.cancel_scope.cancel()
    check_once(pgconductor_dsn, work, 20)


@EITHER_WAY
async def test_lost_commit_of_a_migration_is_found_out_by_the_next_try(pgconductor_empty_dsn: str, how: str) -> None:
    """A version table that disagrees with the schema would apply a migration twice, or never."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy:
        proxy_conductor, conductor = Conductor(proxy.dsn), Conductor(pgconductor_empty_dsn)
        async with proxy_conductor:
            cut(proxy, how, b"commit", is_whole=True)
            with pytest.raises(Unavailable):
                await proxy_conductor.migrate()
        assert proxy.cuts == 1
        async with conductor:
            report = await conductor.migrate()
            await conductor.check_schema()
            again = await conductor.migrate()
        assert (1 in report.applied) == (how == "request")
        assert (again.applied, again.functions_replaced) == ((), False)
    async with conductor:
        await conductor.invoke("count", {"n": 1})


@EITHER_WAY
@pytest.mark.parametrize("tag", [b".cancel(", b".signals("], ids=["cancel", "signals"])
async def test_lost_cancellation_is_asked_for_again_and_takes_effect_once(
    pgconductor_dsn: str, tag: bytes, how: str
) -> None:
    """Told in one reply and then deleted, it would be lost with that reply: the handler would run on."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 600.0)
        orchestrator = work.orchestrator(lease=2.0)
        conductor = work.conductor
        async with conductor, trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            handle = await conductor.invoke("count", {"n": 1}, queue="q")
            await until(work.begun.is_set)
            await conductor.queue_status()  # so that the client's connection is there
            cut(proxy, how, tag)
            await conductor.cancel(handle, reason="not wanted")
            await until(lambda: live(pgconductor_dsn) == 0)
            # Fetched by the heartbeat if not by the signal, which only then is asked for again.
            await until(lambda: proxy.cuts == 1)
            assert orchestrator.statistics().incarnations == 1
            nursery.cancel_scope.cancel()
    assert work.starts == Counter([1])
    assert query(pgconductor_dsn, "select state::text, cancel_reason, claim_no from pgconductor._private_finished") == [
        ("cancelled", "not wanted", 1)
    ]


@EITHER_WAY
async def test_lost_hand_over_after_a_restart_of_the_server_runs_nothing_twice(pgconductor_dsn: str, how: str) -> None:
    """The claims are under the old id, or under one that we do not know that we have."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 1.5)
        orchestrator = work.orchestrator(lease=6.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            first = orchestrator.statistics().owner
            invoke(pgconductor_dsn, 10)
            await until(lambda: work.starts.total() == 10)
            cut(proxy, how, b".succeed_orchestrator(")
            query(pgconductor_dsn, "update pgconductor._private_orchestrators set server_epoch = 'x' returning id")
            await until(lambda: live(pgconductor_dsn) == 0)
            await until(lambda: proxy.cuts == 1)
            statistics = orchestrator.statistics()
            assert (statistics.successions, statistics.fences) == (1, 0)
            assert statistics.owner != first
            nursery.cancel_scope.cancel()
    assert query(pgconductor_dsn, "select distinct owner from pgconductor._private_finished") == [(statistics.owner,)]
    check_once(pgconductor_dsn, work, 10)
