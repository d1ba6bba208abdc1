"""What commands print: tables for people, JSON for programs. Pure but for the printing.

Names of queues and tasks are any text, so none reaches a terminal with its control characters or is read as markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..model import DeadLetter, FailedAttempt, OrchestratorStatus, QueueStatus, State

_LONG = 100  # characters of an error in a table
_WIDE = 240  # columns where there is no terminal: whoever reads a file or a pipe wants whole lines


def console() -> Console:
    """Standard output, at the terminal's width or without bounds."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print plain values, dataclasses, ids and instants as indented JSON."""
    print(json.dumps(msgspec.to_builtins(value), indent=2, ensure_ascii=False))


def print_statuses(statuses: Mapping[UUID, str], *, as_json: bool) -> None:
    """Print what came of each execution: an object of ids, or a line for each."""
    if as_json:
        print_json({str(execution): status for execution, status in statuses.items()})
        return
    for execution, status in statuses.items():
        print(f"{execution} {status}")


def plain(text: str) -> str:
    """`text` with everything that is not printable escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def age(seconds: float | None) -> str:
    """A duration in its largest fitting unit; None, there being nothing to tell the age of, as a dash."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for unit, size in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if seconds < 120 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def queue_table(queues: Sequence[QueueStatus]) -> Table:
    """One row per queue."""
    table = Table(title="Queues", title_justify="left")
    table.add_column("queue")
    numbers = ("ready", "running", "scheduled", "waiting", "completed", "failed", "cancelled", "workers")
    for column in (*numbers, "oldest ready"):
        table.add_column(column, justify="right")
    for queue in queues:
        counts = [f"{getattr(queue, name):,}" for name in numbers]
        table.add_row(Text(plain(queue.queue)), *counts, age(queue.oldest_ready))
    return table


def orchestrator_table(orchestrators: Sequence[OrchestratorStatus]) -> Table:
    """One row per orchestrator, dead ones marked."""
    table = Table(title="Orchestrators", title_justify="left")
    for column in ("name", "state", "queues", "version", "running for", "heartbeat"):
        table.add_column(column)
    for each in orchestrators:
        table.add_row(
            Text(plain(each.name)),
            ("asked to stop" if each.stop_requested else "alive") if each.alive else "dead",
            Text(", ".join(plain(queue) for queue in each.queues)),
            each.program_version,
            f"since {each.started_at:%Y-%m-%d %H:%M:%S %Z}",
            f"{age(each.heartbeat_age)} ago",
        )
    return table


def dead_letter_table(letters: Sequence[DeadLetter]) -> Table:
    """One row per dead letter, with the beginning of its last error or the reason of its cancellation."""
    table = Table(title="Dead letters", title_justify="left")
    for column in ("execution", "queue", "task", "state", "ended"):
        table.add_column(column)
    for column in ("attempts", "crashes", "retried"):
        table.add_column(column, justify="right")
    table.add_column("why")
    for each in letters:
        table.add_row(
            str(each.id),
            Text(plain(each.queue)),
            Text(plain(each.task)),
            each.state,
            f"{each.finished_at:%Y-%m-%d %H:%M:%S %Z}",
            *(f"{count:,}" for count in (each.attempts, each.crashes, each.generation)),
            Text(shortened(plain(_why(each)))),
        )
    return table


def _why(letter: DeadLetter) -> str:
    if letter.state is State.CANCELLED:
        return letter.reason or ""
    return "" if letter.error is None else f"{letter.error.type}: {letter.error.message}"


def shortened(text: str) -> str:
    """`text`, cut to what fits into a line."""
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def attempt(error: FailedAttempt) -> str:
    """A failed attempt in several lines."""
    which = "" if error.attempt is None else f" {error.attempt}"
    when = "" if error.at is None else f" at {error.at:%Y-%m-%d %H:%M:%S %Z}"
    lines = [f"attempt{which}{when}: {error.type}: {error.message}", *error.traceback.splitlines()]
    return "\n".join(plain(line) for line in lines)


def hints(queues: Sequence[QueueStatus], orchestrators: Sequence[OrchestratorStatus]) -> list[str]:
    """A sentence for each thing that somebody should see to."""
    said = missing_workers(queues)
    if dead := sum(queue.failed for queue in queues):
        said.append(f"{dead:,} failed: `pgconductor dead-letters` shows them, `pgconductor retry` lets them begin anew")
    if stopping := sum(each.alive and each.stop_requested for each in orchestrators):
        said.append(f"{stopping:,} orchestrators are asked to stop: a migration of a newer program waits for them")
    return said


def missing_workers(queues: Sequence[QueueStatus]) -> list[str]:
    """A sentence per queue with executions of tasks that no live worker has."""
    return [
        f"queue {plain(queue.queue)!r}: no live worker has "
        + ", ".join(f"task {plain(task)!r}" for task in queue.tasks_without_worker)
        for queue in queues
        if queue.tasks_without_worker
    ]
