"""The specification of the verbs as a pure function: `transition(state, event)` gives the next state and the answer.

One database: live and finished executions, orchestrators, registered tasks and queues, the clock. An event is one call
of a verb, with what only the database can know (new ids) put in; an answer is what the call's decoder gives. Nothing
here reads a clock, a database or a random number. What concurrency adds (locks, skipped rows) is not here: every verb
runs alone.

`breaches(before, event, after)` are the invariants I1 to I14 of the specification, as far as the verbs are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from uuid import UUID

from pgconductor.db.calls import Claim
from pgconductor.model import Cancellation, Claimed, Invoked, Outcome, Signals

OVERFLOW = 0  # number of the partition of queues that nobody has registered
DAY = 86400.0
WEEK = 7 * DAY
MAX_CRASHES = 3
MAX_ERRORS = 50
REQUEUED = ("retried", "released", "recovered")
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
    run_at: float
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

    @property
    def order(self) -> tuple[int, float, UUID]:
        """In which order a claim takes them."""
        return (-self.priority, self.run_at, self.id)


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished row. `execution.state` is the final one, `execution.owner` who ended it with which claim."""

    execution: Execution
    finished_at: float
    expires_at: float | None
    result: str | None


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
    sessions: frozenset[UUID] = frozenset()  # orchestrators whose session lock is held

    def is_alive(self, owner: UUID) -> bool:
        """May it claim?"""
        row = self.orchestrators.get(owner)
        return row is not None and row.died_at is None and row.expires_at > self.now and row.epoch == self.epoch

    def keys(self) -> dict[tuple[str, str, str], UUID]:
        """The dedupe keys that are taken, and by whom."""
        return {(e.queue, e.task, e.key): e.id for e in self.live.values() if e.key is not None}

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
        registered = state.tasks.get(new.task)
        queue = new.queue or (registered.queue if registered else "default")
        if new.key is not None:
            holder = keys.setdefault((queue, new.task, new.key), new.id)
            if holder != new.id:
                answer.append(Invoked(holder, False))
                continue
        run_at = state.now + (new.delay or 0.0)
        live[new.id] = Execution(
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
        answer.append(Invoked(new.id, True))
    return replace(state, live=live), answer


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
        state.now - row.run_at,
        row.timeout,
        None if row.deadline_at is None else row.deadline_at - state.now,
    )


def _claim(state: State, event: ClaimSome) -> tuple[State, object]:
    if not state.is_alive(event.owner):
        return state, LEASE_LOST
    mine = [e for e in state.live.values() if e.queue == event.queue]
    # Told before what is due becomes ready, so that its time may be past.
    due = min((e.run_at for e in mine if e.state == "scheduled"), default=None)
    state = _with_live(
        state, *(replace(e, state="ready") for e in mine if e.state == "scheduled" and e.run_at <= state.now)
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


def _end(state: State, row: Execution, final: str, keep: float | None, result: str | None = None) -> State:
    live = {i: e for i, e in state.live.items() if i != row.id}
    state = replace(state, live=live)
    if keep is not None and keep <= 0:
        return state
    ended = Finished(replace(row, state=final), state.now, None if keep is None else state.now + keep, result)
    return replace(state, finished={**state.finished, row.id: ended})


def _apply(state: State, owner: UUID, outcome: Outcome, crashes: int = 0) -> State | None:
    """The state after one outcome is written, None if its token does not hold."""
    row = _held(state, outcome.id, outcome.claim_no, owner)
    if row is None:
        return None
    errors = _add_error(row.errors, outcome.error, row.attempt, state.now)
    if outcome.kind in ENDED or row.cancel_requested_at is not None:
        final = outcome.kind if outcome.kind in ("completed", "failed") else "cancelled"
        row = replace(row, errors=errors, attempt=row.attempt - crashes, crashes=row.crashes + crashes)
        return _end(state, row, final, outcome.keep, None if final == "cancelled" else outcome.result)
    is_late = outcome.delay > 0
    return _with_live(
        state,
        replace(
            row,
            state="scheduled" if is_late else "ready",
            run_at=state.now + outcome.delay if is_late or outcome.kind == "retried" else row.run_at,
            attempt=row.attempt - (outcome.kind != "retried"),
            crashes=row.crashes + crashes,
            owner=None,
            claimed_at=None,
            outcome=outcome.kind,
            outcome_claim=row.claim_no,
            errors=errors,
        ),
    )


def _flush(state: State, event: Flush) -> tuple[State, dict[UUID, str]]:
    refused: list[Outcome] = []
    for outcome in event.outcomes:
        written = _apply(state, event.owner, outcome)
        if written is None:
            refused.append(outcome)
        else:
            state = written
    return state, {outcome.id: _status(state, event.owner, outcome) for outcome in refused}


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
    recovered = failed = cancelled = 0
    for row in list(state.live.values()):
        if row.owner is None or row.queue != queue:
            continue
        owner = orchestrators.get(row.owner)
        if owner is not None and owner.died_at is None:
            continue
        # An outage of the server is nobody's crash.
        charge = int(owner is None or owner.epoch == state.epoch)
        kind, error = ("recovered" if charge else "released"), None
        if row.cancel_requested_at is not None:
            cancelled += 1
        elif row.crashes + charge >= MAX_CRASHES:
            kind, error = "failed", "crash_loop"
            failed += 1
        else:
            recovered += 1
        outcome = Outcome(row.id, row.claim_no, kind, error=error, keep=state.keep_failed(row.task))
        written = _apply(state, row.owner, outcome, crashes=charge)
        assert written is not None
        state = written
    return state, (recovered, failed, cancelled)


def _release(state: State, owner: UUID, queues: Iterable[str], known: tuple[UUID, ...] = ()) -> tuple[State, int]:
    count = 0
    for row in list(state.live.values()):
        if row.owner == owner and row.queue in queues and row.id not in known:
            written = _apply(state, owner, Outcome(row.id, row.claim_no, "released", keep=state.keep_failed(row.task)))
            assert written is not None
            state = written
            count += 1
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
        row for i, claim_no in event.claims if (row := _held(state, i, claim_no, event.old)) and row.queue in old.queues
    ]
    state = _with_live(state, *(replace(row, owner=event.new) for row in handed))
    state, _ = _release(state, event.old, old.queues)
    return state, frozenset(row.id for row in handed)


def _cancel(state: State, event: Cancel) -> tuple[State, dict[UUID, Cancellation]]:
    answer: dict[UUID, Cancellation] = {}
    for i in dict.fromkeys(event.executions):
        row = state.live.get(i)
        if row is None:
            answer[i] = Cancellation.FINISHED if i in state.finished else Cancellation.UNKNOWN
        elif row.state == "running":
            answer[i] = Cancellation.REQUESTED
            if row.cancel_requested_at is None:
                state = _with_live(state, replace(row, cancel_requested_at=state.now, cancel_reason=event.reason))
        else:
            answer[i] = Cancellation.CANCELLED
            ended = replace(row, cancel_reason=event.reason, owner=None)
            state = _end(state, ended, "cancelled", state.keep_failed(row.task))
    return state, answer


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
        )
        state = _with_live(state, again)
        state = replace(state, finished={j: f for j, f in state.finished.items() if j != i})
    return state, answer


# --- the invariants ---


_ENDING = (Flush, Recover, ReleaseUnknown, Retire, Succeed, Cancel, CancelMatching)


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
