"""Adapters made by hand: what does not fit is told, and what they are for is stamped."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from adapter_models import B2, adapted, bumped, saved_model, two_layers, weights
from onnx import numpy_helper
from slot_models import cli, run

import onnx_adapt as oa
from onnx_adapt.adapter.fitting import misfits, unchecked
from onnx_adapt.errors import AdapterError, SlotError, UncheckedWarning

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
FORMATS = ["safetensors", "onnx_adapter", "npz"]


def _values(size: int = 3) -> dict[str, dict[str, np.ndarray]]:
    return {"fc1": weights(size), "fc2": weights(size + 2, seed=1)}


def test_an_adapter_made_for_a_model_fits_it_and_knows_base_and_activations() -> None:
    model = oa.insert(oa.Model(two_layers()), after=["fc1", "fc2"], activation="gelu")
    made = oa.make_adapter(model, "mine", _values())
    assert misfits(model, made) == []
    assert made.name == "mine"
    assert made.activations == {"fc1": "gelu", "fc2": "gelu"}
    assert made.fingerprint.startswith("sha256:")
    for slot, parts in _values().items():
        for part, value in parts.items():
            np.testing.assert_array_equal(made.weights[slot][part], value)


def test_a_model_may_be_a_path_and_arguments_may_be_named(tmp_path: Path) -> None:
    path = oa.save_model(adapted(), tmp_path / "a.onnx").path
    one = oa.make_adapter(path, "mine", _values())
    two = oa.make_adapter(model=str(path), name="mine", weights=_values())
    assert one.fingerprint == two.fingerprint
    with pytest.raises(SlotError, match="has no slots"):
        oa.make_adapter(saved_model(tmp_path / "base.onnx"), "mine", _values())


@pytest.mark.parametrize("rank", [3, 4, 5])
def test_the_same_two_matrices_serve_a_slot_on_channels(rank: int) -> None:
    """A 1x1 convolution is a matrix product at each position: numpy has the answer."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((6, 5, *(1,) * (rank - 2))).astype(np.float32)
    sizes = ", ".join(map(str, (2, 5, 4, 3, 2)[:rank]))
    base = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{sizes}] x) => (float[{sizes}] y) '
        "{ [conv] y = Conv(x, w) }".replace(f"float[{sizes}] y", "float[n] y")
    )
    base.graph.output[0].type.tensor_type.ClearField("shape")
    base.graph.initializer.append(numpy_helper.from_array(kernel, "w"))
    model = oa.insert(oa.Model(base), after="conv", parts=("down", "up", "up_bias", "scale"))
    down, up = rng.standard_normal((6, 4)), rng.standard_normal((4, 6))
    bias, scale = rng.standard_normal(6), rng.standard_normal(6)
    flat = {"down": down, "up": up, "up_bias": bias, "scale": scale}
    ones = (1,) * (rank - 2)
    conv = {
        "down": down.T.reshape(4, 6, *ones).astype(np.float32),
        "up": up.T.reshape(6, 4, *ones).astype(np.float32),
        "up_bias": bias.astype(np.float32),
        "scale": scale.reshape(6, *ones).astype(np.float32),
    }
    x = rng.standard_normal((2, 5, 4, 3, 2)[:rank]).astype(np.float32)
    y = np.moveaxis(np.tensordot(kernel.reshape(6, 5), x, (1, 1)), 0, 1)
    last = np.moveaxis(y, 1, -1)
    expected = scale * last + np.maximum(last @ down, 0) @ up + bias
    for given in (flat, conv):
        made = oa.make_adapter(model, "mine", {"conv": given})
        assert misfits(model, made) == []
        (found,) = run(model, {"x": x, **made.feeds()})
        np.testing.assert_allclose(np.moveaxis(found, 1, -1), expected, 1e-4, 1e-4)


