"""What a model is, in one line and as a table of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from onnx_adapt.tables import html_table
from onnx_adapt.words import count


def model_line(proto: onnx.ModelProto, label: str) -> str:
    """One line: the name, the number of nodes, what must be fed and what comes out."""
    ends = " -> ".join(
        ", ".join(value.name for end, value in _ends(proto) if end == kind)
        for kind in ("input", "output")
    )
    return f"<Model {label}: {count(len(proto.graph.node), 'node')}, {ends}>"


def model_table(proto: onnx.ModelProto, label: str) -> str:
    """The same with types and shapes, for a notebook."""
    rows = [(kind, value.name, *_declared(value)) for kind, value in _ends(proto)]
    return html_table(model_line(proto, label), ("", "name", "type", "shape"), rows)


def _ends(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.ValueInfoProto]]:
    """The inputs without a default, and the outputs."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    yield from (("input", value) for value in proto.graph.input if value.name not in stored)
    yield from (("output", value) for value in proto.graph.output)


def _declared(value: onnx.ValueInfoProto) -> tuple[str, str]:
    """The element type and the shape of a tensor, with the names of open axes."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return value.type.WhichOneof("value") or "", ""
    dims = (dim.dim_param or str(dim.dim_value or "?") for dim in tensor.shape.dim)
    shape = f"({', '.join(dims)})" if tensor.HasField("shape") else "?"
    return onnx.TensorProto.DataType.Name(tensor.elem_type).lower(), shape
