"""The SQL beside the model: simulated workers, one verb at a time; after each the whole database must be the model's.

Time stands still until a rule moves it, ids are counted instead of drawn, and the server's epoch is a number: so a run
is determined by its choices, and every column can be compared. After each rule the audit is checked, too.

`--stateful-examples N` runs N random examples instead of the fixed few.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from model.machine import (
    DAY,
    EMPTY,
    LEASE_LOST,
    OVERFLOW,
    Advance,
    Cancel,
    CancelMatching,
    ClaimSome,
    ClaimSuspect,
    Error,
    Event,
    Execution,
    Finished,
    Flush,
    Heartbeat,
    HoldSession,
    InvokeMany,
    LoadPayload,
    Maintain,
    New,
    Orchestrator,
    ReadSignals,
    Recover,
    Register,
    RegisterQueue,
    RegisterTasks,
    ReleaseUnknown,
    Restart,
    Retire,
    Retry,
    SessionEnds,
    State,
    Succeed,
    TaskRow,
    breaches,
    transition,
)
from sql.audited import Audited, open_audited
from sql.database import Session

from pgconductor.db.calls import Claim, NewExecution, WorkerRow
from pgconductor.errors import LeaseLost
from pgconductor.model import Claimed, Invoked, Outcome, Signals
from pgconductor.testing import Databases

START = datetime(2030, 1, 1, tzinfo=UTC)  # the model's time 0
TASKS = ("one", "two")
QUEUES = ("a", "b", "c")  # the last one is never registered
LARGE = {"text": "0123456789abcdef" * 200}

# In test schemas only: a clock that stands still, an epoch and ids that are counted.
_INSTALL = """
create table {s}._test_world (moment timestamptz not null, epoch int not null);
insert into {s}._test_world values (now(), 0);
create sequence {s}._test_ids;
create or replace function {s}._private_clock() returns timestamptz language sql volatile parallel safe
    begin atomic select moment from {s}._test_world; end;
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
    'live', (select json_agg(json_build_array(e.id, e.queue_no, e.queue, e.task, e.state, e.priority,
        date_part('epoch', e.run_at - %(start)s), date_part('epoch', e.created_at - %(start)s),
        coalesce(e.payload, l.payload)::text, e.payload is null, e.dedupe_key, e.max_attempts,
        date_part('epoch', e.timeout),
        date_part('epoch', e.deadline_at - %(start)s), e.tags, e.claim_no, e.attempt, e.crashes, e.generation, e.owner,
        date_part('epoch', e.claimed_at - %(start)s), e.outcome, e.outcome_claim, e.errors,
        date_part('epoch', e.cancel_requested_at - %(start)s), e.cancel_reason))
        from {s}._private_executions e left join {s}._private_payloads l on l.execution_id = e.id),
    'finished', (select json_agg(json_build_array(e.id, {s}._private_queue_no(e.id), e.queue, e.task, e.state,
        e.priority,
        date_part('epoch', e.run_at - %(start)s), date_part('epoch', e.created_at - %(start)s),
        coalesce(e.payload, l.payload)::text, e.payload is null, e.dedupe_key, e.max_attempts,
        date_part('epoch', e.timeout),
        null, e.tags, e.claim_no, e.attempt, e.crashes, e.generation, e.owner,
        date_part('epoch', e.claimed_at - %(start)s), null, null, e.errors, null, e.cancel_reason,
        date_part('epoch', e.finished_at - %(start)s), date_part('epoch', e.expires_at - %(start)s), e.result::text))
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
    return Execution(*fields)


def _orchestrator(row: list[Any]) -> Orchestrator:
    return Orchestrator(UUID(row[0]), tuple(row[1]), tuple(row[2] or ()), *row[3:])


class Real:
    """The database: performs events, and tells its state as the model's."""

    def __init__(self, audited: Audited) -> None:
        self.audited = audited
        self.db = audited.db
        self.happened = Counter[str]()
        self.holder: Session | None = None  # the session that holds session locks
        for statement in _INSTALL.split(";\n")[:3]:
            self.db.rows(statement)
        self.db.rows("create or replace" + _INSTALL.split("create or replace", 1)[1])

    def reset(self) -> None:
        self.db.close_sessions()
        self.audited.reset()
        self.holder = self.db.session(autocommit=True)
        self.db.rows("update {s}._test_world set moment = %s, epoch = 0", START)
        self.db.rows("alter sequence {s}._test_ids restart")

    def perform(self, event: Event) -> Any:
        try:
            return self._perform(event)
        except LeaseLost:
            return LEASE_LOST

    def _perform(self, event: Event) -> Any:
        db, calls = self.db, self.db.calls
        assert self.holder is not None
        match event:
            case Advance():
                db.rows("update {s}._test_world set moment = moment + %s", timedelta(seconds=event.seconds))
            case Restart():
                self.holder.rows("select pg_advisory_unlock_all()")
                db.rows("update {s}._test_world set epoch = epoch + 1")
            case RegisterQueue():
                return db.run(calls.register_queue(event.queue))
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
                return self.holder.run(calls.hold_session(event.owner))
            case SessionEnds():
                self.holder.rows("select pg_advisory_unlock({s}._private_key_o(%s))", event.owner)
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
                return Signals(signals.stop_requested, signals.cancelled, tuple(sorted(signals.suspects)))
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
        finished = [Finished(_execution(row[:26]), row[26], row[27], row[28]) for row in tables["finished"] or ()]
        now, epoch = tables["world"]
        state = State(
            now,
            epoch,
            queues=tables["queues"] or {},
            tasks={name: TaskRow(*row) for name, *row in tables["tasks"] or ()},
            orchestrators={row.id: row for row in map(_orchestrator, tables["orchestrators"] or ())},
            live={row.id: row for row in live},
            finished={row.execution.id: row for row in finished},
        )
        # What the model knows from the rows.
        assert {(queue, task, key): UUID(i) for queue, task, key, i in tables["keys"] or ()} == state.keys()
        large = {row.id for row in [*live, *(f.execution for f in finished)] if row.is_large}
        assert {UUID(i) for i in tables["payloads"] or ()} == large
        assert len(live) == len(state.live)
        assert len(finished) == len(state.finished)
        return state


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
                f.execution, deadline_at=None, outcome=None, outcome_claim=None, cancel_requested_at=None
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
    for name in ("orchestrators", "live", "finished"):
        one, other = getattr(expected, name), getattr(found, name)
        for key in {*one, *other}:
            if one.get(key) != other.get(key):
                words.append(f"{name}:\n    is        {other.get(key)}\n    should be {one.get(key)}")
    return words


@dataclass
class Worker:
    """What a simulated worker remembers."""

    owner: UUID
    held: dict[UUID, int] = field(default_factory=dict[UUID, int])
    last_flush: Flush | None = None
    is_frozen: bool = False


PICK = st.integers(0, 30)
PICKS = st.lists(PICK, min_size=1, max_size=6)
REGISTERED = st.sampled_from(["a", "a", "b"])
ANY_QUEUE = st.sampled_from(["a", "a", "b", "c"])
KEEPS = st.sampled_from([None, 30.0, 5000.0, 0.0])
NEWS = st.builds(
    New,
    id=st.just(UUID(int=0)),
    queue=st.sampled_from(["a", "a", "a", "a", "b", "b", "c", None]),
    task=st.sampled_from(TASKS),
    payload=st.just('{"n": 1}'),
    is_large=st.sampled_from([False, False, False, True]),
    priority=st.sampled_from([0, 0, 7]),
    delay=st.sampled_from([None, None, None, None, 5.0, 3600.0, -2.0]),
    key=st.sampled_from([None, None, None, "k", "l"]),
    max_attempts=st.sampled_from([None, 3]),
    timeout=st.sampled_from([None, 60.0]),
    deadline_in=st.sampled_from([None, 20.0]),
    tags=st.sampled_from([None, ("x",), ("x", "y")]),
)
_K = {"k": PICK}
_FLUSH = {
    "picks": PICKS,
    "kind": st.sampled_from(["completed", "completed", "failed", "failed", "retried", "released", "cancelled"]),
    "delay": st.sampled_from([0.0, 4.0]),
    "keep": KEEPS,
    "load": st.booleans(),
    "twice": st.booleans(),
}
_VERBS: dict[str, tuple[int, dict[str, st.SearchStrategy[Any]]]] = {
    "invoke": (12, {"news": st.lists(NEWS, min_size=1, max_size=6)}),
    "claim": (
        5,
        {
            **_K,
            "queue": REGISTERED,
            "limit": st.sampled_from([1, 2, 50]),
            "tasks": st.sampled_from([TASKS, TASKS, TASKS[:1]]),
        },
    ),
    "flush": (6, {**_K, **_FLUSH}),
    "work": (12, {**_K, "queue": REGISTERED, **_FLUSH}),
    "advance_clock": (4, {"seconds": st.sampled_from([1.0, 6.0, 6.0, 6.0, 12.0, 4000.0, 2 * DAY, -1.0, -700.0])}),
    "recover": (3, {"queue": ANY_QUEUE}),
    "crash_in_mid_work": (
        4,
        {**_K, "queue": REGISTERED, "times": st.sampled_from([1, 3]), "cancels": st.booleans()},
    ),
    "repeat_last_flush": (2, _K),
    "flush_stale": (
        5,
        {**_K, "pick": PICK, "kind": st.sampled_from(["completed", "retried"]), "foreign": st.booleans()},
    ),
    "thaw_and_flush": (2, {**_K, "kind": st.sampled_from(["completed", "failed", "retried"])}),
    "freeze": (1, _K),
    "crash": (1, _K),
    "restart": (
        2,
        {
            "number": st.integers(0, 3),
            "lease": st.sampled_from([10.0, 40.0]),
            "queues": st.sampled_from([("a", "b"), ("a",)]),
        },
    ),
    "heartbeat": (3, _K),
    "hold_session": (1, _K),
    "session_cut": (1, _K),
    "claim_suspect": (2, {**_K, "queue": ANY_QUEUE}),
    "release_unknown": (1, {**_K, "queue": ANY_QUEUE}),
    "retire": (1, _K),
    "succeed": (2, {**_K, "restarts": st.booleans()}),
    "read_signals": (1, _K),
    "cancel": (2, {"picks": PICKS, "reason": st.sampled_from([None, "no more needed"])}),
    "cancel_held": (3, {**_K, "picks": PICKS}),
    "cancel_matching": (
        1,
        {
            "queue": st.sampled_from([None, "a", "b"]),
            "task": st.sampled_from([None, "one"]),
            "states": st.sampled_from([None, ("running",), ("ready", "scheduled")]),
            "tags": st.sampled_from([None, ("x",), ("x", "y")]),
            "created_before": st.sampled_from([None, 5.0]),
        },
    ),
    "register_queue": (1, {}),
    "register_tasks": (
        1,
        {"task": st.sampled_from(TASKS), "queue": ANY_QUEUE, "completed": KEEPS, "failed": KEEPS},
    ),
    "retry": (3, {"picks": PICKS}),
    "maintain": (1, {}),
    "outlive_retention": (2, {}),
}


def _arguments(verb: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(verb), st.fixed_dictionaries(_VERBS[verb][1]))


ACTION = st.sampled_from([verb for verb, (weight, _) in _VERBS.items() for _ in range(weight)]).flatmap(_arguments)
HOLDING = {"flush", "cancel_held", "succeed", "release_unknown", "retire", "thaw_and_flush"}

RECOVERIES = ("recovered", "crash loop", "cancelled by recovery")
# A run in which one of these never happened has shown nothing about it.
SOMETIMES = {
    *RECOVERIES,
    "lease lost",
    "Flush already",
    "Flush fenced",
    "Flush gone",
    "Cancel cancelled",
    "Cancel requested",
    "Cancel finished",
    "Cancel unknown",
    "suspect claimed",
    "claimed from the overflow",
    "key taken",
    "handed over",
    "payload loaded",
    "Retry retried",
    "expired and removed",
}
MACHINE: list[Real] = []  # the database of the run: hypothesis makes the machines without arguments


class Stateful(RuleBasedStateMachine):
    """Simulated workers, producers and operators on one database."""

    def __init__(self) -> None:
        super().__init__()
        self.real = MACHINE[0]
        self.real.reset()
        self.state = replace(EMPTY)
        self.made = 0
        self.workers: dict[int, Worker] = {}
        self.seen: list[UUID] = []
        self.tokens: list[tuple[UUID, UUID, int]] = []  # of all claims there were: owner, execution, claim_no

    # --- one step ---

    def step(self, event: Event) -> Any:
        """Do it in both, and compare what they answer and what they are then."""
        answer = self.real.perform(event)
        found = self.real.state()
        if isinstance(event, InvokeMany):
            # Which ids are drawn is the database's matter; the others are told by the answer.
            event = InvokeMany(
                tuple(
                    replace(n, id=a.id if a.created else self.unknown())
                    for n, a in zip(event.items, answer, strict=True)
                )
            )
        if isinstance(event, Maintain):
            event = Maintain(frozenset(self.state.finished) - frozenset(found.finished))
        after, expected = transition(self.state, event)
        assert list(breaches(self.state, event, after)) == [], event
        assert answer == expected, event
        assert "\n".join(differences(comparable(after), found)) == "", event
        self.state = after
        self.count(event, answer)
        if isinstance(event, ClaimSome | ClaimSuspect):
            claimed: list[Any] = answer.claimed if isinstance(answer, Claim) else [answer]
            self.tokens += [(event.owner, c.id, c.claim_no) for c in claimed if isinstance(c, Claimed)]
        return answer

    def count(self, event: Event, answer: Any) -> None:
        """What happened, for the test to say whether it has seen what it is there for."""
        happened = self.real.happened
        happened[type(event).__name__] += 1
        if isinstance(event, Maintain) and event.removed:
            happened["expired and removed"] += 1
        if answer is None:
            return
        if answer == LEASE_LOST:
            happened["lease lost"] += 1
        elif isinstance(event, Flush | Cancel | Retry):
            happened.update(f"{type(event).__name__} {status}" for status in answer.values())
        elif isinstance(event, Recover):
            happened.update({word: n for word, n in zip(RECOVERIES, answer, strict=True) if n})
        elif isinstance(event, ClaimSuspect):
            happened["suspect claimed"] += 1
        elif isinstance(event, ClaimSome):
            happened["claimed from the overflow"] += any(
                self.state.live[c.id].queue_no == OVERFLOW for c in answer.claimed
            )
        elif isinstance(event, InvokeMany) and not all(invoked.created for invoked in answer):
            happened["key taken"] += 1
        elif isinstance(event, Succeed) and answer:
            happened["handed over"] += 1
        elif isinstance(event, LoadPayload):
            happened["payload loaded"] += 1

    def unknown(self) -> UUID:
        self.made += 1
        return UUID(int=self.made)

    def known(self, picks: list[int]) -> tuple[UUID, ...]:
        """Executions, the last ones first; 0 is none there is."""
        ids = [UUID(int=0), *reversed(self.seen)]
        return tuple(dict.fromkeys(ids[pick % len(ids)] for pick in picks))

    @initialize()
    def begin(self) -> None:
        self.step(RegisterQueue("a"))
        self.restart(0, 10.0, ("a", "b"))
        self.restart(1, 10.0, ("a", "b"))

    @rule(action=ACTION)
    def act(self, action: tuple[str, dict[str, Any]]) -> None:
        """One verb, or a few that belong together. One rule, since hypothesis switches off half of several."""
        verb, arguments = action[0], dict(action[1])
        if "k" in arguments:
            # A worker that is there; for what needs it, one that holds something, if there is one.
            if not self.workers:
                self.restart(0, 10.0, ("a", "b"))
            some = [k for k in sorted(self.workers) if self.workers[k].held] if verb in HOLDING else []
            some = some or sorted(self.workers)
            arguments["k"] = some[arguments["k"] % len(some)]
        getattr(self, verb)(**arguments)

    @invariant()
    def audit_is_clean(self) -> None:
        assert self.real.audited.check() == []

    # --- producers ---

    def invoke(self, news: list[New]) -> None:
        items = tuple(replace(new, payload=json.dumps(LARGE)) if new.is_large else new for new in news)
        answer: list[Invoked] = self.step(InvokeMany(items))
        for invoked in answer:
            if invoked.created:
                self.seen.append(invoked.id)

    # --- workers ---

    def restart(self, number: int, lease: float, queues: tuple[str, ...]) -> None:
        """A process is started, in place of one that was killed, or not even noticed to be gone."""
        owner = self.unknown()
        self.step(Register(owner, lease, queues, TASKS))
        self.workers[number] = Worker(owner)

    def crash(self, k: int) -> None:
        """It forgets everything; its session ends."""
        owner = self.workers.pop(k).owner
        if owner in self.state.sessions:
            self.step(SessionEnds(owner))

    def crash_in_mid_work(self, k: int, queue: str, times: int, cancels: bool) -> None:
        """It takes what there is and dies; its lease ends; others rescue; it is started anew."""
        for _ in range(times):
            if not self.state.is_alive(self.workers[k].owner):
                self.restart(k, 10.0, ("a", "b"))
            self.claim(k, queue, 50, TASKS)
            self.claim_suspect(k, queue)
            if cancels and self.workers[k].held:
                self.cancel_held(k, [0])
            self.workers[k].is_frozen = True
            for _ in range(2):
                self.advance_clock(6.0)
            self.step(Recover(queue if queue in self.state.queues else "a"))
        if k > 0:
            self.restart(0, 10.0, ("a", "b"))

    def freeze(self, k: int) -> None:
        """It does not beat any more, and holds what it holds."""
        self.workers[k].is_frozen = True

    def thaw_and_flush(self, k: int, kind: str) -> None:
        """A zombie writes everything it thinks it holds."""
        self.workers[k].is_frozen = False
        self.write(k, list(self.workers[k].held), kind)

    def heartbeat(self, k: int) -> None:
        if not self.workers[k].is_frozen:
            self.step(Heartbeat(self.workers[k].owner, 10.0))

    def hold_session(self, k: int) -> None:
        if self.workers[k].owner not in self.state.sessions:
            self.step(HoldSession(self.workers[k].owner))

    def session_cut(self, k: int) -> None:
        """The server misses its session; it misses two heartbeats; it may live."""
        if self.workers[k].owner not in self.state.sessions:
            self.hold_session(k)
        self.step(SessionEnds(self.workers[k].owner))
        self.step(Advance(6.0))
        for other in self.workers:
            if other != k:
                self.heartbeat(other)
        self.step(Recover("a"))

    def claim(self, k: int, queue: str, limit: int, tasks: tuple[str, ...]) -> None:
        worker = self.workers[k]
        if queue not in self.state.queues:
            self.step(RegisterQueue(queue))
        answer = self.step(ClaimSome(worker.owner, queue, tasks, limit))
        if isinstance(answer, Claim):
            worker.held.update({c.id: c.claim_no for c in answer.claimed})
        elif not worker.is_frozen:
            # It notices, drops what it holds, and takes a new incarnation.
            self.restart(k, 10.0, ("a", "b"))
            self.workers[k].last_flush = worker.last_flush
            self.claim(k, queue, limit, tasks)

    def claim_suspect(self, k: int, queue: str) -> None:
        worker = self.workers[k]
        answer = self.step(ClaimSuspect(worker.owner, queue, TASKS))
        if isinstance(answer, Claimed):
            worker.held[answer.id] = answer.claim_no

    def flush(
        self, k: int, picks: list[int], kind: str, delay: float, keep: float | None, load: bool, twice: bool
    ) -> None:
        """What it has done; perhaps after loading a large payload, perhaps sent again."""
        held = self.holding(k, picks)
        large = [i for i in held if (e := self.state.live.get(i)) is not None and e.is_large]
        if load and large:
            self.step(LoadPayload(large[0], self.workers[k].held[large[0]], self.workers[k].owner))
        self.write(k, held, kind, delay if kind in ("retried", "released") else 0.0, keep)
        if twice:
            self.repeat_last_flush(k)

    def work(self, k: int, queue: str, **flush: Any) -> None:
        """Claim and finish, as workers do all day."""
        self.claim(k, queue, 50, TASKS)
        self.flush(k, **flush)

    def flush_stale(self, k: int, pick: int, kind: str, foreign: bool) -> None:
        """With the token of a claim that has ended, or somebody else's: for an execution that runs, if there is one."""
        stale = [
            (owner, execution, claim_no)
            for owner, execution, claim_no in self.tokens
            if (row := self.state.live.get(execution)) is not None
            and row.state == "running"
            and (row.owner != owner if foreign else row.claim_no != claim_no)
        ]
        if tokens := stale or self.tokens:
            # The last ones first; the owner may have had a later claim of it.
            owner, execution, claim_no = tokens[-1 - pick % len(tokens)]
            row = self.state.live.get(execution)
            if foreign and row is not None:
                owner, claim_no = self.workers[k].owner, row.claim_no
            elif row is not None and row.owner is not None:
                owner = row.owner
            error = "E" if kind in ("failed", "retried") else None
            self.step(Flush(owner, (Outcome(execution, claim_no, kind, None, error),)))

    def repeat_last_flush(self, k: int) -> None:
        """Its reply was lost."""
        if (last := self.workers[k].last_flush) is not None:
            self.step(last)

    def release_unknown(self, k: int, queue: str) -> None:
        """Claims whose reply was lost."""
        known = list(self.workers[k].held)[::2]
        self.step(ReleaseUnknown(self.workers[k].owner, queue, tuple(known)))

    def retire(self, k: int) -> None:
        self.step(Retire(self.workers.pop(k).owner))

    def succeed(self, k: int, restarts: bool) -> None:
        """The server restarted; the process takes over what it held, of which it has forgotten a part."""
        if not self.state.is_alive(self.workers[k].owner):
            self.restart(k, 10.0, ("a", "b"))
            self.claim(k, "a", 50, TASKS)
        worker = self.workers[k]
        if restarts:
            self.step(Restart())
            for other in self.workers:
                if other != k:
                    self.heartbeat(other)
        new = self.unknown()
        claims = tuple(worker.held.items())[: max(1, len(worker.held) - 1)]
        if self.step(Succeed(worker.owner, new, 10.0, claims)) != LEASE_LOST:
            worker.owner = new

    def read_signals(self, k: int) -> None:
        self.step(ReadSignals(self.workers[k].owner, ("a", "b")))

    def recover(self, queue: str) -> None:
        self.step(Recover(queue))

    def write(self, k: int, executions: list[UUID], kind: str, delay: float = 0.0, keep: float | None = None) -> None:
        worker = self.workers[k]
        if not executions:
            return
        result = "1" if kind == "completed" else None
        error = "E" if kind in ("failed", "retried") else None
        outcomes = tuple(Outcome(i, worker.held.pop(i), kind, result, error, delay, keep) for i in executions)
        worker.last_flush = Flush(worker.owner, outcomes)
        self.step(worker.last_flush)

    def holding(self, k: int, picks: list[int]) -> list[UUID]:
        """Some of what a worker thinks it holds."""
        held = list(self.workers[k].held)
        return list(dict.fromkeys(held[pick % len(held)] for pick in picks)) if held else []

    # --- operators and time ---

    def advance_clock(self, seconds: float) -> None:
        self.step(Advance(seconds))
        for k in self.workers:
            self.heartbeat(k)

    def cancel(self, picks: list[int], reason: str | None) -> None:
        self.step(Cancel(self.known(picks), reason))

    def cancel_held(self, k: int, picks: list[int]) -> None:
        """What is running."""
        self.step(Cancel(tuple(self.holding(k, picks)), "while it runs"))

    def cancel_matching(
        self,
        queue: str | None,
        task: str | None,
        states: tuple[str, ...] | None,
        tags: tuple[str, ...] | None,
        created_before: float | None,
    ) -> None:
        self.step(CancelMatching("all of them", queue, task, states, tags, created_before))

    def register_queue(self) -> None:
        """Late: what was produced for it before is in the overflow partition."""
        self.step(RegisterQueue("b"))

    def register_tasks(self, task: str, queue: str, completed: float | None, failed: float | None) -> None:
        self.step(RegisterTasks((task,), queue, (completed,), (failed,)))

    def retry(self, picks: list[int]) -> None:
        """Dead letters are opened again."""
        dead = [i for i, f in self.state.finished.items() if f.execution.state != "completed"]
        wanted = [dead[pick % len(dead)] for pick in picks[1:] if dead]
        self.step(Retry(tuple(dict.fromkeys([*wanted, *self.known(picks[:1])]))))

    def maintain(self) -> None:
        self.step(Maintain(frozenset()))

    def outlive_retention(self) -> None:
        """What is kept for a time has expired; maintenance finds it, and nothing else."""
        self.step(Maintain(frozenset()))
        self.step(Advance(3 * DAY))
        self.step(Maintain(frozenset()))


@pytest.fixture(scope="module")
def real(pgconductor_databases: Databases) -> Iterator[Real]:
    with open_audited(pgconductor_databases) as audited:
        yield Real(audited)


@pytest.mark.timeout(3600)
def test_sql_does_what_the_model_says(real: Real, request: pytest.FixtureRequest) -> None:
    """A verb that does, in some state that nobody thought of, something else than it should."""
    asked: int | None = request.config.getoption("--stateful-examples")
    MACHINE[:] = [real]
    run_state_machine_as_test(
        Stateful,
        settings=settings(
            max_examples=asked or 30,
            stateful_step_count=50,
            deadline=None,
            derandomize=asked is None,
            database=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    assert {word for word, count in real.happened.items() if count} >= SOMETIMES
