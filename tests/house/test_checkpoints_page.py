"""The page that says what can be read names a test for every line of its tables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
ROWS = [
    line for line in PAGE.splitlines() if line.startswith("| ") and "| proven by" not in line
]


@pytest.mark.parametrize("row", ROWS)
def test_every_line_of_what_can_be_read_has_a_test_behind_it(row: str) -> None:
    tests = re.findall(r"`(tests/[^`:]+\.py)(?:::(test_[^`]+))?`", row.rsplit(" | ", 1)[1])
    assert tests
    for file, name in tests:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name or 'test_'}" in text
