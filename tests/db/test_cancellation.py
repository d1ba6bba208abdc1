"""Whatever is interrupted, wherever: nothing stays in flight, or the connection is closed.

Single cases first, then a sweep that interrupts every wait of every verb in turn (all waits for the network pass
`TrioConnection._wait_fd`), then 10,000 cancellations at random moments through the pool. The seed is printed with a
failure.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from db.sessions import Connection, connected, value
from psycopg.pq import TransactionStatus

from pgconductor.db.connection import TrioConnection
from pgconductor.db.pool import Pool, open_pool
from pgconductor.testing.proxy import open_chaos_proxy


async def cancelled_when_blocked(call: Callable[..., Awaitable[object]], *args: object) -> bool:
    """Run `call` until it waits, cancel it, and say whether it ended as cancelled."""
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                await trio.testing.wait_all_tasks_blocked(0.02)
                scope.cancel()

            nursery.start_soon(cancel)
            await call(*args)
            nursery.cancel_scope.cancel()
    return scope.cancelled_caught


# Single cases


async def test_cancelled_query_leaves_connection_idle(pgconductor_empty_dsn: str) -> None:
    """Would break if a cancelled statement went on at the server, or its reply met the next statement."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        assert await cancelled_when_blocked(conn.execute, "select pg_sleep(60)")
        assert conn.is_clean
        state = await value(other, "select state from pg_stat_activity where pid = %s", conn.info.backend_pid)
        assert state == "idle"
        assert await value(conn, "select 42") == 42


async def test_cancelled_query_in_a_transaction_leaves_it_failed(pgconductor_empty_dsn: str) -> None:
    """Would break if the cancellation of one statement rolled back, or hid, what the caller began."""
    async with connected(pgconductor_empty_dsn, autocommit=False) as conn:
        await conn.execute("select 1")
        assert await cancelled_when_blocked(conn.execute, "select pg_sleep(60)")
        assert conn.info.transaction_status is TransactionStatus.INERROR
        await conn.rollback()
        assert conn.is_clean


async def test_nothing_is_sent_in_a_cancelled_scope(pgconductor_empty_dsn: str) -> None:
    """Would break if a statement took effect although its caller had been cancelled before."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")
        with trio.CancelScope() as scope:
            scope.cancel()
            await conn.execute("insert into t values (1)")
        assert scope.cancelled_caught
        assert await value(conn, "select count(*) from t") == 0


async def test_cancelled_transaction_is_rolled_back(pgconductor_empty_dsn: str) -> None:
    """Would break if the block's end, in a cancelled scope, left the transaction open."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")

        async def work() -> None:
            async with conn.transaction():
                await conn.execute("insert into t values (1)")
                await trio.sleep_forever()

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        assert await value(conn, "select count(*) from t") == 0


async def test_cancelled_before_commit_is_rolled_back(pgconductor_empty_dsn: str) -> None:
    """Would break if a block that ends normally in a cancelled scope left its transaction on psycopg's stack."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")
        with trio.CancelScope() as scope:
            async with conn.transaction():
                await conn.execute("insert into t values (1)")
                scope.cancel()
        assert scope.cancelled_caught
        assert conn.is_clean
        assert await value(conn, "select count(*) from t") == 0


async def test_cancelled_savepoint_leaves_the_outer_transaction_usable(pgconductor_empty_dsn: str) -> None:
    """Would break if only the innermost block's statement were cancelled and its savepoint kept."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")

        async def work() -> None:
            async with conn.transaction():
                await conn.execute("insert into t values (2)")
                await conn.execute("select pg_sleep(60)")

        async with conn.transaction():
            await conn.execute("insert into t values (1)")
            assert await cancelled_when_blocked(work)
            await conn.execute("insert into t values (3)")
        assert await value(conn, "select array_agg(n) from t") == [1, 3]


