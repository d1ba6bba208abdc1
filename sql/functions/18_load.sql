-- How loaded queues are: what waits, who works, and what they get done. Reads only, and little: beside a backlog of millions
-- it costs what it costs beside ten thousand.

-- What a process tells of its workers with a heartbeat (07_fleet.sql): one object for each queue. Rates are counted from the
-- former telling, which is replaced by a next one when that is five seconds old: so they are of five seconds at least, however
-- often somebody tells, but for those after a start.
create or replace function @schema@._private_note_loads(p_id uuid, p_loads jsonb, p_now timestamptz) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    update @schema@._private_workers w set
        former_load = case when n.is_due then coalesce(w.next_load, w.load) else w.former_load end,
        next_load = case when n.is_due then w.load else w.next_load end,
        load = row(p_now, l.claims, l.empty_claims, l.short_claims, l.locked_claims, l.claimed, l.ended, l.busy_seconds, l.claim_seconds,
            l.flush_seconds, l.cpu_seconds, l.machine_load, pg_stat_get_tuples_inserted(p.oid), pg_stat_get_tuples_deleted(p.oid))::@schema@._private_load
    from jsonb_to_recordset(p_loads) as l (queue text, claims bigint, empty_claims bigint, short_claims bigint, locked_claims bigint,
            claimed bigint, ended bigint, busy_seconds double precision, claim_seconds double precision, flush_seconds double precision,
            cpu_seconds double precision, machine_load double precision)
        join @schema@._private_workers v on v.orchestrator_id = p_id and v.queue = l.queue
        cross join lateral (select (v.next_load).at is null or p_now >= (v.next_load).at + interval '5 s' as is_due) n
        left join @schema@._private_queues q on q.name = l.queue
        left join lateral (select to_regclass(format('@schema@.%I', '_private_queue_' || q.no))::oid as oid) p on true
    where w.orchestrator_id = p_id and w.queue = l.queue;
end $$;

-- What is due in one partition, of one queue: how many are ready (promoted or not), at most p_limit; since when the oldest is;
-- how many run, at most p_limit; among the first thousand in the order of claims, those that none of p_tasks fits, and
-- their tasks. The oldest is looked for among the hundred lowest priorities. Each by an index: of ready ones, due ones, owners.
create or replace function @schema@._private_depth(p_no int, p_queue text, p_tasks text[], p_limit int, p_now timestamptz)
    returns table (ready bigint, oldest timestamptz, running bigint, looked bigint, unserved bigint, unserved_tasks text[])
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set enable_bitmapscan = off
    set jit = off
as $$
begin
    -- The overflow partition holds many queues, and its indexes lead with the name; of running ones there are few.
    return query execute format($sql$
        with recursive priorities as (
            (select priority from @schema@.%1$I where %2$s state = 'ready' order by priority limit 1)
            union all
            select (select e.priority from @schema@.%1$I e where %2$s e.state = 'ready' and e.priority > p.priority order by e.priority limit 1)
            from priorities p where p.priority is not null
        ), first as (
            select @schema@._private_task_key(task, version) as task from @schema@.%1$I where %2$s state = 'ready'
            order by priority desc, run_at, id limit 1000
        )
        select
            (select count(*) from (select from @schema@.%1$I where %2$s state = 'ready' limit $3) x)
                + (select count(*) from (select from @schema@.%1$I where %2$s state in ('scheduled', 'waiting') and run_at <= $4 limit $3) x),
            least((select min(o.run_at) from (select priority from priorities where priority is not null limit 100) p cross join lateral (
                    select e.run_at from @schema@.%1$I e where %2$s e.state = 'ready' and e.priority = p.priority order by e.run_at limit 1) o),
                (select run_at from @schema@.%1$I where %2$s state in ('scheduled', 'waiting') and run_at <= $4 order by run_at limit 1)),
            (select count(*) from (select from @schema@.%1$I where %2$s state = 'running' limit $3) x),
            (select count(*) from first), (select count(*) from first where task <> all ($2)),
            array(select distinct task from first where task <> all ($2) order by task limit 10)
        $sql$, '_private_queue_' || p_no, case when p_no = 0 then 'queue = $1 and' else '' end)
    using p_queue, p_tasks, p_limit, p_now;
end $$;

