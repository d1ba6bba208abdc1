"""Steps and waits of running executions, on a session of the SQL tests: what handlers record by their journal."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from sql.database import Session

from pgconductor.db.calls import NewStep, NewWait, SavedStep, StartedWait
from pgconductor.model import Claimed


def save(
    db: Session, owner: UUID, claim: Claimed, name: str, value: object = 1, *, error: object = None, position: int = 0
) -> SavedStep:
    """Record a step; with `error`, one that failed."""
    text = None if error is not None else json.dumps(value)
    failure = None if error is None else json.dumps(error)
    (saved,) = db.run(
        db.calls.save_steps(owner, [NewStep(claim.id, claim.claim_no, name, "step", position, text, failure)])
    )
    return saved


def wait(db: Session, owner: UUID, claim: Claimed, name: str, kind: str, **spec: Any) -> StartedWait:
    """Begin a wait; `spec` as `start_waits` has it."""
    text = json.dumps({"name": name, "kind": kind, "position": 0, **spec})
    (started,) = db.run(db.calls.start_waits(owner, [NewWait(claim.id, claim.claim_no, text)]))
    return started


def child(db: Session, owner: UUID, claim: Claimed, name: str, **spec: Any) -> UUID:
    """Begin a child of task "t" on queue "q"; return its id."""
    row: dict[str, object] = {"task": "t", "queue": "q", "payload": {}}
    started = wait(db, owner, claim, name, "child", **{"on_close": "cancel", "child": row, **spec})
    assert started.status == "open"
    assert started.target is not None
    return UUID(started.target)
