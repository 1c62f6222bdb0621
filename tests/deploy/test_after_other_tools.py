"""What other tools do to slots: the table in docs/after-other-tools.md is true."""

from pathlib import Path

import pytest
from tools_after import TOOLS, outcome

PAGE = Path(__file__).parent.parent.parent / "docs" / "after-other-tools.md"


def _rows() -> dict[str, tuple[str, ...]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]
    return {tool: tuple(rest) for tool, *rest in cells}


def test_the_table_has_every_tool_once() -> None:
    assert list(_rows()) == list(TOOLS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS)
def test_the_table_says_what_a_tool_leaves_of_slots(tool: str, tmp_path: Path) -> None:
    assert outcome(tool, tmp_path) == _rows()[tool]


@pytest.mark.parametrize("tool", TOOLS)
def test_the_page_says_what_to_do_about_what_check_says(tool: str) -> None:
    said = _rows()[tool][-1]
    assert said == "whole" or f"- **{said}**: " in PAGE.read_text(encoding="utf-8")
