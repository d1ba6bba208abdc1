-- Events, messages and promises: what is sent goes into an inbox, in the sender's transaction; to deliver it is a verb of its own.
--
-- Sending inserts one row and touches no execution, so a sender never waits for one, nor makes one wait, however long its
-- transaction lasts. Delivering is done by orchestrators (runtime/errands.py), after the sender's commit.
--
-- Who receives what. An event: every execution that waits for its name, now or while it is kept, each once. A message: the one
-- execution it is for, once. What a promise is resolved with: the execution that made it. Oldest first, by id.
--
-- How no wake-up is lost. Of each name there is an advisory lock (_private_key_e). Who begins a wait takes it, shared, then looks
-- at the inbox, in a statement of its own, and keeps it until it has committed the wait. Who delivers has read the committed row,
-- takes the lock exclusively, and then looks at the waits, in a statement of its own. If the wait's lock came first, its commit
-- came before the exclusive lock, and the deliverer sees the wait. If the deliverer's came first, the row was committed before
-- the wait's lock, and whoever begins the wait sees the row. Both need READ COMMITTED, which the engine's connections have.
--
-- How nothing is received twice. A wait is resolved by who holds the row of its execution and finds the wait open after that;
-- so the deliverer, a wait that begins and a timeout come one after the other. What a wait received is written with it
-- (event_id), and what an execution has received is not for another wait of the same execution (_private_has_received). Where
-- an execution continues as new, its waits go and what they received is noted as received by a former life.
--
-- Order of locks: rows of the inbox (passing over those that others have), the locks of names in the order of keys, executions in
-- the order of partition and id. Who holds an execution takes no lock of a name, and of the inbox only rows that are free.

-- Shared while a wait begins; exclusive while something is delivered. p_execution_id: of messages.
create or replace function @schema@._private_key_e(p_kind text, p_name text, p_execution_id uuid) returns bigint
    language sql immutable parallel safe
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' E ' || p_kind || ' '
        || coalesce(p_execution_id::text, '') || ' ' || p_name, 7263381);

-- The channel that tells orchestrators of something that anybody may do.
create or replace function @schema@._private_errands_channel() returns text
    language sql immutable parallel safe
    return 'pgconductor_e_' || pg_catalog.md5(@schema_literal@);

-- A row if an execution has received an event or message: by a wait, by one that is a step now, or in a former life. A set, for
-- `exists`, and without settings, so that it becomes part of the query that asks; by keys, whatever the statistics say: hence
-- offset 0.
create or replace function @schema@._private_has_received(p_execution_id uuid, p_event_id bigint) returns setof bigint
    language sql stable
begin atomic
    (select w.event_id from @schema@._private_waits w where w.execution_id = p_execution_id and w.event_id = p_event_id offset 0)
    union all
    (select s.event_id from @schema@._private_steps s where s.execution_id = p_execution_id and s.event_id = p_event_id offset 0)
    union all
    (select r.event_id from @schema@._private_receipts r where r.execution_id = p_execution_id and r.event_id = p_event_id offset 0);
end;

-- Put something into the inbox; returns its id, null for a promise that is resolved already. Makes the transaction commit durably,
-- as invoke_many, and notifies if anybody is seen to wait; the heartbeats of orchestrators find what is not seen from here.
create or replace function @schema@._private_put(
    p_kind text, p_name text, p_execution_id uuid, p_payload jsonb, p_error jsonb, p_retention double precision
) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_id bigint;
begin
    if octet_length(p_name) not between 1 and 128 or p_name is null then
        raise exception using errcode = 'PC001', message = 'the name of an event or of a channel is 1 to 128 bytes long';
    end if;
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    insert into @schema@._private_events (kind, name, execution_id, payload, error, created_at, created_by, expires_at)
    values (p_kind, p_name, p_execution_id, case when p_error is null then coalesce(p_payload, 'null') end, p_error, v_now,
        quote_ident(session_user)::regrole, v_now + make_interval(secs => p_retention))
    on conflict do nothing
    returning id into v_id;
    if v_id is not null and (case when p_kind = 'message'
            then exists (select from @schema@._private_waits w where w.execution_id = p_execution_id and w.kind = 'message' and w.target = p_name
                and w.resolved_at is null)
            else exists (select from @schema@._private_waits w where w.kind = p_kind and w.target = p_name and w.resolved_at is null) end)
    then
        perform @schema@._private_notify(@schema@._private_errands_channel(), '');
    end if;
    return v_id;
