"""Has the database keep house: about once a minute, every orchestrator asks; the maintenance lock lets one do it.

On a connection of its own that is closed between the calls: one takes up to a second, and a heartbeat must not wait for
it. Nothing depends on a single call, so errors are logged and forgotten.

Cancellation: a call under way is cancelled at the server; the next one, of whichever process, takes it up.
"""

from __future__ import annotations

import logging

import trio

from ..db.link import open_link
from ..errors import PgconductorError
from .worker import Surroundings

logger = logging.getLogger("pgconductor.orchestrator")

_INTERVAL = 60.0
_PAUSE = 1.0  # while there is more to do: others need the database too
_TIMEOUT = 30.0


async def keep_house(shared: Surroundings, *, interval: float = _INTERVAL) -> None:
    """Ask until cancelled; `interval` in seconds, jittered, so that a fleet does not ask at once."""
    while True:
        await trio.sleep(interval * shared.rng.uniform(0.5, 1.0))
        async with open_link(shared.target, "maintain", shared.outages, shared.rng) as link:
            try:
                with trio.move_on_after(_TIMEOUT):
                    await link.attempt(shared.calls.publish_queues())
                    has_more = True
                    while has_more:
                        has_more = (await link.attempt(shared.calls.maintain())).more
                        await trio.sleep(_PAUSE if has_more else 0)
            except PgconductorError as error:
                logger.warning("maintenance failed, it is tried again in a minute: %s", error)
