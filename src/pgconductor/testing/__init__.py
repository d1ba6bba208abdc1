"""Testing against a real PostgreSQL: what the pytest plugin's fixtures hand out, and how to say what is missing.

The plugin (`pgconductor.testing.plugin`) is found by pytest on its own. Its fixtures:

- ``pgconductor_dsn``: a fresh database with the schema installed, cloned from a template made once; dropped after the
  test.
- ``pgconductor_empty_dsn``: a fresh empty database.
- ``pgconductor_clock``: a `DatabaseClock` that moves the database's time in that test's database.
- ``pgconductor_server``: the `DatabaseServer` they live on. ``pgconductor_schema``: the schema's name; override it
  for another one.

`drain(orchestrator, clock=..., horizon=...)` runs a program's tasks until nothing is left to do, and moves the clock
instead of waiting.

The server is the one ``PGCONDUCTOR_TEST_DSN`` names (the role must be allowed to create databases), a container if
``PGCONDUCTOR_TEST_CONTAINER=1``, else a throwaway server of the test run's own: the wheel's newest PostgreSQL, or
what ``PGCONDUCTOR_TEST_SERVER`` says: a major version that the wheel has, or the path of another installation's
``bin`` folder (for a container: a major version or the name of an image). A throwaway server's files are in
``/dev/shm``, which Linux keeps in memory, if there are 3 GiB of room, else in the folder for temporary files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clock import DatabaseClock
    from .databases import Databases
    from .draining import drain
    from .requirements import debian_binaries, missing_docker, missing_program
    from .server import DatabaseServer, open_server

__all__ = [
    "DatabaseClock",
    "DatabaseServer",
    "Databases",
    "debian_binaries",
    "drain",
    "missing_docker",
    "missing_program",
    "open_server",
]

_MODULES = {
    "DatabaseClock": "clock",
    "DatabaseServer": "server",
    "Databases": "databases",
    "debian_binaries": "requirements",
    "drain": "draining",
    "missing_docker": "requirements",
    "missing_program": "requirements",
    "open_server": "server",
}


def __getattr__(name: str) -> object:
    # pytest imports this package in every run of whoever has the library installed: what it exports is imported when
    # it is used.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
