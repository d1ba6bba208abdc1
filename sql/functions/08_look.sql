-- Reading: results, states, counts. Nothing here locks or writes.

create or replace view @schema@.executions as
    select e.id, e.queue, e.task, e.state, e.priority, e.attempt, e.crashes, e.run_at, e.created_at, e.claimed_at,
        null::timestamptz as finished_at, e.dedupe_key,
        coalesce(e.payload, (select l.payload from @schema@._private_payloads l where l.execution_id = e.id)) as payload,
        null::jsonb as result, e.errors, e.claim_no, e.max_attempts, e.generation, e.timeout, e.deadline_at, e.tags,
        e.cancel_requested_at, e.cancel_reason, null::timestamptz as expires_at
    from @schema@._private_executions e
    union all
    select f.id, f.queue, f.task, f.state, f.priority, f.attempt, f.crashes, f.run_at, f.created_at, f.claimed_at,
        f.finished_at, f.dedupe_key,
        coalesce(f.payload, (select l.payload from @schema@._private_payloads l where l.execution_id = f.id)),
        f.result, f.errors, f.claim_no, f.max_attempts, f.generation, f.timeout, null::timestamptz, f.tags,
        null::timestamptz, f.cancel_reason, f.expires_at
    from @schema@._private_finished f;

-- How the given executions ended; those that are live, or of which nothing is kept, are left out. result is JSON
-- text, error the last one. Looks into the index of each slot of expiry, by a plan that is kept: to plan 42 slots anew takes
-- 0.6 ms, to look into them 0.1.
create or replace function @schema@.results(p_ids uuid[])
    returns table (id uuid, state text, result text, error jsonb, reason text)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
begin
    return query
    select distinct on (f.id) f.id, f.state::text, f.result::text, f.errors -> -1, f.cancel_reason
    from @schema@._private_finished f where f.id = any (p_ids)
    order by f.id, f.generation desc;
end $$;

-- Where the given executions stand: state "unknown" for those of which no row is there. live_workers counts the
-- workers of living orchestrators that serve the queue and have the task.
create or replace function @schema@.standing(p_ids uuid[])
    returns table (id uuid, state text, task text, queue text, live_workers bigint, due_in double precision)
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select i, coalesce(e.state, f.state)::text, coalesce(e.task, f.task), coalesce(e.queue, f.queue),
        (select count(*) from @schema@._private_workers w join @schema@._private_orchestrators o on o.id = w.orchestrator_id
         where w.queue = e.queue and @schema@._private_task_key(e.task, e.version) = any (w.tasks) and o.died_at is null and o.expires_at > @schema@._private_clock()),
        case when e.run_at is not null then greatest(0, date_part('epoch', e.run_at - @schema@._private_clock())) end
    from unnest(p_ids) as i
        left join @schema@._private_executions e on e.queue_no = @schema@._private_queue_no(i) and e.id = i
        left join lateral (select * from @schema@._private_finished f where f.id = i order by f.generation desc limit 1) f on true
$$;

