"""The order workflow of examples/order.py, while its processes are killed at random."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psycopg
from cli.programs import SOURCE, environment
from docs.pages import ROOT

KILLS = 6
ITEMS = ["tea", "rice"]
LIVE = "select from pgconductor.executions where state in ('scheduled', 'ready', 'running', 'waiting')"
PROGRAM = """
import trio, order
from pgconductor import Orchestrator
trio.run(Orchestrator(order.conductor, tasks=[order.order, order.ship], lease=2.0, handle_signals=False).run)
"""


def test_every_order_is_paid_once_approved_once_and_shipped_once(pgconductor_dsn: str, tmp_path: Path) -> None:
    """A customer who pays twice because a process was killed between the payment and its record."""
    rng = random.Random(5)
    log = (tmp_path / "log").open("w")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**environment(PGCONDUCTOR_DSN=pgconductor_dsn), "PYTHONPATH": f"{SOURCE}:{ROOT / 'examples'}"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip

    processes = [start(), start()]
    try:
        with psycopg.connect(pgconductor_dsn, autocommit=True) as conn:
            conn.execute("create table payment (number int, amount int)")
            conn.execute("create table approval (number int, promise uuid)")
            until, kills = time.monotonic() + 100, 0
            next_kill = time.monotonic() + 0.8
            invoked = 0
            while kills < KILLS or conn.execute(LIVE).fetchone() is not None:
                if kills < KILLS:
                    payload = {"number": invoked, "items": ITEMS, "price": 40}
                    conn.execute("select pgconductor.invoke('order', %s::jsonb)", [json.dumps(payload)])
                    invoked += 1
                assert time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
                if kills < KILLS and time.monotonic() > next_kill:
                    victim = rng.randrange(2)
                    processes[victim].kill()
                    processes[victim].wait()
                    processes[victim] = start()
                    kills += 1
                    next_kill = time.monotonic() + rng.uniform(0.2, 0.6)
                for number, promise in conn.execute("select number, promise from approval").fetchall():
                    if number % 4:
                        conn.execute("select pgconductor.resolve_promise(%s, '\"yes\"')", [promise])
                    else:
                        conn.execute("select pgconductor.reject_promise(%s, 'no')", [promise])
                time.sleep(0.05)
            orders = range(invoked)
            refused = [n for n in orders if n % 4 == 0]
            payments = "select number, array_agg(amount order by amount desc) from payment group by 1 order by 1"
            assert conn.execute(payments).fetchall() == [(n, [40, -40] if n in refused else [40]) for n in orders]
            assert conn.execute("select count(*), count(distinct number) from approval").fetchall() == [
                (invoked, invoked)
            ]
            ended = conn.execute(
                "select (payload ->> 'number')::int, state::text, result from pgconductor.executions"
                " where task = 'order' order by 1"
            ).fetchall()
            assert ended == [
                (
                    n, "completed",
                    ["refunded"] if n in refused else [f"{item} of order {n} is on its way" for item in ITEMS],
                )
                for n in orders
            ]  # fmt: skip
            shipped = conn.execute("select count(*) from pgconductor.executions where task = 'ship'").fetchone()
            assert shipped == (2 * (invoked - len(refused)),)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        log.close()
