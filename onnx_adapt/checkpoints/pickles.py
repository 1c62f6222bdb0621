"""Read a PyTorch `.bin` without PyTorch, and without executing anything in it.

The file is a zip of raw storages and one pickle that says how tensors view them. The
pickle is read by an unpickler that knows nothing but those views: any other global in it
is refused by name. Format: torch/serialization.py, since PyTorch 1.6.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.errors import CheckpointError

_STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": DTYPES["bfloat16"],
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def read_pickled_tensors(data: bytes, path: Path) -> dict[str, Array]:
    """The tensors of a state dict that `torch.save` wrote.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or holds anything but
            tensors.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found = _load(archive, path)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path.name} is not a file of torch.save (PyTorch 1.6 or newer)",
            hint="save the adapter again, or as safetensors",
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path.name} is damaged: {error}", hint="save the adapter again"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, np.ndarray) for k, v in found.items()
    ):
        raise CheckpointError(f"{path.name} holds something else than named tensors")
    return dict(found)


def _load(archive: zipfile.ZipFile, path: Path) -> Any:
    if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
        raise CheckpointError(f"{path.name} is compressed; torch.save never does that")
    names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(names) != 1:
        raise CheckpointError(f"{path.name} is no file of torch.save")
    prefix = names[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError(f"{path.name} was written on a big-endian machine")
    return _Reader(io.BytesIO(archive.read(names[0])), archive, prefix).load()


# What the unpickler and numpy raise on bytes that are no pickle of tensors.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, KeyError, IndexError, ValueError, TypeError),
    *(AttributeError, OverflowError, RecursionError, MemoryError, RuntimeError),
    *(ImportError, NotImplementedError, zipfile.LargeZipFile, OSError),
)


class _Storage:
    """The type of a storage, as the pickle names it."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype


class _Reader(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self._archive = archive
        self._prefix = prefix

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Storage(_STORAGES[name])
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise CheckpointError(
                f"the file refers to {module}.{name}, which is no part of a tensor",
                hint="it is not a plain state dict, or it is hostile; do not load it",
            )
        return allowed

    def persistent_load(self, pid: Any) -> Array:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str):
            raise ValueError("a storage is described wrongly")
        data = self._archive.read(f"{self._prefix}data/{key}")
        values = np.frombuffer(data, storage.dtype)
        if not isinstance(count, int) or count != values.size:
            raise ValueError(f"storage {key} has {values.size} elements, not {count}")
        return values


def _rebuild_tensor(
    storage: Array, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Array:
    """A view of a storage, copied; checked to lie inside it."""
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or n < 0 for n in numbers) or len(size) != len(stride):
        raise ValueError("a tensor has a broken shape")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= storage.size or count > storage.size):
        raise ValueError("a tensor goes past its storage")
    if not count:
        return np.zeros(size, storage.dtype)
    steps = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)
    return np.ascontiguousarray(view).reshape(size)


def _rebuild_parameter(data: Array, *_: Any) -> Array:
    return data


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}
