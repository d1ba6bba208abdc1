"""The migration runner against a server: what is installed, when, by whom, and what is left after a failure."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from migrations.small import (
    ADD_SIZE,
    CREATE_ITEMS,
    EXPECTED_COLUMNS,
    FUNCTIONS,
    V1,
    V2,
    V3,
    V3_BREAKING,
    columns,
    connect,
    recorded,
    total,
)
from psycopg import sql

from pgconductor.db.call import Call
from pgconductor.db.calls import Calls, NewExecution, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.db.schema import (
    FunctionFile,
    Migration,
    MigrationReport,
    SchemaVersion,
    SqlSource,
    check_sync,
    lock_key,
    migrate_gen,
    migrate_sync,
)
from pgconductor.errors import Incompatible, InvalidOption, Misuse, Refused, SchemaMissing, SchemaTooNew, Unavailable

Connection = psycopg.Connection[tuple[object, ...]]


@pytest.fixture
def conn(pgconductor_empty_dsn: str) -> Iterator[Connection]:
    with connect(pgconductor_empty_dsn) as conn:
        yield conn


@pytest.fixture
def other(pgconductor_empty_dsn: str) -> Iterator[Connection]:
    with connect(pgconductor_empty_dsn) as other:
        yield other


def test_empty_database_gets_all_migrations_and_the_functions(conn: Connection) -> None:
    """Or `pgconductor migrate` does not install."""
    assert migrate_sync(conn, source=V2) == MigrationReport((1, 2), True, 2)
    assert recorded(conn) == [1, 2]
    assert columns(conn) == EXPECTED_COLUMNS[2]
    assert total(conn) == 1
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_second_run_does_nothing(conn: Connection) -> None:
    """Or each start of a worker would take locks, and would need the right to create."""
    migrate_sync(conn, source=V2)
    before = conn.execute("select pg_current_wal_insert_lsn(), pg_current_xact_id_if_assigned()").fetchall()
    assert migrate_sync(conn, source=V2) == MigrationReport((), False, 2)
    assert conn.execute("select pg_current_wal_insert_lsn(), pg_current_xact_id_if_assigned()").fetchall() == before


def test_older_schema_gets_only_what_is_missing(conn: Connection) -> None:
    """Or an upgrade repeats a migration, or loses rows."""
    migrate_sync(conn, source=V1)
    conn.execute("insert into pgconductor.items (id) values (2)")
    assert migrate_sync(conn, source=V3) == MigrationReport((2, 3), True, 3)
    assert total(conn) == 2


def test_changed_functions_alone_are_replaced(conn: Connection) -> None:
    """Or a fix in a function body needs a pasted migration."""
    migrate_sync(conn, source=V1)
    fixed = replace(FUNCTIONS[1], text=FUNCTIONS[1].text.replace("return v_count", "return v_count + 41"))
    changed = SqlSource(V1.migrations, (FUNCTIONS[0], fixed))
    assert check_sync(conn, source=changed) == SchemaVersion(1, 1, has_own_functions=False)
    assert migrate_sync(conn, source=changed) == MigrationReport((), True, 1)
    assert total(conn) == 42
    assert check_sync(conn, source=changed) == SchemaVersion(1, 1, has_own_functions=True)


def test_older_program_leaves_newer_functions_alone(conn: Connection) -> None:
    """Or a worker of the previous release, restarting in mid-deploy, puts back bodies that no longer fit."""
    newer = SqlSource(V2.migrations, (FUNCTIONS[0], replace(FUNCTIONS[1], text=FUNCTIONS[1].text + "-- newer")))
    migrate_sync(conn, source=newer)
    assert migrate_sync(conn, source=V1) == MigrationReport((), False, 2)
    assert check_sync(conn, source=V1) == SchemaVersion(2, 1, has_own_functions=False)
    assert check_sync(conn, source=newer).has_own_functions


def test_newer_breaking_migration_is_refused(conn: Connection) -> None:
    """Or a program that does not know it goes on with tables that have changed under it."""
    migrate_sync(conn, source=V3_BREAKING)
    with pytest.raises(SchemaTooNew, match=r"breaking migration 0003_break\.sql.* up to 2: upgrade this program"):
        check_sync(conn, source=V2)
    with pytest.raises(SchemaTooNew):
        migrate_sync(conn, source=V2)
    assert check_sync(conn, source=V3_BREAKING).version == 3


def test_known_breaking_migration_passes(conn: Connection) -> None:
    """Or the program that made it refuses its own schema once a harmless one follows."""
    more = Migration(4, "0004_more.sql", "create table @schema@.more ()")
    migrate_sync(conn, source=SqlSource((*V3_BREAKING.migrations, more), FUNCTIONS))
    assert check_sync(conn, source=V3_BREAKING) == SchemaVersion(4, 3, has_own_functions=True)


def test_check_names_the_remedy(conn: Connection) -> None:
    """Or a user whose schema is missing or old reads of undefined tables instead."""
    with pytest.raises(SchemaMissing, match=r"'pgconductor' is not installed in database .*run `pgconductor migrate`"):
        check_sync(conn, source=V1)
    migrate_sync(conn, source=V1)
    with pytest.raises(SchemaMissing, match=r"has migration 1, .*needs 2: run `pgconductor migrate`"):
        check_sync(conn, source=V2)


def test_gap_in_the_version_table_is_refused(conn: Connection) -> None:
    """Or a migration of another branch is taken for ours, and the missing one is never applied."""
    migrate_sync(conn, source=V3)
    conn.execute("delete from pgconductor._private_migrations where no = 2")
    with pytest.raises(Incompatible, match="has migration 3 but not 2"):
        migrate_sync(conn, source=V3)
    with pytest.raises(Incompatible, match="has migration 3 but not 2"):
        check_sync(conn, source=V3)


# --- names ---

HOSTILE_NAMES = [
    'quote"s',
    "apo'strophe",
    "dot.ted name",
    "dollar$$s $function$",
    "new\nline\r--\n*/ /*",
    "back\\slash %s %% %I",
    "ünïcødé 日本 😀",
    "@schema@ @schema_literal@",
    "CamelCase",
    "select",
    "é" * 31 + "x",
    "U&",
    " ",
]


@pytest.mark.parametrize("schema", HOSTILE_NAMES)
def test_schema_may_have_any_name(conn: Connection, schema: str) -> None:
    """Or a name ends the quotes, body or comment it stands in, and the rest of it runs as SQL."""
    assert migrate_sync(conn, schema, source=V2).applied == (1, 2)
    assert recorded(conn, schema) == [1, 2]
    assert columns(conn, schema) == EXPECTED_COLUMNS[2]
    assert total(conn, schema) == 1
    assert check_sync(conn, schema, source=V2).version == 2


def test_all_names_live_in_one_database(conn: Connection) -> None:
    """Or two tenants share tables, as NFC and NFD twins or names that differ in case might."""
    names = [*HOSTILE_NAMES, "camelcase", "e\u0301", "\u00e9"]
    for schema in names:
        assert migrate_sync(conn, schema, source=V1).applied == (1,)
    assert len({lock_key(schema) for schema in names}) == len(names)


@pytest.mark.parametrize("schema", ["", "a\0b", "x" * 64, "é" * 32, "pg_x", "information_schema", "\ud800"])
def test_name_that_no_schema_can_have_is_refused_before_any_sql(conn: Connection, schema: str) -> None:
    """Or PostgreSQL cuts the name silently, and two tenants meet in one schema."""
    conn.close()
    with pytest.raises(InvalidOption, match="schema name"):
        migrate_sync(conn, schema, source=V1)
    with pytest.raises(InvalidOption, match="schema name"):
        check_sync(conn, schema, source=V1)


# --- rivals ---

_PROCESS = """
import sys, psycopg
from migrations.small import V3
from pgconductor.db.schema import migrate_sync
with psycopg.connect(sys.argv[1], autocommit=True, application_name="rival") as conn:
    print(migrate_sync(conn, source=V3).applied)
