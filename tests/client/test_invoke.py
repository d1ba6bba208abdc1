"""Invoking: what is inserted, in whose transaction, and what is refused before anything is sent."""

from __future__ import annotations

import asyncio  # noqa: TID251 - programs on asyncio are users too
import functools
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
import trio
from client.database import execute, live, rows, sleeping_worker, value, wakeups
from client.worker_by_hand import open_worker
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow, dict_row

from pgconductor import (
    Conductor,
    Context,
    InvalidOption,
    InvalidPayload,
    Misuse,
    NoDatabase,
    NotOpen,
    SchemaMissing,
    TrioConnection,
    Unavailable,
)
from pgconductor.testing.proxy import open_chaos_proxy

NOWHERE = "postgresql://nobody:hunter2@127.0.0.1:1/nothing?connect_timeout=2"


async def greet(ctx: Context, name: str, *, times: int = 1) -> str:
    return f"Hello, {name}!" * times


async def anything(*, data: Any) -> Any:
    return data


# --- what is inserted ---


async def test_invoked_row_has_what_was_asked(pgconductor_dsn: str) -> None:
    """An option lost on its way, or put into another's column."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(queue="fast")(greet)
    later = datetime(2040, 2, 29, 12, tzinfo=UTC)
    async with conductor:
        handle = await task.options(priority=-7, run_at=later, dedupe_key="k").invoke("Ada", times=2)
        other = await task.options(queue="slow", delay=timedelta(hours=1)).invoke(name="Bob")
    assert handle.created
    found = rows(
        pgconductor_dsn,
        "select id, queue, task, state::text, priority, run_at, dedupe_key, payload"
        " from pgconductor._private_executions order by queue",
    )
    assert found[0] == (handle.id, "fast", "greet", "scheduled", -7, later, "k", {"name": "Ada", "times": 2})
    assert found[1][:3] == (other.id, "slow", "greet")
    assert timedelta(minutes=59) < found[1][5] - datetime.now(UTC) <= timedelta(minutes=60)


async def test_ten_thousand_calls_are_inserted_at_once_and_in_order(pgconductor_dsn: str) -> None:
    """Handles that mean another call's execution, or a batch that is cut."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(greet)
    async with conductor:
        handles = await task.invoke_many(task.bind(name=str(n)) for n in range(10_000))
        found = rows(pgconductor_dsn, "select id, payload->>'name' from pgconductor._private_executions")
        by_id: dict[Any, Any] = dict(found)
        assert [by_id[handle.id] for handle in handles] == [str(n) for n in range(10_000)]
        with pytest.raises(InvalidOption, match="at most 10,000 calls"):
            await task.invoke_many([task.bind(name="x")] * 10_001)
    assert live(pgconductor_dsn) == 10_000


async def test_empty_batch_needs_no_database() -> None:
    """A statement with empty arrays, or an error, for nothing to do."""
    conductor = Conductor(NOWHERE)
    assert await conductor.task(greet).invoke_many([]) == []
    assert await conductor.invoke_many([]) == []


async def test_batch_too_large_for_a_statement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server error about the message size, after the memory is gone."""
    monkeypatch.setattr("pgconductor.invocations.MAX_CALL_BYTES", 1_000)
    conductor = Conductor(NOWHERE)
    task = conductor.task(greet)
    async with conductor:
        with pytest.raises(InvalidPayload, match="at most 1,000 go into one statement"):
            await task.invoke_many([task.bind(name="x" * 500)] * 2)


async def test_hundred_invokes_at_once_with_one_key_are_one_execution(pgconductor_dsn: str) -> None:
    """A second live execution of a key."""
    conductor = Conductor(pgconductor_dsn, pool_size=8)
    call = conductor.task(greet).options(dedupe_key="once")
    found: list[tuple[object, bool]] = []

    async def invoke() -> None:
        handle = await call.invoke(name="x")
        found.append((handle.id, handle.created))

    async with conductor, trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(invoke)
    assert len({id for id, _ in found}) == 1
    assert [created for _, created in found].count(True) == 1
    assert live(pgconductor_dsn) == 1


async def test_one_key_twice_in_a_batch_is_one_execution(pgconductor_dsn: str) -> None:
    """The statement failing over its own rows, or a result for only one of the positions."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(greet)
    async with conductor:
        keyed = task.options(dedupe_key="k")
        calls = [keyed.bind(name="first"), task.bind(name="between"), keyed.bind(name="second")]
        first, between, second = await task.invoke_many(calls)
    assert (first.id, first.created) == (second.id, not second.created)
    assert between.id != first.id
    payloads = rows(pgconductor_dsn, "select payload->>'name' from pgconductor._private_executions order by 1")
    assert payloads == [("between",), ("first",)]


