"""Cancelling from a program: what becomes of each state, who is told, and what a lost reply does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import trio
from client.database import execute, live, rows, value
from client.test_results import NEVER, conductor_that, finished, until_listening
from client.test_sync_client import LISTENING, client_that
from client.test_sync_client import until as until_sync
from client.worker_by_hand import WorkerByHand, open_worker

from pgconductor import (
    CancelCounts,
    Cancellation,
    Conductor,
    ExecutionCancelled,
    ExecutionFailed,
    InvalidOption,
    NotOpen,
    Orchestrator,
    State,
    TrioConnection,
    Unavailable,
)
from pgconductor.db.execute import run_sync
from pgconductor.model import Outcome
from pgconductor.testing.proxy import open_chaos_proxy

CANCELLED, REQUESTED, FINISHED, UNKNOWN = Cancellation


async def echo(value: int) -> Any:
    return value


def _one_of_each(dsn: str, worker: WorkerByHand) -> dict[str, UUID]:
    """An execution in each state, by the state's name."""
    task = Conductor(dsn).task(echo)
    with Conductor(dsn).sync() as client:
        ids = {
            state: client.invoke("echo", {"value": 1}).id for state in ("completed", "failed", "cancelled", "running")
        }
        for claimed in worker.claim():
            if claimed.id == ids["completed"]:
                worker.complete(claimed, 5)
            elif claimed.id == ids["failed"]:
                worker.fail(claimed, type="ValueError", message="no")
            elif claimed.id == ids["cancelled"]:
                outcome = Outcome(claimed.id, claimed.claim_no, "cancelled")
                assert run_sync(worker.conn, worker.calls.flush(worker.owner, [outcome])) == {}
        for state in ("ready", "waiting"):
            ids[state] = client.invoke(task.name, {"value": 2}).id
        ids["scheduled"] = client.invoke(task.name, {"value": 3}, delay=3600).id
    execute(
        dsn,
        "update pgconductor._private_executions set state = 'waiting', run_at = null"
        f" where id = '{ids['waiting']}' and state = 'ready'",
    )
    found = rows(dsn, "select state::text, id from pgconductor.executions")
    assert dict(found) == ids
    return ids


WHAT_BECOMES = {
    "scheduled": (CANCELLED, "cancelled", "tired"),
    "ready": (CANCELLED, "cancelled", "tired"),
    "waiting": (CANCELLED, "cancelled", "tired"),
    "running": (REQUESTED, "running", "tired"),
    "completed": (FINISHED, "completed", None),
    "failed": (FINISHED, "failed", None),
    "cancelled": (FINISHED, "cancelled", None),
}


def _becomes(dsn: str) -> dict[UUID, tuple[str, str | None]]:
    found = rows(
        dsn,
        "select id, state::text, cancel_reason from pgconductor._private_executions"
        " union all select id, state::text, cancel_reason from pgconductor._private_finished",
    )
    return {id: (state, reason) for id, state, reason in found}


@pytest.mark.parametrize("is_sync", [False, True], ids=["trio", "sync"])
async def test_every_state_is_answered_and_becomes_what_it_should(pgconductor_dsn: str, is_sync: bool) -> None:
    """A finished one cancelled after the fact, a running one ended under its worker, or an answer that is another's."""
    stranger = uuid4()
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        ids = _one_of_each(pgconductor_dsn, worker)
        conductor = Conductor(pgconductor_dsn)
        for is_repeated in (False, True):
            if is_sync:
                with conductor.sync() as client:
                    answers = client.cancel(*ids.values(), stranger, *ids.values(), reason="tired")
            else:
                async with conductor:
                    answers = await conductor.cancel(*ids.values(), stranger, *ids.values(), reason="tired")
            assert answers.pop(stranger) is UNKNOWN
            expected = {state: answer for state, (answer, _, _) in WHAT_BECOMES.items()}
            if is_repeated:
                expected |= dict.fromkeys(("scheduled", "ready", "waiting"), FINISHED)
            assert {state: answers[id] for state, id in ids.items()} == expected
            assert _becomes(pgconductor_dsn) == {
                ids[state]: (became, reason) for state, (_, became, reason) in WHAT_BECOMES.items()
            }


