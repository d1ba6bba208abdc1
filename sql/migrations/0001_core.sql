-- The tables of the whole system. Later migrations add to them; they do not rebuild them.
--
-- Live executions are list-partitioned by the queue's number, finished ones by the slot of their expiry. Nothing
-- references a partitioned table by foreign key: that would lock every queue when one is registered or dropped.
-- Names are data (any text up to 128 bytes); partitions, indexes and channels are named by numbers and hashes.

create type @schema@.execution_state as enum
    ('scheduled', 'ready', 'running', 'waiting', 'completed', 'failed', 'cancelled');

-- A registered queue. Number 0 is no row: it is the overflow partition of queues nobody has registered yet.
create table @schema@._private_queues (
    no int generated always as identity (maxvalue 1048575) primary key,
    name text not null unique check (octet_length(name) between 1 and 128),
    paused_at timestamptz,
    registered_at timestamptz not null
);

-- What tasks the running programs have, so that a producer in SQL need not know a task's queue.
create table @schema@._private_tasks (
    name text primary key check (octet_length(name) between 1 and 128),
    queue text not null check (octet_length(queue) between 1 and 128),
    registered_at timestamptz not null
);

-- One incarnation of an orchestrator: a row is inserted once, kept alive by UPDATE, never revived. An orchestrator that
-- was declared dead stays as a tombstone for a while, so that a claim it commits late still has a known, dead owner.
create table @schema@._private_orchestrators (
    id uuid primary key,
    name text not null,
    program_version text not null,
    schema_version int not null,
    server_epoch text not null,
    started_at timestamptz not null,
    heartbeat_at timestamptz not null,
    expires_at timestamptz not null,
    died_at timestamptz
);

create table @schema@._private_workers (
    orchestrator_id uuid not null references @schema@._private_orchestrators on delete cascade,
    queue text not null,
    tasks text[] not null,
    concurrency int not null,
    primary key (orchestrator_id, queue)
);

-- Live executions. The token of a claim is (id, claim_no, owner): every write made for a claim tests all three and
-- state = 'running' in its own statement. claim_no never decreases; attempt may (a release gives it back).
create table @schema@._private_executions (
    queue_no int not null,
    priority int not null default 0,
    max_attempts int check (max_attempts between 1 and 10000),
    attempt int not null default 0,
    crashes int not null default 0,
    generation int not null default 0,
    depth int not null default 0,
    state @schema@.execution_state not null,
    id uuid not null,
    owner uuid,
    claim_no bigint not null default 0,
    outcome_claim bigint,               -- the claim that ended last, and how: the answer to a flush sent twice
    run_at timestamptz,                 -- due time; of a waiting one the earliest timeout, null for none
    created_at timestamptz not null,
    claimed_at timestamptz,
    cancel_requested_at timestamptz,
    deadline_at timestamptz,
    timeout interval,
    queue text not null,
    task text not null,
    outcome text,
    dedupe_key text,
    payload jsonb,                      -- null: too large for this row, see _private_payloads
    errors jsonb,                       -- one object per failed attempt, oldest first
    cancel_reason text,
    parent_id uuid,
    root_id uuid,
    wait_name text,                     -- the parent's wait that this execution's end resolves
    on_parent_close text,
    limit_key text,
    version text,
    tags text[],
    headers jsonb,
    constraint live check (state in ('scheduled', 'ready', 'running', 'waiting')),
    constraint owned_while_running check ((state = 'running') = (owner is not null)),
    constraint due check (run_at is not null or state = 'waiting'),
    constraint counts check (0 <= attempt and attempt <= claim_no and 0 <= crashes),
    constraint outcome_known check ((outcome is null) = (outcome_claim is null) and outcome_claim <= claim_no),
    -- Times a client can read whatever its language: Python ends with the year 9999.
    constraint run_at_range check (run_at between '0001-01-02 00:00:00+00' and '9999-01-01 00:00:00+00'),
    constraint names check (octet_length(queue) between 1 and 128 and octet_length(task) between 1 and 128
        and octet_length(dedupe_key) <= 512)
) partition by list (queue_no);

