"""How fast does one process drain no-op executions, finished rows kept, beside a bare SQL loop on the same tables?

Both sides in each run, in turn, on one database: the rows are inserted in one transaction, and the clock runs from its
commit to the reply of the flush that ends the last one. The bare loop is one connection: claim a batch (committed
asynchronously, as the engine's claims are), then move it to the finished table; no fence, no decoding, no handler.
"""

from __future__ import annotations

import pstats
import time

import psycopg

from . import harness
from ._bare import bare_loop
from .harness import Bench, Database


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--count", type=int, default=20_000, help="executions per drain")
    parser.add_argument("--batch", type=int, default=1000, help="rows per statement of the bare loop")
    parser.add_argument("--concurrency", type=int, default=100, help="of the worker")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the worker's N costliest functions")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        with bench.database() as database:
            numbers = database.register_queue("engine"), database.register_queue("bare")
            profile = bench.folder / "profile" if options.profile else None
            count: int = options.count
            with (
                harness.worker(
                    database.dsn, "engine", concurrency=options.concurrency, sweep=60.0, report_every=count,
                    profile=profile,
                ) as worker,
                psycopg.connect(database.dsn, autocommit=True) as conn,
            ):  # fmt: skip
                claims = flushes = 0
                for number in range(options.runs + 1):
                    database.invoke_many("noop", count, "engine")
                    committed_at = time.monotonic_ns()
                    completed_at, *statements = map(int, worker.line(timeout=300)[2:])
                    database.invoke_many("noop", count, "bare")
                    bare_seconds = bare_loop(conn, numbers[1], count, options.batch)
                    if number:  # the first is the warm-up
                        bench.note("one process", count / ((completed_at - committed_at) / 1e9), "executions/s")
                        bench.note("bare SQL loop", count / bare_seconds, "rows/s")
                        bench.note("one process, per claim", count / (statements[0] - claims), "executions")
                        bench.note("one process, per flush", count / (statements[1] - flushes), "executions")
                    claims, flushes = statements
            bench.ratio("one process / bare SQL loop", "one process", "bare SQL loop")
            _check_kept(bench, database)
            database.check_exactly_once(2 * count * (options.runs + 1))
            if profile is not None:
                pstats.Stats(str(profile)).sort_stats("tottime").print_stats(options.profile)

    harness.run("throughput", options, measure)


def _check_kept(bench: Bench, database: Database) -> None:
    if database.value("select count(*) from pgconductor._private_finished where slot <> 0"):
        bench.problem("finished rows were not kept for ever on both sides")


if __name__ == "__main__":
    main()
