"""How much to claim, and whether to go on looking before going to sleep: decisions from what was measured, no I/O.

`Prefetch` keeps a small stock of claimed executions so that no runner waits for a round trip while executions end fast,
and none at all when they take long: the stock doubles when the runners ran dry before a claim came back, and halves
when an execution had waited in it for longer than `longest_wait`.

`Linger` tells a busy worker from an idle one. A worker that raised its sleep flag after every empty claim would make
producers notify it for nearly every insert; one that always lingered first would double the latency at light load. So
the measured rate decides, with hysteresis. What is measured is what this worker sees of the queue: what it claims, and
what it is notified of, since with ten workers each claims a tenth and all are notified.

`Backing` says how long a worker of a busy queue sleeps behind the one that keeps looking.

`Deference` thins the herd: all who sleep on a queue are notified, one gets what there is. Who came too late waits a
little next time, so that the first has done before the others claim, and those compete neither for the rows nor for
the CPU. Who got something waits half as long. One of them ends up claiming at once, and if it cannot, since it is full
or busy, another one is first after `longest` at most (benchmarks/herd.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Prefetch:
    """How many executions to hold beyond those that run: a multiple of `unit`, which is what one handler takes."""

    maximum: int = 2000
    longest_wait: float = 0.1
    size: int = 0
    unit: int = 1
    _worst_wait: float = field(default=0.0, repr=False)

    def note_start(self, waited: float) -> None:
        """An execution was started that had waited in stock for `waited` seconds."""
        if waited > self._worst_wait:
            self._worst_wait = waited

    def note_claim(self, *, asked: int, got: int, ran_dry: bool) -> None:
        """A claim came back; `ran_dry`: a runner had nothing to do when it did."""
        if self._worst_wait > self.longest_wait:
            self.size = self._rounded(self.size // 2)
        elif ran_dry and got == asked:
            self.size = self._rounded(min(self.maximum, max(8, self.unit, self.size * 2)))
        self._worst_wait = 0.0

    def _rounded(self, size: int) -> int:
        return size - size % self.unit

    def note_stuck(self) -> None:
        """What was in stock had to be given back: the executions before it take long."""
        self.size = 0


@dataclass(slots=True)
class Linger:
    """Whether an empty claim should be followed by more looks (True) or by sleep.

    `begin` and `end`: arrivals per second above which lingering begins, below which it ends. `period`: how long to
    look, in seconds; the looks are `interval` apart at first, `longest_interval` at last; where they take longer than
    that, `patience` times as long as they take. The rate is averaged over about `memory` seconds; `burst` arrivals at
    once that came as fast as `begin` are enough: 64 producers notify at once until all sleepers know (notify_tax.py).
    """

    begin: float = 100.0
    end: float = 60.0
    period: float = 0.03
    interval: float = 0.001
    longest_interval: float = 0.005
    patience: float = 2.0
    memory: float = 0.25
    burst: int = 4
    rate: float = 0.0
    is_lingering: bool = False
    _noted_at: float = field(default=-math.inf, repr=False)

    def note_arrivals(self, now: float, count: int) -> None:
        """`count` executions were claimed, or notifications came, at `now` (0 for an empty claim)."""
        elapsed = now - self._noted_at
        self._noted_at = now
        self.rate = self.rate * math.exp(-elapsed / self.memory) + count / self.memory
        if count >= max(self.burst, self.begin * elapsed):
            self.rate = max(self.rate, self.begin)
        if self.rate >= self.begin:
            self.is_lingering = True
        elif self.rate < self.end:
            self.is_lingering = False

    def intervals(self, took: Callable[[], float] = lambda: 0.0) -> Iterator[float]:
        """Seconds between the looks of one spell, longer and longer, `period` in all.

        `took`: for how many seconds the latest look took. Where that is long, as behind many rows that are gone and not
        yet vacuumed, or on a busy server, looks would keep others from ending what they have: there are fewer
        (benchmarks/contention.py).
        """
        left, interval = self.period, self.interval
        while left > 0:
            cost = took()
            pause = min(left, interval if cost <= self.longest_interval else max(interval, self.patience * cost))
            yield pause
            left -= pause
            interval = min(1.5 * interval, self.longest_interval)


@dataclass(slots=True)
class Backing:
    """How long to sleep, in seconds, while another worker is the lookout of the queue (`reactor`), which may hang."""

    shortest: float = 0.005
    longest: float = 0.25
    patience: float = 0.02
    nap: float = 0.25

    def note_claim(self, waited: float) -> None:
        """A claim after a nap to its end brought an execution that had been due for `waited` seconds; 0: none."""
        if waited > self.patience:
            self.nap = max(self.shortest, self.nap / 2)
        else:
            self.nap = min(self.longest, 2 * self.nap)


@dataclass(slots=True)
class Deference:
    """How long to wait, in seconds, between a notification and the claim."""

    shortest: float = 0.001
    longest: float = 0.01
    delay: float = 0.0

    def note_claim(self, count: int) -> None:
        """A claim that followed a notification brought `count` executions."""
        if count == 0:
            self.delay = min(self.longest, max(self.shortest, 2 * self.delay))
        else:
            self.delay = self.delay / 2 if self.delay > self.shortest else 0.0
