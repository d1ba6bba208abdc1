"""pgconductor, and the floor below it: a bare SQL loop on the same tables."""

from __future__ import annotations

from collections.abc import Mapping

import psycopg

from pgconductor.version import VERSION

from .._bare import bare_loop
from ..harness import Database, Process
from .peer import Outcome, read_outcome

_OUTCOME = """
    select count(*), count(distinct id), count(*) filter (where state = 'completed'), sum(attempt), {},
        extract(epoch from max(finished_at) - min(claimed_at))
    from pgconductor._private_finished
"""


class _Own:
    """What both share: the executions are those of the task `flow`."""

    settings: dict[str, object]

    def is_installed(self) -> bool:
        return True

    def versions(self) -> Mapping[str, str]:
        return {"pgconductor": VERSION}

    def takes(self, steps: int) -> bool:
        return True

    def prepare(self, database: Database) -> None:
        database.register_queue("flow")

    def enqueue(self, database: Database, count: int, steps: int) -> None:
        database.invoke_many("flow", count, "flow", payload=f"jsonb_build_object('n', n, 'steps', {steps})")

    def is_done(self, database: Database) -> bool:
        return not database.value("select exists (select from pgconductor._private_executions)")


class Pgconductor(_Own):
    name = "pgconductor"

    def __init__(self) -> None:
        self.settings = {"concurrency": 100}

    def start(self, database: Database) -> Process:
        return Process("peers._flow", database.dsn, self.settings["concurrency"])

    def outcome(self, database: Database) -> Outcome:
        return read_outcome(database, _OUTCOME.format("coalesce(sum(jsonb_array_length(steps)), 0)"))


class BareLoop(_Own):
    name = "bare SQL loop"

    def __init__(self) -> None:
        self.settings = {"batch": 1000}

    def start(self, database: Database) -> None:
        """Run the loop, here and now: what it costs is the server's."""
        count = database.value("select count(*) from pgconductor._private_executions")
        steps = database.value("select max((payload->>'steps')::int) from pgconductor._private_executions")
        with psycopg.connect(database.dsn, autocommit=True) as conn:
            bare_loop(conn, database.register_queue("flow"), count, int(str(self.settings["batch"])), steps)

    def outcome(self, database: Database) -> Outcome:
        return read_outcome(database, _OUTCOME.format("(select count(*) from pgconductor._private_steps)"))
