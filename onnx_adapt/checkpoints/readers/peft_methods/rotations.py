"""Methods of PEFT that turn the weight: OFT, BOFT, HRA and RoAd.

An example. OFT with blocks of 4 turns the 64 inputs of a layer in 16 groups, each by a matrix
R of its own. A layer on turned inputs is a layer with a turned weight: W' = W R^T, group by
group. The turned weight of a convolution is that of its rows, `(out, in * kh * kw)`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, Reweight, Weighed
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_log = logging.getLogger(__name__)


def oft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """OFT (arXiv 2306.07280): groups of inputs, or of an embedding's outputs, are turned."""
    config = found.config
    if "oft_block_size" not in config:
        raise CheckpointError(
            "the adapter is OFT of PEFT 0.13 or older, which later versions do not load",
            hint="train it again with a newer PEFT",
        )
    embeds = "oft_embedding_R" in found.parts
    skew = _skew(found.read("oft_embedding_R" if embeds else "oft_R"))
    if config.get("coft"):
        most = number(config.get("eps", 6e-5), "eps") / math.sqrt(len(skew))
        norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew = np.where(norms <= most, skew, skew * (most / np.where(norms, norms, 1)))
    turns = _neumann(skew, found) if config.get("use_cayley_neumann", True) else cayley(skew)

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if math.prod(weight.shape[2:]) != 1:
            raise CheckpointError(
                f"module {found.module!r} is a convolution of {list(weight.shape[2:])}: "
                "PEFT's OFT adds overlapping patches of its input up, which no weight does",
                hint="train the adapter without this module, or merge it in PyTorch",
            )
        groups = weight.reshape(len(weight), -1, turns.shape[-1])
        if not config.get("block_share") and len(turns) != groups.shape[1]:
            raise ValueError(f"{len(turns)} blocks for {groups.shape[1]}")
        each = np.broadcast_to(turns, (groups.shape[1], *turns.shape[1:]))
        equation = "ogk,gkc->ogc" if embeds else "ogc,gkc->ogk"
        return np.einsum(equation, groups, each, optimize=True).reshape(weight.shape), bias

    yield Reweight(found.module, compute)


def _skew(upper: Array) -> Array:
    """Skew-symmetric matrices from their upper triangles, `(groups, entries)`."""
    size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
    matrices = np.zeros((len(upper), size, size))
    rows, columns = np.triu_indices(size, 1)
    matrices[:, rows, columns] = upper
    return matrices - matrices.transpose(0, 2, 1)


def cayley(skew: Array) -> Array:
    """Cayley's transform of skew-symmetric matrices, `(1 - Q) (1 + Q)^-1`: rotations."""
    unit = np.eye(skew.shape[-1])
    # x (1 + Q) = 1 - Q, transposed, because numpy solves from the left.
    solved = np.linalg.solve((unit + skew).swapaxes(-1, -2), (unit - skew).swapaxes(-1, -2))
    return solved.swapaxes(-1, -2)


def _neumann(skew: Array, found: ModuleTensors) -> Array:
    """Cayley's transform of -Q by its first terms, `1 + 2 Q + 2 Q^2 + ... + Q^n`."""
    terms = int(number(found.config.get("num_cayley_neumann_terms", 5), "terms"))
    if not 0 < terms < 1000:
        raise CheckpointError(f"num_cayley_neumann_terms={terms} is no number of terms")
    version = str(found.config.get("peft_version") or "0.0").split(".")
    if [int(n) if n.isdecimal() else 0 for n in version[:2]] < [0, 18]:
        _log.warning(
            "the adapter is of PEFT before 0.18, which computed OFT a little differently; it "
            "is read as PEFT 0.18 and later read it"
        )
    last = max(3, terms - 1) if terms > 2 else terms - 1
    result = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    power = skew
    for n in range(1, last + 1):
        result += power if n == last > 2 else 2 * power
        power = power @ skew
    return result


