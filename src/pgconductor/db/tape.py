"""What the statements of a block returned, recorded, so that the block can run again and be told the same.

Python cannot skip a block, so at a replay of `ctx.transaction("name")` it runs again, on a connection that does not
touch the user's tables. On the first run each statement is recorded with its text, its status, and its rows as the
server sent them (text, with the types' oids) or its error. At a replay each `execute` selects these values from
nothing, as parameters of just these types, so that loaders, row factories and `description` work as ever; what
returned no rows is not sent at all, and what failed fails with the same diagnostics.

Pure but for the cursors. A tape is bounded (`MAX_BYTES`, `MAX_VALUES`); beyond, and for what cannot be recorded (COPY,
server-side cursors, pipelines, several statements in one, binary results), `DurableMisuse` names the function form.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, NoReturn, Self, cast

import psycopg
from psycopg import pq, sql
from psycopg.abc import Buffer, Params, PQGen, Query
from psycopg.adapt import Dumper, PyFormat
from psycopg.pq.abc import PGresult
from psycopg.rows import Row, TupleRow

from ..errors import DurableMisuse, NonDeterminism
from .connection import TrioConnection
from .step_connection import StepConnection, SyncStepConnection

MAX_BYTES: Final = 256 << 10
MAX_VALUES: Final = 60_000  # a statement has at most 65,535 parameters

_VOID: Final = 2278  # no value of it can be a parameter: told as the empty text that it looks like
_TEXT: Final = 25
_PSEUDO: Final = frozenset({2249, 2287, 2275, 2276, 2277, 2283})  # record, record[], cstring, any, anyarray, anyelement


class Statement(NamedTuple):
    """What one call of `execute` did. `columns`: name and oid of each, None if it returned no rows at all."""

    query: str
    status: str = ""
    rowcount: int = -1
    columns: list[tuple[str, int]] | None = None
    rows: list[list[str | None]] | None = None
    error: dict[str, str] | None = None  # fields of the diagnostics, by their codes


class Tape:
    """Records statements, or tells what was recorded. `step`: how messages call the block."""

    def __init__(self, step: str, recorded: str | None = None) -> None:
        """`recorded`: what `dump` returned, for a replay."""
        self.step = step
        self.is_replay = recorded is not None
        self._statements: list[Statement | None] = []
        if recorded is not None:
            self._statements.extend(Statement(*fields) for fields in json.loads(recorded))
        self._position = 0
        self._size = 0

    def dump(self) -> str:
        """The tape as JSON. Raises `DurableMisuse` if a statement has not ended."""
        if None in self._statements:
            self.refuse("a statement that had not ended when the block did")
        return json.dumps(self._statements, ensure_ascii=False)

    def refuse(self, what: str) -> NoReturn:
        """Say that something cannot be recorded."""
        raise DurableMisuse(
            f"{what} cannot be recorded in the block of {self.step}; use the function form, whose statements are not "
            f"recorded: await ctx.transaction(name, function)"
        )

    # Recording

    def begin(self, query: str) -> int:
        """A statement is sent; return its number."""
        self._statements.append(None)
        self._add(len(query))
        return len(self._statements) - 1

    def note(self, number: int, query: str, cursor: Any, encoding: str) -> None:
        """It has been executed by this cursor of psycopg's."""
        results: list[PGresult] = cursor._results
        if len(results) > 1:
            self.refuse("several statements in one execute()")
        columns: list[tuple[str, int]] | None = None
        rows: list[list[str | None]] | None = None
        if results and results[0].status == pq.ExecStatus.TUPLES_OK:
            columns, rows = self._read(results[0], encoding)
        self._statements[number] = Statement(query, cursor.statusmessage or "", cursor.rowcount, columns, rows)

    def note_error(self, number: int, query: str, error: psycopg.Error) -> None:
        """It failed."""
        fields: dict[str, str] = {}
        for field in pq.DiagnosticField:
            value = error.diag._error_message(field)  # pyright: ignore[reportPrivateUsage]
            if value is not None:
                fields[field.name] = value
        fields.setdefault("SQLSTATE", error.sqlstate or "")
        fields["text"] = str(error)
        self._add(sum(map(len, fields.values())))
        self._statements[number] = Statement(query, error=fields)

    def _read(self, result: PGresult, encoding: str) -> tuple[list[tuple[str, int]], list[list[str | None]]]:
        columns: list[tuple[str, int]] = []
        for i in range(result.nfields):
            if result.fformat(i) != pq.Format.TEXT:
                self.refuse("a result in binary form")
            if (oid := result.ftype(i)) in _PSEUDO:
                self.refuse(f"a column of a type without values of its own (oid {oid}: record and the like)")
            columns.append(((result.fname(i) or b"").decode(encoding), oid))
        if result.ntuples * max(1, result.nfields) > MAX_VALUES:
            self.refuse(f"a result of more than {MAX_VALUES:,} values")
        rows: list[list[str | None]] = []
        for row in range(result.ntuples):
            values = [result.get_value(row, i) for i in range(result.nfields)]
            self._add(sum(4 if value is None else len(value) + 4 for value in values))
            rows.append([None if value is None else value.decode(encoding) for value in values])
        return columns, rows

    def _add(self, size: int) -> None:
        self._size += size + 20
        if self._size > MAX_BYTES:
            self.refuse(f"more than {MAX_BYTES >> 10} KiB of statements and rows")

    # Replaying

    def next(self, query: str) -> Statement:
        """What the next statement returned. Raises `NonDeterminism` if it was another."""
        if self._position == len(self._statements):
            raise NonDeterminism(
                f"the block of {self.step} executes {query!r} after what were its last statements: "
                f"{len(self._statements)} are recorded"
            )
        statement = self._statements[self._position]
        assert statement is not None
        if statement.query != query:
            raise NonDeterminism(
                f"the block of {self.step} executes {query!r} where {statement.query!r} is recorded: it has to send "
                f"the same statements in the same order again"
            )
        self._position += 1
        return statement

    def finish(self) -> None:
        """The block has ended. Raises `NonDeterminism` if it sent less than it did."""
        if (missing := len(self._statements) - self._position) > 0:
            statement = self._statements[self._position]
            assert statement is not None
            raise NonDeterminism(
                f"the block of {self.step} has ended without executing {statement.query!r}, the first of {missing} "
                f"statements that are recorded"
            )


