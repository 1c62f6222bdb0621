"""Where AdapterHub's bottlenecks sit, by the model's type and the configuration's flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.readers.saved import Saved
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

# Where a bottleneck of each model type sits: location in the key -> output Linear of the
# sub-layer. Source: the library's init_output_adapters calls, checked by running it.
_BERT = {".output": ".output.dense"}
_GPT2 = {".attention_adapters": ".attn.c_proj", ".output_adapters": ".mlp.c_proj"}
_LLAMA = {".attention_adapters": ".self_attn.o_proj", ".output_adapters": ".mlp.down_proj"}
_BART = {
    ".cross_attention_adapters": ".encoder_attn.out_proj",
    ".attention_adapters": ".self_attn.out_proj",
    ".output_adapters": ".fc2",
}
_CLIP = {".attention_adapters": ".self_attn.out_proj", ".output_adapters": ".mlp.fc2"}
_POST_LN = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "deberta"), _BERT),
    "deberta-v2": _BERT,
    "bart": _BART,
    "distilbert": {
        ".attention_adapters": ".attention.out_lin",
        ".output_adapters": ".ffn.lin2",
    },
}
_PRE_LN = {
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral"), _LLAMA),
    "mbart": _BART,
    **dict.fromkeys(("clip", "clip_vision_model", "clip_text_model"), _CLIP),
    "vit": {
        ".attention_adapters": ".attention.output.dense",
        ".output.output_adapters": ".output.dense",
    },
}


def places_of(kind: str) -> Mapping[str, str]:
    """Where bottlenecks sit: the end of a location -> that of its output Linear."""
    return _POST_LN.get(kind) or _PRE_LN.get(kind) or {}


def bottleneck_place(
    config: Mapping[str, Any], norm_after: str, *, post_ln: bool
) -> tuple[str, str, dict[str, Array]]:
    """Tell where a bottleneck sits, what it reads, and which parts its residuals need.

    Source: the forward of the library's `BottleneckLayer`; `s` is the sum behind the
    sub-layer, `h` the sub-layer's output.
    """
    for flag in ("original_ln_before", "original_ln_after", "residual_before_ln"):
        if not isinstance(config.get(flag), bool) and config.get(flag) != "post_add":
            raise CheckpointError(f"the configuration's {flag} is {config.get(flag)!r}")
    before = bool(config.get("original_ln_before"))
    after = bool(config.get("original_ln_after", True))
    residual = config.get("residual_before_ln", True)
    one = np.ones(1)
    switch = {"switch": one} if norm_after == "sum" else {}
    if config.get("is_parallel"):
        if after and norm_after != "sum":
            return "output", "residual_input", {}
    elif not before and after and residual in (True, False):
        return "output", "target", switch
    elif before and after and residual is True and not switch:
        return "residual", "norm" if post_ln else "target", {}
    elif before and after and (post_ln or residual != "post_add"):
        parts = {
            True: {},  # h' = h + A
            False: {"scale": one, "skip": one},  # h' = read + A
            "post_add": {"residual": one},  # h' = s + A
        }[residual]
        return "output", "normed_sum" if post_ln else "sum", {**parts, **switch}
    elif before and not after and residual is False:
        return ("norm" if post_ln else "residual"), "target", switch
    flags = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
    shown = ", ".join(f"{flag}={config.get(flag)!r}" for flag in flags)
    raise CheckpointError(
        f"this combination of residual settings is not supported: {shown}",
        hint="the presets (seq_bn, double_seq_bn, par_bn, AdapterPlus, Compacter) are",
    )


def sub_layer(location: str, saved: Saved) -> tuple[str, bool]:
    """Find the output Linear of a bottleneck's sub-layer, and whether a LayerNorm follows."""
    kind = str(saved.config.get("model_type"))
    table = places_of(kind)
    if not table or (saved.path / "adapter_interface.json").exists():
        known = ", ".join(sorted({*_POST_LN, *_PRE_LN}))
        raise CheckpointError(
            f"bottleneck adapters of model type {kind!r} are not supported",
            hint=f"known placements: {known}",
        )
    for ending, output in table.items():
        if location.endswith(ending):
            return location.removesuffix(ending) + output, kind in _POST_LN
    raise CheckpointError(f"an adapter at {location!r} has no known place in a {kind}")
