"""`pgconductor dead-letters` and `pgconductor retry`: look at what failed or was cancelled, and let it begin anew."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InvalidOption
from ..model import Retry
from . import report
from .exits import FAILED, complain, reported
from .options import Debug, Dsn, Embedded, Json, ListenDsn, Schema, open_client, parse_ids, parse_instant

_Queue = Annotated[str | None, typer.Option(metavar="NAME", help="Those on this queue.")]
_Task = Annotated[str | None, typer.Option(metavar="NAME", help="Those of this task.")]


def dead_letters(
    execution: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Show the errors of all attempts of this execution instead.")
    ] = None,
    queue: _Queue = None,
    task: _Task = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Those failed, or those cancelled; otherwise both.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="COUNT", help="So many at most, up to 10,000.")] = 100,
    dsn: Dsn = None,
    listen_dsn: ListenDsn = None,
    embedded: Embedded = False,
    schema: Schema = "pgconductor",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show executions that failed or were cancelled and are still kept, the latest first."""
    with reported(debug=debug), open_client(dsn, listen_dsn, schema, embedded=embedded) as client:
        if execution is not None:
            errors = client.execution_errors(*parse_ids([execution]))
            if as_json:
                report.print_json(errors)
                return
            print("\n".join(report.attempt(error) for error in errors) or "No errors are kept.")
            return
        letters = client.dead_letters(queue=queue, task=task, states=state or None, limit=limit)
        if as_json:
            report.print_json(letters)
            return
        report.console().print(report.dead_letter_table(letters) if letters else "No dead letters.")
        if len(letters) == limit:
            complain(f"there may be more than these {limit:,}: see --limit")


def retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Executions, by id.")] = None,
    queue: _Queue = None,
    task: _Task = None,
    error_type: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Those whose last error is of this type, as ValueError or timeout."),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="STATE", help="Those failed or cancelled; may be repeated; otherwise those failed."),
    ] = None,
    finished_after: Annotated[
        str | None,
        typer.Option(metavar="INSTANT", help="Those that ended then or later, as 2030-01-31T09:00:00+01:00."),
    ] = None,
    finished_before: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Those that ended before then; otherwise before now.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that failed, instead of a filter.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="COUNT", help="With a filter or --all: so many at most.")] = None,
    dsn: Dsn = None,
    listen_dsn: ListenDsn = None,
    embedded: Embedded = False,
    schema: Schema = "pgconductor",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let dead letters begin anew: those of these ids, or all that fit every option given."""
    with reported(debug=debug):
        chosen, states = parse_ids(ids or []), state or None
        after = parse_instant("--finished-after", finished_after)
        before = parse_instant("--finished-before", finished_before)
        filters = (queue, task, error_type, states, after, before, limit)
        if bool(chosen) == (everything or any(value is not None for value in filters)):
            raise InvalidOption(
                "name executions by their ids, or choose them by --queue, --task and so on, or by --all"
            )
        with open_client(dsn, listen_dsn, schema, embedded=embedded) as client:
            if chosen:
                done = client.retry(*chosen)
                report.print_statuses(done, as_json=as_json)
                if left := [str(id) for id, status in done.items() if status not in (Retry.RETRIED, Retry.LIVE)]:
                    complain(f"not retried: {', '.join(left)}")
                    raise typer.Exit(FAILED)
                return
            counts = client.retry_matching(
                queue=queue, task=task, error_type=error_type, states=states, finished_after=after,
                finished_before=before, limit=limit, everything=everything,
            )  # fmt: skip
            if as_json:
                report.print_json(counts._asdict())
                return
            print(f"{counts.retried:,} begin anew.")
            if counts.duplicates:
                print(f"{counts.duplicates:,} do not: live executions hold their dedupe keys.")
