"""What a worker has claimed and has not begun: single executions, and lots, which are batches in the making.

`ready` is what a runner may take from now, in order: executions of plain tasks, and lots. A runner pops it directly,
since that is done for each execution, and calls `note_taken` for a lot. All else goes through the methods, which see
executions, wherever they are.

A task has at most one lot that grows. With no `max_wait` it is ready at once, and grows until it is taken or full. Else
it is kept apart until it is full or due, and grows on when it is ready. An execution on its last attempt of several is
a lot of its own, so that one that brings down every handler fails no neighbour for good; so is one on its last life.

Invariants: each execution is in one place; no lot is empty, or larger than its task's `size`. `ready` is one object for
as long as the stock is there.

No I/O, and nothing waits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, final

import trio

from ..model import Claimed
from ..tasks import Task
from .flusher import Handlers, Held


@final
class Lot:
    """A batch in the making. `received_at`: when its first member came, `ready_at`: when it might be taken, both by
    Trio's clock; None: not yet.
    """

    __slots__ = ("members", "ready_at", "received_at", "task")

    def __init__(self, task: Task[..., Any], first: Held) -> None:
        self.task = task
        self.members = [first]
        self.received_at = first.received_at
        self.ready_at: float | None = None

    def __repr__(self) -> str:
        return f"<Lot of {len(self.members)} of task {self.task.name!r}>"

    @property
    def suspected(self) -> trio.Event | None:
        """As `Held.suspected`: one on its last life is alone."""
        return self.members[0].suspected


class Stock:
    """See the module's description. Made by a pipeline."""

    def __init__(self, handlers: Handlers) -> None:
        self.ready: deque[Held | Lot] = deque()
        self.has_lots = handlers.has_batches
        self._handlers = handlers
        self._growing: dict[Task[..., Any], Lot] = {}
        self.surplus = 0  # executions in lots that are ready, beyond one for each
        self.apart = 0  # executions in lots that are not ready
        self.sooner = trio.Event()  # something is due earlier than all that was apart before

    def __repr__(self) -> str:
        return f"<Stock of {self.size} executions and {self.apart} apart>"

    @property
    def size(self) -> int:
        """Executions that are ready."""
        return len(self.ready) + self.surplus

    def __iter__(self) -> Iterator[Held]:
        """All executions, those that are ready first, in order."""
        for entry in self.ready:
            if type(entry) is Lot:
                yield from entry.members
            else:
                yield entry
        for lot in self._growing.values():
            if lot.ready_at is None:
                yield from lot.members

    def ready_since(self) -> float:
        """Since when the next that is ready could have been taken; there is one."""
        first = self.ready[0]
        if type(first) is Lot:
            assert first.ready_at is not None
            return first.ready_at
        return first.received_at

    def add(self, held: Held) -> None:
        """It has just been claimed."""
        task = self._handlers.of(held.claimed)
        batch = task.batch
        if batch is None:
            self.ready.append(held)
            return
        if _is_last_attempt(task, held.claimed):
            self._make_ready(Lot(task, held), held.received_at)
            return
        lot = self._growing.get(task)
        if lot is None:
            former_due = self.next_due()
            lot = self._growing[task] = Lot(task, held)
            if batch.max_wait <= 0:
                self._make_ready(lot, held.received_at)
            else:
                self.apart += 1
                if _due_at(lot) < former_due:
                    self.sooner.set()
                    self.sooner = trio.Event()
        else:
            lot.members.append(held)
            if lot.ready_at is None:
                self.apart += 1
            else:
                self.surplus += 1
        if len(lot.members) >= batch.size:
            del self._growing[task]
            if lot.ready_at is None:
                self.apart -= len(lot.members)
                self._make_ready(lot, held.received_at)

    def put_first(self, held: Held, now: float) -> None:
        """It is to begin before all others, alone."""
        task = self._handlers.of(held.claimed)
        if task.batch is None:
            self.ready.appendleft(held)
            return
        lot = Lot(task, held)
        lot.ready_at = now
        self.ready.appendleft(lot)

    def note_taken(self, lot: Lot) -> None:
        """A runner has popped it from `ready`: it grows no more."""
        self.surplus -= len(lot.members) - 1
        if self._growing.get(lot.task) is lot:
            del self._growing[lot.task]

    def next_due(self) -> float:
        """When a lot that is apart has waited long enough, by Trio's clock; infinite if there is none."""
        return min((_due_at(lot) for lot in self._growing.values() if lot.ready_at is None), default=math.inf)

    def make_due_ready(self, now: float) -> bool:
        """Whether lots have waited long enough; they are ready from now, in the order in which they were due."""
        due = [lot for lot in self._growing.values() if lot.ready_at is None and _due_at(lot) <= now]
        for lot in sorted(due, key=_due_at):
            self.apart -= len(lot.members)
            self._make_ready(lot, now)
        return bool(due)

    def take_out(self, is_wanted: Callable[[Held], bool]) -> list[Held]:
        """Remove those executions, and return them in the order of `__iter__`."""
        taken = [held for held in self if is_wanted(held)]
        if taken:
            self._remove(set(map(id, taken)))
        return taken

    def take_ready(self) -> list[Held]:
        """Remove all that is ready, and return it in order."""
        apart = [lot for lot in self._growing.values() if lot.ready_at is None]
        taken = list(self)[: self.size]
        self.ready.clear()
        self.surplus = 0
        self._growing = {lot.task: lot for lot in apart}
        return taken

    def take_all(self) -> list[Held]:
        """Remove everything, and return it in the order of `__iter__`."""
        taken = list(self)
        self.ready.clear()
        self._growing.clear()
        self.surplus = self.apart = 0
        return taken

    def _make_ready(self, lot: Lot, now: float) -> None:
        lot.ready_at = now
        self.surplus += len(lot.members) - 1
        self.ready.append(lot)

    def _remove(self, gone: set[int]) -> None:
        """Executions by identity; a lot of which nothing is left goes with them."""
        kept: list[Held | Lot] = []
        self.surplus = 0
        for entry in self.ready:
            if type(entry) is Lot:
                entry.members = [held for held in entry.members if id(held) not in gone]
                if not entry.members:
                    continue
                self.surplus += len(entry.members) - 1
                kept.append(entry)
            elif id(entry) not in gone:
                kept.append(entry)
        self.ready.clear()
        self.ready.extend(kept)
        self.apart = 0
        for task, lot in list(self._growing.items()):
            if lot.ready_at is None:
                lot.members = [held for held in lot.members if id(held) not in gone]
                self.apart += len(lot.members)
            if not lot.members:
                del self._growing[task]


def _due_at(lot: Lot) -> float:
    assert lot.task.batch is not None
    return lot.received_at + lot.task.batch.max_wait


def _is_last_attempt(task: Task[..., Any], claimed: Claimed) -> bool:
    """Whether there is no attempt after this one, of several."""
    return claimed.attempt >= (claimed.max_attempts or task.max_attempts) > 1
