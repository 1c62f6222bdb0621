"""What ONNX Runtime's own tools write: offline optimisation and quantisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from case_making import Arrays
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.optimizer import optimize_model
from pipelines import by_optimum
from pipelines.architectures import ARCHITECTURES, VOCABULARY

LEVELS = onnxruntime.GraphOptimizationLevel
BATCHES = 16
ORT_TYPES = {"llama": "gpt2"}
"""What the optimizer calls a model, where that is another name: as optimum has it."""


def optimised(level: onnxruntime.GraphOptimizationLevel) -> Callable[[str, Path], None]:
    """Return what saves the graph that ONNX Runtime has optimised for the CPU."""

    def write(name: str, folder: Path) -> None:
        by_optimum.plain(name, folder)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        onnxruntime.InferenceSession(folder / "model.onnx", options, providers=providers)
        (folder / "optimised.onnx").replace(folder / "model.onnx")

    return write


extended = optimised(LEVELS.ORT_ENABLE_EXTENDED)
everything = optimised(LEVELS.ORT_ENABLE_ALL)


def transformers_optimizer(name: str, folder: Path) -> None:
    """Run `python -m onnxruntime.transformers.optimizer` at its defaults."""
    by_optimum.plain(name, folder)
    path = str(folder / "model.onnx")
    optimize_model(path, model_type=ORT_TYPES.get(name, name)).save_model_to_file(path)


class Calibration(CalibrationDataReader):
    """Other inputs of the same sizes as those of the answers."""

    def __init__(self, name: str) -> None:
        self._rest = _calibration(ARCHITECTURES[name].inputs())

    def get_next(self) -> Arrays | None:
        """Return the next inputs, or nothing."""
        return next(self._rest, None)


def _calibration(inputs: Arrays) -> Iterator[Arrays]:
    random = np.random.default_rng(11)
    shape = inputs["input_ids"].shape
    for _ in range(BATCHES):
        yield inputs | {"input_ids": random.integers(3, VOCABULARY, shape, dtype=np.int64)}


def quantised(layout: QuantFormat, activations: QuantType) -> Callable[[str, Path], None]:
    """Return what quantises a model with ranges calibrated on the base."""

    def write(name: str, folder: Path) -> None:
        by_optimum.plain(name, folder)
        path, prepared = folder / "model.onnx", folder / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Calibration(name),
            quant_format=layout,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        prepared.unlink()

    return write


qdq = quantised(QuantFormat.QDQ, QuantType.QUInt8)
qdq16 = quantised(QuantFormat.QDQ, QuantType.QUInt16)
qoperator = quantised(QuantFormat.QOperator, QuantType.QUInt8)


def dynamic(path: Path) -> None:
    """Quantise a model's weights in place, its activations in each run."""
    types = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(path, path, weight_type=QuantType.QInt8, extra_options=types)


def qattention(name: str, folder: Path) -> None:
    """Fuse attention with optimum, then quantise: Attention becomes QAttention."""
    by_optimum.o2(name, folder)
    dynamic(folder / "model.onnx")