async def test_handle_cancels_and_result_tells_the_reason(pgconductor_dsn: str) -> None:
    """A caller who cannot tell cancelled from failed, or why."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    async with conductor:
        handle, silent = await task.invoke(1), await task.options(delay=60).invoke(2)
        assert await handle.cancel("no\nmoney") is CANCELLED
        assert await handle.cancel("other") is FINISHED
        assert await silent.cancel() is CANCELLED
        with pytest.raises(ExecutionCancelled, match=r"of task 'echo' was cancelled: no.*money") as cancelled:
            await handle.result()
        assert cancelled.value.reason == "no\nmoney"
        assert "\n" not in str(cancelled.value)
        with pytest.raises(ExecutionCancelled, match=r"was cancelled$") as cancelled:
            await silent.result(timeout=0)
        assert cancelled.value.reason is None
    with conductor.sync() as client:
        sync = client.invoke(task, 1)
        assert sync.cancel("x") is CANCELLED
        with pytest.raises(ExecutionCancelled, match="was cancelled: x"):
            sync.result()
    assert live(pgconductor_dsn) == 0


async def test_waiter_hears_of_the_cancellation_by_notification(pgconductor_dsn: str) -> None:
    """Whoever waits learns of it a poll late: 5 seconds, here never."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    async with conductor, trio.open_nursery() as nursery:
        handle = await task.invoke(1)

        async def wait() -> None:
            with pytest.raises(ExecutionCancelled, match="tired"):
                await finished(handle)

        nursery.start_soon(wait)
        await until_listening(conductor, handle.id)
        assert await handle.cancel("tired") is CANCELLED


@pytest.mark.parametrize("is_matching", [False, True])
def test_blocked_waiter_hears_of_the_cancellation_by_notification(pgconductor_dsn: str, is_matching: bool) -> None:
    """The same without a loop, and for a cancellation by filter."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with client_that(conductor, NEVER) as client, conductor.sync() as other:
        handle = client.invoke(task, 1)
        endings: list[str] = []

        def wait() -> None:
            try:
                handle.result(20)
            except ExecutionCancelled as error:
                endings.append(str(error.reason))

        thread = threading.Thread(target=wait)
        thread.start()
        until_sync(lambda: value(pgconductor_dsn, LISTENING) == 2)
        until_sync(lambda: _idle_listeners(pgconductor_dsn) == 1)
        if is_matching:
            assert other.cancel_matching(task="echo", reason="tired") == (1, 0)
        else:
            assert other.cancel(handle, reason="tired") == {handle.id: CANCELLED}
        thread.join(10)
        assert endings == ["tired"]


def _idle_listeners(dsn: str) -> int:
    """Those who have raised their flags, and whose client's connection has looked since."""
    return int(
        value(
            dsn,
            "select count(*) from pg_stat_activity l join pg_stat_activity c using (datname)"
            " where l.application_name = 'pgconductor results' and l.state = 'idle' and c.state = 'idle'"
            " and strpos(l.query, 'pg_advisory_lock') > 0 and strpos(c.query, '.standing(') > 0"
            " and c.pid <> pg_backend_pid() and c.query_start > l.state_change",
        )
    )