"""


def test_of_20_processes_at_once_one_migrates_and_none_fails(conn: Connection, pgconductor_empty_dsn: str) -> None:
    """Or a deploy of 20 replicas on an empty database crashes 19. The lock is held until all have asked for it."""
    conn.execute("select pg_advisory_lock(%s::int8)", (lock_key("pgconductor"),))
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, pgconductor_empty_dsn],
            env={"PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(20)
    ]
    asked = """
        select count(*) filter (where query like '%pg_sleep%') from pg_stat_activity, pg_sleep(0.1)
        where application_name = 'rival'
    """
    try:
        while conn.execute(asked).fetchall() != [(20,)]:
            assert all(rival.poll() is None for rival in rivals), "a rival gave up"
        conn.execute("select pg_advisory_unlock(%s::int8)", (lock_key("pgconductor"),))
        replies = [(*rival.communicate(timeout=60), rival.returncode) for rival in rivals]
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert [reply for reply in replies if reply[2] != 0] == []
    # Each migration is a transaction of its own, so several may share the work; each is done once.
    done = sorted(number for out, _, _ in replies for number in (1, 2, 3) if str(number) in out)
    assert done == [1, 2, 3]
    assert recorded(conn) == [1, 2, 3]
    assert total(conn) == 1


def test_waiter_gives_up_in_time_and_names_the_rival(conn: Connection, other: Connection) -> None:
    """Or a migration that hangs elsewhere hangs every start, without a word."""
    other.execute("set application_name = 'the other one'")
    other.execute("select pg_advisory_lock(%s::int8)", (lock_key("pgconductor"),))
    with pytest.raises(Unavailable, match=rf"process {other.info.backend_pid} \(the other one\).*pg_terminate"):
        migrate_sync(conn, source=V1, lock_wait=0.3)
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert migrate_sync(conn, "another", source=V1).applied == (1,), "another schema's lock is another one"


def test_waiter_holds_no_snapshot_between_looks(conn: Connection, other: Connection) -> None:
    """Or a concurrent index build by the holder waits for the waiter, and the waiter for it."""
    other.execute("select pg_advisory_lock(%s::int8)", (lock_key("pgconductor"),))
    state = "select state, backend_xmin from pg_stat_activity where pid = %s"
    between: list[object] = []
    steps = migrate_gen("pgconductor", V1, 1.0, 1.0)
    call = next(steps)
    for _ in range(20):
        call = steps.send(run_sync(conn, call))
        if b"pg_sleep" in call.query:
            between.append(other.execute(state, (conn.info.backend_pid,)).fetchall())
    assert len(between) >= 3
    assert set(map(str, between)) == {"[('idle', None)]"}


def finish(conn: Connection, steps: Generator[Call[Any], Any, MigrationReport], call: Call[Any]) -> MigrationReport:
    while True:
        try:
            call = steps.send(run_sync(conn, call))
        except StopIteration as ended:
            report: MigrationReport = ended.value
            return report


def test_rival_that_finished_between_look_and_lock_is_seen(conn: Connection, other: Connection) -> None:
    """Or the loser of a race goes by what it read before it had the lock, and applies a migration twice."""
    steps = migrate_gen("pgconductor", V2, 1.0, 1.0)
    call = next(steps)
    while not call.query.startswith(b"begin"):
        call = steps.send(run_sync(conn, call))
    migrate_sync(other, source=V2)
    assert finish(conn, steps, call) == MigrationReport((), False, 2)
    assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


# --- failures ---


class _Killer:
    """Runs the calls of a migration and ends its server session before the n-th, or in the middle of a script."""

    def __init__(self, conn: Connection, admin: Connection) -> None:
        self.conn = conn
        self.admin = admin

    def run(self, source: SqlSource, calls: int) -> bool:
        """True if the migration ended before that many calls."""
        steps = migrate_gen("pgconductor", source, 60.0, 60.0)
        try:
            call = next(steps)
            for number in range(1000):
                if number == calls:
                    self.admin.execute("select pg_terminate_backend(%s, 5000)", (self.conn.info.backend_pid,))
                try:
                    reply = run_sync(self.conn, call)
                except psycopg.Error as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(reply)
        except StopIteration:
            return True
        return False


def is_complete(conn: Connection, source: SqlSource) -> bool:
    try:
        check_sync(conn, source=source)
    except SchemaMissing:
        return False
    return True


_INDEX = Migration(
    3,
    "0003_index.sql",
    """--! no-transaction
    drop index concurrently if exists @schema@.items_by_size; -- left invalid by a killed build
    create index concurrently items_by_size on @schema@.items (size);
    """,
    is_transactional=False,
)
_WITH_INDEX = SqlSource((*V2.migrations, _INDEX), FUNCTIONS)


@pytest.mark.parametrize("source", [V3, _WITH_INDEX], ids=["transactional", "index"])
def test_versions_and_schema_agree_after_a_kill_before_each_call(pgconductor_empty_dsn: str, source: SqlSource) -> None:
    """Or a killed migration leaves a schema that its version table does not describe, and no start repairs it."""
    with connect(pgconductor_empty_dsn) as admin:
        for calls in range(1000):
            admin.execute("drop schema if exists pgconductor cascade")
            with connect(pgconductor_empty_dsn) as conn:
                try:
                    ended = _Killer(conn, admin).run(source, calls)
                except Unavailable:
                    ended = False
            version = len(recorded(admin))
            assert recorded(admin) == list(range(1, version + 1))
            assert columns(admin) == EXPECTED_COLUMNS[min(version, 2 if source is _WITH_INDEX else 3)]
            if source is V3:
                assert is_complete(admin, source) is (version == 3)
            if is_complete(admin, source):
                assert total(admin) == 1, "whoever sees the last version sees its functions"
            else:
                assert not ended
            report = migrate_sync(admin, source=source)
            assert report.applied == tuple(range(version + 1, 4))
            assert check_sync(admin, source=source) == SchemaVersion(3, 3, has_own_functions=True)
            assert total(admin) == 1
            if source is _WITH_INDEX:
                valid = "select indisvalid from pg_index where indexrelid = 'pgconductor.items_by_size'::regclass"
                assert admin.execute(valid).fetchall() == [(True,)]
            if ended:
                assert calls > 10
                return


def test_failing_statement_undoes_its_migration_and_keeps_the_earlier_ones(conn: Connection) -> None:
    """Or half a migration stays; and its error should name the file."""
    broken = Migration(2, "0002_broken.sql", ADD_SIZE.text + "select 1 / 0;")
    with pytest.raises(psycopg.errors.DivisionByZero) as caught:
        migrate_sync(conn, source=SqlSource((CREATE_ITEMS, broken), FUNCTIONS))
    assert "0002_broken.sql" in str(caught.value.__notes__)
    assert recorded(conn) == [1]
    assert columns(conn) == EXPECTED_COLUMNS[1]
    assert migrate_sync(conn, source=V2).applied == (2,)


def test_failing_function_undoes_the_last_migration(conn: Connection) -> None:
    """Or the new tables meet the old functions, in a schema that says it is up to date."""
    broken = FunctionFile("c_broken.sql", "select 1 / 0")
    with pytest.raises(psycopg.errors.DivisionByZero) as caught:
        migrate_sync(conn, source=SqlSource(V2.migrations, (*FUNCTIONS, broken)))
    assert "c_broken.sql" in str(caught.value.__notes__)
    assert recorded(conn) == [1]
    assert columns(conn) == EXPECTED_COLUMNS[1]


def test_mistake_in_a_migration_is_not_reported_as_a_missing_schema(conn: Connection) -> None:
    """Or whoever writes a migration is told to run `pgconductor migrate`, which they just did."""
    broken = Migration(1, "0001_broken.sql", "select no_such_function()")
    with pytest.raises(psycopg.errors.UndefinedFunction) as caught:
        migrate_sync(conn, source=SqlSource((broken,), ()))
    assert "0001_broken.sql" in str(caught.value.__notes__)


def test_failing_index_build_lets_go_of_the_lock_and_restores_the_session(conn: Connection, other: Connection) -> None:
    """Or a user's session keeps a lock that blocks all migrations, and settings it did not choose."""
    conn.execute("set statement_timeout = '12s'")
    conn.execute("set search_path = public")
    broken = replace(_INDEX, text="create index concurrently on @schema@.items (no_such_column)")
    with pytest.raises(psycopg.errors.UndefinedColumn) as caught:
        migrate_sync(conn, source=SqlSource((*V2.migrations, broken), FUNCTIONS))
    assert "0003_index.sql, statement 1" in str(caught.value.__notes__)
    assert conn.execute("select current_setting('statement_timeout'), current_setting('search_path')").fetchall() == [
        ("12s", "public")
    ]
    assert recorded(conn) == [1, 2]
    assert migrate_sync(other, source=_WITH_INDEX, lock_wait=0.1).applied == (3,)


