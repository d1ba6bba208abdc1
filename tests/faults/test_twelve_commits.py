"""A workflow of twelve operations; its process dies at each of their commits: before it is sent, after its answer.

Twelve executions on twelve queues, each in a process of its own that dies at one of the commits; then one process goes
on with all of them. (Catalogue nos. 2 and 4; the places that are not commits of the handler are test_failpoints.py's.)
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from uuid import UUID

import pytest
from faults.site import open_site, until

# What the workflow does, in order (program.py): commits of a step, or of a wait, counted in the process.
OPERATIONS = (
    "step 0", "step 1", "nap", "step 2", "good", "step 3", "now-1", "step 4", "bad", "step 5", "uuid-1", "step 6",
)  # fmt: skip
WAITS = ("nap", "good", "bad")
LEASE = 1.6


def place(number: int, when: str) -> str:
    """The plan of a kill at the commit of an operation."""
    name = OPERATIONS[number]
    kind = "wait" if name in WAITS else "step"
    arrival = sum((other in WAITS) == (name in WAITS) for other in OPERATIONS[: number + 1])
    return f"{kind}.{when}=kill@{arrival}"


@pytest.mark.parametrize("when", ["before", "answered"])
def test_kill_at_each_of_twelve_commits_repeats_what_was_not_recorded_and_nothing_else(
    pgconductor_dsn: str, tmp_path: Path, when: str
) -> None:
    """What was recorded is done again, or what was not is taken for done. A kill costs one run of one step."""
    queues = [f"w{number}" for number in range(len(OPERATIONS))]
    with open_site(pgconductor_dsn, tmp_path) as site:
        site.audit()
        ids: list[UUID] = []
        for number, queue in enumerate(["q", *queues], start=-1):
            site.query("select pgconductor.register_queue(%s)", queue)
            if number >= 0:
                ((made,),) = site.query(
                    "select pgconductor.invoke(%s, jsonb_build_object('n', %s::int), queue => %s)",
                    f"twelve-{queue}", number, queue,
                )  # fmt: skip
                ids.append(made)
        # Children are on "q", and whose they are is anybody's: of a process that lives.
        site.start(concurrency=4, lease=LEASE, sweep=0.3)
        victims = [
            site.start(
                concurrency=1, lease=LEASE, sweep=0.3, flush=0.02, batch=1, failpoints=place(number, when),
                queues=[queue],
            )
            for number, queue in enumerate(queues)
        ]  # fmt: skip
        for victim in victims:
            assert victim.until_exit() == -signal.SIGKILL, "it did not come to the place: the test shows nothing"
        site.start(concurrency=4, lease=LEASE, sweep=0.3, queues=queues)
        until(lambda: site.live() == 0)
        site.check_invariants(ids)
        rows = site.query(
            "select (payload->>'n')::int, state::text, attempt, crashes from pgconductor._private_finished"
            " where parent_id is null order by 1"
        )
        assert rows == [(n, "completed", 1, 1) for n in range(12)]
        # A step that was saved before the kill never ran again; the one whose value was lost ran once more.
        lost = {(n, name): 1 for n, name in enumerate(OPERATIONS) if when == "before" and name.startswith("step")}
        runs = Counter((entry.n, entry.name) for entry in site.journal("step"))
        steps = {(n, name): 1 for n in range(12) for name in OPERATIONS if name.startswith("step")}
        assert runs == Counter(steps) + Counter(lost)
        site.check_records(1)
        names = site.query("select payload->>'name' from pgconductor._private_finished where parent_id is not null")
        assert Counter(names) == {("good",): 12, ("bad",): 12}
