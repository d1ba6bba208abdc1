"""What processes of this machine have used, read from /proc: processor time, resident memory.

Elsewhere than on Linux, and for a server on another machine, there is nothing to read: `None`, never a wrong figure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .harness import Database


def cpu_seconds(pids: Iterable[int]) -> float | None:
    """Processor seconds of all threads of these processes since they began; of those that have ended, none."""
    total = 0.0
    has_any = False
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                # In nanoseconds; `stat` counts in ticks of 10 ms, too coarse for a process that does next to nothing.
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
            except OSError:
                continue
            has_any = True
    return total if has_any else None


def resident_bytes(pid: int) -> int | None:
    """Memory that a process has resident now, with what it shares with others."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def server_processes(database: Database, *, only_workers: bool = False) -> list[int]:
    """Processes of the database's server except the session that asks: with those that serve no session, or
    `only_workers`, only the sessions that workers have in this database. Empty if the server is not on this machine.
    """
    rows = database.conn.execute(
        b"select pid from pg_stat_activity where pid <> pg_backend_pid()"
        b" and (not %s or datname = current_database() and starts_with(application_name, 'pgconductor '))",
        (only_workers,),
    ).fetchall()
    return [pid for (pid,) in rows if _is_postgres(pid)]


def _is_postgres(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("postgres")
    except OSError:
        return False
