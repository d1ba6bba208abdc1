"""The pool: who gets what, what is handed out, and what survives failures of the server and of its users."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from db.sessions import Connection, value
from psycopg.rows import TupleRow, dict_row

from pgconductor.db.connection import TrioConnection
from pgconductor.db.pool import Pool, open_pool
from pgconductor.errors import InvalidOption, Misuse, NotOpen, PoolTimeout
from pgconductor.testing.proxy import open_chaos_proxy


async def pid(pool: Pool[Connection]) -> int:
    async with pool.connection() as conn:
        return conn.info.backend_pid


async def test_block_commits_on_success_and_rolls_back_on_error(pgconductor_empty_dsn: str) -> None:
    """Would break if the pool did not end blocks as psycopg's pool does."""
    async with open_pool(pgconductor_empty_dsn) as pool:
        async with pool.connection() as conn:
            await conn.execute("create table t (n int)")
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async with pool.connection() as conn:
                await conn.execute("insert into t values (1)")
                raise ZeroDivisionError
        async with pool.connection() as conn:
            await conn.execute("insert into t values (2)")
        async with pool.connection() as conn:
            assert await value(conn, "select array_agg(n) from t") == [2]
        assert pool.statistics().opened == 1


async def test_opens_on_demand_and_uses_the_most_recent_again(pgconductor_empty_dsn: str) -> None:
    """Would break if entering made I/O, or if a free connection were not used."""
    async with open_pool(pgconductor_empty_dsn) as pool:
        assert pool.statistics().opened == 0
        first = await pid(pool)
        assert await pid(pool) == first
        async with pool.connection(), pool.connection():
            assert pool.statistics().in_use == 2
        assert repr(pool) == "<Pool open: 0 in use, 2 idle, 0 connecting, 0 waiting, max_size=4>"
        assert pool.statistics().opened == 2


async def test_min_size_connections_are_there_on_entry(pgconductor_empty_dsn: str) -> None:
    """Would break if min_size were ignored, or if a bad DSN were only noticed later."""
    async with open_pool(pgconductor_empty_dsn, min_size=2) as pool:
        assert pool.statistics().idle == 2
    with pytest.raises(psycopg.OperationalError):
        async with open_pool("host=127.0.0.1 port=1 dbname=x", min_size=1):
            pass


async def test_full_pool_serves_in_order_of_arrival(pgconductor_empty_dsn: str) -> None:
    """Would break if a task that came later overtook one that waits."""
    order: list[int] = []

    async def borrow(pool: Pool[Connection], number: int) -> None:
        async with pool.connection():
            order.append(number)

    async with open_pool(pgconductor_empty_dsn, max_size=1) as pool, trio.open_nursery() as nursery:
        async with pool.connection():
            for number in range(5):
                nursery.start_soon(borrow, pool, number)
                await trio.testing.wait_all_tasks_blocked()
            assert pool.statistics().waiting == 5
        with trio.fail_after(10):
            await borrow(pool, 5)
    assert order == [0, 1, 2, 3, 4, 5]


async def test_timeout_names_size_and_remedy(pgconductor_empty_dsn: str) -> None:
    """Would break if a full pool hung, or if its error did not say what to do."""
    async with open_pool(pgconductor_empty_dsn, max_size=1) as pool, pool.connection():
        with pytest.raises(PoolTimeout, match=r"free within 0.01 s .* max_size=1 \(1 in use.*raise max_size"):
            async with pool.connection(timeout=0.01):
                pass
        assert pool.statistics().timed_out == 1
        assert pool.statistics().waiting == 0


async def test_timeout_covers_connecting(pgconductor_empty_dsn: str) -> None:
    """Would break if a deaf server held the caller for connect_timeout instead."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, open_pool(proxy.dsn, timeout=0.05) as pool:
        proxy.blackhole()
        with pytest.raises(PoolTimeout, match=r"could be opened within 0\.05 s"):
            async with pool.connection():
                pass
        assert pool.statistics().connecting == 0


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_cancelled_waiter_gives_its_promise_back(pgconductor_empty_dsn: str, cancel_first: bool) -> None:
    """Would break if a connection promised to a task that is cancelled in the same moment were lost for ever."""
    async with open_pool(pgconductor_empty_dsn, max_size=1) as pool, trio.open_nursery() as nursery:

        async def borrow(scope: trio.CancelScope) -> None:
            with scope:
                async with pool.connection():
                    await trio.sleep_forever()

        scope = trio.CancelScope()
        place = await pool._acquire(5)  # pyright: ignore[reportPrivateUsage]
        nursery.start_soon(borrow, scope)
        await trio.testing.wait_all_tasks_blocked()
        if cancel_first:
            scope.cancel()
        pool._release(place)  # pyright: ignore[reportPrivateUsage]
        assert pool.statistics().waiting == 0, "the waiting task has been promised the connection"
        scope.cancel()
        with trio.fail_after(5):
            assert await pid(pool)
        assert pool.statistics().in_use == 0


async def test_failed_connect_passes_the_place_on(pgconductor_empty_dsn: str) -> None:
    """Would break if a place whose connection could not be opened were never used again."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, open_pool(proxy.dsn, max_size=1) as pool:
        proxy.refuse()
        for _ in range(3):
            with pytest.raises(psycopg.OperationalError):
                async with pool.connection():
                    pass
        await proxy.mend()
        with trio.fail_after(10):
            assert await pid(pool)


