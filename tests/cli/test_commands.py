"""The commands as users run them: in a process of their own, against a real database.

What is looked at is what a script would: standard output, standard error, exit status.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
import trio
import typer
from cli.inside import run as _run
from cli.warm import Command
from psycopg.rows import dict_row

from pgconductor import Conductor, ExecutionFailed, InvalidOption, NoDatabase, Orchestrator, SchemaMissing
from pgconductor.cli import app, exits, report
from pgconductor.model import QueueStatus

T = TypeVar("T")


def _only_row(dsn: str) -> Mapping[str, Any]:
    with psycopg.connect(dsn) as conn, conn.cursor(row_factory=dict_row) as cursor:
        (row,) = cursor.execute("select * from pgconductor.executions").fetchall()
    return row


async def _drain(dsn: str) -> None:
    """Run a worker that has the tasks `double` and `fail` until nothing is left."""
    conductor = Conductor(dsn)

    @conductor.task
    async def double(number: int) -> int:
        return 2 * number

    @conductor.task(max_attempts=1)
    async def fail() -> None:
        raise ValueError("no luck today")

    await Orchestrator(conductor, tasks=[double, fail]).drain()


# --- migrate ---


def test_migrate_installs_and_says_so_the_second_time(pgconductor: Command, pgconductor_empty_dsn: str) -> None:
    """A deploy script runs it each time: the second must be harmless, and tell that nothing was done."""
    done = pgconductor("migrate", "--dsn", pgconductor_empty_dsn)
    assert (done.returncode, done.stderr) == (0, "")
    assert "'pgconductor'" in done.stdout
    assert "applied, now at version" in done.stdout
    code, out, _ = _run("migrate", "--dsn", pgconductor_empty_dsn)
    assert (code, "up to date at version" in out) == (0, True)


def test_migrate_takes_any_schema_name_and_reports_json(pgconductor_empty_dsn: str) -> None:
    """The schema's name is data: quotes in it must reach neither SQL nor JSON unescaped."""
    code, out, _ = _run("migrate", "--schema", 'my "own" %s', "--json", PGCONDUCTOR_DSN=pgconductor_empty_dsn)
    answer = json.loads(out)
    assert code == 0
    assert answer["schema"] == 'my "own" %s'
    assert answer["applied"] == list(range(1, answer["version"] + 1))
    code, out, _ = _run("status", "--schema", 'my "own" %s', "--dsn", pgconductor_empty_dsn)
    assert (code, out.startswith("No queues yet.")) == (0, True)


# --- invoke ---


def test_invoke_prints_the_id_alone(pgconductor_dsn: str) -> None:
    """Scripts take the id from standard output."""
    code, out, err = _run("invoke", "double", '{"number": 21}', "--dsn", pgconductor_dsn)
    row = _only_row(pgconductor_dsn)
    assert (code, out, err) == (0, f"{row['id']}\n", "")
    assert (row["task"], row["payload"], row["queue"], row["priority"]) == ("double", {"number": 21}, "default", 0)


def test_invoke_passes_every_option(pgconductor_dsn: str) -> None:
    """An option that is parsed and dropped would be found in production."""
    code, out, _ = _run(
        *("invoke", "double", "--queue", "night", "--priority", "-7", "--run-at", "2999-01-31T09:00:00+01:00"),
        *("--dedupe-key", "once", "--timeout", "1.5", "--deadline", "2999-02-01T00:00:00Z", "--max-attempts", "9"),
        *("--tag", "a", "--tag", "b", "--json", "--dsn", pgconductor_dsn),
    )
    row = _only_row(pgconductor_dsn)
    with psycopg.connect(pgconductor_dsn) as conn:
        hidden = "select extract(epoch from timeout)::float, deadline_at::text, max_attempts, tags from {}"
        (options,) = conn.execute(hidden.format("pgconductor._private_executions").encode()).fetchall()
    assert (options[0], options[1][:7], options[2], options[3]) == (1.5, "2999-02", 9, ["a", "b"])
    assert code == 0
    assert json.loads(out) == {"id": str(row["id"]), "created": True}
    assert (row["queue"], row["priority"], row["dedupe_key"], row["payload"]) == ("night", -7, "once", {})
    assert (row["state"], row["run_at"].isoformat()[:4]) == ("scheduled", "2999")
    _, out, _ = _run("invoke", "double", "--queue", "night", "--dedupe-key", "once", "--json", "--dsn", pgconductor_dsn)
    assert json.loads(out) == {"id": str(row["id"]), "created": False}


