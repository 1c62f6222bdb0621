"""Adapters for image generation, of every library, compute what PyTorch computes with them."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_models import safetensors_file, saved_model
from diffusion_cases import (
    GRAPHS,
    HOME,
    PIPELINE,
    TOLERANCE,
    base,
    distance,
    feeds,
    file_of,
    first_output,
    renamed,
)
from slot_models import cli
from trained_cases import ROOT

import onnx_adapt as oa
from onnx_adapt.checkpoints.modules.original_names import unet_in_diffusers
from onnx_adapt.checkpoints.modules.underscored import spelled
from onnx_adapt.errors import AdapterError, CheckpointError
from onnx_adapt.model.tensors import read_tensor

CASES = [
    *(("locon", graph) for graph in ("unet", "text_encoder")),
    *((case, "unet") for case in ("dora", "dora_by_input", "loha", "lokr", "full")),
    *(("diffusers", graph) for graph in ("unet", "text_encoder")),
    ("diffusers_flux", "transformer"),
    ("before_peft", "unet"),
    ("flux", "transformer"),
]


@pytest.mark.parametrize(("case", "graph"), CASES)
def test_a_model_with_the_adapter_computes_what_pytorch_does(case: str, graph: str) -> None:
    model = base(graph)
    trained = oa.load_checkpoint(file_of(case), model)
    swappable = oa.insert_checkpoint(model, trained)
    filled = oa.fill(swappable, trained.adapter)
    assert distance(first_output(filled, graph), case, graph) < TOLERANCE
    baked = oa.insert_checkpoint(model, trained, baked=True)
    assert distance(first_output(baked, graph), case, graph) < TOLERANCE


def test_swapping_an_image_adapter_in_and_out_is_proven() -> None:
    model = base("unet")
    trained = oa.load_checkpoint(file_of("locon"), model)
    adapted = oa.insert_checkpoint(model, trained)
    oa.verify(model, adapted, inputs=[feeds("unet")]).raise_for_mismatch()
    assert (
        distance(first_output(adapted, "unet", trained.adapter), "locon", "unet") < TOLERANCE
    )


def test_a_pipeline_takes_an_adapter_part_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapted"
    command = ("insert", PIPELINE, "--adapter", file_of("locon"), "-o", out)
    code, _, err = cli(capsys, *map(str, command))
    assert code == 0, err
    assert (out / "model_index.json").exists()
    for graph in ("unet", "text_encoder"):
        path = out / graph / "model.onnx"
        found = first_output(path, graph, out / "locon.safetensors")
        assert distance(found, "locon", graph) < TOLERANCE
    assert not oa.list_slots(oa.open_model(out / "vae_decoder" / "model.onnx"))


def test_a_pipeline_can_have_an_adapter_baked_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "baked"
    command = ("insert", PIPELINE, "--adapter", file_of("diffusers"), "-o", out, "--baked")
    code, _, err = cli(capsys, *map(str, command))
    assert code == 0, err
    for graph in ("unet", "text_encoder"):
        found = first_output(out / graph / "model.onnx", graph)
        assert distance(found, "diffusers", graph) < TOLERANCE


def _of_two_encoders(tensors: dict[str, Any]) -> dict[str, Any]:
    """As SDXL has it: an adapter of two text encoders, the second's twice as strong."""
    own = {key: value for key, value in tensors.items() if "lora_te_" in key}
    first = {key.replace("lora_te_", "lora_te1_"): value for key, value in own.items()}
    second = {
        key.replace("lora_te_", "lora_te2_"): np.asarray(value * (1 + key.endswith(".alpha")))
        for key, value in own.items()
    }
    return first | second


def test_two_text_encoders_are_told_apart_by_part_or_by_folder(tmp_path: Path) -> None:
    path = renamed(file_of("locon"), tmp_path / "style.safetensors", _of_two_encoders)
    model = base("text_encoder")
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(path, model)
    assert "may be each of text_encoder, text_encoder_2" in caught.value.message
    one, two = (oa.load_checkpoint(path, model, part=part).adapter for part in ENCODERS)
    for part in ENCODERS:
        (tmp_path / "pipeline" / part).mkdir(parents=True)
        shutil.copy(GRAPHS["text_encoder"], tmp_path / "pipeline" / part / "model.onnx")
    made = oa.insert_folder(tmp_path / "pipeline", path).adapter
    assert len(made.weights) == len(one.weights) + len(two.weights)
    for slot, parts in one.weights.items():
        first, second = (made.weights[f"{part}.{slot}"]["up"] for part in ENCODERS)
        np.testing.assert_array_equal(first, parts["up"])
        np.testing.assert_allclose(second, 2 * first, rtol=1e-6)


def test_of_two_encoders_that_fit_the_one_that_fits_whole_is_meant(tmp_path: Path) -> None:
    def longer(tensors: dict[str, Any]) -> dict[str, Any]:
        both = _of_two_encoders(tensors)
        more = {k.replace("layers_0", "layers_1"): v for k, v in both.items() if "te2" in k}
        return both | more

    path = renamed(file_of("locon"), tmp_path / "style.safetensors", longer)
    model = base("text_encoder")
    found, wanted = (
        oa.load_checkpoint(path, model, part=part).adapter for part in ("", "text_encoder")
    )
    for name, value in wanted.feeds().items():
        np.testing.assert_array_equal(found.feeds()[name], value)


