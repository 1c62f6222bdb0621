"""Floating-point operations of a run, counted from the shapes that ONNX Runtime saw."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_adapt.errors import RunError
from onnx_adapt.model_file import Model
from onnx_adapt.ort import failures, onnxruntime, shortened
from onnx_adapt.runtime import model_bytes

Shape = tuple[int, ...]

_SUFFIX = "_kernel_time"
_MATMULS = {
    *("MatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "FusedMatMul"),
    *("DynamicQuantizeMatMul", "MatMulNBits", "MatMulBnb4"),
}
_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operators, and the input that is the kernel."""

_RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
_MOVING = {
    *("Cast", "CastLike", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Expand"),
    *("EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "NonZero"),
    *("OneHot", "Pad", "Range", "Reshape", "Scatter", "ScatterElements", "ScatterND", "Shape"),
    *("Size", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    *("If", "Loop", "Scan", "SequenceAt", "SequenceConstruct", "SplitToSequence"),
}
"""Operators that move data, or run the graphs inside them."""

_UNKNOWN = {
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention"),
    *("DecoderMaskedMultiHeadAttention", "QAttention", "Einsum", "DFT", "STFT"),
}
"""Operators whose work cannot be told from the shapes of what goes in and out."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of one node.

    Attributes:
        node: Its name.
        op: Its operator.
        inputs: Shapes of the inputs that are there.
        outputs: Shapes of the outputs.
    """

    node: str
    op: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]

    @property
    def counted(self) -> bool:
        """Whether `flops` knows the operator's work."""
        return self.op not in _UNKNOWN

    @property
    def flops(self) -> int:
        """Two for each multiply-add of a product or convolution; else one for each element.

        Moving data is free.
        """
        if self.op in _MOVING or not self.outputs or not self.inputs:
            return 0
        made = math.prod(self.outputs[0])
        if self.op in _MATMULS:
            return 2 * made * (self.inputs[0] or (1,))[-1]
        if self.op in ("Gemm", "FusedGemm"):
            # |A| * |B| / |Y| is the square of the inner size, whatever is transposed.
            sizes = math.prod(self.inputs[0]) * math.prod(self.inputs[1])
            bias = made if len(self.inputs) > 2 else 0
            return 2 * made * math.isqrt(sizes // made) + bias if made else 0
        if self.op in _CONVOLUTIONS and len(self.inputs) > _CONVOLUTIONS[self.op]:
            return 2 * made * math.prod(self.inputs[_CONVOLUTIONS[self.op]][1:])
        if self.op == "ConvTranspose":
            return 2 * math.prod(self.inputs[0]) * math.prod(self.inputs[1][1:])
        if self.op in _RECURRENT:
            steps = math.prod(self.inputs[0][:2])
            return 2 * steps * sum(math.prod(shape) for shape in self.inputs[1:3])
        return made


def trace(model: Model, feeds: Mapping[str, Any]) -> tuple[Ran, ...]:
    """Run a model once as it stands and note every node that ran, with its shapes.

    Nodes in the body of a Loop are there once for each turn.

    Raises:
        RunError: If ONNX Runtime refuses the model or the inputs.
    """
    ort = onnxruntime()
    known = failures()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "trace")
        data = model_bytes(model, options)
        try:
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            try:
                session.run(None, dict(feeds))
            finally:
                path = Path(session.end_profiling())
        except known as error:
            raise RunError(
                f"{model.label} does not run: {shortened(error)}",
                hint="give inputs that it runs with: --inputs FILE.npz",
            ) from error
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return tuple(
        Ran(
            event["name"].removesuffix(_SUFFIX),
            event["args"]["op_name"],
            _shapes(event["args"]["input_type_shape"]),
            _shapes(event["args"]["output_type_shape"]),
        )
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)
    )


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> tuple[Shape, ...]:
    """The shapes in an event: each entry is a dict from the element type to a shape."""
    return tuple(tuple(shape) for entry in entries for shape in entry.values())
