"""Turn an adapter for the slots of a graph back into edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement, SlotEdit
from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.checkpoints.unplacing.base import Parts, weighing_parts
from onnx_adapt.checkpoints.unplacing.bottlenecks import bottleneck_edits, coupling_edits
from onnx_adapt.checkpoints.unplacing.layers import is_low_rank, layer_edits
from onnx_adapt.checkpoints.unplacing.on_weights import weight_edits
from onnx_adapt.checkpoints.unplacing.replaced import replaced_edits
from onnx_adapt.errors import CheckpointError
from onnx_adapt.slot.manifest import Manifest, Slot
from onnx_adapt.slot.parts import PARTS

_EditsOf = Callable[[Graph, Slot, Parts], Iterator[SlotEdit]]


def unplace(graph: Graph, manifest: Manifest, adapter: Adapter) -> list[SlotEdit]:
    """Find out what an adapter asks for, by the modules of PyTorch that its slots are on.

    Args:
        graph: The base of the model: without slots, and with what is written out for them.
        manifest: The model's record.
        adapter: An adapter that fits the model.

    Returns:
        The edits in the order of the slots. The slots that an adapter leaves off have none.

    Raises:
        CheckpointError: If a slot is not what a checkpoint asks for, and why.
    """
    found: dict[str, SlotEdit] = {}
    calls: dict[str, set[str]] = {}
    for slot in manifest.slots:
        if slot.owner not in adapter.weights:
            continue
        parts = weighing_parts(slot, adapter.weights[slot.owner])
        for item in _edits_of(slot, parts)(graph, slot, parts):
            module = item.edit.module
            _refuse_other(found.setdefault(module, item), item)
            calls.setdefault(module, set()).add(f"{slot.graph}:{slot.tensor}")
    for module, tensors in calls.items():
        _refuse_uncovered(graph, found[module], tensors)
    records = {weight.name: weight for weight in manifest.weights}
    return [*found.values(), *replaced_edits(graph, records, adapter.replaced)]


def _edits_of(slot: Slot, parts: Parts) -> _EditsOf:
    """What turns a slot into edits, by what it computes."""
    if any(PARTS[part].coupling for part in parts):
        return coupling_edits
    if slot.on_weight:
        return weight_edits
    return layer_edits if is_low_rank(slot, parts) else bottleneck_edits


def _refuse_other(known: SlotEdit, item: SlotEdit) -> None:
    """Refuse two different edits of one module, which no library has in one adapter."""
    if known is item or (type(known.edit) is type(item.edit) and _same(known.edit, item.edit)):
        return
    raise CheckpointError(
        f"slots {known.slot!r} and {item.slot!r} both change module {item.edit.module!r}; an "
        "adapter of a library has one change for each module",
        hint="are they of two adapters that are stacked? convert each by itself",
    )


def _same(one: Edit, other: Edit) -> bool:
    """Whether two edits of one module are equal, up to rounding."""
    arrays = [
        {name: getattr(edit, name) for name in edit.__dataclass_fields__}
        for edit in (one, other)
    ]
    return all(_close(value, arrays[1][name]) for name, value in arrays[0].items())


def _close(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=1e-7)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[k], other[k]) for k in one)
    return type(one) is type(other) and (not isinstance(one, str | float) or one == other)


def _refuse_uncovered(graph: Graph, item: SlotEdit, tensors: set[str]) -> None:
    """Refuse a module that runs several times, with slots on some of its calls only."""
    module = item.edit.module
    if isinstance(item.edit, LowRank | Replacement) and item.layer:
        calls = graph.finder.calls(module)
        missing = [
            call.output
            for call in calls
            if tensors.isdisjoint(
                f"{call.view.scope.path}:{t}" for t in (call.raw, call.output)
            )
        ]
        if missing and len(missing) < len(calls):
            raise CheckpointError(
                f"module {module!r} also makes {missing[0]!r}, where no slot is; a library's "
                "adapter changes every call of a module",
                hint="insert slots at all of its calls",
            )
