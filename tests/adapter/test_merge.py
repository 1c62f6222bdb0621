"""Merging is PEFT's `add_weighted_adapter`; `cat` is the exact sum.

`tools/make_merges.py` wrote PEFT's numbers.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnx_adapt as oa
from onnx_adapt.adapter.merge_methods import METHODS
from onnx_adapt.errors import AdapterError

with np.load(Path(__file__).parent / "peft_merges.npz") as stored:
    PEFT = dict(stored)
MODULES = ("conv", "embed", "linear")
WEIGHTS, DENSITY, SEED, RANK = [0.7, -0.4], 0.5, 3, 2


def _from_peft(name: str) -> oa.Adapter:
    """PEFT's adapter as the reader of checkpoints lays it out: the scale is in `up`."""
    weights = {}
    for module in MODULES:
        a, b, scale = (PEFT[f"{name}/{module}/{part}"] for part in ("A", "B", "scale"))
        up = (b * scale).astype(np.float64)
        a = a.astype(np.float64)
        if module == "conv":
            weights[module] = {"down": a, "up": up}
        else:
            weights[module] = {"table" if module == "embed" else "down": a.T, "up": up.T}
    return oa.Adapter(name, weights, activations=dict.fromkeys(weights, "identity"))


def _update(adapter: oa.Adapter, module: str) -> np.ndarray:
    """What a slot adds to the weight, in PyTorch's layout."""
    parts = adapter.weights[module]
    up = parts["up"]
    if module == "conv":
        return np.einsum("ri...,or->oi...", parts["down"], up.reshape(up.shape[:2]))
    if module == "embed":
        return parts["table"] @ up
    return (parts["down"] @ up).T


LABELS = sorted({*METHODS, "ties_frequency"})


@pytest.mark.parametrize("label", LABELS)
def test_every_method_gives_what_peft_gives(label: str) -> None:
    method = label.removesuffix("_frequency")
    row = METHODS[method]
    merged = oa.merge(
        [_from_peft("fr"), _from_peft("de")],
        WEIGHTS,
        method=method,
        density=DENSITY if row.prunes else None,
        majority="frequency" if label != method else None,
        rank=RANK if row.takes == "updates" else None,
        seed=SEED if row.prunes == "random" else None,
    )
    for module in MODULES:
        expected = PEFT[f"{label}/{module}"]
        size = np.abs(expected).max()
        np.testing.assert_allclose(_update(merged, module), expected, 0, 2e-6 * size)


def test_the_file_of_pefts_numbers_has_every_method() -> None:
    written = {key.split("/")[0] for key in PEFT} - {"fr", "de", "ia3"}
    assert written == set(LABELS)


def test_linear_adds_ia3_as_peft_does() -> None:
    fr, de = (
        oa.Adapter(name, {"linear": {"scale": PEFT[f"ia3/{name}/linear"]}})
        for name in ("fr", "de")
    )
    merged = oa.merge([fr, de], WEIGHTS, method="linear").weights["linear"]["scale"]
    np.testing.assert_allclose(merged, PEFT["ia3/linear/linear"], 1e-6, 1e-6)


def _lora(
    seed: int, rank: int = 3, *, sizes: tuple[int, int] = (6, 5), activation: str = "identity"
) -> oa.Adapter:
    rng = np.random.default_rng(seed)
    parts = {
        "down": rng.normal(size=(sizes[0], rank)),
        "up": rng.normal(size=(rank, sizes[1])),
    }
    return oa.Adapter(f"a{seed}", {"fc": parts}, activations={"fc": activation})


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from(["cat", "svd"]),
)
@settings(max_examples=40, deadline=None)
def test_cat_and_svd_are_the_weighted_sum(
    shares: list[tuple[float, int]], method: str
) -> None:
    adapters = [_lora(i, rank) for i, (_, rank) in enumerate(shares)]
    weights = [weight for weight, _ in shares]
    if method == "svd" and len(adapters) == 1:
        return
    whole = {"rank": 5} if method == "svd" else {}
    merged = oa.merge(adapters, weights, method=method, **whole).weights["fc"]
    expected = sum(
        weight * (a.weights["fc"]["down"] @ a.weights["fc"]["up"])
        for a, weight in zip(adapters, weights, strict=True)
    )
    np.testing.assert_allclose(merged["down"] @ merged["up"], expected, 0, 1e-12 * 100)


