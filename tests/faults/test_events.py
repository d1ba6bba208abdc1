"""A process is killed while it delivers, sends or begins to wait: nothing is lost, and nothing is sent twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
import trio
from cli.programs import SOURCE
from faults.event_program import make_orchestrator

from pgconductor import PromiseAnswer
from pgconductor.handle import Handle

LIMIT = 40.0
COUNT = 3


@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize(
    "point",
    [
        "effect.before",
        "effect.answered",
        "wait.before",
        "wait.answered",
        "deliver.before",
        "deliver.answered",
        "item.before",
        "item.answered",
    ],
)
async def test_process_that_dies_there_loses_nothing_and_sends_nothing_twice(
    pgconductor_dsn: str, point: str, hit: int
) -> None:
    """An event that a dead process had in its hands, an emit whose reply never came, an item that comes again."""
    orchestrator = make_orchestrator(pgconductor_dsn)
    conductor = orchestrator.conductor
    environment = {**os.environ, "PGCONDUCTOR_FAILPOINTS": f"{point}=kill@{hit}", "PYTHONPATH": str(SOURCE)}
    victim = subprocess.Popen(  # noqa: ASYNC220  # it is killed and waited for below, whatever happens
        [sys.executable, str(Path(__file__).with_name("event_program.py")), pgconductor_dsn],
        env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        async with conductor:
            collecting: Handle[list[int]] = await conductor.invoke("collect", {"count": COUNT})
            relays: list[Handle[list[int]]] = [
                await conductor.invoke("relay", {"n": n, "receiver": str(collecting.id)}) for n in range(COUNT)
            ]
            with trio.fail_after(LIMIT):
                for n in range(COUNT):
                    await conductor.emit("go", {"n": n, "value": 10 * n})
                while victim.poll() is None:
                    await conductor.emit("nobody waits for this")  # something to deliver
                    await trio.sleep(0.05)
            assert victim.returncode == -signal.SIGKILL, victim.stderr and victim.stderr.read()
            async with trio.open_nursery() as nursery:
                await nursery.start(orchestrator.run)
                with trio.fail_after(LIMIT):
                    while len(made := _made(pgconductor_dsn)) < COUNT:
                        await trio.sleep(0.05)
                    for n, promise in made.items():
                        assert await conductor.resolve_promise(promise, n) is PromiseAnswer.RESOLVED
                assert sorted(await collecting.result(LIMIT)) == list(range(COUNT))
                assert [await handle.result(LIMIT) for handle in relays] == [[10 * n, n] for n in range(COUNT)]
                for n, handle in enumerate(relays):
                    assert [item async for item in handle.channel("heard", type=int)] == [10 * n, n]
                nursery.cancel_scope.cancel()
    finally:
        victim.kill()
        victim.communicate()
    with psycopg.connect(pgconductor_dsn) as conn:
        (sent,) = conn.execute("select count(*) from pgconductor._private_events where name = 'made'").fetchall()
        assert sent == (COUNT,)
        # What was received while its deliverer held it is removed by the next delivery.
        conn.execute("select pgconductor.deliver_events()")
        left = conn.execute(
            "select 'promise', p::text from pgconductor._private_promises p"
            " union all select 'wait', w::text from pgconductor._private_waits w"
            " union all select 'event', e::text from pgconductor._private_events e where kind <> 'event'"
        ).fetchall()
        assert left == []


def _made(dsn: str) -> dict[int, UUID]:
    """The promises that were announced, by the numbers of their executions."""
    with psycopg.connect(dsn) as conn:
        rows = conn.execute(
            "select (payload ->> 'n')::int, (payload ->> 'promise')::uuid from pgconductor._private_events"
            " where name = 'made'"
        ).fetchall()
    assert len({n for n, _ in rows}) == len(rows)
    return dict(rows)
