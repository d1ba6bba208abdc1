-- running → completed, failed, scheduled, ready: what a claim's owner reports, and what recovery does in its place.

-- Tell those who wait for results, if anybody does: the buckets of the ended executions, as numbers, since any role
-- may listen.
create or replace function @schema@._private_notify_results(p_ids uuid[]) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_buckets text;
begin
    if (case when pg_try_advisory_lock(@schema@._private_key_w(-1)) then pg_advisory_unlock(@schema@._private_key_w(-1)) else false end) then
        return;
    end if;
    select string_agg(b::text, ' ') into v_buckets
    from (select distinct @schema@._private_bucket(id) as b from unnest(p_ids) as id) x
    where case when pg_try_advisory_lock(@schema@._private_key_w(b)) then not pg_advisory_unlock(@schema@._private_key_w(b)) else true end;
    if v_buckets is not null then
        perform pg_notify(@schema@._private_results_channel(), v_buckets);
    end if;
end $$;

-- The slot for rows that expire after p_keep seconds: null is for ever, 0 or less is not at all (null slot).
create or replace function @schema@._private_expiry_slot(p_keep double precision, p_now timestamptz) returns int
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when p_keep is null then 0 when p_keep > 0 then
        (select no from @schema@._private_expiry_slots where no > 0 and expires_upto >= p_now + make_interval(secs => p_keep)
         order by expires_upto, no desc limit 1) end
$$;