async def test_cancelled_release_leaves_the_outer_transaction_usable(pgconductor_empty_dsn: str) -> None:
    """Would break if the end of a savepoint, cancelled by the server, left the outer transaction in error."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")

        async def work() -> None:
            async with conn.transaction() as inner:
                await conn.execute("insert into t values (2)")
                # RELEASE is too short to be hit: something longer takes its place.
                inner._get_commit_commands = lambda: iter([b"select pg_sleep(60)"])  # type: ignore[method-assign]  # pyright: ignore[reportPrivateUsage]

        async with conn.transaction():
            await conn.execute("insert into t values (1)")
            assert await cancelled_when_blocked(work)
            await conn.execute("insert into t values (3)")
        assert await value(conn, "select array_agg(n) from t") == [1, 3]


async def test_cancelled_commit_is_ambiguous_but_clean(pgconductor_empty_dsn: str) -> None:
    """Would break if COMMIT that waits (here for a deferred trigger) left anything but all or nothing."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute(
            "create table t (n int);"
            "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(60); return null; end';"
            "create constraint trigger slow after insert on t deferrable initially deferred"
            " for each row execute function slow()"
        )

        async def work() -> None:
            async with conn.transaction():
                await conn.execute("insert into t values (1)")

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        assert await value(conn, "select count(*) from t") == 0


async def test_cancelled_pipeline_is_empty_afterwards(pgconductor_empty_dsn: str) -> None:
    """Would break if replies, prepared statements or queue entries of a pipeline outlived it."""
    async with connected(pgconductor_empty_dsn) as conn:

        async def work() -> None:
            async with conn.pipeline():
                for _ in range(10):
                    await conn.execute("select %s::int", [1], prepare=True)
                await conn.execute("select pg_sleep(60)")
                for _ in range(10):
                    await conn.execute("select %s::text", ["x"], prepare=True)

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        for number in range(3):
            cursor = await conn.execute("select %s::int", [number], prepare=True)
            assert await cursor.fetchone() == (number,)
            cursor = await conn.execute("select %s::text", [str(number)], prepare=True)
            assert await cursor.fetchone() == (str(number),)


async def test_pipeline_goes_on_after_a_cancelled_statement(pgconductor_empty_dsn: str) -> None:
    """Would break if a cancellation inside a pipeline made its later replies meet the wrong statements."""
    async with connected(pgconductor_empty_dsn) as conn, conn.pipeline():

        async def work() -> None:
            cursor = await conn.execute("select 1, pg_sleep(60)")
            await cursor.fetchone()

        assert await cancelled_when_blocked(work)
        assert await value(conn, "select 42") == 42


async def test_cancelled_copy_in_writes_nothing(pgconductor_empty_dsn: str) -> None:
    """Would break if a COPY that was cancelled half-way kept the connection, or its rows."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")

        async def work() -> None:
            async with conn.cursor() as cursor, cursor.copy("copy t from stdin") as copy:
                for number in range(100_000):
                    await copy.write_row([number])
                await trio.sleep_forever()

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        assert await value(conn, "select count(*) from t") == 0


async def test_cancelled_copy_out_is_read_away(pgconductor_empty_dsn: str) -> None:
    """Would break if the rest of the COPY met the next statement."""
    async with connected(pgconductor_empty_dsn) as conn:

        async def work() -> None:
            async with (
                conn.cursor() as cursor,
                cursor.copy("copy (select repeat('x', 1000) from generate_series(1, 1e7)) to stdout") as copy,
            ):
                for _ in range(1000):
                    await copy.read()
                await trio.sleep_forever()

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        assert await value(conn, "select 42") == 42


async def test_cancelled_stream_ends(pgconductor_empty_dsn: str) -> None:
    """Would break if the generator kept the lock, or its query ran on."""
    async with connected(pgconductor_empty_dsn) as conn, conn.cursor() as cursor:

        async def work() -> None:
            async for _ in cursor.stream("select 1 from generate_series(1, 10) union all select 1 from pg_sleep(60)"):
                pass

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        assert await value(conn, "select 42") == 42


async def test_cancelled_server_cursor_is_closed(pgconductor_empty_dsn: str) -> None:
    """Would break if the cursor stayed open at the server, or warned when it is collected."""
    async with connected(pgconductor_empty_dsn) as conn:

        async def work() -> None:
            async with conn.cursor("held", withhold=True) as cursor:
                await cursor.execute("select generate_series(1, 1000)")
                await cursor.fetchone()
                await trio.sleep_forever()

        assert await cancelled_when_blocked(work)
        assert conn.is_clean
        assert await value(conn, "select count(*) from pg_cursors") == 0


async def test_cancelled_receive_loses_no_notification(pgconductor_empty_dsn: str) -> None:
    """Would break if a notification that arrives while the waiter is being cancelled vanished."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        await conn.execute("listen c")
        received: list[str] = []
        chance = random.Random(1)
        for number in range(300):
            await other.execute(f"notify c, '{number}'".encode())
            with trio.move_on_after(chance.uniform(0, 0.0005)):
                received += [n.payload for n in await conn.receive_notifies()]
            assert conn.is_clean
        while batch := await conn.receive_notifies(0.2):
            received += [n.payload for n in batch]
        assert received == [str(n) for n in range(300)]


