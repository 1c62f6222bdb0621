"""Place an adapter where slots are already, and refuse what AdapterHub's Stack does otherwise.

The library's `Stack("a", "b")` runs the adapters of each place one after the other, and so do
slots in a row. Three things set them apart, by its `compose_stack` and the `pre_forward` and
`post_forward` of its layers (`adapters` 1.3):

* LoRA and IA3 are inside their layer, and bottlenecks behind it, in whichever order they are
  inserted. LoRA goes in front of the bottlenecks that are on the layer's output.
* A layer's second LoRA reads what the first one adds, and the first is not added itself:
  `y = W x + B2 A2 (B1 A1 x)`. Only vectors of IA3 multiply as slots do.
* A bottleneck's own settings say where the residual sum and the LayerNorm are. Those of the
  last adapter count, so that a place behind the sum cannot come before one in front of it, and
  a parallel adapter, which reads the residual input alone, drops what is made before it.

An example. The output Linear of a sub-layer makes `h`, the sum is `s = h + x`, and SeqBn of
AdapterHub sits behind the sum. With SeqBn `a` in the model, a second SeqBn `b` gives
`s + a(s) + b(s + a(s))` in the library as in slots. DoubleSeqBn `b` reads `h + a(s)` there, a
tensor that no graph has in which `a` is behind the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx_adapt.checkpoints.edits import Bottleneck
from onnx_adapt.checkpoints.modules.calls import block_output, norm_behind, residual_add
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.slot.manifest import Slot, read_manifest

if TYPE_CHECKING:
    from onnx_adapt.checkpoints.placing.placement import Placement

_log = logging.getLogger(__name__)

_LIBRARY = "adapterhub"
_STACK = "AdapterHub's Stack"
_ALONE = (
    "insert it into the model without this slot; a session can then choose between the two "
    "adapters at each run"
)
_FIRST = "insert this checkpoint first, and the other behind it"


def in_front_of(placement: Placement, call: LayerCall) -> str:
    """The tensor that a slot inside a layer makes where slots behind the layer are already.

    Returns:
        What the first slot behind the layer reads; '' if none is on the layer's output.
    """
    behind = (s for s in _on_layer(placement, call) if not _is_inside(placement, s, call))
    first = next(behind, None)
    return first.inner if first is not None else ""


def refuse_second_in_layer(placement: Placement, module: str, call: LayerCall) -> None:
    """Refuse LoRA of AdapterHub on a layer that has LoRA, IA3 or DoRA already.

    Raises:
        CheckpointError: If it has.
    """
    if placement.library != _LIBRARY:
        return
    for slot in _on_layer(placement, call):
        if _is_inside(placement, slot, call):
            raise _second_in_layer(module, slot)


def refuse_second_scaling(placement: Placement, module: str, call: LayerCall) -> None:
    """Refuse IA3 of AdapterHub on a layer that has LoRA or DoRA already.

    Raises:
        CheckpointError: If it has.
    """
    if placement.library != _LIBRARY:
        return
    for slot in _on_layer(placement, call):
        if _is_inside(placement, slot, call) and slot.parts != ("scale",):
            raise _second_in_layer(module, slot)


def refuse_second_on_weight(placement: Placement, module: str) -> None:
    """Refuse LoRA or IA3 of AdapterHub on a weight inside an operator that has a slot already.

    Raises:
        CheckpointError: If it has.
    """
    if placement.library != _LIBRARY:
        return
    for slot in _earlier(placement):
        if slot.on_weight and placement.names[module] in (slot.module, *slot.modules):
            raise _second_in_layer(module, slot)


def refuse_unlike_stack(placement: Placement, edit: Bottleneck, call: LayerCall) -> None:
    """Refuse a bottleneck where the library's Stack is not what slots in a row compute.

    Raises:
        CheckpointError: If an earlier bottleneck at this sub-layer makes a difference.
    """
    if placement.library != _LIBRARY or not _earlier(placement):
        return
    there = _around(placement, edit, call)
    for slot in (*there.before, *there.summed, *there.behind):
        if why := _difference(there, slot, edit):
            raise CheckpointError(
                f"module {edit.module!r} has the slot {slot.name!r} already. "
                f"In {_STACK} {why}",
                hint=_ALONE,
            )
    if there.summed and (edit.place, edit.reads) == ("residual", "target"):
        _log.warning(
            "module %r has the slot %r already; if that is AdapterPlus, AdapterHub's Stack "
            "adds the residual input once more, and the slots do not",
            *(edit.module, there.summed[-1].name),
        )


@dataclass(frozen=True, slots=True)
class _Around:
    """The slots that are around a sub-layer already.

    Attributes:
        residual: The residual input, or ''.
        before: The bottlenecks on the sub-layer's output, in front of the residual sum.
        summed: The slots on the sum.
        behind: The slots on what the LayerNorm behind the sum makes.
    """

    residual: str
    before: Sequence[Slot]
    summed: Sequence[Slot]
    behind: Sequence[Slot]


def _around(placement: Placement, edit: Bottleneck, call: LayerCall) -> _Around:
    """Find the slots that are around a sub-layer already."""
    earlier = _earlier(placement)
    survey, view, path = placement.survey, call.view, call.view.scope.path
    output = block_output(survey, call, placement.names[edit.module])
    total = residual = normed = ""
    try:
        total, residual = residual_add(survey, view, output)
        normed = survey.after_slots(path, norm_behind(survey, view, total))
    except CheckpointError:
        pass  # there is no sum, or no LayerNorm behind it, so there are no slots on it
    ends = dict.fromkeys((survey.after_slots(path, call.output), output))
    chained = [slot for end in ends for slot in _chain(earlier, path, end)]
    return _Around(
        residual,
        [slot for slot in chained if not _is_inside(placement, slot, call)],
        _chain(earlier, path, total),
        _chain(earlier, path, normed),
    )


def _difference(there: _Around, slot: Slot, edit: Bottleneck) -> str:
    """What the library's Stack does with an earlier slot and slots do not; '' if nothing."""
    name = repr(slot.name)
    if edit.reads == "residual_input":
        return (
            f"a parallel adapter reads the residual input alone, and what {name} makes is lost"
        )
    if slot in there.before and there.residual and slot.source == there.residual:
        return f"the sub-layer's output is lost behind the parallel adapter {name}"
    if slot in there.summed and edit.place == "output":
        return f"it reads what {name} makes before the residual sum, and the slot is behind it"
    if slot in there.behind:
        return f"a second residual sum and LayerNorm follow {name}, which the graph has not"
    return ""


