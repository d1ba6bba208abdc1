"""The wake-up protocol's SQL half: who notifies, who sees a change in flight, in each order of the two sides' steps.

The argument is in `pgconductor/runtime/reactor.py`. K: "a change that makes work is in flight"; M: "somebody sleeps".
Every race is an explicit order of steps on sessions of their own; whether a NOTIFY was sent is decided without
waiting: notifications arrive in the order of commits, so one of the test's own closes the list.
"""

from __future__ import annotations

import itertools
from uuid import UUID

import psycopg
import pytest
from sql.database import Database, Session, done

from pgconductor.db.calls import NewExecution
from pgconductor.testing import DatabaseClock

ISOLATION = ["read committed", "repeatable read", "serializable"]


class Sleeper:
    """A worker's LISTEN connection."""

    def __init__(self, db: Database, queue: str = "q") -> None:
        self.queue = queue
        self.session = db.session(autocommit=True)
        self.channel = db.run(db.calls.channel(queue))
        self.fence = f"fence_{self.session.pid}"
        self.session.rows(f"listen {self.channel}")
        self.session.rows(f"listen {self.fence}")

    def raise_flag(self) -> bool | None:
        return self.session.run(self.session.calls.raise_sleep_flag(self.queue, raise_it=True))

    def look(self) -> bool | None:
        return self.session.run(self.session.calls.raise_sleep_flag(self.queue, raise_it=False))

    def lower_flag(self) -> bool | None:
        return self.session.run(self.session.calls.lower_sleep_flag(self.queue))

    def look_before_sleep(self, *, is_up: bool = False, is_lookout: bool = False) -> str:
        return self.session.run(self.session.calls.look_before_sleep(self.queue, is_up=is_up, is_lookout=is_lookout))

    def become_lookout(self, *, is_up: bool = False) -> bool | None:
        return self.session.run(self.session.calls.become_lookout(self.queue, is_up=is_up))

    def stand_down(self) -> bool | None:
        return self.session.run(self.session.calls.stand_down(self.queue))

    def heard(self) -> int:
        """How many wake-ups were committed since the last call."""
        self.session.rows(f"notify {self.fence}")
        heard: list[tuple[str, str]] = []
        arriving = self.session.conn.notifies(timeout=20)
        for notification in arriving:
            if notification.channel == self.fence:
                arriving.close()
                assert set(heard) <= {(self.channel, "")}
                return len(heard)
            heard.append((notification.channel, notification.payload))
        raise AssertionError("a notification of one's own did not arrive")


def take(session: Session, flag: str, queue: str = "q", *, shared: bool = False, until_commit: bool = False) -> bool:
    """Try to take K or M."""
    function = f"pg_try_advisory{'_xact' if until_commit else ''}_lock{'_shared' if shared else ''}"
    return bool(session.value(f"select {function}({{s}}._private_key_{flag}(%s))", queue))


def let_go(session: Session, flag: str, queue: str = "q") -> None:
    assert session.value(f"select pg_advisory_unlock({{s}}._private_key_{flag}(%s))", queue)


# --- every order of the steps, one by one ---

INSERTER = ["raise K", "look at M", "end"]
WORKER = ["raise M", "look at K", "claim"]
ORDERS = [
    tuple(INSERTER[sum(inserts[:n])] if inserts[n] else WORKER[n - sum(inserts[:n])] for n in range(6))
    for inserts in itertools.product([True, False], repeat=6)
    if sum(inserts) == 3
]


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
@pytest.mark.parametrize("order", ORDERS, ids=" < ".join)
def test_in_every_order_of_the_steps_no_work_is_overlooked(db: Database, order: tuple[str, ...], commits: bool) -> None:
    """A worker sleeps although there is work, and nobody will wake it. The insert's trigger is left out: its two steps
    are made by hand.
    """
    assert len(ORDERS) == 20
    db.register_queue()
    owner = db.register_orchestrator()
    sleeper, inserter = Sleeper(db), db.session()
    inserter.rows("set session_replication_role = replica")
    inserter.invoke()
    happened: list[str] = []
    has_k = nobody_sleeps = quiet = False
    claimed = 0
    for step in order:
        happened.append(step)
        if step == "raise K":
            has_k = take(inserter, "k", shared=True, until_commit=True)
        elif step == "look at M":
            nobody_sleeps = inserter.value("select {s}._private_nobody_sleeps('q')")
            if not (has_k and nobody_sleeps):
                inserter.rows(f"notify {sleeper.channel}")
        elif step == "end":
            (inserter.commit if commits else inserter.rollback)()
        elif step == "raise M":
            take(sleeper.session, "m", shared=True)
        elif step == "look at K":
            quiet = sleeper.look() is True
        else:
            claimed = len(db.claim(owner))
    at = happened.index
    assert has_k
    assert nobody_sleeps == (at("look at M") < at("raise M"))
    assert quiet == (at("look at K") < at("raise K") or at("look at K") > at("end"))
    assert claimed == (1 if commits and at("end") < at("claim") else 0)
    is_woken = sleeper.heard() > 0
    assert is_woken == (commits and not nobody_sleeps)
    # What it is all for: it sleeps only if there is nothing, or if it is woken.
    assert not commits or claimed or not quiet or is_woken


