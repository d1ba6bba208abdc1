"""The judgement of a queue: one case for each verdict, and those that lie close to it. No database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from pgconductor import QueueLoad, Recommendation
from pgconductor.advice import CONTENDED, FULL, LATE, judge, judge_all

AT = datetime(2030, 1, 31, 9, tzinfo=UTC)

# Two processes of ten runners, half busy, nothing ready.
CALM = QueueLoad(
    queue="q", registered=True, at=AT, ready=0, is_ready_capped=False, oldest_ready=None, running=10, unserved=0,
    looked=0, tasks_without_worker=(), workers=2, capacity=20, reporting=2, reporting_capacity=20, seconds=5.0,
    busy=10.0, claims=100, empty_claims=50, short_claims=40, locked_claims=1, claimed=500, claim_seconds=0.5,
    claim_share=0.05, flush_share=0.05, cpu=0.3, machine_load=0.4, claimed_rate=100.0, ended_rate=100.0,
    arrivals=100.0, departures=100.0, inserted=1000, deleted=990, wanted_capacity=13,
)  # fmt: skip
MANY = replace(CALM, workers=10, capacity=100, reporting=10, reporting_capacity=100)
LATE_QUEUE = replace(CALM, ready=3000, oldest_ready=30.0, looked=1000, arrivals=120.0, wanted_capacity=48)
IDLE_RUNNERS = replace(LATE_QUEUE, busy=5.0)


def unheard(load: QueueLoad) -> QueueLoad:
    """None of its workers has told anything twice."""
    return replace(
        load, reporting=0, reporting_capacity=0, seconds=None, busy=None, claims=None, empty_claims=None,
        short_claims=None, locked_claims=None, claimed=None, claim_seconds=None, claim_share=None, flush_share=None,
        cpu=None, machine_load=None, claimed_rate=None, ended_rate=None, arrivals=None, departures=None,
    )  # fmt: skip


UNSERVED = replace(unheard(LATE_QUEUE), workers=0, capacity=0)


@pytest.mark.parametrize(
    ("load", "verdict", "said"),
    [
        pytest.param(CALM, Recommendation.FINE, "50% of 20 runners busy", id="calm"),
        pytest.param(
            replace(CALM, ready=9000, oldest_ready=LATE - 0.1, busy=20.0), Recommendation.FINE, "9,000 ready",
            id="much is ready, nothing late",
        ),
        pytest.param(
            replace(LATE_QUEUE, departures=220.0), Recommendation.FINE, "worked off in 30 s", id="late, but catching up"
        ),
        pytest.param(
            replace(UNSERVED, ready=0, oldest_ready=None, looked=0), Recommendation.FINE, "nobody serves it",
            id="nobody serves it, and need not",
        ),
        pytest.param(UNSERVED, Recommendation.START_WORKERS, "nobody serves it", id="nobody serves it"),
        pytest.param(
            replace(LATE_QUEUE, unserved=1000, tasks_without_worker=("a", "b@2")), Recommendation.ADD_TASKS,
            "no living worker has task 'a', task 'b@2'", id="nobody has its tasks",
        ),
        pytest.param(
            replace(LATE_QUEUE, busy=18.0, cpu=0.7), Recommendation.ADD_PROCESSES, "90% of 20 runners busy",
            id="runners are busy",
        ),
        pytest.param(
            replace(LATE_QUEUE, busy=19.0, cpu=0.2), Recommendation.RAISE_CONCURRENCY, "uses 20% of a core",
            id="handlers wait",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, cpu=0.97, claim_share=0.6), Recommendation.ADD_PROCESSES, "no CPU left: 97%",
            id="a process's CPU is full, which makes its claims slow",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, machine_load=3.0, claim_share=0.6), Recommendation.ADD_PROCESSES,
            "3.0 runnable processes for each core", id="a machine's CPUs are full",
        ),
        pytest.param(
            replace(LATE_QUEUE, busy=19.0, cpu=0.2, machine_load=3.0), Recommendation.ADD_PROCESSES,
            "no CPU left: 3.0 runnable", id="handlers wait for a machine's CPUs",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, locked_claims=45), Recommendation.SPLIT_QUEUE, "45% of claims found only what others",
            id="claims meet locked rows",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, claim_share=0.9, claim_seconds=9.0), Recommendation.SPLIT_QUEUE,
            "claims take 90% of a worker's time (50% is much), 18.00 ms for each execution", id="claims are slow",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, workers=1, capacity=10, reporting=1, claim_share=0.9, locked_claims=90),
            Recommendation.ADD_PROCESSES, "claims take 90%", id="claims of a single worker are slow",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, flush_share=0.95, claim_share=0.6), Recommendation.LOOK_AT_DATABASE,
            "outcomes to be written: 95%", id="outcomes are written slowly",
        ),
        pytest.param(
            unheard(LATE_QUEUE), Recommendation.NOT_KNOWN, "none of its 2 workers has told twice",
            id="workers have just started",
        ),
        pytest.param(
            replace(IDLE_RUNNERS, unserved=600, tasks_without_worker=("a",)), Recommendation.ADD_TASKS,
            "of the first 1,000 no living worker has task 'a', of which there are 600", id="some of its tasks",
        ),
        pytest.param(IDLE_RUNNERS, Recommendation.NOT_KNOWN, "neither CPU", id="late, and nothing tells why"),
        pytest.param(
            MANY, Recommendation.REMOVE_PROCESSES, "10% of 100 runners busy", id="workers idle beyond need",
        ),
        pytest.param(
            replace(CALM, busy=0.0), Recommendation.FINE, "0% of 20 runners busy", id="idle, but one may fail"
        ),
        pytest.param(
            replace(MANY, cpu=0.8), Recommendation.FINE, "10% of 100 runners busy", id="few busy, with much CPU",
        ),
    ],
)  # fmt: skip
def test_verdict(load: QueueLoad, verdict: Recommendation, said: str) -> None:
    """The wrong advice costs money, or does nothing."""
    advice = judge(load)
    assert (advice.queue, advice.verdict, advice.load) == ("q", verdict, load)
    assert said in advice.why
    assert (advice.remedy is None) == (verdict is Recommendation.FINE)


def test_remedy_says_how_many() -> None:
    """'More' is no number."""
    assert judge(replace(LATE_QUEUE, busy=18.0, cpu=0.7)).remedy == "add 3 processes of 10 runners"
    assert judge(replace(LATE_QUEUE, busy=18.0, cpu=0.7, wanted_capacity=20)).remedy == "add 1 process of 10 runners"
    assert judge(replace(MANY, busy=18.0)).remedy == "if it stays so, 4 of its 10 processes would do"


def test_two_looks_count_what_came_and_went_between_them() -> None:
    """What the workers told with their last heartbeats is older, and where nobody works nobody tells."""
    later = replace(LATE_QUEUE, at=AT + timedelta(seconds=10), inserted=1500, deleted=1990)
    advice = judge(later, LATE_QUEUE)
    assert (advice.arrivals, advice.departures, advice.verdict) == (50.0, 100.0, Recommendation.FINE)
    reset = replace(later, inserted=3, deleted=1)  # the server's statistics were
    assert (judge(reset, LATE_QUEUE).arrivals, judge(reset, LATE_QUEUE).departures) == (None, None)
    new = replace(later, queue="new")
    assert [advice.arrivals for advice in judge_all([later, new], [LATE_QUEUE])] == [50.0, 120.0]


def test_a_capped_count_is_not_worked_off_in_any_known_time() -> None:
    """Ten thousand of ten million."""
    assert judge(replace(LATE_QUEUE, departures=220.0, is_ready_capped=True)).verdict is not Recommendation.FINE


@pytest.mark.parametrize(
    ("load", "note"),
    [
        (
            replace(LATE_QUEUE, busy=18.0, unserved=7, tasks_without_worker=("a",)),
            "7 of the first 1,000 that are ready have tasks that no living worker has: task 'a'",
        ),
        (replace(CALM, locked_claims=int(100 * CONTENDED)), "30% of claims found only what others had locked"),
        (replace(CALM, cpu=0.99), "a process uses 99% of a core"),
        (replace(CALM, busy=20 * FULL, arrivals=120.0), "it will be late soon"),
        (replace(CALM, reporting=1, reporting_capacity=10), "1 of its workers have not told twice"),
    ],
)
def test_what_else_is_true_is_said(load: QueueLoad, note: str) -> None:
    """A second fault behind the first is found a day later."""
    (said,) = judge(load).notes
    assert note in said
    assert judge(CALM).notes == ()
