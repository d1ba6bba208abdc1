"""Bounds on waiting for a server that vanished, on each connection that a client makes."""

from __future__ import annotations

from psycopg.conninfo import make_conninfo

from pgconductor import Conductor
from pgconductor.db.session import connect, connect_sync

BOUNDS = {
    "connect_timeout": "5",
    "tcp_user_timeout": "10000",
    "keepalives_idle": "10",
    "keepalives_interval": "10",
    "keepalives_count": "2",
}


def bounds(parameters: dict[str, str]) -> dict[str, str]:
    return {name: parameters.get(name, "") for name in BOUNDS}


async def test_clients_connections_have_bounds_unless_the_connection_string_has_its_own(
    pgconductor_empty_dsn: str,
) -> None:
    """A statement on a connection that the network has lost waits until the kernel gives up, in 15 minutes."""
    own = make_conninfo(pgconductor_empty_dsn, tcp_user_timeout=7)
    for dsn, expected in ((pgconductor_empty_dsn, BOUNDS), (own, BOUNDS | {"tcp_user_timeout": "7"})):
        with connect_sync(dsn) as blocking:
            assert bounds(blocking.info.get_parameters()) == expected
        async with await connect(dsn) as conn:
            assert bounds(conn.info.get_parameters()) == expected
        async with Conductor(dsn) as conductor, conductor._require_open().pool.connection() as pooled:
            assert bounds(pooled.info.get_parameters()) == expected
