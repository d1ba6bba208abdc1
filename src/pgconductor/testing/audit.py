"""The audit of a test schema: what every execution went through, and whether the invariants hold.

    install_audit_sync(conn, schema)     # once, in a database of a test's own
    ...                                  # workers, faults
    assert check_sync(conn, schema, acknowledged=ids, settled=True) == []

`install_audit` puts in, in the schema, never in a shipped migration: tables ``_test_audit`` and ``_test_records`` with
a row per change of an execution, and of a step or a wait (audit.sql says what their columns mean), triggers that refuse
every transition that the state machine does not have (SQLSTATE PC099, so that the statement fails that tried it), and
the check. `check` is set-based SQL over the audit and the tables: some seconds for 200,000 executions. It reads one
snapshot and locks nothing, so it may run beside traffic.

Always true: an audit row commits with what it tells of, so it survives and is lost with it. What the audit cannot see:
who wrote with a token that is not his own, if the token that the row had is the one that was tested; for that, workers
keep files of their own (benchmarks.chaos).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from ..db.call import Call, Row
from ..db.execute import run, run_sync
from ..db.sql_files import identifier, script, validate_schema_name

# What the server's log must not hold. Refusals of ours and of constraints are errors too, and are none of these.
_LOG_RULES = (
    ("deadlock", re.compile(r"deadlock detected|\b40P01\b")),
    ("panic", re.compile(r"\bPANIC:")),
    ("internal_error", re.compile(r"\bXX\d{3}\b")),
)
_BIG = 50_000  # rows of audit from which on the planner should know how many there are


@dataclass(frozen=True, slots=True)
class Violation:
    """One breach: the invariant's name (``I1`` … ``I14`` and ``L1`` of the specification, or a word), and what is the
    matter.
    """

    rule: str
    execution: UUID | None
    words: str


async def install_audit(conn: psycopg.AsyncConnection[Any], schema: str = "pgconductor") -> None:
    """Install the audit in `schema`, where the tables are. Harmless where it is installed already.

    Waits for transactions that are writing to executions. Executions that are there already have no history: install
    it before the first.
    """
    await run(conn, _install(schema))


def install_audit_sync(conn: psycopg.Connection[Any], schema: str = "pgconductor") -> None:
    """As `install_audit`, on a sync connection."""
    run_sync(conn, _install(schema))


async def check(
    conn: psycopg.AsyncConnection[Any],
    schema: str = "pgconductor",
    *,
    acknowledged: Iterable[UUID] = (),
    acknowledged_keys: Iterable[str] = (),
    owner_bound: float | None = None,
    settled: bool = False,
    limit: int = 100,
) -> list[Violation]:
    """Return every breach of an invariant, at most `limit` of each rule; an empty list is what one wants.

    `acknowledged`: ids that an invoke has returned, `acknowledged_keys`: dedupe keys of which one has returned (I1).
    `owner_bound`: seconds of the database's clock that a running execution may have an owner who is dead, expired or
    unknown: the lease and the sweep, and some room (I14); None: not looked at. `settled`: the faults are over and time
    was given, so nothing that is due may be left (L1). Before a large check, tables are analysed.
    """
    for statement in await run(conn, _prepare(schema)):
        await run(conn, statement)
    return await run(conn, _check(schema, acknowledged, acknowledged_keys, owner_bound, settled, limit))


def check_sync(
    conn: psycopg.Connection[Any],
    schema: str = "pgconductor",
    *,
    acknowledged: Iterable[UUID] = (),
    acknowledged_keys: Iterable[str] = (),
    owner_bound: float | None = None,
    settled: bool = False,
    limit: int = 100,
) -> list[Violation]:
    """As `check`, on a sync connection."""
    for statement in run_sync(conn, _prepare(schema)):
        run_sync(conn, statement)
    return run_sync(conn, _check(schema, acknowledged, acknowledged_keys, owner_bound, settled, limit))


async def leftovers(conn: psycopg.AsyncConnection[Any], *, log: Path | None = None) -> list[Violation]:
    """Return what should not be left when everything has stopped: rules ``idle_in_transaction`` (other sessions of this
    database), ``prepared_transaction``, and from the server's log file `log`, if given, ``deadlock``, ``panic``,
    ``internal_error``. SQLSTATEs are in a log only if ``log_line_prefix`` has ``%e`` or ``log_error_verbosity`` is
    verbose.
    """
    return [*await run(conn, _sessions()), *(_read_log(log) if log else ())]


def leftovers_sync(conn: psycopg.Connection[Any], *, log: Path | None = None) -> list[Violation]:
    """As `leftovers`, on a sync connection."""
    return [*run_sync(conn, _sessions()), *(_read_log(log) if log else ())]


def _install(schema: str) -> Call[None]:
    text = (Path(__file__).parent / "audit.sql").read_text(encoding="utf-8")
    return script(text, validate_schema_name(schema))


def _violations(rows: list[Row]) -> list[Violation]:
    return [Violation(*row) for row in rows]


def _prepare(schema: str) -> Call[list[Call[None]]]:
    name = identifier(schema)
    tables = (
        "_test_audit", "_test_records", "_private_executions", "_private_finished", "_private_payloads",
        "_private_dedupe_keys", "_private_steps", "_private_waits", "_private_receipts",
    )  # fmt: skip
    analyse = script(f"analyze {', '.join(f'{name}.{table}' for table in tables)}", schema)
    return Call(
        f"select count(*) > %s from (select from {name}._test_audit limit %s) x".encode(),
        (_BIG, _BIG + 1),
        lambda rows: [analyse] if rows[0][0] else [],
    )


def _check(
    schema: str,
    acknowledged: Iterable[UUID],
    acknowledged_keys: Iterable[str],
    owner_bound: float | None,
    settled: bool,
    limit: int,
) -> Call[list[Violation]]:
    return Call(
        f"select rule, execution, words from {identifier(schema)}._test_check"
        f"(%s::uuid[], %s::text[], %s::float8, %s, %s)".encode(),
        (list(acknowledged), list(acknowledged_keys), owner_bound, settled, limit),
        _violations,
    )


def _sessions() -> Call[list[Violation]]:
    return Call(
        b"select 'idle_in_transaction', null::uuid, pg_catalog.format('process %%s, %%s, %%s since %%s, last: %%s',"
        b" pid, coalesce(nullif(application_name, ''), 'unnamed'), state, xact_start, pg_catalog.left(query, 200))"
        b" from pg_catalog.pg_stat_activity"
        b" where datname = pg_catalog.current_database() and pid <> pg_catalog.pg_backend_pid()"
        b" and state like 'idle in transaction%%'"
        b" union all"
        b" select 'prepared_transaction', null, pg_catalog.format('%%L since %%s', gid, prepared)"
        b" from pg_catalog.pg_prepared_xacts where database = pg_catalog.current_database()",
        (),
        _violations,
    )


def _read_log(log: Path) -> list[Violation]:
    found: list[Violation] = []
    with log.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            for rule, pattern in _LOG_RULES:
                if pattern.search(line):
                    found.append(Violation(rule, None, f"line {number}: {line.strip()[:400]}"))
    return found
