"""Steps, sleeps and children under faults and bad input, in the test's own process.

Catalogue nos. 22 (lost replies), 33 (deadlocks among families), 42, 45, 46, 48 and 51 (bad input and misuse), 52 and
56. Killed processes are test_failpoints.py's and test_twelve_commits.py's, pairs of verbs are
tests/sql/test_pairs.py's.
"""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import trio
from faults.inside import LIMIT, query, until
from faults.site import Onlooker

from pgconductor import (
    ChildCancelled,
    ChildFailed,
    Conductor,
    Context,
    DurableMisuse,
    InvalidOption,
    NoRetry,
    Orchestrator,
    StepFailed,
    Task,
    Unavailable,
    open_pool,
)
from pgconductor.db.calls import Calls, NewStep, NewWait
from pgconductor.db.execute import run_sync
from pgconductor.db.transactions import PoolTransactions
from pgconductor.model import Outcome
from pgconductor.testing.audit import check_sync, install_audit_sync
from pgconductor.testing.proxy import ChaosProxy, open_chaos_proxy

EITHER_WAY = pytest.mark.parametrize("how", ["request", "reply"])

Handler = Callable[[Context], Awaitable[Any]]


_LIVE = (
    "select (select count(*) from pgconductor._private_executions)"
    " + (select count(*) from pgconductor._private_closings)"
)


