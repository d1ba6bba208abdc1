"""What follows a failed attempt: pure decisions about attempts, delays and deadlines.

Owns the shapes of back-off, the rule that `max_attempts` and the deadline are final, and what the exceptions mean by
which a handler decides itself (`errors.Verdict`). Knows no clock, no database and no execution: attempt numbers, an
error, the seconds that remain and a random source go in, a `Decision` comes out. The same random source gives the same
delays, so that tests and simulations repeat. Must not sleep, log or import anything of the engine.
"""

from __future__ import annotations

import inspect
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, cast

from .errors import InvalidOption, NoRetry, RetryAfter, Snooze, leaves
from .options import MAX_DELAY, checked_number, checked_seconds

_MAX_EXPONENT = 700.0  # e to this power is just within a float
_MAX_DELAYS = 10_000


class Backoff(Protocol):
    """How long to wait before the next attempt; any object with this method will do."""

    def delay(self, attempt: int, rng: random.Random) -> float | timedelta:
        """Return the wait after attempt number `attempt`, which failed: seconds from 0 to a century, or a `timedelta`.

        Attempts count from 1. Randomness must come from `rng` only.
        """
        ...


# What `backoff=` takes: a `Backoff`; seconds, as `Fixed`; several, as `Delays`; a function of the number of the attempt
# that failed and of what it raised (a group, if it raised a group).
BackoffLike: TypeAlias = (
    Backoff
    | float
    | timedelta
    | Sequence[float]
    | Sequence[timedelta]
    | Sequence[float | timedelta]
    | Callable[[int, BaseException], float | timedelta]
)


def _jittered(longest: float, jitter: float, rng: random.Random) -> float:
    return longest - longest * jitter * rng.random()


def _set_seconds(backoff: object, name: str, minimum: float = 0.0) -> float:
    """Check a duration of a frozen back-off and keep it as seconds."""
    seconds = checked_seconds(f"{type(backoff).__name__}({name}=)", getattr(backoff, name), minimum=minimum)
    object.__setattr__(backoff, name, seconds)
    return seconds


def _check_jitter(backoff: Exponential | Linear | Fixed | Delays) -> None:
    checked_number(f"{type(backoff).__name__}(jitter=)", backoff.jitter, minimum=0.0, maximum=1.0)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Wait `initial * factor ** (attempt - 1)` seconds, at most `maximum`, shortened at random by up to `jitter`.

    `initial`: seconds before the second attempt, from 0 to a century. `factor`: growth per attempt, from 1 to 1000.
    `maximum`: the longest wait in seconds, at least `initial`. `jitter`: the share of the delay that chance may take
    off, from 0 (none) to 1 (anything down to zero), so that executions that failed together do not return together.
    Durations may be given as `timedelta`. Raises `InvalidOption` for values outside these ranges.
    """

    initial: float | timedelta = 1.0
    factor: float = 2.0
    maximum: float | timedelta = 3600.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        initial = _set_seconds(self, "initial")
        checked_number("Exponential(factor=)", self.factor, minimum=1.0, maximum=1000.0)
        _set_seconds(self, "maximum", minimum=initial)
        _check_jitter(self)

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after failed attempt number `attempt` (from 1), drawn with `rng`."""
        return _jittered(self._longest(attempt), self.jitter, rng)

    def _longest(self, attempt: int) -> float:
        initial, maximum = cast(float, self.initial), cast(float, self.maximum)
        if initial <= 0.0:
            return 0.0
        growth = (attempt - 1) * math.log(self.factor)
        if growth < _MAX_EXPONENT:
            return min(maximum, initial * self.factor ** (attempt - 1))
        # The power alone would overflow, though a minute `initial` may keep the product in range.
        return min(maximum, math.exp(min(growth + math.log(initial), _MAX_EXPONENT)))


