"""Adapter files: what is written is read, by ONNX Runtime too."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from adapter_models import (
    ELEM_TYPES,
    adapted,
    bumped,
    onnx_adapter_file,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_models import saved
from trained_cases import run

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError, SaveError

FORMATS = ["safetensors", "onnx_adapter", "npz"]
RECORDED = ["safetensors", "npz"]
DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16]
LAW = settings(max_examples=60, deadline=None, database=None)
PRINT = "sha256:" + "9f3c" * 16
X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)

every_format = pytest.mark.parametrize("suffix", FORMATS)


def _same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """The same names, element types, shapes and bytes."""
    assert list(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


def _full(dtype: Any = np.float32) -> oa.Adapter:
    """Two slots and a trained head, with values that tell the places apart."""
    numbers = (np.arange(40) / 8 - 2).astype(dtype)
    slot = {"down": numbers[:12].reshape(4, 3), "up": numbers[12:24].reshape(3, 4)}
    other = {"scale": numbers[24:28], "gain": numbers[28:29]}
    return oa.Adapter(
        "fr",
        {"encoder.layer.0": slot, "fc": other},
        {"base.classifier.weight": numbers[30:38].reshape(2, 4)},
        {"encoder.layer.0": "relu", "fc": "identity"},
        PRINT,
    )


@every_format
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_array_is_read_as_it_was_written(
    suffix: str, dtype: Any, tmp_path: Path
) -> None:
    adapter = _full(dtype)
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / f"a.{suffix}"))
    _same(found.feeds(), adapter.feeds())
    assert {s: sorted(p) for s, p in found.weights.items()} == {
        "encoder.layer.0": ["down", "up"],
        "fc": ["gain", "scale"],
    }
    assert list(found.replaced) == ["base.classifier.weight"]


@pytest.mark.parametrize("suffix", RECORDED)
def test_name_activations_and_fingerprint_are_read_as_they_were_written(
    suffix: str, tmp_path: Path
) -> None:
    found = oa.load_adapter(oa.save_adapter(_full(), tmp_path / f"other.{suffix}"))
    assert found.name == "fr"
    assert found.activations == {"encoder.layer.0": "relu", "fc": "identity"}
    assert found.fingerprint == PRINT


def test_an_onnx_adapter_file_is_called_like_the_file(tmp_path: Path) -> None:
    path = oa.save_adapter(_full(), tmp_path / "de.v1.onnx_adapter")
    assert oa.load_adapter(path).name == "de.v1"


LAYOUTS = {
    "transposed": lambda a: a.T,
    "fortran": np.asfortranarray,
    "strided": lambda a: a[::2, 1::2],
    "reversed": lambda a: a[::-1],
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: np.frombuffer(b"." + a.tobytes(), a.dtype, offset=1),
    "no rows": lambda a: a[:0],
    "no columns": lambda a: a[:, :0],
    "convolution": lambda a: a.reshape(2, 3, 4, 1).transpose(3, 1, 0, 2),
}


@every_format
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_how_an_array_lies_in_memory_makes_no_difference(
    suffix: str, layout: str, dtype: Any, tmp_path: Path
) -> None:
    array = LAYOUTS[layout](np.arange(24, dtype=np.float32).astype(dtype).reshape(4, 6))
    adapter = oa.Adapter("a", {"fc": {"down": array}}, {"base.h.weight": array})
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / f"a.{suffix}"))
    for value in found.feeds().values():
        assert value.shape == array.shape
        np.testing.assert_array_equal(value, array)


@every_format
def test_numbers_of_the_other_byte_order_are_the_same_numbers(
    suffix: str, tmp_path: Path
) -> None:
    array = np.array([[1, 2.5], [-3, 1e-3]], ">f4")
    adapter = oa.Adapter("a", {"fc": {"down": array}})
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / f"a.{suffix}"))
    value = found.weights["fc"]["down"]
    assert value.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(value, array)


@every_format
@pytest.mark.parametrize("value", [np.nan, -np.inf, -0.0, 1e-45])
def test_special_numbers_keep_their_bits(suffix: str, value: float, tmp_path: Path) -> None:
    array = np.array([value, 1], np.float32)
    adapter = oa.Adapter("a", {"fc": {"scale": array}})
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / f"a.{suffix}"))
    assert found.weights["fc"]["scale"].tobytes() == array.tobytes()


@pytest.mark.parametrize("suffix", RECORDED)
def test_a_scalar_stays_a_scalar(suffix: str, tmp_path: Path) -> None:
    adapter = oa.Adapter("a", {}, {"base.temperature": np.array(3, np.float32)})
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / f"a.{suffix}"))
    assert found.replaced["base.temperature"].shape == ()


def test_a_scalar_is_refused_where_onnx_runtime_cannot_read_it(tmp_path: Path) -> None:
    adapter = oa.Adapter("a", {}, {"base.temperature": np.array(3, np.float32)})
    with pytest.raises(AdapterError, match=r"base\.temperature"):
        oa.save_adapter(adapter, tmp_path / "a.onnx_adapter")
    assert not list(tmp_path.iterdir())


@every_format
@pytest.mark.parametrize("dtype", ["int64", "int8", "bool", "complex64"])
def test_only_floats_are_written(suffix: str, dtype: str, tmp_path: Path) -> None:
    adapter = oa.Adapter("a", {"fc": {"down": np.zeros((2, 2), dtype)}})
    with pytest.raises(AdapterError, match=r"adapter\.fc\.down"):
        oa.save_adapter(adapter, tmp_path / f"a.{suffix}")
    assert not list(tmp_path.iterdir())


NAMES = [
    *("fc.npy", "a/b", "../../up", "a\\b", "a b", "é日本", "w.bfloat16", "onnx_adapt"),
    *("adapter.x", "file", "a\nb", ".", "n" * 300, '"', "a,b=c"),
]


@every_format
@pytest.mark.parametrize("name", NAMES)
def test_slots_and_weights_of_any_name_are_read_as_written(
    suffix: str, name: str, tmp_path: Path
) -> None:
    one, two, three = (np.full(2, value, np.float32) for value in (1, 2, 3))
    adapter = oa.Adapter(name, {name: {"scale": one}}, {f"base.{name}": two, "base.": three})
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / f"a.{suffix}"))
    _same(found.feeds(), adapter.feeds())
    assert list(found.weights) == [name]
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]


@every_format
@LAW
@given(
    names=st.sets(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), max_size=5
    )
)
def test_weights_are_not_mixed_up_whatever_their_names(
    suffix: str, names: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    arrays = {
        f"base.{name}{tail}": np.full(2, i, np.float32)
        for i, (name, tail) in enumerate((n, t) for n in names for t in ("", ".npy"))
    }
    path = tmp_path_factory.mktemp("names") / f"a.{suffix}"
    found = oa.load_adapter(oa.save_adapter(oa.Adapter("a", {}, arrays), path))
    _same(found.feeds(), arrays)


@pytest.mark.parametrize("name", ["base.a\0b", "onnx_adapt"])
def test_a_name_that_an_npz_file_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    adapter = oa.Adapter("a", {}, {name: np.ones(2, np.float32)})
    with pytest.raises(AdapterError, match=r"a\.npz"):
        oa.save_adapter(adapter, tmp_path / "a.npz")
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / "a.safetensors"))
    assert list(found.replaced) == [name]


@every_format
def test_a_name_that_is_no_text_is_an_error_of_ours(suffix: str, tmp_path: Path) -> None:
    adapter = oa.Adapter("a", {"\udcff": {"scale": np.ones(2, np.float32)}})
    with pytest.raises(AdapterError):
        oa.save_adapter(adapter, tmp_path / f"a.{suffix}")
    assert not list(tmp_path.iterdir())


SCRIPT = """
import hashlib, sys
from pathlib import Path
import numpy as np
import onnx_adapt as oa
names = {f"layer.{i}" for i in range(40)}
one = np.ones((2, 2), "float32")
weights = {name: {part: one * len(name) for part in {"up", "down", "scale"}} for name in names}
replaced = {f"base.{name}.bias": one[0] for name in names}
adapter = oa.Adapter("a", weights, replaced, {name: "relu" for name in names}, "sha256:ab")
for suffix in ("safetensors", "onnx_adapter", "npz"):
    path = oa.save_adapter(adapter, Path(sys.argv[1]) / f"a.{suffix}")
    print(suffix, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_a_file_is_the_same_in_every_process(tmp_path: Path) -> None:
    printed = set()
    for seed in ("0", "1", "77"):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder)],
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC-{len(seed) + 5}"},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.add(done.stdout)
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == 3


