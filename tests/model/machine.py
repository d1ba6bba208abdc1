"""The specification of the verbs as a pure function: `transition(state, event)` gives the next state and the answer.

One database: live and finished executions, orchestrators, registered tasks and queues, the clock. An event is one call
of a verb, with what only the database can know (new ids) put in; an answer is what the call's decoder gives. Nothing
here reads a clock, a database or a random number. What concurrency adds (locks, skipped rows) is not here: every verb
runs alone.

Verbs take sets of rows, one partition after the other, and what is of one partition happens at once: of a parent and a
child that end together the parent knows no more than before.

`breaches(before, event, after)` are the invariants I1 to I14 of the specification, as far as the verbs are there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar
from uuid import UUID

from pgconductor.db.calls import Claim, ResolvedWait, SavedStep, StartedWait
from pgconductor.model import Cancellation, Claimed, Invoked, Outcome, Record, Signals

T = TypeVar("T")

OVERFLOW = 0  # number of the partition of queues that nobody has registered
DAY = 86400.0
WEEK = 7 * DAY
MAX_CRASHES = 3
MAX_ERRORS = 50
MAX_DEPTH = 16
ENDED = ("completed", "failed", "cancelled")
LEASE_LOST = "lease lost"  # the answer of a verb that raises LeaseLost


@dataclass(frozen=True, slots=True)
class Error:
    """One entry of an execution's errors: what it says, of which attempt, when."""

    type: str
    attempt: int
    at: float


@dataclass(frozen=True, slots=True)
class Execution:
    """A live execution; in `Finished`, as it was when it ended."""

    id: UUID
    queue_no: int
    queue: str
    task: str
    state: str
    priority: int
    run_at: float | None  # None: it waits for nothing that has a time
    created_at: float
    payload: str
    is_large: bool
    key: str | None = None
    max_attempts: int | None = None
    timeout: float | None = None
    deadline_at: float | None = None
    tags: tuple[str, ...] | None = None
    claim_no: int = 0
    attempt: int = 0
    crashes: int = 0
    generation: int = 0
    owner: UUID | None = None
    claimed_at: float | None = None
    outcome: str | None = None
    outcome_claim: int | None = None
    errors: tuple[Error, ...] = ()
    cancel_requested_at: float | None = None
    cancel_reason: str | None = None
    parent: UUID | None = None
    root: UUID | None = None
    depth: int = 0
    wait_name: str | None = None  # of the parent's wait for it
    is_durable: bool = False  # it has records

    @property
    def order(self) -> tuple[int, float, UUID]:
        """In which order a claim takes them."""
        return (-self.priority, -1e99 if self.run_at is None else self.run_at, self.id)


@dataclass(frozen=True, slots=True)
class Step:
    """What an execution has done, or a wait of a former life. `error`: its type, or "reason ..." of a cancellation."""

    name: str
    kind: str
    position: int
    claim_no: int
    attempt: int
    at: float
    value: str | None = None
    error: str | None = None
    outcome: str | None = None
    target: str | None = None
    resolved_at: float | None = None  # of a wait

    @property
    def failed_at(self) -> float | None:
        """When, if it has failed; of a step, before all that came after it."""
        if self.error is None and self.outcome != "timed_out":
            return None
        return -math.inf if self.resolved_at is None else self.resolved_at

    def past(self) -> Step:
        """As the finished row keeps it."""
        return Step(
            self.name, self.kind, self.position, self.claim_no, self.attempt, self.at, self.value, self.error,
            self._final(), self.target, self.resolved_at,
        )  # fmt: skip

    def _final(self) -> str | None:
        return self.outcome or ("completed" if self.error is None else "failed")


@dataclass(frozen=True, slots=True)
class Wait(Step):
    """What an execution waits for; `outcome` is None while it is open."""

    scope: str | None = None
    due_at: float | None = None
    on_close: str | None = None
    is_seen: bool = False

    def _final(self) -> str | None:
        return self.outcome


Key: TypeAlias = tuple[UUID, str]  # execution and name of a record


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished row. `execution.state` is the final one, `execution.owner` who ended it with which claim."""

    execution: Execution
    finished_at: float
    expires_at: float | None
    result: str | None
    history: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Orchestrator:
    """One incarnation, a tombstone when `died_at` is set."""

    id: UUID
    queues: tuple[str, ...]
    tasks: tuple[str, ...]
    heartbeat_at: float
    expires_at: float
    epoch: int
    died_at: float | None = None
    has_session: bool = False
    stop_requested: bool = False


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A registered task."""

    queue: str
    keep_completed: float | None = DAY
    keep_failed: float | None = WEEK