# --- by name ---


async def test_name_of_a_task_elsewhere_goes_to_the_queue_its_program_registered(pgconductor_dsn: str) -> None:
    """An execution that waits for ever on a queue where no worker has the task."""
    with open_worker(pgconductor_dsn, ["elsewhere"], queue="theirs") as worker:
        execute(pgconductor_dsn, "select pgconductor.register_tasks(array['elsewhere'], 'theirs')")
        async with Conductor(pgconductor_dsn) as conductor:
            handle = await conductor.invoke("elsewhere", {"a": [1, None, {"b": 0.5}]}, priority=3)
            claimed = worker.claim()
            assert [c.id for c in claimed] == [handle.id]
            worker.complete(claimed[0], {"x": [1]})
            assert await handle.result(timeout=5) == {"x": [1]}
            unknown = await conductor.invoke("never heard of")
    queue = "select queue, payload from pgconductor._private_executions where id = %s"
    assert rows(pgconductor_dsn, queue, unknown.id) == [("default", {})]


async def test_name_of_a_declared_task_is_validated_as_the_task_itself(pgconductor_dsn: str) -> None:
    """A payload that the handler cannot take, found by the worker instead of the caller."""
    conductor = Conductor(pgconductor_dsn)
    conductor.task(queue="fast")(greet)
    async with conductor:
        with pytest.raises(InvalidPayload, match="nmae"):
            await conductor.invoke("greet", {"name": "x", "nmae": "y"})
        handle = await conductor.invoke("greet", {"name": "x"})
    assert (
        value(pgconductor_dsn, "select queue from pgconductor._private_executions where id = %s", handle.id) == "fast"
    )


# --- the caller's own transaction ---


async def test_rolled_back_invoke_leaves_no_row_and_no_wakeup(pgconductor_dsn: str) -> None:
    """Work for data that does not exist, and workers woken for nothing."""
    task = Conductor().task(greet)  # neither open nor told where the database is: the connection knows
    with sleeping_worker(pgconductor_dsn) as sleeper:
        async with await TrioConnection.connect(pgconductor_dsn) as conn:
            await task.options(conn=conn).invoke(name="x")
            await task.options(conn=conn).invoke_many([task.bind(name="y")])
            await conn.rollback()
            assert (live(pgconductor_dsn), wakeups(sleeper)) == (0, 0)
            await task.options(conn=conn).invoke(name="x")
            await conn.commit()
            assert (live(pgconductor_dsn), wakeups(sleeper)) == (1, 1)


def test_rolled_back_sync_invoke_leaves_no_row_and_no_wakeup(pgconductor_dsn: str) -> None:
    """The same without an event loop."""
    task = Conductor().task(greet)
    with sleeping_worker(pgconductor_dsn) as sleeper, psycopg.connect(pgconductor_dsn) as conn:
        task.options(conn=conn).invoke(name="x")
        task.options(conn=conn).invoke_many([task.bind(name="y")])
        conn.rollback()
        assert (live(pgconductor_dsn), wakeups(sleeper)) == (0, 0)
        task.options(conn=conn).invoke(name="x")
        conn.commit()
        assert (live(pgconductor_dsn), wakeups(sleeper)) == (1, 1)


@pytest.mark.parametrize("autocommit", [False, True])
async def test_callers_connection_is_left_as_it_was(pgconductor_dsn: str, autocommit: bool) -> None:
    """A commit in the middle of the caller's transaction, or settings changed under its feet."""
    task = Conductor().task(greet)
    connect = TrioConnection[DictRow].connect
    async with await connect(pgconductor_dsn, autocommit=autocommit, row_factory=dict_row) as conn:
        settings = conn.settings()
        handle = await task.options(conn=conn).invoke(name="x")
        assert handle.created
        assert conn.settings() == settings
        in_transaction = TransactionStatus.IDLE if autocommit else TransactionStatus.INTRANS
        assert conn.info.transaction_status == in_transaction
        assert live(pgconductor_dsn) == int(autocommit)
        async with conn.transaction(force_rollback=True):
            await task.options(conn=conn).invoke(name="x")
            assert conn.info.transaction_status == TransactionStatus.INTRANS


