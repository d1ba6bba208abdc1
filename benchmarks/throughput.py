"""How fast are no-op executions drained, beside a bare SQL loop that does the same writes? About 3 minutes.

The side to compare with is one process, `async def` handlers, batches that adapt, finished rows kept; each other side
differs from it in one thing. A side is measured with processes of its own on a fresh database, after a warm-up with a
quarter as many executions: all are inserted in one transaction, and the clock runs from its commit to the reply of the
flush that ends the last one, as its process tells within 2 ms. The bare loop is one connection: claim a batch
(committed asynchronously, as the engine's claims are), then move it to the finished table, or delete it where no rows
are kept; no fence, no decoding, no handler.

Beside each rate: CPU per execution, of the processes (of the bare loop: this one) and of the server's backends; WAL per
execution, of the whole server, so nothing else should write to it; and which share of the updates of live rows were
HOT, that is, needed no index entries, the warm-up included.
"""

from __future__ import annotations

import os
import pstats
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg

from . import harness
from ._bare import bare_loop
from .harness import Bench, CpuMeter, Database


@dataclass(frozen=True, slots=True)
class Side:
    """What is measured. `processes`: 0 for the bare loop; `batch`: of a claim and of a flush, None: they adapt.

    `handler`: "async", "plain" (a def, in a thread), or "batch" (one that takes up to `_BATCH_SIZE` executions).
    """

    processes: int = 1
    batch: int | None = None
    keeps_rows: bool = True
    handler: str = "async"

    @property
    def name(self) -> str:
        name = {0: "bare SQL loop", 1: "one process"}.get(self.processes, f"{self.processes} processes")
        if self.processes and self.batch is not None:
            name += f", batches of {self.batch}"
        if not self.keeps_rows:
            name += ", no rows kept"
        match self.handler:
            case "async":
                return name
            case "batch":
                return f"{name}, batch handler of {_BATCH_SIZE}"
            case handler:
                return f"{name}, {handler} handlers"

    @property
    def task(self) -> str:
        return "noop" if self.handler == "async" else self.handler

    @property
    def payload(self) -> str:
        """SQL for the payload of one execution."""
        return "jsonb_build_object('item', n)" if self.handler == "batch" else "jsonb_build_object()"


_BATCH_SIZE = 100
_BASE = Side()


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--count", type=int, default=20_000, help="executions per drain")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[100, 200, 500, 1000, 2000], help="fixed sizes of claims and flushes"
    )
    parser.add_argument("--rows", nargs="+", choices=["kept", "not-kept"], default=["kept", "not-kept"])
    parser.add_argument(
        "--handlers", nargs="+", choices=["async", "plain", "batch"], default=["async", "plain", "batch"],
        help="plain: def, in a thread; batch: one that takes 100 executions at once",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1000, help="rows per statement of the bare loop")
    parser.add_argument("--concurrency", type=int, default=100, help="of each process")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print a worker's N costliest functions")
    options = parser.parse_args()
    sides = list(_sides(options.processes, options.batches, options.rows, options.handlers, options.batch))

    def measure(bench: Bench) -> None:
        profile = bench.folder / "profile" if options.profile else None
        bench.expect(options.runs * len(sides))
        for number in range(options.runs):
            # Forwards and backwards, so that what drifts meanwhile does not favour a side.
            for side in sides if number % 2 == 0 else reversed(sides):
                bench.step(side.name)
                _measure(bench, side, options.count, options.concurrency, profile if side == _BASE else None)
        _conclude(bench, sides)
        if profile is not None and profile.exists():
            pstats.Stats(str(profile)).sort_stats("tottime").print_stats(options.profile)

    harness.run("throughput", options, measure)


def _sides(
    processes: Iterable[int], batches: Iterable[int], rows: Iterable[str], handlers: Iterable[str], bare_batch: int
) -> Iterable[Side]:
    sides = [Side(processes=number) for number in processes] if "kept" in rows else []
    sides += [Side(batch=batch) for batch in batches]
    sides += [Side(handler=handler) for handler in ("plain", "batch") if handler in handlers]
    if "async" not in handlers:
        sides = [side for side in sides if side.handler != "async"]
    for kept in rows:
        if kept == "not-kept" and "async" in handlers:
            sides.append(Side(keeps_rows=False))
        sides.append(Side(processes=0, batch=bare_batch, keeps_rows=kept == "kept"))
    return dict.fromkeys(sides)


