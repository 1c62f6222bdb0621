"""The table of PEFT's methods, and of those that no graph can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.peft_methods.lora import ia3_edits, lora_edits
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.peft_methods.tokens import TOKEN_ROWS, token_edits


@dataclass(frozen=True, slots=True)
class Method:
    """How the tensors of one `peft_type` are read.

    Attributes:
        parts: What the tensors of a module are called in the keys.
        edits: What the tensors of one module ask for.
        shared: What the tensors that all modules share are called in the keys.
    """

    parts: tuple[str, ...]
    edits: Callable[[ModuleTensors], Iterator[Edit]]
    shared: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "LORA": Method(
        parts=(
            *("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B"),
            "lora_magnitude_vector",  # DoRA's
            TOKEN_ROWS,
        ),
        edits=lora_edits,
    ),
    "IA3": Method(parts=("ia3_l",), edits=ia3_edits),
    "TRAINABLE_TOKENS": Method(parts=(TOKEN_ROWS,), edits=token_edits),
}
"""Methods by `peft_type`."""

REFUSED_METHODS = {
    "ADALORA": "AdaLoRA has three factors, and prunes them by module",
    "BOFT": "BOFT rotates the weight instead of adding to it",
    "LOHA": "LoHa multiplies two low-rank matrices element by element",
    "LOKR": "LoKr's update is a Kronecker product, whose rank is not low",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "OFT": "OFT rotates the weight instead of adding to it",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the attention",
    "PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "P_TUNING": "prompt tuning adds tokens to the input",
    "VERA": "VeRA scales random matrices that all modules share",
}
"""Methods by `peft_type` that are refused, and why."""
