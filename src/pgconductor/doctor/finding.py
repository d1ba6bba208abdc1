"""What a check says: a verdict, what was seen, and what helps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class Verdict(StrEnum):
    """How bad it is: nothing to do; look at it soon; work is or will be lost or stopped; nobody could look."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    UNSEEN = "unseen"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: the verdict, what was seen, and, unless it is fine, the command or the step that helps."""

    check: str
    verdict: Verdict
    seen: str
    remedy: str | None = None


Judged: TypeAlias = tuple[Verdict, str, str | None]  # verdict, what was seen, remedy

_SHOWN = 5  # items of one kind that a finding names before it only counts


def listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def literal(text: str) -> str:
    """`text` as a literal of SQL, for a person to copy."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def fine(seen: str) -> Judged:
    return Verdict.OK, seen, None


def gravest(verdicts: Iterable[Verdict]) -> Verdict:
    found = set(verdicts)
    return next((v for v in (Verdict.PROBLEM, Verdict.WARNING, Verdict.UNSEEN) if v in found), Verdict.OK)
