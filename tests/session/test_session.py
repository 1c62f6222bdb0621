"""One session runs the base and every adapter that was loaded, and nothing else."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from adapter_models import adapted, bumped, saved_model, trained, two_layers, weights
from session_adapters import BASE, DE, FR, X, adapted_file, adapter, close
from trained_cases import CASES, SUPPORTED

import onnx_adapt as oa
from onnx_adapt.dtypes import DTYPES
from onnx_adapt.errors import AdapterError, AdapterNotFoundError, RunError, SlotError
from onnx_adapt.session.ort_adapter import as_ort_value

FORMATS = ["safetensors", "onnx_adapter", "npz"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return adapted_file(tmp_path)


def _base_session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(saved_model(path), providers=["CPUExecutionProvider"])


def test_without_an_adapter_it_is_the_base_bit_for_bit(model: Path, tmp_path: Path) -> None:
    expected = _base_session(tmp_path / "base.onnx").run(None, {"x": X})[0]
    with oa.AdapterSession(model, {"fr": FR}) as session:
        before = session.run({"x": X})["y"]
        session.run({"x": X}, adapter="fr")
        after = session.run({"x": X}, adapter=None)["y"]
    np.testing.assert_array_equal(before, expected)
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_adapter_of_every_format_is_what_its_weights_say(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    path = oa.save_adapter(FR, tmp_path / f"fr.{suffix}")
    with oa.AdapterSession(model, adapters={"fr": path}) as session:
        assert close(session.run({"x": X}, adapter="fr")["y"], bumped(X, FR))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "name", [name for name in SUPPORTED if "dynamo" in name or "_ts" in name]
)
def test_trained_adapters_give_what_pytorch_gives(
    name: str, suffix: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    saved = oa.save_model(oa.insert_checkpoint(base, checkpoint), tmp_path / "adapted.onnx")
    path = oa.save_adapter(checkpoint.adapter, tmp_path / f"trained.{suffix}")
    with oa.AdapterSession(saved.path, {"trained": path}) as session:
        assert case.distance(session.run(case.inputs(), "trained")) < case.tolerance


def test_adapters_are_swapped_call_by_call(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR, "de": DE}) as session:
        for _ in range(3):
            assert close(session.run({"x": X}, adapter="fr")["y"], bumped(X, FR))
            assert close(session.run({"x": X}, adapter="de")["y"], bumped(X, DE))
            assert close(session.run({"x": X})["y"], BASE)


def test_an_adapter_in_memory_and_a_model_in_memory_need_no_files() -> None:
    with oa.AdapterSession(adapted()) as session:
        assert close(session.run({"x": X}, adapter=FR)["y"], bumped(X, FR))
        assert session.adapters == {}


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float16, 0.2), (np.float64, 1e-9)])
@pytest.mark.parametrize("suffix", FORMATS)
def test_other_element_types_run_too(
    dtype: type, tolerance: float, suffix: str, tmp_path: Path
) -> None:
    model = oa.insert(oa.Model(two_layers(dtype)), after=["fc1", "fc2"])
    slots = {name: weights(3, i, dtype) for i, name in enumerate(("fc1", "fc2"))}
    path = oa.save_adapter(oa.make_adapter(model, "x", slots), tmp_path / f"x.{suffix}")
    x = X.astype(dtype)
    with oa.AdapterSession(model, {"x": path}) as session:
        found = session.run({"x": x}, adapter="x")["y"]
    wide = {s: {p: a.astype(np.float64) for p, a in w.items()} for s, w in slots.items()}
    assert (
        np.abs(found - bumped(x.astype(np.float64), oa.Adapter("x", wide))).max() < tolerance
    )


def test_bfloat16_weights_reach_onnxruntime_as_they_are() -> None:
    array = np.array([[1.5, -2.0], [0.25, 3.0]], DTYPES["bfloat16"])
    value = as_ort_value(array)
    assert (value.data_type(), value.shape()) == ("tensor(bfloat16)", [2, 2])
    assert value.data_ptr() == array.ctypes.data


def test_a_trained_head_goes_with_its_adapter(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    model = oa.insert_checkpoint(base, checkpoint)
    baked = oa.bake(oa.fill(model, checkpoint.adapter))
    expected = oa.AdapterSession(baked).run({"x": X})["y"]
    with oa.AdapterSession(model, {"fr": checkpoint.adapter}) as session:
        np.testing.assert_allclose(
            session.run({"x": X}, adapter="fr")["y"], expected, rtol=1e-5, atol=1e-5
        )
        assert close(session.run({"x": X})["y"], BASE)


def test_only_the_outputs_that_were_asked_for_are_computed(model: Path) -> None:
    with oa.AdapterSession(model) as session:
        assert list(session.run({"x": X}, outputs=["y"])) == ["y"]
        with pytest.raises(RunError, match="no output 'z'") as caught:
            session.run({"x": X}, outputs=["z"])
    assert "y" in caught.value.hint


def test_the_adapter_survives_the_garbage_collector(model: Path, tmp_path: Path) -> None:
    path = oa.save_adapter(FR, tmp_path / "fr.onnx_adapter")
    with oa.AdapterSession(model, {"fr": path}) as session:
        gc.collect()
        assert close(session.run({"x": X}, adapter="fr")["y"], bumped(X, FR))


# What is loaded


def test_what_is_loaded_can_be_seen(model: Path, tmp_path: Path) -> None:
    path = oa.save_adapter(FR, tmp_path / "fr.onnx_adapter")
    with oa.AdapterSession(model) as session:
        told = session.load("french", path)
        assert told == session.adapters["french"]
        assert (told.name, told.path, told.bytes) == ("french", path, FR.size)
        session.run({"x": X}, adapter="french")
        assert session.adapters["french"].last_used > told.last_used


def test_an_unloaded_adapter_is_gone(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR}) as session:
        session.unload("fr")
        assert session.adapters == {}
        with pytest.raises(AdapterNotFoundError, match="'fr'"):
            session.run({"x": X}, adapter="fr")
        with pytest.raises(AdapterNotFoundError, match="'fr'"):
            session.unload("fr")


def test_a_name_that_was_mistyped_is_an_error_with_the_nearest(model: Path) -> None:
    session = oa.AdapterSession(model, {"customer-42": FR})
    with pytest.raises(AdapterNotFoundError, match="custmer-42") as caught:
        session.run({"x": X}, adapter="custmer-42")
    assert "customer-42" in caught.value.hint


def test_loading_a_name_again_replaces_the_adapter(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR}) as session:
        session.load("fr", DE)
        assert close(session.run({"x": X}, adapter="fr")["y"], bumped(X, DE))


def test_the_least_recently_used_file_is_evicted_and_read_again(
    model: Path, tmp_path: Path
) -> None:
    files = {
        n: oa.save_adapter(adapter(n, i), tmp_path / f"{n}.npz") for i, n in enumerate("abc")
    }
    with oa.AdapterSession(model, files, max_adapters=2) as session:
        assert list(session.adapters) == ["b", "c"]
        session.run({"x": X}, adapter="b")
        found = session.run({"x": X}, adapter="a")["y"]
        assert close(found, bumped(X, adapter("a", 0)))
        assert list(session.adapters) == ["b", "a"]


def test_an_evicted_adapter_without_a_file_is_an_error_that_says_so(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR, "de": DE}, max_adapters=1) as session:
        assert list(session.adapters) == ["de"]
        with pytest.raises(AdapterNotFoundError, match="evicted") as caught:
            session.run({"x": X}, adapter="fr")
    assert "max_adapters" in caught.value.hint


def test_bytes_are_a_limit_too(model: Path) -> None:
    with oa.AdapterSession(model, max_bytes=FR.size + DE.size) as session:
        session.load("fr", FR)
        session.load("de", DE)
        assert list(session.adapters) == ["fr", "de"]
        session.load("more", adapter("more", 3, 1))
        assert list(session.adapters) == ["de", "more"]
        with pytest.raises(AdapterError, match="max_bytes"):
            session.load("large", adapter("large", 3, 4000))


@pytest.mark.parametrize("limit", [{"max_adapters": 0}, {"max_bytes": -1}])
def test_a_limit_below_one_is_refused(limit: dict[str, int], model: Path) -> None:
    with pytest.raises(AdapterError, match="max_"):
        oa.AdapterSession(model, **limit)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_replaced_file_is_picked_up_by_reload_and_not_before(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    path = oa.save_adapter(FR, tmp_path / f"x.{suffix}")
    with oa.AdapterSession(model, {"x": path, "still": DE}) as session:
        oa.save_adapter(DE, path)
        assert close(session.run({"x": X}, adapter="x")["y"], bumped(X, FR))
        assert session.reload() == ("x",)
        assert close(session.run({"x": X}, adapter="x")["y"], bumped(X, DE))
        assert session.reload() == ()
        assert session.reload("x") == ("x",)


def test_a_bad_new_file_leaves_the_old_adapter(model: Path, tmp_path: Path) -> None:
    path = oa.save_adapter(FR, tmp_path / "x.onnx_adapter")
    with oa.AdapterSession(model, {"x": path}) as session:
        fresh = tmp_path / "new"
        fresh.write_bytes(b"no adapter")
        os.replace(fresh, path)
        with pytest.raises(AdapterError):
            session.reload()
        assert close(session.run({"x": X}, adapter="x")["y"], bumped(X, FR))


def test_what_came_from_no_file_cannot_be_reloaded(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR}) as session:
        with pytest.raises(AdapterError, match="no file"):
            session.reload("fr")
        with pytest.raises(AdapterNotFoundError):
            session.reload("de")


def test_a_blend_never_mixes_a_loaded_adapter_with_its_successor(
    model: Path, tmp_path: Path
) -> None:
    path = oa.save_adapter(FR, tmp_path / "x.onnx_adapter")
    with oa.AdapterSession(model, {"x": path}) as session:
        oa.save_adapter(DE, path)
        with pytest.raises(AdapterError, match="replaced") as caught:
            session.run({"x": X}, adapter={"x": 0.5})
    assert "reload" in caught.value.hint


# What does not fit


def _partial() -> oa.Adapter:
    return oa.make_adapter(adapted(), "part", {"fc1": weights(2)})


BAD = {
    "a slot too few": (_partial(), "no weights for slot 'fc2'"),
    "a slot too many": (
        oa.Adapter("x", {**FR.weights, "fc9": weights(2)}),
        "no slot 'fc9'",
    ),
    "another width": (
        oa.Adapter(
            "x",
            {
                **FR.weights,
                "fc1": {"down": np.ones((5, 2), "f4"), "up": np.ones((2, 4), "f4")},
            },
        ),
        r"shape \[5, 2\]",
    ),
    "another element type": (
        oa.Adapter("x", {**FR.weights, "fc1": weights(2, 0, np.float64)}),
        "float64",
    ),
    "not a number": (
        oa.Adapter("x", {**FR.weights, "fc1": {p: a * np.nan for p, a in weights(2).items()}}),
        "NaN",
    ),
    "another base": (
        oa.Adapter("x", FR.weights, fingerprint="sha256:" + "f" * 64),
        "another base model",
    ),
    "another activation": (
        oa.Adapter("x", FR.weights, activations={"fc1": "gelu"}),
        "gelu",
    ),
    "a weight nobody replaces": (
        oa.Adapter("x", FR.weights, {"fc2.bias": np.ones(4, "f4")}),
        "no replaceable weight 'fc2.bias'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("suffix", ["", *FORMATS])
def test_what_does_not_fit_is_refused_when_it_is_loaded(
    kind: str, suffix: str, model: Path, tmp_path: Path
) -> None:
    bad, words = BAD[kind]
    source = oa.save_adapter(bad, tmp_path / f"x.{suffix}") if suffix else bad
    with oa.AdapterSession(model) as session:
        with pytest.raises(AdapterError, match=words):
            session.load("x", source)
        assert session.adapters == {}


def test_a_partial_adapter_leaves_slots_off_if_that_is_allowed(model: Path) -> None:
    with oa.AdapterSession(model) as session:
        session.load("part", _partial(), allow_partial=True)
        assert close(session.run({"x": X}, adapter="part")["y"], bumped(X, _partial()))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\0" * 64])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_file_is_an_adapter_error(
    content: bytes, suffix: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    with oa.AdapterSession(model) as session, pytest.raises(AdapterError):
        session.load("x", path)


def test_a_missing_file_and_an_unknown_suffix_are_adapter_errors(model: Path) -> None:
    with oa.AdapterSession(model) as session:
        for name in ("no-such.onnx_adapter", "no-such.safetensors", "x.txt"):
            with pytest.raises(AdapterError, match=name):
                session.load("x", name)


def test_a_baked_model_takes_no_adapters_and_says_why() -> None:
    session = oa.AdapterSession(oa.bake(oa.fill(adapted(), FR)))
    assert close(session.run({"x": X})["y"], bumped(X, FR))
    with pytest.raises(SlotError, match="baked"):
        session.load("de", DE)


def test_a_base_without_slots_runs_and_takes_no_adapters(tmp_path: Path) -> None:
    session = oa.AdapterSession(saved_model(tmp_path / "base.onnx"))
    assert close(session.run({"x": X})["y"], BASE)
    with pytest.raises(SlotError, match="no slots"):
        session.load("fr", FR)


def test_slots_that_a_simplifier_stripped_are_named(tmp_path: Path) -> None:
    proto = adapted().proto
    kept = [value for value in proto.graph.input if not value.name.startswith("adapter.")]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    onnx.save(proto, tmp_path / "stripped.onnx")
    session = oa.AdapterSession(tmp_path / "stripped.onnx")
    with pytest.raises(SlotError, match="stripped"):
        session.load("fr", FR)


def test_weights_cannot_come_from_a_feed_and_an_adapter_at_once(model: Path) -> None:
    own = {"adapter.fc1.down": weights(2)["down"]}
    session = oa.AdapterSession(model, {"fr": FR})
    with pytest.raises(AdapterError, match=r"adapter\.fc1\.down"):
        session.run({"x": X, **own}, adapter="fr")


def test_feeds_that_do_not_fit_are_a_run_error_with_what_is_wanted(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR}) as session:
        for feeds in ({}, {"x": X[:, :3]}, {"x": X.astype(np.int64)}, {"x": X, "z": X}):
            for name in (None, "fr"):
                with pytest.raises(RunError) as caught:
                    session.run(feeds, adapter=name)
                assert "x ['n', 4]" in caught.value.hint


NO_ADAPTER = [3, b"fr", {}, True, np.array("fr"), {"fr": "much"}, {"fr": True}]


@pytest.mark.parametrize("odd", NO_ADAPTER)
def test_what_is_no_adapter_is_refused(odd: object, model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR}) as session, pytest.raises(AdapterError):
        session.run({"x": X}, adapter=odd)  # type: ignore[arg-type]


def test_a_missing_model_and_one_that_is_none_are_run_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no model"):
        oa.AdapterSession(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(RunError, match="cannot load"):
        oa.AdapterSession(tmp_path / "bad.onnx")


def test_a_closed_session_says_that_it_is_closed(model: Path) -> None:
    with oa.AdapterSession(model, {"fr": FR}) as session:
        pass
    for adapter_name in (None, "fr"):
        with pytest.raises((RunError, AdapterNotFoundError)):
            session.run({"x": X}, adapter=adapter_name)


# Options and warnings


def test_the_users_session_options_are_used_and_left_as_they_are(
    model: Path, tmp_path: Path
) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    severity = options.log_severity_level
    with oa.AdapterSession(model, session_options=options, providers=["CPUExecutionProvider"]):
        assert (tmp_path / "optimised.onnx").exists()
    assert options.log_severity_level == severity


def test_slot_warnings_are_silenced_and_no_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proto = adapted().proto
    spare = proto.graph.initializer.add()
    spare.CopyFrom(proto.graph.initializer[0])
    spare.name = "nobody_reads_this"
    onnx.save(proto, tmp_path / "model.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    plain = capfd.readouterr().err
    assert "appears in graph inputs" in plain
    assert "nobody_reads_this" in plain
    oa.AdapterSession(tmp_path / "model.onnx")
    ours = capfd.readouterr().err
    assert "appears in graph inputs" not in ours
    assert "nobody_reads_this" in ours


def test_running_adapters_imports_no_graph_code(model: Path, tmp_path: Path) -> None:
    path = oa.save_adapter(FR, tmp_path / "fr.safetensors")
    code = (
        "import sys, numpy as np, onnx_adapt as oa\n"
        f"session = oa.AdapterSession({str(model)!r}, {{'fr': {str(path)!r}}})\n"
        "session.run({'x': np.ones((1, 4), 'float32')}, adapter='fr')\n"
        "session.run({'x': np.ones((1, 4), 'float32')}, adapter={'fr': 0.5})\n"
        "assert 'onnx' not in sys.modules and 'rich' not in sys.modules\n"
        "assert not any(name.startswith('onnx_adapt.graph') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
