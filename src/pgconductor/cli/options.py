"""What several commands share: their options, and how the texts of a command line become values.

Each command opens the client it needs for its own block; nothing is kept between commands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Annotated, Any, Concatenate, Final, ParamSpec, get_type_hints
from uuid import UUID

import typer

from ..conductor import Conductor
from ..db.address import Database
from ..errors import InvalidOption
from ..sync_client import SyncClient
from .exits import reported

P = ParamSpec("P")

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
OfQueue = Annotated[str | None, typer.Option(metavar="NAME", help="Those on this queue.")]
OfTask = Annotated[str | None, typer.Option(metavar="NAME", help="Those of this task.")]
WithTags = Annotated[
    list[str] | None, typer.Option(metavar="TAG", help="Those with this tag; repeated: with all of them.")
]
ExecutionId = Annotated[str, typer.Argument(metavar="ID", help="An execution, by its id.")]

OwnSchema = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the schema; otherwise the conductor's own.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]


@dataclass(frozen=True, slots=True)
class Common:
    """What a command line says of the database and the output, whatever the command."""

    dsn: Dsn = None
    listen_dsn: ListenDsn = None
    embedded: Embedded = False
    schema: Schema = "pgconductor"
    as_json: Json = False
    debug: Debug = False

    @property
    def database(self) -> Database:
        """The database that is named."""
        return Database(self.dsn, self.listen_dsn, embedded=self.embedded)

    @contextmanager
    def open_client(self) -> Iterator[SyncClient]:
        """A client of that database."""
        conductor = Conductor(self.dsn, schema=self.schema, listen_dsn=self.listen_dsn, embedded=self.embedded)
        with conductor.sync() as client:
            yield client


_COMMON: Final = tuple(
    inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=get_type_hints(Common, include_extras=True)[field.name],
    )
    for field in fields(Common)
)


def with_common(command: Callable[Concatenate[Common, P], None]) -> Callable[..., None]:
    """Give a command the options of `Common` behind its own, and report its errors.

    typer reads a command's options off its signature, so the signature is what changes.
    """
    own = inspect.signature(command, eval_str=True)
    first, *others = own.parameters.values()
    assert first.annotation is Common

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        common = Common(**{parameter.name: kwargs.pop(parameter.name) for parameter in _COMMON})
        with reported(debug=common.debug):
            command(common, *args, **kwargs)

    run.__signature__ = own.replace(parameters=[*others, *_COMMON])  # type: ignore[attr-defined]  # what inspect reads
    return run


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
    return [parse_execution(text) for text in texts]


def parse_execution(text: str) -> UUID:
    """The id of an execution. Raises `InvalidOption` for a text that is none."""
    return parse_id(text, "execution's id; `pgconductor invoke` prints them")


def parse_id(text: str, what: str) -> UUID:
    """An id; `what` tells of which kind, and where one finds it. Raises `InvalidOption` for a text that is none."""
    try:
        return UUID(text)
    except ValueError:
        raise InvalidOption(f"{text!r} is no {what}") from None
