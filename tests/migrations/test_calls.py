"""The runner's decisions and its conversation, without a server: the test sends the replies."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
from migrations.small import FUNCTIONS, V1, V2, V3, V3_BREAKING

from pgconductor.db.call import Call
from pgconductor.db.schema import AppliedMigration, Installed, SqlSource, Step, check_gen, migrate_gen, next_step
from pgconductor.errors import Incompatible, SchemaMissing, SchemaTooNew, Unavailable


def installed(source: SqlSource, *, functions_version: int | None = None) -> Installed:
    applied = tuple(AppliedMigration(each.number, each.name, each.is_breaking) for each in source.migrations)
    version = source.version if functions_version is None else functions_version
    return Installed(applied, source.functions_hash, version)


@pytest.mark.parametrize(
    ("have", "want", "step"),
    [
        pytest.param(Installed(), V1, Step(V1.migrations[0], True), id="empty: first is last, functions with it"),
        pytest.param(Installed(), V2, Step(V2.migrations[0], False), id="empty: one at a time"),
        pytest.param(installed(V1), V3, Step(V3.migrations[1], False), id="older"),
        pytest.param(installed(V2), V3, Step(V3.migrations[2], True), id="older by one"),
        pytest.param(installed(V2), V2, None, id="same"),
        pytest.param(installed(V2), SqlSource(V2.migrations, FUNCTIONS[:1]), Step(None, True), id="other functions"),
        pytest.param(installed(V2, functions_version=1), V2, Step(None, True), id="killed before the functions"),
        pytest.param(installed(V3), V2, None, id="newer, harmless"),
        pytest.param(installed(V3), SqlSource(V2.migrations, FUNCTIONS[:1]), None, id="newer, other functions"),
    ],
)
def test_next_step(have: Installed, want: SqlSource, step: Step | None) -> None:
    """Or a migration is skipped or repeated, or an old program undoes a new one."""
    assert next_step("s", have, want) == step


def test_newer_and_breaking_is_refused() -> None:
    """Or an old program goes on."""
    with pytest.raises(SchemaTooNew):
        next_step("s", installed(V3_BREAKING), V2)


def server(**facts: object) -> Any:
    """A reply to the first call, decoded from a row as the server would send it."""
    call = next(migrate_gen("s", V1, 1.0, 1.0))
    row = {
        "number": 180004,
        "text": "18.4",
        "standby": False,
        "role": "me",
        "database": "db",
        "schema": False,
        "tables": False,
    }
    return call.decode([tuple((row | facts).values())])


@pytest.mark.parametrize("number", [90600, 140012, 149999])
def test_old_server_is_refused_by_its_version(number: int) -> None:
    """Or the first statement that PostgreSQL 14 does not know fails, with a syntax error."""
    for steps in (migrate_gen("s", V1, 1.0, 1.0), check_gen("s", V1)):
        next(steps)
        with pytest.raises(Incompatible, match=r"PostgreSQL 14\.12.*needs 15 or newer"):
            steps.send(server(number=number, text="14.12"))


def test_standby_is_unavailable_and_names_the_remedy() -> None:
    """Or a start that reached a replica ends in 'cannot execute CREATE SCHEMA'."""
    steps = migrate_gen("s", V1, 1.0, 1.0)
    next(steps)
    with pytest.raises(Unavailable, match=r"hot standby.*primary.*target_session_attrs=read-write"):
        steps.send(server(standby=True))


def test_standby_that_is_up_to_date_passes() -> None:
    """Or readers of a replica cannot start."""
    steps = migrate_gen("s", V1, 1.0, 1.0)
    next(steps)
    steps.send(server(standby=True, tables=True, schema=True))
    with pytest.raises(StopIteration):
        steps.send(installed(V1))


def test_functions_that_never_came_count_as_missing() -> None:
    """Or a worker starts between an index build and the functions that belong to it."""
    steps = check_gen("s", V2)
    next(steps)
    steps.send(server(tables=True, schema=True))
    with pytest.raises(SchemaMissing, match="functions of migration 2"):
        steps.send(installed(V2, functions_version=1))


def test_transaction_timeout_is_set_only_where_it_exists() -> None:
    """Or PostgreSQL 15 and 16 refuse every migration, or 17 ends a long one."""
    for number, known in ((169999, False), (170000, True)):
        steps = migrate_gen("s", V1, 1.0, 1.0)
        next(steps)
        begin: Call[Any] = steps.send(server(number=number))
        assert (b" transaction_timeout = 0" in begin.query) is known


def test_connection_lost_at_the_first_call_is_unavailable() -> None:
    """Or a retry loop does not know that it may try again."""
    for steps in (migrate_gen("s", V1, 1.0, 1.0), check_gen("s", V1)):
        next(steps)
        with pytest.raises(Unavailable) as caught:
            steps.throw(psycopg.OperationalError("gone"))
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
