"""What the tests of the SQL verbs stand on: a session with the verbs on it, and a database of sessions.

Plain synchronous psycopg. A verb runs through `pgconductor.db.calls`, so its text and casts are tested with it. Races
are driven by gates, never by sleeps: a transaction is held open, a rival is started on a thread, and the test goes on
when the server says that the rival has ended or waits for a lock (`Database.settle`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic
from typing import Any, Literal, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from pgconductor.db.call import Call
from pgconductor.db.calls import Calls, Claim, NewExecution, WorkerRow
from pgconductor.db.execute import run_sync
from pgconductor.model import Claimed, Invoked, Outcome, QueueStatus

T = TypeVar("T")

Row = tuple[Any, ...]
Dump = dict[str, list[str]]

LONG = 1000.0  # seconds of lease that no test outlives


_RESET = """
do $$
declare
    v_name text;
begin
    for v_name in
        select relname from pg_class where relnamespace = '{s}'::regnamespace and relkind = 'r'
            and relname ~ '^_private_queue_[1-9]'
    loop
        execute format('drop table {s}.%I', v_name);
    end loop;
    -- TRUNCATE makes new files, which takes longer than most of the tests.
    for v_name in
        select relname from pg_class where relnamespace = '{s}'::regnamespace and relkind = 'r'
            and relname ~ '^_private_'
            and relname not in ('_private_expiry_slots', '_private_migrations', '_private_schema')
            and (relname !~ '^_private_finished_' or pg_relation_size(format('{s}.%I', relname)::regclass) > 0)
    loop
        execute format(case when pg_relation_size(format('{s}.%I', v_name)::regclass) > 1000000
            then 'truncate {s}.%I cascade' else 'delete from {s}.%I' end, v_name);
    end loop;
    perform setval(pg_get_serial_sequence('{s}._private_queues', 'no'), 1, false);
    perform setval(format('{s}._private_place_%s_key', k), 1, false) from generate_series(0, 7) as k;
    update {s}._test_clock set shift = '0';
    update {s}._private_expiry_slots set must_check = is_far,
        expires_upto = case when no < 2 then 'infinity' else '-infinity' end::timestamptz,
        opened_at = case when no = 1 then now() end, check_at = case when no = 1 then now() end;
    perform {s}._private_advance_slots({s}._private_clock());