def test_worker_looking_at_this_instant_is_taken_for_asleep(db: Database) -> None:
    """K is taken by a look: the inserter's flag cannot be seen, so it must notify."""
    sleeper, looking = Sleeper(db), db.session(autocommit=True)
    assert take(looking, "k")
    db.invoke()
    let_go(looking, "k")
    assert sleeper.heard() == 1


def test_inserter_looking_at_this_instant_is_not_taken_for_a_sleeper(db: Database) -> None:
    """Inserters that meet wake each other's imaginary sleepers: a NOTIFY, and its lock, for nothing."""
    sleeper, looking = Sleeper(db), db.session(autocommit=True)
    assert take(looking, "m")
    db.invoke()
    assert sleeper.heard() == 0
    assert sleeper.raise_flag() is None  # the worker is told to try again
    let_go(looking, "m")
    assert sleeper.raise_flag() is True


def test_two_workers_that_look_at_once_stay_awake(db: Database) -> None:
    """A look mistaken for quiet while another's look hides a change. It costs a nap of 2 ms."""
    sleeper, looking = Sleeper(db), db.session(autocommit=True)
    assert take(looking, "k")
    assert sleeper.raise_flag() is False
    let_go(looking, "k")
    assert sleeper.look() is True


def test_looks_leave_no_lock_behind(db: Database) -> None:
    """A flag nobody holds on purpose: every insert notifies, or no worker ever sleeps again."""
    sleeper = Sleeper(db)
    db.invoke()
    assert sleeper.raise_flag() is True
    assert sleeper.look() is True  # counts the flag once, not twice
    db.invoke()
    session = db.session()
    session.invoke()
    assert sleeper.look() is False
    session.commit()
    assert sleeper.lower_flag() is True
    assert db.rows("select locktype from pg_locks where locktype = 'advisory'") == []


# --- lookouts ---


def is_free(db: Database, flag: str) -> bool:
    """Whether nobody holds the flag."""
    other = db.session()
    is_free = take(other, flag, until_commit=True)
    other.rollback()
    return is_free


def test_worker_behind_a_lookout_has_its_flag_down(db: Database) -> None:
    """Every insert notifies, though somebody looks every few milliseconds."""
    one, other = Sleeper(db), Sleeper(db)
    assert one.raise_flag() is True
    assert other.raise_flag() is True
    assert one.become_lookout(is_up=True) is True
    assert other.look_before_sleep(is_up=True) == "watched"
    db.invoke()
    assert other.heard() == 0


def test_one_worker_is_the_lookout(db: Database) -> None:
    """Ten that look cost ten times as much, and find no more."""
    one, other, third = Sleeper(db), Sleeper(db), Sleeper(db, "another")
    assert one.become_lookout() is True
    assert third.raise_flag() is True
    assert other.raise_flag() is True
    assert other.become_lookout(is_up=True) is False
    assert is_free(db, "m")  # of the one that is not the lookout, too
    assert third.look_before_sleep(is_up=True) == "quiet"


def test_lookout_that_stands_down_wakes_those_who_relied_on_it(db: Database) -> None:
    """What it cannot take lies there until their naps end."""
    one, other = Sleeper(db), Sleeper(db)
    assert one.become_lookout() is True
    assert one.stand_down() is True
    assert other.heard() == 1
    assert other.look_before_sleep() == "quiet"


def test_lookout_that_goes_to_sleep_has_raised_its_flag_before(db: Database) -> None:
    """Others take it for awake, an insert for nobody: it lies there until a sweep."""
    one, looking = Sleeper(db), db.session(autocommit=True)
    assert one.become_lookout() is True
    assert take(looking, "m")
    assert one.look_before_sleep(is_lookout=True) == "refused"
    assert not is_free(db, "l")
    let_go(looking, "m")
    assert one.look_before_sleep(is_lookout=True) == "quiet"
    assert is_free(db, "l")
    db.invoke()
    assert one.heard() == 1


