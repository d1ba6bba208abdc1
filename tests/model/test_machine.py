"""The model by itself: random events, and the invariants after each.

The model is what the SQL is compared with (tests/sql/test_stateful.py). Were it wrong in the same way as the SQL, the
comparison would not tell; the invariants do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar
from uuid import UUID

import pytest
from model.machine import (
    DAY,
    EMPTY,
    LEASE_LOST,
    Advance,
    BegunWait,
    Cancel,
    CancelMatching,
    ClaimSome,
    ClaimSuspect,
    CloseChildren,
    Event,
    Execution,
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

from pgconductor.db.calls import Claim
from pgconductor.model import Claimed, Outcome

T = TypeVar("T")

QUEUES = ("a", "b")
TASKS = ("one", "two")


@dataclass
class World:
    """Draws events that make sense, and now and then ones that do not: stale tokens, the dead, the unknown."""

    rng: Random
    owners: list[UUID] = field(default_factory=list[UUID])
    tokens: list[tuple[UUID, UUID, int]] = field(default_factory=list[tuple[UUID, UUID, int]])  # owner, id, claim_no
    flushes: list[Flush] = field(default_factory=list[Flush])

    def uuid(self) -> UUID:
        return UUID(int=self.rng.getrandbits(128))

    def recent(self, things: list[T]) -> T:
        """One of the last, mostly."""
        return self.rng.choice(things[-6:] if self.rng.random() < 0.8 else things)

    def owner(self) -> UUID:
        return self.recent(self.owners) if self.owners else self.uuid()

    def execution(self, state: State) -> UUID:
        known = [*state.live, *state.finished]
        return self.recent(known) if known and self.rng.random() < 0.95 else self.uuid()

    def draw(self, state: State) -> Event:
        rng = self.rng
        queue, tasks = rng.choice(QUEUES), rng.choice([TASKS, TASKS, TASKS[:1]])
        kinds = {
            "invoke": 12,
            "claim": 12,
            "flush": 14,
            "repeat": 3,
            "advance": 5,
            "recover": 11,
            "cancel": 3,
            "cancel_matching": 0.3,
            "heartbeat": 5,
            "register": 3,
            "suspect": 8,
            "retry": 3,
            "retire": 0.7,
            "release": 0.7,
            "succeed": 1,
            "session": 1.5,
            "session_ends": 1,
            "restart": 0.3,
            "queue": 0.4,
            "tasks": 0.4,
            "signals": 1,
            "load": 1,
            "maintain": 1,
            "step": 4,
            "wait": 6,
            "park": 5,
            "history": 2,
            "read": 1,
            "close": 1,
            "close_children": 2,
        }
        match rng.choices(list(kinds), list(kinds.values()))[0]:
            case "invoke":
                return InvokeMany(tuple(self.new() for _ in range(rng.choice([1, 1, 1, 2, 5]))))
            case "claim":
                return ClaimSome(self.owner(), queue, tasks, rng.choice([1, 2, 10]))
            case "suspect":
                return ClaimSuspect(self.owner(), queue, tasks)
            case "flush" if self.tokens:
                owner = self.recent(self.tokens)[0]
                mine = {i: n for o, i, n in self.tokens[-12:] if o == owner}
                outcomes = [self.outcome(i, n) for i, n in mine.items() if rng.random() < 0.6]
                if outcomes and rng.random() < 0.05:
                    outcomes[0] = outcomes[0]._replace(claim_no=outcomes[0].claim_no + rng.choice([-1, 1]))
                return Flush(self.owner() if rng.random() < 0.1 else owner, tuple(outcomes))
            case "repeat" if self.flushes:
                return self.recent(self.flushes)
            case "advance":
                return Advance(rng.choice([0, 1, 3, 8, 30, -5, -600, DAY]))
            case "recover":
                return Recover(queue)
            case "cancel":
                return Cancel(
                    tuple(self.execution(state) for _ in range(rng.choice([1, 1, 3]))), rng.choice([None, "r"])
                )
            case "cancel_matching":
                return CancelMatching("all", queue, rng.choice([None, "one"]), None, rng.choice([None, ("x",)]))
            case "heartbeat":
                return Heartbeat(self.owner(), 10)
            case "register":
                return Register(self.uuid(), rng.choice([3, 10, 10]), rng.choice([QUEUES, QUEUES[:1]]), TASKS)
            case "retry":
                return Retry(tuple(self.execution(state) for _ in range(rng.choice([1, 2]))))
            case "retire":
                return Retire(self.owner())
            case "release":
                return ReleaseUnknown(self.owner(), queue, tuple(i for _, i, _ in self.tokens[-3:]))
            case "succeed":
                old = self.owner()
                return Succeed(old, self.uuid(), 10, tuple((i, n) for o, i, n in self.tokens[-8:] if o == old))
            case "session":
                return HoldSession(self.owner())
            case "session_ends":
                return SessionEnds(self.owner())
            case "restart":
                return Restart()
            case "queue":
                return RegisterQueue(queue)
            case "tasks":
                keep = rng.choice([None, (0.0,), (50.0,), (None,)])
                return RegisterTasks((rng.choice(TASKS),), queue, None, keep)
            case "signals":
                return ReadSignals(self.owner(), QUEUES)
            case "load" if self.tokens:
                owner, i, n = self.recent(self.tokens)
                return LoadPayload(i, n, owner)
            case "step" if self.tokens:
                owner, i, n = self.recent(self.tokens)
                is_failure = rng.random() < 0.3
                value, error = (None, "E") if is_failure else (rng.choice("123"), None)
                return SaveSteps(owner, (NewRecord(i, n, rng.choice(("s", "t")), value, error, rng.randrange(9)),))
            case "wait" if self.tokens:
                return self.begun(state)
            case "park" if tokens := [t for t in self.tokens if any(not w.is_seen for w in state.waits_of(t[1]))]:
                # Handlers give up only what they have to wait for, or have not been told of.
                owner, i, n = self.recent(tokens)
                return Flush(owner, (Outcome(i, n, "waiting"),))
            case "history" if self.tokens:
                owner, i, n = self.recent(self.tokens)
                return LoadHistory(owner, i, n)
            case "read" if self.tokens:
                owner = self.recent(self.tokens)[0]
                return ReadWaits(owner, tuple({i: n for o, i, n in self.tokens[-12:] if o == owner}.items()))
            case "close" if self.tokens:
                owner, i, n = self.recent([t for t in self.tokens if state.waits_of(t[1])] or self.tokens)
                return RequestClose(owner, i, n, ("c", "d"), "not wanted")
            case "close_children":
                return CloseChildren()
            case "maintain":
                expired = [
                    i for i, f in state.finished.items() if f.expires_at is not None and f.expires_at < state.now
                ]
                return Maintain(frozenset(i for i in expired if rng.random() < 0.8))
            case _:
                return Register(self.uuid(), 10, QUEUES, TASKS)

    def begun(self, state: State) -> StartWaits:
        """A sleep, a child, or both, of one execution; a name that it had in a former life is not used again."""
        rng = self.rng
        owner, i, n = self.recent(self.tokens)
        names = [name for name in rng.choice([("c",), ("w",), ("c", "w"), ("c", "d")]) if (i, name) not in state.steps]
        scope = rng.choice([None, None, "all"])
        return StartWaits(
            owner,
            tuple(
                BegunWait(i, n, name, rng.randrange(9), None, rng.choice([0, 2, 2, 5000]))
                if name == "w"
                else BegunWait(
                    i, n, name, rng.randrange(9), scope, None, rng.choice(["cancel", "abandon"]),
                    replace(self.new(), key=None, delay=None),
                )
                for name in names
            ),
        )  # fmt: skip

    def new(self) -> New:
        rng = self.rng
        return New(
            self.uuid(),
            rng.choice([*QUEUES, None]),
            rng.choice(TASKS),
            is_large=rng.random() < 0.1,
            priority=rng.choice([0, 0, 5]),
            delay=rng.choice([None, None, 4, -1]),
            key=rng.choice([None, None, "k", "l"]),
            tags=rng.choice([None, ("x", "y")]),
            deadline_in=rng.choice([None, 20]),
        )

    def outcome(self, execution: UUID, claim_no: int) -> Outcome:
        rng = self.rng
        kind = rng.choice(["completed", "completed", "failed", "failed", "retried", "released", "cancelled"])
        return Outcome(
            execution,
            claim_no,
            kind,
            "1" if kind == "completed" else None,
            "E" if kind in ("failed", "retried") else None,
            rng.choice([0.0, 0.0, 6.0]) if kind in ("retried", "released") else 0.0,
            rng.choice([None, 40.0, 100000.0, 0.0]),
        )

    def learn(self, event: Event, answer: object) -> None:
        """What the caller remembers of it."""
        match event, answer:
            case Register(), _:
                self.owners.append(event.owner)
            case Succeed(), frozenset():
                self.owners.append(event.new)
                self.tokens += [(event.new, i, n) for i, n in event.claims if i in answer]
            case ClaimSome(), Claim():
                self.tokens += [(event.owner, c.id, c.claim_no) for c in answer.claimed]
            case ClaimSuspect(), Claimed():
                self.tokens.append((event.owner, answer.id, answer.claim_no))
            case Flush(), _:
                self.flushes.append(event)
            case _:
                pass
        del self.owners[:-12], self.tokens[:-40], self.flushes[:-10]


def run(seed: int, events: int) -> Counter[str]:
    """Random events from one seed; what happened, counted."""
    world = World(Random(seed))
    state, counts = EMPTY, Counter[str]()
    acknowledged: set[UUID] = set()
    ended: set[UUID] = set()
    for n in range(events):
        event = world.draw(state)
        after, answer = transition(state, event)
        found = list(breaches(state, event, after))
        assert found == [], f"seed {seed}, event {n}: {event}"
        if isinstance(event, InvokeMany):
            acknowledged.update(new.id for new in event.items if new.id in after.live)
        ended.update(i for i in state.live if i not in after.live)
        assert acknowledged <= {*after.live, *after.finished} | ended
        world.learn(event, answer)
        counts[type(event).__name__] += 1
        if isinstance(event, Flush):
            counts.update(answer.values())
            again, second = transition(after, event)
            assert again == after, "a flush that was sent twice changed something"
            assert not answer or second
        if isinstance(event, Recover):
            for name, count in zip(("recovered", "crash loop", "cancelled by recovery"), answer, strict=True):
                counts[name] += count
        if isinstance(event, SaveSteps | StartWaits):
            counts.update(f"{type(event).__name__}: {row.status}" for row in answer)
        if isinstance(event, Retry):
            counts.update(f"retry: {status}" for status in answer.values())
        if answer == LEASE_LOST:
            counts["lease lost"] += 1
        if isinstance(event, RequestClose | CloseChildren) and answer:
            counts[f"{type(event).__name__}: some"] += 1
        counts.update(
            f"{after.live[i].state} by {type(event).__name__}"
            for i, row in state.live.items()
            if row.state == "waiting" and i in after.live and after.live[i].state != "waiting"
        )
        counts.update(
            f"wait {wait.outcome}"
            for key, wait in after.waits.items()
            if wait.outcome is not None and (key not in state.waits or state.waits[key].outcome is None)
        )
        state = after
        if len(state.live) + len(state.finished) > 60:
            state = replace(state, live={}, finished={}, steps={}, waits={}, closings={})
            acknowledged.clear()
    return counts


def test_random_events_break_no_invariant(request: pytest.FixtureRequest) -> None:
    """The model itself loses executions, gives one to two owners, or lets a zombie write."""
    total = int(request.config.getoption("--model-events") or 0)
    each = 2000
    counts = Counter[str]()
    for seed in range(max(1, total // each)):
        counts += run(seed, each)
    # A run in which one of these never happened has shown nothing about it.
    for happened in ("already", "fenced", "gone", "recovered", "crash loop", "cancelled by recovery", "lease lost"):
        assert counts[happened] > 0, f"no {happened} among {counts}"
    wanted = {f"retry: {status}" for status in ("retried", "duplicate", "live", "completed")}
    wanted |= {f"SaveSteps: {status}" for status in ("saved", "stored", "fenced")}
    wanted |= {f"StartWaits: {status}" for status in ("open", "resolved", "fenced")}
    wanted |= {"RequestClose: some", "CloseChildren: some", "ready by Flush", "ready by Cancel", "running by ClaimSome"}
    wanted |= {f"wait {outcome}" for outcome in ("completed", "failed", "cancelled", "elapsed")}
    assert wanted - set(counts) == set()


def test_model_notices_a_zombie() -> None:
    """The invariants are true of everything, so that they never fail."""
    one, owner, other = UUID(int=1), UUID(int=2), UUID(int=3)
    running = Execution(one, 0, "q", "t", "running", 0, 0, 0, "{}", False, owner=owner, claim_no=2, attempt=1)
    before = replace(EMPTY, live={one: running})
    for event in (Flush(other, (Outcome(one, 2, "completed"),)), Flush(owner, (Outcome(one, 1, "completed"),))):
        assert transition(before, event)[0] == before
        wrong = replace(before, live={one: replace(running, state="ready", owner=None)})
        assert any(words.startswith("I5") for words in breaches(before, event, wrong))
    assert any(words.startswith("I1") for words in breaches(before, Advance(1), EMPTY))
    assert any(
        words.startswith("I2")
        for words in breaches(before, Recover("q"), replace(before, live={one: replace(running, owner=other)}))
    )
