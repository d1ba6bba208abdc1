"""Child executions: results, failures, cancellation and policies, through a real orchestrator."""

from __future__ import annotations

import trio
from durable.site import LIMIT, Site

from pgconductor import Context


async def test_result_of_a_child_comes_while_a_step_beside_it_runs(site: Site) -> None:
    """A parent that cannot be suspended would hear of its child at the next heartbeat only, or never."""
    release, received = trio.Event(), trio.Event()

    @site.conductor.task
    async def child(n: int) -> int:
        return n + 1

    @site.conductor.task
    async def parent(ctx: Context) -> int:
        result = 0

        async def hold() -> None:
            await release.wait()

        async def ask() -> None:
            nonlocal result
            result = await ctx.invoke("child", child, n=1)
            received.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.step, "hold", hold)
            nursery.start_soon(ask)
        return result

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            handle = await parent.invoke()
            await received.wait()
            assert site.state(handle.id) == "running"
            release.set()
            assert await handle.result() == 2
    assert site.attempt(handle.id) == 1