def test_lookout_that_goes_to_sleep_sees_a_change_in_flight(db: Database) -> None:
    """It sleeps beside an insert that had found it awake."""
    one, producer = Sleeper(db), db.session()
    assert one.become_lookout() is True
    producer.invoke()
    assert one.look_before_sleep(is_lookout=True) == "in flight"
    producer.commit()
    assert one.look_before_sleep(is_up=True) == "quiet"


def test_who_looks_for_a_lookout_is_not_taken_for_one(db: Database) -> None:
    """Two that look at once would both rely on the other."""
    one, looking = Sleeper(db), db.session(autocommit=True)
    assert take(looking, "l", shared=True)
    assert one.look_before_sleep() == "quiet"
    assert one.become_lookout(is_up=True) is None
    assert is_free(db, "m")


def test_killed_lookout_is_relied_on_no_more(db: Database) -> None:
    """After one crash all workers sleep with their flags down."""
    one, other = Sleeper(db), Sleeper(db)
    assert one.become_lookout() is True
    db.wait_gone(one.session)
    assert other.become_lookout() is True


def test_lookouts_leave_no_lock_behind(db: Database) -> None:
    """A lock that nobody holds on purpose: no worker is ever woken by an insert again."""
    sleeper = Sleeper(db)
    assert sleeper.become_lookout() is True
    assert sleeper.look_before_sleep(is_lookout=True) == "quiet"
    assert sleeper.look_before_sleep(is_up=True) == "quiet"  # counts the flag once, not twice
    assert sleeper.become_lookout(is_up=True) is True
    assert sleeper.stand_down() is True
    assert db.rows("select locktype from pg_locks where locktype = 'advisory'") == []


# --- the two whole verbs ---


@pytest.mark.parametrize("isolation", ISOLATION)
def test_insert_wakes_the_sleeper_when_it_commits_and_not_before(db: Database, isolation: str) -> None:
    """Locks are not under MVCC: a snapshot older than the sleeper must not hide it."""
    sleeper, inserter = Sleeper(db), db.session()
    inserter.rows(f"set transaction isolation level {isolation}")
    inserter.rows("select * from {s}.executions")
    assert sleeper.raise_flag() is True
    inserter.invoke()
    assert sleeper.heard() == 0
    inserter.commit()
    assert sleeper.heard() == 1


@pytest.mark.parametrize("isolation", ISOLATION)
def test_worker_stays_awake_while_an_insert_is_open(db: Database, isolation: str) -> None:
    """It falls asleep just before the commit of an insert that saw nobody asleep."""
    db.register_queue()
    owner = db.register_orchestrator()
    sleeper, inserter = Sleeper(db), db.session()
    inserter.rows(f"set transaction isolation level {isolation}")
    one = inserter.invoke()
    assert sleeper.raise_flag() is False
    assert db.claim(owner) == []
    inserter.commit()
    assert sleeper.look() is True
    assert [c.id for c in db.claim(owner)] == [one]
    assert sleeper.heard() == 0


@pytest.mark.parametrize("asleep", [True, False])
def test_two_inserters_at_once(db: Database, asleep: bool) -> None:
    """The second relies on the first, which may roll back; or the worker forgets the second when the first ends."""
    sleeper, first, second = Sleeper(db), db.session(), db.session()
    if asleep:
        assert sleeper.raise_flag() is True
    first.invoke()
    second.invoke()
    assert (sleeper.look() if asleep else sleeper.raise_flag()) is False
    first.rollback()
    assert sleeper.look() is False
    second.commit()
    assert sleeper.look() is True
    assert sleeper.heard() == (1 if asleep else 0)


def test_nobody_asleep_means_no_notification(db: Database) -> None:
    """Every insert notifies, and all commits of the database queue up behind one lock."""
    sleeper = Sleeper(db)
    db.invoke()
    assert sleeper.raise_flag() is True
    assert sleeper.lower_flag() is True
    db.invoke_many(*[NewExecution("t", "{}", "q")] * 10)
    assert sleeper.heard() == 0


def test_sleepers_of_other_queues_are_left_asleep(db: Database) -> None:
    """One busy queue wakes all workers."""
    mine, other = Sleeper(db), Sleeper(db, "other")
    assert (mine.raise_flag(), other.raise_flag()) == (True, True)
    inserter = db.session()
    inserter.invoke()
    assert (mine.look(), other.look()) == (False, True)
    inserter.commit()
    assert (mine.heard(), other.heard()) == (1, 0)


