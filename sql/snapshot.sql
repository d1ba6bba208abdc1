-- A fresh install, as the database describes it. Not to be run; a test compares it with the migrations and functions.
-- To write it anew: PGCONDUCTOR_WRITE_SNAPSHOT=1 python -m pytest tests/migrations/test_snapshot.py

type _private_invoke_options as (max_attempts integer, timeout interval, deadline_at timestamp with time zone, tags text[], backoff jsonb)

type _private_load as (at timestamp with time zone, claims bigint, empty_claims bigint, short_claims bigint, locked_claims bigint, claimed bigint, ended bigint, busy_seconds double precision, claim_seconds double precision, flush_seconds double precision, cpu_seconds double precision, machine_load double precision, inserted bigint, deleted bigint)

type execution_state as enum ('scheduled', 'ready', 'running', 'waiting', 'completed', 'failed', 'cancelled')

sequence _private_events_id_seq as bigint

sequence _private_place_0_id as bigint

sequence _private_place_0_key as bigint

sequence _private_place_0_look_at as bigint

sequence _private_place_0_run_at as bigint

sequence _private_place_1_id as bigint

sequence _private_place_1_key as bigint

sequence _private_place_1_look_at as bigint

sequence _private_place_1_run_at as bigint

sequence _private_place_2_id as bigint

sequence _private_place_2_key as bigint

sequence _private_place_2_look_at as bigint

sequence _private_place_2_run_at as bigint

sequence _private_place_3_id as bigint

sequence _private_place_3_key as bigint

sequence _private_place_3_look_at as bigint

sequence _private_place_3_run_at as bigint

sequence _private_place_4_id as bigint

sequence _private_place_4_key as bigint

sequence _private_place_4_look_at as bigint

sequence _private_place_4_run_at as bigint

sequence _private_place_5_id as bigint

sequence _private_place_5_key as bigint

sequence _private_place_5_look_at as bigint

sequence _private_place_5_run_at as bigint

sequence _private_place_6_id as bigint

sequence _private_place_6_key as bigint

sequence _private_place_6_look_at as bigint

sequence _private_place_6_run_at as bigint

sequence _private_place_7_id as bigint

sequence _private_place_7_key as bigint

sequence _private_place_7_look_at as bigint

sequence _private_place_7_run_at as bigint

sequence _private_queues_no_seq as integer

table _private_channel_items
    execution_id uuid not null
    channel text not null
    seq bigint not null
    value jsonb not null
    constraint _private_channel_items_pkey PRIMARY KEY (execution_id, channel, seq)
    constraint _private_channel_items_value_check CHECK ((pg_column_size(value) <= 8388608))

table _private_channels
    execution_id uuid not null
    name text not null
    capacity integer not null
    last_seq bigint not null default 0
    read_upto bigint not null default 0
    closed_at timestamp with time zone
    ended_at timestamp with time zone
    expires_at timestamp with time zone
    first_seq bigint not null default 0
    constraint _private_channels_capacity_check CHECK (((capacity >= 1) AND (capacity <= 10000)))
    constraint _private_channels_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 128)))
    constraint _private_channels_pkey PRIMARY KEY (execution_id, name)
    constraint life CHECK (((0 <= first_seq) AND (first_seq <= last_seq)))
    constraint read CHECK (((0 <= read_upto) AND (read_upto <= last_seq)))
    CREATE INDEX _private_channels_expiry ON _private_channels USING btree (expires_at) WHERE (ended_at IS NOT NULL)

table _private_closings
    execution_id uuid not null
    reason text not null
    created_at timestamp with time zone not null
    constraint _private_closings_pkey PRIMARY KEY (execution_id)

table _private_dedupe_keys
    queue text not null
    task text not null
    key text not null
    execution_id uuid not null
    constraint _private_dedupe_keys_key_check CHECK (((octet_length(key) >= 1) AND (octet_length(key) <= 512)))
    constraint _private_dedupe_keys_pkey PRIMARY KEY (queue, task, key)

table _private_events
    id bigint generated always as identity not null
    kind text not null
    name text not null
    execution_id uuid
    payload jsonb
    error jsonb
    created_at timestamp with time zone not null
    created_by oid not null
    expires_at timestamp with time zone
    delivered_at timestamp with time zone
    constraint _private_events_kind_check CHECK ((kind = ANY (ARRAY['event'::text, 'message'::text, 'promise'::text])))
    constraint _private_events_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 128)))
    constraint _private_events_payload_check CHECK ((pg_column_size(payload) <= 8388608))
    constraint _private_events_pkey PRIMARY KEY (id)
    constraint addressed CHECK ((((kind = 'event'::text) = (execution_id IS NULL)) AND ((kind = 'event'::text) = (expires_at IS NOT NULL))))
    CREATE INDEX _private_events_expiry ON _private_events USING btree (expires_at) WHERE (kind = 'event'::text)
    CREATE INDEX _private_events_name ON _private_events USING btree (name, id) WHERE (kind = 'event'::text)
    CREATE INDEX _private_events_new ON _private_events USING btree (id) WHERE (delivered_at IS NULL)
    CREATE UNIQUE INDEX _private_events_promise ON _private_events USING btree (name) WHERE (kind = 'promise'::text)
    CREATE INDEX _private_events_to ON _private_events USING btree (execution_id, name, id) WHERE (kind <> 'event'::text)