class Stage:
    """A conductor on a queue "q", whose tasks run in this process, with every change of the database written down."""

    def __init__(self, dsn: str, engine_dsn: str | None = None) -> None:
        self.dsn = dsn
        self.conductor = Conductor(engine_dsn or dsn)
        self.runs: Counter[str] = Counter()
        self.seen: list[Any] = []
        with psycopg.connect(dsn, autocommit=True) as conn:
            install_audit_sync(conn)

    def task(self, handler: Callable[..., Any], name: str, **options: Any) -> Task[..., Any]:
        return self.conductor.task(queue="q", name=name, **options)(handler)

    def step(self, name: str, value: Any = None) -> Callable[[], Awaitable[Any]]:
        """A step's function that counts its runs."""

        async def fn() -> Any:
            self.runs[name] += 1
            await trio.lowlevel.checkpoint()
            return value

        return fn

    async def run(
        self, tasks: list[Task[..., Any]], *, meanwhile: Callable[[], Awaitable[None]] | None = None, **options: Any
    ) -> None:
        """Run workers until nothing is live."""
        worker = self.conductor.create_worker(queue="q", tasks=tasks, sweep_interval=0.2, **options)
        orchestrator = Orchestrator(self.conductor, workers=[worker], migrate=False, lease=10.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(orchestrator.run)
            if meanwhile is not None:
                await meanwhile()
            with closing(Onlooker(self.dsn)) as onlooker:
                await until(lambda: onlooker.rows(_LIVE) == [(0,)])
            nursery.cancel_scope.cancel()

    def invoke(self, task: str, payload: str = "{}") -> UUID:
        made = query(self.dsn, "select pgconductor.invoke(%s, %s::jsonb, queue => 'q')", task, payload)
        return UUID(str(made[0][0]))

    def live(self) -> int:
        """How many are under way, or still to be cancelled."""
        return int(query(self.dsn, _LIVE)[0][0])

    def ends(self) -> dict[str, list[Any]]:
        """State and last error by task, of what has ended."""
        found: dict[str, list[Any]] = {}
        for task, state, error in query(
            self.dsn,
            "select task, state::text, errors -> -1 ->> 'type' from pgconductor._private_finished order by created_at",
        ):
            found.setdefault(task, []).append(state if error is None else (state, error))
        return found

    def check(self) -> None:
        """The audit is clean, nothing is left, and no deadlock was broken."""
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            assert check_sync(conn, settled=True) == []
        assert query(self.dsn, "select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]


# --- ambiguous replies: no. 22 ---


def cut(proxy: ChaosProxy, how: str, tag: bytes) -> None:
    (proxy.cut_request if how == "request" else proxy.cut_reply)(tag)


@EITHER_WAY
@pytest.mark.parametrize("verb", ["save_steps", "start_waits", "load_history", "flush", "claim"])
async def test_lost_step_or_child_is_recorded_once(pgconductor_dsn: str, verb: str, how: str) -> None:
    """Sent again, it makes a second child, or a second value; taken for done, it is lost. What is told once is told."""
    tag = b"._private_claim_" if verb == "claim" else f".{verb}(".encode()
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        stage = Stage(pgconductor_dsn, proxy.dsn)

        async def young(n: int) -> str:
            stage.runs[f"child {n}"] += 1
            await trio.sleep(0.03)
            return f"child {n}"

        async def old(ctx: Context) -> None:
            for n in range(3):
                stage.seen.append((f"step {n}", await ctx.step(f"step {n}", stage.step(f"step {n}", str(uuid4())))))
                stage.seen.append((f"child {n}", await ctx.invoke(f"child {n}", offspring, n=n)))
                await ctx.sleep(f"nap {n}", 0.03)

        offspring = stage.task(young, "young")
        parent = stage.task(old, "old")
        stage.invoke("old")

        async def lose() -> None:
            for _ in range(3):
                cut(proxy, how, tag)
                with trio.move_on_after(5.0):  # there may be no such call any more
                    while proxy.cut_tag is not None and stage.live():  # the proxy has no event
                        await trio.sleep(0.005)
            proxy.cut_tag = None

        with trio.fail_after(LIMIT):
            await stage.run([parent, offspring], meanwhile=lose)
        assert proxy.cuts >= 1  # of read_waits see test_lost_readings.py
    assert stage.ends() == {"old": ["completed"], "young": ["completed"] * 3}
    assert stage.runs == Counter({f"{kind} {n}": 1 for n in range(3) for kind in ("step", "child")})
    ((steps,),) = query(pgconductor_dsn, "select steps from pgconductor._private_finished where task = 'old'")
    stored = {record["name"]: record["value"] for record in steps if record["kind"] != "sleep"}
    assert set(stage.seen) == set(stored.items())
    stage.check()


@EITHER_WAY
@pytest.mark.parametrize("verb", ["request_close", "close_children"])
async def test_lost_request_to_cancel_a_child_is_made_again(pgconductor_dsn: str, verb: str, how: str) -> None:
    """The child runs on, and nobody wants it."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        stage = Stage(pgconductor_dsn, proxy.dsn)
        begun = trio.Event()

        async def young() -> None:
            begun.set()
            await trio.sleep_forever()

        async def old(ctx: Context) -> str:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ctx.invoke, "child", offspring)
                # A step, so that nothing is given up meanwhile.
                await ctx.step("until it has begun", begun.wait)
                cut(proxy, how, f".{verb}(".encode())
                nursery.cancel_scope.cancel()
            return "gone on"

        offspring = stage.task(young, "young")
        parent = stage.task(old, "old")
        stage.invoke("old")
        with trio.fail_after(LIMIT):
            await stage.run([parent, offspring])
        assert proxy.cuts == 1
    assert stage.ends() == {"old": ["completed"], "young": ["cancelled"]}
    stage.check()


async def test_transaction_on_a_connection_that_died_unnoticed_is_begun_anew(pgconductor_dsn: str) -> None:
    """A step waits for ever for the reply to its BEGIN, and its execution with it: nobody else may run that."""
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        conn.execute("create table effects (n int)")
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        stage = Stage(pgconductor_dsn)
        # The engine's own connections are on the straight line, those of the pool are not.
        async with open_pool(proxy.dsn, kwargs={"autocommit": True}) as pool:
            transactions = PoolTransactions(pool)
            async with transactions.open("first", "read committed") as first:
                pid = first.conn.info.backend_pid
            proxy.blackhole(pid)
            with pytest.raises(Unavailable, match="no reply"), trio.fail_after(LIMIT):
                async with transactions.open("second", "read committed"):
                    pass
            with trio.fail_after(LIMIT):
                async with transactions.open("third", "read committed") as third:
                    await third.conn.execute("insert into effects values (1)")
                    await third.commit()
    assert query(pgconductor_dsn, "select n from effects") == [(1,)]
    stage.check()


# --- suspension ---


async def test_step_beside_a_parked_branch_runs_to_its_end(pgconductor_dsn: str) -> None:
    """One branch sleeps, and the handler is given up under the feet of the other: its step runs twice."""
    stage = Stage(pgconductor_dsn)

    async def slow() -> int:
        stage.runs["slow"] += 1
        await trio.sleep(0.4)
        return 1

    async def both(ctx: Context) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ctx.sleep, "nap", 1.0)
            nursery.start_soon(ctx.step, "slow", slow)

    task = stage.task(both, "both")
    stage.invoke("both")
    await stage.run([task])
    assert stage.ends() == {"both": ["completed"]}
    assert stage.runs == Counter({"slow": 1})
    ((claims,),) = query(pgconductor_dsn, "select claim_no from pgconductor._private_finished")
    assert claims == 2, "it was not given up at all: the test shows nothing"
    stage.check()


async def test_parked_parent_leaves_its_children_alone(pgconductor_dsn: str) -> None:
    """To give up a parent looks like its cancellation, and its children are cancelled with it."""
    stage = Stage(pgconductor_dsn)

    async def young() -> int:
        await trio.sleep(0.3)
        return 1

    async def old(ctx: Context) -> int:
        async with ctx.nursery("all") as nursery:
            handles = [nursery.invoke(offspring) for _ in range(3)]
        total: int = await ctx.invoke("single", offspring)
        for handle in handles:
            total += await handle.result()
        return total

    offspring = stage.task(young, "young")
    parent = stage.task(old, "old")
    stage.invoke("old")
    await stage.run([parent, offspring])
    assert stage.ends() == {"old": ["completed"], "young": ["completed"] * 4}
    assert query(pgconductor_dsn, "select result, claim_no from pgconductor._private_finished where task = 'old'") == [
        (4, 3)
    ]
    stage.check()


async def test_result_that_nobody_keeps_reaches_the_parent(pgconductor_dsn: str) -> None:
    """Retention of the child removes what its parent waits for. (No. 56.)"""
    stage = Stage(pgconductor_dsn)

    async def young() -> str:
        await trio.sleep(0.1)
        return "kept"

    async def old(ctx: Context) -> str:
        return await ctx.invoke("child", offspring)

    offspring = stage.task(young, "young", keep_completed=0)
    parent = stage.task(old, "old")
    stage.invoke("old")
    await stage.run([parent, offspring])
    assert query(pgconductor_dsn, "select task, result from pgconductor._private_finished") == [("old", "kept")]
    stage.check()


async def test_maintenance_removes_nothing_of_those_that_wait(pgconductor_dsn: str) -> None:
    """The clock of retention goes by creation or by the child: a history is gone while it is needed. (No. 56.)"""
    stage = Stage(pgconductor_dsn)

    async def young() -> str:
        await trio.lowlevel.checkpoint()
        return "long ago"

    async def old(ctx: Context) -> list[object]:
        first = await ctx.step("first", stage.step("first", "done"))
        child = await ctx.invoke("child", offspring)
        await ctx.sleep("nap", 1.5)
        return [first, child, await ctx.step("last", stage.step("last", "too"))]

    offspring = stage.task(young, "young", keep_completed=0.001)
    parent = stage.task(old, "old")
    stage.invoke("old")

    async def maintain() -> None:
        asleep = "select count(*) from pgconductor._private_executions where state = 'waiting' and run_at is not null"
        await until(lambda: query(pgconductor_dsn, asleep) == [(1,)])
        for _ in range(3):
            query(pgconductor_dsn, "select * from pgconductor.maintain()")
        assert query(pgconductor_dsn, "select count(*) from pgconductor._private_steps") == [(1,)]

    await stage.run([parent, offspring], meanwhile=maintain)
    assert stage.runs == Counter({"first": 1, "last": 1})
    assert query(pgconductor_dsn, "select result from pgconductor._private_finished where task = 'old'") == [
        (["done", "long ago", "too"],)
    ]
    stage.check()


async def test_parent_whose_time_is_up_while_its_child_completes_ends_once(pgconductor_dsn: str) -> None:
    """It goes on with the result, or ends by its deadline: both at once, or neither, if the two cross. (No. 53.)"""
    stage = Stage(pgconductor_dsn)

    async def young(n: int) -> int:
        await trio.sleep(0.2 * n)
        return n

    async def old(ctx: Context, n: int) -> int:
        try:
            result = int(await ctx.invoke("child", offspring, n=n))
        except ChildFailed:
            result = -1
        stage.seen.append((n, result))
        return result

    offspring = stage.task(young, "young")
    parent = stage.task(old, "old")

    async def invoke() -> None:
        async with stage.conductor:
            for n in range(20):
                await parent.options(deadline=2.0).invoke(n=n)

    await stage.run([parent, offspring], meanwhile=invoke, concurrency=60)
    parents = query(
        pgconductor_dsn,
        "select (payload->>'n')::int, state::text, result, errors -> -1 ->> 'type' from pgconductor._private_finished"
        " where task = 'old' order by 1",
    )
    assert [n for n, *_ in parents] == list(range(20))
    for n, state, result, error in parents:
        assert (state, result, error) in [("completed", n, None), ("completed", -1, None), ("failed", None, "deadline")]
        assert {told for number, told in stage.seen if number == n} <= {n, -1}
        assert len({told for number, told in stage.seen if number == n}) <= 1
    assert {state for _, state, *_ in parents} == {"completed", "failed"}, "they did not cross: the test shows nothing"
    stage.check()


# --- cancellation: no. 52 ---


@pytest.mark.parametrize("what", ["sleep", "child"])
async def test_cancelled_while_it_waits_it_never_runs_again_and_its_children_end(
    pgconductor_dsn: str, what: str
) -> None:
    """Nobody runs it, so nobody is there to be told: it would wake up, or its child would run on."""
    stage = Stage(pgconductor_dsn)

    async def young() -> None:
        stage.runs["child"] += 1
        await trio.sleep_forever()

    async def old(ctx: Context) -> None:
        stage.runs["parent"] += 1
        if what == "sleep":
            await ctx.sleep("nap", 3600)
        await ctx.invoke("child", offspring)

    offspring = stage.task(young, "young")
    parent = stage.task(old, "old")
    one = stage.invoke("old")

    async def cancel() -> None:
        waits = "select count(*) from pgconductor._private_executions where state = 'waiting'"
        await until(lambda: query(pgconductor_dsn, waits) == [(1,)] and (what == "sleep" or stage.runs["child"] == 1))
        assert query(pgconductor_dsn, "select status from pgconductor.cancel(%s, 'enough')", [one]) == [("cancelled",)]

    await stage.run([parent, offspring], meanwhile=cancel)
    assert stage.runs["parent"] == 1
    assert stage.ends() == {"old": ["cancelled"], **({"young": ["cancelled"]} if what == "child" else {})}
    stage.check()


async def test_parent_of_a_cancelled_child_is_told_and_may_go_on(pgconductor_dsn: str) -> None:
    """It waits for ever, or fails where it could have caught it."""
    stage = Stage(pgconductor_dsn)

    async def young() -> None:
        await trio.sleep_forever()

    async def old(ctx: Context) -> str | None:
        try:
            await ctx.invoke("child", offspring)
        except ChildCancelled as error:
            return error.reason
        return "completed"

    offspring = stage.task(young, "young")
    parent = stage.task(old, "old")
    stage.invoke("old")

    async def cancel() -> None:
        family = "select count(*) from pgconductor._private_executions where state = 'waiting' or task = 'young'"
        await until(lambda: query(pgconductor_dsn, family) == [(2,)])
        query(pgconductor_dsn, "select * from pgconductor.cancel_matching('not this one', 10, null, 'young')")

    await stage.run([parent, offspring], meanwhile=cancel)
    assert query(pgconductor_dsn, "select result from pgconductor._private_finished where task = 'old'") == [
        ("not this one",)
    ]
    stage.check()


# --- bad input: nos. 42, 45, 46, 48, 51 ---


class Hostile(Exception):
    def __str__(self) -> str:
        return "a NUL \0 and half a pair \ud800" + "x" * 100_000


@pytest.mark.parametrize("value", ["\0", "\ud800", math.nan, math.inf, {"a": ["\0"]}], ids=repr)
async def test_step_whose_value_cannot_be_stored_fails_and_nothing_else(pgconductor_dsn: str, value: object) -> None:
    """One value fails the statement that holds those of others, again and again. (No. 42.)"""
    stage = Stage(pgconductor_dsn)

    async def bad(ctx: Context) -> str:
        try:
            await ctx.step("bad", stage.step("bad", value))
        except StepFailed as error:
            good: str = await ctx.step("good", stage.step("good", " and on"))
            return str(error.error.get("type")) + good
        return "stored"

    async def good(ctx: Context) -> int:
        return sum([await ctx.step(f"step {n}", stage.step("other", n)) for n in range(5)])

    tasks = [stage.task(bad, "bad"), stage.task(good, "good")]
    for _ in range(5):
        stage.invoke("bad")
        stage.invoke("good")
    await stage.run(tasks)
    assert stage.ends() == {"bad": ["completed"] * 5, "good": ["completed"] * 5}
    assert stage.runs == Counter({"bad": 5, "good": 5, "other": 25})
    results = query(pgconductor_dsn, "select distinct result from pgconductor._private_finished where task = 'bad'")
    assert results == [("pgconductor.errors.InvalidPayload and on",)]
    stage.check()


async def test_step_that_fails_hostilely_is_data(pgconductor_dsn: str) -> None:
    """The error's text cannot be stored, and the step is tried for ever. (Nos. 42, 47.)"""
    stage = Stage(pgconductor_dsn)

    async def raise_it() -> None:
        raise Hostile

    async def handler(ctx: Context) -> list[int]:
        lengths = list[int]()
        for name in ("one", "two"):
            try:
                await ctx.step(name, raise_it)
            except StepFailed as error:
                lengths.append(len(error.error["message"]))
            await ctx.sleep(f"nap {name}", 0.05)
        return lengths

    task = stage.task(handler, "handler")
    stage.invoke("handler")
    await stage.run([task])
    ((lengths,),) = query(pgconductor_dsn, "select result from pgconductor._private_finished")
    assert len(lengths) == 2
    assert max(lengths) < 10_000
    stage.check()


NAMES = ["", "x" * 129, "\0", "\ud800", "é" * 65]


@pytest.mark.parametrize("name", NAMES, ids=["empty", "long", "NUL", "surrogate", "long in bytes"])
async def test_name_that_cannot_be_stored_is_refused_before_anything_is_done(pgconductor_dsn: str, name: str) -> None:
    """The step runs, and then cannot be recorded. (Nos. 42, 49.)"""
    stage = Stage(pgconductor_dsn)

    async def handler(ctx: Context) -> None:
        refused = 0
        for operation in (
            lambda: ctx.step(name, stage.step("step")),
            lambda: ctx.sleep(name, 1),
            lambda: ctx.invoke(name, offspring),
        ):
            try:
                await operation()
            except (InvalidOption, DurableMisuse):
                refused += 1
        assert refused == 3

    async def young() -> None:
        await trio.lowlevel.checkpoint()

    offspring = stage.task(young, "young")
    task = stage.task(handler, "handler", max_attempts=1)
    stage.invoke("handler")
    await stage.run([task, offspring])
    assert stage.ends() == {"handler": ["completed"]}
    assert stage.runs == Counter()
    stage.check()


async def test_value_of_a_step_is_at_first_what_a_replay_gets(pgconductor_dsn: str) -> None:
    """A tuple at first and a list later: the handler takes another way at its replay. (No. 46.)"""
    stage = Stage(pgconductor_dsn)
    values: list[Any] = [
        (1, 2),
        {1: "a"},
        -0.0,
        1e22,
        10**20,
        datetime(2030, 1, 1, tzinfo=UTC),
        b"bytes",
        None,
        "",
        0,
        {},
    ]

    def plain(value: Any) -> Callable[[], Any]:
        async def fn() -> Any:
            await trio.lowlevel.checkpoint()
            return value

        return fn

    async def handler(ctx: Context) -> None:
        told: list[str] = []
        for n, value in enumerate(values):
            try:
                told.append(repr(await ctx.step(f"step {n}", plain(value))))
            except StepFailed as error:
                told.append(f"refused: {error.error['type']}")
        stage.seen.append(told)
        await ctx.sleep("nap", 0.2)

    task = stage.task(handler, "handler")
    stage.invoke("handler")
    await stage.run([task])
    first, second = stage.seen
    assert first == second
    assert [first[7], first[8], first[9], first[10]] == ["None", "''", "0", "{}"]
    stage.check()


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, 10**18, timedelta(days=-1)], ids=repr)
async def test_sleep_of_no_length_is_refused(pgconductor_dsn: str, seconds: float | timedelta) -> None:
    """It overflows in the database, where it holds up what is sent with it. (No. 48.)"""
    stage = Stage(pgconductor_dsn)

    async def handler(ctx: Context) -> None:
        with pytest.raises(InvalidOption):
            await ctx.sleep("nap", seconds)

    task = stage.task(handler, "handler", max_attempts=1)
    stage.invoke("handler")
    await stage.run([task])
    assert stage.ends() == {"handler": ["completed"]}
    stage.check()


