"""What an insert changes that nobody asked it to change: every field is compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from large_models import chain
from onnx import helper

Leaf = tuple[str, object]


def leaves(message: Message, path: str = "") -> Iterator[Leaf]:
    """Every value in a message and where it is; things that have names are found by them."""
    for field, value in message.ListFields():
        at = f"{path}.{field.name}"
        items = value if field.is_repeated else [value]
        if field.message_type is None:
            yield at, tuple(items)
            continue
        for i, item in enumerate(items):
            yield from leaves(item, f"{at}[{_name(item, i)}]" if field.is_repeated else at)
    for unknown in UnknownFieldSet(message):
        yield f"{path}.#{unknown.field_number}", str(unknown.data)


def _name(item: Any, position: int) -> object:
    for key in ("name", "key", "tensor_name", "domain"):
        if name := getattr(item, key, ""):
            return name
    output = getattr(item, "output", None)
    return output[0] if output else position


def lost(base: onnx.ModelProto, result: onnx.ModelProto) -> list[str]:
    """Where the result lacks, or has another, value than the base.

    Which tensor a node reads and writes is what an insert is asked to change.
    """
    kept = Counter(leaves(result))
    return sorted(
        path
        for path, value in Counter(leaves(base)) - kept
        if not (path.startswith(".graph.node[") and path.endswith((".input", ".output")))
    )


def rich_model() -> onnx.ModelProto:
    """A small valid model with something in every corner of the format."""
    model = chain(3, 16)
    model.producer_name, model.producer_version, model.domain = "maker", "1.2", "here"
    model.model_version, model.doc_string = 7, "a model"
    graph = model.graph
    graph.doc_string = "a graph"
    for tensor in graph.initializer:
        tensor.raw_data, tensor.doc_string = bytes(16 * 16 * 4), f"{tensor.name} of layer"
        tensor.metadata_props.add(key="origin", value=tensor.name)
    for node in graph.node:
        node.doc_string = f"{node.name} in doc"
        node.metadata_props.add(key="namespace", value=f": model/{node.name}")
    for holder in (model, graph, graph.input[0], graph.output[0]):
        holder.metadata_props.add(key="made by", value="hand")
    graph.input[0].type.denotation = "FEATURES"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.input[0].doc_string = "what goes in"
    shape = ["batch", "sequence", 16]
    graph.value_info.append(helper.make_tensor_value_info("/layers.1/Tanh_output", 1, shape))
    values = helper.make_tensor("spare", 1, [2], [1.0, 2.0])
    places = helper.make_tensor("spare_at", onnx.TensorProto.INT64, [2], [0, 3])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8]))
    note = graph.quantization_annotation.add(tensor_name="layers.0.weight")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="layers.1.weight")
    model.opset_import.append(helper.make_opsetid("local", 1))
    twice = model.functions.add(name="Twice", domain="local", doc_string="a function")
    twice.input.append("a")
    twice.output.append("b")
    twice.node.append(helper.make_node("Add", ["a", "a"], ["b"]))
    twice.opset_import.append(helper.make_opsetid("", 17))
    step = model.training_info.add()
    step.algorithm.CopyFrom(helper.make_graph([], "step", [], [], []))
    step.update_binding.add(key="layers.0.weight", value="layers.0.weight")
    newer = bytes([0xB2, 0xC2, 0x01, 0x02, 0x68, 0x69])  # field 3110 of a later version
    graph.MergeFromString(newer)
    graph.node[3].MergeFromString(newer)
    return model
