"""`.npz`: numpy's own archive, for people who make weights in numpy."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.adapter import Adapter
from onnx_adapt.adapter_files.record import KEY, adapter_from_record, write_record
from onnx_adapt.errors import AdapterError

_BFLOAT16 = ".bfloat16"
"""Ends the name of an array that numpy has no type for: its bits are kept as uint16."""


def read(data: bytes, path: Path) -> Adapter:
    """Read an adapter, with the record that `write` puts in or without."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise AdapterError(
            f"{path.name} is not a whole .npz file of arrays: {error}",
            hint="numpy.savez writes such a file; arrays of objects are not read",
        ) from error
    record = arrays.pop(KEY, None)
    tensors: dict[str, Array] = {}
    for name, array in arrays.items():
        if name.endswith(_BFLOAT16) and array.dtype == np.uint16:
            tensors[name.removesuffix(_BFLOAT16)] = array.view(DTYPES["bfloat16"])
        else:
            tensors[name] = array
    return adapter_from_record(None if record is None else str(record), tensors, path)


def write(adapter: Adapter, path: Path) -> bytes:
    """The bytes of an adapter; every entry has one fixed date, so they are always the same."""
    arrays: dict[str, Array] = {KEY: np.array(write_record(adapter))}
    for name, array in adapter.feeds().items():
        wide = array.dtype == DTYPES["bfloat16"]
        arrays[name + _BFLOAT16 if wide else name] = array.view(np.uint16) if wide else array
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), entry.getvalue())
    return out.getvalue()
