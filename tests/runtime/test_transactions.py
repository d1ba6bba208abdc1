"""Transactional steps with a real orchestrator: what the user wrote is there exactly if the step's record is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import psycopg
import pytest
import trio
from psycopg.rows import dict_row

from pgconductor import (
    Conductor,
    Context,
    DurableMisuse,
    ExecutionFailed,
    Handle,
    InvalidOption,
    Orchestrator,
    StepFailed,
    Task,
    TrioConnection,
)

Conn = TrioConnection[tuple[Any, ...]]
Query = Callable[..., list[tuple[Any, ...]]]

LIMIT = 30.0


@pytest.fixture(autouse=True)
def ledger(query: Query) -> None:
    """The user's own table."""
    query("create table ledger (id bigint generated always as identity, what text unique)")


def written(query: Query) -> list[str]:
    return [what for (what,) in query("select what from ledger order by id")]


def recorded(query: Query) -> list[tuple[Any, ...]]:
    """Names and kinds of the steps of all executions, live or finished."""
    return query(
        "select s.name, s.kind from pgconductor._private_steps s union all"
        " select h ->> 'name', h ->> 'kind' from pgconductor._private_finished f, jsonb_array_elements(f.steps) h"
        " order by 1"
    )


async def write(conn: Conn, what: str) -> int:
    cursor = await conn.execute("insert into ledger (what) values (%s) returning id", [what])
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def run_to_end(conductor: Conductor, *tasks: Task[..., Any]) -> None:
    """Run until nothing is left to do: sleeps of up to a minute are waited for."""
    with trio.fail_after(LIMIT):
        await Orchestrator(conductor, tasks=tasks).drain(60.0)


async def test_function_writes_once_and_its_value_is_replayed(conductor: Conductor, query: Query) -> None:
    """Called again after the sleep, it would write again; encoded only in the record, it would return another type."""
    calls: list[str] = []
    values: list[Any] = []

    async def charge(conn: Conn, what: str) -> tuple[str, int]:
        calls.append(what)
        return what, await write(conn, what)

    @conductor.task
    async def order(ctx: Context, what: str) -> int:
        value = await ctx.transaction("charge", charge, what)
        values.append(value)
        await ctx.sleep("settle", 0.3)
        return value[1]

    async with conductor:
        handle = await order.invoke("a")
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == 1
    assert calls == ["a"]
    assert values == [("a", 1), ("a", 1)], "the handler ran twice"
    assert written(query) == ["a"]
    assert recorded(query) == [("charge", "transaction"), ("settle", "sleep")]


async def test_error_of_the_function_rolls_back_and_is_a_failed_step(conductor: Conductor, query: Query) -> None:
    """Half of what it wrote would stay, or the handler could not compensate; a replay must see the same failure."""
    seen: list[str] = []

    async def charge(conn: Conn) -> None:
        await write(conn, "half")
        raise ValueError("no funds")

    @conductor.task
    async def order(ctx: Context) -> str:
        try:
            await ctx.transaction("charge", charge)
        except StepFailed as failed:
            seen.append(str(failed))
        await ctx.sleep("settle", 0.3)
        return "refused"

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == "refused"
    assert seen == ["step 'charge' failed: ValueError: no funds"] * 2
    assert written(query) == []


async def test_function_is_tried_again_as_retry_says(conductor: Conductor, query: Query) -> None:
    """Each try needs a transaction of its own: the one before is rolled back."""
    tries: list[int] = []

    async def charge(conn: Conn) -> int:
        tries.append(await write(conn, "x"))
        if len(tries) < 3:
            raise OSError("busy")
        return len(tries)

    @conductor.task
    async def order(ctx: Context) -> int:
        return await ctx.transaction("charge", charge, retry=3)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == 3
    assert written(query) == ["x"]


async def test_timeout_rolls_back_and_leaves_a_clean_connection(pgconductor_dsn: str, query: Query) -> None:
    """A transaction that hangs would hold its locks and a connection of the pool for ever."""
    conductor = Conductor(pgconductor_dsn, pool_size=1)

    async def hang(conn: Conn) -> None:
        await write(conn, "x")
        await conn.execute("select pg_sleep(600)")

    async def after(conn: Conn) -> str:
        await write(conn, "y")
        return "done"

    @conductor.task
    async def order(ctx: Context) -> str:
        with pytest.raises(StepFailed, match="ran for more than"):
            await ctx.transaction("hang", hang, timeout=0.2)
        return await ctx.transaction("after", after)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == "done"
    assert written(query) == ["y"]


