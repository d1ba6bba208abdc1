"""The plugin's fixtures, as this library's users get them."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgconductor.errors import InvalidOption, NoDatabase
from pgconductor.testing import DatabaseClock, Databases, DatabaseServer, missing_docker, missing_program, open_server
from pgconductor.testing.server import folder_in_memory


def _schemas(dsn: str) -> set[str]:
    with psycopg.connect(dsn) as conn:
        return {
            name for (name,) in conn.execute("select nspname from pg_namespace where nspname !~ '^(pg_|information)'")
        }


def _moment(conn: psycopg.Connection[tuple[Any, ...]], query: str) -> datetime:
    row = conn.execute(query.encode()).fetchone()
    assert row is not None
    moment: datetime = row[0]
    return moment


def test_installed_database_has_the_schema_and_the_empty_one_has_not(
    pgconductor_dsn: str, pgconductor_empty_dsn: str
) -> None:
    """The two fixtures mixed up, or a template cloned before the schema was committed."""
    assert _schemas(pgconductor_dsn) == {"public", "pgconductor"}
    assert _schemas(pgconductor_empty_dsn) == {"public"}


def test_each_database_is_fresh_and_gone_afterwards(
    pgconductor_databases: Databases, pgconductor_server: DatabaseServer
) -> None:
    """One test's rows seen by the next, or databases piling up on a server that outlives the run."""
    with pgconductor_databases.installed() as first, psycopg.connect(first, autocommit=True) as leaked:
        leaked.execute("create table public.trace ()")
        with pgconductor_databases.installed() as second, psycopg.connect(second) as conn:
            assert conn.execute("select to_regclass('public.trace')").fetchone() == (None,)
    # `leaked` was still connected: the drop ended its session.
    names = [conninfo_to_dict(dsn)["dbname"] for dsn in (first, second)]
    with psycopg.connect(pgconductor_server.dsn()) as conn:
        assert conn.execute("select count(*) from pg_database where datname = any(%s)", [names]).fetchone() == (0,)


def test_server_reports_its_version(pgconductor_server: DatabaseServer) -> None:
    """A test that skips by version would decide by a wrong one."""
    with psycopg.connect(pgconductor_server.dsn()) as conn:
        assert pgconductor_server.version == conn.info.server_version
        assert conn.execute("show fsync").fetchone() == (pgconductor_server.settings()["fsync"],)
    assert f"fsync={pgconductor_server.settings()['fsync']}" in pgconductor_server.describe()


def test_throwaway_server_is_in_memory_where_there_is_room_and_on_a_disk_elsewhere(tmp_path: Path) -> None:
    """A container's 64 MB of shared memory filled up in the middle of a run, or each database written to a disk."""
    assert folder_in_memory(tmp_path, room=1) == tmp_path
    assert folder_in_memory(tmp_path, room=1 << 60) is None
    assert folder_in_memory(tmp_path / "missing", room=1) is None


def test_clock_moves_only_its_own_database(
    pgconductor_clock: DatabaseClock, pgconductor_dsn: str, pgconductor_databases: Databases, pgconductor_schema: str
) -> None:
    """Time moved for other tests too, or a clock that open sessions do not see."""
    with psycopg.connect(pgconductor_dsn, autocommit=True) as early:
        early.execute(f"prepare now as select {pgconductor_schema}._private_clock()".encode())
        before = _moment(early, "execute now")
        pgconductor_clock.advance(timedelta(days=2))
        pgconductor_clock.advance(-3600.0)
        after = _moment(early, "execute now")
    assert timedelta(hours=47) <= after - before < timedelta(hours=47, minutes=5)
    with pgconductor_databases.installed() as other, psycopg.connect(other) as conn:
        elsewhere = _moment(conn, f"select {pgconductor_schema}._private_clock()")
    assert abs(elsewhere - before) < timedelta(minutes=5)


def test_clock_can_be_set_and_goes_on_ticking(pgconductor_clock: DatabaseClock) -> None:
    """A moment far away must be reachable exactly, for expiry and daylight-saving tests."""
    moment = datetime(2040, 2, 29, 23, 59, tzinfo=UTC)
    pgconductor_clock.set(moment)
    first, second = pgconductor_clock.now(), pgconductor_clock.now()
    assert moment < first < second < moment + timedelta(minutes=1)


def test_clock_refuses_a_naive_moment(pgconductor_clock: DatabaseClock) -> None:
    """A naive moment would mean another instant on a server in another zone."""
    with pytest.raises(InvalidOption, match="aware"):
        pgconductor_clock.set(datetime(2040, 1, 1))  # noqa: DTZ001 - that is the point


# --- the choice of the server ---


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"PGCONDUCTOR_TEST_SERVER": "newest"}, "PGCONDUCTOR_TEST_SERVER='newest': name a major version or the path"),
        ({"PGCONDUCTOR_TEST_SERVER": "/nowhere/bin"}, "/nowhere/bin/postgres does not run"),
        ({"PGCONDUCTOR_TEST_DSN": "host=/nowhere"}, "the server of PGCONDUCTOR_TEST_DSN does not answer"),
    ],
)
def test_server_that_is_not_there_names_the_variable(environ: dict[str, str], message: str) -> None:
    """The variable is set somewhere far away, and every test fails with an error of the driver."""
    with pytest.raises(NoDatabase, match=message), open_server(environ):
        pass


def test_named_server_is_used_and_left_as_it_was(pgconductor_server: DatabaseServer) -> None:
    """PGCONDUCTOR_TEST_DSN may name a server that others use too."""
    with psycopg.connect(pgconductor_server.dsn()) as conn:

        def databases() -> set[str]:
            return {name for (name,) in conn.execute("select datname from pg_database")}

        before = databases()
        with open_server({"PGCONDUCTOR_TEST_DSN": pgconductor_server.dsn("template1")}) as named:
            assert named.version == pgconductor_server.version
            made = Databases(named)
            with made.installed() as dsn, psycopg.connect(dsn) as inside:
                assert inside.info.dbname in databases() - before
            made.close()
        assert databases() == before


@pytest.mark.skipif(bool(missing_docker()), reason=missing_docker() or "-")
def test_container_is_used_when_asked_for() -> None:
    """PGCONDUCTOR_TEST_CONTAINER=1 silently answered by the wheel."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(
                open_server({"PGCONDUCTOR_TEST_CONTAINER": "1", "PGCONDUCTOR_TEST_SERVER": "postgres:15"})
            )
        except NoDatabase as error:
            pytest.skip(f"needs the image postgres:15: {error}")
        assert server.version // 10000 == 15
        assert server.settings()["fsync"] == "off"
        assert "postgres:15" in server.describe()


def test_missing_program_names_itself_and_the_remedy() -> None:
    """A skipped test that does not say how to run it is never run."""
    assert missing_program("sh", "-") == ""
    assert missing_program("no-such-program", "apt-get install it") == "needs no-such-program (apt-get install it)"
