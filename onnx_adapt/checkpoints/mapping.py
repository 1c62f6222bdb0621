"""Map the modules of a checkpoint to the modules of one graph."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_adapt.checkpoints.edits import Edit, Reweight
from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.by_value import ByValue, find_by_value
from onnx_adapt.checkpoints.modules.inner_weights import attention_weights
from onnx_adapt.checkpoints.modules.model_parts import parts_shown
from onnx_adapt.checkpoints.modules.names import (
    map_modules,
    refuse_other_part,
    refuse_unmapped,
)
from onnx_adapt.checkpoints.modules.packed import packed_layers, unpack, unpacked
from onnx_adapt.checkpoints.modules.parameters import refuse_inner_experts
from onnx_adapt.checkpoints.modules.selection import Selection, map_part
from onnx_adapt.checkpoints.placing.reweighting import cut_reweight
from onnx_adapt.checkpoints.readers.saved import Saved, read_state_dict
from onnx_adapt.checkpoints.readers.table import read_edits, read_saved
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.sites import Survey, survey_model
from onnx_adapt.model.file import Model

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint as it was read, with the modules that are wanted of it.

    Attributes:
        saved: The checkpoint, as it was saved.
        edits: What it asks for, by the modules' new names.
        part: The path that all of them are under, or ''.
        head: Weights of a head saved beside the adapter, by key.
    """

    saved: Saved
    edits: list[Edit]
    part: str
    head: Mapping[str, Array]

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
    return Trained(saved, selection.edits(edits), selection.part, selection.head(saved.head))


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
    """Map the modules of all edits; a head that the graph does not have is left out."""
    edits, finder = trained.edits, graph.finder
    known = finder.known()
    parts = {edit.module: unpacked(edit.module, known) for edit in edits}
    wanted = list(dict.fromkeys(part for edit in edits for part in parts[edit.module]))
    head = {key.rpartition(".")[0] for key in trained.head}
    names = _mapped(trained, graph, wanted, known, head)
    if not set(wanted) <= names.keys() and (stored := finder.stored()):
        known = [*known, *stored]
        names = _mapped(trained, graph, wanted, known, head)
    left_out = sorted(head - set(names))
    if isinstance(finder, ByValue):
        left_out = sorted(head) if finder.lacks_head(trained.head, names) else []
    if left_out and any(module in names for module in wanted if module not in head):
        _log.warning(
            "left out the head saved beside the adapter: the graph has no %s",
            ", ".join(left_out),
        )
        edits = [edit for edit in edits if edit.module not in left_out]
        wanted = [module for module in wanted if module not in left_out]
    label = finder.label if isinstance(finder, ByValue) else ""
    if not trained.part:
        refuse_other_part(
            wanted, names, known, kind=trained.kind, shown=graph.shown, file=label
        )
    refuse_unmapped(wanted, names, known, label)
    return list(apart(edits, parts, names, graph)), names


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
    graph: Graph,
) -> Iterator[Edit]:
    """Cut edits of packed modules into those of the modules that the graph has instead."""
    for edit in edits:
        yield from _apart(edit, parts, names, graph)


def _apart(
    edit: Edit,
    parts: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    graph: Graph,
) -> Iterator[Edit]:
    """Cut an edit into those of the modules that the graph has in place of a packed one."""
    if parts[edit.module] == (edit.module,):
        yield edit
        return
    calls = {module: graph.finder.calls(names[module]) for module in parts[edit.module]}
    for module, found in calls.items():
        if not found:
            raise graph.finder.missing(names[module])
    if isinstance(edit, Reweight):
        first = {module: found[0] for module, found in calls.items()}
        yield from cut_reweight(graph.survey, edit, first)
        return
    yield from unpack(edit, {module: found[0].sizes[1] for module, found in calls.items()})
