"""Inputs for a model, made from its signature, for a proof without real data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_adapt.adapter_files import npz_file
from onnx_adapt.errors import AdaptError
from onnx_adapt.files.payloads import Source
from onnx_adapt.graph.index import ModelIndex, TensorType, attribute, elem_name
from onnx_adapt.graph.layers import find_weight

Feeds = dict[str, Any]

_LENGTHS = (
    (12, 64, 120, 576, 32, 224, 3200, 1, 16000),
    (9, 96, 75, 288, 64, 256, 4800, 2, 8000),
)
"""Sizes tried for axes that can have any, for the first and the second set of inputs."""

_ALLOWANCE, _EXPANSION = 1 << 30, 16
"""Unpacked, inputs may have 1 GB more than this many times the size of their file."""

_PASS_ON = {
    "Cast",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Flatten",
    "Expand",
    "Slice",
}


@dataclass(slots=True)
class _Use:
    """What the graph does with an integer input.

    Attributes:
        bound: Size of the smallest table it indexes, or None.
        compared: Constants it is compared with.
    """

    bound: int | None = None
    compared: list[int] = field(default_factory=list)


def required_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that must be fed: those without a default."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored |= {sparse.values.name for sparse in proto.graph.sparse_initializer}
    return [value for value in proto.graph.input if value.name not in stored]


def is_dynamic(proto: onnx.ModelProto) -> bool:
    """Whether any required input has an axis without a fixed size."""
    return any(
        not dim.HasField("dim_value")
        for value in required_inputs(proto)
        for dim in value.type.tensor_type.shape.dim
    )


def candidate_feeds(index: ModelIndex, variant: int, seed: int) -> Iterator[Feeds]:
    """Sets of inputs to try, the likeliest first; `variant` 1 has other shapes than 0.

    Ids stay inside the table they index, masks are ones, integers that the graph
    compares with a constant take that value.

    Raises:
        AdaptError: If an input is of a kind that cannot be made up.
    """
    inputs = {}
    for value in required_inputs(index.model.proto):
        if not value.type.HasField("tensor_type"):
            raise AdaptError(
                f"input {value.name!r} is not a tensor; inputs cannot be made up",
                hint="give real ones with --inputs FILE.npz",
            )
        inputs[value.name] = index.main.types.get(value.name, TensorType())
    for name, size in _head_sizes(index).items():
        if name in inputs and (shape := inputs[name].shape):
            inputs[name] = replace(inputs[name], shape=(*shape[:-1], size))
    uses = {name: _trace(index, name) for name in inputs}
    seen = set()
    for length in _LENGTHS[variant]:
        for batch in dict.fromkeys((1 + variant, 1)):
            shapes = {
                name: tuple(
                    _size(d, i, batch, length) for i, d in enumerate(known.shape or ())
                )
                for name, known in inputs.items()
            }
            key = tuple(shapes.values())
            if key not in seen:
                seen.add(key)
                rng = np.random.default_rng(seed + variant)
                yield {
                    name: _value(name, known, shapes[name], uses[name], variant, length, rng)
                    for name, known in inputs.items()
                }


def _head_sizes(index: ModelIndex) -> dict[str, int]:
    """The last axis of keys and values in a cache, which onnxruntime-genai leaves open."""
    sizes = {}
    for node in index.main.nodes:
        if node.op_type != "GroupQueryAttention":
            continue
        heads = attribute(node, "num_heads", 0)
        if not any(node.input[1:3]):
            heads += 2 * attribute(node, "kv_num_heads", 0)
        *_, width = index.main.type_of(node.input[0]).shape or (None,)
        if isinstance(width, int) and heads:
            sizes.update(dict.fromkeys(filter(None, node.input[3:5]), width // heads))
    return sizes


def _size(dim: int | str | None, axis: int, batch: int, length: int) -> int:
    """The size of an axis: fixed, or by what its symbol is called."""
    if isinstance(dim, int):
        return dim
    if dim and "+" in dim:
        parts = [part.strip() for part in dim.split("+")]
        return sum(int(p) if p.isdigit() else _size(p, 1, batch, length) for p in parts)
    label = (dim or "").lower()
    if "past" in label or "cache" in label:
        return 0
    if "batch" in label or (axis == 0 and not re.search("len|seq|time|frame", label)):
        return batch
    return 3 if "channel" in label else length


def _value(
    name: str,
    known: TensorType,
    shape: tuple[int, ...],
    use: _Use,
    variant: int,
    length: int,
    rng: np.random.Generator,
) -> Any:
    if elem_name(known.elem_type) == "string":
        return np.full(shape, "a", dtype=object)
    dtype = helper.tensor_dtype_to_np_dtype(known.elem_type)
    if dtype.kind not in "iub":
        return rng.standard_normal(shape).astype(dtype)
    label = name.lower()
    if dtype.kind == "b" or "mask" in label:
        return np.ones(shape, dtype)
    if use.compared:
        # The second set takes another value, so that another branch runs.
        value = use.compared[0] if variant == 0 else [*use.compared, use.compared[0] // 2][1]
        return np.full(shape, value, dtype)
    if "position" in label and shape:
        ids = np.broadcast_to(np.arange(shape[-1]), shape)
        return (ids % (use.bound or ids.size + 1)).astype(dtype)
    if use.bound:
        return rng.integers(0, use.bound, shape).astype(dtype)
    if dtype.itemsize == 1:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
    return np.full(shape, length if "len" in label else 1, dtype)


def _trace(index: ModelIndex, name: str) -> _Use:
    """Follow an input through the operators that pass its values on."""
    view = index.main
    use, waiting, seen = _Use(), [name], {name}
    while waiting:
        tensor = waiting.pop()
        for node in view.readers(tensor):
            position = list(node.input).index(tensor) if tensor in node.input else -1
            if node.op_type in ("Gather", "GatherBlockQuantized") and position == 1:
                table = find_weight(view, node.input[0])
                if table is not None and table.dims:
                    rows = table.dims[attribute(node, "axis", 0)]
                    use.bound = min(use.bound or rows, rows)
            elif node.op_type == "EmbedLayerNormalization" and position in (0, 1):
                table = find_weight(view, node.input[position + 2])
                if table is not None:
                    use.bound = table.dims[0]
            elif node.op_type == "Equal":
                other = view.constant(node.input[1 - position])
                if other is not None:
                    use.compared += [int(v) for v in numpy_helper.to_array(other).flat][:4]
            elif node.op_type in (*_PASS_ON, "Gather") and position == 0:
                fresh = [out for out in node.output if out not in seen]
                seen.update(fresh)
                waiting += fresh
    return use


def load_feeds(path: Path, proto: onnx.ModelProto) -> Feeds:
    """Read inputs from an `.npz` and check them against the model.

    Raises:
        AdaptError: If the file cannot be read or does not fit the model.
    """
    return check_feeds(read_arrays(path), proto, str(path))


def read_arrays(path: Path) -> Feeds:
    """Read inputs from an `.npz`.

    Raises:
        AdaptError: If the file cannot be read.
    """
    try:
        size = Source.of(path).size
        with path.open("rb") as file:
            stored = npz_file.read_arrays(file, path, _ALLOWANCE + _EXPANSION * size)
    except (OSError, ValueError) as error:
        raise AdaptError(
            f"cannot read inputs from {path}: {error}", hint="numpy.savez writes such a file"
        ) from error
    return {name: np.array(value) for name, value in stored.items()}  # not read-only


def check_feeds(feeds: Mapping[str, Any], proto: onnx.ModelProto, origin: str) -> Feeds:
    """Check that inputs have the names and element types a model asks for.

    Raises:
        AdaptError: If one is missing, unknown or of another type.
    """
    known = {value.name: value for value in proto.graph.input}
    needed = [value.name for value in required_inputs(proto)]
    if missing := [name for name in needed if name not in feeds]:
        raise AdaptError(
            f"{origin} has no array for input {missing[0]!r}",
            hint=f"the model needs: {', '.join(needed)}",
        )
    if unknown := [name for name in feeds if name not in known]:
        raise AdaptError(
            f"{origin} has {unknown[0]!r}, which is no input of the model",
            hint=f"the model needs: {', '.join(needed)}",
        )
    for name, array in feeds.items():
        wanted = known[name].type.tensor_type.elem_type
        if wanted and np.asarray(array).dtype != helper.tensor_dtype_to_np_dtype(wanted):
            raise AdaptError(
                f"{origin}: input {name!r} is {np.asarray(array).dtype}, the model wants "
                f"{elem_name(wanted)}",
                hint="convert it with numpy's astype",
            )
    return dict(feeds)
