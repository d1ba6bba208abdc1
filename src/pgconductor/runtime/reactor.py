"""Wake-ups of one queue: interrupts when idle, polling when busy.

Network drivers found that an interrupt per packet drowns a busy machine, and polling wastes an idle one. NOTIFY is our
interrupt: each takes a database-wide lock until its commit is durable. So only a worker that is about to sleep asks
for one.

The protocol
------------
Two advisory locks per queue. K: "a change that makes work is in flight". M: "somebody is asleep".

    whoever makes work on the queue                       a worker with free capacity and an empty claim
    (trigger and functions, sql/functions/02_wake.sql)    (this module, on its LISTEN connection)
    1. take K shared, until the transaction ends          1. take M shared
    2. look at M: is it free?                             2. look at K: is it free?
    3. NOTIFY unless K was had and M is free              3. K free: claim in a new statement; empty: sleep
    4. commit                                                K taken: claim, nap 2, 4 ... 250 ms, look again

Every transaction that locks claimable rows (claim, promote) or makes rows claimable (insert, retry, release, recover)
is in the left column.

Why no wake-up is lost. Each side first raises its own flag, then looks at the other's (Dekker, 1965). Take a change C
and a worker that goes to sleep, and order C's step 1 against the worker's last step 2.
- C took K before: it holds K until its transaction has ended. The worker saw K free, so C had ended by then; a
  transaction's rows are visible before its locks are released, and the worker's claim in step 3 has a newer snapshot:
  it sees C's work, or C rolled back and there is none.
- C took K after, or could not have it because the worker was looking at that very moment: then C's step 2 comes
  after the worker's step 1, M is taken, and C sends a NOTIFY (in the second case because K was not had). It is
  delivered when C commits, after the worker had already been listening; the worker's flag `_is_pending` keeps it if
  it comes before the sleep.

A row that a claim in flight hides from the worker (SKIP LOCKED) needs more than K: the claim may begin after the
worker's look, hide the row from its last claim, and die without a word. So an empty claim reads once more without
locking, which sees the row as it was, and then tells the worker to come again in 10 ms instead of sleeping.

While the flag stays up, the last look holds: every change since then began after M was taken, and notifies. So a
worker that was woken, and whose claim brought nothing at all, sleeps on without another look (`is_watched`): of ten
that one insert wakes, nine claim once and no more. (A claim that brought less than it might does not tell of rows that
others have locked, nor when the next one is due.)

Lookouts
--------
Of several workers that have run out of work on a busy queue, one keeps looking every few milliseconds, with its flag
down: the lookout, who holds a third lock, L. The others sleep with their flags down too, for a quarter of a second,
as long as somebody else holds L: neither they nor their flags make inserts dearer (benchmarks/unsaturated.py). Each
of those naps ends with a claim, so a lookout that hangs costs a quarter of a second, and less the next time
(`pace.Backing`). A lookout that has more than it can take, or stops, notifies the channel, which wakes all. Those who
are needed then look beside it; a second after the latest call, one after the other becomes the lookout, or leaves if
there is one (`intake.py`). One that finds nothing any more raises M before it lets go of L; whoever looks then, and
finds L free, goes to sleep by the protocol above. L goes with its session, like the others.

What may fail only costs time. A look takes the lock and lets go in one expression, so no cancellation falls between;
two that look at once make one another see a flag that is not raised: one NOTIFY too many, or one nap of 2 ms. Locks
vanish with their session, or K with its savepoint, so a killed worker leaves no flag up, and rolled-back work none
either. Locks are not under MVCC, so the isolation level does not matter. Nothing is written, so nothing bloats.

What the protocol does not cover, the sweep does: logical replication's apply fires no trigger; PREPARE TRANSACTION
refuses a transaction that notified (feed such queues with `notify="off"`). The sweep is the truth: everything is
correct with no notification at all, at most one sweep interval late.

Modes: `adaptive` is the above. `always`: M stays raised, so that every insert notifies. `off`: no connection, no flag.

The LISTEN connection (`listener.py`) runs nothing but LISTEN, these flags and a probe. Only one task may use `look`,
`lower` and `sleep`. Cancelling any of them loses no wake-up.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import trio

from ..db.calls import Calls
from ..tasks import NotifyMode
from .listener import Listener, ListenerStatistics


@dataclass(frozen=True, slots=True)
class ReactorStatistics:
    """What happened to one queue's wake-ups. `listener` is None in the mode `off`."""

    is_flag_raised: bool
    is_lookout: bool
    notifications: int
    listener: ListenerStatistics | None


