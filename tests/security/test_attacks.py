"""A login in bad faith: what it tries, and that it gets nothing by it."""

from __future__ import annotations

from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from security.rights import CALLS
from security.site import KINDS, Login, Site

from pgconductor.model import Outcome

DENIED = psycopg.errors.InsufficientPrivilege

# Makes, in the schema public, a function or operator beside each of PostgreSQL's that our functions use. Each notes who
# runs it, and then does what the real one does. What PostgreSQL does not let anybody make (arguments of internal
# types), is left out.
_PLANT = """
do $do$
declare
    v_source text := (select string_agg(prosrc, ' ') from pg_proc where pronamespace = 'pgconductor'::regnamespace);
    v_types regtype[] := '{text,uuid,int4,int8,float8,timestamptz,interval,jsonb,bool,anyarray,name,oid,numeric}';
    v_one record;
begin
    for v_one in
        select p.proname, pg_get_function_identity_arguments(p.oid) as arguments,
            pg_get_function_result(p.oid) as result, p.proretset,
            (select string_agg('$' || n, ', ') from generate_series(1, p.pronargs) n) as passed
        from pg_proc p where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f' and p.provariadic = 0
            and p.prorettype <> 'void'::regtype and p.proname = any (regexp_split_to_array(v_source, '[^a-z0-9_]+'))
    loop
        begin
            execute format('create function public.%1$I(%2$s) returns %3$s language plpgsql as $f$ begin
                insert into public.canary select current_user; return %4$s pg_catalog.%1$I(%5$s); end $f$',
                v_one.proname, v_one.arguments, v_one.result, case when v_one.proretset then 'query select' end,
                v_one.passed);
        exception when others then null;
        end;
    end loop;
    for v_one in
        select o.oprname, format_type(o.oprleft, null) as l, format_type(o.oprright, null) as r,
            format_type(o.oprresult, null) as result, row_number() over () as n
        from pg_operator o where o.oprnamespace = 'pg_catalog'::regnamespace and o.oprleft = any (v_types)
            and o.oprright = any (v_types || 'anyelement'::regtype)
            and o.oprname = any ('{=,<>,<,<=,>,>=,+,-,||,->,->>,?,@>,*,/,&,|,>>,~,!~}')
    loop
        begin
            execute format('create function public.planted_%1$s(%2$s, %3$s) returns %4$s language plpgsql as $f$ begin
                insert into public.canary select current_user; return $1 operator(pg_catalog.%5$s) $2; end $f$',
                v_one.n, v_one.l, v_one.r, v_one.result, v_one.oprname);
            execute format('create operator public.%s (function = public.planted_%s, leftarg = %s, rightarg = %s)',
                v_one.oprname, v_one.n, v_one.l, v_one.r);
        exception when others then null;
        end;
    end loop;
    for v_one in
        select relname from pg_class where relnamespace = 'pgconductor'::regnamespace and relkind in ('r', 'p', 'v')
    loop
        execute format('create temp table %I (no int, name text, queue text, id uuid)', v_one.relname);
        execute format('create table public.%I (no int, name text, queue text, id uuid)', v_one.relname);
    end loop;
    for v_one in
        select proname, proargtypes::regtype[]::text[] as types from pg_proc
        where pronamespace = 'pgconductor'::regnamespace and prokind = 'f' and proname !~ '^_test_'
    loop
        begin
            execute format('create function public.%I(%s) returns int language plpgsql as $f$ begin
                insert into public.canary select current_user; return null; end $f$', v_one.proname,
                array_to_string(v_one.types, ', '));
        exception when others then null;
        end;
    end loop;
    create domain pg_temp.text as int;
    create domain pg_temp.uuid as int;
    create domain pg_temp.timestamptz as int;
    create type pg_temp.execution_state as enum ('planted');
end $do$
"""

# pg_temp by name, or the attacker's own statements would be the first to meet its types.
_PATH = "set search_path = public, pg_catalog, pg_temp"


