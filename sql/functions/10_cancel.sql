-- → cancelled (T11, T12).

-- End executions that nobody runs, of one partition, in the given state: rows that are running, or gone, are left alone. The
-- caller holds their locks and their parents' and has raised K. Returns the ids that were ended now; of children the
-- parent, whose wait is resolved, is to be passed to _private_wake.
create or replace function @schema@._private_end(p_no int, p_ids uuid[], p_state text, p_reason text, p_now timestamptz)
    returns table (id uuid, parent_id uuid)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
begin
    return query execute format($sql$
        with gone as (
            delete from @schema@.%I where id = any ($1) and state <> 'running' returning *
        ), slots as materialized (
            select g.id, k.keep, @schema@._private_expiry_slot(k.keep, $4) as slot
            from gone g cross join lateral (select @schema@._private_keep_failed(g.task) as keep offset 0) k
        ), kept as (
            insert into @schema@._private_finished (slot, priority, attempt, crashes, generation, max_attempts, depth, state, id, owner,
                claim_no, run_at, created_at, claimed_at, finished_at, expires_at, queue, task, dedupe_key, payload, result, errors,
                steps, progress, cancel_reason, parent_id, root_id, limit_key, version, tags, headers, timeout, backoff)
            select s.slot, g.priority, g.attempt, g.crashes, g.generation, g.max_attempts, g.depth,
                $2::@schema@.execution_state, g.id, null, g.claim_no, g.run_at, g.created_at, g.claimed_at, $4,
                $4 + make_interval(secs => s.keep), g.queue, g.task, g.dedupe_key, g.payload, null, g.errors,
                case when g.is_durable then @schema@._private_history(g.id) end, g.progress, $3, g.parent_id, g.root_id, g.limit_key, g.version, g.tags, g.headers, g.timeout, g.backoff
            from gone g join slots s on s.id = g.id where s.slot is not null
        ), keys as (
            delete from @schema@._private_dedupe_keys d using gone g
            where g.dedupe_key is not null and (d.queue, d.task, d.key) between (g.queue, g.task, g.dedupe_key) and (g.queue, g.task, g.dedupe_key)
                and d.execution_id = g.id
        ), payloads as (
            delete from @schema@._private_payloads l using slots s where s.slot is null and l.execution_id between s.id and s.id
        ), steps as (
            delete from @schema@._private_steps s using gone g where g.is_durable and s.execution_id between g.id and g.id
        ), channels as (
            update @schema@._private_channels c set ended_at = $4,
                expires_at = case when s.keep is not null then $4 + make_interval(secs => greatest(s.keep, 3600)) end
            from gone g join slots s on s.id = g.id where g.is_durable and c.execution_id between g.id and g.id
        ), promises as (
            delete from @schema@._private_promises p using gone g where g.is_durable and p.execution_id between g.id and g.id
        ), inbox as (
            -- What a deliverer has locked, that one removes.
            delete from @schema@._private_events v where v.id = any (array(
                select m.id from gone g cross join lateral (select i.id from @schema@._private_events i
                    where i.execution_id = g.id and i.kind <> 'event' offset 0 for update skip locked) m
                where g.is_durable))
        ), waits as (
            delete from @schema@._private_waits w using gone g where g.is_durable and w.execution_id between g.id and g.id
            returning w.target, w.on_close, w.resolved_at
        ), closings as (
            insert into @schema@._private_closings (execution_id, reason, created_at)
            select w.target::uuid, 'its parent has ended: ' || $2, $4 from waits w
            where w.on_close = 'cancel' and w.resolved_at is null
            on conflict do nothing
        ), resolved as (
            update @schema@._private_waits w set resolved_at = $4, outcome = $2, error = jsonb_build_object('reason', $3)
            from gone g
            where g.parent_id is not null and (w.execution_id, w.name) between (g.parent_id, g.wait_name) and (g.parent_id, g.wait_name)
                and w.target = g.id::text and num_nonnulls(w.resolved_at) = 0
                -- A parent that ends by this statement too: its waits go, and a row is changed by one of two only.
                and g.parent_id <> all (array(select p.id from gone p where p.is_durable))
        )
        select id, parent_id from gone
        $sql$, '_private_queue_' || p_no) using p_ids, p_state, p_reason, p_now;
end $$;

