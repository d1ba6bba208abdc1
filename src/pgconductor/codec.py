"""Payloads, results and errors as JSON: encoded, validated against the handler's annotations, bounded.

Owns the limits and everything that decides whether a value may be stored. JSON only: nothing here evaluates, imports
or unpickles what a row holds. Whatever cannot be stored or would not come back is refused in the caller with
`InvalidPayload`, which names the task and the argument; whatever a row holds, decoding either returns values of the
annotated types or raises `InvalidPayload`, never `RecursionError` or a bare `ValueError` (only what a class's own
`__post_init__` raises beyond `ValueError` and `TypeError` passes as it is).

The hot path (one decode and one encode per execution) works on the encoded bytes: cheap signals such as ``null`` or a
count of brackets decide whether the exact, slow check is needed at all.
"""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar, cast

import msgspec
from msgspec import UNSET
from msgspec import inspect as msgspec_inspect

from .errors import DeadlineExceeded, HandlerTimeout, InvalidPayload, InvalidTask, leaves
from .options import checked_int

if TYPE_CHECKING:
    import psycopg

R = TypeVar("R")

ERROR_BYTES: Final = 8 << 10
MAX_INTEGER_DIGITS: Final = 4_300  # CPython refuses to parse longer ones, PostgreSQL stores them


@dataclass(frozen=True, slots=True)
class Limits:
    """How large what is stored may be. The defaults are the schema's own bounds; smaller ones may be chosen.

    `payload_bytes`, `result_bytes`: bytes of JSON text, 2 to 1 MiB. `error_bytes`: the same, 512 to 8 KiB.
    `depth`: nested objects and arrays, the outermost counted, 1 to 256. `name_bytes`: of a task or queue, UTF-8,
    1 to 128. `dedupe_key_bytes`: 1 to 512. `batch`: invocations in one call, 1 to 10,000.
    Raises `InvalidOption` outside these ranges.
    """

    payload_bytes: int = 1 << 20
    result_bytes: int = 1 << 20
    depth: int = 64
    error_bytes: int = ERROR_BYTES
    name_bytes: int = 128
    dedupe_key_bytes: int = 512
    batch: int = 10_000

    def __post_init__(self) -> None:
        ranges = {
            "payload_bytes": (2, 1 << 20),
            "result_bytes": (2, 1 << 20),
            "depth": (1, 256),
            "error_bytes": (512, ERROR_BYTES),
            "name_bytes": (1, 128),
            "dedupe_key_bytes": (1, 512),
            "batch": (1, 10_000),
        }
        for field in fields(self):
            minimum, maximum = ranges[field.name]
            checked_int(f"Limits({field.name}=)", getattr(self, field.name), minimum=minimum, maximum=maximum)


# What may go wrong in msgspec, in a hook or in a `__post_init__` that validates. `MsgspecError` and `UnicodeError`
# are `ValueError`s.
_CODING_ERRORS = (ValueError, TypeError, OverflowError, RecursionError)


