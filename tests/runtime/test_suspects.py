"""Executions that have brought down two processes: each runs alone, so that the third is charged to no innocent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from pgconductor import Conductor, Orchestrator

LIMIT = 20.0
FINISHED = "select (payload->>'n')::int, state::text, attempt, crashes from pgconductor._private_finished order by 1"


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds that only the database or a counter tells."""
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.005)


class Floor:
    """A task that notes what runs beside what, each until its number is let go."""

    def __init__(self, conductor: Conductor) -> None:
        self.began: list[int] = []
        self.beside: dict[int, set[int]] = {}
        self.running: set[int] = set()
        self._gates: dict[int, trio.Event] = {}

        async def work(n: int) -> None:
            self.began.append(n)
            self.beside[n] = set(self.running)
            self.running.add(n)
            try:
                await self._gates.setdefault(n, trio.Event()).wait()
            finally:
                self.running.discard(n)

        self.task = conductor.task(queue="q", name="work")(work)
        self._conductor = conductor

    def let_go(self, *numbers: int) -> None:
        for n in numbers:
            self._gates.setdefault(n, trio.Event()).set()

    def orchestrator(self, *, concurrency: int = 10) -> Orchestrator:
        worker = self._conductor.create_worker(
            queue="q", tasks=[self.task], concurrency=concurrency, sweep_interval=0.1
        )
        return Orchestrator(self._conductor, workers=[worker], lease=2.0)


def invoke_suspect(query: Any, *numbers: int) -> None:
    """Invoke these, as if two processes had died while they held them."""
    query(
        "do $$ begin"
        " perform pgconductor.invoke('work', jsonb_build_object('n', n), queue => 'q')"
        f" from unnest('{{{','.join(map(str, numbers))}}}'::int[]) n;"
        " update pgconductor._private_executions set crashes = 2, claim_no = 2"
        f" where (payload->>'n')::int = any ('{{{','.join(map(str, numbers))}}}'); end $$"
    )


async def test_suspect_begins_alone_and_the_others_wait_for_its_end(conductor: Conductor, query: Any) -> None:
    """Whoever dies beside it could otherwise be blamed in its place."""
    floor = Floor(conductor)
    async with conductor, trio.open_nursery() as nursery:
        query("select pgconductor.register_queue('q')")
        invoke_suspect(query, 1)
        orchestrator = floor.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: floor.began == [1])
        await floor.task.invoke_many([floor.task.bind(n) for n in range(10, 15)])
        (pipeline,) = orchestrator._pipelines
        claims = pipeline.statistics().claims
        ((heartbeat,),) = query("select heartbeat_at from pgconductor._private_orchestrators")
        await until(lambda: query("select heartbeat_at > %s from pgconductor._private_orchestrators", heartbeat)
                    == [(True,)])  # fmt: skip
        assert floor.began == [1]
        assert pipeline.statistics().claims <= claims + 1, "what is claimed now would share its crash"
        assert query("select count(*) from pgconductor._private_executions where state = 'running'") == [(1,)]
        floor.let_go(1, *range(10, 15))
        await until(lambda: len(query(FINISHED)) == 6)
        orchestrator.stop()
    assert query(FINISHED)[0] == (1, "completed", 1, 2)


