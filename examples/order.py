"""An order as a durable workflow: payment in a transaction, approval by a human, shipping by children.

export PGCONDUCTOR_DSN=postgresql://localhost/app
pgconductor run order:orchestrator                                # as many as you like; kill them as you like
pgconductor invoke order '{"number": 1, "items": ["tea", "rice"], "price": 40}'
psql -c "select promise from approval" ; pgconductor promise resolve PROMISE '"yes"'
"""

from __future__ import annotations

import psycopg

from pgconductor import Conductor, Context, Orchestrator, PromiseRejected

conductor = Conductor()


@conductor.task
async def ship(ctx: Context, number: int, item: str) -> str:
    await ctx.sleep("the van leaves", 0.2)
    return f"{item} of order {number} is on its way"


async def ask(conn: psycopg.AsyncConnection, number: int, promise: str) -> None:
    """Somebody finds it in this table, and resolves the promise: yes or no."""
    await conn.execute("insert into approval (number, promise) values (%s, %s)", [number, promise])


async def pay(conn: psycopg.AsyncConnection, number: int, amount: int) -> int:
    """Exactly once: the payment and the record of this step commit together."""
    await conn.execute("insert into payment (number, amount) values (%s, %s)", [number, amount])
    return amount


@conductor.task
async def order(ctx: Context, number: int, items: list[str], price: int) -> list[str]:
    paid = await ctx.transaction("pay", pay, number, price)
    approval = await ctx.promise("approval")
    await ctx.transaction("ask", ask, number, str(approval.id))
    try:
        await approval.result(timeout=30 * 86400)
    except (PromiseRejected, TimeoutError):  # compensate here, not in finally: that runs at every suspension
        await ctx.transaction("refund", pay, number, -paid)
        return ["refunded"]
    async with ctx.nursery("shipping") as nursery:
        parcels = [nursery.invoke(ship, number, item) for item in items]
    return [await parcel.result() for parcel in parcels]


orchestrator = Orchestrator(conductor, tasks=[order, ship])
TABLES = """create table if not exists payment (number int, amount int);
create table if not exists approval (number int, promise uuid)"""
