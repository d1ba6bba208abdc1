"""What an incarnation believes about itself: for how long, whatever the clocks do, and while its id is being replaced.

No database: the link is a stand-in whose replies the test gives, and the boot clock is moved by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pgconductor.db.call import Call, ignore
from pgconductor.db.link import Link
from pgconductor.errors import LeaseLost, Unavailable
from pgconductor.runtime.lease import Lease, boot_clock, heartbeat_interval, trusted, trusted_without_session

OLD = UUID(int=1)


class HandClock:
    """A boot clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class StandIn:
    """A link: what it is asked waits until the test answers, or until it is dropped."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.answer: Callable[[Any], object] | None = None
        self._change = trio.Event()

    async def attempt(self, call: Call[Any]) -> Any:
        self.asked.append(call.params)
        await trio.lowlevel.checkpoint()
        while self.answer is None:
            await self._change.wait()
        return self.answer(call.params)

    def reply(self, answer: Callable[[Any], object]) -> None:
        self.answer = answer
        self._change.set()

    def drop(self) -> None:
        def fail(params: Any) -> object:
            raise Unavailable("dropped")

        self.reply(fail)


def call(*params: object) -> Call[Any]:
    return Call(b"", params, ignore)


def as_link(stand_in: StandIn) -> Link:
    return cast(Link, stand_in)


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def test_boot_clock_never_stands_still_or_goes_back() -> None:
    """It is what the trust is measured by."""
    first = boot_clock()
    assert boot_clock() >= first


@pytest.mark.parametrize("seconds", [1.0, 2.0, 6.0, 10.0, 60.0, 3600.0])
def test_trust_ends_before_others_may_take_over(seconds: float) -> None:
    """At the lease's end, or at half of it without a session; and a heartbeat that is late once does not end it."""
    assert heartbeat_interval(seconds) < trusted(seconds) < seconds
    assert heartbeat_interval(seconds) < trusted_without_session(seconds) < seconds / 2


async def test_suspended_machine_finds_its_lease_over_though_trio_slept_no_longer(clock: HandClock) -> None:
    """Trio's clock stops with the machine: only the boot clock knows how long it was away."""
    lease = Lease(OLD, 10.0, clock(), clock)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lease.watch)
            await wait_all_tasks_blocked()
            clock.now += trusted(10.0) - 0.1
            assert lease.is_held()
            clock.now += 0.2
    assert lease.is_lost
    assert lease.scope.cancel_called


async def test_lease_that_is_over_sends_nothing(clock: HandClock) -> None:
    """Before the watch has woken: a claim or a flush looks at the clock itself."""
    lease, link = Lease(OLD, 10.0, clock(), clock), StandIn()
    clock.now += trusted(10.0) + 0.1
    with pytest.raises(LeaseLost):
        await lease.attempt(as_link(link), call)
    assert link.asked == []
    assert lease.scope.cancel_called


async def test_late_reply_of_a_renewal_counts_from_when_it_was_sent(clock: HandClock) -> None:
    """Others count from when the database got it, which may be long before the reply came."""
    lease = Lease(OLD, 10.0, clock(), clock)
    sent_at = clock.now = clock.now + 2.0
    clock.now += 5.0
    lease.renewed(sent_at)
    clock.now = sent_at + trusted(10.0) - 0.1
    assert lease.is_held()
    clock.now = sent_at + trusted(10.0) + 0.1
    assert not lease.is_held()
    lease.renewed(clock.now)
    assert not lease.is_held(), "what is lost stays lost"


async def test_trust_is_short_while_the_session_lock_may_be_gone(clock: HandClock) -> None:
    """Others may take over at half the lease then; the heartbeat is wanted at once."""
    lease = Lease(OLD, 10.0, clock(), clock)
    lease.note_session(is_safe=False)
    assert lease.doubt.is_set()
    clock.now += trusted_without_session(10.0) - 0.1
    assert lease.is_held()
    lease.note_session(is_safe=True)
    clock.now += 1.0
    assert lease.is_held()
    lease.note_session(is_safe=False)
    assert not lease.is_held()


async def test_shielded_call_does_not_outlive_the_lease(clock: HandClock) -> None:
    """A claim whose reply never comes would hold up the next incarnation for as long as it may take."""
    lease, link = Lease(OLD, 10.0, clock(), clock), StandIn()
    with trio.fail_after(5), lease.scope:
        async with trio.open_nursery() as nursery:

            async def claim() -> None:
                with pytest.raises(Unavailable):
                    await lease.attempt(as_link(link), call, timeout=3600.0, shield=True)

            nursery.start_soon(claim)
            await wait_all_tasks_blocked()
            lease.lose("test")
    assert lease.scope.cancelled_caught or lease.scope.cancel_called


# Succession


