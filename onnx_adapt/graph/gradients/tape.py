"""The tape: the nodes that compute gradients, while they are put together."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import GradientError
from onnx_adapt.graph.index import GraphView, Shape
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor

FLOAT = onnx.TensorProto.FLOAT
FLOAT16 = onnx.TensorProto.FLOAT16
BFLOAT16 = onnx.TensorProto.BFLOAT16
INT64 = onnx.TensorProto.INT64
UINT8 = onnx.TensorProto.UINT8
BOOL = onnx.TensorProto.BOOL

PREFIX = "gradient:"
"""What the names of all tensors and nodes begin with that compute gradients."""


@dataclass(slots=True)
class Tape:
    """The nodes that compute gradients, while they are put together.

    A rule reads the tensors of the forward graph by their names and adds nodes behind it.
    Everything that it adds may be read by later rules. What several rules need, such as the
    shape of a tensor, is computed once.

    Attributes:
        model: The forward model.
        view: The forward graph.
        opset: Version of the default operator set, 17 or newer.
        nodes: The nodes so far.
        constants: New initializers, by their values.
        elem_types: Element types of the tensors that were added.
        known: What is computed once, by what it is.
        prefix: What new names begin with.
        rules: The rule of each operator.
        views: The views of all graphs of the model, bodies included, by path.
    """

    model: Model
    view: GraphView
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = field(
        default_factory=dict
    )
    elem_types: MutableMapping[str, int] = field(default_factory=dict)
    known: MutableMapping[tuple[str, ...], str] = field(default_factory=dict)
    prefix: str = PREFIX
    rules: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    views: Mapping[str, GraphView] = field(default_factory=dict)

    def inside(self, view: GraphView, part: str, model: Model | None = None) -> Tape:
        """A tape for a body that a node of this tape is to have.

        What was added here so far can be read there; what is added there stays there, except
        for constants.

        Args:
            view: The graph that is differentiated in the body.
            part: What tells the names in this body from those in others.
            model: The model of that graph, if it is another one.
        """
        return replace(
            self,
            model=model or self.model,
            view=view,
            nodes=[],
            elem_types=ChainMap({}, self.elem_types),
            known=ChainMap({}, self.known),
            prefix=f"{self.prefix}{len(self.nodes)}:{part}:",
        )

    def add(
        self,
        op: str,
        *inputs: str,
        elem_type: int = 0,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node with one output, and return the output.

        Args:
            op: The operator.
            inputs: What it reads; '' for an input that is left out.
            elem_type: Element type of the output; by default that of the first input.
            domain: Domain of the operator.
            attributes: The attributes; None leaves one out.
        """
        return self.add_several(
            op, inputs, 1, elem_type=elem_type, domain=domain, **attributes
        )[0]

    def add_several(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int,
        *,
        elem_type: int = 0,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs of one element type, and return the outputs."""
        stem = f"{self.prefix}{len(self.nodes)}:{op}"
        names = [stem if i == 0 else f"{stem}:{i}" for i in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = helper.make_node(op, list(inputs), names, name=stem, domain=domain, **given)
        self.nodes.append(node)
        made = elem_type or self.elem_type(inputs[0])
        self.elem_types.update(dict.fromkeys(names, made))
        return names

    def once(self, op: str, *inputs: str, elem_type: int = 0, **attributes: Any) -> str:
        """Add a node, or return the output of an equal one that was added before."""
        key = (op, *inputs, repr(sorted(attributes.items())))
        if key not in self.known:
            self.known[key] = self.add(op, *inputs, elem_type=elem_type, **attributes)
        return self.known[key]

    def constant(self, value: Array) -> str:
        """A constant."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"{self.prefix}constant:{len(self.constants)}"
            self.constants[key] = numpy_helper.from_array(array, name)
        made = self.constants[key]
        self.elem_types[made.name] = made.data_type
        return str(made.name)

    def integers(self, *values: int) -> str:
        """A constant of one axis: `(len(values),)`."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float, like: str) -> str:
        """A scalar constant of the element type of a tensor."""
        return self.constant(np.array(value).astype(self.dtype(like)))

    # What is known of a tensor.

    def elem_type(self, tensor: str) -> int:
        """The element type of a tensor.

        Raises:
            GradientError: If it is not known.
        """
        found = self.elem_types.get(tensor) or self.view.type_of(tensor).elem_type
        if not found:
            raise GradientError(f"the element type of tensor {tensor!r} is not known")
        return found

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """The numpy type of a tensor's numbers."""
        return helper.tensor_dtype_to_np_dtype(self.elem_type(tensor))

    def shape(self, tensor: str) -> Shape:
        """The shape of a tensor of the forward graph, as far as it is known.

        Raises:
            GradientError: If its number of axes is not known.
        """
        found = self.view.type_of(tensor).shape
        if found is None:
            raise GradientError(
                f"the number of axes of tensor {tensor!r} is not known",
                hint="run a shape inference tool on the model, and insert the slots again",
            )
        return found

    def rank(self, tensor: str) -> int:
        """The number of axes of a tensor of the forward graph."""
        return len(self.shape(tensor))

    def value(self, tensor: str) -> Array | None:
        """The value of a tensor of the forward graph, if it is stored."""
        stored = self.view.constant(tensor)
        return None if stored is None else read_tensor(self.model, stored)

    def shape_of(self, tensor: str) -> str:
        """The shape of a tensor, in a run: `(rank,)`."""
        shape = self.view.type_of(tensor).shape
        if shape is not None and all(isinstance(size, int) for size in shape):
            return self.constant(np.array(shape, np.int64))
        return self.once("Shape", tensor, elem_type=INT64)

    def size(self, tensor: str, axis: int) -> str:
        """The size of one axis of a tensor, in a run: `(1,)`."""
        size = self.shape(tensor)[axis]
        if isinstance(size, int):
            return self.integers(size)
        axis %= self.rank(tensor)
        return self.once("Shape", tensor, start=axis, end=axis + 1, elem_type=INT64)

    # Arithmetic that rules share.

    def times(self, tensor: str, factor: float) -> str:
        """`tensor * factor`."""
        return tensor if factor == 1 else self.add("Mul", tensor, self.number(factor, tensor))

    def plus(self, tensor: str, term: float) -> str:
        """`tensor + term`."""
        return self.add("Add", tensor, self.number(term, tensor))

    def compare(self, op: str, first: str, second: str) -> str:
        """`Greater`, `Equal`, ... of two tensors: bool."""
        return self.add(op, first, second, elem_type=BOOL)

    def where(self, condition: str, yes: str, no: str) -> str:
        """`yes` where a condition holds, `no` elsewhere."""
        return self.add("Where", condition, yes, no, elem_type=self.elem_type(yes))

    def kept_where(self, condition: str, grad: str) -> str:
        """A gradient where a condition holds, and zero elsewhere."""
        return self.where(condition, grad, self.number(0, grad))

    def cast(self, tensor: str, elem_type: int) -> str:
        """A tensor in another element type."""
        if self.elem_type(tensor) == elem_type:
            return tensor
        return self.add("Cast", tensor, elem_type=elem_type, to=elem_type)

    def zeros_like(self, tensor: str) -> str:
        """Zeros of the shape and element type of a tensor."""
        return self.add("Expand", self.number(0, tensor), self.shape_of(tensor))

    def zeros_like_made(self, tensor: str) -> str:
        """Zeros of the shape of a tensor that was added here."""
        shape = self.once("Shape", tensor, elem_type=INT64)
        return self.add("Expand", self.number(0, tensor), shape)

    def total(self, tensor: str, axes: Iterable[int], *, keep: bool = True) -> str:
        """The sum over some axes; if `keep`, they stay with size 1."""
        chosen = tuple(axes)
        if not chosen:
            return tensor
        return self.add("ReduceSum", tensor, self.integers(*chosen), keepdims=int(keep))

    def mean(self, tensor: str, axes: Sequence[int]) -> str:
        """The mean over some axes, which stay with size 1."""
        if self.opset >= 18:
            return self.add("ReduceMean", tensor, self.integers(*axes), keepdims=1)
        return self.add("ReduceMean", tensor, axes=list(axes), keepdims=1)

    def like(self, grad: str, tensor: str) -> str:
        """A gradient reshaped to the shape of a tensor."""
        return self.add("Reshape", grad, self.shape_of(tensor))

    def unsqueezed(self, tensor: str, *axes: int) -> str:
        """A tensor with new axes of size 1."""
        return self.add("Unsqueeze", tensor, self.integers(*axes))

    def squeezed(self, tensor: str, *axes: int) -> str:
        """A tensor without some axes of size 1."""
        return self.add("Squeeze", tensor, self.integers(*axes))

    def permuted(self, tensor: str, order: Sequence[int]) -> str:
        """A tensor with its axes in another order."""
        if list(order) == list(range(len(order))):
            return tensor
        return self.once("Transpose", tensor, perm=list(order))

    def swapped(self, tensor: str, rank: int) -> str:
        """A tensor with its last two axes exchanged."""
        return self.permuted(tensor, (*range(rank - 2), rank - 1, rank - 2))

    def joined(self, *sizes: str) -> str:
        """Sizes one after the other, as one shape: `(n,)`."""
        if len(sizes) == 1:
            return sizes[0]
        return self.add("Concat", *sizes, axis=0, elem_type=INT64)

    # A broadcast repeats a tensor along axes; its gradient is summed over them. An example:
    # a bias `(3,)` was added to `(batch, 5, 3)`. Axis 0 is new, and axis 1 was repeated five
    # times from a missing axis, so the gradient is summed over both. Whether an axis was
    # repeated can be open: of `a` and `b` in `(a, 3)` and `(b, 3)` either may be 1 in a run.
    # Then the axes to sum over are those whose sizes differ, found in the run.

    def unbroadcast(
        self, grad: str, operand: str, result: str, *, matrix: bool = False
    ) -> str:
        """Sum a gradient of the shape of `result` over the axes along which it was repeated.

        Args:
            grad: The gradient, `(..., result's axes)`.
            operand: The tensor that was broadcast; the result has its shape.
            result: What it was broadcast to.
            matrix: Whether the last two axes are those of a matrix, and already right.
        """
        last = 2 if matrix else 0
        ours, theirs = self.shape(operand), self.shape(result)
        ours, theirs = ours[: len(ours) - last], theirs[: len(theirs) - last]
        new = len(theirs) - len(ours)
        repeated = [
            new + axis
            for axis, (size, other) in enumerate(zip(ours, theirs[new:], strict=True))
            if size == 1 and other != 1
        ]
        settled = all(
            isinstance(size, int) or (size is not None and size == other)
            for size, other in zip(ours, theirs[new:], strict=True)
        )
        if settled:
            summed = self.total(grad, (*range(new), *repeated))
            return self.squeezed(summed, *range(new)) if new else summed
        return self._unbroadcast_in_run(grad, operand, result, new, last)

    def _unbroadcast_in_run(
        self, grad: str, operand: str, result: str, new: int, last: int
    ) -> str:
        ours, theirs = self.shape_of(operand), self.shape_of(result)
        if last:
            ours, theirs = (
                self.add("Slice", shape, self.integers(0), self.integers(-last))
                for shape in (ours, theirs)
            )
        if new:
            ours = self.joined(self.integers(*[1] * new), ours)
        differ = self.add("Not", self.compare("Equal", ours, theirs))
        axes = self.add("NonZero", differ, elem_type=INT64)
        axes = self.add("Reshape", axes, self.integers(-1))
        summed = self.add("ReduceSum", grad, axes, keepdims=1, noop_with_empty_axes=1)
        return self.like(summed, operand) if new else summed
