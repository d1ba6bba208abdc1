-- Orchestrators: registered once, kept alive, declared dead, and what they held given back.

-- Register an incarnation with its workers, as arrays of one length plus the tasks of each as a JSON array. The lease
-- is in seconds. PC002 for a program that is too old for the schema, or about to be: see _private_check_version.
create or replace function @schema@.register_orchestrator(
    p_id uuid, p_name text, p_lease double precision, p_program_version text, p_schema_version int,
    p_queues text[], p_tasks jsonb[], p_concurrencies int[]
) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz;
begin
    perform @schema@._private_check_version(p_schema_version);
    v_now := @schema@._private_clock();
    insert into @schema@._private_orchestrators
        (id, name, program_version, schema_version, server_epoch, started_at, heartbeat_at, expires_at)
    values (p_id, p_name, p_program_version, p_schema_version, @schema@._private_server_epoch(), v_now, v_now,
        v_now + make_interval(secs => p_lease));
    insert into @schema@._private_workers (orchestrator_id, queue, tasks, concurrency)
    select p_id, w.queue, array(select jsonb_array_elements_text(w.tasks)), w.concurrency
    from unnest(p_queues, p_tasks, p_concurrencies) as w (queue, tasks, concurrency);
end $$;

-- Renew a lease by p_lease seconds. False: declared dead, or expired (which nobody revives), or the server was
-- restarted or another one promoted since registration, so that claims committed asynchronously may be lost. The
-- caller must stop what it holds and register anew. p_loads: what its workers have done so far (18_load.sql). Locks: the
-- orchestrator's row, then its workers'.
create or replace function @schema@.heartbeat(p_id uuid, p_lease double precision, p_loads jsonb default null) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
begin
    perform set_config('synchronous_commit', 'off', true);
    update @schema@._private_orchestrators set heartbeat_at = v_now, expires_at = v_now + make_interval(secs => p_lease)
    where id = p_id and died_at is null and expires_at > v_now and server_epoch = @schema@._private_server_epoch();
    if not found then
        return false;
    end if;
    if p_loads is not null then
        perform @schema@._private_note_loads(p_id, p_loads, v_now);
    end if;
    return true;
end $$;

-- Hold the session lock of an orchestrator for as long as the calling session lives, and say so in its row: others may
-- then rescue its work as soon as the session is gone and two heartbeats are missing, without waiting for the lease. For a
-- session of the orchestrator's own, not through a transaction pooler; to be called again on the next one. False: dead.
create or replace function @schema@.hold_session(p_id uuid) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if not pg_try_advisory_lock(@schema@._private_key_o(p_id)) then
        return false;  -- the former session has not been missed yet by the server: its lock goes when that one does
    end if;
    -- As for the heartbeat: a commit that waits for a standby would keep the row, and with it the heartbeat, waiting.
    perform set_config('synchronous_commit', 'off', true);
    update @schema@._private_orchestrators set has_session = true where id = p_id and died_at is null;
    return found;
end $$;

-- What an orchestrator is to know and do: stop; cancel executions it runs, with the claims that are meant; run those that
-- are on their last life, on the queues named; run the errands of all (15_history.sql). Exactly one row. Reads only; a signal stays until it is acted upon (the
-- execution ends, the orchestrator retires), so a lost reply loses nothing.
create or replace function @schema@.signals(p_owner uuid, p_queues text[])
    returns table (stop_requested boolean, cancelled_ids uuid[], cancelled_claim_nos bigint[], reasons text[], suspects text[], errands boolean)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_no int;
    v_queue text;
    v_ids uuid[];
    v_claim_nos bigint[];
    v_reasons text[];
    v_has_suspects boolean;
begin
    stop_requested := exists (select from @schema@._private_orchestrators o where o.id = p_owner and o.stop_requested_at is not null);
    cancelled_ids := '{}';
    cancelled_claim_nos := '{}';
    reasons := '{}';
    suspects := '{}';
    errands := exists (select from @schema@._private_closings) or exists (select from @schema@._private_events e where e.delivered_at is null);
    for v_no, v_queue in select q.no, q.name from @schema@._private_queues q where q.name = any (p_queues) loop
        execute format('select * from @schema@.%I($1, $2)', '_private_asked_' || v_no)
            into v_ids, v_claim_nos, v_reasons, v_has_suspects using p_owner, v_queue;
        cancelled_ids := cancelled_ids || v_ids;
        cancelled_claim_nos := cancelled_claim_nos || v_claim_nos;
        reasons := reasons || v_reasons;
        if v_has_suspects then
            suspects := suspects || v_queue;
        end if;
    end loop;
    return next;
end $$;

