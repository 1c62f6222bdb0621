"""Recompute activations on the way back, so that they need not be kept until then."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.graph.gradients.tape import PREFIX
from onnx_adapt.model import walk
from onnx_adapt.ort import Providers
from onnx_adapt.training.data import Batch
from onnx_adapt.training.necks import SIZES, StepGraph, choose_necks, sizes_of
from onnx_adapt.training.step_model import StepModel

# Checkpointing (Chen et al., 2016): the forward graph is cut at necks, places that one tensor
# alone passes. Only these tensors are kept; on the way back each stretch between two of them
# is computed a second time, from the one that it begins with. An example with necks a and b:
#
#     a = f(x), t = g(a), b = h(t), loss = k(b)
#     b's gradient = gradient of k at b                    b was kept
#     a:again = a + 0 * (b's gradient)                     waits for the gradient of b
#     t:again = g(a:again)                                 t was forgotten, and is there again
#     a's gradient = gradients of h at t:again and of g at a
#
# ONNX Runtime runs a node as soon as it can, and merges nodes that compute the same. The sum
# with zero times a gradient keeps it from both. The zero is the sum of no numbers of it, so a
# gradient that is not finite changes nothing.

AGAIN = ":again"
"""How the names of tensors end that are computed a second time."""

_GRADIENTS = {"MatMul", "Gemm", "Mul", "Add", "Sum", "Sub", "Div"}
"""Operators whose outputs on the way back are floats."""

_RANDOM = {"RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform"}
_RANDOM |= {"Bernoulli", "Multinomial", "Dropout"}
"""Operators that may give something else the second time."""


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A step model that keeps less.

    Attributes:
        step: The step model.
        before: The bytes of activations of one batch that were kept for the way back.
        after: The most that are kept now.
    """

    step: StepModel
    before: int
    after: int


def recompute(
    step: StepModel,
    weights: Mapping[str, Array],
    batch: Batch,
    size: int,
    providers: Providers,
) -> Recomputed:
    """Let a step model compute activations a second time on the way back.

    Args:
        step: The step model.
        weights: The weights that train, by input.
        batch: Samples of the usual shape; one is run to see how large activations are.
        size: Samples in one run.
        providers: Where to run.

    Raises:
        TrainingError: If that would save no memory.
    """
    graph = StepGraph.of(step)
    few = batch.take(np.arange(step.rows or 1))
    sizes = sizes_of(step, graph, weights, few, providers)
    scale = size / few.size
    necks, after = choose_necks(graph, sizes)
    if not necks:
        raise TrainingError(
            f"to recompute activations of {step.model.label} would save no memory: there are "
            "few, or no place between the slots and the loss that a single tensor passes",
            hint="leave out --recompute; smaller batches that are accumulated take less",
        )
    model = replace(step.model, proto=_rewritten(step.model.proto, graph, necks))
    before = sum(sizes[name] for name in graph.roots())
    return Recomputed(replace(step, model=model), round(before * scale), round(after * scale))


def _rewritten(
    whole: onnx.ModelProto, graph: StepGraph, necks: Mapping[int, str]
) -> onnx.ModelProto:
    """A step model in which the stretches up to each neck are computed a second time."""
    proto = onnx.ModelProto()
    proto.CopyFrom(whole)
    backward = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.backward]
    inserted: dict[int, list[onnx.NodeProto]] = {}
    places = sorted(necks)
    kept = set(necks.values())
    for begin, end in zip((-1, *places), places, strict=False):
        stretch = graph.forward[begin + 1 : end + 1]
        if any(node.op_type in _RANDOM or any(walk.bodies(node)) for node in stretch):
            continue
        names = {name for node in stretch for name in node.output if name in graph.wanted}
        names -= kept
        readers = [
            place
            for place, node in enumerate(backward)
            if node.op_type not in SIZES and not names.isdisjoint(node.input)
        ]
        gate = _gate(backward, readers[0]) if readers else ""
        if not gate:
            continue
        for place in readers:
            node = backward[place]
            for position, name in enumerate(node.input):
                if name in names:
                    node.input[position] = name + AGAIN
        again = _Again(stretch, graph, gate, f"{PREFIX}{begin + 1}:")
        inserted.setdefault(readers[0], []).extend(again.nodes(names))
        proto.graph.initializer.extend(again.constants)
    ours = {node.name for node in graph.backward}
    forward = [node for node in whole.graph.node if node.name not in ours]
    del proto.graph.node[:]
    proto.graph.node.extend(forward)
    for place, node in enumerate(backward):
        proto.graph.node.extend([*inserted.get(place, ()), node])
    return proto


