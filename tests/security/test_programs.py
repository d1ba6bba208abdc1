"""Whole programs, each as the role it is meant to run as, which owns nothing and has no rights on any table."""

from __future__ import annotations

import pytest
import trio
from security.site import Site

from pgconductor import Conductor, Context, ExecutionFailed, Orchestrator


def _tasks(conductor: Conductor) -> Orchestrator:
    @conductor.task
    async def double(ctx: Context, number: int) -> int:
        return 2 * number

    @conductor.task(queue="slow", max_attempts=1)
    async def fail(text: str) -> None:
        raise ValueError("no luck with " + text[:10])

    worker = conductor.create_worker(queue="slow", tasks=[fail])
    return Orchestrator(conductor, workers=[worker], tasks=[double], migrate=False, handle_signals=False)


async def test_engine_and_clients_need_no_more_than_their_kinds(site: Site) -> None:
    """A right that is missing shows only when the engine comes to the statement that needs it, in production."""
    orchestrator = _tasks(Conductor(site.dsn_of(site.role("worker"))))
    producer = Conductor(site.dsn_of(site.role("producer")))

    def ask_without_a_loop() -> None:
        with producer.sync() as client:
            assert client.invoke("double", {"number": 3}).result(20) == 6

    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        async with producer:
            await producer.check_schema()
            handle = await producer.invoke("double", {"number": 21})
            assert await handle.result(20) == 42
            large = await producer.invoke("fail", {"text": "x" * 100_000}, queue="slow")
            with pytest.raises(ExecutionFailed, match="no luck"):
                await large.result(20)
            await trio.to_thread.run_sync(ask_without_a_loop)
        orchestrator.stop()
    assert site.admin.value("select count(*) from {s}.executions") == 3


async def test_worker_registers_a_queue_that_its_owner_owns(site: Site) -> None:
    """The partition belongs to the worker's role, which may then read it, and nobody else's claim works on it."""
    worker = Conductor(site.dsn_of(site.role("worker")))

    @worker.task(queue="fresh")
    async def note() -> int:
        return 1

    async with worker:
        await worker.invoke("note", {}, queue="fresh")
        drained = await Orchestrator(worker, workers=[worker.create_worker(queue="fresh", tasks=[note])]).drain()
    assert drained.completed == 1
    owners = site.admin.rows(
        "select distinct relowner::regrole::text from pg_class where relname ~ '^_private_queue_1'"
        " union select distinct proowner::regrole::text from pg_proc where proname ~ '^_private_.*_1$'"
    )
    assert owners == [(site.owner,)]
