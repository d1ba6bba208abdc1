"""When do more worker processes on a queue stop helping, and does splitting the queue help?

A run takes 4 to 5 minutes on two busy cores.

Worker processes × queues, with no-op tasks and with tasks that sleep 10 ms. Processes are spread over the queues
evenly; where there are more queues than processes, each serves several, and has its runners divided among them. A cell
is measured with processes of its own on a fresh database, first warmed up; its rate is executions over the time from
the commit of all of them, in one transaction, to the last `finished_at`, by the server's clock.

Beside each rate: how long claims took, from the call to its answer; how many were empty, or partial (brought less than
they asked for); CPUs used by the worker processes and by the server's backends, and the share of the machine's CPUs in
which anything ran; backends waiting for a lock (heavyweight, or a lightweight one inside the server), on average over
samples of pg_stat_activity at least 20 ms apart. "Skipped" is seen from outside, of one queue after the other, at most
every 50 ms: of the first 1000 rows that are ready in claim order, those that an unfinished transaction has locked or is
changing, which a claim that began then would step over. Nothing is locked to see that: such a row has an xmax. (So has
one whose claim was rolled back.)

At the end it says in words what the medians show. What gains less than a tenth is called nothing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from psycopg import sql

from . import harness
from .harness import Bench, Connection, CpuMeter, Database, MachineMeter, Process, Sampler, WaitSampler

_GAIN = 1.1  # of rates: what is less is not worth a process
_FULL = 0.9  # of the machine's CPUs
_DISTURBED = 0.4  # of them, used by others: the server's writers and this process, which are among them, use less
_PAUSE = 0.01
_TITLES = {"noop": "no-op", "pause": "10 ms"}


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 10, 20], help="numbers of processes")
    parser.add_argument("--queues", type=int, nargs="+", default=[1, 2, 4, 10], help="numbers of queues")
    parser.add_argument("--tasks", nargs="+", choices=_TITLES, default=list(_TITLES), help="no-op, sleeping 10 ms")
    parser.add_argument("--count", type=int, default=20_000, help="executions of a cell, at most")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="of sleeping tasks for all runners of a cell, at most"
    )
    parser.add_argument("--concurrency", type=int, default=20, help="runners of a process")
    options = parser.parse_args()

    def measure(bench: Bench) -> None:
        sides = list(itertools.product(sorted(set(options.workers)), sorted(set(options.queues))))
        # Sleeping ones first: a stock that has grown with no-op tasks would be too large for them at first.
        tasks = [task for task in ("pause", "noop") if task in options.tasks]
        bench.expect(options.runs * len(sides) * len(tasks))
        for number in range(options.runs):
            # Forwards and backwards, so that what drifts meanwhile does not favour a side.
            for workers, queues in sides if number % 2 == 0 else reversed(sides):
                _measure_side(
                    bench, workers, queues, tasks=tasks, count=options.count, seconds=options.seconds,
                    concurrency=options.concurrency,
                )  # fmt: skip
        _conclude(bench, tasks, sides)

    harness.run("contention", options, measure)


def serving(workers: int, queues: int) -> list[list[int]]:
    """Return for each worker process the queues it serves: one, or, if there are fewer processes, its share of them."""
    return [
        [queue for queue in range(queues) if queue % workers == worker] if workers < queues else [worker % queues]
        for worker in range(workers)
    ]


def _name(tasks: str, workers: int, queues: int) -> str:
    return f"{_TITLES[tasks]}, workers={workers}, queues={queues}"


def _measure_side(
    bench: Bench, workers: int, queues: int, *, tasks: Sequence[str], count: int, seconds: float, concurrency: int
) -> None:
    with bench.database() as database, ExitStack() as stack:
        numbers = [database.register_queue(f"q{number}") for number in range(queues)]
        processes: list[Process] = []
        runners = 0
        for served in serving(workers, queues):
            each = max(1, concurrency // len(served))
            runners += each * len(served)
            process = harness.worker(
                database.dsn, [f"q{number}" for number in served], concurrency=each, report_interval=0.1,
                named_by_queue=True, is_awaited=False,
            )  # fmt: skip
            processes.append(stack.enter_context(process))
        for process in processes:
            harness.wait_ready(process)
        side = _Side(bench, database, processes, numbers)
        for task in tasks:
            cell = count if task == "noop" else min(count, int(runners / _PAUSE * seconds))
            side.measure(task, _name(task, workers, queues), max(1, cell // queues))
        database.check_exactly_once(side.invoked)


class _Side:
    """Some worker processes on some queues of a database; `invoked`: how many executions so far."""

    def __init__(
        self, bench: Bench, database: Database, processes: Sequence[Process], queue_numbers: Sequence[int]
    ) -> None:
        self.invoked = 0
        self._bench = bench
        self._database = database
        self._processes = processes
        self._queue_numbers = queue_numbers

    def measure(self, task: str, label: str, each: int) -> None:
        """Note how `each` executions on each queue are done, after some that warm up connections and plans."""
        bench, processes = self._bench, self._processes
        bench.step(label)
        self._invoke(task, max(1, each // 20))
        before = harness.wait_completed(processes, self.invoked)
        harness.claim_seconds(processes)
        waits = WaitSampler(self._database)
        skipped = SkipSampler(self._database, self._queue_numbers)
        cpu = CpuMeter(self._database, [process.pid for process in processes])
        started_at = self._invoke(task, each)
        machine = MachineMeter()
        with waits, skipped.sampler:
            done = harness.wait_completed(processes, self.invoked).since(before)
            busy, of_workers, of_server = machine.busy(), cpu.processes(), cpu.server()
        took = self._last_finished_at() - started_at

        bench.note(label, done.number / took, "executions/s")
        claims = [1000 * seconds for seconds in harness.claim_seconds(processes)]
        bench.note(f"{label}: claim p50", harness.percentile(claims, 0.5), "ms")
        bench.note(f"{label}: claim p99", harness.percentile(claims, 0.99), "ms")
        bench.note(f"{label}: claims", done.claims, "claims")
        bench.note(f"{label}: empty", done.empty_claims, "claims")
        bench.note(f"{label}: partial", done.short_claims, "claims")
        bench.note(f"{label}: skipped", skipped.average(), "rows of 1000")
        bench.note(f"{label}: waiting for locks", waits.average("Lock", "LWLock"), "backends")
        for whose, used in (("workers", of_workers), ("server", of_server)):
            if used is not None:
                bench.note(f"{label}: CPUs of {whose}", used / took, "CPUs")
        if busy is not None:
            bench.note(f"{label}: machine busy", busy, "of 1")

    def _invoke(self, task: str, each: int) -> float:
        """Insert in one transaction; return the server's time just after it, in seconds."""
        with self._database.conn.transaction():
            for index in range(len(self._queue_numbers)):
                self._database.invoke_many(f"{task}.q{index}", each, f"q{index}")
        self.invoked += each * len(self._queue_numbers)
        return float(self._database.value("select extract(epoch from clock_timestamp())"))

    def _last_finished_at(self) -> float:
        return float(
            self._database.value("select extract(epoch from max(finished_at)) from pgconductor._private_finished")
        )


