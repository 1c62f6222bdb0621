"""Methods of PEFT as low-rank updates: what is read computes what the method's formula does.

The formulas are those of the forward pass of PEFT 0.21.2, in float64, on random tensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_cases import CASES, ROOT, run

import onnx_adapt as oa
from onnx_adapt.checkpoints.edits import BySize, Edit, LowRank, Replacement, Reweight
from onnx_adapt.checkpoints.readers.peft_methods.table import METHODS, REFUSED_METHODS
from onnx_adapt.checkpoints.readers.peft_methods.virtual_tokens import VIRTUAL_TOKENS
from onnx_adapt.checkpoints.readers.saved import Saved
from onnx_adapt.checkpoints.readers.table import read_edits
from onnx_adapt.errors import CheckpointError

Tensors = dict[str, np.ndarray]
MODULE = "layers.0.proj"

PEFT_TYPES = [
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "LORA",
    "ADALORA",
    "ADAMSS",
    "BOFT",
    "ADAPTION_PROMPT",
    "IA3",
    "BEFT",
    "LILY",
    "LOHA",
    "LOKR",
    "OFT",
    "POLY",
    "LN_TUNING",
    "VERA",
    "FROD",
    "PVERA",
    "FOURIERFT",
    "GLORA",
    "XLORA",
    "HRA",
    "VBLORA",
    "UNILORA",
    "CPT",
    "MISS",
    "RANDLORA",
    "ROAD",
    "TRAINABLE_TOKENS",
    "HIRA",
    "SHIRA",
    "C3A",
    "WAVEFT",
    "OSF",
    "DELORA",
    "GRALORA",
    "CARTRIDGE",
    "TINYLORA",
    "PSOFT",
    "PEANUT",
    "SHADOW",
    "SUPERTUNING",
    "DEFT",
]
"""The values of PeftType in PEFT 0.21.2."""


def test_every_method_of_peft_is_read_or_refused_by_name() -> None:
    assert len(PEFT_TYPES) == 45
    read = METHODS.keys() | VIRTUAL_TOKENS.keys()
    assert set(PEFT_TYPES) <= read | REFUSED_METHODS.keys()
    assert not read & REFUSED_METHODS.keys()


@pytest.mark.parametrize("kind", sorted(REFUSED_METHODS))
def test_a_refused_method_is_refused_with_its_reason(kind: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_edits(Saved(Path("trained"), "peft", {"peft_type": kind}, {}))
    assert kind in caught.value.message
    assert REFUSED_METHODS[kind] in caught.value.message


def edits_of(kind: str, tensors: Tensors, shared: Tensors | None = None, **config: Any) -> Any:
    """What a checkpoint of one module asks for."""
    keys = {f"base_model.model.{MODULE}.{part}": value for part, value in tensors.items()}
    keys |= {f"base_model.{name}": value for name, value in (shared or {}).items()}
    return read_edits(Saved(Path("trained"), "peft", {"peft_type": kind, **config}, keys))


def trained(edit: Edit, weight: np.ndarray, bias: np.ndarray | None = None) -> Any:
    """The weight and bias of a Linear with one edit on it."""
    if isinstance(edit, BySize):
        edit = edit.make(weight.shape[1], weight.shape[0])
    if isinstance(edit, Reweight):
        return edit.compute(weight, bias)
    assert isinstance(edit, LowRank)
    change = edit.b.reshape(len(edit.b), -1) @ edit.a.reshape(len(edit.a), -1)
    added = None if edit.bias is None else edit.scale * edit.bias
    return weight + edit.scale * change.reshape(weight.shape), added


class Draws:
    """Random tensors and sizes of one example."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def size(self, least: int = 1, most: int = 6) -> int:
        return self.data.draw(st.integers(least, most))

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape)


Example = tuple[list[Edit], np.ndarray, np.ndarray]
"""The edits, the base's weight, and what the method adds to the output for the unit inputs."""


def adalora(draw: Draws) -> Example:
    r, n, m, pruned = draw.size(), draw.size(), draw.size(), draw.size(0, 2)
    a, e, b = draw.normal(r, n), draw.normal(r, 1), draw.normal(m, r)
    alpha = draw.size(0, 9)
    config = {"init_r": r + pruned, "lora_alpha": alpha, "rank_pattern": {"x": [True]}}
    x = np.eye(n)
    scaling = alpha if alpha > 0 else r
    expected = (x @ (a * e).T @ b.T) * scaling / (r + pruned + 1e-5)
    tensors = {"lora_A": a, "lora_E": e, "lora_B": b}
    return edits_of("ADALORA", tensors, **config), draw.normal(m, n), expected