def recreated(statement: Statement) -> psycopg.Error:
    """The error of a statement that failed."""
    assert statement.error is not None
    fields = dict(statement.error)
    text, sqlstate = fields.pop("text"), fields.get("SQLSTATE") or None
    info: dict[int, bytes | None] = {
        field: fields[field.name].encode() if field.name in fields else None for field in pq.DiagnosticField
    }
    kind: type[psycopg.Error] = psycopg.DatabaseError
    if sqlstate is not None:
        try:
            kind = psycopg.errors.lookup(sqlstate)
        except KeyError:
            kind = psycopg.DatabaseError
    return kind(text, info=info)


class _Value:
    """A value as the server sent it, of a type given by its oid."""

    __slots__ = ("oid", "value")

    def __init__(self, oid: int, value: bytes | None) -> None:
        self.oid = oid
        self.value = value


class _ValueDumper(Dumper):
    """Sends a `_Value` as it is."""

    def get_key(self, obj: _Value, format: PyFormat) -> Any:
        return (self.cls, obj.oid)

    def upgrade(self, obj: _Value, format: PyFormat) -> _ValueDumper:
        dumper = _ValueDumper(self.cls)
        dumper.oid = obj.oid
        return dumper

    def dump(self, obj: _Value) -> Buffer | None:
        return obj.value