table _private_executions partition by LIST (queue_no)
    queue_no integer not null
    priority integer not null default 0
    max_attempts integer
    attempt integer not null default 0
    crashes integer not null default 0
    generation integer not null default 0
    depth integer not null default 0
    state execution_state not null
    id uuid not null
    owner uuid
    claim_no bigint not null default 0
    outcome_claim bigint
    run_at timestamp with time zone
    created_at timestamp with time zone not null
    claimed_at timestamp with time zone
    cancel_requested_at timestamp with time zone
    deadline_at timestamp with time zone
    timeout interval
    queue text not null
    task text not null
    outcome text
    dedupe_key text
    payload jsonb
    errors jsonb
    cancel_reason text
    parent_id uuid
    root_id uuid
    wait_name text
    on_parent_close text
    limit_key text
    version text
    tags text[]
    headers jsonb
    created_by oid
    backoff jsonb
    is_durable boolean not null default false
    progress jsonb
    constraint _private_executions_max_attempts_check CHECK (((max_attempts >= 1) AND (max_attempts <= 10000)))
    constraint counts CHECK (((0 <= attempt) AND (attempt <= claim_no) AND (0 <= crashes)))
    constraint deadline_at_range CHECK (((deadline_at >= '0001-01-02 00:00:00+00'::timestamp with time zone) AND (deadline_at <= '9999-01-01 00:00:00+00'::timestamp with time zone)))
    constraint due CHECK (((run_at IS NOT NULL) OR (state = 'waiting'::execution_state)))
    constraint live CHECK ((state = ANY (ARRAY['scheduled'::execution_state, 'ready'::execution_state, 'running'::execution_state, 'waiting'::execution_state])))
    constraint names CHECK ((((octet_length(queue) >= 1) AND (octet_length(queue) <= 128)) AND ((octet_length(task) >= 1) AND (octet_length(task) <= 128)) AND (octet_length(dedupe_key) <= 512)))
    constraint options CHECK (((timeout > '00:00:00'::interval) AND (cardinality(tags) <= 64) AND (octet_length(cancel_reason) <= 1000)))
    constraint outcome_known CHECK ((((outcome IS NULL) = (outcome_claim IS NULL)) AND (outcome_claim <= claim_no)))
    constraint owned_while_running CHECK (((state = 'running'::execution_state) = (owner IS NOT NULL)))
    constraint run_at_range CHECK (((run_at >= '0001-01-02 00:00:00+00'::timestamp with time zone) AND (run_at <= '9999-01-01 00:00:00+00'::timestamp with time zone)))
    CREATE TRIGGER _private_announce AFTER INSERT ON _private_executions FOR EACH ROW EXECUTE FUNCTION _private_on_insert()
    partition _private_queue_0 FOR VALUES IN (0) with (autovacuum_vacuum_scale_factor=0.02, autovacuum_vacuum_threshold=1000)
    CREATE INDEX _private_queue_0_cancel ON _private_queue_0 USING btree (owner) WHERE ((state = 'running'::execution_state) AND (cancel_requested_at IS NOT NULL))
    CREATE INDEX _private_queue_0_claim ON _private_queue_0 USING btree (queue, priority DESC, run_at, id) WHERE (state = 'ready'::execution_state)
    CREATE INDEX _private_queue_0_due ON _private_queue_0 USING btree (queue, run_at) WHERE (state = ANY (ARRAY['scheduled'::execution_state, 'waiting'::execution_state]))
    CREATE UNIQUE INDEX _private_queue_0_id ON _private_queue_0 USING btree (id)
    CREATE INDEX _private_queue_0_owner ON _private_queue_0 USING btree (owner) WHERE (state = 'running'::execution_state)
    CREATE INDEX _private_queue_0_suspect ON _private_queue_0 USING btree (queue, priority DESC, run_at, id) WHERE ((state = 'ready'::execution_state) AND (crashes >= 2))

table _private_expiry_slots
    no integer not null
    expires_upto timestamp with time zone not null
    is_far boolean not null default false
    must_check boolean not null default false
    opened_at timestamp with time zone
    check_at timestamp with time zone
    constraint _private_expiry_slots_pkey PRIMARY KEY (no)

