"""`pgconductor grant`: gives database roles the rights of a kind of program, takes them away, or lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from ..db.calls import Calls
from ..db.session import SyncSession
from ..db.sql_files import validate_schema_name
from . import report
from .options import Common, with_common


def _option(help_text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(metavar="ROLE", help=help_text)
    return option


@with_common
def grant(
    common: Common,
    producer: Annotated[list[str] | None, _option("May invoke, read results, and cancel what it invoked.")] = None,
    worker: Annotated[list[str] | None, _option("May run orchestrators, and what a producer may.")] = None,
    viewer: Annotated[list[str] | None, _option("May see states and counts, no payloads.")] = None,
    operator: Annotated[list[str] | None, _option("May cancel and retry anything, and what a viewer may.")] = None,
    revoke: Annotated[bool, typer.Option("--revoke", help="Take these rights away instead.")] = False,
) -> None:
    """Give roles of the database their rights, as the schema's owner; without any role, list who has which.

    Each of the four can be given several times. The roles must exist.
    """
    wanted = [
        (kind, role)
        for kind, roles in (("producer", producer), ("worker", worker), ("viewer", viewer), ("operator", operator))
        for role in roles or ()
    ]
    calls = Calls(validate_schema_name(common.schema))
    session = SyncSession(common.database)
    session.open()
    try:
        change = calls.revoke_role if revoke else calls.grant_role
        for kind, role in wanted:
            session.ask(change(kind, role), "granting", is_repeatable=True)
        granted = session.ask(calls.granted_roles(), "reading the grants", is_repeatable=True)
    finally:
        session.close()
    if common.as_json:
        report.print_json({"schema": common.schema, "roles": [{"role": role, "kind": kind} for kind, role in granted]})
        return
    if not granted:
        print(f"No role has rights in schema {report.plain(common.schema)!r} but its owner.")
    for kind, role in granted:
        print(f"{kind:<8}  {report.plain(role)}")