class _JsonCodec:
    """One JSON document of one type: what payloads and results have in common."""

    __slots__ = ("_decoder", "_depth", "_encoder", "_max_bytes", "_what")

    def __init__(self, what: str, kind: Any, *, max_bytes: int, depth: int) -> None:
        self._what = what
        self._max_bytes = max_bytes
        self._depth = depth
        self._encoder = msgspec.json.Encoder(enc_hook=_encode_custom)
        self._decoder = msgspec.json.Decoder(kind, dec_hook=_decode_custom)

    def _encode(self, value: object) -> str:
        """Return `value` as JSON that is known to decode to the annotated type again."""
        try:
            data = self._encoder.encode(value)
        except _CODING_ERRORS as error:
            raise self._refusal(value, error) from error
        if len(data) > self._max_bytes:
            raise InvalidPayload(
                f"{self._what} is {len(data):,} bytes of JSON; at most {self._max_bytes:,} are allowed"
            )
        if data.count(b"[") + data.count(b"{") > self._depth and nested_deeper(data, self._depth):
            raise InvalidPayload(self._too_deep())
        # msgspec writes NaN and infinity as null, so every null is suspect.
        if (b"null" in data and value is not None) or b"\\u0000" in data:
            self._refuse_unstorable(value)
        text = data.decode()
        decoded = self._read_back(text)
        if _NUMBER_AS_KEY(data):
            self._refuse_lost_keys(value, decoded)
        return text

    def _read_back(self, text: str) -> object:
        """What the text decodes to, of which the caller knows that it is not too deep."""
        try:
            return self._decoder.decode(text)
        except _CODING_ERRORS as error:
            raise InvalidPayload(f"{self._what} does not fit its annotation: {_reason(error)}") from error

    def _decode(self, text: str) -> Any:
        if text.count("[") + text.count("{") > self._depth and nested_deeper(
            text.encode(errors="replace"), self._depth
        ):
            raise InvalidPayload(self._too_deep())
        try:
            return self._decoder.decode(text)
        except _CODING_ERRORS as error:
            raise InvalidPayload(f"{self._what} does not fit its annotation: {_reason(error)}") from error

    def _too_deep(self) -> str:
        return f"{self._what} is nested more than {self._depth} levels deep"

    def _refusal(self, value: object, error: Exception) -> InvalidPayload:
        """Why `value` could not be encoded, with the place as exactly as it can be found."""
        if isinstance(error, RecursionError):
            return InvalidPayload(f"{self._too_deep()}, or refers to itself")
        try:
            self._refuse_unstorable(value)
        except InvalidPayload as exact:
            return exact
        except _CODING_ERRORS:
            pass  # not even reducible to plain values: the first argument that cannot be encoded alone is the one
        place = self._first_unencodable(value)
        return InvalidPayload(
            f"{self._what}{place} cannot be written as JSON: {_reason(error)}; use plain values, dataclasses, "
            f"TypedDicts, attrs classes, msgspec Structs or pydantic models"
        )

    def _first_unencodable(self, value: object) -> str:
        if isinstance(value, dict):
            for key, item in cast(dict[object, object], value).items():
                try:
                    self._encoder.encode({key: item})
                except _CODING_ERRORS:
                    return f" at `{_path((None, key))}`"
        return ""

    def _refuse_unstorable(self, value: object) -> None:
        for path, fault in _unstorable(_plain(value)):
            raise InvalidPayload(f"{self._what} holds {fault} at `{_path(path)}`")

    def _refuse_lost_keys(self, value: object, decoded: object) -> None:
        for path, key in _lost_keys(_plain(value), _plain(decoded)):
            raise InvalidPayload(
                f"{self._what} has the key {key!r} of type {type(key).__name__} at `{_path(path)}`, which JSON "
                f"would turn into a text; use str keys, or annotate the dict with its type of keys"
            )


