"""Write ``tests/truths/``: tiny models and what PyTorch computes of them with an adapter.

The proofs of onnx-adapt compare ONNX Runtime with a formula at the place where a slot was
put. These files tell whether it is the right place: a bottleneck hangs on a module of the
PyTorch model, and the answer is the output of the whole model, in float64. Each case has

    <case>.onnx   the model, exported or written as a converter leaves it
    <case>.npz    ``x``, ``down`` ``(width, r)``, ``up`` ``(r, width)``, and PyTorch's
                  answers ``base`` and ``adapted``

and the tests' table (``tests/house/test_truths.py``) says what each case is for. To make the
environment and run the script, from the root of the repository::

    python -m venv /tmp/truths
    /tmp/truths/bin/pip install torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2
    PYTHONHASHSEED=0 /tmp/truths/bin/python tools/make_truths.py
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "truths"
BOTTLENECK = 3


class Picture(nn.Module):
    """Two convolutions with something between them that hides the channels."""

    def __init__(self, between: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.last = nn.Conv2d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.between(self.first(x))))


class Shuffle(nn.Module):
    """ShuffleNet's channel shuffle in two groups."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ChannelsLast(nn.Module):
    """A LayerNorm and a Linear on the channels, which are last inside (ConvNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.dense = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """A picture as a row of patches: `(n, c, p)`, then `(n, p, c)` (ViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 2, stride=2)
        self.flat = nn.Flatten(2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.flat(self.first(x))).transpose(1, 2))


class Flat(nn.Module):
    """A picture as one row of all its numbers, for a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 6 * 4, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.first(x).flatten(1))))


class Perceptron(nn.Module):
    """Two Linears with a GELU between them."""

    def __init__(self, width: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, width)
        self.fc2 = nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class PostNorm(nn.Module):
    """The end of a block of BERT: `LayerNorm(dense(x) + x)`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.dense(x) + x))


def near_zero() -> nn.Module:
    """A network with one output, which its last bias brings close to 0."""
    model = Perceptron(width=32, outputs=1)
    with torch.no_grad():
        model.fc2.bias -= model(inputs((1, 6)))[0]
    return model


Rewrite = Callable[[onnx.ModelProto], None]


@dataclass(frozen=True)
class Truth:
    """One case.

    Attributes:
        build: Makes the PyTorch model.
        shape: Of the input, rows first.
        on: The module that the adapter hangs on.
        axis: The axis of its output that has the features.
        dynamic: Axes of the input that are symbols in the export.
        exporter: ``ts`` or ``dynamo``.
        rewrite: What was done to the model after the export.
        low_rank: LoRA: the adapter reads the module's input, and has no activation.
        exported_rows: How many rows the exporter sees; by default those of `shape`.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    on: str
    axis: int = -1
    dynamic: tuple[int, ...] = (0,)
    exporter: str = "ts"
    rewrite: Rewrite = field(default=lambda proto: None)
    low_rank: bool = False
    exported_rows: int = 0


def one_row_recorded(proto: onnx.ModelProto) -> None:
    """Exported for one row; by hand the input alone was made dynamic."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    proto.graph.value_info.extend(inferred.graph.value_info)
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_param = "batch"


def other_classes(proto: onnx.ModelProto) -> None:
    """The record of a head with ten classes, from before it was replaced."""
    proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = 10


def unsorted(proto: onnx.ModelProto) -> None:
    """The nodes backwards."""
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))


