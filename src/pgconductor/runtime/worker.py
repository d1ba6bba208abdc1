"""The pipeline of one queue: claim → execute → flush, each with backpressure, none waiting for the others.

    claim     asks for free capacity plus a small stock (`pace.Prefetch`), and sleeps by the reactor's protocol when
    there is none execute   a fixed set of runner tasks takes from the stock in memory; no task is spawned per
    execution flush     writes outcomes by size or age, on a connection of its own

Invariants: whatever was claimed is in `_held` until the database has answered a flush of it; what is held is bounded,
so claims stop when flushes do not get through. An execution has one cancel scope: lease lost and shutdown are that
scope. Every write carries the owner's id and the claim's number, so a repeated flush is harmless and a late one does
nothing.

Cancellation: `run` stops claiming, interrupts the handlers and, in one bounded shield, flushes what has ended and
gives back what has not begun. If its lease was lost, nothing is written. Handlers that outlive that bound keep their
claims, which lapse.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import trio

from ..context import Context, Resources
from ..db.calls import Calls, Claim
from ..db.link import Link, OutageLog, Target, backoff, open_link
from ..errors import LeaseLost, Unavailable, Unstorable
from ..model import Claimed, Outcome
from ..tasks import Task, Worker
from .execution import attempt, failed
from .listener import Listener
from .pace import Linger, Prefetch
from .reactor import Reactor, ReactorStatistics

logger = logging.getLogger("pgconductor.worker")

_MAX_CLAIM = 1000
_MAX_FLUSH = 1000
_MAX_UNFLUSHED = 4 * _MAX_FLUSH
_STUCK_AFTER = 0.25  # seconds in stock after which an execution is given back for others to run
_CLAIM_TIMEOUT = 10.0
_LAST_FLUSH_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """What one worker has done since it started, and what it holds now. Seconds; `pickups` are the latest, oldest
    first.

    A pick-up is the time from an execution's due time to the start of its handler.
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
    pickups: tuple[float, ...]
    reactor: ReactorStatistics


@dataclass(slots=True)
class _Held:
    """A claimed execution. `received_at`: Trio's time at which it came, for how long it waited here."""

    claimed: Claimed
    received_at: float
    scope: trio.CancelScope | None = None


@dataclass(slots=True)
class _Counts:
    claims: int = 0
    empty_claims: int = 0
    claimed: int = 0
    flushes: int = 0
    fenced: int = 0
    outcomes: dict[str, int] = field(default_factory=dict[str, int])
    pickups: deque[float] = field(default_factory=lambda: deque[float](maxlen=2000))


