-- What goes on when an execution continues as new. Additive: programs of the schema before go on.

-- first_seq: behind which item the present life of its execution begins. A handler counts its items from there; readers are told
-- numbers that grow through all lives.
alter table @schema@._private_channels
    add column first_seq bigint not null default 0,
    add constraint life check (0 <= first_seq and first_seq <= last_seq);

-- The events and messages that former lives of an execution have received; those of the present life are with its steps and waits.
-- check_at: when maintenance is to look whether the event and the execution are still there.
create table @schema@._private_receipts (
    execution_id uuid not null,
    event_id bigint not null,
    check_at timestamptz not null,
    primary key (execution_id, event_id)
);
create index _private_receipts_check on @schema@._private_receipts (check_at);