end $$;

-- Whether an execution is live, and invoked by that role, if one is given.
create or replace function @schema@._private_is_live(p_id uuid, p_creator oid) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_no constant int := @schema@._private_queue_no(p_id);
    v_is_live boolean;
begin
    if p_id is null or v_no > 0 and not exists (select from @schema@._private_queues q where q.no = v_no) then
        return false;
    end if;
    execute format('select exists (select from @schema@.%I where id = $1 and ($2 is null or created_by = $2))',
        '_private_queue_' || v_no) into v_is_live using p_id, p_creator;
    return v_is_live;
end $$;

-- Send an event to all who wait for it, or will while it is kept; returns its id. From any SQL client, in its own transaction:
--   select pgconductor.emit('paid', '{"order": 17}');
-- retention: how long it is kept for executions that do not wait yet; '0' is for those that wait when it is delivered.
create or replace function @schema@.emit(name text, payload jsonb default 'null', retention interval default '1 day') returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if emit.retention is null or emit.retention < '0' or emit.retention > '36525 days' then
        raise exception using errcode = 'PC001', message = 'the retention of an event is from 0 to a century';
    end if;
    return @schema@._private_put('event', emit.name, null, emit.payload, null, date_part('epoch', emit.retention));
end $$;

-- Send a message to one execution, where it is kept until it is received or the execution ends. False: there is no such live
-- execution, or none that the caller may send to: producers and workers to those that their login role has invoked, operators
-- and the owner to any.
create or replace function @schema@.send(execution_id uuid, channel text, payload jsonb default 'null') returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
begin
    if not @schema@._private_is_live(send.execution_id,
        case when @schema@._private_may_cancel_all() is not true then quote_ident(session_user)::regrole end)
    then
        return false;
    end if;
    perform @schema@._private_put('message', send.channel, send.execution_id, send.payload, null, null);
    return true;
end $$;

-- Resolve a promise, or reject it. Whoever has its id may; the first one counts. Returns resolved (now, by this call), already, or
-- unknown: there is no such promise, or its execution has ended. Two at once: the second waits for the first one's commit.
create or replace function @schema@.resolve_promise(id uuid, value jsonb default 'null') returns text
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select @schema@._private_settle_promise(id, value, null)
$$;

create or replace function @schema@.reject_promise(id uuid, message text default 'rejected') returns text
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select @schema@._private_settle_promise(id, null, jsonb_build_object('type', 'PromiseRejected', 'message', coalesce(message, 'rejected')))
$$;

create or replace function @schema@._private_settle_promise(p_id uuid, p_value jsonb, p_error jsonb) returns text
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_execution_id uuid;
begin
    select p.execution_id into v_execution_id from @schema@._private_promises p where p.id = p_id;
    if not found then
        return 'unknown';
    end if;
    return case when @schema@._private_put('promise', p_id::text, v_execution_id, p_value, p_error, null) is null then 'already' else 'resolved' end;
end $$;

-- Do what handlers do to the schema itself, each exactly once: with its record, in one transaction. Arrays of one length; p_effects:
-- objects with kind emit (event, payload, retention in seconds), send (to, channel, payload) or new_promise. Returns a row per
-- position: "saved" now; "stored": it was done by an earlier call; "fenced". value: the id of the event, whether there is such
-- a receiver, the id of the promise. Commits durably. Locks: the executions' rows.
create or replace function @schema@.save_effects(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_names text[], p_positions int[], p_effects jsonb[]
) returns table (n int, status text, value text)
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
    v_effect record;
    v_value jsonb;
    v_promise uuid;