def loha(draw: Draws) -> Example:
    r, n, m, alpha = draw.size(most=4), draw.size(), draw.size(most=20), draw.size()
    w1a, w1b, w2a, w2b = (draw.normal(*s) for s in ((m, r), (r, n), (m, r), (r, n)))
    tensors = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    delta = ((w1a @ w1b) * (w2a @ w2b)) * (alpha / r)
    config = {"r": r, "alpha": alpha}
    return edits_of("LOHA", tensors, **config), draw.normal(m, n), np.eye(n) @ delta.T


def loha_of_a_convolution(draw: Draws) -> Example:
    r, n, m, kernel = draw.size(most=3), draw.size(), draw.size(most=9), (draw.size(), 3)
    t1, t2 = draw.normal(r, r, *kernel), draw.normal(r, r, *kernel)
    w1a, w1b, w2a, w2b = (draw.normal(r, size) for size in (m, n, m, n))
    first = np.einsum("ijkl,jr,ip->prkl", t1, w1b, w1a)
    second = np.einsum("ijkl,jr,ip->prkl", t2, w2b, w2a)
    tensors = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b}
    tensors |= {"hada_t1": t1, "hada_t2": t2}
    edits = edits_of("LOHA", tensors, r=r, alpha=3)
    return edits, draw.normal(m, n, *kernel), first * second * (3 / r)


def vera(draw: Draws) -> Example:
    r, n, m = draw.size(), draw.size(), draw.size()
    a, b = draw.normal(r, n + draw.size(0, 3)), draw.normal(m + draw.size(0, 3), r)
    d, vector = draw.normal(r), draw.normal(m)
    expected = vector * ((d * (np.eye(n) @ a[:, :n].T)) @ b[:m].T)
    tensors = {"vera_lambda_d": d, "vera_lambda_b": vector}
    edits = edits_of("VERA", tensors, {"vera_A": a, "vera_B": b}, save_projection=True)
    return edits, draw.normal(m, n), expected


def pvera(draw: Draws) -> Example:
    r, n, m = draw.size(), draw.size(), draw.size()
    a, b = draw.normal(2 * r, n + draw.size(0, 3)), draw.normal(m + draw.size(0, 3), r)
    d, vector = draw.normal(2 * r), draw.normal(m)
    mean, _ = np.split(d * (np.eye(n) @ a[:, :n].T), 2, axis=-1)
    tensors = {"pvera_lambda_d": d, "pvera_lambda_b": vector}
    edits = edits_of("PVERA", tensors, {"pvera_A": a, "pvera_B": b})
    return edits, draw.normal(m, n), vector * (mean @ b[:m].T)


def miss(draw: Draws) -> Example:
    r, m = draw.size(), draw.size()
    n = r + draw.size(0, 9)
    block = draw.normal(r, m)
    padded = np.pad(np.eye(n), [(0, 0), (0, -n % r)])
    expected = padded.reshape(n, -1, r).sum(axis=-2) @ block
    kind, part = draw.data.draw(st.sampled_from([("MISS", "miss"), ("BONE", "bone")]))
    edits = edits_of(kind, {f"{part}_block": block}, init_weights=True)
    return edits, np.ones((m, n)), expected


def mini_miss(draw: Draws) -> Example:
    r, mini, times = draw.size(), draw.size(), draw.size()
    n, m = 2 * r, mini * times
    block = draw.normal(r, mini)
    expected = np.eye(n).reshape(n, -1, r).sum(axis=-2) @ np.tile(block, (1, times))
    edits = edits_of("MISS", {"miss_block": block}, init_weights="mini", mini_r=mini)
    return edits, np.ones((m, n)), expected


def _bank(draw: Draws) -> tuple[Tensors, np.ndarray, int]:
    r, tiles, vectors, length = draw.size(), draw.size(), draw.size(2, 9), draw.size()
    tensors = {
        "vblora_logits_A": draw.normal(r, tiles, vectors),
        "vblora_logits_B": draw.normal(draw.size(), r, vectors),
    }
    return tensors, draw.normal(vectors, length), draw.size(1, vectors)


