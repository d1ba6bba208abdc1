"""What do insert rate, notifications and latency look like when 1, 4 or 10 processes with room wait for 16 producers?

Closed-loop producers, single inserts, no-op handlers that write down when they started. For reference, per run, the
same producers without trigger and without worker. Then light load: one worker, a few inserts a second, where lingering
before sleep would cost latency. Notifications are counted by a connection that listens to the queue's channel. Where
the workers do not keep up, the latency is that of the backlog, and the figures say so.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from . import harness
from .harness import Bench

_QUEUE = "unsaturated"


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 10], help="numbers of processes to compare")
    parser.add_argument("--producers", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=100, help="of each worker")
    parser.add_argument("--seconds", type=float, default=5.0, help="of producing, each time")
    parser.add_argument("--light-rate", type=float, default=50.0, help="inserts per second at light load")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        for number in range(options.runs):
            _without(bench, options.producers, options.seconds)
            order = options.workers if number % 2 == 0 else options.workers[::-1]
            for count in order:
                label = f"{count} worker{'s' if count > 1 else ''}, {options.producers} producers"
                _with_workers(bench, label, count, options.concurrency, options.producers, options.seconds)
            _with_workers(bench, "light load, 1 worker", 1, options.concurrency, 4, options.seconds, options.light_rate)
        for count in options.workers:
            label = f"{count} worker{'s' if count > 1 else ''}, {options.producers} producers"
            bench.ratio(f"{label}: rate / without trigger and worker", f"{label}: inserts", "without: inserts")

    harness.run("unsaturated", options, measure)


def _without(bench: Bench, producers: int, seconds: float) -> None:
    with bench.database() as database:
        database.register_queue(_QUEUE)
        database.enable_wake_trigger(False)
        harness.produce(database, _QUEUE, connections=producers, seconds=0.2 * seconds)
        produced = harness.produce(database, _QUEUE, connections=producers, seconds=seconds)
        bench.note("without: inserts", produced.rate, "per s")
        bench.checked()  # nothing was to be executed


def _with_workers(
    bench: Bench, label: str, workers: int, concurrency: int, producers: int, seconds: float, rate: float = 0.0
) -> None:
    files = [bench.folder / f"starts-{time.monotonic_ns()}-{n}" for n in range(workers)]
    with bench.database() as database, ExitStack() as processes:
        database.register_queue(_QUEUE)
        for file in files:
            processes.enter_context(
                harness.worker(database.dsn, _QUEUE, concurrency=concurrency, sweep=60.0, starts=file)
            )
        warm = harness.produce(
            database, _QUEUE, connections=producers, seconds=0.2 * seconds, task="stamp", first=1_000_000_000, rate=rate
        )
        database.wait_drained()
        with harness.Observer(database, _QUEUE) as observer:
            produced = harness.produce(
                database, _QUEUE, connections=producers, seconds=seconds, task="stamp", keep_times=True, rate=rate
            )
        left = database.value("select count(*) from pgconductor._private_executions where state = 'ready'")
        database.wait_drained()
        database.check_exactly_once(warm.count + produced.count)
        started = {n: at for file in files for n, at in harness.read_starts(file)}
        if len(started) != warm.count + produced.count:
            bench.problem(f"{len(started)} handlers started for {warm.count + produced.count} executions")
        bench.note(f"{label}: inserts", produced.rate, "per s")
        bench.note(f"{label}: notifications", observer.count, "")
        bench.note(f"{label}: notifications per insert", observer.count / produced.count, "")
        bench.note(f"{label}: backlog at the end", left, "")
        times = produced.times
        bench.note_percentiles(f"{label}: sent → handler", [(started[n] - t[0]) / 1e9 for n, t in times.items()])
        bench.note_percentiles(
            f"{label}: commit known → handler", [(started[n] - t[1]) / 1e9 for n, t in times.items()]
        )


if __name__ == "__main__":
    main()