ENCODERS = ("text_encoder", "text_encoder_2")


def test_what_a_graph_is_not_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        oa.load_checkpoint(file_of("locon"), base("text_encoder"))
    assert "left out 41 modules of unet" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        oa.load_checkpoint(file_of("locon"), base("text_encoder"), part="text_encoder")
    assert not caplog.text


def test_convert_reads_a_single_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = base("text_encoder")
    adapted = oa.insert_checkpoint(model, oa.load_checkpoint(file_of("locon"), model))
    path = oa.save_model(adapted, tmp_path / "adapted.onnx").path
    out = tmp_path / "style.onnx_adapter"
    command = ("convert", file_of("locon"), "--for", path, "-o", out)
    code, _, err = cli(capsys, *map(str, command))
    assert code == 0, err
    assert oa.load_adapter(out).name == "style"


# Names.


def test_names_of_sdxl_are_those_that_diffusers_gives_them() -> None:
    names = json.loads((HOME / "names.json").read_text(encoding="utf-8"))
    assert len(names) > 100
    known = list(names.values())
    assert spelled([f"unet.{name}" for name in names], known) == {
        f"unet.{name}": f"unet.{path}" for name, path in names.items()
    }
    for name, path in names.items():
        assert unet_in_diffusers(name) == path.replace(".", "_")


def test_text_that_is_two_modules_of_the_graph_is_refused_with_both() -> None:
    known = ["blocks.0.to_q", "blocks.0_to.q"]
    with pytest.raises(CheckpointError) as caught:
        spelled(["unet.blocks_0_to_q"], known)
    assert all(path in caught.value.message for path in known)
    assert "--map" in caught.value.hint


@pytest.mark.parametrize("around", ["model.", "wrapper.unet."])
def test_a_wrapper_around_the_exported_model_makes_no_difference(around: str) -> None:
    known = [f"{around}down_blocks.0.attentions.0.proj_in", f"{around}mid_block.conv_in"]
    found = spelled(
        ["unet.down_blocks_0_attentions_0_proj_in", "unet.mid_block_conv_in"], known
    )
    assert list(found.values()) == [
        "unet.down_blocks.0.attentions.0.proj_in",
        "unet.mid_block.conv_in",
    ]


def test_a_word_that_only_the_checkpoint_has_makes_no_difference() -> None:
    found = spelled(
        ["text_encoder.text_model_encoder_layers_0_mlp_fc1"], ["encoder.layers.0.mlp.fc1"]
    )
    assert list(found.values()) == ["text_encoder.encoder.layers.0.mlp.fc1"]