@every_format
def test_a_file_read_and_written_again_is_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    first = oa.save_adapter(_full(), tmp_path / f"a.{suffix}")
    again = oa.load_adapter(first)
    second = oa.save_adapter(
        oa.Adapter("fr", again.weights, again.replaced, _full().activations, PRINT),
        tmp_path / f"b.{suffix}",
    )
    assert second.read_bytes() == first.read_bytes()
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    os.utime(first, (0, 0))
    oa.save_adapter(_full(), first)
    assert hashlib.sha256(first.read_bytes()).hexdigest() == digest


def test_a_safetensors_file_is_what_the_specification_says(tmp_path: Path) -> None:
    data = oa.save_adapter(_full(), tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__").keys() == {"onnx_adapt"}
    tensors = _full().feeds()
    assert header.keys() == tensors.keys()
    for name, facts in header.items():
        start, end = (8 + length + offset for offset in facts["data_offsets"])
        assert facts["dtype"] == "F32"
        assert data[start:end] == tensors[name].tobytes()


def test_an_npz_file_is_read_by_numpy(tmp_path: Path) -> None:
    path = oa.save_adapter(_full(), tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as stored:
        for name, value in _full().feeds().items():
            np.testing.assert_array_equal(stored[name], value)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_arrays_that_numpy_wrote_are_an_adapter(write: Any, tmp_path: Path) -> None:
    parts = weights()
    write(
        tmp_path / "mine.npz",
        **{
            "adapter.fc1.down": np.asfortranarray(parts["down"]),
            "adapter.fc1.up": parts["up"],
        },
    )
    found = oa.load_adapter(tmp_path / "mine.npz")
    assert (found.name, found.fingerprint) == ("mine", "")
    _same(dict(found.weights["fc1"]), parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_onnx_runtime_reads_the_parameters(dtype: Any, tmp_path: Path) -> None:
    adapter = _full(dtype)
    path = oa.save_adapter(adapter, tmp_path / "a.onnx_adapter")
    stored = ort.AdapterFormat.read_adapter(str(path))
    assert stored.get_format_version() == 1
    found = stored.get_parameters()
    assert found.keys() == adapter.feeds().keys()
    for name, value in adapter.feeds().items():
        assert found[name].element_type() == ELEM_TYPES[np.dtype(dtype).name]
        assert found[name].shape() == list(value.shape)
        if dtype is not ml_dtypes.bfloat16:
            np.testing.assert_array_equal(found[name].numpy(), value)
    ort.LoraAdapter().Load(str(path))


def test_the_fingerprint_is_in_the_model_version(tmp_path: Path) -> None:
    path = oa.save_adapter(_full(), tmp_path / "a.onnx_adapter")
    stored = ort.AdapterFormat.read_adapter(str(path))
    assert stored.get_model_version() == int("9f3c9f3c", 16) >> 1
    nameless = oa.Adapter("a", _full().weights)
    path = oa.save_adapter(nameless, tmp_path / "b.onnx_adapter")
    assert ort.AdapterFormat.read_adapter(str(path)).get_model_version() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_of_an_onnx_adapter_file_is_64_byte_aligned(
    dtype: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    odd = {f"s{n}": {"scale": rng.standard_normal(n).astype(dtype)} for n in range(5, 40, 3)}
    data = oa.save_adapter(oa.Adapter("a", odd), tmp_path / "a.onnx_adapter").read_bytes()
    for parts in odd.values():
        assert data.count(parts["scale"].tobytes()) == 1
        assert data.index(parts["scale"].tobytes()) % 64 == 0


def test_onnx_runtime_computes_with_the_file(tmp_path: Path) -> None:
    model = saved(adapted(), tmp_path / "m.onnx")
    adapter = oa.Adapter("a", {"fc1": weights(3), "fc2": weights(1, seed=1)})
    path = oa.save_adapter(adapter, tmp_path / "a.onnx_adapter")
    (value,) = run(model, {"x": X}, path).values()
    np.testing.assert_allclose(value, bumped(X, adapter), 1e-4, 1e-5)
    assert np.abs(value - bumped(X, oa.Adapter("none", {}))).max() > 0.1


def test_a_file_that_onnx_runtime_wrote_is_read(tmp_path: Path) -> None:
    arrays = {**_full().feeds(), "adapter.empty.down": np.zeros((4, 0), np.float32)}
    arrays["adapter.wide.scale"] = np.arange(5, dtype=np.float64)
    theirs = ort.AdapterFormat()
    theirs.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in arrays.items()})
    theirs.set_model_version(7)
    theirs.export_adapter(str(tmp_path / "a.onnx_adapter"))
    _same(oa.load_adapter(tmp_path / "a.onnx_adapter").feeds(), arrays)


def test_a_file_that_onnx_runtime_wrote_in_bfloat16_is_read(tmp_path: Path) -> None:
    array = np.array([[1, 2.5], [-3, 0.125]], ml_dtypes.bfloat16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), 16)
    theirs = ort.AdapterFormat()
    theirs.set_parameters({"adapter.fc.down": value})
    theirs.export_adapter(str(tmp_path / "a.onnx_adapter"))
    _same(oa.load_adapter(tmp_path / "a.onnx_adapter").feeds(), {"adapter.fc.down": array})


def test_a_hand_made_onnx_adapter_file_is_read(tmp_path: Path) -> None:
    raw = np.array([1, 2], np.float32).tobytes()
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(onnx_adapter_file([("adapter.fc.scale", [2], 1, raw)]))
    assert oa.load_adapter(path).weights["fc"]["scale"].tolist() == [1, 2]


@every_format
def test_a_failed_write_leaves_the_old_file(suffix: str, tmp_path: Path) -> None:
    path = oa.save_adapter(_full(), tmp_path / f"a.{suffix}")
    before = path.read_bytes()
    with pytest.raises(AdapterError):
        oa.save_adapter(oa.Adapter("a", {"fc": {"down": np.zeros(2, "int8")}}), path)
    assert path.read_bytes() == before
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(SaveError):
        oa.save_adapter(_full(), tmp_path / f"folder.{suffix}")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["a.bin", "a", ".npz", "a.SAFETENSORS", "a.npz.txt"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    for action in (oa.load_adapter, lambda path: oa.save_adapter(_full(), path)):
        with pytest.raises(AdapterError, match="no known adapter format") as caught:
            action(tmp_path / name)
        assert ".onnx_adapter" in caught.value.hint
    assert not list(tmp_path.iterdir())


@every_format
def test_a_missing_file_or_a_folder_is_an_error(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in (f"missing.{suffix}", f"folder.{suffix}"):
        with pytest.raises(AdapterError, match=name):
            oa.load_adapter(tmp_path / name)


def test_a_slot_may_be_called_as_peft_calls_its_weights(tmp_path: Path) -> None:
    adapter = oa.Adapter("a", {}, {"x.lora_A": np.ones(2, np.float32)})
    found = oa.load_adapter(oa.save_adapter(adapter, tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(found.replaced["x.lora_A"], 1)
