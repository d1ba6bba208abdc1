"""The options that most commands have: where the database is, which schema, and how to answer."""

from __future__ import annotations

from typing import Annotated

import typer

Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        metavar="DSN",
        help="Connection string; otherwise PGCONDUCTOR_DSN, else DATABASE_URL. Prefer these for one with a password: "
        "others can see command lines.",
    ),
]
ListenDsn = Annotated[
    str | None,
    typer.Option(metavar="DSN", help="A direct connection to the same database, where --dsn leads to a pooler."),
]
Embedded = Annotated[bool, typer.Option("--embedded", help="Use your embedded PostgreSQL, started if necessary.")]
Schema = Annotated[str, typer.Option(metavar="NAME", help="Name of the schema.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