@dataclass(frozen=True, slots=True)
class State:
    """The database."""

    now: float = 0.0
    epoch: int = 0
    queues: Mapping[str, int] = field(default_factory=dict[str, int])
    tasks: Mapping[str, TaskRow] = field(default_factory=dict[str, TaskRow])
    orchestrators: Mapping[UUID, Orchestrator] = field(default_factory=dict[UUID, Orchestrator])
    live: Mapping[UUID, Execution] = field(default_factory=dict[UUID, Execution])
    finished: Mapping[UUID, Finished] = field(default_factory=dict[UUID, Finished])
    steps: Mapping[Key, Step] = field(default_factory=dict[Key, Step])
    waits: Mapping[Key, Wait] = field(default_factory=dict[Key, Wait])
    closings: Mapping[UUID, tuple[str, float]] = field(default_factory=dict[UUID, tuple[str, float]])  # reason, when
    sessions: frozenset[UUID] = frozenset()  # orchestrators whose session lock is held

    def is_alive(self, owner: UUID) -> bool:
        """May it claim?"""
        row = self.orchestrators.get(owner)
        return row is not None and row.died_at is None and row.expires_at > self.now and row.epoch == self.epoch

    def keys(self) -> dict[tuple[str, str, str], UUID]:
        """The dedupe keys that are taken, and by whom."""
        return {(e.queue, e.task, e.key): e.id for e in self.live.values() if e.key is not None}

    def records(self, execution: UUID) -> list[Step]:
        """All of an execution, in the order of the finished row."""
        mine: list[Step] = [s for (i, _), s in self.steps.items() if i == execution]
        mine += [w for (i, _), w in self.waits.items() if i == execution]
        return sorted(mine, key=lambda r: (r.position, r.name))

    def waits_of(self, execution: UUID) -> list[Wait]:
        return [w for (i, _), w in self.waits.items() if i == execution]

    def is_resumable(self, execution: UUID) -> bool:
        """Whether a waiting execution has something to go on with that it has not been told."""
        waits = self.waits_of(execution)
        for wait in waits:
            if wait.resolved_at is None or wait.is_seen:
                continue
            scope = [w for w in waits if w.scope == wait.scope]
            if wait.scope is None or all(w.resolved_at is not None for w in scope):
                return True
            # The first failure of a scope; after that all are waited for together.
            if wait.outcome != "completed" and not any(w.is_seen and w.outcome != "completed" for w in scope):
                return True
        return False

    def keep_failed(self, task: str) -> float | None:
        row = self.tasks.get(task)
        return WEEK if row is None else row.keep_failed

    def partitions(self, queue: str) -> tuple[int, ...]:
        """Where executions of a queue are: its own, if it is registered, and the overflow."""
        own = self.queues.get(queue)
        return (OVERFLOW,) if own is None else (own, OVERFLOW)


# --- events ---


@dataclass(frozen=True, slots=True)
class Advance:
    """The clock moves, perhaps back."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Restart:
    """The server restarts, or another one is promoted: the epoch changes, session locks go."""


@dataclass(frozen=True, slots=True)
class RegisterQueue:
    queue: str


@dataclass(frozen=True, slots=True)
class RegisterTasks:
    names: tuple[str, ...]
    queue: str
    keep_completed: tuple[float | None, ...] | None = None
    keep_failed: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Register:
    """An orchestrator registers, each of its workers with the same tasks."""

    owner: UUID
    lease: float
    queues: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    owner: UUID
    lease: float


@dataclass(frozen=True, slots=True)
class HoldSession:
    owner: UUID


@dataclass(frozen=True, slots=True)
class SessionEnds:
    owner: UUID


@dataclass(frozen=True, slots=True)
class New:
    """One position of `invoke_many`. `id` is what it gets if it is created; delay in seconds, deadline from now."""

    id: UUID
    queue: str | None
    task: str
    payload: str = "{}"
    is_large: bool = False
    priority: int = 0
    delay: float | None = None
    key: str | None = None
    max_attempts: int | None = None
    timeout: float | None = None
    deadline_in: float | None = None
    tags: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class InvokeMany:
    items: tuple[New, ...]


@dataclass(frozen=True, slots=True)
class ClaimSome:
    owner: UUID
    queue: str
    tasks: tuple[str, ...]
    limit: int


@dataclass(frozen=True, slots=True)
class ClaimSuspect:
    owner: UUID
    queue: str
    tasks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadPayload:
    execution: UUID
    claim_no: int
    owner: UUID


@dataclass(frozen=True, slots=True)
class Flush:
    """`error` of an outcome is the type of the error object here; ids are distinct."""

    owner: UUID
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, slots=True)
class NewRecord:
    """One position of `save_steps`: exactly one of `value` (JSON text) and `error` (its type)."""

    execution: UUID
    claim_no: int
    name: str
    value: str | None = "1"
    error: str | None = None
    position: int = 0
    kind: str = "step"


@dataclass(frozen=True, slots=True)
class SaveSteps:
    owner: UUID
    items: tuple[NewRecord, ...]


@dataclass(frozen=True, slots=True)
class BegunWait:
    """One position of `start_waits`. Of a child `new`, whose id it gets if it is made."""

    execution: UUID
    claim_no: int
    name: str
    position: int = 0
    scope: str | None = None
    due_in: float | None = None
    on_close: str | None = None
    new: New | None = None

    @property
    def kind(self) -> str:
        return "sleep" if self.new is None else "child"


@dataclass(frozen=True, slots=True)
class StartWaits:
    """Names are distinct, and of waits only."""

    owner: UUID
    items: tuple[BegunWait, ...]


@dataclass(frozen=True, slots=True)
class LoadHistory:
    owner: UUID
    execution: UUID
    claim_no: int


@dataclass(frozen=True, slots=True)
class ReadWaits:
    owner: UUID
    claims: tuple[tuple[UUID, int], ...]


@dataclass(frozen=True, slots=True)
class RequestClose:
    owner: UUID
    execution: UUID
    claim_no: int
    names: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class CloseChildren:
    """One call, with room for all there are."""


@dataclass(frozen=True, slots=True)
class Recover:
    queue: str


@dataclass(frozen=True, slots=True)
class ReleaseUnknown:
    owner: UUID
    queue: str
    known: tuple[UUID, ...] = ()


@dataclass(frozen=True, slots=True)
class Retire:
    owner: UUID


@dataclass(frozen=True, slots=True)
class Succeed:
    old: UUID
    new: UUID
    lease: float
    claims: tuple[tuple[UUID, int], ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    executions: tuple[UUID, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class CancelMatching:
    """With a limit that all fit into: which ones a smaller limit takes is not said."""

    reason: str | None = None
    queue: str | None = None
    task: str | None = None
    states: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    created_before: float | None = None


@dataclass(frozen=True, slots=True)
class ReadSignals:
    owner: UUID
    queues: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retry:
    executions: tuple[UUID, ...]


@dataclass(frozen=True, slots=True)
class Maintain:
    """Which expired rows go is the slots' matter: `removed` are those that went."""

    removed: frozenset[UUID]


