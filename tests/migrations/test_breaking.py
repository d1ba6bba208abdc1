"""Before a breaking migration: the gate, the asking, the waiting; and what a migrator that dies leaves behind."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import psycopg
import pytest
from migrations.fleet import NEW, OLD, asked, register, retire
from migrations.small import BREAK, CREATE_ITEMS, FUNCTIONS, columns, connect, recorded, total

from pgconductor.db.breaking import gate_key, open_gate, shut_gate
from pgconductor.db.call import Call
from pgconductor.db.execute import mapped_errors, run_sync
from pgconductor.db.schema import (
    Migration,
    MigrationReport,
    SchemaVersion,
    SqlSource,
    check_sync,
    migrate_gen,
    migrate_sync,
)
from pgconductor.errors import SchemaTooNew, Unavailable

Connection = psycopg.Connection[tuple[object, ...]]
Steps = Generator[Call[Any], Any, MigrationReport]


@pytest.fixture
def conn(pgconductor_empty_dsn: str) -> Iterator[Connection]:
    """Of the migrator; the old schema is installed."""
    with connect(pgconductor_empty_dsn) as conn:
        migrate_sync(conn, source=OLD)
        yield conn


@pytest.fixture
def fleet(conn: Connection, pgconductor_empty_dsn: str) -> Iterator[Connection]:
    """Of the orchestrators."""
    with connect(pgconductor_empty_dsn) as fleet:
        yield fleet


def is_nap(call: Call[Any]) -> bool:
    return b"pg_sleep" in call.query


def run_until_nap(conn: Connection, steps: Steps, call: Call[Any]) -> Call[Any]:
    """Execute the calls up to the next nap, which is returned and can be left out."""
    while not is_nap(call):
        call = steps.send(run_sync(conn, call))
    return call


def finish(conn: Connection, steps: Steps, reply: object = None) -> MigrationReport:
    """Execute the remaining calls; `reply` is that of the call that was left out."""
    try:
        call = steps.send(reply)
        while True:
            call = steps.send(run_sync(conn, call))
    except StopIteration as ended:
        report: MigrationReport = ended.value
        return report


def test_older_orchestrator_is_asked_and_waited_for(conn: Connection, fleet: Connection) -> None:
    """Or tables change under a running program that does not know it. One that is new enough is left alone."""
    older, newer = register(fleet, 2), register(fleet, 3)
    fleet.execute(f'listen "control_{older}"'.encode())
    fleet.execute(f'listen "control_{newer}"'.encode())
    steps = migrate_gen("pgconductor", NEW, 1.0, 10.0)
    run_until_nap(conn, steps, next(steps))
    assert asked(fleet) == [older]
    assert [notify.channel for notify in fleet.notifies(timeout=5, stop_after=1)] == [f"control_{older}"]
    run_until_nap(conn, steps, steps.send(None))
    assert columns(fleet) == ["id", "note", "size"], "nothing changes while it lives"
    assert list(fleet.notifies(timeout=0)) == [], "asked once"
    retire(fleet, older)
    assert finish(conn, steps) == MigrationReport((3,), True, 3)
    assert columns(fleet) == ["id", "size"]


def test_harmless_migration_asks_nobody(conn: Connection, fleet: Connection) -> None:
    """Or each deploy interrupts the whole fleet."""
    register(fleet, 2)
    more = Migration(3, "0003_more.sql", "create table @schema@.more ()")
    assert migrate_sync(conn, source=SqlSource((*OLD.migrations, more), OLD.functions)).applied == (3,)
    assert asked(fleet) == []


@pytest.mark.parametrize("state", ["dead", "expired"])
def test_dead_orchestrator_is_not_waited_for(conn: Connection, fleet: Connection, state: str) -> None:
    """Or the tombstone of a killed process holds up a deploy for a day."""
    register(fleet, 2)
    column = "died_at" if state == "dead" else "expires_at"
    fleet.execute(f"update pgconductor._private_orchestrators set {column} = now()".encode())
    assert migrate_sync(conn, source=NEW, stop_wait=0.1).applied == (3,)


def test_killed_orchestrator_delays_a_breaking_migration_for_its_lease_at_most(
    conn: Connection, fleet: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Or somebody has to look for its row and delete it. The log says who is waited for."""
    began = time.monotonic()
    register(fleet, 2, lease=0.6)
    with caplog.at_level(logging.WARNING, "pgconductor.migration"):
        assert migrate_sync(conn, source=NEW).applied == (3,)
    assert time.monotonic() - began >= 0.6
    first, last = caplog.messages
    assert "0003_break.sql is breaking; asked 1 orchestrators of older versions to stop" in first
    assert "host:2 (pgconductor 0.1, schema 2; its lease has 0." in first
    assert "gone, applying 0003_break.sql" in last


