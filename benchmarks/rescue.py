"""Two orchestrators on one queue, one killed in mid-work: what is lost, what is done twice, how long does it take?

SIGKILL, default lease. Every execution must end up in the finished table once; handlers may have started more often
than there are executions only by those in flight at the kill. The rescue time runs from the kill to the start of each
handler of those executions in the surviving process.
"""

from __future__ import annotations

import time

from psycopg.conninfo import make_conninfo

from . import harness
from .harness import Bench, BenchmarkError

_QUEUE = "rescue"
_VICTIM = "benchmark victim"


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--count", type=int, default=4000, help="executions")
    parser.add_argument("--seconds", type=float, default=0.02, help="how long each handler takes")
    parser.add_argument("--concurrency", type=int, default=20, help="of each of the two workers")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        for number in range(options.runs):
            _kill_one(bench, number, options.count, options.seconds, options.concurrency)

    harness.run("rescue", options, measure)


def _kill_one(bench: Bench, number: int, count: int, seconds: float, concurrency: int) -> None:
    files = [bench.folder / f"starts-{number}-{name}" for name in ("killed", "survivor")]
    with (
        bench.database() as database,
        harness.worker(
            make_conninfo(database.dsn, application_name=_VICTIM), _QUEUE, concurrency=concurrency, starts=files[0]
        ) as killed,
    ):
        victim = database.value("select id from pgconductor._private_orchestrators")
        with harness.worker(database.dsn, _QUEUE, concurrency=concurrency, starts=files[1]):
            database.invoke_many("stamp", count, _QUEUE, f"jsonb_build_object('n', n, 'seconds', {seconds})")
            deadline = time.monotonic() + 60
            while len(harness.read_starts(files[0])) < count // 8:
                if time.monotonic() > deadline:
                    raise BenchmarkError("the process to be killed did not get to work")
                time.sleep(0.005)
            killed_at = killed.kill()
            # Statements that were under way may still commit: look when the dead process's sessions have ended.
            while database.value("select exists (select from pg_stat_activity where application_name = %s)", _VICTIM):
                time.sleep(0.005)
            in_flight = {
                int(n)
                for (n,) in database.conn.execute(
                    "select (payload->>'n')::int from pgconductor._private_executions where state = 'running'"
                    " and owner = %s", (victim,),
                )
            }  # fmt: skip
            database.wait_drained(timeout=120)
        first, second = (harness.read_starts(path) for path in files)
        begun = {n for n, _ in first}
        restarts = sorted((at - killed_at) / 1e9 for n, at in second if n in in_flight)
        bench.note("executions", count, "")
        bench.note("in flight at the kill", len(in_flight), "")
        bench.note("of these begun", len(in_flight & begun), "")
        bench.note("handler starts", len(first) + len(second), "")
        if len(first) + len(second) > count + len(in_flight):
            bench.problem(
                f"{len(first) + len(second)} handler starts for {count} executions and {len(in_flight)} in flight"
            )
        if not in_flight:
            bench.problem("nothing was in flight at the kill: use more executions, or longer ones")
        elif len(restarts) != len(in_flight):
            bench.problem(f"{len(restarts)} of {len(in_flight)} executions in flight were started again")
        else:
            bench.note("kill → handler started again, first", restarts[0], "s")
            bench.note("kill → handler started again, last", restarts[-1], "s")
        database.check_exactly_once(count)


if __name__ == "__main__":
    main()
