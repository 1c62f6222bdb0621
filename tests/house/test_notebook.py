"""The notebook runs from its first cell to its last, and shows what it says."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_notebook_runs(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(EXAMPLES.parent / "models")
    folder = tmp_path / "examples"
    folder.mkdir()
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": folder}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [str([item.get("data", item) for item in cell.outputs]) for cell in cells]
    assert all("<table>" in text for text in shown[:4])
    assert "hint: nearest:" in shown[6]
    assert [path.name for path in folder.iterdir()] == []


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
