"""A model in several files: each takes its modules, one adapter is for all, or nothing is."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from adapter_models import lora, lora_on, peft_folder, two_layers
from pipeline_runs import Fixture, Runner, arrays_of, part_of, run_model
from safetensors.numpy import load_file, save_file
from slot_models import cli, run

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError, CheckpointError, ModelFileError

T5 = Fixture("t5/optimum")
Capture = pytest.CaptureFixture[str]


def _folder(path: Path, **models: onnx.ModelProto) -> Path:
    path.mkdir()
    for name, proto in models.items():
        onnx.save(proto, path / f"{name}.onnx")
    (path / "config.json").write_text("{}")
    return path


def test_a_folder_is_written_whole_and_one_adapter_swaps_in_all_its_files(
    tmp_path: Path, capsys: Capture
) -> None:
    base = shutil.copytree(T5.folder, tmp_path / "t5")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocabulary.txt").write_text("a")
    out = tmp_path / "out"
    command = ["insert", str(base), "--adapter", str(T5.adapter("lora")), "--name", "fr"]
    code, printed, err = cli(capsys, *command, "-o", str(out))
    assert code == 0, err
    assert "decoder_with_past_model.onnx" in printed
    assert (out / "tokenizer" / "vocabulary.txt").read_text() == "a"
    assert sorted(file.name for file in out.glob("*.safetensors")) == ["fr.safetensors"]
    given = T5.inputs()
    tokens = given.pop("decoder_input_ids")
    trained = str(out / "fr.safetensors")
    answers = {None: T5.answer("base"), "fr": T5.answer("lora")}
    with (
        oa.AdapterSession(out / "encoder_model.onnx", {"fr": trained}) as encoder,
        oa.AdapterSession(out / "decoder_model_merged.onnx", {"fr": trained}) as decoder,
    ):
        for adapter, answer in answers.items():
            states = next(iter(encoder.run(given, adapter=adapter).values()))
            cache = _empty_cache(out / "decoder_model_merged.onnx", len(tokens))
            for at in range(tokens.shape[1]):  # token by token, as a generating loop does
                feeds = {
                    "input_ids": tokens[:, at : at + 1],
                    "encoder_hidden_states": states,
                    "encoder_attention_mask": given["attention_mask"],
                    "use_cache_branch": np.array([at > 0]),
                    **cache,
                }
                found = decoder.run(feeds, adapter=adapter)
                fresh = {
                    key.replace("present", "past_key_values"): value
                    for key, value in found.items()
                    if key.startswith("present")
                }
                cache = {k: v if v.size else cache[k] for k, v in fresh.items()}
                np.testing.assert_allclose(
                    found["logits"][:, 0], answer[:, at], rtol=1e-4, atol=1e-4
                )
    with oa.AdapterSession(out / "encoder_model.onnx") as other, pytest.raises(AdapterError):
        other.load("x", oa.Adapter("x", {"nowhere": {}}, {}, {}, "sha256:0", ("sha256:1",)))


def _empty_cache(path: Path, rows: int) -> dict[str, np.ndarray]:
    found = {}
    for value in onnx.load(path).graph.input:
        if value.name.startswith("past_key_values"):
            sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            found[value.name] = np.zeros((rows, sizes[1], 1, sizes[3]), np.float32)
    return found


def test_files_in_other_precisions_take_one_adapter(tmp_path: Path) -> None:
    base = _folder(tmp_path / "m", model=two_layers(), model_fp16=two_layers(np.float16))
    tensors = lora()
    made = oa.insert_folder(base, peft_folder(tmp_path / "fr", tensors))
    path = oa.save_adapter(made.adapter, tmp_path / "fr.safetensors")
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    for file in made.files:
        assert file.adapted is not None
        half = "fp16" in file.path.name
        dtype, tolerance = (np.float16, 0.05) if half else (np.float32, 1e-5)
        with oa.AdapterSession(file.adapted, {"fr": path}) as session:
            (y,) = session.run({"x": x.astype(dtype)}, adapter="fr").values()
        np.testing.assert_allclose(y, lora_on(x, tensors), rtol=tolerance, atol=tolerance)


def test_a_file_without_modules_of_the_checkpoint_is_copied(
    tmp_path: Path, capsys: Capture
) -> None:
    text = two_layers().SerializeToString().replace(b"fc", b"ab")
    other = onnx.ModelProto.FromString(text)
    base = _folder(tmp_path / "m", model=two_layers(), embed=other)
    trained = peft_folder(tmp_path / "fr", lora())
    command = ["insert", str(base), "--adapter", str(trained), "-o", str(tmp_path / "out")]
    code, printed, _ = cli(capsys, *command)
    assert code == 0
    assert "no module of the checkpoint" in printed
    assert (tmp_path / "out/embed.onnx").read_bytes() == (base / "embed.onnx").read_bytes()


def test_a_folder_of_two_models_is_refused(tmp_path: Path, capsys: Capture) -> None:
    wide = two_layers()
    for tensor in wide.graph.initializer:
        size = [2 * dim for dim in tensor.dims]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(size, np.float32), tensor.name))
    wide.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 8
    wide.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    base = _folder(tmp_path / "m", a=two_layers(), b=wide)
    err = _refused(capsys, base, peft_folder(tmp_path / "fr", lora()), tmp_path / "out")
    assert "another size" in err


def _retrained(dtype: type = np.float32) -> onnx.ModelProto:
    """The same layers with other weights."""
    proto = two_layers(dtype)
    for tensor in proto.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        turned = np.ascontiguousarray(value[..., ::-1] + 1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(turned, tensor.name))
    return proto


@pytest.mark.parametrize(
    "names", [("bert_en", "bert_de"), ("model", "model_fp16"), ("unet", "text_encoder")]
)
def test_a_folder_of_two_models_of_the_same_sizes_is_refused(
    names: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    models = {names[0]: two_layers(), names[1]: _retrained()}
    trained = peft_folder(tmp_path / "fr", lora())
    err = _refused(capsys, _folder(tmp_path / "m", **models), trained, tmp_path / "out")
    assert "module 'fc" in err
    assert all(f"{name}.onnx" in err for name in names)


def test_a_part_that_one_file_is_named_after_goes_into_no_other(tmp_path: Path) -> None:
    base = _folder(tmp_path / "m", text_encoder=two_layers(), text_encoder_2=_retrained())
    tensors = lora(modules=["text_encoder_2.fc1", "text_encoder_2.fc2"])
    made = oa.insert_folder(base, peft_folder(tmp_path / "fr", tensors))
    assert [file.path.stem for file in made.files if file.adapted] == ["text_encoder_2"]


def test_a_file_with_a_namesake_of_one_module_is_not_adapted(tmp_path: Path) -> None:
    """`fc1` of another model is a short name, and may be met by accident."""
    text = two_layers().SerializeToString().replace(b"fc2", b"ab2").replace(b"/fc1", b"/d/1")
    other = onnx.ModelProto.FromString(text)
    for node in other.graph.node:
        node.name = node.name.replace("/d/1", "/decoder/fc1")
    base = _folder(tmp_path / "m", unet=two_layers(), vae_decoder=other)
    made = oa.insert_folder(base, peft_folder(tmp_path / "fr", lora()))
    assert [file.path.stem for file in made.files if file.adapted] == ["unet"]


def test_a_file_with_half_of_the_layers_is_refused(tmp_path: Path, capsys: Capture) -> None:
    def named(*names: str) -> onnx.ModelProto:
        proto = two_layers()
        for node in proto.graph.node:
            for old, new in zip(("fc1", "fc2"), names, strict=True):
                node.name = node.name.replace(old, new)
        return proto

    base = _folder(
        tmp_path / "m", a=named("layers.0/q", "layers.1/q"), b=named("layers.0/q", "other")
    )
    trained = peft_folder(tmp_path / "fr", lora(modules=["layers.0.q", "layers.1.q"]))
    err = _refused(capsys, base, trained, tmp_path / "out")
    assert "b.onnx has 1 modules of the checkpoint and lacks layers.1.q" in err


def test_a_module_in_no_file_is_named_with_the_nearest(
    tmp_path: Path, capsys: Capture
) -> None:
    base = _folder(tmp_path / "m", a=two_layers())
    trained = peft_folder(tmp_path / "fr", lora(modules=["fc1", "fc3"]))
    err = _refused(capsys, base, trained, tmp_path / "out")
    assert "in no file: fc3" in err
    assert "a.onnx: fc" in err


@pytest.mark.parametrize("out", ["m", "m/inside", "full"])
def test_a_destination_that_is_in_use_is_refused(
    out: str, tmp_path: Path, capsys: Capture
) -> None:
    base = _folder(tmp_path / "m", a=two_layers())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    trained = peft_folder(tmp_path / "fr", lora())
    before = sorted(tmp_path.rglob("*"))
    command = ["insert", str(base), "--adapter", str(trained), "-o", str(tmp_path / out)]
    code, printed, err = cli(capsys, *command)
    assert (code, printed) == (2, "")
    assert "hint: " in err
    assert sorted(tmp_path.rglob("*")) == before
    if out == "full":
        assert cli(capsys, *command, "--force")[0] == 0
        assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
        assert (tmp_path / "full" / "config.json").read_text() == "{}"


def _refused(capsys: Capture, base: Path, trained: Path, out: Path) -> str:
    command = ["insert", str(base), "--adapter", str(trained), "-o", str(out)]
    code, printed, err = cli(capsys, *command)
    assert (code, printed) == (2, "")
    assert "\nhint: " in err
    assert not out.exists()
    return err


@pytest.mark.parametrize("option", [["--after", "fc1"], ["--thin"], ["--bottleneck", "4"]])
def test_options_for_one_model_are_refused_for_a_folder(
    option: list[str], tmp_path: Path, capsys: Capture
) -> None:
    base = _folder(tmp_path / "m", a=two_layers())
    trained = peft_folder(tmp_path / "fr", lora())
    code, _, err = cli(capsys, "insert", str(base), "--adapter", str(trained), *option)
    assert code == 2
    assert "has no effect with a folder" in err


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no \.onnx file"):
        oa.insert_folder(tmp_path, peft_folder(tmp_path / "fr", lora()))


def test_a_part_goes_into_the_graph_that_is_it() -> None:
    base = oa.open_model(T5.folder / "encoder_model.onnx")
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(T5.adapter("lora"), base)
    assert "--part" in str(caught.value.hint)
    checkpoint = oa.load_checkpoint(T5.adapter("lora"), base, part="encoder")
    assert len(checkpoint.slots) == 2
    for part in ("decoders", "enc"):
        with pytest.raises(CheckpointError, match="no module of the checkpoint is under"):
            oa.load_checkpoint(T5.adapter("lora"), base, part=part)


def test_modules_are_renamed_by_what_they_begin_with(tmp_path: Path) -> None:
    tensors = lora(modules=["first", "second"])
    folder = peft_folder(tmp_path / "fr", tensors)
    base = oa.Model(two_layers())
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(folder, base)
    assert "--map" in str(caught.value.hint)
    names = {"first": "fc1", "second": "fc2"}
    checkpoint = oa.load_checkpoint(folder, base, module_map=names)
    adapted = oa.insert_checkpoint(base, checkpoint)
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    (y,) = run(adapted, {"x": x, **checkpoint.adapter.feeds()})
    renamed = {
        k.replace("first", "fc1").replace("second", "fc2"): v for k, v in tensors.items()
    }
    np.testing.assert_allclose(y, lora_on(x, renamed), rtol=1e-5, atol=1e-5)
    for wrong in ({"fir": "fc1"}, {"first": "fc1", "second": "fc1"}):
        with pytest.raises(CheckpointError) as caught:
            oa.load_checkpoint(folder, base, module_map=wrong)
        assert caught.value.hint


def test_t5_in_pieces_gives_what_pytorch_gives(tmp_path: Path) -> None:
    made = oa.insert_folder(T5.folder, T5.adapter("lora"), baked=True)
    files = {}
    for file in made.files:
        assert file.adapted is not None
        oa.save_model(file.adapted, tmp_path / file.path)
        files[file.path.stem] = tmp_path / file.path
    answer = arrays_of(T5.home / "lora.npz")["logits"]
    for name, logits in run_model(T5, Runner(files)).items():
        np.testing.assert_allclose(logits, part_of(answer, name), rtol=1e-4, atol=1e-5)


PARTS = Path(__file__).parents[1] / "parts"


@pytest.mark.parametrize(
    ("model", "files"),
    [
        ("llava", {"vision": "vision_encoder", "language": "decoder_model_merged"}),
        ("llava", {"vision": "vision_tower", "language": "language_model"}),
        ("clip", {"text": "text_encoder/model", "vision": "image_encoder/model"}),
        ("whisper", {"encoder": "encoder_model", "decoder": "decoder_model"}),
    ],
)
def test_pieces_of_a_model_take_the_modules_of_their_part(
    model: str, files: dict[str, str], tmp_path: Path
) -> None:
    trained, tensors = tmp_path / "fr", {}
    for part, name in files.items():
        place = tmp_path / "m" / f"{name}.onnx"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PARTS / f"{model}.{part}.onnx", place)
        folder = PARTS / f"{model}.{part}.adapter"
        tensors |= load_file(folder / "adapter_model.safetensors")
        shutil.copytree(folder, trained, dirs_exist_ok=True)
    save_file(tensors, trained / "adapter_model.safetensors")
    made = oa.insert_folder(tmp_path / "m", trained)
    for part, name in files.items():
        (file,) = (file for file in made.files if file.path == Path(f"{name}.onnx"))
        assert file.adapted is not None
        stored = arrays_of(PARTS / f"{model}.{part}.npz")
        feeds = {k.removeprefix("input."): v for k, v in stored.items() if k[:6] == "input."}
        with oa.AdapterSession(file.adapted) as session:
            found = session.run(feeds, adapter=made.adapter)["y"]
        np.testing.assert_allclose(found, stored[f"adapter.{part}"], rtol=1e-4, atol=1e-4)
