"""Adapters in exported ONNX models: insert, prove, swap and remove them.

Example:
    >>> import onnx_adapt as oa
    >>> base = oa.open_model("models/dnsmos-p808.onnx")
    >>> adapted = oa.insert(base, after="mos_estimator_small_1/dense_*/MatMul_add")
    >>> len(oa.list_slots(adapted))
    3
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onnx_adapt.adapter import Adapter
    from onnx_adapt.adapter_files import load_adapter, save_adapter
    from onnx_adapt.blending import blend
    from onnx_adapt.checkpoints import Checkpoint, load_checkpoint
    from onnx_adapt.conversion import convert
    from onnx_adapt.errors import AdaptError
    from onnx_adapt.filling import bake, extract, fill
    from onnx_adapt.manifest import Slot
    from onnx_adapt.model_file import Model, open_model, save_model
    from onnx_adapt.own_weights import make_adapter
    from onnx_adapt.proof.calibration import calibrate
    from onnx_adapt.report import Report
    from onnx_adapt.rewrite import insert, list_slots, remove
    from onnx_adapt.session import AdapterSession
    from onnx_adapt.sites import Site, find_sites
    from onnx_adapt.standalone import build_adapter
    from onnx_adapt.verification import verify

# Where each public name lives: `import onnx_adapt` itself imports nothing heavy.
_HOMES = {
    "AdaptError": "errors",
    "Adapter": "adapter",
    "AdapterSession": "session",
    "Checkpoint": "checkpoints",
    "Model": "model_file",
    "Report": "report",
    "Site": "sites",
    "Slot": "manifest",
    "bake": "filling",
    "blend": "blending",
    "build_adapter": "standalone",
    "calibrate": "proof.calibration",
    "convert": "conversion",
    "extract": "filling",
    "fill": "filling",
    "find_sites": "sites",
    "insert": "rewrite",
    "list_slots": "rewrite",
    "load_adapter": "adapter_files",
    "load_checkpoint": "checkpoints",
    "make_adapter": "own_weights",
    "open_model": "model_file",
    "remove": "rewrite",
    "save_adapter": "adapter_files",
    "save_model": "model_file",
    "verify": "verification",
}

__all__ = [
    "AdaptError",
    "Adapter",
    "AdapterSession",
    "Checkpoint",
    "Model",
    "Report",
    "Site",
    "Slot",
    "bake",
    "blend",
    "build_adapter",
    "calibrate",
    "convert",
    "extract",
    "fill",
    "find_sites",
    "insert",
    "list_slots",
    "load_adapter",
    "load_checkpoint",
    "make_adapter",
    "open_model",
    "remove",
    "save_adapter",
    "save_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