def test_invoke_delays_and_reads_standard_input(pgconductor_dsn: str) -> None:
    """A payload with quotes is easier piped."""
    code, *_ = _run("invoke", "double", "-", "--delay", "3600", "--dsn", pgconductor_dsn, stdin='{"number": 1}')
    row = _only_row(pgconductor_dsn)
    assert code == 0
    assert (row["state"], row["payload"]) == ("scheduled", {"number": 1})
    assert 3599 < (row["run_at"] - row["created_at"]).total_seconds() < 3601


async def _beside_a_worker(dsn: str, command: Callable[[], T]) -> T:
    """Run the blocking `command`, which invokes something, and a worker that has `double` and `fail`."""

    async def work() -> None:
        conductor = Conductor(dsn)
        async with conductor:
            while not any(queue.ready for queue in await conductor.queue_status()):  # it is the database's
                await trio.sleep(0.02)
        await _drain(dsn)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        return await trio.to_thread.run_sync(command)
    raise AssertionError("unreachable: the block returns or raises")


async def test_invoke_waits_for_the_result(pgconductor: Command, pgconductor_dsn: str) -> None:
    """The result is JSON on standard output, and nothing else."""
    arguments = ("invoke", "double", '{"number": 21}', "--wait", "--wait-timeout", "60", "--dsn", pgconductor_dsn)
    done = await _beside_a_worker(pgconductor_dsn, lambda: pgconductor(*arguments))
    assert (done.returncode, done.stdout, done.stderr) == (0, "42\n", "")


@pytest.mark.parametrize("flags", [[], ["--json"]])
async def test_failed_execution_is_exit_status_1(pgconductor_dsn: str, flags: list[str]) -> None:
    """`pgconductor invoke ... --wait && next` must not go on."""
    arguments = ("invoke", "fail", "--wait", *flags, "--dsn", pgconductor_dsn)
    code, out, err = await _beside_a_worker(pgconductor_dsn, lambda: _run(*arguments))
    assert code == exits.FAILED
    assert err.startswith("pgconductor: ")
    assert "no luck today" in err
    assert len(err.splitlines()) == 1
    assert ("no luck today" in json.loads(out)["error"]) if flags else out == ""


