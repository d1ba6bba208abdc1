"""Durable nurseries through a real orchestrator: structured concurrency that is kept in the database."""

from __future__ import annotations

from datetime import timedelta

import pytest
import trio
from durable.site import LIMIT, Site

from pgconductor import ChildFailed, Context, ExecutionFailed, StepFailed


async def test_nursery_of_children_and_steps_gives_all_results(site: Site) -> None:
    """The block's end is not the end of what it started."""
    runs = 0

    @site.conductor.task
    async def square(n: int) -> int:
        return n * n

    @site.conductor.task
    async def parent(ctx: Context) -> list[int]:
        nonlocal runs
        runs += 1
        async with ctx.nursery("squares") as nursery:
            handles = [nursery.invoke(square, n=n) for n in range(20)]
            named = nursery.invoke_as("last", square.bind(n=100))
            step = nursery.start_step("local", int, 7)
        return [*[await handle.result() for handle in handles], await named.result(), step.value]

    with trio.fail_after(LIMIT):
        async with site.running(square, parent):
            handle = await parent.invoke()
            assert await handle.result() == [n * n for n in range(20)] + [10_000, 7]
    assert site.attempt(handle.id) == 1
    assert runs <= 3
    names = site.rows(
        "select s ->> 'name' from pgconductor._private_finished f, jsonb_array_elements(f.steps) s where f.id = %s",
        handle.id,
    )
    assert {"squares/0", "squares/19", "squares/last", "squares/local"} <= {name for (name,) in names}


async def test_first_failure_cancels_siblings_in_the_database(site: Site) -> None:
    """Siblings would run on; or the parent would hear of the failure when all have ended."""
    caught: list[list[str]] = []

    @site.conductor.task
    async def sleeps(ctx: Context) -> None:
        await ctx.sleep("long", timedelta(days=1))

    @site.conductor.task(max_attempts=1)
    async def fails() -> None:
        raise ValueError("bad weather")

    @site.conductor.task
    async def parent(ctx: Context) -> str:
        try:
            async with ctx.nursery("all") as nursery:
                for _ in range(5):
                    nursery.invoke(sleeps)
                nursery.invoke(fails)
        except* ChildFailed as group:
            caught.append([str(error) for error in group.exceptions])
        await ctx.sleep("replay once more", 0.05)
        return "went on"

    with trio.fail_after(LIMIT):
        async with site.running(sleeps, fails, parent):
            handle = await parent.invoke()
            assert await handle.result() == "went on"
    states = {(state, reason) for _, _, state, reason in site.children(handle.id)}
    assert states == {("cancelled", "nursery all of its parent was left by an error"), ("failed", None)}
    assert len(caught) >= 2
    assert all(group == caught[0] for group in caught)
    assert len(caught[0]) == 1
    assert "bad weather" in caught[0][0]
    assert site.attempt(handle.id) == 1


@pytest.mark.parametrize("how", ["block", "step"])
async def test_error_of_the_block_or_of_a_step_cancels_the_children(site: Site, how: str) -> None:
    """Children of a block that was left would be nobody's."""

    @site.conductor.task
    async def sleeps(ctx: Context) -> None:
        await ctx.sleep("long", timedelta(days=1))

    def fails() -> None:
        raise ValueError("bad weather")

    def asleep() -> bool:
        return (
            site.rows("select 1 from pgconductor._private_executions where task = 'sleeps' and state = 'waiting'") != []
        )

    @site.conductor.task(max_attempts=1)
    async def parent(ctx: Context) -> None:
        async with ctx.nursery("all") as nursery:
            nursery.invoke(sleeps)
            await nursery.start_children()
            await ctx.step("until it sleeps", site.until, asleep)
            if how == "block":
                raise KeyError("block")
            nursery.start_step("fails", fails)

    with trio.fail_after(LIMIT):
        async with site.running(sleeps, parent):
            handle = await parent.invoke()
            with pytest.raises(ExecutionFailed) as raised:
                await handle.result()
            assert ("KeyError" if how == "block" else StepFailed.__name__) in raised.value.error["traceback"]
            await site.until(lambda: [row[2] for row in site.children(handle.id)] == ["cancelled"])


async def test_result_inside_the_block_comes_before_the_siblings_end(site: Site) -> None:
    """The parent, suspended, would be woken when all have ended; here that never happens before it goes on."""

    @site.conductor.task
    async def child(ctx: Context, name: str) -> str:
        if name == "slow":
            await ctx.step("until allowed", site.until, allowed.is_set)
        return name

    allowed = trio.Event()

    @site.conductor.task
    async def parent(ctx: Context) -> list[str]:
        async with ctx.nursery("all") as nursery:
            slow = nursery.invoke(child, name="slow")
            quick = nursery.invoke(child.options(delay=0.1), name="quick")
            first = await quick.result()
            await ctx.step("allow", allow)
        return [first, await slow.result()]

    async def allow() -> None:
        allowed.set()

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            handle = await parent.invoke()
            await site.until_state(handle.id, "waiting")
            assert await handle.result() == ["quick", "slow"]


async def test_retried_parent_tries_the_failed_child_again_and_keeps_the_others(site: Site) -> None:
    """Each retry would fail at once by the failure that is recorded, or do all again."""
    runs: list[int] = []

    @site.conductor.task(max_attempts=1)
    async def child(n: int) -> int:
        runs.append(n)
        if n == 0 and runs.count(0) == 1:
            await site.until(lambda: {1, 2} <= set(runs))
            raise ValueError("bad weather")
        return n

    @site.conductor.task(max_attempts=2, backoff=0.01)
    async def parent(ctx: Context) -> list[int]:
        results: dict[int, int] = {}

        async def ask(n: int) -> None:
            results[n] = await ctx.invoke(f"child-{n}", child, n=n)

        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(ask, n)
        return sorted(results.values())

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            handle = await parent.invoke()
            assert await handle.result() == [0, 1, 2]
    assert site.attempt(handle.id) == 2
    assert runs.count(0) == 2


async def test_replayed_nursery_does_not_run_steps_again_that_its_failure_cancelled(site: Site) -> None:
    """A step that was cancelled would begin at each replay."""
    begun = 0

    @site.conductor.task(max_attempts=1)
    async def fails() -> None:
        await site.until(lambda: begun > 0)
        raise ValueError("bad weather")

    async def step() -> None:
        nonlocal begun
        begun += 1
        await trio.sleep_forever()

    @site.conductor.task
    async def parent(ctx: Context) -> str:
        try:
            async with ctx.nursery("all") as nursery:
                nursery.start_step("hangs", step)
                nursery.invoke(fails)
        except* ChildFailed:
            pass
        await ctx.sleep("replay", 0.05)
        return "went on"

    with trio.fail_after(LIMIT):
        async with site.running(fails, parent):
            assert await (await parent.invoke()).result() == "went on"
    assert begun == 1
