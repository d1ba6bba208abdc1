"""The client without an event loop: the same verbs, from any thread, in any program."""

from __future__ import annotations

import asyncio  # noqa: TID251 - programs on asyncio are users too
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from client.database import execute, live, rows, sleeping_worker, value, wakeups
from client.worker_by_hand import open_worker

from pgconductor import (
    Conductor,
    ExecutionFailed,
    InvalidOption,
    InvalidTask,
    Misuse,
    NotOpen,
    ResultNotKept,
    SyncClient,
    Unavailable,
    WaitTimeout,
)
from pgconductor.polling import PollSchedule
from pgconductor.testing.proxy import open_chaos_proxy

NEVER = PollSchedule(first=(), every=3600.0, deaf=3600.0)
LISTENING = (
    "select count(*) from pg_locks l join pg_stat_activity a using (pid)"
    " where l.locktype = 'advisory' and l.granted and a.datname = current_database()"
    " and a.application_name = 'pgconductor results'"
)
END_ALL = (
    "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
    " where datname = current_database() and pid <> pg_backend_pid() and application_name <> 'by hand'"
)


def echo(value: int) -> Any:
    return value


def until(is_so: Callable[[], bool]) -> None:
    """Wait until something that no event announces is so."""
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def client_that(conductor: Conductor, schedule: PollSchedule) -> SyncClient:
    """A client with its own idea of when to look without a notification."""
    client = conductor.sync()
    client._schedule = schedule
    return client


def test_tasks_names_and_batches_are_invoked(pgconductor_dsn: str) -> None:
    """A form that works on Trio only, or options that are lost."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(queue="fast")(echo)
    with conductor.sync() as client:
        one = client.invoke(task, 1)
        keyed = client.invoke(task.options(priority=5, dedupe_key="k"), value=2)
        again = client.invoke(task.options(dedupe_key="k"), value=3)
        named = client.invoke("elsewhere", {"a": 1}, queue="far", priority=-1)
        many = client.invoke_many(task.options(priority=9), (task.bind(n) for n in range(3)))
        assert client.invoke_many(task, []) == []
        assert (keyed.id, keyed.created, again.created) == (again.id, True, False)
        assert [(status.queue, status.ready) for status in client.queue_status()] == [("far", 1), ("fast", 5)]
        assert client.orchestrator_status() == []
    found = {
        id: found
        for id, *found in rows(
            pgconductor_dsn, "select id, queue, task, priority, payload from pgconductor._private_executions"
        )
    }
    assert found == {
        one.id: ["fast", "echo", 0, {"value": 1}],
        keyed.id: ["fast", "echo", 5, {"value": 2}],
        named.id: ["far", "elsewhere", -1, {"a": 1}],
        **{handle.id: ["fast", "echo", 9, {"value": n}] for n, handle in enumerate(many)},
    }


def test_misused_client_names_the_remedy(pgconductor_dsn: str) -> None:
    """An option that is silently ignored: a transactional invoke that is not."""
    conductor, other = Conductor(pgconductor_dsn), Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    other_task = other.task(name="other")(echo)
    client = conductor.sync()
    with pytest.raises(NotOpen, match=r"with conductor\.sync\(\)"):
        client.invoke(task, 1)
    with client, psycopg.connect(pgconductor_dsn) as conn:
        with pytest.raises(Misuse, match="open already"):
            client.__enter__()
        with pytest.raises(Misuse, match=r"has its own invoke\(\)"):
            client.invoke(task.options(conn=conn), 1)  # type: ignore[call-overload]
        asynchronous = psycopg.AsyncConnection(conn.pgconn)
        with pytest.raises(Misuse, match="asynchronous connection"):
            client.invoke(task.options(conn=asynchronous), 1)
        with pytest.raises(Misuse, match="another conductor"):
            client.invoke(other_task, 1)
        with pytest.raises(InvalidTask, match="one invoke_many per task"):
            client.invoke_many(task, [other_task.bind(1)])
        with pytest.raises(InvalidOption, match="not function"):
            client.invoke(echo, 1)  # type: ignore[call-overload]
        with pytest.raises(InvalidOption, match="at most 10,000"):
            client.invoke_many(task, [task.bind(1)] * 10_001)
    assert live(pgconductor_dsn) == 0


def test_name_on_the_callers_connection_is_in_its_transaction(pgconductor_dsn: str) -> None:
    """A commit of its own."""
    with sleeping_worker(pgconductor_dsn) as sleeper, Conductor(pgconductor_dsn).sync() as client:
        with psycopg.connect(pgconductor_dsn) as conn:
            client.invoke("elsewhere", {}, conn=conn)
            conn.rollback()
            assert (live(pgconductor_dsn), wakeups(sleeper)) == (0, 0)
            client.invoke("elsewhere", {}, conn=conn)
            conn.commit()
        assert (live(pgconductor_dsn), wakeups(sleeper)) == (1, 1)


def test_result_arrives_by_notification(pgconductor_dsn: str) -> None:
    """Every result a poll late; twice, so that the connection that rested is used again."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with (
        open_worker(pgconductor_dsn, ["echo"]) as worker,
        ThreadPoolExecutor(1) as threads,
        client_that(conductor, NEVER) as client,
    ):
        pids: set[int] = set()
        for n in range(2):
            handle = client.invoke(task, n)
            result = threads.submit(handle.result, 20)
            until(lambda: value(pgconductor_dsn, LISTENING) == 2)
            worker.finish_all({"n": n})
            assert result.result(10) == {"n": n}
            assert value(pgconductor_dsn, LISTENING) == 0
            assert client._resting is not None
            pids.add(client._resting.backend_pid)
        assert len(pids) == 1


