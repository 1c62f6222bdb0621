"""Heads: linear layers on an output of the base, which the base does not have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.adapter.fitting import required_manifest
from onnx_adapt.dtypes import FLOATS
from onnx_adapt.edit.required import with_defaults
from onnx_adapt.edit.weights import drop_named
from onnx_adapt.errors import SlotError
from onnx_adapt.graph.index import ModelIndex, Shape, default_opset, index_model
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import tensor_of
from onnx_adapt.slot.base_changes import Head, ReplaceableWeight
from onnx_adapt.slot.manifest import write_manifest

POOLINGS = ("mean", "cls")
"""How positions become one vector: their mean, or the first of them."""

_MASK = "attention_mask"

_KEY = "pkg.onnx_adapt.head"
"""Key in a node's `metadata_props`: the head that it was added for."""

_OLDEST = 15
"""The operator set in which axes are inputs, and Shape can be of some of them."""


def add_head(
    model: Model, classes: int, *, pooling: str = "mean", output: str = "", name: str = "head"
) -> Model:
    """Add a linear layer on an output of the base, for adapters to bring its weights.

    Its result `(batch, classes)` is a new output of the model. The output of the base is
    `(batch, positions, width)`, of which the positions are pooled, or `(batch, width)`.
    The mean leaves out positions where `attention_mask` is 0, if the model has this input.
    Its weights are `NAME.weight` of `(width, classes)` and `NAME.bias` of `(classes,)`,
    replaceable weights that are zero where nothing is fed. `remove` takes the head away.

    Args:
        model: A model with slots; it is left as it was.
        classes: How many numbers the head gives.
        pooling: One of `POOLINGS`.
        output: The output of the base; by default the only one with floats.
        name: The name of the head and of its output.

    Raises:
        SlotError: If the output cannot have such a head.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/bases/bert_headless/base.onnx")
        >>> model = oa.insert(base, after="encoder.layer.1.output.dense")
        >>> model = oa.add_head(model, 3, output="last_hidden_state")
        >>> [value.name for value in model.proto.graph.output]
        ['last_hidden_state', 'pooler_output', 'head']
    """
    manifest = required_manifest(model)
    model = with_defaults(model)
    index = index_model(model)
    tensor, shape, width = _source(index, output)
    _refuse(index, classes, pooling, name)
    elem_type = index.main.type_of(tensor).elem_type
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    weights = {
        f"{name}.weight": np.zeros((width, classes), dtype),
        f"{name}.bias": np.zeros(classes, dtype),
    }
    result = model.copy()
    graph = result.proto.graph
    for key, value in weights.items():
        graph.initializer.append(tensor_of(key, value))
        graph.input.append(helper.make_tensor_value_info(key, elem_type, value.shape))
    nodes = _Nodes(name)
    pooled = _pooled(nodes, index, tensor, pooling, elem_type) if len(shape) == 3 else tensor
    product = nodes.add("MatMul", pooled, f"{name}.weight", made="product")
    nodes.add("Add", product, f"{name}.bias", made="")
    graph.node.extend(nodes.found)
    graph.output.append(helper.make_tensor_value_info(name, elem_type, [shape[0], classes]))
    added = [
        ReplaceableWeight(key, original=key, copied=True, swappable=True, trained=False)
        for key in weights
    ]
    manifest = replace(manifest, weights=(*manifest.weights, *added))
    head = Head(name, tensor, pooling)
    write_manifest(result.proto, replace(manifest, heads=(*manifest.heads, head)))
    return result


def _source(index: ModelIndex, output: str) -> tuple[str, Shape, int]:
    """The output of the base that a head is to read, with its shape and width."""
    names = [value.name for value in index.model.proto.graph.output]
    if output and output not in names:
        raise SlotError(
            f"{index.model.label} has no output {output!r}",
            hint=f"its outputs are {', '.join(names)}",
        )
    floats = [name for name in names if index.main.type_of(name).elem_type in FLOATS]
    found = [output] if output else floats
    if len(found) != 1:
        raise SlotError(
            f"{index.model.label} has {len(found)} outputs with floats",
            hint=f"say which the head reads: {', '.join(found) or 'it has none'}",
        )
    shape = index.main.type_of(found[0]).shape
    width = shape[-1] if shape else None
    if shape is None or len(shape) not in (2, 3) or not isinstance(width, int):
        known = "unknown" if shape is None else list(shape)
        raise SlotError(
            f"output {found[0]!r} has the shape {known}",
            hint="a head reads (batch, width) or (batch, positions, width), width being fixed",
        )
    return found[0], shape, width