@dataclass(frozen=True, slots=True)
class Linear:
    """Wait `initial + step * (attempt - 1)` seconds, at most `maximum`, shortened at random by up to `jitter`.

    `initial`: seconds before the second attempt. `step`: seconds more for each further one. `maximum`: the longest
    wait, at least `initial`. All from 0 to a century, or `timedelta`. `jitter` as in `Exponential`. Raises
    `InvalidOption` for values outside these ranges.
    """

    initial: float | timedelta = 10.0
    step: float | timedelta = 10.0
    maximum: float | timedelta = 3600.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        initial = _set_seconds(self, "initial")
        _set_seconds(self, "step")
        _set_seconds(self, "maximum", minimum=initial)
        _check_jitter(self)

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after failed attempt number `attempt` (from 1), drawn with `rng`."""
        initial, step, maximum = cast(float, self.initial), cast(float, self.step), cast(float, self.maximum)
        return _jittered(min(maximum, initial + step * (attempt - 1)), self.jitter, rng)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Wait `seconds` each time, shortened at random by up to `jitter`; ``backoff=5.0`` means ``Fixed(5.0)``.

    `seconds`: from 0 to a century, or a `timedelta`. `jitter` as in `Exponential`, but none by default. Raises
    `InvalidOption` for values outside these ranges.
    """

    seconds: float | timedelta
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _set_seconds(self, "seconds")
        _check_jitter(self)

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after any failed attempt, drawn with `rng`."""
        return _jittered(cast(float, self.seconds), self.jitter, rng)


@dataclass(frozen=True, slots=True)
class Delays:
    """Wait as long as a list says, the last entry again and again; ``backoff=[1, 9]`` means ``Delays([1, 9])``.

    `seconds`: 1 to 10,000 waits in the order of the attempts, each from 0 to a century, or a `timedelta`. `jitter` as
    in `Exponential`, but none by default. Raises `InvalidOption` for values outside these ranges.
    """

    seconds: Sequence[float | timedelta]
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.seconds, (str, bytes)) or not isinstance(cast(object, self.seconds), Sequence):
            raise InvalidOption(f"Delays(seconds=) must be a list of seconds, not {type(self.seconds).__name__}")
        if not 0 < len(self.seconds) <= _MAX_DELAYS:
            raise InvalidOption(f"Delays(seconds=) must have 1 to {_MAX_DELAYS:,} entries, not {len(self.seconds):,}")
        waits = tuple(
            checked_seconds(f"entry {number} of Delays(seconds=)", wait)
            for number, wait in enumerate(self.seconds, start=1)
        )
        object.__setattr__(self, "seconds", waits)  # one's own copy, which nobody changes
        _check_jitter(self)

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after failed attempt number `attempt` (from 1), drawn with `rng`."""
        waits = cast("tuple[float, ...]", self.seconds)
        return _jittered(waits[min(attempt, len(waits)) - 1], self.jitter, rng)


@dataclass(frozen=True, slots=True)
class _Computed:
    """A function given as `backoff=`: it sees the error, which the others do not need."""

    function: Callable[[int, BaseException], float | timedelta]

    def delay(self, attempt: int, rng: random.Random) -> float:
        """As without an error."""
        return self.delay_after(attempt, Exception())

    def delay_after(self, attempt: int, error: BaseException) -> float:
        """Return what the function answers. Raises `InvalidOption` if that is no delay, and what it raises itself."""
        name = getattr(self.function, "__qualname__", None) or type(self.function).__qualname__
        return checked_seconds(f"the delay that {name}() returned", self.function(attempt, error))


DEFAULT_BACKOFF = Exponential()


def checked_backoff(what: str, value: object) -> Backoff:
    """Return the `Backoff` that `value`, given as `backoff=`, stands for; see `BackoffLike`.

    `what` names it in the message of `InvalidOption`, which is raised for anything else.
    """
    if isinstance(value, type):
        raise InvalidOption(f"{what} is the class {value.__name__}; give an object of it: {value.__name__}(...)")
    if callable(getattr(value, "delay", None)):
        return cast(Backoff, value)
    try:
        if isinstance(value, (int, float, timedelta)) and not isinstance(value, bool):
            return Fixed(value)
        if isinstance(value, (list, tuple)):
            return Delays(cast("Sequence[float | timedelta]", value))
    except InvalidOption as error:
        raise InvalidOption(f"{what}: {error}") from None
    if inspect.iscoroutinefunction(value):
        raise InvalidOption(f"{what} is an async function; the wait is computed without waiting, so write a plain def")
    if callable(value):
        return _Computed(cast("Callable[[int, BaseException], float | timedelta]", value))
    raise InvalidOption(
        f"{what} must be seconds, a list of seconds, a function (attempt, error) -> seconds, or have a method "
        f"delay(attempt, rng), as Exponential(initial=1.0) has; {type(value).__name__} is none of these"
    )


_KINDS: Final[Mapping[str, type[Exponential | Linear | Fixed | Delays]]] = {
    "exponential": Exponential,
    "linear": Linear,
    "fixed": Fixed,
    "delays": Delays,
}
_MAX_DATA_BYTES: Final = 4096