Event: TypeAlias = (
    Advance
    | Restart
    | RegisterQueue
    | RegisterTasks
    | Register
    | Heartbeat
    | HoldSession
    | SessionEnds
    | InvokeMany
    | ClaimSome
    | ClaimSuspect
    | LoadPayload
    | Flush
    | SaveSteps
    | StartWaits
    | LoadHistory
    | ReadWaits
    | RequestClose
    | CloseChildren
    | Recover
    | ReleaseUnknown
    | Retire
    | Succeed
    | Cancel
    | CancelMatching
    | ReadSignals
    | Retry
    | Maintain
)


def transition(state: State, event: Event) -> tuple[State, Any]:
    """What `event` makes of `state`, and what its caller is told."""
    match event:
        case Advance():
            return replace(state, now=state.now + event.seconds), None
        case Restart():
            return replace(state, epoch=state.epoch + 1, sessions=frozenset()), None
        case RegisterQueue():
            queues = {event.queue: len(state.queues) + 1, **state.queues}
            return replace(state, queues=queues), queues[event.queue]
        case RegisterTasks():
            return _register_tasks(state, event), None
        case Register():
            row = Orchestrator(event.owner, event.queues, event.tasks, state.now, state.now + event.lease, state.epoch)
            return _with_orchestrators(state, row), None
        case Heartbeat():
            if not state.is_alive(event.owner):
                return state, False
            row = state.orchestrators[event.owner]
            return _with_orchestrators(
                state, replace(row, heartbeat_at=state.now, expires_at=state.now + event.lease)
            ), True
        case HoldSession():
            held = replace(state, sessions=state.sessions | {event.owner})
            known = state.orchestrators.get(event.owner)
            if known is None or known.died_at is not None:
                return held, False
            return _with_orchestrators(held, replace(known, has_session=True)), True
        case SessionEnds():
            return replace(state, sessions=state.sessions - {event.owner}), None
        case InvokeMany():
            return _invoke(state, event.items)
        case ClaimSome():
            return _claim(state, event)
        case ClaimSuspect():
            return _claim_suspect(state, event)
        case LoadPayload():
            execution = _held(state, event.execution, event.claim_no, event.owner)
            return state, execution.payload if execution is not None and execution.is_large else None
        case Flush():
            return _flush(state, event)
        case SaveSteps():
            return _save_steps(state, event)
        case StartWaits():
            return _start_waits(state, event)
        case LoadHistory():
            return _load_history(state, event)
        case ReadWaits():
            return _read_waits(state, event)
        case RequestClose():
            return _request_close(state, event)
        case CloseChildren():
            return _close_children(state)
        case Recover():
            return _recover(state, event.queue)
        case ReleaseUnknown():
            return _release(state, event.owner, (event.queue,), event.known)
        case Retire():
            known = state.orchestrators.get(event.owner)
            if known is None:
                return state, 0
            released, count = _release(state, event.owner, known.queues)
            others = {owner: row for owner, row in released.orchestrators.items() if owner != event.owner}
            return replace(released, orchestrators=others), count
        case Succeed():
            return _succeed(state, event)
        case Cancel():
            return _cancel(state, event)
        case CancelMatching():
            return _cancel_matching(state, event)
        case ReadSignals():
            return state, _signals(state, event)
        case Retry():
            return _retry(state, event.executions)
        case Maintain():
            kept = {i: row for i, row in state.finished.items() if i not in event.removed}
            alive = {i: row for i, row in state.orchestrators.items() if not _is_forgotten(row, state.now)}
            return replace(state, finished=kept, orchestrators=alive), None


# --- the verbs ---


def _with_orchestrators(state: State, *rows: Orchestrator) -> State:
    return replace(state, orchestrators={**state.orchestrators, **{row.id: row for row in rows}})


def _with_live(state: State, *rows: Execution) -> State:
    return replace(state, live={**state.live, **{row.id: row for row in rows}})


def _is_forgotten(row: Orchestrator, now: float) -> bool:
    return row.died_at is not None and row.died_at < now - DAY


def _held(state: State, execution: UUID, claim_no: int, owner: UUID) -> Execution | None:
    """The execution, if the token is the one of the claim under way."""
    row = state.live.get(execution)
    if row is None or (row.state, row.claim_no, row.owner) != ("running", claim_no, owner):
        return None
    return row


def _register_tasks(state: State, event: RegisterTasks) -> State:
    tasks = dict(state.tasks)
    for n, name in enumerate(event.names):
        row = replace(tasks.get(name, TaskRow(event.queue)), queue=event.queue)
        if event.keep_completed is not None:
            row = replace(row, keep_completed=event.keep_completed[n])
        if event.keep_failed is not None:
            row = replace(row, keep_failed=event.keep_failed[n])
        tasks[name] = row
    return replace(state, tasks=tasks)


def _invoke(state: State, items: tuple[New, ...]) -> tuple[State, list[Invoked]]:
    live = dict(state.live)
    keys = state.keys()
    answer: list[Invoked] = []
    for new in items:
        made = _made(state, new)
        if new.key is not None:
            holder = keys.setdefault((made.queue, new.task, new.key), new.id)
            if holder != new.id:
                answer.append(Invoked(holder, False))
                continue
        live[new.id] = made
        answer.append(Invoked(new.id, True))
    return replace(state, live=live), answer


def _made(state: State, new: New) -> Execution:
    registered = state.tasks.get(new.task)
    queue = new.queue or (registered.queue if registered else "default")
    run_at = state.now + (new.delay or 0.0)
    return Execution(
        new.id,
        state.queues.get(queue, OVERFLOW),
        queue,
        new.task,
        "ready" if run_at <= state.now else "scheduled",
        new.priority,
        run_at,
        state.now,
        new.payload,
        new.is_large,
        new.key,
        new.max_attempts,
        new.timeout,
        None if new.deadline_in is None else state.now + new.deadline_in,
        new.tags,
    )


