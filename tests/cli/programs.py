"""Programs for the command line to run, and how to run it as users do: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
COMMAND = (sys.executable, "-c", "from pgconductor.cli import main; main()")

APP = """
import time

import trio
from pgconductor import Conductor, Context, Orchestrator

conductor = Conductor()


@conductor.task
async def double(number: int) -> int:
    return 2 * number


@conductor.task(max_attempts=1)
async def fail() -> None:
    raise ValueError("no luck today")


@conductor.task(queue="slow")
async def nap(seconds: float) -> float:
    await trio.sleep(seconds)
    return seconds


slow = conductor.create_worker(queue="slow", tasks=[nap], concurrency=20)
orchestrator = Orchestrator(conductor, workers=[slow], tasks=[double, fail])


def make() -> Orchestrator:
    return orchestrator


def broken(argument: int) -> Orchestrator:
    return orchestrator


async def later() -> Orchestrator:
    return orchestrator
"""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: this checkout, no database but one in `extra`, a wide terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "DATABASE_URL"))}
    return {**kept, "PYTHONPATH": str(SOURCE), "PYTHONWARNINGS": "error", "COLUMNS": "200", **extra}


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