def test_batch_sends_one_notification_per_queue(db: Database) -> None:
    """Ten thousand rows send ten thousand notifications; or the second queue of a batch is forgotten."""
    mine, other = Sleeper(db), Sleeper(db, "other")
    assert (mine.raise_flag(), other.raise_flag()) == (True, True)
    db.invoke_many(*[NewExecution("t", "{}", queue) for queue in ("q", "other") for _ in range(500)])
    assert (mine.heard(), other.heard()) == (1, 1)


def test_all_sleepers_of_a_queue_hear(db: Database) -> None:
    """M is one sleeper's alone: the first to wake hides the second."""
    one, two = Sleeper(db), Sleeper(db)
    assert (one.raise_flag(), two.raise_flag()) == (True, True)
    assert one.lower_flag() is True
    db.invoke()
    assert (one.heard(), two.heard()) == (1, 1)


def test_rollback_sends_nothing_and_leaves_nothing(db: Database) -> None:
    """A wake-up for work that does not exist, or a flag that keeps workers awake for ever."""
    sleeper, inserter = Sleeper(db), db.session()
    assert sleeper.raise_flag() is True
    inserter.invoke()
    inserter.rollback()
    assert (sleeper.heard(), sleeper.look()) == (0, True)


def test_rolled_back_savepoint_lets_go_of_k_and_of_its_notification(db: Database) -> None:
    """A long transaction that gave up its insert keeps every worker awake."""
    sleeper, inserter = Sleeper(db), db.session()
    assert sleeper.raise_flag() is True
    inserter.rows("savepoint s")
    inserter.invoke()
    assert sleeper.look() is False
    inserter.rows("rollback to s")
    assert sleeper.look() is True
    inserter.rows("savepoint s")
    inserter.invoke()
    inserter.rows("release s")
    assert sleeper.look() is False
    inserter.commit()
    assert (sleeper.heard(), sleeper.look()) == (1, True)


# --- two-phase commit ---


@pytest.fixture
def two_phase(db: Database) -> Database:
    """The database of a server that takes PREPARE TRANSACTION."""
    if db.value("show max_prepared_transactions") == "0":
        pytest.skip("needs a server with max_prepared_transactions > 0")
    return db


def test_prepared_insert_keeps_workers_awake_until_it_is_committed(two_phase: Database) -> None:
    """K goes with the session that prepared, and the work appears while everybody sleeps."""
    db = two_phase
    db.register_queue()
    owner = db.register_orchestrator()
    sleeper, inserter = Sleeper(db), db.session()
    one = inserter.invoke()
    inserter.rows("prepare transaction 'pgconductor_test_wake'")
    inserter.close()
    assert sleeper.raise_flag() is False
    assert db.claim(owner) == []
    db.rows("commit prepared 'pgconductor_test_wake'")
    assert sleeper.look() is True
    assert [c.id for c in db.claim(owner)] == [one]


def test_prepare_after_a_notification_fails_and_loses_nothing_else(two_phase: Database) -> None:
    """PostgreSQL refuses it; what must hold is that no flag and no row are left."""
    sleeper, inserter = Sleeper(two_phase), two_phase.session()
    assert sleeper.raise_flag() is True
    inserter.invoke()
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        inserter.rows("prepare transaction 'pgconductor_test_refused'")
    inserter.rollback()
    assert (sleeper.look(), sleeper.heard()) == (True, 0)
    assert two_phase.value("select count(*) from {s}.executions") == 0


# --- those who die ---


def test_work_hidden_by_a_claimer_that_dies_is_seen(db: Database) -> None:
    """The worker finds nothing because a rival has locked it, sleeps, and the rival dies before it commits."""
    db.register_queue()
    owner = db.register_orchestrator()
    one = db.invoke()
    sleeper, claimer = Sleeper(db), db.session()
    assert [c.id for c in claimer.claim(owner)] == [one]
    assert db.claim(owner) == []
    assert sleeper.raise_flag() is False
    db.wait_gone(claimer)
    assert sleeper.look() is True
    assert [c.id for c in db.claim(owner)] == [one]


def test_promoted_but_uncommitted_work_is_in_flight_too(db: Database, clock: DatabaseClock) -> None:
    """A claimer makes due work ready that it cannot take, and dies or commits: nobody looks again."""
    db.register_queue()
    owner = db.register_orchestrator()
    db.invoke(delay=30)
    clock.advance(31)
    sleeper, claimer = Sleeper(db), db.session()
    assert claimer.claim(owner, tasks=["another"]) == []
    assert sleeper.raise_flag() is False
    claimer.commit()
    assert sleeper.look() is True
    assert len(db.claim(owner)) == 1


