"""What the schema consists of: constraints that turn bugs into errors, and rules that every object obeys."""

from __future__ import annotations

import re

import psycopg
import pytest
from sql.database import Database

from pgconductor.model import State

PUBLIC = {
    "append_items", "autoscaling", "become_lookout", "cancel", "cancel_matching", "claim", "claim_suspect",
    "close_channel", "close_children", "continue_as_new", "dead_letters", "deliver_events", "drain_wait", "emit",
    "execution_details", "execution_errors", "execution_state", "execution_status", "execution_steps", "executions",
    "flush", "fork", "grant_role", "granted_roles", "heartbeat", "hold_session", "invoke", "invoke_many",
    "list_executions", "load_history", "load_payload", "look_before_sleep", "lower_sleep_flag", "maintain",
    "open_channel", "orchestrator_status", "progress", "publish_queues", "queue_load", "queue_status",
    "raise_sleep_flag", "read_channel", "read_waits", "recover", "register_orchestrator", "register_queue",
    "register_tasks", "reject_promise", "release_unknown", "request_close", "resolve_promise", "restart", "results",
    "retire_orchestrator", "retry", "retry_matching", "revoke_role", "save_effects", "save_steps", "send",
    "set_progress", "signals", "stand_down", "standing", "start_waits", "stored_histories", "succeed_orchestrator",
}  # fmt: skip


# --- rules for all objects ---


def test_what_is_not_private_is_a_known_verb(db: Database) -> None:
    """An internal object becomes a promise to users because nobody noticed its name."""
    names = {
        name
        for (name,) in db.rows(
            "select relname from pg_class where relnamespace = '{s}'::regnamespace and relkind not in ('i', 'I')"
            " union select proname from pg_proc where pronamespace = '{s}'::regnamespace"
            " union select typname from pg_type where typnamespace = '{s}'::regnamespace and typcategory <> 'A'"
            " union select conname from pg_constraint where connamespace = '{s}'::regnamespace and contype = 'x'"
        )
    }
    ours = {name for name in names if not name.startswith("_test_")}
    assert {name for name in ours if not name.startswith("_private_")} == PUBLIC


def test_indexes_and_triggers_are_private(db: Database) -> None:
    """A name that may meet one of the user's in a dump or in an error message."""
    assert db.rows(
        "select indexrelid::regclass::text from pg_index i join pg_class c on c.oid = i.indexrelid"
        " where c.relnamespace = '{s}'::regnamespace and c.relname !~ '^_(private|test)_'"
        " union all select tgname from pg_trigger t join pg_class c on c.oid = t.tgrelid"
        " where c.relnamespace = '{s}'::regnamespace and not tgisinternal and tgname !~ '^_private_'"
    ) == []  # fmt: skip


def test_every_function_has_a_search_path_of_its_own(db: Database) -> None:
    """Somebody's function or operator in a schema of the caller's path runs in place of PostgreSQL's."""
    # A body in SQL-standard form is bound to its objects when it is made.
    assert db.rows(
        "select oid::regprocedure::text from pg_proc where pronamespace = '{s}'::regnamespace and prosqlbody is null"
        " and not coalesce(proconfig @> '{\"search_path=pg_catalog, pg_temp\"}', false)"
    ) == []  # fmt: skip


def test_nothing_references_a_partitioned_table(db: Database) -> None:
    """A foreign key would lock every queue whenever one is registered."""
    assert db.rows(
        "select conname from pg_constraint c join pg_class r on r.oid = c.confrelid"
        " where c.contype = 'f' and (r.relkind = 'p' or r.relispartition)"
    ) == []  # fmt: skip


def test_words_of_the_states_are_those_of_the_model(db: Database) -> None:
    """Python and SQL name a state differently, or order them differently."""
    words = db.rows(
        "select enumlabel from pg_enum where enumtypid = '{s}.execution_state'::regtype order by enumsortorder"
    )
    assert [word for (word,) in words] == [state.value for state in State]


