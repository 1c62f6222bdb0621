"""What stands for a fused node where an adapter needs a tensor that is inside it.

An example. An optimiser wrote `y = BiasGelu(h, bias)` behind a Linear's product `h`, so that
the Linear's output `h + bias` is nowhere in the graph. For the node stand

    b = Add(h, bias)     y = Gelu(b)

and an adapter of the Linear goes on `b`. Each operator is one row of `_ROWS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.errors import SiteRefusedError
from onnx_adapt.graph.fused_bias import FusedBias
from onnx_adapt.graph.index import GraphView, ModelIndex, default_opset, text
from onnx_adapt.graph.layers import find_weight
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.manifest import slot_of
from onnx_adapt.slot.names import inner_name

_MICROSOFT = "com.microsoft"
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
        nodes: The nodes so far.
        constants: New initializers.
    """

    index: ModelIndex
    view: GraphView
    fused: onnx.NodeProto
    place: FusedPlace
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def name(self, part: str) -> str:
        """A name for something new. It begins with no slash, which would name a module."""
        return f"unfused:{self.place.output}:{part}"

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
        found = self.view.producer(tensor)
        while found is not None and (slot := slot_of(found[1])):
            found = self.view.producer(inner_name(slot))
        if found is not None:
            layer, add = found[1], self.nodes[-1]
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


def write_out(index: ModelIndex, view: GraphView, place: FusedPlace) -> Draft:
    """Write the nodes that stand for a fused one.

    Raises:
        SiteRefusedError: If nobody can tell what it computes.
    """
    draft = Draft(index, view, view.nodes[view.producers[place.output]], place)
    row = _ROWS.get(draft.fused.op_type)
    if row is None:
        raise draft.refuse("it is no operator whose parts are known")
    row(draft)
    return draft


def can_write_out(behind: FusedBias) -> bool:
    """Whether the node that adds a layer's bias can be written out, right behind the layer."""
    return is_known(behind.node) and not behind.moved


def is_known(node: onnx.NodeProto) -> bool:
    """Whether a node is of an operator whose parts are known."""
    return node.op_type in _ROWS


def _bias_gelu(draft: Draft) -> None:
    biased = draft.add_bias(*draft.fused.input[:2])
    output = draft.fused.output[0]
    draft.add("Gelu", [biased], "gelu", output=output, domain=_MICROSOFT)


def _fast_gelu(draft: Draft) -> None:
    biased = draft.add_bias(*draft.fused.input[:2])
    draft.keep(without=1, input_0=biased)


def _bias_add(draft: Draft) -> None:
    biased = draft.add_bias(*draft.fused.input[:2])
    draft.add("Add", [biased, draft.input(2)], "skip", output=draft.fused.output[0])


def _skip_norm(draft: Draft) -> None:
    """A normalisation of `input + skip`, and of a Linear's bias with them."""
    centred = draft.fused.op_type == "SkipLayerNormalization"
    bias = 4 if centred else 3
    side = list(draft.fused.input[:2]).index(draft.place.tensor)
    first, second = draft.input(0), draft.input(1)
    if draft.input(bias):
        biased = draft.add_bias(draft.place.tensor, draft.input(bias))
        first, second = (biased, second) if side == 0 else (first, biased)
    if not draft.place.residual:
        draft.keep(without=bias, input_0=first, input_1=second)
        return
    outputs = [*map(str, draft.fused.output), "", "", ""][:4]
    if any(draft.view.readers(name) for name in outputs[1:3] if name):
        raise draft.refuse("something reads its mean or its deviation")
    total = draft.add("Add", [first, second], "sum", output=outputs[3])
    if centred:
        inputs, op = [total, *draft.fused.input[2:4]], "LayerNormalization"
    else:
        newest = default_opset(draft.index.model.proto) >= _FIRST_WITH_RMS
        inputs = [total, draft.input(2)]
        op = "RMSNormalization" if newest else "SimplifiedLayerNormalization"
    epsilon = next((item.f for item in draft.attributes("epsilon")), 1e-12)
    given = [helper.make_attribute("axis", -1), helper.make_attribute("epsilon", epsilon)]
    draft.add(op, inputs, "norm", output=outputs[0], attributes=given)


