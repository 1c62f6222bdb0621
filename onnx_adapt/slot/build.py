"""An adapter as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.errors import SlotError
from onnx_adapt.model.file import PROTOBUF_LIMIT, Model
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.form import Form, new_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import node_name
from onnx_adapt.slot.weights import fresh_weights

_OPSET, _IR_VERSION = 17, 8


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
        activation: One of `onnx_adapt.slot.activations.ACTIVATIONS`.
        name: Start of every layer's name.
        bias: Whether the projections have biases.
        seed: Seed of the random down-projection.

    Raises:
        SlotError: If a size is below 1 or too large, or the activation is unknown.

    Example:
        >>> import onnx_adapt as oa
        >>> model = oa.build_adapter(384)
        >>> [node.name for node in model.proto.graph.node if node.op_type != "Add"]
        ['adapter_down', 'adapter_act', 'adapter_up']
    """
    _check_sizes(hidden_size, bottleneck_size, seed)
    parts = ("down", "up", "down_bias", "up_bias") if bias else ("down", "up")
    form = Form(parts, activation, swappable=False, bottleneck=bottleneck_size)
    slot = new_slot(name, _Output(hidden_size), form)
    check_slot(slot, _OPSET)
    weights = fresh_weights(slot, bottleneck_size, np.random.default_rng(seed))
    nodes = slot_nodes(slot, _OPSET)
    names = _plain_names(slot, nodes)
    for node in nodes:
        _rename(node, names)
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


@dataclass(frozen=True, slots=True)
class _Output:
    """The one place for a slot in a model that is nothing but an adapter: its output."""

    width: int
    graph: str = "main"
    node: str = ""
    tensor: str = "output"
    module: str | None = None
    dtype: str = "float32"
    axis: int = -1
    rank: int | None = None


def _check_sizes(hidden: int, bottleneck: int, seed: int) -> None:
    for value, least, what in (
        (hidden, 1, "hidden size"),
        (bottleneck, 1, "bottleneck"),
        (seed, 0, "seed"),
    ):
        if value < least:
            raise SlotError(
                f"a {what} of {value} is not possible", hint=f"give {least} or more"
            )
    size = 2 * hidden * bottleneck + hidden + bottleneck
    if 4 * size > PROTOBUF_LIMIT:
        raise SlotError(
            f"an adapter of {hidden} by {bottleneck} passes protobuf's 2 GB",
            hint="choose a smaller hidden size or bottleneck",
        )


def _plain_names(slot: Slot, nodes: list[onnx.NodeProto]) -> dict[str, str]:
    """For each name of a slot (`adapter.<name>/down`) that of a layer (`<name>_down`)."""
    prefix = node_name(slot.name, "")
    names = {node.name: node.name.replace(prefix, f"{slot.name}_", 1) for node in nodes}
    names[slot.inner] = "input"
    names[f"{prefix}sum"] = f"{slot.name}_residual"
    (up,) = (node for node in nodes if node.name == f"{prefix}up")
    if slot.activation != "identity":
        names[up.input[0]] = f"{slot.name}_act"
    for part in slot.parts:
        suffix = "" if part.endswith("bias") else "_weight"
        names[slot.weight(part)] = f"{slot.name}_{part}{suffix}"
    return names


def _rename(node: onnx.NodeProto, names: dict[str, str]) -> None:
    node.name = names[node.name]
    node.input[:] = [names.get(text, text) for text in node.input]
    node.output[:] = [names.get(text, text) for text in node.output]
    del node.metadata_props[:]
