"""The pipeline of one queue: claim → execute → flush, each with backpressure, none waiting for the others.

    claim     asks for free capacity plus a small stock (`pace.Prefetch`), and sleeps by the reactor's protocol when
              there is none
    execute   a fixed set of runner tasks takes from the stock in memory, a single execution or a batch (`stock.py`);
              no task is spawned per execution
    flush     `flusher.Flusher` writes outcomes by size or age, on a connection of its own

Invariants: whatever was claimed is in the flusher's `held` until the database has answered a flush of it; what is held
is bounded, so claims stop when flushes do not get through. An execution has one scope, its `Interruption`'s: cancelled,
timed out and shutting down are that one. What was claimed and has not begun goes back at no cost: at a stop, when
nobody takes it, and before an execution on its last life begins (`suspects.py`).

A requested cancellation is known by the signals (`control.py`) for as long as it stands: what is in stock ends without
having begun, what runs is interrupted, and what a claim in flight brings is looked up when it arrives.

Ending: `stop` (claim no more), `interrupt` (handlers are asked to end), `abandon` (threads are no longer waited for).
When the last runner has ended, outcomes are written for at most `last_words` seconds; `unwritten` has what was not.
Cancelling `run` interrupts the handlers and, in one shield of the same length, writes what has ended and gives back
what has not begun. If the lease is lost nothing is written. Claims of threads that run on, and of what could not be
written, lapse.
"""

from __future__ import annotations

import contextvars
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

import trio

from ..context import Context, Resources
from ..db.calls import Calls, Claim, WorkerLoad
from ..db.link import Link, OutageLog, Target, backoff, open_link
from ..db.transactions import Transactions
from ..durable import Durable
from ..errors import LeaseLost, SchemaMissing, Unavailable
from ..failpoints import failpoint
from ..invocations import child_row
from ..model import Claimed, Outcome
from ..tasks import Task, Worker
from .batch import Call
from .errands import Errands
from .execution import Berth, Interruption, attempt, cancelled, released
from .flusher import MAX_FLUSH, FlushCounts, Flusher, Handlers, Held
from .journal import ExecutionJournal, Journal
from .lease import Lease
from .listener import Listener
from .load import Machine, Occupancy, describe
from .pace import Backing, Deference, Linger, Prefetch
from .reactor import Reactor, ReactorStatistics
from .stock import Lot, Stock

logger = logging.getLogger("pgconductor.worker")

_MAX_CLAIM = 1000
_MAX_UNFLUSHED = 4 * MAX_FLUSH
_STUCK_AFTER = 0.25  # seconds in stock after which an execution is given back for others to run
_CLAIM_TIMEOUT = 5.0
_SLICE = 0.001  # seconds after which a runner lets others have a turn, though its handlers never wait
_ALONE = 0.01  # seconds without seeing the end of the queue after which a lookout wakes others;
_ALONE_FOR_CLAIMS = 3  # and as many times what a claim takes
_LOCKED = 0.01  # seconds that an empty claim tells if there are rows that others have locked


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """What one worker has done since its orchestrator's `run` began, over all incarnations, and what it holds now.

    Seconds. `fenced`: outcomes that the database refused, `dropped`: outcomes that were not sent, since the claim was
    no longer ours. `pickups` are the latest, oldest first: the time from an execution's due time to the start of its
    handler. `claim_seconds` are the latest claims that were answered, oldest first: from the call to its answer.
    `short_claims` brought something, but less than was asked for. `running` are handlers: a batch is one. `in_stock`
    are executions that were claimed and have not begun, those that wait for company in a batch among them.
    """

    queue: str
    running: int
    in_stock: int
    unflushed: int
    claims: int
    empty_claims: int
    claimed: int
    flushes: int
    outcomes: Mapping[str, int]
    fenced: int
    dropped: int
    pickups: tuple[float, ...]
    reactor: ReactorStatistics
    short_claims: int
    claim_seconds: tuple[float, ...]


@dataclass(slots=True)
class WorkerCounts:
    """Counts of one worker over all incarnations; `short_claims` and `locked_claims` as `WorkerLoad` has them."""

    claims: int = 0
    empty_claims: int = 0
    short_claims: int = 0
    locked_claims: int = 0
    claiming_seconds: float = 0.0  # in all
    occupancy: Occupancy = field(default_factory=Occupancy)
    claimed: int = 0
    flushed: FlushCounts = field(default_factory=FlushCounts)
    pickups: deque[float] = field(default_factory=lambda: deque[float](maxlen=2000))
    claim_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=2000))


