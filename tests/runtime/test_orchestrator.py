"""Life and end of an orchestrator: start, stop, cancel, signals, leases, drains; and every way to misuse one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import psycopg
import pytest
import trio
import trio.lowlevel

from pgconductor import (
    Conductor,
    Context,
    InvalidOption,
    InvalidTask,
    Misuse,
    NoDatabase,
    Orchestrator,
    SchemaMissing,
)


async def wait_for(query: Any, text: str, expected: list[tuple[Any, ...]]) -> None:
    """Wait until a query gives what is expected; the whole-test timeout turns a hang into a failure."""
    with trio.fail_after(20):
        while query(text) != expected:
            await trio.sleep(0.02)


STATES = "select state::text, attempt, crashes from pgconductor.executions"


async def test_stop_lets_running_handlers_end_within_the_grace(conductor: Conductor, query: Any) -> None:
    """What runs may finish; what has not begun is given back at no cost."""
    begun, release = trio.Event(), trio.Event()

    @conductor.task(queue="q")
    async def work(n: int) -> int:
        begun.set()
        await release.wait()
        return n

    async with conductor, trio.open_nursery() as nursery:
        await work.invoke_many([work.bind(n) for n in range(5)])
        worker = conductor.create_worker(queue="q", tasks=[work], concurrency=1)
        orchestrator = Orchestrator(conductor, workers=[worker])
        await nursery.start(orchestrator.run)
        await begun.wait()
        orchestrator.stop()
        orchestrator.stop()  # any number of times
        await wait_for(query, STATES + " where state = 'running'", [("running", 1, 0)])
        release.set()
    assert sorted(query(STATES)) == [("completed", 1, 0)] + [("ready", 0, 0)] * 4


async def test_after_the_grace_handlers_are_cancelled_and_given_back(conductor: Conductor, query: Any) -> None:
    """No attempt is burned by a shutdown."""
    begun = trio.Event()
    cleaned = False

    @conductor.task
    async def linger() -> None:
        nonlocal cleaned
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(1, shield=True):
                await trio.lowlevel.checkpoint()
                cleaned = True

    async with conductor, trio.open_nursery() as nursery:
        await linger.invoke()
        orchestrator = Orchestrator(conductor, tasks=[linger], grace=0.05)
        await nursery.start(orchestrator.run)
        await begun.wait()
        orchestrator.stop()
    assert cleaned
    assert query(STATES) == [("ready", 0, 0)]
    assert query("select claim_no, owner from pgconductor._private_executions") == [(1, None)]


async def test_a_handler_that_returns_when_cancelled_has_completed(conductor: Conductor, query: Any) -> None:
    """A result that was returned is never thrown away."""
    begun = trio.Event()

    @conductor.task
    async def finish() -> str:
        begun.set()
        with trio.move_on_after(60):
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                return "done"
        return "not cancelled"

    async with conductor, trio.open_nursery() as nursery:
        handle = await finish.invoke()
        orchestrator = Orchestrator(conductor, tasks=[finish], grace=0)
        await nursery.start(orchestrator.run)
        await begun.wait()
        orchestrator.stop()
    async with conductor:
        assert await handle.result(timeout=0) == "done"


async def test_an_error_while_being_cancelled_is_no_failure(conductor: Conductor, query: Any) -> None:
    """An unwinding that the engine began is given back, whatever is raised on the way."""
    begun = trio.Event()

    @conductor.task(queue="q")
    async def break_down() -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async with conductor, trio.open_nursery() as nursery:
        await break_down.invoke()
        worker = conductor.create_worker(queue="q", tasks=[break_down])
        orchestrator = Orchestrator(conductor, workers=[worker], grace=0)
        await nursery.start(orchestrator.run)
        await begun.wait()
        orchestrator.stop()
    assert query(STATES) == [("ready", 0, 0)]
    assert query("select errors from pgconductor.executions") == [(None,)]


async def test_cancelling_run_flushes_and_gives_back(conductor: Conductor, query: Any) -> None:
    """A cancelled `run` means stop now; what has ended is written, in a bounded shield, and `Cancelled` goes on."""
    begun = trio.Event()
    count = 0

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        nonlocal count
        count += 1
        if count == 10:
            begun.set()
        if n >= 5:
            await trio.sleep_forever()

    async with conductor:
        await work.invoke_many([work.bind(n) for n in range(10)])
        worker = conductor.create_worker(queue="q", tasks=[work], flush_interval=5.0)
        orchestrator = Orchestrator(conductor, workers=[worker])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(orchestrator.run)
                await begun.wait()
                scope.cancel()
        assert scope.cancelled_caught
    assert sorted(query(STATES)) == [("completed", 1, 0)] * 5 + [("ready", 0, 0)] * 5
    assert query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


async def test_an_interrupted_thread_keeps_its_claim(conductor: Conductor, query: Any) -> None:
    """A thread cannot be stopped: its execution must not be given back while the body may still run."""
    import threading

    begun, release = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    @conductor.task
    def block() -> None:
        token.run_sync_soon(begun.set)
        release.wait(20)

    async with conductor, trio.open_nursery() as nursery:
        await block.invoke()
        orchestrator = Orchestrator(conductor, tasks=[block], grace=0)
        await nursery.start(orchestrator.run)
        await begun.wait()
        orchestrator.stop()
    assert query(STATES) == [("running", 1, 0)]
    assert query("select count(*) from pgconductor._private_orchestrators") == [(1,)]  # its lease has to lapse
    release.set()


async def test_a_lost_lease_interrupts_and_begins_a_new_incarnation(conductor: Conductor, query: Any) -> None:
    """Declared dead, an orchestrator stops what it holds, writes nothing under its old id, and goes on under a new
    one.
    """
    begun = trio.Event()
    attempts: list[int] = []

    @conductor.task
    async def work(ctx: Context) -> int:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            begun.set()
            await trio.sleep_forever()
        return ctx.attempt

    async with conductor, trio.open_nursery() as nursery:
        handle = await work.invoke()
        orchestrator = Orchestrator(conductor, tasks=[work], lease=1.0)
        await nursery.start(orchestrator.run)
        first = orchestrator.statistics().owner
        await begun.wait()
        query("update pgconductor._private_orchestrators set died_at = now()")
        assert await handle.result(timeout=20) == 1  # a crash was charged, not an attempt
        assert orchestrator.statistics().owner not in (None, first)
        assert orchestrator.statistics().incarnations == 2
        orchestrator.stop()
    assert query("select claim_no, attempt, crashes from pgconductor._private_finished") == [(2, 1, 1)]


async def test_what_a_dead_orchestrator_held_is_run_by_another(conductor: Conductor, query: Any) -> None:
    """Rescue from the executions' side: also for an owner of whom there is no row at all."""

    @conductor.task(queue="q")
    async def work() -> str:
        return "done"

    async with conductor:
        handle = await work.invoke()
        worker = conductor.create_worker(queue="q", tasks=[work])
        query("select pgconductor.register_queue('q')")
        query("update pgconductor._private_executions set state = 'running', claim_no = 1, attempt = 1,"
              " claimed_at = now(), owner = gen_random_uuid()")  # fmt: skip
        async with trio.open_nursery() as nursery:
            orchestrator = Orchestrator(conductor, workers=[worker])
            await nursery.start(orchestrator.run)
            assert await handle.result(timeout=20) == "done"
            orchestrator.stop()
    assert query("select claim_no, attempt, crashes from pgconductor._private_finished") == [(2, 1, 1)]


