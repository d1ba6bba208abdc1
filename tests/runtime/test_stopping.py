"""The end of a run: its phases and bounds, what is given back, what is kept, and what is said when it went wrong."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest
import trio

from pgconductor import Conductor, Context, Orchestrator, PgconductorError, Unavailable
from pgconductor.db.link import Link
from pgconductor.testing.proxy import ChaosProxy, open_chaos_proxy

LIMIT = 20.0
STATES = "select state::text, attempt, crashes from pgconductor.executions order by id"


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds that only the database or a counter tells."""
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.005)


class Run:
    """A run of an orchestrator, and what it raised."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator
        self.errors: list[BaseException] = []
        self.has_ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self.orchestrator.run(task_status=task_status)
        except* PgconductorError as group:
            self.errors += group.exceptions
        self.has_ended.set()


async def cut_off(proxy: ChaosProxy) -> None:
    """As a database that is down: connections break, and none is made."""
    proxy.refuse()
    proxy.rst()


async def test_outcomes_that_cannot_be_written_end_the_run_with_an_error(
    pgconductor_dsn: str, query: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An end that looks well would hide that finished work runs again; an endless one would block a deployment."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        begun, release = trio.Event(), trio.Event()

        @conductor.task(queue="q")
        async def work() -> str:
            begun.set()
            await release.wait()
            return "done"

        ((execution,),) = query("select pgconductor.invoke('work', queue => 'q')")
        worker = conductor.create_worker(queue="q", tasks=[work])
        orchestrator = Orchestrator(conductor, workers=[worker], lease=60.0, grace=0.1, last_words=0.2, migrate=False)
        run = Run(orchestrator)
        with caplog.at_level(logging.WARNING, "pgconductor.orchestrator"), trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(run.run)
                await begun.wait()
                await cut_off(proxy)
                release.set()
                orchestrator.stop()
    (error,) = run.errors
    assert isinstance(error, Unavailable)
    assert str(error) == (
        "outcomes that could not be written before the end: 1;"
        f" their executions run again when the lease has lapsed: {execution}"
    )
    assert any(str(execution) in record.getMessage() for record in caplog.records)
    assert query(STATES) == [("running", 1, 0)]


async def test_end_of_a_lease_while_stopping_names_what_it_lost(pgconductor_dsn: str, query: Any) -> None:
    """The grace may be longer than the lease: what had ended is lost all the same."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        begun, other = trio.Event(), trio.Event()

        @conductor.task(queue="q")
        async def work(is_short: bool) -> None:
            if is_short:
                await begun.wait()
            else:
                begun.set()
                await trio.sleep_forever()
            other.set()

        query(
            "select pgconductor.invoke('work', jsonb_build_object('is_short', n = 1), 'q') from generate_series(1, 2) n"
        )
        worker = conductor.create_worker(queue="q", tasks=[work], flush_interval=5.0)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=1.0, grace=LIMIT, migrate=False)
        run = Run(orchestrator)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(run.run)
                await other.wait()
                await cut_off(proxy)
                orchestrator.stop()
    (error,) = run.errors
    assert isinstance(error, Unavailable)
    assert str(error).startswith("outcomes that could not be written before the end: 2;")
    assert orchestrator.statistics().fences == 1


async def test_run_with_nothing_left_to_write_ends_well_without_a_database(pgconductor_dsn: str, query: Any) -> None:
    """That it could not say goodbye is no loss: the lease lapses."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)

        @conductor.task(queue="q")
        async def work() -> None: ...

        worker = conductor.create_worker(queue="q", tasks=[work])
        run = Run(Orchestrator(conductor, workers=[worker], last_words=0.2, migrate=False))
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(run.run)
                await cut_off(proxy)
                run.orchestrator.stop()
    assert run.errors == []


async def test_stop_is_heeded_while_the_next_incarnation_cannot_register(pgconductor_dsn: str, query: Any) -> None:
    """A database that is away must not keep a process that is told to end."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)

        @conductor.task(queue="q")
        async def work() -> None: ...

        worker = conductor.create_worker(queue="q", tasks=[work])
        run = Run(Orchestrator(conductor, workers=[worker], lease=1.0, last_words=0.2, migrate=False))
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(run.run)
                await cut_off(proxy)
                await until(lambda: run.orchestrator.statistics().owner is None)
                run.orchestrator.stop()
    assert run.errors == []


