"""Waiting for results on Trio: woken by NOTIFY, correct without, one connection for all, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest
import trio
import trio.testing
from client.database import execute, rows, until, value
from client.worker_by_hand import WorkerByHand, open_worker
from psycopg import sql

from pgconductor import (
    Conductor,
    ExecutionFailed,
    Handle,
    InvalidOption,
    InvalidPayload,
    NotOpen,
    ResultNotKept,
    Unavailable,
    WaitTimeout,
)
from pgconductor.db.result_listener import bucket_of, named_buckets
from pgconductor.polling import PollSchedule
from pgconductor.records import error_record
from pgconductor.results import Results

NEVER = PollSchedule(first=(), every=3600.0, deaf=3600.0)
SESSIONS = (
    "select count(*) from pg_stat_activity"
    " where datname = current_database() and application_name = 'pgconductor results'"
)
FLAGS = (
    "select count(*) from pg_locks l join pg_stat_activity a using (pid)"
    " where l.locktype = 'advisory' and l.granted and a.datname = current_database()"
    " and a.application_name = 'pgconductor results'"
)


async def echo(value: int) -> Any:
    return value


def conductor_that(dsn: str, schedule: PollSchedule) -> Conductor:
    """A conductor with its own idea of when to look without a notification."""
    conductor = Conductor(dsn)
    conductor._poll_schedule = schedule
    return conductor


def results_of(conductor: Conductor) -> Results:
    assert conductor._open is not None
    return conductor._open.results


async def finished(handle: Handle[Any]) -> Any:
    """The result, within ten seconds; a timeout of the wait's own would look once more at its end."""
    with trio.fail_after(10):
        return await handle.result()


async def until_listening(conductor: Conductor, *ids: UUID) -> None:
    """Wait until the flags of `ids` are raised, all looks are done, and the leader naps."""
    results = results_of(conductor)

    def is_so() -> bool:
        return (
            results._nap_scope is not None
            and results._listener is not None
            and results._listener.flags >= {bucket_of(id) for id in ids}
        )

    await until(is_so)


# --- woken ---


async def test_result_arrives_by_notification(pgconductor_dsn: str) -> None:
    """Every result a poll late."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handle = await task.invoke(1)

            async def finish() -> None:
                await until_listening(conductor, handle.id)
                assert worker.finish_all({"a": [1]}) == {handle.id}

            nursery.start_soon(finish)
            assert await finished(handle) == {"a": [1]}


async def test_result_that_is_there_needs_no_listener(pgconductor_dsn: str) -> None:
    """A connection and four round trips for what one look finds."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await task.invoke(1)
            worker.finish_all(5)
            assert await handle.result() == 5
            assert await handle.result(timeout=0) == 5
            assert value(pgconductor_dsn, SESSIONS) == 0


async def test_fifty_waiters_share_one_connection(pgconductor_dsn: str) -> None:
    """A connection per waiter, or a waiter who is forgotten; two of them wait for each execution."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    got: list[tuple[UUID, object]] = []
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handles = await task.invoke_many(task.bind(n) for n in range(25))

            async def wait(n: int) -> None:
                got.append((handles[n % 25].id, await finished(handles[n % 25])))

            async with trio.open_nursery() as nursery:
                for n in range(50):
                    nursery.start_soon(wait, n)
                await until_listening(conductor, *(handle.id for handle in handles))
                assert value(pgconductor_dsn, SESSIONS) == 1
                for claimed in worker.claim():
                    worker.complete(claimed, str(claimed.id))
            assert sorted(got) == sorted([(handle.id, str(handle.id)) for handle in handles] * 2)


async def test_waiter_who_comes_later_is_looked_for_at_once(pgconductor_dsn: str) -> None:
    """A leader asleep over a newcomer, whose flag nobody raises."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            first, second = await task.invoke(1), await task.invoke(2)
            nursery.start_soon(finished, first)
            await until_listening(conductor, first.id)
            nursery.start_soon(finished, second)
            await until_listening(conductor, first.id, second.id)
            worker.finish_all(0)


