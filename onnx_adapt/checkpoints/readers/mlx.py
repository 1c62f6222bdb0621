"""Read adapters of MLX-LM: LoRA, DoRA, LoRA of experts, and layers that were tuned whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx_adapt.checkpoints.edits import Edit, Replacement
from onnx_adapt.checkpoints.readers.factors import low_rank, refuse_others, sort_by_module
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage, number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

WEIGHTS = "adapters.safetensors"
_ENDINGS = {".lora_a": "lora_a", ".lora_b": "lora_b", ".m": "m"}


def is_mlx(files: Files) -> bool:
    """Whether files are MLX-LM's."""
    config = files.config()
    return "lora_parameters" in config or "fine_tune_type" in config


def read_mlx(files: Files) -> Saved:
    """Read the folder of an adapter that MLX-LM trained.

    Raises:
        CheckpointError: If its weights are missing or damaged.
    """
    hint = f"give the folder that mlx_lm.lora wrote, with {WEIGHTS} in it"
    return Saved(files.path, "mlx", files.config(), files.tensors((WEIGHTS,), hint))


# MLX keeps both factors as its layers multiply with them,
#
#     y = x W.T + scale * (x lora_a) lora_b      with lora_a (in, r) and lora_b (r, out),
#
# so both are transposed here. `scale` is what multiplies the product; it is not divided by the
# rank. Source: mlx_lm/tuner/lora.py and dora.py, 0.32.


def mlx_edits(saved: Saved) -> list[Edit]:
    """Read what an adapter of MLX-LM asks for.

    Raises:
        CheckpointError: If the kind of fine-tuning or a setting is not supported.
    """
    config = saved.config
    # Before 0.19 there was `use_dora` instead.
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind == "full":
        return [_replacement(key, value) for key, value in saved.tensors.items()]
    if kind not in ("lora", "dora"):
        raise CheckpointError(
            f"fine_tune_type {kind!r} is not supported", hint="lora, dora and full are"
        )
    modules, others = sort_by_module(saved.tensors, _ENDINGS)
    refuse_others(others, "lora_a, lora_b and m of a module")
    scale = _scale(config)
    edits: list[Edit] = []
    for module, parts in modules.items():
        with name_damage(saved, module):
            edits.append(_edit(module, parts, scale, dora=kind == "dora"))
    return edits


def _scale(config: Mapping[str, Any]) -> float:
    """The factor of the product; MLX-LM 0.14.1 and older multiplied it by alpha / rank."""
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or "scale" not in settings:
        raise CheckpointError(
            f"lora_parameters is {settings!r}: there is no scale in it",
            hint='add "scale", the number that lora_b @ lora_a was multiplied by in training',
        )
    alpha, rank = settings.get("alpha"), settings.get("rank")
    if "lora_layers" in config and alpha is not None and alpha != rank:
        raise CheckpointError(
            f"lora_parameters has scale {settings['scale']}, alpha {alpha} and rank {rank}: "
            "MLX-LM 0.14.1 and older multiplied scale by alpha / rank, 0.14.2 and newer do "
            "not, and the file does not say which of them trained it",
            hint='take "alpha" out of adapter_config.json; if it was 0.14.1 or older, '
            'multiply "scale" by alpha / rank as well',
        )
    return number(settings["scale"], "scale")


def _edit(module: str, parts: Mapping[str, Array], scale: float, *, dora: bool) -> Edit:
    a, b, magnitude = parts["lora_a"], parts["lora_b"], parts.get("m")
    if a.ndim == 3:
        raise CheckpointError(
            f"{module!r} is LoRA of {len(a)} experts, which MLX-LM keeps in one layer: that "
            "is not supported",
            hint="fuse the adapter with mlx_lm.fuse and export the result",
        )
    if dora != (magnitude is not None):
        raise CheckpointError(
            f"module {module!r} has {'no' if dora else 'a'} magnitude m, but fine_tune_type "
            f"is {'dora' if dora else 'lora'}"
        )
    if magnitude is not None and magnitude.size != b.shape[-1]:
        raise CheckpointError(
            f"module {module!r}: m has {magnitude.size} numbers for {b.shape[-1]} outputs: "
            "DoRA of an embedding, which scales its rows, is not supported",
            hint="leave embeddings out of lora_parameters.keys",
        )
    return low_rank(module, a.T, b.T, scale, magnitude=magnitude)


def _replacement(key: str, value: Array) -> Replacement:
    module, _, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias") or not module:
        raise CheckpointError(
            f"the checkpoint has {key!r}, which is of no known kind",
            hint="a quantised base cannot be tuned whole; weight and bias are known",
        )
    return Replacement(module, parameter, value)
