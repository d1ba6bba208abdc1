"""What claim and flush cost, whatever the statistics say and however many queues there are.

The server's own counters are asked: sequential scans per table (`pg_stat_user_tables`), locks held, and the buffers a
call touched (EXPLAIN).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from sql.database import Database, Session, done, open_database

from pgconductor.db.calls import NewExecution
from pgconductor.model import Claimed, Outcome
from pgconductor.testing import Databases

ROWS = 30_000
QUEUES = 300


@pytest.fixture(autouse=True)
def autovacuum_as_it_was(db: Database) -> Iterator[None]:
    """What `fill` turns off on the tables that all tests share is on again afterwards."""
    yield
    for table in ("_private_queue_0", "_private_dedupe_keys"):
        db.rows(f"alter table {{s}}.{table} reset (autovacuum_enabled)")


def scans(session: Session) -> dict[str, int]:
    """Sequential scans of each table, those of `session` included."""
    session.rows("select pg_stat_force_next_flush()")
    session.rows("select pg_stat_clear_snapshot()")
    return dict(
        session.rows(
            "select relname, seq_scan from pg_stat_user_tables"
            " where relname ~ '^_private_(queue_|finished|dedupe|payloads)'"
        )
    )


def reads(session: Session) -> int:
    """Rows of executions that were looked at, by whatever way."""
    scans(session)
    return int(
        session.value(
            "select (select sum(idx_tup_read) from pg_stat_user_indexes where relname ~ '^_private_queue_')"
            " + (select sum(seq_tup_read) from pg_stat_user_tables where relname ~ '^_private_queue_')"
        )
    )


def fill(db: Database, statistics: str = "empty") -> None:
    """Rows beneath statistics that are not theirs. "empty": taken before the first came, as in a fresh queue's first
    busy minute. "done": taken when a large backlog was nearly worked off, so that next to nothing seems to be ready.
    """
    db.rows("alter table {s}._private_queue_0 set (autovacuum_enabled = off)")
    db.rows("alter table {s}._private_queue_1 set (autovacuum_enabled = off)")
    db.rows("alter table {s}._private_dedupe_keys set (autovacuum_enabled = off)")
    if statistics == "done":
        for no in (0, 1):
            db.rows(
                "insert into {s}._private_executions"
                " (queue_no, id, queue, task, state, run_at, created_at, owner, claim_no)"
                " select %s, gen_random_uuid(), 'q', 't', 'running', now(), now(), gen_random_uuid(), 1"
                " from generate_series(1, 500)",
                no,
            )
    db.rows("vacuum analyze")
    db.rows("delete from {s}._private_executions")
    for no in (0, 1):
        db.rows(
            "insert into {s}._private_executions"
            " (queue_no, id, queue, task, state, priority, run_at, created_at, payload)"
            " select no, {s}._private_new_id(no, now()),"
            " case when no = 0 and n %% 2 = 0 then 'other' else 'q' end, 't',"
            " (case when n %% 3 = 0 then 'scheduled' else 'ready' end)::{s}.execution_state, n %% 7,"
            " case when n %% 3 = 0 then now() + interval '1 h' else now() end, now(), '{}'"
            " from (select %s::int) x (no), generate_series(1, %s) n",
            no,
            ROWS // 2,
        )
    db.rows(
        "insert into {s}._private_dedupe_keys"
        " select 'q', 't', n::text, gen_random_uuid() from generate_series(1, 5000) n"
    )


@pytest.mark.parametrize("statistics", ["empty", "done"])
def test_claim_and_flush_use_indexes_whatever_the_statistics_say(db: Database, statistics: str) -> None:
    """Statistics taken while a queue was empty make every claim and every outcome read the whole queue."""
    db.register_queue()
    fill(db, statistics)
    keyed = db.invoke(key="mine", priority=100)
    owner = db.register_orchestrator()
    busy = db.session(autocommit=True)
    scans(db)  # so that what it did before is not reported later
    before, read = scans(busy), reads(busy)
    # As many as make reading the whole table look cheap.
    claimed = [c for limit in (200, 1500) for c in busy.claim(owner, limit=limit)]
    assert keyed in [c.id for c in claimed]
    assert {busy.live_row(c.id, "queue_no")[0] for c in claimed[:50]} == {0, 1}
    before_flush, read_by_claim = scans(busy), reads(busy)
    assert read_by_claim - read < 2.5 * len(claimed)
    # What ends is looked up and removed. What goes on is looked at for its parent, and locked in order, before that.
    for part, kinds, most in (
        (claimed[:100], ["completed", "failed"], 2.5),
        (claimed[100:900], ["completed", "failed"], 2.5),
        (claimed[900:], ["retried", "released"], 7.0),
    ):
        outcomes = [done(c, kinds[n % 2], delay=60.0) for n, c in enumerate(part)]
        read = reads(busy)
        assert busy.run(busy.calls.flush(owner, outcomes, has_family=False)) == {}  # as a worker sends them
        assert reads(busy) - read < most * len(part) + 50
    stranger = Outcome(claimed[0].id, 99, "completed")
    assert busy.flush(owner, stranger) == {stranger.id: "fenced"}
    assert busy.run(busy.calls.release_unknown(owner, "q", [])) == 0
    after = scans(busy)
    assert before_flush == before
    assert after == before_flush


def reads_of_all(session: Session) -> int:
    """Rows of whatever table that were looked at, by whatever way."""
    scans(session)
    return int(
        session.value(
            "select (select sum(idx_tup_read) from pg_stat_user_indexes where schemaname = %s)"
            " + (select sum(seq_tup_read) from pg_stat_user_tables where schemaname = %s and relname ~ '^_private_')",
            session.calls.schema,
            session.calls.schema,
        )
    )


@pytest.mark.parametrize("has_family", [False, True])
def test_flush_reads_what_it_ends_after_a_vacuum_of_the_drained_queue(db: Database, has_family: bool) -> None:
    """The statistics say that there are pages and no rows: to read an index from end to end, for each outcome, looks
    cheap. 60,000 no-op executions then took 16 s instead of one.
    """
    db.register_queue()
    owner = db.register_orchestrator()
    large = db.value("select string_agg(md5(n::text), '') from generate_series(1, 300) n")
    new = [NewExecution("t", "{}", "q", dedupe_key=str(n)) for n in range(4000)]
    new += [NewExecution("t", f'{{"x": "{large}"}}', "q", dedupe_key=f"large {n}", priority=1) for n in range(20)]
    seer = db.session()  # for whom the rows are not gone yet, so that the files cannot be made shorter
    for no in range(2):
        db.invoke_many(*new)
        if no == 0:
            seer.rows("set transaction isolation level repeatable read")
            seer.rows("select 1")
            for table in ("_private_executions", "_private_dedupe_keys", "_private_payloads"):
                db.rows(f"delete from {{s}}.{table}")
                db.rows(f"vacuum {{s}}.{table}")
            seer.rollback()
    assert db.value("select reltuples from pg_class where oid = '{s}._private_queue_1'::regclass") == 0
    busy = db.session(autocommit=True)
    claimed = [c for _ in range(4) for c in busy.claim(owner, limit=10)]
    before = reads_of_all(busy)
    for start in range(0, 40, 10):
        outcomes = [done(c, keep=0.0) for c in claimed[start : start + 10]]
        assert busy.flush(owner, *outcomes, has_family=has_family) == {}
    assert reads_of_all(busy) - before < 1000
    assert db.value("select count(*) from {s}._private_dedupe_keys") == 3980
    assert db.value("select count(*) from {s}._private_payloads") == 0


def test_recovery_uses_indexes_whatever_the_statistics_say(db: Database) -> None:
    """Each sweep reads the whole queue to find the few that run."""
    db.register_queue()
    fill(db)
    owner = db.register_orchestrator()
    busy = db.session(autocommit=True)
    busy.claim(owner, limit=100)
    db.rows("update {s}._private_orchestrators set died_at = now()")
    scans(db)  # so that what it did before is not reported later
    before = scans(busy)
    assert busy.recover() == (100, 0)
    assert scans(busy) == before


def test_dedupe_lookup_uses_the_key_whatever_the_statistics_say(db: Database) -> None:
    """One invoke reads all keys there are."""
    db.register_queue()
    fill(db)
    busy = db.session(autocommit=True)
    scans(db)  # so that what it did before is not reported later
    before = scans(busy)
    assert busy.invoke(key="77") == db.value("select execution_id from {s}._private_dedupe_keys where key = '77'")
    assert busy.invoke(key="new") != busy.invoke(key="newer")
    assert scans(busy) == before


# --- many queues ---


@pytest.fixture(scope="module")
def few_and_many(pgconductor_databases: Databases) -> Iterator[tuple[Database, Database]]:
    """A database with one registered queue, and one with hundreds."""
    with (
        pgconductor_databases.installed() as one,
        pgconductor_databases.installed() as other,
        open_database(one) as few,
        open_database(other) as many,
    ):
        for db in (few, many):
            db.take_looks_for("short")
            db.register_queue()
        # In a few transactions: each holds a lock on every partition it made.
        for start in range(1, QUEUES, 100):
            stop = min(start + 99, QUEUES - 1)
            many.rows("select {s}.register_queue('q' || n) from generate_series(%s::int, %s) n", start, stop)
        assert many.value("select count(*) from {s}._private_queues") == QUEUES
        yield few, many


def locks(session: Session) -> int:
    """Relations that this session's transaction has locked."""
    return int(
        session.value(
            "select count(*) from pg_locks where locktype = 'relation' and pid = pg_backend_pid()"
            " and relation <> 'pg_locks'::regclass"
        )
    )