-- Queues that are registered, and those that only have ready executions in the overflow partition (the first thousand).
create or replace function @schema@._private_loaded_queues() returns setof text
    language sql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
    with recursive names as (
        (select queue from @schema@._private_queue_0 where state = 'ready' order by queue limit 1)
        union all
        select (select e.queue from @schema@._private_queue_0 e where e.state = 'ready' and e.queue > n.queue order by e.queue limit 1)
        from names n where n.queue is not null
    )
    select name from @schema@._private_queues
    union
    select n.queue from (select queue from names where queue is not null limit 1000) n
$$;

-- How loaded a queue is, or each one: what `pgconductor advise` judges. Seconds, and rates per second.
--
-- ready: due executions that nobody runs, p_limit at most (ready_is_capped: there may be more). oldest_ready: since when the
-- oldest is due. unserved: how many of the first thousand have a task that no living worker has: tasks_without_worker.
-- workers, capacity: the living ones, and their concurrency. What comes next is by what they told last (of a process as a
-- whole: cpu, machine_load), and null while none has told twice: reporting, reporting_capacity: those who have; over `seconds`;
-- busy: handlers that ran at a time; claim_share, flush_share: of a worker's time for which a claim, or a flush, was under way;
-- claimed: executions that were not given back; locked_claims: that found nothing but what others had locked; short_claims: that brought less than they asked for; cpu: of
-- one core, the busiest process; machine_load: runnable processes per core, the busiest machine. arrivals, departures: rows
-- that came into the queue's partition, or left it (or ended, if those are more): null if it has none, or the statistics were reset. inserted, deleted:
-- those counts by the server's statistics, to take differences of. wanted_capacity: runners that would keep up, with a fifth in reserve, and
-- work off what is ready within a minute; at least one if anything is.
create or replace function @schema@.queue_load(p_queue text default null, p_limit int default 10000)
    returns table (queue text, registered boolean, at timestamptz, ready bigint, ready_is_capped boolean, oldest_ready double precision,
        running bigint, unserved bigint, looked bigint, tasks_without_worker text[], workers bigint, capacity bigint,
        reporting bigint, reporting_capacity bigint, seconds double precision, busy double precision, claims bigint,
        empty_claims bigint, short_claims bigint, locked_claims bigint, claimed bigint, claim_seconds double precision,
        claim_share double precision, flush_share double precision, cpu double precision, machine_load double precision,
        claimed_rate double precision, ended_rate double precision, arrivals double precision, departures double precision,
        inserted bigint, deleted bigint, wanted_capacity bigint)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_limit constant int := least(greatest(p_limit, 1), 1000000);
    v_no int;
    v_tasks text[];
    v_depth record;
    v_overflow record;
    v_load record;
    v_partition oid;
