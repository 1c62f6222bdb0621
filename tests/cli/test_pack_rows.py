"""`pack-rows`: the adapters of the rows of a batch in one file, from the command line."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from adapter_models import B2, lora, lora_on, peft_folder, saved_model, two_layers
from disk_models import refused, run

import onnx_adapt as oa

X = np.random.default_rng(9).standard_normal((4, 4)).astype(np.float32)
FR, DE = lora(), lora(seed=5, rank=3)


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a batched model, and two adapters of different rank for it."""
    monkeypatch.chdir(tmp_path)
    saved_model(Path("model.onnx"))
    peft_folder(Path("fr"), FR)
    peft_folder(Path("de"), DE, lora_alpha=9)
    insert = run("insert", "model.onnx", "--adapter", "fr", "--batched", "-o", "rows.onnx")
    assert insert.status == 0, insert
    for name in ("fr", "de"):
        done = run("convert", name, "--for", "rows.onnx", "-o", f"{name}.safetensors")
        assert done.status == 0, done


def _in_ort(model: str, adapter: str, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes with an adapter file that it loads itself."""
    loaded = ort.LoraAdapter()
    loaded.Load(adapter)
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x}, options)[0]


def test_onnx_runtime_gives_each_row_the_numbers_of_its_own_lora() -> None:
    files = ("fr.safetensors", "-", "de.safetensors", "fr.safetensors")
    done = run("pack-rows", "rows.onnx", *files, "-o", "all.onnx_adapter", "--json")
    assert done.status == 0, done
    assert json.loads(done.out)["rows"] == ["fr", None, "de", "fr"]
    fr, base, de = lora_on(X, FR), lora_on(X, {}), lora_on(X, DE, alpha=9)
    wanted = [fr[0], base[1], de[2], fr[3]]
    found = _in_ort("rows.onnx", "all.onnx_adapter", X)
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-4, atol=1e-4)


def test_check_finds_a_pack_whole_and_no_run_is_suggested_for_it() -> None:
    packed = run("pack-rows", "rows.onnx", "de.safetensors", "-", "-o", "all.npz")
    assert packed.err.splitlines()[-1] == "next: onnx-adapt check rows.onnx all.npz"
    done = run("check", "rows.onnx", "all.npz")
    assert done.status == 0, done
    assert done.err.splitlines()[-1] == "next: onnx-adapt slots rows.onnx"
    both = run("check", "rows.onnx", "all.npz", "fr.safetensors")
    assert both.err.splitlines()[-1].endswith("--adapter fr.safetensors --compare base")


def test_what_cannot_be_packed_is_refused_and_nothing_is_written() -> None:
    assert run("insert", "model.onnx", "--adapter", "fr", "-o", "one.onnx").status == 0
    assert run("pack-rows", "rows.onnx", "fr.safetensors", "-o", "all.npz").status == 0
    other = two_layers()
    other.graph.initializer[0].raw_data = bytes(64)
    saved_model(Path("other.onnx"), other)
    insert = run("insert", "other.onnx", "--adapter", "fr", "--batched", "-o", "zero.onnx")
    assert insert.status == 0, insert
    for model, file, output, why in (
        ("one.onnx", "fr.safetensors", "o.npz", "is not batched"),
        ("model.onnx", "fr.safetensors", "o.npz", "has no slots"),
        ("zero.onnx", "fr.safetensors", "o.npz", "made for another base model"),
        ("rows.onnx", "all.npz", "o.npz", "packed for rows already"),
        ("rows.onnx", "no.safetensors", "o.npz", "cannot read no.safetensors"),
        ("rows.onnx", "fr.safetensors", "fr.safetensors", "would replace"),
        ("rows.onnx", "fr.safetensors", "rows.onnx", "would replace"),
        ("rows.onnx", "fr.safetensors", "o.txt", "o.txt"),
    ):
        result = refused("pack-rows", model, file, "-", "-o", output)
        assert why in result.error
        assert result.status == 2
    assert "FILES" in refused("pack-rows", "rows.onnx", "-o", "o.npz").error


def test_an_adapter_with_weights_of_the_base_is_refused() -> None:
    tensors = {**FR, "base_model.model.fc2.bias": B2 + 1}
    peft_folder(Path("head"), tensors)
    for command in (
        ("insert", "model.onnx", "--adapter", "head", "--batched", "-o", "head.onnx"),
        ("convert", "head", "--for", "head.onnx", "-o", "head.npz"),
    ):
        assert run(*command).status == 0
    result = refused("pack-rows", "head.onnx", "head.npz", "-", "-o", "all.npz")
    assert "replaces 'base.fc2.bias' of the base" in result.error


def test_an_adapter_for_all_files_of_a_folder_is_packed_in_each_ones_precision() -> None:
    half = Path("m")
    half.mkdir()
    saved_model(half / "model.onnx")
    saved_model(half / "model_fp16.onnx", two_layers(np.float16))
    adapter = oa.insert_folder(half, "fr").adapter
    oa.save_adapter(adapter, "both.safetensors")
    base = oa.open_model(half / "model_fp16.onnx")
    batched = oa.insert_checkpoint(base, oa.load_checkpoint("fr", base), batched=True)
    oa.save_model(batched, "half.onnx")
    files = ("both.safetensors", "-", "both.safetensors", "-")
    done = run("pack-rows", "half.onnx", *files, "-o", "all.onnx_adapter")
    assert done.status == 0, done
    assert run("check", "half.onnx", "all.onnx_adapter").status == 0
    found = _in_ort("half.onnx", "all.onnx_adapter", X.astype(np.float16))
    wanted = np.stack([lora_on(X, FR if row % 2 == 0 else {})[row] for row in range(4)])
    np.testing.assert_allclose(found, wanted, rtol=0.05, atol=0.05)
