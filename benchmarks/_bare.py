"""The floor: one connection that moves executions through the engine's own tables in batches, and does nothing else.

Claim a batch (committed asynchronously, as the engine's claims are), insert one step of each execution of the batch,
then the next step, then move the batch to the finished table, or delete it where finished rows are not kept. No fence,
no decoding, no handler.
"""

from __future__ import annotations

import time

from .harness import BenchmarkError, Connection

_CLAIM = b"""
    with picked as materialized (
        select ctid from pgconductor._private_queue_%d where state = 'ready'
        order by priority desc, run_at, id limit %d for update skip locked
    )
    update pgconductor._private_queue_%d e
    set state = 'running', owner = '00000000-0000-8000-8000-000000000000', claim_no = e.claim_no + 1,
        attempt = e.attempt + 1, claimed_at = clock_timestamp()
    from picked p where e.ctid = p.ctid
    returning e.id, e.claim_no, e.task, e.attempt, e.payload::text
"""
_FINISH = b"""
    with gone as (delete from pgconductor._private_queue_%d where id = any($1::uuid[]) returning *)
    insert into pgconductor._private_finished (slot, priority, attempt, crashes, generation, max_attempts, depth, state,
        id, owner, claim_no, run_at, created_at, claimed_at, finished_at, queue, task, dedupe_key, payload, result,
        errors, cancel_reason, parent_id, root_id, limit_key, version, tags, headers)
    select 0, priority, attempt, crashes, generation, max_attempts, depth, 'completed', id, owner, claim_no, run_at,
        created_at, claimed_at, clock_timestamp(), queue, task, dedupe_key, payload, 'null', errors, cancel_reason,
        parent_id, root_id, limit_key, version, tags, headers
    from gone
"""
_FORGET = b"delete from pgconductor._private_queue_%d where id = any(%%s::uuid[])"
_STEP = b"""
    insert into pgconductor._private_steps (execution_id, name, kind, position, claim_no, created_at, value)
    select id, %s, 'step', %s, 1, clock_timestamp(), %s from unnest(%s::uuid[]) id
"""


def bare_loop(
    conn: Connection, queue_no: int, count: int, batch: int, steps: int = 0, *, keeps_rows: bool = True
) -> float:
    """Finish `count` executions of a queue; `conn` is in autocommit. Return the seconds that it took."""
    began = time.perf_counter()
    claim = _CLAIM % (queue_no, batch, queue_no)
    finish = (_FINISH.replace(b"$1", b"%%s") if keeps_rows else _FORGET) % queue_no
    done = 0
    while done < count:
        with conn.pipeline(), conn.transaction():
            conn.execute(b"set local synchronous_commit = off")
            claimed = conn.execute(claim, prepare=True)
        ids = [row[0] for row in claimed]
        if not ids:
            raise BenchmarkError(f"the bare loop finds {done} of {count} executions in its partition")
        for number in range(1, steps + 1):
            conn.execute(_STEP, (f"s{number}", number, f'{{"step": {number}}}', ids), prepare=True)
        finished = conn.execute(finish, (ids,), prepare=True).rowcount
        if finished != len(ids):
            raise BenchmarkError(f"the bare loop claimed {len(ids)} executions and finished {finished} of them")
        done += finished
    return time.perf_counter() - began
