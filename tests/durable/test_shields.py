"""What is durable under a handler's own shields, which the end of its attempt does not reach."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
from durable.site import LIMIT, Site

from pgconductor import Context, DurableMisuse


@pytest.mark.parametrize("how", ["timeout", "cancel"])
@pytest.mark.parametrize("what", ["invoke", "sleep", "nursery", "continue_as_new"])
async def test_wait_under_a_shield_is_refused_while_the_handler_ends(site: Site, how: str, what: str) -> None:
    """It would be recorded, and then keep the slot for ever: nothing reaches a shield to park it."""
    begun = trio.Event()
    refused: list[str] = []

    @site.conductor.task
    async def undo() -> None:
        """Never called."""

    async def in_a_nursery(ctx: Context) -> None:
        async with ctx.nursery("all") as nursery:
            nursery.invoke(undo)

    waits: dict[str, Callable[[Context], Awaitable[object]]] = {
        "invoke": lambda ctx: ctx.invoke("undo", undo),
        "sleep": lambda ctx: ctx.sleep("rest", 60),
        "nursery": in_a_nursery,
        "continue_as_new": lambda ctx: ctx.continue_as_new(),
    }

    @site.conductor.task(timeout=0.2 if how == "timeout" else None, max_attempts=1)
    async def handler(ctx: Context) -> None:
        try:
            await ctx.step("begins", lambda: None)
            begun.set()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await waits[what](ctx)
                except* DurableMisuse as error:
                    refused.append(str(error.exceptions[0]))

    @site.conductor.task
    async def other() -> int:
        return 1

    with trio.fail_after(LIMIT):
        async with site.running(handler, undo, other, concurrency=1):
            handle = await handler.invoke()
            await begun.wait()
            if how == "cancel":
                await handle.cancel()
            await site.until_state(handle.id, "failed" if how == "timeout" else "cancelled")
            later = await other.invoke()
            assert await later.result() == 1
    assert len(refused) == 1
    assert "under a shield" in refused[0]
    assert site.children(handle.id) == []


@pytest.mark.parametrize("what", ["claim", "lease"])
async def test_handler_under_a_shield_ends_when_what_it_holds_is_lost(site: Site, what: str) -> None:
    """Else its slot is gone for ever, or the orchestrator never registers again: its step waits in the shield."""
    has_begun = trio.Event()
    may_end = trio.Event()
    runs = 0

    @site.conductor.task
    async def handler(ctx: Context) -> int:
        nonlocal runs
        runs += 1
        if runs > 1:
            return runs
        with trio.CancelScope(shield=True):
            await ctx.step("one", hold)
        raise AssertionError("unreachable: the claim is lost")

    async def hold() -> None:
        has_begun.set()
        await may_end.wait()

    @site.conductor.task
    async def other() -> int:
        return 1

    with trio.fail_after(LIMIT):
        async with site.running(handler, other, concurrency=1, lease=3.0 if what == "lease" else 600.0) as orchestrator:
            handle = await handler.invoke()
            await has_begun.wait()
            if what == "lease":
                site.rows("update pgconductor._private_orchestrators set died_at = now(), expires_at = now()")
                await site.until(lambda: orchestrator.statistics().incarnations == 1 and _is_lost(site))
                may_end.set()
                assert await handle.result() == 2
                assert orchestrator.statistics().incarnations == 2
            else:
                # As after a rescue: somebody else's claim.
                site.rows(
                    "update pgconductor._private_executions set claim_no = claim_no + 1, owner = gen_random_uuid()"
                    " where id = %s",
                    handle.id,
                )
                may_end.set()
                later = await other.invoke()
                assert await later.result() == 1
    assert runs == (2 if what == "lease" else 1)


def _is_lost(site: Site) -> bool:
    return site.rows("select count(*) from pgconductor._private_orchestrators where died_at is null") == [(0,)]


async def test_step_under_a_shield_is_not_recorded_for_a_run_that_begins_again(site: Site) -> None:
    """A process that is stopped at once leaves a clean-up in the history, and the next run finds it in its way."""
    count = 20
    begun: list[int] = []
    cleaned: list[int] = []
    is_first = True

    @site.conductor.task
    async def handler(ctx: Context, n: int) -> int:
        await ctx.step("begins", lambda: None)
        if is_first:
            try:
                begun.append(n)
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True), contextlib.suppress(DurableMisuse):
                    await ctx.step("cleanup", cleaned.append, n)
        return await ctx.step("ends", lambda: n)

    with trio.fail_after(LIMIT):
        async with site.conductor:
            handles = await handler.invoke_many([handler.bind(n) for n in range(count)])
        with trio.CancelScope() as scope:
            async with site.running(handler, concurrency=count):
                await site.until(lambda: len(begun) == count)
                scope.cancel()
        assert cleaned == []
        is_first = False
        async with site.running(handler):
            assert [await handle.result() for handle in handles] == list(range(count))
