"""The wake-up protocol between producers and a real worker, on a real database: each race of it, held open by a gate.

The sweep is off: what a test waits for comes by NOTIFY, by a look, by a due time, or never. Commits are put between two
steps of the worker by stopping it there (`workplace`), never by timing. How long something takes is not judged here
(test_wakeup_random.py does), only whether it happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
import trio
from psycopg import sql
from runtime.workplace import (
    LIMIT,
    Session,
    Workplace,
    claim,
    insert,
    is_flag_up,
    listeners_pids,
    scalar,
    session,
    until,
)

from pgconductor.db.call import Call
from pgconductor.model import Claimed


async def test_insert_wakes_a_sleeping_worker_by_notify(pgconductor_dsn: str) -> None:
    """Without the NOTIFY an idle queue would be slow by a sweep at every insert."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as producer:
        async with place.open():
            for n in range(5):
                await worker.until_asleep()
                assert is_flag_up(producer)
                insert(producer, n)
                await place.until_started(n)
            assert worker.reactor.statistics().notifications == 5


async def test_insert_uncommitted_while_the_worker_goes_to_sleep_is_seen_when_it_commits(pgconductor_dsn: str) -> None:
    """The producer saw nobody asleep and so sends no NOTIFY: only the worker's look at K keeps it from oversleeping."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn, autocommit=False) as producer:
        insert(producer, 1)
        async with place.open():
            await worker.until_looked(4)
            assert worker.answers == [False] * len(worker.answers)
            assert not worker.is_asleep
            assert not place.started_at
            producer.commit()
            await place.until_started(1)
            assert worker.reactor.statistics().notifications == 0
            await worker.until_asleep()


async def test_naps_while_a_change_is_in_flight_grow_to_a_quarter_of_a_second(pgconductor_dsn: str) -> None:
    """A producer that leaves its transaction open must cost a few looks a second, not thousands."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn, autocommit=False) as producer:
        insert(producer, 1)
        async with place.open():
            await worker.until_looked(9)
            producer.rollback()
            await worker.until_asleep()
    assert worker.naps[:9] == [0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.25]


async def test_insert_committed_between_the_empty_claim_and_the_flag_is_found(pgconductor_dsn: str) -> None:
    """It sends no NOTIFY, since the flag is down: the claim after the look has to find it."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    stop = worker.stop_at("before look")
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await stop.until_reached()
            assert not is_flag_up(producer)
            insert(producer, 1)
            stop.resume.set()
            await place.until_started(1)
            assert worker.reactor.statistics().notifications == 0


async def test_insert_committed_between_the_look_and_the_last_claim_is_found(pgconductor_dsn: str) -> None:
    """The flag is up, so it notifies; forgetting that at the claim is right only because the claim sees the row."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    stop = worker.stop_at("after look")
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await stop.until_reached()
            assert worker.answers == [True]
            insert(producer, 1)
            stop.resume.set()
            await place.until_started(1)


async def test_insert_begun_before_the_look_and_committed_after_it_is_found(pgconductor_dsn: str) -> None:
    """The same window, entered by a producer that raised K before: the look must not say that all is quiet."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    before, after = worker.stop_at("before look"), worker.stop_at("after look")
    with session(pgconductor_dsn, autocommit=False) as producer:
        async with place.open():
            await before.until_reached()
            insert(producer, 1)
            before.resume.set()
            await after.until_reached()
            assert worker.answers == [False]
            producer.commit()
            after.resume.set()
            await place.until_started(1)
            assert worker.reactor.statistics().notifications == 0


async def test_notification_that_arrives_before_the_sleep_is_kept(pgconductor_dsn: str) -> None:
    """The last claim was empty already: if the wake-up were forgotten now, nothing else would come."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    stop = worker.stop_at("before sleep")
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await stop.until_reached()
            insert(producer, 1)
            await until(lambda: worker.reactor.statistics().notifications > 0)
            stop.resume.set()
            await place.until_started(1)