def refuse_second_coupling(placement: Placement, module: str) -> None:
    """Refuse an invertible adapter of AdapterHub in a model that has slots already.

    Raises:
        CheckpointError: If it has.
    """
    earlier = _earlier(placement)
    if placement.library == _LIBRARY and earlier:
        raise CheckpointError(
            f"module {module!r}: {_STACK} applies the invertible adapter of its first adapter "
            f"alone, and the model has slots already ({earlier[0].name!r}, ...)",
            hint=_FIRST,
        )


def _second_in_layer(module: str, slot: Slot) -> CheckpointError:
    return CheckpointError(
        f"module {module!r} has the slot {slot.name!r} already. In {_STACK} the second LoRA "
        "of a layer reads what the first one adds, which is no longer added itself; slots "
        "in a row do not compute that",
        hint=_ALONE,
    )


def _earlier(placement: Placement) -> tuple[Slot, ...]:
    """The slots that the model had before this checkpoint."""
    manifest = read_manifest(placement.model.proto)
    return manifest.slots if manifest else ()


def _on_layer(placement: Placement, call: LayerCall) -> list[Slot]:
    """The slots on a layer's product and on its sum with the bias, from the innermost."""
    path, earlier = call.view.scope.path, _earlier(placement)
    if not earlier:
        return []
    ends = dict.fromkeys((placement.survey.after_slots(path, call.raw), call.output))
    return [slot for end in ends for slot in _chain(earlier, path, end)]


def _chain(slots: Sequence[Slot], graph: str, tensor: str) -> list[Slot]:
    """The slots that a tensor comes out of, from the innermost to the last."""
    makers = {(s.graph, s.output): s for s in slots if not s.on_edge}
    found: list[Slot] = []
    while (graph, tensor) in makers and len(found) < len(slots):
        found.append(makers[graph, tensor])
        tensor = found[-1].inner
    return found[::-1]


def _is_inside(placement: Placement, slot: Slot, call: LayerCall) -> bool:
    """Whether a slot on a layer's output belongs to the layer: LoRA, DoRA, IA3 or a bias."""
    path = call.view.scope.path
    reads = {call.source, placement.survey.after_slots(path, call.source)}
    return slot.source in reads or not {"down", "f_down"} & set(slot.parts)