def _claimed(state: State, row: Execution, owner: UUID) -> tuple[Execution, Claimed]:
    row = replace(
        row, state="running", owner=owner, claim_no=row.claim_no + 1, attempt=row.attempt + 1, claimed_at=state.now
    )
    return row, Claimed(
        row.id,
        row.claim_no,
        row.task,
        row.attempt,
        row.max_attempts,
        None if row.is_large else row.payload,
        state.now - (row.run_at or 0.0),
        row.timeout,
        None if row.deadline_at is None else row.deadline_at - state.now,
        None,
        row.parent,
    )


def _claim(state: State, event: ClaimSome) -> tuple[State, object]:
    if not state.is_alive(event.owner):
        return state, LEASE_LOST
    mine = [e for e in state.live.values() if e.queue == event.queue]
    # Told before what is due becomes ready, so that its time may be past.
    later = [e for e in mine if e.state in ("scheduled", "waiting")]
    due = min((e.run_at for e in later if e.run_at is not None), default=None)
    state = _with_live(
        state, *(replace(e, state="ready") for e in later if e.run_at is not None and e.run_at <= state.now)
    )
    ready = [
        e
        for e in state.live.values()
        if e.queue == event.queue and e.state == "ready" and e.task in event.tasks and e.crashes < MAX_CRASHES - 1
    ]
    picked = sorted(ready, key=lambda e: e.order)[: event.limit]
    if not picked:
        return state, Claim([], None if due is None else max(0.0, due - state.now))
    pairs = [_claimed(state, e, event.owner) for e in picked]
    return _with_live(state, *(row for row, _ in pairs)), Claim([claimed for _, claimed in pairs], None)


def _claim_suspect(state: State, event: ClaimSuspect) -> tuple[State, object]:
    if not state.is_alive(event.owner):
        return state, LEASE_LOST
    for no in state.partitions(event.queue):
        suspects = [
            e
            for e in state.live.values()
            if (e.queue_no, e.queue, e.state) == (no, event.queue, "ready")
            and e.task in event.tasks
            and e.crashes >= MAX_CRASHES - 1
        ]
        if suspects:
            row, claimed = _claimed(state, min(suspects, key=lambda e: e.order), event.owner)
            return _with_live(state, row), claimed
    return state, None


def _add_error(errors: tuple[Error, ...], error: str | None, attempt: int, now: float) -> tuple[Error, ...]:
    if error is None:
        return errors
    if len(errors) >= MAX_ERRORS:
        errors = (errors[0], *errors[2:])
    return (*errors, Error(error, attempt, now))


def _end(state: State, *ends: tuple[Execution, float | None, str | None, str | None]) -> State:
    """The state after executions have ended by one statement: as they are then, the time to keep, result, last error.

    Their records go into the finished rows, children are noted to be cancelled, and what their parents wait for is
    resolved; those are to be woken (`_wake`).
    """
    gone = {row.id for row, *_ in ends}
    finished, waits, closings = dict(state.finished), dict(state.waits), dict(state.closings)
    for row, keep, result, error in ends:
        if keep is None or keep > 0:
            history = tuple(r.past() for r in state.records(row.id))
            finished[row.id] = Finished(row, state.now, None if keep is None else state.now + keep, result, history)
        for wait in state.waits_of(row.id):
            del waits[row.id, wait.name]
            if wait.on_close == "cancel" and wait.resolved_at is None and wait.target is not None:
                closings.setdefault(UUID(wait.target), (f"its parent has ended: {row.state}", state.now))
        if row.parent is None or row.parent in gone or row.wait_name is None:
            continue
        mine = waits.get((row.parent, row.wait_name))
        if mine is not None and mine.target == str(row.id) and mine.resolved_at is None:
            waits[row.parent, row.wait_name] = replace(
                mine, resolved_at=state.now, outcome=row.state, value=result if row.state == "completed" else None,
                error={"failed": error, "cancelled": f"reason {row.cancel_reason}"}.get(row.state),
            )  # fmt: skip
    return replace(
        state,
        live={i: e for i, e in state.live.items() if i not in gone},
        finished=finished,
        steps={key: step for key, step in state.steps.items() if key[0] not in gone},
        waits=waits,
        closings=closings,
    )


def _wake(state: State, executions: Iterable[UUID | None]) -> State:
    """Make those ready that wait and can go on."""
    rows = [state.live[i] for i in executions if i is not None and i in state.live]
    woken = [row for row in rows if row.state == "waiting" and state.is_resumable(row.id)]
    return _with_live(state, *(replace(row, state="ready", run_at=state.now) for row in woken))


def _apply(state: State, owner: UUID, outcomes: Sequence[Outcome], crashes: int = 0) -> tuple[State, list[Outcome]]:
    """The state after outcomes of one partition are written, and those whose token did not hold. The parents of those
    that ended are not woken yet.
    """
    ends: list[tuple[Execution, float | None, str | None, str | None]] = []
    again: list[Execution] = []
    refused: list[Outcome] = []
    for outcome in outcomes:
        row = _held(state, outcome.id, outcome.claim_no, owner)
        if row is None:
            refused.append(outcome)
            continue
        errors = _add_error(row.errors, outcome.error, row.attempt, state.now)
        if outcome.kind in ENDED or row.cancel_requested_at is not None:
            final = outcome.kind if outcome.kind in ("completed", "failed") else "cancelled"
            row = replace(row, state=final, errors=errors, attempt=row.attempt - crashes, crashes=row.crashes + crashes)
            last = errors[-1].type if errors else None
            ends.append((row, outcome.keep, None if final == "cancelled" else outcome.result, outcome.error or last))
            continue
        again.append(
            replace(
                row,
                state="waiting" if outcome.kind == "waiting" else "scheduled" if outcome.delay > 0 else "ready",
                run_at=_due_again(state, row, outcome),
                attempt=row.attempt - (outcome.kind != "retried"),
                crashes=row.crashes + crashes,
                owner=None,
                claimed_at=None,
                outcome=outcome.kind,
                outcome_claim=row.claim_no,
                errors=errors,
            )
        )
    state = _with_live(_end(state, *ends), *again)
    for outcome in outcomes:
        row = state.live.get(outcome.id)
        if (
            outcome.kind == "waiting"
            and row is not None
            and (row.state, row.outcome_claim) == ("waiting", outcome.claim_no)
        ):
            state = _await(state, row.id, outcome.result)
            state = _wake(state, [row.id])
    retried = [row.id for row in again if row.outcome == "retried" and row.is_durable]
    return _forget_failures(state, retried), refused


