"""What the program of one schema version sends in the life of an execution, as a file that later versions must answer.

At a release: `PYTHONPATH=src:tests python -m migrations.release DSN > tests/migrations/released/NNNN.json`, on an empty
database, NNNN being the newest migration. It goes through a life by the program's own calls and writes down each
statement, its parameters as they are sent, and the columns of the reply.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from uuid import UUID

import psycopg
from psycopg import postgres
from psycopg.adapt import PyFormat, Transformer
from psycopg.rows import tuple_row

from pgconductor.db.arrays import Array
from pgconductor.db.call import Call
from pgconductor.db.calls import Calls, NewExecution, WorkerRow
from pgconductor.db.schema import latest_version, migrate_sync
from pgconductor.model import Outcome

OWNER = UUID("11111111-1111-4111-8111-111111111111")
NOBODY = UUID("22222222-2222-8000-8000-222222222222")  # of the overflow partition
SCHEMA = "pgconductor"


class Recorder:
    """Executes calls and writes them down. A value that only a reply tells stands as {invoked_0}, {invoked_1}, …"""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self._conn = conn
        self.entries: list[dict[str, Any]] = []
        self._learned: dict[str, str] = {}

    def do(self, verb: str, call: Call[Any]) -> Any:
        dumped = Transformer(self._conn)
        params = [list(param.values) if isinstance(param, Array) else param for param in call.params]
        values = dumped.dump_sequence(params, [PyFormat.TEXT] * len(params))
        statement = call.query.decode()
        for number in range(1, len(values) + 1):
            statement = statement.replace("%s", f"${number}", 1)
        cursor = psycopg.Cursor(self._conn, row_factory=tuple_row)
        cursor.execute(call.query, params)
        rows = cursor.fetchall() if cursor.description else []
        self.entries.append(
            {
                "verb": verb,
                "statement": statement.replace(f'"{SCHEMA}"', "{schema}").replace("%%", "%"),
                "types": [type_name(oid) for oid in dumped.types or ()],
                "values": [None if value is None else self._named(bytes(value).decode()) for value in values],
                "columns": [[c.name, type_name(c.type_code)] for c in cursor.description or ()],
                "rows": len(rows),
            }
        )
        if verb == "invoke_many":
            self._learned.update({row[0].hex: f"{{invoked_{n}}}" for n, row in enumerate(rows)})
        return call.decode(rows)

    def _named(self, value: str) -> str:
        for text, name in self._learned.items():
            value = value.replace(text, name)
        return value


def type_name(oid: int) -> str:
    """Of a type that the driver knows; "unknown" is for the server to find out."""
    if oid == 0:
        return "unknown"
    for info in postgres.types:
        if oid == info.oid:
            return info.name
        if oid == info.array_oid:
            return f"{info.name}[]"
    return "other"  # of this schema: the driver reads its text


def record(conn: psycopg.Connection[Any]) -> dict[str, Any]:
    """Go through a life on an empty database."""
    migrate_sync(conn, SCHEMA)
    calls = Calls(SCHEMA)
    recorder = Recorder(conn)
    do = recorder.do
    no = do("register_queue", calls.register_queue("q"))
    do("register_tasks", calls.register_tasks(["greet"], "q"))
    do(
        "register_orchestrator",
        calls.register_orchestrator(OWNER, "host:1", 30.0, "0", latest_version(), [WorkerRow("q", ["greet"], 3)]),
    )
    invoked = do(
        "invoke_many",
        calls.invoke_many(
            [
                NewExecution("greet", '{"n": 1}', "q", 1),
                NewExecution("greet", '{"n": 2}', None, dedupe_key="k"),
                NewExecution("greet", json.dumps({"n": list(range(2000))}), "q"),
                NewExecution("greet", "{}", "q", delay=600.0),
            ]
        ),
    )
    ids = [each.id for each in invoked]
    do("raise_sleep_flag", calls.raise_sleep_flag("q", raise_it=True))
    do("lower_sleep_flag", calls.lower_sleep_flag("q"))
    do("claim", calls.claim("q", OWNER, ["greet"], 1))
    do("claim of the partition", calls.claim("q", OWNER, ["greet"], 100, no))
    do("empty claim", calls.claim("q", OWNER, ["greet"], 100, no))
    do("load_payload", calls.load_payload(ids[2], 1, OWNER))
    do("heartbeat", calls.heartbeat(OWNER, 30.0, ["q"]))
    do(
        "flush",
        calls.flush(
            OWNER,
            [
                Outcome(ids[0], 1, "completed", "1", None, 0.0, 60.0),
                Outcome(ids[1], 1, "failed", None, '{"type": "E", "message": "m"}', 0.0, 60.0),
                Outcome(NOBODY, 1, "completed", None, None, 0.0, None),
            ],
        ),
    )
    do("flush sent twice", calls.flush(OWNER, [Outcome(ids[0], 1, "completed", "1", None, 0.0, 60.0)]))
    do("results", calls.results(ids))
    do("standing", calls.standing(ids))
    do("queue_status", calls.queue_status())
    do("orchestrator_status", calls.orchestrator_status())
    do("drain_wait", calls.drain_wait({"q": ["greet"]}, 10.0))
    do("channel", calls.channel("q"))
    do("probe", calls.probe("somewhere"))
    do("results_channel", calls.results_channel())
    do("await_results", calls.await_results([-1, 7]))
    do("leave_results", calls.leave_results([-1, 7]))
    do("release_unknown", calls.release_unknown(OWNER, "q", []))
    do("retire_orchestrator", calls.retire_orchestrator(OWNER))
    return {"schema_version": latest_version(), "queue_no": no, "life": recorder.entries}


if __name__ == "__main__":
    with psycopg.connect(sys.argv[1], autocommit=True) as conn:
        recorded = record(conn)
    lines = ",\n".join(json.dumps(entry) for entry in recorded.pop("life"))
    print(json.dumps(recorded)[:-1] + f', "life": [\n{lines}\n]}}')
