"""Refuse a folder whose files are of two models, or lack modules of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.checkpoints.modules.model_parts import is_cross_attention, part_of_path
from onnx_adapt.checkpoints.modules.weights import read_matrix
from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.words import nearest

_SHOWN = 3


def refuse_half(path: Path, wanted: Sequence[str], held: set[str], graph: Graph) -> None:
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


def refuse_missing(
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
        "part of the checkpoint alone, and --allow-missing GLOB leaves out what they lack",
    )


# How two models are told apart, by example. `bert-en.onnx` and `bert-de.onnx` have modules of
# the same names and sizes, so an adapter of one goes into both. But `layer.0.query` has other
# weights in each: the difference is as large as the weights themselves. In `model.onnx` and
# `model_fp16.onnx`, or in a decoder with a cache and one without, it has the same, up to the
# rounding of the element type.


def refuse_two_models(
    graphs: Mapping[Path, Graph], names: Mapping[Path, Mapping[str, str]]
) -> None:
    """Refuse files that have other weights for a module that both have.

    Compared are the first and the last module that a file has in common with those before it.

    Args:
        graphs: The graph of each file.
        names: The path in each file's graph of the checkpoint's modules that it has.

    Raises:
        CheckpointError: With both files and the module.
    """
    first: dict[str, Path] = {}
    for path, found in names.items():
        common = [module for module in found if module in first]
        for module in dict.fromkeys(common[:1] + common[-1:]):
            other = first[module]
            one = _base_weight(graphs[other], names[other][module])
            two = _base_weight(graphs[path], found[module])
            if one is None or two is None or one[0].shape != two[0].shape:
                continue  # another size is refused where the adapter is placed
            away = np.linalg.norm(one[0] - two[0]) / (np.linalg.norm(one[0]) or 1)
            if not away <= (_QUANTISED if one[1] or two[1] else _ROUNDED):
                raise CheckpointError(
                    f"module {module!r} has other weights in {other} than in {path} "
                    f"({away:.0%} apart): they are of two models",
                    hint="give a folder with the files of one model, or insert into one file "
                    f"alone: `onnx-adapt insert {other} --adapter DIR`",
                )
        first.update({module: path for module in found if module not in first})


_ROUNDED = 0.01
"""How far float weights of one model may be apart: bfloat16 rounds to 0.4 %."""

_QUANTISED = 0.3
"""The same where one of them is quantised: 4 bits round to about 10 %."""


def _base_weight(graph: Graph, module: str) -> tuple[Array, bool] | None:
    """The base's weight of a module, and whether it is quantised; None if it is not known."""
    for call in graph.finder.calls(module, called=False):
        weight = find_weight(call.view, call.weight)
        try:
            value = read_matrix(graph.model, call)
        except CheckpointError:
            return None  # of a form that cannot be read
        return value, weight is None or weight.elem_type not in FLOATS
    return None
