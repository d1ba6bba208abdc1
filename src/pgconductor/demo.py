"""The demo: a fast and a slow queue in one process, watched while they run.

First executions trickle in, so that each finds a worker asleep or idle: what is measured is how soon it is picked up.
Then all the others come at once, which shows the rate and what a backlog looks like. A few executions of the slow
queue fail the first time, and are retried.

Owns a database of its own on the embedded server, or a schema of its own in the database it is given; dropped at the
end, whatever the end is. What a killed demo leaves on the embedded server is dropped when that next starts.

Cancellation: SIGINT and SIGTERM cancel everything; then the database goes, and the server too if nobody else uses it.
"""

from __future__ import annotations

import logging
import math
import secrets
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .conductor import Conductor
from .context import Context
from .db.connection import TrioConnection
from .db.execute import run
from .db.sql_files import script
from .model import QueueStatus
from .retry import Exponential
from .runtime.orchestrator import Orchestrator
from .tasks import Invocation, Task

FAST, SLOW = "fast", "slow"

_SLOW_SHARE = 10  # one execution in so many is slow
_TRICKLE_SHARE = 0.3
_TRICKLE_RATE = 750  # a second, both queues together
_TRICKLE_TIME = 5.0  # seconds at most
_FLAKY = 50  # one slow execution in so many fails the first time
_SLOW_SECONDS = 0.05
_FRAME = 0.2  # seconds between two looks at the database
_LINE = 2.0  # seconds between two lines where there is no terminal
_RATE_SPAN = 1.0  # seconds over which a rate is taken
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class Pickup:
    """Time from due to the start of the handler, in milliseconds; None where nothing was measured."""

    p50: float | None
    p99: float | None


