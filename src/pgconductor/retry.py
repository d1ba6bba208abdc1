"""When to try again: pure decisions about attempts and delays.

Owns the back-off's shape and the rule that `max_attempts` is final. Knows no clock, no database and no execution:
attempt numbers and a random source go in, seconds come out. The same random source gives the same delays, so that
tests and simulations repeat. Must not sleep, log or import anything of the engine.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

from .options import MAX_DELAY, checked_number, checked_seconds

_MAX_EXPONENT = 700.0  # e to this power is just within a float


class Backoff(Protocol):
    """How long to wait before the next attempt; any object with this method will do."""

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds (finite, from 0 to a century) to wait after attempt number `attempt`, which failed.

        Attempts count from 1. Randomness must come from `rng` only.
        """
        ...


@dataclass(frozen=True, slots=True)
class Exponential:
    """Wait `initial * factor ** (attempt - 1)` seconds, at most `maximum`, shortened at random by up to `jitter`.

    `initial`: seconds before the second attempt, from 0 to a century. `factor`: growth per attempt, from 1 to 1000.
    `maximum`: the longest wait in seconds, at least `initial`. `jitter`: the share of the delay that chance may take
    off, from 0 (none) to 1 (anything down to zero), so that executions that failed together do not return together.
    Raises `InvalidOption` for values outside these ranges.
    """

    initial: float = 1.0
    factor: float = 2.0
    maximum: float = 3600.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        checked_seconds("Exponential(initial=)", self.initial)
        checked_number("Exponential(factor=)", self.factor, minimum=1.0, maximum=1000.0)
        checked_seconds("Exponential(maximum=)", self.maximum, minimum=float(self.initial))
        checked_number("Exponential(jitter=)", self.jitter, minimum=0.0, maximum=1.0)

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after failed attempt number `attempt` (from 1), drawn with `rng`."""
        longest = self._longest(attempt)
        return longest - longest * self.jitter * rng.random()

    def _longest(self, attempt: int) -> float:
        if self.initial <= 0.0:
            return 0.0
        growth = (attempt - 1) * math.log(self.factor)
        if growth < _MAX_EXPONENT:
            return min(float(self.maximum), self.initial * self.factor ** (attempt - 1))
        # The power alone would overflow, though a minute `initial` may keep the product in range.
        return min(float(self.maximum), math.exp(min(growth + math.log(self.initial), _MAX_EXPONENT)))


DEFAULT_BACKOFF = Exponential()


def decide(attempt: int, max_attempts: int, backoff: Backoff, rng: random.Random) -> float | None:
    """Return the seconds to wait before the next attempt, or None when attempt number `attempt` was the last.

    `attempt` is the one that has just failed, counted from 1. Raises `InvalidOption` when a user's `backoff` answers
    with something that is not a finite number of seconds from 0 to a century, and lets pass what it raises itself.
    """
    if attempt >= max_attempts:
        return None
    return checked_seconds(
        f"the delay that {type(backoff).__name__}.delay() returned", backoff.delay(attempt, rng), maximum=MAX_DELAY
    )
