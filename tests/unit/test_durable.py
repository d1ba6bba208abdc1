"""Steps, waits and suspension over a journal in a dictionary: what a handler sees, and what is recorded.

Without a database; times are the mock clock's. `Journal` keeps what an execution records; `run` runs a handler once, as
the worker does.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast
from uuid import UUID

import pytest
import trio
import trio.lowlevel
import trio.testing
from unit.test_execution import ID, a_claim, a_task, error_of, summary

from pgconductor.codec import Limits
from pgconductor.context import Context
from pgconductor.db.transactions import OpenTransaction
from pgconductor.durable import SETTLE, Durable, Revoked, Saved, Tries
from pgconductor.errors import (
    ChildCancelled,
    ChildFailed,
    ChildTimedOut,
    DurableMisuse,
    InvalidOption,
    NoRetry,
    RetryAfter,
    Snooze,
    StepFailed,
)
from pgconductor.model import Outcome, Record
from pgconductor.runtime.execution import Berth, Interruption, attempt
from pgconductor.tasks import Task

Clock = trio.testing.MockClock


@dataclass
class Journal:
    """What one execution records, and how its waits end: `ends` by name, at once or by `end`."""

    records: dict[str, Record] = field(default_factory=dict[str, Record])
    ends: dict[str, tuple[str, str | None]] = field(default_factory=dict[str, "tuple[str, str | None]"])
    told: set[str] = field(default_factory=set[str])
    due_at: dict[str, float] = field(default_factory=dict[str, float])
    closed: list[tuple[tuple[str, ...], str]] = field(default_factory=list[tuple[tuple[str, ...], str]])
    batches: list[int] = field(default_factory=list[int])
    loads: int = 0
    readings: int = 0
    is_answer_lost: bool = False  # the next reading is carried out, and its answer lost
    revoke: Callable[[], None] | None = None  # ends the attempt, as the real one does before it refuses
    gate: trio.Event | None = None  # of a reading
    save_gate: trio.Event | None = None
    durable: Durable | None = None

    def end(self, name: str, outcome: str, text: str | None = None) -> None:
        """End a wait: `text` is a value, or an error."""
        is_value = outcome in ("completed", "received", "resolved")
        record = self.records[name]._replace(
            outcome=outcome, value=text if is_value else None, error=None if is_value else text, due_in=None
        )
        self.records[name] = record

    def wake(self, name: str, outcome: str, text: str | None = None) -> None:
        """The same, and tell the process that runs it."""
        self.end(name, outcome, text)
        assert self.durable is not None
        self.durable.nudge()

    def is_resumable(self, awaited: Sequence[str]) -> bool:
        """Whether the database would wake it."""
        self._settle()
        return any(r.outcome is not None and (n not in self.told or n in awaited) for n, r in self._waits().items())

    def _waits(self) -> dict[str, Record]:
        return {name: record for name, record in self.records.items() if record.kind in ("sleep", "child")}

    def _settle(self) -> None:
        for name, due_at in list(self.due_at.items()):
            if due_at <= trio.current_time():
                del self.due_at[name]
                self.end(name, "elapsed")

    async def load(self, *, is_first: bool) -> list[Record]:
        await trio.lowlevel.checkpoint()
        self.loads += 1
        self._settle()
        self.told |= {name for name, record in self._waits().items() if record.outcome is not None}
        return [
            record._replace(due_in=self.due_at[name] - trio.current_time()) if name in self.due_at else record
            for name, record in self.records.items()
        ]

    async def save_step(self, name: str, kind: str, position: int, value: str | None, error: str | None) -> Saved:
        if self.save_gate is not None:
            await self.save_gate.wait()
        await trio.lowlevel.checkpoint()
        if self.revoke is not None:
            self.revoke()
            raise Revoked
        outcome = "completed" if error is None else "failed"
        record = self.records.setdefault(name, Record(name, kind, position, 1, outcome, value=value, error=error))
        return Saved(record.value, record.error)

    async def open_channel(self, name: str, capacity: int) -> int:
        raise AssertionError("there is no database here to have channels")

    async def append_item(self, channel: str, seq: int, value: str) -> bool:
        raise AssertionError("there is no database here to have channels")

    async def close_channel(self, name: str) -> None:
        raise AssertionError("there is no database here to have channels")

    async def admit(self, name: str, kind: str) -> None:
        await trio.lowlevel.checkpoint()

    async def save_step_inside(
        self, transaction: OpenTransaction, name: str, kind: str, position: int, value: str
    ) -> Saved | None:
        raise AssertionError("there is no database here to have transactions")

    async def save_effect(self, name: str, position: int, effect: Mapping[str, object]) -> str | None:
        return (await self.save_step(name, "effect", position, "null", None)).value

    async def set_progress(self, value: str) -> None:
        await trio.lowlevel.checkpoint()

    async def start_waits(self, waits: Sequence[Mapping[str, object]]) -> list[Record]:
        await trio.lowlevel.checkpoint()
        self.batches.append(len(waits))
        for wait in waits:
            if wait["name"] in self.records:
                continue  # the answer of an earlier call was lost
            name, kind, scope = str(wait["name"]), str(wait["kind"]), cast("str | None", wait.get("scope"))
            due_in = cast("float | None", wait.get("due_in"))
            target = str(UUID(int=len(self.records) + 100)) if kind == "child" else None
            self.records[name] = Record(name, kind, cast(int, wait["position"]), 1, None, target, scope, due_in=due_in)
            if due_in is not None:
                self.due_at[name] = trio.current_time() + due_in
            if name in self.ends:
                self.end(name, *self.ends[name])
        self._settle()
        records = [self.records[str(wait["name"])] for wait in waits]
        self.told |= {record.name for record in records if record.outcome == "elapsed"}
        return [record if record.outcome in (None, "elapsed") else record._replace(outcome=None) for record in records]

    async def read_waits(self) -> list[Record] | None:
        await trio.lowlevel.checkpoint()
        self.readings += 1
        self._settle()
        news = [r for n, r in self._waits().items() if r.outcome is not None and n not in self.told]
        self.told |= {record.name for record in news}
        if self.gate is not None:
            await self.gate.wait()
        if self.is_answer_lost:
            self.is_answer_lost = False
            return None
        return news

    async def close_children(self, names: Sequence[str], reason: str) -> None:
        await trio.lowlevel.checkpoint()
        self.closed.append((tuple(names), reason))
        for name in names:
            if name in self.records and self.records[name].outcome is None:
                self.end(name, "cancelled", json.dumps({"reason": reason}))


async def run(
    handler: Callable[[Context], Awaitable[Any]] | Task[..., Any],
    journal: Journal,
    interruption: Interruption | None = None,
    *,
    attempt_no: int = 1,
    timeout: float | None = None,
) -> Outcome:
    """One run of a handler on a journal."""
    task: Task[..., Any] = cast("Task[..., Any]", handler) if isinstance(handler, Task) else a_task(handler)
    inner = interruption or Interruption()
    ctx = Context(ID, attempt_no, task=task.name, queue="default", resources={})
    limiter, rng = trio.CapacityLimiter(2), random.Random(0)

    def open_durable() -> Durable:
        journal.durable = Durable(attempt_no, journal, inner, limiter, rng, Limits(), lambda _: {}, task.bind_arguments)
        return journal.durable

    ctx.attach(open_durable, inner)
    outcome: Outcome | None = None
    with Berth() as berth:
        outcome = await attempt(
            task, a_claim(attempt=attempt_no, timeout=timeout), "{}", ctx, limiter, rng, inner, berth
        )
    ctx.close()
    if journal.durable is not None:
        journal.durable.end(completed=outcome is not None and outcome.kind == "completed")
    assert outcome is not None
    return outcome


async def run_through(
    handler: Callable[[Context], Awaitable[Any]] | Task[..., Any], journal: Journal, *, limit: int = 50
) -> tuple[Outcome, int]:
    """Run it again whenever the database would; returns the last outcome and the number of suspensions."""
    for suspensions in range(limit):
        outcome = await run(handler, journal)
        if outcome.kind != "waiting":
            return outcome, suspensions
        awaited = json.loads(outcome.result or "[]")
        while not journal.is_resumable(awaited):
            assert journal.due_at, "it waits for ever"
            await trio.sleep(max(0.0, min(journal.due_at.values()) - trio.current_time()) + 0.001)
    raise AssertionError("it is suspended again and again")


@a_task
async def child() -> int:
    raise AssertionError("a journal in a dictionary runs no children")


def value_of(outcome: Outcome) -> Any:
    assert outcome.kind == "completed", outcome
    return json.loads(outcome.result or "null")


# --- steps -----------------------------------------------------------------------------------------------------------


async def test_step_runs_once_and_its_record_is_its_value(autojump_clock: Clock) -> None:
    """Each replay would do the work again."""
    calls = 0

    def work(n: int) -> int:
        nonlocal calls
        calls += 1
        return n + calls

    async def handler(ctx: Context) -> int:
        first = await ctx.step("work", work, 10)
        await ctx.sleep("rest", 60)
        return first

    outcome, suspensions = await run_through(handler, Journal())
    assert (value_of(outcome), calls, suspensions) == (11, 1, 1)


@dataclass
class Point:
    x: int
    at: datetime


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (None, None), (bool, False), (int, 0), (str, ""), (float, 0.0), (list[int], []), (dict[str, int], {}),
        (tuple[int, str], (1, "a")), (Point, Point(3, datetime(2030, 1, 2, tzinfo=UTC))), (float, 1e300),
        (datetime, datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)), (timedelta, timedelta(days=3, microseconds=1)),
        (UUID, UUID(int=7)), (bytes, b"\0\xff"), (list[Point], [Point(1, datetime(2000, 1, 1, tzinfo=UTC))]),
        (Any, {"a": [1, 2.5, None, "x"]}), (set[int], {1, 2}), (float, 3),
    ],
)  # fmt: skip
async def test_first_run_gets_what_a_replay_gets(autojump_clock: Clock, kind: Any, value: object) -> None:
    """A tuple is a list after a crash, or a falsy value is lost (B32): the handler then goes another way."""
    seen: list[tuple[type, object]] = []

    def make() -> Any:
        return value

    make.__annotations__["return"] = kind

    async def handler(ctx: Context) -> None:
        got: object = await ctx.step("make", make)
        seen.append((type(got), got))
        await ctx.sleep("rest", 60)

    await run_through(handler, Journal())
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][1] == value


async def test_failure_is_recorded_and_raised_again(autojump_clock: Clock) -> None:
    """A replay would run a step that had failed, and go on from another past."""
    calls = 0
    raised: list[str] = []
    causes: list[BaseException | None] = []
    records: list[Mapping[str, str]] = []

    async def fails() -> None:
        nonlocal calls
        calls += 1
        raise ValueError("bad weather")

    async def handler(ctx: Context) -> str:
        try:
            await ctx.step("fails", fails)
        except StepFailed as failure:
            raised.append(str(failure))
            causes.append(failure.__cause__)
            records.append(failure.error)
        await ctx.sleep("rest", 60)
        return "went on"

    outcome, _ = await run_through(handler, Journal())
    assert value_of(outcome) == "went on"
    assert calls == 1
    assert raised == ["step 'fails' failed: ValueError: bad weather"] * 2
    assert isinstance(causes[0], ValueError)
    assert causes[1] is None
    assert records[0] == records[1]
    assert records[0]["type"] == "ValueError"
    assert "bad weather" in records[0]["traceback"]


async def test_tries_of_a_step_back_off_and_are_counted(autojump_clock: Clock) -> None:
    """A step that recovers would fail its execution, or hammer what it calls."""
    at: list[float] = []
    began = trio.current_time()

    async def flaky() -> str:
        at.append(trio.current_time() - began)
        if len(at) < 3:
            raise ConnectionError
        return "there"

    async def handler(ctx: Context) -> str:
        return await ctx.step("flaky", flaky, retry=Tries(3, 5.0))

    journal = Journal()
    assert value_of(await run(handler, journal)) == "there"
    assert at == [0.0, pytest.approx(5.0), pytest.approx(10.0)]


async def test_verdicts_inside_a_step(autojump_clock: Clock) -> None:
    """`NoRetry` ends the tries, `RetryAfter` says when the next one is, `Snooze` records nothing and passes."""
    at: list[float] = []
    began = trio.current_time()

    async def verdict(error: Exception) -> None:
        at.append(trio.current_time() - began)
        if len(at) < 3:
            raise error

    async def refuses(ctx: Context) -> None:
        await ctx.step("x", verdict, NoRetry("no such customer"), retry=5)

    async def later(ctx: Context) -> None:
        await ctx.step("x", verdict, RetryAfter(30), retry=5)

    async def snoozes(ctx: Context) -> None:
        await ctx.step("x", verdict, Snooze(30), retry=5)

    assert summary(await run(refuses, Journal()))[0] in ("failed", "retried")
    assert len(at) == 1
    at.clear()
    began = trio.current_time()
    assert (await run(later, Journal())).kind == "completed"
    assert at == [0.0, pytest.approx(30.0), pytest.approx(60.0)]
    at.clear()
    journal = Journal()
    outcome = await run(snoozes, journal)
    assert (outcome.kind, outcome.delay, journal.records) == ("released", 30.0, {})


async def test_time_of_a_try_is_bounded_and_each_has_its_own(autojump_clock: Clock) -> None:
    """One try that hangs would take all of the attempt's time."""
    tries = 0

    async def hangs() -> None:
        nonlocal tries
        tries += 1
        await trio.sleep(1000)

    async def handler(ctx: Context) -> float:
        began = trio.current_time()
        with pytest.raises(StepFailed, match=r"step 'hangs' ran for more than 2 s") as raised:
            await ctx.step("hangs", hangs, retry=Tries(3, 1.0), timeout=2.0)
        assert isinstance(raised.value.__cause__, TimeoutError)
        return trio.current_time() - began

    assert value_of(await run(handler, Journal())) == pytest.approx(8.0)
    assert tries == 3


