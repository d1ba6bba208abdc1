"""Dead letters: listed, retried once whoever asks, and never lost or doubled on the way back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
import trio
from client.worker_by_hand import open_worker
from sql.database import Database, Session, done

from pgconductor import Conductor, ExecutionFailed
from pgconductor.db.calls import Calls, NewExecution
from pgconductor.db.execute import run_sync
from pgconductor.model import Claimed, DeadLetter, Outcome, Retry, RetryCounts, State
from pgconductor.testing import DatabaseClock

YEAR = 365 * 86_400.0
ERROR = '{"type": "ValueError", "message": "no"}'


def running(db: Database, *, key: str | None = None, payload: str = "{}", queue: str = "q") -> tuple[UUID, Claimed]:
    db.register_queue(queue)
    owner = db.register_orchestrator(queue, lease=1000 * YEAR)
    db.invoke_many(NewExecution("t", payload, queue, dedupe_key=key))
    (claimed,) = db.claim(owner, queue)
    return owner, claimed


def dead(
    db: Database,
    *,
    key: str | None = None,
    payload: str = "{}",
    queue: str = "q",
    keep: float | None = 86_400.0,
    error: str = ERROR,
) -> UUID:
    """An execution that has failed."""
    owner, claimed = running(db, key=key, payload=payload, queue=queue)
    assert db.flush(owner, done(claimed, "failed", error=error, keep=keep)) == {}
    return claimed.id


def retry(session: Session, *executions: UUID) -> dict[UUID, Retry]:
    return session.run(session.calls.retry(list(executions)))


def large(db: Database) -> str:
    """A payload that is stored aside: random text, since its compressed size decides."""
    text = db.value("select string_agg(md5(n::text), '') from generate_series(1, 300) n")
    return f'{{"x": "{text}"}}'


def kept(db: Database) -> set[UUID]:
    return {i for (i,) in db.rows("select id from {s}._private_finished")}


# --- one comes back ---


def test_retried_execution_begins_anew_with_what_it_had(db: Database, clock: DatabaseClock) -> None:
    """It loses its payload, its options, its history, or a claim number is used twice."""
    owner, claimed = running(db, key="k", payload='{"a": 1}')
    db.rows(
        "update {s}._private_executions set priority = 7, max_attempts = 5, attempt = 1, crashes = 1, depth = 2,"
        " parent_id = id, root_id = id, limit_key = 'l', version = 'v', tags = '{x}', headers = '{\"h\": 1}',"
        " timeout = '7 s', deadline_at = now() + interval '1 h', cancel_requested_at = now(), cancel_reason = 'r'"
    )
    keeps = "priority, max_attempts, depth, queue, task, payload, created_at, parent_id, root_id, limit_key, version,"
    keeps += " tags, headers, timeout, dedupe_key, claim_no"
    before = db.live_row(claimed.id, keeps)
    db.flush(owner, done(claimed, "failed", error=ERROR, keep=86_400.0))
    errors = db.finished(claimed.id, "errors")[0][0]
    clock.advance(100)
    assert retry(db, claimed.id) == {claimed.id: Retry.RETRIED}
    assert kept(db) == set()
    assert db.live_row(claimed.id, keeps) == before
    assert db.live_row(
        claimed.id,
        "state::text, attempt, crashes, generation, errors, owner, claimed_at, deadline_at, cancel_requested_at,"
        " cancel_reason, run_at > created_at + interval '99 s'",
    ) == ("ready", 0, 0, 1, errors, None, None, None, None, None, True)
    assert db.value("select execution_id from {s}._private_dedupe_keys where key = 'k'") == claimed.id
    (again,) = db.claim(owner, version="v")
    assert (again.id, again.claim_no, again.attempt) == (claimed.id, claimed.claim_no + 1, 1)


def test_flush_of_a_former_life_changes_nothing(db: Database) -> None:
    """A reply was lost, the flush comes again after the retry, and fails the new life."""
    owner, claimed = running(db)
    outcome = done(claimed, "failed", error=ERROR, keep=86_400.0)
    db.flush(owner, outcome)
    retry(db, claimed.id)
    before = db.dump()
    assert db.flush(owner, outcome) == {claimed.id: "already"}
    assert db.flush(owner, done(claimed, "completed")) == {claimed.id: "fenced"}
    assert db.dump() == before


def test_steps_come_back_with_it(db: Database) -> None:
    """What was done once is done again, or a failure that the handler dealt with is another time none."""
    one = dead(db)
    columns = "name, kind, position, claim_no, attempt, created_at, value, error, outcome, target"
    db.rows(
        f"insert into {{s}}._private_steps (execution_id, {columns})"
        " select %s, s.n, s.k, s.p, s.c, s.t, now(), v::jsonb, e::jsonb, null, null from (values"
        " ('a', 'step', 0, 1, 2), ('b', 'step', 1, 1, 1), ('c', 'step', 2, 1, 2)) s (n, k, p, c, t)"
        " join (values ('a', '{\"x\": [1]}', null), ('b', null, '{}'), ('c', '3', null)) v (n, v, e) using (n)",
        one,
    )
    before = db.rows(f"select {columns} from {{s}}._private_steps order by name")
    db.rows(
        "with gone as (delete from {s}._private_steps returning *)"
        " update {s}._private_finished set steps = (select jsonb_agg(to_jsonb(gone) - 'execution_id') from gone)"
    )
    retry(db, one)
    assert db.rows(f"select {columns} from {{s}}._private_steps where execution_id = %s order by name", one) == before


def test_failures_at_the_end_are_tried_again(db: Database) -> None:
    """The retry of a dead letter finds the failure it died of, and dies of it again without having tried."""
    one = dead(db)
    ends: dict[str, dict[str, object]] = {"a": {"value": 1}, "b": {"error": {}}}
    records: list[dict[str, object]] = [
        {"name": name, "kind": "step", "position": n, "claim_no": 1, "created_at": "2030-01-01T00:00:00Z", **what}
        for n, (name, what) in enumerate(ends.items())
    ]
    db.rows("update {s}._private_finished set steps = %s::jsonb", json.dumps(records))
    retry(db, one)
    assert db.rows("select name from {s}._private_steps") == [("a",)]


def test_large_payload_is_there_again(db: Database) -> None:
    """The row comes back and its payload does not."""
    payload = large(db)
    one = dead(db, payload=payload)
    retry(db, one)
    owner = db.register_orchestrator()
    (claimed,) = db.claim(owner)
    assert claimed.payload is None
    assert db.run(db.calls.load_payload(one, claimed.claim_no, owner)) == payload


def test_retry_wakes_a_sleeping_worker(db: Database) -> None:
    """What was retried waits for the next sweep."""
    one = dead(db)
    sleeper = db.session(autocommit=True)
    sleeper.rows(f"listen {db.run(db.calls.channel('q'))}")
    assert sleeper.run(sleeper.calls.raise_sleep_flag("q", raise_it=True)) is True
    retry(db, one)
    assert len(list(sleeper.conn.notifies(timeout=5, stop_after=1))) == 1


def test_cancelled_execution_is_retried_like_a_failed_one(db: Database) -> None:
    """Somebody cancelled the wrong one, and there is no way back; or it is cancelled again at once."""
    db.register_queue()
    one = db.invoke()
    db.run(db.calls.cancel([one], "by mistake"))
    assert [(d.state, d.reason) for d in db.run(db.calls.dead_letters())] == [(State.CANCELLED, "by mistake")]
    assert retry(db, one) == {one: Retry.RETRIED}
    owner = db.register_orchestrator()
    (claimed,) = db.claim(owner)
    assert db.flush(owner, done(claimed)) == {}
    assert db.finished(one, "state::text, generation, cancel_reason") == [("completed", 1, None)]


def test_each_id_is_answered_once_by_how_it_stands(db: Database) -> None:
    """An operator is told that something runs again which does not."""
    owner, completed = running(db)
    db.flush(owner, done(completed))
    one = dead(db)
    not_kept = dead(db, keep=0.0)
    live, stranger = db.invoke(delay=60), db.value("select {s}._private_new_id(7, now())")
    assert retry(db, one, one, completed.id, live, stranger, not_kept) == {
        one: Retry.RETRIED,
        completed.id: Retry.COMPLETED,
        live: Retry.LIVE,
        stranger: Retry.UNKNOWN,
        not_kept: Retry.UNKNOWN,
    }
    assert retry(db, one, uuid4()).pop(one) is Retry.LIVE
    assert retry(db) == {}
    assert db.value("select count(*) from {s}._private_executions where id = %s", one) == 1


async def test_who_waits_for_the_result_gets_that_of_the_new_life(pgconductor_dsn: str) -> None:
    """The old failure is the answer for ever."""
    conductor = Conductor(pgconductor_dsn)

    @conductor.task
    async def echo(value: int) -> int:
        return value

    calls = Calls("pgconductor")
    with open_worker(pgconductor_dsn, ["echo"]) as worker:
        async with conductor:
            handle = await echo.invoke(1)
            (claimed,) = worker.claim()
            worker.fail(claimed, type="ValueError", message="no")
            with pytest.raises(ExecutionFailed):
                await handle.result(timeout=10)
            assert run_sync(worker.conn, calls.retry([handle.id])) == {handle.id: Retry.RETRIED}
            assert run_sync(worker.conn, calls.results([handle.id])) == {}
            got: list[int] = []

            async def wait() -> None:
                got.append(await handle.result(timeout=10))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                assert worker.finish_all(5) == {handle.id}
            assert got == [5]


# --- its key ---


def test_key_that_somebody_else_holds_keeps_it_dead(db: Database) -> None:
    """Two live executions of one key. When the key is free again, it may come back."""
    one = dead(db, key="k")
    twin = db.invoke(key="k")
    assert twin != one
    before = db.dump()
    assert retry(db, one) == {one: Retry.DUPLICATE}
    assert db.dump() == before
    db.run(db.calls.cancel([twin], None))
    assert retry(db, one) == {one: Retry.RETRIED}
    assert db.invoke(key="k") == one
    assert retry(db, twin) == {twin: Retry.DUPLICATE}


def test_of_two_with_one_key_one_comes_back(db: Database) -> None:
    """A batch of dead letters makes twins, or fails because of them."""
    one, two = dead(db, key="k"), dead(db, key="k")
    other = dead(db, key="other")
    statuses = retry(db, two, one, other)
    assert sorted(statuses.values()) == [Retry.DUPLICATE, Retry.RETRIED, Retry.RETRIED]
    assert statuses[other] is Retry.RETRIED
    assert db.value("select count(*) from {s}._private_executions where dedupe_key = 'k'") == 1
    assert len(kept(db)) == 1
    assert db.value("select count(*) from {s}._private_dedupe_keys") == 2


# --- races ---


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("first_commits", [True, False])
def test_of_two_retries_at_once_one_wins(db: Database, key: str | None, first_commits: bool) -> None:
    """Two operators, two executions; or none, when the first one's connection breaks."""
    one, other = dead(db, key=key), dead(db)
    first, second = db.session(), db.session(autocommit=True)
    assert retry(first, one, other) == {one: Retry.RETRIED, other: Retry.RETRIED}
    rival = db.start(lambda: retry(second, one))
    db.wait_blocked(second, rival)
    first.commit() if first_commits else first.rollback()
    assert rival.result(20) == {one: Retry.LIVE if first_commits else Retry.RETRIED}
    assert db.live(one, "generation") == (1,)
    assert db.value("select count(*) from {s}._private_dedupe_keys") == (0 if key is None else 1)
    assert kept(db) == (set() if first_commits else {other})


