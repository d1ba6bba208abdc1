"""The sides of `drain` and `latency`: how each is started, with which settings, and what its tables can be asked.

A side is a program with four commands (`programs/_program.py`): prepare a fresh database, enqueue many no-op jobs in
the product's own way for many, work, and produce single ones. Settings are those of the product's own documentation;
where that knows faster ones for many short jobs, they are a side of their own or, as the comment says, the only one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgconductor.version import VERSION

from ..harness import ROOT, Bench, BenchmarkError, Database, Process
from .absurd import ABSURD
from .dbos import DBOS
from .peer import PYTHON, as_url

OBAN_PYTHON = ROOT / ".venv-peers-oban" / "bin" / "python"
NODE_MODULES = ROOT / "benchmarks" / "peers" / "node" / "node_modules"

Settings = dict[str, Any]


@dataclass
class Side(ABC):
    """One product with one set of settings.

    `gate`: a table that is locked while workers start, so that none takes a job before all are there. `unfinished`,
    `finished`: queries for a job that is not done, and for the number of jobs that ran once and succeeded (None where
    rows are deleted). `wakes`: how an idle worker learns of a job, with the names of settings in braces. `latency`:
    settings that replace others while latency is measured. `share`: of the jobs that the others drain, for sides that
    would take minutes.
    """

    name: str
    packages: tuple[str, ...]
    program: str
    settings: Settings
    gate: str
    unfinished: str
    finished: str | None
    wakes: str
    latency: Settings = field(default_factory=lambda: Settings())
    share: float = 1.0

    @abstractmethod
    def missing(self) -> str | None:
        """Say why it cannot run, or None."""

    @abstractmethod
    def versions(self) -> dict[str, str]: ...

    @abstractmethod
    def command(self, command: str) -> Sequence[Path | str]:
        """Return what runs `command` of its program."""

    def woken_by(self) -> str:
        """Say how an idle worker learns of a job."""
        return self.wakes.format_map(self.settings)

    def prepare(self, database: Database) -> None:
        self._run("prepare", database)

    def enqueue(self, database: Database, count: int) -> None:
        self._run("enqueue", database, count)

    def start(self, database: Database, starts: Path) -> Process:
        """Start a worker, which says ``ready``; it writes `starts` when it ends."""
        return self._process("work", database, starts)

    def produce(self, database: Database) -> Process:
        return self._process("produce", database)

    def is_done(self, database: Database) -> bool:
        return not database.value(f"select exists ({self.unfinished})")

    def _process(self, command: str, database: Database, *more: object) -> Process:
        name = f"{command} of {self.name}"
        return Process(name, *self._arguments(database, *more), command=self.command(command))

    def _run(self, command: str, database: Database, *more: object) -> None:
        arguments = map(str, self._arguments(database, *more))
        if subprocess.run([*self.command(command), *arguments], cwd=ROOT, check=False).returncode != 0:
            raise BenchmarkError(f"{self.name}: {command} failed, see above")

    def _arguments(self, database: Database, *more: object) -> list[object]:
        return [as_url(database.dsn), json.dumps(self.settings), *more]


class PythonSide(Side):
    """From PyPI. Its interpreter is that of the environment that has it."""

    python = PYTHON

    def missing(self) -> str | None:
        if not self.python.exists():
            return f"there is no {self.python.parent.parent.name}: make bench-peers makes it"
        if self._ask_versions().returncode != 0:
            return f"{' and '.join(self.packages)} not installed: make bench-peers installs it"
        return None

    def versions(self) -> dict[str, str]:
        *versions, python = self._ask_versions().stdout.split()
        return {**dict(zip(self.packages, versions, strict=True)), "python": python}

    def command(self, command: str) -> Sequence[Path | str]:
        return [self.python, "-m", f"benchmarks.peers.programs.{self.program}", command]

    def _ask_versions(self) -> subprocess.CompletedProcess[str]:
        ask = (
            "import importlib.metadata as m, platform, sys;"
            " print(*map(m.version, sys.argv[1:]), platform.python_version())"
        )
        return subprocess.run([self.python, "-c", ask, *self.packages], capture_output=True, text=True, check=False)


class OwnEnvironmentSide(PythonSide):
    """Oban: it needs Python 3.12, which the project's own may not be."""

    python = OBAN_PYTHON