def test_index_build_of_two_statements_runs_outside_a_transaction(conn: Connection) -> None:
    """Or PostgreSQL refuses it, as it takes a script of several statements for one transaction."""
    conn.execute("set search_path = public")
    assert migrate_sync(conn, source=_WITH_INDEX) == MigrationReport((1, 2, 3), True, 3)
    assert conn.execute("show search_path").fetchall() == [("public",)]
    held = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
    assert conn.execute(held).fetchall() == [(0,)]


def test_time_limits_of_the_server_do_not_end_a_migration(conn: Connection) -> None:
    """Or a statement_timeout meant for the application's queries ends every migration of a large table."""
    conn.execute("set statement_timeout = '100ms'")
    conn.execute("set idle_in_transaction_session_timeout = '100ms'")
    if conn.info.server_version >= 170000:
        conn.execute("set transaction_timeout = '100ms'")
    slow = Migration(1, "0001_slow.sql", "select pg_sleep(0.3)")
    assert migrate_sync(conn, source=SqlSource((slow,), ())).applied == (1,)
    assert conn.execute("show statement_timeout").fetchall() == [("100ms",)]


def test_locked_table_ends_the_wait(conn: Connection, other: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a migration waits behind a long reader for ever, and all traffic behind itself."""
    monkeypatch.setattr("pgconductor.db.migrating.LOCK_TIMEOUT", 0.05)
    migrate_sync(conn, source=V1)
    with other.transaction():
        other.execute("select from pgconductor.items")
        with pytest.raises(Unavailable, match=r"lock timeout.*holds a table of schema 'pgconductor'"):
            migrate_sync(conn, source=V2, lock_wait=0.3)
    assert migrate_sync(conn, source=V2).applied == (2,)


def test_migration_behind_a_reader_lets_traffic_through_and_tries_again(
    conn: Connection, other: Connection, pgconductor_empty_dsn: str
) -> None:
    """Or a report that reads for a minute stops all claims for a minute, or makes the deploy fail."""
    migrate_sync(conn, source=V1)
    with connect(pgconductor_empty_dsn) as traffic:
        other.execute("begin; select from pgconductor.items")
        steps = migrate_gen("pgconductor", V2, 60.0, 1.0)
        call = next(steps)
        while b"pg_sleep(2.0)" not in call.query:
            try:
                if b"alter table" in call.query:
                    conn.execute("set local lock_timeout = '50ms'")
                reply = run_sync(conn, call)
            except psycopg.Error as error:
                call = steps.throw(error)
            else:
                call = steps.send(reply)
        traffic.execute("set lock_timeout = '5s'")
        traffic.execute("select from pgconductor.items")
        other.execute("rollback")
        assert finish(conn, steps, call).applied == (2,)


def test_migration_that_loses_a_deadlock_tries_again(conn: Connection, other: Connection) -> None:
    """Or a deploy fails because a worker took two tables in the other order at that moment."""
    migrate_sync(conn, source=V1)
    conn.execute("create table pgconductor.second ()")
    both = Migration(2, "0002_both.sql", ADD_SIZE.text + "alter table @schema@.second add column x int;")
    steps = migrate_gen("pgconductor", SqlSource((CREATE_ITEMS, both), FUNCTIONS), 60.0, 1.0)
    call = next(steps)
    other.execute("begin; lock table pgconductor.second in access share mode; set local deadlock_timeout = '60s'")
    rival = threading.Thread(target=lambda: other.execute("select from pgconductor.items"), daemon=True)
    while b"alter table" not in call.query:
        call = steps.send(run_sync(conn, call))
    conn.execute("set local deadlock_timeout = '10ms'; lock table pgconductor.items in access exclusive mode")
    rival.start()
    with connect(conn.info.dsn) as observer:
        waits = "select wait_event_type from pg_stat_activity where pid = %s"
        while observer.execute(waits, (other.info.backend_pid,)).fetchall() != [("Lock",)]:
            pass
    with pytest.raises(psycopg.errors.DeadlockDetected) as lost:
        run_sync(conn, call)
    call = steps.throw(lost.value)
    call = steps.send(run_sync(conn, call))
    rival.join()
    other.execute("rollback")
    assert finish(conn, steps, call).applied == (2,)


# --- rights and servers ---


@pytest.fixture
def role(conn: Connection) -> Iterator[sql.Identifier]:
    name = sql.Identifier(f"role_{conn.info.dbname}")
    conn.execute(sql.SQL("create role {}").format(name))
    yield name
    conn.execute("reset role")
    conn.execute(sql.SQL("drop owned by {} cascade").format(name))
    conn.execute(sql.SQL("drop role {}").format(name))


def test_role_without_create_is_told_what_it_lacks(conn: Connection, role: sql.Identifier) -> None:
    """Or the first start in production ends in a bare 'permission denied'."""
    conn.execute(sql.SQL("set role {}").format(role))
    with pytest.raises(Refused, match=r"permission denied for database.*role 'role_.*owner.*CREATE on the database"):
        migrate_sync(conn, source=V1)
    conn.execute("reset role")
    assert migrate_sync(conn, source=V1).applied == (1,)


def test_role_that_owns_a_schema_made_for_it_needs_no_create(conn: Connection, role: sql.Identifier) -> None:
    """Or a DBA who makes the schema must still hand out CREATE on the whole database."""
    conn.execute(sql.SQL("create schema pgconductor authorization {}").format(role))
    conn.execute(sql.SQL("set role {}").format(role))
    assert migrate_sync(conn, source=V1).applied == (1,)


def test_role_that_may_only_read_starts_on_a_schema_that_is_up_to_date(conn: Connection, role: sql.Identifier) -> None:
    """Or workers need the rights of an owner for good."""
    migrate_sync(conn, source=V1)
    conn.execute(sql.SQL("grant usage on schema pgconductor to {}").format(role))
    conn.execute(sql.SQL("set role {}").format(role))
    with pytest.raises(Refused, match="permission denied for table _private_schema"):
        check_sync(conn, source=V1)
    conn.execute("reset role")
    conn.execute(sql.SQL("grant select on all tables in schema pgconductor to {}").format(role))
    conn.execute(sql.SQL("set role {}").format(role))
    assert migrate_sync(conn, source=V1) == MigrationReport((), False, 1)
    assert check_sync(conn, source=V1).version == 1


def test_foreign_objects_in_the_way_are_named(conn: Connection) -> None:
    """Or somebody else's table of the same name is taken for ours, or a traceback is all there is."""
    conn.execute("create schema pgconductor create table items ()")
    with pytest.raises(Incompatible, match=r"items.*no migration of this program made"):
        migrate_sync(conn, source=V1)
    assert recorded(conn) == []


def test_hostile_search_path_changes_nothing(conn: Connection) -> None:
    """Or an object of the same name in an earlier schema is used, by a role that may be a superuser."""
    conn.execute("create schema evil")
    conn.execute("create function evil.current_setting(text) returns text language sql as $$ select 'evil' $$")
    conn.execute("create function evil.pg_try_advisory_xact_lock(int8) returns bool language sql as $$ select false $$")
    conn.execute("set search_path = evil, pg_catalog")
    assert migrate_sync(conn, source=V2, lock_wait=0.1).applied == (1, 2)
    assert total(conn) == 1


def test_unqualified_name_lands_nowhere(conn: Connection) -> None:
    """Or a slip in a migration puts our table into the user's schema."""
    conn.execute("set search_path = public")
    slip = Migration(1, "0001_slip.sql", "create table lost ()")
    with pytest.raises(Refused, match="pg_catalog"):
        migrate_sync(conn, source=SqlSource((slip,), ()))
    assert conn.execute("select to_regclass('public.lost')").fetchall() == [(None,)]


def test_client_encoding_does_not_matter(conn: Connection) -> None:
    """Or the files' text is garbled where a DBA chose another one, or a name that it lacks cannot be sent."""
    conn.execute("set client_encoding = 'LATIN1'")
    text = Migration(1, "0001_text.sql", "create table @schema@.text as select '€ – 日本' as written")
    migrate_sync(conn, "é", source=SqlSource((text,), ()))
    conn.execute("set client_encoding = 'UTF8'")
    assert conn.execute('select written from "é".text').fetchall() == [("€ – 日本",)]


def test_read_only_session_is_told_so(conn: Connection) -> None:
    """Or a database that was set read-only, as hosts do when a disk is full, yields a bare error."""
    conn.execute("set default_transaction_read_only = on")
    with pytest.raises(Unavailable, match=r"read-only.*default_transaction_read_only"):
        migrate_sync(conn, source=V1)


def test_broken_connection_is_unavailable(conn: Connection, other: Connection) -> None:
    """Or a start that meets a failover ends for good, as retries look for `Unavailable`."""
    other.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))
    with pytest.raises(Unavailable, match="repeat it"):
        migrate_sync(conn, source=V1)
    with pytest.raises(Unavailable, match="lost"):
        migrate_sync(conn, source=V1)