def _await(state: State, execution: UUID, names: str | None) -> State:
    """The handler was parked for these waits, each by itself: whichever is over wakes it, though it was told."""
    waits = dict(state.waits)
    for name in json.loads(names) if names else ():
        wait = waits.get((execution, name))
        if wait is not None:
            scope = None if wait.scope is None else name
            waits[execution, name] = replace(wait, is_seen=False, scope=scope)
    return replace(state, waits=waits)


def _due_again(state: State, row: Execution, outcome: Outcome) -> float | None:
    if outcome.kind == "waiting":
        times = [w.due_at for w in state.waits_of(row.id) if w.due_at is not None and w.resolved_at is None]
        return min([*times, *([] if row.deadline_at is None else [row.deadline_at])], default=None)
    return state.now + outcome.delay if outcome.delay > 0 or outcome.kind == "retried" else row.run_at


def _trailing_failures(records: Sequence[Step]) -> list[Step]:
    """Those that nothing was begun after: of what has a later place, nothing was made after they failed."""
    found: list[Step] = []
    for record in records:
        if (failed_at := record.failed_at) is None:
            continue
        later = [r.at for r in records if r.failed_at is None and r.position > record.position]
        if not later or max(later) < failed_at:
            found.append(record)
    return found


def _forget_failures(state: State, executions: Iterable[UUID]) -> State:
    """Failures that nothing was begun after are tried again."""
    gone = {(i, r.name) for i in executions for r in _trailing_failures(state.records(i))}
    return replace(
        state,
        steps={key: step for key, step in state.steps.items() if key not in gone},
        waits={key: wait for key, wait in state.waits.items() if key not in gone},
    )


def _by_partition(items: Iterable[T], number: Callable[[T], int]) -> Iterator[list[T]]:
    """In the order of the partitions' numbers."""
    groups: dict[int, list[T]] = {}
    for item in items:
        groups.setdefault(number(item), []).append(item)
    for _, group in sorted(groups.items()):
        yield group


def _parents(state: State, outcomes: Iterable[UUID]) -> list[UUID]:
    return [p for i in outcomes if i in state.live and (p := state.live[i].parent) is not None]


def _flush(state: State, event: Flush) -> tuple[State, dict[UUID, str]]:
    refused: list[Outcome] = []
    parents = _parents(state, (o.id for o in event.outcomes))
    where = {i: row.queue_no for i, row in state.live.items()}
    for group in _by_partition(event.outcomes, lambda o: where.get(o.id, OVERFLOW)):
        state, left = _apply(state, event.owner, group)
        refused += left
    state = _wake(state, parents)
    return state, {outcome.id: _status(state, event.owner, outcome) for outcome in refused}


# --- records ---


def _hold(state: State, owner: UUID, claims: Iterable[tuple[UUID, int]]) -> tuple[State, dict[UUID, Execution]]:
    """Those of these claims that hold, marked as having a history."""
    held = {i: replace(row, is_durable=True) for i, no in claims if (row := _held(state, i, no, owner)) is not None}
    return _with_live(state, *held.values()), held


def _save_steps(state: State, event: SaveSteps) -> tuple[State, list[SavedStep]]:
    state, held = _hold(state, event.owner, ((n.execution, n.claim_no) for n in event.items))
    steps = dict(state.steps)
    answer: list[SavedStep] = []
    for new in event.items:
        key = (new.execution, new.name)
        row = held.get(new.execution)
        if row is None:
            answer.append(SavedStep("fenced", None, None))
        elif key in steps:
            answer.append(SavedStep("stored", steps[key].value, steps[key].error))
        else:
            steps[key] = Step(
                new.name, new.kind, new.position, new.claim_no, row.attempt, state.now, new.value, new.error
            )
            answer.append(SavedStep("saved", new.value, None))
    return replace(state, steps=steps), answer


def _start_waits(state: State, event: StartWaits) -> tuple[State, list[StartedWait]]:
    state, held = _hold(state, event.owner, ((w.execution, w.claim_no) for w in event.items))
    waits, live = dict(state.waits), dict(state.live)
    answer: list[StartedWait] = []
    for item in event.items:
        row = held.get(item.execution)
        if row is None:
            answer.append(StartedWait("fenced", None, None, None, None, None))
            continue
        key = (item.execution, item.name)
        if key not in waits and item.kind == "child" and row.depth >= MAX_DEPTH:
            answer.append(StartedWait("too_deep", None, None, None, None, None))
            continue
        if key not in waits:
            due_at = None if item.due_in is None else state.now + item.due_in
            is_over = item.kind == "sleep" and due_at is not None and due_at <= state.now
            waits[key] = Wait(
                item.name, item.kind, item.position, item.claim_no, row.attempt, state.now,
                outcome="elapsed" if is_over else None, target=None if item.new is None else str(item.new.id),
                scope=item.scope, due_at=due_at, on_close=item.on_close, resolved_at=state.now if is_over else None,
                is_seen=is_over,
            )  # fmt: skip
            if item.new is not None:
                child = _made(state, item.new)
                limits = [limit for limit in (row.deadline_at, child.deadline_at) if limit is not None]
                live[child.id] = replace(
                    child, parent=row.id, root=row.root or row.id, depth=row.depth + 1, wait_name=item.name,
                    deadline_at=min(limits, default=None),
                )  # fmt: skip
        wait = waits[key]
        answer.append(
            StartedWait(
                "open" if wait.resolved_at is None else "resolved", wait.outcome, wait.value, wait.error,
                None if wait.due_at is None else wait.due_at - state.now, wait.target,
            )
        )  # fmt: skip
    return replace(state, waits=waits, live=live), answer


