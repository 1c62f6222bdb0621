"""Which form of an update is smaller: two factors, or the whole weight."""

from __future__ import annotations

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, Reweight, Weighed
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def smaller(edit: LowRank) -> LowRank | Reweight:
    """A low-rank update as it is, or as a weight where its factors have more numbers.

    For example LoHa of rank 16 has factors of rank 256. On a layer of 384 x 384 they have
    196608 numbers, and the weight has 147456.
    """
    inputs, outputs = int(np.prod(edit.a.shape[1:])), len(edit.b)
    if len(edit.a) * (inputs + outputs) <= inputs * outputs:
        return edit
    change = edit.scale * (edit.b.reshape(outputs, -1) @ edit.a.reshape(-1, inputs))

    def compute(weight: Array, bias: Array | None) -> Weighed:
        check_weight(edit.module, weight, outputs, inputs)
        return weight + change.reshape(weight.shape), bias

    return Reweight(edit.module, compute)


def check_weight(module: str, weight: Array, outputs: int, inputs: int) -> None:
    """Refuse a weight of the base of another size than the update is for.

    Args:
        module: The module.
        weight: `(out, in)` or `(out, in, kh, kw)`.
        outputs: The `out` of the update.
        inputs: The `in` of the update, or `in * kh * kw`.

    Raises:
        CheckpointError: If it is of another size.
    """
    if (len(weight), weight[0].size) != (outputs, inputs):
        raise CheckpointError(
            f"module {module!r}: the update {[outputs, inputs]} does not fit the base's "
            f"weight {list(weight.shape)}",
            hint="is it an adapter for another size of this model?",
        )
