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
from onnx_adapt.checkpoints.readers.peft_methods.reweights import (
    c3a_edits,
    glora_edits,
    hira_edits,
    lokr_edits,
    osf_edits,
    peanut_edits,
    randlora_edits,
    shira_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.rotations import (
    boft_edits,
    hra_edits,
    oft_edits,
    road_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.shared_vectors import (
    pvera_edits,
    tinylora_edits,
    unilora_edits,
    vblora_edits,
    vera_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.spectra import fourierft_edits, waveft_edits
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.peft_methods.tokens import TOKEN_ROWS, token_edits


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
            TOKEN_ROWS,
        ),
        edits=lora_edits,
        training=("lora_velora_embed", "lora_monteclora_sampler"),
    ),
    "IA3": Method(parts=("ia3_l",), edits=ia3_edits),
    "ADALORA": Method(parts=("lora_A", "lora_B", "lora_E"), edits=adalora_edits),
    "BEFT": Method(parts=("beft_bias",), edits=beft_edits),
    "BOFT": Method(parts=("boft_R", "boft_s"), edits=boft_edits),
    "BONE": Method(parts=("bone_block",), edits=bone_edits),
    "C3A": Method(parts=("c3a_kernel",), edits=c3a_edits),
    "DEFT": Method(parts=("deft_P", "deft_R"), edits=deft_edits),
    "DELORA": Method(
        parts=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), edits=delora_edits
    ),
    "FOURIERFT": Method(parts=("fourierft_spectrum",), edits=fourierft_edits),
    "GLORA": Method(
        parts=tuple(
            f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")
        ),
        edits=glora_edits,
    ),
    "GRALORA": Method(
        parts=("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"),
        edits=gralora_edits,
    ),
    "HIRA": Method(
        parts=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), edits=hira_edits
    ),
    "HRA": Method(parts=("hra_u",), edits=hra_edits),
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
    "LOKR": Method(
        parts=(
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        ),
        edits=lokr_edits,
    ),
    "MISS": Method(parts=("miss_block",), edits=miss_edits),
    "OFT": Method(parts=("oft_R", "oft_embedding_R"), edits=oft_edits),
    "OSF": Method(
        parts=tuple(f"osf_svd_params.{name}_low" for name in "USV"), edits=osf_edits
    ),
    "PEANUT": Method(
        parts=(
            *("peanut_A", "peanut_B"),
            *(f"peanut_{kind}coders.{i}" for kind in ("en", "de") for i in range(32)),
        ),
        edits=peanut_edits,
    ),
    "PVERA": Method(
        parts=("pvera_lambda_b", "pvera_lambda_d"),
        edits=pvera_edits,
        shared=("pvera_A", "pvera_B"),
    ),
    "RANDLORA": Method(
        parts=("randlora_lambda", "randlora_gamma"),
        edits=randlora_edits,
        shared=("randlora_A", "randlora_B"),
    ),
    "ROAD": Method(parts=("road_theta", "road_alpha"), edits=road_edits),
    "SHIRA": Method(parts=("shira_weight", "shira_indices"), edits=shira_edits),
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
    "TRAINABLE_TOKENS": Method(parts=(TOKEN_ROWS,), edits=token_edits),
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
    "WAVEFT": Method(parts=("waveft_spectrum",), edits=waveft_edits),
}
"""Methods by `peft_type`."""

_TOKENS = "it adds tokens to the input, and changes no weight"

REFUSED_METHODS = {
    "ADAMSS": "which rows of the weight it changes follows from a clustering of the base's "
    "weight, which is not in the file",
    "ADAPTION_PROMPT": "it adds an attention over learned prompts to that of each layer",
    "CPT": _TOKENS,
    "FROD": "it rotates the base's singular vectors, and its update's rank is not low",
    "LILY": "how it mixes its matrices depends on all tokens of the input at once",
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "POLY": "which mix of its LoRAs runs depends on the task of each row",
    "PSOFT": "it rotates the principal singular vectors of the base's weight",
    "SHADOW": "it runs a second, small network beside the model",
    "XLORA": "which mix of its LoRAs runs depends on each token",
}
"""Methods by `peft_type` that are refused, and why."""