class NodeSide(Side):
    """From npm."""

    def missing(self) -> str | None:
        if shutil.which("node") is None:
            return "there is no Node.js: install it (apt-get install nodejs npm)"
        absent = [name for name in self.packages if not self._manifest(name).exists()]
        return f"{' and '.join(absent)} not installed: make bench-peers installs it" if absent else None

    def versions(self) -> dict[str, str]:
        versions = {name: json.loads(self._manifest(name).read_text())["version"] for name in self.packages}
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        return {**versions, "node": node}

    def command(self, command: str) -> Sequence[Path | str]:
        return ["node", NODE_MODULES.parent / f"{self.program}.mjs", command]

    @staticmethod
    def _manifest(name: str) -> Path:
        return NODE_MODULES / name / "package.json"


class OwnSide(Side):
    """pgconductor: jobs by its SQL function for many, single ones by its blocking client."""

    def missing(self) -> str | None:
        return None

    def versions(self) -> dict[str, str]:
        return {"pgconductor": VERSION}

    def prepare(self, database: Database) -> None:
        database.register_queue("noop")

    def enqueue(self, database: Database, count: int) -> None:
        database.invoke_many("noop", count, "noop", payload="jsonb_build_object('n', n)")

    def command(self, command: str) -> Sequence[Path | str]:
        module = {"work": "_noop", "produce": "_invoke"}[command]
        return [sys.executable, "-m", f"benchmarks.peers.{module}"]


_NOTIFIED = "LISTEN/NOTIFY"
_KEPT = "select count(distinct id) from pgconductor._private_finished where state = 'completed' and attempt = 1"


def _own(name: str, settings: Settings, finished: str | None) -> Side:
    return OwnSide(
        name=name,
        packages=("pgconductor",),
        program="",
        settings=settings,
        gate="pgconductor._private_executions",
        unfinished="select from pgconductor._private_executions",
        finished=finished,
        wakes=_NOTIFIED,
    )


def _graphile_worker(name: str, settings: Settings, share: float) -> Side:
    return NodeSide(
        name=name,
        packages=("graphile-worker",),
        program="graphile_worker",
        settings=settings,
        gate="graphile_worker._private_jobs",
        unfinished="select from graphile_worker._private_jobs",
        finished=None,
        wakes=_NOTIFIED,
        share=share,
    )


