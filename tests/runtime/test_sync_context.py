"""Durable operations of plain `def` handlers: they block a thread, and a wait unwinds it."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import psycopg
import pytest
import trio

from pgconductor import (
    Cancellation,
    ChildFailed,
    Conductor,
    Context,
    DurableMisuse,
    ExecutionCancelled,
    ExecutionFailed,
    NonDeterminism,
    Orchestrator,
    StepFailed,
    Task,
    TrioConnection,
    Unwinding,
)
from pgconductor.model import State

Conn = psycopg.Connection[tuple[Any, ...]]
Query = Callable[..., list[tuple[Any, ...]]]

LIMIT = 30.0


@pytest.fixture(autouse=True)
def ledger(query: Query) -> None:
    """The user's own table."""
    query("create table ledger (id bigint generated always as identity, what text unique)")


def written(query: Query) -> list[str]:
    return [what for (what,) in query("select what from ledger order by id")]


def write(conn: Conn, what: str) -> int:
    row = conn.execute("insert into ledger (what) values (%s) returning id", [what]).fetchone()
    assert row is not None
    return int(row[0])


async def run_to_end(conductor: Conductor, *tasks: Task[..., Any]) -> None:
    """Run until nothing is left to do: sleeps of up to a minute are waited for."""
    with trio.fail_after(LIMIT):
        await Orchestrator(conductor, tasks=tasks).drain(60.0)


@contextmanager
def unwound(notes: list[str]) -> Iterator[None]:
    """Note how a handler's thread is left."""
    try:
        yield
    except Unwinding:
        notes.append("unwound")
        raise
    else:
        notes.append("returned")


async def test_steps_sleeps_and_children_across_suspensions(conductor: Conductor, query: Query) -> None:
    """A thread cannot be kept for years: it has to be unwound at each wait, and nothing may be done twice."""
    threads: list[int] = []
    notes: list[str] = []

    @conductor.task
    def double(n: int) -> int:
        return 2 * n

    def load(n: int) -> int:
        threads.append(threading.get_ident())
        return n + 1

    @conductor.task
    def order(ctx: Context, n: int) -> list[Any]:
        here = threading.get_ident()
        with unwound(notes):
            sync = ctx.sync
            loaded = sync.step("load", load, n)
            at, key, chance = sync.now(), sync.uuid(), sync.random()
            sync.sleep("settle", 0.3)
            doubled = sync.invoke("double", double, loaded)
            sync.sleep_until("past", datetime(2020, 1, 1, tzinfo=UTC))
            sync.checkpoint()
            after = sync.step("after", functools.partial(load, n=doubled))
            assert threads[-1] == here, "a step runs in the thread of its handler"
            return [loaded, doubled, after, str(at), str(key), chance]

    async with conductor:
        handle = await order.invoke(1)
        await run_to_end(conductor, order, double)
        loaded, doubled, after, *_ = await handle.result(timeout=0)
    assert (loaded, doubled, after) == (2, 4, 5)
    assert len(threads) == 2, "each step ran once"
    assert notes[-1] == "returned"
    assert set(notes[:-1]) == {"unwound"}, "the sleep was long enough to be given up"
    assert query("select attempt, state::text from pgconductor._private_finished where task = 'order'") == [
        (1, "completed")
    ]


async def test_failures_are_raised_in_the_thread_and_replayed(conductor: Conductor) -> None:
    """Typed and catchable as in an async handler, the same each time."""
    seen: list[tuple[str, str]] = []

    @conductor.task(max_attempts=1)
    def broken() -> None:
        raise ValueError("child")

    def fails() -> None:
        raise OSError("step")

    @conductor.task
    def order(ctx: Context) -> None:
        with pytest.raises(StepFailed) as step:
            ctx.sync.step("fails", fails, retry=2)
        with pytest.raises(ChildFailed) as child:
            ctx.sync.invoke("broken", broken)
        seen.append((step.value.error["type"], child.value.error["type"]))
        ctx.sync.sleep("settle", 0.3)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order, broken)
        await handle.result(timeout=0)
    assert seen == [("OSError", "ValueError")] * 2


