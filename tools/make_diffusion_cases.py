"""Write ``tests/diffusion/``: a tiny diffusion pipeline, and adapters of it in every form.

The U-Net and the transformer are diffusers', the text encoder is transformers'; they are
exported as optimum exports them. The adapters are made by LyCORIS and diffusers themselves,
with random weights, and PyTorch says what the models compute with them on. What is written::

    pipeline/                  unet, text_encoder and vae_decoder, each with a model.onnx
    transformer.onnx           a Flux
    inputs.npz                 inputs of all models by name, after the model's name
    <adapter>.safetensors      an adapter; a folder where diffusers writes one
    expected.npz               ``<adapter>.<model>``; ``base.<model>`` without an adapter
    formulas.safetensors       single layers: ``<case>.weight``, ``.bias``, ``.trained``,
                               ``.trained_bias``, and the tensors ``<case>:<name>``
    names.json                 names of SDXL and Flux, and diffusers' names for them

The environment has torch, transformers, peft, diffusers and lycoris-lora. From the root of the
repository::

    PYTHONHASHSEED=0 /tmp/diffusion/bin/python tools/make_diffusion_cases.py
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from case_making import clean_folder, generator
from diffusers.loaders import lora_conversion_utils as conversion
from diffusers.utils.state_dict_utils import (
    UNET_TO_DIFFUSERS,
    convert_unet_state_dict_to_peft,
)
from lycoris import kohya, wrapper
from lycoris.config import PRESET
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "diffusion"
Tensors = dict[str, torch.Tensor]


def unet() -> nn.Module:
    """Return a U-Net with one attention."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )


def text_encoder() -> nn.Module:
    """Return the text encoder of a CLIP."""
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.CLIPTextModel(config)


def transformer() -> nn.Module:
    """Return a Flux with one double and one single block."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


class Decoder(nn.Module):
    """The decoder of a VAE, as optimum exports it."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(4,),
            norm_num_groups=2,
            layers_per_block=1,
            latent_channels=4,
            mid_block_add_attention=False,
        )

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Decode."""
        return self.vae.decode(latent_sample, return_dict=False)[0]


MODELS = {
    "unet": unet,
    "text_encoder": text_encoder,
    "transformer": transformer,
    "vae_decoder": Decoder,
}
INPUTS: dict[str, Tensors] = {
    "unet": {
        "sample": torch.randn(2, 4, 8, 8, generator=generator("sample")),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator("states")),
    },
    "text_encoder": {"input_ids": torch.randint(2, 64, (2, 7), generator=generator("ids"))},
    "transformer": {
        "hidden_states": torch.randn(1, 6, 4, generator=generator("hidden")),
        "encoder_hidden_states": torch.randn(1, 3, 8, generator=generator("text")),
        "pooled_projections": torch.randn(1, 8, generator=generator("pooled")),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(18.0).reshape(6, 3),
        "txt_ids": torch.zeros(3, 3),
    },
    "vae_decoder": {"latent_sample": torch.randn(1, 4, 4, 4, generator=generator("latent"))},
}


def build(name: str) -> nn.Module:
    """Return a model with the same random weights every time."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator(key))
        value.data += 0.1 * noise
        value.requires_grad_(False)
    return model


def output(name: str, model: nn.Module) -> np.ndarray:
    """What a model computes."""
    extra = {"return_dict": False} if name != "vae_decoder" else {}
    with torch.no_grad():
        found = model(**INPUTS[name], **extra)
    return (found if isinstance(found, torch.Tensor) else found[0]).numpy()


def export(name: str, path: Path) -> None:
    """Export a model with TorchScript's tracer, at fixed sizes: that is smallest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model, inputs = build(name), INPUTS[name]
    nn.functional.rms_norm = torch.rms_norm = rms_norm  # type: ignore[assignment]
    torch.onnx.export(
        model,
        tuple(inputs.values()),
        path,
        dynamo=False,
        opset_version=17,
        input_names=list(inputs),
        output_names=["out"],
    )


def rms_norm(
    x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """The RMSNorm of PyTorch, in operators that its older exporter knows."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (eps or 1e-6))
    return normed if weight is None else normed * weight


def random(name: str, shape: Any) -> torch.Tensor:
    """Random numbers that depend on a name."""
    return 0.3 * torch.randn(tuple(shape), generator=generator(name))


