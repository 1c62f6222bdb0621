"""Insert bottleneck adapters with another library, as its users would write it.

    python peer_insert.py LIBRARY MODEL OUTPUT PATTERN [RANK]

Runs in the environment of the peers; `peers.py` calls it. Weights are constants of a
bottleneck of 8, after each MatMul whose name fits the pattern; the rank is onnxsim's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import onnx

BOTTLENECK = 8


def weights(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Down and up."""
    down = np.random.default_rng(0).standard_normal((width, BOTTLENECK)).astype(np.float32)
    return down, np.zeros((BOTTLENECK, width), np.float32)


def with_onnx(source: str, target: str, pattern: str) -> None:
    """The protobuf itself; external data stays where it is."""
    from onnx import helper, numpy_helper

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    widths = {tensor.name: tensor.dims[-1] for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "MatMul" or not fnmatch(node.name, pattern):
            continue
        y = node.output[0]
        x, d, r, u = (f"adapter.{node.name}/{part}" for part in ("in", "down", "act", "up"))
        node.output[0] = x
        for name, value in zip((d, u), weights(widths[node.input[1]]), strict=True):
            graph.initializer.append(numpy_helper.from_array(value, f"{name}.weight"))
        nodes += [
            helper.make_node("MatMul", [x, f"{d}.weight"], [d], d),
            helper.make_node("Relu", [d], [r], r),
            helper.make_node("MatMul", [r, f"{u}.weight"], [u], u),
            helper.make_node("Add", [x, u], [y], f"adapter.{node.name}/sum"),
        ]
    ordered = onnx.GraphProto(node=nodes)
    graph.ClearField("node")
    graph.node.extend(ordered.node)
    onnx.save(model, target)


def with_graphsurgeon(source: str, target: str, pattern: str) -> None:
    """onnx-graphsurgeon; external data stays where it is."""
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(onnx.load(source, load_external_data=False))
    nodes = []
    for node in graph.nodes:
        nodes.append(node)
        if node.op != "MatMul" or not fnmatch(node.name, pattern):
            continue
        y, at = node.outputs[0], f"adapter.{node.name}"
        x, d, r, u = (
            gs.Variable(f"{at}/{part}", np.float32) for part in ("in", "down", "act", "up")
        )
        node.outputs = [x]
        down, up = (
            gs.Constant(f"{at}/{part}.weight", value)
            for part, value in zip(
                ("down", "up"), weights(node.inputs[1].shape[-1]), strict=True
            )
        )
        nodes += [
            gs.Node("MatMul", f"{at}/down", inputs=[x, down], outputs=[d]),
            gs.Node("Relu", f"{at}/act", inputs=[d], outputs=[r]),
            gs.Node("MatMul", f"{at}/up", inputs=[r, up], outputs=[u]),
            gs.Node("Add", f"{at}/sum", inputs=[x, u], outputs=[y]),
        ]
    graph.nodes = nodes
    onnx.save(gs.export_onnx(graph), target)


def with_onnx_ir(source: str, target: str, pattern: str) -> None:
    """onnx_ir; it maps external data and refers to it again."""
    import onnx_ir as ir

    model = ir.load(source)
    graph = model.graph
    for node in list(graph):
        if node.op_type != "MatMul" or not fnmatch(node.name or "", pattern):
            continue
        x, at = node.outputs[0], f"adapter.{node.name}"
        name = x.name
        kernels = []
        width = int(node.inputs[1].shape[-1])
        for part, value in zip(("down", "up"), weights(width), strict=True):
            stored = ir.Value(name=f"{at}/{part}.weight", const_value=ir.tensor(value))
            stored.type, stored.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(value.shape)
            graph.register_initializer(stored)
            kernels.append(stored)
        uses = list(x.uses())
        down = ir.node("MatMul", [x, kernels[0]], name=f"{at}/down")
        relu = ir.node("Relu", down.outputs, name=f"{at}/act")
        up = ir.node("MatMul", [relu.outputs[0], kernels[1]], name=f"{at}/up")
        total = ir.node("Add", [x, up.outputs[0]], name=f"{at}/sum")
        y = total.outputs[0]
        y.type, y.shape = x.type, x.shape
        graph.insert_after(node, [down, relu, up, total])
        for user, index in uses:
            user.replace_input_with(index, y)
        for index, output in enumerate(graph.outputs):
            if output is x:
                graph.outputs[index] = y
        x.name, y.name = f"{at}/in", name
    ir.save(model, target)


def with_onnxsim(source: str, target: str, pattern: str, rank: str = "8") -> None:
    """onnxsim's own LoRA, after all MatMuls: it does not choose by the name of a node."""
    import onnxsim

    os.chdir(Path(source).parent)  # it looks for external data where it runs
    model, _ = onnxsim.inject_lora(source, rank=int(rank), target_op_types=("MatMul",))
    onnx.save(model, target)


LIBRARIES: dict[str, Callable[..., None]] = {
    "onnx": with_onnx,
    "onnx-graphsurgeon": with_graphsurgeon,
    "onnx-ir": with_onnx_ir,
    "onnxsim": with_onnxsim,
}

if __name__ == "__main__":
    LIBRARIES[sys.argv[1]](*sys.argv[2:])
