"""Runner-seconds, counted without a clock of each execution."""

from __future__ import annotations

import pytest

from pgconductor.runtime.load import Occupancy


def test_seconds_of_all_runners_are_added_up() -> None:
    """Utilisation would be above 1, or nothing."""
    occupancy = Occupancy()
    assert occupancy.seconds(100.0) == 0.0
    occupancy.enter(101.0)
    occupancy.enter(102.0)
    assert occupancy.seconds(103.0) == pytest.approx(3.0)
    occupancy.leave(104.0)
    assert occupancy.busy == 1
    assert occupancy.seconds(104.0) == pytest.approx(5.0)
    occupancy.clear(106.0)
    assert occupancy.busy == 0
    assert occupancy.seconds(1000.0) == pytest.approx(7.0)
