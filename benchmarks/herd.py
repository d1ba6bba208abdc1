"""Of many idle workers on one queue, how many does a single insert wake, and what does that cost?

Each worker is a process of its own with a sweep of 60 s, asleep when the insert comes. First inserts between which all
workers are asked for their statistics: what each insert caused is counted by worker. "Woken" are workers that claimed
at least once; a wake-up may take several claims, since who goes to sleep again looks once more. Then as many inserts
again with nothing else going on: latency, and the processor time of all workers and of the whole server, less what
they take in as long a time without inserts.

The numbers of workers take turns, each on a fresh database. A series must end before the first sweep (48 s after the
workers' start), else the sweeps' claims are counted as well, which the program says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg

from . import harness
from ._usage import cpu_seconds, server_processes
from .harness import Bench, BenchmarkError, Connection, Database, Process

_QUEUE = "herd"
_INVOKE = b"select pgconductor.invoke('stamp', jsonb_build_object('n', %s::int), 'herd')"
_WARM_UP = 10
_SWEEP = 60.0
_FIRST_SWEEP = 0.8 * _SWEEP


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 20], help="numbers of processes to compare")
    parser.add_argument("--inserts", type=int, default=40, help="of each series")
    parser.add_argument("--gap", type=float, default=0.2, help="seconds between two: all are asleep again by then")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        bench.expect(options.runs * len(options.workers))
        for number in range(options.runs):
            for workers in options.workers if number % 2 == 0 else options.workers[::-1]:
                bench.step(f"{workers} workers")
                _measure(bench, workers, options.inserts, options.gap)
        labels = {workers: _label(workers) for workers in options.workers}
        bench.bars(
            "herd", title="One insert, all workers idle", y="per insert",
            groups={
                label: {what: bench.median(f"{label}: {what}") for what in _COUNTED} for label in labels.values()
            },
        )  # fmt: skip

    harness.run("herd", options, measure)


def _label(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"


_COUNTED = ("notifications received", "workers woken", "claims", "empty claims")


@dataclass(frozen=True)
class _Counts:
    """Of one worker since its start."""

    notifications: int
    claims: int
    empty_claims: int

    @classmethod
    def ask(cls, workers: Sequence[Process]) -> list[_Counts]:
        for worker in workers:
            worker.tell("statistics")
        answers = [json.loads(worker.line()[1])[0] for worker in workers]
        return [cls(a["reactor"]["notifications"], a["claims"], a["empty_claims"]) for a in answers]


class _Inserter:
    """Inserts one execution after the other, and knows when."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self.times: dict[int, tuple[int, int]] = {}

    def insert(self) -> None:
        number = len(self.times)
        begun = time.monotonic_ns()
        self._conn.execute(_INVOKE, (number,), prepare=True)
        self.times[number] = begun, time.monotonic_ns()


def _measure(bench: Bench, count: int, inserts: int, gap: float) -> None:
    label = _label(count)
    paths = [bench.folder / f"starts-{time.monotonic_ns()}-{n}" for n in range(count)]
    with (
        bench.database() as database,
        ExitStack() as processes,
        psycopg.connect(database.dsn, autocommit=True) as conn,
    ):
        database.register_queue(_QUEUE)
        began = time.monotonic()
        workers = [
            processes.enter_context(harness.worker(database.dsn, _QUEUE, sweep=_SWEEP, starts=path)) for path in paths
        ]
        inserter = _Inserter(conn)
        for _ in range(_WARM_UP):
            inserter.insert()
            time.sleep(gap)
        _count(bench, label, workers, inserter, inserts, gap)
        _time(bench, label, database, workers, inserter, paths, inserts, gap)
        if time.monotonic() - began > _FIRST_SWEEP:
            bench.say(f"{label}: this took longer than {_FIRST_SWEEP:g} s: sweeps may be among the claims")
        database.wait_drained(timeout=5.0)
        database.check_exactly_once(len(inserter.times))


def _count(bench: Bench, label: str, workers: Sequence[Process], inserter: _Inserter, inserts: int, gap: float) -> None:
    """Count what inserts cause, one by one."""
    totals = dict.fromkeys(_COUNTED, 0)
    before = _Counts.ask(workers)
    for _ in range(inserts):
        inserter.insert()
        time.sleep(gap)
        after = _Counts.ask(workers)
        for old, new in zip(before, after, strict=True):
            totals["notifications received"] += new.notifications - old.notifications
            totals["workers woken"] += new.claims > old.claims
            totals["claims"] += new.claims - old.claims
            totals["empty claims"] += new.empty_claims - old.empty_claims
        before = after
    for what, total in totals.items():
        bench.note(f"{label}: {what}", total / inserts, "per insert")


def _time(
    bench: Bench,
    label: str,
    database: Database,
    workers: Sequence[Process],
    inserter: _Inserter,
    paths: Sequence[Path],
    inserts: int,
    gap: float,
) -> None:
    """Latency of inserts, and what each costs all workers and the server."""
    parties = {"the workers": [worker.pid for worker in workers], "the server": server_processes(database)}
    resting = [cpu_seconds(pids) for pids in parties.values()]
    time.sleep(inserts * gap)
    first = len(inserter.times)
    before = [cpu_seconds(pids) for pids in parties.values()]
    next_at = time.monotonic()
    for _ in range(inserts):
        inserter.insert()
        next_at += gap
        time.sleep(max(0.0, next_at - time.monotonic()))
    after = [cpu_seconds(pids) for pids in parties.values()]
    for name, rest, begin, end in zip(parties, resting, before, after, strict=True):
        if rest is None or begin is None or end is None:
            bench.say(f"{label}: CPU of {name} is not known, it does not run on a Linux that is here")
        else:
            bench.note(f"{label}: CPU of {name}", 1000 * ((end - begin) - (begin - rest)) / inserts, "ms per insert")
    started = {number: at for path in paths for number, at in harness.read_starts(path)}
    if started.keys() != inserter.times.keys():
        raise BenchmarkError(f"{len(started)} of {len(inserter.times)} inserts were picked up")
    times = {number: t for number, t in inserter.times.items() if number >= first}
    bench.note_percentiles(f"{label}: sent → handler", [(started[n] - t[0]) / 1e9 for n, t in times.items()])
    bench.note_percentiles(f"{label}: commit known → handler", [(started[n] - t[1]) / 1e9 for n, t in times.items()])


if __name__ == "__main__":
    main()
