-- What workers have done, as they tell with their heartbeats: what `queue_load` derives rates from. Additive: programs of the
-- schema before tell nothing.

-- Counts and seconds since the process began, so only differences of two of them mean anything; machine_load is of that
-- moment. inserted and deleted: rows of the queue's partition, by the server's statistics at that moment.
create type @schema@._private_load as (
    at timestamptz,
    claims bigint,
    empty_claims bigint,
    short_claims bigint,
    locked_claims bigint,
    claimed bigint,
    ended bigint,
    busy_seconds double precision,
    claim_seconds double precision,
    flush_seconds double precision,
    cpu_seconds double precision,
    machine_load double precision,
    inserted bigint,
    deleted bigint
);

-- The latest, the one that rates are counted from, and the one that they will be counted from next.
alter table @schema@._private_workers
    add column load @schema@._private_load,
    add column next_load @schema@._private_load,
    add column former_load @schema@._private_load;
