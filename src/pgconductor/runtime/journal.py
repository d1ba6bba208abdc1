"""Writes what running executions record: their steps and waits, for the claims of one worker.

Requests of executions that run beside each other share statements: whoever comes first sends all that is there when the
connection is free, and the others wait for the answer. So there is no task of its own, and what is written in a shield
at the end of a handler does not depend on one.

A call is repeated until the database has answered it, which is harmless: a record that is there already is returned. If
the claim is revoked the attempt is abandoned, and if the lease is over its scope ends everything: the caller is told by
`Revoked`.

Cancellation: a request of a cancelled caller may be carried out or not. If it was sending for others too, one of them
sends what was not answered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar
from uuid import UUID

import trio

from ..db.call import Call
from ..db.calls import Calls, NewStep, NewWait, ResolvedWait, SavedStep, StartedWait
from ..db.link import Link, OutageLog, backoff
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
    """A request on its way: `answer` is set when it is answered, `error` if it cannot be."""

    __slots__ = ("answer", "error", "request", "turn")

    def __init__(self, request: T) -> None:
        self.request = request
        self.answer: A | None = None
        self.error: Exception | None = None
        self.turn = trio.Event()


class Combiner(Generic[T, A]):
    """Joins requests that come while another is being sent."""

    def __init__(self, send: Callable[[list[T]], Awaitable[list[A]]]) -> None:
        self._send = send
        self._waiting: list[_Entry[T, A]] = []
        self._is_sending = False

    async def ask(self, request: T) -> A:
        """Return the answer. Raises what sending this request alone raises."""
        entry: _Entry[T, A] = _Entry(request)
        self._waiting.append(entry)
        try:
            while entry.answer is None and entry.error is None:
                if self._is_sending:
                    await entry.turn.wait()
                    entry.turn = trio.Event()
                else:
                    await self._send_waiting()
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.error is not None:
            raise entry.error
        assert entry.answer is not None
        return entry.answer

    async def _send_waiting(self) -> None:
        self._is_sending = True
        try:
            await self._answer(self._waiting[:_MAX_BATCH])
        finally:
            self._is_sending = False
            for entry in self._waiting[:1]:
                entry.turn.set()

    async def _answer(self, batch: list[_Entry[T, A]]) -> None:
        try:
            answers = await self._send([entry.request for entry in batch])
        except Unstorable as error:
            if len(batch) == 1:
                batch[0].error = error
                self._settle(batch)
            else:
                for entry in batch:  # one of them it is
                    await self._answer([entry])
            return
        for entry, answer in zip(batch, answers, strict=True):
            entry.answer = answer
        self._settle(batch)

    def _settle(self, batch: list[_Entry[T, A]]) -> None:
        for entry in batch:
            if entry in self._waiting:
                self._waiting.remove(entry)
            entry.turn.set()


class Journal:
    """The journal of one worker. `link`: a connection of its own, made when it is first needed."""

    def __init__(self, link: Link, lease: Lease, calls: Calls, outages: OutageLog, rng: random.Random) -> None:
        self._link = link
        self._lease = lease
        self._calls = calls
        self._outages = outages
        self._rng = rng
        self.steps = Combiner(self._save_steps)
        self.waits = Combiner(self._start_waits)
        self.readings = Combiner(self._read_waits)

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

    async def _save_steps(self, steps: list[NewStep]) -> list[SavedStep]:
        failpoint("step.before")
        saved = await self.ask(lambda owner: self._calls.save_steps(owner, steps))
        failpoint("step.answered")
        return saved

    async def _start_waits(self, waits: list[list[NewWait]]) -> list[list[StartedWait]]:
        failpoint("wait.before")
        flat = [wait for some in waits for wait in some]
        started = await self.ask(lambda owner: self._calls.start_waits(owner, flat))
        failpoint("wait.answered")
        answers = iter(started)
        return [[next(answers) for _ in some] for some in waits]

    async def _read_waits(self, claims: list[tuple[UUID, int]]) -> list[list[ResolvedWait] | None]:
        """Once: what it tells it tells once, so a lost answer is made up for by loading the history."""
        try:
            resolved = await self._lease.attempt(self._link, lambda owner: self._calls.read_waits(owner, claims))
        except (LeaseLost, Unavailable, SchemaMissing):
            return [None for _ in claims]
        by_claim: dict[UUID, list[ResolvedWait]] = {execution: [] for execution, _ in claims}
        for wait in resolved:
            by_claim[wait.execution].append(wait)
        return [by_claim[execution] for execution, _ in claims]

    async def load(self, claimed: Claimed) -> list[Record] | None:
        """What is recorded of an execution; None if the claim is revoked."""
        return await self.ask(lambda owner: self._calls.load_history(owner, claimed.id, claimed.claim_no))

    async def close_children(self, claimed: Claimed, names: Sequence[str], reason: str) -> None:
        """Cancel the children behind these waits of an execution."""
        await self.ask(
            lambda owner: self._calls.request_close(owner, claimed.id, claimed.claim_no, list(names), reason)
        )
        while await self.ask(lambda _: self._calls.close_children()):
            pass


class ExecutionJournal:
    """The journal as one execution sees it: `durable.Journal`."""

    def __init__(self, journal: Journal, claimed: Claimed, interruption: Interruption) -> None:
        self._journal = journal
        self._claimed = claimed
        self._interruption = interruption

    async def load(self) -> list[Record]:
        if self._claimed.claim_no == 1:
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
        return Saved(value, error) if saved.status == "saved" else Saved(saved.value, saved.error)

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
            wait["name"], wait["kind"], wait["position"], 0, started.outcome, started.target, wait.get("scope"),
            started.value, started.error, started.due_in,
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
