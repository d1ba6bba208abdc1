"""register_queue: at once, beside open transactions, and what becomes of what was produced before."""

from __future__ import annotations

from functools import partial
from threading import Barrier, Event
from uuid import uuid4

import psycopg
import pytest
from sql.database import Database, Session, done

from pgconductor.db.calls import NewExecution

AT_ONCE = 20


def register_together(db: Database, names: list[str]) -> list[int]:
    """Register at the same moment, again where other DDL was in the way for too long, as the function says."""
    start = Barrier(len(names))

    def register(session: Session, name: str) -> int:
        start.wait(20)
        while True:
            try:
                return session.register_queue(name)
            except psycopg.errors.LockNotAvailable:
                continue

    sessions = [db.session(autocommit=True) for _ in names]
    work = [db.start(partial(register, session, name)) for session, name in zip(sessions, names, strict=True)]
    return [each.result(60) for each in work]


def unkeyed(queue: str) -> NewExecution:
    return NewExecution("t", "{}", queue, 0, None, None, None)


def in_all_ways(db: Database, queue: str) -> set[int]:
    """Invoke alone, in a batch, with a key; the numbers of the partitions."""
    ids = [db.invoke(queue), db.invoke(queue, key=str(uuid4())), *(i.id for i in db.invoke_many(*[unkeyed(queue)] * 2))]
    return {db.live_row(i, "queue_no")[0] for i in ids}


def test_same_queue_registered_by_many_at_once_is_one(db: Database) -> None:
    """Processes of one deployment start together: one fails, or the queue has two partitions."""
    assert len(set(register_together(db, ["q"] * AT_ONCE))) == 1
    assert db.value("select count(*) from pg_inherits where inhparent = '{s}._private_executions'::regclass") == 2


def test_many_queues_registered_at_once_are_all_there(db: Database) -> None:
    """Registrations deadlock on the parent table."""
    names = [f"q{n}" for n in range(AT_ONCE)]
    numbers = register_together(db, names)
    assert len(set(numbers)) == AT_ONCE
    for name in names:
        db.invoke(name)
    assert db.value("select count(*) from {s}._private_executions where queue_no = 0") == 0


def test_registering_again_finds_it(db: Database) -> None:
    """Each start of a program makes a queue."""
    assert [db.register_queue(), db.register_queue("other"), db.register_queue()] == [1, 2, 1]


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_registration_does_not_wait_for_open_readers_and_producers(db: Database, isolation: str) -> None:
    """One forgotten transaction keeps a deployment from starting, and everybody behind it waits as well."""
    db.register_queue()
    owner = db.register_orchestrator()
    sessions = reader, producer, worker, registrar = [db.session() for _ in range(4)]
    for session in sessions[:3]:
        session.rows(f"set transaction isolation level {isolation}")
    reader.rows("select * from {s}.executions")
    reader.rows("select * from {s}.queue_status()")
    producer.invoke()
    unknown = producer.invoke("new")
    worker.claim(owner)
    registering = db.start(lambda: registrar.register_queue("new"))
    assert not db.settle(registrar, registering)
    registrar.commit()
    # They go on, where the new partition was not there when they began.
    assert reader.rows("select * from {s}.executions") == []
    second = producer.invoke("new")
    producer.commit()
    assert sorted(c.id for c in db.claim(owner, "new")) == sorted([unknown, second])


def test_nobody_waits_for_an_open_registration(db: Database) -> None:
    """While a queue is registered, claims of all others stand still."""
    db.register_queue()
    owner = db.register_orchestrator()
    registrar = db.session()
    registrar.register_queue("new")
    for session in (db, db.session(autocommit=True)):  # with cached plans, and with none
        session.rows("set lock_timeout = '200ms'")
        session.invoke()
        session.invoke("new")
        session.invoke("unknown", key=str(session.pid))
        (claimed,) = session.claim(owner)
        assert session.flush(owner, done(claimed)) == {}
        assert session.recover() == (0, 0)
        assert session.run(session.calls.release_unknown(owner, "q", [])) == 0
        assert session.run(session.calls.heartbeat(owner, 60.0, [])).is_alive
        session.rows("select * from {s}.queue_status()")
        assert session.register_queue() == 1
        session.rows("reset lock_timeout")
    registrar.commit()
    assert len(db.claim(owner, "new")) == 2


