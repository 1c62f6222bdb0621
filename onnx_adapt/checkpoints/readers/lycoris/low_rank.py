"""LoRA, LoCon, LoHa and LoKr of LyCORIS, with DoRA by output or by input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Reweight, Weighed
from onnx_adapt.checkpoints.readers.lycoris.tensors import alpha_scale, matrices, misfit
from onnx_adapt.checkpoints.readers.peft_methods.low_rank import hadamard_factor
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_EPS = float(np.finfo(np.float32).eps)
"""What LyCORIS adds to the norms of DoRA."""


def lora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoRA and LoCon; `lora_mid` is the core of a Tucker decomposition of a convolution.

    The update is `up @ core`, where `core[m] = sum over n of mid[m, n] * down[n]` is the
    kernel of a convolution to r channels.
    """
    a, b = matrices(found, "lora_down", "lora_up")
    if "lora_mid" in found.parts:
        (mid,) = matrices(found, "lora_mid")
        if mid.shape[:2] != (len(a), len(a)) or a[0].size != a.shape[1]:
            raise CheckpointError(
                f"module {found.module!r}: lora_mid {list(mid.shape)} does not fit lora_down "
                f"{list(a.shape)}"
            )
        a = np.einsum("mn...,nj->mj...", mid, a.reshape(len(a), -1))
    scale = alpha_scale(found, len(a))
    bias = found.parts.get("lora_up.bias")
    if "diff_b" in found.parts:
        bias = _added(bias, found.parts["diff_b"] / (scale or 1))
    edit = LowRank(found.module, a, b, scale, bias=bias, norm_scale=scale, dilates=True)
    if "dora_scale" not in found.parts:
        yield edit
        return
    if bias is not None:
        raise CheckpointError(
            f"module {found.module!r} has a bias beside DoRA, which is not supported"
        )
    magnitude = found.parts["dora_scale"]
    if magnitude.ndim < 2 or (len(magnitude) == len(b) and magnitude.size == len(b)):
        yield LowRank(
            found.module,
            a,
            b,
            scale,
            magnitude=magnitude.reshape(-1).astype(np.float64),
            norm_scale=scale,
            dilates=True,
        )
        return
    change = scale * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    yield _dense(found, change, len(a))


def _added(one: Array | None, other: Array) -> Array:
    return other if one is None else one + other


def loha_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoHa: the product of two low-rank updates, number by number; its rank is r * r."""
    factors = [hadamard_factor(found, number) for number in "12"]
    first, second = (up @ down.reshape(len(down), -1) for up, down in factors)
    if first.shape != second.shape:
        raise CheckpointError(
            f"module {found.module!r}: the two updates to multiply have the sizes "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    rank = len(found.parts["hada_w1_b"])
    yield _dense(found, alpha_scale(found, rank) * first * second, rank**2)


def lokr_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoKr: a Kronecker product of two matrices, each whole or of two factors.

    The kernel of a convolution is in the second one.
    """
    first, rank1 = _kronecker_factor(found, "lokr_w1")
    second, rank2 = _kronecker_factor(found, "lokr_w2")
    scale = alpha_scale(found, rank2 or rank1) if rank1 or rank2 else 1.0
    change = np.kron(first, second.reshape(len(second), -1))
    ranks = (r or min(w.shape[0], w[0].size) for r, w in ((rank1, first), (rank2, second)))
    yield _dense(found, scale * change, int(np.prod(list(ranks))))


def _kronecker_factor(found: ModuleTensors, name: str) -> tuple[Array, int]:
    """One factor of LoKr, and its rank; 0 if it is a whole matrix."""
    if name in found.parts:
        return matrices(found, name)[0], 0
    up, down = matrices(found, f"{name}_a", f"{name}_b")
    core = f"lokr_t{name[-1]}"
    if core not in found.parts:
        return up @ down, len(down)
    (kernel,) = matrices(found, core)
    return np.einsum("ij...,ip,jr->pr...", kernel, up, down), len(down)


def _dense(found: ModuleTensors, change: Array, rank: int) -> Reweight:
    """A change of the whole weight, with DoRA's rescaling if the module has one.

    DoRA of sd-scripts and LyCORIS has a magnitude for each output, `(out, 1)`, or for each
    input, `(1, in)`; PEFT's is always by output.
    """
    magnitude = found.parts.get("dora_scale")

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if change.size != weight.size or len(change) != len(weight):
            raise misfit(found, list(change.shape), weight)
        trained = weight + change.reshape(weight.shape)
        if magnitude is None:
            return trained, bias
        axis = int(magnitude.shape[0] == 1 and magnitude.size > 1)
        if magnitude.size != weight.shape[axis]:
            raise misfit(found, list(magnitude.shape), weight)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        norm = np.sqrt((trained**2).sum(axis=others, keepdims=True)) + _EPS
        return trained * magnitude.astype(np.float64).reshape(norm.shape) / norm, bias

    return Reweight(found.module, compute, None if magnitude is not None else rank)
