"""Versions of tasks in SQL: who claims what, and who is told of what nobody can run."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from sql.database import Database, Session, done

from pgconductor.db.calls import NewExecution
from pgconductor.errors import Misuse


def invoke(db: Session, version: str | None, *, task: str = "t", key: str | None = None, count: int = 1) -> list[UUID]:
    """Executions of one version."""
    options = None if version is None else f'{{"version": "{version}"}}'
    row = NewExecution(task, "{}", "q", dedupe_key=key, options=options)
    return [invoked.id for invoked in db.invoke_many(*[row] * count)]


def claim(db: Session, owner: UUID, *versions: str | None, task: str = "t") -> list[tuple[UUID, str | None]]:
    """Claim as a worker that has these versions of a task, the first of them current."""
    names = [task] * len(versions)
    claimed = db.run(db.calls.claim("q", owner, names, 100, versions=list(versions))).claimed
    return [(each.id, each.version) for each in claimed]


@pytest.fixture
def owner(db: Database) -> UUID:
    """An orchestrator on the queue "q"."""
    db.register_queue()
    return db.register_orchestrator()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("key", [None, "k"])
def test_version_of_the_invocation_is_kept_and_claimed_by_who_has_it(
    db: Database, owner: UUID, count: int, key: str | None
) -> None:
    """Code that cannot read the history of an execution goes on with it."""
    ids = set(invoke(db, "2", key=key, count=count))
    assert claim(db, owner, "1", None) == []
    assert claim(db, owner, None) == []
    assert claim(db, owner, "22", "x", "1") == []
    assert claim(db, owner, "2", task="u") == []
    assert {found for found, _ in claim(db, owner, "1", "2")} == ids


def test_worker_of_the_release_before_claims_nothing_with_a_version(db: Database, owner: UUID) -> None:
    """During a rolling deploy the old code runs what the new code began."""
    (plain,) = invoke(db, None)
    invoke(db, "2")
    statement = "select id, due_in from {s}.claim('q', %s, '{t}', 10)"
    assert [found for found, _ in db.rows(statement, owner)] == [plain]
    assert db.rows(statement, owner) == [(None, None)]
    assert db.rows("select id, due_in from {s}._private_claim_1('q', %s, '{t}', 10)", owner) == [(None, None)]
    db.rows("update {s}._private_executions set crashes = 2 where state = 'ready'")
    assert db.rows("select id from {s}.claim_suspect('q', %s, '{t}')", owner) == []
    assert db.value("select {s}.drain_wait('q', '{t}', 1000)") == 0  # the running one
    db.rows("delete from {s}._private_executions where state = 'running'")
    assert db.value("select {s}.drain_wait('q', '{t}', 1000)") is None


def test_one_without_a_version_gets_the_current_one_and_keeps_it(db: Database, owner: UUID) -> None:
    """It is begun by one version and goes on with another."""
    (plain,) = invoke(db, None)
    assert claim(db, owner, "2", "1") == [(plain, "2")]
    db.flush(owner, done(db.claimed(plain, 1), "released"))
    assert db.live(plain, "version") == ("2",)
    assert claim(db, owner, "3", "1") == []
    assert claim(db, owner, "3", "2") == [(plain, "2")]
    (other,) = invoke(db, None)
    assert claim(db, owner, None, "2") == [(other, None)]


def test_claim_of_none_of_its_versions_is_told_of_no_others_to_come_back_for(db: Database, owner: UUID) -> None:
    """A worker that asks a hundred times a second for what it can never have."""
    invoke(db, "2", count=3)
    empty = db.run(db.calls.claim("q", owner, ["t"], 10, versions=["1"]))
    assert (empty.claimed, empty.due_in) == ([], None)
    rival = db.session()
    assert len(claim(rival, owner, "2")) == 3
    rival.conn.commit()


def test_overflow_and_suspects_know_versions(db: Database) -> None:
    """What was produced before the queue was registered, or is on its last life, is run by the wrong code."""
    (early,) = invoke(db, "2")
    db.register_queue()
    owner = db.register_orchestrator()
    (late,) = invoke(db, "1")
    assert claim(db, owner, "3") == []
    assert claim(db, owner, "1") == [(late, "1")]
    db.rows("update {s}._private_executions set crashes = 2 where state = 'ready'")
    assert db.run(db.calls.claim_suspect("q", owner, ["t"], ["1"])) is None
    suspect = db.run(db.calls.claim_suspect("q", owner, ["t", "t"], ["1", "2"]))
    assert suspect is not None
    assert (suspect.id, suspect.version) == (early, "2")
    (plain,) = invoke(db, None)
    db.rows("update {s}._private_executions set crashes = 2 where state = 'ready'")
    suspect = db.run(db.calls.claim_suspect("q", owner, ["t", "t"], ["1", "2"]))
    assert suspect is not None
    assert (suspect.id, suspect.version) == (plain, "1")


def test_versions_that_nobody_has_are_named(db: Database) -> None:
    """An execution that waits for ever, and nothing that shows it."""
    db.register_queue()
    db.register_orchestrator(tasks=["t", "t@2"])
    invoke(db, "1")
    (fitting,) = invoke(db, "2")
    (plain,) = invoke(db, None)
    (other,) = invoke(db, "1", task="u")
    (status,) = db.queue_status()
    assert status.tasks_without_worker == ("t@1", "u@1")
    standing = db.run(db.calls.standing([fitting, plain, other]))
    assert [standing[each].live_workers for each in (fitting, plain, other)] == [1, 1, 0]
    unserved: list[dict[str, Any]] = db.value("select {s}._private_doctor()")["unserved"]
    assert sorted(each["task"] for each in unserved) == ["t@1", "u@1"]


def test_drain_waits_only_for_the_versions_there_are(db: Database) -> None:
    """A test that never ends, since an execution is left for somebody else."""
    db.register_queue()
    invoke(db, "1")
    wait = db.calls.drain_wait
    assert db.run(wait({"q": ["t"]}, 1000.0, {"q": ["1"]})) == 0
    assert db.run(wait({"q": ["t"]}, 1000.0, {"q": ["2"]})) is None
    assert db.run(wait({"q": ["t"]}, 1000.0)) is None
    invoke(db, None)
    assert db.run(wait({"q": ["t"]}, 1000.0)) == 0


@pytest.mark.parametrize("version", ["", "a@b", "x" * 65])
@pytest.mark.parametrize("count", [1, 2])
def test_version_that_cannot_be_is_refused(db: Database, version: str, count: int) -> None:
    """No worker could ever say that it has it."""
    with pytest.raises(Misuse, match="the version of a task"):
        invoke(db, version, count=count)


def test_unknown_versions_cost_a_claim_no_more_than_unknown_tasks(db: Database) -> None:
    """A claim reads the whole queue in order, or all of it twice, to find the few that it may have."""
    db.register_queue()
    owner = db.register_orchestrator()
    busy = db.session(autocommit=True)
    invoke(busy, "1", count=300)
    invoke(busy, "2", count=300)
    busy.rows("vacuum analyze {s}._private_executions")

    def reads() -> tuple[int, int]:
        busy.rows("select pg_stat_force_next_flush()")
        busy.rows("select pg_stat_clear_snapshot()")
        return busy.rows(
            "select (select sum(idx_tup_read) from pg_stat_user_indexes where relname ~ '^_private_queue_'),"
            " (select sum(seq_scan) from pg_stat_user_tables where relname ~ '^_private_queue_')"
        )[0]

    before = reads()
    assert len(claim(busy, owner, "2")) == 100
    after = reads()
    assert after[1] == before[1]
    assert after[0] - before[0] <= 300 + 100 + 300
