"""The rule for If: its gradient is an If of the gradients of its branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from onnx_adapt.graph.gradients.backward import body_views, go_back
from onnx_adapt.graph.gradients.rule import Grads, Step
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import GraphView
from onnx_adapt.model import walk

# A branch is computed again where its gradient is needed: what is inside the forward If cannot
# be read from outside. An example: of
#
#     y = If(c) {then: t = w * x; y = Exp(t)   else: y = x + x}
#
# the gradients of w and x for a given dy are
#
#     dw, dx = If(c) {then: t = w * x; y = Exp(t); dt = dy * y; dt * x, dt * w
#                     else: 0 * w, Sum(dy, dy)}
#
# The second If sees what the main graph makes, so t and y get other names in it.


def choose_branch(tape: Tape, step: Step) -> Grads:
    """If: the gradients of what the branches read, from the branch that ran."""
    wanted = [
        name
        for name, want in zip(step.captured, step.wanted[len(step.node.input) :], strict=True)
        if want
    ]
    bodies = [
        helper.make_attribute(label, _branch(tape, step, label, view, wanted))
        for label, view in body_views(tape.views, tape.view, step.node)
    ]
    made = tape.add_several("If", step.node.input, len(wanted))
    tape.nodes[-1].attribute.extend(bodies)
    for grad, name in zip(made, wanted, strict=True):
        tape.elem_types[grad] = tape.elem_type(name)
    grads = dict(zip(wanted, made, strict=True))
    return [*[None] * len(step.node.input), *(grads.get(name) for name in step.captured)]


def _branch(
    tape: Tape, step: Step, label: str, view: GraphView, wanted: Sequence[str]
) -> onnx.GraphProto:
    """The gradient of one branch as a graph without inputs."""
    inner = tape.inside(view, label)
    results = [value.name for value in view.scope.graph.output]
    seeds: dict[str, str] = {}
    for name, grad in zip(results, step.grads, strict=True):
        if grad:
            seeds[name] = inner.add("Sum", seeds[name], grad) if name in seeds else grad
    found = go_back(inner, seeds, wanted)
    made = [found.get(name) or inner.zeros_like(name) for name in wanted]
    outputs = [inner.add("Identity", grad) for grad in made]
    again = _needed(view, inner.nodes)
    stored = _read_of(view, [*again, *inner.nodes])
    own = [name for node in again for name in node.output] + [t.name for t in stored]
    names = {name: f"{inner.prefix}{name}" for name in own if name}
    for tensor in stored:
        tensor.name = names[tensor.name]
    return helper.make_graph(
        [
            *(_renamed(node, names, inner.prefix) for node in again),
            *(_renamed(node, names) for node in inner.nodes),
        ],
        f"{inner.prefix}gradient",
        [],
        [
            helper.make_tensor_value_info(output, tape.elem_type(name), None)
            for output, name in zip(outputs, wanted, strict=True)
        ],
        stored,
    )


def _read_of(view: GraphView, nodes: Sequence[onnx.NodeProto]) -> list[onnx.TensorProto]:
    """Copies of the initializers of a branch that some nodes read."""
    used = {name for node in nodes for name in (*node.input, *walk.captured(node))}
    copies = []
    for tensor in view.scope.graph.initializer:
        if tensor.name in used:
            copies.append(onnx.TensorProto())
            copies[-1].CopyFrom(tensor)
    return copies


def _renamed(
    node: onnx.NodeProto, names: Mapping[str, str], prefix: str = ""
) -> onnx.NodeProto:
    """A copy of a node that reads and makes other names.

    Args:
        node: The node.
        names: The new names.
        prefix: What new names inside its bodies begin with; '' to leave these as they are.
    """
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{prefix}{node.name or next(name for name in node.output if name)}"
    waiting = [(copy, names)]
    while waiting:
        item, known = waiting.pop()
        for listed in (item.input, item.output):
            listed[:] = [known.get(name, name) for name in listed]
        for _, body in walk.bodies(item):
            values = (*body.input, *body.initializer)
            own = [value.name for value in values] + [n for q in body.node for n in q.output]
            inner = dict(known) | ({name: f"{prefix}{name}" for name in own} if prefix else {})
            del body.value_info[:]
            for value in (*body.input, *body.output, *body.initializer):
                value.name = inner.get(value.name, value.name)
            waiting += [(node, inner) for node in body.node]
    return copy


def _needed(view: GraphView, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes of a branch that its gradient reads from, in their order."""
    waiting = [name for node in nodes for name in (*node.input, *walk.captured(node))]
    places: set[int] = set()
    while waiting:
        place = view.producers.get(waiting.pop())
        if place is not None and place not in places:
            places.add(place)
            node = view.nodes[place]
            waiting += (*node.input, *walk.captured(node))
    return [view.nodes[place] for place in sorted(places)]
