-- Functions that have changed their arguments or their result since a release: `create or replace` cannot replace them.
--
-- They get another name in the transaction that puts the new ones in, and are dropped the next time functions are put in.
-- Not dropped at once: a statement that waits for a table behind this transaction has looked its functions up already, and
-- would fail with XX000. Not in a migration: between that and the functions they would be missing. Callers of the old form
-- find the new one: parameters are added with defaults, columns are added to results.
do $$
declare
    v_function regprocedure;
    v_name text;
begin
    -- Whoever registers a queue now makes its functions from the old text: let them end, and others wait.
    perform pg_advisory_xact_lock(hashtextextended(@schema_literal@ || ' register_queue', 7263381));
    for v_function in select p.oid from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = @schema_literal@ and p.proname ~ '^_private_old_'
    loop
        execute format('drop function %s', v_function);
    end loop;
    for v_function, v_name in select p.oid, p.proname from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = @schema_literal@ and (
            -- Since schema 2.
            (p.proname, p.pronargs) in (('invoke_many', 7), ('invoke', 7), ('recover', 3), ('register_tasks', 2))
            or (p.proname, p.pronargs) = ('flush', 8)
            or p.proname ~ '^(_private_flush_\d+|_private_flush_partition)$' and pg_get_function_result(p.oid) !~ 'parent_id'
            or p.proname ~ '^(claim|claim_suspect|_private_claim_\d+)$' and pg_get_function_result(p.oid) !~ 'version'
            or (p.proname, p.pronargs) in (('drain_wait', 3), ('heartbeat', 2))
            or p.proname = 'signals' and pg_get_function_result(p.oid) !~ 'errands'
            or p.proname = '_private_end' and pg_get_function_result(p.oid) !~ 'parent_id'
            or p.proname = 'orchestrator_status' and pg_get_function_result(p.oid) !~ 'stop_requested')
    loop
        execute format('alter function %s rename to %I', v_function, '_private_old_' || v_name);
    end loop;
end $$;
