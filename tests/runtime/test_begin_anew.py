"""Forks, restarts, and executions that continue as new: what is taken along, and what is cut."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from uuid import UUID, uuid4

import psycopg
import pytest
import trio
from client.worker_by_hand import WorkerByHand, open_worker
from runtime.conftest import Query

from pgconductor import (
    Conductor,
    Context,
    DurableMisuse,
    ExecutionCancelled,
    ExecutionFailed,
    InvalidOption,
    InvalidPayload,
    Misuse,
    Orchestrator,
    Refused,
    State,
    StepFailed,
    TrioConnection,
)
from pgconductor.db.calls import NewStep, NewWait
from pgconductor.db.execute import run_sync
from pgconductor.model import Claimed, Outcome
from pgconductor.testing.proxy import open_chaos_proxy

calls: list[str] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def noted(name: str) -> Callable[[], int]:
    def note() -> int:
        calls.append(name)
        return len(calls)

    return note


async def drained(conductor: Conductor, **options: Any) -> None:
    await Orchestrator(conductor, tasks=list(conductor.registry), migrate=False, **options).drain()


# --- fork and restart ---


def _order(conductor: Conductor) -> Any:
    @conductor.task
    async def child() -> str:
        calls.append("child")
        return "bread"

    @conductor.task(max_attempts=1)
    async def order(ctx: Context, n: int) -> list[object]:
        first = await ctx.step("first", noted("first"))
        bread = await ctx.invoke("child", child)
        await ctx.sleep("short", 0.01)
        try:
            await ctx.step("fails", _fail)
        except StepFailed:
            calls.append("caught")
        return [n, first, bread, await ctx.step("last", noted("last"))]

    return order


def _fail() -> None:
    calls.append("fails")
    raise ValueError("no luck")


async def test_fork_does_again_what_comes_after_its_step(conductor: Conductor) -> None:
    """What was done before is done again, or what comes after it is taken from the other one."""
    order = _order(conductor)
    async with conductor:
        handle = await order.options(tags=["a"], priority=3, max_attempts=7, timeout=60, dedupe_key="k").invoke(n=5)
        await drained(conductor)
        assert await handle.result(timeout=0) == [5, 1, "bread", 5]
        assert calls == ["first", "child", "fails", "caught", "last"]
        calls.clear()
        fork = await conductor.fork(handle, from_step="last")
        status = await fork.status()
        assert status is not None
        assert (status.task, status.state, status.attempt, status.origin_id) == ("order", State.READY, 0, handle.id)
        assert (status.tags, status.priority, status.max_attempts, status.dedupe_key) == (("a",), 3, 7, None)
        before = [(s.name, s.kind, s.outcome, s.value, s.target) for s in await handle.steps()]
        assert [(s.name, s.kind, s.outcome, s.value, s.target) for s in await fork.steps()] == before[:-1]
        assert [s.name for s in await fork.steps()] == ["first", "child", "short", "fails"]
        await drained(conductor)
        assert await fork.result(timeout=0) == [5, 1, "bread", 2]
        assert calls == ["caught", "last"]
        calls.clear()
        again = await conductor.fork(fork.id, from_step="child")
        await drained(conductor)
        assert await again.result(timeout=0) == [5, 1, "bread", 4]
        assert calls == ["child", "fails", "caught", "last"]
        assert len({handle.id, fork.id, again.id}) == 3


async def test_fork_of_a_live_one_takes_only_what_is_over(conductor: Conductor, query: Query) -> None:
    """A wait is copied that nobody resolves for the fork: it waits for ever."""

    @conductor.task
    async def child() -> str:
        return "done"

    @conductor.task
    async def order(ctx: Context) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "long", 86_400)
            await ctx.step("one", noted("one"))
            await ctx.invoke("child", child)
            await ctx.step("two", noted("two"))
            nursery.cancel_scope.cancel()
        await ctx.sleep("rest", 86_400)
        return "end"

    async with conductor, trio.open_nursery() as nursery:
        orchestrator = Orchestrator(conductor, tasks=[child, order], migrate=False, handle_signals=False)
        await nursery.start(orchestrator.run)
        handle = await order.invoke()
        with trio.fail_after(20):
            while [w.name for w in (await _status(handle)).waits_for] != ["long", "rest"]:
                await trio.sleep(0.005)
            while (await _status(handle)).state is not State.WAITING:
                await trio.sleep(0.005)
        orchestrator.stop()
        fork = await conductor.fork(handle, from_step="two")
        assert [step.name for step in await fork.steps()] == ["one", "child"]
        assert query("select count(*) from pgconductor._private_waits where execution_id = %s", fork.id) == [(0,)]


async def _status(handle: Any) -> Any:
    status = await handle.status()
    assert status is not None
    return status


async def test_restart_takes_nothing_along(conductor: Conductor) -> None:
    """What had gone wrong is still there."""
    order = _order(conductor)
    async with conductor:
        handle = await order.invoke(n=5)
        await drained(conductor)
        calls.clear()
        again = await conductor.restart(handle)
        assert (await _status(again)).origin_id == handle.id
        assert await again.steps() == []
        await drained(conductor)
        assert await again.result(timeout=0) == [5, 1, "bread", 5]
        with conductor.sync() as client:
            third = client.restart(handle.id)
            fourth = client.fork(handle, from_step="last")
            assert (third.steps(), [step.name for step in fourth.steps()]) == ([], ["first", "child", "short", "fails"])
            assert {each.state for each in (third.status(), fourth.status()) if each} == {State.READY}


async def test_fork_takes_a_large_payload_and_the_version(pgconductor_dsn: str, conductor: Conductor) -> None:
    """A payload that is stored aside, or code of another version."""
    large = "".join(chr(65 + n * 7 % 50) for n in range(20_000))

    @conductor.task(version="2")
    async def order(ctx: Context, text: str) -> int:
        await ctx.step("one", int)
        return len(text)

    async with conductor:
        handle = await order.invoke(large)
        await drained(conductor)
        fork = await conductor.fork(handle, from_step="one")
        assert (await _status(fork)).version == "2"
        await drained(conductor)
        assert await fork.result(timeout=0) == len(large)


async def test_beginning_anew_is_part_of_the_callers_transaction(pgconductor_dsn: str, conductor: Conductor) -> None:
    """It has begun although the caller rolled back."""
    order = _order(conductor)
    async with conductor, await TrioConnection.connect(pgconductor_dsn) as conn:
        handle = await order.invoke(n=1)
        await conductor.restart(handle, conn=conn)
        await conn.rollback()
        assert len(await conductor.executions()) == 1
        await conductor.restart(handle, conn=conn)
        await conn.commit()
        assert len(await conductor.executions()) == 2


async def test_what_cannot_begin_anew_is_refused(conductor: Conductor) -> None:
    """An execution of nothing, or one that silently begins from the start."""
    order = _order(conductor)
    async with conductor:
        handle = await order.invoke(n=1)
        with pytest.raises(Refused, match="there is no execution"):
            await conductor.restart(uuid4())
        with pytest.raises(Refused, match="there is no execution"):
            await conductor.fork(uuid4(), from_step="one")
        with pytest.raises(Misuse, match="has no record named 'nothing'"):
            await conductor.fork(handle, from_step="nothing")
        with pytest.raises(InvalidOption, match="from_step must not be empty"):
            await conductor.fork(handle, from_step="")
        with pytest.raises(InvalidOption, match="takes handles and ids"):
            await conductor.restart("x")  # type: ignore[call-overload]
        assert len(await conductor.executions()) == 1


# --- continue as new ---


async def test_execution_goes_on_under_its_id_with_its_history_cut(conductor: Conductor, query: Query) -> None:
    """A loop whose history grows for ever, whose parent is told of its end too early, or that is another execution."""

    @conductor.task(max_attempts=2)
    async def count(ctx: Context, n: int) -> int:
        await ctx.step("say", noted(f"{n}"))
        if n < 3:
            await ctx.continue_as_new(n=n + 1)
        assert ctx.attempt == 1
        return n

    @conductor.task
    async def parent(ctx: Context) -> int:
        return await ctx.invoke("count", count, n=1)

    async with conductor:
        handle = await count.options(dedupe_key="k", tags=["a"]).invoke(n=0)
        family = await parent.invoke()
        await drained(conductor)
        assert await handle.result(timeout=0) == 3
        assert await family.result(timeout=0) == 3
        status = await _status(handle)
        assert (status.dedupe_key, status.tags, status.attempt, status.crashes) == ("k", ("a",), 1, 0)
        assert [step.name for step in await handle.steps()] == ["say"]
    assert sorted(calls) == ["0", "1", "1", "2", "2", "3", "3"]
    assert query("select count(*) from pgconductor._private_steps") == [(0,)]
    assert query("select count(*) from pgconductor._private_waits") == [(0,)]


async def test_large_and_small_payloads_take_turns(conductor: Conductor, query: Query) -> None:
    """The large one of a former life is loaded instead of the new one, or stays behind."""
    large = "".join(chr(65 + n * 7 % 50) for n in range(20_000))

    @conductor.task
    async def grow(ctx: Context, texts: list[str], seen: list[int]) -> list[int]:
        if texts:
            await ctx.continue_as_new(texts=texts[1:], seen=[*seen, sum(map(len, texts))])
        return seen

    async with conductor:
        handle = await grow.options().invoke(["x", large, "y", large, "z"], [])
        await drained(conductor)
        assert await handle.result(timeout=0) == [40_003, 40_002, 20_002, 20_001, 1]
    assert query("select count(*) from pgconductor._private_payloads") == [(0,)]


async def test_life_of_another_version_begins(conductor: Conductor) -> None:
    """Code that runs for ever can never be replaced."""

    @conductor.task(version="2")
    async def poll(ctx: Context, since: str) -> str:
        return f"two since {since}"

    @poll.former("1")
    async def poll_1(ctx: Context, number: int) -> str:
        if number == 0:
            await ctx.continue_as_new(number=1)
        await ctx.continue_as(poll.bind(since=str(number)))

    async with conductor:
        handle = await poll_1.invoke(0)
        await drained(conductor)
        status = await _status(handle)
        assert (status.version, status.state) == ("2", State.COMPLETED)
        assert await conductor.wait_result(handle.id, poll, 0) == "two since 1"


async def test_what_does_not_fit_is_refused_before_anything(conductor: Conductor) -> None:
    """An execution whose next life fails at once, or a handler that is cut short in a branch."""
    refused: list[str] = []

    @conductor.task
    async def other() -> None: ...

    @conductor.task(max_attempts=1)
    async def loop(ctx: Context, n: int) -> str:
        async def tried(going_on: Callable[[], Any]) -> None:
            try:
                await going_on()
            except (InvalidPayload, DurableMisuse) as error:
                refused.append(f"{type(error).__name__}: {error}")

        async def in_a_step() -> None:
            await tried(lambda: ctx.continue_as_new(n=1))

        await tried(lambda: ctx.continue_as_new(m=1))
        await tried(lambda: ctx.continue_as_new(n="x"))
        await tried(lambda: ctx.continue_as(other.bind()))
        await ctx.step("step", in_a_step)
        with trio.CancelScope(shield=True):
            await tried(lambda: ctx.continue_as_new(n=1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_a_step)
        return "went on"

    async with conductor:
        handle = await loop.invoke(1)
        await drained(conductor)
        assert await handle.result(timeout=0) == "went on"
    assert [word.split(":")[0] for word in refused] == [*["InvalidPayload"] * 2, *["DurableMisuse"] * 4]
    assert "cannot go on as task 'other'" in refused[2]
    assert "inside the step" in refused[3]
    assert "in a handler with branches" in refused[5]


async def test_clean_up_is_done_and_what_it_says_is_ignored(
    conductor: Conductor, caplog: pytest.LogCaptureFixture
) -> None:
    """A home-made exception that users catch; or the next life begins while the former one still cleans up."""

    @conductor.task
    async def loop(ctx: Context, n: int) -> str:
        if n > 0:
            return "end"
        try:
            await ctx.continue_as_new(n=1)
        except Exception:  # noqa: BLE001  # as users do
            calls.append("caught")
        finally:
            with trio.move_on_after(5, shield=True):
                await trio.sleep(0.05)
            calls.append("cleaned up")
            raise ValueError("in the clean-up")

    async with conductor:
        handle = await loop.invoke(0)
        with caplog.at_level(logging.WARNING, "pgconductor.worker"):
            await drained(conductor)
        assert await handle.result(timeout=0) == "end"
        assert await handle.errors() == []
    assert calls == ["cleaned up"]
    assert "raised when it was to begin anew" in caplog.text


async def test_cancelled_one_does_not_go_on(conductor: Conductor) -> None:
    """A loop that cannot be stopped, since each life begins before the request reaches it."""
    began, cancelled = trio.Event(), trio.Event()

    @conductor.task
    async def loop(ctx: Context) -> NoReturn:
        began.set()
        try:
            await ctx.continue_as_new()
        finally:
            with trio.move_on_after(10, shield=True):
                await cancelled.wait()

    async with conductor, trio.open_nursery() as nursery:
        orchestrator = Orchestrator(conductor, tasks=[loop], migrate=False, handle_signals=False)
        await nursery.start(orchestrator.run)
        handle = await loop.invoke()
        with trio.fail_after(20):
            await began.wait()
            await handle.cancel("enough")
            cancelled.set()
            with pytest.raises(ExecutionCancelled, match="enough"):
                await handle.result()
        orchestrator.stop()


async def test_lost_reply_begins_one_new_life(pgconductor_dsn: str) -> None:
    """Sent again, it cuts the history of the life that it began; or the outcome is taken for refused."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)

        @conductor.task
        async def loop(ctx: Context, n: int) -> int:
            await ctx.step("say", noted(str(n)))
            if n == 0:
                proxy.cut_reply(b".continue_as_new(")
                await ctx.continue_as_new(n=1)
            return n

        async with conductor:
            handle = await loop.invoke(0)
            drained = await Orchestrator(conductor, tasks=[loop], migrate=False).drain()
            assert await handle.result(timeout=5) == 1
            assert drained.fenced == 0
    assert calls == ["0", "1"]


