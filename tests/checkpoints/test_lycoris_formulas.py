"""Every method of LyCORIS gives the weight that LyCORIS computes with."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from onnx_adapt.checkpoints.edits import LowRank, Reweight
from onnx_adapt.checkpoints.readers.image_keys import sort_tensors
from onnx_adapt.checkpoints.readers.lycoris.table import module_edits
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

FILE = Path(__file__).parent.parent / "diffusion" / "formulas.safetensors"
FOUND = safetensors.numpy.load_file(FILE)
CASES = sorted({key.partition(":")[0] for key in FOUND if ":" in key})


def _tensors(case: str) -> ModuleTensors:
    keys = {key.replace(":", "."): FOUND[key] for key in FOUND if key.startswith(f"{case}:")}
    ((module, parts),) = sort_tensors(keys).items()
    return ModuleTensors(module[1], parts, {})


def _trained(edit: object, weight: Array, bias: Array) -> tuple[Array, Array]:
    """The weight and bias that an edit asks for, in float64."""
    if isinstance(edit, Reweight):
        trained, changed = edit.compute(weight, bias)
        assert changed is not None
        return trained, changed
    assert isinstance(edit, LowRank)
    rank = len(edit.a)
    change = edit.scale * edit.b.reshape(-1, rank) @ edit.a.reshape(rank, -1)
    trained = weight + change.reshape(weight.shape)
    if edit.magnitude is not None:
        norm = np.linalg.norm(trained.reshape(len(trained), -1), axis=1)
        trained = trained * (edit.magnitude / norm).reshape(-1, *(1,) * (weight.ndim - 1))
    return trained, bias


@pytest.mark.parametrize("case", CASES)
def test_a_layer_gets_the_weight_that_lycoris_computes_with(case: str) -> None:
    weight, bias = (FOUND[f"{case}.{x}"].astype(np.float64) for x in ("weight", "bias"))
    (edit,) = module_edits(_tensors(case))
    trained, changed = _trained(edit, weight, bias)
    wanted = FOUND[f"{case}.trained"]
    assert np.abs(wanted - weight).max() > 1e-3  # the adapter does something
    np.testing.assert_allclose(trained, wanted, atol=3e-6)
    np.testing.assert_allclose(changed, FOUND[f"{case}.trained_bias"], atol=1e-6)


def test_the_cases_have_every_method() -> None:
    assert {case.partition("_")[2].partition("_")[0] for case in CASES} == {
        *("lora", "loha", "lokr", "oft", "boft", "glora", "ia3", "full")
    }


def test_biases_beside_lora_are_added_and_that_of_b_is_scaled() -> None:
    case = _tensors("linear_lora")
    first, second = np.arange(8.0), np.ones(8)
    parts = {**case.parts, "lora_up.bias": first, "diff_b": second}
    (edit,) = module_edits(ModuleTensors("m", parts, {}))
    assert isinstance(edit, LowRank)
    assert edit.bias is not None
    alpha, rank = float(case.parts["alpha"]), 2
    np.testing.assert_allclose(edit.scale * edit.bias, alpha / rank * first + second)
    (plain,) = module_edits(case)
    assert isinstance(plain, LowRank)
    np.testing.assert_allclose(edit.scale * edit.b @ edit.a, plain.scale * plain.b @ plain.a)


HUGE = np.ones((1, 200_000), np.float32)
FAR_TOO_LARGE = {
    "LoHa": {f"hada_w{n}_{x}": HUGE.T if x == "a" else HUGE for n in "12" for x in "ab"},
    "LoKr": {f"lokr_w{n}_{x}": HUGE.T if x == "a" else HUGE for n in "12" for x in "ab"},
    "DoRA by input": {"lora_up": HUGE.T, "lora_down": HUGE, "dora_scale": HUGE},
    "LoCon": {
        "lora_up": HUGE[:, :1],
        "lora_down": HUGE,
        "lora_mid": HUGE.reshape(1, 1, 1, -1),
    },
}


@pytest.mark.parametrize("what", FAR_TOO_LARGE)
def test_what_would_not_fit_into_memory_is_never_computed(what: str) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit|larger than any"):
        _computed_for_a_small_base(FAR_TOO_LARGE[what])


def _computed_for_a_small_base(parts: dict[str, Array]) -> None:
    for edit in module_edits(ModuleTensors("m", parts, {})):
        assert isinstance(edit, Reweight)
        edit.compute(np.zeros((5, 7)), None)


@pytest.mark.parametrize("case", [case for case in CASES if "lora" not in case])
def test_a_base_of_another_size_is_refused(case: str) -> None:
    (edit,) = module_edits(_tensors(case))
    assert isinstance(edit, Reweight)
    with pytest.raises(CheckpointError, match="does not fit the base's weight"):
        edit.compute(np.zeros((5, 7)), np.zeros(5))