class PayloadCodec(_JsonCodec):
    """The arguments of one handler as the JSON object of its parameters, built once per handler.

    `parameters`: name to annotation, without the context. `optional`: those with a default. `positional`: those that
    may be given by position, in order. `extra`: annotation of ``**kwargs``, None without it. `reserved`: names that
    ``**kwargs`` must not catch. Raises `InvalidTask` if an annotation is not a type that JSON can hold.
    """

    __slots__ = ("_extra", "_has_optional", "_known", "_positional", "_raw", "_required", "_reserved", "_task")

    def __init__(
        self,
        task: str,
        parameters: Mapping[str, Any],
        *,
        optional: Collection[str] = (),
        positional: Sequence[str] = (),
        extra: Any = None,
        reserved: Collection[str] = (),
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        self._task = task
        self._known = frozenset(parameters)
        self._required = self._known.difference(optional)
        self._positional = tuple(positional)
        self._has_optional = bool(optional)
        self._reserved = frozenset(reserved)
        for name, kind in parameters.items():
            require_json_type(f"parameter {name!r} of task {task!r}", kind)
        struct = _parameters_struct(parameters, optional, strict=extra is None)
        what = f"the payload of task {task!r}"
        super().__init__(what, struct, max_bytes=limits.payload_bytes, depth=limits.depth)
        self._extra: msgspec.json.Decoder[Any] | None = None
        if extra is not None:
            require_json_type(f"the ** parameter of task {task!r}", extra)
            self._extra = msgspec.json.Decoder(extra, dec_hook=_decode_custom)
            self._raw = msgspec.json.Decoder(dict[str, msgspec.Raw])

    def encode(self, args: Sequence[object], kwargs: dict[str, Any]) -> str:
        """Return the JSON object of the parameters; what is left to a default is left out.

        Raises `InvalidPayload` for missing, unexpected or repeated arguments, for values that do not fit the
        annotations, and for what cannot be stored.
        """
        if args:
            kwargs = self._named(args, kwargs)
        if not self._required <= kwargs.keys():
            missing = ", ".join(repr(name) for name in sorted(self._required - kwargs.keys()))
            raise InvalidPayload(f"task {self._task!r} needs the argument {missing}")
        if self._extra is None and not kwargs.keys() <= self._known:
            self._refuse_unexpected(kwargs.keys() - self._known)
        return self._encode(kwargs)

    def decode(self, text: str) -> dict[str, Any]:
        """Return the keyword arguments for the handler from the JSON text of a row.

        Raises `InvalidPayload`, whatever the text is, if it is not an object of this handler's parameters.
        """
        return self._arguments(self._decode(text), text)

    def _read_back(self, text: str) -> object:
        known = super()._read_back(text)
        return known if self._extra is None else self._arguments(known, text)

    def _arguments(self, known: Any, text: str) -> dict[str, Any]:
        arguments = msgspec.structs.asdict(known)
        if self._has_optional:
            arguments = {name: value for name, value in arguments.items() if value is not UNSET}
        if self._extra is not None:
            self._add_extra(arguments, text, self._extra)
        return arguments

    def _add_extra(self, arguments: dict[str, Any], text: str, decoder: msgspec.json.Decoder[Any]) -> None:
        for name, raw in self._raw.decode(text).items():
            if name in self._known:
                continue
            if name in self._reserved:
                self._refuse_unexpected([name])
            try:
                arguments[name] = decoder.decode(raw)
            except _CODING_ERRORS as error:
                raise InvalidPayload(f"argument {name!r} of task {self._task!r}: {_reason(error)}") from error

    def _named(self, args: Sequence[object], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self._positional):
            raise InvalidPayload(
                f"task {self._task!r} takes {len(self._positional)} arguments by position, not {len(args)}"
            )
        named = dict(zip(self._positional, args, strict=False))
        if repeated := named.keys() & kwargs.keys():
            raise InvalidPayload(f"task {self._task!r} got the argument {min(repeated)!r} twice")
        return named | kwargs

    def _refuse_unexpected(self, names: Collection[str]) -> NoReturn:
        known = ", ".join(sorted(self._known)) or "no arguments"
        raise InvalidPayload(f"task {self._task!r} has no argument {ascii(min(names))[:200]}; it takes {known}")


class ResultCodec(_JsonCodec, Generic[R]):
    """What one handler or step returns, as JSON. Raises `InvalidTask` if the annotation is not a type that JSON can
    hold.

    Under `Any` the database decides what a number is: jsonb writes a float of 1e16 or more as an integer, and so it
    comes back. The annotation `float` keeps it a float.
    """

    __slots__ = ("_has_kept_none",)

    def __init__(
        self, name: str, kind: Any, *, limits: Limits | None = None, kind_of_value: str = "result of task"
    ) -> None:
        """`name`: the task's, or of what else `kind_of_value` says."""
        limits = limits or Limits()
        what = f"the {kind_of_value} {name!r}"
        require_json_type(what, kind)
        super().__init__(what, kind, max_bytes=limits.result_bytes, depth=limits.depth)
        self._has_kept_none = False  # most handlers return nothing, and that has been looked at once

    def encode(self, value: object) -> str:
        """Return `value` as JSON text (None is ``null``).

        Raises `InvalidPayload` if it does not fit the annotation or cannot be stored.
        """
        if value is None and self._has_kept_none:
            return "null"
        text = self._encode(value)
        self._has_kept_none = self._has_kept_none or value is None
        return text

    def decode(self, text: str) -> R:
        """Return the result as the annotated type. Raises `InvalidPayload` if the text does not fit it."""
        return cast(R, self._decode(text))


def _parameters_struct(
    parameters: Mapping[str, Any], optional: Collection[str], *, strict: bool
) -> type[msgspec.Struct]:
    """A Struct with the parameters as fields: the fastest way to decode an object and to know what was absent."""
    described = [(name, kind, UNSET) if name in optional else (name, kind) for name, kind in parameters.items()]
    return msgspec.defstruct("Parameters", described, kw_only=True, forbid_unknown_fields=strict, gc=False)


def require_json_type(what: str, kind: Any) -> None:
    """Raise `InvalidTask`, naming `what`, unless values of the annotation `kind` can be read back from JSON."""
    remedy = "use plain types, dataclasses, TypedDicts, attrs classes, msgspec Structs or pydantic models"
    try:
        info = msgspec_inspect.type_info(kind)
        msgspec.json.Decoder(kind, dec_hook=_decode_custom)
    except (TypeError, NameError) as error:
        raise InvalidTask(f"{what}: the annotation {kind!r} cannot be read from JSON: {error}; {remedy}") from error
    for custom in _custom_types(info):
        if custom is not object and not _is_pydantic_model(custom):
            raise InvalidTask(f"{what}: a value of type {custom!r} cannot be read from JSON; {remedy}")


def _custom_types(root: msgspec_inspect.Type) -> Iterator[Any]:
    """All types within `root` that msgspec leaves to hooks. Recursive types are visited once."""
    seen: set[int] = set()
    pending: list[object] = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, (list, tuple)):
            pending.extend(cast("Sequence[object]", node))
        elif isinstance(node, (msgspec_inspect.Type, msgspec_inspect.Field)) and id(node) not in seen:
            seen.add(id(node))
            if isinstance(node, (msgspec_inspect.CustomType, msgspec_inspect.ExtType)):
                yield getattr(node, "cls", node)
            pending.extend(getattr(node, name) for name in node.__struct_fields__ if name not in ("cls", "default"))