def _chosen(logits: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the highest logits, and their softmax."""
    places = np.argsort(logits, axis=-1)[..., ::-1][..., :topk]
    powers = np.exp(np.take_along_axis(logits, places, -1))
    return places, powers / powers.sum(-1, keepdims=True)


def _of_bank(tensors: Tensors, bank: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = []
    for logits in tensors.values():
        places, shares = _chosen(logits, topk)
        pieces.append((shares[..., None] * bank[places]).sum(-2))
    a, b = pieces
    a = a.reshape(len(a), -1)
    b = b.transpose(0, 2, 1).reshape(-1, b.shape[1])
    return np.zeros((len(b), a.shape[1])), np.eye(a.shape[1]) @ a.T @ b.T


def vblora(draw: Draws) -> Example:
    tensors, bank, topk = _bank(draw)
    edits = edits_of("VBLORA", tensors, {"vblora_vector_bank": bank}, topk=topk)
    return edits, *_of_bank(tensors, bank, topk)


def vblora_of_top_weights(draw: Draws) -> Example:
    tensors, bank, topk = _bank(draw)
    saved = {}
    for part, logits in tensors.items():
        places, shares = _chosen(logits, topk)
        saved |= {f"{part}_topk_indices": places.astype(np.uint8)}
        saved |= {f"{part}_topk_weights": shares[..., :-1]}
    edits = edits_of("VBLORA", saved, {"vblora_vector_bank": bank}, topk=topk)
    return edits, *_of_bank(tensors, bank, topk)


def delora(draw: Draws) -> Example:
    r, n, m = draw.size(), draw.size(), draw.size()
    a, b, factor = draw.normal(r, n), draw.normal(m, r), draw.normal(1)
    norms = np.abs(draw.normal(n))
    lengths = np.linalg.norm(a, axis=1).clip(1e-4) * np.linalg.norm(b, axis=0).clip(1e-4)
    expected = ((np.eye(n) * norms) @ a.T * (factor / r / lengths)) @ b.T
    tensors = {"delora_A": a, "delora_B": b, "delora_lambda": factor, "delora_w_norm": norms}
    return edits_of("DELORA", tensors, r=r), draw.normal(m, n), expected


def gralora(draw: Draws) -> Example:
    k, s, hybrid, alpha = draw.size(most=3), draw.size(most=3), draw.size(0, 2), draw.size()
    r, n, m = k * s, k * draw.size(), k * draw.size()
    a, b = draw.normal(k, n // k, r), draw.normal(k, r, m // k)
    x = np.eye(n)[:, None]
    units = np.einsum("blni,nir->blnr", x.reshape(n, 1, k, n // k), a)
    mixed = units.reshape(n, 1, k, k, s).transpose(0, 1, 3, 2, 4).reshape(n, 1, k, r)
    expected = np.einsum("bljr,jro->bljo", mixed, b).reshape(n, m)
    tensors = {"gralora_A": a, "gralora_B": b}
    if hybrid:
        general = draw.normal(hybrid, n), draw.normal(m, hybrid)
        expected = expected + x[:, 0] @ general[0].T @ general[1].T
        tensors |= {"gralora_A_general.weight": general[0]}
        tensors |= {"gralora_B_general.weight": general[1]}
    config = {"r": r, "alpha": alpha, "hybrid_r": hybrid, "gralora_k": k}
    edits = edits_of("GRALORA", tensors, **config)
    return edits, draw.normal(m, n), expected * (alpha / (r + hybrid))


def unilora(draw: Draws) -> Example:
    r, n, m, length = draw.size(), draw.size(), draw.size(), draw.size()
    vector = draw.normal(length)
    places = [draw.rng.integers(0, length, shape) for shape in ((r, n), (m, r))]
    scales = [draw.normal(*place.shape) for place in places]
    a, b = (vector[place] * scale for place, scale in zip(places, scales, strict=True))
    tensors = {
        "unilora_indices_A": places[0],
        "unilora_indices_B": places[1],
        "unilora_scales_A": scales[0],
        "unilora_scales_B": scales[1],
    }
    edits = edits_of("UNILORA", tensors, {"unilora_theta_d": vector})
    return edits, draw.normal(m, n), np.eye(n) @ a.T @ b.T


def tinylora(draw: Draws) -> Example:
    r, u, n, m = draw.size(), draw.size(), draw.size(), draw.size()
    a, b, p, v = draw.normal(r, n), draw.normal(m, r), draw.normal(u, r, r), draw.normal(u)
    mixed = np.einsum("i,ijk->jk", v, p)
    tensors = {"tinylora_A": a, "tinylora_B": b, "tinylora_P": p}
    edits = edits_of("TINYLORA", tensors, {"tinylora_v.0": v})
    return edits, draw.normal(m, n), np.eye(n) @ a.T @ mixed.T @ b.T


def deft(draw: Draws) -> Example:
    r, n, extra, alpha = draw.size(), draw.size(), draw.size(0), draw.size(0)
    m, method, para = r + extra, draw.data.draw(st.sampled_from(["qr", "relu"])), extra % 2
    p, weight = draw.normal(m, r), draw.normal(m, n)
    tensors = {"deft_P": p} if para else {"deft_P": p, "deft_R": draw.normal(r, n)}
    config = {"decomposition_method": method, "para": bool(para), "alpha": alpha or None}
    q = np.linalg.qr(p)[0] if method == "qr" else p
    right = q if method == "qr" else np.maximum(p, 0)
    delta = -(q @ right.T @ weight)
    if not para:
        delta = delta + q @ (tensors["deft_R"] * (alpha / r if alpha else 1))
    return edits_of("DEFT", tensors, **config), weight, delta.T


def supertuning(draw: Draws) -> Example:
    n, m, r = draw.size(), draw.size(), draw.size(0, 2)
    count = draw.data.draw(st.integers(1, n * m))
    places = draw.rng.permutation(n * m)[:count].astype(np.int32)
    values = draw.normal(count)
    delta = np.zeros(n * m)
    np.add.at(delta, places, values)
    delta = delta.reshape(m, n)
    tensors = {"supertuning_values": values, "supertuning_indices": places}
    if r:
        a, b = draw.normal(r, n), draw.normal(m, r)
        delta = delta + (3 / r) * (b @ a)
        tensors |= {"supertuning_lora_A.weight": a, "supertuning_lora_B.weight": b}
    config = {"r": r or None, "lora_alpha": 3}
    return edits_of("SUPERTUNING", tensors, **config), draw.normal(m, n), delta.T


def _lora(draw: Draws, r: int, n: int, m: int) -> Tensors:
    return {"lora_A.weight": draw.normal(r, n), "lora_B.weight": draw.normal(m, r)}


def qalora(draw: Draws) -> Example:
    r, pools, group, m = draw.size(), draw.size(), draw.size(2), draw.size()
    n = pools * group
    tensors = _lora(draw, r, pools, m)
    pooled = np.eye(n).reshape(n, pools, group).mean(axis=2) * pools
    a, b = tensors.values()
    config = {"r": r, "lora_alpha": 3, "use_qalora": True, "qalora_group_size": group}
    return edits_of("LORA", tensors, **config), np.ones((m, n)), pooled @ a.T @ b.T * (3 / r)


def bdlora(draw: Draws) -> Example:
    blocks, rows, columns, other = draw.size(), draw.size(), draw.size(), draw.size()
    stacked = draw.normal(blocks * rows, columns)

    def by_block(x: np.ndarray) -> np.ndarray:
        cut = x.reshape(len(x), blocks, columns), stacked.reshape(blocks, rows, columns)
        return np.einsum("bim,inm->bin", *cut).reshape(len(x), -1)

    if on_a := draw.data.draw(st.booleans()):
        r, n, m = blocks * rows, blocks * columns, other
        tensors = {"lora_A.weight": stacked, "lora_B.weight": draw.normal(m, r)}
        expected = by_block(np.eye(n)) @ tensors["lora_B.weight"].T
    else:
        r, n, m = blocks * columns, other, blocks * rows
        tensors = {"lora_A.weight": draw.normal(r, n), "lora_B.weight": stacked}
        expected = by_block(tensors["lora_A.weight"].T)
    config = {"target_modules_bd_" + ("a" if on_a else "b"): ["proj"], "nblocks": blocks}
    edits = edits_of("LORA", tensors, r=r, lora_alpha=2 * r, use_bdlora=config)
    return edits, draw.normal(m, n), 2 * expected


def kasa(draw: Draws) -> Example:
    r, n, m = draw.size(), draw.size(8, 9), draw.size(8, 9)
    tensors, weight, diagonal = _lora(draw, r, n, m), draw.normal(m, n), draw.normal(r)
    a, b = tensors.values()
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    truncated = (u[:, : len(s) - r] * s[: len(s) - r]) @ v[: len(s) - r]
    trained_weight = truncated + (b * diagonal) @ a * (3 / r)
    config = {"r": r, "lora_alpha": 3, "kasa_config": {"beta": 1e-4}}
    edits = edits_of("LORA", {**tensors, "lora_diag": diagonal}, **config)
    return edits, weight, (trained_weight - weight).T


def residual(draw: Draws) -> Example:
    r, n, m = draw.size(), draw.size(6, 9), draw.size(6, 9)
    start = draw.data.draw(st.sampled_from(["pissa", "olora"]))
    tensors, weight, scaling = _lora(draw, r, n, m), draw.normal(m, n), 3 / r
    a, b = tensors.values()
    if start == "olora":
        q, right = np.linalg.qr(weight)
        first_a, first_b = right[:r], q[:, :r]
    else:
        v, s, u = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(s[:r] / scaling)
        first_a, first_b = np.diag(root) @ u[:r], v[:, :r] @ np.diag(root)
    delta = scaling * (b @ a - first_b @ first_a)
    config = {"r": r, "lora_alpha": 3, "init_lora_weights": start}
    return edits_of("LORA", tensors, **config), weight, delta.T


FORMULAS: list[Callable[[Draws], Example]] = [
    *(adalora, loha, vera, pvera, miss, mini_miss, vblora, vblora_of_top_weights),
    *(delora, gralora, unilora, tinylora, deft, supertuning, qalora, bdlora, kasa, residual),
]


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.__name__)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_what_is_read_computes_the_method_s_formula(
    formula: Callable[[Draws], Example], data: st.DataObject
) -> None:
    (edit,), weight, expected = formula(Draws(data))
    assert edit.module == MODULE
    changed, _ = trained(edit, weight)
    np.testing.assert_allclose(changed - weight, expected.T, rtol=1e-9, atol=1e-9)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_loha_of_a_convolution_is_the_product_of_both_kernels(data: st.DataObject) -> None:
    (edit,), weight, expected = loha_of_a_convolution(Draws(data))
    changed, _ = trained(edit, weight)
    np.testing.assert_allclose(changed - weight, expected, rtol=1e-9, atol=1e-9)
    assert isinstance(edit, Reweight) or edit.dilates


def test_beft_adds_a_bias_and_changes_no_weight() -> None:
    (edit,) = edits_of("BEFT", {"beft_bias": np.array([[1.0, -2.0]])})
    weight = np.ones((2, 3))
    changed, bias = trained(edit, weight)
    np.testing.assert_array_equal(changed, weight)
    np.testing.assert_array_equal(bias, [1, -2])


def test_ln_tuning_replaces_the_weight_and_the_bias_of_a_norm() -> None:
    tensors = {"ln_tuning_layers.weight": np.ones(3), "ln_tuning_layers.bias": np.zeros(3)}
    edits = edits_of("LN_TUNING", tensors)
    assert all(isinstance(edit, Replacement) and edit.module == MODULE for edit in edits)
    assert {edit.parameter: edit.value.tolist() for edit in edits} == {
        "weight": [1, 1, 1],
        "bias": [0, 0, 0],
    }


def test_adalora_asks_for_nothing_in_a_module_that_was_pruned_to_nothing() -> None:
    tensors = {"lora_A": np.ones((0, 3)), "lora_E": np.ones((0, 1)), "lora_B": np.ones((2, 0))}
    assert edits_of("ADALORA", tensors, init_r=4, rank_pattern={"x": [False]}) == []
    with pytest.raises(CheckpointError, match="names no pruned ranks"):
        edits_of("ADALORA", tensors, init_r=4)


@pytest.mark.parametrize("rank", [4, 16])
def test_loha_is_a_slot_or_a_weight_whichever_is_smaller(rank: int) -> None:
    shapes = {"w1_a": (60, rank), "w1_b": (rank, 90), "w2_a": (60, rank), "w2_b": (rank, 90)}
    tensors = {f"hada_{part}": np.ones(shape) for part, shape in shapes.items()}
    (edit,) = edits_of("LOHA", tensors, r=rank, alpha=1)
    assert isinstance(edit, LowRank if rank**2 * (60 + 90) < 60 * 90 else Reweight)


LORA = {"lora_A.weight": np.ones((2, 3)), "lora_B.weight": np.ones((4, 2))}
HADA = {"hada_w1_a": np.ones((4, 2)), "hada_w1_b": np.ones((2, 3))}
HADA |= {name.replace("w1", "w2"): value for name, value in HADA.items()}
BANK = {"vblora_vector_bank": np.ones((5, 2))}
LOGITS = {f"vblora_logits_{name}": np.ones((2, 2, 5)) for name in "AB"}
VERA = {"vera_lambda_b": np.ones(4), "vera_lambda_d": np.ones(2)}
PVERA = {f"p{name}": value for name, value in VERA.items()}
TINY = {"tinylora_A": np.ones((2, 3)), "tinylora_B": np.ones((4, 2))}
BLOCKS = {"gralora_A": np.ones((2, 3, 4)), "gralora_B": np.ones((2, 4, 3))}
SPARSE = {"supertuning_values": np.ones(2), "supertuning_indices": np.array([1, 2])}

Damage = tuple[str, Tensors, Tensors, dict[str, Any], list[str]]
DAMAGED: dict[str, Damage] = {
    "empty, of ZeRO-3": (
        *("LORA", {**LORA, "lora_A.weight": np.ones(0)}, {}, {}),
        ["lora_A", "empty", "ZeRO-3"],
    ),
    "of rank 0": (
        *("LORA", {"lora_A.weight": np.ones((0, 3)), "lora_B.weight": np.ones((4, 0))}),
        *({}, {"r": 0, "rank_pattern": {"x": 1}}),
        ["rank 0", MODULE, "changes nothing"],
    ),
    "NaN": (
        *("LOHA", {**HADA, "hada_w2_b": np.full((2, 3), np.nan)}, {}, {}),
        ["hada_w2_b", "NaN"],
    ),
    "infinity among what is shared": (
        *("VERA", VERA, {"vera_A": np.full((2, 3), np.inf)}, {}),
        ["vera_A", "infinity"],
    ),
    "of two methods": ("LORA", {**LORA, **HADA}, {}, {}, ["hada_w1_a", "LOHA", "LORA"]),
    "of two methods, the other way": (
        *("LOHA", {**HADA, **LORA}, {}, {}),
        ["lora_A", "LORA or ADALORA", "LOHA"],
    ),
    "a bias that the method does not have": (
        *("LOHA", {**HADA, "hada_w1_a.bias": np.ones(4)}, {}, {}),
        ["hada_w1_a.bias", "LOHA"],
    ),
    "a part missing": (
        *(
            "ADALORA",
            {"lora_A": np.ones((2, 3)), "lora_B": np.ones((4, 2))},
            {},
            {"init_r": 2},
        ),
        ["lora_E", MODULE],
    ),
    "E of another rank": (
        "ADALORA",
        {"lora_A": np.ones((2, 3)), "lora_B": np.ones((4, 2)), "lora_E": np.ones((1, 1))},
        *({}, {"init_r": 2}),
        ["lora_E", "[1, 1]", "[2, 1]"],
    ),
    "a rank that the configuration does not have": (
        *("LOHA", HADA, {}, {"r": 8}),
        ["rank 2", "r=8", MODULE],
    ),
    "halves of other sizes": (
        *("LOHA", {**HADA, "hada_w2_b": np.ones((2, 5))}, {}, {"r": 2}),
        ["[4, 3]", "[4, 5]"],
    ),
    "without its projections": (
        *("VERA", VERA, {}, {"save_projection": False}),
        ["save_projection", "vera_A", "random numbers of PyTorch"],
    ),
    "sampled": (
        *("PVERA", PVERA, {}, {"sample_at_inference": True}),
        ["sample_at_inference", "random"],
    ),
    "without its indices": (
        *("UNILORA", {"unilora_scales_A": np.ones((2, 3))}, {"unilora_theta_d": np.ones(3)}),
        *({"save_indices": False}, ["save_indices", "order of the modules"]),
    ),
    "a topk above the bank's size": (
        *("VBLORA", LOGITS, BANK, {"topk": 9}),
        ["topk=9", "5 vectors"],
    ),
    "an index outside of the bank": (
        "VBLORA",
        {f"{name}_topk_indices": np.full((2, 2, 1), 7) for name in LOGITS}
        | {f"{name}_topk_weights": np.ones((2, 2, 0)) for name in LOGITS},
        *(BANK, {}, ["vblora_logits_A", "outside", "5"]),
    ),
    "several vectors": (
        *("TINYLORA", TINY, {"tinylora_v.0": np.ones(2), "tinylora_v.1": np.ones(2)}, {}),
        ["2 vectors", "order of the modules"],
    ),
    "without P": (
        *("TINYLORA", TINY, {"tinylora_v.0": np.ones(2)}, {}),
        ["tinylora_P", "save_projection"],
    ),
    "blocks that do not divide the rank": (
        *("GRALORA", {**BLOCKS, "gralora_A": np.ones((3, 3, 4))}, {}, {"alpha": 1}),
        ["gralora_B", "[3, 4, any]"],
    ),
    "a general part that the configuration does not have": (
        "GRALORA",
        {
            **BLOCKS,
            "gralora_A_general.weight": np.ones((1, 6)),
            "gralora_B_general.weight": np.ones((6, 1)),
        },
        *({}, {"alpha": 1, "hybrid_r": 0}),
        ["hybrid_r=0", MODULE],
    ),
    "half of a LoRA": (
        *("SUPERTUNING", {**SPARSE, "supertuning_lora_B.weight": np.ones((4, 2))}, {}, {}),
        ["supertuning_lora_A", MODULE],
    ),
    "a place twice": (
        *("SUPERTUNING", {**SPARSE, "supertuning_indices": np.array([1, 1])}, {}, {}),
        ["supertuning_indices", "twice"],
    ),
    "two variants of LoRA": (
        *("LORA", LORA, {}, {"use_qalora": True, "kasa_config": {"beta": 1}}),
        ["use_qalora", "kasa_config"],
    ),
    "an OLoRA of Conv1D": (
        *("LORA", LORA, {}, {"init_lora_weights": "olora", "fan_in_fan_out": True}),
        ["olora", "Conv1D"],
    ),
    "a fast PiSSA": (
        *("LORA", LORA, {}, {"init_lora_weights": "pissa_niter_4"}),
        ["pissa_niter_4", "changed the base"],
    ),
    "routed": ("LORA", LORA, {}, {"arrow_config": {"top_k": 2}}, ["arrow_config", "routed"]),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_or_unknown_checkpoint_is_refused_with_what_is_wrong(what: str) -> None:
    kind, tensors, shared, config, words = DAMAGED[what]
    with pytest.raises(CheckpointError) as caught:
        edits_of(kind, tensors, shared, **config)
    assert [word for word in words if word not in caught.value.message] == []
    assert caught.value.hint


def test_what_depends_on_the_size_of_a_layer_is_refused_on_another() -> None:
    (vera_edit,) = edits_of(
        "VERA", VERA, {"vera_A": np.ones((2, 3)), "vera_B": np.ones((4, 2))}
    )
    with pytest.raises(CheckpointError, match=r"do not fit the base's weight \[4, 9\]"):
        trained(vera_edit, np.ones((4, 9)))
    mini = {"init_weights": "mini", "mini_r": 3}
    (miss_edit,) = edits_of("MISS", {"miss_block": np.ones((2, 3))}, **mini)
    with pytest.raises(CheckpointError, match=r"miss_block \[2, 3\] does not fit"):
        trained(miss_edit, np.ones((4, 6)))
    (sparse,) = edits_of("SUPERTUNING", {**SPARSE, "supertuning_indices": np.array([0, 40])})
    with pytest.raises(CheckpointError, match="outside of the base's weight"):
        trained(sparse, np.ones((4, 6)))


@pytest.mark.parametrize("name", ["vera", "miss_mini", "loha", "vblora_topk"])
def test_a_method_goes_inside_attention_as_lora_does(name: str, tmp_path: Path) -> None:
    """The sizes that BySize asks for are those of a module's columns in Attention's weight."""
    case = CASES[f"peft_bert_{name}"]
    base = oa.open_model(ROOT / "bases/bert_optimised/base.onnx")
    checkpoint = oa.load_checkpoint(case.adapter, base)
    assert any(slot.name.endswith("self.qkv") for slot in checkpoint.slots)
    model = tmp_path / "adapted.onnx"
    oa.save_model(oa.insert_checkpoint(base, checkpoint), model)
    outputs = run(model, {**case.inputs(), **checkpoint.adapter.feeds()})
    assert case.distance(outputs) < case.tolerance
