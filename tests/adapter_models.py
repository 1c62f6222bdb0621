"""Shared by the tests of adapter files and commands: small models, checkpoints and files."""

import json
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
import safetensors.numpy
from onnx import helper, numpy_helper

import onnx_adapt as oa

ELEM_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    """A .safetensors file, by its specification: length, JSON, data."""
    return struct.pack("<Q", len(header)) + header + data


def npy_file(header: bytes, data: bytes = b"") -> bytes:
    """An .npy file, by its specification (version 1.0)."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


Parameter = tuple[str, Sequence[int], int, bytes]
"""Of an .onnx_adapter file: name, dims, element type, data."""


def onnx_adapter_file(
    parameters: Sequence[Parameter], *, version: int = 1, shared: int = 0
) -> bytes:
    """An .onnx_adapter file as ONNX Runtime's schema has it, of any content.

    The first `shared` parameters have the data of the first, which is stored once.
    """
    builder = flatbuffers.Builder(64)
    offsets, common = [], None
    for i, (name, dims, elem_type, raw) in enumerate(parameters):
        data = common if i and i < shared else builder.CreateByteVector(raw)
        common = common or data
        builder.StartVector(8, len(dims), 8)
        for dim in reversed(dims):
            builder.PrependInt64(dim)
        shape = builder.EndVector()
        label = builder.CreateString(name)
        builder.StartObject(4)
        builder.PrependUOffsetTRelativeSlot(0, label, 0)
        builder.PrependUOffsetTRelativeSlot(1, shape, 0)
        builder.PrependInt32Slot(2, elem_type, 0)
        builder.PrependUOffsetTRelativeSlot(3, data, 0)
        offsets.append(builder.EndObject())
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    vector = builder.EndVector()
    builder.StartObject(4)
    builder.PrependInt32Slot(0, version, 0)
    builder.PrependUOffsetTRelativeSlot(3, vector, 0)
    builder.Finish(builder.EndObject(), b"TORT")
    return bytes(builder.Output())


def peak(action: Callable[[], Any]) -> int:
    """The most memory in bytes that an action held at once."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


W1, W2 = (np.random.default_rng(i).standard_normal((4, 4)).astype(np.float32) for i in (1, 2))
B2 = np.array([0.5, -1, 2, 0.25], np.float32)


def two_layers(dtype: type = np.float32, *, tied: bool = False) -> onnx.ModelProto:
    """`fc2(relu(fc1(x)))` as TorchScript exports it: fc1 without a bias, fc2 with one."""
    elem_type = ELEM_TYPES[np.dtype(dtype).name]
    second = "onnx::MatMul_1" if tied else "onnx::MatMul_2"
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], "/fc1/MatMul"),
        helper.make_node("Relu", ["a"], ["b"], "/act/Relu"),
        helper.make_node("MatMul", ["b", second], ["c"], "/fc2/MatMul"),
        helper.make_node("Add", ["c", "fc2.bias"], ["y"], "/fc2/Add"),
    ]
    arrays = {"onnx::MatMul_1": W1.T, "onnx::MatMul_2": W2.T, "fc2.bias": B2}
    if tied:
        del arrays["onnx::MatMul_2"]
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(value, dtype), name)
        for name, value in arrays.items()
    ]
    x, y = (helper.make_tensor_value_info(name, elem_type, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    opset = helper.make_opsetid("", 17)
    proto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def saved_model(path: Path, proto: onnx.ModelProto | None = None) -> Path:
    path.write_bytes((proto or two_layers()).SerializeToString())
    return path


def lora(seed: int = 0, rank: int = 2, modules: Sequence[str] = ("fc1", "fc2")) -> dict:
    """The tensors of a PEFT LoRA on layers of `two_layers`."""
    rng = np.random.default_rng(seed)
    shapes = {"lora_A.weight": (rank, 4), "lora_B.weight": (4, rank)}
    return {
        f"base_model.model.{module}.{part}": rng.standard_normal(shape).astype(np.float32)
        for module in modules
        for part, shape in shapes.items()
    }


def lora_on(x: np.ndarray, tensors: dict, alpha: float = 4, w2: np.ndarray = W2) -> Any:
    """What PEFT computes: `W x + b + alpha / r * B A x` in every layer."""

    def layer(v: np.ndarray, weight: np.ndarray, module: str) -> np.ndarray:
        a = tensors.get(f"base_model.model.{module}.lora_A.weight")
        b = tensors.get(f"base_model.model.{module}.lora_B.weight")
        term = 0 if a is None else v @ a.T @ b.T * (alpha / a.shape[0])
        return v @ weight.T + term

    return layer(np.maximum(layer(x, W1, "fc1"), 0), w2, "fc2") + B2


def peft_folder(path: Path, tensors: dict, **config: Any) -> Path:
    """A checkpoint folder as `save_pretrained` of PEFT writes it."""
    path.mkdir(parents=True)
    ranks = [a.shape[0] for key, a in tensors.items() if "lora_A" in key and a.ndim]
    facts = {"peft_type": "LORA", "r": (ranks or [2])[0], "lora_alpha": 4, **config}
    (path / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    return path


def trained(folder: Path) -> tuple[oa.Model, oa.Checkpoint]:
    """A base in `base.onnx`; for it LoRA on fc1, and an fc2 that was trained whole."""
    tensors = {
        **lora(modules=["fc1"]),
        "base_model.model.fc2.weight": -2 * W2,
        "base_model.model.fc2.bias": B2 + 1,
    }
    base = oa.open_model(saved_model(folder / "base.onnx"))
    return base, oa.load_checkpoint(peft_folder(folder / "fr", tensors), base)


def adapted(*, baked: bool = False, tied: bool = False, **options: Any) -> oa.Model:
    """`two_layers` with a plain slot after each layer."""
    base = oa.Model(two_layers(tied=tied))
    return oa.insert(base, after=["fc1", "fc2"], baked=baked, **options)


def weights(size: int = 3, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights for one slot of `adapted`."""
    rng = np.random.default_rng(seed)
    return {
        "down": rng.standard_normal((4, size)).astype(dtype),
        "up": rng.standard_normal((size, 4)).astype(dtype),
    }


def bumped(x: np.ndarray, adapter: oa.Adapter) -> np.ndarray:
    """What `adapted` computes with an adapter, in numpy."""

    def slot(t: np.ndarray, name: str) -> np.ndarray:
        parts = adapter.weights.get(name)
        return t if parts is None else t + np.maximum(t @ parts["down"], 0) @ parts["up"]

    hidden = np.maximum(slot(x @ W1.T, "fc1"), 0)
    return slot(hidden @ W2.T + B2, "fc2")
