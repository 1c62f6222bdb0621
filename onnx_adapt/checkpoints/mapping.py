"""Map the modules of a checkpoint to the modules of one graph."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.by_value import ByValue, find_by_value
from onnx_adapt.checkpoints.modules.inner_weights import attention_weights
from onnx_adapt.checkpoints.modules.left_out import (
    may_be_missing,
    refuse_idle,
    tell_missing,
    with_effect,
)
from onnx_adapt.checkpoints.modules.model_parts import architecture_of, parts_shown
from onnx_adapt.checkpoints.modules.names import (
    map_modules,
    refuse_other_part,
    refuse_unmapped,
)
from onnx_adapt.checkpoints.modules.packed import packed_layers, unpack, unpacked
from onnx_adapt.checkpoints.modules.parameters import refuse_inner_experts
from onnx_adapt.checkpoints.modules.selection import Selection, is_under, map_part
from onnx_adapt.checkpoints.modules.sized import sized
from onnx_adapt.checkpoints.modules.underscored import spelled
from onnx_adapt.checkpoints.readers.saved import Pipeline, Saved, read_state_dict
from onnx_adapt.checkpoints.readers.table import read_edits, read_saved
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.sites import Survey, survey_model
from onnx_adapt.model.file import Model
from onnx_adapt.words import count

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint as it was read, with the modules that are wanted of it.

    Attributes:
        saved: The checkpoint, as it was saved.
        edits: What it asks for, by the modules' new names.
        part: The path that all of them are under, or ''.
        head: Weights of a head saved beside the adapter, by key.
        allow_missing: Globs of modules that a graph may lack.
    """

    saved: Saved
    edits: list[Edit]
    part: str
    head: Mapping[str, Array]
    allow_missing: Sequence[str] = ()

    @property
    def kind(self) -> str:
        """The architecture of the model that was trained, if it is known."""
        return str(self.saved.config.get("model_type", ""))


@dataclass(frozen=True, slots=True)
class Graph:
    """A model whose modules can be found.

    Attributes:
        model: The model.
        survey: Its survey.
        finder: Finds the modules in the graph.
        shown: The parts of a model that the graph shows itself to be.
        base_weights: The file of the base's weights that the finder compares with, or None.
    """

    model: Model
    survey: Survey
    finder: ByName | ByValue
    shown: Collection[str]
    base_weights: str | os.PathLike[str] | None


def read_trained(path: str | os.PathLike[str], selection: Selection) -> Trained:
    """Read a checkpoint, and choose and rename its modules.

    Raises:
        CheckpointError: If it cannot be read, or the selection fits no module.
    """
    saved = read_saved(Path(path))
    edits = read_edits(saved)
    if not edits:
        raise CheckpointError(f"{saved.path} asks for nothing")
    chosen, head = selection.edits(edits), selection.head(saved.head)
    return Trained(saved, chosen, selection.part, head, selection.allow_missing)


def spell_out(trained: Trained, graphs: Iterable[Graph]) -> Trained:
    """Spell the modules of an adapter for image generation as graphs spell them.

    Raises:
        CheckpointError: If a text can be two paths of the graphs.
    """
    if trained.saved.pipeline is None:
        return trained
    known = [path for graph in graphs for path in all_known(graph.finder)]
    names = spelled([edit.module for edit in trained.edits], known)
    edits = [replace(edit, module=names[edit.module]) for edit in trained.edits]
    return replace(trained, edits=edits)


def all_known(finder: ByName | ByValue) -> list[str]:
    """The paths of a graph's modules, and of those whose weights have kept their names."""
    return [*finder.known(), *finder.stored()]


def _own_part(trained: Trained, graph: Graph) -> Trained:
    """Of an adapter for several models of a pipeline, what is for one graph.

    Raises:
        CheckpointError: If nothing is, or the graph may be two parts of the pipeline.
    """
    pipeline = trained.saved.pipeline
    if pipeline is None or trained.part or not pipeline.parts:
        return trained
    by_part = {
        part: [edit for edit in trained.edits if is_under(edit.module, part)]
        for part in pipeline.parts
    }
    known = graph.finder.known()
    fits: dict[str, tuple[bool, int]] = {}
    for part, edits in by_part.items():
        wanted = {one for edit in edits for one in unpacked(edit.module, known)}
        found = names_in(replace(trained, part=part), graph, sorted(wanted))
        if found:
            fits[part] = len(found) == len(wanted), len(found)
    best = [part for part, fit in fits.items() if fit == max(fits.values())]
    if len(best) > 1:
        raise CheckpointError(
            f"the graph may be each of {', '.join(best)}, which the checkpoint has modules of",
            hint=f"say which it is: --part {best[0]} or --part {best[1]}",
        )
    if not best:
        raise _other_base(trained, pipeline, graph)
    elsewhere = [part for part in by_part if part not in best]
    for part in elsewhere:
        left_out = count(len(by_part[part]), "module")
        _log.warning("left out %s of %s: the graph is %s alone", left_out, part, best[0])
    own = [e for e in trained.edits if not any(is_under(e.module, part) for part in elsewhere)]
    return replace(trained, edits=own, part=best[0])


def _other_base(trained: Trained, pipeline: Pipeline, graph: Graph) -> CheckpointError:
    """The error for a graph that has no module of an adapter for image generation."""
    known = all_known(graph.finder)
    kind = architecture_of(known)
    paths = [path for path in known if path.count(".") > 1] or known
    graph_is = f"this graph is a {kind.upper()}" if kind else "this graph is another model"
    first = trained.edits[0].module
    return CheckpointError(
        f"{trained.saved.path} is an adapter for {pipeline.base or 'image generation'}; "
        f"{graph_is}: it has {', '.join(paths[:_SHOWN]) or 'no modules'}, and not {first}",
        hint="give the graph of the U-Net, transformer or text encoder that it was trained "
        "for; if the graph lost its names, give --base-weights model.safetensors",
    )


