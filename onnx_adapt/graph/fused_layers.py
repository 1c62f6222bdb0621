"""Layers with what is behind them in their own node: FusedGemm and FusedConv.

For example `y = FusedConv(x, w, b, z)` with the activation Relu is

    c = Conv(x, w, b)     s = Add(c, z)     y = Relu(s)
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.dtypes import DTYPES, FLOATS
from onnx_adapt.graph.fused_draft import Draft
from onnx_adapt.graph.index import default_opset, text
from onnx_adapt.graph.layers import find_weight

_ATTRIBUTES = {
    **dict.fromkeys(("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign", "HardSwish"), ()),
    **dict.fromkeys(("LeakyRelu", "Elu", "ThresholdedRelu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
    "Clip": ("min", "max"),
}
"""The activations that optimisers fuse into products, with their attributes."""

_CLIP_READS_LIMITS = 11
"""The first opset in which the limits of Clip are inputs."""


def inside_layer(node: onnx.NodeProto) -> str:
    """What an optimiser moved into a layer's own node from behind it, in words, or ''."""
    found = (text(item.s) for item in node.attribute if item.name == "activation")
    active = next(found, "")
    if active:
        return f"the activation {active}"
    added = "".join(node.input[3:4]) if node.op_type == "FusedConv" else ""
    return f"the sum with {added!r}" if added else ""


def write_fused_gemm(draft: Draft) -> None:
    """Gemm, and the activation."""
    inner = draft.add_product("Gemm", draft.fused.input, "alpha", "beta", "transA", "transB")
    prefix = "activation_"
    settings = {
        item.name.removeprefix(prefix): item.f
        for item in draft.fused.attribute
        if item.name.startswith(prefix)
    }
    _end(draft, inner, settings)


def write_fused_conv(draft: Draft) -> None:
    """Conv, the sum with another tensor, and the activation."""
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    inner = draft.add_product("Conv", draft.fused.input[:3], *names)
    if draft.input(3):
        inner = draft.add("Add", [inner, draft.input(3)], "sum")
    values = [x for item in draft.attributes("activation_params") for x in item.floats]
    order = _ATTRIBUTES.get(_active(draft), ())
    _end(draft, inner, dict(zip(order, values, strict=False)))


def _active(draft: Draft) -> str:
    return next((text(item.s) for item in draft.attributes("activation")), "")


def _end(draft: Draft, inner: str, settings: dict[str, float]) -> None:
    """Add the activation of a fused product, which is its last step."""
    name, output = _active(draft), draft.fused.output[0]
    if not name:
        draft.nodes[-1].output[0] = output
        return
    if name not in _ATTRIBUTES:
        raise draft.refuse(f"its activation is {name!r}")
    settings = {key: settings[key] for key in _ATTRIBUTES[name] if key in settings}
    inputs = [inner]
    if name == "Clip" and default_opset(draft.index.model.proto) >= _CLIP_READS_LIMITS:
        inputs += [_constant(draft, key, value) for key, value in settings.items()]
        settings = {}
    given = [helper.make_attribute(key, value) for key, value in settings.items()]
    draft.add(name, inputs, "act", output=output, attributes=given)


def _constant(draft: Draft, part: str, value: float) -> str:
    """A new constant of the type of the layer's weight."""
    weight = find_weight(draft.view, draft.input(1))
    dtype = FLOATS.get(weight.elem_type if weight else 0, "float32")
    array = np.array(value, DTYPES[dtype])
    draft.constants.append(numpy_helper.from_array(array, draft.name(part)))
    return draft.name(part)
