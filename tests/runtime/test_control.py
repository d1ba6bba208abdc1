"""What others ask of a running orchestrator: cancel, stop, and what becomes of its handlers then."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest
import trio
from psycopg import sql

from pgconductor import Conductor, Context, Exponential, Orchestrator, SchemaTooNew
from pgconductor.tasks import NotifyMode

LIMIT = 20.0
STATES = "select state::text, attempt, crashes from pgconductor.executions order by id"


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds that only the database or a counter tells."""
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.005)


def cancel(query: Any, *executions: UUID, reason: str | None = None) -> dict[UUID, str]:
    return dict(query("select id, status from pgconductor.cancel(%s::uuid[], %s)", list(executions), reason))


async def attending(orchestrator: Orchestrator) -> None:
    """Until it listens to its control channel."""
    await until(lambda: any(p.reactor.can_be_woken for p in orchestrator._pipelines))


async def test_running_handler_is_cancelled_within_a_tenth_of_a_second(conductor: Conductor, query: Any) -> None:
    """By the control channel: the next heartbeat is 15 s away. The best of five: the machine may be busy."""
    begun = trio.Event()
    ended: list[float] = []

    @conductor.task(queue="q")
    async def linger() -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.append(trio.current_time())

    latencies: list[float] = []
    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[linger], sweep_interval=60.0)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=60.0)
        await nursery.start(orchestrator.run)
        await attending(orchestrator)
        for n in range(1, 6):
            begun = trio.Event()
            handle = await linger.invoke()
            with trio.fail_after(LIMIT):
                await begun.wait()
            assert cancel(query, handle.id, reason="enough") == {handle.id: "requested"}
            committed_at = trio.current_time()
            await until(lambda n=n: len(ended) == n)  # type: ignore[misc]
            latencies.append(ended[-1] - committed_at)
        await until(lambda: query(STATES) == [("cancelled", 1, 0)] * 5)
        orchestrator.stop()
    print(f"cancelled after {', '.join(f'{1000 * latency:.1f}' for latency in latencies)} ms")
    assert min(latencies) < 0.1
    assert set(query("select cancel_reason from pgconductor._private_finished")) == {("enough",)}


@pytest.mark.parametrize("notify", ["off", "adaptive"])
async def test_heartbeat_tells_what_no_notification_told(conductor: Conductor, query: Any, notify: NotifyMode) -> None:
    """Without a LISTEN connection, or with its notification lost, the cancellation is late, not lost."""
    begun = trio.Event()

    @conductor.task(queue="q")
    async def linger() -> None:
        begun.set()
        await trio.sleep_forever()

    async with conductor, trio.open_nursery() as nursery:
        handle = await linger.invoke()
        worker = conductor.create_worker(queue="q", tasks=[linger], notify=notify)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=1.0)
        await nursery.start(orchestrator.run)
        with trio.fail_after(LIMIT):
            await begun.wait()
        # As `cancel` does, but in silence.
        query("update pgconductor._private_executions set cancel_requested_at = now() where id = %s", handle.id)
        await until(lambda: query(STATES) == [("cancelled", 1, 0)])
        orchestrator.stop()


async def test_cancelled_claim_whose_reply_was_lost_is_ended(conductor: Conductor, query: Any) -> None:
    """Its owner lives and does not know it, so that nobody recovers it: it stays running for as long as the process."""

    @conductor.task(queue="q")
    async def never() -> None:
        raise AssertionError("claimed by a statement whose reply nobody got")

    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[never], notify="off", sweep_interval=60.0)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=1.0)
        await nursery.start(orchestrator.run)
        owner = orchestrator.statistics().owner
        # On another queue, so that nobody has claimed it meanwhile; then as a claim leaves it, and a request.
        query("select pgconductor.invoke('never', queue => 'other')")
        query(
            "update pgconductor._private_executions set queue = 'q', state = 'running', owner = %s, claim_no = 1,"
            " attempt = 1, claimed_at = now(), cancel_requested_at = now()",
            owner,
        )
        await until(lambda: query(STATES) == [("cancelled", 1, 0)])
        orchestrator.stop()