class Pipeline:
    """One worker, running. Made by an orchestrator for each of its incarnations."""

    def __init__(
        self,
        worker: Worker,
        queue_no: int,
        owner: UUID,
        lease: trio.CancelScope,
        target: Target,
        calls: Calls,
        resources: Resources,
        listener: Listener | None,
        outages: OutageLog,
        rng: random.Random,
    ) -> None:
        """`queue_no`: as `register_queue` gave it. `lease`: once cancelled, what this worker holds is no longer its
        own, and nothing is written.
        """
        self.worker = worker
        self._queue_no = queue_no
        self._lease = lease
        self._owner = owner
        self._target = target
        self._calls = calls
        self._resources = resources
        self._outages = outages
        self._rng = rng
        self._tasks: dict[str, Task[..., Any]] = {task.name: task for task in worker.tasks}
        self._task_names = list(self._tasks)
        self.reactor = Reactor(calls, worker.queue, worker.notify, worker.sweep_interval, listener, rng)
        self._prefetch = Prefetch(maximum=max(2000, 2 * worker.concurrency))
        self._linger = Linger()
        self._noted_notifications = 0
        self._limiter = trio.CapacityLimiter(worker.concurrency)
        self._max_claim = worker.claim_batch or _MAX_CLAIM
        self._max_flush = worker.flush_batch or _MAX_FLUSH
        # Stock and outcomes; each has one sleeper or several, woken by parking lots: no task switch when nobody sleeps.
        self._held: dict[UUID, _Held] = {}
        self._stock: deque[_Held] = deque()
        self._outcomes: list[Outcome] = []
        self._oldest_outcome_at = 0.0
        self._idle_runners = trio.lowlevel.ParkingLot()
        self._room = trio.Event()
        self._flush_wanted = trio.Event()
        self._running = 0
        self._is_stopping = False
        self._is_closed = False  # no more outcomes will come
        self.has_abandoned = False  # a handler's thread runs on: its claim may only lapse
        self._intake = trio.CancelScope()
        self._counts = _Counts()

    def statistics(self) -> WorkerStatistics:
        counts = self._counts
        return WorkerStatistics(
            self.worker.queue, self._running, len(self._stock), len(self._outcomes), counts.claims, counts.empty_claims,
            counts.claimed, counts.flushes, dict(counts.outcomes), counts.fenced, tuple(counts.pickups),
            self.reactor.statistics(),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<Pipeline of queue {self.worker.queue!r}, {self._running} running, {len(self._stock)} in stock>"

    # Stopping

    def stop(self) -> None:
        """Stop claiming; what is in stock goes back, what runs may go on. Idempotent, does not wait."""
        self._is_stopping = True
        self._intake.cancel()

    def interrupt(self) -> None:
        """Cancel the running handlers; their executions are given back."""
        for held in self._held.values():
            if held.scope is not None:
                held.scope.cancel()

    # Running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `stop` has been called and everything has ended. `started` once it claims."""
        queue = self.worker.queue
        async with (
            open_link(self._target, "claim", self._outages, self._rng) as claims,
            open_link(self._target, "flush", self._outages, self._rng) as flushes,
        ):
            try:
                async with trio.open_nursery() as outer:
                    outer.start_soon(self._flush_loop, flushes, name=f"flush {queue}")
                    async with trio.open_nursery() as runners:
                        for number in range(self.worker.concurrency):
                            runners.start_soon(self._run_executions, claims, name=f"run {queue} {number}")
                        try:
                            with self._intake:
                                task_status.started()
                                await self._claim_loop(claims)
                        finally:
                            self._is_stopping = True
                            self._give_back_stock()
                            self._idle_runners.unpark_all()
                    self._is_closed = True
                    self._flush_wanted.set()
            finally:
                if self._outcomes and not self._lease.cancel_called:
                    with trio.move_on_after(_LAST_FLUSH_TIMEOUT, shield=True):
                        await self._last_flush(flushes)
                if self._outcomes:
                    logger.warning(
                        "queue %r: %d outcomes could not be written, their executions run again: %s",
                        queue, len(self._outcomes), ", ".join(str(outcome.id) for outcome in self._outcomes[:100]),
                    )  # fmt: skip

    # Claiming

    def _wants_more(self) -> bool:
        """Free runners, or a stock that has run down; never more in hand than flushes keep up with."""
        if len(self._held) >= self._running + self._prefetch.size + self.worker.concurrency + _MAX_UNFLUSHED:
            return False
        free = self.worker.concurrency - self._running
        return len(self._stock) < free or len(self._stock) * 2 < self._prefetch.size

    async def _claim_loop(self, link: Link) -> None:
        failures = 0
        reconcile_at: list[float] = []
        while True:
            if not self._wants_more():
                await self.reactor.lower()  # a saturated worker is not asleep
                await self._wait_for_room()
                continue
            try:
                if reconcile_at and trio.current_time() >= reconcile_at[0]:
                    await self._reconcile(link)
                    del reconcile_at[0]
                drained, due_in = await self._claim(link)
                failures = 0
                if drained:
                    await self._doze(link, due_in)
                else:
                    await self.reactor.lower()  # there is more than we can take: others need not wake us
            except Unavailable as error:
                failures += 1
                # The reply of a claim may be lost. The statement is over when its time limit is: look then once more.
                now = trio.current_time()
                reconcile_at = [now, now + 31.0]
                self._outages.warn("queue %r cannot be claimed from: %s", self.worker.queue, error)
                await trio.sleep(backoff(failures, self._rng))
            except LeaseLost:
                self._lease.cancel()
                await trio.sleep_forever()

    async def _wait_for_room(self) -> None:
        """Until a runner takes from the stock. A stock that nobody takes from goes back, for others to run."""
        self._room = trio.Event()
        if self._wants_more():
            return
        with trio.move_on_after(_STUCK_AFTER if self._stock else float("inf")) as waiting:
            await self._room.wait()
        if waiting.cancelled_caught and self._stock and trio.current_time() - self._stock[0].received_at > _STUCK_AFTER:
            self._give_back_stock()
            self._prefetch.note_stuck()

    async def _claim(self, link: Link) -> tuple[bool, float | None]:
        """Claim once. Returns whether the queue has no more for now, and when the next is due."""
        room = self.worker.concurrency - self._running + self._prefetch.size - len(self._stock)
        limit = max(1, min(room, self._max_claim))
        call = self._calls.claim(self.worker.queue, self._owner, self._task_names, limit, self._queue_no)
        self.reactor.clear()
        # Not interrupted by a stop: what it claims is then given back at once, instead of being found missing later.
        answer: Claim | None = None
        with trio.move_on_after(_CLAIM_TIMEOUT, shield=True):
            answer = await link.attempt(call)
        if answer is None:
            raise Unavailable(f"no reply to a claim within {_CLAIM_TIMEOUT} s")
        claimed, due_in = answer
        now = trio.current_time()
        self._counts.claims += 1
        notified = self.reactor.notifications - self._noted_notifications
        self._noted_notifications += notified
        self._linger.note_arrivals(now, max(len(claimed), notified))
        self._prefetch.note_claim(asked=limit, got=len(claimed), ran_dry=len(self._idle_runners) > 0)
        if not claimed:
            self._counts.empty_claims += 1
            return True, due_in
        self._counts.claimed += len(claimed)
        for item in claimed:
            held = _Held(item, now)
            self._held[item.id] = held
            self._stock.append(held)
        self._idle_runners.unpark(count=len(claimed))
        return len(claimed) < limit, None

    async def _doze(self, link: Link, due_in: float | None) -> None:
        """The queue had no more. Look on for a while if it is busy, else go to sleep by the reactor's protocol."""
        if not self.reactor.can_be_woken:
            await self.reactor.sleep(due_in)
            return
        if self._linger.is_lingering:
            await self.reactor.lower()
            intervals = self._linger.intervals()
            while (interval := next(intervals, None)) is not None:
                await trio.sleep(interval)
                if not self._wants_more():
                    return
                before = self._counts.claimed
                drained, due_in = await self._claim(link)
                if not drained:
                    return
                if self._counts.claimed > before:
                    intervals = self._linger.intervals()
        nap = 0.002
        while self._wants_more() and self.reactor.can_be_woken:
            is_quiet = await self.reactor.look()
            before = self._counts.claimed
            drained, due_in = await self._claim(link)
            if self._counts.claimed > before:
                return
            if is_quiet:
                await self.reactor.sleep(due_in)
                return
            await self.reactor.sleep(due_in, at_most=nap)
            nap = min(2 * nap, 0.25)

    async def _reconcile(self, link: Link) -> None:
        """Give back what the database thinks we hold and we never heard of."""
        known = list(self._held)
        released = await link.attempt(self._calls.release_unknown(self._owner, self.worker.queue, known))
        if released:
            logger.info(
                "queue %r: %d executions of a claim whose reply was lost were given back", self.worker.queue, released
            )

    # Executing

    async def _run_executions(self, link: Link) -> None:
        runner = trio.lowlevel.current_task()
        blank = runner.context
        while True:
            if not self._stock:
                self._note_idle()
                if not self._room.is_set() and self._wants_more():
                    self._room.set()
                if self._is_stopping:
                    return
                await self._idle_runners.park()
                continue
            held = self._stock.popleft()
            outcome: Outcome | None = None
            if not self._room.is_set() and self._wants_more():
                self._room.set()
            now = trio.current_time()
            self._prefetch.note_start(now - held.received_at)
            self._counts.pickups.append(held.claimed.waited + now - held.received_at)
            # Each in a fresh context, so that no context variable leaks from one to the next. It counts from the next
            # switch on.
            runner.context = blank.copy()
            self._running += 1
            try:
                await trio.lowlevel.cancel_shielded_checkpoint()
                outcome = await self._run_one(held, link)
            except BaseException:
                # Not data: our own cancellation, or the user's Ctrl-C.
                outcome = self._interrupted(held)
                raise
            finally:
                self._running -= 1
                if outcome is not None:
                    self._note_outcome(outcome)

    def _interrupted(self, held: _Held) -> Outcome | None:
        """What is given back after an interruption: a handler that has ended. A thread runs on, so its claim may only
        lapse.
        """
        if not self._tasks[held.claimed.task].is_async:
            self.has_abandoned = True
            return None
        return Outcome(held.claimed.id, held.claimed.claim_no, "released")

    async def _run_one(self, held: _Held, link: Link) -> Outcome | None:
        claimed = held.claimed
        outcome: Outcome | None = None
        held.scope = scope = trio.CancelScope()
        task = self._tasks[claimed.task]
        try:
            with scope:
                payload = claimed.payload
                if payload is None:
                    payload = await link.insist(self._calls.load_payload(claimed.id, claimed.claim_no, self._owner))
                    if payload is None:  # no longer ours
                        return Outcome(claimed.id, claimed.claim_no, "released")
                ctx = Context(
                    claimed.id, claimed.attempt, task=task.name, queue=self.worker.queue, resources=self._resources
                )
                outcome = await attempt(task, claimed, payload, ctx, self._limiter, self._rng)
        except BaseExceptionGroup as group:
            if not scope.cancel_called or group.subgroup(KeyboardInterrupt) is not None:
                raise
            logger.warning("execution %s of task %r raised when interrupted", claimed.id, task.name, exc_info=group)
        finally:
            held.scope = None
        if scope.cancel_called and (outcome is None or outcome.kind != "completed"):
            # An unwinding that the engine began is no failure of the handler, whatever it raised on the way.
            return self._interrupted(held)
        assert outcome is not None
        return outcome

    # Flushing

    def _note_outcome(self, outcome: Outcome) -> None:
        if not self._outcomes:
            self._oldest_outcome_at = trio.current_time()
        self._outcomes.append(outcome)
        if len(self._outcomes) == 1 or len(self._outcomes) >= self._max_flush:
            self._flush_wanted.set()

    def _note_idle(self) -> None:
        """A runner found nothing to do: what has ended need not wait for company."""
        if self._outcomes and self._running == 0:
            self._flush_wanted.set()

    def _give_back_stock(self) -> None:
        """What was claimed and has not begun goes back, at no cost to it."""
        while self._stock:
            claimed = self._stock.popleft().claimed
            self._note_outcome(Outcome(claimed.id, claimed.claim_no, "released"))

    async def _flush_loop(self, link: Link) -> None:
        while True:
            self._flush_wanted = trio.Event()
            if not self._outcomes:
                if self._is_closed:
                    return
                await self._flush_wanted.wait()
            # By size, by age, or at once when nothing else is running that could join.
            elif (
                len(self._outcomes) < self._max_flush
                and (self._running or self._stock)
                and not self._is_closed
                and (age := trio.current_time() - self._oldest_outcome_at) < self.worker.flush_interval
            ):
                with trio.move_on_after(self.worker.flush_interval - age):
                    await self._flush_wanted.wait()
            else:
                await self._flush(link, self._outcomes[: self._max_flush])

    async def _flush(self, link: Link, batch: list[Outcome]) -> None:
        """Write a batch and forget it. Sent again until the database has answered; if it cannot store one, the others
        do not suffer.
        """
        try:
            refused = await link.insist(self._calls.flush(self._owner, batch))
        except Unstorable as error:
            if len(batch) == 1:
                await self._flush_unstorable(link, batch[0], error)
            else:
                half = len(batch) // 2
                await self._flush(link, batch[:half])
                await self._flush(link, batch[half:])
            return
        self._forget(batch)
        self._counts.flushes += 1
        counts = self._counts.outcomes
        for outcome in batch:
            if refused and refused.get(outcome.id) == "fenced":
                self._counts.fenced += 1
            else:
                counts[outcome.kind] = counts.get(outcome.kind, 0) + 1

    async def _flush_unstorable(self, link: Link, outcome: Outcome, error: Unstorable) -> None:
        held = self._held.get(outcome.id)
        if held is None or (outcome.result is None and outcome.error is None):
            raise error
        task = self._tasks[held.claimed.task]
        logger.warning("the outcome of execution %s of task %r cannot be stored: %s", outcome.id, task.name, error)
        replacement = failed(task, held.claimed, error)
        self._outcomes[self._outcomes.index(outcome)] = replacement
        await self._flush(link, [replacement])

    def _forget(self, batch: list[Outcome]) -> None:
        if self._outcomes[: len(batch)] == batch:
            del self._outcomes[: len(batch)]
        else:
            done = {outcome.id for outcome in batch}
            self._outcomes = [outcome for outcome in self._outcomes if outcome.id not in done]
        for outcome in batch:
            self._held.pop(outcome.id, None)
        self._oldest_outcome_at = trio.current_time()
        if not self._room.is_set() and self._wants_more():
            self._room.set()

    async def _last_flush(self, link: Link) -> None:
        """After an interruption: once, what has ended. The rest is left to its lease."""
        while self._outcomes:
            await self._flush(link, self._outcomes[: self._max_flush])
