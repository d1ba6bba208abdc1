"""Declarations and invocations, without an event loop or a database: an invoker that keeps what it is given."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypedDict, TypeVar, Unpack, cast
from uuid import uuid4

import psycopg
import pytest

from pgconductor.codec import Limits
from pgconductor.context import Context
from pgconductor.errors import InvalidOption, InvalidPayload, InvalidTask, Misuse
from pgconductor.handle import Handle, SyncHandle
from pgconductor.invocations import new_executions
from pgconductor.options import MAX_DELAY
from pgconductor.retry import Delays, Exponential, Fixed
from pgconductor.tasks import DEFAULT_OPTIONS, Invocation, SyncTaskCall, Task, TaskCall, Tasks

if TYPE_CHECKING:
    from pgconductor.context import Context as HiddenContext

R = TypeVar("R")


class Source:
    """Answers every wait with the timeout it was given."""

    async def wait_result(self, execution_id: Any, task: Task[..., R], timeout: float | None) -> R:
        return timeout  # type: ignore[return-value]

    async def cancel(self, *executions: Any, reason: str | None) -> Any:
        raise AssertionError("not asked for here")

    async def execution_errors(self, execution_id: Any) -> Any:
        raise AssertionError("not asked for here")

    async def send(self, execution: Any, channel: str, payload: object = None, /) -> bool:
        raise AssertionError("not asked for here")

    async def progress(self, execution_id: Any) -> Any:
        raise AssertionError("not asked for here")

    async def status(self, execution: Any, /) -> Any:
        raise AssertionError("not asked for here")

    async def steps(self, execution: Any, /) -> Any:
        raise AssertionError("not asked for here")

    async def wait_page(self, execution_id: Any, name: str, after: int, limit: int) -> Any:
        raise AssertionError("not asked for here")


class SyncSource:
    """The same, blocking."""

    def wait_result(self, execution_id: Any, task: Task[..., R], timeout: float | None) -> R:
        return timeout  # type: ignore[return-value]

    def cancel(self, *executions: Any, reason: str | None) -> Any:
        raise AssertionError("not asked for here")

    def execution_errors(self, execution_id: Any) -> Any:
        raise AssertionError("not asked for here")

    def send(self, execution: Any, channel: str, payload: object = None, /) -> bool:
        raise AssertionError("not asked for here")

    def progress(self, execution_id: Any) -> Any:
        raise AssertionError("not asked for here")

    def status(self, execution: Any, /) -> Any:
        raise AssertionError("not asked for here")

    def steps(self, execution: Any, /) -> Any:
        raise AssertionError("not asked for here")

    def wait_page(self, execution_id: Any, name: str, after: int, limit: int) -> Any:
        raise AssertionError("not asked for here")


class Recorder(Tasks):
    """Keeps the batches it is asked to insert."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits=limits)
        self.batches: list[tuple[list[Invocation[Any]], object]] = []

    async def invoke_many(
        self, calls: Sequence[Invocation[R]], conn: psycopg.AsyncConnection[Any] | None
    ) -> list[Handle[R]]:
        self.batches.append((list(calls), conn))
        return [Handle(Source(), call.task, uuid4()) for call in calls]

    def invoke_many_sync(
        self, calls: Sequence[Invocation[R]], conn: psycopg.Connection[Any] | None
    ) -> list[SyncHandle[R]]:
        self.batches.append((list(calls), conn))
        return [SyncHandle(SyncSource(), call.task, uuid4()) for call in calls]


@pytest.fixture
def conductor() -> Recorder:
    return Recorder()


def a_context() -> Context:
    return Context(uuid4(), 1, task="greet", queue="default", resources={})


@dataclass
class Report:
    day: date


# --- handlers, at module level as applications have them ---


async def with_context(ctx: Context, name: str) -> str:
    return f"{ctx.attempt} {name}"


async def with_positional_context(ctx: Context, /, name: str) -> str:
    return f"{ctx.attempt} {name}"


async def with_annotated_context(context: Annotated[Context, "note"], name: str) -> str:
    return f"{context.attempt} {name}"


def plain(day: date, times: int = 2) -> list[Report]:
    return [Report(day)] * times


def same_result() -> list[Report]:
    return []


async def never_returns() -> NoReturn:
    raise AssertionError


async def keyword_only(*, anything: Any) -> Any:
    return anything