-- Payloads above the threshold of `_private_is_large` live here, so that claiming and finishing never copy them.
create table @schema@._private_payloads (
    execution_id uuid primary key,
    payload jsonb not null check (pg_column_size(payload) <= 8388608)
);

-- At most one live execution per queue, task and key. Rows go in the statement that ends their execution.
create table @schema@._private_dedupe_keys (
    queue text not null,
    task text not null,
    key text not null check (octet_length(key) between 1 and 512),
    execution_id uuid not null,
    primary key (queue, task, key)
);

-- What a durable execution has already done: one row per name, whatever the kind.
create table @schema@._private_steps (
    execution_id uuid not null,
    name text not null check (octet_length(name) between 1 and 128),
    kind text not null,
    position int not null,
    claim_no bigint not null,
    created_at timestamptz not null,
    value jsonb,
    error jsonb,
    primary key (execution_id, name)
);

-- What a parked execution waits for. A plain wait resumes on any of its rows; rows of one scope resume together.
create table @schema@._private_waits (
    execution_id uuid not null,
    name text not null check (octet_length(name) between 1 and 128),
    kind text not null,
    scope text,
    target text,                        -- a child's id, an event's or a promise's name
    due_at timestamptz,
    created_at timestamptz not null,
    resolved_at timestamptz,
    value jsonb,
    error jsonb,
    primary key (execution_id, name)
);
create index _private_waits_target on @schema@._private_waits (kind, target) where resolved_at is null;

-- Slots of expiry: each is one partition of the finished table, to be emptied as a whole once `expires_upto` has
-- passed. Slot 0 is for ever; slot 1 takes what expires later than every other slot.
create table @schema@._private_expiry_slots (
    no int primary key,
    expires_upto timestamptz not null
);
insert into @schema@._private_expiry_slots values (0, 'infinity'), (1, 'infinity');

create table @schema@._private_finished (
    slot int not null,
    priority int not null,
    attempt int not null,
    crashes int not null,
    generation int not null,
    max_attempts int,
    depth int not null,
    state @schema@.execution_state not null,
    id uuid not null,
    owner uuid,                         -- who ended it, with which claim; null: nobody had claimed it
    claim_no bigint not null,
    run_at timestamptz,
    created_at timestamptz not null,
    claimed_at timestamptz,
    finished_at timestamptz not null,
    expires_at timestamptz,             -- null: for ever
    queue text not null,
    task text not null,
    dedupe_key text,
    payload jsonb,
    result jsonb,
    errors jsonb,
    steps jsonb,
    cancel_reason text,
    parent_id uuid,
    root_id uuid,
    limit_key text,
    version text,
    tags text[],
    headers jsonb,
    constraint finished check (state in ('completed', 'failed', 'cancelled')),
    constraint result_of_completed check (result is null or state = 'completed')
) partition by list (slot);

create table @schema@._private_finished_0 partition of @schema@._private_finished for values in (0);
create table @schema@._private_finished_1 partition of @schema@._private_finished for values in (1);
create index _private_finished_0_id on @schema@._private_finished_0 (id);
create index _private_finished_1_id on @schema@._private_finished_1 (id);

-- The overflow partition. Its indexes lead with the queue's name, because it holds many queues.
create table @schema@._private_queue_0 partition of @schema@._private_executions for values in (0)
    with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
create unique index _private_queue_0_id on @schema@._private_queue_0 (id);
create index _private_queue_0_claim on @schema@._private_queue_0 (queue, priority desc, run_at, id) where state = 'ready';
create index _private_queue_0_due on @schema@._private_queue_0 (queue, run_at) where state in ('scheduled', 'waiting');
create index _private_queue_0_owner on @schema@._private_queue_0 (owner) where state = 'running';
