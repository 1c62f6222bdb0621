"""How far the outputs of a base vary between runs that differ only in rounding.

Optimisations of ONNX Runtime replace nodes by kernels that round at other places. So the
outputs of one model differ between optimisation levels, in the last bits for float32 and by
whole steps for quantised models. The spread of the base's own outputs is the measure of how
far a correct adapted model may be from it.

Example: an element is 1.000 in one run and 1.002 in another. Then 1.003 is 0.001 outside of
the interval, which is less than its width of 0.002, and so is accepted; 1.005 is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.proof.runner import Values, as_arrays
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.bounds import ARITHMETIC
from onnx_adapt.slot.manifest import Slot

_MOVED = 1 << 28
"""The most bytes of weights that are perturbed, beginning with the smallest tensors."""


def kept_apart(
    base: Model, slots: Sequence[Slot], weights: Sequence[ReplaceableWeight]
) -> Model:
    """The base, in which ONNX Runtime cannot fuse nodes across the tensors of slots.

    Zero is added to each of these tensors. It is an input, so that ONNX Runtime does not
    know its value. Nodes on one side of a tensor are then fused as on one side of a slot: an
    8-bit weight becomes a MatMulNBits, for instance, if its input is not quantised just
    before. Weights that adapters may replace, or that slots are on, are made inputs: in the
    adapted model they are no constants either.
    """
    result = base.copy()
    graphs = {scope.path: scope.graph for scope in walk.scopes(result.proto.graph)}
    for dtype in {slot.dtype for slot in slots}:
        zero = numpy_helper.from_array(np.zeros((), DTYPES[dtype]), _zero(dtype))
        result.proto.graph.initializer.append(zero)
        _declare_input(result.proto, zero)
    for tensor, dtype, graph in {(slot.tensor, slot.dtype, slot.graph) for slot in slots}:
        if graph in graphs:
            _add_zero(graphs[graph], tensor, _zero(dtype))
    stored = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    inputs = {value.name for value in result.proto.graph.input}
    opened = [weight.original for weight in weights if weight.swappable]
    opened += [slot.tensor for slot in slots if slot.on_weight]
    for name in dict.fromkeys(opened):
        if name in stored and name not in inputs:
            _declare_input(result.proto, stored[name])
    return result


def _zero(dtype: str) -> str:
    return f"kept_apart/zero/{dtype}"


def _declare_input(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    dims = list(tensor.dims)
    value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims)
    proto.graph.input.append(value)


def _add_zero(graph: onnx.GraphProto, tensor: str, zero: str) -> None:
    """Rename the output that makes a tensor, and add zero to it right behind its node."""
    for place, node in enumerate(graph.node):
        if tensor in node.output:
            kept = f"kept_apart/{tensor}"
            node.output[list(node.output).index(tensor)] = kept
            graph.node.insert(place + 1, onnx.helper.make_node("Add", [kept, zero], [tensor]))
            return


def perturbed(base: Model, seed: int) -> Model:
    """The base with each weight changed at random by as much as rounding may change a sum.

    A computed sum of `n` products equals the exact sum for weights that differ by at most
    `gamma_n`, relative to each (Higham, section 3.1). So the outputs of such a base show its
    rounding even if all other runs agree. A weight of a narrow type changes to the next
    number. A single number stays as it is. It is not a term of a sum but a setting, such as
    an exponent, and a negative number to the power of 2.0000002 is NaN.
    """
    rng = np.random.default_rng(seed)
    result = base.copy()
    floats = (t for t in walk.tensors(result.proto) if t.data_type in FLOATS)
    tensors = [tensor for tensor in floats if np.prod(tensor.dims) > 1]
    left = _MOVED
    for tensor in sorted(tensors, key=lambda tensor: int(np.prod(tensor.dims))):
        dtype = DTYPES[FLOATS[tensor.data_type]]
        left -= int(np.prod(tensor.dims)) * dtype.itemsize
        if left < 0:
            break
        value = read_tensor(base, tensor)
        moved = numpy_helper.from_array(_moved(value, rng), tensor.name)
        tensor.CopyFrom(moved)
    return result


def _moved(value: Array, rng: np.random.Generator) -> Array:
    kind = ARITHMETIC[next(name for name, dtype in DTYPES.items() if dtype == value.dtype)]
    rows = len(value) if value.ndim else 1
    terms = max(rows, value.size // max(rows, 1))  # whichever axis is summed over
    by = min(kind.gamma(terms), 1.0) + 2 * kind.unit
    change = by * rng.uniform(-1, 1, value.shape)
    with np.errstate(over="ignore"):
        moved = (value.astype(np.float64) * (1 + change)).astype(value.dtype)
    # A mask's largest number stays what it is.
    return np.where(np.isfinite(moved.astype(np.float64)), moved, value)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far outputs are from those of other runs, and how far they may be.

    Attributes:
        far: The largest distance to the interval that the other runs span, relative to the
            largest value of the output.
        allowed: The largest width of this interval, relative to the same.
    """

    far: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether rounding explains it."""
        return self.far <= self.allowed


def beyond(
    roundings: Sequence[Sequence[Values]], got: Sequence[Values], floor: float = 0.0
) -> Distance:
    """Measure how far outputs lie outside of the interval that several runs span.

    The runs differ only in rounding, and each element has an interval of its own. An output
    that is rounded in yet another way may lie outside by the width of the widest interval
    of its tensor. Integers that count or index, truth values and texts must be equal to
    those of one of the runs.

    Args:
        roundings: The outputs of each run, for each set of inputs.
        got: The outputs in question, for the same inputs.
        floor: The least distance that is allowed.
    """
    worst = Distance(0.0, floor)
    for name in got[0] if got else ():
        far, allowed = 0.0, floor
        for number, item in enumerate(got):
            sides = [as_arrays(run[number][name]) for run in roundings]
            for place, array in enumerate(as_arrays(item[name])):
                known = [side[place] for side in sides if len(side) > place]
                one = _outside([a for a in known if _comparable(a, array)], array)
                far, allowed = max(far, one.far), max(allowed, one.allowed)
            if len(as_arrays(item[name])) not in {len(side) for side in sides}:
                far = float("inf")
        if far - allowed > worst.far - worst.allowed or not worst.far:
            worst = Distance(far, allowed)
    return worst


def is_finite_where(base: Sequence[Values], got: Sequence[Values]) -> bool:
    """Whether outputs are numbers wherever the base's are."""
    return all(
        _comparable(a, b) and not np.any(np.isfinite(_real(a)) & ~np.isfinite(_real(b)))
        for one, other in zip(base, got, strict=True)
        for name in one
        for a, b in zip(as_arrays(one[name]), as_arrays(other[name]), strict=False)
        if a.dtype.kind not in "OSU"
    )


