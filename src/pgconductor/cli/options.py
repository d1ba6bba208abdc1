"""What several commands share: their options, and how the texts of a command line become values.

Each command opens the client it needs for its own block; nothing is kept between commands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated
from uuid import UUID

import typer

from ..conductor import Conductor
from ..errors import InvalidOption
from ..sync_client import SyncClient

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


@contextmanager
def open_client(dsn: str | None, listen_dsn: str | None, schema: str, *, embedded: bool) -> Iterator[SyncClient]:
    """A client of the database that a command line names."""
    with Conductor(dsn, schema=schema, listen_dsn=listen_dsn, embedded=embedded).sync() as client:
        yield client


def parse_instant(option: str, text: str | None) -> datetime | None:
    """The instant that `option` names, None for none. Raises `InvalidOption` unless it has a time zone."""
    if text is None:
        return None
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidOption(f"{option} {text!r} is no instant; write it as 2030-01-31T09:00:00+01:00") from None
    if instant.utcoffset() is None:
        raise InvalidOption(f"{option} {text!r} has no time zone; write {instant.isoformat()}Z or ...+01:00")
    return instant


def parse_deadline(text: str | None) -> datetime | float | None:
    """Seconds from now, or the instant that --deadline names. Raises `InvalidOption` if it is neither."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return parse_instant("--deadline", text)


def parse_ids(texts: list[str]) -> list[UUID]:
    """The ids of executions. Raises `InvalidOption` for a text that is none."""
    return [parse_id(text, "execution's id; `pgconductor invoke` prints them") for text in texts]


def parse_id(text: str, what: str) -> UUID:
    """An id; `what` tells of which kind, and where one finds it. Raises `InvalidOption` for a text that is none."""
    try:
        return UUID(text)
    except ValueError:
        raise InvalidOption(f"{text!r} is no {what}") from None
