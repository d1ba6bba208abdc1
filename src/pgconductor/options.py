"""Validation of option values: names, counts, durations and instants, each refused with its own name and remedy.

Owns the ranges that the schema's CHECK constraints repeat, so that a bad value is refused in the caller, where the
traceback is useful, and never reaches SQL. Pure functions: a value goes in, the normalised value comes out (seconds
as `float`, instants as aware UTC `datetime`), or `InvalidOption` is raised. Must not read a clock.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Final

from .errors import InvalidOption

MAX_DELAY: Final = 100 * 365.25 * 86_400.0  # a century: far beyond use, far within what an interval holds
# A day within what Python can hold, so that no session's time zone leads outside; the schema's CHECK is the same.
_EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC)
INT4_MIN: Final = -(2**31)
INT4_MAX: Final = 2**31 - 1


def checked_text(what: str, value: object, *, max_bytes: int) -> str:
    """Return `value` if it is a text that PostgreSQL can store, of 1 to `max_bytes` bytes of UTF-8.

    `what` names the value in the message of `InvalidOption`, which is raised otherwise.
    """
    if not isinstance(value, str):
        raise InvalidOption(f"{what} must be a str, not {type(value).__name__}")
    if not value:
        raise InvalidOption(f"{what} must not be empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidOption(f"{what} {ascii(value)[:80]} holds a lone surrogate, which is not valid Unicode") from None
    if size > max_bytes:
        raise InvalidOption(f"{what} is {size} bytes of UTF-8 long; at most {max_bytes} are allowed")
    if "\0" in value:
        raise InvalidOption(f"{what} {ascii(value)[:80]} holds a NUL character, which PostgreSQL cannot store")
    return value


def checked_int(what: str, value: object, *, minimum: int, maximum: int) -> int:
    """Return `value` if it is an `int` (not a `bool`) within the range, both ends included; else `InvalidOption`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidOption(f"{what} must be an int, not {type(value).__name__}")
    if not minimum <= value <= maximum:
        shown = value if value.bit_length() < 128 else "too large a number"
        raise InvalidOption(f"{what} must be from {minimum} to {maximum}, not {shown}")
    return value


def checked_number(what: str, value: object, *, minimum: float, maximum: float) -> float:
    """Return `value` as a finite `float` within the range, both ends included, or raise `InvalidOption`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidOption(f"{what} must be a number, not {type(value).__name__}")
    if not minimum <= value <= maximum:  # false for NaN as well
        shown = value if isinstance(value, float) or value.bit_length() < 128 else "too large a number"
        raise InvalidOption(f"{what} must be from {minimum:g} to {maximum:g}, not {shown}")
    return float(value)


def checked_seconds(what: str, value: object, *, minimum: float = 0.0, maximum: float = MAX_DELAY) -> float:
    """Return a duration, given in seconds or as a `timedelta`, as finite seconds within the range.

    Both ends are included. Raises `InvalidOption` for anything else, NaN and infinity among them.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidOption(f"{what} must be seconds (int or float) or a timedelta, not {type(value).__name__}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidOption(f"{what} must be a finite number of seconds, not {value}")
    return checked_number(f"{what} (seconds)", value, minimum=minimum, maximum=maximum)


def checked_instant(what: str, value: object) -> datetime:
    """Return an aware `datetime` converted to UTC, within the years 1 (from 2 January) to 9998.

    Raises `InvalidOption` for a naive one (whose zone would be a guess), for anything else and outside that range.
    """
    if not isinstance(value, datetime):
        raise InvalidOption(f"{what} must be a datetime, not {type(value).__name__}")
    if value.utcoffset() is None:
        raise InvalidOption(f"{what} is a naive datetime; give it a zone, for example datetime.now(UTC)")
    try:
        instant = value.astimezone(UTC)
    except OverflowError:
        raise InvalidOption(f"{what} is outside the years 1 to 9998 in UTC") from None
    if not _EARLIEST <= instant < LATEST:
        raise InvalidOption(f"{what} is outside the years 1 to 9998 in UTC")
    return instant
