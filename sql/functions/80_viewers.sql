-- What may be seen by those who may not see payloads and results.

-- Executions, live and finished, without what they carry: of an error only its type.
create or replace view @schema@.execution_status as
    select e.id, e.queue, e.task, e.state, e.priority, e.attempt, e.max_attempts, e.crashes, e.generation, e.run_at, e.created_at,
        e.claimed_at, null::timestamptz as finished_at, null::timestamptz as expires_at, e.timeout, e.deadline_at,
        e.cancel_requested_at, e.cancel_reason, e.tags, e.errors -> -1 ->> 'type' as error_type
    from @schema@._private_executions e
    union all
    select f.id, f.queue, f.task, f.state, f.priority, f.attempt, f.max_attempts, f.crashes, f.generation, f.run_at, f.created_at,
        f.claimed_at, f.finished_at, f.expires_at, f.timeout, null, null, f.cancel_reason, f.tags, f.errors -> -1 ->> 'type'
    from @schema@._private_finished f;

-- What `pgconductor doctor` must know of the schema's own tables, as one object. Reads only; lists are bounded, and so is
-- the work: of each partition the owners of running rows, by the index, and at most 10,000 ready rows. Bears a partition
-- that is missing, since that is among what is looked for.
create or replace function @schema@._private_doctor() returns jsonb
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_schema constant oid := (select n.oid from pg_namespace n where n.nspname = @schema_literal@);
    v_live constant oid := (select c.oid from pg_class c where c.relnamespace = v_schema and c.relname = '_private_executions');
    v_ended constant oid := (select c.oid from pg_class c where c.relnamespace = v_schema and c.relname = '_private_finished');
    v_queues jsonb;
    v_slots jsonb := '[]';
    v_strays jsonb;
    v_orchestrators jsonb;
    v_orphans jsonb := '[]';
    v_unserved jsonb := '[]';
    v_part record;
    v_found jsonb;
    v_has_rows boolean;
begin
    v_queues := coalesce((
        select jsonb_agg(jsonb_build_object('no', q.no, 'name', q.name,
            'has_partition', exists (
                select from pg_class c join pg_inherits h on h.inhrelid = c.oid
                where c.relnamespace = v_schema and c.relname = '_private_queue_' || q.no
                    and h.inhparent = v_live and not h.inhdetachpending
                    and pg_get_expr(c.relpartbound, c.oid) ~ ('\m' || q.no || '\M')),
            'has_functions', 3 <= (
                select count(*) from pg_proc p where p.pronamespace = v_schema
                    and p.proname in ('_private_claim_' || q.no, '_private_flush_' || q.no, '_private_finish_' || q.no))
            ) order by q.no)
        from @schema@._private_queues q), '[]');

    for v_part in
        select s.no, case when isfinite(s.expires_upto) and s.expires_upto <= v_now then date_part('epoch', v_now - s.expires_upto) end as expired_for, c.oid
        from @schema@._private_expiry_slots s
            left join pg_class c on c.relnamespace = v_schema and c.relname = '_private_finished_' || s.no and exists (
                select from pg_inherits h where h.inhrelid = c.oid and h.inhparent = v_ended
                    and not h.inhdetachpending and pg_get_expr(c.relpartbound, c.oid) ~ ('\m' || s.no || '\M'))
        order by s.no
    loop
        v_has_rows := false;
        if v_part.oid is not null and v_part.expired_for is not null then
            execute format('select exists (select from @schema@.%I)', '_private_finished_' || v_part.no) into v_has_rows;
        end if;
        v_slots := v_slots || jsonb_build_object('no', v_part.no, 'has_partition', v_part.oid is not null,
            'expired_for', v_part.expired_for, 'has_rows', v_has_rows);
    end loop;

    v_strays := coalesce((
        select jsonb_agg(c.relname order by c.relname) from pg_class c
        where c.relnamespace = v_schema and c.relkind in ('r', 'p') and case
            when c.relname ~ '^_private_queue_[0-9]+$' and c.relname <> '_private_queue_0'
            then not exists (select from @schema@._private_queues q where '_private_queue_' || q.no = c.relname)
            when c.relname ~ '^_private_finished_[0-9]+$'
            then not exists (select from @schema@._private_expiry_slots s where '_private_finished_' || s.no = c.relname)
            else false end), '[]');

    v_orchestrators := coalesce((
        select jsonb_agg(jsonb_build_object('name', o.name, 'program_version', o.program_version,
            'schema_version', o.schema_version) order by o.started_at)
        from (select * from @schema@._private_orchestrators o where o.died_at is null and o.expires_at > v_now
            order by o.started_at limit 1000) o), '[]');

    for v_part in
        select c.relname from pg_inherits h join pg_class c on c.oid = h.inhrelid where h.inhparent = v_live order by c.relname
    loop
        execute format($sql$
            with recursive owners as (
                (select owner from @schema@.%1$I where state = 'running' order by owner limit 1)
                union all
                select (select e.owner from @schema@.%1$I e where e.state = 'running' and e.owner > o.owner order by e.owner limit 1)
                from owners o where o.owner is not null
            ), dead as (
                select w.owner, least(x.died_at, x.expires_at) as died_at
                from owners w left join @schema@._private_orchestrators x on x.id = w.owner
                where w.owner is not null and (x.id is null or x.died_at is not null or x.expires_at <= $1) limit 100
            )
            select jsonb_agg(jsonb_build_object('queue', r.queue, 'running', r.running, 'dead_for', r.dead_for)) from (
                select e.queue, count(*) as running,
                    case when bool_and(d.died_at is not null) then date_part('epoch', $1 - max(d.died_at)) end as dead_for
                from dead d cross join lateral (
                    select e.queue from @schema@.%1$I e where e.state = 'running' and e.owner = d.owner limit 10000) e
                group by e.queue order by 2 desc limit 100) r
            $sql$, v_part.relname) into v_found using v_now;
        v_orphans := v_orphans || coalesce(v_found, '[]');
        execute format($sql$
            select jsonb_agg(jsonb_build_object('queue', r.queue, 'task', r.task, 'ready', r.ready, 'waited', r.waited)) from (
                select e.queue, @schema@._private_task_key(e.task, e.version) as task, count(*) as ready, greatest(0, date_part('epoch', $1 - min(e.run_at))) as waited
                from (select e.queue, e.task, e.version, e.run_at from @schema@.%1$I e where e.state = 'ready' limit 10000) e
                where not exists (
                    select from @schema@._private_workers w join @schema@._private_orchestrators o on o.id = w.orchestrator_id
                    where w.queue = e.queue and @schema@._private_task_key(e.task, e.version) = any (w.tasks) and o.died_at is null and o.expires_at > $1)
                    and not exists (select from @schema@._private_queues q where q.name = e.queue and q.paused_at is not null)
                group by 1, 2 order by 3 desc limit 100) r
            $sql$, v_part.relname) into v_found using v_now;
        v_unserved := v_unserved || coalesce(v_found, '[]');
    end loop;

    return jsonb_build_object('queues', v_queues, 'slots', v_slots, 'stray_partitions', v_strays,
        'orchestrators', v_orchestrators, 'orphans', v_orphans, 'unserved', v_unserved);
end $$;