def test_closed_client_waits_no_more(pgconductor_dsn: str) -> None:
    """A connection opened after the block, which nobody closes."""
    conductor = Conductor(pgconductor_dsn)
    with conductor.sync() as client:
        handle = client.invoke("elsewhere")
    with pytest.raises(NotOpen):
        handle.result()
    with pytest.raises(NotOpen):
        client.queue_status()


def test_result_arrives_without_any_notification(pgconductor_dsn: str) -> None:
    """A lost notification that costs more than a poll."""
    execute(
        pgconductor_dsn,
        "create or replace function pgconductor._private_notify_results(p_ids uuid[]) returns void"
        " language sql as $$ $$",
    )
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with (
        open_worker(pgconductor_dsn, ["echo"]) as worker,
        ThreadPoolExecutor(1) as threads,
        client_that(conductor, PollSchedule(first=(0.05,), every=0.1)) as client,
    ):
        handle = client.invoke(task, 1)
        result = threads.submit(handle.result, 20)
        until(lambda: value(pgconductor_dsn, LISTENING) == 2)
        worker.finish_all(5)
        assert result.result(10) == 5


def test_killed_listener_is_replaced(pgconductor_dsn: str) -> None:
    """A thread deaf for ever after its session was ended."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    listeners = (
        "select pid from pg_stat_activity"
        " where datname = current_database() and application_name = 'pgconductor results'"
    )
    with (
        open_worker(pgconductor_dsn, ["echo"]) as worker,
        ThreadPoolExecutor(1) as threads,
        client_that(conductor, PollSchedule(first=(), every=3600.0, deaf=0.05)) as client,
    ):
        handle = client.invoke(task, 1)
        result = threads.submit(handle.result, 20)
        until(lambda: value(pgconductor_dsn, LISTENING) == 2)
        pid = value(pgconductor_dsn, listeners)
        assert value(pgconductor_dsn, "select pg_terminate_backend(%s, 5000)", pid)
        until(lambda: rows(pgconductor_dsn, listeners) not in ([], [(pid,)]))
        until(lambda: value(pgconductor_dsn, LISTENING) == 2)
        worker.finish_all(6)
        assert result.result(10) == 6


def test_threads_share_a_client_while_others_wait(pgconductor_dsn: str) -> None:
    """A connection used by two threads at once, or an invoke that waits for somebody's result."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with (
        open_worker(pgconductor_dsn, ["echo"]) as worker,
        ThreadPoolExecutor(8) as threads,
        client_that(conductor, NEVER) as client,
    ):
        handles = [client.invoke(task, n) for n in range(4)]
        results = [threads.submit(handle.result, 20) for handle in handles]
        until(lambda: value(pgconductor_dsn, LISTENING) == 8)
        invoked = [threads.submit(client.invoke, task, n) for n in range(50)]
        assert len({each.result().id for each in invoked}) == 50
        worker.finish_all("done")
        assert [result.result(10) for result in results] == ["done"] * 4
        until(lambda: value(pgconductor_dsn, LISTENING) == 0)


