"""TrioConnection against a real server: psycopg's verbs, Trio's rules, connecting, notifications and closing.

What happens when a call is cancelled is in `test_cancellation.py`. No test sleeps in order to wait: they wait for a
blocked task, an event, or what the server shows.
"""

from __future__ import annotations

import asyncio  # noqa: TID251 - the other event loop, whose users are told
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
import trio
import trio.testing
from db.sessions import Connection, connected, value
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo
from psycopg.rows import DictRow, dict_row
from psycopg.waiting import Wait

from pgconductor.db.connection import TrioConnection
from pgconductor.testing.proxy import open_chaos_proxy


async def is_lost(call: Callable[..., Awaitable[object]], *args: object) -> None:
    with pytest.raises(psycopg.OperationalError):
        await call(*args)


# psycopg's verbs


async def test_statement_returns_its_rows(pgconductor_empty_dsn: str) -> None:
    """Would break if the generator protocol were driven wrongly, prepared statements included."""
    async with connected(pgconductor_empty_dsn) as conn:
        for number in range(12):  # past prepare_threshold
            assert await value(conn, "select %s::int", number) == number


async def test_large_statement_and_reply_do_not_deadlock(pgconductor_empty_dsn: str) -> None:
    """Would break if, while sending, the connection did not also read: both sides' buffers are full here."""
    async with connected(pgconductor_empty_dsn) as conn:
        text = "x" * 20_000_000
        with trio.fail_after(60):
            cursor = await conn.execute("select %s::text", [text])
            assert await cursor.fetchone() == (text,)


async def test_pipeline_larger_than_the_buffers_does_not_deadlock(pgconductor_empty_dsn: str) -> None:
    """Would break if waiting for "readable or writable" waited for only one of them."""
    async with connected(pgconductor_empty_dsn) as conn, conn.pipeline():
        with trio.fail_after(60):
            cursors = [await conn.execute("select %s::int, repeat('x', 20000)", [n]) for n in range(2000)]
            numbers = [row[0] for cursor in cursors if (row := await cursor.fetchone())]
    assert numbers == list(range(2000))


async def test_executemany_keeps_order(pgconductor_empty_dsn: str) -> None:
    """Would break if the implicit pipeline lost or mixed replies."""
    async with connected(pgconductor_empty_dsn) as conn, conn.cursor() as cursor:
        await cursor.executemany("select %s::int", [(n,) for n in range(500)], returning=True)
        numbers = [await (await cursor.set_result(n)).fetchone() for n in range(500)]
        assert numbers == [(n,) for n in range(500)]


async def test_copy_in_and_out_round_trips(pgconductor_empty_dsn: str) -> None:
    """Would break if COPY, which holds the lock over many waits, were driven wrongly."""
    rows = [(n, f"row {n}") for n in range(5000)]
    async with connected(pgconductor_empty_dsn) as conn, conn.cursor() as cursor:
        await conn.execute("create temp table t (n int, s text)")
        async with cursor.copy("copy t from stdin") as copy:
            for row in rows:
                await copy.write_row(row)
        async with cursor.copy("copy (select * from t order by n) to stdout") as copy:
            copy.set_types(["int4", "text"])
            assert [row async for row in copy.rows()] == rows


async def test_server_cursor_reads_in_pages(pgconductor_empty_dsn: str) -> None:
    """Would break if server-side cursors did not come unchanged from psycopg."""
    async with connected(pgconductor_empty_dsn) as conn, conn.transaction(), conn.cursor("pages") as cursor:
        await cursor.execute("select generate_series(1, 1000)")
        assert [row[0] async for row in cursor] == list(range(1, 1001))


async def test_stream_yields_every_row(pgconductor_empty_dsn: str) -> None:
    """Would break if single-row mode lost rows."""
    async with connected(pgconductor_empty_dsn) as conn, conn.cursor() as cursor:
        assert [row[0] async for row in cursor.stream("select generate_series(1, 1000)")] == list(range(1, 1001))


async def test_abandoned_stream_leaves_the_connection_usable(pgconductor_empty_dsn: str) -> None:
    """Would break if a stream that is closed early left its query running."""
    async with connected(pgconductor_empty_dsn) as conn, conn.cursor() as cursor:
        rows = cursor.stream("select generate_series(1, 100000000)")
        assert await anext(rows) == (1,)
        await rows.aclose()  # type: ignore[attr-defined]
        assert conn.is_clean
        assert await value(conn, "select 7") == 7


