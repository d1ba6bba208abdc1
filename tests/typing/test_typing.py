"""The promised types, as programs that mypy and pyright must both accept in their strict modes.

A program states its types with `assert_type`. Where it contains a mistake on purpose, the line ignores exactly the
expected error of each checker, and an ignore that is not needed fails the run: so a mistake that is no longer reported
fails it as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pgconductor

PROGRAMS = Path(__file__).parent / "programs"
PACKAGE_ROOT = Path(pgconductor.__file__).parent.parent


def run_checker(command: list[str], tmp_path: Path) -> str:
    """Run a checker and return what it printed if it found anything, else nothing."""
    environment = {**os.environ, "MYPYPATH": str(PACKAGE_ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def run_mypy(programs: Path, tmp_path: Path) -> str:
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nstrict = true\nenable_error_code = ignore-without-code\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "mypy")]
    return run_checker([*command, *map(str, sorted(programs.glob("*.py")))], tmp_path)


def run_pyright(programs: Path, tmp_path: Path) -> str:
    config = {
        "include": [os.path.relpath(programs, tmp_path)],
        "extraPaths": [os.path.relpath(PACKAGE_ROOT, tmp_path)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        "enableTypeIgnoreComments": False,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--project", str(tmp_path), "--pythonpath", sys.executable]
    return run_checker(command, tmp_path)


CHECKERS = pytest.mark.parametrize("run", [run_mypy, run_pyright], ids=["mypy", "pyright"])


@CHECKERS
def test_programs_pass_strict_type_checking(run: Callable[[Path, Path], str], tmp_path: Path) -> None:
    """A declared form loses its type, or a mistake in a call is no longer reported to users."""
    assert run(PROGRAMS, tmp_path) == ""


@CHECKERS
def test_the_check_itself_reports_a_wrong_type(run: Callable[[Path, Path], str], tmp_path: Path) -> None:
    """The test above would pass without looking at the programs, or with a package whose types it cannot see."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "wrong.py").write_text(
        "from typing import assert_type\n"
        "from pgconductor.handle import Handle\n"
        "async def wrong(handle: Handle[int]) -> None:\n"
        "    assert_type(await handle.result(), str)\n"
    )
    found = run(programs, tmp_path)
    assert "wrong.py" in found
    assert "int" in found
    assert "str" in found
