"""Runs workers in one process: the only composition root, and the owner of every task of the engine.

Life of a `run`: prepare (schema, queues, resources), then one incarnation after the other until stopped. An
incarnation is an owner id with a lease. While it lives, one task renews the lease, one rescues what dead
orchestrators held, one listener per queue (or one for all) wakes the workers, and each worker runs its pipeline. The
lease is a cancel scope: its deadline lies before the lease's end in the database, and each renewal moves it. If it
passes, or the database says that the incarnation is dead, everything in it is cancelled, nothing more is written
under its id, and the next incarnation begins.

Ending: `stop` (claim no more, let run within the grace, cancel, give back, flush), a cancelled `run` (the same
without grace, in bounded shields), or an error of the engine, which leaves `run` in an exception group: a worker
never stalls in silence.

Errors before `started` come bare, before a nursery is open. Whoever calls `run` owns all of it; nothing outlives it
but the threads of plain `def` handlers that were interrupted: their executions are not given back, their claims
lapse.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

import trio

from ..context import Resources, resources_by_type
from ..db import schema
from ..db.calls import Heartbeat, WorkerRow
from ..db.link import Link, OutageLog, Target, open_link
from ..errors import InvalidOption, InvalidTask, Misuse, Unavailable
from ..options import MAX_DELAY, checked_seconds
from ..tasks import DEFAULT_QUEUE, Task, Worker
from ..version import VERSION
from .listener import Listener
from .worker import Pipeline, WorkerStatistics

if TYPE_CHECKING:
    from ..conductor import Conductor

logger = logging.getLogger("pgconductor.orchestrator")

Lifespan = Callable[[], AbstractAsyncContextManager[object]]

_LAST_WORDS_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class OrchestratorStatistics:
    """What this process runs now. `owner` is None when it does not run."""

    owner: UUID | None
    incarnations: int
    recovered: int
    workers: tuple[WorkerStatistics, ...]


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain did. `released` were given back unfinished, `fenced` had been taken over by somebody else."""

    completed: int
    failed: int
    retried: int
    released: int
    fenced: int


@dataclass(frozen=True, slots=True)
class _Process:
    """What all incarnations of a run share. `lease` is in seconds. When `until` returns, the run is to stop."""

    target: Target
    queue_nos: Mapping[str, int]
    control: Link
    outages: OutageLog
    resources: Resources
    signals: AsyncIterator[int] | None
    lease: float
    until: Callable[[Link], Awaitable[None]]


