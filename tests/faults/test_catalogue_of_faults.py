"""The table of tests/README.md tells the truth about which tests there are."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

# 15, 24, 28, 41 and 55 belong to other issues.
NUMBERS = {*range(1, 15), *range(16, 24), *range(25, 28), *range(29, 41), *range(42, 55), 56}


def test_every_test_that_the_readme_names_exists() -> None:
    """A renamed test would leave a number of the catalogue without cover, and nobody would know."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)", (TESTS / "README.md").read_text())
    assert len(named) > 100
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (TESTS / path).exists() or f"def {name}(" not in (TESTS / path).read_text()
    ]
    assert not missing


def test_every_number_of_the_catalogue_has_a_row() -> None:
    """With tests, or with the reason why there are none."""
    rows = {
        int(number): (tests.strip(), why.strip())
        for number, tests, why in re.findall(
            r"^\| (\d+) \|[^|]*\|([^|]*)\|([^|]*)\|$", (TESTS / "README.md").read_text(), re.MULTILINE
        )
    }
    assert set(rows) >= NUMBERS
    assert [number for number, cells in rows.items() if not any(cells)] == []