def _bare_function() -> Callable[..., Any]:
    """A function without annotations, as untyped programs have them."""
    names: dict[str, Any] = {}
    exec("def unannotated(name, times=1):\n    return [name] * times\n", names)  # type checkers refuse its source
    return cast("Callable[..., Any]", names["unannotated"])


unannotated = _bare_function()


def later_defined(value: Later) -> Later:
    return value


@dataclass
class Later:
    x: int


# --- declaring ---


def test_a_bare_decorator_takes_the_functions_name_and_the_defaults(conductor: Recorder) -> None:
    """What users write first would not work, or would mean something else."""
    task = conductor.task(plain)
    assert (task.name, task.queue, task.max_attempts, task.is_async) == ("plain", "default", 3, False)
    assert isinstance(task.backoff, Exponential)
    assert task.handler is plain
    assert conductor.registry.get("plain") is task
    assert list(conductor.registry) == [task]


def test_a_decorator_with_options_sets_them(conductor: Recorder) -> None:
    """An option would be accepted and ignored."""
    backoff = Exponential(initial=0.5)
    task = conductor.task(name="Ünïcode 'name'", queue="q;--", max_attempts=7, backoff=backoff)(with_context)
    assert (task.name, task.queue, task.max_attempts, task.is_async) == ("Ünïcode 'name'", "q;--", 7, True)
    assert task.backoff is backoff


@pytest.mark.parametrize("handler", [with_context, with_positional_context, with_annotated_context])
def test_the_context_is_found_by_its_annotation_and_is_no_argument(
    conductor: Recorder, handler: Callable[..., Any]
) -> None:
    """String annotations, `/` or `Annotated` would hide it, and it would be asked for in the payload."""
    task = conductor.task(handler)
    assert task.wants_context
    payload = task.bind("Ada").payload
    assert payload == '{"name":"Ada"}'
    coroutine = task.call(a_context(), task.decode(payload))
    with pytest.raises(StopIteration, match="1 Ada"):
        coroutine.send(None)


def test_a_handler_without_context_gets_none(conductor: Recorder) -> None:
    """It would get the context in place of its first argument."""
    task = conductor.task(plain)
    assert not task.wants_context
    result = task.call(a_context(), task.decode(task.bind(date(2024, 1, 1)).payload))
    assert result == [Report(date(2024, 1, 1))] * 2
    assert task.result.decode(task.result.encode(result)) == result


def test_a_decorated_handler_keeps_the_signature_it_wraps(conductor: Recorder) -> None:
    """Every decorator of an application would turn its handlers into ``*args, **kwargs``."""

    @functools.wraps(with_context)
    async def logged(*args: Any, **kwargs: Any) -> Any:
        return await with_context(*args, **kwargs)

    task: Task[..., Any] = conductor.task(logged)
    assert task.wants_context
    assert task.is_async
    coroutine = task.call(a_context(), task.decode(task.bind(name="Ada").payload))
    with pytest.raises(StopIteration, match="1 Ada"):
        coroutine.send(None)
    with pytest.raises(InvalidPayload, match="no argument 'other'"):
        task.bind(name="Ada", other=1)


def test_a_handler_that_never_returns_may_say_so(conductor: Recorder) -> None:
    """A task that always fails or is cancelled could not be annotated honestly."""
    conductor.task(never_returns).resolve()


def test_extra_keyword_arguments_cannot_replace_the_context(conductor: Recorder) -> None:
    """A row's payload could pass its own value as the context, or fail with TypeError outside the guard."""

    @conductor.task
    def open_ended(ctx: Context, **more: int) -> dict[str, int]:
        return more

    assert open_ended.call(a_context(), open_ended.decode('{"a":1}')) == {"a": 1}
    with pytest.raises(InvalidPayload, match="no argument 'ctx'"):
        open_ended.decode('{"ctx":1}')


def test_a_keyword_only_first_parameter_may_be_anything(conductor: Recorder) -> None:
    """The remedy that the refusal of Any names would not work."""
    task = conductor.task(keyword_only)
    assert task.decode(task.bind(anything=[1]).payload) == {"anything": [1]}


def test_an_unannotated_function_takes_plain_data(conductor: Recorder) -> None:
    """Programs without annotations could not have tasks."""
    task: Task[..., Any] = conductor.task(unannotated)
    assert task.call(a_context(), task.decode(task.bind("x", times=2).payload)) == ["x", "x"]


