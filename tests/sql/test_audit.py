"""The audit: each violation is planted, and the check must name it; the guard must refuse what is not a transition.

A check that cannot fail would let every other test pass that relies on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
import trio
from sql.audited import Audited, open_audited
from sql.database import Database, done
from sql.records import child, save, wait

from pgconductor import TrioConnection
from pgconductor.testing import Databases, DatabaseServer
from pgconductor.testing.audit import check, check_sync, install_audit, leftovers, leftovers_sync

LARGE = {"text": "".join(str(uuid4()) for _ in range(300))}


@pytest.fixture(scope="module")
def audited_database(pgconductor_databases: Databases) -> Iterator[Audited]:
    with open_audited(pgconductor_databases) as audited:
        yield audited


@pytest.fixture
def audited(audited_database: Audited) -> Iterator[Audited]:
    """An audited database as after a fresh install, with queue "q"."""
    audited_database.reset()
    audited_database.db.register_queue()
    yield audited_database
    audited_database.db.close_sessions()


def unguarded(db: Database, query: str, *params: object) -> None:
    """Change something without triggers."""
    db.rows("set session_replication_role = replica")
    try:
        db.rows(query, *params)
    finally:
        db.rows("reset session_replication_role")


def rules(audited: Audited, **options: float) -> set[str]:
    return {violation.rule for violation in check_sync(audited.db.conn, **options)}  # type: ignore[arg-type]


def live_through_everything(audited: Audited) -> dict[str, UUID]:
    """One execution for each way there is, all of which are allowed."""
    db = audited.db
    first, second = db.register_orchestrator(lease=10), db.register_orchestrator()
    ids = {
        name: db.invoke(key=name, payload=LARGE) for name in ("completed", "failed", "retried", "released", "crashed")
    }
    ids["later"] = db.invoke(delay=50)
    claimed = {claim.id: claim for claim in db.claim(first)}
    assert len(claimed) == 5
    outcomes = [done(claimed[ids[kind]], kind) for kind in ("completed", "failed", "retried", "released")]
    assert db.flush(first, *outcomes) == {}
    assert set(db.flush(first, *outcomes).values()) == {"already"}
    db.claim(second, limit=1)
    audited.clock.advance(60)
    db.claim(second, limit=100)
    assert db.recover() == (1, 0)
    db.claim(second)
    db.run(db.calls.retire_orchestrator(second))
    return ids


def live_through_waiting(audited: Audited) -> dict[str, UUID]:
    """A parent whose child has ended and whose sleep is over; another that waits for both; a failure that is tried
    again.
    """
    db = audited.db
    owner = db.register_orchestrator()
    ids = {"parent": db.invoke(), "waiting": db.invoke(), "retried": db.invoke()}
    claims = {claim.id: claim for claim in db.claim(owner)}
    for name in ("parent", "waiting"):
        claim = claims[ids[name]]
        save(db, owner, claim, "step", 1)
        wait(db, owner, claim, "nap", "sleep", due_in=5 if name == "parent" else 500)
        ids[f"child of {name}"] = child(db, owner, claim, "child")
        save(db, owner, claim, "step", 2)
    again = claims[ids["retried"]]
    save(db, owner, again, "broken", error={"type": "E", "message": "once"})
    outcomes = [done(claims[ids[name]], "waiting") for name in ("parent", "waiting")]
    assert db.flush(owner, *outcomes, done(again, "retried")) == {}
    assert db.flush(owner, *outcomes) != {}
    (first,) = (claim for claim in db.claim(owner) if claim.id == ids["child of parent"])
    db.flush(owner, done(first))
    audited.clock.advance(6)
    (parent,) = (claim for claim in db.claim(owner) if claim.id == ids["parent"])
    db.run(db.calls.load_history(owner, parent.id, parent.claim_no))
    child(db, owner, parent, "left behind")
    db.flush(owner, done(parent, "failed", error='{"type": "E", "message": "on purpose"}'))
    assert db.rows("select status from {s}.retry(%s::uuid[])", [parent.id]) == [("retried",)]
    return ids


# --- what is allowed ---


def test_check_is_silent_about_what_is_allowed(audited: Audited) -> None:
    """Every other test that asks the check fails for no reason."""
    ids = live_through_everything(audited)
    assert audited.check(owner_bound=0.0) == []
    assert {v.rule for v in audited.check(settled=True)} == {"L1"}
    assert check_sync(audited.db.conn, acknowledged=ids.values(), acknowledged_keys=["retried"]) == []
    steps = audited.db.rows(
        "select from_state, to_state, claim_no, outcome, attempt, crashes"
        " from {s}._test_audit where execution = %s order by seq",
        ids["crashed"],
    )
    assert steps == [
        (None, "ready", 0, None, 0, 0),
        ("ready", "running", 1, None, 1, 0),
        ("running", "ready", 1, "recovered", 0, 1),
        ("ready", "running", 2, None, 1, 1),
        ("running", "ready", 2, "released", 0, 1),
    ]


def test_check_is_silent_about_steps_and_waits(audited: Audited) -> None:
    """As above, for what waits and what is recorded."""
    ids = live_through_waiting(audited)
    assert audited.check() == []
    changes = audited.db.rows(
        "select name, change, claim_no, outcome from {s}._test_records where execution = %s and name <> 'left behind'"
        " order by txid, name, change",
        ids["parent"],
    )
    assert changes == [
        ("step", "saved", 1, None),
        ("nap", "begun", 1, None),
        ("child", "begun", 1, None),
        ("child", "resolved", 1, "completed"),
        ("child", "told", 1, "completed"),
        ("nap", "resolved", 1, "elapsed"),
        *[("child", "dropped", 1, "completed"), ("nap", "dropped", 1, "elapsed"), ("step", "dropped", 1, None)],
        *[("child", "saved", 1, "completed"), ("nap", "saved", 1, "elapsed"), ("step", "saved", 1, "completed")],
    ]
    assert {v.rule for v in audited.check(settled=True)} == {"L1"}


def test_end_that_is_not_kept_is_no_loss(audited: Audited) -> None:
    """A task whose results nobody keeps is reported as lost."""
    db = audited.db
    owner, one = db.register_orchestrator(), db.invoke()
    (claim,) = db.claim(owner)
    db.flush(owner, done(claim, keep=0.0))
    assert check_sync(db.conn, acknowledged=[one], settled=True) == []


def test_audit_covers_queues_registered_later(audited: Audited) -> None:
    """A partition without the triggers is a blind spot."""
    db = audited.db
    db.register_queue("late")
    one = db.invoke("late")
    with pytest.raises(psycopg.Error, match="forbidden transition"):
        db.rows("update {s}._private_executions set claim_no = 5 where id = %s", one)
    assert db.value("select count(*) from {s}._test_audit where execution = %s", one) == 1


@pytest.mark.parametrize("schema", ['odd "name" $$ \\'])
def test_audit_in_a_schema_of_any_name(pgconductor_server: DatabaseServer, schema: str) -> None:
    """The faults are only checked where the schema has its usual name."""
    databases = Databases(pgconductor_server, schema)
    try:
        with open_audited(databases, schema) as audited:
            audited.db.register_queue()
            live_through_everything(audited)
            assert audited.check() == []
    finally:
        databases.close()


async def test_audit_on_trio(pgconductor_dsn: str) -> None:
    """The chaos run and the runtime's tests cannot ask it."""
    async with await TrioConnection.connect(pgconductor_dsn, autocommit=True) as conn:
        await install_audit(conn)
        await install_audit(conn)
        await conn.execute("select pgconductor.invoke('t')")
        assert [v.rule for v in await check(conn, settled=True)] == ["L1"]
        assert await leftovers(conn) == []
    await trio.lowlevel.checkpoint()