end $$
"""


class Session:
    """One connection. In a query, ``{s}`` stands for the schema."""

    has_family = True  # what `flush` says of executions of which nothing else is said

    def __init__(self, dsn: str, schema: str, *, autocommit: bool) -> None:
        # A wait that never ends fails, with a name, before the test's own time limit. A deadlock is told at once.
        options = "-c statement_timeout=30s -c deadlock_timeout=50ms"
        self.conn = psycopg.connect(dsn, autocommit=autocommit, options=options)
        self.calls = Calls(schema)
        self.schema = sql.Identifier(schema).as_string()
        self.pid = self.conn.info.backend_pid

    def rows(self, query: str, *params: object) -> list[Row]:
        """Execute, and return the rows, none for a statement without any."""
        text = query.replace("{s}", self.schema.replace("%", "%%") if params else self.schema)
        cursor = self.conn.execute(text.encode(), params or None)
        return cursor.fetchall() if cursor.description else []

    def value(self, query: str, *params: object) -> Any:
        """The first column of the first row."""
        return self.rows(query, *params)[0][0]

    def run(self, call: Call[T]) -> T:
        return run_sync(self.conn, call)

    def commit(self) -> None:
        self.conn.commit()

    def rollback(self) -> None:
        self.conn.rollback()

    def close(self) -> None:
        self.conn.close()

    # --- the verbs, with what most tests want as defaults ---

    def register_queue(self, queue: str = "q") -> int:
        """Where each statement is a transaction, published too, as soon as nobody is in the way."""
        no = self.run(self.calls.register_queue(queue))
        for _ in range(50 if self.conn.autocommit else 0):
            if self.run(self.calls.publish_queues()) == 0:
                break
        return no

    def register_orchestrator(self, queue: str = "q", *, lease: float = LONG, tasks: Sequence[str] = ("t",)) -> UUID:
        owner = uuid4()
        self.run(self.calls.register_orchestrator(owner, "test", lease, "1", 1, [WorkerRow(queue, tasks, 10)]))
        return owner

    def invoke(
        self,
        queue: str | None = "q",
        task: str = "t",
        *,
        payload: object = None,
        priority: int = 0,
        delay: float | None = None,
        key: str | None = None,
    ) -> UUID:
        text = json.dumps({} if payload is None else payload)
        return self.invoke_many(NewExecution(task, text, queue, priority, None, delay, key))[0].id

    def invoke_many(self, *executions: NewExecution) -> list[Invoked]:
        return self.run(self.calls.invoke_many(executions))

    def look(self, owner: UUID, queue: str = "q", *, tasks: Sequence[str] = ("t",), limit: int = 100) -> Claim:
        """A claim, with what an empty one tells."""
        return self.run(self.calls.claim(queue, owner, list(tasks), limit))

    def claim(
        self,
        owner: UUID,
        queue: str = "q",
        *,
        tasks: Sequence[str] = ("t",),
        limit: int = 100,
        version: str | None = None,
    ) -> list[Claimed]:
        if version is None:
            return self.look(owner, queue, tasks=tasks, limit=limit).claimed
        versions: list[str | None] = [version] * len(tasks)
        return self.run(self.calls.claim(queue, owner, list(tasks), limit, versions=versions)).claimed

    def flush(self, owner: UUID, *outcomes: Outcome, has_family: bool | None = None) -> dict[UUID, str]:
        has_family = self.has_family if has_family is None else has_family
        return self.run(self.calls.flush(owner, outcomes, has_family=has_family))

    def recover(self, queue: str = "q") -> tuple[int, int]:
        recovered, failed = self.rows("select recovered, failed from {s}.recover(%s)", queue)[0]
        return recovered, failed

    def queue_status(self) -> list[QueueStatus]:
        return self.run(self.calls.queue_status())

    def claimed(self, execution: UUID, claim_no: int) -> Claimed:
        """A claim as its owner remembers it, as far as a flush needs it."""
        return Claimed(execution, claim_no, "t", 1, None, "{}", 0.0)

    def live(self, execution: UUID, columns: str = "state::text, attempt, crashes, claim_no") -> Row | None:
        """Columns of a live execution, None if there is none."""
        rows = self.rows(f"select {columns} from {{s}}._private_executions where id = %s", execution)
        return rows[0] if rows else None

    def live_row(self, execution: UUID, columns: str) -> Row:
        """Columns of an execution that must be live."""
        row = self.live(execution, columns)
        assert row is not None
        return row

    def finished(self, execution: UUID, columns: str = "state::text, attempt, crashes, claim_no") -> list[Row]:
        """Columns of the finished rows of an execution."""
        return self.rows(f"select {columns} from {{s}}._private_finished where id = %s", execution)

    def dump(self) -> Dump:
        """Every row of every table of the schema, as text."""
        tables = self.rows(
            "select relname, oid::regclass::text from pg_class where relnamespace = %s::regnamespace"
            " and relkind in ('r', 'p') and not relispartition and relname not like '\\_test\\_%%' order by 1",
            self.schema,
        )
        return {
            name: [row for (row,) in self.rows(f"select t::text from {table} t order by 1")] for name, table in tables
        }


class Database(Session):
    """A database with the schema: a session in autocommit, and more sessions on demand, closed with it."""

    def __init__(self, dsn: str, schema: str = "pgconductor") -> None:
        super().__init__(dsn, schema, autocommit=True)
        self.dsn = dsn
        self.schema_name = schema
        self._sessions: list[Session] = []
        self._threads = ThreadPoolExecutor(max_workers=100)

    def take_looks_for(self, kind: Literal["short", "long"]) -> None:
        """Let claims take each look from the front for a short one, however busy the machine is, or for a long one."""
        span = "1 hour" if kind == "short" else "0"
        self.rows(
            "create or replace function {s}._private_long_look() returns interval language sql immutable parallel safe"
            f" return interval '{span}'"
        )

    def session(self, *, autocommit: bool = False) -> Session:
        """One more session; without `autocommit`, its first statement opens a transaction."""
        session = Session(self.dsn, self.schema_name, autocommit=autocommit)
        self._sessions.append(session)
        return session

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Do `work` on a thread of its own."""
        return self._threads.submit(work)

    def blockers(self, session: Session) -> list[int]:
        """The processes that `session` waits for."""
        return list(self.value("select pg_blocking_pids(%s)", session.pid))

    def settle(self, session: Session, work: Future[Any]) -> bool:
        """Wait until `work`, which runs on `session`, has ended or waits for a lock. True: it waits."""
        deadline = monotonic() + 20
        while not work.done():
            if self.blockers(session):
                return True
            if monotonic() > deadline:
                raise AssertionError("it has neither ended nor does it wait for a lock")
            self.rows("select from pg_sleep(0.002)")  # between two looks at a fact
        return False

    def wait_blocked(self, session: Session, work: Future[Any]) -> None:
        """Wait until `work` waits for a lock; if it ends without, that is a failure."""
        if not self.settle(session, work):
            raise AssertionError(f"it did not wait for a lock, but ended with {work.result(0)!r}")

    def wait_gone(self, session: Session) -> None:
        """End the server process of `session`, as a crash of its client would, and wait until its locks are gone."""
        self.value("select pg_terminate_backend(%s)", session.pid)
        deadline = monotonic() + 20
        while self.value("select exists (select from pg_stat_activity where pid = %s)", session.pid):
            if monotonic() > deadline:
                raise AssertionError("the server process does not end")
            self.rows("select from pg_sleep(0.002)")

    def reset(self) -> None:
        """Make it as after a fresh install: no rows, no queues, the true time."""
        self.rows(_RESET)
        self.rows("reset all")  # what claims note in the session

    def close_sessions(self) -> None:
        """Close all sessions but this one, and wait for their threads."""
        for session in self._sessions:
            session.close()
        self._sessions.clear()
        self._threads.shutdown()
        self._threads = ThreadPoolExecutor(max_workers=100)

    def close(self) -> None:
        self.close_sessions()
        super().close()


@contextmanager
def open_database(dsn: str, schema: str = "pgconductor") -> Iterator[Database]:
    """A `Database` that is closed at the end."""
    database = Database(dsn, schema)
    try:
        yield database
    finally:
        database.close()


def done(claimed: Claimed, kind: str = "completed", **options: Any) -> Outcome:
    """The outcome of a claim."""
    return Outcome(claimed.id, claimed.claim_no, kind, **options)
