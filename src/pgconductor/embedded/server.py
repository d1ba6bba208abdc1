"""The servers as their users see them: a handle with databases on it, and the two ways to get one.

Owns the choice of folder and settings and the databases on a server. The processes and locks are `cluster`'s, the
binaries `installation`'s. Each method opens a connection and closes it again, so that a handle holds nothing and any
thread may use it.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from ..errors import InvalidOption, Misuse
from .cluster import in_use, is_alive, make_home, postmaster_lines, start, starting, stop
from .installation import Installation, data_home, wheel_installation

StopMode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}

_TEMPORARY = "pgconductor: temporary, dropped at the next start of the server"
_OURS = frozenset({"data_directory", "hba_file", "ident_file", "port", "unix_socket_directories"})


class EmbeddedServer:
    """A running server, valid inside the `with` block that gave it.

    Its methods open a connection each and close it again; they may be used from any thread.
    """

    def __init__(self, home: Path, bin_dir: Path) -> None:
        self.home = home
        self.bin_dir = bin_dir

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.home}>"

    @property
    def log_path(self) -> Path:
        """The server's log since its last start; the one before is beside it, as ``server.log.old``."""
        return self.home / "server.log"

    @property
    def data_path(self) -> Path:
        """The data folder (PGDATA)."""
        return self.home / "data"

    @property
    def postmaster_pid(self) -> int:
        """Process id of the server's first process."""
        return int(postmaster_lines(self.home)[0])

    def dsn(self, dbname: str = "postgres") -> str:
        """Return the connection URI of the database `dbname`, which need not exist."""
        sockets = postmaster_lines(self.home)[4].strip()
        return f"postgresql://postgres@/{quote(dbname, safe='')}?host={quote(sockets, safe='')}"

    @cached_property
    def version(self) -> int:
        """The server's version as PostgreSQL numbers it, for example 180004."""
        with self._connect() as conn:
            return conn.info.server_version

    def settings(self) -> dict[str, str]:
        """Return the settings that decide what a measurement means, as the server reports them."""
        with self._connect() as conn:
            return report_settings(conn)

    def create_database(self, prefix: str = "pgconductor") -> str:
        """Create a temporary database and return its URI.

        `prefix` begins its name, 1 to 40 characters of a-z, 0-9 and _. The database is for this program: drop it with
        `drop_database`; one that a killed program left behind is dropped when the server next starts.
        """
        if not re.fullmatch(r"[a-z0-9_]{1,40}", prefix):
            raise InvalidOption(f"database prefix {prefix!r}: use 1 to 40 characters of a-z, 0-9 and _")
        name = f"{prefix}_{secrets.token_hex(6)}"
        with self._connect() as conn:
            conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
            conn.execute(sql.SQL("comment on database {} is {}").format(sql.Identifier(name), sql.Literal(_TEMPORARY)))
        return self.dsn(name)

    def ensure_database(self, name: str) -> str:
        """Create the database `name` unless it exists, and return its URI. Programs that do this at once do not
        disturb each other.
        """
        with self._connect() as conn:
            conn.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [f"pgconductor ensure_database {name}"])
            if conn.execute("select from pg_database where datname = %s", [name]).fetchone() is None:
                conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        return self.dsn(name)

    def drop_database(self, dsn: str) -> None:
        """Drop the database that `dsn` names, ending its sessions; nothing happens if it is gone already."""
        name = str(conninfo_to_dict(dsn)["dbname"])
        with self._connect() as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.dsn(), autocommit=True)

    def drop_orphans(self) -> None:
        """Drop temporary databases. Only who has just started the server may: nobody else uses it yet."""
        with self._connect() as conn:
            rows = conn.execute(
                "select datname from pg_database where shobj_description(oid, 'pg_database') = %s", [_TEMPORARY]
            ).fetchall()
        for (name,) in rows:
            self.drop_database(self.dsn(str(name)))