def test_killed_sleeper_leaves_no_flag(db: Database) -> None:
    """After one crash every insert notifies for ever."""
    sleeper, witness = Sleeper(db), Sleeper(db)
    assert sleeper.raise_flag() is True
    db.wait_gone(sleeper.session)
    db.invoke()
    assert witness.heard() == 0


def test_killed_inserter_leaves_no_flag(db: Database) -> None:
    """After one crash no worker ever sleeps again."""
    sleeper, inserter = Sleeper(db), db.session()
    inserter.invoke()
    db.wait_gone(inserter)
    assert sleeper.raise_flag() is True


# --- everything else that makes work ---


def running(db: Database) -> tuple[UUID, UUID]:
    """An execution of queue "q" and its owner."""
    db.register_queue()
    one = db.invoke()
    owner = db.register_orchestrator(lease=10)
    db.claim(owner)
    return one, owner


def give_back(session: Session, way: str, one: UUID, owner: UUID) -> None:
    if way in ("retried", "released", "retried later"):
        (claim_no,) = session.live_row(one, "claim_no")
        outcome = done(session.claimed(one, claim_no), way.split()[0], delay=30.0 if way == "retried later" else 0.0)
        assert session.flush(owner, outcome) == {}
    elif way == "recovered":
        assert session.recover() == (1, 0)
    elif way == "unknown":
        assert session.run(session.calls.release_unknown(owner, "q", [])) == 1
    else:
        assert session.run(session.calls.retire_orchestrator(owner)) == 1


WAYS = ["retried", "retried later", "released", "recovered", "unknown", "retired"]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_given_back_wakes_a_sleeper(db: Database, clock: DatabaseClock, way: str) -> None:
    """Work comes back while everybody sleeps until the sweep. Held in flight until it commits, like an insert."""
    one, owner = running(db)
    if way == "recovered":
        clock.advance(11)
    sleeper, giver = Sleeper(db), db.session()
    assert sleeper.raise_flag() is True
    give_back(giver, way, one, owner)
    assert sleeper.look() is False
    assert sleeper.heard() == 0
    giver.commit()
    assert (sleeper.heard(), sleeper.look()) == (1, True)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_given_back_keeps_a_looking_worker_awake(db: Database, clock: DatabaseClock, way: str) -> None:
    """The other order: it saw nobody asleep, so whoever goes to sleep now must see it."""
    one, owner = running(db)
    if way == "recovered":
        clock.advance(11)
    sleeper, giver = Sleeper(db), db.session()
    give_back(giver, way, one, owner)
    assert sleeper.raise_flag() is False
    giver.commit()
    assert (sleeper.heard(), sleeper.look()) == (0, True)


def test_what_falls_due_in_a_claim_wakes_the_other_sleepers(db: Database, clock: DatabaseClock) -> None:
    """Fifty due at once, one worker with room for one: the others sleep on."""
    db.register_queue()
    owner = db.register_orchestrator()
    sleeper = Sleeper(db)
    assert sleeper.raise_flag() is True
    db.invoke_many(*[NewExecution("t", "{}", "q", 0, None, 100.0)] * 5)
    clock.advance(101)
    assert sleeper.heard() == 0
    assert len(db.claim(owner, limit=1)) == 1
    assert sleeper.heard() == 1


def test_finishing_wakes_nobody(db: Database) -> None:
    """Each flush of a busy worker wakes those who sleep because there is nothing to do."""
    one, owner = running(db)
    sleeper = Sleeper(db)
    assert sleeper.raise_flag() is True
    (claim_no,) = db.live_row(one, "claim_no")
    db.flush(owner, done(db.claimed(one, claim_no)))
    assert sleeper.heard() == 0


@pytest.mark.parametrize(("delay", "told"), [(-5.0, 1), (0.0, 1), (30.0, 1), (60.5, 1), (62.0, 0), (1e6, 0)])
def test_insert_wakes_for_what_is_due_before_any_sweep(db: Database, delay: float, told: int) -> None:
    """A sleeper's timer is not set anew for what is due soon; or it is woken for what a sweep will find in time."""
    sleeper = Sleeper(db)
    assert sleeper.raise_flag() is True
    db.invoke(delay=delay)
    assert sleeper.heard() == told