-- Cancel executions. Returns a row per distinct id:
--   cancelled   nobody ran it: it has ended now, and never starts again
--   requested   it is running: its owner is told (or was before), and interrupts it. If it completes or fails before that
--               takes effect, that counts. Should its owner be dead, it ends when it is recovered.
--   finished    it had ended before; unknown: there is no row of it, or none that the caller may cancel
-- A producer cancels what its login role has invoked, operators and the owner cancel anything (90_privileges.sql).
-- Whoever asks again is answered as the execution then stands; the first reason is kept. Locks: K of the queues, then the
-- rows, waiting, in the order of partition and id; dedupe keys. Waits for a claim or flush in flight of the same rows, and
-- sees what it did. Notifies the owners, and whoever cancels children. Makes the transaction commit durably, as invoke_many.
create or replace function @schema@.cancel(p_ids uuid[], p_reason text default null) returns table (id uuid, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_ids uuid[] := p_ids;
    v_cancelled uuid[];
    v_requested uuid[];
begin
    if octet_length(p_reason) > 1000 then
        raise exception using errcode = 'PC001', message = 'the reason of a cancellation is at most 1000 bytes long';
    end if;
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);  -- what was acknowledged is not lost
    end if;
    if @schema@._private_may_cancel_all() is not true then
        v_ids := array(
            select e.id from unnest(p_ids) as i join @schema@._private_executions e on e.queue_no = @schema@._private_queue_no(i) and e.id = i
            where e.created_by = quote_ident(session_user)::regrole);
    end if;
    select coalesce(array_agg(c.id) filter (where c.status = 'cancelled'), '{}'), coalesce(array_agg(c.id) filter (where c.status = 'requested'), '{}')
    into v_cancelled, v_requested
    from @schema@._private_cancel(v_ids, p_reason) c;
    if v_cancelled <> '{}' and exists (select from @schema@._private_closings) then
        perform @schema@._private_notify(@schema@._private_errands_channel(), '');  -- children may have to follow
    end if;
    return query
    select i, case when i = any (v_cancelled) then 'cancelled' when i = any (v_requested) then 'requested'
        when exists (select from @schema@._private_finished f where f.id = i) then 'finished' else 'unknown' end
    from (select distinct i from unnest(p_ids) as i) x;
end $$;

-- cancel, for whoever may. Returns the ids that were cancelled or requested only.
create or replace function @schema@._private_cancel(p_ids uuid[], p_reason text) returns table (id uuid, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_no int;
    v_idle uuid[];
    v_running uuid[];
    v_cancelled uuid[] := '{}';
    v_requested uuid[] := '{}';
    v_ended uuid[];
    v_owners uuid[];
    v_parents uuid[];
    v_woken uuid[] := '{}';
begin
    perform pg_advisory_xact_lock_shared(@schema@._private_key_k(q.name)) from (
        select q.name from @schema@._private_queues q
        where q.no in (select distinct @schema@._private_queue_no(i) from unnest(p_ids) as i) order by q.name) q;
    perform @schema@._private_lock_family(p_ids);
    for v_no in
        select p.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) p
        where p.no = 0 or exists (select from @schema@._private_queues q where q.no = p.no) order by 1
    loop
        execute format($sql$
            select array_agg(id) filter (where state <> 'running'), array_agg(id) filter (where state = 'running')
            from (select id, state from @schema@.%I where id = any ($1) order by id for update) x
            $sql$, '_private_queue_' || v_no) into v_idle, v_running using p_ids;
        if v_idle is not null then
            select coalesce(array_agg(e.id), '{}'), coalesce(array_agg(e.parent_id) filter (where e.parent_id is not null), '{}')
            into v_ended, v_parents
            from @schema@._private_end(v_no, v_idle, 'cancelled', p_reason, v_now) e;
            perform @schema@._private_notify_results(v_ended);
            v_cancelled := v_cancelled || v_ended;
            v_woken := v_woken || v_parents;
        end if;
        if v_running is not null then
            execute format($sql$
                with asked as (
                    update @schema@.%I set cancel_requested_at = $2, cancel_reason = $3
                    where id = any ($1) and state = 'running' and cancel_requested_at is null
                    returning owner
                )
                select array_agg(distinct owner) from asked
                $sql$, '_private_queue_' || v_no) into v_owners using v_running, v_now, p_reason;
            perform @schema@._private_notify(@schema@._private_control_channel(o), '') from unnest(v_owners) as o;
            v_requested := v_requested || v_running;
        end if;
    end loop;
    if v_woken <> '{}' then
        perform @schema@._private_announce(q) from (
            select distinct q from unnest(@schema@._private_wake(v_woken)) as q order by q) x;
    end if;
    return query select unnest(v_cancelled), 'cancelled' union all select unnest(v_requested), 'requested';
end $$;

-- Cancel what a filter finds, at most p_limit executions per call: all that is given must fit. Those whose cancellation
-- was requested before are left out, so calling it until both counts are 0 comes to an end. Returns how many have ended
-- and of how many the owner was told.
create or replace function @schema@.cancel_matching(
    p_reason text default null, p_limit int default 1000, p_queue text default null, p_task text default null,
    p_states text[] default null, p_tags text[] default null, p_created_before timestamptz default null
) returns table (cancelled bigint, requested bigint)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_ids uuid[];
    v_before uuid[];
begin
    loop
        -- A queue is two partitions, its own and the overflow.
        execute format($sql$
            select array(
                select e.id from @schema@._private_executions e
                where %s and ($2 is null or e.task = $2) and ($3 is null or e.state::text = any ($3))
                    and ($4 is null or e.tags @> $4) and ($5 is null or e.created_at < $5) and e.cancel_requested_at is null
                limit $6)
            $sql$, case when p_queue is null then 'true' else format('e.queue = $1 and e.queue_no in (0, %s)',
                coalesce((select q.no from @schema@._private_queues q where q.name = p_queue), 0)) end)
        into v_ids using p_queue, p_task, p_states, p_tags, p_created_before, p_limit;
        select count(*) filter (where c.status = 'cancelled'), count(*) filter (where c.status = 'requested')
        into cancelled, requested
        from @schema@.cancel(v_ids, p_reason) c;
        -- All that was found may have ended before it was locked, while there is more. The same again: it is not ours.
        exit when v_ids = '{}' or cancelled + requested > 0 or v_ids = v_before;
        v_before := v_ids;
    end loop;
    return next;
end $$;
