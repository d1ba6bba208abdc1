-- What a durable execution has done (steps) and waits for (waits), on behalf of a claim; and how a wait is resolved.
--
-- Every write tests the token of the claim while it holds the execution's row (_private_hold_N), so a claim that was revoked
-- writes nothing, and one that writes cannot be revoked before it has committed.
--
-- How no resolution is lost. Whoever resolves a wait holds the waiting execution's row when it writes the wait, and then
-- looks at the row (_private_wake): waiting, it is made ready. The flush that parks the execution holds the row too, and
-- then looks at the waits, in a statement of its own. So one comes after the other, and the second sees what the first wrote.

-- What executions have done and wait for. Only a wait that is open has no outcome. resolved_at: of waits. For queries by
-- execution_id, which it lets through to the indexes of both tables.
create or replace view @schema@._private_records as
    select s.execution_id, s.name, s.kind, s.position, s.claim_no, s.attempt, s.created_at, null::timestamptz as resolved_at,
        null::timestamptz as due_at, coalesce(s.outcome, case when s.error is null then 'completed' else 'failed' end) as outcome,
        s.target, null::text as scope, s.event_id, s.value, s.error
    from @schema@._private_steps s
    union all
    select w.execution_id, w.name, w.kind, w.position, w.claim_no, w.attempt, w.created_at, w.resolved_at, w.due_at, w.outcome,
        w.target, w.scope, w.event_id, w.value, w.error
    from @schema@._private_waits w;

-- All records of an execution, oldest first, as its finished row keeps them; null if there are none.
create or replace function @schema@._private_history(p_id uuid) returns jsonb
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select jsonb_agg(jsonb_strip_nulls(jsonb_build_object('name', x.name, 'kind', x.kind, 'position', x.position, 'claim_no', x.claim_no,
        'attempt', x.attempt, 'created_at', x.created_at, 'resolved_at', x.resolved_at, 'outcome', x.outcome, 'target', x.target,
            'event_id', x.event_id))
        || case when x.value is null then '{}' else jsonb_build_object('value', x.value) end
        || case when x.error is null then '{}' else jsonb_build_object('error', x.error) end order by x.position, x.name)
    from @schema@._private_records x where x.execution_id = p_id
$$;

-- Whether a waiting execution has something to go on with: a plain wait of it was resolved, or all of a scope were, or the
-- first of a scope failed (the others are then waited for together), and it has not been told. By indexes of what is open and
-- what is unseen: a scope may have 10,000 waits.
create or replace function @schema@._private_is_resumable(p_id uuid) returns boolean
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    with recursive scopes as (
        (select w.scope from @schema@._private_waits w
        where w.execution_id = p_id and w.resolved_at is not null and not w.is_seen and w.scope is not null order by w.scope limit 1)
        union all
        select (select w.scope from @schema@._private_waits w
            where w.execution_id = p_id and w.resolved_at is not null and not w.is_seen and w.scope > s.scope order by w.scope limit 1)
        from scopes s where s.scope is not null
    )
    select exists (select from @schema@._private_waits w where w.execution_id = p_id and w.resolved_at is not null and not w.is_seen
            and w.scope is null)
        or exists (select from scopes s where s.scope is not null
            and exists (select from @schema@._private_waits w where w.execution_id = p_id and w.resolved_at is not null and not w.is_seen
                and w.scope = s.scope and w.outcome <> 'completed')
            and not exists (select from @schema@._private_waits w where w.execution_id = p_id and w.is_seen and w.scope = s.scope
                and w.outcome <> 'completed'))
        or exists (select from scopes s where s.scope is not null and not exists (
            select from @schema@._private_waits w where w.execution_id = p_id and w.scope = s.scope and w.resolved_at is null))
$$;

