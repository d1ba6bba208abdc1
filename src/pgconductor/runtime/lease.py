"""What an incarnation may believe about itself: its id, until when it may be relied on, and who is using it right now.

Trust
-----
An orchestrator renews its lease in the database, and relies on it for less than its length, counted from when the last
renewal was *sent*: it has stopped before anybody may take over. Time is the boot clock, which goes on while the machine
is suspended, unlike the clock that Trio waits by. So nobody relies on a timer alone: the clock is read with every
heartbeat, again between two of them, before every claim and flush, and before a handler starts. Whoever finds the lease
over ends it for all.

Others may take over at the lease's end, or sooner, at half of it, if our session lock is gone (`hold_session`). So from
the moment at which that session may be gone, until a new one holds the lock, the lease is relied on for less than half.

What the clock cannot see the database refuses: a process that was frozen between reading the clock and sending has its
claims and flushes fenced there.

Succession
----------
After a restart of the server, or a promotion, the database refuses the old id (asynchronously
committed claims may be lost, and come back under the same numbers), but the lease still stands, and so does the work.
Then the incarnation takes a new id, and the claims that survived are handed over to it in one transaction. What
carries an id (claim, flush, load a payload) goes through `attempt`, which a succession closes: from then on no answer
to a call under the old id is still to come. Every interleaving of a call with the hand-over H (by its place in the
database):

- answered before H: its effects are known, and H hands over what we then hold.
- sent before H, the reply lost (the usual case: the server was restarted), carried out before H. A claim: rows of
  which we know nothing; H gives them back, free of charge. A flush: its rows are no longer running, H does not hand
  them over; their outcomes are sent once more under the *old* id, which answers "already", and so are counted right.
- the same, but never carried out. A claim: nothing happened. A flush: H hands the rows over, and their outcomes
  are sent under the new id.
- sent before H, carried out after it, because it was held up and we gave up waiting (`_PATIENCE`). A claim:
  refused, the old id is dead. A flush: its token fits nothing, nothing is written; it has been or will be sent under
  the new id. A payload: not found; asked for again under the new id.
- H's own reply lost. Had it been carried out, we are known by the new id: the next try hands over from that one first,
  then from the old one, each to yet another id. Whichever is refused does nothing.
- a handler ends between the list of claims and H's reply: its outcome waits, and is sorted by the reply like others;
  so what a flush consists of is settled when it is sent (`until_open`), not before it has waited for H.
- a claim that is not handed over is no longer ours: its handler is interrupted, nothing is charged or written. It may
  be running elsewhere by then: as with every lost lease, the fence in the database decides who is heard.
- the lease ends before H is answered: all of it is cancelled; others recover the claims.

If H is refused the incarnation is dead, and everything in it is cancelled, as at the end of a lease.

Cancellation: `attempt` leaves what it sent to the connection (`db.connection`); `succeed` reopens on its way out.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar
from uuid import UUID, uuid4

import trio

from ..db.call import Call
from ..errors import LeaseLost, Unavailable

T = TypeVar("T")

Clock = Callable[[], float]

_PATIENCE = 1.0  # seconds that a succession waits for the replies to calls in flight

if hasattr(time, "CLOCK_BOOTTIME"):

    def boot_clock() -> float:
        """Seconds since the machine started, suspended or not."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:
    boot_clock = time.monotonic


def trusted(lease: float) -> float:
    """Seconds after sending a renewal that it may be relied on: we stop before others take over."""
    return lease - min(1.5, 0.2 * lease)


def trusted_without_session(lease: float) -> float:
    """The same while our session lock may be gone: others may then take over at half the lease."""
    return lease / 2 - min(1.0, 0.1 * lease)


def heartbeat_interval(lease: float) -> float:
    return min(lease / 4, 15.0)


class Sender(Protocol):
    """Sends calls: a `Link`, or the connection of a transaction."""

    async def attempt(self, call: Call[T], /) -> T:
        """Execute once. Raises `Unavailable` if there is no reply."""
        ...

    def drop(self) -> None:
        """Close at once."""
        ...


