-- Programs of an older version, while a breaking migration is being made and after it. The migrator's side and the whole
-- argument: src/pgconductor/db/breaking.py.

-- The key of the gate: held exclusively by the session that makes a breaking migration, shared by each registration
-- until it commits. The migrator computes it itself, since it meets schemas whose functions are older than it is.
create or replace function @schema@._private_key_gate() returns bigint
    language sql immutable parallel safe
    return pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' G', 7263381);

-- To be called first by whoever registers an orchestrator, in the same transaction. PC002, with the constraint
-- _private_schema_version, for a program that does not know a breaking migration the schema has had; and while one is
-- under way. Locks: the gate, shared, until the transaction ends; waits two seconds for it, since a migrator that is
-- about to open it may still hold it for an instant. The look comes after it, in a statement (so a snapshot) of its own.
create or replace function @schema@._private_check_version(p_schema_version int) returns void
    language plpgsql volatile
    set search_path = pg_catalog, pg_temp
    set lock_timeout = '2s'
as $$
declare
    v_name text;
begin
    begin
        perform pg_advisory_xact_lock_shared(@schema@._private_key_gate());
    exception when lock_not_available then
        raise exception 'schema % is about to have a breaking migration: orchestrators of schema version % are not started any more',
            @schema_literal@, p_schema_version
            using errcode = 'PC002', constraint = '_private_schema_version',
                hint = 'Upgrade this program. Should the migration have been given up, it can start again at once.';
    end;
    select m.name into v_name from @schema@._private_migrations m where m.breaking and m.no > p_schema_version
    order by m.no limit 1;
    if found then
        raise exception 'schema % has the breaking migration %, and this program knows only migrations up to %: upgrade this program',
            @schema_literal@, v_name, p_schema_version
            using errcode = 'PC002', constraint = '_private_schema_version';
    end if;
end $$;
