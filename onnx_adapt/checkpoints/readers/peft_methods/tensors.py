"""What a method of PEFT reads: the tensors of one module, and what belongs to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors of one module in a PEFT checkpoint.

    Attributes:
        module: The module's path.
        parts: Its tensors by what PEFT calls them, such as `lora_A`; a bias as `lora_B.bias`.
        config: The checkpoint's configuration.
        shared: The tensors that all modules share, such as `vera_A`, by name.
    """

    module: str
    parts: Mapping[str, Array]
    config: Mapping[str, Any]
    shared: Mapping[str, Array] = field(default_factory=dict)

    def read(self, part: str, *shape: int | None) -> Array:
        """Read a tensor of the module in float64.

        Args:
            part: What PEFT calls it.
            shape: The shape that it has to have; None is any size, and no shape is any.

        Raises:
            CheckpointError: If the module has no such tensor, or it is of another shape.
        """
        if part not in self.parts:
            raise CheckpointError(
                f"module {self.module!r} has {', '.join(self.parts)}, and no {part}",
                hint="save the adapter again; a part of it is missing",
            )
        value = self.parts[part]
        what = f"module {self.module!r}: {part}"
        return checked(what, value, *shape) if shape else value.astype(np.float64)

    def read_shared(self, name: str, *shape: int | None) -> Array:
        """Read a tensor that all modules share, in float64.

        Raises:
            CheckpointError: If the checkpoint has no such tensor, or it is of another shape.
        """
        if name not in self.shared:
            raise CheckpointError(
                f"the checkpoint has no {name}, which {self.module!r} and others share",
                hint="save the adapter again; a part of it is missing",
            )
        return checked(name, self.shared[name], *shape)


def checked(what: str, value: Array, *shape: int | None) -> Array:
    """A tensor in float64, if it has a shape; None in it is any size.

    Raises:
        CheckpointError: If it is of another shape.
    """
    fits = value.ndim == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{what} has shape {list(value.shape)}; it has to be [{wanted}]",
            hint="was adapter_config.json copied from another adapter?",
        )
    return value.astype(np.float64)