@pytest.mark.parametrize("seconds", [0, 25 * 86400, 100 * 365 * 86400], ids=["none", "25 days", "a century"])
async def test_sleep_at_the_edges_is_one_like_any_other(pgconductor_dsn: str, seconds: float) -> None:
    """25 days in milliseconds are no int any more. (No. 48.)"""
    stage = Stage(pgconductor_dsn)

    async def handler(ctx: Context) -> None:
        await ctx.sleep("nap", seconds)

    task = stage.task(handler, "handler", max_attempts=1)
    one = stage.invoke("handler")

    async def cancel() -> None:
        if seconds:
            due = "select date_part('epoch', run_at - created_at) from pgconductor._private_executions"
            await until(lambda: query(pgconductor_dsn, f"{due} where state = 'waiting'") != [])
            assert query(pgconductor_dsn, due)[0][0] == pytest.approx(seconds, abs=30)
            query(pgconductor_dsn, "select * from pgconductor.cancel(%s)", [one])

    await stage.run([task], meanwhile=cancel)
    assert stage.ends() == {"handler": ["cancelled" if seconds else "completed"]}
    stage.check()


async def test_handlers_that_misuse_steps_are_told_and_harm_nobody(pgconductor_dsn: str) -> None:
    """A name used twice gets another's value; a step in a step is recorded in no order; a late one is recorded for
    nobody. (No. 51.)
    """
    stage = Stage(pgconductor_dsn)
    late: list[BaseException] = []
    contexts: list[Context] = []

    async def twice(ctx: Context) -> None:
        await ctx.step("name", stage.step("first"))
        with pytest.raises(DurableMisuse):
            await ctx.step("name", stage.step("never"))
        with pytest.raises(DurableMisuse):
            await ctx.sleep("name", 0)

    async def inside(ctx: Context) -> None:
        async def outer() -> None:
            await ctx.step("inner", stage.step("never"))

        await ctx.step("outer", outer)

    async def outlived(ctx: Context) -> None:
        await ctx.step("own", stage.step("own"))
        contexts.append(ctx)

    async def reordered(ctx: Context) -> None:
        stage.runs["reordered"] += 1
        first, second = ("a", "b") if stage.runs["reordered"] == 1 else ("b", "a")
        assert await ctx.step(first, stage.step(first, first)) == first
        assert await ctx.step(second, stage.step(second, second)) == second
        await ctx.sleep("nap", 0.1)

    async def inserted(ctx: Context) -> None:
        stage.runs["inserted"] += 1
        if stage.runs["inserted"] > 1:
            await ctx.step("new", stage.step("never"))
        await ctx.step("old", stage.step("old"))
        await ctx.sleep("nap", 0.1)

    async def renamed(ctx: Context) -> None:
        stage.runs["renamed"] += 1
        if stage.runs["renamed"] == 1:
            await ctx.step("same", stage.step("same"))
        else:
            await ctx.sleep("same", 0)
        await ctx.sleep("nap", 0.1)

    handlers: list[Handler] = [twice, inside, outlived, reordered, inserted, renamed]
    tasks = [stage.task(handler, handler.__name__, max_attempts=2) for handler in handlers]
    for handler in handlers:
        stage.invoke(handler.__name__)

    async def use_late() -> None:
        await until(lambda: len(contexts) == 1)
        await until(lambda: "outlived" in stage.ends())
        try:
            await contexts[0].step("late", stage.step("never"))
        except DurableMisuse as error:
            late.append(error)

    await stage.run(tasks, meanwhile=use_late)
    assert len(late) == 1
    assert stage.runs["never"] == 0
    ends = stage.ends()
    # Found by its name, whatever the order: what is recorded is told, and nothing is done twice.
    assert [ends[name] for name in ("twice", "outlived", "reordered")] == [["completed"]] * 3
    assert (stage.runs["a"], stage.runs["b"], stage.runs["old"], stage.runs["same"]) == (1, 1, 1, 1)
    assert ends["inside"] == [("failed", "pgconductor.errors.DurableMisuse")]
    for name in ("inserted", "renamed"):
        assert ends[name] == [("failed", "pgconductor.errors.NonDeterminism")]
    stage.check()