async def test_step_whose_value_does_not_fit_is_not_done_again(autojump_clock: Clock) -> None:
    """What it did has been done: tries are for what raised."""
    calls = 0

    def lies() -> int:
        nonlocal calls
        calls += 1
        return cast(int, object())

    async def handler(ctx: Context) -> None:
        await ctx.step("lies", lies, retry=5)

    journal = Journal()
    outcome = await run(handler, journal)
    assert calls == 1
    assert "step 'lies' failed" in error_of(outcome)["message"]
    assert journal.records["lies"].error is not None


async def test_step_that_raises_because_it_is_cancelled_has_not_failed(autojump_clock: Clock) -> None:
    """A shutdown in the middle of a step would be replayed as the step's failure, for ever."""
    begun = trio.Event()

    async def stumbles() -> None:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async def handler(ctx: Context) -> None:
        await ctx.step("stumbles", stumbles, retry=3)

    journal, interruption = Journal(), Interruption()
    async with trio.open_nursery() as nursery:

        async def stop() -> None:
            await begun.wait()
            interruption.stop()

        nursery.start_soon(stop)
        outcome = await run(handler, journal, interruption)
    assert outcome.kind == "released"
    assert journal.records == {}


async def test_value_of_a_step_is_recorded_though_its_handler_is_cancelled(autojump_clock: Clock) -> None:
    """What a step did is done; unrecorded it would be done twice."""
    journal, interruption = Journal(), Interruption()

    async def charge() -> int:
        interruption.stop()
        return 5

    async def handler(ctx: Context) -> None:
        await ctx.step("charge", charge)
        await trio.lowlevel.checkpoint()

    outcome = await run(handler, journal, interruption)
    assert outcome.kind == "released"
    assert journal.records["charge"].value == "5"