def fill(module: nn.Module) -> None:
    """Give every trained tensor of a network random numbers."""
    for key, value in module.named_parameters():
        if value.requires_grad or "lora" in key or "oft" in key:
            shift = 1.0 if "dora_scale" in key or "rescale" in key else 0.0
            size = 3 if "hada" in key else 1  # four of them are multiplied
            value.data = shift + size * random(key, value.shape)


def lycoris(algo: str, only: str = "", **settings: Any) -> tuple[Tensors, dict[str, Any]]:
    """Train nothing: an adapter of LyCORIS with random weights, and PyTorch's answers."""
    models = {"text_encoder": build("text_encoder"), "unet": build("unet")}
    PRESET["full"]["unet_target_name"] = ["conv_in", "conv_out"]  # it has some names twice
    network = kohya.create_network(
        1.0, 2, 1, None, models["text_encoder"], models["unet"], algo=algo, **settings
    )
    if only:
        network.unet_loras = [m for m in network.unet_loras if re.search(only, m.lora_name)]
        network.text_encoder_loras = []
    network.apply_to(models["text_encoder"], models["unet"], bool(not only), True)
    fill(network)
    tensors = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    return tensors, {name: output(name, model) for name, model in models.items()}


LYCORIS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "locon": ("locon", "", {"conv_dim": 2, "conv_alpha": 1, "use_tucker": True}),
    "dora": ("locon", "attn|resnets_0_conv1", {"conv_dim": 2, "dora_wd": True}),
    "dora_by_input": (
        "locon",
        "attn|resnets_0_conv1",
        {"conv_dim": 2, "dora_wd": True, "wd_on_output": False},
    ),
    "lokr": ("lokr", "attn|resnets_0_conv1", {"factor": 2, "decompose_both": True}),
    "loha": ("loha", "attn|resnets_0_conv1", {"use_tucker": True}),
    "full": ("full", "attn1|norm|resnets_0_conv1", {"train_norm": True}),
}
"""Adapters by LyCORIS: algorithm, which modules of the U-Net alone, and settings."""


def in_diffusers(path: Path) -> dict[str, Any]:
    """Write LoRA of diffusers with its settings as metadata, and return the answers."""
    models, layers, settings, answers = {}, {}, {}, {}
    targets = {
        "unet": ["to_q", "to_v", "to_out.0", "conv1"],
        "text_encoder": ["q_proj", "v_proj"],
        "transformer": ["to_q", "add_k_proj", "proj_mlp"],
    }
    for name, where in targets.items():
        model = models[name] = build(name)
        config = LoraConfig(
            r=2, lora_alpha=6, target_modules=where, use_dora=name == "text_encoder"
        )
        inject_adapter_in_model(config, model)  # as add_adapter of diffusers does
        model.peft_config = {"default": config}
        for key, value in model.named_parameters():
            if ".lora_" in key:
                shift = 1.0 if "magnitude" in key else 0.0
                value.data = shift + random(key, value.shape)
        layers[name] = get_peft_model_state_dict(model)
        settings[f"{name}_lora_adapter_metadata"] = config.to_dict()
        answers[name] = output(name, model)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        path / "diffusers",
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=settings["unet_lora_adapter_metadata"],
        text_encoder_lora_adapter_metadata=settings["text_encoder_lora_adapter_metadata"],
    )
    diffusers.FluxPipeline.save_lora_weights(
        path / "diffusers_flux", transformer_lora_layers=layers["transformer"]
    )
    # Without its settings alpha is the rank, as diffusers reads it.
    flux = build("transformer")
    flux.load_lora_adapter(
        load_file(path / "diffusers_flux/pytorch_lora_weights.safetensors"),
        prefix="transformer",
    )
    return {
        "diffusers": {name: answers[name] for name in ("unet", "text_encoder")},
        "diffusers_flux": {"transformer": output("transformer", flux)},
    }


