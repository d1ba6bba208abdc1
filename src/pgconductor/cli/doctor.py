"""`pgconductor doctor`: prints what the checks found, and exits with 1 if one of them is a problem."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.text import Text

from ..doctor import Finding, Verdict, examine, worst
from . import report
from .exits import FAILED
from .options import Common, with_common

_STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red", Verdict.UNSEEN: "dim"}


@with_common
def doctor(
    common: Common,
) -> None:
    """Look for what ails the database, and say what helps. Exits with 1 if there is a problem."""
    found = examine(common.database, common.schema)
    verdict = worst(found)
    if common.as_json:
        report.print_json({"schema": common.schema, "verdict": verdict, "checks": found})
    else:
        _print(found)
    if verdict is Verdict.PROBLEM:
        raise typer.Exit(FAILED)


def _print(found: Sequence[Finding]) -> None:
    output = report.console()
    for finding in found:
        line = Text(f"{finding.verdict:<8}", style=_STYLES[finding.verdict])
        line.append(f" {finding.check}: ", style="default")
        line.append(report.plain(finding.seen), style="default")
        output.print(line)
        if finding.remedy is not None:
            output.print(Text(f"         → {report.plain(finding.remedy)}", style="default"))
    counts = [(sum(f.verdict is verdict for f in found), verdict) for verdict in reversed(Verdict)]
    output.print(", ".join(f"{count} {verdict}" for count, verdict in counts if count))
