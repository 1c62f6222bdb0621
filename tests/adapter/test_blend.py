"""A blend is `target + sum_i w_i * (target'_i - target)` in every slot, exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_models import B2, W1, W2, adapted, trained, two_layers
from hypothesis import given, settings
from hypothesis import strategies as st
from session_adapters import BASE, DE, FR, X, adapter, close
from slot_formula import PLAIN

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.oracle import slot_value
from onnx_adapt.slot.weights import part_shape

RNG = np.random.default_rng(3)
FORMS = {
    "bottleneck": ("down", "up"),
    "with biases": ("down", "down_bias", "up", "up_bias"),
    "with a gain": ("down", "up", "up_bias", "gain"),
    "scaled": ("scale",),
    "everything": ("down", "up", "down_bias", "up_bias", "scale", "gain"),
    "with its own norm": ("down", "up", "down_bias", "norm_weight", "norm_bias"),
    "with its own norm without bias": ("down", "up", "norm_weight"),
    "with a second residual": ("down", "up", "residual", "skip"),
}


def _slot(parts: tuple[str, ...], axis: int = -1, rank: int = 0) -> oa.Slot:
    plus = "other" if "residual" in parts else ""
    width = PLAIN.width
    return replace(
        PLAIN, parts=parts, axis=axis, rank=rank, plus=plus, source="y", source_width=width
    )


def _random(slot: oa.Slot, size: int) -> dict[str, np.ndarray]:
    return {part: RNG.standard_normal(part_shape(slot, part, size)) for part in slot.parts}


LAST_AXIS_ONLY = {"norm_weight", "residual"}


@pytest.mark.parametrize(
    ("form", "axis"),
    [
        (form, axis)
        for form, parts in FORMS.items()
        for axis in (-1, 1)
        if axis == -1 or not LAST_AXIS_ONLY & set(parts)
    ],
)
def test_a_blend_equals_the_sum_of_what_its_adapters_change(form: str, axis: int) -> None:
    slot = _slot(FORMS[form], axis, 4 if axis == 1 else 0)
    check_slot(slot, 17)
    shape = (2, slot.width, 3, 3) if axis == 1 else (2, 5, slot.width)
    target, plus = RNG.standard_normal(shape), RNG.standard_normal(shape)
    others = [_random(slot, size) for size in (1, 4, 2)]
    shares = [0.7, -0.4, 2.0]
    mixed = oa.blend([oa.Adapter(str(i), {"s": w}) for i, w in enumerate(others)], shares)

    def value(weights: dict[str, np.ndarray]) -> np.ndarray:
        return slot_value(slot, target, target, weights, None, plus if slot.plus else None)

    expected = target + sum(
        share * (value(weights) - target)
        for share, weights in zip(shares, others, strict=True)
    )
    np.testing.assert_allclose(value(dict(mixed.weights["s"])), expected, 1e-9, 1e-9)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_blend_is_linear_in_its_weights(shares: list[float]) -> None:
    slot = _slot(("down", "up", "down_bias", "up_bias", "scale"))
    rng = np.random.default_rng(len(shares))
    target = rng.standard_normal((3, slot.width))
    parts = [
        {part: rng.standard_normal(part_shape(slot, part, 2)) for part in slot.parts}
        for _ in shares
    ]
    adapters = [oa.Adapter(str(i), {"s": weights}) for i, weights in enumerate(parts)]

    def moved(scale: float) -> np.ndarray:
        mixed = oa.blend(adapters, [scale * share for share in shares])
        return slot_value(slot, target, target, dict(mixed.weights["s"])) - target

    np.testing.assert_allclose(moved(2.0), 2 * moved(1.0), rtol=1e-6, atol=1e-9)


def test_a_session_blends_what_it_has_loaded() -> None:
    with oa.AdapterSession(adapted(), {"fr": FR, "de": DE}) as session:
        blended = session.run({"x": X}, adapter={"fr": 0.7, "de": 0.3})["y"]
        # The first slot is followed by a Relu, so only slot by slot is the sum the truth.
        assert close(blended, _blended([(FR, 0.7), (DE, 0.3)]))
        again = session.run({"x": X}, adapter={"fr": 0.7, "de": 0.3})["y"]
        np.testing.assert_array_equal(blended, again)
        np.testing.assert_array_equal(
            session.run({"x": X}, adapter={"fr": 1.0, "de": 0})["y"],
            session.run({"x": X}, adapter="fr")["y"],
        )
        assert close(session.run({"x": X}, adapter={"fr": 0})["y"], BASE)


def _blended(shares: list[tuple[oa.Adapter, float]]) -> np.ndarray:
    """What `adapted` computes with a blend, slot by slot in float64."""

    def slot(t: np.ndarray, name: str) -> np.ndarray:
        terms = [
            weight * (np.maximum(t @ a.weights[name]["down"], 0) @ a.weights[name]["up"])
            for a, weight in shares
        ]
        return t + sum(terms)

    x = X.astype(np.float64)
    return slot(np.maximum(slot(x @ W1.T, "fc1"), 0) @ W2.T + B2, "fc2")


def test_a_blend_follows_an_adapter_that_was_replaced() -> None:
    with oa.AdapterSession(adapted(), {"fr": FR, "de": DE}) as session:
        session.run({"x": X}, adapter={"fr": 0.5, "de": 0.5})
        other = adapter("other", 9)
        session.load("fr", other)
        found = session.run({"x": X}, adapter={"fr": 0.5, "de": 0.5})["y"]
    assert close(found, _blended([(other, 0.5), (DE, 0.5)]))


def test_an_adapter_without_some_slot_leaves_it_to_the_others() -> None:
    part = oa.Adapter("part", {"fc1": FR.weights["fc1"]})
    mixed = oa.blend([part, DE], [0.5, 2])
    assert mixed.weights["fc1"]["down"].shape == (4, 8)
    np.testing.assert_allclose(mixed.weights["fc2"]["up"], 2 * DE.weights["fc2"]["up"])


def test_trained_heads_are_blended_with_the_base_s_own(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)  # its fc2 is -2 times the base's, its bias one more
    model = oa.save_model(oa.insert_checkpoint(base, checkpoint), tmp_path / "a.onnx").path
    with oa.AdapterSession(model, {"fr": checkpoint.adapter}) as session:
        found = session.run({"x": X}, adapter={"fr": 0.25})["y"]
    (lora,) = checkpoint.adapter.weights.values()
    hidden = np.maximum(X @ W1.T + 0.25 * (X @ lora["down"] @ lora["up"]), 0)
    assert close(found, hidden @ (0.25 * W2.T) + B2 + 0.25)


def test_without_the_base_s_own_value_a_trained_head_needs_weights_that_sum_to_one(
    tmp_path: Path,
) -> None:
    _, checkpoint = trained(tmp_path)
    with pytest.raises(AdapterError, match="do not sum to 1") as caught:
        oa.blend([checkpoint.adapter], [0.25])
    assert "base=" in str(caught.value)
    both = oa.blend([checkpoint.adapter, checkpoint.adapter], [0.25, 0.75])
    for name, value in checkpoint.adapter.replaced.items():
        np.testing.assert_allclose(both.replaced[name], value, 1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        {"gate": np.ones((4, 1)), "gate_bias": np.ones(1)},
        {"after_weight": np.ones(4), "after_bias": np.ones(4)},
        {"f_down": np.ones((2, 1))},
    ],
)
def test_what_is_no_sum_over_the_bottleneck_is_refused(parts: dict[str, np.ndarray]) -> None:
    slot = {"down": np.ones((4, 2)), "up": np.ones((2, 4)), **parts}
    one = oa.Adapter("one", {"s": slot})
    with pytest.raises(AdapterError, match="cannot be blended"):
        oa.blend([one, one], [0.5, 0.5])
    assert oa.blend([one], [1]).weights == one.weights


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", None, True])
def test_what_is_no_number_is_no_weight(weight: object) -> None:
    with pytest.raises(AdapterError, match="no weight of a blend"):
        oa.blend([FR], [weight])  # type: ignore[list-item]


def test_adapters_that_do_not_belong_together_are_refused() -> None:
    first = replace(FR, fingerprint="sha256:" + "1" * 64)
    with pytest.raises(AdapterError, match="different bases"):
        oa.blend([first, replace(DE, fingerprint="sha256:" + "2" * 64)], [1, 1])
    with pytest.raises(AdapterError, match="activation"):
        oa.blend([FR, replace(DE, activations={"fc1": "gelu"})], [1, 1])
    scaled = replace(DE, weights={**DE.weights, "fc1": {"scale": np.ones(4, "f4")}})
    with pytest.raises(AdapterError, match="parts"):
        oa.blend([FR, scaled], [1, 1])
    with pytest.raises(AdapterError, match="make no blend"):
        oa.blend([FR, DE], [1])
    with pytest.raises(AdapterError, match="make no blend"):
        oa.blend([], [])


def test_a_blend_that_overflows_its_element_type_is_refused() -> None:
    model = oa.insert(oa.Model(two_layers(np.float16)), after=["fc1", "fc2"])
    session = oa.AdapterSession(model, {"fr": oa.make_adapter(model, "fr", FR.weights)})
    with pytest.raises(AdapterError, match="passes what float16 holds"):
        session.run({"x": X.astype(np.float16)}, adapter={"fr": 1e9})