async def test_invoke_in_the_callers_pipeline_returns_its_handles(pgconductor_dsn: str) -> None:
    """Rows inserted, and an error instead of handles: in a pipeline a result is there only when asked for."""
    task = Conductor().task(greet)
    async with await TrioConnection.connect(pgconductor_dsn) as conn, conn.pipeline():
        await conn.execute("create temporary table before ()")
        handle = await task.options(conn=conn).invoke(name="x")
        await conn.execute("create temporary table after ()")
    with psycopg.connect(pgconductor_dsn) as sync_conn, sync_conn.pipeline():
        other = task.options(conn=sync_conn).invoke(name="y")
    ids = rows(pgconductor_dsn, "select id from pgconductor._private_executions order by payload->>'name'")
    assert ids == [(handle.id,), (other.id,)]


async def test_callers_aborted_transaction_speaks_for_itself(pgconductor_dsn: str) -> None:
    """An error of the caller's transaction dressed up as one of ours."""
    task = Conductor().task(greet)
    async with await TrioConnection.connect(pgconductor_dsn) as conn:
        with pytest.raises(psycopg.errors.DivisionByZero):
            await conn.execute("select 1 / 0")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            await task.options(conn=conn).invoke(name="x")
        await conn.rollback()


def test_asyncio_connection_invokes_in_its_own_transaction(pgconductor_dsn: str) -> None:
    """Producers on asyncio left out, although only their connection is awaited."""
    task = Conductor().task(greet)

    async def produce() -> None:
        async with await psycopg.AsyncConnection.connect(pgconductor_dsn) as conn:
            await task.options(conn=conn).invoke(name="x")
            assert live(pgconductor_dsn) == 0

    asyncio.run(produce())
    assert live(pgconductor_dsn) == 1


async def test_asyncio_connection_is_refused_under_trio(pgconductor_dsn: str) -> None:
    """An obscure error from the depths of asyncio."""
    task = Conductor().task(greet)
    with psycopg.connect(pgconductor_dsn) as sync_conn:
        conn = psycopg.AsyncConnection(sync_conn.pgconn)
        with pytest.raises(Misuse, match=r"TrioConnection\.connect"):
            await task.options(conn=conn).invoke(name="x")
        with pytest.raises(InvalidOption, match="without await"):
            await Conductor().invoke("greet", conn=sync_conn)  # type: ignore[arg-type]


# --- lifetime ---


async def test_closed_conductor_names_the_remedy() -> None:
    """An AttributeError on None."""
    conductor = Conductor(NOWHERE)
    with pytest.raises(NotOpen, match="async with conductor"):
        await conductor.task(greet).invoke(name="x")
    with pytest.raises(NotOpen, match="async with conductor"):
        _ = conductor.conninfo


async def test_nested_blocks_share_one_pool_until_the_last_ends(pgconductor_dsn: str) -> None:
    """An orchestrator that ends taking the application's pool with it, or connections that stay."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(greet)
    async with conductor:
        async with conductor:
            await task.invoke(name="x")
        await task.invoke(name="x")
        sessions = (
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
        assert value(pgconductor_dsn, sessions) == 1
    with pytest.raises(NotOpen):
        await task.invoke(name="x")
    async with conductor:
        await task.invoke(name="x")


def test_conductor_serves_one_trio_run_after_the_other_and_not_two_at_once(pgconductor_dsn: str) -> None:
    """A pool used from two loops."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(greet)

    async def invoke() -> None:
        async with conductor:
            await task.invoke(name="x")

    async def invoke_here() -> None:
        await task.invoke(name="x")

    async def hold() -> None:
        async with conductor:
            for intruder in (invoke, invoke_here):
                with pytest.raises(Misuse, match=r"another trio\.run"):
                    await trio.to_thread.run_sync(trio.run, intruder)
            await task.invoke(name="x")

    trio.run(invoke)
    trio.run(hold)
    trio.run(invoke)
    assert live(pgconductor_dsn) == 3


def test_asyncio_is_sent_to_the_sync_client() -> None:
    """A hang, or Trio's complaint about its own internals."""
    conductor = Conductor(NOWHERE)
    task = conductor.task(greet)

    async def enter() -> None:
        async with conductor:
            raise AssertionError("unreachable")

    async def invoke() -> None:
        await task.invoke(name="x")

    for misuse in (enter, invoke):
        with pytest.raises(Misuse, match=r"conductor\.sync\(\)"):
            asyncio.run(misuse())


