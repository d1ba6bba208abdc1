"""What a program that is a worker asks of the garbage collector."""

from __future__ import annotations

import subprocess
import sys


def test_what_is_there_is_set_aside_and_the_collector_still_works() -> None:
    """Frozen and switched off look alike in a benchmark; in a process that runs for months they do not."""
    program = """
import gc, weakref
from pgconductor import tune_garbage_collector

class Cycle:
    def __init__(self) -> None:
        self.me = self

tune_garbage_collector()
frozen = gc.get_freeze_count()
tune_garbage_collector()
assert gc.isenabled() and frozen > 1000 and gc.get_freeze_count() >= frozen
gone = weakref.ref(Cycle())
kept = [Cycle() for _ in range(200_000)]
assert gone() is None, "garbage in cycles is never collected"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_pgconductor_run_does_it_once_it_has_started() -> None:
    """The program that is made for it would be a fifth slower than one that asks for it."""
    program = """
import gc
from pgconductor.cli.target import Life

life = Life()
assert gc.get_freeze_count() == 0 and not life.has_started()
life.started()
assert gc.get_freeze_count() > 1000 and life.has_started()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
