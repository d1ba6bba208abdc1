"""The database as the model sees it: events performed by the verbs, every row read back as the model's.

Time stands still until an event moves it, ids are counted instead of drawn, and the server's epoch is a number: so two
runs of the same events are the same, and every column can be compared.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from model.machine import (
    LEASE_LOST,
    Advance,
    BegunWait,
    Cancel,
    CancelMatching,
    ClaimSome,
    ClaimSuspect,
    CloseChildren,
    Error,
    Event,
    Execution,
    Finished,
    Flush,
    Heartbeat,
    HoldSession,
    InvokeMany,
    LoadHistory,
    LoadPayload,
    Maintain,
    New,
    Orchestrator,
    ReadSignals,
    ReadWaits,
    Recover,
    Register,
    RegisterQueue,
    RegisterTasks,
    ReleaseUnknown,
    RequestClose,
    Restart,
    Retire,
    Retry,
    SaveSteps,
    SessionEnds,
    StartWaits,
    State,
    Step,
    Succeed,
    TaskRow,
    Wait,
)
from sql.audited import Audited
from sql.database import Session

from pgconductor.db.calls import NewExecution, NewStep, NewWait, WorkerRow
from pgconductor.errors import LeaseLost

R = TypeVar("R", bound=Step)

START = datetime(2030, 1, 1, tzinfo=UTC)  # the model's time 0

# In test schemas only: a clock that stands still, an epoch and ids that are counted, looks that are never long.
_INSTALL = """
create table {s}._test_world (moment timestamptz not null, epoch int not null);
insert into {s}._test_world values (now(), 0);
create sequence {s}._test_ids;
create or replace function {s}._private_clock() returns timestamptz language sql volatile parallel safe
    begin atomic select moment from {s}._test_world; end;
create or replace function {s}._private_long_look() returns interval language sql immutable parallel safe
    return interval '1 hour';
create or replace function {s}._private_server_epoch() returns text language sql stable
    begin atomic select epoch::text from {s}._test_world; end;
create or replace function {s}._private_new_id(p_queue_no int, p_now timestamptz) returns uuid
    language sql volatile parallel safe
    return encode(set_byte(set_byte(set_byte(
        overlay(decode(md5(nextval('{s}._test_ids')::text), 'hex')
            placing substring(int8send((date_part('epoch', p_now) * 1000)::bigint), 3) from 1 for 6),
        6, 128 | (p_queue_no >> 16)), 7, (p_queue_no >> 8) & 255), 9, p_queue_no & 255), 'hex')::uuid;