begin
    select coalesce(array_agg(h.id), '{}'), coalesce(array_agg(h.attempt), '{}') into v_held, v_attempts
    from @schema@._private_hold(p_owner, p_ids, p_claim_nos) h;
    v_now := @schema@._private_clock();
    for v_effect in
        select o.no::int as no, o.id, o.claim_no, o.name, o.position, o.effect, o.effect ->> 'kind' as kind, h.attempt
        from unnest(p_ids, p_claim_nos, p_names, p_positions, p_effects) with ordinality as o (id, claim_no, name, position, effect, no)
            left join unnest(v_held, v_attempts) as h (id, attempt) on h.id = o.id
        order by o.no
    loop
        if v_effect.attempt is null then
            return query select v_effect.no, 'fenced', null::text;
            continue;
        end if;
        select s.value into v_value from @schema@._private_steps s where s.execution_id = v_effect.id and s.name = v_effect.name;
        if found then
            return query select v_effect.no, 'stored', v_value::text;
            continue;
        end if;
        case v_effect.kind
        when 'emit' then
            v_value := to_jsonb(@schema@._private_put('event', v_effect.effect ->> 'event', null, v_effect.effect -> 'payload', null,
                (v_effect.effect ->> 'retention')::float8));
        when 'send' then
            v_value := to_jsonb(@schema@._private_is_live((v_effect.effect ->> 'to')::uuid, null));
            if v_value = 'true' then
                perform @schema@._private_put('message', v_effect.effect ->> 'channel', (v_effect.effect ->> 'to')::uuid,
                    v_effect.effect -> 'payload', null, null);
            end if;
        when 'new_promise' then
            insert into @schema@._private_promises (id, execution_id, created_at) values (gen_random_uuid(), v_effect.id, v_now)
            returning id into v_promise;
            v_value := to_jsonb(v_promise);
        end case;
        insert into @schema@._private_steps (execution_id, name, kind, position, claim_no, attempt, created_at, value)
        values (v_effect.id, v_effect.name, v_effect.kind, v_effect.position, v_effect.claim_no, v_effect.attempt, v_now, v_value);
        return query select v_effect.no, 'saved', v_value::text;
    end loop;
end $$;

-- Resolve open waits of executions by what is in the inbox, the oldest that fits each. The caller holds the executions' rows.
-- p_names: of the waits meant, one for each id; null for all of these executions. p_due: only those that are due by then.
-- p_is_seen: the caller tells the handlers. Returns the executions of which a wait was resolved.
create or replace function @schema@._private_receive(p_ids uuid[], p_names text[], p_due timestamptz, p_is_seen boolean) returns uuid[]
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_round uuid[];
    v_resolved uuid[] := '{}';
begin
    loop
        -- Of an execution's waits for one name one at a time, the first that something fits: no two are to have the same event.
        with pending as materialized (
            -- By keys, whatever the statistics say: hence offset 0, here and below.
            select w.* from unnest(p_ids, p_names) as o (id, name) cross join lateral (
                select w.execution_id, w.name, w.kind, w.target, w.match, w.position, w.due_at from @schema@._private_waits w
                where o.name is not null and w.execution_id = o.id and w.name = o.name and w.resolved_at is null
                union all
                select w.execution_id, w.name, w.kind, w.target, w.match, w.position, w.due_at from @schema@._private_waits w
                where o.name is null and w.execution_id = o.id and w.resolved_at is null offset 0) w
            where w.kind in ('event', 'message', 'promise') and (p_due is null or w.due_at <= p_due)
        ), found as materialized (
            select distinct on (p.execution_id, p.kind, p.target) p.execution_id, p.name, p.kind, v.id, v.payload, v.error
            from pending p cross join lateral (
                (select v.id, v.payload, null::jsonb as error from @schema@._private_events v
                where p.kind = 'event' and v.kind = 'event' and v.name = p.target and (v.expires_at > v_now or v.delivered_at is null)
                    and (p.match is null or v.payload @> p.match)
                    and not exists (select from @schema@._private_has_received(p.execution_id, v.id))
                order by v.id limit 1)
                union all
                (select v.id, v.payload, null from @schema@._private_events v
                where p.kind = 'message' and v.kind <> 'event' and v.kind = 'message' and v.execution_id = p.execution_id and v.name = p.target
                    and not exists (select from @schema@._private_has_received(p.execution_id, v.id))
                order by v.id limit 1)
                union all
                (select v.id, v.payload, v.error from @schema@._private_events v
                where p.kind = 'promise' and v.kind = 'promise' and v.name = p.target and v.execution_id = p.execution_id)
            ) v
            order by p.execution_id, p.kind, p.target, p.position, p.name
        ), resolved as (
            update @schema@._private_waits w set resolved_at = v_now, is_seen = p_is_seen, value = f.payload, error = f.error,
                event_id = case when f.kind <> 'promise' then f.id end,
                outcome = case when f.kind <> 'promise' then 'received' when f.error is null then 'resolved' else 'rejected' end
            from found f where w.execution_id = f.execution_id and w.name = f.name
            returning w.execution_id
        ), consumed as (
            -- One that a deliverer has locked is removed by that one: it sees the wait.
            delete from @schema@._private_events v where v.id in (
                select i.id from found f join @schema@._private_events i on i.id = f.id where f.kind = 'message' for update of i skip locked)
        )
        select array_agg(distinct r.execution_id) into v_round from resolved r;
        exit when v_round is null;
        v_resolved := v_resolved || v_round;
    end loop;
    return array(select distinct i from unnest(v_resolved) as i);