async def test_a_crash_loop_ends_as_failed(conductor: Conductor, query: Any) -> None:
    """An execution that brought down three processes is never run again."""
    ran = False

    @conductor.task(queue="q")
    async def poison() -> None:
        nonlocal ran
        ran = True

    async with conductor:
        await poison.invoke()
        query("update pgconductor._private_executions set state = 'running', claim_no = 3, attempt = 1, crashes = 2,"
              " claimed_at = now(), owner = gen_random_uuid()")  # fmt: skip
        async with trio.open_nursery() as nursery:
            worker = conductor.create_worker(queue="q", tasks=[poison])
            orchestrator = Orchestrator(conductor, workers=[worker])
            await nursery.start(orchestrator.run)
            await wait_for(query, STATES, [("failed", 0, 3)])
            orchestrator.stop()
    assert not ran
    assert query("select errors -> 0 ->> 'type' from pgconductor.executions") == [("crash_loop",)]


@dataclass
class Database:
    name: str


async def test_resources_are_open_while_handlers_run(conductor: Conductor) -> None:
    """The lifespan is entered before the first handler and left after the last."""
    log: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[Database]:
        log.append("open")
        yield Database("db")
        log.append("close")

    @conductor.task
    async def use(ctx: Context) -> str:
        log.append(f"use {ctx.resource(Database).name}")
        return ""

    async with conductor:
        await use.invoke()
        await Orchestrator(conductor, tasks=[use], resources=lifespan).drain()
    assert log == ["open", "use db", "close"]


