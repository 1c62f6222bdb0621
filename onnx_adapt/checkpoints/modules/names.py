"""Map the module names of a checkpoint to those of a graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnx_adapt.checkpoints.modules.model_parts import (
    lost_parts,
    other_part,
    part_of_path,
    parts_of,
)
from onnx_adapt.errors import CheckpointError
from onnx_adapt.words import nearest

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


def _built(path: str) -> str:
    """The name that onnxruntime-genai's builder gives to a module."""
    return re.sub(r"(^|\.)self_attn\.", r"\1attn.", path)


# How names are mapped, by example. A checkpoint was trained on a model with a head, and the
# graph was exported from the encoder alone:
#
#     wanted   bert.encoder.layer.0.attention.self.query   bert.encoder.layer.0.output.dense
#     known         encoder.layer.0.attention.self.query        encoder.layer.0.output.dense
#
# 1. `_changes` looks for endings that a wanted name and a known name share. It cuts up to
#    three words off the front: without "bert." the first name is known, so "remove 'bert.',
#    add ''" is a change worth trying.
# 2. `_mappings` applies each change to all wanted names: this one finds both.
# 3. `map_modules` takes the change that finds most modules; among equals the one that changes
#    fewer prefixes (`cost`); if two are equal in that as well, it refuses to guess.
#
# A change does not count if the prefix that it drops names a part of the model that the graph
# may not be (`model.decoder.` onto a graph with `encoder.`; see `model_parts`), and a short
# ending such as `dense`, which many modules share, counts only if it finds all of them. The
# same is then tried with the names that other versions have (`_newer`, `_older`, `_built`).


def map_modules(
    wanted: Sequence[str],
    known: Iterable[str],
    *,
    optional: Collection[str] = (),
    kind: str = "",
    shown: Collection[str] = (),
) -> dict[str, str]:
    """Find each module of a checkpoint among the modules of a graph.

    Either side may have a prefix the other lacks (`bert.`, a wrapper's attribute), but the
    same one for all modules, so that no module is mistaken for a shorter namesake; and not
    one that names a part of a model (`model.decoder.`), unless the graph is that part.

    Args:
        wanted: The checkpoint's modules.
        known: The graph's.
        optional: Those of `wanted` that may be missing.
        kind: The architecture of the model that was trained, if it is known.
        shown: The parts of a model that the graph shows itself to be.

    Returns:
        The graph's path for each module that is found; the mapping that finds most wins.

    Raises:
        CheckpointError: If two mappings find them all, and neither is the likelier.
    """
    there = dict.fromkeys(known)
    needed = set(wanted) - set(optional)
    best: dict[str, str] = {}
    likeliest, rival = 0, best
    for mappings in _mappings(wanted, there, needed, kind):
        for change, found in mappings:
            whole = needed <= found.keys()
            if lost_parts(change.removed, found, shown, kind):
                continue
            if (len(found), -change.cost) > (len(best), -likeliest):
                best, likeliest, rival = found, change.cost, found
            elif whole and (len(found), change.cost) == (len(best), likeliest):
                rival = found
        if needed <= best.keys():
            break
    for module in wanted:
        if needed <= best.keys() and best.get(module) != rival.get(module):
            raise CheckpointError(
                f"module {module!r} of the checkpoint can be {best.get(module)!r} or "
                f"{rival.get(module)!r} in the graph",
                hint=f"say which: --map {map_words(module, best.get(module, ''))} or "
                f"--map {map_words(module, rival.get(module, ''))}",
            )
    return best


def map_words(module: str, path: str) -> str:
    """What `--map` takes to give a module of a checkpoint its path in a graph.

    Example:
        >>> map_words("model.text.layers.0.q", "language.layers.0.q")
        'model.text=language'
        >>> map_words("fc1", "a.fc1")
        '=a'
    """
    return "=".join(beginnings(module, path))


def beginnings(module: str, path: str) -> tuple[str, str]:
    """What two paths begin with before the words that they both end with."""
    theirs, ours = module.split("."), path.split(".")
    while theirs and ours and theirs[-1] == ours[-1]:
        theirs.pop()
        ours.pop()
    return ".".join(theirs), ".".join(ours)


