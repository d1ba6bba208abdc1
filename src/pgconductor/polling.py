"""When a waiting client looks without having been told to, and when it connects again after it lost its listener.

Times are of whatever clock the caller waits by. No I/O, no clock; the only state is the back-off.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

MAX_BACKOFF: Final = 30.0  # seconds between attempts to connect
_FIRST_BACKOFF: Final = 0.5


@dataclass(frozen=True, slots=True)
class PollSchedule:
    """When to look without a notification, in seconds.

    `first`: after the flags were raised. `every`: from then on. `deaf`: while nobody listens. The last two vary by a
    tenth, at random.
    """

    first: tuple[float, ...] = (0.05, 0.2, 1.0)
    every: float = 5.0
    deaf: float = 1.0

    def next_look(self, looked_at: float, flagged_at: float | None, sweep_at: float | None = None) -> float:
        """When to look again. `flagged_at`: None while nobody listens. `sweep_at`: None for `every` from now."""
        if flagged_at is None:
            return self.deaf_until(looked_at)
        times = (flagged_at + seconds for seconds in self.first)
        return next(
            (at for at in times if at > looked_at), self.sweep_after(looked_at) if sweep_at is None else sweep_at
        )

    def deaf_until(self, now: float) -> float:
        """When to look again while nobody listens."""
        return now + jittered(self.deaf)

    def sweep_after(self, now: float) -> float:
        """When to look again, should no notification come."""
        return now + jittered(self.every)


class Reconnecting:
    """When to connect again: at once if the connection had lasted, else after a growing while.

    `at`: not before this. `backoff`: seconds, of the next time.
    """

    def __init__(self) -> None:
        self.at = -math.inf
        self.backoff = 0.0

    def note_loss(self, now: float, *, had_lasted: bool = False) -> None:
        """The connection is lost, or could not be made."""
        self.at = now if had_lasted else now + random.uniform(0.5, 1) * self.backoff
        self.backoff = _FIRST_BACKOFF if had_lasted else min(MAX_BACKOFF, max(_FIRST_BACKOFF, 2 * self.backoff))


def jittered(seconds: float) -> float:
    """`seconds`, longer or shorter by up to a tenth."""
    return seconds * random.uniform(0.9, 1.1)
