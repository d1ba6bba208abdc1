"""One cluster in one folder: its lock files, its creation, its start and its stop.

The folder holds `data` (PGDATA), `sockets`, `server.log` and the three locks that `keeper` explains. Functions that
start or stop are called while holding `start.lock`; all but a few milliseconds of waiting for others is bounded. An
interruption at any point leaves a folder that the next start can use: a cluster is made beside its place and moved,
and a started server that nobody uses is stopped by its keeper.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import NoDatabase
from . import keeper
from .installation import Account, Installation, reachable_binaries, serving_account

_START_TIMEOUT = 60.0  # seconds; recovery after a crash included
_SOCKET_PATH_BYTES = 103  # what the strictest platform (macOS) allows; Linux has 107
_SOCKET_NAME = ".s.PGSQL.5432"

# --- folders ---


def make_home(home: Path) -> None:
    """Make the server's folder and its lock files."""
    try:
        if os.geteuid() == 0 and not home.parent.exists():
            home.parent.mkdir(parents=True)
            home.parent.chmod(0o711)  # whatever the umask says, the server's account must get through
        home.mkdir(parents=True, exist_ok=True)
        if home.stat().st_uid != os.geteuid():
            raise NoDatabase(f"{home} belongs to another user: pass another data_dir, or remove it")
        home.chmod(0o711 if os.geteuid() == 0 else 0o700)
        for name in ("start.lock", "users.lock", "server.lock"):
            (home / name).touch(mode=0o600)
    except OSError as error:
        raise NoDatabase(f"no folder for the embedded server in {home}: {error}; pass another data_dir") from error


def _refuse_closed_parents(home: Path, account: Account) -> None:
    for folder in home.parents:
        seen = folder.stat()
        bit = (
            stat.S_IXUSR if seen.st_uid == account.uid else stat.S_IXGRP if seen.st_gid == account.gid else stat.S_IXOTH
        )
        if not seen.st_mode & bit:
            raise NoDatabase(
                f"{folder} is closed to the account {account.name}, as which root must run PostgreSQL: "
                "use a folder open to it"
            )


def _own_folder(path: Path, account: Account | None) -> None:
    path.mkdir(mode=0o700, exist_ok=True)
    if account is not None:
        os.chown(path, account.uid, account.gid)


def _socket_folder(home: Path, account: Account | None) -> Path:
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
def starting(home: Path) -> Iterator[None]:
    """Be the only one who starts or stops the server in `home`."""
    deadline = time.monotonic() + _START_TIMEOUT
    with _locked_file(home / "start.lock") as start:
        while not _try_lock(start, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise NoDatabase(
                    f"another program has been starting or stopping the server in {home} for {_START_TIMEOUT:.0f} s"
                )
            time.sleep(0.02)
        yield


@contextmanager
def in_use(home: Path, *, throwaway: bool = False) -> Iterator[None]:
    """Count as a user of the server; the last one to leave stops it."""
    with _locked_file(home / "users.lock") as users:
        # Blocks for a moment at most: exclusively it is held only by a keeper or a leaver that looks whether there
        # are users.
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with starting(home):
                fcntl.flock(users, fcntl.LOCK_UN)
                if _nobody_else(users):
                    stop(home, signal.SIGQUIT if throwaway else signal.SIGINT)


def _nobody_else(users: int) -> bool:
    """Tell whether no program uses the server. Called while holding `start.lock`."""
    while True:
        if _try_lock(users, fcntl.LOCK_EX):
            return True
        # Held shared by another user, or exclusively and briefly by the keeper, which is looking too.
        if _try_lock(users, fcntl.LOCK_SH):
            return False
        time.sleep(0.005)


def is_alive(home: Path) -> bool:
    with _locked_file(home / "server.lock") as server:
        return not _try_lock(server, fcntl.LOCK_SH)


def _gone_within(home: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(home):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- start and stop, both while holding start.lock ---


def postmaster_lines(home: Path) -> list[str]:
    try:
        return (home / "data" / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        raise NoDatabase(f"the server in {home} does not run") from None


def _environment() -> dict[str, str]:
    """Our environment without the variables that steer PostgreSQL, in a locale that every machine has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
    return {**kept, "LC_ALL": "C"}


def start(home: Path, installation: Installation, settings: Mapping[str, str], *, throwaway: bool) -> None:
    account = serving_account(home)
    if account is not None:
        _refuse_closed_parents(home, account)
    bin_dir = reachable_binaries(installation, account)
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
                    [sys.executable, "-I", "-S", keeper.__file__, json.dumps(arguments)],
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
        raise NoDatabase(
            f"PostgreSQL {installation.version} did not start in {home}: {problem or 'its keeper died'}\n{tail}"
        )


def _initialise(home: Path, bin_dir: Path, account: Account | None, *, throwaway: bool) -> None:
    """Create the cluster beside its place and move it there, so that one half made is never taken for whole."""
    # A killed program may have left an initdb that still runs: never in the folder of another.
    for abandoned in home.glob("data.new-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix="data.new-", dir=home))
    _own_folder(scratch, account)
    command = [
        str(bin_dir / "initdb"),
        "-D",
        str(scratch),
        "--username=postgres",
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C",
    ]
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


def stop(home: Path, how: signal.Signals) -> None:
    """Stop the server if it runs, and return when it is gone: as asked, then at once, then by force."""
    if not is_alive(home):
        return
    # Without the file it is just starting, or ending already, and its last processes are what is alive.
    deadline = time.monotonic() + 30.0
    lines: list[str] = []
    while not lines:
        try:
            lines = postmaster_lines(home)
        except NoDatabase:
            if time.monotonic() > deadline:
                raise
        if not lines and _gone_within(home, 0.05):
            return
    pid, sockets = int(lines[0]), Path(lines[4].strip()) if len(lines) > 4 else home
    for attempt, patience in ((how, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
        with suppress(ProcessLookupError):
            os.kill(pid, attempt)
        if _gone_within(home, patience):
            break
    else:
        raise NoDatabase(f"the server in {home} (process {pid}) cannot be stopped")
    if not sockets.is_relative_to(home):
        shutil.rmtree(sockets, ignore_errors=True)
