"""Trying new code against stored histories: what it lists, what it lets pass, and that it does nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest
import trio
from psycopg.conninfo import make_conninfo
from runtime.conftest import Query

from pgconductor import Conductor, Context, ExecutionStatus, Orchestrator, State, StepFailed, Trouble
from pgconductor.replaying import _Journal

Declare = Callable[[Conductor], None]

DAY = 86_400.0


def one() -> int:
    return 1


def two() -> int:
    return 2


def fail() -> int:
    raise ValueError("no luck")


def forbidden() -> int:
    raise AssertionError("a step is called")


async def run_until_waiting(dsn: str, declare: Declare, *payloads: dict[str, Any]) -> list[UUID]:
    """Run the old code until each execution waits; return their ids."""
    conductor = Conductor(dsn)
    declare(conductor)
    orchestrator = Orchestrator(conductor, tasks=list(conductor.registry), migrate=False, handle_signals=False)
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        handles = [await conductor.invoke("order", payload) for payload in payloads or ({},)]
        with trio.fail_after(20):
            for handle in handles:
                while not _is_asleep(await handle.status()):
                    await trio.sleep(0.005)
        orchestrator.stop()
    return [handle.id for handle in handles]


def _is_asleep(status: ExecutionStatus | None) -> bool:
    """Whether it waits for nothing but time."""
    return (
        status is not None and status.state is State.WAITING and all(wait.kind == "sleep" for wait in status.waits_for)
    )


async def check(dsn: str, declare: Declare, **options: Any) -> list[tuple[Trouble, str]]:
    """What is listed of the new code, on connections that cannot write."""
    conductor = Conductor(make_conninfo(dsn, options="-c default_transaction_read_only=on"))
    declare(conductor)
    async with conductor:
        report = await conductor.replay_check(**options)
    return [(found.trouble, found.what) for found in report.divergences]


def old(conductor: Conductor) -> None:
    """Two steps and a sleep."""

    @conductor.task
    async def order(ctx: Context) -> None:
        await ctx.step("one", one)
        await ctx.step("two", two)
        await ctx.sleep("rest", DAY)


async def test_same_code_goes_on_and_nothing_is_done(pgconductor_dsn: str, query: Query) -> None:
    """A check that finds fault with code that has not changed, that calls steps, or that writes."""

    def new(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            await ctx.step("one", forbidden)
            await ctx.step("two", forbidden)
            await ctx.sleep("rest", DAY)
            await ctx.step("later", forbidden)

    await run_until_waiting(pgconductor_dsn, old, {}, {})
    rows = (
        "select e::text from pgconductor._private_executions e"
        " union all select w::text from pgconductor._private_waits w"
    )
    before = query(rows)
    assert await check(pgconductor_dsn, old) == []
    assert await check(pgconductor_dsn, new) == []
    assert query(rows) == before


async def test_what_is_new_is_reached_and_not_done(pgconductor_dsn: str, query: Query) -> None:
    """The first new step runs, for every live execution, before the deploy."""

    def new(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            await ctx.step("one", one)
            await ctx.step("two", two)
            await ctx.sleep("rest", DAY)
            with trio.move_on_after(60):
                await ctx.step("mail", forbidden)
            raise AssertionError("goes on past a step that was not done")

    await run_until_waiting(pgconductor_dsn, old)
    query("update pgconductor._private_waits set resolved_at = now(), outcome = 'elapsed'")
    assert await check(pgconductor_dsn, new) == []


async def test_handler_of_batches_goes_on_with_no_history_only(pgconductor_dsn: str) -> None:
    """It has no steps: what was recorded would be passed over, and what was not begun is an item or is none."""

    def new(conductor: Conductor) -> None:
        @conductor.batch_task(size=10)
        async def order(items: list[int]) -> None:
            raise AssertionError("a handler of batches is called")

    await run_until_waiting(pgconductor_dsn, old)
    assert await check(pgconductor_dsn, new) == [
        (
            Trouble.PAYLOAD,
            "the payload of task 'order' does not fit its annotation: Object missing required field `item`",
        )
    ]

    def with_item(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context, item: int) -> None:
            await ctx.step("one", one)
            await ctx.sleep("rest", DAY)

    (execution,) = await run_until_waiting(pgconductor_dsn, with_item, {"item": 1})
    found = await check(pgconductor_dsn, new)
    assert (Trouble.UNASKED, "its handler is one of batches now, which asks for nothing that was recorded") in found
    conductor = Conductor(pgconductor_dsn)
    new(conductor)
    async with conductor:
        await conductor.cancel(execution)
        await conductor.invoke("order", {"item": 2})
        assert len((await conductor.replay_check()).divergences) == 1


@pytest.mark.parametrize(
    ("steps", "trouble", "said"),
    [
        (["one", "zwei", "sleep"], Trouble.DIVERGED, "asks for step 'zwei', where step 'two' was recorded"),
        (["two", "one", "new", "sleep"], Trouble.DIVERGED, "where sleep 'rest' was recorded"),
        (["one", "two", "now rest"], Trouble.DIVERGED, "asks for now 'rest', which was recorded as a sleep"),
        (["one"], Trouble.UNASKED, "it returns without asking for step 'two', sleep 'rest'"),
        ([], Trouble.UNASKED, "it returns without asking for step 'one', step 'two', sleep 'rest'"),
        (["one", "raise"], Trouble.FAILED, "it raises KeyError: 'gone'"),
    ],
)
async def test_changed_order_of_steps_is_listed(
    pgconductor_dsn: str, steps: list[str], trouble: Trouble, said: str
) -> None:
    """A deploy after which executions fail, or do again what they have done."""

    def new(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            for step in steps:
                if step == "sleep":
                    await ctx.sleep("rest", DAY)
                elif step.startswith("now"):
                    await ctx.now(name=step.split()[1])
                elif step == "raise":
                    raise KeyError("gone")
                else:
                    await ctx.step(step, forbidden)

    await run_until_waiting(pgconductor_dsn, old)
    ((found, what),) = await check(pgconductor_dsn, new)
    assert (found, said in what) == (trouble, True), what


async def test_report_names_the_execution_and_both_histories(pgconductor_dsn: str) -> None:
    """Whoever reads it has to look for which one, and for what."""

    def new(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            await ctx.step("one", one)
            await ctx.step("zwei", two)

    (execution,) = await run_until_waiting(pgconductor_dsn, old)
    conductor = Conductor(pgconductor_dsn)
    new(conductor)
    async with conductor:
        report = await conductor.replay_check()
    (found,) = report.divergences
    assert (report.checked, found.id, found.task, found.queue, found.version) == (
        1,
        execution,
        "order",
        "default",
        None,
    )
    assert found.recorded == ("step 'one'", "step 'two'", "sleep 'rest'")
    assert found.asked == ("step 'one'", "step 'zwei'")


async def test_payload_and_values_that_no_longer_decode_are_listed(pgconductor_dsn: str) -> None:
    """A parameter that was added without a default, or a step that returns another type."""

    def before(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context, n: int) -> None:
            await ctx.step("one", one)
            await ctx.sleep("rest", DAY)

    def another_parameter(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context, n: int, m: int) -> None:
            raise AssertionError("runs without its parameter")

    def text() -> str:
        return ""

    def another_type(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context, n: int) -> None:
            await ctx.step("one", text)

    def gone(conductor: Conductor) -> None:
        @conductor.task
        async def other() -> None: ...

    await run_until_waiting(pgconductor_dsn, before, {"n": 1})
    ((trouble, what),) = await check(pgconductor_dsn, another_parameter)
    assert (trouble, "required field `m`" in what) == (Trouble.PAYLOAD, True), what
    ((trouble, what),) = await check(pgconductor_dsn, another_type)
    assert (trouble, "it raises InvalidPayload" in what) == (Trouble.FAILED, True), what
    assert await check(pgconductor_dsn, gone) == [(Trouble.TASK, "there is no task 'order'")]


async def test_branches_are_followed_as_far_as_each_had_come(pgconductor_dsn: str) -> None:
    """One branch at its end hides that another one has changed; or the order of branches is taken for a change."""

    def before(conductor: Conductor) -> None:
        @conductor.task
        async def child(n: int) -> int:
            return n

        @conductor.task
        async def order(ctx: Context) -> None:
            async with ctx.nursery("all") as n:
                n.start_step("a", one)
                for number in range(3):
                    n.invoke(child, number)
            async with trio.open_nursery() as branches:
                branches.start_soon(ctx.sleep, "left", DAY)
                branches.start_soon(ctx.sleep, "right", DAY)
                branches.start_soon(ctx.step, "beside", two)

    def turned(conductor: Conductor) -> None:
        @conductor.task
        async def child(n: int) -> int:
            raise AssertionError("runs")

        @conductor.task
        async def order(ctx: Context) -> None:
            async with ctx.nursery("all") as n:
                for number in range(3):
                    n.invoke(child, number)
                n.start_step("a", forbidden)
            async with trio.open_nursery() as branches:
                branches.start_soon(ctx.step, "beside", forbidden)
                branches.start_soon(ctx.sleep, "right", DAY)
                branches.start_soon(ctx.sleep, "left", DAY)

    def renamed(conductor: Conductor) -> None:
        @conductor.task
        async def child(n: int) -> int:
            raise AssertionError("runs")

        @conductor.task
        async def order(ctx: Context) -> None:
            async with ctx.nursery("all") as n:
                for number in range(3):
                    n.invoke(child, number)
                n.start_step("a", forbidden)
            async with trio.open_nursery() as branches:
                branches.start_soon(ctx.sleep, "left", DAY)
                branches.start_soon(ctx.sleep, "right", DAY)
                branches.start_soon(ctx.step, "next to it", forbidden)

    await run_until_waiting(pgconductor_dsn, before)
    assert await check(pgconductor_dsn, before) == []
    assert await check(pgconductor_dsn, turned) == []
    assert await check(pgconductor_dsn, renamed) == [(Trouble.UNASKED, "it goes on without asking for step 'beside'")]


async def test_recorded_failures_are_served_as_failures(pgconductor_dsn: str) -> None:
    """A handler that deals with a step's failure takes another way in the check than in the engine."""

    def before(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            try:
                await ctx.step("fail", fail)
            except StepFailed:
                await ctx.step("mend", one)
            await ctx.sleep("rest", DAY)

    await run_until_waiting(pgconductor_dsn, before)
    assert await check(pgconductor_dsn, before) == []


async def test_error_after_all_that_is_recorded_may_be_an_old_one(pgconductor_dsn: str, query: Query) -> None:
    """Each execution that waits for its next attempt is listed, since its handler raises again."""

    def failing(conductor: Conductor) -> None:
        @conductor.task(backoff=3600)
        async def order(ctx: Context) -> None:
            await ctx.step("one", one)
            raise ValueError("the bank is closed")

    conductor = Conductor(pgconductor_dsn)
    failing(conductor)
    async with conductor:
        await conductor.invoke("order")
        await Orchestrator(conductor, tasks=list(conductor.registry), migrate=False).drain()
    assert query("select state::text, attempt from pgconductor._private_executions") == [("scheduled", 1)]
    assert await check(pgconductor_dsn, failing) == []


async def test_resources_are_stand_ins(pgconductor_dsn: str) -> None:
    """A check that needs the whole program's resources, or that uses them."""

    @dataclass
    class Row:
        n: int

    class Store:
        async def read(self) -> Row:
            return Row(1)

    def declare(conductor: Conductor, *, misused: bool = False) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            store = ctx.resource(Store)
            assert isinstance(store, Store)
            row = await ctx.step("read", store.read)
            assert row == Row(1)
            if misused:
                await store.read()
            await ctx.sleep("rest", DAY)

    # The annotations are read where the class is defined.
    globals().update(Row=Row)
    try:
        conductor = Conductor(pgconductor_dsn)
        declare(conductor)
        handle: Any = None

        async with conductor, trio.open_nursery() as nursery:
            orchestrator = Orchestrator(
                conductor, tasks=list(conductor.registry), migrate=False, resources=_lifespan(Store())
            )
            await nursery.start(orchestrator.run)
            handle = await conductor.invoke("order")
            with trio.fail_after(20):
                while (await handle.status()).state is not State.WAITING:
                    await trio.sleep(0.005)
            orchestrator.stop()
        assert await check(pgconductor_dsn, declare) == []
        ((trouble, what),) = await check(pgconductor_dsn, lambda conductor: declare(conductor, misused=True))
        assert (trouble, "Store.read outside of its steps" in what) == (Trouble.UNDECIDED, True), what
    finally:
        del globals()["Row"]


def _lifespan(resource: object) -> Callable[[], AbstractAsyncContextManager[object]]:
    @asynccontextmanager
    async def open_resources() -> AsyncIterator[object]:
        yield resource

    return open_resources


async def test_handler_that_waits_for_something_else_is_undecided(pgconductor_dsn: str) -> None:
    """A check that hangs, or that calls good what it has not seen."""

    def new(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context) -> None:
            await ctx.step("one", one)
            await trio.sleep(0.05)  # short: waited for
            await ctx.step("two", two)
            await trio.sleep_forever()

    await run_until_waiting(pgconductor_dsn, old)
    assert await check(pgconductor_dsn, new, patience=0.5) == [
        (Trouble.UNDECIDED, "it waited for more than 0.5 s for something that is not durable")
    ]


async def test_running_and_large_and_filtered_ones(pgconductor_dsn: str, query: Query) -> None:
    """A payload that is stored aside is lost, or a filter is dropped."""

    def before(conductor: Conductor) -> None:
        @conductor.task
        async def order(ctx: Context, text: str = "") -> None:
            await ctx.step("one", one)
            await ctx.sleep("rest", DAY)

    def gone(conductor: Conductor) -> None:
        return None

    large = "".join(chr(65 + n * 7 % 50) for n in range(20_000))
    await run_until_waiting(pgconductor_dsn, before, {"text": large}, {}, {})
    assert await check(pgconductor_dsn, before) == []
    assert len(await check(pgconductor_dsn, gone)) == 3
    assert len(await check(pgconductor_dsn, gone, limit=2)) == 2
    assert len(await check(pgconductor_dsn, gone, task="order", queue="default")) == 3
    assert await check(pgconductor_dsn, gone, task="other") == []
    assert await check(pgconductor_dsn, gone, queue="other") == []


def test_search_for_histories_is_bounded_and_goes_on(pgconductor_dsn: str, query: Query) -> None:
    """One statement that reads all live executions, or one behind many without a history that is not found."""
    query("select pgconductor.invoke('order') from generate_series(1, 250)")
    query(
        "update pgconductor._private_executions set is_durable = true"
        " where id = (select id from pgconductor.executions order by id desc limit 1)"
    )
    seen: list[str | None] = []
    after: UUID | None = None
    for _ in range(10):
        rows = query("select id, state from pgconductor.stored_histories(p_after => %s, p_look => 100)", after)
        seen += [state for _, state in rows]
        if not rows or rows[-1][1] is not None:
            break
        after = rows[-1][0]
    assert seen == [None, None, "ready"]


async def test_second_journal_refuses_whatever_is_new() -> None:
    """A durable operation that does not say that it is new writes into nothing, and takes that for done."""
    journal = _Journal(())
    for asking in (journal.save_step("a", "step", 0, "1", None), journal.start_waits([{}])):
        journal.is_at_end = False
        with trio.move_on_after(0.01) as scope:
            await asking
        assert scope.cancelled_caught
        assert journal.is_at_end
    assert json.dumps(await journal.load(is_first=True)) == "[]"
