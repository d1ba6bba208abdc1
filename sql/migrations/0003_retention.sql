-- Slots of expiry, all of them, so that no DDL is needed while programs run: what a slot holds is emptied as a whole and
-- the slot is used again (the rules: 11_retention.sql).
--
-- Live programs go on: new partitions are attached, which delays nobody. The two that are there get their indexes
-- last; a flush into one of them waits until that is done, about a second per million rows they hold.

alter table @schema@._private_expiry_slots
    add column is_far boolean not null default false,   -- takes its turn as the one without a bound; the others never do
    add column must_check boolean not null default false,   -- its bound was lowered once: look for rows before emptying
    add column opened_at timestamptz,                   -- of the far one: since when rows come
    add column check_at timestamptz;                    -- of the far one: when to think of closing it

-- What an older program put into slot 1 has every possible expiry: close it at the first opportunity.
update @schema@._private_expiry_slots set is_far = true, must_check = true, opened_at = '2000-01-01', check_at = '2000-01-01'
where no = 1;

-- 2 to 4 are spare far slots; 5 to 41 serve the 33 bounds that are there at any time, and 4 that wait to be emptied.
insert into @schema@._private_expiry_slots (no, expires_upto, is_far, must_check)
select no, '-infinity', no <= 4, no <= 4 from generate_series(2, 41) no;

do $do$
begin
    for v_no in 2..41 loop
        execute format('create table @schema@._private_finished_%1$s (like @schema@._private_finished including defaults
            including constraints, constraint partition_bound check (slot is not null and slot = %1$s))', v_no);
        execute format('create index _private_finished_%1$s_id on @schema@._private_finished_%1$s (id)', v_no);
        execute format('alter table @schema@._private_finished attach partition @schema@._private_finished_%1$s
            for values in (%1$s)', v_no);
        execute format('alter table @schema@._private_finished_%s drop constraint partition_bound', v_no);
    end loop;
    for v_no in 0..41 loop
        -- Rows whose payload is stored aside, and dead letters: neither index costs a completed row of usual size anything.
        execute format('create index _private_finished_%1$s_large on @schema@._private_finished_%1$s (id)
            where payload is null', v_no);
        execute format('create index _private_finished_%1$s_dead on @schema@._private_finished_%1$s (finished_at desc, id desc)
            where state <> ''completed''', v_no);
    end loop;
end $do$;
