"""Models on disk and runs of the command line, for the tests of files and of bad input."""

import contextlib
import io
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_adapt as oa
from onnx_adapt.cli import main


def weight(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def dense(*extra: onnx.TensorProto, width: int = 64) -> onnx.ModelProto:
    """y = x @ W, with a weight of 16 kB: large enough to stay on disk."""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "W"], ["y"], name="dense")],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", width])],
            [numpy_helper.from_array(weight(width, width), "W"), *extra],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def raw(name: str, seed: int) -> TensorProto:
    return numpy_helper.from_array(weight(64, 40, seed=seed), name)


def typed(name: str, seed: int, kind: int) -> TensorProto:
    """A tensor in `float_data` or `double_data`."""
    return helper.make_tensor(name, kind, [64, 40], weight(64, 40, seed=seed).ravel().tolist())


def sparse(name: str, seed: int) -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.arange(2560, dtype=np.int64), f"{name}.indices")
    values = numpy_helper.from_array(weight(2560, seed=seed), name)
    return helper.make_sparse_tensor(values, indices, [9000])


def body(name: str, seed: int) -> onnx.GraphProto:
    """y = x + a Constant node + an initializer of the body's own."""
    nodes = [
        helper.make_node("Constant", [], [f"{name}.c"], value=raw(f"{name}.const", seed)),
        helper.make_node("Add", [f"{name}.c", f"{name}.init"], [f"{name}.y"]),
    ]
    y = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [64, 40])
    return helper.make_graph(nodes, name, [], [y], [raw(f"{name}.init", seed + 1)])


def with_data_everywhere() -> onnx.ModelProto:
    """A model with large tensors in every place that can hold one."""
    inner = helper.make_node(
        "If", ["cond"], ["z"], then_branch=body("then", 10), else_branch=body("else", 20)
    )
    outer = helper.make_graph(
        [inner], "outer", [], [helper.make_tensor_value_info("z", 1, [64, 40])]
    )
    twice = helper.make_node(
        "If", ["cond"], ["y"], then_branch=outer, else_branch=body("e", 30)
    )
    several = helper.make_node("Custom", [], ["lists"], domain="test")
    several.attribute.append(helper.make_attribute("tensors", [raw("a0", 40), raw("a1", 41)]))
    several.attribute.append(helper.make_attribute("sparse", sparse("a2", 42)))
    several.attribute.append(helper.make_attribute("sparses", [sparse("a3", 43)]))
    several.attribute.append(helper.make_attribute("graphs", [body("listed", 44)]))
    constant = helper.make_node("Constant", [], ["c"], sparse_value=sparse("sparse", 50))
    graph = helper.make_graph(
        [twice, several, constant],
        "main",
        [helper.make_tensor_value_info("cond", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 40])],
        [raw("w", 60), typed("f", 61, TensorProto.FLOAT), typed("d", 62, TensorProto.DOUBLE)],
        sparse_initializer=[sparse("si", 63)],
    )
    function = helper.make_function(
        "test",
        "Biased",
        ["x"],
        ["y"],
        [
            helper.make_node("Constant", [], ["b"], value=raw("fn", 70)),
            helper.make_node("Add", ["x", "b"], ["y"]),
        ],
        [helper.make_opsetid("", 17)],
        attribute_protos=[helper.make_attribute("shift", raw("default", 71))],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("test", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[function])
    training = model.training_info.add()
    training.initialization.CopyFrom(body("start", 80))
    training.algorithm.CopyFrom(body("step", 90))
    return model


GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[b,8] x, bool[8] keep)
=> (float[b,4] y, int64[b] top, float[b,p] rest, float[1,b,8] up)
<int64[1] zero = {0}> {
  [first] h = MatMul(x, W)
  [lift] up = Unsqueeze(h, zero)
  [act] r = Relu(h)
  [twin] t1 = MatMul(r, W)
  [twin] t2 = MatMul(t1, W)
  [last] y = MatMul(t2, V)
  [best] top = ArgMax<axis = 1, keepdims = 0>(y)
  [pick] rest = Compress<axis = 1>(h, keep)
}
"""


def several() -> onnx.ModelProto:
    """A model with places that can take an adapter and places that cannot."""
    model = onnx.parser.parse_model(GRAPH)
    for name, shape in (("W", (8, 8)), ("V", (8, 4))):
        model.graph.initializer.append(numpy_helper.from_array(weight(*shape), name))
    return model


def write(path: Path, model: onnx.ModelProto | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def refer(tensor: onnx.TensorProto, **entries: str) -> bytes:
    """Take the data out of a tensor and let it refer to a file; returns the data."""
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return data


def external(path: Path, location: str, *extra: onnx.TensorProto) -> Path:
    """The dense model with W in a file beside it."""
    model = dense(*extra)
    data = refer(model.graph.initializer[0], location=location, offset="0", length="16384")
    write(path, model)
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    (path.parent / location).write_bytes(data)
    return path


X = weight(2, 64, seed=9)
"""An input of the dense model."""


def output(path: Path) -> np.ndarray:
    """What ONNX Runtime says; bad references stop it."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": X})[0]


