"""How loaded one worker is, measured so that an execution costs nothing: what a heartbeat tells of it.

Runners' time is counted from when one takes up work until it finds none: between two executions of a busy runner the
clock is not read. What is told are counts and seconds since the process began; whoever reads two of them has rates.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class WorkerCounts:
    """Counts of one worker over all incarnations; `short_claims` and `locked_claims` as `WorkerLoad` has them."""

    claims: int = 0
    empty_claims: int = 0
    short_claims: int = 0
    locked_claims: int = 0
    claiming_seconds: float = 0.0  # in all
    occupancy: Occupancy = field(default_factory=Occupancy)
    claimed: int = 0
    flushed: FlushCounts = field(default_factory=FlushCounts)
    pickups: deque[float] = field(default_factory=lambda: deque[float](maxlen=2000))
    claim_seconds: deque[float] = field(default_factory=lambda: deque[float](maxlen=2000))

    def note_claim(self, seconds: float, *, asked: int, got: int) -> None:
        """A claim was answered, after so many seconds."""
        self.claims += 1
        self.claim_seconds.append(seconds)
        self.claiming_seconds += seconds
        if got:
            self.claimed += got
            self.short_claims += got < asked
        else:
            self.empty_claims += 1


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


def describe(queue: str, machine: Machine, counts: WorkerCounts, now: float) -> WorkerLoad:
    """What is told of one worker; `now` is Trio's time."""
    flushed = counts.flushed
    ended = sum(flushed.outcomes.get(kind, 0) for kind in _ENDS)
    claimed = counts.claimed - flushed.outcomes.get("released", 0)
    return WorkerLoad(
        queue, counts.claims, counts.empty_claims, counts.short_claims, counts.locked_claims, claimed, ended,
        counts.occupancy.seconds(now), counts.claiming_seconds, flushed.seconds, machine.cpu_seconds, machine.load,
    )  # fmt: skip