async def test_claim_that_is_lost_in_a_step_ends_the_handler(autojump_clock: Clock) -> None:
    """A zombie would go on with a value that nobody recorded."""
    interruption = Interruption()
    journal = Journal(revoke=interruption.abandon)
    went_on = False

    async def handler(ctx: Context) -> None:
        nonlocal went_on
        await ctx.step("a", int, 5)
        went_on = True

    outcome = await run(handler, journal, interruption)
    assert outcome.kind == "released"
    assert not went_on


async def test_context_is_refused_in_a_step_and_nothing_is_recorded(autojump_clock: Clock) -> None:
    """A step is recorded as a whole: what it records of its own would be found by a run that does not call it."""
    refused: list[str] = []

    async def handler(ctx: Context) -> str:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: ctx.step("inner", int), partial(ctx.sleep, "inner", 1), partial(ctx.invoke, "inner", child),
            partial(ctx.sleep_until, "inner", datetime(2030, 1, 1, tzinfo=UTC)), ctx.now, ctx.uuid, ctx.random,
            ctx.checkpoint, partial(ctx.nursery("inner").__aenter__),
        ]  # fmt: skip

        async def step() -> None:
            for call in calls:
                with pytest.raises(DurableMisuse, match=r"inside the step 'outer'.*call it from the handler") as raised:
                    await call()
                refused.append(str(raised.value))

            async def branch() -> None:
                with pytest.raises(DurableMisuse, match="inside the step"):
                    await ctx.sleep("inner", 1)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(branch)

        def sync_step() -> None:
            with pytest.raises(DurableMisuse, match="inside the step 'sync'"):
                trio.from_thread.run(ctx.sleep, "inner", 1)

        await ctx.step("outer", step)
        await ctx.step("sync", sync_step)
        await ctx.step("inner", int)  # the name is free
        return (await ctx.uuid()).hex

    journal = Journal()
    value_of(await run(handler, journal))
    assert len(refused) == 9
    assert list(journal.records) == ["outer", "sync", "inner", "uuid-1"]


async def test_refused_names_and_options_record_nothing(autojump_clock: Clock) -> None:
    """Misuse has to be mended by code, so it must not become part of a history."""

    async def handler(ctx: Context) -> None:
        with pytest.raises(InvalidOption):
            await ctx.step("", int)
        with pytest.raises(InvalidOption):
            await ctx.sleep("x", -1)
        with pytest.raises(InvalidOption):
            await ctx.step("x", int, retry=cast(Any, "often"))
        with pytest.raises(InvalidOption):
            await ctx.step("x", int, retry=0)
        with pytest.raises(InvalidOption):
            await ctx.step("x", int, timeout=0)
        with pytest.raises(InvalidOption):
            await ctx.step("x", cast(Any, 5))
        with pytest.raises(InvalidOption, match="on_parent_close"):
            ctx.nursery("x", on_parent_close=cast(Any, "keep"))

    journal = Journal()
    assert (await run(handler, journal)).kind == "completed"
    assert journal.records == {}


async def test_now_uuid_and_random_are_the_same_at_a_replay(autojump_clock: Clock) -> None:
    """A handler that decides by them would take another way."""
    seen: list[object] = []

    async def handler(ctx: Context) -> None:
        seen.append(
            (await ctx.now(), await ctx.uuid(), await ctx.random(), await ctx.random(), await ctx.now(name="n"))
        )
        await ctx.sleep("rest", 10)

    journal = Journal()
    await run_through(handler, journal)
    assert seen[0] == seen[1]
    assert set(journal.records) == {"now-1", "uuid-1", "random-1", "random-2", "n", "rest"}
    now, _, first, second, _ = cast("tuple[datetime, UUID, float, float, datetime]", seen[0])
    assert now.tzinfo is UTC
    assert 0.0 <= first < 1.0
    assert first != second


