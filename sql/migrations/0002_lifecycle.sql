-- Cancellation, retention by task, hand-over after a restart, early rescue. Additive: programs of the schema before go on.

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
    add constraint options check (timeout > interval '0' and cardinality(tags) <= 64 and octet_length(cancel_reason) <= 1000),
    add constraint deadline_at_range check (deadline_at between '0001-01-02 00:00:00+00' and '9999-01-01 00:00:00+00');

alter table @schema@._private_finished add column timeout interval;

create type @schema@._private_invoke_options as (max_attempts int, timeout interval, deadline_at timestamptz, tags text[]);

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