# --- pydantic, if the application has imported it --------------------------------------------------------------------


def _is_pydantic_model(kind: object) -> bool:
    pydantic = sys.modules.get("pydantic")
    return pydantic is not None and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def _encode_custom(value: object) -> object:
    if _is_pydantic_model(type(value)):
        return cast(Any, value).model_dump(mode="json", by_alias=True, round_trip=True)
    raise TypeError(f"an object of type {type(value).__qualname__} has no JSON form")


def _decode_custom(kind: type[Any], value: object) -> object:
    if kind is object:
        return value
    if _is_pydantic_model(kind):
        try:
            # From JSON, since strict models accept a date's text there only.
            return kind.model_validate_json(msgspec.json.encode(value))
        except sys.modules["pydantic"].ValidationError as error:
            # The model's own text would quote the input, which may be secret.
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            first = faults[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{kind.__qualname__}: {first['msg']} at `{place}`") from None
    raise TypeError(f"values of type {kind!r} cannot be read from JSON")


# --- exact checks, off the hot path ----------------------------------------------------------------------------------

_Path = tuple["_Path | None", object]

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ROUND_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NUMBER_AS_KEY = re.compile(rb'"(?:-?[0-9][^"]*|nan|-?inf)":').search


def nested_deeper(data: bytes, depth: int) -> bool:
    """Whether the JSON document `data` nests objects and arrays more than `depth` levels, without recursion.

    Each round takes off the innermost level everywhere, so `depth` rounds must leave nothing.
    """
    brackets = _STRINGS.sub(b"", data).translate(_ROUND_BRACKETS, _ALL_BUT_BRACKETS)
    for _ in range(depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _plain(value: object) -> object:
    """`value` as dicts, lists and scalars, numbers kept as they are and as keys."""
    return msgspec.to_builtins(value, enc_hook=_encode_custom)


def _unstorable(root: object) -> Iterator[tuple[_Path | None, str]]:
    """Every place in plain data whose value PostgreSQL or JSON cannot hold, with what it is."""
    pending: list[tuple[_Path | None, object]] = [(None, root)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, str):
            if "\0" in value:
                yield path, "a NUL character, which PostgreSQL cannot store,"
            elif not _is_unicode(value):
                yield path, "a lone surrogate, which is not valid Unicode,"
        elif isinstance(value, float):
            if not math.isfinite(value):
                yield path, f"the number {value}, which JSON does not have,"
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_DIGITS * 3 and abs(value) >= 10**MAX_INTEGER_DIGITS:
                yield path, f"an integer of more than {MAX_INTEGER_DIGITS:,} digits"
        elif isinstance(value, dict):
            for key, item in cast(dict[object, object], value).items():
                pending.append(((path, key), key))
                pending.append(((path, key), item))
        elif isinstance(value, (list, tuple)):
            pending.extend(((path, index), item) for index, item in enumerate(cast(Sequence[object], value)))


def _lost_keys(original: object, decoded: object) -> Iterator[tuple[_Path | None, object]]:
    """Every key of `original` that is not a text and has not come back as the same key in `decoded`."""
    pending: list[tuple[_Path | None, object, object]] = [(None, original, decoded)]
    while pending:
        path, before, after = pending.pop()
        if isinstance(before, dict):
            kept = cast(dict[object, object], after if isinstance(after, dict) else {})
            for key, item in cast(dict[object, object], before).items():
                if not isinstance(key, str) and key not in kept:
                    yield path, key
                pending.append(((path, key), item, kept.get(key)))
        elif isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)):
            pairs = zip(cast(Sequence[object], before), cast(Sequence[object], after), strict=False)
            pending.extend(((path, index), *pair) for index, pair in enumerate(pairs))


