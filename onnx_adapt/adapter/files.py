"""Load and save adapters as files, in any of the formats of `onnx_adapt.formats`."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np

from onnx_adapt.adapter.data import Adapter, adapter_from_tensors
from onnx_adapt.adapter.quantised import Quantised
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdapterError
from onnx_adapt.formats import FORMATS, AdapterFormat
from onnx_adapt.model.paths import as_path
from onnx_adapt.model.payloads import Source
from onnx_adapt.model.signatures import HEAD, recognised
from onnx_adapt.model.whole_files import write_files
from onnx_adapt.words import beside


def format_of(path: Path) -> AdapterFormat:
    """The format that a file's suffix tells.

    Raises:
        AdapterError: If there is none for it.
    """
    if path.suffix not in FORMATS:
        raise AdapterError(
            f"{path.name} is of no known adapter format",
            hint=f"adapter files end in {', '.join(FORMATS)}",
        )
    return FORMATS[path.suffix]


def _refuse_others(path: Path, head: bytes) -> None:
    """Refuse a file whose bytes are of another kind than its suffix says."""
    found = recognised(head, path.name, adapter=True)
    if found and (path.suffix not in FORMATS or found[0] != FORMATS[path.suffix].what):
        raise AdapterError(f"{path.name} is {found[0]}, no adapter file", hint=found[1])


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter file; its suffix tells the format.

    Raises:
        AdapterError: If the file is missing, damaged or of another kind.

    Example:
        >>> load_adapter("fr.txt")
        Traceback (most recent call last):
        ...
        onnx_adapt.errors.AdapterError: fr.txt is of no known adapter format
        hint: adapter files end in .safetensors, .onnx_adapter, .npz
    """
    file = as_path(path, "an adapter file")
    if file.is_dir():
        raise AdapterError(
            f"{file} is a folder, no adapter file",
            hint="`onnx-adapt convert FOLDER --for MODEL.onnx -o NAME.safetensors` makes one "
            "of the folder of a trained adapter",
        )
    try:
        if file.suffix not in FORMATS and file.is_file():
            with file.open("rb") as stream:
                _refuse_others(file, stream.read(HEAD))
        format_of(file)  # an unknown suffix is reported before a missing file
        Source.of(file)  # refuses a device, which could be read without end
        data = file.read_bytes()
    except OSError as error:
        raise AdapterError(
            f"cannot read {file}: {error.strerror or error}", hint=beside(file)
        ) from error
    return read_adapter(data, file)


def read_adapter(data: bytes, path: Path) -> Adapter:
    """Read an adapter from the bytes of its file, which may be memory-mapped.

    Raises:
        AdapterError: If the bytes are damaged or of another kind of file.
    """
    head = bytes(data[:HEAD])
    module = import_module(format_of(path).module)
    try:
        adapter: Adapter = module.read(data, path)
    except AdapterError:
        _refuse_others(path, head)
        raise
    if adapter.replaced and not adapter.weights:
        _refuse_others(path, head)
    return adapter


def stored_bits(path: Path) -> int:
    """The bits of a number in an adapter file; 0 if its numbers are floats.

    Raises:
        AdapterError: If the file is damaged.
    """
    row = format_of(path)
    bits: int = import_module(row.module).read_bits(path.read_bytes()) if row.quantised else 0
    return bits


def save_adapter(adapter: Adapter | Quantised, path: str | os.PathLike[str]) -> Path:
    """Write an adapter file; its suffix tells the format.

    The file is written whole or not at all, and the same adapter always gives the same bytes.
    What `quantize` returned is written as safetensors.

    Raises:
        AdapterError: If the format cannot hold the adapter.
        SaveError: If the file cannot be written.

    Example:
        >>> import numpy as np, tempfile, onnx_adapt as oa
        >>> down, up = np.zeros((8, 2), "float32"), np.zeros((2, 8), "float32")
        >>> adapter = oa.Adapter("fr", {"fc": {"down": down, "up": up}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = oa.save_adapter(adapter, folder + "/fr.safetensors")
        ...     oa.load_adapter(path).name
        'fr'
    """
    file = as_path(path, "an adapter file to write").absolute()
    write_files([(file, [encode_adapter(adapter, file)])])
    return file


def encode_adapter(adapter: Adapter | Quantised, path: Path) -> bytes:
    """Encode an adapter as the bytes of its file; the suffix tells the format.

    Raises:
        AdapterError: If the format cannot hold the adapter.
    """
    row = format_of(path)
    if isinstance(adapter, Quantised):
        if not row.quantised:
            raise AdapterError(
                f"{path.name} would be {row.what}, which cannot hold quantised weights",
                hint=f"use {next(iter(FORMATS))}, or save the adapter in floats",
            )
        adapter = replace(adapter, adapter=_plain(adapter.adapter))
        encoded: bytes = import_module(row.module).write_quantised(adapter, path)
        return encoded
    plain = _plain(adapter)
    _refuse_unheld(row, plain, path)
    data: bytes = import_module(row.module).write(plain, path)
    return data


def _refuse_unheld(row: AdapterFormat, adapter: Adapter, path: Path) -> None:
    """Refuse an adapter that a format cannot hold."""
    hint = f"use {next(iter(FORMATS))}"
    if row.most_bytes is not None and adapter.size > row.most_bytes:
        most = f"{row.most_bytes / 1e9:.0f} GB"
        raise AdapterError(f"{path.name} would pass the {most} of this format", hint=hint)
    if adapter.initial_state and row.mapped:
        raise AdapterError(
            f"{path.name} would be {row.what}, whose tensors ONNX Runtime feeds in every run, "
            f"and adapter {adapter.name!r} is the first past of a decoder",
            hint=hint,
        )
    scalars = [name for name, array in adapter.feeds().items() if not array.ndim]
    if scalars and not row.scalars:
        raise AdapterError(
            f"{scalars[0]!r} is a scalar, which ONNX Runtime cannot read from this format",
            hint=hint,
        )


def _plain(adapter: Adapter) -> Adapter:
    """Copy an adapter with every array as files need it: little-endian and in C order.

    Raises:
        AdapterError: If an array is no float array, or a name cannot be text in a file.
    """
    allowed = set(DTYPES.values())
    tensors: dict[str, Array] = {}
    for name, array in adapter.tensors().items():
        tensors[name] = np.asarray(array, array.dtype.newbyteorder("="), order="C")
        if tensors[name].dtype not in allowed:
            raise AdapterError(
                f"tensor {name!r} of adapter {adapter.name!r} is {array.dtype}",
                hint=f"adapters hold {', '.join(DTYPES)}",
            )
    try:
        "".join((adapter.name, adapter.fingerprint, *tensors)).encode()
    except UnicodeEncodeError as error:
        raise AdapterError(
            f"a name in adapter {adapter.name!r} is no text: {error}",
            hint="name its slots and weights in Unicode",
        ) from error
    state = {name: tensors.pop(name) for name in adapter.initial_state}
    plain = adapter_from_tensors(adapter.name, tensors)
    return replace(
        adapter, weights=plain.weights, replaced=plain.replaced, initial_state=state
    )