def test_linear_is_the_mean_of_bottlenecks_of_one_size() -> None:
    fr, de = _lora(1, activation="relu"), _lora(2, activation="relu")
    merged = oa.merge([fr, de], [0.5, 0.5], method="linear")
    for part in ("down", "up"):
        mean = (fr.weights["fc"][part] + de.weights["fc"][part]) / 2
        np.testing.assert_allclose(merged.weights["fc"][part], mean)
    assert merged.activations == {"fc": "relu"}
    with pytest.raises(AdapterError, match="no mean of their weights"):
        oa.merge([fr, _lora(2, 4, activation="relu")], [0.5, 0.5], method="linear")


def test_a_gain_goes_into_the_update_and_a_scale_is_blended() -> None:
    rng = np.random.default_rng(0)
    made = []
    for seed in (1, 2):
        lora = _lora(seed)
        more = {
            "gain": rng.normal(size=5),
            "scale": rng.normal(size=5),
            "up_bias": rng.normal(size=5),
        }
        made.append(replace(lora, weights={"fc": {**lora.weights["fc"], **more}}))
    merged = oa.merge(made, [0.7, 0.3], method="svd", rank=5).weights["fc"]
    exact = oa.merge(made, [0.7, 0.3]).weights["fc"]
    for part in ("gain", "scale", "up_bias"):
        np.testing.assert_array_equal(merged[part], exact[part])
    expected = exact["down"] @ exact["up"] * exact["gain"]
    np.testing.assert_allclose(merged["down"] @ merged["up"] * merged["gain"], expected)


def test_dare_depends_on_the_seed_alone() -> None:
    fr, de = _lora(1), _lora(2)

    def merged(seed: int) -> np.ndarray:
        options = {"method": "dare_linear", "density": 0.5}
        return oa.merge([fr, de], [1, 1], seed=seed, **options).weights["fc"]["down"]

    np.testing.assert_array_equal(merged(5), merged(5))
    assert not np.array_equal(merged(5), merged(6))


def test_a_slot_of_one_adapter_is_merged_alone() -> None:
    fr, de = _lora(1), _lora(2)
    de = replace(de, weights={"other": de.weights["fc"]}, activations={"other": "identity"})
    merged = oa.merge([fr, de], [2, 3], method="linear")
    for slot, source, weight in (("fc", fr, 2), ("other", de, 3)):
        parts, own = merged.weights[slot], source.weights[slot]
        expected = weight * own["down"] @ own["up"]
        np.testing.assert_allclose(parts["down"] @ parts["up"], expected)


def test_heads_are_blended_by_every_method() -> None:
    fr, de = (replace(_lora(i), replaced={"head": np.full(2, i, "float32")}) for i in (1, 2))
    merged = oa.merge([fr, de], [0.25, 0.75], method="ties", density=0.5)
    np.testing.assert_allclose(merged.replaced["head"], 1.75)
    with pytest.raises(AdapterError, match="do not sum to 1"):
        oa.merge([fr, de], [1, 1], method="ties", density=0.5)
    base = {"head": np.zeros(2, "float32")}
    merged = oa.merge([fr, de], [1, 1], method="ties", density=0.5, base=base)
    np.testing.assert_allclose(merged.replaced["head"], 3)


def test_a_merge_is_for_the_models_that_all_its_adapters_are_for() -> None:
    fr, de = (
        replace(_lora(i), fingerprint="sha256:1", other_bases=bases)
        for i, bases in ((1, ("sha256:2", "sha256:3")), (2, ("sha256:3",)))
    )
    merged = oa.merge([fr, de], [1, 1])
    assert (merged.fingerprint, merged.other_bases) == ("sha256:1", ("sha256:3",))


