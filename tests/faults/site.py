"""Worker processes of a test, what their handlers wrote, and what the database says.

`open_site` gives a `Site` on a database; it kills what it started at the end of the block. Waiting is always for a fact
(`until`), with a generous limit: how fast a loaded machine is must not decide a test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from pgconductor.testing.audit import check_sync, install_audit_sync

LIMIT = 30.0

_PROGRAM = Path(__file__).with_name("program.py")


class Entry(NamedTuple):
    """A line of the journal."""

    event: str
    n: int
    pid: int
    at: float
    name: str = ""  # of a step or child
    value: str = ""


def until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    """Until a fact holds that only the journal, the database or another process tells."""
    give_up_at = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < give_up_at, f"did not happen within {limit} s"
        time.sleep(0.01)


class Onlooker:
    """A session that is kept until it is lost, and then made anew: for what is asked every few milliseconds, where
    making a session takes the machine many times what the answer does.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._conn: psycopg.Connection[tuple[Any, ...]] | None = None

    def rows(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        """Execute one statement in a transaction of its own and return its rows."""
        if self._conn is not None:
            with suppress(psycopg.OperationalError):
                return self._conn.execute(text.encode(), params or None).fetchall()
            self._conn.close()
        self._conn = psycopg.connect(self._dsn, autocommit=True)
        return self._conn.execute(text.encode(), params or None).fetchall()

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()


class Process:
    """One worker process, ready to claim."""

    def __init__(self, site: Site, popen: subprocess.Popen[bytes]) -> None:
        self._site = site
        self._popen = popen
        self.pid = popen.pid

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait(LIMIT)

    def until_exit(self, limit: float = LIMIT) -> int:
        """Wait for its end; return the exit status."""
        return self._popen.wait(limit)

    @property
    def is_dead(self) -> bool:
        return self._popen.poll() is not None

    def until_stopped(self) -> None:
        """Wait until it has stopped itself."""
        # The third field of its state; the second, its name, is in brackets and may hold spaces.
        until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0] == "T")

    def owners(self) -> list[Any]:
        """The ids of its incarnations that the database knows, oldest first."""
        rows = self._site.look(
            "select id from pgconductor._private_orchestrators where name like %s order by started_at", f"%:{self.pid}"
        )
        return [owner for (owner,) in rows]


