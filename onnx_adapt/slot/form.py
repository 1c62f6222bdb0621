"""One way to make a slot: the place where it sits, and the form that it has there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import inner_name


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
    ranked = target.axis == 1 or form.batched
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
    )