async def test_cancelled_in_stock_is_never_started(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was claimed ahead, so the database can only ask."""
    monkeypatch.setattr("pgconductor.runtime.worker._STUCK_AFTER", LIMIT)
    started: list[int] = []
    release = trio.Event()

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        started.append(n)
        if n >= 1000:
            await release.wait()

    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[work], concurrency=1, sweep_interval=60.0)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=60.0)
        await nursery.start(orchestrator.run)
        await attending(orchestrator)
        (pipeline,) = orchestrator._pipelines
        pipeline._prefetch.size = 50
        # The first holds the only runner; the others are claimed ahead.
        first = await work.invoke(1000)
        await until(lambda: started == [1000])
        handles = await work.invoke_many([work.bind(n) for n in range(20)])
        await until(lambda: pipeline.statistics().in_stock == 20)
        assert set(cancel(query, *(handle.id for handle in handles)).values()) == {"requested"}
        await until(lambda: query("select count(*) from pgconductor._private_executions") == [(1,)])
        release.set()
        await first.result(timeout=LIMIT)
        orchestrator.stop()
    assert started == [1000]
    assert query("select state::text, count(*) from pgconductor._private_finished group by 1 order by 1") == [
        ("cancelled", 20),
        ("completed", 1),
    ]


async def test_cancellation_that_overtakes_the_claims_reply_is_heeded(conductor: Conductor, query: Any) -> None:
    """The claim has committed, its reply is on the way: the signals name an execution that is not here yet."""
    started: list[int] = []

    @conductor.task(queue="q")
    async def work(n: int) -> None:
        started.append(n)

    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[work], sweep_interval=60.0)
        orchestrator = Orchestrator(conductor, workers=[worker], lease=60.0)
        await nursery.start(orchestrator.run)
        await attending(orchestrator)
        (pipeline,) = orchestrator._pipelines
        # No claim is under way that would not pass the gate.
        await until(lambda: pipeline.statistics().reactor.is_flag_raised and pipeline.reactor._sleeper is not None)
        lease = pipeline._lease
        attempt = lease.attempt
        reached, resume = trio.Event(), trio.Event()

        async def late(*args: Any, **kwargs: Any) -> Any:
            answer = await attempt(*args, **kwargs)
            if getattr(answer, "claimed", None):
                reached.set()
                with trio.CancelScope(shield=True):
                    await resume.wait()
            return answer

        vars(lease).update(attempt=late)
        handle = await work.invoke(1)
        with trio.fail_after(LIMIT):
            await reached.wait()
        assert cancel(query, handle.id) == {handle.id: "requested"}
        await until(lambda: handle.id in pipeline._requested)
        resume.set()
        await until(lambda: query(STATES) == [("cancelled", 1, 0)])
        orchestrator.stop()
    assert started == []


async def test_result_that_was_returned_wins_over_a_requested_cancellation(conductor: Conductor, query: Any) -> None:
    """A completed handler has had its effects: calling that cancelled would be a lie."""
    begun = trio.Event()

    @conductor.task(queue="q")
    async def finish() -> str:
        begun.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return "done"

    async with conductor, trio.open_nursery() as nursery:
        handle = await finish.invoke()
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[finish])])
        await nursery.start(orchestrator.run)
        with trio.fail_after(LIMIT):
            await begun.wait()
        cancel(query, handle.id)
        assert await handle.result(timeout=LIMIT) == "done"
        orchestrator.stop()


async def test_cancelled_execution_is_never_retried(conductor: Conductor, query: Any) -> None:
    """Whatever its handler raises on the way out."""
    begun = trio.Event()

    @conductor.task(queue="q", max_attempts=5, backoff=Exponential(initial=0.0, maximum=0.0))
    async def break_down() -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async with conductor, trio.open_nursery() as nursery:
        handle = await break_down.invoke()
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[break_down])])
        await nursery.start(orchestrator.run)
        with trio.fail_after(LIMIT):
            await begun.wait()
        cancel(query, handle.id)
        await until(lambda: query(STATES) == [("cancelled", 1, 0)])
        orchestrator.stop()


async def test_handler_that_outstays_its_cancellation_keeps_its_claim_and_is_logged_once(
    conductor: Conductor, query: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Freeing its row would let a second body begin beside it."""
    begun, release = trio.Event(), trio.Event()

    @conductor.task(queue="q")
    async def shield() -> None:
        begun.set()
        with trio.CancelScope(shield=True):
            await release.wait()
        await trio.lowlevel.checkpoint()

    async with conductor, trio.open_nursery() as nursery:
        handle = await shield.invoke()
        worker = conductor.create_worker(queue="q", tasks=[shield])
        orchestrator = Orchestrator(conductor, workers=[worker], cancel_grace=0.1, lease=1.0)
        await nursery.start(orchestrator.run)
        with trio.fail_after(LIMIT):
            await begun.wait()
        with caplog.at_level(logging.WARNING, "pgconductor.orchestrator"):
            cancel(query, handle.id)
            beats = "select heartbeat_at from pgconductor._private_orchestrators"
            ((before,),) = query(beats)
            # Longer than its lease, in which several heartbeats ask again.
            await until(lambda: (query(beats)[0][0] - before).total_seconds() > 1.2)
        assert [r.getMessage() for r in caplog.records if str(handle.id) in r.getMessage()] == [
            f"execution {handle.id} of task 'shield' was cancelled 0.1 s ago and runs on;"
            " it keeps its claim until it ends"
        ]
        assert query("select state::text, claim_no from pgconductor._private_executions") == [("running", 1)]
        release.set()
        await until(lambda: query(STATES) == [("cancelled", 1, 0)])
        orchestrator.stop()
    assert query("select claim_no from pgconductor._private_finished") == [(1,)]


async def test_thread_of_a_cancelled_execution_is_asked_and_waited_for(conductor: Conductor, query: Any) -> None:
    """Nobody can stop a thread: until it has ended, no other body may begin."""
    begun, asked = threading.Event(), threading.Event()

    @conductor.task(queue="q")
    def block(ctx: Context) -> None:
        begun.set()
        while not ctx.is_cancelled:
            threading.Event().wait(0.005)
        asked.set()
        ctx.check_cancelled()

    async with conductor, trio.open_nursery() as nursery:
        handle = await block.invoke()
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[block])])
        await nursery.start(orchestrator.run)
        await until(begun.is_set)
        cancel(query, handle.id)
        await until(lambda: query(STATES) == [("cancelled", 1, 0)])
        orchestrator.stop()
    assert asked.is_set()