class SkipSampler:
    """Counts ready rows that others have locked: see the module. `sampler` is the context in which it does."""

    _QUERY = """
        select count(*), count(*) filter (where holder <> '0') from (
            select xmax::text as holder from pgconductor.{} where state = 'ready'
            order by priority desc, run_at, id limit 1000
        ) first
    """

    def __init__(self, database: Database, numbers: Iterable[int], interval: float = 0.05) -> None:
        """`numbers`: of the queues, as `register_queue` gives them."""
        self._queries = itertools.cycle(
            sql.SQL(self._QUERY).format(sql.Identifier(f"_private_queue_{number}")) for number in numbers
        )
        self._skipped: list[int] = []
        self.sampler = Sampler(database, self._look, interval)

    @property
    def samples(self) -> int:
        """How often it saw ready rows."""
        return len(self._skipped)

    def average(self) -> float:
        """Return the rows that a claim would have stepped over, on average over the samples that saw ready rows."""
        return sum(self._skipped) / max(1, len(self._skipped))

    def _look(self, conn: Connection) -> None:
        row = conn.execute(next(self._queries), prepare=True).fetchone()
        assert row is not None
        if row[0]:
            self._skipped.append(int(row[1]))


# What it shows


@dataclass(frozen=True, slots=True)
class Cell:
    """Medians of some worker processes on some queues.

    Shares of the machine's CPUs, None if unknown: `busy`, and `others` of it, neither the processes nor the backends.
    """

    workers: int
    queues: int
    rate: float
    busy: float | None
    others: float | None = None

    @property
    def is_disturbed(self) -> bool:
        return self.others is not None and self.others >= _DISTURBED

    @property
    def is_full(self) -> bool:
        """Whether the CPUs were used up by what is measured."""
        return self.busy is not None and self.busy >= _FULL and not self.is_disturbed


