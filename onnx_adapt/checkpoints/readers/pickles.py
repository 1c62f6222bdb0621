"""Read a PyTorch `.bin` without PyTorch, and without executing anything in it.

The file is a zip of raw storages and one pickle that says how tensors view them. The
pickle is not given to `pickle`: a machine of our own knows the few opcodes that
`torch.save` writes, calls nothing, and refuses any other opcode or name. Formats:
torch/serialization.py since PyTorch 1.6, and the opcode table of `pickletools`.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
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
_TENSOR, _PARAMETER, _DICT = "_rebuild_tensor_v2", "_rebuild_parameter", "OrderedDict"
_KNOWN = {
    **{("torch", name): name for name in _STORAGES},
    **{("torch.storage", name): name for name in _STORAGES},
    ("torch._utils", _TENSOR): _TENSOR,
    ("torch._utils", _PARAMETER): _PARAMETER,
    ("collections", _DICT): _DICT,
}
"""The globals that a pickle of tensors refers to."""

_EXPANSION = 16
"""All tensors together may take this many times the file's size: views can overlap."""


def read_pickled_tensors(data: bytes, path: Path) -> dict[str, Array]:
    """Read the tensors of a state dict that `torch.save` wrote.

    Raises:
        CheckpointError: If the file is damaged, of another kind, or holds anything but
            tensors.
    """
    found = _state_dict(io.BytesIO(data), path, _Machine, _EXPANSION * len(data))
    # One tensor can be given many names, and each is worked on by itself.
    if sum(value.nbytes for value in found.values()) > _EXPANSION * len(data):
        raise CheckpointError(f"{path.name}: its tensors are far larger than the file")
    return found