@pytest.mark.parametrize("level", ["READ_COMMITTED", "REPEATABLE_READ", "SERIALIZABLE"])
@pytest.mark.parametrize("place_of_commit", ["before look", "after look", "before sleep"])
async def test_no_isolation_level_hides_an_insert_from_a_worker_that_goes_to_sleep(
    pgconductor_dsn: str, level: str, place_of_commit: str
) -> None:
    """The producer's snapshot is older than the worker's flag; locks are not under MVCC, so it sees it all the same."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    begin, commit = worker.stop_at("before look"), worker.stop_at("after look")
    with session(pgconductor_dsn, autocommit=False) as producer:
        producer.isolation_level = psycopg.IsolationLevel[level]
        scalar(producer, "select count(*) from pgconductor._private_executions")
        async with place.open():
            await begin.until_reached()
            if place_of_commit == "before look":
                insert(producer, 1)
                producer.commit()
            begin.resume.set()
            await commit.until_reached()
            if place_of_commit == "after look":
                insert(producer, 1)
                producer.commit()
            commit.resume.set()
            if place_of_commit == "before sleep":
                await worker.until_asleep()
                insert(producer, 1)
                producer.commit()
            await place.until_started(1)


async def test_insert_in_a_rolled_back_savepoint_lets_the_worker_sleep(pgconductor_dsn: str) -> None:
    """K goes with its savepoint: work that will never commit must not keep a worker from sleeping."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn, autocommit=False) as producer:
        with producer.transaction(force_rollback=True):
            insert(producer, 1)
        async with place.open():
            await worker.until_asleep()
            assert worker.answers == [True]
            insert(producer, 2)
            producer.commit()
            await place.until_started(2)
            assert set(place.started_at) == {2}


async def test_two_inserters_at_once_wake_the_worker_once_both_have_committed(pgconductor_dsn: str) -> None:
    """The second finds K raised already and shares it; each has to see the sleeper by itself."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn, autocommit=False) as first, session(pgconductor_dsn, autocommit=False) as second:
        async with place.open():
            await worker.until_asleep()
            insert(first, 1)
            insert(second, 2)
            second.commit()
            await place.until_started(2)
            first.commit()
            await place.until_started(1)


async def test_rows_hidden_by_a_claimer_that_dies_reach_the_worker_that_went_to_sleep(pgconductor_dsn: str) -> None:
    """SKIP LOCKED hides them from its claims and nobody announces them again: the claimer's K is what it waits for."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin, session(pgconductor_dsn, autocommit=False) as rival:
        insert(admin, 1, 2)
        assert len(claim(rival, place)) == 2
        async with place.open():
            await worker.until_looked(3)
            assert worker.answers == [False] * len(worker.answers)
            admin.execute("select pg_terminate_backend(%s)", [rival.info.backend_pid])
            await place.until_started(1, 2)


async def test_rows_claimed_by_a_rival_just_before_the_woken_worker_come_back_when_it_dies(
    pgconductor_dsn: str,
) -> None:
    """The NOTIFY is used up by the worker's empty claim; from then on only that claim tells of the rows."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin, session(pgconductor_dsn, autocommit=False) as rival:
        async with place.open():
            await worker.until_asleep()
            stop = worker.stop_at("after sleep")
            insert(admin, 1)
            await stop.until_reached()
            assert len(claim(rival, place)) == 1
            seen, empty = len(worker.answers), worker.pipeline.statistics().empty_claims
            stop.resume.set()
            await until(lambda: worker.pipeline.statistics().empty_claims >= empty + 3)  # it comes again and again
            assert worker.answers[seen:] == []  # and the flag, which has been up, need not be looked at
            admin.execute("select pg_terminate_backend(%s)", [rival.info.backend_pid])
            await place.until_started(1)


async def test_rows_that_a_rival_has_beside_one_that_the_worker_gets_come_back_when_it_dies(
    pgconductor_dsn: str,
) -> None:
    """A claim that brings something does not tell of rows that others have locked: it is no reason to sleep on."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin, session(pgconductor_dsn, autocommit=False) as rival:
        async with place.open():
            await worker.until_asleep()
            stop = worker.stop_at("after sleep")
            notified = worker.reactor.notifications
            insert(admin, 1)
            await stop.until_reached()
            assert len(claim(rival, place)) == 1
            insert(admin, 2)
            await until(lambda: worker.reactor.notifications == notified + 2)  # before its claim, which forgets them
            seen = len(worker.answers)
            stop.resume.set()
            await place.until_started(2)
            await until(lambda: len(worker.answers) > seen or worker.is_asleep)
            assert len(worker.answers) > seen  # it has looked again
            admin.execute("select pg_terminate_backend(%s)", [rival.info.backend_pid])
            await place.until_started(1)


