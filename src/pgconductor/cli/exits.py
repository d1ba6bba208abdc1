"""What a command that failed says, and the status it exits with.

    0    done; for `run`: stopped as asked
    1    the execution that was waited for failed or was cancelled, the database refused, or the engine broke
    2    used wrongly: an option, the payload, or the program that `run` names
    3    not available: no database, or the result did not arrive in time
    4    program and schema do not fit each other; run `pgconductor migrate`, or upgrade
    5    `run` has stopped, but could not write how some executions ended: the database was away; they run again
    6    `run` was asked to stop by a newer program's migration: upgrade, then start again
    130  interrupted by Ctrl-C

An error of the library is one line on stderr that names the remedy. Anything else is a defect, of this program or of
the one that `run` runs, and keeps its traceback. No message holds a password: `db.address` sees to that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeAlias, cast

import typer

from ..errors import Incompatible, Misuse, PgconductorError, SchemaTooNew, Unavailable

DONE = 0
FAILED = 1
MISUSED = 2
UNAVAILABLE = 3
INCOMPATIBLE = 4
UNWRITTEN = 5
SUPERSEDED = 6
INTERRUPTED = 130

_Kinds: TypeAlias = tuple[tuple[type[PgconductorError], int], ...]

_BY_KIND: Final[_Kinds] = ((Misuse, MISUSED), (Unavailable, UNAVAILABLE), (Incompatible, INCOMPATIBLE))
_WHILE_RUNNING: Final[_Kinds] = ((Unavailable, UNWRITTEN), (SchemaTooNew, SUPERSEDED))


def status_of(error: PgconductorError, *, was_running: bool = False) -> int:
    """The exit status for an error of the library. `was_running`: it ended an orchestrator that had started."""
    kinds = (*_WHILE_RUNNING, *_BY_KIND) if was_running else _BY_KIND
    return next((status for kind, status in kinds if isinstance(error, kind)), FAILED)


def complain(message: str) -> None:
    """Say `message` on stderr, as one line."""
    print(f"pgconductor: {' '.join(message.split())}", file=sys.stderr)


def leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group and the groups in it; of a single error, that one."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    inner = cast("BaseExceptionGroup[BaseException]", error).exceptions
    return [leaf for each in inner for leaf in leaves(each)]


def _never() -> bool:
    return False


@contextmanager
def reported(*, debug: bool, was_running: Callable[[], bool] = _never) -> Iterator[None]:
    """Turn the errors of the block, in groups or not, into lines on stderr and `typer.Exit` with their status.

    `debug`: leave them their tracebacks instead. `was_running`: tells whether an orchestrator had started.
    """
    status = DONE
    try:
        yield
    except* KeyboardInterrupt:
        if debug:
            raise
        status = INTERRUPTED
    except* PgconductorError as group:
        if debug:
            raise
        errors = [error for error in leaves(group) if isinstance(error, PgconductorError)]
        for message in dict.fromkeys(str(error) for error in errors):
            complain(message)
        status = status or status_of(errors[0], was_running=was_running())
    if status != DONE:
        raise typer.Exit(status)
