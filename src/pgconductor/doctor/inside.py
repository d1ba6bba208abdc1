"""What only the schema's own functions may read: queues, slots, orchestrators, and what waits for whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..db.call import Call, Row
from ..db.sql_files import render
from .finding import Judged, Verdict, duration, fine, identifier, listed


class Queue(NamedTuple):
    """A registered queue and what it needs."""

    no: int
    name: str
    has_partition: bool
    has_functions: bool


class ExpirySlot(NamedTuple):
    """An expiry slot and what it needs; seconds since it expired, None before, and whether it still holds rows."""

    no: int
    has_partition: bool
    expired_for: float | None
    has_rows: bool


class Incarnation(NamedTuple):
    """An orchestrator that lives."""

    name: str
    program_version: str
    schema_version: int


class Orphan(NamedTuple):
    """What dead orchestrators hold on one queue; seconds since the last of them died, None if it is not known."""

    queue: str
    running: int
    dead_for: float | None


class Unserved(NamedTuple):
    """A task with ready rows that no living worker has; seconds since the oldest of them was due."""

    queue: str
    task: str
    ready: int
    waited: float


class Inside(NamedTuple):
    """What `_private_doctor()` tells. Lists are bounded by that function."""

    queues: list[Queue]
    slots: list[ExpirySlot]
    stray_partitions: list[str]
    orchestrators: list[Incarnation]
    orphans: list[Orphan]
    unserved: list[Unserved]


def inside(schema: str) -> Call[Inside]:
    def decode(rows: list[Row]) -> Inside:
        found: Mapping[str, Any] = rows[0][0]
        return Inside(
            [Queue(**q) for q in found["queues"]],
            [ExpirySlot(**s) for s in found["slots"]],
            list(found["stray_partitions"]),
            [Incarnation(**o) for o in found["orchestrators"]],
            [Orphan(**o) for o in found["orphans"]],
            [Unserved(**u) for u in found["unserved"]],
        )

    return Call(render("select @schema@._private_doctor()", schema).encode(), (), decode)


def judge_partitions(found: Inside, schema: str) -> Judged:
    name = identifier(schema)
    said: list[str] = []
    remedies: list[str] = []
    for queue in found.queues:
        if not queue.has_partition:
            said.append(f"queue {queue.name!r} has no partition _private_queue_{queue.no}")
            remedies.append(
                f"delete from {name}._private_queues where no = {queue.no}; then restart a worker of the queue,"
                " which registers it anew"
            )
        elif not queue.has_functions:
            said.append(f"queue {queue.name!r} lacks functions of its partition")
            remedies.append(
                f"select {name}._private_define_partition({queue.no}), {name}._private_grant_rights({queue.no})"
            )
    for slot in found.slots:
        if not slot.has_partition:
            said.append(f"expiry slot {slot.no} has no partition")
            remedies.append(f"delete from {name}._private_expiry_slots where no = {slot.no}")
    if said:
        return Verdict.PROBLEM, listed(said), remedies[0]
    if found.stray_partitions:
        return (
            Verdict.WARNING,
            f"partitions that belong to nothing: {listed(found.stray_partitions)}",
            f"if it holds no rows: drop table {name}.{identifier(found.stray_partitions[0])}",
        )
    return fine(f"{len(found.queues)} queues and {len(found.slots)} expiry slots have their partitions")


def judge_expiry(found: Inside, schema: str) -> Judged:
    late = [s for s in found.slots if s.has_rows and s.expired_for is not None and s.expired_for > 3600]
    if not late:
        return fine("what has expired is emptied")
    said = [f"{s.no} ({duration(s.expired_for or 0)} ago)" for s in late]
    return (
        Verdict.WARNING,
        f"expiry slots that expired and still hold rows: {listed(said)}",
        "let an orchestrator run, which empties them; if one does: end whoever reads from"
        f" {identifier(schema)}._private_finished_{late[0].no} in a long transaction",
    )


def judge_orphans(found: Inside) -> Judged:
    if not found.orphans:
        return fine("no dead orchestrator holds executions")
    said = [f"{o.running} of queue {o.queue!r}" for o in found.orphans]
    is_late = any(o.dead_for is None or o.dead_for > 60 for o in found.orphans)
    return (
        Verdict.PROBLEM if is_late else Verdict.WARNING,
        f"dead orchestrators hold running executions: {listed(said)}",
        f"run a worker of queue {found.orphans[0].queue!r}: its orchestrator gives them back within seconds",
    )


def judge_orchestrators(found: Inside, schema_version: int | None) -> Judged:
    if not found.orchestrators:
        return Verdict.WARNING, "no orchestrator lives", "start one: pgconductor run MODULE:ORCHESTRATOR"
    programs = sorted({o.program_version for o in found.orchestrators})
    old = [o for o in found.orchestrators if schema_version is not None and o.schema_version < schema_version]
    if old:
        said = [f"{o.name} (schema {o.schema_version}, program {o.program_version})" for o in old]
        return (
            Verdict.WARNING,
            f"made for an older schema than {schema_version}: {listed(said)}",
            "finish the deployment: restart them with the new version",
        )
    if len(programs) > 1:
        return (
            Verdict.WARNING,
            f"programs of several versions run together: {listed(programs)}",
            "finish the deployment: restart the older ones with the new version",
        )
    return fine(f"{len(found.orchestrators)} orchestrators, program {programs[0]}")


def judge_unserved(found: Inside) -> Judged:
    if not found.unserved:
        return fine("every task with ready executions has a live worker")
    said = [f"task {u.task!r} on queue {u.queue!r} ({u.ready} ready)" for u in found.unserved]
    first = found.unserved[0]
    return (
        Verdict.WARNING,
        f"no live worker has {listed(said)}; the oldest waits for {duration(max(u.waited for u in found.unserved))}",
        f"run an orchestrator whose worker of queue {first.queue!r} has task {first.task!r}",
    )
