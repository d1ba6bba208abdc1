"""What a user gets: wheel and sdist, built as a release builds them, and the wheel used without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("hatchling", reason="needs hatchling: pip install 'pgconductor[dev]'")


def _built(source: Path, target: str, folder: Path) -> Path:
    """Build `target` of the project in `source` with the backend itself, so that nothing is downloaded."""
    program = f"import hatchling.build, sys; print(hatchling.build.build_{target}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix()


def test_wheel_has_every_module_and_every_sql_file(wheel: Path) -> None:
    """A migration that is not in the wheel is missing in production only."""
    package = {f"pgconductor/{name}" for name in _files(ROOT / "src" / "pgconductor")}
    sql = {f"pgconductor/sql/{name}" for name in _files(ROOT / "sql")}
    assert {name for name in _names(wheel) if not name.startswith("pgconductor-")} == package | sql
    assert "pgconductor/py.typed" in package
    assert any(name.endswith("0001_core.sql") for name in sql)


def test_wheel_made_from_the_sdist_is_the_same(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """Distributions build from the sdist: what it lacks, they lack."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    (tmp_path / "out").mkdir()
    assert _names(_built(unpacked, "wheel", tmp_path / "out")) == _names(wheel)
    assert (unpacked / "tests" / "conftest.py").exists()
    assert (unpacked / "LICENSE").exists()


def test_metadata_names_licence_python_and_extras(wheel: Path) -> None:
    """`pip install pgconductor[embedded]` with an unknown extra only warns."""
    with zipfile.ZipFile(wheel) as archive:
        folder = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Name"] == "pgconductor"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"bench", "embedded", "dashboard", "metrics", "tracing", "test", "dev"} == set(
        metadata.get_all("Provides-Extra") or []
    )
    needed = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == [
        "msgspec",
        "psycopg[binary]",
        "rich",
        "trio",
        "typer",
    ]
    assert "pgconductor = pgconductor.cli:main" in entry_points
    assert "pgconductor = pgconductor.testing.plugin" in entry_points


def test_changelog_has_the_version_that_is_built(wheel: Path) -> None:
    """A release whose changes nobody can find."""
    version = wheel.name.split("-")[1]
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def _unpacked(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpack the wheel and return an environment in which it, and not the checkout, is found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    others = [entry for entry in sys.path if entry and not Path(entry).resolve().is_relative_to(ROOT / "src")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *others])}


def test_wheel_finds_its_sql_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Found beside `src/` in development, and nowhere after an installation."""
    environment = _unpacked(wheel, tmp_path)
    program = (
        "import pgconductor; from pgconductor.db.schema import latest_version;"
        "print(pgconductor.__file__, latest_version())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert int(version) == len(list((ROOT / "sql" / "migrations").glob("*.sql")))


def test_users_of_the_plugin_need_no_trio_plugin(wheel: Path, tmp_path: Path) -> None:
    """Installing the library must not break or slow a test suite that never mentions it."""
    environment = _unpacked(wheel, tmp_path / "site")
    (tmp_path / "test_theirs.py").write_text(
        "import sys\n\n"
        "def test_plain():\n"
        "    assert 'pgconductor.testing.plugin' in sys.modules\n"
        "    assert 'pgconductor.testing.server' not in sys.modules\n"
        "    assert 'pgconductor.embedded' not in sys.modules\n"
        "    assert 'pytest_trio' not in sys.modules\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    command += ["-p", "pgconductor.testing.plugin", "--rootdir", str(tmp_path), str(tmp_path / "test_theirs.py")]
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PostgreSQL" not in done.stdout
