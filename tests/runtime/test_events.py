"""Events, messages, promises and progress, through an orchestrator: what handlers see, now and at a replay."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
import trio
from runtime.workplace import LONG_LEASE, make_heartbeats_rare, until

from pgconductor import (
    Conductor,
    Context,
    DurableMisuse,
    ExecutionFailed,
    InvalidOption,
    InvalidPayload,
    Orchestrator,
    PromiseAnswer,
    PromiseRejected,
    TrioConnection,
)
from pgconductor.tasks import NotifyMode

LIMIT = 20.0


@dataclass
class Paid:
    order: int
    amount: float


def state(query: Any) -> list[str]:
    return [row[0] for row in query("select state::text from pgconductor.executions order by created_at, id")]


async def waiting(query: Any, count: int = 1) -> None:
    await until(lambda: state(query).count("waiting") == count)


async def test_event_is_decoded_and_the_same_at_each_replay(conductor: Conductor, query: Any) -> None:
    """The handler gets raw JSON, or another event when it begins anew."""
    runs: list[Paid] = []

    @conductor.task
    async def order(ctx: Context, number: int) -> float:
        paid = await ctx.wait_for_event("paid", match={"order": number}, type=Paid)
        runs.append(paid)
        await ctx.sleep("settle", 0.05)
        await ctx.wait_for_event("shipped", f"shipped/{number}", timeout=timedelta(hours=1))
        return paid.amount

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[order]).run)
        handle = await order.invoke(17)
        await waiting(query)
        await conductor.emit("paid", Paid(16, 1.0))
        await conductor.emit("paid", Paid(17, 2.5))
        await conductor.emit("paid", Paid(17, 99.0))
        await conductor.emit("shipped/17")
        assert await handle.result(LIMIT) == 2.5
        nursery.cancel_scope.cancel()
    assert len(runs) >= 2
    assert set(map(repr, runs)) == {repr(Paid(17, 2.5))}
    assert query("select attempt from pgconductor._private_finished") == [(1,)]  # waiting costs none


@pytest.mark.parametrize("notify", ["off", "adaptive"])
async def test_event_arrives_with_and_without_notifications(
    conductor: Conductor, query: Any, notify: NotifyMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that may not listen never hears of events; one that may hears of them by its heartbeat only."""
    make_heartbeats_rare(monkeypatch)

    @conductor.task(queue="q")
    async def listen(ctx: Context) -> int:
        return await ctx.wait_for_event("e", type=int)

    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[listen], notify=notify)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=1.0 if notify == "off" else LONG_LEASE)
        await nursery.start(orchestrator.run)
        if notify != "off":
            await until(lambda: any(p.reactor.can_be_woken for p in orchestrator._pipelines))
        handle = await listen.invoke()
        await waiting(query)
        await conductor.emit("e", 5)
        assert await handle.result(LIMIT) == 5
        nursery.cancel_scope.cancel()


