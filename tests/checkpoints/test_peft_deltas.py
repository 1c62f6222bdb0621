"""The weights that adapters ask for, against those that PEFT computes with, by variant."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_adapt.checkpoints.edits import LowRank, Reweight
from onnx_adapt.checkpoints.placing.changes import as_low_rank_slot, change_of
from onnx_adapt.checkpoints.readers.peft import peft_edits
from onnx_adapt.checkpoints.readers.saved import Saved
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

FILE = Path(__file__).parents[1] / "cases/peft_deltas.npz"


def _variants() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"tensors": {}})
    with np.load(FILE) as stored:
        for key in stored.files:
            variant, part, *rest = key.split("/")
            if rest:
                found[variant][part][rest[0]] = stored[key]
            else:
                found[variant][part] = stored[key]
    return dict(found)


VARIANTS = _variants()


def _edit(variant: dict[str, Any], **config: Any) -> Reweight:
    facts = {**json.loads(str(variant["config"])), **config}
    (edit,) = peft_edits(Saved(Path("a"), "peft", facts, variant["tensors"]))
    assert isinstance(edit, Reweight)
    return edit


def _given(variant: dict[str, Any]) -> tuple[Array, Array | None]:
    bias = variant["bias"].astype(np.float64)
    return variant["weight"].astype(np.float64), bias if bias.size else None


@pytest.mark.parametrize("name", VARIANTS)
def test_a_weight_becomes_what_peft_computes_with(name: str) -> None:
    variant = VARIANTS[name]
    weight, bias = _given(variant)
    change = change_of(_edit(variant), weight, bias)
    np.testing.assert_allclose(change.weight, variant["trained"], rtol=1e-5, atol=3e-6)
    after = variant["trained_bias"]
    if change.bias is not None:
        np.testing.assert_allclose(change.bias, after, rtol=1e-5, atol=3e-6)
    else:
        np.testing.assert_allclose(variant["bias"], after, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_bound_on_the_rank_of_a_change_holds(name: str) -> None:
    variant = VARIANTS[name]
    edit = _edit(variant)
    change = change_of(edit, *_given(variant))
    if edit.rank is None:
        return
    added = change.added.reshape(len(change.added), -1)
    assert np.linalg.matrix_rank(added, tol=1e-9) <= edit.rank


def test_a_change_of_low_rank_is_a_slot_that_is_as_exact() -> None:
    variant = VARIANTS["lokr_low"]
    edit = _edit(variant)
    change = change_of(edit, *_given(variant))
    slot = as_low_rank_slot(edit, change, embeds=False)
    assert isinstance(slot, LowRank)
    assert slot.a.shape[0] <= 4
    np.testing.assert_allclose(slot.b @ slot.a, change.added, atol=1e-12)


@pytest.mark.parametrize("damage", ["empty", "scalar", "nan", "half"])
@pytest.mark.parametrize(
    "name", ["oft", "boft", "hra", "road_1", "lokr", "hira", "shira", "c3a_tall", "miss_bat",
             "glora_lora", "peanut_1", "osf_tall", "fourierft", "waveft"]
)  # fmt: skip
def test_damaged_tensors_are_refused(name: str, damage: str) -> None:
    def damaged(value: Array) -> Array:
        if damage == "nan":
            return np.full_like(value, np.nan) if value.dtype.kind == "f" else value
        made = {"empty": np.zeros(0), "scalar": np.zeros(()), "half": value[: len(value) // 2]}
        return made[damage].astype(value.dtype)

    variant = VARIANTS[name]
    tensors = {key: damaged(value) for key, value in variant["tensors"].items()}
    with pytest.raises(
        (CheckpointError, ValueError, IndexError, TypeError, ZeroDivisionError)
    ):
        change_of(_edit({**variant, "tensors": tensors}), *_given(variant))
