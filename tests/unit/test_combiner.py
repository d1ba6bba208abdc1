"""How requests of executions that run beside each other share a statement, and who sends it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pgconductor.errors import Unstorable
from pgconductor.runtime.journal import Combiner

LIMIT = 10.0


class Line:
    """What was sent, and when it is answered: with twice the number, or None for numbers that are told once."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []
        self.gate = trio.Event()
        self.told: set[int] = set()

    async def double(self, numbers: list[int]) -> list[int]:
        self.sent.append(numbers)
        if 13 in numbers:
            raise Unstorable("13")
        await self.gate.wait()
        return [2 * n for n in numbers]

    async def tell_once(self, numbers: list[int]) -> list[list[int] | None]:
        """Carried out when it is sent; the answer may be lost with who sent it."""
        self.sent.append(numbers)
        news = [[] if n in self.told else [n] for n in numbers]
        self.told.update(numbers)
        await self.gate.wait()
        return list(news)


async def test_requests_that_come_meanwhile_go_together() -> None:
    """A statement per step would be the limit of a worker."""
    line = Line()
    combiner = Combiner(line.double)
    answers: dict[int, int] = {}

    async def ask(n: int) -> None:
        answers[n] = await combiner.ask(n)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for n in range(5):
                nursery.start_soon(ask, n)
                await trio.testing.wait_all_tasks_blocked()
            line.gate.set()
    assert line.sent == [[0], [1, 2, 3, 4]]
    assert answers == {n: 2 * n for n in range(5)}


@pytest.mark.parametrize("doomed", [0, 1])
async def test_others_are_sent_when_the_one_that_sends_or_is_next_is_cancelled(doomed: int) -> None:
    """They would wait until somebody else has something to send, perhaps for ever."""
    line = Line()
    combiner = Combiner(line.double)
    answers: list[int] = []
    scope = trio.CancelScope()

    async def ask(n: int) -> None:
        with scope if n == doomed else trio.CancelScope():
            answers.append(await combiner.ask(n))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(ask, n)
                await trio.testing.wait_all_tasks_blocked()
            if doomed == 0:
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                line.gate.set()
            else:
                line.gate.set()
                scope.cancel()  # in the instant at which it is its turn
    assert sorted(answers) == [2 * n for n in range(3) if n != doomed]


async def test_one_that_cannot_be_stored_fails_alone() -> None:
    """One execution's value would fail the steps of all."""
    line = Line()
    line.gate.set()
    combiner = Combiner(line.double)
    answers: list[int] = []
    refused: list[int] = []

    async def ask(n: int) -> None:
        try:
            answers.append(await combiner.ask(n))
        except Unstorable:
            refused.append(n)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for n in (12, 13, 14):
                nursery.start_soon(ask, n)
    assert (sorted(answers), refused) == ([24, 28], [13])


async def test_answer_that_is_none_is_an_answer() -> None:
    """It was asked for again and again, for nobody."""

    async def lose(numbers: list[int]) -> list[int | None]:
        sent.append(len(numbers))
        await trio.lowlevel.checkpoint()
        return [None for _ in numbers]

    sent: list[int] = []
    with trio.fail_after(LIMIT):
        assert await Combiner[int, int | None](lose).ask(1) is None
    assert sent == [1]


async def test_what_is_told_once_is_known_to_be_lost_when_its_sender_is_cancelled() -> None:
    """Asking again would tell nothing, and what had been told would be nobody's: an execution would wait for ever."""
    line = Line()
    combiner: Combiner[int, list[int] | None] = Combiner(line.tell_once, lost=lambda: None)
    answers: dict[int, list[int] | None] = {}
    scope = trio.CancelScope()

    async def ask(n: int) -> None:
        with scope if n == 1 else trio.CancelScope():
            answers[n] = await combiner.ask(n)

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(ask, n)
                await trio.testing.wait_all_tasks_blocked()
            first, line.gate = line.gate, trio.Event()
            first.set()
            await trio.testing.wait_all_tasks_blocked()
            assert line.sent == [[0], [1, 2]]
            scope.cancel()
    assert answers == {0: [0], 2: None}
