"""What others ask of a running incarnation: cancel executions, stop, run those on their last life.

The database keeps what is asked until it has been done, and tells it whole at each reading: with every heartbeat, and
within milliseconds when it notifies the control channel of the incarnation's id. The notification says nothing but
"read"; anybody may send one. So nothing is lost with a connection or a reply; it is only later.

A handler that is told to end has `grace` seconds for its clean-up. Nobody can break a shield or stop a thread: one that
takes longer keeps its claim, so that no second body begins beside it, and is logged, once. Its outcome is "cancelled"
when it ends.

Cancellation: reading leaves what it did not hear of to the next reading.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable, Mapping, Set
from uuid import UUID

import trio

from ..db.calls import Calls
from ..db.link import Link, OutageLog
from ..errors import SchemaMissing, Unavailable
from ..model import Signals
from .errands import Errands
from .flusher import Held
from .lease import Lease, heartbeat_interval
from .suspects import Suspects
from .worker import Pipeline

logger = logging.getLogger("pgconductor.orchestrator")

_TIMEOUT = 5.0


class Control:
    """See the module's description. What a listener tells (`listener.Control`) arrives here."""

    def __init__(
        self,
        lease: Lease,
        link: Link,
        calls: Calls,
        outages: OutageLog,
        pipelines: Mapping[str, Pipeline],
        *,
        grace: float,
        stop: Callable[[], None],
        errands: Errands,
    ) -> None:
        """`pipelines`: by queue. `stop`: called when this program is to make way for a newer one."""
        self._lease = lease
        self._link = link
        self._calls = calls
        self._outages = outages
        self._pipelines = pipelines
        self._grace = grace
        self._stop = stop
        self._errands = errands
        self._woken = trio.Event()
        self._is_read_wanted = False
        self._overdue: list[tuple[float, int, Held]] = []  # who was told to end, by when it should have
        self._numbers = itertools.count()
        self._strays: Set[tuple[UUID, int]] = frozenset()
        self.suspects: Suspects | None = None

    # For the listener

    @property
    def owner(self) -> UUID:
        return self._lease.owner

    def on_session(self, *, is_held: bool) -> None:
        self._lease.note_session(is_safe=is_held)

    def on_attending(self) -> None:
        self._lease.question()  # a heartbeat reads the signals too

    def on_signal(self) -> None:
        self.look()

    def on_errand(self) -> None:
        self._errands.note()

    # Reading

    def look(self) -> None:
        """Have the signals read at once."""
        self._is_read_wanted = True
        self._woken.set()

    async def run(self) -> None:
        """Read when asked to, and see to handlers that take too long to end."""
        while True:
            with trio.CancelScope(deadline=self._overdue[0][0] if self._overdue else float("inf")):
                await self._woken.wait()
            self._woken = trio.Event()
            self._log_overdue()
            if self._is_read_wanted:
                self._is_read_wanted = False
                await self._read()

    async def _read(self) -> None:
        call = self._calls.signals(self._lease.owner, list(self._pipelines))
        try:
            with trio.move_on_after(min(_TIMEOUT, heartbeat_interval(self._lease.seconds))) as reading:
                self.apply(await self._link.attempt(call))
            if reading.cancelled_caught:
                self._link.drop()  # the heartbeat uses it too, and must not wait for a connection that is half open
        except (Unavailable, SchemaMissing) as error:
            self._outages.warn("the signals could not be read, the heartbeat will: %s", error)

    def apply(self, signals: Signals) -> None:
        """Do what is asked. Repeating it changes nothing."""
        if signals.stop_requested:
            self._stop()
        for pipeline in self._pipelines.values():
            for held in pipeline.cancel(signals.cancelled):
                heapq.heappush(self._overdue, (trio.current_time() + self._grace, next(self._numbers), held))
                self._woken.set()
        self._note_strays({(i, no) for i, (no, _) in signals.cancelled.items()})
        if self.suspects is not None:
            self.suspects.note(signals.suspects)
        if signals.has_errands:
            self._errands.note()
        for pipeline in self._pipelines.values():
            pipeline.nudge()

    def _note_strays(self, requested: Set[tuple[UUID, int]]) -> None:
        """A claim that is to be cancelled and is not here may be on its way. If it is named again, its reply was lost,
        and `release_unknown` could not have it either, because the request had it locked: nobody else would end it.
        """
        strays = {claim for claim in requested if not any(p.holds(*claim) for p in self._pipelines.values())}
        if strays & self._strays:
            for pipeline in self._pipelines.values():
                pipeline.intake.look_for_strays()
        self._strays = strays

    def _log_overdue(self) -> None:
        now = trio.current_time()
        while self._overdue and self._overdue[0][0] <= now:
            _, _, held = heapq.heappop(self._overdue)
            if held.is_running:
                logger.warning(
                    "execution %s of task %r was cancelled %g s ago and runs on; it keeps its claim until it ends",
                    held.claimed.id, held.claimed.task, self._grace,
                )  # fmt: skip