async def test_stop_is_heeded_while_the_first_incarnation_registers(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the start goes on; nothing is left behind."""
    asked = trio.Event()
    attempt = Link.attempt

    async def hang(link: Link, call: Any) -> Any:
        if b"register_orchestrator" in call.query:
            asked.set()
            await trio.sleep_forever()
        return await attempt(link, call)

    monkeypatch.setattr(Link, "attempt", hang)

    @conductor.task(queue="q")
    async def work() -> None: ...

    orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[work])])
    with trio.fail_after(LIMIT):
        async with conductor, trio.open_nursery() as nursery:
            nursery.start_soon(nursery.start, orchestrator.run)
            await asked.wait()
            orchestrator.stop()
    assert orchestrator.statistics().incarnations == 0
    assert query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


async def test_claim_that_hangs_does_not_hold_up_the_next_incarnation(
    pgconductor_dsn: str, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shield is for a stop, to hear what it brought; with the lease gone that is nothing."""
    monkeypatch.setattr("pgconductor.runtime.intake._CLAIM_TIMEOUT", 3600.0)
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        ran = trio.Event()

        @conductor.task(queue="q")
        async def work() -> None:
            ran.set()

        worker = conductor.create_worker(queue="q", tasks=[work], sweep_interval=0.05, notify="off")
        run = Run(Orchestrator(conductor, workers=[worker], lease=1.0, migrate=False))
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                await nursery.start(run.run)
                (pipeline,) = run.orchestrator._pipelines
                await until(lambda: pipeline.statistics().claims > 2)
                ((claiming,),) = query(
                    "select pid from pg_stat_activity where datname = current_database()"
                    " and application_name = 'pgconductor claim'"
                )
                proxy.blackhole(claiming)
                query("update pgconductor._private_orchestrators set died_at = now()")
                query("select pgconductor.invoke('work', queue => 'q')")
                await ran.wait()
                run.orchestrator.stop()
    assert run.orchestrator.statistics().fences == 1


async def test_thread_that_heeds_the_stop_is_given_back(conductor: Conductor, query: Any) -> None:
    """One that ends when asked to costs its execution nothing, and the process leaves no claim behind."""
    begun = threading.Event()

    @conductor.task(queue="q")
    def block(ctx: Context) -> None:
        begun.set()
        while not ctx.is_cancelled:
            threading.Event().wait(0.005)
        ctx.check_cancelled()

    async with conductor, trio.open_nursery() as nursery:
        await block.invoke()
        worker = conductor.create_worker(queue="q", tasks=[block])
        orchestrator = Orchestrator(conductor, workers=[worker], grace=0.05)
        await nursery.start(orchestrator.run)
        await until(begun.is_set)
        orchestrator.stop()
    assert query(STATES) == [("ready", 0, 0)]
    assert query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


async def test_what_has_not_begun_goes_back_before_what_runs_has_ended(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others can take it at once, however long the grace is; and nothing begins after the stop."""
    monkeypatch.setattr("pgconductor.runtime.worker._STUCK_AFTER", LIMIT)
    started: list[int] = []
    release = trio.Event()

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        started.append(n)
        await release.wait()

    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[work], concurrency=1)
        orchestrator = Orchestrator(conductor, workers=[worker])
        await nursery.start(orchestrator.run)
        (pipeline,) = orchestrator._pipelines
        pipeline._prefetch.size = 50
        await work.invoke_many([work.bind(n) for n in range(20)])
        await until(lambda: pipeline.statistics().in_stock == 19)
        orchestrator.stop()
        count = "select state::text, attempt, crashes, count(*) from pgconductor._private_executions group by 1, 2, 3"
        await until(lambda: sorted(query(count)) == [("ready", 0, 0, 19), ("running", 1, 0, 1)])
        release.set()
    assert len(started) == 1


async def test_outcome_of_which_no_trace_is_left_is_no_fenced_one(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush whose reply was lost, of a task whose results are not kept: the row it wrote is nowhere."""
    lost = 0
    attempt = Link.attempt

    async def lose(link: Link, call: Any) -> Any:
        nonlocal lost
        answer = await attempt(link, call)
        if b".flush(" in call.query and not lost:
            lost += 1
            raise Unavailable("the reply was lost")
        return answer

    monkeypatch.setattr(Link, "attempt", lose)

    @conductor.task(queue="q", keep_completed=0)
    async def work() -> None: ...

    async with conductor:
        await work.invoke()
        worker = conductor.create_worker(queue="q", tasks=[work])
        drained = await Orchestrator(conductor, workers=[worker]).drain()
    assert lost == 1
    assert (drained.completed, drained.fenced) == (1, 0)
    assert query("select count(*) from pgconductor.executions") == [(0,)]


async def test_cancelled_run_raises_cancelled_alone(
    pgconductor_dsn: str, query: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An error beside it would surprise whoever cancelled; the ids are in the log."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        begun = trio.Event()

        @conductor.task(queue="q")
        async def work() -> None:
            begun.set()
            await trio.sleep_forever()

        ((execution,),) = query("select pgconductor.invoke('work', queue => 'q')")
        worker = conductor.create_worker(queue="q", tasks=[work])
        orchestrator = Orchestrator(conductor, workers=[worker], lease=60.0, last_words=0.2, migrate=False)
        with trio.fail_after(LIMIT), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(orchestrator.run)
                await begun.wait()
                await cut_off(proxy)
                scope.cancel()
        assert scope.cancelled_caught
    assert any(str(execution) in record.getMessage() for record in caplog.records)


async def test_outcome_that_cannot_even_be_failed_stops_nobody(
    conductor: Conductor, query: Any, pgconductor_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One row that the database refuses in any form must neither end the engine nor hold up the others."""

    @conductor.task(queue="q")
    async def work(n: int) -> int:
        return n

    poison: UUID
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        conn.execute(
            "create function refuse() returns trigger language plpgsql as"
            " $$begin if old.payload = '{\"n\": 3}' then raise check_violation; end if; return old; end$$"
        )
    async with conductor, trio.open_nursery() as nursery:
        handles = await work.invoke_many([work.bind(n) for n in range(10)])
        poison = handles[3].id
        query("select pgconductor.register_queue('q')")
        ((number,),) = query("select no from pgconductor._private_queues where name = 'q'")
        query(f"create trigger refuse before delete on pgconductor._private_queue_{number}"
              " for each row execute function refuse()")  # fmt: skip
        query("create trigger refuse before delete on pgconductor._private_queue_0"
              " for each row execute function refuse()")  # fmt: skip
        worker = conductor.create_worker(queue="q", tasks=[work])
        run = Run(Orchestrator(conductor, workers=[worker]))
        await nursery.start(run.run)
        await until(lambda: query("select count(*) from pgconductor._private_finished") == [(9,)])
        await until(lambda: any("cannot even be failed" in record.getMessage() for record in caplog.records))
        run.orchestrator.stop()
    (error,) = run.errors
    assert str(poison) in str(error)
