"""`pgconductor doctor`: each judgement on facts made up, and the facts themselves on a database that ails."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from security.site import Site, open_site
from sql.database import Database, open_database
from typer.testing import CliRunner

from pgconductor.cli import app
from pgconductor.db.address import Database as Address
from pgconductor.db.schema import migrate_sync
from pgconductor.doctor import Finding, Verdict, examine, inside, objects, server, vacuum, worst
from pgconductor.doctor.finding import Judged
from pgconductor.embedded import own_server
from pgconductor.testing import Databases
from pgconductor.testing.server import folder_in_memory

OK, WARNING, PROBLEM, UNSEEN = Verdict.OK, Verdict.WARNING, Verdict.PROBLEM, Verdict.UNSEEN

_SERVER = server.Server(180004, "18.4", "on", "on", "on", "read committed", "off", False)
_HOLDER = vacuum.Holder("session", "app, active", 7, 10, 1.0)
_INSIDE = inside.Inside(
    [inside.Queue(1, "q", True, True)],
    [inside.ExpirySlot(0, True, None, False)],
    [],
    [inside.Incarnation("host:1", "1.0", 3)],
    [],
    [],
)


def _oldest(sees_all: bool = True, **change: Any) -> Judged:
    return vacuum.judge_oldest(vacuum.Holders([_HOLDER._replace(**change)], sees_all))


def _inside(**change: Any) -> inside.Inside:
    return _INSIDE._replace(**change)


@pytest.mark.parametrize(
    ("judged", "verdict", "said"),
    [
        (server.judge_version(_SERVER), OK, "18.4"),
        (server.judge_version(_SERVER._replace(version_number=180001, version="18.1")), WARNING, "18.2 or newer"),
        (server.judge_version(_SERVER._replace(version_number=140020, version="14.20")), PROBLEM, "PostgreSQL 15"),
        (server.judge_version(_SERVER._replace(version_number=190000, version="19beta1")), WARNING, "not a release"),
        (server.judge_version(_SERVER._replace(version="18.4 (Debian 18.4-1)")), OK, "18.4"),
        (server.judge_durability(_SERVER), OK, "fsync on"),
        (server.judge_durability(_SERVER._replace(fsync="off")), PROBLEM, "alter system set fsync = on"),
        (server.judge_durability(_SERVER._replace(synchronous_commit="off")), WARNING, "synchronous_commit = on"),
        (server.judge_defaults(_SERVER), OK, "read committed"),
        (server.judge_defaults(_SERVER._replace(isolation="serializable")), WARNING, "40001"),
        (server.judge_defaults(_SERVER._replace(read_only="on")), PROBLEM, "read_only = off"),
        (server.judge_defaults(_SERVER._replace(is_standby=True)), WARNING, "primary"),
        (server.judge_connections(server.Connections(10, 97)), OK, "10 of 97"),
        (server.judge_connections(server.Connections(90, 97)), WARNING, "pooler"),
        (server.judge_connections(server.Connections(94, 97)), PROBLEM, "pooler"),
        (server.judge_notify_queue(0.009), OK, "0.90%"),
        (server.judge_notify_queue(0.02), WARNING, "pg_stat_activity"),
        (server.judge_notify_queue(0.11), PROBLEM, "11.00%"),
        (server.judge_slots([]), OK, "abandoned"),
        (server.judge_slots([server.Slot("o'n", "extended", 1 << 20)]), WARNING, "pg_drop_replication_slot('o''n')"),
        (server.judge_slots([server.Slot("s", "extended", 11 << 30)]), PROBLEM, "11,264 MiB"),
        (server.judge_slots([server.Slot("s", "lost", None)]), PROBLEM, "s ("),
        (server.judge_clock(server.Clocks(100.0, 100.5, 101.0)), OK, "agree"),
        (server.judge_clock(server.Clocks(100.0, 107.0, 101.0)), WARNING, "6 s ahead of"),
        (server.judge_clock(server.Clocks(100.0, 40.0, 101.0)), WARNING, "60 s behind"),
        (vacuum.judge_autovacuum(vacuum.Vacuum("on", "on", [], []), "s"), OK, "autovacuum on"),
        (vacuum.judge_autovacuum(vacuum.Vacuum("off", "on", [], []), "s"), PROBLEM, "alter system set autovacuum"),
        (vacuum.judge_autovacuum(vacuum.Vacuum("on", "off", [], []), "s"), PROBLEM, "set track_counts = on"),
        (vacuum.judge_autovacuum(vacuum.Vacuum("on", "on", ["t"], []), 's"'), PROBLEM, 'alter table "s"""."t" reset'),
        (
            vacuum.judge_autovacuum(vacuum.Vacuum("on", "on", [], ["t (9 dead, 0 live)"]), "s"),
            WARNING,
            'vacuum "s"."t"',
        ),
        (_oldest(), OK, "no transaction"),
        (_oldest(sees_all=False), UNSEEN, "pg_read_all_stats"),
        (_oldest(seconds=301.0), WARNING, "pg_terminate_backend(7)"),
        (_oldest(seconds=301.0, sees_all=False), WARNING, "pg_terminate_backend(7)"),
        (_oldest(seconds=3700.0), PROBLEM, "62 min"),
        (_oldest(seconds=1.0, transactions=2_000_000), OK, ""),
        (_oldest(kind="prepared", name="o'k", pid=None, seconds=400.0), WARNING, "rollback prepared 'o''k'"),
        (_oldest(kind="slot", name="s", pid=None, seconds=None), OK, ""),
        (_oldest(kind="slot", name="s", pid=None, seconds=None, transactions=10**6), WARNING, "replication_slot('s')"),
        (_oldest(kind="standby", seconds=None, transactions=10**8), PROBLEM, "hot_standby_feedback"),
        (vacuum.judge_idle(vacuum.IdleSessions([], True)), OK, "no session"),
        (vacuum.judge_idle(vacuum.IdleSessions([], False)), UNSEEN, "pg_read_all_stats"),
        (vacuum.judge_idle(vacuum.IdleSessions([vacuum.IdleSession(7, "a", "r", 61.0)], True)), WARNING, "'1min'"),
        (vacuum.judge_idle(vacuum.IdleSessions([vacuum.IdleSession(7, "a", "r", 3601.0)], True)), PROBLEM, "(7)"),
        (objects.judge_indexes([], "s"), OK, "valid"),
        (objects.judge_indexes(["i"], "s"), PROBLEM, 'reindex index concurrently "s"."i"'),
        (objects.judge_owner(objects.Owner("o", False, []), "s"), OK, "no superuser"),
        (objects.judge_owner(objects.Owner("o", True, []), "s"), WARNING, "a superuser"),
        (objects.judge_owner(objects.Owner("o", False, ["t"]), "s"), PROBLEM, "_private_grant_rights()"),
        (objects.judge_owner(None, "s"), UNSEEN, "migrate"),
        (objects.judge_public([], "s"), OK, "no rights"),
        (objects.judge_public(["f() (execute)"], "s"), PROBLEM, "revoke all on all routines"),
        (objects.judge_locks(objects.Locks(3200, 64, 100)), OK, "3,200 locks"),
        (objects.judge_locks(objects.Locks(3201, 64, 100)), WARNING, "max_locks_per_transaction = 192"),
        (objects.judge_locks(objects.Locks(6401, 64, 100)), PROBLEM, "max_locks_per_transaction = 320"),
        (inside.judge_partitions(_INSIDE, "s"), OK, "1 queues"),
        (
            inside.judge_partitions(_inside(queues=[inside.Queue(1, "q", False, True)]), "s"),
            PROBLEM,
            "_private_queues where no = 1",
        ),
        (
            inside.judge_partitions(_inside(queues=[inside.Queue(1, "q", True, False)]), "s"),
            PROBLEM,
            "_private_define_partition(1)",
        ),
        (
            inside.judge_partitions(_inside(slots=[inside.ExpirySlot(7, False, None, False)]), "s"),
            PROBLEM,
            "slot 7 has no partition",
        ),
        (inside.judge_partitions(_inside(stray_partitions=["p"]), "s"), WARNING, 'drop table "s"."p"'),
        (inside.judge_expiry(_INSIDE, "s"), OK, "emptied"),
        (inside.judge_expiry(_inside(slots=[inside.ExpirySlot(7, True, 3000.0, True)]), "s"), OK, "emptied"),
        (inside.judge_expiry(_inside(slots=[inside.ExpirySlot(7, True, 8000.0, True)]), "s"), WARNING, "_finished_7"),
        (inside.judge_orphans(_INSIDE), OK, "no dead"),
        (inside.judge_orphans(_inside(orphans=[inside.Orphan("q", 3, 5.0)])), WARNING, "3 of queue 'q'"),
        (inside.judge_orphans(_inside(orphans=[inside.Orphan("q", 3, 61.0)])), PROBLEM, "run a worker"),
        (inside.judge_orphans(_inside(orphans=[inside.Orphan("q", 3, None)])), PROBLEM, "run a worker"),
        (inside.judge_orchestrators(_INSIDE, 3), OK, "program 1.0"),
        (inside.judge_orchestrators(_INSIDE, 4), WARNING, "older schema than 4"),
        (inside.judge_orchestrators(_inside(orchestrators=[]), 3), WARNING, "no orchestrator lives"),
        (
            inside.judge_orchestrators(
                _inside(orchestrators=[inside.Incarnation("a", "1", 3), inside.Incarnation("b", "2", 3)]), 3
            ),
            WARNING,
            "1, 2",
        ),
        (inside.judge_unserved(_INSIDE), OK, "every task"),
        (inside.judge_unserved(_inside(unserved=[inside.Unserved("q", "t", 5, 9.0)])), WARNING, "has task 't'"),
    ],
)
def test_facts_are_judged(judged: Judged, verdict: Verdict, said: str) -> None:
    """A threshold is the wrong way round, or a remedy names another object than the one that ails."""
    found, seen, remedy = judged
    assert found is verdict
    assert said in f"{seen}; {remedy}"
    assert (remedy is None) == (verdict is OK)


