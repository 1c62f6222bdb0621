"""What editors, converters and other exporters do to a model without changing what it does.

Each mutation takes the model of a network, and returns another that ONNX Runtime runs to the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
from layout_models import Network
from onnx import helper
from slot_models import session

from onnx_adapt.ort import failures

Mutation = Callable[[onnx.ModelProto, Network], onnx.ModelProto]
Records = dict[str, list[int]]

FLOAT = onnx.TensorProto.FLOAT


def runs_to(proto: onnx.ModelProto, net: Network) -> bool:
    """Whether ONNX Runtime runs a model to a network's numbers, optimised or not."""
    feeds, want = {"x": net.x.astype(np.float32)}, net.compute(net.x, {})
    try:
        runs = [session(proto, optimised=level).run(None, feeds) for level in (False, True)]
    except failures():
        return False
    return all(
        a.shape == b.shape and np.abs(a - b).max() <= 1e-4 * max(1, np.abs(b).max())
        for got in runs
        for a, b in zip(got, want, strict=True)
    )


def _recorded(proto: onnx.ModelProto, shapes: Records, net: Network) -> onnx.ModelProto:
    """The model with wrong shapes recorded: all, or those that ONNX Runtime survives.

    It takes most wrong records with a warning. Where it believes one, and stops or folds a
    Shape into a constant, there is no model to adapt.
    """
    whole = _with_records(proto, shapes)
    if runs_to(whole, net):
        return whole
    for name, shape in shapes.items():
        changed = _with_records(proto, {name: shape})
        proto = changed if runs_to(changed, net) else proto
    return proto


def _with_records(proto: onnx.ModelProto, shapes: Records) -> onnx.ModelProto:
    result = _copy(proto)
    outputs = {value.name: value for value in result.graph.output}
    for name, shape in shapes.items():
        record = outputs[name] if name in outputs else result.graph.value_info.add()
        record.CopyFrom(helper.make_tensor_value_info(name, FLOAT, shape))
    return result


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    return result


def _made(proto: onnx.ModelProto, net: Network) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The float tensors that nodes make, but for the outputs, and their sizes."""
    outputs = {value.name for value in proto.graph.output}
    for node in net.nodes:
        if node.op_type not in ("Shape", "Gather", "Concat") and node.output[0] not in outputs:
            yield node.output[0], net.values[node.output[0]].shape


def one_row_recorded(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Exported for one row; then the batch was made dynamic by hand, at the input only."""
    outputs = [(v.name, net.values[v.name].shape) for v in proto.graph.output]
    sizes = [*_made(proto, net), *outputs]
    return _recorded(proto, {name: [1, *s[1:]] for name, s in sizes}, net)


def stale_sizes(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Recorded for another picture and other widths."""
    return _recorded(proto, {n: [d + 1 for d in s] for n, s in _made(proto, net)}, net)


def stale_last(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Recorded with another size of the last axis only."""
    return _recorded(proto, {n: [*s[:-1], s[-1] + 3] for n, s in _made(proto, net)}, net)


def swapped_sizes(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Recorded with channels last where the model has them first, and the reverse."""
    made = _made(proto, net)
    return _recorded(proto, {n: [*s[:1], *s[2:], *s[1:2]] for n, s in made}, net)


def stale_ranks(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Recorded with an axis more."""
    return _recorded(proto, {name: [*s, 2] for name, s in _made(proto, net)}, net)


def other_classes(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """The last layer was replaced; the output still has the old number of classes."""
    outputs = [(v.name, net.values[v.name].shape) for v in proto.graph.output]
    return _recorded(proto, {n: [*s[:-1], s[-1] + 5] for n, s in outputs}, net)


def unsorted(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Nodes before those that they read; ONNX Runtime sorts them itself."""
    result = _copy(proto)
    del result.graph.node[:]
    result.graph.node.extend(reversed(proto.graph.node))
    return result


def weights_as_inputs(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """IR version 3: every initializer is an input as well."""
    result = _copy(proto)
    result.ir_version = 3
    for tensor in proto.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        result.graph.input.append(value)
    return result


def weights_as_nodes(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Every initializer is a Constant node."""
    result = _copy(proto)
    del result.graph.initializer[:], result.graph.node[:]
    for tensor in proto.graph.initializer:
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        node.attribute[0].t.ClearField("name")
        result.graph.node.append(node)
    result.graph.node.extend(proto.graph.node)
    return result


def no_names(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Nodes without names, as tf2onnx's optimisers leave them."""
    result = _copy(proto)
    for node in result.graph.node:
        node.ClearField("name")
    return result


def shapeless(proto: onnx.ModelProto, net: Network) -> onnx.ModelProto:
    """Outputs whose shapes are not recorded at all."""
    result = _copy(proto)
    for value in result.graph.output:
        value.type.tensor_type.ClearField("shape")
    return result


RECORDS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (one_row_recorded, stale_sizes, stale_last, swapped_sizes, stale_ranks)
}
"""Mutations of the same records: a model has one of them."""

OTHERS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        *(other_classes, unsorted, weights_as_nodes, weights_as_inputs, no_names, shapeless),
    )
}

MUTATIONS = RECORDS | OTHERS


def mutated(net: Network, names: Sequence[str]) -> onnx.ModelProto:
    """The model of a network after several mutations, in the order of the table."""
    proto = net.proto()
    for name, mutation in MUTATIONS.items():
        if name in names:
            proto = mutation(proto, net)
    return proto
