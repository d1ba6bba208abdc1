"""Every pair of mutating verbs on the same rows, in every order of begin, execute and commit; and two triples.

What must come out is what one of the two orders, one after the other, gives, by the model: the rows, and what the
callers are told. Nobody may deadlock, and the audit must be clean. A verb that skips what another has locked ("the next
sweep has it") may leave a row as it was: then the same must come out after the next sweep.

Scenes are played once and put back from a copy. Races are driven by gates: a transaction is held open, and the rival
has ended or waits for a lock (`pg_blocking_pids`) before the test goes on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, cast
from uuid import UUID, uuid4

import psycopg
import pytest
from model.machine import (
    DAY,
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
    InvokeMany,
    LoadHistory,
    Maintain,
    New,
    NewRecord,
    ReadWaits,
    Recover,
    Register,
    RegisterQueue,
    RegisterTasks,
    ReleaseUnknown,
    RequestClose,
    Retire,
    Retry,
    SaveSteps,
    StartWaits,
    State,
    Step,
    Succeed,
    transition,
)
from sql.audited import open_audited
from sql.database import Session
from sql.modelled import Modelled, comparable

from pgconductor.db.calls import Claim, StartedWait
from pgconductor.model import Claimed, Invoked, Outcome, Record
from pgconductor.testing import Databases

HOLDER, OTHER = UUID(int=1), UUID(int=2)
TASK = ("t",)
NOBODY = UUID(int=0)  # stands for an id that was made in a run

_SAVED = (
    "_private_executions", "_private_finished", "_private_dedupe_keys", "_private_payloads", "_private_orchestrators",
    "_private_workers", "_private_tasks", "_private_queues", "_private_expiry_slots", "_private_steps",
    "_private_waits", "_private_closings", "_test_audit", "_test_records", "_test_world",
)  # fmt: skip
# Copies of the tables, one set per scene, and a function that puts a set back: in static statements, so that they are
# planned once. The triggers write to the audit, which is put back last.
_KEEPER = """
create table {s}._test_saved (scene text, relation text, content json, primary key (scene, relation));
create function {s}._test_put_back(p_scene text) returns void language plpgsql as $$
declare
    v_no int;
begin
    for v_no in select no from {s}._private_queues where no > 1 loop
        execute format('drop table {s}.%I', '_private_queue_' || v_no);
        perform setval(pg_get_serial_sequence('{s}._private_queues', 'no'), 1, true);
    end loop;
    {statements}
end $$
"""
_STATEMENTS = """
    delete from {s}.{relation};
    insert into {s}.{relation} overriding system value select r.* from {s}._test_saved s
        cross join lateral json_populate_recordset(null::{s}.{relation}, s.content) r
    where s.scene = p_scene and s.relation = '{relation}' and s.content is not null;