def _refuse(index: ModelIndex, classes: int, pooling: str, name: str) -> None:
    if classes < 1:
        raise SlotError(f"a head for {classes} classes is not possible", hint="give 1 or more")
    if pooling not in POOLINGS:
        raise SlotError(f"unknown pooling {pooling!r}", hint=f"one of {', '.join(POOLINGS)}")
    if default_opset(index.model.proto) < _OLDEST:
        raise SlotError(
            f"{index.model.label} uses opset {default_opset(index.model.proto)}; a head needs "
            f"{_OLDEST} or newer",
            hint="convert it with onnx.version_converter",
        )
    taken = {*index.main.inferred, *index.main.producers}
    if clash := sorted(taken & {name, f"{name}.weight", f"{name}.bias"}):
        raise SlotError(
            f"{index.model.label} has a tensor {clash[0]!r} already",
            hint="give the head another name",
        )


def _has_mask(index: ModelIndex) -> bool:
    values = {value.name: value for value in index.model.proto.graph.input}
    found = values.get(_MASK)
    return found is not None and len(found.type.tensor_type.shape.dim) == 2


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of a head, while they are put together.

    Attributes:
        head: The name of the head.
        found: The nodes so far.
    """

    head: str
    found: list[onnx.NodeProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, made: str, **attributes: Any) -> str:
        """Add a node, and return what it makes: the head's own output if `made` is empty."""
        output = f"{self.head}/{made}" if made else self.head
        node = helper.make_node(op, list(inputs), [output], name=output, **attributes)
        node.metadata_props.add(key=_KEY, value=self.head)
        self.found.append(node)
        return output

    def integers(self, value: int | list[int], made: str) -> str:
        """Add a constant."""
        held = numpy_helper.from_array(np.array(value, np.int64), made)
        return self.add("Constant", made=made, value=held)


def _pooled(
    nodes: _Nodes, index: ModelIndex, tensor: str, pooling: str, elem_type: int
) -> str:
    """Add what makes `(batch, width)` of `(batch, positions, width)`."""
    if pooling == "cls":
        return nodes.add("Gather", tensor, nodes.integers(0, "first"), made="pooled", axis=1)
    axis = nodes.integers([1], "axis")
    if not _has_mask(index):
        ones = nodes.add("Shape", tensor, made="shape", start=1, end=2)
        count = nodes.add("Cast", ones, made="count", to=elem_type)
        total = nodes.add("ReduceSum", tensor, axis, made="total", keepdims=0)
        return nodes.add("Div", total, count, made="pooled")
    mask = nodes.add("Cast", _MASK, made="mask", to=elem_type)
    mask = nodes.add("Unsqueeze", mask, nodes.integers([2], "last"), made="seen")
    kept = nodes.add("Mul", tensor, mask, made="kept")
    total = nodes.add("ReduceSum", kept, axis, made="total", keepdims=0)
    count = nodes.add("ReduceSum", mask, axis, made="count", keepdims=0)
    one = nodes.add("Cast", nodes.integers(1, "one"), made="least", to=elem_type)
    return nodes.add("Div", total, nodes.add("Max", count, one, made="some"), made="pooled")


def remove_heads(proto: onnx.ModelProto, heads: Sequence[Head]) -> None:
    """Remove the nodes and outputs of heads, in place; their weights are replaceable ones."""
    names = {head.name for head in heads}
    if not names:
        return
    for i in reversed(range(len(proto.graph.node))):
        if head_of(proto.graph.node[i]) in names:
            del proto.graph.node[i]
    drop_named(proto.graph.output, names)


def head_of(node: onnx.NodeProto) -> str:
    """The head that a node was added for, or ''."""
    return next((str(item.value) for item in node.metadata_props if item.key == _KEY), "")


def lost_heads(proto: onnx.ModelProto, heads: Sequence[Head]) -> Iterator[str]:
    """Describe heads whose nodes or outputs are gone, or have lost their mark."""
    marked = {head_of(node) for node in proto.graph.node}
    outputs = {value.name for value in proto.graph.output}
    for head in heads:
        if head.name not in marked & outputs:
            yield f"head {head.name!r}: its nodes or its output are gone"
