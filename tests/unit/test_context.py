"""What a handler is given: ids on the logger, resources by type."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest

from pgconductor.context import Context, resources_by_type
from pgconductor.errors import HandlerCancelled, Misuse


class Base:
    """A resource's base class."""


class Left(Base):
    """A resource."""


class Right(Base):
    """Another resource."""


class Pair(NamedTuple):
    left: int
    right: int


def context(resources: Any = None, execution_id: UUID | None = None) -> Context:
    return Context(execution_id or uuid4(), 2, task="greet", queue="fast", resources=resources_by_type(resources))


def test_log_records_carry_the_ids_of_the_execution(caplog: pytest.LogCaptureFixture) -> None:
    """A line in the log could not be traced to its execution."""
    ctx = context()
    with caplog.at_level(logging.INFO, logger="pgconductor.task"):
        ctx.logger.info("hello %s", "World")
    (record,) = caplog.records
    assert record.getMessage() == "hello World"
    assert record.__dict__["execution_id"] == str(ctx.execution_id)
    assert record.__dict__["task"] == "greet"
    assert record.__dict__["queue"] == "fast"
    assert record.__dict__["attempt"] == 2


def test_log_records_keep_the_extra_of_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """The standard adapter of Python 3.11 drops what the handler itself passes as `extra`."""
    with caplog.at_level(logging.INFO, logger="pgconductor.task"):
        context().logger.info("hello", extra={"customer": 7, "attempt": "forged"})
    (record,) = caplog.records
    assert record.__dict__["customer"] == 7
    assert record.__dict__["attempt"] == 2


def test_the_logger_is_made_once() -> None:
    """Handlers that log in a loop would pay for it each time."""
    ctx = context()
    assert ctx.logger is ctx.logger


def test_a_resource_is_found_by_its_type() -> None:
    """Handlers could not reach what the lifespan opened."""
    left, right = Left(), Right()
    assert context(left).resource(Left) is left
    assert context((left, right)).resource(Right) is right
    assert context({Base: left}).resource(Base) is left


def test_a_resource_is_found_by_a_base_class_if_only_one_fits() -> None:
    """A handler that asks for an interface would have to name the implementation."""
    left = Left()
    assert context(left).resource(Base) is left
    assert context({Base: left, Left: left}).resource(object) is left


def test_an_ambiguous_base_class_is_refused() -> None:
    """The handler would get whichever came first."""
    with pytest.raises(Misuse, match=r"ambiguous: Left, Right"):
        context((Left(), Right())).resource(Base)


@pytest.mark.parametrize("resources", [None, (), {}, Left()])
def test_a_missing_resource_names_its_type_and_the_remedy(resources: Any) -> None:
    """The handler would see a KeyError, or None."""
    with pytest.raises(Misuse, match=r"resource\(.*Right\).*Orchestrator\(resources=\.\.\.\)"):
        context(resources).resource(Right)


def test_falsy_resources_are_found() -> None:
    """An empty mapping or list, as a resource, would count as missing."""
    empty: list[int] = []
    assert context(empty).resource(list) is empty
    exact: dict[str, int] = {}
    assert context((exact, Counter("ab"))).resource(dict) is exact


def test_a_named_tuple_is_one_resource() -> None:
    """Its fields would become resources of type int."""
    pair = Pair(1, 2)
    assert context(pair).resource(Pair) is pair


def test_two_resources_of_one_type_are_refused() -> None:
    """The second would silently replace the first."""
    with pytest.raises(Misuse, match="two objects of type Left"):
        resources_by_type((Left(), Left()))


@pytest.mark.parametrize("mapping", [{"left": Left()}, {Left: Right()}])
def test_a_mapping_that_is_not_by_type_is_refused(mapping: Any) -> None:
    """A resource could be found under a type that it is not."""
    with pytest.raises(Misuse, match="not a type with an instance"):
        resources_by_type(mapping)


class Asked:
    """Says that the handler should end."""

    is_cancelled = True

    def check(self) -> None:
        raise HandlerCancelled("end")


def test_the_engine_says_whether_to_end() -> None:
    """A handler could not learn that it should end, or one that a test calls directly would need an engine."""
    ctx = context()
    assert not ctx.is_cancelled
    ctx.check_cancelled()
    ctx.watch(Asked())
    assert ctx.is_cancelled
    with pytest.raises(HandlerCancelled):
        ctx.check_cancelled()
