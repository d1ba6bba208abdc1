"""Procrastinate, on its asynchronous connector. See `_program` for the commands."""

import asyncio
import contextlib
import logging

from procrastinate import App, PsycopgConnector

from ..marks import pace
from . import _program

logging.getLogger("procrastinate").setLevel(logging.ERROR)  # it warns of an app in a main module, which this one is


def create_app(url: str, started=None) -> tuple:
    app = App(connector=PsycopgConnector(conninfo=url))

    @app.task(name="noop", queue="noop")
    async def noop(n: int) -> None:
        started(n)

    return app, noop


async def prepare(url: str, settings: dict) -> None:
    app, _ = create_app(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def enqueue(url: str, settings: dict, count: int) -> None:
    app, noop = create_app(url)
    async with app.open_async():
        for first in range(0, count, 1000):
            await noop.batch_defer_async(*({"n": n} for n in range(first, min(count, first + 1000))))


async def work(url: str, settings: dict, starts) -> None:
    app, _ = create_app(url, starts.add)
    async with app.open_async():
        running = asyncio.ensure_future(app.run_worker_async(install_signal_handlers=False, **settings))
        _program.ready()
        await _program.input_ends()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def produce(url: str, settings: dict) -> None:
    with asyncio.Runner() as runner:
        app, noop = create_app(url)
        runner.run(app.open_async().__aenter__())
        pace(lambda n: runner.run(noop.defer_async(n=n)))
        runner.run(app.close_async())


if __name__ == "__main__":
    _program.main(prepare, enqueue, work, produce)
