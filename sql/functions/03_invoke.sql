-- Producing executions: any number in one call, or one by named arguments from any SQL client.

-- The columns that an object of options stands for. Raises PC001 for what it does not know.
create or replace function @schema@._private_options(p_options jsonb, p_now timestamptz) returns @schema@._private_invoke_options
    language plpgsql stable
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_unknown constant text := (select string_agg(quote_literal(k), ', ') from jsonb_object_keys(p_options) as k
        where k not in ('timeout', 'deadline_at', 'deadline_in', 'max_attempts', 'tags', 'backoff', 'version'));
begin
    if v_unknown is not null then
        raise exception using errcode = 'PC001', message = format('unknown options: %s', v_unknown);
    end if;
    if octet_length(p_options ->> 'version') not between 1 and 64 or strpos(p_options ->> 'version', '@') > 0 then
        raise exception using errcode = 'PC001', message = 'the version of a task is 1 to 64 bytes long and has no "@"';
    end if;
    return (
        (p_options ->> 'max_attempts')::int,
        make_interval(secs => (p_options ->> 'timeout')::float8),
        coalesce((p_options ->> 'deadline_at')::timestamptz, p_now + make_interval(secs => (p_options ->> 'deadline_in')::float8)),
        case when p_options ? 'tags' then array(select jsonb_array_elements_text(p_options -> 'tags')) end,
        p_options -> 'backoff'
    )::@schema@._private_invoke_options;
end $$;

-- Raises PC001.
create or replace function @schema@._private_refuse_payload() returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception using errcode = 'PC001', message = 'the payload must be a JSON object: the handler''s parameters by name';
end $$;

-- Returns a row per position of the arrays (all of one length): the execution's id, and whether this call created it.
-- With a dedupe key that a live execution of the same queue and task holds, the row is that one's, which stays as it
-- is. Two positions with one key are one execution, created by the first. Makes the transaction commit durably, where the
-- administrator or the session chose otherwise: what was acknowledged is not lost. Locks: dedupe keys in the order of (queue,
-- task, key), waiting for whoever is inserting or ending one of them; then the trigger's K.
create or replace function @schema@.invoke_many(
    p_tasks text[],
    p_payloads jsonb[],
    p_queues text[] default null,           -- null: the queue the task is registered with, else "default"
    p_priorities int[] default null,
    p_run_ats timestamptz[] default null,
    p_delays double precision[] default null,   -- seconds from now, where no run_at is given
    p_dedupe_keys text[] default null,
    p_options jsonb[] default null          -- an object or null per position, with any of: timeout, deadline_in (seconds),
                                            -- deadline_at (an instant with its zone), max_attempts, tags (texts), backoff
                                            -- (an object, e.g. {"kind": "fixed", "seconds": 5}), version (of the task)
) returns table ("position" int, id uuid, created boolean)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_me constant oid := quote_ident(session_user)::regrole;
    v_deduped constant boolean := coalesce(cardinality(array_remove(p_dedupe_keys, null)), 0) > 0;
    v_queue text;
    v_no int;
    v_id uuid;
    v_run_at timestamptz;
    v_large boolean;
    v_options @schema@._private_invoke_options;
    v_queues text[];
    v_nos int[];
    v_ids uuid[];
    v_holders uuid[];
    v_lost boolean;
    v_published int;
