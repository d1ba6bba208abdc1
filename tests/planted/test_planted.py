"""The planted bugs still fit the tree. That they are caught takes minutes: `python -m tests.planted`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from planted.bugs import BUGS, Bug
from planted.plant import ROOT, apply, table


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_still_fits_the_tree(bug: Bug, tmp_path: Path) -> None:
    """A bug whose place is gone would be reported as one that no test catches, or not be planted at all."""
    copy = tmp_path / bug.file
    copy.parent.mkdir(parents=True)
    shutil.copy2(ROOT / bug.file, copy)
    apply(bug, tmp_path)
    assert copy.read_text() != (ROOT / bug.file).read_text()
    for test in bug.caught_by:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file()
        assert not name or f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()


def test_names_of_planted_bugs_are_distinct() -> None:
    """Two of one name could not be run apart."""
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_readme_lists_the_planted_bugs() -> None:
    """Otherwise the list says what nobody planted. `python -m tests.planted --table` prints the table."""
    assert table() in (ROOT / "tests" / "README.md").read_text()