async def test_nested_transactions_roll_back_alone(pgconductor_empty_dsn: str) -> None:
    """Would break if leaving the inner block ended more than its savepoint."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")
        async with conn.transaction():
            await conn.execute("insert into t values (1)")
            with pytest.raises(psycopg.errors.DivisionByZero):  # noqa: PT012
                async with conn.transaction():
                    await conn.execute("insert into t values (2)")
                    await conn.execute("select 1/0")
            await conn.execute("insert into t values (3)")
        assert await value(conn, "select array_agg(n) from t") == [1, 3]


async def test_transaction_in_pipeline_commits(pgconductor_empty_dsn: str) -> None:
    """Would break if the override of `transaction()` forgot psycopg's synchronisation points."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("create temp table t (n int)")
        async with conn.pipeline(), conn.transaction():
            await conn.execute("insert into t values (1)")
        assert await value(conn, "select count(*) from t") == 1
        assert conn.is_clean


async def test_leaving_the_block_commits_or_rolls_back_and_closes(pgconductor_empty_dsn: str) -> None:
    """Would break if `async with conn` did not end as psycopg's does."""
    async with await Connection.connect(pgconductor_empty_dsn) as conn:
        await conn.execute("create table t (n int)")
    assert conn.closed
    failed = await Connection.connect(pgconductor_empty_dsn)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with failed:
            await failed.execute("insert into t values (1)")
            raise ZeroDivisionError
    assert failed.closed
    async with connected(pgconductor_empty_dsn) as conn:
        assert await value(conn, "select count(*) from t") == 0


async def test_block_closes_even_if_its_commit_fails(pgconductor_empty_dsn: str) -> None:
    """Would break if the commit's error left an open connection behind."""
    async with connected(pgconductor_empty_dsn) as admin:
        await admin.execute("create table t (n int unique deferrable initially deferred)")
    conn = await Connection.connect(pgconductor_empty_dsn)
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with conn:
            await conn.execute("insert into t values (1), (1)")
    assert conn.closed


async def test_row_factory_and_settings_of_connect_are_used(pgconductor_empty_dsn: str) -> None:
    """Would break if connect() dropped an argument."""
    conn = await TrioConnection[DictRow].connect(
        pgconductor_empty_dsn, autocommit=True, prepare_threshold=None, row_factory=dict_row, application_name="here"
    )
    async with conn:
        assert conn.autocommit
        assert conn.prepare_threshold is None
        cursor = await conn.execute("select current_setting('application_name') as name")
        assert await cursor.fetchone() == {"name": "here"}


async def test_two_phase_commit_works(pgconductor_empty_dsn: str) -> None:
    """Would break if the lock or wait did not serve the two-phase verbs (the test server allows none: it says so)."""
    async with connected(pgconductor_empty_dsn, autocommit=False) as conn:
        await conn.tpc_begin("x")
        await conn.execute("select 1")
        if int(conn.info.parameter_status("max_prepared_transactions") or 0):
            await conn.tpc_prepare()
        await conn.tpc_rollback()
        assert conn.is_clean


# Trio's rules