"""


# --- scenes ---


@dataclass(frozen=True)
class Scene:
    """A state to start from, and what the verbs need to know of it."""

    state: State
    ids: tuple[UUID, ...]  # of all executions
    held: tuple[tuple[UUID, int], ...]  # claims that the holder has, or has had
    keys: tuple[str, ...]  # dedupe keys to invoke with, all of them taken, if one is
    parent: tuple[UUID, int] | None = None  # an execution with records, and the last claim of it
    child: tuple[UUID, int] | None = None  # and of its child


class Play:
    """A scene in the making: events go to the database, the state is what it then says."""

    def __init__(self, modelled: Modelled) -> None:
        self.modelled = modelled
        self.ids: list[UUID] = []
        self.held: dict[UUID, int] = {}
        self.parent: tuple[UUID, int] | None = None
        self.child: tuple[UUID, int] | None = None
        modelled.reset()
        self(RegisterQueue("q"))
        self(RegisterTasks(TASK, "q", (5000.0,), (5000.0,)))
        self(Register(HOLDER, 10, ("q",), TASK))
        self(Register(OTHER, 100 * DAY, ("q",), TASK))

    def __call__(self, event: Event) -> Any:
        return self.modelled.perform(event)

    def invoke(self, *keys: str | None, delay: float | None = None) -> None:
        answer: list[Invoked] = self(InvokeMany(tuple(New(NOBODY, "q", "t", key=key, delay=delay) for key in keys)))
        self.ids += [invoked.id for invoked in answer]

    def claim(self, owner: UUID = HOLDER, limit: int = 50) -> None:
        claim: Claim = self(ClaimSome(owner, "q", TASK, limit))
        if owner == HOLDER:
            self.held.update({claimed.id: claimed.claim_no for claimed in claim.claimed})

    def family(self, *, due_in: float | None = None, is_claimed: bool = True) -> None:
        """One that has done a step and has a child; both run, or the child is ready. It sleeps too, if it is told."""
        self.invoke("k")
        self.claim()
        ((parent, claim_no),) = self.held.items()
        self.parent = (parent, claim_no)
        self(SaveSteps(HOLDER, (NewRecord(parent, claim_no, "step"),)))
        waits = [BegunWait(parent, claim_no, "child", 1, on_close="cancel", new=New(NOBODY, "q", "t"))]
        if due_in is not None:
            waits.append(BegunWait(parent, claim_no, "nap", 2, due_in=due_in))
        (begun, *_) = self(StartWaits(HOLDER, tuple(waits)))
        child = UUID(begun.target)
        self.ids.append(child)
        if is_claimed:
            self.claim()
        self.child = (child, self.held.get(child, 0))

    def park(self) -> None:
        assert self.parent is not None
        self(Flush(HOLDER, (Outcome(*self.parent, "waiting", keep=5000.0),)))
        del self.held[self.parent[0]]

    def crash(self) -> None:
        owner = uuid4()
        self(Register(owner, 5, ("q",), TASK))
        self.claim(owner)
        self(Advance(6))
        self(Heartbeat(HOLDER, 10))
        self(Recover("q"))


def running(play: Play) -> None:
    play.invoke("k")
    play.claim()


def abandoned(play: Play) -> None:
    running(play)
    play(Advance(11))


def poisonous(play: Play) -> None:
    play.invoke("k")
    play.crash()
    play.crash()
    suspect: Claimed = play(ClaimSuspect(HOLDER, "q", TASK))
    play.held[suspect.id] = suspect.claim_no
    play(Advance(11))


def suspected(play: Play) -> None:
    play.invoke("k")
    play.crash()
    play.crash()


def ready(play: Play) -> None:
    play.invoke("k")


def due(play: Play) -> None:
    play.invoke("k", delay=1)
    play(Advance(2))


def asked(play: Play) -> None:
    """Running, its cancellation requested."""
    running(play)
    play(Cancel(tuple(play.ids), "before"))


def dead_letter(play: Play) -> None:
    """Failed, its key free."""
    running(play)
    play(Flush(HOLDER, tuple(Outcome(i, n, "failed", None, "E", keep=5000.0) for i, n in play.held.items())))


def expired(play: Play) -> None:
    play(Maintain(frozenset()))
    dead_letter(play)
    play(Advance(DAY))


def several(play: Play) -> None:
    """Two running, one of them to be cancelled; two ready; one dead letter: verbs take them in opposite orders."""
    dead_letter(play)
    play.held.clear()
    play.invoke("l", "m")
    play.claim()
    play.invoke("n", "o")


def family(play: Play) -> None:
    """Parent and child run."""
    play.family()


def unrecorded(play: Play) -> None:
    """Running, and nothing is recorded yet."""
    running(play)
    ((execution, claim_no),) = play.held.items()
    play.parent = (execution, claim_no)


def parked(play: Play) -> None:
    """The parent waits, the child runs."""
    play.family()
    play.park()


def sleeping(play: Play) -> None:
    """The parent waits for a sleep that is over now, and for its child, which runs."""
    play.family(due_in=1)
    play.park()
    play(Advance(2))


def orphaned(play: Play) -> None:
    """The parent waits, and the process that ran the child is dead."""
    play.family()
    play.park()
    play(Advance(11))


def on_last_life(play: Play) -> None:
    """The parent waits, and the child's third process is dead."""
    play.family(is_claimed=False)
    play.park()
    play.crash()
    play.crash()
    suspect: Claimed = play(ClaimSuspect(HOLDER, "q", TASK))
    play.held[suspect.id] = suspect.claim_no
    play.child = (suspect.id, suspect.claim_no)
    play(Advance(11))


