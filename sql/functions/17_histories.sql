-- Looking at executions: one with all that is known of it, or many by a filter; and beginning them anew from a record.

-- Whether the caller of the verb at hand may see what handlers were given and returned, as producers and workers do, and the
-- owner. The caller is found as by _private_may_cancel_all.
create or replace function @schema@._private_may_see_values() returns boolean
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select bool_or(has_function_privilege(case current_setting('role') when 'none' then session_user else current_setting('role') end,
        p.oid, 'execute'))
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname = @schema_literal@ and p.proname in ('_private_kind_producer', '_private_kind_worker')
$$;

-- The least id that an execution made at an instant, or later, can have. The id holds the nearest millisecond: so what was made
-- before an instant is beneath the least id of two milliseconds later.
create or replace function @schema@._private_first_id(p_at timestamptz) returns uuid
    language sql immutable parallel safe strict
    return (pg_catalog.lpad(pg_catalog.to_hex((pg_catalog.floor(
        least(greatest(pg_catalog.date_part('epoch', p_at), 0), 253402300799) * 1000))::bigint), 12, '0') || pg_catalog.repeat('0', 20))::uuid;

-- When an id was made, to the millisecond.
create or replace function @schema@._private_made_at(p_id uuid) returns timestamptz
    language sql immutable parallel safe strict
    return pg_catalog.to_timestamp((('x' || pg_catalog.lpad(pg_catalog.encode(pg_catalog.substring(pg_catalog.uuid_send(p_id), 1, 6), 'hex'), 16, '0'))::bit(64)::bigint
        / 1000.0)::double precision);

-- What is known of an execution: one row, or none if nothing of it is kept. The live row counts before a finished one.
-- error: of the last failed attempt. open_waits: how many; waits: the first 100 of them by position, objects with
-- name, kind, target, scope, due_at, created_at. origin_id: the execution that it was forked from, or a restart of. For whoever
-- has the id, as execution_errors: no payload, no result. Locks and writes nothing.
create or replace function @schema@.execution_details(p_id uuid)
    returns table (
        id uuid, queue text, task text, version text, state text, priority int, attempt int, max_attempts int, crashes int, generation int,
        depth int, created_at timestamptz, run_at timestamptz, claimed_at timestamptz, finished_at timestamptz, expires_at timestamptz,
        deadline_at timestamptz, parent_id uuid, root_id uuid, origin_id uuid, dedupe_key text, tags text[], progress jsonb,
        cancel_requested boolean, reason text, error jsonb, open_waits bigint, waits jsonb
    )
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
begin
    return query
    select e.id, e.queue, e.task, e.version, e.state::text, e.priority, e.attempt, e.max_attempts, e.crashes, e.generation, e.depth,
        e.created_at, e.run_at, e.claimed_at, null::timestamptz, null::timestamptz, e.deadline_at, e.parent_id, e.root_id,
        (e.headers ->> 'pgconductor.origin')::uuid, e.dedupe_key, e.tags, e.progress, e.cancel_requested_at is not null, e.cancel_reason, e.errors -> -1,
        (select count(*) from @schema@._private_waits w where w.execution_id = e.id and w.resolved_at is null),
        (select jsonb_agg(jsonb_build_object('name', w.name, 'kind', w.kind, 'target', w.target, 'scope', w.scope, 'due_at', w.due_at,
                'created_at', w.created_at) order by w.position, w.name)
            from (select * from @schema@._private_waits w where w.execution_id = e.id and w.resolved_at is null
                order by w.position, w.name limit 100) w)
    from @schema@._private_executions e where e.queue_no = @schema@._private_queue_no(p_id) and e.id = p_id;
    if found then
        return;
    end if;
    return query
    select f.id, f.queue, f.task, f.version, f.state::text, f.priority, f.attempt, f.max_attempts, f.crashes, f.generation, f.depth,
        f.created_at, f.run_at, f.claimed_at, f.finished_at, f.expires_at, null::timestamptz, f.parent_id, f.root_id,
        (f.headers ->> 'pgconductor.origin')::uuid, f.dedupe_key, f.tags, f.progress, f.state = 'cancelled', f.cancel_reason, f.errors -> -1,
        0::bigint, null::jsonb
    from @schema@._private_finished f where f.id = p_id order by f.generation desc limit 1;
end $$;

