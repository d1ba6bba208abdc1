"""The pipeline of one queue: claim → execute → flush, each with backpressure, none waiting for the others.

    claim     `intake.Intake` asks for free capacity plus a small stock (`pace.Prefetch`), and sleeps when there is none
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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import trio

from ..context import Context, Resources
from ..db.calls import Calls, WorkerLoad
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
from .flusher import MAX_FLUSH, Flusher, Handlers, Held
from .intake import Intake
from .journal import ExecutionJournal, Journal
from .lease import Lease
from .listener import Listener
from .load import Machine, WorkerCounts, describe
from .pace import Prefetch
from .reactor import Reactor, ReactorStatistics
from .stock import Lot, Stock

logger = logging.getLogger("pgconductor.worker")

_MAX_CLAIM = 1000
_MAX_UNFLUSHED = 4 * MAX_FLUSH
_STUCK_AFTER = 0.25  # seconds in stock after which an execution is given back for others to run
_SLICE = 0.001  # seconds after which a runner lets others have a turn, though its handlers never wait


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
        self.intake = Intake(
            self, worker.queue, queue_no, self._handlers, lease, calls, self.reactor, counts, shared.outages, shared.rng
        )
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
        self._is_stopping = False
        self.has_abandoned = False  # a handler's thread runs on: its claim may only lapse
        self.unwritten: list[UUID] = []
        self._claiming = trio.CancelScope()
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
        return describe(self.worker.queue, machine, self._counts, trio.current_time())

    def __repr__(self) -> str:
        return f"<Pipeline of queue {self.worker.queue!r}, {self._running} running, {self._in_stock} in stock>"

    @property
    def _in_stock(self) -> int:
        return self._stock.size + self._stock.apart

    # Stopping and cancelling

    def stop(self) -> None:
        """Stop claiming; what is in stock goes back, what runs may go on. Idempotent, does not wait."""
        self._is_stopping = True
        self._claiming.cancel()

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
        self.intake.forget_strays()  # what we did not know of has been given back
        self._note_room()

    # Suspects

    @property
    def has_free_runner(self) -> bool:
        return self._running < self.worker.concurrency and not self._is_stopping

    async def claim_suspect(self) -> Held | None:
        """Claim one execution that is on its last life; it begins at `start_suspect`. Raises `Unavailable`."""
        claimed = None if self._is_stopping else await self.intake.claim_suspect()
        if claimed is None:
            return None
        # No checkpoint since the answer came: or it might be looked for as one that never came here.
        held = self._held[claimed.id] = Held(claimed, trio.current_time(), suspected=trio.Event())
        return held

    async def clear_stock(self) -> None:
        """Give back what has not begun, with what a claim in flight brings, and wait until the database has it."""
        await self.intake.until_answered()
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
                                with self._claiming:
                                    task_status.started()
                                    await self.intake.run(claims)
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
                self._counts.occupancy.clear(trio.current_time())
                if not closing.cancelled_caught:
                    with trio.move_on_after(shared.last_words, shield=True):
                        await flusher.write_all(flushes)
                self.unwritten = flusher.unwritten()
                if self._lease.is_lost:
                    self._counts.flushed.dropped += len(self.unwritten)

    # Taking what is claimed: `intake.Taker`

    def wants_more(self) -> bool:
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

    def wanted(self) -> tuple[int, int]:
        """What free runners take and a stock for later; what free runners take."""
        free = (self.worker.concurrency - self._running) * self._per_runner
        room = free + self._prefetch.size - self._stock.size
        return max(1, min(room, self._max_claim)), free

    def take(self, claimed: Sequence[Claimed], *, asked: int, now: float) -> None:
        """Into stock, and to the runners."""
        self._prefetch.note_claim(
            asked=asked, got=len(claimed), ran_dry=not self._ready and len(self._idle_runners) > 0
        )
        if not claimed:
            return
        put = self._stock.add if self._stock.has_lots else self._ready.append
        for item in claimed:
            held = Held(item, now)
            self._held[item.id] = held
            put(held)
        if self._requested:
            self.cancel(self._requested)
        self._wake_runner()

    def has_stock(self) -> bool:
        """Of single executions; what waits for company in a batch waits on purpose."""
        return bool(self._ready)

    def patience(self) -> float:
        """A stock, however small, is looked after."""
        return _STUCK_AFTER if self._ready else math.inf

    async def until_wanting(self, at_most: float) -> None:
        """Until a runner takes from the stock. A stock that nobody takes from goes back, for others to run."""
        self._room = trio.Event()
        if self.wants_more():
            return
        with trio.move_on_after(min(at_most, self.patience())) as waiting:
            await self._room.wait()
        if waiting.cancelled_caught and self._is_stuck():
            self._give_back(self._stock.take_ready())
            self._prefetch.note_stuck()

    def held(self) -> list[UUID]:
        """Claimed here, and not flushed yet."""
        return list(self._held)

    def _is_stuck(self) -> bool:
        """Whether nobody has taken from the stock for long."""
        return bool(self._ready) and trio.current_time() - self._stock.ready_since() > _STUCK_AFTER

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
        if not self._room.is_set() and self.wants_more():
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
