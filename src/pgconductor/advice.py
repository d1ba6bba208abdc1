"""Whether a queue needs more processes, or to be split, or is fine: the judgement of `pgconductor advise`.

`judge` is a plain function from what `queue_load` tells to a verdict with its figures; the thresholds are named here
and nowhere else. It goes through the cases in the order in which they hide each other: what nobody serves cannot be
busy, and where nothing is late nobody need be added. It errs to "not known yet" where the figures do not tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .codec import printable
from .model import QueueLoad

LATE: Final = 5.0  # seconds for which the oldest ready execution may have waited
CATCHES_UP: Final = 60.0  # seconds within which what is ready will be worked off anyway
FULL: Final = 0.8  # of the runners busy
IDLE: Final = 0.2
CONTENDED: Final = 0.3  # of the claims found nothing but what others had locked
CLAIMING: Final = 0.5  # of a worker's time goes into claims
FLUSHING: Final = 0.8  # of a worker's time a flush is under way
CPU_FULL: Final = 0.85  # of one core
CPU_IDLE: Final = 0.5
MACHINE_FULL: Final = 1.5  # runnable processes per core
SPARE: Final = 2  # processes that are left on an idle queue, so that one may fail


class Recommendation(StrEnum):
    """What to do about a queue."""

    FINE = "fine"
    ADD_PROCESSES = "add processes"
    RAISE_CONCURRENCY = "raise concurrency"
    SPLIT_QUEUE = "split this queue"
    REMOVE_PROCESSES = "remove processes"
    START_WORKERS = "start a worker"  # nobody serves it
    ADD_TASKS = "add tasks to its workers"  # nobody has the tasks of what waits
    LOOK_AT_DATABASE = "look at the database"
    NOT_KNOWN = "not known yet"


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about one queue, why, and how; what else is true of it; and what it was judged by.

    `remedy` is None where nothing is to be done. `arrivals` and `departures`: per second, as judged, None if not known.
    """

    queue: str
    verdict: Recommendation
    why: str
    remedy: str | None
    notes: tuple[str, ...]
    arrivals: float | None
    departures: float | None
    load: QueueLoad


@dataclass(frozen=True, slots=True)
class _Figures:
    """What is worked out of a load. `seconds`: over how many it is; shares are of 1."""

    load: QueueLoad
    arrivals: float | None
    departures: float | None
    utilisation: float | None
    contention: float | None

    @property
    def worked_off_in(self) -> float | None:
        """Seconds until nothing would be ready, if it went on like this; None if it would not come to that."""
        if self.arrivals is None or self.departures is None or self.load.is_ready_capped:
            return None
        gain = self.departures - self.arrivals
        return self.load.ready / gain if gain > 0 else None


def judge(load: QueueLoad, earlier: QueueLoad | None = None) -> Advice:
    """Judge a queue; with an `earlier` look at it, arrivals and departures are what came and went between the two."""
    figures = _work_out(load, earlier)
    verdict, why, remedy = _decide(figures)
    if figures.utilisation is not None and (flow := _flow(figures)) not in why:
        why = f"{why}; {flow}"
    return Advice(
        load.queue, verdict, why, remedy, tuple(_notes(figures, verdict)), figures.arrivals, figures.departures, load
    )


def judge_all(loads: list[QueueLoad], earlier: list[QueueLoad] | None = None) -> list[Advice]:
    """Judge each queue; a queue that is new since the earlier look is judged by what its workers have told."""
    known = {load.queue: load for load in earlier or ()}
    return [judge(load, known.get(load.queue)) for load in loads]


def _work_out(load: QueueLoad, earlier: QueueLoad | None) -> _Figures:
    arrivals, departures = load.arrivals, load.departures
    if earlier is not None:
        seconds = (load.at - earlier.at).total_seconds()
        arrivals = _rate(earlier.inserted, load.inserted, seconds)
        departures = _rate(earlier.deleted, load.deleted, seconds)
    utilisation = None
    if load.busy is not None and load.reporting_capacity:
        utilisation = load.busy / load.reporting_capacity
    contention = load.locked_claims / load.claims if load.locked_claims is not None and load.claims else None
    return _Figures(load, arrivals, departures, utilisation, contention)