async def test_notifications_forged_on_the_control_channel_change_nothing(conductor: Conductor, query: Any) -> None:
    """Any role may notify any channel: a notification says no more than "read"."""
    begun, release = trio.Event(), trio.Event()

    @conductor.task(queue="q")
    async def work() -> str:
        begun.set()
        await release.wait()
        return "done"

    async with conductor, trio.open_nursery() as nursery:
        handle = await work.invoke()
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[work])])
        await nursery.start(orchestrator.run)
        await begun.wait()
        await attending(orchestrator)
        owner = orchestrator.statistics().owner
        for payload in ("", "stop", str(handle.id), "x" * 7000):
            query("select pg_notify(pgconductor._private_control_channel(%s), %s)", owner, payload)
        release.set()
        assert await handle.result(timeout=LIMIT) == "done"
        assert orchestrator.statistics().owner == owner
        orchestrator.stop()


async def test_older_program_makes_way_for_a_breaking_migration(conductor: Conductor, query: Any) -> None:
    """It stops as `stop` does, so that nothing is lost, and says why it ended."""
    begun, release = trio.Event(), trio.Event()

    @conductor.task(queue="q")
    async def work() -> str:
        begun.set()
        await release.wait()
        return "done"

    errors: list[BaseException] = []

    async def run(orchestrator: Orchestrator, task_status: Any) -> None:
        try:
            await orchestrator.run(task_status=task_status)
        except* SchemaTooNew as group:
            errors.extend(group.exceptions)

    async def begin(orchestrator: Orchestrator, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        await run(orchestrator, task_status)

    async with conductor, trio.open_nursery() as nursery:
        handle = await work.invoke()
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[work])], lease=60.0)
        await nursery.start(begin, orchestrator)
        await begun.wait()
        await attending(orchestrator)
        owner = orchestrator.statistics().owner
        query("update pgconductor._private_orchestrators set stop_requested_at = now()")
        query("select pg_notify(pgconductor._private_control_channel(%s), '')", owner)
        (pipeline,) = orchestrator._pipelines
        await until(lambda: pipeline._is_stopping)
        assert query(STATES) == [("running", 1, 0)]
        release.set()
        assert await handle.result(timeout=LIMIT) == "done"
    assert [str(error) for error in errors] == [
        "a newer program migrates the schema, and asked this one to stop: upgrade this program"
    ]
    assert query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


