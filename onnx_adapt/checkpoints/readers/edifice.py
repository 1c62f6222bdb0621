"""Read bottleneck adapters of Edifice, a library of Axon models (Elixir), as safetensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import numpy as np

from onnx_adapt.checkpoints.edits import Bottleneck, Edit
from onnx_adapt.checkpoints.readers.by_keys import file_by_keys, tensors_by_keys
from onnx_adapt.checkpoints.readers.files import Files
from onnx_adapt.checkpoints.readers.saved import Pipeline, Saved, name_damage
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_KEY = re.compile(r"^(?P<name>.+)_(?P<side>down|up)[._](?P<parameter>kernel|bias)$")


_ACTIVATIONS = {name: name for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "mish")}
_ACTIVATIONS |= {"swish": "silu", "linear": "identity"}
"""Axon's activations and the slot's; Axon's `gelu` is the exact one."""


def _fits(keys: Collection[str]) -> bool:
    """Whether keys are those of Axon's layers `NAME_down` and `NAME_up`."""
    return any((match := _KEY.match(key)) and match["parameter"] == "kernel" for key in keys)


def is_edifice(files: Files) -> bool:
    """Whether files are an adapter of Edifice."""
    return file_by_keys(files, _fits) != ""


def read_edifice(files: Files) -> Saved:
    """Read the safetensors file of an adapter, and adapter_config.json if the folder has one.

    Raises:
        CheckpointError: If a file is damaged.
    """
    tensors = tensors_by_keys(files, _fits)
    # Names without a dot may be paths of modules with underscores for dots.
    underscored = not any("." in _KEY.sub(r"\g<name>", key) for key in tensors)
    pipeline = Pipeline((), "") if underscored else None
    return Saved(files.path, "edifice", files.config(), tensors, pipeline=pipeline)


# `Edifice.Meta.Adapter` puts an adapter called NAME on a tensor x: it computes
#
#     x + relu(x @ NAME_down.kernel + NAME_down.bias) @ NAME_up.kernel + NAME_up.bias
#
# with kernels (in, out), which is the layout of a slot. Axon's names say nothing of the layer
# whose output x is, so NAME itself is taken for it: an adapter on `layer.0.output.dense` has
# that name, or --map says where `adapter` goes. The file does not say the activation either:
# Edifice's own is relu, and an adapter_config.json beside the file says another:
# {"activation": "gelu"}.
# Source: lib/edifice/meta/adapter.ex, and Axon.dense.


def edifice_edits(saved: Saved) -> list[Edit]:
    """Read the bottlenecks of an Edifice checkpoint, each on the output of its module.

    Raises:
        CheckpointError: If an adapter is incomplete, or a tensor belongs to none.
    """
    found: dict[str, dict[str, Array]] = {}
    for key, value in saved.tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise CheckpointError(
                f"the checkpoint has {key!r}, which is no part of an adapter",
                hint="save the layers NAME_down and NAME_up alone",
            )
        part = match["side"] if match["parameter"] == "kernel" else f"{match['side']}_bias"
        found.setdefault(match["name"], {})[part] = value.astype(np.float64)
    activation = str(saved.config.get("activation", "relu"))
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"activation {activation!r} is not supported",
            hint=f"known: {', '.join(_ACTIVATIONS)}",
        )
    edits: list[Edit] = []
    for name, parts in found.items():
        with name_damage(saved, name):
            _check(name, parts)
            edits.append(Bottleneck(name, "output", "target", parts, _ACTIVATIONS[activation]))
    return edits


def _check(name: str, parts: Mapping[str, Array]) -> None:
    """Refuse kernels that do not fit each other; biases may be missing (`use_bias: false`)."""
    down, up = parts["down"], parts["up"]
    if down.ndim != 2 or up.shape != down.shape[::-1] or not down.size:
        raise CheckpointError(
            f"adapter {name!r} has kernels of shape {list(down.shape)} and {list(up.shape)}; "
            "they are to be (width, bottleneck) and (bottleneck, width)"
        )
    for side, size in (("down_bias", down.shape[1]), ("up_bias", up.shape[1])):
        if side in parts and parts[side].shape != (size,):
            raise CheckpointError(
                f"adapter {name!r}: {side.replace('_', '.')} has shape "
                f"{list(parts[side].shape)}, not [{size}]"
            )
