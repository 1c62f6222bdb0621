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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.checkpoints.edits import Edit, VirtualTokens
from onnx_adapt.checkpoints.load import Checkpoint, place_edits
from onnx_adapt.checkpoints.mapping import (
    Graph,
    Trained,
    apart,
    find_graph,
    names_in,
    read_trained,
    spell_out,
)
from onnx_adapt.checkpoints.modules.left_out import (
    may_be_missing,
    refuse_idle,
    tell_missing,
    with_effect,
)
from onnx_adapt.checkpoints.modules.model_parts import family_of, part_of_path, parts_of
from onnx_adapt.checkpoints.modules.packed import unpacked
from onnx_adapt.checkpoints.modules.selection import Selection, is_under
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.insert_checkpoint import insert_checkpoint
from onnx_adapt.edit.one_model import refuse_half, refuse_missing, refuse_two_models
from onnx_adapt.errors import CheckpointError, ModelFileError
from onnx_adapt.model.file import Model, open_model

_log = logging.getLogger(__name__)


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
        read: How many bytes the tensors of the checkpoint have.
    """

    files: tuple[AdaptedFile, ...]
    adapter: Adapter
    read: int


def insert_folder(
    folder: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    name: str = "",
    part: str = "",
    module_map: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
    baked: bool = False,
    batched: bool = False,
) -> AdaptedFolder:
    """Insert the slots of a trained checkpoint into all model files of a folder.

    Each file takes the modules that it has: a part of the model, such as an encoder, or all
    of them in another precision. Which part a file is follows from its modules' paths, or
    from its name.

    Args:
        folder: The folder with the `.onnx` files, in itself or in folders inside.
        checkpoint: The checkpoint, a folder or a file, as `load_checkpoint` takes it.
        name: The adapter's name; by default AdapterHub's, or that of the checkpoint's
            folder or file.
        part: Only the checkpoint's modules under this path are wanted.
        module_map: What the checkpoint's module paths begin with, and what instead.
        allow_missing: Globs of modules that all files may lack.
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
    trained = read_trained(checkpoint, Selection(part, module_map or {}, allow_missing))
    _refuse_tokens(trained)
    files = {path.relative_to(folder): path for path in _model_files(Path(folder))}
    models = {short: open_model(path) for short, path in files.items()}
    graphs = {short: find_graph(model, None, trained.edits) for short, model in models.items()}
    trained = spell_out(trained, graphs.values())
    wanted = list(dict.fromkeys(edit.module for edit in trained.edits))
    spare = may_be_missing(wanted, allow_missing)
    needed = [m for m in wanted if m not in spare]
    found: dict[Path, Checkpoint] = {}
    held: dict[Path, set[str]] = {}
    paths: dict[Path, Mapping[str, str]] = {}
    named = _files_by_part(files, wanted)
    for short, graph in graphs.items():
        edits, names = _edits_for(trained, graph, short, named)
        held[short] = {edit.module for edit in edits}
        paths[short] = names
        refuse_half(short, needed, held[short], graph)
        if edits:
            parts = {
                edit.module: unpacked(edit.module, graph.finder.known()) for edit in edits
            }
            edits = with_effect(edits, names, graph.finder)
            cuts = list(apart(edits, parts, names, graph))
            found[short] = place_edits(trained, graph, cuts, names, name=name, full_names=True)
    refuse_missing(needed, held, graphs)
    _tell_left_out(wanted, spare, held, allow_missing)
    refuse_two_models(graphs, paths)
    adapted = tuple(
        AdaptedFile(
            short,
            model,
            insert_checkpoint(model, found[short], baked=baked, batched=batched)
            if short in found
            else None,
        )
        for short, model in models.items()
    )
    read = next(iter(found.values())).read
    return AdaptedFolder(adapted, _united(found), read)


def _tell_left_out(
    wanted: Sequence[str],
    spare: Mapping[str, str],
    held: Mapping[Path, set[str]],
    allow_missing: Sequence[str],
) -> None:
    """Warn of the modules that no file has, and that may be missing.

    Raises:
        CheckpointError: If a glob for such modules matches none of them.
    """
    missing = [m for m in spare if not any(m in modules for modules in held.values())]
    refuse_idle(allow_missing, missing, wanted)
    tell_missing(spare, missing)


