"""An orchestrator inside the test's own process, with one task whose handler counts its starts, and what it stands on.

For faults of connections and of the server, which leave the process alive; `site` is for those that do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import trio

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

    def orchestrator(self, *, concurrency: int = 10, lease: float = 10.0, sweep: float = 0.5) -> Orchestrator:
        worker = self.conductor.create_worker(
            queue="q", tasks=[self.task], concurrency=concurrency, sweep_interval=sweep, claim_batch=50, flush_batch=50
        )
        return Orchestrator(self.conductor, workers=[worker], migrate=False, lease=lease)


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


def server_processes(dsn: str, role: str) -> set[int]:
    rows = query(
        dsn,
        "select pid from pg_stat_activity where datname = current_database() and application_name = %s",
        f"pgconductor {role}",
    )
    return {pid for (pid,) in rows}


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds that only the database or a counter tells."""
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.01)
