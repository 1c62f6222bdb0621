"""Save an adapter as a checkpoint that a training library loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.fitting import require_fit, required_manifest
from onnx_adapt.adapter.given import AdapterLike, as_adapter
from onnx_adapt.checkpoints.edits import SlotEdit
from onnx_adapt.checkpoints.mapping import graph_with
from onnx_adapt.checkpoints.modules.selection import Selection
from onnx_adapt.checkpoints.unplacing.unplace import unplace
from onnx_adapt.checkpoints.writers.table import WRITERS, Writer
from onnx_adapt.checkpoints.writers.wanted import Files, Wanted
from onnx_adapt.edit.remove import written_out_base
from onnx_adapt.errors import CheckpointError, SaveError
from onnx_adapt.model.file import Model
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.whole_files import write_files


def save_checkpoint(
    adapter: AdapterLike,
    path: str | os.PathLike[str],
    *,
    model: ModelLike,
    library: str,
    base_weights: str | os.PathLike[str] | None = None,
    module_map: Mapping[str, str] | None = None,
) -> Path:
    """Save an adapter as a training library loads it: the way back of `load_checkpoint`.

    It computes in the library what it computes in ONNX Runtime, up to rounding. The scale of
    LoRA is in B, and is written as 1.

    Args:
        adapter: An adapter for the slots of the model. Slots that it has no weights for are
            left off.
        path: The folder to write; for `kohya` a `.safetensors` file.
        model: The model with the slots.
        library: `peft`, `adapterhub`, `mlx` or `kohya`.
        base_weights: The base's weights, for a graph that lost its names.
        module_map: Beginnings of the graph's module paths, and what the library calls them.

    Returns:
        The folder or file.

    Raises:
        CheckpointError: If the library has nothing that computes one of the slots.
        AdapterError: If the adapter does not fit the model.
        SaveError: If the files cannot be written.

    Example:
        >>> import tempfile, onnx_adapt as oa
        >>> case = "tests/cases/peft_bert_lora_default_ts"
        >>> base = oa.open_model(case + "/base.onnx")
        >>> trained = oa.load_checkpoint(case + "/adapter", base)
        >>> model = oa.insert_checkpoint(base, trained)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = oa.save_checkpoint(trained.adapter, folder, model=model, library="peft")
        ...     len(oa.load_checkpoint(path, base, name="again").slots)
        4
    """
    adapter = as_adapter(adapter)
    model = as_model(model)
    writer = _writer(library)
    target = Path(path).absolute()
    _refuse_path(writer, target)
    _refuse_activated(writer, adapter)
    require_fit(model, adapter, allow_partial=True)
    items, modules = _items(adapter, model, base_weights, module_map or {})
    write = import_module(writer.module).write
    name = target.stem if writer.one_file else adapter.name
    files: Files = write(Wanted(name, items, modules, adapter.invocation_tokens))
    folder = target.parent if writer.one_file else target
    write_files([(folder / name, [content]) for name, content in files.items()])
    return target


def _writer(library: str) -> Writer:
    if library not in WRITERS:
        raise CheckpointError(
            f"there is no writer for {library!r}", hint=f"known: {', '.join(WRITERS)}"
        )
    return WRITERS[library]


def _refuse_activated(writer: Writer, adapter: Adapter) -> None:
    """Refuse an aLoRA for a library in which it is always on, and a decoder's first past."""
    if adapter.invocation_tokens and not writer.activates:
        raise CheckpointError(
            f"adapter {adapter.name!r} is on from its invocation tokens on (aLoRA), and "
            f"{writer.label} has no such adapter",
            hint="--to peft writes it",
        )
    if adapter.initial_state:
        raise CheckpointError(
            f"adapter {adapter.name!r} is the first past of a decoder, which is not written "
            "back: PEFT keeps what it was made of",
            hint=f"keep the folder that it came from, or this file; {writer.label} cannot be "
            "given a past",
        )


def _refuse_path(writer: Writer, target: Path) -> None:
    """Refuse a file for a library that loads folders, and the reverse."""
    if writer.one_file and (target.is_dir() or target.suffix != ".safetensors"):
        raise SaveError(
            f"{target} is no .safetensors file, and {writer.label} loads one",
            hint="give -o NAME.safetensors",
        )
    if not writer.one_file and target.exists():
        if not target.is_dir():
            raise SaveError(
                f"{target} is a file, and {writer.label} loads a folder", hint="give -o FOLDER"
            )
        if other := next(target.iterdir(), None):
            raise SaveError(
                f"{target} has {other.name} in it, which {writer.label} could load instead",
                hint="give the name of a new folder",
            )


def _items(
    adapter: Adapter,
    model: Model,
    base_weights: str | os.PathLike[str] | None,
    module_map: Mapping[str, str],
) -> tuple[list[SlotEdit], list[str]]:
    """What an adapter asks for by the names of the library, and all modules of the graph."""
    manifest = required_manifest(model)
    inner = [module for slot in manifest.slots for module in (*slot.modules, slot.name)]
    graph = graph_with(written_out_base(model), base_weights, inner)
    items = unplace(graph, manifest, adapter)
    if not items:
        raise CheckpointError(f"adapter {adapter.name!r} changes nothing")
    selection = Selection("", module_map)
    renamed = selection.edits([item.edit for item in items])
    named = [replace(item, edit=edit) for item, edit in zip(items, renamed, strict=True)]
    return named, [selection.renamed(path) for path in graph.finder.known()]
