"""A database call as a value: text, parameters, and how to read the rows.

A verb is written once as a function that returns a `Call`. Who awaits it, a Trio task, a plain thread or the
user's own transaction, is decided by whoever executes it (`pgconductor.db.execute`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Row: TypeAlias = tuple[Any, ...]  # what psycopg hands over, before `decode` gives it a type


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One statement. `decode` gets all rows as tuples (none for a statement that returns nothing). `has_arrays`: some
    parameters are those of `arrays`.
    """

    query: bytes
    params: Sequence[object]
    decode: Callable[[list[Row]], T]
    has_arrays: bool = False


def ignore(rows: list[Row]) -> None:
    """Decoder of a call whose rows nobody needs."""
