"""A page of the documentation as a scenario: its fenced blocks, in order, in a fresh folder with a fresh database.

```python   a program, run to its end; with a comment before it:
            <!-- file: app.py -->   written to that file and not run
            <!-- inside -->         the body of a coroutine with `from app import *`, in `async with conductor`
```sql      statements, run in one transaction
```console  commands after "$ ", which must exit with 0; output that is shown must be what comes, "..." standing
            for anything. With <!-- background --> the command is started, waited for until its orchestrator
            lives, and stopped with SIGTERM at the end of the page, when it must exit with 0
```sh       set-up that is only read; its commands come from a short list
```text     only read
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_EXAMPLE_DSN = "postgresql://localhost/app"


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `line` is where it begins in the page."""

    kind: str
    note: str
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a console block, and the output shown below it, if any."""

    command: str
    output: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(found["kind"], found["note"] or "", found["text"], text.count("\n", 0, found.start()) + 1)
        for found in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[Command]:
    """The commands of a console block; a backslash at the end of a line continues it."""
    text = block.text.replace("\\\n", "")
    return [
        Command(found[1], found[2].strip())
        for found in re.finditer(r"^\$ ([^\n]*)\n((?:(?!\$ )[^\n]*\n)*)", text, re.MULTILINE)
    ]


def matches(shown: str, output: str) -> bool:
    """Whether `output` is what is shown; "..." stands for anything, and the amount of white space does not count."""
    wanted = r"\s+".join(".*".join(map(re.escape, word.split("..."))) for word in shown.split())
    return re.fullmatch(wanted, output.strip(), re.DOTALL) is not None


def with_dsn(text: str, dsn: str) -> str:
    """The text with the example's connection string replaced."""
    return text.replace(_EXAMPLE_DSN, dsn)


def coroutine(text: str) -> str:
    """A program around the body of a coroutine."""
    body = "".join(f"        {line}" if line.strip() else line for line in text.splitlines(keepends=True))
    return f"import trio\nfrom app import *\n\nasync def main():\n    async with conductor:\n{body}\ntrio.run(main)\n"
