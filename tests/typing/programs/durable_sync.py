"""The types of transactional steps, and of the operations of plain `def` handlers."""

from __future__ import annotations

import functools
from datetime import datetime
from typing import Any, assert_type
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from pgconductor.context import Context
from pgconductor.db.connection import TrioConnection
from pgconductor.tasks import Tasks


async def charge(conn: TrioConnection[TupleRow], order: int, note: str) -> str:
    return note * order


async def charge_any(conn: psycopg.AsyncConnection[Any]) -> int:
    return 1


def charge_sync(conn: psycopg.Connection[TupleRow], order: int) -> str:
    return str(order)


def load(n: int, *, twice: bool = False) -> list[int]:
    return [n]


def forms(conductor: Tasks) -> None:
    @conductor.task
    async def double(n: int) -> int:
        return 2 * n

    @conductor.task
    async def order(ctx: Context) -> None:
        assert_type(await ctx.transaction("a", charge, 1, "x"), str)
        assert_type(await ctx.transaction("b", charge_any, retry=3, timeout=5, isolation="serializable"), int)
        async with ctx.transaction("c", isolation="repeatable read") as conn:
            assert_type(conn, TrioConnection[TupleRow])
        await ctx.transaction("d", charge, "1", "x")  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportArgumentType]
        await ctx.transaction("e", charge, 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @conductor.task
    def plain(ctx: Context) -> None:
        sync = ctx.sync
        assert_type(sync.step("a", load, 1), list[int])
        assert_type(sync.step("b", functools.partial(load, 1, twice=True), retry=3), list[int])
        assert_type(sync.invoke("c", double, 2), int)
        assert_type(sync.invoke("d", double.options(priority=1), n=2), int)
        assert_type(sync.now(), datetime)
        assert_type(sync.uuid(), UUID)
        assert_type(sync.random(), float)
        assert_type(sync.transaction("e", charge_sync, 1), str)
        with sync.transaction("f") as conn:
            assert_type(conn, psycopg.Connection[TupleRow])
        sync.step("g", load, "1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        sync.invoke("h", double, "2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