# --- no database, no schema ---


async def test_no_database_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to whatever libpq's defaults mean."""
    monkeypatch.delenv("PGCONDUCTOR_DSN", raising=False)
    monkeypatch.setenv("DATABASE_URL", "")
    conductor = Conductor()
    with pytest.raises(NoDatabase, match=r"PGCONDUCTOR_DSN or DATABASE_URL.*embedded"):
        async with conductor:
            raise AssertionError("unreachable")
    with pytest.raises(NoDatabase, match="PGCONDUCTOR_DSN"), conductor.sync():
        raise AssertionError("unreachable")


async def test_environment_names_the_database_when_it_is_first_needed(
    monkeypatch: pytest.MonkeyPatch, pgconductor_dsn: str
) -> None:
    """The environment read at import, or in the wrong order."""
    conductor = Conductor()
    task = conductor.task(greet)
    monkeypatch.setenv("DATABASE_URL", NOWHERE)
    monkeypatch.setenv("PGCONDUCTOR_DSN", pgconductor_dsn)
    async with conductor:
        await task.invoke(name="x")
    monkeypatch.delenv("PGCONDUCTOR_DSN")
    async with conductor:
        assert conductor.conninfo == conductor.listen_conninfo == NOWHERE


async def test_server_that_does_not_answer_is_named_without_the_password() -> None:
    """A secret in the log, or a driver's error without remedy."""
    conductor = Conductor(NOWHERE)
    task = conductor.task(greet)
    async with conductor:
        with pytest.raises(
            NoDatabase, match=r"host 127\.0\.0\.1, port 1, database nothing, user nobody.*start it"
        ) as told:
            await task.invoke(name="x")
    with conductor.sync() as client, pytest.raises(NoDatabase, match=r"port 1") as told_sync:
        client.invoke(task, name="x")
    for error in (told.value, told_sync.value):
        assert "hunter2" not in f"{error!r} {error.__cause__!r}"


@pytest.mark.parametrize(
    ("dsn", "said"),
    [
        ("", "is empty"),
        ("postgresql+psycopg://u:hunter2@h/d", "SQLAlchemy"),
        ("u:hunter2@h/d", "not a connection string"),
        ("host=h password='hunter2", "not a connection string"),
        (5, "must be a str"),
    ],
)
def test_malformed_dsn_is_refused_without_repeating_it(dsn: Any, said: str) -> None:
    """libpq's message quotes the part it does not understand, which may be the password."""
    with pytest.raises(InvalidOption, match=said) as told:
        Conductor(dsn)
    assert "hunter2" not in str(told.value)
    assert told.value.__cause__ is None


@pytest.mark.parametrize(
    "options",
    [
        {"dsn": NOWHERE, "embedded": True},
        {"pool_size": 0},
        {"pool_size": True},
        {"schema": ""},
        {"schema": "x" * 64},
        {"schema": "pg_x"},
    ],
)
def test_bad_option_of_the_conductor_is_refused(options: dict[str, Any]) -> None:
    """A conductor that fails later, elsewhere."""
    with pytest.raises(InvalidOption):
        Conductor(**options)


async def test_missing_schema_names_migrate_which_installs_it(pgconductor_empty_dsn: str) -> None:
    """ "function does not exist" for somebody who forgot a command."""
    conductor = Conductor(pgconductor_empty_dsn, schema='odd "name" %s')
    task = conductor.task(greet)
    async with conductor:
        with pytest.raises(SchemaMissing, match="pgconductor migrate"):
            await task.invoke(name="x")
        with pytest.raises(SchemaMissing, match="pgconductor migrate"):
            await conductor.check_schema()
        assert (await conductor.migrate()).applied
        await conductor.check_schema()
        handle = await task.invoke(name="x")
        assert handle.created
        (status,) = await conductor.queue_status()
        assert (status.queue, status.ready) == ("default", 1)
        assert await conductor.orchestrator_status() == []


async def test_pooled_dsn_prepares_nothing(pgconductor_dsn: str) -> None:
    """ "prepared statement does not exist" behind a transaction pooler."""
    conductor = Conductor(pgconductor_dsn, listen_dsn=pgconductor_dsn, pool_size=1)
    assert conductor.prepare_threshold is None
    task = conductor.task(greet)
    async with conductor:
        for _ in range(10):
            await task.invoke(name="x")
        pool = conductor._open.pool if conductor._open else None
        assert pool is not None
        async with pool.connection() as conn:
            cursor = await conn.execute("select count(*) from pg_prepared_statements")
            assert await cursor.fetchone() == (0,)


