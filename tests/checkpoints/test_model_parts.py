"""Adapters of one part of a model meet graphs of that part and of others, exported alone.

The answers in tests/parts are PyTorch's; `tools/make_part_cases.py` made them.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import onnx_adapt as oa
from onnx_adapt.checkpoints.modules.model_parts import parts_of
from onnx_adapt.checkpoints.modules.names import map_modules
from onnx_adapt.errors import CheckpointError

PARTS = Path(__file__).parent.parent / "parts"
RIGHT = [
    # The graph tells what it is: by the exporter's class name, by its cross-attention, by
    # the name of its input.
    ("whisper.encoder_dynamo", "encoder"),
    ("whisper.decoder", "decoder"),
    ("t5.decoder", "decoder"),
    ("clip.vision", "vision"),
    ("clip.text", "text"),
    ("llava.language", "language"),
]
UNCLEAR = [
    ("whisper.encoder", "encoder"),
    ("t5.encoder", "encoder"),
    ("llava.vision", "vision"),
]
WRONG = [
    ("whisper.encoder", "decoder"),
    ("whisper.encoder_dynamo", "decoder"),
    ("whisper.decoder", "encoder"),
    ("t5.encoder", "decoder"),
    ("t5.decoder", "encoder"),
    ("clip.vision", "text"),
    ("clip.text", "vision"),
    ("llava.vision", "language"),
    ("llava.language", "vision"),
]


def _folder(graph: str, part: str) -> Path:
    return PARTS / f"{graph.partition('.')[0]}.{part}.adapter"


def _refused(graph: str, folder: Path, weights: Path | None = None) -> CheckpointError:
    model = oa.open_model(PARTS / f"{graph}.onnx")
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(folder, model, base_weights=weights)
    return caught.value


def _assert_right(
    graph: str, trained_part: str, folder: Path, weights: Path | None = None, **chosen: Any
) -> None:
    base = oa.open_model(PARTS / f"{graph}.onnx")
    trained = oa.load_checkpoint(folder, base, base_weights=weights, **chosen)
    with np.load(PARTS / f"{graph}.npz") as stored:
        arrays = dict(stored)
    feeds = {k.removeprefix("input."): v for k, v in arrays.items() if k.startswith("input.")}
    expected = arrays[f"adapter.{trained_part}"]
    assert np.abs(expected - arrays["base"]).max() > 0.1
    with oa.AdapterSession(oa.insert_checkpoint(base, trained)) as session:
        found = session.run(feeds, adapter=trained.adapter)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("graph", "part"), RIGHT)
def test_an_adapter_of_the_part_that_the_graph_shows_itself_to_be_is_right(
    graph: str, part: str
) -> None:
    _assert_right(graph, part, _folder(graph, part))


@pytest.mark.parametrize(("graph", "part"), WRONG + UNCLEAR)
def test_an_adapter_of_a_part_that_the_graph_does_not_name_is_refused(
    graph: str, part: str
) -> None:
    error = _refused(graph, _folder(graph, part))
    assert re.search(rf"'{part}(_model|_tower)?'", error.message)
    shows = "graph shows by its class or inputs" in error.message
    assert ("export the part" if shows else "--base-weights") in error.hint


def _renamed(source: Path, folder: Path, prefix: str, replacement: str) -> Path:
    """The checkpoint with another prefix before its modules, and only those that had it."""
    folder.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    old, new = (f"base_model.model.{text}" for text in (prefix, replacement))
    kept = {new + k.removeprefix(old): v for k, v in tensors.items() if k.startswith(old)}
    save_file(kept, folder / "adapter_model.safetensors")
    config = (source / "adapter_config.json").read_text(encoding="utf-8")
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("graph", "part", "prefix"),
    [
        ("whisper.encoder", "encoder", "model.encoder."),
        ("t5.encoder", "encoder", "encoder."),
        ("llava.vision", "vision", "model.vision_tower."),
    ],
)
def test_the_part_that_the_hint_names_is_taken(
    graph: str, part: str, prefix: str, tmp_path: Path
) -> None:
    source, named = _folder(graph, part), prefix.removesuffix(".")
    assert f"--part {named};" in _refused(graph, source).hint
    _assert_right(graph, part, source, part=named)
    _assert_right(graph, part, source, module_map={named: ""})
    _assert_right(graph, part, _renamed(source, tmp_path / "cut", prefix, ""))


@pytest.mark.parametrize("graph", ["whisper.encoder", "whisper.encoder_dynamo"])
def test_a_part_of_a_checkpoint_of_both_is_right(graph: str, tmp_path: Path) -> None:
    _assert_right(graph, "encoder", _of_both(tmp_path / "both"), part="model.encoder")


def test_a_part_does_not_go_into_a_graph_that_names_another(tmp_path: Path) -> None:
    model = oa.open_model(PARTS / "whisper.decoder.onnx")
    with pytest.raises(CheckpointError, match="no module of the checkpoint is in the graph"):
        oa.load_checkpoint(_of_both(tmp_path / "both"), model, part="model.encoder")


@pytest.mark.parametrize(
    ("chosen", "message", "hint"),
    [
        ({"part": "model.encode"}, "under 'model.encode'", "model.decoder, model.encoder"),
        ({"module_map": {"model.encode": "x"}}, "begins with 'model.encode'", "model.encoder"),
        ({"module_map": {"model.encoder": "model.decoder"}}, "one name", "--part"),
    ],
)
def test_a_part_or_a_map_that_fits_no_module_is_refused_with_those_there_are(
    chosen: dict, message: str, hint: str, tmp_path: Path
) -> None:
    model = oa.open_model(PARTS / "whisper.encoder.onnx")
    with pytest.raises(CheckpointError, match=message) as caught:
        oa.load_checkpoint(_of_both(tmp_path / "both"), model, **chosen)
    assert hint in caught.value.hint


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_weights_of_the_whole_model_tell_the_part_by_value(part: str) -> None:
    weights = PARTS / "whisper.safetensors"
    _assert_right(f"whisper.{part}", part, _folder("whisper", part), weights)
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    error = _refused(f"whisper.{part}", _folder("whisper", other), weights)
    assert "is not in the graph" in error.message


def test_the_weights_of_a_part_do_not_name_it(tmp_path: Path) -> None:
    whole = load_file(PARTS / "whisper.safetensors")
    own = {
        key.removeprefix("model.encoder."): value
        for key, value in whole.items()
        if key.startswith("model.encoder.")
    }
    save_file(own, tmp_path / "encoder.safetensors")
    error = _refused(
        "whisper.encoder", _folder("whisper", "decoder"), tmp_path / "encoder.safetensors"
    )
    assert "'decoder'" in error.message
    assert "encoder.safetensors" in error.message


def _of_both(folder: Path) -> Path:
    _renamed(_folder("whisper", "encoder"), folder, "model.encoder.", "model.encoder.")
    one = load_file(folder / "adapter_model.safetensors")
    two = load_file(_folder("whisper", "decoder") / "adapter_model.safetensors")
    save_file({**one, **two}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_of_both_parts_is_refused_with_the_part_that_is_missing(
    tmp_path: Path,
) -> None:
    both = _of_both(tmp_path / "both")
    error = _refused("whisper.encoder_dynamo", both)
    assert "modules of the checkpoint are of 'decoder'" in error.message
    assert "--part model.encoder;" in error.hint
    _assert_right("whisper.encoder_dynamo", "encoder", both, part="model.encoder")


def test_an_adapter_of_both_parts_is_refused_with_both_if_the_graph_names_none(
    tmp_path: Path,
) -> None:
    error = _refused("whisper.encoder", _of_both(tmp_path / "both"))
    assert "'encoder'" in error.message
    assert "'decoder'" in error.message


BODY = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]


def _found(theirs: str, ours: str, body: list[str] = BODY, kind: str = "") -> bool:
    wanted = [theirs + name for name in body]
    expected = dict(zip(wanted, (ours + name for name in body), strict=True))
    found = map_modules(wanted, [*expected.values(), f"{ours}norm"], kind=kind)
    assert found in ({}, expected)
    return bool(found)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.decoder.", "decoder."),
        ("decoder.", "model.decoder."),
        ("model.decoder.", "wrapper.decoder."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.vision_model.encoder.", "vision_model.encoder."),
        ("model.visual.", "vision_tower."),
        ("transformer.", ""),
        ("roberta.", ""),
        ("model.", ""),
        ("backbone.", ""),
        ("encoder.encoder.", "encoder."),
    ],
)
def test_a_prefix_that_names_no_part_or_that_of_the_graph_may_go(
    theirs: str, ours: str
) -> None:
    assert _found(theirs, ours)


@pytest.mark.parametrize(
    ("theirs", "ours", "first", "kind"),
    [
        ("transformer.", "", "h.0.attn.c_attn", ""),
        ("transformer.", "model.", "h.0.attn.c_attn", ""),
        ("backbone.", "", "layers.0.mixer.in_proj", ""),
        ("bert.encoder.", "", "layer.0.attention.self.query", ""),
        ("encoder.", "", "layer.0.attention.self.query", "roberta"),
        ("vit.encoder.", "inner.", "layer.0.attention.attention.query", ""),
    ],
)
def test_the_only_stack_of_an_architecture_is_no_part(
    theirs: str, ours: str, first: str, kind: str
) -> None:
    assert _found(theirs, ours, [first, first.replace(".0.", ".1.")], kind)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.", ""),
        ("model.decoder.", ""),
        ("text_encoder.", ""),
        ("text_encoder_2.", "text_encoder."),
        ("text_decoder.", "text_model."),
        ("question_encoder.bert_model.encoder.", "encoder."),
        ("ctx_encoder.", ""),
        ("student.", ""),
        ("generator.", "discriminator."),
        ("decoder.bert.", "bert."),
        ("unet.", ""),
        ("talker.model.", "model."),
        ("vision_tower.vision_model.encoder.", "model."),
        ("image_encoder.", "text_model."),
        ("mask_decoder.", ""),
    ],
)
def test_a_prefix_that_names_a_part_does_not_go(theirs: str, ours: str) -> None:
    assert not _found(theirs, ours)


def test_the_transformer_of_diffusers_is_a_part_and_gpt2s_is_none() -> None:
    assert parts_of("transformer.transformer_blocks.0.attn") == {"transformer": "transformer"}
    assert parts_of("transformer.h.0.attn") == {}


def test_names_that_line_up_are_the_mapping_whatever_they_name() -> None:
    wanted = [f"model.decoder.{name}" for name in BODY]
    known = [*wanted, *(f"model.encoder.{name}" for name in BODY)]
    assert map_modules(wanted, known) == {name: name for name in wanted}