def test_partitions_of_registered_queues_are_like_the_overflow(db: Database) -> None:
    """A constraint or the trigger is missing where the work is."""
    db.register_queue()

    def facts(table: str) -> list[tuple[object, ...]]:
        return db.rows(
            "select 'constraint', conname, pg_get_constraintdef(oid), convalidated from pg_constraint"
            " where conrelid = %s::regclass and contype <> 'n'"  # NOT NULL became a constraint with PostgreSQL 18
            " union all select 'column', attname, format_type(atttypid, atttypmod), attnotnull from pg_attribute"
            " where attrelid = %s::regclass and attnum > 0"
            " union all select 'trigger', tgname, tgfoid::regproc::text, true from pg_trigger"
            " where tgrelid = %s::regclass"
            " union all select 'storage', null, reloptions::text, true from pg_class where oid = %s::regclass"
            " union all select 'default', null, pg_get_expr(adbin, adrelid), true from pg_attrdef"
            " where adrelid = %s::regclass"
            " order by 1, 2, 3",
            *[f"{db.schema}.{table}"] * 5,
        )

    assert facts("_private_queue_1") == facts("_private_queue_0")
    assert len(facts("_private_queue_1")) > 40


def test_plans_that_must_use_their_index_are_not_compiled(db: Database) -> None:
    """With sequential scans off their cost looks enormous, so PostgreSQL compiles them: 55 ms for a claim of 4."""
    assert db.rows(
        "select oid::regprocedure::text from pg_proc where pronamespace = '{s}'::regnamespace"
        " and 'enable_seqscan=off' = any (proconfig) and not 'jit=off' = any (proconfig)"
    ) == []  # fmt: skip


def test_settings_of_a_session_change_nothing(db: Database) -> None:
    """A hook for tests that any role can pull, or that a connection pooler carries to the next user."""
    sources = db.rows("select prosrc from pg_proc where pronamespace = '{s}'::regnamespace and proname !~ '^_test_'")
    # But for the server's own: one setting that is only ever made safer, the role that was set, which it checks, and
    # the isolation level, under which it looks twice; and where a session's claims go on, believed for a minute.
    read = {name for (source,) in sources for name in re.findall(r"current_setting\(([^)]*)\)", source)}
    marks = {name for name in read if re.fullmatch(r"'(pgconductor_claims\.c[0-9a-f]{12}_\d+|\{mark\})', true", name)}
    assert read - marks == {"'synchronous_commit'", "'role'", "'transaction_isolation'"}
    assert not any("current_setting" in re.sub(r"current_setting\('", "", source) for (source,) in sources)
    session = db.session(autocommit=True)
    for name in ("now", "fake_now", "clock", "time", "test_clock", "shift", "offset", "schema", "owner"):
        for prefix in ("pgconductor", "conductor", "test"):
            session.rows(f"select set_config('{prefix}.{name}', '2001-01-01', false)")
    session.rows("set search_path = public")
    session.rows("create temp table _test_clock as select interval '-20 years' as shift")
    session.rows("create function public.clock_timestamp() returns timestamptz return '2001-01-01'::timestamptz")
    session.rows("create function pg_temp.clock_timestamp() returns timestamptz return '2001-01-01'::timestamptz")
    try:
        one = session.invoke()
    finally:
        session.rows("drop function public.clock_timestamp")
    assert session.value(
        "select abs(date_part('epoch', created_at - now())) < 60 from {s}.executions where id = %s", one
    )


