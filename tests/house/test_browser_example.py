"""What `examples/browser/` makes for its page; its own `test` runs the page in a browser."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_adapt as oa
from onnx_adapt.adapter.fitting import misfits

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples/browser"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make.py` writes, beside a copy of it."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("models", "tests"):
        (root / name).symlink_to(ROOT / name)
    (root / "examples/browser").mkdir(parents=True)
    program = shutil.copy(EXAMPLE / "make.py", root / "examples/browser")
    subprocess.run([sys.executable, "-W", "error", program], check=True)
    return root / "examples/browser/made"


def _expected(made: Path) -> dict:
    return json.loads((made / "expected.json").read_text(encoding="utf-8"))


def test_the_panels_of_listeners_are_curves_over_the_rating_of_the_base(made: Path) -> None:
    for name, found in _expected(made)["rating"].items():
        (rating,) = found["base"]
        assert rating < 3.5  # where the third bend begins
        strict = rating - 0.5 * max(rating - 1.5, 0) - 0.3 * max(rating - 2.2, 0)
        generous = rating + 0.8 * max(rating - 1, 0) - 0.4 * max(rating - 2.2, 0)
        assert found["strict.safetensors"] == pytest.approx([strict], abs=1e-6), name
        assert found["generous.onnx_adapter"] == pytest.approx([generous], abs=1e-6), name


def test_the_transformer_of_the_page_computes_what_pytorch_does(made: Path) -> None:
    found = _expected(made)["trained"]
    case = ROOT / "tests/cases/peft_bert_lora_default_ts"
    for name, file in (("base", "base_expected"), ("bert.safetensors", "expected")):
        (wanted,) = np.load(case / f"{file}.npz").values()
        np.testing.assert_allclose(found[name], wanted.ravel(), atol=1e-4)


def test_every_adapter_that_the_page_offers_is_made_and_fits(made: Path) -> None:
    page = (EXAMPLE / "index.html").read_text(encoding="utf-8")
    offered = re.findall(r"<option[^>]*>([\w.]+)</option>", page)
    model = oa.open_model(made / "rating.onnx")
    files = [name for name in offered if name != "None"]
    assert len(files) == 2
    for file in files:
        assert misfits(model, oa.load_adapter(made / file)) == []


def test_onnx_has_no_use_for_the_field_that_hides_a_default_from_the_browser() -> None:
    text = (EXAMPLE / "take-defaults.js").read_text(encoding="utf-8")
    graph = re.search(r"GRAPH = \{ initializer: (\d+), input: (\d+), reserved: (\d+) \}", text)
    assert graph is not None
    initializer, value, reserved = map(int, graph.groups())
    known = onnx.GraphProto.DESCRIPTOR.fields_by_number
    assert (known[initializer].name, known[value].name) == ("initializer", "input")
    assert reserved not in known


def test_the_pages_on_the_browser_name_the_version_that_is_installed() -> None:
    package = json.loads((EXAMPLE / "package.json").read_text(encoding="utf-8"))
    version = package["dependencies"]["onnxruntime-web"].rpartition(".")[0]
    for page in ("docs/deploy.md", "examples/browser/README.md"):
        said = re.findall(r"onnxruntime-web (\d+\.\d+)", (ROOT / page).read_text("utf-8"))
        assert set(said) == {version}, page
