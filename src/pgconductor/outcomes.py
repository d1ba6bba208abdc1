"""What is said about an execution: its result, or the error that tells how it ended or where it stands.

Pure: what both clients share once they have asked the database.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar
from uuid import UUID

from .codec import printable
from .errors import ExecutionCancelled, ExecutionFailed, ResultNotKept, WaitTimeout
from .model import Ended, Standing, State
from .records import error_record
from .tasks import Task

R = TypeVar("R")

FINISHED: Final = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


def outcome(task: Task[..., R], ended: Ended) -> R:
    """Return the result of a finished execution, or raise what it ended with."""
    subject = _subject(task, ended.id)
    if ended.state is State.COMPLETED:
        return task.result.decode("null" if ended.result is None else ended.result)
    if ended.state is State.CANCELLED:
        said = f": {printable(ended.reason)}" if ended.reason else ""
        raise ExecutionCancelled(f"{subject} was cancelled{said}", ended.reason)
    record = error_record(ended.error)
    said = ": ".join(printable(record[name]) for name in ("type", "message") if record.get(name))
    failure = ExecutionFailed(f"{subject} failed" + (f": {said}" if said else ""), record)
    if traceback := record.get("traceback"):
        failure.add_note(f"Traceback of the last attempt:\n{traceback}")
    raise failure


def not_kept(task: Task[..., Any], execution_id: UUID) -> ResultNotKept:
    """The error for an execution of which there is no row."""
    return ResultNotKept(
        f"there is no row of {_subject(task, execution_id)}: it has finished and its result was not kept, or the "
        f"transaction that invoked it was rolled back or is not yet committed"
    )


def wait_timeout(task: Task[..., Any], timeout: float | None, standing: Standing) -> WaitTimeout:
    """The error for an execution that is still under way; it says what it is waiting for."""
    queue = printable(standing.queue or "")
    match standing.state:
        case State.SCHEDULED | State.WAITING if standing.due_in is not None:
            told = f"{standing.state}, due in {standing.due_in:.3g} s"
        case _:
            told = str(standing.state)
    if standing.state is not State.RUNNING and not standing.live_workers:
        told += f"; no live worker has task {printable(standing.task or task.name)!r} on queue {queue!r}"
    else:
        told += f" on queue {queue!r}"
    return WaitTimeout(f"{_subject(task, standing.id)} did not finish{_within(timeout)}: {told}")


def unanswered_timeout(task: Task[..., Any], execution_id: UUID, timeout: float | None) -> WaitTimeout:
    """The error for an execution of which nothing is known, since the database does not answer."""
    return WaitTimeout(
        f"{_subject(task, execution_id)} is not known to have finished{_within(timeout)}: the database does not answer"
    )


def _subject(task: Task[..., Any], execution_id: UUID) -> str:
    return f"execution {execution_id} of task {printable(task.name)!r}"


def _within(timeout: float | None) -> str:
    return f" within {timeout:g} s" if timeout else " yet"
