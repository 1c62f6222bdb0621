"""Large models to measure with, written without ever holding their weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.model.external_data import refer
from onnx_adapt.model.payloads import RAW_DATA
from onnx_adapt.model.wire import field_head


def chain(layers: int, width: int) -> onnx.ModelProto:
    """A model of three nodes per layer; its weights have no data yet.

    A sequence must be of even length: `verify` makes up inputs, and not all of them fit.
    """
    nodes, x = [], "x"
    for name, rows in (("/pairs", 2), ("/rows", 1)):
        sizes = [0, -1, rows * width]
        nodes.append(helper.make_node("Constant", [], [f"{name}_sizes"], value_ints=sizes))
        nodes.append(helper.make_node("Reshape", [x, f"{name}_sizes"], [name], name))
        x = name
    for i in range(layers):
        at = f"/layers.{i}"
        for op, *operands in (
            ("MatMul", x, f"layers.{i}.weight"),
            ("Tanh", f"{at}/MatMul_output"),
            ("Add", f"{at}/Tanh_output", x),
        ):
            nodes.append(helper.make_node(op, operands, [f"{at}/{op}_output"], f"{at}/{op}"))
        x = f"{at}/Add_output"
    nodes.append(helper.make_node("Identity", [x], ["y"], "/out"))
    shape: list[str | int | None] = ["batch", "sequence", width]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in "xy"]
    weights = [
        onnx.TensorProto(name=f"layers.{i}.weight", data_type=1, dims=(width, width))
        for i in range(layers)
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def blocks(width: int, seed: int) -> Iterator[bytes]:
    """The data of one weight, in pieces: random numbers, repeated."""
    rows = max(width // 16, 1)
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal((rows, width), np.float32) * width**-0.5).tobytes()
    for _ in range(width // rows):
        yield block


def write_inline(path: Path, layers: int, width: int) -> int:
    """Write a model with its weights inside, never holding more than a block of them.

    Returns:
        The number of bytes of the weights.
    """
    model, size = chain(layers, width), width * width * 4
    graph = model.graph
    begin = onnx.GraphProto(node=graph.node, name=graph.name).SerializeToString()
    end = onnx.GraphProto(input=graph.input, output=graph.output).SerializeToString()
    tensors = [t.SerializeToString() + field_head(RAW_DATA, size) for t in graph.initializer]
    heads = [field_head(5, len(tensor) + size) + tensor for tensor in tensors]
    total = len(begin) + sum(map(len, heads)) + size * layers + len(end)
    with path.open("wb") as file:
        file.write(onnx.ModelProto(ir_version=model.ir_version).SerializeToString())
        file.write(field_head(7, total) + begin)
        for seed, head in enumerate(heads):
            file.write(head)
            file.writelines(blocks(width, seed))
        file.write(end)
        file.write(onnx.ModelProto(opset_import=model.opset_import).SerializeToString())
    return size * layers


def write_external(path: Path, layers: int, width: int) -> int:
    """Write a model with its weights beside it; most of their file is a hole.

    Returns:
        The number of bytes of the weights.
    """
    model, size = chain(layers, width), width * width * 4
    data = path.with_suffix(".data")
    with data.open("wb") as file:
        for i, tensor in enumerate(model.graph.initializer):
            refer(tensor, data.name, i * size, size)
            file.seek(i * size)
            file.write(next(blocks(width, i)))
        file.truncate(size * layers)
    path.write_bytes(model.SerializeToString())
    return size * layers