async def test_cancelled_statement_loses_no_notification(pgconductor_empty_dsn: str) -> None:
    """Would break if those that arrive while a cancelled statement is read away were dropped."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        await conn.execute("listen c")

        async def work() -> None:
            await other.execute("notify c, 'kept'")
            await conn.execute("select pg_sleep(60)")

        assert await cancelled_when_blocked(work)
        assert [n.payload for n in await conn.receive_notifies(5)] == ["kept"]


async def test_waiting_for_the_turn_can_be_cancelled(pgconductor_empty_dsn: str) -> None:
    """Would break if a task that gives up its place in the queue kept others from theirs."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        await other.execute("select pg_advisory_lock(1)")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(value, conn, "select pg_advisory_lock(1)")
            await trio.testing.wait_all_tasks_blocked(0.02)
            with trio.move_on_after(0.01) as scope:
                await conn.execute("select 1")
            assert scope.cancelled_caught
            nursery.start_soon(value, conn, "select 2")
            await other.execute("select pg_advisory_unlock(1)")
        assert conn.is_clean


async def test_clean_up_is_bounded_when_the_server_is_deaf(pgconductor_empty_dsn: str) -> None:
    """Would break if cancelling a statement on a half-open connection took as long as TCP does."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, connected(proxy.dsn) as conn:
        conn.cleanup_timeout = 0.1
        proxy.blackhole()
        started = trio.current_time()
        with trio.move_on_after(0.1) as scope:
            async with conn.transaction():
                await conn.execute("select 1")
        assert scope.cancelled_caught
        assert conn.closed
        assert trio.current_time() - started < 1.0


async def test_timeout_of_wait_is_a_cancellation(pgconductor_empty_dsn: str) -> None:
    """Would break if `wait(timeout=)`, psycopg's own interface, left the statement running."""
    async with connected(pgconductor_empty_dsn) as conn, conn.lock:
        with pytest.raises(psycopg.OperationalError, match="no reply within"):
            await conn.wait(conn.commands_gen([b"select pg_sleep(60)"]), timeout=0.01)
        assert conn.info.transaction_status is TransactionStatus.IDLE


async def test_cancelled_connect_leaves_no_server_process(pgconductor_empty_dsn: str) -> None:
    """Would break if half-open connections were left to the garbage collector."""
    async with connected(pgconductor_empty_dsn) as conn:
        chance = random.Random(2)
        for _ in range(200):
            with trio.move_on_after(chance.uniform(0, 0.01)):
                (await Connection.connect(pgconductor_empty_dsn, application_name="cancelled")).drop()
        query = "select count(*) from pg_stat_activity where application_name = 'cancelled'"
        with trio.fail_after(10):
            while await value(conn, query):
                pass


# The sweep


class Interruption(BaseException):
    """Stands for what is neither Cancelled nor an Exception, like KeyboardInterrupt."""


async def query(conn: Connection) -> None:
    await conn.execute("insert into t values (1), (2)")
    await conn.execute("select %s::int", [1], prepare=True)


async def large_query(conn: Connection) -> None:
    await conn.execute("select length(%s)", ["x" * 3_000_000])


async def implicit_transaction(conn: Connection) -> None:
    await conn.set_autocommit(False)
    try:
        await conn.execute("insert into t values (1)")
        await conn.execute("insert into t values (2)")
        await conn.commit()
    finally:
        if conn.is_clean:
            await conn.set_autocommit(True)


async def transaction(conn: Connection) -> None:
    async with conn.transaction():
        await conn.execute("insert into t values (1)")
        async with conn.transaction():
            await conn.execute("insert into t values (2)")


async def rolled_back(conn: Connection) -> None:
    with suppress(ZeroDivisionError):
        async with conn.transaction():
            await conn.execute("insert into t values (1)")
            async with conn.transaction():
                await conn.execute("insert into t values (2)")
                raise ZeroDivisionError


