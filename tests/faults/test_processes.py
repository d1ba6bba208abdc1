"""Worker processes that are killed, stopped, blocked and asked to end, while another goes on.

What must hold is strict: every execution finishes exactly once, and nothing is written for a claim that was revoked.
How soon it happens is judged only where it is promised, with the lease that the test chose.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.site import Site, open_site, until


@pytest.fixture
def site(pgconductor_dsn: str, tmp_path: Path) -> Iterator[Site]:
    with open_site(pgconductor_dsn, tmp_path) as opened:
        yield opened


def test_killed_process_loses_nothing_and_its_work_runs_again_elsewhere(site: Site) -> None:
    """Executions of a dead process must come back, and those that it had finished must not."""
    first, second = site.start(), site.start()
    numbers = range(200)
    site.invoke("nap", numbers, seconds=0.1)
    until(lambda: sum(entry.pid == first.pid for entry in site.journal("end")) >= 20)
    first.kill()
    killed_at = time.monotonic()
    held = site.held_by(first)
    assert held > 0, "the process held nothing when it was killed: the test shows nothing"
    unfinished = {entry.n for entry in site.journal("start") if entry.pid == first.pid} - {
        n for (n,) in site.query("select (payload->>'n')::int from pgconductor._private_finished")
    }
    until(lambda: site.live() == 0)
    site.check_finished_once(numbers)
    starts = site.journal("start")
    assert len(starts) <= len(numbers) + held
    again = [entry.at - killed_at for entry in starts if entry.pid == second.pid and entry.n in unfinished]
    print(f"{held} executions were held at the kill; rescued after {min(again):.1f} to {max(again):.1f} s, lease 2 s")
    assert len(again) == len(unfinished)
    crashes = site.query("select sum(crashes), max(crashes), max(attempt) from pgconductor._private_finished")
    assert crashes == [(held, 1, 1)], "a crash is charged to what the dead process held, an attempt to nobody"


def test_results_that_die_with_their_process_cost_no_more_runs_than_it_held(site: Site) -> None:
    """What has ended and is not yet written runs again; what was written does not. (Catalogue no. 3.)"""
    site.audit()
    numbers = range(400)
    ids = site.invoke("nap", numbers, seconds=0.01)
    killed = site.start(flush=5.0)  # results wait for company as long as they may
    until(lambda: len(site.journal("end")) >= 150)
    killed.kill()
    held = site.held_by(killed)
    ended = len(site.journal("end"))
    written = int(site.query("select count(*) from pgconductor._private_finished")[0][0])
    assert ended > written, "no result died with the process: the test shows nothing"
    site.start()
    until(lambda: site.live() == 0)
    site.check_finished_once(numbers)
    site.check_invariants(ids)
    again = len(site.journal("start")) - len(numbers)
    print(f"{ended} had ended, {written} were written, {held} were held at the kill, {again} began again")
    assert 0 < again <= held


def test_killed_process_is_rescued_within_its_lease_and_a_sweep(site: Site) -> None:
    """The bound that is promised, far below which a missing session is noticed. (Catalogue no. 1.)"""
    lease, sweep = 4.0, 1.0
    killed = site.start(lease=lease, sweep=sweep)
    site.invoke("nap", range(10), seconds=60.0)
    until(lambda: len(site.journal("start")) == 10)
    site.start(lease=lease, sweep=sweep)
    killed.kill()
    killed_at = time.monotonic()
    until(lambda: len(site.journal("start")) == 20)
    rescued_after = max(entry.at for entry in site.journal("start")) - killed_at
    print(f"rescued within {rescued_after:.1f} s, lease {lease} s, sweep {sweep} s")
    assert rescued_after <= lease + sweep + 0.5
    rows = "select count(*), min(claim_no), max(claim_no), min(crashes), max(crashes), max(attempt)"
    assert site.query(f"{rows} from pgconductor._private_executions") == [(10, 2, 2, 1, 1, 1)]


def test_killed_process_is_rescued_within_fifteen_seconds_by_default(site: Site) -> None:
    """The promise of the default lease."""
    killed = site.start(lease=10.0)
    site.invoke("nap", range(10), seconds=600.0)
    until(lambda: len(site.journal("start")) == 10)
    other = site.start(lease=10.0)
    killed.kill()
    killed_at = time.monotonic()
    until(lambda: sum(entry.pid == other.pid for entry in site.journal("start")) == 10)
    rescued_at = max(entry.at for entry in site.journal("start"))
    print(f"rescued within {rescued_at - killed_at:.1f} s, lease 10 s")
    assert rescued_at - killed_at <= 15.0


def test_zombie_writes_nothing_and_goes_on_as_a_new_incarnation(site: Site) -> None:
    """A process that slept through its lease believes that it still owns what others have finished meanwhile."""
    zombie = site.start()
    site.invoke("nap", range(10), seconds=0.5)
    until(lambda: len(site.journal("start")) == 10)
    zombie.send(signal.SIGSTOP)
    (owner,) = zombie.owners()
    other = site.start()
    until(lambda: site.live() == 0)
    finished = site.query("select * from pgconductor._private_finished order by id")
    site.check_finished_once(range(10))
    zombie.send(signal.SIGCONT)
    until(lambda: len(zombie.owners()) == 2)
    assert site.query("select * from pgconductor._private_finished order by id") == finished
    assert set(site.query("select distinct owner from pgconductor._private_finished")) == {(other.owners()[0],)}
    assert site.query("select died_at is not null from pgconductor._private_orchestrators where id = %s", owner) == [
        (True,)
    ]
    other.kill()
    site.invoke("nap", range(10, 20), seconds=0.0)
    until(lambda: site.live() == 0)
    site.check_finished_once(range(20))
    assert {entry.pid for entry in site.journal("end", *range(10, 20))} == {zombie.pid}


def test_blocked_event_loop_never_makes_a_second_owner_that_may_write(site: Site) -> None:
    """A handler that computes keeps the lease from being renewed: what it returns then is no longer wanted."""
    blocked = site.start(lease=1.5)
    site.invoke("compute", [1], seconds=4.0, marker=str(site.folder / "marker"))
    until(lambda: len(site.journal("start")) == 1)
    other = site.start(lease=1.5)
    until(lambda: site.live() == 0)
    site.check_finished_once([1])
    ((owner, claim_no, crashes),) = site.query("select owner, claim_no, crashes from pgconductor._private_finished")
    assert owner in other.owners()
    assert (claim_no, crashes) == (2, 1)
    until(lambda: len(blocked.owners()) == 2)
    first, second = site.journal("start")
    assert (first.pid, second.pid) == (blocked.pid, other.pid)
    site.check_finished_once([1])


def test_terminated_process_gives_back_what_it_has_not_begun(site: Site) -> None:
    """A deployment must cost no attempt, hold up nothing, and lose nothing."""
    process = site.start(concurrency=1)
    site.invoke("nap", range(1000), seconds=0.01)
    until(lambda: len(site.journal("end")) >= 40)
    process.send(signal.SIGTERM)
    assert process.until_exit() == 0
    begun = len(site.journal("start"))
    assert begun < 1000
    assert site.query("select count(*), min(attempt), max(crashes) from pgconductor._private_finished") == [
        (begun, 1, 0)
    ]
    left = "select count(*), max(attempt), max(crashes), count(owner) from pgconductor._private_executions"
    assert site.query(f"{left} where state = 'ready'") == [(1000 - begun, 0, 0, 0)]
    assert site.live() == 1000 - begun
    assert site.query(f"{left} where claim_no > 0")[0][0] > 0, "nothing had been claimed ahead: the test shows nothing"
    assert site.query("select count(*) from pgconductor._private_orchestrators") == [(0,)]


def test_claim_of_a_handler_that_ignores_cancellation_is_kept_while_it_runs(site: Site) -> None:
    """Given back at the end of the grace, it would run twice at once."""
    gate = site.folder / "gate"
    process = site.start(lease=1.5, grace=0.2)
    site.invoke("stubborn", [1], gate=str(gate))
    until(lambda: len(site.journal("start")) == 1)
    site.start(lease=1.5)
    (owner,) = process.owners()
    beats = "select heartbeat_at from pgconductor._private_orchestrators where id = %s"
    ((before,),) = site.query(beats, owner)
    process.send(signal.SIGTERM)
    # Two leases and the whole grace have passed when the heartbeat has come so far.
    until(lambda: (site.query(beats, owner)[0][0] - before).total_seconds() > 3.5)
    held = "select state::text, owner, claim_no, crashes from pgconductor._private_executions"
    assert site.query(held) == [("running", owner, 1, 0)]
    gate.touch()
    assert process.until_exit() == 0
    until(lambda: site.live() == 0)
    site.check_finished_once([1])
    assert len(site.journal("start")) == 1