table _private_finished partition by LIST (slot)
    slot integer not null
    priority integer not null
    attempt integer not null
    crashes integer not null
    generation integer not null
    max_attempts integer
    depth integer not null
    state execution_state not null
    id uuid not null
    owner uuid
    claim_no bigint not null
    run_at timestamp with time zone
    created_at timestamp with time zone not null
    claimed_at timestamp with time zone
    finished_at timestamp with time zone not null
    expires_at timestamp with time zone
    queue text not null
    task text not null
    dedupe_key text
    payload jsonb
    result jsonb
    errors jsonb
    steps jsonb
    cancel_reason text
    parent_id uuid
    root_id uuid
    limit_key text
    version text
    tags text[]
    headers jsonb
    timeout interval
    backoff jsonb
    progress jsonb
    constraint finished CHECK ((state = ANY (ARRAY['completed'::execution_state, 'failed'::execution_state, 'cancelled'::execution_state])))
    constraint result_of_completed CHECK (((result IS NULL) OR (state = 'completed'::execution_state)))
    partition _private_finished_0 FOR VALUES IN (0)
    partition _private_finished_1 FOR VALUES IN (1)
    partition _private_finished_2 FOR VALUES IN (2)
    partition _private_finished_3 FOR VALUES IN (3)
    partition _private_finished_4 FOR VALUES IN (4)
    partition _private_finished_5 FOR VALUES IN (5)
    partition _private_finished_6 FOR VALUES IN (6)
    partition _private_finished_7 FOR VALUES IN (7)
    partition _private_finished_8 FOR VALUES IN (8)
    partition _private_finished_9 FOR VALUES IN (9)
    partition _private_finished_10 FOR VALUES IN (10)
    partition _private_finished_11 FOR VALUES IN (11)
    partition _private_finished_12 FOR VALUES IN (12)
    partition _private_finished_13 FOR VALUES IN (13)
    partition _private_finished_14 FOR VALUES IN (14)
    partition _private_finished_15 FOR VALUES IN (15)
    partition _private_finished_16 FOR VALUES IN (16)
    partition _private_finished_17 FOR VALUES IN (17)
    partition _private_finished_18 FOR VALUES IN (18)
    partition _private_finished_19 FOR VALUES IN (19)
    partition _private_finished_20 FOR VALUES IN (20)
    partition _private_finished_21 FOR VALUES IN (21)
    partition _private_finished_22 FOR VALUES IN (22)
    partition _private_finished_23 FOR VALUES IN (23)
    partition _private_finished_24 FOR VALUES IN (24)
    partition _private_finished_25 FOR VALUES IN (25)
    partition _private_finished_26 FOR VALUES IN (26)
    partition _private_finished_27 FOR VALUES IN (27)
    partition _private_finished_28 FOR VALUES IN (28)
    partition _private_finished_29 FOR VALUES IN (29)
    partition _private_finished_30 FOR VALUES IN (30)
    partition _private_finished_31 FOR VALUES IN (31)
    partition _private_finished_32 FOR VALUES IN (32)
    partition _private_finished_33 FOR VALUES IN (33)
    partition _private_finished_34 FOR VALUES IN (34)
    partition _private_finished_35 FOR VALUES IN (35)
    partition _private_finished_36 FOR VALUES IN (36)
    partition _private_finished_37 FOR VALUES IN (37)
    partition _private_finished_38 FOR VALUES IN (38)
    partition _private_finished_39 FOR VALUES IN (39)
    partition _private_finished_40 FOR VALUES IN (40)
    partition _private_finished_41 FOR VALUES IN (41)
    CREATE INDEX _private_finished_0_dead ON _private_finished_0 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_0_id ON _private_finished_0 USING btree (id)
    CREATE INDEX _private_finished_0_large ON _private_finished_0 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_10_dead ON _private_finished_10 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_10_id ON _private_finished_10 USING btree (id)
    CREATE INDEX _private_finished_10_large ON _private_finished_10 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_11_dead ON _private_finished_11 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_11_id ON _private_finished_11 USING btree (id)
    CREATE INDEX _private_finished_11_large ON _private_finished_11 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_12_dead ON _private_finished_12 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_12_id ON _private_finished_12 USING btree (id)
    CREATE INDEX _private_finished_12_large ON _private_finished_12 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_13_dead ON _private_finished_13 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_13_id ON _private_finished_13 USING btree (id)
    CREATE INDEX _private_finished_13_large ON _private_finished_13 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_14_dead ON _private_finished_14 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_14_id ON _private_finished_14 USING btree (id)
    CREATE INDEX _private_finished_14_large ON _private_finished_14 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_15_dead ON _private_finished_15 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_15_id ON _private_finished_15 USING btree (id)
    CREATE INDEX _private_finished_15_large ON _private_finished_15 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_16_dead ON _private_finished_16 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_16_id ON _private_finished_16 USING btree (id)
    CREATE INDEX _private_finished_16_large ON _private_finished_16 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_17_dead ON _private_finished_17 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_17_id ON _private_finished_17 USING btree (id)
    CREATE INDEX _private_finished_17_large ON _private_finished_17 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_18_dead ON _private_finished_18 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_18_id ON _private_finished_18 USING btree (id)
    CREATE INDEX _private_finished_18_large ON _private_finished_18 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_19_dead ON _private_finished_19 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_19_id ON _private_finished_19 USING btree (id)
    CREATE INDEX _private_finished_19_large ON _private_finished_19 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_1_dead ON _private_finished_1 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_1_id ON _private_finished_1 USING btree (id)
    CREATE INDEX _private_finished_1_large ON _private_finished_1 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_20_dead ON _private_finished_20 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_20_id ON _private_finished_20 USING btree (id)
    CREATE INDEX _private_finished_20_large ON _private_finished_20 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_21_dead ON _private_finished_21 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_21_id ON _private_finished_21 USING btree (id)
    CREATE INDEX _private_finished_21_large ON _private_finished_21 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_22_dead ON _private_finished_22 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_22_id ON _private_finished_22 USING btree (id)
    CREATE INDEX _private_finished_22_large ON _private_finished_22 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_23_dead ON _private_finished_23 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_23_id ON _private_finished_23 USING btree (id)
    CREATE INDEX _private_finished_23_large ON _private_finished_23 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_24_dead ON _private_finished_24 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_24_id ON _private_finished_24 USING btree (id)
    CREATE INDEX _private_finished_24_large ON _private_finished_24 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_25_dead ON _private_finished_25 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_25_id ON _private_finished_25 USING btree (id)
    CREATE INDEX _private_finished_25_large ON _private_finished_25 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_26_dead ON _private_finished_26 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_26_id ON _private_finished_26 USING btree (id)
    CREATE INDEX _private_finished_26_large ON _private_finished_26 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_27_dead ON _private_finished_27 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_27_id ON _private_finished_27 USING btree (id)
    CREATE INDEX _private_finished_27_large ON _private_finished_27 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_28_dead ON _private_finished_28 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_28_id ON _private_finished_28 USING btree (id)
    CREATE INDEX _private_finished_28_large ON _private_finished_28 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_29_dead ON _private_finished_29 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_29_id ON _private_finished_29 USING btree (id)
    CREATE INDEX _private_finished_29_large ON _private_finished_29 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_2_dead ON _private_finished_2 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_2_id ON _private_finished_2 USING btree (id)
    CREATE INDEX _private_finished_2_large ON _private_finished_2 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_30_dead ON _private_finished_30 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_30_id ON _private_finished_30 USING btree (id)
    CREATE INDEX _private_finished_30_large ON _private_finished_30 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_31_dead ON _private_finished_31 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_31_id ON _private_finished_31 USING btree (id)
    CREATE INDEX _private_finished_31_large ON _private_finished_31 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_32_dead ON _private_finished_32 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_32_id ON _private_finished_32 USING btree (id)
    CREATE INDEX _private_finished_32_large ON _private_finished_32 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_33_dead ON _private_finished_33 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_33_id ON _private_finished_33 USING btree (id)
    CREATE INDEX _private_finished_33_large ON _private_finished_33 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_34_dead ON _private_finished_34 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_34_id ON _private_finished_34 USING btree (id)
    CREATE INDEX _private_finished_34_large ON _private_finished_34 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_35_dead ON _private_finished_35 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_35_id ON _private_finished_35 USING btree (id)
    CREATE INDEX _private_finished_35_large ON _private_finished_35 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_36_dead ON _private_finished_36 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_36_id ON _private_finished_36 USING btree (id)
    CREATE INDEX _private_finished_36_large ON _private_finished_36 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_37_dead ON _private_finished_37 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_37_id ON _private_finished_37 USING btree (id)
    CREATE INDEX _private_finished_37_large ON _private_finished_37 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_38_dead ON _private_finished_38 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_38_id ON _private_finished_38 USING btree (id)
    CREATE INDEX _private_finished_38_large ON _private_finished_38 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_39_dead ON _private_finished_39 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_39_id ON _private_finished_39 USING btree (id)
    CREATE INDEX _private_finished_39_large ON _private_finished_39 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_3_dead ON _private_finished_3 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_3_id ON _private_finished_3 USING btree (id)
    CREATE INDEX _private_finished_3_large ON _private_finished_3 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_40_dead ON _private_finished_40 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_40_id ON _private_finished_40 USING btree (id)
    CREATE INDEX _private_finished_40_large ON _private_finished_40 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_41_dead ON _private_finished_41 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_41_id ON _private_finished_41 USING btree (id)
    CREATE INDEX _private_finished_41_large ON _private_finished_41 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_4_dead ON _private_finished_4 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_4_id ON _private_finished_4 USING btree (id)
    CREATE INDEX _private_finished_4_large ON _private_finished_4 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_5_dead ON _private_finished_5 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_5_id ON _private_finished_5 USING btree (id)
    CREATE INDEX _private_finished_5_large ON _private_finished_5 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_6_dead ON _private_finished_6 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_6_id ON _private_finished_6 USING btree (id)
    CREATE INDEX _private_finished_6_large ON _private_finished_6 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_7_dead ON _private_finished_7 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_7_id ON _private_finished_7 USING btree (id)
    CREATE INDEX _private_finished_7_large ON _private_finished_7 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_8_dead ON _private_finished_8 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_8_id ON _private_finished_8 USING btree (id)
    CREATE INDEX _private_finished_8_large ON _private_finished_8 USING btree (id) WHERE (payload IS NULL)
    CREATE INDEX _private_finished_9_dead ON _private_finished_9 USING btree (finished_at DESC, id DESC) WHERE (state <> 'completed'::execution_state)
    CREATE INDEX _private_finished_9_id ON _private_finished_9 USING btree (id)
    CREATE INDEX _private_finished_9_large ON _private_finished_9 USING btree (id) WHERE (payload IS NULL)

