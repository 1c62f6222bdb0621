"""Inputs that are made up from the signature of a model, for a proof without real data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.errors import UnprovableError
from onnx_adapt.graph.index import GraphView, ModelIndex, TensorType, attribute, elem_name
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.proof.feeds import Feeds, no_npz_hint, required_inputs
from onnx_adapt.proof.input_sizes import BATCH, Axis, Sizes, axis_kinds, shape_of

_PASS_ON = {
    "Cast",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Flatten",
    "Expand",
    "Slice",
}


@dataclass(slots=True)
class _Use:
    """What the graph does with an integer input.

    Attributes:
        bound: Size of the smallest table it indexes, or None.
        compared: Constants it is compared with.
    """

    bound: int | None = None
    compared: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is known about a model's inputs, from which values are made up.

    Attributes:
        inputs: The type of each input that must be fed.
        kinds: The kind of each open axis.
        seed: The seed of the random numbers.
    """

    inputs: Mapping[str, TensorType]
    kinds: Mapping[Axis, str]
    seed: int
    _uses: Mapping[str, _Use]

    @property
    def steered(self) -> bool:
        """Whether an input may choose a branch."""
        return any(self._steers(name) for name in self.inputs)

    @property
    def has_integers(self) -> bool:
        """Whether there are integers, for which other values may have to be tried."""
        return any(
            elem_name(known.elem_type) in ("int64", "int32") for known in self.inputs.values()
        )

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """The shape of each input."""
        return {
            name: shape_of(name, known, self.kinds, sizes)
            for name, known in self.inputs.items()
        }

    def feeds(self, sizes: Sizes, variant: int = 0, constant: int | None = None) -> Feeds:
        """One set of inputs; variants 0 and 1 have different numbers and take other branches.

        Ids stay inside the table they index, masks are ones, integers that the graph
        compares with a constant take that value. If a
        `constant` is given, all other integers take that value.
        """
        shapes = self.shapes(sizes)
        rng = np.random.default_rng(self.seed + variant)
        return {
            name: self._value(name, shapes, variant, constant, rng) for name in self.inputs
        }

    def _value(
        self,
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
        variant: int,
        constant: int | None,
        rng: np.random.Generator,
    ) -> Any:
        shape, use = shapes[name], self._uses[name]
        if elem_name(self.inputs[name].elem_type) == "string":
            return np.full(shape, "a", dtype=object)
        dtype = helper.tensor_dtype_to_np_dtype(self.inputs[name].elem_type)
        if dtype.kind not in "iub":
            # A single number is a threshold or a rate more often than not.
            drawn = rng.standard_normal(shape) if math.prod(shape) > 1 else rng.random(shape)
            return np.asarray(drawn).astype(dtype)
        label = name.lower()
        if dtype.kind == "b" or "mask" in label:
            return np.full(shape, not (variant and self._steers(name)), dtype)
        if use.compared and (self._steers(name) or (constant is None and not use.bound)):
            # The second set takes another value, so that another branch runs.
            value = (
                use.compared[0] if not variant else [*use.compared, use.compared[0] // 2][1]
            )
            return np.full(shape, value, dtype)
        if "position" in label and shape:
            ids = np.broadcast_to(np.arange(shape[-1]), shape)
            return (ids % (use.bound or ids.size + 1)).astype(dtype)
        if use.bound and constant is not None:
            return np.full(shape, min(constant, use.bound - 1), dtype)
        if use.bound:
            return rng.integers(0, use.bound, shape).astype(dtype)
        if dtype.itemsize == 1:
            limits = np.iinfo(dtype)
            return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
        if "len" in label:
            return np.full(shape, self._length(shapes), dtype)
        return np.full(shape, 1 if constant is None else constant, dtype)

    def _steers(self, name: str) -> bool:
        """Whether an input is one truth value, on which a branch may depend."""
        known, use = self.inputs[name], self._uses[name]
        one = known.shape is not None and set(known.shape) <= {1}
        return one and (elem_name(known.elem_type) == "bool" or bool(use.compared))

    def _length(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The size of the longest open axis, which is taken as the value of lengths."""
        return max(
            (
                shapes[name][axis]
                for name, known in self.inputs.items()
                for axis, dim in enumerate(known.shape or ())
                if not isinstance(dim, int) and self.kinds.get(dim or (name, axis)) != BATCH
            ),
            default=1,
        )


def read_recipe(index: ModelIndex, seed: int) -> Recipe:
    """Read what is known about a model's inputs.

    Raises:
        UnprovableError: If one is of a kind that cannot be made up.
    """
    inputs = {}
    for value in required_inputs(index.model.proto):
        if not value.type.HasField("tensor_type"):
            raise UnprovableError(
                f"input {value.name!r} is not a tensor; inputs cannot be made up",
                hint=no_npz_hint(value),
            )
        inputs[value.name] = index.main.types.get(value.name, TensorType())
    for name, size in _head_sizes(index).items():
        if name in inputs and (shape := inputs[name].shape):
            inputs[name] = replace(inputs[name], shape=(*shape[:-1], size))
    uses = {name: _trace(index, name) for name in inputs}
    return Recipe(inputs, axis_kinds(inputs), seed, uses)


def _head_sizes(index: ModelIndex) -> dict[str, int]:
    """The last axis of cached keys and values, which onnxruntime-genai does not declare."""
    sizes = {}
    for node in index.main.nodes:
        if node.op_type != "GroupQueryAttention":
            continue
        heads = attribute(node, "num_heads", 0)
        if not any(node.input[1:3]):
            heads += 2 * attribute(node, "kv_num_heads", 0)
        *_, width = index.main.type_of(node.input[0]).shape or (None,)
        if isinstance(width, int) and heads:
            sizes.update(dict.fromkeys(filter(None, node.input[3:5]), width // heads))
    return sizes


def _trace(index: ModelIndex, name: str) -> _Use:
    """Follow an input through the operators that pass its values on, into bodies too."""
    use, waiting, seen = _Use(), [name], {name}
    while waiting:
        tensor = waiting.pop()
        for view in index.views.values():
            for node in view.readers(tensor):
                for position in (i for i, read in enumerate(node.input) if read == tensor):
                    _note(use, view, node, position)
                if node.op_type in (*_PASS_ON, "Gather") and node.input[0] == tensor:
                    fresh = [out for out in node.output if out not in seen]
                    seen.update(fresh)
                    waiting += fresh
    return use


def _note(use: _Use, view: GraphView, node: onnx.NodeProto, position: int) -> None:
    """Record how a node uses the values of the input that it reads at this position."""
    rows = None
    if node.op_type in ("Gather", "GatherBlockQuantized") and position == 1:
        table = find_weight(view, node.input[0])
        if table is not None and table.dims:
            rows = table.dims[attribute(node, "axis", 0)]
    elif node.op_type == "EmbedLayerNormalization" and position in (0, 1):
        table = find_weight(view, node.input[position + 2])
        rows = table.dims[0] if table is not None else None
    elif node.op_type == "Equal":
        other = view.constant(node.input[1 - position])
        if other is not None:
            use.compared += [int(v) for v in numpy_helper.to_array(other).flat][:4]
    if rows is not None:
        use.bound = min(use.bound or rows, rows)
