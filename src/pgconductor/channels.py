"""Durable channels, the handler's side: append-only, bounded, kept in the database.

An item has a number, counted per channel by the handler; what was sent under a number in an earlier run is not sent
again. When the execution continues as new, it counts from the beginning, and the database goes on: readers see numbers
that grow. So a channel is for one task of the handler: what two branches send has no order that a replay could repeat.

Cancellation: a `send` that is cancelled has sent or not; a replay goes on behind what was.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import trio

from .codec import ResultCodec, printable
from .errors import DurableMisuse
from .events import MAX_EVENT_BYTES, payload_codec
from .options import checked_int, checked_text

if TYPE_CHECKING:
    from .durable import Durable

MAX_CAPACITY: Final = 10_000
_FIRST_PAUSE: Final = 0.01  # seconds until a full channel is tried again, doubled up to:
_LONGEST_PAUSE: Final = 0.5

_CAPACITY: ResultCodec[int] = ResultCodec("channel", int, kind_of_value="capacity of a")


class Channel:
    """What `Context.open_channel` gives. `name`: by which it is read.

    As a context manager it is closed when the block is left, unless the engine is interrupting the handler.
    """

    __slots__ = ("_count", "_durable", "_is_closed", "_is_sending", "_sent", "name")

    def __init__(self, durable: Durable, name: str, sent: int) -> None:
        """`sent`: how many items there are of earlier runs of this life."""
        self._durable = durable
        self.name = name
        self._sent = sent
        self._count = 0  # of this run
        self._is_closed = False
        self._is_sending = False

    def __repr__(self) -> str:
        return f"<Channel {self.name!r}, {self._count} sent in this run>"

    async def send(self, value: object) -> None:
        """Append any JSON value; at once if an earlier run did.

        Waits until it is durable, and while as many items as the channel's capacity have not been read; in the process,
        with its slot. Raises `InvalidPayload`; `DurableMisuse` if it is closed, or another task is sending.
        """
        what = f"channel {printable(self.name)!r}: send"
        text = payload_codec(Any, self._durable.limits).encode(value)
        with self._durable.operation(what):
            if self._is_closed:
                raise DurableMisuse(f"{what}: it is closed")
            if self._is_sending:
                raise DurableMisuse(f"{what}: another task is sending; a replay could not repeat the order")
            self._is_sending = True
            try:
                if self._count < self._sent:
                    await trio.lowlevel.checkpoint()
                else:
                    await self._append(self._count + 1, text)
                self._count += 1
            finally:
                self._is_sending = False

    async def _append(self, seq: int, text: str) -> None:
        pause = _FIRST_PAUSE
        while not await self._durable.append_item(self.name, seq, text):
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def aclose(self) -> None:
        """Say that nothing more comes. May be repeated. The end of the execution says it too."""
        with self._durable.operation(f"channel {printable(self.name)!r}: aclose"):
            self._is_closed = True
            await self._durable.close_channel(self.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if not self._durable.suspender.is_unwinding:
            await self.aclose()


async def open_channel(durable: Durable, name: str, capacity: int) -> Channel:
    """See `Context.open_channel`."""
    checked_text("the name of a channel", name, max_bytes=MAX_EVENT_BYTES)
    checked_int("open_channel(capacity=)", capacity, minimum=1, maximum=MAX_CAPACITY)
    await durable.record(name, "channel", lambda: capacity, _CAPACITY)
    with durable.operation(f"ctx.open_channel({name!r})"):
        return Channel(durable, name, await durable.open_channel(name, capacity))
