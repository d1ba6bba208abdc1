"""Writes outcomes: by size or age, in one statement that is all or nothing per row, until the database has answered.

Owns what its worker holds: every claim is in `held` from the claim's reply until the database has answered a flush of
its outcome, or it is no longer ours. Every write carries the owner's id and the claim's number, so sending it twice is
harmless, and one that comes late does nothing.

What the database says of a row that it did not write now: "already" is our own earlier flush, whose reply was lost.
"fenced": the claim was no longer ours, and the outcome comes to nothing. "gone": no trace of the execution; if an
earlier sending of this outcome was not answered it was written, and its row not kept; otherwise it was taken over,
ended and deleted, which is fenced too.

A succession (`lease.py`) sorts the outcomes: those of claims that were handed over are sent under the new id, the
others once more under the old one, only to learn whether they had been written.

A row that somebody has locked (a producer that asked for its cancellation, and has not committed) cannot be written:
the database gives up after a second, and the batch is halved and goes behind the others, until that one waits alone.

Cancellation: `run` and `write` leave what was not answered in `outcomes`.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import trio

from ..db.calls import Calls
from ..db.link import Link, OutageLog, backoff
from ..errors import DurableMisuse, LeaseLost, SchemaMissing, Unavailable, Unstorable
from ..failpoints import failpoint
from ..model import Claimed, Outcome
from ..tasks import Task, Worker
from .execution import Interruptible, cancelled, failed
from .lease import Lease

logger = logging.getLogger("pgconductor.worker")

MAX_FLUSH = 1000
_ENDS = ("completed", "failed", "cancelled")
_INSTEAD = frozenset(("cancelled", "open_children"))  # answers to who wants to begin a new life


@dataclass(slots=True, eq=False)
class Held:
    """A claimed execution. `received_at`: Trio's time at which it came, for how long it waited here.

    `interruption` is there while its handler runs, and while its thread does. `is_ours` ends if it was not
    handed over in a succession. `suspected` is there if it is on its last life, and set when it has ended.
    """

    claimed: Claimed
    received_at: float
    interruption: Interruptible | None = None
    has_begun: bool = False
    is_running: bool = False
    suspected: trio.Event | None = None
    is_ours: bool = True
    has_history: bool = field(init=False)  # its handler has asked for something durable, or an earlier claim's may have
    leaves_children: bool = field(init=False)  # its history may have children that have not ended

    def __post_init__(self) -> None:
        self.has_history = self.leaves_children = self.claimed.claim_no > 1


@dataclass(slots=True)
class FlushCounts:
    """`fenced` were refused, `dropped` not sent, because the claim was no longer ours. `seconds`: for which one that
    was answered was under way.
    """

    flushes: int = 0
    seconds: float = 0.0
    fenced: int = 0
    dropped: int = 0
    outcomes: dict[str, int] = field(default_factory=dict[str, int])


class Handlers:
    """The tasks of one worker, by name and version.

    `names`, `versions`: as `claim` takes them, the current version of a task first; `versions` is None if there are
    none. `has_batches`: whether the handler of one is one of batches; `per_runner`: executions that a handler takes at
    least, when there are enough.
    """

    def __init__(self, worker: Worker) -> None:
        every = [version for task in worker.tasks for version in task.versions]
        self._tasks = {(task.name, task.version): task for task in every}
        self.names = [task.name for task in every]
        self.versions = [task.version for task in every] if any(task.version for task in every) else None
        self.has_batches = any(task.batch is not None for task in every)
        self.per_runner = min(1 if task.batch is None else task.batch.size for task in every)

    def of(self, claimed: Claimed) -> Task[..., Any]:
        """What runs a claimed execution."""
        return self._tasks[claimed.task, claimed.version]


class Flusher:
    """See the module's description. Made by a worker's pipeline."""

    def __init__(
        self,
        handlers: Handlers,
        lease: Lease,
        calls: Calls,
        outages: OutageLog,
        rng: random.Random,
        counts: FlushCounts,
        *,
        interval: float,
        batch: int | None,
        may_grow: Callable[[], bool],
        written: Callable[[], None],
        left: Callable[[], None],
    ) -> None:
        """`interval`: seconds that an outcome may wait for others. `may_grow`: whether others may come soon. `written`
        is called when a flush was answered, `left` when it may have left children to be cancelled.
        """
        self.held: dict[UUID, Held] = {}
        self.outcomes: list[Outcome] = []
        self._handlers = handlers
        self._lease = lease
        self._calls = calls
        self._outages = outages
        self._rng = rng
        self._counts = counts
        self._interval = interval
        self._max_batch = batch or MAX_FLUSH
        self._may_grow = may_grow
        self._written = written
        self._left = left
        self._strays: list[tuple[UUID, list[Outcome]]] = []  # of claims not handed over, by former owners
        self._in_doubt: set[UUID] = set()  # sent, not answered
        self._replaced: set[UUID] = set()  # by the failure to store them
        self._given_up: list[UUID] = []
        self._size = self._max_batch  # of the next batch: less while one is looked for that cannot be written
        self._failures = 0
        self._oldest_at = 0.0
        self._wanted = trio.Event()
        self._emptied = trio.Event()
        self._is_awaited = False
        self._is_closed = False

    def note(self, outcome: Outcome) -> None:
        """To be written, with others if there are any soon."""
        if not self.outcomes:
            self._oldest_at = trio.current_time()
        self.outcomes.append(outcome)
        failpoint("outcome.noted")
        if len(self.outcomes) == 1 or len(self.outcomes) >= self._max_batch:
            self._wanted.set()

    def hurry(self) -> None:
        """Look again whether what has ended need wait for company."""
        if self.outcomes:
            self._wanted.set()

    def close(self) -> None:
        """No more outcomes will come: `run` ends when all are written."""
        self._is_closed = True
        self._wanted.set()

    async def until_empty(self) -> None:
        """Until no outcome waits to be written; none waits for company meanwhile."""
        if self.outcomes:
            self._is_awaited = True
            self._emptied = trio.Event()
            self._wanted.set()
            await self._emptied.wait()

    def succeed(self, former: UUID, handed_over: frozenset[UUID]) -> None:
        """The owner has changed, and these claims with it. Nothing is in flight."""
        stray = [outcome for outcome in self.outcomes if outcome.id not in handed_over]
        if stray:
            self._strays.append((former, stray))
            self.outcomes = [outcome for outcome in self.outcomes if outcome.id in handed_over]
            self._wanted.set()

    def unwritten(self) -> list[UUID]:
        """Executions whose outcomes have not been written, as far as we know."""
        strays = [outcome.id for _, stray in self._strays for outcome in stray]
        return [*self._given_up, *strays, *(outcome.id for outcome in self.outcomes)]

    async def run(self, link: Link) -> None:
        """Write until closed and all is written."""
        while True:
            self._wanted = trio.Event()
            if self._strays:
                await self._or_end(self._ask(link))
            elif not self.outcomes:
                self._is_awaited = False
                self._emptied.set()
                if self._is_closed:
                    return
                await self._wanted.wait()
            # By size, by age, or at once when nothing else is running that could join.
            elif (
                len(self.outcomes) < self._size
                and not self._is_closed
                and not self._is_awaited
                and self._may_grow()
                and (age := trio.current_time() - self._oldest_at) < self._interval
            ):
                with trio.move_on_after(self._interval - age):
                    await self._wanted.wait()
            else:
                await self._or_end(self._write(link))

    async def _or_end(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except LeaseLost:
            await trio.sleep_forever()  # the lease's scope ends us

    async def write_all(self, link: Link) -> None:
        """After an interruption of `run`: what has ended. To be bounded by the caller; ends when the lease does."""
        try:
            while self.outcomes:
                await self._write(link)
        except LeaseLost:
            return

    async def _write(self, link: Link) -> None:
        """Send the oldest outcomes once, and forget those that the database has answered for."""
        await self._lease.until_open()  # a succession may take away some of them
        batch = self._next_batch()
        if not batch:
            return
        refused = await self._send(link, batch, None)
        if refused is None:
            return
        # Whoever came meanwhile is behind them.
        del self.outcomes[: len(batch)]
        if not _INSTEAD.isdisjoint(refused.values()):
            self.outcomes += [self._instead(o, refused[o.id]) for o in batch if refused.get(o.id) in _INSTEAD]
            batch = [outcome for outcome in batch if refused.get(outcome.id) not in _INSTEAD]
        has_left = False
        for outcome in batch:
            held = self.held.pop(outcome.id, None)
            has_left = has_left or (held is not None and held.leaves_children and outcome.kind in _ENDS)
        if has_left:
            self._left()
        self._size = min(2 * self._size, self._max_batch)
        self._oldest_at = trio.current_time()
        self._counts.flushes += 1
        self._count(batch, refused)
        self._written()

    def _next_batch(self) -> list[Outcome]:
        """The oldest outcomes that one call writes, moved to the front: those that begin a new life have their own."""
        batch = self.outcomes[: self._size]
        lives = [outcome for outcome in batch if outcome.kind == "continued"]
        if lives and len(lives) < len(batch):
            ends = [outcome for outcome in batch if outcome.kind != "continued"]
            self.outcomes[: len(batch)] = [*ends, *lives]
            return ends
        return batch

    async def _ask(self, link: Link) -> None:
        """Were outcomes of claims that were not handed over written, before the succession?"""
        former, stray = self._strays[0]
        # Their rows are not ours: nothing is written. Nor must a value that cannot be stored be in the way.
        refused = await self._send(link, [o._replace(result=None, error=None) for o in stray], former)
        if refused is not None:
            del self._strays[0]
            self._count(stray, refused)

    async def _send(self, link: Link, batch: list[Outcome], former: UUID | None) -> dict[UUID, str] | None:
        """Send once; return what the database did not write now, and None if it has to be sent again, later then."""
        failpoint("flush.before")
        began = trio.current_time()
        try:
            if former is None and batch[0].kind == "continued":
                refused = await self._lease.attempt(link, lambda owner: self._calls.continue_as_new(owner, batch))
            else:
                has_family = former is not None or any(map(self._has_family, batch))
                refused = await self._lease.attempt(
                    link, lambda owner: self._calls.flush(former or owner, batch, has_family=has_family)
                )
        except Unstorable as error:
            if len(batch) > 1:
                self._size = len(batch) // 2
            else:
                self._replace_unstorable(batch[0], error)
            return None
        except (Unavailable, SchemaMissing) as error:
            # A missing schema: a server that is being restored or migrated; not the caller's fault, nor for ever.
            self._in_doubt.update(outcome.id for outcome in batch)
            self._failures += 1
            if former is None:
                self._set_back(batch)
            self._outages.warn("%s; trying again", error)
            await trio.sleep(backoff(self._failures, self._rng))
            return None
        failpoint("flush.answered")
        self._counts.seconds += trio.current_time() - began
        self._failures = 0
        return refused

    def _instead(self, outcome: Outcome, status: str) -> Outcome:
        """What is written of an execution that cannot begin a new life."""
        claimed = self.held[outcome.id].claimed
        task = self._handlers.of(claimed)
        if status == "cancelled":
            return cancelled(task, claimed)
        return failed(task, claimed, DurableMisuse("ctx.continue_as_new() with children that had not ended"))

    def _has_family(self, outcome: Outcome) -> bool:
        held = self.held.get(outcome.id)
        return held is None or held.has_history or held.claimed.parent_id is not None

    def _set_back(self, batch: list[Outcome]) -> None:
        """Others first, and fewer at once: whatever kept these from being written, a row that somebody's open
        transaction has locked or a time limit, must not keep back all that comes after.
        """
        self.outcomes = [*self.outcomes[len(batch) :], *batch]
        self._size = max(1, len(batch) // 2)

    def _count(self, batch: list[Outcome], refused: Mapping[UUID, str]) -> None:
        counts = self._counts.outcomes
        if not refused:
            for kind, count in Counter([outcome.kind for outcome in batch]).items():
                counts[kind] = counts.get(kind, 0) + count
        for outcome in batch if refused else ():
            status = refused.get(outcome.id)
            if status == "fenced" or (status == "gone" and outcome.id not in self._in_doubt):
                self._counts.fenced += 1
            else:
                counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
        for settled in (self._in_doubt, self._replaced):
            if settled:
                settled.difference_update(outcome.id for outcome in batch)

    def _replace_unstorable(self, outcome: Outcome, error: Unstorable) -> None:
        """One that the database cannot store fails its execution, with the reason. If not even that can be stored,
        it is nothing that this process could mend: the claim is kept for as long as the process lives.
        """
        held = self.held[outcome.id]
        task = self._handlers.of(held.claimed)
        if outcome.id in self._replaced:
            logger.error("execution %s of task %r cannot even be failed, and stays: %s", outcome.id, task.name, error)
            del self.outcomes[0]
            self._given_up.append(outcome.id)
            return
        logger.warning("the outcome of execution %s of task %r cannot be stored: %s", outcome.id, task.name, error)
        self._replaced.add(outcome.id)
        self.outcomes[0] = failed(task, held.claimed, error)