def closing(play: Play) -> None:
    """The parent has failed, and its child, which runs, is to be cancelled."""
    play.family()
    assert play.parent is not None
    play(Flush(HOLDER, (Outcome(*play.parent, "failed", None, "E", keep=5000.0),)))
    del play.held[play.parent[0]]


def unstarted(play: Play) -> None:
    """The parent waits, and nobody has claimed the child; another is to be cancelled."""
    play.family(is_claimed=False)
    assert play.parent is not None
    play(RequestClose(HOLDER, *play.parent, ("child",), "not wanted"))
    play.park()


SCENES: dict[str, Callable[[Play], None]] = {
    scene.__name__: scene
    for scene in (
        running,
        abandoned,
        poisonous,
        suspected,
        ready,
        due,
        asked,
        dead_letter,
        expired,
        several,
        unrecorded,
        family,
        parked,
        sleeping,
        orphaned,
        on_last_life,
        closing,
        unstarted,
    )
}


# --- verbs: one event per scene and side; the second side takes everything in the opposite order ---


def turned(things: tuple[Any, ...], side: int) -> tuple[Any, ...]:
    return things[::-1] if side else things


def flush(kind: str) -> Callable[[Scene, int], Event]:
    def event(scene: Scene, side: int) -> Event:
        error = "E" if kind in ("failed", "retried") else None
        outcomes = [Outcome(i, n, kind, None, error, 0.0, 5000.0) for i, n in scene.held]
        return Flush(HOLDER, turned(tuple(outcomes), side))

    return event


def of_parent(make: Callable[[UUID, int, int], Event]) -> Callable[[Scene, int], Event]:
    """On behalf of the parent's claim."""

    def event(scene: Scene, side: int) -> Event:
        assert scene.parent is not None
        return make(*scene.parent, side)

    return event


def end_child(kind: str) -> Callable[[Scene, int], Event]:
    def event(scene: Scene, side: int) -> Event:
        assert scene.child is not None
        result, error = ("1", None) if kind == "completed" else (None, "E")
        return Flush(HOLDER, (Outcome(*scene.child, kind, result, error, keep=5000.0),))

    return event


def end_both(kind: str) -> Callable[[Scene, int], Event]:
    def event(scene: Scene, side: int) -> Event:
        assert scene.child is not None
        assert scene.parent is not None
        error = "E" if kind == "failed" else None
        both = (Outcome(*scene.parent, kind, None, error, keep=5000.0), Outcome(*scene.child, kind, None, error))
        return Flush(HOLDER, turned(both, side))

    return event


def begin_both(execution: UUID, claim_no: int, side: int) -> Event:
    waits = (
        BegunWait(execution, claim_no, "other", 3, on_close="cancel", new=New(uuid4(), "q", "t", delay=5.0)),
        BegunWait(execution, claim_no, "late", 4, due_in=9.0),
    )
    return StartWaits(HOLDER, turned(waits, side))