begin
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    -- First a look at the queues, then word of tables, then the insert: so the partition of a published queue is known, see
    -- publish_queues. Taking a lock brings word of tables. A transaction that has produced before holds all the locks
    -- it needs, and opens a catalogue instead.
    if not v_deduped and cardinality(p_tasks) = 1 then
        -- One row, the common case: few statements, and expressions that need none (benchmarks/produce.py).
        if jsonb_typeof(p_payloads[1]) is distinct from 'object' then
            perform @schema@._private_refuse_payload();
        end if;
        v_queue := p_queues[1];
        if v_queue is null then
            v_queue := coalesce((select t.queue from @schema@._private_tasks t where t.name = p_tasks[1]), 'default');
        end if;
        select q.no into v_no from @schema@._private_queues q where q.name = v_queue and q.published is not null;
        if pg_current_xact_id_if_assigned() is not null then
            perform pg_get_constraintdef(0);
        end if;
        v_id := @schema@._private_new_id(coalesce(v_no, 0), v_now);
        v_run_at := coalesce(p_run_ats[1], v_now + make_interval(secs => p_delays[1]), v_now);
        v_large := @schema@._private_is_large(p_payloads[1]);
        if p_options[1] is not null then
            v_options := @schema@._private_options(p_options[1], v_now);
        end if;
        insert into @schema@._private_executions (queue_no, id, queue, task, state, priority, run_at, created_at, created_by,
            payload, max_attempts, timeout, deadline_at, tags, backoff, version)
        values (coalesce(v_no, 0), v_id, v_queue, p_tasks[1],
            (case when v_run_at <= v_now then 'ready' else 'scheduled' end)::@schema@.execution_state,
            coalesce(p_priorities[1], 0), v_run_at, v_now, v_me, case when not v_large then p_payloads[1] end,
            (v_options).max_attempts, (v_options).timeout, (v_options).deadline_at, (v_options).tags,
            (v_options).backoff, p_options[1] ->> 'version');
        if v_large then
            insert into @schema@._private_payloads (execution_id, payload) values (v_id, p_payloads[1]);
        end if;
        "position" := 1;
        id := v_id;
        created := true;
        return next;
        return;
    end if;
    if exists (select from unnest(p_payloads) as p where jsonb_typeof(p) is distinct from 'object') then
        perform @schema@._private_refuse_payload();
    end if;
    v_published := coalesce((select max(q.published) from @schema@._private_queues q), 0);
    if not v_deduped then
        if pg_current_xact_id_if_assigned() is not null then
            perform pg_get_constraintdef(0);
        end if;
        return query
        with item as materialized (
            select i.ordinality::int as n, i.task, i.payload, coalesce(i.priority, 0) as priority,
                coalesce(i.run_at, v_now + make_interval(secs => i.delay), v_now) as run_at,
                coalesce(q.no, 0) as queue_no, r.queue, @schema@._private_new_id(coalesce(q.no, 0), v_now) as id,
                @schema@._private_is_large(i.payload) as is_large, i.options ->> 'version' as version,
                case when i.options is not null then @schema@._private_options(i.options, v_now) end as o
            from rows from (unnest(p_tasks), unnest(p_payloads), unnest(p_queues), unnest(p_priorities), unnest(p_run_ats),
                    unnest(p_delays), unnest(p_options))
                    with ordinality as i (task, payload, queue, priority, run_at, delay, options, ordinality)
                left join @schema@._private_tasks t on i.queue is null and t.name = i.task
                cross join lateral (select coalesce(i.queue, t.queue, 'default') as queue) r
                left join @schema@._private_queues q on q.name = r.queue and q.published <= v_published
        ), inserted as (
            insert into @schema@._private_executions (queue_no, id, queue, task, state, priority, run_at, created_at, created_by,
                payload, max_attempts, timeout, deadline_at, tags, backoff, version)
            select queue_no, id, queue, task,
                (case when run_at <= v_now then 'ready' else 'scheduled' end)::@schema@.execution_state,
                priority, run_at, v_now, v_me, case when not is_large then payload end,
                (o).max_attempts, (o).timeout, (o).deadline_at, (o).tags, (o).backoff, version
            from item
        ), large as (
            insert into @schema@._private_payloads (execution_id, payload)
            select id, payload from item where is_large
        )
        select n, id, true from item;
        return;
    end if;

    -- With keys: take the keys first, each for the first position that names it, then insert the executions whose key
    -- is theirs or who have none. A key whose holder ended between the two looks is tried again.
    select array_agg(r.queue order by i.n), array_agg(coalesce(q.no, 0) order by i.n),
        array_agg(@schema@._private_new_id(coalesce(q.no, 0), v_now) order by i.n)
    into v_queues, v_nos, v_ids
    from rows from (unnest(p_tasks), unnest(p_queues)) with ordinality as i (task, queue, n)
        left join @schema@._private_tasks t on i.queue is null and t.name = i.task
        cross join lateral (select coalesce(i.queue, t.queue, 'default') as queue) r
        left join @schema@._private_queues q on q.name = r.queue and q.published <= v_published;
    for v_try in 1..100 loop
        insert into @schema@._private_dedupe_keys (queue, task, key, execution_id)
        select distinct on (i.queue, i.task, i.key) i.queue, i.task, i.key, i.id
        from rows from (unnest(v_queues), unnest(p_tasks), unnest(p_dedupe_keys), unnest(v_ids), unnest(v_holders))
            with ordinality as i (queue, task, key, id, holder, n)
        where i.key is not null and i.holder is null
        order by i.queue, i.task, i.key, i.n
        on conflict do nothing;
        -- A snapshot older than the end of a former holder shows that one beside ours: ours is the one that counts.
        select array_agg(h.holder order by i.n), bool_or(i.key is not null and h.holder is null)
        into v_holders, v_lost
        from rows from (unnest(v_queues), unnest(p_tasks), unnest(p_dedupe_keys), unnest(v_ids))
                with ordinality as i (queue, task, key, id, n)
            left join lateral (
                select d.execution_id as holder from @schema@._private_dedupe_keys d
                where d.queue = i.queue and d.task = i.task and d.key = i.key
                order by d.execution_id = any(v_ids) desc limit 1
            ) h on true;
        exit when not v_lost;
    end loop;
    if v_lost then
        raise exception using errcode = 'PC002', message = 'a dedupe key changed hands 100 times during one call; invoke again';
    end if;
    perform pg_get_constraintdef(0);
    return query
    with item as materialized (
        select i.n::int as n, i.task, i.payload, coalesce(i.priority, 0) as priority,
            coalesce(i.run_at, v_now + make_interval(secs => i.delay), v_now) as run_at,
            i.queue, i.queue_no, i.key, i.id, coalesce(i.holder, i.id) as holder,
            @schema@._private_is_large(i.payload) as is_large, i.options ->> 'version' as version,
            case when i.options is not null then @schema@._private_options(i.options, v_now) end as o
        from rows from (unnest(p_tasks), unnest(p_payloads), unnest(p_priorities), unnest(p_run_ats), unnest(p_delays),
                unnest(v_queues), unnest(v_nos), unnest(p_dedupe_keys), unnest(v_ids), unnest(v_holders), unnest(p_options))
            with ordinality as i (task, payload, priority, run_at, delay, queue, queue_no, key, id, holder, options, n)
    ), inserted as (
        insert into @schema@._private_executions (queue_no, id, queue, task, state, priority, run_at, created_at, created_by,
            payload, dedupe_key, max_attempts, timeout, deadline_at, tags, backoff, version)
        select queue_no, id, queue, task,
            (case when run_at <= v_now then 'ready' else 'scheduled' end)::@schema@.execution_state,
            priority, run_at, v_now, v_me, case when not is_large then payload end, key,
            (o).max_attempts, (o).timeout, (o).deadline_at, (o).tags, (o).backoff, version
        from item
        where id = holder
    ), large as (
        insert into @schema@._private_payloads (execution_id, payload)
        select id, payload from item where id = holder and is_large
    )
    select n, holder, id = holder from item;
end $$;

-- One execution, from any SQL client, in its own transaction:
--   select pgconductor.invoke('greet', '{"name": "World"}', priority => 10);
-- Returns the id of the execution that was created, or of the live one that holds the dedupe key.
create or replace function @schema@.invoke(
    task text,
    payload jsonb default '{}',
    queue text default null,
    priority int default 0,
    run_at timestamptz default null,
    delay interval default null,
    dedupe_key text default null,
    timeout interval default null,
    deadline timestamptz default null,
    max_attempts int default null,
    tags text[] default null,
    backoff jsonb default null
) returns uuid
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    select id from @schema@.invoke_many(array[task], array[payload], array[queue], array[priority], array[run_at],
        array[extract(epoch from delay)::double precision], array[dedupe_key],
        array[case when num_nonnulls(timeout, deadline, max_attempts, tags, backoff) > 0 then jsonb_strip_nulls(jsonb_build_object(
            'timeout', extract(epoch from timeout), 'deadline_at', deadline, 'max_attempts', max_attempts, 'tags', tags,
            'backoff', backoff)) end])
$$;