-- What an execution has done and waits for, in the order of positions: of a live one as it stands, of a finished one as it was
-- kept. outcome: null for an open wait. Values are told to those who may see results; others get null, and withheld
-- true. resolved_at: of a step when it was recorded. Locks and writes nothing.
create or replace function @schema@.execution_steps(p_id uuid)
    returns table (
        name text, kind text, "position" int, attempt int, outcome text, target text, scope text, value text, withheld boolean, error jsonb,
        created_at timestamptz, resolved_at timestamptz, due_at timestamptz
    )
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_may_see constant boolean := coalesce(@schema@._private_may_see_values(), false);
begin
    if exists (select from @schema@._private_executions e where e.queue_no = @schema@._private_queue_no(p_id) and e.id = p_id) then
        return query
        select x.name, x.kind, x.position, x.attempt, x.outcome, x.target, x.scope, case when v_may_see then x.value::text end,
            x.value is not null and not v_may_see, x.error, x.created_at, x.resolved_at, x.due_at
        from (
            select s.name, s.kind, s.position, s.attempt, coalesce(s.outcome, case when s.error is null then 'completed' else 'failed' end) as outcome,
                s.target, null::text as scope, s.value, s.error, s.created_at, s.created_at as resolved_at, null::timestamptz as due_at
            from @schema@._private_steps s where s.execution_id = p_id
            union all
            select w.name, w.kind, w.position, w.attempt, w.outcome, w.target, w.scope, w.value, w.error, w.created_at, w.resolved_at, w.due_at
            from @schema@._private_waits w where w.execution_id = p_id
        ) x
        order by x.position, x.name;
        return;
    end if;
    return query
    select s.name, s.kind, s.position, coalesce(s.attempt, 1),
        -- What has no resolved_at is a wait that was open when its execution ended.
        coalesce(s.outcome, case when s.resolved_at is not null then case when s.error is null then 'completed' else 'failed' end end),
        s.target, null::text, case when v_may_see then s.value::text end, s.value is not null and not v_may_see, s.error, s.created_at, s.resolved_at,
        null::timestamptz
    from (select f.steps from @schema@._private_finished f where f.id = p_id order by f.generation desc limit 1) f
        cross join lateral jsonb_to_recordset(f.steps) as s (name text, kind text, position int, attempt int, outcome text, target text,
            value jsonb, error jsonb, created_at timestamptz, resolved_at timestamptz)
    order by s.position, s.name;
end $$;

-- Executions, live and finished, the newest first, that fit all that is given; no payloads, no results. At most p_limit of them,
-- and at most p_look are looked at (of either kind, so twice that many rows are read, by the indexes of ids): if there may be
-- more to look at, the last row has only the id at which to go on, as p_after. Whoever pages passes the last id of the page
-- before as p_after. p_states: of all seven. p_tags: all of these. p_root: that execution and all beneath it. What is created
-- meanwhile comes before the first page; what ends meanwhile keeps its place.
create or replace function @schema@.list_executions(
    p_queue text default null, p_task text default null, p_states text[] default null, p_created_after timestamptz default null,
    p_created_before timestamptz default null, p_tags text[] default null, p_dedupe_key text default null, p_parent uuid default null,
    p_root uuid default null, p_limit int default 100, p_after uuid default null, p_look int default 10000
) returns table (
    id uuid, queue text, task text, version text, state text, priority int, attempt int, crashes int, generation int, created_at timestamptz,
    run_at timestamptz, claimed_at timestamptz, finished_at timestamptz, dedupe_key text, tags text[], parent_id uuid, root_id uuid,
    error_type text, reason text
)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
    set enable_seqscan = off
    set jit = off
    set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    -- An id tells when it was made. Children come after their parents, but for a clock that was put back a little.
    v_from constant uuid := greatest(
        '00000000-0000-0000-0000-000000000000', @schema@._private_first_id(p_created_after),
        @schema@._private_first_id(@schema@._private_made_at(p_parent) - interval '1 hour'),
        @schema@._private_first_id(@schema@._private_made_at(p_root) - interval '1 hour'));
    v_before constant uuid := least('ffffffff-ffff-ffff-ffff-ffffffffffff', p_after,
        @schema@._private_first_id(p_created_before + interval '2 ms'));
    v_nos constant int[] := case when p_queue is not null then
        array(select 0 union all select q.no from @schema@._private_queues q where q.name = p_queue) end;
