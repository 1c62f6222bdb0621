"""Methods of LyCORIS that compute the trained weight from the base's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, Replacement, Reweight, Weighed
from onnx_adapt.checkpoints.readers.lycoris.tensors import alpha_scale, matrices, misfit
from onnx_adapt.checkpoints.readers.peft_methods.rotations import cayley
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def full_edits(found: ModuleTensors) -> Iterator[Edit]:
    """The whole difference of the weight, the bias, or both."""
    weight, bias = (
        found.parts[name].astype(np.float64) if name in found.parts else None
        for name in ("diff", "diff_b")
    )
    yield _added_to_base(found, weight, bias)


def norm_edits(found: ModuleTensors) -> Iterator[Edit]:
    """The difference of the weight and bias of a normalisation."""
    weight, bias = (found.parts.get(name) for name in ("w_norm", "b_norm"))
    yield _added_to_base(found, weight, bias)


def set_edits(found: ModuleTensors) -> Iterator[Edit]:
    """A weight that replaces the base's."""
    yield Replacement(found.module, "weight", found.parts["set_weight"])


def _added_to_base(found: ModuleTensors, weight: Array | None, bias: Array | None) -> Reweight:
    def compute(base: Array, base_bias: Array | None) -> Weighed:
        if weight is not None and _lengths(weight) != _lengths(base):
            raise misfit(found, list(weight.shape), base)
        if bias is not None and bias.size != len(base):
            raise misfit(found, list(bias.shape), base)
        trained = base if weight is None else base + weight.reshape(base.shape)
        if bias is None:
            return trained, base_bias
        return trained, bias.reshape(-1) + (0 if base_bias is None else base_bias)

    return Reweight(found.module, compute)


def _lengths(array: Array) -> list[int]:
    """The sizes of an array's axes, but for those of 1, which files leave out."""
    return [size for size in array.shape if size != 1]


def oft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """OFT with blocks on the diagonal, and BOFT whose blocks are a butterfly of stages.

    Each block of outputs is rotated by `R = (I + Q) (I - Q)^-1` with `Q = B - B^T`. Stage i of
    a butterfly rotates outputs that are `2^i * b / 2` apart. Alpha times the outputs is the
    largest norm of all `Q` together; 0 is none.
    """
    blocks = found.parts["oft_blocks"].astype(np.float64)
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise CheckpointError(
            f"module {found.module!r}: oft_blocks has shape {list(blocks.shape)}"
        )
    outputs = int(np.prod(blocks.shape[-3:-1]))
    stages, size = (len(blocks) if blocks.ndim == 4 else 0), blocks.shape[-1]
    if stages and (size % 2 or outputs % (2 ** (stages - 1) * size)):
        raise CheckpointError(
            f"module {found.module!r}: oft_blocks {list(blocks.shape)} has too many stages"
        )
    limit = alpha_scale(found, 1) * outputs if "alpha" in found.parts else 0
    skew = blocks - blocks.swapaxes(-1, -2)
    length = np.linalg.norm(skew) + 1e-8
    if 0 < limit < length:
        skew = skew * limit / length
    rotations = cayley(-skew)
    factors = found.parts.get("rescale", np.ones(outputs))

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if len(weight) != outputs or factors.size != outputs:
            raise misfit(found, list(blocks.shape), weight)
        if rotations.ndim == 3:
            cut = weight.reshape(*rotations.shape[:2], -1)
            turned = np.einsum("knm,knx->kmx", rotations, cut)
        else:
            turned = _butterfly(rotations, weight.reshape(len(weight), -1))
        turned = turned.reshape(weight.shape)
        return turned * factors.reshape(-1, *(1,) * (weight.ndim - 1)), bias

    yield Reweight(found.module, compute)


def _butterfly(rotations: Array, weight: Array) -> Array:
    """Rotate the rows of a weight, `(out, x)`, stage by stage."""
    width = weight.shape[1]
    for i, stage in enumerate(rotations):
        apart = 2**i * stage.shape[-1] // 2
        rows = weight.reshape(-1, 2, apart, width).swapaxes(1, 2)
        turned = np.einsum("bij,bjx->bix", stage, rows.reshape(*stage.shape[:2], width))
        weight = turned.reshape(-1, apart, 2, width).swapaxes(1, 2).reshape(-1, width)
    return weight


def glora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """GLoRA: `W' = W + scale * (W a1 a2 + b1 b2)`; a1 a2 mixes channels."""
    a1, a2, b1, b2 = (m.reshape(len(m), -1) for m in matrices(found, "a1", "a2", "b1", "b2"))
    rank = len(a2)
    scale = alpha_scale(found, rank)

    def compute(weight: Array, bias: Array | None) -> Weighed:
        inputs = weight.shape[1]
        wanted = [(inputs, rank), (rank, inputs), (len(weight), rank), (rank, weight[0].size)]
        if [m.shape for m in (a1, a2, b1, b2)] != wanted:
            raise misfit(found, [len(b1), b2.shape[1]], weight)
        inside = np.einsum("oi...,ij->oj...", weight, a1 @ a2)
        return weight + scale * (inside + (b1 @ b2).reshape(weight.shape)), bias

    yield Reweight(found.module, compute)


def ia3_edits(found: ModuleTensors) -> Iterator[Edit]:
    """IA3 of LyCORIS: `W' = W (1 + v)`, by input or by output."""
    factors = 1 + found.parts["weight"].astype(np.float64).reshape(-1)
    on_input = bool(found.parts["on_input"].reshape(-1)[0])

    def compute(weight: Array, bias: Array | None) -> Weighed:
        shape = [1] * weight.ndim
        shape[on_input] = -1
        if weight.shape[on_input] != factors.size:
            raise misfit(found, [factors.size], weight)
        return weight * factors.reshape(shape), bias

    yield Reweight(found.module, compute)