# --- the verb ---


@pytest.fixture
def worker(pgconductor_dsn: str) -> Iterator[WorkerByHand]:
    """Claims what is on the queue "default"."""
    with open_worker(pgconductor_dsn, ["t", "c"]) as worker:
        yield worker


def _claimed(worker: WorkerByHand, query: Query, *, large: bool = False) -> Claimed:
    query("select pgconductor.invoke('t', jsonb_build_object('a', repeat('x', %s)))", 5 if not large else 9000)
    (claimed,) = worker.claim()
    step = NewStep(claimed.id, claimed.claim_no, "one", "step", 0, "1")
    run_sync(worker.conn, worker.calls.save_steps(worker.owner, [step]))
    return claimed


def _continue(worker: WorkerByHand, *claimed: Claimed, n: int = 7) -> dict[UUID, str]:
    life = json.dumps({"payload": {"n": n}, "version": None})
    outcomes = [Outcome(each.id, each.claim_no, "continued", life) for each in claimed]
    return run_sync(worker.conn, worker.calls.continue_as_new(worker.owner, outcomes))


def test_verb_is_fenced_and_harmless_to_repeat(worker: WorkerByHand, query: Query) -> None:
    """A zombie cuts the history of who runs it now; a repeated call that of the new life."""
    claimed = _claimed(worker, query)
    zombie = claimed._replace(claim_no=claimed.claim_no + 5)
    stranger = claimed._replace(id=uuid4())
    assert _continue(worker, zombie, stranger) == {zombie.id: "fenced", stranger.id: "gone"}
    assert query("select count(*) from pgconductor._private_steps") == [(1,)]
    assert _continue(worker, claimed) == {}
    assert _continue(worker, claimed, n=8) == {claimed.id: "already"}
    columns = "state::text, attempt, claim_no, owner is null, payload::text, is_durable"
    row = f"select {columns} from pgconductor._private_executions"
    assert query(row) == [("ready", 0, 1, True, '{"n": 7}', True)]
    assert query("select count(*) from pgconductor._private_steps") == [(0,)]
    (again,) = worker.claim()
    assert (again.id, again.attempt, again.claim_no, again.payload) == (claimed.id, 1, 2, '{"n": 7}')
    assert _continue(worker, claimed) == {claimed.id: "already"}
    worker.complete(again)
    assert _continue(worker, claimed) == {claimed.id: "fenced"}