-- Write the outcomes of claims of one orchestrator, all of one partition. Arrays of one length:
--   p_outcomes: completed | failed | retried (after p_delays seconds) | released (the attempt is given back; also
-- after p_delays)
--   p_keeps: seconds to keep the finished row; null for ever, 0 not at all
-- Each row is written whole if its token (id, claim_no, owner, running) holds, or not at all; a row whose token does
-- not hold changes nothing. Returns the ids that were written now. Locks: the rows (owned by the caller, so nobody
-- else waits for them but recovery, which skips), their dedupe keys.
create or replace function @schema@._private_flush_partition(
    p_queue_no int, p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[],
    p_delays double precision[], p_keeps double precision[], p_crashes int
) returns table (id uuid, requeued_queue text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set enable_hashjoin = off
    set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    v_left int := cardinality(p_ids);
    v_written int;
begin
    loop
        return query execute format($sql$
            with o as materialized (
                -- In the order of ids, so that a flush sent again while the first is still at work locks rows in the same
                -- order. Rows are found by id here, and by their place below, where the token is tested in a form that no index
                -- answers: stale statistics would make the planner walk all running rows for each outcome (100 times
                -- slower; benchmarks/throughput.py).
                select o.*, row.tid from unnest($3, $4, $5, $6, $7, $8, $9) as o (id, claim_no, outcome, result, error, delay, keep)
                    cross join lateral (select e.ctid as tid from @schema@.%1$I e where e.id = o.id offset 0) row
                order by o.id
            ), gone as (
                delete from @schema@.%1$I e using o
                where e.ctid = o.tid and (e.id, e.claim_no, e.owner, e.state) is not distinct from (o.id, o.claim_no, $2, 'running')
                    and o.outcome in ('completed', 'failed', 'cancelled')
                returning e.*, o.outcome as new_state, o.result, o.error, o.keep
            ), kept as (
                insert into @schema@._private_finished (slot, priority, attempt, crashes, generation, max_attempts, depth, state, id, owner,
                    claim_no, run_at, created_at, claimed_at, finished_at, expires_at, queue, task, dedupe_key, payload, result, errors,
                    cancel_reason, parent_id, root_id, limit_key, version, tags, headers)
                select s.slot, g.priority, g.attempt - $10, g.crashes + $10, g.generation, g.max_attempts, g.depth,
                    g.new_state::@schema@.execution_state, g.id, g.owner, g.claim_no, g.run_at, g.created_at, g.claimed_at, $1,
                    $1 + make_interval(secs => g.keep), g.queue, g.task, g.dedupe_key, g.payload, g.result,
                    case when g.error is null then g.errors else coalesce(g.errors, '[]') || g.error end,
                    g.cancel_reason, g.parent_id, g.root_id, g.limit_key, g.version, g.tags, g.headers
                from gone g
                    join (select keep, @schema@._private_expiry_slot(keep, $1) as slot from (select distinct keep from o) k) s
                    on s.keep is not distinct from g.keep
                where s.slot is not null
            ), keys as (
                delete from @schema@._private_dedupe_keys d using gone g
                where g.dedupe_key is not null and d.queue = g.queue and d.task = g.task and d.key = g.dedupe_key and d.execution_id = g.id
            ), payloads as (
                delete from @schema@._private_payloads l using gone g where g.payload is null and g.keep <= 0 and l.execution_id = g.id
            ), again as (
                update @schema@.%1$I e set
                    state = (case when o.delay > 0 then 'scheduled' else 'ready' end)::@schema@.execution_state,
                    run_at = case when o.outcome = 'retried' or o.delay > 0 then $1 + make_interval(secs => o.delay) else e.run_at end,
                    attempt = e.attempt - case when o.outcome = 'retried' then 0 else 1 end,
                    crashes = e.crashes + $10,
                    owner = null, claimed_at = null, outcome = o.outcome, outcome_claim = e.claim_no,
                    errors = case when o.error is null then e.errors else coalesce(e.errors, '[]') || o.error end
                from o
                where e.ctid = o.tid and (e.id, e.claim_no, e.owner, e.state) is not distinct from (o.id, o.claim_no, $2, 'running')
                    and o.outcome in ('retried', 'released', 'recovered')
                returning e.id, e.queue
            )
            select g.id, null::text from gone g union all select a.id, a.queue from again a
            $sql$, '_private_queue_' || p_queue_no)
        using @schema@._private_clock(), p_owner, p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_delays, p_keeps, p_crashes;
        get diagnostics v_written = row_count;
        v_left := v_left - v_written;
        exit when v_left = 0;
        -- Somebody may have changed a row and left it to its owner (asked for its cancellation) between the look-up of its
        -- place and the write, which then found nothing there: look again. A row that lost its token stays unwritten.
        execute format($sql$
            select from unnest($1, $2, $3) as o (id, claim_no, outcome) cross join lateral (
                select e.claim_no, e.owner, e.state from @schema@.%1$I e where e.id = o.id offset 0) row
            where (row.claim_no, row.owner, row.state) = (o.claim_no, $4, 'running')
                and o.outcome in ('completed', 'failed', 'cancelled', 'retried', 'released', 'recovered') limit 1
            $sql$, '_private_queue_' || p_queue_no) using p_ids, p_claim_nos, p_outcomes, p_owner;
        get diagnostics v_written = row_count;
        exit when v_written = 0;
    end loop;
end $$;

-- Flush outcomes. Returns only those that were not written now, with why: "already" (an earlier flush of the same
-- claim did it: the reply was lost), or "fenced" (the claim is no longer the caller's). Sending a flush twice changes
-- nothing the second time. Holds K and announces for every queue on which something was made ready again.
create or replace function @schema@.flush(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[],
    p_delays double precision[], p_keeps double precision[]
) returns table (id uuid, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
as $$
#variable_conflict use_column
declare
    v_nos int[];
    v_no int;
    v_written uuid[] := '{}';
    v_ended uuid[] := '{}';
    v_queues text[] := '{}';
    v_ids uuid[];
    v_ended_ids uuid[];
    v_requeued text[];
    v_index int[];
begin
    v_nos := array(select distinct @schema@._private_queue_no(i) from unnest(p_ids) as i order by 1);
    foreach v_no in array v_nos loop
        if cardinality(v_nos) = 1 then
            select coalesce(array_agg(f.id), '{}'), coalesce(array_agg(f.id) filter (where f.requeued_queue is null), '{}'),
                coalesce(array_agg(distinct f.requeued_queue) filter (where f.requeued_queue is not null), '{}')
            into v_ids, v_ended_ids, v_requeued
            from @schema@._private_flush_partition(v_no, p_owner, p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_delays, p_keeps, 0) f;
        else
            v_index := array(select n from generate_subscripts(p_ids, 1) as n where @schema@._private_queue_no(p_ids[n]) = v_no order by n);
            select coalesce(array_agg(f.id), '{}'), coalesce(array_agg(f.id) filter (where f.requeued_queue is null), '{}'),
                coalesce(array_agg(distinct f.requeued_queue) filter (where f.requeued_queue is not null), '{}')
            into v_ids, v_ended_ids, v_requeued
            from @schema@._private_flush_partition(v_no, p_owner,
                array(select p_ids[n] from unnest(v_index) n), array(select p_claim_nos[n] from unnest(v_index) n),
                array(select p_outcomes[n] from unnest(v_index) n), array(select p_results[n] from unnest(v_index) n),
                array(select p_errors[n] from unnest(v_index) n), array(select p_delays[n] from unnest(v_index) n),
                array(select p_keeps[n] from unnest(v_index) n), 0) f;
        end if;
        v_written := v_written || v_ids;
        v_ended := v_ended || v_ended_ids;
        v_queues := v_queues || v_requeued;
    end loop;
    perform @schema@._private_announce(q) from (select distinct q from unnest(v_queues) as q order by q) x;
    if v_ended <> '{}' then
        perform @schema@._private_notify_results(v_ended);
    end if;
    if cardinality(v_written) < cardinality(p_ids) then
        return query
        select o.id, case
                when exists (select from @schema@._private_finished f where f.id = o.id and f.claim_no = o.claim_no
                            and f.owner = p_owner and f.state::text = o.outcome)
                    or exists (select from @schema@._private_executions e
                        where e.queue_no = @schema@._private_queue_no(o.id) and e.id = o.id
                            and e.outcome_claim = o.claim_no and e.outcome = o.outcome)
                then 'already' else 'fenced' end
        from unnest(p_ids, p_claim_nos, p_outcomes) as o (id, claim_no, outcome)
        where o.id <> all (v_written);
    end if;
end $$;
