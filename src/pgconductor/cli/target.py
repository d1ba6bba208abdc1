"""The program that `pgconductor run` runs, or `replay-check` tries: finds it by name.

Imports the user's module, so whatever its top level does happens here. It must not start anything.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType

from ..collector import tune_garbage_collector
from ..conductor import Conductor
from ..errors import Misuse
from ..runtime.orchestrator import Orchestrator

_FORM = "write module:attribute, for example app:orchestrator"


class Life:
    """Whether an orchestrator has started: what its `run` takes as `task_status`."""

    def __init__(self) -> None:
        self._has_started = False

    def started(self, value: None = None) -> None:
        """Called by `run` when all workers claim."""
        self._has_started = True
        tune_garbage_collector()  # the process is this worker's

    def has_started(self) -> bool:
        """Whether it was called."""
        return self._has_started


def load_orchestrator(target: str, *, debug: bool = False) -> Orchestrator:
    """Import the module that `target` ("module:attribute") names and return its orchestrator.

    The current folder comes first on the path. The attribute, which may be dotted, is an `Orchestrator` or a callable
    without arguments that returns one. `debug`: let errors of the module's own code pass as they are. Raises `Misuse`.
    """
    found = _load(target, (Orchestrator,), debug)
    assert isinstance(found, Orchestrator)
    return found


def load_conductor(target: str, *, debug: bool = False) -> Conductor:
    """The same for a conductor; of an orchestrator its own."""
    found = _load(target, (Conductor, Orchestrator), debug)
    if isinstance(found, Orchestrator):
        return found.conductor
    assert isinstance(found, Conductor)
    return found


def _load(target: str, kinds: tuple[type[object], ...], debug: bool) -> object:
    kind = kinds[0].__name__
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise Misuse(f"{target!r} does not name {_a(kind)}: {_FORM}")
    if module_name.endswith(".py") or os.sep in module_name:
        raise Misuse(f"{module_name!r} is a file's name, and a module's is needed: {_FORM}")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _import(module_name, debug)
    found: object = module
    for name in path.split("."):
        if not hasattr(found, name):
            raise Misuse(f"{module_name!r} has no {path!r}; {_known(module, module_name, kinds)}")
        found = getattr(found, name)
    if not isinstance(found, kinds) and callable(found):
        found = _call(found, target, kind)
    if not isinstance(found, kinds):
        raise Misuse(f"{target!r} is a {type(found).__name__}, not {_a(kind)}; {_known(module, module_name, kinds)}")
    return found


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def _import(name: str, debug: bool) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise Misuse(
                f"there is no module {name!r} in the current folder or on the path; change to the program's folder, "
                f"or set PYTHONPATH"
            ) from None
        if debug:
            raise
        raise Misuse(f"module {name!r} needs the module {error.name!r}, which is not installed") from error
    except Exception as error:  # the top level of a user's module may raise anything
        if debug:
            raise
        raise Misuse(
            f"importing module {name!r} failed: {type(error).__name__}: {error}; --debug shows the traceback"
        ) from error


def _call(factory: Callable[..., object], target: str, kind: str) -> object:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        raise Misuse(f"{target!r} needs arguments; name {_a(kind)}, or a callable without any") from None
    except ValueError:  # a builtin that does not tell its signature
        raise Misuse(f"{target!r} is not {_a(kind)}, nor a function that returns one") from None
    if inspect.iscoroutinefunction(factory):
        raise Misuse(f"{target!r} is an async function; name {_a(kind)}, or a plain function that returns one")
    return factory()


def _known(module: ModuleType, name: str, kinds: tuple[type[object], ...]) -> str:
    kind = kinds[0].__name__
    names = [key for key, value in vars(module).items() if isinstance(value, kinds)]
    if names:
        return f"its {kind.lower()}s: {', '.join(f'{name}:{key}' for key in names)}"
    form = (
        "orchestrator = Orchestrator(conductor, workers=[...])" if kind == "Orchestrator" else "conductor = Conductor()"
    )
    return f"it has no {kind} at its top level: {form}"
