-- The audit of a test schema (see audit.py): what every live and finished row went through, a guard that refuses every
-- transition the state machine does not have, and the check that reads both. Never part of a shipped schema.
--
-- The trigger functions are SECURITY DEFINER, so that a producer's insert is written down whatever the producer may do.

-- One row per change of a row. Which columns of state are null tells what happened: null → live: inserted;
-- live → live: updated; live → null: deleted; null → finished: kept; finished → null: forgotten or opened again. An
-- end is a deletion and, unless it is not kept, an insertion of the same transaction (txid). TRUNCATE writes nothing.
-- seq orders the rows of one execution: it is drawn while the row is locked. No index: the check sorts.
create table if not exists @schema@._test_audit (
    seq bigint generated always as identity,
    execution uuid not null,
    from_state text,
    to_state text,
    claim_no bigint not null,
    owner uuid,                 -- the claim's owner: of → running the new one, of running → the one that had it
    outcome text,               -- how a claim ended; cancel_requested, handed_over (another owner, the same claim)
    attempt int not null,
    crashes int not null,
    generation int not null,
    txid bigint not null,
    at timestamptz not null,    -- of the server's clock, whatever a test does to the schema's
    key text                    -- of an inserted one with a dedupe key
);

-- One row per change of a record: of a step (which is written once), or of a wait, which is begun, resolved and told. `change`:
-- saved (a step), begun (a wait), resolved, told, dropped. seq is drawn from the same sequence as that of the executions' rows,
-- while the execution's row is locked, so that both are in one order.
create table if not exists @schema@._test_records (
    seq bigint not null,
    execution uuid not null,
    name text not null,
    kind text not null,
    change text not null,
    claim_no bigint not null,   -- that recorded it
    attempt int not null,
    outcome text,
    target text,
    is_failure boolean not null,
    digest text not null,       -- of value and error
    txid bigint not null,
    at timestamptz not null
);

create or replace function @schema@._test_write_record() returns trigger
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_row jsonb := to_jsonb(case when tg_op = 'DELETE' then old else new end);
    v_old jsonb := case when tg_op = 'UPDATE' then to_jsonb(old) end;
    v_change text := case tg_op when 'DELETE' then 'dropped' when 'INSERT' then tg_argv[0]
        else case when v_old -> 'resolved_at' = 'null' and v_row -> 'resolved_at' <> 'null' then 'resolved'
            when v_old -> 'is_seen' is distinct from v_row -> 'is_seen' then 'told' else 'touched' end end;
begin
    insert into @schema@._test_records (seq, execution, name, kind, change, claim_no, attempt, outcome, target, is_failure, digest, txid, at)
    values (nextval(format('%I._test_audit_seq_seq', tg_table_schema)::regclass), (v_row ->> 'execution_id')::uuid, v_row ->> 'name',
        v_row ->> 'kind', v_change, (v_row ->> 'claim_no')::bigint, (v_row ->> 'attempt')::int, v_row ->> 'outcome', v_row ->> 'target',
        v_row -> 'error' <> 'null' or coalesce(v_row ->> 'outcome', '') = 'timed_out',
        md5(concat_ws('/', v_row ->> 'value', v_row ->> 'error')), txid_current(), clock_timestamp());
    return null;
end $$;

create or replace function @schema@._test_write_live() returns trigger
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'INSERT' then
        insert into @schema@._test_audit (execution, to_state, claim_no, owner, attempt, crashes, generation, txid, at, key)
        values (new.id, new.state::text, new.claim_no, new.owner, new.attempt, new.crashes, new.generation, txid_current(),
            clock_timestamp(), new.dedupe_key);
    elsif tg_op = 'DELETE' then
        insert into @schema@._test_audit (execution, from_state, claim_no, owner, attempt, crashes, generation, txid, at)
        values (old.id, old.state::text, old.claim_no, old.owner, old.attempt, old.crashes, old.generation, txid_current(),
            clock_timestamp());
    else
        insert into @schema@._test_audit (execution, from_state, to_state, claim_no, owner, outcome, attempt, crashes, generation, txid, at)
        values (new.id, old.state::text, new.state::text, new.claim_no, coalesce(new.owner, old.owner),
            case
                when old.state = 'running' and new.state = 'running' then
                    case when new.owner <> old.owner then 'handed_over'
                        when new.cancel_requested_at is distinct from old.cancel_requested_at then 'cancel_requested' end
                when old.state = 'running' then new.outcome
            end,
            new.attempt, new.crashes, new.generation, txid_current(), clock_timestamp());
    end if;
    return null;
