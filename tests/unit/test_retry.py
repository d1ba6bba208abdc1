"""Back-off and the decision to try again: pure, so every claim is checked over its whole range."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgconductor.errors import InvalidOption, NoRetry, RetryAfter, Snooze
from pgconductor.options import MAX_DELAY
from pgconductor.retry import (
    DEFAULT_BACKOFF,
    Backoff,
    Decision,
    Delays,
    Exponential,
    Fixed,
    Linear,
    backoff_as_data,
    backoff_from_data,
    checked_backoff,
    decide,
    verdict_in,
)


@dataclass
class Answering:
    """A back-off as a user may write it."""

    answer: Any

    def delay(self, attempt: int, rng: random.Random) -> float:
        return self.answer  # type: ignore[no-any-return]


ERROR = ValueError("bad")


def delay_after(attempt: int, max_attempts: int, backoff: Backoff, deadline_in: float | None = None) -> float | None:
    """The delay until the next attempt, None if there is none."""
    decision = decide(attempt, max_attempts, backoff, random.Random(0), ERROR, deadline_in)
    return decision.delay if decision.kind == "retried" else None


def test_delays_grow_by_the_factor_up_to_the_maximum() -> None:
    """Retries would come at a constant rate, or ever later without end."""
    backoff = Exponential(initial=1.0, factor=2.0, maximum=10.0, jitter=0.0)
    delays = [backoff.delay(attempt, random.Random(0)) for attempt in range(1, 7)]
    assert delays == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


@given(
    initial=st.floats(0, 1e6),
    factor=st.floats(1, 1000),
    above=st.floats(0, 1e8),
    jitter=st.floats(0, 1),
    attempt=st.integers(1, 10_000),
    seed=st.integers(),
)
def test_every_delay_lies_within_its_jitter_and_maximum(
    initial: float, factor: float, above: float, jitter: float, attempt: int, seed: int
) -> None:
    """A large attempt number would overflow, or a delay would be negative, infinite or beyond the maximum."""
    backoff = Exponential(initial=initial, factor=factor, maximum=initial + above, jitter=jitter)
    longest = Exponential(initial=initial, factor=factor, maximum=initial + above, jitter=0.0).delay(
        attempt, random.Random(0)
    )
    delay = backoff.delay(attempt, random.Random(seed))
    assert math.isfinite(delay)
    assert longest * (1 - jitter) <= delay * (1 + 1e-9) + 1e-9
    assert 0 <= delay <= longest <= initial + above


def test_a_minute_start_grows_without_overflow() -> None:
    """The power overflows a float although the delay itself is small."""
    backoff = Exponential(initial=1e-300, factor=32.0, maximum=1e9, jitter=0.0)
    assert backoff.delay(201, random.Random(0)) == pytest.approx(1e-300 * 32.0**100 * 32.0**100)
    assert backoff.delay(10_000, random.Random(0)) == 1e9


def test_delays_never_shrink_as_attempts_go_on() -> None:
    """The cross-over from the power to the maximum would dip."""
    backoff = Exponential(initial=0.3, factor=1.7, maximum=1234.5, jitter=0.0)
    delays = [backoff.delay(attempt, random.Random(0)) for attempt in range(1, 200)]
    assert delays == sorted(delays)
    assert delays[-1] == 1234.5


def test_jitter_spreads_executions_that_failed_together() -> None:
    """A thousand executions that failed at once would return at once."""
    rng = random.Random(1)
    delays = {DEFAULT_BACKOFF.delay(5, rng) for _ in range(100)}
    assert len(delays) == 100
    assert max(delays) - min(delays) > 4.0  # of 8 to 16 seconds


def test_the_same_seed_gives_the_same_delays() -> None:
    """Simulations could not be repeated if a hidden source of chance were used."""
    first = [DEFAULT_BACKOFF.delay(n, random.Random(7)) for n in range(1, 20)]
    assert first == [DEFAULT_BACKOFF.delay(n, random.Random(7)) for n in range(1, 20)]


def test_the_last_attempt_is_not_followed_by_another() -> None:
    """max_attempts would be one too many or too few."""
    assert delay_after(1, 3, DEFAULT_BACKOFF) is not None
    assert delay_after(2, 3, DEFAULT_BACKOFF) is not None
    assert delay_after(3, 3, DEFAULT_BACKOFF) is None
    assert delay_after(4, 3, DEFAULT_BACKOFF) is None
    assert delay_after(1, 1, DEFAULT_BACKOFF) is None


def test_an_immediate_retry_differs_from_giving_up() -> None:
    """A delay of 0 would be taken for None by whoever tests its truth."""
    assert delay_after(1, 2, Exponential(initial=0.0)) == 0.0
    assert delay_after(9_999, 10_000, Exponential(initial=0.0)) == 0.0


@pytest.mark.parametrize("answer", [-1.0, math.nan, math.inf, MAX_DELAY * 2, 10**400, None, "1", True])
def test_a_bad_delay_of_a_users_backoff_is_refused(answer: object) -> None:
    """It would reach SQL and fail the whole flush it is in."""
    with pytest.raises(InvalidOption, match=r"Answering\.delay\(\) returned"):
        delay_after(1, 2, Answering(answer))

    def wait(attempt: int, error: BaseException) -> object:
        return answer

    with pytest.raises(InvalidOption, match=r"wait\(\) returned"):
        delay_after(1, 2, checked_backoff("backoff", wait))


@pytest.mark.parametrize(
    "options",
    [
        {"initial": -1.0},
        {"initial": math.nan},
        {"initial": math.inf},
        {"initial": "1"},
        {"initial": 2.0, "maximum": 1.0},
        {"maximum": math.inf},
        {"maximum": MAX_DELAY * 2},
        {"factor": 0.5},
        {"factor": math.nan},
        {"factor": 1001},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": math.nan},
        {"jitter": True},
    ],
)
def test_a_backoff_out_of_range_is_refused_with_its_name(options: dict[str, Any]) -> None:
    """The mistake would show at the first failure, in production, instead of at import."""
    with pytest.raises(InvalidOption, match=r"Exponential\((initial|factor|maximum|jitter)=\)"):
        Exponential(**options)


# --- the other shapes ------------------------------------------------------------------------------------------------

RNG = random.Random(0)


def test_linear_delays_grow_by_the_step_up_to_the_maximum() -> None:
    """Retries would come at a constant rate, or beyond the longest wait."""
    backoff = Linear(initial=1.0, step=timedelta(seconds=2), maximum=6.0, jitter=0.0)
    assert [backoff.delay(attempt, RNG) for attempt in range(1, 6)] == [1.0, 3.0, 5.0, 6.0, 6.0]
    assert Linear(jitter=0.0).delay(10_000, RNG) == 3600.0


def test_a_list_of_delays_is_followed_and_its_last_entry_repeats() -> None:
    """The third attempt would come after the second's delay, or the list's end would be an error."""
    backoff = Delays((1, timedelta(seconds=10), 60.0))
    assert [backoff.delay(attempt, RNG) for attempt in (1, 2, 3, 4, 10_000)] == [1.0, 10.0, 60.0, 60.0, 60.0]


def test_a_list_of_delays_is_not_changed_from_outside() -> None:
    """A list that the program goes on using would change the back-off of a task that runs."""
    given: list[float | timedelta] = [1.0, 2.0]
    backoff = Delays(given)
    given.clear()
    assert backoff.delay(2, RNG) == 2.0
    assert hash(backoff) == hash(Delays((1.0, 2.0)))


@given(
    backoff=st.one_of(
        st.builds(Fixed, st.floats(0, 1e8), jitter=st.floats(0, 1)),
        st.builds(Delays, st.lists(st.floats(0, 1e8), min_size=1, max_size=9), jitter=st.floats(0, 1)),
        st.builds(Linear, st.floats(0, 1e8), st.floats(0, 1e8), st.floats(1e8, 2e8), st.floats(0, 1)),
    ),
    attempt=st.integers(1, 10_000),
    seed=st.integers(),
)
def test_jitter_only_shortens_and_within_its_share(backoff: Fixed | Delays | Linear, attempt: int, seed: int) -> None:
    """A delay would be longer than it says, negative, or shorter than the jitter allows."""
    longest = replace(backoff, jitter=0.0).delay(attempt, random.Random(seed))
    delay = backoff.delay(attempt, random.Random(seed))
    assert 0.0 <= delay <= longest <= MAX_DELAY
    assert delay >= longest * (1 - backoff.jitter) - 1e-6 - longest * 1e-12


def test_durations_of_every_backoff_may_be_timedeltas() -> None:
    """A timedelta that is checked and then multiplied with would fail at the first failure, in production."""
    minute = timedelta(minutes=1)
    assert Exponential(minute, 2.0, 4 * minute, 0.0).delay(2, RNG) == 120.0
    assert Exponential(minute, 2.0, 4 * minute, 0.0) == Exponential(60.0, 2.0, 240.0, 0.0)
    assert Fixed(minute).delay(5, RNG) == 60.0
    assert delay_after(1, 2, Answering(minute)) == 60.0


def test_what_is_given_as_backoff_becomes_one() -> None:
    """A number would be a fixed wait, a list the waits in order, a function would see the attempt and the error."""
    assert checked_backoff("backoff", 5) == Fixed(5.0)
    assert checked_backoff("backoff", timedelta(seconds=5)) == Fixed(5.0)
    assert checked_backoff("backoff", [1, 10, 60]) == Delays((1.0, 10.0, 60.0))
    assert checked_backoff("backoff", DEFAULT_BACKOFF) is DEFAULT_BACKOFF
    seen: list[object] = []

    def wait(attempt: int, error: BaseException) -> timedelta:
        seen.append((attempt, error))
        return timedelta(seconds=attempt)

    assert delay_after(2, 3, checked_backoff("backoff", wait)) == 2.0
    assert seen == [(2, ERROR)]


async def later(attempt: int, error: BaseException) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "from 0"),
        (math.nan, "finite"),
        (True, "must be seconds"),
        ([], "1 to 10,000 entries"),
        ([1, -1], "entry 2"),
        ([1, "2"], "entry 2"),
        ([1.0] * 10_001, "10,001"),
        ("1", "must be seconds"),
        (None, "must be seconds"),
        (Exponential, "the class Exponential"),
        (later, "async function"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_backoff_is_refused_by_name(value: object, message: str) -> None:
    """It would show at the first failure."""
    with pytest.raises(InvalidOption, match=f"^backoff of x.*{message}"):
        checked_backoff("backoff of x", value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(step=-1),
        lambda: Linear(initial=2, maximum=1),
        lambda: Linear(jitter=2),
        lambda: Fixed(-1),
        lambda: Fixed(1, jitter=-1),
        lambda: Delays(cast("Any", "123")),
        lambda: Delays([1], jitter=math.nan),
        lambda: Delays(cast("Any", 5)),
    ],
)
def test_other_backoffs_out_of_range_are_refused(make: Any) -> None:
    """The mistake would show at the first failure, in production, instead of at import."""
    with pytest.raises(InvalidOption, match=r"(Linear|Fixed|Delays)\((step|maximum|jitter|seconds)=\)"):
        make()


# --- the deadline and what a handler says ----------------------------------------------------------------------------


def test_an_attempt_that_would_begin_at_the_deadline_or_later_is_not_waited_for() -> None:
    """An execution would wait for an hour only to be failed by its deadline then."""
    rng = random.Random(0)
    assert delay_after(1, 3, Fixed(5.0), deadline_in=5.01) == 5.0
    assert decide(1, 3, Fixed(5.0), rng, ERROR, 5.0) == Decision("failed", "deadline", 5.0)
    assert decide(1, 3, Fixed(0.0), rng, ERROR, -1.0).why == "deadline"
    assert decide(3, 3, Fixed(5.0), rng, ERROR, 1.0).why == "error"  # it would not have been tried again anyway


def test_a_handler_that_says_no_retry_is_not_tried_again() -> None:
    """What cannot succeed would be tried again."""
    error = NoRetry("gone")
    assert decide(1, 3, Fixed(0.0), RNG, error) == Decision("failed", "verdict", 0.0, error)


def test_retry_after_is_exact_and_counts_as_an_attempt() -> None:
    """The server that asked for 30 s would be asked after 15, or for ever."""
    error = RetryAfter(timedelta(seconds=30))
    assert decide(1, 3, DEFAULT_BACKOFF, RNG, error) == Decision("retried", "verdict", 30.0, error)
    assert decide(3, 3, DEFAULT_BACKOFF, RNG, error).kind == "failed"
    assert decide(1, 3, DEFAULT_BACKOFF, RNG, error, 30.0).why == "deadline"


def test_a_snooze_is_no_attempt_but_ends_at_the_deadline() -> None:
    """Waiting for something outside would use up the attempts, or go on for ever."""
    error = Snooze(60)
    assert decide(3, 3, DEFAULT_BACKOFF, RNG, error) == Decision("released", "verdict", 60.0, error)
    assert decide(1, 3, DEFAULT_BACKOFF, RNG, error, 60.0).why == "deadline"


@pytest.mark.parametrize("kind", [RetryAfter, Snooze])
@pytest.mark.parametrize("delay", [-1, math.nan, math.inf, MAX_DELAY * 2, 10**400, "1", None, True, timedelta(-1)])
def test_a_bad_delay_of_a_verdict_is_refused_where_it_is_made(kind: Any, delay: Any) -> None:
    """It would reach SQL and fail the flush; refused later, the handler's line would not be told."""
    with pytest.raises(InvalidOption, match=rf"{kind.__name__}\(delay=\)"):
        kind(delay)


