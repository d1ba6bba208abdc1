"""What an administrator's settings do to us: time limits, isolation levels, limits of connections.

They are set for the test's database or a role of its own, so that every session gets them that does not set its own.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator

import psycopg
import pytest
import trio
from faults.inside import LIMIT, check_once, invoke, query, server_processes, until, work_on
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import Conductor

HOSTILE = {
    "statement_timeout": "60ms",
    "lock_timeout": "10ms",
    "idle_in_transaction_session_timeout": "50ms",
    "idle_session_timeout": "300ms",
    "transaction_timeout": "60ms",  # PostgreSQL 17 and later
}


def set_defaults(dsn: str, settings: dict[str, str]) -> None:
    """For every session of the database that is opened from now on."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        known = {name for (name,) in conn.execute("select name from pg_settings")}
        for name, value in settings.items():
            if name in known:
                conn.execute(
                    sql.SQL("alter database {} set {} = {}").format(
                        sql.Identifier(conn.info.dbname), sql.Identifier(name), sql.Literal(value)
                    )
                )


def without_limits(dsn: str) -> str:
    """Our own looks must not be hit by the limits either."""
    with psycopg.connect(dsn) as conn:
        known = {name for (name,) in conn.execute("select name from pg_settings")}
    return make_conninfo(dsn, options=" ".join(f"-c {name}=0" for name in HOSTILE if name in known))


async def test_time_limits_of_the_administrator_do_not_reach_the_engine(pgconductor_dsn: str) -> None:
    """A limit meant for applications would end listeners that wait and flushes that take long. (Catalogue no. 30.)"""
    set_defaults(pgconductor_dsn, HOSTILE)
    work = work_on(pgconductor_dsn, 0.0)
    orchestrator = work.orchestrator(lease=2.0)
    roles = ("claim", "flush", "listen", "control")
    beats = "select heartbeat_at - started_at > interval '1.2 s' from pgconductor._private_orchestrators"
    patient = without_limits(pgconductor_dsn)
    async with trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)
        invoke(patient, 10)
        await until(lambda: query(patient, "select count(*) from pgconductor._private_finished") == [(10,)])
        sessions = {role: server_processes(patient, role) for role in roles}
        assert all(len(pids) == 1 for pids in sessions.values()), sessions
        # Four times as long as an idle session may last, and as long as any lock.
        with psycopg.connect(patient, autocommit=True) as conn:
            conn.execute("begin")
            conn.execute("lock table pgconductor._private_finished in share mode")  # flushes wait, heartbeats do not
            invoke(patient, 500)
            await until(lambda: query(patient, beats) == [(True,)])
        await until(lambda: query(patient, "select count(*) from pgconductor._private_finished") == [(510,)])
        assert {role: server_processes(patient, role) for role in roles} == sessions, "a session was ended"
        assert orchestrator.statistics().incarnations == 1
        nursery.cancel_scope.cancel()
    assert work.starts.total() == 510


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_default_isolation_level_of_the_database_changes_nothing(pgconductor_dsn: str, level: str) -> None:
    """SKIP LOCKED fails there after a concurrent update, so claims and flushes would break. (Catalogue no. 31.)"""
    set_defaults(pgconductor_dsn, {"default_transaction_isolation": level})
    work = work_on(pgconductor_dsn, 0.001)
    invoke(pgconductor_dsn, 1000)
    others = [work.orchestrator(concurrency=5) for _ in range(3)]
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for orchestrator in others:
                nursery.start_soon(orchestrator.run)
            drained = await work.orchestrator(concurrency=5).drain()
            await until(
                lambda: query(pgconductor_dsn, "select count(*) from pgconductor._private_executions") == [(0,)]
            )
            nursery.cancel_scope.cancel()
    check_once(pgconductor_dsn, work, 1000)
    assert drained.fenced == 0


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_fifty_invokes_with_one_key_are_one_in_any_default_isolation(pgconductor_dsn: str, level: str) -> None:
    """A client must not be told of a serialization failure for what it asked once. (Catalogue nos. 31 and 54.)"""
    set_defaults(pgconductor_dsn, {"default_transaction_isolation": level})
    conductor = Conductor(pgconductor_dsn, pool_size=10)

    @conductor.task(queue="q")
    async def count(n: int) -> None:
        pass

    ids: Counter[object] = Counter()

    async def invoke_once(n: int) -> None:
        handle = await count.options(dedupe_key="k").invoke(n=n)
        ids[handle.id] += 1

    async with conductor, trio.open_nursery() as nursery:
        for n in range(50):
            nursery.start_soon(invoke_once, n)
    assert list(ids.values()) == [50]
    assert query(pgconductor_dsn, "select count(*) from pgconductor._private_executions") == [(1,)]


@pytest.fixture
def narrow_dsn(pgconductor_dsn: str) -> Iterator[str]:
    """A role that may do everything in the database, and whose number of connections can be limited."""
    role = f"pgconductor_test_{secrets.token_hex(4)}"
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("create role {} login password 'narrow'").format(sql.Identifier(role)))
        conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier(conn.info.user), sql.Identifier(role)))
        try:
            yield make_conninfo(pgconductor_dsn, user=role, password="narrow")
        finally:
            conn.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role])
            conn.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))


async def test_limit_of_connections_costs_time_and_no_work(pgconductor_dsn: str, narrow_dsn: str) -> None:
    """Refused with 53300 for a while: each connection comes back by itself. (Catalogue no. 23.)"""
    role = conninfo_to_dict(narrow_dsn)["user"]
    query(pgconductor_dsn, "select pgconductor.register_queue('q')")
    work = work_on(narrow_dsn, 0.02)
    orchestrator = work.orchestrator(concurrency=2)
    with psycopg.connect(pgconductor_dsn, autocommit=True) as admin, trio.fail_after(LIMIT):
        invoke(pgconductor_dsn, 100)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            for limit in (0, 1, 2):
                await until(lambda: work.starts.total() >= 10)
                admin.execute(f'alter role "{role}" connection limit {limit}'.encode())
                admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [role])
                # Each role tries again and again, and is refused, until there is room for as many as the limit.
                await until(
                    lambda limit=limit: (
                        admin.execute(  # type: ignore[misc]
                            "select count(*) from pg_stat_activity where usename = %s", [role]
                        ).fetchone()
                        == (limit,)
                    )
                )
            admin.execute(f'alter role "{role}" connection limit -1'.encode())
            await until(
                lambda: query(pgconductor_dsn, "select count(*) from pgconductor._private_finished") == [(100,)]
            )
            assert orchestrator.statistics().incarnations == 1
            nursery.cancel_scope.cancel()
    check_once(pgconductor_dsn, work, 100)