end $$;

create or replace function @schema@._test_write_finished() returns trigger
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    if tg_op = 'INSERT' then
        insert into @schema@._test_audit (execution, to_state, claim_no, owner, attempt, crashes, generation, txid, at)
        values (new.id, new.state::text, new.claim_no, new.owner, new.attempt, new.crashes, new.generation, txid_current(),
            clock_timestamp());
    else
        insert into @schema@._test_audit (execution, from_state, claim_no, owner, attempt, crashes, generation, txid, at)
        values (old.id, old.state::text, old.claim_no, old.owner, old.attempt, old.crashes, old.generation, txid_current(),
            clock_timestamp());
    end if;
    return null;
end $$;

-- Refuses (PC099) what no verb may do to a live row. What it cannot see, an end, is left to the check.
create or replace function @schema@._test_guard_live() returns trigger
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_is_kept constant boolean := (new.claim_no, new.attempt, new.crashes, new.outcome, new.outcome_claim)
        is not distinct from (old.claim_no, old.attempt, old.crashes, old.outcome, old.outcome_claim);
    v_stack text;
    v_fault text;
begin
    if (new.id, new.queue_no, new.queue, new.task, new.dedupe_key, new.created_at, new.generation)
            is distinct from (old.id, old.queue_no, old.queue, old.task, old.dedupe_key, old.created_at, old.generation) then
        v_fault := 'changes what an execution keeps for life';
    elsif new.claim_no < old.claim_no then
        v_fault := format('claim_no goes back from %s to %s', old.claim_no, new.claim_no);
    elsif old.state = 'running' and new.state = 'running' then
        if not v_is_kept then
            v_fault := 'a running row is claimed or counted anew';
        elsif new.owner <> old.owner then
            get diagnostics v_stack = pg_context;
            if v_stack !~ '\msucceed_orchestrator\M' then
                v_fault := 'another owner for a running row';
            end if;
        end if;
    elsif old.state = new.state then
        if not v_is_kept then
            v_fault := 'counted without a transition';
        end if;
    elsif old.state in ('scheduled', 'waiting') and new.state = 'ready' then
        if not v_is_kept then
            v_fault := 'counted while it became due';
        end if;
    elsif old.state = 'ready' and new.state = 'running' then
        if new.claim_no <> old.claim_no + 1 or new.attempt <> old.attempt + 1 or new.crashes <> old.crashes then
            v_fault := 'a claim that does not count claim_no and attempt on by one';
        elsif old.cancel_requested_at is not null then
            v_fault := 'a cancelled one is claimed';
        elsif old.crashes >= 3 then
            v_fault := 'claimed after its third crash';
        end if;
    elsif old.state = 'running' and new.state in ('scheduled', 'ready', 'waiting') then
        if new.claim_no <> old.claim_no or new.outcome_claim is distinct from new.claim_no then
            v_fault := 'a claim ends without its record';
        elsif old.cancel_requested_at is not null then
            v_fault := 'given back although its cancellation was requested';
        elsif (new.state = 'waiting') <> (new.outcome = 'waiting') then
            v_fault := format('outcome %s, and then %s', new.outcome, new.state);
        elsif new.outcome = 'waiting' and not new.is_durable then
            v_fault := 'it waits, and has no record of it';
        elsif new.outcome = 'recovered' and (new.attempt <> old.attempt - 1 or new.crashes <> old.crashes + 1) then
            v_fault := 'a crash charges crashes, and not attempt';
        elsif new.outcome = 'recovered' and new.crashes >= 3 then
            v_fault := 'given back after its third crash';
        elsif new.outcome <> 'recovered' and new.crashes <> old.crashes then
            v_fault := format('outcome %s charges a crash', new.outcome);
        elsif new.outcome = 'retried' and new.attempt <> old.attempt then
            v_fault := 'a retry gives the attempt back';
        elsif new.outcome in ('released', 'waiting') and new.attempt <> old.attempt - 1 then
            v_fault := format('outcome %s does not give the attempt back', new.outcome);
        end if;
    else
        v_fault := 'no such transition';
    end if;
    if v_fault is not null then
        raise exception using errcode = 'PC099', message = format(
            'forbidden transition of %s: %s (%s -> %s, claim_no %s -> %s, attempt %s -> %s, crashes %s -> %s, outcome %s -> %s)',
            old.id, v_fault, old.state, new.state, old.claim_no, new.claim_no, old.attempt, new.attempt, old.crashes, new.crashes,
            old.outcome, new.outcome);
    end if;
    return new;