def backoff_as_data(what: str, value: object) -> dict[str, object]:
    """Return a back-off as the JSON object that is stored with an invocation, for whichever worker will need it.

    `value`: as for `checked_backoff`, but a function, or an object of one's own, cannot be stored. `what` names it in
    the message of `InvalidOption`.
    """
    backoff = checked_backoff(what, value)
    for kind, shape in _KINDS.items():
        if type(backoff) is shape:
            data: dict[str, object] = {"kind": kind}
            data.update({field.name: getattr(backoff, field.name) for field in fields(shape)})
            if len(json.dumps(data)) > _MAX_DATA_BYTES:
                raise InvalidOption(f"{what} is longer than {_MAX_DATA_BYTES:,} bytes as JSON; give fewer delays")
            return data
    raise InvalidOption(
        f"{what} must be data, since another process may use it: seconds, a list of seconds, Exponential, Linear, "
        f"Fixed or Delays; a function is for the task"
    )


@lru_cache(maxsize=256)
def backoff_from_data(text: str) -> Backoff:
    """Return what `backoff_as_data` stored, from its JSON text. Raises `InvalidOption` for anything else."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise InvalidOption("the invocation's backoff is not a JSON object")
    given = cast("dict[str, Any]", data)
    shape = _KINDS.get(str(given.pop("kind", None)))
    if shape is None:
        raise InvalidOption(f"the invocation's backoff must have a kind, one of {', '.join(_KINDS)}")
    try:
        return shape(**given)
    except TypeError as error:
        raise InvalidOption(f"the invocation's backoff does not fit its kind: {error}") from None


# --- the decision ----------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    """What follows an attempt that did not complete. `kind` is that of the outcome.

    `why`: ``error`` (the attempts decided), ``deadline`` (there was no time for another), or ``verdict`` (the handler
    said so). `delay`: seconds until the next, for all but ``failed``; for a failure by the deadline, the delay there
    would have been. `verdict`: what the handler said, if it did.
    """

    kind: Literal["retried", "failed", "released"]
    why: Literal["error", "deadline", "verdict"]
    delay: float = 0.0
    verdict: NoRetry | RetryAfter | Snooze | None = None


def decide(
    attempt: int,
    max_attempts: int,
    backoff: Backoff,
    rng: random.Random,
    error: BaseException,
    deadline_in: float | None = None,
) -> Decision:
    """Return what follows attempt number `attempt` (from 1), which raised `error`.

    `deadline_in`: seconds until the execution's deadline, None for none; what would begin then or later fails at once.
    Raises `InvalidOption` when a user's `backoff` answers with something that is not a finite number of seconds from 0
    to a century, and lets pass what it raises itself.
    """
    verdict = verdict_in(error)
    if isinstance(verdict, NoRetry):
        return Decision("failed", "verdict", verdict=verdict)
    if isinstance(verdict, Snooze):
        delay = checked_seconds("the delay of Snooze", verdict.delay)
        kind: Literal["retried", "released"] = "released"
    elif attempt >= max_attempts:
        return Decision("failed", "error", verdict=verdict)
    elif isinstance(verdict, RetryAfter):
        delay = checked_seconds("the delay of RetryAfter", verdict.delay)
        kind = "retried"
    else:
        delay = _asked(backoff, attempt, rng, error)
        kind = "retried"
    if deadline_in is not None and delay >= deadline_in:
        return Decision("failed", "deadline", delay, verdict)
    return Decision(kind, "error" if verdict is None else "verdict", delay, verdict)


def verdict_in(error: BaseException) -> NoRetry | RetryAfter | Snooze | None:
    """Return what the handler said by `error`, or by the exceptions of the group that it is; None if nothing.

    `NoRetry` comes before `RetryAfter`, of which the longest counts, as of `Snooze`, which counts only if there is
    nothing else in the group. Causes and contexts are not searched.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, (NoRetry, RetryAfter, Snooze)) else None
    retry: RetryAfter | None = None
    snooze: Snooze | None = None
    only_snoozed = True
    for leaf in leaves(cast("BaseExceptionGroup[BaseException]", error)):
        if isinstance(leaf, NoRetry):
            return leaf
        if isinstance(leaf, RetryAfter):
            retry = leaf if retry is None or leaf.delay > retry.delay else retry
        if isinstance(leaf, Snooze):
            snooze = leaf if snooze is None or leaf.delay > snooze.delay else snooze
        else:
            only_snoozed = False
    return retry or (snooze if only_snoozed else None)


def _asked(backoff: Backoff, attempt: int, rng: random.Random, error: BaseException) -> float:
    if isinstance(backoff, _Computed):
        return backoff.delay_after(attempt, error)
    return checked_seconds(
        f"the delay that {type(backoff).__name__}.delay() returned", backoff.delay(attempt, rng), maximum=MAX_DELAY
    )
