"""The table of docs/works-on.md: what each deployment pipeline writes takes which adapters.

The page is the table; every cell of it is tried here. `tools/export_pipelines.py` made the
models, the adapters and PyTorch's answers. A difference from PyTorch is the largest over all
logits of what the adapter changes, relative to the largest change: quantised bases round
what they compute, and the adapter is measured, not the base.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pipeline_runs import Arrays, Fixture, Runner, fixtures, part_of, run_model

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError

PAGE = Path(__file__).parents[2] / "docs" / "works-on.md"
METHODS = ("lora", "lora_all", "dora", "ia3", "bottleneck")
YES, CALIBRATED, UNTRAINED = "yes", "calibrated", "n/a"
REASONS = {
    "quantised-attention": "its weight is stored as 8-bit integers",
    "folded-calls": "may be missing in the graph",
    "integers": "computed in integers",
    "other-names": "modules of the checkpoint are in no file",
}
"""By the section of the page that explains a refusal: what the error says."""

ROUNDS_WHEN_OFF = ("bert/tjs_q4f16", "llama/tjs_q4f16")
"""ONNX Runtime computes float16 in float32 on a CPU, without rounding between two nodes; with
a slot between them it rounds there, also if the slot is off."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        fixture: The model files that it is about.
        within: The largest difference from PyTorch.
        cells: What the table says, by method.
    """

    fixture: Fixture
    within: float
    cells: dict[str, str]


def read_table() -> list[Row]:
    """Read the lines of the page's table that name a fixture."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if found := re.search(r"`(\w+/\w+)` \|$", line):
            *_, within, _ = cells = [cell.strip() for cell in line.split("|")[1:-1]]
            said = dict(zip(METHODS, cells[1:6], strict=True))
            rows.append(Row(Fixture(found[1]), float(within), said))
    return rows


ROWS = read_table()
CELLS = [
    pytest.param(row, method, id=f"{row.fixture.name}-{method}")
    for row in ROWS
    for method in METHODS
    if row.cells[method] != UNTRAINED
]


@pytest.fixture(scope="module")
def base_runs() -> dict[str, Arrays]:
    """What the bases give, by fixture; each is run once."""
    return {}


def difference(answer: np.ndarray, ours: np.ndarray) -> float:
    return float(np.abs(answer - ours).max() / np.abs(answer).max())


def adapt(row: Row, method: str, folder: Path) -> tuple[dict[str, Path], Path | None]:
    """Insert a trained adapter into every file; prove each.

    Returns:
        The files by name, and the adapter to feed; None where it is filled into several files.
    """
    if len(row.fixture.files) > 1:
        return adapt_folder(row, method, folder, filled=True), None
    ((name, path),) = row.fixture.files.items()
    base = oa.open_model(path)
    trained = oa.load_checkpoint(row.fixture.adapter(method), base)
    adapted = oa.insert_checkpoint(base, trained)
    given = row.fixture.inputs() if row.cells[method] == CALIBRATED else None
    if given is not None:
        adapted = oa.calibrate(adapted, trained.adapter, given)
    proof = trained.adapter if given is not None else None
    oa.verify(base, adapted, inputs=given, adapter=proof).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto
    oa.save_model(adapted, folder / path.name)
    oa.save_adapter(trained.adapter, folder / "adapter.onnx_adapter")
    return {name: folder / path.name}, folder / "adapter.onnx_adapter"


def adapt_folder(row: Row, method: str, folder: Path, *, filled: bool) -> dict[str, Path]:
    made = oa.insert_folder(row.fixture.folder, row.fixture.adapter(method))
    oa.save_adapter(made.adapter, folder / "all.safetensors")
    adapter = oa.load_adapter(folder / "all.safetensors")
    files = {}
    for file in made.files:
        assert file.adapted is not None
        oa.verify(file.base, file.adapted, weights=False).raise_for_mismatch()
        assert oa.remove(file.adapted).proto == file.base.proto
        model = oa.fill(file.adapted, adapter) if filled else file.adapted
        oa.save_model(model, folder / file.path)
        files[file.path.stem] = folder / file.path
    return files


@pytest.mark.parametrize(("row", "method"), CELLS)
def test_the_table_is_true(
    row: Row, method: str, tmp_path: Path, base_runs: dict[str, Arrays]
) -> None:
    fixture, said = row.fixture, row.cells[method]
    if said not in (YES, CALIBRATED):
        section = re.fullmatch(r"\[no\]\(#([\w-]+)\)", said)
        assert section, f"the table says {said!r}"
        with pytest.raises(AdaptError) as caught:
            adapt(row, method, tmp_path)
        assert REASONS[section[1]] in caught.value.message
        assert caught.value.hint
        return
    files, adapter = adapt(row, method, tmp_path)
    if fixture.name not in base_runs:
        base_runs[fixture.name] = run_model(fixture, Runner(fixture.files))
    base = base_runs[fixture.name]
    on = run_model(fixture, Runner(files, adapter))
    effect = fixture.answer(method) - fixture.answer("base")
    for name, logits in on.items():
        off = difference(part_of(effect, name), logits - base[name])
        assert off < row.within, f"{name} differs from PyTorch by {off:.1e} of the effect"


@pytest.mark.parametrize("row", ROWS, ids=[row.fixture.name for row in ROWS])
def test_a_model_with_all_slots_off_gives_what_its_base_gives(
    row: Row, tmp_path: Path
) -> None:
    method = next((name for name in METHODS if row.cells[name] in (YES, CALIBRATED)), None)
    if method is None:
        return
    if len(row.fixture.files) > 1:
        files = adapt_folder(row, method, tmp_path, filled=False)
    else:
        files, _ = adapt(row, method, tmp_path)
    exact = row.fixture.name not in ROUNDS_WHEN_OFF and row.cells[method] != CALIBRATED
    base = run_model(row.fixture, Runner(row.fixture.files, exact=True))
    for name, logits in run_model(row.fixture, Runner(files, exact=True)).items():
        if exact:
            np.testing.assert_array_equal(logits, base[name])
        else:
            assert difference(base[name], logits) < row.within


@pytest.mark.parametrize("row", ROWS, ids=[row.fixture.name for row in ROWS])
def test_every_base_gives_what_pytorch_gives(row: Row) -> None:
    answer = row.fixture.answer("base")
    for name, logits in run_model(row.fixture, Runner(row.fixture.files)).items():
        assert difference(part_of(answer, name), logits) < row.within


def test_every_fixture_and_every_trained_adapter_is_in_the_table() -> None:
    assert sorted(row.fixture.name for row in ROWS) == [item.name for item in fixtures()]
    for row in ROWS:
        trained = {name for name in METHODS if row.fixture.adapter(name).is_dir()}
        assert trained == {name for name in METHODS if row.cells[name] != UNTRAINED}


def test_every_refusal_of_the_table_has_its_section() -> None:
    text = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^### (.+)$", text, re.MULTILINE)
    sections = {title.lower().replace(" ", "-") for title in titles}
    linked = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert linked == sections == set(REASONS)