async def test_woken_worker_that_finds_nothing_claims_once_and_sleeps_on(pgconductor_dsn: str) -> None:
    """Of ten that are woken by one insert, nine would claim twice and look at K in between."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin:
        async with place.open():
            await worker.until_asleep()
            stop = worker.stop_at("after sleep")
            looks, claims = len(worker.answers), worker.pipeline.statistics().claims
            admin.execute("select pg_notify(pgconductor._private_channel('q'), '')")
            await stop.until_reached()
            stop.resume.set()
            await worker.until_asleep()
            assert worker.pipeline.statistics().claims == claims + 1
            assert len(worker.answers) == looks
            insert(admin, 1)  # and it is still to be woken
            await place.until_started(1)


async def test_worker_of_a_busy_queue_that_was_woken_in_vain_takes_its_flag_down(pgconductor_dsn: str) -> None:
    """As long as one of several flags is up, every insert of 64 producers notifies."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin:
        async with place.open():
            await worker.until_asleep()
            worker.pipeline.intake.linger.begin = worker.pipeline.intake.linger.end = 0.0  # any rate is a high one
            looks = len(worker.answers)
            admin.execute("select pg_notify(pgconductor._private_channel('q'), '')")
            await until(lambda: len(worker.answers) > looks)  # who looks has raised it anew


async def test_lingering_worker_whose_looks_take_long_looks_once(pgconductor_dsn: str) -> None:
    """Ten workers that have run out of work look ten times each, past all that was there, and the others wait."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin:
        async with place.open():
            await worker.until_asleep()
            linger = worker.pipeline.intake.linger
            linger.begin = linger.end = linger.longest_interval = 0.0  # any rate is a high one, any look a long one
            linger.patience = 1e9
            looks, claims = len(worker.answers), worker.pipeline.statistics().claims
            admin.execute("select pg_notify(pgconductor._private_channel('q'), '')")
            await until(lambda: len(worker.answers) > looks and worker.is_asleep)
            assert worker.pipeline.statistics().claims == claims + 3  # woken, lingering, with the flag up


async def test_who_came_too_late_the_last_time_lets_others_go_first(pgconductor_dsn: str) -> None:
    """All that one insert wakes would claim at the same instant, and compete for the rows and the CPU."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin, session(pgconductor_dsn) as rival:
        async with place.open():
            await worker.until_asleep()
            notified, claims = worker.reactor.notifications, worker.pipeline.statistics().claims
            worker.pipeline.intake.deference.delay = 3600.0
            insert(admin, 1)
            await until(lambda: worker.reactor.notifications == notified + 1 and not worker.is_asleep)
            await trio.testing.wait_all_tasks_blocked(0.05)  # whoever was to claim has sent it
            assert worker.pipeline.statistics().claims == claims
            assert len(claim(rival, place)) == 1


async def test_released_executions_wake_another_sleeping_worker(pgconductor_dsn: str) -> None:
    """A worker that stops gives back what it has not begun; nobody else would look for it."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as admin, session(pgconductor_dsn) as rival:
        owner_rows = "select owner, array_agg(id), array_agg(claim_no) from pgconductor._private_executions group by 1"
        insert(admin, 1)
        assert len(claim(rival, place)) == 1
        async with place.open():
            await worker.until_asleep()
            ((owner, ids, claim_nos),) = rival.execute(owner_rows).fetchall()
            rival.execute(
                "select * from pgconductor.flush(%s, %s, %s, array['released'], array[null::jsonb],"
                " array[null::jsonb], array[0.0], array[null::float8])",
                [owner, ids, claim_nos],
            )
            await place.until_started(1)


async def test_delayed_execution_starts_when_due_without_polling(pgconductor_dsn: str) -> None:
    """The due time comes with the empty claim; looking again and again until then would be polling."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await worker.until_asleep()
            claims = worker.pipeline.statistics().claims
            begun = trio.current_time()
            insert(producer, 1, delay=0.5)
            await place.until_started(1)
            assert place.started_at[1] - begun >= 0.49  # never early; how late is the machine's business
            await worker.until_asleep()
            # Woken by the insert: two. Due: one that brings it, perhaps one a moment too early, two before the sleep.
            assert worker.pipeline.statistics().claims - claims <= 7


