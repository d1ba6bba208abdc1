"""Mistakes that both checkers must report: each expected error is ignored, and an unused ignore is an error itself."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg

from pgconductor.context import Context
from pgconductor.handle import Handle
from pgconductor.tasks import Tasks


async def mistakes(conductor: Tasks, sync_conn: psycopg.Connection[Any]) -> None:
    @conductor.task(queue="fast")
    async def greet(ctx: Context, name: str) -> str:
        return name

    @conductor.task
    def count(*, words: list[str]) -> int:
        return len(words)

    await greet.invoke(name=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await greet.invoke()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await greet.invoke("a", "b")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await greet.invoke(nam="a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    greet.bind(ctx=None, name="a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    count.bind(["a"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    count.bind(words=[1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]

    greet.options(priority="high")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    greet.options(nonsense=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    greet.options(run_at=timedelta(1))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    await greet.options(conn=sync_conn).invoke("a")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]

    await greet.invoke_many([count.bind(words=[])])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    wrong: Handle[int] = await greet.invoke("a")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(wrong)

    worker = conductor.create_worker
    worker(queue="fast", tasks=[greet], notify="rarely")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    worker(queue="fast", tasks=[mistakes])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    greet.options(tags=5)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    greet.options(deadline="soon")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    conductor.task(timeout="5")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    conductor.task(backoff="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    conductor.task(retries=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


async def durable_mistakes(conductor: Tasks, ctx: Context) -> None:
    @conductor.task
    async def greet(ctx: Context, name: str) -> str:
        return name

    await ctx.invoke("hello", greet, name=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await ctx.invoke("hello", greet)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await ctx.step("len", len, 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await ctx.sleep("long", "1 day")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    wrong: int = await ctx.invoke("hello", greet, "Ada")  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    print(wrong)
