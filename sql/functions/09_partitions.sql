-- What each partition has of its own: claim and flush with static SQL, so that their plans are kept, whatever the number of
-- queues (planned anew at each call they took 0.3 to 1 ms more; benchmarks/latency.py). The public verbs in 05_claim.sql and
-- 06_flush.sql find the partition and call these.
--
-- `x between y and y` is an equality that the planner can look up in an index but not merge by: a plan that merges reads the
-- index from end to end, which is cheap where the statistics say that the table is empty. They do after a vacuum of a queue
-- that has just been drained, and 60,000 executions later each outcome took 0.5 ms (tests/sql/test_plans.py). For the same
-- reason no condition may match that of a partial index, unless that is the one to be used.

create or replace function @schema@._private_define_partition(p_no int) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $define$
declare
    -- What both ways to end an execution have in common: its finished row; its dedupe key and large payload go.
    v_end constant text := $end$kept as (
        insert into @schema@._private_finished (slot, priority, attempt, crashes, generation, max_attempts, depth, state, id, owner,
            claim_no, run_at, created_at, claimed_at, finished_at, expires_at, queue, task, dedupe_key, payload, result, errors,
            steps, progress, cancel_reason, parent_id, root_id, limit_key, version, tags, headers, timeout, backoff)
        select s.slot, g.priority, g.attempt - {crashes}, g.crashes + {crashes}, g.generation, g.max_attempts, g.depth,
            g.new_state::@schema@.execution_state, g.id, g.owner, g.claim_no, g.run_at, g.created_at, g.claimed_at, v_now,
            v_now + make_interval(secs => g.keep), g.queue, g.task, g.dedupe_key, g.payload,
            case when g.new_state <> 'cancelled' then g.result end,
            @schema@._private_add_error(g.errors, g.error, g.attempt, v_now),
            case when g.is_durable then @schema@._private_history(g.id) end,
            g.progress, g.cancel_reason, g.parent_id, g.root_id, g.limit_key, g.version, g.tags, g.headers, g.timeout, g.backoff
        from gone g
            join slots s on s.keep is not distinct from g.keep
        where s.slot is not null
    ), keys as (
        delete from @schema@._private_dedupe_keys d using gone g
        where g.dedupe_key is not null and (d.queue, d.task, d.key) between (g.queue, g.task, g.dedupe_key) and (g.queue, g.task, g.dedupe_key)
            and d.execution_id = g.id
    ), payloads as (
        delete from @schema@._private_payloads l using gone g
        where g.payload is null and g.keep <= 0 and l.execution_id between g.id and g.id
    )$end$;
