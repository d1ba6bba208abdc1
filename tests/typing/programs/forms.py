"""Every form of declaring and invoking a task, with the types that callers see."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, assert_type
from uuid import UUID

import psycopg

from pgconductor.channels import Channel
from pgconductor.children import ChildHandle, DurableNursery, StepHandle
from pgconductor.conductor import Conductor
from pgconductor.context import Context
from pgconductor.durable import Tries
from pgconductor.errors import NoRetry, RetryAfter, Snooze
from pgconductor.events import Promise
from pgconductor.handle import Handle, SyncHandle
from pgconductor.model import PromiseAnswer
from pgconductor.readers import ChannelReader
from pgconductor.retry import Delays, Exponential, Linear
from pgconductor.sync_client import SyncClient
from pgconductor.tasks import Invocable, Invocation, SyncTaskCall, Task, TaskCall, Tasks, Worker


@dataclass
class Report:
    day: date


def forms(conductor: Tasks) -> None:
    @conductor.task
    async def with_context(ctx: Context, name: str) -> str:
        return name

    @conductor.task
    async def without_context(*, day: date, times: int = 1) -> Report:
        return Report(day)

    @conductor.task
    def plain_with_context(ctx: Context, day: date) -> Report:
        return Report(day)

    @conductor.task
    def plain(name: str) -> int:
        return len(name)

    @conductor.task(name="configured", queue="fast", max_attempts=5, backoff=Exponential(initial=0.1))
    async def configured(ctx: Context, name: str) -> str:
        return name

    @conductor.task(
        timeout=timedelta(minutes=1), backoff=[1, 2.5, timedelta(minutes=1)], keep_completed=0, keep_failed=None
    )
    async def listed(name: str) -> str:
        return name

    @conductor.task(timeout=5, backoff=10, keep_completed=timedelta(days=1))
    async def fixed(name: str) -> str:
        return name

    @conductor.task(backoff=[1, 10, 60])
    async def integers(name: str) -> str:
        return name

    @conductor.task(backoff=Linear(initial=timedelta(seconds=1), step=1))
    async def linear(name: str) -> str:
        return name

    @conductor.task(backoff=Delays((1, 10), jitter=0.1))
    async def delays(name: str) -> str:
        return name

    def wait(attempt: int, error: BaseException) -> float:
        return 1.0 if isinstance(error, OSError) else 60.0

    @conductor.task(backoff=wait)
    async def computed(name: str) -> str:
        return name

    assert_type(computed.bind("Ada"), Invocation[str])
    print(listed, fixed, integers, linear, delays)

    @conductor.task(queue="fast")
    def configured_plain(name: str) -> int:
        return len(name)

    @conductor.task()
    async def nothing() -> None:
        return None

    assert_type(with_context.bind("Ada"), Invocation[str])
    assert_type(with_context.bind(name="Ada"), Invocation[str])
    assert_type(without_context.bind(day=date(2024, 1, 1), times=2), Invocation[Report])
    assert_type(plain_with_context.bind(date(2024, 1, 1)), Invocation[Report])
    assert_type(plain.bind("Ada"), Invocation[int])
    assert_type(configured.bind(name="Ada"), Invocation[str])
    assert_type(configured_plain.bind(name="Ada"), Invocation[int])
    assert_type(nothing.bind(), Invocation[None])

    as_task: Task[[str], int] = plain
    as_invocable: Invocable[[str], int] = plain
    also_invocable: Invocable[[str], int] = plain.options(priority=1)
    print(as_task, as_invocable, also_invocable)

    worker = conductor.create_worker(
        queue="fast", tasks=[configured, configured_plain], concurrency=10, notify="always"
    )
    assert_type(worker, Worker)


async def invoking(
    conductor: Tasks, sync_conn: psycopg.Connection[Any], trio_conn: psycopg.AsyncConnection[Any], later: datetime
) -> None:
    @conductor.task(queue="fast")
    async def greet(ctx: Context, name: str) -> str:
        return name

    handle = await greet.invoke(name="World")
    assert_type(handle, Handle[str])
    assert_type(await handle.result(timeout=5), str)
    assert_type(await handle.result(timeout=timedelta(seconds=5)), str)
    assert_type(await greet.invoke_many([greet.bind(name=n) for n in "ab"]), list[Handle[str]])

    await greet.options(priority=10, run_at=later, dedupe_key="w").invoke(name="World")
    await greet.options(queue="other", delay=timedelta(minutes=1)).invoke("World")
    await greet.options(run_at=datetime.now(UTC), conn=trio_conn).invoke("World")
    await greet.options(conn=None).invoke("World")
    await greet.options(timeout=5, deadline=later, max_attempts=1, tags=["a"]).invoke("World")
    await greet.options(timeout=timedelta(seconds=5), deadline=60.0, tags=("a", "b"), conn=trio_conn).invoke("World")
    assert_type(greet.options(deadline=timedelta(hours=1), conn=sync_conn).invoke("World"), SyncHandle[str])

    call = greet.options(conn=sync_conn)
    assert_type(call.bind("Ada"), Invocation[str])
    assert_type(call.invoke("Ada"), SyncHandle[str])
    assert_type(call.invoke("Ada").result(), str)
    assert_type(call.invoke_many([call.bind("Ada")]), list[SyncHandle[str]])


async def through_protocol(call: TaskCall[[str], int], sync: SyncTaskCall[[str], int]) -> None:
    assert_type(await call.invoke("x"), Handle[int])
    assert_type(sync.invoke("x"), SyncHandle[int])


class Pool:
    """A resource."""


async def resources(ctx: Context) -> None:
    assert_type(ctx.resource(Pool), Pool)
    assert_type(ctx.attempt, int)
    ctx.logger.info("started")
    assert_type(ctx.is_cancelled, bool)
    ctx.check_cancelled()


async def events(ctx: Context, handle: Handle[str], sync_handle: SyncHandle[str]) -> None:
    assert_type(await ctx.wait_for_event("paid", type=Report), Report)
    assert_type(await ctx.wait_for_event("w", "paid", match={"n": 1}, timeout=5, type=list[int]), list[int])
    assert_type(await ctx.wait_for_event("w", timeout=timedelta(days=1)), Any)
    assert_type(await ctx.receive("m", "channel", timeout=5.0, type=str), str)
    assert_type(await ctx.receive("m"), Any)
    promise = await ctx.promise("approval")
    assert_type(promise, Promise)
    assert_type(promise.id, UUID)
    assert_type(await promise.result(type=Report, timeout=timedelta(days=3)), Report)
    assert_type(await promise.result(), Any)
    await ctx.emit("say", "paid", {"n": 1}, retention=timedelta(hours=1))
    assert_type(await ctx.send("tell", promise.id, "channel", 1), bool)
    await ctx.set_progress({"done": 1})
    assert_type(await handle.send("channel", [1, 2]), bool)
    assert_type(await handle.progress(), Any)
    assert_type(sync_handle.send("channel"), bool)
    assert_type(sync_handle.progress(), Any)
    channel = await ctx.open_channel("lines", capacity=10)
    assert_type(channel, Channel)
    await channel.send({"n": 1})
    await channel.aclose()
    async for report in handle.channel("lines", type=Report):
        assert_type(report, Report)
    assert_type(handle.channel("lines"), ChannelReader[Any])
    for number in sync_handle.channel("lines", type=int, after=3):
        assert_type(number, int)


async def sending(
    conductor: Conductor,
    client: SyncClient,
    trio_conn: psycopg.AsyncConnection[Any],
    sync_conn: psycopg.Connection[Any],
    some: UUID,
) -> None:
    assert_type(await conductor.emit("paid", Report(date(2030, 1, 1)), retention=60, conn=trio_conn), int)
    assert_type(await conductor.send(some, "channel", 1), bool)
    assert_type(await conductor.resolve_promise(some, "yes"), PromiseAnswer)
    assert_type(await conductor.reject_promise(some, "no", conn=trio_conn), PromiseAnswer)
    assert_type(client.emit("paid", conn=sync_conn), int)
    assert_type(client.resolve_promise(some), PromiseAnswer)


def verdicts(kind: int) -> None:
    if kind == 1:
        raise NoRetry("gone") from ValueError()
    if kind == 2:
        raise RetryAfter(timedelta(seconds=30), "busy")
    raise Snooze(60)


async def load(day: date) -> Report:
    return Report(day)


def count(words: list[str], least: int) -> int:
    return len(words) + least


async def durable(conductor: Tasks, ctx: Context, later: datetime) -> None:
    @conductor.task
    async def greet(ctx: Context, name: str) -> str:
        return name

    @conductor.task
    def plain(name: str) -> int:
        return len(name)

    assert_type(await ctx.step("load", load, date(2024, 1, 1)), Report)
    assert_type(await ctx.step("count", count, ["a"], 1, retry=3, timeout=5), int)
    assert_type(await ctx.step("lambda", lambda: 1.5, retry=Tries(5, backoff=[1, 2])), float)
    assert_type(await ctx.invoke("hello", greet, name="Ada"), str)
    assert_type(await ctx.invoke("hello", greet.options(priority=3, delay=5), "Ada"), str)
    assert_type(await ctx.invoke_abandoned("plain", plain, "Ada"), int)
    await ctx.sleep("short", 0.5)
    await ctx.sleep("long", timedelta(days=400))
    await ctx.sleep_until("later", later)
    await ctx.checkpoint()
    assert_type(await ctx.now(), datetime)
    assert_type(await ctx.uuid(name="id"), UUID)
    assert_type(await ctx.random(), float)
    async with ctx.nursery("all", on_parent_close="abandon") as nursery:
        assert_type(nursery, DurableNursery)
        assert_type(nursery.invoke(greet, name="Ada"), ChildHandle[str])
        assert_type(nursery.invoke_as("named", plain.bind("Ada")), ChildHandle[int])
        assert_type(nursery.start_step("load", load, date(2024, 1, 1)), StepHandle[Report])
        assert_type(nursery.start_step("count", count, ["a"], 1, timeout=timedelta(minutes=1)), StepHandle[int])
    assert_type(await nursery.invoke(greet, name="Ada").result(), str)
    assert_type(nursery.start_step("again", load, date(2024, 1, 1)).value, Report)
