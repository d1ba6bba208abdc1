-- Retention: finished → nothing. A row is put into a slot of expiry when it finishes; a slot is emptied as a whole.
--
-- The rules of the slots. Each is a partition of `_private_finished` with a bound, `expires_upto`, no earlier than the
-- expiry of any row in it. A flush takes the slot with the earliest bound that is late enough.
--   0        for ever.
--   1 to 4   far: one of them has the bound 'infinity', so that a flush always finds a slot.
--   5 to 41  the others. At every moment there are to be 33 bounds: the next 6 multiples of 1 h, of 2 h, of 4 h, ... of
--            512 h (21 days 8 h), by UTC. A row is kept beyond its expiry for an hour at most if it is kept for up to
--            5 h, else for at most two fifths of the time it was to be kept (on average an eighth), for keeps up to 106 days.
--   A slot with the bound '-infinity' is spare.
-- An expired slot is TRUNCATEd, which locks that partition alone, and given another bound.
--
-- Why no row goes early. Whoever reads a bound may act on it much later: a flush's snapshot may be as old as its
-- transaction. (1) A bound is replaced by a later one: a row put in by the former bound goes later than it might, never
-- earlier. So a flush that chose a slot which is emptied and bounded anew before it inserts does no harm. (2) Where a
-- bound is lowered, the slot is marked `must_check`, for good: before it is emptied, with everybody locked out, its rows
-- are looked at, and if one has not expired, the bound is raised to the last of them instead. Lowered are: the
-- far slot's, which becomes that of its last row when another becomes the far one (else it would hold rows for ever); and
-- those of empty slots that are no more wanted, since the clock was put back.
--
-- Why none stays for ever. A bound passes sometime; the far slot is closed when it has been open for a quarter of the
-- longest time that one of its rows still has. So rows kept for longer than 128 days go a quarter of the longest such
-- keep late, at most, as long as one of the four is spare, and a day.
--
-- Locks: the advisory lock of maintenance, tried; partitions, ACCESS EXCLUSIVE: the first is waited for (100 ms at a time,
-- three times at most) while no other lock is held that anybody may wait for, the others are tried; so maintenance is
-- in no deadlock. Rows of slots are written under the advisory lock only; flushes read them without locks.

-- The slot for rows that expire after p_keep seconds: null is for ever, 0 or less is not at all (null slot).
create or replace function @schema@._private_expiry_slot(p_keep double precision, p_now timestamptz) returns int
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select case when p_keep is null then 0 when p_keep > 0 then
        (select no from @schema@._private_expiry_slots where no > 0 and expires_upto >= p_now + make_interval(secs => p_keep)
         order by expires_upto, no desc limit 1) end
$$;

create or replace function @schema@._private_key_maintenance() returns bigint
    language sql immutable parallel safe
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' maintenance', 7263381);

-- The bounds that should be there. Those of a coarser kind are among those of the finer ones, so what is wanted once is
-- wanted until it passes.
create or replace function @schema@._private_wanted_bounds(p_now timestamptz) returns setof timestamptz
    language sql immutable
    set search_path = pg_catalog, pg_temp
as $$
    select distinct to_timestamp((floor(extract(epoch from p_now)::float8 / width) + n) * width)
    from (select 3600 * 2.0::float8 ^ k as width from generate_series(0, 9) k) w, generate_series(1, 6) n
$$;

-- Give spare slots the bounds that are missing, the nearest first; returns how many. To be called with the lock of
-- maintenance.
create or replace function @schema@._private_advance_slots(p_now timestamptz) returns int
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_far @schema@._private_expiry_slots;
    v_last timestamptz;
    v_spare int;
    v_no int;
    v_is_empty boolean;
    v_made int;
