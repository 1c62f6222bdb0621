"""The modules of a checkpoint in the names of a graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from onnx_adapt.errors import CheckpointError

# transformers 5 renamed the modules of ViT and its kin: 4 -> 5.
_RENAMED = (
    (r"encoder\.layer\.(\d+)\.attention\.attention\.query", r"layers.\1.attention.q_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.key", r"layers.\1.attention.k_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.attention\.value", r"layers.\1.attention.v_proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layers.\1.attention.o_proj"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"layers.\1.mlp.fc1"),
    (r"encoder\.layer\.(\d+)\.output\.dense", r"layers.\1.mlp.fc2"),
)
_SHOWN = 3


def _newer(path: str) -> str:
    for old, new in _RENAMED:
        changed, count = re.subn(old, new, path)
        if count:
            return changed
    return path


def _older(path: str) -> str:
    for old, new in _RENAMED:
        pattern = new.replace(".", r"\.").replace(r"\1", r"(\d+)").replace("\\\\.", "\\.")
        template = old.replace("\\.", ".").replace(r"(\d+)", r"\1")
        changed, count = re.subn(pattern, template, path)
        if count:
            return changed
    return path


def map_modules(wanted: Sequence[str], known: Iterable[str]) -> dict[str, str]:
    """Find each module of a checkpoint among the modules of a graph.

    Both sides may have a prefix the other lacks (`bert.`, a wrapper's attribute), but the
    same one for all modules, so that no module is mistaken for a shorter namesake.

    Returns:
        The graph's path for each module that is found; the mapping that finds most wins.
    """
    there = set(known)
    best: dict[str, str] = {}
    for rename in (str, _newer, _older):
        names = {module: rename(module) for module in wanted}
        for cut, prefix in _prefixes(list(names.values()), there):
            found = {}
            for module, name in names.items():
                short = _cut(name, cut)
                full = f"{prefix}{short}"
                if short and full in there:
                    found[module] = full
            if len(found) > len(best):
                best = found
        if len(best) == len(wanted):
            break
    return best


def _cut(name: str, count: int) -> str:
    return ".".join(name.split(".")[count:])


def _prefixes(names: Sequence[str], known: set[str]) -> list[tuple[int, str]]:
    """How many parts to take off each name, and what to put before it; likeliest first."""
    options: dict[tuple[int, str], None] = {(0, ""): None}
    longest = max((name.count(".") for name in names), default=0)
    # The names with most parts are the least likely to be found by accident.
    samples = sorted(set(names), key=lambda name: -name.count("."))[:8]
    for cut in range(min(longest, 4)):
        for name in samples:
            short = _cut(name, cut)
            if short.count(".") < 1:
                continue
            for path in known:
                if path == short or path.endswith("." + short):
                    before = path.removesuffix(short)
                    if not _differ(name.removesuffix(short), before):
                        options.setdefault((cut, before), None)
    return list(options)


_ARCHITECTURES = frozenset(
    [
        "albert",
        "bart",
        "bert",
        "beit",
        "clip",
        "deberta",
        "deit",
        "distilbert",
        "electra",
        "gpt2",
        "mpnet",
        "roberta",
        "vit",
    ]
)
"""What transformers calls a base model inside a model with a head (`base_model_prefix`)."""


def _differ(one: str, other: str) -> bool:
    """Whether two prefixes name different architectures, whose layers are named alike."""
    theirs, ours = (_ARCHITECTURES.intersection(p.split(".")) for p in (one, other))
    return bool(theirs and ours and theirs != ours)


def refuse_unmapped(
    wanted: Sequence[str], found: dict[str, str], known: Iterable[str]
) -> None:
    """Refuse a checkpoint of which modules are left over.

    Raises:
        CheckpointError: With both naming schemes if nothing matched, or with what is left.
    """
    left = [module for module in wanted if module not in found]
    if not left:
        return
    unique = list(dict.fromkeys(known))
    paths = [path for path in unique if path.count(".") > 1] or unique
    theirs, ours = ", ".join(left[:_SHOWN]), ", ".join(paths[-_SHOWN:]) or "none"
    if len(left) == len(wanted):
        raise CheckpointError(
            f"no module of the checkpoint is in the graph; the checkpoint has {theirs}, ...; "
            f"the graph has {ours}, ...",
            hint="is it an adapter for this base? if the graph lost its names, give the "
            "base's weights with --base-weights model.safetensors",
        )
    raise CheckpointError(
        f"{len(left)} of {len(wanted)} modules of the checkpoint are not in the graph: "
        f"{theirs}{', ...' if len(left) > _SHOWN else ''}; the graph has {ours}, ...",
        hint="the base has fewer layers, is of another architecture, or was optimised",
    )
