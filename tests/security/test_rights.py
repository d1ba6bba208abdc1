"""What each role may do, by the catalogue: every object of the schema against the list in `rights`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from shutil import copytree

import psycopg
import pytest
from psycopg import sql
from security.rights import AS_OWNER, CALLS, OWNER_ONLY, OWNER_READS, READS
from security.site import KINDS, Site, open_site

from pgconductor.db import sql_files
from pgconductor.db.execute import run_sync
from pgconductor.db.schema import migrate_sync
from pgconductor.doctor import Verdict, objects
from pgconductor.testing import Databases, DatabaseServer


def _plain(name: str) -> str:
    return re.sub(r"_\d+$", "_N", name)


def _functions(site: Site) -> list[tuple[int, str]]:
    return [
        (oid, name)
        for oid, name in site.admin.rows(
            "select oid::int8, proname::text from pg_proc"
            " where pronamespace = '{s}'::regnamespace and proname !~ '^_test_'"
        )
    ]


# --- the matrix ---


def test_every_function_is_for_those_who_are_listed(site: Site) -> None:
    """Functions are executable by everybody by default: one that is new would be, until somebody notices."""
    site.session("worker").register_queue("q")
    wrong: list[str] = []
    for (oid, name), kind in product(_functions(site), (*KINDS, "stranger")):
        may = site.admin.value("select has_function_privilege(%s, %s::oid, 'execute')", site.role(kind), oid)
        if may != (kind in CALLS.get(_plain(name), set())):
            wrong.append(f"{kind} {'may' if may else 'may not'} call {name}")
    assert wrong == []


def test_every_listed_function_is_there(site: Site) -> None:
    """A verb that was renamed keeps its old line, and its new name has none."""
    site.session("worker").register_queue("q")
    names = {_plain(name) for _, name in _functions(site)}
    assert set(CALLS) - names == set()
    assert {name for name in names if not name.startswith("_private_")} == (
        {name for name in CALLS if not name.startswith("_private_")} | OWNER_ONLY
    )


def test_tables_are_read_by_those_who_are_listed_and_written_by_nobody(site: Site) -> None:
    """A role that may write a table can do what no verb lets it do."""
    site.session("worker").register_queue("q")
    relations = site.admin.rows(
        "select oid::int8, relname::text, relkind::text from pg_class where relnamespace = '{s}'::regnamespace"
        " and relkind in ('r', 'p', 'v', 'm', 'S', 'f') and relname !~ '^_test_'"
    )
    wrong: list[str] = []
    for (oid, name, relkind), kind in product(relations, (*KINDS, "stranger")):
        rights = ("usage", "select", "update") if relkind == "S" else (
            "select", "insert", "update", "delete", "truncate", "references", "trigger"
        )  # fmt: skip
        test = "has_sequence_privilege" if relkind == "S" else "has_table_privilege"
        for right in rights:
            may = site.admin.value(f"select {test}(%s, %s::oid, %s)", site.role(kind), oid, right)
            if may != (right == "select" and kind in READS.get(name, set())):
                wrong.append(f"{kind} {'has' if may else 'has not'} {right} on {name}")
        if relkind != "S" and name not in READS:
            for right in ("select", "insert", "update", "references"):
                if site.admin.value("select has_any_column_privilege(%s, %s::oid, %s)", site.role(kind), oid, right):
                    wrong.append(f"{kind} has {right} on a column of {name}")
    assert wrong == []
    assert {name for _, name, relkind in relations if relkind == "v"} == set(READS) & {
        "autoscaling",
        "execution_status",
    } | OWNER_READS


def test_types_and_the_schema_are_for_those_who_have_a_kind(site: Site) -> None:
    """A stranger makes a column of our type, and the type cannot be changed any more."""
    for kind in (*KINDS, "stranger"):
        role = site.role(kind)
        types = site.admin.rows(
            "select t.typname::text from pg_type t left join pg_class c on c.oid = t.typrelid"
            " where t.typnamespace = '{s}'::regnamespace and t.typtype in ('e', 'd', 'c')"
            " and coalesce(c.relkind, 'c') = 'c' and has_type_privilege(%s, t.oid, 'usage')",
            role,
        )
        assert types == []
        assert site.admin.value("select has_schema_privilege(%s, %s, 'usage')", role, "pgconductor") == (kind in KINDS)
        assert not site.admin.value("select has_schema_privilege(%s, %s, 'create')", role, "pgconductor")


def test_public_has_nothing_at_all(site: Site) -> None:
    """What everybody has, no revoking from a role takes away."""
    site.session("worker").register_queue("q")
    rows = site.admin.rows(
        "select p.proname::text from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a"
        " where p.pronamespace = '{s}'::regnamespace and a.grantee = 0 and p.proname !~ '^_test_'"
        " union all select c.relname::text from pg_class c, aclexplode(c.relacl) a"
        " where c.relnamespace = '{s}'::regnamespace and a.grantee = 0 and c.relname !~ '^_test_'"
        " union all select n.nspname::text from pg_namespace n, aclexplode(n.nspacl) a"
        " where n.oid = '{s}'::regnamespace and a.grantee = 0"
    )
    assert rows == []


def test_functions_with_the_owners_rights_are_the_listed_ones(site: Site) -> None:
    """Whoever may call such a function may do whatever it does, as the owner; and its names must be its own."""
    site.session("worker").register_queue("q")
    rows = site.admin.rows(
        "select proname::text, prosecdef, proconfig::text[], proowner::regrole::text from pg_proc"
        " where pronamespace = '{s}'::regnamespace and proname !~ '^_test_'"
    )
    assert {_plain(name) for name, is_definer, *_ in rows if is_definer} == AS_OWNER
    for name, is_definer, settings, owner in rows:
        assert owner == site.owner, name
        if is_definer:
            assert "search_path=pg_catalog, pg_temp" in (settings or []), name
    assert not site.admin.value("select rolsuper from pg_roles where rolname = %s", site.owner)


# --- granting ---


def test_grants_are_listed_and_taken_back(site: Site) -> None:
    """A role that left the team keeps its rights, or loses those of another kind with it."""
    role = site.new_role("leaver")
    owner = site.session("owner")
    owner.rows("select {s}.grant_role('producer', %s)", role)
    owner.rows("select {s}.grant_role('operator', %s)", role)
    owner.rows("select {s}.grant_role('operator', %s)", role)  # harmless
    assert owner.rows("select kind from {s}.granted_roles() where role = %s", role) == [("producer",), ("operator",)]
    session = site.session_of(role)
    execution = session.invoke()
    assert session.rows("select status from {s}.cancel(array[%s::uuid])", execution) == [("cancelled",)]
    owner.rows("select {s}.revoke_role('operator', %s)", role)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.rows("select {s}.cancel_matching()")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.rows("select id from {s}.execution_status")
    session.invoke()
    owner.rows("select {s}.revoke_role('producer', %s)", role)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.invoke()
    assert not site.admin.value("select has_schema_privilege(%s, %s, 'usage')", role, "pgconductor")
    assert owner.rows("select kind from {s}.granted_roles() where role = %s", role) == []
    owner.rows("select {s}.revoke_role('producer', %s)", role)  # harmless


@pytest.mark.parametrize("kind", ["Producer", "owner", "", "producer, worker", 'producer"', None])
def test_unknown_kind_is_refused(site: Site, kind: str | None) -> None:
    """A typing error grants nothing and says so, and does not become part of a statement."""
    with pytest.raises(psycopg.Error, match="no kind of role") as caught:
        site.session("owner").rows("select {s}.grant_role(%s, %s)", kind, site.role("stranger"))
    assert caught.value.sqlstate == "PC001"


@pytest.mark.parametrize("role", ["public", "PUBLIC", "none", "", "nobody of this name", 'x"; drop role y', None])
def test_role_that_is_none_is_refused(site: Site, role: str | None) -> None:
    """ "public" would be everybody: PostgreSQL takes it so even in quotes."""
    with pytest.raises(psycopg.Error, match="no role") as caught:
        site.session("owner").rows("select {s}.grant_role('worker', %s)", role)
    assert caught.value.sqlstate == "PC001"


@pytest.mark.parametrize("name", ['we"ird', "o'clock", "MiXed %s %1$I", "x; drop table y", "ü\u202eb", "a.b"])
def test_roles_of_any_name_get_their_rights(site: Site, name: str) -> None:
    """A name is cut, folded or becomes SQL where rights are given."""
    role = site.new_role(name)
    owner = site.session("owner")
    owner.rows("select {s}.grant_role('worker', %s)", role)
    session = site.session_of(role)
    session.register_queue("q")
    execution = session.invoke()
    assert session.rows("select id, status from {s}.cancel(array[%s::uuid])", execution) == [(execution, "cancelled")]
    owner.rows("select {s}.revoke_role('worker', %s)", role)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.register_queue("q")


def test_nobody_but_the_owner_grants(site: Site) -> None:
    """A worker makes itself an operator."""
    for kind in (*KINDS, "stranger"):
        session = site.session(kind)
        for verb in ("grant_role", "revoke_role"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.rows(f"select {{s}}.{verb}('operator', %s)", site.role(kind))


def test_two_grants_at_once_wait_for_each_other(site: Site) -> None:
    """Both change the rights of one function, and one fails with "tuple concurrently updated"."""
    first, second = site.session("owner", autocommit=False), site.session("owner")
    one, two = site.new_role("one"), site.new_role("two")
    first.rows("select {s}.grant_role('worker', %s)", one)
    rival = site.admin.start(lambda: second.rows("select {s}.grant_role('worker', %s)", two))
    site.admin.wait_blocked(second, rival)
    first.commit()
    rival.result(20)
    for role in (one, two):
        site.session_of(role).register_queue("q")


def test_queue_registered_during_a_grant_is_for_the_new_worker_too(site: Site) -> None:
    """The new partition's claim is for the workers of before, and the new one's claims are refused for ever."""
    grant, register = site.session("owner", autocommit=False), site.session("worker")
    role = site.new_role("late")
    grant.rows("select {s}.grant_role('worker', %s)", role)
    work = site.admin.start(lambda: register.register_queue("q"))
    site.admin.wait_blocked(register, work)
    grant.commit()
    number = work.result(20)
    session = site.session_of(role)
    owner = session.register_orchestrator()
    session.rows(f"select * from {{s}}._private_claim_{number}('q', %s, '{{t}}', 1)", owner)


def test_renamed_role_keeps_its_kind_and_dropped_one_leaves_nothing(site: Site) -> None:
    """A record by name gives the rights of one who left to the next who takes the name."""
    role = site.new_role("old")
    owner = site.session("owner")
    owner.rows("select {s}.grant_role('viewer', %s)", role)
    new = site.role("new")
    rename = sql.SQL("alter role {} rename to {}").format(sql.Identifier(role), sql.Identifier(new))
    site.admin.conn.execute(rename)
    assert owner.rows("select kind from {s}.granted_roles() where role = %s", new) == [("viewer",)]
    site.admin.conn.execute(sql.SQL("drop owned by {}").format(sql.Identifier(new)))
    site.admin.conn.execute(sql.SQL("drop role {}").format(sql.Identifier(new)))
    assert owner.rows("select kind from {s}.granted_roles() where role in (%s, %s)", role, new) == []
    again = site.new_role("new")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        site.session_of(again).queue_status()


# --- upgrades ---


@pytest.fixture
def fresh_site(pgconductor_databases: Databases) -> Iterator[Site]:
    """A database of the test's own, for what changes the schema."""
    with pgconductor_databases.empty() as dsn, open_site(dsn) as site:
        yield site


