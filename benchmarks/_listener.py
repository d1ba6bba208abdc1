"""A process that listens on one channel and does nothing else: the raw NOTIFY beside which wake-ups are measured.

Writes each payload with the time at which it came, in the form of `_worker`'s `stamp`. Prints ``ready`` once it
listens; ends when its standard input does.
"""

from __future__ import annotations

import os
import sys
import time

import trio
from psycopg import sql

from pgconductor import TrioConnection


async def listen(dsn: str, channel: str, path: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async with await TrioConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        print("ready", flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_write, conn, file)
            async with trio.lowlevel.FdStream(os.dup(0)) as standard_input:
                async for _ in standard_input:
                    pass
            nursery.cancel_scope.cancel()


async def _write(conn: TrioConnection[tuple[object, ...]], file: int) -> None:
    while True:
        for notify in await conn.receive_notifies():
            os.write(file, b"%d %d\n" % (int(notify.payload), time.monotonic_ns()))


if __name__ == "__main__":
    trio.run(listen, sys.argv[1], sys.argv[2], sys.argv[3])