async def test_numbered_names_are_refused_beside_branches(autojump_clock: Clock) -> None:
    """Branches come in any order: one would get the other's time."""

    async def handler(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:

            async def branch() -> None:
                with pytest.raises(DurableMisuse, match="needs a name="):
                    await ctx.now()
                await ctx.now(name="branch")

            nursery.start_soon(branch)
        await ctx.now()

    journal = Journal()
    assert (await run(handler, journal)).kind == "completed"
    assert set(journal.records) == {"branch", "now-1"}


# --- non-determinism -------------------------------------------------------------------------------------------------


async def test_renamed_step_is_told_with_both_histories_and_not_run(autojump_clock: Clock) -> None:
    """The new name's function would run although the old one's has."""
    journal = Journal()
    ran: list[str] = []

    def handler_of(second: str) -> Callable[[Context], Awaitable[None]]:
        async def handler(ctx: Context) -> None:
            await ctx.step("load", ran.append, "load")
            await ctx.step(second, ran.append, second)
            await ctx.sleep("rest", 60)

        return handler

    assert (await run(handler_of("charge"), journal)).kind == "waiting"
    before = dict(journal.records)
    outcome = await run(handler_of("charge-card"), journal)
    assert outcome.kind == "failed"  # for good: another attempt of the same code does the same
    assert error_of(outcome)["type"] == "pgconductor.errors.NonDeterminism"
    message = error_of(outcome)["message"]
    assert "asks for step 'charge-card', where step 'charge' was recorded" in message
    assert "Recorded: step 'load', step 'charge', sleep 'rest'" in message
    assert "Asked for in this run: step 'load', step 'charge-card'" in message
    assert ran == ["load", "charge"]
    assert journal.records == before


async def test_other_kind_is_told(autojump_clock: Clock) -> None:
    """A sleep's record would be taken for a value (B36)."""
    journal = Journal()

    async def before(ctx: Context) -> None:
        await ctx.sleep("x", 60)

    async def after(ctx: Context) -> None:
        await ctx.step("x", int)

    assert (await run(before, journal)).kind == "waiting"
    assert error_of(await run(after, journal))["type"] == "pgconductor.errors.NonDeterminism"


# --- suspension ------------------------------------------------------------------------------------------------------


async def test_wait_records_itself_and_then_gives_up_the_execution(autojump_clock: Clock) -> None:
    """A handler that waits would keep its slot, or wait for what nobody knows of."""
    began = trio.current_time()
    journal = Journal()

    async def handler(ctx: Context) -> None:
        await ctx.sleep("rest", 1000)

    outcome = await run(handler, journal)
    assert (outcome.kind, outcome.result) == ("waiting", '["rest"]')
    assert trio.current_time() - began == pytest.approx(SETTLE)
    assert journal.records["rest"].outcome is None


@pytest.mark.parametrize("duration", [0, 0.0, SETTLE / 2])
async def test_short_sleep_simply_returns(autojump_clock: Clock, duration: float) -> None:
    """Each would cost a claim and a replay."""

    async def handler(ctx: Context) -> str:
        await ctx.sleep("nap", duration)
        return "awake"

    journal = Journal()
    outcome, suspensions = await run_through(handler, journal)
    assert (value_of(outcome), suspensions) == ("awake", 0)
    assert journal.records["nap"].outcome == "elapsed"


async def test_nothing_is_cut_while_an_operation_is_active(autojump_clock: Clock) -> None:
    """A step beside a parked wait would be cut and run again."""
    ended: list[float] = []
    began = trio.current_time()

    async def slow() -> None:
        await trio.sleep(50)
        ended.append(trio.current_time() - began)

    async def handler(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "rest", 1000)
            nursery.start_soon(ctx.step, "slow", slow)

    journal = Journal()
    outcome, suspensions = await run_through(handler, journal)
    assert (outcome.kind, suspensions, len(ended)) == ("completed", 1, 1)


async def test_result_is_delivered_before_the_execution_is_given_up(autojump_clock: Clock) -> None:
    """Of two that wait, the one that watches for the time to suspend reads that the other's wait has ended: that other
    has to have its turn first, or what it was told is told to nobody again.
    """
    got: list[int] = []
    journal = Journal()
    hold = trio.Event()

    async def handler(ctx: Context) -> None:
        async def first() -> None:
            await ctx.invoke("slow", child)

        async def second() -> None:
            got.append(await ctx.invoke("quick", child))
            await trio.lowlevel.checkpoint()  # between operations a task may yield
            await ctx.step("after", int)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(second)
            await ctx.step("hold", hold.wait)

    async with trio.open_nursery() as nursery:

        async def resolve() -> None:
            await trio.sleep(5)
            journal.wake("quick", "completed", "7")
            # At this instant the settle time is long over, and the step that kept the handler going ends.
            hold.set()

        nursery.start_soon(resolve)
        outcome = await run(handler, journal)
    assert outcome.kind == "waiting"
    assert got == [7]
    assert "after" in journal.records


async def test_busy_loop_does_not_cut_a_branch_between_two_operations(autojump_clock: Clock) -> None:
    """Time passes though no task has its turn: by time alone a branch that is about to go on would be cut."""
    journal = Journal(ends={"quick": ("completed", "7")})
    reached = trio.Event()

    async def handler(ctx: Context) -> None:
        async def branch() -> None:
            await ctx.invoke("quick", child)
            for _ in range(4):
                autojump_clock.jump(10 * SETTLE)  # another execution computes
                await trio.lowlevel.checkpoint()
            reached.set()
            await ctx.step("after", int)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "slow", child)
            nursery.start_soon(branch)
            await ctx.step("tell", partial(journal_wake, journal))

    outcome = await run(handler, journal)
    assert outcome.kind == "waiting"
    assert reached.is_set()
    assert "after" in journal.records


async def journal_wake(journal: Journal) -> None:
    """Tell the process that something was resolved, as the control channel does."""
    while "quick" not in journal.records:
        await trio.sleep(0.001)
    assert journal.durable is not None
    journal.durable.nudge()


async def test_awaited_waits_are_named_when_the_execution_is_given_up(autojump_clock: Clock) -> None:
    """Should one have been told and not delivered, the database would not wake the execution again."""

    async def handler(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "a", 100)
            nursery.start_soon(ctx.invoke, "b", child)

    outcome = await run(handler, Journal())
    assert sorted(json.loads(outcome.result or "")) == ["a", "b"]


