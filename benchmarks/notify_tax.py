"""What do notifications cost concurrent producers: their rate with the wake-up trigger / without it?

16 and 64 connections, single inserts, each its own commit, against four kinds of worker: none; busy (all runners
occupied, nothing is claimed); sleeping (asleep when the inserts begin, with no-op handlers that keep up as they can);
flapping (the producers pause after each short burst for long enough that it falls asleep again; pauses do not count).
Slices with and without the trigger take turns, on one table and with one worker: it sweeps often enough to do the same
work when no trigger wakes it. A slice begins when nothing is left and, where it applies, the worker is asleep.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from . import harness
from .harness import Bench, BenchmarkError, Database

_QUEUE = "tax"
_CONCURRENCY = 100
_MODES = ("none", "busy", "sleeping", "flapping")


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(runs=5)
    parser.add_argument("--producers", type=int, nargs="+", default=[16, 64], help="numbers of connections")
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES), help="kinds of worker")
    parser.add_argument("--seconds", type=float, default=2.0, help="of inserting, per slice")
    parser.add_argument("--burst", type=float, default=0.05, help="seconds of a burst (flapping)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds of a pause (flapping)")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        for producers in options.producers:
            for mode in options.modes:
                pacing = (options.burst, options.pause) if mode == "flapping" else (0.0, 0.0)
                _compare(bench, mode, producers, options.runs, options.seconds, *pacing)

    harness.run("notify_tax", options, measure)


def _compare(bench: Bench, mode: str, producers: int, runs: int, seconds: float, burst: float, pause: float) -> None:
    label = f"{producers} producers, worker {mode}"
    release = bench.folder / f"release-{time.monotonic_ns()}"
    invoked = 0
    with bench.database() as database, ExitStack() as processes:
        database.register_queue(_QUEUE)
        if mode != "none":
            processes.enter_context(harness.worker(database.dsn, _QUEUE, concurrency=_CONCURRENCY, sweep=0.05))
        if mode == "busy":
            invoked += _occupy(database, release)

        def slice_rate(is_enabled: bool, length: float) -> float:
            nonlocal invoked
            if mode in ("sleeping", "flapping"):
                database.wait_drained()
                _wait_asleep(database)
            database.enable_wake_trigger(is_enabled)
            produced = harness.produce(
                database, _QUEUE, connections=producers, seconds=length, burst=burst, pause=pause
            )
            invoked += produced.count
            return produced.rate

        for is_enabled in (True, False):
            slice_rate(is_enabled, 0.2 * seconds)
        for number in range(runs):
            for is_enabled in (True, False) if number % 2 == 0 else (False, True):
                name = "with" if is_enabled else "without"
                bench.note(f"{label}: {name} trigger", slice_rate(is_enabled, seconds), "inserts/s")
        bench.ratio(f"{label}: with / without", f"{label}: with trigger", f"{label}: without trigger")
        database.enable_wake_trigger(True)
        release.touch()
        if mode == "none":
            harness.drain(database, _QUEUE)
        database.wait_drained(timeout=300)
        database.check_exactly_once(invoked)


def _occupy(database: Database, release: Path) -> int:
    """Have every runner of the worker wait for a file; returns how many executions that takes."""
    database.conn.execute(
        b"select pgconductor.invoke('hold', jsonb_build_object('until', %s::text), %s) from generate_series(1, %s)",
        (str(release), _QUEUE, _CONCURRENCY),
    )
    deadline = time.monotonic() + 30
    while True:
        running = database.value("select count(*) from pgconductor._private_executions where state = 'running'")
        if running == _CONCURRENCY:
            return _CONCURRENCY
        if time.monotonic() > deadline:
            raise BenchmarkError(f"only {running} of {_CONCURRENCY} runners are occupied")
        time.sleep(0.02)


def _wait_asleep(database: Database) -> None:
    deadline = time.monotonic() + 30
    while database.value("select pgconductor._private_nobody_sleeps(%s)", _QUEUE):
        if time.monotonic() > deadline:
            raise BenchmarkError("the worker does not fall asleep")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
