"""Ends executions by the SQL verbs, in place of an orchestrator: what these tests need of one."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from uuid import UUID, uuid4

import psycopg

from pgconductor.db.calls import Calls, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.model import Claimed, Outcome


class WorkerByHand:
    """Claims and finishes executions of one queue, on a connection of its own."""

    def __init__(
        self, conn: psycopg.Connection[tuple[object, ...]], calls: Calls, queue: str, tasks: list[str]
    ) -> None:
        self.conn = conn
        self.calls = calls
        self.queue = queue
        self.tasks = tasks
        self.owner = uuid4()
        run_sync(conn, calls.register_queue(queue))
        row = WorkerRow(queue, tasks, 10)
        run_sync(conn, calls.register_orchestrator(self.owner, "by hand", 600.0, "0", 1, [row]))

    def claim(self, limit: int = 100) -> list[Claimed]:
        """Claim what is ready."""
        return run_sync(self.conn, self.calls.claim(self.queue, self.owner, self.tasks, limit)).claimed

    def complete(self, claimed: Claimed, result: object = None, keep: float | None = None) -> None:
        """End an execution with a result, which is kept for `keep` seconds."""
        self._end(Outcome(claimed.id, claimed.claim_no, "completed", json.dumps(result), keep=keep))

    def fail(self, claimed: Claimed, **error: str) -> None:
        """End an execution with an error record."""
        self._end(Outcome(claimed.id, claimed.claim_no, "failed", error=json.dumps(error)))

    def _end(self, outcome: Outcome) -> None:
        assert run_sync(self.conn, self.calls.flush(self.owner, [outcome])) == {}

    def finish_all(self, result: object = None) -> set[UUID]:
        """Claim what is ready and complete it, in one flush."""
        claimed = self.claim(10_000)
        outcomes = [Outcome(c.id, c.claim_no, "completed", json.dumps(result)) for c in claimed]
        if outcomes:
            assert run_sync(self.conn, self.calls.flush(self.owner, outcomes)) == {}
        return {c.id for c in claimed}


@contextmanager
def open_worker(
    dsn: str, tasks: list[str], queue: str = "default", schema: str = "pgconductor"
) -> Generator[WorkerByHand]:
    """Register an orchestrator with one worker, for the block."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        yield WorkerByHand(conn, Calls(schema), queue, tasks)
