"""Reading what is recorded of errors and cancellations: JSON texts that any client may have written."""

from __future__ import annotations

import json
from typing import Any, Final, cast

_ERROR_KEYS: Final = ("type", "message", "traceback")


def error_record(text: str | None) -> dict[str, str]:
    """Return the last error as a record of texts: type, message, traceback. Empty if there is none to read."""
    try:
        loaded = json.loads(text or "null")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(loaded, dict):
        return {}
    record = cast("dict[str, Any]", loaded)
    return {name: record[name] for name in _ERROR_KEYS if isinstance(record.get(name), str)}


def reason_record(text: str | None) -> str | None:
    """Return the reason of a cancellation, as a wait's record keeps it; None if none was given."""
    loaded: object = json.loads(text or "null")
    reason = cast("dict[str, Any]", loaded).get("reason") if isinstance(loaded, dict) else None
    return reason if isinstance(reason, str) else None
