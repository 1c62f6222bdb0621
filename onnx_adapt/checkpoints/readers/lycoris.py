"""The methods of LyCORIS and sd-scripts: what the tensors of one module ask for.

The formulas are those of LyCORIS 4.1 (https://github.com/KohakuBlueleaf/LyCORIS), which wrote
most of these files. `alpha / rank` scales all but the rotations and full differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods.low_rank import hadamard_factor
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import number, refuse_rank_zero
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_EPS = float(np.finfo(np.float32).eps)
"""What LyCORIS adds to the norms of DoRA."""


@dataclass(frozen=True, slots=True)
class Method:
    """How one kind of tensors is read.

    Attributes:
        label: What the method is called.
        marks: A module with one of these tensors is of this method.
        others: The names of its other tensors.
        edits: What the tensors of one module ask for.
    """

    label: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    edits: Callable[[ModuleTensors], Iterator[Edit]]


def module_edits(found: ModuleTensors) -> Iterator[Edit]:
    """What the tensors of one module ask for.

    Raises:
        CheckpointError: If they are of no known method, of two, or incomplete.
    """
    names = found.parts.keys()
    method = next((m for m in METHODS if names & set(m.marks)), None)
    if "reshape_weight" in names:
        raise CheckpointError(
            f"module {found.module!r} has reshape_weight: the adapter is for a base whose "
            "layer was made larger first",
            hint="export the model with the enlarged layer, and take reshape_weight out",
        )
    if method is None:
        raise CheckpointError(
            f"module {found.module!r} has {', '.join(names)}, which is of no known method",
            hint=f"{', '.join(m.label for m in METHODS)} are read",
        )
    if other := names - {*method.marks, *method.others}:
        raise CheckpointError(
            f"module {found.module!r} is of {method.label}, and has {', '.join(other)} as "
            "well, which is of another method"
        )
    yield from method.edits(found)


def _scale(found: ModuleTensors, rank: int) -> float:
    """Alpha over the rank; without an alpha it is the rank."""
    refuse_rank_zero(found.module, rank)
    if "alpha" not in found.parts:
        return 1.0
    value = found.parts["alpha"]
    if value.size != 1:
        raise CheckpointError(f"module {found.module!r}: alpha has shape {list(value.shape)}")
    return number(float(value.reshape(-1)[0]), f"alpha of {found.module!r}") / rank


def _matrices(found: ModuleTensors, *names: str) -> list[Array]:
    """Tensors in float64, each with at least two axes."""
    for name in names:
        if name not in found.parts or found.parts[name].ndim < 2:
            shape = list(found.parts[name].shape) if name in found.parts else "not there"
            raise CheckpointError(
                f"module {found.module!r}: {name} is {shape}; it has to be a matrix",
                hint="the file is incomplete: download or save it again",
            )
    return [found.parts[name].astype(np.float64) for name in names]


def _lora(found: ModuleTensors) -> Iterator[Edit]:
    """LoRA and LoCon; `lora_mid` is the core of a Tucker decomposition of a convolution.

    The update is `up @ core`, where `core[m] = sum over n of mid[m, n] * down[n]` is the
    kernel of a convolution to r channels.
    """
    a, b = _matrices(found, "lora_down", "lora_up")
    if "lora_mid" in found.parts:
        (mid,) = _matrices(found, "lora_mid")
        if mid.shape[:2] != (len(a), len(a)) or a[0].size != a.shape[1]:
            raise CheckpointError(
                f"module {found.module!r}: lora_mid {list(mid.shape)} does not fit lora_down "
                f"{list(a.shape)}"
            )
        a = np.einsum("mn...,nj->mj...", mid, a.reshape(len(a), -1))
    scale = _scale(found, len(a))
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


def _loha(found: ModuleTensors) -> Iterator[Edit]:
    """LoHa: the product of two low-rank updates, number by number; its rank is r * r."""
    factors = [hadamard_factor(found, number) for number in "12"]
    first, second = (up @ down.reshape(len(down), -1) for up, down in factors)
    if first.shape != second.shape:
        raise CheckpointError(
            f"module {found.module!r}: the two updates to multiply have the sizes "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    rank = len(found.parts["hada_w1_b"])
    yield _dense(found, _scale(found, rank) * first * second, rank**2)


def _lokr(found: ModuleTensors) -> Iterator[Edit]:
    """LoKr: a Kronecker product of two matrices, each whole or of two factors.

    The kernel of a convolution is in the second one.
    """
    first, rank1 = _kronecker_factor(found, "lokr_w1")
    second, rank2 = _kronecker_factor(found, "lokr_w2")
    scale = _scale(found, rank2 or rank1) if rank1 or rank2 else 1.0
    change = np.kron(first, second.reshape(len(second), -1))
    ranks = (r or min(w.shape[0], w[0].size) for r, w in ((rank1, first), (rank2, second)))
    yield _dense(found, scale * change, int(np.prod(list(ranks))))


def _kronecker_factor(found: ModuleTensors, name: str) -> tuple[Array, int]:
    """One factor of LoKr, and its rank; 0 if it is a whole matrix."""
    if name in found.parts:
        return _matrices(found, name)[0], 0
    up, down = _matrices(found, f"{name}_a", f"{name}_b")
    core = f"lokr_t{name[-1]}"
    if core not in found.parts:
        return up @ down, len(down)
    (kernel,) = _matrices(found, core)
    return np.einsum("ij...,ip,jr->pr...", kernel, up, down), len(down)


def _full(found: ModuleTensors) -> Iterator[Edit]:
    """The whole difference of the weight, the bias, or both."""
    weight, bias = (
        found.parts[name].astype(np.float64) if name in found.parts else None
        for name in ("diff", "diff_b")
    )
    yield _added_to_base(found, weight, bias)


def _norm(found: ModuleTensors) -> Iterator[Edit]:
    """The difference of the weight and bias of a normalisation."""
    weight, bias = (found.parts.get(name) for name in ("w_norm", "b_norm"))
    yield _added_to_base(found, weight, bias)


def _set(found: ModuleTensors) -> Iterator[Edit]:
    """A weight that replaces the base's."""
    yield Replacement(found.module, "weight", found.parts["set_weight"])


