"""Transactions of steps on connections that nobody said were dead."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from pgconductor import Unavailable, open_pool
from pgconductor.db import transactions
from pgconductor.db.transactions import PoolTransactions, ThreadTransactions, Transactions
from pgconductor.testing.proxy import open_chaos_proxy

LIMIT = 20.0


@asynccontextmanager
async def transactions_of(kind: str, dsn: str) -> AsyncIterator[Transactions]:
    """Of both kinds, with one connection."""
    if kind == "pool":
        async with open_pool(dsn, max_size=1, kwargs={"autocommit": True}) as pool:
            yield PoolTransactions(pool)
    else:
        threads = ThreadTransactions(dsn, 5, 1)
        try:
            yield threads
        finally:
            threads.close()


@pytest.mark.parametrize("kind", ["pool", "thread"])
async def test_transaction_is_not_begun_for_ever_on_a_dead_connection(
    pgconductor_empty_dsn: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was idle while the network lost it would hold the step, and its place, until its timeout."""
    monkeypatch.setattr(transactions, "_BEGIN", 0.5)
    with trio.fail_after(LIMIT):
        async with open_chaos_proxy(pgconductor_empty_dsn) as proxy, transactions_of(kind, proxy.dsn) as opener:
            async with opener.open("step 'a'", "read committed") as begun:
                first = begun
                await begun.commit()
            proxy.blackhole()
            with pytest.raises(Unavailable, match=r"no reply within 0\.5 s when the transaction of step 'a' was begun"):
                async with opener.open("step 'a'", "read committed"):
                    raise AssertionError("it was begun")
            assert first.is_lost
            await proxy.mend()
            async with opener.open("step 'a'", "read committed") as begun:
                await begun.commit()
