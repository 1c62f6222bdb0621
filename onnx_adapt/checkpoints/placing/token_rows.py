"""Place trained rows of an embedding, on it and on the layers that have its weight.

An example. The rows of tokens 3 and 5 of an embedding `(vocabulary, width)` were trained. Its
slot has `table` `(vocabulary, 2)`, which is one at `[3, 0]` and `[5, 1]` and zero elsewhere,
and `up` `(2, width)`, the new rows minus those that the graph has. Other tokens get zero. In
a head with the same weight the two are the other way round: `down` `(width, 2)` has the
differences, and `up` `(2, vocabulary)` adds what they make to the logits of tokens 3 and 5.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from onnx_adapt.checkpoints.edits import LowRank, TokenRows
from onnx_adapt.checkpoints.modules.weights import read_bias, read_matrix
from onnx_adapt.checkpoints.placing.low_rank import place_low_rank
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.model.tensors import read_tensor

_log = logging.getLogger(__name__)

_COMPARED = 64
"""How many rows are compared to tell whether two weights are one."""
_ROUNDING, _QUANTISATION = 2e-3, 0.2
"""How far apart equal weights may be, in parts of their norm; others are about 1.4."""


def place_token_rows(placement: Placement, edit: TokenRows) -> None:
    """Make the slots that trained rows ask for.

    Raises:
        CheckpointError: If the rows do not fit, or the checkpoint was trained on another
            table than the graph has.
    """
    calls = placement.calls(edit.module)
    vocabulary, width = _table_shape(calls[0])
    _check_size(edit, vocabulary, width)
    _refuse_other_table(placement, edit, calls[0])
    old = _rows(placement, calls[0], edit.tokens)
    for call in calls:
        _place_rows(placement, edit, call, edit.module, old)
    for call, path in _followers(placement, edit, calls):
        _log.warning(
            "%s has the weight of %s, so the trained rows are its own as well",
            *(path or call.label, edit.module),
        )
        _refuse_bias(placement, call, path)
        placement.names = {path: path, **placement.names}
        _place_rows(placement, edit, call, path, _rows(placement, call, edit.tokens))


def _place_rows(
    placement: Placement, edit: TokenRows, call: LayerCall, module: str, old: Array
) -> None:
    """Make one slot: differences and the places of their tokens."""
    change = edit.rows - old
    places = np.zeros((len(edit.tokens), _table_shape(call)[0]))
    places[range(len(edit.tokens)), edit.tokens] = 1
    if OPERATORS[call.node.op_type].embeds:
        low_rank = LowRank(module, places, change.T, 1.0)
    else:
        low_rank = LowRank(module, change, places.T, 1.0)
    place_low_rank(placement, low_rank, call)


def _table_shape(call: LayerCall) -> tuple[int, int]:
    """The size of the vocabulary and the width of an embedding, or of a head."""
    reads, makes = call.sizes
    return (reads, makes) if OPERATORS[call.node.op_type].embeds else (makes, reads)


def _check_size(edit: TokenRows, vocabulary: int, width: int) -> None:
    lacking = max(edit.tokens) + 1 - vocabulary
    saved = edit.table
    if lacking > 0 or (saved is not None and len(saved) > vocabulary):
        lacking = max(lacking, 0 if saved is None else len(saved) - vocabulary)
        raise CheckpointError(
            f"module {edit.module!r}: the adapter is for a vocabulary of {lacking} more "
            f"tokens than the {vocabulary} of the graph",
            hint=f"resize the base by {lacking} rows in PyTorch "
            "(resize_token_embeddings) and export it again",
        )
    if edit.rows.shape[1] != width or (saved is not None and saved.shape[1:] != (width,)):
        raise CheckpointError(
            f"module {edit.module!r}: the trained rows have {edit.rows.shape[1]} numbers; "
            f"those of the graph have {width}",
            hint="is it an adapter for another size of this model?",
        )


def _rows(placement: Placement, call: LayerCall, tokens: Sequence[int]) -> Array:
    """Read some rows of a table `(vocabulary, width)`; an embedding's own is not copied."""
    stored = call.view.constant(call.weight)
    embeds = OPERATORS[call.node.op_type].embeds
    if embeds and stored is not None and stored.data_type in FLOATS:
        table = read_tensor(placement.model, stored)
    else:
        table = read_matrix(placement.model, call)
    return np.asarray(table[list(tokens)], np.float64)


