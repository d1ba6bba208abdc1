"""An execution that exists if, and only if, the transaction it belongs to commits. Needs `service.py` running.

export PGCONDUCTOR_DSN=postgresql://localhost/app
python transactional.py
"""

from __future__ import annotations

import os

import psycopg
from service import conductor, greet

with psycopg.connect(os.environ["PGCONDUCTOR_DSN"]) as conn, conductor.sync():
    with conn.transaction():
        conn.execute("create table if not exists customer (name text)")

    try:
        with conn.transaction():
            conn.execute("insert into customer values ('Mallory')")
            greet.options(conn=conn).invoke(name="Mallory")
            raise PermissionError("Mallory is not welcome")
    except PermissionError as error:
        print(f"rolled back, row and execution: {error}")

    with conn.transaction():
        conn.execute("insert into customer values ('Ada')")
        handle = greet.options(conn=conn, dedupe_key="welcome Ada").invoke(name="Ada")
    print(handle.result(timeout=30))  # after the commit: before it, nobody else can see the execution

    # From plain SQL: any language, any client, a trigger.
    with conn.transaction():
        conn.execute("select pgconductor.invoke('greet', jsonb_build_object('name', name)) from customer")