# --- a lost reply ---


async def test_lost_reply_is_an_error_that_says_so(pgconductor_dsn: str) -> None:
    """Executions doubled in silence: the first attempt may have been committed."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        task = conductor.task(greet)
        async with conductor:
            await conductor.queue_status()
            proxy.cut_reply(b"invoke_many")
            with pytest.raises(Unavailable, match=r"may have taken effect or not.*dedupe_key"):
                await task.invoke(name="x")
    assert live(pgconductor_dsn) == 1


async def test_lost_reply_is_repeated_if_every_call_has_a_key(pgconductor_dsn: str) -> None:
    """An error where asking again is harmless, or a second execution."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        task = conductor.task(greet)
        async with conductor:
            await conductor.queue_status()
            proxy.cut_reply(b"invoke_many")
            handle = await task.options(dedupe_key="k").invoke(name="x")
            proxy.cut_reply(b"invoke_many")
            with pytest.raises(Unavailable):
                await task.invoke_many([task.options(dedupe_key="l").bind(name="x"), task.bind(name="x")])
    ids = rows(pgconductor_dsn, "select id from pgconductor._private_executions where dedupe_key = 'k'")
    assert ids == [(handle.id,)]
    assert live(pgconductor_dsn) == 3


async def test_connection_that_broke_while_idle_is_replaced(pgconductor_dsn: str) -> None:
    """An error after each restart of the server, for everybody's first call."""
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(greet)
    async with conductor:
        await task.invoke(name="x")
        ended = rows(
            pgconductor_dsn,
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()",
        )
        assert ended == [(True,)]
        await task.invoke(name="x")
    assert live(pgconductor_dsn) == 2


# --- bad input: nothing is sent ---

_DEEP = functools.reduce(lambda inner, _: [inner], range(100), list[Any]())
_CYCLE: list[Any] = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize(
    "data",
    [
        "a\0b",
        {"a\0b": 1},
        "\ud800",
        {"\udfff": 1},
        math.nan,
        [math.inf],
        {"x": -math.inf},
        _DEEP,
        _CYCLE,
        10**4_300,
        "x" * (1 << 20),
        {1: "a key that would become a text"},
        object(),
        1 + 2j,
    ],
    ids=[
        "nul",
        "nul-key",
        "surrogate",
        "surrogate-key",
        "nan",
        "inf",
        "minus-inf",
        "deep",
        "cycle",
        "digits",
        "large",
        "int-key",
        "object",
        "complex",
    ],
)
@pytest.mark.parametrize("how", ["task", "name", "batch", "sync", "sync name"])
async def test_payload_that_cannot_be_stored_is_refused_before_anything_is_sent(data: Any, how: str) -> None:
    """A server error in the caller, a row no worker can read, or a transaction of the caller's aborted."""
    conductor = Conductor(NOWHERE)
    task = conductor.task(anything)
    async with conductor:
        with conductor.sync() as client:

            async def invoke() -> None:
                match how:
                    case "task":
                        await task.invoke(data=data)
                    case "name":
                        await conductor.invoke("elsewhere", {"data": data})
                    case "batch":
                        await task.invoke_many([task.bind(data=0), task.bind(data=data)])
                    case "sync":
                        client.invoke(task, data=data)
                    case _:
                        client.invoke("elsewhere", {"data": data})

            with pytest.raises(InvalidPayload, match=r"anything|elsewhere"):
                await invoke()


@pytest.mark.parametrize(
    "options",
    [
        {"queue": ""},
        {"queue": "x" * 129},
        {"queue": "a\0b"},
        {"queue": "\ud800"},
        {"queue": 5},
        {"priority": 2**31},
        {"priority": -(2**31) - 1},
        {"priority": 1.5},
        {"delay": -1},
        {"delay": math.nan},
        {"delay": math.inf},
        {"delay": 10**18},
        {"delay": "5"},
        {"run_at": datetime(2030, 1, 1)},  # noqa: DTZ001 - naive is what is refused
        {"run_at": datetime.max.replace(tzinfo=UTC)},
        {"run_at": datetime.min.replace(tzinfo=UTC)},
        {"run_at": datetime(2030, 1, 1, tzinfo=UTC), "delay": 1},
        {"dedupe_key": ""},
        {"dedupe_key": "x" * 513},
        {"dedupe_key": "a\0b"},
    ],
    ids=repr,
)
async def test_option_outside_its_range_is_refused_before_anything_is_sent(options: dict[str, Any]) -> None:
    """An overflow in the server, or a silently different time."""
    conductor = Conductor(NOWHERE)
    async with conductor:
        with pytest.raises(InvalidOption):
            await conductor.invoke("elsewhere", {}, **options)
        with conductor.sync() as client, pytest.raises(InvalidOption):
            client.invoke("elsewhere", {}, **options)


