"""How a handler waits without a slot, through a real orchestrator: nothing is cut, nothing lost, nothing runs twice."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from durable.site import LIMIT, Site

from pgconductor import Context, ExecutionFailed, Snooze, StepFailed
from pgconductor.testing import DatabaseClock


async def test_handler_whose_finally_raises_sleeps_all_the_same(site: Site) -> None:
    """The recorded suspension wins over what an unwinding ends with: no attempt is burned by it."""
    unwound = 0

    @site.conductor.task(max_attempts=1)
    async def handler(ctx: Context) -> str:
        nonlocal unwound
        try:
            await ctx.sleep("nap", 0.1)
        finally:
            unwound += 1
            if unwound == 1:
                raise ValueError("in finally")
        return "awake"

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            handle = await handler.invoke()
            assert await handle.result() == "awake"
    assert unwound == 2
    assert site.attempt(handle.id) == 1


async def test_handler_that_swallows_everything_sleeps_all_the_same(site: Site) -> None:
    """A result that is returned instead of waiting is none."""
    runs = 0

    @site.conductor.task
    async def handler(ctx: Context) -> str:
        nonlocal runs
        runs += 1
        try:
            await ctx.sleep("nap", 0.1)
        except BaseException:  # noqa: BLE001  # what a handler should not do
            return "swallowed"
        return "awake"

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            assert await (await handler.invoke()).result() == "awake"
    assert runs == 2


async def test_handler_with_nurseries_of_its_own_loses_nothing(site: Site) -> None:
    """Branches that wait for other things at other times: each is done once, whatever the others do."""
    done: list[str] = []

    @site.conductor.task
    async def child(name: str) -> str:
        return name

    @site.conductor.task
    async def handler(ctx: Context) -> list[str]:
        async def branch(name: str) -> None:
            for n in range(3):
                await ctx.sleep(f"{name} sleep {n}", 0.02 * len(name) * (n + 1))
                await ctx.step(f"{name} step {n}", done.append, f"{name} {n}")
                assert await ctx.invoke(f"{name} child {n}", child, name=name) == name

        async with trio.open_nursery() as outer:
            outer.start_soon(branch, "a")
            outer.start_soon(branch, "bb")
            async with trio.open_nursery() as inner:
                inner.start_soon(branch, "ccc")
        return sorted(done)

    with trio.fail_after(LIMIT):
        async with site.running(child, handler):
            handle = await handler.invoke()
            assert await handle.result() == [f"{name} {n}" for name in ("a", "bb", "ccc") for n in range(3)]
    assert site.attempt(handle.id) == 1


@dataclass
class Order:
    number: int
    at: datetime
    parts: tuple[str, int]


@pytest.mark.parametrize(
    "value",
    [None, False, 0, "", 1e300, Order(0, datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC), ("", 0))],
    ids=lambda value: type(value).__name__,
)
async def test_value_after_a_replay_is_that_of_the_first_run(site: Site, value: Any) -> None:
    """It went through the database in between."""
    seen: list[object] = []

    def make() -> Any:
        return value

    make.__annotations__["return"] = type(value)

    @site.conductor.task
    async def handler(ctx: Context) -> None:
        got: object = await ctx.step("make", make)
        seen.append(got)
        await ctx.wait_for_event("go")

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            handle = await handler.invoke()
            await site.until_state(handle.id, "waiting")
            await site.conductor.emit("go")
            await handle.result()
    assert seen == [value, value]
    assert type(seen[0]) is type(seen[1])


async def test_sleep_of_years_is_over_when_it_is_over(site: Site, pgconductor_clock: DatabaseClock) -> None:
    """Sleeps beyond 24.8 days wedged all flushes (B34); a handler that sleeps unconditionally looped for ever (B33)."""
    runs = 0

    @site.conductor.task
    async def handler(ctx: Context) -> str:
        nonlocal runs
        runs += 1
        await ctx.sleep("zero", 0)
        await ctx.sleep("years", timedelta(days=3650))
        await ctx.sleep_until("past", datetime(2020, 1, 1, tzinfo=UTC))
        return "awake"

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            handle = await handler.invoke()
            await site.until_state(handle.id, "waiting")
            assert site.waits(handle.id) == [("years", None), ("zero", "elapsed")]
        pgconductor_clock.advance(timedelta(days=3649))
        async with site.running(handler):
            other = await handler.invoke()
            await site.until_state(other.id, "waiting")
            assert site.state(handle.id) == "waiting"
        pgconductor_clock.advance(timedelta(days=2))
        async with site.running(handler):
            assert await handle.result() == "awake"
    assert runs == 3


async def test_other_kind_under_a_used_name_is_told(site: Site) -> None:
    """Steps, sleeps and children shared keys: one got the other's value, or a TypeError (B36)."""

    @site.conductor.task(max_attempts=1)
    async def handler(ctx: Context) -> None:
        await ctx.sleep("x", 0)
        await ctx.step("x", int)

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            with pytest.raises(ExecutionFailed, match="the name 'x' was used before in this run, for a sleep"):
                await (await handler.invoke()).result()