def test_annotations_are_resolved_at_first_use(conductor: Recorder) -> None:
    """A handler could not name a class that its module defines later."""
    task = conductor.task(later_defined)
    assert task.decode(task.bind(Later(1)).payload) == {"value": Later(1)}


def test_an_annotation_that_does_not_exist_is_refused_at_first_use(conductor: Recorder) -> None:
    """The user would see a bare NameError from inside the engine; declaring must still work."""

    @conductor.task
    def broken(ctx: HiddenContext, name: str) -> None:
        """Its context exists for type checkers only."""

    for use in (broken.resolve, lambda: broken.bind(name="x")):
        with pytest.raises(InvalidTask, match=r"task 'broken' cannot be resolved.*HiddenContext.*TYPE_CHECKING"):
            use()


def test_calling_a_task_tells_what_to_call(conductor: Recorder) -> None:
    """It would run in the caller unnoticed, or fail without a word on how to go on."""
    task = conductor.task(plain)
    with pytest.raises(Misuse, match=r"plain\.invoke\(\).*plain\.handler\(\)"):
        task(date(2024, 1, 1))
    assert task.handler(date(2024, 1, 1), times=1) == [Report(date(2024, 1, 1))]


# --- what cannot be a task ---


class Methods:
    """Functions that belong to a class."""

    async def method(self, name: str) -> None:
        """Needs an instance."""

    @classmethod
    async def of_class(cls, name: str) -> None:
        """Is bound."""

    async def __call__(self, name: str) -> None:
        """Is not a function."""


async def async_generator(name: str) -> AsyncIterator[str]:
    yield name


def generator(name: str) -> Iterator[str]:
    yield name


async def bare_ctx(ctx: Any, name: str) -> None:
    """An unannotated context, as soon as the annotation is gone."""


del bare_ctx.__annotations__["ctx"]


async def variadic(*names: str) -> None:
    """Has no names for its arguments."""


async def positional_only(ctx: Context, name: str, /) -> None:
    """Cannot be called by name."""


@functools.wraps(with_context)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    return with_context(*args, **kwargs)


nameless: Callable[[str], str] = lambda name: name  # noqa: E731


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (nameless, "lambda"),
        (functools.partial(plain, times=3), "functools.partial"),
        (Methods, "class Methods"),
        (Methods().method, "method Methods.method"),
        (Methods.of_class, "method Methods.of_class"),
        (Methods.method, "is a method"),
        (Methods(), "object of type Methods"),
        (staticmethod(plain), "object of type staticmethod"),
        (len, "object of type builtin_function"),
        (5, "object of type int"),
        (async_generator, "generator function"),
        (generator, "generator function"),
        (bare_ctx, "'ctx' of task 'bare_ctx' has no annotation.*ctx: Context"),
        (variadic, r"takes \*names"),
        (positional_only, "'name' of task 'positional_only' is positional-only"),
        (wrapped, "behind a decorator that is not"),
    ],
)
def test_what_cannot_be_a_task_is_refused_when_declared(conductor: Recorder, handler: Any, message: str) -> None:
    """It would fail at its first execution, in a worker."""
    with pytest.raises(InvalidTask, match=message):
        conductor.task(handler)
    assert len(conductor.registry) == 0


class Options(TypedDict):
    name: str


async def first_any(value: Any) -> None:
    """Its first parameter could be the context."""


async def first_object(value: object) -> None:
    """Its first parameter could be the context."""


async def first_positional_only(name: str, /) -> None:
    """Cannot be called by name."""


async def context_second(name: str, ctx: Context) -> None:
    """Its context is not first."""


async def context_optional(ctx: Context | None, name: str) -> None:
    """Its context may be missing."""


async def context_by_keyword(*, ctx: Context) -> None:
    """Its context is not positional."""


async def unpacked(**options: Unpack[Options]) -> None:
    """Its parameters are in a TypedDict."""


async def complex_parameter(value: complex, **more: Any) -> None:
    """JSON has no complex numbers."""


async def returns_iterator() -> Iterator[int]:
    return iter([1])


