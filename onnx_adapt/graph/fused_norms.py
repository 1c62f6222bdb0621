"""Normalisations with the sum before them in their own node: SkipLayerNormalization.

For example `y = SkipLayerNormalization(h, s, gamma, beta, bias)` is

    b = Add(h, bias)     t = Add(b, s)     y = LayerNormalization(t, gamma, beta)

The bias alone can be taken out as well: then `y = SkipLayerNormalization(b, s, gamma, beta)`.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.graph.fused_draft import Draft
from onnx_adapt.graph.index import default_opset
from onnx_adapt.slot.names import split_node

_EPSILON = 1e-12  # of these operators, where they do not say
_FIRST = {"LayerNormalization": 17, "RMSNormalization": 23}
"""The first opset that has each normalisation."""
_FIRST_WITH_AXES_READ = 18
"""The first opset in which the axes of ReduceMean are an input."""
_NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def write_skip_norm(draft: Draft) -> None:
    """Add of the bias, Add of the residual connection if that is needed, normalisation."""
    bias = 4 if _is_centred(draft) else 3
    side = list(draft.fused.input[:2]).index(draft.place.tensor)
    first, second = draft.input(0), draft.input(1)
    if draft.input(bias):
        biased = draft.add_bias(draft.place.tensor, draft.input(bias))
        first, second = (biased, second) if side == 0 else (first, biased)
    if not draft.place.residual:
        draft.keep(without=bias, input_0=first, input_1=second)
        return
    outputs = [*map(str, draft.fused.output), "", "", ""][:4]
    if any(draft.view.readers(name) for name in outputs[1:3] if name):
        raise draft.refuse("something reads its mean or its deviation")
    if split_node(outputs[3]):
        raise draft.refuse("a slot is on its sum already, and would read nothing")
    _write_norm(draft, draft.add("Add", [first, second], "sum", output=outputs[3]))


def _is_centred(draft: Draft) -> bool:
    return draft.fused.op_type == "SkipLayerNormalization"


def _write_norm(draft: Draft, total: str) -> None:
    """Normalise a sum: in one node if the opset, or at least the base itself, has one."""
    weights = [draft.input(2), draft.input(3)] if _is_centred(draft) else [draft.input(2)]
    weights = [name for name in weights if name]
    epsilon = next((item.f for item in draft.attributes("epsilon")), _EPSILON)
    op = _operator(draft)
    if op is None:
        _write_arithmetic(draft, total, weights, epsilon)
        return
    given = [helper.make_attribute("axis", -1), helper.make_attribute("epsilon", epsilon)]
    inputs, output = [total, *weights], draft.fused.output[0]
    draft.add(op, inputs, "norm", output=output, attributes=given)


def _operator(draft: Draft) -> str | None:
    """ONNX Runtime runs normalisations in opsets too old for them; ONNX's checker objects."""
    opset = default_opset(draft.index.model.proto)
    op = "LayerNormalization" if _is_centred(draft) else "RMSNormalization"
    if opset >= _FIRST[op]:
        return op
    old = "LayerNormalization" if _is_centred(draft) else "SimplifiedLayerNormalization"
    used = {node.op_type for view in draft.index.views.values() for node in view.nodes}
    return old if old in used else None


def _write_arithmetic(draft: Draft, x: str, weights: list[str], epsilon: float) -> None:
    """Write `x / sqrt(mean(x * x) + epsilon) * gamma + beta`, of `x` minus its mean.

    As ONNX defines LayerNormalization, float16 is normalised in float32: a square of more
    than 255 is infinite there. An RMSNorm leaves the mean in.
    """
    elem_type = draft.view.type_of(x).elem_type or draft.view.type_of(weights[0]).elem_type
    if elem_type in _NARROW:
        x = _cast(draft, x, "wide", onnx.TensorProto.FLOAT)
    if _is_centred(draft):
        x = draft.add("Sub", [x, _mean(draft, x, "mean")], "centred")
    variance = _mean(draft, draft.add("Mul", [x, x], "square"), "variance")
    double = elem_type == onnx.TensorProto.DOUBLE
    added = _constant(
        draft, "epsilon", np.array(epsilon, np.float64 if double else np.float32)
    )
    root = draft.add("Sqrt", [draft.add("Add", [variance, added], "shifted")], "deviation")
    x = draft.add("Div", [x, root], "normed")
    if elem_type in _NARROW:
        x = _cast(draft, x, "narrow", elem_type)
    x = draft.add("Mul", [x, weights[0]], "scaled")
    if weights[1:]:
        draft.add("Add", [x, weights[1]], "norm")
    draft.nodes[-1].output[0] = draft.fused.output[0]


def _cast(draft: Draft, x: str, part: str, elem_type: int) -> str:
    return draft.add("Cast", [x], part, attributes=[helper.make_attribute("to", elem_type)])


def _mean(draft: Draft, x: str, part: str) -> str:
    """The mean over the last axis."""
    axes = np.array([-1], np.int64)
    if default_opset(draft.index.model.proto) < _FIRST_WITH_AXES_READ:
        given = [helper.make_attribute("axes", axes.tolist())]
        return draft.add("ReduceMean", [x], part, attributes=given)
    return draft.add("ReduceMean", [x, _constant(draft, f"{part}_axes", axes)], part)


def _constant(draft: Draft, part: str, value: np.ndarray) -> str:
    draft.constants.append(numpy_helper.from_array(value, draft.name(part)))
    return draft.name(part)