def _found(dsn: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(Address(dsn, None, embedded=False))}


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"}, prog_name="pgconductor")
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def db(pgconductor_dsn: str) -> Iterator[Database]:
    """A database of the test's own."""
    with open_database(pgconductor_dsn) as database:
        yield database


def test_ailments_of_the_schema_are_seen_and_the_remedies_work(db: Database) -> None:
    """The queries look in the wrong place: everything is fine, always."""
    number = db.register_queue("q\x1b[2J\n")
    db.register_queue("r")
    before = _found(db.dsn)
    ours = ("schema", "autovacuum", "indexes", "partitions", "expiry", "dead_orchestrators", "unserved_tasks",
            "public_rights", "clock", "locks", "notify_queue", "connections")  # fmt: skip
    assert {name: before[name].verdict for name in ours} == dict.fromkeys(ours, OK)
    db.invoke("r", task="t")
    db.invoke("r", task="nobody's")
    owner = db.register_orchestrator("r")
    assert len(db.claim(owner, "r")) == 1
    db.rows("update {s}._private_orchestrators set died_at = now() - interval '2 min', expires_at = now()")
    db.rows(f"drop function {{s}}._private_flush_{number}")
    db.rows("update pg_index set indisvalid = false where indexrelid = '{s}._private_queue_0_due'::regclass")
    db.rows("grant execute on function {s}.results to public")
    db.rows("alter table {s}._private_queue_0 set (autovacuum_enabled = false)")
    db.rows("create table {s}._private_queue_999 ()")
    db.rows("update {s}._private_expiry_slots set expires_upto = now() - interval '2 hours' where no = 5")
    db.rows(
        "insert into {s}._private_finished (slot, priority, attempt, crashes, generation, depth, state, id, claim_no,"
        " created_at, finished_at, queue, task, payload)"
        " values (5, 0, 0, 0, 0, 0, 'failed', gen_random_uuid(), 0, now(), now(), 'q', 't', '{}')"
    )
    found = _found(db.dsn)
    assert "1 of queue 'r'" in found["dead_orchestrators"].seen
    assert found["dead_orchestrators"].verdict is PROBLEM
    assert "task \"nobody's\" on queue 'r' (1 ready)" in found["unserved_tasks"].seen
    assert "_private_queue_0_due" in found["indexes"].seen
    assert "results" in found["public_rights"].seen
    assert "_private_queue_0" in found["autovacuum"].seen
    assert "5 (2 h ago)" in found["expiry"].seen
    assert "lacks functions" in found["partitions"].seen
    for name in ("partitions", "public_rights", "autovacuum"):
        remedy = found[name].remedy
        assert remedy is not None
        for command in remedy.split("; "):
            db.rows(command)
    found = _found(db.dsn)
    assert "_private_queue_999" in found["partitions"].seen
    assert {name: found[name].verdict for name in ("public_rights", "autovacuum")} == {
        "public_rights": OK,
        "autovacuum": OK,
    }
    db.recover("r")
    assert _found(db.dsn)["dead_orchestrators"].verdict is OK
    db.rows("drop table {s}._private_queue_999")
    db.rows("alter table {s}._private_executions detach partition {s}._private_queue_2")
    assert "has no partition _private_queue_2" in _found(db.dsn)["partitions"].seen


