"""PgQueuer, on asyncpg with one connection, as its guide to performance says. See `_program` for the commands."""

import asyncio

import asyncpg
from pgqueuer import AsyncpgDriver, PgQueuer, Queries

from ..marks import pace
from . import _program


async def connect(url: str) -> AsyncpgDriver:
    return AsyncpgDriver(await asyncpg.connect(url))


async def prepare(url: str, settings: dict) -> None:
    queries = Queries(await connect(url))
    await queries.install()
    await queries.optimize_autovacuum()  # `pgq autovac`


async def enqueue(url: str, settings: dict, count: int) -> None:
    queries = Queries(await connect(url))
    await queries.enqueue(["noop"] * count, [b"%d" % n for n in range(count)], [0] * count)


async def work(url: str, settings: dict, starts) -> None:
    app = PgQueuer(await connect(url))

    @app.entrypoint("noop")
    async def noop(job) -> None:
        starts.add(int(job.payload))

    running = asyncio.ensure_future(app.run(**settings))
    _program.ready()
    await _program.input_ends()
    app.shutdown.set()
    await running


def produce(url: str, settings: dict) -> None:
    with asyncio.Runner() as runner:
        queries = Queries(runner.run(connect(url)))
        pace(lambda n: runner.run(queries.enqueue("noop", b"%d" % n)))


if __name__ == "__main__":
    _program.main(prepare, enqueue, work, produce)
