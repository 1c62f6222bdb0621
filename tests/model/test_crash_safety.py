"""Whatever stops a save: what was there is there, or the new result is, and never a part."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from disk_models import START, dense, external, files, raw, weight, write
from onnx import numpy_helper
from waiting import LONG, until

import onnx_adapt as oa
from onnx_adapt.errors import SaveError

TESTS = Path(__file__).parent.parent
CASES = ["replaced", "in_place", "with_data", "moved_out", "adapter"]


def _temporary(name: str) -> bool:
    return Path(name).name.startswith(".onnx-adapt.") and name.endswith(".tmp")


def _stopped(how: str, case: str, folder: Path) -> dict[str, Any]:
    """What is there after a save was stopped before each call to the system."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "fixtures" / "save_at_risk.py"), str(folder), how, case],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _whole(state: dict[str, str], case: dict[str, Any]) -> bool:
    """Whether a folder has the old result with its data, or the new one with its."""
    old, new = case["old"], case["new"]
    changed = {name for name in (*old, *new) if old.get(name) != new.get(name)}
    model = next(name for name in changed if not name.endswith((".data", ".bin")))
    expected = new if state.get(model) == new[model] else old
    # New data may be there before its model, and old data after it.
    return all(state.get(name) == mark for name, mark in expected.items())


@pytest.mark.parametrize("name", CASES)
def test_a_process_killed_at_any_stage_of_a_save_leaves_the_old_or_the_new(
    name: str, tmp_path: Path
) -> None:
    case = _stopped("kill", name, tmp_path)
    assert len(case["found"]) > 10
    assert case["new"] != case["old"]
    assert not any(map(_temporary, case["new"]))
    assert [state for state in case["found"] if not _whole(state, case)] == []
    known = {*case["old"], *case["new"]}
    strange = {n for state in case["found"] for n in state if n not in known}
    assert all(map(_temporary, strange))


@pytest.mark.parametrize("name", CASES)
def test_ctrl_c_at_any_stage_of_a_save_leaves_no_temporary_file(
    name: str, tmp_path: Path
) -> None:
    case = _stopped("interrupt", name, tmp_path)
    assert [state for state in case["found"] if not _whole(state, case)] == []
    left = {n for state in case["found"] for n in state}
    assert left <= {*case["old"], *case["new"]}


def test_data_that_moved_out_twice_is_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_adapt.model.file.PROTOBUF_LIMIT", 20_000)
    for seed in range(4):
        base = oa.open_model(write(tmp_path / "m.onnx", dense(raw("V", seed))))
        oa.save_model(base, tmp_path / "a.onnx")
        name = ("a.onnx.data", "a.onnx.1.data")[seed % 2]
        assert {path.name for path in tmp_path.glob("a.onnx*")} == {"a.onnx", name}
        (found,) = [
            t for t in onnx.load(tmp_path / "a.onnx").graph.initializer if t.name == "V"
        ]
        np.testing.assert_array_equal(numpy_helper.to_array(found), weight(64, 40, seed=seed))


SIGNALLED = """
import signal, sys, onnx_adapt as oa
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
from onnx_adapt.cli import main
from onnx_adapt.model import whole_files
real = whole_files._write_segment
def slow(*args):
    real(*args)
    print("writing", file=sys.stderr, flush=True)
    import time; time.sleep(600)
whole_files._write_segment = slow
main()
"""


def test_a_real_ctrl_c_while_a_command_writes_is_one_error_line(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", dense())
    before = files(tmp_path)
    command = ["insert", "m.onnx", "--after", "dense", "--no-verify"]
    child = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED, *command],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    with child.stderr as err:
        assert err.readline() == "writing\n"
        child.send_signal(signal.SIGINT)
        text = err.read()
    assert child.wait(timeout=LONG) == 130
    assert text.splitlines()[-1] == "error: interrupted; nothing was changed"
    assert "Traceback" not in text
    assert files(tmp_path) == before


def test_a_save_to_another_device_is_whole(tmp_path: Path) -> None:
    other = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp")
    target = other / f"onnx-adapt-{os.getpid()}.onnx"
    model = oa.open_model(write(tmp_path / "m.onnx", dense(raw("V", 1))))
    try:
        oa.save_model(model, target)
        assert target.read_bytes() == (tmp_path / "m.onnx").read_bytes()
        assert not [p for p in other.iterdir() if _temporary(p.name)]
    finally:
        target.unlink(missing_ok=True)


FULL = f"""
import sys
{START["disk full"]}
import onnx_adapt as oa, numpy as np
from pathlib import Path
array = np.zeros((64, 100), "f4")
adapter = oa.Adapter("a", {{"s": {{"down": array, "up": array.T}}}})
for suffix in ("npz", "safetensors", "onnx_adapter"):
    try:
        oa.save_adapter(adapter, f"a.{{suffix}}")
    except oa.AdaptError as error:
        print(error.hint)
"""


def test_a_full_disk_leaves_adapters_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"older")
    before = files(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("make room") == 3
    assert files(tmp_path) == before


WRITER = """
import os, sys, onnx_adapt as oa
model, target, stop = oa.open_model(sys.argv[1]), *sys.argv[2:]
while not os.path.exists(stop):
    oa.save_model(model, target)
"""


def test_of_two_processes_that_write_one_path_the_last_wins_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.onnx"
    wholes = []
    for seed in (1, 2):
        path = write(tmp_path / f"m{seed}.onnx", dense(raw("V", seed), *[raw("U", 9)] * seed))
        wholes.append(path.read_bytes())
    oa.save_model(oa.open_model(tmp_path / "m1.onnx"), target)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, target, tmp_path / "stop"])
        for path in (tmp_path / "m1.onnx", tmp_path / "m2.onnx")
    ]
    seen: list[bytes] = []

    def both_have_written_by_turns() -> bool:
        assert [writer.poll() for writer in writers] == [None, None]
        found = target.read_bytes()
        assert found in wholes
        seen.extend([found] if seen[-1:] != [found] else [])
        return len(seen) > 10

    try:
        until(both_have_written_by_turns)
    finally:
        (tmp_path / "stop").touch()
        ended = [writer.wait(LONG) for writer in writers]
    assert ended == [0, 0]
    assert target.read_bytes() in wholes
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"m1.onnx", "m2.onnx", "a.onnx", "stop"}


def test_a_model_that_cannot_be_moved_into_place_takes_its_data_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oa.open_model(external(tmp_path / "base" / "a.onnx", "deep/w.bin"))
    (tmp_path / "place").mkdir()
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.suffix == ".onnx":
            raise PermissionError(13, "no")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(SaveError):
        oa.save_model(model, tmp_path / "place" / "a.onnx")
    assert files(tmp_path / "place") == {}


@pytest.mark.parametrize("error", [PermissionError, OSError, FileNotFoundError])
@pytest.mark.parametrize("call", ["replace", "chmod", "mkdir"])
def test_a_call_to_the_system_that_fails_leaves_nothing(
    call: str, error: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oa.open_model(external(tmp_path / "base" / "a.onnx", "deep/w.bin"))
    place = tmp_path / "place"
    write(place / "a.onnx", b"older")
    before = files(place)

    def fail(*_: object, **__: object) -> None:
        raise error(13, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(SaveError):
            oa.save_model(model, place / "a.onnx")
    assert files(place) == before