end $$;

create or replace function @schema@._test_guard_finished() returns trigger
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using errcode = 'PC099', message = format('forbidden transition of %s: a finished row is changed', old.id);
end $$;

-- A step is written once. A wait is resolved once, with an outcome, and told after that; nothing else of it changes. Only while
-- its execution waits may it count as not told again, and a wait of a nursery's become a scope of its own: the handler was
-- interrupted before it could go on.
create or replace function @schema@._test_guard_record() returns trigger
    language plpgsql volatile security definer
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_old jsonb := to_jsonb(old);
    v_new jsonb := to_jsonb(new);
    v_fault text;
begin
    if tg_argv[0] = 'begun' and exists (select from @schema@._private_executions e
            where e.queue_no = @schema@._private_queue_no((v_old ->> 'execution_id')::uuid) and e.id = (v_old ->> 'execution_id')::uuid
                and e.state = 'waiting') then
        if v_new ->> 'scope' = v_new ->> 'name' then
            v_old := v_old || jsonb_build_object('scope', v_new -> 'scope');
        end if;
        if v_old - 'is_seen' = v_new - 'is_seen' then
            return new;
        end if;
    end if;
    if tg_argv[0] = 'saved' then
        v_fault := 'a step is changed';
    elsif v_old - '{resolved_at,outcome,value,error,is_seen,event_id}'::text[]
            <> v_new - '{resolved_at,outcome,value,error,is_seen,event_id}'::text[] then
        v_fault := 'changes what a wait keeps for life';
    elsif v_old -> 'resolved_at' <> 'null' and v_old - 'is_seen' <> v_new - 'is_seen' then
        v_fault := format('resolved as %s, and changed', v_old ->> 'outcome');
    elsif v_old = v_new then
        v_fault := 'changed into what it was';
    elsif v_new -> 'resolved_at' = 'null' then
        v_fault := 'changed, and not resolved';
    elsif v_old -> 'is_seen' = 'true' and v_new -> 'is_seen' = 'false' then
        v_fault := 'told, and then not told';
    end if;
    if v_fault is not null then
        raise exception using errcode = 'PC099', message = format('forbidden transition of %s: %s (%s %L)', v_old ->> 'execution_id', v_fault,
            v_old ->> 'kind', v_old ->> 'name');
    end if;
    return new;
end $$;

create or replace trigger _test_guard before update on @schema@._private_steps
    for each row execute function @schema@._test_guard_record('saved');
create or replace trigger _test_guard before update on @schema@._private_waits
    for each row execute function @schema@._test_guard_record('begun');
create or replace trigger _test_write after insert or update or delete on @schema@._private_steps
    for each row execute function @schema@._test_write_record('saved');
create or replace trigger _test_write after insert or update or delete on @schema@._private_waits
    for each row execute function @schema@._test_write_record('begun');

-- Row triggers on the parents: partitions that are there get them, and those that are attached later.
create or replace trigger _test_guard before update on @schema@._private_executions
    for each row execute function @schema@._test_guard_live();
