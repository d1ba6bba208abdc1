"""Two servers on this machine, the second a streaming standby of the first, and what happens to the first.

Made of the parts of `pgconductor.embedded`, with `pg_basebackup -R` for `initdb`. All of it ends with the block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor.embedded import own_server
from pgconductor.embedded.cluster import in_use, make_home
from pgconductor.embedded.installation import reachable_binaries, serving_account, wheel_installation
from pgconductor.embedded.server import OwnServer
from pgconductor.testing.server import folder_in_memory

LIMIT = 60.0

_STANDBY = "standby"
_SETTINGS = {"wal_receiver_timeout": "5s", "wal_sender_timeout": "5s"}


def _run(home: Path, program: str, *arguments: str) -> None:
    """Run a program of the server's as the account that runs the server."""
    installation = wheel_installation(None)
    account = serving_account(home)
    done = subprocess.run(
        [str(reachable_binaries(installation, account) / program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env={**{name: value for name, value in os.environ.items() if not name.startswith("PG")}, "LC_ALL": "C"},
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
        timeout=LIMIT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{program} failed: {done.stdout[-2000:]}")


def query(dsn: str, text: str, *params: object) -> list[tuple[Any, ...]]:
    """Execute one statement in a transaction of its own and return its rows."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        cursor = conn.execute(text.encode(), params or None)
        return cursor.fetchall() if cursor.description else []


def start_as_standby(server: OwnServer) -> None:
    """Start a server that was stopped, read-only, following nobody."""
    signal_file = server.data_path / "standby.signal"
    signal_file.touch()
    owner = server.data_path.stat()
    os.chown(signal_file, owner.st_uid, owner.st_gid)
    server.start()


class Pair:
    """A primary and its standby; `dsn` names both and wants the one that can be written to."""

    def __init__(self, primary: OwnServer, standby: OwnServer) -> None:
        self.primary = primary
        self.standby = standby
        # Each socket's folder stays the same as long as its server runs, and the pair's DSN outlives both.
        hosts = [str(conninfo_to_dict(server.dsn())["host"]) for server in (primary, standby)]
        self.dsn = make_conninfo(
            "",
            host=",".join(hosts),
            port="5432,5432",
            user="postgres",
            dbname="postgres",
            target_session_attrs="read-write",
        )

    def crash_primary(self) -> None:
        """End it at once, as if its machine had lost power."""
        self.primary.stop("immediate")

    def promote(self) -> None:
        """Make the standby the primary; returns when it can be written to."""
        data = str(self.standby.data_path)
        _run(self.standby.home, "pg_ctl", "promote", "-D", data, "--wait", "--timeout=60")

    def stop_receiving(self) -> None:
        """Cut the stream: what is committed from now on is on the primary only."""
        query(self.standby.dsn(), "alter system set primary_conninfo = ''")
        query(self.standby.dsn(), "select pg_reload_conf()")
        self.until(lambda: query(self.standby.dsn(), "select from pg_stat_wal_receiver") == [])

    def return_as_standby(self) -> None:
        """Start the former primary again, read-only, following nobody."""
        start_as_standby(self.primary)

    @staticmethod
    def until(condition: Any, limit: float = LIMIT) -> None:
        """Until a fact holds that only a server tells."""
        give_up_at = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < give_up_at, f"did not happen within {limit} s"
            time.sleep(0.01)


@contextmanager
def _standby_of(primary: OwnServer, fsync: str, base_dir: Path | None) -> Iterator[OwnServer]:
    home = Path(tempfile.mkdtemp(prefix="pgconductor-", dir=base_dir))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        make_home(home)
        account = serving_account(home)
        scratch = home / "backup"
        scratch.mkdir(mode=0o700)
        if account is not None:
            os.chown(scratch, account.uid, account.gid)
        source = conninfo_to_dict(primary.dsn())
        conninfo = make_conninfo(
            "", host=source["host"], user="postgres", dbname="replication", application_name=_STANDBY
        )
        options = ["-R", "-X", "stream", "--checkpoint=fast", "--no-sync"]
        _run(home, "pg_basebackup", "-D", str(scratch), "-d", conninfo, *options)
        scratch.rename(home / "data")
        standby = OwnServer(home, wheel_installation(None), {"fsync": fsync, **_SETTINGS})
        stack.enter_context(in_use(home, throwaway=True))
        standby.start()
        yield standby


@contextmanager
def open_pair(*, synchronous: bool, fsync: str = "off") -> Generator[Pair]:
    """A pair whose standby streams. `synchronous`: a commit waits until the standby shows it."""
    base_dir = folder_in_memory() if fsync == "off" else None
    with (
        own_server(settings={"fsync": fsync, **_SETTINGS}, base_dir=base_dir) as primary,
        _standby_of(primary, fsync, base_dir) as standby,
    ):
        if synchronous:
            for setting in (
                f"synchronous_standby_names = '{_STANDBY}'",
                "synchronous_commit = 'remote_apply'",
            ):
                query(primary.dsn(), f"alter system set {setting}")
            query(primary.dsn(), "select pg_reload_conf()")
        state = "sync" if synchronous else "async"
        Pair.until(
            lambda: query(primary.dsn(), "select state, sync_state from pg_stat_replication") == [("streaming", state)]
        )
        yield Pair(primary, standby)
