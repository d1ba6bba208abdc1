-- pending → running.

-- Make due scheduled executions of a queue ready, at most p_limit of them (T2's first half). They are promoted before
-- a claim, so that priorities hold between them and those that were ready. Locks: rows, skipping those another holds.
create or replace function @schema@._private_promote(p_queue text, p_queue_no int, p_now timestamptz, p_limit int) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
as $$
declare
    v_count bigint;
begin
    execute format($sql$
        with due as materialized (
            select ctid from @schema@.%1$I
            where state = 'scheduled' and run_at <= $1 %2$s
            order by run_at limit $2 for update skip locked
        )
        update @schema@.%1$I e set state = 'ready' from due where e.ctid = due.ctid
        $sql$, '_private_queue_' || p_queue_no, case when p_queue_no = 0 then 'and queue = $3' else '' end)
    using p_now, p_limit, p_queue;
    get diagnostics v_count = row_count;
    if v_count > 0 then
        perform @schema@._private_announce(p_queue);
    end if;
    return v_count;
end $$;

-- Claim up to p_limit due executions of a queue, of the given tasks only, highest priority first, for one live
-- orchestrator.
--
-- Returns a row per execution (payload null: large, fetch it with load_payload), or, when there was nothing to claim,
-- a single row with id null and due_in: seconds until the next one is due, null if none is. `waited`: seconds it has
-- been due. Holds the queue's K until it commits: what it locks is hidden from other claimers and would be seen by
-- nobody if it died. Commits asynchronously: a claim that a server crash forgets is harmless, since its token then
-- fits nothing (an orchestrator takes a new id after a restart). Partition named, so that the cost does not depend on
-- the number of queues; index (priority, run_at, id).
create or replace function @schema@.claim(p_queue text, p_owner uuid, p_tasks text[], p_limit int)
    returns table (
        id uuid, claim_no bigint, task text, attempt int, max_attempts int, payload text, waited double precision,
        due_in double precision
    )
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_no int;
    v_due timestamptz;
    v_due_0 timestamptz;
    v_found boolean := false;
    v_update constant text := $sql$
        update @schema@.%1$I e set state = 'running', owner = $2, claim_no = e.claim_no + 1, attempt = e.attempt + 1, claimed_at = $1
        from picked p where %2$s e.ctid = p.ctid
        returning e.id, e.claim_no, e.task, e.attempt, e.max_attempts, e.payload::text as payload,
            date_part('epoch', $1 - e.run_at) as waited, e.priority, e.run_at $sql$;
begin
    perform pg_advisory_xact_lock_shared(@schema@._private_key_k(p_queue));
    perform set_config('synchronous_commit', 'off', true);
    v_now := @schema@._private_clock();
    -- Checked without locking the orchestrator's row (that made claims three times slower): a claim that commits
    -- after its owner was declared dead is found from the executions' side.
    if not exists (select from @schema@._private_orchestrators o
            where o.id = p_owner and o.died_at is null and o.expires_at > v_now and o.server_epoch = @schema@._private_server_epoch()) then
        raise exception using errcode = 'PC003', message = 'the orchestrator is not registered, its lease has ended, or the server was restarted';
    end if;
    select no into v_no from @schema@._private_queues where name = p_queue;
    if v_no is null then
        raise exception using errcode = 'PC001', message = format('queue %s is not registered', quote_literal(p_queue));
    end if;

    -- Not min(): where statistics say that next to nothing is scheduled, the planner may read all that is.
    execute format($sql$ select run_at from @schema@.%I where state in ('scheduled', 'waiting') order by run_at limit 1 $sql$,
        '_private_queue_' || v_no) into v_due;
    if v_due <= v_now then
        perform @schema@._private_promote(p_queue, v_no, v_now, greatest(1000, p_limit));
    end if;
    select run_at into v_due_0 from @schema@._private_queue_0 where queue = p_queue and state in ('scheduled', 'waiting')
    order by run_at limit 1;
    if v_due_0 <= v_now then
        perform @schema@._private_promote(p_queue, 0, v_now, greatest(1000, p_limit));
    end if;

    if exists (select from @schema@._private_queue_0 where queue = p_queue and state = 'ready') then
        -- Some were produced before the queue was registered: pick from both partitions by one order. What is locked
        -- beyond the limit stays ready.
        return query execute format($sql$
            with own as materialized (
                select ctid, 1 as part, priority, run_at, id from @schema@.%1$I where state = 'ready' and task = any ($3)
                order by priority desc, run_at, id limit $4 for update skip locked
            ), overflow as materialized (
                select ctid, 0 as part, priority, run_at, id from @schema@._private_queue_0
                where queue = $5 and state = 'ready' and task = any ($3)
                order by priority desc, run_at, id limit $4 for update skip locked
            ), picked as materialized (
                select ctid, part from (table own union all table overflow) x order by priority desc, run_at, id limit $4
            ), claimed_own as ( $sql$ || format(v_update, '_private_queue_' || v_no, 'p.part = 1 and') || $sql$
            ), claimed_overflow as ( $sql$ || format(v_update, '_private_queue_0', 'p.part = 0 and') || $sql$ )
            select id, claim_no, task, attempt, max_attempts, payload, waited, null::float8
            from (table claimed_own union all table claimed_overflow) x order by priority desc, run_at, id
            $sql$, '_private_queue_' || v_no) using v_now, p_owner, p_tasks, p_limit, p_queue;
        v_found := found;
    else
        return query execute format($sql$
            with picked as materialized (
                select ctid from @schema@.%1$I where state = 'ready' and task = any ($3)
                order by priority desc, run_at, id limit $4 for update skip locked
            ), claimed as ( $sql$ || v_update || $sql$ )
            select id, claim_no, task, attempt, max_attempts, payload, waited, null::float8
            from claimed order by priority desc, run_at, id
            $sql$, '_private_queue_' || v_no, '') using v_now, p_owner, p_tasks, p_limit;
        v_found := found;
    end if;
    if not v_found then
        return query select null::uuid, null::bigint, null::text, null::int, null::int, null::text, null::float8,
            case when least(v_due, v_due_0) is not null then greatest(0, date_part('epoch', least(v_due, v_due_0) - v_now)) end;
    end if;
end $$;

-- The payload of a claimed execution whose payload is large; null if the claim is not this one any more.
create or replace function @schema@.load_payload(p_id uuid, p_claim_no bigint, p_owner uuid) returns text
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_payload text;
begin
    execute format($sql$
        select l.payload::text from @schema@.%I e join @schema@._private_payloads l on l.execution_id = e.id
        where e.id = $1 and e.claim_no = $2 and e.owner = $3 and e.state = 'running'
        $sql$, '_private_queue_' || @schema@._private_queue_no(p_id)) into v_payload using p_id, p_claim_no, p_owner;
    return v_payload;
end $$;
