"""Versions of tasks, and looking at executions, with the types that callers see."""

from __future__ import annotations

from typing import assert_type
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