async def test_drain_includes_what_executions_invoke(conductor: Conductor) -> None:
    """Drain looks anew after each round; it does not end at the first empty claim."""

    @conductor.task
    async def descend(n: int) -> None:
        if n:
            await descend.invoke(n - 1)

    async with conductor:
        await descend.invoke(10)
        assert (await Orchestrator(conductor, tasks=[descend]).drain()).completed == 11


async def test_drain_leaves_what_is_due_beyond_the_horizon(conductor: Conductor, query: Any) -> None:
    """The horizon is in seconds from each round's now."""

    @conductor.task
    async def work() -> None: ...

    async with conductor:
        await work.options(delay=1.5).invoke()
        await work.options(delay=3600).invoke()
        orchestrator = Orchestrator(conductor, tasks=[work])
        assert (await orchestrator.drain()).completed == 0
        assert (await orchestrator.drain(horizon=60)).completed == 1
    assert query("select state::text from pgconductor._private_executions") == [("scheduled",)]


async def test_an_orchestrator_outlives_the_loss_of_all_its_connections(conductor: Conductor, query: Any) -> None:
    """The database going away later is waited for; nothing is lost or run twice when the process lives."""
    runs: list[int] = []
    half = trio.Event()

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        runs.append(n)
        if len(runs) == 100:
            half.set()
        await trio.sleep(0.001)

    async with conductor:
        await work.invoke_many([work.bind(n) for n in range(400)])
        worker = conductor.create_worker(queue="q", tasks=[work])
        orchestrator = Orchestrator(conductor, workers=[worker])
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            await half.wait()
            query("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'pgconductor %'")
            await wait_for(query, "select count(*) from pgconductor._private_finished", [(400,)])
            orchestrator.stop()
    assert query("select count(*) from pgconductor._private_executions") == [(0,)]
    # A claim whose reply was lost is given back unrun; what ran is flushed again.
    assert sorted(runs) == list(range(400))


# Misuse: bare errors, before anything runs


async def test_errors_before_the_start_come_bare() -> None:
    """No exception group, and no password, for what is wrong from the beginning."""
    conductor = Conductor("postgresql://somebody:secret@127.0.0.1:1/nowhere?connect_timeout=2")

    @conductor.task
    async def work() -> None: ...

    with pytest.raises(NoDatabase) as raised:
        await Orchestrator(conductor, tasks=[work]).run()
    assert "secret" not in str(raised.value)


async def test_a_missing_schema_says_migrate(pgconductor_empty_dsn: str) -> None:
    """With migrate=False nothing is installed unasked."""
    conductor = Conductor(pgconductor_empty_dsn)

    @conductor.task
    async def work() -> None: ...

    with pytest.raises(SchemaMissing, match="pgconductor migrate"):
        await Orchestrator(conductor, tasks=[work], migrate=False).run()
    await Orchestrator(conductor, tasks=[work]).drain()  # the default migrates
    await Orchestrator(conductor, tasks=[work], migrate=False).drain()


