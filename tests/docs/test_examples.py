"""The programs in examples/ run, from a copy of their folder, against a fresh database."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from cli.programs import SOURCE, environment
from docs.pages import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the examples."""
    return Path(shutil.copytree(ROOT / "examples", tmp_path / "examples"))


def _start(folder: Path, dsn: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment(PGCONDUCTOR_DSN=dsn), "PYTHONPATH": str(SOURCE)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(folder: Path, dsn: str, *arguments: str) -> list[str]:
    with _start(folder, dsn, *arguments) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.splitlines()


@pytest.fixture
def service(folder: Path, pgconductor_dsn: str) -> Iterator[subprocess.Popen[str]]:
    """`service.py`, running; stopped at the end, when it must exit with 0."""
    with _start(folder, pgconductor_dsn, "service.py") as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
            assert process.returncode == 0, err
            assert "greetings sent" in err
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.usefixtures("service")
def test_producers_reach_the_service(folder: Path, pgconductor_dsn: str) -> None:
    """Service, sync producer, transactional producer: three programs that know each other by the database only."""
    assert _run(folder, pgconductor_dsn, "producer_sync.py", "Ada", "Grace") == [
        "Hello, Ada!",
        "Hello, Grace!",
        "cat.png at 640 pixels",
    ]
    assert _run(folder, pgconductor_dsn, "transactional.py") == [
        "rolled back, row and execution: Mallory is not welcome",
        "Hello, Ada!",
    ]
    deadline = time.monotonic() + 30
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        while True:
            rows = conn.execute(
                "select payload ->> 'name', count(*) from pgconductor.executions"
                " where task = 'greet' and state = 'completed' group by 1 order by 1"
            ).fetchall()
            if rows == [("Ada", 3), ("Grace", 1)]:
                break
            assert time.monotonic() < deadline, rows
            time.sleep(0.05)


def test_orchestrator_inside_an_application(folder: Path, pgconductor_dsn: str) -> None:
    """Results in order, a failure as an exception, and an end."""
    *results, failure = _run(folder, pgconductor_dsn, "inside_trio.py")
    assert results == ["0.25", "0.5", "1.0"]
    assert "ZeroDivisionError" in failure