"""

# One statement for the whole state, each table an array of rows, each row an array in the order of the model's fields.
_STATE = """
select json_build_object(
    'world', (select json_build_array(date_part('epoch', moment - %(start)s), epoch) from {s}._test_world),
    'queues', (select json_object_agg(name, no) from {s}._private_queues),
    'tasks', (select json_agg(json_build_array(name, queue, keep_completed, keep_failed)) from {s}._private_tasks),
    'keys', (select json_agg(json_build_array(queue, task, key, execution_id)) from {s}._private_dedupe_keys),
    'payloads', (select json_agg(execution_id) from {s}._private_payloads),
    'orchestrators', (select json_agg(json_build_array(o.id,
        array(select queue from {s}._private_workers w where w.orchestrator_id = o.id order by 1),
        (select tasks from {s}._private_workers w where w.orchestrator_id = o.id order by queue limit 1),
        date_part('epoch', heartbeat_at - %(start)s), date_part('epoch', expires_at - %(start)s), server_epoch::int,
        date_part('epoch', died_at - %(start)s), has_session, stop_requested_at is not null))
        from {s}._private_orchestrators o),
    'steps', (select json_agg(json_build_array(execution_id, name, kind, position, claim_no, attempt,
        date_part('epoch', created_at - %(start)s), value::text, error, outcome, target, null))
        from {s}._private_steps),
    'waits', (select json_agg(json_build_array(execution_id, name, kind, position, claim_no, attempt,
        date_part('epoch', created_at - %(start)s), value::text, error, outcome, target,
        date_part('epoch', resolved_at - %(start)s), scope, date_part('epoch', due_at - %(start)s), on_close, is_seen))
        from {s}._private_waits),
    'closings', (select json_agg(json_build_array(execution_id, reason, date_part('epoch', created_at - %(start)s)))
        from {s}._private_closings),
    'live', (select json_agg(json_build_array(e.id, e.queue_no, e.queue, e.task, e.state, e.priority,
        date_part('epoch', e.run_at - %(start)s), date_part('epoch', e.created_at - %(start)s),
        coalesce(e.payload, l.payload)::text, e.payload is null, e.dedupe_key, e.max_attempts,
        date_part('epoch', e.timeout),
        date_part('epoch', e.deadline_at - %(start)s), e.tags, e.claim_no, e.attempt, e.crashes, e.generation, e.owner,
        date_part('epoch', e.claimed_at - %(start)s), e.outcome, e.outcome_claim, e.errors,
        date_part('epoch', e.cancel_requested_at - %(start)s), e.cancel_reason, e.parent_id, e.root_id, e.depth,
        e.wait_name, e.is_durable))
        from {s}._private_executions e left join {s}._private_payloads l on l.execution_id = e.id),
    'finished', (select json_agg(json_build_array(e.id, {s}._private_queue_no(e.id), e.queue, e.task, e.state,
        e.priority,
        date_part('epoch', e.run_at - %(start)s), date_part('epoch', e.created_at - %(start)s),
        coalesce(e.payload, l.payload)::text, e.payload is null, e.dedupe_key, e.max_attempts,
        date_part('epoch', e.timeout),
        null, e.tags, e.claim_no, e.attempt, e.crashes, e.generation, e.owner,
        date_part('epoch', e.claimed_at - %(start)s), null, null, e.errors, null, e.cancel_reason,
        e.parent_id, e.root_id, e.depth, null, false,
        date_part('epoch', e.finished_at - %(start)s), date_part('epoch', e.expires_at - %(start)s), e.result::text,
        e.steps))
        from {s}._private_finished e left join {s}._private_payloads l on l.execution_id = e.id))