async def test_handler_that_is_not_given_up_hears_at_once(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that works keeps the execution here; the event has to find it in the process."""
    make_heartbeats_rare(monkeypatch)
    release = trio.Event()
    heard = trio.Event()

    async def work() -> None:
        await release.wait()

    @conductor.task
    async def both(ctx: Context) -> None:
        async def listen() -> None:
            await ctx.wait_for_event("e")
            heard.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await ctx.step("work", work)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[both], lease=LONG_LEASE).run)
        handle = await both.invoke()
        await until(lambda: query("select count(*) from pgconductor._private_waits") == [(1,)])
        await conductor.emit("e")
        with trio.fail_after(LIMIT):
            await heard.wait()
        assert state(query) == ["running"]
        release.set()
        await handle.result(LIMIT)
        nursery.cancel_scope.cancel()


async def test_timeout_is_recorded_and_the_same_at_each_replay(conductor: Conductor, query: Any) -> None:
    """An event that comes later changes the past of the handler."""

    @conductor.task
    async def order(ctx: Context) -> list[str]:
        seen: list[str] = []
        for name in ("event", "message", "promise"):
            try:
                if name == "event":
                    await ctx.wait_for_event("e", timeout=0.05)
                elif name == "message":
                    await ctx.receive("m", timeout=timedelta(seconds=0.05))
                else:
                    promise = await ctx.promise("p")
                    await promise.result(timeout=0)
            except TimeoutError as error:
                seen.append(f"{type(error).__name__}: {error}")
        await ctx.wait_for_event("go")
        return seen

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[order]).run)
        handle = await order.invoke()
        await until(lambda: query("select count(*) from pgconductor._private_waits where outcome is null "
                                  "and target = 'go'") == [(1,)])  # fmt: skip
        await conductor.emit("e", 1)
        await conductor.emit("go")
        assert await handle.result(LIMIT) == [
            "WaitTimedOut: 'e': no event 'e' came in time",
            "WaitTimedOut: 'm': no message on 'm' came in time",
            "WaitTimedOut: 'p/result': no promise 'p' came in time",
        ]
        nursery.cancel_scope.cancel()


async def test_approval_by_a_promise(conductor: Conductor, query: Any) -> None:
    """What a human says comes twice, is lost, or is another thing after a restart."""
    asked: list[UUID] = []

    @conductor.task
    async def expense(ctx: Context, amount: int) -> str:
        promise = await ctx.promise("approval")
        await ctx.step("ask", asked.append, promise.id)
        try:
            by = await promise.result(type=str, timeout=timedelta(days=3))
        except PromiseRejected as error:
            return f"rejected: {error.error['message']}"
        assert await promise.result(type=str) == by
        return f"approved by {by}"

    async with conductor:
        async with trio.open_nursery() as nursery:
            await nursery.start(Orchestrator(conductor, tasks=[expense]).run)
            yes, no = await expense.invoke(1), await expense.invoke(2)
            await waiting(query, 2)
            nursery.cancel_scope.cancel()
        # Nobody runs now; the answer is kept.
        owners = dict(query("select id, execution_id from pgconductor._private_promises"))
        assert set(asked) == set(owners)
        for promise, execution in owners.items():
            if execution == yes.id:
                assert await conductor.resolve_promise(promise, "Ada") is PromiseAnswer.RESOLVED
                assert await conductor.reject_promise(promise) is PromiseAnswer.ALREADY
            else:
                assert await conductor.reject_promise(promise, "too dear") is PromiseAnswer.RESOLVED
        assert await conductor.resolve_promise(uuid4()) is PromiseAnswer.UNKNOWN
        async with trio.open_nursery() as nursery:
            await nursery.start(Orchestrator(conductor, tasks=[expense]).run)
            assert await yes.result(LIMIT) == "approved by Ada"
            assert await no.result(LIMIT) == "rejected: too dear"
            nursery.cancel_scope.cancel()
    assert len(asked) == 2
    assert query("select count(*) from pgconductor._private_promises") == [(0,)]
    assert query("select count(*) from pgconductor._private_events") == [(0,)]


async def test_messages_reach_a_running_execution_in_order(conductor: Conductor) -> None:
    """An actor loses a message, or handles one twice."""

    @conductor.task
    async def count(ctx: Context) -> list[int]:
        seen: list[int] = []
        while len(seen) < 5:
            seen.append(await ctx.receive(f"message-{len(seen)}", "numbers", type=int))
        return seen

    async with conductor, trio.open_nursery() as nursery:
        handle = await count.invoke()
        assert await handle.send("numbers", 0)  # before it has begun
        await nursery.start(Orchestrator(conductor, tasks=[count]).run)
        for n in range(1, 5):
            assert await conductor.send(handle.id, "numbers", n)
        assert await handle.result(LIMIT) == [0, 1, 2, 3, 4]
        assert not await handle.send("numbers", 9)
        nursery.cancel_scope.cancel()


async def test_handlers_talk_to_each_other_exactly_once(conductor: Conductor, query: Any) -> None:
    """An attempt that is repeated sends again."""
    failures = iter([True, False])

    @conductor.task
    async def ask(ctx: Context, receiver: UUID) -> Any:
        sent = await ctx.send("request", receiver, "requests", {"reply_to": str(ctx.execution_id)})
        await ctx.emit("asked", "log", {"by": "ask"})
        await ctx.sleep("nap", 0.05)
        if next(failures):
            raise ValueError("once more")
        return [sent, await ctx.receive("answer")]

    @conductor.task
    async def answer(ctx: Context) -> None:
        request = await ctx.receive("request", "requests", type=dict[str, str])
        await ctx.send("reply", UUID(request["reply_to"]), "answer", 42)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[ask, answer]).run)
        answering = await answer.invoke()
        asking = await ask.options(backoff=None).invoke(answering.id)
        await answering.result(LIMIT)
        assert await asking.result(LIMIT) == [True, 42]
        nursery.cancel_scope.cancel()
    assert query("select name, payload from pgconductor._private_events") == [("log", {"by": "ask"})]


async def test_event_is_part_of_the_callers_transaction(conductor: Conductor, pgconductor_dsn: str, query: Any) -> None:
    """It is sent though the transaction was rolled back, or is never delivered because it came late."""

    @conductor.task
    async def listen(ctx: Context) -> int:
        return await ctx.wait_for_event("e", type=int)

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[listen], lease=2.0).run)
        async with await TrioConnection.connect(pgconductor_dsn) as conn:
            await conductor.emit("e", 1, conn=conn)
            await conn.rollback()
            await conductor.emit("e", 2, conn=conn)
            handle = await listen.invoke()
            await waiting(query)
            await conn.commit()
        assert await handle.result(LIMIT) == 2
        nursery.cancel_scope.cancel()


async def test_progress_is_seen_while_it_runs_and_afterwards(conductor: Conductor) -> None:
    """A progress bar that stands still, or is forgotten with the end."""
    go = trio.Event()

    @conductor.task
    async def work(ctx: Context) -> None:
        async def step() -> None:
            await ctx.set_progress({"done": 1, "of": 2})
            await go.wait()

        await ctx.step("half", step)
        await ctx.set_progress("done")

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[work]).run)
        handle = await work.invoke()
        with trio.fail_after(LIMIT):
            while await handle.progress() is None:
                await trio.sleep(0.01)
        assert await handle.progress() == {"done": 1, "of": 2}
        go.set()
        await handle.result(LIMIT)
        assert await handle.progress() == "done"
        assert await conductor.progress(uuid4()) is None
        nursery.cancel_scope.cancel()


async def test_drain_delivers_what_was_sent(conductor: Conductor, query: Any) -> None:
    """A test that emits and drains ends with the execution waiting."""

    @conductor.task
    async def listen(ctx: Context) -> int:
        return await ctx.wait_for_event("e", type=int)

    async with conductor:
        handle = await listen.invoke()
        await Orchestrator(conductor, tasks=[listen]).drain()
        assert state(query) == ["waiting"]
        await conductor.emit("e", 3)
        await Orchestrator(conductor, tasks=[listen]).drain()
        assert await handle.result(0) == 3


async def test_wait_of_a_cancelled_execution_receives_nothing(conductor: Conductor, query: Any) -> None:
    """Its message lies there for ever, or a delivery fails over it."""

    @conductor.task
    async def listen(ctx: Context) -> None:
        await ctx.receive("m")

    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(Orchestrator(conductor, tasks=[listen], lease=2.0).run)
        handle = await listen.invoke()
        await waiting(query)
        await handle.send("other", 1)
        await handle.cancel()
        assert not await handle.send("m", 1)
        await until(lambda: query("select count(*) from pgconductor._private_events") == [(0,)])
        nursery.cancel_scope.cancel()


async def test_payload_that_does_not_fit_fails_the_handler_with_its_name(conductor: Conductor) -> None:
    """Somebody else's mistake is blamed on nothing."""

    @conductor.task(max_attempts=1)
    async def listen(ctx: Context) -> None:
        await ctx.wait_for_event("e", type=int)

    async with conductor:
        handle = await listen.invoke()
        await conductor.emit("e", "five")
        await Orchestrator(conductor, tasks=[listen]).drain()
        with pytest.raises(ExecutionFailed, match="payload of type 'int'"):
            await handle.result(0)


async def test_bad_arguments_are_refused_before_anything_is_sent(conductor: Conductor, query: Any) -> None:
    """A mistake becomes an event that nobody can receive."""
    caught: list[type[BaseException]] = []

    @conductor.task(max_attempts=1)
    async def wrong(ctx: Context) -> None:
        async def inside() -> None:
            await ctx.emit("in a step", "e")

        for call in (
            lambda: ctx.wait_for_event("a", "x" * 129),
            lambda: ctx.wait_for_event("b", match=[1]),  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
            lambda: ctx.wait_for_event("c", timeout=-1),
            lambda: ctx.receive("d", ""),
            lambda: ctx.promise("p" * 122),
            lambda: ctx.emit("e", "e", object()),
            lambda: ctx.emit("f", "e", retention=-1),
            lambda: ctx.send("g", "no id"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            lambda: ctx.step("h", inside),
        ):
            try:
                await call()
            except (InvalidOption, InvalidPayload, DurableMisuse) as error:
                caught.append(type(error))

    async with conductor:
        await wrong.invoke()
        await Orchestrator(conductor, tasks=[wrong]).drain()
        for refused in (
            lambda: conductor.emit(""),
            lambda: conductor.emit("e", object()),
            lambda: conductor.emit("e", retention=timedelta(days=99_999)),
            lambda: conductor.send("7", "c"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            lambda: conductor.resolve_promise("7"),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            lambda: conductor.reject_promise(uuid4(), ""),
        ):
            with pytest.raises((InvalidOption, InvalidPayload)):
                await refused()
    assert caught == [
        InvalidOption, InvalidOption, InvalidOption, InvalidOption, InvalidOption, InvalidPayload, InvalidOption,
        InvalidOption, DurableMisuse,
    ]  # fmt: skip
    assert query("select count(*) from pgconductor._private_events") == [(0,)]
