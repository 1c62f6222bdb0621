"""What a file of weights says of its tensors, without reading them; content tells its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from onnx_adapt.adapter.safetensors import read_header as read_safetensors_header
from onnx_adapt.checkpoints.readers.pickles import read_pickled_shapes
from onnx_adapt.errors import CheckpointError
from onnx_adapt.model.payloads import Source
from onnx_adapt.model.signatures import HEAD, recognised
from onnx_adapt.words import beside


@dataclass(frozen=True, slots=True)
class Header:
    """The names and shapes of the tensors in a file.

    Attributes:
        start: The first bytes of the file.
        shapes: The shape of each tensor by key; empty if the file is of another form.
        metadata: The texts of a safetensors file's `__metadata__` by name.
    """

    start: bytes
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def is_zip(start: bytes) -> bool:
    """Whether a file begins as those of `torch.save` do."""
    return start[:4] == b"PK\x03\x04"


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins as safetensors: the length of a JSON object, and the object."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def read_header(path: Path) -> Header:
    """Read what a file says of its tensors.

    Raises:
        CheckpointError: If it cannot be read, or is a damaged file of weights.
    """
    try:
        size = Source.of(path).size  # of a device there is no end
        with path.open("rb") as stream:
            start = stream.read(HEAD)
            stream.seek(0)
            if is_zip(start):
                return Header(start, read_pickled_shapes(stream, path))
            if not is_safetensors(start):
                return Header(start)
            header = read_safetensors_header(stream, size)
    except OSError as error:
        raise unreadable(path, error) from error
    except CheckpointError as error:
        raise no_weights(path, start, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}",
            hint="download or save it again",
        ) from error
    texts = header.pop("__metadata__", None)
    try:
        shapes = {key: tuple(map(int, entry["shape"])) for key, entry in header.items()}
        metadata = {str(key): str(value) for key, value in dict(texts or {}).items()}
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is a damaged safetensors file: its header is not of names and shapes",
            hint="download or save it again",
        ) from error
    return Header(start, shapes, metadata)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that cannot be opened."""
    return CheckpointError(f"cannot read {path}: {error.strerror or error}", hint=beside(path))


def no_weights(path: Path, start: bytes, error: CheckpointError) -> CheckpointError:
    """The error for a file that its reader cannot read: another kind of file, or damaged."""
    found = recognised(start, path.name)
    if found and found[0] not in _WEIGHTS:
        return CheckpointError(f"{path} is {found[0]}", hint=found[1])
    return error


_WEIGHTS = {
    *("a PyTorch file", "a pickle of Python", "a safetensors file"),
    *("the weights of a PEFT or AdapterHub adapter", "an adapter for image generation"),
}
"""Kinds of files that hold weights, as `recognised` names them: their readers say more."""