def test_retries_of_the_same_in_other_orders_never_deadlock(db: Database) -> None:
    """Each has locked what the other wants."""
    rng = random.Random(1)
    for _ in range(4):
        some = [dead(db, key=rng.choice([None, f"k{n}"])) for n in range(12)]
        sessions = [db.session(autocommit=True) for _ in range(4)]
        rivals = [db.start(partial(retry, session, *rng.sample(some, len(some)))) for session in sessions]
        answers: list[dict[UUID, Retry]] = [rival.result(20) for rival in rivals]
        for one in some:
            assert [answer[one] for answer in answers].count(Retry.RETRIED) == 1
        db.rows("delete from {s}._private_executions; delete from {s}._private_dedupe_keys")


@pytest.mark.parametrize("commits", [True, False])
def test_retry_and_an_invocation_with_its_key_are_one_execution(db: Database, commits: bool) -> None:
    """The key is looked at before the producer commits, and both live."""
    one = dead(db, key="k")
    producer, operator = db.session(), db.session(autocommit=True)
    twin = producer.invoke(key="k")
    rival = db.start(lambda: retry(operator, one))
    db.wait_blocked(operator, rival)
    producer.commit() if commits else producer.rollback()
    assert rival.result(20) == {one: Retry.DUPLICATE if commits else Retry.RETRIED}
    assert db.value("select execution_id from {s}._private_dedupe_keys") == (twin if commits else one)


