"""Paths of modules whose dots were written as underscores, spelled as a graph spells them.

An example. sd-scripts writes `down_blocks.0.attentions.0.proj_in` as
`down_blocks_0_attentions_0_proj_in`. Which underscores were dots, only the paths of the graph
tell: `down_blocks.0.attentions.0.proj_in` written so is the same text, so that is the module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from onnx_adapt.checkpoints.modules.original_names import (
    flux_in_diffusers,
    unet_in_diffusers,
)
from onnx_adapt.checkpoints.modules.packed import packed_names
from onnx_adapt.errors import CheckpointError

_CUTS = 4
"""How many words at the beginning of a path may be those of a wrapper."""

_SCHEMES: tuple[Callable[[str], str], ...] = (str, unet_in_diffusers, flux_in_diffusers)
"""Names in the code that a model was published with, in those of diffusers."""


def spelled(modules: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Spell modules of a pipeline as a graph spells them.

    Args:
        modules: Paths whose first word is the part of the pipeline, if there is a dot; what
            follows may have underscores for dots.
        known: The modules of the graph.

    Returns:
        Each module with its new path, after the name of its part; those that are not found
        keep their own.

    Raises:
        CheckpointError: If a text can be two paths of the graph.
    """
    paths = list(dict.fromkeys(known))
    endings = _endings([*paths, *packed_names(paths)])
    groups: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        part, dot, _ = module.partition(".")
        groups[f"{part}{dot}" if dot else ""].append(module)
    found: dict[str, str] = {}
    for part, inside in groups.items():
        for module, path in _spelled(part, inside, endings).items():
            found[module] = part + path if path else module
    return found


_Endings = Mapping[str, Sequence[tuple[str, str]]]
"""By text with underscores for dots: the paths that end so, as a beginning and an ending."""


def _endings(paths: Iterable[str]) -> _Endings:
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in paths:
        words = path.split(".")
        for cut in range(min(len(words), _CUTS)):
            rest = ".".join(words[cut:])
            found[rest.replace(".", "_")].append((".".join(words[:cut]), rest))
    return found


def _spelled(part: str, modules: Sequence[str], endings: _Endings) -> dict[str, str]:
    """Spell the modules of one part after one beginning, the one that finds most of them."""
    best: tuple[int, int] = (0, 0)
    chosen: dict[str, list[str]] = {}
    for scheme in _SCHEMES:
        texts = {
            module: scheme(module.removeprefix(part).replace(".", "_")) for module in modules
        }
        for removed in _beginnings(texts.values()):
            found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
            for module, text in texts.items():
                if text.startswith(removed):
                    for start, rest in endings.get(text.removeprefix(removed), ()):
                        found[start][module].append(rest)
            for start, there in found.items():
                rank = len(there), -(bool(removed) + bool(start))
                if rank > best:
                    best, chosen = rank, there
    return {module: _only(module, chosen.get(module, ("",))) for module in modules}


def _beginnings(texts: Iterable[str]) -> list[str]:
    """What the texts may begin with that a graph leaves out: '' or some of their words."""
    first = min(texts, default="")
    words = first.split("_")
    return ["", *("_".join(words[:i]) + "_" for i in range(1, min(len(words), _CUTS)))]


def _only(module: str, paths: Sequence[str]) -> str:
    if len(set(paths)) > 1:
        raise CheckpointError(
            f"module {module!r} of the checkpoint can be {paths[0]!r} or {paths[1]!r} in the "
            "graph: both are this text with underscores for dots",
            hint=f"say which: --map {module}={paths[0]} or --map {module}={paths[1]}",
        )
    return paths[0]