@pytest.mark.parametrize("form", ["function", "block"])
async def test_scope_of_the_handler_that_is_cancelled_rolls_back(pgconductor_dsn: str, query: Query, form: str) -> None:
    """Cancelled in the middle, nothing may be committed, and the next transaction must not meet its leftovers."""
    conductor = Conductor(pgconductor_dsn, pool_size=1)

    async def hang(conn: Conn, scope: trio.CancelScope) -> None:
        await write(conn, "x")
        scope.cancel()
        await conn.execute("select pg_sleep(600)")

    @conductor.task
    async def order(ctx: Context) -> bool:
        with trio.CancelScope() as scope:
            if form == "function":
                await ctx.transaction("hang", hang, scope)
            else:
                async with ctx.transaction("hang") as conn:
                    await hang(conn, scope)
        async with ctx.transaction("after") as conn:
            await write(conn, "y")
        return scope.cancelled_caught

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) is True
    assert written(query) == ["y"]
    assert recorded(query) == [("after", "block")]


async def test_child_that_is_invoked_inside_commits_or_vanishes_with_the_step(
    conductor: Conductor, query: Query
) -> None:
    """An order without its shipping, or a shipping without an order."""
    shipped: list[int] = []

    @conductor.task
    async def ship(number: int) -> None:
        shipped.append(number)

    async def place(conn: Conn, number: int) -> str:
        handle = await ship.options(conn=conn).invoke(number)
        await write(conn, f"order {number}")
        if number == 1:
            raise ValueError("not this one")
        return str(handle.id)

    @conductor.task
    async def order(ctx: Context) -> tuple[str, str]:
        with pytest.raises(StepFailed):
            await ctx.transaction("one", place, 1)
        first = await ctx.transaction("two", place, 2)
        async with ctx.transaction("three") as conn:
            handle = await ship.options(conn=conn).invoke(3)
            await write(conn, "order 3")
        await ctx.sleep("settle", 0.3)
        return first, str(handle.id)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order, ship)
        ids = await handle.result(timeout=0)
    assert sorted(shipped) == [2, 3]
    assert written(query) == ["order 2", "order 3"]
    # Of the block too: at the replay it is told the id that it got.
    assert sorted(ids) == sorted(
        str(i) for (i,) in query("select id from pgconductor._private_finished where task = 'ship'")
    )


async def test_block_runs_again_and_is_told_what_it_was_told(conductor: Conductor, query: Query) -> None:
    """Executed again, its statements would write twice; told otherwise, the handler would decide otherwise.

    Types, loaders, row factories, descriptions, counts, statuses, errors in savepoints, `executemany`, no rows.
    """
    seen: list[Any] = []
    query("create type mood as enum ('fine', 'so so')")
    query("create table kinds (a numeric(10,2), b timestamptz, c jsonb, d int[], e bytea, f mood, g uuid, h text)")

    @conductor.task
    async def order(ctx: Context) -> None:
        told: list[Any] = []
        async with ctx.transaction("all") as conn:
            cursor = await conn.execute(
                "insert into kinds values (1.50, now(), '{\"x\": [1, null]}', '{1,2}', '\\x00ff', 'so so',"
                " gen_random_uuid(), null) returning *, 'a%%b' as \"per%%cent\""
            )
            told.append(await cursor.fetchall())
            assert cursor.description is not None
            told.append([(column.name, column.type_code) for column in cursor.description])
            told.append((cursor.rowcount, cursor.statusmessage))
            async with conn.cursor(row_factory=dict_row) as rows:
                await rows.execute("select n, n::text as word from generate_series(1, %s) n", [3])
                told.append([row async for row in rows])
            cursor = await conn.execute("update kinds set h = 'x' where false")
            told.append((cursor.rowcount, cursor.statusmessage, cursor.description))
            with pytest.raises(psycopg.ProgrammingError, match="didn't produce"):
                await cursor.fetchone()
            cursor = await conn.execute("select a from kinds where false")
            told.append(await cursor.fetchall())
            cursor = await conn.execute("select pg_notify('somewhere', 'x')")
            told.append(await cursor.fetchall())
            async with conn.cursor() as many:
                await many.executemany("insert into ledger (what) values (%s)", [["m1"], ["m2"]])
                told.append(many.rowcount)
            try:
                async with conn.transaction():
                    await conn.execute("insert into ledger (what) values ('m1')")
            except psycopg.errors.UniqueViolation as error:
                told.append((error.sqlstate, error.diag.constraint_name, str(error)))
        seen.append(told)
        await ctx.sleep("settle", 0.3)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        await handle.result(timeout=0)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert [type(value) for value in seen[0][0][0]] == [type(value) for value in seen[1][0][0]]
    assert len(seen[0]) == 9
    assert written(query) == ["m1", "m2"]
    assert query("select count(*) from kinds") == [(1,)]


