"""Does a claim cost the same whatever lies around: other queues, future, finished and ready executions, dead rows?

One connection to each of two databases of the same server calls `claim` and `flush` as a worker does, without a worker:
one in a database that stays empty but for what is claimed, one in a database that is filled step by step. Their claims
take turns, one by one, so that what the machine does meanwhile happens to both. In each situation: claims of one batch,
and claims that find nothing; where there is a backlog of ready ones, no claim is empty.

The situations add up: other queues, each a partition with ten executions far in the future; executions far in the
future on the measured queue; finished ones; ready ones, in growing numbers, which are then removed. Then churn: for a
while batches are inserted, claimed and finished as fast as it goes, with autovacuum as it is set (it looks once a
minute by default, so a shorter churn may pass unseen). With `--forget` its rows are not kept, only counted. Then churn
once more, with a transaction that holds its snapshot until the claims have been measured, so that no dead row can be
removed.

Future, ready and finished rows are written by a few large statements straight into the tables, without the trigger, and
vacuumed and analysed before anything is measured, so that autovacuum does not do it meanwhile; so are both queues
before each run, which leaves as many dead rows in either. After churn nothing is.
The defaults are the full sizes; they need about 6 GB of disk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from pgconductor.db.calls import Calls, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.model import Claimed, Outcome

from . import harness
from .harness import Bench, Connection, Database

_QUEUE = "measured"
_A_DAY = 86_400.0
_CALLS = Calls("pgconductor")
_AT_ONCE = 500_000  # rows of a filling statement
_CHURN = 1000  # executions of a turn


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--queues", type=int, nargs="*", default=[300], help="greater numbers of queues, rising")
    parser.add_argument("--future", type=int, default=1_000_000, help="executions far in the future")
    parser.add_argument("--finished", type=int, default=10_000_000, help="executions that have finished")
    parser.add_argument("--ready", type=int, nargs="*", default=[100_000, 1_000_000], help="ready executions, rising")
    parser.add_argument("--churn", type=float, default=70.0, help="seconds of each churn, 0: none at all")
    parser.add_argument("--churn-under-snapshot", type=float, help="of the second one (default: the same)")
    parser.add_argument(
        "--forget", action="store_true", help="keep no row of a churn: an hour of it has some 100 million"
    )
    parser.add_argument("--claims", type=int, default=100, help="claims of each kind, per run")
    parser.add_argument("--batch", type=int, default=100, help="executions per claim")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        bench.expect(3 + len(options.queues) + len(options.ready) + 4 * (options.churn > 0))
        with ExitStack() as stack:
            empty, full = (stack.enter_context(bench.database()) for _ in range(2))
            pair = _Pair(bench, empty, full, options.claims, options.batch, stack)
            pair.measure("nothing", options.runs)
            others = 1
            for queues in options.queues:
                pair.add_queues(queues - others)
                others = queues
                pair.measure(f"{queues} queues", options.runs)
            pair.add_future(options.future)
            pair.measure(f"{options.future:,} future", options.runs)
            pair.add_finished(options.finished)
            pair.measure(f"{options.future:,} future, {options.finished:,} finished", options.runs)
            for ready in options.ready:
                pair.make_ready(ready)
                pair.measure(f"{ready:,} ready", options.runs, with_empty=False)
            pair.remove_ready()
            if options.churn:
                pair.churn(options.churn, options.forget)
                pair.measure("after churn", options.runs, is_vacuumed=False)
                holder = stack.enter_context(psycopg.connect(pair.full.database.dsn))
                holder.execute("set transaction isolation level repeatable read")
                holder.execute("select count(*) from pgconductor._private_queues")  # takes the snapshot
                second = options.churn_under_snapshot
                pair.churn(options.churn if second is None else second, options.forget)
                pair.measure("after churn, old snapshot", options.runs, is_vacuumed=False)
                holder.rollback()
            pair.check()
            pair.report()

    harness.run("backlog", options, measure)


class _Claimer:
    """A worker by hand, on one database."""

    def __init__(self, bench: Bench, database: Database, conn: Connection) -> None:
        self._bench = bench
        self.database = database
        self._conn = conn
        self._owner: UUID = uuid4()
        self.inserted = self.finished = self.forgotten = 0
        self.number = database.register_queue(_QUEUE)
        row = WorkerRow(_QUEUE, ["noop"], 100)
        run_sync(conn, _CALLS.register_orchestrator(self._owner, "by hand", 7200.0, "0", 1, [row]))

    def claim(self, limit: int) -> tuple[list[Claimed], float]:
        """Returns what was claimed, and the seconds that it took."""
        begun = time.perf_counter()
        call = _CALLS.claim(_QUEUE, self._owner, ["noop"], limit, self.number)
        claimed = run_sync(self._conn, call).claimed
        return claimed, time.perf_counter() - begun

    def finish(self, claimed: list[Claimed], *, is_kept: bool = True) -> None:
        keep = None if is_kept else 0.0
        outcomes = [Outcome(item.id, item.claim_no, "completed", "null", keep=keep) for item in claimed]
        if run_sync(self._conn, _CALLS.flush(self._owner, outcomes)):
            self._bench.problem("a flush was refused")
        self.finished += len(outcomes)
        if not is_kept:
            self.forgotten += len(outcomes)

    def insert(self, count: int) -> None:
        self.database.invoke_many("noop", count, _QUEUE)
        self.inserted += count

    def vacuum(self) -> None:
        table = sql.Identifier("pgconductor", f"_private_queue_{self.number}")
        self._conn.execute(sql.SQL("vacuum (analyze) {}").format(table))

    def finish_all(self) -> None:
        while claimed := self.claim(_CHURN)[0]:
            self.finish(claimed)


class _Pair:
    """A database that stays empty, and one that is filled; in both the same claims are measured, in turns."""

    def __init__(
        self, bench: Bench, empty: Database, full: Database, claims: int, batch: int, stack: ExitStack
    ) -> None:
        self._bench = bench
        self._claims = claims
        self._batch = batch
        self._empty, self.full = (
            _Claimer(bench, database, stack.enter_context(psycopg.connect(database.dsn, autocommit=True)))
            for database in (empty, full)
        )
        self._scheduled = 0  # rows of the full database that nobody is to run
        self._filled = 0  # finished rows that were written there
        self._ready = 0  # ready ones that were written there
        self._situations: list[str] = []

    # Filling

    def add_queues(self, count: int) -> None:
        """Register queues, with ten executions each, far in the future so that nobody has to run them."""
        database = self.full.database
        began = time.monotonic()
        for _ in range(count):
            name = f"other {self._scheduled}"
            for _ in range(10):
                try:
                    database.register_queue(name)
                    break
                except psycopg.OperationalError:  # a lock that was not to be had
                    continue
            database.invoke_many("noop", 10, name, delay=_A_DAY)
            self._scheduled += 10
        database.conn.execute("analyze")
        self._bench.say(f"{count} queues in {time.monotonic() - began:.0f} s")

    def add_future(self, count: int) -> None:
        self._fill_live("scheduled", count, "clock_timestamp() + interval '1 day' + n * interval '1 ms'")
        self._scheduled += count

    def make_ready(self, count: int) -> None:
        """Have so many ready executions at least."""
        left = self.full.database.value(
            "select count(*) from pgconductor._private_executions where queue_no = %s and state = 'ready'",
            self.full.number,
        )
        self._fill_live("ready", count - left, "clock_timestamp()")
        self._ready += count - left

    def _fill_live(self, state: str, count: int, run_at: str) -> None:
        table = f"pgconductor._private_queue_{self.full.number}"
        conn = self.full.database.conn
        conn.execute(f"alter table {table} disable trigger _private_announce".encode())
        self._fill(
            count,
            f"""insert into {table} (queue_no, id, queue, task, state, run_at, created_at, payload)
                select %(no)s, pgconductor._private_new_id(%(no)s::int, clock_timestamp()), %(queue)s, 'noop',
                    %(state)s::pgconductor.execution_state, {run_at}, now(), '{{}}'
                from generate_series(%(first)s::int, %(last)s::int) n""",
            {"no": self.full.number, "queue": _QUEUE, "state": state},
        )
        conn.execute(f"alter table {table} enable trigger _private_announce".encode())
        conn.execute(f"vacuum (analyze) {table}".encode())

    def add_finished(self, count: int) -> None:
        """Executions that are kept for ever, as of this queue."""
        self._fill(
            count,
            """insert into pgconductor._private_finished (slot, priority, attempt, crashes, generation, depth, state,
                    id, claim_no, run_at, created_at, claimed_at, finished_at, queue, task, payload, result)
                select 0, 0, 1, 0, 0, 0, 'completed', pgconductor._private_new_id(%(no)s::int, clock_timestamp()), 1,
                    now(), now(), now(), now(), %(queue)s, 'noop', '{}', 'null'
                from generate_series(%(first)s::int, %(last)s::int) n""",
            {"no": self.full.number, "queue": _QUEUE},
        )
        self._filled += count
        self.full.database.conn.execute("vacuum (analyze) pgconductor._private_finished_0")

    def _fill(self, count: int, statement: str, parameters: dict[str, object]) -> None:
        began = time.monotonic()
        for first in range(0, count, _AT_ONCE):
            rows = {"first": first, "last": min(count, first + _AT_ONCE) - 1}
            self.full.database.conn.execute(statement.encode(), {**parameters, **rows})
        self._bench.say(f"{count:,} rows in {time.monotonic() - began:.0f} s")

    def remove_ready(self) -> None:
        """Remove what is left of the ready ones; each that was written is claimed and finished, or still there."""
        table = sql.Identifier("pgconductor", f"_private_queue_{self.full.number}")
        conn = self.full.database.conn
        removed = conn.execute(sql.SQL("delete from {} where state = 'ready'").format(table)).rowcount
        self._ready -= removed
        conn.execute(sql.SQL("vacuum (analyze) {}").format(table))

    def churn(self, seconds: float, is_forgotten: bool) -> None:
        """Insert, claim and finish as fast as it goes."""
        self._bench.step(f"churn of {seconds:g} s")
        deadline = time.monotonic() + seconds
        before = self.full.finished
        while time.monotonic() < deadline:
            self.full.insert(_CHURN)
            self.full.finish(self.full.claim(_CHURN)[0], is_kept=not is_forgotten)
        self._bench.note("executions of a churn", self.full.finished - before, "")
        table = f"_private_queue_{self.full.number}"
        vacuums, dead = self.full.database.conn.execute(
            b"select autovacuum_count, n_dead_tup from pg_stat_user_tables where relname = %s", (table,)
        ).fetchall()[0]
        self._bench.say(f"after churn: {vacuums} autovacuums of the queue's partition, {dead:,} dead rows in it")

    # Measuring

    def measure(self, situation: str, runs: int, *, with_empty: bool = True, is_vacuumed: bool = True) -> None:
        """Measure claims in both databases; where ready ones lie about, no claim is empty."""
        self._bench.step(situation)
        self._situations.append(situation)
        both = (self._empty, self.full)
        for _ in range(runs):
            took: dict[_Claimer, list[float]] = {claimer: [] for claimer in both}
            for claimer in both:
                if is_vacuumed:
                    claimer.vacuum()
                claimer.insert(self._claims * self._batch)
            for number in range(self._claims):
                for claimer in both if number % 2 == 0 else both[::-1]:
                    claimed, seconds = claimer.claim(self._batch)
                    took[claimer].append(seconds)
                    if len(claimed) != self._batch:
                        self._bench.problem(f"a claim brought {len(claimed)} instead of {self._batch}")
                    claimer.finish(claimed)
            self._note(situation, f"claim of {self._batch}", took)
            if not with_empty:
                continue
            took = {claimer: [] for claimer in both}
            for number in range(self._claims):
                for claimer in both if number % 2 == 0 else both[::-1]:
                    claimed, seconds = claimer.claim(self._batch)
                    took[claimer].append(seconds)
                    if claimed:
                        self._bench.problem("an empty claim was not empty")
                        claimer.finish(claimed)
            self._note(situation, "empty claim", took)

    def _note(self, situation: str, kind: str, took: Mapping[_Claimer, Sequence[float]]) -> None:
        for claimer, seconds in took.items():
            side = "there" if claimer is self.full else "empty database"
            for name, share in (("p50", 0.5), ("p99", 0.99)):
                figure = 1000 * harness.percentile(seconds, share)
                self._bench.note(f"{situation}: {kind}, {side}, {name}", figure, "ms")

    def report(self) -> None:
        """Ratios to the empty database, and the bars."""
        groups: dict[str, dict[str, float]] = {}
        for situation in self._situations:
            bars = groups[situation] = {}
            for kind in (f"claim of {self._batch}", "empty claim"):
                for name in ("p50", "p99"):
                    there, empty = (f"{situation}: {kind}, {side}, {name}" for side in ("there", "empty database"))
                    if self._bench.samples(there):
                        self._bench.ratio(f"{situation}: {kind}, {name}, / empty database", there, empty)
                        if name == "p50":
                            bars[f"{kind}, there"] = self._bench.median(there)
                            bars[f"{kind}, empty database"] = self._bench.median(empty)
        self._bench.bars("backlog", title="A claim by what lies around", y="ms, p50", groups=groups)

    def check(self) -> None:
        """Everything that was inserted or written has finished once, or is still to come."""
        for claimer in (self._empty, self.full):
            claimer.finish_all()
        # What was written as ready and not removed was claimed, and so finished.
        self._empty.database.check_exactly_once(self._empty.finished)
        kept = self.full.finished - self.full.forgotten + self._filled
        self.full.database.check_exactly_once(kept, scheduled=self._scheduled)
        if self.full.finished != self.full.inserted + self._ready:
            self._bench.problem(f"{self.full.finished} finished of {self.full.inserted + self._ready}")


if __name__ == "__main__":
    main()
