"""What keeps an execution's lives apart: suspects run alone, owners hand over, the gone are missed early."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID, uuid4

import psycopg
import pytest
from sql.database import LONG, Database

from pgconductor.errors import LeaseLost
from pgconductor.model import Outcome
from pgconductor.testing import DatabaseClock


def restart(db: Database, epoch: str = "another") -> None:
    """Let the server seem to have been restarted."""
    db.rows(
        "create or replace function {s}._private_server_epoch() returns text language sql stable"
        f" return '{epoch}'::text"
    )


@pytest.fixture(autouse=True)
def same_server_again(db: Database) -> Iterator[None]:
    body = db.value("select pg_get_functiondef('{s}._private_server_epoch'::regproc)")
    yield
    db.rollback()
    db.rows(body)
    db.commit()


def suspect(db: Database) -> UUID:
    one = db.invoke()
    db.rows("update {s}._private_executions set crashes = 2 where id = %s", one)
    return one


# --- suspects ---


@pytest.mark.parametrize("has_overflow", [True, False])
def test_execution_on_its_last_life_is_claimed_by_itself_only(db: Database, has_overflow: bool) -> None:
    """It runs beside others, and the third crash is charged to an innocent one or to it, as chance has it.

    With and without some from before the queue was registered: a claim then takes from two partitions, or from one.
    """
    early = {suspect(db)} if has_overflow else set[UUID]()
    db.register_queue()
    owner = db.register_orchestrator()
    late = suspect(db)
    innocent = db.invoke()
    assert db.run(db.calls.signals(owner, ["q"])).suspects == ("q",)
    assert [c.id for c in db.claim(owner)] == [innocent]
    answer = db.look(owner)
    assert (answer.claimed, answer.due_in) == ([], None)  # not "come again in 10 ms", for ever
    claimed = [db.run(db.calls.claim_suspect("q", owner, ["t"])) for _ in range(3)]
    assert {c.id for c in claimed if c is not None} == {*early, late}
    assert claimed[2] is None
    assert db.run(db.calls.signals(owner, ["q"])).suspects == ()
    assert db.run(db.calls.claim_suspect("q", owner, ["u"])) is None


def test_suspect_is_claimed_by_the_living_only(db: Database, clock: DatabaseClock) -> None:
    """A process that was declared dead starts the one that is most dangerous."""
    db.register_queue()
    suspect(db)
    owner = db.register_orchestrator(lease=10)
    clock.advance(11)
    with pytest.raises(LeaseLost):
        db.run(db.calls.claim_suspect("q", owner, ["t"]))


# --- handing over ---


def test_claims_that_survived_a_restart_are_handed_over(db: Database) -> None:
    """A restart of the server throws away what handlers have done, or leaves it to an owner that may claim it again."""
    db.register_queue()
    old, new = db.register_orchestrator(), uuid4()
    kept, unknown, lost = db.invoke(), db.invoke(key="u"), db.invoke()
    claimed = {c.id: c for c in db.claim(old)}
    restart(db)
    assert not db.run(db.calls.heartbeat(old, LONG, ["q"])).is_alive
    db.rows(
        "update {s}._private_executions set state = 'ready', owner = null, claim_no = 0, attempt = 0 where id = %s",
        lost,
    )
    held = [(i, claimed[i].claim_no) for i in (kept, lost)]
    assert db.run(db.calls.succeed_orchestrator(old, new, LONG, held)) == {kept}
    assert db.live(kept, "state::text, owner, attempt, crashes, claim_no") == ("running", new, 1, 0, 1)
    assert db.live(unknown, "state::text, attempt, crashes") == ("ready", 0, 0)
    assert db.live(lost, "state::text, attempt, crashes") == ("ready", 0, 0)
    assert db.flush(old, Outcome(kept, 1, "completed", "1")) == {kept: "fenced"}
    assert db.run(db.calls.heartbeat(new, LONG, ["q"])).is_alive
    assert {c.id for c in db.claim(new)} == {unknown, lost}
    assert db.flush(new, Outcome(kept, 1, "completed", "1")) == {}
    assert db.recover() == (0, 0)


def test_nobody_succeeds_the_dead(db: Database, clock: DatabaseClock) -> None:
    """What was given to others is taken back from them."""
    db.register_queue()
    old, new = db.register_orchestrator(lease=10), uuid4()
    one = db.invoke()
    (claimed,) = db.claim(old)
    clock.advance(11)
    with pytest.raises(LeaseLost):
        db.run(db.calls.succeed_orchestrator(old, new, LONG, [(one, claimed.claim_no)]))
    db.rollback()
    assert db.live(one, "owner") == (old,)


def test_handing_over_twice_is_refused(db: Database) -> None:
    """The reply of the first was lost: a second incarnation takes the claims from the first."""
    db.register_queue()
    old, new = db.register_orchestrator(), uuid4()
    one = db.invoke()
    (claimed,) = db.claim(old)
    db.run(db.calls.succeed_orchestrator(old, new, LONG, [(one, claimed.claim_no)]))
    with pytest.raises(LeaseLost):
        db.run(db.calls.succeed_orchestrator(old, uuid4(), LONG, [(one, claimed.claim_no)]))
    db.rollback()
    assert db.live(one, "owner") == (new,)


def test_outage_of_the_server_is_no_crash_of_those_who_lost_their_lease_by_it(
    db: Database, clock: DatabaseClock
) -> None:
    """Three restarts of the server, and whatever ran through them counts as poison."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    one = db.invoke()
    db.claim(owner)
    db.rows("update {s}._private_executions set crashes = 2")
    restart(db)
    clock.advance(11)
    assert db.recover() == (1, 0)
    assert db.live(one, "state::text, attempt, crashes, outcome") == ("ready", 0, 2, "released")


