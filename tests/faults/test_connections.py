"""The engine's connections end in the middle of things, or carry a statement too late: nothing is lost or done twice.

In the same process as the test, whose handlers count their starts.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import trio
from faults.inside import LIMIT, check_once, invoke, query, server_processes, until, work_on

from pgconductor import Conductor, Orchestrator
from pgconductor.tasks import Task
from pgconductor.testing.proxy import open_chaos_proxy


async def test_random_backends_terminated_during_a_drain_cost_nothing_but_time(pgconductor_dsn: str) -> None:
    """Claim, flush, heartbeat, rescue and LISTEN each come back, whatever they were doing. (Catalogue no. 27.)"""
    rng = random.Random()
    work = work_on(pgconductor_dsn, 0.01)
    invoke(pgconductor_dsn, 1000)
    killed: Counter[str] = Counter()

    async def kill() -> None:
        await work.begun.wait()
        while True:
            rows = query(
                pgconductor_dsn,
                "select application_name, pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and application_name like 'pgconductor %%'"
                " order by hashtext(pid::text || %s) limit 1",
                str(rng.random()),
            )
            killed.update(name for name, _ in rows)
            await trio.sleep(rng.uniform(0.01, 0.08))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            drained = await work.orchestrator().drain()
            nursery.cancel_scope.cancel()
    print(f"terminated: {dict(killed)}; {drained}")
    assert killed["pgconductor claim"] > 0
    assert killed["pgconductor flush"] > 0
    check_once(pgconductor_dsn, work, 1000)
    assert drained.fenced == 0


def orchestrator_of(conductor: Conductor, task: Task[..., Any]) -> Orchestrator:
    worker = conductor.create_worker(queue="q", tasks=[task], sweep_interval=0.2)
    return Orchestrator(conductor, workers=[worker], lease=1.0, grace=0.0, migrate=False)


async def test_flush_that_arrives_after_its_claim_was_revoked_changes_nothing(pgconductor_dsn: str) -> None:
    """It was sent in time and held up on the way: only the fence in the database can tell that it is too late."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        late, other = Conductor(proxy.dsn), Conductor(pgconductor_dsn)
        late_begun, late_go_on, other_begun, other_go_on = (trio.Event() for _ in range(4))

        @late.task(name="who", queue="q")
        async def finish_late(is_first: bool) -> str:
            if not is_first:
                late_begun.set()
                await late_go_on.wait()
            return "late"

        @other.task(name="who", queue="q")
        async def finish(is_first: bool) -> str:
            other_begun.set()
            await other_go_on.wait()
            return "other"

        cut_off, taking_over = orchestrator_of(late, finish_late), orchestrator_of(other, finish)
        invoke = "select pgconductor.invoke('who', jsonb_build_object('is_first', %s::bool), queue => 'q')"
        finished = "select result #>> '{}', claim_no, crashes from pgconductor._private_finished order by claim_no"
        async with trio.open_nursery() as nursery:
            await nursery.start(cut_off.run)
            query(pgconductor_dsn, invoke, True)
            await until(lambda: query(pgconductor_dsn, finished) == [("late", 1, 0)])
            (flushing,) = server_processes(pgconductor_dsn, "flush")
            query(pgconductor_dsn, invoke, False)
            await until(late_begun.is_set)
            proxy.freeze()
            proxy.refuse()
            late_go_on.set()
            await nursery.start(taking_over.run)
            await until(other_begun.is_set)
            held = query(pgconductor_dsn, "select * from pgconductor._private_executions")
            await proxy.mend()
            await until(lambda: flushing not in server_processes(pgconductor_dsn, "flush"))
            assert query(pgconductor_dsn, "select * from pgconductor._private_executions") == held
            assert query(pgconductor_dsn, finished) == [("late", 1, 0)]
            other_go_on.set()
            await until(lambda: query(pgconductor_dsn, finished) == [("late", 1, 0), ("other", 2, 1)])
            await until(lambda: cut_off.statistics().incarnations == 2)
            nursery.cancel_scope.cancel()
    assert query(pgconductor_dsn, finished) == [("late", 1, 0), ("other", 2, 1)]


async def test_claim_that_arrives_after_the_lease_has_ended_takes_nothing(pgconductor_dsn: str) -> None:
    """Its owner no longer lives: what it took would wait for a rescue, and be charged with a crash."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)

        @conductor.task(name="who", queue="q")
        async def finish() -> None:
            pass

        cut_off = orchestrator_of(conductor, finish)
        async with trio.open_nursery() as nursery:
            await nursery.start(cut_off.run)
            (pipeline,) = cut_off._pipelines
            await until(lambda: pipeline.statistics().empty_claims >= 2)
            (claiming,) = server_processes(pgconductor_dsn, "claim")
            proxy.freeze()
            proxy.refuse()
            expired = "select count(*) from pgconductor._private_orchestrators where expires_at < now()"
            await until(lambda: query(pgconductor_dsn, expired) == [(1,)])
            query(pgconductor_dsn, "select pgconductor.invoke('who', queue => 'q')")
            await proxy.mend()
            await until(lambda: query(pgconductor_dsn, "select count(*) from pgconductor._private_finished") == [(1,)])
            assert claiming not in server_processes(pgconductor_dsn, "claim")
            assert cut_off.statistics().incarnations == 2
            nursery.cancel_scope.cancel()
    assert query(pgconductor_dsn, "select claim_no, attempt, crashes from pgconductor._private_finished") == [(1, 1, 0)]