class Lease:
    """See the module's description. Everything that an incarnation does happens inside `scope`."""

    def __init__(self, owner: UUID, seconds: float, sent_at: float, clock: Clock = boot_clock) -> None:
        """`sent_at`: when registration was sent, by `clock`."""
        self.owner = owner
        self.seconds = seconds
        self.scope = trio.CancelScope()
        self.clock = clock
        self.lost_because: str | None = None
        self.doubt = trio.Event()
        self._sent_at = sent_at
        self._is_session_safe = True
        self._ends_at = sent_at + trusted(seconds)
        self._inside: dict[trio.CancelScope, Sender] = {}
        self._is_empty = trio.Event()
        self._reopened: trio.Event | None = None
        self._answered = trio.Event()
        # More than the half, so that a heartbeat takes every second look (benchmarks/latency.py: CPU while idle).
        self._longest_rest = 0.6 * heartbeat_interval(seconds)
        self._resting: trio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<Lease of {self.label}, {'lost' if self.is_lost else f'{self._ends_at - self.clock():.1f} s left'}>"

    @property
    def label(self) -> str:
        """What logs may tell of the id: whoever knows all of it can write in its name."""
        return str(self.owner)[:8]

    # Trust

    @property
    def is_lost(self) -> bool:
        return self.lost_because is not None

    def is_held(self) -> bool:
        """Look at the clock; a lease that is over is ended by this, for everybody."""
        if self.clock() < self._ends_at:
            return self.lost_because is None
        self.lose("it could not be renewed in time")
        return False

    def lose(self, why: str) -> None:
        """End it: what the incarnation held is no longer its own."""
        if self.lost_because is None:
            self.lost_because = why
            self.scope.cancel()
            self._answered.set()  # whoever waits under a shield finds out now
            self._cut_off()  # also what is shielded: nothing that is sent now would count

    def renewed(self, sent_at: float) -> None:
        """A renewal that was sent then has been confirmed. A late reply says nothing about the time since."""
        self._sent_at = sent_at
        self._settle()

    def note_session(self, *, is_safe: bool) -> None:
        """Whether our session lock is held, as far as anybody can know. If not, a renewal is wanted at once."""
        if self._is_session_safe != is_safe:
            self._is_session_safe = is_safe
            self._settle()
        if not is_safe:
            self.question()

    def _settle(self) -> None:
        window = trusted if self._is_session_safe else trusted_without_session
        self._ends_at = self._sent_at + window(self.seconds)
        if self._resting is not None:
            self._resting.deadline = self._next_look()

    async def watch(self) -> None:
        """Look at the clock when the lease would end, and once between two heartbeats."""
        while self.is_held():
            with trio.CancelScope(deadline=self._next_look()) as self._resting:
                await trio.sleep_forever()

    def _next_look(self) -> float:
        return trio.current_time() + min(self._longest_rest, self._ends_at - self.clock())

    # Doubt: the database refused the id

    def question(self) -> None:
        """Have the heartbeat ask the database at once."""
        if self.is_lost:
            return
        if self._answered.is_set():
            self._answered = trio.Event()
        self.doubt.set()

    def answer(self) -> None:
        """The database has been asked."""
        self._answered.set()

    async def until_answered(self) -> None:
        """Until a doubt is cleared. If it was justified and nothing could be saved, this is cancelled."""
        await self._answered.wait()

    # Calls that carry the id

    async def until_open(self) -> None:
        """Until no succession is under way. A call that is begun before the next checkpoint is not overtaken by one."""
        while self._reopened is not None:
            await self._reopened.wait()

    async def attempt(
        self, link: Sender, make: Callable[[UUID], Call[T]], *, timeout: float = float("inf"), shield: bool = False
    ) -> T:
        """Execute once under the id of the moment. Waits while that is being replaced.

        `timeout`: seconds from sending on. `shield`: a cancelled caller waits for the reply, so bound it. Raises
        `Unavailable` if there is no reply, `LeaseLost` without sending anything if the lease is over.
        """
        await self.until_open()
        if not self.is_held():
            raise LeaseLost("the lease is over")
        scope = trio.CancelScope(deadline=trio.current_time() + timeout, shield=shield)
        self._inside[scope] = link
        try:
            with scope:
                return await link.attempt(make(self.owner))
        finally:
            del self._inside[scope]
            if not self._inside:
                self._is_empty.set()
        raise Unavailable(f"no reply within {timeout:g} s, or given up")

    def _cut_off(self) -> None:
        for scope, link in self._inside.items():
            scope.cancel()
            link.drop()  # no polite end, which may take seconds when the network is gone

    @asynccontextmanager
    async def _closed(self) -> AsyncIterator[None]:
        """No call that carries the id is in flight inside the block."""
        self._reopened = reopened = trio.Event()
        try:
            if self._inside:
                self._is_empty = trio.Event()
                with trio.move_on_after(_PATIENCE):
                    await self._is_empty.wait()
                self._cut_off()
                while self._inside:
                    self._is_empty = trio.Event()
                    await self._is_empty.wait()
            yield
        finally:
            self._reopened = None
            reopened.set()

    async def succeed(
        self,
        link: Sender,
        make: Callable[[UUID, UUID, Iterable[tuple[UUID, int]]], Call[frozenset[UUID]]],
        claims: Callable[[], list[tuple[UUID, int]]],
        replaced: Callable[[UUID, frozenset[UUID]], None],
        *,
        pause: Callable[[int], float],
    ) -> bool:
        """Take a new id and the claims along; see the module's description. False: refused, the incarnation is dead.

        `make` makes the call (old id, new id, claims), `claims` lists what is held, and `replaced` is told the old id
        and what was handed over, before anything goes on. Tried until the database answers, for as long as the lease
        lasts; `pause` gives the seconds before another try.
        """
        async with self._closed():
            former = self.owner
            known_as = [former]  # ids under which the database may know us, the likeliest first
            failures = 0
            while True:
                heir, sent_at = uuid4(), self.clock()
                try:
                    for known in known_as:
                        try:
                            handed_over = await link.attempt(make(known, heir, claims()))
                        except LeaseLost:
                            continue
                        self.owner = heir
                        self.renewed(sent_at)
                        replaced(former, handed_over)
                        return True
                    return False
                except Unavailable:
                    failures += 1
                    known_as.insert(0, heir)
                    await trio.sleep(pause(failures))