async def test_cancelled_first_waiter_hands_on(pgconductor_dsn: str) -> None:
    """Others asleep for ever after the one who listened for them has left."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handles = await task.invoke_many(task.bind(n) for n in range(3))
            leaving = trio.CancelScope()

            async def leave() -> None:
                with leaving:
                    await handles[0].result()

            nursery.start_soon(leave)
            await trio.testing.wait_all_tasks_blocked()
            for handle in handles[1:]:
                nursery.start_soon(finished, handle)
            await until_listening(conductor, *(handle.id for handle in handles))
            leader = results_of(conductor)._leader
            assert leader is not None
            assert leader.execution_id == handles[0].id
            leaving.cancel()
            await until_listening(conductor, *(handle.id for handle in handles[1:]))
            worker.finish_all(0)


async def test_waiter_cancelled_at_any_moment_leaves_others_served(pgconductor_dsn: str) -> None:
    """A leader cancelled while it connects, raises flags or looks takes the others' wake-up with it."""
    conductor = conductor_that(pgconductor_dsn, PollSchedule(first=(), every=3600.0, deaf=3600.0))
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            for step in range(30):
                handles = await task.invoke_many([task.bind(1), task.bind(2)])

                async def leave(handle: Any, checkpoints: int) -> None:
                    with trio.CancelScope() as scope:
                        async with trio.open_nursery() as inner:

                            async def cancel() -> None:
                                for _ in range(checkpoints):
                                    await trio.lowlevel.checkpoint()
                                scope.cancel()

                            inner.start_soon(cancel)
                            await handle.result()

                with trio.fail_after(20):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(leave, handles[0], step * step)
                        nursery.start_soon(finished, handles[1])
                        await until_listening(conductor, handles[1].id)
                        worker.finish_all(0)
                    assert await handles[0].result() == 0


# --- not woken ---


@pytest.fixture
def silence(pgconductor_dsn: str) -> None:
    """A database whose flushes notify nobody."""
    execute(
        pgconductor_dsn,
        "create or replace function pgconductor._private_notify_results(p_ids uuid[]) returns void"
        " language sql as $$ $$",
    )


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize(
    "schedule",
    [PollSchedule(first=(0.05, 0.2, 1.0), every=3600.0), PollSchedule(first=(), every=0.2, deaf=3600.0)],
    ids=["first looks", "later looks"],
)
async def test_result_arrives_without_any_notification(pgconductor_dsn: str, schedule: PollSchedule) -> None:
    """A flush that looked at the flags just before they were raised is silent; so is a lost notification."""
    conductor = conductor_that(pgconductor_dsn, schedule)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handle = await task.invoke(1)
            nursery.start_soon(finished, handle)
            await until_listening(conductor, handle.id)
            worker.finish_all(0)


