"""What do 10,000 children of one durable nursery cost, and how soon does a parent know that one has failed?

One worker process runs the parent and its children. Transactions are counted by the server (`pg_stat_database`), all of
the worker's; memory is the process's greatest resident size, less what it is when it has run a parent of one child. A
failing child: its siblings are due in an hour, and are cancelled in the database; the time is from the child's `raise`
to the parent's `except`, in which all siblings have ended.
"""

from __future__ import annotations

import time
from pathlib import Path

from . import harness
from .harness import Bench, Database, Process


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--children", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=100)
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        for run in range(options.runs):
            _measure_success(bench, options.children, options.concurrency, bench.folder / f"times-{run}")
            for children in (10, options.children):
                _measure_failure(bench, children, options.concurrency, bench.folder / f"times-{run}-{children}")

    harness.run("fanout", options, measure)


def _run_parent(database: Database, children: int, *, failing: bool) -> float:
    """Seconds from the invocation to the parent's end."""
    begun = time.monotonic()
    database.value(
        "select pgconductor.invoke('parent', jsonb_build_object('children', %s, 'failing', %s), 'parents')",
        children,
        failing,
    )
    database.wait_drained(600.0)
    return time.monotonic() - begun


def _transactions(database: Database) -> int:
    database.value("select pg_stat_force_next_flush()")
    return int(database.value("select xact_commit from pg_stat_database where datname = current_database()"))


def _measure_success(bench: Bench, children: int, concurrency: int, times: Path) -> None:
    with bench.database() as database, Process("_fanout_worker", database.dsn, concurrency, times) as worker:
        worker.line()
        _run_parent(database, 1, failing=False)
        idle, before = worker.peak_memory(), _transactions(database)
        seconds = _run_parent(database, children, failing=False)
        time.sleep(1.5)  # the worker's sessions report what they did
        bench.note(f"{children} children: all ended after", seconds, "s")
        bench.note(f"{children} children: transactions per child", (_transactions(database) - before) / children, "")
        bench.note(f"{children} children: memory of the process", (worker.peak_memory() - idle) / 2**20, "MiB more")
        worker.end()
        result = database.value("select max(result::text) from pgconductor._private_finished where task = 'parent'")
        if int(result) != children * (children - 1) // 2:
            bench.problem(f"the parent returned {result}")
        database.check_exactly_once(children + 3)


def _measure_failure(bench: Bench, children: int, concurrency: int, times: Path) -> None:
    with bench.database() as database, Process("_fanout_worker", database.dsn, concurrency, times) as worker:
        worker.line()
        _run_parent(database, children, failing=True)
        worker.end()
        at = {event: int(ns) for event, ns in (line.split() for line in times.read_text().splitlines())}
        bench.note(
            f"one of {children + 1} fails: raise → the parent's except", (at["caught"] - at["failed"]) / 1e6, "ms"
        )
        cancelled = database.value("select count(*) from pgconductor._private_finished where state = 'cancelled'")
        if cancelled != children:
            bench.problem(f"{cancelled} of {children} siblings were cancelled")


if __name__ == "__main__":
    main()
