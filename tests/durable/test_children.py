"""Child executions through a real orchestrator: results, failures, cancellation, policies, depths."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import trio
from durable.site import LIMIT, Site

from pgconductor import (
    ChildCancelled,
    ChildFailed,
    ChildTimedOut,
    Context,
    ExecutionCancelled,
    ExecutionFailed,
    NoRetry,
    Orchestrator,
)
from pgconductor.testing import DatabaseClock, drain


async def test_result_of_a_child_comes_while_a_step_beside_it_runs(site: Site) -> None:
    """A parent that cannot be suspended would hear of its child at the next heartbeat only, or never."""
    release, received = trio.Event(), trio.Event()

    @site.conductor.task
    async def child(n: int) -> int:
        return n + 1

    @site.conductor.task
    async def parent(ctx: Context) -> int:
        result = 0

        async def ask() -> None:
            nonlocal result
            result = await ctx.invoke("child", child, n=1)
            received.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.step, "hold", release.wait)
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


async def test_two_invokes_side_by_side_run_side_by_side(site: Site) -> None:
    """Parallel children were impossible (B19)."""
    both = trio.Event()
    begun: set[str] = set()

    @site.conductor.task
    async def child(name: str) -> str:
        begun.add(name)
        if len(begun) == 2:
            both.set()
        await both.wait()  # each waits for the other
        return name.upper()

    @site.conductor.task
    async def parent(ctx: Context) -> list[str]:
        results: dict[str, str] = {}

        async def ask(name: str) -> None:
            results[name] = await ctx.invoke(name, child, name=name)

        async with trio.open_nursery() as nursery:
            for name in ("a", "b"):
                nursery.start_soon(ask, name)
        return [results["a"], results["b"]]

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            assert await (await parent.invoke()).result() == ["A", "B"]


async def test_ten_suspensions_burn_no_attempt_and_keep_no_slot(site: Site) -> None:
    """Each child burned an attempt of its parent (B19), and a parent that keeps its slot starves its children."""
    runs = 0

    @site.conductor.task
    async def child(n: int) -> int:
        return n

    @site.conductor.task(max_attempts=1)
    async def parent(ctx: Context) -> int:
        nonlocal runs
        runs += 1
        assert ctx.attempt == 1
        return sum([await ctx.invoke(f"child-{n}", child, n=n) for n in range(10)])

    with trio.fail_after(LIMIT):
        async with site.running(child, parent, concurrency=1):
            handle = await parent.invoke()
            assert await handle.result() == 45
    assert site.attempt(handle.id) == 1
    assert runs == 11


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}], ids=repr)
async def test_falsy_result_arrives_as_it_is(site: Site, value: Any) -> None:
    """`0`, `""` and `false` became null for a waiting parent (B32)."""

    @site.conductor.task(keep_completed=0)
    async def child() -> Any:
        return value

    @site.conductor.task
    async def parent(ctx: Context) -> Any:
        return {"got": await ctx.invoke("child", child)}

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            assert await (await parent.invoke()).result() == {"got": value}


async def test_payload_with_any_keys_is_a_payload(site: Site) -> None:
    """One that had a key named `event` was taken for an event (B17)."""

    @site.conductor.task
    async def child(event: str, result: int, name: str) -> str:
        return f"{event} {result} {name}"

    @site.conductor.task
    async def parent(ctx: Context) -> str:
        return await ctx.invoke("child", child, event="invoke", result=0, name="x")

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            assert await (await parent.invoke()).result() == "invoke 0 x"


async def test_failures_of_children_are_caught_and_the_parent_goes_on(site: Site) -> None:
    """A parent failed with its child and could not catch it (B18); after a caught timeout every invoke raised (B19)."""
    attempts = 0

    @site.conductor.task(max_attempts=2, backoff=0.01)
    async def fails() -> None:
        nonlocal attempts
        attempts += 1
        raise ValueError("bad weather")

    @site.conductor.task(max_attempts=1, timeout=0.05)
    async def slow() -> None:
        await trio.sleep_forever()

    @site.conductor.task
    async def late(ctx: Context) -> None:
        await ctx.sleep("long", timedelta(days=1))  # its deadline passes while it waits

    @site.conductor.task
    async def refuses() -> None:
        raise NoRetry("no such customer")

    @site.conductor.task
    async def fine() -> str:
        return "fine"

    @site.conductor.task
    async def parent(ctx: Context) -> list[str]:
        seen: list[str] = []
        calls: list[tuple[str, Any]] = [
            ("fails", fails),
            ("slow", slow),
            ("late", late.options(deadline=0.3)),
            ("refuses", refuses),
        ]
        for name, task in calls:
            try:
                await ctx.invoke(name, task)
            except ChildFailed as error:
                seen.append(f"{type(error).__name__} {error.error['type']}")
        seen.append(await ctx.invoke("fine", fine))
        return seen

    with trio.fail_after(LIMIT):
        async with site.running(fails, slow, late, refuses, fine, parent):
            handle = await parent.invoke()
            assert await handle.result() == [
                "ChildFailed ValueError",
                "ChildTimedOut timeout",
                "ChildTimedOut deadline",
                "ChildFailed pgconductor.errors.NoRetry",
                "fine",
            ]
    assert attempts == 2
    assert site.attempt(handle.id) == 1
    assert issubclass(ChildTimedOut, TimeoutError)


async def test_cancelled_child_raises_in_its_parent(site: Site) -> None:
    """Cancelling a child never woke its parent (B18)."""

    @site.conductor.task(queue="elsewhere")
    async def child() -> None: ...

    @site.conductor.task
    async def parent(ctx: Context) -> str:
        try:
            await ctx.invoke("child", child)
        except ChildCancelled as error:
            return f"{error.reason}"
        return "completed"

    with trio.fail_after(LIMIT):
        async with site.running(child, parent, queues=["default"]):
            handle = await parent.invoke()
            await site.until_state(handle.id, "waiting")
            (child_id, *_), *_ = site.children(handle.id)
            await site.conductor.cancel(child_id, reason="no longer wanted")
            assert await handle.result() == "no longer wanted"


async def test_children_on_another_queue_are_run_by_another_orchestrator(site: Site) -> None:
    """Parent and child are seldom on one worker; each end wakes the other's process by its queue."""

    @site.conductor.task(queue="far")
    async def child(n: int) -> int:
        return n * 2

    @site.conductor.task(queue="near")
    async def parent(ctx: Context) -> int:
        total = 0
        for n in range(3):
            total += await ctx.invoke(f"c{n}", child, n=n)
        return total

    with trio.fail_after(LIMIT):
        async with site.running(parent, queues=["near"]), site.running(child, queues=["far"]):
            assert await (await parent.invoke()).result() == 6


