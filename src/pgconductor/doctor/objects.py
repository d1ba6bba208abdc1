"""The schema's objects as PostgreSQL's catalogue shows them to anybody: owner, rights, indexes, their number."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..db.call import Call
from ..db.installed import SchemaVersion
from .finding import Judged, Verdict, fine, identifier, listed


def invalid_indexes(schema: str) -> Call[list[str]]:
    return Call(
        b"""
        select c.relname::text from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid
            join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = %s and not i.indisvalid and c.relkind = 'i' order by 1
        """,
        (schema,),
        lambda rows: [str(row[0]) for row in rows],
    )


def judge_indexes(invalid: list[str], schema: str) -> Judged:
    if not invalid:
        return fine("all indexes are valid")
    return (
        Verdict.PROBLEM,
        f"invalid indexes, which are written and never used: {listed(invalid)}",
        f"reindex index concurrently {identifier(schema)}.{identifier(invalid[0])}",
    )


class Locks(NamedTuple):
    """How many tables and indexes a look at all queues locks, and for how many locks the server has room at least."""

    relations: int
    per_session: int  # max_locks_per_transaction
    sessions: int  # that may be connected, or prepared


def locks(schema: str) -> Call[Locks]:
    return Call(
        b"""
        select (select count(*)::int4 from pg_catalog.pg_class c
                    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                where n.nspname = %s and c.relkind in ('r', 'p', 'i', 'I')),
            current_setting('max_locks_per_transaction')::int4,
            current_setting('max_connections')::int4 + current_setting('max_prepared_transactions')::int4
        """,
        (schema,),
        lambda rows: Locks._make(rows[0]),
    )


def judge_locks(found: Locks) -> Judged:
    """Whoever is short of locks is short for all sessions: claims fail while somebody looks at all queues."""
    room = found.per_session * found.sessions
    seen = f"a look at all queues takes {found.relations:,} locks, the server has room for {room:,} at least"
    if 2 * found.relations <= room:
        return fine(seen)
    wanted = 64 * math.ceil(4 * found.relations / found.sessions / 64)
    return (
        Verdict.PROBLEM if found.relations > room else Verdict.WARNING,
        f"{seen}: when it has no more, statements of all sessions fail",
        f"alter system set max_locks_per_transaction = {wanted}, and restart; or use fewer queues",
    )


class Owner(NamedTuple):
    """Who owns the schema's objects: the functions run with this role's rights."""

    role: str
    is_superuser: bool
    strays: list[str]  # objects that somebody else owns


def owner(schema: str) -> Call[Owner | None]:
    return Call(
        b"""
        with ours as (select n.oid, c.relowner as owner from pg_catalog.pg_namespace n
            join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = '_private_schema' where n.nspname = %s)
        select o.owner::regrole::text, r.rolsuper, array(
            select c.relname::text from pg_catalog.pg_class c
            where c.relnamespace = o.oid and c.relowner <> o.owner and c.relkind in ('r', 'p', 'v', 'S')
            union all select p.proname || '()' from pg_catalog.pg_proc p
            where p.pronamespace = o.oid and p.proowner <> o.owner
            order by 1)
        from ours o join pg_catalog.pg_roles r on r.oid = o.owner
        """,
        (schema,),
        lambda rows: Owner._make(rows[0]) if rows else None,
    )


def judge_owner(owner: Owner | None, schema: str) -> Judged:
    if owner is None:
        return Verdict.UNSEEN, f"schema {schema!r} is not there", "run `pgconductor migrate`"
    name = identifier(schema)
    if owner.strays:
        return (
            Verdict.PROBLEM,
            f"role {owner.role} owns the schema's tables, but not {listed(owner.strays)}: functions will be refused",
            f"as a superuser: select {name}._private_grant_rights()",
        )
    if owner.is_superuser:
        return (
            Verdict.WARNING,
            f"the functions run with the rights of {owner.role}, a superuser",
            f"as a superuser: create role pgconductor_owner; alter schema {name} owner to pgconductor_owner;"
            f" alter table {name}._private_schema owner to pgconductor_owner; select {name}._private_grant_rights()",
        )
    return fine(f"owned by {owner.role}, no superuser")


def public_rights(schema: str) -> Call[list[str]]:
    return Call(
        b"""
        with ours as (select n.oid, n.nspacl, n.nspowner from pg_catalog.pg_namespace n where n.nspname = %s),
        lists (what, acl) as (
            select 'the schema', coalesce(o.nspacl, pg_catalog.acldefault('n', o.nspowner)) from ours o
            union all
            select p.oid::regprocedure::text, coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))
            from ours o join pg_catalog.pg_proc p on p.pronamespace = o.oid
            union all
            select c.relname, coalesce(c.relacl, pg_catalog.acldefault(
                (case c.relkind when 'S' then 's' else 'r' end)::"char", c.relowner))
            from ours o join pg_catalog.pg_class c on c.relnamespace = o.oid and c.relkind in ('r', 'p', 'v', 'm', 'S')
            union all
            select 'type ' || t.typname, coalesce(t.typacl, pg_catalog.acldefault('T', t.typowner))
            from ours o join pg_catalog.pg_type t on t.typnamespace = o.oid
                left join pg_catalog.pg_class c on c.oid = t.typrelid
            where t.typtype in ('e', 'd', 'c') and coalesce(c.relkind, 'c') = 'c'
        )
        select distinct l.what || ' (' || pg_catalog.lower(a.privilege_type) || ')'
        from lists l cross join lateral pg_catalog.aclexplode(l.acl) a where a.grantee = 0 order by 1
        """,
        (schema,),
        lambda rows: [str(row[0]) for row in rows],
    )


def judge_public(rights: list[str], schema: str) -> Judged:
    if not rights:
        return fine("PUBLIC has no rights")
    name = identifier(schema)
    return (
        Verdict.PROBLEM,
        f"PUBLIC, so every role, has rights on {listed(rights)}",
        f"revoke all on schema {name} from public; revoke all on all routines in schema {name} from public;"
        f" revoke all on all tables in schema {name} from public",
    )


def judge_schema(version: SchemaVersion) -> Judged:
    seen = f"version {version.version}"
    if version.version > version.program_version:
        return fine(f"{seen}, newer than this program's {version.program_version}, and fits it")
    if not version.has_own_functions:
        return Verdict.WARNING, f"{seen}, with functions of another build", "run `pgconductor migrate`"
    return fine(seen)