@pytest.mark.parametrize("name", ["", "x" * 129, "é" * 65, "a\0b", "\ud800", 5, None])
async def test_name_that_cannot_be_a_tasks_is_refused(name: Any) -> None:
    """A row that no program can ever have the task for."""
    async with Conductor(NOWHERE) as conductor:
        with pytest.raises(InvalidOption, match="a task's name"):
            await conductor.invoke(name, {})


@pytest.mark.parametrize("payload", [[1], "x", 5, {1: 2}])
async def test_payload_that_is_no_object_is_refused(payload: Any) -> None:
    """The handler's parameters have names."""
    async with Conductor(NOWHERE) as conductor:
        with pytest.raises(InvalidPayload):
            await conductor.invoke("elsewhere", payload)


@pytest.mark.parametrize(
    "options",
    [
        {"queue": "x" * 128, "dedupe_key": "é" * 256, "priority": 2**31 - 1},
        {"queue": "a'b\"c;%s::d\\", "dedupe_key": "'; drop table x; --", "priority": -(2**31)},
        {"queue": " ", "run_at": datetime(1, 1, 2, tzinfo=UTC)},
        {"queue": "🦆", "run_at": datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)},
        {"queue": "select", "delay": 0},
        {"queue": "e\u0301", "delay": 100 * 365.25 * 86_400},
    ],
    ids=repr,
)
async def test_option_at_the_edge_of_its_range_is_stored_as_it_is(
    pgconductor_dsn: str, options: dict[str, Any]
) -> None:
    """Quoting, or a range in Python that is wider than the schema's."""
    async with Conductor(pgconductor_dsn) as conductor:
        handle = await conductor.invoke("odd \"'%s name", {"k": "\x01\u2028🦆"}, **options)
    query = (
        "select queue, coalesce(dedupe_key, ''), priority, task, payload"
        " from pgconductor._private_executions where id = %s"
    )
    assert rows(pgconductor_dsn, query, handle.id) == [
        (
            options["queue"],
            options.get("dedupe_key", ""),
            options.get("priority", 0),
            "odd \"'%s name",
            {"k": "\x01\u2028🦆"},
        )
    ]


@pytest.mark.parametrize(
    "payload",
    [
        {"n": 10**400, "f": 0.1, "t": 5e-324, "z": -0.0},
        {"s": "x" * 500_000},
        {"": {"": []}},
    ],
    ids=["numbers", "large", "empty names"],
)
async def test_payload_at_the_edge_comes_back_as_it_was(pgconductor_dsn: str, payload: Mapping[str, Any]) -> None:
    """Numbers rounded, or a large payload lost beside its row."""
    async with Conductor(pgconductor_dsn) as conductor:
        handle = await conductor.invoke("elsewhere", payload)
    assert value(pgconductor_dsn, "select payload from pgconductor.executions where id = %s", handle.id) == payload


async def test_commit_refused_by_the_server_is_an_error_of_ours(pgconductor_dsn: str) -> None:
    """The driver's error for somebody who may not write, or whose server does not."""
    execute(
        pgconductor_dsn,
        "create function public.refuse() returns trigger language plpgsql as"
        " $$begin raise exception using errcode = '25006', message = 'read-only'; end$$",
    )
    execute(
        pgconductor_dsn,
        "create trigger refuse before insert on pgconductor._private_queue_0"
        " for each row execute function public.refuse()",
    )
    conductor = Conductor(pgconductor_dsn)
    task = conductor.task(greet)
    async with conductor:
        with pytest.raises(Unavailable, match=r"read-only.*target_session_attrs"):
            await task.invoke(name="x")
        with conductor.sync() as client, pytest.raises(Unavailable, match="read-only"):
            client.invoke(task, name="x")