Verb = Callable[[Scene, int], Event]
VERBS: dict[str, Verb] = {
    "invoke": lambda scene, side: InvokeMany(
        turned(tuple(New(uuid4(), "q", "t", key=key) for key in scene.keys), side)
    ),
    "claim": lambda scene, side: ClaimSome(OTHER, "q", TASK, 50),
    "claim_suspect": lambda scene, side: ClaimSuspect(OTHER, "q", TASK),
    "complete": flush("completed"),
    "fail": flush("failed"),
    "retried": flush("retried"),
    "release": flush("released"),
    "cancel": lambda scene, side: Cancel(turned(scene.ids, side), "by id"),
    "cancel_matching": lambda scene, side: CancelMatching("all"),
    "recover": lambda scene, side: Recover("q"),
    "release_unknown": lambda scene, side: ReleaseUnknown(HOLDER, "q"),
    "succeed": lambda scene, side: Succeed(HOLDER, UUID(int=10 + side), 10, turned(scene.held, side)),
    "retire": lambda scene, side: Retire(HOLDER),
    "heartbeat": lambda scene, side: Heartbeat(HOLDER, 10),
    "register_queue": lambda scene, side: RegisterQueue("another"),
    "register_tasks": lambda scene, side: RegisterTasks(TASK, "q", None, (6000.0 + side,)),
    "retry": lambda scene, side: Retry(turned(scene.ids, side)),
    "maintain": lambda scene, side: Maintain(frozenset()),
}
FAMILY: dict[str, Verb] = {
    "park": of_parent(lambda i, n, side: Flush(HOLDER, (Outcome(i, n, "waiting", keep=5000.0),))),
    "retry_parent": of_parent(lambda i, n, side: Flush(HOLDER, (Outcome(i, n, "retried", None, "E", keep=5000.0),))),
    "complete_parent": of_parent(lambda i, n, side: Flush(HOLDER, (Outcome(i, n, "completed", "1", keep=5000.0),))),
    "cancel_parent": of_parent(lambda i, n, side: Cancel((i,), "its parent")),
    "save_step": of_parent(lambda i, n, side: SaveSteps(HOLDER, (NewRecord(i, n, "new", str(side), None, 5),))),
    "start_waits": of_parent(begin_both),
    "load_history": of_parent(lambda i, n, side: LoadHistory(HOLDER, i, n)),
    "read_waits": of_parent(lambda i, n, side: ReadWaits(HOLDER, ((i, n),))),
    "request_close": of_parent(lambda i, n, side: RequestClose(HOLDER, i, n, ("child",), "asked")),
    "complete_child": end_child("completed"),
    "fail_child": end_child("failed"),
    "complete_both": end_both("completed"),
    "fail_both": end_both("failed"),
    "close_children": lambda scene, side: CloseChildren(),
}
VERBS.update(FAMILY)
# How things stand, and the verbs to which that makes a difference: of a pair there is at least one.
FLUSHES = {"complete", "fail", "retried", "release"}
MATTERS: dict[str, set[str]] = {
    "running": set(VERBS) - set(FAMILY),
    "several": {"cancel", "cancel_matching", "invoke", "retry", "succeed", "complete", "retried"},
    "abandoned": {"recover", "heartbeat", "succeed"},
    "poisonous": {"recover"},
    "suspected": {"claim_suspect"},
    "ready": {"claim", "invoke", "cancel"},
    "due": {"claim", "cancel"},
    "asked": {"recover", "release", "cancel", "retire"},
    "dead_letter": {"retry"},
    "expired": {"maintain"},
    "unrecorded": {"save_step", "start_waits", "load_history"},
    "family": set(FAMILY),
    "parked": {"complete_child", "fail_child", "close_children", "cancel_parent"},
    "sleeping": {"claim", "complete_child", "fail_child", "cancel_parent"},
    "orphaned": {"recover", "complete_child"},
    "on_last_life": {"recover", "fail_child"},
    "closing": {"close_children", "complete_child"},
    "unstarted": {"close_children", "claim"},
}
FAMILIES = {"unrecorded", "family", "parked", "sleeping", "orphaned", "on_last_life", "closing", "unstarted"}
# Scenes in which the holder has, or had, a claim.
CLAIMED = {"running", "several", "abandoned", "poisonous", "asked", "dead_letter", "expired"}
# With a family: what acts on its parent or child by itself, and what may meet that.
MEETING = {"claim", "recover", "release_unknown", "succeed", "retire", "cancel", "cancel_matching", "retry", *FAMILY}
# These touch no execution, and so no rival but in one scene.
IDLE = {"heartbeat", "register_queue", "register_tasks"}
# These pass over what another has locked, and leave it for the next sweep, or for the owner who is told.
SKIPPING = {"claim", "claim_suspect", "recover", "release_unknown", "retire", "maintain", "close_children"}


def is_case(scene: str, one: str, other: str) -> bool:
    pair = {one, other}
    # No child is there, and nothing that it could wait for.
    childless = {"complete_child", "fail_child", "complete_both", "fail_both", "close_children", "park"}
    if scene == "unrecorded" and pair & childless:
        return False
    if scene in FAMILIES:
        return bool(MATTERS[scene] & pair) and pair <= MEETING
    if FAMILY.keys() & pair:
        return False
    if not MATTERS[scene] & pair or (FLUSHES & pair and scene not in CLAIMED):
        return False
    return scene == "running" or not IDLE & (pair - MATTERS[scene])


