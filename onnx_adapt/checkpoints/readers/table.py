"""The table of checkpoint readers: how each library's files are recognised and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnx_adapt.checkpoints.edits import Edit, LowRank
from onnx_adapt.checkpoints.readers.adapterhub import adapterhub_edits
from onnx_adapt.checkpoints.readers.files import CONFIG, Files, find_files
from onnx_adapt.checkpoints.readers.peft import peft_edits
from onnx_adapt.checkpoints.readers.saved import (
    Saved,
    name_damage,
    refuse_damaged,
    refuse_rank_zero,
)
from onnx_adapt.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Reader:
    """How the checkpoints of one library are recognised and read.

    Attributes:
        label: What the library is called in messages.
        recognises: Whether files are this library's.
        mark: What only this library writes there, in words.
        gives: What the user gives, in words: the function that saves it, or the file.
        read: Reads the files.
        edits: What they ask for.
    """

    label: str
    recognises: Callable[[Files], bool]
    mark: str
    gives: str
    read: Callable[[Files], Saved]
    edits: Callable[[Saved], list[Edit]]


_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTERHUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


def _has_settings(files: Files) -> bool:
    settings = files.config().get("config")
    return isinstance(settings, dict) and bool(settings)


def _read_peft(files: Files) -> Saved:
    return Saved(files.path, "peft", files.config(), files.tensors(_PEFT_WEIGHTS, _expected()))


def _read_adapterhub(files: Files) -> Saved:
    tensors = files.tensors(_ADAPTERHUB_WEIGHTS, _expected())
    head = files.tensors(_HEAD_WEIGHTS, _expected()) if files.first(_HEAD_WEIGHTS) else {}
    head_config = files.config("head_config.json")
    return Saved(files.path, "adapterhub", files.config(), tensors, head, head_config)


READERS: dict[str, Reader] = {
    "peft": Reader(
        label="PEFT",
        recognises=lambda files: "peft_type" in files.config(),
        mark="`peft_type`",
        gives="the folder that save_pretrained (PEFT) wrote",
        read=_read_peft,
        edits=peft_edits,
    ),
    "adapterhub": Reader(
        label="AdapterHub",
        recognises=_has_settings,
        mark="a `config` with settings",
        gives="the folder that save_adapter (AdapterHub) wrote",
        read=_read_adapterhub,
        edits=adapterhub_edits,
    ),
}
"""Every library whose checkpoints can be read; the first that recognises files reads them."""


def read_edits(saved: Saved) -> list[Edit]:
    """Read what a checkpoint asks for.

    Raises:
        CheckpointError: If the method or a setting is not supported, or files are damaged.
    """
    refuse_damaged(saved)
    with name_damage(saved):
        edits = READERS[saved.library].edits(saved)
    for edit in edits:
        if isinstance(edit, LowRank):
            refuse_rank_zero(edit.module, len(edit.a))
    return edits


def read_saved(path: Path) -> Saved:
    """Read a checkpoint, whichever library saved it.

    Raises:
        CheckpointError: If it is none, or its files are damaged.
    """
    files = find_files(path, _expected())
    _require_config(files)
    library = next((name for name, row in READERS.items() if row.recognises(files)), "")
    if not library:
        labels, marks = ([getattr(r, c) for r in READERS.values()] for c in ("label", "mark"))
        raise CheckpointError(
            f"{path / CONFIG} is of neither {' nor '.join(labels)}",
            hint=f"it has neither {' nor '.join(marks)}",
        )
    return READERS[library].read(files)


def _require_config(files: Files) -> None:
    """Check that a path is a folder with a configuration in it."""
    path = files.path
    if not files.is_folder:
        hint = f"give its folder, {path.parent}" if (path.parent / CONFIG).is_file() else _BARE
        raise CheckpointError(f"{path} is a file, no folder", hint=hint)
    if CONFIG not in files.names:
        inside = sorted(item.parent.name for item in path.glob(f"*/{CONFIG}"))
        weights = {*_PEFT_WEIGHTS, *_ADAPTERHUB_WEIGHTS}
        hint = f"one of its folders? {', '.join(inside)}" if inside else _expected()
        raise CheckpointError(
            f"{path} has no {CONFIG}", hint=_BARE if weights & files.names else hint
        )


_BARE = (
    f"weights alone do not say rank, scale and method: put the {CONFIG} that was saved with "
    "them beside them, and give the folder"
)


def _expected() -> str:
    return f"give {' or '.join(row.gives for row in READERS.values())}"
