"""A small set of SQL files, in place of the real ones, and what a database that had them looks like.

It has what the real ones have: a function that uses one that stands in a later file, a dollar-quoted body, and the
schema's name in a comment, a format string and a literal.
"""

from __future__ import annotations

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from pgconductor.db.schema import FunctionFile, Migration, SqlSource

CREATE_ITEMS = Migration(
    1,
    "0001_items.sql",
    """
    -- the table of @schema@
    create table @schema@.items (id int4 primary key, note text default '100%');
    create type @schema@.pair as (a int4, b text);
    insert into @schema@.items (id) values (1);
    """,
)
ADD_SIZE = Migration(2, "0002_size.sql", "alter table @schema@.items add column size int4 not null default 7;")
ADD_OWNER = Migration(3, "0003_owner.sql", "alter table @schema@.items add column owner text;")
BREAK = Migration(3, "0003_break.sql", "alter table @schema@.items drop column note;", is_breaking=True)

USE_LATER = FunctionFile(
    "a_total.sql",
    """
    /* total of @schema@ */
    create or replace function @schema@.total() returns int8 language sql stable as $$
        select @schema@.number_of_items() + 0 -- in @schema@
    $$;
    """,
)
COUNT_ITEMS = FunctionFile(
    "b_count.sql",
    """
    create or replace function @schema@.number_of_items() returns int8 language plpgsql stable as $function$
    declare
        v_count int8;
        v_pair @schema@.pair;
    begin
        execute format('select count(*) from @schema@.%I', 'items') into v_count;
        v_pair := row(1, @schema_literal@)::@schema@.pair;
        if v_pair.b <> @schema_literal@ or not exists (select from @schema@.items) then
            raise exception 'wrong schema %', v_pair.b;
        end if;
        return v_count;
    end
    $function$;
    """,
)
FUNCTIONS = (USE_LATER, COUNT_ITEMS)

V1 = SqlSource((CREATE_ITEMS,), FUNCTIONS)
V2 = SqlSource((CREATE_ITEMS, ADD_SIZE), FUNCTIONS)
V3 = SqlSource((CREATE_ITEMS, ADD_SIZE, ADD_OWNER), FUNCTIONS)
V3_BREAKING = SqlSource((CREATE_ITEMS, ADD_SIZE, BREAK), FUNCTIONS)


def connect(dsn: str) -> psycopg.Connection[tuple[object, ...]]:
    """A sync connection in autocommit."""
    return psycopg.connect(dsn, autocommit=True, row_factory=tuple_row)


def recorded(conn: psycopg.Connection[tuple[object, ...]], schema: str = "pgconductor") -> list[object]:
    """The numbers in the version table, or nothing where there is none."""
    query = "select from pg_class c join pg_namespace n on n.oid = relnamespace where nspname = %s and relname = %s"
    if not conn.execute(query, (schema, "_private_migrations")).fetchall():
        return []
    table = sql.Identifier(schema, "_private_migrations")
    return [row[0] for row in conn.execute(sql.SQL("select no from {} order by no").format(table))]


def columns(conn: psycopg.Connection[tuple[object, ...]], schema: str = "pgconductor") -> list[object]:
    """The columns of the table that the migrations make and change."""
    query = """
        select column_name::text from information_schema.columns
        where table_schema = %s and table_name = 'items' order by ordinal_position
    """
    return [row[0] for row in conn.execute(query, (schema,))]


def total(conn: psycopg.Connection[tuple[object, ...]], schema: str = "pgconductor") -> object:
    """What the installed function returns; raises if there is none."""
    row = conn.execute(sql.SQL("select {}()").format(sql.Identifier(schema, "total"))).fetchone()
    assert row is not None
    return row[0]


EXPECTED_COLUMNS: dict[int, list[str]] = {
    0: [],
    1: ["id", "note"],
    2: ["id", "note", "size"],
    3: ["id", "note", "size", "owner"],
}
