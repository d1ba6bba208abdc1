"""The history of a run: names, kinds, order where there is one, and what is said when code and records differ."""

from __future__ import annotations

from time import perf_counter

import pytest

from pgconductor.errors import DurableMisuse, InvalidOption, NonDeterminism
from pgconductor.history import MAX_NAME_BYTES, MAX_RECORDS, History
from pgconductor.model import Record


def step(name: str, position: int, attempt: int = 1, value: str | None = None) -> Record:
    return Record(name, "step", position, attempt, "completed", value=value)


def wait(name: str, position: int, outcome: str | None = None, *, attempt: int = 1, scope: str | None = None) -> Record:
    return Record(name, "child", position, attempt, outcome, "target", scope)


def test_recorded_name_is_found_and_a_new_one_is_not() -> None:
    """A replay would run what it has a record of, or skip what it has none of."""
    history = History([step("a", 0, value="1")], 1)
    found = history.begin("a", "step", alone=True)
    assert found is not None
    assert found.value == "1"
    assert history.begin("b", "step", alone=True) is None
    assert history.place() == 1


def test_name_is_used_once_in_a_run_whatever_its_kind() -> None:
    """Steps, sleeps and children shared keys, and one got the other's value (B36)."""
    history = History([], 1)
    history.begin("a", "step", alone=True)
    for kind in ("step", "sleep", "child", "now"):
        with pytest.raises(DurableMisuse, match=r"'a' was used before in this run, for a step.*a-\{n\}"):
            history.begin("a", kind, alone=True)
    with pytest.raises(DurableMisuse, match="used before"):
        history.begin_scope("a")
    history.begin_scope("fan")
    with pytest.raises(DurableMisuse, match="for a nursery"):
        history.begin("fan", "step", alone=True)


@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME_BYTES + 1), "é" * 65, "nul\0", 7])
def test_name_that_the_database_would_refuse_is_refused_first(name: str) -> None:
    """The statement, and those of others sent with it, would fail."""
    with pytest.raises(InvalidOption):
        History([], 1).begin(name, "step", alone=True)


def test_other_kind_under_a_recorded_name_is_told_with_both_histories() -> None:
    """A sleep's record would be taken for a step's value (B36)."""
    history = History([step("a", 0), Record("b", "sleep", 1, 1, "elapsed")], 1)
    history.begin("a", "step", alone=True)
    with pytest.raises(NonDeterminism) as raised:
        history.begin("b", "step", alone=True)
    message = str(raised.value)
    assert "asks for step 'b', which was recorded as a sleep" in message
    assert "Recorded: step 'a', sleep 'b'." in message
    assert "Asked for in this run: step 'a', step 'b'." in message


def test_other_target_of_a_wait_is_told() -> None:
    """A handler would get the event of another name."""
    history = History([Record("w", "event", 0, 1, "received", "order.paid")], 1)
    with pytest.raises(NonDeterminism, match=r"'order\.sent', which was recorded with 'order\.paid'"):
        history.begin("w", "event", alone=True, target="order.sent")


def test_new_name_before_what_was_recorded_is_told() -> None:
    """A renamed step would run again under its new name."""
    history = History([step("load", 0), step("charge", 1)], 1)
    history.begin("load", "step", alone=True)
    with pytest.raises(NonDeterminism, match="asks for step 'charge-card', where step 'charge' was recorded"):
        history.begin("charge-card", "step", alone=True)


def test_branches_may_come_in_any_order() -> None:
    """Tasks that run beside each other have no order that a replay could keep."""
    history = History([step("a", 0), step("b", 1)], 1)
    assert history.begin("new", "step", alone=False) is None
    assert history.begin("b", "step", alone=False) is not None
    assert history.begin("also-new", "step", alone=True) is None  # after branches nothing is known of the order
    assert [record.name for record in history.unused()] == ["a"]


def test_attempt_may_go_another_way_than_those_before() -> None:
    """After a failure the same code may well decide otherwise; what it asks for again it finds."""
    history = History([step("a", 0), step("b", 1)], 2)
    assert history.begin("c", "step", alone=True) is None
    assert history.begin("b", "step", alone=True) is not None
    assert history.unused() == []


def test_records_of_this_attempt_are_due_though_others_are_not() -> None:
    """The check would end at the first retry."""
    history = History([step("a", 0), step("b", 1, attempt=2)], 2)
    with pytest.raises(NonDeterminism, match="where step 'b' was recorded"):
        history.begin("c", "step", alone=True)


def test_long_histories_are_told_in_short() -> None:
    """An error of a megabyte could not be stored."""
    history = History([step(f"s{n}", n) for n in range(1000)], 1)
    with pytest.raises(NonDeterminism, match=r"\(1,000 in all\)") as raised:
        history.begin("new", "step", alone=True)
    assert len(str(raised.value)) < 1000


def test_number_of_records_is_bounded_for_new_ones_only() -> None:
    """An execution that has them all must be able to end; one in a loop without an end must not go on."""
    history = History([step(f"s{n}", n) for n in range(MAX_RECORDS)], 1)
    for n in range(MAX_RECORDS):
        assert history.begin(f"s{n}", "step", alone=True) is not None
    with pytest.raises(DurableMisuse, match="at most 100,000 records; invoke children"):
        history.begin("one more", "step", alone=True)


def test_records_that_nobody_asks_for_cost_no_look_each_time() -> None:
    """10,000 new steps beside 10,000 records of an attempt before took a minute."""
    history = History([step(f"old{n}", n, attempt=1) for n in range(20_000)], 2)
    begun = perf_counter()
    for n in range(20_000):
        history.begin(f"new{n}", "step", alone=True)
    assert perf_counter() - begun < 5.0


def test_failed_child_of_a_nursery_is_known() -> None:
    """Steps that its failure cancelled would run again at the replay."""
    history = History([wait("fan/0", 0, "completed", scope="fan"), wait("fan/1", 1, scope="fan")], 1)
    assert not history.has_failed_child("fan")
    history.note(wait("fan/1", 1, "failed", scope="fan"))
    assert history.has_failed_child("fan")
    assert not history.has_failed_child("fa")
    # Waited for by itself it has a scope of its own; a child outside of the nursery has none.
    assert History([wait("fan/0", 0, "failed", scope="fan/0")], 1).has_failed_child("fan")
    assert not History([wait("fan/0", 0, "failed")], 1).has_failed_child("fan")


def test_open_waits_are_known_by_kind() -> None:
    """Children would not be cancelled before the next heartbeat."""
    history = History([wait("c", 0), Record("s", "sleep", 1, 1, None)], 1)
    assert history.open_names("child") == ["c"]
    history.note(wait("c", 0, "completed"))
    assert not history.open_names("child")
    assert history.open_names("sleep") == ["s"]
