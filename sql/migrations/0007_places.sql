-- Where a queue's workers are in the order of what is ready, told to each other before their claims commit: sequences are what
-- all sessions see at once (05_claim.sql). Eight places, by hash: who meets another there goes by its own. Logged, though
-- hints may be lost: a standby that is promoted has no page for an unlogged sequence, and each use of it would be an error.
-- Additive: programs of the schema before share nothing.
do $$
begin
    for k in 0..7 loop
        execute format('create sequence @schema@._private_place_%s_key minvalue %s', k, -9223372036854775808);
        execute format('create sequence @schema@._private_place_%s_run_at', k);
        execute format('create sequence @schema@._private_place_%s_id', k);
        execute format('create sequence @schema@._private_place_%s_look_at', k);
    end loop;
end $$;