def _measure(bench: Bench, side: Side, count: int, concurrency: int, profile: Path | None) -> None:
    with bench.database() as database:
        queue_number = database.register_queue("q")
        warm_up = max(1, count // 4)
        if side.processes:
            _measure_workers(bench, database, side, warm_up, count, concurrency, profile)
        else:
            _measure_bare(bench, database, side, queue_number, warm_up, count)
        database.wait_alone()
        if (hot := database.hot_ratio(queue_number)) is not None:
            bench.note(f"{side.name}: HOT updates", hot, "of 1")
        if side.keeps_rows:
            if database.value("select count(*) from pgconductor._private_finished where slot <> 0"):
                bench.problem(f"{side.name}: finished rows were not kept for ever")
            database.check_exactly_once(warm_up + count)


def _measure_workers(
    bench: Bench, database: Database, side: Side, warm_up: int, count: int, concurrency: int, profile: Path | None
) -> None:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                harness.worker(
                    database.dsn, "q", concurrency=concurrency, sweep=60.0, report_interval=0.002 * side.processes,
                    batch=side.batch, keeps_rows=side.keeps_rows, profile=profile, is_awaited=False,
                    batch_size=_BATCH_SIZE if side.handler == "batch" else None,
                )
            )
            for _ in range(side.processes)
        ]  # fmt: skip
        for worker in workers:
            harness.wait_ready(worker)
        database.invoke_many(side.task, warm_up, "q", side.payload)
        before = harness.wait_completed(workers, warm_up)
        costs = _Costs(database, [worker.pid for worker in workers])
        database.invoke_many(side.task, count, "q", side.payload)
        costs.begin()
        committed_at = time.monotonic_ns()
        done = harness.wait_completed(workers, warm_up + count)
        costs.note(bench, side, count)
        bench.note(side.name, count / ((done.at - committed_at) / 1e9), "executions/s")
        news = done.since(before)
        bench.note(f"{side.name}: per claim", count / max(1, news.claims - news.empty_claims), "executions")
        bench.note(f"{side.name}: per flush", count / max(1, news.flushes), "executions")
        if not side.keeps_rows:
            database.check_completed(warm_up + count, done.number)


def _measure_bare(
    bench: Bench, database: Database, side: Side, queue_number: int, warm_up: int, count: int
) -> None:  # fmt: skip
    assert side.batch is not None
    with psycopg.connect(database.dsn, autocommit=True) as conn:
        database.invoke_many("noop", warm_up, "q")
        bare_loop(conn, queue_number, warm_up, side.batch, keeps_rows=side.keeps_rows)
        database.invoke_many("noop", count, "q")
        costs = _Costs(database, [os.getpid()])
        costs.begin()
        seconds = bare_loop(conn, queue_number, count, side.batch, keeps_rows=side.keeps_rows)
        costs.note(bench, side, count)
        bench.note(side.name, count / seconds, "executions/s")
        if not side.keeps_rows:
            database.check_completed(warm_up + count, warm_up + count)  # the loop has compared what it deleted


class _Costs:
    """CPU and WAL of one drain. Made before its rows are inserted, since looking takes a moment; `begin` after."""

    def __init__(self, database: Database, pids: Iterable[int]) -> None:
        self._database = database
        self._cpu = CpuMeter(database, pids)
        self._wal = 0

    def begin(self) -> None:
        self._wal = self._database.wal_position()

    def note(self, bench: Bench, side: Side, count: int) -> None:
        used = {"process": self._cpu.processes(), "server": self._cpu.server()}
        wal = self._database.wal_position() - self._wal
        for whose, seconds in used.items():
            if seconds is not None:
                bench.note(f"{side.name}: CPU of {whose}", 1e6 * seconds / count, "µs/execution")
        bench.note(f"{side.name}: WAL", wal / count, "bytes/execution")


def _conclude(bench: Bench, sides: Iterable[Side]) -> None:
    """Note the ratios to the bare loops and to the one process, and draw."""
    measured = set(sides)
    for side in sides:
        if not side.processes:
            other = Side(keeps_rows=side.keeps_rows)
            if other in measured:
                bench.ratio(f"{other.name} / {side.name}", other.name, side.name)
        elif side != _BASE and _BASE in measured:
            bench.ratio(f"{side.name} / one process", side.name, _BASE.name)
    others = [side for side in sides if side.processes == 0 or side.batch is None]
    bench.bars(
        "throughput_rate", title="Drain of no-op executions", y="executions/s",
        groups={side.name: {"rate": bench.median(side.name)} for side in others},
    )  # fmt: skip
    bench.bars(
        "throughput_cpu", title="CPU of an execution", y="µs",
        groups={
            side.name: {
                whose: bench.median(label)
                for whose in ("process", "server")
                if bench.samples(label := f"{side.name}: CPU of {whose}")
            }
            for side in others
        },
    )  # fmt: skip
    batches = sorted((side.batch, side.name) for side in sides if side.processes and side.batch is not None)
    if batches:
        adaptive = (
            {"adaptive": [(batch, bench.median(_BASE.name)) for batch, _ in batches]} if _BASE in measured else {}
        )
        bench.lines(
            "throughput_batches", title="Drain by one process", x="executions per claim and flush at most",
            y="executions/s", log_x=True,
            series={"fixed": [(batch, bench.median(name)) for batch, name in batches], **adaptive},
        )  # fmt: skip


if __name__ == "__main__":
    main()
