"""Durable channels in the database: numbers, bounds, readers, and when they go."""

from __future__ import annotations

from uuid import uuid4

import pytest
from sql.database import Database, Session
from sql.test_events import Handlers

from pgconductor.db.calls import NewItem
from pgconductor.model import Claimed, Outcome, Page
from pgconductor.testing import DatabaseClock


class Channels(Handlers):
    """Handlers with channels."""

    def open(self, claimed: Claimed, name: str = "c", capacity: int = 3) -> int | None:
        return self.db.run(self.db.calls.open_channel(self.owner, claimed.id, claimed.claim_no, name, capacity))

    def append(self, claimed: Claimed, *seqs: int, name: str = "c", session: Session | None = None) -> list[str]:
        items = [NewItem(claimed.id, claimed.claim_no, name, seq, str(seq)) for seq in seqs]
        return (session or self.db).run(self.db.calls.append_items(self.owner, items))

    def read(self, claimed: Claimed, after: int = 0, limit: int = 100, name: str = "c") -> Page:
        return self.db.run(self.db.calls.read_channel(claimed.id, name, after, limit))


@pytest.fixture
def channels(db: Database) -> Channels:
    return Channels(db)


def numbers(page: Page) -> list[int]:
    return [seq for seq, _ in page.items]


def test_item_is_appended_once_and_in_order(channels: Channels) -> None:
    """A replay appends again, or a gap is filled later, behind a reader that has passed it."""
    (claimed,) = channels.start()
    assert channels.open(claimed) == 0
    assert channels.append(claimed, 1, 2) == ["sent", "sent"]
    assert channels.append(claimed, 1) == ["sent"]
    assert channels.append(claimed, 4) == ["full"]
    assert channels.open(claimed) == 2
    assert channels.read(claimed) == Page("open", [(1, "1"), (2, "2")])
    assert channels.read(claimed, 1, 1) == Page("open", [(2, "2")])


def test_sender_is_held_up_by_what_no_reader_has_got_to(channels: Channels) -> None:
    """A fast sender fills the disk, or a reader that only looks makes room."""
    (claimed,) = channels.start()
    channels.open(claimed)
    assert channels.append(claimed, 1, 2, 3, 4) == ["sent", "sent", "sent", "full"]
    channels.read(claimed)
    assert channels.append(claimed, 4) == ["full"]
    channels.read(claimed, 2)
    assert channels.append(claimed, 4, 5, 6) == ["sent", "sent", "full"]
    channels.read(claimed, 1)  # another reader, behind the first
    assert channels.append(claimed, 6) == ["full"]
    channels.read(claimed, 99)  # a reader that lies
    assert channels.append(claimed, 6) == ["sent"]


def test_revoked_claim_writes_nothing_to_a_channel(db: Database, channels: Channels) -> None:
    """A zombie writes between what its successor sends."""
    (claimed,) = channels.start()
    channels.open(claimed)
    db.flush(channels.owner, Outcome(claimed.id, claimed.claim_no, "released"))
    (again,) = db.claim(channels.owner)
    assert channels.open(claimed) is None
    assert channels.append(claimed, 1) == ["fenced"]
    assert not db.run(db.calls.close_channel(channels.owner, claimed.id, claimed.claim_no, "c"))
    assert channels.open(again) == 0
    assert channels.append(again, 1) == ["sent"]


def test_reader_is_told_where_the_channel_stands(db: Database, channels: Channels) -> None:
    """A reader waits for ever for what will not come, or ends before what will."""
    opened, never, closed = channels.start(3)
    assert channels.read(opened).state == "absent"
    channels.open(opened)
    channels.open(closed)
    channels.append(closed, 1)
    assert channels.read(opened).state == "open"
    assert db.run(db.calls.close_channel(channels.owner, closed.id, closed.claim_no, "c"))
    assert channels.read(closed) == Page("closed", [(1, "1")])
    db.flush(channels.owner, *[Outcome(c.id, c.claim_no, "completed", keep=60.0) for c in (opened, never)])
    assert channels.read(opened).state == "closed"
    assert channels.read(never).state == "closed"
    assert db.run(db.calls.read_channel(uuid4(), "c", 0, 1)).state == "gone"


