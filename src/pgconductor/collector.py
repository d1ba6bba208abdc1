"""The garbage collector of a process that is a worker and little else."""

from __future__ import annotations

import gc

_GENERATIONS = (10_000, 20, 50)


def tune_garbage_collector() -> None:
    """Spare the garbage collector what it need not look at: modules and declarations, and executions on their way.

    A worker has thousands of executions in its hands for some milliseconds each. Python's collector takes that for
    growth, and goes through all that the process has, again and again: a fifth of a busy worker's time
    (benchmarks/NOTES.md). This collects once, sets aside what is there now, which is never looked at again
    (`gc.freeze`), and makes the collector wait for more. It changes the whole process and is not undone, so it is for
    programs, not for libraries: call it once, when everything is imported and the orchestrator has started, as
    ``pgconductor run`` does. Garbage in cycles stays a little longer. Takes some 10 ms; any number of calls do no harm.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GENERATIONS)