def _rate(before: int | None, after: int | None, seconds: float) -> float | None:
    if before is None or after is None or after < before or seconds <= 0:
        return None
    return (after - before) / seconds


def _decide(figures: _Figures) -> tuple[Recommendation, str, str | None]:
    load, name = figures.load, printable(figures.load.queue)
    waits = _waiting(load)
    if not load.workers:
        if not load.ready:
            return Recommendation.FINE, "nobody serves it, and nothing is ready", None
        return (
            Recommendation.START_WORKERS,
            f"{waits}; nobody serves it",
            f"run an orchestrator with a worker of {name!r}",
        )
    if load.unserved and load.unserved == load.looked:
        tasks = _listed(load.tasks_without_worker)
        return (
            Recommendation.ADD_TASKS,
            f"{waits}; no living worker has {tasks}",
            f"run an orchestrator whose worker of {name!r} has {tasks}",
        )
    if load.oldest_ready is None or load.oldest_ready < LATE:
        return _in_time(figures, waits)
    if (left := figures.worked_off_in) is not None and left <= CATCHES_UP:
        return Recommendation.FINE, f"{waits}; {_flow(figures)}: worked off in {left:.0f} s", None
    if figures.utilisation is None:
        return (
            Recommendation.NOT_KNOWN,
            f"{waits}; none of its {_count(load.workers, 'worker')} has told twice what it does",
            "ask again when its workers have run for some heartbeats; if it stays so, they are of an older version",
        )
    return _late(figures, waits)


def _in_time(figures: _Figures, waits: str) -> tuple[Recommendation, str, str | None]:
    """Nothing waits for long."""
    load, utilisation = figures.load, figures.utilisation
    if utilisation is None:
        return Recommendation.FINE, waits, None
    said = f"{waits}; {_busy(figures)}"
    if load.busy is not None and utilisation < IDLE and (load.cpu or 0.0) < CPU_IDLE and load.reporting == load.workers:
        each = load.capacity / load.workers
        needed = max(SPARE, math.ceil(load.busy / 0.5 / each))
        if needed < load.workers:
            return (
                Recommendation.REMOVE_PROCESSES,
                f"{said} (less than {IDLE:.0%})",
                f"if it stays so, {needed} of its {load.workers} processes would do",
            )
    return Recommendation.FINE, said, None


def _late(figures: _Figures, waits: str) -> tuple[Recommendation, str, str | None]:
    """Something waits for too long, and it is known what its workers do."""
    load, utilisation = figures.load, figures.utilisation
    assert utilisation is not None
    said = f"{waits} ({LATE:.0f} s is late); {_busy(figures)}"
    cpu, claiming = load.cpu or 0.0, load.claim_share or 0.0
    add = _more(load)
    # First: it makes processes look idle, and handlers and claims slow.
    if (load.machine_load or 0.0) >= MACHINE_FULL:
        return (
            Recommendation.ADD_PROCESSES,
            f"{said}; a machine has no CPU left: {load.machine_load:.1f} runnable processes for each core"
            f" ({MACHINE_FULL} is full)",
            "add processes on another machine",
        )
    if utilisation >= FULL:
        if cpu < CPU_IDLE:
            return (
                Recommendation.RAISE_CONCURRENCY,
                f"{said} ({FULL:.0%} is full), and the busiest process uses {cpu:.0%} of a core: handlers wait",
                f"raise the workers' concurrency, or {add}",
            )
        return Recommendation.ADD_PROCESSES, f"{said} ({FULL:.0%} is full); {cpu:.0%} of a core used", add
    if cpu >= CPU_FULL:
        return (
            Recommendation.ADD_PROCESSES,
            f"{said}, since a process has no CPU left: {cpu:.0%} of a core ({CPU_FULL:.0%} is full)",
            add,
        )
    if load.workers > 1 and (contention := figures.contention) is not None and contention >= CONTENDED:
        return (
            Recommendation.SPLIT_QUEUE,
            f"{said}, since workers are in each other's way: {contention:.0%} of claims found only what others had"
            f" locked ({CONTENDED:.0%} is much)",
            _SPLIT,
        )
    if (load.flush_share or 0.0) >= FLUSHING and (load.flush_share or 0.0) >= claiming:
        return (
            Recommendation.LOOK_AT_DATABASE,
            f"{said}, since they wait for outcomes to be written: {load.flush_share:.0%} of the time",
            "`pgconductor doctor`; look at the server's disk and CPU",
        )
    if claiming >= CLAIMING:
        spent = f"claims take {claiming:.0%} of a worker's time ({CLAIMING:.0%} is much){_claim_cost(load)}"
        if load.workers > 1:
            return Recommendation.SPLIT_QUEUE, f"{said}, since {spent}", _SPLIT
        return Recommendation.ADD_PROCESSES, f"{said}, since {spent}", add
    if load.unserved:
        return (
            Recommendation.ADD_TASKS,
            f"{said}; of the first {load.looked:,} no living worker has {_listed(load.tasks_without_worker)}, of which"
            f" there are {load.unserved:,}",
            f"run an orchestrator whose worker of {printable(load.queue)!r} has {_listed(load.tasks_without_worker)}",
        )
    return (
        Recommendation.NOT_KNOWN,
        f"{said}, and neither CPU ({cpu:.0%} of a core) nor claims ({claiming:.0%} of the time) nor locks are why",
        "ask again; `pgconductor status` tells what state executions are in, `pgconductor doctor` what is in their way",
    )