@pytest.mark.parametrize(
    ("on_close", "closing", "status"),
    [("cancel", False, "open_children"), ("cancel", True, None), ("abandon", False, None)],
)
def test_open_children_are_in_the_way_unless_they_are_let_go(
    worker: WorkerByHand, query: Query, on_close: str, closing: bool, status: str | None
) -> None:
    """A child that runs on for nobody, and whose end resolves a wait of the next life."""
    claimed = _claimed(worker, query)
    child: dict[str, object] = {"task": "c", "payload": {}, "queue": "default"}
    wait: dict[str, object] = {"name": "w", "kind": "child", "position": 1, "on_close": on_close, "child": child}
    run_sync(
        worker.conn,
        worker.calls.start_waits(worker.owner, [NewWait(claimed.id, claimed.claim_no, json.dumps(wait))]),
    )
    (running,) = worker.claim()
    if closing:
        run_sync(worker.conn, worker.calls.request_close(worker.owner, claimed.id, claimed.claim_no, ["w"], "enough"))
        assert run_sync(worker.conn, worker.calls.close_children()) == 1  # it runs: its worker is told
    assert _continue(worker, claimed) == ({} if status is None else {claimed.id: status})
    steps = query("select count(*) from pgconductor._private_steps")
    assert steps == [(1 if status else 0,)]
    if status is None:
        (again,) = worker.claim()
        worker.complete(running)
        assert query("select count(*) from pgconductor._private_waits") == [(0,)]
        assert run_sync(worker.conn, worker.calls.load_history(worker.owner, again.id, again.claim_no)) == []


