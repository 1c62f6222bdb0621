"""Shared by the tests of slots: models from ONNX text, and runs of them."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import onnx_adapt as oa
from onnx_adapt.cli import main

MODELS = Path(__file__).parent.parent / "models"
COMMITTED = ("dnsmos-p808", "plcmos", "silero-vad-ifless")


def proto_of(text: str) -> onnx.ModelProto:
    """A checked model from ONNX text."""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def model_of(text: str) -> oa.Model:
    return oa.Model(proto_of(text))


def session(source: onnx.ModelProto | Path, *, optimised: bool = False) -> Any:
    """ONNX Runtime on the CPU; a proto must hold its data, a path may have any."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    )
    given = str(source) if isinstance(source, Path) else source.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(source: oa.Model | onnx.ModelProto | Path, feeds: Mapping[str, Any]) -> list[Any]:
    """All outputs of a model, without ONNX Runtime's optimisations."""
    proto = source.proto if isinstance(source, oa.Model) else source
    return session(proto).run(None, dict(feeds))


def assert_sound(model: oa.Model) -> None:
    """The ONNX checker and strict shape inference accept a model."""
    onnx.checker.check_model(model.proto, full_check=True)
    onnx.shape_inference.infer_shapes(
        model.proto, check_type=True, strict_mode=True, data_prop=True
    )


def adapter_feeds(
    slots: Sequence[oa.Slot], rng: np.random.Generator, size: int = 3
) -> dict[str, np.ndarray]:
    """Random weights for plain slots on the last axis, by the name they are fed by."""
    feeds = {}
    for slot in slots:
        shapes = {"down": (slot.source_width, size), "up": (size, slot.width)}
        for part, shape in shapes.items():
            name = f"adapter.{slot.name}.{part}"
            feeds[name] = rng.standard_normal(shape).astype(slot.dtype)
    return feeds


def saved(model: oa.Model, path: Path) -> Path:
    oa.save_model(model, path)
    return path


def dense(name: str = "w", size: int = 4, seed: int = 0) -> str:
    """ONNX text of a random square float weight."""
    values = np.random.default_rng(seed).standard_normal(size * size).round(3)
    return f"float[{size},{size}] {name} = {{{', '.join(f'{v:.3f}' for v in values)}}}"


MLP = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, {dense("w2", seed=1)}>
{{
  [first] a = MatMul(x, w1)
  [act] b = Relu(a)
  [second] y = MatMul(b, w2)
}}"""

BRANCHES = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, bool c) => (float[n,4] y) <{dense("w1")}, {dense("w2", seed=1)}>
{{
  [before] h = MatMul(x, w1)
  [choice] y = If(c) <
    then_branch = t () => (float[n,4] out) {{ [yes] m = MatMul(h, w2)  out = Relu(m) }},
    else_branch = e () => (float[n,4] out) {{ [no] m = MatMul(x, w2)  out = Neg(m) }}>
}}"""


def node_of(model: oa.Model, output: str) -> onnx.NodeProto:
    """The node of the main graph that makes a tensor."""
    return next(node for node in model.proto.graph.node if output in node.output)


def weight(model: oa.Model, name: str) -> np.ndarray:
    """The value of one initializer that is stored in the graph."""
    return numpy_helper.to_array(
        next(tensor for tensor in model.proto.graph.initializer if tensor.name == name)
    )


def bump(t: np.ndarray, feeds: Mapping[str, np.ndarray], slot: str) -> np.ndarray:
    """What a plain slot makes of `t`."""
    down, up = feeds[f"adapter.{slot}.down"], feeds[f"adapter.{slot}.up"]
    return t + np.maximum(t @ down, 0) @ up


def cli(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Run the command line in this process: exit status, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["onnx-adapt", *args])
        with pytest.raises(SystemExit) as stopped:
            main()
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(stopped.value.code or 0), out, err


SILENCED = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, {dense("w2")}, float[1] zero = {{0}}> {{
  [first] a = MatMul(x, w1)  b = Mul(a, zero)  [second] c = MatMul(x, w2)  y = Add(b, c) }}"""
"""The first of two layers is multiplied by zero."""

CHECKS = ["interface", "graph", "off", "on", "effect", "checker"]


def passes(base: oa.Model | Path, adapted: oa.Model | Path, **options: object) -> oa.Report:
    """Verify, and see that all six checks passed."""
    report = oa.verify(base, adapted, **options)
    assert [(c.name, c.passed, c.detail) for c in report.checks if not c.passed] == []
    assert [check.name for check in report.checks] == CHECKS
    assert report.passed
    assert report.raise_for_mismatch() is report
    return report
