-- Durable execution: what an execution has done (steps) and waits for. Additive: programs of the schema before go on; they
-- claim what has a history too, so a queue should have programs that know steps before tasks with steps are deployed.

alter table @schema@._private_executions
    add column is_durable boolean not null default false,   -- it has rows among the steps or the waits
    add column progress jsonb;                              -- as its handler last told

alter table @schema@._private_finished add column progress jsonb;

-- attempt: in which attempt it was recorded. Within one attempt a handler has to do the same again.
alter table @schema@._private_steps add column attempt int not null default 1;

-- A wait is resolved once, with an outcome: elapsed (a sleep), timed_out, completed, failed or cancelled (a child), received
-- (an event or message), resolved or rejected (a promise). is_seen: the handler, or a process that runs it, has been told.
-- on_close: what becomes of a child that is still live when its parent has ended.
alter table @schema@._private_waits
    add column position int not null default 0,
    add column claim_no bigint not null default 0,
    add column attempt int not null default 1,
    add column outcome text,
    add column is_seen boolean not null default false,
    add column on_close text check (on_close in ('cancel', 'abandon')),
    add constraint resolved_by check ((resolved_at is null) = (outcome is null));
create index _private_waits_open on @schema@._private_waits (execution_id, scope) where resolved_at is null;
create index _private_waits_unseen on @schema@._private_waits (execution_id) where resolved_at is not null and not is_seen;

-- Children to be cancelled, because their parent has ended or asked for it. In a table, since whoever finds out holds locks
-- of its own: see close_children.
create table @schema@._private_closings (
    execution_id uuid primary key,
    reason text not null,
    created_at timestamptz not null
);

-- What a wait of a former life was about, and how it ended, once it is a record among the others.
alter table @schema@._private_steps add column outcome text, add column target text;