-- Lock executions and their parents, in the order of partition and id, which is the order of all who lock several. Where none
-- has a parent nothing is locked, unless p_always says so: then the caller's own order is enough.
create or replace function @schema@._private_lock_family(p_ids uuid[], p_always boolean default false) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_ids uuid[];
    v_parents uuid[] := '{}';
    v_no int;
begin
    -- A parent never changes, so it may be read before the row is locked. By partition: through the table all would be locked.
    for v_no in
        select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1
    loop
        execute format('select array(select distinct e.parent_id from @schema@.%I e where e.id = any ($1) and e.parent_id is not null)',
            '_private_queue_' || v_no) into v_ids using p_ids;
        v_parents := v_parents || v_ids;
    end loop;
    if v_parents = '{}' and not p_always then
        return;
    end if;
    v_ids := p_ids || v_parents;
    for v_no in
        select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(v_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1
    loop
        execute format('select from @schema@.%I where id = any ($1) order by id for no key update', '_private_queue_' || v_no) using v_ids;
    end loop;
end $$;

-- Lock one execution if nobody else has: false if somebody has. True as well where there is no row.
create or replace function @schema@._private_try_lock(p_id uuid) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    -- The look comes after the try, with a snapshot of its own.
    if @schema@._private_lock_executions(array[p_id], false) <> '{}' then
        return true;
    end if;
    return not @schema@._private_is_live(p_id, null);
end $$;

-- After waits of these executions were resolved, whose rows the caller has locked: make those ready that wait and can go on,
-- tell the owners of those that run (T8). Returns the queues on which something was made ready, to be announced.
create or replace function @schema@._private_wake(p_ids uuid[]) returns text[]
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_no int;
    v_found text[];
    v_queues text[] := '{}';
begin
    for v_no in
        select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1
    loop
        execute format($sql$
            with woken as (
                update @schema@.%1$I e set state = 'ready', run_at = $2
                where e.id = any ($1) and e.state = 'waiting' and @schema@._private_is_resumable(e.id)
                returning e.queue
            )
            select array_agg(distinct queue) from woken
            $sql$, '_private_queue_' || v_no) into v_found using p_ids, v_now;
        v_queues := v_queues || coalesce(v_found, '{}');
        execute format($sql$
            select @schema@._private_notify(@schema@._private_control_channel(o.owner), '')
            from (select distinct owner from @schema@.%1$I e where e.id = any ($1) and e.state = 'running') o
            $sql$, '_private_queue_' || v_no) using p_ids;
        if current_setting('transaction_isolation') <> 'read committed' then
            -- A parking that waits for the lock would look at waits as they were: so that it fails, and is sent again.
            execute format($sql$
                update @schema@.%1$I e set is_durable = true where e.id = any ($1) and e.state = 'running'
                $sql$, '_private_queue_' || v_no) using p_ids;
        end if;
    end loop;
    return v_queues;
end $$;

-- The failures of executions that nothing was begun after: another attempt is to try them again. What failed before something else was begun was dealt with by the handler, and
-- stays. The place of a step that failed is when it failed (durable.py), that of a wait when it was begun: what was begun
-- beside it has a later place, but not a later time.
create or replace function @schema@._private_trailing_failures(p_ids uuid[]) returns table (execution_id uuid, name text)
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select x.execution_id, x.name from (
        select r.execution_id, r.name, r.failed_at, max(case when r.failed_at is null then r.created_at end)
            over (partition by r.execution_id order by r.position desc rows between unbounded preceding and 1 preceding) as later_at
        from (
            select s.execution_id, s.name, s.position, s.created_at,
                case when s.error is not null or s.outcome = 'timed_out' then '-infinity'::timestamptz end as failed_at
            from @schema@._private_steps s where s.execution_id = any (p_ids)
            union all
            select w.execution_id, w.name, w.position, w.created_at,
                case when w.error is not null or w.outcome = 'timed_out' then w.resolved_at end
            from @schema@._private_waits w where w.execution_id = any (p_ids)
        ) r
    ) x where x.failed_at is not null and (x.later_at is null or x.later_at < x.failed_at)
$$;

-- Before another attempt: forget the failures that nothing was begun after. The caller holds the executions' rows.
create or replace function @schema@._private_forget_failures(p_ids uuid[]) returns void
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    with forgotten as materialized (
        select t.execution_id, t.name from @schema@._private_trailing_failures(p_ids) t
    ), steps as (
        delete from @schema@._private_steps s using forgotten f where s.execution_id = f.execution_id and s.name = f.name
    )
    delete from @schema@._private_waits w using forgotten f where w.execution_id = f.execution_id and w.name = f.name
$$;

-- Of these claims those that hold, locked and marked as having a history.
create or replace function @schema@._private_hold(p_owner uuid, p_ids uuid[], p_claim_nos bigint[])
    returns table (id uuid, attempt int, depth int, root_id uuid, deadline_at timestamptz)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_no int;
begin
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);  -- what was acknowledged is not lost
    end if;
    for v_no in
        select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1
    loop
        return query execute format('select * from @schema@.%I($1, $2, $3)', '_private_hold_' || v_no) using p_owner, p_ids, p_claim_nos;
    end loop;
