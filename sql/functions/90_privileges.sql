-- Who may do what. This file comes last: it gives every function that the others have put in its rights.
--
-- Nobody has rights on tables; what a role may do is to call the functions of its kinds. Those run with the rights of the
-- schema's owner (SECURITY DEFINER, which is said here and nowhere else). PUBLIC has nothing. A function that is not listed
-- below is for the owner alone, and a test fails if it is public.
--
-- Which role is of which kind is kept by PostgreSQL itself: a role that may execute `_private_kind_worker()` is a worker.
-- So the record follows a role that is renamed, goes with DROP OWNED, and is dumped and restored with all other rights.

-- The one list. "object": a function with all its forms, or a view or table that may be read; _N stands for a partition's
-- number. as_owner: it reads or writes tables; the others compute only, and run as who calls them.
create or replace function @schema@._private_rights() returns table (object text, kinds text[], as_owner boolean)
    language sql immutable
    set search_path = pg_catalog, pg_temp
as $$
    values
        -- Produce, wait for what was produced, cancel it.
        ('invoke', '{producer,worker}'::text[], true),
        ('invoke_many', '{producer,worker}', true),
        ('cancel', '{producer,worker,operator}', true),  -- the first two: what their login role has invoked
        -- Send. To an execution, the first two: if their login role has invoked it. A promise, whoever has its id.
        ('emit', '{producer,worker,operator}', true),
        ('send', '{producer,worker,operator}', true),
        ('resolve_promise', '{producer,worker,operator}', true),
        ('reject_promise', '{producer,worker,operator}', true),
        ('results', '{producer,worker}', true),
        ('progress', '{producer,worker}', true),
        ('read_channel', '{producer,worker}', true),
        ('standing', '{producer,worker}', true),
        ('_private_results_channel', '{producer,worker}', false),
        ('_private_key_w', '{producer,worker}', false),
        ('execution_errors', '{producer,worker,viewer,operator}', true),
        ('execution_details', '{producer,worker,viewer,operator}', true),
        ('execution_steps', '{producer,worker,viewer,operator}', true),  -- values: to the first two
        -- Run orchestrators.
        ('register_queue', '{worker}', true),
        ('publish_queues', '{worker}', true),
        ('register_tasks', '{worker}', true),
        ('register_orchestrator', '{worker}', true),
        ('hold_session', '{worker}', true),
        ('heartbeat', '{worker}', true),
        ('signals', '{worker}', true),
        ('succeed_orchestrator', '{worker}', true),
        ('retire_orchestrator', '{worker}', true),
        ('claim', '{worker}', true),
        ('_private_claim_N', '{worker}', true),
        ('claim_suspect', '{worker}', true),
        ('load_payload', '{worker}', true),
        ('flush', '{worker}', true),
        ('release_unknown', '{worker}', true),
        ('recover', '{worker}', true),
        ('load_history', '{worker}', true),
        ('read_waits', '{worker}', true),
        ('save_steps', '{worker}', true),
        ('start_waits', '{worker}', true),
        ('request_close', '{worker}', true),
        ('close_children', '{worker}', true),
        ('save_effects', '{worker}', true),
        ('set_progress', '{worker}', true),
        ('open_channel', '{worker}', true),
        ('append_items', '{worker}', true),
        ('close_channel', '{worker}', true),
        ('deliver_events', '{worker}', true),
        ('_private_errands_channel', '{worker}', false),
        ('maintain', '{worker}', true),
        ('drain_wait', '{worker}', true),
        ('stored_histories', '{worker}', true),
        ('continue_as_new', '{worker}', true),
        ('raise_sleep_flag', '{worker}', true),
        ('lower_sleep_flag', '{worker}', true),
        ('look_before_sleep', '{worker}', true),
        ('become_lookout', '{worker}', true),
        ('stand_down', '{worker}', true),
        ('_private_channel', '{worker}', false),
        ('_private_control_channel', '{worker}', false),
        -- See how it goes.
        ('queue_status', '{viewer,operator}', true),
        ('orchestrator_status', '{viewer,operator}', true),
        ('execution_status', '{viewer,operator}', false),
        ('queue_load', '{viewer,operator}', true),
        ('_private_loaded_queues', '{viewer,operator}', true),
        ('autoscaling', '{viewer,operator}', false),
        ('dead_letters', '{viewer,operator}', true),
        ('list_executions', '{viewer,operator}', true),
        ('_private_doctor', '{viewer,operator}', true),
        -- Set it right.
        ('cancel_matching', '{operator}', true),
        ('retry', '{operator}', true),
        ('retry_matching', '{operator}', true),
        ('fork', '{operator}', true),
        ('restart', '{operator}', true),
        -- What every program reads before it begins: the schema's version.
        ('_private_migrations', '{producer,worker,viewer,operator}', false),
        ('_private_schema', '{producer,worker,viewer,operator}', false)
