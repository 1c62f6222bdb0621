"""What an adapter is made of."""

from dataclasses import replace

import numpy as np
import pytest
from adapter_models import adapted

import onnx_adapt as oa
from onnx_adapt.errors import SlotError

RNG = np.random.default_rng(0)


def _lora(down: np.ndarray, up: np.ndarray, **fields: object) -> oa.Adapter:
    parts = {"down": down.astype("float32"), "up": up.astype("float32")}
    return oa.Adapter("fr", {"fc": parts}, activations={"fc": "identity"}, **fields)


def test_ranks_norm_and_dead_units_are_those_of_the_update() -> None:
    down, up = RNG.normal(size=(20, 6)), RNG.normal(size=(6, 30))
    down[:, 3] = down[:, 2]  # two units that read the same
    up[5] = 0
    (found,) = oa.inspect(_lora(down, up)).slots
    assert (found.reads, found.makes, found.bottleneck, found.rank) == (20, 30, 6, 4)
    assert found.norm == pytest.approx(np.linalg.norm(down @ up), rel=1e-6)
    assert (found.dead_units, found.off, found.odd) == (1, False, ())
    assert (found.parts, found.dtype) == (("down", "up"), "float32")


def test_the_effective_rank_has_99_percent_of_the_energy() -> None:
    (found,) = oa.inspect(_lora(np.diag([10.0, 5, 0.1]), np.eye(3))).slots
    assert (found.rank, found.effective_rank) == (3, 2)


def test_a_slot_that_was_never_trained_is_off() -> None:
    (found,) = oa.inspect(_lora(RNG.normal(size=(8, 2)), np.zeros((2, 8)))).slots
    assert found.off
    assert (found.rank, found.effective_rank, found.norm, found.dead_units) == (0, 0, 0, 2)


def test_nan_is_named_and_stops_nothing() -> None:
    (found,) = oa.inspect(_lora(np.full((8, 2), np.nan), np.ones((2, 8)))).slots
    assert found.odd == ("down",)
    assert (found.rank, found.norm, found.off) == (None, None, False)


def test_a_bottleneck_has_no_singular_values_and_ia3_no_bottleneck() -> None:
    relu = replace(_lora(np.ones((8, 2)), np.ones((2, 4))), activations={"fc": "relu"})
    (found,) = oa.inspect(relu).slots
    assert (found.activation, found.rank, found.bottleneck) == ("relu", None, 2)
    assert found.norm == pytest.approx(np.sqrt(24))
    (found,) = oa.inspect(oa.Adapter("a", {"fc": {"scale": np.full(4, 2.0)}})).slots
    assert (found.reads, found.makes, found.bottleneck, found.off) == (None, 4, 0, False)


def test_an_empty_bottleneck_is_off() -> None:
    (found,) = oa.inspect(_lora(np.ones((8, 0)), np.ones((0, 8)))).slots
    assert (found.rank, found.norm, found.off, found.bottleneck) == (0, 0, True, 0)


def test_a_model_tells_whether_an_adapter_is_for_it() -> None:
    model = adapted()
    zeros = {"down": np.zeros((4, 2)), "up": np.zeros((2, 4))}
    mine = oa.make_adapter(model, "mine", {"fc1": zeros, "fc2": zeros})
    found = oa.inspect(mine, model)
    assert (found.misfits, found.same_base) == ((), True)
    assert found.bases == (mine.fingerprint,)
    assert oa.inspect(mine).misfits is None
    other = oa.inspect(replace(mine, fingerprint="sha256:0"), model)
    assert other.same_base is False
    assert "another base model" in other.misfits[0]
    assert oa.inspect(replace(mine, fingerprint=""), model).same_base is None
    with pytest.raises(SlotError, match="has no slots"):
        oa.inspect(mine, oa.open_model("models/dnsmos-p808.onnx"))