@pytest.mark.parametrize(("keep", "hours"), [(0.0, 1), (7200.0, 2), (None, None)])
def test_items_stay_as_long_as_the_finished_row_and_an_hour_at_least(
    db: Database, channels: Channels, clock: DatabaseClock, keep: float | None, hours: int | None
) -> None:
    """A reader that is behind loses the end, or the rows are never removed."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1, 2)
    db.flush(channels.owner, Outcome(claimed.id, claimed.claim_no, "completed", keep=keep))
    for passed in range(1, 4):
        assert numbers(channels.read(claimed)) == [1, 2]
        clock.advance(3600)
        db.rows("select {s}.maintain()")
        if passed == hours:
            break
    left = db.value("select count(*) from {s}._private_channel_items") + db.value(
        "select count(*) from {s}._private_channels"
    )
    assert left == (3 if hours is None else 0)


@pytest.mark.parametrize(
    ("items", "rounds"),
    [
        ((0, 0, 0, 0, 0), [2, 2, 1, 0]),  # so many empty ones seem to be nothing to do, and stay for a minute each call
        ((3, 0), [2, 2, 1, 0]),
        ((2, 1), [2, 2, 1, 0]),
    ],
)
def test_what_is_removed_at_once_is_bounded_channels_included(
    db: Database, channels: Channels, clock: DatabaseClock, items: tuple[int, ...], rounds: list[int]
) -> None:
    """Maintenance holds more rows than it was allowed, or takes what is left for nothing."""
    for count, claimed in zip(items, channels.start(len(items)), strict=True):
        channels.open(claimed)
        if count:
            channels.append(claimed, *range(1, count + 1))
        db.flush(channels.owner, Outcome(claimed.id, claimed.claim_no, "completed", keep=60.0))
        clock.advance(1)
    clock.advance(3601)
    rows = "(select count(*) from {s}._private_channel_items) + (select count(*) from {s}._private_channels)"
    left = db.value(f"select {rows}")
    for expected in rounds:
        assert db.value("select {s}._private_forget_channels({s}._private_clock(), 2)") == expected
        left -= expected
        assert db.value(f"select {rows}") == left
    assert left == 0


def test_channel_of_a_cancelled_execution_ends_and_goes(db: Database, channels: Channels, clock: DatabaseClock) -> None:
    """The other way of ending."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1)
    channels.wait(claimed, "w", "e")
    channels.park(claimed)
    db.run(db.calls.cancel([claimed.id], None))
    assert channels.read(claimed) == Page("closed", [(1, "1")])
    clock.advance(604_800 + 1)
    db.rows("select {s}.maintain()")
    assert db.value("select count(*) from {s}._private_channels") == 0


def test_retried_execution_goes_on_with_its_channel(db: Database, channels: Channels) -> None:
    """It begins again at the first item, or its readers are told that it is over."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1)
    db.flush(
        channels.owner, Outcome(claimed.id, claimed.claim_no, "failed", None, '{"type": "x", "message": "y"}', 0, 60.0)
    )
    db.run(db.calls.retry([claimed.id]))
    (again,) = db.claim(channels.owner)
    assert channels.open(again) == 1
    assert channels.append(again, 2) == ["sent"]
    assert channels.read(again) == Page("open", [(1, "1"), (2, "2")])


def test_next_life_sends_behind_what_was_sent(db: Database, channels: Channels) -> None:
    """Its items are taken for those of the life before, and swallowed; or a replay in it sends them twice."""
    (claimed,) = channels.start()
    channels.open(claimed)
    assert channels.append(claimed, 1, 2) == ["sent", "sent"]
    assert db.run(db.calls.close_channel(channels.owner, claimed.id, claimed.claim_no, "c"))
    second = channels.renew(claimed)
    assert channels.read(second, 2) == Page("open", [])
    assert channels.open(second) == 0
    assert channels.append(second, 1, 1, 3) == ["sent", "sent", "full"]
    assert channels.append(claimed, 2) == ["fenced"]
    assert channels.open(second) == 1
    assert channels.append(second, 2) == ["sent"]
    third = channels.renew(second)
    assert channels.open(third) == 0
    assert channels.append(third, 1) == ["sent"]
    assert channels.read(third) == Page("open", [(1, "1"), (2, "2"), (3, "1"), (4, "2"), (5, "1")])


def test_unread_items_of_former_lives_hold_up_the_sender(channels: Channels) -> None:
    """Each life may leave as much as a channel holds, and a loop without a reader fills the disk."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1, 2)
    again = channels.renew(claimed)
    channels.open(again)
    assert channels.append(again, 1, 2) == ["sent", "full"]
    channels.read(again, 1)
    assert channels.append(again, 2) == ["sent"]


