"""Looking at executions in SQL: what a search may cost, and the ids that tell when they were made."""

from __future__ import annotations

from uuid import UUID

import pytest
from sql.database import Database, Session

ROWS = 20_000


def _fill(db: Database) -> None:
    """Live and finished rows of one queue, beneath statistics that were taken before they came."""
    db.register_queue()
    db.rows("alter table {s}._private_queue_1 set (autovacuum_enabled = off)")
    db.rows("vacuum analyze")
    db.rows(
        "insert into {s}._private_executions (queue_no, id, queue, task, state, run_at, created_at, payload)"
        " select 1, {s}._private_new_id(1, now() - n * interval '1 s'), 'q', case n when 1 then 'rare' else 't' end,"
        " 'ready', now(), now() - n * interval '1 s', '{}' from generate_series(%s, 1, -1) n",
        ROWS,
    )
    db.rows(
        "insert into {s}._private_finished (slot, priority, attempt, crashes, generation, depth, state, id, claim_no,"
        " created_at, finished_at, queue, task) select n %% 42, 0, 1, 0, 0, 0, 'completed',"
        " {s}._private_new_id(1, now() - n * interval '1 s' - interval '1 day'), 1,"
        " now() - n * interval '1 s' - interval '1 day', now(), 'q', 't' from generate_series(%s, 1, -1) n",
        ROWS,
    )


def _reads(session: Session) -> tuple[int, int]:
    """Rows of executions that were read by indexes, and sequential scans of their tables."""
    session.rows("select pg_stat_force_next_flush()")
    session.rows("select pg_stat_clear_snapshot()")
    tables = "'^_private_(queue|finished)_[0-9]'"
    return (
        int(session.value(f"select sum(idx_tup_read) from pg_stat_user_indexes where relname ~ {tables}")),
        int(session.value(f"select sum(seq_scan) from pg_stat_user_tables where relname ~ {tables}")),
    )


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        ("p_limit => 100, p_look => 1000", 2200),
        ("p_task => 'nobody has it', p_look => 5000", 10_200),
        ("p_states => '{failed}', p_tags => '{a}', p_look => 5000", 10_200),
        ("p_dedupe_key => 'k', p_queue => 'q', p_look => 5000", 10_200),
        # Of a span of time only what was made in it is looked at, whatever else there is.
        ("p_task => 'x', p_look => 50000, p_created_after => now() - interval '100 s'", 300),
        (
            "p_task => 'x', p_look => 50000, p_created_after => now() - interval '25 h',"
            " p_created_before => now() - interval '24 h'",
            3800,
        ),
    ],
)
def test_search_reads_a_bounded_number_by_the_ids(db: Database, arguments: str, most: int) -> None:
    """A look at a page reads all there is: minutes, on a table of a busy month."""
    _fill(db)
    busy = db.session(autocommit=True)
    before = _reads(busy)
    busy.rows(f"select * from {{s}}.list_executions({arguments})")
    after = _reads(busy)
    assert after[0] - before[0] <= most
    assert after[1] == before[1]


def test_search_says_where_to_go_on(db: Database) -> None:
    """Without a last row that says it, what was not looked at does not exist."""
    _fill(db)
    page = "select id, state from {s}.list_executions(p_task => 'rare', p_look => %s, p_after => %s)"
    assert [state for _, state in db.rows(page, 100, None)] == ["ready", None]
    ((go_on, state),) = db.rows(page, 100, db.rows(page, 100, None)[-1][0])
    assert state is None
    seen = 200
    while rows := db.rows(page, 15_000, go_on):
        ((go_on, state),) = rows
        assert state is None
        seen += 15_000
    assert seen + 15_000 >= 2 * ROWS


def test_ids_tell_when_they_were_made(db: Database) -> None:
    """A search by time misses what was made in its first millisecond."""
    for text in ("2001-01-01 00:00:00.1239Z", "1970-01-01 00:00:00Z", "9998-12-31 23:59:59.999999Z"):
        first, made, later = db.rows(
            "select {s}._private_first_id(%s), {s}._private_new_id(1048575, %s),"
            " {s}._private_first_id(%s::timestamptz + interval '2 ms')",
            *[text] * 3,
        )[0]
        assert first <= made < later
        assert db.value("select abs(extract(epoch from {s}._private_made_at(%s) - %s)) <= 0.0005", made, text)
    for text in ("-infinity", "1960-01-01Z"):
        assert db.value("select {s}._private_first_id(%s)", text) == UUID(int=0)
    assert db.value("select {s}._private_first_id('infinity') > {s}._private_new_id(0, now())")