def _settle(state: State, executions: Iterable[UUID]) -> tuple[State, list[tuple[UUID, Wait]]]:
    """Resolve what is due and count all that is resolved as told; returns what was told now."""
    told: list[tuple[UUID, Wait]] = []
    for i in executions:
        for wait in state.waits_of(i):
            if wait.resolved_at is None and wait.due_at is not None and wait.due_at <= state.now:
                outcome = "elapsed" if wait.kind == "sleep" else "timed_out"
                told.append((i, replace(wait, resolved_at=state.now, outcome=outcome, is_seen=True)))
            elif wait.resolved_at is not None and not wait.is_seen:
                told.append((i, replace(wait, is_seen=True)))
    return replace(state, waits={**state.waits, **{(i, w.name): w for i, w in told}}), told


def _load_history(state: State, event: LoadHistory) -> tuple[State, list[Record] | None]:
    state, held = _hold(state, event.owner, [(event.execution, event.claim_no)])
    if not held:
        return state, None
    state, _ = _settle(state, held)
    records: list[Record] = []
    for r in state.records(event.execution):
        if isinstance(r, Wait):
            due_in = r.due_at - state.now if r.resolved_at is None and r.due_at is not None else None
            records.append(
                Record(r.name, r.kind, r.position, r.attempt, r.outcome, r.target, r.scope, r.value, r.error, due_in)
            )
        else:
            outcome = r.outcome or ("completed" if r.error is None else "failed")
            records.append(
                Record(r.name, r.kind, r.position, r.attempt, outcome, r.target, None, r.value, r.error, None)
            )
    return state, records


def _read_waits(state: State, event: ReadWaits) -> tuple[State, list[ResolvedWait]]:
    state, held = _hold(state, event.owner, event.claims)
    state, told = _settle(state, held)
    return state, sorted(ResolvedWait(i, w.name, w.outcome or "", w.value, w.error) for i, w in told)


def _request_close(state: State, event: RequestClose) -> tuple[State, int]:
    state, held = _hold(state, event.owner, [(event.execution, event.claim_no)])
    wanted = [
        UUID(w.target)
        for i in held
        for w in state.waits_of(i)
        if w.name in event.names and w.kind == "child" and w.resolved_at is None and w.target is not None
    ]
    new = {i: (event.reason, state.now) for i in wanted if i not in state.closings}
    return replace(state, closings={**state.closings, **new}), len(new)


def _close_children(state: State) -> tuple[State, int]:
    by_reason: dict[str, list[UUID]] = {}
    for i, (reason, _) in state.closings.items():
        by_reason.setdefault(reason, []).append(i)
    count = 0
    for reason, ids in sorted(by_reason.items()):
        state, _ = _cancel(state, Cancel(tuple(ids), reason))
        state = replace(state, closings={i: c for i, c in state.closings.items() if i not in ids})
        count += len(ids)
    return state, count


def _status(state: State, owner: UUID, outcome: Outcome) -> str:
    """Why an outcome was not written."""
    finished, live = state.finished.get(outcome.id), state.live.get(outcome.id)
    final = outcome.kind if outcome.kind in ("completed", "failed") else "cancelled"
    if finished is not None:
        row = finished.execution
        if (row.claim_no, row.owner, row.state) == (outcome.claim_no, owner, final):
            return "already"
    if live is not None and (live.outcome_claim, live.outcome) == (outcome.claim_no, outcome.kind):
        return "already"
    return "gone" if finished is None and live is None else "fenced"


def _is_dead(state: State, row: Orchestrator) -> bool:
    if row.died_at is not None or row.expires_at <= state.now:
        return True
    is_late = row.heartbeat_at < state.now - (row.expires_at - row.heartbeat_at) / 2
    return row.has_session and is_late and row.epoch == state.epoch and row.id not in state.sessions


def _recover(state: State, queue: str) -> tuple[State, tuple[int, int, int]]:
    orchestrators = {
        i: replace(row, died_at=state.now) if row.died_at is None and _is_dead(state, row) else row
        for i, row in state.orchestrators.items()
    }
    state = replace(state, orchestrators=orchestrators)
    counts = Counter[str]()
    woken: list[UUID] = []
    mine = [row for row in state.live.values() if row.owner is not None and row.queue == queue]
    for no in state.partitions(queue):
        rows = [row for row in mine if row.queue_no == no]
        for owner in sorted({row.owner for row in rows if row.owner is not None}):
            known = orchestrators.get(owner)
            if known is not None and known.died_at is None:
                continue
            # An outage of the server is nobody's crash.
            charge = int(known is None or known.epoch == state.epoch)
            outcomes: list[Outcome] = []
            for row in rows:
                if row.owner != owner:
                    continue
                kind, error = ("recovered" if charge else "released"), None
                if row.cancel_requested_at is not None:
                    counts["cancelled"] += 1
                elif row.crashes + charge >= MAX_CRASHES:
                    kind, error = "failed", "crash_loop"
                    counts["failed"] += 1
                else:
                    counts["recovered"] += 1
                outcomes.append(Outcome(row.id, row.claim_no, kind, error=error, keep=state.keep_failed(row.task)))
            woken += _parents(state, (o.id for o in outcomes))
            state, refused = _apply(state, owner, outcomes, crashes=charge)
            assert not refused
    return _wake(state, woken), (counts["recovered"], counts["failed"], counts["cancelled"])


