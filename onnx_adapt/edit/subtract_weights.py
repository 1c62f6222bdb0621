"""Subtract two files of weights, and place the difference in the graph of the base.

The modules are found as those of a trained checkpoint are. A matrix of a layer becomes LoRA,
every other tensor is replaced. The files must have the same keys and shapes. An embedding that
the graph uses as its head as well, and the files have once, is changed at both places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, Replacement
from onnx_adapt.checkpoints.load import Checkpoint, place_edits
from onnx_adapt.checkpoints.mapping import Graph, Trained, find_graph, map_edits
from onnx_adapt.checkpoints.modules.weights import read_matrix
from onnx_adapt.checkpoints.readers.saved import Saved, read_state_dict
from onnx_adapt.dtypes import DTYPES, FLOATS, Array
from onnx_adapt.edit.differences import Wanted, check_numbers, low_rank, refuse_wide
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.model.file import Model


@dataclass(slots=True)
class Subtraction:
    """What is being subtracted, and what has come of it.

    Attributes:
        graph: The graph that the difference is placed in.
        names: The graph's path for each module.
        base: The base's weights by key.
        wanted: How much of each difference is wanted.
        losses: What each LoRA loses, by the graph's path of its module.
        widest: The smaller width of the widest matrix that changed.
    """

    graph: Graph
    names: dict[str, str]
    base: Mapping[str, Array]
    wanted: Wanted
    losses: dict[str, float]
    widest: int = 0


def subtract_weights(
    model: Model, base_file: Path, tuned_file: Path, wanted: Wanted, name: str
) -> Checkpoint:
    """The adapter that makes the tuned model of the base.

    Raises:
        CheckpointError: If the files are not of one model, something changed that is not in
            the graph, or nothing changed.
    """
    base, tuned = read_state_dict(base_file), read_state_dict(tuned_file)
    changed = _changed(base, tuned, base_file.name, tuned_file.name)
    whole: list[Edit] = [
        Replacement(module, parameter, tuned[key])
        for key in changed
        for module, _, parameter in [key.rpartition(".")]
    ]
    saved = Saved(tuned_file, "peft", {}, {key: tuned[key] for key in changed})
    trained = Trained(saved, whole, "", {})
    graph, edits, names = _mapped(model, trained, base_file)
    work = Subtraction(graph, dict(names), base, wanted, {})
    made = [one for edit in edits for one in _edits(work, edit)]
    refuse_wide(wanted, work.widest)
    label = name or tuned_file.stem
    checkpoint = place_edits(trained, graph, made, work.names, name=label)
    return replace(checkpoint, losses=work.losses)


def _changed(
    base: Mapping[str, Array], tuned: Mapping[str, Array], base_name: str, tuned_name: str
) -> list[str]:
    """The keys whose values differ.

    Raises:
        CheckpointError: If keys or shapes differ, a value is no float, or nothing changed.
    """
    for one, other, label, lacking in (
        (base, tuned, base_name, tuned_name),
        (tuned, base, tuned_name, base_name),
    ):
        if alone := [key for key in one if key not in other]:
            raise CheckpointError(
                f"{label} has {alone[0]!r}, which {lacking} lacks",
                hint="are they of one model? save both in the same way",
            )
    changed = []
    for key, value in tuned.items():
        if value.shape != base[key].shape:
            more = (
                value.shape[:1] > base[key].shape[:1]
                and value.shape[1:] == base[key].shape[1:]
            )
            raise CheckpointError(
                f"{key!r} has shape {list(base[key].shape)} in {base_name} and "
                f"{list(value.shape)} in {tuned_name}",
                hint=f"resize the base by {len(value) - len(base[key])} rows and export again"
                if more
                else "are they of one model?",
            )
        if np.array_equal(value.astype(np.float64), base[key].astype(np.float64)):
            continue
        if value.dtype not in set(DTYPES.values()):
            raise CheckpointError(f"{key!r} differs, and it holds no floats")
        check_numbers(key, value)
        changed.append(key)
    if not changed:
        raise CheckpointError(
            f"{tuned_name} has the weights of {base_name}: there is nothing to subtract",
            hint="was the base given twice?",
        )
    return changed


def _mapped(
    model: Model, trained: Trained, base_file: Path
) -> tuple[Graph, list[Edit], Mapping[str, str]]:
    """The graph with its modules found: by their names, or else by the base's values."""
    try:
        graph = find_graph(model, None, trained.edits)
        return (graph, *map_edits(trained, graph))
    except CheckpointError as named:
        try:
            graph = find_graph(model, base_file, trained.edits)
            return (graph, *map_edits(trained, graph))
        except CheckpointError as valued:
            raise CheckpointError(
                f"{named.message}; and by the values of the base's weights: {valued.message}",
                hint="two .onnx files of one graph can be subtracted whatever its names are",
            ) from valued


