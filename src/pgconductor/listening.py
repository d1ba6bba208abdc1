"""Waiting on Trio for news of one execution: looking when told to, and now and then in any case.

Notifications are those that `results` waits for: of buckets of ids, while somebody holds their flags. Each wait has a
connection of its own; between waits one rests, without LISTEN and without flags.

Cancellation: a wait that is cancelled closes its connection.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

import trio

from .db.calls import Calls
from .db.result_listener import ANYBODY, ResultListener, bucket_of
from .errors import Unavailable
from .polling import PollSchedule, Reconnecting

T = TypeVar("T")

_CONNECT_TIMEOUT = 3.0
_REST_TIMEOUT = 1.0

logger = logging.getLogger("pgconductor.results")


class _Ear:
    """What one wait listens with. `flagged_at`: since when senders see it; None: nobody listens."""

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket
        self.listener: ResultListener | None = None
        self.reconnecting = Reconnecting()
        self.flagged_at: float | None = None

    async def wait(self) -> None:
        """Until there may be news."""
        if self.listener is None:
            await trio.sleep_forever()
        else:
            while (named := await self.listener.receive()) is not None and self.bucket not in named:
                pass

    def lose(self, message: str, error: Unavailable) -> None:
        """Go on without the connection, and connect anew later."""
        logger.warning(message, error)
        self.drop()
        self.reconnecting.note_loss(trio.current_time())

    def drop(self) -> None:
        """Close the connection, if there is one."""
        if self.listener is not None:
            self.listener.drop()
        self.listener = self.flagged_at = None


class Listening:
    """Waits for one conductor while it is open."""

    def __init__(self, calls: Calls, conninfo: str, schedule: PollSchedule) -> None:
        self._calls = calls
        self._conninfo = conninfo
        self._schedule = schedule
        self._resting: ResultListener | None = None
        self._is_closed = False

    async def until(self, execution_id: UUID, look: Callable[[], Awaitable[T]], is_news: Callable[[T], bool]) -> T:
        """Return the first answer of `look` that is news. What `look` cannot reach now is looked for again."""
        ear = _Ear(bucket_of(execution_id))
        try:
            answer = await self._wait(ear, look, is_news)
        except BaseException:
            ear.drop()
            raise
        if ear.listener is not None:
            await self._rest(ear.listener)
        return answer

    async def _wait(self, ear: _Ear, look: Callable[[], Awaitable[T]], is_news: Callable[[T], bool]) -> T:
        while True:
            if ear.listener is None and trio.current_time() >= ear.reconnecting.at:
                await self._listen(ear)
            try:
                answer = await look()
            except Unavailable as error:
                logger.warning("cannot look for items of a channel, and try again: %s", error)
                next_look = self._schedule.deaf_until(trio.current_time())
            else:
                if is_news(answer):
                    return answer
                next_look = self._schedule.next_look(trio.current_time(), ear.flagged_at)
            try:
                with trio.CancelScope(deadline=next_look):
                    await ear.wait()
            except Unavailable as error:
                ear.lose("the connection that listens is lost; polling until it is back: %s", error)

    async def aclose(self) -> None:
        """Close the connection that rests."""
        self._is_closed = True
        if self._resting is not None:
            self._resting.drop()
            self._resting = None
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _listen(self, ear: _Ear) -> None:
        ear.listener, self._resting = self._resting, None
        try:
            with trio.move_on_after(_CONNECT_TIMEOUT) as scope:
                if ear.listener is not None and not await ear.listener.wake():
                    ear.drop()
                if ear.listener is None:
                    ear.listener = await ResultListener.open(self._calls, self._conninfo)
                await ear.listener.set_flags({ANYBODY, ear.bucket})
                ear.flagged_at = trio.current_time()
            if scope.cancelled_caught:
                raise Unavailable(f"no answer within {_CONNECT_TIMEOUT:g} s")
        except Unavailable as error:
            ear.lose("cannot listen for items of a channel, and poll until it is possible: %s", error)

    async def _rest(self, listener: ResultListener) -> None:
        is_resting = False
        try:
            with trio.move_on_after(_REST_TIMEOUT):
                await listener.rest()
                is_resting = True
        except Unavailable:
            pass  # the next wait connects anew
        finally:
            if is_resting and self._resting is None and not self._is_closed:
                self._resting = listener
            else:
                listener.drop()
