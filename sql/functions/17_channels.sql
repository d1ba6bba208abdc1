-- Durable channels: a handler appends, readers follow. An item is a row with the number of its place, so a handler that begins
-- anew appends nothing twice; the rows are the record of what was sent. When the execution continues as new, its channels go on:
-- the handler's numbers begin again at 1, behind first_seq, and those that readers see do not. A fork and a restart are other
-- executions, with channels of their own: they send everything again.
--
-- Bounded: what no reader has got to is at most the channel's capacity, and who sends more is told "full". Of what was read the
-- last 10,000 items stay while the execution lives. When it has ended they stay as long as its finished row, but an hour at least,
-- for readers that are behind; then maintain removes them.
--
-- Readers hear of items as they hear of ends (_private_notify_results): the sender notifies if somebody listens.

-- Open a channel of a running execution, or go on with it; returns how many items this life of it has sent, null if the claim is
-- revoked. Locks: the execution's row, the channel's.
create or replace function @schema@.open_channel(p_owner uuid, p_id uuid, p_claim_no bigint, p_name text, p_capacity int) returns bigint
    language sql volatile
    set search_path = pg_catalog, pg_temp
as $$
    insert into @schema@._private_channels (execution_id, name, capacity)
    select h.id, p_name, p_capacity from @schema@._private_hold(p_owner, array[p_id], array[p_claim_no]) h
    on conflict (execution_id, name) do update set capacity = excluded.capacity, ended_at = null, expires_at = null
    returning last_seq - first_seq
$$;

-- Append items to channels that are open, arrays of one length. p_seqs: the item's number in this life, one more than the last
-- one's. Returns a row per position: "sent", now or by an earlier call; "full": not sent, try again when a reader has come further;
-- "fenced". Commits durably. Locks: the executions' rows, then the channels'.
create or replace function @schema@.append_items(
    p_owner uuid, p_ids uuid[], p_claim_nos bigint[], p_channels text[], p_seqs bigint[], p_values jsonb[]
) returns table (n int, status text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_kept constant int := 10000;
    v_held uuid[];
    v_item record;
    v_channel @schema@._private_channels;
    v_seq bigint;       -- as readers see it
    v_sent uuid[] := '{}';
begin
    v_held := array(select h.id from @schema@._private_hold(p_owner, p_ids, p_claim_nos) h);
    for v_item in
        select o.no::int as no, o.id, o.channel, o.seq, o.value
        from unnest(p_ids, p_channels, p_seqs, p_values) with ordinality as o (id, channel, seq, value, no)
        -- In the order of keys, which is that of all who lock several.
        order by o.id, o.channel, o.seq
    loop
        select c.* into v_channel from @schema@._private_channels c
        where c.execution_id = v_item.id and c.name = v_item.channel and v_item.id = any (v_held) for no key update;
        v_seq := v_channel.first_seq + v_item.seq;
        if not found then
            return query select v_item.no, 'fenced';
        elsif v_seq <= v_channel.last_seq then
            return query select v_item.no, 'sent';
        elsif v_channel.last_seq - v_channel.read_upto >= v_channel.capacity or v_seq > v_channel.last_seq + 1 then
            return query select v_item.no, 'full';
        else
            insert into @schema@._private_channel_items (execution_id, channel, seq, value)
            values (v_item.id, v_item.channel, v_seq, v_item.value);
            update @schema@._private_channels c set last_seq = v_seq where c.execution_id = v_item.id and c.name = v_item.channel;
            if v_seq % 1000 = 0 then
                delete from @schema@._private_channel_items i
                where i.execution_id = v_item.id and i.channel = v_item.channel and i.seq <= least(v_channel.read_upto, v_seq - v_kept);
            end if;
            v_sent := v_sent || v_item.id;
            return query select v_item.no, 'sent';
        end if;
    end loop;
    if v_sent <> '{}' then
        perform @schema@._private_notify_results(v_sent);
    end if;
end $$;

-- Say that nothing more comes. False: the claim is revoked. Locks: as open_channel.
create or replace function @schema@.close_channel(p_owner uuid, p_id uuid, p_claim_no bigint, p_name text) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (select from @schema@._private_hold(p_owner, array[p_id], array[p_claim_no])) then
        return false;
    end if;
    update @schema@._private_channels c set closed_at = @schema@._private_clock()
    where c.execution_id = p_id and c.name = p_name and c.closed_at is null;
    perform @schema@._private_notify_results(array[p_id]);
    return true;
end $$;

-- Read items behind p_after, p_limit at most, and take note that all up to p_after were read. First a row that tells the channel's
-- state, without an item: "open", more may come; "closed", nothing more does; "absent", it is not open yet; "gone", there is no such
-- execution, or it is kept no longer. So if it says closed, the items that follow are the last ones. Locks: the channel's row.
create or replace function @schema@.read_channel(p_id uuid, p_name text, p_after bigint default 0, p_limit int default 100)
    returns table (state text, seq bigint, value text)
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
#variable_conflict use_column
declare
    v_channel @schema@._private_channels;
begin
    select c.* into v_channel from @schema@._private_channels c where c.execution_id = p_id and c.name = p_name;
    if not found then
        return query select case when @schema@._private_is_live(p_id, null) then 'absent'
            when exists (select from @schema@._private_finished f where f.id = p_id) then 'closed' else 'gone' end, null::bigint, null::text;
        return;
    end if;
    if p_after > v_channel.read_upto then
        update @schema@._private_channels c set read_upto = least(p_after, c.last_seq)
        where c.execution_id = p_id and c.name = p_name and c.read_upto < least(p_after, c.last_seq);
    end if;
    return query select case when v_channel.closed_at is null and v_channel.ended_at is null then 'open' else 'closed' end, null::bigint, null::text;
    return query
    select null::text, i.seq, i.value::text from @schema@._private_channel_items i
    where i.execution_id = p_id and i.channel = p_name and i.seq > p_after order by i.seq limit p_limit;
end $$;

-- Remove channels whose time is over, with their items: at most p_limit rows of both; returns how many went.
create or replace function @schema@._private_forget_channels(p_now timestamptz, p_limit int) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_expired record;
    v_count bigint;
    v_removed bigint := 0;
begin
    for v_expired in
        select c.execution_id, c.name from @schema@._private_channels c where c.ended_at is not null and c.expires_at < p_now
        order by c.expires_at limit p_limit for update skip locked
    loop
        delete from @schema@._private_channel_items i where i.execution_id = v_expired.execution_id and i.channel = v_expired.name
            and i.seq in (select x.seq from @schema@._private_channel_items x
                where x.execution_id = v_expired.execution_id and x.channel = v_expired.name order by x.seq limit p_limit - v_removed);
        get diagnostics v_count = row_count;
        v_removed := v_removed + v_count;
        exit when v_removed >= p_limit;
        delete from @schema@._private_channels c where c.execution_id = v_expired.execution_id and c.name = v_expired.name
            and not exists (select from @schema@._private_channel_items i where i.execution_id = v_expired.execution_id and i.channel = v_expired.name);
        get diagnostics v_count = row_count;
        v_removed := v_removed + v_count;
        exit when v_removed >= p_limit;
    end loop;
    return v_removed;
end $$;
