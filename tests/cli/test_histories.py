"""`pgconductor show`, `executions`, `fork`, `restart` and `replay-check`."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import trio
from cli.inside import run

from pgconductor import Conductor, Context, Orchestrator, State
from pgconductor.cli import exits


def _greeting() -> str:
    return "hello\x1b[31m"


def _waiting(dsn: str) -> str:
    """An execution with a step, that sleeps for a day."""
    conductor = Conductor(dsn)

    @conductor.task
    async def greet(ctx: Context) -> None:
        await ctx.step("say [bold]", _greeting)
        await ctx.sleep("a day", 86400)

    async def main() -> str:
        orchestrator = Orchestrator(conductor, tasks=[greet], migrate=False)
        async with conductor, trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            handle = await greet.options(tags=["a", "b"]).invoke()
            with trio.fail_after(20):
                while (status := await handle.status()) is None or status.state is not State.WAITING:
                    await trio.sleep(0.01)
            orchestrator.stop()
        return str(handle.id)

    return trio.run(main)


def test_show_tells_where_it_stands_and_its_steps(pgconductor_dsn: str) -> None:
    """What it waits for is not told, or a recorded text reaches the terminal as it is."""
    execution = _waiting(pgconductor_dsn)
    code, out, err = run("show", execution, "--steps", "--dsn", pgconductor_dsn)
    assert (code, err) == (0, "")
    assert f"execution:   {execution}" in out
    assert "state:       waiting" in out
    assert "tags:        a, b" in out
    assert "waits for:   sleep 'a day', until" in out
    assert "say [bold]" in out
    assert "hello" in out
    assert "\x1b" not in out
    code, out, _ = run("show", execution, "--steps", "--json", "--dsn", pgconductor_dsn)
    answer = json.loads(out)
    assert answer["status"]["state"] == "waiting"
    assert [step["name"] for step in answer["steps"]] == ["say [bold]", "a day"]
    assert answer["steps"][0]["value"] == "hello\x1b[31m"
    code, out, _ = run("show", execution, "--json", "--dsn", pgconductor_dsn)
    assert json.loads(out)["waits_for"][0]["kind"] == "sleep"


def test_show_says_that_there_is_none(pgconductor_dsn: str) -> None:
    """A script goes on as if it had been there."""
    code, out, err = run("show", str(uuid4()), "--dsn", pgconductor_dsn)
    assert (code, out, "or it was not kept" in err) == (1, "", True)


@pytest.mark.parametrize(
    "command",
    [
        ["show"], ["fork", "--from-step", "a day"], ["restart"], ["dead-letters"], ["cancel"], ["retry"],
        ["executions", "--parent"], ["executions", "--root"],
    ],
)  # fmt: skip
def test_what_is_no_id_is_said_before_a_database_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """A typing error is answered by a remark on the database, which has nothing to do with it."""
    for name in ("PGCONDUCTOR_DSN", "DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = run(*command, "pay")
    assert (code, out) == (exits.MISUSED, "")
    assert err == "pgconductor: 'pay' is no execution's id; `pgconductor invoke` prints them\n"


def test_fork_and_restart_print_the_id_of_the_new_one(pgconductor_dsn: str) -> None:
    """A fork does again what was done, or a restart does not; or a script cannot go on with the new execution."""
    execution = _waiting(pgconductor_dsn)
    code, out, err = run("fork", execution, "--from-step", "a day", "--dsn", pgconductor_dsn)
    assert (code, err) == (0, "")
    forked = UUID(out.strip())
    code, out, err = run("restart", execution, "--json", "--dsn", pgconductor_dsn)
    assert (code, err) == (0, "")
    restarted = UUID(json.loads(out)["id"])
    with Conductor(pgconductor_dsn).sync() as client:
        for begun, copied in ((forked, ["say [bold]"]), (restarted, [])):
            assert [step.name for step in client.steps(begun)] == copied
            status = client.status(begun)
            assert status is not None
            assert (str(status.origin_id), status.state) == (execution, State.READY)


def test_fork_and_restart_of_what_is_not_there_name_it(pgconductor_dsn: str) -> None:
    """One does not know whether the id or the step was the wrong one."""
    execution = _waiting(pgconductor_dsn)
    code, out, err = run("fork", execution, "--from-step", "pay", "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.MISUSED, "")
    assert "'pay'" in err
    assert execution in err
    nobody = str(uuid4())
    for command in (["fork", nobody, "--from-step", "a day"], ["restart", nobody]):
        code, out, err = run(*command, "--dsn", pgconductor_dsn)
        assert (code, out) == (exits.FAILED, "")
        assert nobody in err


def test_executions_passes_every_filter(pgconductor_dsn: str) -> None:
    """An option that is parsed and dropped shows what nobody asked for."""
    with Conductor(pgconductor_dsn).sync() as client:
        first = client.invoke("pay", queue="q", tags=["a", "b"], dedupe_key="k")
        client.invoke("mail")
    span = ("--created-after", "2000-01-01T00:00:00Z", "--created-before", "2999-01-01T00:00:00Z")
    filters = ("--queue", "q", "--task", "pay", "--state", "ready", "--tag", "a", "--tag", "b", "--dedupe-key", "k")
    code, out, _ = run("executions", *filters, *span, "--json", "--dsn", pgconductor_dsn)
    assert [each["id"] for each in json.loads(out)] == [str(first.id)]
    assert code == 0
    family = ("--root", str(first.id))
    assert [e["task"] for e in json.loads(run("executions", *family, "--json", "--dsn", pgconductor_dsn)[1])] == ["pay"]
    for wrong in (
        ("--queue", "x"), ("--task", "x"), ("--state", "failed"), ("--tag", "x"), ("--dedupe-key", "x"),
        ("--parent", str(uuid4())), ("--created-after", "2999-01-01T00:00:00Z"),
        ("--created-before", "2000-01-01T00:00:00Z"),
    ):  # fmt: skip
        assert run("executions", *wrong, "--dsn", pgconductor_dsn) == (0, "No executions.\n", "")
    code, out, err = run("executions", "--limit", "1", "--dsn", pgconductor_dsn)
    assert (code, "mail" in out, "pay" in out, "there may be more than these 1" in err) == (0, True, False, True)


PROGRAM = """
from pgconductor import Conductor, Context, Orchestrator

