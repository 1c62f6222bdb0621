"""The table of PEFT's methods, and of those that no graph can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.peft_methods.lora import ia3_edits, lora_edits
from onnx_adapt.checkpoints.readers.peft_methods.reweights import (
    bat_edits,
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
from onnx_adapt.checkpoints.readers.peft_methods.spectra import fourierft_edits, waveft_edits
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors


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
        ),
        edits=lora_edits,
    ),
    "IA3": Method(parts=("ia3_l",), edits=ia3_edits),
    "BOFT": Method(parts=("boft_R", "boft_s"), edits=boft_edits),
    "C3A": Method(parts=("c3a_kernel",), edits=c3a_edits),
    "FOURIERFT": Method(parts=("fourierft_spectrum",), edits=fourierft_edits),
    "GLORA": Method(
        parts=tuple(
            f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")
        ),
        edits=glora_edits,
    ),
    "HIRA": Method(
        parts=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"), edits=hira_edits
    ),
    "HRA": Method(parts=("hra_u",), edits=hra_edits),
    "LOKR": Method(
        parts=(
            *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
            *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        ),
        edits=lokr_edits,
    ),
    "MISS": Method(parts=("miss_block",), edits=bat_edits),
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
    "RANDLORA": Method(
        parts=("randlora_lambda", "randlora_gamma"),
        edits=randlora_edits,
        shared=("randlora_A", "randlora_B"),
    ),
    "ROAD": Method(parts=("road_theta", "road_alpha"), edits=road_edits),
    "SHIRA": Method(parts=("shira_weight", "shira_indices"), edits=shira_edits),
    "WAVEFT": Method(parts=("waveft_spectrum",), edits=waveft_edits),
}
"""Methods by `peft_type`."""

REFUSED_METHODS = {
    "ADALORA": "AdaLoRA has three factors, and prunes them by module",
    "LOHA": "LoHa multiplies two low-rank matrices element by element",
    "MULTITASK_PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "PSOFT": "PSOFT turns singular vectors of the weight, whose signs are not in the file",
    "PREFIX_TUNING": "prefix tuning adds keys and values to the attention",
    "PROMPT_TUNING": "prompt tuning adds tokens to the input",
    "P_TUNING": "prompt tuning adds tokens to the input",
    "VERA": "VeRA scales random matrices that all modules share",
}
"""Methods by `peft_type` that are refused, and why."""