A, B, C = RetryAfter(1), RetryAfter(9), Snooze(5)
STOP = NoRetry("stop")


@pytest.mark.parametrize(
    ("leaves", "verdict"),
    [
        ([STOP], STOP),
        ([A, STOP, B], STOP),
        ([C, STOP], STOP),
        ([ValueError(), STOP], STOP),
        ([A, B], B),
        ([B, C, ValueError()], B),
        ([C], C),
        ([C, Snooze(1)], C),
        ([C, ValueError()], None),
        ([ValueError()], None),
    ],
)
@pytest.mark.parametrize("depth", [1, 3, 3000])
def test_in_a_group_the_gravest_verdict_wins(leaves: list[Exception], verdict: object, depth: int) -> None:
    """Nurseries wrap what a handler says; a snooze beside a failure would hide the failure."""
    group = ExceptionGroup("group", leaves)
    for _ in range(depth - 1):
        group = ExceptionGroup("outer", [group])
    assert verdict_in(group) is verdict


@given(st.permutations([A, B, C, Snooze(7), ValueError()]))
def test_the_verdict_of_a_group_does_not_depend_on_the_order(order: list[Exception]) -> None:
    """Which task of a nursery failed first is chance."""
    assert verdict_in(ExceptionGroup("group", order)) is B


