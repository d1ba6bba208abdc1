"""`pgconductor emit`, `pgconductor send` and `pgconductor promise`: what executions wait for, from a shell."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..errors import InvalidOption, InvalidPayload
from ..model import PromiseAnswer
from . import report
from .exits import FAILED, complain
from .options import Common, ExecutionId, parse_execution, parse_id, with_common

_Payload = Annotated[str, typer.Argument(metavar="[JSON]", help='Any JSON value; "-" reads standard input.')]


class PromiseAction(StrEnum):
    """What `promise` does."""

    RESOLVE = "resolve"
    REJECT = "reject"


@with_common
def emit(
    common: Common,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event's name.")],
    payload: _Payload = "null",
    retention: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long it is kept for executions that do not wait yet; else a day."),
    ] = None,
) -> None:
    """Send an event to every execution that waits for it, or will; print its id."""
    value = _parse_value(payload)
    with common.open_client() as client:
        event_id = client.emit(event, value, retention=retention)
    report.print_json({"id": event_id}) if common.as_json else print(event_id)


@with_common
def send(
    common: Common,
    execution: ExecutionId,
    channel: Annotated[str, typer.Argument(metavar="CHANNEL", help="What it receives by.")],
    payload: _Payload = "null",
) -> None:
    """Send a message to one execution."""
    execution_id = parse_execution(execution)
    value = _parse_value(payload)
    with common.open_client() as client:
        is_sent = client.send(execution_id, channel, value)
    if common.as_json:
        report.print_json({"sent": is_sent})
    elif is_sent:
        print("sent")
    if not is_sent:
        complain(f"there is no live execution {execution_id}, or none that this role may send to")
        raise typer.Exit(FAILED)


@with_common
def promise(
    common: Common,
    action: Annotated[PromiseAction, typer.Argument(metavar="resolve|reject", help="What to do with it.")],
    promise_id: Annotated[str, typer.Argument(metavar="ID", help="The promise, as its handler gave it away.")],
    value: Annotated[
        str | None,
        typer.Argument(metavar="[JSON|TEXT]", help="To resolve it with: any JSON value. To reject it: why, a text."),
    ] = None,
) -> None:
    """Resolve or reject a promise that an execution waits for. The first answer counts."""
    chosen = parse_id(promise_id, "promise's id; the handler that made the promise has it")
    loaded = _parse_value("null" if value is None else value) if action is PromiseAction.RESOLVE else None
    with common.open_client() as client:
        if action is PromiseAction.RESOLVE:
            answer = client.resolve_promise(chosen, loaded)
        else:
            answer = client.reject_promise(chosen, "rejected" if value is None else value)
    report.print_json({"promise": str(chosen), "answer": answer}) if common.as_json else print(answer)
    if answer is PromiseAnswer.ALREADY:
        complain("it was resolved or rejected before; that counts")
    elif answer is PromiseAnswer.UNKNOWN:
        complain(f"there is no promise {chosen}, or its execution has ended")
    if answer is not PromiseAnswer.RESOLVED:
        raise typer.Exit(FAILED)


def _parse_value(text: str) -> Any:
    try:
        return json.loads(sys.stdin.read() if text == "-" else text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(f"the value is not JSON ({error}); a text is written '\"so\"'") from None


def _refuse(constant: str) -> Any:
    raise InvalidOption(f"{constant} is no JSON")
