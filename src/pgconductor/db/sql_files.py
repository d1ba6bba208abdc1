"""The `.sql` files this program brings along, and how their text becomes SQL for one schema.

Owns finding and parsing `sql/migrations` and `sql/functions`, and the two tokens in them. Does no I/O but reading
files, and knows nothing of what a database holds (`pgconductor.db.installed`).

Always true: whatever name a schema has, a token's replacement stays one token, wherever in a file it stands; and the
hash of the functions depends on their text only, not on the schema, nor on a checkout's line ends.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InvalidOption, Misuse
from .call import Call, ignore

_FILE_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_MARKERS = frozenset({"breaking", "no-transaction"})
_TOKEN = re.compile(r"@schema(_literal)?@")
_STATEMENT_PART = re.compile(
    r"""
    --[^\n]* | /\*.*?\*/                              # comments
    | '(?:[^']|'')*' | "(?:[^"]|"")*" | \$(\w*)\$.*?\$\1\$   # quotes
    | (?P<end>;)
    """,
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of `sql/migrations`. `number` counts from 1; `name` is the file's name."""

    number: int
    name: str
    text: str
    is_breaking: bool = False
    is_transactional: bool = True


@dataclass(frozen=True, slots=True)
class FunctionFile:
    """One file of `sql/functions`: present bodies, each `create or replace`."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class SqlSource:
    """The SQL a program brings along. Raises `Misuse` if the migrations are not numbered 1, 2, 3, …"""

    migrations: tuple[Migration, ...]
    functions: tuple[FunctionFile, ...]
    functions_hash: str = field(init=False)

    def __post_init__(self) -> None:
        for expected, migration in enumerate(self.migrations, start=1):
            if migration.number != expected:
                raise Misuse(
                    f"migration {migration.name}: its number should be {expected:04}; numbers have no gaps and no twins"
                )
        digest = hashlib.sha256()
        for file in self.functions:
            digest.update(f"{file.name}\0{file.text}\0".encode())
        object.__setattr__(self, "functions_hash", digest.hexdigest())

    @property
    def version(self) -> int:
        """Number of the newest migration, 0 if there is none."""
        return len(self.migrations)


def load_migrations(folder: Path | None = None) -> tuple[Migration, ...]:
    """Read the migrations in `folder` (default: this installation's), in order. Raises `Misuse` on a malformed file."""
    return tuple(
        _parse_migration(path.name, _read(path)) for path in _sql_files(folder or _sql_folder() / "migrations")
    )


def load_functions(folder: Path | None = None) -> tuple[FunctionFile, ...]:
    """Read the function files in `folder` (default: this installation's), in the order of their names."""
    return tuple(FunctionFile(path.name, _read(path)) for path in _sql_files(folder or _sql_folder() / "functions"))


def load_source() -> SqlSource:
    """Read all SQL of this installation. Raises `Misuse` if its files are missing or malformed."""
    return SqlSource(load_migrations(), load_functions())


def latest_version() -> int:
    """Number of the newest migration of this installation."""
    return load_source().version


def _sql_folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    # A wheel holds the folder inside the package; an editable install and a checkout have it beside src/.
    for folder in (package / "sql", package.parent.parent / "sql"):
        if (folder / "migrations").is_dir():
            return folder
    raise Misuse(f"the SQL files of pgconductor are missing beside {package}; reinstall pgconductor")


def _sql_files(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.suffix == ".sql"), key=lambda path: path.name)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")  # universal newlines: a checkout with CRLF has the same hash


def _parse_migration(name: str, text: str) -> Migration:
    if (match := _FILE_NAME.fullmatch(name)) is None:
        raise Misuse(f"migration {name}: the name should be like 0001_core.sql")
    markers: set[str] = set()
    for line in text.splitlines():
        if not line.startswith("--!"):
            break
        markers.add(line.removeprefix("--!").strip())
    if unknown := markers - _MARKERS:
        raise Misuse(f"migration {name}: unknown marker {min(unknown)!r}; there are: {', '.join(sorted(_MARKERS))}")
    if markers >= _MARKERS:
        raise Misuse(
            f"migration {name}: breaking and no-transaction exclude each other, since a killed one would leave half of"
            " it to the older programs; split it"
        )
    return Migration(int(match[1]), name, text, "breaking" in markers, "no-transaction" not in markers)


def split_statements(text: str) -> list[str]:
    """The statements of `text`, without what follows the last semicolon if that is only comments.

    Knows quotes, dollar quotes and comments; not nested comments, nor backslashes in `E'…'`.
    """
    statements: list[str] = []
    start = 0
    has_code = False
    position = 0
    for part in _STATEMENT_PART.finditer(text):
        has_code = has_code or bool(text[position : part.start()].strip()) or part[0][:2] not in ("--", "/*")
        position = part.end()
        if part["end"]:
            statements.append(text[start:position].strip())
            start, has_code = position, False
    if has_code or text[position:].strip():
        statements.append(text[start:].strip())
    return statements


def validate_schema_name(schema: str) -> str:
    """Return `schema` if PostgreSQL can have a schema of exactly this name, else raise `InvalidOption`."""
    try:
        size = len(schema.encode())
    except UnicodeEncodeError:
        raise InvalidOption(f"schema name {schema!r} has a lone surrogate; use ordinary text") from None
    if not schema:
        raise InvalidOption("the schema name is empty; leave it out for the default, 'pgconductor'")
    if "\0" in schema:
        raise InvalidOption(f"schema name {schema!r} has a NUL character, which PostgreSQL cannot store")
    if size > 63:
        raise InvalidOption(f"schema name {schema!r} has {size} bytes; PostgreSQL would cut it at 63")
    if schema.startswith("pg_") or schema == "information_schema":
        raise InvalidOption(f"schema name {schema!r} belongs to PostgreSQL; choose one that does not begin with 'pg_'")
    return schema


def render(text: str, schema: str) -> str:
    """`text` with `@schema@` as a quoted identifier and `@schema_literal@` as a quoted string literal.

    Tokens also stand in dollar-quoted bodies, comments and format strings, where plain quoting is no protection. So
    each character that could end one of these is written as an escape, and, since a client's encoding need not have
    it, each that is not ASCII.
    """
    return _TOKEN.sub(lambda token: _literal(schema) if token[1] else identifier(schema), text)


def _is_plain(char: str) -> bool:
    return (char.isascii() and char.isalnum()) or char in "_ -.,:;@#+=()[]"


def identifier(name: str) -> str:
    """A schema's name, quoted; it has no `%`, so it may stand in a query with parameters as it is."""
    if all(map(_is_plain, name)):
        return f'"{name}"'
    return 'U&"' + "".join(char if _is_plain(char) else f"\\+{ord(char):06X}" for char in name) + '"'


def _literal(name: str) -> str:
    if all(map(_is_plain, name)):
        return f"'{name}'"
    return "E'" + "".join(char if _is_plain(char) else f"\\U{ord(char):08X}" for char in name) + "'"


def script(text: str, schema: str) -> Call[None]:
    """All statements of `text` in one message; it has no parameters, so each `%` is just a character."""
    return Call(render(text, schema).replace("%", "%%").encode(), (), ignore)
