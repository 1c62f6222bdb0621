"""One way to make a slot: the place where it sits, and the form that it has there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import changed_input, changed_weight, inner_name
from onnx_adapt.slot.weights import matrices


class Target(Protocol):
    """The tensor that a slot changes; a `Site` of a graph is one."""

    @property
    def graph(self) -> str:
        """Path of the graph that the tensor is in."""

    @property
    def node(self) -> str:
        """Name of the node that produces the tensor."""

    @property
    def tensor(self) -> str:
        """Name of the tensor."""

    @property
    def module(self) -> str | None:
        """PyTorch module path, or None if it is unknown."""

    @property
    def width(self) -> int | None:
        """Size of the feature axis, or None if it is unknown."""

    @property
    def dtype(self) -> str:
        """Element type."""

    @property
    def axis(self) -> int | None:
        """The feature axis: -1, or 1 for channels."""

    @property
    def rank(self) -> int | None:
        """Number of axes, or None if it is unknown."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a slot computes and how it holds its weights, wherever it sits.

    Attributes:
        parts: Names of the weights, in the order of the formula.
        activation: Name of the activation between the projections.
        source: The tensor that the adapter reads; '' is the target itself.
        source_width: Size of the source's feature axis; 0 is the target's.
        plus: A tensor that is added to the source before anything else, or ''.
        norm: Output tensor of a normalisation of the base to re-apply, or ''.
        norm_after: What the slot's own normalisation wraps: `term`, `sum` or ''.
        window: Kernel, strides, pads and dilations of the down-projection, or empty.
        swappable: Whether the weights can be fed at inference time.
        bottleneck: Inner size if it is fixed; 0 if each adapter brings its own.
        batched: Whether one run can give each row of a batch another adapter.
        by_token: Whether it is on for the tokens alone that the input `active` names.
    """

    parts: tuple[str, ...] = ()
    activation: str = "identity"
    source: str = ""
    source_width: int = 0
    plus: str = ""
    norm: str = ""
    norm_after: str = ""
    window: tuple[int, ...] = ()
    swappable: bool = True
    bottleneck: int = 0
    batched: bool = False
    by_token: bool = False


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """A weight that operators read, as the place of a slot.

    Attributes:
        graph: Path of the graph that stores or makes the weight.
        tensor: Name of the weight.
        shape: Its shape: `(rows, columns)`, `(groups, rows, columns)` or `(columns,)`.
        dtype: Its element type.
        node: Name of the node that reads it.
        readers: Addresses of the first outputs of all nodes that are to read the changed
            weight.
        module: PyTorch module path, or ''.
    """

    graph: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    node: str
    readers: tuple[str, ...]
    module: str = ""


@dataclass(frozen=True, slots=True)
class InputTarget:
    """What one layer reads, as the place of a slot that changes it for this layer alone.

    Attributes:
        graph: Path of the graph that makes the tensor, or has it as an input.
        tensor: Name of the tensor.
        width: Size of its feature axis.
        dtype: Its element type.
        axis: The feature axis: -1, or 1 for channels.
        rank: Number of its axes if the feature axis is 1.
        node: Name of the layer's node.
        module: PyTorch module path of the layer, or ''.
        readers: Address of the first output of the node that reads the tensor for the layer.
    """

    graph: str
    tensor: str
    width: int
    dtype: str
    axis: int
    rank: int
    node: str
    module: str
    readers: tuple[str, ...]


def new_input_slot(name: str, target: InputTarget, form: Form) -> Slot:
    """Describe a slot on what one layer reads.

    Args:
        name: The slot's name; it must be unique in the model.
        target: The layer's input.
        form: What the slot computes.
    """
    return replace(
        new_slot(name, target, form),
        inner=target.tensor,
        source=target.tensor,
        output=changed_input(name),
        readers=target.readers,
    )


def new_weight_slot(name: str, target: WeightTarget, parts: tuple[str, ...]) -> Slot:
    """Describe a slot on a weight.

    Args:
        name: The slot's name; it must be unique in the model.
        target: The weight.
        parts: Names of its own weights, in the order of the formula.
    """
    groups, rows, columns = matrices(target.shape)
    return Slot(
        name=name,
        graph=target.graph,
        node=target.node,
        tensor=target.tensor,
        inner=target.tensor,
        output=changed_weight(name),
        source=target.tensor,
        width=groups * columns,
        source_width=groups * rows,
        dtype=target.dtype,
        axis=-1,
        rank=0,
        activation="identity",
        parts=parts,
        norm="",
        norm_after="",
        module=target.module,
        swappable=True,
        bottleneck=0,
        weight_shape=target.shape,
        readers=target.readers,
    )


def new_slot(name: str, target: Target, form: Form, *, width: int | None = None) -> Slot:
    """Describe the slot of a form at one place.

    Args:
        name: The slot's name; it must be unique in the model.
        target: The place.
        form: What the slot computes.
        width: Size of the target's feature axis, where the graph does not tell it.
    """
    size = target.width or 0 if width is None else width
    inner = inner_name(name)
    ranked = target.axis == 1 or form.batched or form.by_token
    return Slot(
        name=name,
        graph=target.graph,
        node=target.node,
        tensor=target.tensor,
        inner=inner,
        output=target.tensor,
        source=inner if form.source in ("", target.tensor) else form.source,
        width=size,
        source_width=form.source_width or size,
        dtype=target.dtype,
        axis=target.axis or -1,
        rank=(target.rank or 0) if ranked else 0,
        activation=form.activation,
        parts=form.parts,
        norm=form.norm,
        norm_after=form.norm_after,
        module=target.module or "",
        swappable=form.swappable,
        bottleneck=form.bottleneck if "down" in form.parts else 0,
        window=form.window,
        plus=form.plus,
        batched=form.batched,
        by_token=form.by_token,
    )
