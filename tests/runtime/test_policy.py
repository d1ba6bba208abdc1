"""Timeouts, deadlines, verdicts, retention and recorded errors on a real database, with a real orchestrator."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import psycopg
import pytest
import trio

from pgconductor import Conductor, Context, ExecutionFailed, NoRetry, Orchestrator, RetryAfter, Snooze
from pgconductor.testing import DatabaseClock, drain

CANARY = "4111-1111-1111-1111"


async def test_a_timeout_costs_an_attempt_and_is_recorded(conductor: Conductor, query: Any) -> None:
    """A handler that hangs would hold its slot for ever, or fail for good the first time."""

    @conductor.task(timeout=0.05, max_attempts=2, backoff=0)
    async def hang() -> None:
        await trio.sleep_forever()

    @conductor.task(max_attempts=2, backoff=0)
    def poll(ctx: Context) -> None:
        while True:
            ctx.check_cancelled()

    async with conductor:
        handles = [await hang.invoke(), await poll.options(timeout=0.05, max_attempts=1).invoke()]
        drained = await Orchestrator(conductor, tasks=[hang, poll]).drain()
        assert (drained.retried, drained.failed) == (1, 2)
        for handle in handles:
            with pytest.raises(ExecutionFailed, match=r"timeout: the handler ran for more than 0\.05 s") as caught:
                await handle.result(timeout=0)
            assert caught.value.error["type"] == "timeout"
    kept = query(
        "select task, attempt, jsonb_path_query_array(errors, '$[*].type') from pgconductor.executions order by 1"
    )
    assert kept == [("hang", 2, ["timeout", "timeout"]), ("poll", 1, ["timeout"])]


async def test_a_deadline_ends_what_runs_and_what_has_not_begun(
    conductor: Conductor, pgconductor_clock: DatabaseClock, query: Any
) -> None:
    """Work that nobody wants any more would be done, or tried again for hours."""
    runs: list[str] = []

    @conductor.task(backoff=60)
    async def work(name: str) -> None:
        runs.append(name)
        if name == "fails":
            raise ValueError("bad")
        await trio.sleep_forever()

    now = pgconductor_clock.now()
    async with conductor:
        await work.options(deadline=timedelta(seconds=30)).invoke(name="late")
        await work.options(deadline=now + timedelta(hours=1), tags=["a", "b"]).invoke(name="hangs")
        await work.options(deadline=now + timedelta(hours=1, seconds=30)).invoke(name="fails")
        pgconductor_clock.set(now + timedelta(hours=1) - timedelta(seconds=2))
        drained = await drain(Orchestrator(conductor, tasks=[work]), clock=pgconductor_clock)
        assert (drained.failed, drained.retried) == (3, 0)
    assert sorted(runs) == ["fails", "hangs"]
    errors = query("select errors -> 0 ->> 'type', errors -> 0 ->> 'message' from pgconductor.executions order by 2")
    assert [kind for kind, _ in errors] == ["deadline"] * 3
    assert "ValueError: bad" in errors[2][1]
    assert query("select tags from pgconductor._private_finished where tags is not null") == [(["a", "b"],)]


async def test_verdicts_of_handlers_are_obeyed(
    conductor: Conductor, pgconductor_clock: DatabaseClock, query: Any
) -> None:
    """A snooze would use up attempts, a retry would come by the back-off, what is hopeless would be tried again."""
    runs: list[str] = []

    @conductor.task(max_attempts=2, backoff=99_999)
    async def say(what: str) -> str:
        runs.append(what)
        first = runs.count(what) == 1
        if what == "no retry":
            raise NoRetry("hopeless") from KeyError("x")
        if what == "retry after" and first:
            raise RetryAfter(timedelta(minutes=1))
        if what == "snooze" and runs.count(what) < 5:
            raise Snooze(60)
        return what

    async with conductor:
        for what in ("no retry", "retry after", "snooze"):
            await say.invoke(what=what)
        drained = await drain(Orchestrator(conductor, tasks=[say]), clock=pgconductor_clock, horizon=3600)
        assert (drained.completed, drained.failed) == (2, 1)
    assert sorted(runs) == ["no retry", *["retry after"] * 2, *["snooze"] * 5]
    assert query(
        "select payload ->> 'what', state::text, attempt, coalesce(jsonb_array_length(errors), 0)"
        " from pgconductor.executions order by 1"
    ) == [("no retry", "failed", 1, 1), ("retry after", "completed", 2, 1), ("snooze", "completed", 1, 0)]


async def test_backoff_and_deadline_of_an_invocation_and_of_a_task(conductor: Conductor, query: Any) -> None:
    """What one invocation asks for is forgotten by the worker, or a deadline of the task by the producer."""

    @conductor.task(backoff=3600, deadline=1800)
    async def fail() -> None:
        raise ValueError

    async with conductor:
        late = await fail.invoke()  # its next attempt would begin after the deadline
        soon = await fail.options(backoff=[7, 8], deadline=timedelta(hours=2)).invoke()
        broken = query("select pgconductor.invoke('fail', backoff => '{\"kind\": \"odd\"}')")[0][0]
        await Orchestrator(conductor, tasks=[fail]).drain()
    found = query("select id, state::text, errors -> -1 ->> 'type' from pgconductor.executions")
    rows = {row[0]: row[1:] for row in found}
    assert rows[late.id] == ("failed", "deadline")
    assert rows[soon.id] == ("scheduled", "ValueError")
    assert rows[broken] == ("failed", "pgconductor.errors.InvalidOption")
    ((wait,),) = query("select run_at - now() from pgconductor.executions where id = %s", soon.id)
    assert timedelta() < wait < timedelta(seconds=8)


async def test_rows_are_kept_as_long_as_their_task_says(conductor: Conductor, query: Any) -> None:
    """A day's worth would be kept for ever, or what must be kept would be gone."""

    @conductor.task(keep_completed=0, keep_failed=timedelta(hours=1), max_attempts=1)
    async def brief(fail: bool) -> None:
        if fail:
            raise ValueError

    @conductor.task(keep_completed=None)
    async def lasting() -> None:
        pass

    async with conductor:
        await brief.invoke(fail=False)
        await brief.invoke(fail=True)
        await lasting.invoke()
        await Orchestrator(conductor, tasks=[brief, lasting]).drain()
    kept = query("select task, state::text, expires_at - finished_at from pgconductor._private_finished order by 1")
    assert [row[:2] for row in kept] == [("brief", "failed"), ("lasting", "completed")]
    assert kept[0][2] == timedelta(hours=1)
    assert kept[1][2] is None or kept[1][2] > timedelta(days=36_500)


async def test_values_of_rows_in_the_servers_errors_are_not_stored(
    conductor: Conductor, pgconductor_dsn: str, query: Any
) -> None:
    """The table of failures, and whatever shows it, would hold what the application's own tables protect."""
    query("create table cards (number text primary key, amount int check (amount > 0))")
    query("insert into cards values (%s, 1)", CANARY)

    @conductor.task(max_attempts=1)
    def charge(how: str) -> None:
        with psycopg.connect(pgconductor_dsn) as conn:
            try:
                if how == "unique":
                    conn.execute("insert into cards values (%s, 1)", [CANARY])
                else:
                    conn.execute("insert into cards values (%s, -1)", [CANARY])
            except psycopg.Error as error:
                if how == "wrapped":
                    raise RuntimeError(f"cannot charge: {error!r}: {error}") from None
                raise

    async with conductor:
        for how in ("unique", "check", "wrapped"):
            await charge.invoke(how=how)
        assert (await Orchestrator(conductor, tasks=[charge]).drain()).failed == 3
    stored = json.dumps(query("select errors::text from pgconductor.executions"))
    assert CANARY not in stored
    assert "violates check constraint" in stored
    assert "UniqueViolation" in stored
