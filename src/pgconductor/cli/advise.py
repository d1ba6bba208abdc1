"""`pgconductor advise`: prints what to do about each queue, and by which figures; exits with 0 whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from ..advice import Advice, Recommendation
from . import report
from .options import Common, with_common

_STYLES = {Recommendation.FINE: "green", Recommendation.NOT_KNOWN: "dim"}


@with_common
def advise(
    common: Common,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="This queue alone.")] = None,
    seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="Look twice, so long apart, and go by what comes and goes in between."),
    ] = 0.0,
) -> None:
    """Say of each queue whether it needs more processes, or to be split, or is fine, with the figures."""
    with common.open_client() as client:
        found = client.advise(queue, seconds=seconds)
    if common.as_json:
        report.print_json({"schema": common.schema, "queues": found})
    else:
        _print(found)


def _print(found: Sequence[Advice]) -> None:
    output = report.console()
    if not found:
        output.print("No queues yet.")
        return
    output.print(report.load_table([advice.load for advice in found]))
    for advice in found:
        line = Text(report.plain(advice.queue), style="bold")
        line.append(f": {advice.verdict}", style=_STYLES.get(advice.verdict, "yellow"))
        line.append(f": {report.plain(advice.why)}", style="default")
        output.print(line)
        for note in advice.notes:
            output.print(Text(f"    also: {report.plain(note)}"))
        if advice.remedy is not None:
            output.print(Text(f"    → {report.plain(advice.remedy)}"))