_SHOWN = 2


def find_graph(
    model: Model, base_weights: str | os.PathLike[str] | None, edits: Sequence[Edit]
) -> Graph:
    """Survey a model, and choose how its modules are found.

    Args:
        model: The model.
        base_weights: The file of the base's weights, for a graph that lost its names.
        edits: The edits of a checkpoint, whose modules may be inside operators.

    Raises:
        CheckpointError: If a module is among the experts inside one node.
    """
    survey = survey_model(model)
    refuse_inner_experts(survey, [edit.module for edit in edits])
    shown = parts_shown(model.proto, survey.modules.paths)
    if base_weights is None:
        inner = attention_weights(survey, [edit.module for edit in edits])
        finder = ByName(survey, packed_layers(survey), inner)
        return Graph(model, survey, finder, shown, None)
    file = Path(base_weights)
    found = find_by_value(model, survey, read_state_dict(file), file.name)
    return Graph(model, survey, found, shown, base_weights)


def map_edits(trained: Trained, graph: Graph) -> tuple[list[Edit], Mapping[str, str]]:
    """Map the modules of all edits; a head that the graph does not have is left out.

    So are modules without effect, and those that are allowed to be missing.

    Raises:
        CheckpointError: If the graph lacks others, or nothing is left.
    """
    trained = _own_part(spell_out(trained, [graph]), graph)
    edits, finder = trained.edits, graph.finder
    known = finder.known()
    parts = {edit.module: unpacked(edit.module, known) for edit in edits}
    wanted = list(dict.fromkeys(part for edit in edits for part in parts[edit.module]))
    head = {key.rpartition(".")[0] for key in trained.head}
    spare = may_be_missing(wanted, trained.allow_missing)
    optional = head | spare.keys()
    names = _mapped(trained, graph, wanted, known, optional)
    if not set(wanted) <= names.keys() and (stored := finder.stored()):
        known = [*known, *stored]
        names = _mapped(trained, graph, wanted, known, optional)
    missing = [module for module in spare if module not in names and module not in head]
    refuse_idle(trained.allow_missing, missing, wanted)
    if len(missing) < len(wanted):
        tell_missing(spare, missing)
        missing += _head_left_out(trained, graph, wanted, names, head)
        edits = [edit for edit in edits if set(parts[edit.module]).isdisjoint(missing)]
        wanted = [module for module in wanted if module not in missing]
    label = finder.label if isinstance(finder, ByValue) else ""
    if not trained.part:
        refuse_other_part(
            wanted, names, known, kind=trained.kind, shown=graph.shown, file=label
        )
    refuse_unmapped(wanted, names, known, label)
    edits = with_effect(edits, names, finder)
    return list(apart(edits, parts, names, finder)), names


def _head_left_out(
    trained: Trained,
    graph: Graph,
    wanted: Sequence[str],
    names: Mapping[str, str],
    head: Collection[str],
) -> list[str]:
    """The modules of a head that the graph does not have, with a warning."""
    left_out = sorted(set(head) - set(names))
    if isinstance(graph.finder, ByValue):
        lacks = graph.finder.lacks_head(trained.head, names)
        left_out = sorted(head) if lacks else []
    if not left_out or not any(one in names for one in wanted if one not in head):
        return []
    _log.warning(
        "left out the head saved beside the adapter: the graph has no %s", ", ".join(left_out)
    )
    return left_out


def names_in(trained: Trained, graph: Graph, wanted: Sequence[str]) -> dict[str, str]:
    """The graph's path for each of some modules that it has; it may lack any of them."""
    known = graph.finder.known()
    names = _mapped(trained, graph, wanted, known, wanted)
    if len(names) < len(wanted) and (stored := graph.finder.stored()):
        names = _mapped(trained, graph, wanted, [*known, *stored], wanted)
    return names


def _mapped(
    trained: Trained,
    graph: Graph,
    wanted: Sequence[str],
    known: Collection[str],
    head: Collection[str],
) -> dict[str, str]:
    """Map modules as they are called, or as they are called inside the part that is meant."""
    kind, shown = trained.kind, graph.shown
    names = map_modules(wanted, known, optional=head, kind=kind, shown=shown)
    if trained.part and not set(wanted) <= names.keys():
        inside = map_part(trained.part, wanted, known, optional=head, kind=kind, shown=shown)
        names = max(names, inside, key=len)
    return names


def apart(
    edits: Iterable[Edit],
    parts: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    finder: ByName | ByValue,
) -> Iterator[Edit]:
    """Cut edits of packed modules into those of the modules that the graph has instead.

    Updates that depend on the sizes of their modules are made first.
    """
    for edit in sized(edits, parts, names, finder):
        yield from _apart(edit, parts, names, finder)


def _apart(
    edit: Edit,
    parts: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    finder: ByName | ByValue,
) -> Iterator[Edit]:
    """Cut an edit into those of the modules that the graph has in place of a packed one."""
    if parts[edit.module] == (edit.module,):
        yield edit
        return
    calls = {module: finder.calls(names[module]) for module in parts[edit.module]}
    for module, found in calls.items():
        if not found:
            raise finder.missing(names[module])
    yield from unpack(edit, {module: found[0].sizes[1] for module, found in calls.items()})