def _selection(statement: Statement, encoding: str) -> tuple[bytes, list[_Value]]:
    """A query that returns the recorded rows, and its parameters."""
    columns, rows = statement.columns or [], statement.rows or []
    if not columns:
        return b"select from pg_catalog.generate_series(1, %d)" % len(rows), []
    oids = [_TEXT if oid == _VOID else oid for _, oid in columns]
    shown = rows or [[None] * len(oids)]
    values = [
        _Value(oid, None if text is None else text.encode(encoding))
        for row in shown
        for oid, text in zip(oids, row, strict=True)
    ]
    row = "(" + ", ".join(["%s"] * len(oids)) + ")"
    names = ", ".join(sql.Identifier(name).as_string(None) for name, _ in columns).replace("%", "%%")
    query = f"select * from (values {', '.join([row] * len(shown))}) as x ({names})"
    return (query if rows else f"{query} limit 0").encode(encoding), values


def _text_of(query: Query, conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> str:
    if isinstance(query, (bytes, bytearray)):
        return bytes(query).decode(conn.info.encoding, "replace")
    return query if isinstance(query, str) else cast(sql.Composable, query).as_string(conn)


class _Taped:
    """What both recording connections have: the tape, and whether a cursor of ours is at work."""

    tape: Tape
    _is_ours = False

    @contextmanager
    def recording(self) -> Generator[None]:
        """A cursor of ours sends a statement inside the block."""
        self._is_ours = True
        try:
            yield
        finally:
            self._is_ours = False

    def require_ours(self, gen: Any) -> None:
        """Refuse the statement of a cursor that does not record. What a savepoint sends may pass."""
        if not self._is_ours and "Cursor" in getattr(gen, "__qualname__", ""):
            gen.close()
            self.tape.refuse("a cursor that was not made by conn.cursor()")


class RecordedConnection(StepConnection, _Taped):
    """The connection of a block: its cursors record, or replay."""

    def __init__(self, lent: TrioConnection[TupleRow], step: str, tape: Tape) -> None:
        super().__init__(lent, step)
        self.tape = tape
        self.cursor_factory = RecordedCursor

    def cursor(self, name: str = "", *, binary: bool = False, row_factory: Any = None, **others: Any) -> Any:
        """As psycopg's; without a name, and not binary."""
        if name:
            self.tape.refuse("a server-side cursor")
        if not issubclass(self.cursor_factory, RecordedCursor):
            self.tape.refuse("a cursor of a cursor_factory of one's own")
        return super().cursor(binary=binary, row_factory=row_factory)

    def pipeline(self) -> Any:
        """Refused, with `DurableMisuse`."""
        self.tape.refuse("a pipeline")

    async def wait(self, gen: PQGen[Any], interval: float = 0.0, timeout: float | None = None) -> Any:
        self.require_ours(gen)
        return await super().wait(gen, interval, timeout)


class SyncRecordedConnection(SyncStepConnection, _Taped):
    """The same for a plain ``def``."""

    def __init__(self, lent: psycopg.Connection[TupleRow], step: str, tape: Tape) -> None:
        super().__init__(lent, step)
        self.tape = tape
        self.cursor_factory = SyncRecordedCursor

    def cursor(self, name: str = "", *, binary: bool = False, row_factory: Any = None, **others: Any) -> Any:
        """As psycopg's; without a name, and not binary."""
        if name:
            self.tape.refuse("a server-side cursor")
        if not issubclass(self.cursor_factory, SyncRecordedCursor):
            self.tape.refuse("a cursor of a cursor_factory of one's own")
        return super().cursor(binary=binary, row_factory=row_factory)

    def pipeline(self) -> Any:
        """Refused, with `DurableMisuse`."""
        self.tape.refuse("a pipeline")

    def wait(self, gen: PQGen[Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        self.require_ours(gen)
        return super().wait(gen, interval, timeout)


def _tell_no_rows(cursor: Any, statement: Statement) -> None:
    """Be as after a statement that returned none."""
    cursor._reset()
    cursor.pgresult = cursor._pgconn.make_empty_result(pq.ExecStatus.COMMAND_OK)
    cursor._results[:] = [cursor.pgresult]
    _tell_status(cursor, statement)


def _tell_status(cursor: Any, statement: Statement) -> None:
    cursor._rowcount = statement.rowcount
    cursor._statusmessage = statement.status.encode() or None


class RecordedCursor(psycopg.AsyncCursor[Row]):
    """psycopg's cursor, which records what it executes, or tells what is recorded."""

    _conn: RecordedConnection

    async def execute(
        self, query: Query, params: Params | None = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> Self:
        async def send() -> None:
            await super(RecordedCursor, self).execute(cast(Any, query), params, prepare=prepare, binary=binary)

        await self._take(query, send)
        return self

    async def executemany(self, query: Query, params_seq: Iterable[Params], *, returning: bool = False) -> None:
        if returning:
            self._conn.tape.refuse("executemany(returning=True)")

        async def send() -> None:
            await super(RecordedCursor, self).executemany(query, params_seq)

        await self._take(query, send)

    def copy(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, with `DurableMisuse`."""
        self._conn.tape.refuse("COPY")

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, with `DurableMisuse`."""
        self._conn.tape.refuse("stream()")

    async def _take(self, query: Query, send: Callable[[], Awaitable[None]]) -> None:
        tape = self._conn.tape
        text = _text_of(query, self._conn)
        if tape.is_replay:
            await self._tell(tape.next(text))
            return
        number = tape.begin(text)
        try:
            with self._conn.recording():
                await send()
        except psycopg.Error as error:
            tape.note_error(number, text, error)
            raise
        tape.note(number, text, self, self._conn.info.encoding)

    async def _tell(self, statement: Statement) -> None:
        if statement.error is not None:
            raise recreated(statement)
        if statement.columns is None:
            _tell_no_rows(self, statement)
            return
        query, values = _selection(statement, self._conn.info.encoding)
        self.adapters.register_dumper(_Value, _ValueDumper)
        with self._conn.recording():
            await super().execute(query, values, prepare=False)
        _tell_status(self, statement)


class SyncRecordedCursor(psycopg.Cursor[Row]):
    """The same for a plain ``def``."""

    _conn: SyncRecordedConnection

    def execute(
        self, query: Query, params: Params | None = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> Self:
        def send() -> None:
            super(SyncRecordedCursor, self).execute(cast(Any, query), params, prepare=prepare, binary=binary)

        self._take(query, send)
        return self

    def executemany(self, query: Query, params_seq: Iterable[Params], *, returning: bool = False) -> None:
        if returning:
            self._conn.tape.refuse("executemany(returning=True)")

        def send() -> None:
            super(SyncRecordedCursor, self).executemany(query, params_seq)

        self._take(query, send)

    def copy(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, with `DurableMisuse`."""
        self._conn.tape.refuse("COPY")

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, with `DurableMisuse`."""
        self._conn.tape.refuse("stream()")

    def _take(self, query: Query, send: Callable[[], None]) -> None:
        tape = self._conn.tape
        text = _text_of(query, self._conn)
        if tape.is_replay:
            self._tell(tape.next(text))
            return
        number = tape.begin(text)
        try:
            with self._conn.recording():
                send()
        except psycopg.Error as error:
            tape.note_error(number, text, error)
            raise
        tape.note(number, text, self, self._conn.info.encoding)

    def _tell(self, statement: Statement) -> None:
        if statement.error is not None:
            raise recreated(statement)
        if statement.columns is None:
            _tell_no_rows(self, statement)
            return
        query, values = _selection(statement, self._conn.info.encoding)
        self.adapters.register_dumper(_Value, _ValueDumper)
        with self._conn.recording():
            super().execute(query, values, prepare=False)
        _tell_status(self, statement)
