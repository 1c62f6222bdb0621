"""Other tools on an adapted model, and what is left of its slots (docs/after-other-tools)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir
import onnxruntime as ort
import onnxsim
import onnxslim
from adapter_models import adapted, bumped, weights
from onnx import shape_inference, version_converter
from onnxconverter_common import float16
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from slot_models import saved, session

import onnx_adapt as oa
from onnx_adapt.ort import failures
from onnx_adapt.rewriting.damage import damages

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
_WARNINGS = 2
ADAPTER = oa.make_adapter(adapted(), "a", {"fc1": weights(3), "fc2": weights(5, seed=1)})
BAKED = oa.make_adapter(adapted(), "a", {"fc1": weights(3), "fc2": weights(3, seed=1)})


def _offline(level: str) -> Callable[[Path, Path], None]:
    def optimise(path: Path, result: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(result)
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return optimise


def _proto(
    change: Callable[[onnx.ModelProto], onnx.ModelProto],
) -> Callable[[Path, Path], None]:
    return lambda path, result: onnx.save(change(onnx.load(path)), result)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "onnxsim": _proto(lambda m: onnxsim.simplify(m)[0]),
    "onnxslim": _proto(onnxslim.slim),
    "ONNX Runtime offline, basic": _offline("ORT_ENABLE_BASIC"),
    "ONNX Runtime offline, all": _offline("ORT_ENABLE_ALL"),
    "quantize_dynamic": lambda path, result: quantize_dynamic(path, result),
    "float16 (onnxconverter-common)": _proto(
        lambda m: float16.convert_float_to_float16(m, keep_io_types=True)
    ),
    "float16 (onnxruntime.transformers)": _proto(
        lambda m: convert_float_to_float16(m, keep_io_types=True)
    ),
    "onnx-graphsurgeon": _proto(lambda m: gs.export_onnx(gs.import_onnx(m))),
    "onnx_ir": lambda path, result: onnx_ir.save(onnx_ir.load(path), result),
    "version_converter": _proto(lambda m: version_converter.convert_version(m, 18)),
    "shape_inference": _proto(shape_inference.infer_shapes),
}


def _computes(path: Path, adapter: oa.Adapter, feeds: dict[str, np.ndarray]) -> bool:
    try:
        (found,) = session(path, optimised=True).run(None, {"x": X, **feeds})
    except (*failures(), RuntimeError):
        return False
    return bool(np.allclose(found, bumped(X, adapter), 0.2, 0.2))


def _removes(model: oa.Model) -> bool:
    try:
        back = oa.remove(model)
        (found,) = session(back.proto).run(None, {"x": X})
    except (oa.AdaptError, *failures(), RuntimeError):
        return False
    return bool(np.allclose(found, bumped(X, oa.Adapter("off", {})), 0.2, 0.2))


def outcome(tool: str, folder: Path) -> tuple[str, str, str, str]:
    """What a tool leaves of fed and of baked slots, whether they come out, what check says."""
    fed, baked = folder / "fed.onnx", folder / "baked.onnx"
    TOOLS[tool](saved(adapted(), folder / "s.onnx"), fed)
    filled = oa.bake(oa.fill(adapted(), BAKED))
    TOOLS[tool](saved(filled, folder / "b.onnx"), baked)
    ort.set_default_logger_severity(_WARNINGS)  # onnxslim turns it up for the process
    model = oa.open_model(fed)
    said = damages(model)
    return (
        "yes" if _computes(fed, ADAPTER, ADAPTER.feeds()) else "no",
        "yes" if _computes(baked, BAKED, {}) else "no",
        "yes" if _removes(model) else "no",
        _summary(said),
    )


def _summary(said: list[str]) -> str:
    """The kind of the worst that `check` says."""
    kinds = {
        "no longer swappable": ("not swappable any more",),
        "record gone": ("the record of its slots is gone",),
        "weights gone": ("is gone from the model",),
        "weights of another type": ("as its slot is",),
        "nodes among the slots": ("is no part of it",),
        "can be fed, not removed": ("can still be fed",),
    }
    for kind, words in kinds.items():
        if any(word in text for word in words for text in said):
            return kind
    return "damaged" if said else "whole"
