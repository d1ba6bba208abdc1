"""How soon does an idle worker of each product start a job that is inserted alone?

Each side, in turn, on a fresh database of the same server: one worker process, and a producer process with the
product's own client that inserts single jobs, each committed, first close together, then far apart. Two durations for
each: from the insert sent to the handler started, and from the commit known to it; CLOCK_MONOTONIC on both sides, in
Python and in Node. A product that listens is measured listening, with its defaults; one that only polls with an
interval as short as a deployment might choose, which is printed. With its defaults it takes about 5 minutes.
"""

from __future__ import annotations

import time

from .. import harness
from ..harness import Bench, BenchmarkError, Database, Process
from .drain import check_starts, wait_started
from .marks import read_starts
from .sides import SIDES, Side, choose

_WARM_UP = 20
_DEFAULT = [key for key in SIDES if key not in ("unkept", "graphile-best")]  # which differ in what follows the handler


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(runs=1)
    parser.add_argument("--fast", type=int, default=300, help="inserts close together")
    parser.add_argument("--fast-gap", type=float, default=0.02, help="seconds between them")
    parser.add_argument("--slow", type=int, default=20, help="inserts far apart")
    parser.add_argument("--slow-gap", type=float, default=1.0, help="seconds between them")
    parser.add_argument("--peers", nargs="+", choices=SIDES, default=_DEFAULT, help="the sides")
    parser.add_argument("--set", nargs="+", default=[], metavar="SIDE.NAME=JSON", help="replace or add a setting")
    options = parser.parse_args()
    rounds = [(options.fast, options.fast_gap), (options.slow, options.slow_gap)]

    def measure(bench: Bench) -> None:
        sides = choose(bench, options.peers, options.set, is_latency=True)
        bench.expect(options.runs * len(sides))
        for _ in range(options.runs):
            for side in sides:
                bench.step(side.name)
                with bench.database() as database:
                    _measure(database, side, rounds)
        for name, event in (("sent", "sent → handler"), ("commit", "commit known → handler")):
            bench.bars(
                f"peers_latency_{name}",
                title=f"An idle worker starts a job, p50 of {event}",
                y="ms",
                groups={
                    side.name: {
                        f"every {gap:g} s": bench.median(f"{_label(side, gap)}: {event}, p50") for _, gap in rounds
                    }
                    for side in sides
                },
            )

        _print_table(sides, rounds, bench)

    harness.run("peers.latency", options, measure)


def _measure(database: Database, side: Side, rounds: list[tuple[int, float]]) -> None:
    bench = database.bench
    side.prepare(database)
    path = bench.folder / f"starts-{database.name}"
    produced = _WARM_UP
    measured: list[tuple[float, dict[int, tuple[int, int]]]] = []
    with side.start(database, path) as worker, side.produce(database) as producer:
        for process in (worker, producer):
            if process.line() != ["ready"]:
                raise BenchmarkError(f"{side.name}: {process.name} does not get ready")
        _produce(producer, _WARM_UP, 0.02, 0)
        for count, gap in rounds:
            measured.append((gap, _produce(producer, count, gap, produced)))
            produced += count
        wait_started([worker], produced, time.monotonic() + 30, side.name)
    started = dict(read_starts([path]))
    check_starts(bench, side, produced, [path])
    for gap, times in measured:
        for event, which in (("sent → handler", 0), ("commit known → handler", 1)):
            durations = [(started[number] - at[which]) / 1e9 for number, at in times.items() if number in started]
            bench.note_percentiles(f"{_label(side, gap)}: {event}", durations)


def _produce(producer: Process, count: int, gap: float, first: int) -> dict[int, tuple[int, int]]:
    """Have it insert; return when each was sent and when its commit was known."""
    producer.tell(f"{count} {gap} {first}")
    rows = [[int(word) for word in producer.line(timeout=count * gap + 60)] for _ in range(count)]
    return {number: (sent_at, committed_at) for number, sent_at, committed_at in rows}


def _print_table(sides: list[Side], rounds: list[tuple[int, float]], bench: Bench) -> None:
    """Print the medians of the runs."""
    print(f"{'ms, p50 / p99':<28}{'sent → handler':>22}{'commit known → handler':>26}   learns of jobs by")
    for _, gap in rounds:
        for side in sides:
            label = _label(side, gap)
            sent, committed = (
                " / ".join(f"{bench.median(f'{label}: {event}, {part}'):.2f}" for part in ("p50", "p99"))
                for event in ("sent → handler", "commit known → handler")
            )
            print(f"{label:<40}{sent:>16}{committed:>20}   {side.woken_by()}")


def _label(side: Side, gap: float) -> str:
    return f"{side.name}, every {gap:g} s"


if __name__ == "__main__":
    main()
