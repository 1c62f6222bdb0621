"""What a rule is: from the gradients of a node's outputs to those of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.tape import Tape
from onnx_adapt.graph.index import text


@dataclass(frozen=True, slots=True)
class Step:
    """One node of the forward graph, on the way back.

    Attributes:
        node: The node.
        grads: The gradient of each output; '' where nothing depends on it.
        wanted: For each tensor that it reads whether its gradient is needed.
        captured: What its bodies read from the graphs around them, behind the inputs.
    """

    node: onnx.NodeProto
    grads: tuple[str, ...]
    wanted: tuple[bool, ...]
    captured: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """All that the node reads: its inputs, and what its bodies capture."""
        return (*self.node.input, *self.captured)

    @property
    def grad(self) -> str:
        """The gradient of the first output."""
        return self.grads[0]

    @property
    def output(self) -> str:
        """The first output."""
        return str(self.node.output[0])

    @property
    def label(self) -> str:
        """The node in messages: its operator, and its name or output."""
        return f"{self.node.op_type} {text(self.node.name) or self.output!r}"

    def input(self, position: int = 0) -> str:
        """One input, or '' where the node has none."""
        return "".join(self.node.input[position : position + 1])

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute of the node; strings as text."""
        for item in self.node.attribute:
            if item.name == name:
                value = helper.get_attribute_value(item)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def wants(self, position: int) -> bool:
        """Whether the gradient of an input is needed."""
        return position < len(self.wanted) and self.wanted[position]

    def refuse(self, why: str, hint: str = "") -> GradientError:
        """The error that says why the node has no gradient."""
        return GradientError(f"node {self.label} has no gradient here: {why}", hint=hint)


Grads = Sequence[str | None]
"""The gradient of each tensor that is read, or None where there is none or none is needed."""

Rule = Callable[[Tape, Step], Grads]
"""Adds the nodes for the gradients of a node's inputs."""


def only(grad: str | None) -> Grads:
    """The gradients of a node of which only the first input has one."""
    return (grad,)