def test_handle_made_on_the_callers_connection_waits_with_an_open_client(pgconductor_dsn: str) -> None:
    """A handle that cannot be waited for, or that opens connections nobody closes."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker, psycopg.connect(pgconductor_dsn) as conn:
        handle = task.options(conn=conn).invoke(1)
        conn.commit()
        with pytest.raises(NotOpen, match=r"with conductor\.sync\(\)"):
            handle.result()
        worker.finish_all(3)
        with conductor.sync(), conductor.sync():
            assert handle.result(timeout=0) == 3


def test_endings_are_those_of_the_trio_client(pgconductor_dsn: str) -> None:
    """An outcome that only one of the clients tells."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with open_worker(pgconductor_dsn, ["echo"]) as worker, conductor.sync() as client:
        failed, gone = client.invoke(task, 1), client.invoke(task, 2)
        claimed = {c.id: c for c in worker.claim()}
        with pytest.raises(WaitTimeout, match=r"within 0\.05 s: running"):
            failed.result(timeout=0.05)
        worker.fail(claimed[failed.id], type="ValueError", message="no")
        worker.complete(claimed[gone.id], keep=0.0)
        with pytest.raises(ExecutionFailed, match="ValueError: no"):
            failed.result()
        for timeout in (None, 20, 0):
            with pytest.raises(ResultNotKept):
                gone.result(timeout)


def test_client_works_where_asyncio_runs(pgconductor_dsn: str) -> None:
    """A client that minds the loop around it."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)

    async def produce() -> None:
        with conductor.sync() as client:
            client.invoke(task, 1)
            await asyncio.to_thread(client.invoke, task, 2)

    asyncio.run(produce())
    assert live(pgconductor_dsn) == 2


def test_connection_that_broke_while_idle_is_replaced(pgconductor_dsn: str) -> None:
    """An error for the first call after each restart of the server."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with conductor.sync() as client:
        client.invoke(task, 1)
        assert rows(pgconductor_dsn, END_ALL) == [(True,)]
        client.invoke(task, 2)
    assert live(pgconductor_dsn) == 2


async def test_lost_reply_is_repeated_only_with_a_key(pgconductor_dsn: str) -> None:
    """Executions doubled in silence, or an error where asking again is harmless."""
    import trio

    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        task = conductor.task(echo)
        with conductor.sync() as client:
            await trio.to_thread.run_sync(client.queue_status)
            proxy.cut_reply(b"invoke_many")
            with pytest.raises(Unavailable, match="may have taken effect or not"):
                await trio.to_thread.run_sync(lambda: client.invoke(task, 1))
            proxy.cut_reply(b"invoke_many")
            handle = await trio.to_thread.run_sync(lambda: client.invoke(task.options(dedupe_key="k"), 2))
    ids = rows(pgconductor_dsn, "select id from pgconductor._private_executions where dedupe_key = 'k'")
    assert ids == [(handle.id,)]
    assert live(pgconductor_dsn) == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_process_is_told_to_open_its_own(pgconductor_dsn: str) -> None:
    """Two processes on one socket, each reading the other's replies."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        try:
            client.invoke(task, 2)
        except Misuse as error:
            said = str(error)
        else:
            said = "no error"
        with conductor.sync() as own:
            own.invoke(task, 3)
        theirs.send(said)
        os._exit(0)

    with conductor.sync() as client:
        client.invoke(task, 1)
        process = context.Process(target=child)
        process.start()
        assert ours.poll(20)
        assert "forked; open one in each process" in ours.recv()
        process.join()
        client.invoke(task, 4)
    assert live(pgconductor_dsn) == 3


def test_schema_is_installed(pgconductor_empty_dsn: str) -> None:
    """A program without Trio that has to call another to migrate."""
    with Conductor(pgconductor_empty_dsn).sync() as client:
        assert client.migrate().applied
        assert client.migrate().applied == ()
        client.invoke("elsewhere")
    assert live(pgconductor_empty_dsn) == 1


def test_interrupted_wait_leaves_nothing(pgconductor_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags that stay up after Ctrl-C, held by a connection nobody will use."""
    from pgconductor.db.result_listener import SyncResultListener

    def interrupt(listener: SyncResultListener, timeout: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(SyncResultListener, "receive", interrupt)
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(echo)
    with conductor.sync() as client:
        handle = client.invoke(task, 1)
        with pytest.raises(KeyboardInterrupt):
            handle.result()
        until(lambda: value(pgconductor_dsn, LISTENING) == 0)
        client.invoke(task, 2)
