-- Orchestrators: registered once, kept alive, declared dead, and what they held given back.

-- Register an incarnation with its workers, as arrays of one length plus the tasks of each as a JSON array. The lease
-- is in seconds.
create or replace function @schema@.register_orchestrator(
    p_id uuid, p_name text, p_lease double precision, p_program_version text, p_schema_version int,
    p_queues text[], p_tasks jsonb[], p_concurrencies int[]
) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
begin
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
-- caller must stop what it holds and register anew.
create or replace function @schema@.heartbeat(p_id uuid, p_lease double precision) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
begin
    perform set_config('synchronous_commit', 'off', true);
    update @schema@._private_orchestrators set heartbeat_at = v_now, expires_at = v_now + make_interval(secs => p_lease)
    where id = p_id and died_at is null and expires_at > v_now and server_epoch = @schema@._private_server_epoch();
    return found;
end $$;

-- Give back what running executions of dead or unknown owners hold on one queue, at most p_limit per partition (T10),
-- and fail those that have now brought down p_max_crashes claims (T10'). A crash is charged, the attempt is not.
-- Locks: orchestrators, then executions, skipping those another holds. Dead orchestrators stay as tombstones for a
-- day.
create or replace function @schema@.recover(p_queue text, p_limit int default 1000, p_max_crashes int default 3)
    returns table (recovered bigint, failed bigint)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_own int;
    v_no int;
    v_owner uuid;
    v_ids uuid[];
    v_claim_nos bigint[];
    v_fail boolean[];
    v_ended uuid[];
    v_requeued bigint;
begin
    recovered := 0;
    failed := 0;
    update @schema@._private_orchestrators set died_at = v_now
    where id in (select o.id from @schema@._private_orchestrators o
        where o.died_at is null and o.expires_at <= v_now order by o.id for update skip locked);
    delete from @schema@._private_orchestrators
    where id in (select o.id from @schema@._private_orchestrators o
        where o.died_at < v_now - interval '1 day' order by o.id for update skip locked);
    select no into v_own from @schema@._private_queues where name = p_queue;
    foreach v_no in array array[v_own, 0] loop
        continue when v_no is null;
        -- The owners of running rows, each found by one step in the index, however many rows each has.
        for v_owner in execute format($sql$
            with recursive owners as (
                (select owner from @schema@.%1$I where state = 'running' order by owner limit 1)
                union all
                select (select e.owner from @schema@.%1$I e where e.state = 'running' and e.owner > o.owner order by e.owner limit 1)
                from owners o where o.owner is not null
            )
            select owner from owners where owner is not null and not exists (
                select from @schema@._private_orchestrators o where o.id = owners.owner and o.died_at is null)
            $sql$, '_private_queue_' || v_no)
        loop
            execute format($sql$
                select array_agg(id), array_agg(claim_no), array_agg(crashes + 1 >= $4) from (
                    select id, claim_no, crashes from @schema@.%1$I
                    where state = 'running' and owner = $1 and queue = $2 limit $3 for update skip locked) x
                $sql$, '_private_queue_' || v_no)
            into v_ids, v_claim_nos, v_fail using v_owner, p_queue, p_limit, p_max_crashes;
            continue when v_ids is null;
            select array_agg(f.id) filter (where f.requeued_queue is null), count(f.requeued_queue) into v_ended, v_requeued
            from @schema@._private_flush_partition(v_no, v_owner, v_ids, v_claim_nos,
                array(select case when f then 'failed' else 'recovered' end from unnest(v_fail) with ordinality as x (f, n) order by n),
                array_fill(null::jsonb, array[cardinality(v_ids)]),
                array(select case when f then jsonb_build_object('type', 'crash_loop', 'message',
                        format('the process that ran it died %s times', p_max_crashes)) end
                    from unnest(v_fail) with ordinality as x (f, n) order by n),
                array_fill(0::float8, array[cardinality(v_ids)]), array_fill(null::float8, array[cardinality(v_ids)]), 1) f;
            recovered := recovered + v_requeued;
            failed := failed + coalesce(cardinality(v_ended), 0);
            if v_ended is not null then
                perform @schema@._private_notify_results(v_ended);
            end if;
        end loop;
    end loop;
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
as $$
declare
    v_no int;
    v_ids uuid[];
    v_claim_nos bigint[];
    v_released bigint := 0;
begin
    for v_no in select no from @schema@._private_queues where name = p_queue union all select 0 loop
        execute format('select array_agg(id), array_agg(claim_no) from (select id, claim_no from @schema@.%I
                where state = ''running'' and owner = $1 and queue = $2 and id <> all ($3) for update skip locked) x',
                '_private_queue_' || v_no)
            into v_ids, v_claim_nos using p_owner, p_queue, p_known;
        continue when v_ids is null;
        perform f.id from @schema@._private_flush_partition(v_no, p_owner, v_ids, v_claim_nos,
            array_fill('released'::text, array[cardinality(v_ids)]), array_fill(null::jsonb, array[cardinality(v_ids)]),
            array_fill(null::jsonb, array[cardinality(v_ids)]), array_fill(0::float8, array[cardinality(v_ids)]),
            array_fill(null::float8, array[cardinality(v_ids)]), 0) f;
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
