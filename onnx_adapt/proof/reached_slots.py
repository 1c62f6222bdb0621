"""Which slots run with given inputs; a slot in a branch that is not taken is not proven."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_adapt.dtypes import ELEM_TYPES
from onnx_adapt.errors import UnprovableError
from onnx_adapt.graph.index import index_model, read_type
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.feeds import Feeds, inputs_hint, required_inputs
from onnx_adapt.proof.runner import Runner
from onnx_adapt.proof.taps import Tapper
from onnx_adapt.session.batches import find_batch
from onnx_adapt.slot.manifest import Slot


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
        slot.name: tapper.tap(slot.graph, slot.inner, ELEM_TYPES[slot.dtype])
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


def feeds_with_rows(base: Model, feeds: Sequence[Feeds]) -> list[Feeds]:
    """The inputs that are not an empty batch.

    Raises:
        UnprovableError: If all are.
    """
    inputs, outputs = (
        {value.name: read_type(value).shape or () for value in values}
        for values in (required_inputs(base.proto), base.proto.graph.output)
    )
    axes = find_batch(inputs, outputs, None).inputs
    filled = []
    for item in feeds:
        batched = {name: axis for name, axis in axes.items() if axis is not None}
        sizes = {np.shape(item[n])[axis] for n, axis in batched.items() if n in item}
        if sizes != {0}:
            filled.append(item)
    if feeds and not filled:
        raise UnprovableError(
            "the inputs are an empty batch, in which no slot computes anything",
            hint="give inputs of one row at least; in Python "
            "onnx_adapt.verify(base, adapted, inputs=[empty, others]) proves both",
        )
    return filled
