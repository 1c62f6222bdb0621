"""Compression is the nearest update of a rank; quantising stays within half a step."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_models import safetensors_file
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError

RNG = np.random.default_rng(0)


def lora(
    parts: dict[str, tuple[int, ...]], dtype: str = "float32", stack: int = 1
) -> oa.Adapter:
    weights = {name: RNG.normal(size=shape).astype(dtype) for name, shape in parts.items()}
    stacks = {"fc": stack} if stack > 1 else {}
    return oa.Adapter("fr", {"fc": weights}, activations={"fc": "identity"}, stacks=stacks)


FORMS = {
    "linear": {"down": (20, 6), "up": (6, 30)},
    "wide": {"down": (4, 6), "up": (6, 30)},
    "embedding": {"table": (50, 6), "up": (6, 8)},
    "convolution": {"down": (6, 3, 2, 2), "up": (8, 6, 1, 1)},
    "biases": {"down": (20, 6), "down_bias": (6,), "up": (6, 9), "up_bias": (9,)},
    "gain": {"down": (20, 6), "up": (6, 9), "up_bias": (9,), "gain": (9,), "scale": (9,)},
    "convolution with a gain": {"down": (6, 3, 2), "up": (8, 6, 1), "gain": (8, 1)},
}


def term(parts: dict[str, np.ndarray], seed: int = 1) -> np.ndarray:
    """What a slot adds for a random input, by the formula, in float64."""
    w = {name: value.astype(np.float64) for name, value in parts.items()}
    up = w["up"]
    first = w.get("table", w.get("down"))
    if up.ndim > 2:
        first, up = first.reshape(len(first), -1).T, up.reshape(up.shape[:2]).T
    x = np.random.default_rng(seed).normal(size=(7, len(first)))
    y = (x @ first + w.get("down_bias", 0)) @ up + w.get("up_bias", 0)
    return y * w["gain"].reshape(-1) if "gain" in w else y


@pytest.mark.parametrize("form", FORMS)
def test_at_the_full_rank_or_energy_compression_is_exact(form: str) -> None:
    adapter = lora(FORMS[form], "float64")
    for target in ({"rank": 6}, {"energy": 1.0}):
        small = oa.compress(adapter, **target)
        assert {p: v.dtype for p, v in small.weights["fc"].items()} == {
            p: v.dtype for p, v in adapter.weights["fc"].items()
        }
        found, expected = term(small.weights["fc"]), term(adapter.weights["fc"])
        np.testing.assert_allclose(found, expected, 0, 1e-10 * np.abs(expected).max())
        assert oa.measure_loss(adapter, small)["fc"] < 1e-12


@given(st.integers(1, 5), st.sampled_from(sorted(FORMS)))
@settings(max_examples=25, deadline=None)
def test_the_loss_is_that_of_the_dense_matrix_and_the_least_there_is(
    rank: int, form: str
) -> None:
    adapter = lora({k: v for k, v in FORMS[form].items() if k in ("down", "table", "up")})
    small = oa.compress(adapter, rank=rank)

    def dense(parts: dict[str, np.ndarray]) -> np.ndarray:
        up, first = parts["up"].astype(np.float64), parts.get("table", parts.get("down"))
        if up.ndim > 2:
            first, up = first.reshape(len(first), -1).T, up.reshape(up.shape[:2]).T
        return first.astype(np.float64) @ up

    whole, kept = dense(adapter.weights["fc"]), dense(small.weights["fc"])
    loss = oa.measure_loss(adapter, small)["fc"]
    assert loss == pytest.approx(
        np.linalg.norm(whole - kept) / np.linalg.norm(whole), abs=1e-9
    )
    values = np.linalg.svd(whole, compute_uv=False)
    least = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    assert loss == pytest.approx(least, abs=1e-6)


def test_energy_keeps_the_smallest_rank_that_has_it() -> None:
    parts = {"down": np.diag([3.0, 1, 1]), "up": np.eye(3)}
    adapter = oa.Adapter("fr", {"fc": parts}, activations={"fc": "identity"})
    ranks = {
        energy: oa.compress(adapter, energy=energy).weights["fc"]["up"].shape[0]
        for energy in (0.5, 9 / 11, 0.9, 0.99, 1)
    }
    assert ranks == {0.5: 1, 9 / 11: 1, 0.9: 2, 0.99: 3, 1: 3}


def test_the_matrices_of_a_stack_are_compressed_one_by_one() -> None:
    """`down` has the rows of both, `up` the columns; what is between them does not count."""
    adapter = lora({"down": (10, 4), "up": (4, 14)}, "float64", stack=2)
    small = oa.compress(adapter, rank=2)
    off, size = 0.0, 0.0
    for rows, columns in ((slice(5), slice(7)), (slice(5, 10), slice(7, 14))):
        whole, kept = (
            a.weights["fc"]["down"][rows] @ a.weights["fc"]["up"][:, columns]
            for a in (adapter, small)
        )
        values = np.linalg.svd(whole, compute_uv=False)
        assert np.linalg.norm(whole - kept) == pytest.approx(np.linalg.norm(values[2:]))
        off, size = off + np.linalg.norm(whole - kept) ** 2, size + np.linalg.norm(whole) ** 2
    assert oa.measure_loss(adapter, small)["fc"] == pytest.approx((off / size) ** 0.5)


def test_a_slot_that_is_off_keeps_one_unit_of_zeros() -> None:
    parts = {"down": np.ones((5, 3), "float32"), "up": np.zeros((3, 4), "float32")}
    adapter = oa.Adapter("fr", {"fc": parts}, activations={"fc": "identity"})
    small = oa.compress(adapter, energy=0.9).weights["fc"]
    assert small["down"].shape == (5, 1)
    assert not (small["down"] @ small["up"]).any()


def test_slots_of_a_smaller_rank_stay_as_they_are() -> None:
    one, other = lora(FORMS["linear"]), lora({"down": (20, 2), "up": (2, 30)})
    both = replace(
        one,
        weights={"a": one.weights["fc"], "b": other.weights["fc"], "c": {"scale": np.ones(3)}},
        activations={"a": "identity", "b": "identity"},
    )
    small = oa.compress(both, rank=3)
    assert small.weights["a"]["up"].shape == (3, 30)
    assert small.weights["b"] is both.weights["b"]
    assert small.weights["c"] is both.weights["c"]


def _with(**changes: object) -> oa.Adapter:
    return replace(lora(FORMS["linear"]), **changes)


REFUSED = {
    "neither": ({}, _with(), "either a rank or an energy"),
    "both": ({"rank": 1, "energy": 0.5}, _with(), "either a rank or an energy"),
    "rank 0": ({"rank": 0}, _with(), "no rank"),
    "rank True": ({"rank": True}, _with(), "no rank"),
    "a rank over all": ({"rank": 7}, _with(), "compresses nothing"),
    "energy 0": ({"energy": 0}, _with(), "no share"),
    "energy NaN": ({"energy": float("nan")}, _with(), "no share"),
    "energy 2": ({"energy": 2}, _with(), "no share"),
    "activation": ({"rank": 1}, _with(activations={"fc": "relu"}), "has the activation relu"),
    "silent": ({"rank": 1}, _with(activations={}), "does not say its activation"),
    "ia3": ({"rank": 1}, _with(weights={"fc": {"scale": np.ones(3)}}), "no projections"),
    "misfit": (
        {"rank": 1},
        _with(weights={"fc": {"down": np.ones((3, 2)), "up": np.ones((3, 3))}}),
        "do not go together",
    ),
    "flat": (
        {"rank": 1},
        _with(weights={"fc": {"down": np.ones(3), "up": np.ones(3)}}),
        "do not go together",
    ),
    "NaN": (
        {"rank": 1},
        _with(weights={"fc": {"down": np.full((3, 2), np.nan), "up": np.ones((2, 3))}}),
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_compressed_is_refused(what: str) -> None:
    target, adapter, message = REFUSED[what]
    with pytest.raises(AdapterError, match=message):
        oa.compress(adapter, **target)


@given(
    arrays(np.float32, (5, 3), elements=st.floats(-(2**100), 2**100, width=32)),
    st.sampled_from([8, 4]),
    st.sampled_from(["float32", "float64", "float16"]),
)
@settings(max_examples=60, deadline=None)
def test_no_weight_is_more_than_half_a_step_off(
    values: np.ndarray, bits: int, dtype: str
) -> None:
    down = (values / 2.0**85 if dtype == "float16" else values).astype(dtype)
    adapter = oa.Adapter("fr", {"fc": {"down": down, "up": down.T.copy()}})
    quantised = oa.quantize(adapter, bits=bits).adapter.weights["fc"]
    wide = down.astype(np.float64)
    half = np.abs(wide).max(axis=0) / {8: 127, 4: 7}[bits] / 2
    rounding = np.finfo(dtype).eps * np.abs(wide).max(axis=0) + np.finfo(dtype).tiny
    off = np.abs(quantised["down"].astype(np.float64) - wide)
    assert (off <= half * (1 + 1e-6) + rounding).all()
    np.testing.assert_array_equal(quantised["up"], quantised["down"].T)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_file_gives_back_what_quantize_said(
    bits: int, form: str, dtype: str, tmp_path: Path
) -> None:
    adapter = lora(FORMS[form], dtype)
    adapter = replace(
        adapter, replaced={"head": np.ones((3, 3), dtype)}, fingerprint="sha256:1"
    )
    quantised = oa.quantize(adapter, bits=bits)
    path = oa.save_adapter(quantised, tmp_path / "small.safetensors")
    loaded = oa.load_adapter(path)
    for part, value in quantised.adapter.weights["fc"].items():
        assert value.dtype == loaded.weights["fc"][part].dtype
        np.testing.assert_array_equal(value, loaded.weights["fc"][part])
        if value.ndim == 1:
            np.testing.assert_array_equal(value, adapter.weights["fc"][part])
    np.testing.assert_array_equal(loaded.replaced["head"], adapter.replaced["head"])
    assert loaded.fingerprint == "sha256:1"
    assert path.read_bytes() == oa.save_adapter(quantised, path).read_bytes()
    # Saved again it is an ordinary file.
    again = oa.save_adapter(loaded, tmp_path / "again.npz")
    np.testing.assert_array_equal(
        oa.load_adapter(again).weights["fc"]["up"], loaded.weights["fc"]["up"]
    )


def test_quantised_files_are_smaller(tmp_path: Path) -> None:
    adapter = lora({"down": (4096, 16), "up": (16, 4096)})
    sizes = [
        oa.save_adapter(item, tmp_path / "a.safetensors").stat().st_size
        for item in (adapter, oa.quantize(adapter), oa.quantize(adapter, bits=4))
    ]
    assert sizes[0] / sizes[1] > 3.9
    assert sizes[0] / sizes[2] > 7.8


def test_an_older_reader_refuses_a_quantised_file_by_its_format(tmp_path: Path) -> None:
    """It reads formats up to 1; a file in floats is still of that one."""
    adapter = lora(FORMS["linear"])
    for item, expected in ((oa.quantize(adapter), 2), (adapter, 1)):
        data = oa.save_adapter(item, tmp_path / "a.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        record = json.loads(data[8 : 8 + length])["__metadata__"]["onnx_adapt"]
        assert json.loads(record)["format"] == expected


@pytest.mark.parametrize("suffix", ["onnx_adapter", "npz"])
def test_other_formats_refuse_quantised_weights(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(AdapterError, match="cannot hold quantised weights"):
        oa.save_adapter(oa.quantize(lora(FORMS["linear"])), path)
    assert not path.exists()


def _damaged(data: bytes, **changes: object) -> bytes:
    """The bytes of a quantised file with another form of `down`, or other bits."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    record = json.loads(header["__metadata__"]["onnx_adapt"])
    bits = changes.pop("bits", None)
    if bits is not None:
        record["quantised"]["bits"] = bits
    record["quantised"]["tensors"]["adapter.fc.down"].update(changes)
    header["__metadata__"]["onnx_adapt"] = json.dumps(record)
    return safetensors_file(json.dumps(header).encode(), data[8 + length :])