async def test_every_call_is_a_checkpoint(pgconductor_empty_dsn: str) -> None:
    """Would break if a call whose reply is there already, or that has nothing to do, starved other tasks."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("listen c; notify c; notify c")
        with trio.testing.assert_checkpoints():
            await conn.execute("select 1")
        with trio.testing.assert_checkpoints():
            await conn.commit()
        with trio.testing.assert_checkpoints():
            await conn.set_read_only(None)
        with trio.testing.assert_checkpoints():
            await conn.receive_notifies()
        with trio.testing.assert_checkpoints():
            await conn.cancel_safe()
        async with conn.cursor() as cursor, cursor.copy("copy (select 1) to stdout") as copy:
            with trio.testing.assert_checkpoints():
                await copy.read()
        with trio.testing.assert_checkpoints():
            await conn.close()
        with trio.testing.assert_checkpoints():
            await conn.close()


async def test_writing_without_end_lets_others_run(pgconductor_empty_dsn: str) -> None:
    """Would break if a socket that is always writable (a long executemany) kept the scheduler from other tasks."""
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    def write_gen() -> PQGen[None]:
        for _ in range(1000):
            yield Wait.W

    async with connected(pgconductor_empty_dsn) as conn, trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        async with conn.lock:
            await conn.wait(write_gen())
        assert turns >= 10
        nursery.cancel_scope.cancel()


async def test_tasks_take_turns_in_order(pgconductor_empty_dsn: str) -> None:
    """Would break if the lock were unfair, or let two statements mix."""
    order: list[int] = []

    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        await other.execute("select pg_advisory_lock(1)")

        async def use(number: int) -> None:
            assert await value(conn, "select %s::int + 0 * count(*)::int from pg_stat_activity", number) == number
            order.append(number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(value, conn, "select pg_advisory_lock(1)")
            await trio.testing.wait_all_tasks_blocked()
            for number in range(10):
                nursery.start_soon(use, number)
                await trio.testing.wait_all_tasks_blocked()
            await other.execute("select pg_advisory_unlock(1)")
    assert order == list(range(10))


async def test_statement_inside_a_stream_of_the_same_task_is_refused(pgconductor_empty_dsn: str) -> None:
    """Would break if a task that waits for itself hung instead of being told."""
    async with connected(pgconductor_empty_dsn) as conn, conn.cursor() as cursor:
        rows = cursor.stream("select generate_series(1, 3)")
        await anext(rows)
        with pytest.raises(psycopg.InterfaceError, match="already using the connection"):
            await conn.execute("select 1")
        await rows.aclose()  # type: ignore[attr-defined]
        assert await value(conn, "select 1") == 1


def test_outside_trio_the_remedy_is_named(pgconductor_empty_dsn: str) -> None:
    """Would break if a user of asyncio got Trio's inner error, or a connection that hangs."""
    with pytest.raises(psycopg.InterfaceError, match=r"trio\.run"):
        asyncio.run(Connection.connect(pgconductor_empty_dsn))

    conn = trio.run(Connection.connect, pgconductor_empty_dsn)
    with pytest.raises(psycopg.InterfaceError, match=r"trio\.run"):
        asyncio.run(conn.execute("select 1"))
    with pytest.raises(psycopg.InterfaceError, match=r"trio\.run"):
        asyncio.run(conn.wait(conn._commit_gen()))  # pyright: ignore[reportPrivateUsage]
    trio.run(conn.close)


async def test_use_after_fork_is_refused(pgconductor_empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break if a forked child wrote to its parent's connection (the pid is faked: a child's run is no test)."""
    async with connected(pgconductor_empty_dsn) as conn:
        with monkeypatch.context() as patch:
            pid = os.getpid()
            patch.setattr("os.getpid", lambda: pid + 1)
            for call in (conn.execute("select 1"), conn.receive_notifies(0), conn.close(), conn.cancel_safe()):
                with pytest.raises(psycopg.InterfaceError, match="after the fork"):
                    await call
        assert await value(conn, "select 1") == 1


# Connecting


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


async def test_second_host_is_used_when_the_first_refuses(pgconductor_empty_dsn: str) -> None:
    """Would break if a list of hosts stopped at the first failure."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy:
        dsn = make_conninfo(proxy.dsn, host="127.0.0.1,127.0.0.1", port=f"{_free_port()},{proxy.port}")
        async with connected(dsn) as conn:
            assert conn.info.port == proxy.port


async def test_deaf_host_costs_one_timeout(pgconductor_empty_dsn: str, autojump_clock: trio.testing.MockClock) -> None:
    """Would break if an attempt were unbounded: the first host accepts and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, pytest.raises(psycopg.errors.ConnectionTimeout, match="connection timeout expired after 3 s"):
        await Connection.connect(host="127.0.0.1", port=listener.getsockname()[1], connect_timeout=3, dbname="x")
    assert trio.current_time() == pytest.approx(3, abs=0.5)


async def test_error_lists_every_attempt_and_no_password() -> None:
    """Would break if the user could not see which host failed why, or if a secret got into the message."""
    first, second = _free_port(), _free_port()
    with pytest.raises(psycopg.OperationalError) as caught:
        await Connection.connect(host="127.0.0.1,127.0.0.1", port=f"{first},{second}", password="s3cret", dbname="x")
    message = str(caught.value)
    assert str(first) in message
    assert str(second) in message
    assert "s3cret" not in message


async def test_target_session_attrs_chooses_among_hosts(pgconductor_empty_dsn: str) -> None:
    """Would break if a server of the wrong kind were used; this one is a primary."""
    with pytest.raises(psycopg.OperationalError):
        await Connection.connect(pgconductor_empty_dsn, target_session_attrs="standby")
    async with connected(pgconductor_empty_dsn, target_session_attrs="primary"):
        pass
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy:
        dsn = make_conninfo(proxy.dsn, host="127.0.0.1,127.0.0.1", port=f"{proxy.port},{proxy.port}")
        async with connected(dsn, target_session_attrs="prefer-standby") as conn:
            assert await value(conn, "select 1") == 1
        assert proxy.accepted == 3  # both asked for a standby, then the first taken as it is


async def test_names_are_looked_up_by_trio_and_every_address_is_tried(pgconductor_empty_dsn: str) -> None:
    """Would break if libpq looked the name up and blocked the event loop."""

    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> list[Any]:
            assert host in (b"db.example", "db.example")
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("127.0.0.2", "127.0.0.1")]

        async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
            raise AssertionError("nobody asks for a name")

    trio.socket.set_custom_hostname_resolver(Resolver())
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, connected(proxy.dsn, host="db.example") as conn:
        assert conn.info.hostaddr == "127.0.0.1"
        assert conn.info.host == "db.example"


async def test_unknown_name_is_an_operational_error() -> None:
    """Would break if the resolver's OSError reached the user."""
    with pytest.raises(psycopg.OperationalError, match="failed to resolve host"):
        await Connection.connect(host="no-such-host.invalid", dbname="x")