def before_peft(path: Path) -> dict[str, Any]:
    """Write LoRA of the U-Net with the keys that diffusers had in 2023.

    Its attention processors of that time are gone, so the keys are renamed here by diffusers'
    own table for them, in reverse.
    """
    model = build("unet")
    shapes = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if re.search(r"attn1\.(to_q|to_out\.0)$", name)
    }
    new: Tensors = {}
    for name, (inputs, outputs) in shapes.items():
        new[f"{name}.lora_A.weight"] = random(f"old {name} A", (2, inputs))
        new[f"{name}.lora_B.weight"] = random(f"old {name} B", (outputs, 2))
    old: Tensors = {}
    for key, value in new.items():
        for before, after in UNET_TO_DIFFUSERS.items():
            if after in key and "_lora." in before:
                key = key.replace(".attn1", ".attn1.processor").replace(after, before)
        old[key] = value
    assert convert_unet_state_dict_to_peft(old).keys() == new.keys()
    save_file(old, path / "before_peft.safetensors")
    model.load_lora_adapter({f"unet.{k}": v for k, v in new.items()}, prefix="unet")
    return {"unet": output("unet", model)}


def flux_of_sd_scripts(path: Path) -> dict[str, Any]:
    """Write LoRA of a Flux with the names of sd-scripts; diffusers' own converter reads them.

    That converter has the width of the real model for ``linear1``, so its two sizes are put
    to those of the tiny one.
    """
    sizes = {
        "double_blocks_0_img_attn_qkv": (8, 24),
        "double_blocks_0_txt_attn_qkv": (8, 24),
        "double_blocks_0_img_attn_proj": (8, 8),
        "double_blocks_0_img_mlp_0": (8, 32),
        "double_blocks_0_txt_mlp_2": (32, 8),
        "double_blocks_0_img_mod_lin": (8, 48),
        "single_blocks_0_linear1": (8, 56),
        "single_blocks_0_linear2": (40, 8),
        "single_blocks_0_modulation_lin": (8, 24),
    }
    tensors: Tensors = {}
    for name, (inputs, outputs) in sizes.items():
        key = f"lora_unet_{name}"
        tensors[f"{key}.lora_down.weight"] = random(f"{name} down", (2, inputs))
        tensors[f"{key}.lora_up.weight"] = random(f"{name} up", (outputs, 2))
        tensors[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path / "flux.safetensors", {"ss_base_model_version": "flux1"})
    real = conversion._convert_kohya_flux_lora_to_diffusers
    source = inspect.getsource(real).replace("3072, 3072, 3072, 12288", "8, 8, 8, 32")
    scope = vars(conversion).copy()
    exec(source, scope)
    converted = scope[real.__name__](dict(tensors))
    model = build("transformer")
    model.load_lora_adapter(converted, prefix="transformer")
    return {"transformer": output("transformer", model)}


def layers() -> Iterator[tuple[str, nn.Module]]:
    """A Linear and a Conv2d."""
    torch.manual_seed(0)
    yield "linear", nn.Linear(12, 8)
    yield "conv", nn.Conv2d(6, 8, 3)