def _use_everything(session: Login) -> None:
    """One of each verb that a program calls, as its statement is."""
    queue = "q"
    session.register_queue(queue)
    session.run(session.calls.register_tasks(["t"], queue, [1.0], [None]))
    owner = session.register_orchestrator(queue)
    keyed = session.invoke(queue, key="k")
    session.invoke(queue, payload={"x": "y" * 5000})
    session.invoke("elsewhere", delay=60)
    session.rows("select {s}.invoke('t', tags => '{a}', timeout => '1 min', max_attempts => 2)")
    claimed = session.claim(owner, queue)
    assert len(claimed) == 3
    session.run(session.calls.load_payload(claimed[1].id, claimed[1].claim_no, owner))
    session.run(session.calls.signals(owner, [queue]))
    session.run(session.calls.heartbeat(owner, 60.0, [queue]))
    session.run(session.calls.cancel([claimed[0].id], "enough"))
    assert session.flush(owner, Outcome(keyed, claimed[0].claim_no, "retried")) == {}
    assert session.flush(owner, Outcome(claimed[1].id, claimed[1].claim_no, "failed", error='{"type": "x"}')) == {}
    session.run(session.calls.claim_suspect(queue, owner, ["t"]))
    session.run(session.calls.results([keyed]))
    session.run(session.calls.standing([keyed, claimed[1].id]))
    session.run(session.calls.retry([claimed[1].id]))
    session.run(session.calls.drain_wait({queue: ["t"]}, 1.0))
    session.run(session.calls.raise_sleep_flag(queue, raise_it=True))
    session.run(session.calls.lower_sleep_flag(queue))
    assert session.run(session.calls.become_lookout(queue, is_up=False))
    assert session.run(session.calls.stand_down(queue))
    assert session.run(session.calls.look_before_sleep(queue, is_up=False, is_lookout=False)) == "quiet"
    session.run(session.calls.lower_sleep_flag(queue))
    session.run(session.calls.hold_session(owner))
    session.run(session.calls.queue_status())
    session.run(session.calls.orchestrator_status())
    session.rows("select * from {s}.execution_status")
    session.rows("select {s}._private_doctor()")
    session.rows("select * from {s}.maintain()")
    session.rows("select * from {s}.dead_letters()")
    session.rows("select * from {s}.cancel_matching()")
    session.rows("select * from {s}.retry_matching()")
    session.run(session.calls.succeed_orchestrator(owner, uuid4(), 60.0, []))
    session.rows("select * from {s}.recover('q')")
    session.run(session.calls.release_unknown(owner, queue, []))
    session.run(session.calls.retire_orchestrator(owner))


@pytest.fixture
def attacker(site: Site) -> Login:
    """A login of all four kinds that may make objects in the schema public."""
    role = site.new_role(f"attacker_{uuid4().hex[:6]}")
    owner = site.session("owner")
    for kind in KINDS:
        owner.rows("select {s}.grant_role(%s, %s)", kind, role)
    site.admin.conn.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(role)))
    site.admin.rows("create table public.canary (who text)")
    site.admin.rows("grant insert, select on public.canary to public")
    return site.session_of(role)


def test_planted_functions_operators_and_tables_are_never_used(site: Site, attacker: Login) -> None:
    """A function that runs as the owner finds the attacker's `=` or `now()` first, and runs it as the owner."""
    try:
        attacker.rows(_PLANT)
        planted = attacker.value("select count(*) from pg_proc where pronamespace = 'public'::regnamespace")
        operators = attacker.value("select count(*) from pg_operator where oprnamespace = 'public'::regnamespace")
        assert planted > 150
        assert operators > 100
        # Ours, but with the caller's path: the trap works.
        owner = site.session("owner")
        site.admin.conn.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(site.owner)))
        owner.rows("create function public.sloppy(p text) returns boolean language plpgsql security definer"
                   " as $$ begin return p = 'x'; end $$")  # fmt: skip
        attacker.rows(_PATH)
        attacker.rows("select public.sloppy('y')")
        trapped = attacker.rows("select distinct who from public.canary where who operator(pg_catalog.<>) current_user")
        assert trapped == [(site.owner,)]
        attacker.rows("reset search_path")
        site.admin.rows("truncate public.canary")

        attacker.rows(_PATH)
        _use_everything(attacker)
        attacker.rows("reset search_path")
        me = attacker.conn.info.user
        assert site.admin.rows("select distinct who from public.canary where who <> %s", me) == []
        tables = site.admin.rows(
            "select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'"
            " and relname ~ '^_private_'"
        )
        assert len(tables) > 10
        for (table,) in tables:
            assert site.admin.value(f"select count(*) from public.{table}") == 0
    finally:
        role = sql.Identifier(attacker.conn.info.user)
        attacker.close()
        site.admin.conn.execute(sql.SQL("drop owned by {}").format(role))
        site.admin.rows("drop function if exists public.sloppy")
        site.admin.rows("drop table public.canary")


_SETTINGS = {
    "transform_null_equals": "on",
    "quote_all_identifiers": "on",
    "backslash_quote": "on",
    "escape_string_warning": "off",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kathmandu",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "xmloption": "document",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "default_toast_compression": "pglz",
    "check_function_bodies": "off",
    "row_security": "off",
    "plan_cache_mode": "force_custom_plan",
    "enable_indexscan": "off",
    "constraint_exclusion": "off",
    "enable_partition_pruning": "off",
    "lc_monetary": "C",
    "client_encoding": "LATIN1",
    "search_path": '"$user", pg_temp, public',
    "standard_conforming_strings": "off",
}


