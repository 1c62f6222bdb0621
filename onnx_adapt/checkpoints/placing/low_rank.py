"""Place LoRA and DoRA on the layers of a graph."""

from __future__ import annotations

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank
from onnx_adapt.checkpoints.modules.weights import read_bias, read_matrix
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.stacking import in_front_of, refuse_second_in_layer
from onnx_adapt.checkpoints.placing.vocabulary import refuse_other_vocabulary
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import attribute
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.site import Site
from onnx_adapt.slot.form import Form

_KEEP_ROWS = {
    *("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
    *("MatMulBnb4", "DynamicQuantizeMatMul", "Einsum"),
}
"""Layers that keep the axes of what they read, where a Gemm reads rows of all positions."""


def place_low_rank(placement: Placement, edit: LowRank, call: LayerCall) -> None:
    """Make the slot that LoRA or DoRA asks for on one call of a module.

    Raises:
        CheckpointError: If the matrices do not fit the layer, or it is of a form not known.
    """
    _refuse_hidden(edit.module, call)
    refuse_second_in_layer(placement, edit.module, call)
    a, b = edit.a, edit.b
    window: tuple[int, ...] = ()
    operator = OPERATORS[call.node.op_type]
    if operator.embeds:
        parts = {"table": a.T, "up": b.T}
    elif operator.convolves:
        _refuse_padding_mode(placement, edit.module, call)
        a, b = _with_kernel(call, a, b, own=edit.dilates)
        window = kernel_window(call, a, dilates=edit.dilates)
        b = _dense(b, attribute(call.node, "group", 1))
        parts = {"down": a, "up": b}
    else:
        parts = {"down": a.T, "up": b.T}
    _check_sizes(edit, call, a, b)
    up_axis = 0 if operator.convolves else 1
    gain = edit.scale * call.alpha
    parts["up"] = call.spread(parts["up"], axis=up_axis) * gain
    if edit.bias is not None:
        parts["up_bias"] = call.spread(edit.bias.astype(np.float64)) * gain
    target = placement.survey.site(call.view, call.output)
    if edit.magnitude is not None:
        target = _rescale(placement, edit, call, parts, _dora_scale(placement, edit, call, b))
    if edit.gate is not None:
        if call.node.op_type not in _KEEP_ROWS:
            raise CheckpointError(
                f"{edit.module!r}: gating needs the sequence axis, which is folded away here"
            )
        parts["gate"], parts["gate_bias"] = edit.gate[0].T, edit.gate[1]
    source = placement.survey.after_slots(call.view.scope.path, call.source)
    if edit.invocation:
        _refuse_without_sequence(edit.module, target)
    by_token = bool(edit.invocation)
    form = Form(source=source, source_width=a.shape[1], window=window, by_token=by_token)
    front = in_front_of(placement, call)
    if call.packing is None or edit.gate is not None:
        placement.add(target, placement.slot_name(edit.module), parts, form, front=front)
    else:
        placement.add_beside(edit.module, target, call.packing, parts, form, front=front)


def _rescale(
    placement: Placement,
    edit: LowRank,
    call: LayerCall,
    parts: dict[str, Array],
    scale: Array,
) -> Site:
    """Put DoRA's scale into the parts, in place.

    Returns:
        The tensor to rescale. It is the product alone unless the bias is rescaled with it.
    """
    scale = call.spread(scale, fill=1)
    shape = [1] * parts["up"].ndim
    shape[0 if OPERATORS[call.node.op_type].convolves else 1] = -1
    parts["up"] = parts["up"] * scale.reshape(shape)
    parts["scale"] = scale
    if "up_bias" in parts:
        parts["up_bias"] = parts["up_bias"] * scale
    if edit.scales_bias:
        return placement.with_bias(edit.module, call)
    inside = read_bias(placement.model, call)
    if inside is None:
        return placement.survey.site(call.view, call.raw)
    parts["up_bias"] = parts.get("up_bias", 0) + (1 - scale) * inside
    return placement.survey.site(call.view, call.output)


def _refuse_without_sequence(module: str, target: Site) -> None:
    """Refuse an update that is on for some tokens alone where no axis is known as theirs."""
    if target.axis == 1 or target.rank not in (2, 3):
        raise CheckpointError(
            f"module {module!r}: aLoRA is on for some tokens alone, and tensor "
            f"{target.tensor!r} is not of the shape (batch, sequence, width)",
            hint="export the model with input_ids of (batch, sequence)",
        )


def _refuse_hidden(module: str, call: LayerCall) -> None:
    """Refuse a layer whose product is inside its node, or whose input is nowhere a float."""
    if call.activation:
        raise CheckpointError(
            f"module {module!r} has no output of its own: the activation behind it "
            f"({call.activation}) was fused into node {call.label!r}",
            hint="insert into the model as it was exported and optimise the result",
        )
    if not call.source:
        raise CheckpointError(
            f"module {module!r}: node {call.label!r} reads integers that are nowhere floats",
            hint="insert into the model before it is quantised",
        )


def _check_sizes(edit: LowRank, call: LayerCall, a: Array, b: Array) -> None:
    weight = find_weight(call.view, call.weight)
    dims = weight.dims if weight else ()
    fits = (a.shape[1], b.shape[0]) == call.sizes
    if OPERATORS[call.node.op_type].convolves:
        fits = fits and a.shape[2:] == dims[2:]
    if not fits or a.shape[0] != b.shape[1]:
        (reads, makes), theirs = call.sizes, (a.shape[1], b.shape[0])
        if theirs[1] == makes:
            refuse_other_vocabulary(edit.module, theirs[0], reads)
        elif theirs[0] == reads:
            refuse_other_vocabulary(edit.module, theirs[1], makes)
        raise CheckpointError(
            f"module {edit.module!r}: A {list(edit.a.shape)} and B {list(edit.b.shape)} do "
            f"not fit the base's weight {list(dims)}",
            hint="is it an adapter for another size of this model?",
        )


def _with_kernel(call: LayerCall, a: Array, b: Array, *, own: bool) -> tuple[Array, Array]:
    """Give A and B the axes of the Conv's weight where they are matrices.

    Args:
        call: The call of the Conv.
        a: `(r, in, kh, kw)`, or `(r, in * kh * kw)`.
        b: `(out, r, 1, 1)`, or `(out, r)`.
        own: Whether A also has the Conv's groups: `in` is that of one group then.
    """
    weight = find_weight(call.view, call.weight)
    dims = tuple(weight.dims[1:]) if weight else ()
    if len(a) and a[0].size == int(np.prod(dims)):
        a = a.reshape(len(a), *dims)
    groups = attribute(call.node, "group", 1)
    if own and groups != 1:
        apart = np.zeros((groups, len(a), groups, *a.shape[1:]))
        for i in range(groups):
            apart[i, :, i] = a
        a = apart.reshape(groups * len(a), groups * a.shape[1], *a.shape[2:])
    return a, b.reshape(*b.shape[:2], *(1,) * (a.ndim - 2)) if b.ndim == 2 else b


def _refuse_padding_mode(placement: Placement, module: str, call: LayerCall) -> None:
    """Refuse a convolution that pads by other values than zero; PEFT's A pads by zeros.

    Exporters write its padding as nodes of the module in front of the Conv: a Pad, or a
    Concat of Slices for `circular`.
    """
    view, made = call.view, call.view.producers.get(call.source)
    if (
        made is None
        or placement.survey.modules.scopes[view.scope.path][made] != (placement.names[module])
    ):
        return
    node = view.nodes[made]
    mode = next((item.s for item in node.attribute if item.name == "mode"), b"constant")
    if node.op_type == "Concat" or (node.op_type == "Pad" and mode != b"constant"):
        raise CheckpointError(
            f"module {module!r} does not pad by zeros (node {call.label!r} reads what a "
            f"{node.op_type} of the module makes), and the adapter does",
            hint="merge this adapter in PyTorch and export again",
        )


def kernel_window(call: LayerCall, a: Array, *, dilates: bool = False) -> tuple[int, ...]:
    """Find the window of A on a Conv: the Conv's own kernel, strides and pads.

    PEFT gives LoRA's A no dilation; where the Conv has one, only padding="same" lines up, and
    A is padded by the same rule for its own kernel. Where A has the Conv's own dilation, all
    lines up.
    """
    n = a.ndim - 2
    kernel = a.shape[2:]
    lists = {item.name: list(item.ints) for item in call.node.attribute}
    automatic = next((i.s for i in call.node.attribute if i.name == "auto_pad"), b"NOTSET")
    strides = lists.get("strides", [1] * n)
    pads = lists.get("pads", [0] * 2 * n)
    dilations = lists.get("dilations", [1] * n)
    steps = dilations if dilates else [1] * n
    dilated = dilations != steps
    if automatic == b"VALID":
        pads = [0] * 2 * n
    elif automatic == b"SAME_UPPER" or dilated:
        if any(step != 1 for step in strides):
            raise CheckpointError(
                f"{call.node.name!r}: LoRA on a Conv with strides and dilation or automatic "
                "padding is not supported"
            )
        reach = [(size - 1) * step for size, step in zip(kernel, steps, strict=True)]
        before = [both // 2 for both in reach]
        pads = before + [both - left for both, left in zip(reach, before, strict=True)]
    elif automatic not in (b"NOTSET", b""):
        raise CheckpointError(f"{call.node.name!r}: auto_pad {automatic!r} is not supported")
    window = (*kernel, *strides, *pads, *steps)
    return () if window == (1,) * 2 * n + (0,) * 2 * n + (1,) * n else window


def _dense(b: Array, groups: int) -> Array:
    """Expand the weight of a grouped 1x1 convolution to the full one, zero between groups."""
    out, rank = b.shape[0] // groups, b.shape[1]
    dense = np.zeros((b.shape[0], rank * groups, *b.shape[2:]))
    for i in range(groups):
        dense[i * out : (i + 1) * out, i * rank : (i + 1) * rank] = b[i * out : (i + 1) * out]
    return dense


def _dora_scale(placement: Placement, edit: LowRank, call: LayerCall, b: Array) -> Array:
    """DoRA's scale: magnitude over the norm of the adapted rows (arXiv 2402.09353)."""
    weight = read_matrix(placement.model, call)
    if OPERATORS[call.node.op_type].embeds:
        weight = weight.T
    flat = weight.reshape(weight.shape[0], -1)
    groups = attribute(call.node, "group", 1)
    if groups != 1:
        raise CheckpointError(f"{edit.module!r}: DoRA on a Conv with groups is not supported")
    delta = b.reshape(b.shape[0], -1) @ edit.a.reshape(edit.a.shape[0], -1)
    norm = np.linalg.norm(flat + edit.norm_scale * delta, axis=1)
    assert edit.magnitude is not None
    return np.asarray(edit.magnitude.astype(np.float64) / norm)