-- Take over, after a restart of the server or a promotion, what the same process held as p_old: registers p_new as p_old
-- was, for p_lease seconds, and makes it the owner of those of the given claims that are still there. Claims are committed
-- asynchronously: some may be lost, and a lost one could come back under the same number, so the owner must be another.
-- Returns the ids that were handed over; whatever else p_old holds is given back, free of charge. p_old ends as a
-- tombstone. PC003: p_old is dead or its lease has ended. Locks: K of its queues, its row, its executions.
create or replace function @schema@.succeed_orchestrator(
    p_old uuid, p_new uuid, p_lease double precision, p_ids uuid[], p_claim_nos bigint[]
) returns setof uuid
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_queues text[];
    v_no int;
begin
    select array_agg(queue order by queue) into v_queues from @schema@._private_workers where orchestrator_id = p_old;
    perform pg_advisory_xact_lock_shared(@schema@._private_key_k(q)) from unnest(v_queues) as q;
    v_now := @schema@._private_clock();
    update @schema@._private_orchestrators set died_at = v_now where id = p_old and died_at is null and expires_at > v_now;
    if not found then
        raise exception using errcode = 'PC003', message = 'the orchestrator is not registered, or its lease has ended';
    end if;
    insert into @schema@._private_orchestrators
        (id, name, program_version, schema_version, server_epoch, started_at, heartbeat_at, expires_at, stop_requested_at)
    select p_new, name, program_version, schema_version, @schema@._private_server_epoch(), v_now, v_now,
        v_now + make_interval(secs => p_lease), stop_requested_at
    from @schema@._private_orchestrators where id = p_old;
    insert into @schema@._private_workers (orchestrator_id, queue, tasks, concurrency, load, next_load, former_load)
    select p_new, queue, tasks, concurrency, load, next_load, former_load from @schema@._private_workers where orchestrator_id = p_old;
    for v_no in select no from @schema@._private_queues where name = any (v_queues) union all select 0 order by 1 loop
        -- First the locks, in the order of ids, then a new look: somebody may be asking for a cancellation.
        execute format('select from @schema@.%I where id = any ($1) and owner = $2 order by id for update', '_private_queue_' || v_no)
            using p_ids, p_old;
        return query execute format($sql$
            update @schema@.%I e set owner = $2 from unnest($3, $4) as h (id, claim_no)
            where e.id = h.id and e.claim_no = h.claim_no and e.owner = $1 and e.state = 'running' returning e.id
            $sql$, '_private_queue_' || v_no) using p_old, p_new, p_ids, p_claim_nos;
    end loop;
    perform @schema@.release_unknown(p_old, q, '{}') from unnest(v_queues) as q;
end $$;

