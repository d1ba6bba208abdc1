"""flush: the fence on every outcome, the same flush twice, late flushes of the declared dead, and what each writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sql.database import Database, Session, done

from pgconductor.db.calls import NewExecution
from pgconductor.model import Claimed, Outcome
from pgconductor.testing import DatabaseClock

KINDS = ["completed", "failed", "retried", "released"]
ERROR = '{"type": "ValueError", "message": "no"}'
EXTRA: dict[str, dict[str, Any]] = {
    "completed": {"result": "42"},
    "failed": {"error": ERROR},
    "retried": {"error": ERROR, "delay": 60.0},
    "released": {},
}


@pytest.fixture(params=[True, False], ids=["family", "plain"], autouse=True)
def has_family(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Each test is for both ways through flush: executions that may have a family, and those that have none."""
    monkeypatch.setattr(Session, "has_family", request.param)
    return bool(request.param)


@dataclass
class Running:
    """An execution claimed by `owner`."""

    owner: UUID
    claimed: Claimed

    @property
    def id(self) -> UUID:
        return self.claimed.id

    def ended(self, kind: str, **options: Any) -> Outcome:
        return done(self.claimed, kind, **(options or EXTRA[kind]))


def run_one(db: Database, queue: str = "q", **options: Any) -> Running:
    db.register_queue(queue)
    db.invoke(queue, **options)
    owner = db.register_orchestrator(queue)
    (claimed,) = db.claim(owner, queue)
    return Running(owner, claimed)


# --- the fence ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", ["a later claim", "an earlier claim", "another owner", "another execution"])
def test_wrong_token_changes_nothing(db: Database, kind: str, wrong: str) -> None:
    """One part of the token not tested: somebody else's claim is ended by a stranger."""
    one = run_one(db)
    outcome, owner = one.ended(kind), one.owner
    if wrong == "another owner":
        owner = db.register_orchestrator()
    elif wrong == "another execution":
        outcome = outcome._replace(id=db.invoke())
    else:
        outcome = outcome._replace(claim_no=outcome.claim_no + (1 if wrong == "a later claim" else -1))
    before = db.dump()
    assert db.flush(owner, outcome) == {outcome.id: "fenced"}
    assert db.dump() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ended", KINDS)
def test_claim_that_has_ended_cannot_end_again(db: Database, kind: str, ended: str) -> None:
    """`state = running` not tested: a second outcome on top of the first. The same outcome again is "already"."""
    one = run_one(db)
    assert db.flush(one.owner, one.ended(ended)) == {}
    before = db.dump()
    assert db.flush(one.owner, one.ended(kind)) == {one.id: "already" if kind == ended else "fenced"}
    assert db.dump() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("since", ["given back", "claimed by another", "ended by another", "claimed by the same"])
def test_late_flush_of_a_recovered_claim_changes_nothing(
    db: Database, clock: DatabaseClock, kind: str, since: str
) -> None:
    """A paused process wakes up after its lease, and its outcome overwrites what happened since."""
    one = run_one(db)
    clock.advance(2000)
    assert db.recover() == (1, 0)
    if since == "claimed by the same":
        # As after a server crash that lost what declared it dead: the claim's number alone must be enough.
        db.rows("update {s}._private_orchestrators set died_at = null, expires_at = 'infinity'")
        assert [c.claim_no for c in db.claim(one.owner)] == [2]
    elif since != "given back":
        other = db.register_orchestrator()
        (claimed,) = db.claim(other)
        assert claimed.claim_no == 2
        if since == "ended by another":
            assert db.flush(other, done(claimed, result='"theirs"')) == {}
    before = db.dump()
    assert db.flush(one.owner, one.ended(kind)) == {one.id: "fenced"}
    assert db.dump() == before


def test_late_result_of_a_crash_loop_is_fenced(db: Database, clock: DatabaseClock) -> None:
    """The execution was failed in its owner's place: telling the owner that its own "completed" is stored is a lie."""
    one = run_one(db)
    db.rows("update {s}._private_executions set crashes = 2")
    clock.advance(2000)
    assert db.recover() == (0, 1)
    before = db.dump()
    assert db.flush(one.owner, one.ended("completed")) == {one.id: "fenced"}
    assert db.dump() == before


@pytest.mark.parametrize("partition", [0, 1, 77])
def test_unknown_execution_is_gone(db: Database, partition: int) -> None:
    """An outcome of an execution that is not there fails the whole batch of others."""
    one = run_one(db)
    stranger = one.ended("completed")._replace(id=db.value("select {s}._private_new_id(%s, now())", partition))
    assert db.flush(one.owner, stranger, one.ended("completed")) == {stranger.id: "gone"}
    assert db.finished(one.id) == [("completed", 1, 0, 1)]


