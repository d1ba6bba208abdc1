"""Oban for Python. See `_program` for the commands."""

import asyncio

from oban import Oban, worker
from oban.schema import install

from ..marks import pace
from . import _program

started = None


@worker(queue="noop")
class Noop:
    async def process(self, job) -> None:
        started(job.args["n"])


async def prepare(url: str, settings: dict) -> None:
    pool = await Oban.create_pool(url)
    await install(pool)
    await pool.close()


async def enqueue(url: str, settings: dict, count: int) -> None:
    pool = await Oban.create_pool(url)
    client = Oban(pool=pool)
    for first in range(0, count, 1000):
        await client.enqueue_many(Noop.new({"n": n}) for n in range(first, min(count, first + 1000)))
    await pool.close()


async def work(url: str, settings: dict, starts) -> None:
    global started
    started = starts.add
    pool = await Oban.create_pool(url, max_size=settings["max_size"])
    async with Oban(pool=pool, queues={"noop": settings["limit"]}):
        _program.ready()
        await _program.input_ends()
    await pool.close()


def produce(url: str, settings: dict) -> None:
    with asyncio.Runner() as runner:
        pool = runner.run(Oban.create_pool(url))
        client = Oban(pool=pool)
        pace(lambda n: runner.run(client.enqueue(Noop.new({"n": n}))))
        runner.run(pool.close())


if __name__ == "__main__":
    _program.main(prepare, enqueue, work, produce)
