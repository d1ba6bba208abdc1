"""Workers whose every step of the wake-up protocol a test can watch and stop.

A `Workplace` runs pipelines on a database without an orchestrator: one owner whose lease outlasts the test, and no
sweep unless asked for. A `WatchedWorker` counts its looks and its sleeps, and stops where the test says (`stop_at`), so
that a test can put a commit exactly between two steps. Each queue has one task of its name, which takes a number; when
the handler of a number began is in `started_at`, by Trio's clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
import trio

from pgconductor import Conductor
from pgconductor.db.calls import WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.db.link import OutageLog, Target
from pgconductor.model import Claimed
from pgconductor.runtime.errands import Errands
from pgconductor.runtime.lease import Lease, boot_clock
from pgconductor.runtime.listener import Listener
from pgconductor.runtime.load import WorkerCounts
from pgconductor.runtime.worker import Pipeline, Starts, Surroundings
from pgconductor.tasks import NotifyMode, Task

Place = Literal["before look", "after look", "before sleep", "after sleep"]
Session = psycopg.Connection[tuple[Any, ...]]

INSERT: LiteralString = (
    "select pgconductor.invoke(%s, jsonb_build_object('n', %s::int), queue => %s, delay => make_interval(secs => %s))"
)

LIMIT = 20.0
"""Seconds in which all that waits for no sweep has happened, even on a slow machine."""

LONG_LEASE = 600.0
"""A lease whose heartbeats no test waits for, once they are rare: what happens in time was not told by one."""


def make_heartbeats_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orchestrators of this process renew a long lease at a quarter of it, however long; else after 15 s at most."""

    def quarter(lease: float) -> float:
        return lease / 4

    monkeypatch.setattr("pgconductor.runtime.incarnation.heartbeat_interval", quarter)


class News:
    """Something has changed: whoever waits for a condition looks again."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def tell(self) -> None:
        self._event.set()
        self._event = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(LIMIT):
            while not condition():
                await self._event.wait()


class Stop:
    """A place at which a worker waits, once, until it may go on."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.resume = trio.Event()

    async def until_reached(self) -> None:
        with trio.fail_after(LIMIT):
            await self.reached.wait()


class WatchedWorker:
    """One queue's pipeline, what it did, and where it is to stop."""

    def __init__(self, pipeline: Pipeline, owner: UUID, listener: Listener | None, sweep_interval: float) -> None:
        self.pipeline = pipeline
        self.listener = listener
        self.owner = owner
        self.queue = pipeline.worker.queue
        self.reactor = pipeline.reactor
        self.reactor._sweep_interval = sweep_interval
        self.answers: list[bool | None] = []
        self.naps: list[float] = []
        self.is_asleep = False
        self._news = News()
        self._stops: dict[Place, Stop] = {}
        self._look, self._sleep = self.reactor.look, self.reactor.sleep
        vars(self.reactor).update(look=self._watched_look, sleep=self._watched_sleep)

    def stop_at(self, place: Place) -> Stop:
        """Have the worker wait the next time it comes there. Sleeps are those of no stated length."""
        stop = self._stops[place] = Stop()
        return stop

    async def until_asleep(self) -> None:
        """Until nothing ends the worker's sleep but a wake-up, a due time or a sweep."""
        await self._news.until(lambda: self.is_asleep)

    async def until_looked(self, times: int) -> None:
        """Until the worker has looked so many times more whether anything is in flight."""
        wanted = len(self.answers) + times
        await self._news.until(lambda: len(self.answers) >= wanted)

    async def _pass(self, place: Place) -> None:
        if (stop := self._stops.pop(place, None)) is not None:
            stop.reached.set()
            with trio.fail_after(LIMIT):
                await stop.resume.wait()

    async def _watched_look(self) -> bool | None:
        await self._pass("before look")
        answer = await self._look()
        self.answers.append(answer)
        self._news.tell()
        await self._pass("after look")
        return answer

    async def _watched_sleep(self, due_in: float | None, *, at_most: float = math.inf) -> None:
        if at_most < math.inf:
            self.naps.append(at_most)
            await self._sleep(due_in, at_most=at_most)
            return
        await self._pass("before sleep")
        self.is_asleep = True
        self._news.tell()
        try:
            await self._sleep(due_in)
        finally:
            self.is_asleep = False
        await self._pass("after sleep")