def returns_awaitable() -> Awaitable[int]:
    raise AssertionError


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (first_any, "'value' of task 'first_any' is annotated Any or object.*keyword-only"),
        (first_object, "keyword-only"),
        (first_positional_only, "positional-only"),
        (context_second, "context must be the first parameter"),
        (context_optional, "context must be the first parameter"),
        (context_by_keyword, "ordinary first parameter"),
        (unpacked, r"Unpack\[...\]"),
        (complex_parameter, "parameter 'value' of task 'complex_parameter'.*complex"),
        (returns_iterator, "the result of task 'returns_iterator'"),
        (returns_awaitable, "plain def that returns an awaitable"),
    ],
)
def test_annotations_that_do_not_make_a_task_are_refused(conductor: Recorder, handler: Any, message: str) -> None:
    """Type checkers and the engine would disagree about the arguments, or every execution would fail."""
    task: Task[..., Any] = conductor.task(handler)
    with pytest.raises(InvalidTask, match=message):
        task.resolve()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "must not be empty"),
        ({"name": "x" * 129}, "129 bytes"),
        ({"name": "é" * 65}, "130 bytes"),
        ({"name": "a\0"}, "NUL"),
        ({"name": "\ud800"}, "lone surrogate"),
        ({"name": b"x"}, "must be a str, not bytes"),
        ({"queue": ""}, "a queue's name must not be empty"),
        ({"queue": None}, "must be a str"),
        ({"max_attempts": 0}, "from 1 to 10000"),
        ({"max_attempts": 10_001}, "from 1 to 10000"),
        ({"max_attempts": None}, "must be an int"),
        ({"max_attempts": True}, "must be an int"),
        ({"max_attempts": 10**5000}, "too large a number"),
        ({"backoff": "5"}, "backoff of task 'plain' must be seconds.* method"),
        ({"backoff": -5}, "backoff of task 'plain'"),
        ({"timeout": 0}, "timeout of task 'plain' must be more than 0"),
        ({"timeout": -1}, "timeout of task 'plain'"),
        ({"timeout": math.inf}, "finite"),
        ({"timeout": MAX_DELAY * 1.01}, "timeout of task 'plain'"),
        ({"timeout": "5"}, "seconds .* or a timedelta, not str"),
        ({"keep_completed": -1}, "keep_completed of task 'plain'"),
        ({"keep_failed": timedelta(-1)}, "keep_failed of task 'plain'"),
        ({"keep_failed": math.inf}, "finite"),
        ({"keep_completed": True}, "not bool"),
    ],
)
def test_task_options_out_of_range_are_refused(conductor: Recorder, options: dict[str, Any], message: str) -> None:
    """The schema would refuse them at registration, without the line that is wrong."""
    with pytest.raises(InvalidOption, match=message):
        conductor.task(**options)(plain)


def test_timeout_and_retention_are_seconds_or_none(conductor: Recorder) -> None:
    """A timedelta would reach SQL, or "for ever" and "not at all" would be confused."""
    task = conductor.task(timeout=timedelta(minutes=1), keep_completed=0, keep_failed=None)(plain)
    assert (task.timeout, task.keep_completed, task.keep_failed) == (60.0, 0.0, None)
    default = conductor.task(same_result)
    assert (default.timeout, default.keep_completed, default.keep_failed) == (None, 86_400.0, 604_800.0)
    assert [default.keep(kind) for kind in ("completed", "failed", "cancelled", "retried", "released")] == [
        86_400.0,
        *[604_800.0] * 4,
    ]


def test_a_backoff_may_be_given_as_a_number_a_list_or_a_function(conductor: Recorder) -> None:
    """Each of them would need a class of the caller's own."""
    assert conductor.task(name="a", backoff=5)(plain).backoff == Fixed(5.0)
    assert conductor.task(name="b", backoff=[1, 10, 60])(same_result).backoff == Delays([1, 10, 60])
    conductor.task(name="c", backoff=lambda attempt, error: attempt)(keyword_only)


def test_the_longest_name_is_accepted(conductor: Recorder) -> None:
    """The bound would be off by one."""
    conductor.task(name="é" * 64, queue="q" * 128)(plain)


def test_two_tasks_of_one_name_are_refused(conductor: Recorder) -> None:
    """The second would take over the queued executions of the first."""
    first = conductor.task(plain)
    with pytest.raises(InvalidTask, match=r"two tasks named 'plain'.*plain.*keyword_only"):
        conductor.task(name="plain")(keyword_only)
    assert conductor.registry.get("plain") is first
    Recorder().task(plain)  # another conductor is another name space


