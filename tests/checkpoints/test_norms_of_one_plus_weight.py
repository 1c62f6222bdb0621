"""Normalisations that multiply by 1 + weight, as Gemma's, whichever of the two a graph has.

That the base's weights tell which it is, `test_names_lost.py` shows for the same case.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import helper, numpy_helper
from trained_cases import CASES, run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

GEMMA = CASES["peft_gemma_norms"]


def _sums(proto: onnx.ModelProto) -> dict[str, str]:
    """The modules of the folded sums, by the names of these."""
    modules = {}
    names = {
        stored.name for stored in proto.graph.initializer if stored.name.startswith("add")
    }
    for node in proto.graph.node:
        for name in names.intersection(node.input):
            entry = next(e for e in node.metadata_props if e.key.endswith("name_scopes"))
            modules[name] = entry.value.split("'")[-4]
    return modules


def _distance(base: oa.Model, folder: Path) -> float:
    found = oa.load_checkpoint(GEMMA.adapter, base)
    oa.save_model(oa.insert_checkpoint(base, found), folder / "adapted.onnx")
    return GEMMA.distance(
        run(folder / "adapted.onnx", {**GEMMA.inputs(), **found.adapter.feeds()})
    )


def test_a_graph_that_adds_the_one_itself_gets_the_weight(tmp_path: Path) -> None:
    proto = onnx.load(GEMMA.base)
    modules = _sums(proto)
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    proto.graph.initializer.append(one)
    for stored in proto.graph.initializer:
        if stored.name in modules:
            name, total = f"{modules[stored.name]}.weight", stored.name
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) - 1, name))
            add = helper.make_node("Add", [name, "one"], [total], f"node_{total}")
            reader = next(node for node in proto.graph.node if total in node.input)
            add.metadata_props.extend(reader.metadata_props)
            proto.graph.node.insert(list(proto.graph.node).index(reader), add)
    onnx.save(proto, tmp_path / "base.onnx")
    assert _distance(oa.open_model(tmp_path / "base.onnx"), tmp_path) < GEMMA.tolerance


def test_a_weight_that_torchscript_computed_needs_the_base_s_weights(tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(onnx.load(GEMMA.base))
    renamed = {name: f"onnx::Mul_{i}" for i, name in enumerate(_sums(proto))}
    for stored in proto.graph.initializer:
        stored.name = renamed.get(stored.name, stored.name)
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(proto, tmp_path / "base.onnx")
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(GEMMA.adapter, oa.open_model(tmp_path / "base.onnx"))
    assert "--base-weights" in (caught.value.hint or "")


def test_a_layernorm_whose_weight_is_a_sum_is_not_replaced_by_the_weight_alone(
    tmp_path: Path,
) -> None:
    """Nemotron's LayerNorm1P: the sum is an input of one node."""
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[2, 4] x) => (float[2, 4] y)
    <float[4] w = {1.5, 1.25, 0.5, 2}> { y = LayerNormalization (x, w) }"""
    for name, wanted in (("add_7", 1.25), ("model.norm.weight", 0.25)):
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer[0].name = proto.graph.node[0].input[1] = name
        proto.graph.node[0].name = "/model/norm/LayerNormalization"
        onnx.save(proto, tmp_path / "base.onnx")
        base = oa.open_model(tmp_path / "base.onnx")
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        key = "base_model.model.model.norm.weight"
        trained = {key: np.full(4, 0.25, np.float32)}
        safetensors.numpy.save_file(trained, folder / "adapter_model.safetensors")
        (value,) = oa.load_checkpoint(folder, base).adapter.replaced.values()
        assert value.tolist() == [wanted] * 4
