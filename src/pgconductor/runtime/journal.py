"""Writes what running executions record: their steps and waits, for the claims of one worker.

Requests of executions that run beside each other share statements: whoever comes first sends all that is there when the
connection is free, and the others wait for the answer. So there is no task of its own, and what is written in a shield
at the end of a handler does not depend on one.

A call is repeated until the database has answered it, which is harmless: a record that is there already is returned. If
the claim is revoked the attempt is abandoned, and if the lease is over its scope ends everything: the caller is told by
`Revoked`.

Cancellation: a request of a cancelled caller may be carried out or not. If it was sending for others too, one of them
sends what was not answered; but readings are told once, so those are told that their answer is lost.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar
from uuid import UUID

import trio

from ..db.call import Call
from ..db.calls import (
    Calls,
    NewEffect,
    NewItem,
    NewProgress,
    NewStep,
    NewWait,
    ResolvedWait,
    SavedEffect,
    SavedStep,
    StartedWait,
)
from ..db.link import Link, OutageLog, backoff
from ..db.transactions import OpenTransaction
from ..durable import Revoked, Saved
from ..errors import DurableMisuse, LeaseLost, SchemaMissing, Unavailable, Unstorable
from ..failpoints import failpoint
from ..model import Claimed, Record
from .execution import Interruption
from .lease import Lease

T = TypeVar("T")
A = TypeVar("A")

_MAX_BATCH = 500
_MAX_DEPTH = 16


class _Entry(Generic[T, A]):
    """A request on its way: `answers` has one item when it is answered, `error` is set if it cannot be."""

    __slots__ = ("answers", "error", "request", "turn")

    def __init__(self, request: T) -> None:
        self.request = request
        self.answers: list[A] = []  # a list, since any answer may be None
        self.error: Exception | None = None
        self.turn = trio.Event()

    @property
    def is_settled(self) -> bool:
        return bool(self.answers) or self.error is not None


class Combiner(Generic[T, A]):
    """Joins requests that come while another is being sent.

    `lost`: the answer of those whose request was sent without an answer, when whoever sent it was interrupted; without
    one they are sent again.
    """

    def __init__(self, send: Callable[[list[T]], Awaitable[list[A]]], *, lost: Callable[[], A] | None = None) -> None:
        self._send = send
        self._lost = lost
        self._waiting: dict[_Entry[T, A], None] = {}  # in order
        self._is_sending = False

    async def ask(self, request: T) -> A:
        """Return the answer. Raises what sending this request alone raises."""
        entry: _Entry[T, A] = _Entry(request)
        self._waiting[entry] = None
        try:
            while not entry.is_settled:
                if self._is_sending:
                    await entry.turn.wait()
                    entry.turn = trio.Event()
                else:
                    await self._send_waiting()
        finally:
            self._waiting.pop(entry, None)
            if not self._is_sending:
                self._wake_next()  # it may have been this one's turn
        if entry.error is not None:
            raise entry.error
        return entry.answers[0]

    def _wake_next(self) -> None:
        if self._waiting:
            next(iter(self._waiting)).turn.set()

    async def _send_waiting(self) -> None:
        self._is_sending = True
        try:
            await self._answer(list(islice(self._waiting, _MAX_BATCH)))
        finally:
            self._is_sending = False
            self._wake_next()

    async def _answer(self, batch: list[_Entry[T, A]]) -> None:
        try:
            answers = await self._send([entry.request for entry in batch])
        except Unstorable as error:
            if len(batch) > 1:  # one of them it is
                for entry in batch:
                    await self._answer([entry])
            else:
                batch[0].error = error
                self._settle(batch)
            return
        except BaseException:
            if self._lost is not None:
                for entry in batch:
                    entry.answers.append(self._lost())
                self._settle(batch)
            raise
        for entry, answer in zip(batch, answers, strict=True):
            entry.answers.append(answer)
        self._settle(batch)

    def _settle(self, batch: list[_Entry[T, A]]) -> None:
        for entry in batch:
            self._waiting.pop(entry, None)
            entry.turn.set()


class Journal:
    """The journal of one worker. `link`: a connection of its own, made when it is first needed. `left` is called when
    there are children to be cancelled.
    """

    def __init__(
        self,
        link: Link,
        lease: Lease,
        calls: Calls,
        outages: OutageLog,
        rng: random.Random,
        *,
        left: Callable[[], None],
    ) -> None:
        self._link = link
        self._lease = lease
        self.calls = calls
        self._outages = outages
        self._rng = rng
        self._left = left
        self.steps = Combiner(self._save_steps)
        self.waits = Combiner(self._start_waits)
        self.readings: Combiner[tuple[UUID, int], list[ResolvedWait] | None] = Combiner(
            self._read_waits,
            lost=lambda: None,  # it may have been told, and is told once
        )
        self.effects = Combiner(self._save_effects)
        self.progress = Combiner(self._set_progress)
        self.items = Combiner(self._append_items)

    async def ask(self, make: Callable[[UUID], Call[T]]) -> T:
        """Execute until the database has answered. Raises `Revoked` when the lease is over, `Unstorable`."""
        failures = 0
        while True:
            try:
                return await self._lease.attempt(self._link, make)
            except LeaseLost:
                if self._lease.is_lost:
                    raise Revoked from None
                # The server was restarted, perhaps: the heartbeat finds out, and saves what can be saved.
                failures += 1
                self._lease.question()
                await self._lease.until_answered()
            except (Unavailable, SchemaMissing) as error:
                failures += 1
                self._outages.warn("what executions record cannot be written: %s; trying again", error)
            await trio.sleep(backoff(failures, self._rng))

    async def save_inside(self, transaction: OpenTransaction, step: NewStep) -> tuple[SavedStep, str]:
        """Execute once, in the transaction, if the lease holds; return what was saved, and the transaction's id.

        Raises `Revoked` when the lease is over, `Unavailable` if the transaction is lost, psycopg's errors.
        """
        try:
            return await self._lease.attempt(transaction, lambda owner: self.calls.save_step_inside(owner, step))
        except LeaseLost:
            if self._lease.is_lost:
                raise Revoked from None
            self._lease.question()
            await self._lease.until_answered()
            raise Unavailable("the lease was in doubt when a transaction was to be committed") from None

    async def _save_steps(self, steps: list[NewStep]) -> list[SavedStep]:
        failpoint("step.before")
        saved = await self.ask(lambda owner: self.calls.save_steps(owner, steps))
        failpoint("step.answered")
        return saved

    async def _start_waits(self, waits: list[list[NewWait]]) -> list[list[StartedWait]]:
        failpoint("wait.before")
        flat = [wait for some in waits for wait in some]
        started = await self.ask(lambda owner: self.calls.start_waits(owner, flat))
        failpoint("wait.answered")
        answers = iter(started)
        return [[next(answers) for _ in some] for some in waits]

    async def _save_effects(self, effects: list[NewEffect]) -> list[SavedEffect]:
        failpoint("effect.before")
        saved = await self.ask(lambda owner: self.calls.save_effects(owner, effects))
        failpoint("effect.answered")
        return saved

    async def _set_progress(self, told: list[NewProgress]) -> list[bool]:
        """For each whether the claim holds."""
        revoked = await self.ask(lambda owner: self.calls.set_progress(owner, told))
        return [position not in revoked for position in range(len(told))]

    async def _append_items(self, items: list[NewItem]) -> list[str]:
        failpoint("item.before")
        statuses = await self.ask(lambda owner: self.calls.append_items(owner, items))
        failpoint("item.answered")
        return statuses

    async def _read_waits(self, claims: list[tuple[UUID, int]]) -> list[list[ResolvedWait] | None]:
        """Once: what it tells it tells once, so a lost answer is made up for by loading the history."""
        try:
            resolved = await self._lease.attempt(self._link, lambda owner: self.calls.read_waits(owner, claims))
        except (LeaseLost, Unavailable, SchemaMissing):
            return [None for _ in claims]
        by_claim: dict[UUID, list[ResolvedWait]] = {execution: [] for execution, _ in claims}
        for wait in resolved:
            by_claim[wait.execution].append(wait)
        return [by_claim[execution] for execution, _ in claims]

    async def load(self, claimed: Claimed) -> list[Record] | None:
        """What is recorded of an execution; None if the claim is revoked."""
        return await self.ask(lambda owner: self.calls.load_history(owner, claimed.id, claimed.claim_no))

    async def close_children(self, claimed: Claimed, names: Sequence[str], reason: str) -> None:
        """Have the children behind these waits of an execution cancelled."""
        await self.ask(lambda owner: self.calls.request_close(owner, claimed.id, claimed.claim_no, list(names), reason))
        self._left()


class ExecutionJournal:
    """The journal as one execution sees it: `durable.Journal`."""

    def __init__(self, journal: Journal, claimed: Claimed, interruption: Interruption) -> None:
        self._journal = journal
        self._claimed = claimed
        self._interruption = interruption

    async def load(self, *, is_first: bool) -> list[Record]:
        if is_first and self._claimed.claim_no == 1:
            return []  # nobody had it before
        records = await self._journal.load(self._claimed)
        return self._revoked() if records is None else records

    async def admit(self, name: str, kind: str) -> None:
        pass  # everything new is done here

    async def save_step(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        step = NewStep(self._claimed.id, self._claimed.claim_no, name, kind, position, value, error)
        saved = await self._journal.steps.ask(step)
        if saved.status == "fenced":
            self._revoked()
        # The value as it is stored: what a replay will be told.
        return Saved(saved.value, error if saved.status == "saved" else saved.error)

    async def save_step_inside(
        self, transaction: OpenTransaction, name: str, kind: str, position: int, value: str
    ) -> Saved | None:
        step = NewStep(self._claimed.id, self._claimed.claim_no, name, kind, position, value)
        saved, xid = await self._journal.save_inside(transaction, step)
        transaction.require_id(xid)
        if saved.status == "fenced":
            self._revoked()
        return Saved(saved.value, None) if saved.status == "saved" else None

    async def save_effect(self, name: str, position: int, effect: Mapping[str, object]) -> str | None:
        request = NewEffect(self._claimed.id, self._claimed.claim_no, name, position, json.dumps(effect))
        saved = await self._journal.effects.ask(request)
        return self._revoked() if saved.status == "fenced" else saved.value

    async def set_progress(self, value: str) -> None:
        if not await self._journal.progress.ask(NewProgress(self._claimed.id, self._claimed.claim_no, value)):
            self._revoked()

    async def open_channel(self, name: str, capacity: int) -> int:
        claimed = self._claimed
        last = await self._journal.ask(
            lambda owner: self._journal.calls.open_channel(owner, claimed.id, claimed.claim_no, name, capacity)
        )
        return self._revoked() if last is None else last

    async def append_item(self, channel: str, seq: int, value: str) -> bool:
        item = NewItem(self._claimed.id, self._claimed.claim_no, channel, seq, value)
        status = await self._journal.items.ask(item)
        return self._revoked() if status == "fenced" else status == "sent"

    async def close_channel(self, name: str) -> None:
        claimed = self._claimed
        if not await self._journal.ask(
            lambda owner: self._journal.calls.close_channel(owner, claimed.id, claimed.claim_no, name)
        ):
            self._revoked()

    async def start_waits(self, waits: Sequence[Mapping[str, object]]) -> list[Record]:
        rows = [NewWait(self._claimed.id, self._claimed.claim_no, json.dumps(wait)) for wait in waits]
        started = await self._journal.waits.ask(rows)
        return [self._record(wait, answer) for wait, answer in zip(waits, started, strict=True)]

    def _record(self, wait: Mapping[str, Any], started: StartedWait) -> Record:
        if started.status == "fenced":
            self._revoked()
        if started.status == "too_deep":
            raise DurableMisuse(
                f"child {wait['name']!r}: children are nested at most {_MAX_DEPTH} deep; does the task invoke itself?"
            )
        return Record(
            wait["name"], wait["kind"], wait["position"], self._claimed.attempt, started.outcome, started.target,
            wait.get("scope"), started.value, started.error, started.due_in,
        )  # fmt: skip

    async def read_waits(self) -> list[Record] | None:
        resolved = await self._journal.readings.ask((self._claimed.id, self._claimed.claim_no))
        if resolved is None:
            return None
        return [Record(w.name, "", 0, 0, w.outcome, value=w.value, error=w.error) for w in resolved]

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        await self._journal.close_children(self._claimed, names, reason)

    def _revoked(self) -> NoReturn:
        self._interruption.abandon()
        raise Revoked