# Key (for `--sides`) → side. The order is that of measuring.
SIDES: dict[str, Side] = {
    "pgconductor": _own("pgconductor", {"concurrency": 100, "keep_completed": None}, _KEPT),
    "unkept": _own("pgconductor, no rows kept", {"concurrency": 100, "keep_completed": 0}, None),
    "defaults": _own("pgconductor, defaults", {}, _KEPT),
    # Its page on performance, "optimal conditions".
    "graphile-tuned": _graphile_worker(
        "graphile-worker, tuned",
        {
            "concurrentJobs": 24,
            "maxPoolSize": 25,
            "localQueue": {"size": 500},
            "completeJobBatchDelay": 0,
            "failJobBatchDelay": 0,
        },
        share=1.0,
    ),
    # Settings of the same batching that were found faster in a drain here.
    "graphile-best": _graphile_worker(
        "graphile-worker, best found",
        {
            "concurrentJobs": 24,
            "maxPoolSize": 25,
            "localQueue": {"size": 2000},
            "completeJobBatchDelay": 5,
            "failJobBatchDelay": 5,
        },
        share=1.0,
    ),
    # The documented ones without batching, which is off by default.
    "graphile": _graphile_worker("graphile-worker", {"concurrentJobs": 24, "maxPoolSize": 25}, share=0.2),
    # Batches are fetched without a pause while they come back full; a batch is one call of the handler. Its default is
    # one job every 2 s.
    "pg-boss": NodeSide(
        name="pg-boss",
        packages=("pg-boss",),
        program="pg_boss",
        settings={"batchSize": 1000, "burstWhenBatchFull": True, "localConcurrency": 4},
        gate="pgboss.job",
        unfinished="select from pgboss.job where name = 'noop' and state < 'completed'",
        finished="select count(distinct id) from pgboss.job"
        " where name = 'noop' and state = 'completed' and retry_count = 0",
        wakes=_NOTIFIED,
    ),
    # Its guide to performance: greater batches for short jobs, one connection, `pgq autovac`. Its default is 10.
    "pgqueuer": PythonSide(
        name="PgQueuer",
        packages=("pgqueuer", "asyncpg"),
        program="pgqueuer",
        settings={"batch_size": 1000},
        gate="pgqueuer",
        unfinished="select from pgqueuer",
        finished="select count(distinct job_id) from pgqueuer_log where status = 'successful'",
        wakes=_NOTIFIED,
    ),
    "procrastinate": PythonSide(
        name="Procrastinate",
        packages=("procrastinate",),
        program="procrastinate",
        settings={"concurrency": 30},
        gate="procrastinate_jobs",
        unfinished="select from procrastinate_jobs where status in ('todo', 'doing')",
        finished="select count(distinct id) from procrastinate_jobs where status = 'succeeded' and attempts = 1",
        wakes=_NOTIFIED,
        share=0.05,
    ),
    # `max_size` of its pool is its default.
    "oban": OwnEnvironmentSide(
        name="Oban for Python",
        packages=("oban",),
        program="oban",
        settings={"limit": 1000, "max_size": 10},
        gate="oban_jobs",
        unfinished="select from oban_jobs where state in ('available', 'scheduled', 'executing', 'retryable')",
        finished="select count(distinct id) from oban_jobs where state = 'completed' and attempt = 1",
        wakes=_NOTIFIED,
        share=0.2,
    ),
    "dbos": PythonSide(
        name="DBOS",
        packages=("dbos",),
        program="dbos",
        settings={**DBOS.settings, "polling_interval_sec": 0.1},
        latency={"polling_interval_sec": 0.05},  # its default is 1 s
        gate="dbos.workflow_status",
        unfinished=DBOS.unfinished_sql,
        finished="select count(distinct workflow_uuid) from dbos.workflow_status"
        " where status = 'SUCCESS' and recovery_attempts = 1",
        wakes="polls every {polling_interval_sec} s",
        share=0.1,
    ),
    "absurd": PythonSide(
        name="Absurd",
        packages=("absurd-sdk", "absurdctl"),
        program="absurd",
        settings={**ABSURD.settings, "concurrency": 16},
        latency={"poll_interval": 0.02},  # its default is 0.25 s
        gate="absurd.r_default",
        unfinished=ABSURD.unfinished_sql,
        finished="select count(distinct task_id) from absurd.r_default where state = 'completed' and attempt = 1",
        wakes="polls every {poll_interval} s",
        share=0.1,
    ),
}


def choose(bench: Bench, keys: Sequence[str], replaced: Sequence[str], is_latency: bool = False) -> list[Side]:
    """Return the sides that can run, with their settings printed and noted; say which cannot, and why.

    `replaced`: ``KEY.NAME=JSON``. Keys that are no side's are left to the caller.
    """
    chosen = [(key, side) for key, side in SIDES.items() if key in keys]
    for _, side in chosen:
        if is_latency:
            side.settings |= side.latency
    for text in replaced:
        path, _, value = text.partition("=")
        key, _, name = path.partition(".")
        if key not in SIDES:
            raise BenchmarkError(f"--set {text}: there is no side {key}")
        SIDES[key].settings[name] = json.loads(value)
    sides: list[Side] = []
    for _, side in chosen:
        if (reason := side.missing()) is not None:
            bench.say(f"{side.name}: left out, {reason}")
            continue
        sides.append(side)
        bench.facts[side.name] = {**side.versions(), **side.settings, "idle worker": side.woken_by()}
        bench.say(f"{side.name}: {bench.facts[side.name]}")
    return sides