_UNMEASURED = Pickup(None, None)


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """One queue at the end. `pickup`: while executions trickled in."""

    queue: str
    completed: int
    failed: int
    pickup: Pickup


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo saw. `seconds`: from the first invocation to the last finish. `rate`: finished a second while the
    backlog was worked off, of both queues together. `retried`: executions that failed the first time.
    """

    server: str
    executions: int
    seconds: float
    rate: float
    retried: int
    queues: tuple[QueueSummary, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """One queue as it is shown."""

    queue: str
    ready: int
    running: int
    finished: int
    expected: int
    rate: float
    pickup: Pickup


def run_demo(executions: int, *, dsn: str | None = None, is_quiet: bool = False) -> Summary:
    """Run the demo with so many executions (1 or more) and return what it saw; blocks for some ten seconds.

    `dsn`: use a schema of its own in that database; None: a database of its own on the embedded server, which is
    started if necessary. `is_quiet`: print nothing. Raises `NoDatabase`, `InvalidOption`; `KeyboardInterrupt` when it
    was interrupted, after cleaning up.
    """
    console = Console(quiet=is_quiet, highlight=False)
    if dsn is not None:
        return _run(Conductor(dsn, schema=f"pgconductor_demo_{secrets.token_hex(6)}"), executions, console)
    from .embedded import embedded_server  # not to be had on every platform, and needed here only

    console.print("Starting the embedded PostgreSQL ...")
    with embedded_server() as server:
        database: str | None = None
        try:
            with _uninterrupted():
                database = server.create_database("pgconductor_demo")
            return _run(Conductor(database), executions, console)
        finally:
            if database is not None:
                server.drop_database(database)


def _run(conductor: Conductor, executions: int, console: Console) -> Summary:
    summary = trio.run(_Demo(conductor, executions, console).run)
    if summary is None:
        raise KeyboardInterrupt
    _print_summary(summary, console)
    return summary


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put SIGINT and SIGTERM off: what is made in the block must have its name known to whoever drops it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Demo:
    """One run. Its tasks are the producer, the display, the orchestrator and the signals."""

    def __init__(self, conductor: Conductor, executions: int, console: Console) -> None:
        self._conductor = conductor
        self._console = console
        self._expected = {FAST: executions - executions // _SLOW_SHARE, SLOW: executions // _SLOW_SHARE}
        self._retried = 0
        self._was_interrupted = False
        self._pickups: dict[str, Pickup] = {FAST: _UNMEASURED, SLOW: _UNMEASURED}
        self._backlog: tuple[float, int] | None = None  # when it came, and how much had been finished by then

        @conductor.task(queue=FAST)
        async def fast(number: int) -> int:
            return number

        @conductor.task(queue=SLOW, backoff=Exponential(initial=0.2))
        async def slow(ctx: Context, number: int) -> int:
            await trio.sleep(_SLOW_SECONDS)
            if number % _FLAKY == _FLAKY - 1 and ctx.attempt == 1:
                self._retried += 1
                raise ConnectionError("the service that this task calls did not answer")
            return number

        self._fast, self._slow = fast, slow
        self._orchestrator = Orchestrator(
            conductor,
            workers=[
                conductor.create_worker(queue=FAST, tasks=[self._fast], concurrency=50),
                conductor.create_worker(queue=SLOW, tasks=[self._slow], concurrency=20),
            ],
            handle_signals=False,
        )

    async def run(self) -> Summary | None:
        """Return the summary, None if a signal came."""
        async with self._conductor, self._own_schema():
            summary: Summary | None = None
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_signals, nursery.cancel_scope)
                self._console.print("Installing the schema, starting two workers ...")
                await nursery.start(self._orchestrator.run)
                summary = await self._watch()
                self._orchestrator.stop()
                nursery.cancel_scope.cancel()
            return None if self._was_interrupted else summary

    @asynccontextmanager
    async def _own_schema(self) -> AsyncIterator[None]:
        """Drop the schema at the end, unless its database goes anyway."""
        try:
            yield
        finally:
            if self._conductor.schema != "pgconductor":
                with trio.move_on_after(30, shield=True):
                    async with await TrioConnection.connect(self._conductor.conninfo, autocommit=True) as conn:
                        await run(conn, script("drop schema if exists @schema@ cascade", self._conductor.schema))

    async def _watch_signals(
        self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                self._was_interrupted = True
                scope.cancel()

    # Producing

    async def _produce(self) -> None:
        """The trickle, then the backlog."""
        fast, slow = self._expected[FAST], self._expected[SLOW]
        step = 1 / _TRICKLE_RATE
        begun_at = trio.current_time()
        fast_sent = slow_sent = 0
        # By count, or by time on a machine that is too busy to keep the rate.
        while fast_sent + slow_sent < _TRICKLE_SHARE * (fast + slow) and trio.current_time() < begun_at + _TRICKLE_TIME:
            if (slow_sent + 1) * _SLOW_SHARE <= fast_sent + slow_sent + 1:
                await self._slow.invoke(number=slow_sent)
                slow_sent += 1
            else:
                await self._fast.invoke(number=fast_sent)
                fast_sent += 1
            await trio.sleep_until(begun_at + (fast_sent + slow_sent) * step)
        for worker in self._orchestrator.statistics().workers:
            self._pickups[worker.queue] = _pickup(worker.pickups)
        self._backlog = (
            trio.current_time(),
            sum(worker.outcomes.get("completed", 0) for worker in self._orchestrator.statistics().workers),
        )
        await self._invoke_all(self._fast, fast_sent, fast)
        await self._invoke_all(self._slow, slow_sent, slow)

    async def _invoke_all(self, task: Task[..., int], first: int, last: int) -> None:
        for start in range(first, last, _BATCH):
            calls: list[Invocation[int]] = [task.bind(number=n) for n in range(start, min(start + _BATCH, last))]
            await task.invoke_many(calls)

    # Watching

    async def _watch(self) -> Summary:
        begun_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._produce)
            queues = await (self._watch_live() if self._console.is_terminal else self._watch_lines())
        ended_at = trio.current_time()
        backlog_at, before = self._backlog or (begun_at, 0)
        done = sum(queue.completed + queue.failed for queue in queues)
        return Summary(
            await self._server_version(),
            done,
            ended_at - begun_at,
            (done - before) / (ended_at - backlog_at),
            self._retried,
            tuple(QueueSummary(q.queue, q.completed, q.failed, self._pickups[q.queue]) for q in queues),
        )

    async def _server_version(self) -> str:
        async with await TrioConnection.connect(self._conductor.conninfo) as conn:
            cursor = await conn.execute("show server_version")
            row = await cursor.fetchone()
        assert row is not None
        return f"PostgreSQL {str(row[0]).split()[0]}"

    async def _watch_live(self) -> Sequence[QueueStatus]:
        with (
            Live(console=self._console, auto_refresh=False, transient=True) as live,
            _logging_to(RichHandler(console=self._console, show_path=False)),
        ):
            return await self._follow(lambda rows, seconds: live.update(_picture(rows, seconds), refresh=True))

    async def _watch_lines(self) -> Sequence[QueueStatus]:
        next_line = 0.0

        def show(rows: Sequence[_Row], seconds: float) -> None:
            nonlocal next_line
            if seconds >= next_line:
                next_line = seconds + _LINE
                self._console.print(f"{seconds:5.1f} s  " + "  |  ".join(map(_line, rows)), soft_wrap=True)

        with _logging_to(logging.StreamHandler(sys.stderr)):
            return await self._follow(show)

    async def _follow(self, show: Callable[[Sequence[_Row], float], None]) -> Sequence[QueueStatus]:
        """Look and show until everything has finished; return the last look."""
        begun_at = trio.current_time()
        past: dict[str, deque[tuple[float, int]]] = {queue: deque() for queue in self._expected}
        while True:
            queues = [queue for queue in await self._conductor.queue_status() if queue.queue in self._expected]
            seconds = trio.current_time() - begun_at
            pickups = {worker.queue: _pickup(worker.pickups) for worker in self._orchestrator.statistics().workers}
            rows: list[_Row] = []
            for queue in queues:
                finished = queue.completed + queue.failed
                rate = _rate(past[queue.queue], seconds, finished)
                ready, expected = queue.ready + queue.scheduled, self._expected[queue.queue]
                pickup = pickups.get(queue.queue, _UNMEASURED)
                rows.append(_Row(queue.queue, ready, queue.running, finished, expected, rate, pickup))
            show(rows, seconds)
            if all(row.finished >= row.expected for row in rows):
                return queues
            await trio.sleep(_FRAME)


def _rate(past: deque[tuple[float, int]], now: float, count: int) -> float:
    """How much `count` grew a second, of late; notes it in `past`."""
    past.append((now, count))
    while len(past) > 2 and past[1][0] <= now - _RATE_SPAN:
        past.popleft()
    span = now - past[0][0]
    return (count - past[0][1]) / span if span > 0 else 0.0


@contextmanager
def _logging_to(handler: logging.Handler) -> Iterator[None]:
    """Show the library's warnings beside the display, not through it."""
    logger = logging.getLogger("pgconductor")
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _pickup(seconds: Sequence[float]) -> Pickup:
    ordered = sorted(seconds)
    return Pickup(_percentile(ordered, 0.50), _percentile(ordered, 0.99))


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed, in milliseconds."""
    if not ordered:
        return None
    return round(1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)], 2)


# Showing


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f} ms" if value < 100 else f"{value:,.0f} ms"


def _line(row: _Row) -> str:
    return (
        f"{row.queue}: {row.ready:,} ready, {row.running:,} running, {row.finished:,} of {row.expected:,} finished, "
        f"{row.rate:,.0f}/s, pick-up p50 {_milliseconds(row.pickup.p50)}, p99 {_milliseconds(row.pickup.p99)}"
    )


def _picture(rows: Sequence[_Row], seconds: float) -> RenderableType:
    table = Table(title=f"pgconductor, {seconds:.1f} s", title_justify="left", box=SIMPLE)
    table.add_column("queue")
    for column in ("ready", "running", "finished", "rate", "p50", "p99"):
        table.add_column(column, justify="right", min_width=7, no_wrap=True)
    table.add_column("", min_width=10)
    for row in rows:
        table.add_row(
            row.queue,
            f"{row.ready:,}",
            f"{row.running:,}",
            f"{row.finished:,}",
            f"{row.rate:,.0f}/s",
            _milliseconds(row.pickup.p50),
            _milliseconds(row.pickup.p99),
            ProgressBar(total=max(1, row.expected), completed=row.finished, width=10),
        )
    return Group(table, Text("p50, p99: from due to the start of the handler, the latest 2,000. Ctrl-C ends it."))


def _print_summary(summary: Summary, console: Console) -> None:
    completed = sum(queue.completed for queue in summary.queues)
    failed = sum(queue.failed for queue in summary.queues)
    noun = "execution" if summary.executions == 1 else "executions"
    console.print(
        f"{summary.executions:,} {noun} in {summary.seconds:.1f} s on {summary.server}: {completed:,} completed, "
        f"{failed:,} failed, {summary.retried:,} retried once.",
        soft_wrap=True,
    )
    for queue in summary.queues:
        if queue.pickup != _UNMEASURED:
            console.print(
                f"  {queue.queue}: picked up after {_milliseconds(queue.pickup.p50)} (p50), "
                f"{_milliseconds(queue.pickup.p99)} (p99) while they trickled in",
                soft_wrap=True,
            )
    console.print(f"  then {summary.rate:,.0f} a second while the backlog was worked off, the slow ones among them")