def test_invocation_with_the_key_of_a_retry_finds_that_one(db: Database) -> None:
    """The same, the retry first."""
    one = dead(db, key="k")
    operator, producer = db.session(), db.session(autocommit=True)
    retry(operator, one)
    rival = db.start(lambda: producer.invoke(key="k"))
    db.wait_blocked(producer, rival)
    operator.commit()
    assert rival.result(20) == one


def expired(db: Database, clock: DatabaseClock, payload: str) -> UUID:
    one = dead(db, keep=60.0, payload=payload, key="k")
    clock.advance(2 * 3600)
    return one


@pytest.mark.parametrize("is_large", [False, True])
def test_maintenance_leaves_alone_what_is_being_retried(db: Database, clock: DatabaseClock, is_large: bool) -> None:
    """An expired dead letter is retried at the last moment, and its slot is emptied beneath it."""
    one = expired(db, clock, large(db) if is_large else "{}")
    operator = db.session()
    assert retry(operator, one) == {one: Retry.RETRIED}
    for _ in range(3):
        db.run(db.calls.maintain())
        assert db.finished(one)  # the operator has not committed yet
    operator.commit()
    for _ in range(3):
        db.run(db.calls.maintain())
    assert db.live(one, "state::text") == ("ready",)
    assert db.value("select payload is not null from {s}.executions where id = %s", one) is True


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("commits", [True, False])
def test_retry_of_what_is_being_removed_finds_it_gone(
    db: Database, clock: DatabaseClock, is_large: bool, commits: bool
) -> None:
    """It comes back without its payload, or keeps its key although there is nothing any more."""
    one = expired(db, clock, large(db) if is_large else "{}")
    maintainer, operator = db.session(), db.session(autocommit=True)
    did = maintainer.run(maintainer.calls.maintain())
    assert did.payloads_removed + did.rows_removed >= 1
    rival = db.start(lambda: retry(operator, one))
    db.wait_blocked(operator, rival)
    maintainer.commit() if commits else maintainer.rollback()
    assert rival.result(20) == {one: Retry.UNKNOWN if commits else Retry.RETRIED}
    assert db.value("select count(*) from {s}._private_dedupe_keys") == (0 if commits else 1)
    assert db.value("select count(*) from {s}._private_payloads") == int(is_large and not commits)


