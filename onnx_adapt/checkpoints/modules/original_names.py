"""Names of modules in the code that a model was published with, in those of diffusers.

sd-scripts trains SDXL with the names of Stability's code, and Flux with those of Black Forest
Labs; exports are mostly made with diffusers. All texts have underscores for dots.
"""

from __future__ import annotations

import re

_LAYERS = 2
"""Residual layers in each block of the U-Nets of Stable Diffusion and SDXL."""

_INSIDE = ("resnets", "attentions", "upsamplers")

_RESNET = (
    (r"_in_layers_0", "_norm1"),
    (r"_in_layers_2", "_conv1"),
    (r"_emb_layers_1", "_time_emb_proj"),
    (r"_out_layers_0", "_norm2"),
    (r"_out_layers_3", "_conv2"),
    (r"_skip_connection", "_conv_shortcut"),
)
_OUTSIDE = (
    (r"time_embed_0", "time_embedding_linear_1"),
    (r"time_embed_2", "time_embedding_linear_2"),
    (r"label_emb_0_0", "add_embedding_linear_1"),
    (r"label_emb_0_2", "add_embedding_linear_2"),
    (r"input_blocks_0_0", "conv_in"),
    (r"out_0", "conv_norm_out"),
    (r"out_2", "conv_out"),
)


def unet_in_diffusers(text: str) -> str:
    """The name in diffusers of a module of Stability's U-Net.

    Blocks of that code hold one residual layer each, those of diffusers two (or three on the
    way up): input block 4 is the first layer of down block 1, as (4 - 1) / 3 = 1, rest 0.

    Example:
        >>> unet_in_diffusers("input_blocks_4_1_proj_in")
        'down_blocks_1_attentions_0_proj_in'
        >>> unet_in_diffusers("output_blocks_2_2_conv")
        'up_blocks_0_upsamplers_0_conv'
    """
    for pattern, name in _OUTSIDE:
        if re.fullmatch(pattern, text):
            return name
    match = re.match(r"(input|output)_blocks_(\d+)_(\d+)_|(middle)_block_(\d)_", text)
    if match is None:
        return text
    side = match[1] or match[4]
    if side == "middle":
        at = int(match[5])
        block = "mid_block_attentions_0" if at == 1 else f"mid_block_resnets_{at // 2}"
        rest = text[match.end() :]
    else:
        block, rest = _block(side, int(match[2]), int(match[3]), text[match.end() :])
    if "resnets" in block:
        for pattern, name in _RESNET:
            rest = re.sub(rf"^{pattern[1:]}$", name[1:], rest)
    return f"{block}_{rest}"


def _block(side: str, number: int, inner: int, rest: str) -> tuple[str, str]:
    """The block in diffusers of a numbered block on the way down or up."""
    at, layer = divmod(number - (side == "input"), _LAYERS + 1)
    if side == "input" and rest == "op":
        return f"down_blocks_{at}_downsamplers_0", "conv"
    kind = _INSIDE[min(inner, 2)]
    if side == "output" and rest == "conv":
        return f"up_blocks_{at}_upsamplers_0", "conv"
    way = "down" if side == "input" else "up"
    return f"{way}_blocks_{at}_{kind}_{layer}", rest


_FLUX = (
    (r"double_blocks_(\d+)_img_attn_qkv", r"transformer_blocks_\1_attn_to_qkv"),
    (r"double_blocks_(\d+)_img_attn_proj", r"transformer_blocks_\1_attn_to_out_0"),
    (r"double_blocks_(\d+)_img_mlp_0", r"transformer_blocks_\1_ff_net_0_proj"),
    (r"double_blocks_(\d+)_img_mlp_2", r"transformer_blocks_\1_ff_net_2"),
    (r"double_blocks_(\d+)_img_mod_lin", r"transformer_blocks_\1_norm1_linear"),
    (r"double_blocks_(\d+)_txt_attn_qkv", r"transformer_blocks_\1_attn_add_qkv_proj"),
    (r"double_blocks_(\d+)_txt_attn_proj", r"transformer_blocks_\1_attn_to_add_out"),
    (r"double_blocks_(\d+)_txt_mlp_0", r"transformer_blocks_\1_ff_context_net_0_proj"),
    (r"double_blocks_(\d+)_txt_mlp_2", r"transformer_blocks_\1_ff_context_net_2"),
    (r"double_blocks_(\d+)_txt_mod_lin", r"transformer_blocks_\1_norm1_context_linear"),
    (r"single_blocks_(\d+)_linear1", r"single_transformer_blocks_\1_to_qkv_mlp"),
    (r"single_blocks_(\d+)_linear2", r"single_transformer_blocks_\1_proj_out"),
    (r"single_blocks_(\d+)_modulation_lin", r"single_transformer_blocks_\1_norm_linear"),
    (r"img_in", "x_embedder"),
    (r"txt_in", "context_embedder"),
    (r"time_in_in_layer", "time_text_embed_timestep_embedder_linear_1"),
    (r"time_in_out_layer", "time_text_embed_timestep_embedder_linear_2"),
    (r"vector_in_in_layer", "time_text_embed_text_embedder_linear_1"),
    (r"vector_in_out_layer", "time_text_embed_text_embedder_linear_2"),
    (r"guidance_in_in_layer", "time_text_embed_guidance_embedder_linear_1"),
    (r"guidance_in_out_layer", "time_text_embed_guidance_embedder_linear_2"),
    (r"final_layer_linear", "proj_out"),
)


def flux_in_diffusers(text: str) -> str:
    """The name in diffusers of a module of Flux.

    The modulation of the last layer has no name there: diffusers keeps its scale and shift in
    another order.

    Example:
        >>> flux_in_diffusers("double_blocks_7_img_mlp_0")
        'transformer_blocks_7_ff_net_0_proj'
    """
    for pattern, name in _FLUX:
        if match := re.fullmatch(pattern, text):
            return match.expand(name)
    return text
