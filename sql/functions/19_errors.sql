-- The errors of an execution's failed attempts, oldest first, as an array of objects; null if it has none, or if nothing
-- of it is kept. The live row first: a retried dead letter takes its errors along. Locks and writes nothing.
create or replace function @schema@.execution_errors(p_id uuid) returns jsonb
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select x.errors from (
        select 0 as place, e.generation, e.errors from @schema@._private_executions e
        where e.queue_no = @schema@._private_queue_no(p_id) and e.id = p_id
        union all
        select 1, f.generation, f.errors from @schema@._private_finished f where f.id = p_id
    ) x order by x.place, x.generation desc limit 1
$$;
