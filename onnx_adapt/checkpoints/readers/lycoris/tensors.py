"""What a method of LyCORIS reads: alpha, matrices, and the errors where they do not fit."""

from __future__ import annotations

import numpy as np

from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import number, refuse_rank_zero
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def alpha_scale(found: ModuleTensors, rank: int) -> float:
    """Alpha over the rank; without an alpha it is the rank.

    Raises:
        CheckpointError: If the rank is 0, or alpha is no finite number.
    """
    refuse_rank_zero(found.module, rank)
    if "alpha" not in found.parts:
        return 1.0
    value = found.parts["alpha"]
    if value.size != 1:
        raise CheckpointError(f"module {found.module!r}: alpha has shape {list(value.shape)}")
    return number(float(value.reshape(-1)[0]), f"alpha of {found.module!r}") / rank


def matrices(found: ModuleTensors, *names: str) -> list[Array]:
    """Tensors in float64, each with at least two axes.

    Raises:
        CheckpointError: If one is not there, or has fewer.
    """
    for name in names:
        if name not in found.parts or found.parts[name].ndim < 2:
            shape = list(found.parts[name].shape) if name in found.parts else "not there"
            raise CheckpointError(
                f"module {found.module!r}: {name} is {shape}; it has to be a matrix",
                hint="the file is incomplete: download or save it again",
            )
    return [found.parts[name].astype(np.float64) for name in names]


def misfit(found: ModuleTensors, shape: list[int], weight: Array) -> CheckpointError:
    """The error for an update of another size than the base's weight."""
    return CheckpointError(
        f"module {found.module!r}: an update {shape} does not fit the base's weight "
        f"{list(weight.shape)}",
        hint="is it an adapter for another size of this model?",
    )