def _mappings(
    wanted: Sequence[str], there: Collection[str], needed: Collection[str], kind: str
) -> Iterator[list[tuple[_Change, dict[str, str]]]]:
    """Yield the changes of prefix of each naming scheme, and the modules that each finds."""
    for rename in (str, _newer, _older, _built):
        names = {module: rename(module) for module in wanted}
        changes = _changes(list(names.values()), there, kind)
        pairs = [(change, change.applied(names, there)) for change in changes]
        yield [
            (change, found)
            for change, found in pairs
            if found and (not change.only_whole or change.is_whole(names, found, needed))
        ]


def refuse_other_part(
    wanted: Sequence[str],
    found: Mapping[str, str],
    known: Iterable[str],
    *,
    kind: str = "",
    shown: Collection[str] = (),
    file: str = "",
) -> None:
    """Refuse a checkpoint if more modules would be found without the name of a part.

    Args:
        wanted: The checkpoint's modules.
        found: Those that were found, with their names.
        known: The graph's modules, or those of a file with its weights.
        kind: The architecture of the model that was trained, if it is known.
        shown: The parts of a model that the graph shows itself to be.
        file: The name of that file.

    Raises:
        CheckpointError: With the name that would be lost.
    """
    there = dict.fromkeys(known)
    lost = [
        (change.removed, paths, words)
        for mappings in _mappings(wanted, there, wanted, kind)
        for change, paths in mappings
        if len(paths) > len(found)
        if (words := lost_parts(change.removed, paths, shown, kind))
    ]
    if lost:
        removed, paths, _ = max(lost, key=lambda item: len(item[1]))
        parts = list(dict.fromkeys(word for *_, words in lost for word in words))
        raise other_part(removed, parts, paths, len(wanted), file, shown)