def findings(title: str, cells: Sequence[Cell]) -> list[str]:
    """Say what the cells of one kind of task show: to which number processes help, and whether more queues do."""
    said: list[str] = []
    useful: dict[int, Cell] = {}
    for queues in sorted({cell.queues for cell in cells}):
        row = sorted((cell for cell in cells if cell.queues == queues), key=lambda cell: cell.workers)
        best = useful[queues] = _useful(row)
        said.append(f"{title}, {_counted(queues, 'queue')}: {_of_workers(row, best)}")
    fewest = min(useful)
    for queues, best in useful.items():
        if queues > fewest:
            said.append(f"{title}: {_of_queues(cells, fewest, queues, useful[fewest], best)}")
    if any(cell.is_full for cell in cells):
        least = min(cell.workers for cell in cells if cell.is_full)
        said.append(
            f"{title}: the CPUs of this machine were full with {_counted(least, 'process')}: where they are, neither "
            "more processes nor more queues help, but more CPUs or cheaper handlers do"
        )
    if disturbed := sum(cell.is_disturbed for cell in cells):
        said.append(
            f"{title}: in {disturbed} of {_counted(len(cells), 'cell')} something else used {_DISTURBED:.0%} of this "
            "machine's CPUs or more: measure again when it is quiet"
        )
    return said


def _useful(row: Sequence[Cell]) -> Cell:
    """The cell with the fewest processes beyond which no more of them gain a tenth."""
    return next(
        cell for cell in row if all(more.rate < _GAIN * cell.rate for more in row if more.workers > cell.workers)
    )


def _of_workers(row: Sequence[Cell], best: Cell) -> str:
    last = row[-1]
    if len(row) == 1:
        return f"{best.rate:,.0f}/s with {_counted(best.workers, 'process')}"
    if best is last:
        first = _counted(row[0].workers, "process")
        text = f"{_counted(best.workers, 'process')} do {best.rate / row[0].rate:.1f} × of {first} ({best.rate:,.0f}/s)"
        return text if last.is_full else f"{text}; more may gain more"
    text = f"above {_counted(best.workers, 'process')} it gains nothing ({best.rate:,.0f}/s"
    return f"{text}, {last.rate / best.rate:.2f} × of that with {last.workers})"


def _of_queues(cells: Sequence[Cell], few: int, many: int, before: Cell, after: Cell) -> str:
    """Compare at the same number of processes, the greatest that both have been measured with."""
    rates = {(cell.workers, cell.queues): cell for cell in cells}
    both = [workers for workers, queues in rates if queues == few and (workers, many) in rates]
    if not both:
        return f"{many} queues and {few} were not measured with the same number of processes"
    workers = max(both)
    one, split = rates[workers, few], rates[workers, many]
    ratio = split.rate / one.rate
    text = f"with {_counted(workers, 'process')}, {many} queues give {ratio:.2f} × of {_counted(few, 'queue')}"
    if ratio < 1 / _GAIN:
        return f"{text}: splitting costs"
    if ratio < _GAIN:
        return f"{text}: splitting gains nothing"
    if before.rate * _GAIN > after.rate:
        fewer = f"{_counted(few, 'queue')} with {_counted(before.workers, 'process')}"
        return f"{text}, but no more than {fewer}: use fewer processes"
    return f"{text}: split it"


def _counted(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _conclude(bench: Bench, tasks: Sequence[str], sides: Sequence[tuple[int, int]]) -> None:
    """Say what was found, note the ratios that are asked for most, and draw."""
    for task in tasks:
        title = _TITLES[task]
        cells: list[Cell] = []
        for workers, queues in sides:
            label = _name(task, workers, queues)
            busy, of_workers, of_server = (
                bench.median(figure) if bench.samples(figure := f"{label}: {what}") else None
                for what in ("machine busy", "CPUs of workers", "CPUs of server")
            )
            others = None
            if busy is not None and of_workers is not None and of_server is not None:
                others = busy - (of_workers + of_server) / (os.cpu_count() or 1)
            cells.append(Cell(workers, queues, bench.median(label), busy, others))
        bench.conclusions += findings(title, cells)
        for text, above, below in (
            ("10 workers / 1, on one queue", (10, 1), (1, 1)),
            ("4 queues / one, 10 workers", (10, 4), (10, 1)),
        ):
            if above in sides and below in sides:
                bench.ratio(f"{title}: {text}", _name(task, *above), _name(task, *below))
        for name, suffix, what, unit in (
            ("rate", "", "rate", "executions/s"),
            ("claim_p99", ": claim p99", "a claim's p99", "ms"),
        ):
            bench.lines(
                f"contention_{task}_{name}", title=f"{title} tasks: {what}", x="worker processes", y=unit, log_x=True,
                series={
                    _counted(queues, "queue"): [
                        (workers, bench.median(_name(task, workers, queues) + suffix))
                        for workers, other in sides if other == queues
                    ]
                    for queues in dict.fromkeys(queues for _, queues in sides)
                },
            )  # fmt: skip


if __name__ == "__main__":
    main()