async def test_word_of_a_result_before_its_task_is_parked_is_not_lost(autojump_clock: Clock) -> None:
    """It came between the record of the wait and the parking: the handler, busy with a step, would hear of it at the
    next heartbeat.
    """
    journal = Journal(ends={"quick": ("completed", "7")})
    got = trio.Event()
    start_waits = journal.start_waits

    async def start_and_tell(waits: Sequence[Mapping[str, object]]) -> list[Record]:
        records = await start_waits(waits)
        assert journal.durable is not None
        journal.durable.nudge()
        return records

    journal.start_waits = start_and_tell  # type: ignore[method-assign]

    async def handler(ctx: Context) -> int:
        result = 0

        async def branch() -> None:
            nonlocal result
            result = await ctx.invoke("quick", child)
            got.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(branch)
            await ctx.step("until it came", got.wait)
        return result

    with trio.fail_after(1000):
        assert value_of(await run(handler, journal)) == 7


async def test_lost_answer_of_a_reading_is_made_up_for_by_loading(autojump_clock: Clock) -> None:
    """What was told is told once: the execution would wait for ever."""
    journal = Journal(is_answer_lost=True)

    async def handler(ctx: Context) -> int:
        async with trio.open_nursery() as nursery:

            async def resolve() -> None:
                await trio.sleep(1)
                journal.wake("c", "completed", "3")

            nursery.start_soon(ctx.step, "resolve", resolve)
            return await ctx.invoke("c", child)

    assert value_of(await run(handler, journal)) == 3
    assert (journal.readings, journal.loads) == (1, 2)


async def test_reading_that_is_cancelled_while_another_reads_is_made_up_for(autojump_clock: Clock) -> None:
    """A nudge that one task took and did not act upon would be lost to the others."""
    journal = Journal(gate=trio.Event())
    scope = trio.CancelScope()

    async def handler(ctx: Context) -> int:
        result = 0

        async def ask() -> None:
            nonlocal result
            result = await ctx.invoke("b", child)

        async def doomed() -> None:
            with scope:
                await ctx.invoke("a", child)

        async with trio.open_nursery() as nursery:

            async def drive() -> None:
                await trio.testing.wait_all_tasks_blocked()
                journal.wake("x", "completed", "0")  # the first to be parked reads, and is held
                await trio.testing.wait_all_tasks_blocked()
                assert journal.readings == 1
                journal.wake("b", "completed", "4")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
                await trio.testing.wait_all_tasks_blocked()
                assert journal.gate is not None
                journal.gate.set()
                while result != 4:
                    await trio.sleep(0.01)

            nursery.start_soon(ctx.invoke, "x", child)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(doomed)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            await ctx.step("drive", drive)
        return result

    with trio.fail_after(100):
        assert value_of(await run(handler, journal)) == 4


async def test_due_time_counts_from_when_it_was_read(autojump_clock: Clock) -> None:
    """A replay that is busy with a step would sleep for the step's time more."""
    journal = Journal()
    at: list[float] = []

    async def handler(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "wake", 1)

            async def branch() -> None:
                await ctx.step("busy", trio.sleep, 90)
                await ctx.sleep("long", 100)
                at.append(trio.current_time())

            nursery.start_soon(branch)

    async def replay(ctx: Context) -> None:
        await ctx.sleep("first", 50)
        await ctx.step("busy", trio.sleep, 30)

    began = trio.current_time()
    outcome, _ = await run_through(handler, journal)
    assert outcome.kind == "completed"
    assert at[-1] - began == pytest.approx(190, abs=0.5)
    other = Journal()
    began = trio.current_time()

    async def sleeps_beside(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replay, ctx)

            async def rest() -> None:
                await ctx.sleep("rest", 70)
                at.append(trio.current_time() - began)

            nursery.start_soon(rest)

    await run_through(sleeps_beside, other)
    assert at[-1] == pytest.approx(70, abs=0.5)


async def test_database_whose_clock_is_behind_is_asked_ever_less(autojump_clock: Clock) -> None:
    """A clock that is an hour behind would be asked 200 times a second."""
    journal = Journal()

    async def handler(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "s", 1)
            await trio.testing.wait_all_tasks_blocked()
            journal.due_at["s"] += 100
            nursery.start_soon(ctx.step, "busy", trio.sleep, 200)

    assert (await run(handler, journal)).kind == "completed"
    assert 5 < journal.readings < 150


