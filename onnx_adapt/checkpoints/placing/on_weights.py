"""Place LoRA, DoRA and IA3 on weights inside operators, and LoRA on parameters.

An example. `value` is the columns 128 to 192 of an Attention's weight `(64, 192)`. Its LoRA
of rank 4 becomes a slot with `down` `(64, 4)`, which is the transpose of A, and `up`
`(4, 192)`, which is zero but for the transpose of B in these columns. IA3 multiplies the same
columns of the weight, and the same entries of the bias `(192,)`.

`weight_ih_l0_reverse` of an LSTM is the second entry of the operator's W `(2, 4 * H, in)`, in
PyTorch's layout but for the order of the gates. Its `down` is B and its `up` is A, with zeros
for the entry of the other direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, ParameterLowRank, Scaling
from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.checkpoints.modules.parameters import (
    matrix_weights,
    recurrent_weights,
    stacked_weights,
)
from onnx_adapt.checkpoints.modules.parameters_by_value import Found, find_parameter
from onnx_adapt.checkpoints.modules.weights import read_weight
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.slot.form import WeightTarget
from onnx_adapt.slot.manifest import read_manifest
from onnx_adapt.slot.weights import matrices


def place_low_rank_on_weights(
    placement: Placement, edit: LowRank, inner: Sequence[InnerWeight]
) -> None:
    """Make the slots that LoRA or DoRA asks for on a module inside operators.

    Args:
        placement: The placement.
        edit: The edit.
        inner: The module's weights. Those that are one tensor of the graph get one slot.

    Raises:
        CheckpointError: If the matrices do not fit the weight, or the edit changes more.
    """
    if edit.bias is not None or edit.gate is not None or edit.scales_bias:
        raise CheckpointError(
            f"module {edit.module!r} is inside node {inner[0].label!r} "
            f"({inner[0].node.op_type}), where its weight can be adapted and not its output",
            hint="insert the adapter into the model as it was exported, then optimise",
        )
    if edit.invocation:
        raise CheckpointError(
            f"module {edit.module!r} is inside node {inner[0].label!r} "
            f"({inner[0].node.op_type}), where its weight is adapted for all tokens alike, "
            "and aLoRA is on for some of them",
            hint="insert the adapter into the model as it was exported, then optimise",
        )
    for target, weight in _targets(placement, edit.module, inner, bias=False):
        parts = _low_rank_parts(placement, edit, target, weight)
        apart = weight.group is not None
        placement.add_on_weight(target, weight.name, parts, weight.packing, apart=apart)


def place_scaling_on_weights(
    placement: Placement, edit: Scaling, inner: Sequence[InnerWeight]
) -> None:
    """Make the slots that IA3 asks for on the output of a module inside operators.

    Raises:
        CheckpointError: If the vector does not fit, or is for the input.
    """
    if edit.on_input or not inner[0].in_out:
        raise CheckpointError(
            f"module {edit.module!r}: its input is read inside node {inner[0].label!r} by "
            "others as well and cannot be scaled for one of them alone",
            hint="merge this adapter in PyTorch and export again",
        )
    for bias in (False, True):
        for target, weight in _targets(placement, edit.module, inner, bias=bias):
            _check_size(edit.module, edit.vector.size, target, weight)
            parts = {"scale": _spread(edit.vector, target, weight, fill=1)}
            name = f"{weight.name}.bias" if bias else weight.name
            placement.add_on_weight(target, name, parts, weight.packing, apart=False)


def place_parameter(placement: Placement, edit: ParameterLowRank) -> None:
    """Make the slots that LoRA on a parameter of a module asks for.

    Raises:
        CheckpointError: If the graph has no such parameter, or one of another shape.
    """
    for matrix, inner in _parameter_weights(placement, edit).items():
        if matrix is None:
            _place_stack(placement, edit, inner)
            continue
        path = f"{edit.module}.{edit.parameter}"
        single = LowRank(path, edit.down[matrix], edit.up[matrix], edit.scale)
        place_low_rank_on_weights(placement, single, inner)


def _parameter_weights(placement: Placement, edit: ParameterLowRank) -> Found:
    """Find the nodes that read each matrix of a parameter; under None those that read all."""
    module, survey = placement.names[edit.module], placement.survey
    groups, computes = edit.up.shape[0], edit.up.shape[1]
    reads = edit.down.shape[2]
    path, known = f"{module}.{edit.parameter}", edit.sums_over_input
    value = placement.finder.parameter(path)
    if value is not None:
        many = value.shape[:-2] == ((groups,) if groups > 1 or value.ndim == 3 else ())
        if not many or sorted(value.shape[-2:]) != sorted((computes, reads)):
            raise CheckpointError(
                f"parameter {path!r} of the base is {list(value.shape)}; the adapter is for "
                f"{groups} x {computes} x {reads}",
                hint="is it an adapter for another size of this model?",
            )
        sizes = (computes, reads)
        return find_parameter(placement.model, survey, path, value, sizes, known=known)
    if groups == 1:
        name = edit.parameter
        inner = recurrent_weights(survey, module, name)
        return {0: inner or matrix_weights(survey, module, name, (computes, reads))}
    shape = (groups, computes, reads)
    return {None: stacked_weights(survey, module, edit.parameter, shape, known=known)}


def _place_stack(
    placement: Placement, edit: ParameterLowRank, inner: Sequence[InnerWeight]
) -> None:
    """Make the slots on a stack that nodes read as one tensor."""
    for target, weight in _targets(placement, edit.module, inner, bias=False):
        downs, ups = (edit.up, edit.down)
        if weight.in_out:
            downs, ups = (np.swapaxes(each, 1, 2) for each in (edit.down, edit.up))
        parts = {
            "down": np.concatenate(list(downs), axis=0),
            "up": np.concatenate(list(ups), axis=1) * edit.scale,
        }
        placement.add_on_weight(target, weight.name, parts, None, apart=False)


def _targets(
    placement: Placement, module: str, inner: Sequence[InnerWeight], *, bias: bool
) -> Iterator[tuple[WeightTarget, InnerWeight]]:
    """The weights, or the biases beside them, each with the first node that reads it."""
    manifest = read_manifest(placement.model.proto)
    slots = manifest.slots if manifest else ()
    originals = {slot.output: slot.tensor for slot in slots if slot.on_weight}
    found: dict[str, list[InnerWeight]] = {}
    for weight in inner:
        position = weight.bias if bias else weight.position
        for name in weight.node.input[position : position + 1] if position is not None else ():
            if name:
                found.setdefault(str(name), []).append(weight)
    for name, readers in found.items():
        first = readers[0]
        home, known = first.view.home(name), _type_of(first.view, name)
        if home is None or known is None:
            raise CheckpointError(
                f"module {module!r}: {name!r}, which node {first.label!r} reads, is no float "
                "or has no fixed shape; an adapter cannot be added to it",
                hint="insert the adapter into the float model as it was exported",
            )
        yield (
            WeightTarget(
                graph=home.scope.path,
                tensor=originals.get(name, name),
                shape=known[1],
                dtype=FLOATS[known[0]],
                node=text(first.node.name),
                readers=tuple(f"{w.view.scope.path}:{w.node.output[0]}" for w in readers),
                module=first.name,
            ),
            first,
        )


def _type_of(view: GraphView, name: str) -> tuple[int, tuple[int, ...]] | None:
    """The element type and shape of a weight, which may be put together by nodes; or None."""
    weight = view.weight(name)
    known = view.type_of(name)
    shape = (
        weight.dims if weight else tuple(d for d in known.shape or () if isinstance(d, int))
    )
    elem_type = weight.elem_type if weight else known.elem_type
    whole = weight is not None or (known.shape is not None and len(shape) == len(known.shape))
    return (elem_type, shape) if whole and elem_type in FLOATS else None


def _low_rank_parts(
    placement: Placement, edit: LowRank, target: WeightTarget, weight: InnerWeight
) -> dict[str, Array]:
    """The weights of a slot on the whole weight, of which the module has a part."""
    a, b = edit.a, _reordered(edit.b, weight.order)
    groups, rows, columns = matrices(target.shape)
    reads, computes = (rows, columns) if weight.in_out else (columns, rows)
    if weight.span is not None:
        computes = weight.span[1] - weight.span[0]
    if (a.shape[1], b.shape[0]) != (reads, computes) or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"module {edit.module!r}: A {list(edit.a.shape)} and B {list(edit.b.shape)} do "
            f"not fit the base's weight {[computes, reads]} inside node {weight.label!r}",
            hint="is it an adapter for another size of this model?",
        )
    down, up = (a.T, b.T) if weight.in_out else (b, a)
    parts = {"down": down, "up": _spread(up, target, weight) * edit.scale}
    if weight.group is not None:
        before, after = weight.group, groups - 1 - weight.group
        parts["down"] = np.pad(parts["down"], [(before * rows, after * rows), (0, 0)])
        parts["up"] = np.pad(parts["up"], [(0, 0), (before * columns, after * columns)])
    if edit.magnitude is not None:
        scale = _dora_scale(placement, edit, weight)
        parts["scale"] = _spread(scale, target, weight, fill=1)
        parts["up"] = parts["up"] * parts["scale"]
    return parts


def _reordered(b: Array, order: Sequence[int]) -> Array:
    """Put PyTorch's blocks of rows into the order of the operator."""
    if not order or b.shape[0] % len(order):
        return b
    blocks = np.split(b, len(order))
    return np.concatenate([blocks[i] for i in order])