def test_parts_that_are_left_out_change_nothing() -> None:
    every = ("down", "up", "down_bias", "up_bias", "scale", "gain")
    model = oa.insert(oa.Model(two_layers()), after="fc1", parts=every)
    made = oa.make_adapter(model, "mine", {"fc1": weights(3)})
    plain = oa.make_adapter(adapted(), "plain", {"fc1": weights(3)})
    found = run(model, {"x": X, **made.feeds()})[0]
    np.testing.assert_allclose(found, bumped(X, plain), 1e-4, 1e-4)
    tuned = oa.make_adapter(model, "mine", {"fc1": {**weights(3), "gain": [0.0]}})
    np.testing.assert_array_equal(tuned.weights["fc1"]["gain"], np.zeros(4, np.float32))


@pytest.mark.parametrize(
    "given", [np.float64, np.float16, np.float32, ml_dtypes.bfloat16, ">f8"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_floats_of_another_precision_are_cast_to_the_slot_s(given: Any, dtype: Any) -> None:
    model = oa.insert(oa.Model(two_layers(dtype)), after=["fc1", "fc2"])
    values = {s: {p: a.astype(given) for p, a in w.items()} for s, w in _values().items()}
    made = oa.make_adapter(model, "mine", values)
    assert misfits(model, made) == []
    np.testing.assert_array_equal(
        made.weights["fc1"]["down"], values["fc1"]["down"].astype(dtype)
    )


class _Tensor:
    """What has grad in PyTorch answers numpy so."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


DOWN, UP = weights(3)["down"], weights(3)["up"]
WRONG: dict[str, tuple[Any, str, str]] = {
    "no weights": ({}, "has no weights", "fc1"),
    "no mapping": ([DOWN, UP], "has no weights", "fc1"),
    "an unknown slot": ({"fc3": weights()}, "no slot 'fc3'", "did you mean fc"),
    "a slot without parts": ({"fc1": DOWN}, "'fc1' are ndarray", "down, up"),
    "an unknown part": ({"fc1": {**weights(), "dwn": DOWN}}, "no part 'dwn'", "'down'"),
    "a part that the slot lacks": ({"fc1": {**weights(), "scale": B2}}, "no part 'scale'", ""),
    "a part missing": ({"fc1": {"down": DOWN}}, "lack up", "down, up"),
    "down transposed": (
        {"fc1": {"down": DOWN.T, "up": UP}},
        r"looks transposed.*\(out, in\)",
        ".T",
    ),
    "up transposed": ({"fc1": {"down": DOWN, "up": UP.T}}, "looks transposed", ".T"),
    "both transposed": ({"fc1": {"down": DOWN.T, "up": UP.T}}, "looks transposed", ".T"),
    "another width": (
        {"fc1": {"down": np.ones((5, 3)), "up": UP}},
        r"\[5, 3\], not \[4, r\]",
        "4",
    ),
    "a vector": ({"fc1": {"down": np.ones(4), "up": UP}}, r"\[4\], not \[4, r\]", ""),
    "a scalar": ({"fc1": {"down": 1.0, "up": UP}}, r"\[\], not \[4, r\]", ""),
    "an axis more": ({"fc1": {"down": DOWN[..., None], "up": UP}}, r"\[4, 3, 1\]", ""),
    "no bottleneck": ({"fc1": {"down": DOWN[:, :0], "up": UP[:0]}}, r"\[4, 0\]", ""),
    "two bottlenecks": ({"fc1": {"down": DOWN, "up": UP[:2]}}, "down 3, up 2", "one r"),
    "integers": (
        {"fc1": {"down": np.ones((4, 3), int), "up": UP}},
        "int64",
        "astype('float32')",
    ),
    "booleans": ({"fc1": {"down": DOWN > 0, "up": UP}}, "bool", "float"),
    "complex numbers": ({"fc1": {"down": DOWN * 1j, "up": UP}}, "complex", "float"),
    "text": ({"fc1": {"down": "down.npy", "up": UP}}, "<U8", "float"),
    "a ragged list": ({"fc1": {"down": [[1.0], [1.0, 2.0]], "up": UP}}, "no array", "numpy"),
    "a tensor with grad": ({"fc1": {"down": _Tensor(), "up": UP}}, "requires grad", "numpy"),
    "NaN": ({"fc1": {"down": DOWN * np.nan, "up": UP}}, "NaN or infinity in float32", ""),
    "infinity": ({"fc1": {"down": DOWN, "up": UP * np.inf}}, "NaN or infinity", ""),
    "too large": (
        {"fc1": {"down": DOWN.astype("f8") * 1e300, "up": UP}},
        "infinity in float32",
        "",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_make_no_adapter_are_refused_with_the_reason(what: str) -> None:
    given, message, hint = WRONG[what]
    with pytest.raises(AdapterError, match=message) as caught:
        oa.make_adapter(adapted(), "mine", given)
    assert hint in caught.value.hint


def test_a_bottleneck_as_wide_as_the_slot_does_not_tell_a_transpose_and_is_taken() -> None:
    square = {"down": np.arange(16.0).reshape(4, 4), "up": np.eye(4)}
    made = oa.make_adapter(adapted(), "mine", {"fc1": square})
    np.testing.assert_array_equal(made.weights["fc1"]["down"], square["down"])


def test_a_transpose_on_channels_is_told_in_the_shape_that_was_given() -> None:
    model = oa.insert(oa.open_model("models/dnsmos-p808.onnx"), after="conv2d_5")
    (slot,) = oa.list_slots(model)
    down, up = np.ones((slot.width, 4)), np.ones((4, slot.width))
    with pytest.raises(AdapterError, match="looks transposed") as caught:
        oa.make_adapter(model, "mine", {slot.name: {"down": down.T, "up": up}})
    assert "[32, r] or [r, 32, 1, 1]" in caught.value.message


def test_a_fixed_bottleneck_is_kept() -> None:
    model = oa.insert(oa.Model(two_layers()), after="fc1", bottleneck=2)
    assert oa.make_adapter(model, "mine", {"fc1": weights(2)}).weights
    with pytest.raises(AdapterError, match="fixed bottleneck of 2"):
        oa.make_adapter(model, "mine", {"fc1": weights(3)})


# What was made is held against the model that it meets.


def _other_base() -> oa.Model:
    proto = two_layers()
    proto.graph.initializer[2].raw_data = (B2 + 1).tobytes()
    return oa.insert(oa.Model(proto), after=["fc1", "fc2"])


def _other_activation() -> oa.Model:
    return oa.insert(oa.Model(two_layers()), after=["fc1", "fc2"], activation="gelu")


@pytest.mark.parametrize("suffix", ["", *FORMATS])
@pytest.mark.parametrize(
    ("other", "words"),
    [(_other_base, "another base model"), (_other_activation, "computes gelu.*needs relu")],
)
def test_another_base_or_activation_is_refused_by_everything_that_reads_adapters(
    other: Any, words: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = oa.make_adapter(adapted(), "mine", _values())
    file = oa.save_adapter(made, tmp_path / f"mine.{suffix or 'npz'}")
    given = oa.load_adapter(file) if suffix else made
    wrong = other()
    with pytest.raises(AdapterError, match=words):
        oa.fill(wrong, given)
    with oa.AdapterSession(wrong) as session:
        for source in (given, file):
            with pytest.raises(AdapterError, match=words):
                session.load("mine", source)
        with pytest.raises(AdapterError, match=words):
            session.run({"x": X}, adapter=given)
    theirs = oa.make_adapter(wrong, "theirs", _values())
    with pytest.raises(AdapterError, match=r"different bases|activation"):
        oa.blend([given, theirs], [0.5, 0.5])
    path = oa.save_model(wrong, tmp_path / "wrong.onnx").path
    code, out, _ = cli(capsys, "check", str(path), str(file))
    assert code == 1
    assert words.partition(".")[0] in out


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_keeps_what_an_adapter_is_for(suffix: str, tmp_path: Path) -> None:
    mixed = oa.insert(oa.Model(two_layers()), after="fc1", activation="gelu")
    mixed = oa.insert(mixed, after="fc2", activation="identity")
    made = oa.make_adapter(mixed, "mine", _values())
    found = oa.load_adapter(oa.save_adapter(made, tmp_path / f"mine.{suffix}"))
    assert found.activations == {"fc1": "gelu", "fc2": "identity"}
    assert found.fingerprint == made.fingerprint
    assert misfits(mixed, found) == []


# What cannot be held against anything is said.


def _nameless() -> oa.Adapter:
    return oa.Adapter("hand", _values())


@pytest.mark.parametrize("suffix", ["", *FORMATS])
def test_a_session_warns_once_of_an_adapter_that_does_not_tell_what_it_is_for(
    suffix: str, tmp_path: Path
) -> None:
    hand = _nameless()
    source = oa.save_adapter(hand, tmp_path / f"hand.{suffix}") if suffix else hand
    with oa.AdapterSession(
        adapted(), {"fr": oa.make_adapter(adapted(), "fr", _values())}
    ) as s:
        with pytest.warns(UncheckedWarning) as caught:
            s.load("hand", source)
        (warning,) = caught
        assert "base not checked" in str(warning.message)
        assert "activation not checked" in str(warning.message)
        assert warning.filename == __file__
        s.run({"x": X}, adapter="hand")
        s.run({"x": X}, adapter={"hand": 0.5, "fr": 0.5})
        s.run({"x": X}, adapter=["hand", None, "fr"])
        s.load("again", source)


def test_an_adapter_in_memory_is_warned_of_once_however_often_it_runs() -> None:
    with oa.AdapterSession(adapted()) as session:
        with pytest.warns(UncheckedWarning):
            session.run({"x": X}, adapter=_nameless())
        session.run({"x": X}, adapter=_nameless())


def test_fill_warns_of_what_it_could_not_check() -> None:
    half = replace(oa.make_adapter(adapted(), "half", _values()), activations={})
    with pytest.warns(UncheckedWarning, match="activation not checked") as caught:
        oa.fill(adapted(), half)
    assert "base not checked" not in str(caught[0].message)


def test_a_blend_tells_no_more_than_the_least_that_it_is_made_of() -> None:
    stamped, hand = oa.make_adapter(adapted(), "fr", _values()), _nameless()
    for order in ([stamped, hand], [hand, stamped]):
        mixed = oa.blend(order, [0.5, 0.5])
        assert (mixed.fingerprint, mixed.activations) == ("", {})
    both = oa.blend([stamped, stamped], [0.5, 0.5])
    assert (both.fingerprint, both.activations) == (stamped.fingerprint, stamped.activations)


def test_a_slot_without_an_activation_needs_none() -> None:
    from onnx_adapt.adapter.fitting import required_manifest

    model = oa.insert(oa.Model(two_layers()), after="fc1", parts="scale")
    made = replace(oa.make_adapter(model, "s", {"fc1": {"scale": B2}}), activations={})
    assert unchecked(required_manifest(model), made) == []


def test_plain_feeds_warn_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = run(adapted(), {"x": X, **_nameless().feeds()})
    np.testing.assert_allclose(found, bumped(X, _nameless()), 1e-4, 1e-4)


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_commands_say_what_was_not_checked_and_go_on(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(oa.save_model(adapted(), tmp_path / "a.onnx").path)
    hand = str(oa.save_adapter(_nameless(), tmp_path / f"hand.{suffix}"))
    code, out, _ = cli(capsys, "check", model, hand)
    assert code == 0
    assert f"{hand}: ok\n  base not checked" in out
    assert "  activation not checked" in out
    code, out, _ = cli(capsys, "check", model, hand, "--json")
    assert code == 0
    assert len(json.loads(out)["unchecked"][hand]) == 2
    np.savez(tmp_path / "x.npz", x=X)
    inputs = str(tmp_path / "x.npz")
    for args in (("fill", model, hand), ("run", model, "--inputs", inputs, "--adapter", hand)):
        code, _, err = cli(capsys, *args)
        assert code == 0
        assert err.count("warning: adapter 'hand': base not checked") == 1, err