# The session lock


async def test_session_lock_is_held_again_after_the_connection_was_lost(conductor: Conductor, query: Any) -> None:
    """Otherwise one lost LISTEN connection would let others take over at every hiccup thereafter."""

    @conductor.task(queue="q")
    async def work() -> None: ...

    held = (
        "select a.pid from pg_locks l join pg_stat_activity a using (pid) where l.locktype = 'advisory'"
        " and a.datname = current_database() and l.mode = 'ExclusiveLock' and a.application_name = 'pgconductor listen'"
        " and ((l.classid::bigint << 32) | l.objid::bigint) = pgconductor._private_key_o(%s)"
    )
    async with conductor, trio.open_nursery() as nursery:
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[work])], lease=10.0)
        await nursery.start(orchestrator.run)
        owner = orchestrator.statistics().owner
        (pipeline,) = orchestrator._pipelines
        lease = pipeline._lease
        await until(lambda: len(query(held, owner)) == 1 and lease._is_session_safe)
        ((pid,),) = query(held, owner)
        query("select pg_terminate_backend(%s)", pid)
        await until(lambda: query(held, owner) not in ([], [(pid,)]) and lease._is_session_safe)
        assert orchestrator.statistics().owner == owner
        assert query("select has_session from pgconductor._private_orchestrators") == [(True,)]
        orchestrator.stop()


async def test_trust_is_short_from_the_loss_of_the_session_until_it_is_held_again(
    conductor: Conductor, query: Any, pgconductor_dsn: str
) -> None:
    """Whoever holds the lock meanwhile, as a former session does that the server has not missed yet."""

    @conductor.task(queue="q")
    async def work() -> None: ...

    async with conductor, trio.open_nursery() as nursery:
        orchestrator = Orchestrator(conductor, workers=[conductor.create_worker(queue="q", tasks=[work])], lease=10.0)
        await nursery.start(orchestrator.run)
        owner = orchestrator.statistics().owner
        (pipeline,) = orchestrator._pipelines
        lease = pipeline._lease
        await until(lambda: lease._is_session_safe)
        other = psycopg.connect(pgconductor_dsn, autocommit=True)
        try:
            waiting = sql.SQL("select pg_advisory_lock(pgconductor._private_key_o({}))").format(owner)
            other.pgconn.send_query(waiting.as_bytes(other))
            query(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
                " and application_name = 'pgconductor listen'"
            )
            await until(lambda: not lease._is_session_safe)
            await until(lambda: pipeline.reactor.can_be_woken)
            assert not lease._is_session_safe
        finally:
            other.close()
        # The lock is free again: the next try has it.
        await until(lambda: lease._is_session_safe)
        assert orchestrator.statistics().owner == owner
        orchestrator.stop()


async def test_open_cancellation_of_one_execution_keeps_no_other_result_waiting(
    conductor: Conductor, pgconductor_dsn: str, query: Any
) -> None:
    """A producer's transaction that has asked for a cancellation locks that row for as long as it is open.

    Its worker's flush waits for it in vain; what else has ended must be written meanwhile, and is not to be sent again
    and again behind that one.
    """
    gate = trio.Event()

    @conductor.task(queue="q")
    async def hold(n: int) -> None:
        await gate.wait()

    async with conductor, trio.open_nursery() as nursery:
        worker = conductor.create_worker(queue="q", tasks=[hold], concurrency=20)
        orchestrator = Orchestrator(conductor, workers=[worker])
        await nursery.start(orchestrator.run)
        handles = await hold.invoke_many([hold.bind(n=n) for n in range(20)])
        await until(lambda: orchestrator.statistics().workers[0].running == 20)
        with psycopg.connect(pgconductor_dsn) as producer:
            producer.execute("select pgconductor.cancel(%s::uuid[])", [[handles[7].id]])
            gate.set()
            await until(lambda: query("select count(*) from pgconductor._private_finished") == [(19,)])
            producer.rollback()
        await handles[7].result(timeout=LIMIT)
        orchestrator.stop()
