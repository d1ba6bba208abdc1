-- Looking at executions: one with all that is known of it, or many by a filter; and beginning them anew from a record.

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
        (e.headers ->> 'pgconductor:origin')::uuid, e.dedupe_key, e.tags, e.progress, e.cancel_requested_at is not null, e.cancel_reason, e.errors -> -1,
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
        (f.headers ->> 'pgconductor:origin')::uuid, f.dedupe_key, f.tags, f.progress, f.state = 'cancelled', f.cancel_reason, f.errors -> -1,
        0::bigint, null::jsonb
    from @schema@._private_finished f where f.id = p_id order by f.generation desc limit 1;
end $$;

-- What an execution has done and waits for, in the order of positions: of a live one as it stands, of a finished one as it was
-- kept. outcome: null for an open wait. Values are told to those who may see what handlers were given and returned, which are
-- producers, workers and the owner; others get null, and withheld true. resolved_at: of a step when it was
-- recorded. Locks and writes nothing.
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
    v_may_see constant boolean := coalesce(@schema@._private_is_any('{producer,worker}'), false);
begin
    if exists (select from @schema@._private_executions e where e.queue_no = @schema@._private_queue_no(p_id) and e.id = p_id) then
        return query
        select x.name, x.kind, x.position, x.attempt, x.outcome, x.target, x.scope, case when v_may_see then x.value::text end,
            x.value is not null and not v_may_see, x.error, x.created_at,
            coalesce(x.resolved_at, case when x.outcome is not null then x.created_at end), x.due_at
        from @schema@._private_records x where x.execution_id = p_id
        order by x.position, x.name;
        return;
    end if;
    return query
    select s.name, s.kind, s.position, coalesce(s.attempt, 1),
        -- What has no outcome is a wait that was open when its execution ended. A step is over when it is recorded.
        s.outcome, s.target, null::text, case when v_may_see then s.value::text end, s.value is not null and not v_may_see, s.error,
        s.created_at, coalesce(s.resolved_at, case when s.outcome is not null then s.created_at end), null::timestamptz
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
            from @schema@._private_records x where x.execution_id = f.id)
    from fit f
    union all
    select m.id, null, null, null, null, null, null, null
    from (
        select l.id from looked l where (select count(*) from fit) < p_limit order by l.id desc limit 1
    ) m
    where (select count(*) from looked) >= p_look
    order by 1, 5 nulls last;
end $$;