table _private_migrations
    no integer not null
    name text not null
    breaking boolean not null
    applied_at timestamp with time zone not null default now()
    constraint _private_migrations_pkey PRIMARY KEY (no)

table _private_orchestrators
    id uuid not null
    name text not null
    program_version text not null
    schema_version integer not null
    server_epoch text not null
    started_at timestamp with time zone not null
    heartbeat_at timestamp with time zone not null
    expires_at timestamp with time zone not null
    died_at timestamp with time zone
    stop_requested_at timestamp with time zone
    has_session boolean not null default false
    constraint _private_orchestrators_pkey PRIMARY KEY (id)

table _private_payloads
    execution_id uuid not null
    payload jsonb not null
    constraint _private_payloads_payload_check CHECK ((pg_column_size(payload) <= 8388608))
    constraint _private_payloads_pkey PRIMARY KEY (execution_id)

table _private_promises
    id uuid not null
    execution_id uuid not null
    created_at timestamp with time zone not null
    constraint _private_promises_pkey PRIMARY KEY (id)
    CREATE INDEX _private_promises_execution ON _private_promises USING btree (execution_id)

table _private_queues
    no integer generated always as identity not null
    name text not null
    paused_at timestamp with time zone
    registered_at timestamp with time zone not null
    published integer
    holders text[]
    is_announced boolean not null default false
    constraint _private_queues_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 128)))
    constraint _private_queues_name_key UNIQUE (name)
    constraint _private_queues_pkey PRIMARY KEY (no)
    constraint _private_queues_published_key UNIQUE (published)

table _private_receipts
    execution_id uuid not null
    event_id bigint not null
    check_at timestamp with time zone not null
    constraint _private_receipts_pkey PRIMARY KEY (execution_id, event_id)
    CREATE INDEX _private_receipts_check ON _private_receipts USING btree (check_at)

table _private_schema
    only_row boolean not null default true
    functions_hash text
    functions_version integer not null default 0
    constraint _private_schema_only_row_check CHECK (only_row)
    constraint _private_schema_pkey PRIMARY KEY (only_row)

table _private_steps
    execution_id uuid not null
    name text not null
    kind text not null
    position integer not null
    claim_no bigint not null
    created_at timestamp with time zone not null
    value jsonb
    error jsonb
    attempt integer not null default 1
    outcome text
    target text
    event_id bigint
    constraint _private_steps_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 128)))
    constraint _private_steps_pkey PRIMARY KEY (execution_id, name)
    CREATE INDEX _private_steps_event ON _private_steps USING btree (execution_id, event_id) WHERE (event_id IS NOT NULL)

table _private_tasks
    name text not null
    queue text not null
    registered_at timestamp with time zone not null
    keep_completed double precision default 86400
    keep_failed double precision default 604800
    constraint _private_tasks_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 128)))
    constraint _private_tasks_pkey PRIMARY KEY (name)
    constraint _private_tasks_queue_check CHECK (((octet_length(queue) >= 1) AND (octet_length(queue) <= 128)))

table _private_waits
    execution_id uuid not null
    name text not null
    kind text not null
    scope text
    target text
    due_at timestamp with time zone
    created_at timestamp with time zone not null
    resolved_at timestamp with time zone
    value jsonb
    error jsonb
    position integer not null default 0
    claim_no bigint not null default 0
    attempt integer not null default 1
    outcome text
    is_seen boolean not null default false
    on_close text
    match jsonb
    event_id bigint
    constraint _private_waits_name_check CHECK (((octet_length(name) >= 1) AND (octet_length(name) <= 128)))
    constraint _private_waits_on_close_check CHECK ((on_close = ANY (ARRAY['cancel'::text, 'abandon'::text])))
    constraint _private_waits_pkey PRIMARY KEY (execution_id, name)
    constraint resolved_by CHECK (((resolved_at IS NULL) = (outcome IS NULL)))
    CREATE INDEX _private_waits_event ON _private_waits USING btree (execution_id, event_id) WHERE (event_id IS NOT NULL)
    CREATE INDEX _private_waits_open ON _private_waits USING btree (execution_id, scope) WHERE (resolved_at IS NULL)
    CREATE INDEX _private_waits_target ON _private_waits USING btree (kind, target) WHERE (resolved_at IS NULL)
    CREATE INDEX _private_waits_unseen ON _private_waits USING btree (execution_id) WHERE ((resolved_at IS NOT NULL) AND (NOT is_seen))

