"""The program of the first schema version, out of the repository's history: the real N-1, as a folder to run from."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from pgconductor.db.schema import SqlSource, load_functions, load_migrations

FIRST = "7af6638"  # the last commit whose schema has one migration

_ROOT = Path(__file__).resolve().parents[2]


def unpack(folder: Path) -> Path:
    """Put the program into `folder`; skips the test where the history does not reach so far back."""
    try:
        archive = subprocess.run(
            ["git", "-C", str(_ROOT), "archive", "--format=tar", FIRST, "src", "sql"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the program of schema version 1 (commit {FIRST}) is not in this checkout: {error}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def source_of(folder: Path) -> SqlSource:
    """The SQL it brings along."""
    return SqlSource(load_migrations(folder / "sql" / "migrations"), load_functions(folder / "sql" / "functions"))
