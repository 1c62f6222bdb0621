"""The keys of adapters for image generation: part of the pipeline, module, and tensor.

Trainers write one thing in many ways. All of these are A of LoRA on `to_q` of the U-Net:

    lora_unet_down_blocks_0_attentions_0_..._to_q.lora_down.weight     sd-scripts, LyCORIS
    unet.down_blocks.0.attentions.0....to_q.lora_A.weight              diffusers
    unet.down_blocks.0.attentions.0....to_q.lora.down.weight           diffusers before PEFT
    down_blocks.0.attentions.0....processor.to_q_lora.down.weight      diffusers in 2023
    diffusion_model.input_blocks.1.1....to_q.lora_A.weight             ComfyUI

sd-scripts writes the dots of a module's path as underscores. They stay here; the paths of a
graph tell which were dots (`onnx_adapt.checkpoints.modules.underscored`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_PARTS = (
    (r"lora_unet_|lora_unet\.|unet\.|(model\.)?diffusion_model\.", "unet"),
    (r"lora_te1?_|text_encoder\.|text_encoders\.clip_l\.(transformer\.)?", "text_encoder"),
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.(transformer\.)?", "text_encoder_2"),
    (r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.(transformer\.)?", "text_encoder_3"),
    (r"lora_transformer_|transformer\.(?!h\.)", "transformer"),
    (r"lora_prior_unet_|prior\.", "prior"),
)
"""How keys begin, and the part of a pipeline that they are of, as diffusers calls it."""

_WHOLE_MODEL = "lycoris_"
"""How keys begin that LyCORIS wrote for one model of any kind."""

_TRANSFORMER = re.compile(r"(double|single|joint|transformer|single_transformer)_blocks[._]\d")
"""What modules of a diffusion transformer begin with; sd-scripts calls it a U-Net as well."""

_SPELLINGS = {
    "lora_down": r"\.lora_down|\.lora_A|\.lora\.down|_lora\.down|\.lora_linear_layer\.down",
    "lora_up": r"\.lora_up|\.lora_B|\.lora\.up|_lora\.up|\.lora_linear_layer\.up",
    "lora_mid": r"\.lora_mid",
    "lora_up.bias": r"\.lora_B(\.\w+)?\.bias",
    "dora_scale": r"\.dora_scale|\.lora_magnitude_vector",
    **{f"{x}{n}": rf"\.{x}{n}" for x in "ab" for n in "12"},
    "bm": r"\.bm",
}
"""How the names of tensors are written, before `.weight`."""

_PLAIN = (
    *("alpha", "diff", "diff_b", "set_weight", "w_norm", "b_norm", "reshape_weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    *("lokr_t1", "lokr_t2", "oft_blocks", "rescale", "on_input", "weight"),
)
"""The names of tensors that are written in one way."""

_ENDINGS = {
    **{
        name: re.compile(rf"({text})(\.\w+)?\.weight$|({text})$")
        for name, text in _SPELLINGS.items()
        if name != "lora_up.bias"
    },
    "lora_up.bias": re.compile(rf"({_SPELLINGS['lora_up.bias']})$"),
    **{name: re.compile(rf"\.{name}$") for name in _PLAIN},
}

_OLD_NAMES = {
    "text": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
    "": {"to_out": "to_out.0"},
}
"""What diffusers called the layers of an attention in keys with `_lora`, and their names."""


def tensor_of(key: str) -> tuple[str, str] | None:
    """The path of a key without its tensor, and the tensor's name; None if it is not known.

    Example:
        >>> tensor_of("lora_unet_mid_block_conv.lora_down.weight")
        ('lora_unet_mid_block_conv', 'lora_down')
        >>> tensor_of("unet.attn1.processor.to_out_lora.up.weight")
        ('unet.attn1.to_out.0', 'lora_up')
    """
    for name, pattern in _ENDINGS.items():
        match = pattern.search(key)
        if match is not None and match.start():
            path = key[: match.start()].replace(".processor.", ".")
            return (_newer(path) if match[0].startswith("_") else path), name
    return None


def _newer(path: str) -> str:
    """The path of a layer that diffusers in 2023 called after its attention processor."""
    around, _, leaf = path.rpartition(".")
    names = _OLD_NAMES["text" if path.startswith("text_encoder") else ""]
    return f"{around}.{names.get(leaf, leaf)}"


def module_of(path: str) -> tuple[str, str]:
    """The part of a pipeline that a path is of, or '', and the module inside it.

    Example:
        >>> module_of("lora_te1_text_model_encoder_layers_0_mlp_fc1")
        ('text_encoder', 'text_model_encoder_layers_0_mlp_fc1')
    """
    for pattern, part in _PARTS:
        match = re.match(pattern, path)
        if match is not None:
            module = path[match.end() :]
            is_dit = part == "unet" and _TRANSFORMER.match(module)
            return ("transformer" if is_dit else part), module
    return "", path.removeprefix(_WHOLE_MODEL)


def has_prefix(path: str) -> bool:
    """Whether a path begins as those of adapters for image generation do, and no others."""
    part, module = module_of(path)
    if part == "transformer":  # language models have one as well
        return _TRANSFORMER.match(module) is not None
    return bool(part) or path.startswith(_WHOLE_MODEL)


def sort_tensors(tensors: Mapping[str, Array]) -> dict[tuple[str, str], dict[str, Array]]:
    """Sort tensors by part and module.

    Raises:
        CheckpointError: If a key is of no known kind.
    """
    found: dict[tuple[str, str], dict[str, Array]] = {}
    for key, value in tensors.items():
        known = tensor_of(key)
        if known is None:
            raise CheckpointError(
                f"the file has {key!r}, which is of no known kind",
                hint="is it more than an adapter? tensors of other kinds are not read",
            )
        path, name = known
        parts = found.setdefault(module_of(path), {})
        if name in parts:
            raise CheckpointError(f"the file has {name} of {path!r} twice, in two spellings")
        parts[name] = value
    return found


def parts_in(modules: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The parts of a pipeline that modules are of, in their order."""
    return tuple(part for part in dict.fromkeys(part for part, _ in modules) if part)


def path_of(part: str, module: str) -> str:
    """The path of a module in its pipeline."""
    return f"{part}.{module}" if part else module
