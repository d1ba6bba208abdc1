"""The engine's connections are cut in the middle of things: nothing is lost, nothing runs or finishes twice.

In the same process as the test, whose handlers count their starts. A reply that is lost leaves open whether the
statement was carried out: both answers must be right.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
import trio
from proxy import ChaosProxy, open_chaos_proxy

from pgconductor import Conductor, Orchestrator
from pgconductor.tasks import Task

LIMIT = 40.0


@dataclass
class Work:
    """A conductor with one task, and how often each execution was started."""

    conductor: Conductor
    task: Task[..., Any]
    starts: Counter[int] = field(default_factory=Counter[int])
    begun: trio.Event = field(default_factory=trio.Event)

    def orchestrator(self, *, concurrency: int = 10) -> Orchestrator:
        worker = self.conductor.create_worker(
            queue="q", tasks=[self.task], concurrency=concurrency, sweep_interval=0.5, claim_batch=50, flush_batch=50
        )
        return Orchestrator(self.conductor, workers=[worker], migrate=False)


def work_on(dsn: str, seconds: float) -> Work:
    conductor = Conductor(dsn)

    @conductor.task(queue="q")
    async def count(n: int) -> int:
        work.starts[n] += 1
        work.begun.set()
        await trio.sleep(seconds)
        return n

    work = Work(conductor, count)
    return work


def query(dsn: str, text: str, *params: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as conn:
        return conn.execute(text.encode(), params or None).fetchall()


def invoke(dsn: str, count: int) -> None:
    query(
        dsn,
        "select pgconductor.invoke('count', jsonb_build_object('n', n), queue => 'q') from generate_series(1, %s) n",
        count,
    )


def check_once(dsn: str, work: Work, count: int) -> None:
    """Each was started once and finished once, and nothing was charged to it."""
    assert work.starts == Counter(range(1, count + 1))
    assert query(
        dsn,
        "select state::text, count(*), count(distinct id), max(attempt), max(crashes)"
        " from pgconductor._private_finished group by 1",
    ) == [("completed", count, count, 1, 0)]
    assert query(dsn, "select count(*) from pgconductor._private_executions") == [(0,)]


async def cut_replies(proxy: ChaosProxy, tag: bytes, times: int) -> None:
    """Lose the reply of the next statements with this tag, one after the other."""
    while proxy.cuts < times:
        if proxy.cut_tag is None:
            proxy.cut_reply(tag)
        await trio.sleep(0.005)


@pytest.mark.parametrize("verb", ["flush", "claim"])
async def test_lost_reply_is_answered_without_loss_or_repetition(pgconductor_dsn: str, verb: str) -> None:
    """A flush is sent again and must not count twice; a claim nobody heard of must be given back, and soon."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        work = work_on(proxy.dsn, 0.002)
        invoke(pgconductor_dsn, 400)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut_replies, proxy, f".{verb}(".encode(), 3)
                drained = await work.orchestrator().drain()
                nursery.cancel_scope.cancel()
        assert proxy.cuts >= 2
    check_once(pgconductor_dsn, work, 400)
    assert drained.fenced == 0
    claims = query(pgconductor_dsn, "select max(claim_no) from pgconductor._private_finished")
    assert claims == [(1,)] if verb == "flush" else claims > [(1,)]


async def test_random_backends_terminated_during_a_drain_cost_nothing_but_time(pgconductor_dsn: str) -> None:
    """Claim, flush, heartbeat, rescue and LISTEN each come back, whatever they were doing."""
    rng = random.Random()
    work = work_on(pgconductor_dsn, 0.01)
    invoke(pgconductor_dsn, 2000)
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
    check_once(pgconductor_dsn, work, 2000)
    assert drained.fenced == 0
