"""Where the thread of a plain ``def`` handler has its durable operations done, which are Trio's.

The thread hands in an operation and waits at its counter (a queue): for the answer, or for a function that the
operation wants to have called in this thread, such as a step's. An operation is a task in the attempt's nursery, in a
scope of its own, which is cancelled when the handler is to end; then the answer is `Unwinding`.

Invariants: every operation that was handed in is answered, whatever ends it; at most one is handed in at a time. A
function that has begun in the thread is waited for, also by a cancelled operation, unless the thread is left behind.

Called from the handler's thread: `call`, `lend`. All the rest from Trio's.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import trio

from ..errors import DurableMisuse, Unwinding

T = TypeVar("T")


class Handler(Protocol):
    """The handler, as the desk sees it."""

    was_told: bool

    def note_task(self) -> None:
        """The current task is the one that does what the handler asks."""
        ...

    @property
    def is_unwinding(self) -> bool:
        """Whether it is to end."""
        ...


class _Answer:
    """What an operation returned or raised."""

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self._value = value
        self._error = error

    def unwrap(self) -> Any:
        error, self._error = self._error, None
        if error is None:
            return self._value
        try:
            raise error
        finally:
            del error  # it holds this frame


class _Errand(Generic[T]):
    """A function to be called in the thread, for an operation that waits for it."""

    def __init__(self, call: Callable[[], T], token: trio.lowlevel.TrioToken) -> None:
        self._call = call
        self._token = token
        self.is_over = trio.Event()
        self.answer: _Answer | None = None

    def run(self) -> None:
        """In the thread."""
        try:
            answer = _Answer(self._call())
        except BaseException as error:  # noqa: BLE001  # for whoever waits
            answer = _Answer(error=error)
        self.settle(answer)

    def settle(self, answer: _Answer) -> None:
        """In the thread: tell whoever waits."""
        self.answer = answer
        try:
            self._token.run_sync_soon(self.is_over.set)
        except trio.RunFinishedError:
            raise Unwinding from None


class _Lent:
    """A value that a block in the thread uses; `errand`: to be settled when the block has been left."""

    def __init__(self, value: Any, errand: _Errand[None]) -> None:
        self.value = value
        self.errand = errand


_Counter: TypeAlias = "queue.SimpleQueue[_Answer | _Errand[Any] | _Lent]"

_counter: contextvars.ContextVar[_Counter] = contextvars.ContextVar("pgconductor_counter")


def _nothing() -> None:
    """What an errand calls that is settled otherwise."""


class ThreadDesk:
    """See the module's description. `thread`: the handler's, once it runs."""

    def __init__(self, handler: Handler, nursery: trio.Nursery) -> None:
        self._handler = handler
        self._nursery: trio.Nursery | None = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._scopes: dict[trio.CancelScope, None] = {}  # of the operations
        self._waiting: dict[trio.CancelScope, None] = {}  # shields of operations that wait for the thread
        self.thread: int | None = None

    # In the handler's thread

    def call(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Have an operation done; see `Interruption.call`."""
        counter = self._hand_in(operation)
        while True:
            answer = counter.get()
            if isinstance(answer, _Answer):
                value: T = answer.unwrap()
                return value
            assert isinstance(answer, _Errand)
            answer.run()

    @contextmanager
    def lend(self, opening: Callable[[], AbstractAsyncContextManager[T]]) -> Generator[T]:
        """See `Interruption.lend`."""

        async def operation() -> None:
            async with opening() as value:
                await self._lend(value)

        counter = self._hand_in(operation)
        lent = counter.get()
        if isinstance(lent, _Answer):
            lent.unwrap()
            raise AssertionError("unreachable: a block that was not entered raises")
        assert isinstance(lent, _Lent)
        try:
            yield lent.value
        except BaseException as error:  # noqa: BLE001  # raised again by the block's own exit, in Trio
            lent.errand.settle(_Answer(error=error))
        else:
            lent.errand.settle(_Answer())
        answer = counter.get()
        assert isinstance(answer, _Answer)
        answer.unwrap()

    def _hand_in(self, operation: Callable[[], Awaitable[Any]]) -> _Counter:
        if threading.get_ident() != self.thread:
            raise DurableMisuse("ctx.sync is for the thread that runs the handler, and for no other")
        counter: _Counter = queue.SimpleQueue()
        try:
            self._token.run_sync_soon(self._begin, operation, counter)
        except trio.RunFinishedError:
            raise Unwinding from None
        return counter

    # In Trio's thread

    def _begin(self, operation: Callable[[], Awaitable[Any]], counter: _Counter) -> None:
        if self._nursery is None:
            counter.put(_Answer(error=Unwinding()))
        else:
            self._nursery.start_soon(self._serve, operation, counter)

    async def _serve(self, operation: Callable[[], Awaitable[Any]], counter: _Counter) -> None:
        answer: _Answer | None = None
        self._handler.note_task()
        _counter.set(counter)
        scope = trio.CancelScope()
        self._scopes[scope] = None
        try:
            with scope:
                if self._handler.is_unwinding:
                    scope.cancel()
                try:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    answer = _Answer(await operation())
                except trio.Cancelled:
                    raise
                except BaseException as error:  # noqa: BLE001  # for the thread
                    answer = _Answer(error=error)
        finally:
            del self._scopes[scope]
            if answer is None:
                self._handler.was_told = True
                answer = _Answer(error=Unwinding())
            counter.put(answer)

    async def run(self, call: Callable[[], T]) -> T:
        """Have a function called in the thread, for the operation that asks. Waits for its end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        errand = _Errand(call, self._token)
        _counter.get().put(errand)
        await self._until_over(errand)
        assert errand.answer is not None
        value: T = errand.answer.unwrap()
        return value

    async def _lend(self, value: object) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        errand = _Errand(_nothing, self._token)
        _counter.get().put(_Lent(value, errand))
        await self._until_over(errand)
        assert errand.answer is not None
        errand.answer.unwrap()

    async def _until_over(self, errand: _Errand[Any]) -> None:
        with trio.CancelScope(shield=True) as scope:
            self._waiting[scope] = None
            try:
                if self._nursery is None:
                    scope.cancel()
                await errand.is_over.wait()
            finally:
                del self._waiting[scope]
        if not errand.is_over.is_set():
            await trio.sleep_forever()  # the thread was left behind: the attempt's scope ends us

    def cancel(self) -> None:
        """The handler is to end: its operations are cancelled."""
        for scope in self._scopes:
            scope.cancel()

    def leave_thread(self) -> None:
        """The thread is not waited for any more."""
        for scope in [*self._waiting, *self._scopes]:
            scope.cancel()

    def close(self) -> None:
        """The thread has ended, or is left behind: nothing more is begun."""
        self._nursery = None
        self.leave_thread()
