"""Models larger than memory should hold: opened and saved without reading their weights."""

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from disk_models import chunk, dense, varint, write

import onnx_adapt as oa
from onnx_adapt.errors import SaveError

PEAK = """
import re, sys, tracemalloc
from pathlib import Path
import onnx_adapt as oa, onnx_adapt.model.file
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
oa.open_model(sys.argv[2])
before = peak()
tracemalloc.start()
model = oa.open_model(sys.argv[1])
if len(sys.argv) > 3:
    oa.save_model(model, sys.argv[3])
size = sum(place.length for place in model.payloads)
print(size, peak() - before, tracemalloc.get_traced_memory()[1])
"""


def big(path: Path, size: int) -> Path:
    """A model with an initializer of `size` bytes that is a hole in the file."""
    model = dense()
    model.graph.initializer[0].dims[:] = [size // 4]
    model.graph.initializer[0].ClearField("raw_data")
    head, tail = onnx.GraphProto(), onnx.GraphProto()
    head.node.extend(model.graph.node)
    head.name = "g"
    tail.input.extend(model.graph.input)
    tail.output.extend(model.graph.output)
    tensor = model.graph.initializer[0].SerializeToString() + varint(9 << 3 | 2) + varint(size)
    tensor = varint(5 << 3 | 2) + varint(len(tensor) + size) + tensor
    before, after = head.SerializeToString() + tensor, tail.SerializeToString()
    graph = varint(7 << 3 | 2) + varint(len(before) + size + len(after)) + before
    with path.open("wb") as file:
        file.write(b"\x08\x08" + graph)
        file.seek(size, os.SEEK_CUR)
        file.write(after + chunk(8, model.opset_import[0].SerializeToString()))
    return path


def _peak(*arguments: Path) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


def test_opening_does_not_read_the_weights(tmp_path: Path) -> None:
    path = big(tmp_path / "big.onnx", 600_000_000)
    size, resident, allocated = _peak(path, write(tmp_path / "small.onnx", dense()))
    assert size == 600_000_000
    assert resident < 5_000_000
    assert allocated < 200_000


def test_saving_does_not_read_the_weights_into_memory(tmp_path: Path) -> None:
    path, copy = big(tmp_path / "big.onnx", 100_000_000), tmp_path / "copy.onnx"
    _, resident, allocated = _peak(path, write(tmp_path / "small.onnx", dense()), copy)
    assert copy.stat().st_size == path.stat().st_size
    assert resident < 10_000_000
    assert allocated < 3_000_000


def test_a_result_of_2_gib_is_more_than_protobuf_can_read(tmp_path: Path) -> None:
    path = big(tmp_path / "m.onnx", 2**31 - 4096)
    with path.open("ab") as file:
        file.write(chunk(6, b"d" * (2**31 - path.stat().st_size - 3)))
    assert path.stat().st_size == 2**31
    write(tmp_path / "copy.onnx.data", b"in the way of what moves out")
    with pytest.raises(SaveError, match=r"passes protobuf's 2 GB.*copy\.onnx\.data"):
        oa.save_model(oa.open_model(path), tmp_path / "copy.onnx")
