"""The primary dies under load and its standby is promoted: what is lost, and when does work go on?

    python -m benchmarks.failover --rounds 5

Two durable servers of this machine, the code of `tests/failover`: two producers, two workers, the stream cut before the
crash. Exits with 1 if a promise is broken: synchronous, nothing that was acknowledged is lost; asynchronous, only what
the standby had not heard of; nothing is finished twice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .harness import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from failover.rounds import Figures, run_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="failovers of each kind (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    results: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory(prefix="pgconductor-bench-") as folder:
        for kind in ("synchronous", "asynchronous"):
            results[kind] = []
            for number in range(options.rounds):
                path = Path(folder) / f"{kind} {number}"
                try:
                    figures = run_round(path, synchronous=kind == "synchronous", fsync="on")
                except AssertionError as error:
                    sys.exit(f"{kind}, round {number + 1}: {error}")
                results[kind].append(figures)
                print(f"{kind}: {figures}", flush=True)
    for kind, rounds in results.items():
        resumed = [figures.resumed_after for figures in rounds]
        print(
            f"{kind}: of {sum(each.acknowledged for each in rounds)} acknowledged"
            f" {sum(each.lost for each in rounds)} lost; the first execution finished"
            f" {statistics.median(resumed):.2f} s after the crash ({min(resumed):.2f} to {max(resumed):.2f})"
        )
    if options.json:
        document = {kind: [asdict(figures) for figures in rounds] for kind, rounds in results.items()}
        options.json.write_text(json.dumps({"benchmark": "failover", "rounds": document}, indent=1) + "\n")


if __name__ == "__main__":
    main()