def test_retried_execution_goes_on_with_the_channel_of_its_last_life(db: Database, channels: Channels) -> None:
    """It counts from the first life, and sends nothing; or from 0, and sends twice."""
    (claimed,) = channels.start()
    channels.open(claimed, capacity=10)
    channels.append(claimed, 1, 2)
    second = channels.renew(claimed)
    channels.open(second, capacity=10)
    channels.append(second, 1)
    error = '{"type": "x", "message": "y"}'
    db.flush(channels.owner, Outcome(second.id, second.claim_no, "failed", None, error, 0, 60.0))
    db.run(db.calls.retry([claimed.id]))
    (again,) = db.claim(channels.owner)
    assert channels.open(again, capacity=10) == 1
    assert channels.append(again, 1, 2) == ["sent", "sent"]
    assert numbers(channels.read(again)) == [1, 2, 3, 4]


@pytest.mark.parametrize("is_fork", [True, False])
def test_execution_begun_anew_has_channels_of_its_own(db: Database, channels: Channels, *, is_fork: bool) -> None:
    """It sends into those of the other one, or takes for sent what its readers have never seen."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1, 2)
    other = channels.renew(claimed)
    channels.open(other)
    channels.append(other, 1)
    channels.effect(other, "promise", kind="new_promise")
    channels.park(other)
    db.run(db.calls.fork(other.id, "promise") if is_fork else db.calls.restart(other.id))
    (begun,) = [c for c in db.claim(channels.owner) if c.id != other.id]
    assert channels.open(begun) == 0
    assert channels.append(begun, 1) == ["sent"]
    assert channels.read(begun) == Page("open", [(1, "1")])
    assert numbers(channels.read(other)) == [1, 2, 3]


def test_channel_ends_with_a_life_that_did_not_open_it(db: Database, channels: Channels, clock: DatabaseClock) -> None:
    """Its readers wait for ever, and its rows are never removed."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1)
    again = channels.renew(claimed)
    db.flush(channels.owner, Outcome(again.id, again.claim_no, "completed", keep=60.0))
    assert channels.read(again) == Page("closed", [(1, "1")])
    clock.advance(3601)
    db.rows("select {s}.maintain()")
    assert db.value("select count(*) from {s}._private_channels") == 0


def test_what_was_read_long_ago_goes_while_the_execution_lives(db: Database, channels: Channels) -> None:
    """An execution that runs for years fills the disk."""
    (claimed,) = channels.start()
    channels.open(claimed, capacity=10_000)
    upto = 0
    while upto < 12_000:
        assert set(channels.append(claimed, *range(upto + 1, upto + 501))) == {"sent"}
        upto += 500
        channels.read(claimed, upto, 1)
    assert db.rows("select min(seq), max(seq) from {s}._private_channel_items") == [(2001, 12000)]


def test_reader_and_end_of_the_execution_do_not_wait_for_each_other(db: Database, channels: Channels) -> None:
    """A page that is being read keeps a handler from ending."""
    (claimed,) = channels.start()
    channels.open(claimed)
    channels.append(claimed, 1)
    appender = db.session()
    assert channels.append(claimed, 2, session=appender) == ["sent"]
    assert numbers(channels.read(claimed)) == [1]
    appender.commit()
    assert numbers(channels.read(claimed)) == [1, 2]
    assert db.flush(channels.owner, Outcome(claimed.id, claimed.claim_no, "completed")) == {}
