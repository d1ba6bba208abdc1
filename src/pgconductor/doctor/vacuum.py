"""What keeps dead rows from being removed: settings, old transactions, sessions that sit in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from ..db.call import Call, Row
from .finding import Judged, Verdict, duration, fine, gravest, identifier, listed, literal

T = TypeVar("T")


class Vacuum(NamedTuple):
    """The settings of autovacuum; tables where it is switched off; tables that are mostly dead rows."""

    autovacuum: str
    track_counts: str
    switched_off: list[str]
    bloated: list[str]


def autovacuum(schema: str) -> Call[Vacuum]:
    return Call(
        b"""
        select current_setting('autovacuum'), current_setting('track_counts'),
            array(select c.relname::text
                from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                where n.nspname = %s and c.reloptions && '{autovacuum_enabled=false,autovacuum_enabled=off}'
                order by 1),
            array(select s.relname::text || ' (' || s.n_dead_tup || ' dead, ' || s.n_live_tup || ' live)'
                from pg_catalog.pg_stat_all_tables s
                where s.schemaname = %s and s.n_dead_tup > 100000 and s.n_dead_tup > 10 * s.n_live_tup
                order by s.n_dead_tup desc)
        """,
        (schema, schema),
        lambda rows: Vacuum._make(rows[0]),
    )


def judge_autovacuum(found: Vacuum, schema: str) -> Judged:
    off = [name for name in ("autovacuum", "track_counts") if getattr(found, name) != "on"]
    if off:
        return (
            Verdict.PROBLEM,
            f"{' and '.join(off)} off: dead rows pile up, and claims become slower and slower",
            "; ".join(f"alter system set {name} = on" for name in off) + "; select pg_reload_conf()",
        )
    if found.switched_off:
        table = f"{identifier(schema)}.{identifier(found.switched_off[0])}"
        return (
            Verdict.PROBLEM,
            f"autovacuum is switched off for {listed(found.switched_off)}",
            f"alter table {table} reset (autovacuum_enabled)",
        )
    if found.bloated:
        table = f"{identifier(schema)}.{identifier(found.bloated[0].split(' ')[0])}"
        return (
            Verdict.WARNING,
            f"mostly dead rows in {listed(found.bloated)}",
            f"look at the check oldest_transaction; if that is fine: vacuum {table}",
        )
    return fine("autovacuum on, few dead rows")


class Holder(NamedTuple):
    """Something that keeps dead rows from being removed, for so many transactions and, where known, seconds."""

    kind: str  # session | standby | prepared | slot
    name: str
    pid: int | None
    transactions: int
    seconds: float | None


class Holders(NamedTuple):
    """What keeps dead rows, oldest first; without `sees_all` only sessions of this role are among them."""

    holders: list[Holder]
    sees_all: bool


def _with_sight(kind: Callable[[Sequence[Any]], T]) -> Callable[[list[Row]], tuple[list[T], bool]]:
    """Decoder of rows whose last column says whether all sessions are visible, and of a row of nulls for none."""

    def decode(rows: list[Row]) -> tuple[list[T], bool]:
        return [kind(row[:-1]) for row in rows if row[0] is not None], bool(rows[0][-1])

    return decode


_SIGHT = b"(select pg_catalog.pg_has_role('pg_read_all_stats', 'usage') as sees_all) s left join"

OLDEST: Final[Call[Holders]] = Call(
    b"""
    select h.kind, h.name, h.pid, h.transactions, h.seconds, s.sees_all from """
    + _SIGHT
    + b""" (
        select case when a.backend_type = 'walsender' then 'standby' else 'session' end as kind,
            coalesce(nullif(a.application_name, ''), 'unnamed') || ', ' || coalesce(a.state, a.backend_type) as name,
            a.pid,
            greatest(pg_catalog.age(a.backend_xmin), pg_catalog.age(a.backend_xid)) as transactions,
            date_part('epoch', pg_catalog.clock_timestamp() - a.xact_start) as seconds
        from pg_catalog.pg_stat_activity a
        where coalesce(a.backend_xmin, a.backend_xid) is not null and a.pid <> pg_catalog.pg_backend_pid()
            and (a.datname = pg_catalog.current_database() or a.backend_type = 'walsender')
        union all
        select 'prepared', p.gid, null, pg_catalog.age(p.transaction),
            date_part('epoch', pg_catalog.clock_timestamp() - p.prepared)
        from pg_catalog.pg_prepared_xacts p where p.database = pg_catalog.current_database()
        union all
        select 'slot', r.slot_name, null, greatest(pg_catalog.age(r.xmin), pg_catalog.age(r.catalog_xmin)), null
        from pg_catalog.pg_replication_slots r where coalesce(r.xmin, r.catalog_xmin) is not null
    ) h on true
    order by h.seconds desc nulls last, h.transactions desc
    """,
    (),
    lambda rows: Holders(*_with_sight(Holder._make)(rows)),
)

_WORDS: Final = {
    "session": "session",
    "standby": "standby's feedback through session",
    "prepared": "prepared transaction",
    "slot": "replication slot",
}


def _remedy_of(holder: Holder) -> str:
    match holder.kind:
        case "prepared":
            return f"commit prepared {literal(holder.name)} or rollback prepared {literal(holder.name)}"
        case "slot":
            return f"connect its consumer, or select pg_drop_replication_slot({literal(holder.name)})"
        case "standby":
            return "end the long query on the standby, or set hot_standby_feedback = off there"
        case _:
            return f"select pg_terminate_backend({holder.pid})"


def judge_oldest(found: Holders) -> Judged:
    def verdict(holder: Holder) -> Verdict:
        seconds = holder.seconds or 0.0
        if seconds >= 3600 or holder.transactions >= 100_000_000:
            return Verdict.PROBLEM
        # Transactions alone are no measure of a session's age: a busy queue makes a million in minutes.
        is_old = seconds >= 300 or (holder.seconds is None and holder.transactions >= 1_000_000)
        return Verdict.WARNING if is_old else Verdict.OK

    judged = [(verdict(holder), holder) for holder in found.holders]
    if (worst := gravest(v for v, _ in judged)) is not Verdict.OK:
        bad = [holder for v, holder in judged if v is not Verdict.OK]
        said = [
            f"{_WORDS[h.kind]} {h.pid or ''} ({h.name})".replace("  ", " ")
            + ("" if h.seconds is None else f" for {duration(h.seconds)}")
            + f", {h.transactions:,} transactions"
            for h in bad
        ]
        remedy = _remedy_of(next(holder for v, holder in judged if v is worst))
        return worst, f"dead rows are kept by {listed(said)}", remedy
    if not found.sees_all:
        return _unseen_sessions()
    return fine("no transaction keeps dead rows for long")


def _unseen_sessions() -> Judged:
    return (
        Verdict.UNSEEN,
        "the transactions of other roles are not visible to this one",
        "grant pg_read_all_stats to the role, or ask as one that has it",
    )


class IdleSession(NamedTuple):
    """A session that sits in a transaction without doing anything."""

    pid: int
    name: str
    role: str
    seconds: float


class IdleSessions(NamedTuple):
    """Those that have done so for a minute, longest first."""

    sessions: list[IdleSession]
    sees_all: bool


IDLE: Final[Call[IdleSessions]] = Call(
    b"""
    select i.pid, i.name, i.role, i.seconds, s.sees_all from """
    + _SIGHT
    + b""" (
        select a.pid, coalesce(nullif(a.application_name, ''), 'unnamed') as name, a.usename::text as role,
            date_part('epoch', pg_catalog.clock_timestamp() - a.state_change) as seconds
        from pg_catalog.pg_stat_activity a
        where a.state like 'idle in transaction%%' and a.datname = pg_catalog.current_database()
            and a.state_change < pg_catalog.clock_timestamp() - interval '60 s'
    ) i on true
    order by i.seconds desc nulls last
    """,
    (),
    lambda rows: IdleSessions(*_with_sight(IdleSession._make)(rows)),
)


def judge_idle(found: IdleSessions) -> Judged:
    if found.sessions:
        said = [f"{s.pid} ({s.name}, role {s.role}, {duration(s.seconds)})" for s in found.sessions]
        longest = found.sessions[0]
        return (
            Verdict.PROBLEM if longest.seconds >= 3600 else Verdict.WARNING,
            f"idle in a transaction: {listed(said)}; they hold locks, dead rows and, if they listen, notifications",
            f"select pg_terminate_backend({longest.pid}); alter role {identifier(longest.role)} set"
            " idle_in_transaction_session_timeout = '1min'",
        )
    return fine("no session sits in a transaction") if found.sees_all else _unseen_sessions()
