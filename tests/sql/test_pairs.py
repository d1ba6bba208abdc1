"""Every pair of mutating verbs on one execution, the second started while the first one's transaction is open.

What must come out is what one of the two orders, one after the other, would give; and nobody may deadlock. What the
orders give is not written down here: each is run, one verb after the other, and compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from uuid import UUID

import pytest
from sql.database import Database, Session, done, open_database

from pgconductor.model import Claimed
from pgconductor.testing import Databases

State = tuple[object, ...]


@pytest.fixture(scope="module")
def pairs(pgconductor_databases: Databases) -> Iterator[Database]:
    """A database for all cases of this module, with the queue registered."""
    with pgconductor_databases.installed() as dsn, open_database(dsn) as database:
        database.register_queue()
        yield database


@pytest.fixture(scope="module")
def rivals(pairs: Database) -> tuple[Session, Session]:
    """The session that keeps its transaction open, and the one that comes second."""
    return pairs.session(), pairs.session(autocommit=True)


@dataclass
class Scene:
    """One execution with a dedupe key, and two orchestrators."""

    claimed: Claimed
    holder: UUID
    other: UUID


def new_scene(db: Database, start: str) -> Scene:
    db.rows(
        "delete from {s}._private_executions; delete from {s}._private_finished; delete from {s}._private_dedupe_keys;"
        " delete from {s}._private_orchestrators"
    )
    holder, other = db.register_orchestrator(), db.register_orchestrator()
    one = db.invoke(key="k", delay=-1 if start == "due" else None)
    scene = Scene(db.claimed(one, 1), holder, other)
    if start in ("running", "abandoned", "poisonous"):
        assert len(db.claim(holder)) == 1
    if start in ("abandoned", "poisonous"):
        db.rows("update {s}._private_orchestrators set expires_at = now() - interval '1 s' where id = %s", holder)
    if start == "poisonous":
        db.rows("update {s}._private_executions set crashes = 2")
    if start == "due":
        db.rows("update {s}._private_executions set state = 'scheduled'")
    return scene


def flush(kind: str, session: Session, scene: Scene) -> object:
    return session.flush(scene.holder, done(scene.claimed, kind))


Verb = Callable[[Session, Scene], object]
VERBS: dict[str, Verb] = {
    "claim": lambda session, scene: session.claim(scene.other),
    "complete": partial(flush, "completed"),
    "fail": partial(flush, "failed"),
    "retry": partial(flush, "retried"),
    "release": partial(flush, "released"),
    "recover": lambda session, scene: session.recover(),
    "release_unknown": lambda session, scene: session.run(session.calls.release_unknown(scene.holder, "q", [])),
    "retire": lambda session, scene: session.run(session.calls.retire_orchestrator(scene.holder)),
    "invoke": lambda session, scene: session.invoke(key="k"),
    "heartbeat": lambda session, scene: session.run(session.calls.heartbeat(scene.holder, 1000.0, [])),
    "register_queue": lambda session, scene: session.register_queue("another"),
}
# How the execution stands, and the verbs to which that makes a difference: of a pair there is at least one.
STARTS = {
    "running": set(VERBS),
    "abandoned": {"recover", "heartbeat"},
    "poisonous": {"recover"},
    "ready": {"claim", "invoke"},
    "due": {"claim"},
}
CASES = [
    (start, one, other)
    for start, matter in STARTS.items()
    for one, other in itertools.combinations_with_replacement(VERBS, 2)
    if matter & {one, other}
]


def state_of(db: Database, scene: Scene) -> State:
    """What is there, without what differs from run to run."""
    new = "case when id = %s then 'first' else 'later' end"
    return (
        db.rows(
            f"select {new}, state::text, attempt, crashes, claim_no, outcome, outcome_claim,"
            " case owner when %s then 'holder' when %s then 'other' end, dedupe_key"
            " from {s}._private_executions order by created_at",
            scene.claimed.id,
            scene.holder,
            scene.other,
        ),
        db.rows(
            f"select {new}, state::text, attempt, crashes, claim_no from {{s}}._private_finished order by created_at",
            scene.claimed.id,
        ),
        db.rows(
            "select d.key, exists (select from {s}._private_executions e where e.id = d.execution_id)"
            " from {s}._private_dedupe_keys d"
        ),
        db.rows(
            "select case id when %s then 'holder' else 'other' end, died_at is null, expires_at > now()"
            " from {s}._private_orchestrators order by 1",
            scene.holder,
        ),
    )


def one_after_the_other(db: Database, start: str, first: str, second: str) -> State:
    scene = new_scene(db, start)
    VERBS[first](db, scene)
    VERBS[second](db, scene)
    return state_of(db, scene)


def at_once(db: Database, rivals: tuple[Session, Session], start: str, first: str, second: str) -> State:
    scene = new_scene(db, start)
    one, two = rivals
    VERBS[first](one, scene)
    work = db.start(lambda: VERBS[second](two, scene))
    db.settle(two, work)
    one.commit()
    work.result(20)
    return state_of(db, scene)


@pytest.mark.parametrize(("start", "one", "other"), CASES)
def test_two_verbs_at_once_end_as_one_after_the_other(
    pairs: Database, rivals: tuple[Session, Session], start: str, one: str, other: str
) -> None:
    """An execution that is in two states, runs twice, loses its key or deadlocks, once in a thousand deployments."""
    orders = {(one, other), (other, one)}
    serial = [one_after_the_other(pairs, start, first, second) for first, second in sorted(orders)]
    for first, second in sorted(orders):
        assert at_once(pairs, rivals, start, first, second) in serial, f"{second} started while {first} was open"
