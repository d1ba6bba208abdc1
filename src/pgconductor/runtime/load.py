"""How loaded one worker is, measured so that an execution costs nothing: what a heartbeat tells of it.

Runners' time is counted from when one takes up work until it finds none: between two executions of a busy runner the
clock is not read. What is told are counts and seconds since the process began; whoever reads two of them has rates.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from ..db.calls import WorkerLoad
from .flusher import FlushCounts

_ENDS = ("completed", "failed", "cancelled")
_CPUS = os.cpu_count() or 1  # asked once: each time it reads a file


class Occupancy:
    """Runner-seconds: the sum of the times for which each of several runners was busy. Times are Trio's."""

    def __init__(self) -> None:
        self.busy = 0
        self._seconds = 0.0
        self._counted_at = 0.0

    def __repr__(self) -> str:
        return f"<Occupancy: {self.busy} busy, {self._seconds:.3f} s so far>"

    def enter(self, now: float) -> None:
        """A runner takes up work."""
        self._count(now)
        self.busy += 1

    def leave(self, now: float) -> None:
        """A runner has none."""
        self._count(now)
        self.busy -= 1

    def clear(self, now: float) -> None:
        """All runners have ended."""
        self._count(now)
        self.busy = 0

    def seconds(self, now: float) -> float:
        """The sum until now, of those that are busy too."""
        self._count(now)
        return self._seconds

    def _count(self, now: float) -> None:
        self._seconds += self.busy * (now - self._counted_at)
        self._counted_at = now


@dataclass(frozen=True, slots=True)
class Machine:
    """What is told of the process as a whole: its CPU seconds, all threads; runnable processes per core around it."""

    cpu_seconds: float
    load: float | None


def look_at_machine() -> Machine:
    """As it is now. The load is the mean of the last minute, None where the system does not tell."""
    try:
        load: float | None = os.getloadavg()[0] / _CPUS
    except (AttributeError, OSError):  # not on every system
        load = None
    return Machine(time.process_time(), load)


def describe(
    queue: str,
    machine: Machine,
    flushed: FlushCounts,
    *,
    claims: int,
    empty_claims: int,
    short_claims: int,
    locked_claims: int,
    claimed: int,
    busy_seconds: float,
    claim_seconds: float,
) -> WorkerLoad:
    """What is told of one worker."""
    ended = sum(flushed.outcomes.get(kind, 0) for kind in _ENDS)
    claimed -= flushed.outcomes.get("released", 0)
    return WorkerLoad(
        queue, claims, empty_claims, short_claims, locked_claims, claimed, ended, busy_seconds, claim_seconds,
        flushed.seconds, machine.cpu_seconds, machine.load,
    )  # fmt: skip
