"""Every form of declaring a handler of batches, with the types that callers see, and mistakes that must be reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type

import psycopg

from pgconductor.batch_context import BatchContext, BatchItem
from pgconductor.context import Context
from pgconductor.handle import Handle, SyncHandle
from pgconductor.tasks import Invocation, Task, TaskCall, Tasks


@dataclass
class Mail:
    to: str


@dataclass
class Sent:
    id: int


class Bounced(Exception):
    pass


async def forms(conductor: Tasks, sync_conn: psycopg.Connection[Any]) -> None:
    @conductor.batch_task(queue="mail", size=100, max_wait=0.5)
    async def send(ctx: BatchContext, mails: list[Mail]) -> list[Sent | Exception]:
        assert_type(ctx.items, Sequence[BatchItem])
        assert_type(ctx.resource(Mail), Mail)
        return [Sent(1) if mail.to else Bounced() for mail in mails]

    @conductor.batch_task(size=100)
    async def without_context(mails: list[Mail]) -> list[Sent | Exception]:
        return []

    @conductor.batch_task(size=10, max_wait=timedelta(seconds=1), max_attempts=5, backoff=[1, 2], timeout=3)
    async def sequences(mails: Sequence[Mail]) -> Sequence[Sent]:
        return []

    @conductor.batch_task(size=10)
    async def nothing(ctx: BatchContext, mails: list[Mail]) -> None:
        pass

    @conductor.batch_task(size=10)
    async def nothing_without_context(mails: Sequence[Mail]) -> None:
        pass

    @conductor.batch_task(size=10)
    async def nothing_or_error(mails: list[Mail]) -> list[Exception | None]:
        return []

    @conductor.batch_task(size=10)
    async def optional(numbers: list[int | None]) -> list[int | Exception | None]:
        return []

    @conductor.batch_task(size=10)
    def plain(ctx: BatchContext, words: Sequence[str]) -> list[int | Exception]:
        return []

    @conductor.batch_task(size=10)
    def plain_without_context(words: list[str]) -> list[int]:
        return []

    @conductor.batch_task(size=10)
    def plain_nothing(ctx: BatchContext, rows: list[dict[str, Any]]) -> None:
        pass

    @conductor.batch_task(size=10)
    def plain_nothing_without_context(rows: list[tuple[int, str]]) -> None:
        pass

    assert_type(send, Task[[Mail], Sent])
    assert_type(without_context, Task[[Mail], Sent])
    assert_type(sequences, Task[[Mail], Sent])
    assert_type(nothing, Task[[Mail], None])
    assert_type(nothing_without_context, Task[[Mail], None])
    assert_type(nothing_or_error, Task[[Mail], None])
    assert_type(optional, Task[[int | None], int | None])
    assert_type(plain, Task[[str], int])
    assert_type(plain_without_context, Task[[str], int])
    assert_type(plain_nothing, Task[[dict[str, Any]], None])
    assert_type(plain_nothing_without_context, Task[[tuple[int, str]], None])

    handle = await send.invoke(Mail("a"))
    assert_type(handle, Handle[Sent])
    assert_type(await handle.result(), Sent)
    assert_type(send.options(priority=1), TaskCall[[Mail], Sent])
    assert_type(await send.options(priority=1).invoke(Mail("a")), Handle[Sent])
    assert_type(send.options(conn=sync_conn).invoke(Mail("a")), SyncHandle[Sent])
    assert_type(send.bind(Mail("a")), Invocation[Sent])
    assert_type(await send.invoke_many([send.bind(Mail("a"))]), list[Handle[Sent]])

    @send.batch_former("1")
    async def send_1(ctx: BatchContext, addresses: list[str]) -> list[int | Exception]:
        return []

    @send.former("0")
    async def send_0(to: str, subject: str) -> None: ...

    assert_type(send_1, Task[[str], int])
    assert_type(await send_0.invoke(to="a", subject="b"), Handle[None])


async def parent(ctx: Context, task: Task[[Mail], Sent]) -> None:
    assert_type(await ctx.invoke("mail", task, Mail("a")), Sent)


async def mistakes(conductor: Tasks) -> None:
    @conductor.batch_task(size=10)
    async def send(mails: list[Mail]) -> list[Sent | Exception]:
        return []

    await send.invoke("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await send.invoke([Mail("a")])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await send.invoke()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    conductor.batch_task()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    conductor.batch_task(size="10")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @conductor.batch_task(size=10)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType, reportUntypedFunctionDecorator]
    async def single(mail: Mail) -> Sent:
        return Sent(1)

    @conductor.batch_task(size=10)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType, reportUntypedFunctionDecorator]
    async def wrong_context(ctx: Context, mails: list[Mail]) -> None:
        pass

    @conductor.batch_task(size=10)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType, reportUntypedFunctionDecorator]
    async def no_answers(mails: list[Mail]) -> int:
        return 1