@pytest.mark.parametrize("kind", ["completed", "failed", "released", "retried", "cancelled"])
async def test_running_one_ends_as_its_worker_says_or_as_cancelled(pgconductor_dsn: str, kind: str) -> None:
    """A result that is thrown away, or an execution that runs again although it was cancelled; both with a waiter."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    task = conductor.task(echo)
    endings: dict[str, type[Exception] | None] = {"completed": None, "failed": ExecutionFailed}
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor, trio.open_nursery() as nursery:
            handle = await task.invoke(1)
            (claimed,) = worker.claim()
            assert await handle.cancel("tired") is REQUESTED
            assert await handle.cancel("again") is REQUESTED

            async def wait() -> None:
                if (ending := endings.get(kind, ExecutionCancelled)) is None:
                    assert await finished(handle) == 7
                    return
                with pytest.raises(ending) as ended:
                    await finished(handle)
                if isinstance(ended.value, ExecutionCancelled):
                    assert ended.value.reason == "tired"

            nursery.start_soon(wait)
            await until_listening(conductor, handle.id)
            result = "7" if kind == "completed" else None
            outcome = Outcome(handle.id, claimed.claim_no, kind, result, '{"type": "E"}' if kind == "failed" else None)
            assert run_sync(worker.conn, worker.calls.flush(worker.owner, [outcome])) == {}


async def test_thousand_at_once_and_ten_thousand_at_most(pgconductor_dsn: str) -> None:
    """A statement per execution, or one that holds locks on a million rows."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    async with conductor:
        handles = await task.invoke_many(task.bind(n) for n in range(1000))
        assert await conductor.cancel(*handles) == {handle.id: CANCELLED for handle in handles}
        assert await conductor.cancel() == {}
        with pytest.raises(InvalidOption, match="at most 10,000"):
            await conductor.cancel(*(uuid4() for _ in range(10_001)))
    assert live(pgconductor_dsn) == 0


async def test_lost_reply_is_asked_for_again(pgconductor_dsn: str) -> None:
    """An error where asking again is harmless; or a caller who believes that nothing was cancelled."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        task = conductor.task(echo)
        async with conductor:
            handle, _ = await task.invoke_many([task.bind(1), task.bind(2)])
            proxy.cut_reply(b"/*cancel*/")
            assert await handle.cancel() in (CANCELLED, FINISHED)
            proxy.cut_reply(b"cancel_matching")
            assert await conductor.cancel_matching(queue="default") == (0, 0)  # it was cancelled before the reply went
            with conductor.sync() as client:
                handle = await task.invoke(3)
                await trio.to_thread.run_sync(client.queue_status)
                proxy.cut_reply(b"/*cancel*/")
                assert await trio.to_thread.run_sync(client.cancel, handle) == {handle.id: FINISHED}
    assert live(pgconductor_dsn) == 0


async def test_cancellation_belongs_to_the_callers_transaction(pgconductor_dsn: str) -> None:
    """Cancelled although the caller rolled back."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    async with conductor:
        handle = await task.invoke(1)
        async with await TrioConnection.connect(pgconductor_dsn) as conn:
            assert await conductor.cancel(handle, conn=conn) == {handle.id: CANCELLED}
            await conn.rollback()
            assert live(pgconductor_dsn) == 1
            await conductor.cancel(handle, conn=conn)
            await conn.commit()
    assert live(pgconductor_dsn) == 0
    with conductor.sync() as client, psycopg.connect(pgconductor_dsn) as sync_conn:
        sync = client.invoke(task, 1)
        client.cancel(sync, conn=sync_conn)
        sync_conn.rollback()
        assert live(pgconductor_dsn) == 1
        client.cancel(sync.id, conn=sync_conn)
        sync_conn.commit()
        with pytest.raises(InvalidOption, match=r"must be a psycopg\.Connection here"):
            client.cancel(sync, conn=3)  # type: ignore[arg-type]
    assert live(pgconductor_dsn) == 0