end $$;

-- What an execution has done and waits for, as its claim is to find it; waits that are due are resolved by this (T9: elapsed,
-- timed_out), and all that are resolved count as seen. First a row with kind "claim" if the claim holds: no row at all
-- says that it does not. due_in: seconds until an open wait is due, null for none. Locks: the execution's row.
create or replace function @schema@.load_history(p_owner uuid, p_id uuid, p_claim_no bigint)
    returns table (name text, kind text, "position" int, attempt int, outcome text, target text, scope text, value text, error text,
        due_in double precision)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
begin
    if not exists (select from @schema@._private_hold(p_owner, array[p_id], array[p_claim_no])) then
        return;
    end if;
    v_now := @schema@._private_clock();
    perform @schema@._private_receive_due(array[p_id], v_now);
    perform @schema@._private_settle(array[p_id], v_now);
    return query
    select ''::text, 'claim'::text, -1, null::int, null::text, null::text, null::text, null::text, null::text, null::float8
    union all
    select x.name, x.kind, x.position, x.attempt, x.outcome, x.target, x.scope, x.value::text, x.error::text,
        case when x.resolved_at is null then date_part('epoch', x.due_at - v_now) end
    from @schema@._private_records x where x.execution_id = p_id
    order by 3, 1;
end $$;