SPELLINGS = {
    "ComfyUI": lambda key: re.sub(
        r"^lora_unet_(.*)\.lora_(down|up)", r"diffusion_model.\1.lora_\2", key
    ),
    "PEFT's names": lambda key: key.replace("lora_down", "lora_A").replace(
        "lora_up", "lora_B"
    ),
    "LyCORIS of one model": lambda key: key.replace("lora_unet_", "lycoris_"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_adapter_in_another_spelling_is_the_same(spelling: str, tmp_path: Path) -> None:
    change = SPELLINGS[spelling]

    def respelled(tensors: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in tensors.items() if "lora_unet" in key}
        by_alpha = {}
        for key, value in kept.items():
            if key.endswith(".alpha"):
                continue
            if "lora_up" in key:  # without an alpha it is the rank, so it goes into B
                value = value * kept[key.replace("lora_up.weight", "alpha")] / 2
            by_alpha[change(key)] = value.astype(np.float32)
        return by_alpha

    path = renamed(file_of("locon"), tmp_path / "style.safetensors", respelled)
    model = base("unet")
    baked = oa.insert_checkpoint(model, oa.load_checkpoint(path, model), baked=True)
    assert distance(first_output(baked, "unet"), "locon", "unet") < TOLERANCE


# What is refused.


def test_an_adapter_for_an_image_model_on_a_bert_is_refused_by_both_names() -> None:
    bert = oa.open_model(ROOT / "bases" / "bert_torchscript" / "base.onnx")
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(file_of("locon"), bert)
    assert "is an adapter for Stable Diffusion; this graph is a BERT" in caught.value.message


def _without(name: str) -> Any:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        first = next(key for key in tensors if key.endswith(name))
        return {key: value for key, value in tensors.items() if key != first}

    return change


def _with(key: str, value: Any) -> Any:
    return lambda tensors: {**tensors, key: np.asarray(value, np.float32)}


def _each(name: str, change: Any) -> Any:
    return lambda tensors: {
        key: change(value) if key.endswith(name) else value for key, value in tensors.items()
    }


def _with_ghost(tensors: dict[str, Any]) -> dict[str, Any]:
    ghost = {
        f"lora_ghost_x.lora_{name}.weight": np.ones((2, 2), "f4") for name in ("up", "down")
    }
    return tensors | ghost


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DAMAGED = {
    "up is missing": (_without("lora_up.weight"), ["lora_up is not there"]),
    "down is missing": (_without("lora_down.weight"), ["lora_down is not there"]),
    "two methods": (_with(f"{Q}.hada_w1_a", np.ones((4, 2))), ["LoRA", "hada_w1_a"]),
    "alpha is NaN": (_each("alpha", lambda a: np.asarray(a * np.nan)), ["alpha", "NaN"]),
    "alpha is a list": (_each("alpha", lambda a: np.ones(3, "f4")), ["alpha has shape"]),
    "rank 0": (_each("lora_down.weight", lambda a: a[:0]), ["rank 0", "ZeRO-3"]),
    "NaN": (_each("lora_up.weight", lambda a: a * np.nan), ["NaN"]),
    "other sizes": (_each("lora_up.weight", lambda a: a[:-1]), ["do not fit"]),
    "a vector": (_each("lora_up.weight", lambda a: a.ravel()), ["has to be a matrix"]),
    "mid of other sizes": (_each("lora_mid.weight", lambda a: a[:1]), ["lora_mid"]),
    "an unknown tensor": (_with("bundle_emb.x.clip_l", np.ones(3)), ["bundle_emb", "kind"]),
    "modules of an unknown part": (_with_ghost, ["lora_ghost_x", "not in the graph"]),
    "a larger base": (_with(f"{Q}.reshape_weight", [8, 8]), ["reshape_weight"]),
    "no such module": (
        lambda tensors: {k.replace("attn1", "attn9"): v for k, v in tensors.items()},
        ["attn9", "not in the graph"],
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_adapter_is_refused_and_nothing_is_written(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = DAMAGED[what]
    path = renamed(file_of("locon"), tmp_path / "style.safetensors", change)
    out = tmp_path / "out.onnx"
    command = ("insert", GRAPHS["unet"], "--adapter", path, "-o", out, "--no-verify")
    code, printed, err = cli(capsys, *map(str, command))
    assert (code, printed) == (2, "")
    assert [word for word in words if word not in err] == []
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("case", ["locon", "flux", "diffusers", "before_peft"])
def test_where_an_adapter_file_is_wanted_it_is_said_how_to_make_one(case: str) -> None:
    path = file_of(case)
    path = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    with pytest.raises(AdapterError, match="an adapter for image generation") as caught:
        oa.load_adapter(path)
    assert f"`onnx-adapt convert {path.name} --for MODEL.onnx" in caught.value.hint


def test_numbers_of_eight_bits_are_read(tmp_path: Path) -> None:
    float8 = ml_dtypes.float8_e4m3fn

    def rounded(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: value.astype(float8).astype(np.float32) for key, value in tensors.items()}

    plain = renamed(file_of("locon"), tmp_path / "plain.safetensors", rounded)
    header, data, at = {}, b"", 0
    for key, value in safetensors.numpy.load_file(plain).items():
        raw = value.astype(float8).tobytes()
        places = [at, at + len(raw)]
        header[key] = {"dtype": "F8_E4M3", "shape": list(value.shape), "data_offsets": places}
        data, at = data + raw, at + len(raw)
    small = tmp_path / "small.safetensors"
    small.write_bytes(safetensors_file(json.dumps(header).encode(), data))
    model = base("unet")
    wanted, found = (
        oa.load_checkpoint(path, model).adapter.feeds() for path in (plain, small)
    )
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_fused_layer_whose_weight_is_computed_whole_is_cut_into_its_parts(
    tmp_path: Path,
) -> None:
    """`kron(w1, w2)` of ones is 1 in the rows of all three modules."""
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{key}.lokr_w1": np.ones((3, 1), "f4"),
        f"{key}.lokr_w2": np.ones((8, 8), "f4"),
    }
    path = renamed(file_of("flux"), tmp_path / "style.safetensors", lambda _: tensors)
    model = base("transformer")
    found = oa.load_checkpoint(path, model)
    added = {
        plan.weight.name.split(".")[-2]: found.adapter.replaced[plan.weight.name]
        - read_tensor(model, plan.default)
        for plan in found.replacements
    }
    assert sorted(added) == ["to_k", "to_q", "to_v"]
    for value in added.values():
        np.testing.assert_allclose(value, np.ones((8, 8)), atol=1e-6)


def test_metadata_of_diffusers_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {"unet.conv_in.lora_A.weight": np.ones((2, 4), np.float32)}
    for text in ("{", "[1]"):
        safetensors.numpy.save_file(tensors, path, {"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match="lora_adapter_metadata that is no JSON"):
            oa.load_checkpoint(path, base("unet"))


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    path, key = tmp_path / "sd.safetensors", "model.diffusion_model.input_blocks.0.0.weight"
    safetensors.numpy.save_file({key: np.ones((4, 4), np.float32)}, path)
    with pytest.raises(CheckpointError, match="no trained adapter"):
        oa.load_checkpoint(path, oa.open_model(saved_model(tmp_path / "model.onnx")))
