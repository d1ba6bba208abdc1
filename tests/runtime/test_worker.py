"""The pipeline of one queue, on a real database: what becomes of executions, whatever their handlers do.

Nothing here waits by sleeping: `drain` runs until nothing is left to do, and handlers signal by events.
"""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import trio

from pgconductor import Conductor, Context, ExecutionFailed, Exponential, Limits, Orchestrator
from pgconductor.testing import DatabaseClock, drain

AT_ONCE = Exponential(initial=0.0, maximum=0.0)


async def test_every_execution_finishes_once_and_keeps_its_result(conductor: Conductor, query: Any) -> None:
    """A pipeline that loses or repeats an outcome shows here first."""
    runs: list[int] = []

    @conductor.task(queue="q")
    async def double(n: int) -> int:
        runs.append(n)
        return 2 * n

    async with conductor:
        handles = await double.invoke_many([double.bind(n) for n in range(500)])
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[double])])
        drained = await orchestrator.drain()
        assert drained.completed == 500
        assert sorted(runs) == list(range(500))
        assert [await handle.result(timeout=0) for handle in handles[::50]] == [2 * n for n in range(0, 500, 50)]
    assert query("select state::text, count(*) from pgconductor.executions group by 1") == [("completed", 500)]
    assert query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


async def test_claims_are_counted_as_full_short_and_empty(conductor: Conductor) -> None:
    """Claims that bring less than they asked for, and how long claims take, are how contention shows."""

    @conductor.task(queue="q")
    async def noop() -> None:
        pass

    async with conductor:
        await noop.invoke_many([noop.bind() for _ in range(7)])
        worker = conductor.create_worker(queue="q", tasks=[noop], concurrency=5, claim_batch=5)
        orchestrator = Orchestrator(conductor, workers=[worker])
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            with trio.fail_after(30):
                while (counts := orchestrator.statistics().workers[0]).outcomes.get("completed", 0) < 7:
                    await trio.sleep(0.01)
            orchestrator.stop()
    # Five of five, then two of five or less, then none.
    assert (counts.claims - counts.empty_claims, counts.short_claims, counts.claimed) == (2, 1, 7)
    assert len(counts.claim_seconds) == counts.claims
    assert all(0 < seconds < 30 for seconds in counts.claim_seconds)


async def test_a_failing_handler_is_tried_again_and_every_error_is_kept(conductor: Conductor, query: Any) -> None:
    """Attempts end at max_attempts with the state failed, whatever the retention is."""

    @conductor.task(max_attempts=3, backoff=AT_ONCE)
    async def fail(ctx: Context) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    async with conductor:
        handle = await fail.invoke()
        drained = await Orchestrator(conductor, tasks=[fail]).drain()
        assert (drained.retried, drained.failed, drained.completed) == (2, 1, 0)
        with pytest.raises(ExecutionFailed, match="attempt 3"):
            await handle.result(timeout=0)
    assert query("select state::text, attempt, crashes, jsonb_path_query_array(errors, '$[*].message')"
                 " from pgconductor.executions") == [
        ("failed", 3, 0, ["attempt 1", "attempt 2", "attempt 3"])
    ]  # fmt: skip


async def test_backoff_is_obeyed_by_the_databases_clock(
    conductor: Conductor, pgconductor_clock: DatabaseClock, query: Any
) -> None:
    """A retry that is due in an hour is not run now, and is run when the hour is over."""

    @conductor.task(max_attempts=2, backoff=Exponential(initial=3600.0, jitter=0.0))
    async def fail() -> None:
        raise RuntimeError

    async with conductor:
        await fail.invoke()
        orchestrator = Orchestrator(conductor, tasks=[fail])
        assert (await drain(orchestrator, clock=pgconductor_clock, horizon=3000)).retried == 1
        assert query("select state::text from pgconductor.executions") == [("scheduled",)]
        before = pgconductor_clock.now()
        assert (await drain(orchestrator, clock=pgconductor_clock, horizon=4000)).failed == 1
        assert (pgconductor_clock.now() - before).total_seconds() > 3500


