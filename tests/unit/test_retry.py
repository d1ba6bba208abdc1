"""Back-off and the decision to try again: pure, so every claim is checked over its whole range."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgconductor.errors import InvalidOption
from pgconductor.options import MAX_DELAY
from pgconductor.retry import DEFAULT_BACKOFF, Exponential, decide


@dataclass
class Fixed:
    """A back-off as a user may write it."""

    answer: Any

    def delay(self, attempt: int, rng: random.Random) -> float:
        return self.answer  # type: ignore[no-any-return]


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
    rng = random.Random(0)
    assert decide(1, 3, DEFAULT_BACKOFF, rng) is not None
    assert decide(2, 3, DEFAULT_BACKOFF, rng) is not None
    assert decide(3, 3, DEFAULT_BACKOFF, rng) is None
    assert decide(4, 3, DEFAULT_BACKOFF, rng) is None
    assert decide(1, 1, DEFAULT_BACKOFF, rng) is None


def test_an_immediate_retry_differs_from_giving_up() -> None:
    """A delay of 0 would be taken for None by whoever tests its truth."""
    assert decide(1, 2, Exponential(initial=0.0), random.Random(0)) == 0.0
    assert decide(9_999, 10_000, Exponential(initial=0.0), random.Random(0)) == 0.0


@pytest.mark.parametrize("answer", [-1.0, math.nan, math.inf, MAX_DELAY * 2, 10**400, None, "1", True])
def test_a_bad_delay_of_a_users_backoff_is_refused(answer: object) -> None:
    """It would reach SQL and fail the whole flush it is in."""
    with pytest.raises(InvalidOption, match=r"Fixed\.delay\(\) returned"):
        decide(1, 2, Fixed(answer), random.Random(0))


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
