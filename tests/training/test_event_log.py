"""A log for TensorBoard has the curves of a training, and says what it lacks."""

import sys
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from onnx_adapt.errors import TrainingError
from onnx_adapt.training.open_log import open_log
from onnx_adapt.training.progress import Epoch, Report


def _events(folder: Path) -> list[Event]:
    """The events of a folder: records of a length, its checksum, the bytes, their checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            body = content[12 : 12 + length]
            checksum = int.from_bytes(content[12 + length : 16 + length], "little")
            assert checksum == masked_crc32c(body)
            found.append(Event.FromString(body))
            content = content[16 + length :]
    return found


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in _events(folder):
        for value in event.summary.value:
            curves[value.tag].append((event.step, round(value.simple_value, 4)))
    return dict(curves)


def test_the_events_have_the_curves_of_the_steps(tmp_path: Path) -> None:
    log = open_log(tmp_path / "run")
    log.write(Report(1, 2, 32, 0.5, 0.1, 1))
    log.write(Report(2, 2, 32, 0.25, 0.05, 1, Epoch(1, 0.375, 0.3, 0.9, best=True)))
    assert _curves(tmp_path / "run") == {
        "loss": [(1, 0.5), (2, 0.25)],
        "rate": [(1, 0.1), (2, 0.05)],
        "validation_loss": [(2, 0.3)],
        "score": [(2, 0.9)],
    }
    with pytest.raises(TrainingError, match="is there already"):
        open_log(tmp_path / "run")


def test_a_resumed_log_marks_the_step_that_it_goes_on_from(tmp_path: Path) -> None:
    open_log(tmp_path / "run").write(Report(1, 3, 32, 0.5, 0.1, 1))
    open_log(tmp_path / "run", resume=True).write(Report(2, 3, 32, 0.5, 0.1, 1))
    marks = [event for event in _events(tmp_path / "run") if event.HasField("session_log")]
    assert [(mark.step, mark.session_log.status) for mark in marks] == [(2, SessionLog.START)]


def test_a_missing_library_is_named_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrainingError, match="tensorboardX, which is not installed") as caught:
        open_log(tmp_path / "run")
    assert "onnx-adapt[tensorboard]" in caught.value.hint
    assert not (tmp_path / "run").exists()
