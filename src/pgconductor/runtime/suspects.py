"""Executions on their last life: each runs while nothing else begins in its process.

Two processes died while they held it. The third death fails it for good (`recover`), so that must not be charged to an
innocent that happened to be there. Nobody can tell which of the executions of a dead process brought it down; but if
this one began alone, with all that was claimed and had not begun given back first, then whoever dies with it next is
this one, or one of those that had been running for long beside it, or nobody.

So for one of them: starts are held in all pipelines of the process, it is claimed, the stock goes back (what is in
stock would be charged with the crash too), and it begins. The others go on when it has ended and its outcome is
written, or after `_ALONE` seconds: one that lives so long does not kill its process at sight. Before the next the
others get as much time as it took, so that many suspects do not stop a queue. What runs already goes on. One at a
time per process.

Cancellation: the others may begin again; the suspect goes back if it has not begun.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import trio

from ..db.link import OutageLog
from ..errors import LeaseLost, Unavailable
from .worker import Pipeline, Starts

_ALONE = 10.0  # seconds after which others may begin beside it


class Suspects:
    """See the module's description. Made by an incarnation."""

    def __init__(
        self,
        starts: Starts,
        pipelines: Mapping[str, Pipeline],
        outages: OutageLog,
        rng: random.Random,
        look_again: Callable[[], None],
    ) -> None:
        """`pipelines`: by queue. `look_again`: have the signals read soon."""
        self._starts = starts
        self._pipelines = pipelines
        self._outages = outages
        self._rng = rng
        self._look_again = look_again
        self._wanted = trio.Event()
        self._queues: Sequence[str] = ()

    def note(self, queues: Sequence[str]) -> None:
        """These queues have suspects."""
        if queues:
            self._queues = queues
            self._wanted.set()

    async def run(self) -> None:
        """Run suspects, one at a time, as they are made known."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            queues = [queue for queue in self._queues if self._pipelines[queue].has_free_runner]
            if not queues:
                continue  # nothing could begin anyway; the next heartbeat tells again
            try:
                begun_at = trio.current_time()
                if await self._run_one(self._pipelines[self._rng.choice(queues)]):
                    await trio.sleep(trio.current_time() - begun_at)
                    self._look_again()
            except (Unavailable, LeaseLost) as error:
                self._outages.warn("an execution on its last life could not be claimed: %s", error)

    async def _run_one(self, pipeline: Pipeline) -> bool:
        """Whether there was one."""
        self._starts.is_held = True
        held = None
        try:
            held = await pipeline.claim_suspect()
            if held is None:
                return False
            assert held.suspected is not None
            with trio.move_on_after(_ALONE) as clearing:
                for other in self._pipelines.values():
                    await other.clear_stock()
            if clearing.cancelled_caught:
                raise Unavailable("what had been claimed could not be given back first")
            with trio.move_on_after(_ALONE):
                pipeline.start_suspect(held)
                await held.suspected.wait()
                await pipeline.clear_stock()
            return True
        finally:
            if held is not None:
                pipeline.return_suspect(held)
            self._starts.is_held = False
            for other in self._pipelines.values():
                other.resume_starts()
