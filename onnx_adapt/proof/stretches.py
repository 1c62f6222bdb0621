"""The stretches of a model between its slots and the nearest outputs behind them.

Whether a slot moves an output shows already where the first output behind it is computed. The
nodes up to there make a small model of their own, a stretch. It reads what the whole model
computed with the slots off, and gives the same values as the whole model would.

Example: a decoder with 24 layers has the cache of each layer among its outputs. The slots in
layer 3 behind its attention first meet the cache of layer 4, so their stretch is one layer
long, and runs in a twentieth of the time of the model.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import Providers
from onnx_adapt.proof.compare import movement
from onnx_adapt.proof.runner import Runner, Values
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.places import owners

_WORTH = 2
"""How many times fewer nodes must run, in all, than if the whole model ran for each slot."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part of a model from some slots to the first output behind all of them.

    Attributes:
        slots: The slots, each with weights of its own.
        nodes: The positions of its nodes in the main graph.
        reads: The tensors that it reads and that the model computes or is fed.
        outputs: The outputs of the model that its last node makes.
    """

    slots: tuple[Slot, ...]
    nodes: tuple[int, ...]
    reads: tuple[str, ...]
    outputs: tuple[str, ...]


def find_stretches(
    proto: onnx.ModelProto, slots: Sequence[Slot], outputs: Collection[str]
) -> tuple[Stretch, ...]:
    """Find the stretches that together are much cheaper to run than the whole model.

    Args:
        proto: A model with all slots swappable.
        slots: Its slots.
        outputs: The outputs of the model that count.

    Returns:
        The stretches, in order; none if running them would not pay. A slot with no output
        behind it is in none of them.
    """
    nodes = list(proto.graph.node)
    reads = [[*filter(None, node.input), *walk.captured(node)] for node in nodes]
    readers: dict[str, list[int]] = {}
    for place, names in enumerate(reads):
        for name in names:
            readers.setdefault(name, []).append(place)
    groups: dict[int, list[Slot]] = {}
    behind: dict[int, set[int]] = {}
    own = owners(slots)
    for slot in own:
        passed, last = _to_first_output(nodes, readers, slot, outputs)
        if last is not None:
            groups.setdefault(last, []).append(slot)
            behind.setdefault(last, set()).update(passed)
    known = {tensor.name for tensor in proto.graph.initializer}
    known |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    found = []
    for last, inside in groups.items():
        kept = _leading_to(last, nodes, reads, behind[last])
        made = {name for place in kept for name in nodes[place].output}
        needed = dict.fromkeys(name for place in kept for name in reads[place])
        rest = tuple(name for name in needed if name not in made and name not in known)
        ends = tuple(name for name in nodes[last].output if name in outputs)
        found.append(Stretch(tuple(inside), kept, rest, ends))
    work = sum((len(item.slots) + 1) * len(item.nodes) for item in found)
    whole = sum(len(item.slots) for item in found) * len(nodes)
    return tuple(found) if work * _WORTH <= whole else ()


def _to_first_output(
    nodes: Sequence[onnx.NodeProto],
    readers: Mapping[str, Sequence[int]],
    slot: Slot,
    outputs: Collection[str],
) -> tuple[set[int], int | None]:
    """The nodes behind a slot in order, up to the first that makes an output; None if none."""
    seen = {place for name in slot.inputs for place in readers.get(name, ())}
    waiting = sorted(seen)
    passed: set[int] = set()
    while waiting:
        place = heapq.heappop(waiting)
        passed.add(place)
        made = nodes[place].output
        if any(name in outputs for name in made):
            return passed, place
        for following in {i for name in made for i in readers.get(name, ())} - seen:
            seen.add(following)
            heapq.heappush(waiting, following)
    return passed, None


def _leading_to(
    last: int,
    nodes: Sequence[onnx.NodeProto],
    reads: Sequence[Sequence[str]],
    among: Collection[int],
) -> tuple[int, ...]:
    """The nodes among some that lead to the last one, in order."""
    makers = {name: place for place in among for name in nodes[place].output if name}
    kept, waiting = {last}, [last]
    while waiting:
        makes = {makers[name] for name in reads[waiting.pop()] if name in makers} - kept
        kept |= makes
        waiting.extend(makes)
    return tuple(sorted(kept))


def add_reads(proto: onnx.ModelProto, stretches: Sequence[Stretch]) -> None:
    """Make what stretches read outputs of the whole model, in place."""
    given = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    for name in dict.fromkeys(name for item in stretches for name in item.reads):
        if name not in given:
            proto.graph.output.add(name=name)  # ONNX Runtime finds its type


def computed_reads(proto: onnx.ModelProto, stretches: Sequence[Stretch]) -> list[str]:
    """What stretches read that the model computes."""
    fed = {value.name for value in proto.graph.input}
    names = dict.fromkeys(name for item in stretches for name in item.reads)
    return [name for name in names if name not in fed]


def movements(
    model: Model,
    stretch: Stretch,
    values: Values,
    weights: Callable[[Slot], Mapping[str, Array]],
    providers: Providers,
) -> Iterator[tuple[Slot, float]]:
    """How far each slot of a stretch alone moves its outputs, one slot after the other.

    Args:
        model: The model that it is a part of, with all slots off.
        stretch: The stretch.
        values: What the model was fed, and what it computed of what the stretch reads.
        weights: Called with a slot; what to feed so that it is on.
        providers: Where the stretch runs.

    Raises:
        RunError: If ONNX Runtime cannot run it by itself.
    """
    part = _cut_out(model, stretch, values)
    runner = Runner(part, providers, optimised=True, fuse_quantised=False)
    fed = {v.name: values[v.name] for v in part.proto.graph.input if v.name in values}
    still = runner.run(fed)
    for slot in stretch.slots:
        yield slot, movement(still, runner.run({**fed, **weights(slot)}))


def _cut_out(model: Model, stretch: Stretch, values: Values) -> Model:
    """A stretch as a model, whose inputs are what it reads and the weights of its slots."""
    whole = model.proto
    proto = onnx.ModelProto(ir_version=whole.ir_version)
    proto.opset_import.extend(whole.opset_import)
    proto.functions.extend(whole.functions)
    graph = proto.graph
    graph.name = "stretch"
    graph.node.extend(whole.graph.node[place] for place in stretch.nodes)
    read = {name for node in graph.node for name in (*node.input, *walk.captured(node))}
    graph.initializer.extend(t for t in whole.graph.initializer if t.name in read)
    graph.sparse_initializer.extend(
        t for t in whole.graph.sparse_initializer if t.values.name in read
    )
    # A weight that may be fed has a default as well, whether of a slot or of the base.
    fed = {name for slot in stretch.slots for name in slot.inputs} | values.keys()
    stored = {tensor.name for tensor in graph.initializer}
    graph.input.extend(v for v in whole.graph.input if v.name in fed & stored)
    for name in stretch.reads:
        value = np.asarray(values[name])
        elem_type = helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(helper.make_tensor_value_info(name, elem_type, [None] * value.ndim))
    for name in stretch.outputs:
        graph.output.add(name=name)
    return replace(model, proto=proto)
