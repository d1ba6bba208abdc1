"""Records that cross the wall between the database and the rest, and the names of states and outcomes.

The words are those of the SQL enum, in its order; a test compares them. `Claimed` and `Outcome` are named tuples
because the worker makes one of each per execution (benchmarks/throughput.py); the others are frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID


class State(StrEnum):
    """Where an execution stands."""

    SCHEDULED = "scheduled"
    READY = "ready"
    RUNNING = "running"
    WAITING = "waiting"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Claimed(NamedTuple):
    """An execution that this process may run: `(id, claim_no)` and the orchestrator's id are the token of every write
    for it.
    """

    id: UUID
    claim_no: int
    task: str
    attempt: int
    max_attempts: int | None  # of this execution; None: the task's
    payload: str | None  # JSON text; None: large, to be loaded when it runs
    waited: float  # seconds between its due time and the claim, by the database's clock
    timeout: float | None = None  # seconds for this attempt, as its invocation says; None: the task's
    deadline_in: float | None = None  # seconds left to it at the claim, perhaps negative; None: no deadline
    backoff: str | None = None  # JSON text, as its invocation says; None: the task's
    parent_id: UUID | None = None  # of a child


class Outcome(NamedTuple):
    """How a claim ended: one row of a flush."""

    id: UUID
    claim_no: int
    kind: str  # completed | failed | cancelled | retried | released | waiting
    result: str | None = None  # JSON text
    error: str | None = None  # JSON text
    delay: float = 0.0  # seconds until a retried or released one is due
    keep: float | None = None  # seconds to keep the finished row, should it end; None: for ever


class Record(NamedTuple):
    """What an execution did or waits for, under a name of its own; `outcome` is None while a wait is open.

    Values and errors are JSON texts.
    """

    name: str
    kind: str  # step | sleep | child | event | promise | ...
    position: int
    attempt: int
    outcome: str | None  # completed, failed, cancelled, elapsed, timed_out, received, resolved, rejected
    target: str | None = None  # of a wait: a child's id, an event's name, a promise's id
    scope: str | None = None  # the nursery it belongs to
    value: str | None = None
    error: str | None = None
    due_in: float | None = None  # seconds until an open wait is due, when it was read


class Cancellation(StrEnum):
    """What asking for the cancellation of an execution did."""

    CANCELLED = "cancelled"  # nobody ran it: it has ended now
    REQUESTED = "requested"  # it is running: its worker is told, and interrupts it
    FINISHED = "finished"  # it had ended before
    UNKNOWN = "unknown"  # there is no such execution, or nothing of it was kept


class PromiseAnswer(StrEnum):
    """What resolving or rejecting a promise did."""

    RESOLVED = "resolved"  # now, by this call, in whichever way
    ALREADY = "already"  # it was resolved or rejected before; that counts
    UNKNOWN = "unknown"  # there is no such promise, or its execution has ended


class Page(NamedTuple):
    """What one look at a channel found: its state, and items with their numbers."""

    state: str  # open | closed | absent | gone
    items: list[tuple[int, str]]


class CancelCounts(NamedTuple):
    """What a cancellation by filter did: executions ended at once, and running ones whose handlers are cancelled."""

    cancelled: int
    requested: int


@dataclass(frozen=True, slots=True)
class Signals:
    """What an orchestrator is asked to do, until it has been done."""

    stop_requested: bool
    cancelled: Mapping[UUID, tuple[int, str | None]]  # claim and reason of the running executions to cancel
    suspects: tuple[str, ...]  # queues with an execution on its last life
    has_errands: bool = False  # something is to be done that anybody may do: see runtime/errands.py


class Invoked(NamedTuple):
    """What `invoke` did for one position of its call."""

    id: UUID
    created: bool  # False: a live execution holds the dedupe key


@dataclass(frozen=True, slots=True)
class Ended:
    """How a finished execution ended."""

    id: UUID
    state: State
    result: str | None
    error: str | None  # JSON text: type, message, traceback
    reason: str | None  # of a cancellation


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """What one failed attempt of an execution left. `at`: when it was recorded, by the database's clock."""

    attempt: int | None
    at: datetime | None
    type: str
    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an execution stands now; `state` is None when no row of it is there."""

    id: UUID
    state: State | None
    task: str | None
    queue: str | None
    live_workers: int
    due_in: float | None


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Counts of one queue. Ages are in seconds."""

    queue: str
    registered: bool
    scheduled: int
    ready: int
    running: int
    waiting: int
    completed: int
    failed: int
    cancelled: int
    workers: int
    oldest_ready: float | None
    tasks_without_worker: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OrchestratorStatus:
    """One incarnation of an orchestrator, as the database knows it."""

    id: UUID
    name: str
    program_version: str
    alive: bool
    started_at: datetime
    heartbeat_age: float
    stop_requested: bool  # a newer program's migration waits for it
    queues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Maintenance:
    """What one call of `maintain` did. Not `lock_held`: another session is at it, and nothing was done."""

    lock_held: bool
    slots_emptied: int
    rows_removed: int  # an estimate, from the server's statistics
    payloads_removed: int  # finished executions with a large payload, which go one by one
    slots_made: int
    slots_busy: int  # expired, but somebody reads them: the next call tries again
    tombstones: int  # orchestrators that had been dead for a day
    more: bool  # there is more to do: call again soon


class Retry(StrEnum):
    """What asking for a failed or cancelled execution to begin anew did."""

    RETRIED = "retried"  # it is ready
    LIVE = "live"  # it is under way: it was retried before, or has not ended
    DUPLICATE = "duplicate"  # a live execution holds its dedupe key
    COMPLETED = "completed"  # it did what it was to do, and stays as it is
    UNKNOWN = "unknown"  # there is no such execution, or nothing of it was kept


class RetryCounts(NamedTuple):
    """What a retry by filter did: executions that begin anew, and those whose dedupe key a live execution holds."""

    retried: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An execution that failed or was cancelled, and is still kept."""

    id: UUID
    queue: str
    task: str
    state: State
    attempts: int
    crashes: int
    generation: int  # how often it was retried by hand
    created_at: datetime
    finished_at: datetime
    expires_at: datetime | None  # None: kept for ever
    dedupe_key: str | None
    error: FailedAttempt | None  # the last one
    reason: str | None  # of a cancellation
