"""`pgconductor cancel`: by id, or by filter."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InvalidOption
from ..model import Cancellation
from . import report
from .exits import FAILED, complain, reported
from .options import Debug, Dsn, Embedded, Json, ListenDsn, Schema, open_client, parse_ids, parse_instant


def cancel(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Executions, by id.")] = None,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Those on this queue.")] = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="Those of this task.")] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help="Those scheduled, ready, running or waiting; may be repeated."),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="Those with this tag; repeated: with all of them.")
    ] = None,
    created_before: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Those invoked before this, as 2030-01-31T09:00:00+01:00.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All live executions, instead of a filter.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="COUNT", help="With a filter or --all: so many at most.")] = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why, kept with the executions.")] = None,
    dsn: Dsn = None,
    listen_dsn: ListenDsn = None,
    embedded: Embedded = False,
    schema: Schema = "pgconductor",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cancel executions: those of these ids, or all that fit every option given. Handlers that run are interrupted."""
    with reported(debug=debug):
        chosen = parse_ids(ids or [])
        before = parse_instant("--created-before", created_before)
        states, tags = state or None, tag or None
        is_filtered = everything or any(value is not None for value in (queue, task, states, tags, before, limit))
        if bool(chosen) == is_filtered:
            raise InvalidOption(
                "name executions by their ids, or choose them by --queue, --task and so on, or by --all"
            )
        with open_client(dsn, listen_dsn, schema, embedded=embedded) as client:
            if chosen:
                done = client.cancel(*chosen, reason=reason)
                report.print_statuses(done, as_json=as_json)
                if unknown := [str(id) for id, status in done.items() if status is Cancellation.UNKNOWN]:
                    complain(f"there is no execution {', '.join(unknown)}, or it was not kept")
                    raise typer.Exit(FAILED)
                return
            counts = client.cancel_matching(
                queue=queue, task=task, states=states, tags=tags, created_before=before, reason=reason, limit=limit,
                everything=everything,
            )  # fmt: skip
            if as_json:
                report.print_json(counts._asdict())
            else:
                print(f"{counts.cancelled:,} cancelled, {counts.requested:,} running ones asked to end.")