def test_settings_of_the_caller_change_nothing_that_is_done(site: Site) -> None:
    """A setting that changes how SQL is read makes a condition true, or a literal end early, inside a function."""
    session = site.session("worker")
    session.register_queue("q\\' ü")
    for name, value in _SETTINGS.items():
        try:
            session.value("select set_config(%s, %s, false)", name, value)
        except (psycopg.errors.InvalidParameterValue, psycopg.errors.FeatureNotSupported):
            assert name in ("standard_conforming_strings",)  # may not be switched off any more
    owner = session.register_orchestrator("q\\' ü", tasks=["t\\'; drop table x; --"])
    one = session.invoke("q\\' ü", "t\\'; drop table x; --", key="k\\'", payload={"a": "\\' \u00fc"})
    two = session.invoke("q\\' ü", "t\\'; drop table x; --", key="k\\'")
    assert one == two
    due = session.value(
        "select {s}.invoke('t', queue => %s, delay => '1 hour', deadline => now() + interval '2 hours')", "q\\' ü"
    )
    (claimed,) = session.claim(owner, "q\\' ü", tasks=["t\\'; drop table x; --"])
    assert (claimed.id, claimed.attempt) == (one, 1)
    assert session.flush(owner, Outcome(one, claimed.claim_no, "completed", result='{"b": "\\\\\\u0027"}')) == {}
    ended = session.run(session.calls.results([one]))[one]
    assert (str(ended.state), ended.result) == ("completed", '{"b": "\\\\\'"}')
    assert site.admin.rows(
        "select date_part('epoch', run_at - created_at), date_part('epoch', deadline_at - created_at)"
        " from {s}._private_executions where id = %s", due
    )[0] == pytest.approx((3600, 7200), abs=30)  # fmt: skip
    assert session.value("select count(*) from {s}.recover(%s)", "q\\' ü") == 1


# --- a producer in bad faith ---


def test_producer_cancels_only_what_it_invoked(site: Site) -> None:
    """Any producer stops any other's work, whose ids it has seen in a log."""
    mine, other = site.session("producer"), site.session("worker")
    other.register_queue("q")
    own = [mine.invoke("q"), mine.invoke("unregistered"), mine.invoke("q")]
    others = [other.invoke("q"), other.invoke("unregistered")]
    owner = other.register_orchestrator()
    other.claim(owner, limit=1)
    done = mine.run(mine.calls.cancel([*own, *others, uuid4()], "mine"))
    assert sorted(str(done[i]) for i in own) == ["cancelled", "cancelled", "requested"]
    assert {str(done[i]) for i in done if i not in own} == {"unknown"}
    for execution in others:
        assert site.admin.live(execution, "state <> 'cancelled', cancel_requested_at") == (True, None)
    with pytest.raises(DENIED):
        mine.rows("select * from {s}.cancel_matching('all of it')")
    operator = site.session("operator")
    assert {str(s) for s in operator.run(operator.calls.cancel(others, None)).values()} == {"cancelled"}


def test_behind_a_pooler_the_login_counts_not_the_role_that_was_set(site: Site) -> None:
    """A pooler's login sets a role for each client: what is recorded is the login, and rights are the set role's."""
    pool = site.new_role(f"pool_{uuid4().hex[:6]}")
    alter = sql.SQL("alter role {} noinherit").format(sql.Identifier(pool))
    site.admin.conn.execute(alter)
    for kind in ("producer", "operator"):
        grant = sql.SQL("grant {} to {}").format(sql.Identifier(site.role(kind)), sql.Identifier(pool))
        site.admin.conn.execute(grant)
    session = site.session_of(pool)
    with pytest.raises(DENIED):
        session.invoke()
    set_role = sql.SQL("set role {}")
    session.conn.execute(set_role.format(sql.Identifier(site.role("producer"))))
    execution = session.invoke()
    assert site.admin.value("select created_by::regrole::text from {s}._private_executions") == pool
    theirs = site.session("worker").invoke()
    assert {str(s) for s in session.run(session.calls.cancel([theirs], None)).values()} == {"unknown"}
    session.conn.execute(set_role.format(sql.Identifier(site.role("operator"))))
    assert {str(s) for s in session.run(session.calls.cancel([theirs, execution], None)).values()} == {"cancelled"}


