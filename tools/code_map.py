"""Write the map of the code into CONTRIBUTING.md: one line per file, taken from its docstring.

python tools/code_map.py           # write it
python tools/code_map.py --check   # exit 1 if it is not up to date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "onnx_adapt"
PAGE = ROOT / "CONTRIBUTING.md"
START, END = "<!-- code map -->\n", "<!-- end of code map -->\n"

ROOMS = (
    *(
        "spelling",
        "errors",
        "dtypes",
        "words",
        "tables",
        "formats",
        "model",
        "ort",
        "slot",
        "adapter",
        "session",
    ),
    *("graph", "checkpoints", "edit", "graphsurgeon", "proof", "training"),
    *("report", "serve", "cli", "__main__"),
)
"""Rooms and files of the package from the ground up."""


def code_map() -> str:
    """The map as Markdown: a list of rooms, and in each a line per file."""
    lines: list[str] = []
    for room in reversed(ROOMS):
        folder = PACKAGE / room
        if folder.is_dir():
            lines += ["", f"**`{room}/`** {_summary(folder / '__init__.py')}", ""]
            lines += _files(folder)
        else:
            lines += ["", f"**`{room}.py`** {_summary(folder.with_suffix('.py'))}"]
    return "\n".join(lines[1:]) + "\n"


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if path != folder / "__init__.py":
            name = path.relative_to(folder).as_posix().replace("__init__.py", "")
            yield f"- `{name}` {_summary(path)}"


def _summary(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ")


def updated(page: str) -> str:
    """The page with the map as it is now."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + "\n" + code_map() + "\n" + END + after


def main() -> None:
    """Write the map, or say that it is old."""
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(0 if updated(page) == page else "CONTRIBUTING.md: run tools/code_map.py")
    PAGE.write_text(updated(page), encoding="utf-8")


if __name__ == "__main__":
    main()
