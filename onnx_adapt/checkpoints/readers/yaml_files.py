"""Read the YAML files that some libraries write beside their weights."""

from __future__ import annotations

from typing import Any

from onnx_adapt.checkpoints.readers.optional import optional_library
from onnx_adapt.errors import CheckpointError

_LARGEST = 2**20


def read_yaml(data: bytes, name: str, extra: str) -> dict[str, Any]:
    """Read the settings in a YAML file; tags that would make objects are refused.

    Args:
        data: The file.
        name: What to call it in errors.
        extra: The extra of onnx-adapt for its library.

    Raises:
        CheckpointError: If it is damaged or no mapping, or PyYAML is not installed.
    """
    yaml = optional_library("yaml", extra, name)
    if len(data) > _LARGEST:
        raise CheckpointError(f"{name} has {len(data)} bytes, too many for settings")
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {name}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} holds no settings")
    return found