def test_what_holds_up_vacuum_is_named_with_its_end(db: Database) -> None:
    """A transaction that somebody forgot, and nobody can find."""
    session = db.session()
    session.value("select pg_current_xact_id()")
    db.rows("begin; select pg_current_xact_id(); prepare transaction 'for''got'")
    try:
        with psycopg.connect(db.dsn, autocommit=True) as conn:
            holders = conn.execute(vacuum.OLDEST.query, ()).fetchall()
            found = vacuum.OLDEST.decode(holders)
    finally:
        db.rows("rollback prepared 'for''got'")
    assert found.sees_all
    assert ("session", session.pid) in {(h.kind, h.pid) for h in found.holders}
    assert ("prepared", "for'got") in {(h.kind, h.name) for h in found.holders}
    assert all(h.transactions >= 1 for h in found.holders)


def test_replication_slot_without_a_consumer_is_seen(db: Database) -> None:
    """The disk fills with the log that nobody fetches."""
    if db.value("select current_setting('wal_level')") == "minimal":
        pytest.skip("the server keeps no log for slots")
    name = f"doctor_{db.pid}"
    db.value("select pg_create_physical_replication_slot(%s, true)", name)
    try:
        found = _found(db.dsn)["replication_slots"]
        assert found.verdict is not OK
        assert name in found.seen
    finally:
        db.value("select pg_drop_replication_slot(%s)", name)