async def test_task_that_invokes_itself_for_ever_ends(pgconductor_dsn: str) -> None:
    """It fills the database. (No. 51.)"""
    stage = Stage(pgconductor_dsn)

    async def again(ctx: Context, n: int) -> int:
        return await ctx.invoke("me", task, n=n + 1)

    task = stage.task(again, "again", max_attempts=1)
    stage.invoke("again", '{"n": 0}')
    await stage.run([task])
    ends = stage.ends()["again"]
    failed = ("failed", "pgconductor.errors.ChildFailed")
    assert ends == [*[failed] * 16, ("failed", "pgconductor.errors.DurableMisuse")]
    stage.check()


async def test_step_of_a_megabyte_is_stored_and_a_larger_one_refused(pgconductor_dsn: str) -> None:
    """A value of 50 MB is in every replay, and in the memory of every worker. (No. 45.)"""
    stage = Stage(pgconductor_dsn)

    async def handler(ctx: Context) -> list[int]:
        small = await ctx.step("small", stage.step("small", "x" * 1_000_000))
        try:
            large = len(await ctx.step("large", stage.step("large", "x" * 50_000_000)))
        except StepFailed:
            large = 0
        await ctx.sleep("nap", 0.1)
        return [len(small), large]

    task = stage.task(handler, "handler")
    stage.invoke("handler")
    await stage.run([task])
    assert query(pgconductor_dsn, "select result from pgconductor._private_finished") == [([1_000_000, 0],)]
    assert stage.runs == Counter({"small": 1, "large": 1})
    stage.check()


