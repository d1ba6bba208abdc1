"""Arrays as PostgreSQL sends and receives them in binary: for batches, where psycopg's own, in text, cost 5 µs a row.

A column of a batch holds few distinct values (outcomes, counts of claims, empty errors), and each is packed once. The
format is `array_send`'s: dimensions, whether there are nulls, the elements' type; size and lower bound of the one
dimension; then each element after its length, -1 for null.

The dumper is registered with the cursor that needs it: a connection of the user's is left as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from psycopg.abc import DumperKey
from psycopg.adapt import AdaptersMap, Dumper, PyFormat
from psycopg.pq import Format

_NULL = b"\xff\xff\xff\xff"
_header = struct.Struct("!iiIii").pack
_float8 = struct.Struct("!id").pack
_int8 = struct.Struct("!iq").pack


class Array:
    """A parameter: values, the numbers that PostgreSQL gives their types, and how to pack one for an encoding."""

    __slots__ = ("element_oid", "is_distinct", "oid", "pack", "values")

    def __init__(
        self,
        oid: int,
        element_oid: int,
        values: Sequence[Any],
        pack: Callable[[Any, str], bytes],
        *,
        is_distinct: bool = False,
    ) -> None:
        self.oid = oid
        self.element_oid = element_oid
        self.values = values
        self.pack = pack
        self.is_distinct = is_distinct


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def get_key(self, obj: Array, format: PyFormat) -> DumperKey:  # psycopg's name
        return Array, obj.oid  # type: ignore[return-value]  # any tuple of what can be hashed will do

    def upgrade(self, obj: Array, format: PyFormat) -> _ArrayDumper:
        dumper = _ArrayDumper(Array, self.connection)
        dumper.oid = obj.oid
        return dumper

    def dump(self, obj: Array) -> bytes:
        if not obj.values:
            return _header(0, 0, obj.element_oid, 0, 0)[:12]
        encoding = self.connection.info.encoding if self.connection is not None else "utf-8"
        if obj.is_distinct:
            elements = [obj.pack(value, encoding) for value in obj.values]
        else:
            packed = {value: obj.pack(value, encoding) for value in set(obj.values)}
            elements = [packed[value] for value in obj.values]
        return _header(1, 1, obj.element_oid, len(elements), 1) + b"".join(elements)


def prepare(adapters: AdaptersMap) -> None:
    """Let a cursor, whose adapters these are, take the arrays of this module as parameters."""
    adapters.register_dumper(Array, _ArrayDumper)


def uuids(values: Sequence[UUID]) -> Array:
    return Array(2951, 2950, values, lambda value, _: b"\0\0\0\x10" + value.bytes, is_distinct=True)


def int8s(values: Sequence[int]) -> Array:
    return Array(1016, 20, values, lambda value, _: _int8(8, value))


def float8s(values: Sequence[float | None]) -> Array:
    return Array(1022, 701, values, lambda value, _: _NULL if value is None else _float8(8, value))


def texts(values: Sequence[str | None]) -> Array:
    return Array(1009, 25, values, partial(_sized, b""))


def jsonbs(values: Sequence[str | None]) -> Array:
    """JSON texts; the database checks them."""
    return Array(3807, 3802, values, partial(_sized, b"\x01"))


def _sized(version: bytes, value: str | None, encoding: str) -> bytes:
    if value is None:
        return _NULL
    data = version + value.encode(encoding)
    return len(data).to_bytes(4, "big") + data
