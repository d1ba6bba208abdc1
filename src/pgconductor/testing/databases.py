"""Fresh databases, each a clone of a template, so that a test pays for a file copy and not for the migrations.

Owns the databases it makes and nothing else on the server: names begin with ``pgconductor_test_`` and a random part,
so that several test runs and xdist workers may share a server. A database is dropped with its sessions, so a test
that leaks connections harms none.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from .server import DatabaseServer


class Databases:
    """Makes and drops databases on `server`; the template with `schema` is made when first needed. Close it at the
    end.
    """

    def __init__(self, server: DatabaseServer, schema: str = "pgconductor") -> None:
        self._server = server
        self._schema = schema
        self._token = secrets.token_hex(4)
        self._made = 0
        self._template: str | None = None
        self._admin = psycopg.connect(server.dsn("postgres"), autocommit=True)

    @contextmanager
    def empty(self) -> Iterator[str]:
        """Give the DSN of a fresh empty database."""
        with self._database(template="template0") as dsn:
            yield dsn

    @contextmanager
    def installed(self) -> Iterator[str]:
        """Give the DSN of a fresh database in which the schema is installed."""
        if self._template is None:
            self._template = self._make_template()
        with self._database(self._template) as dsn:
            yield dsn

    def close(self) -> None:
        """Drop the template and close the connection."""
        if self._template is not None:
            self._drop(self._template)
        self._admin.close()

    @contextmanager
    def _database(self, template: str) -> Iterator[str]:
        self._made += 1
        name = f"pgconductor_test_{self._token}_{self._made}"
        self._create(name, template)
        try:
            yield self._server.dsn(name)
        finally:
            self._drop(name)

    def _make_template(self) -> str:
        from ..db.schema import migrate_sync

        name = f"pgconductor_test_{self._token}_template"
        self._create(name, "template0")
        with psycopg.connect(self._server.dsn(name), autocommit=True) as conn:
            migrate_sync(conn, self._schema)
            conn.execute("analyze")
        return name

    def _create(self, name: str, template: str) -> None:
        self._admin.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template))
        )

    def _drop(self, name: str) -> None:
        self._admin.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name)))
