"""A generated model of dense layers, and adapters for it: what runs are timed on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import onnx_adapt as oa

WIDTH = 768


def base_model(layers: int, width: int = WIDTH) -> oa.Model:
    """Layers of MatMul, Add and Relu; 2.4 MB each."""
    rng = np.random.default_rng(0)
    nodes, stored, x = [], [], "x"
    for i in range(layers):
        weight = rng.standard_normal((width, width), np.float32) * np.float32(width**-0.5)
        stored += [
            numpy_helper.from_array(weight, f"w{i}"),
            numpy_helper.from_array(np.zeros(width, np.float32), f"b{i}"),
        ]
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"m{i}"], f"layers.{i}/MatMul"),
            helper.make_node("Add", [f"m{i}", f"b{i}"], [f"a{i}"], f"layers.{i}/Add"),
            helper.make_node("Relu", [f"a{i}"], [f"r{i}"], f"layers.{i}/Relu"),
        ]
        x = f"r{i}"
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "seq", width])
        for name in ("x", x)
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opset = helper.make_opsetid("", 17)
    return oa.Model(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def with_lora(base: oa.Model, layers: int) -> oa.Model:
    """A LoRA slot at each layer: it reads what the layer reads."""
    for i in range(layers):
        source = f"r{i - 1}" if i else "x"
        base = oa.insert(base, after=f"layers.{i}/Add", source=source, activation="identity")
    return base


def random_adapter(model: oa.Model, seed: int, bottleneck: int) -> oa.Adapter:
    """Weights for every slot, whatever its parts."""
    rng = np.random.default_rng(seed)

    def draw(slot: oa.Slot, part: str) -> np.ndarray[Any, Any]:
        sizes = {"down": (slot.source_width, bottleneck), "up": (bottleneck, slot.width)}
        sizes |= {"down_bias": (bottleneck,), "up_bias": (slot.width,)}
        return rng.standard_normal(sizes[part], np.float32) / np.float32(50)

    return oa.make_adapter(
        model,
        f"a{seed}",
        {s.name: {part: draw(s, part) for part in s.parts} for s in oa.list_slots(model)},
    )


def inputs(batch: int, length: int, width: int = WIDTH) -> dict[str, np.ndarray[Any, Any]]:
    """Something to feed."""
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((batch, length, width), np.float32)}