class OwnServer(EmbeddedServer):
    """A throwaway cluster that nobody else uses: it may be stopped, crashed and started again."""

    def __init__(self, home: Path, installation: Installation, settings: Mapping[str, str]) -> None:
        super().__init__(home, installation.bin_dir)
        self._installation = installation
        self._settings = dict(settings)

    def start(self) -> None:
        """Start the server again after `stop`; returns when it accepts connections."""
        with starting(self.home):
            if not is_alive(self.home):
                start(self.home, self._installation, self._settings, throwaway=True)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until all its processes are gone. ``immediate`` is a crash: the next start
        recovers.
        """
        with starting(self.home):
            stop(self.home, _SIGNALS[mode])

    def restart(self, mode: StopMode = "fast", settings: Mapping[str, str] | None = None) -> None:
        """Stop and start the server; `settings`, where given, replace those it was opened with."""
        if settings is not None:
            self._settings = _checked(settings)
        self.stop(mode)
        self.start()


@contextmanager
def embedded_server(
    *, major: int | None = None, data_dir: Path | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[EmbeddedServer]:
    """Use the persistent server of this user, starting it if it does not run.

    `major` is 18 or 16 (what the wheel has; default the newest). `data_dir` is a folder of your choice instead of the
    one in the platform's place for application data. `settings` are applied if this call starts the server; if the
    server runs already with others, `Misuse` is raised. Leaving the block stops the server if no other program uses
    it, and waits for that.

    Raises `NoDatabase` when the wheel is not installed or the server does not start; the message ends with its log.
    """
    wanted = _checked(settings or {})
    installation = wheel_installation(major)
    base = data_home() if data_dir is None else data_dir.absolute()
    home = base / f"postgresql-{installation.major}"
    make_home(home)
    server = EmbeddedServer(home, installation.bin_dir)
    with in_use(home):
        with starting(home):
            if is_alive(home):
                _refuse_other_settings(home, wanted)
            else:
                start(home, installation, wanted, throwaway=False)
                (home / "settings.json").write_text(json.dumps(wanted))
                server.drop_orphans()
        yield server


@contextmanager
def own_server(
    bin_dir: Path | None = None,
    *,
    major: int | None = None,
    settings: Mapping[str, str] | None = None,
    base_dir: Path | None = None,
) -> Iterator[OwnServer]:
    """Create a cluster, start it, and stop and remove it when the block is left or this process dies.

    `bin_dir` holds `initdb` and `postgres` of PostgreSQL 15 or later; without it the wheel's binaries of version
    `major` (default the newest) are used. `settings` are configuration parameters, for example ``{"fsync": "off"}``.
    `base_dir` is where the cluster's folder is made, by default the folder for temporary files.

    Raises `NoDatabase` when the binaries are missing or the server does not start; the message ends with its log.
    """
    wanted = _checked(settings or {})
    installation = wheel_installation(major) if bin_dir is None else Installation.at(bin_dir)
    home = Path(tempfile.mkdtemp(prefix="pgconductor-", dir=base_dir))
    try:
        make_home(home)
        server = OwnServer(home, installation, wanted)
        with in_use(home, throwaway=True):
            server.start()
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


def report_settings(conn: psycopg.Connection[tuple[object, ...]]) -> dict[str, str]:
    """Return version and durability settings of the server that `conn` is connected to."""
    names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "max_connections", "shared_buffers")
    rows = conn.execute(
        "select name, current_setting(name) from unnest(%s::text[]) with ordinality n(name, i) order by i",
        [list(names)],
    )
    return {str(name): str(value) for name, value in rows}


def _checked(settings: Mapping[str, str]) -> dict[str, str]:
    for name in settings:
        if not re.fullmatch(r"[a-z_][a-z0-9_.]*", name):
            raise InvalidOption(f"{name!r} is not the name of a PostgreSQL setting")
        if name in _OURS:
            raise InvalidOption(f"setting {name!r} belongs to the embedded server itself")
    return dict(settings)


def _refuse_other_settings(home: Path, wanted: Mapping[str, str]) -> None:
    try:
        present: dict[str, str] = json.loads((home / "settings.json").read_text())
    except FileNotFoundError:
        present = {}
    differing = {name: value for name, value in wanted.items() if present.get(name) != value}
    if differing:
        raise Misuse(
            f"the embedded server in {home} runs already, without {differing}: "
            "end the programs that use it, or use own_server()"
        )
