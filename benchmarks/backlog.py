"""Does a claim cost the same whatever lies around: 1 or 300 queues, 100,000 ready and 100,000 future executions?

One connection calls `claim` and `flush` as a worker does, without a worker: claims of one batch and empty claims, in
each situation. "300 queues" have a partition each, with some executions in it.
"""

from __future__ import annotations

import time
from uuid import UUID, uuid4

import psycopg

from pgconductor.db.calls import Calls, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.model import Claimed, Outcome

from . import harness
from .harness import Bench, Connection, Database

_QUEUE = "measured"
_A_DAY = 86_400.0
_CALLS = Calls("pgconductor")


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--queues", type=int, default=300, help="the greater number of queues")
    parser.add_argument("--backlog", type=int, default=100_000, help="the greater number of executions")
    parser.add_argument("--claims", type=int, default=100, help="claims of each kind, per run")
    parser.add_argument("--batch", type=int, default=100, help="executions per claim")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        with bench.database() as database, psycopg.connect(database.dsn, autocommit=True) as conn:
            claimer = _Claimer(bench, database, conn, options.claims, options.batch)
            many = f"{options.queues} queues"
            future = f"{many}, {options.backlog} future"
            ready = f"{future}, {options.backlog} ready"
            others = 0
            for name in ("1 queue", many, future):
                if name == many:
                    others += _add_queues(database, options.queues - 1)
                elif name == future:
                    others += options.backlog
                    database.invoke_many("noop", options.backlog, _QUEUE, delay=_A_DAY)
                database.conn.execute("analyze")
                for _ in range(options.runs):
                    claimer.measure_batches(name)
                    claimer.measure_empty(name)
            database.invoke_many("noop", options.backlog, _QUEUE)
            database.conn.execute("analyze")
            for _ in range(options.runs):
                claimer.measure_batches(ready)
            claimer.finish_all()
            database.check_exactly_once(claimer.finished, scheduled=others)
            kind = f"claim of {options.batch}"
            for name in (many, future, ready):
                bench.ratio(f"{kind}, {name} / 1 queue", f"{kind}, {name}", f"{kind}, 1 queue")

    harness.run("backlog", options, measure)


def _add_queues(database: Database, count: int) -> int:
    """Register queues, with ten executions each, far in the future so that nobody has to run them."""
    for number in range(count):
        name = f"other {number}"
        for _ in range(10):
            try:
                database.register_queue(name)
                break
            except psycopg.OperationalError:  # a lock that was not to be had
                continue
        database.invoke_many("noop", 10, name, delay=_A_DAY)
    return 10 * count


class _Claimer:
    """A worker by hand."""

    def __init__(self, bench: Bench, database: Database, conn: Connection, claims: int, batch: int) -> None:
        self._bench = bench
        self._database = database
        self._conn = conn
        self._claims = claims
        self._batch = batch
        self._owner: UUID = uuid4()
        self.finished = 0
        database.register_queue(_QUEUE)
        row = WorkerRow(_QUEUE, ["noop"], batch)
        run_sync(conn, _CALLS.register_orchestrator(self._owner, "by hand", 3600.0, "0", 1, [row]))

    def _claim(self) -> tuple[list[Claimed], float]:
        begun = time.perf_counter()
        claimed = run_sync(self._conn, _CALLS.claim(_QUEUE, self._owner, ["noop"], self._batch)).claimed
        return claimed, time.perf_counter() - begun

    def _finish(self, claimed: list[Claimed]) -> None:
        outcomes = [Outcome(item.id, item.claim_no, "completed", "null") for item in claimed]
        if run_sync(self._conn, _CALLS.flush(self._owner, outcomes)):
            self._bench.problem("a flush was refused")
        self.finished += len(outcomes)

    def measure_batches(self, name: str) -> None:
        """Claim batches; what is claimed is finished, and replaced, outside the measured time."""
        self._database.invoke_many("noop", self._claims * self._batch, _QUEUE)
        took: list[float] = []
        for _ in range(self._claims):
            claimed, seconds = self._claim()
            took.append(seconds)
            if len(claimed) != self._batch:
                self._bench.problem(f"a claim brought {len(claimed)} instead of {self._batch}")
            self._finish(claimed)
        self._bench.note(f"claim of {self._batch}, {name}", 1000 * harness.percentile(took, 0.5), "ms")

    def measure_empty(self, name: str) -> None:
        took: list[float] = []
        for _ in range(self._claims):
            claimed, seconds = self._claim()
            took.append(seconds)
            if claimed:
                self._bench.problem("an empty claim was not empty")
                self._finish(claimed)
        self._bench.note(f"empty claim, {name}", 1000 * harness.percentile(took, 0.5), "ms")

    def finish_all(self) -> None:
        while claim := run_sync(self._conn, _CALLS.claim(_QUEUE, self._owner, ["noop"], 1000)).claimed:
            self._finish(claim)


if __name__ == "__main__":
    main()
