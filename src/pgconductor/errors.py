"""Every exception the library raises on purpose, named after what the caller should do about it.

    PgconductorError
    ├── Misuse                        fix the code: nothing was sent to the database
    │   ├── InvalidTask               a task, worker or orchestrator is declared wrongly
    │   ├── InvalidOption             an option's value is out of range (also a ValueError)
    │   ├── InvalidPayload            arguments or result do not fit the annotations or the limits (also a ValueError)
    │   └── NotOpen                   the conductor or pool is not open here
    ├── Refused                       the database said no, for good
    │   ├── LeaseLost                 this incarnation of an orchestrator is dead; it registers anew by itself
    │   └── Unstorable                PostgreSQL cannot store a value
    ├── Unavailable                   try again later
    │   ├── NoDatabase                no server was named, or none answers
    │   ├── PoolTimeout               no connection became free in time (also a TimeoutError)
    │   └── WaitTimeout               the result did not arrive in time (also a TimeoutError)
    ├── Incompatible                  program and schema do not fit each other
    │   ├── SchemaMissing             run ``pgconductor migrate``
    │   └── SchemaTooNew              a newer program made a breaking change: upgrade this one
    └── ExecutionError                what ``Handle.result()`` raises instead of returning
        ├── ExecutionFailed
        ├── ExecutionCancelled
        └── ResultNotKept             it finished, and its result was not kept

Messages name the object and the remedy. The cause, where a driver's error lies beneath, is chained.
"""

from __future__ import annotations

from collections.abc import Mapping


class PgconductorError(Exception):
    """Base of all errors of this library."""


class Misuse(PgconductorError):
    """The calling code is wrong; nothing was sent to the database."""


class InvalidTask(Misuse):
    """A task, worker or orchestrator is declared wrongly."""


class InvalidOption(Misuse, ValueError):
    """An option has a value outside its range."""


class InvalidPayload(Misuse, ValueError):
    """Arguments or a result do not fit the handler's annotations, or exceed the limits."""


class NotOpen(Misuse):
    """The conductor or pool is used outside its ``async with`` block."""


class Refused(PgconductorError):
    """The database refused the request; repeating it will not help."""


class LeaseLost(Refused):
    """The lease of an orchestrator ended, or the server was restarted: what it holds is no longer its own."""


class Unstorable(Refused):
    """PostgreSQL cannot store a value; the others sent with it were not stored either."""


class Unavailable(PgconductorError):
    """Something is not there now; the same call may succeed later."""


class NoDatabase(Unavailable):
    """No server was named, or the one named does not answer."""


class PoolTimeout(Unavailable, TimeoutError):
    """Every connection of the pool stayed in use for the whole timeout."""


class WaitTimeout(Unavailable, TimeoutError):
    """The execution did not finish within the timeout; it goes on."""


class Incompatible(PgconductorError):
    """The program and the schema in the database do not fit each other."""


class SchemaMissing(Incompatible):
    """The schema is not installed, or older than this program needs."""


class SchemaTooNew(Incompatible):
    """A newer program made a breaking change to the schema."""


class ExecutionError(PgconductorError):
    """An execution ended without a result."""


class ExecutionFailed(ExecutionError):
    """The execution failed for good; the message carries its last error.

    `error`: that error as data, with the keys ``type``, ``message`` and ``traceback``; as much of it as was kept.
    """

    def __init__(self, message: str, error: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.error: Mapping[str, str] = error or {}


class ExecutionCancelled(ExecutionError):
    """The execution was cancelled. `reason`: as given by whoever cancelled it, None if nothing was."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class ResultNotKept(ExecutionError):
    """The execution has finished, and its result was not kept."""