"""


def _execution(row: list[Any]) -> Execution:
    errors = tuple(
        Error(e["type"], e["attempt"], (datetime.fromisoformat(e["at"]) - START).total_seconds()) for e in row[23] or ()
    )
    fields = [*row]
    fields[0] = UUID(row[0])
    fields[14] = None if row[14] is None else tuple(row[14])
    fields[19] = None if row[19] is None else UUID(row[19])
    fields[23] = errors
    fields[26], fields[27] = (None if i is None else UUID(i) for i in row[26:28])
    return Execution(*fields)


_COLUMNS = 31  # of an execution


def _error(error: str | dict[str, Any] | None) -> str | None:
    """As the model names it."""
    if error is None:
        return None
    found = json.loads(error) if isinstance(error, str) else error
    return found["type"] if "type" in found else f"reason {found['reason']}"


def _record(kind: type[R], row: list[Any]) -> tuple[tuple[UUID, str], R]:
    execution, *fields = row
    fields[7] = _error(fields[7])
    return (UUID(execution), row[1]), kind(*fields)


def _past(steps: list[dict[str, Any]] | None) -> tuple[Step, ...]:
    """What a finished row keeps."""
    return tuple(
        Step(
            s["name"], s["kind"], s["position"], s["claim_no"], s["attempt"],
            (datetime.fromisoformat(s["created_at"]) - START).total_seconds(),
            json.dumps(s["value"]) if "value" in s else None, _error(s.get("error")), s.get("outcome"), s.get("target"),
            (datetime.fromisoformat(s["resolved_at"]) - START).total_seconds() if "resolved_at" in s else None,
        )
        for s in steps or ()
    )  # fmt: skip


def _orchestrator(row: list[Any]) -> Orchestrator:
    return Orchestrator(UUID(row[0]), tuple(row[1]), tuple(row[2] or ()), *row[3:])


class Modelled:
    """An audited database whose time, epoch and ids are the test's."""

    def __init__(self, audited: Audited) -> None:
        self.audited = audited
        self.db = audited.db
        self._holder: Session | None = None
        for statement in _INSTALL.split(";\n")[:3]:
            self.db.rows(statement)
        self.db.rows("create or replace" + _INSTALL.split("create or replace", 1)[1])

    def reset(self) -> None:
        """As after a fresh install, at the model's time 0."""
        self.db.close_sessions()
        self._holder = None
        self.audited.reset()
        self.db.rows("update {s}._test_world set moment = %s, epoch = 0", START)
        self.db.rows("alter sequence {s}._test_ids restart")

    def holder(self) -> Session:
        """The session that holds the orchestrators' session locks."""
        if self._holder is None:
            self._holder = self.db.session(autocommit=True)
        return self._holder

    def perform(self, event: Event, session: Session | None = None) -> Any:
        """The answer of the verb, on `session` or the database's own."""
        try:
            return self._perform(event, session or self.db)
        except LeaseLost:
            return LEASE_LOST

    def _perform(self, event: Event, db: Session) -> Any:
        calls = db.calls
        match event:
            case Advance():
                db.rows("update {s}._test_world set moment = moment + %s", timedelta(seconds=event.seconds))
            case Restart():
                self.holder().rows("select pg_advisory_unlock_all()")
                db.rows("update {s}._test_world set epoch = epoch + 1")
            case RegisterQueue():
                return db.register_queue(event.queue)
            case RegisterTasks():
                completed = None if event.keep_completed is None else list(event.keep_completed)
                failed = None if event.keep_failed is None else list(event.keep_failed)
                db.run(calls.register_tasks(list(event.names), event.queue, completed, failed))
            case Register():
                workers = [WorkerRow(queue, event.tasks, 1) for queue in event.queues]
                db.run(calls.register_orchestrator(event.owner, "w", event.lease, "1", 1, workers))
            case Heartbeat():
                return db.run(calls.heartbeat(event.owner, event.lease, [])).is_alive
            case HoldSession():
                return self.holder().run(calls.hold_session(event.owner))
            case SessionEnds():
                self.holder().rows("select pg_advisory_unlock({s}._private_key_o(%s))", event.owner)
            case InvokeMany():
                return db.run(calls.invoke_many(_new_execution(new) for new in event.items))
            case ClaimSome():
                return db.run(calls.claim(event.queue, event.owner, list(event.tasks), event.limit))
            case ClaimSuspect():
                return db.run(calls.claim_suspect(event.queue, event.owner, list(event.tasks)))
            case LoadPayload():
                return db.run(calls.load_payload(event.execution, event.claim_no, event.owner))
            case Flush():
                outcomes = [
                    o._replace(error=None if o.error is None else json.dumps({"type": o.error})) for o in event.outcomes
                ]
                return db.run(calls.flush(event.owner, outcomes))
            case SaveSteps():
                steps = [
                    NewStep(
                        n.execution, n.claim_no, n.name, n.kind, n.position, n.value,
                        None if n.error is None else json.dumps({"type": n.error}),
                    )
                    for n in event.items
                ]  # fmt: skip
                return [row._replace(error=_error(row.error)) for row in db.run(calls.save_steps(event.owner, steps))]
            case StartWaits():
                waits = [NewWait(w.execution, w.claim_no, json.dumps(_spec(w))) for w in event.items]
                return [row._replace(error=_error(row.error)) for row in db.run(calls.start_waits(event.owner, waits))]
            case LoadHistory():
                found = db.run(calls.load_history(event.owner, event.execution, event.claim_no))
                return None if found is None else [r._replace(error=_error(r.error)) for r in found]
            case ReadWaits():
                told = db.run(calls.read_waits(event.owner, list(event.claims)))
                return sorted(row._replace(error=_error(row.error)) for row in told)
            case RequestClose():
                return db.run(
                    calls.request_close(event.owner, event.execution, event.claim_no, list(event.names), event.reason)
                )
            case CloseChildren():
                return db.run(calls.close_children())
            case Recover():
                return db.rows("select recovered, failed, cancelled from {s}.recover(%s)", event.queue)[0]
            case ReleaseUnknown():
                return db.run(calls.release_unknown(event.owner, event.queue, list(event.known)))
            case Retire():
                return db.run(calls.retire_orchestrator(event.owner))
            case Succeed():
                return db.run(calls.succeed_orchestrator(event.old, event.new, event.lease, event.claims))
            case Cancel():
                return db.run(calls.cancel(list(event.executions), event.reason))
            case CancelMatching():
                before = None if event.created_before is None else START + timedelta(seconds=event.created_before)
                states = None if event.states is None else list(event.states)
                tags = None if event.tags is None else list(event.tags)
                return db.run(calls.cancel_matching(event.reason, 1000, event.queue, event.task, states, tags, before))
            case ReadSignals():
                signals = db.run(calls.signals(event.owner, list(event.queues)))
                return replace(signals, suspects=tuple(sorted(signals.suspects)))
            case Retry():
                return dict(db.rows("select id, status from {s}.retry(%s::uuid[])", list(event.executions)))
            case Maintain():
                db.rows("select from {s}.maintain()")
        return None

    def state(self) -> State:
        """What is there."""
        query = _STATE.replace("{s}", self.db.schema).encode()
        tables: dict[str, Any] = self.db.conn.execute(query, {"start": START}).fetchall()[0][0]
        live = [_execution(row) for row in tables["live"] or ()]
        finished = [
            Finished(_execution(row[:_COLUMNS]), row[-4], row[-3], row[-2], _past(row[-1]))
            for row in tables["finished"] or ()
        ]
        now, epoch = tables["world"]
        state = State(
            now,
            epoch,
            queues=tables["queues"] or {},
            tasks={name: TaskRow(*row) for name, *row in tables["tasks"] or ()},
            orchestrators={row.id: row for row in map(_orchestrator, tables["orchestrators"] or ())},
            live={row.id: row for row in live},
            finished={row.execution.id: row for row in finished},
            steps=dict(_record(Step, row) for row in tables["steps"] or ()),
            waits=dict(_record(Wait, row) for row in tables["waits"] or ()),
            closings={UUID(i): (reason, at) for i, reason, at in tables["closings"] or ()},
        )
        # What the model knows from the rows.
        assert {(queue, task, key): UUID(i) for queue, task, key, i in tables["keys"] or ()} == state.keys()
        large = {row.id for row in [*live, *(f.execution for f in finished)] if row.is_large}
        assert {UUID(i) for i in tables["payloads"] or ()} == large
        assert len(live) == len(state.live)
        assert len(finished) == len(state.finished)
        return state


