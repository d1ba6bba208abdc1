"""Payloads, results and errors: what may be stored comes back as annotated, the rest is refused where it was made."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

import attrs
import msgspec
import psycopg
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgconductor.codec import (
    Limits,
    PayloadCodec,
    ResultCodec,
    describe_error,
    nested_deeper,
    printable,
    summary,
)
from pgconductor.errors import DeadlineExceeded, HandlerTimeout, InvalidOption, InvalidPayload, InvalidTask


@dataclasses.dataclass
class Point:
    x: float
    label: str | None = None


@attrs.define
class AttrsPoint:
    x: float


class StructPoint(msgspec.Struct):
    x: float


class TypedPoint(TypedDict):
    x: float
    note: NotRequired[str]


class Model(pydantic.BaseModel):
    x: float
    day: date
    secret: pydantic.SecretStr | None = None


class StrictModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    at: datetime
    number: int = pydantic.Field(alias="n")


class Tree(msgspec.Struct):
    children: list[Tree]


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Positive:
    x: int

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x must not be negative")


def payload(limits: Limits | None = None, **parameters: Any) -> PayloadCodec:
    return PayloadCodec("greet", parameters, positional=list(parameters), limits=limits)


def anything(limits: Limits | None = None) -> ResultCodec[Any]:
    return ResultCodec("greet", Any, limits=limits)


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


# --- what comes back ---


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (type(None), None),
        (int, 0),
        (int, -(2**70)),
        (float, 0.1),
        (float, 5e-324),
        (float, 1e300),
        (bool, False),
        (str, ""),
        (str, "\\u0000 null \\"),
        (str, "é😀\x7f\n"),
        (list[int], []),
        (dict[str, int], {"1": 1, "null": 2}),
        (dict[int, str], {1: "a", -5: "b"}),
        (dict[float, str], {1.5: "a"}),
        (tuple[int, str], (1, "a")),
        (set[int], {1, 2}),
        (bytes, b"\x00\xff"),
        (date, date(2024, 2, 29)),
        (datetime, datetime(2024, 2, 29, 12, tzinfo=UTC)),
        (timedelta, timedelta(days=1, microseconds=1)),
        (uuid.UUID, uuid.UUID(int=5)),
        (Decimal, Decimal("1.10")),
        (Colour, Colour.RED),
        (Literal["a", "b"], "a"),
        (Point, Point(1.5)),
        (Point | None, None),
        (AttrsPoint, AttrsPoint(1.0)),
        (StructPoint, StructPoint(1.0)),
        (TypedPoint, {"x": 1.0, "note": "n"}),
        (Model, Model(x=1.0, day=date(2024, 1, 1))),
        (list[Model], [Model(x=1.0, day=date(2024, 1, 1))]),
        (StrictModel, StrictModel(at=datetime(2024, 1, 1, tzinfo=UTC), n=3)),
        (Tree, Tree([Tree([])])),
        (object, {"a": [1, None]}),
        (list[object], [1, "a", {"b": None}]),
        (Any, {"a": [1, None, False, ""]}),
        (Annotated[int, msgspec.Meta(gt=0)], 3),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_its_annotation_says(kind: Any, value: object) -> None:
    """`handle.result()` or a handler would get another value, or another type, than was given."""
    codec: ResultCodec[Any] = ResultCodec("greet", kind)
    text = codec.encode(value)
    json.loads(text)
    back = codec.decode(text)
    assert back == value
    assert type(back) is type(value)
    arguments = payload(value=kind)
    assert arguments.decode(arguments.encode((), {"value": value})) == {"value": value}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
def test_plain_data_comes_back_or_is_refused_for_a_nul(value: Any) -> None:
    """The cheap signals on the encoded bytes would refuse good data or let NUL pass."""
    codec = anything()
    if "\\u0000" in json.dumps(value).replace("\\\\", ""):
        with pytest.raises(InvalidPayload, match="NUL"):
            codec.encode(value)
    else:
        assert codec.decode(codec.encode(value)) == value


def test_none_is_a_result_like_any_other() -> None:
    """A handler that returns None would seem not to have finished."""
    codec: ResultCodec[None] = ResultCodec("greet", None)
    assert codec.encode(None) == "null"
    assert codec.decode("null") is None


# --- arguments ---


def test_positional_arguments_are_stored_by_name() -> None:
    """A reordered signature would swap the arguments of what is already queued."""
    codec = PayloadCodec("greet", {"a": int, "b": int}, positional=["a", "b"])
    assert json.loads(codec.encode((1,), {"b": 2})) == {"a": 1, "b": 2}


def test_defaults_are_left_to_the_handler() -> None:
    """A default changed by a deployment would not reach what is queued; a given value must."""
    codec = PayloadCodec("greet", {"a": int, "b": list[int]}, optional=["b"], positional=["a", "b"])
    assert json.loads(codec.encode((1,), {})) == {"a": 1}
    assert codec.decode('{"a":1}') == {"a": 1}
    assert codec.decode('{"a":1,"b":[]}') == {"a": 1, "b": []}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "needs the argument 'a'"),
        ((1, 2), {}, "takes 1 arguments by position, not 2"),
        ((1,), {"a": 1}, "got the argument 'a' twice"),
        ((1,), {"c": 1}, "has no argument 'c'; it takes a, b"),
        ((1,), {"c\n": 1}, r"has no argument 'c\\n'"),
        ((), {"a": "x"}, r"Expected `int`, got `str` - at `\$\.a`"),
        ((), {"a": None}, r"Expected `int`, got `null` - at `\$\.a`"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_the_caller(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    """The mistake would show in a worker, later, without the caller's traceback."""
    codec = PayloadCodec("greet", {"a": int, "b": int}, optional=["b"], positional=["a"])
    with pytest.raises(InvalidPayload, match=message) as caught:
        codec.encode(args, kwargs)
    assert "'greet'" in str(caught.value)


