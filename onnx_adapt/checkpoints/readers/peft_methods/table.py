"""The table of PEFT's methods, and of those that no graph can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.peft_methods.biases_and_norms import (
    beft_edits,
    ln_tuning_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.lora import ia3_edits, lora_edits
from onnx_adapt.checkpoints.readers.peft_methods.low_rank import (
    adalora_edits,
    bone_edits,
    delora_edits,
    gralora_edits,
    loha_edits,
    miss_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.on_base import (
    deft_edits,
    supertuning_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.shared_vectors import (
    pvera_edits,
    tinylora_edits,
    unilora_edits,
    vblora_edits,
    vera_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors


@dataclass(frozen=True, slots=True)
class Method:
    """How the tensors of one `peft_type` are read.

    Attributes:
        parts: What the tensors of a module are called in the keys.
        edits: What the tensors of one module ask for.
        shared: What the tensors that all modules share are called in the keys.
        training: Words in the keys of tensors that only training uses.
    """

    parts: tuple[str, ...]
    edits: Callable[[ModuleTensors], Iterator[Edit]]
    shared: tuple[str, ...] = ()
    training: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "LORA": Method(
        parts=(
            *("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B", "lora_B.bias"),
            "lora_magnitude_vector",  # DoRA's
            "lora_diag",  # KaSA's
        ),
        edits=lora_edits,
        training=("lora_velora_embed", "lora_monteclora_sampler"),
    ),
    "IA3": Method(parts=("ia3_l",), edits=ia3_edits),
    "ADALORA": Method(parts=("lora_A", "lora_B", "lora_E"), edits=adalora_edits),
    "BEFT": Method(parts=("beft_bias",), edits=beft_edits),
    "BONE": Method(parts=("bone_block",), edits=bone_edits),
    "DEFT": Method(parts=("deft_P", "deft_R"), edits=deft_edits),
    "DELORA": Method(
        parts=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), edits=delora_edits
    ),
    "GRALORA": Method(
        parts=("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        edits=gralora_edits,
    ),
    "LN_TUNING": Method(
        parts=("ln_tuning_layers", "ln_tuning_layers.bias"), edits=ln_tuning_edits
    ),
    "LOHA": Method(
        parts=(
            *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
            *("hada_t1", "hada_t2"),  # of convolutions
        ),
        edits=loha_edits,
    ),
    "MISS": Method(parts=("miss_block",), edits=miss_edits),
    "PVERA": Method(
        parts=("pvera_lambda_b", "pvera_lambda_d"),
        edits=pvera_edits,
        shared=("pvera_A", "pvera_B"),
    ),
    "SUPERTUNING": Method(
        parts=(
            *("supertuning_values", "supertuning_indices"),
            *("supertuning_lora_A", "supertuning_lora_B"),
        ),
        edits=supertuning_edits,
    ),
    "TINYLORA": Method(
        parts=("tinylora_A", "tinylora_B", "tinylora_P"),
        edits=tinylora_edits,
        shared=("tinylora_v",),
    ),
    "UNILORA": Method(
        parts=(
            *("unilora_indices_A", "unilora_indices_B"),
            *("unilora_scales_A", "unilora_scales_B"),
        ),
        edits=unilora_edits,
        shared=("unilora_theta_d",),
    ),
    "VBLORA": Method(
        parts=tuple(
            f"vblora_logits_{name}{form}"
            for name in "AB"
            for form in ("", "_topk_indices", "_topk_weights")
        ),
        edits=vblora_edits,
        shared=("vblora_vector_bank",),
    ),
    "VERA": Method(
        parts=("vera_lambda_b", "vera_lambda_d"),
        edits=vera_edits,
        shared=("vera_A", "vera_B"),
    ),
}
"""Methods by `peft_type`."""

_TOKENS = "it adds tokens to the input, and changes no weight"
_PLACES = "the places of its numbers are random numbers of PyTorch, and not in the file"

REFUSED_METHODS = {
    "ADAMSS": "which rows of the weight it changes follows from a clustering of the base's "
    "weight, which is not in the file",
    "ADAPTION_PROMPT": "it adds an attention over learned prompts to that of each layer",
    "BOFT": "BOFT rotates the weight instead of adding to it",
    "C3A": "its update is a block-circulant matrix, whose rank is not low",
    "CARTRIDGE": "it adds keys and values to the attention, and changes no weight",
    "CPT": _TOKENS,
    "FOURIERFT": _PLACES,
    "FROD": "it rotates the base's singular vectors, and its update's rank is not low",
    "GLORA": "it multiplies the base's weight and its bias",
    "HIRA": "its update is multiplied by the base's weight, and its rank is not low",
    "HRA": "it reflects the input of the layer, so its update depends on the base's weight",
    "LILY": "how it mixes its matrices depends on all tokens of the input at once",
    "LOKR": "LoKr's update is a Kronecker product, whose rank is not low",
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "OFT": "OFT rotates the weight instead of adding to it",
    "OSF": "it trains the singular vectors of the base's weight",
    "PEANUT": "its update is computed from the base's weight by a small network",
    "POLY": "which mix of its LoRAs runs depends on the task of each row",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the attention",
    "PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "PSOFT": "it rotates the principal singular vectors of the base's weight",
    "P_TUNING": "prompt tuning adds tokens to the input",
    "RANDLORA": "its update has full rank, of random matrices that all modules share",
    "ROAD": "it rotates the output of the layer in pairs of features",
    "SHADOW": "it runs a second, small network beside the model",
    "SHIRA": "its update is a sparse matrix, whose rank is not low",
    "TRAINABLE_TOKENS": "single rows of the embedding were trained",
    "WAVEFT": _PLACES,
    "XLORA": "which mix of its LoRAs runs depends on each token",
}
"""Methods by `peft_type` that are refused, and why."""
