"""Handlers of batches, on a real database: what becomes of each execution, whatever is done to the others.

Nothing here waits by sleeping: `drain` runs until nothing is left to do, and handlers signal by events.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from runtime.workplace import LIMIT, until

from pgconductor import (
    BatchContext,
    BatchItem,
    Cancellation,
    Conductor,
    Context,
    ExecutionCancelled,
    ExecutionFailed,
    Fixed,
    Handle,
    NoRetry,
    Orchestrator,
    RetryAfter,
    Snooze,
    Task,
)
from pgconductor.runtime.stock import Lot
from pgconductor.runtime.worker import Pipeline

AT_ONCE = Fixed(0.0)
STATES = "select (payload ->> 'item')::int, state::text, attempt from pgconductor.executions order by 1"
RUNNING = "select count(*) from pgconductor._private_executions where state = 'running'"


def of(conductor: Conductor, *tasks: Task[..., Any], concurrency: int = 1, **options: Any) -> Orchestrator:
    """An orchestrator whose worker has these tasks of queue "q"."""
    worker = conductor.create_worker(queue="q", tasks=tasks, concurrency=concurrency)
    return Orchestrator(conductor, workers=[worker], **options)


@asynccontextmanager
async def running(orchestrator: Orchestrator) -> AsyncGenerator[Pipeline]:
    """Run it inside the block, stop it at the end and wait for that; the pipeline of its only worker."""
    with trio.fail_after(3 * LIMIT):
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            (pipeline,) = orchestrator._pipelines
            yield pipeline
            orchestrator.stop()


def is_requested(pipeline: Pipeline, handle: Handle[Any]) -> bool:
    """Whether the worker was told that this running execution is to be cancelled."""
    interruption = pipeline._held[handle.id].interruption
    return interruption is not None and interruption.is_requested


class Desk:
    """A handler of batches that waits to be let go, and answers with ten times the item; or with what it is told to.

    `calls`: the items of each call, `contexts`: what it was given beside them, `ended`: calls that returned or raised.
    """

    def __init__(self, conductor: Conductor, **options: Any) -> None:
        self.calls: list[list[int]] = []  # each sorted: what one statement invoked comes in any order
        self.contexts: list[BatchContext] = []
        self.interrupted = 0
        self.ended = 0
        self.answers: dict[int, Any] = {}
        self.error: BaseException | None = None
        self.gate = trio.Event()
        self._items: dict[int, BatchItem] = {}

        async def work(ctx: BatchContext, items: list[int]) -> list[int | Exception]:
            self.calls.append(sorted(items))
            self.contexts.append(ctx)
            self._items.update(zip(items, ctx.items, strict=True))
            try:
                await self.gate.wait()
            except trio.Cancelled:
                self.interrupted += 1
                raise
            finally:
                self.ended += 1
            if self.error is not None:
                raise self.error
            return [self.answers.get(item, 10 * item) for item in items]

        options = {"size": 10, **options}
        self.task: Task[[int], int] = conductor.batch_task(queue="q", **options)(work)

    async def invoke(self, *items: int) -> list[Handle[int]]:
        return await self.task.invoke_many([self.task.bind(item) for item in items])

    def is_cancelled(self, item: int) -> bool:
        """What its `BatchItem` told the handler that was called last with it."""
        return self._items[item].is_cancelled

    async def until_called(self, times: int = 1) -> None:
        await until(lambda: len(self.calls) >= times)


# --- gathering -------------------------------------------------------------------------------------------------------


async def test_full_and_partial_batches_finish_each_execution_once(conductor: Conductor) -> None:
    """250 of at most 100 are three calls, and everyone gets the result of its own item."""
    desk = Desk(conductor, size=100)
    desk.gate.set()
    async with conductor:
        handles = await desk.invoke(*range(250))
        orchestrator = of(conductor, desk.task)
        assert (await orchestrator.drain()).completed == 250
        assert [await handle.result(timeout=0) for handle in handles] == [10 * n for n in range(250)]
        claims = orchestrator.statistics().workers[0]
    assert sorted(n for call in desk.calls for n in call) == list(range(250))
    assert sorted(len(call) for call in desk.calls) == [50, 100, 100]
    assert claims.claims - claims.empty_claims <= 3, "one runner asks for as many as its handler takes"


async def test_one_batch_takes_one_place_of_the_concurrency(conductor: Conductor) -> None:
    """`concurrency` bounds handlers; what is claimed meanwhile is a batch too, and not one by one."""
    desk = Desk(conductor, size=5)
    async with conductor:
        await desk.invoke(*range(20))
        async with running(of(conductor, desk.task, concurrency=2)) as pipeline:
            await desk.until_called(2)
            assert pipeline.statistics().running == 2
            desk.gate.set()
            await until(lambda: desk.ended == 4)
    assert [len(call) for call in desk.calls] == [5, 5, 5, 5]


async def test_a_batch_waits_for_company_until_it_is_full(conductor: Conductor, query: Any) -> None:
    """The first two wait for a minute, if nobody comes; the third makes it full."""
    desk = Desk(conductor, size=3, max_wait=60)
    desk.gate.set()
    async with conductor:
        async with running(of(conductor, desk.task)) as pipeline:
            await desk.invoke(1, 2)
            await until(lambda: pipeline.statistics().in_stock == 2)
            assert desk.calls == []
            (last,) = await desk.invoke(3)
            assert await last.result(timeout=LIMIT) == 30
            assert desk.calls == [[1, 2, 3]]
            await desk.invoke(4)  # waits, and goes back at the stop
            await until(lambda: pipeline.statistics().in_stock == 1)
        assert desk.calls == [[1, 2, 3]]
    assert query(STATES)[-1] == (4, "ready", 0)


async def test_a_batch_that_has_waited_long_enough_begins_as_it_is(
    conductor: Conductor,
) -> None:
    """Else a single execution would wait for company for ever."""
    desk = Desk(conductor, size=100, max_wait=0.2)
    desk.gate.set()
    async with conductor, running(of(conductor, desk.task)):
        first, second = await desk.invoke(1, 2)
        assert await first.result(timeout=LIMIT) == 10
        assert await second.result(timeout=LIMIT) == 20
        (third,) = await desk.invoke(3)
        assert await third.result(timeout=LIMIT) == 30
    assert desk.calls == [[1, 2], [3]]


@pytest.mark.parametrize("ahead", [2, 10])
async def test_what_became_due_while_all_are_busy_goes_back(conductor: Conductor, query: Any, ahead: int) -> None:
    """It would wait behind a long handler while another process is idle."""
    desk = Desk(conductor, size=2, max_wait=0.3)
    async with conductor, running(of(conductor, desk.task)) as pipeline:
        pipeline._prefetch.size = ahead
        await desk.invoke(1, 2)
        await desk.until_called()
        await desk.invoke(3)
        await until(lambda: pipeline.statistics().in_stock == 1)
        await until(lambda: query(RUNNING) == [(2,)])
        assert query(STATES)[2] == (3, "ready", 0)
        desk.gate.set()
        await until(lambda: len(desk.calls) == 2)
        await until(lambda: query(RUNNING) == [(0,)])
    assert desk.calls == [[1, 2], [3]]


async def test_plain_tasks_and_batches_share_a_worker(conductor: Conductor) -> None:
    """Each execution is called by its own handler, however they are mixed in the queue."""
    desk = Desk(conductor, size=7)
    desk.gate.set()
    singles: list[int] = []

    @conductor.task(queue="q")
    async def single(ctx: Context, n: int) -> int:
        singles.append(n)
        return await ctx.step("double", lambda: 2 * n)

    async with conductor:
        for n in range(0, 60, 6):
            await desk.invoke(*range(n, n + 6))
            await single.invoke_many([single.bind(n), single.bind(n + 1)])
        drained = await of(conductor, desk.task, single, concurrency=3).drain()
    assert drained.completed == 80
    assert sorted(n for call in desk.calls for n in call) == list(range(60))
    assert sorted(singles) == sorted(m for n in range(0, 60, 6) for m in (n, n + 1))
    assert max(len(call) for call in desk.calls) <= 7


async def test_versions_are_not_mixed(conductor: Conductor) -> None:
    """A former version has the same options, and a handler of its own."""
    calls: list[tuple[str, list[Any]]] = []

    @conductor.batch_task(queue="q", size=10, version="2")
    async def number(items: list[int]) -> None:
        calls.append(("2", sorted(items)))

    def former(items: list[str]) -> list[int]:
        calls.append(("1", sorted(items)))
        return [len(item) for item in items]

    number_1 = number.batch_former("1")(former)
    assert number_1.batch == number.batch
    async with conductor:
        handles: list[Handle[Any]] = []
        for n in range(4):
            await number.invoke(n)
            handles.append(await number_1.invoke("x" * n))
        assert (await of(conductor, number).drain()).completed == 8
        assert [await handle.result(timeout=0) for handle in handles] == [0, 1, 2, 3]
    assert sorted(calls) == [("1", ["", "x", "xx", "xxx"]), ("2", [0, 1, 2, 3])]


async def test_a_task_of_batches_was_one_of_single_executions_and_the_other_way_round(conductor: Conductor) -> None:
    """What is in flight when the handler changes its kind is run by a handler of the kind it was made for."""
    got: dict[str, list[object]] = {"gathered": [], "gathered 1": [], "single": [], "single 1": []}

    @conductor.batch_task(queue="q", size=10, version="2")
    async def gathered(items: list[int]) -> None:
        got["gathered"] += items

    @gathered.former("1")
    async def gathered_1(first: int, second: int) -> int:
        got["gathered 1"].append((first, second))
        return first + second

    @conductor.task(queue="q", version="2")
    async def single(name: str) -> None:
        got["single"].append(name)

    @single.batch_former("1", size=3)
    async def single_1(items: list[str]) -> list[str | Exception]:
        got["single 1"] += items
        return [item.upper() for item in items]

    async with conductor:
        for n in range(3):
            await gathered.invoke(n)
        added = await gathered_1.invoke(1, second=2)
        await single.invoke("a")
        shouted = [await single_1.invoke(word) for word in ("x", "y", "z")]
        assert (await of(conductor, gathered, single).drain()).completed == 8
        assert await added.result(timeout=0) == 3
        assert [await each.result(timeout=0) for each in shouted] == ["X", "Y", "Z"]
    assert got == {"gathered": [0, 1, 2], "gathered 1": [(1, 2)], "single": ["a"], "single 1": ["x", "y", "z"]}


async def test_a_plain_function_gets_its_batch_in_a_thread(conductor: Conductor) -> None:
    """A blocking handler must not block the event loop."""
    threads: set[int] = set()

    @conductor.batch_task(queue="q", size=10)
    def shout(ctx: BatchContext, items: Sequence[str]) -> Sequence[str | Exception]:
        threads.add(threading.get_ident())
        assert len(ctx.items) == len(items)
        assert not ctx.is_cancelled
        return tuple(item.upper() for item in items)

    async with conductor:
        handles = [await shout.invoke(word) for word in ("a", "b", "c")]
        assert (await of(conductor, shout).drain()).completed == 3
        assert [await handle.result(timeout=0) for handle in handles] == ["A", "B", "C"]
    assert threads
    assert threading.get_ident() not in threads


async def test_sql_and_names_send_items(conductor: Conductor, query: Any) -> None:
    """The payload is the object of one parameter, `item`, whoever writes it."""
    desk = Desk(conductor)
    desk.gate.set()
    async with conductor:
        query("select pgconductor.invoke('work', '{\"item\": 1}', 'q')")
        await conductor.invoke("work", {"item": 2}, queue="q")
        await desk.task.options(priority=-1).invoke(3)
        assert (await of(conductor, desk.task).drain()).completed == 3
    assert desk.calls == [[1, 2, 3]]


async def test_children_of_a_durable_handler_are_gathered(conductor: Conductor) -> None:
    """What has a history of its own may use what has none, and waits without a slot."""
    desk = Desk(conductor, size=20)
    desk.gate.set()
    desk.answers = {3: NoRetry("three")}

    @conductor.task(queue="q", max_attempts=1)
    async def parent(ctx: Context, n: int) -> int:
        return await ctx.invoke("child", desk.task, n)

    async with conductor:
        handles = await parent.invoke_many([parent.bind(n) for n in range(10)])
        await of(conductor, desk.task, parent, concurrency=3).drain()
        with pytest.raises(ExecutionFailed, match="three"):
            await handles[3].result(timeout=0)
        assert [await handle.result(timeout=0) for handle in handles if handle != handles[3]] == [
            10 * n for n in range(10) if n != 3
        ]
    assert sorted(n for call in desk.calls for n in call) == list(range(10))


async def test_large_items_are_loaded_before_the_call(conductor: Conductor) -> None:
    """Large payloads do not come with a claim."""

    @conductor.batch_task(queue="q", size=10)
    async def measure(items: list[str]) -> list[int]:
        return [len(item) for item in items]

    async with conductor:
        handles = [await measure.invoke("x" * size) for size in (10, 100_000, 20, 200_000)]
        assert (await of(conductor, measure).drain()).completed == 4
        assert [await handle.result(timeout=0) for handle in handles] == [10, 100_000, 20, 200_000]


# --- answers and errors ----------------------------------------------------------------------------------------------


async def test_each_answer_is_its_executions_own(conductor: Conductor, query: Any) -> None:
    """A value completes, an error is tried again or not, as if its own handler had raised it."""
    desk = Desk(conductor, max_attempts=2, backoff=Fixed(3600.0))
    desk.answers = {2: ValueError("two"), 3: NoRetry("three"), 4: RetryAfter(0.0), 5: Snooze(3600.0)}
    desk.gate.set()
    async with conductor:
        handles = await desk.invoke(1, 2, 3, 4, 5)
        drained = await of(conductor, desk.task).drain()
        assert (drained.completed, drained.retried, drained.failed) == (1, 2, 2)
        assert await handles[0].result(timeout=0) == 10
        with pytest.raises(ExecutionFailed, match="three"):
            await handles[2].result(timeout=0)
    assert desk.calls == [[1, 2, 3, 4, 5], [4]], "the fourth has its last attempt alone"
    assert query(STATES) == [
        (1, "completed", 1),
        (2, "scheduled", 1),
        (3, "failed", 1),
        (4, "failed", 2),
        (5, "scheduled", 0),
    ]
    assert query("select errors -> 0 ->> 'message' from pgconductor.executions where payload ->> 'item' = '2'") == [
        ("two",)
    ]


async def test_one_bad_item_fails_no_neighbour_for_good(conductor: Conductor, query: Any) -> None:
    """All are tried again for what one of them did, and the last attempt of each is its own."""
    calls: list[list[int]] = []

    @conductor.batch_task(queue="q", size=10, max_attempts=3, backoff=AT_ONCE)
    async def fragile(items: list[int]) -> list[int]:
        calls.append(sorted(items))
        if 3 in items:
            raise RuntimeError("three")
        return items

    async with conductor:
        await fragile.invoke_many([fragile.bind(n) for n in range(5)])
        drained = await of(conductor, fragile).drain()
    assert (drained.completed, drained.failed, drained.retried) == (4, 1, 10)
    assert calls[:2] == [[0, 1, 2, 3, 4]] * 2
    assert sorted(calls[2:]) == [[0], [1], [2], [3], [4]]
    assert query(STATES) == [(n, "failed" if n == 3 else "completed", 3) for n in range(5)]


async def test_a_single_attempt_is_no_last_one(conductor: Conductor) -> None:
    """With max_attempts=1 all would be alone, and nothing would ever be a batch."""
    desk = Desk(conductor, max_attempts=1)
    desk.gate.set()
    async with conductor:
        await desk.invoke(1, 2, 3)
        await desk.task.options(max_attempts=5).invoke(4)
        await of(conductor, desk.task).drain()
    assert desk.calls == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1], "given 3 items and returned 1 answers"),
        ([1, 2, 3, 4], "returned 4 answers"),
        (None, "returned None; it is to return a list of 3"),
        ("abc", "returned an object of type str"),
        ({1: 1, 2: 2, 3: 3}, "returned an object of type dict"),
    ],
)
async def test_a_result_that_is_no_answer_for_each_is_everybodys_failure(
    conductor: Conductor, query: Any, answer: Any, message: str
) -> None:
    """Which of them it would belong to, nobody knows; but each has its own attempts left."""
    calls: list[int] = []

    @conductor.batch_task(queue="q", size=10, max_attempts=2, backoff=AT_ONCE)
    async def confused(items: list[int]) -> list[int]:
        calls.append(len(items))
        return answer if len(items) > 1 else items

    async with conductor:
        await confused.invoke_many([confused.bind(n) for n in range(3)])
        drained = await of(conductor, confused).drain()
    assert (drained.retried, drained.completed) == (3, 3)
    assert calls == [3, 1, 1, 1]
    ((error,),) = query("select distinct errors -> 0 ->> 'message' from pgconductor.executions")
    assert message in error
    assert "'confused'" in error


async def test_nothing_returned_completes_all(conductor: Conductor, query: Any) -> None:
    """Annotated so; and what is returned all the same is a mistake."""

    @conductor.batch_task(queue="q", size=10)
    async def note(items: list[int]) -> None:
        pass

    @conductor.batch_task(queue="q", size=10, max_attempts=1)
    async def liar(items: list[int]) -> None:
        return items  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    async with conductor:
        noted = await note.invoke_many([note.bind(n) for n in range(3)])
        (lied,) = await liar.invoke_many([liar.bind(1)])
        drained = await of(conductor, note, liar).drain()
        assert (drained.completed, drained.failed) == (3, 1)
        for handle in noted:
            await handle.result(timeout=0)
        with pytest.raises(ExecutionFailed, match="annotated to return None"):
            await lied.result(timeout=0)


async def test_what_does_not_fit_fails_its_own_execution_only(conductor: Conductor, query: Any) -> None:
    """A payload before the handler sees it, a result after; the neighbours have theirs."""
    desk = Desk(conductor)
    desk.answers = {2: "no number", 3: float("nan")}
    desk.gate.set()
    async with conductor:
        handles = await desk.invoke(1, 2, 3)
        query("select pgconductor.invoke('work', '{\"item\": \"x\"}', 'q')")
        query("select pgconductor.invoke('work', '{\"n\": 1}', 'q')")
        drained = await of(conductor, desk.task).drain()
        assert (drained.completed, drained.failed, drained.retried) == (1, 4, 0)
        assert await handles[0].result(timeout=0) == 10
    assert desk.calls == [[1, 2, 3]]


async def test_keyboard_interrupt_gives_all_back_and_propagates(conductor: Conductor, query: Any) -> None:
    """Ctrl-C in a handler is never recorded as its failure."""
    desk = Desk(conductor)
    desk.error = KeyboardInterrupt()
    desk.gate.set()
    async with conductor:
        await desk.invoke(1, 2)
        with pytest.raises(BaseExceptionGroup) as raised:
            await of(conductor, desk.task).drain()
        assert raised.value.subgroup(KeyboardInterrupt) is not None
    assert query(STATES) == [(1, "ready", 0), (2, "ready", 0)]


# --- cancellation ----------------------------------------------------------------------------------------------------


async def test_one_of_a_running_batch_is_cancelled(conductor: Conductor, query: Any) -> None:
    """Its item tells at once, the others do not notice, and what the handler answers for it decides."""
    desk = Desk(conductor)
    desk.answers = {2: ValueError("left out")}
    async with conductor:
        one, two, three = await desk.invoke(1, 2, 3)
        async with running(of(conductor, desk.task)):
            await desk.until_called()
            assert await two.cancel("no budget") is Cancellation.REQUESTED
            assert await three.cancel("too late") is Cancellation.REQUESTED
            await until(lambda: desk.is_cancelled(2) and desk.is_cancelled(3))
            assert not desk.is_cancelled(1)
            assert not desk.contexts[0].is_cancelled
            assert desk.interrupted == 0
            desk.gate.set()
            assert await one.result(timeout=LIMIT) == 10
            with pytest.raises(ExecutionCancelled) as cancelled:
                await two.result(timeout=LIMIT)
            assert cancelled.value.reason == "no budget"
            assert await three.result(timeout=LIMIT) == 30, "a result that was returned wins"
    assert len(desk.calls) == 1
    assert query("select errors -> 0 ->> 'message' from pgconductor.executions where state = 'cancelled'") == [
        ("left out",)
    ]


async def test_cancelled_member_of_a_batch_whose_handler_raises_is_not_tried_again(
    conductor: Conductor, query: Any
) -> None:
    """It always gets an end, and the others their next attempt."""
    desk = Desk(conductor, max_attempts=3, backoff=Fixed(3600.0))
    desk.error = RuntimeError("broken")
    async with conductor:
        _, two = await desk.invoke(1, 2)
        async with running(of(conductor, desk.task)):
            await desk.until_called()
            await two.cancel("why")
            await until(lambda: desk.is_cancelled(2))
            desk.gate.set()
            with pytest.raises(ExecutionCancelled, match="why"):
                await two.result(timeout=LIMIT)
    assert query(STATES) == [(1, "scheduled", 1), (2, "cancelled", 1)]


async def test_handler_is_interrupted_when_all_are_cancelled(conductor: Conductor) -> None:
    """Nobody is left who wants it."""
    desk = Desk(conductor)
    async with conductor:
        handles = await desk.invoke(1, 2, 3)
        async with running(of(conductor, desk.task)):
            await desk.until_called()
            await handles[0].cancel("a")
            await handles[1].cancel("b")
            await until(lambda: desk.is_cancelled(2))
            assert not desk.contexts[0].is_cancelled
            await handles[2].cancel("c")
            for handle, reason in zip(handles, "abc", strict=True):
                with pytest.raises(ExecutionCancelled) as cancelled:
                    await handle.result(timeout=LIMIT)
                assert cancelled.value.reason == reason
    assert desk.interrupted == 1


async def test_cancelled_while_it_waits_for_company_is_never_begun(conductor: Conductor, query: Any) -> None:
    """Its neighbours wait on."""
    desk = Desk(conductor, size=3, max_wait=60)
    desk.gate.set()
    async with conductor, running(of(conductor, desk.task)) as pipeline:
        one, two = await desk.invoke(1, 2)
        await until(lambda: pipeline.statistics().in_stock == 2)
        assert await one.cancel() is Cancellation.REQUESTED
        with pytest.raises(ExecutionCancelled):
            await one.result(timeout=LIMIT)
        assert pipeline.statistics().in_stock == 1
        await desk.invoke(3, 4)
        assert await two.result(timeout=LIMIT) == 20
    assert desk.calls == [[2, 3, 4]]


async def test_checking_one_item_costs_the_others_nothing(conductor: Conductor, query: Any) -> None:
    """A handler that lets `check_cancelled` of an item leave it has not failed for the others."""
    calls: list[list[int]] = []
    begun = trio.Event()
    gate = trio.Event()

    @conductor.batch_task(queue="q", size=10, max_attempts=2)
    async def careful(ctx: BatchContext, items: list[int]) -> None:
        calls.append(sorted(items))
        begun.set()
        await gate.wait()
        for item in ctx.items:
            item.check_cancelled()

    async with conductor:
        one, two = await careful.invoke_many([careful.bind(1), careful.bind(2)])
        async with running(of(conductor, careful)) as pipeline:
            await begun.wait()
            await two.cancel("why")
            await until(lambda: is_requested(pipeline, two))
            gate.set()
            await one.result(timeout=LIMIT)
    assert calls == [[1, 2], [1]]
    assert query(STATES) == [(1, "completed", 1), (2, "cancelled", 1)]


# --- the end of time -------------------------------------------------------------------------------------------------


async def test_only_those_whose_time_is_up_have_run_out_of_it(conductor: Conductor, query: Any) -> None:
    """The call has the least time that any of them has; nothing is known against the others."""
    desk = Desk(conductor, timeout=3600.0, max_attempts=1)
    async with conductor:
        (long,) = await desk.invoke(1)
        short = await desk.task.options(timeout=0.2).invoke(2)
        dead = await desk.task.options(deadline=1.0).invoke(3)
        async with running(of(conductor, desk.task)):
            with pytest.raises(ExecutionFailed, match="timeout") as failed:
                await short.result(timeout=LIMIT)
            assert failed.value.error["type"] == "timeout"
            with pytest.raises(ExecutionFailed, match="deadline"):
                await dead.result(timeout=LIMIT)
            desk.gate.set()
            assert await long.result(timeout=LIMIT) == 10
    assert desk.calls[0] == [1, 2, 3]
    assert query(STATES) == [(1, "completed", 1), (2, "failed", 1), (3, "failed", 1)]


async def test_passed_deadline_fails_before_the_call(conductor: Conductor, query: Any) -> None:
    """It is no part of the batch, and does not wait for its end."""
    desk = Desk(conductor)
    async with conductor:
        await desk.invoke(1)
        dead = await desk.task.options(deadline=3600.0).invoke(2)
        query("update pgconductor._private_executions set deadline_at = now() - interval '1 s' where id = %s", dead.id)
        async with running(of(conductor, desk.task)):
            with pytest.raises(ExecutionFailed, match="before the attempt began"):
                await dead.result(timeout=LIMIT)
            await desk.until_called()
            desk.gate.set()
    assert desk.calls == [[1]]


async def test_thread_that_runs_out_of_time_is_asked_to_end(conductor: Conductor, query: Any) -> None:
    """Nobody can stop it; what it raises then is the timeout of those whose it was."""

    @conductor.batch_task(queue="q", size=10, max_attempts=1)
    def block(ctx: BatchContext, items: list[int]) -> None:
        for _ in range(2000):
            ctx.check_cancelled()
            if len(items) == 1:
                return
            threading.Event().wait(0.01)

    async with conductor:
        (patient,) = await block.invoke_many([block.bind(1)])
        hasty = await block.options(timeout=0.1).invoke(2)
        async with running(of(conductor, block)):
            with pytest.raises(ExecutionFailed, match="timeout"):
                await hasty.result(timeout=LIMIT)
            await patient.result(timeout=LIMIT)
    assert query(STATES) == [(1, "completed", 1), (2, "failed", 1)]


# --- stopping and losing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_stop_gives_a_running_batch_back_without_an_attempt(conductor: Conductor, query: Any, kind: str) -> None:
    """As a single execution: the process ends, nothing has failed."""
    desk = Desk(conductor)
    begun = threading.Event()

    @conductor.batch_task(name="block", queue="q", size=10)
    def block(ctx: BatchContext, items: list[int]) -> None:
        begun.set()
        while not ctx.is_cancelled:
            threading.Event().wait(0.005)
        ctx.check_cancelled()

    async with conductor:
        task: Task[[int], Any] = block if kind == "plain" else desk.task
        await task.invoke_many([task.bind(n) for n in range(3)])
        async with running(of(conductor, task, grace=0.05)):
            await until(lambda: begun.is_set() or bool(desk.calls))
    assert query(STATES) == [(n, "ready", 0) for n in range(3)]
    assert query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


async def test_what_waits_for_company_goes_back_at_once(conductor: Conductor, query: Any) -> None:
    """Others can take it, however long the grace is for what runs; and nothing begins after the stop."""
    desk = Desk(conductor, size=2, max_wait=60)
    async with conductor:
        await desk.invoke(1, 2)
        orchestrator = of(conductor, desk.task, concurrency=2)
        async with running(orchestrator) as pipeline:
            await desk.until_called()
            await desk.invoke(3)
            await until(lambda: pipeline.statistics().in_stock == 1)
            orchestrator.stop()
            await until(lambda: query(STATES) == [(1, "running", 1), (2, "running", 1), (3, "ready", 0)])
            desk.gate.set()
    assert desk.calls == [[1, 2]]
    assert query(STATES) == [(1, "completed", 1), (2, "completed", 1), (3, "ready", 0)]


async def test_cancelled_run_gives_a_batch_back(conductor: Conductor, query: Any) -> None:
    """A scope outside ends the handler, and no attempt is lost."""
    desk = Desk(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await desk.invoke(1, 2)
        await nursery.start(of(conductor, desk.task).run)
        await desk.until_called()
        nursery.cancel_scope.cancel()
    assert desk.interrupted == 1
    assert query(STATES) == [(1, "ready", 0), (2, "ready", 0)]


async def test_claim_that_is_lost_leaves_the_batch_to_the_others(conductor: Conductor, query: Any) -> None:
    """Its outcome is not sent, and the handler goes on; it ends when nothing is left of it."""
    desk = Desk(conductor)
    async with conductor:
        one, two = await desk.invoke(1, 2)
        orchestrator = of(conductor, desk.task)
        async with running(orchestrator) as pipeline:
            await desk.until_called()
            owner = pipeline._lease.owner
            query("update pgconductor._private_executions set state = 'ready', owner = null where id = %s", one.id)
            pipeline.succeed(owner, frozenset({two.id}))
            assert desk.is_cancelled(1)
            assert not desk.contexts[0].is_cancelled
            desk.gate.set()
            assert await two.result(timeout=LIMIT) == 20
            await until(lambda: orchestrator.statistics().workers[0].dropped == 1)
            assert await one.result(timeout=LIMIT) == 10, "by its next claim"
    assert desk.calls == [[1, 2], [1]]


async def test_batch_of_which_all_claims_are_lost_is_interrupted(conductor: Conductor, query: Any) -> None:
    """What it does is done by others by now."""
    desk = Desk(conductor)
    async with conductor:
        await desk.invoke(1, 2)
        orchestrator = of(conductor, desk.task)
        async with running(orchestrator) as pipeline:
            await desk.until_called()
            pipeline.succeed(pipeline._lease.owner, frozenset())
            await until(lambda: orchestrator.statistics().workers[0].dropped == 2)
            assert desk.interrupted == 1


async def test_suspect_is_a_batch_of_its_own(conductor: Conductor, query: Any) -> None:
    """Whoever is beside it when it kills the process would be charged as well."""
    desk = Desk(conductor)
    desk.gate.set()
    async with conductor:
        query("select pgconductor.register_queue('q')")
        handles = await desk.invoke(*range(6))
        query(
            "update pgconductor._private_executions set crashes = 2, claim_no = 2 where id = any (%s)",
            [handle.id for handle in handles[:2]],
        )
        worker = conductor.create_worker(queue="q", tasks=[desk.task], sweep_interval=0.1)
        async with running(Orchestrator(conductor, workers=[worker], lease=2.0)):
            assert [await handle.result(timeout=LIMIT) for handle in handles] == [10 * n for n in range(6)]
    assert [0] in desk.calls
    assert [1] in desk.calls


async def test_repr_of_a_lot_tells_its_size(conductor: Conductor) -> None:
    """What a debugger shows must not lie."""
    desk = Desk(conductor, size=5, max_wait=60)
    async with conductor, running(of(conductor, desk.task)) as pipeline:
        await desk.invoke(1, 2)
        await until(lambda: pipeline.statistics().in_stock == 2)
        (lot,) = pipeline._stock._growing.values()
        assert isinstance(lot, Lot)
        assert repr(lot) == "<Lot of 2 of task 'work'>"
        assert repr(pipeline._stock) == "<Stock of 0 executions and 2 apart>"
