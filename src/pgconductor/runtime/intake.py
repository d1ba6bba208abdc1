"""The claims of one queue: when to ask for work and for how much, and how to sleep when there is none.

One loop. While the pipeline wants more it claims; when the queue has no more it looks on for a while if the queue is
busy (`pace.Linger`), as its lookout or behind one, and else goes to sleep by the reactor's protocol. While the pipeline
wants nothing it waits, with its flag down.

Whose reply may be lost is looked for: what the database thinks we hold, and we never heard of, is given back, at once
and when the lost statement must be over.

Cancelling `run` while a claim is under way waits for the reply, `_CLAIM_TIMEOUT` at most: what it brings is then given
back at once by the pipeline, instead of being found missing later.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

import trio

from ..db.calls import Calls, Claim
from ..db.link import Link, OutageLog, backoff
from ..errors import LeaseLost, Unavailable
from ..failpoints import failpoint
from ..model import Claimed
from .flusher import Handlers
from .lease import Lease
from .load import WorkerCounts
from .pace import Backing, Deference, Linger
from .reactor import Reactor

logger = logging.getLogger("pgconductor.worker")

_CLAIM_TIMEOUT = 5.0
_ALONE = 0.01  # seconds without seeing the end of the queue after which a lookout wakes others;
_ALONE_FOR_CLAIMS = 3  # and as many times what a claim takes
_HELPS = 1.0  # seconds for which others look beside a lookout that has called for help
_LOCKED = 0.01  # seconds that an empty claim tells if there are rows that others have locked


class Taker(Protocol):
    """Who takes what is claimed: the pipeline."""

    @property
    def has_free_runner(self) -> bool: ...

    def wants_more(self) -> bool:
        """Whether to claim now."""
        ...

    def wanted(self) -> tuple[int, int]:
        """How many executions to ask for at most, and how many of them could begin at once."""
        ...

    def has_stock(self) -> bool:
        """Whether some that were claimed have not begun."""
        ...

    def patience(self) -> float:
        """Seconds after which it has to look after what is in stock."""
        ...

    def take(self, claimed: Sequence[Claimed], *, asked: int, now: float) -> None:
        """Take what a claim has brought, perhaps nothing, of as many as were asked for."""
        ...

    async def until_wanting(self, at_most: float) -> None:
        """Wait until it may want more, so many seconds at most."""
        ...

    def held(self) -> list[UUID]:
        """The executions whose claims came here and have not been flushed yet."""
        ...


class Intake:
    """See the module's description. Made by a pipeline; `run` is run once."""

    def __init__(
        self,
        taker: Taker,
        queue: str,
        queue_no: int,
        handlers: Handlers,
        lease: Lease,
        calls: Calls,
        reactor: Reactor,
        counts: WorkerCounts,
        outages: OutageLog,
        rng: random.Random,
    ) -> None:
        """`queue_no`: as `register_queue` gave it."""
        self.linger = Linger()
        self.deference = Deference()
        self.backing = Backing()
        self._taker = taker
        self._queue = queue
        self._queue_no = queue_no
        self._handlers = handlers
        self._lease = lease
        self._calls = calls
        self._reactor = reactor
        self._counts = counts
        self._outages = outages
        self._rng = rng
        self._link: Link | None = None  # while it runs
        self._claim_ended = trio.Event()  # the loop's latest
        self._claim_ended.set()
        self._claiming = trio.Lock()  # of whoever else claims, or looks for what we do not know of
        self._reconcile_at: list[float] = []
        self._keeps_up = False  # the latest claim saw the end of the queue, and what it and others brought can begin
        self._drained_at = -math.inf  # when one did
        self._helps_until = -math.inf  # a lookout has called for help, or somebody has notified
        self._locked_nap = _LOCKED / 4
        self._noted_notifications = 0
        self._is_backing = False  # the next claim comes after a nap behind the lookout, which nobody has ended
        self._is_rival = False  # others were notified as well, and the next claim tells who was first

    async def run(self, link: Link) -> None:
        """Claim until cancelled."""
        self._link = link
        try:
            await self._run(link)
        finally:
            self._link = None

    async def _run(self, link: Link) -> None:
        failures = 0
        while True:
            if not self._taker.wants_more():
                await self._reactor.lower()  # a saturated worker is not asleep
                await self._taker.until_wanting(self._longest_wait())
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
                is_in_vain = self._counts.claimed == before and self._reactor.is_watched
                if drained and is_in_vain and not self.linger.is_lingering:
                    await self._sleep(due_in)
                elif drained:
                    await self._doze(link, due_in)
                else:
                    await self._reactor.lower()  # there is more than we can take: others need not wake us
                    await self._call_for_help()
            except Unavailable as error:
                failures += 1
                self._note_lost_claim()
                await self._reactor.stand_down()
                self._outages.warn("queue %r cannot be claimed from: %s", self._queue, error)
                await trio.sleep(backoff(failures, self._rng))
            except LeaseLost:
                # Dead, or the server was restarted: the heartbeat finds out, and saves what can be saved.
                failures += 1
                await self._reactor.stand_down()
                self._lease.question()
                await self._lease.until_answered()
                await trio.sleep(backoff(failures, self._rng))

    async def until_answered(self) -> None:
        """Until the claim that is under way, if one is, has been answered."""
        await self._claim_ended.wait()

    # Claims

    async def _claim(self, link: Link) -> tuple[bool, float | None]:
        """Claim once. Returns whether the queue has no more for now, and when the next is due."""
        self._claim_ended = trio.Event()
        try:
            return await self._claim_once(link)
        finally:
            self._claim_ended.set()

    async def _claim_once(self, link: Link) -> tuple[bool, float | None]:
        limit, free = self._taker.wanted()
        is_empty = not self._taker.has_stock()
        self._reactor.clear()
        failpoint("claim.before")
        asked_at = trio.current_time()
        answer: Claim = await self._lease.attempt(
            link,
            lambda owner: self._calls.claim(
                self._queue, owner, self._handlers.names, limit, self._queue_no, self._handlers.versions
            ),
            timeout=_CLAIM_TIMEOUT,
            shield=True,
        )
        failpoint("claim.answered")
        claimed, due_in = answer
        now = trio.current_time()
        self._counts.note_claim(now - asked_at, asked=limit, got=len(claimed))
        notified = self._reactor.notifications - self._noted_notifications
        self._noted_notifications += notified
        self.linger.note_arrivals(now, max(len(claimed), notified))
        if notified:
            self._helps_until = now + _HELPS * self._rng.uniform(0.5, 1.0)
        if self._is_rival:
            self._is_rival = False
            self.deference.note_claim(len(claimed))
        if self._is_backing:
            self._is_backing = False
            self.backing.note_claim(max((item.waited for item in claimed), default=0.0))
        self._keeps_up = free > 0 and len(claimed) < (limit if is_empty else min(limit, free))
        if self._keeps_up:
            self._drained_at = now
        self._taker.take(claimed, asked=limit, now=now)
        if claimed:
            return len(claimed) < limit, None
        if due_in is not None and due_in <= _LOCKED:
            self._counts.locked_claims += 1
        return True, due_in

    async def claim_suspect(self) -> Claimed | None:
        """Claim one execution that is on its last life, whatever the pipeline wants. Raises `Unavailable`."""
        link = self._link
        if link is None:
            return None
        async with self._claiming:
            try:
                return await self._lease.attempt(
                    link,
                    lambda owner: self._calls.claim_suspect(
                        self._queue, owner, self._handlers.names, self._handlers.versions
                    ),
                    timeout=_CLAIM_TIMEOUT,
                    shield=True,
                )
            except Unavailable:
                self._note_lost_claim()
                raise

    # Lost replies

    def look_for_strays(self) -> None:
        """Have what the database thinks we hold, and we do not, given back soon."""
        self._note_lost_claim()
        self._reactor.wake()

    def forget_strays(self) -> None:
        """Somebody else has seen to them."""
        self._reconcile_at.clear()

    def _note_lost_claim(self) -> None:
        """The reply of a claim may be lost. The statement is over when its time limit is: look then once more."""
        now = trio.current_time()
        self._reconcile_at[:] = [now, now + 31.0]

    async def _reconcile(self, link: Link) -> None:
        """Give back what the database thinks we hold and we never heard of."""
        async with self._claiming:
            released = await self._lease.attempt(
                link, lambda owner: self._calls.release_unknown(owner, self._queue, self._taker.held())
            )
        if released:
            logger.info(
                "queue %r: %d executions of a claim whose reply was lost were given back", self._queue, released
            )

    # Sleep

    async def _doze(self, link: Link, due_in: float | None) -> None:
        """The queue had no more. Look on for a while if it is busy, else go to sleep by the reactor's protocol."""
        taker, reactor = self._taker, self._reactor
        if not reactor.can_be_woken:
            await reactor.sleep(self._until_due(due_in), at_most=taker.patience())
            return
        if self.linger.is_lingering:
            if not taker.has_free_runner:
                await reactor.lower()  # it looks for its stock only
            elif not await reactor.become_lookout():
                await self._back_up(due_in)
                return
            claim_seconds = self._counts.claim_seconds
            intervals = self.linger.intervals(lambda: claim_seconds[-1])
            while (interval := next(intervals, None)) is not None:
                await trio.sleep(interval)
                if not taker.wants_more():
                    return
                before = self._counts.claimed
                drained, due_in = await self._claim(link)
                if not drained:
                    return
                await self._call_for_help()
                if not await self._is_needed():
                    await self._back_up(due_in)
                    return
                if self._counts.claimed > before:
                    intervals = self.linger.intervals(lambda: claim_seconds[-1])
        nap = 0.002
        while taker.wants_more() and reactor.can_be_woken:
            is_quiet = await reactor.look()
            if not taker.wants_more():
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
            await reactor.sleep(due_in, at_most=nap)
            nap = min(2 * nap, 0.25)

    async def _sleep(self, due_in: float | None) -> None:
        """Sleep until there is something to do. What wakes all who sleep on the queue is left to the quickest."""
        notified = self._reactor.notifications
        await self._reactor.sleep(self._until_due(due_in), at_most=self._taker.patience())
        self._is_rival = self._reactor.notifications > notified
        if self._is_rival and self.deference.delay > 0:
            await trio.sleep(self.deference.delay * self._rng.uniform(0.5, 1.0))

    async def _back_up(self, due_in: float | None) -> None:
        """Sleep while another worker looks for us too. What it has locked, it has seen."""
        notified = self._reactor.notifications
        nap = self.backing.nap * self._rng.uniform(0.8, 1.0)
        due_in = None if due_in is not None and due_in <= _LOCKED else due_in
        await self._reactor.sleep(due_in, at_most=min(nap, self._taker.patience()))
        self._is_backing = self._reactor.notifications == notified

    def _until_due(self, due_in: float | None) -> float | None:
        """How long to sleep. Rows that somebody has locked ask us back in 10 ms; those that stay locked, by an open
        transaction of the user's, later and later.
        """
        if due_in is None or due_in > _LOCKED:
            self._locked_nap = _LOCKED / 4
            return due_in
        self._locked_nap = min(2 * self._locked_nap, 0.25)
        return max(due_in, self._locked_nap)

    # Lookouts

    async def _call_for_help(self) -> None:
        """A lookout that for a while has not seen the end of the queue, with a runner free, wakes who relies on it."""
        if self._reactor.is_lookout and trio.current_time() >= self._alone_until():
            await self._reactor.stand_down()

    async def _is_needed(self) -> bool:
        """Whether to go on looking: as the lookout, or beside one that has called for help lately. Of those beside it
        one after the other tries to be the lookout, and leaves if there is one.
        """
        if trio.current_time() < self._helps_until or not self._keeps_up:
            return True
        return await self._reactor.become_lookout()

    def _longest_wait(self) -> float:
        return max(0.0, self._alone_until() - trio.current_time()) if self._reactor.is_lookout else math.inf

    def _alone_until(self) -> float:
        return self._drained_at + max(_ALONE, _ALONE_FOR_CLAIMS * self._counts.claim_seconds[-1])
