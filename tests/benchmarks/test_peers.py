"""What the comparison with other packages takes for done, and what it does without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import peer
from benchmarks.peers.absurd import ABSURD
from benchmarks.peers.dbos import DBOS

_DONE = peer.Outcome(finished=5, distinct=5, succeeded=5, starts=5, steps=10, seconds=1.0)


@pytest.mark.parametrize("field", ["finished", "distinct", "succeeded", "starts", "steps"])
def test_outcome_is_refused_unless_each_execution_finished_once(field: str) -> None:
    """A rate of work that was lost, repeated or had fewer steps would be compared."""
    assert _DONE.complaint(5, 2) is None
    for wrong in (-1, 1):
        outcome = replace(_DONE, **{field: getattr(_DONE, field) + wrong})
        assert outcome.complaint(5, 2) is not None


def test_peer_is_left_out_without_its_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The comparison would break wherever the peers are not installed."""
    monkeypatch.setattr(peer, "PYTHON", tmp_path / "python")
    assert not DBOS.is_installed()
    assert not ABSURD.is_installed()


def test_connection_string_becomes_a_url_that_every_driver_takes() -> None:
    """A peer would look for a socket folder or a password in the wrong place."""
    url = peer.as_url("host=/run/a dbname='b c' user=d password=e/f port=5433")
    assert url == "postgresql://d:e%2Ff@/b%20c?host=%2Frun%2Fa&port=5433"
    assert peer.as_url("postgresql://localhost/x") == "postgresql:///x?host=localhost"
