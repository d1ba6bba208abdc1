"""A service: two queues, a resource that handlers share, a graceful stop on SIGINT or SIGTERM.

    export PGCONDUCTOR_DSN=postgresql://localhost/app
    python service.py                          # or: pgconductor run service:orchestrator
    python service.py --embedded               # without a database of your own

Then, elsewhere: pgconductor invoke greet '{"name": "Ada"}' --wait
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from pgconductor import Conductor, Context, Exponential, Orchestrator

conductor = Conductor(embedded="--embedded" in sys.argv)


@dataclass
class Mailbox:
    """Stands for what a service opens once: a connection pool, an HTTP client."""

    sent: list[str] = field(default_factory=list)


@conductor.task(queue="fast", max_attempts=5, backoff=Exponential(initial=0.5, maximum=60))
async def greet(ctx: Context, name: str) -> str:
    ctx.resource(Mailbox).sent.append(name)
    ctx.logger.info("attempt %d", ctx.attempt)
    return f"Hello, {name}!"


@conductor.task
def resize(picture: str, width: int) -> str:
    """A plain function: it runs in a thread, so that it may block."""
    return f"{picture} at {width} pixels"


@asynccontextmanager
async def resources() -> AsyncIterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    logging.info("%d greetings sent", len(mailbox.sent))


orchestrator = Orchestrator(
    conductor,
    workers=[conductor.create_worker(queue="fast", tasks=[greet], concurrency=50)],
    tasks=[resize],
    resources=resources,
)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(orchestrator.run)
