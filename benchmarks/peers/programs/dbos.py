"""DBOS: ``prepare|enqueue|work URL SETTINGS [COUNT STEPS]``; `work` prints ``ready`` and ends with its input.

Asynchronous workflows and steps on one registered queue, as in the maker's own benchmark of its queues.
``work URL SETTINGS STARTS`` and ``produce URL SETTINGS`` as in `_program`.
"""

import json
import os
import sys

from dbos import DBOS, DBOSClient

from ..marks import Starts, pace

APP, QUEUE = "bench-app", "bench-queue"
starts: Starts | None = None


@DBOS.step()
async def noop(number: int) -> dict[str, int]:
    return {"step": number}


@DBOS.workflow(name="flow")
async def flow(n: int, steps: int) -> dict[str, int]:
    if starts is not None:
        starts.add(n)
    done = 0
    for number in range(1, steps + 1):
        done = (await noop(number))["step"]
    return {"n": n, "steps": done}


def launch(url: str, settings: dict) -> None:
    config = {"name": APP, "system_database_url": url, "log_level": "WARNING", "executor_id": f"bench-{os.getpid()}"}
    DBOS(config=config | settings)
    DBOS.launch()


def enqueue(url: str, count: int, steps: int = 0) -> None:
    client = DBOSClient(system_database_url=url, application_name=APP)
    with client._sys_db.engine.begin() as conn:  # one commit, so that preparing does not take longer than measuring
        for n in range(count):
            client.enqueue_in_transaction(conn, {"queue_name": QUEUE, "workflow_name": "flow"}, n, steps)
    client.destroy()


def produce(url: str) -> None:
    client = DBOSClient(system_database_url=url, application_name=APP)
    pace(lambda n: client.enqueue({"queue_name": QUEUE, "workflow_name": "flow"}, n, 0))
    client.destroy()


def main() -> None:
    global starts
    command, url, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if command == "produce":
        produce(url)
        return
    if command == "enqueue":
        enqueue(url, *map(int, sys.argv[4:]))
        return
    queue_settings = {name: settings.pop(name) for name in ("worker_concurrency", "polling_interval_sec")}
    launch(url, settings)
    if command == "prepare":
        DBOS.register_queue(QUEUE, **queue_settings)
    else:
        starts = Starts(sys.argv[4]) if sys.argv[4:] else None
        print("ready", flush=True)
        sys.stdin.read()
    DBOS.destroy()
    if starts is not None:
        starts.close()


if __name__ == "__main__":
    main()
