"""How much to claim and whether to linger: properties that hold whatever was measured."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgconductor.runtime.pace import Backing, Deference, Linger, Prefetch

WAITS = st.floats(min_value=0.0, max_value=10.0)
CLAIMS = st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 3000), st.booleans(), WAITS), max_size=60)
GAPS = st.floats(min_value=1e-4, max_value=5.0)


@given(CLAIMS, st.integers(8, 3000))
def test_stock_stays_within_its_bounds(claims: list[tuple[int, int, bool, float]], maximum: int) -> None:
    """What is held is bounded, or memory is not."""
    prefetch = Prefetch(maximum=maximum)
    for asked, got, ran_dry, waited in claims:
        prefetch.note_start(waited)
        prefetch.note_claim(asked=asked, got=min(asked, got), ran_dry=ran_dry)
        assert 0 <= prefetch.size <= maximum


def test_stock_grows_while_runners_run_dry_and_claims_come_back_full() -> None:
    """Fast executions would wait for a round trip each otherwise."""
    prefetch = Prefetch(maximum=100)
    sizes: list[int] = []
    for _ in range(6):
        prefetch.note_claim(asked=10, got=10, ran_dry=True)
        sizes.append(prefetch.size)
    assert sizes == [8, 16, 32, 64, 100, 100]


@given(st.integers(0, 3000), st.integers(1, 1000), st.integers(0, 999))
def test_stock_does_not_grow_when_the_queue_had_no_more_or_nobody_waited(size: int, asked: int, less: int) -> None:
    """A stock that grows on an empty queue would take work from idle processes when it comes."""
    for got, ran_dry in ((max(0, asked - 1 - less), True), (asked, False)):
        prefetch = Prefetch(maximum=3000, size=size)
        prefetch.note_claim(asked=asked, got=got, ran_dry=ran_dry)
        assert prefetch.size == size


@given(st.integers(1, 2000), st.lists(WAITS, max_size=10), st.floats(min_value=0.101, max_value=10.0))
def test_stock_shrinks_when_one_execution_had_to_wait(size: int, waits: list[float], long_wait: float) -> None:
    """The worst wait counts, not the last: a short execution must not wait behind a long one."""
    prefetch = Prefetch(size=size)
    for waited in (long_wait, *waits):
        prefetch.note_start(waited)
    prefetch.note_claim(asked=10, got=10, ran_dry=True)
    assert prefetch.size == size // 2
    prefetch.note_claim(asked=10, got=10, ran_dry=False)
    assert prefetch.size == size // 2, "one long wait halves once"


def test_nothing_is_stocked_after_the_stock_had_to_go_back() -> None:
    """The executions before it take long: the next claim must take free runners' worth only."""
    prefetch = Prefetch(size=64)
    prefetch.note_stuck()
    assert prefetch.size == 0


@given(st.lists(st.tuples(GAPS, st.integers(0, 1000)), max_size=60), st.floats(min_value=0.0, max_value=1e6))
def test_lingering_follows_the_rate_with_hysteresis(arrivals: list[tuple[float, int]], start: float) -> None:
    """On at `begin`, off below `end`, and in between as it was."""
    linger = Linger()
    now = start
    for gap, count in arrivals:
        now += gap
        before = linger.is_lingering
        linger.note_arrivals(now, count)
        assert linger.rate >= 0.0
        if linger.rate >= linger.begin:
            assert linger.is_lingering
        elif linger.rate < linger.end:
            assert not linger.is_lingering
        else:
            assert linger.is_lingering == before


@given(st.floats(min_value=0.1, max_value=60.0), st.integers(2, 200))
def test_single_inserts_far_apart_never_make_a_worker_linger(gap: float, times: int) -> None:
    """Lingering would double the latency of each."""
    linger = Linger()
    for n in range(times):
        linger.note_arrivals(n * gap, 1)
        assert not linger.is_lingering


@settings(deadline=None)  # a loaded machine
@given(st.floats(min_value=400.0, max_value=100_000.0), st.integers(1, 50))
def test_steady_load_makes_a_worker_linger_whatever_the_size_of_its_claims(rate: float, size: int) -> None:
    """The rate decides, not how the arrivals are spread over claims."""
    linger = Linger()
    now = 0.0
    while now < 2.0:
        now += size / rate
        linger.note_arrivals(now, size)
    assert linger.is_lingering
    assert abs(linger.rate - rate) <= 0.5 * rate + size / linger.memory


@given(st.integers(1, 100_000))
def test_lingering_ends_when_the_load_does(count: int) -> None:
    """Empty claims count too: time passes without arrivals."""
    linger = Linger()
    linger.note_arrivals(0.0, count)
    linger.note_arrivals(10.0, 0)
    assert not linger.is_lingering


def test_the_looks_of_a_spell_become_rarer_and_end() -> None:
    """A spell that did not end would poll for ever; one at a fixed short distance would drown the server."""
    looks = list(Linger().intervals())
    assert abs(sum(looks) - Linger().period) < 1e-9
    assert looks[:-1] == sorted(looks[:-1])
    assert max(looks) <= Linger().longest_interval


@pytest.mark.parametrize("took", [0.006, 0.012, 1.0])
def test_looks_that_take_long_are_few(took: float) -> None:
    """Ten workers that have run out of work would keep the server from ending what there is."""
    looks = list(Linger().intervals(lambda: took))
    assert abs(sum(looks) - Linger().period) < 1e-9
    assert all(look >= 2 * took for look in looks[:-1])


def test_who_came_too_late_lets_others_go_first_and_who_was_served_does_not() -> None:
    """Ten workers would claim at the same instant for ever, or the only one that is free would always wait."""
    deference = Deference(shortest=0.001, longest=0.01)
    assert deference.delay == 0.0
    waits: list[float] = []
    for _ in range(6):
        deference.note_claim(0)
        waits.append(deference.delay)
    assert waits == [0.001, 0.002, 0.004, 0.008, 0.01, 0.01]
    while deference.delay:
        before = deference.delay
        deference.note_claim(1)
        assert deference.delay <= before / 2


def test_many_producers_that_begin_at_once_are_a_busy_queue_at_once() -> None:
    """Sleepers leave their flags up for 25 notifications more, and each is a lock on the database."""
    linger = Linger()
    linger.note_arrivals(0.0, 1)
    assert not linger.is_lingering
    linger.note_arrivals(0.01, 4)
    assert linger.is_lingering


def test_few_at_once_after_a_pause_are_not_a_busy_queue() -> None:
    """Somebody who inserts five every second would have workers linger for each."""
    linger = Linger()
    for second in range(3):
        linger.note_arrivals(float(second), 5)
        assert not linger.is_lingering
        linger.note_arrivals(second + 0.01, 3)
        assert not linger.is_lingering


# --- Backing ---


def test_naps_behind_a_lookout_that_hangs_become_shorter() -> None:
    """Each execution would wait for a quarter of a second, for as long as it hangs."""
    backing = Backing()
    naps: list[float] = []
    for _ in range(8):
        naps.append(backing.nap)
        backing.note_claim(0.1)
    assert naps[:3] == [0.25, 0.125, 0.0625]
    assert naps[-1] == backing.shortest


def test_naps_behind_a_lookout_that_looks_are_long() -> None:
    """Whoever finds by chance what the lookout was about to take would begin to look as often as that."""
    backing = Backing(nap=0.005)
    for waited in (0.0, 0.002, 0.019, 0.0, 0.01, 0.0):
        backing.note_claim(waited)
    assert backing.nap == backing.longest
