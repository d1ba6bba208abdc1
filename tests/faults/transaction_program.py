"""A worker process for test_transactions.py: `python transaction_program.py DSN FOLDER`.

Its task makes three transactional steps of one form, each with a row in the table `ledger` and a child. A file
FOLDER/freeze has its first step stop the whole process, once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psycopg
import trio

from pgconductor import Conductor, Context, Orchestrator, TrioConnection

WRITE = "insert into ledger (n, i) values (%s, %s) returning id"


def main(dsn: str, folder: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(message)s")
    conductor = Conductor(dsn)

    def freeze() -> None:
        try:
            (folder / "freeze").rename(folder / "frozen")
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGSTOP)

    @conductor.task
    async def ship(n: int, i: int) -> None:
        """What a step invokes."""

    async def charge(conn: TrioConnection[tuple[Any, ...]], n: int, i: int) -> int:
        await ship.options(conn=conn).invoke(n, i)
        row = await (await conn.execute(WRITE, [n, i])).fetchone()
        assert row is not None
        freeze()
        return int(row[0])

    def charge_sync(conn: psycopg.Connection[tuple[Any, ...]], n: int, i: int) -> int:
        ship.options(conn=conn).invoke(n, i)
        row = conn.execute(WRITE, [n, i]).fetchone()
        assert row is not None
        freeze()
        return int(row[0])

    @conductor.task
    async def function(ctx: Context, n: int) -> list[int]:
        return [await ctx.transaction(f"charge-{i}", charge, n, i) for i in range(3)]

    @conductor.task
    async def block(ctx: Context, n: int) -> list[int]:
        ids: list[int] = []
        for i in range(3):
            async with ctx.transaction(f"charge-{i}") as conn:
                number = await charge(conn, n, i)
            ids.append(number)
        return ids

    @conductor.task
    def thread(ctx: Context, n: int) -> list[int]:
        return [ctx.sync.transaction(f"charge-{i}", charge_sync, n, i) for i in range(3)]

    @conductor.task
    def thread_block(ctx: Context, n: int) -> list[int]:
        ids: list[int] = []
        for i in range(3):
            with ctx.sync.transaction(f"charge-{i}") as conn:
                number = charge_sync(conn, n, i)
            ids.append(number)
        return ids

    trio.run(Orchestrator(conductor, tasks=[ship, function, block, thread, thread_block], lease=2.0).run)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
