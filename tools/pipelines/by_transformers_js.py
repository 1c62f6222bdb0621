"""What the conversion script of transformers.js writes: `scripts/convert.py --quantize`.

Its steps are repeated here with the libraries that it calls: optimum exports, onnxslim
simplifies, then every mode is made from the simplified model. The modes' settings are those
of `scripts/quantize.py`, where a decoder is quantised by tensor and others by channel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxslim
from onnxruntime.quantization import QuantizationMode, QuantType
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.registry import IntegerOpsRegistry
from onnxruntime.transformers import float16
from pipelines import by_optimum

BY_TENSOR = ("gpt2", "llama", "phi3", "whisper")
BLOCK, BNB4_BLOCK = 32, 64


def quantise_q8(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with 8-bit weights whose activations are quantised in each run."""
    operators = {node.op_type for node in model.graph.node}
    quantizer = ONNXQuantizer(
        model,
        per_channel=name not in BY_TENSOR,
        reduce_range=name not in BY_TENSOR,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QUInt8 if "Conv" in operators else QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=set(IntegerOpsRegistry),
        extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    return quantizer.model.model


def quantise_bnb4(_name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with weights in NF4, as bitsandbytes has them."""
    quantizer = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, BNB4_BLOCK)
    quantizer.process()
    return quantizer.model.model


def quantise_q4(_name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with 4-bit weights in blocks."""
    quantizer = MatMulNBitsQuantizer(model, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    return quantizer.model.model


def to_float16(_name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model in float16 with inputs and outputs in float32."""
    half = float16.convert_float_to_float16(model, keep_io_types=True)
    return onnxslim.slim(half)


def quantise_q4f16(name: str, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with 4-bit weights, and all else in float16."""
    return to_float16(name, quantise_q4(name, model))


def converted(
    suffix: str, quantise: Callable[[str, onnx.ModelProto], onnx.ModelProto]
) -> Callable[[str, Path], None]:
    """Return what writes one mode of every model of an architecture."""

    def write(name: str, folder: Path) -> None:
        by_optimum.export(name, folder)
        for path in sorted(folder.glob("*.onnx")):
            model = quantise(name, onnxslim.slim(str(path)))
            path.unlink()
            onnx.save(model, folder / f"{path.stem}_{suffix}.onnx")

    return write


q8 = converted("quantized", quantise_q8)
bnb4 = converted("bnb4", quantise_bnb4)
q4 = converted("q4", quantise_q4)
q4f16 = converted("q4f16", quantise_q4f16)
fp16 = converted("fp16", to_float16)
