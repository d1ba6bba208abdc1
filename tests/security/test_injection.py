"""Values that look like SQL, through every argument of the clients and the engine: they come back as they were."""

from __future__ import annotations

import builtins
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from security.site import Site

from pgconductor import Conductor, Orchestrator
from pgconductor.db.schema import migrate_sync
from pgconductor.testing import Databases

CORPUS = [
    "'; drop table public.do_not_drop; --",
    '"; drop table public.do_not_drop; --',
    "\\'; drop table public.do_not_drop; --",
    "$$; drop table public.do_not_drop; $$",
    "$body$; drop table public.do_not_drop; $body$",
    "%s %(a)s %% {0} {s} @schema@ @schema_literal@",
    "') ; drop table public.do_not_drop; select ('",
    "}','{\"a\": 1}'); drop table public.do_not_drop; --",
    "*/ drop table public.do_not_drop; /*",
    "{a,b}\" , NULL",
    "cos\nsystem\n(S'rm -rf /'\ntR.",  # a pickle that runs a command
]  # fmt: skip


@pytest.mark.parametrize("value", CORPUS)
async def test_values_come_back_as_they_were_and_run_nothing(
    site: Site, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somewhere on its way a value is pasted into SQL, or into a name that is imported."""
    site.admin.rows("create table if not exists public.do_not_drop ()")
    conductor = Conductor(site.dsn_of(site.role("worker")))

    @conductor.task(name=value, queue=value, max_attempts=1)
    async def task(argument: str, other: dict[str, Any]) -> dict[str, Any]:
        if other:
            return {value: argument, "other": other}
        raise ValueError(value)

    imported: list[str] = []
    real = builtins.__import__

    def watch(name: str, *arguments: Any, **keywords: Any) -> Any:
        imported.append(name)
        return real(name, *arguments, **keywords)

    worker = conductor.create_worker(queue=value, tasks=[task])
    async with conductor:
        good = await task.options(dedupe_key=value, tags=[value]).invoke(value, {value: value})
        assert (await task.options(dedupe_key=value).invoke("second", {})).id == good.id
        bad = await conductor.invoke(value, {"argument": value, "other": {}}, queue=value)
        later = await task.options(delay=3600).invoke(value, {})
        assert str(await later.cancel(reason=value)) == "cancelled"
        # A name that a row holds and no program has is nobody's.
        unknown = await conductor.invoke(f"os.system {value}", {}, queue=value)
        monkeypatch.setattr(builtins, "__import__", watch)
        await Orchestrator(conductor, workers=[worker], migrate=False).drain()
        monkeypatch.undo()
        assert await good.result(5) == {value: value, "other": {value: value}}
    assert [name for name in imported if "os.system" in name or value in name] == []
    rows = site.admin.rows("select id, task, queue, state::text, payload from {s}.executions")
    assert {(i, task, queue) for i, task, queue, *_ in rows} == {
        (good.id, value, value),
        (bad.id, value, value),
        (later.id, value, value),
        (unknown.id, f"os.system {value}", value),
    }
    assert {state for i, *_, state, _ in rows if i == unknown.id} == {"ready"}
    assert site.admin.finished(bad.id, "errors -> 0 ->> 'message'") == [(value.replace("\n", "\\n"),)]
    assert site.admin.finished(later.id, "cancel_reason") == [(value,)]
    assert site.admin.value("select count(*) from public.do_not_drop") == 0


def test_schema_of_any_name_has_its_rights(pgconductor_databases: Databases) -> None:
    """The schema's name is part of what grants and of what maintains, and of no other statement."""
    name = "a'b\"c %s $1 \\ \u00e9 {s} @schema@"
    with pgconductor_databases.empty() as dsn, psycopg.connect(dsn, autocommit=True) as conn:
        migrate_sync(conn, name)
        schema = sql.Identifier(name)

        def ask(text: LiteralString) -> Any:
            row = conn.execute(sql.SQL(text).format(s=schema)).fetchone()
            assert row is not None
            return row[0]

        assert ask("select {s}.register_queue('q')") == 1
        ask("select {s}.grant_role('viewer', 'pg_monitor')")
        assert ask("select role from {s}.granted_roles()") == "pg_monitor"
        ask("select {s}.revoke_role('viewer', 'pg_monitor')")
        conn.execute(
            sql.SQL("update {s}._private_expiry_slots set expires_upto = now() - interval '1 h' where no = 5").format(
                s=schema
            )
        )
        assert ask("select slots_emptied from {s}.maintain()") == 1
        assert ask("select {s}._private_doctor() -> 'queues' -> 0 ->> 'has_partition'") == "true"