# --- the guard ---


@pytest.mark.parametrize(
    ("start", "change"),
    [
        ("ready", "claim_no = claim_no + 1"),
        ("ready", "state = 'running', owner = gen_random_uuid()"),
        ("ready", "state = 'running', owner = gen_random_uuid(), claim_no = claim_no + 1"),
        ("ready", "state = 'running', owner = gen_random_uuid(), claim_no = claim_no + 2, attempt = attempt + 1"),
        ("ready", "state = 'scheduled'"),
        ("ready", "state = 'waiting'"),
        ("ready", "generation = generation + 1"),
        ("ready", "dedupe_key = 'another'"),
        ("ready", "crashes = crashes + 1"),
        ("scheduled", "state = 'running', owner = gen_random_uuid(), claim_no = claim_no + 1, attempt = attempt + 1"),
        ("scheduled", "state = 'waiting'"),
        ("running", "claim_no = claim_no - 1"),
        ("running", "owner = gen_random_uuid()"),
        ("running", "owner = gen_random_uuid(), claim_no = claim_no + 1"),
        ("running", "attempt = attempt - 1"),
        ("running", "state = 'ready', owner = null"),
        ("running", "state = 'ready', owner = null, outcome = 'retried', outcome_claim = claim_no, attempt = 0"),
        ("running", "state = 'ready', owner = null, outcome = 'released', outcome_claim = claim_no"),
        ("running", "state = 'ready', owner = null, outcome = 'recovered', outcome_claim = claim_no"),
        ("running", "state = 'ready', owner = null, outcome = 'retried', outcome_claim = claim_no, crashes = 1"),
        ("cancelled", "state = 'ready', owner = null, outcome = 'retried', outcome_claim = claim_no"),
        (
            "running",
            "state = 'waiting', owner = null, outcome = 'waiting', outcome_claim = claim_no, is_durable = true",
        ),
        (
            "running",
            "state = 'waiting', owner = null, outcome = 'waiting', outcome_claim = claim_no, attempt = attempt - 1",
        ),
        (
            "running",
            "state = 'waiting', owner = null, outcome = 'released', outcome_claim = claim_no, attempt = attempt - 1,"
            " is_durable = true",
        ),
        ("running", "state = 'ready', owner = null, outcome = 'waiting', outcome_claim = claim_no, attempt = 0"),
        (
            "cancelled",
            "state = 'waiting', owner = null, outcome = 'waiting', outcome_claim = claim_no, attempt = attempt - 1,"
            " is_durable = true",
        ),
        ("waiting", "state = 'running', owner = gen_random_uuid(), claim_no = claim_no + 1, attempt = attempt + 1"),
        ("waiting", "state = 'scheduled', run_at = now()"),
        ("waiting", "state = 'ready', attempt = attempt + 1"),
        ("crashed", "state = 'running', owner = gen_random_uuid(), claim_no = claim_no + 1, attempt = attempt + 1"),
        ("finished", "state = 'failed'"),
        ("finished", "result = '1'"),
    ],
)
def test_guard_refuses_what_is_no_transition(audited: Audited, start: str, change: str) -> None:
    """A verb that breaks the state machine goes on unnoticed until its row is looked at."""
    db = audited.db
    owner = db.register_orchestrator()
    one = db.invoke(delay=100 if start == "scheduled" else None)
    if start == "crashed":
        unguarded(db, "update {s}._private_executions set crashes = 3")
    if start in ("running", "cancelled", "finished", "waiting"):
        (claim,) = db.claim(owner)
        if start == "waiting":
            wait(db, owner, claim, "nap", "sleep", due_in=500)
            db.flush(owner, done(claim, "waiting"))
    if start == "cancelled":
        db.rows("update {s}._private_executions set cancel_requested_at = now()")
    if start == "finished":
        db.flush(owner, done(db.claimed(one, 1)))
    before = db.dump()
    table = "_private_finished" if start == "finished" else "_private_executions"
    with pytest.raises(psycopg.Error, match="forbidden transition"):
        db.rows(f"update {{s}}.{table} set {change} where id = %s", one)
    assert db.dump() == before


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("steps", "value = '2'"),
        ("steps", "name = 'another'"),
        ("waits", "due_at = due_at + interval '1 s'"),
        ("waits", "claim_no = claim_no + 1"),
        ("waits", "target = 'another'"),
        ("waits", "value = '2'"),
        ("waits", "is_seen = true"),
        ("resolved", "outcome = 'failed'"),
        ("resolved", "value = '2'"),
        ("resolved", "resolved_at = null, outcome = null"),
        ("resolved", "is_seen = true, value = '2'"),
        ("told", "is_seen = false"),
    ],
)
def test_guard_refuses_what_never_becomes_of_a_record(audited: Audited, table: str, change: str) -> None:
    """A value that a handler has seen is another at its next replay."""
    db = audited.db
    owner, one = db.register_orchestrator(), db.invoke()
    (claim,) = db.claim(owner)
    save(db, owner, claim, "step", 1)
    wait(db, owner, claim, "nap", "sleep", due_in=5)
    if table in ("resolved", "told"):
        now = "resolved_at = now(), outcome = 'elapsed'"
        db.rows(f"update {{s}}._private_waits set {now}, is_seen = %s", table == "told")
    before = db.dump()
    with pytest.raises(psycopg.Error, match="forbidden transition"):
        db.rows(
            f"update {{s}}._private_{'steps' if table == 'steps' else 'waits'} set {change} where execution_id = %s",
            one,
        )
    assert db.dump() == before