conductor = Conductor()

@conductor.task
async def greet(ctx: Context) -> None:
    await ctx.step({step!r}, str)
    await ctx.sleep("a day", 86400)

orchestrator = Orchestrator(conductor, tasks=[greet])
"""


def test_replay_check_exits_with_1_if_one_could_not_go_on(
    pgconductor_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deploy script goes on, or stops for nothing."""
    execution = _waiting(pgconductor_dsn)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same_app.py").write_text(PROGRAM.format(step="say [bold]"))
    (tmp_path / "other_app.py").write_text(PROGRAM.format(step="tell"))
    for target in ("same_app:conductor", "same_app:orchestrator"):
        code, out, err = run("replay-check", target, "--dsn", pgconductor_dsn)
        assert (code, out, err) == (0, "1 executions tried, 0 of them could not go on.\n", "")
    code, out, err = run("replay-check", "other_app:conductor", "--dsn", pgconductor_dsn)
    assert (code, err) == (1, "")
    assert out.startswith(f"{execution} greet: diverged: ")
    assert "    recorded: step 'say [bold]', sleep 'a day'\n    asked:    step 'tell'\n" in out
    code, out, _ = run("replay-check", "other_app:conductor", "--json", "--dsn", pgconductor_dsn)
    answer = json.loads(out)
    assert (code, answer["checked"], answer["divergences"][0]["id"]) == (1, 1, execution)
    for nothing in (("--queue", "x"), ("--task", "x", "--limit", "5", "--patience", "1")):
        code, out, _ = run("replay-check", "other_app:conductor", *nothing, "--dsn", pgconductor_dsn)
        assert (code, out) == (0, "0 executions tried, 0 of them could not go on.\n")
    for wrong in (("--limit", "0"), ("--patience", "0"), ("--queue", "")):
        code, out, err = run("replay-check", "other_app:conductor", *wrong, "--dsn", pgconductor_dsn)
        assert (code, out, wrong[0].strip("-") in err) == (exits.MISUSED, "", True)
    code, _, err = run("replay-check", "other_app:__name__", "--dsn", pgconductor_dsn)
    assert (code, "its conductors: other_app:conductor, other_app:orchestrator" in err) == (2, True), err
