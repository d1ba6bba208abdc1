-- Events, messages and promises: an inbox that is delivered from. Additive: programs of the schema before leave it alone.

-- What was sent, and to be delivered or kept for who comes later. kind and name: an event's name; a message's channel, with the
-- execution it is for; a promise's id, with whose it is. Messages and promises live as long as their execution.
create table @schema@._private_events (
    id bigint generated always as identity primary key,
    kind text not null check (kind in ('event', 'message', 'promise')),
    name text not null check (octet_length(name) between 1 and 128),
    execution_id uuid,
    payload jsonb check (pg_column_size(payload) <= 8388608),
    error jsonb,                        -- of a promise that was rejected
    created_at timestamptz not null,
    created_by oid not null,
    expires_at timestamptz,             -- of an event; who is not waiting by then does not get it
    delivered_at timestamptz,           -- those who waited when it was committed have it
    constraint addressed check ((kind = 'event') = (execution_id is null) and (kind = 'event') = (expires_at is not null))
);
create index _private_events_new on @schema@._private_events (id) where delivered_at is null;
create index _private_events_name on @schema@._private_events (name, id) where kind = 'event';
create index _private_events_to on @schema@._private_events (execution_id, name, id) where kind <> 'event';
create unique index _private_events_promise on @schema@._private_events (name) where kind = 'promise';
create index _private_events_expiry on @schema@._private_events (expires_at) where kind = 'event';

-- Ids that were given out, and not taken back by the end of their execution. Whether one is resolved is in the inbox.
create table @schema@._private_promises (
    id uuid primary key,
    execution_id uuid not null,
    created_at timestamptz not null
);
create index _private_promises_execution on @schema@._private_promises (execution_id);

-- match: what an event must hold. event_id: which one was received, so that it is not received twice.
alter table @schema@._private_waits add column match jsonb, add column event_id bigint;
alter table @schema@._private_steps add column event_id bigint;
create index _private_waits_event on @schema@._private_waits (execution_id, event_id) where event_id is not null;
create index _private_steps_event on @schema@._private_steps (execution_id, event_id) where event_id is not null;

-- Durable channels: what a handler sends, in order, for readers inside and outside. read_upto: how far the furthest reader is; what
-- is beyond it is at most capacity. expires_at: set when the execution has ended, null then for ever.
create table @schema@._private_channels (
    execution_id uuid not null,
    name text not null check (octet_length(name) between 1 and 128),
    capacity int not null check (capacity between 1 and 10000),
    last_seq bigint not null default 0,
    read_upto bigint not null default 0,
    closed_at timestamptz,
    ended_at timestamptz,
    expires_at timestamptz,
    primary key (execution_id, name),
    constraint read check (0 <= read_upto and read_upto <= last_seq)
);
create index _private_channels_expiry on @schema@._private_channels (expires_at) where ended_at is not null;

create table @schema@._private_channel_items (
    execution_id uuid not null,
    channel text not null,
    seq bigint not null,
    value jsonb not null check (pg_column_size(value) <= 8388608),
    primary key (execution_id, channel, seq)
);
