"""Which slots run with given inputs; a slot in a branch that is not taken is not proven."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_adapt.dtypes import FLOATS
from onnx_adapt.errors import UnprovableError
from onnx_adapt.graph.index import index_model
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.feeds import Feeds, inputs_hint, required_inputs
from onnx_adapt.proof.runner import Runner
from onnx_adapt.proof.taps import Tapper
from onnx_adapt.slot.manifest import Slot

_ELEM_TYPES = {name: elem_type for elem_type, name in FLOATS.items()}


def unreached_slots(
    model: Model, slots: Sequence[Slot], feeds: Sequence[Feeds], providers: Providers
) -> list[str]:
    """Find the slots in bodies of If, Loop and Scan that ran with none of the inputs.

    Raises:
        UnprovableError: If no slot ran.
    """
    inside = [slot for slot in slots if slot.graph != "main"]
    if not inside:
        return []
    tapped = model.copy()
    tapper = Tapper(tapped.proto)
    taps = {
        slot.name: tapper.tap(slot.graph, slot.inner, _ELEM_TYPES[slot.dtype])
        for slot in inside
    }
    runner = Runner(tapped, providers, optimised=True)
    seen: set[str] = set()
    for item in feeds:
        got = runner.run(item)
        # A body that cannot be tapped, such as that of SequenceMap, counts as run.
        seen |= {name for name, tap in taps.items() if tap is None or tap.read(got)}
    left = [slot.name for slot in inside if slot.name not in seen]
    if len(left) == len(slots):
        index = index_model(model)
        names = [value.name for value in required_inputs(model.proto)]
        raise UnprovableError(
            f"slot {left[0]!r} is not reached with these inputs"
            + (f", nor are {len(left) - 1} others" if len(left) > 1 else ""),
            hint=inputs_hint({name: index.main.types[name] for name in names}),
        )
    return left
