"""A database as a careful administrator sets it up: the schema belongs to a role that is no superuser, and each program
has a login of its own with one kind of rights.

Roles belong to the whole server, so their names are random, and they are dropped at the end.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sql.database import Database, Session

from pgconductor.db.calls import Calls
from pgconductor.db.schema import migrate_sync
from pgconductor.testing import DatabaseClock

KINDS = ("producer", "worker", "viewer", "operator")


class Login(Session):
    """A session of an ordinary role, which may not set what `Session` sets."""

    def __init__(self, dsn: str, *, autocommit: bool) -> None:
        self.conn = psycopg.connect(dsn, autocommit=autocommit, options="-c statement_timeout=30s")
        self.calls = Calls("pgconductor")
        self.schema = "pgconductor"
        self.pid = self.conn.info.backend_pid


class Site:
    """The database, seen by its administrator, with logins for each kind and for a stranger."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._password = secrets.token_hex(8)
        self._token = secrets.token_hex(4)
        self._roles: list[str] = []
        self._sessions: list[Session] = []
        with psycopg.connect(dsn, autocommit=True) as conn:
            name = conn.info.dbname
            self.owner = self._make_role(conn, "owner")
            conn.execute(
                sql.SQL("alter database {} owner to {}").format(sql.Identifier(name), sql.Identifier(self.owner))
            )
            for kind in (*KINDS, "stranger"):
                self._make_role(conn, kind)
        with psycopg.connect(self.dsn_of(self.owner), autocommit=True) as conn:
            migrate_sync(conn)
            for kind in KINDS:
                conn.execute("select pgconductor.grant_role(%s, %s)", (kind, self.role(kind)))
        self.clock = DatabaseClock(dsn)
        self.admin = Database(dsn)
        self.admin.rows("select {s}._private_grant_rights()")  # so that the clock's objects are the owner's too

    def _make_role(self, conn: psycopg.Connection[tuple[object, ...]], kind: str) -> str:
        role = self.role(kind)
        create = sql.SQL("create role {} login password {}")
        conn.execute(create.format(sql.Identifier(role), sql.Literal(self._password)))
        self._roles.append(role)
        return role

    def new_role(self, kind: str) -> str:
        """One more login without any rights."""
        return self._make_role(self.admin.conn, kind)

    def role(self, kind: str) -> str:
        """The name of the login of a kind, or of "owner" or "stranger"."""
        return f"pgc_{self._token}_{kind}"

    def dsn_of(self, role: str) -> str:
        """How this login connects."""
        return make_conninfo(self.dsn, user=role, password=self._password)

    def session(self, kind: str, *, autocommit: bool = True) -> Login:
        """A session of the login of a kind."""
        return self.session_of(self.role(kind), autocommit=autocommit)

    def session_of(self, role: str, *, autocommit: bool = True) -> Login:
        """A session of a login."""
        session = Login(self.dsn_of(role), autocommit=autocommit)
        self._sessions.append(session)
        return session

    def grant(self, kind: str, role: str) -> None:
        """As the owner would."""
        self.session("owner").rows("select {s}.grant_role(%s, %s)", kind, role)

    def reset(self) -> None:
        """Close all sessions and empty the tables."""
        for session in self._sessions:
            session.close()
        self._sessions.clear()
        self.admin.reset()

    def close(self) -> None:
        """Drop the roles with all they have."""
        self.reset()
        for role in reversed(self._roles):
            name = sql.Identifier(role)
            if self.admin.value("select exists (select from pg_roles where rolname = %s)", role):
                self.admin.conn.execute(sql.SQL("reassign owned by {} to current_user").format(name))
                self.admin.conn.execute(sql.SQL("drop owned by {}").format(name))
                self.admin.conn.execute(sql.SQL("drop role {}").format(name))
        self.admin.close()


@contextmanager
def open_site(dsn: str) -> Iterator[Site]:
    """A site in an empty database."""
    site = Site(dsn)
    try:
        yield site
    finally:
        site.close()
