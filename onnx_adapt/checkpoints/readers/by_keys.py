"""Find the file of a library among others by the keys of its tensors, not by its name."""

from __future__ import annotations

from collections.abc import Callable, Collection

from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.saved import read_state_dict
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


def file_by_keys(files: Files, fits: Callable[[Collection[str]], bool]) -> str:
    """The name of the file whose tensors have a library's keys; '' if none has.

    Args:
        files: The files.
        fits: Whether keys are the library's.

    Raises:
        CheckpointError: If the one file there is cannot be read, or two of a folder fit.
    """
    if not files.is_folder:
        return files.file if fits(files.header(files.file).shapes) else ""
    found = [name for name in sorted(files.names) if fits(_keys(files, name))]
    if len(found) > 1:
        raise CheckpointError(
            f"{files.path} has several files of adapters: {', '.join(found)}",
            hint="give a folder with one of them and what belongs to it",
        )
    return found[0] if found else ""


def tensors_by_keys(files: Files, fits: Callable[[Collection[str]], bool]) -> dict[str, Array]:
    """The tensors of the file whose keys are a library's.

    Raises:
        CheckpointError: If it cannot be read.
    """
    return read_state_dict(files.at(file_by_keys(files, fits)))


def damaged_file(files: Files) -> CheckpointError | None:
    """The error of a file of weights in a folder that cannot be read; None if all can."""
    for name in sorted(files.names):
        try:
            if name.endswith(_WEIGHTS) and not files.header(name).shapes:
                return CheckpointError(f"{files.at(name)} holds no weights that can be read")
        except CheckpointError as error:
            return error
    return None


def _keys(files: Files, name: str) -> Collection[str]:
    """The keys of a file that could hold weights; none if it is none, or damaged."""
    if not name.endswith(_WEIGHTS):
        return ()
    try:
        return files.header(name).shapes.keys()
    except CheckpointError:
        return ()


_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".lora")
"""What the names of files of weights end with; `lit_model.pth.lora` is LitGPT's."""
