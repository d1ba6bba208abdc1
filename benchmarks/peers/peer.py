"""What is measured side by side: the protocol of a peer, and what the peers that are packages of others share.

A peer is given a fresh database. It prepares it, enqueues, and starts workers: processes that end when their input
does. How many were executed, and in which time, is read from the peer's own tables: from the first execution taken to
the last one finished, so that starting up and noticing the first work cost nobody anything.

Invariant: this module and those of the peers run without the peers. Their code runs in `.venv-peers`, in
`programs`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, urlencode

from psycopg.conninfo import conninfo_to_dict

from ..harness import ROOT, BenchmarkError, Database, Process

PYTHON = ROOT / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a peer's tables say once its work is done; the columns of `Package.outcome_sql`, in this order."""

    finished: int
    distinct: int
    succeeded: int
    starts: int  # attempts and the like: one per execution unless some were repeated
    steps: int
    seconds: float

    def complaint(self, count: int, steps: int) -> str | None:
        """Say what is wrong unless each of `count` executions finished exactly once with all its steps."""
        if self.finished == self.distinct == self.succeeded == self.starts == count and self.steps == count * steps:
            return None
        return f"of {count} executions with {steps} steps each: {self}"


class Peer(Protocol):
    """One side of the comparison."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> dict[str, object]:
        """What its workers are started with; entries may be replaced before the first `prepare`."""
        ...

    def is_installed(self) -> bool: ...

    def versions(self) -> Mapping[str, str]: ...

    def takes(self, steps: int) -> bool:
        """Whether it can run executions with so many steps."""
        ...

    def prepare(self, database: Database) -> None: ...

    def enqueue(self, database: Database, count: int, steps: int) -> None:
        """Make `count` executions with `steps` no-op steps each, while no worker is there."""
        ...

    def start(self, database: Database) -> Process | None:
        """Start a worker; None if all is done when this returns."""
        ...

    def is_done(self, database: Database) -> bool:
        """Whether nothing is unfinished. Cheap: it is asked while measuring."""
        ...

    def outcome(self, database: Database) -> Outcome: ...


@dataclass(frozen=True)
class Package:
    """A peer of others: packages, a program, and two questions to its tables."""

    name: str
    packages: tuple[str, ...]
    program: str
    settings: dict[str, object]
    unfinished_sql: str
    outcome_sql: str

    def is_installed(self) -> bool:
        return PYTHON.exists() and self._ask_versions().returncode == 0

    def versions(self) -> Mapping[str, str]:
        return dict(zip(self.packages, self._ask_versions().stdout.split(), strict=True))

    def _ask_versions(self) -> subprocess.CompletedProcess[str]:
        ask = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        return subprocess.run([PYTHON, "-c", ask, *self.packages], capture_output=True, text=True, check=False)

    def takes(self, steps: int) -> bool:
        return True

    def prepare(self, database: Database) -> None:
        self._run("prepare", database)

    def enqueue(self, database: Database, count: int, steps: int) -> None:
        self._run("enqueue", database, count, steps)

    def start(self, database: Database) -> Process:
        return Process(f"peers.programs.{self.program}", *self._arguments("work", database), python=PYTHON)

    def is_done(self, database: Database) -> bool:
        return not database.value(f"select exists ({self.unfinished_sql})")

    def outcome(self, database: Database) -> Outcome:
        return read_outcome(database, self.outcome_sql)

    def _arguments(self, command: str, database: Database, *more: object) -> list[object]:
        return [command, as_url(database.dsn), json.dumps(self.settings), *more]

    def _run(self, command: str, database: Database, *more: object) -> None:
        arguments = map(str, self._arguments(command, database, *more))
        ran = subprocess.run(
            [PYTHON, "-m", f"benchmarks.peers.programs.{self.program}", *arguments], cwd=ROOT, check=False
        )
        if ran.returncode != 0:
            raise BenchmarkError(f"{self.name}: {command} failed, see above")


def read_outcome(database: Database, query: str) -> Outcome:
    (row,) = database.conn.execute(query.encode()).fetchall()
    finished, distinct, succeeded, starts, steps, seconds = (value or 0 for value in row)
    return Outcome(finished, distinct, succeeded, int(starts), int(steps), float(seconds))


def as_url(dsn: str) -> str:
    """Return a connection string as a URL, the one form that all drivers take."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    user, password, database = (quote(parts.pop(name, ""), safe="") for name in ("user", "password", "dbname"))
    credentials = f"{user}:{password}@" if password else f"{user}@" if user else ""
    return f"postgresql://{credentials}/{database}?{urlencode(parts)}"
