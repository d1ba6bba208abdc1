"""The committed picture of a fresh install, so that a review shows what a migration does to the schema."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from migrations.catalogue import snapshot
from migrations.small import V1, V2, connect

from pgconductor.db.schema import load_source, migrate_sync

SNAPSHOT = Path(__file__).resolve().parents[2] / "sql" / "snapshot.sql"


def test_snapshot_is_that_of_a_fresh_install(pgconductor_empty_dsn: str) -> None:
    """Or the picture lies. With PGCONDUCTOR_WRITE_SNAPSHOT=1 this test writes it."""
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, source=load_source())
        now = snapshot(conn)
    if os.environ.get("PGCONDUCTOR_WRITE_SNAPSHOT") == "1":
        SNAPSHOT.write_text(now, encoding="utf-8")
    assert SNAPSHOT.read_text(encoding="utf-8") == now, "see its first lines for how to write it anew"


def test_snapshot_does_not_depend_on_the_name_of_the_schema(pgconductor_empty_dsn: str) -> None:
    """Or an object has the default schema's name written into it."""
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, "pgconductor")
        migrate_sync(conn, "another")
        assert snapshot(conn, "another") == snapshot(conn, "pgconductor")


@pytest.mark.parametrize(
    "change",
    [
        "alter table items add extra int",
        "alter table items alter note drop default",
        "alter table items alter note set not null",
        "create index on items (note)",
        "alter table items add check (id > 0)",
        "create unique index on items (note)",
        "alter table items set (fillfactor = 50)",
        "create trigger t before update on items for each row execute function suppress_redundant_updates_trigger()",
        "create view v as select id from items",
        "create type t as enum ('a')",
        "alter function total() volatile",
        "alter function total() set work_mem = '1MB'",
        "alter function total() security definer",
        "create sequence s",
    ],
)
def test_snapshot_shows_the_change(pgconductor_empty_dsn: str, change: str) -> None:
    """Or a review, and the comparison above, overlook it."""
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, source=V1)
        conn.execute("set search_path = pgconductor")
        before = snapshot(conn)
        conn.execute(change.encode())
        assert snapshot(conn) != before


def test_upgrade_ends_where_a_fresh_install_begins(pgconductor_empty_dsn: str) -> None:
    """Or databases that were upgraded differ from those the tests see."""
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, "fresh", source=V2)
        migrate_sync(conn, "upgraded", source=V1)
        migrate_sync(conn, "upgraded", source=V2)
        assert snapshot(conn, "upgraded") == snapshot(conn, "fresh")
