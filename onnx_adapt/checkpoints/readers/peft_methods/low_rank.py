"""AdaLoRA, LoHa, DeLoRA, GraLoRA and MiSS of PEFT: updates of low rank, as LoRA's is.

Each function brings its method to LoRA's form, `y += scale * B (A x)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from onnx_adapt.checkpoints.edits import BySize, Edit, LowRank
from onnx_adapt.checkpoints.readers.peft_methods.sizes import smaller
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.peft_settings import alpha_of, check_rank
from onnx_adapt.checkpoints.readers.saved import number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def adalora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """AdaLoRA (arXiv 2303.10512): `alpha / (r + 1e-5) * B diag(E) A`.

    Training prunes the rank of each module, in some to nothing; `r` is the rank before that.
    """
    a = found.read("lora_A", None, None)
    rank = len(a)
    e = found.read("lora_E", rank, 1)
    b = found.read("lora_B", None, rank)
    if not rank and found.config.get("rank_pattern"):
        return
    first = number(found.config.get("init_r"), "init_r")
    if rank > first or (rank < first and not found.config.get("rank_pattern")):
        raise CheckpointError(
            f"module {found.module!r} has rank {rank}; the configuration says "
            f"init_r={first:g}, and names no pruned ranks"
        )
    alpha = number(found.config.get("lora_alpha", 8), "lora_alpha")
    scale = (alpha if alpha > 0 else rank) / (first + 1e-5)
    yield LowRank(found.module, a * e, b, scale, dilates=True)


def loha_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LoHa (arXiv 2108.06098): the product, element by element, of two updates of rank r."""
    (b1, a1), (b2, a2) = (hadamard_factor(found, number) for number in ("1", "2"))
    if len(b1) != len(b2) or a1.shape[1:] != a2.shape[1:]:
        raise CheckpointError(
            f"module {found.module!r}: the two updates that LoHa multiplies have the sizes "
            f"{[len(b1), *a1.shape[1:]]} and {[len(b2), *a2.shape[1:]]}"
        )
    rank = b1.shape[1]
    check_rank(found.module, rank, found.config)
    scale = alpha_of(found.module, found.config, "alpha") / rank

    def low_rank() -> LowRank:
        b, a = hadamard_product(b1, a1, b2, a2)
        return LowRank(found.module, a, b, scale, dilates=True)

    def change() -> Array:
        whole = (b @ a.reshape(len(a), -1) for b, a in ((b1, a1), (b2, a2)))
        return np.asarray(scale * np.multiply(*whole))

    sizes = rank * b2.shape[1], len(b1), int(np.prod(a1.shape[1:]))
    yield smaller(found.module, sizes, low_rank, change)


def hadamard_factor(found: ModuleTensors, number: str) -> tuple[Array, Array]:
    """One of LoHa's two updates, also for the files of LyCORIS.

    Returns:
        `(out, r)` and `(r, in)`; for a Conv2d the second is `(r, in, kh, kw)`, or in LyCORIS
        `(r, in * kh * kw)` too.
    """
    first, second = f"hada_w{number}_a", f"hada_w{number}_b"
    if "hada_t1" not in found.parts and "hada_t2" not in found.parts:
        left = found.read(first, None, None)
        return left, found.read(second, left.shape[1], None)
    kernel = found.read(f"hada_t{number}", None, None, None, None)
    rank = len(kernel)
    if kernel.shape[1] != rank:
        raise CheckpointError(
            f"module {found.module!r}: hada_t{number} has shape {list(kernel.shape)}; its "
            "first two sizes have to be the rank"
        )
    right = found.read(second, rank, None)
    return found.read(first, rank, None).T, tucker_kernel(found.module, kernel, right)


def tucker_kernel(module: str, core: Array, inputs: Array) -> Array:
    """The kernel of a convolution to r channels: `sum over j of core[i, j] * inputs[j]`.

    Args:
        module: The module.
        core: `(r, r, kh, kw)`: the core of a Tucker decomposition.
        inputs: `(r, in)`.

    Returns:
        `(r, in, kh, kw)`.

    Raises:
        CheckpointError: If it would be larger than any kernel is.
    """
    if core.size // max(1, len(core)) * inputs.shape[1] > _LARGEST_KERNEL:
        raise CheckpointError(
            f"module {module!r}: a kernel of {list(core.shape)} and {list(inputs.shape)} "
            "would be larger than any convolution's",
            hint="the file is damaged: download or save it again",
        )
    return np.asarray(np.einsum("ij...,jn->in...", core, inputs))


_LARGEST_KERNEL = 2**28
"""Numbers in the kernel of an update; those of Stable Diffusion have some millions."""


def hadamard_product(b1: Array, a1: Array, b2: Array, a2: Array) -> tuple[Array, Array]:
    """Factor `(b1 @ a1) * (b2 @ a2)` again: its rank is the product of theirs.

    The factors are Khatri-Rao products. With one row and `r = 2`,

        b1 = [p q]   b2 = [s t]   b = [ps pt qs qt]

    and `a` has the products of the rows of `a1` and `a2` in the same order.

    Args:
        b1: `(out, r1)`.
        a1: `(r1, in)`, or `(r1, in, kh, kw)`.
        b2: `(out, r2)`.
        a2: `(r2, in)`, or `(r2, in, kh, kw)`.

    Returns:
        `(out, r1 * r2)` and `(r1 * r2, in, ...)`.
    """
    rank = b1.shape[1] * b2.shape[1]
    b = (b1[:, :, None] * b2[:, None, :]).reshape(-1, rank)
    return b, (a1[:, None] * a2[None]).reshape(rank, *a1.shape[1:])


