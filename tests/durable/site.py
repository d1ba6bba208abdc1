"""A conductor on a database of the test's own, orchestrators on it, and questions to that database.

Nothing here waits for time to pass: `until` asks the database for a fact, bounded by `LIMIT`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import UUID

import psycopg
import trio
from runtime.workplace import LONG_LEASE

from pgconductor import Conductor, Orchestrator
from pgconductor.tasks import Task

LIMIT = 20.0
"""Seconds in which all that waits for no heartbeat has happened, even on a slow machine."""

Row = tuple[Any, ...]


class Site:
    """See the module's description."""

    def __init__(self, dsn: str, conn: psycopg.Connection[Row]) -> None:
        self.dsn = dsn
        self.conductor = Conductor(dsn)
        self._conn = conn

    def rows(self, query: str, *params: object) -> list[Row]:
        """Execute one statement, a transaction of its own; blocks the loop, and waits for nothing of the engine's."""
        cursor = self._conn.execute(query.encode(), params or None)
        return cursor.fetchall() if cursor.description else []

    def state(self, execution: UUID) -> str | None:
        """How an execution stands, None if there is no row."""
        rows = self.rows("select state::text from pgconductor.executions where id = %s", execution)
        return rows[0][0] if rows else None

    def attempt(self, execution: UUID) -> int:
        """The attempts it has used."""
        return int(self.rows("select attempt from pgconductor.executions where id = %s", execution)[0][0])

    def waits(self, execution: UUID) -> list[Row]:
        """Names and outcomes of the waits of a live execution, by name."""
        return self.rows(
            "select name, outcome from pgconductor._private_waits where execution_id = %s order by name", execution
        )

    def steps(self, execution: UUID) -> list[str]:
        """Names of the steps that a live execution has recorded, oldest first."""
        rows = self.rows(
            "select name from pgconductor._private_steps where execution_id = %s order by position", execution
        )
        return [name for (name,) in rows]

    def children(self, execution: UUID) -> list[Row]:
        """Id, wait, state and reason of an execution's children, by wait."""
        return self.rows(
            "select id, wait_name, state::text, cancel_reason from pgconductor._private_executions where parent_id = %s"
            " union all select f.id, null, f.state::text, f.cancel_reason from pgconductor._private_finished f"
            " where f.parent_id = %s order by 2, 1",
            execution,
            execution,
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until a fact holds, of which no event tells."""
        with trio.fail_after(LIMIT):
            while not condition():
                await trio.sleep(0.002)

    async def until_state(self, execution: UUID, state: str) -> None:
        await self.until(lambda: self.state(execution) == state)

    @asynccontextmanager
    async def running(
        self,
        *tasks: Task[..., Any],
        lease: float = LONG_LEASE,
        concurrency: int = 10,
        grace: float = 30.0,
        queues: Sequence[str] | None = None,
    ) -> AsyncGenerator[Orchestrator]:
        """An orchestrator of these tasks on their queues (or of those named) runs inside the block, and is stopped at
        its end, its handlers too."""
        by_queue: dict[str, list[Task[..., Any]]] = {}
        for task in tasks:
            by_queue.setdefault(task.queue, []).append(task)
        workers = [
            self.conductor.create_worker(queue=queue, tasks=of_queue, concurrency=concurrency, flush_interval=0.01)
            for queue, of_queue in by_queue.items()
            if queues is None or queue in queues
        ]
        orchestrator = Orchestrator(self.conductor, workers=workers, lease=lease, grace=grace, migrate=False)
        async with self.conductor, trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            try:
                yield orchestrator
            finally:
                orchestrator.stop()


@contextmanager
def open_site(dsn: str) -> Iterator[Site]:
    """A site whose session is closed at the end."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        yield Site(dsn, conn)
