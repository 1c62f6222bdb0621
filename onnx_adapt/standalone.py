"""An adapter as a model of its own."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.errors import SlotError
from onnx_adapt.manifest import Slot
from onnx_adapt.model_file import Model
from onnx_adapt.slot import check_slot, fresh_weights, slot_nodes

_OPSET, _IR_VERSION = 17, 8
_LAYERS = {"down": "down", "act": "act", "up": "up", "sum": "residual"}


def build_adapter(
    hidden_size: int,
    bottleneck_size: int = 64,
    *,
    activation: str = "relu",
    name: str = "adapter",
    bias: bool = True,
    seed: int = 0,
) -> Model:
    """Build a bottleneck adapter as a model: `(batch, hidden)` to `(batch, hidden)`.

    Its layers are `<name>_down`, `<name>_act`, `<name>_up` and `<name>_residual`. Fresh, it
    is the identity. The form is Edifice's `Edifice.Meta.Adapter` (Houlsby et al., 2019).

    Args:
        hidden_size: Size of the features.
        bottleneck_size: Size between the projections.
        activation: One of `onnx_adapt.activations.ACTIVATIONS`.
        name: Start of every layer's name.
        bias: Whether the projections have biases.
        seed: Seed of the random down-projection.

    Raises:
        SlotError: If a size is below 1 or the activation is unknown.

    Example:
        >>> import onnx_adapt as oa
        >>> model = oa.build_adapter(384)
        >>> [node.name for node in model.proto.graph.node if node.op_type != "Add"]
        ['adapter_down', 'adapter_act', 'adapter_up']
    """
    for value, what in ((hidden_size, "hidden size"), (bottleneck_size, "bottleneck")):
        if value < 1:
            raise SlotError(f"a {what} of {value} is not possible", hint="give 1 or more")
    parts = ("down", "up", "down_bias", "up_bias") if bias else ("down", "up")
    slot = Slot(
        name=name,
        graph="main",
        node="",
        tensor="output",
        inner="input",
        output="output",
        source="input",
        width=hidden_size,
        source_width=hidden_size,
        dtype="float32",
        axis=-1,
        rank=0,
        activation=activation,
        parts=parts,
        norm="",
        norm_after="",
        module="",
        swappable=False,
        bottleneck=bottleneck_size,
    )
    check_slot(slot, _OPSET)
    weights = fresh_weights(slot, bottleneck_size, np.random.default_rng(seed))
    names = {slot.weight(part): f"{name}_{part}" for part in parts}
    nodes = slot_nodes(slot, _OPSET)
    for node in nodes:
        _rename(node, slot, names)
    io = [
        helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, ["batch", hidden_size])
        for tensor in ("input", "output")
    ]
    stored = [
        numpy_helper.from_array(weights[part], names[slot.weight(part)]) for part in parts
    ]
    graph = helper.make_graph(nodes, name, io[:1], io[1:], stored)
    opsets = [helper.make_opsetid("", _OPSET)]
    return Model(
        helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="onnx-adapt"
        )
    )


def _rename(node: onnx.NodeProto, slot: Slot, weights: dict[str, str]) -> None:
    """Turn a slot's names, `adapter.<name>/down`, into a layer's, `<name>_down`."""
    prefix = f"adapter.{slot.name}/"

    def plain(text: str) -> str:
        if text in weights:
            return weights[text]
        label = text.removeprefix(prefix)
        return text if label == text else f"{slot.name}_{_LAYERS.get(label, label)}"

    node.name = plain(node.name)
    node.input[:] = [plain(text) for text in node.input]
    node.output[:] = [plain(text) for text in node.output]
    del node.metadata_props[:]