@pytest.mark.parametrize("where", ["waiting", "running"])
async def test_cancelling_a_parent_cancels_its_family_but_for_the_abandoned(site: Site, where: str) -> None:
    """Children and grandchildren would work on for nobody."""
    hold = trio.Event()

    @site.conductor.task(queue="nobody")
    async def leaf() -> None: ...

    @site.conductor.task
    async def middle(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "leaf", leaf)
            nursery.start_soon(ctx.invoke_abandoned, "kept", leaf)

    @site.conductor.task
    async def parent(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "middle", middle)
            if where == "running":
                nursery.start_soon(ctx.step, "hold", hold.wait)

    def family() -> dict[str, str]:
        rows = site.rows(
            "select task, state::text, (select cancel_reason from pgconductor._private_finished f where f.id = e.id)"
            " from pgconductor.executions e"
        )
        return {f"{task} {state}": reason for task, state, reason in rows}

    with trio.fail_after(LIMIT):
        async with site.running(middle, parent, leaf, lease=1.0, queues=["default"]):
            handle = await parent.invoke()
            await site.until_state(handle.id, where)
            await site.until(lambda: len(family()) >= 3 and "middle waiting" in family())
            await handle.cancel()
            with pytest.raises(ExecutionCancelled):
                await handle.result()
            await site.until(lambda: "leaf cancelled" in family() and "middle cancelled" in family())
            assert "leaf ready" in family()
            assert family()["middle cancelled"] == "its parent has ended: cancelled"


async def test_parent_that_ends_closes_what_it_did_not_wait_for(site: Site) -> None:
    """A child that its parent has forgotten runs on."""

    @site.conductor.task
    async def child(ctx: Context) -> None:
        await ctx.sleep("long", timedelta(days=1))

    @site.conductor.task
    async def parent(ctx: Context) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "c", child)
            await ctx.step("begun", site.until, lambda: len(site.rows("select 1 from pgconductor.executions")) == 2)
            raise NoRetry("enough")
        return "unreached"

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            handle = await parent.invoke()
            with pytest.raises(ExecutionFailed):
                await handle.result()
            await site.until(lambda: {row[2] for row in site.children(handle.id)} == {"cancelled"})