class Starts:
    """Whether handlers may begin in this process: not while one on its last life is about to, or runs."""

    def __init__(self) -> None:
        self.is_held = False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the pipelines of one process share. `last_words`: seconds for writing outcomes at the end.

    `transactions`: for the steps of async handlers, `thread_transactions`: of plain functions.
    """

    target: Target
    calls: Calls
    resources: Resources
    outages: OutageLog
    rng: random.Random
    last_words: float
    transactions: Transactions | None = None
    thread_transactions: Transactions | None = None


class _PristineContext:
    """The context variables of a runner's task as they were when it began, so that none leaks from one execution to
    the next. To be made and used by that task.
    """

    def __init__(self) -> None:
        self._task = trio.lowlevel.current_task()
        self._pristine = contextvars.copy_context()
        self._items = list(self._pristine.items())

    def was_changed(self) -> bool:
        """Whether a variable has been set: to something else, or for the first time."""
        current = contextvars.copy_context()
        if not self._items:
            return len(current) > 0
        return len(current) != len(self._items) or any(
            current.get(name, self) is not value for name, value in self._items
        )

    def restore(self) -> None:
        """Let the task have a fresh copy from its next switch on."""
        self._task.context = self._pristine.copy()


class Pipeline:
    """One worker, running. Made by an orchestrator for each of its incarnations."""

    def __init__(
        self,
        worker: Worker,
        queue_no: int,
        lease: Lease,
        starts: Starts,
        listener: Listener | None,
        counts: WorkerCounts,
        errands: Errands,
        shared: Surroundings,
    ) -> None:
        """`queue_no`: as `register_queue` gave it."""
        self.worker = worker
        self._queue_no = queue_no
        self._lease = lease
        self._starts = starts
        self._shared = shared
        self._calls = calls = shared.calls
        self._outages = shared.outages
        self._rng = shared.rng
        self._handlers = Handlers(worker)
        self.reactor = Reactor(calls, worker.queue, worker.notify, worker.sweep_interval, listener, shared.rng)
        self._per_runner = self._handlers.per_runner
        self._most_unflushed = worker.concurrency * self._per_runner + _MAX_UNFLUSHED
        self._prefetch = Prefetch(maximum=max(4000, 2 * worker.concurrency), unit=self._per_runner)
        self._linger = Linger()
        self._deference = Deference()
        self._backing = Backing()
        self._is_backing = False  # the next claim comes after a nap behind the lookout, which nobody has ended
        self._drained_at = -math.inf
        self._is_rival = False  # others were notified as well, and the next claim tells who was first
        self._noted_notifications = 0
        self._limiter = trio.CapacityLimiter(worker.concurrency)
        self._max_claim = worker.claim_batch or _MAX_CLAIM
        self._counts = counts
        self._flusher = Flusher(
            self._handlers, lease, calls, shared.outages, shared.rng, counts.flushed,
            interval=worker.flush_interval, batch=worker.flush_batch,
            may_grow=lambda: bool(self._running or self._ready), written=self._note_room, left=errands.note,
        )  # fmt: skip
        self._held = self._flusher.held
        self.errands = errands
        self._journal: Journal | None = None
        self._durables: dict[UUID, Durable] = {}  # of the running handlers that have asked for something durable
        # Sleeping runners are woken by a parking lot: no task switch when nobody sleeps.
        self._stock = Stock(self._handlers)
        self._ready = self._stock.ready
        self._idle_runners = trio.lowlevel.ParkingLot()
        self._is_waking = False  # a runner has been woken, and has not come yet
        self._yielding = 0  # runners between two executions, that only let others have a turn
        self._room = trio.Event()
        self._running = 0
        self._surplus = 0  # executions in the batches that run, beyond one for each
        self._requested: Mapping[UUID, tuple[int, str | None]] = {}
        self._claims: Link | None = None
        self._claim_ended = trio.Event()  # of the loop's latest claim
        self._claim_ended.set()
        self._claiming = trio.Lock()  # of whoever else claims, or looks for what we do not know of
        self._reconcile_at: list[float] = []
        self._locked_nap = _LOCKED / 4
        self._is_stopping = False
        self.has_abandoned = False  # a handler's thread runs on: its claim may only lapse
        self.unwritten: list[UUID] = []
        self._intake = trio.CancelScope()
        self._runners = self.worker.concurrency  # that have not ended
        self._watching = trio.CancelScope()
        self._ripening = trio.CancelScope()

    def statistics(self) -> WorkerStatistics:
        counts, flushed = self._counts, self._counts.flushed
        return WorkerStatistics(
            self.worker.queue, self._running, self._in_stock, len(self._flusher.outcomes), counts.claims,
            counts.empty_claims, counts.claimed, flushed.flushes, dict(flushed.outcomes), flushed.fenced,
            flushed.dropped, tuple(counts.pickups), self.reactor.statistics(), counts.short_claims,
            tuple(counts.claim_seconds),
        )  # fmt: skip

    def load(self, machine: Machine) -> WorkerLoad:
        """What the next heartbeat tells of it."""
        counts = self._counts
        return describe(
            self.worker.queue, machine, counts.flushed, claims=counts.claims, empty_claims=counts.empty_claims,
            short_claims=counts.short_claims, locked_claims=counts.locked_claims, claimed=counts.claimed,
            busy_seconds=counts.occupancy.seconds(trio.current_time()), claim_seconds=counts.claiming_seconds,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Pipeline of queue {self.worker.queue!r}, {self._running} running, {self._in_stock} in stock>"

    @property
    def _in_stock(self) -> int:
        return self._stock.size + self._stock.apart

    # Stopping and cancelling

    def stop(self) -> None:
        """Stop claiming; what is in stock goes back, what runs may go on. Idempotent, does not wait."""
        self._is_stopping = True
        self._intake.cancel()

    def interrupt(self) -> None:
        """Cancel the running handlers, and ask the threads of plain functions to end; what ends is given back."""
        for held in self._held.values():
            if held.interruption is not None:
                held.interruption.stop()

    def abandon(self) -> None:
        """As `interrupt`; threads are no longer waited for, and their claims lapse."""
        for held in self._held.values():
            if held.interruption is not None:
                held.interruption.abandon()

    def cancel(self, requested: Mapping[UUID, tuple[int, str | None]]) -> list[Held]:
        """Cancel these claims, all whose cancellation is requested now; return those whose handlers were told just now.

        Executions that are not here may be on their way: they are remembered until the next call.
        """
        self._requested = requested
        told: list[Held] = []
        has_unstarted = False
        for execution, (claim_no, reason) in requested.items():
            held = self._held.get(execution)
            if held is None or held.claimed.claim_no != claim_no:
                continue
            if not held.has_begun:
                has_unstarted = True
            elif held.interruption is not None and not held.interruption.is_requested:
                failpoint("cancel.signalled")
                held.interruption.cancel(reason)
                told.append(held)
        if has_unstarted:
            for held in self._stock.take_out(lambda held: held.claimed.id in requested):
                self._end_unstarted(held, is_cancelled=True)
        return told

    def holds(self, execution: UUID, claim_no: int) -> bool:
        """Whether this claim came here and has not been flushed yet."""
        held = self._held.get(execution)
        return held is not None and held.claimed.claim_no == claim_no

    def look_for_strays(self) -> None:
        """Have what the database thinks we hold, and we do not, given back soon."""
        self._note_lost_claim()
        self.reactor.wake()

    def nudge(self) -> None:
        """Somebody may have resolved what handlers here are parked for."""
        for durable in self._durables.values():
            durable.nudge()

    # Succession

    def claims(self) -> list[tuple[UUID, int]]:
        """What it holds, with the numbers of the claims."""
        return [(held.claimed.id, held.claimed.claim_no) for held in self._held.values()]

    def succeed(self, former: UUID, handed_over: frozenset[UUID]) -> None:
        """The owner has changed. What was not handed over is not ours: forgotten, and interrupted if it runs."""
        self._flusher.succeed(former, handed_over)
        for execution, held in list(self._held.items()):
            if execution not in handed_over:
                del self._held[execution]
                held.is_ours = False
                if held.interruption is not None:
                    held.interruption.abandon()
        self._stock.take_out(lambda held: not held.is_ours)
        self._reconcile_at.clear()  # what we did not know of has been given back
        self._note_room()

    # Suspects

    @property
    def has_free_runner(self) -> bool:
        return self._running < self.worker.concurrency and not self._is_stopping

    async def claim_suspect(self) -> Held | None:
        """Claim one execution that is on its last life; it begins at `start_suspect`. Raises `Unavailable`."""
        if self._claims is None or self._is_stopping:
            return None
        link = self._claims
        queue, handlers = self.worker.queue, self._handlers
        async with self._claiming:
            try:
                claimed = await self._lease.attempt(
                    link,
                    lambda owner: self._calls.claim_suspect(queue, owner, handlers.names, handlers.versions),
                    timeout=_CLAIM_TIMEOUT,
                    shield=True,
                )
            except Unavailable:
                self._note_lost_claim()
                raise
            if claimed is None:
                return None
            held = self._held[claimed.id] = Held(claimed, trio.current_time(), suspected=trio.Event())
        return held

    async def clear_stock(self) -> None:
        """Give back what has not begun, with what a claim in flight brings, and wait until the database has it."""
        await self._claim_ended.wait()
        self._give_back(self._stock.take_all())
        await self._flusher.until_empty()

    def return_suspect(self, held: Held) -> None:
        """Give it back, unless it has begun or is given back already."""
        if not held.has_begun and held.suspected is not None and not held.suspected.is_set():
            self._stock.take_out(lambda other: other is held)
            self._end_unstarted(held)

    def start_suspect(self, held: Held) -> None:
        """It may begin now, though starts are held."""
        if self._is_stopping or not held.is_ours:
            self.return_suspect(held)
            return
        self._stock.put_first(held, trio.current_time())
        if self._requested:
            self.cancel(self._requested)
        self._idle_runners.unpark_all()

    def resume_starts(self) -> None:
        """Starts are not held any more."""
        self._idle_runners.unpark_all()
        self._note_room()

    # Running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop` has been called and everything has ended. `started` once it claims."""
        queue, shared, flusher = self.worker.queue, self._shared, self._flusher
        async with (
            open_link(shared.target, "claim", self._outages, self._rng) as claims,
            open_link(shared.target, "flush", self._outages, self._rng) as flushes,
            open_link(shared.target, "journal", self._outages, self._rng) as journal,
        ):
            self._claims = claims
            self._journal = Journal(journal, self._lease, self._calls, self._outages, self._rng, left=self.errands.note)
            closing = trio.CancelScope()
            try:
                with closing:
                    async with trio.open_nursery() as outer:
                        outer.start_soon(flusher.run, flushes, name=f"flush {queue}")
                        async with trio.open_nursery() as runners:
                            runners.start_soon(self._watch_end, name=f"end of {queue}")
                            if self._stock.has_lots:
                                runners.start_soon(self._ripen_lots, name=f"batches of {queue}")
                            for number in range(self.worker.concurrency):
                                runners.start_soon(self._run_executions, claims, name=f"run {queue} {number}")
                            try:
                                with self._intake:
                                    task_status.started()
                                    await self._claim_loop(claims)
                            finally:
                                self._is_stopping = True
                                self._ripening.cancel()
                                self._give_back(self._stock.take_all())
                                self._idle_runners.unpark_all()
                            await self.reactor.stand_down()  # handlers may take their time
                        flusher.close()
                        # Counted from here: handlers that take their time do not take it from what has ended.
                        closing.deadline = trio.current_time() + shared.last_words
            finally:
                self._claims = None
                self._counts.occupancy.clear(trio.current_time())
                if not closing.cancelled_caught:
                    with trio.move_on_after(shared.last_words, shield=True):
                        await flusher.write_all(flushes)
                self.unwritten = flusher.unwritten()
                if self._lease.is_lost:
                    self._counts.flushed.dropped += len(self.unwritten)

    # Claiming

    def _wants_more(self) -> bool:
        """Free runners, or a stock that has run down; never more in hand than flushes keep up with, and nothing while
        one on its last life is about: what has been claimed would share its crash.
        """
        running, stock, ahead = self._running, self._stock, self._prefetch.size
        most = running + self._surplus + stock.apart + ahead + self._most_unflushed
        if self._starts.is_held or len(self._held) >= most:
            return False
        in_stock = len(self._ready) + stock.surplus
        free = self.worker.concurrency - running
        return in_stock < free * self._per_runner or (in_stock * 2 < ahead and not (free == 0 and self._is_stuck()))

    def _is_stuck(self) -> bool:
        """Whether nobody has taken from the stock for long."""
        return bool(self._ready) and trio.current_time() - self._stock.ready_since() > _STUCK_AFTER

    async def _claim_loop(self, link: Link) -> None:
        failures = 0
        while True:
            if not self._wants_more():
                await self.reactor.lower()  # a saturated worker is not asleep
                await self._wait_for_room()
                await self._call_for_help()
                continue
            try:
                if self._reconcile_at and trio.current_time() >= self._reconcile_at[0]:
                    del self._reconcile_at[0]
                    await self._reconcile(link)
                    continue
                before = self._counts.claimed
                drained, due_in = await self._claim(link)
                failures = 0
                is_in_vain = self._counts.claimed == before and self.reactor.is_watched
                if drained and is_in_vain and not self._linger.is_lingering:
                    await self._sleep(due_in)
                elif drained:
                    await self._doze(link, due_in)
                else:
                    await self.reactor.lower()  # there is more than we can take: others need not wake us
                    await self._call_for_help()
            except Unavailable as error:
                failures += 1
                self._note_lost_claim()
                await self.reactor.stand_down()
                self._outages.warn("queue %r cannot be claimed from: %s", self.worker.queue, error)
                await trio.sleep(backoff(failures, self._rng))
            except LeaseLost:
                # Dead, or the server was restarted: the heartbeat finds out, and saves what can be saved.
                failures += 1
                await self.reactor.stand_down()
                self._lease.question()
                await self._lease.until_answered()
                await trio.sleep(backoff(failures, self._rng))

    def _note_lost_claim(self) -> None:
        """The reply of a claim may be lost. The statement is over when its time limit is: look then once more."""
        now = trio.current_time()
        self._reconcile_at[:] = [now, now + 31.0]

    async def _wait_for_room(self) -> None:
        """Until a runner takes from the stock. A stock that nobody takes from goes back, for others to run."""
        self._room = trio.Event()
        if self._wants_more():
            return
        longest = _STUCK_AFTER if self._ready else math.inf
        if self.reactor.is_lookout:
            longest = min(longest, max(0.0, self._alone_until() - trio.current_time()))
        with trio.move_on_after(longest) as waiting:
            await self._room.wait()
        if waiting.cancelled_caught and self._is_stuck():
            self._give_back(self._stock.take_ready())
            self._prefetch.note_stuck()

    async def _call_for_help(self) -> None:
        """A lookout that for a while has not seen the end of the queue, with a runner free, wakes who relies on it."""
        if self.reactor.is_lookout and trio.current_time() >= self._alone_until():
            await self.reactor.stand_down()

    def _alone_until(self) -> float:
        return self._drained_at + max(_ALONE, _ALONE_FOR_CLAIMS * self._counts.claim_seconds[-1])

    async def _ripen_lots(self) -> None:
        """Have batches begin that have waited for company long enough."""
        stock = self._stock
        with self._ripening:
            while True:
                with trio.CancelScope(deadline=stock.next_due()):
                    await stock.sooner.wait()
                if stock.make_due_ready(trio.current_time()):
                    self._wake_runner()
                    if not self._idle_runners:
                        # All are busy, perhaps for long: whoever claims is to see that there is a stock now.
                        self._room.set()
                        self.reactor.wake()

    async def _claim(self, link: Link) -> tuple[bool, float | None]:
        """Claim once. Returns whether the queue has no more for now, and when the next is due."""
        self._claim_ended = trio.Event()
        try:
            return await self._claim_once(link)
        finally:
            self._claim_ended.set()

    async def _claim_once(self, link: Link) -> tuple[bool, float | None]:
        free = (self.worker.concurrency - self._running) * self._per_runner
        room = free + self._prefetch.size - self._stock.size
        limit = max(1, min(room, self._max_claim))
        self.reactor.clear()
        failpoint("claim.before")
        asked_at = trio.current_time()
        # Not interrupted by a stop: what it claims is then given back at once, instead of being found missing later.
        answer: Claim = await self._lease.attempt(
            link,
            lambda owner: self._calls.claim(
                self.worker.queue, owner, self._handlers.names, limit, self._queue_no, self._handlers.versions
            ),
            timeout=_CLAIM_TIMEOUT,
            shield=True,
        )
        failpoint("claim.answered")
        claimed, due_in = answer
        now = trio.current_time()
        self._counts.claims += 1
        self._counts.claim_seconds.append(now - asked_at)
        self._counts.claiming_seconds += now - asked_at
        notified = self.reactor.notifications - self._noted_notifications
        self._noted_notifications += notified
        self._linger.note_arrivals(now, max(len(claimed), notified))
        self._prefetch.note_claim(
            asked=limit, got=len(claimed), ran_dry=not self._ready and len(self._idle_runners) > 0
        )
        if self._is_rival:
            self._is_rival = False
            self._deference.note_claim(len(claimed))
        if self._is_backing:
            self._is_backing = False
            self._backing.note_claim(max((item.waited for item in claimed), default=0.0))
        if len(claimed) < min(limit, free):
            self._drained_at = now
        if not claimed:
            self._counts.empty_claims += 1
            if due_in is not None and due_in <= _LOCKED:
                self._counts.locked_claims += 1
            return True, due_in
        self._counts.claimed += len(claimed)
        self._counts.short_claims += len(claimed) < limit
        put = self._stock.add if self._stock.has_lots else self._ready.append
        for item in claimed:
            held = Held(item, now)
            self._held[item.id] = held
            put(held)
        if self._requested:
            self.cancel(self._requested)
        self._wake_runner()
        return len(claimed) < limit, None

    async def _doze(self, link: Link, due_in: float | None) -> None:
        """The queue had no more. Look on for a while if it is busy, else go to sleep by the reactor's protocol."""
        if not self.reactor.can_be_woken:
            await self.reactor.sleep(self._until_due(due_in), at_most=self._longest_sleep())
            return
        if self._linger.is_lingering:
            if not self.has_free_runner:
                await self.reactor.lower()  # it looks for its stock only
            elif not await self.reactor.become_lookout():
                await self._back_up(due_in)
                return
            claim_seconds = self._counts.claim_seconds
            intervals = self._linger.intervals(lambda: claim_seconds[-1])
            while (interval := next(intervals, None)) is not None:
                await trio.sleep(interval)
                if not self._wants_more():
                    return
                before = self._counts.claimed
                drained, due_in = await self._claim(link)
                if not drained:
                    return
                await self._call_for_help()
                if self._counts.claimed > before:
                    intervals = self._linger.intervals(lambda: claim_seconds[-1])
        nap = 0.002
        while self._wants_more() and self.reactor.can_be_woken:
            is_quiet = await self.reactor.look()
            if not self._wants_more():
                return
            if is_quiet is None:
                await self._back_up(due_in)
                return
            before = self._counts.claimed
            drained, due_in = await self._claim(link)
            if self._counts.claimed > before:
                return
            if is_quiet:
                await self._sleep(due_in)
                return
            await self.reactor.sleep(due_in, at_most=nap)
            nap = min(2 * nap, 0.25)

    async def _sleep(self, due_in: float | None) -> None:
        """Sleep until there is something to do. What wakes all who sleep on the queue is left to the quickest."""
        notified = self.reactor.notifications
        await self.reactor.sleep(self._until_due(due_in), at_most=self._longest_sleep())
        self._is_rival = self.reactor.notifications > notified
        if self._is_rival and self._deference.delay > 0:
            await trio.sleep(self._deference.delay * self._rng.uniform(0.5, 1.0))

    async def _back_up(self, due_in: float | None) -> None:
        """Sleep while another worker looks for us too. What it has locked, it has seen."""
        notified = self.reactor.notifications
        nap = self._backing.nap * self._rng.uniform(0.8, 1.0)
        due_in = None if due_in is not None and due_in <= _LOCKED else due_in
        await self.reactor.sleep(due_in, at_most=min(nap, self._longest_sleep()))
        self._is_backing = self.reactor.notifications == notified

    def _longest_sleep(self) -> float:
        """A stock, however small, is looked after."""
        return _STUCK_AFTER if self._ready else math.inf

    def _until_due(self, due_in: float | None) -> float | None:
        """How long to sleep. Rows that somebody has locked ask us back in 10 ms; those that stay locked, by an open
        transaction of the user's, later and later.
        """
        if due_in is None or due_in > _LOCKED:
            self._locked_nap = _LOCKED / 4
            return due_in
        self._locked_nap = min(2 * self._locked_nap, 0.25)
        return max(due_in, self._locked_nap)

    async def _reconcile(self, link: Link) -> None:
        """Give back what the database thinks we hold and we never heard of."""
        queue = self.worker.queue
        async with self._claiming:
            released = await self._lease.attempt(
                link, lambda owner: self._calls.release_unknown(owner, queue, list(self._held))
            )
        if released:
            logger.info("queue %r: %d executions of a claim whose reply was lost were given back", queue, released)

    async def _watch_end(self) -> None:
        """If a scope outside is cancelled, tell those whose handlers it cancels: it is not a scope of theirs."""
        with self._watching:
            try:
                await trio.sleep_forever()
            finally:
                if not self._watching.cancel_called:
                    for held in self._held.values():
                        if held.interruption is not None:
                            held.interruption.note_end()

    def _note_room(self) -> None:
        if not self._room.is_set() and self._wants_more():
            self._room.set()

    # Executing

    async def _run_executions(self, link: Link) -> None:
        with Berth() as berth:
            context = _PristineContext()
            slice_ends = trio.current_time() + _SLICE
            occupancy, is_busy = self._counts.occupancy, False
            ready = self._ready
            while True:
                if (
                    not ready
                    or self._is_stopping  # a claim that was in flight then goes back
                    or (self._starts.is_held and ready[0].suspected is None)
                ):
                    if is_busy:
                        is_busy = False
                        occupancy.leave(trio.current_time())
                    self._note_idle()
                    self._note_room()
                    if self._is_stopping and not ready:
                        self._runners -= 1
                        if self._runners == 0:
                            self._watching.cancel()
                        return
                    await self._park()
                    slice_ends = trio.current_time() + _SLICE
                    continue
                if self._yielding:
                    await self._park()  # somebody goes on, whose handlers do not wait
                    slice_ends = trio.current_time() + _SLICE
                    continue
                if not self._lease.is_held():
                    await trio.sleep_forever()  # the lease's scope ends us
                held = ready.popleft()
                self._wake_runner()
                now = trio.current_time()
                if not is_busy:
                    is_busy = True
                    occupancy.enter(now)
                self._running += 1
                if type(held) is Lot:
                    # As below, of many.
                    call = self._begin_lot(held, now)
                    try:
                        slice_ends = await self._let_others(context)
                        failpoint("handler.before")
                        await call.attempt(partial(self._loader, link), self._limiter, berth)
                        failpoint("handler.after")
                    finally:
                        self._running -= 1
                        self._end_lot(held, call)
                    continue
                interruption = held.interruption = Interruption()
                held.has_begun = held.is_running = True
                outcome: Outcome | None = None
                if not self._room.is_set():
                    self._note_room()
                self._prefetch.note_start(now - held.received_at)
                self._counts.pickups.append(held.claimed.waited + now - held.received_at)
                try:
                    # A switch of tasks costs as much as a short handler: not one for each (benchmarks/throughput.py).
                    if now >= slice_ends or context.was_changed():
                        slice_ends = await self._let_others(context)
                    failpoint("handler.before")
                    outcome = await self._run_one(held, link, interruption, berth)
                    failpoint("handler.after")
                except BaseException:
                    # Not data: the worker's own cancellation, or the user's Ctrl-C.
                    if not interruption.is_body_running:
                        outcome = released(self._handlers.of(held.claimed), held.claimed)
                    raise
                finally:
                    self._running -= 1
                    held.is_running = False
                    if not interruption.is_body_running:
                        held.interruption = None  # thousands wait to be flushed: what they need not keep is not kept
                    self._end(held, outcome)

    async def _let_others(self, context: _PristineContext) -> float:
        """Let others have a turn, and go on in a fresh context. Returns when this runner's next slice ends."""
        context.restore()
        self._yielding += 1
        await trio.lowlevel.cancel_shielded_checkpoint()
        self._yielding -= 1
        self._wake_runner()  # who came meanwhile has left the rest to us
        return trio.current_time() + _SLICE

    def _begin_lot(self, lot: Lot, now: float) -> Call:
        """A runner has taken it, and will call the handler."""
        self._stock.note_taken(lot)
        assert lot.ready_at is not None
        self._prefetch.note_start(now - lot.ready_at)
        self._surplus += len(lot.members) - 1
        call = Call(lot.task, self.worker.queue, self._shared.resources, self._rng)
        for held in lot.members:
            held.interruption = call.add(held.claimed, held.received_at, partial(self._end_member, held))
            held.has_begun = held.is_running = True
            self._counts.pickups.append(held.claimed.waited + now - held.received_at)
        self._note_room()
        return call

    def _end_member(self, held: Held, outcome: Outcome | None) -> None:
        held.is_running = False
        if outcome is not None:
            held.interruption = None
        self._end(held, outcome)

    def _end_lot(self, lot: Lot, call: Call) -> None:
        """The call is over. Who has no outcome was interrupted by what is not data: it goes back."""
        self._surplus -= len(lot.members) - 1
        is_body_running = call.interruption.is_body_running
        for member in call.members:
            if not member.is_settled:
                member.settle(None if is_body_running else released(lot.task, member.claimed))

    def _loader(self, link: Link, claimed: Claimed) -> Callable[[], Awaitable[str | None]]:
        return partial(self._load, link, claimed)

    async def _run_one(self, held: Held, link: Link, interruption: Interruption, berth: Berth) -> Outcome | None:
        claimed = held.claimed
        task = self._handlers.of(claimed)
        ctx = Context(
            claimed.id, claimed.attempt, task=task.name, queue=self.worker.queue, resources=self._shared.resources
        )
        payload = partial(self._load, link, claimed) if claimed.payload is None else claimed.payload
        ctx.attach(partial(self._open_durable, claimed, task, interruption), interruption)
        outcome: Outcome | None = None
        try:
            outcome = await attempt(
                task, claimed, payload, ctx, self._limiter, self._rng, interruption, berth, held.received_at
            )
        finally:
            durable = self._durables.pop(claimed.id, None) if self._durables else None
            ctx.close()
            if durable is not None:
                durable.end(completed=outcome is not None and outcome.kind == "completed")
                held.has_history = True
                held.leaves_children = durable.may_leave_children
        return outcome

    def _open_durable(self, claimed: Claimed, task: Task[..., Any], interruption: Interruption) -> Durable:
        """What a handler needs that does something durable; made when it first does."""
        assert self._journal is not None
        interruption.drains = self._is_draining
        journal = ExecutionJournal(self._journal, claimed, interruption)
        durable = self._durables[claimed.id] = Durable(
            claimed.attempt,
            journal,
            interruption,
            self._limiter,
            self._rng,
            task.limits,
            child_row,
            task.bind_arguments,
            self._shared.transactions if task.is_async else self._shared.thread_transactions,
        )
        return durable

    def _is_draining(self) -> bool:
        return self._is_stopping

    async def _load(self, link: Link, claimed: Claimed) -> str | None:
        """A large payload, when it is needed; None if the claim is not ours any more."""
        failures = 0
        while True:
            try:
                return await self._lease.attempt(
                    link, lambda owner: self._calls.load_payload(claimed.id, claimed.claim_no, owner)
                )
            except LeaseLost:
                await trio.sleep_forever()  # the lease's scope ends us
            except (Unavailable, SchemaMissing) as error:
                failures += 1
                self._outages.warn("%s; trying again", error)
            await trio.sleep(backoff(failures, self._rng))

    def _end(self, held: Held, outcome: Outcome | None) -> None:
        if not held.is_ours:
            self._counts.flushed.dropped += 1
        elif outcome is not None:
            self._flusher.note(outcome)
        else:  # a thread runs on
            self.has_abandoned = True
        if held.suspected is not None:
            held.suspected.set()

    def _end_unstarted(self, held: Held, *, is_cancelled: bool = False) -> None:
        if held.is_ours:
            claimed = held.claimed
            task = self._handlers.of(claimed)
            self._flusher.note(cancelled(task, claimed) if is_cancelled else released(task, claimed))
        if held.suspected is not None:
            held.suspected.set()

    def _give_back(self, unstarted: Sequence[Held]) -> None:
        """What was claimed, has not begun and is in stock no more goes back, at no cost to it."""
        if unstarted:
            for held in unstarted:
                if not self._lease.is_lost:
                    self._end_unstarted(held)
            failpoint("stock.given_back")

    async def _park(self) -> None:
        await self._idle_runners.park()
        self._is_waking = False

    def _wake_runner(self) -> None:
        """Have a runner on its way for what is in stock: it is needed as soon as a handler waits for something.

        Not all at once: while handlers wait for nothing one runner does it all, and each switch to another costs as
        much as an execution. Where they wait the number of those that run doubles with each turn.
        """
        if self._ready and not self._is_waking and self._idle_runners:
            self._is_waking = True
            self._idle_runners.unpark(count=max(1, self._running))

    def _note_idle(self) -> None:
        """A runner found nothing to do: what has ended need not wait for company."""
        if self._running == 0:
            self._flusher.hurry()