def test_patience_ends_and_the_error_names_who_did_not_stop(conn: Connection, fleet: Connection) -> None:
    """Or a process that ignores the request hangs every deploy; and giving up must let it and its like go on."""
    register(fleet, 2)
    with pytest.raises(Unavailable, match=r"0003_break\.sql is breaking, and after 0\.2 s .*: host:2 .*stop them and"):
        migrate_sync(conn, source=NEW, stop_wait=0.2)
    assert columns(conn) == ["id", "note", "size"]
    assert recorded(conn) == [1, 2]
    register(fleet, 2)


# --- the gate ---


def test_registration_in_flight_holds_the_gate_open(conn: Connection, fleet: Connection) -> None:
    """Or an orchestrator that is about to commit its row is overlooked, and runs on tables it does not know."""
    with fleet.transaction():
        older = register(fleet, 2)
        steps = migrate_gen("pgconductor", NEW, 1.0, 10.0)
        run_until_nap(conn, steps, next(steps))
        run_until_nap(conn, steps, steps.send(None))
    run_until_nap(conn, steps, steps.send(None))
    assert asked(fleet) == [older]
    retire(fleet, older)
    assert finish(conn, steps).applied == (3,)


def test_older_program_is_refused_while_the_gate_is_shut_and_after(conn: Connection, fleet: Connection) -> None:
    """Or the supervisor of the one that stopped starts it again at once, and the migrator waits for ever."""
    older = register(fleet, 2)
    steps = migrate_gen("pgconductor", NEW, 1.0, 10.0)
    run_until_nap(conn, steps, next(steps))
    with pytest.raises(SchemaTooNew, match=r"about to have a breaking migration.*schema version 2"), mapped_errors():
        register(fleet, 2)
    retire(fleet, older)
    finish(conn, steps)
    applied = pytest.raises(SchemaTooNew, match=r"breaking migration 0003_break\.sql.*only migrations up to 2")
    with applied, mapped_errors():
        register(fleet, 2)
    register(fleet, 3)


def test_older_program_registers_over_a_harmless_migration(conn: Connection, fleet: Connection) -> None:
    """Or a rolling deploy cannot restart what it has not replaced yet."""
    more = Migration(3, "0003_more.sql", "create table @schema@.more ()")
    migrate_sync(conn, source=SqlSource((*OLD.migrations, more), OLD.functions))
    register(fleet, 2)


def test_new_program_waits_a_moment_for_the_gate_to_open(conn: Connection, fleet: Connection) -> None:
    """Or the first of a new version, quick to see that the migration has committed, is turned away."""
    migrate_sync(conn, source=NEW)
    assert run_sync(conn, shut_gate("pgconductor"))
    blocked = (
        "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock' and wait_event = 'advisory'"
    )
    errors: list[BaseException] = []

    def start() -> None:
        try:
            register(fleet, 3)
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    while thread.is_alive() and conn.execute(blocked, (fleet.info.backend_pid,)).fetchall() != [(1,)]:
        pass
    run_sync(conn, open_gate("pgconductor"))
    thread.join()
    assert errors == []


def test_both_sides_mean_the_same_gate(conn: Connection) -> None:
    """Or the migrator shuts a door that nobody goes through."""
    key = conn.execute("select pgconductor._private_key_gate()").fetchall()
    assert key == [(run_sync(conn, gate_key("pgconductor")),)]
    assert run_sync(conn, gate_key("another")) != key[0][0]


def test_session_that_lost_the_gate_migrates_nothing(conn: Connection, fleet: Connection) -> None:
    """Behind a transaction pooler the gate may stay with a session that others use; older ones register meanwhile."""
    steps = migrate_gen("pgconductor", NEW, 1.0, 1.0)
    call = next(steps)
    while not call.query.startswith(b"begin"):
        call = steps.send(run_sync(conn, call))
    run_sync(conn, open_gate("pgconductor"))
    with pytest.raises(Unavailable, match="direct connection, not through a transaction pooler"):
        finish(conn, steps, run_sync(conn, call))
    conn.rollback()
    assert columns(fleet) == ["id", "note", "size"]


def test_waiting_for_the_gate_ends_and_names_the_holder(conn: Connection, fleet: Connection) -> None:
    """Or a second migrator waits without a bound, and without a word."""
    fleet.execute("set application_name = 'the other one'")
    run_sync(fleet, shut_gate("pgconductor"))
    with pytest.raises(Unavailable, match=rf"process {fleet.info.backend_pid} \(the other one\)"):
        migrate_sync(conn, source=NEW, lock_wait=0.1, stop_wait=0.1)