LIES: dict[str, dict[str, object]] = {
    "bits": {"bits": 4},
    "no bits": {"bits": 3},
    "true bits": {"bits": True},
    "listed bits": {"bits": [8]},
    "shape": {"shape": [6, 20]},
    "huge shape": {"shape": [2**40, 2**40]},
    "negative shape": {"shape": [-20, -6]},
    "no shape": {"shape": []},
    "texts for a shape": {"shape": ["20", "6"]},
    "axis": {"axis": 0},
    "axis beyond": {"axis": 2},
    "negative axis": {"axis": -1},
    "type": {"dtype": "int8"},
    "no type": {"dtype": None},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_quantised_file_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    path = oa.save_adapter(oa.quantize(lora(FORMS["linear"])), tmp_path / "a.safetensors")
    path.write_bytes(_damaged(path.read_bytes(), **LIES[lie]))
    with pytest.raises(AdapterError, match="damaged"):
        oa.load_adapter(path)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(AdapterError, match="2 bits"):
        oa.quantize(lora(FORMS["linear"]), bits=2)
    with pytest.raises(AdapterError, match="no projections"):
        oa.quantize(oa.Adapter("a", {"fc": {"scale": np.ones(3)}}))
    with pytest.raises(AdapterError, match="NaN"):
        oa.quantize(_with(weights={"fc": {"down": np.full((3, 2), np.nan)}}))


def test_a_loss_is_told_of_slots_with_an_activation_too() -> None:
    adapter = replace(lora(FORMS["biases"]), activations={"fc": "relu"})
    loss = oa.measure_loss(adapter, oa.quantize(adapter, bits=4).adapter)["fc"]
    assert loss is not None
    assert 0.01 < loss < 0.2
    other = replace(lora({**FORMS["biases"], "down": (20, 7)}), activations={"fc": "relu"})
    assert oa.measure_loss(adapter, other) == {"fc": None}


@pytest.mark.parametrize("name", ["peft_experts_bmm", "peft_recurrent_lstm"])
def test_slots_on_stacks_are_split_and_merged_as_pytorch_computes(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    model = oa.insert_checkpoint(base, checkpoint)
    stacks = checkpoint.adapter.stacks
    assert stacks
    assert set(stacks.values()) == ({3} if "experts" in name else {2})
    loaded = oa.load_adapter(oa.save_adapter(checkpoint.adapter, tmp_path / "a.safetensors"))
    assert loaded.stacks == stacks == oa.convert(case.adapter, model).stacks
    assert oa.extract(oa.fill(model, loaded)).stacks == stacks
    assert oa.blend([loaded, loaded], [0.5, 0.5]).stacks == stacks
    made = {
        "compressed": oa.compress(loaded, energy=1 - 1e-12),
        "cat": oa.merge([loaded, loaded], [0.5, 0.5]),
        "svd": oa.merge([loaded, loaded], [0.5, 0.5], method="svd"),
        "dense": oa.merge(
            [loaded, loaded], [0.5, 0.5], method="magnitude_prune_svd", density=1.0
        ),
    }
    output, expected = case.expected()
    with oa.AdapterSession(model, made) as session:
        for label in made:
            found = session.run(case.inputs(), adapter=label)[output]
            np.testing.assert_allclose(found, expected, 0, case.tolerance, err_msg=label)
