-- The inserter's side of the wake-up protocol (the worker's side and the whole argument: runtime/reactor.py).
--
-- Lock order of everything here: K is taken before M is looked at, and nobody waits for either without a bound.

-- Is nobody asleep on the queue? Takes M and lets go in one expression, so that no cancellation falls between. This and the
-- next one are bodies that the planner writes into their callers: every insert asks (benchmarks/notify_tax.py).
create or replace function @schema@._private_nobody_sleeps(p_queue text) returns boolean
    language sql volatile
    return case
        when pg_catalog.pg_try_advisory_lock(@schema@._private_key_m(p_queue))
            then pg_catalog.pg_advisory_unlock(@schema@._private_key_m(p_queue))
        -- Not to be had exclusively, but shared: a sleeper holds it.
        when pg_catalog.pg_try_advisory_lock_shared(@schema@._private_key_m(p_queue))
            then not pg_catalog.pg_advisory_unlock_shared(@schema@._private_key_m(p_queue))
        -- Not even shared: another inserter is looking at this instant, so nobody was asleep.
        else true
    end;

-- Asked by whoever makes work on a queue, before it commits: raise K until the transaction ends, then look at M. True: somebody
-- may be asleep. Never waits.
create or replace function @schema@._private_may_wake(p_queue text) returns boolean
    language sql volatile
    -- CASE, because AND promises no order.
    return case when pg_catalog.pg_try_advisory_xact_lock_shared(@schema@._private_key_k(p_queue))
        then not @schema@._private_nobody_sleeps(p_queue) else true end;

-- NOTIFY, which is only ever a hint: so not into a queue that is about to be full, where it would fail at COMMIT and take
-- the transaction with it (a forgotten listener of anybody's, in an open transaction, is enough).
create or replace function @schema@._private_notify(p_channel text, p_payload text) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_notification_queue_usage() < 0.9 then
        perform pg_notify(p_channel, p_payload);
    end if;
end $$;

-- Called by whoever makes work on a queue, before it commits: NOTIFY if somebody may be asleep.
create or replace function @schema@._private_announce(p_queue text) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if @schema@._private_may_wake(p_queue) then
        perform @schema@._private_notify(@schema@._private_channel(p_queue), '');
    end if;
end $$;

-- An insert wakes a sleeper if it is due now, or due before any worker's next sweep (sweeps are at most a minute
-- apart), so that the sleeper's timer is set anew.
create or replace function @schema@._private_on_insert() returns trigger
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    if new.state = 'ready' or (new.state = 'scheduled' and new.run_at < @schema@._private_clock() + interval '61 s') then
        if @schema@._private_may_wake(new.queue) then
            perform @schema@._private_notify(@schema@._private_channel(new.queue), '');
        end if;
    end if;
    return null;
end $$;

create or replace trigger _private_announce after insert on @schema@._private_executions
    for each row execute function @schema@._private_on_insert();

-- The worker's look, on its LISTEN connection: with the sleep flag M raised, is no change in flight?
--   null: M could not be raised at this instant (an inserter is looking); try again.
--   true: nothing is in flight. One more look for work, in a new statement, and it may sleep.
--   false: a change may commit any moment.
-- Raising a flag that this session has raised already would count it twice, hence p_raise.
create or replace function @schema@.raise_sleep_flag(p_queue text, p_raise boolean) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_k constant bigint := @schema@._private_key_k(p_queue);
begin
    if p_raise and not pg_try_advisory_lock_shared(@schema@._private_key_m(p_queue)) then
        return null;
    end if;
    return case when pg_try_advisory_lock(v_k) then pg_advisory_unlock(v_k) else false end;
end $$;

-- The same, for workers that know of lookouts (runtime/reactor.py). p_is_up: our flag is; p_is_lookout: we are.
--   watched: another session is the lookout; our flag is down.
--   refused: the flag could not be raised at this instant; try again.
--   quiet, in flight: the flag is up, and nobody is the lookout for our part.
create or replace function @schema@.look_before_sleep(p_queue text, p_is_up boolean, p_is_lookout boolean) returns text
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_l constant bigint := @schema@._private_key_l(p_queue);
    v_is_quiet boolean;
begin
    if not p_is_lookout and (case when pg_try_advisory_lock_shared(v_l) then not pg_advisory_unlock_shared(v_l) else true end) then
        if p_is_up then
            perform pg_advisory_unlock_shared(@schema@._private_key_m(p_queue));
        end if;
        return 'watched';
    end if;
    v_is_quiet := @schema@.raise_sleep_flag(p_queue, not p_is_up);
    if v_is_quiet is null then
        return 'refused';
    end if;
    if p_is_lookout then
        perform pg_advisory_unlock(v_l);
    end if;
    return case when v_is_quiet then 'quiet' else 'in flight' end;
end $$;

-- Lower the sleep flag, if it is up, and be the lookout, until stand_down, look_before_sleep, or the session's end. False: another
-- session is. Null: it cannot be told, since somebody is looking at this instant.
create or replace function @schema@.become_lookout(p_queue text, p_is_up boolean) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_l constant bigint := @schema@._private_key_l(p_queue);
begin
    if p_is_up then
        perform pg_advisory_unlock_shared(@schema@._private_key_m(p_queue));
    end if;
    return case when pg_try_advisory_lock(v_l) then true
        when pg_try_advisory_lock_shared(v_l) then nullif(pg_advisory_unlock_shared(v_l), true)
        else false end;
end $$;

-- No longer be the lookout, and wake all who listen: there is more than we can take, or we look no more.
create or replace function @schema@.stand_down(p_queue text) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    perform @schema@._private_notify(@schema@._private_channel(p_queue), '');
    return pg_advisory_unlock(@schema@._private_key_l(p_queue));
end $$;

create or replace function @schema@.lower_sleep_flag(p_queue text) returns boolean
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    return pg_advisory_unlock_shared(@schema@._private_key_m(p_queue));
end $$;