# --- constraints ---


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("state = 'completed'", id="finished among the live"),
        pytest.param("state = 'running'", id="running without an owner"),
        pytest.param("owner = gen_random_uuid()", id="owned but not running"),
        pytest.param("run_at = null", id="ready but never due"),
        pytest.param("attempt = -1", id="negative attempt"),
        pytest.param("attempt = 1", id="more attempts than claims"),
        pytest.param("crashes = -1", id="negative crashes"),
        pytest.param("outcome_claim = 0", id="claim ended without an outcome"),
        pytest.param("outcome = 'completed'", id="outcome of no claim"),
        pytest.param("outcome = 'retried', outcome_claim = 1", id="outcome of a later claim"),
        pytest.param("run_at = 'infinity'", id="due at infinity"),
        pytest.param("run_at = '-infinity'", id="due since ever"),
        pytest.param("run_at = '10000-01-01'", id="due after the year 9999"),
        pytest.param("run_at = '0001-01-01 BC'", id="due before Christ"),
        pytest.param("max_attempts = 0", id="no attempts"),
        pytest.param("max_attempts = 10001", id="too many attempts"),
        pytest.param("queue = ''", id="empty queue"),
        pytest.param("queue = repeat('x', 129)", id="long queue"),
        pytest.param("task = ''", id="empty task"),
        pytest.param("task = repeat('é', 65)", id="long task"),
        pytest.param("dedupe_key = repeat('k', 513)", id="long key"),
    ],
)
@pytest.mark.parametrize("partition", ["own", "overflow"])
def test_row_that_no_transition_makes_is_refused(db: Database, change: str, partition: str) -> None:
    """A bug, or a hand in the table, becomes a row that stops claims or cannot be read."""
    if partition == "own":
        db.register_queue()
    db.invoke()
    with pytest.raises(psycopg.errors.CheckViolation):
        db.rows(f"update {{s}}._private_executions set {change}")


@pytest.mark.parametrize("priority", [-(2**31), 2**31 - 1])
def test_priorities_at_the_edges_are_claimed(db: Database, priority: int) -> None:
    """The order by priority negates it, and overflows."""
    db.register_queue()
    db.invoke(priority=priority)
    assert len(db.claim(db.register_orchestrator())) == 1


@pytest.mark.parametrize("payload", ["null", "1", '"text"', "[]", "true"])
def test_payload_that_is_no_object_is_refused(db: Database, payload: str) -> None:
    """No handler can take it, and the producer is told nothing."""
    with pytest.raises(psycopg.Error, match="must be a JSON object") as caught:
        db.rows("select {s}.invoke('t', %s::jsonb)", payload)
    assert caught.value.sqlstate == "PC001"


def test_missing_payload_is_refused(db: Database) -> None:
    """NULL is stored as "large", and no payload is found for it when it runs."""
    with pytest.raises(psycopg.Error, match="must be a JSON object"):
        db.rows("select {s}.invoke('t', null)")


@pytest.mark.parametrize(("size", "taken"), [(8_000_000, True), (8_600_000, False)])
def test_size_of_payloads_is_limited(db: Database, size: int, taken: bool) -> None:
    """One producer fills every claimer's memory. Text that does not compress, so that its stored size is its size."""
    text = "select {s}.invoke('t', jsonb_build_object('a', string_agg(md5(n::text), ''))) from generate_series(1, %s) n"
    if taken:
        db.rows(text, size // 32)
    else:
        with pytest.raises(psycopg.errors.CheckViolation):
            db.rows(text, size // 32)


@pytest.mark.parametrize("delay", ["1e300", "1e13", "'NaN'", "'infinity'"])
def test_delay_beyond_all_times_is_refused(db: Database, delay: str) -> None:
    """A due time that no client can read."""
    with pytest.raises((psycopg.DataError, psycopg.IntegrityError)):
        db.rows(f"select {{s}}.invoke_many('{{t}}', '{{\"{{}}\"}}', p_delays => array[{delay}::float8])")
    assert db.value("select count(*) from {s}.executions") == 0


def test_invoke_by_named_arguments_is_all_a_producer_needs(db: Database) -> None:
    """A program in another language cannot produce with plain SQL."""
    db.run(db.calls.register_tasks(["greet"], "fast"))
    one = db.value(
        """select {s}.invoke('greet', '{"name": "World"}', priority => 10, delay => '5 min', dedupe_key => 'w')"""
    )
    assert db.rows(
        "select queue, task, state::text, priority, dedupe_key, payload, round(date_part('epoch', run_at - created_at))"
        " from {s}.executions where id = %s",
        one,
    ) == [("fast", "greet", "scheduled", 10, "w", {"name": "World"}, 300)]
    two = db.value("select {s}.invoke(task => 'greet', queue => 'slow', run_at => '2001-01-01Z')")
    assert db.rows("select queue, state::text, payload from {s}.executions where id = %s", two) == [
        ("slow", "ready", {})
    ]
    assert db.rows("select queue from {s}.executions where id = {s}.invoke('unknown')") == []
    assert db.value("select queue from {s}.executions where task = 'unknown'") == "default"
