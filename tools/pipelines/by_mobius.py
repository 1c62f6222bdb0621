"""What Microsoft's mobius writes, for several execution providers."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import mobius
import onnx
from pipelines.architectures import make


def built(provider: str, dtype: str = "f32") -> Callable[[str, Path], None]:
    """Return what builds an architecture for one execution provider.

    The path of the saved model becomes the name of the graph, so it is a short one.
    """

    def write(name: str, folder: Path) -> None:
        saved, written = folder / "saved", folder / "written"
        make(name).save_pretrained(saved)
        with contextlib.chdir(folder):
            package = mobius.build("saved", dtype=dtype, execution_provider=provider)
        package.save(str(written))
        for path in written.rglob("*.onnx"):
            target = "_".join(path.relative_to(written).parts)
            onnx.save(onnx.load(path), folder / target)
        shutil.rmtree(saved)
        shutil.rmtree(written)

    return write


default = built("default")
cpu = built("cpu")
