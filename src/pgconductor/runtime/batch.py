"""One attempt of a batch: many executions, one call of the handler, an outcome for each.

The handler has one `Interruption`, and each execution a `Member`, which has the face that the worker uses: a requested
cancellation is the member's own and is told to the handler by its `BatchItem`; the handler itself is interrupted when
nobody is left who wants it. The worker's stop is everybody's.

The time of the call is the least that any member has left. When it is up, those whose own time it was have run out of
it; the others are given back, since nothing is known against them.

Invariants: each member is settled exactly once, as soon as its outcome is known: what cannot begin (its payload does
not fit, its deadline has passed, it is to be cancelled) before the handler does. What an answer or an error means for
one is decided as for an execution that is alone (`execution.py`); what the handler raised is held against all of them.
Only `KeyboardInterrupt`, a scope outside that is cancelled, and what the loading raises, leave members unsettled: they
are the worker's.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import trio

from ..batch_context import BatchContext, BatchItem
from ..batches import ITEM
from ..codec import described_type, printable
from ..context import Resources
from ..errors import HandlerCancelled, InvalidPayload
from ..model import Claimed, Outcome
from ..tasks import Task
from .execution import (
    NOTHING,
    Berth,
    Interruption,
    call_handler,
    completed,
    is_answer,
    not_completed,
    out_of_time,
    released,
    too_late,
    undecodable,
    unstarted,
)

_SAME = 0.001  # seconds by which the limits of two members may differ, and be up together

Load = Callable[[], Awaitable[str | None]]


class Member:
    """One execution of a batch, for the worker (`execution.Interruptible`), for the handler (`context.Watch`), and for
    the decision how it ended (`execution.Told`).
    """

    __slots__ = ("_call", "claimed", "deadline_at", "is_by_deadline", "is_lost", "is_requested", "is_settled", "item",
                 "limit", "reason", "settle_as", "was_asked")  # fmt: skip

    def __init__(
        self, call: Call, claimed: Claimed, received_at: float, settle: Callable[[Outcome | None], None]
    ) -> None:
        """`received_at`: Trio's time at which the claim's answer came. `settle`: called once, with the outcome, or None
        if the handler's thread may run on.
        """
        self._call = call
        self.claimed = claimed
        self.settle_as = settle
        self.deadline_at = None if claimed.deadline_in is None else received_at + claimed.deadline_in
        self.limit: float | None = None  # seconds that its attempt may take
        self.is_by_deadline = False
        self.is_requested = False
        self.is_lost = False  # its claim is not ours any more
        self.is_settled = False
        self.was_asked = False  # the handler asked for it, and was told to end
        self.reason: str | None = None
        self.item: Any = None

    def settle(self, outcome: Outcome | None) -> None:
        """It has ended."""
        if not self.is_settled:
            self.is_settled = True
            self.settle_as(outcome)

    # For the worker

    @property
    def is_body_running(self) -> bool:
        return self._call.interruption.is_body_running

    def cancel(self, reason: str | None = None) -> None:
        if not self.is_requested:
            self.is_requested = True
            self.reason = reason
        self._call.look()

    def stop(self) -> None:
        self._call.interruption.stop()

    def note_end(self) -> None:
        self._call.interruption.note_end()

    def abandon(self) -> None:
        self.is_lost = True
        self._call.look()

    # For the handler

    @property
    def is_cancelled(self) -> bool:
        if self.is_requested or self.is_lost:
            self.was_asked = True
            return True
        return self._call.interruption.is_cancelled

    def check(self) -> None:
        if self.is_cancelled and self.is_requested:
            raise HandlerCancelled(f"the cancellation of execution {self.claimed.id} was requested")
        if self.is_lost:
            raise HandlerCancelled(f"execution {self.claimed.id} is not ours any more")
        self._call.interruption.check()

    # For the decision

    @property
    def is_stopping(self) -> bool:
        return self.is_lost or self._call.interruption.is_stopping

    @property
    def was_told(self) -> bool:
        return self.was_asked or self._call.interruption.was_told


class Call:
    """One call of a handler of batches. Made for its executions, whose members are added; used once."""

    def __init__(self, task: Task[..., Any], queue: str, resources: Resources, rng: random.Random) -> None:
        self.interruption = Interruption()
        self.members: list[Member] = []
        self._task = task
        self._queue = queue
        self._resources = resources
        self._rng = rng

    def add(self, claimed: Claimed, received_at: float, settle: Callable[[Outcome | None], None]) -> Member:
        """One more execution; `Member` says what the arguments are."""
        member = Member(self, claimed, received_at, settle)
        self.members.append(member)
        return member

    def look(self) -> None:
        """A member was cancelled or lost: if that goes for all that have not been settled, nobody wants the handler."""
        if any(not (member.is_settled or member.is_lost or member.is_requested) for member in self.members):
            return
        asked = [member for member in self._unsettled() if not member.is_lost]
        if asked:
            self.interruption.cancel(asked[0].reason)
        else:
            self.interruption.abandon()

    async def attempt(self, load: Callable[[Claimed], Load], limiter: trio.CapacityLimiter, berth: Berth) -> None:
        """Call the handler once, and settle every member. `load`: makes what loads a large payload, and answers None if
        the execution is no longer ours. `berth`: in which the caller's task is.

        Raises as `execution.attempt` does; members may be unsettled then.
        """
        task, inner = self._task, self.interruption
        inner.begin(berth)
        try:
            await self._prepare(load)
            members = self._unsettled()
            if not members:
                return
            limits = [member.limit for member in members if member.limit is not None]
            limit = min(limits) if limits else None
            ctx = BatchContext(
                [BatchItem(member.claimed.id, member.claimed.attempt, member) for member in members],
                task=task.name, queue=self._queue, resources=self._resources, watch=inner,
            )  # fmt: skip
            call = functools.partial(task.call_batch, ctx, [member.item for member in members])
            value, error = await call_handler(task, call, inner, limit, limiter)
            try:
                if value is not NOTHING:
                    self._answer(members, value)
                elif inner.is_body_running:
                    for member in members:
                        member.settle(None)
                elif inner.is_expired and not inner.is_requested and not inner.is_stopping:
                    self._expire(members, error or inner.unwound, limit)
                else:
                    self._fail(members, error)
            finally:
                # They hold this frame, and it them.
                del error
                inner.unwound = None
        finally:
            inner.end()

    def _unsettled(self) -> list[Member]:
        return [member for member in self.members if not member.is_settled]

    async def _prepare(self, load: Callable[[Claimed], Load]) -> None:
        """Have each member's item and limit; settle those that cannot begin."""
        task, inner = self._task, self.interruption
        payloads: list[str | None] = [member.claimed.payload for member in self.members]
        for place, member in enumerate(self.members):
            if payloads[place] is None and not inner.is_stopping and unstarted(task, member.claimed, member) is None:
                payloads[place] = await inner.load(load(member.claimed))
        now = trio.current_time()
        for member, payload in zip(self.members, payloads, strict=True):
            claimed = member.claimed
            if outcome := unstarted(task, claimed, member):
                member.settle(outcome)
                continue
            if payload is None:
                member.settle(released(task, claimed))
                continue
            member.limit = task.timeout if claimed.timeout is None else claimed.timeout
            remaining = None if member.deadline_at is None else member.deadline_at - now
            if remaining is not None:
                if remaining <= 0.0:
                    member.settle(too_late(task, claimed))
                    continue
                member.is_by_deadline = member.limit is None or remaining <= member.limit
                member.limit = remaining if member.is_by_deadline else member.limit
            try:
                member.item = task.decode(payload)[ITEM]
            except (Exception, SystemExit) as raised:  # noqa: BLE001  # what the payload's own classes raise too
                member.settle(undecodable(task, claimed, raised, self._rng, remaining))

    def _answer(self, members: Sequence[Member], value: object) -> None:
        """The handler has returned: an answer for each."""
        task = self._task
        answers = self._answers(members, value)
        if isinstance(answers, InvalidPayload):
            self._fail(members, answers)
            return
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, BaseException):
                member.settle(self._not_completed(member, answer))
            else:
                member.settle(completed(task, member.claimed, answer, member))

    def _answers(self, members: Sequence[Member], value: object) -> Sequence[object] | InvalidPayload:
        """What was returned as one answer per member, or what is wrong with it."""
        expected = len(members)
        what = f"the handler of batches of task {self._task.name!r} was given {expected} items and "
        if self._task.shape.returns_nothing:
            if value is None:
                return [None] * expected
            return InvalidPayload(f"{what}returned {_named(value)}; it is annotated to return None")
        if not _is_list(value):
            return InvalidPayload(f"{what}returned {_named(value)}; it is to return a list of {expected} answers")
        answers = cast("Sequence[object]", value)
        try:
            answers = list(answers)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a sequence of the user's own
            return InvalidPayload(f"{what}returned a sequence that cannot be read: {described_type(error)}")
        if len(answers) != expected:
            return InvalidPayload(f"{what}returned {len(answers)} answers; it is to return one for each, in order")
        return answers

    def _expire(self, members: Sequence[Member], raised: BaseException | None, limit: float | None) -> None:
        """Time was up, and the handler has ended for that."""
        assert limit is not None
        for member in members:
            if member.is_requested:
                member.settle(self._not_completed(member, raised))
            elif member.limit is not None and member.limit <= limit + _SAME:
                error = out_of_time(raised, member.limit, member.is_by_deadline)
                member.settle(self._not_completed(member, error))
            else:
                member.settle(released(self._task, member.claimed))

    def _fail(self, members: Sequence[Member], error: BaseException | None) -> None:
        """The handler raised, or was interrupted (None)."""
        # It ended because it was told that one is to be cancelled: no failure of the others.
        is_told = error is not None and is_answer(error) and any(m.was_asked for m in members)
        for member in members:
            if is_told and not member.is_requested:
                member.settle(released(self._task, member.claimed))
            else:
                member.settle(self._not_completed(member, error))

    def _not_completed(self, member: Member, error: BaseException | None) -> Outcome:
        remaining = None if member.deadline_at is None else member.deadline_at - trio.current_time()
        return not_completed(self._task, member.claimed, error, member, self._rng, remaining)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _named(value: object) -> str:
    return "None" if value is None else f"an object of type {printable(type(value).__qualname__)}"
