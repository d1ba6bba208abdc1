"""`pgconductor show`, `executions`, `fork`, `restart` and `replay-check`: one execution with all that is known of it,
many by a filter, beginning anew, and whether new code could go on with what they have recorded.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated
from uuid import UUID

import trio
import typer

from ..conductor import Conductor
from ..model import ReplayReport
from ..replaying import PATIENCE
from . import report
from .exits import FAILED, complain, reported
from .options import (
    Common,
    Debug,
    Dsn,
    Embedded,
    ExecutionId,
    Json,
    ListenDsn,
    OfQueue,
    OfTask,
    OwnSchema,
    WithTags,
    parse_execution,
    parse_instant,
    with_common,
)
from .target import load_conductor


@with_common
def show(
    common: Common,
    execution: ExecutionId,
    steps: Annotated[
        bool, typer.Option("--steps", help="Show what it has done and waits for, with the values if you may see them.")
    ] = False,
) -> None:
    """Show where an execution stands."""
    execution_id = parse_execution(execution)
    with common.open_client() as client:
        status = client.status(execution_id)
        if status is None:
            complain(f"there is no execution {execution_id}, or it was not kept")
            raise typer.Exit(FAILED)
        records = client.steps(execution_id) if steps else []
        if common.as_json:
            report.print_json({"status": status, "steps": records} if steps else status)
            return
        print("\n".join(report.status_lines(status)))
        if steps:
            report.console().print(report.step_table(records) if records else "Nothing is recorded.")


@with_common
def executions(
    common: Common,
    queue: OfQueue = None,
    task: OfTask = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Those in this state; may be repeated; otherwise all.")
    ] = None,
    tag: WithTags = None,
    dedupe_key: Annotated[str | None, typer.Option(metavar="KEY", help="Those with this key.")] = None,
    parent: Annotated[str | None, typer.Option(metavar="ID", help="Children of this execution.")] = None,
    root: Annotated[str | None, typer.Option(metavar="ID", help="This execution and all beneath it.")] = None,
    created_after: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Those invoked then or later, as 2030-01-31T09:00:00+01:00.")
    ] = None,
    created_before: Annotated[str | None, typer.Option(metavar="INSTANT", help="Those invoked before then.")] = None,
    limit: Annotated[int, typer.Option(metavar="COUNT", help="So many at most, up to 10,000.")] = 100,
) -> None:
    """Find executions, live and finished, the newest first: those that fit every option given."""
    parent_id, root_id = (None if text is None else parse_execution(text) for text in (parent, root))
    after = parse_instant("--created-after", created_after)
    before = parse_instant("--created-before", created_before)
    with common.open_client() as client:
        found = client.executions(
            queue=queue, task=task, states=state or None, tags=tag or None, dedupe_key=dedupe_key, parent=parent_id,
            root=root_id, created_after=after, created_before=before, limit=limit,
        )  # fmt: skip
        if common.as_json:
            report.print_json(found)
            return
        report.console().print(report.execution_table(found) if found else "No executions.")
        if len(found) == limit:
            complain(f"there may be more than these {limit:,}: see --limit")


@with_common
def fork(
    common: Common,
    execution: ExecutionId,
    from_step: Annotated[str, typer.Option(metavar="NAME", help="What is recorded before this is copied.")],
) -> None:
    """Begin a new execution that has done what another one had done before a step; print its id."""
    execution_id = parse_execution(execution)
    with common.open_client() as client:
        _print_begun(client.fork(execution_id, from_step=from_step).id, as_json=common.as_json)


@with_common
def restart(
    common: Common,
    execution: ExecutionId,
) -> None:
    """Begin a new execution of the same task and payload as another one; print its id."""
    execution_id = parse_execution(execution)
    with common.open_client() as client:
        _print_begun(client.restart(execution_id).id, as_json=common.as_json)


def _print_begun(execution: UUID, *, as_json: bool) -> None:
    report.print_json({"id": execution}) if as_json else print(execution)


def replay_check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CONDUCTOR", help="A Conductor or an Orchestrator, or a function that returns one."
        ),
    ],
    queue: OfQueue = None,
    task: OfTask = None,
    limit: Annotated[
        int | None, typer.Option(metavar="COUNT", help="So many at most, the oldest first; otherwise all.")
    ] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="For a handler that waits for what is not durable.")
    ] = PATIENCE,
    dsn: Dsn = None,
    listen_dsn: ListenDsn = None,
    embedded: Embedded = False,
    schema: OwnSchema = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try a program's handlers against what live executions have recorded; exits with 1 if one could not go on.

    Nothing is written, and no step is called.
    """
    with reported(debug=debug):
        conductor = load_conductor(target, debug=debug)
        conductor.redirect(dsn=dsn, listen_dsn=listen_dsn, embedded=embedded, schema=schema)
        found = trio.run(partial(_check, conductor, queue, task, limit, patience))
        if as_json:
            report.print_json(found)
        else:
            for divergence in found.divergences:
                print("\n".join(report.divergence_lines(divergence)))
            print(f"{found.checked:,} executions tried, {len(found.divergences):,} of them could not go on.")
        if found.divergences:
            raise typer.Exit(FAILED)


async def _check(
    conductor: Conductor, queue: str | None, task: str | None, limit: int | None, patience: float
) -> ReplayReport:
    async with conductor:
        return await conductor.replay_check(queue=queue, task=task, limit=limit, patience=patience)
