"""Transactional steps are done exactly once, whatever dies when: kills around the commit, zombies, lost replies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trio
from faults.site import LIMIT, Onlooker, until

from pgconductor import Conductor, Context, Orchestrator, StepFailed, TrioConnection
from pgconductor.testing.proxy import open_chaos_proxy

PROGRAM = Path(__file__).with_name("transaction_program.py")
FORMS = ("function", "block", "thread", "thread_block")
NUMBERS = range(1, 5)


class Place:
    """Processes on a database, and what they left in it."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.onlooker = Onlooker(dsn)
        self.query("create table ledger (id bigint generated always as identity, n int, i int)")

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            cursor = conn.execute(text.encode(), params or None)
            return cursor.fetchall() if cursor.description else []

    def start(self, failpoints: str = "") -> subprocess.Popen[bytes]:
        with (self.folder / f"log {len(self.processes)}").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), self.dsn, str(self.folder)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "PGCONDUCTOR_FAILPOINTS": failpoints,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def invoke(self, form: str) -> None:
        for n in NUMBERS:
            self.query("select pgconductor.invoke(%s, jsonb_build_object('n', %s::int))", form, n)

    def live(self) -> int:
        return int(self.onlooker.rows("select count(*) from pgconductor._private_executions")[0][0])

    def check(self) -> None:
        """Each step wrote once, invoked once, and was seen by the handler as it was written."""
        rows = self.query("select n, i, id from ledger order by n, i, id")
        assert [(n, i) for n, i, _ in rows] == [(n, i) for n in NUMBERS for i in range(3)]
        results = self.query(
            "select (payload ->> 'n')::int, state::text, result from pgconductor.executions"
            " where task <> 'ship' order by 1"
        )
        assert results == [(n, "completed", [id for m, _, id in rows if m == n]) for n in NUMBERS]
        shipped = self.query(
            "select (payload ->> 'n')::int, (payload ->> 'i')::int from pgconductor.executions"
            " where task = 'ship' and state = 'completed' order by 1, 2"
        )
        assert shipped == [(n, i) for n in NUMBERS for i in range(3)]


@pytest.fixture
def place(pgconductor_dsn: str, tmp_path: Path) -> Iterator[Place]:
    place = Place(pgconductor_dsn, tmp_path)
    yield place
    place.onlooker.close()
    for process in place.processes:
        if process.poll() is None:
            process.kill()
        process.wait(LIMIT)


@pytest.mark.parametrize("point", ["transaction.before_commit", "transaction.committed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hit", [1, 5])
def test_process_killed_around_a_commit_has_done_it_once_or_not_at_all(
    place: Place, form: str, point: str, hit: int
) -> None:
    """Before: neither the writes nor the record may be there. After: both, though nobody was told."""
    place.invoke(form)
    assert place.start(f"{point}=kill@{hit}").wait(LIMIT) == -signal.SIGKILL
    place.start()
    until(lambda: place.live() == 0)
    place.check()


@pytest.mark.parametrize("form", FORMS)
def test_zombie_with_an_open_transaction_commits_nothing(place: Place, form: str) -> None:
    """It sleeps through its lease after its writes; another has done the step when it wakes, and goes on to COMMIT."""
    (place.folder / "freeze").touch()
    zombie = place.start()
    place.invoke(form)
    until(lambda: (place.folder / "frozen").exists())
    place.start()
    until(lambda: place.live() == 0)
    zombie.send_signal(signal.SIGCONT)
    until(lambda: not place.query("select pid from pg_stat_activity where state like 'idle in transaction%'"))
    place.check()


def test_process_that_freezes_before_its_commit_keeps_nobody_waiting_for_ever(place: Place) -> None:
    """It holds the lock of its execution, which nobody can take over: the server ends the session after 10 s."""
    place.invoke("function")
    place.start("transaction.before_commit=stop@2")
    until(lambda: len(place.query("select id from ledger")) > 0)
    place.start()
    until(lambda: place.live() == 0, limit=3 * LIMIT)
    place.check()


@pytest.mark.parametrize("how", ["request", "reply"])
@pytest.mark.parametrize("tag", [b"COMMIT", b".save_steps("], ids=["commit", "record"])
@pytest.mark.parametrize("form", ["function", "block", "thread"])
async def test_lost_connection_around_the_commit_is_cleared_up(
    pgconductor_dsn: str, form: str, tag: bytes, how: str
) -> None:
    """Taken for done, a step that was rolled back is lost; taken for not done, one that was committed is done twice."""
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        conn.execute("create table ledger (id bigint generated always as identity, what text)")
    runs: list[str] = []
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)

        def cut() -> None:
            if not runs:
                (proxy.cut_request if how == "request" else proxy.cut_reply)(tag, is_whole=tag == b"COMMIT")
            runs.append("x")

        async def write(conn: TrioConnection[tuple[Any, ...]]) -> int:
            row = await (await conn.execute("insert into ledger (what) values ('x') returning id")).fetchone()
            assert row is not None
            cut()
            return int(row[0])

        def write_sync(conn: psycopg.Connection[tuple[Any, ...]]) -> int:
            row = conn.execute("insert into ledger (what) values ('x') returning id").fetchone()
            assert row is not None
            trio.from_thread.run_sync(cut, trio_token=token)
            return int(row[0])

        token = trio.lowlevel.current_trio_token()

        @conductor.task
        async def function(ctx: Context) -> int:
            return await ctx.transaction("write", write)

        @conductor.task
        async def block(ctx: Context) -> int:
            number = 0
            try:
                async with ctx.transaction("write") as conn:
                    number = await write(conn)
            except StepFailed:  # before its commit: a block has one try
                async with ctx.transaction("again") as conn:
                    number = await write(conn)
            return number

        @conductor.task
        def thread(ctx: Context) -> int:
            return ctx.sync.transaction("write", write_sync)

        tasks = {"function": function, "block": block, "thread": thread}
        with trio.fail_after(LIMIT):
            async with conductor:
                handle = await tasks[form].invoke()
                await Orchestrator(conductor, tasks=list(tasks.values())).drain()
                number = await handle.result(timeout=0)
        assert proxy.cuts == 1
    with psycopg.connect(pgconductor_dsn) as conn:
        assert conn.execute("select id from ledger").fetchall() == [(number,)]
        assert conn.execute("select attempt, state::text from pgconductor._private_finished").fetchall() == [
            (1, "completed")
        ]
    is_committed = tag == b"COMMIT" and how == "reply"
    # A block runs again, from its record, if the answer was lost while nothing was recorded.
    assert len(runs) == (1 if is_committed else 2)