end $$;

-- Before waits of these executions, whose rows the caller holds, time out: what is there by now was in time.
create or replace function @schema@._private_receive_due(p_ids uuid[], p_now timestamptz) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
begin
    if exists (select from @schema@._private_waits w where w.execution_id = any (p_ids) and w.resolved_at is null and w.due_at <= p_now
            and w.kind in ('event', 'message', 'promise')) then
        perform @schema@._private_receive(p_ids, null, p_now, false);
    end if;
end $$;

-- Lock executions in the order of partition and id; returns those that are there. Not p_wait: those that nobody else has locked.
create or replace function @schema@._private_lock_executions(p_ids uuid[], p_wait boolean) returns uuid[]
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_no int;
    v_found uuid[];
    v_locked uuid[] := '{}';
begin
    for v_no in
        select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1
    loop
        execute format('select array_agg(x.id) from (select id from @schema@.%I where id = any ($1) order by id for no key update %s) x',
            '_private_queue_' || v_no, case when not p_wait then 'skip locked' end) into v_found using p_ids;
        v_locked := v_locked || v_found;
    end loop;
    return v_locked;
end $$;

-- The executions that something in the inbox is for: those that wait for it, or the receiver of a message, which is to be marked.
create or replace function @schema@._private_receivers(p_id bigint) returns setof uuid
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select w.execution_id from @schema@._private_events e join @schema@._private_waits w on w.kind = 'event' and w.target = e.name
    where e.id = p_id and e.kind = 'event' and w.resolved_at is null and (w.match is null or e.payload @> w.match)
        and not exists (select from @schema@._private_has_received(w.execution_id, e.id))
    union all
    select e.execution_id from @schema@._private_events e where e.id = p_id and e.kind = 'message'
    union all
    select w.execution_id from @schema@._private_events e join @schema@._private_waits w on w.kind = 'promise' and w.target = e.name
    where e.id = p_id and e.kind = 'promise' and w.resolved_at is null
$$;

-- Deliver what is in the inbox, behind the id p_after, p_limit at most and to 1000 executions at most. To be called in a transaction
-- of its own, by anybody, at any time: two at once take different rows. Returns one row: upto, the id to go on after, null if
-- there was nothing; delivered, how many are done with; is_left, some are not, because somebody has locked an execution
-- for long: try again soon. Waits half a second at most for each lock, and fails with 55P03 if that of a name is not to be had.
create or replace function @schema@.deliver_events(p_after bigint default 0, p_limit int default 200)
    returns table (upto bigint, delivered bigint, is_left boolean)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
    set lock_timeout = '500ms'
as $$
declare
    v_cap constant int := 1000;
    v_now timestamptz;
    v_ids bigint[];
    v_wanted uuid[];
    v_locked uuid[];
    v_resolved uuid[];
    v_done bigint[];
    v_first bigint;
    v_no int;
