"""Which form of an update is smaller: two factors, or the whole weight."""

from __future__ import annotations

from collections.abc import Callable

from onnx_adapt.checkpoints.edits import LowRank, Reweight, Weighed
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def smaller(
    module: str,
    sizes: tuple[int, int, int],
    low_rank: Callable[[], LowRank],
    change: Callable[[], Array],
) -> LowRank | Reweight:
    """Ask for an update in its smaller form: its factors, or the weight that it makes.

    For example LoHa of rank 16 has factors of rank 256. On a layer of 384 x 384 they have
    196608 numbers, and the weight has 147456. The other form is not computed.

    Args:
        module: The module.
        sizes: The rank, `out`, and `in`, for a Conv2d `in * kh * kw`.
        low_rank: Makes the factors.
        change: Makes what is added to the weight.
    """
    rank, outputs, inputs = sizes
    if rank * (inputs + outputs) <= inputs * outputs:
        return low_rank()

    def compute(weight: Array, bias: Array | None) -> Weighed:
        check_weight(module, weight, outputs, inputs)
        return weight + change().reshape(weight.shape), bias

    return Reweight(module, compute)


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