async def test_insert_due_before_the_sleepers_timer_sets_it_anew(pgconductor_dsn: str) -> None:
    """Else it would start when the later one is due."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as producer:
        insert(producer, 1, delay=55.0)
        async with place.open():
            await worker.until_asleep()
            insert(producer, 2, delay=0.2)
            await place.until_started(2)
            assert 1 not in place.started_at


async def test_mode_always_is_notified_of_every_insert_even_while_busy(pgconductor_dsn: str) -> None:
    """Its flag is up from the start and never comes down, so that a queue can do without the looks."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(notify="always", concurrency=1)
    go_on = place.hold(1)
    with session(pgconductor_dsn) as producer:
        assert not is_flag_up(producer)
        async with place.open():
            assert is_flag_up(producer)
            insert(producer, *range(1, 31))
            await place.until_started(1)
            await until(lambda: worker.pipeline.statistics().outcomes.get("released", 0) > 0)
            assert is_flag_up(producer)
            go_on.set()
            await place.until_started(*range(1, 31))
            assert worker.reactor.statistics().is_flag_raised


async def test_mode_off_opens_no_listening_connection_and_lives_by_its_sweep(pgconductor_dsn: str) -> None:
    """For queues fed by two-phase commit: PREPARE TRANSACTION refuses what has notified, so nobody may ask for it."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(notify="off", sweep_interval=0.2)
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await worker.until_asleep()
            assert not is_flag_up(producer)
            assert listeners_pids(producer) == []
            insert(producer, 1)
            await place.until_started(1)
            assert worker.reactor.statistics().listener is None


async def test_shared_listener_wakes_only_the_queue_that_was_notified(pgconductor_dsn: str) -> None:
    """One connection carries the flags of all queues of a process; a mix-up would wake the wrong worker, or none."""
    place = Workplace(pgconductor_dsn)
    listener = place.listener()
    workers = [place.worker(queue, listener=listener) for queue in ("a", "b", "c")]
    with session(pgconductor_dsn) as producer:
        async with place.open():
            for worker in workers:
                await worker.until_asleep()
            assert len(listeners_pids(producer)) == 1
            for n, worker in enumerate(workers):
                insert(producer, n, queue=worker.queue)
                await place.until_started(n)
                await worker.until_asleep()
            assert [worker.reactor.statistics().notifications for worker in workers] == [1, 1, 1]


async def test_no_queue_of_a_shared_listener_sleeps_before_it_can_be_woken(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker told to look while the connection was not yet up slept to the next sweep, its flag down."""
    place = Workplace(pgconductor_dsn)
    listener = place.listener()
    worker = place.worker("adaptive", listener=listener)
    place.worker("always", notify="always", listener=listener)
    raising, go_on = trio.Event(), trio.Event()
    execute = listener.execute

    async def held_execute(call: Call[Any]) -> Any:
        if b"raise_sleep_flag" in call.query and not raising.is_set():
            raising.set()
            await go_on.wait()
        return await execute(call)

    monkeypatch.setattr(listener, "execute", held_execute)
    with session(pgconductor_dsn) as producer:
        async with trio.open_nursery() as nursery:
            # The worker runs before its listener, as when a lost connection comes back.
            await nursery.start(worker.pipeline.run)
            await worker.until_asleep()
            claims = worker.pipeline.statistics().claims
            nursery.start_soon(listener.run)
            await until(raising.is_set)
            # The first queue is told to look while the flag of the second is being raised.
            await until(lambda: worker.pipeline.statistics().claims > claims)
            go_on.set()
            await until(lambda: listener.is_listening)
            await worker.until_asleep()
            insert(producer, 1, queue="adaptive")
            await place.until_started(1)
            nursery.cancel_scope.cancel()