begin
    execute replace(replace(replace($template$
create or replace function @schema@._private_flush_{no}(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[],
    p_delays double precision[], p_keeps double precision[], p_crashes int
) returns table (id uuid, is_ended boolean, requeued_queue text, parent_id uuid)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
    set enable_hashjoin = off
    set enable_mergejoin = off
as $body$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_left int := cardinality(p_ids);
    v_written int;
    v_retried uuid[] := '{}';
begin
    if 'retried' = any (p_outcomes) then
        -- Those that this call will write: a flush that is sent again forgets nothing that came after the first.
        v_retried := array(
            select o.id from unnest(p_ids, p_claim_nos, p_outcomes) as o (id, claim_no, outcome) cross join lateral (
                select e.claim_no, e.owner, e.state, e.is_durable from @schema@._private_queue_{no} e where e.id = o.id offset 0) row
            where o.outcome = 'retried' and row.is_durable and (row.claim_no, row.owner, row.state) = (o.claim_no, p_owner, 'running'));
    end if;
    loop
        v_now := @schema@._private_clock();
        return query
            with o as materialized (
                -- In the order of ids, so that a flush sent again while the first is still at work locks rows in the same
                -- order. Rows are found by id here, and by their place below, where the token is tested in a form that no index
                -- answers: stale statistics would make the planner walk all running rows for each outcome (100 times
                -- slower; benchmarks/throughput.py).
                select o.*, row.tid from unnest(p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_delays, p_keeps) as o (id, claim_no, outcome, result, error, delay, keep)
                    cross join lateral (select e.ctid as tid from @schema@._private_queue_{no} e where e.id = o.id offset 0) row
                order by o.id
            ), slots as materialized (
                -- Once for each distinct time to keep, not for each row: offset 0 keeps the planner from pulling it up.
                select k.keep, @schema@._private_expiry_slot(k.keep, v_now) as slot from (select distinct keep from o offset 0) k
            ), gone as (
                delete from @schema@._private_queue_{no} e using o
                where e.ctid = o.tid and (e.id, e.claim_no, e.owner, e.state) is not distinct from (o.id, o.claim_no, p_owner, 'running')
                    and (o.outcome in ('completed', 'failed', 'cancelled')
                        or e.cancel_requested_at is not null and o.outcome in ('retried', 'released', 'recovered', 'waiting'))
                returning e.*, case when o.outcome in ('completed', 'failed') then o.outcome else 'cancelled' end as new_state,
                    o.result, o.error, o.keep
            ), {end}, steps as (
                delete from @schema@._private_steps s using gone g where g.is_durable and s.execution_id between g.id and g.id
            ), channels as (
                update @schema@._private_channels c set ended_at = v_now,
                    expires_at = case when g.keep is not null then v_now + make_interval(secs => greatest(g.keep, 3600)) end
                from gone g where g.is_durable and c.execution_id between g.id and g.id
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
                returning w.target, w.on_close, w.resolved_at, g.new_state
            ), closings as (
                insert into @schema@._private_closings (execution_id, reason, created_at)
                select w.target::uuid, 'its parent has ended: ' || w.new_state, v_now from waits w
                where w.on_close = 'cancel' and w.resolved_at is null
                on conflict do nothing
            ), resolved as (
                update @schema@._private_waits w set resolved_at = v_now, outcome = g.new_state,
                    value = case when g.new_state = 'completed' then g.result end,
                    error = case g.new_state when 'failed' then coalesce(g.error, g.errors -> -1)
                        when 'cancelled' then jsonb_build_object('reason', g.cancel_reason) end
                from gone g
                where g.parent_id is not null and (w.execution_id, w.name) between (g.parent_id, g.wait_name) and (g.parent_id, g.wait_name)
                    and w.target = g.id::text and num_nonnulls(w.resolved_at) = 0
                    -- A parent that ends by this statement too: its waits go, and a row is changed by one of two only.
                    and g.parent_id <> all (array(select p.id from gone p where p.is_durable))
            ), again as (
                update @schema@._private_queue_{no} e set
                    state = (case when o.outcome = 'waiting' then 'waiting' when o.delay > 0 then 'scheduled' else 'ready' end)::@schema@.execution_state,
                    run_at = case when o.outcome = 'waiting' then least(e.deadline_at, (select min(w.due_at) from @schema@._private_waits w
                            where w.execution_id = e.id and w.resolved_at is null))
                        when o.outcome = 'retried' or o.delay > 0 then v_now + make_interval(secs => o.delay) else e.run_at end,
                    attempt = e.attempt - case when o.outcome = 'retried' then 0 else 1 end,
                    crashes = e.crashes + p_crashes,
                    owner = null, claimed_at = null, outcome = o.outcome, outcome_claim = e.claim_no,
                    errors = @schema@._private_add_error(e.errors, o.error, e.attempt, v_now)
                from o
                where e.ctid = o.tid and (e.id, e.claim_no, e.owner, e.state) is not distinct from (o.id, o.claim_no, p_owner, 'running')
                    and e.cancel_requested_at is null and o.outcome in ('retried', 'released', 'recovered', 'waiting')
                -- Who waits has a place in the sleepers' timers only if it is due before their next look.
                returning e.id, case when e.state <> 'waiting' or e.run_at < v_now + interval '61 s' then e.queue end as queue
            )
            select g.id, true, null::text, g.parent_id from gone g union all select a.id, false, a.queue, null::uuid from again a;
        get diagnostics v_written = row_count;
        v_left := v_left - v_written;
        exit when v_left = 0;
        -- Somebody may have changed a row and left it to its owner (asked for its cancellation) between the look-up of
        -- its place and the write, which then found nothing there: look again. A row that lost its token stays unwritten.
        perform
            from unnest(p_ids, p_claim_nos, p_outcomes) as o (id, claim_no, outcome) cross join lateral (
                select e.claim_no, e.owner, e.state from @schema@._private_queue_{no} e where e.id = o.id offset 0) row
            where (row.claim_no, row.owner, row.state) = (o.claim_no, p_owner, 'running')
                and o.outcome in ('completed', 'failed', 'cancelled', 'retried', 'released', 'recovered', 'waiting') limit 1;
        exit when not found;
    end loop;
    if 'waiting' = any (p_outcomes) then
        -- Waits that a task of the handler's waits for by itself: of a nursery's such a one is a scope of its own, and if one
        -- is resolved though its handler has been told, it was interrupted before it could go on.
        if exists (select from unnest(p_outcomes, p_results) as o (outcome, result) where o.outcome = 'waiting' and o.result is not null) then
            update @schema@._private_waits w set is_seen = false, scope = case when w.scope is not null then w.name end
            from unnest(p_ids, p_claim_nos, p_outcomes, p_results) as o (id, claim_no, outcome, result)
                join @schema@._private_queue_{no} e on e.id between o.id and o.id and (e.state, e.outcome_claim) is not distinct from ('waiting', o.claim_no)
                cross join lateral jsonb_array_elements_text(o.result) as a (name)
            where o.outcome = 'waiting' and w.execution_id between o.id and o.id and w.name = a.name and (w.is_seen or w.scope <> w.name);
        end if;
        -- What was resolved before we had the rows' locks: nobody else tells them (the resolver's side: _private_wake).
        return query
            update @schema@._private_queue_{no} e set state = 'ready', run_at = v_now
            from unnest(p_ids, p_claim_nos, p_outcomes) as o (id, claim_no, outcome)
            where o.outcome = 'waiting' and e.id between o.id and o.id
                and (e.state, e.outcome_claim) is not distinct from ('waiting', o.claim_no)
                and @schema@._private_is_resumable(e.id)
            returning null::uuid, false, e.queue, null::uuid;
    end if;
    if v_retried <> '{}' then
        perform @schema@._private_forget_failures(array(
            select e.id from unnest(v_retried) as i join @schema@._private_queue_{no} e on e.id between i and i
            where e.outcome = 'retried' and e.state <> 'running'));
    end if;
end $body$
    $template$, '{end}', v_end), '{crashes}', 'p_crashes'), '{no}', p_no::text);
    execute replace(replace(replace($template$
-- What most outcomes need, and less than the half of what flush does: of these claims, end those that have no history and no
-- parent. Returns their ids; the rest is left to flush. Tokens, arrays and locks as there
-- (benchmarks/throughput.py).
create or replace function @schema@._private_finish_{no}(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[], p_keeps double precision[]
) returns uuid[]
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
    set enable_hashjoin = off
    set enable_mergejoin = off
as $body$
#variable_conflict use_column
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_ids uuid[];
begin
    with o as materialized (
        select * from unnest(p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_keeps) as o (id, claim_no, outcome, result, error, keep)
        where o.outcome in ('completed', 'failed', 'cancelled')
        order by o.id
    ), slots as materialized (
        select k.keep, @schema@._private_expiry_slot(k.keep, v_now) as slot from (select distinct keep from o offset 0) k
    ), gone as (
        delete from @schema@._private_queue_{no} e using o
        -- In a form that only the index of ids answers, from o to e.
        where e.id between o.id and o.id and (e.claim_no, e.owner, e.state) is not distinct from (o.claim_no, p_owner, 'running')
            and not e.is_durable and e.parent_id is null
        returning e.*, o.outcome as new_state, o.result, o.error, o.keep
    ), {end}
    select coalesce(array_agg(g.id), '{}') into v_ids from gone g;
    return v_ids;
end $body$
    $template$, '{end}', v_end), '{crashes}', '0'), '{no}', p_no::text);
    execute replace($template$
-- Of these claims those that hold: locked, in the order of ids, and marked as having a history.
create or replace function @schema@._private_hold_{no}(p_owner uuid, p_ids uuid[], p_claim_nos bigint[])
    returns table (id uuid, attempt int, depth int, root_id uuid, deadline_at timestamptz)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
    set enable_hashjoin = off
    set enable_mergejoin = off
as $body$
#variable_conflict use_column
begin
    return query
        with o as materialized (
            select distinct o.id, o.claim_no from unnest(p_ids, p_claim_nos) as o (id, claim_no) order by o.id
        ), held as materialized (
            select row.* from o cross join lateral (
                select e.id, e.attempt, e.depth, e.root_id, e.deadline_at, e.is_durable from @schema@._private_queue_{no} e
                -- In a form that only the index of ids answers, see flush.
                where e.id = o.id and (e.claim_no, e.owner, e.state) is not distinct from (o.claim_no, p_owner, 'running') offset 0
                for no key update) row
        ), marked as (
            -- By id: of a row that somebody changed while we waited for its lock, the new place is unknown to this statement.
            update @schema@._private_queue_{no} e set is_durable = true from held h where e.id between h.id and h.id and not h.is_durable
        )
        select h.id, h.attempt, h.depth, h.root_id, h.deadline_at from held h;
end $body$
    $template$, '{no}', p_no::text);
    execute replace($template$
-- The owners of what runs here that are dead or unknown, and what a crash of theirs charges (`recover`). Each owner is found by
-- one step in the index, however many rows it has. Planned once, as the next one is: every heartbeat of an idle worker asks
-- (benchmarks/latency.py).
create or replace function @schema@._private_orphans_{no}() returns table (owner uuid, crashes int)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $body$
#variable_conflict use_column
begin
    return query
        with recursive owners as (
            (select e.owner from @schema@._private_queue_{no} e where e.state = 'running' order by e.owner limit 1)
            union all
            select (select e.owner from @schema@._private_queue_{no} e where e.state = 'running' and e.owner > o.owner order by e.owner limit 1)
            from owners o where o.owner is not null
        )
        select w.owner, case when o.server_epoch <> @schema@._private_server_epoch() then 0 else 1 end
        from owners w left join @schema@._private_orchestrators o on o.id = w.owner
        where w.owner is not null and (o.id is null or o.died_at is not null);
end $body$
    $template$, '{no}', p_no::text);
    if p_no = 0 then
        return;  -- nobody claims from the overflow partition alone
    end if;
    execute replace($template$
-- Of what an orchestrator runs of a queue, that of which the cancellation is requested; and whether an execution is ready that is
-- on its last life. All of it here or in the overflow partition.
create or replace function @schema@._private_asked_{no}(p_owner uuid, p_queue text, out ids uuid[], out claim_nos bigint[],
        out reasons text[], out has_suspects boolean)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
as $body$
begin
    select coalesce(array_agg(e.id), '{}'), coalesce(array_agg(e.claim_no), '{}'), coalesce(array_agg(e.cancel_reason), '{}'),
        exists (select from @schema@._private_queue_{no} s where s.state = 'ready' and s.crashes >= 2)
            or exists (select from @schema@._private_queue_0 s where s.state = 'ready' and s.crashes >= 2 and s.queue = p_queue)
    into ids, claim_nos, reasons, has_suspects
    from (
        select id, claim_no, cancel_reason from @schema@._private_queue_{no}
        where owner = p_owner and state = 'running' and cancel_requested_at is not null
        union all
        select id, claim_no, cancel_reason from @schema@._private_queue_0
        where owner = p_owner and state = 'running' and cancel_requested_at is not null and queue = p_queue) e;
end $body$
    $template$, '{no}', p_no::text);
    execute replace(replace($template$
create or replace function @schema@._private_claim_{no}(p_queue text, p_owner uuid, p_tasks text[], p_limit int, p_versions text[] default null)
    returns table (
        id uuid, claim_no bigint, task text, attempt int, max_attempts int, payload text, waited double precision,
        timeout double precision, deadline_in double precision, backoff text, due_in double precision, parent_id uuid, version text
    )
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set plan_cache_mode = force_generic_plan
    set enable_seqscan = off
    set jit = off
    set enable_bitmapscan = off
    set enable_hashjoin = off
    set enable_mergejoin = off
as $body$
#variable_conflict use_column
declare
    v_is_locked boolean;
    v_now timestamptz;
    v_due timestamptz;
    v_due_0 timestamptz;
    v_found boolean := false;
    v_is_alive boolean;
    v_overflows boolean;
    v_keys text[];  -- the versions it has; null: none
    v_tids tid[];
    v_began timestamptz;
    v_took interval;
    v_mark jsonb;  -- what this session has claimed last, see below
    v_who text;
    v_noted text;
    v_rests boolean := false;
    v_priority int;
    v_run_at timestamptz;
    v_id uuid;
    v_key bigint;  -- of the place that the workers share, see 05_claim.sql
    v_there timestamptz;
    v_there_id uuid;
    v_look_at timestamptz;
begin
    -- Expressions, not statements, wherever that will do: an executor that is set up takes 5 µs, and more where a claim
    -- comes after a pause (benchmarks/latency.py).
    v_is_locked := pg_advisory_xact_lock_shared(@schema@._private_key_k(p_queue)) is not null;
    v_noted := set_config('synchronous_commit', 'off', true);
    if p_versions is not null then
        v_keys := array(select t.task || '@' || t.version from unnest(p_tasks, p_versions) as t (task, version) where t.version is not null);
    end if;
    v_now := @schema@._private_clock();
    -- In one statement, since each takes 10 µs to begin (benchmarks/latency.py).
    select
        exists (select from @schema@._private_orchestrators o
            where o.id = p_owner and o.died_at is null and o.expires_at > v_now and o.server_epoch = @schema@._private_server_epoch()),
        -- Not min(): where statistics say that next to nothing is scheduled, the planner may read all that is.
        (select run_at from @schema@._private_queue_{no} where state in ('scheduled', 'waiting') order by run_at limit 1),
        (select run_at from @schema@._private_queue_0 where queue = p_queue and state in ('scheduled', 'waiting') order by run_at limit 1),
        exists (select from @schema@._private_queue_0 where queue = p_queue and state = 'ready')
    into v_is_alive, v_due, v_due_0, v_overflows;
    if not v_is_alive then
        perform @schema@._private_require_alive(p_owner, v_now);
    end if;
    if v_due <= v_now then
        perform @schema@._private_promote(p_queue, {no}, v_now, greatest(1000, p_limit));
    end if;
    if v_due_0 <= v_now then
        perform @schema@._private_promote(p_queue, 0, v_now, greatest(1000, p_limit));
        v_overflows := true;
    end if;

    if v_overflows then
        -- Some were produced before the queue was registered: pick from both partitions by one order. What is locked
        -- beyond the limit stays ready.
        return query
        with own as materialized (
            select ctid, 1 as part, priority, run_at, id from @schema@._private_queue_{no}
            where state = 'ready' and crashes < 2 and task = any (p_tasks) and (version is null or task || '@' || version = any (v_keys))
            order by priority desc, run_at, id limit p_limit for update skip locked
        ), overflow as materialized (
            select ctid, 0 as part, priority, run_at, id from @schema@._private_queue_0
            where queue = p_queue and state = 'ready' and crashes < 2 and task = any (p_tasks) and (version is null or task || '@' || version = any (v_keys))
            order by priority desc, run_at, id limit p_limit for update skip locked
        ), picked as materialized (
            select ctid, part from (table own union all table overflow) x order by priority desc, run_at, id limit p_limit
        ), claimed_own as (
            update @schema@._private_queue_{no} e set state = 'running', owner = p_owner, claim_no = e.claim_no + 1,
                attempt = e.attempt + 1, claimed_at = v_now, version = coalesce(e.version, p_versions[array_position(p_tasks, e.task)])
            from picked p where p.part = 1 and e.ctid = p.ctid
            returning e.*
        ), claimed_overflow as (
            update @schema@._private_queue_0 e set state = 'running', owner = p_owner, claim_no = e.claim_no + 1,
                attempt = e.attempt + 1, claimed_at = v_now, version = coalesce(e.version, p_versions[array_position(p_tasks, e.task)])
            from picked p where p.part = 0 and e.ctid = p.ctid
            returning e.*
        )
        select id, claim_no, task, attempt, max_attempts, payload::text, date_part('epoch', v_now - run_at),
            date_part('epoch', timeout), date_part('epoch', deadline_at - v_now), backoff::text, null::float8, parent_id, version
        from (table claimed_own union all table claimed_overflow) x order by priority desc, run_at, id;
        v_found := found;
    else
        -- The front of the index may be full of entries of rows that were claimed before, for as long as any snapshot in the
        -- database might still see them: to step over them takes longer than all the rest, with ten workers as with one long
        -- transaction (benchmarks/contention.py, benchmarks/backlog.py). Where a look from the front has taken long, the
        -- session notes the last row that it claimed, and later claims go on behind it, if they find enough there and no
        -- higher priority has something. What else lies before that row, of transactions that committed late, retried or
        -- promoted, a look from the front finds: after 0.1 s, or in a tenth of the time if looks take still longer; and always
        -- before anybody hears that there is nothing. Whoever shares the session, behind a pooler, could note something else:
        -- it is believed for a minute at most. What others claim meanwhile is as much again for each of them: so they share the
        -- place that they have come to, and the looks from the front, which one of them takes at a time (ten processes, one queue:
        -- 21 instead of 12 µs of a claim's CPU per row, benchmarks/contention.py).
        v_began := clock_timestamp();
        v_noted := current_setting('{mark}', true);
        if v_noted <> '' then
            v_mark := v_noted::jsonb;
            v_who := md5(p_tasks::text || coalesce(p_versions::text, ''));
            if v_mark ->> 'who' = v_who then
                v_priority := (v_mark ->> 'priority')::int;
                v_run_at := (v_mark ->> 'run_at')::timestamptz;
                v_id := (v_mark ->> 'id')::uuid;
                v_key := hashtextextended(v_who || v_priority, {no});
                select p.run_at, p.id, p.look_at into v_there, v_there_id, v_look_at from @schema@._private_read_place(v_key, v_id) p;
                if (v_there, v_there_id) > (v_run_at, v_id) then
                    v_run_at := v_there;
                    v_id := v_there_id;
                end if;
                v_look_at := greatest((v_mark ->> 'look_at')::timestamptz, v_look_at);
                if v_look_at not between v_began and v_began + interval '1 minute' then
                    -- It is our turn: the others go on.
                    perform @schema@._private_note_look(v_key, v_began + interval '0.1 s');
                elsif not exists (select from @schema@._private_queue_{no} where state = 'ready' and priority > v_priority) then
                    v_rests := coalesce((v_mark ->> 'rest_until')::timestamptz between v_began and v_began + interval '1 minute', false);
                    v_tids := array(
                        select ctid from @schema@._private_queue_{no} where state = 'ready' and crashes < 2 and task = any (p_tasks) and (version is null or task || '@' || version = any (v_keys))
                            and priority = v_priority and (run_at, id) > (v_run_at, v_id)
                        order by run_at, id limit p_limit for update skip locked);
                end if;
            end if;
        end if;
        if v_rests and v_tids = '{}' then
            due_in := greatest(0, date_part('epoch',
                least(v_due, v_due_0, v_now + ((v_mark ->> 'rest_until')::timestamptz - v_began)) - v_now));
            return next;
            return;
        elsif not v_rests and (v_tids is null or cardinality(v_tids) < p_limit) then
            v_mark := null;
            v_tids := array(
                select ctid from @schema@._private_queue_{no} where state = 'ready' and crashes < 2 and task = any (p_tasks) and (version is null or task || '@' || version = any (v_keys))
                order by priority desc, run_at, id limit p_limit for update skip locked);
            v_took := clock_timestamp() - v_began;
            if v_took > @schema@._private_long_look() and v_tids <> '{}' then
                v_who := md5(p_tasks::text || coalesce(p_versions::text, ''));
                v_look_at := v_began + least(greatest(10 * v_took, interval '0.1 s'), interval '1 minute');
                v_mark := jsonb_build_object('who', v_who,
                    'rest_until', case when v_took > 2.5 * @schema@._private_long_look() then v_began + least(10 * v_took, interval '1 minute') end);
            end if;
        end if;
        if v_mark is not null then
            select priority, run_at, id into v_priority, v_run_at, v_id from @schema@._private_queue_{no} where ctid = v_tids[cardinality(v_tids)];
            v_mark := v_mark || jsonb_build_object('priority', v_priority, 'run_at', v_run_at, 'id', v_id);
            v_key := hashtextextended(v_who || v_priority, {no});
            if v_took is not null then
                if cardinality(v_tids) = p_limit and (v_run_at, v_id) < (v_there, v_there_id) then
                    v_look_at := v_began;  -- there may be more before the others' place
                end if;
                v_mark := v_mark || jsonb_build_object('look_at', v_look_at);
                perform @schema@._private_note_look(v_key, v_look_at);
            end if;
            if v_there is null or (v_run_at, v_id) > (v_there, v_there_id) then
                perform @schema@._private_note_place(v_key, v_run_at, v_id);
            end if;
        end if;
        if v_mark is not null or v_noted <> '' then
            perform set_config('{mark}', coalesce(v_mark::text, ''), false);
        end if;
        -- Rows come in the order in which they were picked, since each is looked up by its place, one after the other. Sorted
        -- once more, with all their columns, they took 1 µs longer each (benchmarks/throughput.py).
        if v_tids <> '{}' then
            return query
            update @schema@._private_queue_{no} e set state = 'running', owner = p_owner, claim_no = e.claim_no + 1,
                attempt = e.attempt + 1, claimed_at = v_now, version = coalesce(e.version, p_versions[array_position(p_tasks, e.task)])
            from unnest(v_tids) as p (tid) where e.ctid = p.tid
            returning e.id, e.claim_no, e.task, e.attempt, e.max_attempts, e.payload::text, date_part('epoch', v_now - e.run_at),
                date_part('epoch', e.timeout), date_part('epoch', e.deadline_at - v_now), e.backoff::text, null::float8, e.parent_id,
                e.version;
            v_found := found;
        end if;
    end if;
    if not v_found then
        -- Rows that are ready, and that another claim in flight has locked: its end may make them visible again without
        -- a word, if it dies, and it may have begun after our caller looked at K. So our caller may not sleep on this:
        -- it has to come again in 10 ms. A plain read sees such rows.
        if exists (select from @schema@._private_queue_{no} where state = 'ready' and crashes < 2 and task = any (p_tasks) and (version is null or task || '@' || version = any (v_keys)))
            or exists (select from @schema@._private_queue_0
                where queue = p_queue and state = 'ready' and crashes < 2 and task = any (p_tasks) and (version is null or task || '@' || version = any (v_keys))) then
            v_due := least(v_due, v_now + interval '10 ms');
        end if;
        if least(v_due, v_due_0) is not null then
            due_in := greatest(0, date_part('epoch', least(v_due, v_due_0) - v_now));
        end if;
        return next;
    end if;
end $body$
    $template$, '{no}', p_no::text), '{mark}', 'pgconductor_claims.c' || left(md5(@schema_literal@), 12) || '_' || p_no);
end $define$;

-- After a change of the above: for the partitions that are there.
select @schema@._private_define_partition(no) from (select 0 as no union all select no from @schema@._private_queues) q order by no;