async def test_handler_may_swallow_and_raise_as_it_likes_when_it_is_given_up(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The recorded suspension wins over whatever an unwinding ends with."""

    async def swallows(ctx: Context) -> str:
        try:
            await ctx.sleep("rest", 60)
        except BaseException:  # noqa: BLE001  # what a handler should not do
            return "swallowed"
        return "slept"

    async def raises(ctx: Context) -> str:
        try:
            await ctx.sleep("rest", 60)
        finally:
            if not caplog.records:
                raise ValueError("in finally")
        return "slept"

    async def nested(ctx: Context) -> str:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            outer.start_soon(ctx.sleep, "rest", 60)
            inner.start_soon(ctx.sleep, "rest 2", 60)
        return "slept"

    for handler, warning in ((swallows, "and returned; that is ignored"), (raises, "ValueError"), (nested, None)):
        caplog.clear()
        outcome, suspensions = await run_through(handler, Journal())
        assert (value_of(outcome), suspensions) == ("slept", 1)
        assert [bool(warning and warning in record.getMessage()) for record in caplog.records] == [True] * bool(warning)


async def test_operations_while_unwinding_do_not_begin(autojump_clock: Clock) -> None:
    """`finally` runs at every suspension: a step in it would be done each time, and one under a shield recorded where
    the next run does not look.
    """
    ran: list[str] = []
    refused: list[str] = []

    async def handler(ctx: Context) -> str:
        try:
            await ctx.sleep("rest", 60)
            await ctx.step("work", ran.append, "work")
        finally:
            with contextlib.suppress(DurableMisuse):
                with trio.CancelScope(shield=True):
                    await ctx.step("shielded", ran.append, "shielded")
                refused.append("it was done")
            await ctx.step("cleanup", ran.append, "cleanup")
        return "done"

    journal = Journal()
    outcome, suspensions = await run_through(handler, journal)
    assert (value_of(outcome), suspensions) == ("done", 1)
    assert ran == ["work", "shielded", "cleanup"]
    assert refused == ["it was done"]


async def test_cancelled_handler_may_record_under_a_shield(autojump_clock: Clock) -> None:
    """What is cancelled by request does not run again: what it undoes may be a step."""
    journal, interruption = Journal(), Interruption()
    begun = trio.Event()

    async def handler(ctx: Context) -> None:
        try:
            begun.set()
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await ctx.step("refund", int)

    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            await begun.wait()
            interruption.cancel("enough")

        nursery.start_soon(cancel)
        assert (await run(handler, journal, interruption)).kind == "cancelled"
    assert "refund" in journal.records


async def test_where_a_wait_cannot_be_parked_it_is_refused_and_not_recorded(autojump_clock: Clock) -> None:
    """Unwinding would not reach it, or a replay would begin its deadline anew."""

    async def handler(ctx: Context) -> str:
        with pytest.raises(DurableMisuse, match="under a shield"), trio.CancelScope(shield=True):
            await ctx.sleep("a", 1)
        with pytest.raises(DurableMisuse, match=r"move_on_after.*begin anew at each replay.*timeout="):
            await bounded(partial(ctx.invoke, "a", child))
        await bounded(partial(ctx.sleep, "a", 1))
        return "unreached"

    async def bounded(call: Callable[[], Awaitable[object]]) -> None:
        with trio.fail_after(100):
            await call()

    async def bounded_nursery(ctx: Context) -> None:
        with trio.move_on_after(100):
            async with ctx.nursery("n") as nursery:
                nursery.invoke(child)

    for refused in (handler, bounded_nursery):
        journal = Journal()
        outcome = await run(refused, journal)
        assert outcome.kind == "retried"
        assert "under a deadline" in json.dumps(error_of(outcome))
        assert journal.records == {}


async def test_scopes_without_a_finite_deadline_and_steps_anywhere_are_fine(autojump_clock: Clock) -> None:
    """Most handlers have nurseries of their own; a step ends by itself wherever it is."""

    async def handler(ctx: Context) -> str:
        with trio.CancelScope():
            await ctx.sleep("a", 60)
        with trio.move_on_after(100):
            await ctx.step("b", int)
        with trio.CancelScope(shield=True):
            await ctx.step("c", int)
        with trio.move_on_after(math.inf):
            await ctx.sleep("d", 60)
        return "fine"

    outcome, suspensions = await run_through(handler, Journal())
    assert (value_of(outcome), suspensions) == ("fine", 2)


@pytest.mark.parametrize("timeout", [None, 1000.0])
async def test_deadlines_outside_of_the_handler_are_none_of_its_own(
    autojump_clock: Clock, timeout: float | None
) -> None:
    """The attempt's own timeout, and deadlines around the orchestrator that change while it runs, are the engine's."""

    async def handler(ctx: Context) -> str:
        outside.deadline = trio.current_time() + 500
        await ctx.sleep("a", 0)
        with pytest.raises(DurableMisuse, match="under a deadline"), trio.fail_after(700):
            await ctx.sleep("b", 0)
        return "fine"

    with trio.fail_after(5000) as outside:
        assert value_of(await run(handler, Journal(), timeout=timeout)) == "fine"


async def test_wait_from_a_task_of_somebody_else_is_refused(autojump_clock: Clock) -> None:
    """A task that the handler's scope does not reach would go on waiting when the handler has been given up."""
    refused = trio.Event()

    async with trio.open_nursery() as elsewhere:

        async def handler(ctx: Context) -> None:
            async def stray() -> None:
                with pytest.raises(DurableMisuse, match="not of this handler"):
                    await ctx.sleep("a", 60)
                refused.set()

            elsewhere.start_soon(stray)
            await ctx.step("until refused", refused.wait)

        journal = Journal()
        assert (await run(handler, journal)).kind == "completed"
    assert list(journal.records) == ["until refused"]


async def test_context_is_closed_with_its_handler(autojump_clock: Clock) -> None:
    """A task that outlives its handler would write for a claim that is over, and hang."""
    kept: list[Context] = []

    async def uses(ctx: Context) -> None:
        kept.append(ctx)
        await ctx.step("a", int)

    async def uses_nothing(ctx: Context) -> None:
        kept.append(ctx)

    for handler in (uses, uses_nothing):
        await run(handler, Journal())
        with pytest.raises(DurableMisuse, match="has ended"):
            await kept[-1].step("b", int)


async def test_timeout_of_an_attempt_counts_anew_after_each_wait(autojump_clock: Clock) -> None:
    """A handler that sleeps for a day would time out by sleeping."""

    async def handler(ctx: Context) -> str:
        for n in range(5):
            await ctx.step(f"work-{n}", trio.sleep, 3)
            await ctx.sleep(f"rest-{n}", 100)
        return "done"

    outcome, suspensions = await run_through(a_task(handler, timeout=4.0), Journal())
    assert (value_of(outcome), suspensions) == ("done", 5)

    async def slow(ctx: Context) -> None:
        await ctx.step("slow", trio.sleep, 5)

    assert summary(await run(slow, Journal(), timeout=4.0)) == ("retried", "timeout")


async def test_checkpoint_gives_way_to_a_stop_only(autojump_clock: Clock) -> None:
    """A long handler has places where it may be interrupted; elsewhere it has its grace."""
    journal, interruption = Journal(), Interruption()
    is_draining = False
    interruption.drains = lambda: is_draining
    passed: list[int] = []

    async def handler(ctx: Context) -> None:
        nonlocal is_draining
        await ctx.checkpoint()
        passed.append(1)
        is_draining = True
        await ctx.step("kept", int)
        passed.append(2)
        await ctx.checkpoint()
        passed.append(3)

    outcome = await run(handler, journal, interruption)
    assert (outcome.kind, passed) == ("released", [1, 2])
    assert "kept" in journal.records


async def test_context_variables_do_not_leak_out_of_steps(autojump_clock: Clock) -> None:
    """The mark of a step would refuse what comes after it."""

    async def fails() -> None:
        raise ValueError

    async def handler(ctx: Context) -> None:
        with contextlib.suppress(StepFailed):
            await ctx.step("a", fails)
        await ctx.step("b", threading.get_ident)
        await ctx.sleep("c", 0)

    assert (await run(handler, Journal())).kind == "completed"


# --- children --------------------------------------------------------------------------------------------------------


async def test_ends_of_a_child_are_typed_and_the_same_at_a_replay(autojump_clock: Clock) -> None:
    """A parent could not catch its child's failure (B18)."""
    errors = {
        "failed": json.dumps({"type": "ValueError", "message": "bad", "traceback": "line 1"}),
        "late": json.dumps({"type": "timeout", "message": "slow"}),
        "dead": json.dumps({"type": "deadline", "message": "too late"}),
        "cancelled": json.dumps({"reason": "enough"}),
        "silent": json.dumps({"reason": None}),
    }
    journal = Journal(ends={n: ("cancelled" if "reason" in e else "failed", e) for n, e in errors.items()})
    seen: list[list[tuple[type, str]]] = []

    async def handler(ctx: Context) -> None:
        this: list[tuple[type, str]] = []
        for name in errors:
            with pytest.raises((ChildFailed, ChildCancelled)) as raised:
                await ctx.invoke(name, child)
            assert raised.value.execution_id is not None
            this.append((type(raised.value), str(raised.value)))
        seen.append(this)
        await ctx.sleep("rest", 60)

    outcome, _ = await run_through(handler, journal)
    assert outcome.kind == "completed"
    assert [kind for kind, _ in seen[0]] == [ChildFailed, ChildTimedOut, ChildTimedOut, ChildCancelled, ChildCancelled]
    assert "was cancelled: enough" in seen[0][3][1]
    assert seen[0] == seen[1]


@pytest.mark.parametrize("text", ["null", "0", "false"])
async def test_falsy_result_of_a_child_is_its_result(autojump_clock: Clock, text: str) -> None:
    """`result || null` made nothing of 0, "" and false (B32)."""

    async def anything() -> Any:
        raise AssertionError

    async def handler(ctx: Context) -> Any:
        return await ctx.invoke("c", a_task(anything))

    outcome, _ = await run_through(handler, Journal(ends={"c": ("completed", text)}))
    assert outcome.result == text


async def test_cancelling_an_invoke_from_the_handlers_own_scope_cancels_the_child(autojump_clock: Clock) -> None:
    """Structured concurrency would end at the database."""
    journal = Journal()

    async def handler(ctx: Context) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "c", child)
            await ctx.step("beside", trio.sleep, 1)
            nursery.cancel_scope.cancel()
        return "on"

    assert value_of(await run(handler, journal)) == "on"
    assert journal.closed == [(("c",), "its parent's scope was cancelled")]


