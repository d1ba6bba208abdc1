"""Versions of tasks, and looking at executions, with the types that callers see."""

from __future__ import annotations

from typing import Any, assert_type
from uuid import UUID

from pgconductor import (
    Conductor,
    Context,
    ExecutionStatus,
    ExecutionSummary,
    Handle,
    ReplayReport,
    StepRecord,
    SyncClient,
    SyncHandle,
    Task,
)


async def versions(conductor: Conductor) -> None:
    @conductor.task(version="2")
    async def greet(ctx: Context, name: str) -> str:
        return name if await ctx.patched("change") else ""

    @greet.former("1")
    async def greet_1(ctx: Context, names: list[str]) -> int:
        return len(names)

    @greet.former("0")
    def greet_0() -> None: ...

    await greet_1.invoke(name="a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert_type(await greet.invoke(name="a"), Handle[str])
    assert_type(await greet_1.invoke(names=["a"]), Handle[int])
    assert_type(await greet_0.invoke(), Handle[None])
    assert_type(greet_0, Task[[], None])
    assert_type(greet.version, str | None)


async def reading(conductor: Conductor, client: SyncClient, handle: Handle[int], sync: SyncHandle[int]) -> None:
    assert_type(await handle.status(), ExecutionStatus | None)
    assert_type(await handle.steps(), list[StepRecord])
    assert_type(sync.status(), ExecutionStatus | None)
    assert_type(sync.steps(), list[StepRecord])
    assert_type(await conductor.status(handle), ExecutionStatus | None)
    assert_type(await conductor.steps(UUID(int=0)), list[StepRecord])
    assert_type(client.status(sync), ExecutionStatus | None)
    page = await conductor.executions(states=["failed"], tags=["a"], parent=handle)
    assert_type(page, list[ExecutionSummary])
    assert_type(client.executions(after=page[-1]), list[ExecutionSummary])
    assert_type(await conductor.replay_check(task="a"), ReplayReport)
    await conductor.status("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def beginning_anew(conductor: Conductor, client: SyncClient, handle: Handle[int], sync: SyncHandle[int]) -> None:
    assert_type(await conductor.fork(handle, from_step="a"), Handle[int])
    assert_type(await conductor.restart(handle), Handle[int])
    assert_type(await conductor.restart(UUID(int=0)), Handle[Any])
    assert_type(client.fork(sync, from_step="a"), SyncHandle[int])
    assert_type(client.restart(UUID(int=0)), SyncHandle[Any])
    await conductor.fork(handle)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]

    @conductor.task
    async def loop(ctx: Context, n: int) -> int:
        if n > 5:
            return n
        await ctx.continue_as_new(n=n + 1)  # so nothing is returned here

    @conductor.task
    async def typed(ctx: Context, n: int) -> int:
        await ctx.continue_as(typed.bind(n=n + 1))

    assert_type(await loop.invoke(n=0), Handle[int])
