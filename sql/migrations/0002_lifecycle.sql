-- Cancellation, retention, hand-over after a restart, early rescue, roles. Additive: programs of the schema before go on.

-- The rules: publish_queues.
alter table @schema@._private_queues
    add column published int unique,    -- in the order of publication: what producers may send to its partition
    add column holders text[],          -- on the way there: the transactions to be waited for
    add column is_announced boolean not null default false;     -- and they are over, and all sessions were told to look again
update @schema@._private_queues set published = no;

-- Tables in the order in which the verbs lock them, so that a verb and this migration do not wait for each other.
alter table @schema@._private_orchestrators
    add column stop_requested_at timestamptz,
    add column has_session boolean not null default false;  -- it holds the session lock of its id: see hold_session

-- Seconds to keep finished executions of a task that no worker ends: null is for ever, 0 or less not at all. keep_failed
-- counts for cancelled ones too.
alter table @schema@._private_tasks
    add column keep_completed double precision default 86400,
    add column keep_failed double precision default 604800;

alter table @schema@._private_executions
    add column created_by oid,          -- the login role that invoked it
    add column backoff jsonb,           -- instead of the task's, as data: {"kind": "exponential", ...}
    add constraint options check (timeout > interval '0' and cardinality(tags) <= 64 and octet_length(cancel_reason) <= 1000),
    add constraint deadline_at_range check (deadline_at between '0001-01-02 00:00:00+00' and '9999-01-01 00:00:00+00');

alter table @schema@._private_finished add column timeout interval, add column backoff jsonb;

create type @schema@._private_invoke_options as (max_attempts int, timeout interval, deadline_at timestamptz, tags text[],
    backoff jsonb);

do $$
declare
    v_no int;
begin
    for v_no in select no from @schema@._private_queues union all select 0 order by 1 loop
        execute format('create index %I on @schema@.%I (owner) where state = ''running'' and cancel_requested_at is not null',
            '_private_queue_' || v_no || '_cancel', '_private_queue_' || v_no);
        execute format('create index %I on @schema@.%I (queue, priority desc, run_at, id) where state = ''ready'' and crashes >= 2',
            '_private_queue_' || v_no || '_suspect', '_private_queue_' || v_no);
    end loop;
end $$;

-- Slots of expiry, all of them, so that no DDL is needed while programs run: what a slot holds is emptied as a whole and
-- the slot is used again (the rules: 11_retention.sql).
--
-- Live programs go on: new partitions are attached, which delays nobody. The two that are there get their indexes
-- last; a flush into one of them waits until that is done, about a second per million rows they hold.

alter table @schema@._private_expiry_slots
    add column is_far boolean not null default false,   -- takes its turn as the one without a bound; the others never do
    add column must_check boolean not null default false,   -- its bound was lowered once: look for rows before emptying
    add column opened_at timestamptz,                   -- of the far one: since when rows come
    add column check_at timestamptz;                    -- of the far one: when to think of closing it

-- What an older program put into slot 1 has every possible expiry: close it at the first opportunity.
update @schema@._private_expiry_slots set is_far = true, must_check = true, opened_at = '2000-01-01', check_at = '2000-01-01'
where no = 1;

-- 2 to 4 are spare far slots; 5 to 41 serve the 33 bounds that are there at any time, and 4 that wait to be emptied.
insert into @schema@._private_expiry_slots (no, expires_upto, is_far, must_check)
select no, '-infinity', no <= 4, no <= 4 from generate_series(2, 41) no;

do $do$
begin
    for v_no in 2..41 loop
        execute format('create table @schema@._private_finished_%1$s (like @schema@._private_finished including defaults
            including constraints, constraint partition_bound check (slot is not null and slot = %1$s))', v_no);
        execute format('create index _private_finished_%1$s_id on @schema@._private_finished_%1$s (id)', v_no);
        execute format('alter table @schema@._private_finished attach partition @schema@._private_finished_%1$s
            for values in (%1$s)', v_no);
        execute format('alter table @schema@._private_finished_%s drop constraint partition_bound', v_no);
    end loop;
    for v_no in 0..41 loop
        -- Rows whose payload is stored aside, and dead letters: neither index costs a completed row of usual size anything.
        execute format('create index _private_finished_%1$s_large on @schema@._private_finished_%1$s (id)
            where payload is null', v_no);
        execute format('create index _private_finished_%1$s_dead on @schema@._private_finished_%1$s (finished_at desc, id desc)
            where state <> ''completed''', v_no);
    end loop;
end $do$;