async def test_saturated_worker_lowers_its_flag_and_is_sent_nothing(pgconductor_dsn: str) -> None:
    """A flag left up would make every producer pay for a NOTIFY that nobody can use."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(concurrency=2)
    events = [place.hold(n) for n in (1, 2)]
    with session(pgconductor_dsn) as producer, session(pgconductor_dsn) as witness:
        channel = scalar(producer, "select pgconductor._private_channel(%s)", "q")
        witness.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        async with place.open():
            await worker.until_asleep()
            insert(producer, *range(1, 21))
            await place.until_started(1, 2)
            await until(lambda: not (is_flag_up(producer) or worker.pipeline.statistics().in_stock))
            list(witness.notifies(timeout=0))
            insert(producer, *range(21, 31))
            assert list(witness.notifies(timeout=0)) == []
            for event in events:
                event.set()
            await place.until_started(*range(1, 31))
            await worker.until_asleep()
            assert is_flag_up(producer)


async def test_freed_runner_takes_what_is_ready_without_waiting_for_a_flush(pgconductor_dsn: str) -> None:
    """Each slot of a saturated worker stood idle for a flush interval after every execution."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(concurrency=2, flush_interval=5.0)
    place.hold(1)
    go_on = place.hold(2)
    with session(pgconductor_dsn) as producer:
        async with place.open():
            insert(producer, 1, 2)
            await place.until_started(1, 2)
            await worker.until_asleep()
            worker.pipeline._prefetch.note_stuck()  # as after long executions: nothing is claimed ahead
            insert(producer, 3)
            await until(lambda: not is_flag_up(producer))
            go_on.set()
            await place.until_started(3)
            assert worker.pipeline.statistics().flushes == 0


async def test_cancelled_worker_leaves_no_flag_and_no_claim_behind(pgconductor_dsn: str) -> None:
    """A flag without a sleeper would make every producer notify for ever."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await worker.until_asleep()
            assert is_flag_up(producer)
        await until(lambda: not is_flag_up(producer))
        assert scalar(producer, "select count(*) from pg_locks where locktype = 'advisory'") == 0


async def test_busy_worker_lingers_with_its_flag_down(pgconductor_dsn: str) -> None:
    """Raising it after each of many empty claims would make producers notify at nearly every insert."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    linger = worker.pipeline.intake.linger
    linger.period = LIMIT  # until the test has looked
    with session(pgconductor_dsn) as producer:
        async with place.open():
            await worker.until_asleep()
            insert(producer, 1)
            await place.until_started(1)
            assert not linger.is_lingering
            await worker.until_asleep()
            insert(producer, *range(2, 202))
            await place.until_started(*range(2, 202))
            assert linger.is_lingering
            await until(lambda: not is_flag_up(producer))
            insert(producer, 202)
            await place.until_started(202)
            assert not worker.is_asleep


# --- lookouts ---


def key_l(admin: Session) -> Any:
    return scalar(admin, "select pgconductor._private_key_l('q')")


def is_somebody_the_lookout(admin: Session) -> bool:
    with admin.transaction(force_rollback=True):
        return not scalar(admin, "select pg_try_advisory_xact_lock(%s)", key_l(admin))


async def test_worker_behind_a_lookout_sleeps_with_its_flag_down_and_hears_its_call(pgconductor_dsn: str) -> None:
    """Of ten workers all would ask to be notified of every insert, or all would look for it."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    worker.pipeline.intake.backing.nap = worker.pipeline.intake.backing.longest = 3600.0
    with session(pgconductor_dsn) as lookout, session(pgconductor_dsn) as admin:
        lookout.execute("select pg_advisory_lock(%s)", [key_l(admin)])
        async with place.open():
            await until(lambda: bool(worker.naps))
            assert worker.answers == [None]
            assert not is_flag_up(admin)
            insert(admin, 1)
            assert not place.started_at
            lookout.execute("select pgconductor.stand_down('q')")
            await place.until_started(1)
            await worker.until_asleep()
            assert is_flag_up(admin)


async def test_lookout_that_hangs_costs_one_nap(pgconductor_dsn: str) -> None:
    """A worker whose event loop is blocked would keep all others of its queue from working."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker()
    backing = worker.pipeline.intake.backing
    with session(pgconductor_dsn) as lookout, session(pgconductor_dsn) as admin:
        lookout.execute("select pg_advisory_lock(%s)", [key_l(admin)])
        backing.patience = 0.0
        async with place.open():
            await until(lambda: bool(worker.naps))
            insert(admin, 1)
            await place.until_started(1)
            await until(lambda: len(worker.naps) > 2)
            assert min(worker.naps) < 0.8 * worker.naps[0]  # and the next one less