def adapted(path: Path) -> oa.Model:
    return oa.insert(oa.open_model(path), after="dense", baked=True, bottleneck=2)


def files(folder: Path) -> dict[str, object]:
    """Everything in a folder: what it is, what it holds, when it was written."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = path.readlink()
        elif path.is_dir():
            found[str(path.relative_to(folder))] = "folder"
        else:
            stamp = path.stat().st_mtime_ns
            found[str(path.relative_to(folder))] = (path.read_bytes(), stamp)
    return found


def varint(value: int, pad: int = 0) -> bytes:
    """A protobuf varint, made `pad` bytes longer than it needs to be."""
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F)
    digits += [0] * pad
    return bytes([d | 0x80 for d in digits[:-1]] + digits[-1:])


def chunk(number: int, payload: bytes, pad: int = 0) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload), pad) + payload


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; the run must have failed in the agreed form."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert self.status == 2, self
        assert self.out == "", self
        assert len(errors) == 1, self
        assert "Traceback" not in self.err, self
        return errors[0]

    @property
    def hint(self) -> str:
        """The hint line that follows the error line."""
        lines = self.err.splitlines()
        after = lines[lines.index(self.error) + 1 :]
        assert len(after) == 1, self
        assert after[0].startswith("hint: "), self
        return after[0]


def run(*arguments: str | Path) -> Result:
    """Run the command line in this process; an exception that escapes it fails the test."""
    out, err = io.StringIO(), io.StringIO()
    log = logging.getLogger("onnx_adapt")
    before = list(log.handlers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["onnx-adapt", *map(str, arguments)])
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as caught,
        ):
            main()
    log.handlers[:] = before
    return Result(int(caught.value.code or 0), out.getvalue(), err.getvalue())


def refused(*arguments: str | Path) -> Result:
    """Run a command that must fail in the agreed form and leave the folder as it was."""
    before = files(Path())
    result = run(*arguments)
    assert result.error
    assert result.hint
    assert files(Path()) == before
    return result


START = {
    "disk full": """
import resource
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
""",
    "no power": """
import ctypes, os
if os.geteuid() == 0:  # root without its capabilities is held to permissions
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(version, (ctypes.c_uint32 * 6)()) == 0
""",
    "plain": "",
}


def process(start: str, *arguments: str | bytes, stdout: int | io.IOBase = -1) -> Result:
    """Run the command line in a process of its own."""
    code = f"import sys\n{START[start]}\nfrom onnx_adapt.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )
    out = (done.stdout or b"").decode(errors="surrogateescape")
    return Result(done.returncode, out, done.stderr.decode(errors="surrogateescape"))