begin
    for queue in select q from @schema@._private_loaded_queues() q where p_queue is null or q = p_queue order by q loop
        at := @schema@._private_clock();
        select q.no into v_no from @schema@._private_queues q where q.name = queue;
        registered := found;
        v_tasks := array(select distinct t from @schema@._private_workers w
            join @schema@._private_orchestrators o on o.id = w.orchestrator_id cross join lateral unnest(w.tasks) t
            where w.queue = queue_load.queue and o.died_at is null and o.expires_at > at);
        select * into v_overflow from @schema@._private_depth(0, queue, v_tasks, v_limit, at);
        ready := v_overflow.ready;
        oldest_ready := date_part('epoch', at - v_overflow.oldest);
        running := v_overflow.running;
        looked := v_overflow.looked;
        unserved := v_overflow.unserved;
        tasks_without_worker := v_overflow.unserved_tasks;
        v_partition := null;
        if registered then
            select * into v_depth from @schema@._private_depth(v_no, queue, v_tasks, v_limit, at);
            ready := ready + v_depth.ready;
            oldest_ready := greatest(oldest_ready, date_part('epoch', at - v_depth.oldest));
            running := running + v_depth.running;
            looked := looked + v_depth.looked;
            unserved := unserved + v_depth.unserved;
            tasks_without_worker := array(select distinct t from unnest(tasks_without_worker || v_depth.unserved_tasks) t order by t);
            v_partition := to_regclass(format('@schema@.%I', '_private_queue_' || v_no));
        end if;
        ready_is_capped := ready >= v_limit;
        ready := least(ready, v_limit);
        oldest_ready := greatest(0, oldest_ready);
        running := least(running, v_limit);
        inserted := pg_stat_get_tuples_inserted(v_partition);
        deleted := pg_stat_get_tuples_deleted(v_partition);
        -- Of the living workers; and of those that have told twice what lies between the two.
        select count(*) as workers, coalesce(sum(w.concurrency), 0) as capacity, count(x.seconds) as reporting,
            coalesce(sum(w.concurrency) filter (where x.seconds is not null), 0) as reporting_capacity, avg(x.seconds) as seconds,
            sum(x.busy) as busy, sum(x.claims) as claims, sum(x.empty_claims) as empty_claims, sum(x.short_claims) as short_claims,
            sum(x.locked_claims) as locked_claims, sum(x.claimed) as claimed, sum(x.claim_seconds) as claim_seconds,
            avg(x.claim_share) as claim_share, avg(x.flush_share) as flush_share, max(x.cpu) as cpu,
            max((w.load).machine_load) filter (where x.seconds is not null) as machine_load, sum(x.claimed_rate) as claimed_rate,
            sum(x.ended_rate) as ended_rate, avg(x.arrivals) as arrivals, avg(x.departures) as departures
        into v_load
        from @schema@._private_workers w join @schema@._private_orchestrators o on o.id = w.orchestrator_id
            left join lateral (
                select s.seconds, (l.busy_seconds - f.busy_seconds) / s.seconds as busy, l.claims - f.claims as claims,
                    l.empty_claims - f.empty_claims as empty_claims, l.short_claims - f.short_claims as short_claims,
                    l.locked_claims - f.locked_claims as locked_claims, greatest(0, l.claimed - f.claimed) as claimed,
                    l.claim_seconds - f.claim_seconds as claim_seconds, (l.claim_seconds - f.claim_seconds) / s.seconds as claim_share,
                    (l.flush_seconds - f.flush_seconds) / s.seconds as flush_share, (l.cpu_seconds - f.cpu_seconds) / s.seconds as cpu,
                    greatest(0, l.claimed - f.claimed) / s.seconds as claimed_rate, (l.ended - f.ended) / s.seconds as ended_rate,
                    case when l.inserted >= f.inserted then (l.inserted - f.inserted) / s.seconds end as arrivals,
                    case when l.deleted >= f.deleted then (l.deleted - f.deleted) / s.seconds end as departures
                from (select (w.load).*) l, (select (w.former_load).*) f,
                    lateral (select date_part('epoch', l.at - f.at) as seconds) s
                where s.seconds >= 1) x on true
        where w.queue = queue_load.queue and o.died_at is null and o.expires_at > queue_load.at;
        workers := v_load.workers;
        capacity := v_load.capacity;
        reporting := v_load.reporting;
        reporting_capacity := v_load.reporting_capacity;
        seconds := v_load.seconds;
        busy := v_load.busy;
        claims := v_load.claims;
        empty_claims := v_load.empty_claims;
        short_claims := v_load.short_claims;
        locked_claims := v_load.locked_claims;
        claimed := v_load.claimed;
        claim_seconds := v_load.claim_seconds;
        claim_share := v_load.claim_share;
        flush_share := v_load.flush_share;
        cpu := v_load.cpu;
        machine_load := v_load.machine_load;
        claimed_rate := v_load.claimed_rate;
        ended_rate := v_load.ended_rate;
        arrivals := v_load.arrivals;
        departures := greatest(v_load.departures, ended_rate);  -- those in the overflow partition are in no count of ours
        wanted_capacity := case
            when v_load.reporting = 0 then greatest(v_load.capacity, least(1, ready + running))
            -- What took runners' time, and what the ready ones will take: as long as the others did, on average; if none was
            -- claimed, they last longer than we have looked, and each wants a runner.
            else greatest(least(1, ready + running), ceil(busy / 0.8)
                + case when ready = 0 then 0 when claimed > 0 then least(ready, ceil(ready * busy * seconds / claimed / 60)) else ready end)
            end;
        return next;
    end loop;
end $$;

-- For an autoscaler: one row for each queue. Asked for one queue it looks at that one only.
create or replace view @schema@.autoscaling as
    select n.queue, l.ready, l.oldest_ready, l.running, l.workers, l.capacity, l.busy, l.wanted_capacity
    from @schema@._private_loaded_queues() as n (queue) cross join lateral @schema@.queue_load(n.queue) l;