table _private_workers
    orchestrator_id uuid not null
    queue text not null
    tasks text[] not null
    concurrency integer not null
    load _private_load
    next_load _private_load
    former_load _private_load
    constraint _private_workers_orchestrator_id_fkey FOREIGN KEY (orchestrator_id) REFERENCES _private_orchestrators(id) ON DELETE CASCADE
    constraint _private_workers_pkey PRIMARY KEY (orchestrator_id, queue)

view _private_records
    execution_id uuid
    name text
    kind text
    position integer
    claim_no bigint
    attempt integer
    created_at timestamp with time zone
    resolved_at timestamp with time zone
    due_at timestamp with time zone
    outcome text
    target text
    scope text
    event_id bigint
    value jsonb
    error jsonb

view autoscaling
    queue text
    ready bigint
    oldest_ready double precision
    running bigint
    workers bigint
    capacity bigint
    busy double precision
    wanted_capacity bigint

view execution_status
    id uuid
    queue text
    task text
    state execution_state
    priority integer
    attempt integer
    max_attempts integer
    crashes integer
    generation integer
    run_at timestamp with time zone
    created_at timestamp with time zone
    claimed_at timestamp with time zone
    finished_at timestamp with time zone
    expires_at timestamp with time zone
    timeout interval
    deadline_at timestamp with time zone
    cancel_requested_at timestamp with time zone
    cancel_reason text
    tags text[]
    error_type text

view executions
    id uuid
    queue text
    task text
    state execution_state
    priority integer
    attempt integer
    crashes integer
    run_at timestamp with time zone
    created_at timestamp with time zone
    claimed_at timestamp with time zone
    finished_at timestamp with time zone
    dedupe_key text
    payload jsonb
    result jsonb
    errors jsonb
    claim_no bigint
    max_attempts integer
    generation integer
    timeout interval
    deadline_at timestamp with time zone
    tags text[]
    cancel_requested_at timestamp with time zone
    cancel_reason text
    expires_at timestamp with time zone

