"""recover, heartbeat, release_unknown, retire_orchestrator: who is alive, and what becomes of what the dead held."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from sql.database import LONG, Database, Session, done

from pgconductor.db.calls import NewExecution
from pgconductor.errors import LeaseLost
from pgconductor.testing import DatabaseClock


def beat(db: Session, owner: UUID, lease: float = 10.0) -> bool:
    return db.run(db.calls.heartbeat(owner, lease, [])).is_alive


def work(db: Database, n: int, queue: str = "q") -> list[UUID]:
    return [i.id for i in db.invoke_many(*[NewExecution("t", "{}", queue)] * n)]


# --- heartbeat ---


def test_heartbeat_keeps_a_lease_alive(db: Database, clock: DatabaseClock) -> None:
    """A healthy orchestrator loses its claims."""
    db.register_queue()
    owner = db.register_orchestrator(lease=20)
    work(db, 1)
    db.claim(owner)
    for _ in range(4):
        clock.advance(8)
        assert beat(db, owner, 20)
        assert db.recover() == (0, 0)
    assert db.value("select count(*) from {s}._private_executions where state = 'running'") == 1


@pytest.mark.parametrize("way", ["expired", "declared dead", "unknown", "retired", "server restarted"])
def test_heartbeat_never_revives(db: Database, clock: DatabaseClock, way: str) -> None:
    """One that others may have taken over from goes on under the same id."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    if way in ("expired", "declared dead"):
        clock.advance(11)
    if way == "declared dead":
        db.recover()
    if way == "unknown":
        owner = uuid4()
    if way == "retired":
        db.run(db.calls.retire_orchestrator(owner))
    if way == "server restarted":
        db.rows("update {s}._private_orchestrators set server_epoch = 'before'")
    before = db.dump()
    assert beat(db, owner) is False
    assert db.dump() == before
    with pytest.raises(LeaseLost):
        db.claim(owner)


def test_clock_stepped_back_does_not_revive_the_dead(db: Database, clock: DatabaseClock) -> None:
    """Its lease seems to run again, and it claims beside those who took over."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    clock.advance(11)
    db.recover()
    clock.advance(-600)
    assert beat(db, owner) is False
    with pytest.raises(LeaseLost):
        db.claim(owner)


def test_clock_stepped_back_shortens_no_lease(db: Database, clock: DatabaseClock) -> None:
    """All orchestrators are declared dead at once."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    clock.advance(-600)
    db.recover()
    assert beat(db, owner)


def test_same_id_cannot_register_twice(db: Database) -> None:
    """An incarnation that was declared dead comes back under its old id."""
    owner = db.register_orchestrator()
    before = db.dump()
    with pytest.raises(Exception, match="duplicate key"):
        db.run(db.calls.register_orchestrator(owner, "again", 10.0, "1", 1, []))
    assert db.dump() == before


def test_heartbeat_commits_asynchronously(db: Database) -> None:
    """Every orchestrator waits for the disk every few seconds."""
    owner = db.register_orchestrator()
    session = db.session()
    assert session.run(session.calls.heartbeat(owner, 10.0, [])).is_alive
    assert session.value("show synchronous_commit") == "off"


# --- recover ---


@pytest.mark.parametrize("way", ["expired", "declared dead", "row gone"])
def test_what_a_dead_owner_held_comes_back(db: Database, clock: DatabaseClock, way: str) -> None:
    """Executions stay running for ever, or the dead one's attempts are charged. Both partitions, one queue only."""
    early = work(db, 2)
    db.register_queue()
    db.register_queue("other")
    late, elsewhere = work(db, 2), work(db, 1, "other")
    dead, alive = db.register_orchestrator(lease=10), db.register_orchestrator()
    db.claim(dead, limit=3)
    (kept,) = db.claim(alive)
    db.claim(dead, "other")
    clock.advance(11)
    if way == "declared dead":
        db.recover("other queue")
    if way == "row gone":
        db.rows("delete from {s}._private_orchestrators where id = %s", dead)
    assert db.recover() == (3, 0)
    assert db.live(kept.id) == ("running", 1, 0, 1)
    assert [db.live(i) for i in [*early, *late] if i != kept.id] == [("ready", 0, 1, 1)] * 3
    assert db.live(elsewhere[0]) == ("running", 1, 0, 1)
    assert db.live_row(early[0], "owner, claimed_at, outcome, outcome_claim") == (None, None, "recovered", 1)
    assert db.recover() == (0, 0)
    assert len(db.claim(alive)) == 3


