"""What a handler receives from outside and sends there: events, messages, promises.

Sending is recorded with what it does, in one transaction, so it is done exactly once. Receiving is a wait: recorded,
parked, and given up if it is long (`durable.py`); what came is recorded with the wait, so a replay gets the same. Who
receives what, and why nothing is lost between a wait and its event, is in `sql/functions/16_events.sql`.

Cancellation: a wait that is cancelled by a scope of the handler's own stays, and may receive; nobody is told then.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar, overload
from uuid import UUID

from .codec import Limits, ResultCodec, printable
from .errors import InvalidOption, PromiseRejected, WaitTimedOut
from .history import MAX_NAME_BYTES
from .model import Record
from .options import MAX_DELAY, checked_seconds, checked_text
from .records import error_record

if TYPE_CHECKING:
    from .durable import Durable

T = TypeVar("T")

DAY: Final = 86_400.0
MAX_EVENT_BYTES: Final = 128
_RESULT: Final = "/result"

_ID: ResultCodec[UUID] = ResultCodec("promise", UUID, kind_of_value="id of a")
_EVENT_ID: ResultCodec[int] = ResultCodec("event", int, kind_of_value="id of an")
_IS_SENT: ResultCodec[bool] = ResultCodec("message", bool, kind_of_value="fate of a")


def checked_event(what: str, name: object) -> str:
    """Return the name of an event or channel: 1 to 128 bytes; raises `InvalidOption`."""
    return checked_text(what, name, max_bytes=MAX_EVENT_BYTES)


def checked_retention(retention: object) -> float:
    """Return how long an event is kept, in seconds: None is a day, at most a century. Raises `InvalidOption`."""
    return DAY if retention is None else checked_seconds("retention", retention, maximum=MAX_DELAY)


@functools.lru_cache(maxsize=256)
def _cached_codec(kind: Any, limits: Limits) -> ResultCodec[Any]:
    words = kind.__qualname__ if isinstance(kind, type) else str(kind)
    return ResultCodec(words, kind, limits=limits, kind_of_value="payload of type")


def payload_codec(kind: Any, limits: Limits) -> ResultCodec[Any]:
    """The codec of payloads of an annotation. Raises `InvalidTask` for one that JSON cannot hold."""
    try:
        return _cached_codec(kind, limits)
    except TypeError:  # a type that cannot be hashed
        return _cached_codec.__wrapped__(kind, limits)


def encoded(payload: object, limits: Limits) -> str:
    """Return a payload as JSON text. Raises `InvalidPayload`."""
    return payload_codec(Any, limits).encode(payload)


# Receiving


async def wait_for_event(
    durable: Durable, name: str, event: str | None, match: Mapping[str, object] | None, timeout: object, kind: Any
) -> Any:
    """See `Context.wait_for_event`."""
    event = checked_event("the name of an event", name if event is None else event)
    spec: dict[str, object] = {"target": event, **_due(timeout)}
    if match is not None:
        if not isinstance(match, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers without types
            raise InvalidOption(f"match= must be a mapping, as a JSON object, not {type(match).__name__}")
        spec["match"] = json.loads(encoded(dict(match), durable.limits))
    codec = payload_codec(kind, durable.limits)
    record = await durable.wait(f"ctx.wait_for_event({name!r})", name, "event", spec)
    return _received(record, f"event {printable(event)!r}", codec)


async def receive(durable: Durable, name: str, channel: str | None, timeout: object, kind: Any) -> Any:
    """See `Context.receive`."""
    channel = checked_event("the name of a channel", name if channel is None else channel)
    codec = payload_codec(kind, durable.limits)
    record = await durable.wait(f"ctx.receive({name!r})", name, "message", {"target": channel, **_due(timeout)})
    return _received(record, f"message on {printable(channel)!r}", codec)


def _due(timeout: object) -> dict[str, object]:
    return {} if timeout is None else {"due_in": checked_seconds("timeout", timeout, maximum=MAX_DELAY)}


def _received(record: Record, what: str, codec: ResultCodec[Any]) -> Any:
    if record.outcome == "timed_out":
        raise WaitTimedOut(f"{printable(record.name)!r}: no {what} came in time")
    if record.outcome == "rejected":
        error = error_record(record.error)
        said = error.get("message")
        raise PromiseRejected(f"{what} was rejected" + (f": {printable(said)}" if said else ""), error)
    return codec.decode("null" if record.value is None else record.value)


class Promise:
    """What the outside is to say, once. `id`: give it away; whoever has it may resolve or reject. `name`: as given."""

    __slots__ = ("_durable", "_record", "id", "name")

    def __init__(self, durable: Durable, name: str, promise_id: UUID) -> None:
        self._durable = durable
        self.name = name
        self.id = promise_id
        self._record: Record | None = None

    def __repr__(self) -> str:
        return f"<Promise {self.name!r}, {self.id}>"

    @overload
    async def result(
        self, *, timeout: float | timedelta | None = None, type: type[T], name: str | None = None
    ) -> T: ...
    @overload
    async def result(
        self, *, timeout: float | timedelta | None = None, type: Any = Any, name: str | None = None
    ) -> Any: ...
    async def result(
        self, *, timeout: float | timedelta | None = None, type: Any = Any, name: str | None = None
    ) -> Any:
        """Wait until the promise is resolved, without a slot if it takes long, and return the value.

        `timeout`: seconds or a `timedelta`, from when the wait is recorded; None waits without end. `type`: the
        annotation of the value. `name`: of the wait; otherwise the promise's with "/result", which is for one wait:
        after a timeout another one needs a name of its own. A value that is there is returned as often as it is asked
        for.

        Raises `PromiseRejected`, `WaitTimedOut`, the same at a replay; `InvalidPayload` for a value that does not fit
        the type, `DurableMisuse`, `NonDeterminism`.
        """
        codec = payload_codec(type, self._durable.limits)
        what = f"promise {printable(self.name)!r}"
        if self._record is None:
            wait = f"{self.name}{_RESULT}" if name is None else name
            record = await self._durable.wait(
                f"the result of {what}", wait, "promise", {"target": str(self.id), **_due(timeout)}
            )
            if record.outcome != "timed_out":
                self._record = record
        else:
            record = self._record
        return _received(record, what, codec)


async def make_promise(durable: Durable, name: str) -> Promise:
    """See `Context.promise`."""
    checked_text("the name of a promise", name, max_bytes=MAX_NAME_BYTES - len(_RESULT))
    promise_id = await durable.effect(f"ctx.promise({name!r})", name, "new_promise", {}, _ID)
    return Promise(durable, name, promise_id)


# Sending


async def emit(durable: Durable, name: str, event: str | None, payload: object, retention: object) -> None:
    """See `Context.emit`."""
    spec = {
        "event": checked_event("the name of an event", name if event is None else event),
        "payload": json.loads(encoded(payload, durable.limits)),
        "retention": checked_retention(retention),
    }
    await durable.effect(f"ctx.emit({name!r})", name, "emit", spec, _EVENT_ID)


async def send(durable: Durable, name: str, execution: object, channel: str | None, payload: object) -> bool:
    """See `Context.send`."""
    if not isinstance(execution, UUID):
        raise InvalidOption(f"ctx.send takes the id of an execution (uuid.UUID), not {type(execution).__name__}")
    spec = {
        "to": str(execution),
        "channel": checked_event("the name of a channel", name if channel is None else channel),
        "payload": json.loads(encoded(payload, durable.limits)),
    }
    return bool(await durable.effect(f"ctx.send({name!r})", name, "send", spec, _IS_SENT))


async def set_progress(durable: Durable, value: object) -> None:
    """See `Context.set_progress`."""
    await durable.tell_progress(encoded(value, durable.limits))