def test_empty_flush_is_nothing(db: Database) -> None:
    """A timer that finds nothing to flush fails."""
    before = db.dump()
    assert db.rows("select * from {s}.flush(%s, '{}', '{}', '{}', '{}', '{}', '{}', '{}')", uuid4()) == []
    assert db.dump() == before


# --- twice ---


def test_flush_sent_twice_changes_nothing_the_second_time(db: Database) -> None:
    """The reply was lost: a second attempt charged, a second finished row, a second back-off."""
    db.register_queue()
    ids = [db.invoke() for _ in KINDS]
    owner = db.register_orchestrator()
    claimed = db.claim(owner)
    assert [c.id for c in claimed] == ids
    outcomes = [done(c, kind, **EXTRA[kind]) for c, kind in zip(claimed, KINDS, strict=True)]
    assert db.flush(owner, *outcomes) == {}
    before = db.dump()
    assert db.flush(owner, *outcomes) == dict.fromkeys(ids, "already")
    assert db.dump() == before


def test_flush_sent_twice_with_new_outcomes_writes_those(db: Database) -> None:
    """The batch that is sent again has grown: what was written and what is new must be told apart."""
    db.register_queue()
    first, second = db.invoke(), db.invoke()
    owner = db.register_orchestrator()
    outcomes = [done(c, result="1") for c in db.claim(owner)]
    assert db.flush(owner, outcomes[0]) == {}
    assert db.flush(owner, *outcomes) == {first: "already"}
    assert db.finished(second) == [("completed", 1, 0, 1)]


def test_flush_sent_twice_of_a_row_nobody_keeps_finds_no_trace(db: Database) -> None:
    """Nothing is kept that could say "already": it is "gone", and nothing changes."""
    one = run_one(db)
    assert db.flush(one.owner, one.ended("completed", keep=0.0)) == {}
    before = db.dump()
    assert db.flush(one.owner, one.ended("completed", keep=0.0)) == {one.id: "gone"}
    assert db.dump() == before


def test_released_claim_sent_again_after_a_new_claim_is_still_known(db: Database) -> None:
    """The answer to a repeated flush depends on how fast somebody else claimed."""
    one = run_one(db)
    db.flush(one.owner, one.ended("released"))
    (again,) = db.claim(one.owner)
    assert again.claim_no == 2
    assert db.flush(one.owner, one.ended("released")) == {one.id: "already"}
    assert db.live(one.id) == ("running", 1, 0, 2)


def test_one_execution_twice_in_a_batch_ends_once(db: Database) -> None:
    """Two finished rows of one execution."""
    one = run_one(db)
    assert db.flush(one.owner, one.ended("completed"), one.ended("failed")) == {}
    assert len(db.finished(one.id)) == 1
    assert db.live(one.id) is None


# --- batches ---


def test_batch_of_own_partition_and_overflow_is_written_whole(db: Database) -> None:
    """Outcomes of one partition paired with the ids of another."""
    early = [db.invoke() for _ in KINDS]
    db.register_queue()
    late = [db.invoke() for _ in KINDS]
    owner = db.register_orchestrator()
    claimed = {c.id: c for c in db.claim(owner)}
    # Interleaved, so that each partition's part has gaps.
    pairs = [(id_, kind) for ids in zip(early, late, strict=True) for id_, kind in zip(ids, KINDS * 2, strict=False)]
    outcomes = [
        Outcome(
            id_, claimed[id_].claim_no, kind, error=f'{{"message": "{id_}"}}', keep=None if kind == "failed" else 60
        )
        for id_, kind in pairs
    ]
    assert db.flush(owner, *outcomes) == {}
    for id_, kind in pairs:
        if kind in ("completed", "failed"):
            assert db.finished(id_, "state::text, errors -> 0 ->> 'message'") == [(kind, str(id_))]
        else:
            assert db.live(id_, "outcome, errors -> 0 ->> 'message'") == (kind, str(id_))
    before = db.dump()
    assert db.flush(owner, *outcomes) == dict.fromkeys([*early, *late], "already")
    assert db.dump() == before


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({"kind": "completed", "result": '"\\u0000"'}, id="NUL in a result"),
        pytest.param({"kind": "completed", "result": "{"}, id="no JSON"),
        pytest.param({"kind": "completed", "keep": 1e300}, id="kept too long"),
        pytest.param({"kind": "retried", "delay": 1e12}, id="due after the year 9999"),
        pytest.param({"kind": "retried", "delay": 1e300}, id="due never"),
        pytest.param({"kind": "failed", "result": "1"}, id="result of a failure"),
    ],
)
def test_row_that_cannot_be_stored_aborts_the_whole_batch(db: Database, bad: dict[str, Any]) -> None:
    """Half a batch written. The worker relies on all or nothing when it splits the batch to find the bad one."""
    db.register_queue()
    for _ in range(3):
        db.invoke()
    owner = db.register_orchestrator()
    outcomes = [done(c) for c in db.claim(owner)]
    outcomes[1] = outcomes[1]._replace(**bad)
    before = db.dump()
    with pytest.raises((psycopg.DataError, psycopg.IntegrityError)):
        db.flush(owner, *outcomes)
    assert db.dump() == before
    assert db.flush(owner, outcomes[0], outcomes[2]) == {}


