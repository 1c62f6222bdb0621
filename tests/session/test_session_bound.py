"""Bound memory and OrtValues: ONNX Runtime's own ways drop adapters, these do not."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from adapter_models import adapted, bumped
from session_adapters import BASE, DE, FR, X, adapted_file, close

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError, RunError

FORMATS = ["safetensors", "onnx_adapter", "npz"]


@pytest.fixture(params=FORMATS)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> oa.AdapterSession:
    files = {
        a.name: oa.save_adapter(a, tmp_path / f"{a.name}.{request.param}") for a in (FR, DE)
    }
    return oa.AdapterSession(adapted_file(tmp_path), files)


def test_onnxruntime_s_own_binding_gives_the_base_without_a_word(tmp_path: Path) -> None:
    """Why there is a binding of our own; if this fails, ONNX Runtime was mended."""
    path = oa.save_adapter(FR, tmp_path / "fr.onnx_adapter")
    options, quiet = ort.RunOptions(), ort.SessionOptions()
    loaded = ort.LoraAdapter()
    loaded.Load(str(path))
    options.add_active_adapter(loaded)
    quiet.log_severity_level = 3
    plain = ort.InferenceSession(adapted_file(tmp_path), quiet)
    binding = plain.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    plain.run_with_iobinding(binding, options)
    assert close(binding.copy_outputs_to_cpu()[0], BASE)


def test_a_binding_runs_the_adapter_of_each_call_and_then_the_base(
    session: oa.AdapterSession,
) -> None:
    binding = session.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    for name, expected in (
        ("fr", bumped(X, FR)),
        ("de", bumped(X, DE)),
        (None, BASE),
        ("fr", bumped(X, FR)),
    ):
        session.run_with_iobinding(binding, adapter=name)
        assert close(binding.copy_outputs_to_cpu()[0], expected)
        assert close(binding.get_outputs()[0].numpy(), expected)


def test_a_bound_output_is_written_in_place(session: oa.AdapterSession) -> None:
    out = np.zeros_like(X)
    value = ort.OrtValue.ortvalue_from_numpy(out)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(X))
    binding.bind_ortvalue_output("y", value)
    session.run_with_iobinding(binding, adapter={"fr": 0.5, "de": 0.5})
    assert close(value.numpy(), session.run({"x": X}, {"fr": 0.5, "de": 0.5})["y"])


def test_memory_can_be_bound_by_its_address(session: oa.AdapterSession) -> None:
    x, out = X.copy(), np.zeros_like(X)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    session.run_with_iobinding(binding, adapter="fr")
    assert close(out, bumped(X, FR))
    x[:] = 0
    session.run_with_iobinding(binding, adapter="fr")
    assert close(out, bumped(np.zeros_like(X), FR))


def test_a_new_input_is_seen_by_the_next_run(session: oa.AdapterSession) -> None:
    binding = session.io_binding()
    binding.bind_output("y")
    for x in (X, X[:2] + 1):
        binding.bind_cpu_input("x", x)
        session.run_with_iobinding(binding, adapter="de")
        assert close(binding.copy_outputs_to_cpu()[0], bumped(x, DE))


def test_a_binding_of_onnxruntime_and_bad_bindings_are_refused(
    session: oa.AdapterSession,
) -> None:
    with pytest.raises(AdapterError, match="no binding") as caught:
        session.run_with_iobinding(object(), adapter="fr")  # type: ignore[arg-type]
    assert "session.io_binding()" in caught.value.hint
    empty = session.io_binding()
    with pytest.raises(RunError, match="does not run"):
        session.run_with_iobinding(empty, adapter="fr")
    with pytest.raises(RunError, match="nothing has run"):
        session.io_binding().copy_outputs_to_cpu()
    own = session.io_binding()
    own.bind_cpu_input("adapter.fc1.down", FR.weights["fc1"]["down"])
    with pytest.raises(AdapterError, match="is fed"):
        session.run_with_iobinding(own, adapter="fr")


def test_ort_values_run_the_adapter_too(session: oa.AdapterSession) -> None:
    feeds = {"x": ort.OrtValue.ortvalue_from_numpy(X)}
    for name, expected in (("fr", bumped(X, FR)), (None, BASE), ("de", bumped(X, DE))):
        found = session.run_with_ort_values(feeds, adapter=name, outputs=["y"])
        assert close(found["y"].numpy(), expected)
    with pytest.raises(RunError):
        session.run_with_ort_values({}, adapter="fr")


def test_a_binding_of_another_session_is_refused(session: oa.AdapterSession) -> None:
    other = oa.AdapterSession(oa.bake(oa.fill(adapted(), FR)))
    foreign = other.io_binding()
    foreign.bind_cpu_input("x", X)
    foreign.bind_output("y")
    with pytest.raises(AdapterError, match="another session"):
        session.run_with_iobinding(foreign, adapter="de")


def test_a_binding_that_failed_fails_again_and_has_no_outputs(
    session: oa.AdapterSession,
) -> None:
    binding = session.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    session.run_with_iobinding(binding, adapter="fr")
    binding.bind_cpu_input("no such input", X)
    for name in ("fr", "fr", None, None):
        with pytest.raises(RunError, match="does not run"):
            session.run_with_iobinding(binding, adapter=name)
        with pytest.raises(RunError, match="nothing has run"):
            binding.copy_outputs_to_cpu()


def test_a_device_that_is_not_there_is_a_run_error(session: oa.AdapterSession) -> None:
    binding = session.io_binding()
    binding.bind_input("x", "nodevice", 0, np.float32, X.shape, X.ctypes.data)
    binding.bind_output("y")
    with pytest.raises(RunError, match="does not run"):
        session.run_with_iobinding(binding, adapter="fr")
