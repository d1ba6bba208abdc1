"""Finding, parsing and rendering the `.sql` files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from migrations.small import CREATE_ITEMS, FUNCTIONS, V1, V3

from pgconductor.db.schema import (
    FunctionFile,
    Migration,
    SqlSource,
    latest_version,
    load_functions,
    load_migrations,
    load_source,
)
from pgconductor.db.sql_files import render, split_statements
from pgconductor.errors import Misuse


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.sql").write_text(text, encoding="utf-8")
    return folder


def test_markers_on_top_are_read(tmp_path: Path) -> None:
    """Or a breaking migration passes for a harmless one."""
    write(
        tmp_path,
        **{"0001_a": "--! breaking\nselect 1;", "0002_b": "select 1;\n--! breaking\n", "0003_c": "--! no-transaction"},
    )
    first, second, third = load_migrations(tmp_path)
    assert (first.number, first.name, first.is_breaking, first.is_transactional) == (1, "0001_a.sql", True, True)
    assert (second.is_breaking, second.is_transactional) == (False, True)
    assert (third.is_breaking, third.is_transactional) == (False, False)


def test_breaking_migration_is_one_transaction(tmp_path: Path) -> None:
    """Or one that was killed leaves half of it, and the older programs come back to that."""
    write(tmp_path, **{"0001_a": "--! breaking\n--! no-transaction\nselect 1;"})
    with pytest.raises(Misuse, match=r"0001_a\.sql: breaking and no-transaction exclude each other"):
        load_migrations(tmp_path)


def test_unknown_marker_is_refused(tmp_path: Path) -> None:
    """Or a slip of the pen makes a breaking migration harmless."""
    write(tmp_path, **{"0001_a": "--! braking\nselect 1;"})
    with pytest.raises(Misuse, match=r"0001_a\.sql: unknown marker 'braking'; there are: breaking, no-transaction"):
        load_migrations(tmp_path)


@pytest.mark.parametrize("name", ["1_a", "0001-a", "0001_A", "core"])
def test_misnamed_migration_is_refused(tmp_path: Path, name: str) -> None:
    """Or it is left out, or applied out of order."""
    with pytest.raises(Misuse, match=f"migration {name}.sql"):
        load_migrations(write(tmp_path, **{name: ""}))


@pytest.mark.parametrize("numbers", [(2,), (1, 3), (1, 1)])
def test_gaps_and_twins_in_the_numbers_are_refused(numbers: tuple[int, ...]) -> None:
    """Or two branches that were merged leave one migration never applied."""
    with pytest.raises(Misuse, match="no gaps and no twins"):
        SqlSource(tuple(Migration(number, f"{number:04}_x.sql", "") for number in numbers), ())


def test_functions_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Or what PostgreSQL checks at creation, such as result types, fails on one file system and not on another."""
    write(tmp_path, b="2", a="1", c="3")
    (tmp_path / "README.md").write_text("not SQL")
    assert load_functions(tmp_path) == (
        FunctionFile("a.sql", "1"),
        FunctionFile("b.sql", "2"),
        FunctionFile("c.sql", "3"),
    )


def test_hash_does_not_depend_on_line_ends(tmp_path: Path) -> None:
    """Or a checkout on Windows and one on Linux replace each other's functions for ever."""
    (tmp_path / "unix").mkdir()
    (tmp_path / "dos").mkdir()
    (tmp_path / "unix" / "a.sql").write_bytes(b"select\n1")
    (tmp_path / "dos" / "a.sql").write_bytes(b"select\r\n1")
    unix, dos = (SqlSource((), load_functions(tmp_path / name)).functions_hash for name in ("unix", "dos"))
    assert unix == dos


def test_hash_depends_on_each_name_and_text() -> None:
    """Or a changed function is not put in."""
    a, b = FUNCTIONS
    sets = [(a, b), (a,), (b,), (FunctionFile(a.name, a.text + " "), b), (FunctionFile(a.name + "x", a.text), b)]
    assert len({SqlSource((), each).functions_hash for each in sets}) == len(sets)
    assert V1.functions_hash == V3.functions_hash, "migrations are no part of it"


def test_this_installation_has_its_sql() -> None:
    """Or a wheel without `sql/` is built and nobody notices; the files are numbered without gaps."""
    source = load_source()
    assert source.version == latest_version() >= 1
    assert source.migrations[0].name.startswith("0001_")
    assert source.functions


def test_every_file_of_this_installation_names_the_schema_by_its_token() -> None:
    """Or an object lands in `pgconductor` whatever schema was asked for. Comments may use the name."""
    source = load_source()
    files = [(file.name, file.text) for file in source.migrations] + [
        (file.name, file.text) for file in source.functions
    ]
    for name, text in files:
        code = re.sub(r"--[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
        assert not re.search(r"\bpgconductor\s*\.", code), name
        assert set(re.findall(r"@\w+@", code)) <= {"@schema@", "@schema_literal@"}, name


def test_harmless_migrations_take_no_function_away() -> None:
    """Or a statement of a running program that waits behind the migration fails, and until the functions are put in
    every other one too. They are set aside with the functions: `00_set_aside.sql`.
    """
    for migration in load_source().migrations:
        assert migration.is_breaking or not re.search(r"\bdrop\s+(function|routine)\b", migration.text), migration.name


# --- rendering ---


def test_plain_name_reads_as_written() -> None:
    """Or the functions a user looks at in psql are full of escapes."""
    assert (
        render(CREATE_ITEMS.text, "app jobs-2")[: len('\n    -- the table of "app jobs-2"')]
        == '\n    -- the table of "app jobs-2"'
    )
    assert render("@schema_literal@", "pgconductor") == "'pgconductor'"


def test_hostile_name_is_escaped() -> None:
    """Or it ends the quotes or the body it stands in."""
    assert render("@schema@", 'a"$') == 'U&"a\\+000022\\+000024"'
    assert render("@schema_literal@", "a'$") == "E'a\\U00000027\\U00000024'"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_rendered_name_can_end_nothing_it_stands_in(name: str) -> None:
    """Or some name breaks out of a body, comment, string or format that nobody thought of."""
    inside = (
        render("@schema@", name)[2:-1].removeprefix('"')
        if render("@schema@", name)[0] == "U"
        else render("@schema@", name)[1:-1]
    )
    assert not set(inside) & set("\"'$%*/\n\r")
    literal = render("@schema_literal@", name)
    assert not set(literal[literal.index("'") + 1 : -1]) & set("\"'$%*/\n\r")


# --- splitting ---


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("", []),
        (" -- only a comment;\n", []),
        ("select 1", ["select 1"]),
        ("select 1; select 2;", ["select 1;", "select 2;"]),
        ("select ';', \";\"; select 'it''s;'", ["select ';', \";\";", "select 'it''s;'"]),
        ("do $$ begin; end $$; do $x$ ; $$ ; $x$;", ["do $$ begin; end $$;", "do $x$ ; $$ ; $x$;"]),
        ("select 1 -- ;\n + 1; /* ; */ select 2; -- end", ["select 1 -- ;\n + 1;", "/* ; */ select 2;"]),
    ],
)
def test_statements_end_at_their_own_semicolons(text: str, statements: list[str]) -> None:
    """Or a no-transaction migration sends half a statement, or two at once."""
    assert split_statements(text) == statements