-- Resolve the waits of executions that are due, and count all resolved ones as seen; returns those that were not. The caller holds
-- the executions' rows.
create or replace function @schema@._private_settle(p_ids uuid[], p_now timestamptz)
    returns table (execution_id uuid, name text, outcome text, value text, error text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
begin
    return query
    with due as (
        update @schema@._private_waits w set resolved_at = p_now, is_seen = true,
            outcome = case when w.kind = 'sleep' then 'elapsed' else 'timed_out' end
        where w.execution_id = any (p_ids) and w.resolved_at is null and w.due_at <= p_now
        returning w.execution_id, w.name, w.outcome, w.value, w.error
    ), told as (
        update @schema@._private_waits w set is_seen = true where w.execution_id = any (p_ids) and w.resolved_at is not null and not w.is_seen
        returning w.execution_id, w.name, w.outcome, w.value, w.error
    )
    select x.execution_id, x.name, x.outcome, x.value::text, x.error::text from (table due union all table told) x;
end $$;

-- Which waits of running executions are resolved that their handlers have not been told of; resolves those that are due. For
-- who runs them. Waits are returned once by this or by load_history, so an answer that is lost has to be asked for by loading
-- the history. Locks: the executions' rows.
create or replace function @schema@.read_waits(p_owner uuid, p_ids uuid[], p_claim_nos bigint[])
    returns table (execution_id uuid, name text, outcome text, value text, error text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_held uuid[];
begin
    v_held := array(select h.id from @schema@._private_hold(p_owner, p_ids, p_claim_nos) h);
    v_now := @schema@._private_clock();
    perform @schema@._private_receive_due(v_held, v_now);
    return query select * from @schema@._private_settle(v_held, v_now);
end $$;

-- Record steps of running executions, arrays of one length. Returns a row per position: "saved" now; "stored": there was a
-- record of that name (an earlier call whose reply was lost), which stays; "fenced": the claim is revoked,
-- and nothing was written. value, error: as stored (error of a "stored" one only). What a replay will be told may be
-- another text than was sent: jsonb has an order of keys of its own, no -0.0, and no 1e22 but its digits. p_values null: it failed, with p_errors. Commits durably. Locks: the executions' rows.
create or replace function @schema@.save_steps(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_names text[], p_kinds text[], p_positions int[], p_values jsonb[], p_errors jsonb[]
) returns table (n int, status text, value text, error text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_held uuid[];
    v_attempts int[];
begin
    select coalesce(array_agg(h.id), '{}'), coalesce(array_agg(h.attempt), '{}') into v_held, v_attempts
    from @schema@._private_hold(p_owner, p_ids, p_claim_nos) h;
    v_now := @schema@._private_clock();
    return query
    with o as materialized (
        select o.n::int as n, o.id, o.claim_no, o.name, o.kind, o.position, o.value, o.error, h.attempt
        from unnest(p_ids, p_claim_nos, p_names, p_kinds, p_positions, p_values, p_errors) with ordinality
                as o (id, claim_no, name, kind, position, value, error, n)
            left join unnest(v_held, v_attempts) as h (id, attempt) on h.id = o.id
    ), saved as (
        insert into @schema@._private_steps (execution_id, name, kind, position, claim_no, attempt, created_at, value, error)
        select o.id, o.name, o.kind, o.position, o.claim_no, o.attempt, v_now, o.value, o.error from o where o.attempt is not null
        order by o.id, o.name
        on conflict do nothing
        returning execution_id, name, value
    )
    select o.n, case when o.attempt is null then 'fenced' when s.name is not null then 'saved' else 'stored' end,
        case when o.attempt is not null then coalesce(s.value, x.value)::text end,
        case when o.attempt is not null and s.name is null then x.error::text end
    from o left join saved s on s.execution_id = o.id and s.name = o.name
        left join lateral (select x.value, x.error from @schema@._private_steps x
            where s.name is null and x.execution_id = o.id and x.name = o.name offset 0) x on true
    order by o.n;
end $$;

-- Begin waits of running executions: what each waits for is recorded, and a child made, in one transaction. Arrays of one
-- length; p_waits: objects with name, kind (sleep, child, or one of 16_events.sql), position; scope; due_at (an instant) or due_in
-- (seconds); target; of an event match; of a child on_close and child: {task, payload, queue, priority, run_at, delay, timeout, deadline_at,
-- deadline_in, max_attempts, tags, backoff}. A child's deadline is at most its parent's.
-- Returns a row per position: "open" (whether begun now or before), "resolved" with outcome, value and error, "fenced", or
-- "too_deep" (a child of the depth 16). due_in, target: of an open wait. Commits durably. Locks: the names of events, shared,
-- then the executions' rows.
create or replace function @schema@.start_waits(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_waits jsonb[])
    returns table (n int, status text, outcome text, value text, error text, due_in double precision, target text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_now timestamptz;
    v_held uuid[];
    v_attempts int[];
    v_depths int[];
    v_roots uuid[];
    v_deadlines timestamptz[];
    v_published int;
    v_me constant oid := quote_ident(session_user)::regrole;
begin
    -- Before the rows: who delivers has the locks of names first, too.
    perform pg_advisory_xact_lock_shared(x.k) from (
        select distinct @schema@._private_key_e(w.wait ->> 'kind', w.wait ->> 'target', case when w.wait ->> 'kind' = 'message' then w.id end) as k
        from unnest(p_ids, p_waits) as w (id, wait) where w.wait ->> 'kind' in ('event', 'message', 'promise') order by 1) x;
    select array_agg(h.id), array_agg(h.attempt), array_agg(h.depth), array_agg(h.root_id), array_agg(h.deadline_at)
    into v_held, v_attempts, v_depths, v_roots, v_deadlines
    from @schema@._private_hold(p_owner, p_ids, p_claim_nos) h;
    v_now := @schema@._private_clock();
    -- First a look at the queues, then word of tables: see invoke_many.
    v_published := coalesce((select max(q.published) from @schema@._private_queues q), 0);
    perform pg_get_constraintdef(0);
    with o as materialized (
        select o.n, o.id, o.claim_no, h.attempt, h.depth, coalesce(h.root_id, o.id) as root_id, h.deadline_at as parent_deadline,
            w.name, w.kind, w.position, w.scope, w.target, w.match, w.on_close,
            case when w.due_in is null then w.due_at else v_now + make_interval(secs => w.due_in) end as due_at, c.*,
            coalesce(q.no, 0) as queue_no, r.queue as to_queue,
            case when w.kind = 'child' then @schema@._private_new_id(coalesce(q.no, 0), v_now) end as child_id,
            coalesce(c.run_at, v_now + make_interval(secs => c.delay), v_now) as child_run_at,
            least(h.deadline_at, c.deadline_at, v_now + make_interval(secs => c.deadline_in)) as child_deadline
        from unnest(p_ids, p_claim_nos, p_waits) with ordinality as o (id, claim_no, wait, n)
            join unnest(v_held, v_attempts, v_depths, v_roots, v_deadlines) as h (id, attempt, depth, root_id, deadline_at) on h.id = o.id
            cross join lateral jsonb_to_record(o.wait) as w (name text, kind text, position int, scope text, due_at timestamptz,
                due_in double precision, target text, match jsonb, on_close text, child jsonb)
            cross join lateral jsonb_to_record(coalesce(w.child, '{}')) as c (task text, payload jsonb, queue text, priority int,
                run_at timestamptz, delay double precision, timeout double precision, deadline_at timestamptz, deadline_in double precision,
                max_attempts int, tags text[], backoff jsonb, version text)
            left join @schema@._private_tasks t on c.queue is null and t.name = c.task
            cross join lateral (select coalesce(c.queue, t.queue, 'default') as queue) r
            left join @schema@._private_queues q on q.name = r.queue and q.published <= v_published
        where (w.kind <> 'child' or h.depth < 16)
            -- One look for each, by the key: offset 0 keeps the planner from reading all waits there are.
            and not exists (select from @schema@._private_waits x where x.execution_id = o.id and x.name = w.name offset 0)
    ), begun as (
        insert into @schema@._private_waits (execution_id, name, kind, position, claim_no, attempt, scope, target, match, due_at, on_close,
            created_at, resolved_at, outcome, is_seen)
        select o.id, o.name, o.kind, o.position, o.claim_no, o.attempt, o.scope, coalesce(o.child_id::text, o.target), o.match, o.due_at, o.on_close, v_now,
            case when o.kind = 'sleep' and o.due_at <= v_now then v_now end,
            case when o.kind = 'sleep' and o.due_at <= v_now then 'elapsed' end, o.kind = 'sleep' and o.due_at <= v_now
        from o order by o.id, o.name
    ), children as (
        insert into @schema@._private_executions (queue_no, id, queue, task, state, priority, run_at, created_at, created_by, payload,
            max_attempts, timeout, deadline_at, tags, backoff, version, parent_id, root_id, wait_name, depth)
        select o.queue_no, o.child_id, o.to_queue, o.task,
            (case when o.child_run_at <= v_now then 'ready' else 'scheduled' end)::@schema@.execution_state, coalesce(o.priority, 0),
            o.child_run_at, v_now, v_me, case when not @schema@._private_is_large(o.payload) then o.payload end,
            o.max_attempts, make_interval(secs => o.timeout), o.child_deadline, o.tags, o.backoff, o.version, o.id, o.root_id, o.name,
            o.depth + 1
        from o where o.kind = 'child' order by o.n
    )
    insert into @schema@._private_payloads (execution_id, payload)
    select o.child_id, o.payload from o where o.kind = 'child' and @schema@._private_is_large(o.payload);
    -- What is there already, in a new statement (16_events.sql).
    perform @schema@._private_receive(array_agg(o.id), array_agg(o.wait ->> 'name'), null, true)
    from unnest(p_ids, p_waits) as o (id, wait)
    where o.id = any (v_held) and o.wait ->> 'kind' in ('event', 'message', 'promise') having count(*) > 0;
    return query
    select o.n::int, case when h.id is null then 'fenced' when w.name is null then 'too_deep' when w.resolved_at is null then 'open' else 'resolved' end,
        w.outcome, w.value::text, w.error::text, date_part('epoch', w.due_at - v_now), w.target
    from unnest(p_ids, p_waits) with ordinality as o (id, wait, n)
        left join unnest(v_held) as h (id) on h.id = o.id
        left join lateral (select w.* from @schema@._private_waits w
            where w.execution_id = h.id and w.name = o.wait ->> 'name' offset 0) w on true
    order by o.n;
end $$;

-- Ask for the end of children of a running execution that it waits for, by the names of the waits. They are noted; to cancel them
-- is close_children's. Returns how many. Locks: the execution's row.
create or replace function @schema@.request_close(p_owner uuid, p_id uuid, p_claim_no bigint, p_names text[], p_reason text) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_count bigint;
begin
    insert into @schema@._private_closings (execution_id, reason, created_at)
    select w.target::uuid, p_reason, @schema@._private_clock()
    from @schema@._private_hold(p_owner, array[p_id], array[p_claim_no]) h join @schema@._private_waits w on w.execution_id = h.id
    where w.name = any (p_names) and w.kind = 'child' and w.resolved_at is null
    on conflict do nothing;
    get diagnostics v_count = row_count;
    return v_count;
end $$;

-- Cancel children whose parent has ended or asked for it, at most p_limit. Each ends at once, or its owner is told, as by cancel;
-- its own children follow when it has ended. Returns how many it dealt with: call again until that is 0. Those that somebody
-- has locked for a second, with their parents, are left for later, and keep nobody else waiting. Locks: as cancel, after its
-- rows of the closings, of which it passes over those that another call deals with.
create or replace function @schema@.close_children(p_limit int default 1000) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
    set lock_timeout = '1s'
as $$
declare
    v_closing record;
    v_ids uuid[];
    v_count bigint := 0;
begin
    v_ids := array(select c.execution_id from (
        select c.execution_id from @schema@._private_closings c order by c.execution_id limit p_limit for update skip locked) c);
    begin
        -- The rows of all in one order, before those of each reason.
        perform @schema@._private_lock_family(v_ids);
    exception when lock_not_available then
        v_ids := array(
            select i from unnest(v_ids) as i
                left join @schema@._private_executions e on e.queue_no = @schema@._private_queue_no(i) and e.id = i
            where @schema@._private_try_lock(i) and (e.parent_id is null or @schema@._private_try_lock(e.parent_id)));
    end;
    for v_closing in
        select c.reason, array_agg(c.execution_id) as ids from @schema@._private_closings c where c.execution_id = any (v_ids)
        group by c.reason order by c.reason
    loop
        perform @schema@._private_cancel(v_closing.ids, v_closing.reason);
        delete from @schema@._private_closings c where c.execution_id = any (v_closing.ids);
        v_count := v_count + cardinality(v_closing.ids);
    end loop;
    return v_count;
end $$;