def _release(state: State, owner: UUID, queues: Iterable[str], known: tuple[UUID, ...] = ()) -> tuple[State, int]:
    count = 0
    for queue in queues:
        for no in state.partitions(queue):
            rows = [
                row
                for row in state.live.values()
                if row.owner == owner and (row.queue, row.queue_no) == (queue, no) and row.id not in known
            ]
            outcomes = [Outcome(row.id, row.claim_no, "released", keep=state.keep_failed(row.task)) for row in rows]
            parents = _parents(state, (o.id for o in outcomes))
            state, refused = _apply(state, owner, outcomes)
            assert not refused
            state = _wake(state, parents)
            count += len(rows)
    return state, count


def _succeed(state: State, event: Succeed) -> tuple[State, object]:
    old = state.orchestrators.get(event.old)
    if old is None or old.died_at is not None or old.expires_at <= state.now:
        return state, LEASE_LOST
    new = replace(
        old,
        id=event.new,
        heartbeat_at=state.now,
        expires_at=state.now + event.lease,
        epoch=state.epoch,
        has_session=False,
    )
    state = _with_orchestrators(state, replace(old, died_at=state.now), new)
    handed = [
        row
        for i, claim_no in event.claims
        if (row := _held(state, i, claim_no, event.old)) and (row.queue in old.queues or row.queue_no == OVERFLOW)
    ]
    state = _with_live(state, *(replace(row, owner=event.new) for row in handed))
    state, _ = _release(state, event.old, old.queues)
    return state, frozenset(row.id for row in handed)


def _cancel(state: State, event: Cancel) -> tuple[State, dict[UUID, Cancellation]]:
    answer: dict[UUID, Cancellation] = {}
    rows: list[Execution] = []
    for i in dict.fromkeys(event.executions):
        row = state.live.get(i)
        if row is None:
            answer[i] = Cancellation.FINISHED if i in state.finished else Cancellation.UNKNOWN
        else:
            answer[i] = Cancellation.REQUESTED if row.state == "running" else Cancellation.CANCELLED
            rows.append(row)
    parents = _parents(state, (row.id for row in rows))
    for group in _by_partition(rows, lambda row: row.queue_no):
        asked = [e for e in group if e.state == "running" and e.cancel_requested_at is None]
        state = _with_live(
            state, *(replace(e, cancel_requested_at=state.now, cancel_reason=event.reason) for e in asked)
        )
        idle = [
            replace(e, state="cancelled", cancel_reason=event.reason, owner=None) for e in group if e.state != "running"
        ]
        state = _end(state, *((e, state.keep_failed(e.task), None, None) for e in idle))
    return _wake(state, parents), answer


def _cancel_matching(state: State, event: CancelMatching) -> tuple[State, tuple[int, int]]:
    found = [
        e.id
        for e in state.live.values()
        if e.cancel_requested_at is None
        and event.queue in (None, e.queue)
        and event.task in (None, e.task)
        and (event.states is None or e.state in event.states)
        and (event.tags is None or (e.tags is not None and set(event.tags) <= set(e.tags)))
        and (event.created_before is None or e.created_at < event.created_before)
    ]
    state, answer = _cancel(state, Cancel(tuple(found), event.reason))
    counts = list(answer.values())
    return state, (counts.count(Cancellation.CANCELLED), counts.count(Cancellation.REQUESTED))


def _signals(state: State, event: ReadSignals) -> Signals:
    row = state.orchestrators.get(event.owner)
    served = {no for queue in event.queues for no in state.partitions(queue)} | {OVERFLOW}
    return Signals(
        row is not None and row.stop_requested,
        {
            e.id: (e.claim_no, e.cancel_reason)
            for e in state.live.values()
            if e.owner == event.owner and e.cancel_requested_at is not None and e.queue_no in served
        },
        tuple(
            sorted(
                queue
                for queue in set(event.queues) & set(state.queues)
                if any(
                    (e.queue, e.state) == (queue, "ready") and e.crashes >= MAX_CRASHES - 1 for e in state.live.values()
                )
            )
        ),
        bool(state.closings),
    )


def _retry(state: State, executions: tuple[UUID, ...]) -> tuple[State, dict[UUID, str]]:
    keys = state.keys()
    answer: dict[UUID, str] = {}
    # Keys are taken in the order of (queue, task, key, id): of two dead letters with one key the first id gets it.
    for i in sorted(set(executions)):
        finished = state.finished.get(i)
        if finished is None:
            answer[i] = "live" if i in state.live else "unknown"
            continue
        row = finished.execution
        if row.state == "completed":
            answer[i] = "completed"
            continue
        if row.key is not None and keys.setdefault((row.queue, row.task, row.key), i) != i:
            answer[i] = "duplicate"
            continue
        answer[i] = "retried"
        again = replace(
            row,
            state="ready",
            attempt=0,
            crashes=0,
            generation=row.generation + 1,
            outcome=row.state,
            outcome_claim=row.claim_no,
            run_at=state.now,
            owner=None,
            claimed_at=None,
            deadline_at=None,
            cancel_requested_at=None,
            cancel_reason=None,
            wait_name=None,  # whoever waited for it has been told of its end
            is_durable=bool(finished.history),
        )
        state = _with_live(state, again)
        # What was open begins anew, and what failed last is tried again.
        trailing = _trailing_failures(finished.history)
        kept = {
            (i, r.name): replace(r, resolved_at=None)
            for r in finished.history
            if r.outcome is not None and r not in trailing
        }
        state = replace(
            state,
            finished={j: f for j, f in state.finished.items() if j != i},
            steps={**state.steps, **kept},
        )
    return state, answer


# --- the invariants ---


_ENDING = (Flush, Recover, ReleaseUnknown, Retire, Succeed, Cancel, CancelMatching, CloseChildren)