async def pipeline(conn: Connection) -> None:
    async with conn.pipeline():
        async with conn.transaction():
            await conn.execute("insert into t values (1)", prepare=True)
            await conn.execute("insert into t values (2)", prepare=True)
        cursor = await conn.execute("select 3", prepare=True)
        assert await cursor.fetchone() == (3,)


async def executemany(conn: Connection) -> None:
    async with conn.transaction(), conn.cursor() as cursor:
        await cursor.executemany("insert into t values (%s)", [(1,), (2,)])


async def copy_in(conn: Connection) -> None:
    async with conn.cursor() as cursor, cursor.copy("copy t from stdin") as copy:
        await copy.write_row([1])
        await copy.write_row([2])


async def copy_out(conn: Connection) -> None:
    query = "copy (select repeat('x', 1000) from generate_series(1, 2000)) to stdout"
    async with conn.cursor() as cursor, cursor.copy(query) as copy:
        async for _ in copy:
            pass


async def stream(conn: Connection) -> None:
    async with conn.cursor() as cursor:
        async for _ in cursor.stream("select repeat('x', 1000) from generate_series(1, 1000)"):
            pass


async def server_cursor(conn: Connection) -> None:
    async with conn.transaction(), conn.cursor("c") as cursor:
        await cursor.execute("select generate_series(1, 300)")
        async for _ in cursor:
            pass


async def notifications(conn: Connection) -> None:
    await conn.execute("listen c")
    await conn.execute("notify c")
    assert await conn.receive_notifies()
    await conn.execute("unlisten c")


async def probing(conn: Connection) -> None:
    await conn.probe(10)


SCENARIOS = [
    query,
    large_query,
    implicit_transaction,
    transaction,
    rolled_back,
    pipeline,
    executemany,
    copy_in,
    copy_out,
    stream,
    server_cursor,
    notifications,
    probing,
]


@pytest.mark.parametrize("how", ["cancel", "raise", "raise twice"])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_every_wait_can_be_interrupted(
    pgconductor_empty_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    scenario: Callable[[Connection], Awaitable[None]],
    how: str,
) -> None:
    """Would break if there were one wait after whose interruption the connection is neither clean nor closed."""
    real_wait = Connection._wait_fd  # pyright: ignore[reportPrivateUsage]
    waits = 0
    interrupted_at = 0
    scope = trio.CancelScope()

    async def wait_fd(fd: int, want: int) -> Any:
        nonlocal waits
        waits += 1
        if how == "cancel" and waits == interrupted_at:
            scope.cancel()
        elif how != "cancel" and interrupted_at <= waits < interrupted_at + (2 if how == "raise twice" else 1):
            raise Interruption
        return await real_wait(fd, want)

    async with connected(pgconductor_empty_dsn) as admin:
        await admin.execute("create table t (n int)")
        conn = await Connection.connect(pgconductor_empty_dsn, autocommit=True)
        closed = 0
        for interrupted_at in count(1):
            waits = 0
            with monkeypatch.context() as patch, trio.CancelScope() as scope, suppress(Interruption):
                patch.setattr(TrioConnection, "_wait_fd", staticmethod(wait_fd))
                with trio.fail_after(20):
                    await scenario(conn)
            if waits < interrupted_at:
                break
            if not conn.closed:
                assert conn.info.transaction_status is not TransactionStatus.ACTIVE
                if scenario is not implicit_transaction:
                    assert conn.is_clean
                await conn.restore_idle()
            has_closed = conn.closed
            if has_closed:
                closed += 1
                conn = await Connection.connect(pgconductor_empty_dsn, autocommit=True)
            await conn.set_autocommit(True)
            assert conn.is_clean
            assert await value(conn, "select %s::int", interrupted_at) == interrupted_at
            idle = "select count(*) from pg_stat_activity where state like 'idle in%%' and datname = current_database()"
            with trio.fail_after(20):
                # The server takes a moment to see that a connection was closed.
                while await value(conn, idle) != 0 and has_closed:
                    await trio.sleep(0.01)
            assert await value(conn, idle) == 0
            rows = await value(admin, "select array_agg(n order by n) from t")
            assert rows in (None, [1, 2]), f"half a transaction after an interruption at wait {interrupted_at}"
            await admin.execute("truncate t")
            assert interrupted_at < 5000
        conn.drop()
        if how == "cancel":
            assert closed == 0, "a reachable server needs no closing after a cancellation"


