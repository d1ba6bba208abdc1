"""A process of concurrent producers: one connection each, one single-row `invoke` after the other, each its own commit.

All connections are driven from one loop over libpq's non-blocking calls, because the producers share the machine with
what is measured: threads would spend more on taking turns than on inserting. Closed loop by default; with ``--rate``
inserts are due at fixed times, and count from then even if no connection was free to send one, with ``--burst`` and
``--pause`` all rest in between. Prints ``ready``, waits for a line,
then prints how many were committed in how many seconds (pauses do not count).
"""

from __future__ import annotations

import argparse
import selectors
import sys
import time
from array import array
from pathlib import Path

from psycopg import pq

_INVOKE = b"select pgconductor.invoke($1, $2::jsonb, $3)"


class Producer:
    """One connection."""

    def __init__(self, dsn: str, task: str, queue: str) -> None:
        self.pgconn = pq.PGconn.connect(dsn.encode())
        if self.pgconn.status != pq.ConnStatus.OK:
            raise SystemExit(f"cannot connect: {self.pgconn.get_error_message()}")
        result = self.pgconn.prepare(b"invoke", _INVOKE)
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise SystemExit(f"cannot prepare: {result.get_error_message()}")
        self.pgconn.nonblocking = 1
        self._task = task.encode()
        self._queue = queue.encode()
        self.number = 0
        self.begun = 0

    def send(self, number: int, due: float | None = None) -> None:
        """`due`: when it was to be sent (CLOCK_MONOTONIC, seconds), if not now."""
        self.number = number
        self.begun = time.monotonic_ns() if due is None else int(due * 1e9)
        self.pgconn.send_query_prepared(b"invoke", [self._task, b'{"n": %d}' % number, self._queue])
        while self.pgconn.flush():
            pass

    def receive(self) -> bool:
        """Read what has come; is the reply complete?"""
        self.pgconn.consume_input()
        if self.pgconn.is_busy():
            return False
        while (result := self.pgconn.get_result()) is not None:
            if result.status != pq.ExecStatus.TUPLES_OK:
                raise SystemExit(f"an invoke failed: {result.get_error_message()}")
        return True


class Producers:
    """All connections; `insert` is one stretch of work."""

    def __init__(self, producers: list[Producer], first: int, *, is_paced: bool) -> None:
        """`is_paced`: they will insert at a rate, so waits must end in time: epoll's are of whole milliseconds."""
        self._producers = producers
        self._next = first
        self._selector = selectors.SelectSelector() if is_paced else selectors.DefaultSelector()
        for producer in producers:
            self._selector.register(producer.pgconn.socket, selectors.EVENT_READ, producer)
        self.times = array("q")
        self.count = 0

    def insert(self, seconds: float, rate: float) -> float:
        """Insert for so many seconds; returns how many it took until the last reply."""
        began = time.monotonic()
        deadline = began + seconds
        idle = list(self._producers)
        begun = 0
        busy = 0
        while True:
            now = time.monotonic()
            if now < deadline:
                allowed = len(idle) if not rate else min(len(idle), int((now - began) * rate) + 1 - begun)
                for _ in range(allowed):
                    idle.pop().send(self._next, began + begun / rate if rate else None)
                    self._next += 1
                    begun += 1
                    busy += 1
            elif not busy:
                return time.monotonic() - began
            next_at = began + begun / rate if rate else deadline
            timeout = None if not idle else max(0.0, min(next_at, deadline) - now)
            for key, _ in self._selector.select(timeout):
                producer: Producer = key.data
                if producer.receive():
                    self.times.extend((producer.number, producer.begun, time.monotonic_ns()))
                    self.count += 1
                    busy -= 1
                    idle.append(producer)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dsn")
    parser.add_argument("--queue", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--burst", type=float, default=0.0)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--times", type=Path)
    options = parser.parse_args()
    producers = Producers(
        [Producer(options.dsn, options.task, options.queue) for _ in range(options.connections)],
        options.first,
        is_paced=options.rate > 0,
    )
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    worked = 0.0
    while worked < options.seconds:
        left = options.seconds - worked
        worked += producers.insert(min(left, options.burst or left), options.rate)
        time.sleep(options.pause)
    if options.times is not None:
        options.times.write_bytes(producers.times.tobytes())
    print("produced", producers.count, worked, flush=True)


if __name__ == "__main__":
    main()
