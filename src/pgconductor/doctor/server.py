"""The server: its version, its settings, and what of it runs short."""

from __future__ import annotations

from typing import Final, NamedTuple

from ..db.call import Call
from ..db.installed import MINIMUM_SERVER
from .finding import Judged, Verdict, duration, fine, listed, literal

# Before these, VACUUM removed transaction states that LISTEN needed later: "could not access status of transaction".
_SOUND_MINORS: Final = {15: 16, 16: 12, 17: 8, 18: 2}


class Server(NamedTuple):
    """The server's version, and the settings that decide whether what was acknowledged lasts."""

    version_number: int
    version: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    isolation: str
    read_only: str
    is_standby: bool


SERVER: Final = Call(
    b"""
    select current_setting('server_version_num')::int4, current_setting('server_version'), current_setting('fsync'),
        current_setting('full_page_writes'), current_setting('synchronous_commit'),
        current_setting('default_transaction_isolation'), current_setting('default_transaction_read_only'),
        pg_catalog.pg_is_in_recovery()
    """,
    (),
    lambda rows: Server._make(rows[0]),
)


def judge_version(server: Server) -> Judged:
    major, minor = divmod(server.version_number, 10000)
    if server.version_number < MINIMUM_SERVER:
        needed = MINIMUM_SERVER // 10000
        return Verdict.PROBLEM, f"PostgreSQL {server.version}", f"upgrade the server to PostgreSQL {needed} or newer"
    if not server.version.split(" ")[0].replace(".", "").isdecimal():
        return Verdict.WARNING, f"PostgreSQL {server.version}, not a release", "use a released version"
    if minor < _SOUND_MINORS.get(major, 0):
        return (
            Verdict.WARNING,
            f"PostgreSQL {server.version}: LISTEN may fail after a VACUUM (could not access status of transaction)",
            f"upgrade to PostgreSQL {major}.{_SOUND_MINORS[major]} or newer: exchange the binaries and restart",
        )
    return fine(f"PostgreSQL {server.version}")


def judge_durability(server: Server) -> Judged:
    off = [name for name in ("fsync", "full_page_writes") if getattr(server, name) == "off"]
    if off:
        return (
            Verdict.PROBLEM,
            f"{' and '.join(off)} off: a crash of the machine may destroy the database",
            "; ".join(f"alter system set {name} = on" for name in off) + "; select pg_reload_conf()",
        )
    if server.synchronous_commit == "off":
        return (
            Verdict.WARNING,
            "synchronous_commit is off: executions that were acknowledged may be lost in a crash",
            "alter role ... set synchronous_commit = on, for the roles that produce and work",
        )
    return fine(f"fsync on, synchronous_commit {server.synchronous_commit}")


def judge_defaults(server: Server) -> Judged:
    if server.is_standby:
        return Verdict.WARNING, "this server is a standby: the checks see the primary's state late", "name the primary"
    if server.read_only == "on":
        return (
            Verdict.PROBLEM,
            "default_transaction_read_only is on: nothing can be invoked or claimed",
            "alter database ... set default_transaction_read_only = off",
        )
    if server.isolation != "read committed":
        return (
            Verdict.WARNING,
            f"default_transaction_isolation is {server.isolation}: statements fail with 40001 where others would wait",
            "alter role ... set default_transaction_isolation = 'read committed', for the roles that produce and work",
        )
    return fine(f"transactions are {server.isolation} and may write")


class Connections(NamedTuple):
    """How many sessions there are, and may be for ordinary roles."""

    used: int
    allowed: int


CONNECTIONS: Final = Call(
    b"""
    select (select sum(numbackends)::int4 from pg_catalog.pg_stat_database),
        current_setting('max_connections')::int4 - current_setting('superuser_reserved_connections')::int4
            - coalesce(current_setting('reserved_connections', true), '0')::int4
    """,
    (),
    lambda rows: Connections._make(rows[0]),
)


def judge_connections(found: Connections) -> Judged:
    seen = f"{found.used} of {found.allowed} connections in use"
    free = found.allowed - found.used
    remedy = "put a pooler in front (with listen_dsn= leading past it), or raise max_connections and restart"
    if free <= 3:
        return Verdict.PROBLEM, seen, remedy
    if free < max(5, found.allowed // 10):
        return Verdict.WARNING, seen, remedy
    return fine(seen)


NOTIFY_QUEUE: Final[Call[float]] = Call(
    b"select pg_catalog.pg_notification_queue_usage()", (), lambda rows: float(rows[0][0])
)


def judge_notify_queue(usage: float) -> Judged:
    seen = f"the queue of notifications is {usage:.2%} full"
    if usage <= 0.01:
        return fine(seen)
    return (
        Verdict.PROBLEM if usage > 0.1 else Verdict.WARNING,
        f"{seen}: a session that listens does not read, and when it is full every NOTIFY fails",
        "end the listener that is longest in a transaction or busy: select pid, state, xact_start, query from"
        " pg_stat_activity where xact_start is not null order by xact_start",
    )


class Slot(NamedTuple):
    """A replication slot that nobody reads from."""

    name: str
    wal_status: str | None
    retained: int | None  # bytes of WAL kept for it


SLOTS: Final[Call[list[Slot]]] = Call(
    b"""
    select r.slot_name::text, r.wal_status, case when not pg_catalog.pg_is_in_recovery() then
        pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_lsn(), r.restart_lsn)::int8 end
    from pg_catalog.pg_replication_slots r where not r.active order by 3 desc nulls last
    """,
    (),
    lambda rows: [Slot._make(row) for row in rows],
)


def judge_slots(slots: list[Slot]) -> Judged:
    if not slots:
        return fine("no replication slot is abandoned")
    said = [f"{s.name} ({(s.retained or 0) / (1 << 20):,.0f} MiB of WAL kept)" for s in slots]
    is_bad = any((s.retained or 0) > 10 << 30 or s.wal_status in ("unreserved", "lost") for s in slots)
    return (
        Verdict.PROBLEM if is_bad else Verdict.WARNING,
        f"replication slots that nobody reads: {listed(said)}; the disk fills up",
        f"connect its consumer, or select pg_drop_replication_slot({literal(slots[0].name)})",
    )


class Clocks(NamedTuple):
    """The server's time and this machine's around the asking, in seconds since 1970."""

    before: float
    server: float
    after: float


CLOCK: Final[Call[float]] = Call(
    b"select date_part('epoch', pg_catalog.clock_timestamp())", (), lambda rows: float(rows[0][0])
)


def judge_clock(clocks: Clocks) -> Judged:
    # Beyond what the round trip explains.
    ahead = max(0.0, clocks.server - clocks.after) - max(0.0, clocks.before - clocks.server)
    if abs(ahead) <= 1.0:
        return fine("the clocks of client and server agree within a second")
    word = "ahead of" if ahead > 0 else "behind"
    return (
        Verdict.WARNING,
        f"the server's clock is {duration(abs(ahead))} {word} this machine's; due times go by the server's",
        "set both by NTP; until then prefer delay= to run_at=",
    )
