"""Adapters go back into the files of their libraries: what is read again is the same."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.checkpoints.readers.table import read_saved
from onnx_adapt.errors import CheckpointError, SaveError

Adapted = tuple[oa.Model, oa.Model, oa.Adapter]


def adapted(name: str) -> Adapted:
    case = CASES[name]
    base = oa.open_model(case.base)
    trained = oa.load_checkpoint(case.adapter, base)
    return base, oa.insert_checkpoint(base, trained), trained.adapter


def assert_equal(one: oa.Adapter, other: oa.Adapter) -> None:
    assert one.activations == other.activations
    ours, theirs = one.feeds(), other.feeds()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_allclose(theirs[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


PEFT = [
    "peft_bert_lora_default_ts", "peft_bert_lora_patterns", "peft_bert_lora_bias_all",
    "peft_bert_lora_bias", "peft_bert_dora", "peft_bert_dora_embedding", "peft_bert_ia3",
    "peft_bert_lora_embedding", "peft_albert_dora_ts", "peft_convnet_dora", "peft_convnet_ia3",
    "peft_convnet_lora_groups", "peft_convnet_lora_dilated", "peft_gpt2_dora_dynamo",
    "peft_bert_optimised_lora_patterns", "peft_bert_optimised_dora", "peft_bert_optimised_ia3",
    "peft_llama_lora_embedding_norm", "peft_repeated_lora_ts",
]  # fmt: skip
ADAPTERHUB = [
    "ah_bert_adapterplus", "ah_bert_compacter", "ah_bert_dora_output", "ah_bert_factors",
    "ah_bert_double_seq_bn_inv_ts", "ah_bert_ia3", "ah_bert_leave_out", "ah_bert_ln_before",
    "ah_bert_ln_after_residual", "ah_bert_lora", "ah_bert_lora_gating", "ah_bert_post_add",
    "ah_bert_par_bn_ln_after", "ah_bert_residual_after_ln", "ah_distilbert_double_seq_bn",
    "ah_gpt2_lora", "ah_gpt2_lora_k", "ah_gpt2_ia3", "ah_gpt2_flags", "ah_llama_lora",
    "ah_roberta_seq_bn", "ah_vit_par_bn",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "library"),
    [*((name, "peft") for name in PEFT), *((name, "adapterhub") for name in ADAPTERHUB)],
)
def test_an_adapter_written_for_its_library_is_read_again_as_it_was(
    name: str, library: str, tmp_path: Path
) -> None:
    base, model, adapter = adapted(name)
    folder = oa.save_checkpoint(adapter, tmp_path / "back", model=model, library=library)
    assert_equal(adapter, oa.load_checkpoint(folder, base, name=adapter.name).adapter)


def test_lora_of_adapterhub_goes_to_peft_and_that_of_peft_to_adapterhub(
    tmp_path: Path,
) -> None:
    for name, library in (
        ("ah_bert_lora", "peft"),
        ("peft_bert_lora_default_ts", "adapterhub"),
    ):
        base, model, adapter = adapted(name)
        folder = tmp_path / library
        oa.save_checkpoint(adapter, folder, model=model, library=library)
        assert_equal(adapter, oa.load_checkpoint(folder, base, name=adapter.name).adapter)


@pytest.mark.parametrize("name", ["ah_bert_double_seq_bn_inv_ts", "ah_bert_ln_before"])
def test_the_tensors_are_those_that_the_library_wrote(name: str, tmp_path: Path) -> None:
    _, model, adapter = adapted(name)
    folder = oa.save_checkpoint(adapter, tmp_path / "back", model=model, library="adapterhub")
    theirs, ours = read_saved(CASES[name].adapter), read_saved(folder)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.head.keys() == theirs.head.keys()
    for key, value in {**theirs.tensors, **theirs.head}.items():
        np.testing.assert_array_equal({**ours.tensors, **ours.head}[key], value)
    for key in ("original_ln_before", "reduction_factor", "mh_adapter", "inv_adapter"):
        assert ours.config["config"][key] == theirs.config["config"][key]


def test_the_scale_of_lora_is_in_b(tmp_path: Path) -> None:
    name = "peft_bert_lora_patterns"
    _, model, adapter = adapted(name)
    folder = oa.save_checkpoint(adapter, tmp_path / "back", model=model, library="peft")
    theirs, ours = read_saved(CASES[name].adapter), read_saved(folder)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.config["rank_pattern"] == ours.config["alpha_pattern"]
    assert ours.config["lora_alpha"] == ours.config["r"]
    ratios = []
    for key, value in theirs.tensors.items():
        if "lora_A" in key:
            np.testing.assert_array_equal(ours.tensors[key], value)
        elif "lora_B" in key:
            found = ours.tensors[key] / value
            ratios.append(float(np.median(found)))
            np.testing.assert_allclose(found, ratios[-1], rtol=1e-4)
    assert len(np.unique(np.round(ratios, 3))) > 1  # alpha / r differs by module in this case


def products(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What LoRA adds to the weight of each module `(out, in)`, by PEFT's formula."""
    a = {key: value for key, value in tensors.items() if ".lora_A." in key}
    return {
        key.removeprefix("base_model.model.").partition(".lora_")[0]: 4.0
        * tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
        @ value.astype(np.float64)
        for key, value in a.items()
    }


