"""Absurd: ``prepare|enqueue|work URL SETTINGS [COUNT STEPS]``; `work` prints ``ready`` and ends with its input.

``work URL SETTINGS STARTS`` and ``produce URL SETTINGS`` as in `_program`.
"""

import asyncio
import json
import sys
import threading

import absurdctl
import psycopg
from absurd_sdk import Absurd, AsyncAbsurd

from ..marks import Starts, pace


async def flow(params: dict, ctx) -> dict[str, int]:
    done = 0
    for number in range(1, params["steps"] + 1):

        async def noop(number: int = number) -> dict[str, int]:
            return {"step": number}

        done = (await ctx.step(f"s{number}", noop))["step"]
    return {"n": params["n"], "steps": done}


def prepare(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(absurdctl.BUNDLED_SCHEMA_SQL)  # as `absurdctl init`, which needs psql
        Absurd(conn).create_queue()


def enqueue(url: str, count: int, steps: int = 0) -> None:
    with psycopg.connect(url) as conn:  # one commit, so that preparing does not take longer than measuring
        app = Absurd(conn)
        for n in range(count):
            app.spawn("flow", {"n": n, "steps": steps}, queue="default")


async def work(url: str, settings: dict, starts: Starts | None = None) -> None:
    app = AsyncAbsurd(url)

    async def noop(params: dict, ctx) -> None:
        starts.add(params["n"])

    app.register_task("flow")(flow if starts is None else noop)
    threading.Thread(target=lambda: (sys.stdin.read(), app.stop_worker())).start()
    print("ready", flush=True)
    await app.start_worker(**settings)
    await app.close()


def produce(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        app = Absurd(conn)
        pace(lambda n: app.spawn("flow", {"n": n}, queue="default"))


def main() -> None:
    command, url, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if command == "prepare":
        prepare(url)
    elif command == "enqueue":
        enqueue(url, *map(int, sys.argv[4:]))
    elif command == "produce":
        produce(url)
    else:
        starts = Starts(sys.argv[4]) if sys.argv[4:] else None
        try:
            asyncio.run(work(url, settings, starts))
        finally:
            if starts is not None:
                starts.close()


if __name__ == "__main__":
    main()
