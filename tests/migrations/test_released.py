"""What released programs send must go on being answered, with the columns they read; until a breaking migration.

`released/NNNN.json` is the life of an execution as the program of schema version NNNN conducts it (see `release.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from migrations.catalogue import snapshot
from migrations.old_program import source_of, unpack
from migrations.release import SCHEMA, type_name
from migrations.small import connect
from psycopg import postgres, pq

from pgconductor.db.schema import load_source, migrate_sync

Connection = psycopg.Connection[tuple[object, ...]]

RELEASED = sorted((Path(__file__).parent / "released").glob("*.json"))


@pytest.fixture(params=RELEASED, ids=[path.stem for path in RELEASED])
def life(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of each version that no breaking migration has shut out."""
    recorded: dict[str, Any] = json.loads(request.param.read_text())
    newer = load_source().migrations[recorded["schema_version"] :]
    if any(migration.is_breaking for migration in newer):
        pytest.skip("a breaking migration has shut this version out")
    entries: list[dict[str, Any]] = recorded["life"]
    return entries


@pytest.fixture
def conn(pgconductor_dsn: str) -> Iterator[Connection]:
    with connect(pgconductor_dsn) as conn:
        yield conn


def oid_of(name: str) -> int:
    if name == "unknown":
        return 0
    info = postgres.types[name.removesuffix("[]")]
    return info.array_oid if name.endswith("[]") else info.oid


def checked(conn: Connection, result: pq.abc.PGresult, verb: str) -> pq.abc.PGresult:
    if result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        error = psycopg.errors.error_from_result(result, conn.info.encoding)
        error.add_note(f"in the released statement of {verb}")
        raise error
    return result


def prepare(conn: Connection, life: list[dict[str, Any]]) -> None:
    conn.execute("select pgconductor.register_queue('q')")  # the claim of its partition is called by name
    for number, entry in enumerate(life):
        statement = entry["statement"].replace("{schema}", f'"{SCHEMA}"').encode()
        oids = [oid_of(name) for name in entry["types"]]
        checked(conn, conn.pgconn.prepare(b"%d" % number, statement, oids), entry["verb"])


def columns(result: pq.abc.PGresult) -> list[list[str]]:
    return [
        [(result.fname(column) or b"").decode(), type_name(result.ftype(column))] for column in range(result.nfields)
    ]


def live(conn: Connection, life: list[dict[str, Any]]) -> None:
    """Execute what was prepared, in order, with what the replies taught."""
    learned: dict[str, str] = {}
    for number, entry in enumerate(life):
        values: list[bytes | None] = []
        for value in entry["values"]:
            for name, text in learned.items():
                value = value and value.replace(name, text)
            values.append(None if value is None else value.encode())
        result = checked(conn, conn.pgconn.exec_prepared(b"%d" % number, cast("list[bytes]", values)), entry["verb"])
        assert result.ntuples == entry["rows"], entry["verb"]
        assert columns(result) == entry["columns"], entry["verb"]
        if entry["verb"] == "invoke_many":
            ids = [result.get_value(row, 0) or b"" for row in range(result.ntuples)]
            learned = {f"{{invoked_{row}}}": id_.decode() for row, id_ in enumerate(ids)}
    ended = conn.execute("select state::text, count(*) from pgconductor._private_finished group by 1 order by 1")
    assert ended.fetchall() == [("completed", 1), ("failed", 1)]


def test_released_statement_can_be_prepared_and_has_its_columns(conn: Connection, life: list[dict[str, Any]]) -> None:
    """Or an argument or a column that a running worker relies on has gone."""
    prepare(conn, life)
    for number, entry in enumerate(life):
        description = checked(conn, conn.pgconn.describe_prepared(b"%d" % number), entry["verb"])
        assert columns(description) == entry["columns"], entry["verb"]


def test_released_life_is_led_to_its_end(conn: Connection, life: list[dict[str, Any]]) -> None:
    """Or a statement still parses and means something else."""
    prepare(conn, life)
    live(conn, life)


def test_statements_prepared_before_the_migration_work_after_it(pgconductor_empty_dsn: str, tmp_path: Path) -> None:
    """Or each running worker loses its plans, with an error it does not expect: 0A000, 42883."""
    recorded = json.loads((Path(__file__).parent / "released" / "0001.json").read_text())
    old = source_of(unpack(tmp_path))
    with connect(pgconductor_empty_dsn) as worker, connect(pgconductor_empty_dsn) as migrator:
        migrate_sync(migrator, source=old)
        prepare(worker, recorded["life"])
        migrate_sync(migrator)
        live(worker, recorded["life"])


def test_upgrade_of_the_first_release_ends_where_a_fresh_install_begins(
    pgconductor_empty_dsn: str, tmp_path: Path
) -> None:
    """Or a database that was upgraded has functions of its own: overloads that nobody calls, or that nobody can."""
    old = source_of(unpack(tmp_path))
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, "fresh")
        migrate_sync(conn, "upgraded", source=old)
        migrate_sync(conn, "upgraded")
        fresh, upgraded = (
            [line for line in snapshot(conn, schema).splitlines() if "_private_old_" not in line]
            for schema in ("fresh", "upgraded")
        )
    assert upgraded == fresh