-- A new execution of the same task and payload as another one, live or finished, with its queue, priority and options, but not
-- its deadline, dedupe key or parent. p_from_step: with the records that come before that one, waits only if they are over;
-- null: with none. In either case it has received what former lives of the other one had when they made that payload. Locks: as
-- invoke_many. PC002: nothing of it is kept, or not its payload. PC001: there is no such record.
create or replace function @schema@._private_begin_anew(p_id uuid, p_from_step text) returns table (id uuid, task text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_from record;
    v_records jsonb;
    v_position int;
    v_id uuid;
    v_options jsonb;
begin
    -- All of it in one snapshot: it may end or continue as new meanwhile.
    select x.*, case when x.payload is null then (select l.payload from @schema@._private_payloads l where l.execution_id = p_id) end as large,
        array(select r.event_id from @schema@._private_receipts r where r.execution_id = p_id) as received
    into v_from from (
        select 0 as place, e.generation, e.queue, e.task, e.payload, e.priority, e.timeout, e.max_attempts, e.tags, e.backoff, e.version,
            e.limit_key, e.headers, case when p_from_step is not null then @schema@._private_history(e.id) end as steps
        from @schema@._private_executions e where e.queue_no = @schema@._private_queue_no(p_id) and e.id = p_id
        union all
        select 1, f.generation, f.queue, f.task, f.payload, f.priority, f.timeout, f.max_attempts, f.tags, f.backoff, f.version,
            f.limit_key, f.headers, f.steps
        from @schema@._private_finished f where f.id = p_id
    ) x order by x.place, x.generation desc limit 1;
    if not found then
        raise exception using errcode = 'PC002', message = format('there is no execution %s, or it was not kept', p_id);
    end if;
    v_from.payload := coalesce(v_from.payload, v_from.large);
    if v_from.payload is null then
        raise exception using errcode = 'PC002', message = format('the payload of execution %s was not kept', p_id);
    end if;
    if p_from_step is not null then
        v_records := v_from.steps;
        v_position := (select r.position from jsonb_to_recordset(v_records) as r (name text, position int) where r.name = p_from_step);
        if v_position is null then
            raise exception using errcode = 'PC001', message = format('execution %s has no record named %L', p_id, p_from_step);
        end if;
    end if;
    v_options := (
        select jsonb_object_agg(o.key, o.value) from jsonb_each(jsonb_build_object('timeout', extract(epoch from v_from.timeout),
            'max_attempts', v_from.max_attempts, 'tags', v_from.tags, 'backoff', v_from.backoff, 'version', v_from.version)) o
        where o.value <> 'null');
    v_id := (select i.id from @schema@.invoke_many(array[v_from.task], array[v_from.payload], array[v_from.queue],
        array[v_from.priority], p_options => array[v_options]) i);
    -- claim_no 1: so that its first claim is not taken for one that nobody had before, and loads the records.
    update @schema@._private_executions e set limit_key = v_from.limit_key,
        headers = coalesce(v_from.headers, '{}') || jsonb_build_object('pgconductor:origin', p_id),
        claim_no = case when v_position is null then 0 else 1 end, is_durable = v_position is not null
    where e.queue_no = @schema@._private_queue_no(v_id) and e.id = v_id;
    -- What was recorded in the last attempt is to be done again in the first of the new one.
    insert into @schema@._private_steps (execution_id, name, kind, position, claim_no, attempt, created_at, value, error, outcome, target,
        event_id)
    select v_id, r.name, r.kind, r.position, 1, case when r.attempt = max(r.attempt) over () then 1 else 0 end, r.created_at, r.value, r.error,
        r.outcome, r.target, r.event_id
    from (
        select r.name, r.kind, r.position, coalesce(r.attempt, 1) as attempt, r.created_at, r.value, r.error, r.outcome, r.target, r.event_id
        from jsonb_to_recordset(v_records) as r (name text, kind text, position int, attempt int, created_at timestamptz,
            value jsonb, error jsonb, outcome text, target text, event_id bigint)
        where r.position < v_position and r.outcome is not null
    ) r;
    insert into @schema@._private_receipts (execution_id, event_id, check_at)
    select v_id, v.id, @schema@._private_receipt_check(v.expires_at, @schema@._private_clock())
    from unnest(v_from.received) as r (id)
        cross join lateral (select v.id, v.expires_at from @schema@._private_events v where v.id = r.id offset 0) v;
    return query select v_id, v_from.task;
end $$;

-- A new execution that begins where another one had come to before a record of this name: see _private_begin_anew.
create or replace function @schema@.fork(p_id uuid, p_from_step text) returns table (id uuid, task text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if p_from_step is null then
        raise exception using errcode = 'PC001', message = 'a fork needs the name of a record; a restart copies none';
    end if;
    return query select b.id, b.task from @schema@._private_begin_anew(p_id, p_from_step) b;
end $$;

-- A new execution of the same task and payload: see _private_begin_anew.
create or replace function @schema@.restart(p_id uuid) returns table (id uuid, task text)
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select b.id, b.task from @schema@._private_begin_anew(p_id, null) b
$$;

-- Instead of a flush: let executions begin a new life under the same id, with the same key, parent and deadline. Their records
-- go, attempts and crashes are counted anew. It stays marked as having a history: its end has messages and channels to deal
-- with. p_lives: objects of payload and version. Returns those that were not written:
--   cancelled       its cancellation was requested: flush it as cancelled
--   open_children   it has children that were neither abandoned nor asked to end: flush it as failed
--   already, fenced, gone   as flush
-- Each is written whole or not at all. Locks: the rows, in the order of partition and id; K of their queues, by announcing them.
create or replace function @schema@.continue_as_new(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_lives jsonb[])
    returns table (id uuid, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
    set lock_timeout = '1s'
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_held uuid[];
    v_cancelled uuid[];
    v_parents uuid[];
    v_free uuid[];
    v_queues text[];
begin
    v_held := array(select h.id from @schema@._private_hold(p_owner, p_ids, p_claim_nos) h);
    v_now := @schema@._private_clock();
    v_cancelled := array(
        select e.id from unnest(v_held) as i join @schema@._private_executions e on e.queue_no = @schema@._private_queue_no(i) and e.id = i
        where e.cancel_requested_at is not null);
    -- A child that was asked to end is noted among the closings, or knows it.
    v_parents := array(
        select distinct w.execution_id from @schema@._private_waits w
        where w.execution_id = any (v_held) and w.kind = 'child' and w.resolved_at is null and w.on_close = 'cancel'
            and not exists (select from @schema@._private_closings c where c.execution_id = w.target::uuid)
            and not exists (select from @schema@._private_executions e
                where e.queue_no = @schema@._private_queue_no(w.target::uuid) and e.id = w.target::uuid and e.cancel_requested_at is not null));
    v_free := array(select i from unnest(v_held) as i where i <> all (v_cancelled) and i <> all (v_parents));

    perform @schema@._private_keep_receipts(v_free, v_now);
    delete from @schema@._private_steps s where s.execution_id = any (v_free);
    delete from @schema@._private_waits w where w.execution_id = any (v_free);
    delete from @schema@._private_promises p where p.execution_id = any (v_free);
    -- Its channels go on behind what they have, open, also those that the life before closed.
    update @schema@._private_channels c set first_seq = c.last_seq, closed_at = null, ended_at = null, expires_at = null
    where c.execution_id = any (v_free);
    delete from @schema@._private_payloads l where l.execution_id = any (v_free);
    insert into @schema@._private_payloads (execution_id, payload)
    select o.id, o.life -> 'payload' from unnest(p_ids, p_lives) as o (id, life)
    where o.id = any (v_free) and @schema@._private_is_large(o.life -> 'payload');
    with again as (
        update @schema@._private_executions e set state = 'ready', run_at = v_now, attempt = 0, crashes = 0, owner = null, claimed_at = null,
            outcome = 'continued', outcome_claim = e.claim_no, version = o.life ->> 'version',
            payload = case when not @schema@._private_is_large(o.life -> 'payload') then o.life -> 'payload' end
        from unnest(p_ids, p_lives) as o (id, life)
        where o.id = any (v_free) and e.queue_no = @schema@._private_queue_no(o.id) and e.id = o.id
        returning e.queue
    )
    select array_agg(distinct a.queue order by a.queue) into v_queues from again a;
    perform @schema@._private_announce(q) from unnest(v_queues) as q;

    return query
    select o.id, case
            when o.id = any (v_cancelled) then 'cancelled'
            when o.id = any (v_parents) then 'open_children'
            when exists (select from @schema@._private_executions e where e.queue_no = @schema@._private_queue_no(o.id) and e.id = o.id
                and e.outcome_claim = o.claim_no and e.outcome = 'continued') then 'already'
            when exists (select from @schema@._private_executions e where e.queue_no = @schema@._private_queue_no(o.id) and e.id = o.id)
                or exists (select from @schema@._private_finished f where f.id = o.id) then 'fenced'
            else 'gone' end
    from unnest(p_ids, p_claim_nos) as o (id, claim_no) where o.id <> all (v_free);
end $$;