@pytest.mark.parametrize("how", ["stop", "abandon", "cancel", "suspend", "outside", "timeout"])
async def test_unwinding_that_the_engine_began_leaves_children_alone(autojump_clock: Clock, how: str) -> None:
    """A shutdown would cancel what the fleet is working on."""
    journal, interruption = Journal(), Interruption()

    async def handler(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.invoke, "c", child)
            if how != "suspend":
                nursery.start_soon(ctx.step, "beside", trio.sleep, 1000)

    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await trio.sleep(1)
            if how == "outside":
                interruption.note_end()  # as the pipeline does
                nursery.cancel_scope.cancel()
            elif how not in ("suspend", "timeout"):
                getattr(interruption, how)()

        nursery.start_soon(end)
        await run(handler, journal, interruption, timeout=5.0 if how == "timeout" else None)
    assert journal.records["c"].outcome is None
    assert journal.closed == []


# --- nurseries -------------------------------------------------------------------------------------------------------


async def test_nursery_waits_for_all_and_makes_them_together(autojump_clock: Clock) -> None:
    """Children that are made one by one, or results that come late, or never."""
    journal = Journal(ends={f"fan/{n}": ("completed", str(n * n)) for n in range(1200)})

    async def handler(ctx: Context) -> Any:
        async with ctx.nursery("fan") as nursery:
            handles = [nursery.invoke(child) for _ in range(1200)]
            step = nursery.start_step("s", int, 5)
            with pytest.raises(DurableMisuse, match="has not ended"):
                step.value  # noqa: B018
        return sum([await handle.result() for handle in handles]) + step.value

    outcome, _ = await run_through(handler, journal)
    assert value_of(outcome) == sum(n * n for n in range(1200)) + 5
    assert journal.batches == [500, 500, 200]


async def test_failed_child_cancels_the_others_and_replays_give_the_same_group(autojump_clock: Clock) -> None:
    """The group would depend on when the process was restarted."""
    bad = json.dumps({"type": "ValueError", "message": "bad"})
    journal = Journal(ends={"fan/1": ("failed", bad), "fan/2": ("completed", "2")})
    groups: list[list[str]] = []
    slow_runs = 0

    async def slow() -> None:
        nonlocal slow_runs
        slow_runs += 1
        await trio.sleep(1000)

    async def handler(ctx: Context) -> None:
        try:
            async with ctx.nursery("fan") as nursery:
                for _ in range(4):
                    nursery.invoke(child)
                nursery.start_step("slow", slow)
                nursery.start_step("tell", partial(tell, journal))
        except ExceptionGroup as group:
            groups.append([str(error) for error in group.exceptions])
        await ctx.sleep("rest", 60)

    outcome, suspensions = await run_through(handler, journal)
    assert outcome.kind == "completed"
    assert suspensions >= 1
    assert len(groups) >= 2
    assert len(groups[0]) == 1
    assert "child 'fan/1'" in groups[0][0]
    assert all(group == groups[0] for group in groups)
    names, reason = journal.closed[0]
    assert set(names) == {"fan/0", "fan/3"}
    assert reason == "nursery fan of its parent was left by an error"
    assert slow_runs == 1  # a replay knows that it was cancelled


async def tell(journal: Journal) -> None:
    """Tell the process, when the children are made, that something was resolved."""
    while "fan/1" not in journal.records:
        await trio.sleep(0.001)
    assert journal.durable is not None
    journal.durable.nudge()


async def test_failed_step_and_error_of_the_block_cancel_children(autojump_clock: Clock) -> None:
    """Children would run on for a parent that has given up."""

    async def fails() -> None:
        raise ValueError("step")

    types: list[list[type]] = []

    async def by_step(ctx: Context) -> None:
        try:
            async with ctx.nursery("fan") as nursery:
                nursery.invoke(child)
                await nursery.start_children()
                nursery.start_step("s", fails)
        except ExceptionGroup as group:
            types.append([type(error) for error in group.exceptions])

    async def by_block(ctx: Context) -> None:
        try:
            async with ctx.nursery("fan") as nursery:
                nursery.invoke(child)
                await nursery.start_children()
                raise KeyError("block")
        except ExceptionGroup as group:
            types.append([type(error) for error in group.exceptions])

    handlers: list[tuple[Callable[[Context], Awaitable[None]], type]] = [(by_step, StepFailed), (by_block, KeyError)]
    for handler, kind in handlers:
        journal = Journal()
        types.clear()
        outcome, _ = await run_through(handler, journal)
        assert outcome.kind == "completed", outcome
        assert types
        assert all(those == [kind] for those in types)
        assert journal.closed[0][0] == ("fan/0",)


