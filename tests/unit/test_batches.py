"""Declaring handlers of batches: what they may look like, and what is refused with which remedy. No database."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, List, NoReturn, Optional, Union  # noqa: UP035
from uuid import uuid4

import pytest

from pgconductor.batch_context import BatchContext, BatchItem
from pgconductor.conductor import Conductor
from pgconductor.context import Context
from pgconductor.errors import HandlerCancelled, InvalidOption, InvalidPayload, InvalidTask, Misuse


@dataclass
class Mail:
    to: str


class Bounced(Exception):
    pass


@pytest.fixture
def conductor() -> Conductor:
    return Conductor("postgresql://nobody")


def test_items_go_by_position_or_by_name(conductor: Conductor) -> None:
    """A producer in SQL writes the same."""

    @conductor.batch_task(queue="mail", size=100, max_wait=timedelta(seconds=0.5))
    async def send(ctx: BatchContext, mails: list[Mail]) -> list[int | Exception]:
        return [1 for _ in mails]

    assert json.loads(send.bind(Mail("a")).payload) == {"item": {"to": "a"}}
    assert send.bind_arguments({"item": Mail("a")}).payload == send.bind(Mail("a")).payload
    assert send.decode('{"item": {"to": "b"}}') == {"item": Mail("b")}
    assert send.batch is not None
    assert (send.batch.size, send.batch.max_wait) == (100, 0.5)
    assert (send.queue, send.name, send.wants_context, send.is_async) == ("mail", "send", True, True)
    for wrong in ("a", 5, None):
        with pytest.raises(InvalidPayload, match="item"):
            send.bind(wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidPayload, match="'mails'"):
        send.bind_arguments({"mails": [], "item": Mail("a")})


async def list_items(items: list[int]) -> None: ...
async def sequence_items(items: Sequence[int]) -> None: ...
async def old_items(items: List[int]) -> None: ...  # noqa: UP006
async def annotated_items(items: Annotated[list[int], "items"]) -> None: ...
def with_context(context: BatchContext, items: list[int]) -> None: ...
def by_position(items: list[int], /) -> None: ...


@pytest.mark.parametrize("handler", [list_items, sequence_items, old_items, annotated_items, with_context, by_position])
def test_forms_of_items(conductor: Conductor, handler: Any) -> None:
    """Each form is one list of items."""
    task: Any = conductor.batch_task(size=1)(handler)
    assert task.bind(5).payload == '{"item":5}'
    with pytest.raises(InvalidPayload):
        task.bind("x")
    assert task.shape.returns_nothing


def test_bare_list_holds_anything(conductor: Conductor) -> None:
    """As an unannotated parameter of a plain task does."""

    async def bare(items: list[Any]) -> list[Any]:
        return items

    async def old(items: list[Any]) -> list[Any]:
        return items

    bare.__annotations__.update({"items": list, "return": list})
    old.__annotations__.update({"items": List, "return": Sequence})  # noqa: UP006
    for handler in (bare, old):
        task: Any = conductor.batch_task(size=1)(handler)
        assert task.bind({"x": [1]}).payload == '{"item":{"x":[1]}}'
        assert task.result.decode('"x"') == "x"


async def values(items: list[int]) -> list[int]:
    raise AssertionError


async def answers(items: list[int]) -> list[int | Exception]:
    raise AssertionError


async def old_answers(items: list[int]) -> Sequence[Union[int, Bounced, BaseException]]:  # noqa: UP007
    raise AssertionError


async def optional(items: list[int]) -> list[Optional[int]]:  # noqa: UP045
    raise AssertionError


async def several(items: list[int]) -> list[int | str | Exception | None]:
    raise AssertionError


async def nothing_or_error(items: list[int]) -> list[Exception | None]:
    raise AssertionError


async def nothing(items: list[int]) -> None: ...
async def never(items: list[int]) -> NoReturn:
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "good", "bad"),
    [
        (values, [1], [None, "x"]),
        (answers, [1], [None, "x"]),
        (old_answers, [1], [None, "x"]),
        (optional, [1, None], ["x"]),
        (several, [1, None, "x"], [1.5]),
        (nothing_or_error, [None], [1]),
        (nothing, [None], [1]),
        (never, [None], [1]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_result_is_an_answer_that_is_no_exception(
    conductor: Conductor, handler: Any, good: list[Any], bad: list[Any]
) -> None:
    """What a caller gets of its own execution, with its type."""
    task: Any = conductor.batch_task(size=1)(handler)
    for value in good:
        assert task.result.decode(task.result.encode(value)) == value
    for value in bad:
        with pytest.raises(InvalidPayload):
            task.result.encode(value)


async def no_items() -> None: ...
async def context_only(ctx: BatchContext) -> None: ...
async def two(items: list[int], more: int) -> None: ...
async def keyword(*, items: list[int]) -> None: ...
async def stars(items: list[int], **more: int) -> None: ...
async def single(item: int) -> None: ...
async def mapping(items: dict[str, int]) -> None: ...
async def unannotated(items) -> None: ...  # type: ignore[no-untyped-def]
async def set_items(items: set[int]) -> None: ...
async def maybe(items: list[int] | None) -> None: ...
async def plain_context(ctx: Context, items: list[int]) -> None: ...
async def hidden_context(items: list[Context]) -> None: ...
async def batch_context_behind(items: list[int], ctx: BatchContext) -> None: ...
async def no_answer(items: list[int]):  # type: ignore[no-untyped-def]
    raise AssertionError


async def any_answer(items: list[int]) -> Any:
    raise AssertionError


async def one_answer(items: list[int]) -> int:
    raise AssertionError


async def text(items: list[int]) -> str:
    raise AssertionError


async def errors_only(items: list[int]) -> list[Exception]:
    raise AssertionError


async def unreadable(items: list[Bounced]) -> None: ...


def awaitable(items: list[int]) -> Awaitable[None]:
    raise AssertionError


REFUSED: list[tuple[Any, str]] = [
    (no_items, "one parameter"),
    (context_only, "one parameter"),
    (two, "one parameter"),
    (keyword, "keyword-only"),
    (stars, "stars"),
    (single, r"`list\[T\]`"),
    (mapping, r"`list\[T\]`"),
    (unannotated, r"`list\[T\]`"),
    (set_items, r"`list\[T\]`"),
    (maybe, r"`list\[T\]`"),
    (plain_context, "`ctx: BatchContext`"),
    (hidden_context, "BatchContext"),
    (batch_context_behind, "one parameter"),
    (no_answer, "-> None"),
    (any_answer, "-> None"),
    (one_answer, r"-> list\[T \| Exception\]"),
    (text, "-> None"),
    (errors_only, r"None \| Exception"),
    (unreadable, "cannot be read from JSON"),
    (awaitable, "async def"),
]


@pytest.mark.parametrize(("handler", "remedy"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_handler_of_batches_is_refused(conductor: Conductor, handler: Any, remedy: str) -> None:
    """At the first use, with the remedy, and never in a worker with executions at hand."""
    task: Any = conductor.batch_task(size=1)(handler)
    with pytest.raises(InvalidTask, match=remedy) as refused:
        task.resolve()
    assert f"task {handler.__name__!r}" in str(refused.value)


def test_context_without_annotation_is_refused_at_once(conductor: Conductor) -> None:
    """It would be taken for the items."""
    with pytest.raises(InvalidTask, match="from pgconductor import BatchContext"):

        @conductor.batch_task(size=1)  # pyright: ignore
        async def send(ctx, items: list[int]) -> None:  # type: ignore[no-untyped-def]
            pass


def test_batch_context_is_not_for_plain_tasks(conductor: Conductor) -> None:
    """And the message says what is."""

    @conductor.task
    async def first(ctx: BatchContext, n: int) -> None:
        pass

    @conductor.task
    async def later(n: int, ctx: BatchContext) -> None:
        pass

    for task in (first, later):
        with pytest.raises(InvalidTask, match=r"`ctx: Context`.*batch_task\(size="):
            task.resolve()


@pytest.mark.parametrize("size", [0, -1, 1001, 1.5, "10", None, True])
def test_size_out_of_range_is_refused(conductor: Conductor, size: Any) -> None:
    """From 1 to 1,000."""
    with pytest.raises(InvalidOption, match="size of a batch"):
        conductor.batch_task(size=size)


@pytest.mark.parametrize("max_wait", [-0.1, 60.1, timedelta(minutes=2), float("nan"), "1", None])
def test_max_wait_out_of_range_is_refused(conductor: Conductor, max_wait: Any) -> None:
    """Seconds from 0 to 60."""
    with pytest.raises(InvalidOption, match="max_wait of a batch"):
        conductor.batch_task(size=1, max_wait=max_wait)


def test_options_are_those_of_a_task(conductor: Conductor) -> None:
    """Each is passed on, and to former versions with the batch's own."""
    declare = conductor.batch_task(
        size=1000, max_wait=60, name="n", queue="q", max_attempts=7, backoff=3, timeout=4, deadline=5,
        keep_completed=6, keep_failed=None, version="2",
    )  # fmt: skip
    task = declare(list_items)
    former: Any = task.batch_former("1")(with_context)
    for each in (task, former):
        assert each.batch is not None
        assert (each.batch.size, each.batch.max_wait, each.name, each.queue) == (1000, 60.0, "n", "q")
        assert (each.max_attempts, each.timeout, each.deadline) == (7, 4.0, 5.0)
        assert (each.keep_completed, each.keep_failed) == (6.0, None)
    assert (task.version, former.version) == ("2", "1")
    assert former.wants_context
    other: Any = task.batch_former("0", size=5, max_wait=0)(sequence_items)
    assert (other.batch.size, other.batch.max_wait) == (5, 0.0)
    with pytest.raises(InvalidTask, match="two tasks named"):
        declare(sequence_items)


