"""What do notifications cost concurrent producers: their rate with the wake-up trigger / without it?

Single inserts, each its own commit, from several connections, with three triggers: `off`, none; `adaptive`, the
engine's; `always`, one that sends the same notification at each insert, which the benchmark makes in its place.
Besides, sessions listen in the same database, each on a channel of its own on which nothing is ever sent: NOTIFY costs
more the more there are.

Kinds of worker: none; busy (all runners occupied, nothing is claimed); sleeping (asleep when the inserts begin, with
no-op handlers that keep up as they can; 1 process or several); flapping (the producers pause after each short burst for
long enough that it falls asleep again; pauses do not count). All numbers of producers are measured without worker, and
beside workers those of ``--beside``. Slices with the three triggers take turns, on one table and with the same workers:
they sweep often enough to do the same work when no trigger wakes them. A slice begins when nothing is left and, where
it applies, the workers are asleep.

Meanwhile it is sampled what the database's sessions wait for. "The notification lock" is the one of the whole cluster
that a transaction which has notified holds while it commits (`Lock/object`); `LWLock/Notify...` are the queue's own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg
from psycopg import sql

from . import harness
from .harness import Bench, BenchmarkError, Database, WaitSampler

_QUEUE = "tax"
_CONCURRENCY = 100
_MODES = ("none", "busy", "sleeping", "flapping")
_TRIGGERS = ("adaptive", "off", "always")
_LOCK = "Lock/object"


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--producers", type=int, nargs="+", default=[1, 4, 16, 64], help="numbers of connections")
    parser.add_argument("--beside", type=int, nargs="*", default=[16, 64], help="those to measure beside workers, too")
    parser.add_argument("--listeners", type=int, nargs="+", default=[1, 50], help="sessions that listen elsewhere")
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=list(_MODES), help="kinds of worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 10], help="processes of sleeping workers")
    parser.add_argument("--seconds", type=float, default=1.0, help="of inserting, per slice")
    parser.add_argument("--burst", type=float, default=0.05, help="seconds of a burst (flapping)")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds of a pause (flapping)")
    options = parser.parse_args()
    cells = [
        (mode, workers, producers, listeners)
        for mode in options.modes
        for workers in {"none": [0], "sleeping": options.workers}.get(mode, [1])
        for producers in (options.producers if mode == "none" else options.beside)
        for listeners in options.listeners
    ]

    def measure(bench: Bench) -> None:
        bench.expect(len(cells) * options.runs)
        for mode, workers, producers, listeners in cells:
            pacing = (options.burst, options.pause) if mode == "flapping" else (0.0, 0.0)
            with ExitStack() as stack:
                cell = _Cell(bench, stack, mode, workers, producers, listeners)
                cell.measure(options.runs, options.seconds, *pacing)
        _plot(bench, options.producers, options.listeners)

    harness.run("notify_tax", options, measure)


def _label(mode: str, workers: int, producers: int, listeners: int) -> str:
    worker = {"none": "no worker", "sleeping": f"{workers} sleeping"}.get(mode, f"{workers} {mode}")
    return f"{producers} producers, {worker}, {listeners} elsewhere"


def _plot(bench: Bench, producers: Sequence[int], listeners: Sequence[int]) -> None:
    series = {
        f"{trigger}, {count} listening elsewhere": points
        for count in listeners
        for trigger in _TRIGGERS
        if (
            points := [
                (float(number), bench.median(label))
                for number in producers
                if bench.samples(label := f"{_label('none', 0, number, count)}: {trigger}")
            ]
        )
    }
    bench.lines(
        "notify_tax", title="Single inserts by trigger, no worker", x="producers", y="commits/s", series=series,
        log_x=True,
    )  # fmt: skip


class _Cell:
    """One combination, on a database of its own, in which the triggers take turns."""

    def __init__(self, bench: Bench, stack: ExitStack, mode: str, workers: int, producers: int, listeners: int) -> None:
        self._bench = bench
        self._mode = mode
        self._label = _label(mode, workers, producers, listeners)
        self._connections = producers
        self._release = bench.folder / f"release-{time.monotonic_ns()}"
        self._invoked = 0
        self._database = database = stack.enter_context(bench.database())
        database.register_queue(_QUEUE)
        _make_always(database)
        for number in range(listeners):
            conn = stack.enter_context(psycopg.connect(database.dsn, autocommit=True))
            conn.execute(sql.SQL("listen {}").format(sql.Identifier(f"elsewhere_{number}")))
        for _ in range(workers):
            stack.enter_context(harness.worker(database.dsn, _QUEUE, concurrency=_CONCURRENCY, sweep=0.05))
        if mode == "busy":
            self._invoked += _occupy(database, self._release)

    def measure(self, runs: int, seconds: float, burst: float, pause: float) -> None:
        bench, database, label = self._bench, self._database, self._label
        for trigger in _TRIGGERS:
            self._produce(trigger, 0.2 * seconds, burst, pause)
        sampled: dict[str, list[WaitSampler]] = {trigger: [] for trigger in _TRIGGERS}
        for number in range(runs):
            bench.step(label)
            for trigger in _TRIGGERS if number % 2 == 0 else _TRIGGERS[::-1]:
                produced, waits = self._produce(trigger, seconds, burst, pause)
                bench.note(f"{label}: {trigger}", produced.rate, "commits/s")
                sampled[trigger].append(waits)
        self._note_waits(sampled)
        for trigger in ("adaptive", "always"):
            bench.ratio(f"{label}: {trigger} / off", f"{label}: {trigger}", f"{label}: off")
        _choose(database, "adaptive")
        self._release.touch()
        if self._mode == "none":
            harness.drain(database, _QUEUE)
        database.wait_drained(timeout=300)
        database.check_exactly_once(self._invoked)

    def _note_waits(self, sampled: Mapping[str, Sequence[WaitSampler]]) -> None:
        """Note how many sessions waited on average, for the notification lock and for what else was seen."""
        seen = {event for waits in sampled.values() for run in waits for event in run.counts}
        others = sorted(event for event in seen - {_LOCK} if event.startswith(("Lock/", "LWLock/Notify")))
        for trigger, waits in sampled.items():
            for event in (_LOCK, *others):
                name = "the notification lock" if event == _LOCK else event
                for run in waits:
                    label = f"{self._label}: {trigger}, wait for {name}"
                    self._bench.note(label, run.counts[event] / max(1, run.samples), "sessions")

    def _produce(
        self, trigger: str, seconds: float, burst: float, pause: float
    ) -> tuple[harness.Produced, WaitSampler]:
        if self._mode in ("sleeping", "flapping"):
            self._database.wait_drained()
            _wait_asleep(self._database)
        _choose(self._database, trigger)
        with WaitSampler(self._database) as waits:
            produced = harness.produce(
                self._database, _QUEUE, connections=self._connections, seconds=seconds, burst=burst, pause=pause
            )
        self._invoked += produced.count
        return produced, waits


def _make_always(database: Database) -> None:
    """Make the trigger that always notifies, out of use."""
    database.conn.execute("""
        create function pgconductor.benchmark_always() returns trigger
            language plpgsql
            set search_path = pg_catalog, pg_temp
        as $$
        begin
            perform pg_notify(pgconductor._private_channel(new.queue), '');
            return null;
        end $$;
        create trigger benchmark_always after insert on pgconductor._private_executions
            for each row execute function pgconductor.benchmark_always();
        alter table pgconductor._private_executions disable trigger benchmark_always;
    """)


def _choose(database: Database, trigger: str) -> None:
    """Have no trigger but this."""
    database.enable_wake_trigger(trigger == "adaptive")
    verb = sql.SQL("enable" if trigger == "always" else "disable")
    table = sql.Identifier("pgconductor", "_private_executions")
    database.conn.execute(sql.SQL("alter table {} {} trigger benchmark_always").format(table, verb))


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