def test_two_flushes_of_the_same_claims_in_other_orders_do_not_deadlock(db: Database) -> None:
    """A flush is sent again while the server still works on the first one: two lock orders would be a deadlock."""
    db.register_queue()
    for _ in range(3):
        db.invoke()
    owner = db.register_orchestrator()
    outcomes = [done(c) for c in db.claim(owner)]
    gate, first, second = db.session(), db.session(autocommit=True), db.session(autocommit=True)
    gate.rows("select from {s}._private_executions where id = %s for update", outcomes[1].id)
    one = db.start(lambda: first.flush(owner, *outcomes))
    db.wait_blocked(first, one)  # has the first row, waits for the second
    two = db.start(lambda: second.flush(owner, outcomes[2], outcomes[0]))
    db.wait_blocked(second, two)
    gate.rollback()
    assert one.result(20) == {}
    assert two.result(20) == {outcomes[0].id: "already", outcomes[2].id: "already"}


# --- what is written ---


def test_counts_after_each_way_a_claim_can_end(db: Database, clock: DatabaseClock) -> None:
    """An attempt charged for a crash or a release, or a claim number used twice."""
    one = run_one(db)
    assert db.live(one.id) == ("running", 1, 0, 1)
    db.flush(one.owner, one.ended("retried", delay=0.0))
    assert db.live(one.id) == ("ready", 1, 0, 1)
    one = Running(one.owner, *db.claim(one.owner))
    assert (one.claimed.attempt, one.claimed.claim_no) == (2, 2)
    db.flush(one.owner, one.ended("released"))
    assert db.live(one.id) == ("ready", 1, 0, 2)
    one = Running(one.owner, *db.claim(one.owner))
    assert (one.claimed.attempt, one.claimed.claim_no) == (2, 3)
    clock.advance(2000)
    assert db.recover() == (1, 0)
    assert db.live(one.id) == ("ready", 1, 1, 3)
    owner = db.register_orchestrator()
    (last,) = db.claim(owner)
    assert (last.attempt, last.claim_no) == (2, 4)
    db.flush(owner, done(last, "failed", error=ERROR))
    assert db.finished(one.id) == [("failed", 2, 1, 4)]


@pytest.mark.parametrize("kind", ["retried", "released"])
@pytest.mark.parametrize("delay", [0.0, 90.0])
def test_what_was_given_back_is_claimable_when_it_is_due(
    db: Database, clock: DatabaseClock, kind: str, delay: float
) -> None:
    """A back-off that is not waited for, or work that never comes back."""
    one = run_one(db)
    before = clock.now()
    db.flush(one.owner, one.ended(kind, delay=delay))
    state, owner, claimed_at, run_at = db.live_row(one.id, "state::text, owner, claimed_at, run_at")
    assert (state, owner, claimed_at) == ("scheduled" if delay else "ready", None, None)
    if delay:
        assert delay - 0.01 < (run_at - before).total_seconds() < delay + 20
        assert db.claim(one.owner) == []
        clock.advance(delay)
    assert [c.id for c in db.claim(one.owner)] == [one.id]


def test_released_one_keeps_its_place_and_a_retried_one_queues_up(db: Database) -> None:
    """A shutdown that sends its work to the back of the queue, or a failing one that blocks the front."""
    one = run_one(db)
    (due,) = db.live_row(one.id, "run_at")
    db.flush(one.owner, one.ended("released"))
    assert db.live(one.id, "run_at") == (due,)
    one = Running(one.owner, *db.claim(one.owner))
    db.flush(one.owner, one.ended("retried", delay=0.0))
    assert db.value("select run_at > %s from {s}._private_executions", due)


