"""Read adapters of NeMo's language models, LoRA and bottlenecks, in a `.nemo` file."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Bottleneck, Edit
from onnx_adapt.checkpoints.readers.factors import low_rank, refuse_others, sort_by_module
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.pickles import read_pickled_tensors
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.checkpoints.readers.yaml_files import read_yaml
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError, reason

_CONFIG, _WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_EXPANSION = 64
_ENDINGS = {
    ".linear_in.weight": "down",
    ".linear_out.weight": "up",
    ".layer_norm.weight": "norm_weight",
    ".layer_norm.bias": "norm_bias",
}
_ADAPTER = re.compile(
    r"^model\.(module\.)?(decoder|language_model\.encoder)\.layers\.(?P<layer>\d+)\."
    r"((self_attention|mlp)\.)?adapter_layer\.(?P<adapter>[\w.]+)$"
)


def is_nemo(files: Files) -> bool:
    """Whether files are a `.nemo` file, or the folder that one was unpacked into."""
    return _archive(files) is not None or {_CONFIG, _WEIGHTS} <= files.names


def _archive(files: Files) -> Path | None:
    found = [name for name in sorted(files.names) if name.endswith(".nemo")]
    return files.at(found[0]) if len(found) == 1 else None


def read_nemo(files: Files) -> Saved:
    """Read a `.nemo` file, or the folder that one was unpacked into.

    Raises:
        CheckpointError: If it is damaged, or is split over several machines.
    """
    path = _archive(files)
    where = path or files.path
    names = (_CONFIG, _WEIGHTS)
    data = _unpacked(path) if path else {n: files.at(n).read_bytes() for n in names}
    for name in names:
        if name not in data:
            raise CheckpointError(
                f"{where} has no {name}",
                hint="weights in mp_rank_NN are split over machines: join them with NeMo's "
                "scripts/nlp_language_modeling/merge_lora_weights/lora_to_tp1.py",
            )
    config = read_yaml(data[_CONFIG], f"{where} ({_CONFIG})", "nemo")
    return Saved(files.path, "nemo", config, read_pickled_tensors(data[_WEIGHTS], where))


def _unpacked(path: Path) -> dict[str, bytes]:
    """The two files of an archive that matter, by name; nothing is written to the disk."""
    found: dict[str, bytes] = {}
    largest = _EXPANSION * path.stat().st_size
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in (_CONFIG, _WEIGHTS) and member.isfile():
                    if member.size > largest:
                        raise CheckpointError(f"{path}: {name} is far larger than the file")
                    stream = archive.extractfile(member)
                    found[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise CheckpointError(
            f"{path} is a damaged .nemo file: {reason(error)}", hint="copy it again"
        ) from error
    return found


def nemo_edits(saved: Saved) -> list[Edit]:
    """Read what an adapter of a NeMo language model asks for.

    Raises:
        CheckpointError: If an adapter or a setting is not supported.
    """
    modules, others = sort_by_module(saved.tensors, _ENDINGS)
    refuse_others(others, "linear_in, linear_out and layer_norm of an adapter")
    edits: list[Edit] = []
    for key, parts in modules.items():
        match = _ADAPTER.match(key)
        if match is None or match["adapter"] not in _ADAPTERS:
            raise CheckpointError(
                f"NeMo's adapter {key!r} is not supported",
                hint=f"in layers of a language model {', '.join(_ADAPTERS)} are",
            )
        with name_damage(saved, key):
            layer = f"model.layers.{match['layer']}"
            edits += _ADAPTERS[match["adapter"]](layer, parts, saved.config)
    return edits


Parts = Mapping[str, Array]
Config = Mapping[str, Any]


def _lora(module: str) -> Callable[[str, Parts, Config], Iterator[Edit]]:
    """What reads LoRA of one module of a layer."""

    def edits(layer: str, parts: Parts, config: Config) -> Iterator[Edit]:
        path = f"{layer}.{module}"
        yield low_rank(path, parts["down"], parts["up"], _scale(parts, config))

    return edits


def _scale(parts: Parts, config: Config) -> float:
    """The scale, alpha / rank; without alpha, or with the rank for alpha, it is 1."""
    settings = (config.get("peft") or {}).get("lora_tuning") or {}
    alpha = settings.get("alpha")
    if alpha is None or (isinstance(alpha, str) and alpha.endswith("adapter_dim}")):
        return 1.0
    rank = max(int(parts["up"].shape[-1]), 1)
    return number(alpha, "peft.lora_tuning.alpha") / rank


# Megatron keeps q, k and v in one matrix, group by group: the rows of the group's query heads,
# of its key head and of its value head. With 4 query heads in 2 groups the order of heads is
#
#     q0 q1 k0 v0  q2 q3 k1 v1


def _lora_qkv(layer: str, parts: Parts, config: Config) -> Iterator[Edit]:
    down, up, scale = parts["down"], parts["up"], _scale(parts, config)
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_query_groups") or heads)
    size = int(config.get("kv_channels") or int(config["hidden_size"]) // heads)
    if heads % groups or up.ndim != 2 or len(up) != (heads + 2 * groups) * size:
        raise CheckpointError(
            f"{layer!r}: the factor of q, k and v is {list(up.shape)}, which is not {heads} "
            f"heads in {groups} groups of size {size}"
        )
    rows = up.reshape(groups, heads // groups + 2, size, -1)
    for module, taken in (
        ("q_proj", rows[:, :-2]),
        ("k_proj", rows[:, -2:-1]),
        ("v_proj", rows[:, -1:]),
    ):
        yield low_rank(
            f"{layer}.self_attn.{module}", down, taken.reshape(-1, up.shape[1]), scale
        )


def _lora_fc1(layer: str, parts: Parts, config: Config) -> Iterator[Edit]:
    """LoRA of the first layer of a gated MLP, whose rows are those of gate, then of up."""
    if "glu" not in str(config.get("activation")):
        raise CheckpointError(
            f"{layer!r}: LoRA of an MLP with activation {config.get('activation')!r} is not "
            "supported, only of a gated one (swiglu, geglu)"
        )
    up, scale = parts["up"], _scale(parts, config)
    for module, rows in zip(("gate_proj", "up_proj"), np.split(up, 2), strict=True):
        yield low_rank(f"{layer}.mlp.{module}", parts["down"], rows, scale)


def _bottleneck(module: str) -> Callable[[str, Parts, Config], Iterator[Edit]]:
    """What reads a `ParallelLinearAdapter` on the output of one module of a layer.

    It adds `norm?(up(swish(down(norm?(x)))))` to the output x, before the bias.
    """

    def edits(layer: str, parts: Parts, config: Config) -> Iterator[Edit]:
        path = f"{layer}.{module}"
        if config.get("bias", True):
            raise CheckpointError(
                f"{path!r} has a bias, which NeMo adds behind the adapter: not supported"
            )
        settings = (config.get("peft") or {}).get("adapter_tuning") or {}
        position = settings.get("norm_position", "post") if "norm_weight" in parts else None
        names: dict[Any, dict[str, str]] = {
            None: {},
            "pre": {"norm_weight": "norm_weight", "norm_bias": "norm_bias"},
            "post": {"norm_weight": "after_weight", "norm_bias": "after_bias"},
        }
        if position not in names:
            raise CheckpointError(f"norm_position {position!r} is neither pre nor post")
        weights = {part: parts[part].T.astype(np.float64) for part in ("down", "up")}
        weights |= {new: parts[old].astype(np.float64) for old, new in names[position].items()}
        after = "term" if position == "post" else ""
        yield Bottleneck(path, "output", "target", weights, "silu", after)

    return edits


_ADAPTERS: dict[str, Callable[[str, Parts, Config], Iterator[Edit]]] = {
    "lora_kqv_adapter": _lora_qkv,
    "lora_unfused_kqv_adapter.q_adapter": _lora("self_attn.q_proj"),
    "lora_unfused_kqv_adapter.k_adapter": _lora("self_attn.k_proj"),
    "lora_unfused_kqv_adapter.v_adapter": _lora("self_attn.v_proj"),
    "lora_dense_attention_adapter": _lora("self_attn.o_proj"),
    "lora_hto4h_adapter": _lora_fc1,
    "lora_unfused_hto4h_adapter.gate_adapter": _lora("mlp.gate_proj"),
    "lora_unfused_hto4h_adapter.up_adapter": _lora("mlp.up_proj"),
    "lora_4htoh_adapter": _lora("mlp.down_proj"),
    "adapter_1": _bottleneck("self_attn.o_proj"),
    "adapter_2": _bottleneck("mlp.down_proj"),
}
"""Adapters by NeMo's names for them (`AdapterName`); the modules are called as Llama's."""
