"""A database whose every transition is guarded, written down and checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sql.database import Database, open_database

from pgconductor.testing import DatabaseClock, Databases
from pgconductor.testing.audit import Violation, check_sync, install_audit_sync


class Audited:
    """`db` with the audit installed, on a movable clock."""

    def __init__(self, db: Database, clock: DatabaseClock) -> None:
        self.db = db
        self.clock = clock
        install_audit_sync(db.conn, db.schema_name)

    def reset(self) -> None:
        """As after a fresh install."""
        self.db.reset()
        self.db.rows("delete from {s}._test_audit")
        self.db.rows("delete from {s}._test_records")

    def check(self, *, owner_bound: float | None = None, settled: bool = False) -> list[Violation]:
        return check_sync(self.db.conn, self.db.schema_name, owner_bound=owner_bound, settled=settled)


@contextmanager
def open_audited(databases: Databases, schema: str = "pgconductor") -> Iterator[Audited]:
    """An `Audited` on a database of its own, in which `databases` has installed `schema`."""
    with databases.installed() as dsn, open_database(dsn, schema) as db:
        db.take_looks_for("short")
        yield Audited(db, DatabaseClock(dsn, schema))