def breaches(before: State, event: Event, after: State) -> Iterator[str]:
    """The invariants that `event` broke on its way from `before` to `after`, in words."""
    for row in after.live.values():
        name = str(row.id)
        if (row.state == "running") != (row.owner is not None):
            yield f"{name}: {row.state} with owner {row.owner}"
        if row.id in after.finished:
            yield f"I4 {name}: live and finished"
        if not 0 <= row.attempt <= row.claim_no or not 0 <= row.crashes < MAX_CRASHES:
            yield f"I12 {name}: attempt {row.attempt}, crashes {row.crashes}, claim {row.claim_no}"
    yield from _breaches_of_records(before, event, after)
    keys = [(e.queue, e.task, e.key) for e in after.live.values() if e.key is not None]
    if len(keys) != len(set(keys)):
        yield "I11: two live executions of one key"
    for row in before.live.values():
        yield from _breaches_of_one(before, event, after, row)
    for i, finished in before.finished.items():
        now = after.finished.get(i)
        if now is not None and now != finished:
            yield f"I3 {i}: finished, and changed"
        if now is None and not isinstance(event, Retry):
            has_expired = finished.expires_at is not None and finished.expires_at <= before.now
            if not isinstance(event, Maintain) or not has_expired:
                yield f"I1 {i}: finished, and gone before its time"
        if now is None and isinstance(event, Retry):
            again = after.live.get(i)
            was = finished.execution
            if again is None or (again.generation, again.claim_no) != (was.generation + 1, was.claim_no):
                yield f"I3 {i}: opened again as {again}"
    if isinstance(event, Recover):
        for row in after.live.values():
            if row.queue == event.queue and row.owner is not None:
                owner = after.orchestrators.get(row.owner)
                if owner is None or owner.died_at is not None:
                    yield f"I14 {row.id}: running by a dead owner after recovery"


def _breaches_of_records(before: State, event: Event, after: State) -> Iterator[str]:
    """I6, I8 and I9."""
    for (i, name), step in [*after.steps.items(), *after.waits.items()]:
        row = after.live.get(i)
        if row is None or not row.is_durable:
            yield f"I1 {i}: record {name!r} of no live execution that knows of it"
        was: Step | None = before.waits.get((i, name)) if isinstance(step, Wait) else before.steps.get((i, name))
        if was is not None and was != step and not (isinstance(was, Wait) and _went_on(was, step)):
            yield f"I6 {i}: {was} is now {step}"
        if was is None and not isinstance(event, SaveSteps | StartWaits | Retry):
            yield f"I5 {i}: {name!r} out of nowhere"
    for (i, name), step in [*before.steps.items(), *before.waits.items()]:
        if i not in after.live or (i, name) in after.steps or (i, name) in after.waits or step.failed_at is not None:
            continue
        # Of a child that ended by this very event the failure may be forgotten by it, too.
        if (
            not isinstance(step, Wait)
            or step.resolved_at is not None
            or step.target not in {str(i) for i in before.live}
        ) or step.target in {str(i) for i in after.live}:
            yield f"I6 {i}: {name!r} is gone, and it goes on"
    children = Counter((e.parent, e.wait_name) for e in after.live.values() if e.wait_name is not None)
    for (parent, name), count in children.items():
        # One that was opened again may have children of its former life about.
        if parent is not None and parent in after.live and after.live[parent].generation == 0 and count > 1:
            yield f"I8 {parent}: {count} live children {name!r}"
    for (i, name), wait in after.waits.items():
        if wait.kind == "child" and wait.resolved_at is None and UUID(wait.target or "") not in after.live:
            yield f"I9 {i}: waits for child {name!r}, which is not there"
    for row in after.live.values():
        if row.state == "waiting" and after.is_resumable(row.id):
            yield f"I9 {row.id}: waits, and has something to go on with"
        if row.state == "waiting" and all(w.resolved_at is not None for w in after.waits_of(row.id)):
            yield f"I9 {row.id}: waits for nothing"


def _went_on(was: Wait, now: Step) -> bool:
    """Whether a wait has been resolved, or told, and nothing else; a parked handler's may be a scope of its own."""
    assert isinstance(now, Wait)
    was = replace(was, is_seen=now.is_seen, scope=now.scope if now.scope == now.name else was.scope)
    if was.resolved_at is not None or now.outcome is None:
        return now == was
    return was == replace(now, resolved_at=None, outcome=None, value=None, error=None)


def _breaches_of_one(before: State, event: Event, after: State, row: Execution) -> Iterator[str]:
    """How one execution that was live got on."""
    now = after.live.get(row.id)
    ended = after.finished.get(row.id)
    if now == row:
        return
    if now is None and ended is None and not isinstance(event, _ENDING):
        yield f"I1 {row.id}: gone"
    if ended is not None and (ended.execution.generation, ended.execution.claim_no) != (row.generation, row.claim_no):
        yield f"I4 {row.id}: ended as another generation or claim"
    if now is not None and now.claim_no < row.claim_no:
        yield f"I2 {row.id}: claim_no went back"
    if row.state != "running":
        if now is not None and now.state == "running" and now.claim_no != row.claim_no + 1:
            yield f"I2 {row.id}: claimed without a new number"
        return
    if now is not None and now.state == "running" and now.owner != row.owner and not isinstance(event, Succeed):
        yield f"I2 {row.id}: another owner for claim {row.claim_no}"
    if isinstance(event, Flush):
        token = (row.id, row.claim_no)
        if event.owner != row.owner or token not in {(o.id, o.claim_no) for o in event.outcomes}:
            yield f"I5 {row.id}: changed by who does not hold it"
    if row.cancel_requested_at is not None and now is not None and now.state != "running":
        yield f"{row.id}: its cancellation was requested, and it goes on"


EMPTY = State()