async def test_except_exception_does_not_keep_a_thread_and_a_bare_except_is_ignored(
    conductor: Conductor, caplog: pytest.LogCaptureFixture
) -> None:
    """`except Exception` is everywhere, and must not eat a suspension; who eats it all the same is not heard."""
    runs: list[str] = []

    @conductor.task
    def polite(ctx: Context) -> str:
        try:
            ctx.sync.sleep("settle", 0.3)
        except Exception:  # noqa: BLE001  # what is tested
            return "eaten"
        return "slept"

    @conductor.task
    def rude(ctx: Context) -> str:
        runs.append("x")
        try:
            ctx.sync.sleep("settle", 0.3)
        except BaseException:  # noqa: BLE001  # what is tested
            with pytest.raises(Unwinding):
                ctx.sync.now()
            return "eaten"
        return "slept"

    async with conductor:
        handles = [await polite.invoke(), await rude.invoke()]
        await run_to_end(conductor, polite, rude)
        assert [await handle.result(timeout=0) for handle in handles] == ["slept", "slept"]
    assert len(runs) == 2
    assert "swallowed its cancellation" in caplog.text


async def test_cancellation_and_timeout_unwind_a_waiting_thread(conductor: Conductor, query: Query) -> None:
    """A thread that is blocked in an operation cannot look at ctx.is_cancelled."""
    started = trio.Event()
    token = trio.lowlevel.current_trio_token()

    @conductor.task
    def forever(ctx: Context) -> None:
        token.run_sync_soon(started.set)
        for n in range(10_000):  # short sleeps: never given up
            ctx.sync.step(f"nap {n}", time.sleep, 0.005)

    @conductor.task(max_attempts=1, timeout=0.3)
    def slow(ctx: Context) -> None:
        for n in range(10_000):
            ctx.sync.step(f"nap {n}", time.sleep, 0.005)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[forever, slow]).run)
        handle = await forever.invoke()
        late = await slow.invoke()
        with trio.fail_after(LIMIT):
            await started.wait()
            assert await handle.cancel() is Cancellation.REQUESTED
            with pytest.raises(ExecutionCancelled):
                await handle.result()
            with pytest.raises(ExecutionFailed) as failed:
                await late.result()
        assert failed.value.error["type"] == "timeout"
        nursery.cancel_scope.cancel()


async def test_stop_gives_a_waiting_thread_back_at_no_cost(conductor: Conductor, query: Query) -> None:
    """A deploy must not wait for, or charge, a handler that only waits."""
    started = trio.Event()
    token = trio.lowlevel.current_trio_token()

    @conductor.task
    def forever(ctx: Context) -> None:
        for n in range(10_000):
            ctx.sync.step(f"nap {n}", time.sleep, 0.005)
            token.run_sync_soon(started.set)

    @conductor.task
    def polite(ctx: Context) -> None:
        for n in range(10_000):
            ctx.sync.step(f"nap {n}", time.sleep, 0.005)
            ctx.sync.checkpoint()

    for task, grace in ((forever, 0.1), (polite, LIMIT)):
        async with conductor:
            orchestrator = Orchestrator(conductor, tasks=[task], grace=grace)
            async with trio.open_nursery() as nursery:
                await nursery.start(orchestrator.run)
                await task.invoke()
                with trio.fail_after(LIMIT):
                    await until_recorded(query, task.name)
                    orchestrator.stop()
        assert query("select state::text, attempt from pgconductor.executions where task = %s", task.name) == [
            (State.READY.value, 0)
        ]


async def until_recorded(query: Query, task: str) -> None:
    while not query(
        "select 1 from pgconductor._private_steps s join pgconductor._private_executions e on e.id = s.execution_id"
        " where e.task = %s limit 1",
        task,
    ):
        await trio.sleep(0.01)


async def test_function_of_a_transaction_writes_once(conductor: Conductor, query: Query) -> None:
    """The same as in an async handler, on a blocking connection, in the handler's thread."""
    calls: list[int] = []
    threads: list[int] = []

    @conductor.task
    def ship(n: int) -> None: ...

    def charge(conn: Conn, what: str) -> tuple[str, int]:
        assert isinstance(conn, psycopg.Connection)
        calls.append(threading.get_ident())
        ship.options(conn=conn).invoke(1)
        with conn.transaction():
            number = write(conn, what)
        return what, number

    @conductor.task
    def order(ctx: Context, what: str) -> tuple[str, int]:
        threads.append(threading.get_ident())
        value = ctx.sync.transaction("charge", charge, what)
        ctx.sync.sleep("settle", 0.3)
        return value

    async with conductor:
        handle = await order.invoke("a")
        await run_to_end(conductor, order, ship)
        assert await handle.result(timeout=0) == ("a", 1)
    assert len(threads) == 2, "the sleep was long enough to be given up"
    assert calls == threads[:1]
    assert written(query) == ["a"]
    assert query("select count(*) from pgconductor._private_finished where task = 'ship'") == [(1,)]


