"""Methods of PEFT that add to the weight or change it, entry by entry or block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.peft_settings import by_pattern
from onnx_adapt.checkpoints.readers.saved import number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.slot.activations import ACTIVATIONS
from onnx_adapt.slot.bounds import ARITHMETIC, Bounded


def adding(module: str, added: Callable[[Array], Array], rank: int | None = None) -> Reweight:
    """An edit that adds to the weight what a function makes of it, and leaves the bias.

    Args:
        module: The module's path.
        added: From the weight to what is added, of the same shape.
        rank: The highest rank of that, if it is known.
    """

    def compute(weight: Array, bias: Array | None) -> Weighed:
        return weight + added(weight), bias

    return Reweight(module, compute, rank)


def lokr_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoKr (arXiv 2212.10650): a Kronecker product is added."""
    config = found.config
    rank = number(by_pattern(found.module, config, "rank_pattern", config.get("r", 8)), "r")
    alpha = by_pattern(found.module, config, "alpha_pattern", config.get("alpha", 8))
    parts = {name.removeprefix("lokr_"): found.read(name) for name in found.parts}
    yield kronecker(found.module, parts, number(alpha, "alpha") / rank)


def kronecker(module: str, parts: Mapping[str, Array], scale: float) -> Reweight:
    """The edit of LoKr: `scale * kron(w1, w2)` is added to the weight.

    Its rank is the product of theirs. Where that is low, it becomes a slot.

    Args:
        module: The module's path.
        parts: `w1`, or `w1_a` and `w1_b`; `w2`, or `w2_a` and `w2_b` and for a convolution
            perhaps their core `t2`.
        scale: What multiplies it.
    """
    first = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:
        second = parts["w2"]
    elif "t2" in parts:
        a, b = parts["w2_a"], parts["w2_b"]
        second = np.einsum("ij...,ip,jr->pr...", parts["t2"], a, b, optimize=True)
    else:
        second = parts["w2_a"] @ parts["w2_b"]
    rank = 1
    for name, factor in (("w1", first), ("w2", second)):
        inner = len(parts[f"{name}_b"]) if f"{name}_b" in parts else len(factor)
        rank *= min(inner, len(factor), factor[0].size)
    if second.ndim == 4:  # the places of a picture are the second factor's alone
        first = first[:, :, None, None]

    def added(weight: Array) -> Array:
        return np.asarray(np.kron(first, second).reshape(weight.shape) * scale)

    return adding(module, added, None if second.ndim == 3 else rank)


def hira_edits(found: ModuleTensors) -> Iterator[Edit]:
    """HiRA (openreview.net/forum?id=TwJrTz9cRS): the weight times a matrix of low rank."""
    embeds = "hira_embedding_A" in found.parts
    names = ("hira_embedding_A", "hira_embedding_B") if embeds else ("hira_A", "hira_B")
    a, b = (found.read(name) for name in names)
    factors = np.tensordot(b.reshape(len(b), -1), a, axes=1)
    if embeds:
        factors = factors.T
    yield adding(found.module, lambda weight: weight * _same(factors, weight))


def randlora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """RandLoRA (arXiv 2502.00987): scaled sums of random matrices that all modules share."""
    if not {"randlora_A", "randlora_B"} <= found.shared.keys():
        raise CheckpointError(
            "the checkpoint lacks RandLoRA's random matrices randlora_A and randlora_B",
            hint="save the adapter with save_projection=True",
        )
    rows, columns = (
        found.shared[name].astype(np.float64) for name in ("randlora_A", "randlora_B")
    )
    lambdas, gammas = found.read("randlora_lambda"), found.read("randlora_gamma")
    rank, count = lambdas.shape
    scale = number(found.config.get("randlora_alpha", 640), "randlora_alpha") / rank

    def added(weight: Array) -> Array:
        narrow, wide = sorted(weight.shape)
        down = lambdas[:, :, None] * rows[:, :, :narrow] * gammas[None]  # (r, count, narrow)
        up = columns[:wide, :count]  # (wide, count, r); PEFT pairs them as they lie
        update = up.reshape(wide, -1) @ down.reshape(-1, narrow)
        return np.asarray(scale * (update if narrow == weight.shape[1] else update.T))

    yield adding(found.module, added)


def shira_edits(found: ModuleTensors) -> Iterator[Edit]:
    """SHiRA (arXiv 2406.13175): single entries of the weight were trained."""
    values = found.read("shira_weight")
    rows, columns = found.parts["shira_indices"].astype(np.int64)

    def added(weight: Array) -> Array:
        if min(rows.min(), columns.min()) < 0:
            raise IndexError("a place before the first")
        sparse = np.zeros(weight.shape)
        np.add.at(sparse, (rows, columns), values)
        return sparse

    yield adding(found.module, added)