def test_one_function_is_one_task(conductor: Recorder) -> None:
    """Two names for one function: which of them `greet` is would depend on the order of decorators."""
    task = conductor.task(plain)
    with pytest.raises(InvalidTask, match="registered already as task 'plain'"):
        conductor.task(name="other")(plain)
    with pytest.raises(InvalidTask, match="is a task already"):
        conductor.task(task)


# --- invoking ---


async def test_invoke_sends_one_complete_call(conductor: Recorder) -> None:
    """The insert would lack the arguments or the defaults."""
    task = conductor.task(plain)
    handle = await task.invoke(date(2024, 1, 1), times=3)
    assert isinstance(handle, Handle)
    ((calls, conn),) = conductor.batches
    assert conn is None
    assert calls == [Invocation(task, '{"day":"2024-01-01","times":3}', DEFAULT_OPTIONS)]


async def test_bad_arguments_are_refused_before_anything_is_sent(conductor: Recorder) -> None:
    """A half-checked batch would reach the database."""
    task: Task[..., Any] = conductor.task(plain)
    with pytest.raises(InvalidPayload, match="task 'plain'"):
        await task.invoke("not a day")
    assert conductor.batches == []


async def test_options_travel_with_the_call(conductor: Recorder) -> None:
    """An option would be accepted and lost."""
    task = conductor.task(plain)
    at = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    await task.options(queue="other", priority=-5, run_at=at, dedupe_key="k").invoke(date(2024, 1, 1))
    await task.options(delay=timedelta(minutes=1)).invoke(date(2024, 1, 1))
    first, second = (calls[0].options for calls, _ in conductor.batches)
    assert (first.queue, first.priority, first.dedupe_key) == ("other", -5, "k")
    assert first.run_at == at
    assert first.run_at is not None
    assert first.run_at.tzinfo is UTC
    assert second.delay == 60.0


async def test_invoke_many_is_one_batch_in_order(conductor: Recorder) -> None:
    """10,000 invocations would be 10,000 round trips, or their handles would be mixed up."""
    task = conductor.task(plain)
    days = [date(2024, 1, 1) + timedelta(n) for n in range(10_000)]
    handles = await task.invoke_many(task.bind(day) for day in days)
    ((calls, _),) = conductor.batches
    assert len(handles) == 10_000
    assert [task.decode(call.payload)["day"] for call in calls] == days


async def test_invoke_many_of_nothing_asks_nobody(conductor: Recorder) -> None:
    """An empty batch would be an error, or a round trip."""
    assert await conductor.task(plain).invoke_many([]) == []
    assert conductor.batches == []


async def test_invoke_many_refuses_more_than_the_limit(conductor: Recorder) -> None:
    """One statement would hold locks and memory without bound."""
    task = conductor.task(plain)
    call = task.bind(date(2024, 1, 1))
    with pytest.raises(InvalidOption, match="at most 10,000 calls"):
        await task.invoke_many([call] * 10_001)
    assert conductor.batches == []


async def test_invoke_many_refuses_the_calls_of_another_task(conductor: Recorder) -> None:
    """They would run under the wrong name."""
    task, other = conductor.task(plain), conductor.task(name="other")(same_result)
    with pytest.raises(InvalidTask, match="got a call of task 'other'"):
        await task.invoke_many([other.bind()])


async def test_calls_keep_their_own_options_and_others_get_those_of_the_batch(conductor: Recorder) -> None:
    """`options(...).invoke_many` would be ignored, or override what a call was bound with."""
    task = conductor.task(plain)
    own = task.options(priority=1).bind(date(2024, 1, 1))
    await task.options(priority=9).invoke_many([own, task.bind(date(2024, 1, 2))])
    ((calls, _),) = conductor.batches
    assert [call.options.priority for call in calls] == [1, 9]


def unconnected() -> psycopg.pq.abc.PGconn:
    """What a connection without a server is made of; being told apart takes no more."""
    return psycopg.pq.PGconn.connect_start(b"host=/nonexistent")