def _spec(wait: BegunWait) -> dict[str, object]:
    """A wait as the database takes it."""
    spec: dict[str, object] = {"name": wait.name, "kind": wait.kind, "position": wait.position, "scope": wait.scope}
    if wait.new is None:
        return {**spec, "due_in": wait.due_in}
    new = wait.new
    child = {
        "task": new.task, "payload": json.loads(new.payload), "queue": new.queue, "priority": new.priority,
        "delay": new.delay, "deadline_in": new.deadline_in, "timeout": new.timeout, "max_attempts": new.max_attempts,
        "tags": None if new.tags is None else list(new.tags),
    }  # fmt: skip
    return {**spec, "on_close": wait.on_close, "child": child}


def _new_execution(new: New) -> NewExecution:
    options = {
        "max_attempts": new.max_attempts,
        "timeout": new.timeout,
        "deadline_in": new.deadline_in,
        "tags": None if new.tags is None else list(new.tags),
    }
    given = {name: value for name, value in options.items() if value is not None}
    return NewExecution(
        new.task, new.payload, new.queue, new.priority, None, new.delay, new.key, json.dumps(given) if given else None
    )


def comparable(state: State) -> State:
    """Without what the finished rows do not tell, and what only the model knows."""
    finished = {
        i: replace(
            f,
            execution=replace(
                f.execution,
                deadline_at=None,
                outcome=None,
                outcome_claim=None,
                cancel_requested_at=None,
                wait_name=None,
                is_durable=False,
            ),
        )
        for i, f in state.finished.items()
    }
    return replace(state, finished=finished, sessions=frozenset())


def differences(expected: State, found: State) -> list[str]:
    """Where two states differ, in words."""
    words = [
        f"{name}: {getattr(found, name)}, not {getattr(expected, name)}"
        for name in ("now", "epoch", "queues", "tasks")
        if getattr(found, name) != getattr(expected, name)
    ]
    for name in ("orchestrators", "live", "finished", "steps", "waits", "closings"):
        one, other = getattr(expected, name), getattr(found, name)
        for key in {*one, *other}:
            if one.get(key) != other.get(key):
                words.append(f"{name}:\n    is        {other.get(key)}\n    should be {one.get(key)}")
    return words
