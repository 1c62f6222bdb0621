"""What stands for a fused node where an adapter needs a tensor that is inside it.

An example. An optimiser wrote `y = BiasGelu(h, bias)` behind a Linear's product `h`, so that
the Linear's output `h + bias` is nowhere in the graph. For the node stand

    b = Add(h, bias)     y = Gelu(b)

and an adapter of the Linear goes on `b`. Each operator is one row of `_ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.graph.fused_bias import BIAS_INPUTS, FusedBias
from onnx_adapt.graph.fused_draft import Draft, FusedPlace
from onnx_adapt.graph.fused_layers import write_fused_conv, write_fused_gemm
from onnx_adapt.graph.fused_norms import write_skip_norm
from onnx_adapt.graph.index import GraphView, ModelIndex, default_opset
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.model.tensors import read_tensor

_MICROSOFT = "com.microsoft"


def write_out(index: ModelIndex, view: GraphView, place: FusedPlace, stem: str = "") -> Draft:
    """Write the nodes that stand for a fused one.

    Args:
        index: The model.
        view: The graph.
        place: What is needed of which node.
        stem: The first output of the node as the base calls it, if a slot renamed it.

    Raises:
        SiteRefusedError: If nobody can tell what it computes.
    """
    fused = view.nodes[view.producers[place.output]]
    draft = Draft(index, view, fused, place, stem or place.output)
    row = _ROWS.get(draft.fused.op_type)
    if row is None:
        raise draft.refuse("it is no operator whose parts are known")
    row(draft)
    draft.finish()
    return draft


def can_write_out(behind: FusedBias) -> bool:
    """Whether the node that adds a layer's bias can be written out, right behind the layer."""
    return is_known(behind.node) and not behind.moved and not behind.unsure


def is_known(node: onnx.NodeProto) -> bool:
    """Whether a node is of an operator whose parts are known."""
    return node.op_type in _ROWS


def _bias_gelu(draft: Draft) -> None:
    biased = draft.add_bias(*draft.fused.input[:2])
    output = draft.fused.output[0]
    draft.add("Gelu", [biased], "gelu", output=output, domain=_MICROSOFT)


def _fast_gelu(draft: Draft) -> None:
    biased = draft.add_bias(*draft.fused.input[:2])
    draft.keep(without=1, input_0=biased)


def _bias_add(draft: Draft) -> None:
    biased = draft.add_bias(*draft.fused.input[:2])
    draft.add("Add", [biased, draft.input(2)], "skip", output=draft.fused.output[0])


def _bias_dropout(draft: Draft) -> None:
    """`Dropout(input + bias) + residual`; nothing is dropped when a model is run."""
    biased = draft.add_bias(*draft.fused.input[:2])
    outputs = [*map(str, draft.fused.output), ""][:2]
    inputs = [biased, draft.input(3), draft.input(4)]
    while not inputs[-1]:
        del inputs[-1]
    residual = draft.input(2)
    given = draft.attributes("seed")
    made = draft.add(
        "Dropout", inputs, "dropout", output="" if residual else outputs[0], attributes=given
    )
    draft.nodes[-1].output.extend(outputs[1:] if outputs[1] else ())
    if residual:
        draft.add("Add", [made, residual], "residual", output=outputs[0])


def _split_gelu(draft: Draft) -> None:
    """The left half of `input + bias` times the Gelu of its right half."""
    biased = draft.add_bias(*draft.fused.input[:2])
    told = default_opset(draft.index.model.proto) >= _FIRST_WITH_HALVES
    halves = {"axis": -1, **({"num_outputs": 2} if told else {})}
    given = [helper.make_attribute(key, value) for key, value in halves.items()]
    left = draft.add("Split", [biased], "left", attributes=given)
    right = draft.name("right")
    draft.nodes[-1].output.append(right)
    active = draft.add("Gelu", [right], "gelu", domain=_MICROSOFT)
    draft.add("Mul", [left, active], "product", output=draft.fused.output[0])


_FIRST_WITH_HALVES = 18
"""The first opset in which a Split without sizes must say how many outputs it has."""


def _skip_group_norm(draft: Draft) -> None:
    if any(not item.i for item in draft.attributes("channels_last")):
        raise draft.refuse("its channels are not on the last axis")
    biased = draft.add_bias(draft.input(0), draft.input(4))
    draft.keep(without=4, input_0=biased)


def _heads(draft: Draft) -> None:
    """Attention with one bias for queries, keys and values, one after the other."""
    position = BIAS_INPUTS[draft.fused.op_type][0]
    sides = list(map(str, draft.fused.input[:3]))
    bias = find_weight(draft.view, draft.input(position))
    stored = draft.view.constant(draft.input(position))
    axes = 2 if draft.fused.op_type.startswith("Packed") else 3
    widths = [_width(draft.view, name, axes) for name in sides]
    if bias is None or stored is None or len(sides) < 3 or not all(sides):
        raise draft.refuse("its bias is no constant, or its inputs are packed")
    if None in widths or sum(w or 0 for w in widths) != bias.dims[-1]:
        raise draft.refuse("its inputs are of unknown width")
    values, start, replaced = read_tensor(draft.index.model, stored), 0, {}
    for i, (part, name, width) in enumerate(zip("qkv", sides, widths, strict=True)):
        piece = np.ravel(values)[start : start + (width or 0)]
        start += width or 0
        tensor = numpy_helper.from_array(piece, draft.name(f"{part}_bias"))
        draft.constants.append(tensor)
        replaced[f"input_{i}"] = draft.add_bias(name, tensor.name, part)
    draft.keep(without=position, **replaced)


def _width(view: GraphView, name: str, axes: int) -> int | None:
    """The size of the last axis of a tensor with so many axes, or None."""
    shape = view.type_of(name).shape
    size = shape[-1] if shape is not None and len(shape) == axes else None
    return size if isinstance(size, int) else None


_ROWS: dict[str, Callable[[Draft], None]] = {
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "BiasAdd": _bias_add,
    "SkipLayerNormalization": write_skip_norm,
    "SkipSimplifiedLayerNormalization": write_skip_norm,
    "BiasDropout": _bias_dropout,
    "BiasSplitGelu": _split_gelu,
    "SkipGroupNorm": _skip_group_norm,
    "MultiHeadAttention": _heads,
    "PackedMultiHeadAttention": _heads,
    "DecoderMaskedMultiHeadAttention": _heads,
    "FusedGemm": write_fused_gemm,
    "FusedConv": write_fused_conv,
}
"""How each operator is written out."""
