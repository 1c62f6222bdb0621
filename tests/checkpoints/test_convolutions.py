"""LoRA on convolutions: what their cases do not show."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError


@pytest.mark.parametrize("mode", ["reflect", "edge", "wrap", "constant"])
def test_a_conv_that_pads_by_other_values_than_zero_is_refused(
    mode: str, tmp_path: Path
) -> None:
    """PEFT's lora_A pads by zeros whatever the padding_mode of the base is."""
    pads = numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 1]), "pads")
    weight = numpy_helper.from_array(np.ones((4, 4, 3), np.float32), "conv.weight")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 9]) for name in "xy")
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["padded"], "/conv/Pad", mode=mode),
        helper.make_node("Conv", ["padded", "conv.weight"], ["y"], "/conv/Conv"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [pads, weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]}'
    )
    tensors = {
        "base_model.model.conv.lora_A.weight": np.ones((2, 4, 3), np.float32),
        "base_model.model.conv.lora_B.weight": np.ones((4, 2, 1), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    base = oa.open_model(tmp_path / "m.onnx")
    if mode == "constant":
        assert len(oa.load_checkpoint(folder, base).slots) == 1
        return
    with pytest.raises(CheckpointError, match="does not pad by zeros"):
        oa.load_checkpoint(folder, base)


def test_the_slots_of_convolutions_of_one_and_three_dimensions_verify() -> None:
    case = CASES["peft_branches_lora"]
    base = oa.open_model(case.base)
    found = oa.load_checkpoint(case.adapter, base)
    windows = {slot.name: slot.window for slot in found.slots}
    assert windows["grouped"] == (5, 2, 2, 2, 1)
    assert windows["volume"] == (3, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1)
    adapted = oa.insert_checkpoint(base, found)
    assert oa.verify(base, adapted, inputs=case.inputs()).passed
