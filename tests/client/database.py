"""What these tests ask the database behind the client's back."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import psycopg
import trio
from psycopg.rows import TupleRow

from pgconductor.db.calls import Calls
from pgconductor.db.execute import run_sync


def rows(dsn: str, query: str, *params: object) -> list[TupleRow]:
    """All rows of a query."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        return conn.execute(query.encode(), params).fetchall()


def value(dsn: str, query: str, *params: object) -> Any:
    """The first column of the only row."""
    ((found,),) = rows(dsn, query, *params)
    return found


def execute(dsn: str, statement: str) -> None:
    """Run a statement that returns nothing."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(statement.encode())


def live(dsn: str) -> int:
    """How many executions are live."""
    return int(value(dsn, "select count(*) from pgconductor._private_executions"))


async def until(is_so: Callable[[], bool]) -> None:
    """Wait until something that no event announces is so."""
    with trio.fail_after(10):
        while not is_so():
            await trio.sleep(0.005)


@contextmanager
def sleeping_worker(dsn: str, queue: str = "default") -> Generator[psycopg.Connection[TupleRow]]:
    """A connection that listens to a queue, with the flag "somebody is asleep" raised, as an idle worker's does."""
    calls = Calls("pgconductor")
    with psycopg.connect(dsn, autocommit=True) as conn:
        channel = run_sync(conn, calls.channel(queue))
        conn.execute(f'listen "{channel}"'.encode())
        assert run_sync(conn, calls.raise_sleep_flag(queue, raise_it=True)) is True
        yield conn


def wakeups(conn: psycopg.Connection[TupleRow]) -> int:
    """How many notifications have come by now."""
    conn.execute("select")  # what was sent before this was answered has arrived
    return len(list(conn.notifies(timeout=0)))
