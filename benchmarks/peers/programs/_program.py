"""What the programs of job queues share: ``prepare|enqueue|work|produce URL SETTINGS [COUNT|STARTS]``.

`work` prints ``ready`` once it would take jobs and ends with its input, when it writes the file STARTS; `produce` does
what `marks.pace` says.
"""

import asyncio
import json
import sys
from collections.abc import Callable

from ..marks import Starts


def main(prepare: Callable, enqueue: Callable, work: Callable, produce: Callable) -> None:
    """Run one of four functions of a URL and settings; `prepare`, `enqueue` and `work` may be coroutine functions."""
    command, url, settings, *more = sys.argv[1:]
    arguments = url, json.loads(settings)
    if command == "prepare":
        _call(prepare, *arguments)
    elif command == "enqueue":
        _call(enqueue, *arguments, int(more[0]))
    elif command == "produce":
        produce(*arguments)
    else:
        starts = Starts(more[0])
        try:
            _call(work, *arguments, starts)
        finally:
            starts.close()


def _call(function: Callable, *arguments: object) -> None:
    answer = function(*arguments)
    if asyncio.iscoroutine(answer):
        asyncio.run(answer)


def ready() -> None:
    print("ready", flush=True)


async def input_ends() -> None:
    """Wait until standard input does."""
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
