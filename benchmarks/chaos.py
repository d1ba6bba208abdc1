"""The soak: producers and workers at work while processes are killed and frozen, replies cut and the server restarted.

    python -m benchmarks.chaos --executions 200000 --minutes 10 --seed 1

Everything is real: worker and producer processes, a proxy before each, a throwaway server with durable settings. The
schedule of faults and the plan of the producers follow from the seed; what the kernel makes of them does not. At the
end the faults stop, everything is mended, and all must be finished within a minute. Then a checker reads the audit
table (`pgconductor.testing.audit`), what the producers wrote down as acknowledged, and what the handlers wrote down;
each of its lines is zero or a failure. A run in which too little went wrong proves nothing: the counts that say so must
be above a floor.

Processes restart at once when they die, as a supervisor would have it. All times are of one machine's one clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import trio

from pgconductor.db.schema import migrate_sync
from pgconductor.embedded import OwnServer, own_server
from pgconductor.testing.audit import check_sync, install_audit_sync, leftovers_sync
from pgconductor.testing.proxy import ChaosProxy, open_chaos_proxy

from ._chaos_worker import EFFECTS, GRACE, LEASE, SWEEP, hashed
from .harness import DURABLE, ROOT

_PRODUCERS = 2
_HEAL = 60.0  # seconds in which all must be finished once the faults are over
_FORGOTTEN = 1.0  # seconds before a crash of the server from which on asynchronous commits may be lost
_EVERY = 2.5  # seconds between two faults, on average
_TAGS = (
    b"/*flush*/", b"/*claim*/", b"/*heartbeat*/", b"/*invoke*/", b"/*cancel*/", b"/*save_steps*/", b"/*start_waits*/",
    b"/*load_history*/", b"/*save_step_inside*/",
)  # fmt: skip


@dataclass
class Slot:
    """A place for a worker process: its proxy, its witness, and the process that has it now."""

    number: int
    proxy: ChaosProxy
    is_prepared: bool  # else it believes in a pooler, prepares nothing, and its statements carry their tags
    process: trio.Process | None = None
    starts: int = 0
    frozen_until: float = 0.0


@dataclass
class Kill:
    """A process that died: when, and how."""

    pid: int
    at: float
    how: str


@dataclass
class Run:
    """What a soak has at hand."""

    options: argparse.Namespace
    server: OwnServer
    folder: Path
    rng: random.Random
    slots: list[Slot] = field(default_factory=list[Slot])
    producers: list[ChaosProxy] = field(default_factory=list[ChaosProxy])
    kills: list[Kill] = field(default_factory=list[Kill])
    faults: Counter[str] = field(default_factory=Counter[str])
    restarts: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    exits: Counter[str] = field(default_factory=Counter[str])
    terminated: set[int] = field(default_factory=set[int])  # processes that SIGTERM ended, as it does before they serve
    is_over: bool = False

    def say(self, text: str) -> None:
        with (self.folder / "schedule.log").open("a") as log:
            log.write(f"{time.time():.3f} {text}\n")
        if self.options.verbose:
            print(text, flush=True)

    @property
    def dsn(self) -> str:
        return self.server.dsn()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=10.0, help="for which producers and faults go on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=6, help="worker processes")
    parser.add_argument("--poisons", type=int, help="executions that kill their process; default: 1 in 10,000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep witnesses, ledgers and logs there")
    parser.add_argument("--verbose", action="store_true", help="print every fault")
    options = parser.parse_args()
    if options.poisons is None:
        options.poisons = options.executions // 10_000
    with tempfile.TemporaryDirectory(prefix="pgconductor-chaos-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with own_server(settings={**DURABLE, "log_line_prefix": "%m [%p] %e ", "deadlock_timeout": "200ms"}) as server:
            run = Run(options, server, folder, random.Random(options.seed))
            with psycopg.connect(run.dsn, autocommit=True) as conn:
                migrate_sync(conn)
                install_audit_sync(conn)
                conn.execute(EFFECTS)
            began = time.monotonic()
            healed = trio.run(_soak, run)
            report = Report(run, time.monotonic() - began, healed)
            report.make()
    report.print()
    if options.json is not None:
        options.json.write_text(json.dumps(report.document(), indent=2, default=str) + "\n")
    sys.exit(1 if report.failures else 0)


# The run


async def _soak(run: Run) -> float | None:
    """Return the seconds that healing took, None if it did not come to an end."""
    options = run.options
    async with AsyncExitStack() as stack:
        for number in range(options.workers):
            proxy = await stack.enter_async_context(open_chaos_proxy(run.dsn))
            run.slots.append(Slot(number, proxy, is_prepared=number % 2 == 0))
        for _ in range(_PRODUCERS):
            run.producers.append(await stack.enter_async_context(open_chaos_proxy(run.dsn)))
        async with trio.open_nursery() as nursery:
            for slot in run.slots:
                nursery.start_soon(_supervise, run, slot)
            async with trio.open_nursery() as producing:
                faults = trio.CancelScope()
                nursery.start_soon(_cause_faults, run, faults)
                for number, proxy in enumerate(run.producers):
                    producing.start_soon(_produce, run, number, proxy)
            faults.cancel()
            await _mend(run)
            healed = await _until_finished(run)
            run.is_over = True
            for slot in run.slots:
                if slot.process is not None:
                    _signal(slot.process, signal.SIGTERM)
        return healed


async def _supervise(run: Run, slot: Slot) -> None:
    """Keep a worker process in the slot until the run is over."""
    while not run.is_over:
        slot.starts += 1
        arguments: list[str] = [slot.proxy.dsn, "--witness", str(run.folder / "witness")]
        if not slot.is_prepared:
            arguments += ["--listen-dsn", slot.proxy.dsn]
        with (run.folder / f"worker-{slot.number}.log").open("a") as log:
            slot.process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "benchmarks._chaos_worker", *arguments],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            status = await slot.process.wait()
        if status == -signal.SIGKILL and not any(kill.pid == slot.process.pid for kill in run.kills):
            run.kills.append(Kill(slot.process.pid, time.time(), "poison"))
            run.faults["poison killed its process"] += 1
        run.exits[str(status)] += 1
        if status == -signal.SIGTERM:
            run.terminated.add(slot.process.pid)
        run.say(f"worker {slot.number} (process {slot.process.pid}) ended with {status}")


async def _produce(run: Run, number: int, proxy: ChaosProxy) -> None:
    options = run.options
    share = options.executions // _PRODUCERS
    with (run.folder / f"producer-{number}.log").open("w") as log:
        process = await trio.lowlevel.open_process(
            [
                sys.executable, "-m", "benchmarks._chaos_producer", proxy.dsn, "--ledger", str(run.folder / "ledger"),
                "--number", str(number), "--count", str(share), "--poisons", str(options.poisons // _PRODUCERS),
                "--seconds", str(options.minutes * 60), "--seed", str(options.seed),
            ],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
        status = await process.wait()
    if status != 0:
        said = (run.folder / f"producer-{number}.log").read_text()[-2000:]
        raise RuntimeError(f"producer {number} ended with {status}: {said}")


async def _until_finished(run: Run) -> float | None:
    begun = trio.current_time()
    with trio.move_on_after(_HEAL):
        while await trio.to_thread.run_sync(_live, run.dsn):  # noqa: ASYNC110  # it is the database that knows
            await trio.sleep(0.2)
        return trio.current_time() - begun
    return None


def _live(dsn: str) -> int:
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            "select (select count(*) from pgconductor._private_executions)"
            " + (select count(*) from pgconductor._private_closings)"
        ).fetchone()
    assert row is not None
    return int(row[0])


def _signal(process: trio.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        process.send_signal(number)


# Faults


async def _cause_faults(run: Run, scope: trio.CancelScope) -> None:
    """One fault after the other, as the seed has it; some go on while the next begins."""
    causes: list[tuple[float, Callable[[Run], Any]]] = [
        (45, _kill), (15, _terminate_backend), (12, _freeze), (10, _cut_reply), (5, _disturb_network), (5, _roll),
        (3, _restart_server), (2, _lock_table), (1, _idle_listener),
    ]  # fmt: skip
    with scope:
        async with trio.open_nursery() as nursery:
            await trio.sleep(3.0)
            while True:
                (cause,) = run.rng.choices([c for _, c in causes], [w for w, _ in causes])
                run.say(cause.__name__)
                if run.rng.random() < 0.2:
                    nursery.start_soon(_survived, run, cause)
                else:
                    await _survived(run, cause)
                await trio.sleep(run.rng.uniform(0.5, 1.5) * _EVERY)


async def _survived(run: Run, cause: Callable[[Run], Any]) -> None:
    """A fault that needs the server does not happen while the server is away."""
    try:
        await cause(run)
    except psycopg.OperationalError as error:
        run.say(f"{cause.__name__} could not be: {error}")


def _running(run: Run) -> Slot | None:
    slots = [
        slot
        for slot in run.slots
        if slot.process is not None and slot.process.returncode is None and slot.frozen_until < time.monotonic()
    ]
    return run.rng.choice(slots) if slots else None


async def _kill(run: Run) -> None:
    if (slot := _running(run)) is not None and slot.process is not None:
        run.kills.append(Kill(slot.process.pid, time.time(), "SIGKILL"))
        _signal(slot.process, signal.SIGKILL)
        run.faults["SIGKILL"] += 1


async def _roll(run: Run) -> None:
    if (slot := _running(run)) is not None and slot.process is not None:
        _signal(slot.process, signal.SIGTERM)
        run.faults["SIGTERM"] += 1


async def _freeze(run: Run) -> None:
    """A zombie: stopped for longer than its lease, then let go on."""
    if (slot := _running(run)) is None or slot.process is None:
        return
    process, seconds = slot.process, run.rng.uniform(1.5, 3.0) * LEASE
    slot.frozen_until = time.monotonic() + seconds
    _signal(process, signal.SIGSTOP)
    run.faults["SIGSTOP"] += 1
    try:
        # Others go on dying meanwhile.
        if run.rng.random() < 0.7:
            await trio.sleep(min(seconds, _EVERY))
            await _kill(run)
        await trio.sleep_until(trio.current_time() + max(0.0, slot.frozen_until - time.monotonic()))
    finally:
        _signal(process, signal.SIGCONT)


async def _terminate_backend(run: Run) -> None:
    def terminate() -> int:
        with psycopg.connect(run.dsn) as conn:
            found = conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'client backend'"
                " and pid <> pg_backend_pid() order by md5(pid::text || %s) limit 3",
                (str(run.rng.random()),),
            ).fetchall()
        return len(found)

    run.faults["backends terminated"] += await trio.to_thread.run_sync(terminate)


async def _cut_reply(run: Run) -> None:
    """The next statement of a kind is carried out, and nobody hears of it."""
    tag = run.rng.choice(_TAGS)
    if tag in (b"/*invoke*/", b"/*cancel*/"):
        proxy = run.rng.choice(run.producers)
    else:
        proxy = run.rng.choice([slot.proxy for slot in run.slots if not slot.is_prepared])
    before = proxy.cuts
    proxy.cut_reply(tag)
    with trio.move_on_after(8.0):
        while proxy.cuts == before:  # noqa: ASYNC110  # the proxy has no event for it
            await trio.sleep(0.05)
        run.faults[f"reply cut: {tag.decode().strip('/*')}"] += 1
        return
    proxy.cut_tag = None


async def _disturb_network(run: Run) -> None:
    proxy = run.rng.choice([*(slot.proxy for slot in run.slots), *run.producers])
    how = run.rng.choice(("delay", "blackhole", "reset", "refuse"))
    run.faults[f"network: {how}"] += 1
    try:
        if how == "delay":
            proxy.delay(0.2, 0.1)
        elif how == "blackhole":
            proxy.blackhole()
        elif how == "reset":
            proxy.rst()
        else:
            proxy.refuse()
            proxy.rst()
        await trio.sleep(run.rng.uniform(1.0, 4.0))
    finally:
        with trio.CancelScope(shield=True):
            await proxy.mend()


async def _restart_server(run: Run) -> None:
    run.faults["server restarted, immediate"] += 1
    began = time.time()
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(run.server.restart, "immediate")
    run.restarts.append((began, time.time()))


async def _lock_table(run: Run) -> None:
    def lock() -> None:
        with psycopg.connect(run.dsn) as conn:
            conn.execute("lock table pgconductor._private_finished in share mode")
            time.sleep(3.0)

    run.faults["finished table locked for 3 s"] += 1
    await trio.to_thread.run_sync(lock)


async def _idle_listener(run: Run) -> None:
    def listen() -> None:
        with psycopg.connect(run.dsn) as conn:
            conn.execute("listen somebody_elses")
            time.sleep(5.0)

    run.faults["idle listener in a transaction"] += 1
    await trio.to_thread.run_sync(listen)


async def _mend(run: Run) -> None:
    for proxy in [*(slot.proxy for slot in run.slots), *run.producers]:
        await proxy.mend()
    for slot in run.slots:
        if slot.process is not None:
            _signal(slot.process, signal.SIGCONT)


# The check


class Report:
    """Reads everything once the processes have ended; `failures` must stay empty."""

    def __init__(self, run: Run, seconds: float, healed: float | None) -> None:
        self.run = run
        self.seconds = seconds
        self.healed = healed
        self.failures: list[str] = []
        self.figures: dict[str, Any] = {}

    def make(self) -> None:
        run = self.run
        with psycopg.connect(run.dsn, autocommit=True) as conn:
            self._conn = conn
            self._read_ledger()
            self._read_witness()
            self._check_ends()
            self._check_database()
            self._check_bodies()
            self._check_records()
            self._check_effects()
            self._measure_rescue()
        self._check_logs()
        self._check_sometimes()

    def _rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        return self._conn.execute(query.encode(), parameters or None).fetchall()

    def _count(self, what: str, query: str, *parameters: object) -> int:
        ((count,),) = self._rows(query, *parameters)
        self.figures[what] = count
        return int(count)

    def _require(self, what: str, found: Iterable[object]) -> None:
        bad = list(found)
        self.figures[what] = len(bad)
        if bad:
            self.failures.append(f"{what}: {len(bad)}, for example {', '.join(map(str, bad[:3]))}")

    def _read_ledger(self) -> None:
        self.intents: set[str] = set()
        self.tries: Counter[str] = Counter()
        self.acknowledged: dict[UUID, str] = {}
        self.cancels: Counter[str] = Counter()
        for line in (self.run.folder / "ledger").read_text().splitlines():
            match line.split():
                case ["intent", key]:
                    self.intents.add(key)
                case ["try", key]:
                    self.tries[key] += 1
                case ["ack", key, execution]:
                    self.acknowledged[UUID(execution)] = key
                case ["cancel", _, status]:
                    self.cancels[status] += 1
                case _:
                    self.failures.append(f"unreadable line of the ledger: {line!r}")
        self.figures["executions acknowledged"] = len(self.acknowledged)
        self.figures["invocations tried again"] = sum(1 for n in self.tries.values() if n > 1)
        self.figures["cancellations asked for"] = dict(self.cancels)

    def _read_witness(self) -> None:
        self.bodies: dict[UUID, list[list[Any]]] = defaultdict(list)  # [start, end or None, pid]
        self.step_runs: dict[tuple[UUID, str], list[tuple[float, int]]] = defaultdict(list)  # when, in which body
        self.returned: dict[tuple[UUID, str], set[str]] = defaultdict(set)
        self.seen: dict[tuple[UUID, str], set[str]] = defaultdict(set)
        self.counts: dict[int, dict[str, Any]] = {}
        self.owners: dict[int, set[str]] = defaultdict(set)
        for line in (self.run.folder / "witness").read_text().splitlines():
            event, rest = line.split(" ", 1)
            if event == "statistics":
                pid, counts = rest.split(" ", 1)
                self.counts[int(pid)] = json.loads(counts)
                if (owner := self.counts[int(pid)].pop("owner")) is not None:
                    self.owners[int(pid)].add(owner)
                continue
            execution, _, pid, at, *words = rest.split()
            bodies = self.bodies[UUID(execution)]
            if event == "step":
                body_no = max(n for n, b in enumerate(bodies) if b[2] == int(pid))
                self.step_runs[UUID(execution), words[0]].append((float(at), body_no))
            elif event in ("stepped", "seen"):
                (self.seen if event == "seen" else self.returned)[UUID(execution), words[0]].add(words[1])
            elif event == "start":
                bodies.append([float(at), None, int(pid)])
            else:
                body = next(b for b in reversed(bodies) if b[2] == int(pid) and b[1] is None)
                body[1] = float(at)
        died_at = {kill.pid: kill.at for kill in self.run.kills}
        for bodies in self.bodies.values():
            for body in bodies:
                if body[1] is None:
                    body[1] = died_at.get(body[2])
        self.figures["handler bodies begun"] = sum(map(len, self.bodies.values()))

    def _check_ends(self) -> None:
        if self.healed is None:
            self._require(
                f"live {_HEAL:g} s after the faults were over",
                self._rows("select id, task, state, attempt, crashes, run_at from pgconductor._private_executions"),
            )
        self.figures["healed, seconds"] = self.healed
        for state in ("completed", "failed", "cancelled"):
            self._count(state, "select count(*) from pgconductor._private_finished where state = %s", state)
        children = (
            "(select id from pgconductor._private_executions where parent_id is not null"
            " union all select id from pgconductor._private_finished where parent_id is not null)"
        )
        known = self._rows(
            "select id, payload #>> '{key}', payload #>> '{key,not}' from pgconductor.executions"
            f" where id not in {children}"
        )
        self._require(
            "executions nobody invoked",
            (i for i, key, broken in known if (broken or key).split()[0] not in self.intents),
        )
        keys = Counter((broken or key).split()[0] for _, key, broken in known)
        self._require("keys in more executions than tries", (k for k, n in keys.items() if n > self.tries[k]))
        self._require(
            "completed with another's result",
            self._rows(
                "select id from pgconductor._private_finished where state = 'completed' and result #>> '{}'"
                " is distinct from coalesce(payload #>> '{key}',"
                " (select l.payload #>> '{key}' from pgconductor._private_payloads l where l.execution_id = id))"
            ),
        )
        loops = self._rows(
            "select id, task, owner, extract(epoch from finished_at)::float8 from pgconductor._private_finished"
            " where state = 'failed'"
            " and errors -> -1 ->> 'type' = 'crash_loop'"
        )
        # Three kills may well meet one long execution: only a poison's doing is held against us.
        poisoned_at = {kill.pid: kill.at for kill in self.run.kills if kill.how == "poison"}
        died_at = {
            UUID(owner): poisoned_at[pid]
            for pid, owners in self.owners.items()
            if pid in poisoned_at
            for owner in owners
        }
        innocents = [row for row in loops if not row[1].startswith("poison")]
        self.figures["crash loops"] = len(loops)
        self.figures["of these innocent, killed three times by the schedule"] = len(innocents)
        self._require(
            "innocents failed by a poison beside them",
            (row for row in innocents if row[2] in died_at and row[3] > died_at[row[2]]),
        )
        self._require(
            "poisons that did not end as crash loops",
            self._rows(
                "select id, state from pgconductor._private_finished where task like 'poison%'"
                " and coalesce(errors -> -1 ->> 'type', '') <> 'crash_loop'"
            ),
        )
        self._require(
            "doomed that completed",
            self._rows(
                "select id from pgconductor._private_finished where task like 'doomed%' and state = 'completed'"
            ),
        )

    def _check_database(self) -> None:
        violations = check_sync(self._conn, acknowledged=self.acknowledged, owner_bound=LEASE + SWEEP, settled=True)
        by_rule: dict[str, list[object]] = defaultdict(list)
        for violation in violations:
            by_rule[violation.rule].append(violation)
        for rule, found in sorted(by_rule.items()):
            self._require(f"invariant {rule} broken", found)
        self.figures["invariants broken"] = len(violations)
        log = self.run.server.log_path
        self._require("left behind, or in the server's log", leftovers_sync(self._conn, log=log))
        self._count("audited changes", "select count(*) from pgconductor._test_audit")
        self._count(
            "claims",
            "select count(*) from pgconductor._test_audit where to_state = 'running' and from_state <> 'running'",
        )
        self._count("claims recovered", "select count(*) from pgconductor._test_audit where outcome = 'recovered'")
        self._count("claims handed over", "select count(*) from pgconductor._test_audit where outcome = 'handed_over'")

    def _check_bodies(self) -> None:
        """I2 and I7 from what the handlers themselves wrote."""
        # Claims commit asynchronously: a crash of the server forgets the last ones, and their lines in the audit. What
        # began by such a claim was fenced off when its process heard of the crash.
        claims = dict(self._rows("select execution, max(claim_no) from pgconductor._test_audit group by 1"))
        surplus = {
            i: len(bodies) - claims.get(i, 0) for i, bodies in self.bodies.items() if len(bodies) > claims.get(i, 0)
        }
        forgotten = {i: sum(map(self._is_near_crash, self.bodies[i])) for i in surplus}
        self.figures["bodies of claims that a crash of the server forgot"] = sum(
            min(surplus[i], forgotten[i]) for i in surplus
        )
        self._require("more bodies than claims", (i for i in surplus if surplus[i] > forgotten[i]))
        several = [i for i, bodies in self.bodies.items() if len(bodies) > 1]
        revoked: dict[UUID, list[float]] = defaultdict(list)
        for execution, at in self._rows(
            "select execution, extract(epoch from at)::float8 from pgconductor._test_audit"
            " where outcome in ('recovered', 'released') and execution = any (%s)",
            several,
        ):
            revoked[execution].append(at)
        overlaps: list[UUID] = []
        reruns = 0
        for execution in several:
            bodies = sorted(self.bodies[execution], key=lambda body: body[0])
            for earlier, later in pairwise(bodies):
                reruns += 1
                ended = earlier[1]
                if (ended is None or later[0] < ended) and not any(
                    earlier[0] <= at <= later[0] for at in revoked[execution]
                ):
                    overlaps.append(execution)
        self.figures["bodies begun again"] = reruns
        self._require("two bodies at once without a revocation", overlaps)

    def _check_records(self) -> None:
        """I6, I7 and I8 from what the handlers were told and did, and what is stored."""
        stored: dict[tuple[UUID, str], str] = {}
        for execution, steps in self._rows(
            "select id, steps from pgconductor._private_finished where steps is not null"
        ):
            for step in steps:
                if step["kind"] in ("step", "transaction") and "value" in step:
                    stored[execution, step["name"]] = hashed(step["value"])
        self.figures["steps stored"] = len(stored)
        self._require("steps told as more than one value", (k for k, values in self.seen.items() if len(values) > 1))
        self._require(
            "steps told as what is not stored",
            (key for key, values in self.seen.items() if values != {stored.get(key, "nothing")}),
        )
        self._require(
            "steps stored as what none of their runs returned",
            (key for key, values in self.returned.items() if key in stored and stored[key] not in values),
        )
        # A run that was repeated lost its value: its claim was revoked, gave up or failed.
        ended = dict(
            self._rows(
                "select execution, count(*) from pgconductor._test_audit"
                " where outcome in ('recovered', 'released', 'retried', 'cancel_requested') group by 1"
            )
        )
        again = {key: runs for key, runs in self.step_runs.items() if len(runs) > 1}
        self.figures["runs of steps"] = sum(map(len, self.step_runs.values()))
        self.figures["of these again"] = sum(len(runs) - 1 for runs in again.values())
        self._require(
            "steps that ran twice in one body",
            (key for key, runs in again.items() if len({body for _, body in runs}) < len(runs)),
        )
        self._require(
            "steps that ran more often than their claims were lost",
            (
                (key, len(runs), ended.get(key[0], 0))
                for key, runs in again.items()
                if len(runs) > 1 + ended.get(key[0], 0) + sum(map(self._is_near_crash, self.bodies[key[0]]))
            ),
        )
        self._require(
            "children that stand twice under one name",
            self._rows(
                "select parent_id, payload ->> 'name', count(*) from pgconductor._private_finished"
                " where parent_id is not null group by 1, 2 having count(*) > 1"
            ),
        )
        self._count("children", "select count(*) from pgconductor._private_finished where parent_id is not null")
        self._count(
            "resumptions of those that waited",
            "select count(*) from pgconductor._test_audit where from_state = 'waiting' and to_state = 'ready'",
        )
        self._count(
            "children cancelled with their parents",
            "select count(*) from pgconductor._private_finished where parent_id is not null and state = 'cancelled'",
        )

    def _check_effects(self) -> None:
        """A transactional step has one effect if it is recorded, and none if it is not."""
        self._require(
            "transactional effects that are not there once",
            self._rows(
                "select f.id, count(e.execution) from pgconductor._private_finished f"
                " left join chaos_effects e on e.execution = f.id where f.task like 'effect%' group by f.id"
                " having count(e.execution) <> (select count(*) from pgconductor._private_finished g"
                " cross join lateral jsonb_array_elements(g.steps) s where g.id = f.id and s ->> 'name' = 'charge'"
                " and s ? 'value')"
            ),
        )
        self._require(
            "transactional effects of what nobody invoked",
            self._rows(
                "select e.execution from chaos_effects e"
                " where not exists (select from pgconductor._private_finished f where f.id = e.execution)"
            ),
        )
        self._count("transactional effects", "select count(*) from chaos_effects")

    def _is_near_crash(self, body: list[Any]) -> bool:
        """Whether a crash of the server may have forgotten the claim it began by: one that was committed less than
        three rounds of the WAL writer (200 ms each) before.
        """
        return any(began - _FORGOTTEN <= body[0] <= ended + _FORGOTTEN for began, ended in self.run.restarts)

    def _measure_rescue(self) -> None:
        """From a death to the moment at which the last of its claims was given back."""
        slowest: list[float] = []
        for kill in self.run.kills:
            owners = list(self.owners[kill.pid])
            if not owners:
                continue
            ((seconds,),) = self._rows(
                "select extract(epoch from max(at))::float8 - %s from pgconductor._test_audit"
                " where outcome = 'recovered' and owner = any (%s::uuid[]) and at > to_timestamp(%s)",
                kill.at, owners, kill.at,
            )  # fmt: skip
            if seconds is not None:
                slowest.append(seconds)
        self.figures["deaths"] = dict(Counter(kill.how for kill in self.run.kills))
        self.figures["deaths with claims to rescue"] = len(slowest)
        if slowest:
            slowest.sort()
            self.figures["rescue of a death's last claim, p50, seconds"] = round(slowest[len(slowest) // 2], 2)
            self.figures["rescue of a death's last claim, maximum, seconds"] = round(slowest[-1], 2)
            bound = LEASE + SWEEP + 0.5
            away = sum(end - begin for begin, end in self.run.restarts)
            if slowest[-1] > bound + away:
                self.failures.append(f"a rescue took {slowest[-1]:.1f} s, more than {bound} s")

    def _check_logs(self) -> None:
        logs = [path.read_text(errors="replace") for path in self.run.folder.glob("worker-*.log")]
        self._require(
            "tracebacks of the engine in the workers' logs",
            re.findall(r"(?:RuntimeError|AssertionError|RecursionError|KeyError|Trio\w*Error)[^\n]*", "\n".join(logs)),
        )
        self.figures["exit statuses of workers"] = dict(self.run.exits)
        self._require(
            "exit statuses that are neither 0 nor a kill", (s for s in self.run.exits if s not in ("0", "-9", "-15"))
        )
        self._require("processes that served, and ended by SIGTERM", self.run.terminated & self.counts.keys())
        busiest = 0
        for text in logs:
            lines = Counter(re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ", text, re.MULTILINE))
            busiest = max(busiest, *lines.values(), 0)
        self.figures["log lines of one worker in its busiest second"] = busiest

    def _check_sometimes(self) -> None:
        totals: Counter[str] = Counter()
        for counts in self.counts.values():
            totals.update({name: value for name, value in counts.items() if isinstance(value, int)})
        self.figures["counted by the workers"] = dict(totals)
        self.figures["faults"] = dict(sorted(self.run.faults.items()))
        self.figures["server away, seconds"] = [round(end - begin, 2) for begin, end in self.run.restarts]
        minutes = self.run.options.minutes
        floors = {
            "SIGKILL": 8 * minutes * 0.5,
            "SIGSTOP": minutes,
            "backends terminated": 3 * minutes,
        }
        for name, floor in floors.items():
            if minutes >= 3 and self.run.faults[name] < floor:
                self.failures.append(f"too little went wrong: {name} {self.run.faults[name]} times, wanted {floor:g}")
        if minutes >= 3:
            for name, value in (
                ("leases lost", totals["fences"]),
                ("claims recovered", self.figures["claims recovered"]),
                ("bodies begun again", self.figures["bodies begun again"]),
                ("crash loops", self.figures["crash loops"]),
                ("server restarts", len(self.run.restarts)),
                ("runs of steps repeated", self.figures["of these again"]),
                ("resumptions", self.figures["resumptions of those that waited"]),
                ("children cancelled", self.figures["children cancelled with their parents"]),
                (
                    "replies to steps cut",
                    sum(n for name, n in self.run.faults.items() if name.startswith("reply cut: save_step")),
                ),
                ("replies cut", sum(n for name, n in self.run.faults.items() if name.startswith("reply cut"))),
            ):
                if value == 0:
                    self.failures.append(f"too little went wrong: no {name}")

    def print(self) -> None:
        options = self.run.options
        print(
            f"chaos: {options.executions} executions, {options.minutes:g} minutes, seed {options.seed}, "
            f"{options.workers} workers, lease {LEASE:g} s, sweep {SWEEP:g} s, grace {GRACE:g} s; "
            f"{self.seconds:.0f} s in all"
        )
        for what, value in self.figures.items():
            print(f"  {what:<56} {value}")
        for failure in self.failures:
            print(f"FAILED: {failure}")
        if not self.failures:
            print("  nothing lost, nothing finished twice, no invariant broken")

    def document(self) -> dict[str, Any]:
        options = {k: v for k, v in vars(self.run.options).items() if k not in ("json", "keep", "verbose")}
        return {
            "benchmark": "chaos",
            "options": options,
            "environment": {"cpus": os.cpu_count(), "load_average_after": os.getloadavg()},
            "settings": DURABLE,
            "figures": self.figures,
            "failures": self.failures,
        }


if __name__ == "__main__":
    main()
