"""What must not be seen: passwords, rows, payloads, owners' ids; and what must be seen harmlessly: names, messages."""

from __future__ import annotations

import logging
import random
import unicodedata

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from security.site import Site

from pgconductor import Conductor, Context, InvalidOption, InvalidPayload, NoDatabase, Orchestrator
from pgconductor.db.call import Call
from pgconductor.db.link import OutageLog, Target, open_link

CARD = "4111-1111-1111-1111"
EVIL = "a\nb\x1b[2J\u202ec"


def _password(dsn: str) -> str:
    return str(conninfo_to_dict(dsn)["password"])


def _is_harmless(text: str) -> bool:
    """No control, format or bidi character that a terminal or a log reader obeys; line ends are a traceback's own."""
    return all(char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf") for char in text)


# --- secrets ---


async def test_engine_tells_no_secret_whatever_fails(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A password, a row that PostgreSQL quotes in DETAIL, or a payload, is in a log or a stored error for ever."""
    caplog.set_level(logging.DEBUG)
    dsn = site.dsn_of(site.role("worker"))
    conductor = Conductor(dsn)

    @conductor.task(max_attempts=1)
    async def store(card: str) -> None:
        with psycopg.connect(site.dsn) as conn:
            conn.execute("create temp table cards (id int check (id > 0), card text unique)")
            conn.execute("insert into cards values (-1, %s)", (card,))

    @conductor.task(max_attempts=1)
    async def twice(card: str) -> None:
        with psycopg.connect(site.dsn) as conn:
            conn.execute("create temp table cards (card text unique)")
            try:
                conn.execute("insert into cards values (%s), (%s)", (card, card))
            except psycopg.Error as error:
                raise RuntimeError("could not store it") from error

    @conductor.task(max_attempts=1)
    async def echo(card: str) -> str:
        return card

    orchestrator = Orchestrator(conductor, tasks=[store, twice, echo], migrate=False)
    async with conductor:
        for task in (store, twice, echo):
            await task.invoke(card=CARD)
        drained = await orchestrator.drain()
        assert (drained.completed, drained.failed) == (1, 2)
        texts = [repr(conductor), repr(orchestrator), repr(conductor.sync()), repr(store)]
    logs = caplog.text + "".join(repr(record.__dict__) for record in caplog.records)
    stored = site.admin.value("select string_agg(errors::text, ' ') from {s}.executions")
    assert "could not store it" in stored
    assert "violates check constraint" in stored
    for text in (*texts, logs, stored):
        assert CARD not in text
        assert _password(dsn) not in text


async def test_owners_are_told_to_nobody(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Who knows an orchestrator's id, and a claim's number, may end its executions."""
    caplog.set_level(logging.INFO)
    conductor = Conductor(site.dsn_of(site.role("worker")))
    names: list[str] = []

    @conductor.task
    async def look() -> None:
        with psycopg.connect(site.dsn) as conn:
            rows = conn.execute("select id::text from pgconductor._private_orchestrators").fetchall()
            names.extend(row[0] for row in rows)
            seen = conn.execute(
                "select string_agg(application_name || ' ' || query, ' ') from pg_stat_activity"
                " where pid <> pg_backend_pid()"
            ).fetchone()
            assert seen is not None
            names.append(seen[0])

    async with conductor:
        await look.invoke()
        await Orchestrator(conductor, tasks=[look], migrate=False).drain()
    *owners, activity = names
    assert len(owners) == 1
    assert owners[0] not in activity
    assert "pgconductor " in activity
    assert owners[0] not in caplog.text


@pytest.mark.parametrize("scheme", ["postgresql://u:{p}@127.0.0.1:1/d", "host=127.0.0.1 port=1 user=u password={p}"])
def test_password_is_in_no_message(scheme: str) -> None:
    """A connection that fails prints how it was tried."""
    password = "s3cr3t-canary"
    conductor = Conductor(scheme.format(p=password))
    with conductor.sync() as client, pytest.raises(NoDatabase) as caught:
        client.queue_status()
    error: BaseException | None = caught.value
    while error is not None:
        assert password not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__
    assert password not in repr(conductor)
    with pytest.raises(InvalidOption) as refused:
        Conductor(f"postgresql://u:{password}@[bad/d")
    assert password not in str(refused.value)


# --- what a terminal obeys ---


async def test_hostile_names_and_messages_are_logged_harmlessly(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A task's name or an error's message forges a line of the log, or turns it round."""
    caplog.set_level(logging.DEBUG)
    conductor = Conductor(site.dsn_of(site.role("worker")))

    @conductor.task(name=f"t{EVIL}", queue=f"q{EVIL}", max_attempts=2, backoff=0.01)
    async def evil(ctx: Context) -> None:
        raise ValueError(f"m{EVIL}")

    worker = conductor.create_worker(queue=f"q{EVIL}", tasks=[evil])
    async with conductor:
        await evil.invoke()
        site.admin.invoke(f"q{EVIL}", f"t{EVIL}", payload={EVIL: 1})
        drained = await Orchestrator(conductor, workers=[worker], migrate=False).drain(horizon=1.0)
    assert drained.failed == 2
    for record in caplog.records:
        message = record.getMessage()
        assert _is_harmless(message), message
        assert "\n" not in message or "Traceback" in message, message


# --- brakes ---


async def test_sessions_of_the_engine_have_brakes(site: Site) -> None:
    """A statement that hangs, or a transaction that is left open, holds up everybody: the server ends it."""
    dsn = site.dsn_of(site.role("worker"))
    role = site.role("worker")
    site.admin.rows(f"alter role {role} set statement_timeout = 0")
    site.admin.rows(f"alter role {role} set default_transaction_isolation = 'serializable'")
    site.admin.rows(f"alter role {role} set idle_session_timeout = '1s'")
    try:
        wanted = {
            "statement_timeout": "30s",
            "lock_timeout": "5s",
            "idle_in_transaction_session_timeout": "1min",
            "idle_session_timeout": "0",
            "default_transaction_isolation": "read committed",
            "application_name": "pgconductor test",
        }
        for listens in (False, True):
            async with open_link(Target(dsn, dsn, 5), "test", OutageLog(), random.Random(1), listens=listens) as link:
                for name, value in wanted.items():
                    call = Call(b"select pg_catalog.current_setting(%s)", (name,), lambda rows: str(rows[0][0]))
                    assert await link.attempt(call) == value
    finally:
        site.admin.rows(f"alter role {role} reset all")


# --- limits ---


def test_limits_hold_to_the_byte_in_python_and_in_sql(site: Site) -> None:
    """A limit counts characters, or is off by one, or is held by one of the two ways in only."""
    conductor = Conductor(site.dsn_of(site.role("producer")))
    session = site.session("producer")
    with conductor.sync() as client:
        overhead = len('{"a":""}')
        client.invoke("t", {"a": "x" * ((1 << 20) - overhead)})
        with pytest.raises(InvalidPayload):
            client.invoke("t", {"a": "x" * ((1 << 20) - overhead + 1)})
        nested: object = 1
        for _ in range(63):
            nested = [nested]
        client.invoke("t", {"a": nested})
        with pytest.raises(InvalidPayload):
            client.invoke("t", {"a": [nested]})
        for name, size in (("é" * 64, 128), ("x" * 128, 128)):
            assert len(name.encode()) == size
            client.invoke(name, {}, queue=name)
            with pytest.raises(InvalidOption):
                client.invoke("t", {}, queue=name + "x")
            with pytest.raises(InvalidOption):
                client.invoke(name + "x", {})
        client.invoke("t", {}, dedupe_key="k" * 512, tags=[str(n) for n in range(16)])
        with pytest.raises(InvalidOption):
            client.invoke("t", {}, dedupe_key="k" * 513)
        with pytest.raises(InvalidOption):
            client.invoke("t", {}, tags=[str(n) for n in range(17)])
    for taken, refused in (
        ("select {s}.invoke(repeat('x', 128))", "select {s}.invoke(repeat('x', 129))"),
        ("select {s}.invoke('t', queue => repeat('é', 64))", "select {s}.invoke('t', queue => repeat('é', 64) || 'x')"),
        (
            "select {s}.invoke('t', dedupe_key => repeat('q', 512))",
            "select {s}.invoke('t', dedupe_key => repeat('q', 513))",
        ),
        (
            "select {s}.invoke('t', tags => array_fill('x'::text, array[64]))",
            "select {s}.invoke('t', tags => array_fill('x'::text, array[65]))",
        ),
        ("select {s}.invoke('t', max_attempts => 10000)", "select {s}.invoke('t', max_attempts => 10001)"),
        ("select {s}.cancel('{}', repeat('é', 500))", "select {s}.cancel('{}', repeat('é', 500) || 'x')"),
    ):
        session.rows(taken)
        with pytest.raises(psycopg.Error) as caught:
            session.rows(refused)
        assert caught.value.sqlstate in ("23514", "PC001"), refused
