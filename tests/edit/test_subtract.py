"""What a full fine-tune changed is an adapter; PyTorch's outputs are the truth.

The tuned models are bases of `tests/cases` with PEFT's LoRA added to their weights in numpy.
What they compute is held against what PyTorch computes with the adapter on.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import B2, W1, W2, adapted, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from slot_models import session
from trained_cases import CASES, Case

import onnx_adapt as oa
from onnx_adapt.edit.differences import Wanted, low_rank
from onnx_adapt.errors import AdapterError, CheckpointError
from onnx_adapt.model.tensors import read_tensor


def _weight_of(proto: onnx.ModelProto, slot: oa.Slot) -> tuple[str, onnx.NodeProto, bool]:
    """The stored weight of a slot's layer, the layer, and whether it reads the transpose."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    made = {name: node for node in proto.graph.node for name in node.output}
    layer = made[slot.tensor]
    if layer.op_type == "Add":
        layer = next(made[n] for n in layer.input if n in made and n not in stored)
    position = 0 if layer.op_type == "Gather" else 1
    name = layer.input[position]
    turned = name not in stored and made[name].op_type == "Transpose"
    return made[name].input[0] if turned else name, layer, turned


def _add(proto: onnx.ModelProto, slot: oa.Slot, parts: Mapping[str, np.ndarray]) -> None:
    """Add the update of a slot to the weight of its layer."""
    name, layer, turned = _weight_of(proto, slot)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    up = parts["up"].astype(np.float64)
    if layer.op_type == "Conv":
        update = np.einsum("ri...,or->oi...", parts["down"].astype(np.float64), up[..., 0, 0])
    else:
        update = parts.get("table", parts.get("down")).astype(np.float64) @ up
    flags = {item.name: item.i for item in layer.attribute}
    update = update.T if turned != bool(flags.get("transB", 0)) else update
    value = numpy_helper.to_array(stored[name])
    stored[name].CopyFrom(numpy_helper.from_array((value + update).astype(value.dtype), name))


def tuned_model(case: Case) -> tuple[oa.Model, oa.Model, int]:
    """A base, the model with the case's LoRA in its weights, and the largest rank of it."""
    base = oa.open_model(case.base)
    proto = onnx.load(case.base)
    trained = oa.load_checkpoint(case.adapter, base)
    ranks = [0]
    for slot in trained.slots:
        parts = trained.adapter.weights[slot.owner]
        ranks.append(parts["up"].shape[1 if slot.axis == 1 else 0])
        _add(proto, slot, parts)
    values = {
        w.weight.original: trained.adapter.replaced[w.weight.name]
        for w in trained.replacements
    }
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return base, oa.Model(proto), max(ranks)


def _output(model: oa.Model, case: Case, folder: Path) -> np.ndarray:
    label, _ = case.expected()
    path = oa.save_model(model, folder / "run.onnx").path
    return session(path).run([label], case.inputs())[0]


def _with_adapter(base: oa.Model, checkpoint: oa.Checkpoint, case: Case) -> np.ndarray:
    """What the base computes with what `subtract` made fed to its slots."""
    adapted = oa.insert_checkpoint(base, checkpoint)
    with oa.AdapterSession(adapted, {"a": checkpoint.adapter}) as session:
        name, _ = case.expected()
        return session.run(case.inputs(), adapter="a")[name]


MODELS = [
    "peft_bert_lora_all_linear",
    "peft_bert_lora_default_ts",
    "peft_bert_lora_embedding",
    "peft_convnet_lora",
    "peft_gpt2_lora",
    "peft_gpt2_lora_ts",
    "peft_llama_lora_all_linear",
]


