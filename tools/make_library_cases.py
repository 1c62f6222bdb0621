"""Write cases of adapters that libraries beside PEFT and AdapterHub saved to ``tests/cases/``.

What the files are is told in ``case_making.py``; the bases are those that
``make_peft_cases.py`` writes. Each adapter is made, saved and merged by its library itself,
and PyTorch computes with the weights that it merged. ``edifice`` and ``nemo`` are imitations,
because Axon runs on the Erlang VM, and NeMo needs Apex and gigabytes of libraries: their
functions here say what they follow. To make the environment
and run the script, from the root of the repository::

    python -m venv /tmp/libraries
    /tmp/libraries/bin/pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    /tmp/libraries/bin/pip install onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
    /tmp/libraries/bin/pip install gguf==0.19.0 loralib==0.1.2 'mlx-lm[cpu]==0.32.2'
    /tmp/libraries/bin/pip install litgpt==0.5.13 torchtune==0.6.1 keras-hub==0.32.0
    PYTHONHASHSEED=0 /tmp/libraries/bin/python tools/make_library_cases.py --llama-cpp DIR

``DIR`` is a checkout of llama.cpp, whose ``convert_lora_to_gguf.py`` writes the GGUF files.
``--only NAME`` writes the cases with ``NAME`` in their names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from case_making import (
    DEFAULT_FOLDER,
    CaseFacts,
    clean_folder,
    compute,
    generator,
    make,
    train,
    write_case,
)
from make_peft_cases import BASES
from safetensors.torch import save_file
from torch import nn

State = dict[str, torch.Tensor]

RANK, ALPHA, STD = 4, 6, 0.3
LLAMA = {"hidden": 32, "layers": 2, "heads": 4, "groups": 2, "mlp": 64, "length": 16}


def noise(name: str, *shape: int) -> np.ndarray:
    """Return the values of a trained tensor, by its name."""
    return (torch.randn(shape, generator=generator(name)) * STD).numpy()


def train_all(model: nn.Module, part: str = "lora_") -> None:
    """Give all parameters with ``part`` in their names the values of a long training."""
    for name, parameter in model.named_parameters():
        if part in name:
            train(parameter, name, STD)


def mlx_adapter(model: nn.Module, folder: Path, kind: str) -> State:
    """LoRA or DoRA by MLX-LM on its own Llama, and the weights that it fuses."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    theirs = llama.Model(llama.ModelArgs.from_dict(model.config.to_dict()))
    weights = {name: mx.array(value.numpy()) for name, value in model.state_dict().items()}
    theirs.load_weights(list(theirs.sanitize(weights).items()))
    theirs.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    settings = {"rank": RANK, "scale": 1.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(theirs, LLAMA["layers"], settings, use_dora=kind == "dora")
    trained = {}
    for name, value in tree_flatten(theirs.trainable_parameters()):
        start = torch.from_numpy(np.array(value))
        train(start, f"{name} magnitude" if name.endswith(".m") else name, STD)
        trained[name] = mx.array(start.numpy())
    theirs.update(tree_unflatten(list(trained.items())))
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    facts = {
        "fine_tune_type": kind,
        "lora_parameters": settings,
        "num_layers": LLAMA["layers"],
    }
    save_config(facts, folder / "adapter_config.json")
    return {
        f"{name}.weight": torch.from_numpy(np.array(module.fuse().weight))
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_a")
    }


def torchtune_without_nf4() -> None:
    """Let torchtune be imported beside a torchao that has moved its NF4, which is not used."""
    moved = types.ModuleType("torchao.dtypes.nf4tensor")
    moved.NF4Tensor = type("NF4Tensor", (), {})
    moved.linear_nf4 = moved.to_nf4 = moved.implements = lambda *_args, **_kw: lambda f: f
    sys.modules.setdefault("torchao", types.ModuleType("torchao"))
    sys.modules["torchao.dtypes"] = types.ModuleType("torchao.dtypes")
    sys.modules[moved.__name__] = moved


def torchtune_adapter(model: nn.Module, folder: Path, dora: bool) -> State:
    """LoRA or DoRA by torchtune on its own Llama, saved in its own form."""
    torchtune_without_nf4()
    from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
    from torchtune.models.llama3._component_builders import lora_llama3
    from torchtune.modules.peft import get_adapter_state_dict, get_merged_lora_ckpt

    heads, groups, width = LLAMA["heads"], LLAMA["groups"], LLAMA["hidden"]
    theirs = lora_llama3(
        ["q_proj", "k_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=model.config.vocab_size,
        num_layers=LLAMA["layers"],
        num_heads=heads,
        num_kv_heads=groups,
        embed_dim=width,
        max_seq_len=LLAMA["length"],
        intermediate_dim=LLAMA["mlp"],
        lora_rank=RANK,
        lora_alpha=ALPHA,
        use_dora=dora,
    )
    theirs.load_state_dict(hf_to_tune(model.state_dict(), heads, groups, width), strict=False)
    train_all(theirs)
    for module in theirs.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    train_all(theirs, "magnitude")
    torch.save(get_adapter_state_dict(theirs.state_dict()), folder / "adapter_0.pt")
    settings = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    base = {
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": width,
    }
    (folder / "config.json").write_text(json.dumps(base))
    merged = get_merged_lora_ckpt(theirs.state_dict(), RANK, ALPHA)
    return tune_to_hf(merged, heads, groups, width)


def torchtune_for_peft(model: nn.Module, folder: Path) -> State:
    """The same adapter as torchtune writes it for PEFT."""
    merged = torchtune_adapter(model, folder, dora=False)
    from torchtune.models.convert_weights import (
        tune_to_peft_adapter_config,
        tune_to_peft_adapter_weights,
    )

    own = folder / "adapter_0.pt"
    sizes = LLAMA["heads"], LLAMA["groups"], LLAMA["hidden"]
    tensors = tune_to_peft_adapter_weights(torch.load(own), *sizes)
    save_file({key: value.contiguous() for key, value in tensors.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    own.rename(folder / "adapter_model.pt")  # torchtune writes both
    modules = ["q_proj", "k_proj", "output_proj", "w1", "w2", "w3"]
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "peft_type": "LORA"}
    settings = tune_to_peft_adapter_config(settings)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return merged


def litgpt_adapter(model: nn.Module, folder: Path) -> State:
    """LoRA by LitGPT of q, v, the MLP and the head, on its own GPT with Llama's form."""
    import lightning
    import yaml
    from litgpt.config import Config as BaseConfig
    from litgpt.finetune.lora import save_lora_checkpoint
    from litgpt.lora import GPT, Config, merge_lora_weights
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
    from litgpt.utils import save_config

    lora = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "lora_query": True}
    lora |= {"lora_key": False, "lora_value": True, "lora_projection": True}
    lora |= {"lora_mlp": True, "lora_head": True}
    config = Config(
        name="tiny", n_layer=LLAMA["layers"], n_head=LLAMA["heads"], n_embd=LLAMA["hidden"],
        n_query_groups=LLAMA["groups"], intermediate_size=LLAMA["mlp"], bias=False,
        vocab_size=model.config.vocab_size, padded_vocab_size=model.config.vocab_size,
        block_size=LLAMA["length"], norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0, parallel_residual=False, **lora,
    )  # fmt: skip
    weights: State = {}
    copy_weights_hf_llama(config, {}, weights, dict(model.state_dict()))
    theirs = GPT(config)
    theirs.load_state_dict(weights, strict=False)
    train_all(theirs)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    save_lora_checkpoint(fabric, theirs, folder / "lit_model.pth.lora")
    plain_config = BaseConfig(
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(BaseConfig) if f.init}
    )
    save_config(plain_config, folder)
    (folder / "hyperparameters.yaml").write_text(yaml.dump({"precision": None} | lora))
    merge_lora_weights(theirs)
    plain = {
        name.replace("linear.", ""): value
        for name, value in theirs.state_dict().items()
        if "lora_" not in name
    }
    merged: State = {}
    copy_weights_llama(config, merged, plain)
    return merged


def convert_to_gguf(
    model: nn.Module, adapted: peft.PeftModel, scratch: Path, kind: str
) -> Path:
    """Convert an adapter with llama.cpp; its numbers have the type ``kind``."""
    adapted.save_pretrained(scratch / "peft")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(scratch / "base")
    script, out = LLAMA_CPP / "convert_lora_to_gguf.py", scratch / "adapter.gguf"
    command = [sys.executable, script, "--base", scratch / "base", "--outtype", kind]
    subprocess.run([*command, "--outfile", out, scratch / "peft"], check=True)
    return out


def gguf_adapter(model: nn.Module, folder: Path, targets: list[str], quant: str) -> State:
    """LoRA by PEFT, converted by llama.cpp, and the weights that PEFT merges."""
    scratch = clean_folder(folder.parent / "scratch")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    train_all(adapted)
    convert_to_gguf(model, adapted, scratch, quant).replace(folder / "adapter.gguf")
    wanted = ("model_type", "num_attention_heads", "num_key_value_heads")
    base = {name: getattr(model.config, name, None) for name in wanted}
    (folder / "config.json").write_text(json.dumps(base))
    subprocess.run(["rm", "-r", scratch], check=True)
    return adapted.merge_and_unload().state_dict()


def keras_adapter(model: nn.Module, folder: Path) -> State:
    """LoRA by KerasHub of queries, values and output projections, on its own Llama 3."""
    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import keras_hub

    theirs = keras_hub.models.Llama3Backbone(
        vocabulary_size=model.config.vocab_size,
        num_layers=LLAMA["layers"],
        num_query_heads=LLAMA["heads"],
        num_key_value_heads=LLAMA["groups"],
        hidden_dim=LLAMA["hidden"],
        intermediate_dim=LLAMA["mlp"],
    )
    parts = {"query": "q_proj", "value": "v_proj", "attention_output": "o_proj"}
    theirs.enable_lora(RANK, list(parts))
    layers = [layer for layer in theirs._flatten_layers(include_self=False) if layer.weights]
    state, merged = model.state_dict(), {}
    modules, seen = {}, dict.fromkeys(parts, 0)
    for number in theirs._lora_enabled_layers:
        layer = layers[number]
        module = f"model.layers.{seen[layer.name]}.self_attn.{parts[layer.name]}"
        seen[layer.name] += 1
        modules[str(number)] = module
        weight = state[f"{module}.weight"]
        layer.lora_kernel_a.assign(noise(f"{module}.a", *layer.lora_kernel_a.shape))
        layer.lora_kernel_b.assign(noise(f"{module}.b", *layer.lora_kernel_b.shape))
        layer._kernel.assign(weight.T.reshape(tuple(layer._kernel.shape)))
        merged[f"{module}.weight"] = layer.kernel.detach().reshape(weight.T.shape).T
    theirs.save_lora_weights(str(folder / "tiny.lora.h5"))
    (folder / "adapter_config.json").write_text(json.dumps({"modules": modules}))
    return merged


def loralib_adapter(model: nn.Module, folder: Path) -> State:
    """LoRA by loralib in place of Linears of BERT; the configuration is put there by hand."""
    import loralib

    targets = ("query", "intermediate.dense")
    names = [name for name, _ in model.named_modules() if name.endswith(targets)]
    for name in names:
        linear = model.get_submodule(name)
        theirs = loralib.Linear(linear.in_features, linear.out_features, RANK, ALPHA)
        theirs.load_state_dict(linear.state_dict(), strict=False)
        model.set_submodule(name, theirs)
    train_all(model)
    return _saved_by_loralib(model, folder, {"lora_alpha": ALPHA})


def loralib_merged(model: nn.Module, folder: Path) -> State:
    """LoRA by loralib of the queries and values in GPT-2's fused projection."""
    import loralib

    enabled = [True, False, True]
    for name in [name for name, _ in model.named_modules() if name.endswith("c_attn")]:
        layer = model.get_submodule(name)
        rows, columns = layer.weight.shape
        theirs = loralib.MergedLinear(
            rows, columns, RANK, ALPHA, enable_lora=enabled, fan_in_fan_out=True
        )
        theirs.load_state_dict(layer.state_dict(), strict=False)
        model.set_submodule(name, theirs)
    train_all(model)
    return _saved_by_loralib(model, folder, {"lora_alpha": ALPHA, "enable_lora": enabled})


def _saved_by_loralib(model: nn.Module, folder: Path, config: dict[str, Any]) -> State:
    import loralib

    torch.save(loralib.lora_state_dict(model), folder / "lora.pt")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model.train()
    model.eval()  # loralib merges when a model changes to evaluation
    return {key: value for key, value in model.state_dict().items() if "lora_" not in key}


def edifice_adapter(model: nn.Module, folder: Path) -> None:
    """An imitation of ``Edifice.Meta.Adapter`` on the outputs of BERT's feed-forwards.

    It follows ``lib/edifice/meta/adapter.ex``: ``x + relu(x @ down + b) @ up + b`` with the
    kernels ``(in, out)`` of ``Axon.dense``, in the layers ``NAME_down`` and ``NAME_up``.
    """
    tensors: State = {}
    for name in [n for n, _ in model.named_modules() if n.endswith("output.dense")]:
        shapes = {
            "down.kernel": (32, 8),
            "down.bias": (8,),
            "up.kernel": (8, 32),
            "up.bias": (32,),
        }
        parts = {k: torch.from_numpy(noise(f"{name}{k}", *s)) for k, s in shapes.items()}
        tensors |= {f"{name}_{key}": value for key, value in parts.items()}

        def wrap(_module: Any, _args: Any, x: torch.Tensor, p: State = parts) -> torch.Tensor:
            hidden = torch.relu(x @ p["down.kernel"] + p["down.bias"])
            return x + hidden @ p["up.kernel"] + p["up.bias"]

        model.get_submodule(name).register_forward_hook(wrap)
    save_file(tensors, folder / "adapter.safetensors")


def nemo_lora(model: nn.Module, folder: Path) -> None:
    """An imitation of NeMo's LoRA of q, k, v and of the gated MLP, in a ``.nemo`` file.

    It follows ``mcore_mixins.py`` and ``parallel_adapters.py`` of NeMo 1.23: the adapter's
    output is added to the fused one, and cut as ``get_query_key_value_tensors`` cuts it.
    """
    heads, groups, width = LLAMA["heads"], LLAMA["groups"], LLAMA["hidden"]
    size, tensors = width // heads, {}

    def adapter(key: str, rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
        down = torch.from_numpy(noise(f"{key}.in", RANK, width))
        up = torch.from_numpy(noise(f"{key}.out", rows, RANK))
        tensors[f"{key}.linear_in.weight"] = down
        tensors[f"{key}.linear_out.weight"] = up
        return lambda x: x @ down.T @ up.T * (ALPHA / RANK)

    for i, layer in enumerate(model.model.layers):
        start = f"model.decoder.layers.{i}"
        qkv = adapter(f"{start}.self_attention.adapter_layer.lora_kqv_adapter",
                      (heads + 2 * groups) * size)  # fmt: skip
        fc1 = adapter(f"{start}.mlp.adapter_layer.lora_hto4h_adapter", 2 * LLAMA["mlp"])
        attention, mlp = layer.self_attn, layer.mlp
        for place, module in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):

            def add(_m: Any, x: Any, y: Any, f: Any = qkv, p: int = place) -> torch.Tensor:
                cuts = [heads // groups * size, size, size]
                mixed = f(x[0]).view(*x[0].shape[:-1], groups, sum(cuts))
                return y + torch.split(mixed, cuts, dim=-1)[p].reshape(y.shape)

            module.register_forward_hook(add)
        for place, module in enumerate((mlp.gate_proj, mlp.up_proj)):
            module.register_forward_hook(
                lambda _m, x, y, f=fc1, p=place: y + torch.chunk(f(x[0]), 2, dim=-1)[p]
            )
    tuning = {"lora_tuning": {"adapter_dim": RANK, "alpha": ALPHA}}
    _save_nemo(tensors, tuning, folder)


def nemo_bottlenecks(model: nn.Module, folder: Path, position: str) -> None:
    """An imitation of NeMo's ``ParallelLinearAdapter`` behind attention and MLP."""
    tensors: State = {}
    for i, layer in enumerate(model.model.layers):
        for number, module in ((1, layer.self_attn.o_proj), (2, layer.mlp.down_proj)):
            key = f"model.decoder.layers.{i}.adapter_layer.adapter_{number}"
            width = LLAMA["hidden"]
            shapes = {"linear_in.weight": (8, width), "linear_out.weight": (width, 8)}
            shapes |= {"layer_norm.weight": (width,), "layer_norm.bias": (width,)}
            parts = {k: torch.from_numpy(noise(f"{key}{k}", *s)) for k, s in shapes.items()}
            tensors |= {f"{key}.{name}": value for name, value in parts.items()}

            def add(_m: Any, _x: Any, y: torch.Tensor, p: State = parts) -> torch.Tensor:
                norm = p["layer_norm.weight"], p["layer_norm.bias"]

                def normed(x: torch.Tensor) -> torch.Tensor:
                    return nn.functional.layer_norm(x, x.shape[-1:], *norm, 1e-5)

                x = normed(y) if position == "pre" else y
                x = nn.functional.silu(x @ p["linear_in.weight"].T) @ p["linear_out.weight"].T
                return y + (normed(x) if position == "post" else x)

            module.register_forward_hook(add)
    _save_nemo(tensors, {"adapter_tuning": {"norm_position": position}}, folder)


def _save_nemo(tensors: State, peft_settings: dict[str, Any], folder: Path) -> None:
    import io
    import tarfile

    import yaml

    config = {"num_attention_heads": LLAMA["heads"], "num_query_groups": LLAMA["groups"]}
    config |= {"hidden_size": LLAMA["hidden"], "kv_channels": None, "bias": False}
    config |= {"activation": "fast-swiglu", "peft": peft_settings}
    weights = io.BytesIO()
    torch.save(tensors, weights)
    with tarfile.open(folder / "adapter.nemo", "w:gz") as archive:
        for name, data in (
            ("./model_config.yaml", yaml.dump(config).encode()),
            ("./model_weights.ckpt", weights.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def gguf_orders(folder: Path) -> None:
    """Write in which order llama.cpp's converter puts rows of q and k, by architecture.

    The factor B of every module has its row's number in its first column.
    """
    orders: dict[str, dict[str, list[int]]] = {}
    for name in ARCHITECTURES:
        import gguf

        config = getattr(transformers, f"{name}Config")(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, head_dim=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        build = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
        model = build(config)
        fused = name == "Phi3"
        targets = ["qkv_proj"] if fused else ["q_proj", "k_proj"]
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=targets))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.data[:, 0] = torch.arange(len(parameter), dtype=parameter.dtype)
        scratch = clean_folder(folder.parent / "scratch")
        out = convert_to_gguf(model, adapted, scratch, "f32")
        reader = gguf.GGUFReader(out)
        kind = reader.fields["general.architecture"].contents()
        orders[kind] = {
            tensor.name: [int(row) for row in tensor.data.ravel()]
            for tensor in reader.tensors
            if tensor.name.endswith("lora_b")
        }
        subprocess.run(["rm", "-r", scratch], check=True)
    text = json.dumps(orders, separators=(",", ":")).replace('},"', '},\n"')
    (folder / "gguf_orders.json").write_text(text + "\n")


ARCHITECTURES = (
    *("Llama", "Granite", "Olmo", "SmolLM3", "Qwen2", "Qwen3", "Gemma", "Gemma2"),
    *("Gemma3Text", "Olmo2", "StableLm", "Exaone4", "SeedOss", "Phi3"),
)
"""Models of transformers with the architectures that are read, BERT aside."""

LLAMA_TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj"]


@dataclasses.dataclass(frozen=True)
class Library:
    """A case of one library.

    Attributes:
        base: Name of the base.
        library: The library and its version.
        exercises: What this case has that others have not.
        make: Trains and saves in a folder; returns the merged weights, if it did not change
            the model itself.
    """

    base: str
    library: str
    exercises: str
    make: Callable[[nn.Module, Path], State | None]


MLX, TUNE, GGUF = "mlx-lm 0.32.2", "torchtune 0.6.1", "llama.cpp (gguf 0.19.0)"
CASES = {
    "mlx_llama_lora": Library(
        "llama_dynamo", MLX, "LoRA: scale is final", lambda m, f: mlx_adapter(m, f, "lora")
    ),
    "mlx_llama_dora": Library(
        "llama_dynamo", MLX, "DoRA: magnitude m", lambda m, f: mlx_adapter(m, f, "dora")
    ),
    "torchtune_llama": Library(
        "llama_torchscript",
        TUNE,
        "torchtune's own form: names, and rows of q and k in pairs",
        lambda m, f: torchtune_adapter(m, f, dora=False),
    ),
    "torchtune_llama_peft": Library(
        "llama_torchscript", TUNE, "PEFT's form as torchtune writes it", torchtune_for_peft
    ),
    "litgpt_llama": Library(
        "llama_dynamo", "litgpt 0.5.13", "LoRA of q and v in the fused qkv", litgpt_adapter
    ),
    "gguf_llama": Library(
        "llama_torchscript",
        GGUF,
        "rows of q and k in pairs, heads from the base's config.json",
        lambda m, f: gguf_adapter(m, f, LLAMA_TARGETS, "f32"),
    ),
    "gguf_bert": Library(
        "bert_dynamo",
        GGUF,
        "BERT's names; word embeddings, whose lora_a is transposed",
        lambda m, f: gguf_adapter(
            m.bert, f, ["query", "output.dense", "word_embeddings"], "f32"
        ),
    ),
    "keras_llama": Library(
        "llama_dynamo",
        "keras-hub 0.32.0",
        "EinsumDense: factors by head; layers by number",
        keras_adapter,
    ),
    "loralib_bert": Library(
        "bert_torchscript", "loralib 0.1.2", "lora_alpha in a configuration", loralib_adapter
    ),
    "loralib_gpt2_merged": Library(
        "gpt2_dynamo", "loralib 0.1.2", "MergedLinear: q and v of c_attn", loralib_merged
    ),
    "nemo_llama_lora": Library(
        "llama_dynamo", "nemo 1.23 (imitated)", "LoRA of q, k, v by group", nemo_lora
    ),
    "nemo_llama_pre": Library(
        "llama_dynamo",
        "nemo 1.23 (imitated)",
        "ParallelLinearAdapter with LayerNorm before",
        lambda m, f: nemo_bottlenecks(m, f, "pre"),
    ),
    "nemo_llama_post": Library(
        "llama_torchscript",
        "nemo 1.23 (imitated)",
        "ParallelLinearAdapter with LayerNorm behind",
        lambda m, f: nemo_bottlenecks(m, f, "post"),
    ),
    "edifice_bert": Library(
        "bert_dynamo", "edifice (imitated)", "bottlenecks named after modules", edifice_adapter
    ),
}


def make_case(name: str, case: Library, cases: Path) -> None:
    """Train, save and check one adapter."""
    folder = clean_folder(cases / name)
    adapter = folder / "adapter"
    adapter.mkdir()
    base = BASES[case.base]
    with torch.no_grad():
        merged = case.make(trained := make(base), adapter)
    model = trained if merged is None else make(base)
    if merged is not None:
        part = model.bert if name == "gguf_bert" else model
        part.load_state_dict(merged, strict=False)
    expected = compute(model.eval(), base)
    facts = CaseFacts(name, case.base, case.library, case.exercises, adapter_name="default")
    write_case(facts, base, expected, cases)


def main() -> None:
    """Write all cases."""
    global LLAMA_CPP
    parser = argparse.ArgumentParser(description="Write cases of adapters of other libraries.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--only", default="", help="part of the names to write")
    parser.add_argument("--llama-cpp", type=Path, default=Path("llama.cpp"))
    chosen = parser.parse_args()
    LLAMA_CPP = chosen.llama_cpp
    if chosen.only in "gguf_orders":
        gguf_orders(chosen.folder)
    for name, case in CASES.items():
        if chosen.only in name:
            make_case(name, case, chosen.folder)


if __name__ == "__main__":
    main()