class Orchestrator:
    """Runs workers until stopped: ``trio.run(orchestrator.run)`` or ``await nursery.start(orchestrator.run)``."""

    def __init__(
        self,
        conductor: Conductor,
        *,
        workers: Iterable[Worker] = (),
        tasks: Iterable[Task[..., Any]] = (),
        lease: float | timedelta = 10.0,
        grace: float | timedelta = 30.0,
        migrate: bool = True,
        resources: Lifespan | None = None,
        handle_signals: bool | None = None,
        listen: Literal["queue", "shared"] = "queue",
    ) -> None:
        """Declare what to run; no I/O.

        `workers`: made by `conductor.create_worker`, one per queue. `tasks`: run by a worker of their own on the
        queue "default". `lease`: seconds (1 to 3600) after which others may take over what this process held, if it
        could not renew; a killed process is rescued within the lease plus a few seconds. `grace`: seconds (0 or more)
        that running handlers have after `stop`. `migrate`: bring the schema up to date first; else only check it.
        `resources`: a function that returns an async context manager; what it yields is what `ctx.resource` finds. It
        is open while handlers run. `handle_signals`: SIGINT and SIGTERM call `stop`, a second one ends the grace;
        None: if `run` is the main task of `trio.run` in the main thread. `listen`: one LISTEN connection per queue,
        or one for all queues of this process.

        Raises `InvalidTask` for two workers of one queue or a task of another conductor or queue, `InvalidOption`
        outside the ranges.
        """
        self._conductor = conductor
        own_tasks = list(tasks)
        self.workers = (
            *workers,
            *((conductor.create_worker(queue=DEFAULT_QUEUE, tasks=own_tasks),) if own_tasks else ()),
        )
        _check_workers(conductor, self.workers)
        self._lease = checked_seconds("Orchestrator(lease=)", lease, minimum=1.0, maximum=3600.0)
        self._grace = checked_seconds("Orchestrator(grace=)", grace, maximum=MAX_DELAY)
        self._migrate = migrate
        self._lifespan = resources
        self._handle_signals = handle_signals
        if listen not in ("queue", "shared"):
            raise InvalidOption(f'Orchestrator(listen=) must be "queue" or "shared", not {listen!r}')
        self._listen = listen
        self._rng = random.Random()
        self._is_active = False
        self._has_started = False
        self._stop_wanted = trio.Event()
        self._hurry_wanted = trio.Event()
        self._owner: UUID | None = None
        self._incarnations = 0
        self._recovered = 0
        self._pipelines: list[Pipeline] = []
        self._totals: Counter[str] = Counter()

    def __repr__(self) -> str:
        queues = ", ".join(repr(worker.queue) for worker in self.workers)
        state = "not running" if self._owner is None else f"running, incarnation {self._incarnations}"
        return f"<Orchestrator of {queues}, {state}>"

    @property
    def conductor(self) -> Conductor:
        """The conductor whose tasks it runs."""
        return self._conductor

    def statistics(self) -> OrchestratorStatistics:
        """A snapshot of what runs now; the counts of a worker begin anew with each incarnation."""
        return OrchestratorStatistics(
            self._owner,
            self._incarnations,
            self._recovered,
            tuple(pipeline.statistics() for pipeline in self._pipelines),
        )

    def stop(self) -> None:
        """Ask `run` to end: claim no more, let handlers run within the grace, cancel the rest, give back, flush.

        Returns at once. May be called any number of times, from anywhere in the same Trio program, handlers included.
        """
        self._stop_wanted.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop` or a signal; `started` once all workers claim.

        Cancelling it means stop now: handlers are cancelled, and what has ended is flushed and given back in at most
        about five seconds. Raises, bare and before anything runs, `Misuse`, `NoDatabase`, `Incompatible`; later, in
        an exception group, what broke the engine. A database that goes away later is waited for without end.
        """
        await self._run(_never_drained, self._lease, task_status)

    async def drain(self, horizon: float | timedelta = 0.0) -> Drained:
        """Run until none of the tasks has an execution that is ready, running, or due within `horizon` seconds;
        return counts.

        Looked at anew after each round, so that what executions invoke is drained too. Raises as `run`; `Misuse`
        while `run` is active.
        """
        seconds = checked_seconds("drain(horizon=)", horizon, maximum=MAX_DELAY)
        return await self._drain(seconds, None)

    async def _drain(self, horizon: float, advance: Callable[[float], Awaitable[None]] | None) -> Drained:
        """As `drain`; with `advance`, a test's clock is moved on instead of waiting for what is due within the
        horizon.
        """
        self._totals.clear()

        async def until_drained(link: Link) -> None:
            while (wait := await self._drain_wait(link, horizon)) is not None:
                if wait == 0:
                    await trio.sleep(0.005)
                elif advance is None:
                    await trio.sleep(min(wait, 0.5))
                else:
                    await advance(wait)
                    for pipeline in self._pipelines:
                        pipeline.reactor.wake()

        # A clock that is moved by days must not end the lease of who moves it.
        lease = self._lease if advance is None else MAX_DELAY
        await self._run(until_drained, lease, trio.TASK_STATUS_IGNORED)
        names = ("completed", "failed", "retried", "released", "fenced")
        return Drained(*(self._totals[name] for name in names))

    async def _drain_wait(self, link: Link, horizon: float) -> float | None:
        calls = self._conductor.calls
        waits = [
            await link.insist(calls.drain_wait(worker.queue, [task.name for task in worker.tasks], horizon))
            for worker in self.workers
        ]
        return min((wait for wait in waits if wait is not None), default=None)

    # Preparing

    async def _run(
        self, until: Callable[[Link], Awaitable[None]], lease: float, task_status: trio.TaskStatus[None]
    ) -> None:
        if self._is_active:
            raise Misuse("this orchestrator is running already; one Orchestrator runs once at a time")
        if not self.workers:
            raise Misuse("this orchestrator has nothing to run; give it workers=[...] or tasks=[...]")
        for worker in self.workers:
            for task in worker.tasks:
                task.resolve()
        self._is_active = True
        self._has_started = False
        self._stop_wanted = trio.Event()
        self._hurry_wanted = trio.Event()
        try:
            async with self._conductor as conductor:
                target = Target(conductor.conninfo, conductor.listen_conninfo, conductor.prepare_threshold)
                outages = OutageLog()
                async with open_link(target, "control", outages, self._rng) as control:
                    queue_nos = await self._prepare(control)
                    async with self._open_resources() as resources:
                        with _signal_receiver(self._wants_signals()) as signals:
                            process = _Process(target, queue_nos, control, outages, resources, signals, lease, until)
                            await self._incarnate(process, task_status)
        finally:
            self._is_active = False

    async def _prepare(self, control: Link) -> dict[str, int]:
        """See to the schema, the queues and the tasks; return the queues' numbers."""
        numbers: dict[str, int] = {}
        conductor = self._conductor
        if self._migrate:
            await conductor.migrate()
        else:
            await conductor.check_schema()
        for worker in self.workers:
            for attempt in range(30):
                try:
                    numbers[worker.queue] = await control.attempt(conductor.calls.register_queue(worker.queue))
                    break
                except Unavailable:  # other DDL was in the way for a second; nobody waits behind us meanwhile
                    if attempt == 29:
                        raise
            names = [task.name for task in worker.tasks]
            keeps: list[float | None] = [None] * len(names)
            await control.attempt(conductor.calls.register_tasks(names, worker.queue, keeps, keeps))
        return numbers

    @asynccontextmanager
    async def _open_resources(self) -> AsyncIterator[Resources]:
        if self._lifespan is None:
            yield {}
        else:
            async with self._lifespan() as yielded:
                yield resources_by_type(yielded)

    def _wants_signals(self) -> bool:
        if self._handle_signals is not None:
            return self._handle_signals
        nursery = trio.lowlevel.current_task().parent_nursery
        is_main_task = nursery is not None and nursery.parent_task is trio.lowlevel.current_root_task()
        return is_main_task and threading.current_thread() is threading.main_thread()

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._stop_wanted.is_set():
            logger.warning("%s again: running handlers are cancelled", name)
            self._hurry_wanted.set()
        else:
            logger.info("%s: stopping, running handlers have %g s", name, self._grace)
            self.stop()

    # Living

    async def _incarnate(self, process: _Process, task_status: trio.TaskStatus[None]) -> None:
        """One incarnation after the other, until one ends by being stopped, or is not begun because of that."""
        registered: tuple[UUID, float] | None = await self._register(process)
        while registered is not None:
            owner, registered_at = registered
            self._owner = owner
            self._incarnations += 1
            lease = trio.CancelScope(deadline=registered_at + _trusted(process.lease))
            try:
                with lease:
                    await self._live(owner, lease, process, task_status)
            finally:
                self._owner = None
                self._note_totals()
            if not lease.cancelled_caught:
                return
            logger.warning("lease of orchestrator %s lost; its executions were cancelled", owner)
            registered = await self._register_again(process)

    async def _register(self, process: _Process) -> tuple[UUID, float]:
        """Register an incarnation; return its id and when that was sent. Raises `Unavailable`."""
        owner = uuid4()
        rows = [WorkerRow(w.queue, [t.name for t in w.tasks], w.concurrency) for w in self.workers]
        name = f"{socket.gethostname()}:{os.getpid()}"
        registered_at = trio.current_time()
        call = self._conductor.calls.register_orchestrator(
            owner, name, process.lease, VERSION, schema.latest_version(), rows
        )
        await process.control.attempt(call)
        return owner, registered_at

    async def _register_again(self, process: _Process) -> tuple[UUID, float] | None:
        """As `_register`, however long the database is away; None when a stop is asked for meanwhile."""
        registered: tuple[UUID, float] | None = None
        async with trio.open_nursery() as nursery:
            if process.signals is not None:
                nursery.start_soon(self._watch_signals, process.signals, name="signals")
            nursery.start_soon(self._cancel_when_stopped, nursery.cancel_scope, name="stop")
            while registered is None:
                try:
                    registered = await self._register(process)
                except Unavailable as error:
                    process.outages.warn("cannot register: %s", error)  # it may be or not: an id is used once
                    await trio.sleep(self._rng.uniform(0.1, 1.0))
            nursery.cancel_scope.cancel()
        return None if self._stop_wanted.is_set() else registered

    async def _cancel_when_stopped(self, scope: trio.CancelScope) -> None:
        await self._stop_wanted.wait()
        scope.cancel()

    async def _live(
        self, owner: UUID, lease: trio.CancelScope, process: _Process, task_status: trio.TaskStatus[None]
    ) -> None:
        calls, target, outages = self._conductor.calls, process.target, process.outages
        listeners: list[Listener] = []
        shared: Listener | None = None
        self._pipelines = []
        for worker in self.workers:
            listener = shared
            if worker.notify == "off":
                listener = None
            elif listener is None:
                listener = Listener(target, calls, outages, self._rng)
                listeners.append(listener)
                shared = listener if self._listen == "shared" else None
            self._pipelines.append(
                Pipeline(
                    worker,
                    process.queue_nos[worker.queue],
                    owner,
                    lease,
                    target,
                    calls,
                    process.resources,
                    listener,
                    outages,
                    self._rng,
                )
            )
        try:
            async with trio.open_nursery() as keepers:
                keepers.start_soon(self._renew, owner, lease, process, name="renew the lease")
                for listener in listeners:
                    await keepers.start(listener.run, name=repr(listener))
                async with trio.open_nursery() as workers:
                    for pipeline in self._pipelines:
                        await workers.start(pipeline.run, name=repr(pipeline))
                    if not self._has_started:  # the first incarnation that gets here, which need not be the first
                        self._has_started = True
                        task_status.started()
                    keepers.start_soon(self._watch_stop, workers.cancel_scope, name="stop")
                    keepers.start_soon(self._stop_when, process, name="drain")
                    if process.signals is not None:
                        keepers.start_soon(self._watch_signals, process.signals, name="signals")
                keepers.cancel_scope.cancel()
        finally:
            if not lease.cancel_called and not any(pipeline.has_abandoned for pipeline in self._pipelines):
                with trio.move_on_after(_LAST_WORDS_TIMEOUT, shield=True):
                    await self._retire(owner, process.control)

    async def _renew(self, owner: UUID, lease: trio.CancelScope, process: _Process) -> None:
        """The heartbeat, which also rescues what dead orchestrators held on our queues.

        What counts for the lease is when it was sent: a reply that comes late says nothing about the time since.
        """
        queues = [worker.queue for worker in self.workers]
        call = self._conductor.calls.heartbeat(owner, process.lease, queues)
        interval = min(process.lease / 4, 15.0)
        while True:
            sent_at = trio.current_time()
            try:
                with trio.move_on_after(interval):
                    beat = await process.control.attempt(call)
                    if not beat.is_alive:
                        lease.cancel()
                        return
                    lease.deadline = sent_at + _trusted(process.lease)
                    self._note_rescue(beat)
            except Unavailable as error:
                process.outages.warn("the lease could not be renewed: %s", error)
            await trio.sleep(interval)

    def _note_rescue(self, beat: Heartbeat) -> None:
        if beat.recovered or beat.failed:
            self._recovered += beat.recovered + beat.failed
            logger.warning(
                "%d executions of dead orchestrators were given back, %d failed for good", beat.recovered, beat.failed
            )

    async def _stop_when(self, process: _Process) -> None:
        async with open_link(process.target, "drain", process.outages, self._rng) as link:
            await process.until(link)
        self.stop()

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self._on_signal(number)

    async def _watch_stop(self, workers: trio.CancelScope) -> None:
        """The phases of stopping. Ended from outside as soon as all workers have."""
        await self._stop_wanted.wait()
        for pipeline in self._pipelines:
            pipeline.stop()
        with trio.move_on_after(self._grace):
            await self._hurry_wanted.wait()
        for pipeline in self._pipelines:
            pipeline.interrupt()
        await trio.sleep(_LAST_WORDS_TIMEOUT)
        workers.cancel()  # flushes do not get through: one last try, in their own bounded shield

    async def _retire(self, owner: UUID, control: Link) -> None:
        try:
            await control.attempt(self._conductor.calls.retire_orchestrator(owner))
        except Unavailable as error:
            logger.warning("could not say goodbye, the lease has to lapse: %s", error)

    def _note_totals(self) -> None:
        for pipeline in self._pipelines:
            statistics = pipeline.statistics()
            self._totals.update(statistics.outcomes)
            self._totals["fenced"] += statistics.fenced


def _trusted(lease: float) -> float:
    """Seconds after sending a renewal that it may be relied on: less than the lease, so that we stop before others
    take over.
    """
    return lease - min(1.5, 0.2 * lease)


async def _never_drained(link: Link) -> None:
    await trio.sleep_forever()


def _signal_receiver(is_wanted: bool) -> AbstractContextManager[AsyncIterator[int] | None]:
    return trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) if is_wanted else nullcontext()


def _check_workers(conductor: Conductor, workers: tuple[Worker, ...]) -> None:
    seen: Mapping[str, int] = Counter(worker.queue for worker in workers)
    for queue, count in seen.items():
        if count > 1:
            raise InvalidTask(
                f"queue {queue!r} has {count} workers in this orchestrator; "
                f"put all its tasks into one, with a higher concurrency"
            )
    for worker in workers:
        for task in worker.tasks:
            if task.invoker is not conductor:
                raise InvalidTask(
                    f"task {task.name!r} of the worker of queue {worker.queue!r} belongs to another conductor"
                )