@pytest.mark.parametrize("name", MODELS)
def test_a_tuned_model_minus_its_base_computes_what_pytorch_does(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base, tuned, rank = tuned_model(case)
    _, expected = case.expected()
    close = {"rtol": 0, "atol": case.tolerance}
    np.testing.assert_allclose(_output(tuned, case, tmp_path), expected, **close)
    found = oa.subtract(base, tuned, energy=1 - 1e-10)
    assert max(found.losses.values()) < 1e-5
    for slot in found.slots:
        up = found.adapter.weights[slot.owner]["up"]
        assert up.shape[1 if slot.axis == 1 else 0] <= rank
    np.testing.assert_allclose(_with_adapter(base, found, case), expected, **close)
    baked = oa.insert_checkpoint(base, found, baked=True)
    np.testing.assert_allclose(_output(baked, case, tmp_path), expected, **close)


WEIGHTS = {
    "peft_gpt2_lora": "",
    "peft_gpt2_lora_ts": "inner.",
    "peft_bert_lora_default_ts": "",
    "peft_bert_lora_embedding": "",
}
"""Cases, and what the graph's names of weights have before PyTorch's."""


def _state_dict(model: oa.Model, slots: tuple[oa.Slot, ...]) -> dict[str, np.ndarray]:
    """The weights of a model by PyTorch's names; of Linears without a name, those adapted."""
    proto = model.proto
    found = {
        tensor.name: read_tensor(model, tensor)
        for tensor in proto.graph.initializer
        if tensor.name.endswith((".weight", ".bias"))
    }
    for slot in slots:
        name = _weight_of(proto, slot)[0]
        if not name.endswith(".weight"):
            tensor = next(t for t in proto.graph.initializer if t.name == name)
            found[f"{slot.module}.weight"] = read_tensor(model, tensor).T
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_minus_those_of_the_base_compute_what_pytorch_does(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base, tuned, _ = tuned_model(case)
    slots = oa.load_checkpoint(case.adapter, base).slots
    files = {}
    for label, model in (("base", base), ("tuned", tuned)):
        weights = _state_dict(model, slots)
        files[label] = tmp_path / f"{label}.safetensors"
        named = {key.removeprefix(WEIGHTS[name]): value for key, value in weights.items()}
        safetensors.numpy.save_file(named, files[label])
    found = oa.subtract(
        base, files["tuned"], base_weights=files["base"], energy=1 - 1e-10, name="sum"
    )
    assert found.adapter.name == "sum"
    assert max(found.losses.values()) < 1e-5
    _, expected = case.expected()
    np.testing.assert_allclose(_with_adapter(base, found, case), expected, 0, case.tolerance)


def _tuned(
    changes: Mapping[str, np.ndarray], proto: onnx.ModelProto | None = None
) -> oa.Model:
    """A model with other values of some of its stored tensors."""
    made = onnx.ModelProto()
    made.CopyFrom(proto or two_layers())
    for tensor in made.graph.initializer:
        if tensor.name in changes:
            value = changes[tensor.name].astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
    return oa.Model(made)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]))
@settings(max_examples=15, deadline=None)
def test_the_base_with_lora_minus_the_base_is_the_product_of_that_lora(
    seed: int, rank: int
) -> None:
    rng = np.random.default_rng(seed)
    down, up = rng.normal(size=(40, rank)), rng.normal(size=(rank, 30))
    base = rng.normal(size=(40, 30))
    found = low_rank("fc", (base + down @ up - base).T, Wanted(None, 1 - 1e-10), "float64")
    assert found is not None
    edit, loss = found
    assert loss < 1e-7
    assert edit.a.shape[0] == rank
    np.testing.assert_allclose(
        (edit.b @ edit.a).T, down @ up, 0, 1e-9 * np.abs(down @ up).max()
    )


