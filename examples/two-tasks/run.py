"""Serve both tasks from one ONNX session, and hold every answer against PyTorch's.

No PyTorch here: `pip install 'onnx-adapt[cpu]' tokenizers`, then
`python examples/two-tasks/run.py`. Exits with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from texts import HERE, Task, fetch, load_tasks, tokenize

import onnx_adapt as oa

EMBEDDING = "461"  # the deployed model's name for its sentence embedding
CLOSE = 1e-4
FEW = 8  # texts of each task whose embeddings PyTorch wrote down
PYTORCH = json.loads((HERE / "pytorch.json").read_text())["answers"]

Array = np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What one task's test texts came to; the shares are of right answers."""

    task: str
    plain: float
    other: float
    adapted: float
    pytorch: float
    texts: int
    same: int
    farthest: float

    @property
    def holds(self) -> bool:
        """Tell whether the deployed model answers as PyTorch does."""
        return self.same == self.texts and self.farthest <= CLOSE


def open_session(folder: Path) -> oa.AdapterSession:
    """Put the slots in with one adapter, turn the other into a file for the same slots."""
    base = oa.open_model(fetch("minilm-l3"))
    mood = oa.load_checkpoint(HERE / "adapters/mood", base)
    adapted = oa.insert_checkpoint(base, mood)
    source = oa.convert(HERE / "adapters/source", adapted)
    oa.save_model(adapted, folder / "adapted.onnx")
    files = {}
    for adapter in (mood.adapter, source):
        files[adapter.name] = folder / f"{adapter.name}.onnx_adapter"
        oa.save_adapter(adapter, files[adapter.name])
    return oa.AdapterSession(folder / "adapted.onnx", files)


def embed(session: oa.AdapterSession, texts: list[str], adapter: object = None) -> Array:
    """Return the embeddings of a batch of texts, `(texts, 384)`."""
    return session.run(tokenize(texts), adapter=adapter, outputs=[EMBEDDING])[EMBEDDING]


def embed_all(session: oa.AdapterSession, texts: list[str], adapter: str | None) -> Array:
    """Return the embeddings of many texts, computed 50 at a time."""
    batches = [texts[at : at + 50] for at in range(0, len(texts), 50)]
    return np.concatenate([embed(session, batch, adapter) for batch in batches])


def answer_requests(session: oa.AdapterSession, tasks: dict[str, Task]) -> dict[str, Array]:
    """Return each task's embeddings: one text a request, another task in each request."""
    found: dict[str, list[Array]] = {name: [] for name in tasks}
    for texts in zip(*(task.splits["test"].texts for task in tasks.values()), strict=True):
        for name, text in zip(tasks, texts, strict=True):
            found[name].append(embed(session, [text], name))
    return {name: np.concatenate(rows) for name, rows in found.items()}


def classify(embeddings: Array, centres: Array) -> Array:
    """Return the class of each row, whose centre, of `(384, classes)`, has its direction."""
    return (embeddings @ centres).argmax(1)


def judge(session: oa.AdapterSession, task: Task, adapted: Array, other: str) -> Outcome:
    """Compare the embeddings that a task's requests got with what PyTorch computed."""
    centres, theirs = np.load(HERE / "centres.npz"), np.load(HERE / "pytorch.npz")
    test = task.splits["test"]
    ours = {"plain": embed_all(session, test.texts, None), "adapted": adapted}
    wrong = embed_all(session, test.texts, other)
    answers, pytorch, farthest = {}, {}, 0.0
    for state, embeddings in ours.items():
        name = f"{task.name}.{state}"
        answers[state] = classify(embeddings, centres[name])
        classes = PYTORCH[name]["classes"][: len(test.texts)]
        pytorch[state] = np.array([int(one) for one in classes])
        farthest = max(farthest, np.abs(embeddings[:FEW] - theirs[name]).max())
    return Outcome(
        task=task.name,
        plain=np.mean(answers["plain"] == test.labels),
        other=np.mean(classify(wrong, centres[f"{task.name}.adapted"]) == test.labels),
        adapted=np.mean(answers["adapted"] == test.labels),
        pytorch=np.mean(pytorch["adapted"] == test.labels),
        texts=2 * len(test.texts),
        same=sum(int(np.sum(answers[state] == pytorch[state])) for state in ours),
        farthest=farthest,
    )


def mix_rows(
    session: oa.AdapterSession, tasks: dict[str, Task], alone: dict[str, Array]
) -> float:
    """Return how far the rows of a batch of both tasks are from the same texts alone."""
    asked = [(name, row) for row in range(FEW) for name in tasks]
    texts = [tasks[name].splits["test"].texts[row] for name, row in asked]
    expected = [alone[name][row] for name, row in asked]
    return float(np.abs(embed(session, texts, [name for name, _ in asked]) - expected).max())


def run_example(texts: int) -> tuple[list[Outcome], float]:
    """Return the outcome of each task, and how far the mixed batch was from single texts."""
    tasks = {name: task.with_tests(texts) for name, task in load_tasks().items()}
    with tempfile.TemporaryDirectory() as folder, open_session(Path(folder)) as session:
        alone = answer_requests(session, tasks)
        mixed = mix_rows(session, tasks, alone)
        others = dict(zip(tasks, reversed(tasks), strict=True))
        outcomes = [
            judge(session, task, alone[name], others[name]) for name, task in tasks.items()
        ]
    return outcomes, mixed


def main() -> int:
    """Print one row for each task; return 1 if an answer is not PyTorch's."""
    parser = argparse.ArgumentParser(description="Serve two tasks from one ONNX session.")
    parser.add_argument("--texts", type=int, default=1000, help="of each task, 8 to 1000")
    count = parser.parse_args().texts
    if not FEW <= count <= 1000:
        parser.error(f"--texts {count} is not from {FEW} to 1000")
    outcomes, mixed = run_example(count)
    print("task    plain   other's  adapted  PyTorch  as PyTorch's  embeddings within")
    for one in outcomes:
        shares = (one.plain, one.other, one.adapted, one.pytorch)
        row = "   ".join(f"{share:6.1%}" for share in shares)
        print(f"{one.task:6} {row}   {one.same} of {one.texts:4}  {one.farthest:.0e}")
    print(f"a batch with rows of both tasks is within {mixed:.0e} of its texts alone")
    return 0 if mixed <= CLOSE and all(one.holds for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