def test_execution_that_brings_down_its_process_three_times_fails(db: Database, clock: DatabaseClock) -> None:
    """A poisonous execution kills process after process; innocents lose attempts."""
    db.register_queue()
    (poison,) = work(db, 1)
    for crash in range(1, 4):
        owner = db.register_orchestrator(lease=10)
        claimed = db.claim(owner)
        if crash == 3:
            assert claimed == []  # its last life: not in company
            claimed = [c for c in [db.run(db.calls.claim_suspect("q", owner, ["t"]))] if c is not None]
        assert [c.id for c in claimed] == [poison]
        clock.advance(11)
        assert db.recover() == ((1, 0) if crash < 3 else (0, 1))
    assert db.claim(db.register_orchestrator()) == []
    assert db.finished(poison) == [("failed", 0, 3, 3)]
    assert db.finished(poison, "errors -> 0 ->> 'type', expires_at - finished_at = '7 d'") == [("crash_loop", True)]
    assert db.value("select count(*) from {s}._private_executions") == 0


def test_crash_loop_frees_the_key_and_tells_those_who_wait(db: Database, clock: DatabaseClock) -> None:
    """A poisonous execution keeps its key for ever, and its waiter waits."""
    db.register_queue()
    poison = db.invoke(key="k")
    db.claim(db.register_orchestrator(lease=10))
    db.rows("update {s}._private_executions set crashes = 2")
    clock.advance(11)
    waiter = db.session(autocommit=True)
    waiter.rows(f"listen {db.run(db.calls.results_channel())}")
    bucket = poison.bytes[15]
    waiter.run(waiter.calls.await_results([-1, bucket]))
    db.recover()
    assert [n.payload for n in waiter.conn.notifies(timeout=5, stop_after=1)] == [str(bucket)]
    assert db.invoke(key="k") != poison


def test_recovery_is_bounded_and_goes_on(db: Database, clock: DatabaseClock) -> None:
    """A dead worker's ten thousand claims come back in one endless statement."""
    db.register_queue()
    work(db, 50)
    db.claim(db.register_orchestrator(lease=10))
    clock.advance(11)
    assert [db.rows("select recovered, failed from {s}.recover('q', 20)")[0] for _ in range(4)] == [
        (20, 0),
        (20, 0),
        (10, 0),
        (0, 0),
    ]


def test_recovery_skips_rows_another_holds(db: Database, clock: DatabaseClock) -> None:
    """A sweep hangs behind whoever looks at a row."""
    db.register_queue()
    ids = work(db, 3)
    db.claim(db.register_orchestrator(lease=10))
    clock.advance(11)
    rival = db.session()
    rival.rows("select from {s}._private_executions where id = %s for update", ids[1])
    assert db.recover() == (2, 0)
    rival.rollback()
    assert db.recover() == (1, 0)


def test_two_recoveries_at_once_charge_one_crash(db: Database, clock: DatabaseClock) -> None:
    """Every sweeper charges the same crash, and the third crash comes at once."""
    db.register_queue()
    ids = work(db, 4)
    db.claim(db.register_orchestrator(lease=10))
    clock.advance(11)
    first, second = db.session(), db.session()
    counts = [first.recover(), second.recover()]
    second.commit()
    first.commit()
    counts.append(db.recover())
    assert sorted(counts) == [(0, 0), (0, 0), (4, 0)]
    assert [db.live(i) for i in ids] == [("ready", 0, 1, 1)] * 4


def test_lease_renewed_at_the_last_moment_is_not_ended(db: Database, clock: DatabaseClock) -> None:
    """Declared dead by an old look at the row, while the renewal was being committed."""
    db.register_queue()
    work(db, 1)
    owner = db.register_orchestrator(lease=10)
    db.claim(owner)
    renewing = db.session()
    assert renewing.run(renewing.calls.heartbeat(owner, 60.0, [])).is_alive
    clock.advance(11)
    assert db.recover() == (0, 0)  # skips what is locked
    renewing.commit()
    assert db.recover() == (0, 0)
    assert beat(db, owner)


