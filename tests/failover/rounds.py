"""One failover under load: producers that count what was acknowledged, workers that write down what they started.

`run_round` gives the figures and raises `AssertionError` where a promise is broken. Acknowledged is an invocation whose
statement returned; what was under way when the connection broke may be there or not.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg
from failover.cluster import LIMIT, Pair, open_pair, query

from pgconductor.db.schema import migrate_sync

_PROGRAM = Path(__file__).parents[1] / "faults" / "deploy_program.py"

_BEFORE, _TAIL, _AFTER = 100, 60, 60  # acknowledged invocations in each part of a round


@dataclass(frozen=True, slots=True)
class Figures:
    """What one failover cost. Seconds are from the crash: until the standby could be written to, until an invocation
    was acknowledged again, until a worker finished something again.
    """

    acknowledged: int
    tail: int  # acknowledged by the primary after what the standby is known to have heard
    lost: int  # of those acknowledged
    repeated: int  # executions whose handler was begun more than once
    promoted_after: float
    acknowledged_after: float
    resumed_after: float

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {self.lost} lost (unreplicated tail {self.tail}), {self.repeated} begun"
            f" again; promoted after {self.promoted_after:.2f} s, first acknowledgement after"
            f" {self.acknowledged_after:.2f} s, first execution finished after {self.resumed_after:.2f} s"
        )


class Acknowledged(NamedTuple):
    """When an invocation was sent, and when its acknowledgement was noted, which a busy machine may put off."""

    sent_at: float
    at: float


class Producers:
    """Threads that invoke without pause, each on a connection that follows the primary."""

    def __init__(self, dsn: str, count: int = 2) -> None:
        self._dsn = dsn
        self._numbers = itertools.count()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._produce, daemon=True) for _ in range(count)]
        self.acknowledged: dict[int, Acknowledged] = {}  # by number

    def __enter__(self) -> Producers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(10.0)

    def until(self, count: int) -> None:
        Pair.until(lambda: len(self.acknowledged) >= count)

    def _produce(self) -> None:
        conn: psycopg.Connection[tuple[object, ...]] | None = None
        while not self._is_over.is_set():
            n = next(self._numbers)
            try:
                if conn is None:
                    conn = psycopg.connect(self._dsn, autocommit=True)
                sent_at = time.monotonic()
                conn.execute("select pgconductor.invoke('note', jsonb_build_object('n', %s::int), queue => 'q')", (n,))
                self.acknowledged[n] = Acknowledged(sent_at, time.monotonic())
            except psycopg.OperationalError:
                if conn is not None:
                    conn.close()
                conn = None
            self._is_over.wait(0.005)
        if conn is not None:
            conn.close()


class Workers:
    """Worker processes on the pair, and what their handlers wrote."""

    def __init__(self, dsn: str, folder: Path, count: int) -> None:
        self._folder = folder
        self._journal = folder / "journal"
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in range(count):
            with (folder / f"log {number}").open("wb") as output:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, str(_PROGRAM), dsn, str(self._journal), str(number), "3.0"],
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                    )
                )
        Pair.until(lambda: len(self.journal("ready")) == count or self._has_died())

    def _has_died(self) -> bool:
        died = [process for process in self._processes if process.poll() is not None]
        assert not died, self.logs()
        return False

    def journal(self, event: str) -> Counter[int]:
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        return Counter(
            int(n) if event != "ready" else int(who) for what, n, who in map(str.split, lines) if what == event
        )

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("log *")))

    def end(self) -> None:
        """As a deployment does; all must end well."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(LIMIT) for process in self._processes] == [0] * len(self._processes), self.logs()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def open_workers(dsn: str, folder: Path, count: int = 2) -> Generator[Workers]:
    """Workers that end with the block; what they logged is shown with a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    workers = Workers(dsn, folder, count)
    try:
        yield workers
    except BaseException:
        print(workers.logs())
        raise
    finally:
        workers.kill()


def finished(dsn: str) -> Counter[int]:
    """How often each number is in the finished table, in whatever state."""
    return Counter(n for (n,) in query(dsn, "select (payload->>'n')::int from pgconductor._private_finished"))


def run_round(folder: Path, *, synchronous: bool, fsync: str = "off") -> Figures:
    """Cut the stream under load, crash the primary, promote the standby, go on, and look what is there. In an
    asynchronous round the former primary comes back read-only before there is another. Each look of a claim is taken
    for a long one, as on a busy queue: workers go by the places that they tell each other.
    """
    with open_pair(synchronous=synchronous, fsync=fsync) as pair:
        with psycopg.connect(pair.dsn, autocommit=True) as conn:
            migrate_sync(conn)
            conn.execute(
                "create or replace function pgconductor._private_long_look() returns interval"
                " language sql immutable parallel safe return interval '0'"
            )
        with open_workers(pair.dsn, folder) as workers:
            figures = _fail_over(pair, workers, synchronous=synchronous)
            workers.end()
            return figures


def _fail_over(pair: Pair, workers: Workers, *, synchronous: bool) -> Figures:
    with Producers(pair.dsn) as producers:
        producers.until(_BEFORE)
        # Known to have been finished by somebody who read it: never again to be unfinished, nor to be run again.
        seen = finished(pair.dsn)
        safe = set(producers.acknowledged)
        lsn = query(pair.primary.dsn(), "select pg_current_wal_insert_lsn()")[0][0]
        received = "select pg_last_wal_receive_lsn() >= %s::pg_lsn and pg_last_wal_replay_lsn() >= %s::pg_lsn"
        Pair.until(lambda: query(pair.standby.dsn(), received, lsn, lsn) == [(True,)])
        pair.stop_receiving()
        if synchronous:
            # One waits for the standby, the other for it or for the one's NOTIFY.
            waiting = (
                "select count(*) >= 2 and count(*) filter (where wait_event = 'SyncRep') > 0 from pg_stat_activity"
                " where state = 'active' and wait_event_type in ('IPC', 'Lock') and query ~ '[.]invoke[(]'"
                " and pid <> pg_backend_pid()"
            )
            Pair.until(lambda: query(pair.primary.dsn(), waiting) == [(True,)])
        else:
            producers.until(len(producers.acknowledged) + _TAIL)
        crashed_at = time.monotonic()
        pair.crash_primary()
        down_at = time.monotonic()
        count = len(producers.acknowledged)
        if not synchronous:
            pair.return_as_standby()  # what is reconnected now finds two servers that cannot be written to
        pair.promote()
        promoted_at = time.monotonic()
        done = sum(finished(pair.dsn).values())
        Pair.until(lambda: sum(finished(pair.dsn).values()) > done)
        resumed_at = time.monotonic()
        producers.until(count + _AFTER)
    before = {n for n, acknowledged in producers.acknowledged.items() if acknowledged.sent_at < down_at}
    Pair.until(lambda: query(pair.dsn, "select count(*) from pgconductor._private_executions") == [(0,)])
    if not synchronous:
        sessions = "select count(*) from pg_stat_activity where application_name ~ '^pgconductor '"
        Pair.until(lambda: query(pair.primary.dsn(), sessions) == [(0,)])  # nobody stays on the former primary
    ended, starts = finished(pair.dsn), workers.journal("start")
    again = min(acknowledged.at for n, acknowledged in producers.acknowledged.items() if n not in before)
    lost = set(producers.acknowledged) - set(ended)
    assert max(ended.values()) == 1, "finished twice"
    states = query(pair.dsn, "select distinct state::text from pgconductor._private_finished")
    assert states == [("completed",)]
    assert not set(seen) - set(ended), "what somebody had read as finished is gone"
    assert [n for n in seen if starts[n] != 1] == [], "what somebody had read as finished was run again"
    assert not lost & safe, "lost, and the standby had it"
    assert lost <= before, "lost after the failover"
    assert not (synchronous and lost), "acknowledged, and lost"
    return Figures(
        acknowledged=len(producers.acknowledged),
        tail=0 if synchronous else len(before - safe),
        lost=len(lost),
        repeated=sum(1 for n in starts if starts[n] > 1),
        promoted_after=promoted_at - crashed_at,
        acknowledged_after=again - crashed_at,
        resumed_after=resumed_at - crashed_at,
    )