def test_errors_of_all_attempts_are_kept_in_order(db: Database) -> None:
    """A later error in the place of an earlier one, or nobody knows which attempt it was."""
    one = run_one(db)
    db.flush(one.owner, one.ended("retried", error='{"n": 1}'))
    one = Running(one.owner, *db.claim(one.owner))
    db.flush(one.owner, one.ended("released"))
    one = Running(one.owner, *db.claim(one.owner))
    db.flush(one.owner, one.ended("failed", error='{"n": 2}'))
    ((errors,),) = db.finished(one.id, "errors")
    assert [(e["n"], e["attempt"]) for e in errors] == [(1, 1), (2, 2)]
    assert errors[0]["at"] < errors[1]["at"]


def test_of_many_errors_the_first_and_the_latest_are_kept(db: Database) -> None:
    """An execution of ten thousand attempts carries ten thousand tracebacks from claim to claim."""
    one = run_one(db)
    for n in range(1, 54):
        db.flush(one.owner, one.ended("retried", error=json.dumps({"n": n})))
        one = Running(one.owner, *db.claim(one.owner))
    (errors,) = db.live(one.id, "errors") or ([],)
    assert [e["n"] for e in errors] == [1, *range(5, 54)]


@pytest.mark.parametrize("kind", ["completed", "failed"])
def test_finished_row_has_all_that_the_live_one_had(db: Database, kind: str, has_family: bool) -> None:
    """A column forgotten when the row moves."""
    null = ["errors"] if has_family else ["errors", "parent_id"]  # who has a parent has a family
    db.register_queue()
    owner = db.register_orchestrator()
    shared_columns = [
        name
        for (name,) in db.rows(
            "select a.attname from pg_attribute a join pg_attribute b using (attname)"
            " where a.attrelid = '{s}._private_executions'::regclass and b.attrelid = '{s}._private_finished'::regclass"
            " and a.attnum > 0 and a.attname not in ('state')"
        )
    ]
    id_ = db.invoke(priority=7, payload={"a": 1}, key="k")
    db.rows(
        "update {s}._private_executions set generation = 2, max_attempts = 9, depth = 3, cancel_reason = 'r',"
        f" parent_id = {'id' if has_family else 'null'}, root_id = id, limit_key = 'l', version = 'v', tags = '{{x}}',"
        " headers = '{\"h\": 1}', crashes = 1, timeout = '7 s', backoff = '1', progress = '2'"
    )
    (claimed,) = db.claim(owner, version="v")
    columns = ", ".join(shared_columns)
    before = db.live(id_, columns)
    assert before is not None
    assert None not in [v for name, v in zip(shared_columns, before, strict=True) if name not in null]
    db.flush(owner, done(claimed, kind, **({"result": '{"r": null}'} if kind == "completed" else {})))
    assert db.live(id_) is None
    assert db.finished(id_, columns) == [before]
    assert db.finished(id_, "state::text, result, finished_at > created_at") == [
        (kind, {"r": None} if kind == "completed" else None, True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_dedupe_key_is_free_again_only_when_the_execution_has_ended(db: Database, kind: str) -> None:
    """A key that stays taken for ever, or a second execution beside one that will be retried."""
    one = run_one(db, key="k")
    db.flush(one.owner, one.ended(kind))
    ended = kind in ("completed", "failed")
    assert (db.invoke(key="k") != one.id) is ended
    assert db.value("select count(*) from {s}._private_dedupe_keys") == 1


def test_end_of_one_execution_leaves_the_key_of_another(db: Database) -> None:
    """The key of a newer execution removed by an older one that once had it (as after an operator's repair)."""
    one = run_one(db, key="k")
    other = db.invoke("elsewhere")
    db.rows("update {s}._private_dedupe_keys set execution_id = %s", other)
    db.flush(one.owner, one.ended("completed"))
    assert db.rows("select execution_id from {s}._private_dedupe_keys") == [(other,)]


# --- large payloads ---

LARGE = {"text": "".join(f"{n:x}" for n in range(4000))}


@pytest.mark.parametrize("keep", [None, 60.0, 0.0, -1.0])
def test_large_payload_is_kept_as_long_as_the_row(db: Database, keep: float | None) -> None:
    """Payloads of rows that nobody keeps pile up, or a finished execution loses its payload."""
    one = run_one(db, payload=LARGE)
    assert one.claimed.payload is None
    db.flush(one.owner, one.ended("completed", keep=keep))
    kept = keep is None or keep > 0
    assert db.value("select count(*) from {s}._private_payloads") == (1 if kept else 0)
    assert db.rows("select payload from {s}.executions where id = %s", one.id) == ([(LARGE,)] if kept else [])


def test_large_payload_is_given_to_the_claim_alone(db: Database, clock: DatabaseClock) -> None:
    """A stranger, or one that was declared dead, goes on to run it."""
    one = run_one(db, payload=LARGE)

    def load(execution: UUID, claim_no: int, owner: UUID) -> str | None:
        return db.run(db.calls.load_payload(execution, claim_no, owner))

    text = load(one.id, 1, one.owner)
    assert text is not None
    assert db.value("select %s::jsonb", text) == LARGE
    assert load(one.id, 2, one.owner) is None
    assert load(one.id, 1, uuid4()) is None
    clock.advance(2000)
    db.recover()
    assert load(one.id, 1, one.owner) is None


def test_threshold_of_large_payloads_loses_none(db: Database) -> None:
    """A payload exactly at the threshold stored in neither place, or in both."""
    db.register_queue()
    calls = [NewExecution("t", f'{{"a": "{"x" * n}"}}', "q") for n in range(1950, 2010)]
    for invoked in (
        db.invoke_many(*calls),
        db.invoke_many(*[c._replace(dedupe_key=str(n)) for n, c in enumerate(calls)]),
    ):
        for each, call in zip(invoked, calls, strict=True):
            assert db.value("select payload = %s::jsonb from {s}.executions where id = %s", call.payload, each.id)
    assert db.value(
        "select bool_and((e.payload is null) = (l.execution_id is not null)) and bool_or(e.payload is null)"
        " and bool_or(e.payload is not null)"
        " from {s}._private_executions e left join {s}._private_payloads l on l.execution_id = e.id"
    )


# --- retention ---


@pytest.mark.parametrize("keep", [None, 1.0, 60.0, 3599.0, 86_400.0, 604_800.0, 9_000_000.0, 1e9, 0.0, -5.0])
def test_finished_row_goes_to_the_first_slot_that_is_emptied_late_enough(db: Database, keep: float | None) -> None:
    """A row emptied before it may go, or kept much longer; a flush must always find a slot."""
    one = run_one(db)
    db.flush(one.owner, one.ended("completed", keep=keep))
    if keep is None:
        assert db.finished(one.id, "slot, expires_at") == [(0, None)]
    elif keep <= 0:
        assert db.finished(one.id) == []
    else:
        assert db.finished(
            one.id,
            f"expires_at = finished_at + interval '{keep} s', slot = (select no from {{s}}._private_expiry_slots s"
            " where s.no > 0 and s.expires_upto >= expires_at order by s.expires_upto limit 1)",
        ) == [(True, True)]


def test_without_other_slots_whatever_expires_goes_to_the_far_one(db: Database) -> None:
    """When nobody has maintained anything for years, a flush with a retention fails."""
    one = run_one(db)
    db.rows("update {s}._private_expiry_slots set expires_upto = '-infinity' where not is_far")
    db.flush(one.owner, one.ended("completed", keep=1.0))
    assert db.finished(one.id, "slot, expires_at is not null") == [(1, True)]


@pytest.mark.parametrize("kind", KINDS)
def test_flush_that_meets_a_change_which_leaves_the_claim_alone_is_written(db: Database, kind: str) -> None:
    """A cancellation requested at the same instant: the row moves to another place, and the outcome finds nothing."""
    one = run_one(db)
    rival, flusher = db.session(), db.session(autocommit=True)
    rival.rows("update {s}._private_executions set cancel_requested_at = now() where id = %s", one.id)
    flush = db.start(lambda: flusher.flush(one.owner, one.ended(kind)))
    db.wait_blocked(flusher, flush)
    rival.commit()
    assert flush.result(20) == {}
    assert db.finished(one.id, "state::text") == [(kind if kind in ("completed", "failed") else "cancelled",)]


def test_who_has_a_family_ends_with_it_though_the_caller_knew_of_none(db: Database) -> None:
    """A caller that is mistaken leaves the steps of a finished execution behind, and its parent waiting."""
    one = run_one(db)
    db.rows("update {s}._private_executions set is_durable = true")
    db.rows(
        "insert into {s}._private_steps (execution_id, name, kind, position, claim_no, created_at, value)"
        " values (%s, 's', 'step', 1, 1, now(), '1')",
        one.id,
    )
    assert db.flush(one.owner, one.ended("completed")) == {}
    assert db.value("select count(*) from {s}._private_steps") == 0
    assert db.finished(one.id, "state::text, steps is not null") == [("completed", True)]
