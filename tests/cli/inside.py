"""The command line in the tests' own process, which is quicker than one of its own."""

from __future__ import annotations

from typer.testing import CliRunner

from pgconductor.cli import app


def run(*arguments: str, stdin: str | None = None, **env: str) -> tuple[int, str, str]:
    """Run a command; return its exit status, standard output and standard error."""
    result = CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200", **env}, prog_name="pgconductor")
    return result.exit_code, result.stdout, result.stderr