# What is handed out


async def begin(conn: Connection) -> None:
    await conn.execute("begin")


async def fail_in_transaction(conn: Connection) -> None:
    await conn.execute("begin")
    with pytest.raises(psycopg.errors.DivisionByZero):
        await conn.execute("select 1/0")


async def copy_by_execute(conn: Connection) -> None:
    await conn.execute("create temp table t (n int)")
    with pytest.raises(psycopg.ProgrammingError):
        await conn.execute("copy t from stdin")


@pytest.mark.parametrize("mess", [begin, fail_in_transaction, copy_by_execute])
async def test_connection_left_in_a_mess_is_cleaned(
    pgconductor_empty_dsn: str, mess: Callable[[Connection], Awaitable[None]]
) -> None:
    """Would break if the next user met a transaction or a COPY of the last one."""
    async with open_pool(pgconductor_empty_dsn, max_size=1, kwargs={"autocommit": True}) as pool:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async with pool.connection() as conn:
                await mess(conn)
                raise ZeroDivisionError
        async with pool.connection() as conn:
            assert conn.is_clean
            assert await value(conn, "select 42") == 42
        assert pool.statistics().opened == 1


@pytest.mark.parametrize("what", ["copy", "pipeline", "transaction"])
async def test_connection_whose_block_was_never_left_is_replaced(pgconductor_empty_dsn: str, what: str) -> None:
    """Would break if the next user met a block that the last one still holds; its holder is told."""
    async with open_pool(pgconductor_empty_dsn, max_size=1, kwargs={"autocommit": True}) as pool:
        # A pipeline can be committed in; the others are refused.
        with nullcontext() if what == "pipeline" else pytest.raises(psycopg.Error):
            async with pool.connection() as conn:
                block: AbstractAsyncContextManager[Any]
                if what == "copy":
                    block = conn.cursor().copy("copy (select generate_series(1, 1000000)) to stdout")
                else:
                    block = conn.pipeline() if what == "pipeline" else conn.transaction()
                await block.__aenter__()
                await conn.execute("select 1")
                await conn.commit()
        with trio.fail_after(10):
            async with pool.connection() as conn:
                assert conn.is_clean
                assert await value(conn, "select 42") == 42
        with suppress(psycopg.Error):
            await block.__aexit__(None, None, None)


async def test_settings_of_one_user_do_not_reach_the_next(pgconductor_empty_dsn: str) -> None:
    """Would break if autocommit, read_only, a row factory or a handler outlived the block that set it."""
    async with open_pool(pgconductor_empty_dsn, max_size=1) as pool:
        async with pool.connection() as conn:
            await conn.set_autocommit(True)
            await conn.set_read_only(True)
            await conn.set_isolation_level(psycopg.IsolationLevel.SERIALIZABLE)
            conn.row_factory = dict_row  # type: ignore[assignment]
            conn.prepare_threshold = None
            conn.add_notify_handler(print)
        async with pool.connection() as conn:
            assert (conn.autocommit, conn.read_only, conn.isolation_level) == (False, None, None)
            assert conn.prepare_threshold == 5
            assert await value(conn, "select current_setting('transaction_isolation')") == "read committed"
            assert await conn.receive_notifies(0) == []
        assert pool.statistics().opened == 1


async def test_configure_and_connection_class_are_used(pgconductor_empty_dsn: str) -> None:
    """Would break if new connections were handed out before they were configured."""

    class Mine(TrioConnection[TupleRow]):
        pass

    async def configure(conn: Mine) -> None:
        await conn.execute("set application_name = 'mine'")
        await conn.commit()

    pool = open_pool(pgconductor_empty_dsn, configure=configure, connection_class=Mine)
    async with pool, pool.connection() as conn:
        assert isinstance(conn, Mine)
        assert await value(conn, "select current_setting('application_name')") == "mine"