REFUSED = {
    "unknown method": ({"method": "tise"}, "no method to merge"),
    "no density": ({"method": "ties"}, "needs a density"),
    "idle density": ({"density": 0.5}, "a density has no effect on cat"),
    "idle seed": ({"method": "ties", "density": 0.5, "seed": 1}, "a seed has no effect"),
    "idle rank": ({"method": "ties", "density": 0.5, "rank": 1}, "a rank has no effect"),
    "idle majority": ({"method": "svd", "majority": "total"}, "a majority has no effect"),
    "density 0": ({"method": "ties", "density": 0}, "no density"),
    "density 2": ({"method": "dare_ties", "density": 2}, "no density"),
    "density NaN": ({"method": "ties", "density": float("nan")}, "no density"),
    "rank 0": ({"method": "svd", "rank": 0}, "no rank"),
    "majority": ({"method": "ties", "density": 0.5, "majority": "most"}, "elects no sign"),
    "seed": ({"method": "dare_ties", "density": 0.5, "seed": -1}, "no seed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_odd_arguments_are_refused(what: str) -> None:
    options, message = REFUSED[what]
    with pytest.raises(AdapterError, match=message):
        oa.merge([_lora(1), _lora(2)], [0.5, 0.5], **options)


def _nan() -> oa.Adapter:
    lora = _lora(3)
    lora.weights["fc"]["up"][0, 0] = np.nan
    return lora


UNMERGEABLE = {
    "bases": (
        replace(_lora(1), fingerprint="sha256:1"),
        replace(_lora(2), fingerprint="sha256:2"),
        "different bases",
    ),
    "ranks": (_lora(1, 2), _lora(2, 3), "has the ranks 2, 3"),
    "sizes": (_lora(1), _lora(2, sizes=(6, 4)), "layers of different sizes"),
    "activations": (_lora(1), _lora(2, activation="relu"), "has the activation"),
    "bottlenecks": (_lora(1, activation="relu"), _lora(2, activation="relu"), "relu"),
    "silent": (replace(_lora(1), activations={}), _lora(2), "does not say its activation"),
    "NaN": (_lora(1), _nan(), "NaN or infinity"),
    "extra": (
        replace(_lora(1), extra={"fc": (("colour", '"red"'),)}),
        _lora(2),
        "differ in colour",
    ),
    "ia3": (
        *(oa.Adapter(n, {"fc": {"scale": np.ones(4)}}) for n in "ab"),
        "no projections",
    ),
}


@pytest.mark.parametrize("what", UNMERGEABLE)
def test_what_cannot_be_merged_is_refused(what: str) -> None:
    one, other, message = UNMERGEABLE[what]
    with pytest.raises(AdapterError, match=message):
        oa.merge([one, other], [0.5, 0.5], method="ties", density=0.5)


def test_a_matrix_of_more_than_2_gb_is_not_formed() -> None:
    big = [
        oa.Adapter(
            name,
            {
                "fc": {
                    "down": np.zeros((20_000, 1), "float16"),
                    "up": np.zeros((1, 20_000), "float16"),
                }
            },
            activations={"fc": "identity"},
        )
        for name in "ab"
    ]
    with pytest.raises(AdapterError, match="more than 2 GB"):
        oa.merge(big, [0.5, 0.5], method="ties_svd", density=0.5)
    assert oa.merge(big, [0.5, 0.5], method="svd").weights["fc"]["up"].shape == (1, 20_000)


def test_a_result_that_passes_float16_is_refused() -> None:
    parts = {"down": np.full((4, 1), 6e4, "float16"), "up": np.full((1, 4), 6e4, "float16")}
    lora = oa.Adapter("a", {"fc": parts}, activations={"fc": "identity"})
    with pytest.raises(AdapterError, match="passes what float16 holds"):
        oa.merge([lora, lora], [5, 5], method="linear")