def prepare(db: Database, n: int = 100) -> UUID:
    db.invoke_many(*[NewExecution("t", "{}", "q")] * n)
    return db.register_orchestrator()


def test_claim_and_flush_lock_as_many_relations_with_one_queue_as_with_hundreds(
    few_and_many: tuple[Database, Database],
) -> None:
    """Locks that grow with the number of queues: slow, and in the end more than the server has room for."""
    counts: list[dict[str, int]] = []
    for db in few_and_many:
        owner = prepare(db)
        session = db.session()
        count: dict[str, int] = {}
        claimed: list[Claimed] = []
        for _ in range(12):  # until cached plans are in use
            claimed += session.claim(owner, limit=5)
            count["claim"] = locks(session)
            session.commit()
        for one in claimed:
            assert session.flush(owner, done(one)) == {}
            count["flush"] = locks(session)
            session.commit()
        counts.append(count)
        assert count["claim"] > 4
        db.close_sessions()
    assert counts[0] == counts[1]


def buffers(session: Session, query: str, *params: object) -> int:
    """Buffers that executing `query` touched."""
    node: dict[str, Any] = session.value(f"explain (analyze, buffers, timing off, format json) {query}", *params)[0][
        "Plan"
    ]
    return int(node["Shared Hit Blocks"]) + int(node["Shared Read Blocks"])