def test_result_that_does_not_come_is_exit_status_3(pgconductor_dsn: str) -> None:
    """Too late is not failed: the execution goes on, and the line says why nothing happens."""
    code, out, err = _run("invoke", "double", "--wait-timeout", "0", "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.UNAVAILABLE, "")
    assert "no live worker" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{"], "not JSON"),
        (["[1]"], "must be a JSON object"),
        (["[" * 100_000], "not JSON"),
        (['{"a": NaN}'], "the number nan"),
        (["{}", "--run-at", "tomorrow"], "2030-01-31T09:00:00+01:00"),
        (["{}", "--run-at", "2030-01-31T09:00:00"], "no time zone; write 2030-01-31T09:00:00Z"),
        (["{}", "--delay", "-1"], "delay"),
        (["{}", "--priority", "99999999999"], "priority"),
        (["{}", "--queue", ""], "queue"),
        (["{}", "--timeout", "0"], "timeout"),
        (["{}", "--deadline", "soon"], "--deadline 'soon' is no instant"),
        (["{}", "--deadline", "-5"], "deadline"),
        (["{}", "--deadline", "nan"], "deadline"),
        (["{}", "--max-attempts", "0"], "max_attempts"),
        (["{}", "--tag", ""], "a tag must not be empty"),
        (["{}", "--schema", ""], "schema"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(pgconductor_dsn: str, arguments: list[str], said: str) -> None:
    """Nothing is inserted, and the line names what was wrong."""
    code, out, err = _run("invoke", "double", *arguments, "--dsn", pgconductor_dsn)
    assert (code, out) == (exits.MISUSED, "")
    assert said in err
    assert len(err.splitlines()) == 1
    with psycopg.connect(pgconductor_dsn) as conn:
        assert conn.execute("select count(*) from pgconductor.executions").fetchone() == (0,)


# --- status ---


def test_status_shows_queues_workers_and_tasks_nobody_has(pgconductor: Command, pgconductor_dsn: str) -> None:
    """The first question of whoever wonders why nothing happens."""
    hostile = "line\nbreak [bold]\x1b[31m"
    for arguments in (["orphan"], ["orphan", "--queue", hostile], ["later", "--delay", "60"]):
        assert _run("invoke", *arguments[:1], "--dsn", pgconductor_dsn, *arguments[1:])[0] == 0
    done = pgconductor("status", env={"DATABASE_URL": pgconductor_dsn})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert r"line\nbreak [bold]\x1b[31m" in done.stdout
    assert "queue 'default': no live worker has task 'later', task 'orphan'" in done.stdout
    assert "No orchestrators." in done.stdout
    done = pgconductor("status", "--json", env={"DATABASE_URL": pgconductor_dsn})
    answer = json.loads(done.stdout)
    assert [queue["queue"] for queue in answer["queues"]] == ["default", hostile]
    assert (answer["queues"][0]["ready"], answer["queues"][0]["scheduled"]) == (1, 1)
    assert answer["queues"][0]["tasks_without_worker"] == ["later", "orphan"]
    assert answer["orchestrators"] == []


async def test_status_shows_who_runs(pgconductor_dsn: str) -> None:
    """Each live orchestrator with the queues it serves."""
    conductor = Conductor(pgconductor_dsn)

    @conductor.task
    async def double(number: int) -> int:
        return 2 * number

    orchestrator = Orchestrator(conductor, tasks=[double])
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        code, out, _ = await trio.to_thread.run_sync(lambda: _run("status", "--dsn", pgconductor_dsn))
        as_json = await trio.to_thread.run_sync(lambda: _run("status", "--json", "--dsn", pgconductor_dsn))
        orchestrator.stop()
    assert code == 0
    assert "alive" in out
    assert "No queues" not in out
    answer = json.loads(as_json[1])
    assert [(each["alive"], each["queues"]) for each in answer["orchestrators"]] == [(True, ["default"])]
    assert answer["queues"][0]["workers"] == 1


def test_tables_hold_any_name() -> None:
    """Names are any text, and a terminal obeys control characters."""
    queue = QueueStatus("q\x1b]0;x\x07", True, 0, 1, 0, 0, 5, 0, 0, 2, 3700.0, ("a\x00",))
    assert report.plain(queue.queue) == r"q\x1b]0;x\x07"
    assert report.missing_workers([queue]) == [r"queue 'q\\x1b]0;x\\x07': no live worker has task 'a\\x00'"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0.0123, "12 ms"), (5.4, "5 s"), (119, "119 s"), (121, "2 min"), (7300, "2 h"), (900_000, "10 d")],
)
def test_age_is_said_in_the_largest_fitting_unit(seconds: float | None, said: str) -> None:
    """A column of raw seconds cannot be read at a glance."""
    assert report.age(seconds) == said


# --- errors ---


def test_no_database_names_the_remedies(pgconductor: Command) -> None:
    """The first thing a newcomer meets."""
    done = pgconductor("status")
    assert (done.returncode, done.stdout) == (exits.UNAVAILABLE, "")
    assert done.stderr.startswith("pgconductor: no database is named: ")
    assert "--dsn" in done.stderr
    assert "PGCONDUCTOR_DSN" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_schema_missing_names_migrate(pgconductor_empty_dsn: str) -> None:
    """The second thing a newcomer meets."""
    for command in (["status"], ["invoke", "double"]):
        code, out, err = _run(*command, "--dsn", pgconductor_empty_dsn)
        assert (code, out) == (exits.INCOMPATIBLE, "")
        assert "pgconductor migrate" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://ada:s3cret@127.0.0.1:1/app",
        "host=127.0.0.1 port=1 password=s3cret",
        "postgresql://ada:s3cret@[/app",
        "postgresql+psycopg://ada:s3cret@127.0.0.1:1/app",
    ],
)
@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_password_is_never_shown(pgconductor: Command, dsn: str, flags: list[str]) -> None:
    """Standard error ends up in logs; with --debug too, where a traceback must not show local variables."""
    done = pgconductor("status", "--dsn", dsn, *flags)
    assert done.returncode == 1 if flags else done.returncode in (exits.MISUSED, exits.UNAVAILABLE)
    assert "s3cret" not in done.stdout + done.stderr
    assert ("Traceback" in done.stderr) == bool(flags)
    assert flags or len(done.stderr.splitlines()) == 1


