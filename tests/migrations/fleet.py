"""A small schema with orchestrators in it, and a breaking migration of it.

It has what the real one has for the purpose: the table, the clock, the control channel and the shipped guard.
"""

from __future__ import annotations

from uuid import UUID, uuid4

import psycopg
from migrations.small import BREAK, CREATE_ITEMS, FUNCTIONS

from pgconductor.db.schema import FunctionFile, Migration, SqlSource, load_functions

Connection = psycopg.Connection[tuple[object, ...]]

_ADD_FLEET = Migration(
    2,
    "0002_fleet.sql",
    """
    alter table @schema@.items add column size int4 not null default 7;
    create table @schema@._private_orchestrators (
        id uuid primary key, name text not null, program_version text not null, schema_version int not null,
        started_at timestamptz not null, expires_at timestamptz not null, died_at timestamptz,
        stop_requested_at timestamptz);
    """,
)
_CLOCK = FunctionFile(
    "c_clock.sql",
    """
    create or replace function @schema@._private_clock() returns timestamptz language sql volatile
        return pg_catalog.clock_timestamp();
    create or replace function @schema@._private_control_channel(p_owner uuid) returns text language sql immutable
        return 'control_' || p_owner;
    """,
)
_GUARD = tuple(file for file in load_functions() if file.name == "14_live_migration.sql")

OLD = SqlSource((CREATE_ITEMS, _ADD_FLEET), (*FUNCTIONS, _CLOCK, *_GUARD))
NEW = SqlSource((*OLD.migrations, BREAK), OLD.functions)


def register(conn: Connection, version: int, *, lease: float = 600.0) -> UUID:
    """As an orchestrator of a program of that version does; raises what the guard raises."""
    id_ = uuid4()
    with conn.transaction():
        conn.execute("select pgconductor._private_check_version(%s)", (version,))
        conn.execute(
            "insert into pgconductor._private_orchestrators (id, name, program_version, schema_version, started_at,"
            " expires_at) values (%s, %s, '0.1', %s, now(), clock_timestamp() + make_interval(secs => %s))",
            (id_, f"host:{version}", version, lease),
        )
    return id_


def retire(conn: Connection, id_: UUID) -> None:
    conn.execute("delete from pgconductor._private_orchestrators where id = %s", (id_,))


def asked(conn: Connection) -> list[object]:
    """The orchestrators that were asked to stop."""
    rows = conn.execute("select id from pgconductor._private_orchestrators where stop_requested_at is not null")
    return [id_ for (id_,) in rows]
