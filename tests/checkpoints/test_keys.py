"""Keys of checkpoints as trainers leave them: wrappers, training state, copies, names."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapter_models import W1, W2, lora, lora_on, peft_folder, saved_model, two_layers
from slot_models import cli

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
BEGINNING = "base_model.model."
Capture = pytest.CaptureFixture[str]


def _base() -> oa.Model:
    """`two_layers` inside `net.0`, so that a wrapper can stand between two words of a path."""
    proto = two_layers()
    for node in proto.graph.node:
        node.name = f"/net/net.0{node.name}"
    proto.graph.initializer[2].name = proto.graph.node[3].input[1] = "net.0.fc2.bias"
    return oa.Model(proto)


def _named(rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """LoRA on both layers, by the keys that a trainer writes for them."""
    tensors = {
        f"{BEGINNING}net.0.{key.removeprefix(BEGINNING)}": value
        for key, value in lora().items()
    }
    return {rename(key): value for key, value in tensors.items()}


def _given(folder: Path, base: oa.Model | None = None, **chosen: object) -> np.ndarray:
    base = base or _base()
    trained = oa.load_checkpoint(folder, base, **chosen)  # type: ignore[arg-type]
    with oa.AdapterSession(oa.insert_checkpoint(base, trained)) as session:
        return session.run({"x": X}, adapter=trained.adapter)["y"]


def _message(folder: Path, **chosen: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        _given(folder, **chosen)  # type: ignore[arg-type]
    return caught.value


RENAMES = {
    "FSDP": lambda key: key.replace("net.0.", "net.0._fsdp_wrapped_module."),
    "FSDP before 1.12": lambda key: key.replace("net.0.", "_fpw_module.net.0."),
    "checkpoint": lambda key: key.replace("fc1", "_checkpoint_wrapped_module.fc1"),
    "compile": lambda key: key.replace(BEGINNING, f"{BEGINNING}_orig_mod."),
    "compile around PEFT": lambda key: f"_orig_mod.{key}",
    "compile in PEFT": lambda key: key.replace("fc2", "fc2._orig_mod"),
    "Fabric": lambda key: f"_forward_module.{key}",
    "DDP": lambda key: f"module.{key}",
    "DDP in PEFT": lambda key: key.replace(BEGINNING, f"{BEGINNING}module."),
    "all of them": lambda key: "module._orig_mod." + key.replace(
        "net.0.", "_fsdp_wrapped_module.net.0._checkpoint_wrapped_module._orig_mod."
    ),
    "PEFT around PEFT": lambda key: BEGINNING + key,
    "no beginning": lambda key: key.removeprefix(BEGINNING),
    "a name of the adapter": lambda key: key.replace(".weight", ".my_adapter.weight"),
    "model. added": lambda key: key.replace(BEGINNING, f"{BEGINNING}model.model."),
}  # fmt: skip


@pytest.mark.parametrize("name", RENAMES)
def test_the_names_that_wrappers_leave_in_keys_do_not_count(name: str, tmp_path: Path) -> None:
    tensors = _named(RENAMES[name])
    assert tensors.keys() != _named(str).keys()
    found = _given(peft_folder(tmp_path / "a", tensors))
    np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)


def test_a_wrapper_in_a_pattern_of_the_configuration_does_not_count(tmp_path: Path) -> None:
    pattern = {r"net\.0\._orig_mod\.fc1": 4, "net.0._orig_mod.fc2": 4}
    folder = peft_folder(
        tmp_path / "a", _named(str), lora_alpha=400, alpha_pattern=pattern
    )  # else alpha is 400
    np.testing.assert_allclose(_given(folder), lora_on(X, lora()), 1e-4, 1e-4)


def test_a_weight_saved_with_a_wrapper_and_without_is_refused(tmp_path: Path) -> None:
    tensors = {**_named(str), **_named(lambda key: f"_orig_mod.{key}")}
    error = _message(peft_folder(tmp_path / "a", tensors))
    assert "are one weight of the model, 'base_model.model.net.0.fc1.lora" in error.message


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    one, two = (
        _named(lambda k, n=name: k.replace(".weight", f".{n}.weight")) for name in ("en", "de")
    )
    error = _message(peft_folder(tmp_path / "a", {**one, **two}))
    assert "holds several adapters" in error.message
    assert "lora_A of module 'net.0.fc1' twice" in error.message


STATE = {
    "base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq": "a buffer",
    "base_model.model.embeddings.position_ids": "a buffer",
    "optimizer.state.0.exp_avg": "a state of the training",
    "lr_scheduler.last_epoch": "a state of the training",
    "global_step": "a state of the training",
}


@pytest.mark.parametrize("key", STATE)
def test_what_has_no_effect_is_left_out_with_a_warning(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {**_named(str), key: np.ones(3, np.float32)}
    with caplog.at_level(logging.WARNING):
        found = _given(peft_folder(tmp_path / "a", tensors))
    np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)
    assert f"left out {key}: {STATE[key]}" in caplog.text


@pytest.mark.parametrize("rounded", [np.float32, np.float16])
def test_copies_of_the_base_s_weights_are_left_out_with_a_warning(
    rounded: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = {f"{BEGINNING}net.0.fc1.base_layer.weight": W1.astype(rounded)}
    with caplog.at_level(logging.WARNING):
        trained = oa.load_checkpoint(
            peft_folder(tmp_path / "a", {**_named(str), **copy}), _base()
        )
    assert not trained.replacements
    assert "left out base_layer.weight of net.0.fc1: the base has the same" in caplog.text


def test_a_base_layer_that_was_trained_is_no_copy(tmp_path: Path) -> None:
    key = f"{BEGINNING}net.0.fc2.base_layer.weight"
    changed = W2 * np.float32(1.02)
    found = _given(peft_folder(tmp_path / "a", {**_named(str), key: changed}))
    np.testing.assert_allclose(found, lora_on(X, lora(), w2=changed), 1e-4, 1e-4)


def test_a_value_head_alone_is_nothing_to_insert(tmp_path: Path) -> None:
    tensors = {"v_head.summary.weight": np.ones((1, 4), np.float32)}
    error = _message(peft_folder(tmp_path / "a", tensors))
    assert "no module of the checkpoint is in the graph" in error.message


def _with_more(folder: Path, *modules: str) -> Path:
    """LoRA on the two layers of the graph, and on modules that it lacks."""
    more = lora(modules=[f"net.0.{module}" for module in modules])
    return peft_folder(folder, {**_named(str), **more})


@pytest.mark.parametrize("glob", ["net.0.gate", "gate", "net.*.gate", "g*", "**gate"])
def test_a_module_that_may_be_missing_is_left_out_with_its_name(
    glob: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = _with_more(tmp_path / "a", "gate")
    assert "net.0.gate" in _message(folder).message
    with caplog.at_level(logging.WARNING):
        found = _given(folder, allow_missing=[glob])
    np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)
    assert f"left out net.0.gate: the graph lacks it, and {glob!r} allows that" in caplog.text


def test_a_module_that_the_graph_has_is_never_left_out_by_a_glob(tmp_path: Path) -> None:
    found = _given(_with_more(tmp_path / "a", "gate"), allow_missing=["**"])
    np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("glob", "hint"), [("fc1", "the graph has net.0.fc1"), ("gaet", "nearest")]
)
def test_a_glob_of_missing_modules_that_has_no_effect_is_refused(
    glob: str, hint: str, tmp_path: Path
) -> None:
    error = _message(_with_more(tmp_path / "a", "gate"), allow_missing=["gate", glob])
    assert f"no module that the graph lacks matches {glob!r}" in error.message
    assert hint in error.hint


def test_a_glob_does_not_make_an_adapter_of_another_model_right(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", lora(modules=["conv.left", "conv.right"]))
    error = _message(folder, allow_missing=["**"])
    assert "no module of the checkpoint is in the graph" in error.message


def test_the_commands_leave_out_what_may_be_missing(tmp_path: Path, capsys: Capture) -> None:
    trained = str(_with_more(tmp_path / "a", "gate"))
    (tmp_path / "model").mkdir()
    base = str(saved_model(tmp_path / "model" / "model.onnx", _base().proto))
    one, all_files, file = (str(tmp_path / n) for n in ("one.onnx", "out", "de.safetensors"))
    commands = (
        ("insert", base, "--adapter", trained, "-o", one),
        ("insert", str(tmp_path / "model"), "--adapter", trained, "-o", all_files),
        ("convert", trained, "--for", one, "-o", file),
    )
    for command in commands:
        status, _, said = cli(capsys, *command)
        assert (status, Path(command[-1]).exists()) == (2, False)
        status, _, said = cli(capsys, *command, "--allow-missing", "gat")
        assert (status, Path(command[-1]).exists()) == (2, False)
        assert "'gat'" in said or "lacks net.0.gate" in said
        status, _, said = cli(capsys, *command, "--allow-missing", "gate")
        assert (status, Path(command[-1]).exists()) == (0, True)
        assert "note: left out net.0.gate: the graph lacks it" in said
