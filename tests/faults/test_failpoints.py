"""A process dies, or sleeps through its lease, at a named place of the engine: layer F of the test plan.

Each run: a process with one planned kill works on a workload; when it is dead, another goes on. At the end the audit is
read: nothing lost, nothing finished twice, no forbidden transition, no deadlock. By default a sample; `--failpoints
all` runs every place with every workload at the first, second and fifth arrival.
"""

from __future__ import annotations

import inspect
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from faults.site import Process, Site, open_site, until

import pgconductor
from pgconductor.failpoints import POINTS

WORKLOADS = ("plain", "retrying", "deduped", "cancelled", "snoozing", "steps", "parent", "sleeper")
NUMBERS = range(16)
FEWER = range(6)  # where each is several executions, or several claims
DURABLE = {"steps", "parent", "sleeper"}
LEASE = 1.6

# Not reached five times: once in a life, or only when somebody asks for it.
HITS = {
    "register.answered": (1,),
    "succeed.answered": (1,),
    "stop.begun": (1,),
    "stock.given_back": (1,),
    "retire.before": (1,),
    "retire.answered": (1,),
    "cancel.signalled": (1, 2),
}
AT_THE_END = {"stop.begun", "retire.before", "retire.answered", "stock.given_back"}


@dataclass(frozen=True)
class Kill:
    """Where, doing what, at which arrival."""

    point: str
    workload: str
    hit: int

    def __str__(self) -> str:
        return f"{self.point}-{self.workload}-{self.hit}"


SAMPLE = (
    Kill("claim.before", "plain", 2),
    Kill("claim.answered", "retrying", 2),
    Kill("handler.before", "deduped", 5),
    Kill("handler.after", "snoozing", 5),
    Kill("outcome.noted", "plain", 5),
    Kill("flush.before", "retrying", 2),
    Kill("flush.answered", "deduped", 2),
    Kill("heartbeat.answered", "plain", 2),
    Kill("cancel.signalled", "cancelled", 1),
    Kill("succeed.answered", "plain", 1),
    Kill("stock.given_back", "plain", 1),
    Kill("retire.answered", "snoozing", 1),
    Kill("step.before", "steps", 5),
    Kill("step.answered", "steps", 2),
    Kill("step.before", "parent", 1),
    Kill("step.answered", "sleeper", 5),
    Kill("wait.before", "sleeper", 2),
    Kill("wait.answered", "parent", 2),
    Kill("wait.answered", "sleeper", 1),
    Kill("flush.before", "parent", 5),
    Kill("flush.answered", "parent", 2),
    Kill("flush.answered", "sleeper", 1),
    Kill("flush.before", "sleeper", 2),
    Kill("claim.answered", "parent", 5),
)


def every_kill() -> Iterator[Kill]:
    for point in sorted(POINTS):
        for workload in WORKLOADS:
            if arrives(point, workload):
                for hit in HITS.get(point, (1, 2, 5)):
                    yield Kill(point, workload, hit)


def arrives(point: str, workload: str) -> bool:
    """Whether a process with this to do comes to the place."""
    if point.startswith("step."):
        return workload in DURABLE
    if point.startswith("wait."):
        return workload in ("parent", "sleeper")
    if point.startswith(("transaction.", "effect.", "item.", "deliver.")):
        return False  # test_transactions.py, test_events.py
    return point != "cancel.signalled" or workload == "cancelled"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kill" in metafunc.fixturenames:
        chosen = str(metafunc.config.getoption("--failpoints"))
        kills = (
            SAMPLE
            if chosen == "sample"
            else [kill for kill in every_kill() if chosen in ("all", str(kill)[: len(chosen)])]
        )
        metafunc.parametrize("kill", kills, ids=str)


@pytest.fixture
def site(pgconductor_dsn: str, tmp_path: Path) -> Iterator[Site]:
    with open_site(pgconductor_dsn, tmp_path) as opened:
        opened.audit()
        opened.query("select pgconductor.register_queue('q')")
        yield opened


def begin(site: Site, workload: str) -> list[UUID]:
    """Insert the workload; return the ids that were acknowledged."""
    match workload:
        case "retrying":
            return site.invoke("again", NUMBERS)
        case "deduped":
            first = site.invoke("nap", NUMBERS, is_keyed=True, seconds=0.05)
            assert site.invoke("nap", NUMBERS, is_keyed=True, seconds=0.05) == first
            return first
        case "cancelled":
            return site.invoke("nap", NUMBERS, seconds=0.4)
        case "snoozing":
            return site.invoke("doze", NUMBERS, marker=str(site.folder / "dozed"))
        case "zombie":
            return site.invoke("nap", NUMBERS, seconds=0.2)
        case "steps":
            return site.invoke("steps", NUMBERS, count=5)
        case "parent":
            return site.invoke("parent", FEWER)
        case "sleeper":
            return site.invoke("sleeper", FEWER, seconds=0.3)
        case _:
            return site.invoke("nap", NUMBERS, seconds=0.05)