async def test_configure_that_leaves_a_transaction_is_refused(pgconductor_empty_dsn: str) -> None:
    """Would break if every user of the pool began inside somebody else's transaction."""

    async def configure(conn: Connection) -> None:
        await conn.execute("select 1")

    async with open_pool(pgconductor_empty_dsn, configure=configure) as pool:
        with pytest.raises(psycopg.ProgrammingError, match="commit in it"):
            async with pool.connection():
                pass
        assert pool.statistics().connecting == 0


async def test_old_and_idle_connections_are_replaced(pgconductor_empty_dsn: str) -> None:
    """Would break if max_lifetime or max_idle were ignored on hand-out."""
    async with open_pool(pgconductor_empty_dsn, max_lifetime=1e-6) as pool:
        assert await pid(pool) != await pid(pool)
    async with open_pool(pgconductor_empty_dsn, max_idle=1e-6) as pool:
        assert await pid(pool) != await pid(pool)
    async with open_pool(pgconductor_empty_dsn, max_idle=1e-6, min_size=1) as pool:
        assert await pid(pool) == await pid(pool)


# Failures


async def test_terminated_idle_connections_are_replaced_unseen(pgconductor_empty_dsn: str) -> None:
    """Would break if, after a restart of the server, callers got the connections that died with it."""
    async with open_pool(pgconductor_empty_dsn, max_size=4) as pool:
        async with pool.connection(), pool.connection(), pool.connection():
            pass
        async with await Connection.connect(pgconductor_empty_dsn) as admin:
            await admin.execute(
                "select pg_terminate_backend(pid, 10000) from pg_stat_activity"
                " where pid <> pg_backend_pid() and datname = current_database() and backend_type = 'client backend'"
            )
        for _ in range(4):
            async with pool.connection() as conn:
                assert await value(conn, "select 1") == 1
        assert pool.statistics().discarded >= 1


async def test_connection_lost_in_use_is_replaced(pgconductor_empty_dsn: str) -> None:
    """Would break if a broken connection went back to the pool, or hid the error of the block."""
    async with open_pool(pgconductor_empty_dsn, max_size=1) as pool:
        with pytest.raises(psycopg.OperationalError):
            async with pool.connection() as conn:
                await conn.execute("select pg_terminate_backend(pg_backend_pid())")
        assert pool.statistics().idle == 0
        assert await pid(pool)


async def test_long_idle_connection_is_probed(pgconductor_empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break if a half-open connection, which only a round trip reveals, were lent."""
    monkeypatch.setattr("pgconductor.db.pool._PROBE_AFTER", 0.0)
    monkeypatch.setattr("pgconductor.db.pool._PROBE_TIMEOUT", 0.05)
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, open_pool(proxy.dsn, max_size=1) as pool:
        first = await pid(pool)
        assert await pid(pool) == first
        proxy.blackhole(first)
        assert await pid(pool) != first


async def test_former_primary_is_not_used_again(pgconductor_empty_dsn: str) -> None:
    """Would break if, after a failover, the pool kept connections to a server that only reads."""
    async with open_pool(pgconductor_empty_dsn, max_size=1) as pool:
        first = await pid(pool)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):  # noqa: PT012
            async with pool.connection() as conn:
                await conn.execute("set transaction read only")
                await conn.execute("create table t (n int)")
        assert await pid(pool) != first


# Opening and closing


async def test_closed_pool_refuses_and_wakes_who_waits(pgconductor_empty_dsn: str) -> None:
    """Would break if tasks waited on a pool that is gone, or if its connections stayed open."""

    async def is_refused(pool: Pool[Connection]) -> None:
        with pytest.raises(NotOpen):
            async with pool.connection():
                pass

    async with trio.open_nursery() as nursery:
        async with open_pool(pgconductor_empty_dsn, max_size=1) as pool:
            lent = pool.connection()
            conn = await lent.__aenter__()
            nursery.start_soon(is_refused, pool)
            await trio.testing.wait_all_tasks_blocked()
        assert repr(pool).startswith("<Pool closed")
        assert await value(conn, "select 1") == 1  # in use: closed when it comes back
        await lent.__aexit__(None, None, None)
        assert conn.closed
        await is_refused(pool)
    with pytest.raises(NotOpen):
        async with open_pool(pgconductor_empty_dsn).connection():
            pass
    async with open_pool(pgconductor_empty_dsn) as pool:
        with pytest.raises(Misuse, match="open already"):
            await pool.__aenter__()


@pytest.mark.parametrize(
    "options",
    [
        {"max_size": 0},
        {"min_size": 5},
        {"min_size": -1},
        {"timeout": 0.0},
        {"max_idle": -1.0},
        {"max_lifetime": float("nan")},
    ],
)
async def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    """Would break if a pool that can never work were made."""
    with pytest.raises(InvalidOption, match=next(iter(options))):
        open_pool("", **options)