async def test_a_sync_connection_makes_sync_calls(conductor: Recorder) -> None:
    """A program without a loop would get coroutines, and a transaction would be left out."""
    conn: psycopg.Connection[Any] = psycopg.Connection(unconnected())
    task = conductor.task(plain)
    call = task.options(conn=conn, priority=2)
    assert isinstance(call, SyncTaskCall)
    handle = call.invoke(date(2024, 1, 1))
    handles = call.invoke_many([call.bind(date(2024, 1, 1)), task.bind(date(2024, 1, 1))])
    assert isinstance(handle, SyncHandle)
    assert len(handles) == 2
    assert call.invoke_many([]) == []
    assert [used for _, used in conductor.batches] == [conn, conn]
    assert all(bound.options.priority == 2 for calls, _ in conductor.batches for bound in calls)


async def test_an_async_connection_is_handed_to_the_invoker(conductor: Recorder) -> None:
    """The execution would be committed apart from the user's transaction."""
    conn: psycopg.AsyncConnection[Any] = psycopg.AsyncConnection(unconnected())
    task = conductor.task(plain)
    call = task.options(conn=conn)
    assert isinstance(call, TaskCall)
    await call.invoke(date(2024, 1, 1))
    await call.invoke_many([task.bind(date(2024, 1, 1))])
    assert [used for _, used in conductor.batches] == [conn, conn]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 2**31}, "priority must be from"),
        ({"priority": -(2**31) - 1}, "priority must be from"),
        ({"priority": 1.0}, "priority must be an int"),
        ({"run_at": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001
        ({"run_at": date(2030, 1, 1)}, "must be a datetime, not date"),
        ({"run_at": datetime(9999, 1, 1, tzinfo=UTC)}, "years 1 to 9998"),
        ({"run_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-23)))}, "years 1 to 9998"),
        ({"run_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=23)))}, "years 1 to 9998"),
        ({"run_at": datetime(1, 1, 1, tzinfo=UTC)}, "years 1 to 9998"),
        ({"delay": -0.001}, "delay"),
        ({"delay": timedelta(seconds=-1)}, "delay"),
        ({"delay": math.nan}, "finite"),
        ({"delay": math.inf}, "finite"),
        ({"delay": MAX_DELAY + 1}, "delay"),
        ({"delay": 10**18}, "delay"),
        ({"delay": 10**400}, "too large a number"),
        ({"delay": "5"}, "seconds .* or a timedelta, not str"),
        ({"delay": True}, "seconds .* or a timedelta, not bool"),
        ({"delay": 1, "run_at": datetime(2030, 1, 1, tzinfo=UTC)}, "not both"),
        ({"dedupe_key": ""}, "dedupe_key must not be empty"),
        ({"dedupe_key": "x" * 513}, "513 bytes"),
        ({"dedupe_key": "\0"}, "NUL"),
        ({"dedupe_key": 5}, "must be a str"),
        ({"queue": ""}, "must not be empty"),
        ({"queue": "x" * 129}, "129 bytes"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"timeout": math.nan}, "finite"),
        ({"deadline": 0}, "deadline is not after now"),
        ({"deadline": -5}, "deadline"),
        ({"deadline": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001
        ({"deadline": datetime(9999, 1, 1, tzinfo=UTC)}, "years 1 to 9998"),
        ({"deadline": "soon"}, "seconds .* or a timedelta, not str"),
        ({"deadline": 60, "delay": 60}, "deadline is not after now and delay"),
        (
            {"deadline": datetime(2030, 1, 1, tzinfo=UTC), "run_at": datetime(2030, 1, 1, tzinfo=UTC)},
            "deadline is not after run_at",
        ),
        ({"max_attempts": 0}, "from 1 to 10000"),
        ({"max_attempts": 1.5}, "must be an int"),
        ({"tags": "urgent"}, "tags must be several texts"),
        ({"tags": 5}, "tags must be several texts"),
        ({"tags": [""]}, "a tag must not be empty"),
        ({"tags": ["x" * 129]}, "129 bytes"),
        ({"tags": ["a\0"]}, "NUL"),
        ({"tags": [5]}, "must be a str"),
        ({"tags": ["a", "a"]}, "the same text twice: a, a"),
        ({"tags": [str(n) for n in range(17)]}, "at most 16"),
        ({"conn": "postgresql://localhost"}, "psycopg Connection or AsyncConnection, not str"),
    ],
)
def test_options_out_of_range_are_refused(conductor: Recorder, options: dict[str, Any], message: str) -> None:
    """SQL would refuse them in the middle of a batch, or overflow."""
    with pytest.raises(InvalidOption, match=message):
        conductor.task(plain).options(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"priority": 2**31 - 1},
        {"priority": -(2**31)},
        {"run_at": datetime(9998, 12, 31, 23, 59, 59, tzinfo=UTC)},
        {"run_at": datetime(1, 1, 2, tzinfo=UTC)},
        {"delay": 0},
        {"delay": MAX_DELAY},
        {"dedupe_key": "é" * 256},
        {"timeout": 0.001},
        {"timeout": MAX_DELAY},
        {"deadline": MAX_DELAY},
        {"deadline": 60, "delay": 59.9},
        {"max_attempts": 10_000},
        {"tags": [str(n) + "x" * 126 for n in range(16)]},
    ],
)
def test_options_at_the_edge_of_their_range_are_accepted(conductor: Recorder, options: dict[str, Any]) -> None:
    """The bounds would be off by one."""
    conductor.task(plain).options(**options)


def test_policy_options_become_one_json_object(conductor: Recorder) -> None:
    """SQL would not know them, would take a time zone for granted, or would get an object for each plain call."""
    task = conductor.task(plain)
    at = datetime(2030, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))

    def sent(**options: Any) -> str | None:
        call = cast("TaskCall[..., list[Report]]", task.options(**options))
        (row,) = new_executions([call.bind(date(2024, 1, 1))])
        return row.options

    assert sent() is None
    assert sent(priority=1, delay=5) is None
    assert json.loads(sent(timeout=timedelta(minutes=1), deadline=at, max_attempts=1, tags=["a", "b"]) or "") == {
        "timeout": 60.0,
        "deadline_at": "2030-01-01T10:00:00+00:00",
        "max_attempts": 1,
        "tags": ["a", "b"],
    }
    assert json.loads(sent(deadline=timedelta(hours=1), tags=iter(["é"])) or "") == {
        "deadline_in": 3600.0,
        "tags": ["é"],
    }


# --- workers ---


def test_a_worker_holds_its_declaration(conductor: Recorder) -> None:
    """An option would be accepted and ignored, or a default would differ from the documented one."""
    task = conductor.task(queue="fast")(plain)
    worker = conductor.create_worker(queue="fast", tasks=iter([task]))
    assert worker.tasks == (task,)
    assert (worker.queue, worker.concurrency, worker.sweep_interval) == ("fast", 10, 5.0)
    assert (worker.flush_interval, worker.notify, worker.claim_batch, worker.flush_batch) == (
        0.05,
        "adaptive",
        None,
        None,
    )
    other = conductor.create_worker(
        queue="fast",
        tasks=[task],
        concurrency=1,
        sweep_interval=timedelta(seconds=1),
        flush_interval=0,
        notify="off",
        claim_batch=1,
        flush_batch=10_000,
    )
    assert (other.concurrency, other.sweep_interval, other.flush_interval) == (1, 1.0, 0.0)
    assert (other.notify, other.claim_batch, other.flush_batch) == ("off", 1, 10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency of the worker of queue 'default'"),
        ({"concurrency": 10_001}, "concurrency"),
        ({"concurrency": 2.5}, "concurrency"),
        ({"sweep_interval": 0.01}, "sweep_interval"),
        ({"sweep_interval": 61}, "sweep_interval"),
        ({"sweep_interval": math.nan}, "sweep_interval"),
        ({"flush_interval": -1}, "flush_interval"),
        ({"flush_interval": timedelta(seconds=6)}, "flush_interval"),
        ({"notify": "sometimes"}, "notify .* adaptive, always, off, not 'sometimes'"),
        ({"claim_batch": 0}, "claim_batch"),
        ({"flush_batch": 10_001}, "flush_batch"),
        ({"queue": ""}, "must not be empty"),
    ],
)
def test_worker_options_out_of_range_are_refused(conductor: Recorder, options: dict[str, Any], message: str) -> None:
    """The worker would stall or spin when it is run, far from the line that is wrong."""
    task = conductor.task(plain)
    with pytest.raises(InvalidOption, match=message):
        conductor.create_worker(**dict[str, Any](queue="default", tasks=[task]) | options)


def test_tasks_that_do_not_fit_a_worker_are_refused_with_the_remedy(conductor: Recorder) -> None:
    """Executions would wait for a worker that never claims them."""
    task, foreign = conductor.task(plain), Recorder().task(plain)
    with pytest.raises(InvalidTask, match=r"on queue 'default', but .* 'fast'; declare it with .*queue='fast'"):
        conductor.create_worker(queue="fast", tasks=[task])
    with pytest.raises(InvalidTask, match="given twice"):
        conductor.create_worker(queue="default", tasks=[task, task])
    with pytest.raises(InvalidTask, match="another conductor"):
        conductor.create_worker(queue="default", tasks=[foreign])
    with pytest.raises(InvalidTask, match=r"no task; decorate it"):
        conductor.create_worker(queue="default", tasks=[plain])  # type: ignore[list-item]
    with pytest.raises(InvalidTask, match="has no tasks"):
        conductor.create_worker(queue="default", tasks=[])


# --- handles ---


async def test_a_handles_timeout_is_seconds_or_a_timedelta(conductor: Recorder) -> None:
    """A timedelta would reach Trio, or a bad timeout would wait for ever."""
    task = conductor.task(plain)
    handle: Handle[Any] = await task.invoke(date(2024, 1, 1))
    assert await handle.result() is None
    assert await handle.result(timeout=0) == 0.0
    assert await handle.result(timedelta(minutes=1)) == 60.0
    for timeout in (-1, math.nan, "5"):
        with pytest.raises(InvalidOption, match="timeout"):
            await handle.result(timeout=timeout)  # type: ignore[arg-type]
    sync: SyncHandle[Any] = SyncHandle(SyncSource(), task, uuid4(), created=False)
    assert sync.result(timedelta(minutes=1)) == 60.0
    assert not sync.created


def test_public_docstrings_exist() -> None:
    """Editors would show users nothing."""
    for kind in (Tasks, Task, TaskCall, SyncTaskCall, Handle, SyncHandle, Context):
        for name, member in inspect.getmembers(kind):
            if not name.startswith("_") and callable(member):
                assert inspect.getdoc(member), f"{kind.__name__}.{name}"


def test_versions_of_a_task_belong_together() -> None:
    """A former version that gets a queue of its own, or that hides the current one in the registry."""
    tasks = Recorder()

    @tasks.task(version="3", queue="q", max_attempts=7, timeout=5)
    async def greet(name: str) -> None: ...

    @greet.former("1")
    async def greet_1(names: list[str]) -> None: ...

    @greet.former("2")
    def greet_2() -> None: ...

    assert greet.versions == (greet, greet_1, greet_2)
    assert [each.version for each in greet.versions] == ["3", "1", "2"]
    assert (greet_1.name, greet_1.queue, greet_1.max_attempts, greet_1.timeout) == ("greet", "q", 7, 5.0)
    assert list(tasks.registry) == [greet]
    assert tasks.registry.get("greet") is greet
    assert tasks.create_worker(queue="q", tasks=[greet]).tasks == (greet,)
    rows = new_executions([greet.bind("a"), greet_1.bind(["a"]), greet_2.options(tags=["x"]).bind()])
    assert [row.options for row in rows] == [
        '{"version": "3"}',
        '{"version": "1"}',
        '{"tags": ["x"], "version": "2"}',
    ]
    assert repr(greet_1) == "<Task 'greet', version '1', on queue 'q'>"
    with pytest.raises(InvalidTask, match="two handlers of version '1'"):
        greet.former("1")(lambda_like)
    with pytest.raises(InvalidTask, match="two handlers of version '3'"):
        greet.former("3")(lambda_like)
    with pytest.raises(InvalidTask, match="registered already"):
        greet.former("4")(greet_1.handler)
    with pytest.raises(InvalidTask, match="a former version itself"):
        greet_1.former("0")
    with pytest.raises(InvalidTask, match="a former version; give it the current one"):
        tasks.create_worker(queue="q", tasks=[greet_1])
    with pytest.raises(InvalidOption, match="must be a str"):
        Recorder().task(lambda_like).former(None)(other_like)  # type: ignore[arg-type]


async def lambda_like() -> None: ...


async def other_like() -> None: ...


@pytest.mark.parametrize(("version", "said"), [("", "empty"), ("a@b", "must not have an '@'"), ("x" * 65, "65 bytes")])
def test_version_outside_its_range_is_refused(version: str, said: str) -> None:
    """It would be stored, and no worker could be asked whether it has it."""
    with pytest.raises(InvalidOption, match=said):
        Recorder().task(version=version)(lambda_like)
    with pytest.raises(InvalidOption, match=said):
        Recorder().task(lambda_like).former(version)(other_like)
