"""What a method of PEFT reads: the tensors of one module, and what belongs to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array


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

    def part(self, name: str) -> Array:
        """One of its tensors in float64.

        Raises:
            KeyError: If it has none of this name.
        """
        return self.parts[name].astype(np.float64)