CASES = [
    (scene, one, other)
    for scene in MATTERS
    for one, other in itertools.combinations_with_replacement(VERBS, 2)
    if is_case(scene, one, other)
]


# --- what should come out ---


def variants(state: State, event: Event) -> list[Event]:
    """Maintenance may leave for the next time what is in use."""
    if not isinstance(event, Maintain):
        return [event]
    expired_ids = {i for i, f in state.finished.items() if f.expires_at is not None and f.expires_at < state.now}
    return [Maintain(frozenset(expired_ids)), Maintain(frozenset())]


def outcomes(state: State, *events: Event) -> Iterator[tuple[State, tuple[Any, ...]]]:
    """What the events give in this order, with the answers."""
    if not events:
        yield state, ()
        return
    for event in variants(state, events[0]):
        after, answer = transition(state, event)
        for last, answers in outcomes(after, *events[1:]):
            yield last, (answer, *answers)


def canonical(scene: Scene, state: State) -> dict[str, str]:
    """A state in words, by execution; without ids that were made in the run."""
    state = comparable(state)
    words: dict[str, str] = {}
    new: list[str] = []
    for row in state.live.values():
        if row.id in scene.ids:
            words[str(row.id)] = repr(row)
        else:
            new.append(repr(replace(row, id=NOBODY)))
    known = {str(i) for i in scene.ids}
    words.update(
        {
            str(i): repr(replace(f, history=tuple(_aimed(step, known) for step in f.history)))
            for i, f in state.finished.items()
        }
    )
    words["new"] = "\n".join(sorted(new))
    for (i, name), record in [*state.steps.items(), *state.waits.items()]:
        words[f"{i} {name}"] = repr(_aimed(record, known))
    words["closings"] = repr(sorted((str(i) if i in scene.ids else "", c) for i, c in state.closings.items()))
    words["queues and tasks"] = repr((sorted(state.queues), sorted(state.tasks.items())))
    words["orchestrators"] = repr(sorted(state.orchestrators.items()))
    return {name: re.sub(r"(\d)\.0\b", r"\1", text) for name, text in words.items()}  # JSON: 1.0 is 1


def _aimed(step: Step, known: set[str]) -> Step:
    """Without the id of a child that was made in the run."""
    return step if step.target in known else replace(step, target=None)


def is_one_of(found: dict[str, str], expected: list[dict[str, str]], *, by_row: bool) -> bool:
    """As a whole, or each row as one of them has it: verbs take rows one by one, and promise no snapshot."""
    if not by_row:
        return found in expected
    names = {name for words in [found, *expected] for name in words}
    return all(found.get(name) in [words.get(name) for words in expected] for name in names)


def told(scene: Scene, answer: Any) -> str:
    """An answer in words, without ids that were made in the run."""
    known = set(scene.ids)
    if isinstance(answer, list):
        return repr([_told_of(item, known) for item in cast("list[object]", answer)])
    if isinstance(answer, Claim):
        return repr(sorted((c.id if c.id in known else NOBODY, c.claim_no, c.attempt) for c in answer.claimed))
    if isinstance(answer, tuple) and not isinstance(answer, Claim | Claimed):
        return ""  # of what a filter finds and a sweep rescues: they promise no snapshot
    if isinstance(answer, dict):
        return repr(sorted((str(i), str(status)) for i, status in answer.items()))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return repr(answer)


def _told_of(item: object, known: set[UUID]) -> object:
    """One position of an answer."""
    if isinstance(item, Invoked):
        return (item.id if item.id in known else NOBODY, item.created)
    if isinstance(item, StartedWait | Record) and item.target not in {str(i) for i in known}:
        return item._replace(target=None)
    return item


# --- the stage ---


