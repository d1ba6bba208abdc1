"""The process between an embedded server and its users: starts `postgres`, and stops it when the last user is gone.

Run as a script by `pgconductor.embedded`, with the standard library only (`python -I -S`). It leaves the caller's
session, so that Ctrl-C or a closing terminal reaches neither it nor the server, and it is nobody's child, so that
nobody has to wait for it.

Three lock files tell everything, and the kernel drops them with the processes that hold them; no process id is ever
trusted alone:

- `start.lock`, exclusive: held while a server is being started or stopped.
- `users.lock`, shared: held by every program that uses the server. The keeper waits for it exclusively: it gets it
  when all are gone.
- `server.lock`, exclusive: taken here and inherited by `postgres` and all its children. While it is held, the server
  is alive.

The keeper never waits for `start.lock` while it holds `users.lock`, for a starting program holds them the other way
round.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any


def _wait_ready(child: subprocess.Popen[bytes], data: Path, deadline: float) -> str | None:
    """Wait until `postmaster.pid` says that the server accepts connections; return what went wrong, or None."""
    while time.monotonic() < deadline:
        if child.poll() is not None:
            return f"postgres exited with status {child.returncode}"
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            lines = []
        # Line 1 is the process id (a file from an earlier life names another), line 8 the state.
        if len(lines) >= 8 and lines[0].strip() == str(child.pid) and lines[7].strip() == "ready":
            return None
        time.sleep(0.01)
    child.send_signal(signal.SIGQUIT)
    child.wait()
    return "postgres did not become ready in time"


def _tell(report: int, what: str) -> None:
    """Report to the program that started us; if it has died meanwhile, its lock is free and we stop the server like
    any other time.
    """
    with suppress(BrokenPipeError):
        os.write(report, what.encode())
    os.close(report)


def _stop(child: subprocess.Popen[bytes], mode: signal.Signals) -> None:
    """Stop the server: as asked, after 20 s at once, after 10 s more by force."""
    for how, patience in ((mode, 20.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, None)):
        child.send_signal(how)
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return


def _wait_until_unused(home: Path) -> int:
    """Wait until no program uses the server; return a descriptor that holds `start.lock`, so that none can begin to."""
    users = os.open(home / "users.lock", os.O_RDWR)
    start = os.open(home / "start.lock", os.O_RDWR)
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        try:
            fcntl.flock(start, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(users, fcntl.LOCK_UN)
            time.sleep(0.02)
            continue
        fcntl.flock(users, fcntl.LOCK_UN)
        return start


def main(arguments: str) -> None:
    """Keep one server. `arguments` is JSON: `home`, `sockets`, `command`, `user` (uid and gid, or null), `environment`,
    `timeout` in seconds, `report` (a descriptor to write "ready" or the problem to), `throwaway` (remove everything
    afterwards).
    """
    options: dict[str, Any] = json.loads(arguments)
    home = Path(options["home"])
    report: int = options["report"]
    if os.fork():
        os._exit(0)

    server_lock = os.open(home / "server.lock", os.O_RDWR)
    fcntl.flock(server_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the caller looked while holding start.lock: it is free
    uid, gid = options["user"] or (None, None)
    with (home / "server.log").open("ab") as log:
        try:
            command: list[str] = options["command"]
            child: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=options["environment"],
                pass_fds=(server_lock,),
                umask=0o077,
                user=uid,
                group=gid,
                extra_groups=None if uid is None else [],
            )
        except OSError as error:
            _tell(report, f"{options['command'][0]}: {error}")
            return
    os.close(server_lock)  # from here on the server alone holds it
    problem = _wait_ready(child, home / "data", time.monotonic() + options["timeout"])
    _tell(report, problem or "ready")
    if problem is not None:
        return

    stopping = threading.Event()

    def leave_with_server() -> None:
        child.wait()
        if not stopping.is_set():
            os._exit(0)

    threading.Thread(target=leave_with_server, daemon=True).start()
    start = _wait_until_unused(home)
    stopping.set()
    throwaway: bool = options["throwaway"]
    _stop(child, signal.SIGQUIT if throwaway else signal.SIGINT)
    if throwaway:
        shutil.rmtree(home, ignore_errors=True)
    if not Path(options["sockets"]).is_relative_to(home):
        shutil.rmtree(options["sockets"], ignore_errors=True)
    os.close(start)


if __name__ == "__main__":
    main(sys.argv[1])
