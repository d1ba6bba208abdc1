"""Before a breaking migration: shutting the gate, asking older orchestrators to stop, waiting until they are gone.

Owns the gate: one advisory lock key per schema. Whoever applies a breaking migration holds it exclusively, for its
session; `register_orchestrator` takes it shared until it commits, and is refused if it does not get it within two
seconds (`_private_check_version` in `sql/functions/14_live_migration.sql`). Nothing is written for it, so a migrator
that dies keeps nobody out: the lock goes with its session.

Always true: once the gate is shut, all registrations that began before have committed and no other begins, and an
orchestrator that is retired, dead or past its lease never comes back. So the set of older orchestrators that live only
shrinks, and once a look finds it empty, it stays empty until the gate opens: after the migration has committed, from
where on its row in the version table refuses older programs.

An orchestrator is asked to stop by `stop_requested_at`, which it reads with its signals: at once when its control
channel is notified, else with its next heartbeat. It ends by itself, within its grace. One that is dead delays the
migration until its lease has passed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..errors import Unavailable
from .call import Call, Row, ignore
from .installed import Calls, ask_gen
from .sql_files import Migration, render

logger = logging.getLogger("pgconductor.migration")

NAP = 0.1  # seconds between two looks
_PROGRESS = 5.0  # seconds between two lines in the log
_NAMED = 5  # orchestrators that a message names

_GATE = "pg_catalog.hashtextextended(pg_catalog.md5(@schema_literal@) || ' G', 7263381)"


@dataclass(frozen=True, slots=True)
class OlderOrchestrator:
    """One that must be gone. `expires_in`: seconds until its lease has passed, if it does not renew it."""

    name: str
    program_version: str
    schema_version: int
    expires_in: float

    def __str__(self) -> str:
        return (
            f"{self.name} (pgconductor {self.program_version}, schema {self.schema_version}; its lease has"
            f" {self.expires_in:.1f} s to go)"
        )


def shut_gate(schema: str) -> Call[bool]:
    """Whether the gate is shut now, by this session; not while another session has shut it or goes through."""
    return Call(render(f"select pg_catalog.pg_try_advisory_lock({_GATE})", schema).encode(), (), _decode_flag)


def open_gate(schema: str) -> Call[None]:
    return Call(render(f"select pg_catalog.pg_advisory_unlock({_GATE})", schema).encode(), (), ignore)


def holds_gate(schema: str) -> Call[bool]:
    """Whether it is this session that has shut the gate: behind a transaction pooler it may be another one."""
    return Call(
        render(
            f"""
            select exists (
                select from pg_catalog.pg_locks l, (select {_GATE} as key) g
                where l.pid = pg_catalog.pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 1
                  and l.classid::int8 = (g.key >> 32) & 4294967295 and l.objid::int8 = g.key & 4294967295
                  and l.mode = 'ExclusiveLock')
            """,
            schema,
        ).encode(),
        (),
        _decode_flag,
    )


def gate_key(schema: str) -> Call[int]:
    """The gate's key, for whoever wants to know who has shut it."""
    return Call(render(f"select {_GATE}", schema).encode(), (), lambda rows: int(rows[0][0]))


def _decode_flag(rows: list[Row]) -> bool:
    return bool(rows[0][0])


def _has_fleet(schema: str) -> Call[tuple[bool, bool]]:
    """Whether the schema can have orchestrators, and whether they can be told at once that they are to stop."""
    # Without functions, in the middle of a fresh install, nobody has registered.
    return Call(
        b"""
        select exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
                       where n.nspname = %s and p.proname = '_private_clock')
               and exists (select from pg_catalog.pg_attribute a join pg_catalog.pg_class c on c.oid = a.attrelid
                       join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                       where n.nspname = %s and c.relname = '_private_orchestrators'
                         and a.attname = 'stop_requested_at'),
               exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
                       where n.nspname = %s and p.proname = '_private_control_channel')
        """,
        (schema, schema, schema),
        lambda rows: (bool(rows[0][0]), bool(rows[0][1])),
    )


def _look(schema: str, number: int) -> Call[list[OlderOrchestrator]]:
    return Call(
        render(
            """
            select o.name, o.program_version, o.schema_version,
                   pg_catalog.date_part('epoch', o.expires_at - c.now)::float8
            from @schema@._private_orchestrators o, (select @schema@._private_clock() as now offset 0) c
            where o.schema_version < %s and o.died_at is null and o.expires_at > c.now
            order by o.started_at, o.id
            """,
            schema,
        ).encode(),
        (number,),
        lambda rows: [OlderOrchestrator(*row) for row in rows],
    )


def _ask_to_stop(schema: str, number: int, *, tell: bool) -> Call[None]:
    """Ask those who have not been asked; `tell` them at once, where their functions know how.

    Committed asynchronously: waiting for a standby would keep their rows, and so their heartbeats, waiting.
    """
    told = "pg_catalog.pg_notify(@schema@._private_control_channel(o.id), '')" if tell else "null"
    return Call(
        render(
            f"""
            update @schema@._private_orchestrators o set stop_requested_at = @schema@._private_clock()
            from (select pg_catalog.set_config('synchronous_commit', 'off', true) offset 0) s
            where o.id in (select x.id from @schema@._private_orchestrators x
                           where x.schema_version < %s and x.died_at is null and x.stop_requested_at is null
                           order by x.id for update)
            returning {told}
            """,
            schema,
        ).encode(),
        (number,),
        ignore,
    )


def _named(older: list[OlderOrchestrator]) -> str:
    more = f" and {len(older) - _NAMED} more" if len(older) > _NAMED else ""
    return ", ".join(map(str, older[:_NAMED])) + more


def evict_gen(schema: str, migration: Migration, stop_wait: float, nap: Call[None]) -> Calls[None]:
    """Ask older orchestrators to stop and wait until none lives; the gate is shut. `nap` takes `NAP` seconds.

    Raises `Unavailable` after about `stop_wait` seconds, naming those that did not go.
    """
    has_fleet, can_tell = yield from ask_gen(_has_fleet(schema))
    if not has_fleet:
        return
    looks = max(1, round(stop_wait / NAP))
    older: list[OlderOrchestrator] = []
    for look in range(looks):
        older = yield from ask_gen(_look(schema, migration.number))
        if not older:
            if look:
                logger.warning("schema %r: all older orchestrators are gone, applying %s", schema, migration.name)
            return
        # Each time: one that took over from its predecessor after a restart of the server has not been asked.
        yield from ask_gen(_ask_to_stop(schema, migration.number, tell=can_tell))
        if look == 0:
            logger.warning(
                "schema %r: %s is breaking; asked %d orchestrators of older versions to stop, and waiting for them: %s",
                schema, migration.name, len(older), _named(older),
            )  # fmt: skip
        elif look % round(_PROGRESS / NAP) == 0:
            logger.warning(
                "schema %r: %s still waits for %d orchestrators of older versions: %s",
                schema, migration.name, len(older), _named(older),
            )  # fmt: skip
        yield from ask_gen(nap)
    raise Unavailable(
        f"schema {schema!r} was not migrated: {migration.name} is breaking, and after {stop_wait:g} s orchestrators of"
        f" older versions still run: {_named(older)}; stop them and repeat"
    )
