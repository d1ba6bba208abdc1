"""What commands print: tables for people, JSON for programs. Pure but for the printing.

Names of queues and tasks are any text, so none reaches a terminal with its control characters or is read as markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..model import (
    DeadLetter,
    Divergence,
    ExecutionStatus,
    ExecutionSummary,
    FailedAttempt,
    OpenWait,
    OrchestratorStatus,
    QueueLoad,
    QueueStatus,
    State,
    StepRecord,
)

_LONG = 100  # characters of an error in a table
_SHOWN = 20  # records in a line
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


def load_table(loads: Sequence[QueueLoad]) -> Table:
    """One row per queue: what waits, who works, and what comes and goes; a dash where nobody has told."""
    table = Table(title="Load", title_justify="left")
    table.add_column("queue")
    for column in ("ready", "oldest", "arrive /s", "leave /s", "workers", "runners", "busy", "claims", "locked", "CPU"):
        table.add_column(column, justify="right")
    for load in loads:
        table.add_row(
            Text(plain(load.queue)), f"{load.ready:,}{'+' if load.is_ready_capped else ''}", age(load.oldest_ready),
            _number(load.arrivals), _number(load.departures), f"{load.workers:,}", f"{load.capacity:,}",
            _share(load.busy, load.reporting_capacity), _share(load.claim_share, 1),
            _share(load.locked_claims, load.claims), _share(load.cpu, 1),
        )  # fmt: skip
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _share(part: float | None, whole: float | None) -> str:
    return "-" if part is None or not whole else f"{part / whole:.0%}"


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


def named(task: str, version: str | None) -> str:
    """A task's name, with its version if it has one."""
    return plain(task if version is None else f"{task}@{version}")


def instant(at: datetime | None) -> str:
    """An instant to the second; none as a dash."""
    return "-" if at is None else f"{at:%Y-%m-%d %H:%M:%S %Z}"


def status_lines(status: ExecutionStatus) -> list[str]:
    """What is known of an execution, a line for each fact that there is."""
    error, reason = status.error, status.reason
    facts: list[tuple[str, object]] = [
        ("execution", status.id),
        ("task", named(status.task, status.version)),
        ("queue", plain(status.queue)),
        ("state", status.state.value),
        ("attempt", status.attempt if status.max_attempts is None else f"{status.attempt} of {status.max_attempts}"),
        ("crashes", status.crashes or None),
        ("retried", status.generation or None),
        ("priority", status.priority or None),
        ("created", instant(status.created_at)),
        ("due", None if status.run_at is None else instant(status.run_at)),
        ("claimed", None if status.claimed_at is None else instant(status.claimed_at)),
        ("finished", None if status.finished_at is None else instant(status.finished_at)),
        ("kept until", None if status.expires_at is None else instant(status.expires_at)),
        ("deadline", None if status.deadline_at is None else instant(status.deadline_at)),
        ("parent", status.parent_id),
        ("root", status.root_id),
        ("origin", status.origin_id),
        ("key", None if status.dedupe_key is None else plain(status.dedupe_key)),
        ("tags", ", ".join(map(plain, status.tags)) or None),
        ("progress", None if status.progress is None else plain(json.dumps(status.progress, ensure_ascii=False))),
        ("cancelled", (plain(reason) if reason else "yes") if status.is_cancel_requested else None),
        ("last error", None if error is None else plain(f"{error.type}: {error.message}")),
    ]
    lines = [f"{name + ':':12} {value}" for name, value in facts if value is not None]
    lines += [f"waits for:   {_wait(wait)}" for wait in status.waits_for]
    if (more := status.open_waits - len(status.waits_for)) > 0:
        lines.append(f"             and {more:,} more")
    return lines


def _wait(wait: OpenWait) -> str:
    target = "" if wait.target is None else f" {plain(wait.target)}"
    until = "" if wait.due_at is None else f", until {instant(wait.due_at)} at most"
    return f"{plain(wait.kind)} {plain(wait.name)!r}{target}{until}"


def step_table(records: Sequence[StepRecord]) -> Table:
    """One row per record."""
    table = Table(title="Steps", title_justify="left")
    table.add_column("", justify="right")
    for column in ("kind", "name", "outcome", "began", "ended", "what"):
        table.add_column(column)
    for each in records:
        table.add_row(
            str(each.position), Text(plain(each.kind)), Text(plain(each.name)), plain(each.outcome or "open"),
            instant(each.created_at), instant(each.resolved_at), Text(shortened(_what(each))),
        )  # fmt: skip
    return table


def _what(record: StepRecord) -> str:
    if record.error is not None:
        return plain(f"{record.error.type}: {record.error.message}")
    if record.reason is not None:
        return plain(record.reason)
    if record.is_withheld:
        return "(not shown)"
    if record.value is not None:
        return plain(json.dumps(record.value, ensure_ascii=False))
    return plain(record.target or "")


def execution_table(found: Sequence[ExecutionSummary]) -> Table:
    """One row per execution."""
    table = Table(title="Executions", title_justify="left")
    for column in ("execution", "queue", "task", "state", "created", "ended"):
        table.add_column(column)
    table.add_column("attempt", justify="right")
    for column in ("tags", "why"):
        table.add_column(column)
    for each in found:
        table.add_row(
            str(each.id), Text(plain(each.queue)), Text(named(each.task, each.version)), each.state.value,
            instant(each.created_at), instant(each.finished_at), str(each.attempt),
            Text(", ".join(map(plain, each.tags))), Text(shortened(plain(each.reason or each.error_type or ""))),
        )  # fmt: skip
    return table


def divergence_lines(found: Divergence) -> list[str]:
    """Why an execution could not go on, in several lines."""
    return [
        f"{found.id} {named(found.task, found.version)}: {found.trouble.value}: {plain(found.what)}",
        f"    recorded: {plain(_listed(found.recorded))}",
        f"    asked:    {plain(_listed(found.asked))}",
    ]


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(words[:_SHOWN]) or "nothing"
    return shown if len(words) <= _SHOWN else f"{shown}, ... ({len(words):,} in all)"


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