async def test_error_of_a_result_is_in_the_group_once(autojump_clock: Clock) -> None:
    """It is both what the block raised and what the child ended with."""
    bad = json.dumps({"type": "ValueError", "message": "bad"})
    journal = Journal(ends={"fan/0": ("failed", bad)})

    async def handler(ctx: Context) -> int:
        try:
            async with ctx.nursery("fan") as nursery:
                await nursery.invoke(child).result()
        except ExceptionGroup as group:
            return len(group.exceptions)
        return 0

    outcome, _ = await run_through(handler, journal)
    assert value_of(outcome) == 1


async def test_result_inside_the_block_waits_for_that_child_alone(autojump_clock: Clock) -> None:
    """A block that goes on by one result would wait for all."""
    journal = Journal(ends={"fan/0": ("completed", "1")})
    order: list[str] = []

    async def handler(ctx: Context) -> None:
        async with ctx.nursery("fan") as nursery:
            first, second = nursery.invoke(child), nursery.invoke(child)
            order.append(f"first {await first.result()}")
            await ctx.step("between", partial(journal.end, "fan/1", "completed", "2"))
        order.append(f"second {await second.result()}")

    outcome, _ = await run_through(handler, journal)
    assert outcome.kind == "completed"
    assert order[-2:] == ["first 1", "second 2"]


async def test_child_that_was_never_made_has_no_result(autojump_clock: Clock) -> None:
    """Waiting for it would be for ever: nobody is to end it."""

    async def handler(ctx: Context) -> str:
        handle: Any = None
        left: Any = None
        with contextlib.suppress(ExceptionGroup):
            async with ctx.nursery("fan") as nursery:
                left = nursery
                handle = nursery.invoke(child)
                raise ValueError
        with pytest.raises(DurableMisuse, match="was not made"):
            await handle.result()
        with pytest.raises(DurableMisuse, match="has been left"):
            left.invoke(child)
        return "refused"

    journal = Journal()
    assert value_of(await run(handler, journal)) == "refused"
    assert journal.records == {}


async def test_children_whose_making_was_cut_are_cancelled_or_made(autojump_clock: Clock) -> None:
    """A scope inside the block is cancelled while they are made: they may have been, or not."""
    journal = Journal()
    start_waits = journal.start_waits
    cuts: list[trio.CancelScope] = []

    async def cut(waits: Sequence[Mapping[str, object]]) -> list[Record]:
        records = await start_waits(waits)
        if cuts:
            cuts.pop().cancel()
            await trio.sleep_forever()
        return records

    journal.start_waits = cut  # type: ignore[method-assign]

    async def goes_on(ctx: Context) -> Any:
        async with ctx.nursery("fan") as nursery:
            handle = nursery.invoke(child)
            with trio.CancelScope() as scope:
                cuts.append(scope)
                await handle.result()
            journal.end("fan/0", "completed", "8")
        return await handle.result()

    assert value_of((await run_through(goes_on, journal))[0]) == 8

    async def leaves(ctx: Context) -> None:
        with contextlib.suppress(ExceptionGroup):
            async with ctx.nursery("fan") as nursery:
                handle = nursery.invoke(child)
                with trio.CancelScope() as scope:
                    cuts.append(scope)
                    await handle.result()
                raise ValueError

    journal.records.clear()
    journal.told.clear()
    assert (await run(leaves, journal)).kind == "completed"
    assert journal.closed[-1][0] == ("fan/0",)


async def test_outer_scope_and_failed_child_at_once_leak_nothing_of_ours(autojump_clock: Clock) -> None:
    """An exception that is the nursery's own would come out of it."""
    bad = json.dumps({"type": "ValueError", "message": "bad"})
    journal = Journal()
    leaked: list[BaseException] = []

    async def handler(ctx: Context) -> None:
        with trio.CancelScope() as scope:
            try:
                async with ctx.nursery("fan") as nursery:
                    nursery.invoke(child)

                    async def both() -> None:
                        while "fan/0" not in journal.records:
                            await trio.sleep(0.001)
                        journal.wake("fan/0", "failed", bad)
                        while journal.readings == 0:
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    nursery.start_step("both", both)
            except BaseException as error:
                leaked.append(error)
                raise

    await run(handler, journal)
    assert leaked
    assert "_ChildFailed" not in repr(leaked)


async def test_names_in_a_nursery_are_its_own(autojump_clock: Clock) -> None:
    """Two nurseries, or a child and a step, would share records."""

    async def handler(ctx: Context) -> None:
        async with ctx.nursery("a") as one, ctx.nursery("b") as other:
            one.invoke(child)
            other.invoke(child)
            one.invoke_as("named", child.bind())
            with pytest.raises(DurableMisuse, match="has a child 'named' already"):
                one.invoke_as("named", child.bind())
        with pytest.raises(DurableMisuse, match="for a nursery"):
            async with ctx.nursery("a"):
                pass

    journal = Journal(ends=dict.fromkeys(("a/0", "b/0", "a/named"), ("completed", "0")))
    outcome, _ = await run_through(handler, journal)
    assert outcome.kind == "completed"
    assert set(journal.records) == {"a/0", "b/0", "a/named"}


async def test_leaving_a_nursery_of_many_unmade_children_by_an_error_is_quick(autojump_clock: Clock) -> None:
    """20,000 children that were asked for and not made took minutes to leave."""
    from time import perf_counter

    async def handler(ctx: Context) -> None:
        with contextlib.suppress(ExceptionGroup):
            async with ctx.nursery("fan") as nursery:
                for _ in range(20_000):
                    nursery.invoke(child)
                raise ValueError

    begun = perf_counter()
    assert (await run(handler, Journal())).kind == "completed"
    assert perf_counter() - begun < 5.0


async def test_end_of_a_long_step_lets_the_handler_begin_the_next(autojump_clock: Clock) -> None:
    """A branch waits beside a step that takes long: given up at its end, the handler waits for what it would cancel."""

    async def slow() -> None:
        await trio.sleep(1)

    async def handler(ctx: Context) -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "long", 1000)
            await ctx.step("one", slow)
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        return await ctx.step("two", lambda: "two")

    for _ in range(20):  # in which order tasks run is left to chance
        assert (await run(handler, Journal())).kind == "completed"