async def test_it_runs_once_at_a_time_and_again_later(conductor: Conductor) -> None:
    """A second run of one object at the same time would share its state."""

    @conductor.task
    async def work() -> None: ...

    orchestrator = Orchestrator(conductor, tasks=[work])
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            with pytest.raises(Misuse, match="running already"):
                await orchestrator.run()
            with pytest.raises(Misuse, match="running already"):
                await orchestrator.drain()
            orchestrator.stop()


async def test_declarations_are_checked() -> None:
    """Each refusal names the object and the remedy."""
    conductor, other = Conductor("dbname=x"), Conductor("dbname=x")

    @conductor.task(queue="fast")
    async def work() -> None: ...

    @other.task
    async def foreign() -> None: ...

    worker = conductor.create_worker(queue="fast", tasks=[work])
    with pytest.raises(InvalidTask, match="2 workers"):
        Orchestrator(conductor, workers=[worker, worker])
    with pytest.raises(InvalidTask, match="another conductor"):
        Orchestrator(conductor, tasks=[foreign])
    with pytest.raises(InvalidTask, match="another conductor"):
        Orchestrator(conductor, workers=[other.create_worker(queue="default", tasks=[foreign])])
    with pytest.raises(InvalidTask, match="fast"):
        Orchestrator(conductor, tasks=[work])
    with pytest.raises(Misuse, match="nothing to run"):
        await Orchestrator(conductor).run()
    for options in ({"lease": 0.5}, {"lease": float("nan")}, {"grace": -1}, {"listen": "both"}):
        with pytest.raises(InvalidOption):
            Orchestrator(conductor, workers=[worker], **cast(Any, options))
    with pytest.raises(InvalidOption):
        await Orchestrator(conductor, workers=[worker]).drain(horizon=-1)


async def test_the_engines_sessions_have_brakes_and_names(
    conductor: Conductor, pgconductor_dsn: str, query: Any
) -> None:
    """Whatever the administrator's defaults are: READ COMMITTED, bounded statements and locks."""
    query("select pgconductor.invoke('work')")  # by a client without brakes of its own, before they are set
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        name = conn.info.dbname
        conn.execute(f'alter database "{name}" set default_transaction_isolation = serializable'.encode())
        conn.execute(f'alter database "{name}" set lock_timeout = 0'.encode())
        conn.execute(f'alter database "{name}" set statement_timeout = 50'.encode())

    @conductor.task
    async def work() -> str:
        return "done"

    async with conductor, trio.open_nursery() as nursery:
        orchestrator = Orchestrator(conductor, tasks=[work])
        await nursery.start(orchestrator.run)
        with trio.fail_after(20):
            while orchestrator.statistics().workers[0].outcomes != {"completed": 1}:
                await trio.sleep(0.01)
        with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
            names = {row[0] for row in conn.execute("select application_name from pg_stat_activity")}
        assert {"pgconductor claim", "pgconductor flush", "pgconductor listen", "pgconductor control"} <= names
        orchestrator.stop()


async def test_all_that_a_dead_process_held_is_rescued_without_waiting_for_more_heartbeats(
    conductor: Conductor, query: Any
) -> None:
    """A thousand at each heartbeat would take a full process's work far beyond the promised seconds."""

    @conductor.task(queue="q")
    async def work() -> None:
        await trio.lowlevel.checkpoint()

    query("select pgconductor.register_queue('q')")
    query("select pgconductor.invoke('work', queue => 'q') from generate_series(1, 2500)")
    query(
        "update pgconductor._private_executions set state = 'running', owner = %s, claim_no = 1, attempt = 1", uuid4()
    )
    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[work], notify="off", sweep_interval=60.0)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=3600.0)
        await nursery.start(orchestrator.run)
        with trio.fail_after(12):  # the next heartbeat is 15 s away
            while orchestrator.statistics().recovered < 2500:
                await trio.sleep(0.05)
        orchestrator.stop()