async def test_error_in_a_block_rolls_back_and_is_a_failed_step(conductor: Conductor, query: Query) -> None:
    """As with the function form. At the replay the block is not entered: its failure is known."""
    entered: list[str] = []

    @conductor.task
    async def order(ctx: Context) -> str:
        try:
            async with ctx.transaction("charge") as conn:
                entered.append("x")
                await write(conn, "half")
                raise ValueError("no funds")
        except StepFailed as failed:
            await ctx.sleep("settle", 0.3)
            return failed.error["message"]

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == "no funds"
    assert entered == ["x"]
    assert written(query) == []


async def test_block_whose_code_has_changed_is_not_told_lies(conductor: Conductor, query: Query) -> None:
    """Another statement would get the rows of the one that was there."""
    runs: list[str] = []

    @conductor.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        async with ctx.transaction("charge") as conn:
            await conn.execute("select 1" if not runs else "select 2")
            runs.append("x")
        await ctx.sleep("settle", 0.3)

    @conductor.task(max_attempts=1)
    async def shorter(ctx: Context) -> None:
        async with ctx.transaction("charge") as conn:
            if len(runs) < 2:
                await conn.execute("select 1")
            runs.append("x")
        await ctx.sleep("settle", 0.3)

    async with conductor:
        for task, words in (
            (order, "executes 'select 2' where 'select 1' is recorded"),
            (shorter, "without executing"),
        ):
            handle = await task.invoke()
            await run_to_end(conductor, task)
            with pytest.raises(ExecutionFailed, match=words) as failed:
                await handle.result(timeout=0)
            assert failed.value.error["type"].endswith("NonDeterminism")


async def misused(conductor: Conductor, handler: Callable[[Context, Conn], Any]) -> str:
    """Run a block with `handler` in it; return the message it fails with."""

    @conductor.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        async with ctx.transaction("charge") as conn:
            await write(conn, "x")
            await handler(ctx, conn)

    async with conductor:
        handle: Handle[None] = await order.invoke()
        await run_to_end(conductor, order)
        with pytest.raises(ExecutionFailed) as failed:
            await handle.result(timeout=0)
    assert failed.value.error["type"].endswith("DurableMisuse"), failed.value.error
    return failed.value.error["message"]


async def step_inside(ctx: Context, conn: Conn) -> None:
    await ctx.now()


async def transaction_inside(ctx: Context, conn: Conn) -> None:
    async with ctx.transaction("another"):
        raise AssertionError("not reached")


async def copy(ctx: Context, conn: Conn) -> None:
    async with conn.cursor().copy("copy ledger (what) from stdin"):
        raise AssertionError("not reached")


async def server_side(ctx: Context, conn: Conn) -> None:
    conn.cursor("named")


async def pipelined(ctx: Context, conn: Conn) -> None:
    async with conn.pipeline():
        raise AssertionError("not reached")


async def foreign(ctx: Context, conn: Conn) -> None:
    await psycopg.AsyncCursor(conn).execute("select 1")


async def own_factory(ctx: Context, conn: Conn) -> None:
    conn.cursor_factory = psycopg.AsyncClientCursor
    await conn.execute("select 1")


async def several(ctx: Context, conn: Conn) -> None:
    await conn.execute("select 1; select 2")


async def binary(ctx: Context, conn: Conn) -> None:
    await conn.execute("select 1", binary=True)


async def composite(ctx: Context, conn: Conn) -> None:
    await conn.execute("select row(1, 2)")


async def large(ctx: Context, conn: Conn) -> None:
    await conn.execute("select repeat('x', 300000)")


async def many(ctx: Context, conn: Conn) -> None:
    await conn.execute("select n % 2 from generate_series(1, 60001) n")


async def commits(ctx: Context, conn: Conn) -> None:
    await conn.commit()


async def rolls_back(ctx: Context, conn: Conn) -> None:
    await conn.rollback()


async def closes(ctx: Context, conn: Conn) -> None:
    await conn.close()


async def enters(ctx: Context, conn: Conn) -> None:
    async with conn:
        raise AssertionError("not reached")


