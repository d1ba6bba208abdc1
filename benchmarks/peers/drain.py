"""How fast do one and several processes drain no-op jobs, beside public job queues?

The sides take turns in each run, each on a fresh database of the same server. All jobs are there before the workers
start and the tables are analysed in between. While the workers start, the table of jobs is locked against claims;
the clock runs from the release of that lock to the moment when nothing unfinished is in the table, for all sides
alike: whether a side keeps its finished jobs or deletes them, what it has to store is stored. That all handlers began
is said by the workers; only then the table is asked, every 5 ms. Each worker's own list of what it started must have
each job once, and so must the tables where they keep jobs. `make bench-peers` installs the peers; what is not
installed is left out. With its defaults it takes about 5 minutes.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psycopg
from psycopg import sql

from .. import harness
from .._bare import bare_loop
from ..harness import Bench, BenchmarkError, Database, Process
from .marks import read_starts
from .sides import SIDES, Side, choose

BARE = "bare SQL loop"


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--jobs", type=int, default=40_000, help="per side and run; slow sides drain a share of them")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="workers of each side")
    parser.add_argument("--peers", nargs="+", choices=[*SIDES, "bare"], default=[*SIDES, "bare"], help="the sides")
    parser.add_argument("--set", nargs="+", default=[], metavar="SIDE.NAME=JSON", help="replace or add a setting")
    parser.add_argument("--batch", type=int, default=1000, help="rows per statement of the bare loop")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one drain may take")
    options = parser.parse_args()
    jobs: int = options.jobs

    def measure(bench: Bench) -> None:
        sides = choose(bench, options.peers, options.set)
        counts = {side.name: max(1, round(jobs * side.share)) for side in sides}
        bench.facts["jobs"] = counts
        bench.expect(options.runs * len(options.processes) * len(sides))
        for _ in range(options.runs):
            for processes in options.processes:
                for side in sides:
                    bench.step(_label(side.name, processes))
                    with bench.database() as database:
                        _measure(database, side, counts[side.name], processes, options.timeout)
            if "bare" in options.peers:
                with bench.database() as database:
                    _measure_bare(database, jobs, options.batch)
        _report(bench, sides, options.processes)

    harness.run("peers.drain", options, measure)


def _measure(database: Database, side: Side, count: int, processes: int, timeout: float) -> None:
    bench = database.bench
    side.prepare(database)
    side.enqueue(database, count)
    database.conn.execute("vacuum analyze")
    paths = [bench.folder / f"starts-{database.name}-{number}" for number in range(processes)]
    with ExitStack() as stack:
        with psycopg.connect(database.dsn) as gate:
            gate.execute(sql.SQL("lock table {} in exclusive mode").format(_identifier(side.gate)))
            workers = [stack.enter_context(side.start(database, path)) for path in paths]
            for worker in workers:
                if worker.line() != ["ready"]:
                    raise BenchmarkError(f"the worker of {side.name} does not get ready")
            _wait_for_claims(database, side, processes)
            began = time.monotonic()
            gate.commit()
        deadline = began + timeout
        wait_started(workers, count, deadline, side.name)
        while not side.is_done(database):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{side.name}: all started, but not all finished within {timeout:g} s")
            time.sleep(0.005)
        seconds = time.monotonic() - began
        memory = sum(worker.peak_memory() for worker in workers)
    _check(database, side, count, paths)
    label = _label(side.name, processes)
    bench.note(label, count / seconds, "jobs/s")
    bench.note(f"{label}, peak memory of the workers", memory / 2**20, "MiB")


def _identifier(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split("."))


def _wait_for_claims(database: Database, side: Side, processes: int, timeout: float = 30.0) -> None:
    """Wait until as many sessions as there are workers want to take jobs and the number of them is stable."""
    query = """
        select count(distinct pid) from pg_locks
        where not granted and database = (select oid from pg_database where datname = current_database())
    """
    deadline = time.monotonic() + timeout
    seen = stable = 0
    while not (seen >= processes and stable >= 4):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{side.name}: {seen} sessions want to take jobs, not {processes}")
        time.sleep(0.05)
        now = int(database.value(query))
        stable = stable + 1 if now == seen else 0
        seen = now


def wait_started(workers: list[Process], count: int, deadline: float, name: str) -> None:
    """Wait until the workers have started `count` jobs by their own account."""
    started = dict.fromkeys(workers, 0)
    while sum(started.values()) < count:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{name}: {sum(started.values())} of {count} jobs were started in time")
        time.sleep(0.002)
        for worker in workers:
            for words in worker.lines_nowait():
                started[worker] = int(words[1])


def _check(database: Database, side: Side, count: int, paths: list[Path]) -> None:
    bench = database.bench
    check_starts(bench, side, count, paths)
    if side.finished is not None and (finished := database.value(side.finished)) != count:
        bench.problem(f"{side.name}: {finished} of {count} jobs ran once with success, its tables say")
    if not side.is_done(database):
        bench.problem(f"{side.name}: its tables have unfinished jobs")


def check_starts(bench: Bench, side: Side, count: int, paths: list[Path]) -> None:
    """Each job from 0 to `count` must have been started once, by what the workers wrote."""
    bench.checked()
    times_started = Counter(number for number, _ in read_starts(paths))
    if times_started != Counter(range(count)):
        again = sum(times_started.values()) - len(times_started)
        bench.problem(f"{side.name}: {len(times_started)} of {count} jobs were started, {again} starts too many")


def _measure_bare(database: Database, count: int, batch: int) -> None:
    number = database.register_queue("noop")
    database.invoke_many("noop", count, "noop")
    database.conn.execute("vacuum analyze")
    with psycopg.connect(database.dsn, autocommit=True) as conn:
        seconds = bare_loop(conn, number, count, batch)
    database.check_exactly_once(count)
    database.bench.note(_label(BARE, 1), count / seconds, "jobs/s")


def _label(name: str, processes: int) -> str:
    return f"{name}, {processes} process{'es' if processes > 1 else ''}"


def _report(bench: Bench, sides: list[Side], processes: list[int]) -> None:
    """Note each side's ratio to pgconductor's first one, and each number of processes to the first number."""
    names = [side.name for side in sides]
    for number in processes:
        for name in names[1:]:
            if names[0].startswith("pgconductor"):
                bench.ratio(f"{names[0]} / {name}, {number}", _label(names[0], number), _label(name, number))
    for number in processes[1:]:
        for name in names:
            bench.ratio(f"{name}, {number} / {processes[0]}", _label(name, number), _label(name, processes[0]))
    bench.bars(
        "peers_drain",
        title="Drain of no-op jobs",
        y="jobs/s",
        groups={
            name: {_label("", number)[2:]: bench.median(_label(name, number)) for number in processes} for name in names
        },
    )


if __name__ == "__main__":
    main()
