"""What a handler is told about its waits is told once, so a lost answer has to be made up for."""

from __future__ import annotations

import psycopg
import pytest
import trio
from faults.site import LIMIT

from pgconductor import Conductor, Context, Orchestrator
from pgconductor.testing.proxy import open_chaos_proxy


@pytest.mark.parametrize("how", ["request", "reply"])
async def test_wait_whose_end_was_told_in_a_lost_answer_is_told_again_in_the_first_claim_too(
    pgconductor_dsn: str, how: str
) -> None:
    """Counted as told by the database and never heard of by the handler, it would wait for ever."""
    async with open_chaos_proxy(pgconductor_dsn) as proxy:
        conductor = Conductor(proxy.dsn)

        async def long() -> None:
            (proxy.cut_request if how == "request" else proxy.cut_reply)(b".read_waits(")
            await trio.sleep(0.6)

        @conductor.task
        async def order(ctx: Context) -> str:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ctx.step, "long", long)  # nothing is suspended meanwhile
                nursery.start_soon(ctx.sleep, "nap", 0.2)
            return "done"

        async with conductor:
            handle = await order.invoke()
            with trio.fail_after(LIMIT):
                await Orchestrator(conductor, tasks=[order]).drain(60.0)
            assert await handle.result(timeout=0) == "done"
        assert proxy.cuts == 1
    with psycopg.connect(pgconductor_dsn) as conn:
        assert conn.execute("select attempt from pgconductor._private_finished").fetchall() == [(1,)]
