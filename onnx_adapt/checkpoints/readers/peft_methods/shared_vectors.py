"""VeRA, PVeRA, VB-LoRA, Uni-LoRA and TinyLoRA of PEFT: modules that share their numbers.

What all modules share has a key of its own in the file, such as `base_model.vera_A`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import BySize, Edit, LowRank, Reweight
from onnx_adapt.checkpoints.readers.peft_methods.sizes import smaller
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def vera_edits(found: ModuleTensors) -> Iterator[Edit]:
    """VeRA (arXiv 2310.11454): `diag(b) B diag(d) A`, where all modules share A and B."""
    _require_projections(found, "vera_A", "vera_B")
    a, b = (found.read_shared(name, None, None) for name in ("vera_A", "vera_B"))
    d = found.read("vera_lambda_d", len(a))
    yield _scaled_projections(found, a, b, d, found.read("vera_lambda_b", None))


def pvera_edits(found: ModuleTensors) -> Iterator[Edit]:
    """PVeRA: VeRA of twice the rank, whose first half is the mean that inference takes."""
    if found.config.get("sample_at_inference"):
        raise CheckpointError(
            "sample_at_inference=True is not supported: PEFT draws the update at random in "
            "every run",
            hint="set it to false in adapter_config.json for the mean of these updates",
        )
    _require_projections(found, "pvera_A", "pvera_B")
    a, b = (found.read_shared(name, None, None) for name in ("pvera_A", "pvera_B"))
    d = found.read("pvera_lambda_d", len(a))
    half = len(a) // 2
    vector = found.read("pvera_lambda_b", None)
    yield _scaled_projections(found, a[:half], b, d[:half], vector)


def _require_projections(found: ModuleTensors, *names: str) -> None:
    """Refuse a checkpoint that was saved without the matrices that all modules share."""
    if found.config.get("save_projection") is False and not set(names) <= found.shared.keys():
        raise CheckpointError(
            f"the checkpoint was saved with save_projection=False: {' and '.join(names)} are "
            "random numbers of PyTorch, and not in the file",
            hint="load it in PEFT, set save_projection=True in its configuration, save again",
        )


def _scaled_projections(
    found: ModuleTensors, a: Array, b: Array, d: Array, vector: Array
) -> BySize:
    """`diag(vector) b diag(d) a` with as much of the shared matrices as the module needs."""

    def make(inputs: int, outputs: int) -> LowRank | Reweight:
        if a.shape[1] < inputs or len(b) < outputs or len(vector) != outputs:
            raise CheckpointError(
                f"module {found.module!r}: shared matrices {list(a.shape)} and "
                f"{list(b.shape)} and a vector of {len(vector)} do not fit the base's weight "
                f"{[outputs, inputs]}",
                hint="is it an adapter for another size of this model?",
            )
        own_a, own_b = a[:, :inputs] * d[:, None], b[:outputs] * vector[:, None]
        return smaller(
            found.module,
            (len(d), outputs, inputs),
            lambda: LowRank(found.module, own_a, own_b, 1.0),
            lambda: own_b @ own_a,
        )

    return BySize(found.module, make)


def vblora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """VB-LoRA (arXiv 2405.15179): A and B are put together from vectors of a shared bank.

    Each piece of `length` numbers is a mix of the `topk` vectors with the highest logits. The
    logits of A are `(r, in / length, vectors)`, those of B `(out / length, r, vectors)`.
    """
    bank = found.read_shared("vblora_vector_bank", None, None)
    length = bank.shape[1]
    (of_a, shares_a), (of_b, shares_b) = (
        _shares(found, f"vblora_logits_{name}", len(bank)) for name in "AB"
    )

    def make(inputs: int, outputs: int) -> LowRank:
        rank, pieces = of_a.shape[:2]
        if (pieces * length, len(of_b) * length, of_b.shape[1]) != (inputs, outputs, rank):
            raise CheckpointError(
                f"module {found.module!r}: logits for {len(of_b)} x {pieces} pieces of "
                f"{length} numbers do not fit the base's weight {[outputs, inputs]}",
                hint="is it an adapter for another size of this model?",
            )
        a, b = _mixed(bank, of_a, shares_a), _mixed(bank, of_b, shares_b)
        b = np.swapaxes(b, 1, 2).reshape(outputs, rank)  # (out / length, r, length) before
        return LowRank(found.module, a.reshape(rank, inputs), b, 1.0)

    yield BySize(found.module, make)


def _mixed(bank: Array, chosen: Array, shares: Array) -> Array:
    """Mix vectors for each piece: `(n, m, topk)` choices become `(n, m, length)`."""
    mixed = np.zeros((*chosen.shape[:2], bank.shape[1]))
    for i in range(chosen.shape[2]):
        mixed += shares[..., i, None] * bank[chosen[..., i]]
    return mixed


def _shares(found: ModuleTensors, part: str, vectors: int) -> tuple[Array, Array]:
    """Which vectors each piece mixes, and how much of each: both `(n, m, topk)`."""
    if f"{part}_topk_indices" in found.parts:  # save_only_topk_weights
        chosen = found.read(f"{part}_topk_indices", None, None, None).astype(np.int64)
        n, m, topk = chosen.shape
        but_one = found.read(f"{part}_topk_weights", n, m, topk - 1)
        shares = np.concatenate([but_one, 1 - but_one.sum(-1, keepdims=True)], axis=-1)
    else:
        logits = found.read(part, None, None, vectors)
        topk = int(found.config["topk"])
        if not 0 < topk <= vectors:
            raise CheckpointError(f"topk={topk} of {vectors} vectors is no setting")
        chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :topk]
        best = np.take_along_axis(logits, chosen, axis=-1)
        shares = np.exp(best - best.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
    _check_indices(found, part, chosen, vectors)
    return chosen, shares


def unilora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """Uni-LoRA (arXiv 2506.00799): the numbers of A and B are of one vector, and scaled."""
    if found.config.get("save_indices") is False and "unilora_indices_A" not in found.parts:
        raise CheckpointError(
            "the checkpoint was saved with save_indices=False: which number goes where "
            "follows from the order of the modules in PyTorch, which the file does not have",
            hint="load it in PEFT, set save_indices=True in its configuration, save again",
        )
    a, b = (_picked(found, name) for name in "AB")
    yield LowRank(found.module, a, b, 1.0)


def _picked(found: ModuleTensors, name: str) -> Array:
    vector = found.read_shared("unilora_theta_d", None)
    indices = found.read(f"unilora_indices_{name}", None, None).astype(np.int64)
    _check_indices(found, f"unilora_indices_{name}", indices, len(vector))
    return vector[indices] * found.read(f"unilora_scales_{name}", *indices.shape)


def _check_indices(found: ModuleTensors, part: str, indices: Array, size: int) -> None:
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise CheckpointError(
            f"module {found.module!r}: {part} points outside of the {size} numbers or vectors "
            "that the modules share"
        )


def tinylora_edits(found: ModuleTensors) -> Iterator[Edit]:
    """TinyLoRA (arXiv 2602.04118): `B R A`, where R is a mix of fixed matrices P.

    A and B are the base's singular vectors, which are in the file. The vector that mixes is
    known where all modules share one. Else PEFT numbers the vectors by the order of the
    modules in PyTorch, which the file does not have.
    """
    vectors = [name for name in found.shared if name.startswith("tinylora_v.")]
    if len(vectors) != 1:
        raise CheckpointError(
            f"the checkpoint has {len(vectors)} vectors tinylora_v; which module has which "
            "follows from the order of the modules in PyTorch, which the file does not have",
            hint="train with weight_tying=1.0, or merge it in PyTorch and export again",
        )
    if "tinylora_P" not in found.parts:
        raise CheckpointError(
            f"module {found.module!r} has no tinylora_P: the checkpoint was saved with "
            "save_projection=False, and it is made of random numbers of PyTorch",
            hint="load it in PEFT, set save_projection=True in its configuration, save again",
        )
    mix = found.read_shared(vectors[0], None)
    a = found.read("tinylora_A", None, None)
    matrices = found.read("tinylora_P", len(mix), len(a), len(a))
    b = found.read("tinylora_B", None, len(a))
    yield LowRank(found.module, np.einsum("i,ijk->jk", mix, matrices) @ a, b, 1.0)
