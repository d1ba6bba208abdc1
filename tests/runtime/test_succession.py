"""The server was restarted or another promoted: the work goes on under a new id; nothing is lost, run twice, charged.

Each test makes the database believe in a new server by changing what it noted of the old one at registration; real
restarts are in tests/faults. Gates stop calls of the engine between their answer and its reading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio

from pgconductor import Conductor, Orchestrator
from pgconductor.db.link import Link
from pgconductor.errors import Unavailable
from pgconductor.runtime.lease import Lease
from pgconductor.tasks import Task

LIMIT = 20.0
NEW_SERVER = "update pgconductor._private_orchestrators set server_epoch = 'an earlier life' where died_at is null"
FORGET = (  # a claim whose asynchronous commit a crash has lost
    "update pgconductor._private_executions set state = 'ready', owner = null, claim_no = 0, attempt = 0,"
    " claimed_at = null where id = %s"
)
FINISHED = (
    "select state::text, claim_no, attempt, crashes, count(*) from pgconductor._private_finished group by 1, 2, 3, 4"
)


async def until(condition: Callable[[], bool]) -> None:
    """Until a fact holds that only the database or a counter tells."""
    with trio.fail_after(LIMIT):
        while not condition():
            await trio.sleep(0.005)


class Gate:
    """Stops the calls of one link that a test names, before they are sent or after they were answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: bytes, *, after: bool, lose: bool = False) -> None:
        self.reached, self.resume = trio.Event(), trio.Event()
        self._is_used = False
        attempt = Link.attempt

        async def gated(link: Link, call: Any) -> Any:
            if self._is_used or text not in call.query:
                return await attempt(link, call)
            if after:
                answer = await attempt(link, call)
                if not self._is_used:
                    self._is_used = True
                    await self._stop(link)
                    if lose:
                        raise Unavailable("the reply was lost")
                return answer
            self._is_used = True
            await self._stop(link)
            if lose:
                raise Unavailable("the connection broke")
            return await attempt(link, call)

        monkeypatch.setattr(Link, "attempt", gated)

    async def _stop(self, link: Link) -> None:
        self.reached.set()
        with trio.CancelScope(shield=True), trio.fail_after(LIMIT):
            await self.resume.wait()

    async def until_reached(self) -> None:
        with trio.fail_after(LIMIT):
            await self.reached.wait()


class Work:
    """A task whose executions wait, each for its number to be let go; and how often each was started."""

    def __init__(self, conductor: Conductor) -> None:
        self.starts: Counter[int] = Counter()
        self.interrupted: list[int] = []
        self._gates: dict[int, trio.Event] = {}
        self._conductor = conductor

        async def wait(n: int) -> int:
            self.starts[n] += 1
            try:
                await self._gates.setdefault(n, trio.Event()).wait()
            except trio.Cancelled:
                self.interrupted.append(n)
                raise
            return n

        self.task: Task[..., Any] = conductor.task(queue="q", name="work")(wait)

    def let_go(self, *numbers: int) -> None:
        for n in numbers:
            self._gates.setdefault(n, trio.Event()).set()

    def orchestrator(self, *, lease: float = 10.0) -> Orchestrator:
        worker = self._conductor.create_worker(queue="q", tasks=[self.task], sweep_interval=0.2)
        return Orchestrator(self._conductor, workers=[worker], lease=lease)


def beat(orchestrator: Orchestrator) -> None:
    """Have the heartbeat sent now."""
    for pipeline in orchestrator._pipelines:
        pipeline._lease.question()


async def test_running_handlers_go_on_under_a_new_id(conductor: Conductor, query: Any) -> None:
    """A restart of the server costs the executions nothing: not a crash, not an attempt, not a second run."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke_many([work.task.bind(n) for n in range(10)])
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        first = orchestrator.statistics().owner
        await until(lambda: len(work.starts) == 10)
        query(NEW_SERVER)
        beat(orchestrator)
        await until(lambda: orchestrator.statistics().successions == 1)
        owner = orchestrator.statistics().owner
        assert owner not in (None, first)
        assert query("select distinct owner from pgconductor._private_executions") == [(owner,)]
        work.let_go(*range(10))
        await until(lambda: query(FINISHED) == [("completed", 1, 1, 0, 10)])
        assert orchestrator.statistics().fences == 0
        await until(lambda: orchestrator.statistics().workers[0].outcomes == {"completed": 10})
        # The new incarnation works: it claims, is cancelled through its own channel, and its session is held.
        handle = await work.task.invoke(11)
        await until(lambda: work.starts[11] == 1)
        query("select pgconductor.cancel(array[%s::uuid])", handle.id)
        await until(lambda: work.interrupted == [11])
        await until(lambda: query("select has_session from pgconductor._private_orchestrators where died_at is null")
                    == [(True,)])  # fmt: skip
        orchestrator.stop()
    assert work.starts == Counter([*range(10), 11])


async def test_claim_that_is_refused_has_the_work_saved_at_once(conductor: Conductor, query: Any) -> None:
    """The next heartbeat may be far away."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke(1)
        orchestrator = work.orchestrator(lease=60.0)
        await nursery.start(orchestrator.run)
        await until(lambda: work.starts[1] == 1)
        query(NEW_SERVER)
        work.let_go(1, 2)
        await work.task.invoke(2)
        with trio.fail_after(10):  # heartbeats are 15 s apart
            await until(lambda: query(FINISHED) == [("completed", 1, 1, 0, 2)])
        assert orchestrator.statistics().successions == 1
        assert orchestrator.statistics().fences == 0
        orchestrator.stop()
    assert work.starts == Counter([1, 2])