def test_every_other_verb_is_refused(site: Site) -> None:
    """A verb is checked only when it reaches a table, and does half its work before."""
    site.session("worker").register_queue("q")
    functions = site.admin.rows(
        "select proname::text, (select coalesce(string_agg('null::' || format_type(t, null), ', ' order by n), '')"
        " from unnest(proargtypes) with ordinality x (t, n)) from pg_proc"
        " where pronamespace = '{s}'::regnamespace and proname !~ '^_test_' and prorettype <> 'trigger'::regtype"
        # A strict one is not even called with nulls; the matrix has those.
        " and not proisstrict"
    )
    before = site.admin.dump()
    for kind in (*KINDS, "stranger"):
        session = site.session(kind)
        for name, arguments in functions:
            marked = name.rstrip("0123456789")
            listed = CALLS.get(f"{marked}N" if marked.endswith("_") else name, set())
            if kind not in listed:
                with pytest.raises(DENIED):
                    session.rows(f"select {{s}}.{name}({arguments})")
    assert site.admin.dump() == before


@pytest.mark.parametrize("kind", [*KINDS, "stranger"])
def test_tables_cannot_be_touched_nor_objects_made(site: Site, kind: str) -> None:
    """What no verb offers is done to the tables; or a trigger, a rule, a function in our schema does it later."""
    site.session("worker").register_queue("q")
    site.admin.invoke("q")
    session = site.session(kind)
    for statement in (
        "select payload from {s}._private_executions",
        "select payload from {s}._private_queue_1",
        "select id from {s}.executions",
        "copy {s}._private_executions to stdout",
        "insert into {s}._private_queues (name, registered_at) values ('mine', now())",
        "update {s}._private_executions set priority = 9",
        "delete from {s}._private_queue_1",
        "truncate {s}._private_finished_0",
        "do $$ begin lock table {s}._private_executions in access share mode; end $$",
        "select nextval('{s}._private_queues_no_seq')",
        "create table {s}.mine ()",
        "create function {s}.mine() returns int language sql return 1",
        "create trigger mine before insert on {s}._private_executions execute function {s}._private_on_insert()",
        "create rule mine as on insert to {s}.executions do instead nothing",
        "alter function {s}.invoke_many owner to current_user",
        "drop function {s}.load_payload",
        "create table pg_temp.mine (state {s}.execution_state)",
        "grant all on all tables in schema {s} to current_user",
    ):
        with pytest.raises(psycopg.Error) as caught:
            session.rows(statement)
        assert caught.value.sqlstate in ("42501", "42601"), statement
        assert isinstance(caught.value, DENIED) or "rule" in statement, (statement, caught.value)
    assert site.admin.value("select count(*) from {s}._private_executions where priority = 0") == 1


def test_id_is_all_that_leads_to_a_result(site: Site) -> None:
    """Whoever has an id may read what came of it; without one nothing is to be had, and ids are not to be guessed."""
    worker, producer = site.session("worker"), site.session("producer")
    worker.register_queue("q")
    execution = worker.invoke("q", payload={"card": "4111"})
    owner = worker.register_orchestrator()
    (claimed,) = worker.claim(owner)
    worker.flush(owner, Outcome(execution, claimed.claim_no, "completed", result='"secret"'))
    assert producer.run(producer.calls.results([execution]))[execution].result == '"secret"'
    # One bit beside it, each of the random ones.
    near = [UUID(int=execution.int ^ (1 << bit)) for bit in range(56)]
    assert producer.run(producer.calls.results(near)) == {}
    assert all(s.state is None for s in producer.run(producer.calls.standing(near)).values())
    random = [site.admin.value("select substring({s}._private_new_id(1, now())::text, 20)") for _ in range(200)]
    assert len(set(random)) == 200


# --- a worker that guesses ---


def test_flush_with_a_guessed_token_writes_nothing(site: Site) -> None:
    """A worker ends what another one runs: the token is (id, claim_no, owner), and the owner is not to be guessed."""
    mine, other = site.session("worker"), site.session("worker")
    mine.register_queue("q")
    ids = [mine.invoke("q") for _ in range(50)]
    owner = mine.register_orchestrator()
    rival = other.register_orchestrator()
    claimed = mine.claim(owner)
    assert len(claimed) == 50
    before = site.admin.dump()
    guesses = [rival, *(uuid4() for _ in range(20)), *(UUID(int=owner.int ^ (1 << bit)) for bit in range(128)), ids[0]]
    for guess in guesses:
        outcomes = [Outcome(c.id, no, "completed") for c in claimed for no in (1,)]
        assert set(other.flush(guess, *outcomes).values()) <= {"fenced", "gone"}
        assert other.run(other.calls.load_payload(ids[0], 1, guess)) is None
    for no in (0, 2, 3, -1, 2**62):
        other.flush(owner, *(Outcome(i, no, "failed", error="{}") for i in ids))
    assert other.run(other.calls.heartbeat(uuid4(), 60.0, [])).is_alive is False
    assert other.run(other.calls.release_unknown(uuid4(), "q", [])) == 0
    assert site.admin.dump() == before
