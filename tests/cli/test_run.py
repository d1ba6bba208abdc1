"""`pgconductor run`: real processes, real signals."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from cli.programs import APP, start
from cli.warm import Command


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A folder with the program `app`."""
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@contextmanager
def _running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kill the process at the end if the test did not end it."""
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _invoke(dsn: str, task: str, payload: str, count: int = 1) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute("select pgconductor.invoke(%s, %s) from generate_series(1, %s)", [task, payload, count])


def _count(dsn: str, *states: str) -> int:
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            "select count(*) from pgconductor.executions where state::text = any (%s)", [list(states)]
        ).fetchone()
    assert row is not None
    return int(row[0])


def _wait_count(dsn: str, count: int, *states: str) -> None:
    """Wait until so many executions are in one of the states."""
    deadline = time.monotonic() + 60
    while _count(dsn, *states) < count:
        assert time.monotonic() < deadline, f"never {count} executions {states}"
        time.sleep(0.02)


def _register(dsn: str) -> None:
    """Let SQL producers know which queue the tasks of `app` are on."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("select pgconductor.register_queue('slow')")
        conn.execute("select pgconductor.register_tasks(array['nap'], 'slow')")


@pytest.mark.parametrize("attribute", ["orchestrator", "make"])
def test_sigterm_under_load_loses_nothing(app: Path, pgconductor_dsn: str, attribute: str) -> None:
    """A deploy: exit status 0, what ran has finished, what did not is ready and has not paid an attempt."""
    _register(pgconductor_dsn)
    _invoke(pgconductor_dsn, "nap", '{"seconds": 0.05}', 2000)
    with _running(start("run", f"app:{attribute}", cwd=app, PGCONDUCTOR_DSN=pgconductor_dsn)) as process:
        _wait_count(pgconductor_dsn, 40, "completed")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "SIGTERM: stopping" in err
    assert err.rstrip().endswith("stopped")
    assert _count(pgconductor_dsn, "running") == 0
    finished, ready = _count(pgconductor_dsn, "completed"), _count(pgconductor_dsn, "ready")
    assert finished + ready == 2000
    assert ready > 0
    with psycopg.connect(pgconductor_dsn) as conn:
        row = conn.execute("select max(attempt), max(crashes) from pgconductor.executions where state = 'ready'")
        assert row.fetchone() == (0, 0)


def test_second_signal_ends_the_grace(app: Path, pgconductor_dsn: str) -> None:
    """Whoever presses Ctrl-C twice does not want to wait 30 seconds; the handler's attempt is given back."""
    _register(pgconductor_dsn)
    _invoke(pgconductor_dsn, "nap", '{"seconds": 3600}')
    with _running(start("run", "app:orchestrator", cwd=app, PGCONDUCTOR_DSN=pgconductor_dsn)) as process:
        _wait_count(pgconductor_dsn, 1, "running")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("SIGINT: stopping" in line for line in iter(process.stderr.readline, ""))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)  # shorter than the grace
    assert process.returncode == 0, err
    assert "SIGINT again" in err
    with psycopg.connect(pgconductor_dsn) as conn:
        row = conn.execute("select state::text, attempt from pgconductor.executions where task = 'nap'").fetchone()
    assert row == ("ready", 0)


def test_command_line_wins_over_the_program(pgconductor: Command, app: Path, pgconductor_empty_dsn: str) -> None:
    """--dsn and --schema name where to run; the schema is installed there first."""
    arguments = ("run", "app:orchestrator", "--dsn", pgconductor_empty_dsn, "--schema", "elsewhere")
    with _running(start(*arguments, cwd=app, DATABASE_URL="host=127.0.0.1 port=1")) as process:
        done = pgconductor(
            "migrate", "--dsn", pgconductor_empty_dsn, "--schema", "elsewhere"
        )  # whoever comes second waits for the other
        assert done.returncode == 0
        done = pgconductor(
            *("invoke", "double", '{"number": 4}', "--wait-timeout", "60"),
            *("--dsn", pgconductor_empty_dsn, "--schema", "elsewhere"),
        )
        assert done.stdout == "8\n", done.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with psycopg.connect(pgconductor_empty_dsn) as conn:
        assert conn.execute("select to_regnamespace('pgconductor')").fetchone() == (None,)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("app", "write module:attribute"),
        (":x", "write module:attribute"),
        ("app.py:orchestrator", "write module:attribute"),
        ("nowhere:orchestrator", "no module 'nowhere' in the current folder"),
        ("app.part:orchestrator", "no module 'app.part' in the current folder"),
        ("app:missing", "its orchestrators: app:orchestrator"),
        ("app:conductor", "its orchestrators: app:orchestrator"),
        ("app:broken", "needs arguments"),
        ("app:later", "async function"),
        ("json:loads", "needs arguments"),
        ("json:__name__", "no Orchestrator at its top level"),
        ("raises:orchestrator", "ZeroDivisionError"),
        ("needs:orchestrator", "needs the module 'absent_dependency'"),
    ],
)
def test_program_that_cannot_be_run_is_one_line(pgconductor: Command, app: Path, target: str, said: str) -> None:
    """A typing error in a unit file must not cost a search through a traceback."""
    (app / "raises.py").write_text("1 / 0\n")
    (app / "needs.py").write_text("import absent_dependency\n")
    done = pgconductor("run", target, cwd=app, env={"PGCONDUCTOR_DSN": "host=127.0.0.1 port=1"})
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_where_the_program_failed(pgconductor: Command, app: Path) -> None:
    """One line does not help whoever wrote the module."""
    (app / "raises.py").write_text("1 / 0\n")
    done = pgconductor("run", "raises:orchestrator", "--debug", cwd=app)
    assert done.returncode == 1
    assert "raises.py" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_no_database_ends_run_with_one_line(pgconductor: Command, app: Path) -> None:
    """Before the start an outage is an error, for the supervisor to see; not a retry without end."""
    done = pgconductor("run", "app:orchestrator", "--log-level", "error", "--dsn", "host=127.0.0.1 port=1", cwd=app)
    assert (done.returncode, done.stdout) == (3, "")
    assert "127.0.0.1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


BROKEN = """
from pgconductor import Conductor, NoDatabase, Orchestrator, SchemaTooNew, Unavailable

conductor = Conductor()


@conductor.task
async def double(number: int) -> int:
    return 2 * number


class Ended(Orchestrator):
    error = None
    starts = True

    async def run(self, *, task_status):
        if self.starts:
            task_status.started()
        raise self.error


def ended(error, starts=True):
    orchestrator = Ended(conductor, tasks=[double])
    orchestrator.error, orchestrator.starts = error, starts
    return orchestrator


unwritten = ended(Unavailable("3 outcomes"))
grouped = ended(ExceptionGroup("x", [ExceptionGroup("y", [NoDatabase("gone")])]))
superseded = ended(SchemaTooNew("upgrade"))
away = ended(NoDatabase("none"), starts=False)
too_old = ended(SchemaTooNew("upgrade"), starts=False)
"""


@pytest.mark.parametrize(
    ("attribute", "status"),
    [("unwritten", 5), ("grouped", 5), ("superseded", 6), ("away", 3), ("too_old", 4)],
)
def test_end_of_a_run_is_told_by_its_status(pgconductor: Command, tmp_path: Path, attribute: str, status: int) -> None:
    """A supervisor that restarts an old program for ever, or takes lost outcomes for a database that never was."""
    (tmp_path / "app.py").write_text(BROKEN)
    done = pgconductor("run", f"app:{attribute}", "--log-level", "error", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1