async def test_what_ends_before_the_flags_are_raised_is_found(
    pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look and the flags nobody announces: who does not look again sleeps for ever."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    raise_flags = Results._raise_flags
    with open_worker(pgconductor_dsn, ["echo"]) as worker:

        async def finish_then_raise(results: Results) -> None:
            if any(awaited.looks for awaited in results._awaited.values()):
                worker.finish_all(3)
            await raise_flags(results)

        monkeypatch.setattr(Results, "_raise_flags", finish_then_raise)
        async with conductor:
            handle = await task.invoke(1)
            assert await handle.result(timeout=5) == 3


async def test_killed_listener_is_replaced(pgconductor_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """Waiters deaf for ever after the listening session was ended; the next one announces as before."""
    conductor = conductor_that(pgconductor_dsn, PollSchedule(first=(), every=3600.0, deaf=0.05))
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handle = await task.invoke(1)
            nursery.start_soon(finished, handle)
            for _ in range(3):
                await until_listening(conductor, handle.id)
                listener = results_of(conductor)._listener
                assert listener is not None
                assert value(pgconductor_dsn, "select pg_terminate_backend(%s, 5000)", listener.backend_pid)
                await until(lambda listener=listener: results_of(conductor)._listener is not listener)  # type: ignore[misc]
            await until_listening(conductor, handle.id)
            worker.finish_all(0)
    assert any("connection that listens for results is lost" in record.message for record in caplog.records)


async def test_listener_that_cannot_connect_leaves_polling(
    pgconductor_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Results that depend on the LISTEN connection, or a log full of its failures."""
    nowhere = "postgresql://127.0.0.1:1/nothing"
    conductor = Conductor(pgconductor_dsn, listen_dsn=nowhere)
    conductor._poll_schedule = PollSchedule(first=(), every=3600.0, deaf=0.02)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handle = await task.invoke(1)
            nursery.start_soon(finished, handle)
            results = results_of(conductor)
            await until(lambda: results._reconnecting.backoff >= 1.0)  # it has failed twice
            begun = trio.current_time()
            worker.finish_all(0)
    assert len(caplog.records) <= 2 + trio.current_time() - begun


async def test_outage_is_waited_out_with_few_words(pgconductor_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """A wait of minutes that ends because the server was restarted, a hot loop, or a flood in the log."""
    conductor = conductor_that(pgconductor_dsn, PollSchedule(first=(), every=3600.0, deaf=0.01))
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handle = await task.invoke(1)
            nursery.start_soon(finished, handle)
            await until_listening(conductor, handle.id)
            results = results_of(conductor)
            asked = 0
            ask = results._ask

            async def refuse(*args: Any, **options: Any) -> Any:
                nonlocal asked
                asked += 1
                raise Unavailable("no")

            results._ask = refuse
            begun = trio.current_time()
            results._note_named(None)
            results._interrupt_nap()
            await until(lambda: asked >= 20)
            assert trio.current_time() - begun > 0.1
            results._ask = ask
            worker.finish_all(0)
    assert len([r for r in caplog.records if "cannot look" in r.message]) <= 1 + trio.current_time() - begun


async def test_first_look_that_fails_is_an_error(pgconductor_empty_dsn: str) -> None:
    """A wait without end on a database that never was right."""
    conductor = Conductor("postgresql://127.0.0.1:1/nothing")
    task = conductor.task(echo)
    with psycopg.connect(pgconductor_empty_dsn, autocommit=True) as conn:
        conductor_there = Conductor(pgconductor_empty_dsn)
        async with conductor_there:
            await conductor_there.migrate()
        handle = task.options(conn=conn).invoke(1)
    async with conductor:
        with pytest.raises(Unavailable, match="port 1"):
            await conductor.wait_result(handle.id, task, None)


# --- nothing left behind ---


async def test_nobody_waits_nobody_is_notified(pgconductor_dsn: str) -> None:
    """A NOTIFY per flush, which serialises all commits, for nobody."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker, psycopg.connect(pgconductor_dsn, autocommit=True) as ear:
        channel = value(pgconductor_dsn, "select pgconductor._private_results_channel()")
        ear.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))

        def heard() -> list[str]:
            ear.execute("select")
            return [notify.payload for notify in ear.notifies(timeout=0)]

        async with conductor:
            handle, other = await task.invoke_many([task.bind(1), task.bind(2)])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(finished, handle)
                await until_listening(conductor, handle.id)
                claimed = {c.id: c for c in worker.claim()}
                worker.complete(claimed[handle.id])
            assert heard() == [str(bucket_of(handle.id))]
            worker.complete(claimed[other.id])
            await task.invoke(3)
            worker.finish_all()
            assert heard() == []


@pytest.mark.parametrize("how", ["finished", "timed out", "cancelled"])
async def test_flags_are_lowered_when_nobody_waits_any_more(pgconductor_dsn: str, how: str) -> None:
    """Flushes that go on announcing to somebody who has left."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await task.invoke(1)
            with trio.CancelScope() as scope:

                async def end() -> None:
                    await until_listening(conductor, handle.id)
                    assert value(pgconductor_dsn, FLAGS) == 2
                    if how == "finished":
                        worker.finish_all(0)
                    elif how == "cancelled":
                        scope.cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(end)
                    if how == "timed out":
                        with pytest.raises(WaitTimeout):
                            await handle.result(timeout=0.5)
                    else:
                        await handle.result()
            await until(lambda: value(pgconductor_dsn, FLAGS) == 0)
            assert value(pgconductor_dsn, SESSIONS) == (0 if how == "cancelled" else 1)
        await until(lambda: value(pgconductor_dsn, SESSIONS) == 0)


async def test_connection_that_rested_listens_again(pgconductor_dsn: str) -> None:
    """A connection per wait, or one that rests and never hears again; broken at rest it is replaced."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    pids: list[int] = []
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            for n in range(3):
                async with trio.open_nursery() as nursery:
                    handle = await task.invoke(n)
                    nursery.start_soon(finished, handle)
                    await until_listening(conductor, handle.id)
                    listener = results_of(conductor)._listener
                    assert listener is not None
                    pids.append(listener.backend_pid)
                    worker.finish_all(n)
                if n == 1:
                    assert value(pgconductor_dsn, "select pg_terminate_backend(%s, 5000)", pids[-1])
    assert pids[0] == pids[1] != pids[2]


async def test_conductor_closed_under_a_waiter_says_so(pgconductor_dsn: str) -> None:
    """A wait that never ends."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    ended: list[bool] = []

    async def wait(handle: Any) -> None:
        with pytest.raises(NotOpen):
            await handle.result()
        ended.append(True)

    async with trio.open_nursery() as nursery, conductor:
        handles = [await task.invoke(n) for n in range(3)]
        for handle in handles:
            nursery.start_soon(wait, handle)
        await until_listening(conductor, *(handle.id for handle in handles))
    assert ended == [True] * 3


# --- how it ends ---


@pytest.mark.parametrize("result", [0, "", False, None, [], {}, 0.0, "null"])
async def test_falsy_result_survives(pgconductor_dsn: str, result: object) -> None:
    """A result taken for no result."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await task.invoke(1)
            worker.finish_all(result)
            got = await handle.result(timeout=5)
            with conductor.sync() as client:
                got_sync = client.wait_result(handle.id, task, 5)
    assert (got, type(got)) == (got_sync, type(got_sync)) == (result, type(result))


async def test_failure_carries_the_last_error(pgconductor_dsn: str) -> None:
    """An error without the reason, or one that forges lines in a log."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await task.invoke(1)
            worker.fail(worker.claim()[0], type="shop.OutOfStock", message="no\nducks", traceback="Traceback ...")
            with pytest.raises(ExecutionFailed, match=r"of task 'echo' failed: shop\.OutOfStock: no.*ducks") as failed:
                await handle.result(timeout=5)
    assert "\n" not in str(failed.value)
    record = {"type": "shop.OutOfStock", "message": "no\nducks", "traceback": "Traceback ..."}
    assert vars(failed.value)["error"] == record
    assert failed.value.__notes__ == ["Traceback of the last attempt:\nTraceback ..."]


async def test_result_of_another_type_is_an_error(pgconductor_dsn: str) -> None:
    """A value that is not what the annotation promises."""
    conductor = Conductor(pgconductor_dsn)

    @conductor.task
    def count() -> int:
        return 1

    with open_worker(pgconductor_dsn, ["count"]) as worker:
        async with conductor:
            handle = await count.invoke()
            worker.finish_all("one")
            with pytest.raises(InvalidPayload, match="result of task 'count'"):
                await handle.result()


@pytest.mark.parametrize("waits_before", [False, True])
async def test_result_that_was_not_kept_is_an_error(pgconductor_dsn: str, waits_before: bool) -> None:
    """A wait without end for a row that is gone."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await task.invoke(1)
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    with pytest.raises(ResultNotKept, match="of task 'echo'"):
                        await finished(handle)

                if waits_before:
                    nursery.start_soon(wait)
                    await until_listening(conductor, handle.id)
                worker.complete(worker.claim()[0], 1, keep=0.0)
            with pytest.raises(ResultNotKept):
                await handle.result(timeout=0)


@pytest.mark.parametrize("timeout", [None, 20, 0])
async def test_rolled_back_execution_is_not_waited_for(pgconductor_dsn: str, timeout: float | None) -> None:
    """A wait without end for what never was."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    async with conductor:
        with psycopg.connect(pgconductor_dsn) as conn:
            gone = task.options(conn=conn).invoke(1)
            conn.rollback()
        with pytest.raises(ResultNotKept, match="rolled back"):
            await conductor.wait_result(gone.id, task, timeout)


def _leave_ready(worker: WorkerByHand) -> None:
    """Nothing is done with it."""


def _claim(worker: WorkerByHand) -> None:
    worker.claim()


@pytest.mark.parametrize(
    ("task_name", "options", "then", "said"),
    [
        ("echo", {}, _leave_ready, "ready on queue 'default'"),
        ("echo", {}, _claim, "running on queue 'default'"),
        ("echo", {"delay": 30.0}, _leave_ready, r"scheduled, due in (30|29\.\d) s on queue 'default'"),
        ("echo", {"queue": "other"}, _leave_ready, "ready; no live worker has task 'echo' on queue 'other'"),
        ("nobodys", {}, _leave_ready, "ready; no live worker has task 'nobodys' on queue 'default'"),
    ],
)
@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_timeout_says_what_it_waits_for(
    pgconductor_dsn: str,
    task_name: str,
    options: dict[str, Any],
    then: Callable[[WorkerByHand], None],
    said: str,
    timeout: float,
) -> None:
    """ "Timed out", and a search for the reason."""
    within = "yet" if timeout == 0 else r"within 0\.05 s"
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with Conductor(pgconductor_dsn) as conductor:
            handle = await conductor.invoke(task_name, {}, **options)
            then(worker)
            with pytest.raises(WaitTimeout, match=f"{handle.id} of task .* did not finish {within}: {said}") as told:
                await handle.result(timeout=timeout)
            assert isinstance(told.value, TimeoutError)
            with conductor.sync() as client:
                sync_handle = client.invoke(task_name, {}, **options)
                then(worker)
                with pytest.raises(WaitTimeout, match=f"did not finish {within}: {said}"):
                    sync_handle.result(timeout=timeout)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "5", True, 10**12])
async def test_bad_timeout_is_refused(pgconductor_dsn: str, timeout: Any) -> None:
    """A wait of another length than was meant."""
    async with Conductor(pgconductor_dsn) as conductor:
        handle = await conductor.invoke("echo")
        with pytest.raises(InvalidOption, match="timeout"):
            await handle.result(timeout=timeout)


async def test_handle_of_a_deduplicated_invoke_waits_for_the_one_execution(pgconductor_dsn: str) -> None:
    """A second caller who waits for nothing."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            first = await task.options(dedupe_key="k").invoke(1)
            second = await task.options(dedupe_key="k").invoke(2)
            worker.finish_all(7)
            assert (await first.result(), await second.result()) == (7, 7)
            assert (first.created, second.created) == (True, False)


# --- pure ---


@pytest.mark.parametrize(
    ("payloads", "named"),
    [
        (["7"], {7}),
        (["7 255", "0"], {0, 7, 255}),
        ([], set[int]()),
        ([""], None),
        (["7", "x"], None),
        (["-1"], None),
        (["٣"], None),
        (["9" * 5_000], None),
    ],
)
def test_notification_names_buckets_or_means_all(payloads: list[str], named: set[int] | None) -> None:
    """Any role may notify anything: what is not understood must not be lost, nor raise."""
    notifies = [psycopg.Notify("ours", payload, 1) for payload in payloads]
    assert named_buckets([*notifies, psycopg.Notify("another", "x", 1)], "ours") == named


@pytest.mark.parametrize("text", [None, "null", "[]", "5", '"x"', '{"type": 5}', "{", "[" * 100_000])
def test_unreadable_error_record_is_empty(text: str | None) -> None:
    """A failure that fails to be told."""
    assert error_record(text) == {}


async def test_ids_of_all_rows_are_found_by_bucket(pgconductor_dsn: str) -> None:
    """Python and SQL with two ideas of an id's bucket: nobody would ever be woken."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    async with conductor:
        handles = await task.invoke_many(task.bind(n) for n in range(300))
    found = rows(pgconductor_dsn, "select id, pgconductor._private_bucket(id) from pgconductor._private_executions")
    assert {handle.id: bucket_of(handle.id) for handle in handles} == dict(found)