function _private_add_error(p_errors jsonb, p_error jsonb, p_attempt integer, p_now timestamp with time zone) returns jsonb language sql stable parallel safe
function _private_advance_slots(p_now timestamp with time zone) returns integer language plpgsql set search_path=pg_catalog, pg_temp
function _private_announce(p_queue text) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_begin_anew(p_id uuid, p_from_step text) returns TABLE(id uuid, task text) language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_bucket(p_id uuid) returns integer language sql immutable parallel safe strict
function _private_cancel(p_ids uuid[], p_reason text) returns TABLE(id uuid, status text) language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_channel(p_queue text) returns text language sql immutable parallel safe strict
function _private_check_role(p_kind text, p_role text) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_check_version(p_schema_version integer) returns void language plpgsql set search_path=pg_catalog, pg_temp set lock_timeout=2s
function _private_clock() returns timestamp with time zone language sql parallel safe
function _private_control_channel(p_owner uuid) returns text language sql immutable parallel safe strict
function _private_define_partition(p_no integer) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_depth(p_no integer, p_queue text, p_tasks text[], p_limit integer, p_now timestamp with time zone) returns TABLE(ready bigint, oldest timestamp with time zone, running bigint, looked bigint, unserved bigint, unserved_tasks text[]) language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set enable_bitmapscan=off set jit=off
function _private_doctor() returns jsonb language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_empty_slot(p_no integer, p_must_check boolean, p_now timestamp with time zone, p_wait boolean) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set lock_timeout=100ms
function _private_end(p_no integer, p_ids uuid[], p_state text, p_reason text, p_now timestamp with time zone) returns TABLE(id uuid, parent_id uuid) language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_errands_channel() returns text language sql immutable parallel safe
function _private_expiry_slot(p_keep double precision, p_now timestamp with time zone) returns integer language sql stable set search_path=pg_catalog, pg_temp
function _private_finish_0(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[], p_keeps double precision[]) returns uuid[] language plpgsql set search_path=pg_catalog, pg_temp set plan_cache_mode=force_generic_plan set enable_seqscan=off set jit=off set enable_hashjoin=off set enable_mergejoin=off
function _private_first_id(p_at timestamp with time zone) returns uuid language sql immutable parallel safe strict
function _private_flush_0(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[], p_delays double precision[], p_keeps double precision[], p_crashes integer) returns TABLE(id uuid, is_ended boolean, requeued_queue text, parent_id uuid) language plpgsql set search_path=pg_catalog, pg_temp set plan_cache_mode=force_generic_plan set enable_seqscan=off set jit=off set enable_hashjoin=off set enable_mergejoin=off
function _private_flush_partition(p_queue_no integer, p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[], p_delays double precision[], p_keeps double precision[], p_crashes integer) returns TABLE(id uuid, is_ended boolean, requeued_queue text, parent_id uuid) language plpgsql set search_path=pg_catalog, pg_temp
function _private_forget_channels(p_now timestamp with time zone, p_limit integer) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_forget_events(p_now timestamp with time zone, p_limit integer) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_forget_failures(p_ids uuid[]) returns void language sql set search_path=pg_catalog, pg_temp
function _private_forget_receipts(p_now timestamp with time zone, p_limit integer) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_grant_rights(p_no integer DEFAULT NULL::integer) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_has_received(p_execution_id uuid, p_event_id bigint) returns SETOF bigint language sql stable
function _private_history(p_id uuid) returns jsonb language sql stable set search_path=pg_catalog, pg_temp
function _private_hold(p_owner uuid, p_ids uuid[], p_claim_nos bigint[]) returns TABLE(id uuid, attempt integer, depth integer, root_id uuid, deadline_at timestamp with time zone) language plpgsql set search_path=pg_catalog, pg_temp
function _private_hold_0(p_owner uuid, p_ids uuid[], p_claim_nos bigint[]) returns TABLE(id uuid, attempt integer, depth integer, root_id uuid, deadline_at timestamp with time zone) language plpgsql set search_path=pg_catalog, pg_temp set plan_cache_mode=force_generic_plan set enable_seqscan=off set jit=off set enable_hashjoin=off set enable_mergejoin=off
function _private_is_any(p_kinds text[]) returns boolean language sql stable set search_path=pg_catalog, pg_temp
function _private_is_large(p_payload jsonb) returns boolean language sql immutable parallel safe strict
function _private_is_live(p_id uuid, p_creator oid) returns boolean language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_is_resumable(p_id uuid) returns boolean language sql stable set search_path=pg_catalog, pg_temp
function _private_keep_failed(p_task text) returns double precision language sql stable set search_path=pg_catalog, pg_temp
function _private_keep_receipts(p_ids uuid[], p_now timestamp with time zone) returns void language sql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_key_e(p_kind text, p_name text, p_execution_id uuid) returns bigint language sql immutable parallel safe
function _private_key_gate() returns bigint language sql immutable parallel safe
function _private_key_k(p_queue text) returns bigint language sql immutable parallel safe strict
function _private_key_l(p_queue text) returns bigint language sql immutable parallel safe strict
function _private_key_m(p_queue text) returns bigint language sql immutable parallel safe strict
function _private_key_maintenance() returns bigint language sql immutable parallel safe
function _private_key_o(p_owner uuid) returns bigint language sql immutable parallel safe strict
function _private_key_w(p_bucket integer) returns bigint language sql immutable parallel safe strict
function _private_kind_operator() returns text language sql immutable
function _private_kind_producer() returns text language sql immutable
function _private_kind_viewer() returns text language sql immutable
function _private_kind_worker() returns text language sql immutable
function _private_loaded_queues() returns SETOF text language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_lock_executions(p_ids uuid[], p_wait boolean) returns uuid[] language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_lock_family(p_ids uuid[], p_always boolean DEFAULT false) returns void language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_long_look() returns interval language sql immutable parallel safe
function _private_made_at(p_id uuid) returns timestamp with time zone language sql immutable parallel safe strict
function _private_may_cancel_all() returns boolean language sql stable
function _private_may_wake(p_queue text) returns boolean language sql
function _private_new_id(p_queue_no integer, p_now timestamp with time zone) returns uuid language sql parallel safe
function _private_nobody_sleeps(p_queue text) returns boolean language sql
function _private_note_loads(p_id uuid, p_loads jsonb, p_now timestamp with time zone) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_note_look(p_key bigint, p_look_at timestamp with time zone) returns bigint language sql
function _private_note_place(p_key bigint, p_run_at timestamp with time zone, p_id uuid) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_notify(p_channel text, p_payload text) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_notify_results(p_ids uuid[]) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_on_insert() returns trigger language plpgsql set search_path=pg_catalog, pg_temp
function _private_options(p_options jsonb, p_now timestamp with time zone) returns _private_invoke_options language plpgsql stable set search_path=pg_catalog, pg_temp
function _private_orphans_0() returns TABLE(owner uuid, crashes integer) language plpgsql stable set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_place(p_key bigint, p_part text) returns regclass language sql stable strict
function _private_promote(p_queue text, p_queue_no integer, p_now timestamp with time zone, p_limit integer) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_put(p_kind text, p_name text, p_execution_id uuid, p_payload jsonb, p_error jsonb, p_retention double precision) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_queue_no(p_id uuid) returns integer language sql immutable parallel safe strict
function _private_read_place(p_key bigint, p_like uuid, OUT run_at timestamp with time zone, OUT id uuid, OUT look_at timestamp with time zone) returns record language plpgsql set search_path=pg_catalog, pg_temp
function _private_receipt_check(p_expires_at timestamp with time zone, p_now timestamp with time zone) returns timestamp with time zone language sql immutable parallel safe
function _private_receive(p_ids uuid[], p_names text[], p_due timestamp with time zone, p_is_seen boolean) returns uuid[] language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_receive_due(p_ids uuid[], p_now timestamp with time zone) returns void language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_receivers(p_id bigint) returns SETOF uuid language sql stable set search_path=pg_catalog, pg_temp
function _private_refuse_payload() returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_remove_large(p_no integer, p_now timestamp with time zone, p_limit integer, p_bytes bigint) returns bigint language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_require_alive(p_owner uuid, p_now timestamp with time zone) returns void language plpgsql set search_path=pg_catalog, pg_temp
function _private_results_channel() returns text language sql immutable parallel safe
function _private_rights() returns TABLE(object text, kinds text[], as_owner boolean) language sql immutable set search_path=pg_catalog, pg_temp
function _private_server_epoch() returns text language sql stable
function _private_settle(p_ids uuid[], p_now timestamp with time zone) returns TABLE(execution_id uuid, name text, outcome text, value text, error text) language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_settle_promise(p_id uuid, p_value jsonb, p_error jsonb) returns text language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_task_key(p_task text, p_version text) returns text language sql immutable parallel safe
function _private_trailing_failures(p_ids uuid[]) returns TABLE(execution_id uuid, name text) language sql stable set search_path=pg_catalog, pg_temp
function _private_try_lock(p_id uuid) returns boolean language plpgsql set search_path=pg_catalog, pg_temp
function _private_wake(p_ids uuid[]) returns text[] language plpgsql set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function _private_wanted_bounds(p_now timestamp with time zone) returns SETOF timestamp with time zone language sql immutable set search_path=pg_catalog, pg_temp
function append_items(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_channels text[], p_seqs bigint[], p_values jsonb[]) returns TABLE(n integer, status text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function become_lookout(p_queue text, p_is_up boolean) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function cancel(p_ids uuid[], p_reason text DEFAULT NULL::text) returns TABLE(id uuid, status text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function cancel_matching(p_reason text DEFAULT NULL::text, p_limit integer DEFAULT 1000, p_queue text DEFAULT NULL::text, p_task text DEFAULT NULL::text, p_states text[] DEFAULT NULL::text[], p_tags text[] DEFAULT NULL::text[], p_created_before timestamp with time zone DEFAULT NULL::timestamp with time zone) returns TABLE(cancelled bigint, requested bigint) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function claim(p_queue text, p_owner uuid, p_tasks text[], p_limit integer, p_versions text[] DEFAULT NULL::text[]) returns TABLE(id uuid, claim_no bigint, task text, attempt integer, max_attempts integer, payload text, waited double precision, timeout double precision, deadline_in double precision, backoff text, due_in double precision, parent_id uuid, version text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function claim_suspect(p_queue text, p_owner uuid, p_tasks text[], p_versions text[] DEFAULT NULL::text[]) returns TABLE(id uuid, claim_no bigint, task text, attempt integer, max_attempts integer, payload text, waited double precision, timeout double precision, deadline_in double precision, backoff text, due_in double precision, parent_id uuid, version text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function close_channel(p_owner uuid, p_id uuid, p_claim_no bigint, p_name text) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function close_children(p_limit integer DEFAULT 1000) returns bigint language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off set lock_timeout=1s
function continue_as_new(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_lives jsonb[]) returns TABLE(id uuid, status text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off set lock_timeout=1s
function dead_letters(p_queue text DEFAULT NULL::text, p_task text DEFAULT NULL::text, p_limit integer DEFAULT 100, p_after_finished_at timestamp with time zone DEFAULT NULL::timestamp with time zone, p_after_id uuid DEFAULT NULL::uuid, p_states text[] DEFAULT '{failed,cancelled}'::text[]) returns TABLE(id uuid, queue text, task text, state text, attempts integer, crashes integer, generation integer, created_at timestamp with time zone, finished_at timestamp with time zone, expires_at timestamp with time zone, dedupe_key text, error jsonb, reason text) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set plan_cache_mode=force_custom_plan set enable_seqscan=off set jit=off set enable_bitmapscan=off
function deliver_events(p_after bigint DEFAULT 0, p_limit integer DEFAULT 200) returns TABLE(upto bigint, delivered bigint, is_left boolean) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off set lock_timeout=500ms
function drain_wait(p_queue text, p_tasks text[], p_horizon double precision, p_versions text[] DEFAULT NULL::text[]) returns double precision language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function emit(name text, payload jsonb DEFAULT 'null'::jsonb, retention interval DEFAULT '1 day'::interval) returns bigint language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function execution_details(p_id uuid) returns TABLE(id uuid, queue text, task text, version text, state text, priority integer, attempt integer, max_attempts integer, crashes integer, generation integer, depth integer, created_at timestamp with time zone, run_at timestamp with time zone, claimed_at timestamp with time zone, finished_at timestamp with time zone, expires_at timestamp with time zone, deadline_at timestamp with time zone, parent_id uuid, root_id uuid, origin_id uuid, dedupe_key text, tags text[], progress jsonb, cancel_requested boolean, reason text, error jsonb, open_waits bigint, waits jsonb) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set plan_cache_mode=force_generic_plan set enable_seqscan=off set jit=off
function execution_errors(p_id uuid) returns jsonb language sql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp
function execution_steps(p_id uuid) returns TABLE(name text, kind text, "position" integer, attempt integer, outcome text, target text, scope text, value text, withheld boolean, error jsonb, created_at timestamp with time zone, resolved_at timestamp with time zone, due_at timestamp with time zone) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function flush(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_outcomes text[], p_results jsonb[], p_errors jsonb[], p_delays double precision[], p_keeps double precision[], p_family boolean DEFAULT true) returns TABLE(id uuid, status text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off set lock_timeout=1s
function fork(p_id uuid, p_from_step text) returns TABLE(id uuid, task text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function grant_role(p_kind text, p_role text) returns void language plpgsql set search_path=pg_catalog, pg_temp
function granted_roles() returns TABLE(kind text, role text) language sql stable set search_path=pg_catalog, pg_temp
function heartbeat(p_id uuid, p_lease double precision, p_loads jsonb DEFAULT NULL::jsonb) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function hold_session(p_id uuid) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function invoke(task text, payload jsonb DEFAULT '{}'::jsonb, queue text DEFAULT NULL::text, priority integer DEFAULT 0, run_at timestamp with time zone DEFAULT NULL::timestamp with time zone, delay interval DEFAULT NULL::interval, dedupe_key text DEFAULT NULL::text, timeout interval DEFAULT NULL::interval, deadline timestamp with time zone DEFAULT NULL::timestamp with time zone, max_attempts integer DEFAULT NULL::integer, tags text[] DEFAULT NULL::text[], backoff jsonb DEFAULT NULL::jsonb) returns uuid language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function invoke_many(p_tasks text[], p_payloads jsonb[], p_queues text[] DEFAULT NULL::text[], p_priorities integer[] DEFAULT NULL::integer[], p_run_ats timestamp with time zone[] DEFAULT NULL::timestamp with time zone[], p_delays double precision[] DEFAULT NULL::double precision[], p_dedupe_keys text[] DEFAULT NULL::text[], p_options jsonb[] DEFAULT NULL::jsonb[]) returns TABLE("position" integer, id uuid, created boolean) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function list_executions(p_queue text DEFAULT NULL::text, p_task text DEFAULT NULL::text, p_states text[] DEFAULT NULL::text[], p_created_after timestamp with time zone DEFAULT NULL::timestamp with time zone, p_created_before timestamp with time zone DEFAULT NULL::timestamp with time zone, p_tags text[] DEFAULT NULL::text[], p_dedupe_key text DEFAULT NULL::text, p_parent uuid DEFAULT NULL::uuid, p_root uuid DEFAULT NULL::uuid, p_limit integer DEFAULT 100, p_after uuid DEFAULT NULL::uuid, p_look integer DEFAULT 10000) returns TABLE(id uuid, queue text, task text, version text, state text, priority integer, attempt integer, crashes integer, generation integer, created_at timestamp with time zone, run_at timestamp with time zone, claimed_at timestamp with time zone, finished_at timestamp with time zone, dedupe_key text, tags text[], parent_id uuid, root_id uuid, error_type text, reason text) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set plan_cache_mode=force_custom_plan set enable_seqscan=off set jit=off set enable_bitmapscan=off
function load_history(p_owner uuid, p_id uuid, p_claim_no bigint) returns TABLE(name text, kind text, "position" integer, attempt integer, outcome text, target text, scope text, value text, error text, due_in double precision) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function load_payload(p_id uuid, p_claim_no bigint, p_owner uuid) returns text language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp
function look_before_sleep(p_queue text, p_is_up boolean, p_is_lookout boolean) returns text language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function lower_sleep_flag(p_queue text) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function maintain() returns TABLE(lock_held boolean, slots_emptied integer, rows_removed_estimate bigint, payloads_removed bigint, slots_made integer, slots_busy integer, tombstones integer, more boolean) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function open_channel(p_owner uuid, p_id uuid, p_claim_no bigint, p_name text, p_capacity integer) returns bigint language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function orchestrator_status() returns TABLE(id uuid, name text, program_version text, alive boolean, started_at timestamp with time zone, heartbeat_age double precision, queues text[], stop_requested boolean) language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function progress(p_ids uuid[]) returns TABLE(id uuid, progress text) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function publish_queues() returns integer language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set lock_timeout=1s
function queue_load(p_queue text DEFAULT NULL::text, p_limit integer DEFAULT 10000) returns TABLE(queue text, registered boolean, at timestamp with time zone, ready bigint, ready_is_capped boolean, oldest_ready double precision, running bigint, unserved bigint, looked bigint, tasks_without_worker text[], workers bigint, capacity bigint, reporting bigint, reporting_capacity bigint, seconds double precision, busy double precision, claims bigint, empty_claims bigint, short_claims bigint, locked_claims bigint, claimed bigint, claim_seconds double precision, claim_share double precision, flush_share double precision, cpu double precision, machine_load double precision, claimed_rate double precision, ended_rate double precision, arrivals double precision, departures double precision, inserted bigint, deleted bigint, wanted_capacity bigint) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function queue_status() returns TABLE(queue text, registered boolean, scheduled bigint, ready bigint, running bigint, waiting bigint, completed bigint, failed bigint, cancelled bigint, workers bigint, oldest_ready double precision, tasks_without_worker text[]) language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function raise_sleep_flag(p_queue text, p_raise boolean) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function read_channel(p_id uuid, p_name text, p_after bigint DEFAULT 0, p_limit integer DEFAULT 100) returns TABLE(state text, seq bigint, value text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function read_waits(p_owner uuid, p_ids uuid[], p_claim_nos bigint[]) returns TABLE(execution_id uuid, name text, outcome text, value text, error text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function recover(p_queue text, p_limit integer DEFAULT 1000) returns TABLE(recovered bigint, failed bigint, cancelled bigint) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function register_orchestrator(p_id uuid, p_name text, p_lease double precision, p_program_version text, p_schema_version integer, p_queues text[], p_tasks jsonb[], p_concurrencies integer[]) returns void language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function register_queue(p_queue text) returns integer language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set lock_timeout=1s
function register_tasks(p_names text[], p_queue text, p_keep_completed double precision[] DEFAULT NULL::double precision[], p_keep_failed double precision[] DEFAULT NULL::double precision[]) returns void language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function reject_promise(id uuid, message text DEFAULT 'rejected'::text) returns text language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function release_unknown(p_owner uuid, p_queue text, p_known uuid[]) returns bigint language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function request_close(p_owner uuid, p_id uuid, p_claim_no bigint, p_names text[], p_reason text) returns bigint language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function resolve_promise(id uuid, value jsonb DEFAULT 'null'::jsonb) returns text language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function restart(p_id uuid) returns TABLE(id uuid, task text) language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function results(p_ids uuid[]) returns TABLE(id uuid, state text, result text, error jsonb, reason text) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set plan_cache_mode=force_generic_plan set enable_seqscan=off set jit=off
function retire_orchestrator(p_id uuid) returns bigint language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function retry(p_ids uuid[]) returns TABLE(id uuid, status text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function retry_matching(p_queue text DEFAULT NULL::text, p_task text DEFAULT NULL::text, p_error_type text DEFAULT NULL::text, p_finished_after timestamp with time zone DEFAULT NULL::timestamp with time zone, p_finished_before timestamp with time zone DEFAULT NULL::timestamp with time zone, p_limit integer DEFAULT 1000, p_states text[] DEFAULT '{failed}'::text[]) returns TABLE(retried bigint, duplicates bigint) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set plan_cache_mode=force_custom_plan set enable_seqscan=off set jit=off set enable_bitmapscan=off
function revoke_role(p_kind text, p_role text) returns void language plpgsql set search_path=pg_catalog, pg_temp
function save_effects(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_names text[], p_positions integer[], p_effects jsonb[]) returns TABLE(n integer, status text, value text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function save_steps(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_names text[], p_kinds text[], p_positions integer[], p_values jsonb[], p_errors jsonb[]) returns TABLE(n integer, status text, value text, error text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function send(execution_id uuid, channel text, payload jsonb DEFAULT 'null'::jsonb) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function set_progress(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_values jsonb[]) returns SETOF integer language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function signals(p_owner uuid, p_queues text[]) returns TABLE(stop_requested boolean, cancelled_ids uuid[], cancelled_claim_nos bigint[], reasons text[], suspects text[], errands boolean) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function stand_down(p_queue text) returns boolean language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function standing(p_ids uuid[]) returns TABLE(id uuid, state text, task text, queue text, live_workers bigint, due_in double precision) language sql SECURITY DEFINER set search_path=pg_catalog, pg_temp
function start_waits(p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_waits jsonb[]) returns TABLE(n integer, status text, outcome text, value text, error text, due_in double precision, target text) language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
function stored_histories(p_queue text DEFAULT NULL::text, p_task text DEFAULT NULL::text, p_limit integer DEFAULT 50, p_after uuid DEFAULT NULL::uuid, p_look integer DEFAULT 10000) returns TABLE(id uuid, queue text, task text, version text, state text, attempt integer, payload text, records jsonb) language plpgsql stable SECURITY DEFINER set search_path=pg_catalog, pg_temp set plan_cache_mode=force_custom_plan set enable_seqscan=off set jit=off set enable_bitmapscan=off
function succeed_orchestrator(p_old uuid, p_new uuid, p_lease double precision, p_ids uuid[], p_claim_nos bigint[]) returns SETOF uuid language plpgsql SECURITY DEFINER set search_path=pg_catalog, pg_temp set enable_seqscan=off set jit=off
