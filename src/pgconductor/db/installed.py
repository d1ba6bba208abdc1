"""What a schema holds, as the database tells it, and what a program that meets it has to do next.

Owns two tables, `_private_migrations` and `_private_schema`: how they are made, read and written. Decides by plain
functions; the calls that act on a decision are in `migrating`. It must not know what a migration contains.

Always true: a program that does not know a breaking migration is refused, whatever else it finds; one that is older
without that is left alone and changes nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from ..errors import Incompatible, SchemaTooNew
from .call import Call, Row, ignore
from .sql_files import Migration, SqlSource, render

T = TypeVar("T")
Calls: TypeAlias = Generator[Call[Any], Any, T]  # yields calls, is sent their replies, returns a T

MINIMUM_SERVER = 150000  # server_version_num: PostgreSQL 15


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    """One row of `_private_migrations`."""

    number: int
    name: str
    is_breaking: bool


@dataclass(frozen=True, slots=True)
class Installed:
    """What the two tables say; `functions_version` is the newest migration known to the program that put them in."""

    migrations: tuple[AppliedMigration, ...] = ()
    functions_hash: str | None = None
    functions_version: int = 0

    @property
    def version(self) -> int:
        return self.migrations[-1].number if self.migrations else 0


@dataclass(frozen=True, slots=True)
class Server:
    """What is to be known of the server, the role and the schema before anything else."""

    version_number: int
    version_text: str
    is_standby: bool
    role: str
    database: str
    has_schema: bool
    has_tables: bool


def read_server(schema: str) -> Call[Server]:
    return Call(
        b"""
        select pg_catalog.current_setting('server_version_num')::int4, pg_catalog.current_setting('server_version'),
               pg_catalog.pg_is_in_recovery(), current_user::text, pg_catalog.current_database()::text,
               exists (select from pg_catalog.pg_namespace n where n.nspname = %s),
               exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                       where n.nspname = %s and c.relname = '_private_schema' and c.relkind = 'r')
        """,
        (schema, schema),
        lambda rows: Server(*rows[0]),
    )


def read_installed(schema: str) -> Call[Installed]:
    def decode(rows: list[Row]) -> Installed:
        applied = tuple(AppliedMigration(no, name, breaking) for no, name, breaking, *_ in rows if no is not None)
        return Installed(applied, rows[0][3], rows[0][4]) if rows else Installed()

    return Call(
        render(
            "select m.no, m.name, m.breaking, s.functions_hash, s.functions_version"
            " from @schema@._private_schema s left join @schema@._private_migrations m on true order by m.no",
            schema,
        ).encode(),
        (),
        decode,
    )


CREATE_SCHEMA = "create schema @schema@"

CREATE_TABLES = """
create table @schema@._private_migrations (
    no int4 primary key,
    name text not null,
    breaking bool not null,
    applied_at timestamptz not null default now()
);
create table @schema@._private_schema (
    only_row bool primary key default true check (only_row),
    functions_hash text,
    functions_version int4 not null default 0
);
insert into @schema@._private_schema default values;
comment on table @schema@._private_migrations is 'pgconductor: the migrations this schema has had';
comment on table @schema@._private_schema is 'pgconductor: which set of function bodies this schema holds';
"""


def record_migration(schema: str, migration: Migration) -> Call[None]:
    query = render("insert into @schema@._private_migrations (no, name, breaking) values (%s, %s, %s)", schema)
    return Call(query.encode(), (migration.number, migration.name, migration.is_breaking), ignore)


def record_functions(schema: str, source: SqlSource) -> Call[None]:
    query = render("update @schema@._private_schema set functions_hash = %s, functions_version = %s", schema)
    return Call(query.encode(), (source.functions_hash, source.version), ignore)


# --- deciding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What the next transaction does: one migration, all functions, or both."""

    migration: Migration | None
    replaces_functions: bool


def next_step(schema: str, installed: Installed, source: SqlSource) -> Step | None:
    """What is to be done next, None if the schema is as new as `source` or newer.

    Cases: newer and breaking: refused. Newer and harmless: nothing. Older: the next migration, the last together with
    the functions. Same: the functions, if they differ.
    """
    refuse_unknown(schema, installed, source)
    if installed.version > source.version:
        return None
    if installed.version < source.version:
        migration = source.migrations[installed.version]
        is_last = migration.number == source.version
        return Step(migration, replaces_functions=is_last and migration.is_transactional)
    if installed.functions_hash != source.functions_hash or installed.functions_version < source.version:
        return Step(None, replaces_functions=True)
    return None


def refuse_unknown(schema: str, installed: Installed, source: SqlSource) -> None:
    breaking = [applied for applied in installed.migrations if applied.number > source.version and applied.is_breaking]
    if breaking:
        raise SchemaTooNew(
            f"schema {schema!r} has the breaking migration {breaking[0].name}, and this program knows only migrations"
            f" up to {source.version}: upgrade this program"
        )
    numbers = {applied.number for applied in installed.migrations}
    if missing := set(range(1, installed.version + 1)) - numbers:
        raise Incompatible(
            f"schema {schema!r} has migration {installed.version} but not {min(missing)}: it was made by a program of"
            " another line of development; restore it, or choose another schema"
        )


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """The newest migration of the schema and of this program, and whether the function bodies are this program's."""

    version: int
    program_version: int
    has_own_functions: bool


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What one `migrate` did: the migrations it applied, whether it replaced the functions, and the version now."""

    applied: tuple[int, ...]
    functions_replaced: bool
    version: int


# --- looking ------------------------------------------------------------------------------------------------------


def ask_gen(call: Call[T]) -> Calls[T]:
    reply: T = yield call
    return reply


def inspect_gen(schema: str) -> Calls[tuple[Server, Installed]]:
    server = yield from ask_gen(read_server(schema))
    if server.version_number < MINIMUM_SERVER:
        raise Incompatible(
            f"the server is PostgreSQL {server.version_text}; pgconductor needs {MINIMUM_SERVER // 10000} or newer:"
            " upgrade the server"
        )
    if not server.has_tables:
        return server, Installed()
    return server, (yield from ask_gen(read_installed(schema)))