begin
    v_ids := array(select e.id from @schema@._private_events e where e.delivered_at is null and e.id > p_after
        order by e.id limit p_limit for update skip locked);
    upto := v_ids[cardinality(v_ids)];
    delivered := 0;
    is_left := false;
    if upto is null then
        return next;
        return;
    end if;
    perform pg_advisory_xact_lock(x.k) from (
        select distinct @schema@._private_key_e(e.kind, e.name, case when e.kind = 'message' then e.execution_id end) as k
        from @schema@._private_events e where e.id = any (v_ids) order by 1) x;
    v_wanted := array(select distinct r from unnest(v_ids) as i, @schema@._private_receivers(i) as r limit v_cap);
    begin
        v_locked := @schema@._private_lock_executions(v_wanted, true);
    exception when lock_not_available then
        v_locked := @schema@._private_lock_executions(v_wanted, false);
    end;
    v_now := @schema@._private_clock();
    v_resolved := @schema@._private_receive(v_locked, null, null, false);
    if v_resolved <> '{}' then
        perform @schema@._private_announce(q) from (select distinct q from unnest(@schema@._private_wake(v_resolved)) as q order by q) x;
    end if;

    -- A message that nobody waits for: its receiver has something now that is to go with it.
    for v_no in select distinct @schema@._private_queue_no(e.execution_id) from @schema@._private_events e
        where e.id = any (v_ids) and e.kind = 'message' and e.execution_id = any (v_locked) order by 1
    loop
        execute format($sql$
            update @schema@.%I x set is_durable = true where x.id in (
                select e.execution_id from @schema@._private_events e where e.id = any ($1) and e.kind = 'message' and e.execution_id = any ($2))
                and not x.is_durable
            $sql$, '_private_queue_' || v_no) using v_ids, v_locked;
    end loop;
    -- What nobody is there for any more, or was received already by a wait that could not remove it.
    delete from @schema@._private_events e where e.id = any (v_ids) and (
        e.kind = 'message' and e.execution_id = any (v_wanted) and e.execution_id <> all (v_locked)
            and not @schema@._private_is_live(e.execution_id, null)
        or e.kind = 'message' and e.execution_id = any (v_locked)
            and exists (select from @schema@._private_has_received(e.execution_id, e.id))
        or e.kind = 'promise' and not exists (select from @schema@._private_promises p where p.id = e.name::uuid));
    with done as (
        update @schema@._private_events e set delivered_at = v_now
        where e.id = any (v_ids) and case when e.kind = 'message' then e.execution_id = any (v_locked)
            else not exists (select from @schema@._private_receivers(e.id)) end
        returning e.id
    )
    select coalesce(array_agg(d.id), '{}') into v_done from done d;
    select min(e.id) into v_first from @schema@._private_events e where e.id = any (v_ids) and e.id <> all (v_done);
    delivered := cardinality(v_ids);
    if v_first is not null then
        delivered := delivered - (select count(*) from @schema@._private_events e where e.id = any (v_ids) and e.id <> all (v_done));
        if cardinality(v_wanted) = v_cap and v_resolved <> '{}' then
            upto := v_first - 1;
        else
            is_left := true;
        end if;
    end if;
    return next;
end $$;

-- Remove events that are kept no longer, at most p_limit; returns how many. What was not delivered stays.
create or replace function @schema@._private_forget_events(p_now timestamptz, p_limit int) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_count bigint;
begin
    delete from @schema@._private_events e where e.id in (
        select i.id from @schema@._private_events i where i.kind = 'event' and i.expires_at < p_now and i.delivered_at is not null
        order by i.expires_at limit p_limit for update skip locked);
    get diagnostics v_count = row_count;
    return v_count;
end $$;

-- When to look next whether a receipt is still needed: when its event has expired (null: a message), in a day at the latest.
create or replace function @schema@._private_receipt_check(p_expires_at timestamptz, p_now timestamptz) returns timestamptz
    language sql immutable parallel safe
    return greatest(least(p_expires_at, p_now + interval '1 day'), p_now + interval '1 minute');

-- Note what lives of executions have received that end now, before their steps and waits go. Of what has gone from the inbox
-- nothing needs to be known. The caller holds the executions' rows.
create or replace function @schema@._private_keep_receipts(p_ids uuid[], p_now timestamptz) returns void
    language sql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
    insert into @schema@._private_receipts (execution_id, event_id, check_at)
    select x.execution_id, v.id, @schema@._private_receipt_check(v.expires_at, p_now)
    from (
        select w.execution_id, w.event_id from @schema@._private_waits w where w.execution_id = any (p_ids) and w.event_id is not null
        union all
        select s.execution_id, s.event_id from @schema@._private_steps s where s.execution_id = any (p_ids) and s.event_id is not null
    ) x cross join lateral (select v.id, v.expires_at from @schema@._private_events v where v.id = x.event_id offset 0) v
    on conflict do nothing
