"""What does producing cost beside raw SQL: single executions and many at once, no worker about?

On one connection, sides in turns: a raw INSERT of the same row into the same table, `invoke` in SQL, and the blocking
client's `invoke`; a raw INSERT … SELECT from unnest of the same rows, `invoke_many` in SQL, and the client's. The raw
ones have the trigger that wakes workers too, random ids, and nothing else: no check of names, payloads and options, no
look for the queue. All is durable, and drained at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from pgconductor import Conductor

from . import harness
from .harness import Bench

_QUEUE = "produced"
_COLUMNS = "(queue_no, id, queue, task, state, priority, run_at, created_at, payload)"
_RAW = (
    f"insert into pgconductor._private_executions {_COLUMNS} values (%s, pgconductor._private_new_id(%s, now()),"
    " 'produced', 'noop', 'ready', 0, now(), now(), %s::jsonb)"
)
_RAW_MANY = (
    f"insert into pgconductor._private_executions {_COLUMNS} select %s, pgconductor._private_new_id(%s, now()),"
    " 'produced', t, 'ready', 0, now(), now(), p from unnest(%s::text[], %s::jsonb[]) as u (t, p)"
)


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.set_defaults(runs=5)
    parser.add_argument("--single", type=int, default=500, help="executions of a series, one by one")
    parser.add_argument("--many", type=int, default=5000, help="executions at once")
    options = parser.parse_args()
    harness.run("produce", options, lambda bench: _measure(bench, options.runs, options.single, options.many))


def _measure(bench: Bench, runs: int, single: int, many: int) -> None:
    with bench.database() as database:
        number = database.register_queue(_QUEUE)
        conductor = Conductor(database.dsn)

        @conductor.task(queue=_QUEUE)
        async def noop(n: int = 0) -> None:
            """Run by the worker process."""

        payloads = ['{"n": 1}'] * many
        tasks = ["noop"] * many
        with psycopg.connect(database.dsn, autocommit=True) as conn, conductor.sync() as client:
            one: dict[str, Callable[[], object]] = {
                "raw INSERT": lambda: conn.execute(_RAW.encode(), (number, number, '{"n": 1}'), prepare=True),
                "invoke in SQL": lambda: conn.execute(
                    b"select pgconductor.invoke('noop', %s::jsonb, 'produced')", ('{"n": 1}',), prepare=True
                ),
                "client.invoke": lambda: client.invoke(noop, n=1),
            }
            all_at_once: dict[str, Callable[[], object]] = {
                "raw INSERT from unnest": lambda: conn.execute(_RAW_MANY.encode(), (number, number, tasks, payloads)),
                "invoke_many in SQL": lambda: conn.execute(
                    b"select count(*) from pgconductor.invoke_many(%s::text[], %s::jsonb[],"
                    b" array_fill('produced'::text, array[%s]))",
                    (tasks, payloads, many),
                ),
                "client.invoke_many": lambda: client.invoke_many(noop, (noop.bind(n=1) for _ in range(many))),
            }
            for label, produce in [*one.items(), *all_at_once.items()]:
                produce()  # plans, catalogues and connections
                bench.say(f"{label}: warmed up")
            for _ in range(runs):
                for label, produce in one.items():
                    bench.note(f"single: {label}", single / _timed(produce, single), "per s")
                for label, produce in all_at_once.items():
                    bench.note(f"{many} at once: {label}", many / _timed(produce, 1), "per s")
        for label in ("invoke in SQL", "client.invoke"):
            bench.ratio(f"single: {label} / raw INSERT", f"single: {label}", "single: raw INSERT")
        for label in ("invoke_many in SQL", "client.invoke_many"):
            raw = f"{many} at once: raw INSERT from unnest"
            bench.ratio(f"at once: {label} / raw", f"{many} at once: {label}", raw)
        harness.drain(database, _QUEUE)
        database.check_exactly_once(3 * (1 + many) + 3 * runs * (single + many))


def _timed(produce: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        produce()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