def provoke(site: Site, kill: Kill, victim: Process, ids: list[UUID]) -> None:
    """What makes the process arrive at places it does not come to by itself."""
    if kill.workload == "cancelled":
        until(lambda: victim.is_dead or len(site.journal("start")) >= 2)
        site.query("select * from pgconductor.cancel(%s, 'not wanted')", ids[: len(ids) // 2])
    if kill.point == "succeed.answered":
        until(lambda: victim.is_dead or len(site.journal("start")) >= 2)
        site.query("update pgconductor._private_orchestrators set server_epoch = 'another' returning id")
    if kill.point in AT_THE_END:
        until(lambda: victim.is_dead or len(site.journal("start")) >= 2)
        victim.send(signal.SIGTERM)


def check_ends(site: Site, workload: str, ids: list[UUID]) -> None:
    """Every execution has ended as its workload must, and what has not been cancelled has run to its end."""
    rows = site.query(
        "select id, state::text, attempt, crashes, (payload->>'n')::int from pgconductor._private_finished"
        " where parent_id is null"
    )
    assert sorted(row[0] for row in rows) == sorted(ids)
    wanted = 2 if workload == "retrying" else 1
    for execution, state, attempt, crashes, n in rows:
        assert state == "completed" or (workload == "cancelled" and execution in ids[: len(ids) // 2]), (n, state)
        assert crashes <= 2, "the planned crash, and on a machine without time for us a lost lease"
        if state == "completed":
            assert attempt == wanted, (n, attempt, crashes)
            assert site.journal("end", n)
    children = site.query(
        "select payload->>'name', state::text, count(*), max(crashes) from pgconductor._private_finished"
        " where parent_id is not null group by 1, 2 order by 1"
    )
    if workload == "parent":
        ends = [("bad", "failed", len(ids)), ("better", "completed", len(ids)), ("good", "completed", len(ids))]
        assert [row[:3] for row in children] == ends
    else:
        assert children == []


def test_process_killed_at_a_failpoint_loses_nothing_and_ends_nothing_twice(site: Site, kill: Kill) -> None:
    """The kill that nobody thought of is the one that is found in production. (Catalogue nos. 1, 3, 4.)"""
    ids = begin(site, kill.workload)
    victim = site.start(
        concurrency=2, lease=LEASE, sweep=0.3, flush=0.02, batch=2, failpoints=f"{kill.point}=kill@{kill.hit}"
    )
    provoke(site, kill, victim, ids)
    assert victim.until_exit() == -signal.SIGKILL, "it ended without having come to the place: the test shows nothing"
    site.start(concurrency=4, lease=LEASE, sweep=0.3)
    until(lambda: site.live() == 0)
    site.check_invariants(ids)
    check_ends(site, kill.workload, ids)
    # At most: one planned kill, and a lease that was lost for want of time.
    site.check_records(1)


@pytest.mark.parametrize(
    ("point", "workload"),
    [
        *((p, "zombie") for p in ("claim.answered@2", "handler.after@3", "outcome.noted@3", "flush.before@2")),
        ("heartbeat.before@3", "zombie"),
        ("step.before@3", "steps"),
        ("step.answered@3", "steps"),
        ("wait.before@2", "sleeper"),
        ("wait.answered@1", "parent"),
        ("flush.before@1", "parent"),
    ],
)
def test_zombie_that_wakes_anywhere_changes_nothing_and_takes_a_new_id(site: Site, point: str, workload: str) -> None:
    """It sleeps through its lease with a claim, a result or a request in its hands. (Catalogue no. 5.)

    What it held has been run by another when it wakes: nothing of it may change.
    """
    where, _, hit = point.partition("@")
    ids = begin(site, workload)
    zombie = site.start(concurrency=2, lease=LEASE, sweep=0.3, batch=2, failpoints=f"{where}=stop@{hit}")
    zombie.until_stopped()
    (owner,) = zombie.owners()
    held = site.held_by(zombie)
    assert held > 0
    other = site.start(concurrency=4, lease=LEASE, sweep=0.3)
    until(lambda: site.live() == 0)
    check_ends(site, workload, ids)
    site.check_records(1)
    before = site.query("select * from pgconductor._private_finished order by id")
    audit = (
        "select (select count(*) from pgconductor._test_audit), (select count(*) from pgconductor._test_records),"
        " (select count(*) from pgconductor._private_steps), (select count(*) from pgconductor._private_waits)"
    )
    entries = site.query(audit)
    assert entries[0][2:] == (0, 0)
    zombie.send(signal.SIGCONT)
    until(lambda: len(zombie.owners()) == 2)
    assert site.query("select * from pgconductor._private_finished order by id") == before
    assert site.query(audit) == entries
    assert site.query("select died_at is not null from pgconductor._private_orchestrators where id = %s", owner) == [
        (True,)
    ]
    assert [row for row in before if owner in row and other.owners()[0] in row] == []
    # It goes on as somebody else.
    other.send(signal.SIGTERM)
    other.until_exit()
    more = site.invoke("nap", range(100, 110), seconds=0.0)
    until(lambda: site.live() == 0)
    zombie.send(signal.SIGTERM)
    assert zombie.until_exit() == 0
    site.check_invariants([*ids, *more])
    lost = sum(entry.n for event in ("fenced", "dropped") for entry in site.journal(event) if entry.pid == zombie.pid)
    print(
        f"it held {held} when it fell asleep; {lost} of its outcomes were refused by the database or dropped by itself"
    )
    if where in ("outcome.noted", "flush.before", "step.before", "step.answered", "wait.answered"):
        assert lost > 0, "it had nothing in its hands: the test shows nothing"


def test_every_failpoint_is_in_the_engine() -> None:
    """A plan for a place that is gone would never be carried out."""
    package = Path(inspect.getfile(pgconductor)).parent
    called: set[str] = set()
    for path in [*package.glob("*.py"), *(package / "runtime").glob("*.py")]:
        called |= set(re.findall(r'\bfailpoint\("([a-z_.]+)"\)', path.read_text()))
    assert called == set(POINTS)
