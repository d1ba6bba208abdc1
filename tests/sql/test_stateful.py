"""The SQL beside the model: simulated workers, one verb at a time; after each the whole database must be the model's.

Time stands still until a rule moves it, ids are counted instead of drawn, and the server's epoch is a number: so a run
is determined by its choices, and every column can be compared. After each rule the audit is checked, too.

`--stateful-examples N` runs N random examples instead of the fixed few, and shrinks what fails.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    BegunWait,
    Cancel,
    CancelMatching,
    ClaimSome,
    ClaimSuspect,
    CloseChildren,
    Event,
    Flush,
    Heartbeat,
    HoldSession,
    InvokeMany,
    LoadHistory,
    LoadPayload,
    Maintain,
    New,
    NewRecord,
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
    Succeed,
    breaches,
    transition,
)
from sql.audited import open_audited
from sql.modelled import Modelled, comparable, differences

from pgconductor.db.calls import Claim
from pgconductor.model import Claimed, Invoked, Outcome
from pgconductor.testing import Databases

TASKS = ("one", "two")
QUEUES = ("a", "b", "c")  # the last one is never registered
LARGE = {"text": "0123456789abcdef" * 200}


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
WAITS = st.builds(
    BegunWait,
    execution=st.just(UUID(int=0)),
    claim_no=st.just(0),
    name=st.sampled_from("cdew"),
    position=st.integers(0, 9),
    scope=st.sampled_from([None, None, "all"]),
    due_in=st.sampled_from([0.0, 3.0, 3.0, 5000.0]),
    on_close=st.sampled_from(["cancel", "cancel", "abandon"]),
    new=NEWS.map(lambda new: replace(new, key=None)),
)
ENDS = st.sampled_from(["completed", "completed", "failed", "cancelled"])
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
    "succeed": (3, {**_K, "restarts": st.booleans(), "wrong": st.sampled_from([0, 0, 1])}),
    "outage": (1, _K),
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
    "record": (
        4,
        {
            **_K,
            "pick": PICK,
            "name": st.sampled_from("stuv"),
            "fails": st.sampled_from([False, False, True]),
            "times": st.sampled_from([1, 1, 2]),
        },
    ),
    "begin_wait": (4, {**_K, "pick": PICK, "waits": st.lists(WAITS, min_size=1, max_size=3)}),
    "record_stale": (2, {"pick": PICK, "waits": st.lists(WAITS, min_size=1, max_size=1)}),
    "fail_stale": (3, {**_K, "queue": REGISTERED, "pick": PICK}),
    "park": (3, {**_K, "picks": PICKS}),
    "wait_for_children": (
        8,
        {
            **_K,
            "queue": REGISTERED,
            "waits": st.lists(WAITS, min_size=1, max_size=3),
            "kind": ENDS,
            "pick": PICK,
            "parks": st.sampled_from([True, True, True, False]),
            "meanwhile": st.sampled_from(["", "", "crash", "retry"]),
        },
    ),
    "end_together": (3, {**_K, "queue": REGISTERED, "waits": st.lists(WAITS, min_size=1, max_size=3), "kind": ENDS}),
    "change_mind": (
        3,
        {
            **_K,
            "queue": REGISTERED,
            "waits": st.lists(WAITS, min_size=1, max_size=3),
            "pick": PICK,
            "parks": st.sampled_from([True, True, False]),
        },
    ),
    "live_again": (2, {**_K, "queue": REGISTERED, "waits": st.lists(WAITS, min_size=1, max_size=3), "pick": PICK}),
    "load_history": (2, {**_K, "pick": PICK}),
    "read_waits": (2, {**_K, "picks": PICKS}),
    "request_close": (2, {**_K, "pick": PICK}),
    "close_children": (3, {}),
    "maintain": (1, {}),
    "outlive_retention": (2, {}),
}


def _arguments(verb: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    return st.tuples(st.just(verb), st.fixed_dictionaries(_VERBS[verb][1]))


ACTION = st.sampled_from([verb for verb, (weight, _) in _VERBS.items() for _ in range(weight)]).flatmap(_arguments)
HOLDING = {
    "flush", "cancel_held", "succeed", "release_unknown", "retire", "thaw_and_flush", "record", "begin_wait", "park",
    "load_history", "read_waits", "request_close",
}  # fmt: skip

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
    *(f"SaveSteps {status}" for status in ("saved", "stored", "fenced")),
    *(f"StartWaits {status}" for status in ("open", "resolved", "fenced")),
    *(f"wait {outcome}" for outcome in ("completed", "failed", "cancelled", "elapsed")),
    *(f"woken by {verb}" for verb in ("Flush", "ClaimSome", "Cancel", "CloseChildren")),
    *(f"{verb} some" for verb in ("RequestClose", "CloseChildren", "ReadWaits", "LoadHistory")),
    "parked",
    "records of a former life",
}
HAPPENED = Counter[str]()
MACHINE: list[Modelled] = []  # the database of the run: hypothesis makes the machines without arguments


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
        if isinstance(event, StartWaits):
            event = replace(
                event,
                items=tuple(
                    replace(w, new=replace(w.new, id=UUID(a.target) if a.target else self.unknown())) if w.new else w
                    for w, a in zip(event.items, answer, strict=True)
                ),
            )
        if isinstance(event, Maintain):
            event = Maintain(frozenset(self.state.finished) - frozenset(found.finished))
        after, expected = transition(self.state, event)
        self.count_waiting(self.state, event, after)
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
        happened = HAPPENED
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
        elif isinstance(event, SaveSteps | StartWaits):
            happened.update(f"{type(event).__name__} {row.status}" for row in answer)
        elif isinstance(event, RequestClose | CloseChildren | ReadWaits | LoadHistory) and answer:
            happened[f"{type(event).__name__} some"] += 1

    def count_waiting(self, before: State, event: Event, after: State) -> None:
        """How waits were resolved, and who woke those that waited."""
        name = type(event).__name__
        HAPPENED.update(
            f"woken by {name}"
            for i, row in before.live.items()
            if row.state == "waiting" and i in after.live and after.live[i].state != "waiting"
        )
        HAPPENED.update(
            f"wait {wait.outcome}"
            for key, wait in after.waits.items()
            if wait.outcome is not None and (key not in before.waits or before.waits[key].outcome is None)
        )
        HAPPENED["parked"] += any(
            row.state == "waiting" and before.live[i].state != "waiting"
            for i, row in after.live.items()
            if i in before.live
        )
        if isinstance(event, Retry):
            HAPPENED["records of a former life"] += any(key[0] not in before.live for key in after.steps)

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

    def succeed(self, k: int, restarts: bool, wrong: int) -> None:
        """The server restarted; the process takes over what it held, a part forgotten or mistaken."""
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
        claims = tuple((i, n - wrong) for i, n in worker.held.items())[: max(1, len(worker.held) - 1)]
        if self.step(Succeed(worker.owner, new, 10.0, claims)) != LEASE_LOST:
            worker.owner = new

    def outage(self, k: int) -> None:
        """The server restarts, and the process does not come back in time: no crash is charged."""
        self.claim(k, "a", 50, TASKS)
        self.workers[k].is_frozen = True
        self.step(Restart())
        self.step(Advance(12.0))
        self.step(Recover("a"))

    def read_signals(self, k: int) -> None:
        self.step(ReadSignals(self.workers[k].owner, ("a", "b")))

    def recover(self, queue: str) -> None:
        self.step(Recover(queue))

    def write(
        self,
        k: int,
        executions: list[UUID],
        kind: str,
        delay: float = 0.0,
        keep: float | None = None,
        awaited: str | None = None,
    ) -> None:
        worker = self.workers[k]
        if not executions:
            return
        result = "1" if kind == "completed" else awaited
        error = "E" if kind in ("failed", "retried") else None
        outcomes = tuple(Outcome(i, worker.held.pop(i), kind, result, error, delay, keep) for i in executions)
        worker.last_flush = Flush(worker.owner, outcomes)
        self.step(worker.last_flush)

    def holding(self, k: int, picks: list[int]) -> list[UUID]:
        """Some of what a worker thinks it holds."""
        held = list(self.workers[k].held)
        return list(dict.fromkeys(held[pick % len(held)] for pick in picks)) if held else []

    # --- what handlers record ---

    def record(self, k: int, pick: int, name: str, fails: bool, times: int) -> None:
        """A step; again, since the reply was lost."""
        for execution, claim_no in self.holding_one(k, pick):
            for n in range(times):
                value, error = (None, "E") if fails else (str(n), None)
                position = len(self.state.records(execution))
                new = NewRecord(execution, claim_no, name, value, error, position)
                self.step(SaveSteps(self.workers[k].owner, (new,)))

    def begin_wait(self, k: int, pick: int, waits: list[BegunWait]) -> None:
        """Sleeps and children, in one statement."""
        for execution, claim_no in self.holding_one(k, pick):
            if begun := self.waits_of(execution, claim_no, waits):
                self.step(StartWaits(self.workers[k].owner, begun))
            self.seen += [UUID(w.target) for w in self.state.waits_of(execution) if w.kind == "child" and w.target]

    def record_stale(self, pick: int, waits: list[BegunWait]) -> None:
        """By a claim that may have ended."""
        stale = [
            token for token in self.tokens
            if (row := self.state.live.get(token[1])) is not None and row.claim_no != token[2]
        ]  # fmt: skip
        if tokens := stale or self.tokens:
            owner, execution, claim_no = tokens[-1 - pick % len(tokens)]
            self.step(SaveSteps(owner, (NewRecord(execution, claim_no, "s", '"late"'),)))
            if begun := self.waits_of(execution, claim_no, waits):
                self.step(StartWaits(owner, begun))
            self.step(ReadWaits(owner, ((execution, claim_no),)))
            self.step(LoadHistory(owner, execution, claim_no))
            self.step(RequestClose(owner, execution, claim_no, tuple("cde"), "late"))

    def fail_stale(self, k: int, queue: str, pick: int) -> None:
        """A claim that is over is told to have failed, when another has given the execution back with a failure."""
        for execution, _ in self.one_of(k, queue, pick):
            self.write(k, [execution], "released")
            self.claim(k, queue, 50, TASKS)
            if execution in self.workers[k].held:
                self.record(k, list(self.workers[k].held).index(execution), "t", fails=True, times=1)
                self.write(k, [execution], "released")
            for owner, _, claim_no in [token for token in self.tokens if token[1] == execution][-2:]:
                self.step(Flush(owner, (Outcome(execution, claim_no, "retried", None, "E"),)))

    def park(self, k: int, picks: list[int]) -> None:
        """Give up what has something to wait for, or to be told of."""
        held = self.holding(k, picks)
        for execution in [i for i in held if any(not w.is_seen for w in self.state.waits_of(i))]:
            # With or without the names of the waits that its tasks are parked for.
            names = [w.name for w in self.state.waits_of(execution)][:2] if picks[0] % 2 else []
            self.write(k, [execution], "waiting", awaited=json.dumps(names) if names else None)

    def wait_for_children(
        self, k: int, queue: str, waits: list[BegunWait], kind: str, pick: int, parks: bool, meanwhile: str
    ) -> None:
        """A handler waits, its children end, and it goes on."""
        for execution, _ in self.one_of(k, queue, pick):
            self.record(k, pick, "s", fails=False, times=1)
            self.begin_wait(k, pick, waits)
            if parks:
                self.write(k, [i for i in [execution] if any(not w.is_seen for w in self.state.waits_of(i))], "waiting")
            if meanwhile == "crash":
                self.crash_in_mid_work(k, queue, 1, cancels=False)
            if meanwhile == "retry" and execution in self.workers[k].held:
                self.write(k, [execution], "retried")
            self.end_children(k, execution, kind)
            if execution in self.workers[k].held:
                self.read_waits(k, [list(self.workers[k].held).index(execution)])
            self.advance_clock(3.0)
            self.claim(k, queue, 50, TASKS)
            if execution in self.workers[k].held:
                self.step(LoadHistory(self.workers[k].owner, execution, self.workers[k].held[execution]))

    def end_children(self, k: int, execution: UUID, kind: str) -> None:
        """Claim what there is, and end those of an execution's children that came with it."""
        targets = [UUID(w.target) for w in self.state.waits_of(execution) if w.kind == "child" and w.target]
        for queue in {self.state.live[i].queue for i in targets if i in self.state.live}:
            self.claim(k, queue, 50, TASKS)
        mine = [i for i in targets if i in self.workers[k].held]
        if kind == "cancelled":
            self.step(Cancel(tuple(targets), "not wanted"))
        else:
            self.write(k, mine, kind, keep=30.0)

    def end_together(self, k: int, queue: str, waits: list[BegunWait], kind: str) -> None:
        """A parent and its children end, or are cancelled, in one call."""
        for execution, _ in self.one_of(k, queue, 0):
            self.begin_wait(k, 0, waits)
            family = [UUID(w.target) for w in self.state.waits_of(execution) if w.kind == "child" and w.target]
            self.claim(k, queue, 50, TASKS)
            held = self.workers[k].held
            if kind == "cancelled":
                self.write(k, [i for i in family if i in held], "released")
                self.step(Cancel((execution, *family), "all of them"))
            else:
                self.write(k, [i for i in [execution, *family] if i in held], kind, keep=30.0)

    def change_mind(self, k: int, queue: str, waits: list[BegunWait], pick: int, parks: bool) -> None:
        """A handler cancels its children, and waits for their end or does not."""
        for execution, _ in self.one_of(k, queue, pick):
            self.begin_wait(k, pick, waits)
            self.request_close(k, pick)
            if parks and any(not w.is_seen for w in self.state.waits_of(execution)):
                self.write(k, [execution], "waiting")
            self.step(CloseChildren())
            self.read_waits(k, [pick])

    def live_again(self, k: int, queue: str, waits: list[BegunWait], pick: int) -> None:
        """It fails with records, and is opened again."""
        for execution, _ in self.one_of(k, queue, pick):
            self.record(k, pick, "s", fails=False, times=1)
            self.begin_wait(k, pick, waits)
            self.record(k, pick, "t", fails=True, times=1)
            self.write(k, [execution], "failed", keep=30.0)
            self.step(Retry((execution,)))

    def load_history(self, k: int, pick: int) -> None:
        for execution, claim_no in self.holding_one(k, pick):
            self.step(LoadHistory(self.workers[k].owner, execution, claim_no))

    def read_waits(self, k: int, picks: list[int]) -> None:
        held = self.workers[k].held
        self.step(ReadWaits(self.workers[k].owner, tuple((i, held[i]) for i in self.holding(k, picks))))

    def request_close(self, k: int, pick: int) -> None:
        for execution, claim_no in self.holding_one(k, pick):
            self.step(RequestClose(self.workers[k].owner, execution, claim_no, tuple("cd"), "no more needed"))

    def close_children(self) -> None:
        self.step(CloseChildren())

    def one_of(self, k: int, queue: str, pick: int) -> list[tuple[UUID, int]]:
        """As `holding_one`, after claiming what there is, or one that is made for it."""
        self.claim(k, queue, 50, TASKS)
        if not self.workers[k].held:
            self.invoke([New(UUID(int=0), queue, TASKS[0])])
            self.claim(k, queue, 50, TASKS)
        return self.holding_one(k, pick)

    def holding_one(self, k: int, pick: int) -> list[tuple[UUID, int]]:
        """One of what a worker thinks it holds, with its claim, if there is one."""
        return [(i, self.workers[k].held[i]) for i in self.holding(k, [pick])]

    def waits_of(self, execution: UUID, claim_no: int, waits: list[BegunWait]) -> tuple[BegunWait, ...]:
        """These, each name once, and none that it had in a former life: a handler finds those in its history."""
        chosen = {w.name: w for w in waits if (execution, w.name) not in self.state.steps}
        return tuple(
            replace(
                wait, execution=execution, claim_no=claim_no, due_in=wait.due_in if name == "w" else None,
                on_close=None if name == "w" else wait.on_close,
                new=None if wait.new is None or name == "w" else replace(
                    wait.new, payload=json.dumps(LARGE) if wait.new.is_large else wait.new.payload
                ),
            )
            for name, wait in chosen.items()
        )  # fmt: skip

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
def real(pgconductor_databases: Databases) -> Iterator[Modelled]:
    with open_audited(pgconductor_databases) as audited:
        yield Modelled(audited)


@pytest.mark.timeout(3600)
def test_sql_does_what_the_model_says(real: Modelled, request: pytest.FixtureRequest) -> None:
    """A verb that does, in some state that nobody thought of, something else than it should."""
    asked: int | None = request.config.getoption("--stateful-examples")
    MACHINE[:] = [real]
    HAPPENED.clear()
    run_state_machine_as_test(
        Stateful,
        settings=settings(
            max_examples=asked or 35,
            stateful_step_count=50,
            deadline=None,
            derandomize=asked is None,
            database=None,
            print_blob=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
            # To shrink takes minutes: where somebody waits for it.
            phases=[Phase.generate, Phase.shrink] if asked else [Phase.generate],
        ),
    )
    assert {word for word, count in HAPPENED.items() if count} >= SOMETIMES
