"""How soon does a worker start what was inserted: idle, and at 10, 50 and 90 % of what it keeps up with?

Three kinds of worker take turns on one queue, each a process of its own: event-driven (the sweep is set to 60 s, so
that only notifications can be fast), and two that poll, every second and every 50 ms: the same worker with
``notify="off"``. Each is given single inserts, first close together, then (the event-driven one) far apart, then at
fixed rates from many connections. An insert at a fixed rate counts from the time at which it was due, sent or not, so
that whoever holds up the producers does not look better for it. Beside it, in the same run: a raw NOTIFY to another
process that only listens, and a raw INSERT.

100 % is what the event-driven worker keeps up with, measured before: closed-loop producers of single inserts, and
executions divided by the time from the first insert to the last handler's start. Not the rate of a drain: that is
several times what producers which share the machine can insert one by one, and all loads would be beyond them.

Then nothing for a while: processor time (of one core) and memory of the worker's process, processor time of its
sessions' server processes, and of the event-driven worker the statements of that time, counted by the server, from
its log or from pg_stat_statements; only the heartbeat (which rescues, too), the self-probe and, once in half a minute,
housekeeping may be among them.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from . import harness
from ._usage import cpu_seconds, resident_bytes, server_processes
from .harness import Bench, BenchmarkError, Connection, Database

_QUEUE = "latency"
_EXPECTED = {"heartbeat", "pg_notify"}
_HOUSEKEEPING = {"maintain", "publish_queues", "set_config"}
_INVOKE = b"select pgconductor.invoke('stamp', jsonb_build_object('n', %s::int), 'latency')"
_CONCURRENCY = 100
_WARM_UP = 20


@dataclass(frozen=True)
class _Kind:
    name: str
    notify: str
    sweep: float


_EVENT_DRIVEN = _Kind("event-driven", "adaptive", 60.0)
_KINDS = (_EVENT_DRIVEN, _Kind("polling 50 ms", "off", 0.05), _Kind("polling 1 s", "off", 1.0))


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--fast", type=int, default=200, help="inserts close together, for each kind of worker")
    parser.add_argument("--fast-gap", type=float, default=0.02, help="seconds between them")
    parser.add_argument("--slow", type=int, default=10, help="inserts far apart")
    parser.add_argument("--slow-gap", type=float, default=1.0, help="seconds between them")
    parser.add_argument("--raw", type=int, default=200, help="raw notifications, and raw inserts")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds without anything to do")
    parser.add_argument(
        "--loads", type=int, nargs="*", default=[10, 50, 90], help="in per cent of what it keeps up with"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load, and of finding out what 100 %% is")
    parser.add_argument("--producers", type=int, default=16, help="connections that insert under load")
    parser.add_argument("--workers", type=int, default=1, help="processes of each kind at once")
    names = [kind.name for kind in _KINDS]
    parser.add_argument("--kinds", nargs="+", choices=names, default=names, help="kinds of worker")
    options = parser.parse_args()
    kinds = [kind for kind in _KINDS if kind.name in options.kinds]

    def measure(bench: Bench) -> None:
        parts = 2 + len(kinds) * (2 + len(options.loads))
        bench.expect(parts * options.runs)
        for number in range(options.runs):
            with bench.database() as database, psycopg.connect(database.dsn, autocommit=True) as inserter:
                database.register_queue(_QUEUE)
                bench.step("raw NOTIFY and INSERT")
                _measure_raw(bench, database, number, options.raw, options.fast_gap)
                site = _Site(bench, database, inserter, options.workers, options.producers)
                bench.step("what the worker keeps up with")
                capacity = site.measure_capacity(options.seconds)
                for kind in kinds if number % 2 == 0 else kinds[::-1]:
                    with site.workers(kind):
                        bench.step(f"{kind.name}, idle queue")
                        site.measure_idle_queue(kind, options.fast, options.fast_gap)
                        if kind is _EVENT_DRIVEN:
                            site.measure_idle_queue(kind, options.slow, options.slow_gap)
                        for load in options.loads:
                            bench.step(f"{kind.name}, {load} %")
                            site.measure_load(kind, load, capacity, options.seconds)
                        bench.step(f"{kind.name}, nothing to do")
                        site.measure_idle_process(kind, options.idle)
                        if kind is _EVENT_DRIVEN:
                            _count_idle_statements(bench, database, options.idle)
                site.check()
        _report(bench, kinds, options.loads, options.fast_gap)

    harness.run("latency", options, measure)


def _report(bench: Bench, kinds: Sequence[_Kind], loads: Sequence[int], gap: float) -> None:
    def figure(kind: _Kind, load: int, share: str) -> float:
        if load == 0:
            return bench.median(f"{_idle_label(kind, gap)}: sent → handler, {share}")
        return bench.median(f"{_load_label(kind, load)}: due → handler, {share}")

    series = {
        f"{kind.name}, {share}": [(float(load), figure(kind, load, share)) for load in (0, *loads)]
        for kind in kinds
        for share in ("p50", "p99")
    }
    bench.lines(
        "latency", title="Insert to handler start", x="load, % of what the worker keeps up with", y="ms",
        series=series, log_y=True,
    )  # fmt: skip


def _idle_label(kind: _Kind, gap: float) -> str:
    return f"{kind.name}, an invoke every {gap:g} s"


def _load_label(kind: _Kind, load: int) -> str:
    return f"{kind.name}, {load} %"


class _Site:
    """A database with one queue, on which kinds of workers take turns."""

    def __init__(
        self, bench: Bench, database: Database, inserter: Connection, processes: int, connections: int
    ) -> None:
        self._bench = bench
        self._database = database
        self._inserter = inserter
        self._processes = processes
        self._connections = connections
        self._files: list[Path] = []  # of all workers until now, with what they started
        self._current: list[harness.Process] = []
        self._invoked = 0

    @contextmanager
    def workers(self, kind: _Kind) -> Iterator[None]:
        """Have workers of a kind, warmed up, which finish all that was inserted meanwhile."""
        with ExitStack() as stack:
            self._current = []
            for _ in range(self._processes):
                path = self._bench.folder / f"starts-{time.monotonic_ns()}"
                self._files.append(path)
                self._current.append(
                    stack.enter_context(
                        harness.worker(
                            self._database.dsn, _QUEUE, concurrency=_CONCURRENCY, sweep=kind.sweep, notify=kind.notify,
                            starts=path,
                        )
                    )
                )  # fmt: skip
            self._wait_started(self._invoke(_WARM_UP, 0.02))
            yield
            self._database.wait_drained()

    def measure_capacity(self, seconds: float) -> float:
        """Return how many single inserts a second are started as well, in the long run."""
        with self.workers(_EVENT_DRIVEN):
            self._produce(0.2 * seconds)
            self._database.wait_drained()
            times = self._produce(seconds)
            started = self._wait_started(times, timeout=60.0)
            took = (max(started[n] for n in times) - min(t[0] for t in times.values())) / 1e9
            capacity = len(times) / took
            self._bench.note("100 %: inserted one by one and started", capacity, "per s")
        return capacity

    def measure_idle_queue(self, kind: _Kind, count: int, gap: float) -> None:
        label = _idle_label(kind, gap)
        times = self._invoke(count, gap)
        _note_starts(self._bench, label, "sent", "handler", times, self._wait_started(times))
        round_trips = [(t[1] - t[0]) / 1e9 for t in times.values()]
        self._bench.note_percentiles(f"{label}: round trip of the statement", round_trips)

    def measure_load(self, kind: _Kind, load: int, capacity: float, seconds: float) -> None:
        """Insert at a share of the capacity; what the producers could not insert is told by the rate."""
        label = _load_label(kind, load)
        times = self._produce(seconds, capacity * load / 100)
        self._bench.note(f"{label}: inserts", len(times) / seconds, "per s")
        _note_starts(self._bench, label, "due", "handler", times, self._wait_started(times, timeout=60.0))
        self._database.wait_drained()

    def measure_idle_process(self, kind: _Kind, seconds: float) -> None:
        """Processor time and memory of a process and its sessions, while it has nothing to do."""
        time.sleep(1.0)  # the last flush is over, and lingering too
        servers = server_processes(self._database, only_workers=True)
        processes = [process.pid for process in self._current]
        resident = [resident_bytes(pid) for pid in processes]
        before = [cpu_seconds(pids) for pids in (processes, servers)]
        began = time.monotonic()
        time.sleep(seconds)
        after = [cpu_seconds(pids) for pids in (processes, servers)]
        took = time.monotonic() - began
        for name, first, second in zip(("the process", "its sessions at the server"), before, after, strict=True):
            label = f"{kind.name}, idle: CPU of {name}"
            if first is None or second is None:
                self._bench.say(f"{label}: not known, it does not run on a Linux that is here")
            else:
                self._bench.note(label, 100 * (second - first) / took / len(processes), "% of a core")
        for size in resident:
            if size is not None:
                self._bench.note(f"{kind.name}, idle: resident memory of the process", size / 2**20, "MiB")

    def check(self) -> None:
        """Each execution has finished once, and handlers were started once for each."""
        self._database.check_exactly_once(self._invoked)
        started = sum(len(harness.read_starts(path)) for path in self._files)
        if started != self._invoked:
            self._bench.problem(f"{started} handlers started for {self._invoked} executions")

    def _invoke(self, count: int, gap: float) -> dict[int, tuple[int, int]]:
        numbers = range(self._invoked, self._invoked + count)
        self._invoked += count
        return _paced(gap, numbers, lambda number: self._inserter.execute(_INVOKE, (number,), prepare=True))

    def _produce(self, seconds: float, rate: float = 0.0) -> dict[int, tuple[int, int]]:
        produced = harness.produce(
            self._database, _QUEUE, connections=self._connections, seconds=seconds, task="stamp", rate=rate,
            first=self._invoked, keep_times=True,
        )  # fmt: skip
        self._invoked += produced.count
        return dict(produced.times)

    def _wait_started(self, times: dict[int, tuple[int, int]], timeout: float = 5.0) -> dict[int, int]:
        return _wait_starts(self._files[-self._processes :], times, timeout)


def _paced(gap: float, numbers: range, act: Callable[[int], object]) -> dict[int, tuple[int, int]]:
    """Do something for each number, `gap` seconds apart; returns when each began and ended."""
    times: dict[int, tuple[int, int]] = {}
    next_at = time.monotonic()
    for number in numbers:
        time.sleep(max(0.0, next_at - time.monotonic()))
        begun = time.monotonic_ns()
        act(number)
        times[number] = begun, time.monotonic_ns()
        next_at += gap
    return times


def _wait_starts(paths: Sequence[Path], numbers: dict[int, tuple[int, int]], timeout: float) -> dict[int, int]:
    deadline = time.monotonic() + timeout
    while True:
        started = {number: at for path in paths for number, at in harness.read_starts(path)}
        if numbers.keys() <= started.keys():
            return started
        if time.monotonic() > deadline:
            missing = len(numbers.keys() - started.keys())
            raise BenchmarkError(f"{missing} of {len(numbers)} were not picked up within {timeout:g} s of the last")
        time.sleep(0.05)


def _note_starts(
    bench: Bench, label: str, begin: str, event: str, times: dict[int, tuple[int, int]], started: dict[int, int]
) -> None:
    """Note how long after the beginning of an insert, and after its commit was known, something happened."""
    bench.note_percentiles(f"{label}: {begin} → {event}", [(started[n] - t[0]) / 1e9 for n, t in times.items()])
    bench.note_percentiles(f"{label}: commit known → {event}", [(started[n] - t[1]) / 1e9 for n, t in times.items()])


def _measure_raw(bench: Bench, database: Database, number: int, count: int, gap: float) -> None:
    received = bench.folder / f"raw-{number}"
    with (
        harness.Process("_listener", database.dsn, "benchmark_raw", received) as listener,
        psycopg.connect(database.dsn, autocommit=True) as conn,
    ):
        listener.line()
        notify = b"select pg_notify('benchmark_raw', %s::text)"
        _paced(gap, range(-20, 0), lambda n: conn.execute(notify, (n,), prepare=True))
        times = _paced(gap, range(count), lambda n: conn.execute(notify, (n,), prepare=True))
        _note_starts(bench, "raw NOTIFY", "sent", "received", times, _wait_starts([received], times, 5.0))
        conn.execute("create table benchmark_raw (n int, payload jsonb, at timestamptz default now())")
        insert = b"insert into benchmark_raw (n, payload) values (%s, '{}')"
        times = _paced(gap, range(count), lambda n: conn.execute(insert, (n,), prepare=True))
        bench.note_percentiles("raw INSERT: round trip of the statement", [(t[1] - t[0]) / 1e9 for t in times.values()])


# What the server was asked in the idle time


def _count_idle_statements(bench: Bench, database: Database, seconds: float) -> None:
    time.sleep(0.5)  # the last flush is over
    if bench.own is not None:
        counts = _count_by_log(bench, database, bench.own.log_path, seconds)
    elif _has_statistics(bench):
        counts = _count_by_statistics(bench, database, seconds)
    else:
        bench.say("idle: not counted, this server has no pg_stat_statements; a throwaway server's log would be read")
        return
    by_verb: Counter[str] = Counter()
    for statement, count in counts.most_common():
        by_verb[_verb(statement)] += count
    unexpected = [verb for verb, count in by_verb.items() if count > _most_expected(verb, seconds)]
    for statement, count in counts.most_common():
        mark = "  UNEXPECTED" if _verb(statement) in unexpected else ""
        bench.say(f"idle {seconds:g} s: {count:>4} × {statement[:110]}{mark}")
    bench.facts["statements while idle"] = dict(by_verb)
    if unexpected:
        bench.problem(f"while idle for {seconds:g} s the server was also asked: {', '.join(sorted(unexpected))}")
    if not by_verb:
        bench.problem("the server counted nothing at all, not even a heartbeat")


def _most_expected(verb: str, seconds: float) -> float:
    """How often an idle worker may ask for that: it keeps house once in 30 to 60 s, on a connection of its own."""
    if verb in _EXPECTED:
        return math.inf
    return 1 + seconds / 30 if verb in _HOUSEKEEPING else 0


def _verb(statement: str) -> str:
    """The function that a statement calls, else its first word."""
    found = re.search(r"[.](\w+)\s*\(", statement)
    return found[1] if found else statement.split(maxsplit=1)[0].lower()


def _admin(bench: Bench) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(bench.dsn, autocommit=True)


def _count_by_log(bench: Bench, database: Database, log: Path, seconds: float) -> Counter[str]:
    with _admin(bench) as conn:
        conn.execute("alter system set log_statement = 'all'")
        conn.execute("select pg_reload_conf()")
        time.sleep(0.5)  # each session reads its settings when it is asked or signalled next
        begin = log.stat().st_size
        time.sleep(seconds)
        with log.open("rb") as file:
            file.seek(begin)
            text = file.read().decode(errors="replace")
        conn.execute("alter system reset log_statement")
        conn.execute("select pg_reload_conf()")
    # A line begins with the prefix; a statement of several lines goes on with a tab.
    lines = re.sub(r"\n\t", " ", text).splitlines()
    pattern = re.compile(r"statement\|(.*?)\|\d+\|(.*?)\|LOG:  (?:statement|execute [^:]*): (.*)")
    found = [match.groups() for match in map(pattern.match, lines) if match is not None]
    return Counter(f"{statement}  -- {application}" for name, application, statement in found if name == database.name)


def _has_statistics(bench: Bench) -> bool:
    with _admin(bench) as conn:
        return bool(conn.execute("select from pg_extension where extname = 'pg_stat_statements'").fetchall())


def _count_by_statistics(bench: Bench, database: Database, seconds: float) -> Counter[str]:
    query = (
        b"select query, calls from pg_stat_statements s join pg_database d on d.oid = s.dbid"
        b" where d.datname = %s and toplevel"
    )
    with _admin(bench) as conn:

        def calls() -> Counter[str]:
            return Counter({str(text): int(str(count)) for text, count in conn.execute(query, (database.name,))})

        before = calls()
        time.sleep(seconds)
        return calls() - before


if __name__ == "__main__":
    main()