def read_pickled_shapes(stream: BinaryIO, path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors of such a file by key, and none of their values.

    Raises:
        CheckpointError: As for `read_pickled_tensors`.
    """
    found = _state_dict(stream, path, _Glance, 0)
    return {key: value.shape for key, value in found.items()}


def _state_dict(
    stream: BinaryIO, path: Path, machine: type[_Machine], budget: int
) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(stream) as archive:
            found = _load(archive, machine, budget)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error.message}", hint=error.hint) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path.name} is not a file of torch.save (PyTorch 1.6 or newer)",
            hint="save the adapter again, or as safetensors",
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path.name} is damaged: {error}", hint="save the adapter again"
        ) from error
    if isinstance(found, dict) and [*found] == ["model"]:
        found = found["model"]  # LitGPT wraps its state dict
    if not isinstance(found, dict) or not all(
        isinstance(value, np.ndarray) for value in found.values()
    ):
        raise CheckpointError(
            f"{path.name} holds something else than named tensors",
            hint="give the state dict that the training library saved",
        )
    return dict(found)


_DAMAGE = (
    *(ValueError, KeyError, IndexError, EOFError, OSError, RuntimeError, OverflowError),
    *(NotImplementedError, UnicodeDecodeError, zlib.error, MemoryError),
)
"""The errors that zipfile, pickletools and numpy raise on damaged bytes."""


def _load(archive: zipfile.ZipFile, machine: type[_Machine], budget: int) -> Any:
    members = archive.infolist()
    names = [member.filename for member in members]
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError("the file is compressed; torch.save never does that")
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if len(pickles) != 1 or len(set(names)) != len(names):
        raise CheckpointError("this is no file of torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in names and archive.read(order) != b"little":
        raise CheckpointError("the file was written on a big-endian machine")
    return machine(archive, prefix, budget).run(archive.read(pickles[0]))


@dataclass(frozen=True, slots=True)
class _Name:
    """The name of a global that the pickle refers to. It is never imported."""

    name: str


@dataclass(slots=True)
class _Machine:
    """The stack machine of a pickle, without the opcodes that could do harm."""

    archive: zipfile.ZipFile
    prefix: str
    budget: int
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, Array] = field(default_factory=dict)

    def run(self, pickled: bytes) -> Any:
        """Follow the opcodes to the end and return what they describe."""
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _FIXED:
            self.stack.append(_FIXED[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif name == "TUPLE":
            self.stack.append(tuple(self.since_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(name)
        elif name == "GLOBAL":
            self.stack.append(_known(*str(argument).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self.stack.pop(-2), self.stack.pop()
            if type(module) is not str or type(attribute) is not str:
                raise ValueError("a name is no text")  # as text it could be endless
            self.stack.append(_known(module, attribute))
        elif name == "BINPERSID":
            self.stack.append(self.storage(self.stack.pop()))
        elif name == "REDUCE":
            arguments = self.stack.pop()
            self.stack.append(self.rebuild(self.stack.pop(), arguments))
        elif name == "BUILD":
            self.stack.pop()  # a state dict's _metadata
            if not isinstance(self.stack[-1], dict):
                raise ValueError("something other than a dictionary has attributes")
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(
                f"the file uses the pickle opcode {name}, which is no part of a tensor",
                hint="it is not a plain state dict, or it is hostile; do not load it",
            )

    def since_mark(self) -> list[Any]:
        """Pop the last mark and everything above it off the stack."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def set_items(self, name: str) -> None:
        """Put keys and values into the dictionary below them."""
        items = (
            self.since_mark() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()]
        )
        target = self.stack[-1]
        keys = items[::2]
        if not isinstance(target, dict) or any(type(key) is not str for key in keys):
            raise ValueError("a key is no text")
        target.update(zip(keys, items[1::2], strict=True))

    def storage(self, description: Any) -> Array:
        """Read the values of one storage, and check their number."""
        if type(description) is not tuple or len(description) != 5:
            raise ValueError("a storage is described wrongly")
        kind, storage, key, _, count = description
        if kind != "storage" or not isinstance(storage, _Name) or type(key) is not str:
            raise ValueError("a storage is described wrongly")
        return self.values(key, _STORAGES[storage.name], count)

    def values(self, key: str, dtype: np.dtype[Any], count: Any) -> Array:
        """Read the values of one storage by its key."""
        if key not in self.storages:
            data = self.archive.read(f"{self.prefix}data/{key}")
            self.spend(len(data))
            self.storages[key] = np.frombuffer(data, np.uint8)
        values = self.storages[key].view(dtype)
        if type(count) is not int or count != values.size:
            raise ValueError(f"storage {key} has {values.size} elements, not as described")
        return values

    def spend(self, size: int) -> None:
        """Count the memory in use, and refuse a file that needs far more than its size."""
        self.budget -= size
        if self.budget < 0:
            raise ValueError("its tensors are far larger than the file")

    def rebuild(self, what: Any, arguments: Any) -> Any:
        """Build a tensor from its storage, a parameter's tensor, or an empty dictionary."""
        if not isinstance(what, _Name) or type(arguments) is not tuple:
            raise ValueError("something is called that is no tensor")
        if what.name == _DICT and not arguments:
            return {}
        if what.name == _PARAMETER and arguments and isinstance(arguments[0], np.ndarray):
            return arguments[0]
        # A seventh argument marks a tensor as conjugated or negated.
        if what.name == _TENSOR and len(arguments) in (6, 7) and not any(arguments[6:]):
            storage = arguments[0]
            if not isinstance(storage, np.ndarray) or storage.ndim != 1:
                raise ValueError("a tensor views something other than a storage")
            return self.tensor(storage, *arguments[1:4])
        raise ValueError(f"{what.name} is called in an unknown way")

    def tensor(self, storage: Array, offset: Any, size: Any, stride: Any) -> Array:
        """Copy a tensor out of its storage."""
        tensor = _view(storage, offset, size, stride)
        self.spend(tensor.nbytes)
        return np.ascontiguousarray(tensor).reshape(tensor.shape)


class _Glance(_Machine):
    """The same machine for names and shapes alone: it reads no storage."""

    def values(self, key: str, dtype: np.dtype[Any], count: Any) -> Array:
        return np.zeros(1, dtype)

    def tensor(self, storage: Array, offset: Any, size: Any, stride: Any) -> Array:
        return np.broadcast_to(storage[:1].reshape(()), _shape(size))


def _known(module: str, name: str = "") -> _Name:
    if (module, name) not in _KNOWN:
        raise CheckpointError(
            f"the file refers to {module}.{name}, which is no part of a tensor",
            hint="it is not a plain state dict, or it is hostile; do not load it",
        )
    return _Name(_KNOWN[module, name])


def _view(storage: Array, offset: Any, size: Any, stride: Any) -> Array:
    """Make a view of a storage, and check that it lies inside."""
    size, stride = _shape(size), _shape(stride)
    if len(size) != len(stride) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor has a broken shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if count and (last >= storage.size or count > storage.size):
        raise ValueError("a tensor goes past its storage")
    if not count:
        return np.zeros(size, storage.dtype)
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _shape(size: Any) -> tuple[int, ...]:
    if type(size) is not tuple or len(size) > 32:
        raise ValueError("a tensor has a broken shape")
    if any(type(n) is not int or not 0 <= n < 2**31 for n in size):
        raise ValueError("a tensor has a broken shape")
    return size


_VALUES = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}
"""Opcodes that push their argument."""

_FIXED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
}
"""Opcodes that always push the same value."""
