"""Dedupe keys: one live execution per queue, task and key, whoever asks at the same time and in whatever isolation."""

from __future__ import annotations

from functools import partial
from threading import Barrier
from uuid import UUID

import psycopg
import pytest
from sql.database import Database, Session, done

from pgconductor.db.calls import NewExecution
from pgconductor.model import Invoked

AT_ONCE = 60


def keyed(key: str | None, queue: str = "q", task: str = "t", payload: str = "{}") -> NewExecution:
    return NewExecution(task, payload, queue, 0, None, None, key)


def keys(db: Database) -> list[tuple[str, UUID]]:
    return [(key, id_) for key, id_ in db.rows("select key, execution_id from {s}._private_dedupe_keys order by 1")]


def test_many_invokes_of_one_key_at_once_are_one_execution(db: Database) -> None:
    """A double click, or a retried request, works twice."""
    start = Barrier(AT_ONCE)
    sessions = [db.session(autocommit=True) for _ in range(AT_ONCE)]

    def invoke(session: Session) -> Invoked:
        start.wait(30)
        return session.invoke_many(keyed("k"))[0]

    work = [db.start(partial(invoke, session)) for session in sessions]
    invoked = [each.result(60) for each in work]
    assert len({i.id for i in invoked}) == 1
    assert [i.created for i in invoked].count(True) == 1
    assert keys(db) == [("k", invoked[0].id)]
    assert db.value("select count(*) from {s}._private_executions") == 1


@pytest.mark.parametrize("state", ["scheduled", "ready", "running", "waiting"])
def test_holder_stays_as_it_is_while_it_lives(db: Database, state: str) -> None:
    """A second invoke changes what the first one asked for, or disturbs what runs."""
    db.register_queue()
    one = db.invoke(key="k", payload={"a": 1}, delay=60 if state == "scheduled" else None)
    if state == "running":
        db.claim(db.register_orchestrator())
    if state == "waiting":
        db.rows("update {s}._private_executions set state = 'waiting'")
    before = db.dump()
    (again,) = db.invoke_many(keyed("k", payload='{"b": 2}'))
    assert again == Invoked(one, False)
    assert db.dump() == before


def test_key_is_free_again_after_the_end(db: Database) -> None:
    """A key works once in the life of the database."""
    db.register_queue()
    owner = db.register_orchestrator()
    ids: set[UUID] = set()
    for keep in (None, 0.0, 60.0):
        ids.add(db.invoke(key="k"))
        assert db.flush(owner, *[done(c, keep=keep) for c in db.claim(owner)]) == {}
        assert keys(db) == []
    assert len(ids) == 3


def test_key_counts_per_queue_and_task(db: Database) -> None:
    """Two tasks that use the same order number exclude each other."""
    invoked = db.invoke_many(keyed("k"), keyed("k", "other"), keyed("k", task="u"), keyed("k", "other", "u"))
    assert len({i.id for i in invoked}) == 4
    assert all(i.created for i in invoked)


def test_key_counts_in_the_queue_the_task_is_registered_with(db: Database) -> None:
    """With and without the queue's name the same call is two executions."""
    db.run(db.calls.register_tasks(["t"], "q"))
    assert db.invoke(None, key="k") == db.invoke("q", key="k") != db.invoke("default", key="k")
    assert db.invoke(None, "unknown", key="k") == db.invoke("default", "unknown", key="k")


@pytest.mark.parametrize("registered", [True, False])
def test_key_holds_across_the_registration_of_the_queue(db: Database, registered: bool) -> None:
    """A key in the overflow partition and the same key in the queue's own."""
    one = db.invoke(key="k")
    if registered:
        db.register_queue()
    assert db.invoke(key="k") == one


def test_duplicates_within_one_batch_are_one_execution(db: Database) -> None:
    """21000, or one row per position. Each position has its answer; the first creates, with its own payload."""
    taken = db.invoke(key="taken")
    calls = [keyed("a", payload='{"n": 0}'), keyed(None), keyed("b"), keyed("a", payload='{"n": 3}'), keyed("taken")]
    calls += [keyed("a"), keyed(None), keyed("taken")]
    invoked = db.invoke_many(*calls)
    a, none, b, *_ = [i.id for i in invoked]
    assert [i.created for i in invoked] == [True, True, True, False, False, False, True, False]
    assert [i.id for i in invoked] == [a, none, b, a, taken, a, invoked[6].id, taken]
    assert len({a, none, b, taken, invoked[6].id}) == 5
    assert db.value("select payload from {s}.executions where id = %s", a) == {"n": 0}
    assert keys(db) == [("a", a), ("b", b), ("taken", taken)]


def test_answers_are_in_the_order_of_the_call(db: Database) -> None:
    """With and without keys, ids of a large batch are dealt out to the wrong positions."""
    for with_keys in (False, True):
        calls = [keyed(f"k{(n * 7919) % 1000}" if with_keys else None, payload=f'{{"n": {n}}}') for n in range(1000)]
        invoked = db.invoke_many(*calls)
        stored: dict[UUID, int] = dict(db.rows("select id, (payload ->> 'n')::int from {s}.executions"))
        assert [stored[i.id] for i in invoked] == list(range(1000))