async def test_hundreds_of_steps_are_replayed(pgconductor_dsn: str) -> None:
    """A long history is loaded in one piece, and found by name. (No. 45: 10,000 in benchmarks.)"""
    stage = Stage(pgconductor_dsn)

    async def handler(ctx: Context) -> int:
        total = 0
        for n in range(300):
            total += await ctx.step(f"step {n}", stage.step("step", n))
        await ctx.sleep("nap", 0.05)
        return total

    task = stage.task(handler, "handler")
    stage.invoke("handler")
    await stage.run([task])
    assert query(pgconductor_dsn, "select result from pgconductor._private_finished") == [(44_850,)]
    assert stage.runs == Counter({"step": 300})
    stage.check()


async def test_parent_that_catches_one_failed_child_of_three_completes(pgconductor_dsn: str) -> None:
    """A child's failure that was caught comes up again at a replay, or is lost there."""
    stage = Stage(pgconductor_dsn)

    async def young(name: str) -> str:
        await trio.sleep(0.02)
        if name == "bad":
            raise NoRetry("on purpose")
        return name

    async def old(ctx: Context) -> list[str]:
        told: list[str] = []
        for name in ("good", "bad", "better"):
            try:
                told.append(await ctx.invoke(name, offspring, name=name))
            except ChildFailed as error:
                told.append(str(error.error["message"]))
        return told

    offspring = stage.task(young, "young")
    parent = stage.task(old, "old")
    stage.invoke("old")
    await stage.run([parent, offspring])
    assert query(pgconductor_dsn, "select result from pgconductor._private_finished where task = 'old'") == [
        (["good", "on purpose", "better"],)
    ]
    stage.check()


