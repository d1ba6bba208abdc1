"""Each benchmark, tiny: it finishes, finds nothing lost or done twice, and its figures are readable. No timings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgconductor.testing import DatabaseServer
from pgconductor.testing.server import folder_in_memory

_ROOT = Path(__file__).resolve().parents[2]

_TINY: dict[str, tuple[str, ...]] = {
    "backlog": (
        "--queues",
        "3",
        "--future=200",
        "--finished=300",
        "--ready",
        "200",
        "400",
        "--churn=0.2",
        "--claims=3",
        "--batch=10",
    ),
    "contention": ("--workers", "2", "--queues", "1", "3", "--count=300", "--seconds=0.05", "--concurrency=4"),
    "fanout": ("--children=20", "--concurrency=10"),
    "peers.drain": ("--peers", "pgconductor", "unkept", "bare", "--jobs=300", "--processes", "1", "2"),
    "peers.latency": ("--peers", "pgconductor", "--fast=5", "--slow=2", "--slow-gap=0.1"),
    "peers.steps": ("--peers", "pgconductor", "bare", "--steps", "0", "2", "--executions=300"),
    "herd": ("--workers", "1", "3", "--inserts=3", "--gap=0.1"),
    "latency": ("--fast=5", "--slow=1", "--slow-gap=0.1", "--raw=5", "--idle=0.1", "--loads=50", "--seconds=0.2"),
    "notify_tax": (
        "--producers=2",
        "--beside=2",
        "--listeners=2",
        "--workers",
        "2",
        "--seconds=0.05",
        "--pause=0.01",
    ),
    "produce": ("--single=5", "--many=20"),
    "rescue": ("--count=400", "--concurrency=5"),
    "throughput": ("--count=300", "--batch=100", "--profile=1", "--processes", "1", "2", "--batches=50"),
    "unsaturated": ("--workers", "1", "2", "--producers=2", "--seconds=0.1"),
}

_ELSEWHERE = {"failover", "chaos"}  # the code of tests/failover; below
_FOLDERS = {"peers.drain", "peers.latency", "peers.steps"}


def _in_memory() -> dict[str, str]:
    """An environment in which a benchmark's own server is in memory, where that has room: nothing is timed here."""
    folder = folder_in_memory()
    return dict(os.environ) if folder is None else {**os.environ, "TMPDIR": str(folder)}


def _run(name: str, *arguments: str, tmp_path: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--runs=1", f"--json={path}", *arguments]
    finished = subprocess.run(
        command, cwd=_ROOT, env=_in_memory(), capture_output=True, text=True, timeout=100, check=False
    )
    return finished, json.loads(path.read_text()) if path.exists() else {}


def test_every_benchmark_has_a_smoke_test() -> None:
    """A benchmark that nothing runs between releases rots unseen."""
    assert {path.stem for path in (_ROOT / "benchmarks").glob("[a-z]*.py")} - {"harness", "plots", *_ELSEWHERE} == (
        set(_TINY) - _FOLDERS
    )


@pytest.mark.parametrize("name", sorted(_TINY))
def test_benchmark_loses_nothing_and_writes_its_figures(
    name: str, pgconductor_server: DatabaseServer, tmp_path: Path
) -> None:
    """Figures of a benchmark that lost work, or that nobody can read, would be believed."""
    dsn = pgconductor_server.dsn("postgres")
    finished, document = _run(name, f"--dsn={dsn}", *_TINY[name], tmp_path=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "every execution exactly once" in finished.stdout
    assert document["benchmark"] == name
    assert document["problems"] == []
    assert document["settings"]["fsync"] == dict(pgconductor_server.settings())["fsync"]
    assert document["figures"]
    assert all(figure["min"] <= figure["median"] <= figure["max"] for figure in document["figures"].values())


def test_idle_statements_are_counted_from_the_log_of_a_throwaway_server(tmp_path: Path) -> None:
    """Without a count by the server, a worker that polls while idle would pass for one that sleeps."""
    finished, document = _run(
        "latency",
        "--fast=2",
        "--slow=1",
        "--slow-gap=0.1",
        "--raw=2",
        "--idle=6",
        "--seconds=0.1",
        "--loads",
        "--kinds=event-driven",
        tmp_path=tmp_path,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert document["settings"]["fsync"] == document["settings"]["synchronous_commit"] == "on"
    counted = document["facts"]["statements while idle"]
    assert {"heartbeat"} <= counted.keys() <= {"heartbeat", "pg_notify"}


def test_soak_in_small_breaks_nothing(tmp_path: Path) -> None:
    """The soak cannot run any more, or finds what it is there to find."""
    path = tmp_path / "figures.json"
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--executions=400", "--minutes=0.15", "--workers=2", "--seed=5",
         "--poisons=0", f"--json={path}"],
        cwd=_ROOT, env=_in_memory(), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = json.loads(path.read_text())["figures"]
    assert figures["executions acknowledged"] > 350
    assert figures["faults"]
