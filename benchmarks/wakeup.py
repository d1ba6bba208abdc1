"""How soon does an idle worker start what was inserted, and what does it ask the server while there is nothing to do?

The sweep is set to 60 s, so that only notifications can be fast. Single inserts, first close together, then far apart;
the worker is a process of its own. Beside it, in the same run: a raw NOTIFY to another process that only listens, and
a raw INSERT. Then nothing for a while: the statements of that time are counted by the server, from its log or from
pg_stat_statements; only the heartbeat (which rescues, too) and the self-probe may be among them.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg

from . import harness
from .harness import Bench, BenchmarkError, Connection, Database

_QUEUE = "wakeup"
_EXPECTED = {"heartbeat", "pg_notify"}
_INVOKE = b"select pgconductor.invoke('stamp', jsonb_build_object('n', %s::int), 'wakeup')"


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(runs=1)
    parser.add_argument("--fast", type=int, default=500, help="inserts close together")
    parser.add_argument("--fast-gap", type=float, default=0.02, help="seconds between them")
    parser.add_argument("--slow", type=int, default=30, help="inserts far apart")
    parser.add_argument("--slow-gap", type=float, default=2.0, help="seconds between them")
    parser.add_argument("--raw", type=int, default=500, help="raw notifications, and raw inserts")
    parser.add_argument("--idle", type=float, default=10.0, help="seconds without anything to do")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        for number in range(options.runs):
            with bench.database() as database:
                database.register_queue(_QUEUE)
                _measure_raw(bench, database, number, options.raw, options.fast_gap)
                starts = bench.folder / f"starts-{number}"
                invoked = 20
                with (
                    harness.worker(database.dsn, _QUEUE, sweep=60.0, starts=starts),
                    psycopg.connect(database.dsn, autocommit=True) as conn,
                ):
                    _invoke_single(conn, range(invoked), 0.02)
                    for count, gap in ((options.fast, options.fast_gap), (options.slow, options.slow_gap)):
                        times = _invoke_single(conn, range(invoked, invoked + count), gap)
                        _note_starts(bench, f"invoke every {gap:g} s", "handler", times, starts)
                        invoked += count
                    _count_idle_statements(bench, database, options.idle)
                    database.wait_drained(timeout=1.0)
                database.check_exactly_once(invoked)
                if len(harness.read_starts(starts)) != invoked:
                    bench.problem(f"{len(harness.read_starts(starts))} handlers started for {invoked} executions")

    harness.run("wakeup", options, measure)


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


def _invoke_single(conn: Connection, numbers: range, gap: float) -> dict[int, tuple[int, int]]:
    return _paced(gap, numbers, lambda number: conn.execute(_INVOKE, (number,), prepare=True))


def _wait_starts(path: Path, numbers: dict[int, tuple[int, int]], timeout: float = 5.0) -> dict[int, int]:
    deadline = time.monotonic() + timeout
    while True:
        started = dict(harness.read_starts(path))
        if numbers.keys() <= started.keys():
            return started
        if time.monotonic() > deadline:
            missing = len(numbers.keys() - started.keys())
            raise BenchmarkError(f"{missing} of {len(numbers)} were not picked up within {timeout:g} s of the last")
        time.sleep(0.01)


def _note_starts(bench: Bench, label: str, event: str, times: dict[int, tuple[int, int]], path: Path) -> None:
    started = _wait_starts(path, times)
    bench.note_percentiles(f"{label}: sent → {event}", [(started[n] - t[0]) / 1e9 for n, t in times.items()])
    bench.note_percentiles(f"{label}: commit known → {event}", [(started[n] - t[1]) / 1e9 for n, t in times.items()])
    bench.note_percentiles(f"{label}: round trip of the statement", [(t[1] - t[0]) / 1e9 for t in times.values()])


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
        _note_starts(bench, "raw NOTIFY", "received", times, received)
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
        verb = _verb(statement)
        by_verb[verb] += count
        expected = "" if verb in _EXPECTED else "  UNEXPECTED"
        bench.say(f"idle {seconds:g} s: {count:>4} × {statement[:110]}{expected}")
    bench.facts["statements while idle"] = dict(by_verb)
    if unexpected := by_verb.keys() - _EXPECTED:
        bench.problem(f"while idle for {seconds:g} s the server was also asked: {', '.join(sorted(unexpected))}")
    if not by_verb:
        bench.problem("the server counted nothing at all, not even a heartbeat")


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
