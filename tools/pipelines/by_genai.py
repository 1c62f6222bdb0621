"""What onnxruntime-genai's builder writes: packed projections into GroupQueryAttention."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
from make_genai_model import build_tokenizer, trim
from onnxruntime.quantization import QuantType, quantize_dynamic
from pipelines.architectures import make


def built(precision: str) -> Callable[[str, Path], None]:
    """Return what runs the builder at one precision, and keeps the model only."""

    def write(name: str, folder: Path) -> None:
        saved, written = folder / "saved", folder / "written"
        make(name).save_pretrained(saved)
        build_tokenizer().save_pretrained(saved)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "."]
        command += ["-i", str(saved), "-o", str(written), "-p", precision, "-e", "cpu"]
        command += ["-c", str(saved / "cache"), "--extra_options", "hf_token=false"]
        subprocess.run(command, check=True, cwd=saved, capture_output=True)
        trim(written / "model.onnx")
        onnx.save(onnx.load(written / "model.onnx"), folder / "model.onnx")
        shutil.rmtree(saved)
        shutil.rmtree(written)

    return write


fp32 = built("fp32")
int4 = built("int4")


def requantised(name: str, folder: Path) -> None:
    """Run the builder, then quantise to 8 bit; the producer's name becomes `onnx.quantize`."""
    fp32(name, folder)
    path = folder / "model.onnx"
    quantize_dynamic(path, path, weight_type=QuantType.QInt8)