_SPLIT: Final = "give some of its tasks a queue of their own, @conductor.task(queue=...), and workers for that"


def _notes(figures: _Figures, verdict: Recommendation) -> list[str]:
    """What else is true, and somebody may want to know."""
    load = figures.load
    said: list[str] = []
    if load.unserved and verdict not in (Recommendation.ADD_TASKS, Recommendation.START_WORKERS):
        said.append(
            f"{load.unserved:,} of the first {load.looked:,} that are ready have tasks that no living worker has:"
            f" {_listed(load.tasks_without_worker)}"
        )
    contention = figures.contention
    if (
        contention is not None
        and contention >= CONTENDED
        and load.workers > 1
        and verdict is not Recommendation.SPLIT_QUEUE
    ):
        said.append(
            f"{contention:.0%} of claims found only what others had locked: more processes would add to it; split the"
            " queue before"
        )
    if load.cpu is not None and load.cpu >= CPU_FULL and verdict is not Recommendation.ADD_PROCESSES:
        said.append(f"a process uses {load.cpu:.0%} of a core: handlers in it wait for each other")
    if (
        figures.arrivals is not None
        and figures.departures is not None
        and figures.utilisation is not None
        and figures.utilisation >= FULL
        and figures.arrivals > 1.1 * figures.departures
        and verdict is Recommendation.FINE
    ):
        said.append(f"{_flow(figures)}: it will be late soon")
    if load.workers and 0 < load.reporting < load.workers:
        said.append(f"{load.workers - load.reporting:,} of its workers have not told twice what they do")
    return said


def _waiting(load: QueueLoad) -> str:
    if not load.ready:
        return "nothing is ready"
    more = "+" if load.is_ready_capped else ""
    return f"{load.ready:,}{more} ready, the oldest for {_age(load.oldest_ready or 0.0)}"


def _busy(figures: _Figures) -> str:
    return f"{figures.utilisation:.0%} of {_count(figures.load.reporting_capacity, 'runner')} busy"


def _flow(figures: _Figures) -> str:
    """What comes and goes, as far as it is known."""
    arrivals, departures = ("?" if x is None else f"{x:,.1f}" for x in (figures.arrivals, figures.departures))
    return f"{arrivals}/s arrive, {departures}/s leave"


def _claim_cost(load: QueueLoad) -> str:
    if not load.claimed or load.claim_seconds is None:
        return ""
    return f", {load.claim_seconds / load.claimed * 1000:.2f} ms for each execution"


def _more(load: QueueLoad) -> str:
    """How many processes to add, at least one."""
    each = load.capacity / load.workers
    missing = max(1, math.ceil((load.wanted_capacity - load.capacity) / each))
    return f"add {_count(missing, 'process', 'processes')} of {each:.0f} runners"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _age(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:,.0f} s"


def _listed(tasks: tuple[str, ...]) -> str:
    return ", ".join(f"task {printable(task)!r}" for task in tasks)