class Stage:
    """The database, the scenes that were played, and two rivals."""

    def __init__(self, modelled: Modelled) -> None:
        self.modelled = modelled
        self.db = modelled.db
        statements = "".join(_STATEMENTS.replace("{relation}", relation) for relation in _SAVED)
        keeper = _KEEPER.replace("{statements}", statements).replace("{s}", self.db.schema)
        self.db.conn.execute(keeper.encode())
        self.scenes: dict[str, Scene] = {}
        for name, play in SCENES.items():
            playing = Play(modelled)
            play(playing)
            keys = ("l", "n") if name == "several" else ("k",)
            self.scenes[name] = Scene(
                modelled.state(), tuple(playing.ids), tuple(playing.held.items()), keys, playing.parent, playing.child
            )
            for relation in _SAVED:
                self.db.rows(
                    f"insert into {{s}}._test_saved select %s, %s, (select json_agg(t) from {{s}}.{relation} t)",
                    name,
                    relation,
                )
        # Each scene began with the first id: those that the rivals make are none of a scene's.
        self.db.rows("alter sequence {s}._test_ids restart with 1000")
        self.rivals = [self.db.session() for _ in range(3)]
        for session in self.rivals:
            session.conn.autocommit = True
            session.rows("set lock_timeout = '2s'")
            session.conn.autocommit = False

    def enter(self, name: str) -> Scene:
        self.db.rows("select {s}._test_put_back(%s)", name)
        return self.scenes[name]

    def start(self, session: Session, event: Event) -> Future[Any]:
        return self.db.start(lambda: self.modelled.perform(event, session))

    def at_once(self, first: Event, second: Event, *, second_commits_first: bool) -> tuple[tuple[Any, Any], bool]:
        """Both executed before either commits, if they let each other: their answers, and whether the second waited."""
        one, two, _ = self.rivals
        first_answer = self.modelled.perform(first, one)
        work = self.start(two, second)
        waits = self.db.settle(two, work)
        if waits:
            one.commit()
        second_answer = work.result(20)
        for session in (two, one) if second_commits_first else (one, two):
            session.commit()
        return (first_answer, second_answer), waits

    def behind_a_gate(self, scene: Scene, first: Event, second: Event) -> tuple[Any, Any]:
        """Both started while a third session locks one of the rows, so that each has half of what it wants."""
        one, two, gate = self.rivals
        middle = sorted(scene.ids)[len(scene.ids) // 2]
        for table in ("_private_executions", "_private_finished"):
            gate.rows(f"select from {{s}}.{table} where id = %s for update", middle)
        works = [self.start(one, first)]
        if not self.db.settle(one, works[0]):
            one.commit()
        works.append(self.start(two, second))
        if not self.db.settle(two, works[1]):
            two.commit()
        gate.commit()
        # Whoever was first at the row ends first; the other may wait for its commit.
        works[0].result(20)
        one.commit()
        works[1].result(20)
        two.commit()
        return works[0].result(0), works[1].result(0)

    def all_at_once(self, events: list[Event], commits: tuple[int, ...]) -> None:
        """Each executed as far as it gets beside those before; then committed in this order, as far as possible."""
        works = list[Future[Any]]()
        for session, event in zip(self.rivals, events, strict=True):
            works.append(self.start(session, event))
            self.db.settle(session, works[-1])
        left = list(commits)
        while left:
            # The first in the wished order that does not wait. There may be none, as each is looked at by itself:
            # one that stood behind another in the queue for a row may have passed it since. A deadlock would end.
            n = next((n for n in left if not self.db.settle(self.rivals[n], works[n])), None)
            if n is not None:
                works[n].result(20)
                self.rivals[n].commit()
                left.remove(n)

    def verdict(self, name: str, first: str, second: str, events: tuple[Event, Event], answers: tuple[Any, Any]) -> str:
        """Empty if it is what one of the two orders gives."""
        scene = self.scenes[name]
        if violations := self.modelled.audited.check():
            return f"the audit says {violations}"
        found = self.modelled.state()
        said = tuple(told(scene, answer) for answer in answers)
        serial = [(state, (a, b)) for state, (a, b) in outcomes(scene.state, *events)]
        serial += [(state, (a, b)) for state, (b, a) in outcomes(scene.state, *events[::-1])]
        expected = [
            {**canonical(scene, state), "told 1": told(scene, a), "told 2": told(scene, b)} for state, (a, b) in serial
        ]
        result = {**canonical(scene, found), "told 1": said[0], "told 2": said[1]}
        if is_one_of(result, expected, by_row=False):
            return ""
        by_row = name == "several"
        states = [canonical(scene, state) for state, _ in serial]
        if by_row and is_one_of(canonical(scene, found), states, by_row=True):
            return ""
        if SKIPPING & {first, second}:
            # What was passed over is taken the next time.
            again = [event for verb, event in zip((first, second), events, strict=True) if verb in SKIPPING]
            swept = [canonical(scene, sweep(state, *again)) for state, _ in serial]
            if is_one_of(canonical(scene, sweep(found, *again)), swept, by_row=by_row):
                return ""
        lines = [f"{key}: {result.get(key)}\n    not {[words.get(key) for words in expected]}" for key in result]
        return (
            "\n".join(
                line
                for line, key in zip(lines, result, strict=True)
                if result[key] not in [words.get(key) for words in expected]
            )
            or f"a mixture: {result}"
        )


def sweep(state: State, *again: Event) -> State:
    """What the next sweep makes of it, and the owners who are told of a cancellation; without what that counts.

    `again`: before that.
    """
    for event in again:
        state, _ = transition(state, event)
    state, _ = transition(state, Recover("q"))
    state, _ = transition(state, CloseChildren())
    for row in list(state.live.values()):
        if row.cancel_requested_at is not None and row.owner is not None:
            state, _ = transition(state, Flush(row.owner, (Outcome(row.id, row.claim_no, "cancelled", keep=5000.0),)))
    live = {i: replace(e, crashes=0, outcome=None) for i, e in state.live.items()}
    finished = {i: replace(f, execution=replace(f.execution, attempt=0, crashes=0)) for i, f in state.finished.items()}
    return replace(state, live=live, finished=finished)


@pytest.fixture(scope="module")
def stage(pgconductor_databases: Databases) -> Iterator[Stage]:
    with open_audited(pgconductor_databases) as audited:
        yield Stage(Modelled(audited))


def ways(name: str, one: str, other: str) -> Iterator[str]:
    if name == "several" and not SKIPPING & {one, other}:
        yield "behind a gate"
    yield "the first commits first"
    if not IDLE & {one, other}:
        yield "the second commits first"


@pytest.mark.parametrize(("name", "one", "other"), CASES)
def test_two_verbs_at_once_end_as_one_after_the_other(stage: Stage, name: str, one: str, other: str) -> None:
    """An execution that is in two states, runs twice, loses its key or deadlocks, once in a thousand deployments."""
    for first, second in [(one, other)] if one == other else [(one, other), (other, one)]:
        for way in ways(name, one, other):
            scene = stage.enter(name)
            events = VERBS[first](scene, 0), VERBS[second](scene, 1)
            waits = False
            try:
                if way == "behind a gate":
                    answers = stage.behind_a_gate(scene, *events)
                else:
                    answers, waits = stage.at_once(*events, second_commits_first=way == "the second commits first")
            except psycopg.Error as error:
                for session in stage.rivals:
                    session.rollback()
                raise AssertionError(f"{first}, {second}, {way}: {error.sqlstate} {error}") from error
            assert stage.verdict(name, first, second, events, answers) == "", f"{first}, then {second}; {way}"
            if waits:
                break  # so it cannot commit first


@pytest.mark.parametrize(
    ("name", "verbs"),
    [
        ("abandoned", ("claim", "recover", "complete")),  # the claim of a rival, the rescue, and the stale flush
        ("abandoned", ("cancel", "claim", "recover")),
        ("poisonous", ("cancel", "claim_suspect", "recover")),
        ("running", ("cancel", "retried", "claim")),
    ],
)
def test_three_verbs_at_once_end_as_one_after_the_other(stage: Stage, name: str, verbs: tuple[str, str, str]) -> None:
    """A rescue, a claim and a zombie's flush that meet at one row, each in its own transaction, in every order."""
    for order in itertools.permutations(verbs):
        for commits in itertools.permutations(range(3)):
            scene = stage.enter(name)
            events = [VERBS[verb](scene, side) for side, verb in enumerate(order)]
            stage.all_at_once(events, commits)
            assert stage.modelled.audited.check() == [], (order, commits)
            found = canonical(scene, sweep(stage.modelled.state()))
            serial = [
                canonical(scene, sweep(state))
                for permutation in itertools.permutations(events)
                for state, _ in outcomes(scene.state, *permutation)
            ]
            assert found in serial, (order, commits)