@dataclass(frozen=True, slots=True)
class _Change:
    """How the names of a checkpoint become those of a graph.

    Attributes:
        removed: What each name begins with in the checkpoint.
        added: What it begins with in the graph instead.
        only_whole: Whether it must find every module, because its names may match by chance.
    """

    removed: str
    added: str
    only_whole: bool = False

    @property
    def cost(self) -> int:
        """The number of prefixes that differ."""
        return bool(self.removed) + bool(self.added)

    def applied(self, names: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
        """The graph's name for each module that the graph has after this change."""
        full = {
            module: self.added + name.removeprefix(self.removed)
            for module, name in names.items()
            if name.startswith(self.removed)
        }
        return {module: name for module, name in full.items() if name in known}

    def is_whole(
        self, names: Mapping[str, str], found: Collection[str], needed: Collection[str]
    ) -> bool:
        """Whether all needed modules are found; if none is needed, all that begin alike."""
        alike = {module for module, name in names.items() if name.startswith(self.removed)}
        return (set(needed) or alike).issubset(found)

    def replaces_a_part(self, known: Collection[str]) -> bool:
        """Whether the prefixes name different parts of a model, and not just two wrappers.

        They do if the graph has both, or if they differ in the number of a layer.
        """
        removed, added = self.removed, self.added
        nested = added.startswith(removed) or removed.startswith(added)
        there = any(path.startswith(removed) for path in known)
        numbers = ([p for p in x.split(".")[1:] if p.isdigit()] for x in (removed, added))
        return (there and not nested) or next(numbers) != next(numbers)


def _changes(names: Sequence[str], known: Collection[str], kind: str) -> list[_Change]:
    """Find the changes of prefix that turn a name of the checkpoint into one of the graph."""
    options = {_Change("", ""): None}
    longest = max((name.count(".") for name in names), default=0)
    # The names with most parts are the least likely to be found by accident.
    samples = sorted(set(names), key=lambda name: -name.count("."))[:8]
    for cut in range(min(longest + 1, 4)):
        for name in samples:
            short = ".".join(name.split(".")[cut:])
            removed = name.removesuffix(short)
            for path in known if short else ():
                if path != short and not path.endswith("." + short):
                    continue
                # Short enough to be met by accident.
                vague = "." not in short or short.partition(".")[0].isdigit()
                numbered = any(map(str.isdigit, removed.split(".")))
                change = _Change(removed, path.removesuffix(short), vague or numbered)
                wrong = change.cost > 1 and (vague or change.replaces_a_part(known))
                if not wrong and not _differ(removed, change.added, kind):
                    options.setdefault(change, None)
    return list(options)


_ARCHITECTURES = frozenset(
    [
        *("albert", "bart", "bert", "beit", "clip", "deberta", "deit", "distilbert"),
        *("electra", "gpt2", "mpnet", "roberta", "vit"),
    ]
)
"""The names of base models inside models with a head (transformers' `base_model_prefix`)."""


def _differ(removed: str, added: str, kind: str) -> bool:
    """Whether two prefixes name different architectures, whose layers are named alike."""
    theirs, ours = (
        {*words} & _ARCHITECTURES for words in ([kind, *removed.split(".")], added.split("."))
    )
    return bool(theirs and ours and theirs != ours)


def refuse_unmapped(
    wanted: Sequence[str], found: Mapping[str, str], known: Iterable[str], file: str = ""
) -> None:
    """Refuse a checkpoint if some of its modules were not found.

    Args:
        wanted: The checkpoint's modules.
        found: Those that were found, with their names.
        known: The graph's modules, or those of a file with its weights.
        file: The name of that file.

    Raises:
        CheckpointError: With both naming schemes if nothing matched, or with what is left.
    """
    left = [module for module in wanted if module not in found]
    if not left:
        return
    unique = list(dict.fromkeys(known))
    paths = [path for path in unique if path.count(".") > 1] or unique
    theirs, ours = ", ".join(left[:_SHOWN]), ", ".join(paths[-_SHOWN:]) or "none"
    if file:
        raise CheckpointError(
            f"{len(left)} of {len(wanted)} modules of the checkpoint are not in {file}, so "
            f"they cannot be found in the graph: {theirs}; the file has {ours}, ...",
            hint="give the weights of the whole base that was exported, with its head",
        )
    if len(left) == len(wanted):
        raise CheckpointError(
            f"no module of the checkpoint is in the graph; the checkpoint has {theirs}, ...; "
            f"the graph has {ours}, ...",
            hint=f"is it an adapter for this base? {_renaming(left, paths)}; if the graph "
            "lost its names, give the base's weights with --base-weights model.safetensors",
        )
    common = set.intersection(*({*parts_of(module).values()} for module in left))
    if other := common.difference(*(parts_of(module).values() for module in found)):
        word = min(other)
        raise CheckpointError(
            f"{len(left)} of {len(wanted)} modules of the checkpoint are of {word!r}, and "
            f"the graph has none of it: {theirs}, ...; the graph has {ours}, ...",
            hint=f"for this graph alone: --part {part_of_path(next(iter(found)))}; if the "
            "model is in several files, give their folder: `onnx-adapt insert FOLDER "
            "--adapter DIR -o OUT`",
        )
    raise CheckpointError(
        f"{len(left)} of {len(wanted)} modules of the checkpoint are not in the graph: "
        f"{theirs}{', ...' if len(left) > _SHOWN else ''}; the graph has {ours}, ...",
        hint="the base has fewer layers, is of another architecture, or was optimised; "
        f"{_renaming(left, paths)}; --part takes one part of the checkpoint alone, and "
        "--allow-missing GLOB leaves out what the graph lacks",
    )


def _renaming(left: Sequence[str], paths: Sequence[str]) -> str:
    """How to rename modules that were not found, after a path that ends alike."""
    words = "OLD=NEW"
    for module in left:
        ending, parts = module.split(".")[-2:], parts_of(module).keys()
        alike = [
            p for p in paths if p.split(".")[-2:] == ending and parts_of(p).keys() == parts
        ]
        if near := nearest(module, alike, 1):
            words = map_words(module, near[0])
            break
    return f"if its modules have other names there, rename them: --map {words}"
