"""Versions of tasks and changes of code: who runs what, and that a decision once taken stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from runtime.conftest import Query

from pgconductor import Conductor, Context, DurableMisuse, Orchestrator, State, Trouble

DAY = 86_400.0


async def run_until(conductor: Conductor, is_so: Callable[[], Any], **options: Any) -> None:
    """Run all tasks of an open conductor until an awaitable condition holds."""
    orchestrator = Orchestrator(
        conductor, tasks=list(conductor.registry), migrate=False, handle_signals=False, **options
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        with trio.fail_after(20):
            while not await is_so():
                await trio.sleep(0.005)
        orchestrator.stop()


async def test_each_execution_is_run_by_its_version(conductor: Conductor) -> None:
    """New code goes on with what old code began, or the parameters of one are read by the other."""
    calls: list[tuple[str, object]] = []

    @conductor.task(version="2")
    async def greet(name: str, shout: bool) -> str:
        calls.append(("2", name))
        return name.upper() if shout else name

    @greet.former("1")
    async def greet_1(names: list[str]) -> int:
        calls.append(("1", names))
        return len(names)

    @conductor.task
    async def parent(ctx: Context) -> list[object]:
        return [await ctx.invoke("new", greet, "eve", shout=True), await ctx.invoke("old", greet_1, ["a", "b"])]

    async with conductor:
        new, old = await greet.invoke("ada", shout=True), await greet_1.invoke(["x", "y", "z"])
        named = await conductor.invoke("greet", {"name": "bob", "shout": False})
        many = await greet.invoke_many([greet.bind("cy", shout=False)] * 2)
        with conductor.sync() as client:
            blocking = client.invoke(greet, "dee", shout=False)
        family = await parent.invoke()
        await Orchestrator(conductor, tasks=[greet, parent], migrate=False).drain()
        assert (await new.result(), await old.result(), await named.result()) == ("ADA", 3, "bob")
        assert [await each.result() for each in many] == ["cy", "cy"]
        assert await family.result() == ["EVE", 2]
        for handle in (new, named, *many):
            status = await handle.status()
            assert status is not None
            assert status.version == "2"
        status = await old.status()
        assert status is not None
        assert status.version == "1"
        with conductor.sync() as client:
            assert (client.status(blocking) or status).version == "2"
        assert [each.version for each in await conductor.executions(parent=family)] == ["1", "2"]
    assert ("1", ["x", "y", "z"]) in calls


async def test_producer_in_sql_gets_the_current_version(conductor: Conductor, query: Query) -> None:
    """It is not claimed at all, or begun by former code."""

    @conductor.task(version="2")
    async def greet() -> str:
        return "two"

    @greet.former("1")
    async def greet_1() -> str:
        return "one"

    ((execution,),) = query("select pgconductor.invoke('greet')")
    async with conductor:
        await Orchestrator(conductor, tasks=[greet], migrate=False).drain()
        assert await conductor.wait_result(execution, greet, 0) == "two"
        assert query("select version from pgconductor._private_finished") == [("2",)]
    assert greet_1.version == "1"


async def test_what_nobody_has_stays_and_is_shown(pgconductor_dsn: str, conductor: Conductor) -> None:
    """A worker of new code takes it and fails it, or nobody learns why it does not run."""

    @conductor.task(version="2")
    async def greet() -> str:
        return "two"

    old = Conductor(pgconductor_dsn)

    @old.task(name="greet", version="1")
    async def greet_1() -> str:
        return "one"

    async with conductor, old:
        handle = await greet_1.invoke()
        drained = await Orchestrator(conductor, tasks=[greet], migrate=False).drain()
        assert drained.completed == 0

        async def is_shown() -> bool:
            (status,) = await conductor.queue_status()
            return status.tasks_without_worker == ("greet@1",)

        await run_until(conductor, is_shown)
        await Orchestrator(old, tasks=[greet_1], migrate=False).drain()
        assert await handle.result(timeout=0) == "one"


def step_of(calls: list[str], name: str) -> Callable[[], None]:
    def note() -> None:
        calls.append(name)

    return note


@pytest.mark.parametrize("is_plain", [False, True])
async def test_patch_holds_for_those_that_come_there_first(pgconductor_dsn: str, is_plain: bool) -> None:
    """An execution that has paid by the old way pays by the new way too."""
    calls: list[str] = []

    def declare(has_patch: bool) -> tuple[Conductor, Any]:
        conductor = Conductor(pgconductor_dsn)

        def order_plainly(ctx: Context, place: str) -> str:
            sync = ctx.sync
            sync.step("begin", step_of(calls, "begin"))
            if place == "before":
                sync.sleep("wait before", 0.3)
            is_new = has_patch and sync.patched("new-pay")
            assert not has_patch or is_new == sync.patched("new-pay")
            sync.step("pay new" if is_new else "pay old", step_of(calls, f"pay {'new' if is_new else 'old'}"))
            sync.sleep("wait after", 0.6)
            sync.step("end", step_of(calls, "end"))
            return "new" if is_new else "old"

        if is_plain:
            return conductor, conductor.task(name="order")(order_plainly)

        @conductor.task
        async def order(ctx: Context, place: str) -> str:
            await ctx.step("begin", step_of(calls, "begin"))
            if place == "before":
                await ctx.sleep("wait before", 0.3)
            is_new = has_patch and await ctx.patched("new-pay")
            assert not has_patch or is_new == await ctx.patched("new-pay")  # asked as often as one likes
            await ctx.step("pay new" if is_new else "pay old", step_of(calls, f"pay {'new' if is_new else 'old'}"))
            await ctx.sleep("wait after", 0.6)
            await ctx.step("end", step_of(calls, "end"))
            return "new" if is_new else "old"

        return conductor, order

    first, order = declare(has_patch=False)
    async with first:
        before, after = await order.invoke("before"), await order.invoke("after")

        async def are_waiting() -> bool:
            return [each.state for each in await first.executions()] == [State.WAITING] * 2

        await run_until(first, are_waiting)
    assert sorted(calls) == ["begin", "begin", "pay old"]
    second, order = declare(has_patch=True)
    async with second:
        report = await second.replay_check()
        troubles = [Trouble.UNDECIDED] * 2 if is_plain else []
        assert (report.checked, [each.trouble for each in report.divergences]) == (2, troubles)
        fresh = await order.invoke("after")
        await Orchestrator(second, tasks=[order], migrate=False).drain(horizon=10.0)
        results = [await second.wait_result(handle.id, order, 0) for handle in (before, after, fresh)]
        assert results == ["new", "old", "new"]
        assert [step.value for step in await second.steps(fresh) if step.kind == "patch"] == [True]
        assert [step.kind for step in await second.steps(after) if step.kind == "patch"] == []
    assert sorted(calls) == [*["begin"] * 3, *["end"] * 3, *["pay new"] * 2, "pay old"]


async def test_patch_decides_the_same_in_the_next_attempt(conductor: Conductor) -> None:
    """After a failure the old way's payment is followed by the new way's."""
    calls: list[str] = []
    has_patch = False

    @conductor.task(backoff=0.0)
    async def order(ctx: Context) -> str:
        is_new = has_patch and await ctx.patched("new-pay")
        await ctx.step("pay new" if is_new else "pay old", step_of(calls, str(is_new)))
        if not has_patch:
            raise_once()
        return str(is_new)

    def raise_once() -> None:
        nonlocal has_patch
        has_patch = True
        raise ValueError("the process is replaced by one with new code")

    async with conductor:
        handle = await order.invoke()
        await Orchestrator(conductor, tasks=[order], migrate=False).drain()
        assert await handle.result(timeout=0) == "False"
    assert calls == ["False"]


async def test_patch_that_is_asked_for_no_more_is_no_divergence(pgconductor_dsn: str) -> None:
    """A change can never be tidied away, since histories have it."""

    def declare(with_patch: bool) -> Conductor:
        conductor = Conductor(pgconductor_dsn)

        @conductor.task
        async def order(ctx: Context) -> None:
            if with_patch:
                assert await ctx.patched("a")
            await ctx.step("one", int)
            await ctx.sleep("rest", DAY)
            await ctx.patched("b")

        return conductor

    first = declare(with_patch=True)
    async with first:
        await first.invoke("order")

        async def is_waiting() -> bool:
            return [each.state for each in await first.executions()] == [State.WAITING]

        await run_until(first, is_waiting)
        assert (await first.replay_check()).divergences == ()
        second = declare(with_patch=False)
        async with second:
            assert (await second.replay_check()).divergences == ()


async def test_patch_is_refused_in_a_branch(conductor: Conductor) -> None:
    """What it answers depends on which branch came first."""
    refused: list[str] = []

    @conductor.task(max_attempts=1)
    async def order(ctx: Context) -> None:
        async def branch() -> None:
            with suppress(DurableMisuse):
                await ctx.patched("x")
                return
            refused.append("branch")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(branch)
        assert await ctx.patched("x")  # alone again

    async with conductor:
        handle = await order.invoke()
        await Orchestrator(conductor, tasks=[order], migrate=False).drain()
        await handle.result(timeout=0)
    assert refused == ["branch"]


@pytest.mark.parametrize(("has_former", "listed"), [(True, []), (False, [Trouble.VERSION])])
async def test_replay_check_tries_the_version_of_the_execution(
    pgconductor_dsn: str, has_former: bool, listed: list[Trouble]
) -> None:
    """Histories of former code are tried against the current handler, or pass since nothing fits."""
    old = Conductor(pgconductor_dsn)

    async def former(ctx: Context) -> None:
        await ctx.step("one", int)
        await ctx.sleep("rest", DAY)

    old.task(name="order", version="1")(former)
    new = Conductor(pgconductor_dsn)

    @new.task(name="order", version="2")
    async def order(ctx: Context, n: int) -> None:
        await ctx.step("another", int)

    if has_former:
        order.former("1")(former)
    async with old, new:
        await old.invoke("order")

        async def is_waiting() -> bool:
            return [each.state for each in await old.executions()] == [State.WAITING]

        await run_until(old, is_waiting)
        report = await new.replay_check()
        assert (report.checked, [found.trouble for found in report.divergences]) == (1, listed)
        if listed:
            assert report.divergences[0].what == "task 'order' has no version '1'; it has '2'"