async def test_a_plain_function_runs_in_a_thread(conductor: Conductor) -> None:
    """A blocking handler must not block the event loop, and no more run at once than the concurrency."""
    names: set[str] = set()
    at_once = 0
    most = 0
    lock = threading.Lock()
    barrier = threading.Barrier(3, timeout=20)

    @conductor.task(queue="q")
    def block(n: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
            names.add(threading.current_thread().name)
        barrier.wait()  # passes only if three run at once
        with lock:
            at_once -= 1
        return n

    async with conductor:
        handles = await block.invoke_many([block.bind(n) for n in range(9)])
        worker = conductor.create_worker(queue="q", tasks=[block], concurrency=3)
        assert (await Orchestrator(conductor, workers=[worker]).drain()).completed == 9
        assert [await handle.result(timeout=0) for handle in handles] == list(range(9))
    assert most == 3
    assert threading.current_thread().name not in names


async def test_a_runner_that_lets_others_have_a_turn_leaves_nobody_asleep(conductor: Conductor) -> None:
    """It goes on by itself, so another one that was woken sleeps on; but its handler may wait, and the rest with it."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("another", default=0)
    met = trio.Event()
    waiting = 0

    @conductor.task(queue="q")
    async def meet(n: int) -> None:
        nonlocal waiting
        variable.set(n)  # before its next execution the runner lets others have a turn
        if n > 2:
            waiting += 1
            if waiting == 2:
                met.set()
            await met.wait()

    worker = conductor.create_worker(queue="q", tasks=[meet], concurrency=2)
    orchestrator = Orchestrator(conductor, workers=[worker])
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        for n in (1, 2):  # one for each runner
            await (await meet.invoke(n)).result(timeout=20)
        for handle in await meet.invoke_many([meet.bind(3), meet.bind(4)]):
            await handle.result(timeout=20)
        orchestrator.stop()


async def test_context_variables_do_not_leak_between_executions(conductor: Conductor) -> None:
    """A runner task serves many executions; each must start in a context of its own."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    seen: list[int] = []

    @conductor.task(queue="q")
    async def leak(n: int) -> None:
        seen.append(variable.get())
        variable.set(n)
        await trio.lowlevel.checkpoint()
        assert variable.get() == n

    async with conductor:
        await leak.invoke_many([leak.bind(n) for n in range(1, 50)])
        worker = conductor.create_worker(queue="q", tasks=[leak], concurrency=2)
        assert (await Orchestrator(conductor, workers=[worker]).drain()).completed == 49
    assert seen == [0] * 49


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ('{"n": "x"}', "does not fit"),
        ("{}", "missing"),
        ('{"n": 1, "m": 2}', "m"),
        ('{"n": ' + "[" * 3000 + "]" * 3000 + "}", "nested"),
        ('{"n": ' + "9" * 5000 + "}", ""),
    ],
)
async def test_an_undecodable_payload_fails_its_execution_only(
    conductor: Conductor, query: Any, payload: str, message: str
) -> None:
    """Anybody may insert by SQL what the handler cannot take; the claim loop lives, and there is no second attempt."""

    @conductor.task(queue="q")
    async def number(n: int) -> int:
        return n

    query("select pgconductor.invoke('number', %s::jsonb, 'q')", payload)
    async with conductor:
        handle = await number.invoke(7)
        worker = conductor.create_worker(queue="q", tasks=[number])
        drained = await Orchestrator(conductor, workers=[worker]).drain()
        assert (drained.completed, drained.failed, drained.retried) == (1, 1, 0)
        assert await handle.result(timeout=0) == 7
    ((text,),) = query("select errors -> 0 ->> 'message' from pgconductor.executions where state = 'failed'")
    assert message in text


@pytest.mark.parametrize("value", ["nul \0", float("nan"), "\ud800", {1: "not a string key"}, object()])
async def test_a_result_that_cannot_be_stored_fails_its_execution_only(
    conductor: Conductor, query: Any, value: object
) -> None:
    """One bad result must not wedge the flush of the others, nor be tried again."""

    @conductor.task(queue="q")
    async def give(bad: bool) -> Any:
        return value if bad else "good"

    async with conductor:
        handles = await give.invoke_many([give.bind(bad=n == 5) for n in range(10)])
        worker = conductor.create_worker(queue="q", tasks=[give])
        drained = await Orchestrator(conductor, workers=[worker]).drain()
        if isinstance(value, dict):  # keys of numbers become strings under Any; whether that is refused is the codec's
            assert drained.completed + drained.failed == 10
            return
        assert (drained.completed, drained.failed, drained.retried) == (9, 1, 0)
        assert await handles[0].result(timeout=0) == "good"
    assert query("select attempt from pgconductor.executions where state = 'failed'") == [(1,)]


