"""Rules that every line of the package obeys, checked on its syntax tree, and those of its SQL, on its text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "pgconductor").rglob("*.py"))
SQL = sorted((ROOT / "sql").rglob("*.sql"))

# What executes SQL: methods of connections and cursors, whose first argument is the statement.
_EXECUTE = {"execute", "executemany", "copy", "stream"}

# Statements with the schema's name in them, quoted by `identifier`; one with a number; one of settings written out in
# the source: how many, per module. All others are files of SQL, or rendered once per schema by `render` and `Calls`.
_KNOWN = {"db/migrating.py": 2, "testing/audit.py": 2}


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_made_of_strings(node: ast.expr) -> bool:
    """Whether a statement is put together by f-string, +, % or str.format, other than from literals."""
    match node:
        case ast.JoinedStr():
            return any(isinstance(part, ast.FormattedValue) and not _is_constant(part.value) for part in node.values)
        case ast.BinOp(op=ast.Add()):
            return not _is_constant(node)
        case ast.BinOp(op=ast.Mod()):
            return True
        case ast.Call(func=ast.Attribute(attr="encode", value=inner)):
            return _is_made_of_strings(inner)
        case ast.Call(func=ast.Attribute(attr="format" | "join" | "replace", value=inner)):
            return isinstance(inner, (ast.Constant, ast.JoinedStr))
        case ast.IfExp(body=body, orelse=orelse):
            return _is_made_of_strings(body) or _is_made_of_strings(orelse)
        case _:
            return False


def _is_constant(node: ast.expr) -> bool:
    """Whether it is a literal, or a constant of the module by its name."""
    match node:
        case ast.Constant():
            return True
        case ast.Name(id=name):
            return name.isupper()
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _is_constant(left) and _is_constant(right)
        case _:
            return False


def _offences(text: str) -> list[int]:
    """Lines on which a statement that is executed is put together from strings."""
    tree = ast.parse(text)
    lines: list[int] = []
    for call in _calls(tree):
        is_statement = isinstance(call.func, ast.Attribute) and call.func.attr in _EXECUTE
        if (is_statement or _name(call.func) == "Call") and call.args and _is_made_of_strings(call.args[0]):
            lines.append(call.args[0].lineno)
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "pgconductor")))
def test_no_statement_is_put_together_from_strings(path: Path) -> None:
    """A value that somebody else chose becomes SQL."""
    text = path.read_text()
    found = [f"{path.name}:{line}: {text.splitlines()[line - 1].strip()}" for line in _offences(text)]
    assert len(found) == _KNOWN.get(path.relative_to(ROOT / "src" / "pgconductor").as_posix(), 0), found


@pytest.mark.parametrize(
    "statement",
    [
        'conn.execute(f"select {name}")',
        'conn.execute("select " + name)',
        'conn.execute("select %s" % name)',
        'conn.execute("select {}".format(name))',
        'await cursor.execute(f"select {name}".encode())',
        'Call(f"select {name}".encode(), (), ignore)',
        'conn.execute("a" if x else f"b {name}")',
        'conn.execute(",".join(names))',
    ],
)
def test_lint_finds_each_way_to_put_sql_together(statement: str) -> None:
    """The lint above finds nothing because it looks for nothing."""
    assert _offences(f"async def f(): {statement}") != []


@pytest.mark.parametrize(
    "statement", ['conn.execute("select 1", (name,))', 'conn.execute(sql.SQL("set {}").format(x))', "run(Call(query))"]
)
def test_lint_lets_what_is_safe_pass(statement: str) -> None:
    """A lint that finds everything is switched off."""
    assert _offences(f"def f(): {statement}") == []


_FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "yaml", "dill", "cloudpickle", "jsonpickle", "ctypes"}
_FORBIDDEN_CALLS = {"eval", "exec", "__import__", "compile"}
# The command line's argument "module:orchestrator"; public names, from a list in the module; a wheel. No database.
_MAY_IMPORT_BY_NAME = {"cli/target.py", "__init__.py", "testing/__init__.py", "embedded/installation.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "pgconductor")))
def test_nothing_is_run_that_a_row_could_name(path: Path) -> None:
    """Whoever can write a row runs code in every worker."""
    tree = ast.parse(path.read_text())
    place = path.relative_to(ROOT / "src" / "pgconductor").as_posix()
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    assert imported & _FORBIDDEN_MODULES == set()
    called = {call.func.id for call in _calls(tree) if isinstance(call.func, ast.Name)}
    assert called & _FORBIDDEN_CALLS == set()
    by_name = {_name(call.func) for call in _calls(tree)} & {"import_module", "find_spec", "load_module"}
    assert by_name == set() or place in _MAY_IMPORT_BY_NAME


def test_notifications_carry_neither_ids_nor_text_of_users() -> None:
    """Any role of the database may listen on any channel."""
    arguments: list[str] = []
    for path in SQL:
        if path.name == "snapshot.sql":
            continue
        text = "\n".join(line.split("--")[0] for line in path.read_text().splitlines())
        arguments += re.findall(r"\bpg_notify\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)", text)
    # Everything goes through one function, whose payloads are nothing or numbers of buckets.
    assert arguments == ["p_channel, p_payload"]
    sent: list[str] = []
    for path in SQL:
        text = "\n".join(line.split("--")[0] for line in path.read_text().splitlines())
        sent += re.findall(r"perform @schema@\._private_notify\s*\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)", text)
    payloads = {argument.rpartition(",")[2].strip() for argument in sent}
    assert payloads == {"''", "v_buckets"}
    assert len(sent) >= 3


def test_no_function_reads_a_setting_that_anybody_may_invent() -> None:
    """A hook for tests, which any role can pull and a pooler carries to the next client."""
    names = {name for path in SQL for name in re.findall(r"current_setting\(\s*'([^']*)'", path.read_text())}
    assert {name for name in names if "." in name} == set()
