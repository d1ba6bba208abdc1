"""When jobs were sent, committed and started, as the processes themselves remember it (CLOCK_MONOTONIC, nanoseconds).

Every side's handler does the same and nothing else: it appends a pair. While the worker runs, a line ``started COUNT``
goes out at most every 10 ms, so that the benchmark need not ask the server how far it is; at the end all pairs are
written to a file. Needs the standard library only, since the peers' programs use it in environments of their own;
`node/program.mjs` does the same for Node, whose ``process.hrtime`` is the same clock.
"""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path


class Starts:
    """Remembers starts from its making to `close`, which writes them to `path`."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._pairs: list[tuple[int, int]] = []
        self._closing = threading.Event()
        self._reporter = threading.Thread(target=self._report, name="starts")
        self._reporter.start()

    def add(self, number: int) -> None:
        """The handler of job `number` begins."""
        self._pairs.append((number, time.monotonic_ns()))

    def _report(self) -> None:
        reported = 0
        while not self._closing.wait(0.01):
            count = len(self._pairs)
            if count != reported:
                print("started", count, flush=True)
                reported = count

    def close(self) -> None:
        self._closing.set()
        self._reporter.join()
        with self._path.open("wb") as file:
            array("q", [value for pair in self._pairs for value in pair]).tofile(file)


def read_starts(paths: Iterable[Path]) -> list[tuple[int, int]]:
    """Return number and time of each start that workers which have ended wrote."""
    pairs: list[tuple[int, int]] = []
    for path in paths:
        flat = array("q", path.read_bytes())
        pairs += zip(flat[::2], flat[1::2], strict=True)
    return pairs


def pace(insert: Callable[[int], object]) -> None:
    """Say ``ready``, then do what each line ``COUNT GAP FIRST`` of standard input asks for, until it ends.

    COUNT jobs are inserted GAP seconds apart, numbered from FIRST; `insert` returns when the commit is known. Then a
    line for each says its number, when it was sent and when its commit was known.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        count, gap, first = line.split()
        times: list[tuple[int, int, int]] = []
        next_at = time.monotonic()
        for number in range(int(first), int(first) + int(count)):
            time.sleep(max(0.0, next_at - time.monotonic()))
            sent_at = time.monotonic_ns()
            insert(number)
            times.append((number, sent_at, time.monotonic_ns()))
            next_at += float(gap)
        print("\n".join(f"{number} {sent} {committed}" for number, sent, committed in times), flush=True)
