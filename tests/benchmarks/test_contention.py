"""What `contention` concludes from its figures, and how it spreads processes over queues."""

from __future__ import annotations

import psycopg
import pytest

from benchmarks.contention import Cell, SkipSampler, findings, serving
from benchmarks.harness import Bench


def _cells(rates: dict[tuple[int, int], float], busy: float | None = 0.5) -> list[Cell]:
    return [Cell(workers, queues, rate, busy) for (workers, queues), rate in rates.items()]


def test_a_queue_that_gains_nothing_above_four_workers_is_to_be_split() -> None:
    """The advice that users run this for."""
    rates = {(1, 1): 10.0, (4, 1): 20.0, (10, 1): 19.0, (1, 4): 10.0, (4, 4): 20.0, (10, 4): 26.6}
    assert findings("no-op", _cells(rates)) == [
        "no-op, 1 queue: above 4 processes it gains nothing (20/s, 0.95 × of that with 10)",
        "no-op, 4 queues: 10 processes do 2.7 × of 1 process (27/s); more may gain more",
        "no-op: with 10 processes, 4 queues give 1.40 × of 1 queue: split it",
    ]


def test_splitting_is_not_advised_where_fewer_processes_do_as_well() -> None:
    """Ten processes that trample on one queue look worse than on four; two on one queue are the cheaper remedy."""
    rates = {(2, 1): 20.0, (10, 1): 10.0, (2, 4): 20.0, (10, 4): 20.0}
    said = findings("no-op", _cells(rates))
    assert said[0] == "no-op, 1 queue: above 2 processes it gains nothing (20/s, 0.50 × of that with 10)"
    assert said[-1] == (
        "no-op: with 10 processes, 4 queues give 2.00 × of 1 queue, but no more than 1 queue with 2 processes: "
        "use fewer processes"
    )


@pytest.mark.parametrize(
    ("split", "verdict"),
    [(21.0, "1.05 × of 1 queue: splitting gains nothing"), (9.0, "0.45 × of 1 queue: splitting costs")],
)
def test_what_splitting_does_not_gain_is_said(split: float, verdict: str) -> None:
    """Advice that always says split is none."""
    assert (
        findings("no-op", _cells({(2, 1): 20.0, (2, 4): split}))[-1]
        == f"no-op: with 2 processes, 4 queues give {verdict}"
    )


def test_full_cpus_are_named_as_what_limits() -> None:
    """On a machine that is full, neither processes nor queues are the remedy, whatever the rates say."""
    cells = [Cell(1, 1, 10.0, 0.6), Cell(2, 1, 15.0, 0.95), Cell(4, 1, 15.0, 0.99)]
    said = findings("10 ms", cells)
    assert said[0] == "10 ms, 1 queue: above 2 processes it gains nothing (15/s, 1.00 × of that with 4)"
    assert said[-1].startswith("10 ms: the CPUs of this machine were full with 2 processes: ")
    assert not any("full" in text for text in findings("10 ms", _cells({(1, 1): 10.0, (2, 1): 20.0}, busy=None)))


def test_cpus_that_others_used_are_not_taken_for_a_limit() -> None:
    """On a machine that does other things, `full` would be a verdict on those."""
    said = findings("no-op", [Cell(1, 1, 10.0, 0.99, others=0.1), Cell(2, 1, 15.0, 1.0, others=0.5)])
    assert "full with 1 process:" in said[-2]
    assert said[-1].startswith("no-op: in 1 of 2 cells something else used 40% of this machine's CPUs or more")
    assert "something else" in findings("no-op", [Cell(1, 1, 10.0, 1.0, others=0.5)])[-1]


def test_a_dip_in_the_middle_does_not_end_the_search() -> None:
    """A noisy cell in the middle would otherwise hide that more processes help."""
    said = findings("x", _cells({(1, 1): 10.0, (2, 1): 9.0, (4, 1): 30.0}))
    assert said == ["x, 1 queue: 4 processes do 3.0 × of 1 process (30/s); more may gain more"]


def test_processes_are_spread_evenly_and_every_queue_is_served() -> None:
    """A queue that nobody serves never drains; one that is served twice as much is not what is compared."""
    assert serving(1, 4) == [[0, 1, 2, 3]]
    assert serving(4, 10) == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert serving(4, 4) == [[0], [1], [2], [3]]
    assert serving(10, 4) == [[0], [1], [2], [3]] * 2 + [[0], [1]]


def test_rows_that_a_transaction_has_locked_are_what_a_claim_skips(bench: Bench) -> None:
    """A count that took every row ever locked, or none, would say nothing about claims in flight."""
    with bench.database() as database, psycopg.connect(database.dsn) as claim:
        number = database.register_queue("q")
        database.invoke_many("noop", 10, "q")
        claim.execute(
            f"select from pgconductor._private_queue_{number} where state = 'ready' limit 3 for update".encode()
        )
        skipped = SkipSampler(database, [number], interval=0.001)
        with skipped.sampler:
            while skipped.samples < 3:
                pass
        assert skipped.average() == 3