# --- early rescue ---


def test_process_whose_session_is_gone_is_rescued_before_its_lease_ends(db: Database, clock: DatabaseClock) -> None:
    """A killed process holds its work for the whole lease, though the server saw it go."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    one = db.invoke()
    db.claim(owner)
    session = db.session(autocommit=True)
    assert session.run(session.calls.hold_session(owner))
    clock.advance(6)
    assert db.recover() == (0, 0)  # the session lives: only its heartbeats are late
    session.close()
    db.wait_gone(session)
    assert db.recover() == (1, 0)
    assert db.live(one, "state::text, crashes") == ("ready", 1)


def test_one_missing_heartbeat_is_no_reason(db: Database, clock: DatabaseClock) -> None:
    """A connection that is being renewed costs a process all its work."""
    db.register_queue()
    owner = db.register_orchestrator(lease=100)
    db.invoke()
    db.claim(owner)
    session = db.session(autocommit=True)
    session.run(session.calls.hold_session(owner))
    session.close()
    clock.advance(40)
    assert db.recover() == (0, 0)
    assert db.run(db.calls.heartbeat(owner, 100.0, [])).is_alive


def test_after_a_restart_of_the_server_missing_sessions_say_nothing(db: Database, clock: DatabaseClock) -> None:
    """All processes lose their sessions at once, and declare each other dead."""
    db.register_queue()
    owner = db.register_orchestrator(lease=10)
    db.rows("update {s}._private_orchestrators set has_session = true")
    restart(db)
    clock.advance(6)
    assert db.recover() == (0, 0)
    assert db.value("select died_at from {s}._private_orchestrators where id = %s", owner) is None


def test_orchestrator_without_a_session_of_its_own_has_its_whole_lease(db: Database, clock: DatabaseClock) -> None:
    """Behind a pooler nobody holds the lock, and everybody is declared dead."""
    db.register_queue()
    db.register_orchestrator(lease=100)
    clock.advance(80)
    db.recover()
    assert db.value("select count(*) from {s}._private_orchestrators where died_at is not null") == 0


# --- options of an invocation ---


def test_options_reach_the_claim(db: Database) -> None:
    """A timeout or a deadline that was asked for is forgotten on the way."""
    db.register_queue()
    owner = db.register_orchestrator()
    db.value(
        "select {s}.invoke('t', '{}', 'q', timeout => '1.5 s', deadline => {s}._private_clock() + interval '1 h',"
        ' max_attempts => 7, tags => array[\'x\'], backoff => \'{"kind": "fixed", "seconds": 3}\')'
    )
    (claimed,) = db.claim(owner)
    assert (claimed.timeout, claimed.max_attempts) == (1.5, 7)
    assert claimed.backoff == '{"kind": "fixed", "seconds": 3}'
    assert claimed.deadline_in is not None
    assert 3500 < claimed.deadline_in <= 3600
    assert db.live(claimed.id, "tags") == (["x"],)


def test_unknown_option_is_refused_by_name(db: Database) -> None:
    """A newer client's option is dropped in silence."""
    with pytest.raises(psycopg.Error, match="unknown options: 'colour'") as refusal:
        db.rows(
            "select * from {s}.invoke_many(array['t'], array['{}'::jsonb],"
            " p_options => array['{\"colour\": 1}'::jsonb])"
        )
    assert refusal.value.sqlstate == "PC001"
