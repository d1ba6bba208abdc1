-- What the other functions stand on: the clock, ids, names of locks and channels.

-- The one clock of due times, leases and ticks. Read it once into a variable: in a condition it would keep an index
-- from being used. Test databases replace this function by one that adds an offset.
create or replace function @schema@._private_clock() returns timestamptz
    language sql volatile parallel safe
    return pg_catalog.clock_timestamp();

-- A look for ready rows that takes longer than this is not repeated at each claim, see 09_partitions.sql. Tests replace
-- this one too: what they see must not depend on how busy the machine is.
create or replace function @schema@._private_long_look() returns interval
    language sql immutable parallel safe
    return interval '2 ms';

-- A new id, UUIDv8: 48 bits of Unix milliseconds, the queue's number (4 + 8 bits in bytes 6 and 7 behind the version,
-- 8 bits in byte 9), 58 random bits. It sorts by time and tells its partition.
create or replace function @schema@._private_new_id(p_queue_no int, p_now timestamptz) returns uuid
    language sql volatile parallel safe
    return pg_catalog.encode(
        pg_catalog.set_byte(pg_catalog.set_byte(pg_catalog.set_byte(
            pg_catalog.overlay(
                pg_catalog.uuid_send(pg_catalog.gen_random_uuid()),
                pg_catalog.substring(pg_catalog.int8send((pg_catalog.date_part('epoch', p_now) * 1000)::bigint), 3), 1, 6),
            6, 128 | (p_queue_no >> 16)), 7, (p_queue_no >> 8) & 255), 9, p_queue_no & 255),
        'hex')::uuid;

create or replace function @schema@._private_queue_no(p_id uuid) returns int
    language sql immutable parallel safe strict
    return ((pg_catalog.get_byte(pg_catalog.uuid_send(p_id), 6) & 15) << 16)
        | (pg_catalog.get_byte(pg_catalog.uuid_send(p_id), 7) << 8)
        | pg_catalog.get_byte(pg_catalog.uuid_send(p_id), 9);

-- Keys of advisory locks: 64-bit hashes of purpose, schema and queue, so as not to meet an application's own. The schema
-- goes in as a hash of fixed length, here and below: else queue "b c" of schema "a" were queue "c" of schema "a b".
-- K, "a change that makes work is in flight"; M, "somebody is asleep"; L, "somebody is the lookout"; W, "somebody waits
-- for a result".
create or replace function @schema@._private_key_k(p_queue text) returns bigint
    language sql immutable parallel safe strict
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' K ' || p_queue, 7263381);

create or replace function @schema@._private_key_m(p_queue text) returns bigint
    language sql immutable parallel safe strict
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' M ' || p_queue, 7263381);

create or replace function @schema@._private_key_l(p_queue text) returns bigint
    language sql immutable parallel safe strict
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' L ' || p_queue, 7263381);

-- -1 is the key of "anybody waits at all", 0-255 are the buckets of execution ids.
create or replace function @schema@._private_key_w(p_bucket int) returns bigint
    language sql immutable parallel safe strict
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' W ' || p_bucket, 7263381);

-- Held by an orchestrator's session for as long as the session lives.
create or replace function @schema@._private_key_o(p_owner uuid) returns bigint
    language sql immutable parallel safe strict
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' O ' || p_owner, 7263381);

create or replace function @schema@._private_bucket(p_id uuid) returns int
    language sql immutable parallel safe strict
    return pg_catalog.get_byte(pg_catalog.uuid_send(p_id), 15);

-- Names of channels: a prefix and 128 bits of hash, whatever the schema's and the queue's names are.
create or replace function @schema@._private_channel(p_queue text) returns text
    language sql immutable parallel safe strict
    return 'pgconductor_q_' || pg_catalog.md5(pg_catalog.md5(@schema_literal@) || p_queue);

create or replace function @schema@._private_results_channel() returns text
    language sql immutable parallel safe
    return 'pgconductor_r_' || pg_catalog.md5(@schema_literal@);

-- An orchestrator's own channel: "read your signals". A hash, since any role may listen, and the id is a secret.
create or replace function @schema@._private_control_channel(p_owner uuid) returns text
    language sql immutable parallel safe strict
    return 'pgconductor_c_' || pg_catalog.md5(pg_catalog.md5(@schema_literal@) || p_owner);

-- What a worker has to have for an execution: the task, or one version of it. A version has no "@".
create or replace function @schema@._private_task_key(p_task text, p_version text) returns text
    language sql immutable parallel safe
    return case when p_version is null then p_task else p_task || '@' || p_version end;

-- Payloads above this size are kept out of the rows that move.
create or replace function @schema@._private_is_large(p_payload jsonb) returns boolean
    language sql immutable parallel safe strict
    return pg_catalog.pg_column_size(p_payload) > 2000;

-- Changes when the server was restarted, when one of its processes crashed (then all of them begin anew under the same
-- postmaster, and the statistics are reset), or when another server was promoted: claims committed asynchronously may be lost
-- then. An administrator who resets the statistics makes orchestrators take new ids, which costs them nothing.
create or replace function @schema@._private_server_epoch() returns text
    language sql stable
    return pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) || ' '
        || coalesce(pg_catalog.date_part('epoch', pg_catalog.pg_stat_get_bgwriter_stat_reset_time()), 0) || ' '
        || pg_catalog.substring(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8);

-- What programs of the first schema registered stays alive: it told the epoch in fewer words. Here, in the transaction that
-- puts the new words in, since an epoch that is not told in the same words ends a lease.
update @schema@._private_orchestrators set server_epoch = @schema@._private_server_epoch()
where server_epoch = pg_catalog.date_part('epoch', pg_catalog.pg_postmaster_start_time()) || ' '
    || pg_catalog.substring(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8);

-- Seconds to keep a failed or cancelled execution of a task, where no worker says it; a week for a task nobody registered.
create or replace function @schema@._private_keep_failed(p_task text) returns double precision
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when count(*) = 0 then 604800 else max(t.keep_failed) end from @schema@._private_tasks t where t.name = p_task
$$;

-- The errors of an execution with one more, oldest first. At most 50: the first stays, then the oldest goes.
create or replace function @schema@._private_add_error(p_errors jsonb, p_error jsonb, p_attempt int, p_now timestamptz) returns jsonb
    language sql stable parallel safe
    return case when p_error is null then p_errors else
        (case when pg_catalog.jsonb_array_length(p_errors) >= 50 then p_errors - 1 else coalesce(p_errors, '[]') end)
        || (p_error || pg_catalog.jsonb_build_object('attempt', p_attempt, 'at', p_now)) end;