def test_fresh_install_goes_through_a_breaking_migration(pgconductor_empty_dsn: str) -> None:
    """Or a new database cannot be installed once there has been one."""
    with connect(pgconductor_empty_dsn) as conn:
        assert migrate_sync(conn, source=NEW) == MigrationReport((1, 2, 3), True, 3)
        more = Migration(2, "0002_more.sql", "create table @schema@.more ()")
        early = Migration(1, "0001_early.sql", CREATE_ITEMS.text, is_breaking=True)
        assert migrate_sync(conn, "early", source=SqlSource((early, more, BREAK), FUNCTIONS)).version == 3
        held = "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"
        assert conn.execute(held).fetchall() == [(0,)]


# --- who dies ---


def test_versions_schema_and_gate_agree_after_a_kill_before_each_call(pgconductor_empty_dsn: str) -> None:
    """Or a killed migrator leaves half of a breaking change, or keeps the older programs out of a schema as it was."""
    with connect(pgconductor_empty_dsn) as admin:
        for calls in range(1000):
            admin.execute("drop schema if exists pgconductor cascade")
            migrate_sync(admin, source=OLD)
            older = register(admin, 2)
            ended = False
            with connect(pgconductor_empty_dsn) as conn:
                steps = migrate_gen("pgconductor", NEW, 60.0, 60.0)
                try:
                    call = next(steps)
                    for number in range(1000):
                        if number == calls:
                            admin.execute("select pg_terminate_backend(%s, 5000)", (conn.info.backend_pid,))
                        if is_nap(call):
                            retire(admin, older)
                        try:
                            reply = run_sync(conn, call)
                        except psycopg.Error as error:
                            call = steps.throw(error)
                        else:
                            call = steps.send(reply)
                except Unavailable:
                    pass
                except StopIteration:
                    ended = True
            is_applied = recorded(admin) == [1, 2, 3]
            assert is_applied or recorded(admin) == [1, 2]
            assert columns(admin) == (["id", "size"] if is_applied else ["id", "note", "size"])
            if is_applied:
                with pytest.raises(SchemaTooNew), mapped_errors():
                    register(admin, 2)
            else:
                assert not ended
                retire(admin, register(admin, 2))  # nobody keeps it out
                retire(admin, older)
            assert migrate_sync(admin, source=NEW).applied == (() if is_applied else (3,))
            assert check_sync(admin, source=NEW) == SchemaVersion(3, 3, has_own_functions=True)
            assert total(admin) == 1
            if ended:
                assert calls > 15
                return


_PROCESS = """
import sys, psycopg
from migrations.fleet import NEW
from pgconductor.db.schema import migrate_sync
with psycopg.connect(sys.argv[1], autocommit=True, application_name="rival") as conn:
    print(migrate_sync(conn, source=NEW).applied)
"""


def start_migrator(dsn: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, dsn],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(conn: Connection, query: str, *params: object) -> None:
    give_up_at = time.monotonic() + 60
    while conn.execute(query.encode(), params or None).fetchall() != [(True,)]:
        assert time.monotonic() < give_up_at, query
        time.sleep(0.02)


def test_migrator_killed_while_it_waits_lets_older_programs_in_again(
    fleet: Connection, pgconductor_empty_dsn: str
) -> None:
    """Or a deploy that was killed between asking and migrating has stopped the old fleet for good."""
    older = register(fleet, 2)
    migrator = start_migrator(pgconductor_empty_dsn)
    try:
        until(fleet, "select stop_requested_at is not null from pgconductor._private_orchestrators")
    finally:
        migrator.kill()
        migrator.communicate()
    retire(fleet, older)
    until(fleet, "select not exists (select from pg_stat_activity where application_name = 'rival')")
    register(fleet, 2)
    assert asked(fleet) == []


def test_of_20_processes_at_once_one_makes_a_breaking_migration_and_none_fails(
    fleet: Connection, pgconductor_empty_dsn: str
) -> None:
    """Or a deploy of 20 replicas crashes 19. The older one stays until all 20 wait, for it or for each other."""
    older = register(fleet, 2)
    rivals = [start_migrator(pgconductor_empty_dsn) for _ in range(20)]
    try:
        until(
            fleet,
            "select count(*) filter (where query like '%pg_sleep%') = 20 from pg_stat_activity, pg_sleep(0.1)"
            " where application_name = 'rival'",
        )
        retire(fleet, older)
        replies = [(*rival.communicate(timeout=60), rival.returncode) for rival in rivals]
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert [reply for reply in replies if reply[2] != 0] == []
    assert sorted(out for out, _, _ in replies) == ["()\n"] * 19 + ["(3,)\n"]
    assert sum("asked 1 orchestrators" in err for _, err, _ in replies) == 1
    assert recorded(fleet) == [1, 2, 3]
