"""Names are data: whatever text a queue, a task, a key or the schema is called, nothing physical is named by it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sql.database import Database, done, open_database

from pgconductor.db.schema import migrate_sync

HOSTILE = [
    '"', "'", "''", "\\", "\\'", ";", "%", "%s", "%1$I",
    "::", "$1", "$$", "{s}", "--", "/*", " ", "  ", "\t", "\n", "a b",
    " a", "a ", "a-b", "a_b", "A_B", "a.b", "a/b", "select", "public", "pg_catalog", "default", "null", "0", "1", "-1",
    "é",
    "e\u0301", "ﬁ", "fi", "😀", "\u202eabc", "\ufeff", "\u200b", "\x01", "\x7f", "'; drop table do_not_drop; --",
    '"; drop table do_not_drop; --', "x" * 63, "x" * 64, "x" * 65, "x" * 128, "é" * 64, "y" * 62 + "é", "y" * 62 + "è",
    "_private_queue_0", "_private_queue_1", "[a]", "{a,b}", "a,b", "(a)", "NULL", "\u0130", "i\u0307", "ß", "SS",
]  # fmt: skip


def test_hostile_queue_names_are_queues_like_any_other(db: Database) -> None:
    """Two names share a partition, a channel or a lock, or a name runs as SQL."""
    db.rows("create table public.do_not_drop ()")
    numbers = {name: db.register_queue(name) for name in HOSTILE}
    assert len(set(numbers.values())) == len(set(HOSTILE)) == len(HOSTILE)
    ids = {db.invoke(name, task=name, key=name[:64]): name for name in HOSTILE}
    owner = db.register_orchestrator(HOSTILE[0])
    for name in HOSTILE:
        claimed = db.claim(owner, name, tasks=[name])
        assert [ids[c.id] for c in claimed] == [name]
        assert db.rows("select queue_no, queue, task from {s}._private_executions where id = %s", claimed[0].id) == [
            (numbers[name], name, name)
        ]
        assert db.flush(owner, done(claimed[0], "retried")) == {}
        assert db.run(db.calls.raise_sleep_flag(name, raise_it=True)) is True
        assert db.run(db.calls.lower_sleep_flag(name)) is True
    assert [status.queue for status in db.queue_status() if status.ready != 1] == []
    db.rows("drop table public.do_not_drop")


def test_hostile_names_in_the_overflow_keep_apart(db: Database) -> None:
    """Before anybody registered it, a queue's work is claimed by its twin."""
    ids = {name: db.invoke(name) for name in HOSTILE}
    owner = db.register_orchestrator()
    for name in HOSTILE:
        db.register_queue(name)
        assert [c.id for c in db.claim(owner, name)] == [ids[name]]


NAMES = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=32),
    min_size=2,
    max_size=200,
    unique=True,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES)
def test_distinct_names_have_distinct_channels_and_locks(db: Database, names: list[str]) -> None:
    """Two queues wake each other, or one's sleeper hides the other's."""
    row = db.rows(
        "select count(distinct {s}._private_channel(n)), max(octet_length({s}._private_channel(n))),"
        " (select count(distinct k) from unnest(%s::text[]) m,"
        " lateral (values ({s}._private_key_k(m)), ({s}._private_key_m(m))) x (k))"
        " from unnest(%s::text[]) n",
        names,
        names,
    )[0]
    assert row[0] == len(names)
    assert row[1] <= 63
    assert row[2] == 2 * len(names)


def test_buckets_of_results_have_locks_of_their_own(db: Database) -> None:
    """A waiter for one result asks for the notices of others, or a queue called "W" meets one."""
    keys = db.value(
        "select count(distinct k) from (select {s}._private_key_w(b) as k from generate_series(-1, 255) b"
        " union all select {s}._private_key_k(b::text) from generate_series(-1, 255) b) x"
    )
    assert keys == 257 * 2


@pytest.mark.parametrize("name", ["x" * 128, "é" * 64, "x"])
def test_longest_and_shortest_names_are_taken(db: Database, name: str) -> None:
    """The limit of 128 bytes is off by one, or counts characters."""
    db.register_queue(name)
    assert db.value("select queue from {s}.executions where id = %s", db.invoke(name, task=name)) == name


@pytest.mark.parametrize("name", ["", "x" * 129, "é" * 64 + "x"])
def test_longer_and_empty_names_are_refused_everywhere(db: Database, name: str) -> None:
    """A name stored that no program can register."""
    for attempt in (
        lambda: db.register_queue(name),
        lambda: db.invoke(name),
        lambda: db.invoke(task=name),
        lambda: db.run(db.calls.register_tasks([name], "q")),
        lambda: db.run(db.calls.register_tasks(["t"], name)),
    ):
        with pytest.raises(psycopg.errors.CheckViolation):
            attempt()
    assert db.value("select count(*) from {s}._private_queues") == 0


@pytest.mark.parametrize(("size", "taken"), [(1, True), (512, True), (0, False), (513, False)])
def test_length_of_dedupe_keys_is_limited(db: Database, size: int, taken: bool) -> None:
    """A key too long for its index fails with an error that names an index page."""
    if taken:
        db.invoke(key="k" * size)
    else:
        with pytest.raises(psycopg.errors.CheckViolation):
            db.invoke(key="k" * size)
    assert db.value("select count(*) from {s}._private_dedupe_keys") == taken


