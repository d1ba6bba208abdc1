"""Runs workers in one process: the only composition root.

Life of a `run`: prepare (schema, queues, resources), then one incarnation (`incarnation.py`) after the other until
stopped. An incarnation whose lease is over is cancelled, nothing more is written under its id, and the next one begins.

Errors before `started` come bare. Later ones leave `run` in an exception group: an error of the engine, since a
worker never stalls in silence; after a stop, `Unavailable` for outcomes that could not be written, and `SchemaTooNew`
if it was a newer program that asked for it. A `run` that was cancelled raises `Cancelled` alone, and logs the
outcomes.

Whoever calls `run` owns all of it; nothing outlives it but the threads of plain `def` handlers that did not end when
asked to: their executions are not given back, their claims lapse.
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
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    closing,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

import trio

from ..context import Resources, resources_by_type
from ..db import schema
from ..db.calls import Heartbeat, WorkerRow
from ..db.link import Link, OutageLog, Target, open_link
from ..errors import (
    InvalidOption,
    InvalidTask,
    Misuse,
    PgconductorError,
    SchemaMissing,
    SchemaTooNew,
    Unavailable,
)
from ..failpoints import failpoint
from ..options import MAX_DELAY, checked_seconds
from ..tasks import DEFAULT_QUEUE, Task, Worker
from ..version import VERSION
from .flusher import Handlers
from .incarnation import Bounds, Incarnation, Process, Wishes
from .lease import Clock, Lease, boot_clock
from .load import WorkerCounts
from .worker import Pipeline, Surroundings, WorkerStatistics

if TYPE_CHECKING:
    from ..conductor import Conductor

logger = logging.getLogger("pgconductor.orchestrator")

Lifespan = Callable[[], AbstractAsyncContextManager[object]]

_SHOWN_IDS = 100
_LOOKS_PER_ERRAND = 50  # of a drain: it does not wait for a heartbeat to tell of something to be cancelled
_PUBLISHING_STEPS, _PUBLISHING_PAUSE = 15, 0.01


@dataclass(frozen=True, slots=True)
class OrchestratorStatistics:
    """What this process runs now, and what has happened since `run` began. `owner` is None when it does not run.

    `incarnations`: owner ids so far. `fences`: how often it lost its lease and cancelled all it held. `successions`:
    how often it went on with what it held under a new id, after a restart of the server or a promotion. `recovered`:
    executions of dead orchestrators that it gave back or ended.
    """

    owner: UUID | None
    incarnations: int
    fences: int
    successions: int
    recovered: int
    workers: tuple[WorkerStatistics, ...]


@dataclass(frozen=True, slots=True)
class Drained:
    """What a drain did. `released` were given back unfinished; of `fenced` the claims were no longer ours."""

    completed: int
    failed: int
    retried: int
    released: int
    fenced: int
    cancelled: int = 0


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
        cancel_grace: float | timedelta = 5.0,
        last_words: float | timedelta = 5.0,
        migrate: bool = True,
        resources: Lifespan | None = None,
        handle_signals: bool | None = None,
        listen: Literal["queue", "shared"] = "queue",
    ) -> None:
        """Declare what to run; no I/O.

        `workers`: made by `conductor.create_worker`, one per queue. `tasks`: run by a worker of their own on the
        queue "default". `lease`: seconds (1 to 3600) after which others may take over what this process held, if it
        could not renew; a killed process is rescued within the lease plus a few seconds. `grace`: seconds (0 or more)
        that running handlers have after `stop`, before they are cancelled. `cancel_grace`: seconds (0 or more) for
        the clean-up of a handler that was cancelled: after that, one whose cancellation was requested is logged, and
        at the end of a run the threads of plain functions are left behind. `last_words`: seconds (0 or more) after
        the last handler has ended in which outcomes are written. `migrate`: bring the schema up to date first; else
        only check it. `resources`: a function that returns an async context manager; what it yields is what
        `ctx.resource` finds. It is open while handlers run. `handle_signals`: SIGINT and SIGTERM call `stop`, a
        second one ends the grace; None: if `run` is the main task of `trio.run` in the main thread. `listen`: one
        LISTEN connection per queue, or one for all queues of this process.

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
        self._bounds = Bounds(
            checked_seconds("Orchestrator(grace=)", grace, maximum=MAX_DELAY),
            checked_seconds("Orchestrator(cancel_grace=)", cancel_grace, maximum=MAX_DELAY),
            checked_seconds("Orchestrator(last_words=)", last_words, maximum=MAX_DELAY),
        )
        self._migrate = migrate
        self._lifespan = resources
        self._handle_signals = handle_signals
        if listen not in ("queue", "shared"):
            raise InvalidOption(f'Orchestrator(listen=) must be "queue" or "shared", not {listen!r}')
        self._listen = listen
        self._rng = random.Random()
        self._is_active = False
        self._has_started = False
        self._wishes = Wishes(trio.Event(), trio.Event())
        self._clock: Clock = boot_clock
        self._owner: UUID | None = None
        self._incarnations = self._fences = self._successions = self._recovered = 0
        self._pipelines: list[Pipeline] = []
        self._counts: dict[str, WorkerCounts] = {}

    def __repr__(self) -> str:
        queues = ", ".join(repr(worker.queue) for worker in self.workers)
        state = "not running" if self._owner is None else f"running, incarnation {self._incarnations}"
        return f"<Orchestrator of {queues}, {state}>"

    @property
    def conductor(self) -> Conductor:
        """The conductor whose tasks it runs."""
        return self._conductor

    def statistics(self) -> OrchestratorStatistics:
        """A snapshot of what runs now, and counts since `run` began."""
        return OrchestratorStatistics(
            self._owner,
            self._incarnations,
            self._fences,
            self._successions,
            self._recovered,
            tuple(pipeline.statistics() for pipeline in self._pipelines),
        )

    def stop(self) -> None:
        """Ask `run` to end: claim no more, let handlers run within the grace, cancel the rest, give back, flush.

        Returns at once. May be called any number of times, from anywhere in the same Trio program, handlers included.
        """
        self._wishes.stop.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop` or a signal; `started` once all workers claim.

        Cancelling it means stop now: handlers are cancelled, and what has ended is written and given back within
        `last_words`. Raises, bare and before anything runs, `Misuse`, `NoDatabase`, `Incompatible`; later,
        in an exception group, what broke the engine, `Unavailable` (with the ids in its message) if outcomes could not
        be written before the end, `SchemaTooNew` if a newer program asked it to make way. A database that goes away
        later is waited for without end.
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

        async def until_drained(link: Link) -> None:
            looks = 0
            while (wait := await self._drain_wait(link, horizon)) is not None:
                looks += 1
                if looks % _LOOKS_PER_ERRAND == 0:
                    self._run_errands()
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
        flushed = [counts.flushed for counts in self._counts.values()]
        totals: Counter[str] = Counter()
        for counts in flushed:
            totals.update(counts.outcomes)
        fenced = sum(counts.fenced + counts.dropped for counts in flushed)
        return Drained(
            completed=totals["completed"],
            failed=totals["failed"],
            retried=totals["retried"],
            released=totals["released"],
            fenced=fenced,
            cancelled=totals["cancelled"],
        )

    async def _drain_wait(self, link: Link, horizon: float) -> float | None:
        by_queue = {worker.queue: Handlers(worker) for worker in self.workers}
        tasks = {queue: handlers.names for queue, handlers in by_queue.items()}
        versions = {queue: handlers.versions for queue, handlers in by_queue.items()}
        return await link.insist(self._conductor.calls.drain_wait(tasks, horizon, versions))

    def _run_errands(self) -> None:
        for pipeline in self._pipelines[:1]:
            pipeline.errands.note()

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
                for version in task.versions:
                    version.resolve()
        self._is_active = True
        self._has_started = False
        self._wishes = Wishes(trio.Event(), trio.Event())
        self._incarnations = self._fences = self._successions = self._recovered = 0
        self._counts = {worker.queue: WorkerCounts() for worker in self.workers}
        try:
            async with self._conductor as conductor:
                target = Target(conductor.conninfo, conductor.listen_conninfo, conductor.prepare_threshold)
                outages = OutageLog()
                async with open_link(target, "control", outages, self._rng) as control:
                    queue_nos = await self._prepare(control)
                    async with self._open_resources() as resources:
                        with (
                            _signal_receiver(self._wants_signals()) as signals,
                            closing(conductor.thread_transactions()) as in_threads,
                        ):
                            process = Process(
                                workers=self.workers,
                                shared=Surroundings(
                                    target,
                                    conductor.calls,
                                    resources,
                                    outages,
                                    self._rng,
                                    self._bounds.last_words,
                                    conductor.transactions,
                                    in_threads,
                                ),
                                queue_nos=queue_nos,
                                counts=self._counts,
                                control=control,
                                signals=signals,
                                on_signal=self._on_signal,
                                bounds=self._bounds,
                                wishes=self._wishes,
                                until=until,
                                shares_listener=self._listen == "shared",
                                on_rescue=self._note_rescue,
                                on_succession=self._note_succession,
                            )
                            await self._incarnate(process, lease, task_status)
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
            call = conductor.calls.register_tasks(
                [task.name for task in worker.tasks],
                worker.queue,
                [task.keep_completed for task in worker.tasks],
                [task.keep_failed for task in worker.tasks],
            )
            await control.attempt(call)
        # A long transaction may be in the way: then producers use the overflow partition until it has ended.
        with suppress(Unavailable):
            for _ in range(_PUBLISHING_STEPS):
                if await control.attempt(conductor.calls.publish_queues()) == 0:
                    break
                await trio.sleep(_PUBLISHING_PAUSE)
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
        if self._wishes.stop.is_set():
            logger.warning("%s again: running handlers are cancelled", name)
            self._wishes.hurry.set()
        else:
            logger.info("%s: stopping, running handlers have %g s", name, self._bounds.grace)
            self.stop()

    # Living

    async def _incarnate(self, process: Process, seconds: float, task_status: trio.TaskStatus[None]) -> None:
        """One incarnation after the other, until one ends by being stopped, or is not begun because of that."""

        def started() -> None:
            if not self._has_started:  # the first incarnation that gets here, which need not be the first
                self._has_started = True
                task_status.started()

        unwritten: list[UUID] = []
        lease = await self._register(process, seconds)
        while lease is not None:
            self._owner = lease.owner
            self._incarnations += 1
            incarnation = Incarnation(process, lease)
            self._pipelines = incarnation.pipelines
            try:
                with lease.scope:
                    await incarnation.run(started)
            finally:
                self._owner = None
                unwritten = [execution for pipeline in self._pipelines for execution in pipeline.unwritten]
                _log_unwritten(unwritten)
            if not lease.is_lost:
                break
            self._fences += 1
            logger.warning(
                "lease of orchestrator %s lost: %s; its executions were cancelled", lease.label, lease.lost_because
            )
            lease = await self._register(process, seconds)
            if lease is not None:
                unwritten = []
        started()  # stopped before: whoever waits for the start goes on
        _raise_together(_errors_of(unwritten, is_outdated=self._wishes.is_outdated))

    async def _register(self, process: Process, seconds: float) -> Lease | None:
        """Register an incarnation; None when a stop is asked for meanwhile.

        However long the database is away, but for the first, whose errors come bare.
        """
        lease: Lease | None = None
        error: PgconductorError | None = None
        async with trio.open_nursery() as nursery:
            if process.signals is not None:
                nursery.start_soon(self._watch_signals, process.signals, name="signals")
            nursery.start_soon(self._cancel_when_stopped, nursery.cancel_scope, name="stop")
            while lease is None and error is None:
                try:
                    lease = await self._register_once(process, seconds)
                except PgconductorError as caught:
                    if self._incarnations == 0 or not isinstance(caught, (Unavailable, SchemaMissing)):
                        error = caught
                    else:
                        process.shared.outages.warn("cannot register: %s", caught)
                        await trio.sleep(self._rng.uniform(0.1, 1.0))
            nursery.cancel_scope.cancel()
        if error is not None:
            if self._incarnations == 0:
                raise error
            raise ExceptionGroup("the orchestrator cannot go on", [error])
        if self._wishes.stop.is_set():
            if lease is not None:
                await self._retire_unused(process, lease)
            return None
        return lease

    async def _register_once(self, process: Process, seconds: float) -> Lease:
        # It may be carried out though we do not hear of it: an id is used once.
        owner = uuid4()
        rows = [WorkerRow(w.queue, _keys(w), w.concurrency) for w in self.workers]
        name = f"{socket.gethostname()}:{os.getpid()}"
        sent_at = self._clock()
        call = self._conductor.calls.register_orchestrator(owner, name, seconds, VERSION, schema.latest_version(), rows)
        await process.control.attempt(call)
        failpoint("register.answered")
        return Lease(owner, seconds, sent_at, self._clock)

    async def _retire_unused(self, process: Process, lease: Lease) -> None:
        with trio.move_on_after(self._bounds.last_words):
            try:
                await process.control.attempt(self._conductor.calls.retire_orchestrator(lease.owner))
            except (Unavailable, SchemaMissing) as error:
                logger.warning("could not say goodbye, the lease has to lapse: %s", error)

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self._on_signal(number)

    async def _cancel_when_stopped(self, scope: trio.CancelScope) -> None:
        await self._wishes.stop.wait()
        scope.cancel()

    def _note_rescue(self, beat: Heartbeat) -> None:
        if rescued := beat.recovered + beat.failed + beat.cancelled:
            self._recovered += rescued
            logger.warning(
                "of %d executions of dead orchestrators %d were given back, %d failed for good, %d were cancelled",
                rescued, beat.recovered, beat.failed, beat.cancelled,
            )  # fmt: skip

    def _note_succession(self, owner: UUID) -> None:
        self._owner = owner
        self._incarnations += 1
        self._successions += 1


def _keys(worker: Worker) -> list[str]:
    """What a worker has: its tasks, which stand for executions without a version, and "task@version" for each."""
    versions = [version for task in worker.tasks for version in task.versions]
    return [
        *(task.name for task in worker.tasks),
        *(f"{each.name}@{each.version}" for each in versions if each.version is not None),
    ]


def _log_unwritten(executions: list[UUID]) -> None:
    for first in range(0, len(executions), _SHOWN_IDS):
        shown = executions[first : first + _SHOWN_IDS]
        logger.warning(
            "%d of %d outcomes that could not be written, their executions run again: %s",
            len(shown), len(executions), ", ".join(map(str, shown)),
        )  # fmt: skip


def _errors_of(unwritten: list[UUID], *, is_outdated: bool) -> list[Exception]:
    """What went wrong in a run that was stopped."""
    errors: list[Exception] = []
    if is_outdated:
        errors.append(
            SchemaTooNew("a newer program migrates the schema, and asked this one to stop: upgrade this program")
        )
    if unwritten:
        more = f" and {len(unwritten) - _SHOWN_IDS} more, see the log" if len(unwritten) > _SHOWN_IDS else ""
        errors.append(
            Unavailable(
                f"outcomes that could not be written before the end: {len(unwritten)}; their executions run again when "
                f"the lease has lapsed: {', '.join(map(str, unwritten[:_SHOWN_IDS]))}{more}"
            )
        )
    return errors


def _raise_together(errors: list[Exception]) -> None:
    if errors:
        raise ExceptionGroup("the orchestrator was stopped", errors)


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