begin
    -- The far one. An `opened_at` in the future: the clock was put back.
    select * into strict v_far from @schema@._private_expiry_slots s where s.is_far and s.expires_upto = 'infinity';
    if v_far.check_at <= p_now or v_far.opened_at > p_now then
        execute format('select max(expires_at) from @schema@._private_finished_%s', v_far.no) into v_last;
        select s.no into v_spare from @schema@._private_expiry_slots s where s.is_far and s.expires_upto = '-infinity'
        order by s.no limit 1;
        if v_last is null or v_far.opened_at > p_now then
            update @schema@._private_expiry_slots set opened_at = p_now, check_at = p_now + interval '1 day' where no = v_far.no;
        elsif v_spare is not null and p_now - v_far.opened_at >= (v_last - p_now) / 4 then
            update @schema@._private_expiry_slots set expires_upto = v_last, opened_at = null, check_at = null where no = v_far.no;
            update @schema@._private_expiry_slots set expires_upto = 'infinity', opened_at = p_now,
                check_at = p_now + interval '1 day'
            where no = v_spare;
        else
            update @schema@._private_expiry_slots
            set check_at = greatest(v_far.opened_at + (v_last - p_now) / 4, p_now + interval '1 day')
            where no = v_far.no;
        end if;
    end if;

    -- Bounds that nobody wants, where nothing is: the clock was put back, and they are far ahead now.
    for v_no in select s.no from @schema@._private_expiry_slots s
        where not s.is_far and s.expires_upto > p_now and isfinite(s.expires_upto)
            and s.expires_upto not in (select b from @schema@._private_wanted_bounds(p_now) b)
    loop
        execute format('select not exists (select from @schema@._private_finished_%s)', v_no) into v_is_empty;
        if v_is_empty then
            update @schema@._private_expiry_slots set expires_upto = '-infinity', must_check = true where no = v_no;
        end if;
    end loop;

    with missing as (
        select b as bound, row_number() over (order by b) as n from @schema@._private_wanted_bounds(p_now) b
        where b not in (select s.expires_upto from @schema@._private_expiry_slots s)
    ), spare as (
        select s.no, row_number() over (order by s.no) as n from @schema@._private_expiry_slots s
        where not s.is_far and s.expires_upto = '-infinity'
    )
    update @schema@._private_expiry_slots s set expires_upto = m.bound
    from missing m join spare p on p.n = m.n where s.no = p.no;
    get diagnostics v_made = row_count;
    return v_made;
end $$;

-- Empty one slot whose bound has passed; returns about how many rows it held. Null: not now (with p_wait after a tenth of
-- a second), since somebody reads it, or one of its rows has not expired, or has a payload stored aside.
create or replace function @schema@._private_empty_slot(p_no int, p_must_check boolean, p_now timestamptz, p_wait boolean)
    returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '100ms'
as $$
declare
    v_table constant text := format('@schema@._private_finished_%s', p_no);
    -- Not by the name above: a cast to regclass does not know its escapes.
    v_oid constant oid := (select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname = @schema_literal@ and c.relname = '_private_finished_' || p_no);
    v_rows bigint := 0;
    v_last timestamptz;
    v_has_large boolean;
begin
    if pg_relation_size(v_oid) > 0 then
        if p_must_check then
            -- Twice, so that the look below, which delays readers, is taken once in the life of a slot.
            execute format('select max(expires_at) from %s', v_table) into v_last;
        end if;
        if v_last is null or v_last < p_now then
            begin
                execute format('lock table only %s in access exclusive mode %s', v_table, case when not p_wait then 'nowait' end);
            exception when lock_not_available then
                return null;
            end;
            if p_must_check then
                execute format('select max(expires_at) from %s', v_table) into v_last;
            end if;
        end if;
        if v_last >= p_now then
            update @schema@._private_expiry_slots set expires_upto = v_last where no = p_no;
            return null;
        end if;
        execute format('select exists (select from %s where payload is null)', v_table) into v_has_large;
        if v_has_large then
            return null;
        end if;
        select greatest(pg_stat_get_live_tuples(c.oid), c.reltuples::bigint, 1) into v_rows from pg_class c
        where c.oid = v_oid;
        execute format('truncate table only %s', v_table);
    end if;
    update @schema@._private_expiry_slots set expires_upto = '-infinity' where no = p_no;
    return v_rows;
end $$;

-- Remove rows of an expired slot whose payload is stored aside, with those payloads, at most p_limit rows and about p_bytes
-- bytes; returns how many. Skips rows that somebody has locked: retry moves them back, or leaves them for the next time.
create or replace function @schema@._private_remove_large(p_no int, p_now timestamptz, p_limit int, p_bytes bigint) returns bigint
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set enable_seqscan = off
    set jit = off