def test_errors_in_groups_are_said_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    """What leaves `run` late comes in nested groups; none of their errors may be lost, nor one said twice."""
    group = BaseExceptionGroup(
        "x", [SchemaMissing("run it"), ExceptionGroup("y", [NoDatabase("a\nb"), NoDatabase("a\nb")])]
    )
    with pytest.raises(typer.Exit) as raised, exits.reported(debug=False):
        raise group
    assert raised.value.exit_code == exits.INCOMPATIBLE
    assert capsys.readouterr().err == "pgconductor: run it\npgconductor: a b\n"


def test_a_defect_keeps_its_traceback() -> None:
    """A bug that is squeezed into one line cannot be found; what came with it is still said."""
    with pytest.raises(ExceptionGroup) as raised, exits.reported(debug=False):
        raise ExceptionGroup("x", [NoDatabase("gone"), KeyError("bug")])
    assert [type(error) for error in exits.leaves(raised.value)] == [KeyError]


def test_interruption_is_exit_status_130() -> None:
    """Shells take 130 for Ctrl-C; a group from trio.run counts as well."""
    for error in (KeyboardInterrupt(), BaseExceptionGroup("x", [KeyboardInterrupt()])):
        with pytest.raises(typer.Exit) as raised, exits.reported(debug=False):
            raise error
        assert raised.value.exit_code == 130


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ExecutionFailed("x"), 1),
        (InvalidOption("x"), 2),
        (NoDatabase("x"), 3),
        (SchemaMissing("x"), 4),
    ],
)
def test_exit_statuses_are_those_documented(error: Exception, status: int) -> None:
    """Scripts branch on them."""
    with pytest.raises(typer.Exit) as raised, exits.reported(debug=False):
        raise error
    assert raised.value.exit_code == status


def test_each_command_has_help_and_is_documented() -> None:
    """A command or option that the guide does not mention is not found."""
    guide = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
    code, out, _ = _run("--help")
    assert code == 0
    commands = [
        command.name or str(command.callback.__name__) for command in app.registered_commands if command.callback
    ]
    assert {"migrate", "run", "invoke", "cancel", "dead-letters", "retry", "status", "demo"} <= set(commands)
    for command in commands:
        assert command in out
        assert f"## pgconductor {command}" in guide
        assert _run(command, "--help")[0] == 0


def test_version_is_told() -> None:
    """The first line of a bug report."""
    assert _run("--version")[1].startswith("pgconductor 0.")