def _comparable(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _outside(known: Sequence[Array], array: Array) -> Distance:
    """How far one tensor is outside of the interval, and its largest width."""
    if not known:
        return Distance(float("inf"), 0.0)
    if _is_discrete(array):
        some = np.logical_or.reduce([np.asarray(item == array) for item in known])
        return Distance(0.0 if np.all(some) else float("inf"), 0.0)
    value, *wide = (_real(item) for item in (array, *known))
    with np.errstate(invalid="ignore"):
        same = [(item == value) | (np.isnan(item) & np.isnan(value)) for item in wide]
        low, high = np.fmin.reduce(wide), np.fmax.reduce(wide)  # NaN is no side
        far = np.where(
            np.logical_or.reduce(same),
            0.0,
            np.maximum(0, np.maximum(value - high, low - value)),
        )
        width = high - low
    if not np.isfinite(far).all():
        return Distance(float("inf"), 0.0)
    scale = np.abs(wide[0], where=np.isfinite(wide[0]), out=np.zeros(value.shape))
    largest = float(scale.max(initial=0.0)) or 1.0
    width = np.where(np.isfinite(width), width, 0.0)
    return Distance(
        float(far.max(initial=0.0)) / largest, float(width.max(initial=0.0)) / largest
    )


def _real(array: Array) -> Array:
    parts = [array.real, array.imag] if array.dtype.kind == "c" else array
    return np.asarray(parts).astype(np.float64)


def _is_discrete(array: Array) -> bool:
    """Whether values are codes and not quantities."""
    return array.dtype.kind in "OSUTb" or (array.dtype.kind in "iu" and array.itemsize > 2)
