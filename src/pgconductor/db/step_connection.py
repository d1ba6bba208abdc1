"""The connection that a transactional step gets: a real one of psycopg's, whose transaction it cannot end.

It shares the protocol connection (`pgconn`) of one that is lent by a pool, and has everything else to itself: cursors,
adapters, row factories and savepoints, so that nothing a step sets stays behind but what it sets on the server. Its
methods that would end the transaction are refused; that a statement has ended it is found out by `transactions.py`.

Invariant: `end` has been called before anybody else uses the lent connection; from then on nothing is sent by this one.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NoReturn, Self, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow, tuple_row

from ..errors import DurableMisuse
from .connection import TrioConnection

T = TypeVar("T")


class StepConnection(TrioConnection[TupleRow]):
    """A `TrioConnection` inside the transaction of one step. `step`: how messages call it."""

    def __init__(self, lent: TrioConnection[TupleRow], step: str) -> None:
        super().__init__(lent.pgconn)
        self._pool = None  # not to be missed when it is forgotten: it was lent
        self._prepared = lent._prepared
        self.step = step
        self.is_over = False

    async def end(self) -> None:
        """Nothing more is sent by this connection. Waits for the statement of a task that is using it."""
        async with self.lock:
            self.is_over = True

    def cut(self) -> None:
        """The same at once, for a transaction that is rolled back."""
        self.is_over = True

    async def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        if self.is_over:
            gen.close()
            _refuse_late(self.step)
        return await super().wait(gen, interval, timeout)

    async def finish(self, gen: PQGen[T]) -> T | None:
        if self.is_over:
            gen.close()
            return None
        return await super().finish(gen)

    def drop(self) -> None:
        if not self.is_over:
            super().drop()

    async def commit(self) -> None:
        """Refused, with `DurableMisuse`."""
        _refuse_end(self.step, "commit()")

    async def rollback(self) -> None:
        """Refused, with `DurableMisuse`."""
        _refuse_end(self.step, "rollback()")

    async def close(self) -> None:
        """Refused, with `DurableMisuse`."""
        _refuse_end(self.step, "close()")

    async def __aenter__(self) -> Self:
        _refuse_end(self.step, "async with conn")


class SyncStepConnection(psycopg.Connection[TupleRow]):
    """The same for a plain ``def``: a `psycopg.Connection`."""

    def __init__(self, lent: psycopg.Connection[TupleRow], step: str) -> None:
        super().__init__(lent.pgconn, tuple_row)
        self._pool = None
        self._prepared = lent._prepared
        self.step = step
        self.is_over = False

    def end(self) -> None:
        """Nothing more is sent by this connection. Waits for the statement of a thread that is using it."""
        with self.lock:
            self.is_over = True

    def cut(self) -> None:
        """The same at once, for a transaction that is rolled back."""
        self.is_over = True

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        if self.is_over:
            gen.close()
            _refuse_late(self.step)
        return super().wait(gen, interval, timeout)

    def commit(self) -> None:
        """Refused, with `DurableMisuse`."""
        _refuse_end(self.step, "commit()")

    def rollback(self) -> None:
        """Refused, with `DurableMisuse`."""
        _refuse_end(self.step, "rollback()")

    def close(self) -> None:
        """Refused, with `DurableMisuse`."""
        _refuse_end(self.step, "close()")

    def __enter__(self) -> Self:
        _refuse_end(self.step, "with conn")


@contextmanager
def notices_kept(lent: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> Generator[None]:
    """Notices and notifications go to another connection object inside the block, and to this one again after it."""
    handlers = lent.pgconn.notice_handler, lent.pgconn.notify_handler
    try:
        yield
    finally:
        lent.pgconn.notice_handler, lent.pgconn.notify_handler = handlers


def _refuse_end(step: str, what: str) -> NoReturn:
    raise DurableMisuse(
        f"{what} in {step}: its transaction is committed with the step's record, when the function or block has ended, "
        f"and rolled back if that raises; for parts that may fail use savepoints: conn.transaction()"
    )


def _refuse_late(step: str) -> NoReturn:
    raise DurableMisuse(f"the connection of {step} is used after the step: it has ended, with its transaction")