def test_declared_dead_while_it_renews_stays_dead(db: Database, clock: DatabaseClock) -> None:
    """The renewal waits for the verdict, then overwrites it."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    judge, renewing = db.session(), db.session(autocommit=True)
    clock.advance(11)
    judge.recover()
    clock.advance(-11)  # the renewal looked at the clock before the lease had ended
    renewal = db.start(lambda: beat(renewing, owner))
    db.wait_blocked(renewing, renewal)
    judge.commit()
    assert renewal.result(20) is False
    assert beat(db, owner) is False


def test_claim_committed_after_its_owner_was_declared_dead_is_found(db: Database, clock: DatabaseClock) -> None:
    """A process paused within a claim holds rows that no recovery sees."""
    db.register_queue()
    (one,) = work(db, 1)
    owner = db.register_orchestrator(lease=10)
    paused = db.session()
    assert [c.id for c in paused.claim(owner)] == [one]
    clock.advance(11)
    assert db.recover() == (0, 0)
    paused.commit()
    assert db.live(one) == ("running", 1, 0, 1)
    assert db.recover() == (1, 0)


def test_dead_stay_as_tombstones_for_a_day(db: Database, clock: DatabaseClock) -> None:
    """Rows of the dead pile up for ever, or one is forgotten while a late claim of it may still commit."""
    db.register_queue()
    db.register_orchestrator(lease=10)
    alive = db.register_orchestrator(lease=LONG * 1000)
    clock.advance(11)
    db.recover()
    clock.advance(86_000)
    db.run(db.calls.maintain())
    assert db.value("select count(*) from {s}._private_orchestrators") == 2
    clock.advance(500)
    db.run(db.calls.maintain())
    assert db.rows("select id from {s}._private_orchestrators") == [(alive,)]
    assert db.value("select count(*) from {s}._private_workers") == 1


def test_recovery_of_an_unknown_queue_is_nothing(db: Database) -> None:
    """A sweep before the first registration fails."""
    assert db.recover("nobody knows it") == (0, 0)


# --- release_unknown and retire ---


def test_claims_whose_reply_was_lost_are_given_back_uncharged(db: Database) -> None:
    """Rows that their owner does not know it holds run for ever; or what it does run is given away."""
    early = work(db, 2)
    db.register_queue()
    late = work(db, 2)
    owner, other = db.register_orchestrator(), db.register_orchestrator()
    mine = db.claim(owner, limit=3)
    theirs = db.claim(other)
    assert db.run(db.calls.release_unknown(owner, "q", [mine[0].id])) == 2
    states = {i: db.live(i) for i in [*early, *late]}
    assert states.pop(mine[0].id) == states.pop(theirs[0].id) == ("running", 1, 0, 1)
    assert list(states.values()) == [("ready", 0, 0, 1)] * 2
    assert db.run(db.calls.release_unknown(owner, "q", [mine[0].id])) == 0
    assert db.flush(owner, done(mine[1])) == {mine[1].id: "fenced"}


def test_release_of_one_queue_leaves_the_other(db: Database) -> None:
    """One worker gives back what another worker of the same process runs, also in the common overflow partition."""
    work(db, 1)
    work(db, 1, "other")
    db.register_queue()
    db.register_queue("other")
    owner = db.register_orchestrator()
    db.claim(owner)
    db.claim(owner, "other")
    assert db.run(db.calls.release_unknown(owner, "q", [])) == 1
    assert db.value("select queue from {s}._private_executions where state = 'running'") == "other"


def test_retired_orchestrator_leaves_nothing_behind(db: Database) -> None:
    """A clean stop costs a lease of waiting, an attempt, or a tombstone."""
    db.register_queue()
    ids = work(db, 3)
    owner = db.register_orchestrator()
    first, *_ = db.claim(owner)
    assert db.run(db.calls.retire_orchestrator(owner)) == 3
    assert [db.live(i) for i in ids] == [("ready", 0, 0, 1)] * 3
    assert db.value("select count(*) from {s}._private_orchestrators") == 0
    assert db.value("select count(*) from {s}._private_workers") == 0
    assert db.run(db.calls.retire_orchestrator(owner)) == 0
    assert db.run(db.calls.retire_orchestrator(uuid4())) == 0
    assert db.flush(owner, done(first)) == {first.id: "fenced"}


def test_released_one_is_no_nearer_to_a_crash_loop(db: Database) -> None:
    """Ten deployments in a row fail whatever was running each time."""
    db.register_queue()
    (one,) = work(db, 1)
    for n in range(1, 11):
        owner = db.register_orchestrator()
        assert [c.attempt for c in db.claim(owner)] == [1]
        db.run(db.calls.retire_orchestrator(owner))
        assert db.live(one) == ("ready", 0, 0, n)