create or replace trigger _test_guard before update on @schema@._private_finished
    for each row execute function @schema@._test_guard_finished();
create or replace trigger _test_write after insert or update or delete on @schema@._private_executions
    for each row execute function @schema@._test_write_live();
create or replace trigger _test_write after insert or delete on @schema@._private_finished
    for each row execute function @schema@._test_write_finished();

-- The violations of the invariants, at most p_limit of each kind. p_owner_bound: seconds a running row may have an owner
-- who is dead or unknown; null: not looked at. p_settled: nothing due may be left.
create or replace function @schema@._test_check(
    p_acknowledged uuid[], p_acknowledged_keys text[], p_owner_bound double precision, p_settled boolean, p_limit int
) returns table (rule text, execution uuid, words text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := @schema@._private_clock();
begin
    return query
    -- The history of the live rows: what each change found, against what the one before it left.
    with h as materialized (
        select a.*, lag(a.to_state) over w as left_state, lag(a.claim_no) over w as left_claim, lag(a.owner) over w as left_owner,
            lag(a.generation) over w as left_generation, lag(a.seq) over w as left_seq, lead(a.seq) over w is null as is_last
        from @schema@._test_audit a
        where coalesce(a.from_state, a.to_state) in ('scheduled', 'ready', 'running', 'waiting')
        window w as (partition by a.execution order by a.seq)
    ), ended as materialized (
        select a.* from @schema@._test_audit a where a.to_state in ('completed', 'failed', 'cancelled')
    ), r as materialized (
        -- The records, with the last change of the execution before each (what was so while its row was locked), and what was
        -- recorded under the name before.
        select r.*, x.to_state as then_state, x.from_state as then_from, x.claim_no as then_claim, x.attempt as then_attempt,
            x.generation as generation, x.txid as then_txid,
            lag(r.change) over w as left_change, lag(r.digest) over w as left_digest, lag(r.is_failure) over w as left_failure
        from (
            select m.*, max(m.seq) filter (where m.is_change) over (partition by m.execution order by m.seq) as then_seq
            from (
                select a.execution, a.seq, true as is_change, null::@schema@._test_records as record from h a
                union all
                select s.execution, s.seq, false, s from @schema@._test_records s
            ) m
        ) m
            cross join lateral (select (m.record).*) r
            left join h x on x.seq = m.then_seq and x.execution = m.execution
        where not m.is_change
        window w as (partition by r.execution, r.name order by r.seq)
    ), acknowledged as materialized (
        select distinct u.id from unnest(p_acknowledged) as u (id)
    ), acknowledged_key as materialized (
        select distinct u.key from unnest(p_acknowledged_keys) as u (key)
    ), found (rule, execution, words) as (
        select 'I1', k.id, 'acknowledged, and neither here nor ended'
        from acknowledged k
        where not exists (select from @schema@._private_executions e where e.id = k.id)
            and not exists (select from @schema@._private_finished f where f.id = k.id)
            and not exists (select from h where h.execution = k.id and h.to_state is null)
        union all
        select 'I1', null::uuid, format('key %L was acknowledged, and no execution with it was ever inserted', k.key)
        from acknowledged_key k
        where not exists (select from h where h.key = k.key)
        union all
        select 'I1', h.execution, format('last seen %s, and gone without an end', h.to_state)
        from h
        where h.is_last and h.to_state is not null
            and not exists (select from @schema@._private_executions e where e.id = h.execution)
        union all
        select 'history', e.id, format('is %s by claim %s, but was last seen %s', e.state, e.claim_no,
            coalesce(h.to_state || ' by claim ' || h.claim_no, 'never'))
        from @schema@._private_executions e left join h on h.execution = e.id and h.is_last
        where (h.to_state, h.claim_no) is distinct from (e.state::text, e.claim_no)
        union all
        select 'history', h.execution, format('seq %s: %s found, %s left by seq %s', h.seq, h.from_state, h.left_state, h.left_seq)
        from h
        where h.left_seq is not null and h.from_state is not null and h.left_state is not null and h.from_state <> h.left_state
        union all
        -- Transitions: those of live rows are the guard's; here an end, which is two rows of one transaction.
        select 'transition', h.execution, format('seq %s: inserted as %s, generation %s', h.seq, h.to_state, h.generation)
        from h
        where h.from_state is null and h.to_state not in ('scheduled', 'ready')
            or h.from_state is null and h.left_seq is null and h.generation = 0 and h.claim_no <> 0
        union all
        select 'transition', n.execution, format('seq %s: %s, which no live row ended as in the same transaction', n.seq, n.to_state)
        from ended n
        where not exists (select from h where h.execution = n.execution and h.txid = n.txid and h.generation = n.generation
            and h.claim_no = n.claim_no and h.to_state is null and (h.from_state = 'running' or n.to_state = 'cancelled'))
        union all
        select 'I2', h.execution, format('seq %s: claimed as claim %s after claim %s', h.seq, h.claim_no, h.left_claim)
        from h
        where h.to_state = 'running' and h.from_state <> 'running' and h.claim_no <= h.left_claim
        union all
        select 'I2', h.execution, format('seq %s: opened again with claim %s after claim %s', h.seq, h.claim_no, h.left_claim)
        from h
        where h.from_state is null and h.claim_no < h.left_claim
        union all
        select 'I2', x.execution, format('claim %s has had %s owners', x.claim_no, x.owners)
        from (
            select h.execution, h.claim_no, count(distinct h.owner) as owners from h
            where h.to_state = 'running' and h.outcome is distinct from 'handed_over'
                -- What follows a hand-over has the new owner.
                and not exists (select from h g where g.outcome = 'handed_over' and g.execution = h.execution
                    and g.claim_no = h.claim_no and g.seq < h.seq)
            group by 1, 2 having count(distinct h.owner) > 1) x
        union all
        select 'I3', h.execution, format('seq %s: %s in generation %s after its end in generation %s', h.seq,
            coalesce(h.to_state, 'ended'), h.generation, h.left_generation)
        from h
        where h.left_seq is not null and h.left_state is null and not (h.from_state is null and h.generation > h.left_generation)
        union all
        select 'I3', h.execution, format('seq %s: inserted while it was %s', h.seq, h.left_state)
        from h
        where h.from_state is null and h.left_state is not null
        union all
        select 'I4', x.execution, format('%s ends in generation %s', x.ends, x.generation)
        from (select h.execution, h.generation, count(*) as ends from h where h.to_state is null group by 1, 2 having count(*) > 1) x
        union all
        select 'I4', x.execution, format('%s terminal records of generation %s', x.records, x.generation)
        from (select n.execution, n.generation, count(*) as records from ended n group by 1, 2 having count(*) > 1) x
        union all
        select 'I4', x.id, format('%s finished rows of generation %s', x.records, x.generation)
        from (select f.id, f.generation, count(*) as records from @schema@._private_finished f group by 1, 2 having count(*) > 1) x
        union all
        select 'I4', e.id, format('%s in generation %s, and finished in generation %s', e.state, e.generation, f.generation)
        from @schema@._private_executions e join @schema@._private_finished f on f.id = e.id
        where f.generation >= e.generation
        union all
        -- A claim's end is the claim's: by its number, by its owner, once.
        select 'I5', h.execution, format('seq %s: claim %s of %s ended, but claim %s of %s was running', h.seq, h.claim_no, h.owner,
            h.left_claim, h.left_owner)
        from h
        where h.from_state = 'running' and h.left_state = 'running' and h.outcome is distinct from 'handed_over'
            and (h.claim_no, h.owner) is distinct from (h.left_claim, h.left_owner)
        union all
        select 'I5', x.execution, format('claim %s ended %s times', x.claim_no, x.ends)
        from (
            select h.execution, h.claim_no, count(*) as ends from h
            where h.from_state = 'running' and h.to_state is distinct from 'running' group by 1, 2 having count(*) > 1) x
        union all
        -- Records are of the claim that runs, or a copy of a former life, made with the row.
        select 'I5', r.execution, format('seq %s: %s %L %s by claim %s, attempt %s, while it was %s by claim %s, attempt %s', r.seq, r.kind,
            r.name, r.change, r.claim_no, r.attempt, coalesce(r.then_state, 'gone'), r.then_claim, r.then_attempt)
        from r
        where r.change in ('saved', 'begun')
            and (r.then_state, r.then_claim, r.then_attempt) is distinct from ('running', r.claim_no, r.attempt)
            and not (r.then_from is null and r.generation > 0 and r.then_txid = r.txid)
        union all
        -- One value for each name: what is dropped while the execution goes on was a failure, and what came again after an end
        -- is the same.
        select 'I6', r.execution, format('seq %s: %s %L dropped, and it goes on', r.seq, r.kind, r.name)
        from r
        where r.change = 'dropped' and not r.is_failure and not exists (
            select from h where h.execution = r.execution and h.txid = r.txid and h.to_state is null)
        union all
        select 'I6', r.execution, format('seq %s: %s %L has another value', r.seq, r.kind, r.name)
        from r
        where r.change = 'saved' and r.left_change is not null
            and (r.left_change <> 'dropped' or not r.left_failure and r.left_digest <> r.digest)
        union all
        select 'I8', x.execution, format('%s children %L in attempt %s of generation %s', x.children, x.name, x.attempt, x.generation)
        from (
            select r.execution, r.name, r.attempt, r.generation, count(*) as children from r
            where r.change = 'begun' and r.kind = 'child' group by 1, 2, 3, 4 having count(*) > 1) x
        union all
        select 'I8', e.id, format('child %L of %s, which never waited for it', e.wait_name, e.parent_id)
        from (
            select id, parent_id, wait_name from @schema@._private_executions
            where parent_id is not null and wait_name is not null
        ) e
        where not exists (select from r where r.execution = e.parent_id and r.name = e.wait_name and r.change = 'begun'
            and r.target = e.id::text)
        union all
        -- A child's wait is resolved by the child's end, and in the same transaction.
        select 'I9', r.execution, format('seq %s: child %L is %s, and execution %s did not end by that', r.seq, r.name, r.outcome, r.target)
        from r
        where r.change = 'resolved' and r.kind = 'child' and not exists (
            select from h where h.execution = r.target::uuid and h.txid = r.txid and h.to_state is null)
        union all
        select 'I9', r.execution, format('seq %s: child %L is %s, and execution %s ended as %s', r.seq, r.name, r.outcome, r.target, n.to_state)
        from r join ended n on n.execution = r.target::uuid and n.txid = r.txid
        where r.change = 'resolved' and r.kind = 'child' and n.to_state <> r.outcome
        union all
        select 'I9', w.execution_id, format('waits for child %L, and execution %s is not live', w.name, w.target)
        from @schema@._private_waits w
        where w.kind = 'child' and w.resolved_at is null
            and not exists (select from @schema@._private_executions e where e.id = w.target::uuid)
        union all
        select 'I9', e.id, 'waits, and has something to go on with'
        from @schema@._private_executions e
        where e.state = 'waiting' and @schema@._private_is_resumable(e.id)
        union all
        select 'I9', e.id, 'waits for nothing'
        from @schema@._private_executions e
        where e.state = 'waiting'
            and not exists (select from @schema@._private_waits w where w.execution_id = e.id and w.resolved_at is null)
        union all
        select 'I9', e.id, format('waits until %s, and a wait is due %s', e.run_at, w.due_at)
        from @schema@._private_executions e
            cross join lateral (select min(w.due_at) as due_at from @schema@._private_waits w
                where w.execution_id = e.id and w.resolved_at is null) w
        where e.state = 'waiting' and w.due_at < coalesce(e.run_at, 'infinity')
        union all
        select 'history', e.id, 'has records, and is not marked for it: they will be lost'
        from @schema@._private_executions e
        where not e.is_durable and (exists (select from @schema@._private_steps s where s.execution_id = e.id)
            or exists (select from @schema@._private_waits w where w.execution_id = e.id))
        union all
        -- Of the inbox nobody receives a thing twice, in all lives together.
        select 'received', x.execution_id, format('event or message %s received %s times', x.event_id, x.times)
        from (
            select y.execution_id, y.event_id, count(*) as times from (
                select w.execution_id, w.event_id from @schema@._private_waits w
                union all select s.execution_id, s.event_id from @schema@._private_steps s
                union all select p.execution_id, p.event_id from @schema@._private_receipts p
            ) y
            where y.event_id is not null group by 1, 2 having count(*) > 1) x
        union all
        select 'I11', min(e.id::text)::uuid, format('%s live executions of key %L', count(*), e.dedupe_key)
        from @schema@._private_executions e
        where e.dedupe_key is not null group by e.queue, e.task, e.dedupe_key having count(*) > 1
        union all
        select 'I11', e.id, format('its key %L is free, or another''s', e.dedupe_key)
        from @schema@._private_executions e
        where e.dedupe_key is not null and not exists (select from @schema@._private_dedupe_keys d
            where d.queue = e.queue and d.task = e.task and d.key = e.dedupe_key and d.execution_id = e.id)
        union all
        select 'I12', e.id, format('attempt %s of %s, crashes %s', e.attempt, e.max_attempts, e.crashes)
        from (
            select id, attempt, max_attempts, crashes, 2 as most from @schema@._private_executions
            union all
            select id, attempt, max_attempts, crashes, 3 from @schema@._private_finished
        ) e
        where e.attempt > e.max_attempts or e.attempt < 0 or e.crashes > e.most
        union all
        select 'I14', e.id, format('running by %s, who is %s', e.owner, case when o.id is null then 'unknown'
            when o.died_at is not null then 'dead since ' || o.died_at else 'expired since ' || o.expires_at end)
        from @schema@._private_executions e left join @schema@._private_orchestrators o on o.id = e.owner
        where e.state = 'running'
            and coalesce(least(o.died_at, o.expires_at), e.claimed_at) + make_interval(secs => p_owner_bound) < v_now
        union all
        select 'L1', e.id, format('%s, due %s', e.state, e.run_at)
        from @schema@._private_executions e
        where p_settled and not (e.state = 'scheduled' and e.run_at > v_now)
            and not (e.state = 'waiting' and coalesce(e.run_at, 'infinity') > v_now)
        union all
        select 'L1', c.execution_id, format('to be cancelled since %s, %s', c.created_at, c.reason)
        from @schema@._private_closings c
        where p_settled
        union all
        select 'orphan', d.execution_id, format('dedupe key %L of no live execution', d.key)
        from @schema@._private_dedupe_keys d
        where not exists (select from @schema@._private_executions e
            where e.id = d.execution_id and e.queue = d.queue and e.task = d.task and e.dedupe_key = d.key)
        union all
        select 'orphan', l.execution_id, 'payload of no execution'
        from @schema@._private_payloads l
        where not exists (select from @schema@._private_executions e where e.id = l.execution_id and e.payload is null)
            and not exists (select from @schema@._private_finished f where f.id = l.execution_id and f.payload is null)
        union all
        select 'orphan', s.execution_id, format('step %L of no live execution', s.name)
        from @schema@._private_steps s
        where not exists (select from @schema@._private_executions e where e.id = s.execution_id)
        union all
        select 'orphan', s.execution_id, format('wait %L of no live execution', s.name)
        from @schema@._private_waits s
        where not exists (select from @schema@._private_executions e where e.id = s.execution_id)
        union all
        select 'payload', e.id, format('%s, and its payload is nowhere', e.state)
        from (
            select id, state, payload from @schema@._private_executions
            union all select id, state, payload from @schema@._private_finished
        ) e
        where e.payload is null and not exists (select from @schema@._private_payloads l where l.execution_id = e.id)
    )
    select x.rule, x.execution, x.words from (
        select f.*, row_number() over (partition by f.rule) as n from found f
    ) x
    where x.n <= p_limit order by x.rule, x.execution, x.words;
end $$;