def hand_over(link: StandIn, lease: Lease, *, held: list[tuple[UUID, int]] | None = None) -> Any:
    told: list[tuple[UUID, frozenset[UUID]]] = []

    async def succeed() -> tuple[bool, list[tuple[UUID, frozenset[UUID]]]]:
        accepted = await lease.succeed(
            as_link(link),
            lambda old, new, claims: call(old, new, list(claims)),
            lambda: held or [],
            lambda former, handed_over: told.append((former, handed_over)),
            pause=lambda failures: 0.0,
        )
        return accepted, told

    return succeed


async def test_call_waits_for_the_new_id_while_it_is_replaced(clock: HandClock) -> None:
    """Sent under the old one it would be refused, or its answer would come after the hand-over was sorted."""
    lease, control, flush = Lease(OLD, 10.0, clock(), clock), StandIn(), StandIn()
    flush.reply(lambda params: "written")
    control.answer = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hand_over(control, lease))
        await wait_all_tasks_blocked()
        answers: list[str] = []

        async def send() -> None:
            answers.append(await lease.attempt(as_link(flush), call))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        assert flush.asked == []
        control.reply(lambda params: frozenset[UUID]())
    assert answers == ["written"]
    assert flush.asked == [(lease.owner,)]
    assert lease.owner != OLD


async def test_hand_over_waits_for_the_replies_of_calls_in_flight(clock: HandClock) -> None:
    """What a claim brought must be in the list of what is handed over."""
    lease, control, claim = Lease(OLD, 10.0, clock(), clock), StandIn(), StandIn()
    control.reply(lambda params: frozenset[UUID]())
    held: list[tuple[UUID, int]] = []
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await lease.attempt(as_link(claim), call)
            held.append((UUID(int=7), 1))

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        nursery.start_soon(hand_over(control, lease, held=held))
        await wait_all_tasks_blocked()
        assert control.asked == []
        claim.reply(lambda params: None)
    ((old, new, claims),) = control.asked
    assert (old, new, claims) == (OLD, lease.owner, [(UUID(int=7), 1)])


async def test_hand_over_gives_up_on_a_reply_that_does_not_come(clock: HandClock, autojump_clock: object) -> None:
    """A connection to a primary that is gone may hang for long; the lease does not wait."""
    lease, control, flush = Lease(OLD, 10.0, clock(), clock), StandIn(), StandIn()
    control.reply(lambda params: frozenset[UUID]())
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(Unavailable):
                await lease.attempt(as_link(flush), call)

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        begun = trio.current_time()
        accepted, told = await hand_over(control, lease)()
    assert accepted
    assert told == [(OLD, frozenset())]
    assert trio.current_time() - begun < 5.0


async def test_hand_over_whose_reply_was_lost_goes_on_from_the_id_it_made(clock: HandClock) -> None:
    """The database may know us by either id; the claims must come along from whichever it is."""
    lease, control = Lease(OLD, 10.0, clock(), clock), StandIn()
    known = {OLD}
    replies = iter(["lost", "heard"])

    def database(params: Any) -> frozenset[UUID]:
        old, new, _ = params
        if old not in known:
            raise LeaseLost("not registered")
        known.remove(old)
        known.add(new)
        if next(replies) == "lost":
            raise Unavailable("cut")
        return frozenset({UUID(int=7)})

    control.reply(database)
    accepted, told = await hand_over(control, lease)()
    assert accepted
    assert known == {lease.owner}
    assert told == [(OLD, frozenset({UUID(int=7)}))]


async def test_refused_hand_over_leaves_the_incarnation_dead(clock: HandClock) -> None:
    """Others have taken over: there is nothing to save."""
    lease, control = Lease(OLD, 10.0, clock(), clock), StandIn()

    def refuse(params: Any) -> object:
        raise LeaseLost("its lease has ended")

    control.reply(refuse)
    accepted, told = await hand_over(control, lease)()
    assert not accepted
    assert told == []
    assert lease.owner == OLD


async def test_lease_that_ends_during_the_hand_over_lets_waiting_calls_go(clock: HandClock) -> None:
    """They find it lost, instead of waiting for an id that nobody makes any more."""
    lease, control, flush = Lease(OLD, 10.0, clock(), clock), StandIn(), StandIn()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def live() -> None:
                with lease.scope:
                    await hand_over(control, lease)()

            async def send() -> None:
                with pytest.raises(LeaseLost):
                    await lease.attempt(as_link(flush), call)

            nursery.start_soon(live)
            await wait_all_tasks_blocked()
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            lease.lose("test")
    assert flush.asked == []


async def test_doubt_is_answered_for_all_who_have_it(clock: HandClock) -> None:
    """Several claim loops may be refused at once; none may wait for ever."""
    lease = Lease(uuid4(), 10.0, clock(), clock)
    with trio.fail_after(5):
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    lease.question()
                    nursery.start_soon(lease.until_answered)
                await wait_all_tasks_blocked()
                lease.answer()
