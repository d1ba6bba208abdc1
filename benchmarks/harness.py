"""What every measurement shares: a server whose settings are shown, fresh databases, processes, figures, a last check.

A benchmark is a function of a `Bench`. It notes figures under a label, once per run; at the end each label is printed
with its median and its extremes, and written to ``--json FILE``. It must call `Database.check_exactly_once` for each
database it used: a figure for work that was lost or done twice is worth nothing, and the program then exits with 1.

Invariants: the server is the user's (``--dsn``) or a throwaway one with durable settings; what is printed about it is
what the server says. Workers and producers are processes of their own, joined by CLOCK_MONOTONIC, which is one clock
for all processes of a machine. They end when their standard input does, so that an interrupted benchmark leaves none
behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import selectors
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import OwnServer, own_server
from pgconductor.version import VERSION

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent

# Durability as in production; room for the connections; no checkpoint in the middle of a run of minutes.
DURABLE = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_connections": "300",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "log_line_prefix": "statement|%d|%p|%a|",  # for counting what the server was asked, see `latency`
}
_SHOWN = ("server_version", *list(DURABLE)[:-1], "autovacuum", "jit")

Connection = psycopg.Connection[tuple[Any, ...]]

_LOOKING = "pgconductor benchmark"  # the application name of connections that only look, and cost nothing that counts


class BenchmarkError(Exception):
    """The measurement cannot go on."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--dsn", help="a server on which databases may be created; else a throwaway one")
    result.add_argument("--runs", type=int, default=3, help="how often to measure; medians are of these")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    result.add_argument("--plot", type=Path, metavar="FOLDER", help="draw plots there, as SVG; needs matplotlib")
    return result


def run(name: str, options: argparse.Namespace, measure: Callable[[Bench], None]) -> None:
    """Open a server, measure, report, and exit with 1 if something was lost, done twice or otherwise wrong."""
    plots = None if options.plot is None else _plots()
    with ExitStack() as stack:
        own = None if options.dsn else stack.enter_context(own_server(settings=DURABLE))
        dsn: str = own.dsn() if own is not None else options.dsn
        with tempfile.TemporaryDirectory(prefix="pgconductor-bench-") as folder:
            bench = Bench(name, dsn, own, vars(options), Path(folder), plots)
            bench.print_environment()
            with bench.progress:
                measure(bench)
        bench.report(options.json)
    if bench.problems:
        sys.exit(1)