# --- the list ---


def many(db: Database, n: int, completed: int = 0) -> None:
    """Finished executions of all kinds, many of them at the same instant."""
    db.rows(
        "insert into {s}._private_finished (slot, priority, attempt, crashes, generation, depth, state, id, claim_no,"
        " created_at, finished_at, expires_at, queue, task, payload, errors, cancel_reason)"
        " select 5 + n %% 20, 0, 3, 1, 0, 0, (case when n > %s then 'completed' when n %% 3 = 0 then 'cancelled' else"
        " 'failed' end)::{s}.execution_state, {s}._private_new_id(0, now()), 1, '2026-01-01Z',"
        " '2026-01-01Z'::timestamptz + (n %% 7) * interval '1 s', '2026-02-01Z', 'q' || n %% 2, 't' || n %% 5, '{}',"
        " jsonb_build_array('{\"type\": \"First\"}'::jsonb, jsonb_build_object('type', 'E' || n %% 4)), 'r'"
        " from generate_series(1, %s) n",
        n,
        n + completed,
    )


def test_list_in_pages_has_each_once_the_latest_first(db: Database) -> None:
    """Those that end at the same instant are shown twice, or skipped between two pages."""
    many(db, 100, completed=20)
    pages: list[list[DeadLetter]] = [db.run(db.calls.dead_letters(limit=7))]
    while pages[-1]:
        pages.append(db.run(db.calls.dead_letters(limit=7, after=pages[-1][-1])))
    shown = [letter for page in pages for letter in page]
    assert len(shown) == len({letter.id for letter in shown}) == 100
    assert [(s.finished_at, s.id) for s in shown] == sorted(((s.finished_at, s.id) for s in shown), reverse=True)
    newest = max(shown, key=lambda s: (s.finished_at, s.id))
    assert shown[0] == newest
    assert (newest.attempts, newest.crashes, newest.generation, newest.reason) == (3, 1, 0, "r")
    assert newest.error is not None
    assert newest.error.type in {"E0", "E1", "E2", "E3"}
    assert newest.expires_at == datetime(2026, 2, 1, tzinfo=UTC)


def test_list_is_of_what_was_asked_for(db: Database) -> None:
    """A filter that is ignored."""
    many(db, 100, completed=20)

    def count(queue: str | None = None, task: str | None = None, **options: Any) -> int:
        return len(db.run(db.calls.dead_letters(queue, task, 1000, **options)))

    assert count() == 100
    assert count("q1") == 50
    assert count("q1", "t1") == 10
    assert count(states=[State.CANCELLED]) == 33
    assert count(states=[State.COMPLETED]) == 0
    assert count("nothing") == 0
    assert db.value("select count(*) from {s}.dead_letters()") == 100


