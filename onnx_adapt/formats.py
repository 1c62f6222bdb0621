"""The adapter file formats, one row each: to add a format is to add a row here.

The table stands on the ground floor because every room asks it something: how a file is
recognised, what its name ends in, what `--format` offers. It imports none of the modules
that read and write files; a row names its module, which is imported when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFormat:
    """One adapter file format.

    Attributes:
        name: What `--format` calls it.
        suffix: What the names of its files end in.
        module: The module with `read(data, path) -> Adapter` and
            `write(adapter, path) -> bytes`.
        what: What messages call such a file.
        head: A regular expression for the first bytes of such a file.
        as_model: What to do with such a file where a model is wanted; `{name}` is the
            file's name.
        only_adapters: Whether every file with this suffix is taken for an adapter. If not,
            only `MODEL.NAME<suffix>` is taken for one of MODEL.
        mapped: Whether ONNX Runtime maps such a file into memory itself.
        scalars: Whether it can hold a tensor without axes.
        most_bytes: How many bytes of weights it can hold, or None for any number.
        quantised: Whether it can hold numbers of few bits: its module has
            `write_quantised(quantised, path) -> bytes` and `read_bits(data) -> int` then.
    """

    name: str
    suffix: str
    module: str
    what: str
    head: bytes
    as_model: str
    only_adapters: bool
    mapped: bool
    scalars: bool
    most_bytes: int | None
    quantised: bool


EXPORT = (
    "export the model that it was saved from to ONNX: torch.onnx.export, or "
    "`optimum-cli export onnx`"
)
"""What to do about weights where a model is wanted."""

_ROWS = (
    AdapterFormat(
        name="safetensors",
        suffix=".safetensors",
        module="onnx_adapt.adapter.safetensors",
        what="a safetensors file",
        head=rb".{7}\x00\{\s*\"",
        as_model=f"it has no graph: {EXPORT}",
        only_adapters=True,
        mapped=False,
        scalars=True,
        most_bytes=None,
        quantised=True,
    ),
    AdapterFormat(
        name="onnx_adapter",
        suffix=".onnx_adapter",
        module="onnx_adapt.adapter.onnx_adapter",
        what="an .onnx_adapter file",
        head=rb".{2}\x00\x00TORT",
        as_model="it goes with a model: `onnx-adapt run MODEL.onnx --inputs x.npz --adapter "
        "{name}`",
        only_adapters=True,
        mapped=True,
        scalars=False,
        most_bytes=2**31 - 1 - (1 << 20),  # a FlatBuffers file ends at 2 GB, names included
        quantised=False,
    ),
    AdapterFormat(
        name="npz",
        suffix=".npz",
        module="onnx_adapt.adapter.npz",
        what="an .npz archive of arrays",
        head=rb"PK\x03\x04.{26}[^\0]{0,200}?\.npy",
        as_model="arrays have no graph; --inputs and --adapter take them, MODEL is an .onnx "
        "file",
        only_adapters=False,
        mapped=False,
        scalars=True,
        most_bytes=None,
        quantised=False,
    ),
)

FORMATS = {row.suffix: row for row in _ROWS}
"""The formats by suffix. The first one is the default, and can hold every adapter."""


def format_names() -> list[str]:
    """What `--format` offers, the default first.

    Example:
        >>> format_names()
        ['safetensors', 'onnx_adapter', 'npz']
    """
    return [row.name for row in FORMATS.values()]


def suffix_of(name: str) -> str:
    """The suffix of a format that `--format` names.

    Example:
        >>> suffix_of("npz")
        '.npz'
    """
    return next(row.suffix for row in FORMATS.values() if row.name == name)


def suffix_list() -> str:
    """The suffixes of adapter files as a sentence lists them.

    Example:
        >>> suffix_list()
        '.safetensors, .onnx_adapter or .npz'
    """
    *rest, last = FORMATS
    return f"{', '.join(rest)} or {last}"


def adapter_files(model: Path) -> list[Path]:
    """The files beside a model that are taken for its adapters, sorted."""
    return sorted(
        path
        for path in model.absolute().parent.glob("*")
        if (row := FORMATS.get(path.suffix))
        if row.only_adapters or path.stem.startswith(f"{model.stem}.")
    )