class Bench:
    """One benchmark under way. `own` is None on a server that the user named; `folder` is for the processes' files.

    `plots` is the module that draws, None if no plots are asked for.
    """

    def __init__(
        self,
        name: str,
        dsn: str,
        own: OwnServer | None,
        options: Mapping[str, object],
        folder: Path,
        plots: ModuleType | None = None,
    ) -> None:
        self.name = name
        self.dsn = dsn
        self.own = own
        self.folder = folder
        self.problems: list[str] = []
        self.facts: dict[str, object] = {}
        self.conclusions: list[str] = []  # sentences
        self.progress = _Steps()
        self._plots = plots
        self._plot_folder = options.get("plot")
        self._options = {key: value for key, value in options.items() if key not in ("dsn", "json", "plot")}
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._units: dict[str, str] = {}
        self._checks = 0
        self._counted = 0
        with psycopg.connect(dsn, autocommit=True) as conn:
            self.settings = _settings(conn)
        self.environment: dict[str, object] = {
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "load_average_before": os.getloadavg(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            "psycopg": psycopg.__version__,
            "pgconductor": VERSION,
            "server": "throwaway" if own is not None else "named by --dsn",
        }

    def print_environment(self) -> None:
        print(f"{self.name}: {', '.join(f'{k}={v}' for k, v in self._options.items())}")
        print("environment:", ", ".join(f"{name}={value}" for name, value in self.environment.items()))
        print("server reports:", ", ".join(f"{name}={value}" for name, value in self.settings.items()), flush=True)

    def say(self, text: str) -> None:
        """Print a line about the run under way."""
        print(f"  {text}", flush=True)

    def note(self, label: str, value: float, unit: str) -> None:
        """Record a figure of this run."""
        self._samples[label].append(value)
        self._units[label] = unit
        self.say(f"{label}: {_figure(value)} {unit}")

    def note_percentiles(self, label: str, seconds: Sequence[float]) -> None:
        """Record p50, p99 and the greatest of some durations, in milliseconds."""
        for name, value in (
            ("p50", percentile(seconds, 0.5)),
            ("p99", percentile(seconds, 0.99)),
            ("max", max(seconds)),
        ):
            self.note(f"{label}, {name}", 1000 * value, "ms")

    def problem(self, text: str) -> None:
        """Something is wrong with what was measured: the benchmark fails at its end."""
        self.problems.append(text)
        print(f"  PROBLEM: {text}", flush=True)

    def samples(self, label: str) -> list[float]:
        """Return what was noted under a label."""
        return self._samples.get(label, [])

    def median(self, label: str) -> float:
        return statistics.median(self._samples[label])

    def ratio(self, label: str, above: str, below: str) -> None:
        """Record the ratio of two medians."""
        self.facts[label] = round(self.median(above) / self.median(below), 3)

    def expect(self, steps: int) -> None:
        """Say how many more measurements there will be, for the progress bar."""
        self.progress.expect(steps)

    def step(self, text: str) -> None:
        """A measurement begins: those before it are done. Only a terminal shows it."""
        self.progress.step(text)

    def lines(
        self,
        name: str,
        *,
        title: str,
        x: str,
        y: str,
        series: Mapping[str, Sequence[tuple[float, float]]],
        log_x: bool = False,
        log_y: bool = False,
    ) -> None:
        """With ``--plot FOLDER``, draw FOLDER/`name`.svg: each series a line through its points. Else nothing."""
        if self._plots is not None:
            path = self._plot_path(name)
            self._plots.lines(path, title=title, x=x, y=y, series=series, log_x=log_x, log_y=log_y)

    def bars(self, name: str, *, title: str, y: str, groups: Mapping[str, Mapping[str, float]]) -> None:
        """With ``--plot FOLDER``, draw FOLDER/`name`.svg: a bar of each series in each group. Else nothing."""
        if self._plots is not None:
            self._plots.bars(self._plot_path(name), title=title, y=y, groups=groups)

    def _plot_path(self, name: str) -> Path:
        assert isinstance(self._plot_folder, Path)
        self._plot_folder.mkdir(parents=True, exist_ok=True)
        return self._plot_folder / f"{name}.svg"

    @contextmanager
    def database(self) -> Iterator[Database]:
        """Give a fresh database with the schema installed; it is dropped afterwards."""
        name = f"pgconductor_bench_{os.getpid()}_{time.monotonic_ns()}"
        with psycopg.connect(self.dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
            try:
                with psycopg.connect(self.dsn, dbname=name, application_name=_LOOKING, autocommit=True) as conn:
                    migrate_sync(conn)
                    yield Database(self, name, conn)
            finally:
                admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def checked(self, *, by_counts: bool = False) -> None:
        if by_counts:
            self._counted += 1
        else:
            self._checks += 1

    def report(self, path: Path | None) -> None:
        """Print medians and extremes, and write them to `path`."""
        if self._checks + self._counted == 0:
            self.problem("nothing was checked: this benchmark must call check_exactly_once")
        self.environment["load_average_after"] = os.getloadavg()
        figures = {
            label: {
                "unit": self._units[label],
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "runs": values,
            }
            for label, values in self._samples.items()
        }
        print(f"{self.name}, medians [least–greatest] of the runs; load {self.environment['load_average_after']}")
        for label, values in self._samples.items():
            spread = f" [{_figure(min(values))}–{_figure(max(values))}]" if len(values) > 1 else ""
            print(f"  {label:<64} {_figure(statistics.median(values)):>10} {self._units[label]}{spread}")
        for label, fact in self.facts.items():
            print(f"  {label:<64} {fact}")
        for text in self.conclusions:
            print(f"  → {text}")
        checks = f"{self._checks} database{'s' if self._checks != 1 else ''}"
        if self._counted:
            checks += (
                f"; {self._counted} without finished rows: none live, as many counted as completed as were invoked"
            )
        print("FAILED: " + "; ".join(self.problems) if self.problems else f"  every execution exactly once: {checks}")
        if path is not None:
            document = {
                "benchmark": self.name,
                "options": self._options,
                "environment": self.environment,
                "settings": self.settings,
                "figures": figures,
                "facts": self.facts,
                "conclusions": self.conclusions,
                "problems": self.problems,
            }
            path.write_text(json.dumps(document, indent=2, default=str) + "\n")


class _Steps:
    """The progress bar, while its context is open; it shows nothing where standard output is no terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._expected = self._begun = 0
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left:"), TimeRemainingColumn(), refresh_per_second=2, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=None)

    def expect(self, steps: int) -> None:
        self._expected += steps
        if self._bar is not None:
            self._bar.update(self._task, total=self._expected)

    def step(self, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=self._begun)
        self._begun += 1

    def __enter__(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Database:
    """A fresh database, with a connection in autocommit for the benchmark itself."""

    def __init__(self, bench: Bench, name: str, conn: Connection) -> None:
        self.bench = bench
        self.name = name
        self.conn = conn
        self.dsn = make_conninfo(bench.dsn, dbname=name)

    def value(self, query: str, *params: object) -> Any:
        """Return the one value of a query."""
        row = self.conn.execute(query.encode(), params or None).fetchone()
        assert row is not None
        return row[0]

    def register_queue(self, name: str) -> int:
        """Register and publish a queue ahead of its worker: what is produced meanwhile lies in its partition."""
        number = int(self.value("select pgconductor.register_queue(%s)", name))
        while self.value("select pgconductor.publish_queues()"):
            pass
        return number

    def invoke_many(
        self, task: str, count: int, queue: str, payload: str = "jsonb_build_object()", delay: float = 0.0
    ) -> None:
        """Insert `count` executions in one statement; `payload` is SQL for jsonb and may use n, from 0."""
        self.conn.execute(
            f"""select count(*) from pgconductor.invoke_many(
                array_fill(%(task)s::text, array[%(count)s]),
                array(select {payload} from generate_series(0, %(count)s - 1) n order by n),
                array_fill(%(queue)s::text, array[%(count)s]),
                p_delays => array_fill(%(delay)s::float8, array[%(count)s]))""".encode(),
            {"task": task, "count": count, "queue": queue, "delay": delay},
        )

    def enable_wake_trigger(self, is_enabled: bool) -> None:
        """Enable or disable the trigger that announces inserts, on all partitions of this database."""
        verb = sql.SQL("enable" if is_enabled else "disable")
        table = "pgconductor._private_executions"
        self.conn.execute(sql.SQL("alter table {} {} trigger _private_announce").format(sql.SQL(table), verb))
        states = self.value(
            "select array_agg(distinct tgenabled::text) from pg_trigger where tgname = '_private_announce'"
        )
        if states != ["O" if is_enabled else "D"]:
            raise BenchmarkError(f"the trigger's state is {states}")

    def local_backends(self) -> list[int]:
        """Return the processes of this database's backends, without those of the benchmark's own looks and inserts.

        None if the server is not among this machine's processes: a backend has the database's name, which is no
        other's, in its title.
        """
        rows = self.conn.execute(
            "select pid from pg_stat_activity where datname = current_database() and backend_type = 'client backend'"
            " and application_name <> %s",
            [_LOOKING],
        )
        return [pid for (pid,) in rows if self.name in _title(pid)]

    def wait_drained(self, timeout: float = 120.0) -> None:
        """Wait until nothing is live. Polls: not for use while something is measured."""
        deadline = time.monotonic() + timeout
        while self.value("select exists (select from pgconductor._private_executions)"):
            if time.monotonic() > deadline:
                states = self.conn.execute(
                    "select state, count(*) from pgconductor._private_executions group by 1"
                ).fetchall()
                raise BenchmarkError(f"not drained within {timeout:g} s: {states}")
            time.sleep(0.02)

    def check_exactly_once(self, expected: int, scheduled: int = 0) -> None:
        """Everything that was invoked has finished once, with success, and nothing else is there but `scheduled`."""
        finished, distinct, completed = self.conn.execute(
            "select count(*), count(distinct id), count(*) filter (where state = 'completed')"
            " from pgconductor._private_finished"
        ).fetchall()[0]
        live, late = self.conn.execute(
            "select count(*), count(*) filter (where state = 'scheduled') from pgconductor._private_executions"
        ).fetchall()[0]
        self.bench.checked()
        if not (finished == distinct == completed == expected and live == late == scheduled):
            self.bench.problem(
                f"of {expected} invoked executions {completed} completed; {finished} finished rows, {distinct} ids, "
                f"{live} live rows"
            )

    def check_completed(self, expected: int, completed: int) -> None:
        """The check where finished rows are not kept: nothing is left, and `completed` were counted as invoked.

        A flush deletes a live row with the claim's token, so that what is counted as completed has ended once. How
        often it was started, is not seen.
        """
        live = self.value("select count(*) from pgconductor._private_executions")
        kept = self.value("select count(*) from pgconductor._private_finished")
        self.bench.checked(by_counts=True)
        if not (completed == expected and live == kept == 0):
            self.bench.problem(
                f"of {expected} invoked executions {completed} were counted as completed; {live} live rows, "
                f"{kept} finished rows where none are kept"
            )

    def wait_alone(self, timeout: float = 30.0) -> None:
        """Wait until the backends of all other connections have ended, and have reported their statistics."""
        deadline = time.monotonic() + timeout
        others = (
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            " and backend_type = 'client backend'"
        )
        while self.value(others):
            if time.monotonic() > deadline:
                raise BenchmarkError("connections of processes that have ended are still open")
            time.sleep(0.01)

    def hot_ratio(self, queue_number: int) -> float | None:
        """Return the share of updates of a queue's live rows that needed no index entries; None without updates.

        Call it after `wait_alone`: a backend reports what it did once a second, and when it ends.
        """
        row = self.conn.execute(
            "select n_tup_hot_upd, n_tup_upd from pg_stat_all_tables where schemaname = 'pgconductor' and relname = %s",
            [f"_private_queue_{queue_number}"],
        ).fetchone()
        assert row is not None
        return row[0] / row[1] if row[1] else None

    def wal_position(self) -> int:
        """Return how many bytes of WAL the server, all its databases together, has written since it was made."""
        return int(self.value("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


# Processes


class Process:
    """A subprocess of this package that prints lines and ends when its standard input does.

    Of the lines that begin with ``completed`` only the latest is kept, as `last_report`.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        python: Path | str = sys.executable,
        command: Sequence[Path | str] | None = None,
    ) -> None:
        """Start `module` with `python`, or `command` under the name `module`."""
        self.name = module
        program = [python, "-m", f"benchmarks.{module}"] if command is None else command
        self._process = subprocess.Popen(
            [*program, *map(str, arguments)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.last_report: list[str] = []  # the words of the latest line that began with "completed"
        self._reader = threading.Thread(target=self._read, name=f"output of {module}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("completed "):
                self.last_report = line.split()
            else:
                self._lines.put(line.rstrip("\n"))
        self._lines.put("")

    def line(self, timeout: float = 120.0) -> list[str]:
        """Wait for the next line and return its words."""
        try:
            words = self._lines.get(timeout=timeout).split()
        except queue.Empty:
            raise BenchmarkError(f"{self.name} said nothing for {timeout:g} s") from None
        return self._checked(words)

    def lines_nowait(self) -> list[list[str]]:
        """Return the words of the lines that are there and were not read yet."""
        lines: list[list[str]] = []
        with suppress(queue.Empty):
            while True:
                lines.append(self._checked(self._lines.get_nowait().split()))
        return lines

    def _checked(self, words: list[str]) -> list[str]:
        if not words:
            raise BenchmarkError(f"{self.name} ended, exit status {self._process.wait()}")
        return words

    def check_alive(self) -> None:
        """Raise `BenchmarkError` if it has ended."""
        if self._process.poll() is not None:
            raise BenchmarkError(f"{self.name} ended, exit status {self._process.returncode}")

    def peak_memory(self) -> int:
        """Return the most memory that it has had resident so far, in bytes; 0 where the system does not tell."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def kill(self) -> int:
        """SIGKILL; returns the time of it (CLOCK_MONOTONIC, nanoseconds)."""
        at = time.monotonic_ns()
        self._process.kill()
        self._process.wait()
        return at

    def end(self, timeout: float = 60.0) -> None:
        """Close its input and wait until it has ended by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(timeout)
        self._reader.join()
        if status != 0:
            raise BenchmarkError(f"{self.name} ended with status {status}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        try:
            if exc_type is None and self._process.returncode is None:
                self.end()
        finally:
            if self._process.returncode is None:
                self.kill()
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                stream.close()


def worker(
    dsn: str,
    queues: str | Sequence[str],
    *,
    concurrency: int = 10,
    sweep: float = 5.0,
    notify: str = "adaptive",
    starts: Path | None = None,
    report_interval: float = 0.0,
    profile: Path | None = None,
    batch: int | None = None,
    keeps_rows: bool = True,
    named_by_queue: bool = False,
    batch_size: int | None = None,
    is_awaited: bool = True,
) -> Process:
    """Start a process with an orchestrator, a worker per queue, and wait until it claims. See `_worker` for its tasks.

    `concurrency` is of each queue; `batch` is the most that a claim or a flush takes, else they adapt; with a
    `batch_size` there is only the task `batch`, whose handler takes so many executions at once. With a
    `report_interval`, in seconds, `wait_completed` can wait for what it does. Without `is_awaited`, call `wait_ready`:
    so that several can start at the same time.
    """
    options: dict[str, object] = {
        "queues": queues if isinstance(queues, str) else ",".join(queues), "concurrency": concurrency, "sweep": sweep,
        "notify": notify, "starts": starts, "report-interval": report_interval, "profile": profile, "batch": batch,
        "batch-size": batch_size,
    }  # fmt: skip
    switches = [*["--keep-no-rows"] * (not keeps_rows), *["--named-by-queue"] * named_by_queue]
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    process = Process("_worker", dsn, *given, *switches)
    try:
        if is_awaited:
            wait_ready(process)
    except BaseException:
        process.kill()
        raise
    return process


def wait_ready(process: Process) -> None:
    if process.line() != ["ready"]:
        raise BenchmarkError("the worker does not get ready")


class Completed(NamedTuple):
    """What a worker process, or several together, had done when they reported. `at` is CLOCK_MONOTONIC, nanoseconds."""

    number: int = 0
    at: int = 0
    claims: int = 0
    empty_claims: int = 0
    short_claims: int = 0
    flushes: int = 0

    def since(self, before: Completed) -> Completed:
        """Return the differences, and the time of this one."""
        return Completed(*(now - then for now, then in zip(self, before, strict=True)))._replace(at=self.at)


def wait_completed(workers: Sequence[Process], count: int, timeout: float = 300.0) -> Completed:
    """Wait until these processes together have completed `count` executions since they started.

    Returns their sums, and the time of the latest report: later than the last flush by a `report_interval` at most.
    """
    deadline = time.monotonic() + timeout
    while True:
        reports = [Completed(*map(int, process.last_report[1:])) for process in workers if process.last_report]
        done = Completed(*(sum(column) for column in zip(*reports, strict=True)))
        if done.number >= count:
            return done._replace(at=max(report.at for report in reports))
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{done.number} of {count} executions completed within {timeout:g} s")
        for process in workers:
            process.check_alive()
        time.sleep(0.005)


def claim_seconds(workers: Sequence[Process]) -> list[float]:
    """Return how long the claims of these processes since the last such call took, in seconds; see `_worker`."""
    for process in workers:
        process.tell("claims")
    return [float(seconds) for process in workers for seconds in process.line()[1:]]


def drain(database: Database, queue: str) -> None:
    """Have a worker finish what a measurement left over on a queue."""
    with worker(database.dsn, queue, concurrency=100, sweep=1.0):
        database.wait_drained()


class Produced:
    """What producers did. `times`: of each execution number, before its INSERT was sent (at a fixed rate: when it was
    due) and after its commit (ns).
    """

    def __init__(self, count: int, seconds: float, times: Mapping[int, tuple[int, int]]) -> None:
        self.count = count
        self.seconds = seconds
        self.times = times

    @property
    def rate(self) -> float:
        return self.count / self.seconds


def produce(
    database: Database,
    queue: str,
    *,
    connections: int,
    seconds: float,
    task: str = "noop",
    rate: float = 0.0,
    burst: float = 0.0,
    pause: float = 0.0,
    first: int = 0,
    keep_times: bool = False,
) -> Produced:
    """Insert single executions, each its own commit, from `connections` connections of another process."""
    path = database.bench.folder / f"times-{time.monotonic_ns()}"
    options: dict[str, object] = {
        "queue": queue, "connections": connections, "seconds": seconds, "task": task, "rate": rate, "burst": burst,
        "pause": pause, "first": first, **({"times": path} if keep_times else {}),
    }  # fmt: skip
    with Process("_producers", database.dsn, *(f"--{name}={value}" for name, value in options.items())) as producers:
        if producers.line() != ["ready"]:
            raise BenchmarkError("the producers do not get ready")
        producers.tell("go")
        _, count, took = producers.line(timeout=seconds * 10 + 60)
    times: dict[int, tuple[int, int]] = {}
    if keep_times:
        flat = array("q", path.read_bytes())
        times = {flat[i]: (flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)}
    return Produced(int(count), float(took), times)


def read_starts(path: Path) -> list[tuple[int, int]]:
    """Read what a worker's `stamp` handlers wrote: the execution's number and when it started (ns)."""
    return [(int(n), int(at)) for n, at in (line.split() for line in path.read_text().splitlines())]


class Observer:
    """Counts the notifications of a queue's channel, on a connection of its own."""

    def __init__(self, database: Database, queue: str) -> None:
        self.count = 0
        self._conn = psycopg.connect(database.dsn, autocommit=True)
        channel = database.value("select pgconductor._private_channel(%s)", queue)
        self._conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="observer")

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._conn.fileno(), selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            is_ending = False
            while not is_ending:
                is_ending = any(key.fd == self._wake_read for key, _ in selector.select())
                self._count()

    def _count(self) -> None:
        pgconn = self._conn.pgconn
        pgconn.consume_input()
        while pgconn.notifies() is not None:
            self.count += 1

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._conn.close()


# What it costs


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU seconds, user and system, that a process of this machine has used so far.

    None where the system does not tell, or the process has ended. Ticks are 10 ms: measure over a second at least.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class CpuMeter:
    """CPU seconds of some processes, by their numbers, and of a database's server backends, from its making on.

    `server` counts the backends that are there when it is asked, but for `Database.conn` and the samplers'; what ended
    before that is not counted, and neither are the server's writers and autovacuum.
    """

    def __init__(self, database: Database, pids: Iterable[int] = ()) -> None:
        self._database = database
        self._processes = list(pids)
        self._before = {pid: cpu_seconds(pid) or 0.0 for pid in [*self._processes, *database.local_backends()]}

    def processes(self) -> float | None:
        """Of the processes together; None where the system does not tell."""
        return self._since(self._processes)

    def server(self) -> float | None:
        """Of the backends of the database together; None if the server runs elsewhere."""
        return self._since(self._database.local_backends())

    def _since(self, pids: Sequence[int]) -> float | None:
        used = [cpu - self._before.get(pid, 0.0) for pid in pids if (cpu := cpu_seconds(pid)) is not None]
        return sum(used) if used else None


class Sampler:
    """While its context is open, a thread calls `look`, with a connection for it alone.

    Looks are `interval` seconds apart, or 40 times as long as the one before took: what is measured is not to share the
    machine with its being looked at.
    """

    _REST = 40

    def __init__(self, database: Database, look: Callable[[Connection], None], interval: float) -> None:
        self._look = look
        self._interval = interval
        self._conn = psycopg.connect(database.dsn, application_name=_LOOKING, autocommit=True)
        self._ending = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._watch, name="sampler")

    def _watch(self) -> None:
        try:
            pause = self._interval
            while not self._ending.wait(pause):
                began_at = time.monotonic()
                self._look(self._conn)
                pause = max(self._interval, self._REST * (time.monotonic() - began_at))
        except psycopg.Error as error:
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._conn.close()
        if self._error is not None and exc_type is None:
            raise BenchmarkError("what the server does could not be sampled") from self._error


class WaitSampler:
    """While its context is open, looks at what the backends of a database wait for, as often as a `Sampler` does.

    `counts`: of each wait event, as ``Lock/transactionid``, how many backends were seen in it, all samples together;
    ``CPU`` are those that wait for nothing the server knows of. Only backends that have a statement or transaction
    under way count, so ``Client/ClientRead`` is one that is idle in a transaction. `samples`: how often it looked.
    A look takes about 0.3 ms of the server's time.
    """

    _QUERY = b"""
        select coalesce(wait_event_type || '/' || wait_event, 'CPU'), count(*)
        from pg_stat_activity
        where datname = current_database() and backend_type = 'client backend' and state <> 'idle'
            and application_name <> %s
        group by 1
    """

    def __init__(self, database: Database, interval: float = 0.02) -> None:
        self.counts: Counter[str] = Counter()
        self.samples = 0
        self._sampler = Sampler(database, self._look, interval)

    def average(self, *wait_types: str) -> float:
        """Return how many backends were waiting on average for events of these types, as ``Lock`` or ``LWLock``."""
        seen = sum(count for event, count in self.counts.items() if event.partition("/")[0] in wait_types)
        return seen / max(1, self.samples)

    def _look(self, conn: Connection) -> None:
        self.counts.update(dict(conn.execute(self._QUERY, [_LOOKING], prepare=True).fetchall()))
        self.samples += 1

    def __enter__(self) -> WaitSampler:
        self._sampler.__enter__()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *rest: object) -> None:
        self._sampler.__exit__(exc_type, *rest)


class MachineMeter:
    """How busy all CPUs of this machine have been since its making, with whatever runs on it."""

    def __init__(self) -> None:
        self._before = self._ticks()

    def busy(self) -> float | None:
        """Return the share, from 0 to 1; None where the system does not tell."""
        after = self._ticks()
        if self._before is None or after is None or after[1] == self._before[1]:
            return None
        return (after[0] - self._before[0]) / (after[1] - self._before[1])

    def _ticks(self) -> tuple[int, int] | None:
        try:
            line = Path("/proc/stat").read_text().partition("\n")[0]
        except OSError:
            return None
        ticks = list(map(int, line.split()[1:9]))  # user nice system idle iowait irq softirq steal
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


# Figures


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _plots() -> ModuleType:
    """The module that draws; if matplotlib is missing, the program ends here instead of after the measurement."""
    try:
        from . import plots
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        sys.exit("--plot needs matplotlib: pip install 'pgconductor[bench]'")
    return plots


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _settings(conn: Connection) -> dict[str, str]:
    rows = conn.execute(
        "select name, current_setting(name) from unnest(%s::text[]) with ordinality n(name, i) order by i",
        [list(_SHOWN)],
    )
    return {str(name): str(value) for name, value in rows}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
