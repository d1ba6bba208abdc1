"""What ails the database, and what to do about it: each check is a query, a judgement and a remedy.

Owns the checks of `pgconductor doctor`. A judgement is a plain function from facts to a `Finding`; `examine` asks for
the facts, one statement after the other, and changes nothing. What the role may not see is UNSEEN, never OK, and the
finding says what to grant. Facts that only the schema's own functions may read come from `_private_doctor()`, which
viewers may call; all others are in PostgreSQL's catalogues.

Blocks the thread; an interrupt ends the statement under way.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from time import time
from typing import Any, Protocol, TypeVar

from ..db.address import Database
from ..db.call import Call
from ..db.migrating import check_gen
from ..db.session import SyncSession
from ..db.sql_files import load_source, validate_schema_name
from ..errors import Incompatible, Refused, SchemaTooNew, Unavailable
from . import inside as schema_inside
from . import objects, server, vacuum
from .finding import Finding, Judged, Verdict, gravest

__all__ = ["Ask", "Finding", "Verdict", "examine", "findings", "worst"]

T = TypeVar("T")


class Ask(Protocol):
    """Executes a call. Raises `Refused` if the role may not."""

    def __call__(self, call: Call[T], /) -> T: ...


def findings(ask: Ask, schema: str) -> list[Finding]:
    """Ask for all facts and judge them; in the order in which they are to be read."""
    first, version = _look_at_schema(ask, schema)
    settings = _once(lambda: ask(server.SERVER))
    locks = _once(lambda: objects.judge_locks(ask(objects.locks(schema))))
    inside = _once(lambda: _look_inside(ask, schema, locks))
    checks: list[tuple[str, Callable[[], Judged]]] = [
        ("server_version", lambda: server.judge_version(settings())),
        ("durability", lambda: server.judge_durability(settings())),
        ("transaction_defaults", lambda: server.judge_defaults(settings())),
        ("connections", lambda: server.judge_connections(ask(server.CONNECTIONS))),
        ("notify_queue", lambda: server.judge_notify_queue(ask(server.NOTIFY_QUEUE))),
        ("replication_slots", lambda: server.judge_slots(ask(server.SLOTS))),
        ("clock", lambda: server.judge_clock(_read_clocks(ask))),
        ("autovacuum", lambda: vacuum.judge_autovacuum(ask(vacuum.autovacuum(schema)), schema)),
        ("oldest_transaction", lambda: vacuum.judge_oldest(ask(vacuum.OLDEST))),
        ("idle_in_transaction", lambda: vacuum.judge_idle(ask(vacuum.IDLE))),
    ]
    if version is not None:
        checks += [
            ("owner", lambda: objects.judge_owner(ask(objects.owner(schema)), schema)),
            ("public_rights", lambda: objects.judge_public(ask(objects.public_rights(schema)), schema)),
            ("indexes", lambda: objects.judge_indexes(ask(objects.invalid_indexes(schema)), schema)),
            ("locks", locks),
            ("partitions", lambda: schema_inside.judge_partitions(inside(), schema)),
            ("expiry", lambda: schema_inside.judge_expiry(inside(), schema)),
            ("dead_orchestrators", lambda: schema_inside.judge_orphans(inside())),
            ("orchestrators", lambda: schema_inside.judge_orchestrators(inside(), version)),
            ("unserved_tasks", lambda: schema_inside.judge_unserved(inside())),
        ]
    return [first, *(_run(name, judge) for name, judge in checks)]


def examine(database: Database, schema: str = "pgconductor") -> list[Finding]:
    """Look at the server and the schema with what the connection's role may see; changes nothing, and blocks.

    A check that the role may not make is UNSEEN. Raises `NoDatabase`; `Unavailable` if the connection breaks;
    `InvalidOption` for a name that no schema can have.
    """
    name = validate_schema_name(schema)
    session = SyncSession(database)

    def ask(call: Call[T], /) -> T:
        return session.ask(call, "examining", is_repeatable=True)

    session.open()
    try:
        return findings(ask, name)
    finally:
        session.close()


def worst(found: Iterable[Finding]) -> Verdict:
    """The gravest verdict of all; UNSEEN is graver than OK."""
    return gravest(finding.verdict for finding in found)


class _Unseen(Exception):
    """What could not be looked at, and what helps."""


def _look_inside(ask: Ask, schema: str, locks: Callable[[], Judged]) -> schema_inside.Inside:
    """It locks each queue's partition, for which there may be no room."""
    try:
        return ask(schema_inside.inside(schema))
    except Unavailable as error:
        verdict, _, remedy = locks()
        if verdict is Verdict.OK:
            raise
        raise _Unseen(str(error), remedy) from error


def _run(name: str, judge: Callable[[], Judged]) -> Finding:
    try:
        return Finding(name, *judge())
    except _Unseen as error:
        return Finding(name, Verdict.UNSEEN, *error.args)
    except Refused as error:
        return Finding(name, Verdict.UNSEEN, str(error), "as the schema's owner: pgconductor grant --viewer ROLE")


def _once(look: Callable[[], T]) -> Callable[[], T]:
    """`look`, asked until it has answered once."""
    kept: list[T] = []

    def again() -> T:
        if not kept:
            kept.append(look())
        return kept[0]

    return again


def _read_clocks(ask: Ask) -> server.Clocks:
    before = time()
    seen = ask(server.CLOCK)
    return server.Clocks(before, seen, time())


def _look_at_schema(ask: Ask, schema: str) -> tuple[Finding, int | None]:
    """The first finding, and the schema's version, None if nothing can be said of its contents."""
    name = "schema"
    try:
        version = _drive(check_gen(schema, load_source()), ask)
    except Refused as error:
        remedy = "as the schema's owner: pgconductor grant --viewer ROLE"
        return Finding(name, Verdict.UNSEEN, str(error), remedy), None
    except Incompatible as error:
        remedy = "upgrade this program" if isinstance(error, SchemaTooNew) else "run pgconductor migrate"
        return Finding(name, Verdict.PROBLEM, str(error), remedy), None
    return Finding(name, *objects.judge_schema(version)), version.version


def _drive(calls: Generator[Call[Any], Any, T], ask: Ask) -> T:
    try:
        call = next(calls)
        while True:
            call = calls.send(ask(call))
    except StopIteration as stop:
        result: T = stop.value
        return result
