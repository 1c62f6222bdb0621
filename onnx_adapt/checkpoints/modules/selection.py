"""Choose and rename the modules of a checkpoint: `--part`, `--map` and `--allow-missing`.

Both speak of the paths that the checkpoint gives to its modules, which error messages show.
`--map` comes first, so `--part` and every message after it speak of the new names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.modules.model_parts import contradicts, part_of_path, parts_of
from onnx_adapt.checkpoints.modules.names import map_modules
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.words import nearest

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules of a checkpoint are wanted, under which names, and which may be missing.

    Attributes:
        part: Only the modules under this path are wanted; all if it is empty.
        module_map: What paths of modules begin with, and what they begin with instead. The
            longest beginning that fits a path is the one.
        allow_missing: Globs of modules that the graph may lack.
    """

    part: str = ""
    module_map: Mapping[str, str] = field(default_factory=dict)
    allow_missing: Sequence[str] = ()

    def edits(self, edits: Sequence[Edit]) -> list[Edit]:
        """Rename the modules of edits, and keep those under the part.

        Raises:
            CheckpointError: If a beginning of the map or the part fits no module, or the map
                gives two modules one name.
        """
        modules = list(dict.fromkeys(edit.module for edit in edits))
        names = {module: self._renamed(module) for module in modules}
        self._refuse_idle_map(modules)
        _refuse_twins(names)
        chosen = [replace(edit, module=names[edit.module]) for edit in edits]
        if not self.part:
            return chosen
        kept = [edit for edit in chosen if is_under(edit.module, self.part)]
        if not kept:
            raise CheckpointError(
                f"no module of the checkpoint is under {self.part!r}",
                hint=f"its parts are {', '.join(parts_there(names.values()))}",
            )
        return kept

    def head(self, head: Mapping[str, Array]) -> dict[str, Array]:
        """Rename the keys of a head, and keep those under the part."""
        renamed = {self._renamed(key): value for key, value in head.items()}
        return {k: v for k, v in renamed.items() if not self.part or is_under(k, self.part)}

    def _renamed(self, path: str) -> str:
        fitting = [old for old in self.module_map if is_under(path, old)]
        if not fitting:
            return path
        old = max(fitting, key=len)
        rest = path.removeprefix(old).removeprefix(".") if old else path
        return ".".join(word for word in (self.module_map[old], rest) if word)

    def _refuse_idle_map(self, modules: Sequence[str]) -> None:
        for old, new in self.module_map.items():
            if any(is_under(module, old) for module in modules):
                continue
            beginnings = {b for module in modules for b in _beginnings(module)}
            near = ", ".join(nearest(old, sorted(beginnings))) or "none"
            raise CheckpointError(
                f"no module of the checkpoint begins with {old!r}, which {old}={new} renames",
                hint=f"whole words between dots count; nearest: {near}",
            )


def is_under(path: str, part: str) -> bool:
    """Whether a path is a part or inside it, in whole words; all are inside ''."""
    return not part or path == part or path.startswith(f"{part}.")


def _beginnings(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[:i]) for i in range(1, len(words) + 1)]


def _refuse_twins(names: Mapping[str, str]) -> None:
    """Refuse a map that gives two modules one name."""
    name, times = max(Counter(names.values()).items(), key=lambda item: item[1])
    if times > 1:
        both = [module for module in names if names[module] == name]
        raise CheckpointError(
            f"the map gives one name, {name!r}, to {' and '.join(map(repr, both[:2]))}",
            hint="rename them apart, or take one of them alone with --part",
        )


def parts_there(modules: Iterable[str]) -> list[str]:
    """The parts that a checkpoint's modules fall into, for messages.

    Each is the path up to the first word that names a part of a model, or else up to the
    first number.

    Example:
        >>> parts_there(["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"])
        ['model.encoder', 'model.decoder']
    """
    found = list(dict.fromkeys(map(part_of_path, modules)))
    return [*found[:_SHOWN], "..."] if len(found) > _SHOWN else found


# How `--part` finds modules, by example. The graph was exported from inside the model, so it
# does not say that it is the encoder:
#
#     wanted   model.encoder.layers.0.fc1       known   layers.0.fc1
#
# `map_modules` alone does not drop `encoder`, because the graph could be the decoder, with
# layers of the same names. `--part model.encoder` says that it is the encoder, so the part is
# taken off the wanted names. A known path that names another part, such as
# `decoder.layers.0.fc1`, still does not count.


def map_part(
    part: str,
    wanted: Sequence[str],
    known: Iterable[str],
    *,
    optional: Collection[str] = (),
    kind: str = "",
    shown: Collection[str] = (),
) -> dict[str, str]:
    """Map modules under a part to a graph that is this part, with or without its name.

    Args:
        part: The beginning of the paths of all that are wanted.
        wanted: The checkpoint's modules.
        known: The graph's.
        optional: Those of `wanted` that may be missing.
        kind: The architecture of the model that was trained, if it is known.
        shown: The parts of a model that the graph shows itself to be.
    """
    if contradicts(part, shown):
        return {}
    own = {word for module in wanted for word in parts_of(module, kind)}
    there = [path for path in known if own.issuperset(parts_of(path.rpartition(".")[0]))]
    short = {m: m.removeprefix(part).removeprefix(".") for m in wanted if m != part}
    left_out = [short[module] for module in optional if module in short]
    found = map_modules(list(short.values()), there, optional=left_out, kind=kind, shown=shown)
    return {module: found[name] for module, name in short.items() if name in found}
