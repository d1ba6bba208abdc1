"""Sending from programs: without an event loop, in a caller's transaction, and when the reply is lost."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from client.database import rows, value

from pgconductor import Conductor, Context, InvalidOption, Orchestrator, PromiseAnswer, Unavailable
from pgconductor.testing.proxy import open_chaos_proxy


async def test_sync_client_sends_and_reads(pgconductor_dsn: str) -> None:
    """A program without an event loop cannot approve, or shows no progress."""
    conductor = Conductor(pgconductor_dsn)
    given: list[UUID] = []

    @conductor.task
    async def ask(ctx: Context) -> list[Any]:
        await ctx.set_progress("asked")
        promise = await ctx.promise("p")
        await ctx.step("give", given.append, promise.id)
        return [await ctx.wait_for_event("e"), await ctx.receive("m"), await promise.result()]

    with conductor.sync() as client:
        handle = client.invoke(ask)
        assert handle.progress() is None
        async with conductor:
            await Orchestrator(conductor, tasks=[ask]).drain()
        assert handle.progress() == "asked"
        assert client.progress(handle.id) == client.progress(handle) == "asked"
        assert client.emit("e", {"n": 1}, retention=60) > 0
        assert handle.send("m", 2)
        assert not client.send(uuid4(), "m")
        assert client.resolve_promise(given[0], [3]) is PromiseAnswer.RESOLVED
        assert client.reject_promise(given[0]) is PromiseAnswer.ALREADY
        async with conductor:
            await Orchestrator(conductor, tasks=[ask]).drain()
        assert handle.result(0) == [{"n": 1}, 2, [3]]


async def test_executions_are_named_by_handle_or_id(pgconductor_dsn: str) -> None:
    """One verb takes a handle and the next does not, or PostgreSQL says what is wrong, in its words."""
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        handle = await conductor.invoke("nothing")
        for each in (handle, handle.id):
            assert await conductor.progress(each) is None
            assert await conductor.execution_errors(each) == []
            assert await conductor.steps(each) == []
            assert (await conductor.status(each)) == await handle.status()
            assert conductor.channel(each, "c").execution_id == handle.id
        wrong: Any = str(handle.id)
        for verb in (conductor.progress, conductor.execution_errors, conductor.steps, conductor.status):
            with pytest.raises(InvalidOption, match="handles and ids"):
                await verb(wrong)
        with pytest.raises(InvalidOption, match="handles and ids"):
            conductor.channel(wrong, "c")


def test_sync_client_sends_in_the_callers_transaction(pgconductor_dsn: str) -> None:
    """An event of a transaction that never was."""
    with Conductor(pgconductor_dsn).sync() as client, psycopg.connect(pgconductor_dsn) as conn:
        client.emit("e", 1, conn=conn)
        conn.rollback()
        client.emit("e", 2, conn=conn)
        assert rows(pgconductor_dsn, "select payload from pgconductor._private_events") == []
        conn.commit()
    assert rows(pgconductor_dsn, "select payload from pgconductor._private_events") == [(2,)]


async def test_lost_reply_sends_nothing_twice(pgconductor_dsn: str) -> None:
    """An event that is sent again unasked is received twice by a loop."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy, Conductor(proxy.dsn) as conductor:
        proxy.cut_reply(b"/*emit*/")
        with pytest.raises(Unavailable):
            await conductor.emit("e", 1)
    assert value(pgconductor_dsn, "select count(*) from pgconductor._private_events") == 1


async def test_connection_of_another_kind_is_refused(pgconductor_dsn: str) -> None:
    """psycopg's own connection would block the loop."""
    async with Conductor(pgconductor_dsn) as conductor:
        with psycopg.connect(pgconductor_dsn) as conn, pytest.raises(InvalidOption):
            await conductor.emit("e", conn=conn)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