def _model_files(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.rglob("*.onnx")) if p.is_file()]
    visible = [p for p in files if not any(w[0] == "." for w in p.relative_to(folder).parts)]
    if not visible:
        raise ModelFileError(
            f"{folder} has no .onnx file", hint="give a model, or the folder with its files"
        )
    return visible


def _edits_for(
    trained: Trained, graph: Graph, path: Path, named: Mapping[str, Collection[Path]]
) -> tuple[list[Edit], Mapping[str, str]]:
    """The edits that a file has the modules for, and the graph's path of each module.

    A module of a part that other files are named after is not this file's, unless the graph
    names the part as well: `text_encoder.fc1` is in `text_encoder/model.onnx`, and is not the
    `fc1` of `text_encoder_2/model.onnx`.
    """
    known = graph.finder.known()
    parts = {edit.module: unpacked(edit.module, known) for edit in trained.edits}
    wanted = list(dict.fromkeys(one for edit in trained.edits for one in parts[edit.module]))
    elsewhere = {part for part, files in named.items() if path not in files}

    def own(names: Mapping[str, str]) -> dict[str, str]:
        return {
            module: found
            for module, found in names.items()
            if (part := part_of_path(module)) not in elsewhere
            or part.rpartition(".")[2] in found.split(".")
        }

    names = own(names_in(trained, graph, wanted))
    if not names:
        part = _part_of_file(path, list(dict.fromkeys(map(part_of_path, wanted))))
        inside = [one for one in wanted if part and is_under(one, part)]
        names = own(names_in(replace(trained, part=part), graph, inside)) if inside else {}
    edits = [edit for edit in trained.edits if all(n in names for n in parts[edit.module])]
    return edits, names


def _files_by_part(files: Collection[Path], wanted: Sequence[str]) -> dict[str, list[Path]]:
    """The parts of the model that files are named after, each with those files."""
    parts = [part for part in dict.fromkeys(map(part_of_path, wanted)) if parts_of(part)]
    alone = {path: _part_of_file(path, parts) for path in files}
    claims = {
        part: [path for path in files if (alone[path] or _part_of_file(path, [part])) == part]
        for part in parts
    }
    return {part: found for part, found in claims.items() if found}


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
    """The words that a name begins with; `text_encoder_2` is no `text_encoder`."""
    words = re.split(r"[_\-.]", text)
    return [
        "_".join(words[:i])
        for i in range(1, len(words) + 1)
        if i == len(words) or not words[i].isdigit()
    ]


def _united(found: Mapping[Path, Checkpoint]) -> Adapter:
    """Join the adapters of several files into one, which knows all their bases.

    Raises:
        CheckpointError: If two files have other weights for one slot.
    """
    first, *others = (checkpoint.adapter for checkpoint in found.values())
    weights = dict(first.weights)
    replaced, activations = dict(first.replaced), dict(first.activations)
    stacks = dict(first.stacks)
    for path, checkpoint in found.items():
        adapter = checkpoint.adapter
        for slot, parts in adapter.weights.items():
            if not _same(weights.setdefault(slot, parts), parts):
                raise CheckpointError(
                    f"slot {slot!r} of {path} would have other weights than in another file",
                    hint="are its files of two models? give a folder with those of one",
                )
            weights[slot] = max(weights[slot], parts, key=_precision)
        for key, value in adapter.replaced.items():
            if not _same({key: replaced.setdefault(key, value)}, {key: value}):
                raise CheckpointError(
                    f"{key!r} of {path} is laid out otherwise than in another file",
                    hint="insert into each file alone, with --part for the part that it is",
                )
            replaced[key] = max(replaced[key], value, key=lambda array: array.itemsize)
        activations |= adapter.activations
        stacks |= adapter.stacks
    bases = tuple(dict.fromkeys(adapter.fingerprint for adapter in others))
    return replace(
        first,
        weights=weights,
        replaced=replaced,
        activations=activations,
        other_bases=tuple(base for base in bases if base != first.fingerprint),
        stacks=stacks,
    )


def _refuse_tokens(trained: Trained) -> None:
    """Refuse virtual tokens, which no file of a folder needs slots for."""
    if isinstance(trained.edits[0], VirtualTokens):
        raise CheckpointError(
            f"{trained.edits[0].method} needs no slots: it is the first past of a decoder",
            hint="make an adapter of it for the decoder's file: `onnx-adapt convert "
            "CHECKPOINT --for DECODER.onnx -o NAME.safetensors`",
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