def test_mlx_adds_what_peft_adds(tmp_path: Path) -> None:
    name = "peft_llama_lora_qv_dynamo"
    _, model, adapter = adapted(name)
    folder = oa.save_checkpoint(adapter, tmp_path / "back", model=model, library="mlx")
    saved = read_saved(CASES[name].adapter)
    assert saved.config["lora_alpha"] == 4 * saved.config["r"]
    settings = json.loads((folder / "adapter_config.json").read_text())
    keys = settings["lora_parameters"].pop("keys")
    assert keys == ["self_attn.q_proj", "self_attn.v_proj"]
    assert settings["lora_parameters"] == {"rank": 4, "scale": 1.0, "dropout": 0.0}
    written = load_file(folder / "adapters.safetensors")
    expected = products(saved.tensors)
    assert written.keys() == {f"{m}.lora_{half}" for m in expected for half in "ab"}
    for module, value in expected.items():  # y += scale * (x @ lora_a) @ lora_b
        found = written[f"{module}.lora_a"] @ written[f"{module}.lora_b"]
        np.testing.assert_allclose(found.T, value, rtol=0, atol=1e-5)


def test_kohya_adds_what_peft_adds_under_names_with_underscores(tmp_path: Path) -> None:
    name = "peft_bert_dora"
    _, model, adapter = adapted(name)
    file = tmp_path / "style.safetensors"
    oa.save_checkpoint(
        adapter, file, model=model, library="kohya", module_map={"bert": "lora_te.bert"}
    )
    written, saved = load_file(file), read_saved(CASES[name].adapter).tensors
    module = "bert.encoder.layer.0.attention.output.dense"
    key = f"lora_te_{module.replace('.', '_')}"
    assert written[f"{key}.alpha"] == len(written[f"{key}.lora_down.weight"])
    magnitude = saved[f"base_model.model.{module}.lora_magnitude_vector"]
    np.testing.assert_allclose(written[f"{key}.dora_scale"][:, 0], magnitude, rtol=1e-5)
    down = saved[f"base_model.model.{module}.lora_A.weight"]
    np.testing.assert_array_equal(written[f"{key}.lora_down.weight"], down)


REFUSED = [
    ("ah_bert_seq_bn", "peft", "is a bottleneck: PEFT has no method that computes it"),
    ("ah_bert_seq_bn", "mlx", "MLX-LM has LoRA and DoRA only"),
    ("ah_bert_seq_bn", "kohya", "kohya's files have LoRA only"),
    ("ah_bert_double_seq_bn_inv_ts", "peft", "PEFT has no method that computes it"),
    ("ah_bert_lora_gating", "peft", "it has a gate, which PEFT does not"),
    ("ah_bert_lora_gating", "mlx", "it has a gate, which MLX-LM's LoRA does not"),
    ("ah_bert_dora", "peft", "its scale covers the bias of the layer"),
    ("peft_bert_dora", "adapterhub", "AdapterHub has none on"),
    ("peft_gpt2_dora_dynamo", "adapterhub", "does not cover the bias of the layer"),
    ("peft_bert_lora_bias", "adapterhub", "it has a bias, which AdapterHub's LoRA does not"),
    ("peft_bert_lora_default_ts", "mlx", "is a trained weight of the base: MLX-LM has"),
    ("peft_convnet_lora", "mlx", "MLX-LM has no LoRA on a convolution"),
    ("peft_llama_ia3", "adapterhub", "it scales the input, and AdapterHub's IA3"),
    ("peft_llama_lora_qv_dynamo", "kohya", "is in no UNet or text encoder"),
    (
        "peft_recurrent_ts_gru",
        "peft",
        "is on the parameter 'onnx::GRU_497' of node '/gru/GRU'",
    ),
    ("peft_convnet_lora", "adapterhub", "of none of the model types that AdapterHub has"),
]


@pytest.mark.parametrize(("name", "library", "reason"), REFUSED)
def test_what_a_library_cannot_express_is_refused_by_name_and_nothing_is_written(
    name: str, library: str, reason: str, tmp_path: Path
) -> None:
    _, model, adapter = adapted(name)
    with pytest.raises(CheckpointError) as caught:
        oa.save_checkpoint(adapter, tmp_path / "x.safetensors", model=model, library=library)
    assert reason in caught.value.message
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_library_is_refused(tmp_path: Path) -> None:
    _, model, adapter = adapted("peft_bert_lora_default_ts")
    with pytest.raises(CheckpointError, match="no writer for 'keras'"):
        oa.save_checkpoint(adapter, tmp_path / "x", model=model, library="keras")


def test_two_stacked_adapters_are_not_written_as_one(tmp_path: Path) -> None:
    case = CASES["ah_bert_double_seq_bn"]
    base = oa.open_model(case.base)
    one = oa.load_checkpoint(case.adapter, base, name="one")
    below = oa.insert_checkpoint(base, one)
    other = oa.load_checkpoint(CASES["ah_bert_seqbn_dynamo"].adapter, base)
    assert other.adapter.weights
    again = CASES["ah_bert_residual_after_ln"]
    top = oa.load_checkpoint(again.adapter, below, name="two")
    model = oa.insert_checkpoint(below, top)
    both = oa.make_adapter(model, "both", {**one.adapter.weights, **top.adapter.weights})
    with pytest.raises(CheckpointError, match="both change module"):
        oa.save_checkpoint(both, tmp_path / "x", model=model, library="adapterhub")
    alone = oa.save_checkpoint(
        top.adapter, tmp_path / "two", model=model, library="adapterhub"
    )
    assert_equal(top.adapter, oa.load_checkpoint(alone, below, name="two").adapter)


def test_a_folder_with_files_is_not_written_into(tmp_path: Path) -> None:
    _, model, adapter = adapted("peft_bert_lora_default_ts")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(SaveError, match=r"has adapter_model\.bin in it"):
        oa.save_checkpoint(adapter, tmp_path, model=model, library="peft")
    with pytest.raises(SaveError, match="is a file, and PEFT loads a folder"):
        oa.save_checkpoint(
            adapter, tmp_path / "adapter_model.bin", model=model, library="peft"
        )
