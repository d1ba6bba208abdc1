"""A LISTEN connection: of one queue, or shared by all queues of a process.

Runs nothing but LISTEN, the sleep flags of its queues, and a probe: a notification through a channel of its own,
which finds half-open sockets and lost registrations within seconds and measures the round trip. Always in autocommit,
so that it never holds up the notification queue. On loss: reconnect with full-jitter back-off, LISTEN, then tell the
queues to look once.

One listener of an incarnation also serves its control channel and that of errands (`attend`), and holds the session
lock by which others see that the process is there: taken first on every new connection, and tried again after each
probe until it is had, since the server may miss the former session later than we do.

`run` owns the connection and is the only task that touches it; others hand it statements (`ask`). Cancelling an asker
leaves its statement to be carried out. Cancelling `run` closes the connection, and the flags with it.
"""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar
from uuid import UUID

import trio

from ..db.call import Call
from ..db.calls import Calls
from ..db.link import Link, OutageLog, Target, backoff
from ..errors import SchemaMissing, Unavailable

T = TypeVar("T")

_TIMEOUT = 5.0
PROBE_INTERVAL = 5.0


class Subscriber(Protocol):
    """What a listener tells its queues."""

    async def on_listening(self) -> None: ...
    def on_notify(self) -> None: ...
    def on_lost(self) -> None: ...


