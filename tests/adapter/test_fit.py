"""Adapters and models: what does not fit, and why."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from adapter_models import (
    B2,
    W1,
    adapted,
    bumped,
    trained,
    two_layers,
    weights,
)
from onnx import numpy_helper
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.adapter.fitting import misfits, overlaps, require_fit
from onnx_adapt.errors import AdapterError, SlotError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
FORMATS = ["safetensors", "onnx_adapter", "npz"]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 5), (64, 2)])
def test_an_adapter_of_any_bottleneck_fits(sizes: tuple[int, int]) -> None:
    model = adapted()
    values = {"fc1": weights(sizes[0]), "fc2": weights(sizes[1])}
    adapter = oa.Adapter("a", values, {}, {"fc1": "relu"})
    assert misfits(model, adapter) == []
    require_fit(model, adapter)


def _with(**parts: np.ndarray) -> dict[str, np.ndarray]:
    return {**weights(), **parts}


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


NAN = np.full((4, 3), np.nan, np.float32)
INF = np.full((3, 4), -np.inf, np.float32)
MISFITS: dict[str, tuple[dict[str, object], list[str]]] = {
    "a slot missing": ({"fc2": None}, ["no weights for slot 'fc2'"]),
    "a slot too many": ({"fc3": weights()}, ["no slot 'fc3'"]),
    "a part missing": ({"fc1": {"down": NAN}}, ["'fc1'", "down, up", "has down"]),
    "a part too many": ({"fc1": _with(scale=B2)}, ["'fc1'", "scale"]),
    "another width": ({"fc1": _with(up=_zeros(3, 5))}, ["[3, 5]", "[3, 4]"]),
    "a transpose": ({"fc1": _with(down=_zeros(3, 4))}, ["adapter.fc1.down"]),
    "a vector": ({"fc1": _with(down=_zeros(4))}, ["adapter.fc1.down", "[4]"]),
    "a scalar": ({"fc1": _with(down=_zeros())}, ["adapter.fc1.down", "[]"]),
    "an axis more": ({"fc1": _with(up=_zeros(3, 4, 1))}, ["adapter.fc1.up"]),
    "two bottlenecks": ({"fc1": _with(up=weights(2)["up"])}, ["different bottlenecks"]),
    "half precision": ({"fc1": weights(dtype=np.float16)}, ["float16", "float32"]),
    "double precision": ({"fc2": weights(dtype=np.float64)}, ["float64", "float32"]),
    "bfloat16": ({"fc2": weights(dtype=ml_dtypes.bfloat16)}, ["bfloat16", "float32"]),
    "NaN": ({"fc1": _with(down=NAN)}, ["adapter.fc1.down", "NaN"]),
    "infinity": ({"fc2": _with(up=INF)}, ["adapter.fc2.up", "infinity"]),
}  # fmt: skip


@pytest.mark.parametrize("what", MISFITS)
def test_a_misfit_is_named(what: str) -> None:
    change, words = MISFITS[what]
    values = {"fc1": weights(), "fc2": weights(), **change}
    adapter = oa.Adapter("fr", {k: v for k, v in values.items() if v is not None})
    model = adapted()
    before = model.proto.SerializeToString()
    found = misfits(model, adapter)
    assert len(found) in (1, 2)
    assert all(any(word in text for text in found) for word in words), found
    for refuse in (require_fit, oa.fill):
        with pytest.raises(AdapterError, match="adapter 'fr' does not fit") as caught:
            refuse(model, adapter)
        assert found[0] in caught.value.message
        assert "onnx-adapt check" in caught.value.hint
    assert model.proto.SerializeToString() == before


def test_another_activation_is_a_misfit_where_it_is_known() -> None:
    model = adapted(activation="gelu")
    values = {"fc1": weights(), "fc2": weights()}
    assert misfits(model, oa.Adapter("a", values)) == []
    found = misfits(model, oa.Adapter("a", values, {}, {"fc1": "gelu", "fc2": "gelu_tanh"}))
    assert len(found) == 1
    assert all(word in found[0] for word in ("'fc2'", "computes gelu", "needs gelu_tanh"))


def test_a_fixed_bottleneck_takes_no_other() -> None:
    model = adapted(bottleneck=3)
    assert misfits(model, oa.Adapter("a", {"fc1": weights(3), "fc2": weights(3)})) == []
    found = misfits(model, oa.Adapter("a", {"fc1": weights(3), "fc2": weights(5)}))
    assert [text.split("'")[1] for text in found] == ["fc2"]


def test_partial_coverage_is_a_misfit_unless_allowed() -> None:
    model = adapted()
    adapter = oa.make_adapter(model, "a", {"fc2": weights()})
    assert misfits(model, adapter) == ["it has no weights for slot 'fc1'"]
    assert misfits(model, adapter, allow_partial=True) == []
    filled = oa.fill(model, adapter, allow_partial=True)
    np.testing.assert_allclose(run(filled, {"x": X})[0], bumped(X, adapter), 1e-4, 1e-4)


def test_what_is_wrong_with_the_rest_counts_although_partial_coverage_is_allowed() -> None:
    adapter = oa.Adapter("a", {"fc2": weights(dtype=np.float16), "other": weights()})
    found = misfits(adapted(), adapter, allow_partial=True)
    assert len(found) == 3
    assert "'other'" in found[0]


def test_everything_that_is_wrong_is_listed_and_the_error_counts_the_rest() -> None:
    broken = {"down": NAN.astype(np.float16), "up": np.zeros((2, 9), np.float32)}
    adapter = oa.Adapter(
        "fr", {"fc1": broken, "a": {}, "b": {}}, {}, {"fc1": "silu"}, "sha256:0"
    )
    found = misfits(adapted(), adapter)
    for word in (
        "base model",
        "'a'",
        "'b'",
        "silu",
        "float16",
        "[2, 9]",
        "bottlenecks",
        "NaN",
    ):
        assert any(word in text for text in found), word
    with pytest.raises(AdapterError, match=f"and {len(found) - 3} more"):
        require_fit(adapted(), adapter)


def test_an_adapter_for_another_base_is_a_misfit(tmp_path: Path) -> None:
    other = two_layers()
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(W1 + 1e-3, "onnx::MatMul_1"))
    theirs = oa.insert(oa.Model(other), after=["fc1", "fc2"])
    values = {"fc1": weights(), "fc2": weights()}
    stranger = oa.extract(oa.fill(theirs, oa.make_adapter(theirs, "a", values)))
    assert misfits(theirs, stranger) == []
    for suffix in FORMATS:
        path = oa.save_adapter(stranger, tmp_path / f"a.{suffix}")
        assert misfits(theirs, oa.load_adapter(path)) == []
        (found,) = misfits(adapted(), oa.load_adapter(path))
        assert "another base model" in found
    assert misfits(adapted(), replace(stranger, fingerprint="")) == []


def test_a_model_without_slots_is_an_error() -> None:
    base = oa.Model(two_layers())
    adapter = oa.Adapter("a", {"fc1": weights()})
    for action in (misfits, oa.fill):
        with pytest.raises(SlotError, match="no slots") as caught:
            action(base, adapter)
        assert "onnx-adapt insert" in caught.value.hint
    for action in (oa.bake, oa.extract):
        with pytest.raises(SlotError, match="no slots"):
            action(base)


REPLACED: dict[str, tuple[dict[str, object], str]] = {
    "missing": ({"base.fc2.bias": None}, "it has no 'base.fc2.bias'"),
    "unknown": ({"base.fc9.bias": B2}, "no replaceable weight 'base.fc9.bias'"),
    "no prefix": ({"fc2.bias": B2}, "no replaceable weight 'fc2.bias'"),
    "shape": ({"base.fc2.bias": np.zeros(5, np.float32)}, "'base.fc2.bias' has shape [5]"),
    "type": ({"base.fc2.bias": B2.astype(np.float16)}, "'base.fc2.bias' is float16"),
    "NaN": ({"base.fc2.weight": np.full((4, 4), np.nan, "f4")}, "'base.fc2.weight' holds NaN"),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_misfit_of_a_replaced_weight_is_named(what: str, tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    model = oa.insert_checkpoint(base, checkpoint)
    change, words = REPLACED[what]
    values = {**checkpoint.adapter.replaced, **change}
    kept = {name: value for name, value in values.items() if value is not None}
    found = misfits(model, replace(checkpoint.adapter, replaced=kept))
    assert len(found) == 1
    assert words in found[0]
    assert misfits(model, checkpoint.adapter) == []


def test_overlaps_name_the_weight_and_both_adapters() -> None:
    one = oa.Adapter("fr", {"fc1": weights(), "fc2": weights()})
    two = oa.Adapter("de", {"fc2": weights()}, {"base.h.bias": B2})
    assert overlaps([one]) == []
    assert overlaps([one, oa.Adapter("it", {"fc3": weights()})]) == []
    found = overlaps([one, two])
    assert len(found) == 2
    assert all("'fr'" in text and "'de'" in text for text in found)
    assert "'adapter.fc2.down'" in found[0]
