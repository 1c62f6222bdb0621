"""Insert a trained checkpoint into a model that is in several files of one folder.

An example. optimum writes a T5 as `encoder_model.onnx`, `decoder_model.onnx` and
`decoder_with_past_model.onnx`. A checkpoint has modules of the encoder and of the decoder. The
first file takes the encoder's, the other two the decoder's; the last one has no
`EncDecAttention.k` and `.v`, because it reads what these gave from its cache. Slots have the
checkpoint's names in all files, so that one adapter serves them.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.load import Checkpoint, place_edits
from onnx_adapt.checkpoints.mapping import (
    Graph,
    Trained,
    apart,
    find_graph,
    names_in,
    read_trained,
)
from onnx_adapt.checkpoints.modules.model_parts import (
    family_of,
    is_cross_attention,
    part_of_path,
)
from onnx_adapt.checkpoints.modules.packed import unpacked
from onnx_adapt.checkpoints.modules.selection import Selection, is_under
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.insert_checkpoint import insert_checkpoint
from onnx_adapt.errors import CheckpointError, ModelFileError
from onnx_adapt.model.file import Model, open_model
from onnx_adapt.words import nearest

_log = logging.getLogger(__name__)
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class AdaptedFile:
    """One model file of a folder.

    Attributes:
        path: Its path inside the folder.
        base: The model in it.
        adapted: The model with slots; None if the checkpoint has nothing for it.
    """

    path: Path
    base: Model
    adapted: Model | None


@dataclass(frozen=True, slots=True)
class AdaptedFolder:
    """The models of a folder with the slots that a checkpoint needs.

    Attributes:
        files: The model files, in order of their paths.
        adapter: The trained weights, for all of them.
    """

    files: tuple[AdaptedFile, ...]
    adapter: Adapter


def insert_folder(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    name: str = "",
    part: str = "",
    module_map: Mapping[str, str] | None = None,
    baked: bool = False,
    batched: bool = False,
) -> AdaptedFolder:
    """Insert the slots of a trained checkpoint into all model files of a folder.

    Each file takes the modules that it has: a part of the model, such as an encoder, or all
    of them in another precision. Which part a file is follows from its modules' paths, or
    from its name.

    Args:
        folder: The folder with the `.onnx` files, in itself or in folders inside.
        checkpoint: The folder that `save_pretrained` or `save_adapter` wrote.
        name: The adapter's name; by default AdapterHub's, or the checkpoint's folder's.
        part: Only the checkpoint's modules under this path are wanted.
        module_map: What the checkpoint's module paths begin with, and what instead.
        baked: Put the trained weights into the models as constants.
        batched: Let one run give each row of a batch another adapter.

    Raises:
        ModelFileError: If the folder has no model.
        CheckpointError: If a module of the checkpoint is in no file, or the files are not of
            one model.

    Example:
        >>> import onnx_adapt as oa
        >>> home = "tests/pipelines/t5"
        >>> adapted = oa.insert_folder(f"{home}/optimum", f"{home}/lora", name="fr")
        >>> [file.path.stem for file in adapted.files if file.adapted]
        ['decoder_model', 'decoder_model_merged', 'decoder_with_past_model', 'encoder_model']
    """
    trained = read_trained(checkpoint, Selection(part, module_map or {}))
    wanted = list(dict.fromkeys(edit.module for edit in trained.edits))
    found: dict[Path, Checkpoint] = {}
    models: dict[Path, Model] = {}
    graphs: dict[Path, Graph] = {}
    held: dict[Path, set[str]] = {}
    for path in _model_files(Path(folder)):
        short = path.relative_to(folder)
        models[short] = open_model(path)
        graph = graphs[short] = find_graph(models[short], None, trained.edits)
        edits, names = _edits_for(trained, graph, short)
        held[short] = {edit.module for edit in edits}
        _refuse_half(short, wanted, held[short], graph)
        if edits:
            parts = {
                edit.module: unpacked(edit.module, graph.finder.known()) for edit in edits
            }
            pieces = list(apart(edits, parts, names, graph.finder))
            found[short] = place_edits(
                trained, graph, pieces, names, name=name, full_names=True
            )
    _refuse_missing(wanted, held, graphs)
    files = tuple(
        AdaptedFile(
            short,
            model,
            insert_checkpoint(model, found[short], baked=baked, batched=batched)
            if short in found
            else None,
        )
        for short, model in models.items()
    )
    return AdaptedFolder(files, _united(found))


def _model_files(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.rglob("*.onnx")) if p.is_file()]
    visible = [p for p in files if not any(w[0] == "." for w in p.relative_to(folder).parts)]
    if not visible:
        raise ModelFileError(
            f"{folder} has no .onnx file", hint="give a model, or the folder with its files"
        )
    return visible


def _edits_for(
    trained: Trained, graph: Graph, path: Path
) -> tuple[list[Edit], Mapping[str, str]]:
    """The edits that a file has the modules for, and the graph's path of each module."""
    known = graph.finder.known()
    parts = {edit.module: unpacked(edit.module, known) for edit in trained.edits}
    wanted = list(dict.fromkeys(one for edit in trained.edits for one in parts[edit.module]))
    names = names_in(trained, graph, wanted)
    if not names:
        part = _part_of_file(path, list(dict.fromkeys(map(part_of_path, wanted))))
        inside = [one for one in wanted if part and is_under(one, part)]
        names = names_in(replace(trained, part=part), graph, inside) if inside else {}
    edits = [edit for edit in trained.edits if all(n in names for n in parts[edit.module])]
    return edits, names