def _spread(
    array: Array, target: WeightTarget, weight: InnerWeight, *, fill: float = 0
) -> Array:
    """Widen an array over the module's columns to all columns of the weight."""
    wide = array.astype(np.float64)
    if weight.span is None:
        return wide
    start, end = weight.span
    pads = [(0, 0)] * (wide.ndim - 1) + [(start, target.shape[-1] - end)]
    return np.pad(wide, pads, constant_values=fill)


def _check_size(module: str, size: int, target: WeightTarget, weight: InnerWeight) -> None:
    start, end = weight.span or (0, target.shape[-1])
    if size != end - start:
        raise CheckpointError(
            f"module {module!r}: {size} factors do not fit its {end - start} outputs inside "
            f"node {weight.label!r}",
            hint="is it an adapter for another size of this model?",
        )


def _dora_scale(placement: Placement, edit: LowRank, weight: InnerWeight) -> Array:
    """DoRA's scale: magnitude over the norm of the adapted rows (arXiv 2402.09353)."""
    assert edit.magnitude is not None
    if not weight.in_out or weight.group is not None:
        raise CheckpointError(
            f"module {edit.module!r}: DoRA inside node {weight.label!r} is not supported",
            hint="merge this adapter in PyTorch and export again",
        )
    whole = read_weight(placement.model, weight.view, weight.tensor)
    own = whole if weight.span is None else whole[:, slice(*weight.span)]
    norm = np.linalg.norm(own.T + edit.norm_scale * (edit.b @ edit.a), axis=1)
    return np.asarray(edit.magnitude.astype(np.float64) / norm)
