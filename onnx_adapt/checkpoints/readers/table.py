"""The table of checkpoint readers: how each library's files are recognised and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_adapt.checkpoints.edits import Edit, LowRank
from onnx_adapt.checkpoints.readers.adapterhub import adapterhub_edits
from onnx_adapt.checkpoints.readers.adapterhub_fusion import refuse_fusion
from onnx_adapt.checkpoints.readers.by_keys import damaged_file
from onnx_adapt.checkpoints.readers.diffusers import (
    diffusers_edits,
    is_diffusers,
    read_diffusers,
)
from onnx_adapt.checkpoints.readers.edifice import edifice_edits, is_edifice, read_edifice
from onnx_adapt.checkpoints.readers.files import CONFIG, PEFT_WEIGHTS, Files, find_files
from onnx_adapt.checkpoints.readers.gguf_lora import gguf_edits, is_gguf, read_gguf
from onnx_adapt.checkpoints.readers.keras_hub import (
    is_keras_hub,
    keras_hub_edits,
    read_keras_hub,
)
from onnx_adapt.checkpoints.readers.keys import with_plain_keys
from onnx_adapt.checkpoints.readers.kohya import is_kohya, kohya_edits, read_kohya
from onnx_adapt.checkpoints.readers.litgpt import is_litgpt, litgpt_edits, read_litgpt
from onnx_adapt.checkpoints.readers.loralib import is_loralib, loralib_edits, read_loralib
from onnx_adapt.checkpoints.readers.mlx import is_mlx, mlx_edits, read_mlx
from onnx_adapt.checkpoints.readers.nemo import is_nemo, nemo_edits, read_nemo
from onnx_adapt.checkpoints.readers.peft import peft_edits
from onnx_adapt.checkpoints.readers.peft_methods.table import METHODS
from onnx_adapt.checkpoints.readers.saved import (
    Saved,
    name_damage,
    refuse_damaged,
    refuse_rank_zero,
)
from onnx_adapt.checkpoints.readers.torchtune import (
    is_torchtune,
    read_torchtune,
    torchtune_edits,
)
from onnx_adapt.errors import CheckpointError
from onnx_adapt.model.signatures import recognised


@dataclass(frozen=True, slots=True)
class Reader:
    """How the checkpoints of one library are recognised and read.

    Attributes:
        label: What the library is called in messages.
        recognises: Whether files are this library's.
        mark: What only this library writes into adapter_config.json, in words; '' if files
            of it are known by other things.
        read: Reads the files.
        edits: What they ask for.
        words: Words in the keys of its tensors, by which a file that lacks what it needs is
            called after the library.
    """

    label: str
    recognises: Callable[[Files], bool]
    mark: str
    read: Callable[[Files], Saved]
    edits: Callable[[Saved], list[Edit]]
    words: tuple[str, ...] = ()


_ADAPTERHUB_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")


def _has_settings(files: Files) -> bool:
    settings = files.config().get("config")
    return isinstance(settings, dict) and bool(settings)


def _read_peft(files: Files) -> Saved:
    return Saved(files.path, "peft", files.config(), files.tensors(PEFT_WEIGHTS, _expected()))


def _read_adapterhub(files: Files) -> Saved:
    tensors = files.tensors(_ADAPTERHUB_WEIGHTS, _expected())
    head = files.tensors(_HEAD_WEIGHTS, _expected()) if files.first(_HEAD_WEIGHTS) else {}
    head_config = files.config("head_config.json")
    return Saved(files.path, "adapterhub", files.config(), tensors, head, head_config)


READERS: dict[str, Reader] = {
    "torchtune": Reader(  # before PEFT, whose configuration it writes too
        label="torchtune",
        recognises=is_torchtune,
        mark="",
        read=read_torchtune,
        edits=torchtune_edits,
    ),
    "peft": Reader(
        label="PEFT",
        recognises=lambda files: "peft_type" in files.config(),
        mark="`peft_type`",
        read=_read_peft,
        edits=peft_edits,
        words=tuple(part for method in METHODS.values() for part in method.parts),
    ),
    "adapterhub": Reader(
        label="AdapterHub",
        recognises=_has_settings,
        mark="a `config` with settings",
        read=_read_adapterhub,
        edits=adapterhub_edits,
        words=("adapters", "loras", "invertible_adapters"),
    ),
    "diffusers": Reader(
        label="diffusers",
        recognises=is_diffusers,
        mark="",
        read=read_diffusers,
        edits=diffusers_edits,
    ),
    "kohya": Reader(
        label="sd-scripts, LyCORIS or ComfyUI",
        recognises=is_kohya,
        mark="",
        read=read_kohya,
        edits=kohya_edits,
    ),
    "mlx": Reader(
        label="MLX-LM",
        recognises=is_mlx,
        mark="`lora_parameters`",
        read=read_mlx,
        edits=mlx_edits,
    ),
    "litgpt": Reader(
        label="LitGPT",
        recognises=is_litgpt,
        mark="",
        read=read_litgpt,
        edits=litgpt_edits,
    ),
    "gguf": Reader(
        label="llama.cpp",
        recognises=is_gguf,
        mark="",
        read=read_gguf,
        edits=gguf_edits,
    ),
    "keras_hub": Reader(
        label="KerasHub",
        recognises=is_keras_hub,
        mark="",
        read=read_keras_hub,
        edits=keras_hub_edits,
    ),
    "loralib": Reader(
        label="loralib",
        recognises=is_loralib,
        mark="",
        read=read_loralib,
        edits=loralib_edits,
    ),
    "nemo": Reader(
        label="NeMo",
        recognises=is_nemo,
        mark="",
        read=read_nemo,
        edits=nemo_edits,
    ),
    "edifice": Reader(
        label="Edifice",
        recognises=is_edifice,
        mark="",
        read=read_edifice,
        edits=edifice_edits,
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
    refuse_fusion(files)
    library = next((name for name, row in READERS.items() if row.recognises(files)), "")
    if not library:
        raise _unknown_folder(files) if files.is_folder else _unknown_file(files)
    return with_plain_keys(replace(READERS[library].read(files), path=path))


def _unknown_folder(files: Files) -> CheckpointError:
    """The error for a folder that is no library's: what is wrong, or what is inside."""
    path = files.path
    if damaged := damaged_file(files):
        return damaged
    if CONFIG in files.names:
        rows = [row for row in READERS.values() if row.mark]
        labels, marks = ([getattr(row, name) for row in rows] for name in ("label", "mark"))
        return CheckpointError(
            f"{path / CONFIG} is of neither {' nor '.join(labels)}",
            hint=f"it has neither {' nor '.join(marks)}",
        )
    inside = sorted(item.parent.name for item in path.glob(f"*/{CONFIG}"))
    hint = f"one of its folders? {', '.join(inside)}" if inside else _expected()
    single = [name for name in sorted(files.names) if _is_read_alone(path / name)]
    if single:
        hint = f"give a file of it: {', '.join(str(path / name) for name in single[:_SHOWN])}"
    weights = {*PEFT_WEIGHTS, *_ADAPTERHUB_WEIGHTS}
    return CheckpointError(
        f"{path} has no {CONFIG}", hint=_BARE if weights & files.names else hint
    )


