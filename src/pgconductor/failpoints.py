"""Named places in the engine where a test makes the process die, stop, fail or wait: `failpoint("flush.answered")`.

A plan is read once, when this module is imported, from the environment variable PGCONDUCTOR_FAILPOINTS:

    flush.answered=kill@2;claim.before=raise;outcome.noted=wait:/run/gate@1

that is `point=action`, separated by semicolons. Actions, at each arrival at the point, or with `@k` at the k-th alone:

    kill        SIGKILL to this process
    stop        SIGSTOP to this process, until somebody sends SIGCONT
    raise       `FailpointReached`
    wait:FILE   block the whole process until FILE exists; `FILE.reached` is made first, so that others see it wait

Owns the names of the points, so that a plan with a misspelt one is refused instead of testing nothing. A point must
not do anything else than its plan says, and without a plan `failpoint` is a function that does nothing. Never used
outside tests; nothing here reads the database, and a waiting point does not see cancellation: it blocks the thread.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

VARIABLE: Final = "PGCONDUCTOR_FAILPOINTS"

# Every point that the engine has; a test compares them with the calls in the source.
POINTS: Final = frozenset(
    {
        "claim.before",
        "claim.answered",
        "handler.before",
        "handler.after",
        "outcome.noted",
        "flush.before",
        "flush.answered",
        "step.before",
        "step.answered",
        "transaction.before_commit",
        "transaction.committed",
        "wait.before",
        "wait.answered",
        "effect.before",
        "effect.answered",
        "item.before",
        "item.answered",
        "deliver.before",
        "deliver.answered",
        "heartbeat.before",
        "heartbeat.answered",
        "register.answered",
        "succeed.answered",
        "cancel.signalled",
        "stop.begun",
        "stock.given_back",
        "retire.before",
        "retire.answered",
    }
)

_SPECIFICATION: Final = re.compile(r"(?P<action>kill|stop|raise|wait:(?P<file>.+?))(?:@(?P<hit>[1-9][0-9]*))?")
_POLL: Final = 0.01


class FailpointReached(RuntimeError):
    """A plan said `raise`."""


class BadFailpoints(ValueError):
    """PGCONDUCTOR_FAILPOINTS cannot be understood."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens at one point; `hit` is None for every arrival."""

    action: str
    file: Path | None
    hit: int | None


def parse(text: str) -> dict[str, Plan]:
    """The plans in a specification, by point; raises `BadFailpoints` for what is not of the form."""
    plans: dict[str, Plan] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        point, _, wanted = part.partition("=")
        match = _SPECIFICATION.fullmatch(wanted)
        if match is None:
            raise BadFailpoints(
                f"{VARIABLE}: {part!r} is not POINT=ACTION or POINT=ACTION@K; actions: kill, stop, raise, wait:FILE"
            )
        if point not in POINTS:
            raise BadFailpoints(f"{VARIABLE}: there is no point {point!r}; there are {', '.join(sorted(POINTS))}")
        if point in plans:
            raise BadFailpoints(f"{VARIABLE}: {point!r} is given twice")
        file, hit = match["file"], match["hit"]
        plans[point] = Plan(match["action"].split(":")[0], Path(file) if file else None, int(hit) if hit else None)
    return plans


def make_failpoint(plans: Mapping[str, Plan]) -> Callable[[str], None]:
    """A function that counts arrivals and does what the plans say."""
    arrivals: dict[str, int] = {}

    def failpoint(name: str) -> None:
        plan = plans.get(name)
        if plan is None:
            return
        arrivals[name] = arrivals.get(name, 0) + 1
        if plan.hit is None or plan.hit == arrivals[name]:
            _act(name, plan)

    return failpoint


def _act(name: str, plan: Plan) -> None:
    if plan.file is not None:
        plan.file.with_name(plan.file.name + ".reached").touch()
        while not plan.file.exists():
            time.sleep(_POLL)
    elif plan.action == "raise":
        raise FailpointReached(name)
    else:
        os.kill(os.getpid(), signal.SIGKILL if plan.action == "kill" else signal.SIGSTOP)


def _nothing(name: str, /) -> None:
    """There is no plan."""


_plans = parse(os.environ.get(VARIABLE, ""))
failpoint: Final[Callable[[str], None]] = make_failpoint(_plans) if _plans else _nothing
