"""A server ends as it should, and one that is killed leaves nothing behind for long."""

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from adapter_models import bumped
from serve_clients import Server, server
from serve_stopping import outputs, told_to_end_while_busy
from session_adapters import FR, X, adapted_file, close
from waiting import LONG

import onnx_adapt as oa
from onnx_adapt.serve.copies import Copies

TENSOR = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "data": X.tolist()}
BODY = json.dumps({"inputs": [TENSOR], "parameters": {"adapter": "fr"}}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapted_file(tmp_path)
    (tmp_path / "adapters").mkdir()
    oa.save_adapter(FR, tmp_path / "adapters/fr.safetensors")
    return tmp_path


def started(folder: Path, *options: str) -> AbstractContextManager[Server]:
    return server(folder / "adapted.onnx", folder / "adapters", *options)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_a_busy_server_that_is_told_to_end_answers_what_it_has(
    folder: Path, kind: signal.Signals
) -> None:
    with started(folder, "--batch-wait-ms", "100", "--batch-axis", "0") as running:
        for answer in told_to_end_while_busy(running, kind, BODY):
            assert close(outputs(answer), bumped(X, FR))


def test_readiness_goes_first_and_grace_bounds_what_is_under_way(folder: Path) -> None:
    with started(folder, "--grace", "1.5") as running:
        host, _, port = running.address.partition(":")
        with socket.create_connection((host, int(port)), timeout=LONG) as slow:
            slow.sendall(b"POST /v2/models/fr/infer HTTP/1.1\r\nContent-Length: 99\r\n\r\n")
            ready = f"http://{running.address}/v2/health/ready"
            urllib.request.urlopen(ready, timeout=LONG).close()
            began = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(ready, timeout=LONG)
            with refused.value as error:
                assert (error.code, json.loads(error.read())) == (503, {"ready": False})
            assert running.process.wait(LONG) == 0
            assert time.monotonic() - began > 1.4


def test_copies_of_a_server_that_was_killed_go_with_the_next_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with pytest.raises(AssertionError), started(folder) as running:  # it did not end well
        running.process.kill()
    assert len(list(temporary.glob("onnx-adapt-copies-*/fr@*"))) == 1
    with started(folder):
        assert len(list(temporary.glob("onnx-adapt-*"))) == 1
    assert list(temporary.glob("onnx-adapt-*")) == []


def test_folders_of_copies_that_are_in_use_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "onnx-adapt-copies-strange").touch()  # no folder of ours
    one, other = Copies(), Copies()
    path = one.path / "a"
    path.write_bytes(b"1")
    assert other.link(path).read_bytes() == b"1"
    assert path.read_bytes() == b"1"
    one.close()
    other.close()
    assert [item.name for item in tmp_path.iterdir()] == ["onnx-adapt-copies-strange"]