def test_upgrade_gives_the_granted_roles_what_is_new_and_its_owner_what_a_superuser_made(
    fresh_site: Site, tmp_path: Path
) -> None:
    """After an upgrade by a superuser the functions, which run as the owner, are refused the new table; or a worker is
    refused the new verb.
    """
    site = fresh_site
    session = site.session("worker")
    session.register_queue("q")
    folder = tmp_path / "sql"
    copytree(Path(__file__).parents[2] / "sql", folder)
    number = sql_files.latest_version() + 1
    (folder / "migrations" / f"{number:04}_next.sql").write_text("create table @schema@._private_next (no int);")
    (folder / "functions" / "70_next.sql").write_text(
        "create or replace function @schema@.next() returns bigint language sql volatile"
        " set search_path = pg_catalog, pg_temp as $$ select count(*) from @schema@._private_next $$;"
        "create or replace function @schema@._private_unlisted() returns int language sql return 1;"
    )
    rights = folder / "functions" / "90_privileges.sql"
    rights.write_text(rights.read_text().replace("('claim',", "('next', '{worker}', true), ('claim',"))
    with psycopg.connect(site.dsn, autocommit=True) as conn:
        assert conn.info.user != site.owner
        report = migrate_sync(
            conn,
            source=sql_files.SqlSource(
                sql_files.load_migrations(folder / "migrations"), sql_files.load_functions(folder / "functions")
            ),
        )
    assert report.applied == (number,)
    assert session.value("select {s}.next()") == 0
    assert site.admin.rows(
        "select relowner::regrole::text from pg_class where relname = '_private_next' union"
        " select proowner::regrole::text from pg_proc where proname in ('next', '_private_unlisted')"
    ) == [(site.owner,)]
    for call in ("next", "_private_unlisted"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            site.session("producer").rows(f"select {{s}}.{call}()")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.rows("select {s}._private_unlisted()")
    # What was there still works, partitions' functions among it.
    session.invoke()
    assert len(session.claim(session.register_orchestrator())) == 1


def test_superusers_schema_is_handed_over_as_doctor_says(
    pgconductor_databases: Databases, pgconductor_server: DatabaseServer
) -> None:
    """Most begin as a superuser: then the functions have its rights, until somebody hands over each object by hand."""
    with pgconductor_databases.installed() as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        role = f"pgc_owner_{conn.info.backend_pid}_{conn.info.dbname[-4:]}"
        conn.execute("select pgconductor.register_queue('q')")
        try:
            before = objects.judge_owner(run_sync(conn, objects.owner("pgconductor")), "pgconductor")
            assert before[0] is Verdict.WARNING
            assert before[2] is not None
            commands = before[2].removeprefix("as a superuser: ").replace("pgconductor_owner", role).split("; ")
            for command in commands:
                conn.execute(command.encode())
            assert objects.judge_owner(run_sync(conn, objects.owner("pgconductor")), "pgconductor")[0] is Verdict.OK
            assert conn.execute("select count(*) from pg_class where relowner = %s::regrole", (role,)).fetchone() != (
                0,
            )
            # What needs the owner's rights: a new queue's partition, an insert, a claim.
            conn.execute("select pgconductor.register_queue('r'), pgconductor.invoke('t', queue => 'r')")
        finally:
            conn.execute(f"reassign owned by {role} to current_user".encode())
            conn.execute(f"drop role {role}".encode())


def test_dump_of_the_rights_is_the_record_of_them(fresh_site: Site) -> None:
    """The kinds are in a table that a restore into a server without these roles cannot fill, or fills with others'."""
    tables = fresh_site.admin.rows(
        "select c.relname from pg_class c join pg_attribute a on a.attrelid = c.oid"
        " where c.relnamespace = '{s}'::regnamespace and c.relkind in ('r', 'p') and a.atttypid = 'regrole'::regtype"
    )
    assert tables == []


def test_documentation_has_the_same_table() -> None:
    """An administrator reads that a role may not do what it may."""
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    table = {
        name: {kind for kind, cell in zip(KINDS, cells.split("|"), strict=True) if cell.strip()} for name, cells in rows
    }
    assert table == {name: kinds for name, kinds in {**CALLS, **READS}.items() if not name.startswith("_private_kind_")}
