"""The documentation is true: every example in it is run, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import psycopg
import pytest
from cli.programs import SOURCE, environment
from cli.warm import Interpreter
from docs.pages import PAGES, ROOT, Block, blocks, commands, coroutine, matches, with_dsn

from pgconductor.testing import DatabaseServer

_SET_UP = ("git clone ", "cd ", "make ", "pip install ", "export ", "pgconductor demo", "#")
_KINDS = {"python", "sql", "console", "sh", "text"}


class _Reader:
    """Follows a page in `folder` with the database `dsn`."""

    def __init__(
        self, folder: Path, dsn: str, server: DatabaseServer, interpreter: Interpreter, stack: ExitStack
    ) -> None:
        self._interpreter = interpreter
        self._folder = folder
        self._dsn = dsn
        self._stack = stack
        tools = folder / ".tools"
        tools.mkdir()
        for name, code in {
            "python": "",
            "pgconductor": " -c 'from pgconductor.cli import main; main()'",
            "pytest": " -m pytest",
        }.items():
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{code} "$@"\n')
            (tools / name).chmod(0o755)
        base = environment(PGCONDUCTOR_DSN=dsn, PGCONDUCTOR_TEST_DSN=server.dsn("postgres"))
        self._environ = {**base, "PATH": f"{tools}:{base['PATH']}", "PYTHONPATH": f"{SOURCE}:{folder}"}
        if not entry_points(group="pytest11", name="pgconductor"):
            self._environ["PYTEST_PLUGINS"] = "pgconductor.testing.plugin"

    def follow(self, block: Block) -> None:
        """Do what a block says, and check what it shows."""
        text = with_dsn(block.text, self._dsn)
        if block.note.startswith("file: "):
            (self._folder / block.note.removeprefix("file: ")).write_text(text)
        elif block.kind == "python":
            program = self._folder / f"line_{block.line}.py"
            program.write_text(coroutine(text) if block.note == "inside" else text)
            self._run(f"python {program.name}")
        elif block.kind == "sql":
            with psycopg.connect(self._dsn) as conn:
                conn.execute(text.encode())
        elif block.kind == "console":
            for command in commands(block):
                if block.note == "background":
                    self._stack.enter_context(self._background(with_dsn(command.command, self._dsn)))
                else:
                    output = self._run(with_dsn(command.command, self._dsn))
                    assert not command.output or matches(command.output, output), f"{command}: {output!r}"

    def _run(self, command: str) -> str:
        program, *arguments = shlex.split(command)
        done: subprocess.CompletedProcess[str]
        if program in ("python", "pgconductor") and "|" not in command:
            words = arguments if program == "python" else [program, *arguments]
            done = self._interpreter.run(words, self._folder, self._environ)
            assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
            return done.stdout
        done = subprocess.run(
            command, shell=True, cwd=self._folder, env=self._environ, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def _background(self, command: str) -> Iterator[None]:
        with (self._folder / "background.log").open("w") as log:
            process = subprocess.Popen(
                f"exec {command}", shell=True, cwd=self._folder, env=self._environ, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + 30
            while not self._has_orchestrator():
                assert process.poll() is None, (self._folder / "background.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, (self._folder / "background.log").read_text()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _has_orchestrator(self) -> bool:
        with psycopg.connect(self._dsn) as conn:
            try:
                return conn.execute("select from pgconductor.orchestrator_status() where alive").fetchone() is not None
            except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedFunction):
                return False


# The page on TrioConnection stands alone; tests/db says the same in tests.
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_does_what_it_says(
    page: Path,
    tmp_path: Path,
    pgconductor_empty_dsn: str,
    pgconductor_server: DatabaseServer,
    interpreter: Interpreter,
) -> None:
    """A reader who follows the page from top to bottom on an empty database gets what it shows."""
    with ExitStack() as stack:
        reader = _Reader(tmp_path, pgconductor_empty_dsn, pgconductor_server, interpreter, stack)
        for block in blocks(page):
            try:
                reader.follow(block)
            except (AssertionError, psycopg.Error) as error:
                error.add_note(f"{page.name}, line {block.line}")
                raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_has_no_example_that_nobody_runs(page: Path) -> None:
    """A block of another kind, or a command in a set-up block, would be shown and never tried."""
    for block in blocks(page):
        assert block.kind in _KINDS, f"{page.name}, line {block.line}: ```{block.kind}"
        if block.kind == "sh":
            for line in block.text.splitlines():
                assert line.startswith(_SET_UP), f"{page.name}, line {block.line}: {line}"
        if block.kind == "console":
            assert commands(block), f"{page.name}, line {block.line}: no command"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """A page that was renamed must take its links along."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    """A page that nothing leads to is not read."""
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        assert page.name in ("README.md", "index.md") or f"({page.name})" in index, page.name


def test_shown_output_is_compared() -> None:
    """A comparison that accepts anything would keep every example true."""
    assert matches("a ... c\nd", "a b\nb  c d\n")
    assert not matches("a ... c", "a b d")
    assert not matches("Hello, World!", "Hello, Ada!")
