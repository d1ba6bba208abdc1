"""Looking at executions: where one stands, what it has recorded, and finding many by a filter."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import trio
from client.database import execute, until, value
from client.worker_by_hand import WorkerByHand, open_worker
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgconductor import (
    Conductor,
    Context,
    ExecutionSummary,
    InvalidOption,
    NotOpen,
    Orchestrator,
    Refused,
    State,
    StepFailed,
    StepRecord,
)

NAMES = ["pay", "mail"]


@pytest.fixture
def worker(pgconductor_dsn: str) -> Iterator[WorkerByHand]:
    """Claims and ends what is on the queue "default"."""
    with open_worker(pgconductor_dsn, NAMES) as worker:
        yield worker


def double(n: int) -> int:
    return 2 * n


def nothing() -> None:
    return None


def fail() -> int:
    raise ValueError("no luck")


def _program(dsn: str) -> tuple[Conductor, Orchestrator]:
    """A parent with steps of all outcomes, a child, and a sleep at the end."""
    conductor = Conductor(dsn)

    @conductor.task
    async def child(n: int) -> int:
        return n + 1

    @conductor.task
    async def order(ctx: Context, n: int) -> int:
        total = await ctx.step("double", double, n)
        await ctx.step("nothing", nothing)
        try:
            await ctx.step("fail", fail)
        except StepFailed:
            total += 1
        total += await ctx.invoke("child", child, n=total)
        await ctx.sleep("a day", timedelta(days=1))
        return total

    return conductor, Orchestrator(conductor, tasks=[child, order], migrate=False, handle_signals=False)


def _facts(steps: list[StepRecord]) -> list[tuple[object, ...]]:
    return [(s.position, s.kind, s.name, s.outcome, s.value, s.resolved_at is not None) for s in steps]


async def test_status_and_steps_tell_where_it_stands_and_how_it_came_there(pgconductor_dsn: str) -> None:
    """Whoever asks what a waiting execution does is told nothing, or something that is not recorded."""
    conductor, orchestrator = _program(pgconductor_dsn)
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        handle = await conductor.invoke("order", {"n": 3}, tags=["a"], priority=2)
        with trio.fail_after(20):
            while (status := await handle.status()) is None or not any(w.name == "a day" for w in status.waits_for):
                await trio.sleep(0.01)
            while status is None or status.state is not State.WAITING:
                status = await handle.status()
        assert (status.id, status.task, status.queue, status.version) == (handle.id, "order", "default", None)
        assert (status.attempt, status.crashes, status.generation, status.depth) == (0, 0, 0, 0)
        assert (status.priority, status.tags, status.dedupe_key, status.progress) == (2, ("a",), None, None)
        assert (status.parent_id, status.root_id, status.origin_id, status.error) == (None, None, None, None)
        assert (status.is_cancel_requested, status.reason, status.finished_at) == (False, None, None)
        (wait,) = status.waits_for
        assert (wait.name, wait.kind, wait.target, status.open_waits) == ("a day", "sleep", None, 1)
        assert wait.due_at is not None
        assert abs(wait.due_at - wait.created_at - timedelta(days=1)) < timedelta(seconds=1)
        assert status.run_at == wait.due_at

        steps = await handle.steps()
        assert _facts(steps) == [
            (0, "step", "double", "completed", 6, True),
            (1, "step", "nothing", "completed", None, True),
            (3, "step", "fail", "failed", None, True),  # a failure's place is where it was recorded, not where it began
            (4, "child", "child", "completed", 8, True),
            (5, "sleep", "a day", None, None, False),
        ]
        assert steps[2].error is not None
        assert (steps[2].error.type, steps[2].error.message) == ("ValueError", "no luck")
        (child_id,) = [step.target for step in steps if step.kind == "child"]
        (child,) = await conductor.executions(parent=handle)
        assert (str(child.id), child.task, child.state, child.root_id) == (
            child_id,
            "child",
            State.COMPLETED,
            handle.id,
        )
        child_status = await conductor.status(child.id)
        assert child_status is not None
        assert (child_status.parent_id, child_status.depth, child_status.finished_at is not None) == (
            handle.id,
            1,
            True,
        )
        with conductor.sync() as client:
            assert client.status(handle.id) == status
            assert client.steps(handle) == steps

        await handle.cancel("enough")
        orchestrator.stop()
        ended = await handle.status()
        assert ended is not None
        assert (ended.state, ended.reason, ended.is_cancel_requested, ended.waits_for) == (
            State.CANCELLED,
            "enough",
            True,
            (),
        )
        assert ended.finished_at is not None
        assert _facts(await handle.steps()) == _facts(steps)


async def test_nothing_is_told_of_what_is_not_kept(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """An error where a look at an old id is an everyday thing."""
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        handle = await conductor.invoke("pay")
        (claimed,) = worker.claim()
        worker.complete(claimed, keep=0.0)
        assert await handle.status() is None
        assert await handle.steps() == []
        assert await conductor.status(uuid4()) is None
        with pytest.raises(InvalidOption, match="takes handles and ids"):
            await conductor.status("pay")  # type: ignore[arg-type]
    with pytest.raises(NotOpen):
        await handle.status()
    with psycopg.connect(pgconductor_dsn) as conn, conductor.sync():
        sync_handle = conductor.task(name="mail")(_mail).options(conn=conn).invoke()
        conn.commit()
        status = sync_handle.status()
        assert status is not None
        assert (status.task, status.state, sync_handle.steps()) == ("mail", State.READY, [])


async def _mail() -> None: ...


async def test_retried_one_is_told_by_its_live_row(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """The dead row of a former life is taken for the present."""
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        handle = await conductor.invoke("pay")
        (claimed,) = worker.claim()
        worker.fail(claimed, type="ValueError", message="no", traceback="Traceback")
        failed = await handle.status()
        assert failed is not None
        assert failed.error is not None
        assert (failed.state, failed.error.type, failed.expires_at is None) == (State.FAILED, "ValueError", True)
        await conductor.retry(handle)
        again = await handle.status()
        assert again is not None
        assert (again.state, again.generation, again.error) == (State.READY, 1, failed.error)


def _made(client: Any, worker: WorkerByHand) -> list[Any]:
    """Executions in several states, in the order in which they were made."""
    done = client.invoke("pay", {"n": 1}, tags=["a", "b"])
    worker.finish_all()
    failed = client.invoke("mail", tags=["a"])
    worker.fail(worker.claim()[0], type="ValueError", message="no", traceback="")
    keyed = client.invoke("pay", delay=60, dedupe_key="k", tags=["b"])
    other = client.invoke("pay", queue="other")
    return [done, failed, keyed, other]


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, [0, 1, 2, 3]),
        ({"queue": "default"}, [0, 1, 2]),
        ({"queue": "other"}, [3]),
        ({"queue": "nowhere"}, []),
        ({"task": "mail"}, [1]),
        ({"states": "completed"}, [0]),
        ({"states": [State.FAILED, "ready", "scheduled"]}, [1, 2, 3]),
        ({"tags": ["a"]}, [0, 1]),
        ({"tags": ["b", "a"]}, [0]),
        ({"dedupe_key": "k"}, [2]),
        ({"created_after": datetime(2000, 1, 1, tzinfo=UTC)}, [0, 1, 2, 3]),
        ({"created_after": datetime(2100, 1, 1, tzinfo=UTC)}, []),
        ({"created_before": datetime(1960, 1, 1, tzinfo=UTC)}, []),
        ({"created_before": datetime(9000, 1, 1, tzinfo=UTC)}, [0, 1, 2, 3]),
        ({"parent": uuid4()}, []),
        ({"task": "pay", "states": "scheduled", "tags": ["b"]}, [2]),
    ],
)
def test_search_finds_what_fits_and_nothing_else(
    pgconductor_dsn: str, worker: WorkerByHand, filters: dict[str, Any], found: list[int]
) -> None:
    """A filter that is dropped, or that hides live or finished ones."""
    with Conductor(pgconductor_dsn).sync() as client:
        made = _made(client, worker)
        answer = client.executions(**filters)
        assert [each.id for each in answer] == [made[n].id for n in reversed(found)]


async def test_pages_hold_each_execution_once_the_newest_first(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """One that ends between two pages is left out, or shown twice."""
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        handles = [await conductor.invoke("pay", {"n": n}) for n in range(25)]
        pages: list[ExecutionSummary] = []
        while page := await conductor.executions(limit=10, after=pages[-1] if pages else None):
            pages += page
            worker.finish_all()  # all of them, after the first page
        expected = sorted((handle.id for handle in handles), reverse=True)
        assert [each.id for each in pages] == expected
        assert {each.state for each in pages[:10]} == {State.READY}
        assert {each.state for each in pages[10:]} == {State.COMPLETED}


def test_span_of_time_is_exact_to_the_instant(pgconductor_dsn: str) -> None:
    """Ids tell milliseconds only: the one at the edge is left out, or its neighbour taken in."""
    with Conductor(pgconductor_dsn).sync() as client:
        for _ in range(30):
            client.invoke("pay")
        everyone = client.executions()
        middle = everyone[15].created_at
        assert client.executions(created_after=middle) == [e for e in everyone if e.created_at >= middle]
        assert client.executions(created_before=middle) == [e for e in everyone if e.created_at < middle]


def test_search_goes_on_past_what_does_not_fit(pgconductor_dsn: str) -> None:
    """Only as far as the first statement looks: a rare execution is not found."""
    with Conductor(pgconductor_dsn).sync() as client:
        wanted = client.invoke("mail")
        with psycopg.connect(pgconductor_dsn) as conn:
            conn.execute("select pgconductor.invoke('pay') from generate_series(1, 6500)")
        asked: list[Any] = []
        ask = client._session.ask

        def counting(call: Any, *args: Any, **options: Any) -> Any:
            asked.append(call.params[-1])
            return ask(call, *args, **options)

        client._session.ask = counting  # type: ignore[method-assign]
        assert [each.id for each in client.executions(task="mail")] == [wanted.id]
        assert asked == [1000, 4000, 16000]
        asked.clear()
        assert len(client.executions(task="pay", limit=3)) == 3
        assert asked == [1000]


async def test_root_finds_the_family(pgconductor_dsn: str) -> None:
    """Grandchildren are left out, or somebody else's children are in."""
    conductor = Conductor(pgconductor_dsn)

    @conductor.task
    async def leaf() -> None: ...

    @conductor.task
    async def node(ctx: Context, depth: int) -> None:
        if depth > 0:
            await ctx.invoke("next", node, depth=depth - 1)
        await ctx.invoke("leaf", leaf)

    async with conductor:
        first, second = await node.invoke(depth=2), await node.invoke(depth=0)
        await Orchestrator(conductor, tasks=[leaf, node], migrate=False).drain()
        family = await conductor.executions(root=first)
        assert len(family) == 6
        assert family[-1].id == first.id
        assert {each.root_id for each in family[:-1]} == {first.id}
        assert len(await conductor.executions(root=second, task="leaf")) == 1
        assert len(await conductor.executions()) == 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"limit": 10_001}, "limit must be from 1 to 10000"),
        ({"states": "dead"}, "one of scheduled"),
        ({"states": []}, "states must not be empty"),
        ({"after": uuid4()}, "the last ExecutionSummary"),
        ({"created_after": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001 - that is the point
        ({"parent": "x"}, "takes handles and ids"),
        ({"tags": "x"}, "several texts"),
        ({"dedupe_key": "x" * 513}, "513 bytes"),
    ],
)
def test_search_that_is_wrong_is_refused(wrong: dict[str, Any], said: str) -> None:
    """A typing error that finds nothing, which is taken for the truth."""
    with Conductor("postgresql://127.0.0.1:1/nothing").sync() as client, pytest.raises(InvalidOption, match=said):
        client.executions(**wrong)


