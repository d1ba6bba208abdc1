"""Durable channels through an orchestrator: replays, back-pressure, readers on Trio and in threads."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import trio
import trio.testing
from runtime.workplace import until

from pgconductor import Conductor, Context, DurableMisuse, InvalidOption, Orchestrator, ResultNotKept

LIMIT = 20.0


async def test_items_come_in_order_and_once_though_the_handler_begins_anew(conductor: Conductor) -> None:
    """A replay sends again, or its readers see the end at the first suspension."""
    runs = 0

    @conductor.task
    async def stream(ctx: Context, count: int) -> None:
        nonlocal runs
        runs += 1
        async with await ctx.open_channel("lines") as lines:
            for n in range(count):
                await lines.send({"n": n})
                if n % 3 == 0:
                    await ctx.sleep(f"nap-{n}", 0.03)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[stream]).run)
        handle = await stream.invoke(10)
        with trio.fail_after(LIMIT):
            assert [item async for item in handle.channel("lines", type=dict[str, int])] == [
                {"n": n} for n in range(10)
            ]
            await handle.result()
            assert [item["n"] async for item in handle.channel("lines", after=7)] == [7, 8, 9]  # it is over, and kept
        nursery.cancel_scope.cancel()
    assert runs > 1


async def test_plain_function_sends_each_item_once_and_closes(conductor: Conductor) -> None:
    """A plain function can stream nothing, or tells readers that it is over each time it begins to wait."""
    runs = 0

    @conductor.task
    def stream(ctx: Context, count: int) -> list[str]:
        nonlocal runs
        runs += 1
        with ctx.sync.open_channel("lines", capacity=2) as lines:
            for n in range(count):
                lines.send({"n": n})
                if n % 3 == 0:
                    ctx.sync.sleep(f"nap-{n}", 0.03)
        try:
            lines.send("more")
        except DurableMisuse as error:
            return [lines.name, str(error)]
        return []

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[stream]).run)
        handle = await stream.invoke(10)
        with trio.fail_after(LIMIT):
            assert [item async for item in handle.channel("lines")] == [{"n": n} for n in range(10)]
            assert await handle.result() == ["lines", "channel 'lines': send: it is closed"]
        nursery.cancel_scope.cancel()
    assert runs > 1


async def test_channel_goes_on_when_its_execution_continues_as_new(conductor: Conductor) -> None:
    """What a later life sends is swallowed, as if it were a replay of the first."""

    @conductor.task
    async def stream(ctx: Context, life: int) -> None:
        lines = await ctx.open_channel("lines")
        for n in range(3 - life):
            await lines.send([life, n])
        await ctx.sleep("nap", 0.03)
        if life < 2:
            await ctx.continue_as_new(life=life + 1)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[stream]).run)
        handle = await stream.invoke(0)
        reader = handle.channel("lines")
        with trio.fail_after(LIMIT):
            assert [item async for item in reader] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0]]
        assert reader.position == 6
        nursery.cancel_scope.cancel()


async def test_sender_waits_until_a_reader_has_caught_up(conductor: Conductor, query: Any) -> None:
    """A bound that does not bind, or a sender that nobody wakes."""
    sent: list[int] = []

    @conductor.task
    async def stream(ctx: Context) -> None:
        channel = await ctx.open_channel("c", capacity=2)
        for n in range(6):
            await channel.send(n)
            sent.append(n)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[stream]).run)
        handle = await stream.invoke()
        await until(lambda: len(sent) == 2)
        reader = handle.channel("c", type=int)
        seen: list[int] = []
        with trio.fail_after(LIMIT):
            async for item in reader:
                seen.append(item)
                assert len(sent) <= item + 3 + 1  # those in the reader's hand count as unread
        assert seen == list(range(6))
        assert reader.position == 6
        nursery.cancel_scope.cancel()


async def test_item_is_announced_to_a_reader_that_waits(conductor: Conductor) -> None:
    """It learns of it by a poll, seconds later."""
    go = trio.Event()
    conductor._poll_schedule = type(conductor._poll_schedule)(first=(), every=60.0, deaf=60.0)

    @conductor.task
    async def stream(ctx: Context) -> None:
        channel = await ctx.open_channel("c")
        await channel.send(0)
        await ctx.step("wait", go.wait)
        await channel.send(1)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[stream]).run)
        reader = (await stream.invoke()).channel("c")
        with trio.fail_after(LIMIT):
            assert await anext(reader) == 0
            async with trio.open_nursery() as waiting:

                @waiting.start_soon
                async def _() -> None:
                    assert await anext(reader) == 1

                await until(lambda: _is_listening(conductor))
                go.set()
            with pytest.raises(StopAsyncIteration):
                await anext(reader)
        nursery.cancel_scope.cancel()


def _is_listening(conductor: Conductor) -> bool:
    with psycopg.connect(conductor.conninfo) as conn:
        return conn.execute(
            "select exists (select from pg_locks l join pg_stat_activity a on a.pid = l.pid"
            " where l.locktype = 'advisory' and a.application_name = 'pgconductor results')"
        ).fetchall() == [(True,)]


async def test_thread_reads_a_channel(conductor: Conductor) -> None:
    """A program without an event loop cannot follow."""

    @conductor.task
    async def stream(ctx: Context) -> None:
        channel = await ctx.open_channel("c")
        for n in range(3):
            await channel.send(n)
            await ctx.sleep(f"nap-{n}", 0.02)
        await channel.aclose()

    def read(execution: UUID) -> list[int]:
        with conductor.sync() as client:
            return list(client.channel(execution, "c", type=int))

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[stream]).run)
        handle = await stream.invoke()
        with trio.fail_after(LIMIT):
            assert await trio.to_thread.run_sync(read, handle.id) == [0, 1, 2]
        nursery.cancel_scope.cancel()


async def test_what_a_channel_is_not_for_is_refused(conductor: Conductor) -> None:
    """Two branches that send in an order that no replay repeats; an item after the end."""
    caught: list[str] = []

    @conductor.task(max_attempts=1)
    async def stream(ctx: Context) -> None:
        channel = await ctx.open_channel("c", capacity=1)
        await channel.send(1)
        with trio.move_on_after(0.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.send, 2)  # full
                await trio.testing.wait_all_tasks_blocked()
                try:
                    await channel.send(3)
                except DurableMisuse as error:
                    caught.append(str(error))
        await channel.aclose()
        await channel.aclose()
        for call in (lambda: channel.send(4), lambda: ctx.open_channel("c"), lambda: ctx.open_channel("d", capacity=0)):
            try:
                await call()
            except (DurableMisuse, InvalidOption) as error:
                caught.append(str(error))

    async with conductor:
        handle = await stream.invoke()
        await Orchestrator(conductor, tasks=[stream]).drain()
        await handle.result(0)
        with pytest.raises(ResultNotKept):
            await anext(conductor.channel(uuid4(), "c"))
    reasons = ("another task", "it is closed", "used before", "capacity")
    assert [reason in said for reason, said in zip(reasons, caught, strict=True)] == [True] * 4