@pytest.mark.parametrize("how", ["cancel", "raise"])
async def test_every_wait_of_connect_can_be_interrupted(
    pgconductor_empty_dsn: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Would break if an interrupted connect left a socket, or a server process, behind."""
    real_wait = Connection._wait_fd  # pyright: ignore[reportPrivateUsage]
    waits = 0
    interrupted_at = 0
    scope = trio.CancelScope()
    kept: list[BaseException] = []  # their tracebacks keep the frames of connect() alive

    async def wait_fd(fd: int, want: int) -> Any:
        nonlocal waits
        waits += 1
        if waits == interrupted_at:
            if how == "raise":
                raise Interruption
            scope.cancel()
        return await real_wait(fd, want)

    async with connected(pgconductor_empty_dsn) as admin:
        for interrupted_at in count(1):
            waits = 0
            with monkeypatch.context() as patch, trio.CancelScope() as scope:
                patch.setattr(TrioConnection, "_wait_fd", staticmethod(wait_fd))
                try:
                    (await Connection.connect(pgconductor_empty_dsn, application_name="swept")).drop()
                except Interruption as error:
                    kept.append(error)
            if waits < interrupted_at:
                break
        assert interrupted_at > 1
        with trio.fail_after(10):
            while await value(admin, "select count(*) from pg_stat_activity where application_name = 'swept'"):
                pass


# At random, through the pool


@pytest.mark.timeout(400)
async def test_ten_thousand_random_cancellations(pgconductor_empty_dsn: str) -> None:
    """Would break if, however rarely, a dirty connection were lent, a reply met another statement, or a transaction
    stayed open.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    numbers = count(1)
    cancelled = 0
    attempts = 0

    async def unique(conn: Connection, query: str = "select %s::bigint") -> None:
        number = next(numbers)
        assert await value(conn, query, number) == number

    async def slow(conn: Connection) -> None:
        await unique(conn, "select %s::bigint from pg_sleep(0.003)")

    async def in_transaction(conn: Connection) -> None:
        async with conn.transaction():
            await unique(conn)
            async with conn.transaction():
                await unique(conn)

    async def pipelined(conn: Connection) -> None:
        async with conn.pipeline():
            sent = [(n := next(numbers), await conn.execute("select %s::bigint", [n])) for _ in range(5)]
            for number, cursor in sent:
                assert await cursor.fetchone() == (number,)

    async def copied(conn: Connection) -> None:
        number = next(numbers)
        query = f"copy (select {number} from generate_series(1, 50)) to stdout".encode()
        async with conn.cursor() as cursor, cursor.copy(query) as copy:
            assert [row async for row in copy.rows()] == [(str(number),)] * 50

    async def paged(conn: Connection) -> None:
        number = next(numbers)
        async with conn.transaction(), conn.cursor("c") as cursor:
            await cursor.execute("select %s::bigint from generate_series(1, 150)", [number])
            assert [row async for row in cursor] == [(number,)] * 150

    verbs = [unique, unique, slow, in_transaction, pipelined, copied, paged]

    async def borrow(pool: Pool[Connection]) -> None:
        nonlocal cancelled, attempts
        while cancelled < 10_000:
            attempts += 1
            verb = chance.choice(verbs)
            is_lent = False
            with trio.move_on_after(chance.expovariate(1 / 0.002)) as scope:
                async with pool.connection() as conn:
                    is_lent = True
                    assert conn.is_clean
                    await verb(conn)
            cancelled += is_lent and scope.cancelled_caught  # in the queue of the pool it is too easy

    async with open_pool(pgconductor_empty_dsn, max_size=3, connection_class=Connection) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(borrow, pool)
        statistics = pool.statistics()
        assert statistics.in_use == statistics.connecting == statistics.waiting == 0
        assert statistics.discarded == 0, "a reachable server needs no closing after a cancellation"
        async with pool.connection() as conn:
            query = "select count(*) from pg_stat_activity where state like 'idle in%%' and pid <> pg_backend_pid()"
            assert await value(conn, query) == 0
    assert attempts > cancelled