def _part_of_file(path: Path, parts: Sequence[str]) -> str:
    """The part that a file's name tells, or ''.

    `encoder_model.onnx` is the encoder, `text_encoder/model.onnx` the text encoder, and
    `vision_encoder.onnx` the vision tower, if there is but one part of this kind.
    """
    words = {*path.parent.parts, path.stem}
    words |= {word for text in list(words) for word in _beginnings_of(text)}
    names = {part: part.rpartition(".")[2] for part in parts}
    fitting = [part for part in parts if names[part] in words]
    families = {family_of(word) for word in words}
    alike = [part for part in parts if family_of(names[part]) in families]
    found = fitting or (alike if len(alike) == 1 else [])
    return max(found, key=len, default="")


def _beginnings_of(text: str) -> list[str]:
    words = re.split(r"[_\-.]", text)
    return ["_".join(words[:i]) for i in range(1, len(words) + 1)]


def _refuse_half(path: Path, wanted: Sequence[str], held: set[str], graph: Graph) -> None:
    """Refuse a file that has some layers of a part, and lacks others of the same part.

    What a decoder reads from its cache may be missing, and what is in no layer, such as
    embeddings, may be in a file of its own.
    """
    parts = {part_of_path(module) for module in held if _LAYER.search(module)}
    lacking = [
        module
        for module in wanted
        if module not in held and part_of_path(module) in parts and _LAYER.search(module)
        if not is_cross_attention(module)
    ]
    if lacking:
        near = nearest(lacking[0], graph.finder.known(), 1)
        raise CheckpointError(
            f"{path} has {len(held)} modules of the checkpoint and lacks "
            f"{', '.join(lacking[:_SHOWN])} of the same part"
            + (f"; the nearest there is {near[0]}" if near else ""),
            hint="are its files of two models? give a folder with those of one",
        )


_LAYER = re.compile(r"(^|\.)\d+(\.|$)")


def _refuse_missing(
    wanted: Iterable[str], held: Mapping[Path, set[str]], graphs: Mapping[Path, Graph]
) -> None:
    """Refuse a checkpoint with modules that no file has."""
    somewhere = {module for modules in held.values() for module in modules}
    missing = [module for module in wanted if module not in somewhere]
    if not missing:
        return
    nearby = [
        f"{path}: {near[0]}"
        for path, graph in graphs.items()
        if (near := nearest(missing[0], graph.finder.known(), 1))
    ]
    raise CheckpointError(
        f"{len(missing)} modules of the checkpoint are in no file: "
        f"{', '.join(missing[:_SHOWN])}{', ...' if len(missing) > _SHOWN else ''}; nearest to "
        f"{missing[0]}: {'; '.join(nearby) or 'none'}",
        hint="if the files call them otherwise, rename them: --map OLD=NEW; --part takes one "
        "part of the checkpoint alone",
    )


def _united(found: Mapping[Path, Checkpoint]) -> Adapter:
    """Join the adapters of several files into one, which knows all their bases.

    Raises:
        CheckpointError: If two files have other weights for one slot.
    """
    first, *others = (checkpoint.adapter for checkpoint in found.values())
    weights = dict(first.weights)
    replaced, activations = dict(first.replaced), dict(first.activations)
    for path, checkpoint in found.items():
        adapter = checkpoint.adapter
        for slot, parts in adapter.weights.items():
            if not _same(weights.setdefault(slot, parts), parts):
                raise CheckpointError(
                    f"slot {slot!r} of {path} would have other weights than in another file",
                    hint="are its files of two models? give a folder with those of one",
                )
            weights[slot] = max(weights[slot], parts, key=_precision)
        replaced |= {k: v for k, v in adapter.replaced.items() if k not in replaced}
        activations |= adapter.activations
    bases = tuple(dict.fromkeys(adapter.fingerprint for adapter in others))
    return replace(
        first,
        weights=weights,
        replaced=replaced,
        activations=activations,
        other_bases=tuple(base for base in bases if base != first.fingerprint),
    )


def _precision(parts: Mapping[str, Array]) -> int:
    return sum(array.dtype.itemsize for array in parts.values())


def _same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether weights are the same, but for the precision of their types."""
    if one.keys() != other.keys():
        return False
    pairs = [(np.asarray(one[p], np.float64), np.asarray(other[p], np.float64)) for p in one]
    return all(
        a.shape == b.shape
        and np.abs(a - b).max(initial=0) <= _ROUNDED * np.abs(a).max(initial=0)
        for a, b in pairs
    )


_ROUNDED = 0.1
"""How far weights that follow from the base's may differ: it may be quantised in one file."""