def test_extra_keyword_arguments_are_checked_and_kept() -> None:
    """A handler with ``**kwargs`` would lose them, or get them unchecked, or get its context replaced."""
    codec = PayloadCodec("greet", {"a": int}, positional=["a"], extra=dict[int, str], reserved=["ctx"])
    arguments = {"a": 1, "more": {1: "x"}}
    assert codec.decode(codec.encode((), arguments)) == arguments
    with pytest.raises(InvalidPayload, match="argument 'more'"):
        codec.encode((), {"a": 1, "more": 5})
    with pytest.raises(InvalidPayload, match="no argument 'ctx'"):
        codec.encode((), {"a": 1, "ctx": {}})
    with pytest.raises(InvalidPayload, match="no argument 'ctx'"):
        codec.decode('{"a":1,"ctx":{}}')


# --- what cannot be stored ---

_CYCLE: list[Any] = []
_CYCLE.append(_CYCLE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"the number nan.*at `\$\.value`"),
        ([{"deep": math.inf}], r"the number inf.*at `\$\.value\[0\]\.deep`"),
        (Point(-math.inf), r"the number -inf.*at `\$\.value\.x`"),
        (Model(x=math.nan, day=date(2024, 1, 1)), r"the number nan.*at `\$\.value\.x`"),
        ("a\0b", r"NUL.*at `\$\.value`"),
        ({"a\0": 1}, r"NUL.*at `\$\.value\.a"),
        (Point(1.0, "\0"), r"NUL.*at `\$\.value\.label`"),
        ("\ud800", r"lone surrogate.*at `\$\.value`"),
        ([{"k\udfff": 1}], r"lone surrogate.*at `\$\.value\[0\]"),
        ({1: "a"}, r"key 1 of type int at `\$\.value`"),
        ({"a": [{1.5: "a"}]}, r"key 1\.5 of type float at `\$\.value\.a\[0\]`"),
        ({1: "a", "1": "b"}, r"key 1 of type int"),
        ({math.nan: 1}, r"key nan"),
        ({True: 1}, r"cannot be written as JSON"),
        ({(1, 2): 1}, r"cannot be written as JSON"),
        ({None: 1}, r"cannot be written as JSON"),
        (object(), r"at `\$\.value` cannot be written as JSON: an object of type object"),
        (lambda: None, r"cannot be written as JSON"),
        (1j, r"cannot be written as JSON"),
        (10**4300, r"an integer of more than 4,300 digits at `\$\.value`"),
        ([-(10**5000)], r"an integer of more than 4,300 digits at `\$\.value\[0\]`"),
        (_CYCLE, r"nested more than 64 levels deep, or refers to itself"),
        (nested(100_000), r"nested more than 64 levels deep"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
def test_what_cannot_be_stored_is_refused_with_its_place(value: object, message: str) -> None:
    """The database would refuse the whole batch (22P05, 22P02), or another value would come back."""
    with pytest.raises(InvalidPayload, match=message) as caught:
        payload(other=Any, value=Any).encode((), {"other": "x", "value": value})
    assert "the payload of task 'greet'" in str(caught.value)
    with pytest.raises(InvalidPayload, match="the result of task 'greet'"):
        anything().encode(value)


def test_integers_of_4300_digits_are_stored() -> None:
    """The bound would refuse what still round-trips."""
    value = 10**4300 - 1
    assert anything().decode(anything().encode(value)) == value


def test_size_is_bounded_to_the_byte() -> None:
    """Text in the caller and CHECK in the database would disagree about what fits."""
    limits = Limits(payload_bytes=100, result_bytes=50)
    codec = payload(limits, s=str)
    overhead = len('{"s":""}')
    codec.encode((), {"s": "é" * ((100 - overhead) // 2)})
    with pytest.raises(InvalidPayload, match="101 bytes of JSON; at most 100"):
        codec.encode((), {"s": "x" * (101 - overhead)})
    anything(limits).encode("x" * 48)
    with pytest.raises(InvalidPayload, match="51 bytes of JSON; at most 50"):
        anything(limits).encode("x" * 49)


def test_depth_is_bounded_to_the_level() -> None:
    """A payload would be accepted that a worker cannot decode."""
    codec = anything()
    codec.decode(codec.encode(nested(64)))
    with pytest.raises(InvalidPayload, match="more than 64 levels"):
        codec.encode(nested(65))
    with pytest.raises(InvalidPayload, match="more than 64 levels"):
        codec.decode("[" * 65 + "]" * 65)


def test_breadth_is_not_depth() -> None:
    """Counting brackets is only a signal: a long list of small objects, and brackets in texts, are shallow."""
    codec = anything()
    value = [{"a": [n], "[{": '"[[{\\"'} for n in range(1000)]
    assert codec.decode(codec.encode(value)) == value


def measured_depth(node: Any) -> int:
    """The depth of plain data, the obvious way."""
    if isinstance(node, dict):
        node = list(cast("dict[str, Any]", node).values())
    if not isinstance(node, list):
        return 0
    children: list[Any] = [*node]
    return 1 + max((measured_depth(child) for child in children), default=0)


@given(st.integers(0, 30), st.integers(1, 30), st.text())
def test_nesting_is_measured_exactly(levels: int, depth: int, text: str) -> None:
    """Quotes, escapes or brackets in texts would be taken for structure."""
    value: Any = text
    for level in range(levels):
        value = [text, value, [[]]] if level % 2 else {text: value, "k": [], "l": {}}
    assert nested_deeper(msgspec.json.encode(value), depth) == (measured_depth(value) > depth)


# --- what a row may hold ---


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "1",
        '{"n": 1}',
        '{"value": {"x": "a"}}',
        '{"value": {"x": -1}}',
        '{"value": {"x": 1}, "unknown": 1}',
        '{"value": ' + "[" * 500 + "]" * 500 + "}",
        '{"value": ' + '{"a":' * 200_000 + "1" + "}" * 200_000 + "}",
        '{"value": {"x": ' + "1" * 5000 + "}}",
        '{"value": {"x": ' + "1" * 131_072 + "}}",
        '{"value": {"x": 1e400}}',
        '{"value": {"x": 1}, "\ud800": 1}',
        "\x80\x04\x95",
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_whatever_a_row_holds_decoding_ends_in_a_value_or_invalid_payload(text: str) -> None:
    """One row written by SQL would stop the worker with RecursionError or ValueError."""
    with pytest.raises(InvalidPayload, match="the payload of task 'greet'"):
        payload(value=Positive).decode(text)


def test_five_thousand_digits_are_refused_for_untyped_values_too() -> None:
    """CPython raises ValueError for such an integer, PostgreSQL stores it."""
    with pytest.raises(InvalidPayload, match="out of range"):
        anything().decode("[" + "1" * 5000 + "]")


def test_jsonb_writes_floats_as_digits_and_they_come_back_as_floats() -> None:
    """jsonb turns 1e22 into 10000000000000000000000; the annotation says which type it was."""
    codec: ResultCodec[float] = ResultCodec("greet", float)
    for value in (1e22, 1.7976931348623157e308, -0.0):
        back = codec.decode(f"{Decimal(value):f}")
        assert back == value
        assert type(back) is float


def test_declaring_tasks_imports_no_driver_no_loop_and_no_pickle() -> None:
    """Whoever can write rows could run code in the workers; a producer would pay for what it does not use."""
    program = (
        "import sys, pgconductor.tasks, pgconductor.context, pgconductor.handle\n"
        "found = {'pickle', 'yaml', 'trio', 'psycopg', 'asyncio', 'pydantic'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})


def test_package_imports_no_pytest() -> None:
    """Every program would start half as long again where pytest is installed, for what only a replay check uses."""
    program = (
        "import sys, pgconductor\n"
        "for name in pgconductor.__all__: getattr(pgconductor, name)\n"
        "found = {'pytest', '_pytest', 'trio.testing'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_models_error_does_not_quote_its_input() -> None:
    """pydantic's own message would put the payload's secrets into logs and stored errors."""
    with pytest.raises(InvalidPayload, match=r"Model: Input should be .* at `day`") as caught:
        payload(value=Model).decode('{"value": {"x": 1, "day": "4111-1111-1111"}}')
    assert "4111" not in str(caught.value)


# --- declarations ---


@pytest.mark.parametrize("kind", [complex, Callable[[], int], type, list[complex], dict[str, set[complex]], 5, "Nope"])
def test_an_annotation_that_json_cannot_hold_is_refused(kind: Any) -> None:
    """Every execution would fail at decoding, one by one."""
    with pytest.raises(InvalidTask, match="parameter 'value' of task 'greet'"):
        payload(value=kind)
    with pytest.raises(InvalidTask, match="the result of task 'greet'"):
        ResultCodec("greet", kind)


@pytest.mark.parametrize(
    "options",
    [
        {"payload_bytes": 1},
        {"payload_bytes": (1 << 20) + 1},
        {"depth": 0},
        {"depth": 257},
        {"error_bytes": 100},
        {"name_bytes": 129},
        {"batch": 10_001},
        {"batch": True},
        {"depth": 3.0},
    ],
)
def test_limits_out_of_range_are_refused(options: dict[str, Any]) -> None:
    """A limit above the schema's own would move the refusal from the caller into the database."""
    with pytest.raises(InvalidOption, match=r"Limits\("):
        Limits(**options)


# --- errors as data ---


class Hostile(Exception):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __str__(self) -> str:
        raise self.error


class ShapeShifter(str):
    __slots__ = ()

    def __getitem__(self, key: Any) -> str:
        raise RuntimeError("no")

    def __str__(self) -> str:
        raise RuntimeError("no")


class Shifting(Exception):
    def __str__(self) -> str:
        return ShapeShifter("shifted")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001
        return caught


def test_an_error_is_described_by_type_message_and_traceback() -> None:
    """Users could not tell from a failed execution what went wrong, and where."""

    def fails_twice() -> None:
        try:
            raise KeyError("missing")
        except KeyError as error:
            raise InvalidTask("second") from error

    with pytest.raises(InvalidTask) as caught:
        fails_twice()
    described = describe_error(caught.value)
    assert described["type"] == "pgconductor.errors.InvalidTask"
    assert described["message"] == "second"
    assert "KeyError: 'missing'" in described["traceback"]
    assert "direct cause" in described["traceback"]
    assert described["traceback"].index("KeyError") < described["traceback"].index("second")
    assert "in fails_twice" in described["traceback"]


@pytest.mark.parametrize(
    "error",
    [
        Hostile(ValueError("x")),
        Hostile(RecursionError()),
        Hostile(SystemExit(3)),
        Shifting(),
        ValueError("x" * 10_000_000),
        ValueError("\0" * 100_000),
        ValueError("\ud800" * 100_000),
        ValueError('😀\\"' * 100_000),
        ValueError(b"\xff", object()),
        SystemExit(1),
        KeyboardInterrupt(),
        ExceptionGroup("g" * 10_000, [Hostile(ValueError())] * 1000),
        BaseExceptionGroup("b", [SystemExit(1), ExceptionGroup("inner", [ValueError("leaf")])]),
        UnicodeDecodeError("utf-8", b"\xff" * 100, 0, 1, "bad"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("limit", [512, 8192])
def test_any_error_becomes_data_within_the_limit(error: BaseException, limit: int) -> None:
    """One exception would break the flush that carries it, or end the worker."""
    described = describe_error(raised(error), limit)
    text = msgspec.json.encode(described)
    assert len(text) <= limit
    assert b"\\u0000" not in text
    assert set(described) == {"type", "message", "traceback"}
    assert described["type"]


def test_long_errors_use_the_room_they_have() -> None:
    """Cutting would throw away nearly everything as soon as something is too long."""
    described = describe_error(raised(ValueError("x" * 100_000)))
    assert len(described["message"]) > 3000
    assert len(msgspec.json.encode(described)) > 8192 * 0.9


def test_a_cut_traceback_keeps_its_end() -> None:
    """The line that failed would be lost, the frames of the engine kept."""

    def left(levels: int) -> None:
        right(levels - 1)

    def right(levels: int) -> None:
        if levels <= 0:
            raise ValueError("the deepest")
        left(levels - 1)

    with pytest.raises(ValueError, match="deepest") as caught:
        left(100)
    traceback = describe_error(caught.value, 1024)["traceback"]
    assert traceback.endswith("ValueError: the deepest")
    assert traceback.startswith("…")


def test_a_large_group_shows_its_head_and_its_first_exceptions() -> None:
    """A thousand failed children would push out what happened first."""
    errors: list[Exception] = [KeyError(f"number {n} of the group, with a longer text") for n in range(1000)]
    traceback = describe_error(raised(ExceptionGroup("children failed", errors)))["traceback"]
    assert "ExceptionGroup: children failed (1000 sub-exceptions)" in traceback
    assert "number 0 of the group" in traceback
    assert "number 15 of the group" in traceback
    assert "more exceptions" in traceback
    assert "number 16 of the group" not in traceback


def test_a_message_of_a_hostile_str_subclass_is_read_all_the_same() -> None:
    """Its own methods would run inside the engine."""
    described = describe_error(raised(Shifting()))
    assert described["message"] == "shifted"
    assert type(described["message"]) is str


def test_a_chain_that_refers_to_itself_ends() -> None:
    """A cause may be its own cause."""
    error = ValueError("loop")
    other = ValueError("other")
    error.__cause__, other.__cause__ = other, error
    assert describe_error(error)["traceback"].endswith("ValueError: loop")


def test_deep_groups_and_long_chains_do_not_overflow_the_stack() -> None:
    """RecursionError in the description of an error would escape the guard."""
    group: Exception = ValueError("leaf")
    for _ in range(5000):
        inner: list[Exception] = [group]
        group = ExceptionGroup("level", inner)
    assert "leaf" in describe_error(group)["traceback"]
    chain = ValueError("0")
    for n in range(5000):
        following = ValueError(str(n))
        following.__cause__ = chain
        chain = following
    assert describe_error(chain)["message"] == "4999"


@given(st.text())
def test_messages_are_single_printable_lines(text: str) -> None:
    """A message could forge lines of a log or steer a terminal."""
    line = printable(text)
    assert len(line.splitlines()) <= 1
    line.encode()
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in line)
    assert describe_error(ValueError(text))["message"].isprintable() or not text.isprintable()


def test_terminal_and_bidi_codes_are_escaped_in_all_parts() -> None:
    """They would act when somebody looks at the error."""
    hostile = "a\nb\x1b[2J\u202eevil\x9b\r"
    kind = type("Bad\x1b", (Exception,), {})
    described = describe_error(raised(kind(hostile)))
    assert described["message"] == r"a\nb\x1b[2J\u202eevil\x9b\r"
    for part in described.values():
        assert not set(part) & set("\x1b\u202e\x9b\r")


def test_values_of_rows_are_not_stored_with_the_error() -> None:
    """PostgreSQL's DETAIL quotes whole rows, which may hold what nobody may log."""
    primary = 'new row for relation "cards" violates check constraint "positive"'

    class Wrapped(Exception):
        """As an ORM wraps the driver's error: with its whole text."""

    error = Wrapped(f"(psycopg.errors.CheckViolation) {primary}\nDETAIL:  Failing row contains (-1, 4111).\nCONTEXT: x")
    described = describe_error(raised(error))
    assert described["message"].endswith('"positive"')
    assert not any("4111" in part for part in described.values())


def test_a_driver_error_is_described_by_its_primary_message_in_any_language() -> None:
    """The labels of DETAIL and CONTEXT come in the server's language, so the text alone cannot be cleaned."""
    fields = {psycopg.pq.DiagnosticField.MESSAGE_PRIMARY: b"verletzt Check-Constraint"}
    error = psycopg.errors.CheckViolation("verletzt\nD\xe9tail : (-1, 4111)", info=fields)  # type: ignore[arg-type]
    described = describe_error(raised(error))
    assert described["type"] == "psycopg.errors.CheckViolation"
    assert described["message"] == "verletzt Check-Constraint"
    assert not any("4111" in part for part in described.values())


def test_a_driver_error_without_a_server_keeps_its_message() -> None:
    """Errors of the connection itself have no diagnostics; their text would be empty."""
    assert describe_error(psycopg.OperationalError("connection failed"))["message"] == "connection failed"


# --- errors: secrets, notes, heads and hostile exceptions ---

CANARY = "4111-1111-1111-1111"


def check_violation() -> psycopg.Error:
    """As the server sends it, in another language."""
    fields = {
        psycopg.pq.DiagnosticField.MESSAGE_PRIMARY: b"verletzt Check-Constraint",
        psycopg.pq.DiagnosticField.MESSAGE_DETAIL: f"Zeile enthaelt (-1, 'a\n', {CANARY}).".encode(),
        psycopg.pq.DiagnosticField.CONTEXT: f"COPY cards, Zeile 1: {CANARY}".encode(),
    }
    text = f"verletzt Check-Constraint\nEinzelheit:  Zeile enthaelt (-1, 'a\n', {CANARY})."
    return psycopg.errors.CheckViolation(text, info=fields)  # type: ignore[arg-type]


class Wrapping(Exception):
    pass


def wrapped_by(form: str) -> BaseException:
    """An error of the driver, as it gets into errors of others."""
    try:
        try:
            raise check_violation()
        except psycopg.Error as error:
            detail = error.diag.message_detail
            match form:
                case "cause":
                    raise Wrapping(f"cannot save: {error}") from error
                case "context":
                    raise Wrapping(f"cannot save: {error}")  # noqa: B904
                case "hidden context":
                    raise Wrapping(f"cannot save: {error}") from None
                case "repr":
                    raise Wrapping(f"cannot save: {error!r}") from error
                case "detail":
                    raise Wrapping(f"{detail} was refused") from error
                case "group":
                    raise ExceptionGroup("saving", [error, Wrapping(str(error))]) from None
                case "cause in a group":
                    inner = Wrapping(str(error))
                    inner.__cause__ = error
                    raise ExceptionGroup(f"saving: {error}", [ExceptionGroup(str(error), [inner])]) from None
                case "note":
                    error.add_note(f"row: {detail}")
                    raise
                case "note of another":
                    other = Wrapping("saving")
                    other.add_note(str(error))
                    raise other from error
                case _:
                    raise AssertionError(form) from error
    except Exception as error:  # noqa: BLE001
        return error


@pytest.mark.parametrize(
    "form",
    [
        "cause",
        "context",
        "hidden context",
        "repr",
        "detail",
        "group",
        "cause in a group",
        "note",
        "note of another",
    ],
)
def test_values_of_rows_do_not_reach_the_record_by_any_way(form: str) -> None:
    """What a card's number has no business in is the table of failures, and every log that quotes it."""
    error = wrapped_by(form)
    described = describe_error(error)
    assert CANARY not in "".join(described.values())
    assert CANARY not in summary(error)
    assert "verletzt Check-Constraint" in described["traceback"] or form == "detail"


@pytest.mark.parametrize(
    "text",
    [
        f"bad\nDETAIL:  Failing row contains (-1, {CANARY}).",
        f"bad\n  CONTEXT:  COPY cards, line 1: {CANARY}",
        f"bad\nQUERY:  insert into cards values ('{CANARY}')",
        f"NotNullViolation('bad\\nDETAIL:  Failing row contains ({CANARY}).')",
        f"Failing row contains (-1, {CANARY}).",
        f"bad: Key (card)=({CANARY}) already exists.",
        f"DETAIL:  {CANARY}",
    ],
)
def test_values_of_rows_are_recognised_without_the_drivers_error(text: str) -> None:
    """A program that only logs and raises the text would store the row."""
    described = describe_error(Wrapping(text))
    assert CANARY not in "".join(described.values())
    assert "Wrapping" in described["traceback"]


def test_ordinary_messages_are_left_alone() -> None:
    """A word that PostgreSQL uses too would cut messages short."""
    text = "no DETAIL: given, CONTEXT is missing; Key is wrong"
    assert describe_error(Wrapping(text))["message"] == text


def test_notes_are_recorded_within_their_share() -> None:
    """What `add_note` tells would be lost, or would push out the frames."""

    def fails() -> None:
        error = ValueError("bad")
        error.add_note("while reading\nline 7\x1b[2J")
        raise error

    with pytest.raises(ValueError, match="bad") as caught:
        fails()
    traceback = describe_error(caught.value)["traceback"]
    assert traceback.endswith("ValueError: bad\nwhile reading\nline 7\\x1b[2J")
    for _ in range(1000):
        caught.value.add_note("n" * 100_000)
    described = describe_error(caught.value, 1024)
    assert len(msgspec.json.encode(described)) <= 1024
    assert "in fails" in described["traceback"]
    assert "…\n…" not in described["traceback"]


def test_notes_of_grouped_errors_are_recorded() -> None:
    """The engine's word on a broken back-off, or the user's, would be lost in a group."""
    leaf = ValueError("bad")
    leaf.add_note("noted")
    assert "    noted" in describe_error(ExceptionGroup("group", [leaf, KeyError()]))["traceback"]


def test_a_group_of_one_is_told_by_its_only_exception() -> None:
    """ "Exceptions from Trio nursery (1 sub-exception)" is all that a waiting caller would be told."""
    group = ExceptionGroup("Exceptions from Trio nursery", [ExceptionGroup("inner", [ValueError("bad")])])
    described = describe_error(group)
    assert (described["type"], described["message"]) == ("ValueError", "bad")
    assert "ExceptionGroup: Exceptions from Trio nursery (1 sub-exception)" in described["traceback"]
    both = ExceptionGroup("both", [ValueError("bad"), deciding := KeyError("deciding")])
    assert describe_error(both)["type"] == "ExceptionGroup"
    assert describe_error(both, head=deciding)["message"] == "'deciding'"


def test_what_the_engine_ended_has_a_short_type() -> None:
    """Callers would compare with the name of a class that may move."""
    assert describe_error(HandlerTimeout("5 s"))["type"] == "timeout"
    assert describe_error(DeadlineExceeded("passed"))["type"] == "deadline"
    assert "pgconductor.errors.HandlerTimeout: 5 s" in describe_error(HandlerTimeout("5 s"))["traceback"]


def explode(self: object) -> Any:
    raise RuntimeError("boom")


def explode_at(self: object, name: str) -> Any:
    raise RuntimeError(name)


def hostile_kinds() -> Iterator[type[Exception]]:
    for name in ("__notes__", "__cause__", "__context__", "__traceback__", "__suppress_context__"):
        yield type(f"Bad{name}", (Exception,), {name: property(explode)})
    yield type("BadExceptions", (ExceptionGroup,), {"exceptions": property(explode)})
    yield type("BadRepr", (Exception,), {"__repr__": explode, "__str__": explode})
    yield type("BadModule", (Exception,), {"__module__": object()})
    yield type("BadNotes", (Exception,), {"__notes__": [object(), 5, None, "fine"]})
    yield type("BadGetattribute", (Exception,), {"__getattribute__": explode_at})
    # A metaclass that says something else about its classes than `type` does.
    members: dict[str, Any] = {"__name__": property(explode), "__module__": property(explode)}
    metaclass: Any = type("Metaclass", (type,), members)
    yield metaclass("BadMetaclass", (Exception,), {})


@pytest.mark.parametrize("number", range(11))
def test_no_exception_can_raise_while_it_is_described(number: int) -> None:
    """One exception of a user's could end the worker, and with it every execution beside."""
    kind = list(hostile_kinds())[number]
    make: Any = kind
    error: Exception = make("bad", [ValueError("leaf")]) if issubclass(kind, ExceptionGroup) else make("bad")
    for described in (describe_error(error), describe_error(ExceptionGroup("group", [error, error]))):
        assert set(described) == {"type", "message", "traceback"}
        assert described["type"]
        assert len(msgspec.json.encode(described)) <= 8192
    assert "\n" not in summary(error)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_a_summary_is_one_printable_line(text: str, notes: list[str]) -> None:
    """An error could forge lines of a log or steer a terminal."""
    error = type("Bad\n\x1b[2J", (Exception,), {})(text)
    for note in notes:
        error.add_note(note)
    line = summary(error)
    assert len(line.splitlines()) == 1
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in line)
    line.encode()
