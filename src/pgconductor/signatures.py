"""What a handler's signature says: which functions can be tasks, their context, parameters and result.

Plain functions, used when a task is declared (`require_function`, `check_parameters`, which resolve no annotation) and
when it is first used (`shape_of`). What is refused is an `InvalidTask` that names the task and the remedy.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin

from .batch_context import BatchContext
from .codec import Limits, PayloadCodec, ResultCodec
from .context import Context
from .errors import InvalidTask

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Shape(Generic[R]):
    """What the annotations of a handler say. `returns_nothing`: of a handler of batches, whose result is no list."""

    wants_context: bool
    payload: PayloadCodec
    result: ResultCodec[R]
    returns_nothing: bool = False


def require_function(handler: object) -> types.FunctionType:
    """Return `handler` if it is a kind of function that can be a task; the cases below are refused, each by name."""
    if isinstance(handler, functools.partial):
        raise InvalidTask("a functools.partial cannot be a task: it has no name; write a function around it")
    if isinstance(handler, type):
        raise InvalidTask(f"class {handler.__qualname__} cannot be a task; write a function")
    if isinstance(handler, types.MethodType):
        raise InvalidTask(f"method {handler.__qualname__} cannot be a task; write a function at module level")
    if not isinstance(handler, types.FunctionType):
        raise InvalidTask(f"an object of type {type(handler).__qualname__} cannot be a task; write a function with def")
    name = handler.__qualname__
    if handler.__name__ == "<lambda>":
        raise InvalidTask("a lambda cannot be a task: it has no name and no annotations; write a function with def")
    if inspect.isasyncgenfunction(handler) or inspect.isgeneratorfunction(handler):
        raise InvalidTask(f"{name} is a generator function (it has a yield) and cannot be a task; return a list")
    if inspect.iscoroutinefunction(inspect.unwrap(handler)) and not inspect.iscoroutinefunction(handler):
        raise InvalidTask(f"{name} is a coroutine function behind a decorator that is not; make its wrapper async def")
    return handler


def check_parameters(task: str, function: types.FunctionType, context: str = "Context") -> None:
    """The checks that need no resolved annotation, made at declaration. `context`: the class of its context."""
    parameters = list(inspect.signature(function).parameters.values())
    for position, parameter in enumerate(parameters):
        bare = parameter.annotation is inspect.Parameter.empty
        if bare and parameter.name in ("ctx", "context"):
            raise InvalidTask(
                f"parameter {parameter.name!r} of task {task!r} has no annotation; "
                f"write `{parameter.name}: {context}` (from pgconductor import {context}), or rename it"
            )
        if bare and position == 0 and parameter.name in ("self", "cls"):
            raise InvalidTask(
                f"task {task!r} is a method (its first parameter is {parameter.name!r}); write a function"
            )
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise InvalidTask(
                f"task {task!r} takes *{parameter.name}, but a payload is an object of named parameters; take a list"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY and position > 0:
            raise InvalidTask(
                f"parameter {parameter.name!r} of task {task!r} is positional-only, but arguments are passed by name; "
                f"move it behind the `/`"
            )


def shape_of(task: str, handler: Callable[..., Any], limits: Limits) -> Shape[Any]:
    """Return what the annotations say; raises `InvalidTask` for what they must not."""
    hints = resolved_hints(task, handler)
    parameters = list(inspect.signature(handler).parameters.values())
    first = parameters[0] if parameters else None
    wants_context = first is not None and is_annotated(hints.get(first.name), Context)
    reserved: tuple[str, ...] = ()
    if first is not None:
        if wants_context:
            if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
                raise InvalidTask(
                    f"parameter {first.name!r} of task {task!r} is the context and must be an ordinary first parameter"
                )
            parameters = parameters[1:]
            reserved = (first.name,)
        elif first.kind is first.POSITIONAL_ONLY:
            raise InvalidTask(
                f"parameter {first.name!r} of task {task!r} is positional-only, but arguments are passed by name; "
                f"move it behind the `/`"
            )
        elif first.kind is first.POSITIONAL_OR_KEYWORD and hints.get(first.name) in (Any, object):
            raise InvalidTask(
                f"the first parameter {first.name!r} of task {task!r} is annotated Any or object, which type checkers "
                f"take for the context; make it keyword-only: `*, {first.name}: ...`"
            )
    kinds: dict[str, Any] = {}
    extra: Any = None
    for parameter in parameters:
        kind = hints.get(parameter.name, Any)
        if mentions(kind, BatchContext):
            raise InvalidTask(
                f"parameter {parameter.name!r} of task {task!r} is annotated BatchContext, which is for a handler of "
                f"batches; write `{parameter.name}: Context`, or declare it with @conductor.batch_task(size=...)"
            )
        if mentions(kind, Context):
            raise InvalidTask(
                f"parameter {parameter.name!r} of task {task!r} is annotated with Context; "
                f"the context must be the first parameter, annotated `Context` and nothing else"
            )
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = kind
            if get_origin(kind) is typing.Unpack:
                raise InvalidTask(f"task {task!r} takes **{parameter.name}: Unpack[...]; name the parameters instead")
        else:
            kinds[parameter.name] = kind
    returns = hints.get("return", Any)
    check_awaitable(task, handler, returns)
    return Shape(
        wants_context=wants_context,
        payload=PayloadCodec(
            task,
            kinds,
            optional=[p.name for p in parameters if p.name in kinds and p.default is not p.empty],
            positional=[p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD],
            extra=extra,
            reserved=reserved,
            limits=limits,
        ),
        result=ResultCodec(task, Any if returns in (NoReturn, typing.Never) else returns, limits=limits),
    )


_AWAITABLES = (Coroutine, Awaitable)


def check_awaitable(task: str, handler: Callable[..., Any], returns: Any) -> None:
    """Raise `InvalidTask` if a plain ``def`` is annotated to return what would have to be awaited."""
    if not inspect.iscoroutinefunction(handler) and get_origin(returns) in _AWAITABLES:
        raise InvalidTask(f"task {task!r} is a plain def that returns an awaitable; write it as async def")


def resolved_hints(task: str, handler: Callable[..., Any]) -> dict[str, Any]:
    """The annotations by name, resolved; raises `InvalidTask` if one cannot be."""
    try:
        return typing.get_type_hints(handler, include_extras=True)
    except NameError as error:
        raise InvalidTask(
            f"an annotation of task {task!r} cannot be resolved: {error}; the name must exist at run time in the "
            f"module of {handler.__qualname__} (not only under `if TYPE_CHECKING`, and not inside a function)"
        ) from error
    except (TypeError, SyntaxError, AttributeError) as error:
        raise InvalidTask(f"an annotation of task {task!r} cannot be resolved: {error}") from error


def is_annotated(hint: Any, kind: type[Any]) -> bool:
    """Whether a parameter's annotation is this class and nothing else."""
    return bare(hint) is kind


def bare(hint: Any) -> Any:
    """The annotation without what `Annotated` adds to it."""
    return get_args(hint)[0] if get_origin(hint) is typing.Annotated else hint


def mentions(hint: Any, kind: type[Any]) -> bool:
    """Whether the class is somewhere in the annotation."""
    return hint is kind or any(mentions(part, kind) for part in get_args(hint))
