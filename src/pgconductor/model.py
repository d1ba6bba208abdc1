"""Records that cross the wall between the database and the rest, and the names of states and outcomes.

The words are those of the SQL enum, in its order; a test compares them. `Claimed` and `Outcome` are named tuples
because the worker makes one of each per execution (benchmarks/throughput.py); the others are frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

Isolation = Literal["read committed", "repeatable read", "serializable"]  # of the transaction of a step
ISOLATIONS: Final[tuple[Isolation, ...]] = ("read committed", "repeatable read", "serializable")


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
    version: str | None = None  # of the task, which to run


class Outcome(NamedTuple):
    """How a claim ended: one row of a flush."""

    id: UUID
    claim_no: int
    kind: str  # completed | failed | cancelled | retried | released | waiting; continued: by another verb than flush
    result: str | None = None  # JSON text; of a continued one an object of the new payload and version
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
class QueueLoad:
    """How loaded one queue is, as the database tells it. Ages and times are in seconds, rates per second.

    `ready`: due executions that nobody runs; with `is_ready_capped` there may be more. Of the `looked` first of them,
    `unserved` have a task that no living worker has. Of the living `workers`, with `capacity` runners, those that are
    `reporting`, with `reporting_capacity`, have told twice what they have done, in `seconds`: that is what the
    fields from `busy` on are of, None while there is none of them. `busy`: handlers that ran at a time.
    `claim_share`, `flush_share`: of a worker's time for which a claim, or a flush, was under way. `claimed`:
    executions that were not given back. `short_claims` brought less than they asked for, `locked_claims` nothing
    but what others had locked. `cpu`: of one core, the busiest process. `machine_load`: runnable processes per
    core, the busiest machine. `arrivals`, `departures`: executions that came into the queue or left it. `inserted`
    and `deleted` count those since the server's statistics were reset; both, like the rates, are None for a queue
    that nobody has registered.
    """

    queue: str
    registered: bool
    at: datetime
    ready: int
    is_ready_capped: bool
    oldest_ready: float | None
    running: int
    unserved: int
    looked: int
    tasks_without_worker: tuple[str, ...]
    workers: int
    capacity: int
    reporting: int
    reporting_capacity: int
    seconds: float | None
    busy: float | None
    claims: int | None
    empty_claims: int | None
    short_claims: int | None
    locked_claims: int | None
    claimed: int | None
    claim_seconds: float | None
    claim_share: float | None
    flush_share: float | None
    cpu: float | None
    machine_load: float | None
    claimed_rate: float | None
    ended_rate: float | None
    arrivals: float | None
    departures: float | None
    inserted: int | None
    deleted: int | None
    wanted_capacity: int


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


class Begun(NamedTuple):
    """A new execution that an operator's verb has made of another one."""

    id: UUID
    task: str


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


@dataclass(frozen=True, slots=True)
class OpenWait:
    """What a live execution waits for. `target`: a child's id, the name of an event, the id of a promise."""

    name: str
    kind: str  # sleep | child | event | promise | ...
    target: str | None
    scope: str | None  # the nursery it belongs to
    due_at: datetime | None  # when it ends by itself
    created_at: datetime


@dataclass(frozen=True, slots=True)
class ExecutionStatus:
    """Where one execution stands, and all that is known of it but its payload, result and steps."""

    id: UUID
    queue: str
    task: str
    version: str | None  # of the task
    state: State
    priority: int
    attempt: int  # attempts that have begun, what was given back not counted
    max_attempts: int | None  # None: the task's
    crashes: int
    generation: int  # how often it was retried by hand
    depth: int  # 0: nobody's child
    created_at: datetime
    run_at: datetime | None  # when it was or is due; of a waiting one the earliest end of a wait
    claimed_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None  # of a finished one; None: kept for ever
    deadline_at: datetime | None
    parent_id: UUID | None
    root_id: UUID | None  # the first of its family, None for that one itself
    origin_id: UUID | None  # what it was forked from, or is a restart of
    dedupe_key: str | None
    tags: tuple[str, ...]
    progress: Any  # as its handler last told
    is_cancel_requested: bool
    reason: str | None  # of the cancellation
    error: FailedAttempt | None  # the last one
    open_waits: int
    waits_for: tuple[OpenWait, ...]  # the first 100 of them


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What an execution did or waits for, under a name of its own."""

    name: str
    kind: str  # step | now | uuid | random | patch | sleep | child | event | promise | ...
    position: int  # in the order in which they began
    attempt: int
    outcome: str | None  # completed, failed, cancelled, elapsed, timed_out, ...; None: an open wait
    target: str | None  # of a wait: a child's id, an event's name, a promise's id
    scope: str | None  # the nursery of an open or resolved wait, while its execution is live
    value: Any  # plain JSON values
    is_withheld: bool  # there is a value, and your role may not see it
    error: FailedAttempt | None
    reason: str | None  # of a child's cancellation
    created_at: datetime
    resolved_at: datetime | None
    due_at: datetime | None  # when an open wait ends by itself


@dataclass(frozen=True, slots=True)
class ExecutionSummary:
    """One of the executions that a search found."""

    id: UUID
    queue: str
    task: str
    version: str | None
    state: State
    priority: int
    attempt: int
    crashes: int
    generation: int
    created_at: datetime
    run_at: datetime | None
    claimed_at: datetime | None
    finished_at: datetime | None
    dedupe_key: str | None
    tags: tuple[str, ...]
    parent_id: UUID | None
    root_id: UUID | None
    error_type: str | None  # of the last error
    reason: str | None  # of a cancellation


class Looked(NamedTuple):
    """What one statement of a search brought. `go_on`: the id at which to look further, None if all was looked at or
    the page is full.
    """

    found: list[ExecutionSummary]
    go_on: UUID | None


@dataclass(frozen=True, slots=True)
class StoredHistory:
    """What a live execution has recorded, as new code would find it. `attempt`: of the run that would go on."""

    id: UUID
    queue: str
    task: str
    version: str | None
    state: State
    attempt: int
    payload: str  # JSON text
    records: tuple[Record, ...]


class StoredHistories(NamedTuple):
    """What one statement brought. `go_on`: the id at which to look further, None if all was looked at or the limit was
    reached.
    """

    found: list[StoredHistory]
    go_on: UUID | None


class Trouble(StrEnum):
    """Why new code could not go on with what an execution has recorded."""

    TASK = "task"  # there is no such task any more
    VERSION = "version"  # the task has no such version any more
    PAYLOAD = "payload"  # it does not fit the handler's parameters any more
    DIVERGED = "diverged"  # the handler asks for something else than was recorded
    UNASKED = "unasked"  # it goes on without asking for what was recorded
    FAILED = "failed"  # it raises, before it has come as far as before, or for a value that does not fit any more
    UNDECIDED = "undecided"  # it waits for, or uses, what is not durable: nothing is known


@dataclass(frozen=True, slots=True)
class Divergence:
    """An execution that would not go on with the new code. `recorded` and `asked`: in words and in order."""

    id: UUID
    queue: str
    task: str
    version: str | None
    trouble: Trouble
    what: str
    recorded: tuple[str, ...]
    asked: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay check found. `checked`: executions tried, those that diverge among them."""

    checked: int
    divergences: tuple[Divergence, ...]
