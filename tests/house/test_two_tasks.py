"""The example of two tasks keeps its word: the deployed model answers as PyTorch does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EXAMPLE = REPOSITORY / "examples" / "two-tasks"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(folder / "run.py"), *options]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_each_request_of_two_tasks_is_answered_as_pytorch_answers() -> None:
    """A part of the texts, because all of them take a minute; the page has all of them."""
    ended = run(EXAMPLE, "--texts", "150")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    facts = json.loads((EXAMPLE / "pytorch.json").read_text(encoding="utf-8"))["answers"]
    _, *rows = ended.stdout.splitlines()[:3]
    for task, row in zip(("mood", "source"), rows, strict=True):
        assert row.startswith(task)
        assert "300 of  300" in row
        adapted, pytorch = row.split()[3:5]
        assert adapted == pytorch
        for number in (facts[f"{task}.plain"]["linear"], facts[f"{task}.adapted"]["right"]):
            assert f"{100 * number:.1f}" in told


def change_a_class(folder: Path) -> str:
    path = folder / "pytorch.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    first, *others = facts["answers"]["source.adapted"]["classes"]
    facts["answers"]["source.adapted"]["classes"] = [str((int(first) + 1) % 4), *others]
    path.write_text(json.dumps(facts), encoding="utf-8")
    return "79 of   80  "


def move_an_embedding(folder: Path) -> str:
    path = folder / "pytorch.npz"
    arrays = dict(np.load(path))
    arrays["mood.adapted"][0, 0] += 0.001
    np.savez(path, **arrays)
    return "80 of   80  1e-03"


@pytest.mark.parametrize("change", [change_a_class, move_an_embedding])
def test_an_answer_that_is_not_pytorchs_fails_the_example(
    change: Callable[[Path], str], tmp_path: Path
) -> None:
    folder = tmp_path / "examples" / "two-tasks"
    shutil.copytree(EXAMPLE, folder)
    (tmp_path / "tools").symlink_to(REPOSITORY / "tools")
    expected = change(folder)
    ended = run(folder, "--texts", "40")
    assert ended.returncode == 1, ended.stderr
    assert expected in ended.stdout


def test_no_document_is_both_learned_from_and_tested_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    import texts

    documents = {one.text: (one.source, one.document) for one in texts.read_snippets()}
    for task in texts.load_tasks().values():
        assert [len(one.texts) for one in task.splits.values()] >= [6000, 900, 1000]
        learned, chosen, tested = (
            {documents[text] for text in one.texts} for one in task.splits.values()
        )
        assert not tested & (learned | chosen)
        assert not learned & chosen