def delora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """DeLoRA (arXiv 2503.18225): directions of unit length, and one factor for all of them.

    `B diag(lambda / r / (|A_i| |B_i|)) A diag(norms of the base's columns)`; the file has the
    norms.
    """
    a = found.read("delora_A", None, None)
    rank, inputs = a.shape
    check_rank(found.module, rank, found.config)
    b = found.read("delora_B", None, rank)
    norms = found.read("delora_w_norm", inputs)
    lengths = [np.maximum(np.linalg.norm(x, axis=1), 1e-4) for x in (a, b.T)]
    factors = found.read("delora_lambda", 1) / rank / (lengths[0] * lengths[1])
    yield LowRank(found.module, a * norms, b * factors, 1.0)


def gralora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """GraLoRA (arXiv 2505.20355): a LoRA of its own for each of k * k blocks of the weight.

    `gralora_A` is `(k, in / k, r)`: r units for each block of inputs. `gralora_B` is
    `(k, r, out / k)`: each block of outputs reads `r / k` units of every block of inputs. With
    k = 2 and r = 4, input block 0 has the units a b c d and block 1 the units e f g h:

        output block 0 = a b e f times the rows of gralora_B[0]
        output block 1 = c d g h times the rows of gralora_B[1]
    """
    blocks, width, rank = found.read("gralora_A", None, None, None).shape
    first = found.read("gralora_A", blocks, width, rank)
    second = found.read("gralora_B", blocks, rank, None)
    check_rank(found.module, rank, found.config)
    if not blocks or rank % blocks:
        raise CheckpointError(
            f"module {found.module!r}: the rank {rank} of gralora_A cannot be cut into its "
            f"{blocks} blocks"
        )
    outputs, inputs = blocks * second.shape[2], blocks * width
    general = _general_part(found, outputs, inputs)
    hybrid = len(general[1])
    scale = number(found.config["alpha"], "alpha") / (rank + hybrid)

    def low_rank() -> LowRank:
        b, a = _scattered(first, second)
        both = np.concatenate([a, general[1]]), np.concatenate([b, general[0]], axis=1)
        return LowRank(found.module, *both, scale)

    def change() -> Array:
        units = first.reshape(blocks, width, blocks, -1)  # [n, :, m] goes from n to m
        rows = second.reshape(blocks, blocks, -1, second.shape[2])  # [m, n] as well
        by_block = np.einsum("nims,mnso->moni", units, rows, optimize=True)
        whole = by_block.reshape(outputs, inputs) + general[0] @ general[1]
        return np.asarray(scale * whole)

    sizes = blocks * rank + hybrid, outputs, inputs
    yield smaller(found.module, sizes, low_rank, change)


def _scattered(first: Array, second: Array) -> tuple[Array, Array]:
    """GraLoRA's blocks as B `(out, k * r)` and A `(k * r, in)`, zero between them."""
    blocks, width, rank = first.shape
    part, height = rank // blocks, second.shape[2]
    a = np.zeros((blocks, rank, blocks, width))
    b = np.zeros((blocks, height, blocks, rank))
    for n in range(blocks):
        a[n, :, n] = first[n].T
        for m in range(blocks):
            units = slice(m * part, (m + 1) * part)
            b[m, :, n, units] = second[m, n * part : (n + 1) * part].T
    return b.reshape(-1, blocks * rank), a.reshape(blocks * rank, -1)


def _general_part(found: ModuleTensors, outputs: int, inputs: int) -> tuple[Array, Array]:
    """The LoRA of the whole weight beside GraLoRA's blocks; of rank 0 without one."""
    b, a = np.zeros((outputs, 0)), np.zeros((0, inputs))
    if {"gralora_A_general", "gralora_B_general"} & found.parts.keys():
        a = found.read("gralora_A_general", None, inputs)
        b = found.read("gralora_B_general", outputs, len(a))
    if found.config.get("hybrid_r", len(a)) != len(a):
        raise CheckpointError(
            f"module {found.module!r} has a general rank of {len(a)}; the configuration says "
            f"hybrid_r={found.config['hybrid_r']}"
        )
    return b, a


def miss_edits(found: ModuleTensors) -> Iterator[Edit]:
    """MiSS (arXiv 2409.15371): the input is summed in groups of r, then multiplied.

    `miss_block` is `(r, out)`, and A is fixed: row `i` has ones at `i`, `i + r`, `i + 2r` and
    so on. With `init_weights="mini"` the block is `(r, mini_r)`, repeated along the outputs.
    """
    block = found.read("miss_block", None, None)
    rank, columns = block.shape
    check_rank(found.module, rank, found.config)
    mini = found.config.get("init_weights") == "mini"

    def make(inputs: int, outputs: int) -> LowRank:
        if rank > inputs or (mini and outputs % columns):
            raise CheckpointError(
                f"module {found.module!r}: miss_block {list(block.shape)} does not fit the "
                f"base's weight {[outputs, inputs]}"
            )
        a = np.arange(inputs) % rank == np.arange(rank)[:, None]
        b = np.tile(block.T, (outputs // columns if mini else 1, 1))
        return LowRank(found.module, a.astype(np.float64), b, 1.0)

    yield BySize(found.module, make)


def bone_edits(found: ModuleTensors) -> Iterator[Edit]:
    """Bone, which is what older releases of PEFT call MiSS."""
    yield from miss_edits(replace(found, parts={"miss_block": found.parts["bone_block"]}))