async def test_block_of_a_transaction_runs_again_and_is_told_what_it_was_told(
    conductor: Conductor, query: Query
) -> None:
    """As in an async handler."""
    seen: list[Any] = []

    @conductor.task
    def ship(n: int) -> None: ...

    @conductor.task
    def order(ctx: Context) -> None:
        with ctx.sync.transaction("charge") as conn:
            handle = ship.options(conn=conn).invoke(1)
            with conn.cursor() as cursor:
                cursor.executemany("insert into ledger (what) values (%s)", [["a"], ["b"]])
                count = cursor.rowcount
            rows = conn.execute("select what, gen_random_uuid(), clock_timestamp() from ledger order by 1").fetchall()
            with pytest.raises(psycopg.errors.UniqueViolation) as failed, conn.transaction():
                write(conn, "a")
            none = conn.execute("select 1 where false").fetchall()
            status = conn.execute("delete from ledger where what = 'b'").statusmessage
            seen.append((handle.id, count, rows, str(failed.value), none, status))
        ctx.sync.sleep("settle", 0.3)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order, ship)
        await handle.result(timeout=0)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert written(query) == ["a"]
    assert query("select count(*) from pgconductor._private_finished where task = 'ship'") == [(1,)]


async def test_errors_and_misuse_of_transactions_roll_back(conductor: Conductor, query: Query) -> None:
    """As in an async handler: refused by name, nothing written, nothing recorded but failures."""

    def fails(conn: Conn) -> None:
        write(conn, "x")
        raise ValueError("no funds")

    def commits(conn: Conn) -> None:
        write(conn, "x")
        conn.commit()

    def cheats(conn: Conn) -> None:
        conn.execute("rollback")

    async def coroutine(conn: Conn) -> None: ...

    @conductor.task
    def order(ctx: Context) -> None:
        sync = ctx.sync
        with pytest.raises(StepFailed, match="no funds"):
            sync.transaction("fails", fails)
        with pytest.raises(StepFailed, match="no funds"), sync.transaction("fails too") as conn:
            fails(conn)
        with pytest.raises(DurableMisuse, match=r"commit\(\) in"):
            sync.transaction("commits", commits)
        with pytest.raises(DurableMisuse, match=r"commit\(\) in"), sync.transaction("commits too") as conn:
            commits(conn)
        with pytest.raises(DurableMisuse, match="ended by a statement of its own"):
            sync.transaction("cheats", cheats)
        with pytest.raises(DurableMisuse, match="COPY"), sync.transaction("copies") as conn:
            conn.cursor().copy("copy ledger (what) from stdin")
        with pytest.raises(DurableMisuse, match="inside the step 'nested'"), sync.transaction("nested"):
            sync.now()
        with pytest.raises(DurableMisuse, match="inside the step 'step'"):
            sync.step("step", sync.now)
        with pytest.raises(DurableMisuse, match="needs a plain def"):
            cast(Any, sync).transaction("coroutine", coroutine)
        with pytest.raises(DurableMisuse, match="needs a plain def"):
            cast(Any, sync).step("coroutine", trio.sleep, 0)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        await handle.result(timeout=0)
    assert written(query) == []


async def test_block_whose_code_has_changed_is_not_told_lies(conductor: Conductor) -> None:
    """As in an async handler."""
    runs: list[str] = []

    @conductor.task(max_attempts=1)
    def order(ctx: Context) -> None:
        runs.append("x")
        try:
            with ctx.sync.transaction("charge") as conn:
                conn.execute("select 1" if len(runs) == 1 else "select 2")
        except NonDeterminism:
            runs.append("told")
            raise
        ctx.sync.sleep("settle", 0.3)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        with pytest.raises(ExecutionFailed, match="executes 'select 2' where 'select 1' is recorded"):
            await handle.result(timeout=0)
    assert runs == ["x", "x", "told"]


async def test_sync_is_for_the_thread_of_the_handler(conductor: Conductor) -> None:
    """From another thread two operations could be under way, in an order that no replay repeats."""
    told: list[str] = []

    @conductor.task
    def order(ctx: Context) -> None:
        def elsewhere() -> None:
            with pytest.raises(DurableMisuse, match="for no other"):
                ctx.sync.now()
            told.append("x")

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        await handle.result(timeout=0)
    assert told == ["x"]
    with pytest.raises(DurableMisuse, match="belongs to no execution"):
        Context(handle.id, 1, task="t", queue="q", resources={}).sync.now()


