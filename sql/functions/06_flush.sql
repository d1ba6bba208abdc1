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
        perform @schema@._private_notify(@schema@._private_results_channel(), v_buckets);
    end if;
end $$;

-- Write the outcomes of claims of one orchestrator, all of one partition. Arrays of one length:
--   p_outcomes: completed | failed | cancelled | retried (after p_delays seconds) | released (the attempt is given back;
-- also after p_delays) | waiting (for its waits; the attempt is given back). A row whose cancellation was requested ends as
-- cancelled instead of being retried, released or parked; a completion or failure that comes with a valid token counts.
--   p_keeps: seconds to keep the finished row, should it end; null for ever, 0 not at all
-- Each row is written whole if its token (id, claim_no, owner, running) holds, or not at all; a row whose token does
-- not hold changes nothing. Returns the ids that were written now, and rows without id that only name a queue on which
-- something was made ready. The end of a child resolves its parent's wait, whose row the caller has locked: pass the
-- parents to _private_wake. Locks: the rows (owned by the caller, so nobody else waits for them but recovery, which
-- skips), their dedupe keys. The work is done by the partition's own function (09_partitions.sql).
create or replace function @schema@._private_flush_partition(
    p_queue_no int, p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[],
    p_delays double precision[], p_keeps double precision[], p_crashes int
) returns table (id uuid, is_ended boolean, requeued_queue text, parent_id uuid)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute format('select * from @schema@.%I($1, $2, $3, $4, $5, $6, $7, $8, $9)', '_private_flush_' || p_queue_no)
        using p_owner, p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_delays, p_keeps, p_crashes;
end $$;

-- Flush outcomes. Returns only those that were not written now, with why: "already" (an earlier flush of the same
-- claim did it: the reply was lost), "fenced" (the claim is no longer the caller's), or "gone" (there is no row of it:
-- this outcome was written and is not kept, or the claim was lost and whoever had it next ended it so). Sending a flush twice changes
-- nothing the second time. Holds K and announces for every queue on which something was made ready again.
-- Fails with 55P03, as a whole, if a row stays locked for a second: somebody's open transaction has asked for its
-- cancellation. Send the others without it. p_family: some of them may have a history or parents; then all are locked
-- first, with the parents, in the order of partition and id. False spares that.
create or replace function @schema@.flush(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[],
    p_delays double precision[], p_keeps double precision[], p_family boolean default true
) returns table (id uuid, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
    set lock_timeout = '1s'
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
    v_parents uuid[];
    v_woken uuid[] := '{}';
    v_goes_on constant boolean := cardinality(p_ids) > 1 and p_outcomes && array['retried', 'released', 'waiting'];
begin
    -- Rows that go on are written after those that end, so not in the order of ids; others may hold one of them while they
    -- wait for another, as the parents of what they end.
    -- And whoever records something for one of these holds its row for that. What it wrote has to be seen by the statements
    -- below, which remove it, keep it, and find out when a wait is due; so they begin when it has committed.
    if p_family or v_goes_on then
        perform @schema@._private_lock_family(p_ids, true);
    end if;
    -- An id that was made up may name a partition that is not there.
    v_nos := array(select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1);
    if not p_family and cardinality(v_nos) = 1 then
        execute format('select @schema@.%I($1, $2, $3, $4, $5, $6, $7)', '_private_finish_' || v_nos[1])
            into v_ended using p_owner, p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_keeps;
        v_written := v_ended;
        if cardinality(v_written) = cardinality(p_ids) then
            v_nos := '{}';
        end if;
    end if;
    foreach v_no in array v_nos loop
        if cardinality(v_nos) = 1 then
            select coalesce(array_agg(f.id) filter (where f.id is not null), '{}'), coalesce(array_agg(f.id) filter (where f.is_ended), '{}'),
                coalesce(array_agg(distinct f.requeued_queue) filter (where f.requeued_queue is not null), '{}'),
                coalesce(array_agg(f.parent_id) filter (where f.parent_id is not null), '{}')
            into v_ids, v_ended_ids, v_requeued, v_parents
            from @schema@._private_flush_partition(v_no, p_owner, p_ids, p_claim_nos, p_outcomes, p_results, p_errors, p_delays, p_keeps, 0) f;
        else
            v_index := array(select n from generate_subscripts(p_ids, 1) as n where @schema@._private_queue_no(p_ids[n]) = v_no order by n);
            select coalesce(array_agg(f.id) filter (where f.id is not null), '{}'), coalesce(array_agg(f.id) filter (where f.is_ended), '{}'),
                coalesce(array_agg(distinct f.requeued_queue) filter (where f.requeued_queue is not null), '{}'),
                coalesce(array_agg(f.parent_id) filter (where f.parent_id is not null), '{}')
            into v_ids, v_ended_ids, v_requeued, v_parents
            from @schema@._private_flush_partition(v_no, p_owner,
                array(select p_ids[n] from unnest(v_index) n), array(select p_claim_nos[n] from unnest(v_index) n),
                array(select p_outcomes[n] from unnest(v_index) n), array(select p_results[n] from unnest(v_index) n),
                array(select p_errors[n] from unnest(v_index) n), array(select p_delays[n] from unnest(v_index) n),
                array(select p_keeps[n] from unnest(v_index) n), 0) f;
        end if;
        v_written := v_written || v_ids;
        v_ended := v_ended || v_ended_ids;
        v_queues := v_queues || v_requeued;
        v_woken := v_woken || v_parents;
    end loop;
    if v_woken <> '{}' then
        v_queues := v_queues || @schema@._private_wake(v_woken);
    end if;
    perform @schema@._private_announce(q) from (select distinct q from unnest(v_queues) as q order by q) x;
    if v_ended <> '{}' then
        perform @schema@._private_notify_results(v_ended);
    end if;
    if cardinality(v_written) < cardinality(p_ids) then
        return query
        select o.id, case
                when exists (select from @schema@._private_finished f where f.id = o.id and f.claim_no = o.claim_no
                            and f.owner = p_owner
                            and f.state::text = case when o.outcome in ('completed', 'failed') then o.outcome else 'cancelled' end)
                    or exists (select from @schema@._private_executions e
                        where e.queue_no = @schema@._private_queue_no(o.id) and e.id = o.id
                            and e.outcome_claim = o.claim_no and e.outcome = o.outcome)
                then 'already'
                when exists (select from @schema@._private_finished f where f.id = o.id)
                    or exists (select from @schema@._private_executions e
                        where e.queue_no = @schema@._private_queue_no(o.id) and e.id = o.id)
                then 'fenced' else 'gone' end
        from unnest(p_ids, p_claim_nos, p_outcomes) as o (id, claim_no, outcome)
        where o.id <> all (v_written);
    end if;
end $$;