def test_busy_connection_is_refused(conn: Connection, pgconductor_empty_dsn: str) -> None:
    """Or the runner's commit ends the user's own transaction."""
    with conn.transaction(), pytest.raises(Misuse, match="autocommit"):
        migrate_sync(conn, source=V1)
    with conn.pipeline(), pytest.raises(Misuse, match="pipeline"):
        migrate_sync(conn, source=V1)
    with psycopg.connect(pgconductor_empty_dsn) as manual, pytest.raises(Misuse, match="autocommit"):
        migrate_sync(manual, source=V1)


def test_check_works_inside_a_transaction(pgconductor_empty_dsn: str) -> None:
    """Or a producer cannot ask on its own connection."""
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, source=V1)
    with psycopg.connect(pgconductor_empty_dsn) as manual:
        assert check_sync(manual, source=V1).version == 1


@pytest.mark.parametrize("schema", HOSTILE_NAMES)
def test_shipped_functions_work_in_a_schema_of_any_name(conn: Connection, schema: str) -> None:
    """Or one of them has a token where its name cannot stand, or the default schema's name written into it."""
    migrate_sync(conn, schema)
    calls = Calls(schema)
    owner = uuid4()
    queue = f"queue of {schema}"
    run_sync(conn, calls.register_queue(queue))
    run_sync(conn, calls.register_orchestrator(owner, "me", 10.0, "0", 1, [WorkerRow(queue, ["greet"], 1)]))
    (invoked,) = run_sync(conn, calls.invoke_many([NewExecution("greet", "{}", queue)]))
    (claimed,) = run_sync(conn, calls.claim(queue, owner, ["greet"], 10)).claimed
    assert claimed.id == invoked.id
    assert run_sync(conn, calls.heartbeat(owner, 10.0, [queue])).is_alive
    assert queue in [status.queue for status in run_sync(conn, calls.queue_status())]
