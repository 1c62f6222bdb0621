"""IA3 on an input that other layers read too: scaled on the way to one layer alone."""

from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic
from trained_cases import CASES, run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

LLAMA = CASES["peft_llama_ia3_inputs"]
BRANCHES = CASES["peft_branches_ia3"]
SHARED = "model.layers.0.self_attn.q_proj"


def _with_ia3(model: oa.Model) -> tuple[oa.Model, oa.Adapter]:
    found = oa.load_checkpoint(LLAMA.adapter, model)
    return oa.insert_checkpoint(model, found), found.adapter


def _same_bytes(model: oa.Model, folder: Path) -> bool:
    oa.save_model(model, folder / "removed.onnx")
    return (folder / "removed.onnx").read_bytes() == LLAMA.base.read_bytes()


def test_layers_that_read_one_tensor_have_a_vector_each() -> None:
    model, adapter = _with_ia3(oa.open_model(LLAMA.base))
    slots = {slot.name: slot for slot in oa.list_slots(model)}
    q, v = (slots[f"model.layers.0.self_attn.{n}_proj.input"] for n in "qv")
    assert q.tensor == v.tensor
    assert q.output != v.output
    assert not np.array_equal(
        adapter.weights[q.name]["scale"], adapter.weights[v.name]["scale"]
    )


def test_an_input_of_the_model_is_scaled_for_one_of_the_layers_that_read_it() -> None:
    found = oa.load_checkpoint(BRANCHES.adapter, oa.open_model(BRANCHES.base))
    slot = next(slot for slot in found.slots if slot.name == "right.input")
    assert slot.tensor == "image"


@pytest.mark.parametrize("first", ["tensor", "ia3"])
def test_slots_on_a_tensor_and_on_what_one_layer_reads_of_it_come_and_go_alone(
    first: str, tmp_path: Path
) -> None:
    base = oa.open_model(LLAMA.base)
    read = next(
        s.tensor
        for s in oa.load_checkpoint(LLAMA.adapter, base).slots
        if s.name == f"{SHARED}.input"
    )
    if first == "tensor":
        model, adapter = _with_ia3(oa.insert(base, after=read))
    else:
        model, adapter = _with_ia3(base)
        model = oa.insert(model, after=read)
    feeds = LLAMA.inputs()
    oa.save_model(model, tmp_path / "both.onnx")
    assert LLAMA.distance(run(tmp_path / "both.onnx", {**feeds, **adapter.feeds()})) < 1e-4
    report = oa.verify(base, model, inputs=feeds)
    assert report.passed, [c for c in report.checks if not c.passed]

    scaled = list(adapter.weights)
    rest = oa.remove(model, slots=scaled)
    assert oa.verify(base, rest, inputs=feeds).passed
    assert _same_bytes(oa.remove(rest), tmp_path)
    rest = oa.remove(model, slots=[s.name for s in oa.list_slots(rest)])
    oa.save_model(rest, tmp_path / "ia3.onnx")
    assert LLAMA.distance(run(tmp_path / "ia3.onnx", {**feeds, **adapter.feeds()})) < 1e-4
    assert _same_bytes(oa.remove(rest), tmp_path)


def test_a_lora_that_came_after_reads_the_base_s_tensor_again_without_ia3(
    tmp_path: Path,
) -> None:
    base = oa.open_model(LLAMA.base)
    model, _ = _with_ia3(base)
    scaled = [slot.name for slot in oa.list_slots(model)]
    lora = CASES["peft_llama_lora_all_linear"]
    found = oa.load_checkpoint(lora.adapter, model)
    both = oa.insert_checkpoint(model, found)
    assert oa.verify(base, both, inputs=LLAMA.inputs()).passed
    alone = oa.remove(both, slots=scaled)
    oa.save_model(alone, tmp_path / "lora.onnx")
    feeds = {**lora.inputs(), **found.adapter.feeds()}
    assert lora.distance(run(tmp_path / "lora.onnx", feeds)) < lora.tolerance
    assert _same_bytes(oa.remove(alone), tmp_path)


def test_a_second_ia3_is_stacked_and_either_can_go(tmp_path: Path) -> None:
    model, _ = _with_ia3(oa.open_model(LLAMA.base))
    first = [slot.name for slot in oa.list_slots(model)]
    twice, adapter = _with_ia3(model)
    second = [slot.name for slot in oa.list_slots(twice) if slot.name not in first]
    feeds = LLAMA.inputs()
    for names in (first, second):
        rest = oa.remove(twice, slots=names)
        oa.save_model(rest, tmp_path / "one.onnx")
        left = oa.list_slots(rest)
        given = {
            slot.weight("scale"): value
            for slot, value in zip(
                left, (weights["scale"] for weights in adapter.weights.values()), strict=True
            )
        }
        assert LLAMA.distance(run(tmp_path / "one.onnx", {**feeds, **given})) < 1e-4
    assert _same_bytes(oa.remove(twice), tmp_path)


def test_a_batch_can_have_a_vector_for_each_row(tmp_path: Path) -> None:
    base = oa.open_model(LLAMA.base)
    found = oa.load_checkpoint(LLAMA.adapter, base)
    model = oa.insert_checkpoint(base, found, batched=True)
    assert oa.verify(base, model, inputs=LLAMA.inputs()).passed
    oa.save_model(model, tmp_path / "batched.onnx")
    with oa.AdapterSession(
        tmp_path / "batched.onnx", adapters={"a": found.adapter}
    ) as session:
        off, on = (session.run(LLAMA.inputs(), adapter=name) for name in (None, "a"))
        mixed = session.run(LLAMA.inputs(), adapter=["a", None, "a"])
    np.testing.assert_allclose(mixed["logits"][::2], on["logits"][::2], atol=1e-5)
    np.testing.assert_allclose(mixed["logits"][1], off["logits"][1], atol=1e-5)


def test_the_same_vectors_convert_for_a_model_with_these_slots() -> None:
    model, adapter = _with_ia3(oa.open_model(LLAMA.base))
    again = oa.convert(LLAMA.adapter, model, name="again")
    for slot, weights in adapter.weights.items():
        np.testing.assert_array_equal(again.weights[slot]["scale"], weights["scale"])


def test_an_input_that_is_quantised_for_several_layers_at_once_is_refused(
    tmp_path: Path,
) -> None:
    exported = LLAMA.base.parent.with_name("llama_torchscript") / "base.onnx"
    quantize_dynamic(
        exported, tmp_path / "q.onnx", op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="quantised for several layers at once"):
        oa.load_checkpoint(LLAMA.adapter, oa.open_model(tmp_path / "q.onnx"))
