"""One incarnation of an orchestrator: an owner id with a lease, and every task that lives under it.

While it lives, one task renews the lease and rescues what dead orchestrators held, one watches the clock, one reads
what others ask for, one listener per queue (or one for all) wakes the workers, and each worker runs its pipeline. If
the database refuses the id though the lease still stands, the server was restarted or another promoted: the
incarnation goes on under a new id with the claims that survived (`lease.py`).

It ends when it is stopped, in phases:

    1. nothing is claimed any more; what has not begun goes back at once
    2. handlers may run on for `grace` seconds, unless hurried
    3. handlers are cancelled, threads of plain functions asked to end; `cancel_grace` seconds for their clean-up
    4. threads that run on are left behind: their claims lapse. An async handler under a shield is waited for, with its
       claim and the lease kept: giving it back would let a second body begin beside it
    5. outcomes are written, for at most `last_words` seconds from when the last handler ended
    6. unless a thread was left behind, the owner id is retired, which gives back whatever it still held; at most
       `last_words` seconds

or when the lease is over: everything is cancelled, and nothing is written. Cancelling `run` is phases 3 to 6 without
waiting: async handlers are waited for, threads are not.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import trio

from ..db.calls import Heartbeat
from ..db.link import Link, backoff, open_link
from ..errors import SchemaMissing, Unavailable
from ..failpoints import failpoint
from ..tasks import Worker
from .control import Control
from .errands import Errands
from .housekeeping import keep_house
from .lease import Lease, heartbeat_interval, trusted
from .listener import Listener
from .load import WorkerCounts, look_at_machine
from .suspects import Suspects
from .worker import Pipeline, Starts, Surroundings

logger = logging.getLogger("pgconductor.orchestrator")

_RESCUED_AT_ONCE = 1000  # executions that one call of `recover` takes, of an owner and partition


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds of the phases of stopping; see the module's description."""

    grace: float
    cancel_grace: float
    last_words: float


@dataclass(slots=True)
class Wishes:
    """What the program wants of a run. Each is set once."""

    stop: trio.Event
    hurry: trio.Event
    is_outdated: bool = False  # a newer program migrates the schema


@dataclass(frozen=True, slots=True)
class Process:
    """What all incarnations of a run share. When `until` returns, the run is to stop. `counts` are by queue."""

    workers: Sequence[Worker]
    shared: Surroundings
    queue_nos: Mapping[str, int]
    counts: Mapping[str, WorkerCounts]
    control: Link
    signals: AsyncIterator[int] | None
    on_signal: Callable[[int], None]
    bounds: Bounds
    wishes: Wishes
    until: Callable[[Link], Awaitable[None]]
    shares_listener: bool
    on_rescue: Callable[[Heartbeat], None]
    on_succession: Callable[[UUID], None]


