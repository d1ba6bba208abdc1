"""Which PostgreSQL server the tests use, and what it is.

Owns the choice between a named server, a container and a throwaway one, and the life of the latter two. It does not
create databases (`databases`) and holds no connection open between calls. Leaving `open_server` stops what it
started, also when the test run is interrupted; a throwaway server ends even if the run is killed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..embedded import own_server, report_settings
from ..errors import NoDatabase

# Nothing here outlives the test run, so nothing needs to reach the disk. Room for many connections and for two-phase
# commit.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_prepared_transactions": "20",
}

_MEMORY = Path("/dev/shm")  # Linux keeps what is written there in memory
_ROOM = 3 << 30  # bytes: several test processes have a server each, which was seen to take 300 MB


class DatabaseServer:
    """A server on which tests create databases."""

    def __init__(self, dsn: Callable[[str], str], kind: str) -> None:
        self._dsn = dsn
        self.kind = kind
        """Where it comes from, in words."""
        with psycopg.connect(dsn("postgres"), autocommit=True) as conn:
            self.version: int = conn.info.server_version
            """The server's version as PostgreSQL numbers it, for example 180004."""
            self._settings = report_settings(conn)

    def __repr__(self) -> str:
        return f"<DatabaseServer {self.version} {self.kind}>"

    def dsn(self, dbname: str = "postgres") -> str:
        """Return the connection string of the database `dbname`."""
        return self._dsn(dbname)

    def settings(self) -> Mapping[str, str]:
        """Return version and durability settings as the server reported them."""
        return self._settings

    def describe(self) -> str:
        """Return one line: where the server comes from and its settings."""
        return f"{self.kind}; " + ", ".join(f"{name}={value}" for name, value in self._settings.items())


@contextmanager
def open_server(environ: Mapping[str, str] = os.environ) -> Iterator[DatabaseServer]:
    """Use or start the server that `environ` asks for, see the package's documentation.

    Raises `NoDatabase` when it does not answer or cannot be started.
    """
    if named := environ.get("PGCONDUCTOR_TEST_DSN"):
        yield _connected(lambda dbname: make_conninfo(named, dbname=dbname), "the server of PGCONDUCTOR_TEST_DSN")
    elif environ.get("PGCONDUCTOR_TEST_CONTAINER") == "1":
        choice = environ.get("PGCONDUCTOR_TEST_SERVER") or "18"
        with _container(choice if ":" in choice else f"postgres:{choice}") as server:
            yield server
    else:
        choice = environ.get("PGCONDUCTOR_TEST_SERVER", "")
        bin_dir = Path(choice) if "/" in choice else None
        if choice and bin_dir is None and not choice.isdecimal():
            raise NoDatabase(f"PGCONDUCTOR_TEST_SERVER={choice!r}: name a major version or the path of a bin folder")
        major = int(choice) if choice.isdecimal() else None
        with own_server(bin_dir, major=major, settings=_SETTINGS, base_dir=folder_in_memory()) as own:
            yield DatabaseServer(own.dsn, f"a throwaway server from {'the wheel' if bin_dir is None else bin_dir}")


def folder_in_memory(folder: Path = _MEMORY, room: int = _ROOM) -> Path | None:
    """Return where a throwaway server's files are kept in memory; None where that is missing, closed or too small.

    Each test has a fresh database, about 350 files of 12 MB together: on some disks that costs ten times the processor
    time that it costs in memory, more than most tests themselves.
    """
    try:
        has_room = os.access(folder, os.W_OK | os.X_OK) and shutil.disk_usage(folder).free >= room
    except OSError:
        has_room = False
    return folder if has_room else None


def _connected(dsn: Callable[[str], str], kind: str) -> DatabaseServer:
    try:
        return DatabaseServer(dsn, kind)
    except psycopg.OperationalError as error:
        raise NoDatabase(f"{kind} does not answer: {error}") from error


@contextmanager
def _container(image: str) -> Iterator[DatabaseServer]:
    try:
        from docker.errors import DockerException
        from testcontainers.community.postgres import PostgresContainer
    except ImportError as error:
        raise NoDatabase(
            "PGCONDUCTOR_TEST_CONTAINER=1 needs testcontainers: pip install 'testcontainers>=4.15'"
        ) from error
    flags = " ".join(f"-c {name}={value}" for name, value in _SETTINGS.items())
    try:
        container = PostgresContainer(image, driver=None).with_command(f"postgres {flags}").start()
    except DockerException as error:
        raise NoDatabase(f"PGCONDUCTOR_TEST_CONTAINER=1, and Docker does not start {image}: {error}") from error
    try:
        parameters = conninfo_to_dict(str(container.get_connection_url()))
        yield _connected(
            lambda dbname: make_conninfo("", **{**parameters, "dbname": dbname}), f"a container of {image}"
        )
    finally:
        container.stop()
