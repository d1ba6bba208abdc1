"""What is to be done in the database by anybody: cancelling children whose parents have ended, delivering events.

Whoever finds out holds locks of its own and leaves a note in a table, in the same transaction. Here the notes are dealt
with: at once when a pipeline knows of one or a notification comes, else when a heartbeat tells that there are some,
whoever left them. Each call takes what no other has; a process that dies in the middle leaves it to the next.
"""

from __future__ import annotations

import random
from typing import Final

import trio

from ..db.calls import Calls
from ..db.link import Link, OutageLog, Target, backoff, open_link
from ..errors import SchemaMissing, Unavailable
from ..failpoints import failpoint

_PAUSE: Final = 0.1  # seconds until an execution that somebody has locked is tried again


class Errands:
    """Made by an incarnation."""

    def __init__(self, target: Target, calls: Calls, outages: OutageLog, rng: random.Random) -> None:
        self._target = target
        self._calls = calls
        self._outages = outages
        self._rng = rng
        self._wanted = trio.Event()

    def note(self) -> None:
        """There is something to do."""
        self._wanted.set()

    async def run(self) -> None:
        """Do what there is, when told of it. Cancelling it leaves the rest to others."""
        failures = 0
        async with open_link(self._target, "errands", self._outages, self._rng) as link:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                try:
                    is_left = await self._do(link)
                    failures = 0
                except (Unavailable, SchemaMissing) as error:
                    failures += 1
                    self._outages.warn("%s; trying again", error)
                    await trio.sleep(backoff(failures, self._rng))
                    self._wanted.set()
                else:
                    if is_left:
                        await trio.sleep(_PAUSE)
                        self._wanted.set()

    async def _do(self, link: Link) -> bool:
        """Whether something had to be left for later."""
        while await link.attempt(self._calls.close_children()):
            pass
        after: int | None = 0
        is_left = False
        while after is not None:
            failpoint("deliver.before")
            delivery = await link.attempt(self._calls.deliver_events(after))
            failpoint("deliver.answered")
            after, is_left = delivery.upto, is_left or delivery.is_left
        return is_left