async def swallows(ctx: Context, conn: Conn) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1 / 0")


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (step_inside, "inside the step 'charge'"),
        (transaction_inside, "inside the step 'charge'"),
        (copy, "COPY cannot be recorded .* use the function form"),
        (server_side, "a server-side cursor cannot be recorded"),
        (pipelined, "a pipeline cannot be recorded"),
        (foreign, "not made by conn.cursor"),
        (own_factory, "a cursor_factory of one's own"),
        (several, "several statements in one"),
        (binary, "a result in binary form"),
        (composite, "a type without values of its own"),
        (large, "more than 256 KiB"),
        (many, "more than 60,000 values"),
        (commits, r"commit\(\) in ctx.transaction\('charge'\)"),
        (rolls_back, r"rollback\(\) in"),
        (closes, r"close\(\) in"),
        (enters, "async with conn in"),
        (swallows, "its error was swallowed"),
    ],
)
async def test_misuse_in_a_block_is_refused_by_name_and_rolled_back(
    conductor: Conductor, query: Query, handler: Callable[[Context, Conn], Any], words: str
) -> None:
    """What cannot be recorded would be something else at a replay; what ends the transaction splits it."""
    assert re.search(words, await misused(conductor, handler))
    assert written(query) == []
    assert recorded(query) == []


@pytest.mark.parametrize("form", ["function", "block"])
@pytest.mark.parametrize("words", ["commit", "rollback", "commit and chain", "rollback and chain", "commit; begin"])
async def test_transaction_that_was_ended_by_a_statement_is_found_out(
    conductor: Conductor, query: Query, form: str, words: str
) -> None:
    """The record would be of another transaction than the writes, and nothing exactly once."""

    async def cheat(conn: Conn) -> None:
        for statement in words.split("; "):
            await conn.execute(statement.encode())
        await conn.execute("select 1")

    @conductor.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        if form == "function":
            await ctx.transaction("charge", cheat)
        else:
            async with ctx.transaction("charge") as conn:
                await cheat(conn)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        with pytest.raises(ExecutionFailed, match="was ended by a statement of its own") as failed:
            await handle.result(timeout=0)
        assert failed.value.error["type"].endswith("DurableMisuse")
    assert recorded(query) == []


async def test_connection_that_was_kept_is_refused_after_the_step(conductor: Conductor, query: Query) -> None:
    """It belongs to somebody else by then: what is sent on it would land in another's transaction."""
    kept: list[Conn] = []

    async def keep(conn: Conn) -> None:
        kept.append(conn)

    @conductor.task
    async def order(ctx: Context) -> None:
        await ctx.transaction("keep", keep)
        async with ctx.transaction("again") as conn:
            with pytest.raises(DurableMisuse, match="used after the step"):
                await kept[0].execute("insert into ledger (what) values ('late')")
            kept[0].drop()  # psycopg on its way out of a failed statement would
            await write(conn, "in time")

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        await handle.result(timeout=0)
    assert written(query) == ["in time"]


async def test_rivals_begin_a_function_anew_and_count_as_no_try(conductor: Conductor, query: Query) -> None:
    """Serializable transactions fail by design when they meet; to burn tries on that would make them useless."""
    query("create table counter (n int)")
    query("insert into counter values (0)")
    calls = 0

    async def count(conn: Conn) -> int:
        nonlocal calls
        calls += 1
        cursor = await conn.execute("select n from counter")
        row = await cursor.fetchone()
        assert row is not None
        await conn.execute("update counter set n = %s", [row[0] + 1])
        return int(row[0])

    @conductor.task(max_attempts=1)
    async def order(ctx: Context) -> int:
        return await ctx.transaction("count", count, isolation="serializable")

    async with conductor:
        handles = await order.invoke_many([order.bind() for _ in range(8)])
        await run_to_end(conductor, order)
        assert sorted([await handle.result(timeout=0) for handle in handles]) == list(range(8))
    assert query("select n from counter") == [(8,)]
    assert calls > 8, "nobody met a rival: the test shows nothing"


async def test_rival_in_a_block_is_a_failed_step(conductor: Conductor, query: Query) -> None:
    """A block cannot be run again by us; that it failed must be told, and caught, like any failure."""
    query("create table counter (n int)")
    query("insert into counter values (0)")

    @conductor.task
    async def order(ctx: Context) -> str:
        try:
            async with ctx.transaction("count", isolation="repeatable read") as conn:
                await conn.execute("select n from counter")
                await trio.to_thread.run_sync(query, "update counter set n = n + 1")
                await conn.execute("update counter set n = n + 1")
        except StepFailed as failed:
            return failed.error["type"]
        return "committed"

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert (await handle.result(timeout=0)).endswith("SerializationFailure")
    assert query("select n from counter") == [(1,)]