$$;

-- Only their rights count: who may execute one is of that kind.
create or replace function @schema@._private_kind_producer() returns text language sql immutable return 'producer'::text;
create or replace function @schema@._private_kind_worker() returns text language sql immutable return 'worker'::text;
create or replace function @schema@._private_kind_viewer() returns text language sql immutable return 'viewer'::text;
create or replace function @schema@._private_kind_operator() returns text language sql immutable return 'operator'::text;

-- Whether the caller of the verb at hand is of any of these kinds, or the owner. In a function that runs as its owner the caller is
-- the role that was set, else the one that logged in.
create or replace function @schema@._private_is_any(p_kinds text[]) returns boolean
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select bool_or(has_function_privilege(case current_setting('role') when 'none' then session_user else current_setting('role') end,
        p.oid, 'execute'))
    from unnest(p_kinds) as k (kind)
        join pg_namespace n on n.nspname = @schema_literal@
        join pg_proc p on p.pronamespace = n.oid and p.proname = '_private_kind_' || k.kind
$$;

-- Operators and the owner cancel anything.
create or replace function @schema@._private_may_cancel_all() returns boolean
    language sql stable
    return @schema@._private_is_any('{operator}');

-- The roles that have been given rights, but for the owner.
create or replace function @schema@.granted_roles() returns table (kind text, role text)
    language sql stable
    set search_path = pg_catalog, pg_temp
as $$
    select k.kind, r.rolname::text
    from unnest('{producer,worker,viewer,operator}'::text[]) with ordinality as k (kind, place)
        join pg_namespace n on n.nspname = @schema_literal@
        join pg_proc p on p.pronamespace = n.oid and p.proname = '_private_kind_' || k.kind
        cross join lateral aclexplode(p.proacl) a
        join pg_roles r on r.oid = a.grantee
    where a.grantee <> p.proowner
    order by k.place, r.rolname
$$;

-- Give the schema's objects the rights of the list above: all of them, or the functions of one partition. What PUBLIC has is
-- taken away; what was given to a role by hand is left alone. When a superuser calls it, who may have migrated, all objects
-- go to the owner of the schema's tables, since the functions run with that one's rights; anybody else leaves alone what
-- is not that owner's. Changes only what is not so already.
-- Locks: that of register_queue, so that no partition comes into being between a role's grant and its own.
create or replace function @schema@._private_grant_rights(p_no int default null) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_schema constant oid := (select n.oid from pg_namespace n where n.nspname = @schema_literal@);
    v_owner constant oid := (select c.relowner from pg_class c
        where c.relnamespace = v_schema and c.relname = '_private_schema');
    v_is_superuser constant boolean := (select r.rolsuper from pg_roles r where r.rolname = current_user);
    v_object record;
    v_roles text;
