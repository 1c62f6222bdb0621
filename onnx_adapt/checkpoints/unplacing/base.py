"""The base of a model with slots, and which of its modules the slots are on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np

from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS

Parts = Mapping[str, Array]
"""The weights of a slot by part, in float64."""

Found = TypeVar("Found")


def layer_kind(call: LayerCall) -> str:
    """What kind of layer a call is of, as libraries distinguish them."""
    operator = OPERATORS[call.node.op_type]
    if operator.embeds:
        return "embedding"
    return "conv" if operator.convolves else "linear"


def weighing_parts(slot: Slot, weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights of a slot in float64, without optional parts that change nothing.

    The gain is multiplied into `up` and `up_bias`, as checkpoints are read.
    """
    wide = {part: np.asarray(weights[part], np.float64) for part in slot.parts}
    gain = wide.pop("gain", None)
    if gain is not None:
        wide["up"] = wide["up"] * (gain if slot.axis == -1 else gain.reshape(-1, 1))
        if "up_bias" in wide:
            wide["up_bias"] = wide["up_bias"] * gain.reshape(-1)
    return {
        part: value
        for part, value in wide.items()
        if not PARTS[part].optional or np.any(value != PARTS[part].off)
    }


_ENDING = re.compile(r"(\.(residual|norm|input|coupling|bias))?(\.\d+)?$")
"""What is put behind a module's path in the name of a slot on it."""


def find_module(
    graph: Graph, slot: Slot, found: Callable[[str], Found | None]
) -> tuple[str, Found] | None:
    """The first module of a graph for which something is found; likely ones come first.

    Args:
        graph: The graph without slots.
        slot: The slot, whose name and record tell the likely modules.
        found: What is looked for, by the path of a module.
    """
    for module in _likely(graph, slot):
        try:
            value = found(module)
        except CheckpointError:
            continue  # a module that takes no adapter is not the one
        if value is not None:
            return module, value
    return None


def _likely(graph: Graph, slot: Slot) -> Iterator[str]:
    known = graph.finder.known()
    named = (slot.name, _ENDING.sub("", slot.name), slot.module)
    paths = {path: None for path in named if path}
    yield from dict.fromkeys([*paths, *known, *graph.finder.stored()])


def no_module(slot: Slot) -> CheckpointError:
    """The error for a slot whose tensors are not those around a module of PyTorch."""
    return CheckpointError(
        f"slot {slot.name!r} is at {slot.tensor!r}, which is no output of a module that the "
        "graph knows by its path, so no library has a place for it",
        hint="give the base's weights with --base-weights if the graph lost its names",
    )