async def test_mismatched_lists_of_hosts_are_refused() -> None:
    """Would break if ports were paired with the wrong hosts."""
    with pytest.raises(psycopg.OperationalError, match="could not match 2 port numbers to 3 hosts"):
        await Connection.connect(host="a,b,c", port="1,2")
    with pytest.raises(psycopg.OperationalError, match="could not match 2 host names to 1 hostaddr values"):
        await Connection.connect(host="a,b", hostaddr="127.0.0.1")


# Notifications


async def test_notification_wakes_the_waiting_task(pgconductor_empty_dsn: str) -> None:
    """Would break if waiting for notifications did not wait for the socket."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        await conn.execute("listen c")
        received: list[psycopg.Notify] = []

        async def receive() -> None:
            received.extend(await conn.receive_notifies())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await other.execute("notify c, 'hello'")
        assert [(n.channel, n.payload, n.pid) for n in received] == [("c", "hello", other.info.backend_pid)]


async def test_notifications_that_arrive_with_statements_are_kept(pgconductor_empty_dsn: str) -> None:
    """Would break if those that psycopg or libpq read in mid-statement were lost, or waited for new traffic."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("listen c")
        for number in range(20):
            await conn.execute(f"notify c, '{number}'".encode())
        received: list[str] = []
        with trio.fail_after(10):
            while len(received) < 20:
                received += [n.payload for n in await conn.receive_notifies()]
        assert received == [str(n) for n in range(20)]


async def test_receive_without_notification_ends_after_the_timeout(pgconductor_empty_dsn: str) -> None:
    """Would break if the timeout were ignored; 0 looks once and finds what has arrived."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        assert await conn.receive_notifies(0.01) == []
        assert await conn.receive_notifies(0) == []
        await conn.execute("listen c")
        await other.execute("notify c")
        await trio.lowlevel.wait_readable(conn.fileno())
        assert len(await conn.receive_notifies(0)) == 1


async def test_notifies_stops_and_keeps_the_rest(pgconductor_empty_dsn: str) -> None:
    """Would break if stopping early lost notifications, or if the generator held the connection between two."""
    async with connected(pgconductor_empty_dsn) as conn:
        await conn.execute("listen c")
        await conn.execute("notify c, '1'; notify c, '2'; notify c, '3'")
        seen: list[str] = []
        async for notify in conn.notifies(stop_after=2):
            assert await value(conn, "select 5") == 5
            seen.append(notify.payload)
        seen += [n.payload for n in await conn.receive_notifies(0)]
        assert seen == ["1", "2", "3"]
        assert [n async for n in conn.notifies(timeout=0.01)] == []


async def test_notify_handler_excludes_receiving(pgconductor_empty_dsn: str) -> None:
    """Would break if two mechanisms competed for notifications in silence."""
    async with connected(pgconductor_empty_dsn) as conn:
        conn.add_notify_handler(lambda notify: None)
        with pytest.raises(psycopg.InterfaceError, match="notify handler"):
            await conn.receive_notifies(0)


async def test_receiving_reports_a_lost_connection(pgconductor_empty_dsn: str) -> None:
    """Would break if a listener whose server process ended waited for ever."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(is_lost, conn.receive_notifies)
            await trio.testing.wait_all_tasks_blocked()
            await other.execute("select pg_terminate_backend(%s)", [conn.info.backend_pid])
        assert conn.closed