def test_empty_batch_is_nothing(db: Database) -> None:
    """`invoke_many([])` fails."""
    assert db.invoke_many() == []


def test_rollback_releases_the_key(db: Database) -> None:
    """Work that was never committed blocks its key; a savepoint's as well."""
    session = db.session()
    session.invoke(key="k")
    session.rollback()
    session.rows("savepoint s")
    session.invoke(key="k")
    session.rows("rollback to s")
    session.commit()
    assert keys(db) == []
    (mine,) = db.invoke_many(keyed("k"))
    assert mine.created


@pytest.mark.parametrize("commits", [True, False])
def test_second_invoke_waits_for_the_first_and_takes_its_place_if_it_fails(db: Database, commits: bool) -> None:
    """The id of an execution that was rolled back is handed out, or two are created."""
    first, second = db.session(), db.session(autocommit=True)
    one = first.invoke(key="k")
    invoking = db.start(lambda: second.invoke_many(keyed("k"))[0])
    db.wait_blocked(second, invoking)
    (first.commit if commits else first.rollback)()
    answer = invoking.result(20)
    assert (answer.id == one, answer.created) == (commits, not commits)
    assert db.rows("select id from {s}._private_executions") == [(answer.id,)]


@pytest.mark.parametrize("commits", [True, False])
def test_invoke_beside_the_end_of_the_holder(db: Database, commits: bool) -> None:
    """The key of an execution that has just ended is answered with its id: nothing will run."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke(key="k")
    flusher, second = db.session(), db.session(autocommit=True)
    flusher.flush(owner, *[done(c) for c in db.claim(owner)])
    invoking = db.start(lambda: second.invoke_many(keyed("k"))[0])
    db.wait_blocked(second, invoking)
    (flusher.commit if commits else flusher.rollback)()
    answer = invoking.result(20)
    assert (answer.id == one, answer.created) == (not commits, commits)
    assert keys(db) == [("k", answer.id)]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
@pytest.mark.parametrize("before", ["nothing", "held", "ended", "taken over"])
def test_key_holds_in_stricter_isolation(db: Database, isolation: str, before: str) -> None:
    """A snapshot that does not see the holder creates a second one, or answers with one that has ended.

    Either the invoke works, or it fails with 40001, which such transactions repeat anyway.
    """
    db.register_queue()
    owner = db.register_orchestrator()

    def end() -> None:
        assert db.flush(owner, *[done(c) for c in db.claim(owner)]) == {}

    if before != "nothing":
        db.invoke(key="k")
    strict = db.session()
    strict.rows(f"set transaction isolation level {isolation}")
    strict.rows("select * from {s}.executions")  # its snapshot is from here
    if before == "nothing":
        db.invoke(key="k")
    if before in ("ended", "taken over"):
        end()
    if before == "taken over":
        db.invoke(key="k")
    try:
        (answer,) = strict.invoke_many(keyed("k"))
        strict.commit()
    except psycopg.errors.SerializationFailure:
        strict.rollback()
        assert before in ("nothing", "taken over", "ended")
        strict.rows(f"set transaction isolation level {isolation}")
        (answer,) = strict.invoke_many(keyed("k"))
        strict.commit()
    assert answer.created is (before == "ended")
    assert db.rows("select id, state::text from {s}._private_executions") == [(answer.id, "ready")]
    assert keys(db) == [("k", answer.id)]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_two_open_producers_with_one_key_make_one(db: Database, isolation: str) -> None:
    """Two strict transactions, neither of which sees the other, both create."""
    first, second = db.session(), db.session()
    for session in (first, second):
        session.rows(f"set transaction isolation level {isolation}")
        session.rows("select * from {s}.executions")
    one = first.invoke(key="k")
    invoking = db.start(lambda: second.invoke(key="k"))
    db.wait_blocked(second, invoking)
    first.commit()
    if isolation == "read committed":
        assert invoking.result(20) == one
        second.commit()
    else:
        with pytest.raises(psycopg.errors.SerializationFailure):
            invoking.result(20)
        second.rollback()
    assert keys(db) == [("k", one)]


def test_batches_with_the_same_keys_in_other_orders_do_not_deadlock(db: Database) -> None:
    """Two importers of one file, sorted differently, kill each other."""
    gate, first, second = db.session(), db.session(autocommit=True), db.session(autocommit=True)
    gate.invoke(key="b")
    one = db.start(lambda: first.invoke_many(keyed("a"), keyed("b"), keyed("c")))
    db.wait_blocked(first, one)  # has "a", waits for "b"
    two = db.start(lambda: second.invoke_many(keyed("c"), keyed("b"), keyed("a")))
    db.wait_blocked(second, two)
    gate.rollback()
    assert {i.id for i in one.result(20)} == {i.id for i in two.result(20)}
    assert len(keys(db)) == 3
