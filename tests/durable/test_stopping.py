"""Ends of the process, of the lease and of the attempt while a handler is durable: nothing is cancelled by them."""

from __future__ import annotations

from datetime import timedelta

import pytest
import trio
from durable.site import LIMIT, Site

from pgconductor import Context, Orchestrator


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_end_of_an_orchestrator_cancels_no_children_of_parked_handlers(site: Site, how: str) -> None:
    """A deploy would cancel what the fleet is working on: the parked handler's scope is cancelled, but not by it."""
    parked = trio.Event()

    @site.conductor.task(queue="far")
    async def child(n: int) -> int:
        return n

    @site.conductor.task(queue="near")
    async def parent(ctx: Context) -> int:
        async with ctx.nursery("all") as nursery:
            handles = [nursery.invoke(child, n=n) for n in range(3)]
            await nursery.start_children()

            async def hold() -> None:
                parked.set()
                if not is_released:
                    await trio.sleep_forever()

            async def alone() -> None:
                await ctx.invoke("alone", child, n=5)

            async with trio.open_nursery() as tasks:
                tasks.start_soon(alone)
                tasks.start_soon(ctx.step, "hold", hold)
        return sum([await handle.result() for handle in handles])

    is_released = False
    with trio.fail_after(LIMIT):
        async with site.conductor:
            handle = await parent.invoke()
        with trio.CancelScope() as scope:
            async with site.running(parent, child, grace=0.0, queues=["near"]):
                await parked.wait()
                await site.until(lambda: len(site.children(handle.id)) == 4)
                if how == "cancel":
                    scope.cancel()
        assert site.state(handle.id) == "ready"
        assert {row[2] for row in site.children(handle.id)} == {"ready"}
        assert site.rows("select count(*) from pgconductor._private_closings") == [(0,)]
        is_released = True
        async with site.running(parent, child):
            assert await handle.result() == 3
    assert site.attempt(handle.id) == 1


async def test_checkpoint_gives_an_execution_back_at_no_cost(site: Site) -> None:
    """A long handler would hold up a deploy for all of its grace, or be cut anywhere."""
    begun, stopped = trio.Event(), trio.Event()
    runs: list[int] = []

    @site.conductor.task(max_attempts=1)
    async def handler(ctx: Context) -> str:
        for n in range(3):
            await ctx.step(f"part {n}", runs.append, n)
            if n == 1:
                begun.set()
                await ctx.step("until it stops", stopped.wait)
            await ctx.checkpoint()
        return "done"

    with trio.fail_after(LIMIT):
        async with site.running(handler) as orchestrator:
            handle = await handler.invoke()
            await begun.wait()
            orchestrator.stop()
            stopped.set()
        assert site.rows("select state::text, attempt, crashes from pgconductor.executions") == [("ready", 0, 0)]
        async with site.running(handler):
            assert await handle.result() == "done"
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("where", ["step", "wait"])
async def test_lost_lease_in_the_middle_costs_a_run_and_no_record(site: Site, where: str) -> None:
    """A zombie would write for a claim that is another's, or its children be cancelled."""
    runs = 0
    begun = trio.Event()
    ran: list[str] = []

    @site.conductor.task
    async def child(ctx: Context) -> str:
        await ctx.sleep("long", 0.3)
        return "child"

    async def hangs() -> str:
        begun.set()
        if runs == 1:
            await trio.sleep_forever()
        return "step"

    @site.conductor.task
    async def handler(ctx: Context) -> str:
        nonlocal runs
        runs += 1
        await ctx.step("before", ran.append, "before")
        result = ""
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                nonlocal result
                result = await ctx.invoke("child", child)

            if where == "wait":
                nursery.start_soon(ask)
            await ctx.step("hangs", hangs)
        return result or "step"

    with trio.fail_after(LIMIT):
        async with site.running(handler, child, lease=1.0) as orchestrator:
            handle = await handler.invoke()
            await begun.wait()
            if where == "wait":
                await site.until(lambda: len(site.children(handle.id)) == 1)
            site.rows("update pgconductor._private_orchestrators set died_at = now(), expires_at = now()")
            assert await handle.result() == ("child" if where == "wait" else "step")
            assert orchestrator.statistics().incarnations == 2
    assert ran == ["before"]
    assert runs >= 2
    assert {row[2] for row in site.children(handle.id)} == ({"completed"} if where == "wait" else set())


async def test_requested_cancellation_reaches_handlers_that_run_and_that_wait(site: Site) -> None:
    """One that waits has no process that could be asked."""
    begun = trio.Event()
    cleaned: list[str] = []

    @site.conductor.task
    async def sleeps(ctx: Context) -> None:
        await ctx.sleep("long", timedelta(days=1))

    @site.conductor.task
    async def runs(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "long", timedelta(days=1))
            try:
                await ctx.step("hangs", hang)
            finally:
                with trio.CancelScope(shield=True):
                    await ctx.step("undo", cleaned.append, "undone")

    async def hang() -> None:
        begun.set()
        await trio.sleep_forever()

    with trio.fail_after(LIMIT):
        async with site.running(sleeps, runs):
            one, other = await sleeps.invoke(), await runs.invoke()
            await begun.wait()
            await site.until_state(one.id, "waiting")
            await one.cancel()
            await other.cancel()
            for handle in (one, other):
                await site.until_state(handle.id, "cancelled")
    assert cleaned == ["undone"]


async def test_drain_runs_durable_executions_to_their_end(site: Site) -> None:
    """Suspensions are rounds of a drain, and due timers within its horizon are waited for."""

    @site.conductor.task
    async def child(n: int) -> int:
        return n

    @site.conductor.task
    async def parent(ctx: Context) -> int:
        total = 0
        for n in range(3):
            await ctx.sleep(f"nap {n}", 0.05)
            total += await ctx.invoke(f"child {n}", child, n=n)
        return total

    with trio.fail_after(LIMIT):
        async with site.conductor:
            handles = await parent.invoke_many([parent.bind() for _ in range(3)])
            orchestrator = Orchestrator(site.conductor, tasks=[parent, child], migrate=False)
            drained = await orchestrator.drain(1.0)
            assert [await handle.result(timeout=0) for handle in handles] == [3, 3, 3]
    assert (drained.completed, drained.failed, drained.retried) == (12, 0, 0)
