"""Handlers that bring down their process, again and again. (Catalogue no. 7.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.site import Process, Site, open_site, until


@pytest.fixture
def site(pgconductor_dsn: str, tmp_path: Path) -> Iterator[Site]:
    with open_site(pgconductor_dsn, tmp_path) as opened:
        opened.audit()
        yield opened


LEASE, SWEEP = 1.5, 0.5


def start(site: Site) -> Process:
    return site.start(lease=LEASE, sweep=SWEEP, concurrency=5)


@pytest.mark.parametrize(("how", "count"), [("abort", 2), ("segfault", 1)])
def test_poison_is_failed_after_three_crashes_and_its_neighbours_lose_nothing(site: Site, how: str, count: int) -> None:
    """It would run for ever, and take a process and all that runs in it with it each time.

    Processes are started again as a supervisor would, three at most at once.
    """
    innocents, poisons = range(60), range(1000, 1000 + count)
    site.query("select pgconductor.register_queue('q')")
    ids = site.invoke("nap", innocents[:30], seconds=0.1)
    ids += site.invoke("poison", poisons, how=how)
    ids += site.invoke("nap", innocents[30:], seconds=0.1)
    processes = [start(site), start(site)]
    crashes = 0

    def is_over() -> bool:
        nonlocal crashes
        for index, process in enumerate(processes):
            if process.is_dead:
                crashes += 1
                processes[index] = start(site)
        return site.live() == 0

    until(is_over, limit=60.0)
    site.check_invariants(ids)
    failed = site.query(
        "select (payload->>'n')::int, state::text, claim_no, crashes, errors->-1->>'type'"
        " from pgconductor._private_finished where task = 'poison' order by 1"
    )
    # Claimed more often it may be: what was in stock when another brought down the process had not begun.
    assert [(n, state, crash_count, kind) for n, state, _, crash_count, kind in failed] == [
        (n, "failed", 3, "crash_loop") for n in poisons
    ]
    runs = {n: len(site.journal("start", n)) for n in poisons}
    assert all(1 <= number <= 3 for number in runs.values()), runs
    rows = site.query(
        "select state::text, count(*), min(attempt), max(attempt), max(crashes)"
        " from pgconductor._private_finished where task = 'nap' group by 1"
    )
    print(f"{crashes} crashes of processes, runs of the poison {runs}, innocents {rows}")
    ((state, finished, fewest, most, _),) = rows
    assert (state, finished, fewest, most) == ("completed", 60, 1, 1)
    alone = site.journal("start", *poisons)
    # Whoever is on its last life begins while nothing else runs in its process, and nothing begins beside it.
    for last in {entry.n: entry for entry in alone if len(site.journal("start", entry.n)) == 3}.values():
        mine = [entry for entry in (*site.journal("start"), *site.journal("end")) if entry.pid == last.pid]
        begun = {entry.n for entry in mine if entry.event == "start" and entry.at < last.at}
        ended = {entry.n for entry in mine if entry.event == "end" and entry.at < last.at}
        assert begun <= ended, "others ran in its process when it began"
        assert not [entry for entry in mine if entry.at > last.at], "others began beside it"
