"""What optimum-onnx writes: plain, optimised (O1, O2, O3), float16, and in several files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from optimum.exporters.onnx import main_export
from pipelines.architectures import ARCHITECTURES, FRAMES, make


def export(name: str, folder: Path, level: str | None = None) -> None:
    """Run `optimum-cli export onnx` on an architecture, and keep the models only."""
    saved, written = folder / "saved", folder / "written"
    make(name).save_pretrained(saved)
    main_export(
        os.fspath(saved),
        output=written,
        task=ARCHITECTURES[name].task,
        optimize=level,
        do_validation=False,
        library_name="transformers",
        nb_max_frames=FRAMES,
    )
    for path in written.glob("*.onnx*"):
        shutil.move(path, folder / path.name)
    shutil.rmtree(saved)
    shutil.rmtree(written)


def plain(name: str, folder: Path) -> None:
    """Export without optimisation."""
    export(name, folder)


def o1(name: str, folder: Path) -> None:
    """Export with ONNX Runtime's basic optimisations."""
    export(name, folder, "O1")


def o2(name: str, folder: Path) -> None:
    """Export with the fusions for transformers: attention, LayerNorm with skip, BiasGelu."""
    export(name, folder, "O2")


def o3(name: str, folder: Path) -> None:
    """Export with the fusions of O2, and Gelu approximated by FastGelu."""
    export(name, folder, "O3")


def float16(name: str, folder: Path) -> None:
    """Export, then convert the weights to float16 as `ORTOptimizer` does at O4."""
    export(name, folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save(convert_float_to_float16(model, keep_io_types=True), folder / "model.onnx")
