"""The nodes that are to stand for a fused one, while they are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx
from onnx import helper

from onnx_adapt.errors import SiteRefusedError
from onnx_adapt.graph.index import GraphView, ModelIndex, text
from onnx_adapt.slot.manifest import slot_of
from onnx_adapt.slot.names import inner_name

_OURS = "pkg.onnx_adapt."


@dataclass(frozen=True, slots=True)
class FusedPlace:
    """A fused node that is to be written out, and why.

    Attributes:
        graph: Path of the graph that it is in.
        output: Its first output.
        tensor: The layer's product that it reads; '' if the layer is inside it.
        residual: Whether the sum with the residual connection is needed as well.
    """

    graph: str
    output: str
    tensor: str
    residual: bool = False


@dataclass(slots=True)
class Draft:
    """The nodes that are to stand for a fused one.

    Attributes:
        index: The model.
        view: The graph.
        fused: The fused node.
        place: What is needed of it.
        stem: Its first output as the base calls it, which new names begin with.
        nodes: The nodes so far.
        constants: New initializers.
    """

    index: ModelIndex
    view: GraphView
    fused: onnx.NodeProto
    place: FusedPlace
    stem: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def name(self, part: str) -> str:
        """A name for something new. It begins with no slash, which would name a module."""
        return f"unfused:{self.stem}:{part}"

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        part: str,
        *,
        output: str = "",
        domain: str = "",
        attributes: Sequence[onnx.AttributeProto] = (),
    ) -> str:
        """Add a node, and return its output."""
        made = output or self.name(part)
        node = helper.make_node(op, inputs, [made], self.name(f"{part}_{op}"), domain=domain)
        node.attribute.extend(attributes)
        self.nodes.append(node)
        return made

    def add_bias(self, tensor: str, bias: str, part: str = "bias") -> str:
        """Add the Add of a layer's bias, as a node of the layer's module."""
        made = self.add("Add", [tensor, bias], part)
        layer, add = _layer_before(self.view, tensor), self.nodes[-1]
        if layer is not None:
            around = text(layer.name).rpartition("/")[0]
            if around:
                add.name = f"{around}/{add.name.replace('/', '.')}"
            own = (e for e in layer.metadata_props if not e.key.startswith(_OURS))
            add.metadata_props.extend(own)
        return made

    def add_product(self, op: str, inputs: Sequence[str], *attributes: str) -> str:
        """Add the layer itself, which keeps the fused node's name and some attributes."""
        given = self.attributes(*attributes)
        made = self.add(op, inputs, "product", attributes=given)
        self.nodes[-1].name = self.fused.name
        self.nodes[-1].metadata_props.extend(self.fused.metadata_props)
        return made

    def input(self, position: int) -> str:
        """One input of the fused node, or '' where it has none."""
        return "".join(self.fused.input[position : position + 1])

    def keep(self, *, without: int, **replaced: str) -> None:
        """Add the fused node itself, without one input and with other inputs."""
        node = onnx.NodeProto.FromString(self.fused.SerializeToString())
        for i, name in enumerate(node.input):
            node.input[i] = "" if i == without else replaced.get(f"input_{i}", name)
        while node.input and not node.input[-1]:
            del node.input[-1]
        self.nodes.append(node)

    def finish(self) -> None:
        """Give the fused node's name, if none has it, to the node that makes its output."""
        name = text(self.fused.name)
        if name not in [text(node.name) for node in self.nodes]:
            last = next(n for n in reversed(self.nodes) if self.fused.output[0] in n.output)
            last.name = name

    def attributes(self, *names: str) -> list[onnx.AttributeProto]:
        """Some attributes of the fused node."""
        return [item for item in self.fused.attribute if item.name in names]

    def refuse(self, why: str) -> SiteRefusedError:
        """The error that says why the node cannot be written out."""
        label = text(self.fused.name) or self.place.output
        return SiteRefusedError(
            f"node {label!r} ({self.fused.op_type}) holds what this adapter needs, and cannot "
            f"be written out: {why}",
            hint="insert into the model as it was exported and optimise the result",
        )


def _layer_before(view: GraphView, tensor: str) -> onnx.NodeProto | None:
    """The node of the base that makes a tensor, below the slots on it."""
    found = view.producer(tensor)
    while found is not None and slot_of(found[1]):
        found = view.producer(inner_name(slot_of(found[1])))
    return found[1] if found is not None else None
