"""Declaring handlers of batches: their options, their signature, and the types of what is declared.

A handler of batches is called with the items of many executions and answers for each. Its payload is the JSON object
``{"item": ...}``, so that whoever writes SQL or has the command line can send one too. Pure: when executions are
gathered and how a batch is run is the business of `runtime/stock.py` and `runtime/batch.py`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Never,
    NoReturn,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    overload,
)

from .batch_context import BatchContext
from .codec import Limits, PayloadCodec, ResultCodec
from .context import Context
from .errors import InvalidTask
from .options import checked_int, checked_seconds
from .signatures import Shape, bare, check_awaitable, is_annotated, mentions, resolved_hints

if TYPE_CHECKING:
    from .tasks import Task

T = TypeVar("T")
R = TypeVar("R")

MAX_BATCH_SIZE: Final = 1000
MAX_BATCH_WAIT: Final = 60.0
ITEM: Final = "item"  # the one parameter of a payload

_ITEMS = "annotate it `list[T]` or `Sequence[T]`, T being what one execution brings"
_ANSWERS = "annotate it `-> None`, or `-> list[T | Exception]` for one answer per item"


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How executions are gathered: `size` of them at most; the first waits for `max_wait` seconds for others."""

    size: int
    max_wait: float = 0.0


def checked_batch(size: object, max_wait: object) -> BatchOptions:
    """Return validated options, ranges as `Tasks.batch_task` states them; raises `InvalidOption`."""
    return BatchOptions(
        checked_int("size of a batch", size, minimum=1, maximum=MAX_BATCH_SIZE),
        checked_seconds("max_wait of a batch", max_wait, maximum=MAX_BATCH_WAIT),
    )


class BatchTaskDecorator(Protocol):
    """What ``conductor.batch_task(...)`` returns: a decorator that knows the item and the result."""

    @overload
    def __call__(self, handler: Callable[[BatchContext, list[T]], Coroutine[Any, Any, None]], /) -> Task[[T], None]: ...
    @overload
    def __call__(self, handler: Callable[[list[T]], Coroutine[Any, Any, None]], /) -> Task[[T], None]: ...
    @overload
    def __call__(
        self, handler: Callable[[BatchContext, list[T]], Coroutine[Any, Any, Sequence[R | Exception]]], /
    ) -> Task[[T], R]: ...
    @overload
    def __call__(
        self, handler: Callable[[list[T]], Coroutine[Any, Any, Sequence[R | Exception]]], /
    ) -> Task[[T], R]: ...
    @overload
    def __call__(self, handler: Callable[[BatchContext, list[T]], None], /) -> Task[[T], None]: ...
    @overload
    def __call__(self, handler: Callable[[list[T]], None], /) -> Task[[T], None]: ...
    @overload
    def __call__(self, handler: Callable[[BatchContext, list[T]], Sequence[R | Exception]], /) -> Task[[T], R]: ...
    @overload
    def __call__(self, handler: Callable[[list[T]], Sequence[R | Exception]], /) -> Task[[T], R]: ...


def batch_shape_of(task: str, handler: Callable[..., Any], limits: Limits) -> Shape[Any]:
    """Return what the annotations say; raises `InvalidTask`, with the remedy, for what they must not."""
    hints = resolved_hints(task, handler)
    parameters = list(inspect.signature(handler).parameters.values())
    for parameter in parameters:
        if mentions(hints.get(parameter.name), Context):
            raise InvalidTask(
                f"parameter {parameter.name!r} of task {task!r} is annotated Context, but its handler is one of "
                f"batches, whose executions have no history; write `{parameter.name}: BatchContext`"
            )
    wants_context = bool(parameters) and is_annotated(hints.get(parameters[0].name), BatchContext)
    items = parameters[wants_context:]
    if len(items) != 1 or any(each.kind not in _POSITIONAL for each in parameters):
        raise InvalidTask(
            f"task {task!r} is a handler of batches and takes the items of a batch as its one parameter (after the "
            f"BatchContext, if it wants that), neither keyword-only nor with stars"
        )
    kind = _item_of(task, items[0].name, hints.get(items[0].name))
    if mentions(kind, BatchContext):
        raise InvalidTask(f"task {task!r}: the BatchContext must be the first parameter, annotated so and nothing else")
    returns = hints.get("return", inspect.Parameter.empty)
    check_awaitable(task, handler, returns)
    returns_nothing = bare(returns) in (types.NoneType, NoReturn, Never)
    return Shape(
        wants_context=wants_context,
        payload=PayloadCodec(task, {ITEM: kind}, positional=[ITEM], limits=limits),
        result=ResultCodec(task, types.NoneType if returns_nothing else _result_of(task, returns), limits=limits),
        returns_nothing=returns_nothing,
    )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _item_of(task: str, name: str, hint: Any) -> Any:
    element = _element_of(hint)
    if element is _NONE:
        raise InvalidTask(f"parameter {name!r} of task {task!r} is what its handler gets of a batch; {_ITEMS}")
    return element


def _result_of(task: str, returns: Any) -> Any:
    """What an execution's result is: an entry of what is returned that is no exception."""
    element = _element_of(returns)
    if element is _NONE:
        raise InvalidTask(f"what task {task!r} returns is to be an answer for each item of a batch; {_ANSWERS}")
    kinds: tuple[Any, ...] = get_args(element) if get_origin(element) in (Union, types.UnionType) else (element,)
    results = [kind for kind in kinds if not _is_exception(kind)]
    if not results:
        raise InvalidTask(f"task {task!r} returns nothing but exceptions; write `None | Exception` if it has no result")
    return results[0] if len(results) == 1 else Union[tuple(results)]  # noqa: UP007  # not known before it runs


def _is_exception(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


_NONE: Final = object()  # it is no list of anything


def _element_of(hint: Any) -> Any:
    """The element of an annotated list or sequence, Any for a bare one; `_NONE` for anything else."""
    hint = bare(hint)
    if hint in (list, Sequence):
        return Any
    if get_origin(hint) in (list, Sequence):
        return next(iter(get_args(hint)), Any)  # none of a bare typing.List
    return _NONE