begin
    perform pg_advisory_xact_lock(hashtextextended(@schema_literal@ || ' register_queue', 7263381));
    for v_object in
        select p.oid::regprocedure::text as name, p.prosecdef, p.proowner as owner,
            coalesce(p.proacl, acldefault('f', p.proowner)) as acl, coalesce(r.kinds, '{}') as kinds, coalesce(r.as_owner, false) as as_owner,
            p.proname ~ '^_private_old_' as is_aside
        from pg_proc p left join @schema@._private_rights() r on r.object = regexp_replace(p.proname, '_[0-9]+$', '_N')
        where p.pronamespace = v_schema and (p.proowner = v_owner or v_is_superuser) and (p_no is null or p.proname ~ ('^_private_.*[^0-9]' || p_no || '$'))
        order by p.proname, p.oid
    loop
        if v_object.owner <> v_owner then
            execute format('alter routine %s owner to %s', v_object.name, v_owner::regrole);
        end if;
        -- Those set aside (00_set_aside.sql) end as they began, for statements that have found them already.
        if v_object.prosecdef <> v_object.as_owner and not v_object.is_aside then
            execute format('alter routine %s security %s', v_object.name, case when v_object.as_owner then 'definer' else 'invoker' end);
        end if;
        if exists (select from aclexplode(v_object.acl) a where a.grantee = 0) then
            execute format('revoke all on routine %s from public', v_object.name);
        end if;
        select string_agg(distinct quote_ident(g.role), ', ') into v_roles
        from @schema@.granted_roles() g
        where g.kind = any (v_object.kinds) and not exists (
            select from aclexplode(v_object.acl) a where a.grantee = quote_ident(g.role)::regrole and a.privilege_type = 'EXECUTE');
        if v_roles is not null then
            execute format('grant execute on routine %s to %s', v_object.name, v_roles);
        end if;
    end loop;
    if p_no is not null then
        return;
    end if;

    -- Types first: a table's columns and functions need none of their rights, users of them neither.
    for v_object in
        select 'type' as kind, format_type(t.oid, null) as name, t.typowner as owner, coalesce(t.typacl, acldefault('T', t.typowner)) as acl,
            '{}'::text[] as kinds, true as is_kept
        from pg_type t left join pg_class c on c.oid = t.typrelid
        where t.typnamespace = v_schema and (t.typowner = v_owner or v_is_superuser) and t.typtype in ('e', 'd', 'c') and coalesce(c.relkind, 'c') = 'c'
        union all
        -- An identity's sequence goes with its table.
        select case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass::text, c.relowner,
            coalesce(c.relacl, acldefault((case c.relkind when 'S' then 's' else 'r' end)::"char", c.relowner)), coalesce(r.kinds, '{}'),
            not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'i'
                and c.relkind = 'S')
        from pg_class c left join @schema@._private_rights() r on r.object = c.relname
        where c.relnamespace = v_schema and (c.relowner = v_owner or v_is_superuser) and c.relkind in ('r', 'p', 'v', 'm', 'S')
    loop
        if v_object.owner <> v_owner and v_object.is_kept then
            execute format('alter %s %s owner to %s', v_object.kind, v_object.name, v_owner::regrole);
        end if;
        if exists (select from aclexplode(v_object.acl) a where a.grantee = 0) then
            execute format('revoke all on %s %s from public', v_object.kind, v_object.name);
        end if;
        select string_agg(distinct quote_ident(g.role), ', ') into v_roles
        from @schema@.granted_roles() g
        where g.kind = any (v_object.kinds) and not exists (
            select from aclexplode(v_object.acl) a where a.grantee = quote_ident(g.role)::regrole and a.privilege_type = 'SELECT');
        if v_roles is not null then
            execute format('grant select on %s %s to %s', v_object.kind, v_object.name, v_roles);
        end if;
    end loop;

    for v_object in select coalesce(n.nspacl, acldefault('n', n.nspowner)) as acl from pg_namespace n where n.oid = v_schema loop
        if exists (select from aclexplode(v_object.acl) a where a.grantee = 0) then
            revoke all on schema @schema@ from public;
        end if;
        select string_agg(distinct quote_ident(g.role), ', ') into v_roles
        from @schema@.granted_roles() g
        where not exists (
            select from aclexplode(v_object.acl) a where a.grantee = quote_ident(g.role)::regrole and a.privilege_type = 'USAGE');
        if v_roles is not null then
            execute format('grant usage on schema @schema@ to %s', v_roles);
        end if;
    end loop;
end $$;

-- Let a role be a producer, a worker, a viewer or an operator, now and with all that later versions bring. For the schema's
-- owner. Repeating it is harmless, and puts right what is missing. PC001: no such kind or role. Locks: that of
-- register_queue, until the transaction ends.
create or replace function @schema@.grant_role(p_kind text, p_role text) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    perform @schema@._private_check_role(p_kind, p_role);
    execute format('grant execute on function @schema@.%I() to %I', '_private_kind_' || p_kind, p_role);
    perform @schema@._private_grant_rights();
end $$;

-- Take that back. What the role may do by its other kinds stays; what it was given by hand goes too.
create or replace function @schema@.revoke_role(p_kind text, p_role text) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
declare
    v_object text;
begin
    perform @schema@._private_check_role(p_kind, p_role);
    if not exists (select from @schema@.granted_roles() g where g.kind = p_kind and g.role = p_role) then
        return;
    end if;
    execute format('revoke execute on function @schema@.%I() from %I', '_private_kind_' || p_kind, p_role);
    -- Everything but the marks of the other kinds, from which the rest is given again.
    for v_object in
        select p.oid::regprocedure::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname = @schema_literal@ and p.proname !~ '^_private_kind_' and exists (
            select from aclexplode(p.proacl) a where a.grantee = quote_ident(p_role)::regrole)
    loop
        execute format('revoke all on routine %s from %I', v_object, p_role);
    end loop;
    execute format('revoke all on all tables in schema @schema@ from %I', p_role);
    execute format('revoke all on schema @schema@ from %I', p_role);
    perform @schema@._private_grant_rights();
end $$;

-- The lock first: two at once would change the rights of one function at once, and one of them fail.
create or replace function @schema@._private_check_role(p_kind text, p_role text) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
as $$
begin
    perform pg_advisory_xact_lock(hashtextextended(@schema_literal@ || ' register_queue', 7263381));
    if p_kind is null or p_kind <> all ('{producer,worker,viewer,operator}') then
        raise exception using errcode = 'PC001',
            message = format('there is no kind of role %L; there are producer, worker, viewer and operator', p_kind);
    end if;
    -- PUBLIC is no role, and is given nothing.
    if not exists (select from pg_roles r where r.rolname = p_role) then
        raise exception using errcode = 'PC001',
            message = format('there is no role %L in this server; make it first, with CREATE ROLE', p_role);
    end if;
end $$;

select @schema@._private_grant_rights();