$$;

-- Remove receipts whose event or execution is kept no longer, of the p_limit that are to be looked at first; returns how many it
-- looked at. In one statement, since an execution that ends or is retried is in one snapshot either live or finished.
create or replace function @schema@._private_forget_receipts(p_now timestamptz, p_limit int) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_count bigint;
begin
    if not exists (select from @schema@._private_receipts r where r.check_at < p_now) then
        return 0;  -- and no partition of the executions was touched
    end if;
    with looked as materialized (
        select r.execution_id, r.event_id from @schema@._private_receipts r where r.check_at < p_now
        order by r.check_at limit p_limit for update skip locked
    ), kept as materialized (
        select i.execution_id from (select distinct l.execution_id from looked l) i
        where exists (select from @schema@._private_executions e
                where e.queue_no = @schema@._private_queue_no(i.execution_id) and e.id = i.execution_id offset 0)
            or exists (select from @schema@._private_finished f where f.id = i.execution_id offset 0)
    ), needed as materialized (
        select l.execution_id, l.event_id, v.expires_at from looked l
            join kept k on k.execution_id = l.execution_id
            cross join lateral (select v.expires_at from @schema@._private_events v where v.id = l.event_id offset 0) v
    ), again as (
        update @schema@._private_receipts r set check_at = @schema@._private_receipt_check(n.expires_at, p_now)
        from needed n where r.execution_id = n.execution_id and r.event_id = n.event_id
    ), gone as (
        delete from @schema@._private_receipts r using looked l
        where r.execution_id = l.execution_id and r.event_id = l.event_id
            and not exists (select from needed n where n.execution_id = l.execution_id and n.event_id = l.event_id)
    )
    select count(*) into v_count from looked;
    return v_count;
end $$;

-- Tell how far running executions have come; of several of one execution the last counts. Returns the positions that were not
-- written, since the claim is revoked. Not durable: a crash of the server may lose it. Locks: the executions' rows.
create or replace function @schema@.set_progress(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_values jsonb[]) returns setof int
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_no int;
    v_found uuid[];
    v_written uuid[] := '{}';
begin
    perform set_config('synchronous_commit', 'off', true);
    for v_no in
        select n.no from (select distinct @schema@._private_queue_no(i) as no from unnest(p_ids) as i) n
        where n.no = 0 or exists (select from @schema@._private_queues q where q.no = n.no) order by 1
    loop
        execute format($sql$
            with o as materialized (
                select distinct on (o.id) o.id, o.claim_no, o.value from unnest($2, $3, $4) with ordinality as o (id, claim_no, value, n)
                order by o.id, o.n desc
            ), held as materialized (
                select row.tid, row.id, o.value from o cross join lateral (
                    select e.ctid as tid, e.id from @schema@.%1$I e
                    where e.id = o.id and e.claim_no = o.claim_no and e.owner = $1 and e.state = 'running' offset 0 for no key update) row
            ), written as (
                update @schema@.%1$I e set progress = h.value from held h where e.ctid = h.tid returning e.id
            )
            select array_agg(id) from written
            $sql$, '_private_queue_' || v_no) into v_found using p_owner, p_ids, p_claim_nos, p_values;
        v_written := v_written || v_found;
    end loop;
    return query select o.n::int from unnest(p_ids) with ordinality as o (id, n) where o.id <> all (v_written) order by o.n;
end $$;

-- What executions last told of their progress, live or finished; null if nothing. No row for an execution that is not kept.
create or replace function @schema@.progress(p_ids uuid[]) returns table (id uuid, progress text)
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
begin
    return query
    select distinct on (x.id) x.id, x.progress from (
        select e.id, e.progress::text as progress, e.generation + 1 as place
        from unnest(p_ids) as i join @schema@._private_executions e on e.queue_no = @schema@._private_queue_no(i) and e.id = i
        union all
        select f.id, f.progress::text, f.generation from @schema@._private_finished f where f.id = any (p_ids)
    ) x
    order by x.id, x.place desc;
end $$;
