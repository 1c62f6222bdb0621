"""BEFT and LN tuning of PEFT: vectors that are trained, and no matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import BySize, Edit, LowRank, Replacement
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors


def beft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """BEFT (arXiv 2509.15974): a bias is added to what the module computes.

    The module need not have a bias, so it is that of an update whose matrices are zero.
    """
    bias = found.read("beft_bias", 1, None)[0]

    def make(inputs: int, outputs: int) -> LowRank:
        return LowRank(
            found.module, np.zeros((1, inputs)), np.zeros((outputs, 1)), 1.0, bias=bias
        )

    yield BySize(found.module, make)


def ln_tuning_edits(found: ModuleTensors) -> Iterator[Edit]:
    """LN tuning (arXiv 2312.11420): a normalisation, trained whole, in place of the base's."""
    for part, value in found.parts.items():
        parameter = "bias" if part.endswith(".bias") else "weight"
        yield Replacement(found.module, parameter, value)