class Site:
    """See the module's description."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        self._journal = folder / "journal"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._onlooker = Onlooker(dsn)

    def start(
        self,
        *,
        concurrency: int = 10,
        lease: float = 2.0,
        grace: float = 5.0,
        last_words: float = 5.0,
        sweep: float = 1.0,
        flush: float = 0.05,
        batch: int | None = None,
        failpoints: str = "",
        queues: Sequence[str] = ("q",),
    ) -> Process:
        """Start a process and wait until its workers claim; not with `failpoints`, which it need not survive.

        Seconds; `last_words`: of the tries to flush at its end. `batch`: the most it claims and flushes at once.
        """
        options = json.dumps(
            {
                "concurrency": concurrency, "lease": lease, "grace": grace, "last_words": last_words, "sweep": sweep,
                "flush": flush, "batch": batch, "queues": list(queues),
            }
        )  # fmt: skip
        log = self.folder / f"log {len(self._processes)}"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(_PROGRAM), self.dsn, str(self._journal), options],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "PGCONDUCTOR_FAILPOINTS": failpoints,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._processes.append(popen)

        def is_ready() -> bool:
            assert popen.poll() is None, log.read_text()
            return any(entry.pid == popen.pid for entry in self.journal("ready"))

        if not failpoints:
            until(is_ready)
        return Process(self, popen)

    def end(self) -> None:
        for popen in self._processes:
            if popen.poll() is None:
                popen.kill()
                popen.wait(LIMIT)
        self._onlooker.close()

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("log *")))

    def journal(self, event: str, *numbers: int) -> list[Entry]:
        """What was written of an event, of all executions or of those given."""
        if not self._journal.exists():
            return []
        lines = self._journal.read_text().splitlines()
        entries = (Entry(**json.loads(line)) for line in lines)
        return [entry for entry in entries if entry.event == event and (not numbers or entry.n in numbers)]

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        """Execute one statement in a transaction of its own and return its rows."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            cursor = conn.execute(text.encode(), params or None)
            return cursor.fetchall() if cursor.description else []

    def look(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        """As `query`, for what is asked again and again."""
        return self._onlooker.rows(text, *params)

    def invoke(self, task: str, numbers: Iterable[int], *, is_keyed: bool = False, **payload: object) -> list[UUID]:
        """Insert an execution for each number, in one statement; with `is_keyed`, the number is its dedupe key."""
        rows = self.query(
            "select pgconductor.invoke(%s, %s::jsonb || jsonb_build_object('n', n), queue => 'q',"
            " dedupe_key => case when %s then n::text end) from unnest(%s::int[]) as n",
            task, json.dumps(payload), is_keyed, list(numbers),
        )  # fmt: skip
        return [made for (made,) in rows]

    def audit(self) -> None:
        """Have every change written down and every forbidden one refused, from now on."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            install_audit_sync(conn)

    def check_invariants(self, acknowledged: Iterable[UUID] = ()) -> None:
        """What must hold whatever happened, once all is over; and no deadlock was broken on the way."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            assert check_sync(conn, acknowledged=acknowledged, settled=True) == []
        deadlocks = self.query("select deadlocks from pg_stat_database where datname = current_database()")
        assert deadlocks == [(0,)]

    def live(self) -> int:
        """How many are under way, or still to be cancelled because their parents have ended."""
        live = "select (select count(*) from pgconductor._private_executions)"
        return int(self.look(f"{live} + (select count(*) from pgconductor._private_closings)")[0][0])

    def held_by(self, process: Process) -> int:
        """How many executions the database says the process holds."""
        query = "select count(*) from pgconductor._private_executions where owner = any(%s)"
        return int(self.query(query, process.owners())[0][0])

    def check_finished_once(self, numbers: Iterable[int]) -> None:
        """Every execution of these numbers, and no other, is completed, exactly once."""
        rows = self.query(
            "select state::text, count(*), count(distinct id), array_agg((payload->>'n')::int order by 1)"
            " from pgconductor._private_finished group by 1"
        )
        wanted = sorted(numbers)
        assert [(state, count, ids) for state, count, ids, _ in rows] == [("completed", len(wanted), len(wanted))]
        assert sorted(rows[0][3]) == wanted
        assert self.live() == 0

    def check_records(self, kills: Mapping[int, int] | int = 0) -> None:
        """Of finished executions: steps that were seen are those that are stored; a step ran once, and once more for
        each kill (of its execution's number, or of all) at most; every child is there once.
        """
        stored: dict[int, dict[str, str]] = {}
        for n, steps in self.query(
            "select (payload->>'n')::int, steps from pgconductor._private_finished"
            " where steps is not null and parent_id is null"
        ):
            values = {step["name"]: "failed" if "error" in step else str(step.get("value")) for step in steps}
            assert len(values) == len(steps), (n, steps)
            stored[n] = values
        seen: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for entry in self.journal("seen"):
            seen[entry.n][entry.name].add(entry.value)
        for n, names in seen.items():
            for name, told in names.items():
                same = {_canonical(value) for value in told}
                assert same == {_canonical(stored[n][name])}, (n, name, told, stored[n][name])
        runs = Counter((entry.n, entry.name) for entry in self.journal("step"))
        for (n, name), count in runs.items():
            allowed = kills if isinstance(kills, int) else kills.get(n, 0)
            assert count <= 1 + allowed, f"step {name!r} of {n} ran {count} times"
        children = self.query(
            "select parent_id, payload->>'name', count(*) from pgconductor._private_finished"
            " where parent_id is not null group by 1, 2"
        )
        assert [row for row in children if row[2] != 1] == []
        made = {(entry.n, entry.name, entry.value) for entry in self.journal("child")}
        assert len(made) == len({(n, name) for n, name, _ in made}), "a name stood for two children"


def _canonical(value: str) -> str:
    """An instant, however it is written."""
    return value.replace("+00:00", "Z")


@contextmanager
def open_site(dsn: str, folder: Path) -> Generator[Site]:
    """A site whose processes end with the block; what they logged is shown with a failure."""
    site = Site(dsn, folder)
    try:
        yield site
    except BaseException:
        print(site.logs())
        raise
    finally:
        site.end()