-- Give back what running executions of dead or unknown owners hold on one queue, at most p_limit per partition and owner
-- (T10); fail those that have now brought down three claims (T10'); end those whose cancellation was requested (T12). A
-- crash is charged, the attempt is not. If the server was restarted since the owner registered, it may have lost its lease
-- without dying: then its claims are released and nothing is charged. Dead is whose lease has ended, or who misses two
-- heartbeats and whose session is gone. Locks: orchestrators, then executions, skipping those another holds. Dead
-- orchestrators stay as tombstones for a day (maintain).
create or replace function @schema@.recover(p_queue text, p_limit int default 1000)
    returns table (recovered bigint, failed bigint, cancelled bigint)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_own int;
    v_no int;
    v_owner uuid;
    v_ids uuid[];
    v_claim_nos bigint[];
    v_outcomes text[];
    v_keeps double precision[];
    v_ended uuid[];
    v_cancelled bigint;
    v_requeued bigint;
    v_crashes int;
    v_parents uuid[];
    v_woken uuid[] := '{}';
begin
    recovered := 0;
    failed := 0;
    cancelled := 0;
    update @schema@._private_orchestrators set died_at = v_now
    where id in (select o.id from @schema@._private_orchestrators o
        where o.died_at is null and case
            when o.expires_at <= v_now then true
            -- Of this server's present life only: a restart takes all session locks at once.
            when o.has_session and o.heartbeat_at < v_now - (o.expires_at - o.heartbeat_at) / 2
                and o.server_epoch = @schema@._private_server_epoch()
            then case when pg_try_advisory_lock(@schema@._private_key_o(o.id))
                then pg_advisory_unlock(@schema@._private_key_o(o.id)) else false end
            else false end
        order by o.id for update skip locked);
    select no into v_own from @schema@._private_queues where name = p_queue;
    foreach v_no in array array[v_own, 0] loop
        continue when v_no is null;
        for v_owner, v_crashes in execute format('select * from @schema@.%I()', '_private_orphans_' || v_no) loop
            execute format($sql$
                select array_agg(id), array_agg(claim_no),
                    array_agg(case when crashes + $4 >= 3 and cancel_requested_at is null then 'failed'
                        when $4 = 0 then 'released' else 'recovered' end),
                    array_agg(@schema@._private_keep_failed(task)), count(*) filter (where cancel_requested_at is not null)
                from (
                    select id, claim_no, crashes, task, cancel_requested_at, parent_id from @schema@.%1$I
                    where state = 'running' and owner = $1 and queue = $2 limit $3 for update skip locked) x
                -- Who ends resolves a wait of its parent's, which is locked for that, or left for the next sweep.
                where parent_id is null or (crashes + $4 < 3 and cancel_requested_at is null) or @schema@._private_try_lock(parent_id)
                $sql$, '_private_queue_' || v_no)
            into v_ids, v_claim_nos, v_outcomes, v_keeps, v_cancelled using v_owner, p_queue, p_limit, v_crashes;
            continue when v_ids is null;
            select array_agg(f.id) filter (where f.is_ended), count(f.requeued_queue), array_agg(f.parent_id) filter (where f.parent_id is not null)
            into v_ended, v_requeued, v_parents
            from @schema@._private_flush_partition(v_no, v_owner, v_ids, v_claim_nos, v_outcomes,
                array_fill(null::jsonb, array[cardinality(v_ids)]),
                array(select case when o = 'failed' then jsonb_build_object('type', 'crash_loop', 'message',
                        'the process that ran it died 3 times') end
                    from unnest(v_outcomes) with ordinality as x (o, n) order by n),
                array_fill(0::float8, array[cardinality(v_ids)]), v_keeps, v_crashes) f;
            recovered := recovered + v_requeued;
            cancelled := cancelled + v_cancelled;
            failed := failed + coalesce(cardinality(v_ended), 0) - v_cancelled;
            if v_ended is not null then
                perform @schema@._private_notify_results(v_ended);
            end if;
            v_woken := v_woken || v_parents;
        end loop;
    end loop;
    if v_woken <> '{}' then
        perform @schema@._private_announce(q) from (
            select distinct q from unnest(@schema@._private_wake(v_woken)) as q order by q) x;
    end if;
    if recovered > 0 then
        perform @schema@._private_announce(p_queue);
    end if;
    return next;
end $$;

-- Give back what an orchestrator holds on a queue beyond what it knows of: claims whose reply was lost. Neither
-- attempt nor crash is charged. To be called only by that orchestrator, with no claim of its own in flight.
create or replace function @schema@.release_unknown(p_owner uuid, p_queue text, p_known uuid[]) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_no int;
    v_ids uuid[];
    v_claim_nos bigint[];
    v_keeps double precision[];
    v_ended uuid[];
    v_parents uuid[];
    v_released bigint := 0;
begin
    for v_no in select no from @schema@._private_queues where name = p_queue union all select 0 loop
        execute format('select array_agg(id), array_agg(claim_no), array_agg(@schema@._private_keep_failed(task))
                from (select id, claim_no, task, parent_id, cancel_requested_at from @schema@.%I
                where state = ''running'' and owner = $1 and queue = $2 and id <> all ($3) for update skip locked) x
                where parent_id is null or cancel_requested_at is null or @schema@._private_try_lock(parent_id)',
                '_private_queue_' || v_no)
            into v_ids, v_claim_nos, v_keeps using p_owner, p_queue, p_known;
        continue when v_ids is null;
        select array_agg(f.id) filter (where f.is_ended), array_agg(f.parent_id) filter (where f.parent_id is not null)
        into v_ended, v_parents from @schema@._private_flush_partition(v_no, p_owner, v_ids, v_claim_nos,
            array_fill('released'::text, array[cardinality(v_ids)]), array_fill(null::jsonb, array[cardinality(v_ids)]),
            array_fill(null::jsonb, array[cardinality(v_ids)]), array_fill(0::float8, array[cardinality(v_ids)]), v_keeps, 0) f;
        if v_ended is not null then
            perform @schema@._private_notify_results(v_ended);
        end if;
        if v_parents is not null then
            perform @schema@._private_announce(q) from (
                select distinct q from unnest(@schema@._private_wake(v_parents)) as q order by q) x;
        end if;
        v_released := v_released + cardinality(v_ids);
    end loop;
    if v_released > 0 then
        perform @schema@._private_announce(p_queue);
    end if;
    return v_released;
end $$;

-- The last word of an orchestrator whose handlers have all ended: what it still held becomes claimable at once, and
-- its row goes. Returns how many came back. Harmless for an unknown id.
create or replace function @schema@.retire_orchestrator(p_id uuid) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_released bigint;
begin
    select coalesce(sum(@schema@.release_unknown(p_id, w.queue, '{}')), 0) into v_released
    from (select queue from @schema@._private_workers where orchestrator_id = p_id order by queue) w;
    delete from @schema@._private_orchestrators where id = p_id;
    return v_released;
end $$;