async def test_resources_are_there_inside_steps_of_both_kinds(conductor: Conductor) -> None:
    """A step's function needs the client or the pool that the lifespan opened, wherever it runs."""

    class Shop:
        name = "corner shop"

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[Shop]:
        yield Shop()

    @conductor.task
    async def order(ctx: Context) -> list[str]:
        async def asked() -> str:
            return ctx.resource(Shop).name

        async def charged(conn: TrioConnection[Any]) -> str:
            return ctx.resource(Shop).name

        def called() -> str:
            return ctx.resource(Shop).name

        return [
            await ctx.step("async", asked),
            await ctx.step("sync", called),
            await ctx.transaction("transaction", charged),
        ]

    @conductor.task
    def plain(ctx: Context) -> list[str]:
        def called() -> str:
            return ctx.resource(Shop).name

        def charged(conn: Conn) -> str:
            return ctx.resource(Shop).name

        return [ctx.sync.step("step", called), ctx.sync.transaction("transaction", charged)]

    async with conductor:
        handles = [await order.invoke(), await plain.invoke()]
        with trio.fail_after(LIMIT):
            await Orchestrator(conductor, tasks=[order, plain], resources=lifespan).drain()
        assert [await handle.result(timeout=0) for handle in handles] == [["corner shop"] * 3, ["corner shop"] * 2]


async def test_connections_for_threads_are_bounded_and_used_again(pgconductor_dsn: str, query: Query) -> None:
    """Each thread with a connection of its own would use up the server's."""
    conductor = Conductor(pgconductor_dsn, pool_size=2)
    pids: set[int] = set()

    def pid(conn: Conn) -> int:
        pids.add(conn.info.backend_pid)
        conn.execute("select pg_sleep(0.01)")
        return conn.info.backend_pid

    @conductor.task
    def order(ctx: Context) -> None:
        for n in range(3):
            ctx.sync.transaction(f"pid {n}", pid)

    async with conductor:
        handles = await order.invoke_many([order.bind() for _ in range(8)])
        await run_to_end(conductor, order)
        for handle in handles:
            await handle.result(timeout=0)
    assert 1 <= len(pids) <= 2
    with trio.fail_after(LIMIT):
        while query("select pid from pg_stat_activity where pid = any (%s)", list(pids)):
            await trio.sleep(0.01)


async def test_thread_that_is_left_behind_in_a_transaction_commits_nothing(conductor: Conductor, query: Query) -> None:
    """It runs on after its worker has gone: what it does then must not count."""
    started, released = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    ends: list[BaseException | None] = []

    def charge(conn: Conn) -> None:
        write(conn, "x")
        token.run_sync_soon(started.set)
        released.wait(LIMIT)
        try:
            conn.execute("select 1")
        except BaseException as error:
            ends.append(error)
            raise
        ends.append(None)

    @conductor.task
    def order(ctx: Context) -> None:
        ctx.sync.transaction("charge", charge)

    async with conductor:
        orchestrator = Orchestrator(conductor, tasks=[order], grace=0.0, cancel_grace=0.1)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(orchestrator.run)
                await order.invoke()
                await started.wait()
                orchestrator.stop()
            released.set()
            while not ends:
                await trio.sleep(0.01)
    assert isinstance(ends[0], (DurableMisuse, psycopg.OperationalError))
    assert written(query) == []
    assert query("select count(*) from pgconductor._private_steps") == [(0,)]


async def test_events_messages_and_promises_of_a_plain_function(conductor: Conductor) -> None:
    """A plain function can ask nobody, and hears of nothing."""

    @conductor.task
    def ask(ctx: Context) -> list[Any]:
        sync = ctx.sync
        promise = sync.promise("approval")
        sync.step("tell", lambda: sync.set_progress(str(promise.id)))
        said = promise.result(type=str)
        event = sync.wait_for_event("paid", match={"n": 1}, type=dict[str, int])
        message = sync.receive("note", "notes")
        sync.emit("done", "asked", {"n": 1})
        try:
            sync.wait_for_event("never", timeout=0.05)
        except TimeoutError:
            return [said, event["n"], message]
        return []

    async with conductor:
        await conductor.migrate()
        handle = await ask.invoke()
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                orchestrator = Orchestrator(conductor, tasks=[ask])
                await nursery.start(orchestrator.run)
                while (promise := await handle.progress()) is None:
                    await trio.sleep(0.02)
                assert await conductor.resolve_promise(UUID(promise), "yes") == "resolved"
                await conductor.emit("paid", {"n": 2})
                await conductor.emit("paid", {"n": 1})
                assert await handle.send("notes", "by hand")
                assert await handle.result() == ["yes", 1, "by hand"]
                orchestrator.stop()
