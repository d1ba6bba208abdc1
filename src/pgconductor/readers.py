"""Reading durable channels from outside, on Trio and by blocking a thread.

A reader asks for what is behind its position, and takes note in the database of what it has got to: that is what makes
room for the sender. It is told of news by the notifications that tell of ended executions, and looks now and then in
any case. Between two items nothing is held: no connection, no flag; dropping a reader costs nothing.

Invariants: items come in order, each once per reader; a reader that is made anew begins where it is told to (`after`).
What was handed out counts as read when the next page is asked for, so a reader that dies leaves its last page unread.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final, Generic, Protocol, Self, TypeVar
from uuid import UUID

from .codec import Limits, ResultCodec, printable
from .errors import ResultNotKept
from .events import checked_event, payload_codec
from .model import Page
from .options import checked_int

T = TypeVar("T")

PAGE: Final = 100


class ChannelSource(Protocol):
    """Asks the database on Trio; `Conductor` implements it."""

    async def wait_page(self, execution_id: UUID, name: str, after: int, limit: int) -> Page:
        """Wait until there is something to tell: items, or the channel's end."""
        ...


class SyncChannelSource(Protocol):
    """The same by blocking the thread; the sync client implements it."""

    def wait_page(self, execution_id: UUID, name: str, after: int, limit: int) -> Page:
        """Wait until there is something to tell."""
        ...


class _Position(Generic[T]):
    """Where a reader is, and what it has in hand."""

    def __init__(self, execution_id: UUID, name: str, codec: ResultCodec[Any], after: int) -> None:
        self.execution_id = execution_id
        self.name = name
        self._codec = codec
        self.position = after
        self._items: deque[tuple[int, str]] = deque()
        self._is_over = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of channel {self.name!r} of execution {self.execution_id}, at {self.position}>"

    def _turn(self, page: Page) -> None:
        if page.state == "gone":
            raise ResultNotKept(
                f"channel {printable(self.name)!r}: there is no execution {self.execution_id}, or it was not kept"
            )
        self._items.extend(page.items)
        self._is_over = page.state == "closed" and len(page.items) < PAGE

    def _take(self) -> T:
        self.position, text = self._items.popleft()
        return self._codec.decode(text)  # type: ignore[no-any-return]  # of the type that was asked for


def is_news(page: Page) -> bool:
    """Whether a reader need wait no longer."""
    return bool(page.items) or page.state in ("closed", "gone")


class ChannelReader(_Position[T]):
    """``async for item in handle.channel(name)``: ends when the channel is closed or its execution has ended.

    `position`: the number of the last item, from 1; give it as `after` to go on later.
    """

    def __init__(
        self, source: ChannelSource, execution_id: UUID, name: str, codec: ResultCodec[Any], after: int
    ) -> None:
        super().__init__(execution_id, name, codec, after)
        self._source = source

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """Wait for the next item. Raises `ResultNotKept`, `NotOpen`, `Unavailable`, `InvalidPayload`."""
        while not self._items:
            if self._is_over:
                raise StopAsyncIteration
            self._turn(await self._source.wait_page(self.execution_id, self.name, self.position, PAGE))
        return self._take()


class SyncChannelReader(_Position[T]):
    """``for item in handle.channel(name)``: the same, blocking the thread."""

    def __init__(
        self, source: SyncChannelSource, execution_id: UUID, name: str, codec: ResultCodec[Any], after: int
    ) -> None:
        super().__init__(execution_id, name, codec, after)
        self._source = source

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        """Block until there is a next item; as `ChannelReader.__anext__`."""
        while not self._items:
            if self._is_over:
                raise StopIteration
            self._turn(self._source.wait_page(self.execution_id, self.name, self.position, PAGE))
        return self._take()


def open_reader(
    source: ChannelSource, execution_id: UUID, name: str, kind: Any, after: int, limits: Limits
) -> ChannelReader[Any]:
    """See `Handle.channel`. Raises `InvalidOption`, `InvalidTask`."""
    return ChannelReader(source, execution_id, *_checked(name, kind, after, limits))


def open_sync_reader(
    source: SyncChannelSource, execution_id: UUID, name: str, kind: Any, after: int, limits: Limits
) -> SyncChannelReader[Any]:
    """The same, blocking."""
    return SyncChannelReader(source, execution_id, *_checked(name, kind, after, limits))


def _checked(name: str, kind: Any, after: int, limits: Limits) -> tuple[str, ResultCodec[Any], int]:
    name = checked_event("the name of a channel", name)
    return name, payload_codec(kind, limits), checked_int("channel(after=)", after, minimum=0, maximum=2**63 - 1)