def test_server_without_room_for_the_locks_of_all_queues_is_told_what_to_raise() -> None:
    """Nothing says so before `status` fails, "out of shared memory", and with it what workers do at that moment."""
    few = {"max_locks_per_transaction": "10", "max_connections": "10", "max_wal_senders": "0"}
    with own_server(settings=few, base_dir=folder_in_memory()) as small:
        with psycopg.connect(small.dsn(), autocommit=True) as conn:
            migrate_sync(conn)
            for number in range(200):
                conn.execute("select pgconductor.register_queue(%s)", (f"q{number}",))
        found = _found(small.dsn())
        assert found["locks"].verdict is PROBLEM
        assert "max_locks_per_transaction" in (found["locks"].remedy or "")
        for name in ("partitions", "expiry", "dead_orchestrators", "orchestrators", "unserved_tasks"):
            assert (found[name].verdict, found[name].remedy) == (UNSEEN, found["locks"].remedy)
        code, _, said = _run("status", "--dsn", small.dsn())
        assert code == 3
        assert "raise max_locks_per_transaction" in said


def test_missing_schema_is_a_problem_and_the_server_is_looked_at_all_the_same(pgconductor_empty_dsn: str) -> None:
    """The first look after an installation that failed is a traceback."""
    found = _found(pgconductor_empty_dsn)
    assert found["schema"].verdict is PROBLEM
    assert found["schema"].remedy == "run pgconductor migrate"
    assert found["server_version"].verdict is OK
    assert "partitions" not in found