async def test_scope_of_the_handler_around_an_invoke_cancels_the_child(site: Site) -> None:
    """Structured concurrency would end at the database."""
    asleep = trio.Event()

    @site.conductor.task
    async def child(ctx: Context) -> None:
        asleep.set()
        await ctx.sleep("long", timedelta(days=1))

    @site.conductor.task
    async def parent(ctx: Context) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "c", child)
            await ctx.step("until it sleeps", asleep.wait)
            nursery.cancel_scope.cancel()
        return "went on"

    with trio.fail_after(LIMIT):
        async with site.running(child, parent):
            handle = await parent.invoke()
            assert await handle.result() == "went on"
            await site.until(lambda: [row[2] for row in site.children(handle.id)] == ["cancelled"])
            assert site.children(handle.id)[0][3] == "its parent's scope was cancelled"


async def test_task_that_invokes_itself_ends_at_16_levels(site: Site) -> None:
    """It would fill the database; and the failure comes up through all of them."""

    @site.conductor.task(max_attempts=1)
    async def dig(ctx: Context) -> None:
        await ctx.invoke("deeper", dig)

    with trio.fail_after(LIMIT):
        async with site.running(dig, concurrency=2):
            handle = await dig.invoke()
            with pytest.raises(ExecutionFailed):
                await handle.result()
    errors = site.rows("select errors -> -1 ->> 'message' from pgconductor.executions order by created_at")
    assert len(errors) == 17
    assert "nested at most 16 deep; does the task invoke itself?" in errors[-1][0]


async def test_children_inherit_the_deadline_and_it_passes_over_suspensions(
    site: Site, pgconductor_clock: DatabaseClock
) -> None:
    """Time that is spent waiting would not count, or a child outlive what it is for."""

    @site.conductor.task(queue="nobody")
    async def child() -> None: ...

    @site.conductor.task
    async def parent(ctx: Context) -> None:
        await ctx.sleep("a while", 30)
        await ctx.invoke("child", child)

    with trio.fail_after(LIMIT):
        async with site.running(parent, child, queues=["default"]):
            handle = await parent.options(deadline=100.0).invoke()
            await site.until_state(handle.id, "waiting")
            pgconductor_clock.advance(31)
            await _wake(site)
            await site.until(lambda: site.children(handle.id) != [])
            same = "select count(distinct deadline_at) from pgconductor._private_executions"
            await site.until_state(handle.id, "waiting")
            assert site.rows(same) == [(1,)]
            pgconductor_clock.advance(70)
            await _wake(site)
            with pytest.raises(ExecutionFailed) as raised:
                await handle.result()
            assert raised.value.error["type"] == "deadline"
            await site.until(lambda: [row[2] for row in site.children(handle.id)] == ["cancelled"])


async def _wake(site: Site) -> None:
    """Have a worker that sleeps by its own clock look at the database's, which a test has moved."""
    site.rows("select pg_notify(pgconductor._private_channel('default'), '')")
    await trio.lowlevel.checkpoint()


async def test_drain_does_not_return_while_children_are_to_run_or_to_be_closed(
    site: Site, pgconductor_clock: DatabaseClock
) -> None:
    """A test would look at results that are not there yet."""

    @site.conductor.task(queue="far")
    async def child(ctx: Context, n: int) -> int:
        await ctx.sleep("nap", timedelta(hours=1))
        return n

    @site.conductor.task(queue="near")
    async def parent(ctx: Context) -> int:
        async with ctx.nursery("all") as nursery:
            handles = [nursery.invoke(child, n=n) for n in range(3)]
        await ctx.sleep("a day", timedelta(days=1))
        return sum([await handle.result() for handle in handles])

    @site.conductor.task(queue="near")
    async def leaves(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "c", child.options(delay=3600.0), 5)
            await ctx.step("made", site.until, lambda: len(site.rows("select 1 from pgconductor.executions")) == 10)
            raise NoRetry("enough")

    workers = [
        site.conductor.create_worker(queue="near", tasks=[parent, leaves]),
        site.conductor.create_worker(queue="far", tasks=[child]),
    ]
    with trio.fail_after(LIMIT):
        async with site.conductor:
            orchestrator = Orchestrator(site.conductor, workers=workers, migrate=False)
            handle = await parent.invoke()
            drained = await drain(orchestrator, clock=pgconductor_clock, horizon=timedelta(hours=2))
            assert (site.state(handle.id), drained.completed) == ("waiting", 3)
            await drain(orchestrator, clock=pgconductor_clock, horizon=timedelta(days=2))
            assert await handle.result(timeout=0) == 3
            for _ in range(3):
                await leaves.invoke()
            drained = await drain(orchestrator, clock=pgconductor_clock)
            assert drained.failed == 3
            states = site.rows("select state::text, count(*) from pgconductor.executions group by 1 order by 1")
            assert states == [("cancelled", 3), ("completed", 4), ("failed", 3)]