class Control(Protocol):
    """What a listener tells the incarnation whose control channel it serves."""

    @property
    def owner(self) -> UUID: ...
    def on_session(self, *, is_held: bool) -> None:
        """The server has answered for the session lock, or the session may be gone, and the lock with it."""

    def on_attending(self) -> None:
        """The control channel is listened to. What was announced before is not known."""

    def on_signal(self) -> None: ...
    def on_errand(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ListenerStatistics:
    """`probe_rtt`: seconds of the last probe's round trip, None before the first."""

    is_listening: bool
    reconnects: int
    probes: int
    probe_rtt: float | None


class _Request(Generic[T]):
    def __init__(self, call: Call[T], note: Callable[[T], None]) -> None:
        self.call = call
        self.note = note
        self.answer: T | None = None
        self.is_done = trio.Event()


class Listener:
    """See the module's description."""

    def __init__(
        self,
        target: Target,
        calls: Calls,
        outages: OutageLog,
        rng: random.Random,
        *,
        probe_interval: float = PROBE_INTERVAL,
    ) -> None:
        self._link = Link(target, "listen", outages, rng, listens=True)
        self._calls = calls
        self._outages = outages
        self._rng = rng
        self._probe_interval = probe_interval
        self._probe_channel = f"pgconductor_p_{secrets.token_hex(8)}"
        self._subscribers: dict[str, Subscriber] = {}
        self._channels: dict[str, Subscriber] = {}
        self._control: Control | None = None
        self._control_channel: str | None = None
        self._errands_channel: str | None = None
        self._wants_control = False  # its owner has changed, or the session lock was not to be had
        self._has_session = False
        self._is_up = False
        self._idle: trio.CancelScope | None = None  # `run` is waiting for notifications inside
        self._requests: deque[_Request[Any]] = deque()
        self._reconnects = self._probes = 0
        self._probe_rtt: float | None = None

    def add(self, queue: str, subscriber: Subscriber) -> None:
        """Serve one more queue; before `run` only."""
        self._subscribers[queue] = subscriber

    def attend(self, control: Control) -> None:
        """Serve a control channel, and hold its owner's session lock; before `run` only."""
        self._control = control

    def renew_control(self) -> None:
        """The control's owner has changed."""
        self._wants_control = True
        if self._idle is not None:
            self._idle.cancel()

    @property
    def is_listening(self) -> bool:
        return self._is_up

    def statistics(self) -> ListenerStatistics:
        return ListenerStatistics(self._is_up, self._reconnects, self._probes, self._probe_rtt)

    def __repr__(self) -> str:
        return f"<Listener of {', '.join(map(repr, self._subscribers))}, {'' if self._is_up else 'not '}listening>"

    async def ask(self, call: Call[T], note: Callable[[T], None]) -> T | None:
        """Have a statement carried out on the connection. Waits for the answer; None also if the connection is not
        there.

        `note` is told the server's answer even if the asker is gone by then; it is not told of a lost connection.
        """
        if not self._is_up:
            await trio.lowlevel.checkpoint()
            return None
        request = _Request(call, note)
        self._requests.append(request)
        if self._idle is not None:
            self._idle.cancel()
        await request.is_done.wait()
        return request.answer

    async def execute(self, call: Call[T]) -> T:
        """Execute on the connection, in the task of `run` only."""
        with trio.move_on_after(_TIMEOUT):
            return await self._link.attempt(call)
        raise Unavailable(f"listen: no reply within {_TIMEOUT} s")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; `started` once the first attempt to listen has been made."""
        failures = 0
        while True:
            try:
                await self._listen()
                failures = 0
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await self._serve()
            except (Unavailable, SchemaMissing) as error:
                failures += 1
                self._outages.warn("%r lost its connection, the sweep has to do: %s", self, error)
            finally:
                self._lose()
            self._reconnects += 1
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            await trio.sleep(backoff(failures, self._rng))

    def _lose(self) -> None:
        self._link.drop()
        was_up, self._is_up = self._is_up, False
        self._control_channel = None
        if self._has_session and self._control is not None:
            self._has_session = False
            self._control.on_session(is_held=False)
        while self._requests:
            self._requests.popleft().is_done.set()
        if was_up:
            for subscriber in self._subscribers.values():
                subscriber.on_lost()

    async def _listen(self) -> None:
        if self._control is not None:
            await self._attend(self._control)
        for queue, subscriber in self._subscribers.items():
            self._channels[await self.execute(self._calls.channel(queue))] = subscriber
        await self._listen_to(*self._channels, self._probe_channel)
        # Up first: whoever is woken now, while the next flag is being raised, must see that it can be woken again.
        self._is_up = True
        for subscriber in self._subscribers.values():
            await subscriber.on_listening()

    async def _attend(self, control: Control) -> None:
        self._wants_control = False
        owner = control.owner
        channel = await self.execute(self._calls.control_channel(owner))
        errands = await self.execute(self._calls.errands_channel())
        # From here on the lock may be ours, and go with the session, before we hear of it.
        self._has_session = True
        holds = await self.execute(self._calls.hold_session(owner))
        self._has_session = bool(holds)
        control.on_session(is_held=self._has_session)
        await self._listen_to(channel, errands)
        self._control_channel, self._errands_channel = channel, errands
        control.on_attending()

    async def _listen_to(self, *channels: str) -> None:
        with trio.move_on_after(_TIMEOUT) as listening:
            await self._link.listen(channels)
        if listening.cancelled_caught:
            raise Unavailable(f"listen: no reply within {_TIMEOUT} s")

    async def _serve(self) -> None:
        probe_at = trio.current_time() + self._probe_interval * self._rng.uniform(0.5, 1.0)
        while True:
            if self._requests:
                request = self._requests.popleft()
                try:
                    request.answer = await self.execute(request.call)
                    request.note(request.answer)
                finally:
                    request.is_done.set()
            elif self._control is not None and self._wants_control:
                await self._attend(self._control)
            elif trio.current_time() >= probe_at:
                await self._probe()
                self._wants_control = self._wants_control or not self._has_session
                probe_at = trio.current_time() + self._probe_interval
            else:
                channels: set[str] = set()
                with trio.CancelScope(deadline=probe_at) as self._idle:
                    channels = await self._link.receive()
                self._idle = None
                self._tell(channels)

    def _tell(self, channels: set[str]) -> None:
        # Wake-ups coalesce: however many came, each queue is told once.
        for channel in channels:
            if (subscriber := self._channels.get(channel)) is not None:
                subscriber.on_notify()
            elif channel == self._control_channel and self._control is not None:
                self._control.on_signal()
            elif channel == self._errands_channel and self._control is not None:
                self._control.on_errand()

    async def _probe(self) -> None:
        begun = trio.current_time()
        with trio.move_on_after(_TIMEOUT) as probing:
            await self._link.attempt(self._calls.probe(self._probe_channel))
            while True:
                channels = await self._link.receive()
                self._tell(channels)
                if self._probe_channel in channels:
                    break
        if probing.cancelled_caught:
            raise Unavailable(f"listen: the probe did not come back within {_TIMEOUT} s")
        self._probes += 1
        self._probe_rtt = trio.current_time() - begun