# --- deadlocks: no. 33 ---


def test_eight_workers_that_flush_each_others_families_never_deadlock(pgconductor_dsn: str) -> None:
    """Parents and children are in two partitions, in the hands of eight workers; each flush locks rows of both."""
    rounds, seeds = 25, 16
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        install_audit_sync(conn)
        for queue in ("q", "r"):
            conn.execute("select pgconductor.register_queue(%s)", [queue])
        conn.execute("select pgconductor.invoke('t', queue => 'q') from generate_series(1, %s)", [seeds])
    errors: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            with psycopg.connect(pgconductor_dsn, autocommit=True, options="-c deadlock_timeout=20ms") as conn:
                calls = Calls("pgconductor")
                owner = uuid4()
                conn.execute(
                    "select pgconductor.register_orchestrator(%s, 'w', 600, '1', 1, '{q,r}', '{[],[]}', '{1,1}')",
                    [owner],
                )
                barrier.wait(20)
                for turn in range(rounds):
                    for queue in ("q", "r") if (turn + number) % 2 else ("r", "q"):
                        _one_turn(conn, calls, owner, queue, turn)
                    run_sync(conn, calls.close_children())
        except BaseException as error:  # noqa: BLE001  # told by the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert errors == []
    assert query(pgconductor_dsn, "select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]
    with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
        assert check_sync(conn) == []
        ((families,),) = conn.execute("select count(*) from pgconductor._test_records where change = 'resolved'")
    assert families > 100, "too few met: the test shows nothing"


def _one_turn(conn: psycopg.Connection[Any], calls: Calls, owner: UUID, queue: str, turn: int) -> None:
    """Claim some; a part waits for children on the other queue, a part ends, a part is cancelled."""
    claimed = run_sync(conn, calls.claim(queue, owner, ["t"], 12)).claimed
    outcomes: list[Outcome] = []
    for n, claim in enumerate(claimed):
        child: dict[str, object] = {"task": "t", "queue": "r" if queue == "q" else "q", "payload": {}}
        if claim.claim_no == 1 and claim.parent_id is None:
            steps = [NewStep(claim.id, claim.claim_no, "step", "step", 0, "1")]
            run_sync(conn, calls.save_steps(owner, steps))
            waits = [
                {"name": f"c{k}", "kind": "child", "position": k, "scope": "s" if not k else None, "on_close": "cancel",
                 "child": child}
                for k in range(3)
            ]  # fmt: skip
            run_sync(
                conn, calls.start_waits(owner, [NewWait(claim.id, claim.claim_no, json.dumps(wait)) for wait in waits])
            )
            kind = "waiting"
        else:
            run_sync(conn, calls.load_history(owner, claim.id, claim.claim_no))
            kind = ("completed", "failed", "retried", "released")[(n + turn) % 4]
        error = '{"type": "E"}' if kind in ("failed", "retried") else None
        outcomes.append(Outcome(claim.id, claim.claim_no, kind, None, error, keep=5000.0))
    if outcomes:
        run_sync(conn, calls.flush(owner, outcomes[:: -1 if turn % 2 else 1]))
    if turn % 5 == 0:
        run_sync(conn, calls.cancel([claim.id for claim in claimed[:2]], "enough"))
    if turn % 3 == 0:
        conn.execute("select pgconductor.invoke('t', queue => %s) from generate_series(1, 4)", [queue])
