"""The stock of a worker: what is claimed and has not begun, and how batches come to be. No database, no event loop."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any
from uuid import UUID, uuid4

import pytest
import trio

from pgconductor.conductor import Conductor
from pgconductor.model import Claimed
from pgconductor.runtime.flusher import Handlers, Held
from pgconductor.runtime.pace import Prefetch
from pgconductor.runtime.stock import Lot, Stock
from pgconductor.tasks import Task, Worker


class Shelf:
    """A stock for a plain task, and for batch tasks as named: `SIZE-WAIT`."""

    def __init__(self, *names: str, max_attempts: int = 3) -> None:
        self.tasks: dict[str, Task[..., Any]] = {}
        conductor = Conductor("postgresql://nobody")
        for name in names:
            if name == "plain":
                self.tasks[name] = conductor.task(name=name)(_plain())
            else:
                size, wait = name.split("-")
                declare = conductor.batch_task(
                    name=name, size=int(size), max_wait=float(wait), max_attempts=max_attempts
                )
                self.tasks[name] = declare(_batch())
        self.handlers = Handlers(Worker(queue="default", tasks=tuple(self.tasks.values())))
        self.stock = Stock(self.handlers)

    def held(self, task: str, at: float = 0.0, *, attempt: int = 1, max_attempts: int | None = None) -> Held:
        return Held(Claimed(uuid4(), 1, task, attempt, max_attempts, "{}", 0.0), at)

    def add(self, task: str, at: float = 0.0, *, attempt: int = 1, max_attempts: int | None = None) -> Held:
        held = self.held(task, at, attempt=attempt, max_attempts=max_attempts)
        self.stock.add(held)
        return held

    def take(self) -> list[Held]:
        """As a runner does."""
        taken = self.stock.ready.popleft()
        if type(taken) is Lot:
            self.stock.note_taken(taken)
            return taken.members
        return [taken]


def _plain() -> Any:
    async def handler(n: int) -> None:
        pass

    return handler


def _batch() -> Any:
    async def handler(items: list[int]) -> None:
        pass

    return handler


def test_single_executions_come_in_order() -> None:
    """A batch task beside them changes nothing."""
    shelf = Shelf("plain", "3-0")
    first, second = shelf.add("plain"), shelf.add("plain")
    assert (shelf.stock.size, shelf.stock.apart) == (2, 0)
    assert shelf.take() == [first]
    assert shelf.take() == [second]
    assert not shelf.stock.ready


def test_batch_grows_where_it_stands_until_it_is_full() -> None:
    """It does not lose its place to what comes later."""
    shelf = Shelf("plain", "3-0")
    a = shelf.add("3-0")
    plain = shelf.add("plain")
    b, c, d = shelf.add("3-0"), shelf.add("3-0"), shelf.add("3-0")
    assert shelf.stock.size == 5
    assert [shelf.take(), shelf.take(), shelf.take()] == [[a, b, c], [plain], [d]]
    assert shelf.stock.size == 0


def test_batch_that_was_taken_grows_no_more() -> None:
    """Its handler has been called: whoever comes now would never run."""
    shelf = Shelf("3-0")
    a = shelf.add("3-0")
    assert shelf.take() == [a]
    b = shelf.add("3-0")
    assert shelf.take() == [b]


def test_batch_that_waits_is_ready_when_it_is_full() -> None:
    """Not before, and at once."""
    shelf = Shelf("2-5")
    a = shelf.add("2-5", 1.0)
    assert not shelf.stock.ready
    assert (shelf.stock.size, shelf.stock.apart, shelf.stock.next_due()) == (0, 1, 6.0)
    b = shelf.add("2-5", 2.0)
    assert (shelf.stock.size, shelf.stock.apart, shelf.stock.next_due()) == (2, 0, float("inf"))
    assert shelf.stock.ready_since() == 2.0
    assert shelf.take() == [a, b]


def test_batch_that_waits_is_ready_when_it_is_due() -> None:
    """In the order in which they are due, and it goes on growing then."""
    shelf = Shelf("3-5", "3-1")
    slow, quick = shelf.add("3-5", 1.0), shelf.add("3-1", 1.5)
    assert not shelf.stock.make_due_ready(2.4)
    assert shelf.stock.make_due_ready(6.5)
    assert (shelf.stock.size, shelf.stock.apart) == (2, 0)
    late = shelf.add("3-1", 7.0)
    assert [shelf.take(), shelf.take()] == [[quick, late], [slow]]


def test_whoever_waits_is_told_of_an_earlier_end_only() -> None:
    """A later one need not wake anybody; an earlier one must, or it waits for too long."""
    shelf = Shelf("3-5", "3-1", "3-9")
    sooner = shelf.stock.sooner
    shelf.add("3-5")
    assert sooner.is_set()
    sooner = shelf.stock.sooner
    shelf.add("3-5")
    shelf.add("3-9")
    assert not sooner.is_set()
    shelf.add("3-1")
    assert sooner.is_set()
    assert not shelf.stock.sooner.is_set()


@pytest.mark.parametrize(
    ("attempt", "max_attempts", "is_alone"),
    [(2, None, False), (3, None, True), (4, None, True), (3, 4, False), (4, 4, True), (1, 1, False), (2, 2, True)],
)
def test_last_attempt_of_several_is_a_batch_of_its_own(attempt: int, max_attempts: int | None, is_alone: bool) -> None:
    """What brings down every handler must not do so with its neighbours for good."""
    shelf = Shelf("3-5", max_attempts=3)
    neighbour = shelf.add("3-5")
    held = shelf.add("3-5", attempt=attempt, max_attempts=max_attempts)
    other = shelf.add("3-5")
    assert shelf.stock.apart == (2 if is_alone else 0)
    assert shelf.take() == ([held] if is_alone else [neighbour, held, other])


def test_what_is_put_first_is_alone() -> None:
    """It is on its last life."""
    shelf = Shelf("3-0", "plain")
    a = shelf.add("3-0")
    suspect, plain = shelf.held("3-0"), shelf.held("plain")
    suspect.suspected = plain.suspected = trio.Event()
    for each in (suspect, plain):
        shelf.stock.put_first(each, 1.0)
        assert shelf.stock.ready[0].suspected is each.suspected
    b = shelf.add("3-0")
    assert [shelf.take(), shelf.take(), shelf.take()] == [[plain], [suspect], [a, b]]


def test_what_is_ready_goes_back_and_what_waits_stays() -> None:
    """What waits for company is stuck behind nobody."""
    shelf = Shelf("plain", "3-0", "3-5")
    shelf.add("3-5")
    ready = [shelf.add("plain"), shelf.add("3-0"), shelf.add("3-0")]
    assert shelf.stock.take_ready() == ready
    assert (shelf.stock.size, shelf.stock.apart) == (0, 1)
    assert len(shelf.stock.take_all()) == 1
    assert (shelf.stock.size, shelf.stock.apart, shelf.stock.next_due()) == (0, 0, float("inf"))


def test_prefetch_is_of_whole_batches() -> None:
    """Else a runner that was busy for long would find a piece of one, and go on with pieces for ever."""
    prefetch = Prefetch(maximum=250, unit=100)
    sizes: list[int] = []
    for _ in range(4):
        prefetch.note_claim(asked=100, got=100, ran_dry=True)
        sizes.append(prefetch.size)
    prefetch.note_start(1.0)
    prefetch.note_claim(asked=100, got=100, ran_dry=True)
    sizes.append(prefetch.size)
    prefetch.note_start(1.0)
    prefetch.note_claim(asked=100, got=100, ran_dry=True)
    assert [*sizes, prefetch.size] == [100, 200, 200, 200, 100, 0]


def test_worker_asks_for_what_its_handlers_take() -> None:
    """A plain task among them may need a runner for each."""
    assert Shelf("5-0", "3-1").handlers.per_runner == 3
    assert Shelf("5-0", "plain").handlers.per_runner == 1
    assert Shelf("5-0", "plain").handlers.has_batches
    assert not Shelf("plain").handlers.has_batches


class Naive:
    """The same by lists of lists, and by looking at everything each time: what is ready, and what is apart."""

    def __init__(self) -> None:
        self.ready: list[tuple[str, bool, list[Held]]] = []  # task, whether it grows, members
        self.apart: dict[str, list[Held]] = {}
        self.first_at: dict[str, float] = {}  # when the first of what is apart came

    def _task(self, name: str) -> tuple[int, float]:
        size, wait = name.split("-")
        return int(size), float(wait)

    def add(self, held: Held) -> None:
        name = held.claimed.task
        if name == "plain":
            self.ready.append((name, False, [held]))
            return
        size, wait = self._task(name)
        if held.claimed.attempt == 3:
            self.ready.append((name, False, [held]))
            return
        for place, (other, grows, members) in enumerate(self.ready):
            if other == name and grows:
                members.append(held)
                self.ready[place] = (name, len(members) < size, members)
                return
        members = self.apart.pop(name, [])
        members.append(held)
        if wait and len(members) < size:
            self.apart[name] = members
        else:
            self.ready.append((name, len(members) < size, members))

    def due(self, now: float) -> None:
        for name in sorted(self.apart, key=self.due_at):
            if self.due_at(name) <= now:
                self.ready.append((name, True, self.apart.pop(name)))

    def due_at(self, name: str) -> float:
        return self.first_at[name] + self._task(name)[1]

    def count(self) -> int:
        return sum(len(members) for _, _, members in self.ready) + sum(map(len, self.apart.values()))

    def remove(self, gone: Iterable[UUID]) -> None:
        ids = set(gone)
        self.ready = [
            (name, grows, kept)
            for name, grows, members in self.ready
            if (kept := [held for held in members if held.claimed.id not in ids])
        ]
        self.apart = {
            name: kept
            for name, members in self.apart.items()
            if (kept := [held for held in members if held.claimed.id not in ids])
        }


@pytest.mark.parametrize("seed", range(40))
def test_random_stock_is_what_a_naive_one_is(seed: int) -> None:
    """Counts and order after whatever was added, taken, cancelled, given back or has become due."""
    rng = random.Random(seed)
    shelf = Shelf("plain", "1-0", "3-0", "4-2", "2-1", "5-3")
    stock, naive = shelf.stock, Naive()
    ready = stock.ready
    now = 0.0
    for _ in range(400):
        now += rng.random() / 2
        match rng.choice(["add"] * 6 + ["take"] * 3 + ["due", "cancel", "first", "back", "all"]):
            case "add":
                name = rng.choice(list(shelf.tasks))
                held = shelf.add(name, now, attempt=rng.choice([1, 1, 1, 1, 3]))
                if name not in naive.apart:
                    naive.first_at[name] = now
                naive.add(held)
            case "take" if stock.ready:
                assert shelf.take() == naive.ready.pop(0)[2]
            case "due":
                stock.make_due_ready(now)
                naive.due(now)
            case "cancel":
                gone = {held.claimed.id for held in stock if rng.random() < 0.3}
                taken = stock.take_out(lambda held, gone=gone: held.claimed.id in gone)  # type: ignore[misc]
                assert {held.claimed.id for held in taken} == gone
                naive.remove(gone)
            case "back" if rng.random() < 0.3:
                assert stock.take_ready() == [held for _, _, members in naive.ready for held in members]
                naive.ready.clear()
            case "all" if rng.random() < 0.1:
                assert len(stock.take_all()) == naive.count()
                naive.ready.clear()
                naive.apart.clear()
            case _:
                pass
        assert stock.ready is ready
        shown = [entry.members if type(entry) is Lot else [entry] for entry in stock.ready]
        assert shown == [members for _, _, members in naive.ready]
        assert stock.size == sum(map(len, shown))
        assert stock.apart == sum(map(len, naive.apart.values()))
        assert stock.next_due() == min((naive.due_at(name) for name in naive.apart), default=float("inf"))
        assert len(list(stock)) == stock.size + stock.apart