# BOFT multiplies several such rotations. From the second on, a group is half a group from the
# first half of a longer piece and half a group from its second half. For example 8 inputs in
# groups of 2 (half a group is one input), and 3 factors:
#
#     factor 0:                    (0 1) (2 3) (4 5) (6 7)
#     factor 1, pieces of 4:       (0 2) (1 3) (4 6) (5 7)
#     factor 2, a piece of 8:      (0 4) (1 5) (2 6) (3 7)


def boft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """BOFT (arXiv 2311.06243): products of rotations in groups; a scale for each output."""
    blocks = found.read("boft_R")
    factors, count, size, _ = blocks.shape
    turns = cayley(0.5 * (blocks - blocks.swapaxes(-1, -2)))
    scale = found.read("boft_s").reshape(-1, 1)

    def compute(weight: Array, bias: Array | None) -> Weighed:
        turned = weight.reshape(len(weight), -1).copy()
        for i in range(factors):
            order = np.arange(count * size)
            if i:
                order = order.reshape(count >> i, 2, -1, size // 2).swapaxes(1, 2).reshape(-1)
            groups = turned[:, order].reshape(len(turned), count, size)
            # y = W (x R): the columns of W are turned by R^T.
            result = np.einsum("ogc,gkc->ogk", groups, turns[i])
            turned[:, order] = result.reshape(turned.shape)
        return (turned * scale).reshape(weight.shape), bias

    yield Reweight(found.module, compute, is_even=True)


def hra_edits(found: ModuleTensors) -> Iterator[Edit]:
    """HRA (arXiv 2405.17484): the inputs are mirrored, once for each column of `hra_u`."""
    columns = found.read("hra_u")
    with np.errstate(all="ignore"):  # a column of zeros gives NaN, which is refused later
        mirrors = columns / np.linalg.norm(columns, axis=0)
        for i in range(1, mirrors.shape[1]) if found.config.get("apply_GS") else ():
            before = mirrors[:, :i]
            rest = columns[:, i] - before @ (before.T @ columns[:, i])
            mirrors[:, i] = rest / np.linalg.norm(rest)

    def compute(weight: Array, bias: Array | None) -> Weighed:
        turned = weight.reshape(len(weight), -1)
        for mirror in mirrors.T:
            turned = turned - 2 * np.outer(turned @ mirror, mirror)
        return turned.reshape(weight.shape), bias

    yield Reweight(found.module, compute, mirrors.shape[1], is_even=True)


def road_edits(found: ModuleTensors) -> Iterator[Edit]:
    """RoAd (arXiv 2409.00119): pairs of outputs are turned and scaled, with the bias.

    A group of 4 outputs has the pairs 0, 2 and 1, 3.
    """
    half = int(number(found.config.get("group_size", 64), "group_size")) // 2
    theta, alpha = found.read("road_theta"), found.read("road_alpha")
    match found.config.get("variant", "road_1"):
        case "road_1":  # one angle for both outputs of a pair
            theta, alpha = (np.tile(v.reshape(-1, 1, half), (1, 2, 1)) for v in (theta, alpha))
            cosines, sines = alpha * np.cos(theta), alpha * np.sin(theta)
        case "road_2":
            cosines, sines = alpha * np.cos(theta), alpha * np.sin(theta)
        case "road_4":
            theta, alpha = (v.reshape(-1, 2, 2 * half) for v in (theta, alpha))
            cosines, sines = (
                alpha[:, 0] * np.cos(theta[:, 0]),
                alpha[:, 1] * np.sin(theta[:, 1]),
            )
        case variant:
            raise CheckpointError(f"RoAd has no variant {variant!r}")
    cosines, sines = (v.reshape(-1, 2, half, 1) for v in (cosines, sines))

    def turned(outputs: Array) -> Array:
        pairs = outputs.reshape(-1, 2, half, math.prod(outputs.shape[1:]))
        crossed = np.stack([-pairs[:, 1], pairs[:, 0]], axis=1)
        return np.asarray((pairs * cosines + crossed * sines).reshape(outputs.shape))

    def compute(weight: Array, bias: Array | None) -> Weighed:
        if cosines.size != len(weight):
            raise ValueError(f"{cosines.size} angles")
        return turned(weight), None if bias is None else turned(bias)

    yield Reweight(found.module, compute)