begin
    return query
    with live as materialized (
        select e.id, e.queue, e.task, e.version, e.state, e.priority, e.attempt, e.crashes, e.generation, e.created_at, e.run_at, e.claimed_at,
            null::timestamptz as finished_at, e.dedupe_key, e.tags, e.parent_id, e.root_id, e.errors, e.cancel_reason
        from @schema@._private_executions e
        where e.id >= v_from and e.id < v_before and (v_nos is null or e.queue_no = any (v_nos))
        order by e.id desc limit p_look
    ), finished as materialized (
        select f.id, f.queue, f.task, f.version, f.state, f.priority, f.attempt, f.crashes, f.generation, f.created_at, f.run_at, f.claimed_at,
            f.finished_at, f.dedupe_key, f.tags, f.parent_id, f.root_id, f.errors, f.cancel_reason
        from @schema@._private_finished f
        where f.id >= v_from and f.id < v_before
        order by f.id desc limit p_look
    ), looked as materialized (
        select * from (table live union all table finished) x order by x.id desc limit p_look
    ), fit as materialized (
        select * from looked l
        where (p_queue is null or l.queue = p_queue) and (p_task is null or l.task = p_task)
            and (p_states is null or l.state::text = any (p_states)) and (p_tags is null or l.tags @> p_tags)
            and (p_created_after is null or l.created_at >= p_created_after) and (p_created_before is null or l.created_at < p_created_before)
            and (p_dedupe_key is null or l.dedupe_key = p_dedupe_key) and (p_parent is null or l.parent_id = p_parent)
            and (p_root is null or p_root in (l.root_id, l.id))
        order by l.id desc limit p_limit
    )
    select f.id, f.queue, f.task, f.version, f.state::text, f.priority, f.attempt, f.crashes, f.generation, f.created_at, f.run_at, f.claimed_at,
        f.finished_at, f.dedupe_key, f.tags, f.parent_id, f.root_id, f.errors -> -1 ->> 'type', f.cancel_reason
    from fit f
    union all
    select m.id, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null
    from (select l.id from looked l order by l.id limit 1) m
    where (select count(*) from looked) >= p_look and (select count(*) from fit) < p_limit
    order by 1 desc, 5 nulls last;
end $$;

-- What live executions have recorded, for trying new code against it: those that have a history, by id, at most p_limit of them;
-- at most p_look live ones are looked at. If there may be more, the last row has only the id at which to go on, as p_after.
-- attempt: which one the run would be that goes on with it. payload: JSON text. records: an array of arrays of name, kind,
-- position, attempt, outcome, target, scope, and the JSON texts of value and error; waits that are due count as open. One
-- snapshot; locks and writes nothing, so it may be called in a read-only transaction or on a standby.
create or replace function @schema@.stored_histories(
    p_queue text default null, p_task text default null, p_limit int default 50, p_after uuid default null, p_look int default 10000
) returns table (id uuid, queue text, task text, version text, state text, attempt int, payload text, records jsonb)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
    set enable_seqscan = off
    set jit = off
    set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
    return query
    with looked as materialized (
        select e.id, e.queue, e.task, e.version, e.state, e.attempt, e.payload, e.is_durable from @schema@._private_executions e
        where e.id > coalesce(p_after, '00000000-0000-0000-0000-000000000000')
        order by e.id limit p_look
    ), fit as materialized (
        select l.* from looked l
        where l.is_durable and (p_queue is null or l.queue = p_queue) and (p_task is null or l.task = p_task)
        order by l.id limit p_limit
    )
    select f.id, f.queue, f.task, f.version, f.state::text, f.attempt + case when f.state = 'running' then 0 else 1 end,
        coalesce(f.payload, (select l.payload from @schema@._private_payloads l where l.execution_id = f.id))::text,
        (select jsonb_agg(jsonb_build_array(x.name, x.kind, x.position, x.attempt, x.outcome, x.target, x.scope, x.value::text, x.error::text)
                order by x.position, x.name)
            from (
                select s.name, s.kind, s.position, s.attempt, coalesce(s.outcome, case when s.error is null then 'completed' else 'failed' end) as outcome,
                    s.target, null::text as scope, s.value, s.error
                from @schema@._private_steps s where s.execution_id = f.id
                union all
                select w.name, w.kind, w.position, w.attempt, w.outcome, w.target, w.scope, w.value, w.error
                from @schema@._private_waits w where w.execution_id = f.id
            ) x)
    from fit f
    union all
    select m.id, null, null, null, null, null, null, null
    from (
        select l.id from looked l where (select count(*) from fit) < p_limit order by l.id desc limit 1
    ) m
    where (select count(*) from looked) >= p_look
    order by 1, 5 nulls last;
end $$;