# Closing


@pytest.mark.parametrize("what", ["statement", "notifies", "copy"])
async def test_closing_wakes_the_waiting_task(pgconductor_empty_dsn: str, what: str) -> None:
    """Would break if a task whose connection another one closes hung, or read from a closed descriptor."""
    async with connected(pgconductor_empty_dsn) as conn:

        async def wait() -> None:
            with pytest.raises(psycopg.OperationalError, match="closed"):  # noqa: PT012
                if what == "statement":
                    await conn.execute("select pg_sleep(60)")
                elif what == "notifies":
                    await conn.receive_notifies()
                else:
                    async with conn.cursor() as cursor, cursor.copy("copy (select pg_sleep(60)) to stdout") as copy:
                        await copy.read()

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                await conn.close()
        assert conn.closed
        assert not conn.broken


async def test_lost_server_process_is_an_operational_error(pgconductor_empty_dsn: str) -> None:
    """Would break if the end of the stream in mid-statement were not noticed."""
    async with connected(pgconductor_empty_dsn) as conn, connected(pgconductor_empty_dsn) as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(is_lost, value, conn, "select pg_sleep(60)")
            await trio.testing.wait_all_tasks_blocked()
            await other.execute("select pg_terminate_backend(%s)", [conn.info.backend_pid])
        assert conn.closed


async def test_probe_and_hang_up_tell_a_living_connection_from_a_dead_one(pgconductor_empty_dsn: str) -> None:
    """Would break if the pool lent a connection whose server is gone, or dropped one that only got a notification."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, connected(pgconductor_empty_dsn) as other:
        async with connected(proxy.dsn) as conn:
            await conn.execute("listen c")
            await other.execute("notify c")
            await trio.lowlevel.wait_readable(conn.fileno())
            assert not conn.has_hung_up()
            assert len(await conn.receive_notifies(0)) == 1
            assert await conn.probe(5)
            proxy.blackhole(conn.info.backend_pid)
            assert not conn.has_hung_up()  # half-open: only a round trip tells
            assert not await conn.probe(0.05)
            assert conn.closed
        async with connected(pgconductor_empty_dsn) as conn:
            await other.execute("select pg_terminate_backend(%s)", [conn.info.backend_pid])
            await trio.lowlevel.wait_readable(conn.fileno())
            with trio.fail_after(5):
                while not conn.has_hung_up():
                    await trio.lowlevel.wait_readable(conn.fileno())


async def test_cut_reply_is_an_error_and_the_statement_took_effect(pgconductor_empty_dsn: str) -> None:
    """Would break if the proxy's ambiguous commit were not one: the client sees an error, the row is there."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, connected(pgconductor_empty_dsn) as other:
        await other.execute("create table t (n int)")
        async with connected(proxy.dsn) as conn:
            proxy.cut_reply(b"/*cut*/")
            with pytest.raises(psycopg.OperationalError):
                await conn.execute("insert into t values (1) /*cut*/")
        assert proxy.cuts == 1
        assert await value(other, "select count(*) from t") == 1


async def test_reset_and_refused_connections_are_operational_errors(pgconductor_empty_dsn: str) -> None:
    """Would break if a reset in mid-statement hung, or if the proxy could not refuse and mend."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy:
        async with connected(proxy.dsn) as conn, trio.open_nursery() as nursery:
            nursery.start_soon(is_lost, value, conn, "select pg_sleep(60)")
            await trio.testing.wait_all_tasks_blocked()
            proxy.rst(conn.info.backend_pid)
        proxy.refuse()
        with pytest.raises(psycopg.OperationalError):
            await Connection.connect(proxy.dsn)
        await proxy.mend()
        async with connected(proxy.dsn) as conn:
            assert await value(conn, "select 1") == 1


async def test_delayed_and_frozen_replies_arrive_whole(pgconductor_empty_dsn: str) -> None:
    """Would break if the proxy lost or reordered bytes when it is slow."""
    async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, connected(proxy.dsn) as conn:
        proxy.delay(0.01, 0.01)
        assert await value(conn, "select md5(repeat('x', 1000000))") == await value(
            conn, "select md5(repeat('x', 1000000))"
        )
        proxy.freeze()
        with trio.move_on_after(0.05) as scope:
            conn.cleanup_timeout = 0.05
            await conn.execute("select 1")
        assert scope.cancelled_caught
        await proxy.mend()