@given(st.integers(1, 6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_no_lora_of_the_rank_is_nearer(rank: int, wide: bool) -> None:
    matrix = np.random.default_rng(rank).normal(size=(20, 30) if wide else (30, 20))
    found = low_rank("fc", matrix, Wanted(rank, None), "float64")
    assert found is not None
    values = np.linalg.svd(matrix, compute_uv=False)
    least = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert found[1] == pytest.approx(least, rel=1e-9)


X = np.random.default_rng(4).standard_normal((3, 4)).astype(np.float32)


def test_biases_and_what_lora_would_not_make_smaller_are_replaced() -> None:
    """A 4 x 4 matrix has 16 numbers; LoRA of rank 1 has 8, of rank 2 as many as it."""
    rng = np.random.default_rng(0)
    first = W1.T + np.outer(rng.normal(size=4), rng.normal(size=4))
    tuned = _tuned(
        {
            "onnx::MatMul_1": first,
            "onnx::MatMul_2": rng.normal(size=(4, 4)),
            "fc2.bias": B2 + 1,
        }
    )
    base = oa.Model(two_layers())
    found = oa.subtract(base, tuned, energy=0.999999)
    assert list(found.adapter.weights) == ["fc1"]
    assert sorted(found.adapter.replaced) == ["base.fc2.bias", "base.onnx::MatMul_2"]
    model = oa.insert_checkpoint(base, found)
    oa.verify(base, model).raise_for_mismatch()
    with oa.AdapterSession(model, {"a": found.adapter}) as running:
        ours = running.run({"x": X}, adapter="a")["y"]
        theirs = session(tuned.proto).run(None, {"x": X})[0]
        np.testing.assert_allclose(ours, theirs, 0, 1e-5)
        np.testing.assert_array_equal(
            running.run({"x": X})["y"], session(base.proto).run(None, {"x": X})[0]
        )
    assert oa.remove(model).proto == base.proto


def test_one_matrix_of_two_layers_is_changed_in_both() -> None:
    change = np.outer(np.arange(4), np.ones(4))
    base = oa.Model(two_layers(tied=True))
    tuned = _tuned({"onnx::MatMul_1": W1.T + change}, base.proto)
    found = oa.subtract(base, tuned, rank=1)
    assert len(found.slots) == 2
    model = oa.insert_checkpoint(base, found)
    with oa.AdapterSession(model, {"a": found.adapter}) as running:
        ours = running.run({"x": X}, adapter="a")["y"]
    np.testing.assert_allclose(ours, session(tuned.proto).run(None, {"x": X})[0], 0, 1e-4)


def test_an_embedding_that_is_the_head_as_well_is_changed_in_both(tmp_path: Path) -> None:
    """Files of GPT-2's weights have it once."""
    case = CASES["peft_gpt2_lora"]
    base = oa.open_model(case.base)
    values = {t.name: read_tensor(base, t) for t in base.proto.graph.initializer}
    (wte,) = (v for n, v in values.items() if n == "lm_head.weight")
    rng = np.random.default_rng(0)
    changed = wte + 0.3 * rng.normal(size=(60, 2)) @ rng.normal(size=(2, 32))
    both = {
        name: changed if value.shape == wte.shape else changed.T
        for name, value in values.items()
        if value.dtype == np.float32
        and np.array_equal(np.sort(value, None), np.sort(wte, None))
    }
    truth = _tuned(both, onnx.load(case.base))
    for label, value in (("base", wte), ("tuned", changed.astype(np.float32))):
        safetensors.numpy.save_file(
            {"transformer.wte.weight": np.ascontiguousarray(value)},
            tmp_path / f"{label}.safetensors",
        )
    found = oa.subtract(
        base,
        tmp_path / "tuned.safetensors",
        base_weights=tmp_path / "base.safetensors",
        rank=2,
    )
    assert len(found.slots) == 2
    expected = _output(truth, case, tmp_path)
    assert np.abs(expected - _output(base, case, tmp_path)).max() > 0.1
    np.testing.assert_allclose(_with_adapter(base, found, case), expected, 0, case.tolerance)
    # A head of its own keeps its weights.
    for label in ("base", "tuned"):
        file = tmp_path / f"{label}.safetensors"
        held = {**safetensors.numpy.load_file(file), "lm_head.weight": wte.copy()}
        safetensors.numpy.save_file(held, file)
    files = {"base_weights": tmp_path / "base.safetensors"}
    alone = oa.subtract(base, tmp_path / "tuned.safetensors", rank=2, **files)
    assert len(alone.slots) == 1


def _renamed() -> oa.Model:
    proto = two_layers()
    proto.graph.node[0].op_type = "Gemm"
    return oa.Model(proto)


REFUSED = {
    "same": (lambda: oa.Model(two_layers()), {"rank": 1}, "nothing to subtract"),
    "other graph": (_renamed, {"rank": 1}, "they differ in node '/fc1/MatMul'"),
    "other sizes": (
        lambda: _tuned({"fc2.bias": np.ones(5)}),
        {"rank": 1},
        r"they differ in tensor 'fc2.bias' \[4\]",
    ),
    "fewer": (lambda: oa.Model(onnx.ModelProto()), {"rank": 1}, "they differ in"),
    "tied": (lambda: oa.Model(two_layers(tied=True)), {"rank": 1}, "they differ in tensor"),
    "NaN": (lambda: _tuned({"fc2.bias": B2 * np.nan}), {"rank": 1}, "NaN or infinity"),
    "wide": (lambda: _tuned({"onnx::MatMul_1": W1}), {"rank": 5}, "over the width"),
    "rank 0": (lambda: _tuned({"onnx::MatMul_1": W1}), {"rank": 0}, "no rank"),
    "no rank": (lambda: _tuned({"onnx::MatMul_1": W1}), {}, "either a rank or an energy"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_subtracted_is_refused(what: str) -> None:
    tuned, target, message = REFUSED[what]
    with pytest.raises((CheckpointError, AdapterError), match=message):
        oa.subtract(oa.Model(two_layers()), tuned(), **target)


def test_a_model_with_slots_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has slots already"):
        oa.subtract(adapted(), oa.Model(two_layers()), rank=1)


KEYS = {"fc1.weight": W1, "fc2.weight": W2, "fc2.bias": B2}

ODD_FILES = {
    "same": (KEYS, "nothing to subtract"),
    "fewer": ({"fc1.weight": W1}, "which tuned.safetensors lacks"),
    "more": ({**KEYS, "score.weight": W1}, "has 'score.weight', which base.safetensors lacks"),
    "resized": ({**KEYS, "fc1.weight": np.ones((7, 4), "float32")}, "shape"),
    "NaN": ({**KEYS, "fc2.bias": B2 * np.nan}, "NaN or infinity"),
    "integers": ({**KEYS, "fc2.bias": np.ones(4, np.int64)}, "holds no floats"),
    "wide": ({**KEYS, "fc1.weight": W1 + 1}, "over the width"),
}


@pytest.mark.parametrize("what", ODD_FILES)
def test_files_that_cannot_be_subtracted_are_refused(what: str, tmp_path: Path) -> None:
    weights, message = ODD_FILES[what]
    for label, values in (("base", KEYS), ("tuned", weights)):
        safetensors.numpy.save_file(values, tmp_path / f"{label}.safetensors")
    files = {"base_weights": tmp_path / "base.safetensors"}
    with pytest.raises(CheckpointError, match=message) as caught:
        oa.subtract(oa.Model(two_layers()), tmp_path / "tuned.safetensors", rank=5, **files)
    if what == "resized":
        assert "resize the base by 3 rows" in caught.value.hint
    with pytest.raises(CheckpointError, match="the base's are needed"):
        oa.subtract(oa.Model(two_layers()), tmp_path / "tuned.safetensors", rank=1)


def test_a_weight_that_the_graph_lacks_is_refused(tmp_path: Path) -> None:
    for label, value in (("base", W1 + 3), ("tuned", W2)):
        safetensors.numpy.save_file({"fc9.weight": value}, tmp_path / f"{label}.safetensors")
    files = {"base_weights": tmp_path / "base.safetensors"}
    with pytest.raises(CheckpointError, match="fc9"):
        oa.subtract(oa.Model(two_layers()), tmp_path / "tuned.safetensors", rank=1, **files)
