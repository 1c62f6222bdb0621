"""A node and the shapes of one run of it: what its operations are counted from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A node and the shapes of one run of it.

    Attributes:
        op: Its operator.
        domain: The operator's domain.
        attributes: Its attributes, by name.
        inputs: Shapes of its inputs by their place; None where one is left out.
        outputs: The same of its outputs.
    """

    op: str
    domain: str
    attributes: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]

    def has(self, place: int | None) -> bool:
        """Whether an input is there."""
        return place is not None and self.inputs[place : place + 1] not in ((), (None,))

    def input(self, place: int) -> Shape:
        """The shape of an input.

        Raises:
            LookupError: If it is left out.
        """
        return given(self.inputs[place])

    def size(self, place: int) -> int:
        """How many numbers an input has; 0 if it is left out."""
        return math.prod(self.input(place)) if self.has(place) else 0

    @property
    def made(self) -> int:
        """How many elements its first output has."""
        return next((math.prod(shape) for shape in self.outputs if shape is not None), 0)


def given(shape: Shape | None) -> Shape:
    """A shape that is known.

    Raises:
        LookupError: If it is not.
    """
    if shape is None:
        raise LookupError
    return shape


Count = Callable[[Call], int]
"""How many operations a node has; a LookupError if an input that tells it is left out."""