@pytest.mark.parametrize("kind", ["producer", "worker", "viewer", "operator"])
async def test_roles_see_what_they_may(pgconductor_dsn: str, kind: str) -> None:
    """A viewer reads what customers ordered; or whoever has an id cannot ask where it stands."""
    conductor, orchestrator = _program(pgconductor_dsn)
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        handle = await conductor.invoke("order", {"n": 3})
        await until(lambda: value(pgconductor_dsn, "select count(*) from pgconductor._private_waits") == 2)
        orchestrator.stop()
    role = f"r{uuid4().hex}"
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        name = sql.Identifier(role)
        conn.execute(sql.SQL("create role {} login").format(name))
        try:
            conn.execute("select pgconductor.grant_role(%s, %s)", [kind, role])
            with Conductor(make_conninfo(pgconductor_dsn, user=role)).sync() as client:
                status = client.status(handle.id)
                assert status is not None
                assert status.task == "order"
                steps = {step.name: (step.value, step.is_withheld) for step in client.steps(handle)}
                may_see = kind in ("producer", "worker")
                assert steps["double"] == ((6, False) if may_see else (None, True))
                assert steps["a day"] == (None, False)
                if kind in ("viewer", "operator"):
                    assert [each.task for each in client.executions()] == ["child", "order"]
                else:
                    with pytest.raises(Refused):
                        client.executions()
        finally:
            execute(pgconductor_dsn, f'drop owned by "{role}"')
            execute(pgconductor_dsn, f'drop role "{role}"')
