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
from onnx_adapt.proof.taps import Tapper
from onnx_adapt.slot.bounds import ARITHMETIC
from onnx_adapt.slot.manifest import ReplaceableWeight, Slot

_ELEM_TYPES = {name: elem_type for elem_type, name in FLOATS.items()}
_MOVED = 1 << 28
"""The most bytes of weights that are perturbed, beginning with the smallest tensors."""


def kept_apart(
    base: Model, slots: Sequence[Slot], weights: Sequence[ReplaceableWeight]
) -> Model:
    """The base, in which ONNX Runtime cannot fuse nodes across the tensors of slots.

    These tensors are made outputs of the model. Weights that adapters may replace are made
    inputs and so are no constants, as in the adapted model.
    """
    result = base.copy()
    tapper = Tapper(result.proto)
    paths = {scope.path for scope in walk.scopes(result.proto.graph)}
    for slot in slots:
        if slot.graph in paths:
            tapper.tap(slot.graph, slot.tensor, _ELEM_TYPES[slot.dtype])
    stored = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    inputs = {value.name for value in result.proto.graph.input}
    for weight in weights:
        tensor = stored.get(weight.original)
        if weight.swappable and tensor is not None and tensor.name not in inputs:
            value = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            result.proto.graph.input.append(value)
    return result


def perturbed(base: Model, seed: int) -> Model:
    """The base with each weight changed at random by as much as rounding may change a sum.

    A computed sum of `n` products equals the exact sum for weights that differ by at most
    `gamma_n`, relative to each (Higham, section 3.1). So the outputs of such a base show its
    rounding even if all other runs agree. A weight of a narrow type changes to the next
    number.
    """
    rng = np.random.default_rng(seed)
    result = base.copy()
    tensors = [t for t in walk.tensors(result.proto) if t.data_type in FLOATS]
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
        low, high = np.minimum.reduce(wide), np.maximum.reduce(wide)
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