def fused_gelu(proto: onnx.ModelProto) -> None:
    """The first Linear's bias inside a BiasGelu, as ONNX Runtime's optimiser puts it."""
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    bias = next(n for n in graph.node if n.op_type == "Add" and "fc1" in n.name)
    product = next(n for n in graph.node if n.op_type == "MatMul" and "fc1" in n.name)
    last = next(n for n in graph.node if n.op_type == "MatMul" and "fc2" in n.name)
    vector = next(name for name in bias.input if name in stored)
    fused = helper.make_node(
        "BiasGelu",
        [product.output[0], vector],
        [last.input[0]],
        "/Gelu",
        domain="com.microsoft",
    )
    first = list(graph.node).index(bias)
    end = list(graph.node).index(last)
    kept = [*graph.node[:first], fused, *graph.node[end:]]
    del graph.node[:]
    graph.node.extend(kept)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def fused_norm(proto: onnx.ModelProto) -> None:
    """The Linear's bias as the fifth input of a SkipLayerNormalization."""
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    bias, product = (
        next(n for n in graph.node if n.op_type == op and "/dense/" in n.name)
        for op in ("Add", "MatMul")
    )
    norm = next(n for n in graph.node if n.op_type == "LayerNormalization")
    vector = next(name for name in bias.input if name in stored)
    fused = helper.make_node(
        "SkipLayerNormalization",
        [product.output[0], "x", *norm.input[1:], vector],
        [norm.output[0]],
        "/SkipLayerNorm",
        domain="com.microsoft",
        epsilon=1e-5,
    )
    first, end = (list(graph.node).index(node) for node in (bias, norm))
    kept = [*graph.node[:first], fused, *graph.node[end + 1 :]]
    del graph.node[:]
    graph.node.extend(kept)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def quantised(proto: onnx.ModelProto) -> None:
    """What the first Linear gives, as eight bits: calibrated on 16 rows without an adapter."""
    graph = proto.graph
    target = next(n for n in graph.node if n.op_type == "Add" and "fc1" in n.name).output[0]
    model = Perceptron()
    fill(model)
    with torch.no_grad():
        seen = model.fc1(inputs((16, 5, 6)))
    low, high = float(seen.min()), float(seen.max())
    scale = np.float32((high - low) / 255)
    zero = np.uint8(round(-low / scale))
    graph.initializer.extend(
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(zero, "zero")]
    )
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == target:
                node.input[i] = "dequantised"
    after = [n.output[0] for n in graph.node].index(target) + 1
    graph.node.insert(
        after, helper.make_node("QuantizeLinear", [target, "scale", "zero"], ["q"], "quantise")
    )
    graph.node.insert(
        after + 1,
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dequantised"], "back"),
    )


PICTURE, SQUARE = (3, 3, 6, 4), (3, 3, 8, 8)

TRUTHS = {
    "group_norm": Truth(lambda: Picture(nn.GroupNorm(2, 8)), SQUARE, "between", 1),
    "group_norm_any_size": Truth(
        lambda: Picture(nn.GroupNorm(4, 8)), PICTURE, "between", 1, dynamic=(0, 2, 3)
    ),
    "group_norm_dynamo": Truth(
        lambda: Picture(nn.GroupNorm(2, 8)), SQUARE, "between", 1, exporter="dynamo"
    ),
    "shuffle": Truth(lambda: Picture(Shuffle()), SQUARE, "between", 1),
    "shuffle_any_size": Truth(
        lambda: Picture(Shuffle()), PICTURE, "between", 1, dynamic=(0, 2, 3)
    ),
    "shuffle_dynamo": Truth(
        lambda: Picture(Shuffle()), SQUARE, "between", 1, exporter="dynamo"
    ),
    "pixel_shuffle": Truth(
        lambda: Picture(nn.PixelShuffle(2), 2), PICTURE, "between", 1, dynamic=(0, 2, 3)
    ),
    "channels_last": Truth(lambda: Picture(ChannelsLast()), SQUARE, "between", 1),
    "channels_last_dynamo": Truth(
        lambda: Picture(ChannelsLast()), SQUARE, "between", 1, exporter="dynamo"
    ),
    "channels_last_inside": Truth(lambda: Picture(ChannelsLast()), SQUARE, "between.dense"),
    "patches": Truth(Patches, (3, 3, 6, 4), "flat", 1),
    "patches_any_size": Truth(Patches, (3, 3, 8, 4), "flat", 1, dynamic=(0, 2, 3)),
    "flat_picture": Truth(Flat, PICTURE, "hidden"),
    "bias_gelu": Truth(Perceptron, (3, 5, 6), "fc1", rewrite=fused_gelu),
    "bias_gelu_lora": Truth(Perceptron, (3, 5, 6), "fc1", rewrite=fused_gelu, low_rank=True),
    "skip_norm": Truth(PostNorm, (3, 5, 6), "dense", rewrite=fused_norm),
    "skip_norm_lora": Truth(PostNorm, (3, 5, 6), "dense", rewrite=fused_norm, low_rank=True),
    "quantised": Truth(Perceptron, (3, 5, 6), "fc1", rewrite=quantised),
    "near_zero": Truth(near_zero, (3, 6), "fc2"),
    "stale_batch": Truth(
        lambda: Picture(nn.Tanh()),
        SQUARE,
        "between",
        1,
        dynamic=(),
        rewrite=one_row_recorded,
        exported_rows=1,
    ),
    "stale_classes": Truth(Perceptron, (3, 6), "fc2", rewrite=other_classes),
    "unsorted": Truth(Perceptron, (3, 5, 6), "fc1", rewrite=unsorted),
}