class Incarnation:
    """See the module's description."""

    def __init__(self, process: Process, lease: Lease) -> None:
        self.lease = lease
        self._process = process
        self._rng: random.Random = process.shared.rng
        self._calls = process.shared.calls
        self._outages = process.shared.outages
        starts = Starts()
        self._errands = Errands(process.shared.target, self._calls, self._outages, self._rng)
        self._listeners: list[Listener] = []
        self.pipelines = [
            Pipeline(
                worker,
                process.queue_nos[worker.queue],
                lease,
                starts,
                self._listener_for(worker),
                process.counts[worker.queue],
                self._errands,
                process.shared,
            )
            for worker in process.workers
        ]
        by_queue = {pipeline.worker.queue: pipeline for pipeline in self.pipelines}
        self._queues = list(by_queue)
        self._control = Control(
            lease,
            process.control,
            self._calls,
            self._outages,
            by_queue,
            grace=process.bounds.cancel_grace,
            stop=self._make_way,
            errands=self._errands,
        )
        self._suspects = Suspects(starts, by_queue, self._outages, self._rng, self._control.look)
        self._control.suspects = self._suspects
        if self._listeners:
            self._listeners[0].attend(self._control)

    def _listener_for(self, worker: Worker) -> Listener | None:
        if worker.notify == "off":
            return None
        if not self._listeners or not self._process.shares_listener:
            self._listeners.append(Listener(self._process.shared.target, self._calls, self._outages, self._rng))
        return self._listeners[-1]

    def _make_way(self) -> None:
        self._process.wishes.is_outdated = True
        self._process.wishes.stop.set()

    async def run(self, started: Callable[[], None]) -> None:
        """Run until stopped, cancelled, or the lease is over; `started` is called once all workers claim."""
        process = self._process
        try:
            async with trio.open_nursery() as keepers:
                keepers.start_soon(self.lease.watch, name="watch the lease")
                # Before anything that may have to wait for the database: a stop is heeded there too.
                keepers.start_soon(self._watch_stop, name="stop")
                if process.signals is not None:
                    keepers.start_soon(self._watch_signals, process.signals, name="signals")
                keepers.start_soon(self._renew, name="renew the lease")
                keepers.start_soon(self._control.run, name="signals of others")
                keepers.start_soon(self._suspects.run, name="suspects")
                keepers.start_soon(self._errands.run, name="errands")
                keepers.start_soon(keep_house, process.shared, name="maintenance")
                for listener in self._listeners:
                    await keepers.start(listener.run, name=repr(listener))
                async with trio.open_nursery() as workers:
                    for pipeline in self.pipelines:
                        await workers.start(pipeline.run, name=repr(pipeline))
                    started()
                    keepers.start_soon(self._stop_when_done, name="drain")
                keepers.cancel_scope.cancel()
        finally:
            if not self.lease.is_lost and not any(pipeline.has_abandoned for pipeline in self.pipelines):
                with trio.move_on_after(process.bounds.last_words, shield=True):
                    await self._retire()

    # Keepers

    async def _renew(self) -> None:
        """The heartbeat, which also rescues what dead orchestrators held on our queues, and reads what is asked of us.

        What counts for the lease is when it was sent.
        """
        lease, link = self.lease, self._process.control
        interval = heartbeat_interval(lease.seconds)
        # Long enough for a slow line, and to wait for a reading of signals before it; short enough to try once more.
        timeout = trusted(lease.seconds) / 2
        failures = 0
        while True:
            lease.doubt = trio.Event()
            sent_at = lease.clock()
            beat: Heartbeat | None = None
            failpoint("heartbeat.before")
            machine = look_at_machine()
            loads = [pipeline.load(machine) for pipeline in self.pipelines]
            try:
                with trio.move_on_after(timeout):
                    beat = await link.attempt(self._calls.heartbeat(lease.owner, lease.seconds, self._queues, loads))
            except (Unavailable, SchemaMissing) as error:
                self._outages.warn("the lease could not be renewed: %s", error)
            if beat is None:
                failures += 1
                pause = backoff(failures, self._rng, initial=interval / 10, maximum=min(interval, 5.0))
            else:
                failpoint("heartbeat.answered")
                failures, pause = 0, interval
                if beat.is_alive:
                    lease.renewed(sent_at)
                    self._process.on_rescue(beat)
                    if beat.recovered + beat.failed + beat.cancelled >= _RESCUED_AT_ONCE:
                        pause = 0.0  # the dead held more, which is not to wait for the next heartbeat
                    self._control.apply(beat.signals)
                elif not await self._succeed():
                    lease.lose("the database says that it has ended")
                lease.answer()
            with trio.move_on_after(pause):
                await lease.doubt.wait()

    async def _succeed(self) -> bool:
        """Go on under a new id, if the database lets us."""
        former = self.lease.label
        is_heir = await self.lease.succeed(
            self._process.control,
            lambda old, new, claims: self._calls.succeed_orchestrator(old, new, self.lease.seconds, claims),
            lambda: [claim for pipeline in self.pipelines for claim in pipeline.claims()],
            self._replaced,
            pause=lambda failures: backoff(failures, self._rng, maximum=1.0),
        )
        failpoint("succeed.answered")
        if is_heir:
            logger.warning(
                "the server was restarted or promoted: orchestrator %s goes on as %s", former, self.lease.label
            )
        return is_heir

    def _replaced(self, former: UUID, handed_over: frozenset[UUID]) -> None:
        for pipeline in self.pipelines:
            pipeline.succeed(former, handed_over)
        if self._listeners:
            self._listeners[0].renew_control()
        self._control.look()  # the reading under the former id, if one is under way, tells nothing
        self._process.on_succession(self.lease.owner)

    async def _stop_when_done(self) -> None:
        process = self._process
        async with open_link(process.shared.target, "drain", self._outages, self._rng) as link:
            await process.until(link)
        process.wishes.stop.set()

    async def _watch_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self._process.on_signal(number)

    async def _watch_stop(self) -> None:
        """The phases of stopping. Ended from outside as soon as all workers have."""
        bounds, wishes = self._process.bounds, self._process.wishes
        await wishes.stop.wait()
        failpoint("stop.begun")
        for pipeline in self.pipelines:
            pipeline.stop()
        with trio.move_on_after(bounds.grace):
            await wishes.hurry.wait()
        for pipeline in self.pipelines:
            pipeline.interrupt()
        with trio.move_on_after(bounds.cancel_grace):
            await wishes.hurry.wait()
        for pipeline in self.pipelines:
            pipeline.abandon()

    async def _retire(self) -> None:
        failpoint("retire.before")
        try:
            await self._process.control.attempt(self._calls.retire_orchestrator(self.lease.owner))
        except (Unavailable, SchemaMissing) as error:
            logger.warning("could not say goodbye, the lease has to lapse: %s", error)
        failpoint("retire.answered")
