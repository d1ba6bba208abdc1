"""`pgconductor cancel`: by id, or by filter."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InvalidOption
from ..model import Cancellation
from . import report
from .exits import FAILED, complain
from .options import Common, OfQueue, OfTask, WithTags, parse_ids, parse_instant, with_common


@with_common
def cancel(
    common: Common,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Executions, by id.")] = None,
    queue: OfQueue = None,
    task: OfTask = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help="Those scheduled, ready, running or waiting; may be repeated."),
    ] = None,
    tag: WithTags = None,
    created_before: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Those invoked before this, as 2030-01-31T09:00:00+01:00.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All live executions, instead of a filter.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="COUNT", help="With a filter or --all: so many at most.")] = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why, kept with the executions.")] = None,
) -> None:
    """Cancel executions: those of these ids, or all that fit every option given. Handlers that run are interrupted."""
    chosen = parse_ids(ids or [])
    before = parse_instant("--created-before", created_before)
    states, tags = state or None, tag or None
    is_filtered = everything or any(value is not None for value in (queue, task, states, tags, before, limit))
    if bool(chosen) == is_filtered:
        raise InvalidOption("name executions by their ids, or choose them by --queue, --task and so on, or by --all")
    with common.open_client() as client:
        if chosen:
            done = client.cancel(*chosen, reason=reason)
            report.print_statuses(done, as_json=common.as_json)
            if unknown := [str(id) for id, status in done.items() if status is Cancellation.UNKNOWN]:
                complain(f"there is no execution {', '.join(unknown)}, or it was not kept")
                raise typer.Exit(FAILED)
            return
        counts = client.cancel_matching(
            queue=queue, task=task, states=states, tags=tags, created_before=before, reason=reason, limit=limit,
            everything=everything,
        )  # fmt: skip
        if common.as_json:
            report.print_json(counts._asdict())
        else:
            print(f"{counts.cancelled:,} cancelled, {counts.requested:,} running ones asked to end.")