async def test_error_at_commit_is_a_failed_step(conductor: Conductor, query: Query) -> None:
    """A deferred constraint speaks up only at COMMIT: with the record already written, and rolled back."""
    query("create table strict (n int unique deferrable initially deferred)")

    async def twice(conn: Conn) -> None:
        await conn.execute("insert into strict values (1), (1)")

    @conductor.task
    async def order(ctx: Context) -> str:
        with pytest.raises(StepFailed, match="UniqueViolation"):
            await ctx.transaction("twice", twice)
        with pytest.raises(StepFailed, match="UniqueViolation"):
            async with ctx.transaction("block") as conn:
                await twice(conn)
        return "told"

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == "told"
    assert query("select count(*) from strict") == [(0,)]


async def test_value_that_cannot_be_recorded_rolls_back(conductor: Conductor, query: Query) -> None:
    """Committed without its value, the step would be lost."""

    async def charge(conn: Conn) -> int:
        await write(conn, "x")
        return "no number"  # type: ignore[return-value]  # the mistake that is tested

    @conductor.task
    async def order(ctx: Context) -> str:
        with pytest.raises(StepFailed, match="does not fit its annotation"):
            await ctx.transaction("charge", charge)
        return "told"

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        assert await handle.result(timeout=0) == "told"
    assert written(query) == []


def refuse_terms(ctx: Any, fn: Callable[..., Any]) -> None:
    """Both kinds of handler refuse the same, in the same words, at the call."""
    for form in ((), (fn,)):
        with pytest.raises(InvalidOption, match="isolation= is one of"):
            ctx.transaction("x", *form, isolation="chaos")
        with pytest.raises(InvalidOption, match="a transaction's timeout"):
            ctx.transaction("x", *form, timeout=0)
    with pytest.raises(DurableMisuse, match=r"transaction\('x'\): a block .* retry= needs the function form"):
        ctx.transaction("x", retry=3)


async def test_wrong_arguments_are_refused_before_anything_is_sent(conductor: Conductor, query: Query) -> None:
    """A plain function would get an async connection; a block cannot be retried."""

    def plain(conn: Conn) -> None: ...

    @conductor.task(max_attempts=1)
    def plain_order(ctx: Context) -> None:
        refuse_terms(ctx.sync, plain)

    @conductor.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        with pytest.raises(DurableMisuse, match="needs an async function"):
            await cast(Any, ctx).transaction("plain", plain)
        refuse_terms(ctx, plain)
        with pytest.raises(DurableMisuse, match="is for plain def handlers"):
            ctx.sync.sleep("nap", 1)

    async with conductor:
        handles = [await order.invoke(), await plain_order.invoke()]
        await run_to_end(conductor, order, plain_order)
        for handle in handles:
            await handle.result(timeout=0)
    assert recorded(query) == []


async def test_nothing_is_suspended_while_a_transaction_is_open(conductor: Conductor, query: Query) -> None:
    """Another branch sleeps for long: given up now, the transaction would be cut in the middle."""
    calls: list[str] = []

    async def slow(conn: Conn) -> None:
        calls.append("x")
        await write(conn, "x")
        await conn.execute("select pg_sleep(0.5)")

    @conductor.task
    async def order(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "nap", 1.0)
            nursery.start_soon(ctx.transaction, "slow", slow)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        await handle.result(timeout=0)
    assert calls == ["x"]
    assert written(query) == ["x"]


async def test_claim_that_was_lost_while_the_transaction_was_open_commits_nothing(
    conductor: Conductor, query: Query
) -> None:
    """A zombie's writes beside those of who took over: what transactions are for is to refuse them."""
    runs: list[str] = []

    async def charge(conn: Conn) -> None:
        runs.append("x")
        await write(conn, f"run {len(runs)}")
        if len(runs) == 1:  # another takes over, as after a lease that was slept through
            await trio.to_thread.run_sync(
                query,
                "update pgconductor._private_executions set state = 'ready', owner = null, run_at = now()"
                " where task = 'order' returning id",
            )

    @conductor.task
    async def order(ctx: Context) -> None:
        await ctx.transaction("charge", charge)

    async with conductor:
        handle = await order.invoke()
        await run_to_end(conductor, order)
        await handle.result(timeout=0)
    assert written(query) == ["run 2"]