def c3a_edits(found: ModuleTensors) -> Iterator[Edit]:
    """C3A (arXiv 2407.19342): circulant blocks, each told by its first row."""
    kernel = found.read("c3a_kernel")
    size = kernel.shape[2]
    shifts = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size

    def added(weight: Array) -> Array:
        blocks = kernel[:, :, shifts].transpose(0, 2, 1, 3)
        return np.asarray(blocks.reshape(weight.shape) / weight.shape[1])

    yield adding(found.module, added)


def bat_edits(found: ModuleTensors) -> Iterator[Edit]:
    """MiSS with `init_weights="bat"`: blocks of the weight times blocks that were trained."""
    trained = found.read("miss_block")
    if trained.ndim != 3 or trained.shape[1] != trained.shape[2]:
        raise CheckpointError(
            f"module {found.module!r}: miss_block is {list(trained.shape)}, which is not that "
            "of MiSS with init_weights='bat'"
        )
    size = trained.shape[-1]

    def added(weight: Array) -> Array:
        makes, reads = weight.shape
        if len(trained) * size != makes:
            raise ValueError(f"{len(trained)} blocks of {size}")
        blocks = weight.reshape(makes // size, size, reads // size, size).transpose(2, 0, 1, 3)
        result = blocks @ trained + trained
        return np.asarray(result.transpose(1, 2, 0, 3).reshape(weight.shape))

    yield adding(found.module, added)


def glora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """GLoRA (arXiv 2306.07967): `W' = W + W A + B` by entries, `b' = b + b D + E + W C`."""

    def path(name: str) -> Array:
        """A product of two, a vector, a number, or the zeros of what was not trained."""
        if {f"{name}.Xd", f"{name}.Xu"} & found.parts.keys():
            return found.read(f"{name}.Xd") @ found.read(f"{name}.Xu")
        given = [part for part in (f"{name}.X", f"{name}.zeros") if part in found.parts]
        return found.read(given[0]) if given else np.zeros(1)

    a, b, c, d, e = (path(f"glora_{letter}") for letter in "ABCDE")

    def compute(weight: Array, bias: Array | None) -> Weighed:
        before = np.zeros(len(weight)) if bias is None else bias
        through = weight @ np.broadcast_to(c.reshape(-1), weight.shape[1:])
        after = before + before * d + e + through
        return weight + weight * a + b, after

    yield Reweight(found.module, compute)


def peanut_edits(found: ModuleTensors) -> Iterator[Edit]:
    """PEANuT (arXiv 2410.01870): what a small network makes of the weight is added."""
    name = found.config.get("act_fn", "relu")
    if name not in ACTIVATIONS:
        raise CheckpointError(f"PEANuT with the activation {name!r} is not supported")
    _, compute = ACTIVATIONS[name]
    first, last = found.read("peanut_A"), found.read("peanut_B")
    layers = [
        [found.read(f"peanut_{kind}.{i}") for kind in ("encoders", "decoders")]
        for i in range(sum(part.startswith("peanut_encoders") for part in found.parts))
    ]
    scale = number(found.config.get("scaling", 1.0), "scaling")

    def act(values: Array) -> Array:
        return compute(Bounded(values, np.zeros(1), ARITHMETIC["float64"])).value

    def added(weight: Array) -> Array:
        hidden, kept = act(weight.T @ first.T), []
        for encoder, _ in layers:
            kept.append(hidden)
            hidden = act(hidden @ encoder.T)
        for _, decoder in layers:
            hidden = act(hidden @ decoder.T) + kept.pop()
        return np.asarray(scale * (last @ hidden.T))

    yield adding(found.module, added, len(first))


def osf_edits(found: ModuleTensors) -> Iterator[Edit]:
    """OSF (arXiv 2504.07097): the small singular values and their vectors were trained."""
    u, s, v = (found.read(f"osf_svd_params.{name}") for name in ("U_low", "S_low", "V_low"))

    def added(weight: Array) -> Array:
        left, sizes, right = np.linalg.svd(weight, full_matrices=False)
        kept = len(sizes) - len(s)
        if not len(s) or (u.shape[0], v.shape[1]) != weight.shape:
            raise ValueError(f"{len(s)} singular values of {u.shape}")
        return np.asarray((u * s) @ v - (left[:, kept:] * sizes[kept:]) @ right[kept:])

    yield adding(found.module, added, 2 * len(s))


def _same(array: Array, weight: Array) -> Array:
    """An array that must have the shape of the weight."""
    if array.shape != weight.shape:
        raise ValueError(f"{array.shape} for {weight.shape}")
    return array