def test_identifiers_have_room_for_the_largest_queue_number(db: Database) -> None:
    """Names of partitions and their indexes are cut to 63 bytes, and then collide. Ids carry numbers up to 20 bits."""
    db.rows("alter table {s}._private_queues alter no restart with 1048575")
    no = db.register_queue()
    assert no == 1048575
    names = db.rows("select relname from pg_class where relname ~ '^_private_queue_1048575'")
    assert len(names) == 7
    assert max(len(name) for (name,) in names) < 63
    id_ = db.invoke()
    assert db.live_row(id_, "queue_no, {s}._private_queue_no(id)".replace("{s}", db.schema)) == (no, no)
    owner = db.register_orchestrator()
    assert db.flush(owner, *[done(c) for c in db.claim(owner)]) == {}
    with pytest.raises(psycopg.errors.SequenceGeneratorLimitExceeded):
        db.register_queue("one too many")


@pytest.mark.parametrize("no", [0, 1, 255, 256, 65535, 65536, 1048575])
def test_id_tells_its_time_and_its_partition(db: Database, no: int) -> None:
    """By-id verbs look in the wrong partition, ids do not sort by time, or are no UUIDs of version 8."""
    ids = [
        id_
        for (id_,) in db.rows(
            "select {s}._private_new_id(%s, to_timestamp(s)) from generate_series(0, 4e9::bigint, 1e8::bigint) s", no
        )
    ]
    assert {(id_.version, id_.variant) for id_ in ids} == {(8, "specified in RFC 4122")}
    assert sorted(ids) == ids
    assert db.rows("select distinct {s}._private_queue_no(i) from unnest(%s::uuid[]) i", ids) == [(no,)]
    assert [id_.int >> 80 for id_ in ids] == [n * 10**11 for n in range(41)]


# --- the schema's own name ---

SCHEMAS = ["we\"ird 'sch\\ema' %; ünï", "Select", " ", "x" * 63, "-- ", "$$", "%1$I %s"]


@pytest.fixture(params=SCHEMAS, ids=range(len(SCHEMAS)))
def elsewhere(pgconductor_empty_dsn: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database whose schema has a hostile name."""
    schema: str = request.param
    with psycopg.connect(pgconductor_empty_dsn, autocommit=True) as conn:
        migrate_sync(conn, schema)
    with open_database(pgconductor_empty_dsn, schema) as database:
        yield database


def test_everything_works_in_a_schema_of_any_name(elsewhere: Database) -> None:
    """The schema's name runs as SQL somewhere, or the default one is written into a function."""
    db = elsewhere
    early = db.invoke("q", key="k")
    assert db.register_queue() == 1
    db.run(db.calls.register_tasks(["t"], "q"))
    late = db.invoke(None, payload={"text": [str(n) for n in range(2000)]})
    owner = db.register_orchestrator()
    listener = db.session(autocommit=True)
    channel = db.run(db.calls.channel("q"))
    listener.rows(f"listen {channel}")
    assert listener.run(db.calls.raise_sleep_flag("q", raise_it=True)) is True
    first, second = db.claim(owner)
    assert (first.id, second.id) == (early, late)
    assert db.run(db.calls.load_payload(late, 1, owner))
    assert db.flush(owner, done(first, result="1", keep=60.0), done(second, "retried")) == {}
    assert [n.channel for n in listener.conn.notifies(timeout=5, stop_after=1)] == [channel]
    assert listener.run(db.calls.lower_sleep_flag("q")) is True
    (again,) = db.claim(owner)
    assert db.run(db.calls.heartbeat(owner, 60.0, [])).is_alive
    db.rows("update {s}._private_orchestrators set died_at = now()")
    assert db.recover() == (1, 0)
    assert db.flush(owner, done(again)) == {again.id: "fenced"}
    assert db.run(db.calls.retire_orchestrator(owner)) == 0
    assert db.run(db.calls.results([early]))[early].result == "1"
    assert db.run(db.calls.standing([late]))[late].queue == "q"
    assert db.run(db.calls.drain_wait({"q": ["t"]}, 0.0)) == 0
    assert [s.ready for s in db.queue_status()] == [1]
    assert db.rows("select count(*) from {s}.executions") == [(2,)]


def test_two_schemas_in_one_database_share_nothing(pgconductor_empty_dsn: str) -> None:
    """Tenants wake each other, and each learns when the other has work: "a" with queue "b c", "a b" with queue "c"."""
    pairs = [("a", "b c"), ("a b", "c"), ("a K b", "c"), ("a", "b K c"), ("a", "b M c")]
    with psycopg.connect(pgconductor_empty_dsn, autocommit=True) as conn:
        for schema in {schema for schema, _ in pairs}:
            migrate_sync(conn, schema)
    seen: list[object] = []
    for schema, queue in pairs:
        with open_database(pgconductor_empty_dsn, schema) as db:
            seen += db.rows(
                "select {s}._private_channel(%s), {s}._private_key_k(%s), {s}._private_key_m(%s)", queue, queue, queue
            )[0]
    for schema in {schema for schema, _ in pairs}:
        with open_database(pgconductor_empty_dsn, schema) as db:
            seen += db.rows("select {s}._private_results_channel(), {s}._private_key_w(-1)")[0]
    assert len(set(seen)) == len(seen) == 3 * len(pairs) + 2 * 3
