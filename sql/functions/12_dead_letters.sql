-- Dead letters: executions that failed or were cancelled and are still kept. finished → ready (T13).

-- The dead letters, those that ended last first, at most p_limit. To go on, pass finished_at and id of the last row of the page
-- before. p_queue, p_task: null for all; p_states: of failed and cancelled. error is the last one.
create or replace function @schema@.dead_letters(
    p_queue text default null, p_task text default null, p_limit int default 100, p_after_finished_at timestamptz default null,
    p_after_id uuid default null, p_states text[] default '{failed,cancelled}'
) returns table (
    id uuid, queue text, task text, state text, attempts int, crashes int, generation int, created_at timestamptz,
    finished_at timestamptz, expires_at timestamptz, dedupe_key text, error jsonb, reason text
)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
    set enable_seqscan = off
    set jit = off
    set enable_bitmapscan = off
as $$
#variable_conflict use_column
begin
    -- One index per slot is in this order, of just these rows: slots are merged, and no more is read than is passed over
    -- by the filters. With a bound in every case, so that it is one query.
    return query
    select f.id, f.queue, f.task, f.state::text, f.attempt, f.crashes, f.generation, f.created_at, f.finished_at, f.expires_at,
        f.dedupe_key, f.errors -> -1, f.cancel_reason
    from @schema@._private_finished f
    where f.state <> 'completed' and (p_queue is null or f.queue = p_queue) and (p_task is null or f.task = p_task)
        and f.state::text = any (p_states)
        and (f.finished_at, f.id) < (coalesce(p_after_finished_at, 'infinity'), coalesce(p_after_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff'))
    order by f.finished_at desc, f.id desc limit p_limit;
end $$;

-- Let failed and cancelled executions begin anew: ready now, with all their attempts before them, the errors and the steps
-- they have had, the next generation, and the same id. The deadline is gone; claim_no goes on, so no claim of a former life
-- fits. Returns a row per distinct id:
--   retried     by this call
--   live        it is under way: somebody retried it before, or it had not ended
--   duplicate   a live execution holds its dedupe key, and would be its twin: it stays a dead letter
--   completed   it did what it was to do: refused
--   unknown     there is no row of it: it was not kept, or not any longer, or never was
-- Whoever removes the finished row has retried it: of two calls at once one does. Locks: dedupe keys in the order of (queue,
-- task, key), as invoke_many; finished rows in the order of ids, waiting for another retry; K of the queues, by the
-- trigger that wakes workers. Maintenance never waits for this one; this one waits for it at most as long as it takes.
create or replace function @schema@.retry(p_ids uuid[]) returns table (id uuid, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_me constant oid := quote_ident(session_user)::regrole;
    v_keyed uuid[];
    v_held uuid[];
    v_free uuid[];
    v_retried uuid[];
begin
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);  -- what was acknowledged is not lost
    end if;
    -- So that partitions attached since this transaction began are known: see invoke_many.
    if pg_current_xact_id_if_assigned() is not null then
        perform pg_get_constraintdef(0);
    end if;
    -- The keys first, before a row is locked: who inserts or ends an execution with one of them is waited for here. The state
    -- as text, here and below: else the planner may walk the index of all dead letters.
    with wanted as (
        select distinct f.queue, f.task, f.dedupe_key, f.id from @schema@._private_finished f
        where f.id = any (p_ids) and f.state::text <> 'completed' and f.dedupe_key is not null
    ), taken as (
        insert into @schema@._private_dedupe_keys (queue, task, key, execution_id)
        select w.queue, w.task, w.dedupe_key, w.id from wanted w order by w.queue, w.task, w.dedupe_key, w.id
        on conflict do nothing
        returning execution_id
    )
    select coalesce(array_agg(w.id), '{}'), coalesce((select array_agg(t.execution_id) from taken t), '{}')
    into v_held, v_keyed from wanted w;
    v_held := array(select h from unnest(v_held) as h where h <> all (v_keyed));

    v_free := array(
        select f.id from @schema@._private_finished f
        where f.id = any (p_ids) and f.id <> all (v_held) and f.state::text <> 'completed'
        order by f.id for update);
    with gone as (
        delete from @schema@._private_finished f where f.id = any (v_free) returning *
    ), again as (
        -- outcome: so that a flush whose reply was lost is still told that it was written.
        insert into @schema@._private_executions (queue_no, priority, max_attempts, attempt, crashes, generation, depth, state, id, is_durable,
            progress, claim_no, outcome, outcome_claim, run_at, created_at, timeout, backoff, queue, task, dedupe_key, payload, errors, parent_id,
            root_id, limit_key, version, tags, headers, created_by)
        select @schema@._private_queue_no(g.id), g.priority, g.max_attempts, 0, 0, g.generation + 1, g.depth, 'ready', g.id,
            g.steps is not null, g.progress, g.claim_no, g.state::text, g.claim_no, v_now, g.created_at, g.timeout, g.backoff, g.queue, g.task, g.dedupe_key, g.payload, g.errors,
            g.parent_id, g.root_id, g.limit_key, g.version, g.tags, g.headers, v_me
        from gone g
        order by g.finished_at, g.id
        returning id
    ), steps as (
        -- All but waits that were open, which begin anew, and the failures at the end, which are tried again: as
        -- _private_trailing_failures, before they become records among the others.
        insert into @schema@._private_steps (execution_id, name, kind, position, claim_no, attempt, created_at, value, error, outcome, target,
            event_id)
        select s.id, s.name, s.kind, s.position, s.claim_no, coalesce(s.attempt, 1), s.created_at, s.value, s.error, s.outcome, s.target,
            s.event_id
        from (
            select g.id, r.*, f.failed_at, max(case when f.failed_at is null then r.created_at end)
                over (partition by g.id order by r.position desc rows between unbounded preceding and 1 preceding) as later_at
            from gone g
                cross join lateral jsonb_to_recordset(g.steps) as r (name text, kind text, position int, claim_no bigint, attempt int,
                    created_at timestamptz, resolved_at timestamptz, value jsonb, error jsonb, outcome text, target text, event_id bigint)
                cross join lateral (select case when r.error is not null or r.outcome = 'timed_out'
                    then coalesce(r.resolved_at, '-infinity') end as failed_at) f
        ) s
        where (s.outcome is not null or s.value is not null or s.error is not null) and (s.failed_at is null or s.later_at >= s.failed_at)
    )
    select coalesce(array_agg(a.id), '{}') into v_retried from again a;
    -- Promises that it has not heard of are open again.
    insert into @schema@._private_promises (id, execution_id, created_at)
    select (s.value #>> '{}')::uuid, s.execution_id, v_now from @schema@._private_steps s
    where s.execution_id = any (v_retried) and s.kind = 'new_promise' and not exists (
        select from @schema@._private_steps x where x.execution_id = s.execution_id and x.kind = 'promise' and x.target = s.value #>> '{}');
    -- Keys of rows that somebody else moved or removed in the meantime.
    delete from @schema@._private_dedupe_keys d where d.execution_id = any (v_keyed) and d.execution_id <> all (v_retried);

    return query
    select i, case
            when i = any (v_retried) then 'retried'
            when exists (select from @schema@._private_executions e
                where e.queue_no = @schema@._private_queue_no(i) and e.id = i) then 'live'
            else coalesce((select case when f.state = 'completed' then 'completed' else 'duplicate' end
                from @schema@._private_finished f where f.id = i order by f.generation desc limit 1), 'unknown') end
    from (select distinct i from unnest(p_ids) as i) x;
end $$;

-- Retry what a filter finds, at most p_limit executions per call, the oldest first: all that is given must fit. p_error_type is
-- that of the last error; without p_states only failed ones, since a cancellation was somebody's will. Those whose key
-- a live execution holds are left out, so calling it until `retried` is 0 comes to an end, if p_finished_before is given:
-- else it also finds what was retried and has failed again.
create or replace function @schema@.retry_matching(
    p_queue text default null, p_task text default null, p_error_type text default null, p_finished_after timestamptz default null,
    p_finished_before timestamptz default null, p_limit int default 1000, p_states text[] default '{failed}'
) returns table (retried bigint, duplicates bigint)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_custom_plan
    set enable_seqscan = off
    set jit = off
    set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    v_ids uuid[];
begin
    v_ids := array(
        select f.id from @schema@._private_finished f
        where f.state <> 'completed' and (p_queue is null or f.queue = p_queue) and (p_task is null or f.task = p_task)
            and f.state::text = any (p_states)
            and (p_error_type is null or f.errors -> -1 ->> 'type' = p_error_type)
            and f.finished_at >= coalesce(p_finished_after, '-infinity') and f.finished_at < coalesce(p_finished_before, 'infinity')
            and (f.dedupe_key is null or not exists (select from @schema@._private_dedupe_keys d
                where d.queue = f.queue and d.task = f.task and d.key = f.dedupe_key))
        order by f.finished_at, f.id limit p_limit);
    return query
    select count(*) filter (where r.status = 'retried'), count(*) filter (where r.status = 'duplicate')
    from @schema@.retry(v_ids) r;
end $$;