as $$
declare
    v_removed bigint;
begin
    execute format($sql$
        with picked as materialized (
            select f.ctid, f.id from only @schema@._private_finished_%1$s f where f.payload is null and f.expires_at < $3
            limit $1 for update skip locked
        ), sized as (
            select p.ctid, p.id, sum(pg_column_size(l.payload)) over (order by p.id rows between unbounded preceding and 1 preceding) as before
            from picked p left join @schema@._private_payloads l on l.execution_id = p.id
        ), removed as (
            delete from only @schema@._private_finished_%1$s f using sized s
            where f.ctid = s.ctid and coalesce(s.before, 0) < $2
            returning f.id
        ), payloads as (
            delete from @schema@._private_payloads l using removed r where l.execution_id = r.id
        )
        select count(*) from removed
        $sql$, p_no) into v_removed using p_limit, p_bytes, p_now;
    return v_removed;
end $$;

-- What somebody has to do about once a minute, whoever it is: empty expired slots, set bounds ahead, forget orchestrators
-- that have been dead for a day, and events, receipts of events and channels that are kept no longer. Harmless at any time, from
-- any number of sessions: one works, the others are told so (lock_held false). Takes a second at most; `more` says that there is
-- more to do, so call again soon. Never fails because of a reader: what is in use is left for the next call (slots_busy).
create or replace function @schema@.maintain()
    returns table (
        lock_held boolean, slots_emptied int, rows_removed_estimate bigint, payloads_removed bigint, slots_made int,
        slots_busy int, tombstones int, more boolean
    )
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_now constant timestamptz := @schema@._private_clock();
    v_slot record;
    v_large int[] := '{}';
    v_has_large boolean;
    v_no int;
    v_rows bigint;
    v_may_wait int := 3;
begin
    lock_held := pg_try_advisory_xact_lock(@schema@._private_key_maintenance());
    slots_emptied := 0;
    rows_removed_estimate := 0;
    payloads_removed := 0;
    slots_made := 0;
    slots_busy := 0;
    tombstones := 0;
    more := false;
    if not lock_held then
        return next;
        return;
    end if;
    -- In any order: a few slots that somebody reads for long must not hide the others.
    for v_slot in select s.no, s.must_check from @schema@._private_expiry_slots s
        where s.no > 0 and s.expires_upto < v_now and isfinite(s.expires_upto) order by random()
    loop
        execute format('select exists (select from @schema@._private_finished_%s where payload is null and expires_at < $1)',
            v_slot.no) into v_has_large using v_now;
        if v_has_large then
            v_large := v_large || v_slot.no;
            continue;
        end if;
        v_rows := @schema@._private_empty_slot(v_slot.no, v_slot.must_check, v_now, v_may_wait > 0);
        if v_rows is null then
            v_may_wait := v_may_wait - 1;
            slots_busy := slots_busy + 1;
        else
            if v_rows > 0 then
                v_may_wait := 0;
            end if;
            slots_emptied := slots_emptied + 1;
            rows_removed_estimate := rows_removed_estimate + v_rows;
        end if;
    end loop;
    slots_made := @schema@._private_advance_slots(v_now);
    delete from @schema@._private_orchestrators
    where id in (select o.id from @schema@._private_orchestrators o
        where o.died_at < v_now - interval '1 day' order by o.id for update skip locked);
    get diagnostics tombstones = row_count;
    foreach v_no in array v_large loop
        payloads_removed := @schema@._private_remove_large(v_no, v_now, 5000, 67108864);
        more := payloads_removed > 0;
        exit when more;
    end loop;
    more := @schema@._private_forget_events(v_now, 5000) = 5000 or more;
    more := @schema@._private_forget_receipts(v_now, 1000) = 1000 or more;
    more := @schema@._private_forget_channels(v_now, 5000) >= 5000 or more;
    return next;
end $$;

-- From the installation on there are bounds, before anybody has maintained anything.
select case when pg_try_advisory_xact_lock(@schema@._private_key_maintenance())
    then @schema@._private_advance_slots(@schema@._private_clock()) end;