# --- the check: each violation planted ---


def test_check_finds_lost_acknowledged_ones(audited: Audited) -> None:
    """An execution vanishes between acknowledgement and end."""
    db = audited.db
    kept, lost = db.invoke(), uuid4()
    found = check_sync(db.conn, acknowledged=[kept, lost], acknowledged_keys=["never"])
    assert [(v.rule, v.execution) for v in found] == [("I1", lost), ("I1", None)]


def test_check_finds_a_row_that_vanished(audited: Audited) -> None:
    """Partitions truncated by mistake lose executions that nobody remembers."""
    one = audited.db.invoke()
    unguarded(audited.db, "delete from {s}._private_executions")
    assert [(v.rule, v.execution) for v in audited.check()] == [("I1", one)]


PLANTS = {
    "one record for two ends": (
        "I4",
        "insert into {s}._private_finished select * from {s}._private_finished where id = %s limit 1",
    ),
    "live and finished": (
        "I4",
        "insert into {s}._private_executions (queue_no, id, queue, task, state, claim_no, run_at, created_at, payload)"
        " select 1, id, queue, task, 'ready', claim_no, now(), now(), '{{}}'"
        " from {s}._private_finished where id = %s limit 1",
    ),
    "attempts over the limit": (
        "I12",
        "update {s}._private_finished set attempt = 4, max_attempts = 3 where id = %s",
    ),
    "crashes over the limit": ("I12", "update {s}._private_finished set crashes = 4 where id = %s"),
    "large payload lost": ("payload", "delete from {s}._private_payloads where execution_id = %s"),
    "payload left behind": ("orphan", "delete from {s}._private_finished where id = %s"),
    "key left behind": (
        "orphan",
        "insert into {s}._private_dedupe_keys (queue, task, key, execution_id) values ('q', 't', 'left', %s)",
    ),
    "step left behind": (
        "orphan",
        "insert into {s}._private_steps (execution_id, name, kind, position, claim_no, created_at)"
        " values (%s, 's', 'step', 0, 1, now())",
    ),
    "wait left behind": (
        "orphan",
        "insert into {s}._private_waits (execution_id, name, kind, created_at) values (%s, 's', 'child', now())",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_check_finds_what_is_wrong_with_an_ended_one(audited: Audited, plant: str) -> None:
    """What its name says goes unnoticed."""
    rule, statement = PLANTS[plant]
    ids = live_through_everything(audited)
    unguarded(audited.db, statement.replace("{{}}", "{}"), ids["completed"])
    assert rule in {v.rule for v in audited.check()}


LIVE_PLANTS = {
    "two live ones of one key": (
        "I11",
        "insert into {s}._private_executions"
        " (queue_no, id, queue, task, state, run_at, created_at, dedupe_key, payload)"
        " select 1, gen_random_uuid(), queue, task, 'ready', now(), now(), dedupe_key, payload"
        " from {s}._private_executions where id = %s",
    ),
    "key lost": ("I11", "delete from {s}._private_dedupe_keys where execution_id = %s"),
    "large payload lost": ("payload", "delete from {s}._private_payloads where execution_id = %s"),
    "changed behind the audit": ("history", "update {s}._private_executions set claim_no = claim_no + 1 where id = %s"),
    "attempts over the limit": (
        "I12",
        "update {s}._private_executions set attempt = 2, claim_no = 2, max_attempts = 1 where id = %s",
    ),
    "crashes over the limit": ("I12", "update {s}._private_executions set crashes = 3 where id = %s"),
}


@pytest.mark.parametrize("plant", LIVE_PLANTS)
def test_check_finds_what_is_wrong_with_a_live_one(audited: Audited, plant: str) -> None:
    """What its name says goes unnoticed."""
    rule, statement = LIVE_PLANTS[plant]
    one = audited.db.invoke(key="k", payload=LARGE)
    assert audited.check() == []
    unguarded(audited.db, statement, one)
    assert rule in {v.rule for v in audited.check()}


# Statements on the executions of `live_through_waiting`: a rule, which execution, what.
WAITING_PLANTS = {
    "child of a waiting parent gone": (
        "I9",
        "child of waiting",
        "delete from {s}._private_executions where id = %s",
    ),
    "wait of a waiting parent gone": ("I9", "waiting", "delete from {s}._private_waits where execution_id = %s"),
    "waiting, and nobody woke it": (
        "I9",
        "waiting",
        "update {s}._private_waits set resolved_at = now(), outcome = 'completed'"
        " where execution_id = %s and kind = 'child'",
    ),
    "waiting beyond what is due": (
        "I9",
        "waiting",
        "update {s}._private_executions set state = 'waiting', run_at = now() + interval '30 d' where id = %s",
    ),
    "mark of its records lost": (
        "history",
        "waiting",
        "update {s}._private_executions set is_durable = false where id = %s",
    ),
    "child nobody waits for": (
        "I8",
        "child of waiting",
        "update {s}._private_executions set wait_name = 'another' where id = %s",
    ),
    "step begun by no claim": (
        "I5",
        "waiting",
        "insert into {s}._private_steps (execution_id, name, kind, position, claim_no, created_at)"
        " values (%s, 's', 'step', 9, 1, now())",
    ),
    "step of another claim": (
        "I5",
        "retried",
        "insert into {s}._private_steps (execution_id, name, kind, position, claim_no, created_at, attempt)"
        " values (%s, 's', 'step', 9, 1, now(), 2)",
    ),
    "step lost while it goes on": ("I6", "waiting", "delete from {s}._private_steps where execution_id = %s"),
    "step written anew": (
        "I6",
        "waiting",
        "with gone as (delete from {s}._private_steps where execution_id = %s returning *)"
        " insert into {s}._private_steps (execution_id, name, kind, position, claim_no, created_at, value)"
        " select execution_id, 'again', kind, position, claim_no, created_at, '2' from gone",
    ),
    "event of a former life received again": (
        "received",
        "waiting",
        "with seen as (update {s}._private_waits set event_id = 7 where execution_id = %s and name = 'nap'"
        " returning execution_id)"
        " insert into {s}._private_receipts (execution_id, event_id, check_at) select execution_id, 7, now() from seen",
    ),
    "wait of a child resolved by nobody": (
        "I9",
        "waiting",
        "update {s}._private_waits set resolved_at = now(), outcome = 'completed', is_seen = true"
        " where execution_id = %s and kind = 'child'",
    ),
}
# Through the triggers, since it is they that are to tell.
SEEN = {"step begun by no claim", "step of another claim", "step lost while it goes on", "step written anew",
        "wait of a child resolved by nobody"}  # fmt: skip


@pytest.mark.parametrize("plant", WAITING_PLANTS)
def test_check_finds_what_is_wrong_with_steps_and_waits(audited: Audited, plant: str) -> None:
    """What its name says goes unnoticed."""
    rule, name, statement = WAITING_PLANTS[plant]
    ids = live_through_waiting(audited)
    db = audited.db
    if name == "retried":
        db.claim(next(iter(db.rows("select id from {s}._private_orchestrators")))[0])
    assert audited.check() == []
    if plant in SEEN:
        db.rows(statement, ids[name])
    else:
        unguarded(db, statement, ids[name])
    assert rule in {v.rule for v in audited.check()}


def test_check_finds_two_children_of_one_name(audited: Audited) -> None:
    """A child is made twice, and one of the two is nobody's."""
    db = audited.db
    owner = db.register_orchestrator()
    db.invoke()
    (claim,) = db.claim(owner)
    child(db, owner, claim, "child")
    unguarded(db, "delete from {s}._private_waits")
    child(db, owner, claim, "child")
    assert "I8" in {v.rule for v in audited.check()}


def test_check_finds_another_value_after_a_retry(audited: Audited) -> None:
    """A former life said 1, and this one is told 2."""
    db = audited.db
    owner = db.register_orchestrator()
    one = db.invoke()
    (claim,) = db.claim(owner)
    save(db, owner, claim, "step", 1)
    db.flush(owner, done(claim, "failed", error='{"type": "E", "message": "on purpose"}'))
    unguarded(db, "update {s}._private_finished set steps = jsonb_set(steps, '{0,value}', '2')")
    db.rows("select status from {s}.retry(%s::uuid[])", [one])
    assert [v.rule for v in audited.check()] == ["I6"]


def test_check_finds_children_that_are_still_to_be_cancelled(audited: Audited) -> None:
    """Children of the dead run on."""
    audited.db.rows("insert into {s}._private_closings values (%s, 'its parent has ended', now())", uuid4())
    assert audited.check() == []
    assert [v.rule for v in audited.check(settled=True)] == ["L1"]


Entry = tuple[object, ...]
A, B = UUID(int=10), UUID(int=11)
BORN = (None, "ready", 0, None, None, 0)
CLAIMED = ("ready", "running", 1, A, None, 0)
LEFT = ("running", None, 1, A, None, 0)
ENDED = (None, "completed", 1, A, None, 0)
# from_state, to_state, claim_no, owner, outcome, generation; one transaction each, but an end of two.
HISTORIES: dict[str, tuple[str, list[Entry]]] = {
    "claim number used again": (
        "I2",
        [BORN, CLAIMED, ("running", "ready", 1, A, "released", 0), ("ready", "running", 1, B, None, 0)],
    ),
    "two owners of a claim": ("I2", [BORN, CLAIMED, ("running", "running", 1, B, None, 0)]),
    "claim number forgotten when opened again": ("I2", [BORN, CLAIMED, LEFT, ENDED, (None, "ready", 0, None, None, 1)]),
    "alive after its end": ("I3", [BORN, CLAIMED, LEFT, ENDED, ("ready", "running", 2, B, None, 0)]),
    "opened again in the same generation": ("I3", [BORN, CLAIMED, LEFT, ENDED, (None, "ready", 1, None, None, 0)]),
    "inserted twice": ("I3", [BORN, BORN]),
    "ended twice": ("I4", [BORN, CLAIMED, LEFT, ENDED, LEFT]),
    "two terminal records": ("I4", [BORN, CLAIMED, LEFT, ENDED, ENDED]),
    "ended by a claim that was revoked": (
        "I5",
        [BORN, CLAIMED, ("running", "ready", 1, A, "recovered", 0), ("ready", "running", 2, B, None, 0), LEFT, ENDED],
    ),
    "ended by another owner": ("I5", [BORN, CLAIMED, ("running", None, 1, B, None, 0), ENDED]),
    "claim ended twice": (
        "I5",
        [BORN, CLAIMED, ("running", "ready", 1, A, "retried", 0), ("running", "ready", 1, A, "retried", 0)],
    ),
    "state changed unseen": ("history", [BORN, ("running", "ready", 1, A, "retried", 0)]),
    "end out of nowhere": ("transition", [BORN, CLAIMED, ENDED]),
    "completed without running": (
        "transition",
        [BORN, ("ready", None, 0, None, None, 0), (None, "completed", 0, None, None, 0)],
    ),
    "born running": ("transition", [(None, "running", 1, A, None, 0)]),
    "born with a claim": ("transition", [(None, "ready", 1, None, None, 0)]),
}


def write_history(db: Database, execution: UUID, history: list[Entry]) -> None:
    transaction = 0
    for n, row in enumerate(history):
        if not (n and row[0] is None and row[1] in ("completed", "failed", "cancelled")):
            transaction += 1
        db.rows(
            "insert into {s}._test_audit (execution, from_state, to_state, claim_no, owner, outcome, generation,"
            " attempt, crashes, txid, at) values (%s, %s, %s, %s, %s, %s, %s, 0, 0, %s, now())",
            execution,
            *row,
            -transaction,
        )


@pytest.mark.parametrize("history", HISTORIES)
def test_check_finds_what_is_wrong_in_a_history(audited: Audited, history: str) -> None:
    """What its name says goes unnoticed once the rows look right again."""
    rule, rows = HISTORIES[history]
    db = audited.db
    other = db.invoke()
    write_history(db, execution := uuid4(), rows)
    found = [v for v in audited.check() if not v.words.endswith("gone without an end")]
    assert rule in {v.rule for v in found}
    assert {v.execution for v in found} == {execution}
    assert other != execution


def test_check_allows_histories_that_are_right(audited: Audited) -> None:
    """A hand-over, or an execution opened again, is taken for a breach."""
    right: list[list[Entry]] = [
        [BORN, CLAIMED, ("running", "running", 1, B, "handed_over", 0), ("running", None, 1, B, None, 0)],
        [BORN, CLAIMED, ("running", "running", 1, A, "cancel_requested", 0), LEFT, (None, "cancelled", 1, A, None, 0)],
        [
            BORN,
            CLAIMED,
            LEFT,
            (None, "failed", 1, A, None, 0),
            (None, "ready", 1, None, None, 1),
            ("ready", None, 1, None, None, 1),
        ],
        [BORN, ("ready", None, 0, None, None, 0), (None, "cancelled", 0, None, None, 0)],
    ]
    for history in right:
        write_history(audited.db, uuid4(), history)
    assert audited.check() == []


@pytest.mark.parametrize("owner", ["expired", "dead", "unknown"])
def test_check_finds_what_nobody_rescues(audited: Audited, owner: str) -> None:
    """Executions of the dead stay running for ever."""
    db = audited.db
    holder, one = db.register_orchestrator(lease=10), db.invoke()
    db.claim(holder)
    audited.clock.advance(12)
    if owner == "dead":
        db.rows("update {s}._private_orchestrators set died_at = expires_at")
    if owner == "unknown":
        db.rows("delete from {s}._private_orchestrators")
    assert audited.check(owner_bound=20) == []
    assert [(v.rule, v.execution) for v in audited.check(owner_bound=1)] == [("I14", one)]


def test_check_finds_what_is_left_undone(audited: Audited) -> None:
    """A wedged queue looks like a quiet one."""
    db = audited.db
    due, one = db.invoke(delay=5), db.invoke()
    db.invoke(delay=500)
    assert {v.execution for v in audited.check(settled=True)} == {one}
    audited.clock.advance(10)
    assert {v.execution for v in audited.check(settled=True)} == {one, due}
    assert audited.check() == []


def test_check_names_no_more_than_it_is_asked_for(audited: Audited) -> None:
    """A broken run of 200,000 executions answers with 200,000 lines."""
    audited.db.rows("select {s}.invoke('t', queue => 'q') from generate_series(1, 20)")
    assert len(check_sync(audited.db.conn, settled=True, limit=7)) == 7


# --- leftovers ---


def test_leftovers_are_named(audited: Audited, tmp_path: Path) -> None:
    """An open transaction keeps old rows for ever; a deadlock that was retried is never heard of."""
    db = audited.db
    log = tmp_path / "server.log"
    log.write_text("LOG: all is well\nERROR: PC001: misuse\n")
    assert leftovers_sync(db.conn, log=log) == []
    open_one = db.session()
    open_one.rows("select 1")
    log.write_text(
        "ERROR:  deadlock detected\nLOG: fine\nERROR:  XX000: cache lookup failed\nPANIC:  could not write\n"
    )
    found = leftovers_sync(db.conn, log=log)
    assert [v.rule for v in found] == ["idle_in_transaction", "deadlock", "internal_error", "panic"]
    assert str(open_one.pid) in found[0].words
    assert "line 3" in found[2].words
