"""Sessions under bad input: files written into, names in a race, models that were changed."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from adapter_models import adapted, bumped, trained, weights
from session_adapters import BASE, DE, FR, X, adapted_file, adapter, close
from waiting import LONG

import onnx_adapt as oa
from onnx_adapt.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdaptError,
    RunError,
    SlotError,
)
from onnx_adapt.session import cache as adapter_cache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return adapted_file(tmp_path)


# Files under a session


def test_a_mapped_file_that_is_written_into_is_refused_and_not_run(
    model: Path, tmp_path: Path
) -> None:
    path = oa.save_adapter(FR, tmp_path / "x.onnx_adapter")
    other = oa.save_adapter(adapter("x", 9), tmp_path / "y.onnx_adapter")
    session = oa.AdapterSession(model, {"x": path})
    session.run({"x": X}, adapter="x")
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    for choice in ("x", {"x": 0.5}, ["x"] * 6):
        with pytest.raises(AdapterError, match="written into") as caught:
            session.run({"x": X}, adapter=choice)
        assert "reload" in caught.value.hint
    assert session.reload() == ("x",)
    assert close(session.run({"x": X}, adapter="x")["y"], bumped(X, adapter("x", 9)))


def test_a_mapped_file_that_is_cut_short_is_refused_before_it_is_read(
    model: Path, tmp_path: Path
) -> None:
    path = oa.save_adapter(FR, tmp_path / "x.onnx_adapter")
    session = oa.AdapterSession(model, {"x": path})
    with path.open("r+b") as file:
        file.truncate(64)
    with pytest.raises(AdapterError, match="written into"):
        session.run({"x": X}, adapter="x")
    with pytest.raises(AdapterError, match="damaged"):
        session.reload()
    path.unlink()
    session.unload("x")


def test_a_deleted_file_still_runs(model: Path, tmp_path: Path) -> None:
    path = oa.save_adapter(FR, tmp_path / "x.onnx_adapter")
    session = oa.AdapterSession(model, {"x": path})
    path.unlink()
    assert close(session.run({"x": X}, adapter="x")["y"], bumped(X, FR))


def test_one_bad_file_does_not_keep_reload_from_the_others(
    model: Path, tmp_path: Path
) -> None:
    files = {n: oa.save_adapter(FR, tmp_path / f"{n}.npz") for n in "abc"}
    session = oa.AdapterSession(model, files)
    oa.save_adapter(DE, files["a"])
    files["b"].write_bytes(b"no adapter")
    oa.save_adapter(DE, files["c"])
    with pytest.raises(AdapterError, match=r"stays for 'b'.*read again: a, c"):
        session.reload()
    for name, item in (("a", DE), ("b", FR), ("c", DE)):
        assert close(session.run({"x": X}, adapter=name)["y"], bumped(X, item))


def test_files_are_found_wherever_the_process_goes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    oa.save_adapter(FR, tmp_path / "x.npz")
    oa.save_adapter(DE, tmp_path / "elsewhere" / "x.npz")
    monkeypatch.chdir(tmp_path)
    session = oa.AdapterSession("adapted.onnx", {"x": "x.npz"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert session.reload("x") == ("x",)
    assert close(session.run({"x": X}, adapter="x")["y"], bumped(X, FR))


def test_a_blend_of_heads_wants_the_model_file_that_was_loaded(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    path = oa.save_model(oa.insert_checkpoint(base, checkpoint), tmp_path / "a.onnx").path
    session = oa.AdapterSession(path, {"fr": checkpoint.adapter})
    expected = session.run({"x": X}, adapter={"fr": 0.5})
    oa.save_model(oa.fill(oa.open_model(path), checkpoint.adapter), path, overwrite=True)
    with pytest.raises(RunError, match="another file"):
        session.run({"x": X}, adapter={"fr": 0.25})
    np.testing.assert_array_equal(session.run({"x": X}, {"fr": 0.5})["y"], expected["y"])


# Races: something happens while a file is read


def _meanwhile(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> None:
    """Let an action happen while the next adapter is read."""
    original = adapter_cache.ort_adapter.read
    waiting = [action]

    def read(source: Any) -> Any:
        found = original(source)
        if waiting:
            waiting.pop()()
        return found

    monkeypatch.setattr(adapter_cache.ort_adapter, "read", read)


def test_what_is_unloaded_during_a_reload_stays_unloaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = oa.AdapterSession(model, {"a": oa.save_adapter(FR, tmp_path / "a.npz")})
    _meanwhile(monkeypatch, lambda: session.unload("a"))
    assert session.reload("a") == ()
    assert session.adapters == {}


def test_what_is_loaded_during_a_reload_is_what_counts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = oa.AdapterSession(model, {"a": oa.save_adapter(FR, tmp_path / "a.npz")})
    _meanwhile(monkeypatch, lambda: session.load("a", DE))
    session.reload("a")
    assert close(session.run({"x": X}, adapter="a")["y"], bumped(X, DE))


def test_what_is_loaded_while_an_evicted_one_is_read_again_is_what_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {n: oa.save_adapter(FR, tmp_path / f"{n}.npz") for n in "ab"}
    session = oa.AdapterSession(model, files, max_adapters=1)
    _meanwhile(monkeypatch, lambda: session.load("a", DE))
    assert close(session.run({"x": X}, adapter="a")["y"], bumped(X, DE))


def test_an_adapter_that_is_unloaded_in_use_ends_its_runs(model: Path, tmp_path: Path) -> None:
    files = {n: oa.save_adapter(adapter(n, 3), tmp_path / f"{n}.onnx_adapter") for n in "ab"}
    session = oa.AdapterSession(model, files)
    expected, wrong, stop = bumped(X, adapter("a", 3)), [], threading.Event()

    def call() -> None:
        while not stop.is_set():
            try:
                if not close(session.run({"x": X}, adapter="a")["y"], expected):
                    wrong.append("output")
            except AdapterNotFoundError:
                continue

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        session.unload("a")
        session.load("a", files["a"])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# Models


def test_a_model_with_required_inputs_for_slots_is_refused_by_name(tmp_path: Path) -> None:
    proto = adapted().proto
    kept = [item for item in proto.graph.initializer if item.name != "adapter.fc1.down"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.save(proto, tmp_path / "required.onnx")
    session = oa.AdapterSession(tmp_path / "required.onnx")
    with pytest.raises(SlotError, match=r"'adapter\.fc1\.down'.*no default"):
        session.load("fr", FR)


@pytest.mark.parametrize("filled", [False, True])
def test_a_partial_adapter_and_a_blend_of_nothing_leave_slots_off_whatever_the_default(
    filled: bool, tmp_path: Path
) -> None:
    part = oa.make_adapter(adapted(), "part", {"fc1": weights(2)})
    model = oa.fill(adapted(), adapter("default", 7)) if filled else adapted()
    session = oa.AdapterSession(model)
    for suffix in ("safetensors", "onnx_adapter"):
        path = oa.save_adapter(part, tmp_path / f"part.{suffix}")
        session.load(suffix, path, allow_partial=True)
        assert close(session.run({"x": X}, adapter=suffix)["y"], bumped(X, part))
    session.load("fr", FR)
    assert close(session.run({"x": X}, adapter={"fr": 0})["y"], BASE)


def test_a_partial_adapter_for_a_filled_model_has_the_base_s_own_head(tmp_path: Path) -> None:
    base, checkpoint = trained(tmp_path)
    model = oa.insert_checkpoint(base, checkpoint)
    part = oa.make_adapter(model, "part", checkpoint.adapter.weights)
    found = []
    for each in (model, oa.fill(model, checkpoint.adapter)):
        path = oa.save_model(each, tmp_path / "m.onnx").path
        session = oa.AdapterSession(path)
        session.load("part", part, allow_partial=True)
        found.append(session.run({"x": X}, adapter="part")["y"])
    assert close(*found)


def test_a_filled_model_runs_its_default_until_an_adapter_is_given() -> None:
    session = oa.AdapterSession(oa.fill(adapted(), FR), {"de": DE})
    assert close(session.run({"x": X})["y"], bumped(X, FR))
    assert close(session.run({"x": X}, adapter="de")["y"], bumped(X, DE))


def test_a_blend_for_slots_of_a_fixed_bottleneck_is_refused_with_the_reason() -> None:
    fixed = oa.insert(oa.Model(adapted().proto), after="fc2", bottleneck=2)
    names = [slot.name for slot in oa.list_slots(fixed)]
    sizes = {slot.name: slot.bottleneck or 3 for slot in oa.list_slots(fixed)}
    given = oa.make_adapter(fixed, "a", {name: weights(sizes[name]) for name in names})
    session = oa.AdapterSession(fixed, {"a": given, "b": given})
    with pytest.raises(AdapterError, match="fixed bottleneck of 2"):
        session.run({"x": X}, adapter={"a": 0.5, "b": 0.5})


# Arguments


def test_feeds_in_the_other_byte_order_are_turned(model: Path) -> None:
    session = oa.AdapterSession(model, {"fr": FR})
    other = X.astype(X.dtype.newbyteorder(">"))
    for name, expected in ((None, BASE), ("fr", bumped(X, FR))):
        assert close(session.run({"x": other}, adapter=name)["y"], expected)
        found = session.run_with_ort_values({"x": other}, adapter=name)["y"].numpy()
        assert close(found, expected)


MISUSE: dict[str, Callable[[oa.AdapterSession], Any]] = {
    "no feeds": lambda s: s.run(None),  # type: ignore[arg-type]
    "feeds without names": lambda s: s.run([X]),  # type: ignore[arg-type]
    "no feeds for rows": lambda s: s.run(None, ["fr"] * 6),  # type: ignore[arg-type]
    "no outputs": lambda s: s.run({"x": X}, outputs=[]),
    "a blend by number": lambda s: s.run({"x": X}, adapter={3: 0.5}),  # type: ignore[dict-item]
    "an endless weight": lambda s: s.run({"x": X}, adapter={"fr": 10**400}),
    "an array of no axis": lambda s: s.run({"x": X}, adapter=np.array("fr")),
    "rows of rows": lambda s: s.run({"x": X}, adapter=[["fr"]] * 6),  # type: ignore[list-item]
    "no name": lambda s: s.unload(None),  # type: ignore[arg-type]
    "an empty name": lambda s: s.load("", FR),
    "a name that is none": lambda s: s.load(None, FR),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", MISUSE.values(), ids=MISUSE)
def test_misuse_is_an_adapt_error(
    call: Callable[[oa.AdapterSession], Any], model: Path
) -> None:
    with pytest.raises(oa.AdaptError) as caught:
        call(oa.AdapterSession(model, {"fr": FR}))
    assert caught.value.hint


@pytest.mark.parametrize("limits", [{"max_adapters": 1.5}, {"max_bytes": "3"}])
def test_a_limit_that_is_no_number_is_refused(limits: dict[str, Any], model: Path) -> None:
    with pytest.raises(AdapterError, match="max_"):
        oa.AdapterSession(model, **limits)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for odd in (b"bytes", 3, None):
        with pytest.raises(AdaptError, match="is no model"):
            oa.AdapterSession(odd)  # type: ignore[arg-type]


def test_a_provider_may_be_one_name(model: Path) -> None:
    session = oa.AdapterSession(model, providers="CPUExecutionProvider")
    assert close(session.run({"x": X})["y"], BASE)


def test_a_closed_session_does_nothing_more(model: Path) -> None:
    session = oa.AdapterSession(model, {"fr": FR})
    binding = session.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    session.close()
    for call in (
        lambda: session.run({"x": X}),
        lambda: session.run({"x": X}, adapter="fr"),
        lambda: session.load("fr", FR),
        lambda: session.run_with_ort_values({}),
        lambda: session.run_with_iobinding(binding),
        session.io_binding,
    ):
        with pytest.raises(RunError, match="closed"):
            call()
    assert session.adapters == {}


def test_blends_count_against_the_bytes_that_may_be_loaded(model: Path) -> None:
    session = oa.AdapterSession(model, {"fr": FR, "de": DE}, max_bytes=FR.size + DE.size)
    for weight in (0.1, 0.2, 0.3):
        assert session.run({"x": X}, adapter={"fr": weight, "de": 0.5})["y"].shape == (6, 4)
        held = sum(item.size for item in session._cache._blends.values())
        assert held == 0
    assert list(session.adapters) == ["fr", "de"]


# Stderr while a session starts


def test_the_base_s_own_warning_about_an_input_with_a_default_comes_through(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proto = adapted().proto
    own = proto.graph.input.add()
    own.CopyFrom(proto.graph.input[0])
    stored = next(t for t in proto.graph.initializer if not t.name.startswith("adapter."))
    own.name = stored.name
    del own.type.tensor_type.shape.dim[:]
    for size in stored.dims:
        own.type.tensor_type.shape.dim.add().dim_value = size
    onnx.save(proto, tmp_path / "m.onnx")
    oa.AdapterSession(tmp_path / "m.onnx")
    told = capfd.readouterr().err
    assert f"Initializer {stored.name} appears in graph inputs" in told
    assert "adapter.fc1" not in told


def test_a_model_whose_base_is_gone_is_one_error_and_no_warnings(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "models/dnsmos-p808.onnx"
    (tmp_path / "base.onnx").write_bytes(Path(name).read_bytes())
    base = oa.open_model(tmp_path / "base.onnx")
    oa.save_model(oa.insert(base, after="conv2d_5"), tmp_path / "thin.onnx", thin=True)
    (tmp_path / "base.onnx").unlink()
    with pytest.raises(RunError, match="cannot load thin") as caught:
        oa.AdapterSession(tmp_path / "thin.onnx")
    assert "onnx-adapt check" in caught.value.hint
    assert "appears in graph inputs" not in capfd.readouterr().err


@pytest.mark.parametrize("how", ["filled", "baked"])
def test_what_a_trained_head_replaces_is_no_warning(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Path("tests/cases/peft_bert_lora_default_ts")
    base = oa.open_model(case / "base.onnx")
    head = oa.load_checkpoint(case / "adapter", base)
    adapted = oa.insert_checkpoint(base, head, baked=how == "baked")
    model = oa.fill(adapted, head.adapter) if how == "filled" else adapted
    oa.save_model(model, tmp_path / "m.onnx")
    oa.AdapterSession(tmp_path / "m.onnx").run(dict(np.load(case / "inputs.npz")))
    assert capfd.readouterr().err == ""


def test_stderr_is_itself_again_also_in_a_child_that_was_forked_meanwhile(model: Path) -> None:
    code = (
        "import os, sys\n"
        "from onnx_adapt.ort import without_slot_warnings\n"
        "with without_slot_warnings():\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.write(2, b'child\\n')\n"
        "        with without_slot_warnings():\n"
        "            pass\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "os.write(2, b'parent\\n')\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=LONG)
    assert (found.returncode, found.stderr) == (0, b"child\nparent\n")


def test_a_session_starts_without_a_place_for_temporary_files(model: Path) -> None:
    code = f"import onnx_adapt as oa; oa.AdapterSession({str(model)!r})"
    environment = {**os.environ, "TMPDIR": "/no/such/folder"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_an_input_that_the_model_lacks_is_named_and_so_is_one_that_is_not_fed(
    model: Path,
) -> None:
    session = oa.AdapterSession(model, {})
    with pytest.raises(RunError, match="it has no input 'token_type_ids'") as caught:
        session.run({"x": X, "token_type_ids": X})
    assert "asks for x [" in caught.value.hint
    with pytest.raises(RunError, match="its input 'x' is not fed"):
        session.run({})