def _oft(found: ModuleTensors) -> Iterator[Edit]:
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
    rotations = _cayley(blocks, _scale(found, 1) * outputs if "alpha" in found.parts else 0)
    factors = found.parts.get("rescale")

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if len(weight) != outputs:
            raise _misfit(found, list(blocks.shape), weight)
        if rotations.ndim == 3:
            cut = weight.reshape(*rotations.shape[:2], -1)
            turned = np.einsum("knm,knx->kmx", rotations, cut)
        else:
            turned = _butterfly(rotations, weight.reshape(len(weight), -1))
        turned = turned.reshape(weight.shape)
        if factors is not None:
            turned = turned * factors.reshape(-1, *(1,) * (weight.ndim - 1))
        return turned, bias

    yield Reweight(found.module, compute)


def _cayley(blocks: Array, limit: float) -> Array:
    q = blocks - blocks.swapaxes(-1, -2)
    length = np.linalg.norm(q) + 1e-8
    if 0 < limit < length:
        q = q * limit / length
    eye = np.eye(blocks.shape[-1])
    return np.asarray((eye + q) @ np.linalg.inv(eye - q))


def _butterfly(rotations: Array, weight: Array) -> Array:
    """Rotate the rows of a weight, `(out, x)`, stage by stage."""
    width = weight.shape[1]
    for i, stage in enumerate(rotations):
        apart = 2**i * stage.shape[-1] // 2
        rows = weight.reshape(-1, 2, apart, width).swapaxes(1, 2)
        turned = np.einsum("bij,bjx->bix", stage, rows.reshape(*stage.shape[:2], width))
        weight = turned.reshape(-1, apart, 2, width).swapaxes(1, 2).reshape(-1, width)
    return weight