def test_handle_made_on_the_callers_connection_cancels_with_an_open_client(pgconductor_dsn: str) -> None:
    """A handle that can only wait."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with psycopg.connect(pgconductor_dsn) as conn:
        handle = task.options(conn=conn).invoke(1)
    for method in (handle.cancel, handle.errors):
        with pytest.raises(NotOpen, match=r"with conductor\.sync\(\)"):
            method()
    with conductor.sync():
        assert handle.errors() == []
        assert handle.cancel() is CANCELLED


async def test_handler_is_interrupted_and_the_waiter_told_long_before_a_heartbeat(pgconductor_dsn: str) -> None:
    """From the handle to the handler and back: by notifications, not by the 15 seconds of a heartbeat."""
    conductor = conductor_that(pgconductor_dsn, NEVER)
    started, cleaned_up = trio.Event(), trio.Event()

    @conductor.task(max_attempts=5)
    async def nap() -> None:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await trio.lowlevel.checkpoint()
                cleaned_up.set()

    orchestrator = Orchestrator(conductor, tasks=[nap], lease=600)
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        handle = await nap.invoke()
        await started.wait()
        with trio.fail_after(5):
            assert await handle.cancel("tired") is REQUESTED
            with pytest.raises(ExecutionCancelled, match="tired"):
                await handle.result()
        assert cleaned_up.is_set()
        assert await handle.cancel() is FINISHED
        orchestrator.stop()
    assert live(pgconductor_dsn) == 0


# --- by filter ---

NOW = datetime.now(UTC)


def _invoke_all(dsn: str) -> None:
    """Ready and scheduled ones of two tasks on two queues, some with tags, one of yesterday."""
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "select pgconductor.invoke(task, queue => queue, tags => tags, delay => delay) from (values"
            " ('a', 'one', array['x', 'y'], null::interval), ('a', 'one', array['x'], '1 hour'),"
            " ('b', 'one', null, null), ('b', 'two', null, '1 hour'), ('b', 'two', array['y'], null))"
            " as v (task, queue, tags, delay)"
        )
        conn.execute(
            "update pgconductor._private_executions set created_at = created_at - interval '1 day'"
            " where task = 'b' and queue = 'two' and state = 'ready'"
        )


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"queue": "one"}, 3),
        ({"task": "b"}, 3),
        ({"queue": "one", "task": "b"}, 1),
        ({"states": "scheduled"}, 2),
        ({"states": [State.READY, "scheduled"]}, 5),
        ({"tags": ["x"]}, 2),
        ({"tags": ["y", "x"]}, 1),
        ({"created_before": NOW}, 1),
        ({"queue": "three"}, 0),
        ({"everything": True}, 5),
        ({"everything": True, "limit": 2}, 2),
    ],
)
async def test_all_that_fit_are_cancelled_and_no_others(
    pgconductor_dsn: str, filters: dict[str, Any], count: int
) -> None:
    """One filter too few takes what nobody meant."""
    _invoke_all(pgconductor_dsn)
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        assert await conductor.cancel_matching(**filters, reason="tidy") == CancelCounts(count, 0)
    assert live(pgconductor_dsn) == 5 - count
    reasons = rows(pgconductor_dsn, "select cancel_reason from pgconductor._private_finished")
    assert reasons == [("tidy",)] * count


def test_more_than_a_statement_takes_are_cancelled_in_chunks(pgconductor_dsn: str) -> None:
    """The first thousand, and the rest runs."""
    with psycopg.connect(pgconductor_dsn) as conn:
        conn.execute("select pgconductor.invoke('echo') from generate_series(1, 2500)")
    with open_worker(pgconductor_dsn, ["echo"]) as worker, Conductor(pgconductor_dsn).sync() as client:
        assert len(worker.claim(5)) == 5
        counts = [client.cancel_matching(queue="default", limit=limit) for limit in (1001, 1002, None, None)]
        assert [sum(each) for each in counts] == [1001, 1002, 497, 0]
        assert sum(each.requested for each in counts) == 5
    states = "select state::text, count(*) from pgconductor.executions group by 1"
    assert dict(rows(pgconductor_dsn, states)) == {"cancelled": 2495, "running": 5}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "everything=True"),
        ({"limit": 5}, "everything=True"),
        ({"everything": True, "queue": "a"}, "not both"),
        ({"states": "completed"}, "one of scheduled, ready, running, waiting"),
        ({"states": ["rdy"]}, "one of scheduled, ready, running, waiting"),
        ({"states": []}, "states must not be empty"),
        ({"tags": "x"}, "tags must be several texts"),
        ({"tags": []}, "tags must not be empty"),
        ({"queue": ""}, "queue must not be empty"),
        ({"task": "x" * 129}, "129 bytes"),
        ({"created_before": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001 - that is the point
        ({"everything": True, "limit": 0}, "limit must be from 1"),
        ({"everything": True, "reason": "ä" * 501}, "reason is 1002 bytes"),
        ({"everything": True, "reason": "a\0"}, "NUL"),
    ],
)
async def test_filter_that_is_wrong_cancels_nothing(pgconductor_dsn: str, wrong: dict[str, Any], said: str) -> None:
    """A typing error that takes everything."""
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        await conductor.invoke("echo")
        with pytest.raises(InvalidOption, match=said):
            await conductor.cancel_matching(**wrong)
    with conductor.sync() as client, pytest.raises(InvalidOption, match=said):
        client.cancel_matching(**wrong)
    assert live(pgconductor_dsn) == 1


@pytest.mark.parametrize(
    ("executions", "reason", "said"),
    [
        (["not an id"], None, "takes handles and ids"),
        ([uuid4()], "", "reason must not be empty"),
        ([uuid4()], "x" * 1001, "1001 bytes"),
        ([uuid4()], 5, "reason must be a str"),
    ],
)
async def test_cancel_refuses_what_is_no_id_or_reason(executions: list[Any], reason: Any, said: str) -> None:
    """An error from the driver, or a reason that is cut."""
    conductor = Conductor("postgresql://127.0.0.1:1/nothing")
    async with conductor:
        with pytest.raises(InvalidOption, match=said):
            await conductor.cancel(*executions, reason=reason)
        with pytest.raises(Unavailable):
            await conductor.cancel(uuid4(), reason="x" * 1000)


# --- errors of attempts ---


async def test_errors_of_all_attempts_are_told_oldest_first(pgconductor_dsn: str) -> None:
    """Only the last error is seen, and the first one was the cause."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await task.invoke(1)
            assert await handle.errors() == []
            (claimed,) = worker.claim()
            retried = Outcome(claimed.id, claimed.claim_no, "retried", error='{"type": "A", "message": "first"}')
            assert run_sync(worker.conn, worker.calls.flush(worker.owner, [retried])) == {}
            (first,) = await handle.errors()
            assert (first.type, first.message, first.traceback, first.attempt) == ("A", "first", "", 1)
            assert first.at is not None
            assert abs(datetime.now(UTC) - first.at) < timedelta(minutes=1)
            (claimed,) = worker.claim()
            worker.fail(claimed, type="B", message="last", traceback="Traceback ...")
            errors = await handle.errors()
            assert [(e.type, e.message, e.attempt) for e in errors] == [("A", "first", 1), ("B", "last", 2)]
            assert await conductor.execution_errors(uuid4()) == []
        with conductor.sync() as client:
            assert client.execution_errors(handle.id) == errors


def test_conductor_is_redirected_before_it_is_opened(pgconductor_dsn: str) -> None:
    """A program that runs half on one database and half on another."""

    async def main(conductor: Conductor, then: Callable[[], None]) -> None:
        async with conductor:
            then()
            await conductor.invoke("echo")

    conductor = Conductor("postgresql://127.0.0.1:1/nothing", schema="other")

    def redirect() -> None:
        conductor.redirect(schema="third")

    conductor.redirect(dsn=pgconductor_dsn, schema="pgconductor")
    trio.run(main, conductor, lambda: None)
    assert live(pgconductor_dsn) == 1
    with pytest.raises(InvalidOption, match="not both"):
        conductor.redirect(dsn="x=y", embedded=True)
    with pytest.raises(Exception, match="before it is opened"):
        trio.run(main, conductor, redirect)
    assert conductor.schema == "pgconductor"