def test_a_verdict_beneath_another_error_says_nothing() -> None:
    """`raise Other from error` says that the other one is what counts."""
    error = ValueError()
    error.__cause__ = STOP
    assert verdict_in(error) is None


@given(
    attempt=st.integers(1, 6),
    max_attempts=st.integers(1, 5),
    wait=st.floats(0, 100),
    error=st.sampled_from([ValueError(), STOP, A, B, C, ExceptionGroup("group", [C, ValueError()])]),
    deadline_in=st.none() | st.floats(-10, 100),
)
def test_no_decision_leads_beyond_the_attempts_or_the_deadline(
    attempt: int, max_attempts: int, wait: float, error: Exception, deadline_in: float | None
) -> None:
    """Some combination of attempts, deadline and verdict would let an execution run once more than it may."""
    decision = decide(attempt, max_attempts, Fixed(wait), random.Random(0), error, deadline_in)
    if decision.kind != "failed":
        assert deadline_in is None or decision.delay < deadline_in
        assert decision.delay == (error.delay if isinstance(error, (RetryAfter, Snooze)) else wait)
    if decision.kind == "retried":
        assert attempt < max_attempts
    assert (decision.kind == "released") <= (error is C)
    if decision.why == "deadline":
        assert deadline_in is not None
        assert decision.delay >= deadline_in
    if deadline_in is None and attempt < max_attempts:
        assert (decision.kind == "failed") == (error is STOP)