_FIRST_WITH_RMS = 23


def _activation(draft: Draft, inner: str, settings: dict[str, float]) -> None:
    """The activation of a fused product, which is its last step."""
    name = next(item.s for item in draft.attributes("activation")).decode()
    allowed = _SETTINGS.get(name)
    if allowed is None:
        raise draft.refuse(f"its activation is {name!r}")
    given = [helper.make_attribute(k, v) for k, v in settings.items() if k in allowed]
    inputs = [inner]
    if name == "Clip":
        for part in ("min", "max"):
            draft.constants.append(
                numpy_helper.from_array(np.array(settings[part], np.float32), draft.name(part))
            )
            inputs.append(draft.name(part))
    draft.add(name, inputs, "act", output=draft.fused.output[0], attributes=given)


_SETTINGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign", "HardSwish", "Clip"), ()
    ),
    **dict.fromkeys(("LeakyRelu", "Elu", "ThresholdedRelu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Selu": ("alpha", "gamma"),
}
"""The activations that optimisers fuse into products, with their attributes."""


def _fused_gemm(draft: Draft) -> None:
    inner = draft.add_product("Gemm", draft.fused.input, "alpha", "beta", "transA", "transB")
    prefix = "activation_"
    settings = {
        item.name.removeprefix(prefix): item.f
        for item in draft.fused.attribute
        if item.name.startswith(prefix)
    }
    _activation(draft, inner, settings)


def _fused_conv(draft: Draft) -> None:
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    inner = draft.add_product("Conv", draft.fused.input[:3], *names)
    if draft.input(3):
        inner = draft.add("Add", [inner, draft.input(3)], "sum")
    values = [x for item in draft.attributes("activation_params") for x in item.floats]
    kind = next((item.s for item in draft.attributes("activation")), b"").decode()
    order = ("min", "max") if kind == "Clip" else _SETTINGS.get(kind, ())
    _activation(draft, inner, dict(zip(order, values, strict=False)))


def _heads(draft: Draft) -> None:
    """Attention with one bias for queries, keys and values, one after the other."""
    position, sides = 3, list(map(str, draft.fused.input[:3]))
    bias = find_weight(draft.view, draft.input(position))
    stored = draft.view.constant(draft.input(position))
    widths = [find_width(draft.view, name) for name in sides]
    if bias is None or stored is None or len(sides) < 3 or not all(sides):
        raise draft.refuse("its bias is no constant, or its inputs are packed")
    if None in widths or sum(w or 0 for w in widths) != bias.dims[-1]:
        raise draft.refuse("its inputs are of unknown width")
    values, start, replaced = read_tensor(draft.index.model, stored), 0, {}
    for i, (part, name, width) in enumerate(zip("qkv", sides, widths, strict=True)):
        piece = np.ravel(values)[start : start + (width or 0)]
        start += width or 0
        tensor = numpy_helper.from_array(piece, draft.name(f"{part}_bias"))
        draft.constants.append(tensor)
        replaced[f"input_{i}"] = draft.add_bias(name, tensor.name, part)
    draft.keep(without=position, **replaced)


def find_width(view: GraphView, name: str) -> int | None:
    """The size of the last of three axes of a tensor, or None."""
    shape = view.type_of(name).shape
    size = shape[-1] if shape is not None and len(shape) == 3 else None
    return size if isinstance(size, int) else None


_ROWS: dict[str, Callable[[Draft], None]] = {
    "BiasGelu": _bias_gelu,
    "FastGelu": _fast_gelu,
    "BiasAdd": _bias_add,
    "SkipLayerNormalization": _skip_norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "MultiHeadAttention": _heads,
    "FusedGemm": _fused_gemm,
    "FusedConv": _fused_conv,
}
"""How each operator is written out."""
