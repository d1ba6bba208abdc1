"""Plants bugs in copies of the tree and runs the tests that must notice: a guard that nobody misses is not tested.

    python -m tests.planted                    all of them, two at a time
    python -m tests.planted NAME ...           those whose names hold one of the texts
    python -m tests.planted --jobs 1 --list
    python -m tests.planted --table            the table for tests/README.md

The first failing test is named. Exit status 1 if a bug was not caught, or if its tests fail without it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]

_COPIED = ("src", "sql", "tests", "benchmarks", "pyproject.toml", "README.md")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def apply(bug: Bug, root: Path) -> None:
    """Make the change in the tree at `root`. Raises `LookupError` where the text does not stand as often as said."""
    path = root / bug.file
    text = path.read_text()
    if (found := text.count(bug.old)) != bug.times:
        raise LookupError(f"{bug.name}: {bug.file} holds the text {found} times, not {bug.times}: {bug.old!r}")
    path.write_text(text.replace(bug.old, bug.new))


def table() -> str:
    """The bugs as tests/README.md lists them."""
    lines = ["| planted bug | what was taken away | caught by |", "|---|---|---|"]
    for bug in sorted(BUGS, key=lambda bug: bug.name):
        tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in bug.caught_by)
        lines.append(f"| {bug.name} | {bug.guard} | {tests} |")
    return "\n".join(lines)


def run(bug: Bug, *, is_planted: bool = True) -> tuple[bool, str]:
    """Whether its tests fail, and the first that did (or the end of what pytest said)."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        root = Path(folder)
        for name in _COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy2(source, root / name)
        if is_planted:
            apply(bug, root)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", *bug.caught_by],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
    failed = _FAILED.search(done.stdout)
    is_caught = done.returncode == 1 and failed is not None
    return is_caught, failed[1] if failed else (done.stdout + done.stderr).strip()[-500:]


def main() -> int:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of bugs; default all")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    parser.add_argument("--table", action="store_true", help="print them as tests/README.md lists them")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    chosen = [bug for bug in BUGS if not options.names or any(name in bug.name for name in options.names)]
    if options.list:
        for bug in chosen:
            print(f"{bug.name}: {bug.guard}")
        return 0
    missed = 0
    with ThreadPoolExecutor(options.jobs) as threads:
        for bug, (is_caught, words) in zip(chosen, threads.map(run, chosen), strict=True):
            missed += not is_caught
            print(f"{'caught' if is_caught else 'NOT CAUGHT'}  {bug.name}  by  {words}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0
