"""emit, send and promise from a shell."""

from __future__ import annotations

import json
from uuid import UUID, uuid4

import pytest
import trio
from cli.inside import run

from pgconductor import Conductor, Context, Orchestrator, PromiseRejected
from pgconductor.cli import exits


def _all_waiting(dsn: str) -> tuple[Conductor, list[UUID], UUID]:
    """A conductor whose executions wait for an event, a message and a promise; and the promise."""
    conductor = Conductor(dsn)
    given: list[UUID] = []

    @conductor.task
    async def event(ctx: Context) -> object:
        return await ctx.wait_for_event("paid", match={"order": 17})

    @conductor.task
    async def message(ctx: Context) -> object:
        return await ctx.receive("m", "channel")

    @conductor.task
    async def promise(ctx: Context) -> object:
        made = await ctx.promise("p")
        await ctx.step("give", given.append, made.id)
        try:
            return await made.result()
        except PromiseRejected as error:
            return error.error["message"]

    async def main() -> list[UUID]:
        async with conductor:
            handles = [await task.invoke() for task in (event, message, promise)]
            await _drain(conductor)
            return [handle.id for handle in handles]

    return conductor, trio.run(main), given[0]


async def _drain(conductor: Conductor) -> None:
    await Orchestrator(conductor, tasks=list(conductor.registry)).drain()


def _results(conductor: Conductor, ids: list[UUID]) -> list[object]:
    trio.run(_drain, conductor)
    with conductor.sync() as client:
        return [client.wait_result(id, task, 0) for id, task in zip(ids, conductor.registry, strict=True)]


def test_what_executions_wait_for_comes_from_a_shell(pgconductor_dsn: str) -> None:
    """A human cannot approve anything without writing a program."""
    conductor, ids, promise = _all_waiting(pgconductor_dsn)
    code, out, err = run("emit", "paid", '{"order": 17, "sum": 2}', "--retention", "60", "--dsn", pgconductor_dsn)
    assert (code, err) == (0, "")
    assert int(out) > 0
    code, out, err = run("send", str(ids[1]), "channel", "-", "--json", "--dsn", pgconductor_dsn, stdin="[1]")
    assert (code, json.loads(out), err) == (0, {"sent": True}, "")
    assert run("promise", "resolve", str(promise), '"yes"', "--dsn", pgconductor_dsn) == (0, "resolved\n", "")
    assert _results(conductor, ids) == [{"order": 17, "sum": 2}, [1], "yes"]


def test_promise_is_rejected_once(pgconductor_dsn: str) -> None:
    """A script believes that its answer counts."""
    conductor, ids, promise = _all_waiting(pgconductor_dsn)
    assert run("promise", "reject", str(promise), "too dear", "--dsn", pgconductor_dsn)[:2] == (0, "resolved\n")
    code, out, err = run("promise", "resolve", str(promise), "--json", "--dsn", pgconductor_dsn)
    assert (code, json.loads(out)["answer"]) == (exits.FAILED, "already")
    assert "before" in err
    code, out, err = run("promise", "reject", str(uuid4()), "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.FAILED, "unknown\n")
    assert "no promise" in err
    run("emit", "paid", '{"order": 17}', "--dsn", pgconductor_dsn)
    run("send", str(ids[1]), "channel", "--dsn", pgconductor_dsn)
    assert _results(conductor, ids) == [{"order": 17}, None, "too dear"]


def test_message_to_nobody_fails(pgconductor_dsn: str) -> None:
    """A message that nobody gets looks like one that was sent."""
    code, out, err = run("send", str(uuid4()), "channel", "1", "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.FAILED, "")
    assert "no live execution" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["emit", "paid", "{"], "not JSON"),
        (["emit", "paid", "NaN"], "NaN is no JSON"),
        (["emit", "", "1"], "must not be empty"),
        (["emit", "paid", "--retention", "-1"], "retention"),
        (["send", "7", "channel"], "'7' is no execution's id"),
        (["promise", "resolve", "7"], "'7' is no promise's id"),
        (["promise", "resolve", str(UUID(int=0)), "yes"], "not JSON"),
        (["promise", "resolve", str(UUID(int=0)), ""], "not JSON"),
        (["promise", "reject", str(UUID(int=0)), ""], "message must not be empty"),
    ],
)
def test_what_is_no_value_is_refused(pgconductor_dsn: str, arguments: list[str], said: str) -> None:
    """A typing error becomes an event."""
    code, out, err = run(*arguments, "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.MISUSED, "")
    assert said in err