async def test_one_of_two_busy_workers_is_the_lookout_until_it_stops(pgconductor_dsn: str) -> None:
    """Both look, or neither does."""
    place = Workplace(pgconductor_dsn)
    workers = [place.worker(), place.worker()]
    for worker in workers:
        linger = worker.pipeline.intake.linger
        linger.begin = linger.end = 0.0  # any rate is a high one
        linger.period = 3600.0
    with session(pgconductor_dsn) as admin:
        async with place.open():
            await until(lambda: sum(worker.reactor.is_lookout for worker in workers) == 1)
            (first,) = [worker for worker in workers if worker.reactor.is_lookout]
            (second,) = [worker for worker in workers if not worker.reactor.is_lookout]
            await until(lambda: bool(second.naps))
            assert not is_flag_up(admin)
            go_on = place.hold(1)
            insert(admin, 1)
            await place.until_started(1)
            first.pipeline.stop()
            await until(lambda: second.reactor.is_lookout)  # though a handler of the first may go on
            assert not first.reactor.is_lookout
            go_on.set()


async def test_lookout_whose_runners_are_busy_calls_the_others(pgconductor_dsn: str) -> None:
    """They sleep, since somebody looks; and that one can take no more."""
    place = Workplace(pgconductor_dsn)
    worker = place.worker(concurrency=1)
    linger = worker.pipeline.intake.linger
    linger.begin = linger.end = 0.0
    linger.period = 3600.0
    go_on = place.hold(1)
    with session(pgconductor_dsn) as admin, session(pgconductor_dsn) as witness:
        channel = scalar(admin, "select pgconductor._private_channel('q')")
        witness.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        async with place.open():
            await until(lambda: worker.reactor.is_lookout)
            insert(admin, 1)
            await place.until_started(1)
            await until(lambda: not is_somebody_the_lookout(admin))
            # The lock is let go of before the notification's transaction has ended.
            assert len(list(witness.notifies(timeout=LIMIT, stop_after=1))) == 1
            assert list(witness.notifies(timeout=0)) == []
            go_on.set()


async def test_of_those_that_have_helped_a_lookout_one_stays(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once four workers had been needed for a moment, all four looked for as long as anything came."""
    monkeypatch.setattr("pgconductor.runtime.intake._ALONE", -3600.0)  # each calls for help at once
    monkeypatch.setattr("pgconductor.runtime.intake._ALONE_FOR_CLAIMS", 0)
    place = Workplace(pgconductor_dsn)
    workers = [place.worker(), place.worker()]
    for worker in workers:
        linger = worker.pipeline.intake.linger
        linger.begin = linger.end = 0.0
        linger.period = 3600.0
    with session(pgconductor_dsn) as admin:
        async with place.open():
            for worker in workers:
                claims = worker.pipeline.statistics().claims
                await until(lambda: worker.pipeline.statistics().claims > claims + 2)  # noqa: B023
            assert not is_somebody_the_lookout(admin)
            monkeypatch.setattr("pgconductor.runtime.intake._ALONE", 3600.0)
            await until(lambda: sum(worker.reactor.is_lookout for worker in workers) == 1)
            (other,) = [worker for worker in workers if not worker.reactor.is_lookout]
            naps = len(other.naps)
            await until(lambda: len(other.naps) > naps)


async def test_lookout_whose_claims_bring_more_than_it_has_runners_keeps_up_if_its_stock_runs_out(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With short handlers each claim called for help, until all workers looked and nobody was the lookout."""
    monkeypatch.setattr("pgconductor.runtime.worker._STUCK_AFTER", LIMIT)
    place = Workplace(pgconductor_dsn)
    worker = place.worker(concurrency=1)
    pipeline, intake, seen = worker.pipeline, worker.pipeline.intake, set[tuple[int, bool]]()
    take = pipeline.take

    def note(claimed: Sequence[Claimed], *, asked: int, now: float) -> None:
        seen.add((len(claimed), intake._keeps_up))
        take(claimed, asked=asked, now=now)

    monkeypatch.setattr(pipeline, "take", note)
    go_on = place.hold(21)
    with session(pgconductor_dsn) as admin:
        async with place.open():
            await worker.until_asleep()
            pipeline._prefetch.size = 100
            with admin.transaction():  # for one claim
                insert(admin, *range(1, 21))
            await place.until_started(*range(1, 21))
            assert (20, True) in seen
            await worker.until_asleep()
            with admin.transaction():  # for one claim; the first of them takes its time
                insert(admin, *range(21, 31))
            await place.until_started(21)
            with admin.transaction():  # for one claim
                insert(admin, *range(31, 34))
            await until(lambda: any(count == 3 for count, _ in seen))
            assert (3, False) in seen
            assert (3, True) not in seen
            go_on.set()