-- Counts per queue: of registered queues, and of those that only have executions. tasks_without_worker: those of live
-- executions, "task@version" for one that wants a version.
create or replace function @schema@.queue_status()
    returns table (queue text, registered boolean, scheduled bigint, ready bigint, running bigint, waiting bigint,
        completed bigint, failed bigint, cancelled bigint, workers bigint, oldest_ready double precision, tasks_without_worker text[])
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    with workers as (
        select w.queue, w.tasks from @schema@._private_workers w join @schema@._private_orchestrators o on o.id = w.orchestrator_id
        where o.died_at is null and o.expires_at > @schema@._private_clock()
    ), live as (
        select e.queue, @schema@._private_task_key(e.task, e.version) as task, count(*) filter (where e.state = 'scheduled') as scheduled,
            count(*) filter (where e.state = 'ready') as ready, count(*) filter (where e.state = 'running') as running,
            count(*) filter (where e.state = 'waiting') as waiting, min(e.run_at) filter (where e.state = 'ready') as oldest
        from @schema@._private_executions e group by 1, 2
    ), finished as (
        select f.queue, count(*) filter (where f.state = 'completed') as completed,
            count(*) filter (where f.state = 'failed') as failed, count(*) filter (where f.state = 'cancelled') as cancelled
        from @schema@._private_finished f group by 1
    ), names as (
        select name as queue from @schema@._private_queues union select l.queue from live l union select f.queue from finished f
    )
    select n.queue, exists (select from @schema@._private_queues q where q.name = n.queue),
        coalesce(sum(l.scheduled), 0)::bigint, coalesce(sum(l.ready), 0)::bigint, coalesce(sum(l.running), 0)::bigint,
        coalesce(sum(l.waiting), 0)::bigint, coalesce(max(f.completed), 0), coalesce(max(f.failed), 0), coalesce(max(f.cancelled), 0),
        (select count(*) from workers w where w.queue = n.queue),
        case when min(l.oldest) is not null then greatest(0, date_part('epoch', @schema@._private_clock() - min(l.oldest))) end,
        coalesce(array_agg(l.task order by l.task) filter (where l.task is not null and not exists (
            select from workers w where w.queue = n.queue and l.task = any (w.tasks))), '{}')
    from names n left join live l on l.queue = n.queue left join finished f on f.queue = n.queue
    group by n.queue order by n.queue
$$;

-- Orchestrators that are registered, the dead ones of the last day among them.
create or replace function @schema@.orchestrator_status()
    returns table (id uuid, name text, program_version text, alive boolean, started_at timestamptz, heartbeat_age double precision,
        queues text[], stop_requested boolean)
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select o.id, o.name, o.program_version, o.died_at is null and o.expires_at > @schema@._private_clock(), o.started_at,
        date_part('epoch', @schema@._private_clock() - o.heartbeat_at),
        array(select w.queue from @schema@._private_workers w where w.orchestrator_id = o.id order by w.queue),
        o.stop_requested_at is not null
    from @schema@._private_orchestrators o order by o.started_at
$$;

-- What drain waits for, among the given tasks of a queue: 0 if anything is ready, running or to be cancelled because its
-- parent has ended, else the seconds until the next one is due, if that is within p_horizon; null: nothing to wait for.
-- p_versions: as for claim. Stable: several queues in one statement are seen at one moment, so nothing passes from one to
-- another in between.
create or replace function @schema@.drain_wait(p_queue text, p_tasks text[], p_horizon double precision, p_versions text[] default null)
    returns double precision
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_no int;
    v_is_busy boolean;
    v_due timestamptz;
    v_next timestamptz;
    v_keys constant text[] := array(select t.task || '@' || t.version from unnest(p_tasks, p_versions) as t (task, version)
        where t.version is not null);
begin
    if exists (select from @schema@._private_events e where e.delivered_at is null) then
        return 0;  -- it may be for one of them
    end if;
    for v_no in select no from @schema@._private_queues where name = p_queue union all select 0 loop
        execute format($sql$
            select exists (select from @schema@.%1$I where state = 'ready' and %2$s)
                or exists (select from @schema@.%1$I where state = 'running' and %2$s),
                (select min(run_at) from @schema@.%1$I where state in ('scheduled', 'waiting') and %2$s)
            $sql$, '_private_queue_' || v_no, 'queue = $1 and task = any ($2) and (version is null or task || ''@'' || version = any ($3))')
            into v_is_busy, v_due using p_queue, p_tasks, v_keys;
        if v_is_busy then
            return 0;
        end if;
        v_next := least(v_next, v_due);
    end loop;
    if exists (select from @schema@._private_closings c
            join @schema@._private_executions e on e.queue_no = @schema@._private_queue_no(c.execution_id) and e.id = c.execution_id
        where e.queue = p_queue and e.task = any (p_tasks)) then
        return 0;
    end if;
    if v_next <= v_now + make_interval(secs => p_horizon) then
        return greatest(0, date_part('epoch', v_next - v_now));
    end if;
    return null;
end $$;