def _edits(work: Subtraction, edit: Edit) -> Iterator[Edit]:
    """LoRA where a weight is the matrix of a layer; else the replacement that it is."""
    assert isinstance(edit, Replacement)
    key = f"{edit.module}.{edit.parameter}"
    calls = (
        work.graph.finder.calls(work.names[edit.module]) if edit.parameter == "weight" else []
    )
    if not calls or key not in work.base:
        yield edit
        return
    call = calls[0]
    before, after = (v.astype(np.float64) for v in (work.base[key], edit.value))
    if _is_turned(work.graph.model, call, before):
        before, after = before.T, after.T
    if not _is_matrix(call, after):
        yield Replacement(edit.module, "weight", after)
        return
    modules = [edit.module, *_tied(work, call, before)]
    embeds = OPERATORS[call.node.op_type].embeds
    for i, module in enumerate(modules):
        difference = after - before
        difference = difference.T if embeds and i == 0 else difference
        found = low_rank(module, difference, work.wanted, _dtype(call))
        work.widest = max(work.widest, min(difference.shape[:2]))
        if found is None:
            yield Replacement(module, "weight", after)
        else:
            yield found[0]
            work.losses[work.names[module]] = found[1]


def _is_matrix(call: LayerCall, value: Array) -> bool:
    """Whether LoRA on a call is exactly a change of its weight."""
    convolves = OPERATORS[call.node.op_type].convolves
    if not convolves:
        return value.ndim == 2 and not call.activation
    lists = {item.name: list(item.ints) for item in call.node.attribute}
    group = next((item.i for item in call.node.attribute if item.name == "group"), 1)
    return group == 1 and not any(step != 1 for step in lists.get("dilations", ()))


def _dtype(call: LayerCall) -> str:
    weight = find_weight(call.view, call.weight)
    return FLOATS.get(weight.elem_type if weight else 0, "float32")


def _is_turned(model: Model, call: LayerCall, value: Array) -> bool:
    """Whether a weight is saved as `(in, out)`, the transpose of the graph's, as by Conv1D."""
    if value.ndim != 2:
        return False
    shown = read_matrix(model, call)
    if value.shape != shown.shape:
        return bool(value.T.shape == shown.shape)
    if value.shape[0] != value.shape[1]:
        return False
    turned, straight = (float(np.linalg.norm(v - shown)) for v in (value.T, value))
    return turned < straight


def _tied(work: Subtraction, call: LayerCall, before: Array) -> Iterator[str]:
    """The modules that use the matrix of an embedding as theirs and are not edited already.

    The head of GPT-2 is the embedding, and files of its weights have it once.
    """
    if not OPERATORS[call.node.op_type].embeds:
        return
    survey = work.graph.survey
    edited = set(work.names.values())
    rounded = before.astype(DTYPES[_dtype(call)])
    for path, view in survey.index.views.items():
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True):
            other = survey.call(view, node) if is_module_call(view, node) else None
            if other is None or other.sizes != before.shape[::-1] or scope in edited:
                continue
            if OPERATORS[node.op_type].embeds or _has_own(work.base, scope):
                continue
            shown = read_matrix(work.graph.model, other)
            if not np.array_equal(shown.astype(rounded.dtype), rounded):
                continue
            if scope is None:
                raise CheckpointError(
                    f"node {other.label!r} uses the embedding as its weight, and the graph "
                    "does not tell which module it is",
                    hint="export the tuned model in the same way, and subtract the two .onnx",
                )
            edited.add(scope)
            work.names[scope] = scope
            yield scope


def _has_own(base: Mapping[str, Array], scope: str | None) -> bool:
    """Whether the files have a weight of its own for a module of the graph."""
    wanted = f".{scope}.weight"
    return any(f".{key}".endswith(wanted) or wanted.endswith(f".{key}") for key in base)