def _followers(
    placement: Placement, edit: TokenRows, calls: Sequence[LayerCall]
) -> list[tuple[LayerCall, str]]:
    """The layers that get an embedding's rows with it, each with its module or ''.

    PEFT trains tied layers together, unless they were given other tokens each. Where it saved
    the rows of several, each has its own, and the first leads those that have none.
    """
    if not OPERATORS[calls[0].node.op_type].embeds:
        return []
    others = {placement.names.get(name, name): name for name in edit.others}
    twins = list(_twins(placement, calls))
    saved = [others[path] for _, path in twins if path in others]
    if any(edit.others[name] != edit.tokens or name < edit.module for name in saved):
        return []
    return [(call, path) for call, path in twins if path not in others]


def _twins(
    placement: Placement, calls: Sequence[LayerCall]
) -> Iterator[tuple[LayerCall, str]]:
    """The other layers that have the weight of an embedding, each with its module or ''.

    It may be one tensor of the graph, a copy or a transpose, or quantised apart.
    """
    first, survey = calls[0], placement.survey
    shape, own = _table_shape(first), [call.node for call in calls]
    for path, view in survey.index.views.items():
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True):
            if not is_module_call(view, node) or any(node is known for known in own):
                continue
            call = survey.call(view, node)
            if call is None or call.span is not None or _table_shape(call) != shape:
                continue
            if _is_one_weight(placement, first, call):
                yield call, scope or ""


def _refuse_other_table(placement: Placement, edit: TokenRows, call: LayerCall) -> None:
    """Refuse a checkpoint whose own copy of the table is not what the graph has."""
    if edit.table is None:
        return
    places = _sample(len(edit.table))
    if not _are_equal(_rows(placement, call, places), edit.table[places], _QUANTISATION):
        raise CheckpointError(
            f"module {edit.module!r}: the checkpoint has the base's weight too, and it is not "
            "that of the graph",
            hint="export the model that the adapter was trained on",
        )


def _is_one_weight(placement: Placement, one: LayerCall, other: LayerCall) -> bool:
    """Whether two layers have the same weight, up to rounding or what quantisation does."""
    stored = [find_weight(call.view, call.weight) for call in (one, other)]
    if all(stored) and len({weight.tensor.name for weight in stored if weight}) == 1:
        return True
    floats = all(weight and weight.elem_type in FLOATS for weight in stored)
    places = _sample(_table_shape(one)[0])
    ours, theirs = (_rows(placement, call, places) for call in (one, other))
    return _are_equal(ours, theirs, _ROUNDING if floats else _QUANTISATION)


def _sample(rows: int) -> list[int]:
    return [int(row) for row in np.unique(np.linspace(0, rows - 1, _COMPARED, dtype=int))]


def _are_equal(one: Array, other: Array, tolerance: float) -> bool:
    size = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
    return bool(np.linalg.norm(one - other) <= tolerance * size)


def _refuse_bias(placement: Placement, call: LayerCall, module: str) -> None:
    """Refuse a tied head with a bias: PEFT leaves it out in training, and not in merging."""
    if call.output != call.raw or read_bias(placement.model, call) is not None:
        raise CheckpointError(
            f"head {module or call.label!r} has the weight of the trained embedding, and "
            "a bias that PEFT leaves out while the adapter is on: it was trained without",
            hint="merge the adapter in PyTorch (merge_and_unload) and export again",
        )