async def test_claims_that_the_crash_forgot_are_interrupted_and_charged_nothing(
    conductor: Conductor, query: Any
) -> None:
    """They were committed asynchronously: the row is ready again, and what runs here must not go on beside its next."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        handles = await work.task.invoke_many([work.task.bind(n) for n in range(4)])
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: len(work.starts) == 4)
        query(NEW_SERVER)
        # What the crash left: two claims never happened, one of them already taken by another.
        query(FORGET, handles[0].id)
        query("update pgconductor._private_executions set owner = gen_random_uuid() where id = %s", handles[1].id)
        beat(orchestrator)
        await until(lambda: orchestrator.statistics().successions == 1)
        await until(lambda: sorted(work.interrupted) == [0, 1])
        work.let_go(*range(4))
        await until(lambda: query("select count(*) from pgconductor._private_finished") == [(4,)])
        orchestrator.stop()
    assert orchestrator.statistics().workers[0].dropped == 2
    assert work.starts[0] == 2
    assert query("select claim_no, attempt, crashes from pgconductor._private_finished where id = %s",
                 handles[0].id) == [(1, 1, 0)]  # fmt: skip
    assert work.starts[2] == work.starts[3] == 1


@pytest.mark.parametrize("is_carried_out", [True, False])
async def test_flush_in_doubt_over_a_restart_counts_once(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch, is_carried_out: bool
) -> None:
    """Carried out, its rows are not handed over, and the old id must be asked; if not, it is sent under the new one."""
    monkeypatch.setattr("pgconductor.runtime.lease._PATIENCE", 3600.0)  # until the reply is lost, not a second
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke_many([work.task.bind(n) for n in range(3)])
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: len(work.starts) == 3)
        gate = Gate(monkeypatch, b".flush(", after=is_carried_out, lose=True)
        work.let_go(0, 1)
        await gate.until_reached()
        assert query("select count(*) from pgconductor._private_finished") == [(2 if is_carried_out else 0,)]
        query(NEW_SERVER)
        beat(orchestrator)
        # The succession waits for its reply.
        await until(lambda: orchestrator._pipelines[0]._lease._reopened is not None)
        gate.resume.set()
        await until(lambda: orchestrator.statistics().successions == 1)
        work.let_go(2)
        await until(lambda: query(FINISHED) == [("completed", 1, 1, 0, 3)])
        await until(lambda: orchestrator.statistics().workers[0].outcomes == {"completed": 3})
        assert orchestrator.statistics().workers[0].fenced == 0
        orchestrator.stop()
    assert work.starts == Counter(range(3))


async def test_claim_whose_reply_the_restart_swallowed_comes_back(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody here knows of it: the hand-over gives it back, or it would wait for ever under a living owner."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        (pipeline,) = orchestrator._pipelines
        await until(lambda: pipeline.statistics().empty_claims > 0)
        gate = Gate(monkeypatch, b"claim", after=True, lose=True)
        await gate.until_reached()
        gate.resume.set()
        gate = Gate(monkeypatch, b"_private_claim_", after=True, lose=True)
        await gate.until_reached()
        await work.task.invoke(1)
        gate.resume.set()
        work.let_go(1)
        query(NEW_SERVER)
        beat(orchestrator)
        await until(lambda: orchestrator.statistics().successions == 1)
        await until(lambda: query("select state::text, attempt, crashes from pgconductor._private_finished")
                    == [("completed", 1, 0)])  # fmt: skip
        orchestrator.stop()
    assert work.starts == Counter([1])


async def test_lost_reply_of_the_hand_over_costs_nothing(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was carried out: the database knows us by an id that we had not taken yet."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke(1)
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: work.starts[1] == 1)
        gate = Gate(monkeypatch, b"succeed_orchestrator", after=True, lose=True)
        gate.resume.set()
        query(NEW_SERVER)
        beat(orchestrator)
        await until(lambda: orchestrator.statistics().successions == 1)
        assert gate.reached.is_set()
        work.let_go(1)
        await until(lambda: query(FINISHED) == [("completed", 1, 1, 0, 1)])
        orchestrator.stop()
    assert orchestrator.statistics().fences == 0
    assert work.starts == Counter([1])
    assert query("select count(*) from pgconductor._private_orchestrators where died_at is null") == [(0,)]


async def test_handler_that_ends_during_the_hand_over_is_completed_under_the_new_id(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the list of what is held and the answer."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke_many([work.task.bind(n) for n in range(2)])
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: len(work.starts) == 2)
        gate = Gate(monkeypatch, b"succeed_orchestrator", after=True)
        query(NEW_SERVER)
        beat(orchestrator)
        await gate.until_reached()
        work.let_go(0, 1)
        (pipeline,) = orchestrator._pipelines
        await until(lambda: pipeline.statistics().unflushed == 2)
        gate.resume.set()
        await until(lambda: query(FINISHED) == [("completed", 1, 1, 0, 2)])
        assert orchestrator.statistics().workers[0].fenced == 0
        orchestrator.stop()
    assert work.starts == Counter(range(2))


@pytest.mark.parametrize("is_alone", [True, False])
async def test_flush_that_waits_for_a_succession_writes_what_is_left_to_it(
    conductor: Conductor, query: Any, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    """What it was about to send is not ours any more: sent all the same, its answer was taken for that of the outcomes
    noted since, which were never written, and their claims kept for ever.
    """
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        handles = await work.task.invoke_many([work.task.bind(n) for n in range(3)])
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: len(work.starts) == 3)
        query(NEW_SERVER)
        query(FORGET, handles[0].id)
        gate = Gate(monkeypatch, b"succeed_orchestrator", after=False)
        beat(orchestrator)
        await gate.until_reached()
        (pipeline,) = orchestrator._pipelines
        waits, until_open = trio.Event(), Lease.until_open

        async def note_flush(lease: Lease) -> None:
            if trio.lowlevel.current_task().name == "flush q":
                waits.set()
            await until_open(lease)

        monkeypatch.setattr(Lease, "until_open", note_flush)
        work.let_go(0)
        with trio.fail_after(LIMIT):
            await waits.wait()
        if not is_alone:
            work.let_go(1)
            await until(lambda: pipeline.statistics().unflushed == 2)
        gate.resume.set()
        await until(lambda: orchestrator.statistics().successions == 1)
        work.let_go(1, 2)
        await until(lambda: query(FINISHED) == [("completed", 1, 1, 0, 3)])
        orchestrator.stop()
    assert work.starts == Counter([0, 0, 1, 2])


async def test_what_others_have_taken_over_is_not_succeeded(conductor: Conductor, query: Any) -> None:
    """Declared dead, there is nothing to save: everything is cancelled, and the next incarnation is a new one."""
    work = Work(conductor)
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke(1)
        orchestrator = work.orchestrator()
        await nursery.start(orchestrator.run)
        await until(lambda: work.starts[1] == 1)
        query("update pgconductor._private_orchestrators set died_at = now()")
        beat(orchestrator)
        await until(lambda: work.starts[1] == 2)
        work.let_go(1)
        await until(lambda: query(FINISHED) == [("completed", 2, 1, 1, 1)])
        statistics = orchestrator.statistics()
        assert (statistics.fences, statistics.successions, statistics.incarnations) == (1, 0, 2)
        assert statistics.workers[0].dropped == 1, "counts are kept over incarnations"
        orchestrator.stop()
    assert work.interrupted == [1]


async def test_suspended_machine_gives_up_what_it_held_before_it_writes(conductor: Conductor, query: Any) -> None:
    """The boot clock jumps as it does in a suspended machine: Trio's own did not notice anything."""
    work = Work(conductor)
    jump = 0.0
    async with conductor, trio.open_nursery() as nursery:
        await work.task.invoke(1)
        orchestrator = work.orchestrator(lease=2.0)
        real = orchestrator._clock
        orchestrator._clock = lambda: real() + jump
        await nursery.start(orchestrator.run)
        await until(lambda: work.starts[1] == 1)
        jump = 3600.0
        work.let_go(1)  # its result comes after the lease
        await until(lambda: orchestrator.statistics().fences == 1)
        assert query("select count(*) from pgconductor._private_finished") == [(0,)]
        assert orchestrator.statistics().workers[0].fenced == 0, "nothing was even sent"
        assert orchestrator.statistics().workers[0].dropped == 1
        await until(lambda: query(FINISHED) == [("completed", 2, 1, 1, 1)])
        orchestrator.stop()
    assert work.starts == Counter([1, 1])