def test_registration_beside_other_ddl_gives_up_and_can_be_repeated(db: Database) -> None:
    """A start that hangs behind a migration without a word."""
    other, registrar = db.session(), db.session(autocommit=True)
    other.rows("lock table {s}._private_executions in share update exclusive mode")
    registering = db.start(lambda: registrar.register_queue())
    db.wait_blocked(registrar, registering)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        registering.result(20)
    other.rollback()
    assert registrar.value("show lock_timeout") == "0"
    registrar.register_queue()


def test_registration_that_is_rolled_back_leaves_nothing(db: Database) -> None:
    """A queue without a partition: every claim fails."""
    session = db.session()
    session.register_queue()
    session.rollback()
    db.invoke()
    db.register_queue()
    assert len(db.claim(db.register_orchestrator())) == 1


def test_work_of_an_unknown_queue_waits_and_is_claimed_after_registration(db: Database) -> None:
    """What was produced before the first worker started is lost, or moved while somebody holds its token."""
    early = [db.invoke(priority=1), db.invoke()]
    assert [db.live_row(i, "queue_no, state::text") for i in early] == [(0, "ready")] * 2
    db.register_queue()
    late = db.invoke()
    assert db.live_row(late, "queue_no") == (1,)
    owner = db.register_orchestrator()
    claimed = db.claim(owner)
    assert [c.id for c in claimed] == [*early, late]
    assert db.flush(owner, *[done(c, "retried") for c in claimed]) == {}
    assert [db.live_row(i, "queue_no") for i in early] == [(0,)] * 2
    assert db.flush(owner, *[done(c) for c in db.claim(owner)]) == {}


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
@pytest.mark.parametrize("key", [None, "k"])
def test_producer_goes_on_across_a_registration(db: Database, isolation: str, key: str | None) -> None:
    """A long transaction with everything cached and locked meets a partition that its session has not heard of."""
    producer = db.session()
    producer.conn.prepare_threshold = 0
    producer.rows(f"set transaction isolation level {isolation}")

    def produce(n: int) -> object:
        text = f"{key}{n}" if key else None
        return producer.invoke_many(NewExecution("t", "{}", "new", 0, None, None, text))[0].id

    # The registration is over, and nobody can have an old list any more: nothing need wait for the producer.
    registrar = db.session(autocommit=True)
    no = registrar.run(registrar.calls.register_queue("new"))
    assert registrar.run(registrar.calls.publish_queues()) == 1
    for n in range(12):  # beyond the five executions after which plans are kept
        produce(n)
    assert [registrar.run(registrar.calls.publish_queues()) for _ in range(2)] == [1, 0]
    ids = [produce(n) for n in range(12, 24)]
    producer.commit()
    ids += [produce(24)]
    producer.commit()
    numbers = [db.value("select queue_no from {s}._private_executions where id = %s", i) for i in ids]
    assert numbers == [no if isolation == "read committed" else 0] * 12 + [no]
    assert len(db.claim(db.register_orchestrator(), "new")) == 25


@pytest.mark.parametrize("holder", ["insert", "read"])
def test_queue_is_published_when_nobody_can_have_an_old_list(db: Database, holder: str) -> None:
    """A session that read the partitions at that instant keeps its list, and cannot invoke into the queue any more."""
    registrar, other = db.session(autocommit=True), db.session()
    registrar.run(registrar.calls.register_queue("new"))
    if holder == "insert":
        other.invoke("elsewhere")
    else:
        other.rows("select from {s}.executions")
    steps = [registrar.run(registrar.calls.publish_queues()) for _ in range(5)]
    assert steps == [1] * 5
    assert in_all_ways(db, "new") == {0}
    other.commit()
    assert registrar.run(registrar.calls.publish_queues()) == 1, "the others have not been told yet"
    assert db.live_row(db.invoke("new"), "queue_no") == (0,)
    assert registrar.run(registrar.calls.publish_queues()) == 0
    no = registrar.run(registrar.calls.register_queue("new"))
    assert in_all_ways(db, "new") == {no}


def test_producers_go_on_while_queues_are_registered(db: Database) -> None:
    """A session sees the queue before it hears of the partition: it fails, once or until it is closed."""
    stop = Event()
    names = ["q0"]

    def produce(session: Session) -> None:
        while not stop.is_set():
            session.invoke_many(*[unkeyed(names[-1])] * 2)
            session.invoke(names[-1])
            session.invoke(names[-1], key="k")

    producing = [db.start(partial(produce, db.session(autocommit=True))) for _ in range(8)]
    for n in range(1, 30):
        names.append(f"q{n}")
        db.register_queue(names[-1])
    stop.set()
    for each in producing:
        each.result(30)