async def test_what_was_claimed_ahead_goes_back_before_a_suspect_begins(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database knows no difference between a claim in stock and one that runs: both are charged with a crash."""
    monkeypatch.setattr("pgconductor.runtime.worker._STUCK_AFTER", LIMIT)
    floor = Floor(conductor)
    async with conductor, trio.open_nursery() as nursery:
        query("select pgconductor.register_queue('q')")
        orchestrator = floor.orchestrator(concurrency=2)
        await nursery.start(orchestrator.run)
        (pipeline,) = orchestrator._pipelines
        pipeline._prefetch.size = 50
        # Two take long and hold both runners; the others are claimed ahead.
        await floor.task.invoke_many([floor.task.bind(n) for n in (1, 2)])
        await until(lambda: floor.running == {1, 2})
        await floor.task.invoke_many([floor.task.bind(n) for n in range(10, 30)])
        await until(lambda: pipeline.statistics().in_stock == 20)
        # Its ready row must not be noticed before a runner is free, and none of the stock begin when one is.
        starts = pipeline._starts
        starts.is_held = True
        floor.let_go(2)
        await until(lambda: floor.running == {1})
        invoke_suspect(query, 3)
        await until(lambda: floor.began[2:] == [3])
        assert floor.beside[3] == {1}, "what had been running for long goes on"
        held = "select (payload->>'n')::int, crashes from pgconductor._private_executions where state = 'running'"
        assert sorted(query(held)) == [(1, 0), (3, 2)]
        floor.let_go(1, 3, *range(10, 30))
        await until(lambda: len(query(FINISHED)) == 23)
        orchestrator.stop()
    assert {row[2] for row in query(FINISHED)} == {1}, "what went back lost no attempt"


async def test_suspects_run_one_at_a_time(conductor: Conductor, query: Any) -> None:
    """Of two that begin together nobody could say which it was."""
    floor = Floor(conductor)
    async with conductor, trio.open_nursery() as nursery:
        query("select pgconductor.register_queue('q')")
        invoke_suspect(query, *range(5))
        floor.let_go(1, 2, 3, 4)
        orchestrator = floor.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: 0 in floor.running or len(floor.began) == 4)
        floor.let_go(0)
        await until(lambda: len(query(FINISHED)) == 5)
        orchestrator.stop()
    assert floor.beside == {n: set[int]() for n in range(5)}
    assert {(state, crashes) for _, state, _, crashes in query(FINISHED)} == {("completed", 2)}


async def test_suspect_that_lives_on_lets_the_others_begin(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An innocent that takes an hour must not stop its process for an hour."""
    monkeypatch.setattr("pgconductor.runtime.suspects._ALONE", 0.2)
    floor = Floor(conductor)
    async with conductor, trio.open_nursery() as nursery:
        query("select pgconductor.register_queue('q')")
        invoke_suspect(query, 1)
        orchestrator = floor.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: floor.began == [1])
        await floor.task.invoke(2)
        await until(lambda: floor.began == [1, 2])
        assert floor.beside[2] == {1}
        floor.let_go(1, 2)
        await until(lambda: len(query(FINISHED)) == 2)
        orchestrator.stop()


async def test_suspect_waits_for_a_free_runner(conductor: Conductor, query: Any) -> None:
    """It is not claimed to lie in stock, where any crash would end it."""
    floor = Floor(conductor)
    async with conductor, trio.open_nursery() as nursery:
        query("select pgconductor.register_queue('q')")
        orchestrator = floor.orchestrator(concurrency=1)
        await nursery.start(orchestrator.run)
        await floor.task.invoke(1)
        await until(lambda: floor.began == [1])
        invoke_suspect(query, 2)
        heartbeats = "select heartbeat_at from pgconductor._private_orchestrators"
        for _ in range(2):
            ((last,),) = query(heartbeats)
            await until(lambda last=last: query(heartbeats) > [(last,)])  # type: ignore[misc]
        standing = "select state::text, claim_no from pgconductor._private_executions where crashes = 2"
        assert query(standing) == [("ready", 2)], "it was claimed, whatever became of it then"
        floor.let_go(1, 2)
        await until(lambda: len(query(FINISHED)) == 2)
        orchestrator.stop()


async def test_stop_gives_back_a_suspect_that_has_not_begun(conductor: Conductor, query: Any) -> None:
    """A deployment must not cost it its last life."""
    floor = Floor(conductor)
    async with conductor, trio.open_nursery() as nursery:
        query("select pgconductor.register_queue('q')")
        orchestrator = floor.orchestrator()
        await nursery.start(orchestrator.run)
        (pipeline,) = orchestrator._pipelines
        claimed, resume = trio.Event(), trio.Event()
        clear_stock = pipeline.clear_stock

        async def gated() -> None:
            claimed.set()
            with trio.CancelScope(shield=True):
                await resume.wait()
            await clear_stock()

        pipeline.clear_stock = gated  # type: ignore[method-assign]
        invoke_suspect(query, 1)
        with trio.fail_after(LIMIT):
            await claimed.wait()
        orchestrator.stop()
        await until(lambda: pipeline._is_stopping)
        resume.set()
    assert floor.began == []
    assert query("select state::text, attempt, crashes, owner from pgconductor._private_executions") == [
        ("ready", 0, 2, None)
    ]
