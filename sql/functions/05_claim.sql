-- pending → running.

-- Make due scheduled executions of a queue ready, at most p_limit of them (T2's first half), and waiting ones of which a
-- wait is due (T9): which one, their next owner finds out (load_history). They are promoted before a claim, so that priorities hold between them and those that were ready. Locks: rows, skipping those another holds.
create or replace function @schema@._private_promote(p_queue text, p_queue_no int, p_now timestamptz, p_limit int) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_count bigint;
begin
    execute format($sql$
        with due as materialized (
            select ctid from @schema@.%1$I
            where state in ('scheduled', 'waiting') and run_at <= $1 %2$s
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

-- Refuse with PC003 an orchestrator that is dead, expired, or of before a restart of the server. Its row is not locked
-- (that made claims three times slower): a claim that commits after its owner was declared dead is found from the
-- executions' side.
create or replace function @schema@._private_require_alive(p_owner uuid, p_now timestamptz) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from @schema@._private_orchestrators o
            where o.id = p_owner and o.died_at is null and o.expires_at > p_now
                and o.server_epoch = @schema@._private_server_epoch()) then
        raise exception using errcode = 'PC003',
            message = 'the orchestrator is not registered, its lease has ended, or the server was restarted';
    end if;
end $$;

-- The place that the workers of one kind, and of one queue, have come to in the order of what is ready: claims go on behind it, see
-- 09_partitions.sql. Kept in sequences, since what is set there others see at once, not when the claim commits. It is a
-- hint: what it is wrong about costs time, or the order of some rows, until the next look from the front. p_key: of the
-- queue, the priority and the tasks; where two share a place by chance, each finds the other's key, and no place.

create or replace function @schema@._private_place(p_key bigint, p_part text) returns regclass
    language sql stable strict
    return pg_catalog.format('%I._private_place_%s_%s', @schema_literal@, p_key & 7, p_part)::pg_catalog.regclass;

-- look_at: when somebody is to look from the front again. All null: there is no place.
create or replace function @schema@._private_read_place(p_key bigint, p_like uuid, out run_at timestamptz, out id uuid, out look_at timestamptz)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_digits constant text := lpad(to_hex(pg_sequence_last_value(@schema@._private_place(p_key, 'id'))), 15, '0');
    v_like constant text := replace(p_like::text, '-', '');
begin
    if pg_sequence_last_value(@schema@._private_place(p_key, 'key')) = p_key then
        run_at := timestamptz 'epoch' + interval '1 us' * pg_sequence_last_value(@schema@._private_place(p_key, 'run_at'));
        look_at := timestamptz 'epoch' + interval '1 us' * pg_sequence_last_value(@schema@._private_place(p_key, 'look_at'));
        -- The queue's number, in between, is that of any id of the partition.
        id := ('0' || left(v_digits, 11) || substr(v_like, 13, 4) || substr(v_digits, 12, 2) || substr(v_like, 19, 2)
            || right(v_digits, 2) || '0000000000')::uuid;
    end if;
end $$;

create or replace function @schema@._private_note_look(p_key bigint, p_look_at timestamptz) returns bigint
    language sql volatile
    return pg_catalog.setval(@schema@._private_place(p_key, 'look_at'), (extract(epoch from p_look_at) * 1000000)::bigint);

-- An id is told by its time and the first 14 random bits: the place is that much before it.
create or replace function @schema@._private_note_place(p_key bigint, p_run_at timestamptz, p_id uuid) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_digits constant text := replace(p_id::text, '-', '');
begin
    if p_run_at between timestamptz 'epoch' and timestamptz '3000-01-01 00:00:00+00' then
        perform setval(@schema@._private_place(p_key, 'key'), p_key);
        perform setval(@schema@._private_place(p_key, 'run_at'), greatest(1, (extract(epoch from p_run_at) * 1000000)::bigint));
        perform setval(@schema@._private_place(p_key, 'id'), greatest(1, ('x0' || substr(v_digits, 2, 11) || substr(v_digits, 17, 2)
            || substr(v_digits, 21, 2))::bit(64)::bigint));
    end if;
end $$;

-- Claim up to p_limit due executions of a queue, of the given tasks only, highest priority first, for one live
-- orchestrator (T2).
--
-- Versions: p_versions goes with p_tasks, one for each, null for a task without; a task with several versions is there
-- several times, the current one first. An execution with a version is claimed only by who has it; one without
-- gets the current one, if there is one, and keeps it. Without p_versions (programs that know of none) none with a
-- version is claimed.
--
-- Returns a row per execution (payload null: large, fetch it with load_payload), or, when there was nothing to claim,
-- a single row with id null and due_in: seconds until the next one is due, null if none is; 0.01 at most if there are
-- ready ones that another claim in flight has locked. `waited`: seconds it has been due. `timeout`: seconds for this
-- attempt; `deadline_in`: seconds left to the execution, which may be negative; `backoff`: instead of the task's; `parent_id`:
-- of a child; null for none. `version`: which one to run. Executions on their last
-- life (two crashes) are left to claim_suspect. Holds the queue's K until it commits: what it locks is hidden from other
-- claimers and would be seen by nobody if it died. Commits asynchronously: a claim that a server crash forgets is harmless, since its token then
-- fits nothing (an orchestrator takes a new id after a restart). The work is done by the partition's own function
-- (09_partitions.sql).
create or replace function @schema@.claim(p_queue text, p_owner uuid, p_tasks text[], p_limit int, p_versions text[] default null)
    returns table (
        id uuid, claim_no bigint, task text, attempt int, max_attempts int, payload text, waited double precision,
        timeout double precision, deadline_in double precision, backoff text, due_in double precision, parent_id uuid, version text
    )
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_no int;
begin
    select q.no into v_no from @schema@._private_queues q where q.name = p_queue;
    if v_no is null then
        raise exception using errcode = 'PC001', message = format('queue %s is not registered', quote_literal(p_queue));
    end if;
    return query execute format('select * from @schema@.%I($1, $2, $3, $4, $5)', '_private_claim_' || v_no)
        using p_queue, p_owner, p_tasks, p_limit, p_versions;
end $$;

-- Claim one execution that has brought down two claims, if one is ready: its last life. Its process lets nothing else
-- begin beside it, so that the third crash is charged to it alone. Returns at most one row, as claim does.
create or replace function @schema@.claim_suspect(p_queue text, p_owner uuid, p_tasks text[], p_versions text[] default null)
    returns table (
        id uuid, claim_no bigint, task text, attempt int, max_attempts int, payload text, waited double precision,
        timeout double precision, deadline_in double precision, backoff text, due_in double precision, parent_id uuid, version text
    )
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_no int;
    v_claimed int;
    v_keys constant text[] := array(select t.task || '@' || t.version from unnest(p_tasks, p_versions) as t (task, version)
        where t.version is not null);
begin
    perform pg_advisory_xact_lock_shared(@schema@._private_key_k(p_queue));
    v_now := @schema@._private_clock();
    perform @schema@._private_require_alive(p_owner, v_now);
    for v_no in select q.no from @schema@._private_queues q where q.name = p_queue union all select 0 loop
        return query execute format($sql$
            with picked as materialized (
                select ctid from @schema@.%1$I
                where state = 'ready' and crashes >= 2 and queue = $1 and task = any ($2)
                    and (version is null or task || '@' || version = any ($5))
                order by priority desc, run_at, id limit 1 for update skip locked
            )
            update @schema@.%1$I e set state = 'running', owner = $3, claim_no = e.claim_no + 1, attempt = e.attempt + 1,
                claimed_at = $4, version = coalesce(e.version, $6[array_position($2, e.task)])
            from picked p where e.ctid = p.ctid
            returning e.id, e.claim_no, e.task, e.attempt, e.max_attempts, e.payload::text, date_part('epoch', $4 - e.run_at),
                date_part('epoch', e.timeout), date_part('epoch', e.deadline_at - $4), e.backoff::text, null::float8, e.parent_id, e.version
            $sql$, '_private_queue_' || v_no) using p_queue, p_tasks, p_owner, v_now, v_keys, p_versions;
        get diagnostics v_claimed = row_count;
        exit when v_claimed > 0;
    end loop;
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