def test_command_prints_names_harmlessly_and_exits_with_1_on_a_problem(db: Database) -> None:
    """A queue's name clears the operator's screen; a script takes a broken database for a sound one."""
    db.register_queue("q\x1b[2J\u202e\n[red]")
    db.rows("drop function {s}._private_flush_1")
    code, out, _ = _run("doctor", "--dsn", db.dsn)
    assert code == 1
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[red]" in out
    assert '→ select "pgconductor"._private_define_partition(1)' in out
    code, out, _ = _run("doctor", "--json", "--dsn", db.dsn)
    answer = json.loads(out)
    assert (code, answer["verdict"]) == (1, "problem")
    by_name = {check["check"]: check for check in answer["checks"]}
    assert by_name["partitions"]["verdict"] == "problem"
    assert by_name["indexes"] == {
        "check": "indexes",
        "verdict": "ok",
        "seen": "all indexes are valid",
        "remedy": None,
    }


def test_no_problem_exits_with_0(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning stops a deployment."""
    sound = [
        Finding("one", WARNING, "so so", "look"),
        Finding("two", UNSEEN, "dark", "grant"),
        Finding("three", OK, "fine"),
    ]
    assert worst(sound) is WARNING
    assert worst(sound[1:]) is UNSEEN
    assert worst(sound[2:]) is OK

    def nothing_grave(database: Address, schema: str) -> list[Finding]:
        return sound

    # The name is that of the command, too.
    monkeypatch.setattr(sys.modules["pgconductor.cli.doctor"], "examine", nothing_grave)
    code, out, _ = _run("doctor", "--dsn", db.dsn)
    assert code == 0
    assert "1 unseen, 1 warning, 1 ok" in out


@pytest.fixture
def site(pgconductor_databases: Databases) -> Iterator[Site]:
    """A database with roles of all kinds."""
    with pgconductor_databases.empty() as dsn, open_site(dsn) as site:
        yield site


def test_viewer_sees_what_it_may_and_is_told_what_not(site: Site) -> None:
    """Doctor needs a superuser, or takes what it cannot see for sound."""
    site.session("worker").register_queue("q")
    found = _found(site.dsn_of(site.role("viewer")))
    assert {name for name, finding in found.items() if finding.verdict is UNSEEN} == {
        "oldest_transaction",
        "idle_in_transaction",
    }
    assert found["owner"].verdict is OK
    assert found["partitions"].seen.startswith("1 queues")
    remedy = sql.SQL("grant pg_read_all_stats to {}").format(sql.Identifier(site.role("viewer")))
    site.admin.conn.execute(remedy)
    assert _found(site.dsn_of(site.role("viewer")))["idle_in_transaction"].verdict is OK

    stranger = _found(site.dsn_of(site.role("stranger")))
    assert stranger["schema"].verdict is UNSEEN
    assert "grant --viewer" in (stranger["schema"].remedy or "")
    producer = _found(site.dsn_of(site.role("producer")))
    assert (producer["schema"].verdict, producer["partitions"].verdict) == (OK, UNSEEN)