def _glora(found: ModuleTensors) -> Iterator[Edit]:
    """GLoRA: `W' = W + scale * (W a1 a2 + b1 b2)`; a1 a2 mixes channels."""
    a1, a2, b1, b2 = (m.reshape(len(m), -1) for m in _matrices(found, "a1", "a2", "b1", "b2"))
    scale = _scale(found, len(a2))

    def compute(weight: Array, bias: Array | None) -> Weighed:
        inside = np.einsum("oi...,ij->oj...", weight, a1 @ a2)
        return weight + scale * (inside + (b1 @ b2).reshape(weight.shape)), bias

    yield Reweight(found.module, compute)


def _ia3(found: ModuleTensors) -> Iterator[Edit]:
    """IA3 of LyCORIS: `W' = W (1 + v)`, by input or by output."""
    factors = 1 + found.parts["weight"].astype(np.float64).reshape(-1)
    on_input = bool(found.parts["on_input"].reshape(-1)[0])

    def compute(weight: Array, bias: Array | None) -> Weighed:
        shape = [1] * weight.ndim
        shape[on_input] = -1
        if weight.shape[on_input] != factors.size:
            raise _misfit(found, [factors.size], weight)
        return weight * factors.reshape(shape), bias

    yield Reweight(found.module, compute)


def _dense(found: ModuleTensors, change: Array, rank: int) -> Reweight:
    """A change of the whole weight, with DoRA's rescaling if the module has one.

    DoRA of sd-scripts and LyCORIS has a magnitude for each output, `(out, 1)`, or for each
    input, `(1, in)`; PEFT's is always by output.
    """
    magnitude = found.parts.get("dora_scale")

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if change.size != weight.size or len(change) != len(weight):
            raise _misfit(found, list(change.shape), weight)
        trained = weight + change.reshape(weight.shape)
        if magnitude is None:
            return trained, bias
        axis = int(magnitude.shape[0] == 1 and magnitude.size > 1)
        if magnitude.size != weight.shape[axis]:
            raise _misfit(found, list(magnitude.shape), weight)
        others = tuple(i for i in range(weight.ndim) if i != axis)
        norm = np.sqrt((trained**2).sum(axis=others, keepdims=True)) + _EPS
        return trained * magnitude.astype(np.float64).reshape(norm.shape) / norm, bias

    return Reweight(found.module, compute, None if magnitude is not None else rank)


def _added_to_base(found: ModuleTensors, weight: Array | None, bias: Array | None) -> Reweight:
    def compute(base: Array, base_bias: Array | None) -> Weighed:
        if weight is not None and weight.size != base.size:
            raise _misfit(found, list(weight.shape), base)
        trained = base if weight is None else base + weight.reshape(base.shape)
        if bias is None:
            return trained, base_bias
        return trained, bias.reshape(-1) + (0 if base_bias is None else base_bias)

    return Reweight(found.module, compute)


def _misfit(found: ModuleTensors, shape: list[int], weight: Array) -> CheckpointError:
    return CheckpointError(
        f"module {found.module!r}: an update {shape} does not fit the base's weight "
        f"{list(weight.shape)}",
        hint="is it an adapter for another size of this model?",
    )


METHODS = (
    Method(
        "LoRA",
        ("lora_down", "lora_up"),
        ("lora_mid", "lora_up.bias", "alpha", "dora_scale", "diff_b"),
        _lora,
    ),
    Method(
        "LoHa",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("hada_t1", "hada_t2", "alpha", "dora_scale"),
        _loha,
    ),
    Method(
        "LoKr",
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_t2", "alpha", "dora_scale"),
        _lokr,
    ),
    Method("OFT", ("oft_blocks",), ("rescale", "alpha"), _oft),
    Method("GLoRA", ("a1", "a2", "b1", "b2"), ("alpha",), _glora),
    Method("IA3", ("on_input",), ("weight",), _ia3),
    Method("a trained normalisation", ("w_norm", "b_norm"), (), _norm),
    Method("a replaced weight", ("set_weight",), (), _set),
    Method("a full difference", ("diff", "diff_b"), (), _full),
)
"""The methods; the first that a module has a mark of is its method."""
