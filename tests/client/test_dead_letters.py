"""What failed or was cancelled: listing it, and letting it begin anew, one by one or by filter."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from client.database import live, rows
from client.worker_by_hand import WorkerByHand, open_worker

from pgconductor import Conductor, InvalidOption, Retry, RetryCounts, State, TrioConnection, Unavailable
from pgconductor.db.calls import NewExecution
from pgconductor.db.execute import run_sync
from pgconductor.testing.proxy import open_chaos_proxy

NAMES = ["pay", "mail"]


@pytest.fixture
def worker(pgconductor_dsn: str) -> Iterator[WorkerByHand]:
    """Claims and ends what is on the queue "default"."""
    with open_worker(pgconductor_dsn, NAMES) as worker:
        yield worker


def _fail(worker: WorkerByHand, task: str, error: str, count: int = 1, dedupe_key: str | None = None) -> list[UUID]:
    """Executions that have failed."""
    executions = [NewExecution(task, "{}", "default", dedupe_key=dedupe_key)] * count
    ids = [invoked.id for invoked in run_sync(worker.conn, worker.calls.invoke_many(executions))]
    for claimed in worker.claim():
        assert claimed.id in ids
        worker.fail(claimed, type=error, message=f"about {task}", traceback="Traceback ...")
    return ids


async def test_dead_letters_are_told_by_page_the_latest_first(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """A page that leaves one out or shows one twice, or an error without its text."""
    ids = [*_fail(worker, "pay", "ValueError", 3), *_fail(worker, "mail", "timeout", 2)]
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        cancelled = await conductor.invoke("mail")
        await cancelled.cancel("tired")
        all_of_them = await conductor.dead_letters()
        assert {letter.id for letter in all_of_them} == {*ids, cancelled.id}
        assert [letter.finished_at for letter in all_of_them] == sorted(
            (letter.finished_at for letter in all_of_them), reverse=True
        )
        first = await conductor.dead_letters(limit=4)
        rest = await conductor.dead_letters(limit=4, after=first[-1])
        assert [*first, *rest] == all_of_them
        assert len(rest) == 2
        latest = all_of_them[0]
        assert (latest.state, latest.task, latest.reason, latest.error) == (State.CANCELLED, "mail", "tired", None)
        (pay, *_) = await conductor.dead_letters(task="pay")
        assert pay.error is not None
        assert (pay.error.type, pay.error.message, pay.error.attempt) == ("ValueError", "about pay", 1)
        assert (pay.queue, pay.attempts, pay.crashes, pay.generation) == ("default", 1, 0, 0)
        assert len(await conductor.dead_letters(states="failed", queue="default")) == 5
        assert await conductor.dead_letters(queue="elsewhere") == []
    with conductor.sync() as client:
        assert client.dead_letters(limit=4, after=first[-1]) == rest
        assert [each.id for each in client.dead_letters(states=[State.CANCELLED])] == [cancelled.id]


async def test_retried_one_runs_again_under_its_id(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """A new id that nobody waits for, attempts that are used up already, or a completed one that runs twice."""
    conductor = Conductor(pgconductor_dsn)
    (failed,) = _fail(worker, "pay", "ValueError")
    async with conductor:
        cancelled = await conductor.invoke("mail")
        await cancelled.cancel()
        done = await conductor.invoke("pay")
        worker.finish_all()
        going = await conductor.invoke("pay", delay=60)
        stranger = uuid4()
        answers = await conductor.retry(failed, cancelled, done, going, stranger)
        assert answers == {
            failed: Retry.RETRIED,
            cancelled.id: Retry.RETRIED,
            done.id: Retry.COMPLETED,
            going.id: Retry.LIVE,
            stranger: Retry.UNKNOWN,
        }
        assert await conductor.retry() == {}
        errors = await conductor.execution_errors(failed)
        assert [error.type for error in errors] == ["ValueError"]
        claimed = {each.id: each for each in worker.claim()}
        assert claimed.keys() == {failed, cancelled.id}
        assert {each.attempt for each in claimed.values()} == {1}
        for each in claimed.values():
            worker.complete(each, 7)
        assert await cancelled.result(timeout=0) == 7
        assert await conductor.dead_letters() == []
    with conductor.sync() as client:
        assert client.retry(failed) == {failed: Retry.COMPLETED}


async def test_retry_belongs_to_the_callers_transaction(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """Begun anew although the caller rolled back."""
    ids = _fail(worker, "pay", "ValueError", 2)
    conductor = Conductor(pgconductor_dsn)
    async with conductor, await TrioConnection.connect(pgconductor_dsn) as conn:
        await conductor.retry(ids[0], conn=conn)
        await conn.rollback()
        assert live(pgconductor_dsn) == 0
        await conductor.retry(ids[0], conn=conn)
        await conn.commit()
    assert live(pgconductor_dsn) == 1
    with conductor.sync() as client, psycopg.connect(pgconductor_dsn) as sync_conn:
        client.retry(ids[1], conn=sync_conn)
        sync_conn.rollback()
        assert live(pgconductor_dsn) == 1


LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({"everything": True}, 5),
        ({"everything": True, "limit": 2}, 2),
        ({"task": "pay"}, 3),
        ({"queue": "default"}, 5),
        ({"queue": "other"}, 0),
        ({"error_type": "timeout"}, 2),
        ({"task": "pay", "error_type": "timeout"}, 0),
        ({"states": "cancelled"}, 1),
        ({"states": ["failed", "cancelled"]}, 6),
        ({"finished_after": LONG_AGO}, 5),
        ({"finished_after": FAR_AHEAD}, 0),
        ({"finished_before": LONG_AGO}, 0),
        ({"finished_before": FAR_AHEAD}, 5),
    ],
)
async def test_all_that_fit_begin_anew_and_no_others(
    pgconductor_dsn: str, worker: WorkerByHand, filters: dict[str, Any], count: int
) -> None:
    """What somebody cancelled begins anew, or what nobody meant."""
    _fail(worker, "pay", "ValueError", 3)
    _fail(worker, "mail", "timeout", 2)
    conductor = Conductor(pgconductor_dsn)
    async with conductor:
        cancelled = await conductor.invoke("mail")
        await cancelled.cancel()
        assert await conductor.retry_matching(**filters) == RetryCounts(count, 0)
    assert live(pgconductor_dsn) == count


def test_what_fails_again_meanwhile_is_not_retried_for_ever(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """A command that never ends, because a worker fails each again as soon as it is ready."""
    ids = _fail(worker, "pay", "ValueError", 3)
    with Conductor(pgconductor_dsn).sync() as client:
        ask, asked = client._session.ask, 0

        def ask_and_fail(*args: Any, **options: Any) -> Any:
            nonlocal asked
            asked += 1
            assert asked < 20
            answer = ask(*args, **options)
            for claimed in worker.claim():
                worker.fail(claimed, type="ValueError", message="again")
            return answer

        client._session.ask = ask_and_fail  # type: ignore[method-assign]
        assert client.retry_matching(task="pay") == (3, 0)
    generations = rows(pgconductor_dsn, "select id, generation from pgconductor._private_finished")
    assert dict(generations) == dict.fromkeys(ids, 1)


def test_more_than_a_statement_takes_begin_anew_in_chunks(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """The first thousand, and the rest stays dead."""
    with psycopg.connect(pgconductor_dsn) as conn:
        conn.execute("select pgconductor.invoke('pay') from generate_series(1, 2100)")
    with Conductor(pgconductor_dsn).sync() as client:
        assert sum(client.cancel_matching(task="pay")) == 2100
        assert client.retry_matching(states="cancelled", limit=1001) == (1001, 0)
        assert client.retry_matching(states="cancelled") == (1099, 0)
    assert live(pgconductor_dsn) == 2100


def test_one_whose_key_is_taken_stays_dead(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """Two live executions under one dedupe key."""
    (failed,) = _fail(worker, "pay", "ValueError", dedupe_key="k")
    with Conductor(pgconductor_dsn).sync() as client:
        client.invoke("pay", dedupe_key="k")
        assert client.retry(failed) == {failed: Retry.DUPLICATE}
        assert client.retry_matching(task="pay") == (0, 0)
    assert live(pgconductor_dsn) == 1


async def test_lost_reply_is_told_since_it_may_have_begun_anew(pgconductor_dsn: str, worker: WorkerByHand) -> None:
    """Sent twice in silence: what failed once more in between would begin anew unasked."""
    (failed,) = _fail(worker, "pay", "ValueError")
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)
        async with conductor:
            proxy.cut_reply(b".retry(")
            with pytest.raises(Unavailable, match="may have taken effect or not"):
                await conductor.retry(failed)
            assert await conductor.retry(failed) == {failed: Retry.LIVE}


@pytest.mark.parametrize(
    ("method", "wrong", "said"),
    [
        ("retry_matching", {}, "everything=True"),
        ("retry_matching", {"everything": True, "task": "a"}, "not both"),
        ("retry_matching", {"states": "ready"}, "one of failed, cancelled"),
        ("retry_matching", {"error_type": ""}, "error_type must not be empty"),
        ("retry_matching", {"finished_before": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001 - that is the point
        ("retry_matching", {"everything": True, "limit": 0}, "limit must be from 1"),
        ("dead_letters", {"limit": 10_001}, "limit must be from 1 to 10000"),
        ("dead_letters", {"states": "completed"}, "one of failed, cancelled"),
        ("dead_letters", {"after": uuid4()}, "the last DeadLetter"),
        ("dead_letters", {"queue": "x" * 129}, "129 bytes"),
    ],
)
async def test_filter_that_is_wrong_is_refused(method: str, wrong: dict[str, Any], said: str) -> None:
    """A typing error that begins everything anew."""
    conductor = Conductor("postgresql://127.0.0.1:1/nothing")
    async with conductor:
        with pytest.raises(InvalidOption, match=said):
            await getattr(conductor, method)(**wrong)
    with conductor.sync() as client, pytest.raises(InvalidOption, match=said):
        getattr(client, method)(**wrong)


async def test_options_reach_the_row_from_every_producer(pgconductor_dsn: str) -> None:
    """An option that one of the producers drops would be found in production."""
    conductor = Conductor(pgconductor_dsn)

    @conductor.task
    async def pay(n: int) -> None: ...

    late = datetime.now(UTC) + timedelta(hours=1)
    options: dict[str, Any] = {"timeout": 5, "max_attempts": 7, "tags": ["a", "b"]}
    hourly = pay.options(timeout=5, max_attempts=7, tags=["a", "b"], deadline=late)
    endless = pay.options(timeout=5, max_attempts=7, tags=["a", "b"])
    soon = pay.options(timeout=5, max_attempts=7, tags=["a", "b"], deadline=3600.0)
    async with conductor:
        await conductor.invoke("pay", {"n": 1}, **options, deadline=late)
        await hourly.invoke(n=1)
        await pay.invoke_many([hourly.bind(n=1), endless.bind(n=1)])
    with conductor.sync() as client, psycopg.connect(pgconductor_dsn) as conn:
        client.invoke("pay", {"n": 1}, **options, deadline=timedelta(hours=1))
        client.invoke(soon, n=1)
        client.invoke("pay", {"n": 1}, **options, deadline=late, conn=conn)
        pay.options(timeout=5, max_attempts=7, tags=["a", "b"], deadline=late, conn=conn).invoke(n=1)
    query = (
        "select extract(epoch from timeout)::int, max_attempts, tags,"
        " round(extract(epoch from deadline_at - now()) / 60)::int, count(*)"
        " from pgconductor._private_executions group by 1, 2, 3, 4 order by 4"
    )
    assert rows(pgconductor_dsn, query) == [(5, 7, ["a", "b"], 60, 7), (5, 7, ["a", "b"], None, 1)]
    async with conductor:
        with pytest.raises(InvalidOption, match="max_attempts"):
            await conductor.invoke("pay", max_attempts=0)
