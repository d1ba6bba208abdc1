"""The durable operations of a plain ``def`` handler: those of `Context`, blocking the handler's thread.

Each runs in Trio, as a task of the attempt's; what it is given to call (a step's function, a transaction's) runs in the
handler's own thread. When the execution is given up to wait, or asked to end, the operation raises `Unwinding`, a
`BaseException`, which unwinds the thread as `trio.Cancelled` unwinds an async handler.

Only the thread that runs the handler may use it. It owns nothing: a `Desk` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, TypeVarTuple, overload
from uuid import UUID

from .durable import TriesLike, inside_step, is_async, require_outside_steps
from .errors import DurableMisuse
from .transactions import checked_terms, open_block, run_transaction

if TYPE_CHECKING:
    import psycopg
    from psycopg.rows import TupleRow

    from .channels import Channel
    from .context import Context
    from .events import Promise
    from .model import Isolation
    from .tasks import Invocable

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
Ts = TypeVarTuple("Ts")


class SyncContext:
    """What `Context.sync` gives. Every method blocks, and raises what that of `Context` does, and `Unwinding`.

    A nursery is Trio's, and a handler that continues as new is cancelled: these need an async handler.
    """

    __slots__ = ("_context",)

    def __init__(self, context: Context) -> None:
        self._context = context

    def __repr__(self) -> str:
        return f"<SyncContext of {self._context!r}>"

    def _call(self, operation: Callable[[], Any]) -> Any:
        require_outside_steps("an operation of ctx.sync")
        return self._context.desk.call(operation)

    @contextmanager
    def _block(
        self, name: str, opening: Callable[[], AbstractAsyncContextManager[psycopg.Connection[TupleRow]]]
    ) -> Generator[psycopg.Connection[TupleRow]]:
        require_outside_steps(f"ctx.sync.transaction({name!r})")
        with self._context.desk.lend(opening) as conn, inside_step(name):
            yield conn

    def step(
        self, name: str, fn: Callable[[*Ts], T], /, *args: *Ts,
        retry: TriesLike = None, timeout: float | timedelta | None = None,
    ) -> T:  # fmt: skip
        """As `Context.step`, with a plain function, which runs in this thread; `timeout` does not interrupt it."""
        _require_plain(f"ctx.sync.step({name!r})", fn)
        call: Any = partial(self._context.step, name, fn, *args, retry=retry, timeout=timeout)
        result: T = self._call(call)
        return result

    def sleep(self, name: str, duration: float | timedelta) -> None:
        """As `Context.sleep`."""
        self._call(partial(self._context.sleep, name, duration))

    def sleep_until(self, name: str, at: datetime) -> None:
        """As `Context.sleep_until`."""
        self._call(partial(self._context.sleep_until, name, at))

    def invoke(self, name: str, task: Invocable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As `Context.invoke`."""
        result: R = self._call(partial(self._context.invoke, name, task, *args, **kwargs))
        return result

    def invoke_abandoned(self, name: str, task: Invocable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """As `Context.invoke_abandoned`."""
        result: R = self._call(partial(self._context.invoke_abandoned, name, task, *args, **kwargs))
        return result

    @overload
    def transaction(
        self, name: str, fn: Callable[[psycopg.Connection[TupleRow], *Ts], T], /, *args: *Ts,
        retry: TriesLike = None, timeout: float | timedelta | None = None, isolation: Isolation = "read committed",
    ) -> T: ...  # fmt: skip
    @overload
    def transaction(
        self, name: str, /, *, timeout: float | timedelta | None = None, isolation: Isolation = "read committed"
    ) -> AbstractContextManager[psycopg.Connection[TupleRow]]: ...
    def transaction(
        self, name: str, fn: Callable[..., Any] | None = None, /, *args: object,
        retry: TriesLike = None, timeout: float | timedelta | None = None, isolation: Isolation = "read committed",
    ) -> Any:  # fmt: skip
        """As `Context.transaction`, with a plain function and a `psycopg.Connection`; ``with`` is the block form.

        The connections are the orchestrator's own, as many as the conductor's `pool_size` at once.
        """
        context = self._context
        what = f"ctx.sync.transaction({name!r})"
        seconds, level = checked_terms(what, timeout, isolation, retry, is_block=fn is None)
        if fn is None:
            return self._block(name, lambda: open_block(context.durable, name, seconds, level))
        function = fn
        _require_plain(what, function)
        return self._call(lambda: run_transaction(context.durable, name, function, args, retry, seconds, level))

    @overload
    def wait_for_event(
        self, name: str, event: str | None = None, /, *,
        match: Mapping[str, object] | None = None, timeout: float | timedelta | None = None, type: type[T],
    ) -> T: ...  # fmt: skip
    @overload
    def wait_for_event(
        self, name: str, event: str | None = None, /, *,
        match: Mapping[str, object] | None = None, timeout: float | timedelta | None = None, type: Any = Any,
    ) -> Any: ...  # fmt: skip
    def wait_for_event(
        self, name: str, event: str | None = None, /, *,
        match: Mapping[str, object] | None = None, timeout: float | timedelta | None = None, type: Any = Any,
    ) -> Any:  # fmt: skip
        """As `Context.wait_for_event`."""
        return self._call(partial(self._context.wait_for_event, name, event, match=match, timeout=timeout, type=type))

    @overload
    def receive(
        self, name: str, channel: str | None = None, /, *, timeout: float | timedelta | None = None, type: type[T]
    ) -> T: ...
    @overload
    def receive(
        self, name: str, channel: str | None = None, /, *, timeout: float | timedelta | None = None, type: Any = Any
    ) -> Any: ...
    def receive(
        self, name: str, channel: str | None = None, /, *, timeout: float | timedelta | None = None, type: Any = Any
    ) -> Any:
        """As `Context.receive`."""
        return self._call(partial(self._context.receive, name, channel, timeout=timeout, type=type))

    def promise(self, name: str) -> SyncPromise:
        """As `Context.promise`; its `result` blocks."""
        promise: Promise = self._call(partial(self._context.promise, name))
        return SyncPromise(self._call, promise)

    def emit(
        self, name: str, event: str | None = None, payload: object = None, /, *,
        retention: float | timedelta | None = None,
    ) -> None:  # fmt: skip
        """As `Context.emit`."""
        self._call(partial(self._context.emit, name, event, payload, retention=retention))

    def send(self, name: str, execution_id: UUID, channel: str | None = None, payload: object = None, /) -> bool:
        """As `Context.send`."""
        is_there: bool = self._call(partial(self._context.send, name, execution_id, channel, payload))
        return is_there

    def open_channel(self, name: str, *, capacity: int = 100) -> SyncChannel:
        """As `Context.open_channel`; its `send` and `close` block, and ``with`` closes it."""
        channel: Channel = self._call(partial(self._context.open_channel, name, capacity=capacity))
        return SyncChannel(self._call, channel)

    def set_progress(self, value: object) -> None:
        """As `Context.set_progress`; in a step too."""
        self._context.desk.call(partial(self._context.set_progress, value))

    def checkpoint(self) -> None:
        """As `Context.checkpoint`."""
        self._call(self._context.checkpoint)

    def patched(self, change: str) -> bool:
        """As `Context.patched`."""
        is_in_force: bool = self._call(partial(self._context.patched, change))
        return is_in_force

    def now(self, *, name: str | None = None) -> datetime:
        """As `Context.now`."""
        result: datetime = self._call(partial(self._context.now, name=name))
        return result

    def uuid(self, *, name: str | None = None) -> UUID:
        """As `Context.uuid`."""
        result: UUID = self._call(partial(self._context.uuid, name=name))
        return result

    def random(self, *, name: str | None = None) -> float:
        """As `Context.random`."""
        result: float = self._call(partial(self._context.random, name=name))
        return result


class SyncPromise:
    """A promise, for a plain ``def`` handler. `id`, `name`: as of `Promise`."""

    __slots__ = ("_call", "_promise")

    def __init__(self, call: Callable[[Callable[[], Any]], Any], promise: Promise) -> None:
        self._call = call
        self._promise = promise

    def __repr__(self) -> str:
        return f"<SyncPromise {self.name!r}, {self.id}>"

    @property
    def id(self) -> UUID:
        """Give it away; whoever has it may resolve or reject."""
        return self._promise.id

    @property
    def name(self) -> str:
        """As given."""
        return self._promise.name

    @overload
    def result(self, *, timeout: float | timedelta | None = None, type: type[T], name: str | None = None) -> T: ...
    @overload
    def result(self, *, timeout: float | timedelta | None = None, type: Any = Any, name: str | None = None) -> Any: ...
    def result(self, *, timeout: float | timedelta | None = None, type: Any = Any, name: str | None = None) -> Any:
        """As `Promise.result`."""
        return self._call(partial(self._promise.result, timeout=timeout, type=type, name=name))


class SyncChannel:
    """A channel, for a plain ``def`` handler. `name`: as of `Channel`.

    As a context manager it is closed when the block is left, unless the engine is interrupting the handler.
    """

    __slots__ = ("_call", "_channel")

    def __init__(self, call: Callable[[Callable[[], Any]], Any], channel: Channel) -> None:
        self._call = call
        self._channel = channel

    def __repr__(self) -> str:
        return f"<SyncChannel {self.name!r}>"

    @property
    def name(self) -> str:
        """By which it is read."""
        return self._channel.name

    def send(self, value: object) -> None:
        """As `Channel.send`."""
        self._call(partial(self._channel.send, value))

    def close(self) -> None:
        """As `Channel.aclose`."""
        self._call(self._channel.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()  # which an interrupted handler may not: that ends by `Unwinding` once more


def _require_plain(what: str, fn: Callable[..., object]) -> None:
    if is_async(fn):
        raise DurableMisuse(f"{what} needs a plain def: it runs in the thread of the handler")