def test_former_version_of_batches_of_a_plain_task_needs_a_size(conductor: Conductor) -> None:
    """It has no size to take over; the wrong kind of decorator is found out at the first execution."""

    @conductor.task
    async def plain(name: str) -> None: ...

    with pytest.raises(InvalidOption, match=r"batch_former\(\) of <Task 'plain'.* needs size="):
        plain.batch_former("1", max_wait=1)
    with pytest.raises(InvalidOption, match="size of a batch"):
        plain.batch_former("1", size=0)
    former: Any = plain.batch_former("1", size=7)(list_items)
    assert (former.batch.size, former.batch.max_wait, former.name) == (7, 0.0, "plain")


def test_contexts_may_be_made_by_hand() -> None:
    """For tests that call the handler directly: nothing is cancelled, and resources are what was given."""
    items = [BatchItem(uuid4(), 1)]
    ctx = BatchContext(items, task="t", queue="q", resources={int: 5})
    assert ctx.resource(int) == 5
    assert not ctx.is_cancelled
    assert not ctx.items[0].is_cancelled
    ctx.check_cancelled()
    ctx.items[0].check_cancelled()
    assert repr(ctx) == "<BatchContext of task 't', 1 executions>"
    assert repr(items[0]) == f"<BatchItem of execution {items[0].id}, attempt 1>"
    with pytest.raises(Misuse, match="no such resource"):
        ctx.resource(str)


def test_logger_of_a_batch_says_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """There is no one execution that a line could be of."""
    ctx = BatchContext([BatchItem(uuid4(), 1)] * 3, task="t", queue="q", resources={})
    with caplog.at_level("INFO", logger="pgconductor.task"):
        ctx.logger.info("hello")
    (record,) = caplog.records
    assert vars(record).items() >= {"task": "t", "queue": "q", "batch_size": 3}.items()


def test_watched_items_and_batches_say_and_raise_when_they_are_to_end() -> None:
    """Each asks its own."""

    class Ended:
        is_cancelled = True

        def check(self) -> None:
            raise HandlerCancelled("now")

    ctx = BatchContext([BatchItem(uuid4(), 1, Ended())], task="t", queue="q", resources={}, watch=Ended())
    assert ctx.is_cancelled
    assert ctx.items[0].is_cancelled
    for check in (ctx.check_cancelled, ctx.items[0].check_cancelled):
        with pytest.raises(HandlerCancelled):
            check()
