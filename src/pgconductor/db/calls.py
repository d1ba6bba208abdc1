"""One method per SQL function of the schema: arguments in, a `Call` out. No I/O here.

The queries are rendered once per schema. Rows are read by position, in the order the function declares them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast
from uuid import UUID

from psycopg import sql

from ..model import (
    Begun,
    CancelCounts,
    Cancellation,
    Claimed,
    DeadLetter,
    Ended,
    ExecutionStatus,
    ExecutionSummary,
    FailedAttempt,
    Invoked,
    Looked,
    Maintenance,
    OpenWait,
    OrchestratorStatus,
    Outcome,
    Page,
    PromiseAnswer,
    QueueLoad,
    QueueStatus,
    Record,
    Retry,
    RetryCounts,
    Signals,
    Standing,
    State,
    StepRecord,
    StoredHistories,
    StoredHistory,
)
from . import arrays
from .call import Call, Row, ignore


class Claim(NamedTuple):
    """What a claim brought; `due_in` is told only by an empty one: seconds until the next is due, None if none is."""

    claimed: list[Claimed]
    due_in: float | None


class Heartbeat(NamedTuple):
    """Whether the lease still holds; how many executions of dead owners were given back, failed for good, or ended as
    they were asked to; what this orchestrator is asked to do.
    """

    is_alive: bool
    recovered: int
    failed: int
    cancelled: int
    signals: Signals


class NewExecution(NamedTuple):
    """One position of `invoke_many`."""

    task: str
    payload: str
    queue: str | None
    priority: int = 0
    run_at: datetime | None = None
    delay: float | None = None
    dedupe_key: str | None = None
    options: str | None = None  # JSON object, see `invoke_many` in SQL


class NewStep(NamedTuple):
    """One position of `save_steps`: exactly one of `value` and `error`, JSON texts."""

    execution: UUID
    claim_no: int
    name: str
    kind: str
    position: int
    value: str | None
    error: str | None = None


class SavedStep(NamedTuple):
    """What became of it: "saved", "stored" (a record was there, which is told), "fenced". `value`: as it is stored."""

    status: str
    value: str | None
    error: str | None


class NewEffect(NamedTuple):
    """One position of `save_effects`; `effect` is its JSON object."""

    execution: UUID
    claim_no: int
    name: str
    position: int
    effect: str


class SavedEffect(NamedTuple):
    """What became of it: "saved", "stored" (it had been done), "fenced"; and its value, JSON text."""

    status: str
    value: str | None


class NewProgress(NamedTuple):
    """One position of `set_progress`; `value` is JSON text."""

    execution: UUID
    claim_no: int
    value: str


class Delivery(NamedTuple):
    """What a delivery did: where to go on, None if there was nothing; whether something was left for later."""

    upto: int | None
    delivered: int
    is_left: bool


class NewItem(NamedTuple):
    """One position of `append_items`; `seq` counts from 1 in each life, `value` is JSON text."""

    execution: UUID
    claim_no: int
    channel: str
    seq: int
    value: str


class NewWait(NamedTuple):
    """One position of `start_waits`; `wait` is its JSON object."""

    execution: UUID
    claim_no: int
    wait: str


class StartedWait(NamedTuple):
    """What became of it: "open", "resolved", "fenced" or "too_deep"."""

    status: str
    outcome: str | None
    value: str | None
    error: str | None
    due_in: float | None
    target: str | None


class ResolvedWait(NamedTuple):
    """A wait that is over."""

    execution: UUID
    name: str
    outcome: str
    value: str | None
    error: str | None


class ExecutionFilter(NamedTuple):
    """What a search looks for; None is for all."""

    queue: str | None = None
    task: str | None = None
    states: list[str] | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    tags: list[str] | None = None
    dedupe_key: str | None = None
    parent: UUID | None = None
    root: UUID | None = None


class WorkerLoad(NamedTuple):
    """What one worker has done, as its heartbeats tell it: counts and seconds since its process began.

    `claimed`: executions that were not given back. `short_claims` brought less than they asked for, `locked_claims`
    nothing but what others had locked; both are among others of `claims`. `cpu_seconds` and `machine_load`
    (runnable processes per core, now) are of the process.
    """

    queue: str
    claims: int
    empty_claims: int
    short_claims: int
    locked_claims: int
    claimed: int
    ended: int
    busy_seconds: float
    claim_seconds: float
    flush_seconds: float
    cpu_seconds: float
    machine_load: float | None


class WorkerRow(NamedTuple):
    """A worker as its orchestrator registers it."""

    queue: str
    tasks: Sequence[str]
    concurrency: int


def _is_used(column: Sequence[object]) -> bool:
    return any(value is not None for value in column)


def _invoked(rows: list[Row]) -> list[Invoked]:
    return [Invoked._make(row) for row in rows]


def _claim(rows: list[Row]) -> Claim:
    if len(rows) == 1 and rows[0][0] is None:
        return Claim([], rows[0][_WAITED])
    return Claim(list(map(Claimed._make, rows)), None)


def _last_as_tuple(row: Row) -> list[Any]:
    return [*row[:-1], tuple(row[-1])]


def _queue_load(row: Row) -> QueueLoad:
    columns = list(row)
    columns[9] = tuple(row[9])
    return QueueLoad(*columns)


def _suspect(rows: list[Row]) -> Claimed | None:
    return Claimed._make(rows[0]) if rows else None


def _signals(row: Sequence[Any]) -> Signals:
    stop_requested, ids, claim_nos, reasons, suspects, has_errands = row
    return Signals(
        stop_requested,
        {i: (no, reason) for i, no, reason in zip(ids, claim_nos, reasons, strict=True)},
        tuple(suspects),
        has_errands,
    )


def _heartbeat(rows: list[Row]) -> Heartbeat:
    (row,) = rows
    return Heartbeat(row[0], row[1], row[2], row[3], _signals(row[4:]))


def _failed_attempts(text: str | None) -> list[FailedAttempt]:
    """The errors in a JSON array, which any client may have written."""
    errors: list[object] = json.loads(text or "[]")
    return [_failed_attempt(cast("dict[str, Any]", error)) for error in errors if isinstance(error, dict)]


def _failed_attempt(error: dict[str, Any]) -> FailedAttempt:
    attempt, at = error.get("attempt"), error.get("at")
    return FailedAttempt(
        attempt if isinstance(attempt, int) else None,
        datetime.fromisoformat(at) if isinstance(at, str) else None,
        *(str(error.get(name) or "") for name in ("type", "message", "traceback")),
    )


def _dead_letter(row: Row) -> DeadLetter:
    columns = list(row)
    columns[3] = State(row[3])
    columns[11] = _error_of(row[11])
    return DeadLetter(*columns)


def _status(rows: list[Row]) -> ExecutionStatus | None:
    if not rows:
        return None
    columns = list(rows[0])
    columns[4] = State(columns[4])
    columns[21] = tuple(columns[21] or ())
    columns[22] = None if columns[22] is None else json.loads(columns[22])
    columns[25] = _error_of(columns[25])
    columns[27] = tuple(_open_wait(wait) for wait in json.loads(columns[27] or "[]"))
    return ExecutionStatus(*columns)


def _open_wait(wait: dict[str, Any]) -> OpenWait:
    due_at = wait["due_at"]
    return OpenWait(
        wait["name"],
        wait["kind"],
        wait["target"],
        wait["scope"],
        None if due_at is None else datetime.fromisoformat(due_at),
        datetime.fromisoformat(wait["created_at"]),
    )


def _error_of(text: str | None) -> FailedAttempt | None:
    """One error, from a JSON object that any client may have written."""
    return None if text is None else next(iter(_failed_attempts(f"[{text}]")), None)


def _step_record(row: Row) -> StepRecord:
    name, kind, position, attempt, outcome, target, scope, value, is_withheld, error, *times = row
    is_cancelled = outcome == "cancelled"
    described: object = json.loads(error) if is_cancelled and error is not None else None
    reason = cast("dict[str, Any]", described).get("reason") if isinstance(described, dict) else None
    return StepRecord(
        name, kind, position, attempt, outcome, target, scope, None if value is None else json.loads(value),
        is_withheld, None if is_cancelled else _error_of(error), reason if isinstance(reason, str) else None, *times,
    )  # fmt: skip


def _looked(rows: list[Row]) -> Looked:
    found: list[ExecutionSummary] = []
    go_on: UUID | None = None
    for row in rows:
        if row[4] is None:
            go_on = row[0]
        else:
            columns = list(row)
            columns[4] = State(row[4])
            columns[14] = tuple(row[14] or ())
            found.append(ExecutionSummary(*columns))
    return Looked(found, go_on)


def _stored(rows: list[Row]) -> StoredHistories:
    found: list[StoredHistory] = []
    go_on: UUID | None = None
    for execution, queue, task, version, state, attempt, payload, records in rows:
        if state is None:
            go_on = execution
            continue
        loaded = tuple(Record._make([*record, None]) for record in json.loads(records or "[]"))
        found.append(StoredHistory(execution, queue, task, version, State(state), attempt, payload or "{}", loaded))
    return StoredHistories(found, go_on)


def _history(rows: list[Row]) -> list[Record] | None:
    return [Record._make(row) for row in rows[1:]] if rows else None


def _scalar(rows: list[Row]) -> object:
    return rows[0][0]


def _count(rows: list[Row]) -> int:
    return int(rows[0][0])


def _promise_answer(rows: list[Row]) -> PromiseAnswer:
    return PromiseAnswer(rows[0][0])


def _count_or_none(rows: list[Row]) -> int | None:
    return None if rows[0][0] is None else int(rows[0][0])


def _text_or_none(rows: list[Row]) -> str | None:
    return rows[0][0]  # type: ignore[no-any-return]  # the function returns text


def _float_or_none(rows: list[Row]) -> float | None:
    return rows[0][0]  # type: ignore[no-any-return]  # the function returns double precision


def _optional_boolean(rows: list[Row]) -> bool | None:
    return rows[0][0]  # type: ignore[no-any-return]  # the function returns boolean


# Text of each call; {s} is the schema. Casts say what the driver cannot know of a Python list or string.
_QUERIES = {
    "invoke_many": "select id, created from {s}.invoke_many(%s::text[], %s::jsonb[], %s::text[], %s::int[],"
    ' %s::timestamptz[], %s::float8[], %s::text[], %s::jsonb[]) order by "position" /*invoke*/',
    "invoke_one": "select id, created from {s}.invoke_many(array[%s::text], array[%s::jsonb], array[%s::text],"
    " array[%s::int], array[%s::timestamptz], array[%s::float8], array[%s::text], array[%s::jsonb]) /*invoke*/",
    # Of a row without an execution: when the next is due.
    "claim": "select id, claim_no, task, attempt, max_attempts, payload, coalesce(waited, due_in), timeout,"
    " deadline_in, backoff, parent_id, version from {s}.claim(%s, %s, %s::text[], %s, %s::text[]) /*claim*/",
    "claim_suspect": "select id, claim_no, task, attempt, max_attempts, payload, waited, timeout, deadline_in, backoff,"
    " parent_id, version from {s}.claim_suspect(%s, %s, %s::text[], %s::text[]) /*claim_suspect*/",
    "load_payload": "select {s}.load_payload(%s, %s, %s)",
    "flush": "select id, status from {s}.flush(%s, %s::uuid[], %s::bigint[], %s::text[], %s::jsonb[],"
    " %s::jsonb[], %s::float8[], %s::float8[], %s) /*flush*/",
    "continue_as_new": "select id, status from {s}.continue_as_new(%s, %s::uuid[], %s::bigint[], %s::jsonb[])",
    "fork": "select id, task from {s}.fork(%s, %s)",
    "restart": "select id, task from {s}.restart(%s)",
    "load_history": 'select name, kind, "position", attempt, outcome, target, scope, value, error, due_in'
    " from {s}.load_history(%s, %s, %s) /*load_history*/",
    "read_waits": "select execution_id, name, outcome, value, error from {s}.read_waits(%s, %s::uuid[], %s::int8[])",
    "save_steps": "select status, value, error from {s}.save_steps(%s, %s::uuid[], %s::int8[], %s::text[], %s::text[],"
    " %s::int[], %s::jsonb[], %s::jsonb[]) order by n /*save_steps*/",
    # Only COMMIT follows: a process that freezes now is not to keep the execution's row locked for ever.
    "save_step_inside": "select status, value, error, pg_catalog.pg_current_xact_id()::text,"
    " pg_catalog.set_config('idle_in_transaction_session_timeout', '10s', true) from {s}.save_steps(%s,"
    " %s::uuid[], %s::int8[], %s::text[], %s::text[], %s::int[], %s::jsonb[], %s::jsonb[]) /*save_step_inside*/",
    "start_waits": "select status, outcome, value, error, due_in, target"
    " from {s}.start_waits(%s, %s::uuid[], %s::int8[], %s::jsonb[]) order by n /*start_waits*/",
    "request_close": "select {s}.request_close(%s, %s, %s, %s::text[], %s)",
    "close_children": "select {s}.close_children()",
    "save_effects": "select status, value from {s}.save_effects(%s, %s::uuid[], %s::bigint[], %s::text[], %s::int[],"
    " %s::jsonb[]) order by n /*save_effects*/",
    "set_progress": "select {s}.set_progress(%s, %s::uuid[], %s::bigint[], %s::jsonb[])",
    "deliver_events": "select upto, delivered, is_left from {s}.deliver_events(%s, %s) /*deliver_events*/",
    "errands_channel": "select {s}._private_errands_channel()",
    "emit": "select {s}.emit(%s, %s::jsonb, make_interval(secs => %s)) /*emit*/",
    "send": "select {s}.send(%s, %s, %s::jsonb)",
    "resolve_promise": "select {s}.resolve_promise(%s, %s::jsonb)",
    "reject_promise": "select {s}.reject_promise(%s, %s)",
    "open_channel": "select {s}.open_channel(%s, %s, %s, %s, %s)",
    "append_items": "select status from {s}.append_items(%s, %s::uuid[], %s::bigint[], %s::text[], %s::bigint[],"
    " %s::jsonb[]) order by n /*append_items*/",
    "close_channel": "select {s}.close_channel(%s, %s, %s, %s)",
    "read_channel": "select state, seq, value from {s}.read_channel(%s, %s, %s, %s) /*read_channel*/",
    "progress": "select id, progress from {s}.progress(%s::uuid[])",
    "release_unknown": "select {s}.release_unknown(%s, %s, %s::uuid[])",
    "raise_sleep_flag": "select {s}.raise_sleep_flag(%s, %s)",
    "lower_sleep_flag": "select {s}.lower_sleep_flag(%s)",
    "look_before_sleep": "select {s}.look_before_sleep(%s, %s, %s)",
    "become_lookout": "select {s}.become_lookout(%s, %s)",
    "stand_down": "select {s}.stand_down(%s)",
    "register_queue": "select {s}.register_queue(%s)",
    "publish_queues": "select {s}.publish_queues()",
    "register_tasks": "select {s}.register_tasks(%s::text[], %s, %s::float8[], %s::float8[])",
    "register_orchestrator": "select {s}.register_orchestrator(%s, %s, %s, %s, %s, %s::text[], %s::jsonb[], %s::int[])",
    # The lease first, then the rescue of others' work and what we are asked to do, in one statement: an idle process
    # sends no other.
    "heartbeat": "select h.alive, r.recovered, r.failed, r.cancelled, g.stop_requested, g.cancelled_ids,"
    " g.cancelled_claim_nos, g.reasons, g.suspects, g.errands from (select {s}.heartbeat(%s, %s, %s::jsonb) as alive"
    " offset 0) h"
    " cross join lateral (select coalesce(sum(r.recovered), 0)::int8 as recovered,"
    " coalesce(sum(r.failed), 0)::int8 as failed, coalesce(sum(r.cancelled), 0)::int8 as cancelled"
    " from unnest(%s::text[]) as q cross join lateral {s}.recover(q) r where h.alive) r"
    " cross join lateral {s}.signals(%s, %s::text[]) g /*heartbeat*/",
    "signals": "select stop_requested, cancelled_ids, cancelled_claim_nos, reasons, suspects, errands"
    " from {s}.signals(%s, %s::text[])",
    "hold_session": "select {s}.hold_session(%s)",
    "succeed_orchestrator": "select id from {s}.succeed_orchestrator(%s, %s, %s, %s::uuid[], %s::int8[]) as id"
    " /*succeed*/",
    "cancel": "select id, status from {s}.cancel(%s::uuid[], %s) /*cancel*/",
    "cancel_matching": "select cancelled, requested from {s}.cancel_matching(%s, %s, %s, %s, %s::text[], %s::text[],"
    " %s::timestamptz)",
    "grant_role": "select {s}.grant_role(%s, %s)",
    "revoke_role": "select {s}.revoke_role(%s, %s)",
    "granted_roles": "select kind, role from {s}.granted_roles()",
    "control_channel": "select {s}._private_control_channel(%s)",
    "retire_orchestrator": "select {s}.retire_orchestrator(%s)",
    "results": "select id, state, result, error::text, reason from {s}.results(%s::uuid[])",
    "standing": "select id, state, task, queue, live_workers, due_in from {s}.standing(%s::uuid[])",
    "execution_errors": "select {s}.execution_errors(%s)::text",
    "execution_details": "select id, queue, task, version, state, priority, attempt, max_attempts, crashes, generation,"
    " depth, created_at, run_at, claimed_at, finished_at, expires_at, deadline_at, parent_id, root_id, origin_id,"
    " dedupe_key, tags, progress::text, cancel_requested, reason, error::text, open_waits, waits::text"
    " from {s}.execution_details(%s)",
    "execution_steps": 'select name, kind, "position", attempt, outcome, target, scope, value, withheld, error::text,'
    " created_at, resolved_at, due_at from {s}.execution_steps(%s)",
    "list_executions": "select id, queue, task, version, state, priority, attempt, crashes, generation, created_at,"
    " run_at, claimed_at, finished_at, dedupe_key, tags, parent_id, root_id, error_type, reason"
    " from {s}.list_executions(%s, %s, %s::text[], %s::timestamptz, %s::timestamptz, %s::text[], %s, %s::uuid,"
    " %s::uuid, %s, %s::uuid, %s)",
    "stored_histories": "select id, queue, task, version, state, attempt, payload, records::text"
    " from {s}.stored_histories(%s, %s, %s, %s::uuid, %s)",
    "queue_status": "select queue, registered, scheduled, ready, running, waiting, completed, failed, cancelled,"
    " workers, oldest_ready, tasks_without_worker from {s}.queue_status()",
    "queue_load": "select queue, registered, at, ready, ready_is_capped, oldest_ready, running, unserved, looked,"
    " tasks_without_worker, workers, capacity, reporting, reporting_capacity, seconds, busy, claims,"
    " empty_claims, short_claims, locked_claims, claimed, claim_seconds, claim_share,"
    " flush_share, cpu, machine_load, claimed_rate, ended_rate, arrivals, departures, inserted, deleted,"
    " wanted_capacity from {s}.queue_load(%s, %s)",
    "orchestrator_status": "select id, name, program_version, alive, started_at, heartbeat_age, stop_requested,"
    " queues"
    " from {s}.orchestrator_status()",
    "drain_wait": "select min(w) from unnest(%s::text[], %s::jsonb[], %s::jsonb[]) as x (queue, tasks, versions)"
    " cross join lateral {s}.drain_wait(x.queue, array(select jsonb_array_elements_text(x.tasks)), %s,"
    " array(select jsonb_array_elements_text(x.versions))) as w",
    "channel": "select {s}._private_channel(%s)",
    "probe": "select pg_catalog.pg_notify(%s, '')",
    "results_channel": "select {s}._private_results_channel()",
    "await_results": "select pg_advisory_lock_shared({s}._private_key_w(b)) from unnest(%s::int[]) as b",
    "maintain": "select lock_held, slots_emptied, rows_removed_estimate, payloads_removed, slots_made, slots_busy,"
    " tombstones, more from {s}.maintain()",
    "dead_letters": "select id, queue, task, state, attempts, crashes, generation, created_at, finished_at, expires_at,"
    " dedupe_key, error::text, reason from {s}.dead_letters(%s, %s, %s, %s::timestamptz, %s::uuid, %s::text[])",
    "retry": "select id, status from {s}.retry(%s::uuid[])",
    "retry_matching": "select retried, duplicates from {s}.retry_matching(%s, %s, %s, %s::timestamptz,"
    " %s::timestamptz, %s, %s::text[])",
    "leave_results": "select pg_advisory_unlock_shared({s}._private_key_w(b)) from unnest(%s::int[]) as b",
}


_WAITED = Claimed._fields.index("waited")


class Calls:
    """The verbs of one schema."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        name = sql.Identifier(schema).as_string(None).replace("%", "%%")
        self._query: Mapping[str, bytes] = {verb: text.replace("{s}", name).encode() for verb, text in _QUERIES.items()}

    def invoke_many(self, executions: Iterable[NewExecution]) -> Call[list[Invoked]]:
        rows = list(executions)
        if len(rows) == 1:  # without arrays to put together here and take apart there (benchmarks/produce.py)
            return Call(self._query["invoke_one"], rows[0], _invoked)
        columns: list[Sequence[Any]] = list(zip(*rows, strict=True)) or [() for _ in NewExecution._fields]
        tasks, payloads, queues, priorities, run_ats, delays, keys, options = columns
        # Most options are not used: an array of nulls costs as much as one of texts.
        params = (
            arrays.texts(tasks), arrays.jsonbs(payloads), arrays.texts(queues) if _is_used(queues) else None,
            arrays.int8s(priorities) if any(priorities) else None, list(run_ats) if _is_used(run_ats) else None,
            arrays.float8s(delays) if _is_used(delays) else None, arrays.texts(keys) if _is_used(keys) else None,
            arrays.jsonbs(options) if _is_used(options) else None,
        )  # fmt: skip
        return Call(self._query["invoke_many"], params, _invoked, has_arrays=True)

    def claim(
        self,
        queue: str,
        owner: UUID,
        tasks: list[str],
        limit: int,
        queue_no: int | None = None,
        versions: list[str | None] | None = None,
    ) -> Call[Claim]:
        """`queue_no`: the queue's number where it is known, to call the partition's own function. `versions`: one for
        each of `tasks`, the current one of a task first; None: no task has any.
        """
        query = self._query["claim"]
        if queue_no is not None:
            # The last one: a schema's name may hold the same text.
            schema, _, arguments = query.rpartition(b".claim(")
            query = b"%s._private_claim_%d(%s" % (schema, queue_no, arguments)
        return Call(query, (queue, owner, tasks, limit, versions), _claim)

    def claim_suspect(
        self, queue: str, owner: UUID, tasks: list[str], versions: list[str | None] | None = None
    ) -> Call[Claimed | None]:
        """Claim one execution on its last life; `versions` as for `claim`."""
        return Call(self._query["claim_suspect"], (queue, owner, tasks, versions), _suspect)

    def load_payload(self, execution: UUID, claim_no: int, owner: UUID) -> Call[str | None]:
        return Call(self._query["load_payload"], (execution, claim_no, owner), _text_or_none)

    def flush(self, owner: UUID, outcomes: Sequence[Outcome], *, has_family: bool = True) -> Call[dict[UUID, str]]:
        """Result: the outcomes that were not written now, with "already", "fenced" or "gone".

        `has_family`: some of them may be children or have a history; False spares the database a look.
        """
        ids, claim_nos, kinds, results, errors, delays, keeps = zip(*outcomes, strict=True)
        params = (
            owner, arrays.uuids(ids), arrays.int8s(claim_nos), arrays.texts(kinds), arrays.jsonbs(results),
            arrays.jsonbs(errors), arrays.float8s(delays), arrays.float8s(keeps), has_family,
        )  # fmt: skip
        return Call(self._query["flush"], params, lambda rows: {row[0]: row[1] for row in rows}, has_arrays=True)

    def continue_as_new(self, owner: UUID, outcomes: Sequence[Outcome]) -> Call[dict[UUID, str]]:
        """Let executions begin a new life. Result: those that were not written now, with "cancelled", "open_children",
        "already", "fenced" or "gone".
        """
        columns = [o.id for o in outcomes], [o.claim_no for o in outcomes], [o.result for o in outcomes]
        return Call(self._query["continue_as_new"], (owner, *columns), lambda rows: {row[0]: row[1] for row in rows})

    def fork(self, execution: UUID, from_step: str) -> Call[Begun]:
        """Begin a new execution with the records of another one before that step."""
        return Call(self._query["fork"], (execution, from_step), lambda rows: Begun._make(rows[0]))

    def restart(self, execution: UUID) -> Call[Begun]:
        """Begin a new execution of the same task and payload."""
        return Call(self._query["restart"], (execution,), lambda rows: Begun._make(rows[0]))

    # Histories

    def load_history(self, owner: UUID, execution: UUID, claim_no: int) -> Call[list[Record] | None]:
        """What an execution has done and waits for, in the order of positions. None: the claim is not ours any more."""
        return Call(self._query["load_history"], (owner, execution, claim_no), _history)

    def read_waits(self, owner: UUID, claims: Sequence[tuple[UUID, int]]) -> Call[list[ResolvedWait]]:
        """Which waits of these claims were resolved, or are due; each is told once."""
        ids, claim_nos = [i for i, _ in claims], [no for _, no in claims]
        return Call(
            self._query["read_waits"], (owner, ids, claim_nos), lambda rows: [ResolvedWait._make(row) for row in rows]
        )

    def save_steps(self, owner: UUID, steps: Sequence[NewStep]) -> Call[list[SavedStep]]:
        columns = [list(column) for column in zip(*steps, strict=True)]
        return Call(self._query["save_steps"], (owner, *columns), lambda rows: [SavedStep._make(row) for row in rows])

    def save_step_inside(self, owner: UUID, step: NewStep) -> Call[tuple[SavedStep, str]]:
        """Save one step in the caller's transaction; the result tells the transaction's id too."""
        columns = [[value] for value in step]
        return Call(
            self._query["save_step_inside"],
            (owner, *columns),
            lambda rows: (SavedStep._make(rows[0][:3]), str(rows[0][3])),
        )

    def start_waits(self, owner: UUID, waits: Sequence[NewWait]) -> Call[list[StartedWait]]:
        columns = [list(column) for column in zip(*waits, strict=True)]
        return Call(
            self._query["start_waits"], (owner, *columns), lambda rows: [StartedWait._make(row) for row in rows]
        )

    def request_close(self, owner: UUID, execution: UUID, claim_no: int, names: list[str], reason: str) -> Call[int]:
        """Note the children behind these waits, to be cancelled by `close_children`."""
        return Call(self._query["request_close"], (owner, execution, claim_no, names, reason), _count)

    def close_children(self) -> Call[int]:
        """Cancel children that were noted for it; again until the answer is 0."""
        return Call(self._query["close_children"], (), _count)

    # Events

    def save_effects(self, owner: UUID, effects: Sequence[NewEffect]) -> Call[list[SavedEffect]]:
        """Do what handlers do to the schema itself, each with its record."""
        columns = [list(column) for column in zip(*effects, strict=True)]
        return Call(
            self._query["save_effects"], (owner, *columns), lambda rows: [SavedEffect._make(row) for row in rows]
        )

    def set_progress(self, owner: UUID, told: Sequence[NewProgress]) -> Call[frozenset[int]]:
        """Result: positions, from 0, whose claims are revoked."""
        columns = [list(column) for column in zip(*told, strict=True)]
        return Call(self._query["set_progress"], (owner, *columns), lambda rows: frozenset(row[0] - 1 for row in rows))

    def deliver_events(self, after: int = 0, limit: int = 200) -> Call[Delivery]:
        """Deliver what is in the inbox behind the id `after`; again with `upto`, until that is None."""
        return Call(self._query["deliver_events"], (after, limit), lambda rows: Delivery._make(rows[0]))

    def errands_channel(self) -> Call[str]:
        """The channel that tells all orchestrators of errands."""
        return Call(self._query["errands_channel"], (), lambda rows: str(_scalar(rows)))

    def emit(self, event: str, payload: str, retention: float) -> Call[int]:
        """Result: the event's id. `payload`: JSON text. `retention`: seconds."""
        return Call(self._query["emit"], (event, payload, retention), _count)

    def send(self, execution: UUID, channel: str, payload: str) -> Call[bool]:
        """Result: whether there is such a receiver."""
        return Call(self._query["send"], (execution, channel, payload), lambda rows: bool(_scalar(rows)))

    def resolve_promise(self, promise: UUID, value: str) -> Call[PromiseAnswer]:
        return Call(self._query["resolve_promise"], (promise, value), _promise_answer)

    def reject_promise(self, promise: UUID, message: str) -> Call[PromiseAnswer]:
        return Call(self._query["reject_promise"], (promise, message), _promise_answer)

    def open_channel(self, owner: UUID, execution: UUID, claim_no: int, name: str, capacity: int) -> Call[int | None]:
        """Result: how many items were sent in this life of the execution, None if the claim is revoked."""
        return Call(self._query["open_channel"], (owner, execution, claim_no, name, capacity), _count_or_none)

    def append_items(self, owner: UUID, items: Sequence[NewItem]) -> Call[list[str]]:
        """Result: for each "sent", "full" or "fenced"."""
        columns = [list(column) for column in zip(*items, strict=True)]
        return Call(self._query["append_items"], (owner, *columns), lambda rows: [row[0] for row in rows])

    def close_channel(self, owner: UUID, execution: UUID, claim_no: int, name: str) -> Call[bool]:
        """Result: False if the claim is revoked."""
        return Call(self._query["close_channel"], (owner, execution, claim_no, name), lambda rows: bool(_scalar(rows)))

    def read_channel(self, execution: UUID, name: str, after: int, limit: int) -> Call[Page]:
        return Call(
            self._query["read_channel"],
            (execution, name, after, limit),
            lambda rows: Page(rows[0][0], [(row[1], row[2]) for row in rows[1:]]),
        )

    def progress(self, executions: list[UUID]) -> Call[dict[UUID, str | None]]:
        """JSON texts, None of those that told nothing; what is not kept is missing."""
        return Call(self._query["progress"], (executions,), lambda rows: {row[0]: row[1] for row in rows})

    def release_unknown(self, owner: UUID, queue: str, known: list[UUID]) -> Call[int]:
        return Call(self._query["release_unknown"], (owner, queue, known), _count)

    def raise_sleep_flag(self, queue: str, *, raise_it: bool) -> Call[bool | None]:
        return Call(self._query["raise_sleep_flag"], (queue, raise_it), _optional_boolean)

    def lower_sleep_flag(self, queue: str) -> Call[bool | None]:
        return Call(self._query["lower_sleep_flag"], (queue,), _optional_boolean)

    def look_before_sleep(self, queue: str, *, is_up: bool, is_lookout: bool) -> Call[str]:
        """ "watched", "refused", "quiet" or "in flight"."""
        return Call(self._query["look_before_sleep"], (queue, is_up, is_lookout), lambda rows: str(_scalar(rows)))

    def become_lookout(self, queue: str, *, is_up: bool) -> Call[bool | None]:
        return Call(self._query["become_lookout"], (queue, is_up), _optional_boolean)

    def stand_down(self, queue: str) -> Call[bool | None]:
        return Call(self._query["stand_down"], (queue,), _optional_boolean)

    def register_queue(self, queue: str) -> Call[int]:
        return Call(self._query["register_queue"], (queue,), _count)

    def publish_queues(self) -> Call[int]:
        """How many queues are still to be published."""
        return Call(self._query["publish_queues"], (), _count)

    def register_tasks(
        self,
        names: list[str],
        queue: str,
        keep_completed: list[float | None] | None = None,
        keep_failed: list[float | None] | None = None,
    ) -> Call[None]:
        """`keep_completed`, `keep_failed`: seconds per task, None in a list is for ever; no list leaves them."""
        return Call(self._query["register_tasks"], (names, queue, keep_completed, keep_failed), ignore)

    def register_orchestrator(
        self,
        owner: UUID,
        name: str,
        lease: float,
        program_version: str,
        schema_version: int,
        workers: Sequence[WorkerRow],
    ) -> Call[None]:
        arrays = (
            [w.queue for w in workers],
            [json.dumps(list(w.tasks)) for w in workers],
            [w.concurrency for w in workers],
        )
        return Call(
            self._query["register_orchestrator"], (owner, name, lease, program_version, schema_version, *arrays), ignore
        )

    def heartbeat(
        self, owner: UUID, lease: float, queues: list[str], loads: Sequence[WorkerLoad] = ()
    ) -> Call[Heartbeat]:
        """Renew a lease, tell what our workers have done, give back what dead orchestrators held on these queues, and
        read our signals.
        """
        told = json.dumps([load._asdict() for load in loads]) if loads else None
        return Call(self._query["heartbeat"], (owner, lease, told, queues, owner, queues), _heartbeat)

    def signals(self, owner: UUID, queues: list[str]) -> Call[Signals]:
        return Call(self._query["signals"], (owner, queues), lambda rows: _signals(rows[0]))

    def control_channel(self, owner: UUID) -> Call[str]:
        """The channel that tells an orchestrator to read its signals."""
        return Call(self._query["control_channel"], (owner,), lambda rows: str(_scalar(rows)))

    def hold_session(self, owner: UUID) -> Call[bool | None]:
        """On a session of the orchestrator's own: hold its session lock. False: it is dead, or the lock is taken."""
        return Call(self._query["hold_session"], (owner,), _optional_boolean)

    def succeed_orchestrator(
        self, old: UUID, new: UUID, lease: float, claims: Iterable[tuple[UUID, int]]
    ) -> Call[frozenset[UUID]]:
        """Hand over these claims to a new incarnation. Result: those that were still there."""
        held = list(claims)
        return Call(
            self._query["succeed_orchestrator"],
            (old, new, lease, [i for i, _ in held], [no for _, no in held]),
            lambda rows: frozenset(row[0] for row in rows),
        )

    def cancel(self, executions: list[UUID], reason: str | None) -> Call[dict[UUID, Cancellation]]:
        return Call(
            self._query["cancel"], (executions, reason), lambda rows: {row[0]: Cancellation(row[1]) for row in rows}
        )

    def cancel_matching(
        self,
        reason: str | None,
        limit: int,
        queue: str | None = None,
        task: str | None = None,
        states: list[str] | None = None,
        tags: list[str] | None = None,
        created_before: datetime | None = None,
    ) -> Call[CancelCounts]:
        """At most `limit` executions per call; again until both counts are 0."""
        return Call(
            self._query["cancel_matching"],
            (reason, limit, queue, task, states, tags, created_before),
            lambda rows: CancelCounts._make(rows[0]),
        )

    def grant_role(self, kind: str, role: str) -> Call[None]:
        """`kind`: producer, worker, viewer or operator."""
        return Call(self._query["grant_role"], (kind, role), ignore)

    def revoke_role(self, kind: str, role: str) -> Call[None]:
        return Call(self._query["revoke_role"], (kind, role), ignore)

    def granted_roles(self) -> Call[list[tuple[str, str]]]:
        """Kinds and roles that have been given rights."""
        return Call(self._query["granted_roles"], (), lambda rows: [(row[0], row[1]) for row in rows])

    def retire_orchestrator(self, owner: UUID) -> Call[int]:
        return Call(self._query["retire_orchestrator"], (owner,), _count)

    def results(self, executions: list[UUID]) -> Call[dict[UUID, Ended]]:
        return Call(
            self._query["results"],
            (executions,),
            lambda rows: {row[0]: Ended(row[0], State(row[1]), row[2], row[3], row[4]) for row in rows},
        )

    def standing(self, executions: list[UUID]) -> Call[dict[UUID, Standing]]:
        return Call(
            self._query["standing"],
            (executions,),
            lambda rows: {r[0]: Standing(r[0], State(r[1]) if r[1] else None, *r[2:]) for r in rows},
        )

    def execution_errors(self, execution: UUID) -> Call[list[FailedAttempt]]:
        """The errors of its attempts, oldest first."""
        return Call(self._query["execution_errors"], (execution,), lambda rows: _failed_attempts(_text_or_none(rows)))

    def execution_details(self, execution: UUID) -> Call[ExecutionStatus | None]:
        """All that is known of an execution; None if nothing of it is kept."""
        return Call(self._query["execution_details"], (execution,), _status)

    def execution_steps(self, execution: UUID) -> Call[list[StepRecord]]:
        """What it has done and waits for, in the order of positions."""
        return Call(self._query["execution_steps"], (execution,), lambda rows: [_step_record(row) for row in rows])

    def list_executions(self, filters: ExecutionFilter, limit: int, after: UUID | None, look: int) -> Call[Looked]:
        """At most `limit` executions that fit, made before `after`, the newest first; looks at `look` at most."""
        return Call(self._query["list_executions"], (*filters, limit, after, look), _looked)

    def stored_histories(
        self, queue: str | None, task: str | None, limit: int, after: UUID | None, look: int = 10_000
    ) -> Call[StoredHistories]:
        """At most `limit` live executions with a history, by id; looks at `look` at most."""
        return Call(self._query["stored_histories"], (queue, task, limit, after, look), _stored)

    def queue_status(self) -> Call[list[QueueStatus]]:
        return Call(
            self._query["queue_status"],
            (),
            lambda rows: [QueueStatus(*_last_as_tuple(row)) for row in rows],
        )

    def queue_load(self, queue: str | None = None, limit: int = 10_000) -> Call[list[QueueLoad]]:
        """Of one queue, or of each; counts to `limit`."""
        return Call(self._query["queue_load"], (queue, limit), lambda rows: [_queue_load(row) for row in rows])

    def orchestrator_status(self) -> Call[list[OrchestratorStatus]]:
        return Call(
            self._query["orchestrator_status"],
            (),
            lambda rows: [OrchestratorStatus(*_last_as_tuple(row)) for row in rows],
        )

    def drain_wait(
        self,
        tasks: Mapping[str, Sequence[str]],
        horizon: float,
        versions: Mapping[str, Sequence[str | None] | None] | None = None,
    ) -> Call[float | None]:
        """Seconds until one of these tasks, by queue, is due, 0 if one is ready or running; None: nothing within the
        horizon. `versions`: of the tasks of a queue, as `claim` takes them.
        """
        names = [json.dumps(list(of_queue)) for of_queue in tasks.values()]
        known = [json.dumps(list((versions or {}).get(queue) or ())) for queue in tasks]
        return Call(self._query["drain_wait"], (list(tasks), names, known, horizon), _float_or_none)

    def channel(self, queue: str) -> Call[str]:
        """The channel that announces work on a queue."""
        return Call(self._query["channel"], (queue,), lambda rows: str(_scalar(rows)))

    def probe(self, channel: str) -> Call[None]:
        """Notify a channel of the listener's own."""
        return Call(self._query["probe"], (channel,), ignore)

    def results_channel(self) -> Call[str]:
        """The channel that announces buckets of ended executions, while anybody waits for one."""
        return Call(self._query["results_channel"], (), lambda rows: str(_scalar(rows)))

    def await_results(self, buckets: list[int]) -> Call[None]:
        """Say, on the listening connection, that somebody waits: bucket -1 for anybody, 0-255 for an id's last byte."""
        return Call(self._query["await_results"], (buckets,), ignore)

    def leave_results(self, buckets: list[int]) -> Call[None]:
        return Call(self._query["leave_results"], (buckets,), ignore)

    def maintain(self) -> Call[Maintenance]:
        """To be called about once a minute by anybody, in a transaction of its own; again soon if there is `more`."""
        return Call(self._query["maintain"], (), lambda rows: Maintenance(*rows[0]))

    def dead_letters(
        self,
        queue: str | None = None,
        task: str | None = None,
        limit: int = 100,
        after: DeadLetter | None = None,
        states: Sequence[State] = (State.FAILED, State.CANCELLED),
    ) -> Call[list[DeadLetter]]:
        """What ended last comes first; `after`: the last one of the page before."""
        key = (None, None) if after is None else (after.finished_at, after.id)
        return Call(
            self._query["dead_letters"],
            (queue, task, limit, *key, [state.value for state in states]),
            lambda rows: [_dead_letter(row) for row in rows],
        )

    def retry(self, executions: list[UUID]) -> Call[dict[UUID, Retry]]:
        return Call(self._query["retry"], (executions,), lambda rows: {row[0]: Retry(row[1]) for row in rows})

    def retry_matching(
        self,
        queue: str | None = None,
        task: str | None = None,
        error_type: str | None = None,
        finished_after: datetime | None = None,
        finished_before: datetime | None = None,
        limit: int = 1000,
        states: Sequence[State] = (State.FAILED,),
    ) -> Call[RetryCounts]:
        """At most `limit` executions per call, the oldest first; again, with `finished_before`, until none is
        retried.
        """
        return Call(
            self._query["retry_matching"],
            (queue, task, error_type, finished_after, finished_before, limit, [state.value for state in states]),
            lambda rows: RetryCounts._make(rows[0]),
        )