FORMULAS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("locon", {}),
    "lora_mid": ("locon", {"use_tucker": True}),
    "lora_dora": ("locon", {"weight_decompose": True}),
    "lora_dora_by_input": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "lora_rs": ("locon", {"rs_lora": True}),
    "loha": ("loha", {}),
    "loha_mid": ("loha", {"use_tucker": True}),
    "loha_dora": ("loha", {"weight_decompose": True}),
    "lokr": ("lokr", {"factor": 2}),
    "lokr_both": ("lokr", {"factor": 4, "lora_dim": 1, "decompose_both": True}),
    "lokr_whole": ("lokr", {"factor": 2, "full_matrix": True}),
    "lokr_mid": ("lokr", {"factor": 2, "lora_dim": 1, "use_tucker": True}),
    "lokr_dora_by_input": (
        "lokr",
        {"factor": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "oft": ("diag-oft", {}),
    "oft_limited": ("diag-oft", {"constraint": 0.05, "rescaled": True}),
    "boft": ("boft", {"rescaled": True}),
    "glora": ("glora", {}),
    "ia3": ("ia3", {}),
    "ia3_on_input": ("ia3", {"train_on_input": True}),
    "full": ("full", {}),
}


def formulas() -> dict[str, np.ndarray]:
    """Single layers adapted by LyCORIS: their tensors, and the weights that they act with."""
    found: dict[str, np.ndarray] = {}
    for kind, base in layers():
        for name, (algo, settings) in FORMULAS.items():
            if (kind == "linear" and name.endswith("_mid")) or (
                kind == "conv" and "ia3" in name
            ):
                continue
            case = f"{kind}_{name}"
            torch.manual_seed(1)
            layer = type(base)(*((12, 8) if kind == "linear" else (6, 8, 3)))
            weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
            given = {"lora_dim": 2, "alpha": 1, **settings}
            adapter = wrapper.network_module_dict[algo]("", layer, 1.0, **given)
            adapter.eval()
            for key, value in adapter.named_parameters():
                shift = 1.0 if "dora_scale" in key or "rescale" in key else 0.0
                value.data = shift + random(f"{case} {key}", value.shape)
            adapter.apply_to()
            tensors = adapter.state_dict()
            found |= {f"{case}:{key}": v.detach().numpy() for key, v in tensors.items()}
            found |= acting(case, layer, weight, bias)
    return found


def acting(case: str, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> dict:
    """The weight and bias that a layer acts with: what it makes of ones, and of nothing."""
    inputs = weight[0].numel()
    ones = torch.eye(inputs).reshape(inputs, *weight.shape[1:])
    with torch.no_grad():
        nothing = layer(torch.zeros_like(ones[:1])).reshape(-1)
        trained = layer(ones).reshape(inputs, -1) - nothing
    return {
        f"{case}.weight": weight.numpy(),
        f"{case}.bias": bias.numpy(),
        f"{case}.trained": trained.T.reshape(weight.shape).contiguous().numpy(),
        f"{case}.trained_bias": nothing.numpy(),
    }


def names() -> dict[str, str]:
    """Names of SDXL's U-Net in sd-scripts, and in diffusers by its own converter."""
    with torch.device("meta"):
        real = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
        )
    there = {name for name, module in real.named_modules()}
    inner = [
        *("0_in_layers_2", "0_emb_layers_1", "0_out_layers_3", "0_skip_connection"),
        *("1_proj_in", "1_proj_out", "1_transformer_blocks_0_attn1_to_q"),
        *("1_transformer_blocks_1_attn2_to_out_0", "1_transformer_blocks_0_ff_net_0_proj"),
        *("1_transformer_blocks_0_ff_net_2", "0_op", "1_conv", "2_conv"),
    ]
    keys = [
        f"{side}_blocks_{n}_{x}"
        for side in ("input", "output")
        for n in range(9)
        for x in inner
    ]
    keys += [
        f"middle_block_{n}_{x[2:]}" for n in range(3) for x in inner if x[0] == "01"[n % 2]
    ]
    keys += ["time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2"]
    keys += ["input_blocks_0_0"]
    config = type("Config", (), {"layers_per_block": 2})
    found: dict[str, str] = {}
    for key in keys:
        full = f"lora_unet_{key}.lora_down.weight"
        try:
            (mapped,) = conversion._maybe_map_sgm_blocks_to_diffusers({full: 0}, config)
            name = conversion._convert_unet_lora_key(mapped)
        except (ValueError, IndexError):
            continue
        name = name.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora")
        name = re.sub(r"(_lora|\.lora)\.down\.weight$", "", name)
        if name in there:
            found[key] = name
    return found


def main() -> None:
    """Write everything."""
    warnings.filterwarnings("ignore")
    folder = clean_folder(FOLDER)
    for name in ("unet", "text_encoder", "vae_decoder"):
        export(name, folder / "pipeline" / name / "model.onnx")
    (folder / "pipeline" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline"}), encoding="utf-8"
    )
    export("transformer", folder / "transformer.onnx")
    inputs = {
        f"{m}.{key}": v.numpy() for m, given in INPUTS.items() for key, v in given.items()
    }
    np.savez_compressed(folder / "inputs.npz", **inputs)
    answers: dict[str, Mapping[str, Any]] = {
        "base": {name: output(name, build(name)) for name in MODELS}
    }
    for name, (algo, only, settings) in LYCORIS.items():
        tensors, answers[name] = lycoris(algo, only, **settings)
        save_file(tensors, folder / f"{name}.safetensors", {"ss_base_model_version": "sd_v1"})
    answers |= in_diffusers(folder)
    answers["before_peft"] = before_peft(folder)
    answers["flux"] = flux_of_sd_scripts(folder)
    found = {f"{a}.{m}": value for a, given in answers.items() for m, value in given.items()}
    np.savez_compressed(folder / "expected.npz", **found)
    save_numpy(formulas(), folder / "formulas.safetensors")  # smaller than a .npz of scalars
    (folder / "names.json").write_text(json.dumps(names(), indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