async def test_deployed_code_that_renames_a_step_fails_before_it_does_anything(site: Site) -> None:
    """The renamed step would run although it has; the history is kept for code that fits."""
    ran: list[str] = []
    name = "charge"

    @site.conductor.task(max_attempts=5, keep_failed=3600.0)
    async def handler(ctx: Context) -> str:
        await ctx.step(name, ran.append, name)
        await ctx.sleep("nap", 0.2)
        await ctx.step("ship", ran.append, "ship")
        return "shipped"

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            handle = await handler.invoke()
            await site.until_state(handle.id, "waiting")
            name = "charge-card"
            with pytest.raises(ExecutionFailed) as raised:
                await handle.result()
            assert raised.value.error["type"] == "pgconductor.errors.NonDeterminism"
            message = raised.value.error["message"]
            assert "asks for step 'charge-card', where step 'charge' was recorded" in message
            assert "Recorded: step 'charge', sleep 'nap'. Asked for in this run: step 'charge-card'" in message
            assert ran == ["charge"]
            name = "charge"  # code that fits again
            await site.conductor.retry(handle.id)
            assert await handle.result() == "shipped"
    assert ran == ["charge", "ship"]


async def test_failed_steps_at_the_end_are_tried_again_and_those_before_are_not(site: Site) -> None:
    """A retry would fail by what is recorded, or undo what the handler has dealt with."""
    ran: list[str] = []

    def fails(name: str) -> None:
        ran.append(name)
        if ran.count(name) == 1:
            raise ValueError(name)

    @site.conductor.task(max_attempts=3, backoff=0.01)
    async def handler(ctx: Context) -> str:
        try:
            await ctx.step("handled", fails, "handled")
        except StepFailed:
            await ctx.step("instead", ran.append, "instead")
        await ctx.step("last", fails, "last")
        return "done"

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            handle = await handler.invoke()
            assert await handle.result() == "done"
    assert ran == ["handled", "instead", "last", "last"]
    assert site.attempt(handle.id) == 2


async def test_concurrent_step_that_failed_is_tried_again(site: Site) -> None:
    """A sibling that began later and succeeded sooner made the failure look as if it had been dealt with."""
    ran: list[str] = []
    sibling = trio.Event()

    async def flaky() -> None:
        ran.append("flaky")
        await sibling.wait()
        if len(ran) < 3:
            raise ValueError("bad weather")

    @site.conductor.task(max_attempts=2, backoff=0.01)
    async def handler(ctx: Context) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.step, "flaky", flaky)
            await site.until(lambda: "flaky" in ran)
            await ctx.step("sibling", ran.append, "sibling")
            sibling.set()
        return "done"

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            assert await (await handler.invoke()).result() == "done"
    assert ran == ["flaky", "sibling", "flaky"]


async def test_snooze_out_of_a_step_gives_the_execution_back_with_its_history(site: Site) -> None:
    """What was done before stays done, and no attempt is counted."""
    ran: list[str] = []

    def not_yet() -> None:
        ran.append("asked")
        if len(ran) < 3:
            raise Snooze(0.02)

    @site.conductor.task(max_attempts=1)
    async def handler(ctx: Context) -> None:
        await ctx.step("once", ran.append, "once")
        await ctx.step("not yet", not_yet, retry=5)

    with trio.fail_after(LIMIT):
        async with site.running(handler):
            handle = await handler.invoke()
            await handle.result()
    assert ran == ["once", "asked", "asked"]
    assert site.attempt(handle.id) == 1


async def test_two_hundred_durable_handlers_share_a_worker(site: Site) -> None:
    """Their requests share statements; each gets its own answers, and slots are free while they wait."""
    variable: ContextVar[str] = ContextVar("variable")
    leaks: list[str] = []

    @site.conductor.task
    async def child(n: int) -> int:
        return n

    @site.conductor.task
    async def handler(ctx: Context, n: int) -> int:
        if (leaked := variable.get("")) != "":
            leaks.append(leaked)
        variable.set(f"of {ctx.execution_id}")
        total = 0
        for i in range(3):
            total += await ctx.step(f"step {i}", int, n)
        await ctx.sleep("nap", 0.01)
        return total + await ctx.invoke("child", child, n=n)

    with trio.fail_after(2 * LIMIT):
        async with site.running(handler, child, concurrency=200):
            handles = await handler.invoke_many([handler.bind(n=n) for n in range(200)])
            assert [await handle.result() for handle in handles] == [4 * n for n in range(200)]
    assert leaks == []
    assert site.rows("select distinct attempt from pgconductor.executions") == [(1,)]
    for table in ("steps", "waits"):
        assert site.rows(f"select count(*) from pgconductor._private_{table}") == [(0,)]