class Workplace:
    """See the module's description. `hold` makes handlers of chosen numbers wait."""

    def __init__(self, dsn: str, *, listen_dsn: str | None = None, probe_interval: float = 60.0) -> None:
        self.dsn = dsn
        self.conductor = Conductor(dsn)
        self.calls = self.conductor.calls
        self.workers: list[WatchedWorker] = []
        self.listeners: list[Listener] = []
        self.started_at: dict[int, float] = {}
        self.news = News()  # of executions that began
        self._held: dict[int, trio.Event] = {}
        self._target = Target(dsn, listen_dsn or dsn, 5)
        self._outages = OutageLog()
        self._probe_interval = probe_interval

    def listener(self) -> Listener:
        listener = Listener(
            self._target, self.calls, self._outages, random.Random(), probe_interval=self._probe_interval
        )
        self.listeners.append(listener)
        return listener

    def worker(
        self,
        queue: str = "q",
        *,
        notify: NotifyMode = "adaptive",
        sweep_interval: float = math.inf,
        concurrency: int = 10,
        flush_interval: float = 0.05,
        listener: Listener | None = None,
    ) -> WatchedWorker:
        """One more worker, with a listener of its own unless one is given or none is needed."""
        if listener is None and notify != "off":
            listener = self.listener()
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            owner = register(conn, self.conductor, queue)
            number = run_sync(conn, self.calls.register_queue(queue))
        worker = self.conductor.create_worker(
            queue=queue,
            tasks=[self._task(queue)],
            concurrency=concurrency,
            flush_interval=flush_interval,
            notify=notify,
        )
        shared = Surroundings(self._target, self.calls, {}, self._outages, random.Random(), 5.0)
        lease = Lease(owner, 600.0, boot_clock())
        errands = Errands(self._target, self.calls, self._outages, random.Random())
        pipeline = Pipeline(worker, number, lease, Starts(), listener, WorkerCounts(), errands, shared)
        watched = WatchedWorker(pipeline, owner, listener, sweep_interval)
        self.workers.append(watched)
        return watched

    def hold(self, n: int) -> trio.Event:
        """Have the handler of `n` wait for the event after it has begun."""
        self._held[n] = trio.Event()
        return self._held[n]

    def _task(self, queue: str) -> Task[..., Any]:
        if (known := self.conductor.registry.get(queue)) is not None:
            return known

        async def note(n: int) -> None:
            self.started_at.setdefault(n, trio.current_time())
            self.news.tell()
            if n in self._held:
                await self._held[n].wait()

        return self.conductor.task(name=queue, queue=queue)(note)

    async def until_started(self, *numbers: int) -> None:
        await self.news.until(lambda: all(n in self.started_at for n in numbers))

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[None]:
        """All listeners and workers run inside the block, and are cancelled at its end."""
        async with trio.open_nursery() as nursery:
            for listener in self.listeners:
                await nursery.start(listener.run)
            for worker in self.workers:
                await nursery.start(worker.pipeline.run)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()


def register(conn: Session, conductor: Conductor, queue: str) -> UUID:
    """Register the queue and an orchestrator whose lease lasts for ten minutes."""
    owner = uuid4()
    run_sync(conn, conductor.calls.register_queue(queue))
    rows = [WorkerRow(queue, [queue], 10)]
    run_sync(conn, conductor.calls.register_orchestrator(owner, "workplace", 600.0, "0", 1, rows))
    return owner


def insert(conn: Session, *numbers: int, queue: str = "q", delay: float = 0.0) -> None:
    """Invoke the queue's task, one statement for each number."""
    for n in numbers:
        conn.execute(INSERT, [queue, n, queue, delay])


def claim(conn: Session, place: Workplace, queue: str = "q") -> list[Claimed]:
    """Claim in the session's transaction, as another orchestrator would."""
    with psycopg.connect(place.dsn, autocommit=True) as other:
        owner = register(other, place.conductor, queue)
    return run_sync(conn, place.calls.claim(queue, owner, [queue], 1000)).claimed


def is_flag_up(conn: Session, queue: str = "q") -> bool:
    """Does anybody hold the queue's sleep flag, by the server's account?"""
    return not scalar(
        conn,
        "select case when pg_try_advisory_lock(pgconductor._private_key_m(%s))"
        " then pg_advisory_unlock(pgconductor._private_key_m(%s)) else false end",
        queue,
        queue,
    )


def scalar(conn: Session, query: str, *params: object) -> Any:
    row = conn.execute(query.encode(), params).fetchone()
    assert row is not None
    return row[0]


def listeners_pids(conn: Session) -> list[int]:
    """Server processes of the LISTEN connections to this database."""
    rows = conn.execute(
        "select pid from pg_stat_activity where datname = current_database()"
        " and application_name = 'pgconductor listen'"
    ).fetchall()
    return [int(pid) for (pid,) in rows]


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds of which no event tells: a counter, or something at the server."""
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.002)


@contextmanager
def session(dsn: str, *, autocommit: bool = True) -> Generator[Session]:
    """A connection beside the engine's: its statements block the test's loop, and none of them waits for the engine."""
    conn: Session = psycopg.connect(dsn, autocommit=autocommit)
    try:
        yield conn
    finally:
        conn.close()
