"""LoRA, LoCon, LoHa and LoKr of LyCORIS, with DoRA by output or by input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Reweight, Weighed
from onnx_adapt.checkpoints.readers.lycoris.tensors import alpha_scale, matrices, misfit
from onnx_adapt.checkpoints.readers.peft_methods.low_rank import hadamard_factor, tucker_kernel
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_EPS = float(np.finfo(np.float32).eps)
"""What LyCORIS adds to the norms of DoRA."""


def lora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoRA and LoCon, with DoRA by output or by input."""
    a, b = _lora_factors(found)
    scale, outputs, rank = alpha_scale(found, len(a)), len(b), len(a)
    bias, magnitude = _lora_bias(found, outputs, scale), found.parts.get("dora_scale")
    edit = LowRank(found.module, a, b, scale, norm_scale=scale, dilates=True)
    if bias is not None:
        if magnitude is not None:
            raise CheckpointError(
                f"module {found.module!r} has a bias beside DoRA, which is not supported"
            )
        yield replace(edit, b=scale * b, scale=1.0, bias=bias)
    elif magnitude is None:
        yield edit
    elif magnitude.size == outputs and (magnitude.ndim < 2 or len(magnitude) == outputs):
        yield replace(edit, magnitude=magnitude.reshape(-1).astype(np.float64))
    elif magnitude.ndim < 2:
        raise CheckpointError(
            f"module {found.module!r}: dora_scale has {magnitude.size} numbers for {outputs} "
            "outputs"
        )
    else:
        rows, columns = b.reshape(outputs, -1), a.reshape(rank, -1)
        sizes = outputs, columns.shape[1]
        yield _dense(found, sizes, rank, lambda: scale * rows @ columns)


def _lora_factors(found: ModuleTensors) -> tuple[Array, Array]:
    """A and B of LoRA; with `lora_mid`, the core of a Tucker decomposition, in A."""
    a, b = matrices(found, "lora_down", "lora_up")
    if "lora_mid" in found.parts:
        (mid,) = matrices(found, "lora_mid")
        if mid.shape[:2] != (len(a), len(a)) or a[0].size != a.shape[1]:
            raise CheckpointError(
                f"module {found.module!r}: lora_mid {list(mid.shape)} does not fit lora_down "
                f"{list(a.shape)}"
            )
        a = tucker_kernel(found.module, mid, a.reshape(len(a), -1))
    if len(a) and b[0].size != len(a):
        raise CheckpointError(
            f"module {found.module!r}: lora_down {list(a.shape)} and lora_up {list(b.shape)} "
            "do not fit together"
        )
    return a, b


def _lora_bias(found: ModuleTensors, outputs: int, scale: float) -> Array | None:
    """What is added to a module's bias: that of B, which is scaled, and a full difference."""
    total = None
    for name, factor in (("lora_up.bias", scale), ("diff_b", 1.0)):
        if name in found.parts:
            bias = found.parts[name].astype(np.float64)
            if bias.shape != (outputs,):
                raise CheckpointError(
                    f"module {found.module!r}: {name} {list(bias.shape)} is for {outputs} "
                    "outputs"
                )
            total = factor * bias + (0 if total is None else total)
    return total


def loha_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoHa: the product of two low-rank updates, number by number; its rank is r * r."""
    factors = [hadamard_factor(found, number) for number in "12"]
    (b1, a1), (b2, a2) = ((up, down.reshape(len(down), -1)) for up, down in factors)
    if len(b1) != len(b2) or a1.shape[1] != a2.shape[1]:
        raise CheckpointError(
            f"module {found.module!r}: the two updates to multiply have the sizes "
            f"{[len(b1), a1.shape[1]]} and {[len(b2), a2.shape[1]]}"
        )
    scale = alpha_scale(found, len(a1))
    sizes, rank = (len(b1), a1.shape[1]), len(a1) * len(a2)
    yield _dense(found, sizes, rank, lambda: scale * (b1 @ a1) * (b2 @ a2))


def lokr_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoKr: a Kronecker product of two matrices, each whole or of two factors.

    The kernel of a convolution is in the second one.
    """
    (b1, a1), (b2, a2) = (_kronecker_factors(found, name) for name in ("lokr_w1", "lokr_w2"))
    parted = [
        len(a) for name, a in (("2", a2), ("1", a1)) if f"lokr_w{name}" not in found.parts
    ]
    scale = alpha_scale(found, parted[0]) if parted else 1.0
    sizes = len(b1) * len(b2), a1.shape[1] * a2.shape[1]
    yield _dense(found, sizes, len(a1) * len(a2), lambda: scale * np.kron(b1 @ a1, b2 @ a2))


def _kronecker_factors(found: ModuleTensors, name: str) -> tuple[Array, Array]:
    """One matrix of LoKr as two factors; the smaller one is the identity if it is whole."""
    if name in found.parts:
        (whole,) = matrices(found, name)
        whole = whole.reshape(len(whole), -1)
        makes, reads = whole.shape
        return (np.eye(makes), whole) if makes <= reads else (whole, np.eye(reads))
    up, down = matrices(found, f"{name}_a", f"{name}_b")
    core = f"lokr_t{name[-1]}"
    if core in found.parts:
        kernel = tucker_kernel(found.module, matrices(found, core)[0], down)
        up, down = up.T, kernel.reshape(len(kernel), -1)
    if up.shape[1] != len(down):
        raise CheckpointError(
            f"module {found.module!r}: the factors of {name} have the ranks {up.shape[1]} and "
            f"{len(down)}"
        )
    return up, down


def _dense(
    found: ModuleTensors, sizes: tuple[int, int], rank: int, change: Callable[[], Array]
) -> Reweight:
    """A change of the whole weight, with DoRA's rescaling if the module has one.

    DoRA of sd-scripts and LyCORIS has a magnitude for each output, `(out, 1)`, or for each
    input, `(1, in)`; PEFT's is always by output.

    Args:
        found: The module.
        sizes: Its `out` and `in`, for a convolution `in * kh * kw`.
        rank: The highest rank that the change can have.
        change: Makes the change, once it is known to be of the base's size.
    """
    magnitude = found.parts.get("dora_scale")

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if sizes != (len(weight), weight[0].size):
            raise misfit(found, list(sizes), weight)
        trained = weight + change().reshape(weight.shape)
        if magnitude is None:
            return trained, bias
        axis = int(magnitude.shape[0] == 1 and magnitude.size > 1)
        if magnitude.size != weight.shape[axis]:
            raise misfit(found, list(magnitude.shape), weight)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        norm = np.sqrt((trained**2).sum(axis=others, keepdims=True)) + _EPS
        return trained * magnitude.astype(np.float64).reshape(norm.shape) / norm, bias

    return Reweight(found.module, compute, None if magnitude is not None else rank)