async def test_what_postgres_refuses_is_split_from_the_batch(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line of defence: a value that passed the codec and that the database does not store."""

    @conductor.task(queue="q")
    async def give(n: int) -> int:
        return n

    give.resolve()
    encode = give.result.encode

    def let_pass(_: object, value: int) -> str:
        return '"\\u0000"' if value in (3, 8) else encode(value)

    monkeypatch.setattr(type(give.result), "encode", let_pass)
    async with conductor:
        await give.invoke_many([give.bind(n) for n in range(10)])
        worker = conductor.create_worker(queue="q", tasks=[give])
        drained = await Orchestrator(conductor, workers=[worker]).drain()
    assert (drained.completed, drained.failed) == (8, 2)
    assert query("select distinct errors -> 0 ->> 'type' from pgconductor.executions where state = 'failed'") == [
        ("pgconductor.errors.Unstorable",)
    ]


class _Hostile(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even a message")


@pytest.mark.parametrize(
    "error",
    [
        _Hostile(),
        SystemExit(3),
        ExceptionGroup("several", [ValueError("one"), KeyError("two")]),
        ValueError("\0 and \ud800"),
        ValueError("x" * 10_000_000),
        RecursionError("deep"),
    ],
    ids=["str raises", "SystemExit", "group", "unstorable text", "huge", "recursion"],
)
async def test_hostile_exceptions_are_data(conductor: Conductor, query: Any, error: BaseException) -> None:
    """Whatever a handler raises is recorded, bounded, and stops nobody else."""

    @conductor.task(queue="q", max_attempts=1)
    async def throw(bad: bool) -> None:
        if bad:
            raise error

    async with conductor:
        await throw.invoke_many([throw.bind(bad=n == 1) for n in range(3)])
        worker = conductor.create_worker(queue="q", tasks=[throw])
        drained = await Orchestrator(conductor, workers=[worker]).drain()
    assert (drained.completed, drained.failed) == (2, 1)
    ((size,),) = query("select octet_length(errors::text) from pgconductor.executions where state = 'failed'")
    assert size < 10_000


async def test_a_nursery_of_the_handler_fails_as_data(conductor: Conductor, query: Any) -> None:
    """Handlers may open nurseries; what comes out is a group, and it is retried like any error."""

    @conductor.task(max_attempts=2, backoff=AT_ONCE)
    async def nest() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise ValueError("inside")

    async with conductor:
        await nest.invoke()
        drained = await Orchestrator(conductor, tasks=[nest]).drain()
    assert (drained.retried, drained.failed) == (1, 1)


async def test_keyboard_interrupt_gives_the_execution_back_and_propagates(conductor: Conductor, query: Any) -> None:
    """Ctrl-C in a handler is never recorded as its failure."""

    @conductor.task
    async def interrupt() -> None:
        raise KeyboardInterrupt

    async with conductor:
        await interrupt.invoke()
        with pytest.raises(BaseExceptionGroup) as raised:
            await Orchestrator(conductor, tasks=[interrupt]).drain()
        assert raised.value.subgroup(KeyboardInterrupt) is not None
    assert query("select state::text, attempt, crashes, errors from pgconductor.executions") == [("ready", 0, 0, None)]


async def test_only_known_tasks_are_claimed(conductor: Conductor, query: Any) -> None:
    """A newer program's tasks must wait for it, with no attempt burned, and must not hold up the others."""

    @conductor.task(queue="q")
    async def known() -> None: ...

    for _ in range(20):
        query("select pgconductor.invoke('of a newer program', '{}', 'q', priority => 100)")
    async with conductor:
        await known.invoke()
        worker = conductor.create_worker(queue="q", tasks=[known])
        assert (await Orchestrator(conductor, workers=[worker]).drain()).completed == 1
        ((status),) = await conductor.queue_status()
        assert status.tasks_without_worker == ("of a newer program",)
    assert query("select distinct state::text, attempt, claim_no from pgconductor._private_executions") == [
        ("ready", 0, 0)
    ]


async def test_higher_priority_runs_first_and_equals_in_order(conductor: Conductor) -> None:
    """Also across those that were due before the queue was registered."""
    order: list[str] = []

    @conductor.task(queue="q")
    async def note(name: str) -> None:
        order.append(name)

    async with conductor:
        for name, priority in [("a", 0), ("b", 5), ("c", -5), ("d", 5), ("e", 0)]:
            await note.options(priority=priority).invoke(name)
        worker = conductor.create_worker(queue="q", tasks=[note], concurrency=1)
        await Orchestrator(conductor, workers=[worker]).drain()
        assert order == ["b", "d", "a", "e", "c"]


async def test_a_large_payload_is_loaded_when_it_runs_and_goes_with_its_row(conductor: Conductor, query: Any) -> None:
    """Large payloads are kept out of the rows that move."""
    limits = Limits()
    text = "äöü" * 100_000

    @conductor.task(queue="q")
    async def measure(text: str) -> int:
        return len(text)

    async with conductor:
        handle = await measure.invoke(text)
        assert query("select payload is null from pgconductor._private_executions") == [(True,)]
        worker = conductor.create_worker(queue="q", tasks=[measure])
        await Orchestrator(conductor, workers=[worker]).drain()
        assert await handle.result(timeout=0) == len(text)
    assert limits.payload_bytes > len(text.encode())
    assert query("select payload ->> 'text' = %s from pgconductor.executions", text) == [(True,)]


async def test_a_long_execution_does_not_hold_up_short_ones(conductor: Conductor) -> None:
    """Head-of-line blocking: with two slots, one long handler leaves the other slot to a thousand short ones."""
    release = trio.Event()
    ended = 0

    @conductor.task(queue="q")
    async def work(long: bool) -> None:
        nonlocal ended
        if long:
            await release.wait()
        else:
            ended += 1
            if ended == 1000:
                release.set()

    async with conductor:
        await work.options(priority=1).invoke(long=True)
        await work.invoke_many([work.bind(long=False) for _ in range(1000)])
        worker = conductor.create_worker(queue="q", tasks=[work], concurrency=2)
        with trio.fail_after(30):
            assert (await Orchestrator(conductor, workers=[worker]).drain()).completed == 1001


async def test_stock_goes_back_when_all_slots_are_taken_by_long_executions(conductor: Conductor, query: Any) -> None:
    """What was claimed ahead must not wait behind long ones while another process is idle."""
    release = trio.Event()
    stuck = trio.Event()

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        if n >= 600:
            stuck.set()
            await release.wait()

    async with conductor, trio.open_nursery() as nursery:
        await work.invoke_many([work.bind(n) for n in range(2000)])
        worker = conductor.create_worker(queue="q", tasks=[work], concurrency=4)
        orchestrator = Orchestrator(conductor, workers=[worker])
        await nursery.start(orchestrator.run)
        with trio.fail_after(20):
            await stuck.wait()
            while query("select count(*) from pgconductor.executions where state = 'running'") != [(4,)]:
                await trio.sleep(0.02)
        assert query("select max(attempt) from pgconductor.executions where state = 'ready'") == [(0,)]
        release.set()
        with trio.fail_after(30):
            while query("select count(*) from pgconductor._private_executions") != [(0,)]:
                await trio.sleep(0.02)
        orchestrator.stop()


async def test_little_in_stock_goes_back_as_well(conductor: Conductor, query: Any) -> None:
    """The worker would take more, so it does not wait for room: it sleeps, and one that is stuck must not sleep too."""
    release = trio.Event()
    started: list[int] = []

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        started.append(n)
        await release.wait()

    count = "select count(*) from pgconductor._private_executions where state = 'running'"
    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[work], concurrency=1, sweep_interval=60.0)
        orchestrator = Orchestrator(conductor, workers=[worker])
        await nursery.start(orchestrator.run)
        (pipeline,) = orchestrator._pipelines
        pipeline._prefetch.size = 50
        with trio.fail_after(20):
            await work.invoke(1)
            while not started:
                await trio.sleep(0.002)
            await work.invoke(2)
            while pipeline.statistics().claimed < 2:
                await trio.sleep(0.002)
            while query(count) != [(1,)]:
                await trio.sleep(0.02)
            assert pipeline.statistics().in_stock == 0
            release.set()
            while query("select count(*) from pgconductor._private_executions") != [(0,)]:
                await trio.sleep(0.02)
        orchestrator.stop()
    assert started == [1, 2]
    assert query("select max(attempt) from pgconductor.executions") == [(1,)]