def _is_read_alone(path: Path) -> bool:
    """Whether one file of a folder is a checkpoint by itself."""
    try:
        files = find_files(path, "")
        return any(row.recognises(files) for row in READERS.values())
    except CheckpointError:
        return False


def _unknown_file(files: Files) -> CheckpointError:
    """The error for a file that is no library's: what it is, or what its tensors look like."""
    path, header = files.path, files.header(files.file)
    if not header.shapes:
        found = recognised(header.start, path.name, adapter=True)
        kind = f"{found[0]}, no trained adapter" if found else "no file of weights"
        return CheckpointError(f"{path} is {kind}", hint=_expected())
    words = {word for key in header.shapes for word in key.split(".")}
    alike = [row.label for row in READERS.values() if words & set(row.words)]
    keys = ", ".join(list(header.shapes)[:_SHOWN])
    seen = f"{path} has the tensors {keys}, ..., "
    if alike and (path.parent / CONFIG).is_file():
        return CheckpointError(
            f"{seen}which are {alike[0]}'s", hint=f"give its folder, {path.parent}"
        )
    if alike:
        return CheckpointError(f"{seen}which are {alike[0]}'s, without settings", hint=_BARE)
    return CheckpointError(
        f"{seen}which are of no trained adapter that can be read", hint=_expected()
    )


_SHOWN = 3

_BARE = (
    f"weights alone do not say rank, scale and method: put the {CONFIG} that was saved with "
    "them beside them, and give the folder"
)


def _expected() -> str:
    """What to give, in words: a hint."""
    *others, last = (row.label for row in READERS.values())
    return f"give the folder or file that one of these saved: {'; '.join(others)}; {last}"