def _path(path: _Path | None) -> str:
    parts: list[str] = []
    while path is not None:
        path, key = path
        parts.append(f"[{key}]" if isinstance(key, int) else f".{ascii(key)[1:-1] if isinstance(key, str) else key}")
    return "$" + "".join(reversed(parts))[:500]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, UnicodeEncodeError):
        return "it holds a lone surrogate, which is not valid Unicode"
    return printable(str(error))[:1000]


# --- errors as data --------------------------------------------------------------------------------------------------

# Control characters, lone surrogates, and the marks that reorder text: none may act on a terminal or hide in a log.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNPRINTABLE_IN_BLOCK = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# PostgreSQL quotes the values of rows there, perhaps within the `repr` of its error.
_ROW_VALUES = re.compile(
    r"(?:^|\n|\\n)\s*(?:DETAIL|CONTEXT|QUERY):.*|\bFailing row contains \(.*|\bKey \([^()]*\)=\(.*", re.DOTALL
)

_MAX_CHAIN = 8
_MAX_GROUPED = 16
_MAX_FRAMES = 30
_MAX_NOTES = 16
_MAX_SEARCHED = 256  # exceptions, for what must not be told
_MAX_READ = 1 << 20  # characters of a message


def printable(text: str) -> str:
    """Return `text` as one line in which control characters, lone surrogates and bidi marks are escaped."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode()


def describe_error(error: BaseException, limit: int = ERROR_BYTES, head: BaseException | None = None) -> dict[str, str]:
    """Return an exception as data: ``type`` (qualified name), ``message`` (one line) and ``traceback``.

    As JSON it is at most `limit` bytes (512 or more) and free of NUL, lone surrogates and control characters; the
    values of rows that PostgreSQL puts into DETAIL and CONTEXT are left out, wherever they are quoted; notes are part
    of the traceback; groups and chains are bounded. Type and message are those of `head`, an exception within the group
    that `error` is, or of a group's only exception. What the engine itself ended has a short type, such as ``timeout``.
    Never raises, whatever the exception's own methods do.
    """
    try:
        return _described(error, limit, _only_leaf(error) if head is None else head)
    except (Exception, SystemExit) as broken:  # noqa: BLE001 - the user's own methods failed
        message = f"<it cannot be described: {_type_name(broken)}>"
        return {
            "type": _cut(printable(_type_name(error)), 200),
            "message": _cut(printable(message), 200),
            "traceback": "",
        }


def described_type(error: BaseException) -> str:
    """Return the ``type`` that `describe_error` gives it, of one printable line. Never raises."""
    kind = type(error)
    if issubclass(kind, (HandlerTimeout, DeadlineExceeded)):
        return kind.recorded_type
    return _cut(printable(_type_name(error)), 200)


def summary(error: BaseException, head: BaseException | None = None) -> str:
    """Return type and message as `describe_error` gives them, in one printable line, for a log. Never raises."""
    described = describe_error(error, 1024, head)
    return f"{described['type']}: {described['message']}" if described["message"] else described["type"]


def _described(error: BaseException, limit: int, head: BaseException) -> dict[str, str]:
    hidden = _row_values(error)
    described = {
        "type": described_type(head),
        "message": _cut(printable(_message(head, limit, hidden)), (limit - 300) // 2),
        "traceback": "",
    }
    # What the others leave; a traceback keeps its end, where the error is.
    room = limit - len(msgspec.json.encode(described)) - 16
    block = _UNPRINTABLE_IN_BLOCK.sub(_escaped, "\n".join(_traceback(error, limit, hidden)))
    described["traceback"] = _cut_start(block, room)
    return described


def _only_leaf(error: BaseException) -> BaseException:
    """The exception in a group, as a nursery makes one, that has no other in it; else `error`."""
    found = leaves(error)
    first = next(found, error)
    return first if next(found, None) is None else error


def _row_values(error: BaseException) -> list[str]:
    """What the errors of the driver around `error` hold of rows: not to be told by those that quote them either."""
    driver = sys.modules.get("psycopg")
    values: list[str] = []
    if driver is None:
        return values
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending and len(seen) < _MAX_SEARCHED:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, driver.Error):
            diag = cast("psycopg.Error", current).diag
            for value in (diag.message_detail, diag.context, diag.internal_query):
                if value:
                    values.extend({value, repr(value)[1:-1]})
        pending.extend((current.__context__, current.__cause__))
        if isinstance(current, BaseExceptionGroup):
            pending.extend(cast("BaseExceptionGroup[BaseException]", current).exceptions[:_MAX_SEARCHED])
    return sorted(values, key=len, reverse=True)


def _json_size(text: str) -> int:
    return len(msgspec.json.encode(text)) - 2


def _cut(text: str, size: int) -> str:
    """The start of `text` that takes at most `size` bytes as JSON."""
    text = text[:size]
    if _json_size(text) <= size:
        return text
    while text and _json_size(text) > size - 3:
        text = text[: -max(1, (_json_size(text) - size) // 6)]
    return text + "…"


def _cut_start(text: str, size: int) -> str:
    return _cut(text[: -size - 1 : -1] if len(text) > size else text[::-1], size)[::-1]


def _type_name(error: BaseException) -> str:
    # As `type` has them, not as a metaclass may tell.
    kind = type(error)
    name: str = _class_name(kind)
    module: object = _class_module(kind)
    return name if module == "builtins" or not isinstance(module, str) else f"{module}.{name}"


_class_name: Any = type.__dict__["__qualname__"].__get__
_class_module: Any = type.__dict__["__module__"].__get__


def _message(error: BaseException, limit: int, hidden: list[str]) -> str:
    """`str(error)`, exact `str`, bounded, without the values of rows."""
    driver = sys.modules.get("psycopg")
    try:
        text: str | None = None
        if driver is not None and isinstance(error, driver.Error):
            # The primary message only: labels such as DETAIL come in the server's language.
            text = cast("psycopg.Error", error).diag.message_primary
        if text is None:
            text = str(error)
        return _told(text, limit, hidden)
    except (Exception, SystemExit, GeneratorExit) as broken:  # noqa: BLE001 - the user's own __str__ failed
        return f"<its __str__ raised {_type_name(broken)}>"


def _told(text: str, limit: int, hidden: list[str]) -> str:
    """`text` without the values of rows, of at most `limit` characters."""
    text = str.__getitem__(text, slice(_MAX_READ))
    for value in hidden:
        text = text.replace(value, "…")
    return _ROW_VALUES.sub("", text)[:limit]


def _traceback(error: BaseException, limit: int, hidden: list[str]) -> list[str]:
    """Lines like those of an unhandled exception, causes first, made without asking the exceptions more than once."""
    chain: list[tuple[BaseException, str]] = []
    link = ""
    current: BaseException | None = error
    while current is not None and len(chain) < _MAX_CHAIN:
        chain.append((current, link))
        if current.__cause__ is not None:
            current, link = current.__cause__, "The above exception was the direct cause of the following exception:"
        elif not current.__suppress_context__:
            current, link = current.__context__, "During handling of the above exception, another exception occurred:"
        else:
            current = None
    lines: list[str] = []
    for position in range(len(chain) - 1, -1, -1):
        lines.extend(_one_traceback(chain[position][0], limit, hidden))
        if position:
            lines.extend(["", chain[position][1], ""])
    return lines


def _one_traceback(error: BaseException, limit: int, hidden: list[str]) -> list[str]:
    lines = [
        "Traceback (most recent call last):",
        *_frames(error),
        f"{_type_name(error)}: {_message(error, limit, hidden)}",
        *_notes(error, limit // 4, hidden),
    ]
    if isinstance(error, BaseExceptionGroup):
        lines.extend(_grouped(cast("BaseExceptionGroup[BaseException]", error), limit, hidden))
    return lines


def _frames(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__, limit=-_MAX_FRAMES)
    return "".join(traceback.format_list(frames)).splitlines()


def _notes(error: BaseException, room: int, hidden: list[str]) -> list[str]:
    """What `add_note` added, as far as there is room: the frames above are worth more."""
    notes = getattr(error, "__notes__", None)
    lines: list[str] = []
    if isinstance(notes, (list, tuple)):
        for note in cast(Sequence[object], notes)[:_MAX_NOTES]:
            if isinstance(note, str) and room > 0:
                lines.append(_cut(_told(note, room, hidden), room))
                room -= _json_size(lines[-1])
    return lines


def _grouped(group: BaseExceptionGroup[BaseException], limit: int, hidden: list[str]) -> list[str]:
    """The leaves of a group, flattened, each with its last frames."""
    lines: list[str] = []
    for shown, error in enumerate(leaves(group)):
        if shown == _MAX_GROUPED:
            lines.append("  + … more exceptions")
            break
        lines.append(f"  + {_type_name(error)}: {_message(error, limit // _MAX_GROUPED, hidden)}")
        lines.extend(f"    {line}" for line in (*_notes(error, limit // 64, hidden), *_frames(error)[-6:]))
    return lines