@pytest.mark.parametrize(
    "backoff", [Exponential(2, 3, 40, 0.25), Linear(1, 2, 30, 0.5), Fixed(timedelta(minutes=1)), Delays([1, 2, 3])]
)
def test_stored_backoff_is_the_one_that_was_given(backoff: Backoff) -> None:
    """An invocation waits otherwise than it was asked to."""
    assert backoff_from_data(json.dumps(backoff_as_data("backoff", backoff))) == backoff


def _after_a_second(attempt: int, error: BaseException) -> float:
    return 1.0


@pytest.mark.parametrize("unfit", [_after_a_second, Delays([1.5] * 2000), "soon"], ids=["function", "long", "text"])
def test_backoff_that_cannot_be_stored_is_refused(unfit: object) -> None:
    """It fails at the worker, or in a CHECK."""
    with pytest.raises(InvalidOption, match="the backoff"):
        backoff_as_data("the backoff", unfit)


@pytest.mark.parametrize(
    "text", ["1", "{}", '{"kind": "odd"}', '{"kind": "fixed"}', '{"kind": "fixed", "seconds": -1}']
)
def test_stored_backoff_that_is_none_is_refused(text: str) -> None:
    """SQL may send any JSON: it ends the worker."""
    with pytest.raises(InvalidOption):
        backoff_from_data(text)
