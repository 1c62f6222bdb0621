"""How a base rounds: its answers from runs that differ in nothing but rounding.

ONNX Runtime's optimisations replace nodes by kernels that round elsewhere, so outputs of one
model differ a little from level to level: in the last bits for float32, by whole steps for
quantised models. That spread is the base's own, and the only measure of what a right model
may differ from it.
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
from onnx_adapt.slot.bounds import ARITHMETIC
from onnx_adapt.slot.manifest import ReplaceableWeight, Slot

_MOVED = 1 << 28
"""So many bytes of weights are moved at most, the smallest first."""


def kept_apart(
    base: Model, slots: Sequence[Slot], weights: Sequence[ReplaceableWeight]
) -> Model:
    """The base with what slots keep ONNX Runtime from: fusing across their tensors.

    A number that is zero, and an input so that ONNX Runtime cannot know it, is added to each
    of the tensors. What is fused on either side of it is fused on that side of a slot: an
    8-bit weight becomes a MatMulNBits, for instance, where its input is not quantised just
    before. Weights that adapters may replace are inputs too, as in the adapted model.
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
    for weight in weights:
        original = stored.get(weight.original)
        if weight.swappable and original is not None and original.name not in inputs:
            _declare_input(result.proto, original)
    return result


def _zero(dtype: str) -> str:
    return f"kept_apart/zero/{dtype}"


def _declare_input(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    dims = list(tensor.dims)
    value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims)
    proto.graph.input.append(value)


def _add_zero(graph: onnx.GraphProto, tensor: str, zero: str) -> None:
    """Rename what makes a tensor, and make the tensor of it and zero, right behind."""
    for place, node in enumerate(graph.node):
        if tensor in node.output:
            kept = f"kept_apart/{tensor}"
            node.output[list(node.output).index(tensor)] = kept
            graph.node.insert(place + 1, onnx.helper.make_node("Add", [kept, zero], [tensor]))
            return


def shaken(base: Model, seed: int) -> Model:
    """The base with each weight moved at random by what rounding may do to a sum with it.

    The computed sum of `n` products is the exact one for weights that differ by up to
    `gamma_n`, relative to each (Higham, section 3.1), so outputs of such a base are a measure
    of its roundings where no other run of it differs. A weight of a narrow type moves to
    the next number. A single number stays: it is no term of a sum but a setting, such as
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
    """How far outputs are from others, and what is allowed.

    Attributes:
        far: The largest difference beyond all roundings, relative to the output's largest.
        allowed: How far roundings of this output are from each other at most.
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
    """How far outputs lie outside of what several roundings gave, and how wide that is.

    For each element the roundings span an interval. An output that is one more rounding lies
    in it or near: it may be outside by the widest interval of its tensor, of all inputs.
    Whole numbers that count or index, truth values and text are those of some rounding.

    Args:
        roundings: Outputs for each set of inputs, from several runs.
        got: The outputs in question, for the same inputs.
        floor: What is allowed at least.
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
    """One tensor: how far it is outside of the interval, and the widest interval."""
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
    """Whether values are codes rather than amounts."""
    return array.dtype.kind in "OSUTb" or (array.dtype.kind in "iu" and array.itemsize > 2)