def fill(model: nn.Module) -> None:
    """Give all weights values that are not zero or one, the same each time."""
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if name.endswith("weight") and tensor.ndim == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
        else:
            nn.init.normal_(tensor, std=0.4)


def inputs(shape: tuple[int, ...]) -> torch.Tensor:
    """Random inputs, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def export(model: nn.Module, truth: Truth, path: Path) -> None:
    """Export a model, and do to it what the case says."""
    rows = truth.exported_rows or truth.shape[0]
    x = inputs((rows, *truth.shape[1:]))
    axes = {axis: f"d{axis}" for axis in truth.dynamic}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if truth.exporter == "dynamo":
            dims = {axis: torch.export.Dim(name) for axis, name in axes.items()}
            torch.onnx.export(
                model,
                (x,),
                path,
                dynamo=True,
                external_data=False,
                dynamic_shapes={"x": dims},
                output_names=["y"],
                verbose=False,
            )
        else:
            torch.onnx.export(
                model,
                (x,),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["x"],
                output_names=["y"],
                dynamic_axes={"x": axes, "y": {0: "d0"} if axes else {}},
            )
    proto = onnx.load(path)
    truth.rewrite(proto)
    for node in proto.graph.node:
        kept = [item for item in node.metadata_props if "stack_trace" not in item.key]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(proto, path)


def answers(model: nn.Module, truth: Truth) -> dict[str, np.ndarray]:
    """What PyTorch computes in float64, with and without the adapter."""
    wide, x = copy.deepcopy(model).double(), inputs(truth.shape)
    made: list[torch.Tensor] = []
    adapter: list[torch.Tensor] = []

    def adapt(
        _module: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        made.append(output)
        if not adapter:
            return output
        down, up = adapter
        if truth.low_rank:
            return output + given[0] @ down @ up
        value = output.movedim(truth.axis, -1)
        return (value + torch.relu(value @ down) @ up).movedim(-1, truth.axis)

    wide.get_submodule(truth.on).register_forward_hook(adapt)
    with torch.no_grad():
        base = wide(x.double())
        width = made[0].shape[truth.axis]
        read = x.shape[-1] if truth.low_rank else width
        draw = torch.Generator().manual_seed(2)
        for shape in ((read, BOTTLENECK), (BOTTLENECK, width)):
            adapter.append(torch.randn(shape, generator=draw).double())
        adapted = wide(x.double())
    found = {"down": adapter[0], "up": adapter[1]}
    return {
        "x": x.numpy(),
        **{name: value.float().numpy() for name, value in found.items()},
        "base": base.numpy(),
        "adapted": adapted.numpy(),
    }


def main() -> None:
    """Write all cases."""
    FOLDER.mkdir(exist_ok=True)
    for name, truth in TRUTHS.items():
        torch.manual_seed(0)
        model = truth.build().eval()
        if truth.build is not near_zero:
            fill(model)
        found = answers(model, truth)
        export(model, truth, FOLDER / f"{name}.onnx")
        np.savez_compressed(FOLDER / f"{name}.npz", **found)
        moved = np.abs(found["adapted"] - found["base"]).max()
        print(f"{name}: the adapter moves the output by {moved:.2f}")


if __name__ == "__main__":
    main()