def test_requested_cancellation_is_told(worker: WorkerByHand, query: Query) -> None:
    """It is lost with the former life."""
    claimed = _claimed(worker, query, large=True)
    query("select pgconductor.cancel(array[%s::uuid], 'enough')", claimed.id)
    assert _continue(worker, claimed) == {claimed.id: "cancelled"}
    assert query("select count(*) from pgconductor._private_payloads") == [(1,)]


async def test_children_left_open_fail_the_execution(conductor: Conductor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that the worker does not know keeps its outcome for ever."""
    from pgconductor.db.calls import Calls

    answered: list[int] = []
    send = Calls.continue_as_new

    def refusing(self: Calls, owner: UUID, outcomes: Any) -> Any:
        call = send(self, owner, [])
        answered.append(len(outcomes))
        return type(call)(call.query, call.params, lambda rows: {o.id: "open_children" for o in outcomes})

    monkeypatch.setattr(Calls, "continue_as_new", refusing)

    @conductor.task(max_attempts=1)
    async def loop(ctx: Context) -> None:
        await ctx.continue_as_new()

    async with conductor:
        handle = await loop.invoke()
        await drained(conductor)
        with pytest.raises(ExecutionFailed, match="children that had not ended"):
            await handle.result(timeout=0)
    assert answered == [1]


def test_producers_do_not_begin_anew(pgconductor_dsn: str, query: Query) -> None:
    """Whoever may invoke may also see to it that what others ordered is done twice."""
    role = f"r{uuid4().hex}"
    query(f"create role {role}")
    try:
        for kind in ("producer", "worker", "viewer"):
            query("select pgconductor.grant_role(%s, %s)", kind, role)
        for verb in (f"fork('{uuid4()}', 'x')", f"restart('{uuid4()}')"):
            with psycopg.connect(pgconductor_dsn) as conn:
                conn.execute(f"set role {role}".encode())
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    conn.execute(f"select pgconductor.{verb}".encode())
    finally:
        query(f"drop owned by {role}")
        query(f"drop role {role}")


async def test_ends_and_new_lives_of_one_moment_are_each_written(conductor: Conductor) -> None:
    """One flush has both, and they are written by different calls."""

    @conductor.task(queue="q")
    async def ends_or_not(ctx: Context, n: int) -> int:
        if n % 2:
            await ctx.continue_as_new(n=n - 1)
        return n

    async with conductor:
        handles = await ends_or_not.invoke_many([ends_or_not.bind(n) for n in range(20)])
        worker = conductor.create_worker(queue="q", tasks=[ends_or_not], concurrency=20, flush_interval=1.0)
        drained = await Orchestrator(conductor, workers=[worker]).drain()
        assert [await handle.result(timeout=0) for handle in handles] == [n - n % 2 for n in range(20)]
    assert drained.completed == 20
    assert drained.failed == 0
