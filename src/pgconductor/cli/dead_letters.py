"""`pgconductor dead-letters` and `pgconductor retry`: look at what failed or was cancelled, and let it begin anew."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InvalidOption
from ..model import Retry
from . import report
from .exits import FAILED, complain
from .options import Common, OfQueue, OfTask, parse_execution, parse_ids, parse_instant, with_common


@with_common
def dead_letters(
    common: Common,
    execution: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Show the errors of all attempts of this execution instead.")
    ] = None,
    queue: OfQueue = None,
    task: OfTask = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Those failed, or those cancelled; otherwise both.")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="COUNT", help="So many at most, up to 10,000.")] = 100,
) -> None:
    """Show executions that failed or were cancelled and are still kept, the latest first."""
    chosen = None if execution is None else parse_execution(execution)
    with common.open_client() as client:
        if chosen is not None:
            errors = client.execution_errors(chosen)
            if common.as_json:
                report.print_json(errors)
                return
            print("\n".join(report.attempt(error) for error in errors) or "No errors are kept.")
            return
        letters = client.dead_letters(queue=queue, task=task, states=state or None, limit=limit)
        if common.as_json:
            report.print_json(letters)
            return
        report.console().print(report.dead_letter_table(letters) if letters else "No dead letters.")
        if len(letters) == limit:
            complain(f"there may be more than these {limit:,}: see --limit")


@with_common
def retry(
    common: Common,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Executions, by id.")] = None,
    queue: OfQueue = None,
    task: OfTask = None,
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
) -> None:
    """Let dead letters begin anew: those of these ids, or all that fit every option given."""
    chosen, states = parse_ids(ids or []), state or None
    after = parse_instant("--finished-after", finished_after)
    before = parse_instant("--finished-before", finished_before)
    filters = (queue, task, error_type, states, after, before, limit)
    if bool(chosen) == (everything or any(value is not None for value in filters)):
        raise InvalidOption("name executions by their ids, or choose them by --queue, --task and so on, or by --all")
    with common.open_client() as client:
        if chosen:
            done = client.retry(*chosen)
            report.print_statuses(done, as_json=common.as_json)
            if left := [str(id) for id, status in done.items() if status not in (Retry.RETRIED, Retry.LIVE)]:
                complain(f"not retried: {', '.join(left)}")
                raise typer.Exit(FAILED)
            return
        counts = client.retry_matching(
            queue=queue, task=task, error_type=error_type, states=states, finished_after=after,
            finished_before=before, limit=limit, everything=everything,
        )  # fmt: skip
        if common.as_json:
            report.print_json(counts._asdict())
            return
        print(f"{counts.retried:,} begin anew.")
        if counts.duplicates:
            print(f"{counts.duplicates:,} do not: live executions hold their dedupe keys.")
