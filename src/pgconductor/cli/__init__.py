"""The command line: `pgconductor migrate | run | invoke | show | executions | emit | cancel | retry | ... | demo`.

Each command opens what it needs, does one thing and exits; what it exits with is listed in `exits`. Only `run` and
`demo` run a Trio loop; the others use the client that needs none. A command says what it found on stdout and what went
wrong on stderr, so that the output can be piped. Only `demo` uses the embedded server unasked.

Cancellation: Ctrl-C ends any command with status 130, except a `run` that has begun, which stops as it was asked to
and exits with 0.
"""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, cast

import trio
import typer

from ..errors import ExecutionError, InvalidPayload
from ..version import VERSION
from . import report
from .advise import advise
from .cancelling import cancel
from .dead_letters import dead_letters, retry
from .doctor import doctor
from .exits import FAILED, complain, reported
from .grant import grant
from .histories import executions, fork, replay_check, restart, show
from .options import (
    Common,
    Debug,
    Dsn,
    Embedded,
    Json,
    ListenDsn,
    OwnSchema,
    parse_deadline,
    parse_instant,
    with_common,
)
from .sending import emit, promise, send
from .target import Life, load_orchestrator

app = typer.Typer(
    name="pgconductor",
    help="Durable execution on nothing but PostgreSQL.",
    epilog="Exit status: 0 done, 1 failed, 2 used wrongly, 3 not available or too late, 4 the schema does not fit, "
    "5 stopped with outcomes unwritten, 6 stopped by a newer program's migration, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # it shows local variables, connection strings among them
)

_EXAMPLE = """'{"name": "Ada"}'"""


class LogLevel(StrEnum):
    """What `run --log-level` takes."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pgconductor {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Durable execution on nothing but PostgreSQL."""


@app.command()
@with_common
def migrate(
    common: Common,
) -> None:
    """Install the schema, or bring it up to date."""
    with common.open_client() as client:
        done = client.migrate()
    if common.as_json:
        report.print_json(
            {
                "schema": common.schema,
                "version": done.version,
                "applied": done.applied,
                "functions_replaced": done.functions_replaced,
            }
        )
    elif done.applied or done.functions_replaced:
        count = len(done.applied)
        what = f"{count} migration{'' if count == 1 else 's'} applied" if count else "functions replaced"
        print(f"Schema {report.plain(common.schema)!r}: {what}, now at version {done.version}.")
    else:
        print(f"Schema {report.plain(common.schema)!r} is up to date at version {done.version}.")


@app.command()
def run(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:ORCHESTRATOR", help="An Orchestrator, or a function that returns one.")
    ],
    dsn: Dsn = None,
    listen_dsn: ListenDsn = None,
    embedded: Embedded = False,
    schema: OwnSchema = None,
    log_level: Annotated[
        LogLevel, typer.Option(help="Least level that is logged, unless the program sets up logging itself.")
    ] = LogLevel.INFO,
    debug: Debug = False,
) -> None:
    """Run an orchestrator until SIGINT or SIGTERM. A second signal cancels the handlers that still run."""
    life = Life()
    with reported(debug=debug, was_running=life.has_started):
        orchestrator = load_orchestrator(target, debug=debug)
        orchestrator.conductor.redirect(dsn=dsn, listen_dsn=listen_dsn, embedded=embedded, schema=schema)
        logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logger = logging.getLogger("pgconductor.cli")
        logger.info("running %r", orchestrator)
        trio.run(partial(orchestrator.run, task_status=life))
        logger.info("stopped")


@app.command()
@with_common
def invoke(
    common: Common,
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")],
    payload: Annotated[
        str, typer.Argument(metavar="[JSON]", help='Its parameters as a JSON object; "-" reads standard input.')
    ] = "{}",
    queue: Annotated[
        str | None, typer.Option(metavar="NAME", help="Otherwise the one that the task is registered with.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher runs first.")] = 0,
    delay: Annotated[float | None, typer.Option(metavar="SECONDS", help="Start no earlier than so much later.")] = None,
    run_at: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Start no earlier than this, as 2030-01-31T09:00:00+01:00.")
    ] = None,
    dedupe_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="If a live execution has this key, take that one.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time for an attempt; otherwise the task's.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="SECONDS|INSTANT", help="It fails unless it has completed by then.")
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Starts in all; otherwise the task's.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="TAG", help="To find it by; may be repeated.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it as JSON.")] = False,
    wait_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Wait at most so long; implies --wait.")
    ] = None,
) -> None:
    """Invoke a task, and print the id of the execution; with --wait its result instead."""
    arguments = _parse_payload(payload)
    due, last = parse_instant("--run-at", run_at), parse_deadline(deadline)
    with common.open_client() as client:
        handle = client.invoke(
            task, arguments, queue=queue, priority=priority, delay=delay, run_at=due, dedupe_key=dedupe_key,
            timeout=timeout, deadline=last, max_attempts=max_attempts, tags=tag or (),
        )  # fmt: skip
        answer: dict[str, Any] = {"id": str(handle.id), "created": handle.created}
        if not wait and wait_timeout is None:
            report.print_json(answer) if common.as_json else print(handle.id)
            return
        try:
            result = handle.result(wait_timeout)
        except ExecutionError as error:
            if not common.as_json or common.debug:
                raise
            complain(str(error))
            report.print_json({**answer, "error": str(error)})
            raise typer.Exit(FAILED) from None
        report.print_json({**answer, "result": result} if common.as_json else result)


app.command()(emit)
app.command()(send)
app.command()(promise)
app.command()(cancel)
app.command("dead-letters")(dead_letters)
app.command()(retry)
app.command()(show)
app.command()(executions)
app.command()(fork)
app.command()(restart)
app.command("replay-check")(replay_check)
app.command()(advise)
app.command()(doctor)
app.command()(grant)


@app.command()
@with_common
def status(
    common: Common,
) -> None:
    """Show the queues and the orchestrators."""
    with common.open_client() as client:
        queues, orchestrators = client.queue_status(), client.orchestrator_status()
    if common.as_json:
        report.print_json({"schema": common.schema, "queues": queues, "orchestrators": orchestrators})
        return
    output = report.console()
    output.print(report.queue_table(queues) if queues else "No queues yet.")
    output.print(report.orchestrator_table(orchestrators) if orchestrators else "No orchestrators.")
    for line in report.hints(queues, orchestrators):
        output.print(line, markup=False)


@app.command()
def demo(
    executions: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many in all.")] = 10_000,
    dsn: Annotated[
        str | None,
        typer.Option(
            "--dsn",
            metavar="DSN",
            help="Use a schema of its own in this database, not the embedded server. The environment is ignored.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Watch a fast and a slow queue run, in a fresh database that is dropped afterwards."""
    from ..demo import run_demo  # what it imports serves no other command

    with reported(debug=debug):
        summary = run_demo(executions, dsn=dsn, is_quiet=as_json)
        if as_json:
            report.print_json(summary)


def _parse_payload(text: str) -> dict[str, Any]:
    try:
        payload: object = json.loads(sys.stdin.read() if text == "-" else text)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"the payload is not JSON ({error}); for example {_EXAMPLE}") from None
    if not isinstance(payload, dict):
        raise InvalidPayload(f"the payload must be a JSON object of the task's parameters, for example {_EXAMPLE}")
    return cast("dict[str, Any]", payload)


def main() -> None:
    """Entry point of the command `pgconductor`."""
    app()
