"""How many durable executions with 0, 2 and 10 no-op steps does one process finish in a second, beside public packages?

The sides take turns in each run, each on a fresh database of the same server. All executions are there before the
worker starts, and the tables are analysed in between, for all sides alike. The clock runs from the first execution
taken to the last one finished, as the side's own tables have them; the same tables must say that each execution
finished exactly once, with all its steps. `make bench-peers` installs the peers; what is not installed is left out.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

from .. import harness
from ..harness import Bench, BenchmarkError, Database, Process
from .absurd import ABSURD
from .dbos import DBOS
from .own import BareLoop, Pgconductor
from .peer import Peer

PEERS: dict[str, Peer] = {"pgconductor": Pgconductor(), "bare": BareLoop(), "dbos": DBOS, "absurd": ABSURD}


def main() -> None:
    parser = harness.parser(__doc__ or "")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 2, 10], help="steps per execution")
    parser.add_argument("--executions", type=int, default=5_000, help="per side, number of steps and run")
    parser.add_argument("--processes", type=int, default=1, help="workers of each side; the bare loop is always one")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="the sides")
    parser.add_argument("--set", nargs="+", default=[], metavar="PEER.NAME=JSON", help="replace a setting of a side")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one measurement may take")
    options = parser.parse_args()
    for setting in options.set:
        path, _, value = setting.partition("=")
        peer, _, name = path.partition(".")
        if peer not in PEERS or name not in PEERS[peer].settings:
            parser.error(f"--set {setting}: there is no such setting")
        PEERS[peer].settings[name] = json.loads(value)

    def measure(bench: Bench) -> None:
        peers: list[Peer] = []
        for peer in (PEERS[name] for name in options.peers):
            if peer.is_installed():
                peers.append(peer)
                bench.facts[peer.name] = {**peer.versions(), **peer.settings}
                bench.say(f"{peer.name}: {bench.facts[peer.name]}")
            else:
                bench.say(f"{peer.name}: left out, not installed; make bench-peers installs it")
        sides = [(peer, steps) for steps in options.steps for peer in peers if _takes(bench, peer, steps)]
        for _ in range(options.runs):
            for peer, steps in sides:
                with bench.database() as database:
                    _measure(database, peer, options.executions, steps, options.processes, options.timeout)
        _print_table(bench, sides)

    harness.run("peers.steps", options, measure)


def _takes(bench: Bench, peer: Peer, steps: int) -> bool:
    if peer.takes(steps):
        return True
    bench.say(f"{peer.name}: left out with {steps} steps, it has none yet")
    return False


def _measure(database: Database, peer: Peer, count: int, steps: int, processes: int, timeout: float) -> None:
    bench = database.bench
    peer.prepare(database)
    peer.enqueue(database, count, steps)
    database.conn.execute("vacuum analyze")
    with ExitStack() as stack:
        workers: list[Process] = []
        for _ in range(processes):
            worker = peer.start(database)
            if worker is None:
                break
            workers.append(stack.enter_context(worker))
        for worker in workers:
            if worker.line() != ["ready"]:
                raise BenchmarkError(f"the worker of {peer.name} does not get ready")
        deadline = time.monotonic() + timeout
        while not peer.is_done(database):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{peer.name}: not done within {timeout:g} s: {peer.outcome(database)}")
            time.sleep(0.2)
        peaks = [worker.peak_memory() for worker in workers]
    outcome = peer.outcome(database)
    bench.checked()
    complaint = outcome.complaint(count, steps)
    if complaint is not None:
        bench.problem(f"{peer.name}: {complaint}")
    bench.note(_label(peer, steps), count / outcome.seconds, "executions/s")
    if peaks:
        bench.note(f"{_label(peer, steps)}, peak memory", sum(peaks) / 2**20, "MiB")


def _label(peer: Peer, steps: int) -> str:
    return f"{peer.name}, {steps} steps"


def _print_table(bench: Bench, sides: list[tuple[Peer, int]]) -> None:
    """Print the medians with their ratios to pgconductor, or to the first side where it is not measured."""
    print(f"{'steps':>5}  {'side':<16}{'executions/s':>14}{'ratio':>9}{'peak MiB':>10}   [least–greatest executions/s]")
    for peer, steps in sides:
        beside = [other for other, same in sides if same == steps]
        base = next((other for other in beside if isinstance(other, Pgconductor)), beside[0])
        label = _label(peer, steps)
        rates = bench.samples(label)
        if peer is not base:
            bench.ratio(f"{peer.name} / {base.name}, {steps} steps", label, _label(base, steps))
        peak = f"{bench.median(f'{label}, peak memory'):.0f}" if bench.samples(f"{label}, peak memory") else "–"
        ratio = bench.median(label) / bench.median(_label(base, steps))
        spread = f"[{min(rates):,.0f}–{max(rates):,.0f}]"
        print(f"{steps:>5}  {peer.name:<16}{bench.median(label):>14,.0f}{ratio:>9.3f}{peak:>10}   {spread}")


if __name__ == "__main__":
    main()
