-- Queues: a number, a partition, nothing named by text.

-- Register a queue, or find it registered; returns its number. To be called in a transaction of its own: the DDL
-- locks the parent against other DDL only (SHARE UPDATE EXCLUSIVE), so open readers and producers delay nobody and
-- are delayed by nobody. Fails with 55P03 (lock_not_available) when other DDL is in the way for a second; call it
-- again. Work goes into the partition once publish_queues has published the queue.
create or replace function @schema@.register_queue(p_queue text) returns int
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '1s'
as $$
declare
    v_no int;
begin
    select no into v_no from @schema@._private_queues where name = p_queue;
    if found then
        return v_no;
    end if;
    -- One at a time, so that two never wait for each other's lock on the parent.
    perform pg_advisory_xact_lock(hashtextextended(@schema_literal@ || ' register_queue', 7263381));
    insert into @schema@._private_queues (name, registered_at) values (p_queue, @schema@._private_clock())
        on conflict do nothing returning no into v_no;
    if v_no is null then
        return (select no from @schema@._private_queues where name = p_queue);
    end if;
    -- With the CHECK, ATTACH has nothing to scan. Autovacuum by count: these tables are small and churn.
    execute format('create table @schema@.%1$I (like @schema@._private_executions including defaults including constraints,
            constraint partition_bound check (queue_no is not null and queue_no = %2$s))
        with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000)', '_private_queue_' || v_no, v_no);
    execute format('create unique index on @schema@.%I (id)', '_private_queue_' || v_no);
    execute format('create index on @schema@.%I (priority desc, run_at, id) where state = ''ready''', '_private_queue_' || v_no);
    execute format('create index on @schema@.%I (run_at) where state in (''scheduled'', ''waiting'')', '_private_queue_' || v_no);
    execute format('create index on @schema@.%I (owner) where state = ''running''', '_private_queue_' || v_no);
    execute format('create index on @schema@.%I (owner) where state = ''running'' and cancel_requested_at is not null',
        '_private_queue_' || v_no);
    execute format('create index on @schema@.%I (queue, priority desc, run_at, id) where state = ''ready'' and crashes >= 2',
        '_private_queue_' || v_no);
    execute format('alter table @schema@._private_executions attach partition @schema@.%I for values in (%s)',
        '_private_queue_' || v_no, v_no);
    execute format('alter table @schema@.%I drop constraint partition_bound', '_private_queue_' || v_no);
    perform @schema@._private_define_partition(v_no);
    perform @schema@._private_grant_rights(v_no);
    return v_no;
end $$;

-- Let producers use the partitions of queues whose registration is over; returns how many queues are not published yet. To be
-- called in a transaction of its own, a few times: a call goes one step further. Until then work goes into the overflow
-- partition, so nobody needs to wait for it. Locks: that of register_queue, then against other DDL of the parent; 55P03 after
-- a second of waiting for it.
--
-- A session that inserts must know the partition. But a session that reads the list of partitions while one is attached may
-- hear of the change before it has put its old list in place, and then keeps that: PostgreSQL prevents it by locks on the
-- table, and ATTACH takes none against inserts. So, once the registration is over, (1) note who holds any lock of the parent:
-- nobody else can be reading an old list; (2) when all of them have ended, change the parent, and every session discards
-- its list; (3) publish, in a later transaction, since one is seen an instant before the others are told what it changed. Who
-- sees the queue as published and then hears what was changed knows the partition (tests/sql/test_register_queue.py).
create or replace function @schema@.publish_queues() returns int
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '1s'
as $$
declare
    v_holders text[];
    v_last int;
begin
    if not exists (select from @schema@._private_queues where published is null) then
        return 0;
    end if;
    -- Taken only after a registration's other locks have gone, and with them its word to the others has arrived.
    perform pg_advisory_xact_lock(hashtextextended(@schema_literal@ || ' register_queue', 7263381));
    v_last := (select coalesce(max(published), 0) from @schema@._private_queues);
    -- In the order of commits: an insert looks for the last number, then for queues up to it.
    update @schema@._private_queues q set published = v_last + n.n
    from (select no, row_number() over (order by no) as n from @schema@._private_queues where published is null and is_announced) n
    where q.no = n.no;
    v_holders := array(select virtualtransaction from pg_locks
        where locktype = 'relation' and relation = format('%I._private_executions', @schema_literal@)::regclass and pid <> pg_backend_pid()
            and database = (select oid from pg_database where datname = current_database()));
    update @schema@._private_queues set is_announced = true
    where published is null and not is_announced and not holders && v_holders;
    if found then
        alter table only @schema@._private_executions alter column queue set statistics -1;
    end if;
    update @schema@._private_queues set holders = v_holders where published is null and holders is null;
    return (select count(*) from @schema@._private_queues where published is null);
end $$;

-- What the running programs have, and how many seconds executions that no worker ends are kept: null is for ever, and no
-- array leaves it as it is. Never removes what another program registered; of two versions, the last one started counts.
create or replace function @schema@.register_tasks(
    p_names text[], p_queue text, p_keep_completed double precision[] default null, p_keep_failed double precision[] default null
) returns void
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    insert into @schema@._private_tasks as t (name, queue, registered_at, keep_completed, keep_failed)
    select n.name, p_queue, @schema@._private_clock(), case when p_keep_completed is null then 86400 else n.keep_completed end,
        case when p_keep_failed is null then 604800 else n.keep_failed end
    from unnest(p_names, p_keep_completed, p_keep_failed) as n (name, keep_completed, keep_failed) order by n.name
    on conflict (name) do update set queue = excluded.queue,
        keep_completed = case when p_keep_completed is null then t.keep_completed else excluded.keep_completed end,
        keep_failed = case when p_keep_failed is null then t.keep_failed else excluded.keep_failed end
    where t.queue <> excluded.queue
        or p_keep_completed is not null and t.keep_completed is distinct from excluded.keep_completed
        or p_keep_failed is not null and t.keep_failed is distinct from excluded.keep_failed
$$;