def scans(session: Session) -> tuple[int, int]:
    """Sequential scans of finished slots, and index entries read there."""
    session.rows("select pg_stat_force_next_flush()")
    session.rows("select pg_stat_clear_snapshot()")
    found = session.rows(
        "select (select sum(seq_scan)::int8 from pg_stat_user_tables where relname ~ '^_private_finished'),"
        " (select sum(idx_tup_read)::int8 from pg_stat_user_indexes where relname ~ '^_private_finished')"
    )
    return found[0][0], found[0][1]


@pytest.mark.parametrize("is_analyzed", [False, True])
def test_list_and_retry_read_what_they_return_whatever_the_statistics_say(db: Database, is_analyzed: bool) -> None:
    """Each look at the dead letters reads all that has completed."""
    many(db, 400, completed=8000)
    if is_analyzed:
        db.rows("analyze")
    busy = db.session(autocommit=True)
    letters = busy.run(busy.calls.dead_letters(limit=10))
    before = scans(busy)
    verbs: list[tuple[Callable[[], object], int]] = [
        (lambda: busy.run(busy.calls.dead_letters(limit=10)), 60),
        (lambda: busy.run(busy.calls.dead_letters(limit=10, after=letters[-1])), 60),
        (partial(retry, busy, *[letter.id for letter in letters]), 100),
        (lambda: busy.run(busy.calls.retry_matching(limit=10)), 200),
    ]
    for verb, allowed in verbs:
        verb()
        after = scans(busy)
        assert after[0] == before[0]
        assert after[1] - before[1] < allowed
        before = after


# --- by filter ---


def test_filter_retries_the_oldest_first_in_batches_and_ends(db: Database) -> None:
    """A filter that is too wide; one that never ends because of those whose key is taken."""
    many(db, 100, completed=20)
    dead(db, key="k")
    db.invoke(key="k")
    before = datetime(2027, 1, 1, tzinfo=UTC)
    wanted = partial(db.calls.retry_matching, finished_before=before, limit=5)
    assert db.run(wanted("q1", "t1", "E1")) == RetryCounts(3, 0)
    assert db.run(wanted("q1", "t1", "First")) == RetryCounts(0, 0)
    second = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=1)
    while db.run(wanted(finished_after=second, finished_before=second + timedelta(seconds=1))).retried:
        pass
    assert db.value(
        "select count(*) from {s}._private_finished where state = 'failed' and finished_at = %s", second
    ) == 0  # fmt: skip
    counts: list[RetryCounts] = []
    while not counts or counts[-1].retried:
        counts.append(db.run(wanted()))
    left = db.rows("select state::text, count(*) from {s}._private_finished where queue <> 'q' group by 1 order by 1")
    assert left == [("cancelled", 33), ("completed", 20)]
    assert all(count.retried == 5 for count in counts[:-2])
    assert db.run(wanted(states=[State.CANCELLED])) == RetryCounts(5, 0)


def test_filter_takes_the_oldest(db: Database) -> None:
    """What failed last is retried for ever, and what failed first never."""
    many(db, 50)
    of_each = (
        "select count(*) from {s}._private_finished where state = 'failed' group by finished_at order by finished_at"
    )
    before = [count for (count,) in db.rows(of_each)]
    db.run(db.calls.retry_matching(limit=before[0] + 1))
    assert [count for (count,) in db.rows(of_each)] == [before[1] - 1, *before[2:]]
    db.run(db.calls.retry_matching(limit=1000))
    assert db.value("select count(*) from {s}._private_finished where state = 'failed'") == 0


def test_filter_passes_over_those_whose_key_is_taken(db: Database) -> None:
    """As many as one call takes are at the front of the line and cannot go: nobody behind them ever goes."""
    for _ in range(3):
        dead(db, key="k")
    other = dead(db)
    db.invoke(key="k")
    assert db.run(db.calls.retry_matching(limit=2)) == RetryCounts(1, 0)
    assert db.live(other, "state::text") == ("ready",)
    assert db.run(db.calls.retry_matching(limit=2)) == RetryCounts(0, 0)


def test_outcome_of_the_new_life_is_kept_like_any_other(db: Database, clock: DatabaseClock) -> None:
    """A second end of one execution leaves two rows, or none."""
    one = dead(db, key="k")
    retry(db, one)
    owner = db.register_orchestrator()
    (claimed,) = db.claim(owner)
    clock.advance(10)
    assert db.flush(owner, Outcome(one, claimed.claim_no, "failed", error=ERROR, keep=60.0)) == {}
    assert db.finished(one, "generation, attempt, claim_no, jsonb_array_length(errors)") == [(1, 1, 2, 2)]
    assert db.value("select count(*) from {s}._private_dedupe_keys") == 0
    assert retry(db, one) == {one: Retry.RETRIED}
    assert db.live(one, "generation, claim_no") == (2, 2)
