"""Adapters in exported ONNX models: insert, prove, swap and remove them.

The functions, in the order in which people need them. Wherever a model is asked for, a path, a
`Model` or an `onnx.ModelProto` will do; wherever an adapter is, a path or an `Adapter`.

    look        open_model, find_sites, list_slots
    insert      insert (after places that you name), add_head, save_model, remove
    prove       verify, which returns a Report; calibrate (ranges of quantised models)
    run         AdapterSession: run, async_run, load, unload
    weights     load_adapter, save_adapter, make_adapter (of arrays), train (on the ONNX file)
    trained     load_checkpoint, insert_checkpoint, insert_folder, convert, save_checkpoint,
                subtract (of a full fine-tune)
    algebra     blend, merge, compress, quantize, inspect, measure_loss
    deploy      fill, bake, extract, export, pack_rows, build_adapter

Every failure is an `AdaptError` whose text ends in what to do about it.

Example:
    >>> import numpy as np
    >>> import onnx_adapt as oa
    >>> adapted = oa.insert("models/dnsmos-p808.onnx", after="*/dense_*/MatMul_add")
    >>> ones = {"down": np.ones((64, 4)), "up": np.ones((4, 64))}
    >>> first = oa.list_slots(adapted)[0].name
    >>> mine = oa.make_adapter(adapted, "mine", {first: ones})
    >>> len(oa.list_slots(adapted)), len(mine.weights)
    (3, 1)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from onnx_adapt.adapter.blending import blend
    from onnx_adapt.adapter.compressing import compress
    from onnx_adapt.adapter.data import Adapter
    from onnx_adapt.adapter.files import load_adapter, save_adapter
    from onnx_adapt.adapter.inspecting import Inspection, inspect
    from onnx_adapt.adapter.merging import merge
    from onnx_adapt.adapter.own_weights import make_adapter
    from onnx_adapt.adapter.quantised import Quantised
    from onnx_adapt.adapter.quantising import quantize
    from onnx_adapt.adapter.updates import measure_loss
    from onnx_adapt.checkpoints.load import Checkpoint, load_checkpoint
    from onnx_adapt.edit.convert import convert
    from onnx_adapt.edit.export import export
    from onnx_adapt.edit.fill import bake, extract, fill
    from onnx_adapt.edit.heads import add_head
    from onnx_adapt.edit.insert import insert, list_slots
    from onnx_adapt.edit.insert_checkpoint import insert_checkpoint
    from onnx_adapt.edit.insert_folder import AdaptedFolder, insert_folder
    from onnx_adapt.edit.remove import remove
    from onnx_adapt.edit.save_checkpoint import save_checkpoint
    from onnx_adapt.edit.subtract import subtract
    from onnx_adapt.errors import AdaptError
    from onnx_adapt.graph.resolve import find_sites
    from onnx_adapt.graph.site import Site
    from onnx_adapt.model.file import Model, open_model, save_model
    from onnx_adapt.proof.calibration import calibrate
    from onnx_adapt.proof.result import Report
    from onnx_adapt.proof.verify import verify
    from onnx_adapt.session.adapter_session import AdapterSession
    from onnx_adapt.session.mixing import pack_rows
    from onnx_adapt.slot.build import build_adapter
    from onnx_adapt.slot.manifest import Slot
    from onnx_adapt.training.train import train

# Where each public name lives: `import onnx_adapt` itself imports nothing heavy.
_HOMES = {
    "AdaptError": "errors",
    "AdaptedFolder": "edit.insert_folder",
    "Adapter": "adapter.data",
    "AdapterSession": "session.adapter_session",
    "Checkpoint": "checkpoints.load",
    "Inspection": "adapter.inspecting",
    "Model": "model.file",
    "Quantised": "adapter.quantised",
    "Report": "proof.result",
    "Site": "graph.site",
    "Slot": "slot.manifest",
    "add_head": "edit.heads",
    "bake": "edit.fill",
    "blend": "adapter.blending",
    "build_adapter": "slot.build",
    "calibrate": "proof.calibration",
    "compress": "adapter.compressing",
    "convert": "edit.convert",
    "export": "edit.export",
    "extract": "edit.fill",
    "fill": "edit.fill",
    "find_sites": "graph.resolve",
    "insert": "edit.insert",
    "insert_checkpoint": "edit.insert_checkpoint",
    "insert_folder": "edit.insert_folder",
    "inspect": "adapter.inspecting",
    "list_slots": "edit.insert",
    "load_adapter": "adapter.files",
    "load_checkpoint": "checkpoints.load",
    "make_adapter": "adapter.own_weights",
    "measure_loss": "adapter.updates",
    "merge": "adapter.merging",
    "open_model": "model.file",
    "pack_rows": "session.mixing",
    "quantize": "adapter.quantising",
    "remove": "edit.remove",
    "save_adapter": "adapter.files",
    "save_checkpoint": "edit.save_checkpoint",
    "save_model": "model.file",
    "subtract": "edit.subtract",
    "train": "training.train",
    "verify": "proof.verify",
}

__all__ = [
    "AdaptError",
    "AdaptedFolder",
    "Adapter",
    "AdapterSession",
    "Checkpoint",
    "Inspection",
    "Model",
    "Quantised",
    "Report",
    "Site",
    "Slot",
    "add_head",
    "bake",
    "blend",
    "build_adapter",
    "calibrate",
    "compress",
    "convert",
    "export",
    "extract",
    "fill",
    "find_sites",
    "insert",
    "insert_checkpoint",
    "insert_folder",
    "inspect",
    "list_slots",
    "load_adapter",
    "load_checkpoint",
    "make_adapter",
    "measure_loss",
    "merge",
    "open_model",
    "pack_rows",
    "quantize",
    "remove",
    "save_adapter",
    "save_checkpoint",
    "save_model",
    "subtract",
    "train",
    "verify",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