async def test_logger_and_context_carry_the_executions_ids(
    conductor: Conductor, caplog: pytest.LogCaptureFixture
) -> None:
    """The promise of `ctx.logger`."""

    @conductor.task(queue="q")
    async def speak(ctx: Context) -> str:
        ctx.logger.warning("hello")
        return str(ctx.execution_id)

    async with conductor:
        handle = await speak.invoke()
        worker = conductor.create_worker(queue="q", tasks=[speak])
        await Orchestrator(conductor, workers=[worker]).drain()
        assert await handle.result(timeout=0) == str(handle.id)
    (record,) = [record for record in caplog.records if record.name == "pgconductor.task"]
    assert (getattr(record, "execution_id"), getattr(record, "queue")) == (str(handle.id), "q")  # noqa: B009


async def test_repr_tells_the_state(conductor: Conductor) -> None:
    """What one sees in a debugger."""

    @conductor.task
    async def nothing() -> None: ...

    orchestrator = Orchestrator(conductor, tasks=[nothing])
    assert repr(orchestrator) == "<Orchestrator of 'default', not running>"
    seen: list[str] = []

    @conductor.task(queue="look")
    async def look() -> None:
        seen.append(repr(both))

    both = Orchestrator(conductor, workers=[conductor.create_worker(queue="look", tasks=[look])], tasks=[nothing])
    async with conductor:
        await look.invoke()
        await both.drain()
    assert seen == ["<Orchestrator of 'look', 'default', running, incarnation 1>"]