def test_claim_and_flush_touch_as_many_buffers_with_one_queue_as_with_hundreds(
    few_and_many: tuple[Database, Database],
) -> None:
    """A claim that costs more with every queue that somebody registers."""
    costs: list[dict[str, int]] = []
    for db in few_and_many:
        db.rows("delete from {s}._private_executions")
        db.rows("vacuum {s}._private_queue_1")
        owner = prepare(db)
        session = db.session(autocommit=True)
        cost: dict[str, int] = {}
        for _ in range(8):
            cost["claim"] = buffers(session, "select * from {s}.claim('q', %s, '{t}', 5)", owner)
        ids = [id_ for (id_,) in session.rows("select id from {s}._private_executions where owner = %s", owner)]
        assert len(ids) == 40
        for start in range(0, 40, 5):
            cost["flush"] = buffers(
                session,
                "select * from {s}.flush(%s, %s, '{1,1,1,1,1}', array_fill('completed'::text, '{5}'),"
                " array_fill('1'::jsonb, '{5}'), array_fill(null::jsonb, '{5}'), array_fill(0::float8, '{5}'),"
                " array_fill(60::float8, '{5}'))",
                owner,
                ids[start : start + 5],
            )
        assert db.value("select count(*) from {s}._private_finished where state = 'completed'") >= 40
        costs.append(cost)
        db.close_sessions()
    for verb, cost_of_one in costs[0].items():
        assert costs[1][verb] <= cost_of_one * 1.2 + 10, costs