class Reactor:
    """See the module's description. Made by an orchestrator for one queue; `listener` is None in the mode `off`."""

    def __init__(
        self,
        calls: Calls,
        queue: str,
        mode: NotifyMode,
        sweep_interval: float,
        listener: Listener | None,
        rng: random.Random,
        *,
        wakes_on_notify: Callable[[], bool] = lambda: True,
    ) -> None:
        """`wakes_on_notify` is asked at each notification; tests make it drop them."""
        self._calls = calls
        self._queue = queue
        self.mode = mode
        self._sweep_interval = sweep_interval
        self._listener = listener
        self._rng = rng
        self._wakes_on_notify = wakes_on_notify
        self._is_raised = False
        self._is_watched = False  # up without a break since a look that saw nothing in flight
        self._is_lookout = False
        self._is_pending = False
        self._sleeper: trio.Event | None = None
        self.notifications = 0
        if listener is not None:
            listener.add(queue, self)

    def statistics(self) -> ReactorStatistics:
        listener = None if self._listener is None else self._listener.statistics()
        return ReactorStatistics(self._is_raised, self._is_lookout, self.notifications, listener)

    def __repr__(self) -> str:
        return f"<Reactor of queue {self._queue!r}, {self.mode}{', flag raised' if self._is_raised else ''}>"

    @property
    def can_be_woken(self) -> bool:
        """Whether a notification would reach us now; if not, the sweep has to do."""
        return self._listener is not None and self._listener.is_listening

    @property
    def is_watched(self) -> bool:
        """Whether after a claim that brought nothing the worker may sleep without another look: whatever has been
        changed since the last one has notified us, or will.
        """
        return self._is_watched

    # For the worker's claiming task

    def wake(self) -> None:
        """End the current or the next sleep. Any number of wake-ups before it are one."""
        self._is_pending = True
        if self._sleeper is not None:
            self._sleeper.set()

    def clear(self) -> None:
        """Forget wake-ups until now: to be called right before a claim, which will see what they announced."""
        self._is_pending = False

    @property
    def is_lookout(self) -> bool:
        """Whether others sleep with their flags down because we look."""
        return self._is_lookout

    async def look(self) -> bool | None:
        """Raise the sleep flag if it is down, unless another worker is the lookout; is no change in flight?

        True: after one more claim, in a new statement, the worker may sleep. False: a change may commit any moment,
        or the connection was lost (which has woken us), or the flag could not be raised because an inserter was
        looking at it. None: there is a lookout, and the flag is down.
        """
        if self._listener is None:
            await trio.lowlevel.checkpoint()
            return False
        if self.mode == "always":
            raising = self._calls.raise_sleep_flag(self._queue, raise_it=not self._is_raised)
            was_quiet = await self._listener.ask(raising, self._note_raised)
            is_quiet = was_quiet is True
        else:
            call = self._calls.look_before_sleep(self._queue, is_up=self._is_raised, is_lookout=self._is_lookout)
            answer = await self._listener.ask(call, self._note_look)
            if answer == "watched":
                return None
            is_quiet = answer == "quiet"
        self._is_watched = is_quiet and self._is_raised  # which a loss of the connection may have ended meanwhile
        return is_quiet

    async def become_lookout(self) -> bool:
        """Lower the flag, and look for others too, unless another worker does: then False.

        True without being the lookout where there is none: in the mode `always`, without a connection, or because
        others were looking for one at this instant.
        """
        if self._listener is None or self.mode == "always" or self._is_lookout:
            await trio.lowlevel.checkpoint()
            return True
        self._is_watched = False
        call = self._calls.become_lookout(self._queue, is_up=self._is_raised)
        # Cancelled, it would still be carried out, and nobody would stand down. It is answered in 5 s, or given up.
        answer: bool | None = None
        with trio.CancelScope(shield=True):
            answer = await self._listener.ask(call, self._note_lookout)
        return answer is not False

    async def stand_down(self) -> None:
        """Wake the others, who sleep because we look, if we are the lookout."""
        if self._is_lookout and self._listener is not None:
            await self._listener.ask(self._calls.stand_down(self._queue), self._note_stood_down)

    async def lower(self) -> None:
        """Lower the sleep flag, if it is up and the mode lets it down."""
        if self._is_raised and self.mode == "adaptive" and self._listener is not None:
            self._is_watched = False
            await self._listener.ask(self._calls.lower_sleep_flag(self._queue), self._note_lowered)

    async def sleep(self, due_in: float | None, *, at_most: float = math.inf) -> None:
        """Sleep until a wake-up, until the next execution is due, until the sweep, or for `at_most` seconds."""
        if self._is_pending:
            await trio.lowlevel.checkpoint()
            return
        sweep = self._sweep_interval * self._rng.uniform(0.8, 1.0)
        self._sleeper = trio.Event()
        try:
            with trio.move_on_after(min(sweep, at_most, math.inf if due_in is None else due_in)):
                await self._sleeper.wait()
        finally:
            self._sleeper = None

    # The flag follows what the connection did, whoever still waits for the answer then.

    def _note_raised(self, answer: bool | None) -> None:
        self._is_raised = self._is_raised or answer is not None

    def _note_lowered(self, answer: bool | None) -> None:
        self._is_raised = self._is_watched = False

    def _note_look(self, answer: str) -> None:
        if answer != "refused":
            self._is_raised = answer != "watched"
            self._is_lookout = False

    def _note_lookout(self, answer: bool | None) -> None:
        self._is_raised = self._is_watched = False
        self._is_lookout = answer is True

    def _note_stood_down(self, answer: bool | None) -> None:
        self._is_lookout = False

    # For the listener

    async def on_listening(self) -> None:
        """The channel is listened to. What was announced before is not known: look once."""
        while self.mode == "always" and not self._is_raised:  # refused only while an inserter is looking
            assert self._listener is not None
            self._note_raised(await self._listener.execute(self._calls.raise_sleep_flag(self._queue, raise_it=True)))
        self.wake()

    def on_notify(self) -> None:
        """Somebody made work, or says so: the payload is never looked at, since any role may notify any channel."""
        if self._wakes_on_notify():
            self.notifications += 1
            self.wake()

    def on_lost(self) -> None:
        """The connection is gone, and the flag with it."""
        self._is_raised = self._is_watched = self._is_lookout = False
        self.wake()
