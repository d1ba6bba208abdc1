"""Trying code against what executions have recorded, before it is deployed: which of them could not go on with it.

A handler is run as the engine would run it, by the same `Durable` and `History`, but with a journal that serves the
records and does nothing new: whoever asks for something that is not recorded has come as far as the execution had, and
stays there; so does who waits for what is open. When everything stands still, the run is over. Steps are not called,
nothing is written, and resources are stand-ins.

What a handler does outside of its steps is done here too, as at every replay.

Cancellation: the handler is cancelled, and waited for.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import trio

from .codec import printable
from .context import Context
from .durable import Durable, Place, Saved, locate
from .errors import InvalidPayload, InvalidTask, Misuse, NonDeterminism, leaves
from .history import in_words
from .invocations import child_row
from .model import Divergence, Record, StoredHistory, Trouble
from .tasks import Registry, Task

if TYPE_CHECKING:
    from .db.transactions import OpenTransaction

T = TypeVar("T")

PATIENCE: Final = 5.0  # seconds in which a handler has come to a standstill that is known
_NAP: Final = 0.002
_ALL: Final = 2**62  # items of a channel, more than any handler sends


class _Journal:
    """`durable.Journal` over records: everything new is refused."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self.is_at_end = False  # something was asked for that is not recorded
        self.block: str | None = None  # recorded, and not to be repeated here

    async def load(self, *, is_first: bool) -> list[Record]:
        return list(self._records)

    async def admit(self, name: str, kind: str) -> None:
        if kind == "block" and any(record.name == name for record in self._records):
            self.block = name
        self.is_at_end = True
        await trio.sleep_forever()

    async def save_step(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        return await self._refuse()

    async def save_step_inside(
        self, transaction: OpenTransaction, name: str, kind: str, position: int, value: str
    ) -> Saved | None:
        return await self._refuse()

    async def save_effect(self, name: str, position: int, effect: Mapping[str, object]) -> str | None:
        return await self._refuse()

    async def set_progress(self, value: str) -> None:
        """Nobody is told."""

    async def open_channel(self, name: str, capacity: int) -> int:
        return _ALL  # nothing is sent again

    async def append_item(self, channel: str, seq: int, value: str) -> bool:
        return await self._refuse()

    async def close_channel(self, name: str) -> None:
        """It stays as it is."""

    async def start_waits(self, waits: Sequence[Mapping[str, object]]) -> list[Record]:
        return await self._refuse()

    async def read_waits(self) -> list[Record] | None:
        return []  # nothing is resolved here

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        """They stay as they are."""

    async def _refuse(self) -> NoReturn:
        self.is_at_end = True
        await trio.sleep_forever()


class _Run:
    """One dry run; `durable.Suspender` for it."""

    is_draining = False

    def __init__(self, task: Task[..., Any], stored: StoredHistory) -> None:
        self._task = task
        self._stored = stored
        self._scope = trio.CancelScope()
        self._handler: trio.lowlevel.Task | None = None
        self.journal = _Journal(stored.records)
        self.durable = Durable(
            stored.attempt,
            self.journal,
            self,
            trio.CapacityLimiter(1),
            random.Random(),
            task.limits,
            child_row,
            task.bind_arguments,
        )
        self.is_over = False
        self.has_returned = False
        self.error: BaseException | None = None
        self.undecided: str | None = None

    @property
    def is_unwinding(self) -> bool:
        return self._scope.cancel_called

    @property
    def will_replay(self) -> bool:
        return self._scope.cancel_called

    @property
    def is_alone(self) -> bool:
        task = trio.lowlevel.current_task()
        return task is self._handler and not task.child_nurseries

    def suspend(self, awaited: Sequence[str]) -> None:
        self._scope.cancel()

    def give_way(self) -> None:
        self._scope.cancel()

    def continue_as_new(self, payload: str, version: str | None) -> None:
        self.has_returned = True
        self._scope.cancel()

    def locate(self) -> Place:
        return locate(self._scope)

    async def run_sync(self, call: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        raise Misuse("a replay check calls no steps")

    def call(self, operation: Callable[[], Awaitable[T]], /) -> T:
        """For a thread, as `context.Desk`: there is none here."""
        raise Misuse("ctx.sync is for a plain def handler")

    def lend(self, opening: Callable[[], AbstractAsyncContextManager[T]], /) -> AbstractContextManager[T]:
        """The same for a block."""
        raise Misuse("ctx.sync is for a plain def handler")

    async def run(self, kwargs: dict[str, Any], patience: float) -> None:
        """Until the handler has ended, or everything stands still."""
        # Here, for it imports pytest where that is installed: a third of the time in which a program starts.
        from trio.testing import wait_all_tasks_blocked

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._handle, kwargs)
            with trio.move_on_after(patience) as waiting:
                while not self._is_still():
                    await wait_all_tasks_blocked()
                    if not self._is_still():
                        await trio.sleep(_NAP)  # it waits for something else
            if waiting.cancelled_caught:
                self.undecided = f"it waited for more than {patience:g} s for something that is not durable"
            self._scope.cancel()

    def _is_still(self) -> bool:
        return self.is_over or self.journal.is_at_end or self.durable.is_parked

    async def _handle(self, kwargs: dict[str, Any]) -> None:
        stored = self._stored
        ctx = Context(
            stored.id, stored.attempt, task=stored.task, queue=stored.queue, resources=_Resources(self._refuse)
        )
        ctx.attach(lambda: self.durable, self)
        self._handler = trio.lowlevel.current_task()
        try:
            with self._scope:
                self._task.result.encode(await self._task.call(ctx, kwargs))
                self.has_returned = True
        except BaseException as error:  # what a user's code raises is data
            if any(isinstance(leaf, (KeyboardInterrupt, GeneratorExit, trio.Cancelled)) for leaf in leaves(error)):
                raise
            self.error = error
        finally:
            self.is_over = True

    def unasked(self) -> list[Record]:
        """What was recorded of this attempt, and the handler has not asked for."""
        if self.durable.is_loaded:
            return self.durable.unused()
        return [record for record in self._stored.records if record.attempt == self._stored.attempt]

    def _refuse(self, what: str) -> NoReturn:
        self.undecided = f"it uses the resource {what} outside of its steps"
        raise Misuse(f"a replay check has no resources: {what} was used outside of a step")


class _Resources(Mapping[type[Any], object]):
    """Has one of every kind: a stand-in."""

    def __init__(self, refuse: Callable[[str], NoReturn]) -> None:
        self._refuse = refuse

    def __getitem__(self, kind: type[Any]) -> object:
        return _stand_in(kind, kind.__qualname__, self._refuse)

    def __iter__(self) -> Iterator[type[Any]]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _stand_in(kind: type[Any], name: str, refuse: Callable[[str], NoReturn]) -> object:
    """An object that claims to be of a kind, can be handed to steps, and refuses to be used. Its methods have the
    annotations of the kind's, by which the values of steps are read.
    """

    class StandIn:
        __slots__ = ()
        __class__ = property(lambda self: kind)  # pyright: ignore[reportIncompatibleMethodOverride]  # for isinstance

        def __getattr__(self, attribute: str) -> object:
            full = f"{name}.{attribute}"
            found: object = getattr(kind, attribute, None)

            def refused(*args: object, **kwargs: object) -> NoReturn:
                refuse(full)

            if callable(found) and not isinstance(found, type):
                return functools.wraps(found)(refused)
            return _stand_in(object, full, refuse)

        def __call__(self, *args: object, **kwargs: object) -> NoReturn:
            refuse(name)

    return StandIn()


async def replayed(registry: Registry, stored: StoredHistory, patience: float = PATIENCE) -> Divergence | None:
    """Try the code of a registry against one execution; None if it would go on.

    `patience`: seconds, for a handler that waits for what is not durable.
    """

    def diverged(
        trouble: Trouble, what: str, asked: Sequence[str] = (), recorded: Sequence[str] | None = None
    ) -> Divergence:
        known = [in_words(record) for record in stored.records] if recorded is None else recorded
        return Divergence(
            stored.id, stored.queue, stored.task, stored.version, trouble, what, tuple(known), tuple(asked)
        )

    task = registry.get(stored.task)
    if task is None:
        return diverged(Trouble.TASK, f"there is no task {stored.task!r}")
    if stored.version is not None:
        by_version = {version.version: version for version in task.versions}
        if stored.version not in by_version:
            known = ", ".join(f"{version!r}" for version in by_version if version is not None) or "no versions"
            return diverged(Trouble.VERSION, f"task {stored.task!r} has no version {stored.version!r}; it has {known}")
        task = by_version[stored.version]
    try:
        kwargs = task.decode(stored.payload)
    except (InvalidPayload, InvalidTask) as error:
        return diverged(Trouble.PAYLOAD, str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # what the payload's own classes raise
        return diverged(Trouble.PAYLOAD, _described(error))
    if task.batch is not None:
        if not stored.records:
            return None
        return diverged(Trouble.UNASKED, "its handler is one of batches now, which asks for nothing that was recorded")
    if not task.is_async:
        return diverged(Trouble.UNDECIDED, "it is a plain def, whose thread could not be ended here")
    run = _Run(task, stored)
    await run.run(kwargs, patience)
    if run.journal.block is not None:
        run.undecided = f"it has the transaction {run.journal.block!r} as a block, which only a worker can repeat"
    asked = run.durable.asked()
    errors = [] if run.error is None else list(leaves(run.error))
    unasked = [in_words(record) for record in run.unasked()]
    # In this order: what the engine would say; what cannot be known; what would fail, before it has come as far as it
    # had or for what no retry mends; what is passed over. An error after all that is recorded may be an old one.
    for each in errors:
        if isinstance(each, NonDeterminism):
            return diverged(Trouble.DIVERGED, str(each), each.asked, each.recorded)
    if run.undecided is not None:
        return diverged(Trouble.UNDECIDED, run.undecided, asked)
    for each in errors:
        if unasked or isinstance(each, Misuse):
            return diverged(Trouble.FAILED, f"it raises {_described(each)}", asked)
    if unasked:
        how = "returns" if run.has_returned else "goes on"
        return diverged(Trouble.UNASKED, f"it {how} without asking for {', '.join(unasked[:10])}", asked)
    return None


def _described(error: BaseException) -> str:
    try:
        return printable(f"{type(error).__name__}: {error}")
    except Exception:  # noqa: BLE001  # it cannot be asked what it is
        return type(error).__name__
