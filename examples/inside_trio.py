"""Inside a Trio application: the orchestrator is one more task of the application's own nursery.

export PGCONDUCTOR_DSN=postgresql://localhost/app
python inside_trio.py                      # or, without a database: python inside_trio.py --embedded
"""

from __future__ import annotations

import sys

import trio

from pgconductor import Conductor, ExecutionFailed, Orchestrator

conductor = Conductor(embedded="--embedded" in sys.argv)


@conductor.task(max_attempts=1)
async def reciprocal(number: int) -> float:
    return 1 / number


orchestrator = Orchestrator(conductor, tasks=[reciprocal])


async def main() -> None:
    async with conductor, trio.open_nursery() as nursery:
        await nursery.start(orchestrator.run)  # returns when its workers claim
        handles = await reciprocal.invoke_many([reciprocal.bind(number) for number in (4, 2, 1, 0)])
        for handle in handles:
            try:
                print(await handle.result(timeout=10))
            except ExecutionFailed as error:
                print(error)
        orchestrator.stop()


if __name__ == "__main__":
    trio.run(main)