def _gate(backward: Sequence[onnx.NodeProto], place: int) -> str:
    """The last gradient that is there before a node of the way back."""
    known: set[str] = set()
    last = ""
    for node in backward[:place]:
        if node.op_type == "Expand" and not known:
            known.update(node.output)  # the gradient of the loss itself, which is 1
        elif node.op_type not in SIZES and not known.isdisjoint(node.input):
            known.update(node.output)
            last = node.output[0] if node.op_type in _GRADIENTS else last
    return last


@dataclass(slots=True)
class _Again:
    """The nodes of a stretch, to be computed a second time.

    Attributes:
        stretch: The nodes.
        graph: The graph that they are in.
        gate: The gradient that they wait for.
        prefix: What the names of new tensors begin with.
        constants: New initializers.
    """

    stretch: Sequence[onnx.NodeProto]
    graph: StepGraph
    gate: str
    prefix: str
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def nodes(self, names: Collection[str]) -> list[onnx.NodeProto]:
        """The nodes that compute some tensors of the stretch again, and those that wait."""
        made = {name for node in self.stretch for name in node.output if name}
        needed, chosen = set(names), []
        for node in reversed(self.stretch):
            if not needed.isdisjoint(node.output):
                chosen.append(node)
                needed.update(node.input)
        late: dict[str, str] = {}
        copies = []
        for node in reversed(chosen):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = next(filter(None, node.output)) + AGAIN
            for position, name in enumerate(node.input):
                if name in made:
                    copy.input[position] = name + AGAIN
                elif name in self.graph.made or (name and position == self._data(node, made)):
                    copy.input[position] = late.setdefault(name, f"{name}{self.prefix}late")
            for position, name in enumerate(node.output):
                copy.output[position] = name and name + AGAIN
            copies.append(copy)
        return [*self._waiting(late), *copies] if late else copies

    def _data(self, node: onnx.NodeProto, made: Collection[str]) -> int:
        """The input of a node that is to wait, if none of them is computed again; else -1."""
        if any(name in made or name in self.graph.made for name in node.input):
            return -1
        moving = [place for place, n in enumerate(node.input) if n in self.graph.moving]
        return moving[-1]

    def _waiting(self, late: Mapping[str, str]) -> list[onnx.NodeProto]:
        """The nodes that give tensors once the gate is there."""

        def node(op: str, *inputs: str, made: str) -> onnx.NodeProto:
            return helper.make_node(op, inputs, [made], name=made)

        start, all_of_it, flat, none, zero = (
            f"{self.prefix}{name}" for name in ("start", "all", "flat", "none", "zero")
        )
        for name, value in ((start, 0), (all_of_it, -1)):
            self.constants.append(numpy_helper.from_array(np.array([value]), name))
        nodes = [
            node("Reshape", self.gate, all_of_it, made=flat),
            node("Slice", flat, start, start, made=none),
            helper.make_node("ReduceSum", [none], [zero], zero, keepdims=0),
        ]
        for name, waiting in late.items():
            typed = f"{waiting}:zero"
            nodes.append(node("CastLike", zero, name, made=typed))
            nodes.append(node("Add", name, typed, made=waiting))
        return nodes
