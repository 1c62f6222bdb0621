"""onnxruntime-genai runs models with slots: its own builder's Llama, its own adapters."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from genai_models import (
    FOLDER,
    PLACES,
    PROMPT,
    STEPS,
    Text,
    bottlenecks,
    by_pytorch,
    generate,
    put,
    start,
    step,
    written,
)
from safetensors.numpy import load_file, save_file

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

MODELS = ("tinyllama", "tinyllama_int4")
NAMES = ("narrow", "mixed")


@dataclass(frozen=True)
class Served:
    """A model with slots as it is served, and adapters for it."""

    name: str
    base: oa.Model
    adapted: oa.Model
    model: og.Model
    adapters: og.Adapters


def _serve(name: str, folder: Path) -> Served:
    base = oa.open_model(FOLDER / name / "model.onnx")
    adapted = oa.insert(base, after=PLACES)
    model = og.Model(str(put(adapted, folder / "adapted")))
    adapters = og.Adapters(model)
    for each in NAMES:
        path = oa.save_adapter(bottlenecks(each), folder / f"{each}.onnx_adapter")
        adapters.load(str(path), each)
    return Served(name, base, adapted, model, adapters)


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return _serve(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The float32 model, that PyTorch's numbers are for."""
    return _serve("tinyllama", tmp_path_factory.mktemp("exact"))


def _same(found: Text, wanted: Text) -> None:
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=1e-4)
    assert found.tokens == wanted.tokens


def test_a_model_whose_slots_are_off_generates_what_the_base_generates(
    served: Served,
) -> None:
    base = generate(og.Model(str(FOLDER / served.name)))
    before = generate(served.model)
    generate(served.model, served.adapters, "mixed")
    after = generate(served.model)
    assert before.tokens == after.tokens == base.tokens
    np.testing.assert_array_equal(before.logits, base.logits)
    np.testing.assert_array_equal(after.logits, base.logits)


def test_with_slots_off_it_generates_what_pytorch_generates(exact: Served) -> None:
    _same(generate(exact.model), by_pytorch("base"))


@pytest.mark.parametrize("name", NAMES)
def test_a_bottleneck_adapter_generates_what_pytorch_generates(
    exact: Served, name: str
) -> None:
    _same(generate(exact.model, exact.adapters, name), by_pytorch(name))


def test_a_module_path_means_the_same_slots_in_every_precision() -> None:
    names = []
    for name in MODELS:
        base = oa.open_model(FOLDER / name / "model.onnx")
        names.append([slot.name for slot in oa.list_slots(oa.insert(base, after=PLACES))])
    assert names[0] == names[1]
    assert sorted(names[0]) == sorted(bottlenecks("mixed").weights)


def test_each_slot_may_have_a_bottleneck_of_its_own() -> None:
    sizes = [parts["down"].shape[1] for parts in bottlenecks("mixed").weights.values()]
    assert sorted(sizes) == [2, 4, 8, 16]


def test_adapters_change_the_text_and_do_so_every_time(served: Served) -> None:
    texts = [generate(served.model).tokens]
    texts += [generate(served.model, served.adapters, name).tokens for name in NAMES]
    assert len({tuple(text) for text in texts}) == 3
    for name, text in zip(NAMES, texts[1:], strict=True):
        assert generate(served.model, served.adapters, name).tokens == text


def test_generators_side_by_side_each_have_their_own_adapter(served: Served) -> None:
    choices: list[tuple[str, ...]] = [(), ("narrow",), ("mixed",), ("narrow",)]
    alone = [generate(served.model, served.adapters, *names).tokens for names in choices]
    made = [start(served.model, served.adapters, *names) for names in choices]
    for _ in range(STEPS):
        for each in made:
            step(each)
    assert [written(each) for each in made] == alone


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_generates_what_the_same_weights_baked_in_generate(
    served: Served, name: str, tmp_path: Path
) -> None:
    baked = oa.bake(oa.fill(served.adapted, bottlenecks(name, served.adapted)))
    model = og.Model(str(put(baked, tmp_path / "baked")))
    _same(generate(served.model, served.adapters, name), generate(model))


def test_the_slots_compute_the_formula_and_nothing_else_changed(served: Served) -> None:
    ids = PROMPT[None].astype(np.int64)
    past = {
        f"past_key_values.{layer}.{half}": np.zeros((1, 2, 0, 16), np.float32)
        for layer in range(2)
        for half in ("key", "value")
    }
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
    report = oa.verify(served.base, served.adapted, inputs=feeds)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_of_two_adapters_the_last_one_is_in_force(exact: Served) -> None:
    _same(generate(exact.model, exact.adapters, "narrow", "mixed"), by_pytorch("mixed"))


def test_an_adapter_that_comes_after_the_prompt_comes_late(exact: Served) -> None:
    late = start(exact.model)
    late.set_active_adapter(exact.adapters, "narrow")
    np.testing.assert_allclose(step(late), by_pytorch("base").logits[0], rtol=0, atol=1e-4)


def test_an_adapter_can_be_unloaded_only_when_no_generator_has_it(tmp_path: Path) -> None:
    served = _serve("tinyllama", tmp_path)
    user = start(served.model, served.adapters, "narrow")
    with pytest.raises(RuntimeError, match="in use"):
        served.adapters.unload("narrow")
    del user
    served.adapters.unload("narrow")


@pytest.mark.parametrize("name", MODELS)
def test_a_peft_lora_goes_onto_the_packed_projections_of_the_builder(
    name: str, tmp_path: Path
) -> None:
    base = oa.open_model(FOLDER / name / "model.onnx")
    checkpoint = oa.load_checkpoint(FOLDER / "lora", base)
    adapted = oa.insert_checkpoint(base, checkpoint)
    model = og.Model(str(put(adapted, tmp_path / "adapted")))
    adapters = og.Adapters(model)
    path = oa.save_adapter(checkpoint.adapter, tmp_path / "lora.onnx_adapter")
    adapters.load(str(path), "lora")
    on = generate(model, adapters, "lora")
    off = generate(model)
    assert off.tokens == generate(og.Model(str(FOLDER / name))).tokens != on.tokens
    if name == "tinyllama":
        _same(on, by_pytorch("lora"))
    baked = oa.insert_checkpoint(base, checkpoint, baked=True)
    _same(generate(og.Model(str(put(baked, tmp_path / "baked")))), on)


@pytest.mark.parametrize("name", MODELS)
def test_insert_proves_a_model_of_the_builder_without_being_given_inputs(name: str) -> None:
    base = oa.open_model(FOLDER / name / "model.onnx")
    report = oa.verify(base, oa.insert(base, after=PLACES))
    assert report.passed, [check for check in report.checks if not check.passed]


def test_an_adapter_with_the_sizes_of_the_wrong_packed_projection_is_refused(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(FOLDER / "lora", folder)
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(name for name in weights if name.endswith("k_proj.lora_B.weight"))
    weights[key] = weights[key.replace("k_proj", "q_proj")]
    save_file(weights, folder / "adapter_model.safetensors")
    base = oa.open_model(FOLDER / "tinyllama" / "model.onnx")
    with pytest.raises(CheckpointError, match=r"k_proj.*do not fit"):
        oa.load_checkpoint(folder, base)
