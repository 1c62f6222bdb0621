"""Find parameters that modules use without a layer by the values that the base has for them.

An example. A loop over three experts reads `up_proj[0]`, `up_proj[1]`, ... of `(12, 20)`. The
exporter has cut the stack `(3, 12, 20)` into three matrices and named them anew, some of them
transposed. Each has the values of one matrix of the base's parameter, so LoRA on the parameter
becomes three slots.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.checkpoints.modules.norms_by_value import digest
from onnx_adapt.checkpoints.modules.parameters import RECURRENT
from onnx_adapt.checkpoints.modules.weights import read_weight
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.contractions import summed_axis
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model
from onnx_adapt.slot.manifest import slot_of

Found = dict[int | None, list[InnerWeight]]
"""The nodes that read each matrix of a parameter; under None those that read all of them."""


def find_parameter(
    model: Model,
    survey: Survey,
    name: str,
    value: Array,
    sizes: tuple[int, int],
    *,
    known: bool,
) -> Found:
    """Find the nodes that read a parameter, whole or cut into its matrices.

    Args:
        model: The model.
        survey: Its survey.
        name: The parameter's path.
        value: Its value in the base: a matrix or a stack of matrices.
        sizes: What the adapter makes and reads: `(out, in)`.
        known: Whether `in` is what the module sums over, where `out` is as large.

    Raises:
        CheckpointError: If not all of it is in the graph, or it is square and nothing tells
            which of its axes is the input.
    """
    stack = value.reshape(-1, *value.shape[-2:])
    wanted = _digests(stack)
    found: Found = {}
    for weight, array in _candidates(model, survey, name, stack.shape):
        for matrix, turned in wanted.get(digest(array), ()):
            # PEFT's `(out, in)` of a parameter that is no stack are its own two axes.
            in_out = turned
            if value.ndim == 3:
                in_out = _in_out(weight, stack.shape[1:], sizes, turned=turned, known=known)
            label = name if matrix is None or len(stack) == 1 else f"{name}.{matrix}"
            shared = weight.group is not None  # with the other direction
            found.setdefault(matrix, []).append(
                InnerWeight(
                    label.removesuffix("_reverse") if shared else label,
                    weight.view,
                    weight.node,
                    weight.position,
                    in_out=in_out,
                    group=weight.group,
                    order=weight.order,
                )
            )
    whole = found.get(None)
    if whole:
        return {None: whole}
    if missing := [number for number in range(len(stack)) if number not in found]:
        raise CheckpointError(
            f"the values of parameter {name!r} are not in the graph (of its {len(stack)} "
            f"matrices {len(missing)} were not found)",
            hint="give the weights that were exported; a weight that was fused or quantised "
            "since has others",
        )
    return found


def _digests(stack: Array) -> dict[bytes, list[tuple[int | None, bool]]]:
    """What a graph may have of a stack: all of it or one matrix, turned or not."""
    found: dict[bytes, list[tuple[int | None, bool]]] = {}
    kinds = [DTYPES[name] for name in dict.fromkeys(FLOATS.values())]
    for matrix in (None, *range(len(stack))):
        value = stack if matrix is None else stack[matrix]
        if matrix is None and len(stack) == 1:
            continue
        for turned in (False, True):
            whole = np.swapaxes(value, -1, -2) if turned else value
            for key in {digest(whole.astype(kind)) for kind in kinds}:
                if key not in found:
                    found[key] = [(matrix, turned)]
    return found


def _candidates(
    model: Model, survey: Survey, name: str, shape: tuple[int, ...]
) -> Iterator[tuple[InnerWeight, Array]]:
    """The constants that nodes read and that could be a stack or one of its matrices."""
    groups, *matrix = shape
    square = {tuple(matrix), tuple(matrix[::-1])}
    for view, node, position, tensor in _inputs(survey):
        weight = view.weight(tensor)
        if weight is None or weight.elem_type not in FLOATS:
            continue
        if (
            node.op_type in RECURRENT
            and position in (1, 2)
            and tuple(matrix) == weight.dims[1:]
        ):
            value = read_weight(model, view, tensor)
            for group, own in enumerate(value):
                order = RECURRENT[node.op_type]
                yield (
                    InnerWeight(name, view, node, position, group=group, order=order),
                    _in_torch_order(own, order),
                )
        elif weight.dims in square or (
            weight.dims[:1] == (groups,) and weight.dims[1:] in square
        ):
            yield InnerWeight(name, view, node, position), read_weight(model, view, tensor)


def _inputs(survey: Survey) -> Iterator[tuple[GraphView, onnx.NodeProto, int, str]]:
    """What nodes read, except those that only make a constant of a constant."""
    for view in survey.index.views.values():
        for node in view.nodes:
            if slot_of(node) or any(view.weight(name) for name in node.output if name):
                continue
            for position, tensor in enumerate(node.input):
                if tensor:
                    yield view, node, position, str(tensor)


def _in_torch_order(value: Array, order: tuple[int, ...]) -> Array:
    """Put an operator's blocks of rows into PyTorch's order."""
    if not order:
        return value
    blocks = np.split(value, len(order))
    return np.concatenate([blocks[order.index(i)] for i in range(len(order))])


def _in_out(
    weight: InnerWeight,
    matrix: tuple[int, ...],
    sizes: tuple[int, int],
    *,
    turned: bool,
    known: bool,
) -> bool:
    """Whether the graph's matrix is `(in, out)`, as the adapter has these."""
    if sizes[0] != sizes[1]:
        return (matrix == sizes) == turned
    axis = summed_axis(weight.view, weight.tensor) if known else None
    if axis is None:
        raise CheckpointError(
            f"parameter {weight.name!r} has square matrices, and neither the checkpoint nor "
            "the graph tells which of their axes is the input",
            hint="merge the adapter in PyTorch and export again",
        )
    return axis == -2
